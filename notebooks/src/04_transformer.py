# %% [markdown]
# # 4. The transformer
#
# **What else does attention need to become a language model?**
#
# The core takes 50 minutes. The exercises and the sections under *Further* take another hour and
# a half.
# You need [chapter 2](02_attention.ipynb) and a little of chapter 3; what we borrow from both is
# repeated below.
#
# The shapes in this chapter: **B** texts in a batch · **T** tokens of a text · **dim** numbers that the
# model keeps for each token · **hidden** inner numbers of the feed-forward · **L** blocks · **V**
# tokens in the vocabulary.

# %%
import math
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

import minimistral as mm
from minimistral.attention import Attention
from minimistral.course import (Choice, Slider, check, explore, hint, ladder,
                                mine, predict, reveal, show)
from minimistral.course.chapters import ch02_attention as ch02
from minimistral.course.chapters import ch04_transformer as ch04
from minimistral.course.figures import lines_chart, new_figure
from minimistral.rope import rotary_angles

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>What does a look hand to the token that asked?</summary>
# A mixture of the values of the tokens it may see, in shares that sum to 1.</details>
# <details><summary>What does the causal rule say?</summary>
# A query may attend to a key that is not later than itself.</details>
# <details><summary>How do queries and keys know their place?</summary>
# Their pairs of numbers are turned by an angle that grows with the position.</details>

# %% [markdown]
# ## A tower of looks
#
# Chapters 2 and 3 gave us one layer of looks. It goes into the module `Attention`: for each token a
# row of dim numbers goes in, and what its heads found comes out, again dim numbers. Chapter 7 opens
# that module; until then we borrow it.
#
# One look was not enough. So let us build a tower: the second layer looks at what the first one found,
# the third at what the second one found, and so on. Nothing is trained yet; we only watch what happens
# to the tokens.

# %%
TALE = """The golden ring
One morning Anna found a golden ring in the mill. Leo was at the lake. \
Anna went to the lake and saw Leo there. Anna gave the ring to Leo. \
The sun was shining. Now Leo has the"""

tokenizer = mm.load_tokenizer("tales-dense")
V = tokenizer.vocab_size
ids = torch.tensor(tokenizer.encode(TALE, bos=True))      # (T,)
positions = torch.arange(len(ids))

torch.manual_seed(0)
config = mm.ModelConfig(dim=64, n_layers=12, n_heads=4, n_kv_heads=4, head_dim=16,
                        hidden_dim=128, vocab_size=V)
angles = rotary_angles(positions, config.head_dim, config.rope_theta)
embedding = nn.Embedding(V, config.dim)
tower = [Attention(config) for _ in range(config.n_layers)]

# %% [markdown]
# Two numbers describe a row of tokens. The *size* is how large the numbers of a token typically are. The
# *likeness* is the mean cosine between two different tokens: 0 for rows that have nothing in common, 1
# for rows that point the same way.

# %%
def size_and_likeness(x):
    """x: (T, dim) -> two numbers"""
    rows = F.normalize(x, dim=-1)                         # every row of length 1
    T = len(x)
    others = (rows @ rows.T).sum() - T                    # without each with itself
    return x.pow(2).mean().sqrt().item(), others.item() / (T * (T - 1))


predict("tower", f"{len(ids)} tokens at the bottom, most of them different. How "
        "alike are they after twelve layers?", ["as different as at the start",
        "a little more alike: each has found something of its own",
        "the same: nothing tells them apart any more"], answer="")

# %%
with torch.no_grad():
    x = embedding(ids)[None]                              # (1, T, dim)
    print("before any layer: size {:.6f}, likeness {:.3f}".format(
        *size_and_likeness(x[0])))
    for layer, look in enumerate(tower):
        x = look(x, positions, angles)                    # replaced by the looks
        if layer in (0, 3, 7, 11):
            size, alike = size_and_likeness(x[0])
            print(f"after layer {layer + 1:2}: size {size:.6f}, "
                  f"likeness {alike:.3f}")
assert alike > 0.99 and size < 0.001
reveal("tower", "C", "A look is an average. An average of averages forgets who "
       "asked.")

# %% [markdown]
# After twelve layers “ ring” and “ Leo” are the same row of numbers. (That the row is so small is
# mostly the doing of the random matrices; that all rows are alike is the averaging.) Trained, such a model
# learns hardly anything: we measure that at the end, under *Further*.
#
# What was lost? Each layer *replaced* the token by what the token had found. The cure is one plus sign:
# **add** what was found, and keep what was there.

