# %% [markdown]
# # Exercises 7: Shared heads
#
# Seven exercises on chapter 7, about an hour and a quarter in all. The two core pieces, `repeat_heads`
# and `plain_attend`, are written inside the chapter itself; here you count, vary, repair and convert.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.
#
# H query heads, K key/value heads, n = H / K of the former share one of the latter; D numbers in a head.

# %%
import math
import textwrap

import torch

import minimistral as mm
from minimistral.attention import attend, causal, plain_attend, repeat_heads
from minimistral.course import check, hint, lines, progress, swap
from minimistral.course.chapters import ch07_shared_heads as ch07

model = mm.load_model("tales-dense")
tokenizer = mm.load_tokenizer("tales-dense")
prompt = tokenizer.encode("The golden ring\n", bos=True)

# %% [markdown]
# ## Exercise 1: the bytes of a cache
#
# Difficulty: easy · importance: essential · 5 minutes
#
# How many bytes do keys and values take, for a batch of `batch_size` texts of `length` tokens each, when a
# number takes `number_bytes` bytes? There is no window. Complete the two lines. `config` has the fields
# of the chapter: `dim`, `n_layers`, `n_heads`, `n_kv_heads`, `head_dim`.
#
# Example: Mistral 7B, one text of 32,768 tokens, 2 bytes: 4,294,967,296, which is 4 GiB.


# %%
def cache_bytes(config, length, batch_size, number_bytes):
    """Bytes of all keys and values of a batch."""
    ### BEGIN SOLUTION
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim  # numbers
    return per_token * length * batch_size * number_bytes
    ### STUB
    # per_token = ...     # numbers that one token leaves behind
    # return ...
    ### END SOLUTION


check("cache_bytes", cache_bytes)

# %% [markdown] tags=["solution"]
# Seven factors. `dim` and `n_heads` are not among them: queries are used once and forgotten, and the
# size of a head need not be dim over H.

# %% [markdown]
# ## Exercise 2: one step with a cache and groups
#
# Difficulty: easy · importance: essential · 6 minutes
#
# These are the lines of an attention layer with a cache and shared heads, shuffled. They take one chunk of
# tokens, `x`, at `positions`, to its output; `angles` are those of the positions. One line is
# a mistake and stays out. Type the letters in order, with blanks between them.

# %%
lines("grouped_in_order")

# %%
### BEGIN SOLUTION
order = "D A E C B H F"
### STUB
# order = "..."
### END SOLUTION
check("grouped_in_order", order)

# %% [markdown] tags=["solution"]
# Project, rotate, keep, repeat, look, project back. Keys are rotated **before** they are kept, each once, at
# its own position. They are repeated **after** they were kept, so that the cache holds K heads. (The line
# for the queries may stand anywhere before the look.)

# %% [markdown]
# ## Exercise 3: every test passes and the model writes nonsense
#
# Difficulty: medium · importance: essential · 8 minutes
#
# Find the bug. This function repeats each key/value head n times: x of shape (B, S, K, D) becomes (B, S, K · n,
# D), and head h of the result must be head h // n of x. It was tested with K = 1 and with n = 1,
# and passed. The next cell lets the shipped model write with it. Only the line that makes `wide` has to be
# repaired.


# %%
def spread_heads(x, n):
    """Each key/value head n times, copies side by side. x: (B, S, K, D)"""
    B, S, K, D = x.shape
    ### BEGIN SOLUTION
    wide = x[:, :, :, None].expand(B, S, K, n, D)         # was (B, S, n, K, D)
    ### STUB
    # wide = x[:, :, None].expand(B, S, n, K, D)
    ### END SOLUTION
    return wide.reshape(B, S, K * n, D)


# %%
for K, n in ((1, 4), (4, 1), (2, 2)):
    heads = torch.arange(K).view(1, 1, K, 1)              # labels
    print(f"K = {K}, n = {n}:", spread_heads(heads, n).flatten().tolist())
with swap("attention.repeat_heads", spread_heads):
    new = mm.generate(model, prompt, 30, stop_ids=(tokenizer.eos_id,))
print(textwrap.fill(tokenizer.decode(new), 84))

# %%
check("spread_heads", spread_heads)

