# %% [markdown]
# # 6. Generation and cache
#
# **How does a model write, and why need it not read everything again for each word?**
#
# The core takes 45 minutes. The exercises and the sections under *Further*, where you train a model on a
# text of yours, take another hour and three quarters. You need chapter 4; what we borrow is repeated below.
#
# The shapes in this chapter: **B** texts in a batch · **T** query positions · **S** key positions ·
# **K** key/value heads · **D** size of a head · **V** tokens in the vocabulary · **k** tokens kept.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import minimistral as mm
from minimistral.course import (Choice, Slider, bet, check, explore, hint, ladder,
                                mine, predict, reveal, show, verdict)
from minimistral.course.chapters import ch06_generation as ch06
from minimistral.course.panel import wrapped

# %% [markdown]
# ## The headline
#
# In 2024 the press explained why small models are cheap to run. One of its claims is below. Place your
# bet: put one letter between the quotation marks and run the cell. We come back to it with
# measurements.

# %%
bet(11, answer="")

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>What does the model give for a text of T tokens?</summary>
# T rows of V logits: for each position a score for every possible next token.</details>
# <details><summary>What does causality say?</summary>
# A query may attend to a key that is not later than itself.</details>
# <details><summary>What do a key and a value do?</summary>
# The key is what a token can be found by, the value is what it hands over when it is found.</details>

# %% [markdown]
# ## One distribution, many texts
#
# A language model does not write. It reads a text and says how likely each token is to come next. Here are
# two places in one tale. At the first, anything could follow that is a place in this world. At the
# second, the tale has long decided.

# %%
model = mm.load_model("tales-dense")
tokenizer = mm.load_tokenizer("tales-dense")
open_place = ch06.CONTEXTS["one of five places"]
settled = ch06.CONTEXTS["a thing we know"]

for text in (open_place, settled):
    chances = ch06.next_logits(model, tokenizer, text).softmax(-1)      # (V,)
    print("…", *text.split()[-6:])
    for token in chances.topk(6).indices.tolist():
        print(f"{tokenizer.decode([token]):>34}   {chances[token]:.3f}")
assert chances.max() > 0.9
predict("greedy", "From the start of a text we always take the likeliest token, "
        "and do so 200 times over. How many different tales?",
        ["200", "about 5, one for each language", "1"], answer="")

# %% [markdown]
# So somebody has to choose. Here is the whole loop of writing, in its simplest form: read the text,
# choose a token, append it, begin again. `choose` is a function of the last row of logits. A text begins
# with the token `<s>`, whose id is `tokenizer.bos_id`.

# %%
@torch.no_grad()
def write_rereading(ids, n, choose):
    """Continue ids by n tokens. Everything is read again for each of them."""
    ids = list(ids)
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0, -1]        # (V,), the last row
        ids.append(int(choose(logits)))
    return ids


start = [tokenizer.bos_id]
tales = {tokenizer.decode(write_rereading(start, 40, torch.argmax))
         for _ in range(3)}
assert len(tales) == 1
print(wrapped(*tales))
reveal("greedy", "C", "The largest of the same numbers is the same each time.")

# %% [markdown]
# Always the likeliest is called **greedy**. It is right where one answer is right: the name of the
# holder, a sum, the end of a line of code. As a storyteller it knows one story.
#
# **In short:** the model gives a distribution. What becomes of it is decided outside the model.

# %% [markdown]
# ## To draw a token
#
# Instead of the likeliest we can draw: a token with probability 0.3 should come in three of ten cases. A
# computer's chance gives a number between 0 and 1, each as likely as any other. How do we get from such a
# number to a token? By hand, with three places.

# %%
places, chances = ["mill", "garden", "tower"], torch.tensor([0.5, 0.2, 0.3])
print(dict(zip(places, [round(c, 2) for c in chances.cumsum(0).tolist()])))
predict("lands", "The line from 0 to 1 is cut into pieces of these lengths, in "
        "this order. Chance gives 0.60. Which place is it?",
        ["mill: it is the likeliest", "garden",
         "tower: 0.60 is nearest to 0.3 + 0.3"], answer="")

# %%
running = chances.cumsum(0)                               # 0.5, 0.7, 1.0
landed = int((running > 0.60).nonzero()[0])               # the first sum above it
show(ch06.line_picture(places, chances, 0.60), alt="The line from 0 to 1 is cut "
     "into mill up to 0.5, garden up to 0.7 and tower up to 1; the number 0.6 "
     "falls into garden.")