# %%
with torch.no_grad():
    x = embedding(ids)[None]
    written = [x]                                         # what was ever added
    for look in tower:
        written.append(look(x, positions, angles))
        x = x + written[-1]                               # kept, and added to
size, alike = size_and_likeness(x[0])
print(f"after {len(tower)} layers: size {size:.2f}, likeness {alike:.3f}")
assert alike < 0.4 and torch.allclose(x, sum(written), atol=1e-5)

# %% [markdown]
# $$ x_L = x_0 + w_1 + w_2 + \dots + w_L $$
#
# In words: at the end a token is its embedding plus everything that the layers wrote. The last line of
# the cell checks it. By hand, for a token of two numbers: it starts as (1, 0); one layer writes (0, 2),
# the next (0.5, −1); the token is now (1.5, 1).
#
# This running sum is called the **residual stream**: a row of dim numbers for each token, which every
# layer reads and adds to. Nothing in it is ever erased, unless a layer writes the opposite.

# %%
show(ch04.stream_picture(), alt="A long arrow, the residual stream, runs from the "
     "embedding to the last norm. In each block attention and feed-forward read "
     "it through a norm, and a plus sign adds what they write.")

# %% [markdown]
# The picture shows where we are going: two kinds of parts in each block, and something called *norm* in
# front of each. We need both, and we shall see why.
#
# **In short:** a layer adds to the stream and replaces nothing, so every token stays itself.

# %% [markdown]
# ## A stream that grows
#
# If everybody adds and nobody erases, the stream grows. Is that bad? Take the simplest layer there is:
# one matrix, whose output is as large as its input. It reads the stream and writes.

# %%
chance = torch.Generator().manual_seed(4)
L = 24                                                    # layers
layers = torch.randn(L, 64, 64, generator=chance) / 8     # output as large as input


def size_of_stream(read):
    """The size of the stream after each layer; layers read it through `read`."""
    x, sizes = torch.randn(10, 64, generator=torch.Generator().manual_seed(5)), []
    for w in layers:
        x = x + read(x) @ w.T                             # (T, dim)
        sizes.append(x.pow(2).mean().sqrt().item())
    return sizes


predict("growth", "The stream starts at size 1, and each of 24 layers writes as "
        "much as it reads. How large is the stream at the end?",
        ["about 5", "about 25", "in the thousands"], answer="")

# %%
as_it_is = size_of_stream(lambda x: x)
print("after 1, 2, 4, 12 and 24 layers:",
      [round(as_it_is[i - 1], 1) for i in (1, 2, 4, 12, 24)])
assert 1000 < as_it_is[-1] < 20_000
reveal("growth", "C", "Each layer multiplies: what it reads is larger, so it "
       "writes more. By the root of 2 each time, and that 24 times is 4096.")

# %% [markdown]
# And the gradient takes the same way back, multiplied 24 times as well. A little too much in each layer,
# and the training explodes.
#
# The cure: a layer shall read the *direction* of a token and not its size. So we give it a copy whose
# numbers have a typical size of 1. That copy is what a **norm** makes. By hand, for the token (3, 4):
# the squares are 9 and 16, their mean is 12.5, its root is 3.54. Divide by it: (0.85, 1.13).
#
# $$ \text{norm}(x) = \frac{x}{\sqrt{\text{mean}(x^2) + \varepsilon}} \cdot weight $$

# %%
x = torch.tensor([3.0, 4.0])
mean_square = x.pow(2).mean()
divided = (x / mean_square.sqrt()).tolist()
print("mean of the squares:", mean_square.item())
print("divided by its root:", [round(n, 3) for n in divided])
predict("ten", "And the token (30, 40)?", ["(8.49, 11.31)", "(0.85, 1.13)",
                                           "(0.08, 0.11)"], answer="")

# %% [markdown]
# In words: divide each token by the root of the mean of its squares. That is where the name comes from:
# *root mean square*, RMS. The small number ε keeps a token of zeros from being divided by zero. And
# since typical size 1 need not be best for every number, training may adjust a *weight* for each of
# the dim columns; it starts at 1.
#
# One trap is left. Models often work with 16-bit numbers. Let us try that.

# %%
for x in (torch.tensor([30.0, 40.0]), torch.tensor([300.0, 400.0])):
    half = x.half()                                       # float16
    careless = half / half.pow(2).mean().sqrt()
    careful = (x / x.pow(2).mean().sqrt()).half()
    rounded = [[round(v, 3) for v in norm.tolist()] for norm in (careless, careful)]
    print(f"{x.tolist()!s:16} squares in float16: {rounded[0]}, "
          f"in float32: {rounded[1]}")
