"""Chapter 6, generation and cache: three core pieces, the memory of a layer, and its exercises."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.cache import KVCache
from minimistral.config import ModelConfig
from minimistral.generate import generate
from minimistral.model import Transformer
from minimistral.sampling import draw, keep_top_k, keep_top_p

from ..exercises import Exercise, Hint, Misconception

INF = float("inf")


def _logits(seed: int, *shape: int) -> Tensor:
    """Scores without a zero mean, whose rows differ in size."""
    chance = torch.Generator().manual_seed(seed)
    size = 1 + 2 * torch.rand((*shape[:-1], 1), generator=chance)
    return size * torch.randn(shape, generator=chance) + 0.3


# ---------------------------------------------------------------- piece: draw


def the_three_places():
    chances = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]])
    return chances, torch.tensor([0.6, 0.95])


def rows_with_impossible_tokens():
    chances = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
                            [0.5, 0.0, 0.0, 0.125, 0.375, 0.0], [0.25, 0.25, 0.0, 0.25, 0.0, 0.25]])
    return chances, torch.tensor([0.0, 0.999, 0.5, 0.25])


def rows_whose_sums_are_rounded():
    chances = torch.tensor([[0.2, 0.3, 0.4, 0.09, 0.0], [0.3, 0.3, 0.2, 0.2, 0.01]])
    return chances, torch.tensor([0.995, 0.596])


def eight_rows_of_eleven_tokens():
    chance = torch.Generator().manual_seed(3)
    return _logits(2, 8, 11).softmax(-1), torch.rand(8, generator=chance)


def one_row_only():
    return torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([0.45])


def _drawn(pick):
    def draw(probabilities, uniforms):
        running = probabilities.double().cumsum(-1)
        return pick(probabilities, running, uniforms.double()[:, None])
    return draw


def _draw_by_loop(probabilities, uniforms):
    found = []
    for row, u in zip(probabilities.double().tolist(), uniforms.double().tolist()):
        target, total = u * sum(row), 0.0
        for i, p in enumerate(row):
            total += p
            if total > target:
                break
        found.append(i)
    return torch.tensor(found)


def _steadily(candidate, probabilities, uniforms):
    """Torch's own chance begins at the same place, so that a function that uses it repeats."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return candidate(probabilities, uniforms)


DRAW = Exercise(
    name="draw", chapter=6, kind="piece", piece="sampling.draw", entry="draw",
    title="To draw a token", difficulty="medium", importance="essential", minutes=8,
    reference=draw, run=_steadily,
    fixtures=(the_three_places, rows_with_impossible_tokens, rows_whose_sums_are_rounded,
              eight_rows_of_eleven_tokens, one_row_only),
    equivalents={
        "count the sums passed": _drawn(lambda p, r, u: (r <= u * r[:, -1:]).sum(-1)),
        "first True": _drawn(lambda p, r, u: (r > u * r[:, -1:]).long().argmax(-1)),
        "scaled probabilities": _drawn(lambda p, r, u: torch.searchsorted(
            r / r[:, -1:], u, right=True)[:, 0]),
        "bucketize by rows": lambda probabilities, uniforms: torch.stack([torch.bucketize(
            u * p.double().sum(), p.double().cumsum(0), right=True)
            for p, u in zip(probabilities, uniforms.double())]),
        "loop": _draw_by_loop,
    },
    misconceptions=(
        Misconception("the likeliest", _drawn(lambda p, r, u: p.argmax(-1)),
            "The likeliest token came out, whatever the number was. The number decides: it falls "
            "into one of the pieces of the line."),
        Misconception("no running sum", _drawn(lambda p, r, u: (p > u).long().argmax(-1)),
            "You compared the number with single probabilities. The pieces lie one after the "
            "other, so compare it with their running sum."),
        Misconception("nearest running sum", _drawn(lambda p, r, u: (r - u).abs().argmin(-1)),
            "You took the nearest running sum, above or below. It must be the first one that "
            "is greater than the number."),
        Misconception("the last sum below",
            _drawn(lambda p, r, u: ((r <= u).sum(-1) - 1).clamp(min=0)),
            "You are one token early: the last sum that is below the number. It must be the first "
            "that is greater."),
        Misconception("equal is enough", _drawn(lambda p, r, u: torch.searchsorted(
                r, u * r[:, -1:], right=False)[:, 0]),
            "A token with probability 0 can be chosen by the number 0. The running sum must be "
            "greater than the number, not only equal.",
            also=[_drawn(lambda p, r, u: torch.searchsorted(
                      r, u)[:, 0])]),
        Misconception("not scaled", _drawn(lambda p, r, u: torch.searchsorted(
                r, u, right=True)[:, 0]),
            "Where rounded probabilities sum to less than 1, a number near 1 finds no token, or "
            "a wrong one. Scale the number by the row's last running sum.",
            also=[_drawn(lambda p, r, u: (r > u).long().argmax(-1)),
                  _drawn(lambda p, r, u: (r <= u).sum(-1).clamp(max=p.shape[-1] - 1))]),
        Misconception("sums down the batch", lambda probabilities, uniforms: (
                lambda r: torch.searchsorted(r, uniforms.double()[:, None] * r[:, -1:],
                                             right=True)[:, 0])(probabilities.double().cumsum(0)),
            "The sums ran down the batch, from text to text. Each row is one line from 0 to 1: sum "
            "along the last axis."),
        Misconception("one number for all", _drawn(lambda p, r, u: (
                r > u[0] * r[:, -1:]).long().argmax(-1)),
            "All rows used the first number. Each row has its own; give the numbers a second axis, "
            "so that row meets row."),
        Misconception("sorted first", _drawn(lambda p, r, u: p.sort(-1, descending=True)[1].gather(
                -1, (p.sort(-1, descending=True)[0].double().cumsum(-1) > u * r[:, -1:]
                     ).long().argmax(-1, keepdim=True))[:, 0]),
            "You sorted the tokens first. The shares are right, but the same seed must give the "
            "same token: keep the order of the vocabulary."),
        Misconception("torch's own chance", lambda probabilities, uniforms: torch.multinomial(
                probabilities, 1)[:, 0],
            "The result does not depend on the numbers that were given: it was drawn anew. Use the "
            "numbers, so that a seed can repeat a text."),
        Misconception("an axis left over", _drawn(lambda p, r, u: torch.searchsorted(
                r, u * r[:, -1:], right=True)),
            "The tokens are right, but the result has an axis too many: one number for each row is "
            "wanted and nothing else."),
        Misconception("booleans", _drawn(lambda p, r, u: r > u * r[:, -1:]),
            "That is the comparison itself, a row of True and False. Wanted is the place of the "
            "first True in each row."),
        Misconception("probabilities", _drawn(lambda p, r, u: p.gather(
                -1, (r > u * r[:, -1:]).long().argmax(-1, keepdim=True))[:, 0]),
            "You returned how likely the chosen tokens are. Wanted are the tokens, that is, their "
            "places in the row."),
        Misconception("numbers without a second axis", _drawn(lambda p, r, u: (
                r > u[:, 0] * r[:, -1]).long().argmax(-1)),
            "A row of B numbers cannot be compared with B rows of sums. Give every number a row of "
            "its own: a second axis of size 1."),
        Misconception("every axis of size 1 dropped", _drawn(lambda p, r, u: torch.searchsorted(
                r, u * r[:, -1:], right=True).squeeze()),
            "With one text only, its axis vanished as well: every axis of size 1 was dropped. Drop "
            "the last one, and name it."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Lengths 0.5, 0.2, 0.3, laid end to end: where does each piece end? Which end is the "
             "first beyond 0.6?"),
        Hint("It is refused for impossible tokens or rounded sums",
             "Three steps: running sums along the last axis; the number times the last running "
             "sum of its row; the first running sum that is greater than that."),
        Hint("The shapes do not fit",
             "Running sums are (B, V), the numbers (B). With [:, None] they become (B, 1) and meet "
             "every column. torch.searchsorted(running, target, right=True) gives (B, 1); drop the "
             "last axis."),
    ),
    praise="Chance is now in your hands: the same seed writes the same tale.",
)


# ---------------------------------------------------------------- piece: keep_top_k


def two_rows_of_seven():
    return _logits(4, 2, 7), 3


