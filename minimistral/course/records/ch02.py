"""Chapter 2, attention: its two core pieces and its exercises."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minimistral.attention import attend, causal
from minimistral.config import ModelConfig
from minimistral.model import Transformer

from ..exercises import Exercise, Hint, Misconception

INF = float("inf")


def _random(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, ...]:
    """Tensors without zero means, whose rows differ in size."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        rows = 0.5 + torch.rand((*shape[:-1], 1), generator=chance)
        made.append(scale * (rows * torch.randn(shape, generator=chance) + 0.3))
    return tuple(made)


# ---------------------------------------------------------------- piece: causal


def a_whole_text():
    return torch.arange(6), torch.arange(6)


def the_last_four_of_nine_tokens():
    return torch.arange(5, 9), torch.arange(9)


def two_texts_with_shuffled_keys():
    queries = torch.tensor([[2, 3, 4], [7, 8, 11]])
    keys = torch.tensor([[3, 1, 0, 4, 2], [9, 5, 11, 6, 8]])
    return queries, keys


def _compared(rule):
    def mask(query_positions, key_positions):
        return rule(query_positions[..., :, None], key_positions[..., None, :])
    return mask


def _causal_by_loop(query_positions, key_positions):
    queries = query_positions.reshape(-1, query_positions.shape[-1]).tolist()
    keys = key_positions.reshape(-1, key_positions.shape[-1]).tolist()
    rows = [[[k <= q for k in ks] for q in qs] for qs, ks in zip(queries, keys)]
    return torch.tensor(rows).reshape(*query_positions.shape, key_positions.shape[-1])


def _causal_unsqueezed(query_positions, key_positions):
    return query_positions.unsqueeze(-1) >= key_positions.unsqueeze(-2)


def _causal_without_batch(query_positions, key_positions):
    return key_positions[None, :] <= query_positions[:, None]


def _causal_transposed(query_positions, key_positions):
    return key_positions[..., :, None] <= query_positions[..., None, :]


def _causal_by_index(query_positions, key_positions):
    shape = (*query_positions.shape, key_positions.shape[-1])
    return torch.ones(shape, dtype=torch.bool).tril()


def _causal_from_the_end(query_positions, key_positions):
    shape = (*query_positions.shape, key_positions.shape[-1])
    return torch.ones(shape, dtype=torch.bool).tril(shape[-1] - shape[-2])


def _causal_upper(query_positions, key_positions):
    shape = (*query_positions.shape, key_positions.shape[-1])
    return torch.ones(shape, dtype=torch.bool).triu()