assert careless.tolist() == [0, 0] and abs(careful[0] - 0.8486) < 1e-3
reveal("ten", "B", "Ten times the token, the same direction, the same norm.")

# %% [markdown]
# 300² is 90,000, and the largest float16 number is 65,504. So the mean is infinite, and the token becomes
# (0, 0): no error, only silence. That is why norms compute in **float32 inside** and hand back the type
# they were given.

# %% [markdown]
# ### Your turn: RMSNorm
#
# Write the module. `x` has shape (..., dim). Four things to keep: the mean runs over the last axis, each
# token by itself; ε is added under the root; the division is done in float32; then the result goes back
# to the type of `x`, and last comes the weight, dim numbers that start at 1 and can be trained
# (`nn.Parameter`).

# %% tags=["your-turn"]
class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = ...         # (dim,), trained, ones at first

    def forward(self, x):
        """x: (..., dim) -> (..., dim), in the dtype of x"""
        return ...


check("RMSNorm", RMSNorm)

# %% [markdown]
# `hint("RMSNorm")` gives one step at a time. When yours passes, compare it with the library's. `rsqrt` is
# one over the root, and `type_as(x)` goes back to the dtype of `x`.

# %%
# minimistral/layers.py
# show: RMSNorm

# %% [markdown]
# Now the same 24 layers read a normed copy. The stream itself stays as it is; only what a layer *reads*
# is normed. This arrangement is called *pre-norm*.

# %%
normed = size_of_stream(lambda x: RMSNorm(64)(x).detach())
assert 3 < normed[-1] < 7
figure, ax = new_figure(6.8, 3.4)
lines_chart(ax, range(1, L + 1), {"reads the stream as it is": as_it_is,
                                  "reads a normed copy": normed},
            title="Read through a norm, the stream hardly grows",
            xlabel="layers", ylabel="size of the stream")
ax.set(yscale="log")
show(figure, alt=f"After 24 layers the stream has size {as_it_is[-1]:.0f} when "
     f"layers read it as it is, and {normed[-1]:.1f} when they read a normed copy.",
     data={"layers": range(1, L + 1), "as it is": as_it_is, "normed": normed})

# %% [markdown]
# Every layer now writes about as much as the first one did. Random rows hardly ever point the same way, so
# the *squares* of their sizes add up: 1 for the start and 1 for each of 24 layers is 25, and its root is 5.
# Without the norm the sizes were multiplied.
#
# **In short:** layers read a copy of size 1 and write into the stream; a large stream makes no layer write
# more.

# %% [markdown]
# ## What a look cannot do
#
# A look mixes what other tokens hand over. But what happens to a token *by itself*? The first token of a
# text may see nobody else. Its look is its own value, times the output matrix `wo` that joins the heads.
# So what such a layer does to a lone token may be simpler than it looks.

# %%
alone = torch.arange(1)                                   # position 0, one token
a, b = torch.randn(2, 1, 1, 64, generator=chance)         # two tokens, (1, 1, dim)


def lone_look(x):
    with torch.no_grad():
        return tower[0](x, alone, rotary_angles(alone, 16, 10_000.0))


predict("linear", "For a token alone: is the look of a + b the same as the look of "
        "a, plus the look of b?", ["yes", "no: the softmax is in between",
                                   "only if a and b are alike"], answer="")

# %%
together, apart = lone_look(a + b), lone_look(a) + lone_look(b)
assert torch.allclose(together, apart, atol=1e-5)
reveal("linear", "A", "The softmax over one key is 1, whatever the score. What is "
       "left is two matrices in a row: the values' and the output's.")

# %% [markdown]
# So a token alone gets sums and nothing else. Why is that too little? By hand: say one number of the
# stream is 1 if the token is a *name*, another is 1 if it stands *after “gave”*. A token with **both** is
# the receiver, and the model would like to write that down.
#
# A sum cannot do it. If a name alone gives 0 and “after gave” alone gives 0, then both together give
# 0 + 0. We need something that is more than the sum: for example a **product**.

# %%
print("name  after gave   a sum    a product of gate and value")
for name, after_gave in ((0, 0), (1, 0), (0, 1), (1, 1)):
    gate = F.silu(torch.tensor(4.0 * name)).item()        # opens for a name
    value = after_gave                                    # what would be written
    print(f"{name:3} {after_gave:8}   {name + after_gave:9}   {gate * value:12.2f}")

