"""Chapter 2, attention: its two core pieces and its exercises."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F

from minimistral.attention import attend, causal
from minimistral.config import ModelConfig
from minimistral.model import Transformer

from ..exercises import Exercise, Hint, Misconception
from .fixtures import random_tensors

INF = float("inf")


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


def _causal_by_length(query_positions, key_positions):
    shape = (query_positions.shape[-1], key_positions.shape[-1])
    return torch.ones(shape, dtype=torch.bool).tril()


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
            "A triangle by row and column number: the same for every text and every chunk. The "
            "numbers in the positions are never read. Compare the positions themselves.",
            also=[_causal_by_length]),
        Misconception("triangle shifted to the end", _causal_from_the_end,
            "Right while the keys stand in order. Keys may come in any order, each with its "
            "position. Compare the positions, not the places in the table."),
        Misconception("upper triangle", _causal_upper,
            "The upper triangle is the future, and it goes by row and column number. Compare "
            "positions: the key's must not be larger."),
        Misconception("numbers instead of booleans",
            _compared(lambda q, k: torch.zeros((q - k).shape).masked_fill(k > q, -INF)),
            "The result holds numbers. Here a mask is boolean, True where the query may attend "
            "to the key: leave the comparison as it comes.",
            also=[_compared(lambda q, k: (k <= q).long())]),
        Misconception("everything allowed", _compared(lambda q, k: (k <= q) | True),
            "Every token sees every other, the future included. Which of the two positions "
            "has to be the smaller one?"),
        Misconception("only the queries got an axis",
            lambda query_positions, key_positions: query_positions[..., None] >= key_positions,
            "It works for one text. With several texts the keys need a new axis as well, in "
            "front of their own last one."),
        Misconception("only the keys got an axis",
            lambda query_positions, key_positions: key_positions[..., None, :] <= query_positions,
            "Each query met one key only. For every pair the queries need a new axis as well, "
            "behind their own last one."),
        Misconception("no new axis",
            lambda query_positions, key_positions: key_positions <= query_positions,
            "The positions were compared one by one. Every query must meet every key: queries "
            "down, keys across, which takes a new axis for each."),
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
    q, k, v = random_tensors(1, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    return q, k, v, causal(torch.arange(2, 7), torch.arange(7))


def a_mask_for_each_text():
    q, k, v = random_tensors(2, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    mask = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., 2] = True
    mask[1, 3] = False  # a query that may see nothing
    return q, k, v, mask


def scores_above_ten_thousand():
    q, k, v = random_tensors(4, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    return 150 * q, 150 * k, v, causal(torch.arange(2, 7), torch.arange(7))


def sixteen_bit_numbers():
    q, k, v = random_tensors(5, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4), scale=0.6)
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
    q, k, values = (x.transpose(1, 2).float() for x in (q, k, v))
    hidden = ~mask.unsqueeze(-3)
    scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(hidden, -INF)
    weights = torch.nan_to_num(scores.softmax(-1))
    return (weights @ values).transpose(1, 2).to(v.dtype)


def _attend_additive(q, k, v, mask):
    mask = mask.expand(len(q), *mask.shape[-2:])[:, None]
    added = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    scores = torch.einsum("bthd,bshd->bhts", q.float() / math.sqrt(q.shape[-1]), k.float())
    weights = (scores + added).softmax(-1) * mask
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def _attend_by_loops(q, k, v, mask):
    out = torch.zeros(q.shape, dtype=v.dtype)
    mask = mask.expand(len(q), *mask.shape[-2:])
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = mask[b, t].nonzero().flatten()
            for h in range(q.shape[2] if len(seen) else 0):
                scores = k[b, seen, h].float() @ q[b, t, h].float() / math.sqrt(q.shape[-1])
                weights = (scores - scores.max()).exp()
                mixed = (weights / weights.sum()) @ v[b, seen, h].float()
                out[b, t, h] = mixed.to(v.dtype)
    return out


def _attend_fused(q, k, v, mask):
    mask = mask.unsqueeze(-3)
    blind = ~mask.any(-1, keepdim=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind)
    return out.masked_fill(blind, 0.0).transpose(1, 2)


def _attend_masked_then_renormalised(q, k, v, mask):
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() / q.shape[-1] ** 0.5
    shown = mask.unsqueeze(-3).float()
    best = scores.masked_fill(shown == 0, -1e30).amax(-1, keepdim=True)
    powers = (scores - best).clamp(max=0).exp() * shown
    weights = powers / powers.sum(-1, keepdim=True).clamp(min=1e-20)
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def _attend_heads_by_view(q, k, v, mask):
    def cut(x):
        return x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    hidden = ~mask.unsqueeze(-3)
    scores = cut(q).float() @ cut(k).float().transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    out = weights.masked_fill(hidden, 0.0).to(v.dtype) @ cut(v)
    return out.reshape(q.shape)


def _attend_minus_a_billion(q, k, v, mask):
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask.unsqueeze(-3), -1e9).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def _attend_mask_as_it_is(q, k, v, mask):
    q, k, values = (x.transpose(1, 2).float() for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~mask, -INF)
    return (torch.nan_to_num(scores.softmax(-1)) @ values).transpose(1, 2).to(v.dtype)


def _attend_axis_counted_from_the_left(q, k, v, mask):
    return _attend_mask_as_it_is(q, k, v, mask.unsqueeze(1))


def _attend_heads_not_moved(q, k, v, mask):
    scores = q.float() @ k.float().transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v.float()).to(v.dtype)


def _divided_by(size):
    return lambda scores, q, k: scores / size(q, k)


def _hidden_min(scores, hidden):
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


ATTEND = Exercise(
    name="attend", chapter=2, kind="piece", piece="attention.attend", entry="attend",
    title="All queries, all heads", difficulty="medium", importance="essential", minutes=10,
    reference=attend,
    fixtures=(five_queries_and_seven_keys, a_mask_for_each_text, scores_above_ten_thousand,
              sixteen_bit_numbers),
    equivalents={
        "matmul and transposes": _attend_by_matmul,
        "additive mask": _attend_additive,
        "loops": _attend_by_loops,
        "scaled_dot_product_attention": _attend_fused,
        "mask, then renormalise": _attend_masked_then_renormalised,
        "einsum": _looks(),
    },
    misconceptions=(
        Misconception("softmax over another axis",
            _looks(soften=lambda s, hidden: s.softmax(-2).masked_fill(hidden, 0.0)),
            "Queries or heads compete with each other. Every query of every head shares out its "
            "own 1 over the keys. Look at the axis of your softmax.",
            also=[_looks(soften=lambda s, hidden: s.softmax(1).masked_fill(hidden, 0.0))]),
        Misconception("no scale", _looks(scale=_divided_by(lambda q, k: 1.0)),
            "The weights are too sharp: the scores were not divided. The rule: divide by the "
            "square root of the head size."),
        Misconception("divided by D", _looks(scale=_divided_by(lambda q, k: q.shape[-1])),
            "The weights are too even: the scores were divided by the head size itself. The "
            "rule says its square root."),
        Misconception("scale from the number of heads",
            _looks(scale=_divided_by(lambda q, k: (q.shape[-1] * q.shape[-2]) ** 0.5)),
            "The scale follows the number of heads. A score is a sum over one head's D products: "
            "divide by the square root of D alone.",
            also=[_looks(scale=_divided_by(lambda q, k: q.shape[2] ** 0.5))]),
        Misconception("True hides", _looks(
                hide=lambda s, hidden: _hidden_min(s, ~hidden),
                soften=lambda s, hidden: s.softmax(-1).masked_fill(~hidden, 0.0)),
            "Each query looks exactly where it may not. In our masks True means: may attend. "
            "Look at what you fill."),
        Misconception("mask after the softmax", _looks(
                hide=lambda s, hidden: s,
                soften=lambda s, hidden: s.softmax(-1).masked_fill(hidden, 0.0)),
            "The weights sum to less than 1, because hidden keys took their share first. "
            "Hide the scores before the softmax."),
        Misconception("hidden scores left ordinary", _looks(
                hide=lambda s, hidden: s.masked_fill(hidden, 0.0),
                soften=lambda s, hidden: s.softmax(-1)),
            "Hidden keys still get weight: a score of 0, or one plus a boolean, is an ordinary "
            "score. It must be lower than any other before the softmax.",
            also=[_looks(
                      hide=lambda s, hidden: s + (~hidden).float(),
                      soften=lambda s, hidden: s.softmax(-1))]),
        Misconception("mask ignored", _looks(
                hide=lambda s, hidden: s, soften=lambda s, hidden: s.softmax(-1)),
            "Hidden keys get weight, so a token can read its future. The mask has no effect "
            "on your result."),
        Misconception("NaN where nothing may be seen", _looks(
                hide=lambda s, hidden: s.masked_fill(hidden, -INF),
                soften=lambda s, hidden: s.softmax(-1)),
            "A query that may see nothing gives NaN: its softmax is 0 divided by 0. The rule "
            "for such a query: its result is zeros."),
        Misconception("an average where nothing may be seen", _looks(
                soften=lambda s, hidden: s.softmax(-1)),
            "A query that may see nothing gets the average of all values: equal scores, equal "
            "weights. The rule for such a query: its result is zeros."),
        Misconception("exponentials of large scores", _looks(
                soften=lambda s, hidden: (lambda e: e / e.sum(-1, keepdim=True).clamp(min=1e-20))(
                    s.exp().masked_fill(hidden, 0.0))),
            "NaN for large scores: their exponential is infinite. Subtract each row's largest "
            "score first, or use softmax, which does it."),
        Misconception("keys handed over", _looks(
                mix=lambda w, k, v: torch.einsum("bhts,bshd->bthd", w, k)),
            "The weights are right, but you mixed the keys. The keys are for finding; what is "
            "handed over are the values."),
        Misconception("heads cut by view", _attend_heads_by_view,
            "Shapes fit, but tokens and heads are mixed: the numbers were cut anew without "
            "swapping the two axes. Swap axes; reshaping does not."),
        Misconception("mask without an axis for the heads", _attend_mask_as_it_is,
            "One mask for all texts works. With a mask for each text, (B, T, S), its first axis "
            "meets the heads. It needs an axis for the heads."),
        Misconception("mask's new axis counted from the left",
            _attend_axis_counted_from_the_left,
            "A mask for each text works. A mask of shape (T, S) got its new axis between "
            "queries and keys. Count the place from the right."),
        Misconception("heads not brought to the front", _attend_heads_not_moved,
            "The last two axes of q and k are heads and numbers, so heads would look at heads. "
            "First bring the heads in front of the tokens."),
        Misconception("heads and queries not swapped back", _looks(
                mix=lambda w, k, v: torch.einsum("bhts,bshd->bhtd", w, v)),
            "The result still has the heads before the queries. It must have the shape of q: "
            "text, query, head, D."),
        Misconception("result cut without swapping back", _looks(
                mix=lambda w, k, v: torch.einsum("bhts,bshd->bhtd", w, v).reshape(
                    w.shape[0], w.shape[2], w.shape[1], v.shape[-1])),
            "The shape is right, but the numbers of heads and queries are mixed. The two axes "
            "were cut anew instead of swapped."),
        Misconception("weights returned", _looks(mix=lambda w, k, v: w),
            "You returned the weights: one number for each pair of query and key. The last "
            "step is missing: mix the values with them."),
        Misconception("minus a billion", _attend_minus_a_billion,
            "Minus a billion does not fit into 16 bits, and a query that sees nothing gets an "
            "average. Compute scores in float32, fill with the dtype's own minimum."),
        Misconception("always float32", _looks(dtype=torch.float32),
            "The values came in 16 bits and the result has 32. Do the softmax in float32, "
            "then return to the dtype of the values."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Four steps, as in the drafts: scores, hide, softmax, mix. What is the shape of "
             "the scores when there are B texts and H heads?"),
        Hint("My shapes do not fit",
             "Scores have shape (B, H, T, S). A mask of shape (T, S) fits as it is; one of "
             "shape (B, T, S) needs an axis for the heads: unsqueeze(-3) serves both."),
        Hint("It is refused for a query that sees nothing, or for 16 bits",
             "1. scores in float32, over the root of D. 2. Fill hidden ones with "
             "torch.finfo(torch.float32).min. 3. Softmax over the last axis, then fill hidden "
             "weights with 0. 4. Weights to the dtype of v, then mix."),
    ),
    praise="This is the heart of every model in this course, and now it is yours.",
)


# ---------------------------------------------------------------- exercise: stable_softmax


def rows_of_different_size():
    (x,) = random_tensors(6, (3, 5))
    x = x * torch.tensor([[0.1], [10.0], [1e4]])
    x[1, 3], x[2, 1] = 90.0, 2e4
    return (x,)


def scores_of_two_heads():
    (x,) = random_tensors(7, (2, 3, 4, 5), scale=3.0)
    return (x,)


def hidden_and_equal_scores():
    return (torch.tensor([[2.0, -INF, 2.0, -INF], [-500.0, -498.0, -INF, -501.0]]),)


def _normalised(powers):
    return lambda x: (lambda e: e / e.sum(dim=-1, keepdim=True))(powers(x))


def _softmax_by_rows(x):
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        best = max(row)
        powers = [math.exp(value - best) for value in row]
        rows.append([p / sum(powers) for p in powers])
    return torch.tensor(rows).reshape(x.shape)


STABLE_SOFTMAX = Exercise(
    name="stable_softmax", chapter=2, kind="complete", entry="stable_softmax",
    title="A softmax for large scores", difficulty="easy", importance="essential", minutes=5,
    reference=_normalised(lambda x: (x - x.amax(dim=-1, keepdim=True)).exp()),
    fixtures=(rows_of_different_size, scores_of_two_heads, hidden_and_equal_scores),
    tolerance=1e-3,  # by log-sum-exp, which is right, scores of 20,000 keep three digits
    equivalents={
        "torch.softmax": lambda x: torch.softmax(x, dim=-1),
        "logsumexp": lambda x: (x - x.logsumexp(dim=-1, keepdim=True)).exp(),
        "log_softmax": lambda x: F.log_softmax(x, dim=-1).exp(),
        "row by row": _softmax_by_rows,
        "in double": _normalised(lambda x: (x.double() - x.double().max(-1, True)[0]).exp()),
    },
    misconceptions=(
        Misconception("no maximum subtracted", _normalised(lambda x: x.exp()),
            "NaN: the exponential of a large score is infinite, and infinite over infinite is "
            "no number. Make every score small first, without changing the result."),
        Misconception("one maximum for all rows", _normalised(lambda x: (x - x.max()).exp()),
            "A row of small scores becomes 0 over 0: the maximum was that of another row. "
            "Each row has a maximum of its own."),
        Misconception("maximum without its axis",
            lambda x: (x - x.amax(-1)).exp(),
            "The maximum lost the last axis, so a row no longer meets its own maximum. Keep "
            "that axis, with size 1."),
        Misconception("maximum with its places", lambda x: x - x.max(dim=-1, keepdim=True),
            "Along an axis, max gives two things: the largest values and their places. Only "
            "the values can be subtracted."),
        Misconception("maximum of the columns",
            _normalised(lambda x: (x - x.amax(-2, keepdim=True)).exp()),
            "The maximum was taken down the columns, so the rows change. Everything in one "
            "row must be shifted by the same number. Look at the axis."),
        Misconception("mean instead of maximum",
            _normalised(lambda x: (x - x.mean(-1, keepdim=True)).exp()),
            "The mean leaves large positive scores, and with a hidden score it is minus "
            "infinity. What must be subtracted, so that no exponent is above 0?"),
        Misconception("minimum instead of maximum",
            _normalised(lambda x: (x - x.amin(-1, keepdim=True)).exp()),
            "Now the smallest exponent is 0 and the largest is larger than before. It must be "
            "the other end of the row."),
        Misconception("scores cut off at 80", _normalised(lambda x: x.clamp(max=80).exp()),
            "Scores above the cut become equal, so the weights change. A shift keeps the "
            "differences between scores; a cut does not."),
        Misconception("divided by the maximum",
            _normalised(lambda x: (x / x.amax(-1, keepdim=True)).exp()),
            "Dividing changes the differences between scores, and so the weights. "
            "Subtracting the same number from all of a row does not."),
        Misconception("not normalised", lambda x: (x - x.amax(-1, keepdim=True)).exp(),
            "The largest weight is 1 and the rows sum to more. The last step is missing: "
            "divide by the sum of the row."),
        Misconception("sum of everything", lambda x: (lambda e: e / e.sum())(
                (x - x.amax(-1, keepdim=True)).exp()),
            "All weights together sum to 1. It should be each row by itself: sum along the "
            "last axis, and keep that axis."),
        Misconception("hidden scores replaced", lambda x: torch.softmax(torch.nan_to_num(
                x, neginf=0.0), dim=-1),
            "A hidden score, minus infinity, got weight. Its exponential is 0 by itself; leave "
            "it as it is."),
    ),
    hints=(
        Hint("I get NaN",
             "What is e to the power of 10,000 in float32? Which number could you subtract "
             "from a whole row so that this never happens?"),
        Hint("I get NaN in some rows only",
             "Softmax of (1, 2, 3) equals softmax of (-2, -1, 0). Subtract each row's own "
             "largest score: then the largest exponent is 0 and the sum at least 1."),
        Hint("The shapes do not fit",
             "amax(dim=-1, keepdim=True) keeps the last axis with size 1, so that it can be "
             "subtracted from every column of the row."),
    ),
    praise="No score is too large for it now. PyTorch's own softmax does the same.",
)


# ---------------------------------------------------------------- exercise: one_head_in_order


ONE_HEAD = Exercise(
    name="one_head_in_order", chapter=2, kind="order",
    title="One head, line by line", difficulty="easy", importance="essential", minutes=5,
    lines=(
        "q, k, v = x @ wq, x @ wk, x @ wv         # dim -> head_dim, three times",
        "scores = q @ k.transpose(-2, -1) / math.sqrt(head_dim)",
        "scores = scores.masked_fill(~mask, -torch.inf)",
        "weights = scores.softmax(dim=-1)",
        "look = weights @ v",
        "return look @ wo                         # head_dim -> dim",
    ),
    distractors=("scores = q @ k.transpose(-2, -1) / math.sqrt(dim)",),
    misconceptions=(
        Misconception("both scales", "with 1 and with 6",
            "The scores are computed twice, and the later line wins. Only one of the two scales "
            "belongs."),
        Misconception("mask after the softmax, and the wrong scale", "with 6 and 3 before 2",
            "Two slips: hidden keys take part in the softmax, and the scale follows the width of "
            "x instead of the size of the head."),
        Misconception("scaled by the model's width", "with 6",
            "The line with the width of x does not belong. A score is a sum of as many products "
            "as one head has numbers; the scale follows that."),
        Misconception("mask after the softmax", "3 before 2",
            "The softmax shares out its 1 before the mask hides anything, so hidden keys have had "
            "their share. What must come first?"),
        Misconception("no mask", "without 2",
            "The look into the future is still possible: one line that hides is missing."),
        Misconception("no way back", "without 5",
            "The result has the size of the head. One line is missing that brings it back to the "
            "width of x."),
        Misconception("scores before queries and keys", "1 before 0",
            "A score is a product of a query and a key, and they are not there yet. Which line "
            "makes them?"),
        Misconception("hidden before there are scores", "2 before 1",
            "The mask hides scores before there are any. Which line computes them?"),
        Misconception("mixed before the weights", "4 before 3",
            "The values are mixed with weights that are not there yet. The softmax makes them."),
        Misconception("returned before the look", "5 before 4",
            "The result is returned before the values are mixed. The way back to the width of x "
            "comes last."),
    ),
    hints=(
        Hint("I do not know which line is first",
             "Each line uses names. Which line uses only x and the weights?"),
        Hint("Two lines look alike",
             "With dim = 12 and a head of 4 numbers, a score is a sum of 4 products. Its "
             "size grows with the square root of how many?"),
        Hint("The order is still refused",
             "Project, score, hide, softmax, mix, project back: six steps."),
    ),
    praise="Project, score, hide, softmax, mix, project back.",
)


# ---------------------------------------------------------------- exercise: effective_keys


def weights_with_exact_zeros():
    (scores,) = random_tensors(8, (2, 3, 4, 6), scale=2.0)
    mask = causal(torch.arange(2, 6), torch.arange(6))
    return (scores.masked_fill(~mask, -INF).softmax(-1),)


def even_and_single_weights():
    return (torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0],
                          [0.5, 0.0, 0.25, 0.25, 0.0]]),)


def _entropy(weights):
    return -torch.special.xlogy(weights, weights).sum(dim=-1)


def _effective_by_loop(weights):
    rows = weights.reshape(-1, weights.shape[-1]).tolist()
    counts = [math.exp(-sum(w * math.log(w) for w in row if w > 0)) for row in rows]
    return torch.tensor(counts).reshape(weights.shape[:-1])


EFFECTIVE_KEYS = Exercise(
    name="effective_keys", chapter=2, kind="function", entry="effective_keys",
    title="How many keys does a query look at?", difficulty="medium", importance="useful",
    minutes=8,
    reference=lambda weights: _entropy(weights).exp(),
    fixtures=(weights_with_exact_zeros, even_and_single_weights),
    tolerance=1e-5,
    equivalents={
        "clamped logarithm": lambda w: (-(w * w.clamp(min=1e-30).log()).sum(-1)).exp(),
        "torch.special.entr": lambda w: torch.special.entr(w).sum(-1).exp(),
        "base two": lambda w: 2 ** -(w * torch.where(w > 0, w, 1.0).log2()).sum(-1),
        "product of powers": lambda w: (w ** -w).prod(-1),
        "nan_to_num": lambda w: (-(torch.nan_to_num(w * w.log())).sum(-1)).exp(),
        "loop": _effective_by_loop,
    },
    misconceptions=(
        Misconception("zero times minus infinity", lambda w: (-(w * w.log()).sum(-1)).exp(),
            "NaN wherever a weight is 0: zero times minus infinity. A key without weight adds "
            "nothing to the sum."),
        Misconception("not a number, replaced at the end",
            lambda w: torch.nan_to_num((-(w * w.log()).sum(-1)).exp()),
            "0 keys wherever one weight is 0: the whole sum was lost before you replaced it. "
            "Treat the zero weights before the sum."),
        Misconception("entropy, not its exponential", _entropy,
            "That is the entropy in nats: 0 for one key. The question was for a number of "
            "keys: 1 for one key. One step is missing."),
        Misconception("sign forgotten", lambda w: (-_entropy(w)).exp(),
            "The numbers are below 1: the sign of the sum is missing. Logarithms of weights "
            "are negative."),
        Misconception("two bases", lambda w: 2 ** _entropy(w),
            "Logarithm and power have different bases, so even weights on 4 keys do not give 4. "
            "Take the same base for both.",
            also=[lambda w: (_entropy(w) / math.log(2)).exp()]),
        Misconception("one over the sum of squares", lambda w: 1 / (w * w).sum(-1),
            "Right for even weights, another measure for all others: squares instead of "
            "logarithms. Use the entropy."),
        Misconception("weights counted", lambda w: (w > 0).sum(-1).float(),
            "Each weight above 0 counts fully, however small. A key with weight 0.001 should "
            "add almost nothing."),
        Misconception("summed over the queries",
            lambda w: (-torch.special.xlogy(w, w).sum(-2)).exp(),
            "You summed over the queries. One query is one row; its keys are the last axis."),
        Misconception("one number for all", lambda w: _entropy(w).mean().exp(),
            "One number came out for everything. Each query has its own: sum over the last axis "
            "only, the keys, and leave the queries as they are.",
            also=[lambda w: (-torch.special.xlogy(w, w).sum()).exp()]),
        Misconception("a constant added inside the logarithm",
            lambda w: (-(w * (w + 1e-3).log()).sum(-1)).exp(),
            "Nearly right: a constant inside the logarithm shifts every weight. Treat the "
            "zeros apart, and leave the others as they are."),
    ),
    hints=(
        Hint("I do not know the formula",
             "Entropy is the mean of minus the logarithm of a weight, each weight counted by "
             "itself. What is it for four weights of 0.25?"),
        Hint("I get NaN",
             "0 times log 0 counts as 0 here, but a computer says NaN. torch.special.xlogy(w, "
             "w) is w log w with that rule built in."),
        Hint("I get 1.386 where 4 is wanted",
             "Three steps: w log w; minus the sum over the last axis; the exponential of that. "
             "1.386 is the logarithm of 4."),
    ),
    praise="Now a whole map fits into one number for each query.",
)


# ---------------------------------------------------------------- exercise: attend_in_pieces


def three_pieces_of_unequal_length():
    q, k, v = random_tensors(9, (3, 4), (9, 3, 4), (9, 3, 4), scale=1.5)
    return q, [(k[:2], v[:2]), (k[2:7], v[2:7]), (k[7:], v[7:])]


def large_scores_that_rise_and_fall():
    q, k, v = random_tensors(10, (3, 4), (11, 3, 4), (11, 3, 4))
    k = 80 * k * torch.linspace(0.1, 1, 11).roll(4)[:, None, None]
    return q, [(k[i : i + 3], v[i : i + 3]) for i in range(0, 11, 3)]


def one_piece_only():
    q, k, v = random_tensors(11, (2, 6), (5, 2, 6), (5, 2, 6))
    return q, [(k, v)]


def _pieces_at(seed, levels):
    """Pieces of 2, 4 and 1 keys; the scores of each head lie around its level."""
    q, k, v = random_tensors(seed, (3, 4), (7, 3, 4), (7, 3, 4))
    to_level = q / (q * q).sum(-1, keepdim=True) * math.sqrt(q.shape[-1])
    k = k + torch.tensor(levels)[:, None] * to_level
    return q, list(zip(k.split([2, 4, 1]), v.split([2, 4, 1])))


def scores_far_below_zero():
    return _pieces_at(22, [-150.0, -160.0, -155.0])


def heads_of_different_size():
    return _pieces_at(23, [60.0, 0.0, -60.0])


def _scores(q, k):
    return torch.einsum("hd,shd->hs", q, k) / math.sqrt(q.shape[-1])


def _stream(q, pieces, *, rescale_sum=True, rescale_mix=True, keep_best=True, shift=True,
            scale=True, start=-1e30, one_best=False, turned=False):
    best = torch.full(q.shape[:1], start)                             # (H,)
    total, mixed = torch.zeros(q.shape[:1]), torch.zeros(q.shape)     # (H,), (H, D)
    for k, v in pieces:
        scores = _scores(q, k) * (1 if scale else math.sqrt(q.shape[-1]))
        new = scores.amax(-1)
        new = torch.maximum(best, new) if keep_best else new
        new = new.amax().expand_as(new) if one_best else new
        new = new if shift else torch.zeros_like(new)
        shrink = (best - new).exp() if shift else torch.ones_like(new)
        shrink = 1 / shrink if turned else shrink
        powers = (scores - new[:, None]).exp()                        # (H, n)
        total = total * (shrink if rescale_sum else 1) + powers.sum(-1)
        mixed = mixed * (shrink[:, None] if rescale_mix else 1)
        mixed = mixed + torch.einsum("hs,shd->hd", powers, v)
        best = new
    return mixed / total[:, None]


def _whole(q, pieces):
    k, v = (torch.cat(parts) for parts in zip(*pieces))
    return torch.einsum("hs,shd->hd", _scores(q, k).softmax(-1), v)


def _answers(q, pieces):
    """Each piece's own answer, its log-sum-exp and its length."""
    for k, v in pieces:
        scores = _scores(q, k)
        look = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
        yield look, scores.logsumexp(-1), len(k)