def rows_with_equal_logits():
    return torch.tensor([[1.0, 3.0, 3.0, 0.5, 3.0, -2.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
                         [-1.0, -4.0, -1.0, -3.0, 5.0, -1.0]]), 2


def k_larger_than_the_vocabulary():
    return _logits(5, 3, 4), 9


def only_one():
    return _logits(6, 4, 6) - 7, 1


def _leftmost(candidate, logits, k):
    """Which of equal logits are kept does not matter: the kept ones move to the left."""
    before = logits.clone()
    kept = candidate(logits, k)
    if not isinstance(kept, Tensor) or kept.shape != before.shape:
        return kept
    kept = kept.clone()
    for given, row in zip(before, kept):
        for value in given.unique():
            places = (given == value).nonzero().flatten()
            if len(places) > 1:
                row[places] = row[places].sort(descending=True)[0]
    return kept


def _k_by_sort(logits, k):
    order = logits.sort(dim=-1, descending=True)[1]
    rank = torch.empty_like(order).scatter(
        -1, order, torch.arange(logits.shape[-1]).expand_as(order))
    return logits.masked_fill(rank >= k, -INF)


def _k_by_mask(logits, k):
    best = logits.topk(min(k, logits.shape[-1]))[1]
    mask = torch.ones_like(logits, dtype=torch.bool).scatter(-1, best, False)
    return torch.where(mask, -INF, logits)


def _k_by_rows(logits, k):
    out = torch.full_like(logits, -INF)
    for row, target in zip(logits, out):
        for i in row.topk(min(k, len(row)))[1]:
            target[i] = row[i]
    return out


def _threshold(logits, k, keep, k_of=lambda k, logits: min(k, logits.shape[-1])):
    limit = logits.topk(k_of(k, logits), dim=-1)[0][..., -1:]
    return logits.masked_fill(~keep(logits, limit), -INF)


def _rows_at(logits, best):
    out = torch.full_like(logits, -INF)
    out[best[1]] = best[0]
    return out


def _columns_at(logits, best):
    out = torch.full_like(logits, -INF)
    out[:, best[1]] = best[0]
    return out


def _in_place(logits, k):
    logits[logits.argsort(-1, descending=True).argsort(-1) >= k] = -INF
    return logits


KEEP_TOP_K = Exercise(
    name="keep_top_k", chapter=6, kind="piece", piece="sampling.keep_top_k", entry="keep_top_k",
    title="The k largest", difficulty="easy", importance="essential", minutes=5,
    reference=keep_top_k, run=_leftmost,
    fixtures=(two_rows_of_seven, rows_with_equal_logits, k_larger_than_the_vocabulary, only_one),
    equivalents={
        "ranks by sorting": _k_by_sort,
        "mask and where": _k_by_mask,
        "row by row": _k_by_rows,
        "double argsort": lambda logits, k: logits.masked_fill(
            logits.argsort(-1, descending=True).argsort(-1) >= k, -INF),
    },
    misconceptions=(
        Misconception("a threshold keeps ties",
            lambda logits, k: _threshold(logits, k, lambda x, limit: x >= limit),
            "With equal logits more than k are kept: all that reach the k-th value. Keep the "
            "places that topk names, not the values above a limit.",
            also=[lambda logits, k: logits.masked_fill(
                      logits < logits.topk(k)[0][:, -1:], -INF)]),
        Misconception("a strict threshold",
            lambda logits, k: _threshold(logits, k, lambda x, limit: x > limit),
            "Too few are kept: the k-th itself was thrown out. It belongs to the k largest."),
        Misconception("written into the input", _in_place,
            "The values are right, but the logits that you were given are changed as well, and "
            "somebody may still need them. Work on a copy."),
        Misconception("zeros instead of minus infinity",
            lambda logits, k: torch.zeros_like(logits).scatter(
                -1, (i := logits.topk(min(k, logits.shape[-1]))[1]), logits.gather(-1, i)),
            "What is cut has the logit 0, an ordinary score that still gets probability. Only "
            "minus infinity becomes 0 in the softmax."),
        Misconception("values only", lambda logits, k: logits.topk(min(k, logits.shape[-1]))[0],
            "Only the k values came back, without their places. The result has the shape of the "
            "logits, so that each token keeps its place."),
        Misconception("places only", lambda logits, k: logits.topk(min(k, logits.shape[-1]))[1],
            "You returned which tokens are kept. Wanted are the logits themselves, with minus "
            "infinity for all others."),
        Misconception("sorted", lambda logits, k: torch.cat([
                (s := logits.sort(-1, descending=True)[0])[:, :k],
                torch.full_like(s[:, k:], -INF)], 1),
            "The kept logits moved to the front. A token is its place in the row; every kept logit "
            "stays where it was."),
        Misconception("one cut for the batch",
            lambda logits, k: logits.masked_fill(
                logits < logits.flatten().topk(min(k, logits.numel()))[0][-1], -INF),
            "The whole batch shares one cut, so some rows keep more than k and others less. Each "
            "row keeps its own k largest.",
            also=[lambda logits, k: logits.masked_fill(
                      logits < logits.topk(min(k, logits.shape[-1]))[0].min(), -INF)]),
        Misconception("down the columns",
            lambda logits, k: torch.full_like(logits, -INF).scatter(
                0, (i := logits.topk(min(k, len(logits)), dim=0)[1]), logits.gather(0, i)),
            "The largest of each column were kept. A row belongs to one text; its tokens are the "
            "last axis."),
        Misconception("wrong logits at the right places",
            lambda logits, k: torch.full_like(logits, -INF).scatter(
                -1, logits.topk(min(k, logits.shape[-1]))[1], logits),
            "The places are right, the logits in them are those of the first tokens. Write the "
            "values that belong to the places."),
        Misconception("k not limited", lambda logits, k: torch.full_like(logits, -INF).scatter(
                -1, (i := logits.topk(k)[1]), logits.gather(-1, i)),
            "It stops when k is larger than the vocabulary. Then all tokens are kept: take the "
            "smaller of k and V."),
        Misconception("one too many", lambda logits, k: torch.full_like(logits, -INF).scatter(
                -1, (i := logits.topk(min(k + 1, logits.shape[-1]))[1]), logits.gather(-1, i)),
            "One token too many is kept. Sorted, the k largest are those at 0 up to k - 1."),
        Misconception("probabilities", lambda logits, k: keep_top_k(logits, k).softmax(-1),
            "The right tokens, but as probabilities. Logits come back, with minus infinity for "
            "what is cut; the softmax follows later."),
        Misconception("places not kept within their row", lambda logits, k: _rows_at(
                logits, logits.topk(min(k, logits.shape[-1]))),
            "The places were taken for rows, or written in every row. topk counts places within "
            "each row; scatter along the last axis writes there.",
            also=[lambda logits, k: _columns_at(
                      logits, logits.topk(min(k, logits.shape[-1])))]),
        Misconception("nothing kept", lambda logits, k: torch.full_like(logits, -INF),
            "Everything is minus infinity. If you used scatter: it gives a new tensor and leaves "
            "the old one as it was. Return the new one."),
        Misconception("a very negative number", lambda logits, k: torch.full_like(
                logits, -1e9).scatter(-1, (i := logits.topk(min(k, logits.shape[-1]))[1]),
                                      logits.gather(-1, i)),
            "A very negative number stands for what is cut. Minus infinity was asked for: only "
            "that is 0 after every softmax."),
        Misconception("a limit without its axis", lambda logits, k: logits.masked_fill(
                logits < logits.topk(min(k, logits.shape[-1]))[0][:, -1], -INF),
            "The limits, one for each row, lost their axis and cannot meet the rows. Besides, a "
            "limit keeps more than k where several are equal: use places."),
    ),
    hints=(
        Hint("I do not know where to start",
             "logits.topk(k) gives two things: the values and their places. Which of the two says "
             "what to keep?"),
        Hint("It is refused for equal logits, or for a large k",
             "Three logits of 3.0 and k = 2: a limit of 3.0 lets all three through, but topk names "
             "two places. For k above V take min(k, V)."),
        Hint("I have the places; what now?",
             "Begin with a row of minus infinities: torch.full_like(logits, -torch.inf). Then "
             ".scatter(-1, places, values) writes the kept values into it."),
    ),
    praise="Exactly k, at their places, ties or not.",
)


# ---------------------------------------------------------------- piece: keep_top_p


def the_example_and_a_sure_row():
    return torch.tensor([[0.15, 0.45, 0.10, 0.30], [0.01, 0.02, 0.95, 0.02]]), 0.6


def three_rows_of_seven():
    return _logits(7, 3, 7).softmax(-1), 0.85


def five_rows_of_eleven():
    return _logits(8, 5, 11).softmax(-1), 0.37


def rows_that_are_zero_somewhere():
    return torch.tensor([[0.0, 0.3, 0.0, 0.25, 0.45], [0.2, 0.0, 0.0, 0.55, 0.25]]), 0.93


def _nucleus(cut=lambda ordered, p: ordered.cumsum(-1) - ordered > p, scale=True, back="scatter",
             descending=True, source=lambda x: x):
    """keep_top_p with one step exchanged."""
    def keep_top_p(probabilities, p):
        probabilities = source(probabilities)
        ordered, order = probabilities.sort(dim=-1, descending=descending, stable=True)
        kept = ordered.masked_fill(cut(ordered, p), 0.0)
        if scale:
            kept = kept / kept.sum(-1, keepdim=True)
        if back == "scatter":
            return torch.zeros_like(kept).scatter(-1, order, kept)
        return kept.gather(-1, order) if back == "gather" else kept
    return keep_top_p


def _p_by_rows(probabilities, p):
    out = torch.zeros_like(probabilities)
    for row, target in zip(probabilities.tolist(), out):
        total = 0.0
        for i in sorted(range(len(row)), key=lambda i: -row[i]):
            target[i] = row[i]
            total += row[i]
            if total > p:
                break
    return out / out.sum(-1, keepdim=True)


def _p_by_sums(probabilities, p):
    """Token by token: the sum of all that are likelier."""
    likelier = probabilities[:, None, :] > probabilities[:, :, None]
    before = (likelier * probabilities[:, None, :]).sum(-1)
    kept = probabilities * (before <= p)
    return kept / kept.sum(-1, keepdim=True)


def _p_shifted(probabilities, p):
    ordered, order = probabilities.sort(dim=-1, descending=True)
    out = ordered.cumsum(-1) > p
    out[:, 1:] = out[:, :-1].clone()
    out[:, 0] = False
    mask = torch.zeros_like(out).scatter(-1, order, out)
    kept = probabilities.masked_fill(mask, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _p_columns(probabilities, p):
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > p, 0.0)
    out = torch.zeros_like(kept)
    out[:, order] = kept / kept.sum(-1, keepdim=True)
    return out


def _p_rows(probabilities, p):
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    return ordered[order]


def _p_axis_lost(probabilities, p):
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > p, 0.0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1))