# %% [markdown]
# One number, the *gate*, decides how much of another number, the *value*, goes through. Only the
# receiver gets through. The gate has a bend, so that a bad fit closes it: `silu(z)` is z times a sigmoid,
# $z / (1 + e^{-z})$. For large z that is nearly z; far below zero it is nearly 0.
#
# A **feed-forward** has many such pairs side by side; their number is called hidden. One matrix makes the
# gates, one makes the values, and a third writes the products back:
#
# $$ \text{feed-forward}(x) = W_2 \left( \text{silu}(W_1 x) \cdot W_3 x \right) $$
#
# In words: hidden gates, hidden values, their products, and back to dim numbers.

# %%
w1 = torch.tensor([[4.0, 0.0]])                           # one gate: is it a name?
w3 = torch.tensor([[0.0, 1.0]])                           # one value: after gave?
w2 = torch.tensor([[0.0], [0.5]])                         # write it into number 1
for x in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])):
    hidden = F.silu(w1 @ x) * (w3 @ x)                    # (hidden,), here 1
    print(x.tolist(), "->", [round(v, 2) for v in (w2 @ hidden).tolist()])

figure, ax = new_figure(5.6, 3.0)
z = torch.linspace(-6, 6, 121)
lines_chart(ax, z, {"silu(z)": F.silu(z), "relu(z)": F.relu(z)}, markers=False,
            title="A gate: closed on the left, open on the right", xlabel="z",
            ylabel="how far it is open")
show(figure, alt="silu is near 0 for z below -4, dips to -0.28 near z = -1.3, and "
     "approaches z itself above 4; relu has a sharp corner at 0.")

# %% [markdown]
# ### Your turn: SwiGLU
#
# The feed-forward with a silu gate has the name SwiGLU (Shazeer, 2020). Write the module with three
# `nn.Linear` without bias, under Mistral's names: `w1` makes the gate, `w3` the value, `w2` the way back.
# `nn.Linear(a, b, bias=False)` makes b numbers out of a. You call it: `self.w1(x)`, where the cell
# above wrote `w1 @ x`.

# %% tags=["your-turn"]
class SwiGLU(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = ...             # the gate
        self.w2 = ...             # the way back
        self.w3 = ...             # the value

    def forward(self, x):
        """x: (..., dim) -> (..., dim)"""
        return ...


check("SwiGLU", SwiGLU)

# %%
# minimistral/layers.py
# show: SwiGLU

# %% [markdown]
# No two tokens meet in it: each one is worked on by itself. Attention is the only place where tokens
# meet, and the feed-forward is where each token combines what it has.
#
# **In short:** attention fetches, the feed-forward combines what was fetched: a gate times a value.

# %% [markdown]
# ## One block, and then the model
#
# Now look at the picture of the stream again. A block is two lines:
#
# $$ h = x + \text{attention}(\text{norm}_1(x)) \qquad \text{out} = h + \text{feed-forward}(\text{norm}_2(h)) $$
#
# ### Your turn: one block
#
# Write these two lines. `self` is a block with the modules `attention_norm`, `attention`, `ffn_norm` and
# `feed_forward`. Attention takes, besides the normed stream, `positions`, `angles` and `cache`; hand
# them through as they are. Do not write into `x` itself.

# %% tags=["your-turn"]
def block_forward(self, x, positions, angles, cache=None):
    """x: (B, T, dim) -> (B, T, dim)"""
    h = ...
    return ...


check("block", block_forward)

# %%
# minimistral/model.py
# show: Block

# %% [markdown]
# (`layer` is the block's number: in chapter 8 some blocks see less than others.)
#
# `mine()` is the shipped model, running on every piece of yours that has passed: whatever is not yours is
# the library's. Its weights were trained with the library's code. If your pieces compute the same numbers,
# the model writes a tale; one sign wrong, and it would write noise.

# %%
my_model = mine()
print(my_model.write("The golden ring\n"))
my_model

# %% [markdown]
# A model is described by a handful of numbers. They have the names that Mistral's own `params.json` files
# use. Some belong to later chapters; for now `n_kv_heads` equals `n_heads`, and `sliding_window` and
# `moe` stay None.

# %%
# minimistral/config.py
# show: ModelConfig

# %% [markdown]
# Such numbers are easily swapped, and most swaps still build *some* model, of another kind than
# you meant. So `ModelConfig` refuses what no model can be and names the likely slip. Which of these
# three does it let through? Change them and see.

# %% tags=["try"]
good = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 16,
        "hidden_dim": 128, "vocab_size": V}
