# %% [markdown]
# # Exercises 3: Positions
#
# Seven exercises on chapter 3, a good hour in all. The two core pieces, `rotary_angles` and `rotate`, are
# written inside the chapter itself; here you vary, repair and use what you built.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.

# %%
import math
import textwrap

import torch

import minimistral as mm
from minimistral.course import check, hint, lines, progress, swap
from minimistral.course.chapters import ch03_positions as ch03
from minimistral.rope import rotary_angles, rotate

# %% [markdown]
# ## Exercise 1: how long is a turn?
#
# Difficulty: easy · importance: useful · 5 minutes
#
# Pair $i$ of a head turns by $\theta^{-2i/D}$ radians for each token. After how many tokens has it made
# one whole turn? Complete the two lines: one number for each pair, pair 0 first, D/2 in all, not rounded.
# For D = 8 and theta = 10,000 the result begins with 6.28 and 62.8.


# %%
def tokens_per_turn(head_dim, theta):
    """How many tokens each pair needs for one turn. -> (D/2,)"""
    ### BEGIN SOLUTION
    speeds = theta ** (-torch.arange(0, head_dim, 2) / head_dim)  # radians a token
    return 2 * math.pi / speeds
    ### STUB
    # speeds = ...
    # return ...
    ### END SOLUTION


check("tokens_per_turn", tokens_per_turn)

# %% [markdown] tags=["solution"]
# `arange(0, head_dim, 2)` is 0, 2, 4, ..., which is $2i$ already. A whole turn has $2\pi$ radians; at a
# speed of 0.01 radians a token that takes 628 tokens.

# %% [markdown]
# What does it say about the shipped model, trained on rows of 200 tokens, and about the first Mistral
# 7B, made for texts of 8,192? A pair whose turn is longer than the text gives every distance an angle
# of its own.

# %%
model = mm.load_model("tales-dense")
configs = {"tales-dense": (model.config, 200),
           "mistral-7b-v0.1": (mm.MODELS["mistral-7b-v0.1"], 8_192)}
for name, (config, text) in configs.items():
    turns = tokens_per_turn(config.head_dim, config.rope_theta)
    if turns is ...:
        print("not written yet")
        break
    slow = sum(turn > text for turn in turns)
    print(f"{name}: {slow} of {len(turns)} pairs need more than {text} tokens")

# %% [markdown]
# ## Exercise 2: where the turn belongs
#
# Difficulty: easy · importance: essential · 5 minutes
#
# These are the lines of an attention layer with positions, shuffled. `x` has shape (B, T, dim), `wq`,
# `wk`, `wv` and `wo` are linear layers, `positions` has shape (T,). Two lines stay out. Type the letters
# in order, with blanks between them.

# %%
lines("heads_with_positions")

# %%
### BEGIN SOLUTION
order = "H G B C A E"
### STUB
# order = "..."
### END SOLUTION
check("heads_with_positions", order)

# %% [markdown] tags=["solution"]
# Project, angles, turn, mask, look, project back. The two lines that stay out turn the values and the
# tokens themselves. A score needs positions; what is handed over does not.

# %% [markdown]
# ## Exercise 3: the same with complex numbers
#
# Difficulty: medium · importance: useful · 10 minutes
#
# Mistral's own inference code treats every pair (a, b) as one complex number a + bi. Multiplying it by a
# complex number of size 1 and angle φ turns it by φ, so the four products become one. Write the whole
# rotation that way.
#
# `x` has shape (B, T, H, D), in float32, `positions` (T,), whole numbers in any order. Return a tensor of
# the shape of `x`; neighbours are a pair, pair i turns by $\theta^{-2i/D}$ for each place. Useful:
# `torch.polar(size, angle)`, which wants two tensors, `torch.view_as_complex`, which wants a last axis of
# size 2, and `torch.view_as_real`.


# %%
def turn_complex(x, positions, theta):
    """Rotary positions by complex numbers. x: (B, T, H, D), positions: (T,)"""
    ### BEGIN SOLUTION
    D = x.shape[-1]
    angles = positions[:, None] * theta ** (-torch.arange(0, D, 2) / D)  # (T, D/2)
    turns = torch.polar(torch.ones_like(angles), angles)  # size 1, complex
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2)
    ### END SOLUTION


check("turn_complex", turn_complex)