def _p_with_limit(probabilities, keep):
    kept = probabilities * keep
    return kept / kept.sum(-1, keepdim=True)


def _p_rolled(probabilities, p):
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered.masked_fill(ordered.cumsum(-1).roll(1, -1) > p, 0.0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


KEEP_TOP_P = Exercise(
    name="keep_top_p", chapter=6, kind="piece", piece="sampling.keep_top_p", entry="keep_top_p",
    title="The nucleus", difficulty="medium", importance="essential", minutes=10,
    reference=keep_top_p,
    fixtures=(the_example_and_a_sure_row, three_rows_of_seven, five_rows_of_eleven,
              rows_that_are_zero_somewhere),
    equivalents={
        "row by row": _p_by_rows,
        "sum of the likelier": _p_by_sums,
        "shifted mask": _p_shifted,
        "unsorted by argsort": lambda probabilities, p: (lambda o, i: (
            lambda kept: (kept / kept.sum(-1, keepdim=True)).gather(-1, i.argsort(-1)))(
                o.masked_fill(o.cumsum(-1) - o > p, 0.0)))(
                    *probabilities.sort(-1, descending=True)),
        "from the small end": lambda probabilities, p: (lambda o, i: _p_with_limit(
            probabilities, torch.zeros_like(o, dtype=torch.bool).scatter(
                -1, i, o.cumsum(-1) >= 1 - p)))(*probabilities.sort(-1)),
    },
    misconceptions=(
        Misconception("the crossing token dropped",
            _nucleus(cut=lambda o, p: o.cumsum(-1) > p),
            "The token that crosses p was dropped. The rule needs no exception: a token stays "
            "while the sum of the likelier ones is below p.",
            also=[_nucleus(cut=lambda o, p: (o.cumsum(-1) > p) & (torch.arange(o.shape[-1]) > 0))]),
        Misconception("not scaled", _nucleus(scale=False),
            "The rows sum to less than 1. What is left must be scaled: divide each row by its own "
            "sum."),
        Misconception("scaled by p", lambda probabilities, p: _nucleus(scale=False)(
                probabilities, p) / p,
            "You divided by p, but what is kept sums to more than p: the crossing token is in it. "
            "Divide by the sum itself."),
        Misconception("left in sorted order", _nucleus(back="no"),
            "The right numbers at wrong places: they are still sorted. Each must go back to the "
            "token that it came from."),
        Misconception("gathered back", _nucleus(back="gather"),
            "Put back to the wrong places: gather reads at the order, scatter writes to it. The "
            "order says where each sorted number came from."),
        Misconception("sorted the wrong way", _nucleus(descending=False),
            "The least likely tokens are kept: sorting goes upwards unless told otherwise. The "
            "likeliest come first."),
        Misconception("not sorted", lambda probabilities, p: _p_with_limit(
                probabilities, probabilities.cumsum(-1) - probabilities <= p),
            "You summed in the order of the vocabulary. Sort first: the likeliest tokens are to be "
            "kept, wherever they stand."),
        Misconception("a limit for single tokens", lambda probabilities, p: _p_with_limit(
                probabilities, probabilities >= 1 - p),
            "You compared each probability by itself with a limit. Top-p is about the sum of the "
            "likeliest tokens: that must pass p.",
            also=[lambda probabilities, p: _p_with_limit(
                      probabilities, probabilities > p)]),
        Misconception("one token too many",
            _nucleus(cut=lambda o, p: o.cumsum(-1) - o - F.pad(o, (1, 0))[:, :-1] > p),
            "One token too many is kept: the one after the crossing. The sum before a token must "
            "not hold p already."),
        Misconception("the rest of p", _nucleus(cut=lambda o, p: o.cumsum(-1) - o > 1 - p),
            "You kept until the sum passes 1 - p. With p = 0.9 nearly everything should be kept, "
            "not a tenth."),
        Misconception("softmax to scale", lambda probabilities, p: _nucleus(scale=False)(
                probabilities, p).softmax(-1),
            "A softmax gives every token something, the cut ones too. To scale, divide each row by "
            "its sum."),
        Misconception("scaled over the batch", lambda probabilities, p: (
                lambda kept: kept / kept.sum())(_nucleus(scale=False)(probabilities, p)),
            "All rows together sum to 1. Each row is one distribution: sum along the last axis, "
            "and keep that axis."),
        Misconception("down the columns", lambda probabilities, p: (
                lambda o, i: torch.zeros_like(o).scatter(0, i, (
                    lambda kept: kept / kept.sum(0, keepdim=True))(
                        o.masked_fill(o.cumsum(0) - o > p, 0.0))))(
                            *probabilities.sort(0, descending=True)),
            "Sorted and summed down the columns, from text to text. Each row is one distribution; "
            "its tokens are the last axis."),
        Misconception("the sum without its axis", _p_axis_lost,
            "A sum of each row is a list of B numbers and cannot divide B rows. Keep the axis: "
            "keepdim leaves it with size 1."),
        Misconception("order not kept within its row", _p_rows,
            "The order was taken for rows, or written in every row. It holds places within each "
            "row; scatter along the last axis writes there.",
            also=[_p_columns]),
        Misconception("the last sum came round", _p_rolled,
            "The likeliest token was cut. You moved the sums along by one, and the last came round "
            "to the front; before the first token the sum is 0."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Sorted: 0.45, 0.30, 0.15, 0.10. The sums before each: 0, 0.45, 0.75, 0.90. Which of "
             "these are not above 0.6?"),
        Hint("I get NaN in a row with one likely token",
             "The sum up to and with the first token is 0.95, above p, but the sum before it is 0. "
             "Use the sum before: cumsum minus the number itself."),
        Hint("My numbers are at the wrong places",
             "sort returns two things: sorted numbers and where they came from. "
             "torch.zeros_like(probabilities).scatter(-1, order, ordered) writes each back to its "
             "place."),
    ),
    praise="The cut now adapts itself to the place.",
)


# ---------------------------------------------------------------- in the chapter: remember


def _chunk(seed: int, length: int, start: int):
    k, v = _logits(seed, 2, length, 3, 4), _logits(seed + 50, 2, length, 3, 4)
    return k, v, torch.arange(start, start + length).expand(2, length)


def three_tokens_then_one_then_two():
    return ([_chunk(11, 3, 0), _chunk(12, 1, 3), _chunk(13, 2, 4)],)


def a_text_that_begins_at_position_seven():
    return ([_chunk(14, 5, 7), _chunk(15, 2, 12)],)


def _all_memories(candidate, chunks):
    """What is kept after every chunk."""
    kept, results = None, []
    for k, v, positions in chunks:
        try:
            kept = candidate(kept, k, v, positions)
        except (TypeError, AttributeError) as error:
            if kept is None and "NoneType" in str(error):
                raise TypeError("kept is None, and there is nothing in None") from error
            raise
        results.append(tuple(kept))
    return results


def _appended(join):
    def remember(kept, k, v, positions):
        new = (k, v, positions)
        return new if kept is None else join(kept, new)
    return remember


def _cat(kept, new, dim=1):
    return tuple(torch.cat(pair, dim=dim) for pair in zip(kept, new))


def _remember_long(kept, k, v, positions):
    if kept is not None:
        old_k, old_v, old_positions = kept
        k = torch.cat([old_k, k], dim=1)
        v = torch.cat([old_v, v], dim=1)
        positions = torch.cat([old_positions, positions], dim=1)
    return k, v, positions


REMEMBER = Exercise(
    name="remember", chapter=6, kind="function", entry="remember",
    title="The memory of a layer", difficulty="easy", importance="essential", minutes=5,
    reference=_appended(_cat), run=_all_memories,
    fixtures=(three_tokens_then_one_then_two, a_text_that_begins_at_position_seven),
    equivalents={
        "three lines": _remember_long,
        "negative axes": _appended(lambda kept, new: (
            torch.cat([kept[0], new[0]], -3), torch.cat([kept[1], new[1]], -3),
            torch.cat([kept[2], new[2]], -1))),
        "a list": lambda kept, k, v, positions: list(_appended(_cat)(kept, k, v, positions)),
        "empty at first": lambda kept, k, v, positions: _cat(
            kept or (k[:, :0], v[:, :0], positions[:, :0]), (k, v, positions)),
    },
    misconceptions=(
        Misconception("only the new", lambda kept, k, v, positions: (k, v, positions),
            "Only the newest tokens are left; a query would see nothing of its past. Append them "
            "to what was kept."),
        Misconception("along another axis", _appended(lambda kept, new: (
                torch.cat([kept[0], new[0]], 0), torch.cat([kept[1], new[1]], 0),
                torch.cat([kept[2], new[2]], 0))),
            "You joined along the texts or the heads, whose number never grows. A text grows "
            "along its own axis: the second, number 1.",
            also=[_appended(lambda kept, new: (
                      torch.cat([kept[0], new[0]], 2), torch.cat([kept[1], new[1]], 2),
                      torch.cat([kept[2], new[2]], 1)))]),
        Misconception("new ones first", _appended(lambda kept, new: _cat(new, kept)),
            "The newest tokens stand first. Looks would still be right, but the order was asked "
            "for: what comes later stands later."),
        Misconception("positions not joined", _appended(lambda kept, new: (
                *_cat(kept[:2], new[:2]), new[2])),
            "Keys and values grew, the positions did not. Without its position nobody knows "
            "whether a key may be seen."),
        Misconception("positions counted here", _appended(lambda kept, new: (
                *_cat(kept[:2], new[:2]),
                torch.arange(kept[2].shape[1] + new[2].shape[1]).expand(
                    len(new[2]), kept[2].shape[1] + new[2].shape[1]))),
            "You counted positions yourself. They come already counted from the start of the "
            "text, and it may begin later: join them as they are.",
            also=[_appended(lambda kept, new: (
                      *_cat(kept[:2], new[:2]),
                      torch.cat([kept[2], new[2] + kept[2].shape[1]], 1)))]),
        Misconception("the first twice", lambda kept, k, v, positions: _cat(
                kept or (k, v, positions), (k, v, positions)),
            "At the first call the new tokens were appended to themselves. When nothing is kept, "
            "the new ones are all there is."),
        Misconception("values from keys", _appended(lambda kept, new: (
                torch.cat([kept[0], new[0]], 1), torch.cat([kept[0], new[0]], 1),
                torch.cat([kept[2], new[2]], 1))),
            "The values are a copy of the keys. What a token hands over is kept beside what it is "
            "found by."),
        Misconception("keys and values exchanged", _appended(lambda kept, new: (
                torch.cat([kept[1], new[1]], 1), torch.cat([kept[0], new[0]], 1),
                torch.cat([kept[2], new[2]], 1))),
            "Keys and values changed places on the way. They come in and go out in the same "
            "order: keys, values, positions."),
        Misconception("None not expected", lambda kept, k, v, positions: _cat(
                kept, (k, v, positions)),
            "The first call gives None: nothing is kept yet. Then what is new is all there is."),
        Misconception("values behind the old keys", _appended(lambda kept, new: (
                torch.cat([kept[0], new[0]], 1), torch.cat([kept[0], new[1]], 1),
                torch.cat([kept[2], new[2]], 1))),
            "The new values were appended to the old keys. Of what was kept, the values are the "
            "second."),
    ),
    hints=(
        Hint("I do not know where to start",
             "What should be returned at the very first call, when nothing is kept?"),
        Hint("The shapes are wrong",
             "Keys are (B, S, K, D): texts, tokens, heads, numbers. Five tokens and one make six "
             "along axis 1; positions are (B, S), and there it is axis 1 as well."),
        Hint("How do I join?",
             "torch.cat([old, new], dim=1), three times: keys, values, positions. If kept is None, "
             "return the three new ones."),
    ),
    praise="That is a cache: what was computed once is kept.",
)


# ---------------------------------------------------------------- exercise: with_temperature


def rows_at_one_half():
    return _logits(21, 2, 5), 0.5


def a_block_at_one_point_seven():
    return _logits(22, 2, 3, 7), 1.7


def large_logits_at_a_low_temperature():
    return 40 * _logits(23, 3, 4), 0.05


def temperature_zero_with_equal_logits():
    return torch.tensor([[1.0, 4.0, 4.0, 0.5], [-3.0, -2.5, -2.0, -5.0]]), 0


def _dial(warm=lambda x, t: (x / t).softmax(-1),
          cold=lambda x: F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)):
    return lambda logits, temperature: (cold(logits) if temperature == 0
                                        else warm(logits, temperature))


