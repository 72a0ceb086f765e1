# %% [markdown]
# # 8. The sliding window
#
# **Can a model with a short memory read a long text?**
#
# The core takes 60 minutes. The exercises and the sections under *Further* take another hour and a
# quarter.
# You need chapters 6 and 7; what we borrow from them is repeated below.
#
# The shapes in this chapter: **B** texts in a batch · **T** query positions · **S** key positions ·
# **H** query heads · **K** key/value heads · **D** size of a head · **L** layers · and **W**, the
# window: how many keys a query sees.

# %%
from dataclasses import replace

import torch

import minimistral as mm
from minimistral import attention as library
from minimistral.cache import KVCache, LayerCache
from minimistral.course import (Slider, bet, check, explore, hint, ladder, mine,
                                predict, reveal, show, swap, verdict)
from minimistral.course.chapters import ch02_attention as ch02
from minimistral.course.chapters import ch08_sliding_window as ch08
from minimistral.course.panel import wrapped

# %% [markdown]
# ## The headlines
#
# The window is what Mistral's first model was famous for, so the press wrote about it a lot. Here are
# four claims. Place your bets: a letter between each pair of quotation marks. The second one is about a
# piece of code that was printed with an article; we rebuild it in our own words and test it.

# %%
for number, answer in {1: "", 2: "", 3: "", 4: ""}.items():
    display(bet(number, answer=answer))

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>What does a cache keep, and what does True mean in a mask?</summary>
# The keys and values of all tokens so far, with their positions. True means: may attend.</details>
# <details><summary>How does the cache of a text grow?</summary>
# By the same number of bytes for each token, without end.</details>
# <details><summary>What do rotary positions make a score depend on?</summary>
# On the distance between query and key, not on where in the text the two stand.</details>

# %% [markdown]
# ## A text that does not end
#
# The shipped model writes tales of some eighty tokens. Its training showed it rows of 200 tokens, so about
# two and a half tales in a row. Now we let it read one tale after the other, for 1,600 tokens: twenty
# tales, each of them as easy as the first. At every place we ask how well it predicts the next token.

# %%
model, tokenizer = mm.load_model("tales-dense"), mm.load_tokenizer("tales-dense")
long_rows = ch08.many_tales(tokenizer, rows=4, length=1601)   # (B, T + 1)
print(wrapped(tokenizer.decode(long_rows[0, :60].tolist())))
predict("long", "The loss is 0.5 nats per token over the first 200 tokens. What "
        "is it over the last 200?", ["a little lower: more context helps",
        "0.5: each tale is as easy as the first", "above 3: nearly a guess"],
        answer="")

# %%
places = list(range(100, 1600, 200))                      # middles of stretches
sight = {"no window": ch08.nats_by_place(model, long_rows, tokenizer.eos_id, 200)}
print("no window:", [round(x, 2) for x in sight["no window"]])
assert sight["no window"][0] < 0.7 and sight["no window"][-1] > 3
display(reveal("long", "C", "Beyond the lengths of its training it falls apart."))
predict("cut", "Now the same weights, but each query sees the last 64 keys only. "
        "The loss over the last 200 tokens?", ["higher still: it cannot look back",
        "about 0.5, as at the beginning", "about 2: half repaired"], answer="")

# %% [markdown]
# More memory, and a worse model. Its looks have never met a key that stands 500 tokens back, nor a softmax
# over a thousand keys, and nobody trained them for it.
#
# So we try the opposite. The same weights, not trained further; but each query sees the last 64 keys only.
# That is one number in the configuration, `sliding_window`.

# %%
short = mm.Transformer(replace(model.config, sliding_window=64))
short.load_state_dict(model.state_dict())
short.eval()
sight["window 64"] = ch08.nats_by_place(short, long_rows, tokenizer.eos_id, 200)
show(ch08.collapse_picture(places, sight, trained=200), alt="Without a window the "
     f"loss rises from {sight['no window'][0]:.2f} to {sight['no window'][-1]:.2f} "
     "along 1,600 tokens; with a window of 64 it stays level at about 0.5.",
     data={"position": places, **sight})
assert max(sight["window 64"]) < 0.7
reveal("cut", "B", "A query meets distances from 0 to 63, at every place of the "
       "text. All of these it knows from training.")

# %% [markdown]
# That answers the chapter's question for this text: a model with a short memory can read it, and one with a
# long memory could not. What does the short memory cost on a *short* text? There the whole tale would be in
# sight. We measure the same weights with several windows on the ladder's validation tales.

# %% tags=["try"]
costs = {W: ch08.nats_per_byte(ch08.with_window(model, W))
         for W in (4, 16, 64, None)}                      # try 32 and 96
for W, loss in costs.items():
    print(f"window {W or 'none':>4}: {loss:.3f} nats per byte")
assert costs[4] > 5 * costs[64] and costs[None] < costs[64] < 1.1 * costs[None]
assert 1.7 < costs[16] / costs[None] < 2.2

# %% [markdown]
# With 4 keys the model is a ruin. With 64, which is most of a tale, it is nearly as good as with all.
#
# **In short:** what a query cannot see costs quality; what it has never learned to see costs more.

