# %% [markdown]
# # Exercises 2: Attention
#
# Eight exercises on chapter 2, about an hour and a half in all. The two core pieces, `causal` and
# `attend`, are written inside the chapter itself; here you vary, repair and use what you built.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.

# %%
import copy
import math
import textwrap

import torch

import minimistral as mm
from minimistral.attention import attend, causal
from minimistral.course import check, hint, lines, progress, swap
from minimistral.course.chapters import ch02_attention as ch02

# %% [markdown]
# ## Exercise 1: a softmax for large scores
#
# Difficulty: easy · importance: essential · 5 minutes
#
# With the plain formula, scores near 100 give infinity over infinity. Softmax does not change when one
# number is subtracted from a whole row. Complete the two lines, so that no score is too large. Rows
# may hold minus infinity (a hidden key), but every row has at least one ordinary score.


# %%
def stable_softmax(scores):
    """Softmax along the last axis, for scores of any size. (..., S) -> (..., S)"""
    ### BEGIN SOLUTION
    shifted = scores - scores.amax(dim=-1, keepdim=True)  # the largest becomes 0
    powers = shifted.exp()                                # none above 1
    ### STUB
    # shifted = ...
    # powers = ...
    ### END SOLUTION
    return powers / powers.sum(dim=-1, keepdim=True)


check("stable_softmax", stable_softmax)

# %% [markdown] tags=["solution"]
# After the shift the largest exponent is 0, so the largest power is 1 and the sum is at least 1:
# nothing overflows, and the division is safe. Each row is shifted by its **own** maximum; with one
# maximum for all rows, a row of small scores would become 0/0.

# %% [markdown]
# ## Exercise 2: one head, line by line
#
# Difficulty: easy · importance: essential · 5 minutes
#
# These are the lines of one head, shuffled. `x` has shape (T, dim), the head has `head_dim` numbers,
# and `mask` is True where a query may attend. One line is a mistake and stays out. Type the letters in
# order, with blanks between them.

# %%
lines("one_head_in_order")

# %%
### BEGIN SOLUTION
order = "B C E F G D"
### STUB
# order = "..."
### END SOLUTION
check("one_head_in_order", order)

# %% [markdown] tags=["solution"]
# Project, score, hide, softmax, mix, project back. The line that stays out divides by the root of `dim`,
# the width of `x`. A score is a sum of `head_dim` products, and its size grows with the root of that.

# %% [markdown]
# ## Exercise 3: how many keys does a query look at?
#
# Difficulty: medium · importance: useful · 8 minutes
#
# A row of weights may rest on one key or spread over many. One number says which: the exponential of the
# entropy, $e^{-\sum_s w_s \ln w_s}$. It is 1 when one key has all the weight, and 4 when four keys have
# a quarter each. Weights may be exactly 0; such a key adds nothing.


# %%
def effective_keys(weights):
    """The exponential of each row's entropy. (..., T, S) -> (..., T)"""
    ### BEGIN SOLUTION
    nats = -torch.special.xlogy(weights, weights).sum(dim=-1)  # 0 log 0 counts as 0
    return nats.exp()
    ### END SOLUTION


check("effective_keys", effective_keys)

# %% [markdown] tags=["solution"]
# `xlogy(w, w)` is $w \ln w$ with 0 for $w = 0$. In plain PyTorch 0 · log 0 is 0 · (-inf), which is not a
# number, and one hidden key would spoil its whole row.

# %% [markdown]
# Your function can say something about the shipped model at once: how wide does each head look, on
# average, while it reads a tale?

# %%
model = mm.load_model("tales-dense")
tokenizer = mm.load_tokenizer("tales-dense")
TALE = """The golden ring
One morning Anna found a golden ring in the mill. Leo was at the lake. \
Anna went to the lake and saw Leo there. Anna gave the ring to Leo. \
The sun was shining. Now"""
ids = torch.tensor(tokenizer.encode(TALE, bos=True))

try:
    maps = ch02.attention_maps(model, ids)                # (L, H, T, S)
    for layer, widths in enumerate(effective_keys(maps).mean(-1).tolist()):
        print("layer", layer, " keys:", [round(width, 1) for width in widths])
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 4: a look that never holds all the keys
#
# Difficulty: hard · importance: useful · 15 minutes
#
# A text of a million tokens has a million keys. Suppose they come in pieces and you may look at one
# piece at a time, and only once. Can you still compute the exact look of a query? Softmax is one sum
# divided by another, so carry the two sums along, and take care of the maximum.
#
# `pieces` is a list of pairs (k, v), each of shape (n, H, D), with another n every time. Go through it
# once. The scores are divided by the root of D, as always; they may be large, or far below zero.