def _ones_in_rows(x):
    out = torch.zeros_like(x)
    out[x.argmax(-1)] = 1.0
    return out


WITH_TEMPERATURE = Exercise(
    name="with_temperature", chapter=6, kind="complete", entry="with_temperature",
    title="The whole dial, zero included", difficulty="easy", importance="essential", minutes=6,
    reference=_dial(),
    fixtures=(rows_at_one_half, a_block_at_one_point_seven, large_logits_at_a_low_temperature,
              temperature_zero_with_equal_logits),
    equivalents={
        "power of probabilities": _dial(warm=lambda x, t: (x.log_softmax(-1) / t).softmax(-1)),
        "logsumexp": _dial(warm=lambda x, t: (x / t - (x / t).logsumexp(-1, keepdim=True)).exp()),
        "scatter": _dial(cold=lambda x: torch.zeros_like(x).scatter(
            -1, x.argmax(-1, keepdim=True), 1.0)),
        "comparison": _dial(cold=lambda x: (
            torch.arange(x.shape[-1]) == x.argmax(-1, keepdim=True)).float()),
    },
    misconceptions=(
        Misconception("multiplied", _dial(warm=lambda x, t: (x * t).softmax(-1)),
            "The dial is reversed: a low temperature makes the row flatter. The logits are "
            "divided by the temperature."),
        Misconception("probabilities divided", _dial(warm=lambda x, t: (
                lambda p: p / p.sum(-1, keepdim=True))(x.softmax(-1) / t)),
            "The dial does nothing: the temperature is left out, or it divides probabilities that "
            "are scaled again afterwards. Divide the logits, before the softmax."),
        Misconception("softmax of divided probabilities",
            _dial(warm=lambda x, t: (x.softmax(-1) / t).softmax(-1)),
            "Two softmaxes: the second one treats probabilities as scores, and everything becomes "
            "nearly level. Divide the logits, then one softmax."),
        Misconception("plain exponentials", _dial(warm=lambda x, t: (
                lambda e: e / e.sum(-1, keepdim=True))((x / t).exp())),
            "NaN: at a low temperature the scores become large and their exponentials infinite. "
            "The library's softmax takes care of that."),
        Misconception("down the columns", _dial(warm=lambda x, t: (x / t).softmax(-2)),
            "The columns sum to 1. Each row is one distribution; the tokens are the last axis."),
        Misconception("no case for zero",
            lambda logits, temperature: (logits / temperature).softmax(-1),
            "Division by 0 at temperature 0. That setting has a meaning of its own: all "
            "probability for the likeliest token."),
        Misconception("equal ones share", _dial(cold=lambda x: (
                lambda m: m / m.sum(-1, keepdim=True))((x == x.amax(-1, keepdim=True)).float())),
            "At temperature 0 equal logits share the probability. The first of them gets all."),
        Misconception("one place for all rows", _dial(cold=lambda x: F.one_hot(
                x.argmax(), x.numel()).reshape(x.shape).to(x.dtype)),
            "At temperature 0 only one row of all got its 1. Each row has a likeliest token of its "
            "own: look for it along the last axis."),
        Misconception("no softmax", _dial(warm=lambda x, t: x / t),
            "These are the divided logits. The last step is missing: a softmax makes them "
            "probabilities."),
        Misconception("the token at zero", _dial(cold=lambda x: x.argmax(-1)),
            "At temperature 0 you return the token, or its logit. Wanted is a distribution as "
            "always: 1 at that token, 0 elsewhere.",
            also=[_dial(cold=lambda x: x.where(
                      x == x.amax(-1, keepdim=True), torch.tensor(0.0)))]),
        Misconception("softmax at zero", _dial(cold=lambda x: x.softmax(-1)),
            "At temperature 0 you give the plain softmax. Zero is the end of the dial where the "
            "likeliest token gets everything."),
        Misconception("places not kept within their row", _dial(cold=_ones_in_rows),
            "At temperature 0 the places were taken for rows, or used in every row. They count "
            "tokens: scatter along the last axis.",
            also=[_dial(cold=lambda x: torch.zeros_like(
                      x).index_fill(-1, x.argmax(-1).flatten(), 1.0))]),
        Misconception("size of the vocabulary missing", _dial(cold=lambda x: F.one_hot(
                x.argmax(-1)).to(x.dtype)),
            "At temperature 0 the rows are too short: one_hot counts only up to the largest place "
            "that it is given. Tell it the size of the vocabulary."),
        Misconception("always axis 1", _dial(warm=lambda x, t: (x / t).softmax(1)),
            "With three axes, number 1 is no longer the vocabulary's. The tokens are always the "
            "last axis."),
    ),
    hints=(
        Hint("I do not know what zero means",
             "At 0.1 the likeliest token has nearly all the probability, at 0.01 more still. "
             "Where does that lead?"),
        Hint("The dial does nothing, or goes the wrong way",
             "Scores 2 and 1 at temperature 0.5 become 4 and 2, and the softmax stretches the "
             "difference. So: divide the logits, then softmax."),
        Hint("How do I make a row with a single 1?",
             "F.one_hot(places, V) gives rows with a 1 at each place, as whole numbers; .to(dtype) "
             "makes them probabilities. argmax gives the first of equal ones."),
    ),
    praise="From greedy to wild on one dial.",
)


# ---------------------------------------------------------------- exercise: cached_loop_in_order