for change in ({"n_kv_heads": 8}, {"head_dim": 15}, {"n_layers": 4, "n_heads": 2,
                                                     "n_kv_heads": 2}):
    try:
        mm.ModelConfig(**{**good, **change})
        print(change, "is let through: a possible model")
    except ValueError as error:
        print(change)
        print(textwrap.indent(textwrap.fill(str(error), 80), "    "))

# %% [markdown]
# And the whole model: a table of embeddings, L blocks on the stream, a last norm, and a matrix that gives
# every token of the vocabulary a score. Read `features` first: embed, the loop over the
# blocks, the last norm, and all of the stream is in it. The lines with a cache wait for chapter 6; padding
# does, too.

# %%
# minimistral/model.py
# show: Transformer

# %%
# minimistral/model.py
# show: initialise, check_ids

# %% [markdown]
# `initialise` decides what the model is before it has learned anything: small random numbers, and smaller
# ones where a part writes into the stream, because 2 · L parts add up there. `check_ids` catches the usual
# slip, a model with another model's tokenizer.
#
# **In short:** embed, L times (look, think), norm, score. That is all.

# %% [markdown]
# ## Where the parameters are
#
# The formula is short. With H heads of size D each matrix of attention has dim × H · D numbers, and there
# are four. (In the real Mistral two of them, for keys and values, have 8 heads in place of 32; chapter 7
# says why.) The feed-forward has three matrices of dim × hidden. At both ends there is a table of V × dim.

# %%
def parts_of(config):
    """The number of parameters of each part, by formula."""
    dim, D = config.dim, config.head_dim
    return {
        "tables": 2 * config.vocab_size * dim,
        "attention": config.n_layers * dim * D * (2 * config.n_heads
                                                  + 2 * config.n_kv_heads),
        "feed-forward": config.n_layers * 3 * dim * config.hidden_dim,
        "norms": (2 * config.n_layers + 1) * dim,
    }


predict("parts", "Mistral 7B: dim 4096, 32 blocks, hidden 14336, 32 heads, 32,000 "
        "tokens. Where are most of its parameters?",
        ["in attention", "in the feed-forward", "in the two tables"], answer="")

# %%
model = mm.load_model("tales-dense")
real = mm.MODELS["mistral-7b-v0.1"]
counted = sum(p.numel() for p in model.parameters())      # what torch counts
assert counted == sum(parts_of(model.config).values())
assert sum(parts_of(real).values()) == mm.count_parameters(real).total
ours, theirs = parts_of(model.config), parts_of(real)
big = theirs["feed-forward"] / sum(theirs.values())
show(ch04.shares_picture({
    f"tales-dense\n{counted / 1e6:.2f} million": ours,
    f"Mistral 7B\n{sum(theirs.values()) / 1e9:.2f} billion": theirs}),
    alt="Of the small model's parameters about a third are tables; of Mistral 7B's "
    f"{100 * big:.0f} percent are feed-forward.",
    data={"part": list(ours), "tales-dense": ours.values(), "7B": theirs.values()})
assert big > 0.75 and round(sum(theirs.values()) / 1e9, 2) == 7.24
reveal("parts", "B", f"{100 * big:.0f} percent of them. Attention has "
       f"{100 * theirs['attention'] / sum(theirs.values()):.0f}.")

# %% [markdown]
# By formula and by torch the same number, to the last one. For the real Mistral we never built anything:
# the formula is enough, and it gives the 7.24 billion that the name rounds to 7.

# %% [markdown]
# ## Three tests before any training
#
# Training takes long, and a model with a slip often trains as well, only worse. So we ask three things
# first. Each takes seconds.
#
# **One: is it ignorant?** An untrained model should give each of the V tokens about the same probability.
# The loss is minus the logarithm of the probability of the right token. What should it be for
# V = 960?

# %%
rows = ladder.tokens.ids[: 8 * 49].view(8, 49)            # of tales, (B, T + 1)


def loss_of(model, rows):
    """The mean loss of predicting each next token. rows: (B, T + 1)"""
    logits = model(rows[:, :-1])                          # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


predict("ignorant", f"The loss of an untrained model with {V} tokens, in nats: "
        "which number?", answer="")

# %%
torch.manual_seed(0)
small = mm.Transformer(mm.ModelConfig(**good))
start = loss_of(small, rows).item()
print(f"the loss at the start is {start:.3f}; ln {V} is {math.log(V):.3f}")
assert abs(start - math.log(V)) < 0.1