# %%
def attend_in_pieces(q, pieces):
    """One query per head looks at keys that come in pieces. q: (H, D) -> (H, D)"""
    ### BEGIN SOLUTION
    best = torch.full(q.shape[:1], -1e30)                 # (H,), largest so far
    total, mixed = torch.zeros(q.shape[:1]), torch.zeros(q.shape)
    for k, v in pieces:
        scores = torch.einsum("hd,nhd->hn", q, k) / math.sqrt(q.shape[-1])
        new = torch.maximum(best, scores.amax(dim=-1))    # (H,)
        shrink = (best - new).exp()                       # old sums, new maximum
        powers = (scores - new[:, None]).exp()            # (H, n)
        total = total * shrink + powers.sum(dim=-1)
        mixed = mixed * shrink[:, None] + torch.einsum("hn,nhd->hd", powers, v)
        best = new
    return mixed / total[:, None]
    ### END SOLUTION


check("attend_in_pieces", attend_in_pieces)

# %% [markdown] tags=["solution"]
# Everything gathered so far was measured against the old maximum. When the maximum rises from `best` to
# `new`, both sums shrink by $e^{best - new}$. The result is exact, not an approximation: this is how
# FlashAttention never stores the table of T × S weights.

# %% [markdown]
# Let the shipped model write with it. Each query gets the keys it may see in pieces of seven; if your
# function is exact, nobody can tell from the tale.

# %%
def attend_by_sevens(q, k, v, mask):
    """One text: q (1, T, H, D), k and v (1, S, H, D), mask (T, S) or (1, T, S)"""
    rows = []
    for t, seen in enumerate(mask.reshape(-1, k.shape[1])):   # one query at a time
        parts = zip(k[0, seen].split(7), v[0, seen].split(7))
        rows.append(attend_in_pieces(q[0, t], list(parts)))
    return torch.stack(rows)[None]


# %%
prompt = tokenizer.encode("The golden ring\n", bos=True)
try:
    with swap("attention.attend", attend_by_sevens):
        new = mm.generate(model, prompt, 60, stop_ids=(tokenizer.eos_id,))
    assert new == mm.generate(model, prompt, 60, stop_ids=(tokenizer.eos_id,))
    print(textwrap.fill(tokenizer.decode(new), 84))
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 5: the mask is right and yet it leaks
#
# Difficulty: medium · importance: essential · 8 minutes
#
# Find the bug. This look of one head has a mask, and the mask is right. The next cell changes the last
# token and prints how much each look moves: a causal model must show zeros everywhere but at the end.
# Run it, then repair one line.


# %%
def look(q, k, v, mask):
    """One head. q: (T, D), k and v: (S, D), mask: (T, S), True = may attend"""
    ### BEGIN SOLUTION
    scores = q @ k.T / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)                      # was dim=0
    return weights @ v
    ### STUB
    # scores = q @ k.T / math.sqrt(q.shape[-1])
    # scores = scores.masked_fill(~mask, -torch.inf)
    # weights = scores.softmax(dim=0)
    # return weights @ v
    ### END SOLUTION


# %%
chance = torch.Generator().manual_seed(5)
q, k, v = torch.randn(3, 6, 4, generator=chance)
mask = causal(torch.arange(6), torch.arange(6))
moved = q.clone()
moved[-1] += 2.0                                          # another last query
difference = (look(moved, k, v, mask) - look(q, k, v, mask)).abs().amax(dim=-1)
print("how far each look moves:", [round(d, 3) for d in difference.tolist()])

# %%
check("look", look)

# %% [markdown] tags=["solution"]
# With `dim=0` the softmax runs down a column: all queries that look at one key share a single 1. The
# last query then takes from the earlier ones, although no earlier query can see the last key. The mask
# decides who sees what; the softmax must stay within one query as well.

# %% [markdown]
# ## Exercise 6: two slips in many heads
#
# Difficulty: hard · importance: essential · 12 minutes
#
# Find the bugs. This is a whole attention with many heads; it runs, and the shape is right. Two lines are
# wrong. One lets tokens meet that must not meet, and the cell after it shows that. The other makes every
# look too even; only its numbers tell.