assert places[landed] == "garden"
reveal("lands", "B", "0.60 lies between 0.5 and 0.7. The garden is the first place "
       "whose running sum passes it.")

# %% [markdown]
# ### Your turn: draw
#
# Do it for a batch: each row has its probabilities and its own number. Choose the token at which the
# running sum becomes **greater** than the number, so that a token with probability 0 is never chosen,
# not even by the number 0. Rounded probabilities may sum to a little less or more than 1; so first
# multiply each number by the last running sum of its row. Example: `[[0.5, 0.2, 0.3]]` with `[0.6]`
# gives `[1]`. The result is int64, one token for each row.

# %% tags=["your-turn"]
def draw(probabilities, uniforms):
    """One token for each row, chosen by the row's number.

    probabilities: (B, V), uniforms: (B,) in [0, 1) -> int64 (B,)
    """
    running = ...     # (B, V), best in float64
    target = ...      # (B, 1)
    return ...        # (B,)


check("draw", draw)

# %% [markdown]
# If you are stuck, `hint("draw")` gives one step at a time. The library's version uses `searchsorted`,
# which finds a place in sorted numbers; with `right=True` it finds the first that is greater.

# %%
# minimistral/sampling.py
# show: draw

# %% [markdown]
# Ten thousand draws from the real distribution of the open place should come out as the model said.

# %%
chances = ch06.next_logits(model, tokenizer, open_place).softmax(-1)
uniforms = torch.rand(10_000, generator=torch.Generator().manual_seed(1))
drawn = draw(chances.expand(10_000, -1), uniforms)        # (10000,)
for token in chances.topk(5).indices.tolist():
    share = (drawn == token).float().mean().item()
    word = tokenizer.decode([token])
    print(f"{word:>9}   model {chances[token]:.3f}   drawn {share:.3f}")
    assert abs(share - chances[token]) < 0.02             # four standard errors

# %% [markdown]
# **In short:** to draw is to cut a line into pieces and to see where a number falls. A *seed*, here 1, is
# what the row of random numbers starts from. The same seed gives the same numbers, and so the same text.

# %% [markdown]
# ## Temperature
#
# Between always the likeliest and fair draws there is a dial. The logits are divided by a number, the
# **temperature** $t$, before the softmax:
#
# $$ p_i = \frac{e^{\,z_i / t}}{\sum_j e^{\,z_j / t}} $$
#
# In words: divide every score, then make shares as always. Three scores by hand.

# %%
z = torch.tensor([2.0, 1.0, 0.0])
for t in (0.5, 1.0, 2.0):
    p = (z / t).exp() / (z / t).exp().sum()
    print(f"t = {t}:", [round(share, 2) for share in p.tolist()])
predict("late", "A colleague divides the probabilities by 2 instead, and makes "
        "them sum to 1 again. What does that do?",
        ["the same as t = 2", "it sharpens instead", "nothing at all"], answer="")

# %%
p = z.softmax(0)
assert torch.allclose((p / 2) / (p / 2).sum(), p)
logits = ch06.next_logits(model, tokenizer, ch06.CONTEXTS["one of many names"])
names = [tokenizer.decode([i]).strip() for i in logits.topk(12).indices.tolist()]
figure, data = ch06.temperatures_picture(logits, names, [0.3, 1.0, 2.0])
show(figure, alt="The twelve likeliest names after “One morning”: at temperature "
     "0.3 the first one has about half of the probability, at 2 all are nearly "
     "level.", data=data)
reveal("late", "C", "All shares are halved, and the sum puts it back. Temperature "
       "belongs to the logits.")

# %% [markdown]
# Below 1 the likely becomes likelier; towards 0 it becomes greedy. Above 1 the differences shrink. A
# little more courage makes for more interesting tales, one might think. We have a judge for that: the
# grammar of the tales, which accepts a tale or says where it stops being one. `mm.generate` is the
# library's loop for many texts at once; with `stop_ids` a text ends at the token `</s>`, of which more below.

# %%
def write(n, **options):
    """n tales from the very start, drawn with seeds 1, 2, 3, ..."""
    rows = mm.generate(model, [start] * n, 160, seed=1, stop_ids=[tokenizer.eos_id],
                       **options)
    return [tokenizer.decode(row) for row in rows]


fair = write(48, temperature=1.0)
print(wrapped(fair[0]))
share = ch06.judged(fair)[0]
predict("bold", f"At temperature 1 the grammar accepts {share:.0%} of 48 tales. "
        "And at 1.5?", ["about as many", "two thirds", "not even half"], answer="")

