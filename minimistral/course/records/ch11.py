"""Chapter 11, GPU inference: the bytes of a step, its core piece and its exercises."""

from __future__ import annotations

import math
import statistics
import time
from numbers import Integral

import torch
from torch import Tensor

from minimistral.config import (MODELS, ModelConfig, MoEConfig, cache_bytes_per_token,
                                count_parameters)
from minimistral.speculative import accept, draw_one

from ..chapters.ch11_gpu_inference import (FakeDevice, ToyModel, cache_bytes, count_up, step_bytes,
                                           step_operations)
from ..exercises import Exercise, Hint, Misconception

# ---------------------------------------------------------------- the bytes of a step

WINDOWED = ModelConfig(24, 5, 6, 2, 8, 40, 70, sliding_window=48)
PATTERN = ModelConfig(40, 6, 10, 2, 4, 56, 90, sliding_window=(None, 30, 30), tied_embeddings=True)
MIXED = ModelConfig(32, 4, 4, 2, 12, 36, 110, moe=MoEConfig(7, 2))


def three_texts_longer_than_the_window():
    return WINDOWED, 3, 700, 16


def two_texts_shorter_than_the_window():
    return WINDOWED, 2, 20, 8


def five_texts_for_a_mixture():
    return MIXED, 5, 60, 4


def one_long_text_for_a_mixture():
    return MIXED, 1, 900, 4


def windows_in_a_pattern_and_one_table():
    return PATTERN, 4, 80, 16


def mistral_7b():
    return MODELS["mistral-7b-v0.2"], 8, 2000, 16


def _step(weights=None, touched=None, cache=None, table=None, read=1.0):
    """step_bytes with one part exchanged."""
    def step_bytes(config, batch, length, bits=16):
        count = count_parameters(config)
        numbers = weights(count) if weights else count.active
        rows = 0 if config.tied_embeddings else config.vocab_size * config.dim
        numbers -= table(config) if table else rows
        if config.moe and weights is None:
            E, k = config.moe.num_experts, config.moe.num_experts_per_tok
            woken = touched(E, k, batch) if touched else E * (1 - (1 - k / E) ** batch)
            numbers += (woken - k) * 3 * config.dim * config.hidden_dim * config.n_layers
        kept = cache(config, batch, length, bits) if cache else batch * cache_bytes(config, length)
        return numbers * bits / 8 * (batch if read != 1.0 else 1) + kept
    return step_bytes


def _step_by_layers(config, batch, length, bits=16):
    """All of it counted part by part."""
    c, total, cached = config, config.dim, 0
    for layer in range(c.n_layers):
        attention = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
        one = 3 * c.dim * c.hidden_dim
        if c.moe:
            E, k = c.moe.num_experts, c.moe.num_experts_per_tok
            missed = ((E - k) / E) ** batch
            total += E * (1 - missed) * one + c.dim * E
        else:
            total += one
        total += attention + 2 * c.dim
        window = c.window(layer)
        cached += (length if window is None else min(window, length)) * 2 * c.n_kv_heads * c.head_dim
    total += c.vocab_size * c.dim
    return total * bits / 8 + batch * cached * 2


def _experts_of_one_layer(config, batch, length, bits=16):
    one = step_bytes(config, 1, 0, bits)
    layers = config.n_layers if config.moe else 1
    return one + (step_bytes(config, batch, 0, bits) - one) / layers + batch * cache_bytes(config, length)


def _one_matrix_of_an_expert(config, batch, length, bits=16):
    one = step_bytes(config, 1, 0, bits)
    return one + (step_bytes(config, batch, 0, bits) - one) / 3 + batch * cache_bytes(config, length)


def _whole_windows(config, batch, length, bits):
    seen = sum(config.window(n) or length for n in range(config.n_layers))
    return batch * seen * cache_bytes_per_token(config) / config.n_layers


def _only_windows(config, batch, length, bits):
    seen = sum(min(length, config.window(n) or 0) for n in range(config.n_layers))
    return batch * seen * cache_bytes_per_token(config) / config.n_layers


def _last_layer(config, batch, length, bits):
    seen = min(length, config.window(config.n_layers - 1) or length)
    return batch * seen * cache_bytes_per_token(config) / config.n_layers


def _further_experts_as_bytes(config, batch, length, bits=16):
    one = step_bytes(config, 1, 0, bits)
    more = step_bytes(config, batch, 0, bits) - one
    return one + 8 * more / bits + batch * cache_bytes(config, length)


def _all_grows_with_experts(config, batch, length, bits=16):
    numbers = 8 * step_bytes(config, 1, 0, bits) / bits
    if config.moe:
        E, k = config.moe.num_experts, config.moe.num_experts_per_tok
        numbers *= E * (1 - (1 - k / E) ** batch) / k
    return numbers * bits / 8 + batch * cache_bytes(config, length)


def _no_window(config, batch, length, bits):
    return batch * length * cache_bytes_per_token(config)


STEP_BYTES = Exercise(
    name="step_bytes", chapter=11, kind="function", entry="step_bytes",
    title="The bytes of a step", difficulty="medium", importance="essential", minutes=8,
    reference=step_bytes,
    fixtures=(three_texts_longer_than_the_window, two_texts_shorter_than_the_window,
              five_texts_for_a_mixture,
              one_long_text_for_a_mixture, windows_in_a_pattern_and_one_table, mistral_7b),
    equivalents={"layer by layer": _step_by_layers, "in parts": _step()},
    misconceptions=(
        Misconception("the input table counted whole", _step(table=lambda config: 0),
            "Too many bytes: the whole table of token embeddings is in it. A step looks up one row "
            "for each text."),
        Misconception("the table taken off although it is shared",
            _step(table=lambda config: config.vocab_size * config.dim),
            "With tied embeddings the one table is also the output layer, which is read whole. "
            "Then there is nothing to take off."),
        Misconception("the table taken off only if it is shared", _step(
                table=lambda c: c.vocab_size * c.dim if c.tied_embeddings else 0),
            "The condition is turned round: a table of its own is looked up, a shared one is read "
            "whole."),
        Misconception("both tables taken off", _step(
                table=lambda c: 0 if c.tied_embeddings else 2 * c.vocab_size * c.dim),
            "The output layer is missing. It is multiplied like any matrix; only the table at the "
            "input is looked up."),
        Misconception("weights read for each text", _step(read=2.0),
            "The weights were multiplied by the batch. They are read once, for all texts of a step."),
        Misconception("the cache forgotten", _step(cache=lambda *_: 0),
            "Only weights were counted. Each text also reads its keys and values."),
        Misconception("the cache of one text",
            _step(cache=lambda config, batch, length, bits: cache_bytes(config, length)),
            "The cache was counted once. Each text of the batch has its own."),
        Misconception("the window forgotten", _step(cache=_no_window),
            "A layer with a window reads at most a window of keys and values, however long the "
            "text."),
        Misconception("a whole window for a short text", _step(cache=_whole_windows),
            "A short text was counted as a full window. A layer reads what is there, at most a "
            "window."),
        Misconception("the window of layer 0 for all",
            _step(cache=lambda config, batch, length, bits: batch * cache_bytes_per_token(config)
                  * min(length, config.window(0) or length)),
            "Layers may differ in their windows. Ask each layer for its own."),
        Misconception("the cache multiplied by the layers",
            _step(cache=lambda config, batch, length, bits:
                  batch * config.n_layers * cache_bytes(config, length)),
            "The cache is counted once too often for each layer: the bytes of a token are those of "
            "all layers together."),
        Misconception("the cache of the new token only",
            _step(cache=lambda config, batch, length, bits: batch * cache_bytes_per_token(config)),
            "Only the new token's keys and values were counted. A step reads those of all tokens that "
            "it looks at."),
        Misconception("the cache in the weights' bits",
            _step(cache=lambda config, batch, length, bits:
                  batch * cache_bytes(config, length) * bits / 16),
            "The cache changed with the bits of the weights. It keeps 16 bits for each number."),
        Misconception("the cache's bytes taken for numbers",
            _step(cache=lambda config, batch, length, bits:
                  batch * cache_bytes(config, length) * bits / 8),
            "The cache was multiplied by the bits. What a token takes there is given in bytes "
            "already."),
        Misconception("keys and values doubled",
            _step(cache=lambda config, batch, length, bits: 2 * batch * cache_bytes(config, length)),
            "The cache is twice too large: the bytes of a token hold its keys and its values "
            "already."),
        Misconception("no tokens where no window is", _step(cache=_only_windows),
            "Layers without a window were given no tokens at all. They look at the whole text."),
        Misconception("the cache of one layer", _step(cache=_last_layer),
            "The cache of a single layer was counted. Add up the tokens that all layers look at."),
        Misconception("the new token added",
            _step(cache=lambda config, batch, length, bits: batch * cache_bytes(config, length + 1)),
            "One token too many in each cache. The length is that of the whole text, the newest "
            "token included."),
        Misconception("two experts whatever the batch", _step(touched=lambda E, k, batch: k),
            "A mixture's bytes do not grow with the batch. Several texts wake up more experts than "
            "one does."),
        Misconception("k experts for each text",
            _step(touched=lambda E, k, batch: min(E, k * batch)),
            "Experts were counted as k for each text. Texts share some of their experts: count "
            "those that at least one text chose."),
        Misconception("all experts", _step(weights=lambda count: count.total),
            "All experts were counted. A step reads those that at least one of its texts chose; "
            "others stay unread."),
        Misconception("choices with repetition",
            _step(touched=lambda E, k, batch: E * (1 - (1 - 1 / E) ** (k * batch))),
            "Nearly: the k experts of one text differ from each other. An expert is left out by "
            "one text with probability 1 - k / E."),
        Misconception("a whole number of experts", _step(
                touched=lambda E, k, batch: round(E * (1 - (1 - k / E) ** batch))),
            "The number of experts was rounded. It is an average over many steps, and need not be "
            "whole.",
            also=[_step(touched=lambda E, k, batch: int(E * (1 - (1 - k / E) ** batch)))]),
        Misconception("a multiple for a power",
            _step(touched=lambda E, k, batch: E * (1 - (1 - k / E) * batch)),
            "The chance to be left out was multiplied by the batch. All texts leave an expert out "
            "with the product of their chances: a power."),
        Misconception("all weights grow with the experts", _all_grows_with_experts,
            "Attention and output grew with the number of experts. They are there once; only "
            "experts are read for more texts."),
        Misconception("the share of left-out experts",
            _step(touched=lambda E, k, batch: E * (1 - k / E) ** batch),
            "You counted the experts that nobody chose. Those chosen are the rest."),
        Misconception("the chosen experts counted twice", _step(touched=lambda E, k, batch:
                E * (1 - (1 - k / E) ** batch) + k),
            "The active count holds k experts already. Add only those that are read beyond them."),
        Misconception("k over E for a left-out expert",
            _step(touched=lambda E, k, batch: E * (1 - (k / E) ** batch)),
            "That is the share of experts that not all texts chose. One text leaves an expert out "
            "with probability 1 - k / E."),
        Misconception("one choice for each text",
            _step(touched=lambda E, k, batch: E * (1 - (1 - 1 / E) ** batch)),
            "Too few experts: each text chooses k of them in a layer, not one."),
        Misconception("experts of one layer", _experts_of_one_layer,
            "The experts beyond k were counted for one layer. Each layer has its own."),
        Misconception("one matrix of an expert", _one_matrix_of_an_expert,
            "Of each further expert one matrix was counted. It has three, of dim times hidden "
            "numbers each."),
        Misconception("two bytes whatever the bits",
            lambda config, batch, length, bits=16: step_bytes(config, batch, length, 16),
            "The bits have no effect on your weights. A weight has bits / 8 bytes."),
        Misconception("bits not divided by 8",
            lambda config, batch, length, bits=16: 8 * (
                step_bytes(config, batch, length, bits) - batch * cache_bytes(config, length))
            + batch * cache_bytes(config, length),
            "The weights are 8 times too large: bits were added as if they were bytes."),
        Misconception("further experts without their bits", _further_experts_as_bytes,
            "The weights of the further experts were added as if each were a byte. Their bits count as "
            "those of all weights."),
        Misconception("whole bytes only",
            lambda config, batch, length, bits=16: bits // 8 * (
                step_bytes(config, batch, 0, 8)) + batch * cache_bytes(config, length),
            "Weights of 4 bits take no bytes at all in yours: a division of whole numbers drops "
            "half a byte."),
        Misconception("in gigabytes",
            lambda config, batch, length, bits=16: step_bytes(config, batch, length, bits) / 1e9,
            "You return gigabytes. The task asks for bytes."),
        Misconception("the looked-up rows added",
            lambda config, batch, length, bits=16: step_bytes(config, batch, length, bits) + (
                0 if config.tied_embeddings else batch * config.dim * bits / 8),
            "The rows that are looked up were added. They are so few that the count leaves them "
            "out."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take a dense model, one text of no length. Which of its matrices does a step read "
             "whole, and which one not?"),
        Hint("Dense is right, the mixture is not",
             "One text leaves an expert out with probability 1 - k / E, B texts all do with its "
             "B-th power. The chosen rest is read; k of them are in the active count already."),
        Hint("The cache is not right",
             "For each layer: the smaller of length and window. Their sum over the layers, times "
             "the bytes for one token divided by the number of layers, times the batch."),
    ),
    praise="The first of the two numbers that tell a speed before it is measured.",
)