CACHED_LOOP = Exercise(
    name="cached_loop_in_order", chapter=6, kind="order",
    title="The loop with a cache, line by line", difficulty="easy", importance="essential",
    minutes=5,
    lines=(
        "new, cache = [], mm.KVCache(model.config)",
        "logits = model(torch.tensor([prompt]), cache)[0, -1]",
        "for step in range(n):",
        "    token = int(choose(logits))",
        "    if token in stop_ids: break",
        "    new.append(token)",
        "    logits = model(torch.tensor([[token]]), cache)[0, -1]",
    ),
    distractors=("    logits = model(torch.tensor([prompt + new]), cache)[0, -1]",),
    misconceptions=(
        Misconception("both readings", "with 6 and with 7",
            "One line reads the new token, another the whole text again. Only one of the two "
            "belongs."),
        Misconception("everything read into the cache again", "with 7",
            "The whole text is read into a cache that holds it already, so the model sees it "
            "twice. Only the new token is unread."),
        Misconception("never asked to stop", "without 4",
            "The loop never looks for a stop token, so it writes on after the end of the text."),
        Misconception("no reading in the loop", "without 6",
            "Every step chooses from the same logits: nothing new is read. One line is missing."),
        Misconception("used before it is chosen", "4 before 3 or 5 before 3 or 6 before 3",
            "A token is asked about, kept or read before it is chosen. Which line chooses it?"),
        Misconception("stop token kept", "5 before 4",
            "The stop token gets into the result before anybody looks at it. First ask whether it "
            "ends the text."),
        Misconception("prompt read before the cache", "1 before 0",
            "The prompt is read into a cache that is not there yet. Which line makes it?"),
        Misconception("prompt read in the loop", "2 before 1",
            "The loop begins before the prompt is read. The prompt is read once, ahead of it."),
        Misconception("chosen above the loop", "3 before 2",
            "An indented line belongs to the loop, so it stands below the loop's first line."),
        Misconception("read before it is kept and asked", "6 before 4",
            "It works, but the stop token is read for nothing. Ask first, then keep, then read."),
        Misconception("read after asking, then kept", "6 before 5",
            "It works, but in this exercise the token is kept first and read last, so that "
            "nothing stands between reading and the next choice."),
    ),
    hints=(
        Hint("I do not know which line is first",
             "Which line needs nothing but the model's configuration?"),
        Hint("Two lines look alike",
             "After reading a prompt of 8 tokens the cache holds 8. If all 9 are read into it now, "
             "how many does it hold?"),
        Hint("The order is still refused",
             "Make a cache, read the prompt; then in a loop: choose, ask whether to stop, keep, "
             "read the one new token."),
    ),
    praise="Choose, ask, keep, read: this is how every model writes.",
)


# ---------------------------------------------------------------- exercise: keep_min_p


def a_sure_row_and_an_open_one():
    return torch.tensor([[0.02, 0.90, 0.05, 0.03, 0.0], [0.30, 0.05, 0.25, 0.22, 0.18]]), 0.2


def four_rows_of_nine():
    return _logits(31, 4, 9).softmax(-1), 0.33


def two_level_rows():
    return torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.15, 0.35, 0.27, 0.23]]), 0.55


def three_rows_with_a_small_share():
    return _logits(32, 3, 8).softmax(-1), 0.04


def rows_that_meet_the_limit():
    return torch.tensor([[0.25, 0.5, 0.125, 0.125], [0.125, 0.0625, 0.5625, 0.25]]), 0.5


def _min_p(limit, keep=lambda p, limit: p >= limit, scale=lambda x: x / x.sum(-1, keepdim=True)):
    return lambda probabilities, share: scale(
        probabilities * keep(probabilities, limit(probabilities, share)))


def _of_the_best(p, share):
    return share * p.amax(-1, keepdim=True)


def _min_p_by_rows(probabilities, share):
    rows = []
    for row in probabilities.tolist():
        kept = [p if p >= share * max(row) else 0.0 for p in row]
        rows.append([p / sum(kept) for p in kept])
    return torch.tensor(rows)


KEEP_MIN_P = Exercise(
    name="keep_min_p", chapter=6, kind="function", entry="keep_min_p",
    title="Another cut: a share of the best", difficulty="easy", importance="useful", minutes=7,
    reference=_min_p(_of_the_best),
    fixtures=(a_sure_row_and_an_open_one, four_rows_of_nine, two_level_rows,
              three_rows_with_a_small_share, rows_that_meet_the_limit),
    equivalents={
        "loop": _min_p_by_rows,
        "logarithms": lambda probabilities, share: probabilities.log().masked_fill(
            probabilities.log() < probabilities.log().amax(-1, keepdim=True) + math.log(share),
            -INF).softmax(-1),
        "relative": lambda probabilities, share: (lambda kept: kept / kept.sum(-1, keepdim=True))(
            torch.where(probabilities / probabilities.amax(-1, keepdim=True) >= share,
                        probabilities, 0.0)),
    },
    misconceptions=(
        Misconception("a fixed limit", _min_p(lambda p, share: share),
            "The limit is the same for all rows. It should follow each row's likeliest token: a "
            "share of that."),
        Misconception("best of the batch", _min_p(lambda p, share: share * p.max()),
            "The limit comes from the most certain row of the batch. Each row has a likeliest "
            "token of its own."),
        Misconception("best of the column",
            _min_p(lambda p, share: share * p.amax(0, keepdim=True)),
            "The maximum was taken down the columns, so texts influence one another. A row is one "
            "distribution."),
        Misconception("not scaled", _min_p(_of_the_best, scale=lambda x: x),
            "The rows sum to less than 1. Divide what is left by its own sum."),
        Misconception("scaled over the batch", _min_p(_of_the_best, scale=lambda x: x / x.sum()),
            "All rows together sum to 1. Scale each row by its own sum: along the last axis, kept."),
        Misconception("scaled by softmax", _min_p(_of_the_best, scale=lambda x: x.softmax(-1)),
            "A softmax takes probabilities for scores: it levels them, and gives something to "
            "what is cut unless that is minus infinity. Divide by the row's sum.",
            also=[lambda probabilities, share: (
                      probabilities.masked_fill(probabilities < _of_the_best(probabilities, share),
                                                -INF).softmax(-1))]),
        Misconception("the others kept", _min_p(_of_the_best, keep=lambda p, limit: p < limit),
            "The unlikely tokens are kept and the likely ones cut. Keep what reaches the limit."),
        Misconception("the nucleus", lambda probabilities, share: keep_top_p(probabilities, share),
            "That is top-p: a limit on the sum. Here each token is compared with the likeliest "
            "one."),
        Misconception("the axis lost", _min_p(lambda p, share: share * p.amax(-1)),
            "A row's largest value, or its sum, lost its axis: B numbers cannot meet B rows. "
            "keepdim leaves the axis with size 1."),
        Misconception("max gives two things", lambda probabilities, share: (
                share * probabilities.max(-1, keepdim=True)),
            "With an axis, max gives two things: the values and their places. Take the values, or "
            "use amax."),
        Misconception("equal is not enough", _min_p(_of_the_best, keep=lambda p, limit: p > limit),
            "A token that has exactly the share was cut. At least means that equal is enough to "
            "stay."),
    ),
    hints=(
        Hint("I do not know where to start",
             "In a row the best has 0.30 and the share is 0.2. How likely must another token be to "
             "stay?"),
        Hint("It is right for one row only",
             "The best is taken row by row: amax(dim=-1, keepdim=True) has shape (B, 1) and meets "
             "every token of its row."),
        Hint("My rows do not sum to 1",
             "Three steps: the limit of each row; 0 for what is below; divide by the row's sum."),
    ),
    praise="One line, no sorting, and it adapts to the place.",
)


# ---------------------------------------------------------------- exercise: until_stop


def a_sequence_of_two_in_the_middle():
    return [7, 4, 9, 3, 9, 3, 4, 8, 3, 4], [[3, 4]]


def several_that_overlap():
    return [5, 1, 2, 6, 1, 2, 3, 5], [[2, 3], [6, 1, 2], [5, 5]]


def half_a_sequence_at_the_end():
    return [8, 2, 8, 9, 4], [[9, 4, 1], [4, 4]]


def at_the_very_end_and_single():
    return [6, 5, 4, 9, 2], [[2], [9, 3]]


def at_the_very_beginning():
    return [4, 4, 1, 7], [[4, 4], [1, 7]]


def a_long_one_around_a_short_one():
    return [8, 1, 2, 3, 5], [[2], [1, 2, 3]]


def nothing_to_look_for():
    return [3, 1, 3], []


def numbers_of_two_digits():
    return [31, 2, 9, 11, 2, 3, 7], [[1, 2], [3]]


def _stop(begins, cut=lambda ids, i, stop: ids[:i], last=False, choose=min):
    def until_stop(ids, stops):
        found = []
        for stop in stops:
            places = [i for i in range(len(ids)) if begins(ids, i, list(stop))]
            if places:
                found.append((places[-1] if last else places[0], stop))
        if not found:
            return list(ids)
        at, stop = choose(found, key=lambda pair: pair[0]) if choose else found[0]
        return cut(list(ids), at, stop)
    return until_stop


def _whole(ids, i, stop):
    return ids[i : i + len(stop)] == stop


def _stop_while_writing(ids, stops):
    """As a loop that writes would notice it: at the end of the sequence that begins first."""
    best = len(ids)
    for i in range(len(ids)):
        for stop in stops:
            if all(i + j < len(ids) and ids[i + j] == s for j, s in enumerate(stop)):
                best = min(best, i)
    return ids[:best]


def _stop_that_ends_first(ids, stops):
    new = []
    for token in ids:
        new.append(token)
        for stop in stops:
            if new[-len(stop):] == stop:
                return new[: -len(stop)]
    return new


def _stop_by_text(ids, stops):
    text = "".join(f" {i} " for i in ids)
    ends = [text.find("".join(f" {i} " for i in stop)) for stop in stops]
    ends = [e for e in ends if e >= 0]
    return [int(i) for i in (text[: min(ends)] if ends else text).split()]