# %%
bold = write(48, temperature=1.5)
shares = {"t = 1": ch06.judged(fair)[0], "t = 1.5": ch06.judged(bold)[0]}
tokens = sum(len(tokenizer.encode(text)) for text in fair) / len(fair)
print({name: round(share, 2) for name, share in shares.items()})
print(wrapped(next(text for text in bold if not ch06.judged([text])[0])))
assert shares["t = 1"] > 0.85 and shares["t = 1.5"] < 0.5
reveal("bold", "C", f"A tale has some {tokens:.0f} tokens, and one slip spoils it.")

# %% [markdown]
# Where do the slips come from? Not from the second or third choice. Let us call a token *rare* if the model
# itself, at temperature 1, gives it less than one in a thousand. Nearly all tokens are rare at nearly
# every place: a long, thin **tail**. How much probability lies in the tail altogether?

# %%
p = ch06.next_logits(model, tokenizer, open_place).softmax(-1)          # (V,)
print(int((p < 0.001).sum()), "of", len(p), "tokens are rare in the open place")
heard = ladder.corpus.val_documents[:16]
for t in (1.0, 1.5):
    tail, clean = ch06.tail_per_token(model, tokenizer, heard, t)
    print(f"t = {t}: one token in {1 / tail:6,.0f} comes from the tail; "
          f"a whole tale without any: {clean:.2f}")
    assert ((tail < 0.003 and clean > 0.8) if t == 1.0 else
            (tail > 0.005 and clean < 0.6))

# %% [markdown]
# At temperature 1 the tail hardly matters. At 1.5 no single one of its tokens is likely even now, but there
# are hundreds of them at every step, and a tale has many steps. So the second number, the share of tales
# without any, foretells what the grammar counted.
#
# **In short:** temperature moves probability from the likely tokens to the tail; small shares at
# each step become large ones in a text.

# %% [markdown]
# ## Cutting the tail
#
# If the tail does the damage, cut it off. The simplest cut keeps the **k** tokens with the largest
# logits, whatever these are.
#
# ### Your turn: the k largest
#
# All other logits become minus infinity, which the softmax turns into exactly 0. Kept logits stay at their
# places, unchanged. Exactly k are kept, even where several are equal (it doesn't matter which of these);
# if k is more than V, all are. Example: `[[1., 3., 2.]]` with k = 2 gives `[[-inf, 3., 2.]]`.

# %% tags=["your-turn"]
def keep_top_k(logits, k):
    """Leave the k largest logits of each row, the others become -inf.

    logits: (B, V) -> (B, V)
    """
    return ...


check("keep_top_k", keep_top_k)

# %%
# minimistral/sampling.py
# show: keep_top_k

# %% [markdown]
# `topk` finds the places, `scatter` writes the kept logits into a row of minus infinities. And which k? We
# count how many tokens the model needs to have 99% of the probability, at three places of a tale.

# %%
for name, text in ch06.CONTEXTS.items():
    p = ch06.next_logits(model, tokenizer, text).softmax(-1)            # (V,)
    ordered = p.sort(descending=True)[0]
    needed = int((ordered.cumsum(0) < 0.99).sum()) + 1
    print(f"{name:20} 99% of the probability in {needed:3} "
          f"token{'s' * (needed > 1)}")
    assert needed < 4 if name == "a thing we know" else needed >= 4
predict("fit", "Which k suits all three places?",
        ["5", "10", "none"], answer="")

# %% [markdown]
# A k of 5 forbids most of the names, and a k of 10 lets nine wrong things into the place where one is
# right. The places differ, so the number of tokens should, too. Instead we can say how much of the
# **probability** to keep: that is top-p, also called nucleus sampling (Holtzman and others, 2020). By hand:

# %%
p = torch.tensor([0.45, 0.30, 0.15, 0.10])                # the likeliest first
before = p.cumsum(0) - p                                  # the sum of likelier ones
print("before:", [round(b, 2) for b in before.tolist()])
kept = p.masked_fill(before > 0.6, 0.0)                   # top-p with p = 0.6
print("kept:  ", [round(x, 2) for x in (kept / kept.sum()).tolist()])
reveal("fit", "C", "One, five and a dozen tokens are wanted. 0.45 alone is not yet "
       "0.6, so the second token crosses the line, and it is kept as well.")