loud = mm.Transformer(mm.ModelConfig(**good))
with torch.no_grad():
    loud.output.weight.mul_(50)                           # much too large at first
    print(f"with an output matrix 50 times as large: {loss_of(loud, rows):.1f}")
    assert loss_of(loud, rows) > math.log(V) + 3
reveal("ignorant", round(start, 2), f"Nearly ln {V} = {math.log(V):.2f}: to the "
       "model every token is about equally likely.")

# %% [markdown]
# A start far above ln V is a model that is *sure* of random answers. It will spend its first hundred steps
# on unlearning. A start far below ln V cannot be earned either: something gives the answer away, for
# example targets that were not moved by one.
#
# **Two: does it leak?** As in chapter 2: change one token, and nothing before it may move.
# **Three: can it learn at all?** Give it a single batch, again and again. Anything that is wired up
# right can learn 8 short pieces of text by heart.

# %%
with torch.no_grad():
    moved = rows.clone()
    moved[:, 30] = (moved[:, 30] + 1) % V
    change = (small(moved) - small(rows)).abs().amax(dim=(0, 2))  # (T,)
print("moved before token 30:", change[:30].max().item(), " from 30 on:",
      change[30:].max().item() > 0)
assert change[:30].max() == 0 and change[30:].min() > 0

# %%
optimiser = torch.optim.AdamW(small.parameters(), lr=5e-3)
for step in range(61):
    loss = loss_of(small, rows)
    if step % 10 == 0:
        print(f"step {step:3}   loss {loss:.2f}")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
assert loss < 0.2

# %% [markdown]
# By heart, and that is no achievement: it knows 8 pieces and nothing else. But had the loss stopped at 5,
# we would have found a slip before spending an hour on it. An exercise of this chapter is such a slip.
#
# **In short:** ln V at the start, no leak, and one batch by heart: then train.

# %% [markdown]
# ## When does it know?
#
# The stream has the same shape everywhere: dim numbers for each token. So we may hand it to the last norm
# and the output matrix at *any* place, not only at the end, and ask what the model would predict if it
# stopped here. This trick is called the **logit lens**.
#
# To get at the stream we use hooks. A *hook* is a function that torch calls after a module, with the module,
# its inputs and its output. Ours returns nothing, so it changes nothing; it keeps the output in a list.

# %%
def predictions_by_depth(model, ids):
    """What each depth of the stream would predict. ids: (T,) -> (L + 1, T, V)"""
    kept = [model.tok_embeddings(ids)]                    # depth 0: no block yet
    hooks = [block.register_forward_hook(lambda _, args, out: kept.append(out[0]))
             for block in model.layers]
    with torch.no_grad():
        model(ids[None])
        for hook in hooks:
            hook.remove()
        return model.logits(model.norm(torch.stack(kept))).softmax(-1)


languages = {"English": "en", "French": "fr", "German": "de"}
told = {name: torch.tensor(tokenizer.encode(text, bos=True)) for name, text in (
    (name, ch02.retell(TALE + " ring.", code)) for name, code in languages.items())}

# %% [markdown]
# Here is the question for the explorer. At the end of the tale, after “ Now”, the model has to name Leo; three
# tokens later it has to name the ring. **After which block does it know each of them?** And is there a token
# for which the embedding alone is enough? A frame marks what the tale really goes on with.

# %% tags=["try"]
depths = {name: predictions_by_depth(model, ids) for name, ids in told.items()}
texts = {name: ch02.pieces(tokenizer, ids) for name, ids in told.items()}
now = texts["English"].index(" Now")
last_the = len(texts["English"]) - 3                      # “ the” before “ ring.”
explore(ch04.lens_explorer(depths, texts, lambda i: ch02.pieces(tokenizer, [i])[0]),
        language=Choice(list(languages)), position=Slider(0, 60, now),
        settings=[{"position": now}, {"position": last_the},
                  {"position": texts["English"].index(" lake")}])

# %% [markdown]
# The same question as plain code, for the whole tale: how much probability does each depth give to the
# token that really comes next?

# %%
means = []
for depth in depths["English"]:                           # (T, V)
    right = depth[:-1].gather(1, told["English"][1:, None])   # (T - 1, 1)
    means.append(right.mean().item())
figure, ax = new_figure(6.4, 3.2)
lines_chart(ax, range(len(means)), {"right token": means},
            title="With each block the stream comes nearer to the answer",
            xlabel="blocks that have written so far", ylabel="mean probability")
ax.set(xticks=range(len(means)), ylim=(0, 1))
show(figure, alt="Mean probability of the right next token by depth, from "
     f"{means[0]:.2f} at the embedding to {means[-1]:.2f} after the last block.",
     data={"blocks": range(len(means)), "probability": means})
