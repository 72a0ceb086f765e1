"""Chapter 3, positions: its two core pieces and its exercises."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minimistral.config import ModelConfig
from minimistral.model import Transformer
from minimistral.rope import rotary_angles, rotate

from ..exercises import Exercise, Hint, Misconception
from ..swaps import swap
from .fixtures import random_tensors


# ---------------------------------------------------------------- piece: rotary_angles


def positions_from_three_on():
    return torch.arange(3, 8), 6, 10_000.0


def two_texts_with_their_own_positions():
    return torch.tensor([[0, 5, 2, 90], [7, 1, 1, 33]]), 10, 500.0


def places_far_into_a_text():
    return torch.tensor([257, 301, 1003]), 4, 1_000_000.0


def _angles(frequencies=None, *, where=lambda p: p.float(), finish=None):
    """rotary_angles with one step exchanged."""
    def angles(positions, head_dim, theta):
        i = torch.arange(head_dim // 2)
        if frequencies:
            speeds = frequencies(i, head_dim, theta)
        else:
            speeds = theta ** (-2 * i / head_dim)
        made = where(positions)[..., None] * speeds
        return finish(made) if finish else (made.cos(), made.sin())
    return angles


def _angles_by_loops(positions, head_dim, theta):
    cos, sin = [], []
    for p in positions.flatten().tolist():
        row = [p * theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        cos.append([math.cos(a) for a in row])
        sin.append([math.sin(a) for a in row])
    shape = (*positions.shape, head_dim // 2)
    return torch.tensor(cos).reshape(shape), torch.tensor(sin).reshape(shape)


def _angles_by_einsum(positions, head_dim, theta):
    speeds = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    made = torch.einsum("...t,i->...ti", positions.float(), speeds)
    return torch.cos(made), torch.sin(made)


def _angles_by_logarithm(positions, head_dim, theta):
    steps = torch.arange(head_dim // 2, dtype=torch.float64) * (2 / head_dim)
    made = positions.double().unsqueeze(-1) * torch.exp(-steps * math.log(theta))
    return made.cos().float(), made.sin().float()


def _angles_by_polar(positions, head_dim, theta):
    speeds = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    made = positions.unsqueeze(-1) * speeds
    turns = torch.polar(torch.ones_like(made), made)
    return turns.real, turns.imag


def _angles_by_outer(positions, head_dim, theta):
    made = torch.outer(positions.float(), theta ** (-torch.arange(0, head_dim, 2) / head_dim))
    return made.cos(), made.sin()


ANGLES = Exercise(
    name="rotary_angles", chapter=3, kind="piece", piece="rope.rotary_angles",
    entry="rotary_angles", title="The angles", difficulty="easy", importance="essential",
    minutes=6,
    reference=rotary_angles,
    fixtures=(positions_from_three_on, two_texts_with_their_own_positions,
              places_far_into_a_text),
    tolerance=1e-4,  # a cosine of an angle near 1000 keeps four digits in float32
    equivalents={
        "loops": _angles_by_loops,
        "einsum": _angles_by_einsum,
        "exponential of a logarithm": _angles_by_logarithm,
        "complex numbers": _angles_by_polar,
        "another form": _angles(),
    },
    misconceptions=(
        Misconception("factor two forgotten", _angles(lambda i, D, theta: theta ** (-i / D)),
            "The pairs slow down too little: the slowest is much too fast. The exponent "
            "counts numbers, and a pair has two of them."),
        Misconception("one power for each number",
            _angles(lambda i, D, theta: theta ** (-2 * torch.arange(D) / D)),
            "You made an angle for every number of the head. A pair shares one angle, so there "
            "are half as many."),
        Misconception("division after the power",
            _angles(lambda i, D, theta: theta ** -(2.0 * i) / D),
            "Pair 0 turns too slowly. The division by the head size belongs into the exponent; "
            "a power is computed before a division. Brackets help."),
        Misconception("product after the power",
            _angles(lambda i, D, theta: theta ** -2 * i / D),
            "Pair 0 does not turn at all, the others hardly. Only the 2 got into the exponent: a "
            "power is computed before a product. Brackets around all of it."),
        Misconception("no axis for the pairs",
            lambda positions, head_dim, theta: (lambda a: (a.cos(), a.sin()))(
                positions * theta ** (-torch.arange(0, head_dim, 2) / head_dim)),
            "Positions and frequencies were multiplied number by number. Every position must "
            "meet every frequency: give the positions an axis of size 1 at the end."),
        Misconception("room for one text only",
            lambda positions, head_dim, theta: (lambda a: (a.cos(), a.sin()))(
                positions[:, None] * theta ** (-torch.arange(0, head_dim, 2) / head_dim)),
            "It works for one text. Positions may be a table, a row for each text: give them a "
            "new axis at the end, counted from the right.",
            also=[_angles_by_outer]),
        Misconception("functions for single numbers", _angles(finish=lambda a: math.cos(a)),
            "The cosine of the math module takes one number. Tensors have their own cosine "
            "and sine."),
        Misconception("two halves joined", _angles(finish=lambda a: (
                torch.cat((a, a), -1).cos(), torch.cat((a, a), -1).sin())),
            "Every angle appears twice, one half after the other. That is another library's "
            "layout; here each pair has its angle once."),
        Misconception("exponent with a plus", _angles(lambda i, D, theta: theta ** (2 * i / D)),
            "The later pairs turn faster and faster. They should be slower: the exponent is "
            "negative."),
        Misconception("pairs counted from one",
            _angles(lambda i, D, theta: theta ** (-2 * (i + 1) / D)),
            "Pair 0 does not turn by one radian for each place. The first exponent must be 0: "
            "count pairs from 0."),
        Misconception("slowest pair exactly one over theta",
            _angles(lambda i, D, theta: theta ** (-i / (len(i) - 1))),
            "First pair right, the others too slow: you spread the exponents up to exactly "
            "minus 1. The rule divides by the head size."),
        Misconception("divided by the number of pairs",
            _angles(lambda i, D, theta: theta ** (-2 * i / (D // 2))),
            "The pairs slow down twice as fast as they should. The exponent is divided by the "
            "head size, not by the number of pairs."),
        Misconception("whole-number division",
            _angles(lambda i, D, theta: theta ** -(2 * i // D).float()),
            "Pairs that should slow down all turn at one and the same speed: their exponents "
            "were rounded to whole numbers. Divide with one slash.",
            also=[_angles(lambda i, D, theta: theta ** (-2 * i // D).float())]),
        Misconception("theta fixed", _angles(lambda i, D, theta: 10_000 ** (-2 * i / D)),
            "Right for theta 10,000 only. Another model has another theta, and it comes as an "
            "argument."),
        Misconception("places counted anew",
            _angles(where=lambda p: torch.arange(p.shape[-1]).expand(p.shape).float()),
            "You counted the places yourself, from 0. Use the positions that came in: any start, "
            "any order, any number of texts.",
            also=[_angles(where=lambda p: torch.arange(p.shape[-1]).float())]),
        Misconception("a row for each pair", _angles(finish=lambda a: (
                a.mT.cos(), a.mT.sin())),
            "The last two axes are exchanged: a row for each pair, a column for each place. The "
            "places come first, the pairs last."),
        Misconception("sines first", _angles(finish=lambda a: (a.sin(), a.cos())),
            "The two results are exchanged: the sines came first. The order is cosines, then "
            "sines."),
        Misconception("angles returned", _angles(finish=lambda a: a),
            "You returned the angles themselves. Two tensors are wanted: their cosines and "
            "their sines."),
        Misconception("positions in sixteen bits",
            _angles(where=lambda p: p.bfloat16().float()),
            "Near the start all is well; far into a text neighbours get the same angle. "
            "Sixteen bits cannot hold 257. Compute in float32."),
        Misconception("double precision",
            _angles(where=lambda p: p.double(), finish=lambda a: (a.cos(), a.sin())),
            "The values are right but have 64 bits. Float32 is wanted, so that a model of "
            "32 bits stays one."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take D = 4 and theta = 100. What are the two frequencies? And which angles has "
             "position 3?"),
        Hint("My shapes do not fit",
             "Frequencies have shape (D/2,), positions (..., T). An axis of size 1 at the end "
             "of the positions gives (..., T, 1), and the product has shape (..., T, D/2)."),
        Hint("I cannot put it together",
             "torch.arange(0, head_dim, 2) holds 0, 2, 4 ...: that is 2i. Frequencies: theta "
             "to the power of minus that over head_dim. Angles: positions.float()[..., None] "
             "times frequencies. Return .cos() and .sin()."),
    ),
    praise="Every place of every text now has its D/2 angles.",
)


# ---------------------------------------------------------------- piece: rotate


def three_heads_of_eight():
    (x,) = random_tensors(1, (2, 5, 3, 8))
    x[1, 2, 0] = 0.0
    return x, *rotary_angles(torch.arange(2, 7), 8, 50.0)


def each_text_at_its_own_place():
    (x,) = random_tensors(2, (3, 4, 2, 10))
    return x, *rotary_angles(torch.tensor([[0, 1, 2, 3], [9, 10, 11, 12], [5, 7, 6, 40]]), 10, 90.0)


def sixteen_bit_numbers():
    (x,) = random_tensors(3, (2, 5, 3, 8))
    return x.bfloat16(), *rotary_angles(torch.arange(4, 9), 8, 50.0)


def sixteen_bits_and_tiny_numbers():
    (x,) = random_tensors(15, (2, 5, 3, 8), scale=2e-6)  # the last bits of float16: rounding shows
    return x.half(), *rotary_angles(torch.arange(4, 9), 8, 50.0)


def _rotation(first=None, second=None, *, split=None, join=None, dtype=None, heads=None):
    """rotate with one step exchanged; the steps get both numbers, cosine and sine."""
    def rotation(x, cos, sin):
        if heads:
            cos, sin = heads(cos), heads(sin)
        else:
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        y = x.float()
        a, b = split(y) if split else (y[..., 0::2], y[..., 1::2])
        a, b = ((first or (lambda a, b, cos, sin: a * cos - b * sin))(a, b, cos, sin),
                (second or (lambda a, b, cos, sin: a * sin + b * cos))(a, b, cos, sin))
        out = join(a, b) if join else torch.stack((a, b), -1).flatten(-2)
        return out.to(dtype or x.dtype)
    return rotation


def _rotation_by_complex(x, cos, sin):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.complex(cos, sin).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _rotation_by_swapping(x, cos, sin):
    y = x.float()
    cos, sin = (t.repeat_interleave(2, -1).unsqueeze(-2) for t in (cos, sin))
    other = torch.stack((-y[..., 1::2], y[..., 0::2]), -1).reshape(y.shape)
    return (y * cos + other * sin).to(x.dtype)


def _rotation_by_matrices(x, cos, sin):
    turns = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    pairs = x.float().unflatten(-1, (-1, 2))                          # (B, T, H, D/2, 2)
    turns = turns if turns.dim() == 5 else turns.expand(len(x), *turns.shape)
    return torch.einsum("btdij,bthdj->bthdi", turns, pairs).flatten(-2).to(x.dtype)


def _rotation_by_slices(x, cos, sin):
    out = torch.empty(x.shape)
    for h in range(x.shape[2]):
        even, odd = x[:, :, h, 0::2].float(), x[:, :, h, 1::2].float()
        out[:, :, h, 0::2] = even * cos - odd * sin
        out[:, :, h, 1::2] = even * sin + odd * cos
    return out.type_as(x)


def _rotation_by_loops(x, cos, sin):
    cos, sin = (t.expand(len(x), *t.shape[-2:]) for t in (cos, sin))
    out = torch.zeros(x.shape)
    for i in range(x.shape[-1] // 2):
        a, b = x[..., 2 * i].float(), x[..., 2 * i + 1].float()
        c, s = cos[:, :, None, i], sin[:, :, None, i]
        out[..., 2 * i], out[..., 2 * i + 1] = a * c - b * s, a * s + b * c
    return out.to(x.dtype)


def _rotation_overwrites(x, cos, sin):
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    x[..., 0::2], x[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return x


def _rotation_overwrites_early(x, cos, sin):
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x = x.clone()
    x[..., 0::2] = (x[..., 0::2].float() * cos - x[..., 1::2].float() * sin).to(x.dtype)
    x[..., 1::2] = (x[..., 0::2].float() * sin + x[..., 1::2].float() * cos).to(x.dtype)
    return x


def _rotation_in(x, cos, sin):
    """The rotation in whatever dtype the three of them have."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _halves(y):
    return y.chunk(2, dim=-1)


