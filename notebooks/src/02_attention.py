# %% [markdown]
# # 2. Attention
#
# **How does a word find out which other words matter to it?**
#
# The core takes 45 minutes. The exercises take an hour and a half, if you do all of them.
# You need chapter 0 and a little Python; what we borrow from chapter 1 is repeated below.
#
# The shapes in this chapter: **B** texts in a batch · **T** query positions · **S** key positions ·
# **H** heads · **D** size of a head · **dim** numbers for one token · **V** tokens in the vocabulary.

# %%
import math
import textwrap

import torch
from torch import nn

import minimistral as mm
from minimistral import attention as library
from minimistral.course import (Choice, Slider, bet, check, explore, hint, ladder,
                                mine, predict, reveal, show, swap, verdict)
from minimistral.course.chapters import ch02_attention as ch02
from minimistral.course.figures import heatmap, lines_chart, new_figure, table_of
from minimistral.course.panel import wrapped

# %% [markdown]
# ## The headline
#
# In 2024 the press explained what is special about Mistral. One of its claims is below. Place your bet:
# put one letter between the quotation marks and run the cell. At the end of the core we come back to
# it with measurements.

# %%
bet(21, answer="")

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>What does a model read instead of letters?</summary>
# Token ids: whole numbers, each standing for a piece of text.</details>
# <details><summary>What does a bigram model know when it predicts the next token?</summary>
# The last token, and nothing before it.</details>
# <details><summary>What turns a row of scores into probabilities?</summary>
# A softmax: the exponential of each score, divided by the sum of all exponentials.</details>

# %% [markdown]
# ## A word said long before
#
# Here is a tale of the kind that our small model was trained on. We have cut off its last word. You
# know that word. Which words told you?

# %%
TALE = """The golden ring
One morning Anna found a golden ring in the mill. Leo was at the lake. \
Anna went to the lake and saw Leo there. Anna gave the ring to Leo. \
The sun was shining. Now Leo has the"""

tokenizer = mm.load_tokenizer("tales-dense")
ids = tokenizer.encode(TALE, bos=True)
print(wrapped(TALE))
print()
print(len(ids), "tokens; the last five:", ch02.pieces(tokenizer, ids)[-5:])

predict("bigram", "A bigram sees only the last token, “ the”. "
        "How likely will it find “ ring”?",
        ["above 0.9: this tale is about a ring", "about 0.5: the ring or the mill",
         "below 0.2: it cannot know which tale this is"], answer="")

# %% [markdown]
# Let us count. The bigram model of chapter 1 looks through two thousand tales and notes which token
# follows “ the”, and how often.

# %%
V = tokenizer.vocab_size
all_ids = ladder.tokens.ids                               # two thousand tales, (N,)
counts = torch.zeros(V, V)
counts.index_put_((all_ids[:-1], all_ids[1:]), torch.tensor(1.0), accumulate=True)

bigram = counts[ids[-1]] / counts[ids[-1]].sum()          # after " the", (V,)
ring_id = tokenizer.encode(" ring")[-1]
assert bigram[ring_id] < 0.2
reveal("bigram", "C", f"The bigram gives “ ring” {bigram[ring_id]:.2f}.")

# %% [markdown]
# The bigram gives the same answer after every “ the” of every tale. Now the shipped model, a small
# transformer, which reads the same tokens.

# %%
model = mm.load_model("tales-dense")
with torch.no_grad():
    logits = model(torch.tensor([ids]))                   # (1, T, V)
informed = logits[0, -1].softmax(-1)                      # (V,)

print("after “... Now Leo has the”:   bigram    model")
for token in informed.topk(5).indices.tolist():
    name = tokenizer.decode([token])
    print(f"{name:>28}   {bigram[token]:6.3f}   {informed[token]:6.3f}")
assert informed[ring_id] > 0.9

# %% [markdown]
# The model is nearly certain. Nothing in the last token tells it so: the last “ ring” stands two
# sentences back. Somewhere between reading and predicting, the token “ the” got hold of a word said
# long before.
#
# **In short:** to predict well, a token must be able to fetch something from the tokens before it.
# This chapter builds the part that fetches.

# %% [markdown]
# ## One query, by hand
#
# Suppose each token could ask all the others. For that we give every token three short lists of
# numbers:
#
# - a **query**: what it is looking for,
# - a **key**: what it can be found by,
# - a **value**: what it hands over when it is found.
#
# Three tokens and two numbers are enough. Say the first number stands for *person* and the second for
# *thing*. The token “the” is looking for a thing.

# %%
words = ["Leo", "ring", "the"]
k = torch.tensor([[2.0, 0.0],     # Leo: found as a person
                  [0.0, 3.0],     # ring: found as a thing
                  [0.0, 1.0]])    # the: a little like a thing
v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [0.0, 0.0]])
q = torch.tensor([0.0, 1.0])      # the query of "the": a thing, please

