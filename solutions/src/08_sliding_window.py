# %% [markdown]
# # Exercises 8: The sliding window
#
# Six exercises on chapter 8, about an hour in all. The three core pieces, `within_window`, `write` and
# `update`, are written inside the chapter itself; here you count, order, vary and repair.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.
#
# W, the window, is how many keys a query sees, its own included. A ring has W slots, and position p lies in
# slot p mod W; an empty slot has position -1.

# %%
import math
from dataclasses import replace

import torch

import minimistral as mm
from minimistral.attention import attend, may_attend
from minimistral.cache import KVCache
from minimistral.course import check, hint, lines, progress
from minimistral.course.chapters import ch08_sliding_window as ch08

# %% [markdown]
# ## Exercise 1: how many pairs are looked at
#
# Difficulty: easy · importance: essential · 6 minutes
#
# A text of `length` tokens, causal, with a window: how many pairs of query and key does one head look at? A
# query sees itself and at most `window` - 1 tokens before it. The text may be shorter than the window.
# Complete the two lines.
#
# Example: five tokens, window 3: 1 + 2 + 3 + 3 + 3 = 12.


# %%
def attended_pairs(length, window):
    """Pairs of a query and a key that it may see."""
    ### BEGIN SOLUTION
    w = min(length, window)               # queries that see 1, 2, 3 ... keys
    return w * (w + 1) // 2 + (length - w) * w
    ### STUB
    # w = ...             # how many queries see 1, 2, 3 ... keys
    # return ...
    ### END SOLUTION


check("attended_pairs", attended_pairs)

# %% [markdown] tags=["solution"]
# A triangle at the start, then W for each token. For long texts that is nearly length · W: linear, where without
# a window it is quadratic.

# %% [markdown]
# ## Exercise 2: a chunk and a ring
#
# Difficulty: easy · importance: essential · 6 minutes
#
# These lines take one chunk of tokens through a layer with a ring, shuffled and a little shortened. One line is a
# mistake and stays out. Type the letters in order, with blanks between them. Several orders are right.

# %%
lines("chunk_in_order")

# %%
### BEGIN SOLUTION
order = "D G B A E F"
### STUB
# order = "..."
### END SOLUTION
check("chunk_in_order", order)

# %% [markdown] tags=["solution"]
# Rotate, read keys and positions from the old ring, write, look. The angle belongs to the position: two tokens
# with the same slot, W apart, must not look the same.

# %% [markdown]
# ## Exercise 3: who lies in which slot
#
# Difficulty: medium · importance: useful · 10 minutes
#
# After `length` tokens, positions 0 to `length` - 1, went through a ring of `window` slots one by one: which
# position does each slot hold? Return an int64 tensor of shape (window,), -1 for an empty slot. `length` may
# be 0. A loop over the slots is fine; can you do without a loop over the tokens?
#
# Example: 7 tokens and 5 slots give `[5, 6, 2, 3, 4]`.


# %%
def ring_positions(length, window):
    """The position in each slot of a ring, -1 if empty. -> int64 (window,)"""
    ### BEGIN SOLUTION
    slots = torch.arange(window)
    newest = length - 1 - (length - 1 - slots) % window   # the last p of this slot
    return newest.clamp(min=-1)
    ### END SOLUTION


check("ring_positions", ring_positions)

# %% [markdown] tags=["solution"]
# Go back from the newest position to the last one with the right remainder. A slot that nobody reached comes out
# below zero, and `clamp` makes it -1. The library stores positions all the same: with chunks, padding and a
# batch of unequal rows, a stored position is right without any formula.

# %% [markdown]
# ## Exercise 4: right until the ring is full
#
# Difficulty: medium · importance: essential · 8 minutes
#
# Find the bug. One new token, already written into the ring, looks at what the ring holds. `ring` has `keys`,
# `values` (both (B, W, H, D)) and `positions` (B, W). The next cell compares it with a look at the last W
# keys: right for the first W tokens, wrong after that. Repair the mask. It must also hold for a second text,
# which begins at position 0 in a ring that nobody wiped.


# %%
def look_into_ring(q, ring, position, window):
    """q: (B, 1, H, D), the query at this position -> (B, 1, H, D)"""
    now = torch.tensor([[position]])                      # (1, T), T = 1
    ### BEGIN SOLUTION
    held = ring.positions                                 # (B, W)
    ### STUB
    # held = torch.arange(window)[None]
    ### END SOLUTION
    mask = may_attend(now, held, window)
    return attend(q, ring.keys, ring.values, mask)


