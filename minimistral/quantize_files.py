"""Plumbing of quantize.py: quantized models in folders, whole or not at all, and
checkpoints that are quantized on their way into memory."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimistral.checkpoint import load_model, open_model
from minimistral.checkpoint_files import (
    finite, on_meta, read_stored, read_weight, write_weights, written_whole)
from minimistral.config import ModelConfig
from minimistral.model import Transformer
from minimistral.quantize import (
    Int4Linear, QuantizedLinear, layers_to_quantize, quantize_model)
from minimistral.shipped import find_model

STEM = "quantized"


def save_quantized(model: Transformer, folder) -> None:
    """Write a quantized model into a folder, whole or not at all: params.json and
    quantized.safetensors. A quantized layer is two tensors there: `packed`, int8 for 8
    bits or uint8 for two numbers of 4 bits in a byte, and `scales`, bfloat16, of which a
    row has as many as groups. All other tensors are those of Mistral's layout."""
    kinds = {type(module) for module in model.modules()}
    if Int4Linear in kinds:
        raise ValueError("this model's layers are in the order of a kernel, which other "
                         "machines can't read: save it before use_kernels")
    if QuantizedLinear not in kinds:
        raise ValueError("no layer of this model is quantized: call quantize_model "
                         "first, or save it with save_model")
    with written_whole(folder, stem=STEM) as draft:
        write_weights(draft, STEM, model.state_dict())
        model.config.to_json(draft / "params.json")


def load_quantized(folder_or_name, bits: int = 8, group: int | None = None, skip=(), *,
                   device=None, dtype=None) -> Transformer:
    """Load a model in few bits. A folder that save_quantized wrote is loaded as it is:
    bits, group and skip are in it. Any other checkpoint is quantized on the way in, so that
    besides the result one tensor at a time is held. An adapter is merged into its base
    first, which is then held whole.

    dtype: of what stays a float; None keeps that of the stored embeddings. The products
    of quantized layers take any dtype; torch's kernels work in bfloat16.
    Raises ValueError, naming file and tensor, for a file that is damaged or doesn't fit.
    """
    folder = find_model(folder_or_name)
    if (folder / f"{STEM}.safetensors").is_file():
        return load_saved(folder, device, dtype)
    if (folder / "adapter.json").is_file():
        return quantize_model(load_model(folder, device=device, dtype=dtype), bits, group, skip)
    model, places, dtype = open_model(folder, device, dtype)
    chosen = set(layers_to_quantize(model, bits, group, skip))
    for name, place in places.items():
        layer = name.removesuffix(".weight")
        if layer in chosen:
            weight = read_stored(*place[:2]).to(device or "cpu", dtype)
            model.set_submodule(layer, QuantizedLinear.of(weight, bits, group))
        else:
            weight = read_weight(*place, device, dtype)
            model.load_state_dict({name: weight}, strict=False, assign=True)
        del weight
    return model.eval()


def load_saved(folder: Path, device=None, dtype=None) -> Transformer:
    """The model in a folder of save_quantized."""
    file = folder / f"{STEM}.safetensors"
    try:
        with safe_open(file, framework="pt", device=str(device or "cpu")) as opened:
            names = list(opened.keys())
            if "tok_embeddings.weight" not in names:
                raise ValueError(f"{file} lacks tensor 'tok_embeddings.weight'")
            dtype = dtype or opened.get_tensor("tok_embeddings.weight").dtype
            model = on_meta(ModelConfig.from_json(folder / "params.json"))
            for name in names:
                put(model, name, opened.get_tensor, set(names), dtype, file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): make it again with "
                         f"save_quantized") from None
    left = [name for name, weight in model.state_dict().items() if weight.is_meta]
    if left:
        raise ValueError(f"{file} lacks tensor {left[0]!r} ({len(left)} in all)")
    return model.eval()


def put(model: Transformer, name: str, read, names: set[str], dtype, file: Path) -> None:
    """Bring one tensor of the file to its place; a layer's `packed` brings its `scales`."""
    layer, _, kind = name.rpartition(".")
    there = dict(model.named_modules())
    whole = f"{layer}.weight"
    if kind == "scales" and f"{layer}.packed" in names:
        return
    if layer not in there or kind not in ("packed", "weight"):
        raise ValueError(f"{file}: tensor {name!r} has no place in this model: do "
                         f"params.json and the weights belong together?")
    if kind == "packed":
        if f"{layer}.scales" not in names:
            raise ValueError(f"{file} lacks tensor '{layer}.scales'")
        # Copies: a file's tensors lie at addresses that the kernels don't take.
        packed, scales = read(name).clone(), read(f"{layer}.scales").clone()
        check_pair(packed, scales, tuple(there[layer].weight.shape), f"{file}: {layer!r}")
        model.set_submodule(layer, QuantizedLinear(packed, scales, dtype))
        return
    weight, wanted = read(name), tuple(model.state_dict()[whole].shape)
    if tuple(weight.shape) != wanted or not weight.is_floating_point():
        raise ValueError(f"{file}: tensor {name!r} is {weight.dtype} of shape "
                         f"{tuple(weight.shape)}, but the configuration asks for floats of "
                         f"shape {wanted}")
    if not finite(weight):
        raise ValueError(f"{file}: tensor {name!r} holds NaN or infinity")
    model.load_state_dict({name: weight.to(dtype)}, strict=False, assign=True)


def check_pair(packed: Tensor, scales: Tensor, shape: tuple[int, int], where: str) -> None:
    """Raise ValueError unless whole numbers and scales are those of a weight of this shape."""
    rows, columns = shape
    halves = {torch.int8: 1, torch.uint8: 2}.get(packed.dtype)
    if not halves or tuple(packed.shape) != (rows, columns // halves):
        raise ValueError(f"{where} is stored as {packed.dtype} of shape "
                         f"{tuple(packed.shape)}; for {rows} rows of {columns} it is int8 "
                         f"(8 bits) or uint8 with half as many columns (4 bits)")
    if scales.dim() != 2 or len(scales) != rows or columns % max(1, scales.shape[1]):
        raise ValueError(f"{where}: scales of shape {tuple(scales.shape)} don't share out "
                         f"{rows} rows of {columns}")
    if not scales.is_floating_point() or not finite(scales):
        raise ValueError(f"{where}: its scales hold NaN or infinity, or are no floats")