scores = k @ q                    # (S,): how well does each key fit the query?
print(dict(zip(words, scores.tolist())))
predict("share", "A softmax makes shares of these scores. How much for “ring”?",
        ["1.00: the largest score takes everything", "0.75: 3 out of 0 + 3 + 1",
         "0.84: more than its part of the sum"], answer="")

# %% [markdown]
# A score is the sum of the products, number by number: for “ring” it is 0 · 0 + 3 · 1 = 3. A large
# score means that key and query point the same way.
#
# From the scores we make shares that sum to 1, because the token will get a mixture of all the values.
# Did you predict how much of the mixture comes from “ring”? Then run on.

# %%
powers = scores.exp()             # 1, 20.1 and 2.7: try it with e = 2.72 on paper
weights = powers / powers.sum()   # (S,), sums to 1
print(dict(zip(words, [round(w, 2) for w in weights.tolist()])))
assert round(weights[1].item(), 2) == 0.84
reveal("share", "C", "The exponential stretches differences: e³ against e¹. And a "
       "score below zero still gets a share; “part of the sum” would fail.")

# %% [markdown]
# $$ \text{weight}_s = \frac{e^{\,q \cdot k_s}}{\sum_j e^{\,q \cdot k_j}}
# \qquad \text{look} = \sum_s \text{weight}_s \, v_s $$
#
# In words: compare the query with every key, make shares of the scores, and mix the values in these
# shares. The same two lines in code, with the same letters:

# %%
def attend_one(q, k, v):
    """One query looks at all keys. q: (D,), k and v: (S, D) -> (D,)"""
    scores = k @ q                                        # (S,)
    weights = scores.exp() / scores.exp().sum()           # (S,)
    return weights @ v                                    # (D,)


attend_one(q, k, v)

# %% [markdown]
# The token “the” now carries (0.42, 8.44): hardly any person, much thing. Nobody told it *where* the
# thing stood. It asked by content, and the content answered. (Let q look for a person, for both, or for
# the opposite of a thing: change it in the cell with the three tokens, run that cell, and then the last
# one again.)
#
# **In short:** a look is three steps: score every key, turn the scores into shares, mix the values.

# %% [markdown]
# ## All queries at once
#
# One token is not enough. Every token of the text asks its own question, and a computer prefers one
# large multiplication to many small ones. So we stack the queries as rows.

# %%
show(ch02.shapes_picture(), alt="Boxes: q (T, D) times k transposed (D, S) gives, "
     "after a softmax, weights (T, S); weights times v (S, D) give the result "
     "(T, D). One row of the weights belongs to one query and sums to 1.")

# %% [markdown]
# $$ \text{look}(Q, K, V) = \text{softmax}\left(Q K^\top\right) V $$
#
# In words: every row of $Q$ meets every row of $K$; a softmax along each row; then mix the rows of
# $V$. Where do queries, keys and values come from? From the token itself, through three matrices that
# training adjusts: `wq`, `wk` and `wv`.

# %%
chance = torch.Generator().manual_seed(2)
x = torch.randn(5, 8, generator=chance)                   # five tokens, (T, dim)
wq, wk, wv = torch.randn(3, 8, 4, generator=chance) / 2   # (dim, D) each
q, k, v = x @ wq, x @ wk, x @ wv                          # (T, D) each


def attend_all(q, k, v):
    """All queries look at all keys. q: (T, D), k and v: (S, D) -> (T, D)"""
    scores = q @ k.T                                      # (T, S)
    weights = scores.softmax(dim=-1)                      # each row sums to 1
    return weights @ v                                    # (T, D)


one_by_one = torch.stack([attend_one(row, k, v) for row in q])
assert torch.allclose(attend_all(q, k, v), one_by_one, atol=1e-5)
print("row by row and all at once give the same", tuple(one_by_one.shape))

# %% [markdown]
# One number in that function is easily wrong: the axis of the softmax. Let us put it wrong on purpose,
# for the smallest case there is: two queries, two keys.

# %%
scores = torch.tensor([[2.0, 0.0], [1.0, 2.0]])
right, wrong = scores.softmax(dim=-1), scores.softmax(dim=0)
assert [round(s, 2) for s in wrong.sum(-1).tolist()] == [0.85, 1.15]
figure, axes = new_figure(7.5, 3.2, columns=2)
for ax, table, title in ((axes[0], right, "dim=-1: rows sum to 1"),
                         (axes[1], wrong, "dim=0: columns do")):
    heatmap(ax, table, ["q0", "q1"], ["k0", "k1"], rows="query", columns="key",
            title=title, limits=(0, 1))
show(figure, alt="With dim=-1 the weights of each query sum to 1; with dim=0 they "
     "do not: query 0 has 0.73 + 0.12, query 1 has 0.27 + 0.88.",
     data=table_of(torch.cat([right, wrong], 1), ["q0", "q1"],
                   ["right k0", "right k1", "wrong k0", "wrong k1"]))

