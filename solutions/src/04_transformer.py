# %% [markdown]
# # Exercises 4: The transformer
#
# Seven exercises on chapter 4, about an hour and a quarter in all. The three core pieces, `RMSNorm`,
# `SwiGLU` and the block, are written inside the chapter itself; here you vary, count, repair and take apart
# what you built.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.

# %%
import math

import torch
import torch.nn.functional as F
from torch import nn

import minimistral as mm
from minimistral.course import check, hint, ladder, lines, progress

# %% [markdown]
# ## Exercise 1: the older norm
#
# Difficulty: easy · importance: useful · 6 minutes
#
# Before RMSNorm there was LayerNorm. It first takes the token's **mean** away, then divides by the root of
# the mean square of what is left (plus `eps`, under the root), multiplies by `weight` and adds `bias`.
# The token (1, 3) becomes (−1, 1), for a weight of ones and a bias of zeros. Complete the two lines;
# `x` is (..., dim), and the mean of the squares divides by dim, not by dim − 1.


# %%
def layer_norm(x, weight, bias, eps=1e-5):
    """x: (..., dim), weight and bias: (dim,) -> (..., dim)"""
    ### BEGIN SOLUTION
    shifted = x - x.mean(dim=-1, keepdim=True)
    normed = shifted / (shifted.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    ### STUB
    # shifted = ...
    # normed = ...
    ### END SOLUTION
    return normed * weight + bias


check("layer_norm", layer_norm)

# %% [markdown] tags=["solution"]
# The mean and the bias are what RMSNorm leaves out. That saves two passes over the numbers, and models have
# been found to train about as well without them (Zhang and Sennrich, 2019).

# %% [markdown]
# ## Exercise 2: from ids to scores
#
# Difficulty: easy · importance: essential · 4 minutes
#
# These are the lines of a transformer and its loss, shuffled. One line is a mistake and stays out. Type the
# letters in order, with blanks between them.

# %%
lines("model_in_order")

# %%
### BEGIN SOLUTION
order = "E B G D A C"
### STUB
# order = "..."
### END SOLUTION
check("model_in_order", order)

# %% [markdown] tags=["solution"]
# Embed, angles, blocks, norm, output, loss. The line that stays out makes probabilities; `cross_entropy`
# does that itself, and a second softmax makes everything nearly even, so that the loss hardly falls.

# %% [markdown]
# ## Exercise 3: as wide as the budget allows
#
# Difficulty: medium · importance: essential · 12 minutes
#
# Sizes are often chosen backwards: so many parameters and no more. Given a configuration, find the
# **largest** `hidden_dim` with which the model has at most `budget` parameters; the configuration's own
# `hidden_dim` does not matter. Count everything: the tables (one if `config.tied_embeddings`, else
# two), four matrices of attention in each block (two have `n_kv_heads` heads), three of the feed-forward,
# and all norms. The answer is a whole number, and at least 1 fits.
#
# Example: dim 4, 1 block, 1 head of size 2, 10 tokens, two tables: 80 + 32 + 12 without feed-forward.
# With a budget of 150, 26 are left; each hidden number costs 12; so 2.


# %%
def widest_hidden(config, budget):
    """The largest hidden_dim for a model of at most `budget` parameters. -> int"""
    ### BEGIN SOLUTION
    tables = (1 if config.tied_embeddings else 2) * config.vocab_size * config.dim
    heads = 2 * config.n_heads + 2 * config.n_kv_heads
    attention = config.n_layers * config.dim * config.head_dim * heads
    norms = (2 * config.n_layers + 1) * config.dim
    left = budget - tables - attention - norms
    return left // (3 * config.dim * config.n_layers)
    ### END SOLUTION


check("widest_hidden", widest_hidden)

# %% [markdown] tags=["solution"]
# One hidden number costs a row of `w1`, a row of `w3` and a column of `w2`, in every block: 3 · dim · L.
# Divide what is left by that, and round down.

# %%
try:
    real = mm.MODELS["mistral-7b-v0.1"]
    print("Mistral 7B with 7 billion parameters and not one more: hidden",
          widest_hidden(real, 7_000_000_000), "instead of", real.hidden_dim)
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 4: a norm that sees the future
#
# Difficulty: medium · importance: essential · 8 minutes
#
# Find the bug. A colleague's model has a perfect mask, and its training loss is suspiciously low. This is its
# norm. The next cell moves the last token and prints how far each token's norm moves: there must be
# zeros everywhere but at the end. Run it, then repair one line.


# %%
def norm_tokens(x, weight):
    """x: (..., T, dim), weight: (dim,) -> (..., T, dim)"""
    ### BEGIN SOLUTION
    mean_square = x.pow(2).mean(dim=-1, keepdim=True)     # was dim=(-2, -1)
    return x * torch.rsqrt(mean_square + 1e-5) * weight
    ### STUB
    # mean_square = x.pow(2).mean(dim=(-2, -1), keepdim=True)
    # return x * torch.rsqrt(mean_square + 1e-5) * weight
    ### END SOLUTION


# %%
chance = torch.Generator().manual_seed(4)
x = torch.randn(6, 8, generator=chance)
moved = x.clone()
moved[-1] += 5                                            # another last token
weight = torch.ones(8)
difference = (norm_tokens(moved, weight) - norm_tokens(x, weight)).abs().amax(-1)
print("how far each token moves:", [round(d, 3) for d in difference.tolist()])

# %%
check("norm_tokens", norm_tokens)

# %% [markdown] tags=["solution"]
# A mean over two axes is one number for the whole text, and the last token is in it. The mask never sees this
# leak, because it guards attention only. Whatever joins tokens must be attention; everything else
# works along the last axis.

# %% [markdown]
# ## Exercise 5: the loss is ln V and stays there
#
# Difficulty: medium · importance: essential · 10 minutes
#
# Find the bug. This function gives a new model its weights: all matrices normal with spread 0.02, those
# that write into the stream narrower. The first loss is exactly ln V, as it should be. But the model
# hardly learns. The next cell prints the typical size of what each norm hands on; for a new model it
# should be about 1. (The norms of a model come with weights of 1.)


# %%
def start_weights(model):
    """Draw the weights of a new model, in place."""
    ### BEGIN SOLUTION
    narrow = 0.02 / (2 * model.config.n_layers) ** 0.5
    for name, weight in model.named_parameters():
        if weight.dim() == 2:                             # was: every parameter
            into_stream = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(weight, std=narrow if into_stream else 0.02)
    ### STUB
    # narrow = 0.02 / (2 * model.config.n_layers) ** 0.5
    # for name, weight in model.named_parameters():
    #     into_stream = name.endswith(("wo.weight", "w2.weight"))
    #     nn.init.normal_(weight, std=narrow if into_stream else 0.02)
    ### END SOLUTION


# %%
torch.manual_seed(0)
model = mm.Transformer(mm.ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=4,
                                      head_dim=16, hidden_dim=128, vocab_size=960))