def _by_logsumexp(q, pieces):
    looks, sizes, _ = zip(*_answers(q, pieces))
    shares = torch.stack(sizes).softmax(0)                            # (pieces, H)
    return (torch.stack(looks) * shares[..., None]).sum(0)


def _two_passes(q, pieces):
    best = torch.stack([_scores(q, k).amax(-1) for k, _ in pieces]).amax(0)
    total, mixed = 0.0, 0.0
    for k, v in pieces:
        powers = (_scores(q, k) - best[:, None]).exp()
        total, mixed = total + powers.sum(-1), mixed + torch.einsum("hs,shd->hd", powers, v)
    return mixed / total[:, None]


def _mean_of_pieces(q, pieces):
    return torch.stack([look for look, _, _ in _answers(q, pieces)]).mean(0)


def _divided_each_time(q, pieces):
    best = torch.full(q.shape[:1], -1e30)
    total, mixed = torch.zeros(q.shape[:1]), torch.zeros(q.shape)
    for k, v in pieces:
        scores = _scores(q, k)
        new = torch.maximum(best, scores.amax(-1))
        shrink, powers = (best - new).exp(), (scores - new[:, None]).exp()
        total = total * shrink + powers.sum(-1)
        mixed = mixed * shrink[:, None] + torch.einsum("hs,shd->hd", powers, v)
        mixed, best = mixed / total[:, None], new
    return mixed