# %% [markdown]
# On the right nothing raises an error, and no shape is off. But query 0 hands out 0.85 and query 1
# hands out 1.15, and whatever query 1 wants changes what query 0 gets. An exercise of this chapter
# starts from that mistake.
#
# **In short:** a table of T × S weights; each row belongs to one query and sums to 1.

# %% [markdown]
# ## Why divide by a square root
#
# Our by-hand keys had two numbers. Real heads have 32, 64 or 128. Does the softmax mind?

# %%
predict("size", "The numbers in q and k are random, about 1 in size; D is 64. How "
        "large is a typical score?", ["about 1", "about 8", "about 64"], answer="")

# %%
sizes = [4, 16, 64, 256, 1024]
spread, plain, scaled = [], [], []
for D in sizes:
    q, k = torch.randn(2, 500, 10, D, generator=chance)   # 500 looks, 10 keys
    scores = (q * k).sum(-1)                              # (500, 10)
    spread.append(scores.std().item())
    plain.append(scores.softmax(-1).amax(-1).mean().item())
    scaled.append((scores / math.sqrt(D)).softmax(-1).amax(-1).mean().item())

for D, size in zip(sizes, spread):
    assert 0.9 < size / math.sqrt(D) < 1.1
    print(f"D = {D:4}   typical score {size:5.1f}   root of D {math.sqrt(D):5.1f}")
reveal("size", "B", "The 64 products differ in sign and mostly cancel: what is "
       "left grows with the square root of their number.")

# %% [markdown]
# So scores grow with $\sqrt{D}$, only because there are more numbers to add. What does that do to the
# shares? Ten random keys deserve about a tenth each; here is the largest share of the ten.

# %%
figure, ax = new_figure(6.6, 3.4)
lines_chart(ax, sizes, {"scores as they are": plain, "scores over √D": scaled},
            title="Without the square root a look freezes on one key",
            xlabel="D, size of the head", ylabel="largest of ten weights")
ax.set(xscale="log", ylim=(0, 1.05), xticks=sizes, xticklabels=sizes)
ax.minorticks_off()
show(figure, alt=f"From D = 4 to D = 1024 the largest of ten weights rises from "
     f"{plain[0]:.2f} to {plain[-1]:.2f}; over the root of D it stays near "
     f"{scaled[-1]:.2f}.", data={"D": sizes, "as is": plain, "over √D": scaled})
assert plain[-1] > 0.9 and max(scaled) < 0.4

# %% [markdown]
# $$ \text{look}(Q, K, V) = \text{softmax}\left(\frac{Q K^\top}{\sqrt{D}}\right) V $$
#
# This is the formula of the paper that named the transformer (Vaswani and others, 2017, section 3.2.1).
# A frozen look is also a look that cannot learn; a section under *Further* measures it.
#
# **In short:** divide the scores by the square root of the head size, and the weights start out soft,
# whatever the size.

# %% [markdown]
# ## It reads the answer
#
# Now we train with it. We borrow the finished model class of chapter 4, make it tiny, and let every
# token look at every other token of its row. Beside it runs the same model, where a token may look
# only at itself and at what came before. Both have to predict the next token.
#
# The tales are cut into rows of 33 tokens: 32 to read, and for each of them the next one to predict.
# `swap` puts a function of ours in the place of one of the library's, for the indented lines only.

# %%
def everyone(query_positions, key_positions):
    return torch.ones(len(query_positions), len(key_positions), dtype=torch.bool)


def tiny_model():
    torch.manual_seed(0)
    return mm.Transformer(mm.ModelConfig(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=16, hidden_dim=128,
        vocab_size=V))


rows, polite = ch02.rows_of(all_ids, 32), tiny_model()    # (R, T + 1)
losses = {"sees the past": ch02.train_briefly(polite, rows, 200, rate=1e-2)}
predict("leak", "What does the loss do where everyone sees everyone?",
        ["nothing special: more context helps a little", "it falls towards nothing",
         "it rises: the future only confuses"], answer="")

# %%
# NBVAL_IGNORE_OUTPUT: the curve of a model trained in this run
peeking = tiny_model()
with swap("attention.causal", everyone):
    losses["sees everything"] = ch02.train_briefly(peeking, rows, 200, rate=1e-2)
final = {name: sum(values[-10:]) / 10 for name, values in losses.items()}
show(ch02.leak_picture(losses), data=ch02.leak_table(losses),
     alt="The loss of the model that sees everything falls to "
     f"{final['sees everything']:.1f}, that of the model that sees only the past "
     f"to {final['sees the past']:.1f}.")

# %%
assert final["sees everything"] < 0.4 < 1.0 < final["sees the past"]
reveal("leak", "B", "The answer to position t stands at position t + 1 of the same "
       "row. Whoever may look there can copy it.")

# %% [markdown]
# A loss below 0.4 after 200 steps, while the other model is still above 1: a great success? We let both
# write. To write means to predict a token that does not exist yet, so now there is nothing to copy. (The
# tales come in five languages. A good writer stays in one.)

