"""Chapter 4, the transformer: its three core pieces and its exercises."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.cache import KVCache
from minimistral.config import ModelConfig, count_parameters
from minimistral.layers import RMSNorm as LibraryRMSNorm
from minimistral.layers import SwiGLU as LibrarySwiGLU
from minimistral.model import Block, Transformer
from minimistral.rope import rotary_angles

from ..exercises import Exercise, Hint, Misconception
from .fixtures import random_tensor


def _parameters(module, wanted: dict[str, tuple]) -> None:
    """Raise in plain words unless the module has exactly these parameters."""
    if not isinstance(module, nn.Module):
        raise TypeError("the class must be an nn.Module, and make one when it is called")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    lacking = [name for name in wanted if name not in shapes]
    if lacking:
        raise ValueError(f"no trained parameter called {' or '.join(lacking)}; "
                         f"there are {', '.join(shapes) or 'none'}")
    surplus = [name for name in shapes if name not in wanted]
    if surplus:
        raise ValueError(f"parameters that do not belong: {', '.join(surplus)}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} has shape {shapes[name]}, not {shape}")


# ---------------------------------------------------------------- piece: RMSNorm


def rows_of_different_size():
    x = random_tensor(1, 2, 5, 6)
    x = x * torch.tensor([[0.003], [1.0], [40.0], [0.2], [7.0]])
    x[1, 2] = 0.0
    return x, 1e-5


def another_epsilon():
    return random_tensor(2, 3, 4, scale=0.1), 1e-2


def large_numbers_in_float16():
    x = 200 * random_tensor(3, 2, 3, 5)
    return x.half(), 1e-5


@torch.no_grad()
def _run_norm(candidate, x, eps):
    """The weight at the start, and the output with a weight that is not all ones."""
    dim = x.shape[-1]
    module = candidate(dim, eps=eps)
    _parameters(module, {"weight": (dim,)})
    start = module.weight.detach().clone()
    module.weight.copy_(torch.linspace(0.5, 1.5, dim))
    return start, module.to(x.dtype)(x)


def _norm(forward, start=torch.ones, base=nn.Module):
    class RMSNorm(base):
        def __init__(self, dim, eps=1e-5):
            super().__init__()
            self.eps = eps
            self.weight = nn.Parameter(start(dim))

        def forward(self, x):
            return forward(self, x)
    return RMSNorm


def _divided(divisor):
    """x in float32 over some root, cast back, weighted."""
    def forward(self, x):
        wide = x.float()
        return (wide / divisor(self, wide)).type_as(x) * self.weight
    return forward


def _rms(self, x, axis=-1):
    return (x.pow(2).mean(axis, keepdim=True) + self.eps).sqrt()


class _PlainWeight(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, torch.ones(dim)

    def forward(self, x):
        return _divided(_rms)(self, x)


class _FixedEpsilon(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return _divided(_rms)(self, x)


class _WithBias(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return _divided(_rms)(self, x) + self.bias


class _OneWeight(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(1))

    def forward(self, x):
        return _divided(_rms)(self, x)


RMS_NORM = Exercise(
    name="RMSNorm", chapter=4, kind="piece", piece="layers.RMSNorm", entry="RMSNorm",
    title="RMSNorm", difficulty="medium", importance="essential", minutes=8,
    reference=LibraryRMSNorm,
    fixtures=(rows_of_different_size, another_epsilon, large_numbers_in_float16),
    run=_run_norm,
    equivalents={
        "a root and a division": _norm(_divided(_rms)),
        "F.rms_norm": _norm(lambda self, x: F.rms_norm(
            x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)),
        "weight in float32, cast last": _norm(lambda self, x: (
            self.weight.float() * x.float() * torch.rsqrt(
                x.float().square().mean(-1, True) + self.eps)).to(x.dtype)),
        "by the length of the row": _norm(_divided(lambda self, x: (
            x.norm(dim=-1, keepdim=True) ** 2 / x.shape[-1] + self.eps) ** 0.5)),
        "in double": _norm(lambda self, x: (
            x.double() / _rms(self, x.double())).to(x.dtype) * self.weight),
    },
    misconceptions=(
        Misconception("the mean subtracted", _norm(_divided(
                lambda self, x: (x.var(-1, keepdim=True, unbiased=False) + self.eps).sqrt())),
            "You divided by the standard deviation, which leaves the mean out. The root mean "
            "square takes the numbers as they are: square, mean, root.",
            also=[_norm(_divided(
                      lambda self, x: x.std(-1, keepdim=True) + self.eps))]),
        Misconception("LayerNorm", _norm(lambda self, x: F.layer_norm(
                x.float(), self.weight.shape, eps=self.eps).type_as(x) * self.weight),
            "The mean of each token was subtracted first: that is LayerNorm. RMSNorm only "
            "divides, and leaves the mean where it is."),
        Misconception("no root", _norm(_divided(
                lambda self, x: x.pow(2).mean(-1, keepdim=True) + self.eps)),
            "Small tokens come out large, large ones small: you divided by the mean square "
            "itself. Divide by its root."),
        Misconception("sum instead of mean", _norm(_divided(
                lambda self, x: (x.pow(2).sum(-1, keepdim=True) + self.eps).sqrt())),
            "Each token has length 1, so its numbers shrink as dim grows. Take the mean of the "
            "squares, not their sum.",
            also=[_norm(lambda self, x: F.normalize(
                      x.float(), dim=-1).type_as(x) * self.weight)]),
        Misconception("mean over everything", _norm(_divided(
                lambda self, x: (x.pow(2).mean() + self.eps).sqrt())),
            "All tokens were divided by one number, so large ones stay large, and later "
            "tokens matter to earlier ones. The mean belongs to each token alone."),
        Misconception("mean along another axis", _norm(_divided(
                lambda self, x: _rms(self, x, -2))),
            "The mean ran along another axis. Every token is normed by itself: counted from the "
            "end, its numbers are always the last axis.",
            also=[_norm(_divided(lambda self, x: _rms(self, x, 1))),
                  _norm(_divided(lambda self, x: _rms(self, x, 2)))]),
        Misconception("epsilon outside the root", _norm(_divided(
                lambda self, x: x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)),
            "Nearly right; tiny tokens come out too large. The small number is added to the "
            "mean square, under the root."),
        Misconception("no epsilon", _norm(_divided(
                lambda self, x: x.pow(2).mean(-1, keepdim=True).sqrt())),
            "A token of zeros gives NaN: zero over zero. The small number under the root is "
            "missing."),
        Misconception("the given epsilon not used", _FixedEpsilon,
            "Right for the usual small number, wrong for another one. Keep the one that the "
            "constructor was given."),
        Misconception("computed in 16 bits", _norm(
                lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
                * self.weight),
            "In float16 the squares of 300 are infinite already, and the token becomes zeros. "
            "Go to float32 before squaring."),
        Misconception("always float32", _norm(
                lambda self, x: x.float() / _rms(self, x.float()) * self.weight),
            "The token came in 16 bits and went out in 32. Inside in float32, then back to "
            "the type of the input."),
        Misconception("the weight forgotten", _norm(
                lambda self, x: (x.float() / _rms(self, x.float())).type_as(x)),
            "The numbers are normed, but the trained weight is not used. Multiply each "
            "column by its weight at the end."),
        Misconception("one plus the weight", _norm(
                lambda self, x: (x.float() / _rms(self, x.float())).type_as(x) * (1 + self.weight)),
            "Everything is too large by the token itself: you multiplied by one plus the "
            "weight. In Mistral's files the weight already contains the 1."),
        Misconception("a plain tensor", _PlainWeight,
            "The weight is a plain tensor: no optimiser would find it, and no checkpoint "
            "fill it. Wrap it as a trained parameter."),
        Misconception("a bias too", _WithBias,
            "There is a bias, or another parameter too many. RMSNorm has one weight for each "
            "column and nothing else."),
        Misconception("one weight for all columns", _OneWeight,
            "There is a single weight. Each of the dim columns has one of its own."),
        Misconception("the axis is lost", _norm(lambda self, x: (
                x.float() * torch.rsqrt(x.float().pow(2).mean(-1) + self.eps)).type_as(x)
                * self.weight),
            "The mean lost its axis, so it no longer fits beside the tokens. Keep the last "
            "axis, with size 1."),
        Misconception("square of the mean", _norm(_divided(
                lambda self, x: (x.mean(-1, keepdim=True).pow(2) + self.eps).sqrt())),
            "The mean came first and was squared after, so numbers of opposite sign cancel. "
            "Square first, then the mean."),
        Misconception("one over the root, and divided", _norm(_divided(
                lambda self, x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))),
            "Large tokens come out larger: you divided by rsqrt, which is one over the root "
            "already. Multiply by it, or divide by the root."),
    ),
    hints=(
        Hint("I do not know where to start",
             "What is the root mean square of (3, 4)? Square, mean, root: three operations, "
             "each along the last axis."),
        Hint("My shapes do not fit, or zeros give NaN",
             "mean(dim=-1, keepdim=True) keeps an axis of size 1, which fits beside every "
             "token. Add self.eps to the mean of the squares, before the root."),
        Hint("It is refused in float16",
             "1. wide = x.float(). 2. wide over the root of (mean of wide squared + eps). "
             "3. type_as(x). 4. times self.weight, an nn.Parameter of torch.ones(dim)."),
    ),
    praise="Every layer of every Mistral reads the stream through this.",
)


# ---------------------------------------------------------------- piece: SwiGLU


def tokens_of_two_texts():
    return 6, 11, random_tensor(4, 2, 5, 6, scale=1.5)


def narrow_hidden():
    return 7, 3, random_tensor(5, 4, 7, scale=2.0)


@torch.no_grad()
def _run_feed_forward(candidate, dim, hidden, x):
    with torch.random.fork_rng(devices=[]):           # new matrices draw random numbers
        module = candidate(dim, hidden)
    shapes = {"w1.weight": (hidden, dim), "w2.weight": (dim, hidden), "w3.weight": (hidden, dim)}
    _parameters(module, shapes)
    for seed, (name, shape) in enumerate(shapes.items()):
        module.get_parameter(name).copy_(random_tensor(40 + seed, *shape) / 2)
    return module(x)


def _gated(forward, bias=False, turned=False, backwards=False):
    class SwiGLU(nn.Module):
        def __init__(self, dim, hidden_dim):
            super().__init__()
            if backwards:
                dim, hidden_dim = hidden_dim, dim
            up, down = (dim, hidden_dim), (hidden_dim, dim)
            self.w1 = nn.Linear(*up, bias=bias)
            self.w2 = nn.Linear(*(up if turned else down), bias=bias)
            self.w3 = nn.Linear(*(down if turned else up), bias=bias)

        def forward(self, x):
            return forward(self, x)
    return SwiGLU


def _swiglu(self, x):
    return self.w2(F.silu(self.w1(x)) * self.w3(x))


def _by_matrices(self, x):
    z = x @ self.w1.weight.T
    return (z / (1 + (-z).exp()) * (x @ self.w3.weight.T)) @ self.w2.weight.T


def _in_one_product(self, x):
    gate, value = F.linear(x, torch.cat([self.w1.weight, self.w3.weight])).chunk(2, dim=-1)
    return F.linear(value * gate * gate.sigmoid(), self.w2.weight)


SWIGLU = Exercise(
    name="SwiGLU", chapter=4, kind="piece", piece="layers.SwiGLU", entry="SwiGLU",
    title="SwiGLU", difficulty="easy", importance="essential", minutes=6,
    reference=LibrarySwiGLU,
    fixtures=(tokens_of_two_texts, narrow_hidden),
    run=_run_feed_forward,
    equivalents={
        "silu by hand": _gated(_by_matrices),
        "one product for gate and value": _gated(_in_one_product),
        "value first": _gated(lambda self, x: self.w2(self.w3(x).mul(F.silu(self.w1(x))))),
        "z times its sigmoid": _gated(lambda self, x: self.w2(
            self.w1(x) * torch.sigmoid(self.w1(x)) * self.w3(x))),
    },
    misconceptions=(
        Misconception("gate and value swapped", _gated(
                lambda self, x: self.w2(self.w1(x) * F.silu(self.w3(x)))),
            "It would train as well, but a published checkpoint would give nonsense: the "
            "bend is on the wrong one. The gate comes from w1."),
        Misconception("no bend", _gated(lambda self, x: self.w2(self.w1(x) * self.w3(x))),
            "Gate and value are multiplied, but the gate has no bend, so a bad fit turns the "
            "sign instead of closing. Put the gate through silu."),
        Misconception("sigmoid", _gated(
                lambda self, x: self.w2(self.w1(x).sigmoid() * self.w3(x))),
            "The gate is a sigmoid alone, between 0 and 1. silu is z times that sigmoid, so "
            "an open gate grows with z."),
        Misconception("relu", _gated(lambda self, x: self.w2(F.relu(self.w1(x)) * self.w3(x))),
            "The gate has a sharp corner: that is relu. silu is smooth, and slightly below "
            "zero on the left."),
        Misconception("gelu", _gated(lambda self, x: self.w2(F.gelu(self.w1(x)) * self.w3(x))),
            "Close, but the bend is that of gelu. Mistral's is silu: z times its sigmoid."),
        Misconception("bend on both", _gated(
                lambda self, x: self.w2(F.silu(self.w1(x)) * F.silu(self.w3(x)))),
            "Gate and value both went through silu. Only the gate has a bend; the value may "
            "have any sign."),
        Misconception("bend on the product", _gated(
                lambda self, x: self.w2(F.silu(self.w1(x) * self.w3(x)))),
            "The bend is on the product. It belongs to the gate alone, before the two are "
            "multiplied."),
        Misconception("the value left out", _gated(
                lambda self, x: self.w2(F.silu(self.w1(x)))),
            "The value has no effect on the result: w3 is made but not used. Multiply the "
            "gate with it."),
        Misconception("w2 and w3 exchanged", _gated(
                lambda self, x: self.w3(F.silu(self.w1(x)) * self.w2(x)), turned=True),
            "w2 was made like a gate, from dim to hidden. In Mistral's files w2 is the way back, "
            "from hidden to dim; w1 and w3 make gate and value."),
        Misconception("biases", _gated(_swiglu, bias=True),
            "The matrices have biases. Mistral's have none, and its checkpoints hold no "
            "numbers for them."),
        Misconception("a matrix product", _gated(
                lambda self, x: self.w2(F.silu(self.w1(x)) @ self.w3(x))),
            "Gate and value met in a matrix product, and their shapes do not fit for one. "
            "Multiply them number by number."),
        Misconception("in and out exchanged", _gated(_swiglu, backwards=True),
            "Your matrices go the other way. nn.Linear takes first the length of what comes "
            "in, then the length of what goes out."),
        Misconception("modules multiplied", _gated(
                lambda self, x: self.w2 @ (F.silu(self.w1 @ x) * (self.w3 @ x))),
            "The example's matrices were tensors. Yours are modules, and a module is called: "
            "it takes x in brackets, whatever axes x has."),
        Misconception("no way back", _gated(lambda self, x: F.silu(self.w1(x)) * self.w3(x)),
            "The result still has hidden numbers: the way back is missing. w2 makes dim "
            "numbers of the products."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Three matrices. Which two read dim numbers and make hidden ones? Which one goes "
             "the other way?"),
        Hint("The numbers are refused",
             "gate = silu of w1 x. value = w3 x, with nothing done to it. Then their product, "
             "number by number, has hidden numbers."),
        Hint("The parameters are refused",
             "nn.Linear(dim, hidden_dim, bias=False) for w1 and w3, nn.Linear(hidden_dim, "
             "dim, bias=False) for w2. The result: w2 of the product of F.silu(w1 x) and w3 x."),
    ),
    praise="Most of a large model's parameters stand in such matrices.",
)


# ---------------------------------------------------------------- piece: one block


def _block(seed: int) -> Block:
    config = ModelConfig(dim=12, n_layers=3, n_heads=3, n_kv_heads=1, head_dim=6, hidden_dim=10,
                         vocab_size=30)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = Block(config)
        for name, p in block.named_parameters():
            p.data = random_tensor(seed + len(name), *p.shape) / (1 if p.dim() == 1 else 3)
    return block.requires_grad_(False)


def a_whole_text_at_once():
    return _block(50), random_tensor(51, 2, 7, 12), (7,)


def a_text_in_two_pieces_with_a_cache():
    return _block(52), random_tensor(53, 2, 7, 12, scale=3.0), (4, 3)


@torch.no_grad()
def _run_block(candidate, block, x, lengths):
    """The pieces one after the other; with more than one piece there is a cache."""
    config = ModelConfig(dim=12, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=6, hidden_dim=10,
                         vocab_size=30)
    cache = KVCache(config, batch_size=x.shape[0]) if len(lengths) > 1 else None
    outputs, start = [], 0
    for length in lengths:
        positions = torch.arange(start, start + length).expand(x.shape[0], length)
        if cache is not None:
            cache.make_room(start + length)
        angles = rotary_angles(positions, 6, 10000.0)
        piece = x[:, start : start + length]
        kept = cache.layers[0] if cache is not None else None
        outputs.append(candidate(block, piece, positions, angles, kept))
        start += length
    return outputs


def _wired(rule):
    """A forward whose two parts are wired by ``rule(self, x, look)``."""
    def block_forward(self, x, positions, angles, cache=None):
        return rule(self, x, lambda y: self.attention(y, positions, angles, cache))
    return block_forward


def _right(self, x, look):
    h = x + look(self.attention_norm(x))
    return h + self.feed_forward(self.ffn_norm(h))


def _kept_norm(self, x, look):
    x = self.attention_norm(x)
    h = self.ffn_norm(x + look(x))
    return h + self.feed_forward(h)


def _once_normed(self, x, look):
    n = self.attention_norm(x)
    h = x + look(n)
    return h + self.feed_forward(n)


def _first_kept_norm(self, x, look):
    n = self.attention_norm(x)
    h = n + look(n)
    return h + self.feed_forward(self.ffn_norm(h))


def _post_norm(self, x, look):
    h = self.attention_norm(x + look(x))
    return self.ffn_norm(h + self.feed_forward(h))


def _parallel(self, x, look):
    return x + look(self.attention_norm(x)) + self.feed_forward(self.ffn_norm(x))


def _old_x(self, x, look):
    h = x + look(self.attention_norm(x))
    return x + self.feed_forward(self.ffn_norm(h))


def _in_place(self, x, look):
    x += look(self.attention_norm(x))
    x += self.feed_forward(self.ffn_norm(x))
    return x


def _without_cache(self, x, positions, angles, cache=None):
    h = x + self.attention(self.attention_norm(x), positions, angles)
    return h + self.feed_forward(self.ffn_norm(h))


def _arguments_exchanged(self, x, positions, angles, cache=None):
    h = x + self.attention(self.attention_norm(x), angles, positions, cache)
    return h + self.feed_forward(self.ffn_norm(h))


def _second_kept_norm(self, x, look):
    n = self.ffn_norm(x + look(self.attention_norm(x)))
    return n + self.feed_forward(n)


def _by_names(self, x, positions, angles, cache=None):
    look = self.attention(x=self.attention_norm(x), positions=positions, angles=angles,
                          cache=cache)
    return torch.add(torch.add(x, look), self.feed_forward(self.ffn_norm(x + look)))


def _on_a_copy(self, x, positions, angles, cache=None):
    x = x.clone()
    x += self.attention(self.attention_norm(x), positions, angles, cache)
    x += self.feed_forward(self.ffn_norm(x))
    return x


BLOCK = Exercise(
    name="block", chapter=4, kind="piece", piece="model.Block.forward", entry="block_forward",
    title="One block", difficulty="medium", importance="essential", minutes=6,
    reference=Block.forward,
    fixtures=(a_whole_text_at_once, a_text_in_two_pieces_with_a_cache),
    run=_run_block,
    equivalents={
        "two lines": _wired(_right),
        "arguments by name": _by_names,
        "adding into a copy": _on_a_copy,
        "one line": _wired(lambda self, x, look: (
            lambda h: self.feed_forward(self.ffn_norm(h)) + h)(look(self.attention_norm(x)) + x)),
    },
    misconceptions=(
        Misconception("norm after the sum", _wired(_post_norm),
            "The stream itself was normed, after each sum. In this block each part reads a "
            "normed copy, and the stream is only added to."),
        Misconception("a normed copy carried on", _wired(_kept_norm),
            "A part's output was added to a normed copy, so the stream as it was is lost. Norm only "
            "what a part reads; add to the stream itself.",
            also=[_wired(_first_kept_norm),
                  _wired(_second_kept_norm)]),
        Misconception("a part replaces the stream", _wired(lambda self, x, look: self.feed_forward(
                self.ffn_norm(look(self.attention_norm(x))))),
            "A plus is missing: what a part writes has replaced the stream. Attention is added "
            "to x, the feed-forward to that sum.",
            also=[_wired(lambda self, x, look: (
                      lambda h: h + self.feed_forward(self.ffn_norm(h)))(
                          look(self.attention_norm(x)))),
                  _wired(lambda self, x, look: self.feed_forward(
                      self.ffn_norm(x + look(self.attention_norm(x)))))]),
        Misconception("both read x", _wired(_parallel),
            "The feed-forward reads x and does not see what attention has just fetched. It "
            "reads h, through its own norm."),
        Misconception("second sum on the old x", _wired(_old_x),
            "What attention fetched is read by the feed-forward, but is gone from the "
            "stream: the second sum starts from x. Start from h."),
        Misconception("norms exchanged", _wired(lambda self, x, look: (
                lambda h: h + self.feed_forward(self.attention_norm(h)))(
                    x + look(self.ffn_norm(x)))),
            "The two norms are exchanged; their trained weights differ. Attention reads "
            "through attention_norm, the feed-forward through ffn_norm."),
        Misconception("one norm for both", _wired(lambda self, x, look: (
                lambda h: h + self.feed_forward(self.attention_norm(h)))(
                    x + look(self.attention_norm(x)))),
            "Both parts read through the norm of the attention. Each has one of its own, "
            "with its own weight."),
        Misconception("the first copy read twice", _wired(_once_normed),
            "The feed-forward reads the copy made for attention, from before the looks were "
            "added. Norm h anew for it."),
        Misconception("a norm is missing", _wired(lambda self, x, look: (
                lambda h: h + self.feed_forward(h))(x + look(x))),
            "A part reads the stream as it is. Attention reads it through attention_norm, the "
            "feed-forward through ffn_norm.",
            also=[_wired(lambda self, x, look: (
                      lambda h: h + self.feed_forward(self.ffn_norm(h)))(x + look(x))),
                  _wired(lambda self, x, look: (
                      lambda h: h + self.feed_forward(h))(x + look(self.attention_norm(x))))]),
        Misconception("one sum at the end", _wired(lambda self, x, look: x + self.feed_forward(
                self.ffn_norm(look(self.attention_norm(x))))),
            "There is one plus for the whole block. Each part adds to the stream: attention "
            "to x, the feed-forward to that sum."),
        Misconception("cache not handed on", _without_cache,
            "Right for a whole text, wrong when a text comes in pieces: attention did not "
            "get the cache. Hand it through."),
        Misconception("arguments exchanged", _arguments_exchanged,
            "Attention got positions and angles in the wrong order. It takes the normed "
            "stream, positions, angles and cache, as your own function does."),
        Misconception("stream changed in place", _wired(_in_place),
            "The values are right, but your code wrote into its input. Make a new tensor: a "
            "sum, and no adding in place."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Follow the arrows of the picture: down from the stream into a norm, into "
             "attention, and back into a plus. What does the plus add together?"),
        Hint("The values are wrong",
             "First line: h = x + attention of the normed x. Second line: h + feed-forward "
             "of the normed h. Nothing else changes the stream."),
        Hint("Attention wants more arguments",
             "self.attention(self.attention_norm(x), positions, angles, cache) gives what to "
             "add to x. Then the same with feed_forward and ffn_norm, on h."),
    ),
    praise="Stack it 32 times and it is the body of Mistral 7B.",
)


# ---------------------------------------------------------------- exercise: layer_norm


def tokens_with_a_mean():
    x = random_tensor(6, 2, 3, 5) + torch.tensor([[4.0], [-2.0], [0.0]])
    x[0, 1] = 3.0                                     # no spread at all
    return x, random_tensor(7, 5), random_tensor(8, 5), 1e-5


def tiny_tokens():
    return random_tensor(9, 4, 6, scale=0.004), random_tensor(10, 6), random_tensor(11, 6), 1e-5


def _layer_norm(center, spread, finish=None):
    def layer_norm(x, weight, bias, eps=1e-5):
        shifted = x - center(x)
        normed = shifted / spread(x, shifted, eps)
        return finish(normed, weight, bias) if finish else normed * weight + bias
    return layer_norm


def _mean(x):
    return x.mean(-1, keepdim=True)


def _deviation(x, shifted, eps):
    return (shifted.pow(2).mean(-1, keepdim=True) + eps).sqrt()


LAYER_NORM = Exercise(
    name="layer_norm", chapter=4, kind="complete", entry="layer_norm",
    title="The older norm", difficulty="easy", importance="useful", minutes=6,
    reference=_layer_norm(_mean, _deviation),
    fixtures=(tokens_with_a_mean, tiny_tokens),
    tolerance=1e-4,
    equivalents={
        "F.layer_norm": lambda x, weight, bias, eps=1e-5: F.layer_norm(
            x, weight.shape, weight, bias, eps),
        "variance from torch": _layer_norm(_mean, lambda x, s, eps: (
            x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()),
        "rsqrt": lambda x, weight, bias, eps=1e-5: (x - _mean(x)) * torch.rsqrt(
            (x - _mean(x)).square().mean(-1, True) + eps) * weight + bias,
    },
    misconceptions=(
        Misconception("RMSNorm", _layer_norm(lambda x: 0.0, _deviation),
            "The mean is still there: this is RMSNorm, with a bias. LayerNorm first takes "
            "each token's mean away."),
        Misconception("root mean square of x", _layer_norm(_mean, lambda x, s, eps: (
                x.pow(2).mean(-1, keepdim=True) + eps).sqrt()),
            "The mean was taken away, but you divided by the size of x with its mean. "
            "Square what is left after the shift."),
        Misconception("n - 1", _layer_norm(_mean, lambda x, s, eps: (
                x.var(-1, keepdim=True) + eps).sqrt()),
            "Slightly too small: divided by n - 1, as for a sample; torch's standard deviation "
            "does so by itself. Take the plain mean of the squares.",
            also=[_layer_norm(_mean, lambda x, s, eps: x.std(-1, keepdim=True) + eps)]),
        Misconception("no root", _layer_norm(_mean, lambda x, s, eps: (
                s.pow(2).mean(-1, keepdim=True) + eps)),
            "You divided by the variance. Its root gives numbers of typical size 1."),
        Misconception("no epsilon", _layer_norm(_mean, lambda x, s, eps: (
                s.pow(2).mean(-1, keepdim=True)).sqrt()),
            "A token whose numbers are all equal gives NaN: zero over zero. The small number "
            "under the root is missing."),
        Misconception("epsilon outside", _layer_norm(_mean, lambda x, s, eps: (
                s.pow(2).mean(-1, keepdim=True)).sqrt() + eps),
            "Tiny tokens come out too large. The small number is added before the root is "
            "taken."),
        Misconception("over the tokens", _layer_norm(lambda x: x.mean(-2, keepdim=True),
                lambda x, s, eps: (s.pow(2).mean(-2, keepdim=True) + eps).sqrt()),
            "Means were taken over the tokens of a text. Each token is normed by itself, "
            "along the last axis."),
        Misconception("over everything", _layer_norm(lambda x: x.mean(), lambda x, s, eps: (
                s.pow(2).mean() + eps).sqrt()),
            "All tokens share a mean or a size, or both. Each token has its own, along the last "
            "axis.",
            also=[_layer_norm(lambda x: x.mean(), _deviation),
                  _layer_norm(_mean, lambda x, s, eps: (
                      s.pow(2).mean() + eps).sqrt())]),
        Misconception("axis lost", lambda x, weight, bias, eps=1e-5: (
                x - x.mean(-1)) / ((x - x.mean(-1)).pow(2).mean(-1) + eps).sqrt(),
            "The mean lost its axis, so it no longer fits beside the tokens. Keep the last "
            "axis, with size 1."),
        Misconception("sum instead of mean", _layer_norm(_mean, lambda x, s, eps: (
                s.pow(2).sum(-1, keepdim=True) + eps).sqrt()),
            "The squares were summed, so each token has length 1 before the weight. Take "
            "their mean."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take the token (1, 3). What is its mean? What is left when it is taken away?"),
        Hint("The numbers are slightly off",
             "(1, 3) becomes (-1, 1). The mean of its squares is 1, not 2: divide by n. Add "
             "eps to that mean, then take the root."),
        Hint("A token of equal numbers gives NaN",
             "shifted = x minus its mean over the last axis, axis kept. normed = shifted over "
             "the root of (mean of shifted squared + eps)."),
    ),
    praise="RMSNorm leaves out two of its steps, and models train as well.",
)


# ---------------------------------------------------------------- exercise: model_in_order


MODEL_ORDER = Exercise(
    name="model_in_order", chapter=4, kind="order",
    title="From ids to scores", difficulty="easy", importance="essential", minutes=4,
    lines=(
        "x = tok_embeddings(token_ids)            # (B, T) -> (B, T, dim)",
        "angles = rotary_angles(positions, head_dim, theta)",
        "for block in layers: x = block(x, positions, angles)",
        "x = norm(x)",
        "logits = output(x)                       # (B, T, dim) -> (B, T, V)",
        "loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
    ),
    distractors=("logits = logits.softmax(dim=-1)",),
    equivalents={"angles first": (1, 0, 2, 3, 4, 5)},
    misconceptions=(
        Misconception("softmax before the loss", "with 6",
            "cross_entropy does its own softmax. A softmax of a softmax is nearly even, so the "
            "loss hardly falls."),
        Misconception("norm before the blocks", "3 before 2",
            "The last norm came before the blocks. The stream grows while they write; the norm "
            "stands between the last block and the output."),
        Misconception("no last norm", "without 3",
            "The output reads the stream as it is, and that has grown. One line is missing "
            "between blocks and output."),
        Misconception("blocks before the angles", "2 before 1",
            "The blocks run before their angles are made. Attention turns queries and keys by "
            "them: which line makes them?"),
        Misconception("blocks before the vectors", "2 before 0",
            "The blocks run before there are vectors to run on. Which line makes vectors of the "
            "ids?"),
        Misconception("norm after the output", "4 before 3",
            "Scores are not normed: it would fix how sure the model may be. The norm stands "
            "before the output matrix."),
        Misconception("loss before the scores", "5 before 4",
            "The loss compares scores with targets, and there are no scores yet. Which line makes "
            "them?"),
    ),
    hints=(
        Hint("I do not know which line is first",
             "Which lines use nothing that another line makes?"),
        Hint("I have one line too many",
             "cross_entropy takes scores, not probabilities. Which line makes probabilities?"),
        Hint("The order is still refused",
             "Embed, angles, blocks, norm, output, loss: six steps."),
    ),
    praise="Embed, look and think L times, norm, score.",
)


# ---------------------------------------------------------------- exercise: widest_hidden


def several_budgets_with_shared_heads():
    return ModelConfig(dim=48, n_layers=5, n_heads=6, n_kv_heads=2, head_dim=10, hidden_dim=1,
                       vocab_size=700), (300_000, 123_456)


def budgets_just_below_a_model_of_hidden_50():
    config = ModelConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=12, hidden_dim=50,
                         vocab_size=211)
    total = count_parameters(config).total            # one more hidden number costs 288
    return config, tuple(total - less for less in (0, 20, 60, 130, 200, 250))


def tied_tables():
    return ModelConfig(dim=40, n_layers=7, n_heads=5, n_kv_heads=5, head_dim=6, hidden_dim=1,
                       vocab_size=900, tied_embeddings=True), (200_000,)


def _run_widest(candidate, config, budgets):
    return [candidate(config, budget) for budget in budgets]


def _hidden(*, matrices=3, tables=None, kv=True, size=None, norms=None, blocks=True,
            round_=math.floor, per_block=True, looks=None, whole=int, spared=0):
    def widest_hidden(config, budget):
        c = config
        n_tables = 1 if c.tied_embeddings else 2
        if tables is not None:
            n_tables = 3 - n_tables if tables == "exchanged" else tables
        D = size(c) if size else c.head_dim
        keys = c.n_kv_heads if kv else c.n_heads
        attention = c.n_layers * c.dim * D * 2 * (c.n_heads + keys)
        if looks:
            attention = looks(c)
        n_norms = (2 * c.n_layers + 1) if norms is None else norms(c)
        left = budget - n_tables * c.vocab_size * c.dim - attention - n_norms * c.dim - spared
        return whole(round_(left / (matrices * c.dim * (c.n_layers if per_block else 1))))
    return widest_hidden


def _hidden_by_trying(config, budget):
    from dataclasses import replace

    hidden = 1
    while count_parameters(replace(config, hidden_dim=hidden + 1)).total <= budget:
        hidden += 1
    return hidden


def _hidden_by_difference(config, budget):
    from dataclasses import replace

    one, two = (count_parameters(replace(config, hidden_dim=h)).total for h in (1, 2))
    return 1 + (budget - one) // (two - one)


WIDEST_HIDDEN = Exercise(
    name="widest_hidden", chapter=4, kind="function", entry="widest_hidden",
    title="As wide as the budget allows", difficulty="medium", importance="essential", minutes=12,
    reference=_hidden(),
    fixtures=(several_budgets_with_shared_heads, budgets_just_below_a_model_of_hidden_50,
              tied_tables),
    run=_run_widest,
    equivalents={
        "one more until it is too many": _hidden_by_trying,
        "from two counts": _hidden_by_difference,
        "whole numbers": lambda config, budget: (
            budget - count_parameters(config).total) // (3 * config.dim * config.n_layers)
            + config.hidden_dim,
    },
    misconceptions=(
        Misconception("not rounded down", _hidden(round_=math.ceil),
            "For some budgets the model comes out over it. At most the budget means: round down.",
            also=[_hidden(round_=round)]),
        Misconception("two matrices", _hidden(matrices=2),
            "Too wide by half: the gated feed-forward has three matrices, not two."),
        Misconception("one table", _hidden(tables=1),
            "Too wide: there is a table at each end, unless the model ties them."),
        Misconception("always two tables", _hidden(tables=2),
            "Right until the tables are tied: then there is one table, not two."),
        Misconception("keys and values for all heads", _hidden(kv=False),
            "Too narrow where heads share: the matrices of keys and values have n_kv_heads "
            "heads, not n_heads."),
        Misconception("head size from dim", _hidden(size=lambda c: c.dim // c.n_heads),
            "Heads times head size need not be dim. Take the head size that the "
            "configuration names."),
        Misconception("four square matrices", _hidden(
                looks=lambda c: 4 * c.n_layers * c.dim ** 2),
            "You counted four matrices of dim times dim. Queries and output have n_heads heads "
            "of head_dim numbers, keys and values n_kv_heads."),
        Misconception("attention of one block", _hidden(
                looks=lambda c: 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)),
            "Too wide: the attention of one block was counted. Every block has four such "
            "matrices of its own."),
        Misconception("not a whole number", _hidden(round_=lambda v: v, whole=float),
            "The budget is divided rightly, but a matrix has a whole number of rows. Round "
            "down, and return an int."),
        Misconception("below the budget", _hidden(spared=1),
            "Where the budget is met exactly your answer is one too small. At most the budget "
            "means that all of it may be used."),
        Misconception("norms forgotten", _hidden(norms=lambda c: 0),
            "Nearly right, and over the budget where it is tight: norms are missing. Each block "
            "has two, and a last one follows, of dim weights each.",
            also=[_hidden(norms=lambda c: 2 * c.n_layers),
                  _hidden(norms=lambda c: c.n_layers + 1)]),
        Misconception("what is left beside the given one", lambda config, budget: (
                budget - count_parameters(config).total) // (3 * config.dim * config.n_layers),
            "That is how many hidden numbers can be added to the given ones. The "
            "configuration's own were counted as spent; they are part of the answer."),
        Misconception("the first that does not fit", lambda config, budget: (
                _hidden_by_trying(config, budget) + 1),
            "One too many, always: that is the first hidden that does not fit. Asked is the "
            "last one that does."),
    ),
    hints=(
        Hint("I do not know where to start",
             "How many parameters has the model without its feed-forwards? How many does one "
             "more hidden number cost, over all blocks?"),
        Hint("My result is slightly off",
             "One hidden number costs 3 · dim in each block. Without feed-forwards: tables, "
             "four matrices of attention in each block, 2 · L + 1 norms of dim."),
        Hint("It is refused for tied tables, or when the budget is met exactly",
             "hidden = (budget - tables - attention - norms) // (3 * dim * n_layers), with one "
             "table when config.tied_embeddings, else two. Whole numbers throughout."),
    ),
    praise="Sizes of models are chosen this way round: first the budget, then the width.",
)


# ---------------------------------------------------------------- exercise: leaky_norm (bug)


def two_texts():
    return random_tensor(12, 2, 5, 6) * torch.tensor([[1.0], [3.0], [0.2], [30.0], [2.0]]), random_tensor(13, 6)


def one_text_with_a_token_of_zeros():
    x = random_tensor(14, 7, 4, scale=5.0)
    x[3] = 0.0
    return x, random_tensor(15, 4)


def _tokens_normed(divisor):
    return lambda x, weight: x / divisor(x) * weight


def _root(x, dim=-1, eps=1e-5):
    return (x.pow(2).mean(dim, keepdim=True) + eps).sqrt()


LEAKY_NORM = Exercise(
    name="norm_tokens", chapter=4, kind="bug", entry="norm_tokens",
    title="A norm that sees the future", difficulty="medium", importance="essential", minutes=8,
    reference=_tokens_normed(_root),
    fixtures=(two_texts, one_text_with_a_token_of_zeros),
    equivalents={
        "rsqrt": lambda x, weight: x * torch.rsqrt(x.square().mean(-1, True) + 1e-5) * weight,
        "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
        "float32 inside": lambda x, weight: (x.float() / _root(x.float())).type_as(x) * weight,
    },
    misconceptions=(
        Misconception("unchanged", _tokens_normed(lambda x: _root(x, (-2, -1))),
            "The last token still moves the earlier ones: all tokens of a text share one "
            "size. Over which axes does the mean run?"),
        Misconception("over the tokens only", _tokens_normed(lambda x: _root(x, -2)),
            "Now each column has a size that all tokens share, so the future still leaks. "
            "The mean belongs to one token."),
        Misconception("over everything", _tokens_normed(
                lambda x: (x.pow(2).mean() + 1e-5).sqrt()),
            "Now even the texts of a batch share one size. The mean belongs to one token: "
            "last axis only."),
        Misconception("axis 1", _tokens_normed(lambda x: _root(x, 1)),
            "In a batch, axis 1 is the tokens, so the future still leaks. Count from the end: "
            "the numbers of a token are the last axis."),
        Misconception("axis 2", _tokens_normed(lambda x: _root(x, 2)),
            "Right for a batch; one text alone has no axis 2. Count from the end: the numbers "
            "of a token are always the last axis."),
        Misconception("epsilon lost", _tokens_normed(lambda x: _root(x, -1, 0.0)),
            "No leak any more, but a token of zeros gives NaN. Keep the small number under "
            "the root."),
        Misconception("sum instead of mean", _tokens_normed(
                lambda x: (x.pow(2).sum(-1, keepdim=True) + 1e-5).sqrt()),
            "No leak any more, but each token has length 1 now. It was the mean of the "
            "squares; keep it."),
        Misconception("axis lost", lambda x, weight: x * torch.rsqrt(
                x.pow(2).mean(dim=-1) + 1e-5) * weight,
            "The right axis, but it is gone after the mean, so the sizes no longer fit "
            "beside the tokens. Keep it, with size 1."),
    ),
    hints=(
        Hint("I see no slip",
             "The cell above moves the last token and prints how far each earlier one moves. "
             "In which line could tokens meet?"),
        Hint("A token moves that should not",
             "x has axes text, token, number. A mean over axis -2 is a mean over the tokens; "
             "each token should know only its own numbers."),
        Hint("I know the line and not the repair",
             "Take the mean over the last axis only, dim=-1, with keepdim=True."),
    ),
    praise="A mask cannot stop what leaks through a norm.",
)


# ---------------------------------------------------------------- exercise: start_weights (bug)


def a_model_to_be_started():
    return (6,)


def a_deeper_model():
    return (11,)


def _run_start(candidate, layers):
    """What the function makes of each kind of weight: its mean and its spread, rounded."""
    config = ModelConfig(dim=40, n_layers=layers, n_heads=4, n_kv_heads=2, head_dim=10,
                         hidden_dim=90, vocab_size=120)
    with torch.random.fork_rng(devices=[]):           # drawing is the task
        model = Transformer(config)
        for weight in model.parameters():
            weight.data.fill_(1.0 if weight.dim() == 1 else 0.5)   # norms begin right
        candidate(model)
    kinds: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        kind = ".".join(part for part in name.split(".") if part not in ("weight", "layers")
                        and not part.isdigit())
        kinds.setdefault(kind, []).append(weight.detach().flatten().float())
    joined = {kind: torch.cat(parts) for kind, parts in kinds.items()}
    return {kind: (v.mean().item(), v.std().item()) for kind, v in joined.items()}


def _compare_starts(expected, actual):
    if not isinstance(actual, dict) or set(actual) != set(expected):
        return "the model's parameters are not what they were"
    for kind, (mean, spread) in expected.items():
        got_mean, got_spread = actual[kind]
        if abs(got_mean - mean) > 0.004 or not abs(got_spread - spread) <= 0.06 * spread + 1e-6:
            return (f"in {kind}: expected mean {mean:.2f} and spread {spread:.4f}, "
                    f"got {got_mean:.2f} and {got_spread:.4f}")
    return None


def _started(narrow=lambda n: 0.02 / (2 * n) ** 0.5, norms=None):
    def start_weights(model):
        small = narrow(model.config.n_layers)
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=small if into_stream else 0.02)
            elif norms:
                norms(weight)
    return start_weights


def _started_by_name(spread, stop=None):
    """spread(name, narrow) -> the spread of a weight, or None to leave it as it is."""
    def start_weights(model):
        narrow = 0.02 / (2 * model.config.n_layers) ** 0.5
        for name, weight in model.named_parameters():
            if stop and stop in name:
                break
            std = spread(name, narrow)
            if std is not None:
                nn.init.normal_(weight, std=std)
    return start_weights


def _usual(name, narrow):
    return narrow if name.endswith(("wo.weight", "w2.weight")) else 0.02


def _started_beside(model):
    for weight in model.parameters():
        weight = 0.02 * torch.randn(weight.shape)     # a new tensor, and the model keeps the old


def _started_by_modules(model):
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for block in model.layers:
        for matrix in (block.attention.wo, block.feed_forward.w2):
            matrix.weight.data /= math.sqrt(2 * model.config.n_layers)


@torch.no_grad()
def _started_by_hand(model):
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.copy_(0.02 * torch.randn(weight.shape))
            if name.endswith(("wo.weight", "w2.weight")):
                weight.div_((2 * len(model.layers)) ** 0.5)


START_WEIGHTS = Exercise(
    name="start_weights", chapter=4, kind="bug", entry="start_weights",
    title="The loss is ln V and stays there", difficulty="medium", importance="essential",
    minutes=10,
    reference=_started(),
    fixtures=(a_model_to_be_started, a_deeper_model),
    run=_run_start, compare=_compare_starts,
    equivalents={
        "module by module": _started_by_modules,
        "randn": _started_by_hand,
        "norms set to one": _started(norms=nn.init.ones_),
    },
    misconceptions=(
        Misconception("unchanged", _started(norms=lambda w: nn.init.normal_(w, std=0.02)),
            "The norms still get tiny random weights, so every part reads almost nothing. "
            "Which parameters are matrices, and which are not?"),
        Misconception("norms of zeros", _started(norms=nn.init.zeros_),
            "Now the norms are zeros: no part reads anything at all. What should a new norm "
            "do to what it reads?"),
        Misconception("all parts alike", _started(narrow=lambda n: 0.02),
            "The norms are right. But what writes into the stream no longer starts narrower; "
            "that part of the code was right, so keep it."),
        Misconception("last norm drawn", _started_by_name(
                lambda name, narrow: None if "_norm" in name else _usual(name, narrow)),
            "The norms of the blocks are right, but the last one, before the output, is still "
            "drawn. Its name has no underscore: model.norm."),
        Misconception("only the norms drawn", _started_by_name(
                lambda name, narrow: 0.02 if "norm" in name else None),
            "The condition is turned round: you draw the norms and leave the matrices as they "
            "were."),
        Misconception("the embeddings left out", _started_by_name(
                lambda name, narrow: None if "norm" in name or "embed" in name
                else _usual(name, narrow)),
            "The norms are right, but the table of embeddings is no longer drawn. It is a "
            "matrix as well."),
        Misconception("stopped at the first norm", _started_by_name(_usual, stop="norm"),
            "The loop ends at the first norm, so nearly all matrices stay as they were. Leave "
            "that one out and go on."),
        Misconception("the model is not changed", _started_beside,
            "The model's weights are what they were. Does your condition ever hold? And a new "
            "tensor under the same name changes no model: write into the old one."),
        Misconception("norms drawn with spread 1", _started(
                norms=lambda w: nn.init.normal_(w, std=1.0)),
            "The sizes are about 1 now, but the norms are still random, half of them below "
            "zero. The weights of a new norm are exactly 1."),
    ),
    hints=(
        Hint("I see no slip",
             "The cell prints the size of what each norm hands on. In a new model it should "
             "be about 1. What decides it?"),
        Hint("What the norms hand on is nearly zero",
             "A norm has one axis of weights, and they start at 1. The loop draws *every* "
             "parameter anew."),
        Hint("I know the slip and not the repair",
             "Leave alone what is not a matrix: only where weight.dim() == 2 is something "
             "drawn."),
    ),
    praise="The first loss was right and the model was dead: one test alone is not enough.",
)


# ---------------------------------------------------------------- exercise: who_says_it


def _small_model(seed: int, layers: int, tied: bool = False, eps: float = 1e-5) -> Transformer:
    config = ModelConfig(dim=20, n_layers=layers, n_heads=3, n_kv_heads=1, head_dim=4,
                         hidden_dim=14, vocab_size=37, tied_embeddings=tied, norm_eps=eps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data.mul_(15)                  # far from the small start of training
            else:
                weight.data = 0.5 + torch.rand(weight.shape)
    return model.requires_grad_(False)


def a_model_of_three_blocks():
    return _small_model(16, 3), torch.tensor([3, 9, 27, 1, 5, 5]), 11


def a_model_of_two_blocks():
    return _small_model(17, 2, eps=0.2), torch.tensor([30, 2, 2, 11]), 36


def _without_a_trace(candidate, model, ids, answer):
    """The parts; the model must be as it was, hooks included."""
    parts = candidate(model, ids, answer)
    if any(module._forward_hooks for module in model.modules()):
        raise RuntimeError("hooks are still in the model")
    return parts


def _written(model, ids, order=("attention", "feed_forward"), embedding=True, token=-1):
    kept, hooks = [], []

    def keep(_, args, out):
        kept.append(out[0, token])

    for block in model.layers:
        for name in order:
            hooks.append(getattr(block, name).register_forward_hook(keep))
    model(ids[None])
    for hook in hooks:
        hook.remove()
    first = [model.tok_embeddings(ids[token])] if embedding else []
    return torch.stack([*first, *kept])                                  # (2 L + 1, dim)


def _says(divisor=None, weigh=True, **choice):
    @torch.no_grad()
    def who_says_it(model, ids, answer):
        rows = _written(model, ids, **choice)
        full = _written(model, ids, token=choice.get("token", -1)).sum(0)
        size = (full.pow(2).mean() + model.norm.eps).sqrt()
        if divisor:
            size = divisor(rows, size)
        direction = model.output.weight[answer]
        if weigh:
            direction = direction * model.norm.weight
        return (rows / size) @ direction
    return who_says_it


def _says_and_leaves_hooks(model, ids, answer):
    for part in (part for block in model.layers for part in (block.attention, block.feed_forward)):
        part.register_forward_hook(lambda _, args, out: None)
    return _says()(model, ids, answer)


@torch.no_grad()
def _says_by_differences(model, ids, answer):
    """The stream before and after each part, by hand."""
    from minimistral.rope import rotary_angles as turn

    positions = torch.arange(len(ids))
    angles = turn(positions, model.config.head_dim, model.config.rope_theta)
    x = model.tok_embeddings(ids)[None]
    parts = [x]
    for block in model.layers:
        parts.append(block.attention(block.attention_norm(x), positions, angles))
        x = x + parts[-1]
        parts.append(block.feed_forward(block.ffn_norm(x)))
        x = x + parts[-1]
    last = torch.cat([p[:, -1] for p in parts])
    return last / (x[0, -1].square().mean() + model.norm.eps).sqrt() @ (
        model.norm.weight * model.output.weight[answer])


@torch.no_grad()
def _says_from_totals(model, ids, answer):
    rows = _written(model, ids)
    total = rows.sum(0)
    scale = model.norm(total) / total                 # the same for every part
    return torch.stack([F.linear(row * scale, model.output.weight)[answer] for row in rows])


@torch.no_grad()
def _says_normed_each(model, ids, answer):
    return model.norm(_written(model, ids)) @ model.output.weight[answer]


@torch.no_grad()
def _says_cumulative(model, ids, answer):
    return model.norm(_written(model, ids).cumsum(0)) @ model.output.weight[answer]


@torch.no_grad()
def _says_blocks(model, ids, answer):
    kept = [model.tok_embeddings(ids)[-1]]
    hooks = [b.register_forward_hook(lambda _, args, out: kept.append(out[0, -1]))
             for b in model.layers]
    total = model(ids[None])
    for hook in hooks:
        hook.remove()
    return model.logits(model.norm(torch.stack(kept)))[:, answer] if total is not None else None


@torch.no_grad()
def _says_in_another_order(model, ids, answer):
    parts = _says()(model, ids, answer)
    return torch.cat([parts[:1], parts[1::2], parts[2::2]])


@torch.no_grad()
def _says_by_embedding(model, ids, answer):
    rows = _written(model, ids)
    size = (rows.sum(0).pow(2).mean() + model.norm.eps).sqrt()
    return rows / size @ (model.norm.weight * model.tok_embeddings.weight[answer])


@torch.no_grad()
def _says_everywhere(model, ids, answer):
    return torch.stack([_says(token=t)(model, ids, answer) for t in range(len(ids))], dim=1)


WHO_SAYS_IT = Exercise(
    name="who_says_it", chapter=4, kind="function", entry="who_says_it",
    title="Who says the answer?", difficulty="hard", importance="useful", minutes=18,
    reference=_says(), run=_without_a_trace,
    fixtures=(a_model_of_three_blocks, a_model_of_two_blocks),
    tolerance=1e-4,
    equivalents={
        "the blocks by hand": _says_by_differences,
        "the scale from the sum": _says_from_totals,
        "float64": lambda model, ids, answer: _says()(model, ids, answer).double(),
    },
    misconceptions=(
        Misconception("hooks left behind", _says_and_leaves_hooks,
            "Your hooks are still in the model and go on collecting in every later call. Each "
            "registration returns a handle: remove it when you have read."),
        Misconception("each part normed by itself", _says_normed_each,
            "The parts do not sum to the logit: each was divided by its own size. The last "
            "norm divides the whole stream by one number."),
        Misconception("the stream so far", _says_cumulative,
            "That is the logit lens: each row contains all rows before it. Asked is what each "
            "part alone adds to the logit."),
        Misconception("one row for each block", _says_blocks,
            "You read the stream after each block. Asked is what every part writes: attention "
            "and feed-forward apart, and the embedding."),
        Misconception("the embedding left out", _says(embedding=False),
            "One row is missing, so the parts do not sum to the logit: the embedding speaks "
            "as well, and comes first."),
        Misconception("the first token", _says(token=0),
            "These are the parts of the first token. The answer follows the last one."),
        Misconception("the last norm left out", _says(
                divisor=lambda rows, size: 1.0, weigh=False),
            "The last norm is missing, or a half of it: it divides the whole stream by its size "
            "and scales each column by its weight.",
            also=[_says(divisor=lambda rows, size: 1.0),
                  _says(weigh=False)]),
        Misconception("no epsilon", _says(
                divisor=lambda rows, size: rows.sum(0).pow(2).mean().sqrt()),
            "Right unless the epsilon is large: the last norm adds model.norm.eps to the mean "
            "of the squares, under the root."),
        Misconception("parts in another order", _says_in_another_order,
            "The parts are right and their order is not: all attentions come first. Asked is "
            "block by block, attention and then feed-forward."),
        Misconception("the row of the embedding", _says_by_embedding,
            "The answer's row came from the table of embeddings. The logit is made with its "
            "row of the output matrix."),
        Misconception("all tokens", _says_everywhere,
            "You kept the parts of all tokens. Asked are those of the last token alone: one "
            "number for each writer."),
    ),
    hints=(
        Hint("I do not know where to start",
             "At the last token the stream is the embedding plus 2 · L written rows. Which "
             "modules give these rows, and how can a hook keep them?"),
        Hint("My parts do not sum to the logit",
             "logit = (sum of rows / size · weight of the norm) · row of the output matrix. "
             "The size belongs to the whole sum: one number for all parts."),
        Hint("I cannot put it together",
             "1. Hooks on block.attention and block.feed_forward keep out[0, -1]. 2. rows = "
             "embedding and these. 3. size = root of the mean square of rows.sum(0), eps "
             "included. 4. rows / size @ (norm.weight * output.weight[answer])."),
    ),
    praise="The stream is a sum, so the credit can be shared out exactly.",
)


# ---------------------------------------------------------------- exercise: my_config (open)


LIMIT = 300_000


def no_argument():
    return ()


@torch.no_grad()
def _run_config(candidate):
    """Is it a model within the limit, does it start ignorant, does it not leak?"""
    config = candidate()
    if not isinstance(config, ModelConfig):
        raise TypeError("the function must return a ModelConfig")
    parameters = count_parameters(config).total
    met = {
        "a vocabulary of 960 tokens": config.vocab_size == 960,
        "at most 300,000 parameters": parameters <= LIMIT,
        "at least 100,000 parameters": parameters >= 100_000,
        "a loss of about ln V at the start": True,
    }
    if parameters > 10 * LIMIT:                       # counted, and far too large to build
        return met
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config)
        ids = torch.randint(0, config.vocab_size, (4, 30))
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    met["a loss of about ln V at the start"] = abs(loss - math.log(config.vocab_size)) < 0.3
    return met


def _compare_config(expected, actual):
    if not isinstance(actual, dict):
        return "no configuration came back"
    wrong = [what for what, good in actual.items() if good != expected[what]]
    return f"not met: {'; '.join(wrong)}" if wrong else None


def _config(**change):
    numbers = {"dim": 96, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "head_dim": 24,
               "hidden_dim": 240, "vocab_size": 960, **change}
    return lambda: ModelConfig(**numbers)


MY_CONFIG = Exercise(
    name="my_config", chapter=4, kind="open", entry="my_config",
    title="The best small model", difficulty="medium", importance="optional", minutes=20,
    reference=_config(),
    fixtures=(no_argument,),
    run=_run_config, compare=_compare_config,
    equivalents={
        "narrow and deep": _config(dim=56, n_layers=4, n_heads=2, n_kv_heads=2, head_dim=28,
                                   hidden_dim=150),
        "shared heads": _config(n_kv_heads=1, hidden_dim=260),
        "tied tables": _config(dim=128, n_heads=4, head_dim=32, hidden_dim=256,
                               tied_embeddings=True),
    },
    misconceptions=(
        Misconception("over the limit", _config(hidden_dim=640),
            "The model has more than 300,000 parameters. Count by formula before building; "
            "the two tables alone take 1,920 for each number of dim."),
        Misconception("another vocabulary", _config(vocab_size=500, hidden_dim=500),
            "The vocabulary is not that of the tales: with fewer rows some ids have no "
            "embedding. Leave it at 960."),
        Misconception("far below the limit", _config(dim=24, head_dim=6, hidden_dim=60),
            "Fewer than 100,000 parameters: most of the budget is unused, and width is worth "
            "having."),
    ),
    hints=(
        Hint("I do not know where to start",
             "The tables cost 2 · 960 · dim. How large may dim be so that half of the budget "
             "is left for blocks?"),
        Hint("I am over the limit",
             "mm.count_parameters(config).total tells before anything is built. Exercise 3 "
             "gives the widest hidden for what is left."),
        Hint("I do not know what to try",
             "Three candidates of the same size: one wide block; two blocks; four narrow ones. "
             "Also tied_embeddings=True. Write your guess down, then train."),
    ),
    praise="A model within the budget. Now let the ladder judge it.",
)


EXERCISES = [RMS_NORM, SWIGLU, BLOCK, LAYER_NORM, MODEL_ORDER, WIDEST_HIDDEN, LEAKY_NORM,
             START_WEIGHTS, WHO_SAYS_IT, MY_CONFIG]