IN_PIECES = Exercise(
    name="attend_in_pieces", chapter=2, kind="function", entry="attend_in_pieces",
    title="A look that never holds all the keys", difficulty="hard", importance="useful",
    minutes=15,
    reference=_stream,
    fixtures=(three_pieces_of_unequal_length, large_scores_that_rise_and_fall, one_piece_only,
              scores_far_below_zero, heads_of_different_size),
    equivalents={
        "all keys put together": _whole,
        "shares by log-sum-exp": _by_logsumexp,
        "two passes": _two_passes,
    },
    misconceptions=(
        Misconception("mean of the pieces' answers", _mean_of_pieces,
            "Every piece counts the same, even one whose keys fit badly. A piece counts as "
            "much as the sum of its exponentials."),
        Misconception("only the last piece",
            lambda q, pieces: list(_answers(q, pieces))[-1][0],
            "The result is that of the last piece alone. What was gathered before must be "
            "kept: a sum of exponentials and a sum of weighted values."),
        Misconception("nothing rescaled",
            lambda q, pieces: _stream(q, pieces, rescale_sum=False, rescale_mix=False),
            "Sums of different pieces were measured against different maxima. When the maximum "
            "changes, bring what was gathered to the new one first.",
            also=[lambda q, pieces: _stream(q, pieces, rescale_sum=False, rescale_mix=False,
                      keep_best=False)]),
        Misconception("factor turned over",
            lambda q, pieces: _stream(q, pieces, turned=True),
            "Everything is NaN. When the maximum rises, the factor for the old sums must be "
            "below 1: the old maximum minus the new one, in this order."),
        Misconception("maximum starts at 0",
            lambda q, pieces: _stream(q, pieces, start=0.0),
            "Scores far below zero give 0 over 0: your maximum starts at 0, and none of them "
            "reaches it. Start lower than any score."),
        Misconception("one maximum for all heads",
            lambda q, pieces: _stream(q, pieces, one_best=True),
            "A head with small scores gives 0 over 0: it was measured against another head's "
            "maximum. Each head has a maximum of its own."),
        Misconception("only one sum rescaled",
            lambda q, pieces: _stream(q, pieces, rescale_mix=False),
            "Only one of the two sums was rescaled to the new maximum. Both, of exponentials and "
            "of values, were measured against the old one.",
            also=[lambda q, pieces: _stream(q, pieces, rescale_sum=False)]),
        Misconception("no maximum",
            lambda q, pieces: _stream(q, pieces, shift=False),
            "NaN for large scores: their exponentials are infinite. Keep a running maximum "
            "and subtract it first."),
        Misconception("maximum of the last piece",
            lambda q, pieces: _stream(q, pieces, keep_best=False),
            "When the scores fall again, the old sums grow without limit. The maximum is the "
            "largest of all pieces so far, not of the newest."),
        Misconception("divided after every piece", _divided_each_time,
            "The first pieces count too little: they were divided by a sum before the next "
            "piece was added. Divide once, after the last piece."),
        Misconception("no scale", lambda q, pieces: _stream(q, pieces, scale=False),
            "The weights are too sharp: the scores were not divided by the square root of "
            "the head size."),
    ),
    hints=(
        Hint("I do not know what to keep",
             "Softmax is a sum of exponentials times values, divided by a sum of exponentials. "
             "Which two sums could you carry from piece to piece?"),
        Hint("It is right for small scores only",
             "Carry a maximum, too. If it rises from 3 to 5, everything gathered so far was "
             "too large by e to the power of 2: multiply it by exp(3 - 5)."),
        Hint("I cannot put it together",
             "Start: best = -1e30, total = 0, mixed = 0. For each piece: scores; the new best; "
             "shrink = exp(best - new); shrink both sums; add the piece's. At the end "
             "mixed / total."),
    ),
    praise="This is the idea inside FlashAttention: one pass, no table of T times S.",
)