assert means[0] < 0.4 and means[-1] > means[0] + 0.2

# %% [markdown]
# At depth 0 only one token is known, so the lens shows a bigram: the chapter 1 model lives inside this
# one. Whatever needs an earlier token needs at least one block, and *who has the ring* needs several,
# because one look must find what another one has put there.
#
# A warning: only the last depth was trained to be read this way. At the others the lens shows what is
# written in the language of the output, and a model may keep notes in another one.

# %% [markdown]
# ## The ladder
#
# The same training as in chapters 1 and 2, and this time with the whole thing: two blocks, and nothing of
# the bigram is given to it. It has to find even that by itself.

# %%
torch.manual_seed(0)
transformer = mm.Transformer(mm.ModelConfig(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=32, hidden_dim=192,
    vocab_size=V))
losses = ladder.fit(transformer)
predict("rung", "From the bigram of chapter 1 down to the floor: how far does it "
        "get?", ["about a quarter of the way", "about half of it",
                 "nearly all the way"], answer="")

# %%
# NBVAL_IGNORE_OUTPUT: a model trained in this run
display(ladder.run("a small transformer", transformer, chapter=4))

# %% [markdown]
# No sentence is sure to hold, but names, things and places mostly stand where such words may stand. How
# far down did it get?

# %%
text_bytes, floor = len(ladder.corpus.val.encode()), ladder.corpus.floor
bigram = next(row.loss for row, _ in ladder.rows() if row.name == "bigram")
with torch.no_grad():
    loss = ladder.validation_nats(transformer) / text_bytes
assert 0.35 < (bigram - loss) / (bigram - floor) < 0.65
reveal("rung", "B", f"It needs {loss:.2f} nats for each byte; the bigram needs "
       f"{bigram:.2f}, and the floor is {floor:.2f}.")

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. say why layers add to a stream, and what happens to a tower that replaces;
# 2. write RMSNorm, and say why it computes in float32;
# 3. write the gated feed-forward, and say what attention alone cannot compute;
# 4. assemble a transformer, and count its parameters before building it;
# 5. test a new model before training: ln V, no leak, one batch by heart.
#
# New words: *residual stream*, *norm*, *pre-norm*, *feed-forward*, *gate*, *block*, *logit lens*.

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | no plus sign | all tokens become alike; the loss stays near that of a guess by frequency |
# | the looks are added to the normed copy | no error; what earlier blocks wrote fades from the stream |
# | norm over the wrong axis | a later token moves an earlier one: a leak through the norm |
# | squares in float16 | rows of zeros, or NaN, on some texts only |
# | gate and value swapped | trains just as well, and a published checkpoint gives nonsense |
# | weights too large at the start | a first loss far above ln V |
# | norm weights drawn at random like the matrices | a first loss of exactly ln V that hardly falls |

# %%
print(f"above the floor: bigram {bigram - floor:.2f}, ours {loss - floor:.2f}")
shipped = next(row for row, _ in ladder.rows()
               if row.name == "the shipped tales-dense")
assert shipped.above_floor < (loss - floor) / 5
print("the shipped model, of the same kind, is nearer by a factor of 5 at least")

# %% [markdown]
# ## The question for chapter 5
#
# In a short training our model found by itself what the bigram was given, and went on to half of the way down.
# The rest needs no new part: the shipped model has the same ones, and it gets close to the floor. It has two
# blocks more, and above all it was trained much longer. **How does a heap of random numbers learn to write,
# and how well can it do at best?**

# %% [markdown]
# ## Further: what each part does when it is taken out
#
# Everything from here on can be skipped without loss later.
#
# Arguments are good, measurements are better. We took a small model of three blocks, changed one thing at a
# time, trained each variant from a few seeds on the same tales, and measured. That takes longer than a
# cell should, so here is the recorded result; with `REPEAT = True` the first two variants are trained again
# on your machine.

# %%
predict("out", "Which model is worse after a short training: one without "
        "attention, or one without feed-forward?",
        ["without attention", "without feed-forward", "about equal"], answer="")

# %%
REPEAT = False
recorded = ch04.recorded_ablations()
if REPEAT:
    for name in list(ch04.VARIANTS)[:2]:
        print(name, round(ch04.measure_variant(name, seed=0), 4))