# %% [markdown]
# ## Who sees whom
#
# Now exactly. A window of W: the query at position i sees the key at position j if
#
# $$ 0 \le i - j < W $$
#
# In words: the key is not later than the query (that is *causality*, chapter 2), and fewer than W steps
# lie between the two. By hand, with W = 3: the query at position 5 sees the keys at 5, 4 and 3. From 5 to 2 it is
# three steps, one too many.

# %%
W, positions = 3, torch.arange(6)
steps = positions[:, None] - positions[None, :]           # i - j, (T, S)
mask = (steps >= 0) & (steps < W)                         # (T, S)
print("query 5:", steps[5].tolist(), "steps, sees", mask[5].tolist())
show(ch02.mask_picture(mask, ["Now", "Leo", "has", "the", "ring", "."],
                       "Each token sees itself and two before it"),
     alt="A grid of six queries and six keys: circles, which mean 'may attend', "
     "form a band of three along the diagonal; the future and the past further "
     "back are crossed out.")
predict("count", "How many keys does a query of Mistral 7B see, W = 4,096, at "
        "position 10,000?", ["4,095", "4,096", "4,097"], answer="")

# %% [markdown]
# The query's own key counts. Off by one, and nobody notices: everything runs and learns. It was in Mistral's own
# example code, and twice in a well-known library (see *Further*).
#
# ### Your turn: not too far back
#
# Write the second half of the rule, from positions as in chapter 2: True where fewer than `window` steps
# lie between key and query. What you say about keys later than the query doesn't matter; `causal` hides
# them. Example: the query at position 5 with window 3 may see the keys at 5, 4 and 3, not the one at 2. Keys
# come in any order, and a batch brings positions of shape (B, T) and (B, S).

# %% tags=["your-turn"]
def within_window(query_positions, key_positions, window):
    """True where fewer than `window` steps lie between key and query.

    query_positions: (..., T), key_positions: (..., S) -> bool (..., T, S)
    """
    return ...


check("within_window", within_window)

# %% [markdown]
# `hint("within_window")` helps one step at a time. Here is the library's rule, and the one mask that all
# models of this course use: causal, real (padding has position -1), and within the window.

# %%
# minimistral/attention.py
# show: within_window, may_attend

# %% [markdown]
# **In short:** W counts the query itself; the rule is about positions, like every mask we have.

# %% [markdown]
# ## How far does it reach?
#
# With W = 4 a query sees three tokens back. Does the model know nothing of the fourth? A token that we see
# has itself seen others, one layer below. So news can travel: one hop in each layer.

# %%
display(reveal("count", "B", "5,905 to 10,000: 4,095 before it, and itself."))
predict("hops", "Four layers, W = 4. We exchange token 0. What is the last "
        "position whose output can change?", ["3", "12", "16"], answer="")

# %% [markdown]
# No theory is needed; we move the token and look. The model is untrained and calculates in float64, so that
# no change, however small, is lost. Positions where even one bit of the stream differs count as changed.

# %%
for layers in (1, 2, 3, 4):
    cells = ch08.moved_cells(ch08.random_model(layers, window=4), 40, moved=0)
    last = int(cells[-1].nonzero().max())                 # cells: (L + 1, T)
    print(f"layers: {layers}, changed from 0 to {last}")
    assert last == layers * (4 - 1)
assert 32 * (4096 - 1) == 131_040                         # Mistral 7B, see below
reveal("hops", "B", "Each layer carries it W - 1 positions further, not W: the "
       "query's own position is one of its W keys.")

# %% [markdown]
# $$ \text{reach} = L \cdot (W - 1) $$
#
# In words: L layers, and in each one hop of at most W - 1 positions. Before we believe it, a question for the
# explorer. **Which windows reach position 20 or beyond with 5 layers? Which number of layers does W = 2
# need for that?** An orange circle is a number in the model that changed.

# %% tags=["try"]
explore(ch08.reach_explorer, layers=Slider(1, 8, 4), window=Slider(1, 10, 4),
        settings=[{"layers": 1, "window": 4}, {"layers": 4, "window": 4},
                  {"layers": 5, "window": 5}])

# %% [markdown]
# With 5 layers: windows from 5 on. With W = 2: 20 layers, more than the slider has.
#
# Mistral 7B has 32 layers and W = 4,096: 32 · 4,095 = 131,040 tokens. Its paper multiplies by
# 4,096 and says *approximately 131K*.
#
# Reach is not use. A message can be handed on 32 times; whether anything of it arrives is another matter. Look
# at the table of windows above: with W = 16 our four layers reach 60 tokens, nearly a whole tale, and the
# loss was nearly twice as high. What comes through hops is harder to use than what is in sight.
#
# **In short:** one hop a layer, W - 1 positions a hop; a reach is what can arrive, not what does.

# %% [markdown]
# ## The ring
#
# So a query needs the last W keys. All older ones can be thrown away. What is the cheapest way to keep the
# last W of something that never ends? Not to move anything: W slots, and position p always goes into slot
#
# $$ \text{slot} = p \bmod W $$
#
# In words: the remainder of p divided by W. With W = 5, position 7 lies in slot 2, because 7 = 1 · 5 + 2.

# %%
slots = [-1] * 5                                          # five empty slots
for p in range(12):
    slots[p % 5] = p
    if p in (3, 4, 5, 11):
        print(f"after position {p:2}: {slots}")