# %% [markdown]
# ### Your turn: the nucleus
#
# Keep the likeliest tokens of each row until their sum passes p, the one that crosses p included. So at
# least one token is always kept. Give the others probability 0 and scale what is left to sum to 1. The rows
# do not come sorted, and each token must be at its old place in the result. A sum of exactly p may count
# as passed or not. Example: `[[0.15, 0.45, 0.10, 0.30]]` with p = 0.6 gives `[[0, 0.6, 0, 0.4]]`.

# %% tags=["your-turn"]
def keep_top_p(probabilities, p):
    """Leave the likeliest tokens until their sum passes p, scaled to sum to 1.

    probabilities: (B, V) -> (B, V)
    """
    ordered, order = ...   # the likeliest first, and where each came from
    before = ...           # the sum of likelier tokens
    return ...             # cut, scale, and put everything back to its place


check("keep_top_p", keep_top_p)

# %%
# minimistral/sampling.py
# show: keep_top_p

# %% [markdown]
# `order` says where each sorted number came from, and `scatter` puts it back there. Now the three steps
# come together, and their order matters: temperature first, then the cuts. Were it the other way round,
# the temperature could no longer change who is kept.

# %%
# minimistral/sampling.py
# show: next_distribution, check_sampling

# %% [markdown]
# A question for the explorer. After *found a golden ring in the*, the world of the tales allows exactly five
# places. **Which setting keeps these five, also at temperature 1.5, and still suits the other two
# contexts?** Outlined bars are the model's own probabilities, filled ones what is drawn from.

# %% tags=["try"]
explore(ch06.cuts_explorer(model, tokenizer),
        context=Choice(list(ch06.CONTEXTS), "one of five places"),
        temperature=Slider(0.1, 2.0, 1.5, 0.1),
        top_k=Choice(["off", 1, 2, 3, 5, 8, 10, 15, 20]),
        top_p=Choice(["off", 0.5, 0.8, 0.9, 0.95, 0.98]),
        settings=[{"temperature": 1.5, "top_k": "off", "top_p": "off"},
                  {"temperature": 1.5, "top_k": 5, "top_p": "off"},
                  {"context": "one of many names", "temperature": 1.5, "top_k": 5}])

# %% [markdown]
# The same as plain code: how many tokens remain, for four settings and three places. In the last row the
# cut is made at temperature 1 and only then the temperature is raised.

# %%
rows = torch.stack([ch06.next_logits(model, tokenizer, text)
                    for text in ch06.CONTEXTS.values()])                # (3, V)
late = keep_top_p(rows.softmax(-1), 0.9)                                # cut first
remain = {"t = 1.5, no cut": next_distribution(rows, 1.5),
          "t = 1.5, top-k 5": next_distribution(rows, 1.5, top_k=5),
          "t = 1.5, top-p 0.9": next_distribution(rows, 1.5, top_p=0.9),
          "top-p 0.9, then t = 1.5": (late.log() / 1.5).softmax(-1)}
for name, p in remain.items():
    print(f"{name:24}", (p > 0).sum(-1).tolist())
first, last = remain["t = 1.5, top-p 0.9"], remain["top-p 0.9, then t = 1.5"]
assert ((first > 0).sum(-1) >= (last > 0).sum(-1)).all()

# %% [markdown]
# The three numbers are the three places: one, five and many. With top-p each place keeps what suits it, so
# top-p is the answer to the question.
#
# Does the cut save the bold tales? We write 48 at temperature 1.5 with each cut. And because it is tempting
# to judge a setting by a handful of texts, the last column shows six handfuls of eight: how many of
# each were accepted.

# %%
written = {"no cut": bold, "top-k 10": write(48, temperature=1.5, top_k=10),
           "top-p 0.9": write(48, temperature=1.5, top_p=0.9)}
print("t = 1.5     accepted  different   in each eight")
for name, texts in written.items():
    share, different = ch06.judged(texts)
    print(f"{name:10}  {share:8.0%}  {different:9}   {ch06.in_groups(texts)}")
accepted = {name: ch06.judged(texts)[0] for name, texts in written.items()}
assert accepted["top-p 0.9"] > max(0.8, accepted["no cut"] + 0.3)
assert any(max(g) - min(g) >= 2 for g in map(ch06.in_groups, written.values()))