# ---------------------------------------------------------------- piece: accept

P = torch.tensor([[0.60, 0.35, 0.03, 0.01, 0.01], [0.45, 0.20, 0.30, 0.03, 0.02],
                  [0.41, 0.10, 0.10, 0.37, 0.02], [0.50, 0.40, 0.06, 0.02, 0.02],
                  [0.05, 0.05, 0.20, 0.10, 0.60], [0.35, 0.30, 0.30, 0.03, 0.02],
                  [0.02, 0.30, 0.03, 0.30, 0.35]])
Q = torch.tensor([[0.02, 0.95, 0.01, 0.01, 0.01], [0.02, 0.60, 0.34, 0.02, 0.02],
                  [0.05, 0.45, 0.45, 0.03, 0.02], [0.60, 0.10, 0.20, 0.05, 0.05],
                  [0.10, 0.50, 0.10, 0.15, 0.15], [0.15, 0.50, 0.15, 0.10, 0.10]])


def three_proposals_the_first_always_accepted():
    return [1, 2, 1], Q[[3, 2, 1]], P[[3, 2, 1, 4]], 400


def three_proposals_the_first_often_rejected():
    return [1, 1, 2], Q[[0, 3, 2]], P[[0, 3, 2, 1]], 400


def two_proposals():
    return [1, 1], Q[[1, 3]], P[[1, 3, 4]], 400


def two_proposals_both_in_doubt():
    return [1, 1], Q[[4, 5]], P[[5, 6, 0]], 401


def two_proposals_that_are_always_right():
    return [0, 1], P[[2, 3]], P[[2, 3, 4]], 200


def no_proposals():
    return [], Q[:0], P[1:2], 200


def greedy_choice_a_wrong_proposal():
    hot = torch.eye(5)
    return [2, 1], hot[[2, 1]], hot[[2, 4, 0]], 3


_seen: dict[tuple, Tensor] = {}  # of the record's own functions, which never change


def _run_accept(candidate, proposed, q, p, times):
    key = candidate, tuple(proposed), times
    if key in _seen:
        return _seen[key]
    shares = _shares(candidate, proposed, q, p, times)
    if getattr(candidate, "__module__", "") in (__name__, accept.__module__):
        _seen[key] = shares
    return shares


def _shares(candidate, proposed, q, p, times):
    """Shares of the outcomes: a row for each number of tokens, a column for the last one, and how
    often the tokens before it were not the proposed ones."""
    first = _many(candidate, proposed, q, p, 20)
    if None in first:
        return None
    for tokens in first:
        if not isinstance(tokens, (list, tuple)):
            raise ValueError("no list")
        if any(isinstance(token, (list, tuple)) for token in tokens):
            raise ValueError("a list in the list")
        if not all(isinstance(token, Integral) for token in tokens):
            raise ValueError("tokens that are no whole numbers")
    if first != _many(candidate, proposed, q, p, 20):
        raise ValueError("other tokens from the same generator")
    chance = torch.Generator().manual_seed(11)
    found, odd = torch.zeros(len(proposed) + 2, p.shape[1]), 0
    for _ in range(times):
        given = list(proposed)
        tokens = candidate(given, q.clone(), p.clone(), chance)
        if given != proposed:
            raise ValueError("the list of proposals was changed")
        if len(tokens) > len(proposed) + 1:
            raise ValueError(f"{len(tokens)} tokens for {len(proposed)} proposals")
        if tokens:
            found[len(tokens), tokens[-1]] += 1
            odd += list(tokens[:-1]) != proposed[:len(tokens) - 1]
        else:
            found[0] += 1 / p.shape[1]
    return torch.cat([found.flatten() / times, torch.tensor([odd / times])])


def _many(candidate, proposed, q, p, times):
    chance = torch.Generator().manual_seed(3)
    told = []
    for _ in range(times):
        its_q, its_p = q.clone(), p.clone()
        told.append(candidate(list(proposed), its_q, its_p, chance))
        if not (torch.equal(q, its_q) and torch.equal(p, its_p)):
            raise ValueError("the distributions were changed")
    return told


def _close_shares(expected, actual):
    """Shares of 200 to 400 draws: the standard error of a difference is at most 0.05 and mostly
    below 0.035, so 0.15 is four of them. Draws made as the course makes them are equal."""
    gap = (expected - actual).abs()
    if gap.max() < 0.15:
        return None
    V, place = 5, int(gap.argmax())
    if place == len(gap) - 1:
        return f"tokens before the last one are not the proposed ones in {actual[-1]:.2f} of all calls"
    return (f"{place // V} tokens, the last of them {place % V}: expected in "
            f"{expected[place]:.2f} of all calls, got {actual[place]:.2f}")


def _accepts(chance=None, rest=None, bonus=None, row=0, stop=True, last=True, ratio=None,
             pick=draw_one):
    """accept with one part exchanged."""
    def accept(proposed, q, p, generator):
        kept = []
        for i, token in enumerate(proposed):
            now = p[min(i + row, len(p) - 1)]
            u = float(torch.rand((), generator=generator))
            if ratio:
                fine = ratio(u, now, q[i], token)
            else:
                fine = u < float(now[token] / q[i, token])
            if fine:
                kept.append(token)
                continue
            if not stop:
                continue
            left = rest(now, q[i], token) if rest else (now - q[i]).clamp(min=0)
            return kept + ([pick(left, generator)] if last else [])
        if bonus is None:
            return kept + [draw_one(p[-1], generator)]
        return kept + bonus(kept, q, p, generator)
    return accept