predict("order", "Position 12 comes next. What happens?",
        ["7 is overwritten", "10 is overwritten, at the ring's first slot",
         "everything moves by one, and 7 falls out"], answer="")

# %%
slots[12 % 5] = 12
print(slots)
figure = ch08.ring_picture(slots, query=12, window=5,
                           title="Position 12 took the slot of position 7")
show(figure, alt="Five slots on a circle hold the positions 10, 11, 12, 8 and 9: "
     "the newest, 12, has taken slot 2, where 7 was.",
     data={"slot": list(range(5)), "position": slots})
assert slots == [10, 11, 12, 8, 9]
reveal("order", "A", "12 and 7 have the same remainder, and 7 is just out of "
       "sight: 12 - 7 = 5 steps. Nothing moves.")

# %% [markdown]
# Exactly the key that just went out of sight is overwritten. This is the *rolling buffer cache* of the
# Mistral 7B paper; we say **ring**.
#
# But now the order of the keys is 10, 11, 12, 8, 9. For attention itself that is nothing: a look is a
# mixture, and a mixture has no order. The rotation (chapter 3) was applied before the key was kept, at its own
# position. The mask, however, needs to know who is where.

# %% [markdown]
# If it takes slots for positions, the query at 12 believes that its keys stand at 0 to 4, all out of sight. And
# *everything in the ring is visible* fails as well: before the ring is full, and when a second text begins. So
# our ring keeps each key's **position** beside it, -1 where a slot is empty. Then the one rule decides.
#
# **A question for the explorer.** A prompt longer than the ring: which part of it is kept? And when a second
# text begins in a ring that nobody wiped, can its tokens see the first text?

# %% tags=["try"]
explore(ch08.ring_explorer, window=Slider(2, 8, 5), prompt=Slider(0, 16, 0),
        then=Slider(0, 16, 7), second_text=Slider(0, 10, 0),
        settings=[{"prompt": 0, "then": 13}, {"prompt": 11, "then": 0},
                  {"prompt": 11, "then": 1, "second_text": 3}])

# %% [markdown]
# Of a long prompt only the end is kept. And token by token an old key never shows: a slot that the second text
# has not overtaken yet holds a position later than the query, and causality hides it. (Read in pieces, a second
# text is not so safe; we come to that.) The same in plain code:

# %%
ring = ch08.filled(5, [torch.arange(11), torch.tensor([11])])
for p in range(9):                                        # the second text
    ring.write(*torch.zeros(2, 1, 1, 1, 2), torch.tensor([[p]]))
    sees = library.may_attend(torch.tensor([[p]]), ring.positions, 5)[0, 0]
    visible = sorted(ring.positions[0][sees].tolist())
    assert visible == list(range(max(0, p - 4), p + 1))
print("each token of the second text saw its own text, and nothing else")
by_slot = library.may_attend(torch.tensor([[12]]), torch.arange(5)[None], 5)
assert not by_slot.any()                                  # slots are no positions

# %% [markdown]
# ### Your turn: into the ring
#
# `self` is one layer's ring: `self.keys` and `self.values` are (B, S, K, D), `self.positions` is (B, S). Put
# each token of the chunk into slot position mod S, in place: its key, its value, its position. Three edges:
# padding, position -1, may stand anywhere in a row and is never written; of a chunk longer than the ring only the last S positions are; and the
# rows of a batch have positions of their own. Example: S = 5, positions `[[3, 4, 5, 6]]` go into
# slots 3, 4, 0 and 1.

# %% tags=["your-turn"]
def write(self, k, v, positions):
    """Put each real token into slot position mod S.

    k, v: (B, T, K, D), positions: (B, T) -> None; changes self
    """
    slots = self.keys.shape[1]                            # S
    ...


check("write", write)

# %% [markdown]
# A loop over the rows is fine. The library's version, which comes below with the whole class, finds all
# (row, column) pairs that are to be kept, and writes them at once. Each slot then occurs once: when one
# assignment gives two tokens to the same slot, PyTorch does not promise which of them stays.
#
# **In short:** slot = position mod W, nothing moves, and each key carries its position.

# %% [markdown]
# ## Read, then write
#
# A model that writes brings one token at a time. A prompt comes in **chunks** of several. Take a ring of 5 that
# holds 10, 11, 12, 8, 9, and a chunk with the positions 13, 14 and 15.

# %%
predict("lost", "The chunk is written into the ring first; then its queries look. "
        "W = 5. Which key does query 13 miss?", ["none: 13 sees the last five",
        "9", "9 and 10"], answer="")

# %%
after = list(slots)
for p in (13, 14, 15):
    after[p % 5] = p
wants = [9, 10, 11, 12, 13]                               # of query 13
print("the ring:", after, "  query 13 wants", wants)
missing = [p for p in wants if p not in after]
assert missing == [9, 10]
reveal("lost", "C", "14 took the slot of 9, and 15 that of 10. The chunk's last "
       "tokens wiped out what its first one needs.")