# ---------------------------------------------------------------- exercise: look (a bug)


def seven_tokens_of_one_head():
    q, k, v = random_tensors(12, (7, 4), (7, 4), (7, 5), scale=1.3)
    return q, k, v, causal(torch.arange(7), torch.arange(7))


def a_chunk_of_three_queries():
    q, k, v = random_tensors(13, (3, 4), (8, 4), (8, 5), scale=1.3)
    return q, k, v, causal(torch.arange(5, 8), torch.arange(8))


def _one_look(soften, scale=2.0, turn=False):
    def look(q, k, v, mask):
        scores = q @ k.T / scale
        if turn:
            mask = ~mask
        return soften(scores.masked_fill(~mask, -INF)) @ v
    return look


def _rows_divided_again(scores):
    weights = scores.softmax(0).nan_to_num()
    return weights / weights.sum(-1, keepdim=True)


LOOK = Exercise(
    name="look", chapter=2, kind="bug", entry="look",
    title="The mask is right and yet it leaks", difficulty="medium", importance="essential",
    minutes=8,
    reference=_one_look(lambda scores: scores.softmax(-1)),
    fixtures=(seven_tokens_of_one_head, a_chunk_of_three_queries),
    equivalents={
        "exponentials": lambda q, k, v, mask: (lambda e: e / e.sum(1, keepdim=True) @ v)(
            (q @ k.T / math.sqrt(q.shape[-1])).exp() * mask),
        "transposed scores": lambda q, k, v, mask: (
            (k @ q.T / math.sqrt(q.shape[-1])).masked_fill(~mask.T, -INF).softmax(0).T @ v),
        "scaled_dot_product_attention": lambda q, k, v, mask: F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask)[0],
    },
    misconceptions=(
        Misconception("unchanged", _one_look(lambda scores: scores.softmax(0).nan_to_num()),
            "A later token still changes an earlier row. Which numbers does one softmax put "
            "into one sum: those of one query, or those of all queries?"),
        Misconception("rows divided once more", _one_look(_rows_divided_again),
            "The rows sum to 1 now, but the first softmax still mixes all queries, so the "
            "leak is only hidden. One softmax is enough."),
        Misconception("softmax over the whole table",
            _one_look(lambda s: s.flatten().softmax(0).reshape(s.shape)),
            "All pairs of query and key share a single 1. Each query has a 1 of its own to "
            "share out."),
        Misconception("mask turned over",
            _one_look(lambda scores: scores.softmax(-1).nan_to_num(), turn=True),
            "Now each query sees only the future. The mask was right: True means may attend. "
            "The slip is in another line."),
        Misconception("mask turned over, softmax as it was",
            lambda q, k, v, mask: (q @ k.T / 2).masked_fill(mask, -INF).softmax(0) @ v,
            "The mask was right: True means may attend. Put its line back, and see along which "
            "axis the weights sum to 1."),
        Misconception("mask laid on its side",
            lambda q, k, v, mask: (q @ k.T / 2).masked_fill(~mask.T, -INF).softmax(0) @ v,
            "The mask lies on its side now: rows are queries, as in the scores. It was right "
            "before; the slip is in another line."),
        Misconception("scale lost", _one_look(lambda scores: scores.softmax(-1), scale=1.0),
            "The leak is gone, but so is the scale: the weights are too sharp. Divide the "
            "scores by the square root of the head size."),
        Misconception("mask moved behind the softmax",
            lambda q, k, v, mask: (q @ k.T / 2).softmax(-1).masked_fill(~mask, 0.0) @ v,
            "A later key still takes its share in the softmax before it is hidden, so earlier "
            "rows change. Hide the scores first."),
        Misconception("mask left out",
            lambda q, k, v, mask: (q @ k.T / 2).softmax(-1) @ v,
            "Without the mask every token reads its future. The line with the mask was "
            "right."),
    ),
    hints=(
        Hint("The mask looks right to me",
             "It is. Print the weights and add them up along each axis. Which sums are 1?"),
        Hint("Why can a column leak?",
             "A column holds one key and all queries. If they share a sum, the query at "
             "position 6 changes the divisor of the query at position 2."),
        Hint("I do not know what to change",
             "One number in one line: the axis of the softmax. The last axis counts the "
             "keys."),
    ),
    praise="A right mask is not enough: the softmax, too, must stay within one query.",
)