UNTIL_STOP = Exercise(
    name="until_stop", chapter=6, kind="function", entry="until_stop",
    title="Stop at several tokens", difficulty="medium", importance="useful", minutes=10,
    reference=_stop(_whole),
    fixtures=(a_sequence_of_two_in_the_middle, several_that_overlap, half_a_sequence_at_the_end,
              at_the_very_end_and_single, at_the_very_beginning, a_long_one_around_a_short_one,
              nothing_to_look_for, numbers_of_two_digits),
    equivalents={"token by token": _stop_while_writing, "by text": _stop_by_text,
                 "as a tensor": lambda ids, stops: torch.tensor(_stop(_whole)(ids, stops))},
    misconceptions=(
        Misconception("stop kept", _stop(_whole, cut=lambda ids, i, stop: ids[: i + len(stop)]),
            "The stop sequence is still in the result. Everything from its first token on is left "
            "out."),
        Misconception("any of its tokens", _stop(lambda ids, i, stop: ids[i] in stop),
            "A single token of a stop sequence ended the text. The whole sequence must stand there, "
            "in order."),
        Misconception("its first token is enough", _stop(lambda ids, i, stop: ids[i] == stop[0]),
            "The first token of a sequence ended the text. Compare the whole sequence, and take "
            "the one that begins earliest.",
            also=[_stop(lambda ids, i, stop: ids[i] == stop[0], choose=None)]),
        Misconception("nothing returned without a stop", lambda ids, stops: (
                lambda cut: cut if cut != list(ids) else None)(_stop(_whole)(ids, stops)),
            "Without a stop sequence nothing comes back. Then the whole list is the result."),
        Misconception("the last one", _stop(_whole, last=True),
            "You cut at the last place where the sequence occurs. The text ends at the first."),
        Misconception("first in the list", _stop(_whole, choose=None),
            "You cut at the first sequence of the list that occurs. Of all sequences, the one that "
            "begins earliest ends the text."),
        Misconception("half a sequence", _stop(
                lambda ids, i, stop: ids[i:] != [] and stop[: len(ids) - i] == ids[i : i + len(stop)]),
            "Half a sequence at the end was taken for a whole one. The rest might never come: keep "
            "those tokens."),
        Misconception("only at the end", lambda ids, stops: next(
                (ids[: -len(s)] for s in stops if ids[-len(s):] == list(s)), list(ids)),
            "You looked at the end of the text only. The sequence may stand anywhere; what follows "
            "it is left out, too."),
        Misconception("tokens removed", lambda ids, stops: [
                i for i in ids if i not in {t for s in stops for t in s}],
            "You removed the tokens of the sequences wherever they stood. The text has to end at "
            "the first whole sequence."),
        Misconception("one place too few", _stop(
                lambda ids, i, stop: i < len(ids) - len(stop) and _whole(ids, i, stop)),
            "A sequence at the very end was missed: the search stops one place too early."),
        Misconception("the very beginning missed", _stop(
                lambda ids, i, stop: i > 0 and _whole(ids, i, stop)),
            "A sequence at the very beginning was missed. Place 0 is a place, even though it counts "
            "as false."),
        Misconception("the one that ends first", _stop_that_ends_first,
            "You cut at the sequence that is complete first. A longer one had begun before it; "
            "the text ends where that one begins."),
        Misconception("only its last token cut", lambda ids, stops: next(
                (ids[:i] for i in range(len(ids))
                 if any(ids[: i + 1][-len(s):] == s for s in stops)), ids),
            "You noticed the sequence at its last token and cut only that one. The text ends "
            "before the first."),
        Misconception("beyond the end", lambda ids, stops: next(
                (ids[:i] for i in range(len(ids)) for s in stops
                 if all(ids[i + j] == s[j] for j in range(len(s)))), ids),
            "Near the end the comparison reads beyond the list. A slice is only shorter there, "
            "and then not equal."),
        Misconception("given up at the first place", lambda ids, stops: (
                ids[:0] if stops and _whole(ids, 0, stops[0]) else ids),
            "You returned everything at the first place that does not fit. Only when every place "
            "has been tried there is no stop."),
    ),
    hints=(
        Hint("I do not know where to start",
             "At place i, which slice of ids would have to equal the stop sequence?"),
        Hint("Several sequences confuse me",
             "For each sequence find its first place. Of these places take the smallest. If there "
             "is none, nothing is cut."),
        Hint("I miss one at the end, or find half a one",
             "A slice that is shorter than the sequence is never equal to it. So compare ids[i : i "
             "+ len(stop)] for every i, the last one included."),
    ),
    praise="A chat template ends its turns this way (chapter 13).",
)


# ---------------------------------------------------------------- exercise: write_cached


@cache
def _lively(seed: int, window: int | None = None) -> Transformer:
    """A small model with random weights, large enough that its choices vary."""
    config = ModelConfig(24, 2, 6, 2, 8, 20, 31, sliding_window=window)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(config)
        for weight in model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=1.4 * weight.shape[1] ** -0.5)
    return model.eval()


def a_prompt_of_six_tokens():
    return _lively(3), [1, 9, 4, 17, 2, 22], 6


def a_prompt_of_eleven_tokens():
    return _lively(4), [1, 5, 30, 7, 7, 12, 3, 28, 15, 6, 11], 8


def _cached(position=None, first=None, again=None, token_of=lambda logits: int(logits.argmax()),
            steps=lambda n: n):
    """The cached loop with one step exchanged."""
    @torch.no_grad()
    def write_cached(model, prompt, n):
        cache = KVCache(model.config)
        logits = model(torch.tensor([first(prompt) if first else prompt]), cache)[0, -1]
        new = []
        for step in range(steps(n)):
            token = token_of(logits)
            new.append(token)
            ids = again(prompt, new) if again else [token]
            positions = None
            if position:
                at = position(prompt, step)
                positions = torch.arange(at, at + len(ids))
            logits = model(torch.tensor([ids]), cache, positions)[0, -1]
        return new
    return write_cached