start_weights(model)
rows = ladder.tokens.ids[: 4 * 33].view(4, 33)
sizes = []
for module in model.modules():
    if "RMSNorm" in type(module).__name__:
        module.register_forward_hook(
            lambda _, args, out: sizes.append(out.pow(2).mean().sqrt().item()))
logits = model(rows[:, :-1])
loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
print(f"first loss {loss:.4f}, ln V {math.log(960):.4f}")
print("sizes after the norms:", [round(size, 2) for size in sizes])

# %%
check("start_weights", start_weights)

# %% [markdown] tags=["solution"]
# The loop drew *every* parameter, the weights of the norms too: 0.02 instead of 1. Each part then reads a
# stream fifty times too small, and so does the output, so all scores are nearly 0 and the loss is
# exactly ln V. It passes the first test of the chapter for the wrong reason; the third one, a batch by
# heart, would have caught it.

# %% [markdown]
# ## Exercise 6: who says the answer?
#
# Difficulty: hard · importance: useful · 18 minutes
#
# At the last token the stream is a sum: the embedding, and what attention and feed-forward of each block
# wrote. The last norm divides that sum by one number (its root mean square, `model.norm.eps` under the
# root) and scales it by `model.norm.weight`; then the row `model.output.weight[answer]` makes the
# answer's logit of it. So the logit is a sum too, with one part for each writer.
#
# Return these 2 · L + 1 parts for the **last** token: embedding, attention of block 0, its feed-forward,
# attention of block 1, ... Their sum is the logit. `ids` has shape (T,), and `model.layers[i].attention` and
# `.feed_forward` can be watched with `register_forward_hook`.