# ---------------------------------------------------------------- exercise: multi_head (a bug)


def three_heads_of_four():
    wide = [(2, 5, 9), (9, 12), (9, 12), (9, 12), (12, 9)]
    x, wq, wk, wv, wo = random_tensors(14, *wide, scale=0.6)
    return x, wq, wk, wv, wo, 3


def five_heads_of_two():
    wide = [(3, 4, 15), (15, 10), (15, 10), (15, 10), (10, 15)]
    x, wq, wk, wv, wo = random_tensors(15, *wide, scale=0.7)
    return x, wq, wk, wv, wo, 5


def _swapped(x, n_heads):
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)            # (B, H, T, D)


def _cut(x, n_heads):
    return x.reshape(x.shape[0], n_heads, x.shape[1], -1)            # wrong: (B, H, T, D)


SWAPS = {"numbers forward": (2, 3), "numbers first": (1, 3)}


def _heads(split=_swapped, merge="swap", scale="head", hide=True, way_back=True):
    def multi_head(x, wq, wk, wv, wo, n_heads):
        B, T, _ = x.shape
        q, k, v = (split(x @ w, n_heads) for w in (wq, wk, wv))
        size = {"head": q.shape[-1], "model": x.shape[-1], "all": wq.shape[-1],
                "none": 1, "squared": q.shape[-1] ** 2, "share": x.shape[-1] / n_heads,
                "tokens": T, "count": n_heads}[scale]
        scores = q @ k.transpose(-2, -1) / math.sqrt(size)
        if hide:
            mask = causal(torch.arange(T), torch.arange(T))
            scores = scores.masked_fill(~mask, -INF)
        look = scores.softmax(-1) @ v                                # (B, H, T, D)
        if merge == "swap":
            look = look.transpose(1, 2).reshape(B, T, -1)
        elif merge == "cut":
            look = look.reshape(B, T, -1)
        elif merge in SWAPS:
            look = look.transpose(*SWAPS[merge]).reshape(B, T, -1)
        elif merge == "open":
            look = look.transpose(1, 2)
        else:
            look = look.permute(0, 2, 3, 1).reshape(B, T, -1)
        return look @ wo if way_back else look
    return multi_head