@torch.no_grad()
def _uncached(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@torch.no_grad()
def _new_cache_each_time(model, prompt, n):
    logits = model(torch.tensor([prompt]), KVCache(model.config))[0, -1]
    new = []
    for step in range(n):
        new.append(int(logits.argmax()))
        logits = model(torch.tensor([[new[-1]]]), KVCache(model.config),
                       torch.tensor([len(prompt) + step]))[0, -1]
    return new


@torch.no_grad()
def _positions_of_all(model, prompt, n):
    cache = KVCache(model.config)
    model(torch.tensor([prompt]), cache)
    model(torch.tensor([[prompt[0]]]), cache, torch.arange(len(prompt) + 1))


@torch.no_grad()
def _plain_position(model, prompt, n):
    model(torch.tensor([[prompt[0]]]), KVCache(model.config), len(prompt))


WRITE_CACHED = Exercise(
    name="write_cached", chapter=6, kind="bug", entry="write_cached",
    title="The text falls apart after the first word", difficulty="medium",
    importance="essential", minutes=8,
    reference=_cached(),
    fixtures=(a_prompt_of_six_tokens, a_prompt_of_eleven_tokens),
    equivalents={
        "position of the text": _cached(position=lambda prompt, step: len(prompt) + step),
        "without a cache": _uncached,
        "generate": lambda model, prompt, n: generate(model, prompt, n),
    },
    misconceptions=(
        Misconception("unchanged", _cached(position=lambda prompt, step: step),
            "The bug is still there: from the second new token on the text differs from the one "
            "without a cache. Where does the model believe the new token stands?"),
        Misconception("off by one",
            _cached(position=lambda prompt, step: len(prompt) + step - 1),
            "The positions of the new tokens are off by one. After P tokens, which are 0 up to P "
            "- 1, comes position P.",
            also=[_cached(position=lambda prompt, step: len(prompt) + step + 1)]),
        Misconception("always the same position",
            _cached(position=lambda prompt, step: len(prompt)),
            "Every new token gets the same position, so each overwrites the one before. The "
            "position grows with every step."),
        Misconception("read again", _cached(again=lambda prompt, new: prompt + new),
            "Tokens are read at every step that the cache holds already, so the model sees them "
            "several times. Read the newest alone.",
            also=[_cached(again=lambda prompt, new: new)]),
        Misconception("no memory", _new_cache_each_time,
            "Each new token sees nothing but itself: the cache is new at every step, or every "
            "token stands at position 0. One cache, positions that grow."),
        Misconception("prompt's last token lost", _cached(first=lambda prompt: prompt[:-1]),
            "The last token of the prompt is never read, so even the first choice differs. Only "
            "the positions in the loop are wrong."),
        Misconception("only the new counted", _cached(position=lambda prompt, step: step + 1),
            "The position counts the new tokens only. The prompt stands before them: its length "
            "belongs to the sum."),
        Misconception("a plain number", _plain_position,
            "The position is a plain number. The model wants a tensor, with one position for each "
            "token that it reads."),
        Misconception("positions of the whole text", _positions_of_all,
            "Positions came for the whole text, but only one token is read. It needs one position: "
            "its own."),
    ),
    hints=(
        Hint("I do not see what is wrong",
             "The first new token agrees with the uncached text, the second does not. What did the "
             "model learn about the first new token when it read it?"),
        Hint("What should the position be?",
             "A prompt of 6 tokens has positions 0 to 5. Which position has the first new token, "
             "and which the second?"),
        Hint("How do I repair it?",
             "Either the position is the length of the prompt plus the step, or you leave "
             "positions out: then the model goes on after what its cache has seen."),
    ),
    praise="Cached equals uncached: the one test that finds this whole family of bugs.",
)


# ---------------------------------------------------------------- exercise: work_of_writing


def seven_and_five_without():
    return {"prompt": 7, "new": 5, "cached": False}


def seven_and_five_with():
    return {"prompt": 7, "new": 5, "cached": True}


def one_token_only():
    return {"prompt": 12, "new": 1, "cached": True}


def a_short_prompt_and_many():
    return {"prompt": 1, "new": 40, "cached": False}


def _work(tokens, pairs):
    return lambda prompt, new, cached: (tokens(prompt, new, cached), pairs(prompt, new, cached))


def _tokens(P, n, cached):
    return P + n - 1 if cached else sum(P + i for i in range(n))


def _triangle(t):
    return t * (t + 1) // 2


def _pairs(P, n, cached):
    return _triangle(P + n - 1) if cached else sum(_triangle(P + i) for i in range(n))


def _work_by_counting(prompt, new, cached):
    tokens = pairs = kept = 0
    for length in range(prompt, prompt + new):
        for t in range(kept, length):
            tokens, pairs = tokens + 1, pairs + t + 1
        kept = length if cached else 0
    return tokens, pairs


WORK_OF_WRITING = Exercise(
    name="work_of_writing", chapter=6, kind="function", entry="work_of_writing",
    title="What writing costs, exactly", difficulty="medium", importance="essential", minutes=12,
    reference=_work(_tokens, _pairs),
    fixtures=(seven_and_five_without, seven_and_five_with, one_token_only, a_short_prompt_and_many),
    equivalents={
        "counted": _work_by_counting,
        "closed form": lambda prompt, new, cached: (
            (prompt + new - 1, _triangle(prompt + new - 1)) if cached else (
                new * prompt + _triangle(new - 1),
                sum((prompt + i) * (prompt + i + 1) for i in range(new)) // 2)),
        "a list": lambda prompt, new, cached: list(_work(_tokens, _pairs)(prompt, new, cached)),
    },
    misconceptions=(
        Misconception("the last token read", lambda prompt, new, cached: _work(_tokens, _pairs)(
                prompt, new + 1, cached),
            "The last new token is counted as read. It is chosen and handed out; nobody reads it "
            "any more.",
            also=[_work(
                      lambda P, n, c: P + n if c else _tokens(P, n, c),
                      lambda P, n, c: _triangle(P + n) if c else _pairs(P, n, c))]),
        Misconception("prompt forgotten", _work(
                lambda P, n, c: n if c else _triangle(n),
                lambda P, n, c: _triangle(n) if c else sum(_triangle(i + 1) for i in range(n))),
            "The prompt is missing. It is read as well, once with a cache and every time "
            "without, and its tokens make pairs.",
            also=[_work(
                      lambda P, n, c: n if c else _tokens(P, n, c),
                      lambda P, n, c: _triangle(n) if c else _pairs(P, n, c))]),
        Misconception("same for both", lambda prompt, new, cached: _work(_tokens, _pairs)(
                prompt, new, True),
            "Without a cache you count each token once. But then the whole text is read again for "
            "every new token."),
        Misconception("never cached", lambda prompt, new, cached: _work(_tokens, _pairs)(
                prompt, new, False),
            "With the cache you count the text again at every step. A token that was read stays "
            "in the cache."),
        Misconception("square of pairs", _work(_tokens,
                lambda P, n, c: (P + n - 1) ** 2 if c else sum((P + i) ** 2 for i in range(n))),
            "Pairs are counted as a full square. Causality halves it: a token looks at itself "
            "and at those before it.",
            also=[_work(_tokens,
                      lambda P, n, c: _pairs(P, n, c) if c else sum(
                          (P + i) ** 2 for i in range(n))),
                  _work(_tokens,
                      lambda P, n, c: P * P + sum(P + i for i in range(1, n)) if c
                      else sum((P + i) ** 2 for i in range(n)))]),
        Misconception("pairs without itself", _work(_tokens,
                lambda P, n, c: _pairs(P, n, c) - _tokens(P, n, c)),
            "The tokens are right; each makes one pair too few. A query may attend to its own "
            "key as well: token 0 makes one pair, not none.",
            also=[_work(_tokens,
                      lambda P, n, c: _triangle(P) + sum(P + i for i in range(n - 1)) if c
                      else _pairs(P, n, c))]),
        Misconception("cached queries counted in the prompt", _work(_tokens,
                lambda P, n, c: sum(P + i for i in range(n)) if c else _pairs(P, n, c)),
            "With the cache only the last query of the prompt is counted. Every token of the "
            "prompt looks around once, when it is read."),
        Misconception("pairs as with a cache", _work(_tokens, lambda P, n, c: _pairs(P, n, True)),
            "The tokens are right. Without a cache the old queries look again at every step, so "
            "their pairs count again."),
        Misconception("prompt counted short in the cache", _work(_tokens,
                lambda P, n, c: _triangle(P) + sum(P + i for i in range(n)) if c
                else _pairs(P, n, c)),
            "With the cache you counted the look of the prompt's last token twice. Each new token "
            "that is read looks at one key more than the one before."),
        Misconception("one token looks at one", _work(_tokens, _tokens),
            "One pair is counted for each token. A token makes a pair with each key that it may "
            "see, so the pairs grow faster.",
            also=[_work(_tokens,
                      lambda P, n, c: P + n - 1 if c else _pairs(P, n, c))]),
        Misconception("one triangle of all that is read", _work(_tokens,
                lambda P, n, c: _triangle(_tokens(P, n, c))),
            "Without a cache you made one triangle of all tokens read. Each reading begins anew: a "
            "triangle for each, then their sum."),
        Misconception("each reading one too long", lambda prompt, new, cached: _work(
                _tokens, _pairs)(prompt if cached else prompt + 1, new, cached),
            "Without a cache every reading is one token too long. Before the first choice only the "
            "prompt is read."),
    ),
    hints=(
        Hint("I do not know where to start",
             "A prompt of 3, two new tokens. Write down what is read before the first choice, and "
             "what before the second."),
        Hint("My numbers are a little too large",
             "The second of two new tokens is chosen and never read. Without a cache: 3 + 4 = 7 "
             "tokens. With one: 3 + 1 = 4."),
        Hint("How many pairs?",
             "Reading t tokens from the start makes 1 + 2 + ... + t pairs, t(t + 1)/2. With a cache "
             "each token is read once, so it is one such sum over all that are read."),
    ),
    praise="Counted before it is measured: that is how one finds out what is slow.",
)


# ---------------------------------------------------------------- exercise: beam


@cache
def _chain(seed: int, size: int) -> Tensor:
    """Scores of the next word at each place, by the last word. (12, V, V)"""
    return _logits(seed, 12, size, size).log_softmax(-1)


def _speaks(seed: int, size: int):
    def next_logs(ids):
        table = _chain(seed, size)[len(ids)]
        return (table[ids[-1]] + 0.1 * table[ids[-2]]).log_softmax(-1)
    return next_logs


def a_trap_for_the_greedy():
    table = torch.tensor([[0.0, 0.55, 0.45, 0.0], [0.0, 0.3, 0.3, 0.4],
                          [0.02, 0.03, 0.05, 0.9], [0.25, 0.25, 0.25, 0.25]]) + 1e-6
    return (lambda ids: table[ids[-1]].log()), [3, 0], 2, 2


def five_words_width_two():
    return _speaks(43, 5), [3, 1], 2, 4


def five_words_width_three():
    return _speaks(659, 5), [4, 0, 1], 3, 4


def _beam(join=lambda old, new: old + new, pick=max, cross=True, whole=False, widths=None,
          rank=None):
    """Beam search with one step exchanged."""
    def beam(next_logs, start, width, steps):
        beams = [(0.0, list(start))]
        for step in range(steps):
            grown = []
            for total, ids in beams:
                logs = next_logs(ids).tolist()
                children = [(join(total, log), ids + [i]) for i, log in enumerate(logs)]
                keep = (widths or (lambda step, width: width))(step, width)
                if not cross:
                    children = sorted(children, key=lambda b: -b[0])[:keep]
                grown += children
            grown.sort(key=rank or (lambda b: -b[0]), reverse=pick is min)
            beams = grown if not cross else grown[:keep]
        best = pick(beams, key=lambda b: b[0])[1]
        return best if whole else best[len(start):]
    return beam


def _beam_by_tensors(next_logs, start, width, steps):
    ids, totals = torch.tensor([start]), torch.zeros(1)
    for _ in range(steps):
        logs = torch.stack([next_logs(row.tolist()) for row in ids])
        best, places = (totals[:, None] + logs).flatten().topk(
            min(width, len(ids) * logs.shape[1]))
        ids = torch.cat([ids[places // logs.shape[1]], places[:, None] % logs.shape[1]], 1)
        totals = best
    return ids[totals.argmax(), len(start):].tolist()


def _greedy(next_logs, start, width, steps):
    ids = list(start)
    for _ in range(steps):
        ids.append(int(next_logs(ids).argmax()))
    return ids[len(start):]


def _branch_once(next_logs, start, width, steps):
    found = []
    for token in next_logs(start).topk(width)[1].tolist():
        ids, total = [*start, token], next_logs(start)[token].item()
        for _ in range(steps - 1):
            best = next_logs(ids).max(-1)
            ids, total = [*ids, int(best[1])], total + best[0].item()
        found.append((total, ids))
    return max(found)[1][len(start):]


def _forgets_start(next_logs, start, width, steps):
    return _beam()(lambda ids: next_logs(ids[:1]), start, width, steps)


def _beam_kept(keep, grow=None, last=lambda beams, start: beams[0][1][len(start):]):
    """Beam search with another choice of what is kept."""
    def beam(next_logs, start, width, steps):
        beams = [(0.0, list(start))]
        for _ in range(steps):
            grown = []
            for total, ids in beams:
                children = [(total + log, ids + [i])
                            for i, log in enumerate(next_logs(ids).tolist())]
                grown = grow(grown, children, width) if grow else grown + children
            beams = keep(grown, width)
        return last(beams, start)
    return beam


def _best(grown, width):
    return sorted(grown, reverse=True)[:width]


def _one_list(next_logs, start, width, steps):
    beams = [(0.0, list(start))]
    for _ in range(steps):
        grown = []
        for total, ids in beams:
            for i, log in enumerate(next_logs(ids).tolist()):
                ids.append(i)
                grown.append((total + log, ids))
        beams = _best(grown, width)
    return beams[0][1][len(start):]


BEAM = Exercise(
    name="beam", chapter=6, kind="function", entry="beam",
    title="The likeliest text is not the greedy one", difficulty="hard", importance="optional",
    minutes=18,
    reference=_beam(),
    fixtures=(a_trap_for_the_greedy, five_words_width_two, five_words_width_three),
    equivalents={
        "tensors": _beam_by_tensors,
        "costs instead of logarithms": lambda next_logs, start, width, steps: _beam(
            join=lambda old, new: old - new, rank=lambda b: b[0], pick=lambda beams, key: min(
                beams, key=key))(next_logs, start, width, steps),
        "products of probabilities": lambda next_logs, start, width, steps: _beam(
            join=lambda old, new: (old or 1.0) * math.exp(new))(next_logs, start, width, steps),
    },
    misconceptions=(
        Misconception("greedy", _greedy,
            "That is the greedy text: one beginning is kept, or copies of one. Start with a single "
            "one, and keep several continuations, also some that look worse."),
        Misconception("only the last step counts", _beam(join=lambda old, new: new),
            "Beginnings are ranked by their newest token alone. What counts is the whole text: the "
            "sum of all its logarithms."),
        Misconception("never cut", _beam(cross=False),
            "You keep the best continuations of each beginning, but never cut the whole list, so "
            "it grows without end. Of all together only the best few stay."),
        Misconception("start returned", _beam(whole=True),
            "The start stands in front of the result. Return the new tokens alone."),
        Misconception("one step too few", lambda next_logs, start, width, steps: _beam()(
                next_logs, start, width, steps - 1),
            "The text is one token too short: take as many steps as asked."),
        Misconception("asks about a part",
            lambda next_logs, start, width, steps: _beam()(
                lambda ids: next_logs(start), start, width, steps),
            "The model is asked about a part of the text only. Ask after the whole beginning, "
            "the start and all new tokens.",
            also=[_forgets_start,
                  lambda next_logs, start, width, steps:
                      _beam()(lambda ids: next_logs(ids[len(start):]), start, width, steps)]),
        Misconception("branches at the first step only", _branch_once,
            "Only the first step branches; after it each beginning goes on greedily. Let every "
            "step continue all beginnings and keep the best of all."),
        Misconception("sorted upwards", _beam_kept(
                lambda grown, width: sorted(grown)[:width],
                lambda grown, children, width: grown + _best(children, width)),
            "Sorting goes upwards unless told otherwise, so the less likely beginnings stay. The "
            "largest sums come first."),
        Misconception("only the last beginning goes on", _beam_kept(
                _best, lambda grown, children, width: children),
            "Only the continuations of the last beginning are left: the list starts anew for each. "
            "Collect those of all, then sort."),
        Misconception("one list for all", _one_list,
            "All continuations share one list, which grows with each of them. Make a new list for "
            "every continuation."),
        Misconception("all of them returned", _beam_kept(_best, last=lambda beams, start: [
                ids[len(start):] for _, ids in beams]),
            "All beginnings came back. Return the likeliest alone."),
        Misconception("the pair as it is", _beam_kept(_best, last=lambda beams, start: beams[0]),
            "The whole pair came back, sum and start included. Return the new ids alone."),
        Misconception("the least likely at the end", _beam_kept(
                _best, last=lambda beams, start: beams[-1][1][len(start):]),
            "At the end you took the last of those kept, which is the least likely. Take the "
            "first."),
        Misconception("never sorted", _beam_kept(lambda grown, width: grown[:width]),
            "The first few continuations stay, whatever their sums. Sort them all, the largest sum "
            "first, and then cut."),
    ),
    hints=(
        Hint("I do not know where to start",
             "What do you have to remember about a beginning: which two things?"),
        Hint("How does one step go?",
             "With width 2 and 4 tokens: 2 beginnings give 8 continuations, each with its own sum. "
             "Sort all 8, keep 2."),
        Hint("I get the greedy text",
             "A list of pairs (sum, ids), at first one pair with sum 0. In each step: all "
             "continuations of all pairs, sum plus new logarithm, sorted, the first width. At the "
             "end the ids of the best, without the start."),
    ),
    praise="Likeliest is not the same as best: look at what it writes.",
)


# ---------------------------------------------------------------- exercise: share_and_error


def thirty_of_forty():
    return ([True] * 30 + [False] * 10,)


def three_of_seventeen():
    return ([False, True, False, False, False, True, False, False, True] + [False] * 8,)


def all_accepted():
    return ([True] * 9,)


def _share(error):
    def share_and_error(accepted):
        n = len(accepted)
        s = sum(accepted) / n
        return s, error(s, n)
    return share_and_error


def _named(candidate, accepted):
    """The two numbers by their names, so that a message can say which is wrong."""
    found = candidate(accepted)
    pair = isinstance(found, (tuple, list)) and len(found) == 2
    return dict(zip(("share", "error"), map(float, found))) if pair else found


def _root(s, n):
    return math.sqrt(s * (1 - s) / n)


SHARE_AND_ERROR = Exercise(
    name="share_and_error", chapter=6, kind="open", entry="share_and_error",
    title="Which setting writes best?", difficulty="medium", importance="useful", minutes=25,
    reference=_share(_root), run=_named,
    fixtures=(thirty_of_forty, three_of_seventeen, all_accepted),
    equivalents={
        "tensors": lambda accepted: (lambda x: (x.mean().item(),
            (x.std(correction=0) / len(x) ** 0.5).item()))(torch.tensor(accepted).double()),
        "power": _share(lambda s, n: (s * (1 - s)) ** 0.5 / n ** 0.5),
        "a list": lambda accepted: list(_share(_root)(accepted)),
    },
    misconceptions=(
        Misconception("no root", _share(lambda s, n: s * (1 - s) / n),
            "The share is right. The error is too small: the square root is missing."),
        Misconception("root without n", _share(lambda s, n: math.sqrt(s * (1 - s))),
            "The error does not shrink with the number of texts. Divide by n inside the root."),
        Misconception("n outside the root", _share(lambda s, n: math.sqrt(s * (1 - s)) / n),
            "The error shrinks too fast: n belongs under the root. Four times the texts halve it."),
        Misconception("one over root of n", _share(lambda s, n: 1 / math.sqrt(n)),
            "The error ignores the share. When all texts are accepted it has to be 0 by this "
            "formula."),
        Misconception("counted", lambda accepted: (
                sum(accepted), math.sqrt(len(accepted) * _share(_root)(accepted)[0]
                                         * (1 - _share(_root)(accepted)[0]))),
            "You returned how many were accepted. Wanted is the share: divide by the number of "
            "texts."),
        Misconception("the number in the formula", lambda accepted: (
                sum(accepted), math.sqrt(sum(accepted) * (1 - sum(accepted)) / len(accepted))),
            "Something negative stands under the root: you used the number of accepted texts. The "
            "formula wants their share, between 0 and 1."),
        Misconception("divided by n - 1", _share(lambda s, n: math.sqrt(s * (1 - s) / (n - 1))),
            "Nearly: you divided by n - 1. The formula here has n; for many texts it makes no "
            "difference."),
        Misconception("two errors", _share(lambda s, n: 2 * _root(s, n)),
            "That is twice the standard error. Return it once; the doubling comes when you "
            "compare."),
        Misconception("brackets missing", _share(lambda s, n: math.sqrt(s * 1 - s / n)),
            "Brackets are missing: the product is that of the share and of one minus the share, "
            "and all of it is divided by n."),
        Misconception("spread of single texts", lambda accepted: (lambda x: (
                x.mean().item(), x.std().item()))(torch.tensor(accepted).double()),
            "That is the spread of single texts. The error of their mean is smaller, by the root "
            "of n."),
        Misconception("error first", lambda accepted: _share(_root)(accepted)[::-1],
            "The two numbers are exchanged: first the share, then its error."),
    ),
    hints=(
        Hint("I do not know where to start",
             "True counts as 1. What is the mean of the list?"),
        Hint("My error is wrong",
             "With 30 of 40: s = 0.75, s(1 - s)/n = 0.0046875, and its square root is 0.068."),
        Hint("How do I compare two settings?",
             "Take the difference of two shares. If it is larger than twice the root of the sum of "
             "both squared errors, chance alone is a poor explanation."),
    ),
    praise="Now a difference can be told from luck.",
)


EXERCISES = [DRAW, KEEP_TOP_K, KEEP_TOP_P, REMEMBER, WITH_TEMPERATURE, CACHED_LOOP, KEEP_MIN_P,
             UNTIL_STOP, WRITE_CACHED, WORK_OF_WRITING, BEAM, SHARE_AND_ERROR]