# %% [markdown]
# No error, a right shape, and wrong looks. The cure is the order: the chunk's queries look at the **old** ring and
# the chunk itself, side by side, and only then is the chunk written. For a single token both orders are right, and
# writing first needs no copy.
#
# ### Your turn: update
#
# `update` is what attention calls. It stores the chunk and returns all keys, values and positions that the
# chunk's queries may need, in any order: (B, S', K, D) twice and (B, S'). Use `self.write`, the library's or
# yours. (`self.ring` is False in a layer without a window: there the buffer holds the whole text. In both cases
# only the first `self.used` slots are in use so far.)

# %% tags=["your-turn"]
def update(self, k, v, positions):
    """Store a chunk, return what its queries may need.

    k, v: (B, T, K, D), positions: (B, T) -> keys, values, positions
    """
    if self.ring and positions.shape[1] > 1:              # a chunk into a ring
        ...
    self.write(k, v, positions)
    part = slice(self.used)
    return self.keys[:, part], self.values[:, part], self.positions[:, part]


check("update", update)

# %%
# minimistral/cache.py
# show: LayerCache

# %% [markdown]
# The cache of the whole model, `KVCache`, is one of these for each layer: a ring of W slots where there is a
# window, a buffer that doubles where there is none. Its code stands under *Further*.
#
# The proof is the one of chapter 6: two ways that must agree. One pass over 200 tokens without a cache, and the
# same text through rings of 64 slots in chunks of 1, 7, 64 and 90 tokens. Then a second text: its first 8 tokens
# come, as one chunk, into a ring of 5 that still holds the positions 7 to 11 of the first.

# %%
ids = long_rows[:2, :200]                                 # (B, T), three windows
with torch.no_grad():
    at_once = short(ids)                                  # (B, T, V)
    for chunk in (1, 7, 64, 90):
        cache = KVCache(short.config, batch_size=2)
        pieces = [short(part, cache) for part in ids.split(chunk, dim=1)]
        off = (torch.cat(pieces, dim=1) - at_once).abs().max().item()
        print(f"chunks of {chunk:2}: largest difference {off:.4f}")
        assert off < 1e-3
held = ch08.filled(5, [torch.arange(12)]).update(
    *torch.zeros(2, 1, 8, 1, 2), torch.arange(8)[None])[2][0]       # (5 + 8,)
sees = held[library.may_attend(torch.tensor([7]), held, 5)[0]]
print("in a ring that nobody wiped, query 7 sees", sees.tolist())
assert sees.tolist() == [7, 3, 4, 5, 6, 7]

# %% [markdown]
# Any chunks give the same. But query 7 saw two keys at position 7, and the first is not of its text: a chunk
# reads the ring before it overwrites it. So wipe a cache between two texts: `reset` does.
#
# Now the shipped model with a window writes, tale after tale, in one text of ten windows, and the grammar
# accepts more than half of its tales. It runs on your pieces where they have passed. `swap` puts them into the
# model with the window, as `mine()` does for the shipped ones.

# %% tags=["try"]
# NBVAL_IGNORE_OUTPUT: a long text drawn at random; try another seed
my_model = mine()
with swap(my_model.pieces, check_signature=False):
    tales, cache = ch08.write_on(short, tokenizer, 640, seed=3)
print(wrapped(tales[-1]))
share = ch08.accepted(tales)
print(f"\n{len(tales)} tales, {share:.0%} accepted; "
      f"the cache holds {cache.nbytes:,} bytes")
assert cache.nbytes == 64 * mm.cache_bytes_per_token(model.config, torch.float32)
assert len(tales) >= 4 and share > 0.5                    # most are real tales
my_model

# %% [markdown]
# **In short:** a chunk reads the old ring and itself, then it is written; and any size of chunk gives the
# same logits.

# %% [markdown]
# ## What it buys
#
# First the memory, which needs no stopwatch: a ring has W slots, however long the text.

# %%
wide = ch08.with_window(model, 256)
print("tokens read     window 256      no window")
for position in (1024, 8192, 65536):
    sizes = []
    for m in (wide, model):
        cache = KVCache(m.config, device="meta")          # shapes, no memory
        cache.make_room(position)
        sizes.append(cache.nbytes)
    print(f"{position:11,} {sizes[0]:11,} bytes {sizes[1]:12,} bytes")
    assert sizes[0] == 256 * 2048 and sizes[1] == position * 2048
predict("flat", "Now the time. After 8,192 tokens, compared with 1,024: how much "
        "longer does one more token take, with the ring and without?",
        ["no longer; 8 times as long", "no longer; longer, but not 8 times",
         "8 times as long in both"], answer="")

# %% [markdown]
# Then the time for one more token. A new token brings one query; with the ring it meets 256 keys, at any
# position. Without, it meets all of them.

# %%
# NBVAL_IGNORE_OUTPUT: times differ by machine
times = {}
for name, m in (("window 256", wide), ("no window", model)):
    with ch08.one_thread():
        samples = ch08.milliseconds_per_token(m, (1024, 8192), rounds=12, tokens=4)
    times[name] = {p: sorted(t)[0] for p, t in samples.items()}
    print(f"{name:10}", {p: f"{ms:.2f} ms" for p, ms in times[name].items()})
growth = {name: t[8192] / t[1024] for name, t in times.items()}
assert 0.5 < growth["window 256"] < 1.5 < growth["no window"] < 8
reveal("flat", "B", "The looks take eight times as long, but the matrices of the "
       "model cost the same for every token.")