def _heads_one_by_one(x, wq, wk, wv, wo, n_heads):
    size = wq.shape[-1] // n_heads
    mask = causal(torch.arange(x.shape[1]), torch.arange(x.shape[1]))
    looks = []
    for h in range(n_heads):
        part = slice(h * size, (h + 1) * size)
        q, k, v = x @ wq[:, part], x @ wk[:, part], x @ wv[:, part]
        scores = (q @ k.transpose(-2, -1) / size ** 0.5).masked_fill(~mask, -INF)
        looks.append(scores.softmax(-1) @ v)
    return torch.cat(looks, dim=-1) @ wo


def _heads_by_attend(x, wq, wk, wv, wo, n_heads):
    q, k, v = ((x @ w).unflatten(-1, (n_heads, -1)) for w in (wq, wk, wv))
    mask = causal(torch.arange(x.shape[1]), torch.arange(x.shape[1]))
    return attend(q, k, v, mask).flatten(-2) @ wo


MULTI_HEAD = Exercise(
    name="multi_head", chapter=2, kind="bug", entry="multi_head",
    title="Two slips in many heads", difficulty="hard", importance="essential", minutes=12,
    reference=_heads(),
    fixtures=(three_heads_of_four, five_heads_of_two),
    equivalents={
        "head by head": _heads_one_by_one,
        "the library's attend": _heads_by_attend,
    },
    misconceptions=(
        Misconception("unchanged", _heads(merge="cut", scale="model"),
            "Both slips are still there. One mixes tokens where the heads are joined; the "
            "other makes the weights too even."),
        Misconception("only the scale repaired", _heads(merge="cut"),
            "The scale is right now. Still a token sees others it should not: where the heads "
            "are joined, the head axis stands before the token axis."),
        Misconception("only the joining repaired", _heads(scale="model"),
            "Nothing leaks any more. Still the weights are too even: a score sums over one "
            "head, so the scale must not follow the width of x."),
        Misconception("scaled by another width", _heads(scale="all"),
            "Nothing leaks any more. The scale still follows a width; a score is a sum over the "
            "numbers of one head. Ask q for its last axis.",
            also=[_heads(scale="share")]),
        Misconception("joining repaired, scale lost", _heads(scale="none"),
            "The heads are joined well. The weights are too sharp now: the scores must be "
            "divided by the root of one head's size."),
        Misconception("divided by the head size", _heads(scale="squared"),
            "The weights are too even: you divided by the head size itself. The rule says "
            "its square root."),
        Misconception("heads cut by view where they are split", _heads(split=_cut),
            "Where the heads are split, tokens and heads are mixed now. That line was right: "
            "first split the last axis, then swap."),
        Misconception("numbers of the heads interleaved", _heads(merge="interleave"),
            "Tokens no longer mix, but the numbers of the heads are shuffled within a token. "
            "Heads stand one after the other: swap two axes only."),
        Misconception("other axes swapped", _heads(merge="numbers forward"),
            "The scale is right now. You swapped another pair of axes, so tokens still mix. "
            "Which two must change places, so that each token holds all its heads?",
            also=[_heads(merge="numbers first")]),
        Misconception("heads not joined", _heads(merge="open"),
            "The heads still have an axis of their own, so the output matrix does not fit. "
            "After the swap, join the last two axes."),
        Misconception("mask left out", _heads(hide=False),
            "Every token reads its future now. The mask was right; keep it."),
    ),
    hints=(
        Hint("I see no slip",
             "Change the last token of x and print how much each earlier output moves. In a "
             "causal model none may move. In which line could tokens meet?"),
        Hint("A token moves though the mask is right",
             "Memory holds (B, H, T, D) head after head. Reshaping that to (B, T, H * D) "
             "gives token 0 the numbers of head 0 for several tokens."),
        Hint("One slip is left",
             "Before joining, swap axes 1 and 2. And the scale: a score is a sum over D, the "
             "last axis of q, so divide by its root."),
    ),
    praise="Two lines, and no shape error would ever have shown them.",
)


