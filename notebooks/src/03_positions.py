# %% [markdown]
# # 3. Positions
#
# **How does attention learn what came first?**
#
# The core takes 45 minutes. The exercises and the sections under *Further* take another hour and
# a half.
# You need [chapter 2](02_attention.ipynb); its four lines of attention are repeated below.
#
# The shapes in this chapter: **B** texts in a batch · **T** query positions · **S** key positions ·
# **H** heads · **D** size of a head, so **D/2** pairs of numbers · **V** tokens in the vocabulary.

# %%
import itertools
import math
import textwrap

import torch
from torch import nn

import minimistral as mm
from minimistral.attention import attend, causal
from minimistral.course import (Choice, Slider, check, explore, hint, ladder, mine,
                                predict, reveal, show, swap)
from minimistral.course.chapters import ch03_positions as ch03
from minimistral.course.figures import heatmap, lines_chart, new_figure, table_of

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>What makes a score large?</summary>
# A query and a key whose numbers point the same way: their products add up.</details>
# <details><summary>What does the causal mask hide?</summary>
# For every query, the keys that stand later in the text.</details>
# <details><summary>What did chapter 2 leave unsolved?</summary>
# “Anna gave the ring to Leo.” and “Leo gave the ring to Anna.” were the same to it.</details>

# %% [markdown]
# In case chapter 2 is long ago, here it is in one cell. Every word is a row of numbers. Three matrices
# make a query, a key and a value of it. Scores say how well a query fits each key, a softmax turns them
# into shares, and the look is a mixture of values in these shares.

# %%
words = ["Anna", "gave", "Leo", "the", "ring"]
chance = torch.Generator().manual_seed(3)
x = torch.randn(5, 8, generator=chance)                   # a row per word, (T, dim)
wq, wk, wv = torch.randn(3, 8, 8, generator=chance) / 2   # (dim, D) each


def look(x, mask=None):
    """One head of chapter 2. x: (T, dim) -> looks (T, D) and weights (T, S)"""
    q, k, v = x @ wq, x @ wk, x @ wv                      # (T, D) each
    scores = q @ k.T / math.sqrt(q.shape[-1])             # (T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)    # True = may attend
    weights = scores.softmax(-1)
    return weights @ v, weights


# %% [markdown]
# ## Shuffle the words
#
# *Anna gave Leo the ring.* Let us swap the two names and have every word look again. Now it is Leo who
# gives.

# %%
predict("shuffle", "Anna and Leo have changed places. What happens to the look of "
        "the word “ring”?", ["it changes: other words stand next to it",
        "it does not change at all", "it changes a little"], answer="")

# %%
swapped = [2, 1, 0, 3, 4]                                 # Leo gave Anna the ring
figure, axes = new_figure(9.4, 4.2, columns=2)
tables = [look(x)[1], look(x[swapped])[1]]
for ax, table, order in zip(axes, tables, (range(5), swapped)):
    names = [words[i] for i in order]
    heatmap(ax, table, names, names, rows="query", columns="key", limits=(0, 0.8),
            title=f"{names[0]} gave {names[2]} the ring")
figure.suptitle("The names are swapped; every weight moves along with its words")
show(figure, alt="Two attention maps, before and after the names were swapped: "
     "each word gives each other word the same weight as before, in another "
     "column.",
     data=table_of(torch.cat(tables), [f"before: {word}" for word in words]
                   + [f"after: {words[i]}" for i in swapped],
                   [f"key {n}" for n in range(5)]))
change = (look(x[swapped])[0][4] - look(x)[0][4]).abs().max()
assert change < 1e-6
reveal("shuffle", "B", "“ring” gives each word the same weight as before, wherever "
       "the word now stands. So it gets the same mixture.")

# %% [markdown]
# The numbers on the right are the numbers on the left; they only moved. A look is a sum over all keys,
# and a sum is the same in every order. Perhaps it is true of this swap only? Five words can be put in
# 120 orders. We try them all, and we try the causal mask as well.

# %%
predict("mask", "With the causal mask we keep “ring” at the end and put the four "
        "words before it in all 24 orders. How many different looks will it get?",
        ["24: the mask knows what came first", "1: the same look every time",
         "4: one for each word that can stand next to it"],
        answer="")

# %%
different = ch03.different                                # counts unequal looks
past = causal(torch.arange(5), torch.arange(5))
orders = list(itertools.permutations(range(5)))
anywhere = different(look(x[list(o)])[0][o.index(4)] for o in orders)
at_end = [list(o) for o in orders if o[-1] == 4]
masked = different(look(x[o], past)[0][-1] for o in at_end)
print("no mask, all 120 orders: different looks of “ring”:", anywhere)
print("causal mask, 24 orders:  different looks of “ring”:", masked)
assert anywhere == masked == 1
reveal("mask", "B", "The mask decides which words “ring” may see. All four stand "
       "before it in any order, so it sees the same four.")