# %% [markdown] tags=["solution"]
# Joining two axes runs through the last one first. From (n, K) that gives 0 1 0 1, from (K, n) 0 0 1 1. With
# K = 1 or n = 1 both are the same, which is why the tests passed.

# %% [markdown]
# ## Exercise 4: a grouped look without copies
#
# Difficulty: hard · importance: useful · 15 minutes
#
# Repeating is slow: every cached key is copied n times for each new token. Write the same look without
# copies. q is (B, T, H, D), k and v are (B, S, K, D), mask is boolean, (T, S) or (B, T, S), True = may
# attend, and every query may see something. The result is (B, T, H, D).
#
# The check looks at what your products read, and refuses anything as large as repeated keys. Beware of
# `@`, which copies what it broadcasts. Two ways work: einsum over groups, or the heads of a group as
# further rows of queries.


# %%
def attend_without_copies(q, k, v, mask):
    """plain_attend, with every key and value stored once."""
    ### BEGIN SOLUTION
    groups = q.unflatten(2, (k.shape[2], -1))             # (B, T, K, n, D)
    scores = torch.einsum("btkgd,bskd->bkgts", groups, k) / math.sqrt(q.shape[-1])
    hidden = ~mask[..., None, None, :, :]                 # the same for all heads
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3)
    ### END SOLUTION


check("attend_without_copies", attend_without_copies)

# %% [markdown] tags=["solution"]
# For the shared keys, the n heads of a group are simply more queries. The mask needs two new axes, one for the
# groups and one for their members, in front of its last two.

# %% [markdown]
# The shipped model writes with it. If it is exact, nobody can tell from the tale.

# %%
try:
    with swap("attention.plain_attend", attend_without_copies):
        new = mm.generate(model, prompt, 60, stop_ids=(tokenizer.eos_id,))
    assert new == mm.generate(model, prompt, 60, stop_ids=(tokenizer.eos_id,))
    print(textwrap.fill(tokenizer.decode(new), 84))
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 5: a cache that shares nothing
#
# Difficulty: medium · importance: essential · 8 minutes
#
# Find the bug. This look keeps the keys and values of every token in a list of pairs, `kept`, and gives the
# right looks. Yet it saves nothing. The next cell counts what is kept for each token. Repair it, so that a
# token leaves 2 · K · D numbers, in pairs (k, v) as before.


# %%
def look_and_keep(q, k, v, kept):
    """A look of new tokens at themselves and all kept ones; extends the list.

    q: (B, T, H, D), k and v: (B, T, K, D), kept: list of pairs -> (B, T, H, D)
    """
    n = q.shape[2] // k.shape[2]
    ### BEGIN SOLUTION
    kept.append((k, v))                                   # K heads
    keys, values = (torch.cat(parts, dim=1) for parts in zip(*kept))
    keys, values = repeat_heads(keys, n), repeat_heads(values, n)  # only now
    ### STUB
    # k, v = repeat_heads(k, n), repeat_heads(v, n)
    # kept.append((k, v))
    # keys, values = (torch.cat(parts, dim=1) for parts in zip(*kept))
    ### END SOLUTION
    S = keys.shape[1]
    mask = causal(torch.arange(S - q.shape[1], S), torch.arange(S))
    return attend(q, keys, values, mask)


# %%
chance = torch.Generator().manual_seed(5)
q = torch.randn(1, 4, 12, 6, generator=chance)
k, v = torch.randn(2, 1, 4, 3, 6, generator=chance)       # H = 12, K = 3, D = 6
kept = []
for t in range(4):                                        # token by token
    look_and_keep(q[:, t:t + 1], k[:, t:t + 1], v[:, t:t + 1], kept)
numbers = sum(x.numel() for pair in kept for x in pair)
print(f"kept for each token: {numbers // 4} numbers; 2 * K * D is {2 * 3 * 6}")

# %%
check("look_and_keep", look_and_keep)

# %% [markdown] tags=["solution"]
# Keep first, repeat afterwards. No test of the looks can find this bug; only counting can.

