"""Weights in few bits: whole numbers and scales in place of floats.

The weights of a row, or of a group of 32 or 128 in it, share one scale; of a weight
we store how many such steps it is from zero, in 8 bits or in 4. Activations stay
floats: only the weights are made small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torch's kernels are taken unless the classroom has replaced a plain piece.
FAST = True
BITS, GROUPS = (8, 4), (None, 32, 128)
# The router has few weights, and an error there does not move a number a little: it
# sends the token to another expert.
KEPT = ("gate",)
FEW_ROWS = 16                           # beyond it the plain product is faster
BLOCK = 2**20                           # weights that are floats at one time


# ------------------------------------------------------------ numbers in few bits


def quantize(weight: Tensor, bits: int, group: int | None = None
             ) -> tuple[Tensor, Tensor]:
    """Round each weight to a whole number of steps. The largest of a group is
    2**(bits - 1) - 1 steps from zero, so that the step, its scale, follows from it.

    weight: (out, in), bits: 2 to 8, group: neighbours in a row that share a scale,
    None for the whole row -> whole numbers, int8 (out, in); scales, bfloat16
    (out, in / group).
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits!r} must be a whole number from 2 to 8")
    columns = weight.shape[1]
    if group is not None and (group < 1 or columns % group):
        raise ValueError(f"group={group} does not divide the {columns} columns: a "
                         f"group lies within one row")
    most = 2 ** (bits - 1) - 1                               # 127, 7: both signs
    groups = weight.detach().float().unflatten(1, (-1, group or columns))
    largest = groups.abs().amax(dim=-1)                      # (out, in / group)
    if not largest.isfinite().all():
        raise ValueError("the weights hold NaN or infinity, which have no scale")
    scales = (largest / most).bfloat16()
    steps = scales.float().clamp(min=1e-30)[..., None]       # all zeros: not 0 / 0
    numbers = (groups / steps).round_().clamp_(-most, most)
    return numbers.to(torch.int8).flatten(1), scales


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """The weights again, nearly: each number times the scale of its group.

    numbers: int8 (out, in), scales: (out, in / group) -> float32 (out, in)
    """
    groups = numbers.unflatten(1, (scales.shape[1], -1))     # (out, groups, group)
    return (groups * scales.float()[..., None]).flatten(1)