# %% [markdown]
# So is a model with a causal mask blind to order? One look is, for the words that it may see. But
# *gave* sees other words when it stands second than when it stands fourth. What if a second look is
# built on the first?

# %%
def two_looks(x, mask=None):
    return look(look(x, mask)[0], mask)[0]


open_ = different(two_looks(x[o])[-1] for o in at_end)
masked = different(two_looks(x[o], past)[-1] for o in at_end)
print("two looks, no mask, 24 orders:     different looks of “ring”:", open_)
print("two looks, causal mask, 24 orders: different looks of “ring”:", masked)
assert (open_, masked) == (1, 24)

# %% [markdown]
# Now all 24 orders differ. The first look left its trace: each word carries a mixture of those before
# it, and these mixtures depend on the order. So two statements, and both are needed. Without a mask,
# attention is blind to order, however many layers there are. With the causal mask, one layer knows *who*
# stands before it but not in which order; deeper layers can find out more, by way of the first looks.
#
# **In short:** a mixture has no order. The mask gives away who came before, and not how far away.

# %% [markdown]
# ## The first idea: a row for every place
#
# The obvious repair: make a table with a row for place 0, a row for place 1 and so on, and add the
# row of its place to every word. The first transformers added such rows; GPT-2 learned them. Let
# us look at one pair of words, *ring* as the query and *gave* as the key, three places apart, at the
# beginning of a text and further on.

# %%
places = torch.randn(20, 8, generator=chance)             # one row per place
ring, gave = x[4], x[1]
scores = []
for p in (3, 8, 13, 18):
    q, k = (ring + places[p]) @ wq, (gave + places[p - 3]) @ wk
    scores.append(q @ k)
    print(f"query at {p:2}, key at {p - 3:2}: score {q @ k:6.2f}")
assert abs(scores[0] - scores[1]) > 1

try:
    places[20]
except IndexError as error:
    print("a query at 20:", error)

# %% [markdown]
# The same two words, the same distance, and every time another score. A model that wants to look *three
# words back* would have to learn it for every place again. And after the last row the text must end.
#
# What we want is a rule like this: **the score depends on the two words and on how far apart they are,
# and on nothing else.**

# %% [markdown]
# ## An arrow on a circle
#
# Take two numbers of a query, and draw them as an arrow. For an arrow there is an operation that
# changes its direction and leaves its length alone: a turn. Let the arrow of a word turn by the same
# angle at every step through the text.

# %%
show(ch03.quarter_turns_picture((2.0, 1.0)), alt="The arrow (2, 1), turned by a "
     "quarter of a circle for each place: (-1, 2) at place 1, (-2, -1) at place 2, "
     "(1, -2) at place 3. All four have the same length.")

# %% [markdown]
# $$ a' = a\cos\varphi - b\sin\varphi \qquad b' = a\sin\varphi + b\cos\varphi
# \qquad \varphi = p\,\omega $$
#
# In words: the arrow $(a, b)$ at position $p$ is turned by the angle $\varphi$, which is the position
# times a speed $\omega$. Angles are in radians: a whole turn is $2\pi$, about 6.28. For a quarter of a
# turn the cosine is 0 and the sine is 1, so $(2, 1)$ becomes $(-1, 2)$. In code, with the same letters:

# %%
def turn(pair, angle):
    """An arrow (a, b), turned to the left by an angle in radians."""
    a, b = pair
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([a * cos - b * sin, a * sin + b * cos])


omega = math.pi / 2                                       # a quarter turn a place
for p in range(4):
    print("place", p, [round(n) for n in turn((2.0, 1.0), p * omega).tolist()])

# %% [markdown]
# Both arrows are turned, the one of the query and the one of the key, each by its own position. A score
# is the sum of the products. What does the turning do to it?

# %%
q, k, omega = (1.7, 0.6), (1.0, -0.8), 1.0                # one radian a place


def score(p, s):
    """The score of the query at position p and the key at position s."""
    return (turn(q, p * omega) @ turn(k, s * omega)).item()


predict("moved", f"Query at 7, key at 4: the score is {score(7, 4):.2f}. We put "
        "100 words in front of both. The new score?", ["about 100 times as large",
        "the same", "another number, hard to say which"], answer="")

# %%
for p, s in ((7, 4), (107, 104), (1007, 1004), (4, 7)):
    print(f"query at {p:4}, key at {s:4}: score {score(p, s):6.3f}")