# %%
# NBVAL_IGNORE_OUTPUT: text of models trained in this run
prompt = tokenizer.encode("The golden ring\n", bos=True)
for rule, writer in ((library.causal, polite), (everyone, peeking)):
    with swap("attention.causal", rule):
        new = mm.generate(writer, prompt, 30, temperature=0.7, seed=1)
    told = f"{rule.__name__:9} " + tokenizer.decode(new).replace("\n", " ")
    print(textwrap.fill(told, 84, subsequent_indent=10 * " "))

# %% [markdown]
# The better the loss, the worse the writer. It learned to copy, and nothing else. This is the most
# expensive mistake of this chapter, because during training it looks like success.
#
# The cure is a rule about positions. Every query and every key has one, counted from the start of the
# text: **a query may attend to a key that is not later than itself.** This is called *causality*. We
# write the rule as a table of booleans, and in the whole course True means: *may attend*.

# %%
positions = torch.arange(6)
may_look = torch.stack([positions <= p for p in positions])  # (T, S)
show(ch02.mask_picture(may_look, ["Now", "Leo", "has", "the", "ring", "."],
                       "Each token sees itself and the past"),
     alt="A grid of six queries and six keys: circles, which mean 'may attend', "
     "fill the diagonal and everything left of it; the future is crossed out.")

# %% [markdown]
# Where does the rule enter? Hidden keys must get weight 0, and the others must share the whole. Two
# ways to get that wrong are common. We try both.

# %%
scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 4.0], [2.0, 0.0, 1.0]])
p = torch.arange(3)
mask = p[None, :] <= p[:, None]                           # (T, S)

late = scores.softmax(-1).masked_fill(~mask, 0.0)         # softmax, then hide
strict = p[None, :] < p[:, None]                          # "before"
dark = scores.masked_fill(~strict, -torch.inf).softmax(-1)
good = scores.masked_fill(~mask, -torch.inf).softmax(-1)
for name, weights in {"hidden after": late, "strictly before": dark,
                      "right": good}.items():
    print(f"{name:16} rows sum to", [round(s, 2) for s in weights.sum(-1).tolist()])

# %% [markdown]
# Hidden after the softmax, the future has already taken its share: the first two rows hand out too
# little, and they still change when a later token changes. With *strictly before*, the first token may
# look at nothing, and a softmax over nothing is 0/0: not a number. The right way hides the **scores**:
# minus infinity before the softmax becomes exactly 0 after it.

# %% [markdown]
# ### Your turn: who may look at whom
#
# Write the rule. One line is enough. You get the positions of the queries and of the keys, and return
# a boolean for every pair: True where the query may attend to the key. A batch brings positions of
# shape (B, T), so count the axes from the right.

# %% tags=["your-turn"]
def causal(query_positions, key_positions):
    """True where the key is not later than the query.

    query_positions: (..., T), key_positions: (..., S) -> bool (..., T, S)
    """
    return ...


check("causal", causal)

# %% [markdown]
# If you are stuck, `hint("causal")` gives one step at a time. When it passes, compare with the
# library's line. From here on this notebook uses the library's, so that it runs in any case.

# %%
# minimistral/attention.py
# show: causal

# %% [markdown]
# How would we know that nothing leaks? We move one token and watch the others. If token 3 changes, the
# looks of tokens 0, 1 and 2 must not move at all.

# %%
def attend_causal(q, k, v, mask):
    """q: (..., T, D), k and v: (..., S, D), mask: (T, S), True = may attend"""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # new: the root
    scores = scores.masked_fill(~mask, -torch.inf)        # new: hide the scores
    return scores.softmax(dim=-1) @ v                     # (T, D)


x = torch.randn(5, 8, generator=chance)
moved = x.clone()
moved[3] += 1.0                                           # another token 3
mask = causal(torch.arange(5), torch.arange(5))
before, after = (attend_causal(y @ wq, y @ wk, y @ wv, mask) for y in (x, moved))
change = (after - before).abs().amax(-1)                  # (T,)
print("change of each look:", [round(c, 4) for c in change.tolist()])
assert torch.equal(before[:3], after[:3])

# %% [markdown]
# **In short:** the rule is about positions, it is applied to the scores, and moving a later token is
# the test.

# %% [markdown]
# ## Several looks at once
#
# What can a single look not do? After *Anna gave the ring to Leo* the model has to remember both: who
# gave, and who received. By hand again. This time a value is a single number: say that Anna is 1, Max
# is 2 and Leo is 3.

# %%
k = torch.tensor([[2.0, 0.0], [0.0, 2.0]])                # giver, receiver
v = torch.tensor([[1.0], [3.0]])                          # Anna is 1, Leo is 3
giver, receiver = torch.tensor([6.0, 0.0]), torch.tensor([0.0, 6.0])
print("one look for both: ", round(attend_one(giver + receiver, k, v).item(), 2))
print("two looks:         ", round(attend_one(giver, k, v).item(), 2), "and",
      round(attend_one(receiver, k, v).item(), 2))