def pack(numbers: Tensor) -> Tensor:
    """Two 4-bit numbers in one byte: -7..7 become 1..15 by adding 8, and the first
    of a pair is the left half of the byte. The number of columns is even.

    int8 (out, in) -> uint8 (out, in / 2)
    """
    if numbers.shape[1] % 2:
        raise ValueError(f"{numbers.shape[1]} columns can't be packed in pairs: 4 "
                         f"bits need an even number of columns")
    shifted = (numbers + 8).to(torch.uint8)                  # no sign any more
    return shifted[:, 0::2] << 4 | shifted[:, 1::2]


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: uint8 (out, in / 2) -> int8 (out, in)"""
    halves = torch.stack([packed >> 4, packed & 15], dim=-1)  # (out, in / 2, 2)
    return halves.flatten(1).to(torch.int8) - 8


# ------------------------------------------------------------ the layers


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is whole numbers and scales: 8 bits for a weight,
    or 4 in packed pairs, and 16 for a scale. `.weight` is what they stand for.

    x: (..., in) -> (..., out), in the dtype of x
    """

    def __init__(self, packed: Tensor, scales: Tensor, dtype=torch.float32):
        super().__init__()
        self.bits = 8 if packed.dtype == torch.int8 else 4
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        like = torch.empty(0, dtype=dtype, device=packed.device)
        self.register_buffer("like", like, persistent=False)  # follows model.to()
        self.kernel = fast_int8_fits(self)

    @classmethod
    def of(cls, weight: Tensor, bits: int, group: int | None) -> "QuantizedLinear":
        """Quantize a weight, (out, in), some rows at a time to save memory."""
        step = max(1, BLOCK // weight.shape[1])
        for at in range(0, len(weight), step):
            numbers, part = quantize(weight[at:at + step], bits, group)
            numbers = numbers if bits == 8 else pack(numbers)
            if at == 0:                               # room for the others' results
                packed = numbers.new_empty(len(weight), numbers.shape[1])
                scales = part.new_empty(len(weight), part.shape[1])
            packed[at:at + step], scales[at:at + step] = numbers, part
        return cls(packed, scales, weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The weights as floats, made anew at each call: (out, in)"""
        numbers = self.packed if self.bits == 8 else unpack(self.packed)
        return dequantize(numbers, self.scales).to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and x.requires_grad
        if FAST and self.kernel and not learning and x[..., 0].numel() <= FEW_ROWS:
            return fast_int8(x, self.packed, self.scales)
        return F.linear(x, self.weight.to(x.dtype))


def fast_int8(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """The product by torch's kernel, which reads the whole numbers as they are and
    multiplies in bfloat16, so that x is rounded to that: (..., in) -> (..., out)"""
    rows = x.reshape(-1, x.shape[-1]).bfloat16()
    rows = rows.clone(memory_format=torch.contiguous_format)    # see fast_int8_fits
    out = torch._weight_int8pack_mm(rows, numbers, scales[:, 0].bfloat16())
    return out.view(*x.shape[:-1], -1).to(x.dtype)


def fast_int8_fits(layer: QuantizedLinear) -> bool:
    """Whether the kernel is there, takes this shape and gives the plain result. It
    does not check its input: on a CPU a row that begins at an address which is no
    multiple of 32 ends the program, as in torch 2.13 with 17 columns."""
    rows, columns = layer.packed.shape
    if layer.bits != 8 or layer.scales.shape[1] != 1 or rows % 16 or columns % 32:
        return False
    few = slice(0, 64)                                       # outputs, to save time
    return layer.packed.data_ptr() % 32 == 0 and agrees(
        lambda x: fast_int8(x, layer.packed[few], layer.scales[few]),
        dequantize(layer.packed[few], layer.scales[few]))


def agrees(fast, weight: Tensor) -> bool:
    """Whether fast(x) runs and gives x @ weight.T, to the digits of bfloat16."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=chance).bfloat16()
    x = x.to(weight.device)
    try:
        given = fast(x).float()
    except (RuntimeError, AttributeError):                   # refused, or not there
        return False
    plain = F.linear(x.float(), weight)
    return bool((given - plain).norm() <= 0.02 * plain.norm())


def fast_int4(layer: QuantizedLinear) -> "Int4Linear | None":
    """The layer in the order of torch's 4-bit kernel; None where that is absent,
    refuses the shape, or does not give the plain result."""
    rows, columns = layer.packed.shape[0], 2 * layer.packed.shape[1]
    group = columns // layer.scales.shape[1]
    if rows % 16 or columns % 32 or group not in (32, 64, 128, 256):
        return None
    try:
        ordered = Int4Linear(layer.packed, layer.scales, group)
    except (RuntimeError, AttributeError):
        return None
    return ordered if agrees(ordered, layer.weight.float()) else None


class Int4Linear(nn.Module):
    """A 4-bit layer in the order that torch's kernel for this device wants. It
    differs between machines and has no way back: save the model before.

    x: (..., in) -> (..., out), in the dtype of x
    """

    def __init__(self, packed: Tensor, scales: Tensor, group: int):
        super().__init__()
        self.group, self.cpu = group, packed.device.type == "cpu"
        if self.cpu:
            positive = unpack(packed).int() + 8              # (out, in), 1 to 15
            ordered = torch._convert_weight_to_int4pack_for_cpu(positive, 1)
        else:
            tiles = 8 if packed.shape[1] % 64 == 0 else 2
            ordered = torch._convert_weight_to_int4pack(packed, tiles)
        scales = scales.T.bfloat16()                         # (in / group, out)
        pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1)
        self.register_buffer("ordered", ordered)
        self.register_buffer("pairs", pairs.contiguous())    # scale, zero point

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        product = (torch._weight_int4pack_mm_for_cpu if self.cpu
                   else torch._weight_int4pack_mm)
        out = product(rows, self.ordered, self.group, self.pairs.bfloat16())
        return out.view(*x.shape[:-1], -1).to(x.dtype)


def use_kernels(model: nn.Module, output: bool = False) -> int:
    """Put the 4-bit layers that torch's kernel takes into its order, in place, and
    look anew which 8-bit layers the other kernel takes (after a move to another
    device). Returns how many layers run on a kernel; the others stay plain.

    output: whether the output layer may change, too. `Transformer` reads its
    weight, which a kernel's order does not give back; the engine calls it.
    """
    count = 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            layer.kernel = fast_int8_fits(layer)
            count += layer.kernel
            ordered = None
            if layer.bits == 4 and (output or name != "output"):
                ordered = fast_int4(layer)
            if ordered is not None:
                model.set_submodule(name, ordered)
                count += 1
    return count


# ------------------------------------------------------------ whole models


def layers_to_quantize(model: nn.Module, bits: int, group: int | None, skip
                       ) -> list[str]:
    """The names of the layers that quantize_model will replace. Raises ValueError,
    before anything is changed, for numbers that don't fit them."""
    if bits not in BITS:
        raise ValueError(f"bits={bits!r} must be 8 or 4: fewer bits cost more than "
                         f"they save (chapter 12), and 16 is a dtype")
    if group not in GROUPS:
        raise ValueError(f"group={group!r} must be None (one scale for each row), "
                         f"32 or 128")
    skip = [skip] if isinstance(skip, str) else list(skip)
    found = {name: layer for name, layer in model.named_modules()
             if isinstance(layer, nn.Linear)}
    kinds = {name.split(".")[-1] for name in found}
    if unknown := sorted(set(skip) - kinds - set(found)):
        raise ValueError(f"skip={unknown} names no linear layer: there are the "
                         f"kinds {sorted(kinds)}, and single ones such as "
                         f"{list(found)[0]!r}")
    chosen = [name for name in found
              if not {name, name.split(".")[-1]} & {*skip, *KEPT}]
    for name in chosen:
        columns = found[name].in_features
        if columns % (group or (2 if bits == 4 else 1)):
            raise ValueError(f"{name} has {columns} columns, no multiple of "
                             f"{f'group={group}' if group else '2'}: take another "
                             f"group of {GROUPS}, or skip={name.split('.')[-1]!r}")
        if found[name].bias is not None:
            raise ValueError(f"{name} has a bias, which a quantized layer has not")
    return chosen


def quantize_model(model: nn.Module, bits: int = 8, group: int | None = None,
                   skip=()) -> nn.Module:
    """Replace a model's linear layers by quantized ones, in place, one by one:
    besides the result never more than one layer is held. Returns the model.

    skip: kinds of layers ("output", "w2") or whole names that stay as they are. The
    router (`gate`), norms and token embeddings, tied or not, stay in any case: of
    the embeddings a token reads one row.
    """
    for name in layers_to_quantize(model, bits, group, skip):
        layer = model.get_submodule(name)
        model.set_submodule(name, QuantizedLinear.of(layer.weight, bits, group))
    return model
