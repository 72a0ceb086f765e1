"""Chapter 8, the sliding window: its three core pieces and its exercises."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minimistral.attention import attend, causal, may_attend, not_padding, within_window
from minimistral.cache import LayerCache
from minimistral.config import ModelConfig

from ..chapters.ch08_sliding_window import pairs
from ..exercises import Exercise, Hint, Misconception


def _random(seed: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Tensors without zero means, whose rows differ in size."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        rows = 0.5 + torch.rand((*shape[:-1], 1), generator=chance)
        made.append(rows * torch.randn(shape, generator=chance) + 0.3)
    return tuple(made)


# ---------------------------------------------------------------- piece: within_window


def seven_queries_and_nine_keys():
    return torch.arange(6, 13), torch.arange(4, 13), 3


def two_rings_of_five():
    queries = torch.tensor([[11, 12, 13], [3, 4, 5]])
    return queries, torch.tensor([[10, 11, 12, 13, 9], [0, 1, 2, 3, 4]]), 4


def window_of_one():
    return torch.arange(2, 8), torch.arange(9), 1


def _look_back(work, query_positions, key_positions, window):
    """The rule, joined with causality: what it says about the future is left open."""
    mask = work(query_positions, key_positions, window)
    whole = causal(query_positions, key_positions) & not_padding(key_positions)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == whole.shape:
        return mask & whole
    return mask


def _steps(q, k):
    return q[..., :, None] - k[..., None, :]


def _triangle(query_positions, key_positions):
    return torch.ones(query_positions.shape[-1], key_positions.shape[-1], dtype=torch.bool).tril()


def _window_by_loop(query_positions, key_positions, window):
    rows = [query_positions[..., t, None] - key_positions < window
            for t in range(query_positions.shape[-1])]
    return torch.stack(rows, dim=-2)


WITHIN_WINDOW = Exercise(
    name="within_window", chapter=8, kind="piece", piece="attention.within_window",
    entry="within_window", title="Not too far back", difficulty="easy",
    importance="essential", minutes=5,
    reference=within_window, run=_look_back,
    fixtures=(seven_queries_and_nine_keys, two_rings_of_five, window_of_one),
    equivalents={
        "causality as well": lambda query_positions, key_positions, window: (
            _steps(query_positions, key_positions) >= 0) & (
            _steps(query_positions, key_positions) < window),
        "not more than one less": lambda query_positions, key_positions, window: _steps(
            query_positions, key_positions) <= window - 1,
        "later than": lambda query_positions, key_positions, window: key_positions[
            ..., None, :] > query_positions[..., :, None] - window,
        "both sides": lambda query_positions, key_positions, window: _steps(
            query_positions, key_positions).abs() < window,
        "loop": _window_by_loop,
    },
    misconceptions=(
        Misconception("one key too many",
            lambda query_positions, key_positions, window: _steps(
                query_positions, key_positions) <= window,
            "Each query sees one key too many. The window counts the query's own key: fewer than "
            "W steps, not up to W."),
        Misconception("one key too few",
            lambda query_positions, key_positions, window: _steps(
                query_positions, key_positions) < window - 1,
            "Each query sees one key too few. W keys in all: its own and W - 1 before it."),
        Misconception("subtracted the other way",
            lambda query_positions, key_positions, window: -_steps(
                query_positions, key_positions) < window,
            "Every earlier key is seen, however far back. You count the steps from query to key; "
            "count how far the key lies behind the query."),
        Misconception("only what is further back",
            lambda query_positions, key_positions, window: _steps(
                query_positions, key_positions) > window,
            "Only keys further back than W are seen. Turn the comparison round; and with exactly "
            "W steps a key is hidden."),
        Misconception("sense turned round",
            lambda query_positions, key_positions, window: _steps(
                query_positions, key_positions) >= window,
            "What may be seen is hidden, and the other way round. True means may attend."),
        Misconception("own key left out",
            lambda query_positions, key_positions, window: (_steps(
                query_positions, key_positions) > 0) & (_steps(
                    query_positions, key_positions) < window),
            "A query does not see its own key. Zero steps are within the window, too."),
        Misconception("W keys before its own",
            lambda query_positions, key_positions, window: (_steps(
                query_positions, key_positions) > 0) & (_steps(
                    query_positions, key_positions) <= window),
            "W keys each, but one step too far back: the query's own key is missing. The steps go "
            "from 0 to W - 1."),
        Misconception("places in the tensor",
            lambda query_positions, key_positions, window: torch.arange(
                query_positions.shape[-1])[:, None] - torch.arange(
                    key_positions.shape[-1]) < window,
            "You used places in the tensors. The first query may stand at position 6, and a "
            "ring holds its keys in any order: use the positions."),
        Misconception("the same block",
            lambda query_positions, key_positions, window: (
                query_positions // window)[..., :, None] == (key_positions // window)[..., None, :],
            "The text is cut into fixed blocks, so the first token of a block sees nothing before "
            "it. The window slides: it ends at each query."),
        Misconception("keys in rows",
            lambda query_positions, key_positions, window: _steps(
                query_positions, key_positions).mT < window,
            "Rows and columns have changed places. A row belongs to a query, a column to a key."),
        Misconception("axes from the left",
            lambda query_positions, key_positions, window: query_positions[:, None]
            - key_positions[None] < window,
            "It works for one text. With a batch the new axes stand in the wrong places: count "
            "them from the right."),
        Misconception("the keys' axis in front",
            lambda query_positions, key_positions, window: query_positions[..., None]
            - key_positions[None] < window,
            "It works for one text. Of a batch the keys got their new axis in front of the rows: it "
            "belongs before their last one."),
        Misconception("no new axes",
            lambda query_positions, key_positions, window: query_positions - key_positions < window,
            "Every query must meet every key. Give the queries a last axis and the keys one "
            "before their last."),
        Misconception("a triangle of places",
            lambda query_positions, key_positions, window: _triangle(
                query_positions, key_positions).triu(1 - window),
            "You cut a band from a triangle of places. The first query may stand at position 6, and "
            "a ring holds its keys in any order: compare positions."),
    ),
    hints=(
        Hint("I do not know where to start",
             "The query stands at 5, the key at 2. How many steps lie between, and is that fewer "
             "than 3?"),
        Hint("It is right for some queries",
             "Steps are query position minus key position, for each pair. With W = 3, steps 0, 1 "
             "and 2 are within, 3 is not."),
        Hint("The shapes do not fit",
             "Queries get a new last axis, keys a new one before the last, as in causal. Subtract, "
             "compare with the window."),
    ),
    praise="W keys, your own included: Mistral's count.",
)


# ---------------------------------------------------------------- piece: write


def nine_single_tokens_in_a_ring_of_four():
    k, v = _random(1, (2, 9, 3, 6), (2, 9, 3, 6))
    return 4, k, v, torch.arange(9).expand(2, 9), (1,) * 9


def rows_of_different_length():
    k, v = _random(2, (3, 9, 2, 4), (3, 9, 2, 4))
    positions = torch.full((3, 9), -1)
    for row, (first, length) in enumerate(((0, 9), (0, 4), (3, 6))):   # padded at both ends
        positions[row, first:first + length] = torch.arange(length)
    return 5, k, v, positions, (2, 3, 4)


def single_tokens_of_a_row_that_ends():
    k, v = _random(5, (2, 7, 2, 4), (2, 7, 2, 4))
    positions = torch.arange(7).repeat(2, 1)
    positions[1, 5:] = -1
    return 4, k, v, positions, (1,) * 7


def a_chunk_longer_than_the_ring():
    k, v = _random(3, (2, 14, 3, 4), (2, 14, 3, 4))
    return 4, k, v, torch.stack([torch.arange(14), torch.arange(2, 16)]), (3, 11)


def a_ring_that_is_never_full():
    k, v = _random(4, (2, 5, 2, 4), (2, 5, 2, 4))
    return 8, k, v, torch.arange(5).expand(2, 5), (1, 3, 1)


def a_long_chunk_that_ends_in_padding():
    k, v = _random(13, (2, 9, 2, 4), (2, 9, 2, 4))
    positions = torch.full((2, 9), -1)
    for row, length in enumerate((9, 6)):
        positions[row, :length] = torch.arange(length)
    return 4, k, v, positions, (7, 1, 1)


def a_long_chunk_where_the_first_in_a_slot_stays():
    return *a_chunk_longer_than_the_ring(), _FirstStays


class _FirstStays(TorchDispatchMode):
    """Where one assignment puts two values into one place, the first stays.

    PyTorch leaves open which one does; on a CPU it is mostly the last. An assignment for each token,
    and doubles in a place that is cut off later, come out right as before.
    """

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name, places = function._schema.name.removeprefix("aten::"), None
        if name.rstrip("_") in ("index_put", "index_copy", "scatter"):
            places = torch.arange(arguments[0].numel()).view(arguments[0].shape)
        if name.rstrip("_") == "index_put" and not any(arguments[3:]):
            whole, index, new = arguments[:3]
            places = places[tuple(slice(None) if i is None else i for i in index)]
        elif name.rstrip("_") == "index_copy":
            whole, dim, index, new = arguments
            places = places.index_select(dim, index)
        elif name.rstrip("_") == "scatter" and isinstance(arguments[3], Tensor) and not named:
            whole, dim, index, new = arguments
            places, new = places.gather(dim, index), new[tuple(map(slice, index.shape))]
        else:
            return function(*arguments, **(named or {}))
        whole = whole if name.endswith("_") else whole.clone()
        return whole.put_(places.flatten().flip(0), new.expand(places.shape).flatten().flip(0))


def _run_write(work, slots, k, v, positions, sizes, order=nullcontext):
    """Write the chunks one after the other; what lies in the slots then."""
    ring = LayerCache((k.shape[0], slots, *k.shape[2:]), True, None, k.dtype)
    with order():
        for chunk in zip(*(x.split(sizes, dim=1) for x in (k, v, positions))):
            work(ring, *chunk)
    return {"positions": ring.positions, "keys": ring.keys, "values": ring.values}


def _put(slot=lambda p, t, S, T, last: p % S, keep=lambda p, first, last, S: 0 <= p and p > last - S,
         value=True, mark=lambda p, s: p):
    """write as a loop, with one step exchanged."""
    def write(self, k, v, positions):
        S, T = self.keys.shape[1], positions.shape[1]
        for b in range(len(positions)):
            own = positions[b].tolist()
            real = [p for p in own if p >= 0]
            first, last = (min(real), max(real)) if real else (0, -1)
            for t, p in enumerate(own):
                if not keep(p, first, last, S):
                    continue
                s = slot(p, t, S, T, last)
                self.keys[b, s] = k[b, t]
                if value:
                    self.values[b, s] = v[b, t]
                if mark is not None:
                    self.positions[b, s] = mark(p, s)
    return write


def _write_by_rows(self, k, v, positions):
    S = self.keys.shape[1]
    for b in range(len(positions)):
        real = (positions[b] >= 0).nonzero()[:, 0][-S:]
        slot = positions[b, real] % S
        self.keys[b, slot] = k[b, real]
        self.values[b, slot] = v[b, real]
        self.positions[b, slot] = positions[b, real]


def _write_new_tensors(self, k, v, positions):
    keys, values, held = self.keys.clone(), self.values.clone(), self.positions.clone()
    for b, t in (positions >= 0).nonzero().tolist():
        s = int(positions[b, t]) % keys.shape[1]
        keys[b, s], values[b, s], held[b, s] = k[b, t], v[b, t], positions[b, t]
    self.keys, self.values, self.positions = keys, values, held


def _write_shifted(self, k, v, positions):
    """The newest at the end, the oldest cut off."""
    S = self.keys.shape[1]
    for name, new in (("keys", k), ("values", v), ("positions", positions)):
        setattr(self, name, torch.cat((getattr(self, name), new), dim=1)[:, -S:])


def _write_into_all_rows(self, k, v, positions):
    """No index for the rows: the slots of every row, in every row."""
    slot = positions % self.keys.shape[1]
    self.keys[:, slot], self.values[:, slot], self.positions[:, slot] = k, v, positions


def _write_newest_of_all(self, k, v, positions):
    _write_at_once(self, k, v, positions.where(positions > positions.max() - self.keys.shape[1], -1))


def _write_until_padding(self, k, v, positions):
    real = (positions >= 0).cumprod(dim=1) == 1
    _put(keep=lambda p, f, last, S: p >= 0)(self, k, v, positions.where(real, -1))


def _write_at_once(self, k, v, positions, room=None):
    """All real tokens in one assignment; with ``room``, of each row no more than so many beyond the ring."""
    keep = positions >= 0
    if room is not None:
        keep &= positions >= positions.amax(dim=1, keepdim=True) - self.keys.shape[1] + 1 - room
    row, column = torch.where(keep)
    slot = positions[row, column] % self.keys.shape[1]
    self.keys[row, slot], self.values[row, slot] = k[row, column], v[row, column]
    self.positions[row, slot] = positions[row, column]


def _write_at_once_beside(self, k, v, positions):
    """In one assignment, what shall not stay in a slot that is cut off."""
    S = self.keys.shape[1]
    keep = (positions >= 0) & (positions > positions.amax(dim=1, keepdim=True) - S)
    slot, row = torch.where(keep, positions % S, S), torch.arange(len(positions))[:, None]
    for name, new in (("keys", k), ("values", v), ("positions", positions)):
        whole = torch.cat((getattr(self, name), new[:, :1]), dim=1)
        whole[row, slot] = new
        getattr(self, name)[:] = whole[:, :S]


def _write_by_scatter(self, k, v, positions, start=None):
    S = self.keys.shape[1]
    start = -S if start is None else start
    for b in range(len(positions)):
        real = (positions[b] >= 0).nonzero()[:, 0][start:]
        slot = positions[b, real] % S
        self.keys[b].scatter_(0, slot[:, None, None].expand(-1, *k.shape[2:]), k[b, real])
        self.values[b].index_copy_(0, slot, v[b, real])
        self.positions[b] = self.positions[b].scatter(0, slot, positions[b, real])


def _write_nothing(self, k, v, positions):
    keys = self.keys.clone()
    keys[:, 0] = k[:, 0]


def _write_whole_columns(self, k, v, positions):
    """The slots of the first row for every row of the batch, padding and all."""
    S = self.keys.shape[1]
    for t, p in enumerate(positions[0].tolist()):
        self.keys[:, p % S], self.values[:, p % S] = k[:, t], v[:, t]
        self.positions[:, p % S] = positions[:, t]


def _write_positions_of_the_first_row(self, k, v, positions):
    _put()(self, k, v, positions[:1].expand(positions.shape))


def _write_common_columns(self, k, v, positions):
    """Columns with padding in any row are left out for all rows."""
    good = (positions >= 0).all(0)
    _put()(self, k[:, good], v[:, good], positions[:, good])


def _write_last_columns(self, k, v, positions):
    S = self.keys.shape[1]
    _put()(self, k[:, -S:], v[:, -S:], positions[:, -S:])


def _write_keys_twice(self, k, v, positions):
    _put()(self, k, k, positions)


WRITE = Exercise(
    name="write", chapter=8, kind="piece", piece="cache.LayerCache.write", entry="write",
    title="Into the ring", difficulty="medium", importance="essential", minutes=10,
    reference=LayerCache.write, run=_run_write,
    fixtures=(nine_single_tokens_in_a_ring_of_four, rows_of_different_length,
              a_chunk_longer_than_the_ring, a_ring_that_is_never_full,
              a_long_chunk_that_ends_in_padding, single_tokens_of_a_row_that_ends,
              a_long_chunk_where_the_first_in_a_slot_stays),
    may_change_inputs=True,
    equivalents={
        "a double loop": _put(),
        "row by row": _write_by_rows,
        "token by token, later ones over earlier ones": _put(keep=lambda p, f, last, S: p >= 0),
        "new tensors": _write_new_tensors,
        "what is dropped goes into a slot beside the ring": _write_at_once_beside,
        "scattered": _write_by_scatter,
    },
    misconceptions=(
        Misconception("place in the chunk",
            _put(slot=lambda p, t, S, T, last: t % S),
            "Each chunk begins at slot 0 again: you took the place in the chunk. The slot comes "
            "from the token's position in the text."),
        Misconception("the last slot for ever",
            _put(slot=lambda p, t, S, T, last: min(p, S - 1), keep=lambda p, f, last, S: p >= 0),
            "When the ring is full, every new token goes into the last slot, and the old ones "
            "stay. After slot S - 1 comes slot 0."),
        Misconception("everything shifted", _write_shifted,
            "The right tokens are there, in other slots: everything was moved for each new one. "
            "Nothing moves; position p lies in slot p mod S."),
        Misconception("no index for the rows", _write_into_all_rows,
            "Each row of the batch holds the keys of another one. Slots of all rows were written "
            "in all rows; every row writes into itself."),
        Misconception("padding written", _put(keep=lambda p, f, last, S: True),
            "A padded token was written, and -1 mod S is the last slot: what was there is lost. "
            "Position -1 is never written."),
        Misconception("two tokens in one slot at once", _write_at_once,
            "One assignment put two tokens of a long chunk into one slot. Which one stays is left open; "
            "on a GPU it may be either. Pick the last S first.",
            also=[partial(_write_at_once, room=1), partial(_write_by_scatter, start=0)]),
        Misconception("position 0 left out", _put(keep=lambda p, f, last, S: p > 0),
            "The first token of each text is missing. Padding is -1; 0 is a real position."),
        Misconception("nothing after padding", _write_until_padding,
            "A row that begins with padding lost its tokens. Skip what is padded and go on."),
        Misconception("the newest of the whole batch", _write_newest_of_all,
            "Rows that are behind the longest one lost tokens. The last S are counted for each row "
            "by itself."),
        Misconception("the first S of a long chunk",
            _put(keep=lambda p, first, last, S: 0 <= p < first + S),
            "Of a chunk longer than the ring you kept the first S tokens. The last S are within "
            "the window of what comes next."),
        Misconception("the last S - 1", _put(keep=lambda p, f, last, S: 0 <= p and p > last - S + 1),
            "Of a long chunk one token too few was kept: the ring has room for S, the newest included."),
        Misconception("positions forgotten", _put(mark=None),
            "Keys and values are there, but the ring does not know whose they are: write the "
            "positions, too."),
        Misconception("slots for positions", _put(mark=lambda p, s: s),
            "The number of the slot was written in place of the position. Beside each key stands "
            "its position in the text."),
        Misconception("values forgotten", _put(value=False),
            "The values are still zeros. A token leaves a key, a value and a position."),
        Misconception("keys for values", _write_keys_twice,
            "The values are copies of the keys."),
        Misconception("slots of the first row", _write_whole_columns,
            "Every row uses the slots of the first one. The rows of a batch have positions of "
            "their own, and some are padding."),
        Misconception("positions of the first row", _write_positions_of_the_first_row,
            "All rows were given the positions of the first one. Each row of a batch has its own, and "
            "its own padding."),
        Misconception("the position for the slot", _put(slot=lambda p, t, S, T, last: p),
            "Positions grow beyond the slots: only in the first round are the two the same. Take what "
            "remains after a division by S."),
        Misconception("the last S columns", _write_last_columns,
            "A padded row lost tokens: you kept the last S columns of the chunk, and some of them "
            "are padding. Count back from the row's newest position."),
        Misconception("padded columns left out for all", _write_common_columns,
            "Where one row is padded, the other rows lost a real token. Decide for each row by "
            "itself."),
        Misconception("a copy changed", _write_nothing,
            "The ring is unchanged: you wrote into a copy. Assign into the tensors of self, or "
            "put the new ones there."),
    ),
    hints=(
        Hint("I do not know where to start",
             "A ring of 5, one row, positions 3 4 5 6. Which slots? Which number do you divide "
             "by, and what remains?"),
        Hint("It is right for single tokens only",
             "Rows differ: row 0 may bring position 7 and row 1 padding. A chunk of 11 into 4 "
             "slots leaves the positions 7 to 10."),
        Hint("I cannot put it together",
             "For each row: the columns with positions from newest - S + 1 up, and not -1. Their "
             "slots are positions mod S. Assign keys, values and positions there."),
    ),
    praise="The slot of the token that just went out of sight: nothing moves.",
)


# ---------------------------------------------------------------- piece: update


def chunks_through_a_ring_of_four():
    q, k, v = _random(5, (2, 15, 3, 6), (2, 15, 3, 6), (2, 15, 3, 6))
    return 4, True, q, k, v, torch.arange(15).expand(2, 15), (1, 1, 3, 2, 7, 1)


def rows_of_different_length_in_a_ring_of_five():
    q, k, v = _random(6, (3, 13, 2, 4), (3, 13, 2, 4), (3, 13, 2, 4))
    positions = torch.full((3, 13), -1)
    for row, length in enumerate((6, 13, 9)):
        positions[row, :length] = torch.arange(length)
    return 5, True, q, k, v, positions, (6, 3, 4)


def a_layer_without_a_window():
    q, k, v = _random(7, (2, 9, 3, 4), (2, 9, 3, 4), (2, 9, 3, 4))
    return 11, False, q, k, v, torch.arange(9).expand(2, 9), (4, 1, 3, 1)


def _run_update(work, slots, ring, q, k, v, positions, sizes):
    """Feed the chunks; what their queries bring back, and which positions are held at the end."""
    layer = LayerCache((k.shape[0], slots, *k.shape[2:]), ring, None, k.dtype)
    looks = []
    for q_, k_, v_, p_ in zip(*(x.split(sizes, dim=1) for x in (q, k, v, positions))):
        layer.used = slots if ring else int(p_.max()) + 1
        keys, values, held = work(layer, k_, v_, p_)
        looks.append(attend(q_, keys, values, may_attend(p_, held, slots if ring else None)))
    return {"looks": torch.cat(looks, dim=1), "held": layer.positions}


def _updated(give, write=True):
    """update: give(old ring, chunk, new ring) -> what is returned for a chunk; each a triple."""
    def update(self, k, v, positions):
        chunk = self.ring and positions.shape[1] > 1
        old = tuple(x.clone() for x in (self.keys, self.values, self.positions))
        if write or not chunk:
            self.write(k, v, positions)
        new = self.keys, self.values, self.positions
        return give(old, (k, v, positions), new) if chunk else new
    return update


def _joined(first, second, dim=1):
    return tuple(torch.cat(pair, dim=dim) for pair in zip(first, second))


def _guessed(old, chunk, new):
    """Keys from the old ring and the chunk, positions as if the ring lay in order."""
    keys, values, held = _joined(old, chunk)
    first = chunk[2][:, :1]
    guess = first + torch.arange(-old[2].shape[1], 0)
    return keys, values, torch.cat((guess, chunk[2]), dim=1)


def _read_first(self, k, v, positions):
    """Old and new side by side for single tokens as well."""
    seen = _joined((self.keys, self.values, self.positions), (k, v, positions))
    self.write(k, v, positions)
    return seen if self.ring else (self.keys, self.values, self.positions)


def _hung_on(self, k, v, positions):
    """A ring that grows like the cache of a text without a window."""
    if not self.ring or positions.shape[1] == 1:
        return LayerCache.update(self, k, v, positions)
    self.keys, self.values, self.positions = _joined(
        (self.keys, self.values, self.positions), (k, v, positions))
    return self.keys, self.values, self.positions


def _real_in_the_first_row(old, chunk, new):
    real = chunk[2][0] >= 0
    return _joined(old, tuple(x[:, real] for x in chunk))


def _sorted_too(old, chunk, new):
    """Everything by position: the same in another order."""
    keys, values, held = _joined(old, chunk)
    order = held.argsort(dim=1)
    place = order[..., None, None].expand(keys.shape)
    return keys.gather(1, place), values.gather(1, place), held.gather(1, order)


UPDATE = Exercise(
    name="update", chapter=8, kind="piece", piece="cache.LayerCache.update", entry="update",
    title="Read, then write", difficulty="medium", importance="essential", minutes=8,
    reference=LayerCache.update, run=_run_update,
    fixtures=(chunks_through_a_ring_of_four, rows_of_different_length_in_a_ring_of_five,
              a_layer_without_a_window),
    may_change_inputs=True,
    equivalents={
        "always read first": _read_first,
        "copies first": _updated(lambda old, chunk, new: _joined(old, chunk)),
        "the chunk in front": _updated(lambda old, chunk, new: _joined(chunk, old)),
        "in the order of the text": _updated(_sorted_too),
    },
    misconceptions=(
        Misconception("written first", _updated(lambda old, chunk, new: new),
            "Single tokens are right, chunks are not: their last tokens overwrote keys that their "
            "first ones need. Read the old ring before you write."),
        Misconception("written, then joined",
            _updated(lambda old, chunk, new: _joined(new, chunk)),
            "The chunk is there twice, once from the ring and once by itself, and its keys get "
            "double weight. Join it with the ring as it was before."),
        Misconception("not written",
            _updated(lambda old, chunk, new: _joined(old, chunk), write=False),
            "The chunk's own looks are right, but the ring stays as it was: later tokens find "
            "nothing. Write the chunk after reading."),
        Misconception("the chunk alone", _updated(lambda old, chunk, new: chunk),
            "A chunk sees only itself. What the ring held before belongs in front of it."),
        Misconception("the old ring alone", _updated(lambda old, chunk, new: old),
            "The chunk does not see itself. Its own keys belong beside those of the old ring."),
        Misconception("cut to the size of the ring",
            _updated(lambda old, chunk, new: tuple(
                x[:, -len(old[2][0]):] for x in _joined(old, chunk))),
            "What was joined was cut to S again, and the first queries of the chunk lost keys. "
            "Return all of it: the mask hides what is too far."),
        Misconception("positions of the new ring",
            _updated(lambda old, chunk, new: (
                *_joined(old, chunk)[:2], torch.cat((new[2], chunk[2]), dim=1))),
            "The keys are of the old ring, the positions of the new one, so they do not belong "
            "together. Read all three before you write."),
        Misconception("keys for values",
            _updated(lambda old, chunk, new: tuple(_joined(old, chunk)[i] for i in (0, 0, 2))),
            "What came back as values are the keys once more."),
        Misconception("hung on", _hung_on,
            "The ring has grown: the chunk was hung on at its end, and slots are counted wrong from "
            "now on. A ring keeps its S slots."),
        Misconception("padding of the first row for all", _updated(_real_in_the_first_row),
            "Columns that are padding in the first row were left out for all. In another row they may "
            "be real; the mask hides what is padding."),
        Misconception("positions as if in order", _updated(_guessed),
            "The keys are right and their positions are not: you counted as if the ring lay in "
            "order. It keeps its positions; hand those over."),
        Misconception("positions not joined",
            _updated(lambda old, chunk, new: (*_joined(old, chunk)[:2], new[2])),
            "The three are of different length: some were joined with the chunk, some were not. Join keys, "
            "values and positions alike."),
        Misconception("joined along the batch",
            _updated(lambda old, chunk, new: _joined(old, chunk, dim=0)),
            "Ring and chunk were joined along the rows of the batch, the axis that is taken where "
            "none is named. Tokens lie along axis 1."),
        Misconception("nothing returned", _updated(lambda old, chunk, new: None),
            "Nothing came back for a chunk. Return keys, values and positions."),
    ),
    hints=(
        Hint("I do not know where to start",
             "A ring of 5 holds 8 to 12, and 13, 14, 15 come in. Which keys does 13 want, and "
             "which of them are gone once the chunk is written?"),
        Hint("Single tokens are right, chunks are not",
             "Query 13 wants 9 to 13, query 15 wants 11 to 15. All of them are in the old ring or "
             "in the chunk: 5 + 3 keys, side by side."),
        Hint("I cannot put it together",
             "Join old and new along axis 1, three times: keys, values, positions. Then write. "
             "Return what was joined; joining has copied it."),
    ),
    praise="Read before write: any chunk size gives the same looks.",
)


# ---------------------------------------------------------------- exercise: attended_pairs


def seventeen_tokens_and_a_window_of_five():
    return 17, 5


def a_text_shorter_than_the_window():
    return 9, 12


def a_long_text():
    return 2048, 300


def _plain_pairs(length, window):
    return pairs(length, window)


ATTENDED_PAIRS = Exercise(
    name="attended_pairs", chapter=8, kind="complete", entry="attended_pairs",
    title="How many pairs are looked at", difficulty="easy", importance="essential", minutes=6,
    reference=_plain_pairs,
    fixtures=(seventeen_tokens_and_a_window_of_five, a_text_shorter_than_the_window, a_long_text),
    equivalents={
        "a sum over the queries": lambda length, window: sum(
            min(i + 1, window) for i in range(length)),
        "all causal ones less those too far back": lambda length, window: length * (
            length + 1) // 2 - max(0, length - window) * max(0, length - window + 1) // 2,
        "a sum over the distances": lambda length, window: sum(
            length - d for d in range(min(window, length))),
        "as a float": lambda length, window: float(pairs(length, window)),
        "a mask, counted": lambda length, window: int(may_attend(
            torch.arange(length), torch.arange(length), window).sum()),
    },
    misconceptions=(
        Misconception("W for each", lambda length, window: length * window,
            "The first queries have fewer than W tokens before them. Query 0 sees one key, query "
            "1 two, until the window is full."),
        Misconception("without a window", lambda length, window: length * (length + 1) // 2,
            "That is the count without a window. From query W on, no query sees more than W keys."),
        Misconception("all pairs", lambda length, window: length * length,
            "That counts every query with every key, the future included."),
        Misconception("W + 1 keys", lambda length, window: sum(
                min(i + 1, window + 1) for i in range(length)),
            "One key too many for the later queries. The window counts the query's own key."),
        Misconception("own key forgotten", lambda length, window: sum(
                min(i, window - 1) for i in range(length)),
            "One pair for each token is missing: a query sees its own key."),
        Misconception("W before the query", lambda length, window: sum(
                min(i, window) for i in range(length)),
            "Query 0 sees its own key, and got none. Count the own key for each query, and at most "
            "W in all."),
        Misconception("W - 1 keys", lambda length, window: sum(
                min(i + 1, window - 1) for i in range(length)),
            "One key too few for the later queries: they see W - 1 tokens before them, and their "
            "own key as well."),
        Misconception("both sides", lambda length, window: sum(
                min(length, i + window) - max(0, i - window + 1) for i in range(length)),
            "You counted keys on both sides. What comes later is hidden."),
        Misconception("the start forgotten", lambda length, window: max(
                0, length - window) * window,
            "The first W queries are missing. They see 1, 2, 3 and so on up to W keys."),
        Misconception("the start alone", lambda length, window: pairs(min(length, window), window),
            "These are the pairs of the first W queries. Each query after them sees W keys, too."),
        Misconception("the others one short", lambda length, window: (
            pairs(length, window) - max(0, length - window)),
            "The start is right, and each query after it is one key short: W - 1 before it, and its "
            "own."),
        Misconception("one query twice", lambda length, window: pairs(length, window) + min(length, window),
            "One query was counted twice: the first one that sees W keys belongs to the start."),
        Misconception("half a square", lambda length, window: (
            pairs(length, window) - min(length, window) + min(length, window) // 2),
            "The start is half a square, and it should be a triangle with its diagonal: 1 + 2 + ... + w "
            "is half of w times w + 1."),
        Misconception("a whole triangle for a short text",
            lambda length, window: window * (window + 1) // 2 + max(0, length - window) * window,
            "A text shorter than the window was counted as if it filled it. Then the last query "
            "sees as many keys as the text has tokens."),
        Misconception("text shorter than the window",
            lambda length, window: window * (window + 1) // 2 + (length - window) * window,
            "A text longer than the window is right, a shorter one is not: then there are fewer "
            "than W queries."),
    ),
    hints=(
        Hint("I do not know where to start",
             "W = 3, five tokens: how many keys does each query see? Write the five numbers down "
             "and add them."),
        Hint("It is nearly right",
             "Query i sees i + 1 keys or W, whichever is less: 1 + 2 + 3 + 3 + 3 = 12 for five "
             "tokens and W = 3."),
        Hint("It is right for long texts only",
             "Take w = the smaller of W and the length. The first w queries give w (w + 1) / 2, "
             "each of the others w."),
    ),
    praise="A triangle at the start, then W for each token: linear in the length.",
)


# ---------------------------------------------------------------- exercise: order

CHUNK_IN_ORDER = Exercise(
    name="chunk_in_order", chapter=8, kind="order", title="A chunk and a ring",
    difficulty="easy", importance="essential", minutes=6,
    lines=(
        "q, k = rotate(q, *angles(positions)), rotate(k, *angles(positions))",
        "keys = torch.cat([ring.keys, k], dim=1)",
        "held = torch.cat([ring.positions, positions], dim=1)",
        "ring.keys[row, positions % W], ring.positions[row, positions % W] = k, positions",
        "mask = may_attend(positions, held, W)",
        "look = weights(q, keys, mask)",
    ),
    distractors=("q, k = rotate(q, *angles(positions % W)), rotate(k, *angles(positions % W))",),
    equivalents={
        "positions first": (0, 2, 1, 3, 4, 5),
        "written last": (0, 1, 2, 4, 5, 3),
        "written last, positions first": (0, 2, 1, 4, 5, 3),
        "written before the look": (0, 1, 2, 4, 3, 5),
        "positions first, written before the look": (0, 2, 1, 4, 3, 5),
        "mask early": (0, 2, 4, 1, 3, 5),
        "mask early, written last": (0, 2, 4, 1, 5, 3),
        "mask of queries and held first": (2, 4, 0, 1, 3, 5),
        "mask of queries and held first, written last": (2, 4, 0, 1, 5, 3),
        "positions, rotation": (2, 0, 1, 3, 4, 5),
        "positions, rotation, written last": (2, 0, 1, 4, 5, 3),
        "positions, rotation, written before the look": (2, 0, 1, 4, 3, 5),
        "positions, rotation, mask": (2, 0, 4, 1, 3, 5),
        "positions, rotation, mask, written last": (2, 0, 4, 1, 5, 3),
    },
    misconceptions=(
        Misconception("rotated by the slot", "with 6",
            "One line turns keys by the angle of their slot, so that after the first round old "
            "keys look newer. The angle belongs to the position."),
        Misconception("never written", "without 3",
            "This chunk would be read well, and the next would find nothing of it. A line is "
            "missing."),
        Misconception("written first", "3 before 1 and 3 before 2",
            "The chunk goes into the ring before the ring is read: keys that its first queries "
            "need are gone, and its own are there twice."),
        Misconception("written between keys and positions", "3 before 2",
            "The keys come from the old ring, the positions from the new one. Both must be read "
            "before anything is written."),
        Misconception("written between positions and keys", "3 before 1",
            "The positions come from the old ring, the keys from the new one. Both must be read "
            "before anything is written."),
        Misconception("rotated after reading", "1 before 0",
            "The chunk joins the ring unrotated, beside keys that were rotated when they came. "
            "Rotate first."),
        Misconception("mask before the positions", "4 before 2",
            "The mask compares positions that have not been read yet. Which line puts old and new "
            "ones side by side?"),
        Misconception("look before the mask", "5 before 4",
            "The queries look before the mask says whom they may see."),
        Misconception("look before the keys", "5 before 1",
            "The queries look before the old keys stand beside the new ones. Which line joins "
            "them?"),
    ),
    hints=(
        Hint("I do not know which line is first",
             "Which lines need the rotated k? Which of them look into the ring, and which one "
             "changes it?"),
        Hint("Two lines look alike",
             "W = 5. Token 7 lies in slot 2. Which of the two angles tells its distance from token "
             "6, which lies in slot 1, and from token 4 in slot 4?"),
        Hint("The order is still refused",
             "Rotate; read keys and positions from the old ring; only then write; mask; look. The "
             "write may come later, never earlier."),
    ),
    praise="Read both, then write.",
)


# ---------------------------------------------------------------- exercise: ring_positions


def seventeen_tokens_in_five_slots():
    return 17, 5


def three_tokens_in_seven_slots():
    return 3, 7


def no_token_at_all():
    return 0, 4


def exactly_two_rounds():
    return 12, 6


def _held(rule):
    """ring_positions from rule(slot, length, window)."""
    return lambda length, window: torch.tensor([rule(s, length, window) for s in range(window)])


def _newest_in(s, n, w):
    return n - 1 - (n - 1 - s) % w if n > s else -1


def _by_writing(length, window):
    slots = torch.full((window,), -1)
    for p in range(length):
        slots[p % window] = p
    return slots


def _by_rolling(length, window):
    return torch.arange(length - window, length).clamp(min=-1).roll(length % window)


RING_POSITIONS = Exercise(
    name="ring_positions", chapter=8, kind="function", entry="ring_positions",
    title="Who lies in which slot", difficulty="medium", importance="useful", minutes=10,
    reference=_held(_newest_in),
    fixtures=(seventeen_tokens_in_five_slots, three_tokens_in_seven_slots, no_token_at_all,
              exactly_two_rounds),
    equivalents={
        "writing them one by one": _by_writing,
        "rolling the last ones": _by_rolling,
        "whole rounds": _held(lambda s, n, w: -1 if n <= s else s + (n - 1 - s) // w * w),
    },
    misconceptions=(
        Misconception("in the order of the text",
            lambda length, window: torch.arange(length - window, length).clamp(min=-1),
            "These are the right positions in the order of the text. A ring does not lie in "
            "order: position p is in slot p mod W."),
        Misconception("in the order of the text, below zero",
            lambda length, window: torch.arange(length - window, length),
            "These are the last W positions in the order of the text, for a short text with numbers "
            "below -1. Position p lies in slot p mod W."),
        Misconception("the newest in front",
            lambda length, window: torch.arange(length - 1, length - 1 - window, -1).clamp(min=-1),
            "These are the last positions, the newest in front. Nothing in a ring is sorted: position "
            "p lies in slot p mod W."),
        Misconception("in the order of the text, no empty slots",
            lambda length, window: torch.arange(max(0, length - window), length),
            "These are the last positions in the order of the text. Position p lies in slot p mod "
            "W, and a slot without a token holds -1."),
        Misconception("in the order of the text, empty slots behind",
            lambda length, window: torch.tensor([
                *range(max(0, length - window), length), *[-1] * (window - length)]),
            "A full ring is not in the order of the text: position p is in slot p mod W. Only "
            "before the first round is over the two agree."),
        Misconception("the first ones",
            _held(lambda s, n, w: s if s < n else -1),
            "These are the first W positions. Each slot holds the newest position that belongs "
            "there."),
        Misconception("one token too many", _held(lambda s, n, w: _newest_in(s, n + 1, w)),
            "One token too many: the newest has position length - 1."),
        Misconception("counted from 1",
            _held(lambda s, n, w: _newest_in(s, n + 1, w) or -1),
            "Positions were counted from 1. The first token has position 0, the newest length - 1."),
        Misconception("one token too few",
            _held(lambda s, n, w: _newest_in(s, max(0, n - 1), w)),
            "One token is missing. The newest has position length - 1, because positions count "
            "from 0."),
        Misconception("empty slots below zero", _held(lambda s, n, w: n - 1 - (n - 1 - s) % w),
            "An empty slot holds exactly -1. Yours go below, where no token was written yet."),
        Misconception("zeros in empty slots", _held(lambda s, n, w: max(_newest_in(s, n, w), 0)),
            "Empty slots hold 0, which is the position of a real token. Empty is -1."),
        Misconception("rolled the other way",
            lambda length, window: torch.arange(length - window, length).clamp(min=-1).roll(
                -(length % window)),
            "The last W positions are there, rolled the wrong way round. Check one: position 16 "
            "with W = 5 belongs in slot 1."),
        Misconception("numbers of slots", lambda length, window: torch.arange(window),
            "These are numbers of slots. The ring remembers positions in the text, which grow "
            "beyond W."),
        Misconception("a round that is not there yet",
            _held(lambda s, n, w: n // w * w + s),
            "Some of these positions are still to come: the last round is not complete. None "
            "reaches the length."),
    ),
    hints=(
        Hint("I do not know where to start",
             "W = 5, 7 tokens: write 0 1 2 3 4 into the slots, then 5 and 6. What is in each "
             "slot?"),
        Hint("It is right for some lengths",
             "Try a length below W, one that is a multiple of W, and 0. The newest position is "
             "length - 1; an empty slot holds -1."),
        Hint("I want it without a loop",
             "Slot s holds the largest p below length with p mod W = s. Go back from length - 1 by "
             "(length - 1 - s) mod W; where s has no token yet, -1."),
    ),
    praise="What a ring holds can be calculated: but it is safer to store it.",
)


# ---------------------------------------------------------------- exercise: look_into_ring (bug)


def eleven_tokens_in_a_ring_of_four():
    return _random(8, (2, 11, 3, 6), (2, 11, 3, 6), (2, 11, 3, 6)) + (4,)


def nine_tokens_in_a_ring_of_five():
    return _random(9, (3, 9, 2, 4), (3, 9, 2, 4), (3, 9, 2, 4)) + (5,)


def _run_ring(work, q, k, v, window):
    """Token by token; the looks of all. A second text follows in the same ring."""
    B, T = q.shape[:2]
    ring = LayerCache((B, window, *k.shape[2:]), True, None, k.dtype)
    looks = []
    for p in [*range(T), *range(window - 2)]:
        now = torch.full((B, 1), p)
        ring.write(k[:, p:p + 1], v[:, p:p + 1], now)
        looks.append(work(q[:, p:p + 1], ring, p, window))
    return torch.cat(looks, dim=1)


def _ring_look(see):
    def look_into_ring(q, ring, position, window):
        return attend(q, ring.keys, ring.values, see(ring, position, window))
    return look_into_ring


def _now(ring, position):
    return torch.full((len(ring.positions), 1), position)


def _mask_of(held):
    return lambda ring, p, w: may_attend(_now(ring, p), held(ring, p, w), w)


def _slots(ring):
    return torch.arange(ring.positions.shape[1]).expand(ring.positions.shape)


LOOK_INTO_RING = Exercise(
    name="look_into_ring", chapter=8, kind="bug", entry="look_into_ring",
    title="Right until the ring is full", difficulty="medium", importance="essential", minutes=8,
    reference=_ring_look(_mask_of(lambda ring, p, w: ring.positions)),
    fixtures=(eleven_tokens_in_a_ring_of_four, nine_tokens_in_a_ring_of_five),
    run=_run_ring, may_change_inputs=True,
    equivalents={
        "the rule by hand": _ring_look(lambda ring, p, w: (
            (ring.positions >= 0) & (ring.positions <= p) & (p - ring.positions < w))[:, None]),
        "causality alone, the ring does the rest": _ring_look(lambda ring, p, w: (
            (ring.positions >= 0) & (ring.positions <= p))[:, None]),
        "causality by slots: the first W tokens and then all": _ring_look(
            lambda ring, p, w: may_attend(_now(ring, p), _slots(ring))),
        "positions calculated": _ring_look(_mask_of(lambda ring, p, w: torch.stack(
            [_held(_newest_in)(p + 1, w)] * len(ring.positions)))),
    },
    misconceptions=(
        Misconception("unchanged", _ring_look(_mask_of(lambda ring, p, w: _slots(ring))),
            "From the first overwritten slot on, the looks are wrong: the number of a slot stands "
            "for the position of its key. The ring knows the positions."),
        Misconception("everything visible", _ring_look(lambda ring, p, w: torch.ones(
                len(ring.positions), 1, w, dtype=torch.bool)),
            "Full rings are right; empty slots, and old keys under a second text, are seen as "
            "well. Only positions tell them apart."),
        Misconception("filled slots visible",
            _ring_look(lambda ring, p, w: (ring.positions >= 0)[:, None]),
            "The first text is right. The second one sees keys of the first: its rule must "
            "compare positions, not only ask whether a slot is filled."),
        Misconception("empty slots visible",
            _ring_look(lambda ring, p, w: (ring.positions <= p)[:, None]),
            "Until the ring is full, its empty slots are seen: -1 is not later than the query. An "
            "empty slot is no key."),
        Misconception("own key hidden", _ring_look(lambda ring, p, w: (
                (ring.positions >= 0) & (ring.positions < p))[:, None]),
            "The query does not see its own key, and the first query of a text sees nothing. It is "
            "written already, at the query's own position."),
        Misconception("sense turned round", _ring_look(
                lambda ring, p, w: ~may_attend(_now(ring, p), ring.positions, w)),
            "What may be seen is hidden, and the other way round. True means may attend."),
        Misconception("one key short", _ring_look(
                lambda ring, p, w: may_attend(_now(ring, p), ring.positions, w - 1)),
            "The oldest key of a full ring is hidden. W counts the query's own key: nothing has to be "
            "taken off."),
        Misconception("the newest in the ring", _ring_look(lambda ring, p, w: may_attend(
                ring.positions.max(dim=1, keepdim=True).values, ring.positions, w)),
            "The first text is right. In a second one the largest position is left from the first: "
            "the query stands at the position that is given."),
        Misconception("no axis for the query", _ring_look(
                lambda ring, p, w: (ring.positions >= 0) & (ring.positions <= p)),
            "The mask has no axis for the query, so its rows are taken for queries. It is (B, T, S), "
            "and T is 1."),
        Misconception("sorted", _ring_look(_mask_of(
                lambda ring, p, w: ring.positions.sort(dim=1).values)),
            "The positions were sorted, the keys were not. Each position belongs to the key in the "
            "same slot."),
        Misconception("as if in order", _ring_look(_mask_of(
                lambda ring, p, w: _slots(ring) + p - w + 1)),
            "You counted back from the newest as if the ring lay in order. It does so once in a "
            "round; the ring keeps its positions."),
        Misconception("query by its slot", _ring_look(
                lambda ring, p, w: may_attend(_now(ring, p % w), _slots(ring), w)),
            "Query and keys are both counted by slots now. A query in slot 0 then sees one key. "
            "Positions, on both sides."),
        Misconception("query by its slot, keys by position", _ring_look(
                lambda ring, p, w: may_attend(_now(ring, p % w), ring.positions, w)),
            "The keys have their positions now, but the query is counted by its slot. Positions, on "
            "both sides."),
    ),
    hints=(
        Hint("I do not see the bug",
             "Print the mask for position 3 and for position 4, with a window of 4. Which positions "
             "does the function believe its keys have?"),
        Hint("What does the ring know?",
             "After position 11 in a ring of 5 the slots hold 10, 11, 7, 8, 9. The function says 0, "
             "1, 2, 3, 4."),
        Hint("I cannot repair it",
             "The third tensor of the ring, beside keys and values, has the position of each key. "
             "Hand it to the mask; nothing else changes."),
    ),
    praise="Positions beside the keys, and no order is needed.",
)


# ---------------------------------------------------------------- exercise: look_in_blocks


def sixty_seven_tokens_window_five():
    return _random(10, (2, 3, 67, 6), (2, 3, 67, 6), (2, 3, 67, 6)) + (5,)


def fifty_three_tokens_window_four():
    return _random(11, (3, 2, 53, 4), (3, 2, 53, 4), (3, 2, 53, 4)) + (4,)


def fewer_tokens_than_the_window():
    return _random(12, (2, 3, 4, 6), (2, 3, 4, 6), (2, 3, 4, 6)) + (7,)


def _run_blocks(work, q, k, v, window):
    """The look, and whether each half of the text has fetched the key at the other end.

    The value of that key becomes NaN: a weight of 0 does not hide it, only not fetching it does.
    """
    T, out, fetched = q.shape[-2], work(q, k, v, window), []
    if T > 4 * window:
        for name, far, half in (("earlier", 0, slice(T // 2, T)), ("later", -1, slice(T // 2))):
            spoilt = v.clone()
            spoilt[..., far, :] = torch.nan
            fetched += [name] * bool(work(q, k, spoilt, window)[..., half, :].isnan().any())
    return {"look": out, "far keys that were fetched": " and ".join(fetched) or "none"}


def _softly(q, k, v, mask, fill=-torch.inf, over=-1):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, fill).softmax(over) @ v


def _weights_hidden(q, k, v, mask):
    return ((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) * mask) @ v


def _blocks(before=lambda w: w - 1, size=lambda w: 3, rule=may_attend, scale=None,
            end=lambda last, T: last, look=_softly, values=lambda v, keys: v[..., keys, :], join=-2):
    """look_in_blocks with one step exchanged."""
    def look_in_blocks(q, k, v, window):
        T, looks = q.shape[-2], []
        for first in range(0, T, size(window)):
            rows = torch.arange(first, min(T, first + size(window)))
            low = max(0, first - before(window))
            keys = torch.arange(low, end(int(rows[-1]) + 1, T))
            factor = scale(q) if scale else 1.0
            looks.append(look(q[..., rows, :] * factor, k[..., keys, :], values(v, keys),
                              rule(rows, keys, window)))
        return torch.cat(looks, dim=join)
    return look_in_blocks


def _one_table(q, k, v, window):
    p = torch.arange(q.shape[-2])
    return _softly(q, k, v, may_attend(p, p, window))


def _one_query_at_a_time(q, k, v, window):
    looks = []
    for i in range(q.shape[-2]):
        near = slice(max(0, i - window + 1), i + 1)
        one = torch.ones(1, min(i + 1, window), dtype=torch.bool)
        looks.append(_softly(q[..., i:i + 1, :], k[..., near, :], v[..., near, :], one))
    return torch.cat(looks, dim=-2)


def _unfolded(q, k, v, window):
    """All windows at once, as views; the start padded with nothing."""
    pad = (0, 0, window - 1, 0)
    keys, values = (torch.nn.functional.pad(x, pad).unfold(-2, window, 1) for x in (k, v))
    scores = torch.einsum("...td,...tdw->...tw", q, keys) / math.sqrt(q.shape[-1])
    T = q.shape[-2]
    real = torch.arange(T)[:, None] + torch.arange(1 - window, 1) >= 0
    weights = scores.masked_fill(~real, -torch.inf).softmax(-1)
    return torch.einsum("...tw,...tdw->...td", weights, values)


def _last_block_lost(q, k, v, window):
    whole = q.shape[-2] // 3 * 3
    return _blocks()(*(x[..., :whole, :] for x in (q, k, v)), window)


def _from_below_zero(q, k, v, window):
    """The first key is not stopped at 0: a slice then begins near the end."""
    looks = []
    for first in range(0, q.shape[-2], 3):
        last, low = min(q.shape[-2], first + 3), first - window + 1
        mask = may_attend(torch.arange(first, last), torch.arange(low, last), window)
        looks.append(_softly(q[..., first:last, :], k[..., low:last, :], v[..., low:last, :], mask))
    return torch.cat(looks, dim=-2)


LOOK_IN_BLOCKS = Exercise(
    name="look_in_blocks", chapter=8, kind="function", entry="look_in_blocks",
    title="Blocks of another size", difficulty="hard", importance="useful", minutes=15,
    reference=_blocks(), run=_run_blocks,
    fixtures=(sixty_seven_tokens_window_five, fifty_three_tokens_window_four,
              fewer_tokens_than_the_window),
    equivalents={
        "blocks of W queries": _blocks(size=lambda w: w),
        "one query at a time": _one_query_at_a_time,
        "windows as views": _unfolded,
        "a whole window of keys before": _blocks(before=lambda w: w),
    },
    misconceptions=(
        Misconception("one table of all scores", _one_table,
            "The looks are right, but far keys on both sides were fetched and hidden. A block needs W "
            "- 1 keys before its first query, none behind its last."),
        Misconception("keys from the beginning", _blocks(before=lambda w: 1000),
            "The looks are right, but all keys from the text's beginning were fetched and hidden. A "
            "block needs W - 1 keys before its first query."),
        Misconception("keys to the end of the text", _blocks(end=lambda last, T: T),
            "The looks are right, but later keys were fetched and then hidden. A block needs no key "
            "behind its last query."),
        Misconception("below zero", _from_below_zero,
            "For the first block the first key comes out below 0, and that counts from the end. "
            "Stop at 0."),
        Misconception("mask turned round", _blocks(
                rule=lambda rows, keys, w: ~may_attend(rows, keys, w)),
            "What a query may see is hidden, and the forbidden is seen. True means may attend: "
            "mind what your fill does."),
        Misconception("the block alone", _blocks(before=lambda w: 0),
            "The first queries of each block see too little: their window begins before the block. "
            "Fetch the keys before it as well."),
        Misconception("one key short", _blocks(before=lambda w: w - 2),
            "Only the first query of each block is wrong: it needs W - 1 keys from before the block."),
        Misconception("no window inside", _blocks(
                rule=lambda rows, keys, w: causal(rows, keys)),
            "Inside a block the queries see more than W keys. Fetching few keys is not enough: each "
            "query needs the mask."),
        Misconception("no causality inside", _blocks(
                rule=lambda rows, keys, w: (rows[:, None] - keys).abs() < w),
            "Queries see later tokens of their own block. The window has one side only."),
        Misconception("everything fetched is seen", _blocks(
                rule=lambda rows, keys, w: torch.ones(len(rows), len(keys), dtype=torch.bool)),
            "Every query of a block sees all that was fetched for it, the future included. The mask "
            "is missing."),
        Misconception("places in the block", _blocks(rule=lambda rows, keys, w: may_attend(
                torch.arange(len(rows)), torch.arange(len(keys)), w)),
            "The first block is right. In the others queries and keys were both counted from 0, "
            "but the keys begin earlier: use positions."),
        Misconception("W + 1 keys", _blocks(
                rule=lambda rows, keys, w: may_attend(rows, keys, w + 1)),
            "Some queries of a block see one key too many. W counts the query's own."),
        Misconception("one key more fetched and seen", _blocks(
                before=lambda w: w, rule=lambda rows, keys, w: may_attend(rows, keys, w + 1)),
            "Every query sees one key too many, the first of a block included: W before it, and its "
            "own. W counts the own one."),
        Misconception("the rule of the block's size", _blocks(
                rule=lambda rows, keys, w: may_attend(rows, keys, 3)),
            "Each query sees three keys. Three is the size of a block; how far a query sees is W."),
        Misconception("zeros for hidden scores", _blocks(
                look=lambda q, k, v, mask: _softly(q, k, v, mask, fill=0.0)),
            "Hidden keys still get weight: a score of 0 is a score like others. Fill in minus "
            "infinity."),
        Misconception("hidden after the softmax", _blocks(look=_weights_hidden),
            "The weights of a query no longer add up to 1: they were hidden after the softmax. Hide "
            "the scores before it."),
        Misconception("softmax over the queries", _blocks(
                look=lambda q, k, v, mask: _softly(q, k, v, mask, over=-2).nan_to_num()),
            "The softmax went over the queries of a block. A query's weights go over its keys, the "
            "last axis."),
        Misconception("divided by D", _blocks(scale=lambda q: q.shape[-1] ** -0.5),
            "The weights are too even: scores are divided by the root of D, not by D."),
        Misconception("values of the whole text", _blocks(values=lambda v, keys: v),
            "The weights of a block met the values of the whole text. Cut the values like the keys."),
        Misconception("joined along the batch", _blocks(join=0),
            "The blocks were joined along the batch, the axis that is taken where none is named. "
            "Tokens lie along the one before the last."),
        Misconception("the last block lost", _last_block_lost,
            "The tokens after the last whole block are missing. The last block may be shorter."),
        Misconception("no scale", _blocks(scale=lambda q: math.sqrt(q.shape[-1])),
            "The weights are too sharp: the scores were not divided by the root of D."),
    ),
    hints=(
        Hint("I do not know where to start",
             "W = 5, queries 12, 13, 14. Which is the first key that query 12 needs, and which the "
             "last that query 14 may see?"),
        Hint("Only some queries of a block are wrong",
             "Queries 12 to 14 need keys 8 to 14: seven keys. Query 12 sees 8 to 12, query 14 sees "
             "10 to 14. Positions of both decide."),
        Hint("I cannot put it together",
             "For each first query: rows up to the block's end, keys from first - W + 1 (not below "
             "0) to the last row; mask from these positions; softmax; join the looks."),
    ),
    praise="Work in proportion to T times W: what is far away is not even fetched.",
)


# ---------------------------------------------------------------- exercise: pattern_bytes


def _config(pattern, layers):
    return ModelConfig(dim=40, n_layers=layers, n_heads=12, n_kv_heads=3, head_dim=6,
                       hidden_dim=50, vocab_size=90, sliding_window=pattern)


def three_windows_and_one_without():
    return _config((None, 64, 64, 64), 8), 1000, 2


def a_text_shorter_than_one_window():
    return _config((20, None, 300), 6), 150, 4


def one_window_for_all():
    return _config(32, 5), 77, 2


def _pattern(slots, heads=lambda c: c.n_kv_heads, two=2, width=lambda c: c.head_dim,
             size=lambda b: b):
    def pattern_bytes(config, length, number_bytes):
        total = sum(slots(config.window(n), length) for n in range(config.n_layers))
        return two * total * heads(config) * width(config) * size(number_bytes)
    return pattern_bytes


def _least(w, n):
    return n if w is None else min(w, n)


def _run_pattern(work, config, length, number_bytes):
    """Of a comparison with None its kind counts, not which of the two came first."""
    try:
        return work(config, length, number_bytes)
    except TypeError as error:
        if "NoneType" in str(error):
            error.args = ("None cannot be compared with a number",)
        raise


def _from_a_real_cache(config, length, number_bytes):
    from minimistral.cache import KVCache

    dtype = {2: torch.bfloat16, 4: torch.float32}[number_bytes]
    return KVCache(config, max_length=length, device="meta", dtype=dtype).nbytes


def _entries(pattern):
    return pattern if isinstance(pattern, tuple) else (pattern,)


PATTERN_BYTES = Exercise(
    name="pattern_bytes", chapter=8, kind="open", entry="pattern_bytes",
    title="Which layers get a window", difficulty="medium", importance="useful", minutes=20,
    reference=_pattern(_least), run=_run_pattern,
    fixtures=(three_windows_and_one_without, a_text_shorter_than_one_window, one_window_for_all),
    equivalents={
        "a cache that is really made": _from_a_real_cache,
        "as a float": lambda config, length, number_bytes: float(
            _pattern(_least)(config, length, number_bytes)),
        "the pattern repeated by hand": lambda config, length, number_bytes: sum(
            2 * _least(w, length) * config.n_kv_heads * config.head_dim * number_bytes
            for w in _entries(config.sliding_window) * (
                config.n_layers // len(_entries(config.sliding_window)))),
    },
    misconceptions=(
        Misconception("windows ignored", _pattern(lambda w, n: n),
            "That is the cache without any window. A layer with a window keeps at most W tokens."),
        Misconception("the window also for a short text",
            _pattern(lambda w, n: n if w is None else w),
            "A text shorter than the window does not fill it. A layer keeps the smaller of the "
            "two."),
        Misconception("one window short", _pattern(lambda w, n: n if w is None else min(w - 1, n)),
            "One slot too few in the layers with a window: the ring keeps W keys."),
        Misconception("no window counted as nothing",
            _pattern(lambda w, n: 0 if w is None else min(w, n)),
            "Layers without a window keep the whole text; you counted nothing for them."),
        Misconception("the first layer for all",
            lambda config, length, number_bytes: _pattern(
                lambda w, n: _least(config.window(0), n))(config, length, number_bytes),
            "Every layer was counted like the first. The pattern is repeated over the layers."),
        Misconception("the pattern once", lambda config, length, number_bytes: sum(
                2 * _least(w, length) * config.n_kv_heads * config.head_dim * number_bytes
                for w in config.sliding_window),
            "The pattern was counted once. It is repeated until all layers have an entry."),
        Misconception("None compared", _pattern(min),
            "A layer without a window has None in place of a number, and None is neither less nor "
            "more. Such a layer keeps the whole text."),
        Misconception("one layer", lambda config, length, number_bytes: (
            2 * _least(config.window(0), length) * config.n_kv_heads * config.head_dim * number_bytes),
            "The first layer alone was counted. Add up what all layers keep."),
        Misconception("layers twice", lambda config, length, number_bytes: (
            config.n_layers * _pattern(_least)(config, length, number_bytes)),
            "The sum over the layers was taken once more for each layer. It holds all of them already."),
        Misconception("the model's width", _pattern(_least, heads=lambda c: 1, width=lambda c: c.dim),
            "A slot was given the width of the model. It holds the key/value heads, each as wide as a "
            "head."),
        Misconception("always four bytes", _pattern(_least, size=lambda b: 4),
            "Every number was given four bytes. How many it has is an argument."),
        Misconception("slots, not bytes", lambda config, length, number_bytes: sum(
            _least(config.window(n), length) for n in range(config.n_layers)),
            "These are the slots. Each holds a key and a value for every key/value head; bytes are "
            "asked for."),
        Misconception("keys only", _pattern(_least, two=1),
            "Half of it is missing: keys and values are kept."),
        Misconception("query heads", _pattern(_least, heads=lambda c: c.n_heads),
            "You counted query heads. Only the key/value heads are kept."),
        Misconception("one head", _pattern(_least, heads=lambda c: 1),
            "You counted one key/value head. Each of them has a key and a value in every slot."),
        Misconception("size of a head forgotten", _pattern(_least, width=lambda c: 1),
            "A key is not one number: it has as many as the head is wide."),
        Misconception("numbers, not bytes", _pattern(_least, size=lambda b: 1),
            "You counted numbers; each takes several bytes."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Pattern (None, 64, 64, 64), 8 layers, 1,000 tokens. How many tokens does each of the "
             "8 layers keep?"),
        Hint("It is too large or too small",
             "2 layers keep 1,000 tokens, 6 keep 64: 2,384 slots in all. Each slot is a key and a "
             "value for each key/value head."),
        Hint("I cannot put it together",
             "Sum over the layers: the smaller of length and the layer's window, or length where "
             "the window is None. Then times 2, key/value heads, head size, bytes."),
    ),
    praise="Now you can choose a pattern for the memory you have.",
)

EXERCISES = [WITHIN_WINDOW, WRITE, UPDATE, ATTENDED_PAIRS, CHUNK_IN_ORDER, RING_POSITIONS,
             LOOK_INTO_RING, LOOK_IN_BLOCKS, PATTERN_BYTES]