# %% [markdown]
# One look for both finds a 2, and that is Max, who is not in this tale at all. A mixture of two answers
# is a third answer. Two looks side by side keep them apart. So a model does several looks at once, each
# with its own small queries, keys and values. Each of them is called a **head**.
#
# The usual way is one large multiplication and then a cut: H · D numbers for each token, cut into H
# heads of D numbers. The cut must run through the numbers of one token, never through the tokens. At
# the end the H looks are joined, and one more matrix, `wo`, makes dim numbers of them.

# %%
class MultiHead(nn.Module):
    def __init__(self, dim, n_heads, head_dim):
        super().__init__()
        self.cut = (n_heads, head_dim)
        self.wq, self.wk, self.wv = (
            nn.Linear(dim, n_heads * head_dim, bias=False) for _ in range(3))
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)  # way back

    def forward(self, x):                                 # (B, T, dim)
        q, k, v = (w(x).unflatten(-1, self.cut).transpose(1, 2)
                   for w in (self.wq, self.wk, self.wv))  # (B, H, T, D)
        p = torch.arange(x.shape[1])
        look = attend_causal(q, k, v, causal(p, p))       # (B, H, T, D)
        return self.wo(look.transpose(1, 2).flatten(-2))  # (B, T, H * D) -> dim

# %% [markdown]
# Why `unflatten` and then `transpose`, when one `reshape` gives the same shape? Four tokens, two heads
# of three numbers; in place of numbers we write down which token each one came from.

# %%
token = torch.arange(4)[:, None].expand(4, 6)             # (T, H * D)
swapped = token.unflatten(-1, (2, 3)).transpose(0, 1)     # (H, T, D)
reshaped = token.reshape(2, 4, 3)                         # (H, T, D) as well
print("row t of head 0 should hold numbers of token t:")
print("unflatten, transpose:", swapped[0].tolist())
print("reshape:             ", reshaped[0].tolist())

# %% [markdown]
# No error and the right shape, but with `reshape` head 0 sees tokens 0 and 1 only, each of them twice:
# its row 1 is the second half of token 0. No mask can save this, because the rows are no longer tokens.

# %% [markdown]
# ### Your turn: all queries, all heads
#
# Put it all together: scores, root of D, mask, softmax, mix, for B texts and H heads. Four things that
# the drafts left out: q comes as (B, T, H, D), so you choose how to bring the heads to the front; a
# mask may be (T, S) or (B, T, S); the softmax is done in float32, and the result has the dtype of v;
# and a query that may see nothing gets zeros, not NaN.

# %% tags=["your-turn"]
def attend(q, k, v, mask):
    """Scaled dot-product attention, head by head.

    q: (B, T, H, D), k and v: (B, S, H, D), mask: bool (T, S) or (B, T, S), True
    where the query may attend -> (B, T, H, D)
    """
    scores = ...      # (B, H, T, S), in float32, over the root of D
    weights = ...     # hide, softmax, and zeros for a query that sees nothing
    return ...        # (B, T, H, D), in the dtype of v


check("attend", attend)

# %% [markdown]
# This is the heart of every model in this course, so it is worth ten minutes and all three hints. The
# library's version uses `einsum`, where letters name the axes: `"bthd,bshd->bhts"` reads *for every b,
# h, t and s, sum over d*. A letter that is missing on the right is summed.

# %%
# minimistral/attention.py
# show: attend

# %% [markdown]
# Line by line: scores of shape (B, H, T, S) in float32; the mask gets an axis for the heads; hidden
# scores become the lowest number there is; after the softmax hidden weights become 0. The last step is
# for the query that may see nothing: all its scores are equally low, so the softmax would give it an
# average of everything. Setting its weights to 0 gives zeros.
#
# And now the moment this chapter works towards. `mine()` is the shipped model, running on every piece
# of yours that has passed. With none passed it runs on the library's, and says so.

# %%
my_model = mine()
print(my_model.write("The golden ring\n"))
my_model

# %% [markdown]
# **In short:** H heads are H looks side by side, each with its own shares; cut heads from the last
# axis, then swap axes.

# %% [markdown]
# ## What the maps show
#
# The weights of a head are a table with a row for every token. Such a table is called an *attention
# map*. Nothing hides it: while the shipped model reads a tale, we swap the library's `attend` for one
# that keeps the weights.

# %%
def attention_maps(model, ids):
    """The weights of every head while the model reads ids. -> (L, H, T, S)"""
    kept = []

    def watched(q, k, v, mask):
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        kept.append(scores.masked_fill(~mask, -torch.inf).softmax(-1)[0])
        return attend(q, k, v, mask)

    with swap("attention.attend", watched), torch.no_grad():
        model(torch.tensor([ids]))
    return torch.stack(kept)


languages = {"English": "en", "French": "fr", "German": "de", "Spanish": "es",
             "Italian": "it"}