lost = {v["changed"]: v["median"] for v in recorded["variants"]}
show(ch04.ablation_picture(recorded), alt="Validation losses of the whole model, "
     f"{lost['nothing: the whole model']:.2f}, and of eight with one part changed: "
     f"without the residual stream {lost['no residual stream']:.2f}, without norms "
     f"{lost['no norms']:.2f}.", data={"changed": lost, "median": lost.values()})
print("recorded by:", recorded["provenance"]["command"])

# %%
whole = lost["nothing: the whole model"]
assert min(lost["no norms"], lost["no residual stream"]) > 2 * bigram
assert bigram - 0.01 < lost["no attention"] < bigram + 0.1
assert lost["no feed-forward"] > lost["no attention"] + 0.05
assert lost["a linear feed-forward"] > whole + 0.02
assert abs(lost["ReLU in place of the gate"] - whole) < 0.04
assert max(abs(lost[name] - whole) for name in ("norm after the sum",
                                                "no positions")) < 0.08
reveal("out", "B", "A model without attention is about a bigram. One without "
       "feed-forward is worse than that.")

# %% [markdown]
# Without the stream, or without norms, the model is far worse than a bigram: its loss is more than twice as
# high, and hardly anything was learned. Without attention it cannot beat the bigram, because it sees one
# token; it comes close. Without feed-forward it has everything it needs to look back, and is worse still: a
# short training does not get there by sums alone. Without positions it loses little, as far as a short
# training shows: in chapter 3 a second look under the causal mask told the orders apart.

# %% [markdown]
# The surprise is the gate. A feed-forward with a plain ReLU and as many parameters does as well here. The
# papers that prefer the gate compared much longer trainings, and the differences are small. A feed-forward
# with no bend at all does worse.

# %%
spread = max(max(v["nats_per_byte"]) - min(v["nats_per_byte"])
             for v in recorded["variants"])
print(len(recorded["seeds"]), f"seeds each, at most {spread:.2f} apart")

# %% [markdown]
# Mind what this is: a small model, a short training, one learning rate that suits the whole model, few
# seeds. A norm after the sum does little harm here; deep models with that arrangement are known to need a slow
# start. What the picture says for sure is which parts *this* model, trained like
# *this*, can spare.

# %% [markdown]
# ## Further: why hidden is what it is
#
# The older feed-forward had two matrices and hidden = 4 · dim. A gate needs a third matrix. With the same
# number of parameters, hidden then is two thirds of that, 8/3 · dim. Llama 2 7B follows this rule, rounded up;
# Mistral 7B does not.

# %%
for dim in (128, 4096):
    two, three = 2 * dim * 4 * dim, 3 * dim * round(8 / 3 * dim)
    print(f"dim {dim}: two matrices {two:,}, three {three:,}")
for name in ("llama-2-7b", "mistral-7b-v0.1"):
    c = mm.MODELS[name]
    print(f"{name}: hidden is {c.hidden_dim / c.dim:.2f} times dim")
assert real.hidden_dim / real.dim == 3.5

# %% [markdown]
# ## Further: one table at both ends
#
# The embedding turns an id into dim numbers, the output turns dim numbers into a score for each id. A model
# may use one table for both; it is called *tied*. In a small model a table is a large part of all parameters,
# in a large one a small part. Most of Mistral's models do not tie.

# %%
for name in ("mistral-7b-v0.1", "mistral-nemo-12b", "ministral-3-3b"):
    config = mm.MODELS[name]
    table, total = config.vocab_size * config.dim, mm.count_parameters(config).total
    print(f"{name:16} one table is {100 * table / total:4.1f}% of the parameters; "
          f"tied: {config.tied_embeddings}")

# %% [markdown]
# ## Further: who writes how much
#
# Each part of the shipped model adds to the stream. How much, at the last token of our tale? Sizes of the
# written rows, part by part.

# %%
def size_of(row):
    return row.pow(2).mean().sqrt().item()                # as at the start


sizes = {"the embedding": size_of(model.tok_embeddings(ids)[-1])}
hooks = []
for n, block in enumerate(model.layers):
    for name in ("attention", "feed_forward"):
        def keep(_, args, out, label=f"block {n}, {name.replace('_', '-')}"):
            sizes[label] = size_of(out[0, -1])
        hooks.append(getattr(block, name).register_forward_hook(keep))
with torch.no_grad():
    model(ids[None])
for hook in hooks:
    hook.remove()
for label, size in sizes.items():
    print(f"{label:22} {size:6.2f}")

# %% [markdown]
# A large row need not matter, and a small one may decide: sizes say who is loud, not who is right. Who *says*
# the answer can be measured exactly, because the stream is a sum; that is an exercise.