# %% [markdown]
# The nucleus keeps the courage at the open places and cuts the tail everywhere; the fixed k is between
# the two. And look at the handfuls: with eight texts one can call the same setting good or bad. To
# compare two settings, write many texts, with the same seeds.
#
# **In short:** temperature says how bold, a cut says how far out; top-p adapts its cut to the place.

# %% [markdown]
# ## When to stop
#
# Our loop wrote as many tokens as we asked for. But a tale ends. The model says so with a token of its
# own, `</s>`, with which every text of its training ended. What if we do not listen?

# %%
onward = write_rereading(start, 100, torch.argmax)
end = onward.index(tokenizer.eos_id)
assert end < 95
print(wrapped(tokenizer.decode(onward[:end])))
predict("after", "The next tokens come after </s>, without <s> and a title. What "
        "are they?", ["the model repeats </s>", "a new tale, well formed",
                      "something it never learned to write"], answer="")

# %%
# NBVAL_IGNORE_OUTPUT: what an untrained habit gives depends on the last digits
print(wrapped(repr(tokenizer.decode(onward[end + 1:]))))
reveal("after", "C", "In training no loss was taken for what follows </s>. It may "
       "look like a tale, but nothing was ever learned for this place.")

# %% [markdown]
# A model cannot stop by itself; the loop around it has to. It watches for **stop tokens** and leaves them
# out of the result. Forget that, and every answer of a chat is followed by a conversation of the model
# with itself.
#
# **In short:** to stop is the loop's business, and `</s>` is the model's only way to ask for it.

# %% [markdown]
# ## Reading everything again
#
# Now look at the loop once more with a meter. `ch06.counting` counts the tokens that go through the
# model.

# %%
with ch06.counting(model) as count:
    write_rereading(start, 50, torch.argmax)
print("50 tokens written,", count["tokens"], "tokens read")
predict("reads", "And to write 200?",
        ["about 5,000: four times as many", "about 20,000",
         "about 40,000: 200 times 200"], answer="")

# %%
for n in (50, 100, 200):
    with ch06.counting(model) as count:
        write_rereading(start, n, torch.argmax)
    print(f"{n:4} tokens written, {count['tokens']:6,} read: {n} · {n + 1} / 2")
    assert count["tokens"] == n * (n + 1) // 2
reveal("reads", "B", "1 + 2 + 3 + ... + 200. Twice the text is four times the "
       "work.")

# %% [markdown]
# The sum of 1 to $n$ grows with $n^2$. So each token costs more than the one before it. The other
# line of the figure is where we want to get: what the same token costs with the cache that we are
# about to build.

# %%
# NBVAL_IGNORE_OUTPUT: times differ by machine
lengths = [64, 128, 256, 512, 1024]
again, kept = ([1000 * ch06.time_of_a_token(model, n, cached) for n in lengths]
               for cached in (False, True))
show(ch06.growth_picture(lengths, again, kept), alt="From 64 to 1024 tokens the "
     f"time for one more token grows {again[-1] / again[0]:.0f} times; with a "
     "cache it stays nearly level.",
     data={"tokens": lengths, "again, ms": again, "cache, ms": kept})
assert again[-1] > 4 * again[0] and again[-1] > 4 * kept[-1]

# %% [markdown]
# ## What need not be computed again
#
# Between two steps of the loop the text grows by one token, at its end. Which of the numbers inside the
# model change? We keep the keys of every layer, once for a text and once for the same text with one more
# token.

# %%
@torch.no_grad()
def keys_of(ids):
    """The keys of every layer, before they are rotated. -> L tensors (T, K * D)"""
    found = []
    hooks = [layer.attention.wk.register_forward_hook(
                 lambda module, x, keys: found.append(keys[0]))
             for layer in model.layers]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


text = onward[:60]
shorter, longer = keys_of(text[:-1]), keys_of(text)
predict("keys", "59 tokens, then the same and a 60th. How many of the first 59 "
        "keys change?",
        ["all of them, except in the first layer", "some near the end",
         "none, in any layer"], answer="")

# %%
for layer, (a, b) in enumerate(zip(shorter, longer)):
    change = (b[:-1] - a).abs().max()
    print(f"layer {layer}: largest change of an old key {change:.4f}, "
          f"new keys: {len(b) - len(a)}")
    assert torch.allclose(a, b[:-1], atol=1e-4)
reveal("keys", "C", "An old token cannot look at a new one. That is causality, "
       "in every layer.")