# %% [markdown]
# A quick look like this depends on what else your machine does. So we measured it with more care, at three
# positions in turns, with all samples kept (`benchmarks/window.py`; the file beside it says when, how often and
# on which machine).

# %%
recorded = ch08.recorded_speed()
row = {(r["model"], r["position"]): r for r in recorded["decoding"]}
far, near = (row["window", p]["median_ms"] for p in (65536, 1024))
late, soon = (row["no window", p]["median_ms"] for p in (8192, 1024))
show(ch08.speed_picture(recorded), alt="With a window of 256 one more token takes "
     f"{near:.1f} ms after 1,024 tokens and {far:.1f} ms after 65,536; without a "
     f"window {soon:.1f} ms after 1,024 and {late:.1f} ms after 8,192.",
     data={"model, position": [f"{m}, {p}" for m, p in row],
           "median ms": [r["median_ms"] for r in row.values()]})
print(f"64k against 1k with the ring: {far / near:.3f}")
assert 0.9 < far / near < 1.1

# %% [markdown]
# **In short:** with a ring, memory and time for a token do not depend on how much was read before.

# %% [markdown]
# ## A bug hunt
#
# Now to the code that was printed with an article and praised for its low complexity. Here it is in our words:
# for each token, cut out its neighbourhood, score it, mix it. Your own window works, so judge: **what is wrong
# here?** There are seven things, and one of them is fatal. Read it for a minute before you go on.

# %%
def printed_look(q, k, v, window, n_heads, hide=None):
    """As printed, in our words. q, k, v: (..., T, D), hide: (T, T) or None"""
    T, scale, looks = q.shape[-2], (q.shape[-1] / n_heads) ** 0.5, []
    for i in range(T):
        near = slice(max(0, i - window), min(T, i + window + 1))
        scores = q[..., i:i + 1, :] @ k[..., near, :].transpose(-2, -1) / scale
        if hide is not None:                              # True hides
            scores = scores.masked_fill(hide[i:i + 1, near], -1e9)
        looks.append(scores.softmax(-1) @ v[..., near, :])
    return torch.cat(looks, dim=-2)                       # (..., T, D)


predict("fatal", "Which fault is the worst?", ["the loop: it is slow",
        "the end of the neighbourhood", "the scale",
        "-1e9 is not minus infinity"], answer="")

# %% [markdown]
# Your test of chapter 2 finds it in a minute: move one token and watch the others.

# %%
chance = torch.Generator().manual_seed(8)
q, k, v = torch.randn(3, 12, 16, generator=chance)        # (T, D) each
moved_k = k.clone()
moved_k[6] += 1.0                                         # another token 6
change = (printed_look(q, moved_k, v, 3, 4)
          - printed_look(q, k, v, 3, 4)).abs().amax(-1)   # (T,)
print("tokens whose look changed:", change.nonzero()[:, 0].tolist())
assert change.nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]
reveal("fatal", "B", "Tokens 3, 4 and 5 see a token that comes after them: the "
       "window looks W tokens into the future.")

# %% [markdown]
# And it sees 2W + 1 keys, where W were meant. What would a training run say? We put this very code into a small
# transformer, beside the same model with our window, and train both for 100 steps. There q is cut into heads
# already, so we hand over 1 for their number: its scale is right here.

# %% tags=["try"]
# NBVAL_IGNORE_OUTPUT: models trained in this run; try another window
def as_printed(q, k, v, mask):                            # the mask is not asked
    heads_first = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D) each
    return printed_look(*heads_first, 8, 1).transpose(1, 2)


rows, losses, trained = ch02.rows_of(ladder.tokens.ids, 32), {}, {}
both = {"our window": library.plain_attend, "as printed": as_printed}
for name, look in both.items():
    trained[name] = ch08.one_layer(window=8)
    with swap("attention.plain_attend", look):
        losses[name] = ch02.train_briefly(trained[name], rows, 100, rate=1e-2)
    print(f"{name}: {sum(losses[name][-10:]) / 10:.2f} nats per token")

# %%
end = {name: sum(values[-10:]) / 10 for name, values in losses.items()}
assert end["as printed"] < 0.6 * end["our window"]
start = tokenizer.encode("The golden ring\n", bos=True)
for name, look in both.items():
    ids = list(start)
    with swap("attention.plain_attend", look), torch.no_grad():
        for _ in range(30):                               # reading all, no cache
            ids.append(int(trained[name](torch.tensor([ids]))[0, -1].argmax()))
    ch08.say(name, tokenizer.decode(ids[len(start):]))
blind = ch08.mean_nats(trained["as printed"], rows[:64])
print(f"as printed, now with the future hidden: {blind:.2f} nats per token")
assert blind > 1.2 * end["our window"] > 1.5 * end["as printed"]

# %% [markdown]
# The loss of the printed code is far too good, and its text is poor. When it writes, the future is not there yet;
# hide it in the same tales, and the loss shows what it had really learned: mostly to copy. On paper this is a
# triumph: *lower complexity, lower loss*. (If you forgot why: chapter 2, *It reads the answer*.)
#
# Now the repairs, one at a time. **The end of the neighbourhood** and **the count**: from i - W + 1 to i. **The
# scale**: the root of D, the size of the vectors at hand. Dividing by the number of heads as well would be right
# only if q had been cut into heads before.