told = {name: tokenizer.encode(ch02.retell(TALE + " ring.", code), bos=True)
        for name, code in languages.items()}
maps = {name: attention_maps(model, ids) for name, ids in told.items()}
texts = {name: ch02.pieces(tokenizer, ids) for name, ids in told.items()}
print("layers, heads, queries, keys:", tuple(maps["English"].shape))

# %% [markdown]
# Here is a question for the explorer. In the last sentence the model has to name the holder of the
# ring, right after the token “ Now”. It is Leo, because Anna gave it to him.
# **Which tokens does that token look at?** Find a head that looks at a name, and one that looks at
# something useless. A bar over a token is its weight; the asking token is underlined.

# %% tags=["try"]
english, tokens = maps["English"], texts["English"]
n_layers, n_heads, length = english.shape[:3]
now = ch02.position_before(tokens, " Leo")                # the token before
explore(ch02.map_explorer(maps, texts), language=Choice(list(languages)),
        layer=Slider(0, n_layers - 1, n_layers - 1), head=Slider(0, n_heads - 1, 0),
        position=Slider(0, length - 1, now),
        settings=ch02.three_settings(english, tokens, now))

# %% [markdown]
# The same question as plain code, for all heads at once: how much of its weight does the asking token
# give to the tokens “ Leo” that stand before it, and how much to “ Anna”?

# %%
def weight_on(word):
    """How much the asking token gives to a word before it. -> (L, H)"""
    places = [i for i, token in enumerate(tokens[:now]) if token == word]
    return english[:, :, now, places].sum(-1)


on_leo, on_anna = weight_on(" Leo"), weight_on(" Anna")
figure, axes = new_figure(7.6, 3.3, columns=2)
for ax, table, name in zip(axes, (on_leo, on_anna), ("Leo", "Anna")):
    heatmap(ax, table, rows="layer", columns="head", title=f"weight on “ {name}”",
            limits=(0, 1), row_labels=range(n_layers), column_labels=range(n_heads))
show(figure, alt=f"More than 0.3 of the weight goes to Leo in "
     f"{int((on_leo > 0.3).sum())} of {on_leo.numel()} heads, to Anna in "
     f"{int((on_anna > 0.3).sum())}.",
     data=ch02.names_table({"Leo": on_leo, "Anna": on_anna}))

# %% [markdown]
# These pictures are hard to resist. A head looks at the right name, so it must be the head that finds
# the holder. Must it?

# %% [markdown]
# ## What the maps do not show
#
# A map shows where a head looks. It does not show what the head does with it, nor whether any later part
# of the model uses it. For that we need an experiment: switch one head off and measure. A head enters
# the model through its own columns of `wo`. We set them to 0, measure, and put them back.
#
# To measure, we take two dozen new tales that end with *Now ... has the ...*, and stop each one after
# “ Now”.

# %%
questions = ch02.holder_questions(tokenizer, 24)          # 24 tales, cut short


def right_name():
    """Mean probability of the right name, over all questions."""
    return ch02.mean_probability(model, questions)


predict("heads", "We switch off every head, one at a time. Without which two "
        "does the right name lose most?",
        ["the two whose maps give that name most weight",
         "one of those two, and one other", "two others"], answer="")

# %%
whole = right_name()
falls = torch.zeros(n_layers, n_heads)
D = model.config.head_dim
for layer in range(n_layers):
    for head in range(n_heads):
        wo = model.layers[layer].attention.wo.weight.data  # (dim, H * D)
        kept = wo.clone()
        wo[:, head * D:(head + 1) * D] = 0                # off
        falls[layer, head] = whole - right_name()
        wo.copy_(kept)                                    # on again
print(f"probability of the right name with all heads on: {whole:.2f}")

# %% [markdown]
# One number for each head: how much probability the right name loses without it. Now we put it beside
# what the maps show, averaged over the same questions.

# %%
seen = torch.stack([ch02.weight_on_answer(attention_maps(model, q.ids), q)
                    for q in questions]).mean(0)          # (L, H)
by_map, by_cost = ch02.ranking(seen)[:2], ch02.ranking(falls)[:2]
show(ch02.effects_picture(seen, falls, "A good map and a high cost are two things"),
     data=ch02.effects_table(seen, falls), alt="Each head as a point. First in "
     "weight and cost is layer {}, head {}; second in weight layer {}, head {}, "
     "in cost layer {}, head {}.".format(*by_map[0], *by_map[1], *by_cost[1]))
for place in [*by_map, by_cost[1]]:
    print("layer {}, head {}:".format(*place), f"weight on the right name "
          f"{seen[place]:.2f}, cost when off {falls[place]:.2f}")
common = set(by_map) & set(by_cost)
assert len(common) == 1 and falls[by_cost[0]] > 0.5 and falls[by_map[1]] < 0.05
assert seen[by_cost[1]] < 0.1 < falls[by_cost[1]]
assert english[by_cost[1]][37, 37] > 0.8
reveal("heads", "B", "One head is first in both lists; the seconds differ.")