def _joined(a, b):
    return torch.cat((a, b), -1)


ROTATE = Exercise(
    name="rotate", chapter=3, kind="piece", piece="rope.rotate", entry="rotate",
    title="The rotation", difficulty="medium", importance="essential", minutes=10,
    reference=rotate,
    fixtures=(three_heads_of_eight, each_text_at_its_own_place, sixteen_bit_numbers,
              sixteen_bits_and_tiny_numbers),
    equivalents={
        "complex numbers": _rotation_by_complex,
        "x cos + swapped sin": _rotation_by_swapping,
        "two by two matrices": _rotation_by_matrices,
        "slices, head by head": _rotation_by_slices,
        "pair by pair": _rotation_by_loops,
        "slices": _rotation(),
    },
    misconceptions=(
        Misconception("halves instead of neighbours", _rotation(split=_halves, join=_joined),
            "Pairs were formed from the two halves of a head: 0 with D/2. That is another "
            "layout. In ours neighbours are a pair: 0 with 1."),
        Misconception("joined as halves", _rotation(join=_joined),
            "The turned numbers are right, but their order is not: all first numbers, then "
            "all second ones. They must lie in pairs again, as before."),
        Misconception("split as halves", _rotation(split=_halves),
            "You split the head into halves and joined it as neighbours. Both must be "
            "neighbours: numbers 0 and 1, numbers 2 and 3."),
        Misconception("turned the other way", _rotation(
                lambda a, b, cos, sin: a * cos + b * sin, lambda a, b, cos, sin: b * cos - a * sin),
            "All arrows turn to the right instead of to the left. Look at the two signs: the "
            "minus belongs to the new first number."),
        Misconception("cosine and sine exchanged", _rotation(
                lambda a, b, cos, sin: a * sin - b * cos, lambda a, b, cos, sin: a * cos + b * sin),
            "Cosine and sine have changed places. With angle 0 nothing may move: the cosine, "
            "which is 1 there, multiplies the number's own part."),
        Misconception("cosine and sine handed over exchanged", _rotation(
                lambda a, b, cos, sin: a * cos - b * sin, lambda a, b, cos, sin: a * cos + b * sin),
            "The first number is right. The second takes its sine part from its own number; "
            "it should be the other one's sine and its own cosine."),
        Misconception("new first number used for the second", _rotation_overwrites_early,
            "The first numbers are right, the second ones not: they were made of first numbers "
            "that were turned already. Keep the old ones until both are done.",
            also=[_rotation(
                      second=lambda a, b, cos, sin: (a * cos - b * sin) * sin + b * cos)]),
        Misconception("pairs not laid in a row",
            _rotation(join=lambda a, b: torch.stack((a, b), -1)),
            "The result still has an axis for the pairs. Lay the last two axes in a row, so "
            "that it has the shape of x."),
        Misconception("input overwritten", _rotation_overwrites,
            "The values are right, but they were written into the tensor that came in. Make a "
            "new one."),
        Misconception("always float32", _rotation(dtype=torch.float32),
            "The numbers came in 16 bits and went out in 32. Compute in float32, then return "
            "to the dtype of x."),
        Misconception("no axis for the heads", _rotation(heads=lambda t: t),
            "The shapes do not fit: x has an axis for the heads. Cosine and sine need one of "
            "size 1 in its place, before the axis of the pairs.",
            also=[_rotation(heads=lambda t: t.unsqueeze(-1))]),
        Misconception("axes for shared places", _rotation(heads=lambda t: t.unsqueeze(1)),
            "It works when all texts share their positions. When each has its own, only the "
            "heads need a new axis, before the last one: count from the right.",
            also=[_rotation(heads=lambda t: t[None, :, None])]),
        Misconception("computed in sixteen bits", lambda x, cos, sin: _rotation_in(
                x, cos.to(x.dtype), sin.to(x.dtype)),
            "The products were computed in 16 bits, and each one was rounded. Make x float32 "
            "first, compute, and go back to its dtype at the end."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take one token and one head of four numbers. Which two numbers are turned by "
             "the first angle, and which two by the second?"),
        Hint("My shapes do not fit",
             "The first numbers of the pairs have shape (B, T, H, D/2). cos has (T, D/2) or "
             "(B, T, D/2): unsqueeze(-2) gives both an axis of size 1 for the heads."),
        Hint("I cannot put the pairs together again",
             "even = x.float()[..., 0::2], odd = the same from 1. Compute both new numbers; "
             "torch.stack of the two on a new last axis, then flatten(-2), then the dtype "
             "of x."),
    ),
    praise="Queries and keys now know where they stand.",
)