# %% [markdown]
# Nothing old changes. So the old keys and values can be kept, and only the new token has to go through the
# model. Its query meets all keys, the kept ones and its own. The old *queries* are not needed again: each
# was used when its token was read.
#
# ### Your turn: remember
#
# Write the memory of one layer. `kept` is None at first, later what you returned last time: all keys,
# values and positions so far. Append the new ones at the end of the text's axis and return all three.
# Shapes: keys and values (B, S, K, D), positions (B, S). Example: with 5 tokens kept and 1 new you return
# three tensors with 6 along axis 1.

# %% tags=["your-turn"]
def remember(kept, k, v, positions):
    """Append the new keys, values and positions to the kept ones, if any.

    kept: None or (keys, values, positions) -> (keys, values, positions)
    """
    return ...


check("remember", remember)

# %% [markdown]
# Here is a whole cache with that idea, plain and growing. The model asks little of it: a memory for each
# layer, the number of tokens seen, and two calls around each pass. `make_room` says how far the text will
# reach, `advance` that the new tokens have been read. Does the model now say the same, token by token, as
# if it read everything at once?

# %%
class PlainLayer:
    kept = None

    def update(self, k, v, positions):              # (B, T, K, D) twice, (B, T)
        new = (k, v, positions)
        self.kept = new if self.kept is None else tuple(
            torch.cat(pair, dim=1) for pair in zip(self.kept, new))
        return self.kept                            # what the queries may need


class PlainCache:
    def __init__(self, n_layers):
        self.layers = [PlainLayer() for _ in range(n_layers)]
        self.length = torch.zeros(1, dtype=torch.int64)   # tokens seen, per text
        self.end = 0                                      # how far the text reaches

    def make_room(self, end):                             # before a pass
        self.end = end

    def advance(self, positions):                         # after a pass
        self.length += positions.shape[1]

# %%
cache, ids = PlainCache(len(model.layers)), torch.tensor([text])        # (1, T)
with torch.no_grad():
    at_once = model(ids)                                                # (1, T, V)
    one_by_one = torch.cat([model(ids[:, t:t + 1], cache)
                            for t in range(len(text))], 1)
difference = (at_once - one_by_one).abs().max().item()
print(f"largest difference of {at_once.numel():,} logits: {difference:.4f}")
assert difference < 1e-3

ours = ch06.operations(model, ids[:, -1:], cache)
print(f"the last token: {ch06.operations(model, ids):,} operations without the "
      f"cache, {ours:,} with it")

# %% [markdown]
# Cached equals uncached, and the 60th token costs a sixtieth. (Counted are the matrices. The looks at the
# kept keys come on top; exercise 6 counts those.) How does the model know that the single token it gets is
# the 60th? By its **position**, which it takes from the cache: the tokens continue after what the cache has
# seen.

# %% [markdown]
# Break it on purpose: we give every new token position 0, as a loop does that forgets where it is. No
# error, no wrong shape.

# %% tags=["try"]
wrong = PlainCache(len(model.layers))
with torch.no_grad():
    logits = model(ids[:, :30], wrong)              # the first 30 are read well
    for t in range(30, 60):
        logits = model(ids[:, t:t + 1], wrong, positions=torch.tensor([0]))
for name, row in (("right", at_once[0, -1]), ("wrong", logits[0, -1])):
    likeliest = row.topk(4).indices.tolist()
    print(f"{name}: next", [tokenizer.decode([i]) for i in likeliest])
assert (logits[0, -1] - at_once[0, -1]).abs().max() > 1

# %% [markdown]
# Now `mine()` writes: the shipped model, with your `draw` and your cuts if they have passed.
#
# **In short:** keep keys and values, and each token goes through the model once: n tokens read instead of
# about n²/2.

# %% tags=["try"]
my_model = mine()
print(my_model.write("The old lantern\n", temperature=1.2, top_p=0.9, seed=6))
my_model

# %% [markdown]
# ## The verdict on the headline

# %%
rereading = ch06.operations(model, torch.tensor([onward[:100]]))
weights = sum(w.numel() for n, w in model.named_parameters()
              if w.dim() == 2 and "emb" not in n)
print(f"tales-dense: {weights:,} weights in matrices; token 100 costs {ours:,}")
print(f"operations with the cache, and {rereading // ours} times as many without")
for name in ("mistral-7b-v0.1", "llama-2-13b", "mixtral-8x7b-v0.1"):
    count = mm.count_parameters(mm.MODELS[name])
    print(f"{name:18} {count.total / 1e9:5.1f} billion weights,",
          f"{count.active / 1e9:5.1f} at work")