# %% [markdown]
# The map was right about the first head: it fetches the name. About the second it was wrong in both
# directions. The second-best map hardly matters, and a head of the first layer, which gives the name
# next to nothing, costs more than all but one.
#
# Put the explorer on that head (the last line above) and on position 37, the “ Leo” who receives the
# ring. He looks almost only at himself; going by its map, one would call this head idle. But one head may
# prepare what a later one needs, and what another fetches may go unused.
#
# **In short:** a map is where a head looks. What a head is for, you learn by taking it away.

# %% [markdown]
# ## The verdict on the headline

# %%
total = mm.count_parameters(model.config).total
real = mm.count_parameters(mm.MODELS["mistral-7b-v0.1"]).total
assert real > 1000 * total
print(f"our model {total:,} parameters, Mistral 7B {real:,}")
verdict(21, "true with a condition", "Whoever has the weights can look inside, as "
        "we did. But looking is not understanding: that took an experiment.")

# %% [markdown]
# *You may look inside* is true of every model whose weights are published, and it is worth a lot: none
# of the last cells is possible with a model behind a web address. *Black boxes because they have so many
# parameters* is the weaker half. Our model has thousands of times fewer, and its maps alone did not
# tell us which heads matter.
#
# A careful writer would have written: *Mistral publishes the weights of some of its models, so anybody
# can inspect them and experiment with them. Understanding what happens inside remains research, for
# large models and small ones.*

# %% [markdown]
# ## The ladder
#
# Each chapter from 1 to 9 adds a rung to one ladder: the same ten seconds of training on tales, the same
# prompt. (The two shipped models were trained for longer.) The loss is surprise, in *nats* for each byte
# of text; the *floor* is the loss that no model can go below.
#
# Chapter 1 left us with a bigram. We keep it as it is and give it one thing more: a single layer with
# four heads. What they find in the tokens before is added to the bigram's scores.

# %%
smooth = (counts + 0.1).log()                             # no pair is impossible


class LookBack(nn.Module):
    def __init__(self, dim=64):
        super().__init__()
        self.embedding = nn.Embedding(V, dim)
        self.look = MultiHead(dim, n_heads=4, head_dim=16)
        self.output = nn.Linear(dim, V, bias=False)
        nn.init.zeros_(self.output.weight)                # at first: a bigram

    def forward(self, ids):                               # (B, T) -> (B, T, V)
        return smooth[ids] + self.output(self.look(self.embedding(ids)))


torch.manual_seed(0)
look_back = LookBack()
ladder.fit(look_back)
predict("rung", "From the bigram down to the floor: how far does one look get?",
        ["about a fifth of the way", "about half", "all the way"], answer="")

# %%
# NBVAL_IGNORE_OUTPUT: a model trained in this run
display(ladder.run("bigram and one look back", look_back, chapter=2))

text_bytes, floor = len(ladder.corpus.val.encode()), ladder.corpus.floor
with torch.no_grad():
    losses = [ladder.validation_nats(m) / text_bytes
              for m in (lambda ids: smooth[ids], look_back)]
assert 0.15 < (losses[0] - losses[1]) / (losses[0] - floor) < 0.25
reveal("rung", "A", f"The bigram needs {losses[0]:.2f} nats for each byte; the "
       f"floor, below which no model can go, is {floor:.2f}.")

# %% [markdown]
# One look back helps: the model can now find out which names and things a tale has, and in which language
# it is told. But most of the way remains, and its tales are poor. Something is missing, and we come to
# it below.

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. compute a look by hand: scores, shares, mixture;
# 2. write attention for a batch of texts with many heads, and say every shape on the way;
# 3. say why scores are divided by the square root of the head size;
# 4. state causality as a rule about positions, and test that nothing leaks;
# 5. read an attention map, and say what it does not show.
#
# New words: *query*, *key*, *value*, *score*, *weights*, *causal*, *head*, *attention map*.
#
# One last guess, for a question that is still open:

# %%
predict("order", "“Anna gave the ring to Leo.” and “Leo gave the ring to Anna.” "
        "have the same words. Can our MultiHead tell them apart at the full stop?",
        ["yes: other order, other look", "no: the looks are equal",
         "a little: the nearest word counts most"], answer="")

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | softmax over the queries | a later token changes an earlier row, in spite of the mask |
# | no square root of D | weights of nearly 0 and 1 from the start; small gradients |
# | no mask, or True and False exchanged | the loss falls far too low; the samples are nonsense |
# | hidden after the softmax | rows sum to less than 1 |
# | strictly before | the first row is not a number |
# | heads cut with `reshape` or `view` | no error at all; tokens mix |

# %% [markdown]
# ## The question for chapter 3
#
# You have just made a prediction about two sentences with the same words. Who has the ring in each?