assert abs(score(7, 4) - score(107, 104)) < 1e-4
assert abs(score(7, 4) - score(4, 7)) > 0.5
reveal("moved", "B", "Both arrows turn by the same amount more, so the angle "
       "between them stays.")

# %% [markdown]
# The score of two arrows is the product of their lengths and of the cosine of the angle between them.
# Turning the query by $p\,\omega$ and the key by $s\,\omega$ changes that angle by $(p - s)\,\omega$: the
# distance enters, the places do not. A cosine does not know plus from minus, but our arrows point apart
# before any turn. So one side is not like the other: a key three places *before* the query is not the
# same as one three places *after* it. All pairs of eight places:

# %%
table = torch.tensor([[score(p, s) for s in range(8)] for p in range(8)])
figure, ax = new_figure(6.2, 4.8)
heatmap(ax, table, range(8), range(8), rows="place of the query",
        columns="place of the key",
        title="Along each diagonal the score is the same")
show(figure, alt="A table of scores for eight query places and eight key places: "
     "every diagonal, which is one distance, holds one and the same number.",
     data=table_of(table, range(8), range(8), "query / key"))
for distance in range(-7, 8):
    diagonal = table.diagonal(-distance)
    assert torch.allclose(diagonal, diagonal[:1], atol=1e-4)

# %% [markdown]
# Here is a question for the explorer. At one radian a place, with the query on 5 and the key on 2, look at
# the score. Leave the key where it is and move the query away from it. **At which distance, far away, does
# nearly the same score come back?** Then take the slow speed: does it still?

# %% tags=["try"]
explore(ch03.circle_explorer(), query_position=Slider(0, 60, 5),
        key_position=Slider(0, 60, 2), speed=Choice(list(ch03.SPEEDS)),
        settings=[{"query_position": 5, "key_position": 2},
                  {"query_position": 49, "key_position": 2},
                  {"query_position": 49, "key_position": 2,
                   "speed": "0.1 radian a place"}])

# %% [markdown]
# The same as plain code: the score at every distance up to 60.

# %%
scores = [score(distance, 0) for distance in range(61)]
figure, ax = new_figure(7.4, 3.3)
lines_chart(ax, range(61), {"score": scores}, ylabel="score",
            xlabel="distance between query and key",
            title="One arrow comes round: distance 47 looks like distance 3")
ax.plot([3, 47], [scores[3], scores[47]], "s", color="#D55E00", markersize=9)
show(figure, alt="The score as a function of the distance is a wave with a period "
     f"of 6.28 places; at distance 3 it is {scores[3]:.2f}, "
     f"at 47 {scores[47]:.2f}.",
     data={"distance": range(61), "score": [round(s, 3) for s in scores]})
slow = [ch03.score_at(distance, 0, 0.1) for distance in (3, 47)]
print(f"at 0.1 radian a place: {slow[0]:.2f} at distance 3, {slow[1]:.2f} at 47")
assert abs(scores[3] - scores[47]) < 0.05

# %% [markdown]
# The arrow makes a whole turn in 6.28 places. Seven turns need 43.98 places, nearly 44: so distance 47
# looks like distance 3. One pair of numbers alone cannot keep near and far apart. Before we repair that,
# let us break the turn in two ways that are easily written.

# %%
def score_backwards(p, s):
    return (turn(q, p * omega) @ turn(k, -s * omega)).item()


def score_query_only(p, s):
    return (turn(q, p * omega) @ torch.tensor(k)).item()


predict("backwards", "By a slip of the sign the key is turned the other way. On "
        "what does the score depend now?", ["on the distance, as before",
        "on the sum of the places", "on the place of the query only"], answer="")

# %%
for p, s in ((7, 4), (107, 104), (6, 5), (8, 3)):
    print(f"query {p:3}, key {s:3}:   right {score(p, s):6.2f}   "
          f"key backwards {score_backwards(p, s):6.2f}   "
          f"query only {score_query_only(p, s):6.2f}")
assert abs(score_backwards(7, 4) - score_backwards(6, 5)) < 1e-4
assert abs(score_backwards(7, 4) - score_backwards(107, 104)) > 0.5
reveal("backwards", "B", "7 + 4 = 6 + 5 = 8 + 3, and “key backwards” is the same "
       "in these three rows. Both arrows must turn the same way.")

# %% [markdown]
# No error in either case, and the positions still have an effect; only the rule that we wanted is
# gone. So the test is always the same: move everything, and compare the scores.
#
# **In short:** turn the query by its position and the key by its position. Lengths stay, and the score
# depends on the distance.