# %% [markdown]
# ## Exercise 6: a checkpoint from another world
#
# Difficulty: hard · importance: useful · 15 minutes
#
# Another library repeats its heads in turn: query head h reads key/value head h **%** K. Its checkpoints run in
# ours once the query heads stand in another order, so that head h reads h // n. Keys and values stay.
# `wq` is (H · D, dim), head h in rows h · D to (h + 1) · D - 1; `wo` is (dim, H · D), head h in the columns of
# the same numbers. Return both as a pair. Heads of one group keep their order.
#
# Example: H = 4, K = 2. Old heads 0 and 2 read key/value head 0, so the new order is 0, 2, 1, 3.


# %%
def reorder_queries(wq, wo, n_heads, n_kv_heads):
    """wq: (H * D, dim), wo: (dim, H * D) -> both, query heads in our order"""
    ### BEGIN SOLUTION
    table = torch.arange(n_heads).view(-1, n_kv_heads)    # (n, K), column h % K
    order = table.T.flatten()                             # read down the columns
    new_q = wq.unflatten(0, (n_heads, -1))[order].flatten(0, 1)
    new_o = wo.unflatten(1, (n_heads, -1))[:, order].flatten(1)
    return new_q, new_o
    ### END SOLUTION


check("reorder_queries", reorder_queries)

# %% [markdown] tags=["solution"]
# Neither order is better; a model trained with one needs that one. A head is its query rows and its output
# columns: move both, and the sum over heads does not change.

# %% [markdown]
# A proof with random weights: the other library's look, and ours after the conversion.

# %%
try:
    x = torch.randn(2, 5, 10, generator=chance)           # (B, T, dim)
    wq, wo = (torch.randn(s, generator=chance) for s in ((72, 10), (10, 72)))
    k, v = torch.randn(2, 2, 5, 3, 6, generator=chance)   # H = 12, K = 3, D = 6
    mask = causal(torch.arange(5), torch.arange(5))
    theirs = attend((x @ wq.T).unflatten(-1, (12, 6)), k.repeat(1, 1, 4, 1),
                    v.repeat(1, 1, 4, 1), mask).flatten(-2) @ wo.T
    new_q, new_o = reorder_queries(wq, wo, 12, 3)
    ours = plain_attend((x @ new_q.T).unflatten(-1, (12, 6)), k, v, mask)
    ours = ours.flatten(-2) @ new_o.T
    print("the same output:", torch.allclose(theirs, ours, atol=1e-4))
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 7: turn many heads into few
#
# Difficulty: medium · importance: useful · 20 minutes
#
# An open task. First a function: `weight` is the matrix of the keys or of the values, (K · D, dim), head k in
# rows k · D to (k + 1) · D - 1. Return a matrix with `new` heads, (new · D, dim), each the average of the K / new heads
# of its group. Neighbours form a group. `new` divides K.
#
# Example: six heads into two: the average of heads 0, 1, 2, then that of 3, 4, 5.


# %%
def pool_heads(weight, n_kv_heads, new):
    """Average the key/value heads of each group. (K * D, dim) -> (new * D, dim)"""
    ### BEGIN SOLUTION
    groups = weight.unflatten(0, (new, n_kv_heads // new, -1))
    return groups.mean(dim=1).flatten(0, 1)               # over the members
    ### END SOLUTION


check("pool_heads", pool_heads)

# %% [markdown]
# Then use it. The shipped model has two key/value heads; with your function it gets one. How much does it
# lose? Is it the keys or the values that cannot be shared so easily? Write down what you expect. Then let
# only the keys be averaged, give both heads the first one's values, or train the result for a few steps with
# `ladder.fit`, as the chapter does.

# %%
try:
    state = model.state_dict()
    before = ch07.nats_per_byte(model)
    for kinds in (("wk",), ("wv",), ("wk", "wv")):
        changed = dict(state)
        for name in state:
            if name.split(".")[-2] in kinds:              # the average, for both
                changed[name] = pool_heads(state[name], 2, 1).repeat(2, 1)
        other = mm.Transformer(model.config)
        other.load_state_dict(changed)
        after = ch07.nats_per_byte(other)
        print(f"shared {' and '.join(kinds):9} {after:.3f}, it was {before:.3f}")
except NotImplementedError:
    print("not written yet")

# %% [markdown] tags=["solution"]
# What you see is true of this one model. Before you say that keys, or values, are harder to share, try other
# layers one at a time, and a model trained with another seed: two heads have no reason to be alike, and how
# unlike they are is an accident of training.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