# %%
@torch.no_grad()
def who_says_it(model, ids, answer):
    """Each writer's part of the answer's logit, at the last token. -> (2 L + 1,)"""
    ### BEGIN SOLUTION
    rows = [model.tok_embeddings(ids[-1])]                # (dim,) each
    parts = [part for block in model.layers
             for part in (block.attention, block.feed_forward)]
    hooks = [p.register_forward_hook(lambda _, args, out: rows.append(out[0, -1]))
             for p in parts]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    rows = torch.stack(rows)                              # (2 L + 1, dim)
    size = (rows.sum(0).pow(2).mean() + model.norm.eps).sqrt()
    return rows / size @ (model.norm.weight * model.output.weight[answer])
    ### END SOLUTION


check("who_says_it", who_says_it)

# %% [markdown] tags=["solution"]
# The only trap is the norm: it is not a sum, but once the whole stream is known, it divides every part by
# the same number. With a norm of its own for each part, the parts would not sum to the logit.

# %% [markdown]
# Now ask the shipped model. The tale is cut after “Now”; the answer is “ Leo”. Who says so? And who speaks
# against it?

# %%
shipped = mm.load_model("tales-dense")
tokenizer = mm.load_tokenizer("tales-dense")
TALE = """The golden ring
One morning Anna found a golden ring in the mill. Leo was at the lake. \
Anna went to the lake and saw Leo there. Anna gave the ring to Leo. \
The sun was shining. Now"""
ids = torch.tensor(tokenizer.encode(TALE, bos=True))
leo, anna = (tokenizer.encode(name)[0] for name in (" Leo", " Anna"))
names = ["embedding"] + [f"block {n}, {part}" for n in range(4)
                         for part in ("attention", "feed-forward")]

# %%
try:
    said = torch.stack([who_says_it(shipped, ids, name) for name in (leo, anna)])
    for name, (for_leo, for_anna) in zip(names, said.T.tolist()):
        print(f"{name:22} for Leo {for_leo:6.2f}   for Anna {for_anna:6.2f}")
except NotImplementedError:
    print("not written yet")

# %% [markdown] tags=["solution"]
# The attention of block 2 says Leo, far louder than any other writer. Hardly anyone speaks against Leo; the
# last feed-forward speaks against Anna.

# %% tags=["solution"]
assert said[0].argmax() == names.index("block 2, attention")
assert said[0].min() > -0.5 and said[1].argmin() == len(names) - 1

# %% [markdown]
# ## Exercise 7: the best small model
#
# Difficulty: medium · importance: optional · 20 minutes
#
# An open task. You have 300,000 parameters (at least 100,000 should be used), the vocabulary of 960 tokens,
# and the ladder's training. Deep or wide? Few heads or many? A small table or a tied one? Return your
# configuration; the check says whether it keeps to the rules.


# %%
def my_config():
    """-> ModelConfig with vocab_size=960 and at most 300,000 parameters"""
    ### BEGIN SOLUTION
    return mm.ModelConfig(dim=96, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=24,
                          hidden_dim=240, vocab_size=960)
    ### END SOLUTION


check("my_config", my_config)

# %% [markdown]
# Set `TRAIN` to True for the ladder's judgement; it takes some ten seconds. Write your guess down first, and
# try at least three shapes. The chapter's own model has more than half a million parameters.

# %%
TRAIN = False
if TRAIN:
    torch.manual_seed(0)
    mine_to_train = mm.Transformer(my_config())
    ladder.fit(mine_to_train)
    display(ladder.run("my small model", mine_to_train, chapter=4))
print("trained:", TRAIN)

# %% [markdown] tags=["solution"]
# In our trials so short a training favoured width: two blocks of dim 96 went further than four of dim 64. That need not hold for a long training, where *who has the ring* takes several looks that build on each
# other. A ranking found in ten seconds is a ranking for ten seconds.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
