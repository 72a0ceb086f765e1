"""The model arranged for speed: joint products, and caches of one fixed shape.

Writing one token reads every weight once and computes little with it, so the time
is that of reading, if nothing else costs more. What else costs: starting many small
operations, products that use one core, shapes that change. `FastModel` computes
what `Transformer` does, with its weights, in fewer operations of fixed shapes, so
that the engine can compile a whole step.
"""

import math
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral import large_pages, onednn
from minimistral.attention import may_attend
from minimistral.moe import MoE, chosen_experts, route
from minimistral.quantize import Int4Linear, QuantizedLinear
from minimistral.rope import rotary_angles, rotate

DEFAULT_SLOTS = 4096                # of a layer without a window
FEW, FEW_ROWS = 16, 8               # queries, and rows, that have ways of their own
LARGE = 1 << 19                     # numbers of a matrix for which half the rows do


# ------------------------------------------------------------ products


def product(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """F.linear(x, weight), also fast on the CPU.

    x: (..., in), weight: (out, in), parts dividing out -> (..., out)
    There PyTorch gives the product of one row and a float32 matrix to one core, but
    a batch of products to all: so the matrix is read as parts, one for each core.
    For a few rows it would first copy the matrix into another order, unless the
    matrix comes first. More go to oneDNN (onednn.py), with a large matrix sooner.
    Compiled, one row becomes a loop of its own, shared by all cores.
    """
    rows = x.numel() // x.shape[-1]
    if x.device.type == "cpu" and x.dtype == torch.float32:
        few = FEW_ROWS if weight.numel() < LARGE else FEW_ROWS // 2
        if rows > few and onednn.THERE:
            return onednn.wide_product(x, weight)
        if rows > 1:
            return (weight @ x.reshape(rows, -1).T).T.reshape(*x.shape[:-1], -1)
        if parts > 1:
            matrices = weight.view(parts, -1, weight.shape[1]).transpose(1, 2)
            out = torch.bmm(x.reshape(1, 1, -1).expand(parts, 1, -1), matrices)
            return out.view(*x.shape[:-1], -1)
    elif x.device.type == "cpu" and rows == 1 and torch.compiler.is_compiling():
        wide = weight.float() * x.flatten().float()      # one loop, no copy
        return wide.sum(dim=-1).to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class AllCores:
    """A context in which the model's linear layers share one float32 row on the CPU
    among all cores, as `product` does. The sums are the same, and so is the text.
    """

    def __init__(self, model: nn.Module):
        self.ways = [(layer, shared_forward(layer.weight))
                     for layer in model.modules() if type(layer) is nn.Linear
                     and layer.bias is None and "forward" not in vars(layer)
                     and layer.weight.dtype == torch.float32
                     and layer.weight.device.type == "cpu"]

    def __enter__(self) -> None:
        for layer, forward in self.ways:
            vars(layer)["forward"] = forward

    def __exit__(self, *_) -> None:
        for layer, _ in self.ways:
            vars(layer).pop("forward", None)             # the class's again


def shared_forward(weight: Tensor):
    """F.linear(x, weight) as a function of x, one row shared among all cores."""
    parts = math.gcd(len(weight), torch.get_num_threads())
    matrices = weight.view(parts, -1, weight.shape[1]).transpose(1, 2)

    def forward(x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1]:
            return F.linear(x, weight)
        return torch.bmm(x.expand(parts, 1, -1), matrices).view(*x.shape[:-1], -1)
    return forward


def join_weights(layers: Sequence[nn.Module]) -> Tensor:
    """The weights of layers that read the same input, one below the other in one
    tensor: (out of all, in). The layers' own weights become parts of it, so that no
    memory is added, and joining again finds the same tensor."""
    weights = [layer.weight for layer in layers]
    first, offset = weights[0], weights[0].storage_offset()
    together = True
    for weight in weights:
        together &= (weight.is_contiguous() and weight.storage_offset() == offset
                     and weight.untyped_storage().data_ptr()
                     == first.untyped_storage().data_ptr())
        offset += weight.numel()
    rows = [len(weight) for weight in weights]
    shape = sum(rows), first.shape[1]
    if together and not large_pages.wanted(first):
        return first.detach().as_strided(shape, first.stride())
    joint = large_pages.empty_like(first, shape)
    torch.cat([weight.detach() for weight in weights], out=joint)
    for weight, part in zip(weights, joint.split(rows)):
        weight.data = part
    return joint


class Joint:
    """Several linear layers of the same input as one product. Layers of another
    kind than nn.Linear are called one by one, quantized ones as they stand.

    x: (..., in) -> a tuple of (..., out), one for each layer
    """

    def __init__(self, *layers: nn.Module):
        self.calls, self.weight = [as_it_stands(layer) for layer in layers], None
        if is_plain(*layers):
            self.weight = join_weights(layers)
            self.rows = [len(layer.weight) for layer in layers]
            self.parts = math.gcd(len(self.weight), torch.get_num_threads())

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.weight is None:
            return tuple(layer(x) for layer in self.calls)
        return product(x, self.weight, self.parts).split(self.rows, dim=-1)


def is_plain(*layers: nn.Module) -> bool:
    """Whether the layers are nothing but a weight matrix each."""
    return all(type(layer) in (nn.Linear, nn.Embedding)
               and getattr(layer, "bias", None) is None for layer in layers)


def as_it_stands(layer: nn.Module):
    """How a layer is called: one with kernels for few bits so that the compiler
    does not look into it, as its own ways of these fail (torch 2.13)."""
    if isinstance(layer, QuantizedLinear):
        return OpaqueLayer(layer, len(layer.scales))
    if isinstance(layer, Int4Linear):
        return OpaqueLayer(layer, layer.pairs.shape[1])
    return layer


def by_rows(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer has 8 bits, a scale for each row, and x is a single row."""
    return (isinstance(layer, QuantizedLinear) and layer.bits == 8
            and layer.scales.shape[1] == 1 and x.numel() == x.shape[-1])


def product_in_8_bits(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """One row times whole numbers, compiled into one loop that reads their bytes.

    x: (..., in), one row; numbers: int8 (out, in), scales: (out, 1) -> (..., out)
    """
    wide = (numbers.float() * x.flatten().float()).sum(dim=-1)
    wide = wide * scales[:, 0].float()
    return wide.to(x.dtype).view(*x.shape[:-1], -1)


class OpaqueLayer:
    """A layer that the compiler calls and, but for one case, does not look into.

    x: (..., in) -> (..., width)
    """
    known: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
    numbers = count()

    def __init__(self, layer: nn.Module, width: int):
        self.layer, self.width, self.number = layer, width, next(self.numbers)
        self.known[self.number] = layer

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if by_rows(self.layer, x):
                return product_in_8_bits(x, self.layer.packed, self.layer.scales)
            return torch.ops.minimistral.call_opaque(x, self.number, self.width)
        return self.layer(x)


# Of PyTorch's ways to declare an operation the one that costs a call the least.
OPERATIONS = torch.library.Library("minimistral", "FRAGMENT")
OPERATIONS.define("call_opaque(Tensor x, int number, int width) -> Tensor")
OPERATIONS.impl("call_opaque", lambda x, number, width:
                OpaqueLayer.known[number](x), "CompositeExplicitAutograd")
torch.library.register_fake("minimistral::call_opaque", lambda x, number, width:
                            x.new_empty(*x.shape[:-1], width), lib=OPERATIONS)


# ------------------------------------------------------------ the cache


class Visit(NamedTuple):
    """What one pass through the model does in the slots of a window."""
    rows: slice             # places of the batch that take part
    place: Tensor           # (R, 1): the same as numbers
    slots: Tensor           # (R, T): where the tokens go
    seen: int               # how many of the old slots are looked at
    beside: bool            # the chunk is looked at beside the slots, then written
    mask: Tensor            # (R, T, seen) or, beside, (R, T, seen + T)
    bias: Tensor | None     # of a long chunk: the mask as numbers to add to scores


class Ring:
    """The slots of all layers with the same window: position p lives in slot
    p mod S.

    positions: (B, S + 1), -1 where a slot is empty. The last slot is a bin: what
    may not be kept is written there, with position -1, so that every step writes
    the same number of slots. S is the window and `spare` slots more: that many of
    the last tokens can be taken back, as they overwrote none that is still seen.
    """

    def __init__(self, window: int | None, max_length: int | None, batch_size: int,
                 spare: int, dtype, device):
        rolling = window is not None and window + spare <= (max_length or math.inf)
        self.slots = window + spare if rolling else max_length or DEFAULT_SLOTS
        self.limit = None if rolling else self.slots
        self.window, self.spare = window, spare if rolling else self.slots
        shape, self.dtype = (batch_size, self.slots + 1), dtype
        self.positions = torch.full(shape, -1, device=device)

    def visit(self, rows: slice, positions: Tensor, end=None) -> Visit:
        """Give each token (R, T) its slot and say what it sees. `end`: no position
        held reaches it, where that is known."""
        place = torch.arange(*rows.indices(len(self.positions)),
                             device=positions.device)[:, None]
        held = self.positions[rows]
        newest = positions.amax(dim=1, keepdim=True)
        kept = (positions >= 0) & (positions > newest - self.slots)
        slots = torch.where(kept, positions % self.slots, self.slots)
        length = positions.shape[1]
        beside = length > self.spare + 1
        # Without an end all slots are read, even the bin: no part of a tensor has
        # to be copied for a product, as bfloat16 products would.
        seen = self.slots + 1 if end is None else min(
            self.slots, end - beside * length)
        before = torch.cat((held[:, :seen], positions), dim=1) if beside else None
        self.positions[place, slots] = torch.where(kept, positions, -1)
        keys = before if beside else held[:, :seen]
        mask = may_attend(positions, keys, self.window)
        bias = None
        if length > FEW:                      # once for all layers
            bias = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(
                ~mask, torch.finfo(self.dtype).min)[:, None]
        return Visit(rows, place, slots, seen, beside, mask, bias)

    def forget(self, place: int, length: int = 0) -> None:
        """Empty the slots of all tokens of a place but the first `length` ones."""
        held = self.positions[place]
        held.masked_fill_(held >= length, -1)


# ------------------------------------------------------------ the layers


def attend_to_slots(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor
                    ) -> Tensor:
    """`plain_attend` for few queries, without repeating the shared heads: the
    queries that share a head become rows of one product.

    q: (B, T, H, D), keys and values: (B, K, S, D), mask: (B, T, S) -> (B, T, H, D)
    """
    shared = keys.shape[1]
    rows = q.unflatten(2, (shared, -1)).permute(0, 2, 3, 1, 4)    # (B, K, n, T, D)
    scores = rows.flatten(2, 3) @ keys.transpose(2, 3)            # (B, K, n * T, S)
    scores = scores.float().unflatten(2, (-1, q.shape[1])) / math.sqrt(q.shape[-1])
    hidden = ~mask[:, None, None]                                 # for all heads
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).masked_fill(hidden, 0.0).type_as(values)
    out = (weights.flatten(2, 3) @ values).unflatten(2, (-1, q.shape[1]))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend_to_many(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """The same for many queries, by PyTorch's fused kernel.

    q: (B, T, H, D), keys and values: (B, K, S, D), bias: (B, 1, T, S), very
    negative where a query may not attend -> (B, T, H, D)
    """
    n = q.shape[2] // keys.shape[1]
    if q.is_cuda:                          # its masked kernels know no shared heads
        keys, values = (x.repeat_interleave(n, dim=1) for x in (keys, values))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=bias,
        enable_gqa=keys.shape[1] != q.shape[2])
    return out.transpose(1, 2)


class FastBlock:
    """A block of the model with its own keys and values: (B, K, S + 1, D) each."""

    def __init__(self, block: nn.Module, ring: Ring, shape, dtype, device):
        attention = block.attention
        self.block, self.ring = block, ring
        self.head_dim = attention.head_dim
        self.qkv = Joint(attention.wq, attention.wk, attention.wv)
        self.wo = Joint(attention.wo)
        mixture = isinstance(block.feed_forward, MoE)
        self.feed = (FastExperts if mixture else FastSwiGLU)(block.feed_forward)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def __call__(self, x: Tensor, angles, visit: Visit) -> Tensor:
        """x: (R, T, dim) -> (R, T, dim)"""
        x = x + self.attend(self.block.attention_norm(x), angles, visit)
        return x + self.feed(self.block.ffn_norm(x))

    def attend(self, x: Tensor, angles, visit: Visit) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x))
        q, k = rotate(q, *angles), rotate(k, *angles)                # (R, T, H, D)
        keys = self.keep(self.keys, k, visit)                        # (R, K, S', D)
        values = self.keep(self.values, v, visit)
        if visit.bias is None:
            out = attend_to_slots(q, keys, values, visit.mask)
        else:
            out = attend_to_many(q, keys, values, visit.bias)
        return self.wo(out.flatten(-2))[0]

    def keep(self, buffer: Tensor, new: Tensor, visit: Visit) -> Tensor:
        """Write a chunk (R, T, K, D) into its slots; return what it looks at."""
        new, old = new.transpose(1, 2), buffer[visit.rows, :, :visit.seen]
        look_at = torch.cat((old, new), dim=2) if visit.beside else old
        heads = torch.arange(buffer.shape[1], device=new.device)[:, None]
        buffer[visit.place[:, None], heads, visit.slots[:, None]] = new
        return look_at


class FastSwiGLU:
    """`SwiGLU` with its gate and its value as one product."""

    def __init__(self, swiglu: nn.Module):
        self.w13, self.w2 = Joint(swiglu.w1, swiglu.w3), Joint(swiglu.w2)

    def __call__(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x)
        return self.w2(F.silu(gate) * value)[0]


class FastExperts:
    """`MoE` with the weights of all experts in two tensors, (E, 2 * hidden, dim)
    and (E, dim, hidden), of which few tokens read only what they chose."""

    def __init__(self, moe: MoE):
        self.moe, self.gate = moe, Joint(moe.gate)
        self.opaque = OpaqueLayer(moe, moe.gate.in_features)
        self.plain = all(is_plain(e.w1, e.w2, e.w3) for e in moe.experts)
        if self.plain:
            w13 = join_weights([w for e in moe.experts for w in (e.w1, e.w3)])
            w2 = join_weights([e.w2 for e in moe.experts])
            self.w13 = w13.view(len(moe.experts), -1, w13.shape[1])
            self.w2 = w2.view(len(moe.experts), -1, w2.shape[1])
            self.experts = [FastSwiGLU(expert) for expert in moe.experts]

    def __call__(self, x: Tensor) -> Tensor:
        if not self.plain:
            return self.opaque(x)
        tokens = x.flatten(0, -2)                                    # (N, dim)
        weights, chosen = route(self.gate(tokens)[0], self.moe.k)        # (N, k)
        weights = weights.type_as(x)
        if torch.compiler.is_compiling() or chosen.numel() < 64:
            # The CPU's caches hold an expert that several tokens read in turn.
            few = chosen.numel() <= len(self.w13) * (1 if x.is_cuda else 4)
            run = gathered_experts if few else stacked_experts
            return run(self.w13, self.w2, tokens, weights, chosen).view_as(x)
        return chosen_experts(self.experts, tokens, weights, chosen).view_as(x)


def gathered_experts(w13: Tensor, w2: Tensor, x: Tensor, weights: Tensor,
                     chosen: Tensor) -> Tensor:
    """Each token reads its own k experts: right while N * k is about E or less.

    w13: (E, 2 * hidden, dim), w2: (E, dim, hidden), x: (N, dim), weights and
    chosen: (N, k) -> (N, dim)
    """
    if not torch.compiler.is_compiling():            # a view of each, not a copy
        out = [sum(share * one_expert(w13[e], w2[e], token)
                   for share, e in zip(shares, experts))
               for token, shares, experts in zip(x, weights, chosen.tolist())]
        return torch.stack(out)
    wide = (w13[chosen].float() * x[:, None, None].float()).sum(-1).to(x.dtype)
    gate, value = wide.chunk(2, dim=-1)                            # (N, k, hidden)
    hidden = (F.silu(gate) * value)[:, :, None]
    out = (w2[chosen].float() * hidden.float()).sum(-1).to(x.dtype)   # (N, k, dim)
    return (weights[:, :, None] * out).sum(dim=1)


def one_expert(w13: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    """One expert, one token: w13 (2 * hidden, dim), w2 (dim, hidden), x (dim,)."""
    parts = math.gcd(len(w2), torch.get_num_threads())
    gate, value = product(x, w13, math.gcd(len(w13), parts)).chunk(2)
    return product(F.silu(gate) * value, w2, parts)


def stacked_experts(w13: Tensor, w2: Tensor, x: Tensor, weights: Tensor,
                    chosen: Tensor) -> Tensor:
    """All experts on all tokens, those not chosen weighed by 0: every weight is
    read once, which takes longer than the arithmetic while tokens are few.

    w13: (E, 2 * hidden, dim), w2: (E, dim, hidden), x: (N, dim), weights and
    chosen: (N, k) -> (N, dim)
    """
    gate, value = (x @ w13.transpose(1, 2)).chunk(2, dim=-1)       # (E, N, hidden)
    out = (F.silu(gate) * value) @ w2.transpose(1, 2)              # (E, N, dim)
    shares = weights.new_zeros(len(x), len(w13)).scatter(1, chosen, weights)
    return torch.einsum("end,ne->nd", out, shares)


# ------------------------------------------------------------ the model


class FastModel:
    """A Transformer with caches of fixed size for `batch_size` texts, each in its
    own place. It shares the model's weights: what training or `load_state_dict`
    writes into those is seen here; after `model.to(...)` make a new one.

    max_length  how many positions a layer without a window holds, 4,096 by default
    spare       how many of the last tokens can be taken back (speculative.py)
    .limit      no text may reach this position; None where all layers roll
    .nbytes     bytes of keys and values
    """

    def __init__(self, model: nn.Module, batch_size: int = 1, max_length=None,
                 spare: int = 0):
        config, device = model.config, model.device
        self.model, self.config, self.batch_size = model, config, batch_size
        dtype = model.tok_embeddings.weight.dtype
        windows = [config.window(layer) for layer in range(config.n_layers)]
        self.rings = {
            window: Ring(window, max_length, batch_size, spare, dtype, device)
            for window in windows}
        limits = [ring.limit for ring in self.rings.values() if ring.limit]
        self.limit = min(limits, default=None)
        self.blocks = []
        for window, block in zip(windows, model.layers):
            slots = self.rings[window].slots + 1
            shape = (batch_size, config.n_kv_heads, slots, config.head_dim)
            self.blocks.append(FastBlock(block, self.rings[window], shape, dtype,
                                         device))
        self.output = Joint(model.output or model.tok_embeddings)
        self.nbytes = sum(2 * block.keys.nbytes for block in self.blocks)

    def features(self, ids: Tensor, positions: Tensor, rows: slice, end=None
                 ) -> Tensor:
        """As `Transformer.features` for some places: ids and positions (R, T) ->
        (R, T, dim)."""
        config = self.config
        angles = rotary_angles(positions, config.head_dim, config.rope_theta)
        visits = {window: ring.visit(rows, positions, end)
                  for window, ring in self.rings.items()}
        x = self.model.tok_embeddings(ids)
        for block in self.blocks:
            x = block(x, angles, visits[block.ring.window])
        return self.model.norm(x)

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens of the first R places, position -1 where there is none:
        (R, T) -> logits (R, T, V), float32, and the likeliest ids (R, T), -1 where
        the logits are NaN."""
        logits = self.logits(self.features(ids, positions, slice(len(ids))))
        best, likeliest = logits.max(dim=-1)
        return logits, likeliest.masked_fill(best.isnan(), -1)

    def logits(self, x: Tensor) -> Tensor:
        return self.output(x)[0].float()

    def forget(self, place: int, length: int = 0) -> None:
        """Take back all tokens of a place but the first `length` ones."""
        for ring in self.rings.values():
            ring.forget(place, length)