# %% [markdown]
# ## Many hands on one clock
#
# A clock has the same problem and solves it. The minute hand alone comes round every hour. Together with
# the hour hand it names the time. So we give the pairs of a head different speeds. A head of D numbers
# has D/2 pairs, and pair $i$ turns by
#
# $$ \omega_i = \theta^{-2i/D} \quad \text{radians for each place.} $$
#
# In words: pair 0 turns by one radian a place, each further pair is slower by the same factor, and
# $\theta$ (theta), usually 10,000 or more, decides how slow the last ones are. The speeds are also called
# **frequencies**. For D = 8 they are easily computed by hand:

# %%
D, theta = 8, 10_000
for i in range(D // 2):
    omega_i = theta ** (-2 * i / D)
    print(f"pair {i}: {omega_i:7.4f} radians a place, one turn in "
          f"{2 * math.pi / omega_i:7.1f} places")
predict("clock", "Pair 0 cannot tell distance 3 from distance 47. Which pair is "
        "the first that can?", ["pair 1", "pair 2", "pair 3"], answer="")

# %%
frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
show(ch03.clocks_picture((3, 47), frequencies), alt="Four dials for four pairs. On "
     "the first, distances 3 and 47 point the same way; on the second they point "
     "apart; on the last one both have hardly begun to turn.",
     data={"pair": range(4), "angle at 3": (3 * frequencies).tolist(),
           "angle at 47": (47 * frequencies % 6.2832).tolist()})
assert abs(math.cos(47) - math.cos(3)) < 0.01
assert abs(math.cos(4.7) - math.cos(0.3)) > 0.9
reveal("clock", "A", "At a tenth of the speed 44 places are 4.4 radians, which is "
       "no whole turn.")

# %% [markdown]
# ### Your turn: the angles
#
# Two or three lines. Positions come in any shape (..., T); each one gets D/2 angles. Return their
# cosines and their sines, two tensors of shape (..., T, D/2), both in float32. Example: position 3 with
# D = 4 and theta = 100 has the angles 3 and 0.3.

# %% tags=["your-turn"]
def rotary_angles(positions, head_dim, theta):
    """Cosine and sine of every angle by which a head's pairs are turned.

    positions: (..., T) whole numbers -> two float32 tensors (..., T, D/2)
    """
    frequencies = ...     # (D/2,): theta to the power of -2i/D
    angles = ...          # (..., T, D/2): every position times every frequency
    return ...            # cosines, sines


check("rotary_angles", rotary_angles)

# %% [markdown]
# `hint("rotary_angles")` gives one step at a time. Below are the library's lines; from here on this
# notebook uses them, so that it runs in any case.

# %%
# minimistral/rope.py
# show: rotary_angles

# %% [markdown]
# Now every pair of every head must be turned. A score is the sum over the pairs; each part depends on
# the distance only, so the sum does as well. Which numbers form a pair? In Mistral's models the
# neighbours: numbers 0 and 1, numbers 2 and 3, and so on. By hand for one token at position 1, with a
# head of four numbers and theta = 10,000, so that the angles are 1 and 0.01:

# %%
token = torch.tensor([2.0, 1.0, 3.0, 0.0])
first, second = turn(token[:2].tolist(), 1.0), turn(token[2:].tolist(), 0.01)
print("pair 0:", [round(n, 3) for n in first.tolist()])
print("pair 1:", [round(n, 3) for n in second.tolist()])

# %% [markdown]
# ### Your turn: the rotation
#
# Turn all pairs at once: x has shape (B, T, H, D), cosines and sines have shape (T, D/2) or, when every
# text has its own positions, (B, T, D/2). All heads of a token turn alike. Compute in float32, return
# the dtype of x, and leave x itself as it is. A picture of the axes helps: cut D into D/2 pairs of 2.

# %% tags=["your-turn"]
def rotate(x, cos, sin):
    """Turn the neighbouring pairs (x0, x1), (x2, x3), ... of every head.

    x: (B, T, H, D), cos and sin: (T, D/2) or (B, T, D/2) -> (B, T, H, D)
    """
    even, odd = ...       # the first and the second number of each pair
    turned = ...          # both new numbers, side by side again
    return ...            # (B, T, H, D), in the dtype of x


check("rotate", rotate)

# %%
# minimistral/rope.py
# show: rotate

# %% [markdown]
# Line by line: cosines and sines get an axis for the heads. `unflatten` cuts D into pairs, `unbind`
# takes their first and second numbers apart. The next line is the formula from above. `stack` puts the
# two results side by side, and `flatten` lays the pairs in a row again. Positions given by turning are
# called **rotary** position embedding, or RoPE (Su and others, 2021).
#
# First the test: move everything by 1000 places and compare. Then the two sentences of chapter 2.

# %%
from minimistral.rope import rotary_angles, rotate

queries, keys = torch.randn(2, 2, 6, 3, 16, generator=chance)  # (B, T, H, D) each


def turned_scores(positions):
    angles = rotary_angles(positions, 16, 10_000)
    return torch.einsum("bthd,bshd->bhts", rotate(queries, *angles),
                        rotate(keys, *angles))            # (B, H, T, S)


here, there = (turned_scores(torch.arange(6) + start) for start in (0, 1000))
assert torch.allclose(here, there, atol=2e-3)             # 1000 rad, rounded
assert not torch.allclose(here, turned_scores(torch.zeros(6)), atol=0.1)
print("moved by 1000: the same scores")

# %%
tokenizer = mm.load_tokenizer("tales-dense")
V = tokenizer.vocab_size
table = torch.randn(V, 16, generator=chance)              # a row for every token


def last_look(sentence, turning):
    """What the full stop gets, with or without the turn."""
    x = table[tokenizer.encode(sentence)][None, :, None]  # (1, T, 1, 16)
    p = torch.arange(x.shape[1])
    y = rotate(x, *rotary_angles(p, 16, 10_000)) if turning else x
    return attend(y, y, x, causal(p, p))[0, -1, 0]


for turning in (False, True):
    count = different(last_look(s, turning) for s in
                      (" Anna gave the ring to Leo.",
                       " Leo gave the ring to Anna."))
    print(f"turned by position: {turning!s:5}   different looks: {count}")
    assert count == 1 + turning

# %% [markdown]
# With the turn, the full stop can tell the two sentences apart. Note that we turned queries and keys, and
# left the values alone: what is handed over should not depend on where it stood.
#
# Can a model *use* it? A toy: rows of random letters, and for each place the task is to name the letter
# **two places back**. One layer, one head; once without positions and once with.

# %%
predict("toy", "Guessing one of twelve letters costs ln 12, about 2.5 nats. Where "
        "does the look without positions end after 100 steps?",
        ["near 0: it learns to look two back",
         "near 2: a little better than guessing",
         "at 2.5: it learns nothing"], answer="")

# %%
losses = {name: ch03.learn_two_back(turn) for name, turn in
          (("without positions", False), ("with rotary positions", True))}
means = {n: torch.tensor(losses[n]).view(10, 10).mean(1).tolist() for n in losses}
figure, ax = new_figure(7.0, 3.3)
lines_chart(ax, range(10, 101, 10), means, xlabel="training step",
            ylabel="loss (nats)",
            title="One look learns “two places back” only with positions")
end = {name: values[-1] for name, values in means.items()}
show(figure, alt=f"Without positions the loss is {end['without positions']:.1f} "
     f"nats after 100 steps, with rotary ones {end['with rotary positions']:.1f}.",
     data={"step": range(10, 101, 10),
           **{n: [round(v, 2) for v in values] for n, values in means.items()}})
assert end["without positions"] > 1.8 and end["with rotary positions"] < 0.05
reveal("toy", "B", "It can learn which letters are in the row, and no more. With "
       "positions, a query asks for distance 2.")

# %% [markdown]
# And now with real words. `mine()` is the shipped model, running on every piece of yours that has
# passed. Your two functions turn all its queries and keys, four layers deep.

# %%
my_model = mine()
print(my_model.write("The golden ring\n"))
my_model

# %% [markdown]
# **In short:** D/2 pairs, each with its own speed, name the distance as the hands of a clock name the
# time.

# %% [markdown]
# ## How slow is the slowest hand?
#
# The first Mistral 7B had heads of D = 128 numbers and theta = 10,000. Its successor, version 0.2, was
# made for texts of 32,768 tokens, and theta was 1,000,000. Why would one change that number?

# %%
predict("slow", "D = 128 and theta = 10,000. After how many tokens has the slowest "
        "pair gone round once?", ["about 600", "about 54,000", "about 5,000,000"],
        answer="")

# %%
turns = {}
for name in ("mistral-7b-v0.1", "mistral-7b-v0.2"):
    config = mm.MODELS[name]
    i = torch.arange(config.head_dim // 2)
    speed = config.rope_theta ** (-2 * i / config.head_dim)
    turns[f"theta = {config.rope_theta:,.0f}"] = (2 * math.pi / speed).tolist()
    done = (2 * math.pi / speed <= 32_768).sum()
    print(f"{name}: slowest turn {2 * math.pi / speed[-1]:10,.0f} tokens; "
          f"{done} of {len(i)} pairs get round in 32,768")
assert 50_000 < turns["theta = 10,000"][-1] < 60_000
reveal("slow", "B", "2π times 10,000 would be 62,832; the last pair is a little "
       "faster.")

# %%
low, high = (sum(t > 32_768 for t in values) for values in turns.values())
show(ch03.speeds_picture(turns, 32_768, f"With the larger theta {high} pairs, not "
                         f"{low}, stay within one turn"),
     alt=f"Tokens for one turn, by pair, on a logarithmic axis: at theta 10,000 "
     f"{low} of 64 pairs need more than 32,768 tokens, at theta 1,000,000 {high} "
     "do.",
     data={"pair": range(64), **{n: list(map(round, v)) for n, v in turns.items()}})
assert (low, high) == (4, 24)

# %% [markdown]
# A pair that gets round within the text gives nearly the same angle to several distances. A pair that
# does not get round gives every distance an angle of its own: even the first and the last word are
# less than one turn apart. A larger theta makes more pairs of the second kind. The price: the slow
# pairs hardly tell neighbours apart.
#
# This much is geometry. What it is worth, only training can show. But one thing we can try at once: take
# the shipped model, which was trained with theta = 10,000, and change the number.

# %%
model = mm.load_model("tales-dense")
rows = ch03.long_rows(tokenizer, 200, 8)                  # tales, (8, 201)
print("trained with theta =", f"{model.config.rope_theta:,.0f}")
predict("knob", "The weights stay, only theta becomes 1,000,000. What happens to "
        "its loss on tales?", ["nothing: it knows the words",
        "it falls: far words are clearer now",
        "it rises clearly: it learned with other speeds"], answer="")

# %%
def with_theta(new_theta):
    """The loss of the shipped model with another theta, in nats per token."""
    def angles(positions, head_dim, theta):
        return rotary_angles(positions, head_dim, new_theta)

    with swap("rope.rotary_angles", angles):
        return ch03.loss_of(model, rows).item()


found = {new_theta: with_theta(new_theta) for new_theta in (100, 10_000, 1_000_000)}
for new_theta, loss in found.items():
    print(f"theta {new_theta:9,}: {loss:.2f} nats per token")
moved = ch03.loss_of(model, rows, positions=torch.arange(200) + 1000).item()
print(f"theta    10,000, all places moved by 1000: {moved:.2f}")
assert min(found[100], found[1_000_000]) > found[10_000] + 0.3
assert abs(moved - found[10_000]) < 0.01
reveal("knob", "C", "Heads have learned what “one word back” is at their speeds.")

# %% [markdown]
# Moving all places by 1000 does nothing, although the model never saw such places: only distances count.
# Changing the speeds hurts. So theta belongs to the weights, and it stands beside them in `params.json`.
# Whoever loads the weights with another theta gets no error, only a worse model.
#
# **In short:** theta sets the slowest speeds. A model is trained with one theta and must be run with it.

# %% [markdown]
# ## The ladder
#
# The same ten seconds of training, the same prompt. Chapter 2's model was a bigram and one look back.
# We keep every line of it and turn the queries and keys. `turning=False` is chapter 2's model again, so
# that we can compare.

# %%
all_ids = ladder.tokens.ids                               # two thousand tales, (N,)
counts = torch.zeros(V, V)
counts.index_put_((all_ids[:-1], all_ids[1:]), torch.tensor(1.0), accumulate=True)
smooth = (counts + 0.1).log()                             # the bigram of chapter 1


class LookBack(nn.Module):
    def __init__(self, turning, dim=64, n_heads=4, head_dim=16):
        super().__init__()
        self.turning, self.cut = turning, (n_heads, head_dim)
        self.embedding = nn.Embedding(V, dim)
        self.wq, self.wk, self.wv, self.wo = (
            nn.Linear(dim, dim, bias=False) for _ in range(4))  # H * D is dim here
        self.output = nn.Linear(dim, V, bias=False)
        nn.init.zeros_(self.output.weight)                # at first: a bigram

    def forward(self, ids):                               # (B, T) -> (B, T, V)
        x, p = self.embedding(ids), torch.arange(ids.shape[1])
        q, k, v = (w(x).unflatten(-1, self.cut)
                   for w in (self.wq, self.wk, self.wv))  # (B, T, H, D) each
        if self.turning:                                  # the one new thing
            angles = rotary_angles(p, self.cut[1], 10_000)
            q, k = rotate(q, *angles), rotate(k, *angles)
        look = self.wo(attend(q, k, v, causal(p, p)).flatten(-2))
        return smooth[ids] + self.output(look)

# %%
text_bytes, floor = len(ladder.corpus.val.encode()), ladder.corpus.floor
torch.manual_seed(0)
without = LookBack(turning=False)
ladder.fit(without)
loss_without = ladder.validation_nats(without) / text_bytes
print(f"without positions: {loss_without:.2f} nats for each byte; "
      f"the floor is {floor:.2f}")
predict("rung", "How much of the way from here to the floor do positions bring?",
        ["less than a tenth of it", "about a third", "more than half"], answer="")

# %%
torch.manual_seed(0)
look_back = LookBack(turning=True)
ladder.fit(look_back)
loss_with = ladder.validation_nats(look_back) / text_bytes
saved = (loss_without - loss_with) / (loss_without - floor)
assert 0.005 < saved < 0.1
reveal("rung", "A", f"It goes from {loss_without:.3f} to {loss_with:.3f}; the "
       f"floor is {floor:.3f}.")

# %%
# NBVAL_IGNORE_OUTPUT: a model trained in this run
display(ladder.run("one look back, with positions", look_back, chapter=3))

# %% [markdown]
# A disappointment, and an instructive one. Positions were all that the toy needed, and they hardly help
# here. A single look asks with the last token alone, and adds what it finds to the bigram. In a tale the
# useful question is a longer one, such as *what stood after the word that I have just read?* For that,
# one look must build on another. Positions are needed for it, and they are not enough.

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. show that attention without a mask is blind to order, and say what the causal mask gives away;
# 2. turn a pair of numbers by hand, and say why the score depends on the distance only;
# 3. write rotary angles and the rotation for all heads of a batch;
# 4. say what theta does, and compute how slow the slowest pair is;
# 5. test positions: move everything, and compare.
#
# New words: *position*, *pair*, *angle*, *rotary*, *frequency*, *theta*.

# %%
predict("deep", "We put four looks on top of each other: each one reads what the "
        "one before handed over. How alike are the five words at the end?",
        ["as different as at the start", "more different", "nearly all the same"],
        answer="")

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | query and key turned in opposite directions | the scores change when the whole text moves |
# | only one of the two turned | the same: the place counts, not the distance |
# | pairs formed from other numbers than in training | no error; the model writes nonsense |
# | the new first number used for the second | the arrows change their length |
# | another theta than in training | no error; the loss is higher |
# | angles computed in 16 bits | neighbours far into a text get the same place |

# %% [markdown]
# ## The question for chapter 4
#
# On the ladder one look was not enough. Then let us take several, one on top of the other. How alike are
# two words? The cosine of the angle between their rows tells: 1 means the same direction.

# %%
y, alike = x, {}
for n in range(5):
    unit = nn.functional.normalize(y, dim=-1)             # all of length 1
    alike[n] = ((unit @ unit.T).sum().item() - 5) / 20    # mean over the 20 pairs
    y = look(3 * unit)[0]                                 # about as long as x was
print("looks: mean cosine", {n: round(value, 2) for n, value in alike.items()})
assert alike[0] < 0.3 and alike[4] > 0.95
reveal("deep", "C", "A mixture of mixtures: hardly anything is left of each word's "
       "own numbers.")

# %% [markdown]
# These are random matrices, and yet it shows what mixtures of mixtures tend to do: the words
# become alike. A word must keep what it is, and add what it finds. And so far nothing is *done* with what
# was found. **What else does attention need to become a language model?** That is chapter 4.

# %% [markdown]
# ## Further: two ways to lay out the pairs
#
# Everything from here on can be skipped without loss later.
#
# Nobody prescribes which numbers form a pair. Mistral's own files pair neighbours, 0 with 1. The Hugging
# Face library pairs the two halves of a head: number $i$ with number $i + D/2$. Both are right, for
# weights that were trained or reordered for it. What if weights of one kind meet code of the other?

# %%
def rotate_halves(x, cos, sin):
    """The other layout: pair i is (x[i], x[i + D/2]). Shapes as in rotate."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)            # (B, T, H, D/2) each
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat(turned, dim=-1).type_as(x)


prompt = tokenizer.encode("The golden ring\n", bos=True)
right = ch03.loss_of(model, rows).item()
with swap("rope.rotate", rotate_halves):
    silent = ch03.loss_of(model, rows).item()
    new = mm.generate(model, prompt, 30, temperature=0.7, seed=1)
print(f"loss {right:.2f}, with the wrong pairs {silent:.2f} nats per token")
assert silent > right + 1

# %%
# NBVAL_IGNORE_OUTPUT: what a broken model writes follows every change of its weights
print(textwrap.fill(tokenizer.decode(new), 84))

# %% [markdown]
# No error and no warning; every shape is right. Many words are still words, and the tale is lost. The
# mistake is easily made with real weights, because a model with wrong pairs still looks alive.
#
# The cure: reorder the rows of `wq` and `wk` in each head, so that the numbers of a pair come to lie
# where the other code looks for them. For D = 8 the new order is easily written down.

# %%
def for_halves(weight, n_heads):
    """Rows of wq or wk for the other layout: all even rows, then all odd ones."""
    heads = weight.unflatten(0, (n_heads, -1))            # (H, D, dim)
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1)


rows_of_one_head = torch.arange(8)[:, None]               # D = 8, dim = 1
print("the order of the rows:", for_halves(rows_of_one_head, 1)[:, 0].tolist())

# %%
other = mm.load_model("tales-dense")
for layer in other.layers:
    for linear, heads in ((layer.attention.wq, other.config.n_heads),
                          (layer.attention.wk, other.config.n_kv_heads)):
        linear.weight.data = for_halves(linear.weight.data, heads)
with swap("rope.rotate", rotate_halves), torch.no_grad():
    logits = other(rows[:, :100])
with torch.no_grad():
    assert torch.allclose(logits, model(rows[:, :100]), atol=1e-3)
print("reordered: the same logits as before")

# %% [markdown]
# Values and the output matrix stay as they are, since they are never turned. Scores do not mind the
# reordering, as query and key are reordered alike. The chapter on the real Mistral does this for
# published weights, in both directions.

# %% [markdown]
# ## Further: beyond the trained length
#
# Turned arrows never run out, as a table of places does. So may a text be as long as we like? The
# shipped model was trained on rows of a certain length. We give it rows five times as long, tale after
# tale, and measure the loss along the way.

# %%
length = ch03.trained_length("tales-dense")
print("trained on rows of", length, "tokens")
long = ch03.long_rows(tokenizer, 5 * length, 8)           # (8, 5 * length + 1)
predict("far", "Five stretches of that length. The loss in the last, compared with "
        "the first?",
        ["the same: only distances count, and no table ends",
         "lower: there is more to look at", "much higher"], answer="")

# %%
whole = ch03.loss_of(model, long, every=length).tolist()
for layer in model.layers:
    layer.attention.window = length // 2                  # hide what is further
near = ch03.loss_of(model, long, every=length).tolist()
for layer in model.layers:
    layer.attention.window = None                         # as it was
assert whole[4] > whole[0] + 0.5 and max(near) < near[0] + 0.15
reveal("far", "C", "Looks that reach further back than in training were never "
       "practised.")

# %%
figure, ax = new_figure(7.2, 3.4)
lines_chart(ax, range(1, 6), {"sees everything before": whole,
            f"sees {length // 2} tokens": near}, ylabel="loss (nats per token)",
            xlabel=f"stretch of {length} tokens",
            title="Far keys do the harm, not far places")
ax.set(xticks=range(1, 6), ylim=(0, None))
show(figure, alt="Beyond the trained length the loss rises from "
     f"{whole[0]:.1f} to {whole[-1]:.1f} when the model sees everything; where it "
     f"sees only near tokens, {near[0]:.1f} at first and {near[-1]:.1f} at last.",
     data={"stretch": range(1, 6), "all": whole, "near": near})

# %% [markdown]
# The two measurements belong together. Places as such do no harm: we moved a text by 1000 and
# nothing happened. Keys further back than any in training do, and hiding them brings the old loss back,
# at places five times as far. (We hid all beyond half the length: in a row of 200 tokens the long
# distances are rare and little practised.) A rule that hides what is far away is the subject of the
# chapter on the sliding window. Other cures change the speeds and train on for a while; a larger theta
# is the simplest of them.

# %% [markdown]
# ## Further: why float32
#
# Models compute in 16 bits where they can. In bfloat16 a number has 8 significant bits. What does that
# do to positions?

# %%
far = torch.tensor([255, 256, 257, 258, 259, 1001, 1002, 1003])
print("as they are:", far.tolist())
print("bfloat16:   ", far.bfloat16().int().tolist())
exact = rotary_angles(far, 32, 10_000)[0]
coarse = rotary_angles(far.bfloat16().float(), 32, 10_000)[0]
print(f"largest error of a cosine: {(exact - coarse).abs().max():.2f}")
assert far.bfloat16()[1] == far.bfloat16()[2]

# %% [markdown]
# From 256 on, neighbours fall onto one place. So the library computes angles and the turn itself in
# float32, whatever the dtype of the model. Float32 has an end as well, though a far one: 24 significant
# bits name every position up to 16,777,216.

# %% tags=["try"]
# From which position on does float32 put two neighbours onto one place?
p = 2 ** 24
print(torch.tensor([p - 1, p, p + 1, p + 2]).float().int().tolist())