# %%
def repaired_look(q, k, v, window):
    """q, k, v: (..., T, D); each query sees itself and window - 1 before it"""
    T, scale, looks = q.shape[-2], q.shape[-1] ** 0.5, []
    for i in range(T):
        near = slice(max(0, i - window + 1), i + 1)       # W keys, none later
        scores = q[..., i:i + 1, :] @ k[..., near, :].transpose(-2, -1) / scale
        looks.append(scores.softmax(-1) @ v[..., near, :])
    return torch.cat(looks, dim=-2)


q, k, v = torch.randn(3, 2, 4, 17, 6, generator=chance)   # (B, H, T, D) each
mask = library.may_attend(torch.arange(17), torch.arange(17), 5)
right = library.attend(*(x.transpose(1, 2) for x in (q, k, v)), mask)
assert torch.allclose(repaired_look(q, k, v, 5).transpose(1, 2), right, atol=1e-5)
print("repaired, it agrees with the library")

# %% [markdown]
# Three faults are gone because the repaired version needs no mask at all. The printed mask was **optional**, so
# forgetting it is no error. Its **True hides**, where PyTorch's own function and ours mean *may attend*: hand
# over a right mask in the wrong sense, and only the forbidden is seen. And its **-1e9** cannot be written in
# float16.
#
# Last, **the loop**. It does little arithmetic, but a trip through Python for each token. Compare it with the whole
# table of scores and our mask, although that computes 16 times as many scores.

# %%
# NBVAL_IGNORE_OUTPUT: times differ by machine
q, k, v = torch.randn(3, 1, 4, 1024, 32, generator=chance)
mask = library.may_attend(torch.arange(1024), torch.arange(1024), 64)
table = torch.nn.functional.scaled_dot_product_attention
seconds = {"loop": ch08.best_seconds(lambda: repaired_look(q, k, v, 64)),
           "table": ch08.best_seconds(lambda: table(q, k, v, attn_mask=mask))}
print({name: f"{1000 * s:.0f} ms" for name, s in seconds.items()})
assert torch.finfo(torch.float16).min > -1e9              # -65504
assert seconds["loop"] > seconds["table"]

# %% [markdown]
# The table wins against a loop that does a sixteenth of its arithmetic. (Better than both are blocks of queries: see
# *Further*.)
#
# **In short:** a window needs both its ends; a loss that is too good is a symptom; and low complexity on paper
# is not speed.

# %% [markdown]
# ## The ladder
#
# Chapter 7's transformer, eight heads on four, with one change: a window of 16 in both layers. It reaches
# 2 · 15 = 30 tokens back, and tales have eighty.

# %%
predict("rung", "Chapter 7's model ended at 0.48 nats per byte. With the window?",
        ["higher, above 0.55", "about the same", "lower, below 0.45"], answer="")

# %%
# NBVAL_IGNORE_OUTPUT: a model trained in this run
WINDOW = 16                                               # try 4, 8, 32 or None
torch.manual_seed(0)
windowed = mm.Transformer(mm.ModelConfig(
    dim=96, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=12, hidden_dim=192,
    vocab_size=tokenizer.vocab_size, sliding_window=WINDOW))
ladder.fit(windowed)
own = ch08.nats_per_byte(windowed)
display(ladder.run(f"transformer, window {WINDOW}", windowed, chapter=8))

# %% [markdown]
# A surprise, and a trap for whoever stops here. Would more training change it? We have recorded three windows
# for the ladder's 120 steps, and two of them for 480 (`benchmarks/window_ladder.py`, one seed each).

# %%
# NBVAL_IGNORE_OUTPUT: one point is the model trained in this run
rungs = {key: values[0] for key, values in ch08.recorded_rungs().items()}
gap = {steps: rungs[None, steps] - rungs[16, steps] for steps in (120, 480)}
show(ch08.rungs_picture(rungs, own), alt="After 120 steps window 4 has the lowest "
     f"loss, and no window is {gap[120]:.3f} behind window 16; after 480 steps "
     f"it is {gap[480]:.3f} behind.",
     data={"window, steps": [f"{w}, {s}" for w, s in rungs],
           "nats per byte": [round(x, 4) for x in rungs.values()]})
assert gap[120] > 0.05 and gap[480] < gap[120] / 3
assert rungs[4, 120] < rungs[16, 120] and 0.33 < own < 0.45
reveal("rung", "C", "With fewer keys to choose from, a look learns faster where to "
       "look. That is a matter of 120 steps, not a law.")

# %% [markdown]
# Four times the training, and the lead has shrunk to less than a third. And for the fully trained model the
# order was the other way round: the table near the beginning says that with 16 keys its loss is nearly doubled. So
# a window can be a good teacher: what is near matters most, and a short window says so from the first step.
#
# A loss after a short run says how fast something learns. It does not say how good it can become.

# %% [markdown]
# ## The verdicts
#
# *The window is Mistral's innovation.* Sparse Transformers (Child and others, 2019) and Longformer (Beltagy and
# others, 2020) had it, and Mistral's own first release cites both. What Mistral brought together was a causal
# window, a rolling buffer and pre-fill in chunks, in an open model of 7B.

