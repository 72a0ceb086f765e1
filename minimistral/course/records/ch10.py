"""Chapter 10, the real Mistral: its three core pieces and its exercises."""

from __future__ import annotations

import json
import struct

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from minimistral.checkpoint import permute_rotary, unpermute_rotary
from minimistral.config import (
    MODELS,
    ModelConfig,
    MoEConfig,
    ParameterCount,
    cache_bytes_per_token,
    count_parameters,
    weight_bytes,
)

from ..exercises import Exercise, Hint, Misconception

# ---------------------------------------------------------------- piece: count_parameters


def _config(**changes) -> ModelConfig:
    """No two sizes alike, heads that do not fill the width, and no part of the model that has as
    many parameters as another; a table has a whole number of times 3 * dim * n_layers."""
    return ModelConfig(**{**dict(dim=48, n_layers=5, n_heads=12, n_kv_heads=3, head_dim=6,
                                 hidden_dim=50, vocab_size=105), **changes})


def a_dense_model():
    return (_config(),)


def five_experts_two_at_work():
    return (_config(moe=MoEConfig(5, 2)),)


def seven_experts_and_one_table():
    return (_config(moe=MoEConfig(7, 3), tied_embeddings=True, dim=36),)


def a_dense_model_with_one_table():
    return (_config(tied_embeddings=True, n_layers=3),)


def mixtral_8x22b():
    return (MODELS["mixtral-8x22b-v0.1"],)


def _counted(pair=ParameterCount, **steps):
    """count_parameters with some of its steps exchanged.

    Each step is a function of the configuration c: queries, keys, attention, expert, norms, stored,
    used, router, outside, working (the part outside that is at work), layers, resting (the router
    that is at work).
    """
    def count(c):
        known = {
            "queries": lambda c: c.n_heads * c.head_dim,
            "keys": lambda c: c.n_kv_heads * c.head_dim,
            "attention": lambda c: 2 * c.dim * step("queries") + 2 * c.dim * step("keys"),
            "expert": lambda c: 3 * c.dim * c.hidden_dim,
            "norms": lambda c: 2 * c.dim,
            "stored": lambda c: c.moe.num_experts if c.moe else 1,
            "used": lambda c: c.moe.num_experts_per_tok if c.moe else 1,
            "router": lambda c: c.dim * c.moe.num_experts if c.moe else 0,
            "routing": lambda c: step("router"),
            "outside": lambda c: (2 - c.tied_embeddings) * c.vocab_size * c.dim + c.dim,
            "working": lambda c: step("outside"),
            "layers": lambda c: c.n_layers,
        }

        def step(name):
            return (steps.get(name) or known[name])(c)

        alike = step("attention") + step("norms")
        total = step("layers") * (alike + step("router") + step("stored") * step("expert"))
        active = step("layers") * (alike + step("routing") + step("used") * step("expert"))
        return pair(total + step("outside"), active + step("working"))
    return count


def _without_brackets(c):
    outside = (2 - c.tied_embeddings) * c.vocab_size * c.dim + c.dim
    stored, used = (c.moe.num_experts, c.moe.num_experts_per_tok) if c.moe else (1, 1)
    router = c.dim * stored if c.moe else 0
    attention = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
    return ParameterCount(*(c.n_layers * attention + router + 2 * c.dim
                            + n * 3 * c.dim * c.hidden_dim + outside for n in (stored, used)))


def _whole_model_times_experts(c):
    one = count_parameters(_without_mixture(c))
    stored, used = (c.moe.num_experts, c.moe.num_experts_per_tok) if c.moe else (1, 1)
    return ParameterCount(stored * one.total, used * one.total)


def _without_mixture(c):
    params = {name: getattr(c, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads",
                                                  "head_dim", "hidden_dim", "vocab_size",
                                                  "tied_embeddings")}
    return ModelConfig(**params)


def _layer_times_experts(c):
    outside = (2 - c.tied_embeddings) * c.vocab_size * c.dim + c.dim
    one = count_parameters(_without_mixture(c)).total - outside
    stored, used = (c.moe.num_experts, c.moe.num_experts_per_tok) if c.moe else (1, 1)
    router = c.n_layers * c.dim * stored if c.moe else 0
    return ParameterCount(stored * one + router + outside, used * one + router + outside)


def _by_numel(c):
    from ..chapters.ch10_the_real_mistral import on_meta

    total = sum(weight.numel() for weight in on_meta(c).parameters())
    moe = c.moe or MoEConfig(1, 1)
    resting = moe.num_experts - moe.num_experts_per_tok
    return ParameterCount(total, total - c.n_layers * resting * 3 * c.dim * c.hidden_dim)


def _by_loop(c):
    total = active = c.dim + c.vocab_size * c.dim
    if not c.tied_embeddings:
        total, active = total + c.vocab_size * c.dim, active + c.vocab_size * c.dim
    for _ in range(c.n_layers):
        same = 2 * c.dim + 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
        if c.moe is None:
            total, active = (x + same + 3 * c.dim * c.hidden_dim for x in (total, active))
            continue
        same += c.dim * c.moe.num_experts
        total += same + c.moe.num_experts * 3 * c.dim * c.hidden_dim
        active += same + c.moe.num_experts_per_tok * 3 * c.dim * c.hidden_dim
    return ParameterCount(total, active)


def _read_by_name(work, config):
    count = work(config)
    if type(count) is list:
        count = tuple(count)
    return {"total": count.total, "active": count.active}


def _tables(number, last=1):
    return lambda c: number(c) * c.vocab_size * c.dim + last * c.dim