CAUSAL = Exercise(
    name="causal", chapter=2, kind="piece", piece="attention.causal", entry="causal",
    title="Who may look at whom", difficulty="easy", importance="essential", minutes=4,
    reference=causal,
    fixtures=(a_whole_text, the_last_four_of_nine_tokens, two_texts_with_shuffled_keys),
    equivalents={
        "unsqueeze": _causal_unsqueezed,
        "difference": _compared(lambda q, k: q - k >= 0),
        "not later": _compared(lambda q, k: ~(k > q)),
        "torch.le": _compared(lambda q, k: torch.le(k, q)),
        "loop": _causal_by_loop,
    },
    misconceptions=(
        Misconception("strictly before", _compared(lambda q, k: k < q),
            "No token sees itself, and the first row is empty. The rule is: not later than "
            "the query. Look at the case of equal positions."),
        Misconception("future instead of past", _compared(lambda q, k: k >= q),
            "Each token sees itself and what comes after it. The rule is the other way "
            "round: the key must not be later than the query."),
        Misconception("True means hidden", _compared(lambda q, k: k > q),
            "True and False are exchanged. In this course True means: this query may attend "
            "to this key."),
        Misconception("one token too far", _compared(lambda q, k: k <= q + 1),
            "Each token sees one token of the future. A model trained with that reads its "
            "answer. Equal positions are the last ones allowed."),
        Misconception("one row for each key", _causal_transposed,
            "The mask lies on its side: it has a row for each key. The queries are the rows, "
            "the keys the columns."),
        Misconception("index instead of position", _causal_by_index,
            "A triangle by row and column number. When the queries start later in the text, "
            "they see too little. Compare the positions themselves."),
        Misconception("triangle shifted to the end", _causal_from_the_end,
            "Right while the keys stand in order. Keys may come in any order, each with its "
            "position. Compare the positions, not the places in the table."),
        Misconception("upper triangle", _causal_upper,
            "The upper triangle is the future, and it goes by row and column number. Compare "
            "positions: the key's must not be larger."),
        Misconception("numbers instead of booleans",
            _compared(lambda q, k: torch.zeros((q - k).shape).masked_fill(k > q, -INF)),
            "The result holds numbers to be added to scores. Here a mask is boolean: True "
            "where the query may attend to the key."),
        Misconception("ones and zeros", _compared(lambda q, k: (k <= q).long()),
            "The pattern is right, but it is made of whole numbers. A mask is boolean; leave "
            "the comparison as it comes."),
        Misconception("everything allowed", _compared(lambda q, k: (k <= q) | True),
            "Every token sees every other, the future included. Which of the two positions "
            "has to be the smaller one?"),
        Misconception("no room for a batch", _causal_without_batch,
            "It works for one text. With a row of positions for each text, the new axes must "
            "stand at the end: count them from the right."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take query position 2 and key positions 0 to 3. Which four answers do you want?"),
        Hint("My mask has the wrong shape",
             "A comparison of shape (T, 1) with shape (1, S) has shape (T, S): every query "
             "meets every key. None in an index adds an axis of size 1."),
        Hint("It is refused for two texts",
             "Begin the index with three dots, so that the new axis counts from the right: "
             "one form for the queries, [..., :, None], another for the keys, "
             "[..., None, :]; then one comparison."),
    ),
    praise="One comparison, and it holds for every text, chunk and batch of the course.",
)


# ---------------------------------------------------------------- piece: attend


def five_queries_and_seven_keys():
    q, k, v = _random(1, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    return q, k, v, causal(torch.arange(2, 7), torch.arange(7))


def a_mask_for_each_text():
    q, k, v = _random(2, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    mask = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., 2] = True
    mask[1, 3] = False  # a query that may see nothing
    return q, k, v, mask


def scores_above_ten_thousand():
    q, k, v = _random(4, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    return 150 * q, 150 * k, v, causal(torch.arange(2, 7), torch.arange(7))


def sixteen_bit_numbers():
    q, k, v = _random(5, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4), scale=0.6)
    return q.half(), k.half(), v.half(), causal(torch.arange(2, 7), torch.arange(7))


def _looks(scale=None, hide=None, soften=None, mix=None, dtype=None):
    """attend with one step exchanged; the steps get what they may need."""
    def attend(q, k, v, mask):
        hidden = ~(mask if mask.dim() == 2 else mask[:, None])
        scores = torch.einsum("bthd,bshd->bhts", q, k).float()
        scores = scale(scores, q, k) if scale else scores / math.sqrt(q.shape[-1])
        if hide:
            scores = hide(scores, hidden)
        else:
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        if soften:
            weights = soften(scores, hidden)
        else:
            weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        if mix:
            return mix(weights.to(v.dtype), k, v)
        out = torch.einsum("bhts,bshd->bthd", weights, v.float())
        return out.to(dtype or v.dtype)
    return attend


def _attend_by_matmul(q, k, v, mask):
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v_ := v)) if False else (
        q.transpose(1, 2).float(), k.transpose(1, 2).float(), v.transpose(1, 2))
    hidden = ~mask.unsqueeze(-3)
    scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(hidden, -INF)
    weights = torch.nan_to_num(scores.softmax(-1))
    return (weights.to(v.dtype) @ v).transpose(1, 2)