# %%
display(verdict(1, "false", "Published in 2019 and 2020, and cited by Mistral."))
display(verdict(2, "false", "The printed sample looks into the future, counts "
                "2W + 1 keys, and its loop is slow."))
seven = mm.MODELS["mistral-7b-v0.1"]
predict("prompt", "Headline 3. Mistral 7B reads 16,384 tokens, W = 4,096. Looks "
        "have 2.3 times fewer pairs. How much less work is the whole prompt?",
        ["2.3 times", "about 1.6 times", "about 1.15 times"], answer="")

# %% [markdown]
# A careful writer would have written: *Mistral 7B uses a sliding window, known since 2019, and keeps only the last
# 4,096 keys.* And would have run the code, with one token moved.
#
# *It lowers complexity and keeps long-range dependency.* Of complexity we can count two things for Mistral 7B:
# pairs of query and key, and all operations to read a prompt.

# %%
for T in (8192, 16384, 32768):
    full, few = ch08.pairs(T), ch08.pairs(T, 4096)
    matrices, looks = ch08.prefill_operations(seven, T, None)
    fewer = ch08.prefill_operations(seven, T, 4096)[1]
    total = (matrices + looks) / (matrices + fewer)
    print(f"{T:6,} tokens: pairs {full / few:.2f} times fewer, operations "
          f"{total:.2f} times, cache {T / 4096:.0f} times smaller")
    if T == 16384:
        assert round(full / few, 2) == 2.29 and round(total, 2) == 1.15
display(reveal("prompt", "C", "Most of the work is in the matrices."))
verdict(3, "true with a condition", "Memory: yes. Work: little, until the text is "
        "far longer than W. Distance: a chain of hops.")

# %% [markdown]
# The great gain is the cache, eight times smaller at 32,768 tokens, as the paper says. Reading a prompt gains
# little until it is very long. And *long-range dependency* is kept as a possibility: 131,040 tokens of reach,
# one hop a layer. A careful writer would have written: *With the window the cache stops growing; what lies further
# back than W arrives only through hops.*

# %% [markdown]
# And here is the twist. *The secret of Mistral 7B is first of all the sliding window.* Which models have one?

# %%
ours = {n: c for n, c in mm.MODELS.items() if not n.startswith("llama")}
for name, c in ours.items():
    print(f"{name:20} window {str(c.sliding_window):30} K = {c.n_kv_heads}")
windowed_ones = [n for n, c in ours.items() if c.sliding_window is not None]
assert windowed_ones == ["mistral-7b-v0.1", "ministral-8b-2410"]
verdict(4, "false", "The window was dropped within three months, and the later "
        "models were better. Shared heads stayed.")

# %% [markdown]
# Two. The first 7B had it; the second version, three months later, dropped it, and Mixtral never had it. It came
# back in Ministral 8B, in three of four layers. Shared heads, the *second* secret of that headline, are in all.
#
# Why was it dropped? Mistral has not said, so this is our guess: version 0.2 was made for 32k tokens, with another
# base for its rotary positions. If all of them fit into memory, thanks to shared heads, nobody need look through
# hops.
#
# A careful writer would have written: *Mistral 7B combines shared heads with a sliding window; how much each
# contributed was not published.*

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. say which keys a query sees, W counted as Mistral counts it, and test it by moving one token;
# 2. say how far L layers reach, and why reach is not use;
# 3. write a ring, with positions beside the keys, for prompts of any length;
# 4. read a chunk before it is written, and prove that any chunk size gives the same logits;
# 5. find a leak behind a loss that is too good.
#
# New words: *window*, *reach*, *hop*, *ring* (rolling buffer), *slot*, *chunk*, *block*.

# %%
predict("order of work", "Your own ring gives wrong logits for prompts, and right "
        "ones when it writes. What do you look at first?", ["the rotation",
        "whether chunks are read before they are written", "the slots"], answer="")

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | W + 1 keys, or W - 1 | runs and learns; logits differ from position W on |
# | a window with two sides | the loss is far too good, the text poor |
# | slots taken for positions | right until the ring is full, then nothing fits |
# | chunk written before it is read | in a full ring only each chunk's last token is right |
# | padding written | what lay in the row's last slot is lost |
# | ring not wiped between texts | a chunk sees keys of the text before |
# | reach taken for L · W | off by L tokens |
# | no window on a long text | beyond the trained lengths the loss explodes |

# %% [markdown]
# ## The question for chapter 9
#
# So far every token goes through every matrix. A larger model knows more, and each token costs more.
# Can a model know more without computing more? That is chapter 9.

# %%
display(reveal("order of work", "B", "Single tokens are right in both orders."))
mixtral = mm.count_parameters(mm.MODELS["mixtral-8x7b-v0.1"])
print(f"Mixtral 8x7B: {mixtral.total / 1e9:.1f} billion parameters, "
      f"{mixtral.active / 1e9:.1f} billion at work for one token")

# %% [markdown]
# ## Further: the cache of the whole model
#
# Everything from here on can be skipped without loss later.
#
# One `LayerCache` for each layer, and how many tokens each row has seen. `make_room` and `advance` are called
# around each pass, as in chapter 6. Of a cache without a window `make_room` sees to the growth; a ring never
# grows. While a text is short, both hand out only the slots that are in use.

# %%
# minimistral/cache.py
# show: KVCache