# %% [markdown] tags=["solution"]
# `unsqueeze(-2)` gives the factors an axis of size 1 for the heads: (T, 1, D/2) fits (B, T, H, D/2).
# `view_as_complex` wants the two parts side by side in memory, hence `contiguous`.

# %% [markdown]
# Let the shipped model write with it. The library calls `rotate` with cosines and sines, so we hand it
# your product at the place where the angles are known.

# %%
tokenizer = mm.load_tokenizer("tales-dense")
prompt = tokenizer.encode("The golden ring\n", bos=True)


def places_as_angles(positions, head_dim, theta):
    return positions, positions                           # rotate gets the places


def by_complex(x, cos, sin):
    """`cos` holds positions here: (T,) or, with a cache, (B, T)."""
    return turn_complex(x, cos.reshape(-1, x.shape[1])[0], model.config.rope_theta)


# %%
try:
    with swap({"rope.rotary_angles": places_as_angles, "rope.rotate": by_complex}):
        new = mm.generate(model, prompt, 60, stop_ids=(tokenizer.eos_id,))
    assert new == mm.generate(model, prompt, 60, stop_ids=(tokenizer.eos_id,))
    print(textwrap.fill(tokenizer.decode(new), 84))
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 4: move keys that are turned already
#
# Difficulty: medium · importance: useful · 10 minutes
#
# A program keeps the turned keys of a long text. Then 50 tokens are cut from its beginning, so every key
# should stand 50 places earlier. Must they be computed again? They need not: turns add up.
#
# `keys` has shape (B, S, H, D) and was turned by positions that you are not told. Return the keys as if
# each had stood `steps` places later. `steps` is one whole number; it may be negative (then earlier) or
# 0 (then nothing changes). You may use the library's two functions.


# %%
def move_keys(keys, steps, theta):
    """Turned keys, moved by some places. keys: (B, S, H, D) -> (B, S, H, D)"""
    ### BEGIN SOLUTION
    angles = rotary_angles(torch.tensor([steps]), keys.shape[-1], theta)
    return rotate(keys, *angles)                          # the same for every key
    ### END SOLUTION


check("move_keys", move_keys)

# %% [markdown] tags=["solution"]
# A key at place s was turned by $s\,\omega$; turning it by $\text{steps} \cdot \omega$ more makes
# $(s + \text{steps})\,\omega$. So one row of cosines and sines serves all keys. With a table of learned
# places this would not be possible.

# %% [markdown]
# Does it agree with turning from scratch?

# %%
chance = torch.Generator().manual_seed(4)
plain = torch.randn(2, 9, 3, 8, generator=chance)         # keys before any turn
then, now = (rotate(plain, *rotary_angles(torch.arange(9) + start, 8, 10_000))
             for start in (50, 0))
try:
    moved = move_keys(then, -50, 10_000)
    print("largest difference:", round((moved - now).abs().max().item(), 3))
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 5: the arrows that change their length
#
# Difficulty: medium · importance: essential · 8 minutes
#
# Find the bug. This rotation of one head runs, its shape is right, and at position 0 its numbers are
# right, too. The cell after it prints the lengths of the arrows before and after the turn. Run it, then
# repair one line. `x` must stay as it is.


# %%
def turn_pairs(x, cos, sin):
    """One head. x: (..., T, D), cos and sin: (T, D/2) -> (..., T, D)"""
    ### BEGIN SOLUTION
    turned = x.clone()
    turned[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    turned[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos  # read turned
    return turned
    ### STUB
    # turned = x.clone()
    # turned[..., 0::2] = turned[..., 0::2] * cos - turned[..., 1::2] * sin
    # turned[..., 1::2] = turned[..., 0::2] * sin + turned[..., 1::2] * cos
    # return turned
    ### END SOLUTION


# %%
x = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])  # (T, D), D = 2
turned = turn_pairs(x, *rotary_angles(torch.arange(4), 2, 10_000))
for place in range(4):
    print(f"place {place}: {[round(n, 2) for n in turned[place].tolist()]}, length "
          f"{x[place].norm():.2f} became {turned[place].norm():.2f}")

# %%
check("turn_pairs", turn_pairs)

# %% [markdown] tags=["solution"]
# When the third line read `turned`, its even places held new numbers already. Both lines must read the
# old ones; `x` still has them. At position 0 the fault is invisible, because there nothing is turned.