# ---------------------------------------------------------------- exercise: tokens_per_turn


def a_head_of_eight():
    return 8, 10_000.0


def a_small_head_and_theta():
    return 6, 500.0


def a_head_of_mistral():
    return 128, 1_000_000.0


def _tokens(formula):
    return lambda head_dim, theta: formula(
        torch.arange(head_dim // 2).float(), head_dim, theta)


TOKENS_PER_TURN = Exercise(
    name="tokens_per_turn", chapter=3, kind="complete", entry="tokens_per_turn",
    title="How long is a turn?", difficulty="easy", importance="useful", minutes=5,
    reference=_tokens(lambda i, D, theta: 2 * math.pi * theta ** (2 * i / D)),
    fixtures=(a_head_of_eight, a_small_head_and_theta, a_head_of_mistral),
    equivalents={
        "list": lambda head_dim, theta: [2 * math.pi / theta ** (-i / head_dim)
                                         for i in range(0, head_dim, 2)],
        "exponential": _tokens(lambda i, D, theta: 2 * math.pi * (
            2 * i / D * math.log(theta)).exp()),
        "from the angles of place 1": lambda head_dim, theta: 2 * math.pi / torch.atan2(
            *reversed(rotary_angles(torch.tensor([1]), head_dim, theta)))[0],
    },
    misconceptions=(
        Misconception("one radian", _tokens(lambda i, D, theta: theta ** (2 * i / D)),
            "Pair 0 comes out as 1: that is the number of tokens for one radian. A whole turn "
            "has about 6.28 of them."),
        Misconception("multiplied by the speed",
            _tokens(lambda i, D, theta: 2 * math.pi * theta ** (-2 * i / D)),
            "The later pairs need fewer and fewer tokens, but they are the slow ones. Divide "
            "the whole turn by the speed."),
        Misconception("the speeds", _tokens(lambda i, D, theta: theta ** (-2 * i / D)),
            "These are the speeds, in radians for each token. How many tokens does it take to "
            "fill a whole turn?"),
        Misconception("factor two forgotten",
            _tokens(lambda i, D, theta: 2 * math.pi * theta ** (i / D)),
            "The slow pairs come out too fast. The exponent counts numbers of the head, and a "
            "pair has two."),
        Misconception("rounded",
            _tokens(lambda i, D, theta: (2 * math.pi * theta ** (2 * i / D)).round()),
            "The numbers were rounded. A turn need not end on a token; leave the fraction."),
        Misconception("one for each number", lambda head_dim, theta: [
                2 * math.pi * theta ** (i / head_dim) for i in range(head_dim)],
            "There is one result for each number of the head. A pair turns together, so there "
            "are half as many."),
        Misconception("as many pairs as numbers", lambda head_dim, theta: [
                2 * math.pi * theta ** (2 * i / head_dim) for i in range(head_dim)],
            "It begins rightly and goes on too long: twice as many pairs as there are. Pairs "
            "are counted up to half the head size."),
        Misconception("product after the power",
            _tokens(lambda i, D, theta: 2 * math.pi / (theta ** -2 * i / D)),
            "Pair 0 has speed 0, so its turn never ends: only the 2 got into the exponent. A "
            "power is computed before a product. Brackets around all of it.",
            also=[lambda head_dim, theta: [
                      2 * math.pi / (theta ** -2 * i / head_dim) for i in range(head_dim // 2)]]),
        Misconception("pairs counted from one",
            _tokens(lambda i, D, theta: 2 * math.pi * theta ** (2 * (i + 1) / D)),
            "Pair 0 is missing: it needs 6.28 tokens. Pairs are counted from 0, so the first "
            "exponent is 0."),
        Misconception("half a turn", _tokens(lambda i, D, theta: math.pi * theta ** (2 * i / D)),
            "Every number is half of what is expected: pi radians are half a turn. A whole one "
            "is twice as long."),
        Misconception("degrees", _tokens(lambda i, D, theta: 360 * theta ** (2 * i / D)),
            "A whole turn was counted in degrees, but the speeds are in radians for each token. "
            "How many radians has a whole turn?"),
    ),
    hints=(
        Hint("I do not know where to start",
             "Pair 0 turns by one radian for each token. A whole turn is about 6.28 radians. "
             "After how many tokens is it round?"),
        Hint("My numbers fall instead of rising",
             "A pair with speed 0.01 needs 628 tokens: the whole turn over the speed."),
        Hint("I cannot write the exponent",
             "i runs from 0 to D/2 - 1. Speed: theta to the power of -2i/D. Turn: 2 * math.pi "
             "over the speed."),
    ),
    praise="Now you can read a configuration and say which distances each pair can tell apart.",
)


# ---------------------------------------------------------------- exercise: one_head_with_positions


ORDER = Exercise(
    name="heads_with_positions", chapter=3, kind="order",
    title="Where the turn belongs", difficulty="easy", importance="essential", minutes=5,
    lines=(
        "q, k, v = (w(x).unflatten(-1, (n_heads, -1)) for w in (wq, wk, wv))",
        "cos, sin = rotary_angles(positions, q.shape[-1], theta)",
        "q, k = rotate(q, cos, sin), rotate(k, cos, sin)",
        "mask = causal(positions, positions)",
        "looks = attend(q, k, v, mask)",
        "return wo(looks.flatten(-2))",
    ),
    distractors=("v = rotate(v, cos, sin)",
                 "x = rotate(x.unflatten(-1, (n_heads, -1)), cos, sin).flatten(-2)"),
    equivalents={
        "mask first": (3, 0, 1, 2, 4, 5),
        "mask second": (0, 3, 1, 2, 4, 5),
        "mask before the turn": (0, 1, 3, 2, 4, 5),
    },
    misconceptions=(
        Misconception("values turned instead", "with 6 and without 2",
            "The values are turned, queries and keys are not. Positions must enter the scores, "
            "and the scores are made of the other two."),
        Misconception("values turned", "with 6",
            "The values are turned as well. They are handed over as they are; only what enters a "
            "score is turned."),
        Misconception("the tokens turned instead", "7 before 0",
            "The tokens themselves are turned, so the values are turned as well. Only queries and "
            "keys enter a score: make them first, then turn them."),
        Misconception("the tokens turned too late", "with 7 and without 2",
            "The tokens are turned when q, k and v are made already, so nothing changes. Turn "
            "what enters a score."),
        Misconception("the tokens turned, and the queries", "with 7",
            "The line with x changes nothing any more, as q, k and v are made already; and the "
            "token itself is never turned."),
        Misconception("no turn", "without 2",
            "The angles are computed and never used. Which line turns queries and keys?"),
        Misconception("no way back", "without 5",
            "The heads still stand side by side. One line is missing: join them and return to the "
            "width of x."),
        Misconception("angles of an unknown head size", "1 before 0",
            "The angles ask the queries for the size of a head, and there are no queries yet."),
        Misconception("turned without angles", "2 before 1",
            "The turn uses cosines and sines that are not there yet."),
        Misconception("turned after the look", "4 before 2",
            "The look is over when the turn comes, so the positions have no effect on it."),
        Misconception("look before the mask", "4 before 3",
            "The look asks the mask who may see whom, and there is no mask yet."),
        Misconception("returned before the look", "5 before 4",
            "The heads are joined and returned before they have looked. The way back comes last."),
    ),
    hints=(
        Hint("I do not know which line is first",
             "Each line uses names. Which line uses only x and the matrices?"),
        Hint("Two lines are left over, not one",
             "Two lines stay out. A score is made of a query and a key. Which of the lines "
             "turns something else?"),
        Hint("The order is still refused",
             "Project, angles, turn q and k, mask, look, project back: six steps. The mask "
             "may stand anywhere before the look."),
    ),
    praise="Two lines more than in chapter 2, and the model knows what came first.",
)


# ---------------------------------------------------------------- exercise: turn_complex


def one_text_from_the_start():
    (x,) = random_tensors(4, (2, 5, 3, 8))
    return x, torch.arange(5), 70.0


def places_in_any_order():
    (x,) = random_tensors(5, (3, 4, 2, 10))
    return x, torch.tensor([30, 2, 2, 11]), 3000.0


def _complex(angle=None, *, pairs=None, back=None, factor=None, axis=-2):
    def turn_complex(x, positions, theta):
        D = x.shape[-1]
        i = torch.arange(0, D, 2)
        if angle:
            angles = angle(positions, i, D, theta)
        else:
            angles = positions[:, None] * theta ** (-i / D)
        turns = factor(angles) if factor else torch.polar(torch.ones_like(angles), angles)
        z = pairs(x) if pairs else torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        out = z * (turns.unsqueeze(axis) if axis is not None else turns)
        return back(out) if back else torch.view_as_real(out).flatten(-2)
    return turn_complex


def _library_turn(x, positions, theta):
    return rotate(x, *rotary_angles(positions, x.shape[-1], theta))


def _python_complex(x, positions, theta):
    D, rows = x.shape[-1], []
    for b in x.tolist():
        for p, token in zip(positions.tolist(), b):
            for head in token:
                for i in range(0, D, 2):
                    angle = p * theta ** (-i / D)
                    z = complex(head[i], head[i + 1]) * complex(math.cos(angle), math.sin(angle))
                    rows += [z.real, z.imag]
    return torch.tensor(rows).reshape(x.shape)


TURN_COMPLEX = Exercise(
    name="turn_complex", chapter=3, kind="function", entry="turn_complex",
    title="The same with complex numbers", difficulty="medium", importance="useful", minutes=10,
    reference=_complex(),
    fixtures=(one_text_from_the_start, places_in_any_order),
    equivalents={
        "the library's two functions": _library_turn,
        "Python's complex numbers": _python_complex,
        "exponential": _complex(factor=lambda a: torch.exp(1j * a)),
        "from the parts": _complex(pairs=lambda x: torch.complex(x[..., 0::2], x[..., 1::2]),
            back=lambda z: torch.stack((z.real, z.imag), -1).reshape(*z.shape[:-1], -1)),
    },
    misconceptions=(
        Misconception("size and angle exchanged",
            _complex(factor=lambda a: torch.polar(a, torch.ones_like(a))),
            "Every arrow turns by the same angle and is stretched by its position. Size 1 "
            "comes first, the angle second."),
        Misconception("power without the imaginary unit", _complex(factor=lambda a: torch.exp(
                -a).to(torch.complex64)),
            "The arrows shrink and do not turn. The exponent must be imaginary: without it the "
            "exponential only changes lengths."),
        Misconception("turned the other way",
            _complex(factor=lambda a: torch.polar(torch.ones_like(a), -a)),
            "The arrows turn to the right instead of to the left. The angle is positive."),
        Misconception("halves instead of neighbours", _complex(
                pairs=lambda x: torch.complex(*x.contiguous().chunk(2, -1)),
                back=lambda z: torch.cat((z.real, z.imag), -1)),
            "The complex numbers were made of the two halves of a head. Here neighbours are a "
            "pair: 0 and 1."),
        Misconception("no pairs cut", _complex(pairs=torch.view_as_complex),
            "A complex number is made of a last axis of size 2, and here it has D numbers. Cut "
            "them into D/2 pairs first."),
        Misconception("size as a bare number", _complex(factor=lambda a: torch.polar(1, a)),
            "The size 1 came as a bare number. It must be a tensor of ones, in the shape of the "
            "angles."),
        Misconception("real parts, then imaginary parts",
            _complex(back=lambda z: torch.cat((z.real, z.imag), -1)),
            "The right numbers in the wrong order: all real parts, then all imaginary ones. "
            "They must stand side by side, pair after pair."),
        Misconception("real part only", _complex(back=lambda z: z.real),
            "Half of the numbers are missing: only the real parts came back. A pair has two "
            "numbers."),
        Misconception("left complex", _complex(back=lambda z: z),
            "The result is still complex. Make two ordinary numbers of each, in the shape of "
            "x."),
        Misconception("pairs not laid in a row", _complex(back=torch.view_as_real),
            "The result has one axis too many: the pairs. Lay the last two axes in a row."),
        Misconception("factor two forgotten",
            _complex(lambda p, i, D, theta: p[:, None] * theta ** (-i / 2 / D)),
            "Pair 0 is right, the others turn too fast. The exponent is -2i/D, where i counts "
            "the pairs."),
        Misconception("theta fixed",
            _complex(lambda p, i, D, theta: p[:, None] * 10_000 ** (-i / D)),
            "Pair 0 is right, the others turn too slowly. Theta is an argument; you used "
            "10,000."),
        Misconception("places counted anew",
            _complex(lambda p, i, D, theta: torch.arange(len(p))[:, None] * theta ** (-i / D)),
            "Right while positions are 0, 1, 2. They may be in any order and start anywhere: "
            "use those that came in."),
        Misconception("no axis for the heads", _complex(axis=None),
            "The shapes do not fit: the factors have shape (T, D/2), the pairs (B, T, H, D/2): "
            "the heads need an axis of size 1."),
        Misconception("half of the pairs", lambda x, positions, theta: (
                torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
                * torch.exp(1j * rotary_angles(positions, x.shape[-1] // 2, theta)[0])[:, None]),
            "There are too few factors. A head of D numbers has D/2 pairs, and each needs its "
            "own: the exponents go in steps of two through all D."),
    ),
    hints=(
        Hint("I do not know complex numbers",
             "Here one is just a pair of numbers with a rule for products. What does a "
             "product with a number of size 1 and angle phi do to an arrow?"),
        Hint("I cannot make complex numbers of x",
             "torch.view_as_complex wants a last axis of size 2: cut D into (D/2, 2) first. "
             "torch.view_as_real goes back; then flatten the last two axes."),
        Hint("The shapes do not fit",
             "torch.polar(ones, angles) has shape (T, D/2). unsqueeze(-2) makes it (T, 1, "
             "D/2), which fits (B, T, H, D/2)."),
    ),
    praise="One product. Mistral's own inference code turns its queries and keys like this.",
)


# ---------------------------------------------------------------- exercise: move_keys


def five_places_further():
    (x,) = random_tensors(6, (2, 7, 3, 8))
    return rotate(x, *rotary_angles(torch.arange(4, 11), 8, 60.0)), 5, 60.0


def backwards():
    (x,) = random_tensors(7, (3, 4, 2, 10))
    return rotate(x, *rotary_angles(torch.arange(20, 24), 10, 900.0)), -17, 900.0


def _by(positions, *, theta=None, turn=rotate, size=None):
    def move_keys(keys, steps, base):
        p = positions(keys, steps)
        D = size(keys) if size else keys.shape[-1]
        return turn(keys, *rotary_angles(p, D, theta or base))
    return move_keys


def _constant(keys, steps):
    return torch.full(keys.shape[1:2], steps)


def _half_turn(x, cos, sin):
    return _rotation(split=_halves, join=_joined)(x, cos, sin)


def _move_by_formula(keys, steps, theta):
    angles = steps * theta ** (-torch.arange(0, keys.shape[-1], 2) / keys.shape[-1])
    a, b = keys[..., 0::2], keys[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).reshape(keys.shape)


def _move_by_complex(keys, steps, theta):
    return _complex()(keys, torch.full(keys.shape[1:2], steps), theta)


MOVE_KEYS = Exercise(
    name="move_keys", chapter=3, kind="function", entry="move_keys",
    title="Move keys that are turned already", difficulty="medium", importance="useful",
    minutes=10,
    reference=_by(_constant),
    fixtures=(five_places_further, backwards),
    equivalents={
        "the formula": _move_by_formula,
        "complex numbers": _move_by_complex,
        "one angle for all": lambda keys, steps, theta: rotate(
            keys, *rotary_angles(torch.tensor([steps]), keys.shape[-1], theta)),
    },
    misconceptions=(
        Misconception("turned by new places", _by(lambda k, steps: torch.arange(k.shape[1]) + steps),
            "The keys were turned by whole positions again, on top of the turn they have. They "
            "all have to go the same way further: by the steps."),
        Misconception("steps times the place",
            _by(lambda k, steps: steps * torch.arange(k.shape[1])),
            "Key n moved n times as far as key 1. All keys move by the same number of steps."),
        Misconception("backwards", _by(lambda k, steps: _constant(k, -steps)),
            "The keys went the other way. Positive steps mean later places, so larger angles."),
        Misconception("one step too far", _by(lambda k, steps: _constant(k, steps + 1)),
            "All keys are one place too far. Moving by 0 steps must change nothing."),
        Misconception("size of the steps only", _by(lambda k, steps: _constant(k, abs(steps))),
            "Right for moves forward. Steps may be negative; then the keys turn back."),
        Misconception("theta fixed", _by(_constant, theta=10_000.0),
            "Pair 0 is right, the slower ones are not: theta came as an argument, and you used "
            "10,000."),
        Misconception("halves instead of neighbours", _by(_constant, turn=_half_turn),
            "Pairs were formed from the halves of a head. These keys were turned as "
            "neighbours, 0 with 1, and must be moved as such."),
        Misconception("a bare number",
            lambda keys, steps, theta: rotary_angles(steps, keys.shape[-1], theta),
            "The library's angles take positions as a tensor, and steps is a bare number. Make "
            "a tensor of it."),
        Misconception("as many places as steps",
            lambda keys, steps, theta: rotate(keys, *rotary_angles(
                torch.arange(steps), keys.shape[-1], theta)),
            "You made positions from 0 up to the steps. All keys need one and the same "
            "position more: the steps themselves."),
        Misconception("numbers rolled", lambda keys, steps, theta: keys.roll(steps, 1),
            "The keys changed places in the table. They should stay where they are, and be "
            "turned as if they stood elsewhere in the text."),
        Misconception("size of another axis", _by(_constant, size=lambda keys: keys.shape[2]),
            "The number of heads was taken for the size of a head. In (B, S, H, D) the size is "
            "the last axis."),
    ),
    hints=(
        Hint("I do not know where the keys stood",
             "You need not. A key at place s is turned by s times its speed. What is missing "
             "to a turn of s + steps?"),
        Hint("Some keys are right, others are not",
             "All keys get the same additional angle: steps times the speed of the pair. Turns "
             "add up: 4 and then 5 makes 9."),
        Hint("I cannot put it together",
             "rotary_angles(torch.tensor([steps]), D, theta) gives cosines and sines of shape "
             "(1, D/2). rotate(keys, cos, sin) uses them for every key."),
    ),
    praise="Turns add up, so a cache of keys can be moved without computing it again.",
)


# ---------------------------------------------------------------- exercise: turn_pairs (bug)


def arrows_of_different_length():
    (x,) = random_tensors(8, (2, 5, 8))
    x[1, 3] = 0.0
    return x, *rotary_angles(torch.arange(2, 7), 8, 40.0)


def one_text():
    (x,) = random_tensors(9, (4, 6))
    return x, *rotary_angles(torch.tensor([9, 1, 0, 25]), 6, 200.0)


def _second(x, cos, sin, formula):
    """The bug with another second line; the formula gets the new and both old numbers."""
    a, b = x[..., 0::2], x[..., 1::2]
    new = a * cos - b * sin
    return torch.stack((new, formula(new, a, b)), -1).flatten(-2)


def _pairs(order="both", *, signs=(-1, 1), copied=True, rescale=False, floor=1e-30):
    def turn_pairs(x, cos, sin):
        turned = x.clone() if copied else x
        minus, plus = signs
        a, b = x[..., 0::2].clone(), x[..., 1::2].clone()
        if order == "both":
            turned[..., 0::2] = a * cos + minus * b * sin
            turned[..., 1::2] = plus * a * sin + b * cos
        elif order == "even first":
            turned[..., 0::2] = a * cos + minus * b * sin
            turned[..., 1::2] = plus * turned[..., 0::2] * sin + b * cos
        else:
            turned[..., 1::2] = plus * a * sin + b * cos
            turned[..., 0::2] = a * cos + minus * turned[..., 1::2] * sin
        if rescale:
            now, old = (t.norm(dim=-1, keepdim=True) for t in (turned, x))
            turned = turned / now.clamp(min=floor) * old
        return turned
    return turn_pairs


TURN_PAIRS = Exercise(
    name="turn_pairs", chapter=3, kind="bug", entry="turn_pairs",
    title="The arrows that change their length", difficulty="medium", importance="essential",
    minutes=8,
    reference=_pairs(),
    fixtures=(arrows_of_different_length, one_text),
    tolerance=2e-5,
    equivalents={
        "stack": lambda x, cos, sin: torch.stack(
            (x[..., 0::2] * cos - x[..., 1::2] * sin,
             x[..., 0::2] * sin + x[..., 1::2] * cos), -1).flatten(-2),
        "the library's rotate": lambda x, cos, sin: rotate(x.unsqueeze(-2), cos, sin).squeeze(-2),
        "a new tensor": lambda x, cos, sin: torch.empty_like(x).copy_(_pairs()(x, cos, sin)),
    },
    misconceptions=(
        Misconception("unchanged", _pairs("even first"),
            "The bug is still there. Look at the last assignment: what does the tensor hold at "
            "the even places when it is read there? A slice is no copy."),
        Misconception("lines exchanged", _pairs("odd first"),
            "Now the second numbers are right and the first ones are not. The other order has "
            "the same fault: one line reads what the other has just written."),
        Misconception("sign in the first line", _pairs("even first", signs=(1, 1)),
            "You changed a sign of the first line. The signs were right; the second line reads "
            "numbers that have been turned already."),
        Misconception("cosine and sine exchanged", lambda x, cos, sin: torch.stack(
                (x[..., 0::2] * cos - x[..., 1::2] * sin,
                 x[..., 0::2] * cos + x[..., 1::2] * sin), -1).flatten(-2),
            "Both lines read old numbers now. But the second line has its cosine and sine "
            "exchanged: with angle 0 the second number must stay."),
        Misconception("lengths repaired afterwards", _pairs("even first", rescale=True),
            "The lengths are right again, the directions are not. Scaling hides the symptom; "
            "find the line that reads turned numbers."),
        Misconception("copy left out", _pairs(copied=False),
            "The result is right, but x was overwritten. The copy at the beginning must stay."),
        Misconception("sign in the second line", lambda x, cos, sin: _second(
                x, cos, sin, lambda new, a, b: new * sin - b * cos),
            "You changed the sign of the second line. The signs were right; ask which numbers "
            "that line reads."),
        Misconception("first line without effect", lambda x, cos, sin: torch.stack(
                (x[..., 0::2], x[..., 0::2] * sin + x[..., 1::2] * cos), -1).flatten(-2),
            "The second numbers are right now, but the first ones are as they came: they have "
            "to be turned as well."),
        Misconception("turned the other way", _pairs(signs=(1, -1)),
            "The lengths stay, but the arrows turn to the right. The signs of the two lines were "
            "right; leave them as they came."),
        Misconception("halves one after the other", lambda x, cos, sin: torch.cat(
                (x[..., 0::2] * cos - x[..., 1::2] * sin,
                 x[..., 0::2] * sin + x[..., 1::2] * cos), -1),
            "The numbers are right, their places are not: all first numbers stand before all "
            "second ones. Neighbours are a pair, before and after."),
    ),
    hints=(
        Hint("I see no slip",
             "Follow one pair by hand: (2, 1), a quarter of a turn, so cos = 0 and sin = 1. "
             "What stands at the even place after the first line?"),
        Hint("I know which line, but not what is wrong with it",
             "The second number must be a times sin plus b times cos, with the old a. When "
             "that line runs, the old a is gone from the copy."),
        Hint("How do I keep the old numbers?",
             "x itself still holds them. Let both lines read x, and write into the copy only."),
    ),
    praise="No shape and no error showed it; the length of an arrow did.",
)


# ---------------------------------------------------------------- exercise: to_neighbours


def three_heads_with_numbered_rows():
    rows = torch.arange(24.0)[:, None] * 100 + torch.arange(5.0)
    return rows, 3


def two_heads_of_ten():
    (weight,) = random_tensors(10, (20, 7))
    return weight, 2


def _to_halves(weight, n_heads):
    pairs = weight.unflatten(0, (n_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def _to_neighbours(weight, n_heads):
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _neighbours_by_loop(weight, n_heads):
    D, rows = len(weight) // n_heads, []
    for h in range(n_heads):
        for i in range(D // 2):
            rows += [weight[h * D + i], weight[h * D + D // 2 + i]]
    return torch.stack(rows)


def _neighbours_by_index(weight, n_heads):
    D = len(weight) // n_heads
    order = torch.stack((torch.arange(D // 2), torch.arange(D // 2, D)), 1).flatten()
    return weight[(torch.arange(n_heads)[:, None] * D + order).flatten()]


def _neighbours_by_slices(weight, n_heads):
    new = torch.empty_like(weight).unflatten(0, (n_heads, -1))
    old = weight.unflatten(0, (n_heads, -1))
    half = old.shape[1] // 2
    new[:, 0::2], new[:, 1::2] = old[:, :half], old[:, half:]
    return new.flatten(0, 1)


TO_NEIGHBOURS = Exercise(
    name="to_neighbours", chapter=3, kind="function", entry="to_neighbours",
    title="Weights from the other library", difficulty="hard", importance="useful", minutes=15,
    reference=_to_neighbours,
    fixtures=(three_heads_with_numbered_rows, two_heads_of_ten),
    equivalents={
        "loop": _neighbours_by_loop,
        "index": _neighbours_by_index,
        "slices": _neighbours_by_slices,
        "rearranged": lambda weight, n_heads: torch.stack(weight.unflatten(
            0, (n_heads, 2, -1)).unbind(1), 2).reshape(weight.shape),
    },
    misconceptions=(
        Misconception("the same way again", _to_halves,
            "That is the way from neighbours to halves, once more. You need the way back: row "
            "1 of the result was row D/2 of its head."),
        Misconception("all heads as one", lambda w, n_heads: _to_neighbours(w, 1),
            "The whole matrix was reordered as one large head, so rows moved from head to "
            "head. Each head is reordered by itself."),
        Misconception("second halves first", lambda w, n_heads: w.unflatten(
                0, (n_heads, 2, -1)).flip(1).transpose(1, 2).reshape(w.shape),
            "The two numbers of each pair are exchanged. The row from the first half comes "
            "first."),
        Misconception("shape changed without swapping", lambda w, n_heads: w.unflatten(
                0, (n_heads, -1, 2)).reshape(w.shape),
            "Nothing moved: cutting and joining alone changes no order. Two axes must be "
            "swapped in between."),
        Misconception("heads and halves exchanged", lambda w, n_heads: w.unflatten(
                0, (n_heads, 2, -1)).transpose(0, 1).reshape(w.shape),
            "Whole halves moved from head to head: the wrong two axes were swapped. Heads stay "
            "in front; swap the half with the pair."),
        Misconception("halves exchanged", lambda w, n_heads: w.unflatten(
                0, (n_heads, 2, -1)).flip(1).reshape(w.shape),
            "The two halves of each head changed places as blocks. They must be shuffled "
            "into each other, one row from each in turn."),
        Misconception("heads last", lambda w, n_heads: torch.stack(
                w.unflatten(0, (-1, n_heads)).chunk(2, 1), 2).flatten(0, 2),
            "The axis of the heads came second. The rows lie head after head, so it must be the "
            "first one, and its halves are cut along the next."),
        Misconception("heads left apart", lambda w, n_heads: torch.stack(
                w.unflatten(0, (n_heads, -1)).chunk(2, 1), 2).flatten(1, 2),
            "The rows still have an axis for the heads. Join heads and rows at the end, so that "
            "the result has the shape of the weight."),
        Misconception("size of a head from the columns", lambda w, n_heads: w.view(
                n_heads, 2, w.shape[1] // n_heads // 2, -1).transpose(1, 2).reshape(w.shape),
            "The size of a head was computed from the columns; they have the width of a token. "
            "The rows hold the heads: divide their number."),
        Misconception("columns cut into heads", lambda w, n_heads: torch.stack(
                w.unflatten(-1, (n_heads, -1)).chunk(2, -1), -1).flatten(-3),
            "The columns were cut into heads. They belong to the tokens that come in; the "
            "numbers of the heads are the rows."),
    ),
    hints=(
        Hint("I do not know where to start",
             "D = 8. In the halves layout pair 0 is rows 0 and 4. At which rows must they lie "
             "in ours?"),
        Hint("The order of my rows is wrong",
             "For D = 8 the result takes the old rows 0, 4, 1, 5, 2, 6, 3, 7, in each head "
             "anew."),
        Hint("I cannot write it without a loop",
             "unflatten the rows into (n_heads, 2, D/2): head, half, pair. Swap the last two "
             "of these axes. Then reshape back."),
    ),
    praise="This is how a file from the other library becomes one of ours.",
)


# ---------------------------------------------------------------- exercise: loss_without_turning


def _small_model(seed: int) -> Transformer:
    config = ModelConfig(dim=20, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10,
                         hidden_dim=28, vocab_size=40, rope_theta=50.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data.mul_(14)  # far from the small start of training
    return model.requires_grad_(False)


def two_pairs_stand_still():
    ids = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(11))
    return _small_model(12), ids, [0, 2]


def one_pair_stands_still():
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(13))
    return _small_model(14), ids, [1]


@torch.no_grad()
def _mean_loss(model, rows, reduction="mean"):
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction).item()


def _standing(still, measure=_mean_loss):
    def loss_without_turning(model, rows, pairs):
        def angles(positions, head_dim, theta):
            cos, sin = (t.clone() for t in rotary_angles(positions, head_dim, theta))
            return still(cos, sin, list(pairs))

        with swap("rope.rotary_angles", angles, check_signature=False):
            return measure(model, rows)
    return loss_without_turning


def _still(cos, sin, pairs):
    cos[..., pairs], sin[..., pairs] = 1.0, 0.0
    return cos, sin


def _both_zero(cos, sin, pairs):
    cos[..., pairs], sin[..., pairs] = 0.0, 0.0
    return cos, sin


def _sine_zero(cos, sin, pairs):
    sin[..., pairs] = 0.0
    return cos, sin


def _quarter(cos, sin, pairs):
    cos[..., pairs], sin[..., pairs] = 0.0, 1.0
    return cos, sin


def _both_one(cos, sin, pairs):
    cos[..., pairs], sin[..., pairs] = 1.0, 1.0
    return cos, sin


def _cosine_one(cos, sin, pairs):
    cos[..., pairs] = 1.0
    return cos, sin


def _other_names(model, rows, pairs):
    def angles(p, D, base):
        return _still(*rotary_angles(p, D, base), list(pairs))

    with swap("rope.rotary_angles", angles):
        return _mean_loss(model, rows)


def _left_out(cos, sin, pairs):
    kept = [i for i in range(cos.shape[-1]) if i not in pairs]
    return cos[..., kept], sin[..., kept]


def _rotate_by_pair_number(model, rows, pairs):
    def turned(x, cos, sin):
        out = rotate(x, cos, sin)
        out[..., list(pairs)] = x[..., list(pairs)]
        return out

    with swap("rope.rotate", turned):
        return _mean_loss(model, rows)


def _places(cos, sin, pairs):
    cos[..., pairs, :], sin[..., pairs, :] = 1.0, 0.0
    return cos, sin


def _by_rotate(model, rows, pairs):
    def turned(x, cos, sin):
        out = rotate(x, cos, sin)
        for i in pairs:
            out[..., 2 * i:2 * i + 2] = x[..., 2 * i:2 * i + 2]
        return out

    with swap("rope.rotate", turned):
        return _mean_loss(model, rows)


def _by_where(model, rows, pairs):
    def angles(positions, head_dim, theta):
        turning = torch.ones(head_dim // 2)
        turning[list(pairs)] = 0.0
        made = positions[..., None] * theta ** (-torch.arange(0, head_dim, 2) / head_dim) * turning
        return made.cos(), made.sin()

    with swap("rope.rotary_angles", angles):
        return _mean_loss(model, rows)


LOSS_WITHOUT = Exercise(
    name="loss_without_turning", chapter=3, kind="open", entry="loss_without_turning",
    title="Which speeds does the model use?", difficulty="hard", importance="useful",
    minutes=20,
    reference=_standing(_still),
    fixtures=(two_pairs_stand_still, one_pair_stands_still),
    seconds=30.0,  # the first swap of a session loads the whole library
    tolerance=1e-4,
    equivalents={
        "rotate replaced": _by_rotate,
        "speeds of zero": _by_where,
        "the same quarter turn everywhere": _standing(_quarter),
        "a tensor as result": lambda model, rows, pairs: torch.tensor(
            _standing(_still)(model, rows, pairs)),
    },
    misconceptions=(
        Misconception("both zero", _standing(_both_zero),
            "The pairs were not stopped but wiped out: an arrow times 0 is no arrow. A turn by "
            "angle 0 has cosine 1."),
        Misconception("sine zero only", _standing(_sine_zero),
            "The sines are 0, but the cosines still change with the place, so the arrows "
            "change their length. What is the cosine of angle 0?"),
        Misconception("both one", _standing(_both_one),
            "Cosine and sine are both 1, which is no turn at all: arrows become longer. The "
            "sine of angle 0 is 0."),
        Misconception("places instead of pairs", _standing(_places),
            "You stopped all pairs at some places, not some pairs at all places. Pairs are the "
            "last axis of the cosines."),
        Misconception("nothing stopped", lambda model, rows, pairs: _mean_loss(model, rows),
            "This is the loss of the unchanged model. Do the functions of the library really "
            "use your angles?"),
        Misconception("angles not returned", _standing(lambda cos, sin, pairs: None),
            "Your function for the angles changes them and returns nothing. The model needs "
            "both, cosines and sines."),
        Misconception("cosine one only", _standing(_cosine_one),
            "The cosines are 1, but the sines still change with the place. An arrow that "
            "stands still has sine 0."),
        Misconception("all stopped", _standing(lambda cos, sin, pairs: (
                torch.ones_like(cos), torch.zeros_like(sin))),
            "No pair turns any more. Only those in the list stand still; the others turn as "
            "before."),
        Misconception("pairs taken for numbers", _standing(lambda cos, sin, pairs: _still(
                cos, sin, [2 * i for i in pairs])),
            "The pair numbers were doubled. That would be right for the numbers of a head; "
            "cosines and sines have one entry for each pair already."),
        Misconception("numbers kept instead of pairs", _rotate_by_pair_number,
            "You kept single numbers of a head as they came. Pair i consists of the numbers 2i "
            "and 2i + 1, and both must stand still."),
        Misconception("pairs left out", _standing(_left_out),
            "There are fewer cosines than pairs: you took some out. They must stay, with the "
            "cosine and the sine of angle 0."),
        Misconception("other names for the arguments", _other_names,
            "The model hands over the angles' arguments by name, so yours needs the same "
            "three names as the library's: positions, head size, theta."),
    ),
    hints=(
        Hint("I do not know where to start",
             "A pair that stands still has angle 0 at every place. What are the cosine and the "
             "sine of 0?"),
        Hint("The loss does not change",
             "The model calls rotary_angles for itself. Inside a with swap block it calls "
             "yours instead; measure inside the block."),
        Hint("I cannot put it together",
             "Inside: def angles(positions, head_dim, theta). Call the library's, clone both "
             "results, set cos[..., pairs] to 1 and sin[..., pairs] to 0, return them."),
    ),
    praise="Another experiment by taking something away, as with the heads of chapter 2.",
)


EXERCISES = [ANGLES, ROTATE, TOKENS_PER_TURN, ORDER, TURN_COMPLEX, MOVE_KEYS, TURN_PAIRS,
             TO_NEIGHBOURS, LOSS_WITHOUT]