assert ours == 2 * weights and rereading == 100 * ours
verdict(11, "true with a condition", "Dense models: every matrix works for each "
        "token, but thanks to the cache on one position only. A mixture uses a "
        "part of its weights.")

# %% [markdown]
# We counted exactly two operations, a product and a sum, for each weight of each matrix; only of the
# embedding table a single row is read. So for a dense model the claim holds, for *one* token. What the
# claim leaves out made writing affordable: the text before is not computed again. And in a mixture of
# experts (chapter 9) most weights rest.
#
# A careful writer would have written: *A dense model uses nearly all its weights for each new token, and a
# bigger one therefore costs more; the tokens before are remembered, not recomputed. Mixtures use only a
# part.*

# %% [markdown]
# ## The ladder
#
# This chapter trains nothing: the rung is the shipped model, the same architecture as chapter 4's, trained
# far longer. The scoreboard judges at temperature 1 and without cuts. Would cuts improve the loss?

# %%
display(ladder.run("the shipped tales-dense", ch06.shipped(), chapter=6))
held_out = torch.tensor([tokenizer.encode(heard[1], bos=True, eos=True)])
with torch.no_grad():
    rows = model(held_out[:, :-1])[0]                     # (T, V)
for name, options in {"no cut": {}, "top-k 2": {"top_k": 2}}.items():
    p = next_distribution(rows, 1.0, **options)
    nats = -p[torch.arange(len(p)), held_out[0, 1:]].log().mean()
    print(f"one tale, {name}: {nats:.2f} nats per token")
assert nats == float("inf")

# %% [markdown]
# A cut gives probability 0 to tokens that do occur, and one of them makes the loss infinite. So cuts have
# no honest place on this scoreboard: they are ways of *writing* with a model, not better models. What
# they buy is in the table of 48 tales above.

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. draw a token by hand, and say what temperature, top-k and top-p do to a distribution;
# 2. say why a small tail ruins long texts, and cut it;
# 3. write the loop around a model, with stop tokens and a seed;
# 4. say why writing costs n² without a cache, and count it;
# 5. build a cache and prove that nothing changes.
#
# New words: *greedy*, *seed*, *temperature*, *tail*, *top-k*, *top-p*, *stop token*, *cache*.

# %%
real = mm.MODELS["mistral-7b-v0.1"]
alone = replace(real, n_kv_heads=real.n_heads)      # a key for every query head
gigabytes = 32_768 * mm.cache_bytes_per_token(alone) / 1e9
predict("bytes", "The weights of Mistral 7B are 14.5 GB. With keys and values for "
        "each of its 32 heads, how large is the cache of a text of 32,768 tokens?",
        ["0.2 GB", "2 GB", "17 GB"], answer="")

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | probabilities divided by the temperature | the dial does nothing |
# | the cut before the temperature | bold settings stay timid |
# | ties with a threshold | more than k tokens are kept |
# | the crossing token dropped | a sure place keeps nothing: NaN |
# | no stop token | the text goes on after its end |
# | position forgotten with a cache | no error; the text falls apart |
# | a setting judged by one text | the next seed says the opposite |

# %% [markdown]
# ## The question for chapter 7
#
# The cache trades computing for memory. How much memory?

# %%
assert 16 < gigabytes < 18
assert mm.cache_bytes_per_token(alone) == 32 * 32 * 2 * 128 * 2      # half a MB
shared = 32_768 * mm.cache_bytes_per_token(real) / 1e9
reveal("bytes", "C", f"{gigabytes:.1f} GB, more than the weights, for one text and "
       f"one reader. Mistral 7B needs {shared:.1f} GB.")

# %% [markdown]
# Where do the 17 GB come from? Each of 32 layers keeps a key and a value of 128 numbers for each of 32 heads,
# and a number takes 2 bytes: half a megabyte for every token. Mistral 7B needs a quarter of that. How much
# memory can be saved when heads share keys and values? That is chapter 7.

# %% [markdown]
# ## Further: several prompts at once
#
# Everything from here on can be skipped without loss later.
#
# Prompts differ in length, and a batch is a rectangle. The shorter ones are filled up on the right with
# tokens that are not there: **padding**, with position -1. One rule makes them invisible.

# %%
# minimistral/attention.py
# show: not_padding

# %%
# minimistral/generate.py
# show: as_prompts, read_prompts