# %% [markdown]
# ## Exercise 6: weights from the other library
#
# Difficulty: hard · importance: useful · 15 minutes
#
# A file of Hugging Face's layout pairs row i of a head with row i + D/2. Our `rotate` pairs rows 2i and
# 2i + 1. *Further* in the chapter went from ours to theirs; write the way back.
#
# `weight` has shape (n_heads · D, dim): the rows of head 0, then those of head 1, and so on. Return a
# tensor of the same shape in which, within each head, the old rows 0, D/2, 1, D/2 + 1, ... follow each
# other. For D = 8 that is 0, 4, 1, 5, 2, 6, 3, 7.


# %%
def to_neighbours(weight, n_heads):
    """Rows of wq or wk from halves to neighbours. (n_heads * D, dim), same shape"""
    ### BEGIN SOLUTION
    halves = weight.unflatten(0, (n_heads, 2, -1))        # (H, 2, D/2, dim)
    return halves.transpose(1, 2).reshape(weight.shape)
    ### END SOLUTION


check("to_neighbours", to_neighbours)

# %% [markdown] tags=["solution"]
# Within a head the rows are two halves of D/2 rows: the axes (2, D/2). Swapping them puts the two rows
# of a pair side by side. Cutting without swapping would change nothing.

# %% [markdown]
# Now use it. `stranger` is the shipped model as a file of the other layout would bring it. It loads
# without an error. What does it write, before and after your function has seen its weights?

# %%
stranger = ch03.in_other_layout(model)


def write(some_model):
    new = mm.generate(some_model, prompt, 40, stop_ids=(tokenizer.eos_id,))
    return textwrap.fill(tokenizer.decode(new), 76)


# %%
config, before = stranger.config, write(stranger)
try:
    for layer in stranger.layers:
        wq, wk = layer.attention.wq.weight, layer.attention.wk.weight
        wq.data = to_neighbours(wq.data, config.n_heads)
        wk.data = to_neighbours(wk.data, config.n_kv_heads)
    print("before:", before)
    print("after: ", write(stranger))
    assert write(stranger) == write(model) != before
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 7: which speeds does the model use?
#
# Difficulty: hard · importance: useful · 20 minutes
#
# First write the measurement: what is the loss of a model when some of its pairs **stand
# still**, that is, turn by angle 0 at every place, in all heads and layers? `rows` are token ids of shape
# (R, T + 1); `pairs` is a list of pair numbers, 0 the fastest. Return the mean loss in nats per token,
# one number; `ch03.loss_of(model, rows)` measures it. Within `with swap("rope.rotary_angles", yours):`
# the model uses your function for its angles. It gets the library's arguments by name: `positions`,
# `head_dim`, `theta`. Give it another name, so that it can call `rotary_angles` itself.


# %%
def loss_without_turning(model, rows, pairs):
    """The loss in nats per token when these pairs stand still. -> one number"""
    ### BEGIN SOLUTION
    def angles(positions, head_dim, theta):
        cos, sin = rotary_angles(positions, head_dim, theta)
        cos[..., pairs], sin[..., pairs] = 1.0, 0.0       # angle 0
        return cos, sin

    with swap("rope.rotary_angles", angles):
        return ch03.loss_of(model, rows).item()
    ### END SOLUTION


check("loss_without_turning", loss_without_turning)

# %% [markdown]
# Then use it. The shipped model has 16 pairs in each head. Which group matters most: the fast, the middle
# or the slow ones? Does any single pair matter much? Is it the same in texts of 50 tokens? Write down
# what you expect, and measure.

# %%
rows = ch03.long_rows(tokenizer, 200, 4)                  # tales, (4, 201)
groups = {"none": [], "pairs 0 to 3": range(4), "pairs 4 to 7": range(4, 8),
          "pairs 8 to 15": range(8, 16), "all": range(16)}
try:
    for name, group in groups.items():
        loss = loss_without_turning(model, rows, list(group))
        print(f"standing still: {name:14} loss {float(loss):.2f}")
except NotImplementedError:
    print("not written yet")

# %% [markdown] tags=["solution"]
# What you find holds for this model and for texts of this length. The slow pairs hardly turn within 200
# tokens, so stopping them changes little here; in a model for long texts that may be otherwise. And a
# pair that costs nothing alone may be one of several that can stand in for each other: stop them together
# before you call them idle.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