COUNT_PARAMETERS = Exercise(
    name="count_parameters", chapter=10, kind="piece", piece="config.count_parameters",
    entry="count_parameters", title="Count a model", difficulty="medium",
    importance="essential", minutes=8,
    reference=count_parameters, run=_read_by_name,
    fixtures=(a_dense_model, five_experts_two_at_work, a_dense_model_with_one_table,
              seven_experts_and_one_table, mixtral_8x22b),
    equivalents={
        "built on meta and counted": _by_numel,
        "a loop over the layers": _by_loop,
        "step by step": _counted(),
        "resting experts taken off": lambda c: ParameterCount(
            count_parameters(c).total, count_parameters(c).total - (
                0 if c.moe is None else c.n_layers * 3 * c.dim * c.hidden_dim
                * (c.moe.num_experts - c.moe.num_experts_per_tok))),
    },
    misconceptions=(
        Misconception("the name multiplied out", _whole_model_times_experts,
            "You multiplied the whole model by its experts, as the headline does. Tables, "
            "attention and norms are there once."),
        Misconception("each expert a whole layer", _layer_times_experts,
            "You multiplied whole layers. An expert is a feed-forward; attention and norms of "
            "a layer are there once.",
            also=[lambda c: ParameterCount(_layer_times_experts(c).total, count_parameters(c).active)]),
        Misconception("router forgotten", _counted(router=lambda c: 0),
            "A dense model is right; a mixture lacks something. Each layer also has a router, one "
            "matrix from the stream to the experts."),
        Misconception("one router in all", _counted(router=lambda c: 0, outside=lambda c: (
                (2 - c.tied_embeddings) * c.vocab_size * c.dim + c.dim
                + (c.dim * c.moe.num_experts if c.moe else 0))),
            "The router was counted once for the whole model. Every layer chooses anew, with a "
            "router of its own."),
        Misconception("a router without a mixture", _counted(
                router=lambda c: c.dim * (c.moe.num_experts if c.moe else 1)),
            "A mixture is right, a dense model too large: it has one feed-forward, so nothing "
            "to choose and no router."),
        Misconception("a router for each expert", lambda c: ParameterCount(*(
                n + (c.n_layers * c.dim * c.moe.num_experts * (k - 1) if c.moe else 0)
                for n, k in zip(count_parameters(c), (
                    (c.moe.num_experts, c.moe.num_experts_per_tok) if c.moe else (1, 1))))),
            "Every expert got a router. A layer has one, for all its experts together."),
        Misconception("everything at work", _counted(
                used=lambda c: c.moe.num_experts if c.moe else 1),
            "Both numbers are equal for a mixture. A token uses only k of the E experts, so "
            "fewer are active."),
        Misconception("one expert at work", _counted(used=lambda c: 1),
            "Active counts a single expert for each layer. A token uses k of them; the "
            "configuration says how many."),
        Misconception("router not at work", _counted(routing=lambda c: 0),
            "Total is right, active a little too small. The router works for every token, "
            "or nobody would choose."),
        Misconception("k rows of the router", _counted(
                routing=lambda c: c.dim * c.moe.num_experts_per_tok if c.moe else 0),
            "Active counts only k rows of the router. It scores all experts before k are "
            "chosen, so all its rows work."),
        Misconception("stored and used exchanged", lambda c: ParameterCount(
                *reversed(count_parameters(c))),
            "The two numbers have changed places: total is what is stored, active what works "
            "for one token."),
        Misconception("head size from the width", _counted(
                queries=lambda c: c.dim, keys=lambda c: c.n_kv_heads * (c.dim // c.n_heads)),
            "The size of a head was taken as the width over the number of heads. It is a "
            "field of its own, as Nemo shows."),
        Misconception("queries as wide as the stream", _counted(queries=lambda c: c.dim),
            "Queries and the way back were taken as wide as the stream. They have the number of "
            "query heads times the size of a head, which may be another width."),
        Misconception("keys of every query head", _counted(
                keys=lambda c: c.n_heads * c.head_dim),
            "Keys and values were counted for every query head. They belong to the key/value "
            "heads, which are fewer."),
        Misconception("no way back from attention", _counted(attention=lambda c:
                c.dim * c.head_dim * (c.n_heads + 2 * c.n_kv_heads)),
            "Attention has three matrices in your count. The fourth joins the looks and leads "
            "back to the stream; it is as large as that of the queries."),
        Misconception("keys and values as one", _counted(attention=lambda c:
                c.dim * c.head_dim * (2 * c.n_heads + c.n_kv_heads)),
            "Keys and values were counted as one matrix. Each has its own, of the same size."),
        Misconception("two matrices of attention", _counted(attention=lambda c:
                c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)),
            "Attention has two matrices in your count. There are four: queries, keys, values and "
            "the way back."),
        Misconception("heads without their size", _counted(
                queries=lambda c: c.n_heads, keys=lambda c: c.n_kv_heads),
            "Heads were counted as if each were one number. A head has a size, which is a field "
            "of its own."),
        Misconception("two matrices in a feed-forward", _counted(
                expert=lambda c: 2 * c.dim * c.hidden_dim),
            "The feed-forward has two matrices in your count. It has three: gate, value and "
            "way back."),
        Misconception("one norm in a layer", _counted(norms=lambda c: c.dim),
            "The count is short by one width for each layer. A layer has two norms: one before "
            "attention, one before the feed-forward."),
        Misconception("no norms in a layer", _counted(norms=lambda c: 0),
            "The count is short by two widths for each layer: the norms before attention and "
            "before the feed-forward."),
        Misconception("last norm forgotten", _counted(
                outside=_tables(lambda c: 2 - c.tied_embeddings, last=0)),
            "The count is short by exactly one width. After the last layer stands one more "
            "norm."),
        Misconception("one table for all", _counted(outside=_tables(lambda c: 1)),
            "Models with tied embeddings are right, the others lack a table. Embeddings and "
            "output are two tables unless they are tied."),
        Misconception("two tables for all", _counted(outside=_tables(lambda c: 2)),
            "Models whose embeddings are tied are too large: they have a single table, used "
            "at both ends."),
        Misconception("tied the wrong way round", _counted(outside=_tables(
                lambda c: 1 + c.tied_embeddings)),
            "The two kinds of models have changed places: with tied embeddings there is one table, "
            "without there are two."),
        Misconception("one table at work", _counted(
                working=_tables(lambda c: 1)),
            "Total is right. Active lacks a table, or both; by the task they count in full, "
            "although only one row of the first is read.",
            also=[_counted(working=lambda c: 0), _counted(working=lambda c: c.dim)]),
        Misconception("one layer", _counted(layers=lambda c: 1),
            "That is a model of one layer. Every layer has weights of its own."),
        Misconception("attention in each layer, the rest once", _without_brackets,
            "Only attention was multiplied by the number of layers. Put all that a layer has into "
            "brackets."),
        Misconception("tables in each layer", _counted(
                outside=lambda c: c.n_layers * _tables(lambda c: 2 - c.tied_embeddings)(c)),
            "Tables and last norm were counted in every layer. They stand outside, once."),
        Misconception("a plain pair", _counted(pair=lambda total, active: (total, active)),
            "The numbers may be right, but they are a plain pair. Return them as a "
            "ParameterCount: the library reads them by name."),
        Misconception("the square of the width", lambda c: ParameterCount(*(
                n + c.n_layers * (4 * c.dim ** 2 - 2 * c.dim * c.head_dim
                                  * (c.n_heads + c.n_kv_heads))
                for n in count_parameters(c))),
            "Attention was counted as four squares of the width. Query heads may be wider than "
            "the stream together, and key/value heads are fewer."),
        Misconception("one number", lambda c: count_parameters(c).total,
            "You return one number. Two are asked for, stored and at work, together as a "
            "ParameterCount."),
        Misconception("a mixture everywhere", _counted(
                stored=lambda c: c.moe.num_experts, used=lambda c: c.moe.num_experts_per_tok),
            "A dense model has no mixture: its field is None and has no number of experts. "
            "Ask first whether there is one."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Which parts does a layer of a mixture have once, and which several times? Which "
             "parts stand outside of all layers?"),
        Hint("The dense model is wrong",
             "A layer: wq and wo of dim * H * D, wk and wv of dim * K * D, three matrices of dim "
             "* hidden, two norms of dim. Outside: two tables of V * dim and one norm."),
        Hint("The mixture is wrong",
             "Set stored = used = 1 and router = 0; if config.moe, take E, k and dim * E. A "
             "layer is then attention + router + norms + stored * expert, and for active the "
             "same with used."),
    ),
    praise="Stored and at work: two numbers that one name hides.",
)


# ---------------------------------------------------------------- pieces: permute, unpermute


def _rows(heads, head_dim, dim, seed, dtype=torch.float32):
    """Random rows without zero mean, each of its own size."""
    chance = torch.Generator().manual_seed(seed)
    size = 0.5 + torch.rand(heads * head_dim, 1, generator=chance)
    return (size * torch.randn(heads * head_dim, dim, generator=chance) + 0.3).to(dtype), heads


def three_heads_of_ten():
    return _rows(3, 10, 4, 1)


def five_heads_of_six():
    return _rows(5, 6, 7, 2)


def two_heads_of_eight_in_16_bits():
    return _rows(2, 8, 3, 3, torch.bfloat16)


def one_head_of_fourteen():
    return _rows(1, 14, 4, 4)


ROTARY_FIXTURES = (three_heads_of_ten, five_heads_of_six, two_heads_of_eight_in_16_bits,
                   one_head_of_fourteen)


def _by_index(order, inverse=False):
    """Move rows by an index: order(D) gives the rows of one head, new place by new place."""
    def move(weight, n_heads):
        D = weight.shape[0] // n_heads
        one = torch.tensor(order(D))
        rows = torch.cat([h * D + one for h in range(n_heads)])
        return weight[rows.argsort() if inverse else rows]
    return move


def _evens_first(D):
    return [*range(0, D, 2), *range(1, D, 2)]


def _in_place(weight, n_heads, move=permute_rotary):
    weight.copy_(move(weight, n_heads))
    return weight


def _halves_exchanged(weight, n_heads):
    heads = weight.unflatten(0, (n_heads, -1))
    return heads.roll(heads.shape[1] // 2, dims=1).flatten(0, 1)


def _flat(move):
    """The whole matrix treated as one head."""
    return lambda weight, n_heads: move(weight, 1)


def _by_pairs(back, out, whole=False):
    """Row by row: out(weight) is where they are put; whole: every head, else the first alone."""
    def move(weight, n_heads):
        D, target = weight.shape[0] // n_heads, out(weight)
        for start in range(0, n_heads * D if whole else D, D):
            for i in range(D // 2):
                pair, halves = (start + 2 * i, start + 2 * i + 1), (start + i, start + D // 2 + i)
                for there, here in zip(*((pair, halves) if back else (halves, pair))):
                    target[there] = weight[here]
        return target
    return move


def _in_place_by_slices(back):
    """Slices of the weight put into slices of the same tensor, which overlap."""
    def move(weight, n_heads):
        half = len(weight) // n_heads // 2
        for head in weight.view(n_heads, 2 * half, -1):
            pair, halves = (head[::2], head[1::2]), (head[:half], head[half:])
            for there, here in zip(*((pair, halves) if back else (halves, pair))):
                there.copy_(here)
        return weight
    return move


def _rotary_misconceptions(way, other, order, back):
    """The mistakes of both directions; `back` tells whether this is the inverse."""
    return (
        Misconception("the other direction", other,
            "Rows of an even-first order would come out right; these do not. That is the "
            "other direction: from Hugging Face's order to Mistral's."
            if not back else
            "That moves the rows the same way again, even ones first. Here the rows of the two "
            "halves must be laid alternately."),
        Misconception("nothing moved", lambda weight, n_heads: weight,
            "The rows are as they were. Each head's rows have to change their order, without a "
            "number being changed."),
        Misconception("heads not separated", _flat(way),
            "Rows have moved from one head to another: the matrix was treated as a single "
            "head. Reorder inside each head."),
        Misconception("number of heads for their size", lambda weight, n_heads: _by_index(
                order, back)(weight, weight.shape[0] // n_heads),
            "The heads were cut at the wrong places: their number was taken for their size. "
            "The first cut makes n_heads parts."),
        Misconception("columns moved", lambda weight, n_heads: _by_index(order, back)(
                weight.T, 1).T,
            "The columns were moved. They belong to the stream, which nobody turns; the rows are "
            "what makes queries and keys."),
        Misconception("second numbers first", _by_index(
                lambda D: [*range(1, D, 2), *range(0, D, 2)], inverse=back),
            "The second numbers of the pairs come first. Even rows belong to the first half, "
            "odd ones to the second; heads count from 0."),
        Misconception("halves exchanged", _halves_exchanged,
            "The two halves of each head have changed places, each still in its old order. "
            "The pairs must be taken apart, or put together."),
        Misconception("an axis too many", lambda weight, n_heads: way(weight, n_heads).unflatten(
                0, (n_heads, -1)),
            "The order is right, but the heads still have an axis of their own. The result has "
            "the shape of the weight."),
        Misconception("swapped, not joined", lambda weight, n_heads: weight.unflatten(
                0, (n_heads, 2, -1) if back else (n_heads, -1, 2)).transpose(1, 2),
            "The axes are swapped rightly, and there are still too many of them. Join all but the "
            "last to the rows again."),
        Misconception("rows swapped with columns", lambda weight, n_heads: weight.unflatten(
                0, (n_heads, 2, -1) if back else (n_heads, -1, 2)).transpose(2, 3).reshape(
                weight.shape),
            "The last axis was swapped, so rows are torn apart. Only the two axes inside a head "
            "change places; the numbers of a row stay together."),
        Misconception("first head only", _by_pairs(back, Tensor.clone),
            "Only the first head is reordered. The others have the same order, each from its own "
            "first row on."),
        Misconception("overwritten while read", _by_pairs(back, lambda weight: weight, whole=True),
            "Rows were overwritten before they were read: input and result are one tensor. Write "
            "into a new one.",
            also=[_in_place_by_slices(back)]),
        Misconception("heads swapped with pairs", lambda weight, n_heads: weight.unflatten(
                0, (n_heads, 2, -1) if back else (n_heads, -1, 2)).transpose(0, 1).reshape(
                weight.shape),
            "The axis of the heads was swapped, so rows wander between heads. Only the two axes "
            "inside a head change places.",
            also=[lambda weight, n_heads: weight.unflatten(
                      0, (n_heads, 2, -1) if back else (n_heads, -1, 2)).transpose(0, 2).reshape(
                      weight.shape)]),
        Misconception("the first head everywhere", lambda weight, n_heads: way(
                weight[:len(weight) // n_heads], 1).repeat(n_heads, 1),
            "Every head has the rows of the first one. Head h begins at row h times D."),
        Misconception("heads cut last", lambda weight, n_heads: weight.unflatten(
                0, (2, n_heads, -1) if back else (-1, n_heads, 2)).transpose(
                0 if back else 1, 2).reshape(weight.shape),
            "The first cut was not that of the heads, so rows of different heads were mixed. The "
            "heads come first: each is a block of neighbouring rows.",
            also=[lambda weight, n_heads: weight.unflatten(
                      0, (2, n_heads, -1) if back else (-1, 2, n_heads)).transpose(0, 1).reshape(
                      weight.shape)]),
        Misconception("half of the rows", lambda weight, n_heads: weight.unflatten(
                0, (n_heads, -1))[:, ::2].flatten(0, 1),
            "Only every other row is left. The other half of each head belongs behind the first, "
            "or between its rows."),
        Misconception("viewed, not copied", lambda weight, n_heads: weight.unflatten(
                0, (n_heads, 2, -1) if back else (n_heads, -1, 2)).transpose(1, 2).view(
                weight.shape),
            "The axes are swapped rightly. But swapped rows do not lie in a row in memory, so "
            "they cannot be viewed as one axis; join them by copying."),
        Misconception("another dtype", lambda weight, n_heads: way(weight.float(), n_heads),
            "Order and numbers are right, but the dtype has changed. Moving rows needs no "
            "arithmetic: leave the dtype alone."),
        Misconception("written into the input", lambda weight, n_heads: _in_place(
                weight, n_heads, way),
            "The rows are right, and the weight that was handed in is overwritten. Return a new "
            "tensor: the caller may need the old one."),
    )


PERMUTE_ROTARY = Exercise(
    name="permute_rotary", chapter=10, kind="piece", piece="checkpoint.permute_rotary",
    entry="permute_rotary", title="From Mistral's order to Hugging Face's", difficulty="medium",
    importance="essential", minutes=6,
    reference=permute_rotary, fixtures=ROTARY_FIXTURES,
    equivalents={
        "an index": _by_index(_evens_first),
        "even rows, then odd ones": lambda weight, n_heads: torch.cat(
            [weight.unflatten(0, (n_heads, -1))[:, 0::2],
             weight.unflatten(0, (n_heads, -1))[:, 1::2]], dim=1).flatten(0, 1),
        "a loop over the heads": lambda weight, n_heads: torch.cat(
            [torch.cat([head[::2], head[1::2]]) for head in weight.chunk(n_heads)]),
        "view and permute": lambda weight, n_heads: weight.view(
            n_heads, -1, 2, weight.shape[1]).permute(0, 2, 1, 3).reshape(weight.shape),
        "row by row": lambda weight, n_heads: torch.stack(
            [weight[h * (len(weight) // n_heads) + i] for h in range(n_heads)
             for i in _evens_first(len(weight) // n_heads)]),
    },
    misconceptions=_rotary_misconceptions(permute_rotary, unpermute_rotary, _evens_first, False),
    hints=(
        Hint("I do not know where to start",
             "Take one head with D = 8 and number its rows. Which rows form pair 0 in Mistral's "
             "order, and where must the two stand afterwards?"),
        Hint("It works for one head only",
             "Cut the rows into heads first: n_heads parts of D rows. With 3 heads of 6 the new "
             "order begins 0, 2, 4, 1, 3, 5, then 6, 8, 10, 7, 9, 11."),
        Hint("I cannot find the operation",
             "unflatten the first axis into (n_heads, -1, 2): heads, pairs, first or second. Swap "
             "the two inner ones, then reshape to the shape of the weight."),
    ),
    praise="The rows that are turned stand where the other library looks for them.",
)

UNPERMUTE_ROTARY = Exercise(
    name="unpermute_rotary", chapter=10, kind="piece", piece="checkpoint.unpermute_rotary",
    entry="unpermute_rotary", title="And back to Mistral's order", difficulty="medium",
    importance="essential", minutes=5,
    reference=unpermute_rotary, fixtures=ROTARY_FIXTURES,
    equivalents={
        "an index, inverted": _by_index(_evens_first, inverse=True),
        "the halves stacked": lambda weight, n_heads: torch.stack(
            weight.unflatten(0, (n_heads, -1)).chunk(2, dim=1), dim=2).flatten(0, 2),
        "a loop over the heads": lambda weight, n_heads: torch.cat(
            [torch.stack(head.chunk(2), dim=1).flatten(0, 1) for head in weight.chunk(n_heads)]),
        "view and permute": lambda weight, n_heads: weight.view(
            n_heads, 2, -1, weight.shape[1]).permute(0, 2, 1, 3).reshape(weight.shape),
        "rows put into their places": lambda weight, n_heads: _filled(weight, n_heads),
    },
    misconceptions=_rotary_misconceptions(unpermute_rotary, permute_rotary, _evens_first, True),
    hints=(
        Hint("I do not know where to start",
             "With D = 8 the rows arrive as 0, 2, 4, 6, 1, 3, 5, 7. Which two of them stand side by "
             "side in Mistral's order, and where do you find them here?"),
        Hint("It does not undo the first function",
             "With 3 heads of 6, the rows of the first head go back as: first, fourth, second, "
             "fifth, third, sixth. One from each half in turn."),
        Hint("I cannot find the operation",
             "unflatten the first axis into (n_heads, 2, -1): heads, halves, pairs. Swap the two "
             "inner ones, then reshape. Only the cut differs from the way there."),
    ),
    praise="There and back: a downloaded folder becomes Mistral's own order.",
)


def _filled(weight, n_heads):
    out, D = torch.empty_like(weight), weight.shape[0] // n_heads
    for h in range(n_heads):
        head = weight[h * D:(h + 1) * D]
        out[h * D:(h + 1) * D:2], out[h * D + 1:(h + 1) * D:2] = head[:D // 2], head[D // 2:]
    return out


# ---------------------------------------------------------------- exercise: memory_needed


def mixtral_at_four_and_a_half_bits():
    return MODELS["mixtral-8x7b-v0.1"], 8192, 4.5


def nemo_at_sixteen_bits():
    return MODELS["mistral-nemo-12b"], 1000, 16


def a_small_mixture_at_three_bits():
    return _config(moe=MoEConfig(5, 2)), 17, 3


def seven_b_with_a_text_longer_than_its_window():
    return MODELS["mistral-7b-v0.1"], 10_000, 8


def _needed(weights=None, cache=None):
    def need(config, tokens, bits):
        w = weights(config, bits) if weights else count_parameters(config).total * bits / 8
        kept = cache(config, tokens, bits) if cache else tokens * cache_bytes_per_token(config)
        return w + kept
    return need


MEMORY_NEEDED = Exercise(
    name="memory_needed", chapter=10, kind="complete", entry="memory_needed",
    title="Will it fit?", difficulty="easy", importance="essential", minutes=5,
    reference=_needed(),
    fixtures=(mixtral_at_four_and_a_half_bits, nemo_at_sixteen_bits,
              a_small_mixture_at_three_bits, seven_b_with_a_text_longer_than_its_window),
    tolerance=1e-9,
    equivalents={
        "from the bytes of 16 bits": _needed(
            weights=lambda c, bits: weight_bytes(c, torch.bfloat16) * bits / 16),
        "the cache spelt out": _needed(
            cache=lambda c, t, b: 2 * 2 * t * c.n_layers * c.n_kv_heads * c.head_dim),
        "in bits first": lambda config, tokens, bits: (
            bits * count_parameters(config).total + 8 * tokens * cache_bytes_per_token(config)) / 8,
    },
    misconceptions=(
        Misconception("active only", _needed(
                weights=lambda c, bits: count_parameters(c).active * bits / 8),
            "You counted the experts at work. All of them must be in memory, because the next "
            "token may choose others."),
        Misconception("stored and active added", _needed(
                weights=lambda c, bits: sum(count_parameters(c)) * bits / 8),
            "Stored and active were added. What works is a part of what is stored: take the one "
            "that is stored."),
        Misconception("bits for bytes", _needed(
                weights=lambda c, bits: count_parameters(c).total * bits),
            "The weights are eight times too large: they were counted in bits. Eight bits are "
            "a byte."),
        Misconception("whole bytes", _needed(
                weights=lambda c, bits: count_parameters(c).total * (bits // 8)),
            "Bits were turned into whole bytes first, and less than eight of them became "
            "nothing. Divide at the end, with a fraction."),
        Misconception("whole bits", _needed(
                weights=lambda c, bits: count_parameters(c).total * int(bits) / 8),
            "The bits were made a whole number. A weight may have 4.5 bits on the average: keep "
            "the fraction.",
            also=[_needed(weights=lambda c, bits: count_parameters(c).total * -(-bits // 1) / 8)]),
        Misconception("two bytes whatever the bits", _needed(
                weights=lambda c, bits: weight_bytes(c)),
            "The weights take two bytes each in your count. The argument says how many bits a "
            "weight has."),
        Misconception("no cache", _needed(cache=lambda c, t, b: 0),
            "That is the weights alone. The text needs keys and values as well."),
        Misconception("no weights", _needed(weights=lambda c, bits: 0),
            "That is the cache alone. The weights come to it."),
        Misconception("cache twice", _needed(cache=lambda c, t, b: 2 * t * cache_bytes_per_token(c)),
            "The cache is twice too large. Bytes for a token are already those of keys and values, "
            "two for each number."),
        Misconception("cache in bits", _needed(cache=lambda c, t, b: 16 * t * cache_bytes_per_token(c)),
            "The cache was multiplied by its 16 bits. It is given in bytes for a token: only "
            "the number of tokens is missing."),
        Misconception("cache of each layer", _needed(
                cache=lambda c, t, b: c.n_layers * t * cache_bytes_per_token(c)),
            "The cache was multiplied by the layers. The bytes for a token are those of all "
            "layers together."),
        Misconception("one token", _needed(cache=lambda c, t, b: cache_bytes_per_token(c)),
            "The cache holds one token in your count. It holds all of the text."),
        Misconception("cache in few bits", _needed(
                cache=lambda c, t, b: t * cache_bytes_per_token(c) * b / 16),
            "The cache was given the bits of the weights. By the task it keeps 16 bits, "
            "whatever the weights have."),
        Misconception("both counts at once", lambda config, tokens, bits: (
                count_parameters(config) * bits / 8),
            "The count has two fields, and a pair cannot be multiplied by a fraction. Take the "
            "one that says what is stored."),
        Misconception("in GB", lambda config, tokens, bits: _needed()(config, tokens, bits) / 1e9,
            "That is in GB. Bytes are asked for; the example only says how much it is.",
            also=[lambda config, tokens, bits: _needed()(config, tokens, bits) / 2**30]),
        Misconception("all divided by eight", lambda config, tokens, bits: (
                count_parameters(config).total * bits + tokens * cache_bytes_per_token(config)) / 8,
            "The cache was divided by eight as well. It is in bytes already; only the weights "
            "were in bits."),
        Misconception("the cache ends at the window", _needed(cache=lambda c, t, b: (
                min(t, c.sliding_window or t) * cache_bytes_per_token(c))),
            "The cache stops at the window. A real one does, but by the task no window is "
            "counted."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Which of the two counts must be in memory: what is stored, or what is at work?"),
        Hint("It is too large or too small by a factor",
             "A weight of 4.5 bits takes 4.5 / 8 of a byte. The cache takes "
             "mm.cache_bytes_per_token(config) for each token, whatever the weights take."),
        Hint("I want to see the numbers",
             "Mixtral 8x7B: 46,702,792,704 weights * 4.5 / 8 bytes, and 8,192 tokens * 131,072 "
             "bytes. Add the two."),
    ),
    praise="Total for the weights, tokens for the cache: count before you download.",
)


# ---------------------------------------------------------------- exercise: load_in_order

LOAD_IN_ORDER = Exercise(
    name="load_in_order", chapter=10, kind="order", title="Load within the memory",
    difficulty="easy", importance="essential", minutes=6,
    lines=(
        "config, layout, stored = open_folder(folder)       # headers only",
        'with torch.device("meta"): model = Transformer(config)',
        "places = {n: locate(n, w.shape, config, layout) for n, w in model.state_dict().items()}",
        "match({p.name: p.shape for p in places.values()}, stored, folder)",
        "weights = {n: read_weight(stored[p.name], p.convert) for n, p in places.items()}",
        "model.load_state_dict(weights, assign=True)",
        "return model.eval()",
    ),
    distractors=("model = Transformer(config)                        # random numbers",),
    misconceptions=(
        Misconception("both models", "with 1 and with 7",
            "Two lines build a model. One of them takes as much memory as the weights, for "
            "numbers that are thrown away: it stays out."),
        Misconception("a model of random numbers", "with 7",
            "The model is filled with random numbers that nobody needs: with 7B that is as much "
            "memory again as the weights. Which line takes none?"),
        Misconception("not compared at all", "without 3",
            "Names and shapes are never compared with the file. One line is missing, and it "
            "belongs before the reading."),
        Misconception("never assigned", "without 5",
            "The weights are read and never given to the model: it stays without numbers. One "
            "line is missing."),
        Misconception("compared after reading", "4 before 3",
            "All is read before names and shapes are compared. A wrong file would be noticed "
            "after minutes; the headers know it at once."),
        Misconception("assigned before reading", "5 before 4",
            "The model is given the weights before they are read. Which line makes that name?"),
        Misconception("meta model first", "1 before 0",
            "The model is built before its numbers are known. They stand in the configuration, "
            "which is opened first."),
        Misconception("places from the file alone", "2 before 1",
            "The places are looked up for names of a model that is not there yet. Even an empty "
            "model knows its names and shapes."),
        Misconception("compared before located", "3 before 2",
            "The comparison uses the places before they are known. Which line makes them?"),
        Misconception("handed back empty", "6 before 5",
            "The model is handed back before it has its weights. Nothing comes after a return."),
    ),
    hints=(
        Hint("I do not know which line is first",
             "Each line uses names. Which line needs nothing but the folder?"),
        Hint("Two lines look alike",
             "A tensor on the meta device has a shape and no numbers. With 7 billion parameters, "
             "what does each of the two lines take?"),
        Hint("The order is still refused",
             "Open; build without numbers; find each tensor's place; compare; read one by one; "
             "give them to the model; hand it back."),
    ),
    praise="Nothing is read before it is known to fit.",
)


# ---------------------------------------------------------------- exercise: hidden_from_total


def _sizes(config, total=None):
    return (total or count_parameters(config).total, config.dim, config.n_layers, config.n_heads,
            config.n_kv_heads, config.head_dim, config.vocab_size)


def mistral_7b():
    return _sizes(MODELS["mistral-7b-v0.1"])


def nemo_whose_heads_do_not_fill_the_width():
    return _sizes(MODELS["mistral-nemo-12b"])


def a_small_model():
    return _sizes(_config())


def a_round_number_of_parameters():
    return _sizes(MODELS["mistral-7b-v0.1"], 7_100_000_000)


def one_parameter_too_many():
    return _sizes(_config(), count_parameters(_config()).total + 1)


def _solved(outside=None, attention=None, norms=2, matrices=3, whole=True, layers=None):
    def hidden(total, dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size):
        around = outside(vocab_size, dim) if outside else 2 * vocab_size * dim + dim
        look = 2 * dim * head_dim * (n_heads + n_kv_heads)
        if attention:
            look = attention(dim, n_heads, n_kv_heads, head_dim)
        left = total - around - n_layers * (look + norms * dim)
        one = matrices * dim * (layers(n_layers) if layers else n_layers)
        if whole is True:
            return left // one if left % one == 0 else 0
        return whole(left / one)
    return hidden


def _layer_by_layer(total, dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size):
    left = (total - 2 * vocab_size * dim - dim) // n_layers
    left -= 2 * dim * head_dim * (n_heads + n_kv_heads) + 2 * dim
    return left // (3 * dim) if left % (3 * dim) == 0 else 0


def _searched(total, dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size):
    for hidden in range(1, 20000):
        c = ModelConfig(dim, n_layers, n_heads, n_kv_heads, head_dim, hidden, vocab_size)
        if count_parameters(c).total == total:
            return hidden
    return 0


def _counted_again(total, dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size):
    """The nearest width, kept if the count of the whole model is right."""
    hidden = _solved(whole=round)(total, dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size)
    c = ModelConfig(dim, n_layers, n_heads, n_kv_heads, head_dim, hidden, vocab_size)
    return hidden if count_parameters(c).total == total else 0


def _two_counts(total, dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size):
    """A straight line through two of its points."""
    def count(hidden):
        c = ModelConfig(dim, n_layers, n_heads, n_kv_heads, head_dim, hidden, vocab_size)
        return count_parameters(c).total
    step = count(2) - count(1)
    found = 1 + (total - count(1)) / step
    return int(found) if found == int(found) else 0


HIDDEN_FROM_TOTAL = Exercise(
    name="hidden_from_total", chapter=10, kind="function", entry="hidden_from_total",
    title="The number that a table got wrong", difficulty="medium", importance="useful",
    minutes=10,
    reference=_solved(),
    fixtures=(mistral_7b, nemo_whose_heads_do_not_fill_the_width, a_small_model,
              a_round_number_of_parameters, one_parameter_too_many),
    seconds=20.0,
    equivalents={
        "rounded and counted again": lambda *sizes: _counted_again(*sizes),
        "a search": _searched,
        "a straight line through two counts": _two_counts,
        "as a float": lambda *sizes: float(_solved()(*sizes)),
    },
    misconceptions=(
        Misconception("rounded", _solved(whole=lambda x: round(x)),
            "Where no whole number fits you return the nearest one. By the task it is 0: the "
            "published numbers then contradict each other."),
        Misconception("cut off", _solved(whole=lambda x: int(x)),
            "Where no whole number fits you cut the fraction off. By the task it is 0."),
        Misconception("a fraction", _solved(whole=lambda x: x),
            "Where no whole number fits you return a fraction. By the task it is 0: a width is a "
            "whole number."),
        Misconception("None", lambda *sizes: _solved()(*sizes) or None,
            "Where no whole number fits you return nothing. By the task it is the number 0."),
        Misconception("-1", lambda *sizes: _solved()(*sizes) or -1,
            "Where no whole number fits you return another sign. By the task it is the number 0."),
        Misconception("nearly whole", _solved(whole=lambda x: round(x) * (abs(x - round(x)) < 0.01)),
            "A total that is nearly right passes as right. It is exact by the task: one parameter "
            "too many, and no width gives it.",
            also=[_layer_by_layer]),
        Misconception("one table", _solved(outside=lambda v, d: v * d + d),
            "Only one table was taken off. The embeddings are not tied: there are two."),
        Misconception("a norm not taken off", _solved(outside=lambda v, d: 2 * v * d),
            "Numbers that do belong together no longer come out: something was not taken off. "
            "Two norms in each layer, one behind the last, attention in all of them."),
        Misconception("no tables", _solved(outside=lambda v, d: d),
            "The two tables were not taken off first, so the feed-forward gets their "
            "parameters as well."),
        Misconception("two matrices", _solved(matrices=2),
            "Half as large again as it should be: the feed-forward has three matrices, not "
            "two."),
        Misconception("one layer", _solved(layers=lambda L: 1),
            "All feed-forwards were taken for one: the result is as many times too large as "
            "there are layers."),
        Misconception("head size from the width", _solved(
                attention=lambda d, H, K, D: 2 * d * (d + K * (d // H))),
            "The size of a head was taken as the width over the number of heads. It is given, "
            "and for Nemo it is another number."),
        Misconception("way back forgotten", _solved(
                attention=lambda d, H, K, D: d * D * (H + 2 * K)),
            "Only three matrices of attention were taken off. The fourth leads back to the "
            "stream and is as large as that of the queries."),
        Misconception("nothing shared", _solved(attention=lambda d, H, K, D: 4 * d * H * D),
            "Keys and values were counted for every query head. They have the key/value heads "
            "only."),
        Misconception("keys and values as one", _solved(
                attention=lambda d, H, K, D: d * D * (2 * H + K)),
            "Keys and values were taken off as one matrix. Each has its own, of the same size."),
        Misconception("two matrices of attention", _solved(
                attention=lambda d, H, K, D: d * D * (H + K)),
            "Only two matrices of attention were taken off. There are four: queries, keys, values "
            "and the way back."),
        Misconception("heads without their size", _solved(
                attention=lambda d, H, K, D: 2 * d * (H + K)),
            "Heads were counted as if each were one number. The size of a head is given."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Write the count of a dense model. In which part does the hidden width stand, and how "
             "often?"),
        Hint("The division does not come out",
             "Take off 2 * V * dim + dim, then L times (2 * dim * D * (H + K) + 2 * dim). What is "
             "left is L * 3 * dim * hidden."),
        Hint("I cannot write it",
             "left = total - outside - L * (attention + norms); one = 3 * dim * L; if left % one "
             "is 0, the answer is left // one, else 0."),
    ),
    praise="One equation, one unknown: published numbers can be held against each other.",
)


# ---------------------------------------------------------------- exercise: convert_attention


def _attention_of(heads, kv_heads, head_dim, dim, seed):
    chance = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (heads * head_dim, dim), "k_proj": (kv_heads * head_dim, dim),
              "v_proj": (kv_heads * head_dim, dim), "o_proj": (dim, heads * head_dim)}
    return {f"{name}.weight": torch.randn(shape, generator=chance) + 0.3
            for name, shape in shapes.items()}, heads, kv_heads


def six_heads_on_two():
    return _attention_of(6, 2, 6, 24, 1)


def twelve_heads_on_three():
    return _attention_of(12, 3, 10, 72, 2)


def _converted(q=None, k=None, v=None, o=None):
    """The right conversion with some of its lines exchanged: functions of (weights, H, K)."""
    right = {
        "wq.weight": q or (lambda w, H, K: unpermute_rotary(w["q_proj.weight"], H)),
        "wk.weight": k or (lambda w, H, K: unpermute_rotary(w["k_proj.weight"], K)),
        "wv.weight": v or (lambda w, H, K: w["v_proj.weight"]),
        "wo.weight": o or (lambda w, H, K: w["o_proj.weight"]),
    }
    return lambda weights, n_heads, n_kv_heads: {
        name: line(weights, n_heads, n_kv_heads) for name, line in right.items()}


CONVERT_ATTENTION = Exercise(
    name="convert_attention", chapter=10, kind="bug", entry="convert_attention",
    title="It loads, and the logits are wrong", difficulty="medium", importance="essential",
    minutes=8,
    reference=_converted(),
    fixtures=(six_heads_on_two, twelve_heads_on_three),
    equivalents={
        "size of a head from q": _converted(k=lambda w, H, K: unpermute_rotary(
            w["k_proj.weight"], len(w["k_proj.weight"]) // (len(w["q_proj.weight"]) // H))),
        "a head at a time": _converted(k=lambda w, H, K: torch.cat(
            [unpermute_rotary(head, 1) for head in w["k_proj.weight"].chunk(K)])),
        "written out": _converted(k=lambda w, H, K: w["k_proj.weight"].unflatten(
            0, (K, 2, -1)).transpose(1, 2).reshape(w["k_proj.weight"].shape)),
    },
    misconceptions=(
        Misconception("unchanged", _converted(
                k=lambda w, H, K: unpermute_rotary(w["k_proj.weight"], H)),
            "The bug is still there: rows of one matrix stand in wrong places. Into how many heads "
            "is each matrix cut, and how many has it?"),
        Misconception("queries with the key heads", _converted(
                q=lambda w, H, K: unpermute_rotary(w["q_proj.weight"], K)),
            "The keys are right now, but the queries are cut into the heads of the keys. Each "
            "of the two has its own number."),
        Misconception("both numbers exchanged", _converted(
                q=lambda w, H, K: unpermute_rotary(w["q_proj.weight"], K),
                k=lambda w, H, K: unpermute_rotary(w["k_proj.weight"], H)),
            "The two numbers of heads have changed places. The queries have the larger one."),
        Misconception("group size", _converted(
                k=lambda w, H, K: unpermute_rotary(w["k_proj.weight"], H // K)),
            "The keys were cut into another number of parts than they have heads. The number of "
            "key/value heads is meant.",
            also=[_converted(k=lambda w, H, K: unpermute_rotary(w["k_proj.weight"], 1))]),
        Misconception("keys not moved", _converted(k=lambda w, H, K: w["k_proj.weight"]),
            "The keys are not reordered at all. They are turned like the queries, so their rows "
            "move like theirs."),
        Misconception("keys moved the wrong way", _converted(
                k=lambda w, H, K: permute_rotary(w["k_proj.weight"], K)),
            "The number of heads is right, the direction is not: these weights come from "
            "Hugging Face.",
            also=[_converted(k=lambda w, H, K: permute_rotary(w["k_proj.weight"], K),
                             q=lambda w, H, K: permute_rotary(w["q_proj.weight"], H))]),
        Misconception("queries moved the wrong way", _converted(
                q=lambda w, H, K: permute_rotary(w["q_proj.weight"], H)),
            "The queries now go the other way, from Mistral's order to Hugging Face's. Their line "
            "was right.",
            also=[_converted(q=lambda w, H, K: permute_rotary(w["q_proj.weight"], H),
                             k=lambda w, H, K: unpermute_rotary(w["k_proj.weight"], H)),
                  _converted(q=lambda w, H, K: permute_rotary(w["q_proj.weight"], H),
                             k=lambda w, H, K: permute_rotary(w["k_proj.weight"], H))]),
        Misconception("neither moved", _converted(
                q=lambda w, H, K: w["q_proj.weight"], k=lambda w, H, K: w["k_proj.weight"]),
            "Neither queries nor keys are reordered now. Both are turned, so the rows of both have "
            "to move."),
        Misconception("values moved as well", _converted(
                v=lambda w, H, K: unpermute_rotary(w["v_proj.weight"], K)),
            "The values have been reordered too. Nobody turns them: the line was right."),
        Misconception("another line changed", _converted(
                k=lambda w, H, K: unpermute_rotary(w["k_proj.weight"], H),
                v=lambda w, H, K: unpermute_rotary(w["v_proj.weight"], K)),
            "A line was changed that was right. The fault is in that of the keys, in the number of "
            "their heads.",
            also=[_converted(k=lambda w, H, K: unpermute_rotary(w["k_proj.weight"], H), **other)
                  for other in (
                      {"o": lambda w, H, K: unpermute_rotary(w["o_proj.weight"], H)},
                      {"o": lambda w, H, K: w["o_proj.weight"].T},
                      {"v": lambda w, H, K: w["o_proj.weight"],
                       "o": lambda w, H, K: w["v_proj.weight"]})]),
        Misconception("the way back moved", _converted(
                o=lambda w, H, K: unpermute_rotary(w["o_proj.weight"], H)),
            "The last matrix has been reordered too. It reads what was looked up, and values are "
            "never turned: the line was right."),
        Misconception("queries not moved", _converted(q=lambda w, H, K: w["q_proj.weight"]),
            "The keys are right now, but the queries are no longer reordered. Their line was "
            "right."),
    ),
    hints=(
        Hint("I do not see the bug",
             "With H = 6, K = 2 and D = 6: how many rows does k_proj have, and into how many pieces "
             "of which size does the function cut them?"),
        Hint("Why is there no error?",
             "12 rows in 6 pieces are pieces of 2, and a piece of 2 has one pair, which stays in "
             "place. Nothing moves, and every shape is right."),
        Hint("I cannot repair it",
             "The keys have n_kv_heads heads. That number, and no other, belongs into their line."),
    ),
    praise="The keys have fewer heads; whoever cuts them must know how many.",
)


# ---------------------------------------------------------------- exercise: read_tensor


def _file(*names):
    """The bytes of a safetensors file with three tensors, and one name in it."""
    chance = torch.Generator().manual_seed(5)
    tensors = {"norm.weight": torch.rand(7, generator=chance) + 0.5,
               "layers.0.attention.wq.weight": torch.randn(6, 5, generator=chance) + 0.3,
               "output.weight": (torch.randn(9, 4, generator=chance) - 0.2).to(torch.bfloat16)}
    return save_bytes(tensors, {"format": "pt"})


def a_matrix_of_32_bits():
    return _file(), "layers.0.attention.wq.weight"


def a_vector_of_32_bits():
    return _file(), "norm.weight"


def a_matrix_of_16_bits():
    return _file(), "output.weight"


CODES = {"F32": torch.float32, "BF16": torch.bfloat16}


def _by_hand(order="little", start=None, dtype=None, shape=None, end=None, first=None):
    def read(data, name):
        length = int.from_bytes(data[:8], order)
        about = json.loads(data[8:8 + length])[name]
        begins, last = about["data_offsets"]
        begins = begins if first is None else first
        begin = start(length) if start else 8 + length
        kind = dtype(about) if dtype else CODES[about["dtype"]]
        piece = bytearray(data[begin + begins:begin + (end(begins, last) if end else last)])
        sizes = shape(about["shape"]) if shape else about["shape"]
        return torch.frombuffer(piece, dtype=kind).reshape(sizes)
    return read


def _piece_by_hand(cut):
    """The tensor from data[cut(end of the header, first offset, second offset, bytes of a number)]."""
    def read(data, name):
        length = int.from_bytes(data[:8], "little")
        about = json.loads(data[8:8 + length])[name]
        kind = CODES[about["dtype"]]
        piece = data[cut(8 + length, *about["data_offsets"], kind.itemsize)]
        return torch.frombuffer(bytearray(piece), dtype=kind).reshape(about["shape"])
    return read


def _count_of_bytes(data, name):
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8:8 + length])[name]
    first, last = about["data_offsets"]
    return torch.frombuffer(bytearray(data), dtype=CODES[about["dtype"]], count=last - first,
                            offset=8 + length + first).reshape(about["shape"])


def _by_struct(data, name):
    length, = struct.unpack("<Q", data[:8])
    about = json.loads(data[8:8 + length].decode("utf-8"))[name]
    first, last = about["data_offsets"]
    body = data[8 + length:][first:last]
    if about["dtype"] == "F32":
        numbers = torch.tensor(struct.unpack(f"<{len(body) // 4}f", body))
    else:
        codes = torch.tensor(struct.unpack(f"<{len(body) // 2}h", body), dtype=torch.int16)
        numbers = codes.view(torch.bfloat16)
    return numbers.view(about["shape"])


READ_TENSOR = Exercise(
    name="read_tensor", chapter=10, kind="function", entry="read_tensor",
    title="A tensor, by hand", difficulty="hard", importance="useful", minutes=12,
    reference=_by_hand(), same_dtype=True,
    fixtures=(a_matrix_of_32_bits, a_vector_of_32_bits, a_matrix_of_16_bits),
    equivalents={
        "the safetensors library": lambda data, name: load_bytes(data)[name],
        "struct": _by_struct,
        "offset and count": lambda data, name: _with_offset(data, name),
    },
    misconceptions=(
        Misconception("offsets from the file's start", _by_hand(start=lambda n: 0),
            "The offsets were counted from the start of the file. They count from the end of "
            "the header."),
        Misconception("the length itself forgotten", _by_hand(start=lambda n: n),
            "The numbers begin eight bytes too early. In front of the header stands its length, "
            "which takes eight bytes itself."),
        Misconception("header cut short", lambda data, name: json.loads(
                data[8:int.from_bytes(data[:8], "little")])[name],
            "The header is cut eight bytes short and is no JSON. Its length counts from where it "
            "begins, after the first eight bytes."),
        Misconception("big end first", _by_hand(order="big"),
            "The header runs on into the numbers. Its length is the first eight bytes as one "
            "number, the smallest byte first."),
        Misconception("offsets as start and length", _by_hand(end=lambda a, b: a + b),
            "The two offsets were read as a start and a length. They are a start and an end."),
        Misconception("last byte left out", _by_hand(end=lambda a, b: b - 1),
            "The last byte is missing. The second offset is the first byte that no longer "
            "belongs to the tensor."),
        Misconception("always 32 bits", _by_hand(dtype=lambda about: torch.float32),
            "The numbers of 16 bits were read as ones of 32. The header says which they are."),
        Misconception("another 16 bits", _by_hand(
                dtype=lambda about: {"F32": torch.float32, "BF16": torch.float16}[about["dtype"]]),
            "BF16 and F16 both have 16 bits, cut differently: the numbers are wrong by orders "
            "of magnitude. BF16 is torch's bfloat16."),
        Misconception("shape forgotten", _by_hand(shape=lambda shape: [-1]),
            "The numbers are right and lie in one row. The header says which shape they have."),
        Misconception("made wider", lambda data, name: load_bytes(data)[name].float(),
            "The numbers are right, but their dtype has changed. A tensor of 16 bits stays "
            "one."),
        Misconception("header from the first byte", lambda data, name: json.loads(
                data[:int.from_bytes(data[:8], "little")])[name],
            "That is no JSON text. The first eight bytes together are its length; it begins after "
            "them."),
        Misconception("header not skipped", _by_hand(start=lambda n: 8),
            "The offsets were counted from where the header begins, so its text was read as "
            "numbers. They count from its end."),
        Misconception("first offset ignored", _by_hand(first=0),
            "The piece begins with the first tensor of the file. Yours begins at its own first "
            "offset."),
        Misconception("one byte too many", _by_hand(end=lambda a, b: b + 1),
            "The piece is one byte too long. The second offset is the first byte that no longer "
            "belongs to the tensor; a slice leaves it out by itself."),
        Misconception("one offset from the file's start", _piece_by_hand(
                lambda start, a, b, size: slice(start + a, b)),
            "Only one of the two offsets was counted from the end of the header. Both are.",
            also=[_piece_by_hand(lambda start, a, b, size: slice(a, start + b))]),
        Misconception("offsets counted in numbers", _piece_by_hand(
                lambda start, a, b, size: slice(start + a * size, start + b * size)),
            "The offsets were multiplied by the size of a number. They count bytes."),
        Misconception("bytes counted as numbers", _count_of_bytes,
            "More numbers were asked for than there are: the distance of the offsets counts bytes, "
            "and a number has two or four."),
        Misconception("a number for each byte", _by_hand(dtype=lambda about: torch.uint8),
            "Every byte became a number of its own. Four together are a number of 32 bits, two are "
            "one of 16."),
    ),
    hints=(
        Hint("I do not know where to start",
             "What are the first eight bytes, what follows them, and for how long?"),
        Hint("The numbers are nonsense",
             "data_offsets are the first byte of the tensor and the first byte after it, counted "
             "from where the header ends: 8 + its length."),
        Hint("I cannot make a tensor of bytes",
             "torch.frombuffer(bytearray(piece), dtype=...) gives a row of numbers; reshape it to "
             "the shape of the header. The dtypes are F32 and BF16."),
    ),
    praise="Eight bytes, a JSON text, and numbers: nothing in such a file can run.",
)


def _with_offset(data, name):
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8:8 + length])[name]
    dtype = CODES[about["dtype"]]
    first, last = about["data_offsets"]
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)[8 + length + first:8 + length + last]
    return flat.clone().view(dtype).view(about["shape"])


# ---------------------------------------------------------------- exercise: unpack_experts


def _packed(experts, hidden, dim, seed):
    chance = torch.Generator().manual_seed(seed)
    return (torch.randn(experts, 2 * hidden, dim, generator=chance) + 0.3,
            torch.randn(experts, dim, hidden, generator=chance) - 0.2)


def five_experts():
    return _packed(5, 7, 4, 1)


def three_experts_narrower_than_the_stream():
    return _packed(3, 4, 10, 2)


def _unpacked(pair):
    """One expert after another: pair(gate_up of one, down of one) -> (w1, w2, w3)."""
    return lambda gate_up, down: [tuple(pair(g, d)) for g, d in zip(gate_up, down)]


def _half(g):
    return g.shape[0] // 2


UNPACK_EXPERTS = Exercise(
    name="unpack_experts", chapter=10, kind="function", entry="unpack_experts",
    title="Experts in one parcel", difficulty="medium", importance="useful", minutes=8,
    reference=_unpacked(lambda g, d: (g[:_half(g)], d, g[_half(g):])),
    fixtures=(five_experts, three_experts_narrower_than_the_stream),
    equivalents={
        "chunk": lambda gate_up, down: [
            (w1, w2, w3) for (w1, w3), w2 in zip((g.chunk(2) for g in gate_up), down)],
        "by number": lambda gate_up, down: [
            [gate_up[e, :down.shape[2]], down[e], gate_up[e, down.shape[2]:]]
            for e in range(len(down))],
        "split all at once": lambda gate_up, down: list(zip(
            gate_up.split(down.shape[2], dim=1)[0], down,
            gate_up.split(down.shape[2], dim=1)[1])),
    },
    misconceptions=(
        Misconception("gate and value exchanged", _unpacked(
                lambda g, d: (g[_half(g):], d, g[:_half(g)])),
            "w1 and w3 have changed places: the gate is above, the value below. No shape tells "
            "it, and the model would write nonsense."),
        Misconception("rows taken in turn", _unpacked(lambda g, d: (g[0::2], d, g[1::2])),
            "Rows of gate and value were taken in turn. One lies above the other: the first "
            "half of the rows, then the second."),
        Misconception("another order of three", _unpacked(
                lambda g, d: (g[:_half(g)], g[_half(g):], d)),
            "The three came as w1, w3, w2. By the task the order is w1, w2, w3; w2 is the way "
            "back down."),
        Misconception("way back turned", _unpacked(
                lambda g, d: (g[:_half(g)], d.T, g[_half(g):])),
            "w2 is transposed. Here it is stored as PyTorch wants it, from hidden down to dim."),
        Misconception("gate and value turned", _unpacked(
                lambda g, d: (g[:_half(g)].T, d, g[_half(g):].T)),
            "w1 and w3 are transposed. They have the shape (hidden, dim), as they are stored.",
            also=[_unpacked(lambda g, d: (g[:_half(g)].T, d.T, g[_half(g):].T))]),
        Misconception("columns halved", _unpacked(
                lambda g, d: (g[:, :g.shape[1] // 2], d, g[:, g.shape[1] // 2:])),
            "The columns were halved. Gate and value lie above each other, so the rows are "
            "halved."),
        Misconception("the first expert only", lambda gate_up, down: [
                (gate_up[0, :down.shape[2]], down[0], gate_up[0, down.shape[2]:])],
            "There is only one expert in your list. The first axis counts them."),
        Misconception("halved at dim", _unpacked(
                lambda g, d: (g[:g.shape[1]], d, g[g.shape[1]:])),
            "The parcel was cut after as many rows as the stream is wide. The gate has as many "
            "rows as the hidden width: half of all."),
        Misconception("one long list", lambda gate_up, down: [
                m for g, d in zip(gate_up, down) for m in (g[:_half(g)], d, g[_half(g):])],
            "All matrices lie in one long list. Each expert is a tuple of three, and the list "
            "holds the tuples."),
        Misconception("sorted by matrix", lambda gate_up, down: [
                tuple(gate_up[:, :down.shape[2]]), tuple(down),
                tuple(gate_up[:, down.shape[2]:])],
            "You return three lists, one for each matrix. A list of experts is asked for, each "
            "with its three matrices."),
        Misconception("experts halved", lambda gate_up, down: list(zip(
                gate_up.chunk(2)[0], down, gate_up.chunk(2)[1])),
            "The experts were divided in two, not the rows of each. The first axis counts experts, "
            "the second has gate and value."),
        Misconception("all experts at once", lambda gate_up, down: [
                (gate_up[:, :down.shape[2]], down, gate_up[:, down.shape[2]:])],
            "Your list has one entry, with the matrices of all experts stacked. Go through the "
            "experts: an entry for each."),
    ),
    hints=(
        Hint("I do not know where to start",
             "gate_up is (E, 2 * hidden, dim). Which axis counts experts, and along which one do "
             "two matrices lie?"),
        Hint("The shapes are right, the numbers are not",
             "For each expert the first half of the rows is w1, the gate, and the second half is "
             "w3. With hidden = 7: rows 0 to 6 and 7 to 13."),
        Hint("I cannot write it",
             "For gate_up of one expert g and its down d: half = len(g) // 2, and the three are "
             "g[:half], d, g[half:]. Collect them in a list."),
    ),
    praise="Whatever the parcel, an expert is three matrices.",
)


# ---------------------------------------------------------------- exercise: design


def eight_gigabytes():
    return (8,)


def forty_gigabytes():
    return (40,)


def _judge_design(work, gigabytes):
    """The first demand that a design does not meet, in words."""
    c = work(gigabytes)
    if not isinstance(c, ModelConfig):
        raise TypeError(f"a ModelConfig is wanted, not {type(c).__name__}")
    count, used = count_parameters(c), weight_bytes(c) / 1e9
    if count.total == count.active:
        return "everything works for every token: no expert ever rests"
    if used > gigabytes:
        return "the weights take more than the memory"
    if used < 0.8 * gigabytes:
        return "the weights fill less than 80% of the memory"
    if count.total < 3 * count.active:
        return "what is stored is less than three times what is at work"
    if cache_bytes_per_token(c) > 64 * 1024:
        return "the cache takes more than 64 KiB for a token"
    return "every demand is met"


def _designed(gigabytes, limit=1.0, moe=MoEConfig(8, 1), kv_heads=4, layers=24, unit=1e9,
              **changes):
    """The widest feed-forward that still fits, all else fixed."""
    best = None
    for hidden in range(128, 200_000, 128):
        c = ModelConfig(**{**dict(dim=2048, n_layers=layers, n_heads=16, n_kv_heads=kv_heads,
                                  head_dim=128, hidden_dim=hidden, vocab_size=32768, moe=moe),
                           **changes})
        if weight_bytes(c) > limit * gigabytes * unit:
            break
        best = c
    return best


def _by_experts(gigabytes):
    """As many experts as fit, one at work."""
    best = None
    for experts in range(4, 400):
        c = ModelConfig(2048, 12, 16, 4, 128, 4096, 32000, moe=MoEConfig(experts, 1))
        if weight_bytes(c) > gigabytes * 1e9:
            break
        best = c
    return best


DESIGN = Exercise(
    name="design", chapter=10, kind="open", entry="design", title="A mixture of your own",
    difficulty="medium", importance="optional", minutes=15,
    reference=lambda gigabytes: _designed(gigabytes), run=_judge_design,
    fixtures=(eight_gigabytes, forty_gigabytes), seconds=30.0,
    equivalents={
        "more experts": _by_experts,
        "two of sixteen": lambda gigabytes: _designed(gigabytes, moe=MoEConfig(16, 2)),
        "nine tenths are enough": lambda gigabytes: _designed(gigabytes, limit=0.9),
    },
    compare=lambda expected, actual: None if expected == actual else actual,
    misconceptions=(
        Misconception("a dense model", lambda gigabytes: _designed(gigabytes, moe=None),
            "A dense model has everything at work for every token. A mixture stores more than it "
            "uses."),
        Misconception("Mixtral's shares", lambda gigabytes: _designed(gigabytes, moe=MoEConfig(4, 2)),
            "What is stored is less than three times what is at work, with both budgets. Let fewer "
            "experts work, or have more of them."),
        Misconception("small budget, large attention", lambda gigabytes: _designed(
                gigabytes, moe=MoEConfig(8, 2), layers=32),
            "With 40 GB the shares are right, with 8 GB they are not: what all tokens share weighs "
            "more in a small model. More experts, or fewer at work."),
        Misconception("one size for all budgets", lambda gigabytes: _designed(8),
            "The same model for every budget: with the larger one most of the memory stays "
            "empty. Let a size follow from the argument."),
        Misconception("the large model for all budgets", lambda gigabytes: _designed(40),
            "The model for 40 GB is right and does not fit into 8. Let a size follow from the "
            "argument."),
        Misconception("one byte for a weight", lambda gigabytes: _designed(gigabytes, limit=2.0),
            "The weights take more than both budgets. 16 bits are two bytes, and a GB is a "
            "thousand million bytes."),
        Misconception("billions of parameters for GB", lambda gigabytes: _designed(
                gigabytes, limit=0.5),
            "The weights fill less than 80% of both budgets. Did a weight get four bytes? 16 bits "
            "are two."),
        Misconception("no shared heads", lambda gigabytes: _designed(gigabytes, kv_heads=16),
            "The cache of a token is too large. Fewer key/value heads, smaller heads, or fewer "
            "layers make it smaller."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Fix everything but one number, say the hidden width or the number of experts. What "
             "do the weights take when you make it larger?"),
        Hint("What works is too much",
             "With 8 experts, 1 at work, an expert counts eight times in total and once in active. "
             "The tables and attention count in both, so keep them small."),
        Hint("I want a plan",
             "Loop over the hidden width in steps of 128, compute mm.weight_bytes, and keep the "
             "last configuration that fits. The cache is 2 * L * K * D * 2 bytes."),
    ),
    praise="A model on paper: stored, at work, and what a text costs.",
)


EXERCISES = [COUNT_PARAMETERS, PERMUTE_ROTARY, UNPERMUTE_ROTARY, MEMORY_NEEDED, LOAD_IN_ORDER,
             HIDDEN_FROM_TOTAL, CONVERT_ATTENTION, READ_TENSOR, UNPACK_EXPERTS, DESIGN]