# %%
def multi_head(x, wq, wk, wv, wo, n_heads):
    """x: (B, T, dim), wq, wk, wv: (dim, H * D), wo: (H * D, dim) -> (B, T, dim)"""
    ### BEGIN SOLUTION
    B, T, dim = x.shape
    q, k, v = ((x @ w).unflatten(-1, (n_heads, -1)).transpose(1, 2)
               for w in (wq, wk, wv))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # was dim
    mask = causal(torch.arange(T), torch.arange(T))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    looks = weights @ v                                   # (B, H, T, D)
    return looks.transpose(1, 2).reshape(B, T, -1) @ wo   # was not swapped
    ### STUB
    # B, T, dim = x.shape
    # q, k, v = ((x @ w).unflatten(-1, (n_heads, -1)).transpose(1, 2)
    #            for w in (wq, wk, wv))
    # scores = q @ k.transpose(-2, -1) / math.sqrt(dim)
    # mask = causal(torch.arange(T), torch.arange(T))
    # weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    # looks = weights @ v                                 # (B, H, T, D)
    # return looks.reshape(B, T, -1) @ wo
    ### END SOLUTION


# %%
x = torch.randn(2, 5, 16, generator=chance)
wq, wk, wv = torch.randn(3, 16, 12, generator=chance) / 2
wo = torch.randn(12, 16, generator=chance) / 4
moved = x.clone()
moved[:, -1] += 2.0                                       # another last token
outputs = [multi_head(y, wq, wk, wv, wo, 3) for y in (x, moved)]
difference = (outputs[1] - outputs[0]).abs().amax(dim=(0, 2))
print("how far each output moves:", [round(d, 3) for d in difference.tolist()])

# %%
check("multi_head", multi_head)

# %% [markdown] tags=["solution"]
# The looks stand in memory head after head: (B, H, T, D). To join the heads of one token, swap the axes
# back first; reshaping alone cuts through the tokens. And the scale follows D, the last axis of q: a score
# sums over one head only.

# %% [markdown]
# ## Exercise 7: switch one head off
#
# Difficulty: medium · importance: essential · 10 minutes
#
# In the chapter we switched heads off inside the model and put them back. Write it as a function that
# leaves the model alone: it returns a **copy** in which one head adds nothing. Head h of a layer enters
# through columns h · D up to (h + 1) · D of `model.layers[layer].attention.wo.weight`, where D is
# `model.config.head_dim`. Layers and heads count from 0.


# %%
def switch_off(model, layer, head):
    """A copy of the model without one head; the model itself stays as it is."""
    ### BEGIN SOLUTION
    silent = copy.deepcopy(model)
    D = model.config.head_dim
    with torch.no_grad():
        silent.layers[layer].attention.wo.weight[:, head * D:(head + 1) * D] = 0
    return silent
    ### END SOLUTION


check("switch_off", switch_off)

# %% [markdown] tags=["solution"]
# `nn.Linear` stores its weight as (out, in), so a head's inputs are columns. Clearing its queries would
# not silence it: equal scores make an average of all values. Clearing its values would silence its
# neighbours, too, where heads share them (chapter 7).

# %% [markdown]
# What does the shipped model write when a whole layer has lost its heads?

# %%
try:
    silent = model
    for head in range(model.config.n_heads):
        silent = switch_off(silent, 0, head)
    new = mm.generate(silent, prompt, 40, stop_ids=(tokenizer.eos_id,))
    print(textwrap.fill(tokenizer.decode(new), 84))
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 8: which head carries the answer?
#
# Difficulty: medium · importance: useful · 20 minutes
#
# An open task. First write the measurement: by how much does the probability of `answer`, as the token
# after `ids`, fall when one head is off? A table with a row for each layer and a column for each head.
# `ids` is a tensor of shape (T,), `answer` is one token id.


# %%
@torch.no_grad()
def head_effects(model, ids, answer):
    """How much probability the answer loses without each head. -> (L, H)"""
    ### BEGIN SOLUTION
    def probability(some_model):
        return some_model(ids[None])[0, -1].softmax(dim=-1)[answer]

    whole = probability(model)
    rows = [[whole - probability(switch_off(model, layer, head))
             for head in range(model.config.n_heads)]
            for layer in range(model.config.n_layers)]
    return torch.tensor(rows)
    ### END SOLUTION


check("head_effects", head_effects)

# %% [markdown]
# Then use it. Which head matters most for the name after “Now”? Is it the same head in French? For the
# thing after “Now Leo has the”? For a tale in which the ring changed hands twice? Write down what you
# expect, measure, and look at the map of the head you found.

# %%
try:
    answer = tokenizer.encode(" Leo")[0]
    effects = head_effects(model, ids, answer)
    layer, head = divmod(effects.argmax().item(), model.config.n_heads)
    print(f"largest fall: layer {layer}, head {head}: {effects.max():.2f}")
except NotImplementedError:
    print("not written yet")

# %% [markdown] tags=["solution"]
# One tale is one observation. Before you call a head *the holder's head*, repeat the measurement on many
# tales, as the chapter does, and on tales in which the last name mentioned is **not** the holder: a
# head that copies the last name looks just as good on the easy ones.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