# %% [markdown]
# Each row's next logits stand at the end of its own prompt, not at the end of the rectangle. A prompt in a
# batch must write what it writes alone. And if we pad with ordinary tokens instead, with full stops? (The
# first prompt is the longest; nothing is filled up there.)

# %%
prompts = [tokenizer.encode(t, bos=True)
           for t in ("The old key\nOne", "Der alte", "")]
together = mm.generate(model, prompts, 12)
alone = [mm.generate(model, p, 12) for p in prompts]
print("as alone:", [a == b for a, b in zip(together, alone)])
longest = max(map(len, prompts))
filled = [p + tokenizer.encode(".") * (longest - len(p)) for p in prompts]
print("padded with full stops:",
      [a == b for a, b in zip(mm.generate(model, filled, 12), alone)])
assert together == alone

# %% [markdown]
# ## Further: the rest of the loop
#
# `generate` collects, `stream` hands out each token as soon as it is chosen. The choice itself is made on
# the processor, so that a seed gives the same draws on every device; row i of a batch draws with seed + i,
# as it would alone. First where a model finds its positions.

# %%
# minimistral/model.py
# show: find_positions

# %% [markdown]
# And this is the loop of the library. It does for a batch what we did for one text: read the prompts into a
# cache, then choose and read one token for each row, until all have stopped. (Its cache, `KVCache`, keeps
# its memory in place instead of copying it; chapter 8 builds it, where it also learns to forget. Skip the two
# lines marked for chapter 11: they let all cores of the processor share a product, with the same result.
# `inference_mode` is `no_grad` with less book-keeping.)

# %%
# minimistral/generate.py
# show: decode

# %%
# minimistral/generate.py
# show: choose, row_generator

# %%
# minimistral/generate.py
# show: generate, stream

# %% [markdown]
# A stream of tokens is not a stream of letters. A rare letter may be cut into bytes that belong to
# two tokens, and half a letter cannot be shown. Wait until the bytes are whole.

# %%
byte_tokens = tokenizer.encode("φ")                 # no merge knows this letter
print(len(byte_tokens), "tokens;", "half:", tokenizer.decode(byte_tokens[:1]),
      "whole:", tokenizer.decode(byte_tokens))
assert len(byte_tokens) == 2

ids, told = [], ""
for token in mm.stream(model, prompts[1], 12):
    ids.append(token)
    whole = tokenizer.decode(ids)
    if not whole.endswith("\ufffd"):               # half a letter: wait
        print(whole[len(told):].strip(), end=" | ")
        told = whole

# %% [markdown]
# ## Further: your own Mistral
#
# Twenty minutes, most of them waiting. Take any text of yours in UTF-8: letters, notes, a book, half a
# megabyte or more if you have it. In a terminal:
#
# ```
# minimistral train --corpus my-text.txt --out my-mistral --minutes 10
# minimistral postcard my-mistral --out card.html
# ```
#
# The second command writes one page that you can open, print or send: the loss curve above what is
# known, the best of a few samples, and a model card. It holds no script, and of your text only what the
# model writes; names in it may come back word for word, so read the sample before you send it.

# %%
# NBVAL_IGNORE_OUTPUT: a model trained in this run
folder = Path(tempfile.mkdtemp())
tales = [d for d in ladder.corpus.train_documents if d.startswith("The ")]
(folder / "my-text.txt").write_text("\n\n".join(tales)[:60_000], "utf-8")
ch06.command(f"minimistral train --corpus '{(folder / 'my-text.txt').as_posix()}' "
             f"--out '{(folder / 'my-mistral').as_posix()}' --steps 40 --dim 64 "
             "--layers 2 --vocab-size 400 --batch-size 8 --seq-len 64 --lr 1e-2 "
             "--device cpu")
ch06.command(f"minimistral postcard '{(folder / 'my-mistral').as_posix()}' "
             f"--out '{(folder / 'card.html').as_posix()}' --title 'Forty steps'")
card = (folder / "card.html").read_text("utf-8")
ch06.Framed(card)

# %% [markdown]
# Forty steps are soon done, so this model is a beginner. Two dashed lines say what is known
# without a model: the loss of somebody who knows nothing, and of somebody who knows how often each
# token occurs. Whatever lies below the second line was learned from the order of the tokens.

# %%
print("one file, no scripts:", "<script" not in card and "http" not in card)
print("the folder is not in it:", folder.name not in card)
names = ("Data", "Tokens read", "Parameters", "Versions")
print([name for name in names if name in card])
assert "<script" not in card and "http" not in card and folder.name not in card