# %%
torch.manual_seed(0)
blind, embedding = MultiHead(64, 4, 16), nn.Embedding(V, 64)
looks = []
for sentence in (" Anna gave the ring to Leo.", " Leo gave the ring to Anna."):
    x = embedding(torch.tensor([tokenizer.encode(sentence)]))
    looks.append(blind(x)[0, -1])                         # the full stop
assert torch.allclose(*looks, atol=1e-5)
reveal("order", "B", "The full stop sees the same tokens both times, and a mixture "
       "has no order.")

# %% [markdown]
# For this look the two sentences are one and the same. Yet the shipped model knows that it is Leo. How
# does attention learn what came first? That is chapter 3.

# %% [markdown]
# ## Further: large scores
#
# Everything from here on can be skipped without loss later.
#
# The exponential grows fast. In float32 it is infinite from 89 on, and infinite over infinite is not a
# number. A softmax does not change when the same number is subtracted from all scores, so we subtract
# the largest: then no exponent is above 0.

# %%
scores = torch.tensor([88.0, 89.0, 1000.0])
print("exponentials:   ", scores.exp().tolist())
print("naive softmax:  ", (scores.exp() / scores.exp().sum()).tolist())
shifted = (scores - scores.max()).exp()
print("shifted softmax:", (shifted / shifted.sum()).tolist())
assert torch.equal(torch.softmax(scores, -1), shifted / shifted.sum())

# %% [markdown]
# ## Further: why a frozen look does not learn
#
# When one weight is 1 and the others are 0, a small change of a score changes nothing. So the gradient,
# which measures exactly that, has nothing to say.

# %%
q, k = torch.randn(2, 500, 10, 1024, generator=chance)    # 500 looks, 10 keys
for name, factor in (("as they are", 1.0), ("over √D", 1 / math.sqrt(1024))):
    scores = ((q * k).sum(-1) * factor).requires_grad_()
    scores.softmax(-1)[:, 0].sum().backward()
    print(f"scores {name:12} mean gradient {scores.grad.abs().mean():.4f}")

# %% [markdown]
# ## Further: a look that may find nobody
#
# The shares of a look sum to 1, even when no key fits. A head that finds nothing still has to take
# something, and trained models often put their weight on the first token for that reason. One way out
# is an extra score of 0 that belongs to nobody.

# %%
poor, rich = torch.tensor([-6.0, -5.0, -7.0]), torch.tensor([-6.0, 5.0, -7.0])
for name, scores in (("nothing fits", poor), ("one key fits", rich)):
    usual = scores.softmax(0)
    or_nobody = torch.cat([scores, torch.zeros(1)]).softmax(0)[:-1]
    print(f"{name}: in all {usual.sum():.2f}, with nobody {or_nobody.sum():.2f}")

# %%
first = maps["English"][..., 10:, 0].mean(-1)             # weight on <s>, (L, H)
print("mean weight on the first token, by layer and head:")
for layer, row in enumerate(first.tolist()):
    print(layer, [round(w, 2) for w in row])

# %% [markdown]
# The first token is `<s>`, which begins every text and says nothing. Heads with a large number here
# have found a place to look when they have nothing to look for.

# %% [markdown]
# ## Further: what it costs
#
# T queries meet T keys: twice the text, four times the work. Causality hides about half of
# the pairs, but in a short text as in a long one: still four times. First we count, then we measure.

# %%
H, D = 4, 32
for T in (256, 512, 1024):
    operations = 2 * 2 * T * T * H * D                    # scores, and the mixture
    print(f"T = {T:5}   weights {H * T * T:>10,}   operations {operations:>12,}")

# %%
# NBVAL_IGNORE_OUTPUT: times differ by machine
seconds = {T: ch02.time_attention(attend, T, H, D) for T in (256, 512, 1024)}
growth = seconds[1024] / seconds[256]
print({T: f"{1000 * s:.1f} ms" for T, s in seconds.items()})
print(f"four times the text took {growth:.1f} times as long")

# %%
assert growth > 5                                         # 16 in theory
print("much more than four times as long:", growth > 5)

# %% [markdown]
# ## Further: how to read an einsum
#
# Three rules. A letter that stands on both sides stays an axis. A letter that is missing on the right is
# summed. The order on the right is the order of the result. So `"bthd,bshd->bhts"` multiplies for all b,
# h, t, s, and sums over d, and the heads come to the front without a transpose.

# %%
q, k = torch.randn(2, 2, 5, 3, 4, generator=chance)       # (B, T, H, D) each
by_letters = torch.einsum("bthd,bshd->bhts", q, k)
by_hand = q.transpose(1, 2) @ k.transpose(1, 2).transpose(-2, -1)
print(tuple(by_letters.shape), torch.allclose(by_letters, by_hand, atol=1e-5))

# %% tags=["try"]
# What do these two compute? Say it first, then run.
print(tuple(torch.einsum("bthd->bhtd", q).shape))
print(tuple(torch.einsum("bthd->bth", q).shape))