def _accept_by_multinomial(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand(1, generator=generator).item() > min(1.0, (p[i, token] / q[i, token]).item()):
            residual = torch.relu(p[i] - q[i])
            if residual.sum() == 0:
                residual = p[i]
            residual = residual / residual.sum()
            return proposed[:i] + [torch.multinomial(residual, 1, generator=generator).item()]
    return proposed + [torch.multinomial(p[len(proposed)], 1, generator=generator).item()]


def _accept_all_at_once(proposed, q, p, generator):
    n = len(proposed)
    if n:
        at = torch.arange(n), torch.tensor(proposed)
        fine = torch.rand(n, generator=generator) * q[at] < p[:-1][at]
        n = int(fine.long().cumprod(0).sum())
    weights = p[n] if n == len(proposed) else torch.maximum(p[n] - q[n], torch.zeros(()))
    return proposed[:n] + [draw_one(weights, generator)]


def _likeliest(weights, generator):
    return int(weights.argmax())


def _turned_round(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) < p[i, token] / q[i, token]:
            return [*proposed[:i], draw_one((p[i] - q[i]).clamp(min=0), generator)]
    return [*proposed, draw_one(p[-1], generator)]


def _below_zero(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) >= p[i, token] / q[i, token]:
            return [*proposed[:i], draw_one(p[i] - q[i], generator)]
    return [*proposed, draw_one(p[-1], generator)]


def _rejected_kept(proposed, q, p, generator):
    found = accept(proposed, q, p, generator)
    n = len(found) - 1
    return found if n == len(proposed) else [*found[:n], proposed[n], found[n]]


def _one_more(proposed, q, p, generator):
    found = accept(proposed, q, p, generator)
    return found if len(found) > len(proposed) else [*found, draw_one(p[-1], generator)]


def _global_chance(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand(()) >= p[i, token] / q[i, token]:
            return [*proposed[:i], draw_one((p[i] - q[i]).clamp(min=0), generator)]
    return [*proposed, draw_one(p[-1], generator)]


def _grown_in_place(proposed, q, p, generator):
    proposed[:] = accept(proposed, q, p, generator)
    return proposed


def _one_chance(proposed, q, p, generator):
    u = float(torch.rand((), generator=generator))
    return _accepts(ratio=lambda _, p, q, token: u < float(p[token] / q[token]))(
        proposed, q, p, generator)


def _replaced_and_on(proposed, q, p, generator):
    found = []
    for i, token in enumerate(proposed):
        found.append(accept([token], q[i:i + 1], torch.stack([p[i], p[i]]), generator)[0])
    return [*found, draw_one(p[-1], generator)]


def _replaced_in_place(proposed, q, p, generator):
    found = accept(proposed, q, p, generator)
    return [*found, *proposed[len(found):]]


def _accepted_ones_lost(proposed, q, p, generator):
    found = accept(proposed, q, p, generator)
    return found if len(found) > len(proposed) else found[-1:]


def _last_row_after_a_rejection(proposed, q, p, generator):
    found = accept(proposed, q, p, generator)
    return [*found[:-1], draw_one(p[-1], generator)]


def _last_difference_after_a_rejection(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) >= p[i, token] / q[i, token]:
            return [*proposed[:i], draw_one((p[-1] - q[-1]).clamp(min=0), generator)]
    return [*proposed, draw_one(p[-1], generator)]


def _the_next_row_itself(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) >= p[i, token] / q[i, token]:
            return [*proposed[:i], draw_one(p[i + 1], generator)]
    return [*proposed, draw_one(p[-1], generator)]


def _missing_to_the_next_row(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) >= p[i, token] / q[i, token]:
            return [*proposed[:i], draw_one((p[i + 1] - q[i]).clamp(min=0), generator)]
    return [*proposed, draw_one(p[-1], generator)]


def _returned_in_the_loop(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) < p[i, token] / q[i, token]:
            return proposed[:i + 1]
        return [*proposed[:i], draw_one((p[i] - q[i]).clamp(min=0), generator)]
    return [draw_one(p[-1], generator)]


def _list_in_a_list(proposed, q, p, generator):
    found = accept(proposed, q, p, generator)
    return [found[:-1], found[-1]]


def _difference_in_place(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) >= p[i, token] / q[i, token]:
            p[i] -= q[i]
            return [*proposed[:i], draw_one(p[i].clamp(min=0), generator)]
    return [*proposed, draw_one(p[-1], generator)]


def _places(proposed, q, p, generator):
    found = accept(proposed, q, p, generator)
    return [*range(len(found) - 1), found[-1]]


def _rows_for_columns(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) >= p[token, i] / q[token, i]:
            return [*proposed[:i], draw_one((p[i] - q[i]).clamp(min=0), generator)]
    return [*proposed, draw_one(p[-1], generator)]


def _row_behind_the_loop(proposed, q, p, generator):
    for i, token in enumerate(proposed):
        if torch.rand((), generator=generator) >= p[i, token] / q[i, token]:
            return [*proposed[:i], draw_one((p[i] - q[i]).clamp(min=0), generator)]
    return [*proposed, draw_one(p[i + 1], generator)]


def _tensors(proposed, q, p, generator):
    return [torch.tensor(token) for token in accept(proposed, q, p, generator)]


def _one_token(proposed, q, p, generator):
    return accept(proposed, q, p, generator)[-1]


def _rejected_returned(proposed, q, p, generator):
    found = accept(proposed, q, p, generator)
    return found if len(found) > len(proposed) else proposed[:len(found)]


ACCEPT = Exercise(
    name="accept", chapter=11, kind="piece", piece="speculative.accept", entry="accept",
    title="Accept or draw again", difficulty="medium", importance="essential", minutes=9,
    reference=accept, run=_run_accept, compare=_close_shares,
    fixtures=(three_proposals_the_first_always_accepted,
              three_proposals_the_first_often_rejected, two_proposals,
              two_proposals_both_in_doubt,
              two_proposals_that_are_always_right, no_proposals, greedy_choice_a_wrong_proposal),
    equivalents={"ratio": _accepts(), "multinomial": _accept_by_multinomial,
                 "all at once": _accept_all_at_once},
    misconceptions=(
        Misconception("drawn from p after a rejection", _accepts(rest=lambda p, q, token: p),
            "After a rejection you draw from all of p. What the draft proposes too seldom must be "
            "made up for: draw from what p has more than q."),
        Misconception("the rejected token excluded instead",
            _accepts(rest=lambda p, q, token: p * (torch.arange(len(p)) != token)),
            "Only the rejected token was taken out of p. The rest has to be p minus q, wherever "
            "that is above zero."),
        Misconception("difference without its sign", _accepts(rest=lambda p, q, token: (p - q).abs()),
            "Tokens that the draft proposes too often are drawn again. Where p is below q, the "
            "rest is 0."),
        Misconception("difference the wrong way round",
            _accepts(rest=lambda p, q, token: (q - p).clamp(min=0)),
            "The rest is turned round: it must be what p has more than q, not q more than p."),
        Misconception("ratio upside down",
            _accepts(ratio=lambda u, p, q, token: u < float(q[token] / p[token])),
            "Proposals that the model likes are rejected. A token is accepted with probability p "
            "over q, not q over p."),
        Misconception("accepted with probability p",
            _accepts(ratio=lambda u, p, q, token: u < float(p[token])),
            "Too few are accepted. The draft proposed the token with probability q already: the "
            "chance is p over q, and certain where p is larger."),
        Misconception("no chance at all",
            _accepts(ratio=lambda u, p, q, token: bool(p[token] >= q[token])),
            "A token with p below q is never accepted. It has to be, in the share p over q of the "
            "cases."),
        Misconception("accepted only if it is the likeliest",
            _accepts(ratio=lambda u, p, q, token: int(p.argmax()) == token),
            "Only the model's favourite is accepted. That is right for greedy choice alone; here "
            "chance decides, with p over q."),
        Misconception("the comparison turned round", _turned_round,
            "Good proposals are rejected and bad ones kept: accepted is what lies below the ratio, "
            "not above."),
        Misconception("one number for all proposals", _one_chance,
            "All proposals share one random number, so that they are accepted together. Each one "
            "needs its own."),
        Misconception("the likeliest in place of a rejected one", _accepts(pick=_likeliest),
            "The token in place of a rejected one is always the same. It is drawn, in proportion "
            "to what is missing."),
        Misconception("the likeliest at the end", _accepts(
                bonus=lambda kept, q, p, g: [int(p[-1].argmax())]),
            "The last token is always the likeliest one. It is drawn from the last row."),
        Misconception("replaced, and on", _replaced_and_on,
            "After a replaced token the other proposals are still checked. They were proposed for "
            "another text; the first rejection ends it."),
        Misconception("replaced among the proposals", _replaced_in_place,
            "The proposals after a rejected one are returned, too. Return the accepted ones and the "
            "new token, nothing behind it."),
        Misconception("the accepted ones lost", _accepted_ones_lost,
            "After a rejection only the new token is returned. The accepted ones come before it."),
        Misconception("goes on after a rejection", _accepts(stop=False),
            "A rejected token is skipped, and later ones are still used. They were proposed for "
            "another text: stop."),
        Misconception("no token after the last", _accepts(bonus=lambda *_: []),
            "All proposals accepted, and nothing more comes. The last row of p is one further "
            "token, for nothing."),
        Misconception("no token in place of a rejected one", _accepts(last=False),
            "A rejection gives no token. One is drawn in its place, so that every step writes at "
            "least one."),
        Misconception("the rejected token stays", _rejected_returned,
            "The rejected token is returned. In its place comes one drawn from what p has more "
            "than q."),
        Misconception("the further token from the row before",
            _accepts(bonus=lambda kept, q, p, g: [draw_one(p[-2] if len(p) > 1 else p[-1], g)]),
            "The token after the last proposal comes from the wrong row. p has one row more than "
            "there are proposals."),
        Misconception("p one row too late", _accepts(row=1),
            "Each token is held against the row after its own. Row 0 of p is for the first "
            "proposal."),
        Misconception("drawn from q after a rejection", _accepts(rest=lambda p, q, token: q),
            "After a rejection you draw from the draft's q again. Draw from what p has more than q."),
        Misconception("what is missing not cut at zero", _below_zero,
            "Where p is below q, your weights are negative, and a draw makes no sense. There the "
            "weight is 0."),
        Misconception("everything accepted", _accepts(ratio=lambda *_: True),
            "Every proposal is accepted, so the text is the draft's. Accept with probability p over "
            "q."),
        Misconception("the rejected token kept, and another drawn", _rejected_kept,
            "After a rejection the rejected token is still in the list. The one that is drawn takes its "
            "place."),
        Misconception("one more token after a rejection", _one_more,
            "After a rejection comes a token too many: the last row of p is for the case that all "
            "were accepted."),
        Misconception("chance of its own", _global_chance,
            "The same generator gives other tokens each time. All chance has to come from the generator "
            "that is handed in."),
        Misconception("the proposals changed", _grown_in_place,
            "Your code wrote into the list of proposals, which is counted later. Build a new list."),
        Misconception("the last row after a rejection", _last_row_after_a_rejection,
            "After a rejection the token comes from the last row of p. Draw from what row i has more "
            "than q, and return.", also=[_last_difference_after_a_rejection]),
        Misconception("what the next row has more than q", _missing_to_the_next_row,
            "In place of a rejected token you draw with the row after. Row i of p is for proposal i, "
            "as row i of q is.", also=[_the_next_row_itself]),
        Misconception("weights p over q", _accepts(rest=lambda p, q, token: p / q),
            "After a rejection you draw in proportion to p over q. What is missing is a difference, "
            "p minus q."),
        Misconception("the difference through a softmax",
            _accepts(rest=lambda p, q, token: (p - q).softmax(-1)),
            "A softmax lets every token come. Cut the difference at zero; the draw needs no weights "
            "that sum to 1."),
        Misconception("q subtracted at the end, too", _accepts(bonus=lambda kept, q, p, g: [
                draw_one((p[-1] - q[-1]).clamp(min=0) if len(q) else p[-1], g)]),
            "After the last proposal nothing was proposed, so nothing is subtracted. Draw from the "
            "last row of p as it is."),
        Misconception("accepted with probability q",
            _accepts(ratio=lambda u, p, q, token: u < float(q[token])),
            "You accept as often as the draft likes a token. It was drawn by q already; accept with "
            "probability p over q."),
        Misconception("returned in the loop", _returned_in_the_loop,
            "You return after the first proposal, accepted or not. Go on while proposals are "
            "accepted."),
        Misconception("tensors in the list", _tensors,
            "The list holds tensors. They print like numbers, but a stop id is not found among them. "
            "Return plain whole numbers."),
        Misconception("the distributions changed", _difference_in_place,
            "Your code wrote into the model's distributions, which are another's. Subtract into a new "
            "tensor."),
        Misconception("a list in the list", _list_in_a_list,
            "A list stands inside the list. Put the accepted tokens themselves into it, one after the "
            "other."),
        Misconception("places instead of tokens", _places,
            "The places of the accepted proposals are returned, not the tokens that stand there."),
        Misconception("row and column exchanged", _rows_for_columns,
            "Row and column are exchanged: a row belongs to a place, a column to a token."),
        Misconception("the loop's last place", _row_behind_the_loop,
            "Where nothing was proposed the loop never ran, and its place has no value. The last row of p "
            "is there always."),
        Misconception("one token instead of a list", _one_token,
            "One token comes back, not a list. Return the accepted ones and the new one together."),
    ),
    hints=(
        Hint("I do not know where to start",
             "One proposal, p = 0.3 and q = 0.7 for it. With which probability may it stay? With p = "
             "0.5 and q = 0.2?"),
        Hint("What happens at the first rejection?",
             "Take p minus q, set what is below 0 to 0, draw one token in proportion to the rest, "
             "and return: the accepted ones and this token."),
        Hint("And if none is rejected?",
             "Then one more token is drawn, from the last row of p. So the result is never empty, "
             "and has at most one token more than was proposed."),
    ),
    praise="Whatever the draft proposes, the text is the model's own.", seconds=20,
)


# ---------------------------------------------------------------- 1: a benchmark (bug)


def a_slow_start_and_one_disturbance():
    return [0.5, 0.05] + 4 * [0.002] + [0.040] + [0.003] * 6, 7, 2


def nothing_to_warm_up():
    return [0.006, 0.004, 0.007, 0.005, 0.0045], 5, 0


def a_long_warm_up():
    return [1.0, 0.6, 0.3, 0.2, 0.1, 0.007, 0.009, 0.008, 0.050, 0.0075], 5, 5


def a_device_that_is_still_busy():
    return [0.3, 0.2, 0.004, 0.006, 0.005], 1, 0, 2


class _Watched(FakeDevice):
    """A fake device that knows whether its own clock was read."""

    read = False

    def clock(self):
        self.read = True
        return super().clock()


def _run_timer(candidate, durations, rounds, warm_up, queued=0):
    device = _Watched(durations)
    for _ in range(queued):
        device.run()
    told = candidate(device, rounds, warm_up)
    if not device.read:
        raise ValueError("the clock of the device was never read")
    return told


def _timer(before=True, inside=True, warm=True, late=False, sum_up=statistics.median, skip=0):
    def time_it(device, rounds, warm_up):
        for _ in range(warm_up if warm else 0):
            device.run()
        if before:
            device.wait()
        samples = []
        for _ in range(rounds):
            begun = device.clock()
            device.run()
            if inside:
                device.wait()
            samples.append(device.clock() - begun)
            if late:
                device.wait()
        return sum_up(samples[skip:])
    return time_it


def _timer_in_one_loop(device, rounds, warm_up):
    samples = []
    for _ in range(warm_up + rounds):
        device.wait()
        begun = device.clock()
        device.run()
        device.wait()
        samples.append(device.clock() - begun)
    kept = sorted(samples[warm_up:])
    half = len(kept) // 2
    return kept[half] if len(kept) % 2 else (kept[half - 1] + kept[half]) / 2


def _whole_loop(device, rounds, warm_up):
    for _ in range(warm_up):
        device.run()
    device.wait()
    begun = device.clock()
    for _ in range(rounds):
        device.run()
    device.wait()
    return (device.clock() - begun) / rounds


def _waits_before(device, rounds, warm_up):
    for _ in range(warm_up):
        device.run()
    samples = []
    for _ in range(rounds):
        begun = device.clock()
        device.wait()
        device.run()
        samples.append(device.clock() - begun)
    return statistics.median(samples)


def _waits_after_each(device, rounds, warm_up):
    samples = []
    for _ in range(warm_up + rounds):
        begun = device.clock()
        device.run()
        device.wait()
        samples.append(device.clock() - begun)
    return statistics.median(samples[warm_up:])


def _clock_before_waiting(device, rounds, warm_up):
    samples = []
    for _ in range(warm_up + rounds):
        begun = device.clock()
        device.wait()
        device.run()
        device.wait()
        samples.append(device.clock() - begun)
    return statistics.median(samples[warm_up:])


def _clock_read_once(device, rounds, warm_up):
    for _ in range(warm_up):
        device.run()
    device.wait()
    begun, samples = device.clock(), []
    for _ in range(rounds):
        device.run()
        device.wait()
        samples.append(device.clock() - begun)
    return statistics.median(samples)


def _samples_emptied(device, rounds, warm_up):
    for _ in range(warm_up):
        device.run()
    for _ in range(rounds):
        told = _timer()(device, 1, 0)
    return told


def _warmed(number):
    return lambda device, rounds, warm_up: _timer()(device, rounds, number(warm_up))


def _warm_in_every_round(device, rounds, warm_up):
    return statistics.median(_timer()(device, 1, warm_up) for _ in range(rounds))


def _pythons_clock(device, rounds, warm_up):
    for _ in range(warm_up):
        device.run()
    samples = []
    for _ in range(rounds):
        device.wait()
        begun = time.perf_counter()
        device.run()
        device.wait()
        samples.append(time.perf_counter() - begun)
    return statistics.median(samples)


def _mean(samples):
    return sum(samples) / len(samples)


TIMER = Exercise(
    name="time_it", chapter=11, kind="bug", entry="time_it",
    title="A benchmark that fools itself", difficulty="easy", importance="essential", minutes=8,
    reference=_timer(), run=_run_timer, may_change_inputs=True,
    fixtures=(a_slow_start_and_one_disturbance, nothing_to_warm_up, a_long_warm_up,
              a_device_that_is_still_busy),
    equivalents={"one loop": _timer_in_one_loop, "wait after each": _timer(late=True)},
    misconceptions=(
        Misconception("unchanged", _timer(before=False, inside=False, warm=False, sum_up=_mean),
            "You measure how long it takes to start the work. Wait for the device before reading the "
            "clock again; then look at the first samples and the disturbed one."),
        Misconception("only the waiting repaired", _timer(before=False, warm=False, sum_up=_mean),
            "Each sample is a real time now. The first ones still hold the slow start, and one "
            "disturbance moves the mean."),
        Misconception("no warm-up", _timer(before=False, warm=False),
            "The first runs are among the samples. Run the given number of times before you "
            "measure."),
        Misconception("mean instead of median", _timer(sum_up=_mean),
            "One disturbed sample moves the result. The median is the one in the middle, whatever "
            "the largest is."),
        Misconception("smallest instead of median", _timer(sum_up=min),
            "You take the best sample. The task asks for the usual one, the median."),
        Misconception("the middle of unsorted samples",
            _timer(sum_up=lambda samples: samples[len(samples) // 2]),
            "You take the sample in the middle of the list as it was measured. The median is the middle "
            "of the sorted ones."),
        Misconception("the warm-up runs on into the first sample", _timer(before=False),
            "The first sample waits for the warm-up, too. Let the device finish before the "
            "measurement begins."),
        Misconception("waits before the work only", _waits_before,
            "You wait for the work before, not for the one that is measured. Wait after it has been "
            "started."),
        Misconception("warm-up among the samples", lambda device, rounds, warm_up: _timer(
                warm=False)(device, rounds + warm_up, 0),
            "The slow first runs are samples as well. Take them out before the median."),
        Misconception("the whole loop divided", _whole_loop,
            "The time of all rounds over their number is a mean. Each round needs its own "
            "sample, and waiting inside."),
        Misconception("warm-up taken from the rounds", lambda device, rounds, warm_up: _timer(
            warm=False, skip=warm_up)(device, rounds, 0),
            "The warm-up was cut from the rounds. It comes before them: the number of samples "
            "stays."),
        Misconception("waits only after the work", _waits_after_each,
            "Work that somebody else had queued is in the first sample. Wait before the clock is read "
            "the first time, too."),
        Misconception("the clock read before the waiting", _clock_before_waiting,
            "The clock is read, and then you wait: what was queued before is in the sample. Wait "
            "first, then read."),
        Misconception("the clock read once", _clock_read_once,
            "Each sample holds all rounds before it. Read the clock again at the start of every "
            "round."),
        Misconception("another number of warm-up runs", _warmed(lambda asked: 1),
            "The warm-up does not have as many runs as are asked for. Some devices need more, some "
            "none.", also=[_warmed(lambda asked: 2), _warmed(lambda asked: asked + 1)]),
        Misconception("warmed up in every round", _warm_in_every_round,
            "You warm up again before every sample. Once before the first one is enough."),
        Misconception("returned in the loop", lambda device, rounds, warm_up: _timer()(
                device, 1, warm_up),
            "You return after the first sample. Take the median when all rounds are done."),
        Misconception("the last sample only", _samples_emptied,
            "Only the last sample is left. The list of samples begins once, before the rounds."),
        Misconception("beside the middle", _timer(sum_up=lambda samples: sorted(samples)[
                max(0, len(samples) // 2 - 1)]),
            "You take the sample just below the middle of the sorted ones. Places are counted from 0."),
        Misconception("Python's clock", _pythons_clock,
            "You read Python's clock. This device has a watch of its own, and its work takes time only "
            "there."),
        Misconception("in milliseconds", _timer(sum_up=lambda samples: 1000 * statistics.median(samples)),
            "You return milliseconds. The task asks for seconds."),
    ),
    hints=(
        Hint("The time is far too short",
             "The device starts its work and returns at once. What has to happen before the clock "
             "is read the second time?"),
        Hint("The time is far too long",
             "The first runs are slow on every device. Run warm_up times, wait, and only then "
             "measure."),
        Hint("One input is still off",
             "One sample was disturbed. statistics.median takes the middle one."),
    ),
    praise="Warm up, wait, take the median: three lines that most wrong benchmarks lack.",
)


# ---------------------------------------------------------------- 2: a step in order

ORDER = Exercise(
    name="speculative_step_in_order", chapter=11, kind="order",
    title="One step of speculative decoding", difficulty="easy", importance="essential", minutes=4,
    lines=("proposed, q = draft.propose(text, 4, distribution, chance)",
           "logits = check_drafts(engine, text, proposed, 4)",
           "p = distribution(logits)",
           "found = accept(proposed, q, p, chance)",
           "text += found",
           "engine.fast.forget(0, len(text) - 1)"),
    distractors=("text += proposed",),
    misconceptions=(
        Misconception("both added", "with 4 and with 6",
            "The accepted proposals stand in the text twice: what was found contains them."),
        Misconception("proposals believed", "with 6",
            "The proposals went into the text unchecked. Only what the check found may."),
        Misconception("taken back first", "5 before 0",
            "At the start of a turn nothing has been rejected. What is taken back is known when "
            "the text has grown."),
        Misconception("checked before proposed", "1 before 0",
            "There is nothing to check yet. The draft comes first."),
        Misconception("accepted before the model spoke", "3 before 1",
            "Accepting needs the model's distribution. The check comes before."),
        Misconception("distribution before the logits", "2 before 1",
            "The distribution is made from the logits of the check."),
        Misconception("accepted before the distribution", "3 before 2",
            "Accepting compares two distributions, and the model's is not made yet."),
        Misconception("the text grows before the decision", "4 before 3",
            "The text grows by something that has not been found yet. Accepting decides what it "
            "is."),
        Misconception("taken back before it was known how far", "5 before 3",
            "How much is taken back depends on what was accepted. Decide first."),
        Misconception("taken back before the text grew", "5 before 4",
            "Taken back too far: the accepted tokens are gone from the cache. The text has to "
            "grow first."),
    ),
    hints=(
        Hint("Where does it begin?", "Who speaks first, the cheap draft or the model?"),
        Hint("The middle", "Proposals, the model's logits after each of them, its distribution, the "
             "decision."),
        Hint("The end", "The text grows by what was found. Its last token was never run, so the "
             "cache keeps one less than the text has."),
    ),
    praise="Propose, check, decide, take back.",
)


# ---------------------------------------------------------------- 3: where arithmetic takes over


def a_dense_model_in_8_bits():
    return WINDOWED, 2.0e9, 150e9, 8


def a_mixture_in_16_bits():
    return MIXED, 3.0e9, 119e9, 16


def equal_at_32_texts():
    return PATTERN, 2.0**30, 2.0**35, 16


def arithmetic_from_the_first_text_on():
    return WINDOWED, 6.0e9, 4.0e9, 16


def mixtral_on_an_h200():
    return MODELS["mixtral-8x7b-v0.1"], 4800e9, 989e12, 16


def seven_b_on_an_a100_in_4_bits():
    return MODELS["mistral-7b-v0.2"], 2039e9, 312e12, 4


def mixtral_where_arithmetic_is_cheap():
    return MODELS["mixtral-8x7b-v0.1"], 8000e9, 2500e12, 16


def a_mixture_that_turns_early():
    return MIXED, 3.0e9, 5.7e9, 16


def _from(read=None, work=None, give=lambda batch: batch):
    def arithmetic_from(config, speed, rate, bits):
        read_, work_ = read or step_bytes, work or step_operations
        batch = 1
        while work_(config, batch, 0) / rate < read_(config, batch, 0, bits) / speed:
            batch += 1
            if batch > 2_000:
                break
        return give(batch)
    return arithmetic_from


def _longer(config, speed, rate, bits):
    batch = 1
    while step_operations(config, batch, 0) / rate <= step_bytes(config, batch, 0, bits) / speed:
        batch += 1
    return batch


def _among(batches):
    def arithmetic_from(config, speed, rate, bits):
        for batch in batches:
            if step_operations(config, batch, 0) / rate >= step_bytes(config, batch, 0, bits) / speed:
                return batch
    return arithmetic_from


def _doubling(config, speed, rate, bits):
    batch = 1
    while step_operations(config, batch, 0) / rate < step_bytes(config, batch, 0, bits) / speed:
        batch *= 2
    return batch


def _by_halving(config, speed, rate, bits):
    low, high = 0, 1
    def slow(batch):
        return step_operations(config, batch, 0) / rate >= step_bytes(config, batch, 0, bits) / speed
    while not slow(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if slow(middle) else (middle, high)
    return high


TURN = Exercise(
    name="arithmetic_from", chapter=11, kind="function", entry="arithmetic_from",
    title="Where arithmetic takes over", difficulty="medium", importance="useful", minutes=8,
    reference=_from(),
    fixtures=(a_dense_model_in_8_bits, a_mixture_in_16_bits, mixtral_where_arithmetic_is_cheap,
              mixtral_on_an_h200, seven_b_on_an_a100_in_4_bits, equal_at_32_texts,
              a_mixture_that_turns_early, arithmetic_from_the_first_text_on),
    equivalents={"a loop": _from(), "by halving": _by_halving},
    misconceptions=(
        Misconception("reading of one text for all batches",
            _from(read=lambda config, batch, length, bits: step_bytes(config, 1, length, bits)),
            "Right for dense models, too small for mixtures: they read more as the batch grows, while "
            "each text computes with its k experts only."),
        Misconception("16 bits whatever is asked",
            _from(read=lambda config, batch, length, bits: step_bytes(config, batch, length, 16)),
            "The bits have no effect. Fewer bits are read sooner, so arithmetic takes over "
            "earlier."),
        Misconception("one operation for each weight",
            _from(work=lambda config, batch, length: step_operations(config, batch, length) / 2),
            "Twice too large: a weight costs two operations, a multiplication and an addition."),
        Misconception("operations of one text",
            _from(work=lambda config, batch, length: step_operations(config, 1, length)),
            "The loop never ends by itself: the operations have to grow with the batch."),
        Misconception("the comparison turned round", lambda config, speed, rate, bits: 1,
            "One text is limited by reading, so 1 is too small. Compare two times: operations over "
            "rate, bytes over speed."),
        Misconception("longer, not at least as long", _longer,
            "Where both times are equal you go on. At least as long: that batch counts already."),
        Misconception("not a whole number", lambda config, speed, rate, bits: (
                step_bytes(config, 1, 0, bits) / speed / (step_operations(config, 1, 0) / rate)),
            "A batch is a whole number of texts, and for a mixture the bytes change with it."),
        Misconception("the last batch limited by reading", _from(give=lambda batch: batch - 1),
            "One too small: that is the last batch limited by reading. The next one is asked for."),
        Misconception("the operations for each byte", lambda config, speed, rate, bits: rate / speed,
            "You return how many operations fit into the time of a byte. How many texts is that, "
            "with these bits?", also=[lambda config, speed, rate, bits: int(rate / speed),
                                      lambda config, speed, rate, bits: math.ceil(rate / speed)]),
        Misconception("one too large", _from(give=lambda batch: batch + 1),
            "One too large: arithmetic takes at least as long one text earlier."),
        Misconception("operations multiplied by the batch again",
            _from(work=lambda config, batch, length: batch * step_operations(config, batch, length)),
            "Too small: the operations were multiplied by the batch once more. They are those of all "
            "texts already."),
        Misconception("all experts from the start",
            _from(read=lambda config, batch, length, bits: step_bytes(config, 10**6, length, bits)),
            "Right for large batches, too large for small ones of a mixture: a few texts do not read "
            "all experts."),
        Misconception("from the numbers of parameters", lambda config, speed, rate, bits: math.ceil(
                rate * bits * count_parameters(config).total
                / (speed * 16 * count_parameters(config).active)),
            "All parameters over the active ones is only nearly right: the input table is not read, and "
            "in small batches some experts are not either."),
        Misconception("texts of one token", _from(
                read=lambda config, batch, length, bits: step_bytes(config, batch, 1, bits),
                work=lambda config, batch, length: step_operations(config, batch, 1)),
            "Your texts have a cache. Short texts are asked for: their length is 0."),
        Misconception("doubled until it is enough", _doubling,
            "Only some batches were tried. The smallest one may lie between two of them.",
            also=[_among([1, 8, 64, 512, 1024])]),
        Misconception("the search ends too early", _among(range(1, 1000)),
            "The search stopped before it found a batch. A mixture turns late, at hundreds of texts or "
            "more: search on.", also=[_among(range(1, 300))]),
    ),
    hints=(
        Hint("I do not know where to start",
             "For one text, which is longer on an H200: reading the weights, or computing with "
             "them? And for 1,000 texts?"),
        Hint("Which two times?",
             "step_bytes over speed, and step_operations over rate, both for this batch and "
             "length 0. Raise the batch until the second is at least the first."),
        Hint("It takes long", "Some thousand turns of the loop are fine; nothing needs a model."),
    ),
    praise="Dense models turn at a batch that only the device and the bits decide; mixtures later.",
)


# ---------------------------------------------------------------- 4: how many texts fit


def a_window_shorter_than_the_text():
    return WINDOWED, 900_000, 300, 16


def a_mixture_with_4_bits():
    return MIXED, 247_000, 130, 4


def tied_tables_and_a_pattern():
    return PATTERN, 1_000_000, 100, 8


def seven_b_on_24_gb():
    return MODELS["mistral-7b-v0.2"], 24_000_000_000, 4096, 16


def weights_that_do_not_fit():
    config = MODELS["mixtral-8x7b-v0.1"]
    return config, 2 * count_parameters(config).total - 3 * int(cache_bytes(config, 1000)), 1000, 16


def one_text_that_fits_exactly():
    held = count_parameters(PATTERN).total * 2
    return PATTERN, held + int(cache_bytes(PATTERN, 60)), 60, 16


def _fits(weights=None, cache=None, down=math.floor, least=0):
    def texts_that_fit(config, memory, length, bits):
        held = weights(config, bits) if weights else count_parameters(config).total * bits / 8
        each = cache(config, length, bits) if cache else cache_bytes(config, length)
        number = down((memory - held) / each)
        return number if least is None else max(least, number)
    return texts_that_fit


def _fits_by_adding(config, memory, length, bits):
    used, texts = count_parameters(config).total * bits / 8, 0
    while used + cache_bytes(config, length) <= memory:
        used += cache_bytes(config, length)
        texts += 1
    return texts


def _fits_below(config, memory, length, bits):
    used, texts = count_parameters(config).total * bits / 8, 0
    while used + cache_bytes(config, length) < memory:
        used += cache_bytes(config, length)
        texts += 1
    return texts


FIT = Exercise(
    name="texts_that_fit", chapter=11, kind="function", entry="texts_that_fit",
    title="How many texts fit", difficulty="easy", importance="useful", minutes=6,
    reference=_fits(),
    fixtures=(a_window_shorter_than_the_text, a_mixture_with_4_bits, tied_tables_and_a_pattern,
              seven_b_on_24_gb, weights_that_do_not_fit, one_text_that_fits_exactly),
    equivalents={"by division": lambda config, memory, length, bits: int(max(
        0, (memory - count_parameters(config).total * bits / 8) // cache_bytes(config, length))),
        "one after the other": _fits_by_adding},
    misconceptions=(
        Misconception("active weights only",
            _fits(weights=lambda config, bits: count_parameters(config).active * bits / 8),
            "Too many for a mixture: all its experts have to be in memory, though a text uses a "
            "few."),
        Misconception("what a step reads",
            _fits(weights=lambda config, bits: step_bytes(config, 1, 0, bits)),
            "Bytes read by a step are not bytes held. In memory is the whole model, the table of "
            "embeddings included."),
        Misconception("the model without its input table", _fits(weights=lambda config, bits: (
                count_parameters(config).total - config.vocab_size * config.dim) * bits / 8),
            "The table of embeddings is missing. A step hardly reads it, but it is in memory."),
        Misconception("the cache of one token",
            _fits(cache=lambda config, length, bits: cache_bytes_per_token(config)),
            "Far too many: each text was given the cache of a single token."),
        Misconception("the window forgotten",
            _fits(cache=lambda config, length, bits: length * cache_bytes_per_token(config)),
            "A layer with a window holds at most a window of tokens. The caches are smaller than "
            "you think."),
        Misconception("the cache in the weights' bits",
            _fits(cache=lambda config, length, bits: cache_bytes(config, length) * bits / 16),
            "The cache has 16 bits for each number, whatever the weights have."),
        Misconception("keys without values",
            _fits(cache=lambda config, length, bits: cache_bytes(config, length) / 2),
            "Twice too many: both keys and values are kept."),
        Misconception("rounded up", _fits(down=math.ceil),
            "The last text does not fit whole. Round down."),
        Misconception("rounded to the nearest", _fits(down=round),
            "A text that fits by half does not fit. Round down."),
        Misconception("a negative number of texts", _fits(least=None),
            "If the weights alone are too large, the answer is 0, not a negative number."),
        Misconception("bits taken for bytes",
            _fits(weights=lambda config, bits: count_parameters(config).total * bits),
            "The weights are 8 times too large: 8 bits are a byte."),
        Misconception("part of a text", lambda config, memory, length, bits: max(
                0, (memory - count_parameters(config).total * bits / 8) / cache_bytes(config, length)),
            "A part of a text cannot be written. Round down to a whole number."),
        Misconception("16 bits whatever is asked", _fits(
                weights=lambda config, bits: count_parameters(config).total * 2),
            "The bits have no effect on your weights. A weight has bits / 8 bytes."),
        Misconception("a model for each text", lambda config, memory, length, bits: int(
                memory // (count_parameters(config).total * bits / 8 + cache_bytes(config, length))),
            "You count the weights once for each text. All texts share them; only caches are "
            "their own."),
        Misconception("the weights forgotten", _fits(weights=lambda config, bits: 0),
            "The caches share the memory with the weights. Take those off first."),
        Misconception("the window of layer 0 for all",
            _fits(cache=lambda config, length, bits: cache_bytes_per_token(config)
                  * min(length, config.window(0) or length)),
            "Layers may differ in their windows. Ask each layer for its own."),
        Misconception("the last one left out", _fits_below,
            "A text that fills the memory to the last byte still fits. You leave it out."),
        Misconception("the cache multiplied by the layers",
            _fits(cache=lambda config, length, bits: config.n_layers * cache_bytes(config, length)),
            "Too few: the bytes of a text's cache are those of all layers together already."),
        Misconception("the cache multiplied by the length",
            _fits(cache=lambda config, length, bits: length * cache_bytes(config, length)),
            "Far too few: the bytes of a cache are those of the whole text. You multiplied them by "
            "its length."),
        Misconception("keys and values doubled",
            _fits(cache=lambda config, length, bits: 2 * cache_bytes(config, length)),
            "Half as many as fit: the bytes of a cache hold keys and values already."),
        Misconception("whole bytes only",
            _fits(weights=lambda config, bits: count_parameters(config).total * (bits // 8)),
            "Weights of 4 bits weigh nothing in yours: a division of whole numbers drops half a "
            "byte."),
        Misconception("what a step with a text reads", lambda config, memory, length, bits: max(0, int(
                (memory - step_bytes(config, 1, length, bits)) // cache_bytes(config, length))),
            "What a step reads holds a text's cache, and lacks what no token uses. In memory is the "
            "whole model, once."),
    ),
    hints=(
        Hint("I do not know where to start", "What is in memory once, and what once for each text?"),
        Hint("Which bytes?", "Total parameters times bits over 8, once. Then ch11.cache_bytes for "
             "each text; the rest of the memory over that."),
        Hint("One input is wrong", "Whole texts only, so round down, and never below 0."),
    ),
    praise="Memory, not speed, sets the largest batch of most machines.",
)


# ---------------------------------------------------------------- 5: what proposals can gain


def four_proposals_of_a_cheap_draft():
    return 0.7, 4, 0.05


def six_proposals_of_a_dear_draft():
    return 0.55, 6, 0.3


def all_accepted():
    return 1.0, 3, 0.1


def none_accepted():
    return 0.0, 5, 0.2


def one_proposal_for_nothing():
    return 0.8, 1, 0.0


def _gains(tokens=None, price=None):
    def speed_up(acceptance, drafts, cost):
        written = tokens(acceptance, drafts) if tokens else sum(
            acceptance**i for i in range(drafts + 1))
        return written / (price(drafts, cost) if price else 1 + drafts * cost)
    return speed_up


def _paid_as_far_as(first):
    """The draft's cost for the accepted proposals, or (0) for the first rejected one as well."""
    def speed_up(acceptance, drafts, cost):
        made = sum(acceptance**i for i in range(first, drafts + first))
        return sum(acceptance**i for i in range(drafts + 1)) / (1 + cost * made)
    return speed_up


def _gain_closed(acceptance, drafts, cost):
    if acceptance == 1:
        return (drafts + 1) / (1 + drafts * cost)
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance) / (1 + drafts * cost)


def _gain_by_cases(acceptance, drafts, cost):
    written = sum((i + 1) * acceptance**i * (1 - acceptance) for i in range(drafts))
    return (written + (drafts + 1) * acceptance**drafts) / (1 + cost * drafts)


GAIN = Exercise(
    name="speed_up", chapter=11, kind="function", entry="speed_up",
    title="What proposals can gain", difficulty="medium", importance="useful", minutes=8,
    reference=_gains(),
    fixtures=(four_proposals_of_a_cheap_draft, six_proposals_of_a_dear_draft, all_accepted,
              none_accepted, one_proposal_for_nothing),
    equivalents={"closed form": _gain_closed, "by cases": _gain_by_cases},
    misconceptions=(
        Misconception("the further token forgotten",
            _gains(tokens=lambda a, n: sum(a**i for i in range(1, n + 1))),
            "You count accepted proposals only. Every step writes one token more, whatever was "
            "accepted."),
        Misconception("each proposal for itself", _gains(tokens=lambda a, n: 1 + n * a),
            "Too many: a proposal counts only if all before it were accepted."),
        Misconception("one power too few", _gains(tokens=lambda a, n: sum(a**i for i in range(n))),
            "The last case is missing: all proposals accepted, and one more token."),
        Misconception("all or nothing", _gains(tokens=lambda a, n: 1 + n * a**n),
            "Too few: a step in which the third proposal fails keeps the first two.",
            also=[_gains(tokens=lambda a, n: 1 + a**n), _gains(tokens=lambda a, n: (n + 1) * a**n)]),
        Misconception("by cases, without the last", _gains(tokens=lambda a, n: sum(
                (i + 1) * a**i * (1 - a) for i in range(n))),
            "The cases do not sum to 1: all proposals accepted, with n + 1 tokens, is one of them."),
        Misconception("time over tokens", lambda acceptance, drafts, cost: (
                1 + drafts * cost) / sum(acceptance**i for i in range(drafts + 1)),
            "You return the time for a token. How many times as fast is the other way round."),
        Misconception("the draft's time subtracted", lambda acceptance, drafts, cost: sum(
                acceptance**i for i in range(drafts + 1)) - drafts * cost,
            "Time is not taken off the tokens. Divide the tokens of a step by its time."),
        Misconception("the draft paid once", _gains(price=lambda n, cost: 1 + cost),
            "The draft runs once for each proposal, so its cost counts that often."),
        Misconception("the model's own step forgotten",
            _gains(price=lambda n, cost: n * cost if n * cost > 0 else 1),
            "You divide by the draft's time alone. The model's own step is 1 and counts, too."),
        Misconception("the draft for nothing", _gains(price=lambda n, cost: 1),
            "The draft's time is missing: each proposal costs its share of a step."),
        Misconception("one proposal too many paid", _gains(price=lambda n, cost: 1 + (n + 1) * cost),
            "The draft is paid once too often: the further token comes from the model's own step."),
        Misconception("multiplied by the time", lambda acceptance, drafts, cost: sum(
                acceptance**i for i in range(drafts + 1)) * (1 + drafts * cost),
            "More time makes it slower: divide the tokens by the time of the step."),
        Misconception("the model steps for each proposal", _gains(price=lambda n, cost: 1 + n),
            "Checking all proposals is one step of the model, not one for each.",
            also=[_gains(price=lambda n, cost: n * (1 + cost)),
                  _gains(price=lambda n, cost: 1 + n * (1 + cost))]),
        Misconception("only accepted proposals paid", _paid_as_far_as(1),
            "Rejected proposals cost as much as accepted ones. All are made before the check.",
            also=[_paid_as_far_as(0)]),
        Misconception("the further token twice", _gains(
                tokens=lambda a, n: 1 + sum(a**i for i in range(n + 1))),
            "The further token is counted twice: the first term of your sum, 1, is that token."),
        Misconception("one power too many", _gains(
                tokens=lambda a, n: sum(a**i for i in range(n + 2))),
            "One term too many: a step writes at most one token more than was proposed."),
        Misconception("by cases, the last one with a rejection", _gains(tokens=lambda a, n: sum(
                (i + 1) * a**i * (1 - a) for i in range(n + 1))),
            "In the last case nothing is rejected. It happens with probability a to the n, without "
            "1 - a."),
        Misconception("proposals without end", _gains(tokens=lambda a, n: 1 / (1 - a)),
            "That is the sum for proposals without end. A step has a given number of them, so the sum "
            "has an end."),
        Misconception("parentheses missing", lambda acceptance, drafts, cost: sum(
                acceptance**i for i in range(drafts + 1)) / 1 + drafts * cost,
            "The draft's time is added to the result. It belongs to the time below the line: "
            "parentheses are missing."),
        Misconception("divided by zero", lambda acceptance, drafts, cost: (
            1 - acceptance ** (drafts + 1)) / (1 - acceptance) / (1 + drafts * cost),
            "If everything is accepted, the closed formula divides by zero. Then a step writes all "
            "proposals and one more."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Two proposals, each accepted with probability 0.5. How often does a step write one "
             "token, two, three?"),
        Hint("How many tokens?", "The first token is certain; the second needs one acceptance, the "
             "third two in a row: 1 + a + a² + ..., as many terms as proposals and one."),
        Hint("How long does it take?", "One step of the model is 1, each proposal costs more: "
             "1 + drafts · cost. Plain writing takes 1 for each token."),
    ),
    praise="A draft pays if it is often right and nearly free.",
)


# ---------------------------------------------------------------- 6: a cache not taken back (bug)


def proposals_often_wrong():
    return ToyModel, [3, 1, 4], 40, 4, 3


def proposals_usually_right():
    return ToyModel, [5, 9, 2, 6], 37, 3, 8


def one_proposal_at_a_time():
    return ToyModel, [8], 25, 1, 3


def _run_toy(candidate, toy, prompt, n, drafts, sure):
    model = toy(sure)
    written = candidate(model, count_up, list(prompt), n, drafts)
    return [[int(token) for token in written], model.steps]


def _same_writing(expected, actual):
    (text, steps), (written, taken) = expected, actual
    if len(text) != len(written):
        return f"expected {len(text)} tokens, got {len(written)}"
    wrong = next((i for i, (a, b) in enumerate(zip(text, written)) if a != b), None)
    if wrong is not None:
        return f"at place {wrong} of the new text expected {text[wrong]}, got {written[wrong]}"
    return None if steps == taken else f"expected {steps} steps for this text, got {taken}"


def _writes(grow=None, keep=None):
    def speculate_greedy(model, propose, prompt, n, drafts):
        text = list(prompt)
        text.append(model.run(text)[-1])
        while len(text) < len(prompt) + n:
            proposed = propose(text, drafts)
            told = model.run([text[-1], *proposed])
            right = 0
            while right < len(proposed) and proposed[right] == told[right]:
                right += 1
            text += grow(proposed, told, right) if grow else [*proposed[:right], told[right]]
            (keep or _keep)(model, text)
            if model.steps > 500:
                break
        return text[len(prompt):len(prompt) + n]
    return speculate_greedy


def _keep(model, text):
    model.keep(len(text) - 1)


def _no_keep(model, text):
    pass


def _no_bonus(proposed, told, right):
    return proposed[:right] or told[:1]


def _writes_kept_first(model, propose, prompt, n, drafts):
    text = [*prompt, model.run(prompt)[-1]]
    while len(text) < len(prompt) + n:
        proposed = propose(text, drafts)
        told, right = model.run([text[-1], *proposed]), 0
        while right < len(proposed) and proposed[right] == told[right]:
            right += 1
        model.keep(len(text) - 1)
        text += [*proposed[:right], told[right]]
    return text[len(prompt):len(prompt) + n]


def _writes_keeping(number):
    """The right text, and number(text, right, prompt, drafts) tokens kept, text as it is then."""
    def speculate_greedy(model, propose, prompt, n, drafts):
        right_now = []

        def grow(proposed, told, right):
            right_now.append(right)
            return [*proposed[:right], told[right]]
        return _writes(grow=grow, keep=lambda model, text: model.keep(
            number(text, right_now[-1], prompt, drafts)))(model, propose, prompt, n, drafts)
    return speculate_greedy


def _read_anew(model, text):
    model.keep(0)
    model.run(text[:-1])


def _agreeing_anywhere(proposed, told, right):
    right = sum(a == b for a, b in zip(proposed, told))
    return [*proposed[:right], told[right]]


def _held_against_the_next(proposed, told, right):
    right = 0
    while right < len(proposed) and proposed[right] == told[right + 1]:
        right += 1
    return [*proposed[:right], told[right]]


def _write_by_zip(model, propose, prompt, n, drafts):
    text = [*prompt, model.run(prompt)[-1]]
    while len(text) - len(prompt) < n:
        known = len(text) - 1
        guesses = propose(text, drafts)
        answers = model.run(text[-1:] + guesses)
        for guess, answer in zip(guesses + [None], answers):
            text.append(answer)
            if guess != answer:
                break
        model.keep(known + len(text) - known - 1)
    return text[len(prompt):][:n]


def _write_and_keep_if_wrong(model, propose, prompt, n, drafts):
    text = [*prompt, *model.run(prompt)[-1:]]
    while len(text) < len(prompt) + n:
        guesses = propose(text, drafts)
        told, right = model.run([text[-1], *guesses]), 0
        while right < drafts and guesses[right] == told[right]:
            right += 1
        text += guesses[:right] + [told[right]]
        if right < drafts:
            model.keep(len(text) - 1)
    return text[len(prompt):][:n]


ROLL_BACK = Exercise(
    name="speculate_greedy", chapter=11, kind="bug", entry="speculate_greedy",
    title="Fast, and not the same text", difficulty="hard", importance="essential", minutes=12,
    reference=_writes(), run=_run_toy, compare=_same_writing, may_change_inputs=True,
    fixtures=(proposals_often_wrong, proposals_usually_right, one_proposal_at_a_time),
    equivalents={"zip": _write_by_zip, "only after a rejection": _write_and_keep_if_wrong},
    misconceptions=(
        Misconception("unchanged", _writes(grow=_no_bonus, keep=_no_keep),
            "Both slips are still there: the text differs from the model's own, and the steps are "
            "too many."),
        Misconception("only the taking back repaired", _writes(grow=_no_bonus),
            "The text is right now. But the model's own next token, known after every check, is "
            "thrown away, so there are too many steps."),
        Misconception("only the further token repaired", _writes(keep=_no_keep),
            "The steps are few, and the text is wrong: rejected tokens are still in the cache. Keep "
            "only what belongs to the text."),
        Misconception("one token too many kept",
            _writes(keep=lambda model, text: model.keep(len(text))),
            "A rejected token stays in the cache. The last token of the text was never run: keep one "
            "less than the text has."),
        Misconception("one token too few kept",
            _writes(keep=lambda model, text: model.keep(len(text) - 2)),
            "A token of the text is missing in the cache. Only the last one has not been run yet."),
        Misconception("taken back before the text grew", _writes_kept_first,
            "The cache is cut before the accepted tokens are in the text, so that they are forgotten. "
            "Let the text grow first."),
        Misconception("as many kept as were right",
            _writes_keeping(lambda text, right, prompt, drafts: right),
            "The number to keep counts from the start of the cache, prompt included: what the text "
            "has, less its last token.",
            also=[_writes_keeping(lambda text, right, prompt, drafts: right + 1)]),
        Misconception("without the model's token, and one more kept", _writes(
                grow=_no_bonus, keep=lambda model, text: model.keep(len(text))),
            "The last token of the text is run a second time while it is still in the cache. And the "
            "model's own next token is thrown away."),
        Misconception("only complete sets of proposals", _writes(
            grow=lambda proposed, told, right: [*proposed, told[-1]] if right == len(proposed)
            else told[:1]),
            "Right text, too many steps: if the third proposal is wrong, the first two still "
            "count."),
        Misconception("the last answer instead of the right one", _writes(
            grow=lambda proposed, told, right: [*proposed[:right], told[-1]]),
            "After a rejection you take the answer to the last proposal. The one that counts stands "
            "at the first wrong place."),
        Misconception("proposals believed", _writes(
            grow=lambda proposed, told, right: [*proposed, told[-1]]),
            "All proposals went into the text, wrong ones as well."),
        Misconception("answers after a wrong proposal", _writes(
            grow=lambda proposed, told, right: told),
            "Answers behind the first wrong proposal went into the text. They follow a text that "
            "nobody wrote."),
        Misconception("nothing gained", _writes(grow=lambda proposed, told, right: told[:1]),
            "Right text, as many steps as without a draft: the proposals that were right are not "
            "used."),
        Misconception("no further token if all were right", _writes(
            grow=lambda proposed, told, right: [*proposed[:right], *told[right:right + 1]]
            if right < len(proposed) else proposed),
            "When all proposals are right, the answer after the last one is thrown away. It is one more "
            "token, already paid for."),
        Misconception("a further token only if all were right", _writes(
            grow=lambda proposed, told, right: [*proposed, told[-1]] if right == len(proposed)
            else proposed[:right] or told[:1]),
            "After a rejection behind right proposals the model's own token is thrown away. It stands "
            "in the answers already."),
        Misconception("always the first answer", _writes(
            grow=lambda proposed, told, right: [*proposed[:right], told[0]]),
            "After accepted proposals you take the model's first answer. It belongs to the first "
            "place; take the one at the first wrong place."),
        Misconception("the wrong proposal taken", _writes(
            grow=lambda proposed, told, right: proposed[:right + 1] or told[:1]),
            "The first wrong proposal goes into the text. In its place stands the model's own "
            "answer."),
        Misconception("one answer too late", _writes(
            grow=lambda proposed, told, right: [*proposed[:right], told[right + 1]]),
            "The answer you add is one place too late: it follows a proposal that was rejected.",
            also=[_writes(grow=lambda proposed, told, right: [
                *proposed[:right], *told[right + 1:right + 2]])]),
        Misconception("cut to the text before the check",
            _writes_keeping(lambda text, right, prompt, drafts: len(text) - right - 1),
            "Accepted proposals leave the cache, too: it is cut to the text as it was before the "
            "check."),
        Misconception("the prompt not counted",
            _writes_keeping(lambda text, right, prompt, drafts: len(text) - len(prompt)),
            "You keep as many tokens as were written. The prompt is in the cache as well.",
            also=[_writes_keeping(lambda text, right, prompt, drafts: len(text) - len(prompt) - 1)]),
        Misconception("the rejected ones subtracted",
            _writes_keeping(lambda text, right, prompt, drafts: len(text) - (drafts - right)),
            "The rejected tokens were taken off the text's length. They are not in it, so there is "
            "nothing to take off for them.",
            also=[_writes_keeping(lambda text, right, prompt, drafts: len(text) - drafts)]),
        Misconception("accepted ones forgotten", _writes(grow=lambda proposed, told, right: [told[right]]),
            "The accepted proposals are not in the text, only the model's own token behind them."),
        Misconception("all read anew", _writes(keep=_read_anew),
            "The text is right. But the whole cache is read anew after each check, and that is a step more "
            "each time."),
        Misconception("agreeing places counted", _writes(grow=_agreeing_anywhere),
            "Proposals that agree behind a wrong one were counted. They follow a text that nobody "
            "wrote: count up to the first wrong one."),
        Misconception("held against the next answer", _writes(grow=_held_against_the_next),
            "Each proposal is held against the answer after its own. The first answer is for the "
            "first proposal."),
    ),
    hints=(
        Hint("The text is wrong", "After a rejection, which tokens does the model still hold that "
             "are not in the text?"),
        Hint("How many may it keep?", "All of the text but its last token, which has not been run: "
             "len(text) - 1."),
        Hint("Too many steps", "A check answers one question more than there are proposals. At the "
             "first wrong place stands the right token: take it, also when nothing was wrong."),
    ),
    praise="The same text in fewer steps.",
)


# ---------------------------------------------------------------- 7: a draft from counts (open)


def _counts(seed: int, size: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.rand(size, size, generator=chance) * 50


def eleven_tokens():
    return _counts(3, 11), [4, 0, 7], 5


def a_long_text():
    return _counts(4, 17), [1, 16, 3, 3, 9, 12], 3


def nothing_wanted():
    return _counts(5, 8), [2, 5], 0


def _run_draft(candidate, counts, text, count):
    its_counts, its_text = counts.clone(), list(text)
    told = candidate(counts, text, count)
    if repr(told) != repr(candidate(its_counts, its_text, count)):
        raise ValueError("other proposals for the same text")
    return told


def _drafts(row=None, pick=None, number=lambda count: count):
    def bigram_draft(counts, text, count):
        found, token = [], text[-1]
        for _ in range(number(count)):
            line = row(counts, token) if row else counts[token]
            token = int(pick(line) if pick else line.argmax())
            found.append(token)
        return found
    return bigram_draft


def _draft_by_text(counts, text, count):
    longer = list(text)
    for _ in range(count):
        longer.append(counts[longer[-1]].max(dim=0).indices.item())
    return longer[len(text):]


DRAFT = Exercise(
    name="bigram_draft", chapter=11, kind="open", entry="bigram_draft",
    title="A draft of your own", difficulty="medium", importance="optional", minutes=15,
    reference=_drafts(), run=_run_draft, fixtures=(eleven_tokens, a_long_text, nothing_wanted),
    equivalents={"on a copy": _draft_by_text, "a table first": lambda counts, text, count: (
        lambda following: [t := following[t if i else text[-1]] for i in range(count)])(
            counts.argmax(1).tolist())},
    misconceptions=(
        Misconception("the same successor again and again",
            lambda counts, text, count: [int(counts[text[-1]].argmax())] * count,
            "All proposals are the same token. Each one follows the one before it."),
        Misconception("the best successors of one token",
            lambda counts, text, count: counts[text[-1]].topk(min(count, len(counts))).indices.tolist(),
            "These are the likeliest tokens for one place. Proposals stand one after the other."),
        Misconception("columns for rows", _drafts(row=lambda counts, token: counts[:, token]),
            "You look up what comes before. A row belongs to a token, its columns to what follows."),
        Misconception("what follows earlier tokens", lambda counts, text, count: [
                int(counts[token].argmax()) for token in text[-count:]],
            "You look up what follows tokens of the text. Proposal two follows proposal one, not the "
            "text."),
        Misconception("the first token of the text",
            lambda counts, text, count: _drafts()(counts, text[::-1], count),
            "The chain begins at the wrong end. It continues the last token of the text."),
        Misconception("the last token repeated",
            lambda counts, text, count: [text[-1], *_drafts()(counts, text, count)][:count],
            "The first proposal is the text's last token. Propose what follows it."),
        Misconception("the whole text returned",
            lambda counts, text, count: [*text, *_drafts()(counts, text, count)],
            "Return the proposals only, without the text."),
        Misconception("one too few", _drafts(number=lambda count: max(0, count - 1)),
            "One proposal is missing. Make exactly as many as are asked for."),
        Misconception("the end of a longer text", lambda counts, text, count: (
                lambda longer: longer[-count:])([*text, *_drafts()(counts, text, count)]),
            "If none is wanted, the whole text comes back: an end of length zero has to be cut "
            "otherwise."),
        Misconception("one too many", _drafts(number=lambda count: count + 1),
            "One proposal too many. Make exactly as many as are asked for."),
        Misconception("the rarest", _drafts(pick=lambda line: line.argmin()),
            "You follow the rarest pairs. The largest count is the likeliest successor."),
        Misconception("drawn", _drafts(pick=lambda line: torch.multinomial(line, 1)),
            "The same text gets other proposals each time, because you draw. Wanted is the most frequent "
            "successor, without chance."),
        Misconception("the count itself", _drafts(pick=lambda line: line.max()),
            "You take the largest count itself. Asked for is its place: the token that it belongs "
            "to."),
        Misconception("returned in the loop", _drafts(number=lambda count: min(1, count)),
            "Only one proposal comes back, however many are asked for. Return when the loop is "
            "done."),
    ),
    hints=(
        Hint("I do not know where to start", "Which row of the counts belongs to the last token of "
             "the text, and where is its largest number?"),
        Hint("And the second proposal?", "It follows the first one: look up the row of the token "
             "just proposed."),
        Hint("As a loop", "token = text[-1]; count times: token = place of the largest count in its "
             "row, and remember it."),
    ),
    praise="It costs nothing. How often is it right?",
)


EXERCISES = [STEP_BYTES, ACCEPT, TIMER, ORDER, TURN, FIT, GAIN, ROLL_BACK, DRAFT]