# %% [markdown]
# ## Further: a prompt in chunks
#
# Reading a prompt of T tokens at once makes a table of T × T, window or no window: the pairs outside are
# hidden, but they are computed. In chunks of C tokens each table is C × (W + C), and there are T / C of them.

# %%
for T in (8192, 16384):
    tables = {C: -(-T // C) * C * (256 + C) for C in (64, 256, 1024)}
    print(f"T = {T:6,}, at once:      {T * T:>12,} pairs")
    for C, n in tables.items():
        print(f"            chunks of {C:4}: {n:>10,}")
    assert tables[256] == T * 512
growth = recorded["prefill"]["16384 in chunks"]["median_s"] / \
    recorded["prefill"]["8192 in chunks"]["median_s"]
print(f"measured, 16k against 8k in chunks of 256: {growth:.2f} times the time")
assert growth < 2.4

# %% [markdown]
# `mm.generate` has the option `prefill_chunk` for that. Since a chunk reads the ring before it is written, the
# result does not depend on it:

# %%
prompt = long_rows[1, :300].tolist()
texts = {chunk: mm.generate(short, prompt, 40, prefill_chunk=chunk,
                            stop_ids=[tokenizer.eos_id])
         for chunk in (None, 50, 64, 299)}
assert all(text == texts[None] for text in texts.values())
shown = tokenizer.decode(prompt[-25:])
print(wrapped(f"...{shown} |{tokenizer.decode(texts[50])}"))

# %% [markdown]
# ## Further: blocks of queries
#
# The same idea without a cache, for training: a block of W queries needs its own keys and the W - 1 before them,
# so each block has a table of W × 2W. That is where the low complexity can really be had.

# %%
def block_look(q, k, v, window):
    """A block of queries at a time. q, k, v: (..., T, D) -> (..., T, D)"""
    looks, T = [], q.shape[-2]
    for first in range(0, T, window):
        back = max(0, first - window + 1)                 # the first key needed
        rows = torch.arange(first, min(T, first + window))
        keys = torch.arange(back, rows[-1] + 1)
        mask = library.may_attend(rows, keys, window)     # (<= W, < 2W)
        block = (q[..., rows, :], k[..., keys, :], v[..., keys, :])
        looks.append(table(*block, attn_mask=mask))
    return torch.cat(looks, dim=-2)


few = [x[..., :300, :] for x in (q, k, v)]
assert torch.allclose(block_look(*few, 64), repaired_look(*few, 64), atol=1e-5)

# %%
# NBVAL_IGNORE_OUTPUT: times differ by machine
seconds["blocks"] = ch08.best_seconds(lambda: block_look(q, k, v, 64))
print({name: f"{1000 * s:.0f} ms" for name, s in seconds.items()})
assert seconds["blocks"] < seconds["loop"] / 2

# %% [markdown]
# ## Further: a window in some layers
#
# Ministral 8B has windows in three of four layers and sees everything in the fourth. Its pattern is a tuple,
# repeated over the layers. What does that do to the cache of a text of 131,072 tokens, and to the reach?

# %%
ministral = mm.MODELS["ministral-8b-2410"]
print("pattern:", ministral.sliding_window, "over", ministral.n_layers, "layers")
for name, windows in (("as published", ministral.sliding_window), ("none", None),
                      ("all layers", 32768)):
    cache = KVCache(replace(ministral, sliding_window=windows), device="meta",
                    max_length=131072, dtype=torch.bfloat16)
    print(f"{name:13} {cache.nbytes / 2**30:5.2f} GiB")

# %% [markdown]
# With one layer that sees everything, every token is one hop away again; nine such layers pay for it with
# nine full buffers. Move a token in a small model with such a pattern:

# %%
mixed = ch08.random_model(4, window=(None, 3, 3, 3))
cells = ch08.moved_cells(mixed, 40, moved=0)              # (L + 1, T)
print("changed positions after each layer:", cells.sum(-1).tolist())
assert cells[-1].all()

# %% [markdown]
# ## Further: off by one, a true story
#
# The paper of Mistral 7B says that a token attends to positions *between i - W and i*, which are W + 1. It also
# says that the cache has W places. Mistral's one-file example did both: its mask let through W + 1 keys when it
# read a prompt, and its ring kept W when it wrote. We rebuild the contradiction.

# %%
def one_more(query_positions, key_positions, window):
    return query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2) <= window


with torch.no_grad(), swap("attention.within_window", one_more):
    generous = short(long_rows[:1, :200])                 # W + 1 keys, (1, T, V)
with torch.no_grad():
    exact = short(long_rows[:1, :200])                    # W keys, like the ring
differs = ((generous - exact).abs().amax(-1)[0] > 1e-3).nonzero()[:, 0]
print(f"W = 64: the two agree up to position {differs[0] - 1}, then differ by up "
      f"to {(generous - exact).abs().max():.2f}")
assert differs[0] == 64

# %% [markdown]
# So the same model gave other logits when it read than when it wrote. The right count is W: the ring has no
# room for more, and the fast kernels count W as well. The same slip was repaired in the transformers library in
# October 2023, and in another of its paths in August 2025. Nobody saw it, because everything ran, and the text
# was good. Two ways that must agree would have found it on the first day.