# %%
chance = torch.Generator().manual_seed(4)
q, k, v = torch.randn(3, 1, 9, 2, 4, generator=chance)    # (B, T, H, D) each
ring = ch08.LayerCache((1, 4, 2, 4), True, None, torch.float32)
for p in range(9):
    ring.write(k[:, p:p + 1], v[:, p:p + 1], torch.tensor([[p]]))
    last = slice(max(0, p - 3), p + 1)
    all_of = torch.ones(1, min(p + 1, 4), dtype=torch.bool)
    right = attend(q[:, p:p + 1], k[:, last], v[:, last], all_of)
    ours = look_into_ring(q[:, p:p + 1], ring, p, 4)
    print(p, "right" if torch.allclose(right, ours, atol=1e-5) else "wrong")

# %%
check("look_into_ring", look_into_ring)

# %% [markdown] tags=["solution"]
# The number of a slot is not the position of its key. The first W tokens cannot show it, because there the two are
# equal: test a ring for three rounds and a second text.

# %% [markdown]
# ## Exercise 5: blocks of another size
#
# Difficulty: hard · importance: useful · 15 minutes
#
# The look of a whole text with a window, without the table of T × T scores: a block of queries at a time,
# each block with the keys that it needs. Choose another size of block than the chapter: three queries, whatever
# W is. `may_attend` is allowed; the check refuses blocks that fetch keys from far outside their windows. T may
# be smaller than W, and need not be a multiple of 3.
#
# Example: W = 5, queries 9, 10, 11 need the keys 5 to 11.


# %%
def look_in_blocks(q, k, v, window):
    """q, k, v: (..., T, D) -> (..., T, D), scores over the root of D"""
    ### BEGIN SOLUTION
    looks, T = [], q.shape[-2]
    for first in range(0, T, 3):
        rows = torch.arange(first, min(T, first + 3))
        keys = torch.arange(max(0, first - window + 1), int(rows[-1]) + 1)
        scores = q[..., rows, :] @ k[..., keys, :].transpose(-2, -1)
        scores = scores / math.sqrt(q.shape[-1])          # (..., 3, <= W + 2)
        hidden = ~may_attend(rows, keys, window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        looks.append(weights @ v[..., keys, :])
    return torch.cat(looks, dim=-2)
    ### END SOLUTION


check("look_in_blocks", look_in_blocks)

# %% [markdown] tags=["solution"]
# Any size of block gives the same looks, from one query (the repaired loop of the chapter) to all (the table).
# Positions of queries and keys decide the mask, so the arithmetic of the block's edge stays in one place.

# %% [markdown]
# ## Exercise 6: which layers get a window
#
# Difficulty: medium · importance: useful · 20 minutes
#
# An open task. First a function: the bytes of keys and values that a text of `length` tokens leaves in the cache
# of a model whose layers have different windows. `config.window(n)` is the window of layer n, or None for a
# layer that keeps everything. `config` has `n_layers`, `n_kv_heads` and `head_dim`. Count only slots that hold
# something.
#
# Example: 8 layers with windows None, 64, 64, 64, None, 64, 64, 64 and 1,000 tokens: 2 · 1,000 + 6 · 64
# = 2,384 slots, each with a key and a value for every key/value head.


# %%
def pattern_bytes(config, length, number_bytes):
    """Bytes of the cache of one text, for a model with a pattern of windows."""
    ### BEGIN SOLUTION
    slots = 0
    for layer in range(config.n_layers):
        window = config.window(layer)
        slots += length if window is None else min(window, length)
    return 2 * slots * config.n_kv_heads * config.head_dim * number_bytes
    ### END SOLUTION


check("pattern_bytes", pattern_bytes)

# %% [markdown]
# Then use it. The shipped model, not trained further, gets a window in some of its four layers. Which one or two
# layers need to see far? Write down what you expect; then try patterns of your own. For each: the bytes for
# 1,600 tokens, the loss on single tales, and the loss over the last 200 of 1,600 tokens, which no layer was
# trained for.

# %%
try:
    model = mm.load_model("tales-dense")
    tokenizer = mm.load_tokenizer("tales-dense")
    row = ch08.many_tales(tokenizer, 1, 1601)
    for pattern in ((None,), (None, 16, 16, 16), (16, 16, 16, None), (16,), (64,)):
        other = ch08.with_window(model, pattern)
        far = ch08.nats_by_place(other, row, tokenizer.eos_id, 200)[-1]
        size = pattern_bytes(other.config, 1600, 4)
        print(f"{str(pattern):22} {size:9,} bytes  tales "
              f"{ch08.nats_per_byte(other):.3f}  far {far:.2f}")
except NotImplementedError:
    print("not written yet")

# %% [markdown] tags=["solution"]
# Compare each pattern with 16 everywhere. One layer that sees everything helps on single tales. Far out it helps
# little, or does harm: there it meets distances that nobody trained it for. Ministral's pattern works on long
# texts because it was **trained** with it.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