# ---------------------------------------------------------------- exercise: switch_off


def _small_model(seed: int, layers: int = 3, heads: int = 6) -> Transformer:
    config = ModelConfig(dim=20, n_layers=layers, n_heads=heads, n_kv_heads=2, head_dim=4,
                         hidden_dim=28, vocab_size=40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data.mul_(12)  # far from the small start of training
    return model  # its weights want gradients, as those of a loaded model do


def a_head_in_the_middle():
    return _small_model(16), torch.tensor([[3, 9, 27, 1, 5], [8, 8, 2, 39, 0]]), 1, 4


def the_first_head_of_the_last_layer():
    return _small_model(17), torch.tensor([[30, 2, 2, 11, 7, 6]]), 2, 0


def _run_switch_off(candidate, model, ids, layer, head):
    """The logits without the head, and those of the model that was handed in, afterwards."""
    silenced = candidate(model, layer, head)
    with torch.no_grad():
        return silenced(ids), model(ids)


def _edited(edit, *, in_place=False):
    def switch_off(model, layer, head):
        silent = model if in_place else copy.deepcopy(model)
        size = model.config.head_dim
        with torch.no_grad():
            edit(silent.layers[layer].attention, slice(head * size, (head + 1) * size), head)
        return silent
    return switch_off


def _zero_columns(attention, part, head):
    attention.wo.weight[:, part] = 0


def _zero_rows(attention, part, head):
    attention.wo.weight[part] = 0


def _zero_queries(attention, part, head):
    attention.wq.weight[part] = 0


def _zero_values(attention, part, head):
    group = 3  # query heads that share one key/value head, in the fixtures' model
    size = part.stop - part.start
    attention.wv.weight[head // group * size : (head // group + 1) * size] = 0


def _zero_width_over_heads(attention, part, head):
    size = attention.wo.weight.shape[0] // 6
    attention.wo.weight[:, head * size : (head + 1) * size] = 0


def _zero_all(attention, part, head):
    attention.wo.weight[:] = 0


def _zero_without_brackets(attention, part, head):
    attention.wo.weight[:, part.start : head + (part.stop - part.start)] = 0


def _switch_off_while_recording(model, layer, head):
    silent = copy.deepcopy(model)
    size = model.config.head_dim
    silent.layers[layer].attention.wo.weight[:, head * size : (head + 1) * size] = 0
    return silent


def _wrong_one_of_two(model, layer, head):
    silent = copy.deepcopy(model)
    _edited(_zero_columns, in_place=True)(model, layer, head)
    return silent


def _nothing_returned(model, layer, head):
    _edited(_zero_columns)(model, layer, head)


def _switch_off_by_hook(model, layer, head):
    silent = copy.deepcopy(model)
    size = model.config.head_dim

    def without(module, inputs):
        x = inputs[0].clone()
        x[..., head * size : (head + 1) * size] = 0
        return (x,)

    silent.layers[layer].attention.wo.register_forward_pre_hook(without)
    return silent


def _switch_off_by_state(model, layer, head):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    size = model.config.head_dim
    state[f"layers.{layer}.attention.wo.weight"][:, head * size : (head + 1) * size] = 0
    silent = copy.deepcopy(model)
    silent.load_state_dict(state)
    return silent


SWITCH_OFF = Exercise(
    name="switch_off", chapter=2, kind="function", entry="switch_off",
    title="Switch one head off", difficulty="medium", importance="essential", minutes=10,
    reference=_edited(_zero_columns),
    fixtures=(a_head_in_the_middle, the_first_head_of_the_last_layer),
    run=_run_switch_off,
    may_change_inputs=True,  # the second output shows a changed model
    equivalents={
        "a hook before wo": _switch_off_by_hook,
        "a changed state": _switch_off_by_state,
    },
    misconceptions=(
        Misconception("the original changed", _edited(_zero_columns, in_place=True),
            "The head is off, but in the original, too: the model you were given has changed. "
            "Work on a copy."),
        Misconception("rows instead of columns", _edited(_zero_rows),
            "You cleared rows of the output matrix: part of what all heads write. A head "
            "enters through columns, as nn.Linear stores outputs first."),
        Misconception("queries cleared", _edited(_zero_queries),
            "A head without queries still looks: all its scores are 0, so it averages all "
            "keys. It must add nothing at the end."),
        Misconception("values cleared", _edited(_zero_values),
            "In this model several query heads share one value head, so you switched off all "
            "of them. Work behind the heads, where each has its own place."),
        Misconception("head size from the width", _edited(_zero_width_over_heads),
            "The wrong columns were cleared: a head's size need not be the width over the "
            "number of heads. The configuration says it."),
        Misconception("all heads of the layer", _edited(_zero_all),
            "The whole layer is silent. Clear only the columns of one head."),
        Misconception("the next head",
            lambda model, layer, head: _edited(_zero_columns)(model, layer, head + 1),
            "The neighbour of the head was silenced. Heads count from 0, so head 0 has the "
            "first columns."),
        Misconception("brackets missing", _edited(_zero_without_brackets),
            "Head 0 is right, the others are not: a product is computed before a sum. Look at "
            "where the columns of the head end."),
        Misconception("written while recording", _switch_off_while_recording,
            "PyTorch does not let you write into a weight while it records for gradients. "
            "Switch the recording off for that line."),
        Misconception("the wrong one of the two", _wrong_one_of_two,
            "The copy still has the head, and the original has lost it. Write into the copy."),
        Misconception("nothing returned", _nothing_returned,
            "No model came back. The function must return the copy."),
        Misconception("nothing changed", lambda model, layer, head: copy.deepcopy(model),
            "The copy gives the same numbers as the model: nothing was silenced. Was the "
            "right tensor written to, and in place?"),
    ),
    hints=(
        Hint("I do not know where a head lives",
             "All heads of a layer are joined side by side and then multiplied by one matrix, "
             "attention.wo. Which part of that matrix does only this head meet?"),
        Hint("The wrong numbers change",
             "wo.weight has shape (dim, H * D): outputs first, inputs second. Head h is "
             "inputs h * D up to (h + 1) * D."),
        Hint("The original changes as well",
             "copy.deepcopy(model) first. Then, under torch.no_grad(), set the columns of "
             "the copy's layers[layer].attention.wo.weight to 0. Return the copy."),
    ),
    praise="Now you can ask of any head: what would be missing without you?",
)


# ---------------------------------------------------------------- exercise: head_effects


def a_question_to_a_small_model():
    return _small_model(21, layers=2, heads=4), torch.tensor([4, 19, 33, 7, 12]), 21


@torch.no_grad()
def _probability(model, ids, answer, at=-1):
    return model(ids[None])[0, at].softmax(-1)[answer].item()


def _effects(measure=_probability, change=lambda before, after: before - after, copied=True):
    def head_effects(model, ids, answer):
        before = measure(model, ids, answer)
        model = copy.deepcopy(model)
        rows = []
        for layer in range(model.config.n_layers):
            rows.append([])
            for head in range(model.config.n_heads):
                silent = _edited(_zero_columns, in_place=not copied)(model, layer, head)
                rows[-1].append(change(before, measure(silent, ids, answer)))
        return torch.tensor(rows)
    return head_effects


@torch.no_grad()
def _logit(model, ids, answer):
    return model(ids[None])[0, -1, answer].item()


def _log_probability(model, ids, answer):
    return math.log(_probability(model, ids, answer))


@torch.no_grad()
def _batch_built_anew(model, ids, answer):
    return model(torch.tensor([ids]))[0, -1].softmax(-1)[answer].item()


@torch.no_grad()
def _over_positions(model, ids, answer):
    return model(ids[None])[0, :, answer].softmax(0)[-1].item()


HEAD_EFFECTS = Exercise(
    name="head_effects", chapter=2, kind="open", entry="head_effects",
    title="Which head carries the answer?", difficulty="medium", importance="useful",
    minutes=20,
    reference=_effects(),
    fixtures=(a_question_to_a_small_model,),
    tolerance=1e-4,
    misconceptions=(
        Misconception("after minus before", _effects(change=lambda before, after: after - before),
            "The sign is turned round. A head that helps should have a positive effect: the "
            "probability with it minus the probability without it."),
        Misconception("heads stay off", _effects(copied=False),
            "The effects pile up: each head was silenced on top of those before it. Start "
            "from the whole model every time."),
        Misconception("logits", _effects(measure=_logit),
            "These are differences of logits. The question is about the probability: a "
            "softmax over the vocabulary is missing."),
        Misconception("softmax over the positions", _effects(measure=_over_positions),
            "The softmax ran over the positions of the text. The vocabulary is the last "
            "axis."),
        Misconception("another position", _effects(
                measure=lambda model, ids, answer: _probability(model, ids, answer, at=0)),
            "That is the prediction after another token. The answer follows the last one of ids: "
            "take the prediction at the last position.",
            also=[_effects(
                      measure=lambda model, ids, answer: _probability(model, ids, answer, at=-2))]),
        Misconception("logarithms", _effects(measure=_log_probability),
            "These are differences of logarithms. The question is about the probability "
            "itself: a softmax, without the logarithm."),
        Misconception("share that is lost", _effects(
                change=lambda before, after: (before - after) / before),
            "This is the lost share of the probability. The task asks for the fall itself: a "
            "difference, divided by nothing."),
        Misconception("a tensor of a tensor", _effects(measure=_batch_built_anew),
            "The ids are a tensor already. To make them a batch of one text, add an axis in "
            "front."),
        Misconception("probability without the head", _effects(change=lambda before, after: after),
            "This is the probability without each head. Subtract it from the one of the "
            "whole model."),
        Misconception("size of the change",
            _effects(change=lambda before, after: abs(before - after)),
            "The sign is lost. A head may also stand in the way; its effect is negative."),
    ),
    hints=(
        Hint("I do not know where to start",
             "What is the probability of the answer after the last token, with every head at "
             "work? Which function gives you a model without one head?"),
        Hint("The numbers are far too small or too large",
             "The model gives logits of shape (1, T, V). The softmax runs over V, and the row "
             "that counts is the last one, -1."),
        Hint("I cannot put it together",
             "Two loops, over layers and heads. Inside: silent = switch_off(model, layer, "
             "head); the fall is the probability of the model minus that of silent."),
    ),
    praise="An experiment, not a picture: this is what the map could not tell.",
)


EXERCISES = [CAUSAL, ATTEND, STABLE_SOFTMAX, ONE_HEAD, EFFECTIVE_KEYS, IN_PIECES, LOOK,
             MULTI_HEAD, SWITCH_OFF, HEAD_EFFECTS]
