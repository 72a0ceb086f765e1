# %% [markdown]
# # 7. Shared heads
#
# **How much memory can we save when heads share keys and values?**
#
# The core takes 50 minutes. The exercises and the sections under *Further* take another hour and a
# half.
# You need chapters 2 and 6; what we borrow from them is repeated below.
#
# The shapes in this chapter: **B** texts in a batch · **T** query positions · **S** key positions ·
# **H** query heads · **K** key/value heads · **D** size of a head · **L** layers · and **n** = H / K,
# the query heads that share one key/value head.

# %%
import textwrap

import torch

import minimistral as mm
from minimistral import attention as library
from minimistral.attention import attend
from minimistral.course import (Choice, Slider, bet, check, explore, hint, ladder,
                                mine, predict, reveal, show, swap, verdict)
from minimistral.course.chapters import ch07_shared_heads as ch07
from minimistral.course.figures import lines_chart, new_figure

# %% [markdown]
# ## The headline
#
# Another claim of 2024 about what makes Mistral efficient. Place your bet: put one letter between the
# quotation marks and run the cell. The verdict comes at the end of the core.

# %%
bet(5, answer="")

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>What does a head do with queries, keys and values?</summary>
# It compares each query with every key, turns the scores into shares, and mixes the values in these
# shares.</details>
# <details><summary>What is in a key/value cache, and why are the queries not in it?</summary>
# The keys and values of all tokens so far, so that they are computed once. A query is used by its own token
# only, and then never again.</details>
# <details><summary>How many heads does the shipped model have in a layer?</summary>
# Four query heads. How many heads its keys and values have, we see below.</details>

# %% [markdown]
# ## What a token leaves behind
#
# When a model writes, each new token looks at all earlier ones. Chapter 6 kept their keys and values in
# a cache, so that nothing is computed twice. That made writing fast. What did it cost?

# %%
TALE = """The golden ring
One morning Anna found a golden ring in the mill. Leo was at the lake. \
Anna went to the lake and saw Leo there. Anna gave the ring to Leo. \
The sun was shining. Now Leo has the ring."""

model, tokenizer = mm.load_model("tales-dense"), mm.load_tokenizer("tales-dense")
ids = tokenizer.encode(TALE, bos=True)
print(f"{len(TALE.encode())} bytes of text are {len(ids)} tokens")
predict("bytes", "A token stands for a few letters. How many bytes does the model "
        "keep for each token while it reads this tale?",
        ["4: the id is enough", "512: the width is 128 numbers of 4 bytes",
         "2048"], answer="")

# %% [markdown]
# We need not guess. The cache says how many bytes it holds: `nbytes`.

# %%
cache = mm.KVCache(model.config, max_length=len(ids))
with torch.no_grad():
    model(torch.tensor([ids]), cache)                     # read the tale
each = cache.nbytes // len(ids)
print(f"{len(cache.layers)} layers, in each of them keys of shape "
      f"{tuple(cache.layers[0].keys.shape)} and values of the same shape")
print(f"{cache.nbytes:,} bytes in all, {each:,} for each token")
assert each == 2048
times = cache.nbytes / len(TALE.encode())
reveal("bytes", "C", f"{times:.0f} times the bytes of the text itself.")

# %% [markdown]
# The shape (1, S, 2, 32) tells where the bytes come from: a batch of one, S tokens, two heads of 32
# numbers. Twice that, for keys and values; in each of four layers; and four bytes for a number.
#
# $$ \text{bytes per token} = 2 \cdot L \cdot K \cdot D \cdot b $$
#
# In words: a key and a value (2), for each layer (L) and each key/value head (K), with as many numbers
# as a head has (D), each of b bytes. The same in code, with the same letters:

# %%
def bytes_per_token(config, b):
    """What one token adds to the cache. b: bytes of a number"""
    L, K, D = config.n_layers, config.n_kv_heads, config.head_dim
    return 2 * L * K * D * b


assert bytes_per_token(model.config, 4) == each
llama, mistral = mm.MODELS["llama-2-7b"], mm.MODELS["mistral-7b-v0.2"]
predict("llama", "Llama 2 7B: 32 layers, 32 heads of 128 numbers, 2 bytes each, "
        "nothing shared. How many bytes does it keep for each token?", answer=None)

# %%
big = bytes_per_token(llama, 2)                           # 2 * 32 * 32 * 128 * 2
full = 4096 * big
print(f"one token {big:,} bytes = {big // 2**10} KiB")
print(f"one text of 4,096 tokens {full / 2**30:.1f} GiB, sixteen of them "
      f"{16 * full / 2**30:.0f} GiB")
print(f"all weights {mm.weight_bytes(llama) / 2**30:.1f} GiB")
assert 16 * full > 2 * mm.weight_bytes(llama)
reveal("llama", big, "Half a megabyte, for a few letters.")

# %% [markdown]
# Sixteen people, each with a text of 4,096 tokens, need more than twice as much memory for their caches as
# for the model.
#
# And memory is not all. To write one token, a machine has to **read** every weight once (of the table of
# token embeddings only one row) and the whole cache once: keys to be compared, values to be mixed.
# Reading from memory is what takes the time (chapter 11 measures it). So: how much of this reading is cache?

# %%
predict("share", "To write one token the shipped model reads 2.5 million bytes of "
        "weights. It keeps 2048 bytes for each token. From how many tokens on does "
        "it read more cache than weights?", answer=None)

# %%
lengths = [2**n for n in range(7, 16)]                    # 128 to 32,768 tokens
shares = {name: [100 * ch07.share_of_cache(config, S, dtype) for S in lengths]
          for name, config, dtype in (
              ("our model", model.config, torch.float32),
              ("Llama 2 7B", llama, torch.bfloat16),
              ("Mistral 7B", mistral, torch.bfloat16))}
figure, ax = new_figure(7.2, 3.6)
lines_chart(ax, lengths, shares, xlabel="tokens in the cache",
            title="The longer the text, the more of the reading is cache",
            ylabel="cache, in % of all bytes read")
ax.set_xscale("log", base=2)
ax.set(ylim=(0, 100), xticks=lengths, xticklabels=[f"{S:,}" for S in lengths])
ax.tick_params(axis="x", rotation=45)
last = {name: f"{values[-1]:.0f}%" for name, values in shares.items()}
show(figure, alt=f"At 32,768 tokens the cache is {last['Llama 2 7B']} of the bytes "
     f"that Llama 2 7B reads and {last['Mistral 7B']} for Mistral 7B; for short "
     f"texts it is nearly nothing.", data={"tokens": lengths, **shares})

# %%
rows = model.config.vocab_size * model.config.dim         # a token reads one row
weights = 4 * (mm.count_parameters(model.config).total - rows)
equal = weights / each
for texts in (1, 16):
    parts = [100 * ch07.share_of_cache(config, 4096, batch=texts)
             for config in (llama, mistral)]
    print(f"{texts:2} x 4,096 tokens: the cache is {parts[0]:.0f}% of what Llama 2 "
          f"7B reads, {parts[1]:.0f}% with Mistral 7B")
assert 2.45e6 < weights < 2.55e6 and parts[0] > 66 > parts[1]
reveal("share", round(equal), f"{weights:,} / {each:,}: so long a text, and the "
       "cache is half of the reading.")

# %% [markdown]
# For one token the weights are read once, however long the text; the cache grows with it. And the weights
# are read once for all texts of a batch, while each text brings its own cache. So with sixteen texts the
# reading is mostly cache, at least for Llama.
#
# Why is Mistral's line so much lower, although the two models are of one size? One factor of the
# formula differs: K.
#
# **In short:** a token leaves 2 · L · K · D numbers behind, and each later token reads them all.

# %% [markdown]
# ## Two heads, one key
#
# K is the number of heads that have keys and values of their own. Must it be H, one for each query
# head? We have seen an answer without noticing. In chapter 2 two looks went out after *Anna gave the
# ring to Leo*: one for the giver, one for the receiver. As a value, Anna is the number 1 and Leo the
# number 3. Here is the example again.

# %%
k = torch.tensor([[2.0, 0.0], [0.0, 2.0]])                # giver, receiver (S, D)
v = torch.tensor([[1.0, 0.0], [3.0, 0.0]])                # Anna is 1, Leo is 3
queries = torch.tensor([[6.0, 0.0], [0.0, 6.0]])          # giver? receiver? (H, D)
predict("same", "Both heads search the same keys and mix the same values. What do "
        "they bring back?", ["the same: they share everything",
        "different things: they ask differently", "the average of both"], answer="")

# %%
for name, q in zip(("giver?   ", "receiver?"), queries):
    weights = (k @ q / 2**0.5).softmax(-1)                # (S,)
    print(name, "weights", [round(w, 3) for w in weights.tolist()],
          "-> brings back", round((weights @ v)[0].item(), 2))
reveal("same", "B", "One list of keys, one list of values, and two answers. The "
       "queries make the difference.")

# %% [markdown]
# Keys and values can be shared, because a head's question is in its query. And queries are free: they
# are never kept.
#
# So let us be radical: H queries, **one** key and one value for each token. This is *multi-query attention*
# (Shazeer, 2019). In code it takes one line: the only key head is shown to every query head.

# %%
chance = torch.Generator().manual_seed(7)
q = torch.randn(2, 5, 12, 6, generator=chance)            # (B, T, H, D)
k, v = torch.randn(2, 2, 5, 1, 6, generator=chance)       # (B, S, 1, D) each
p = torch.arange(5)
mask = library.causal(p, p)

look = attend(q, k.expand(-1, -1, 12, -1), v.expand(-1, -1, 12, -1), mask)
print("looks", tuple(look.shape), " kept for each token:", 2 * 1 * 6, "numbers,",
      "not", 2 * 12 * 6)
assert not torch.allclose(look[:, :, 0], look[:, :, 1])   # heads still differ

# %% [markdown]
# Twelve times less to keep. But now all heads have to find their things under the same key, and one list of
# D numbers has to describe a token for twelve kinds of questions. That is asking a lot.
#
# Between one and all there is a middle: **groups**. K key/value heads, each serving n = H / K query heads.
# This is *grouped-query attention* (Ainslie and others, 2023).

# %%
show(ch07.sharing_picture(8, (8, 2, 1)), alt="Eight query heads three times: each "
     "with a key/value head of its own; in two groups of four that share one; and "
     "all eight on a single key/value head.")

# %% [markdown]
# The two old ways are the ends of this one: K = H is what chapter 2 built, K = 1 is multi-query. Take
# Mistral 7B, change its K, and look at what a token costs.

# %% tags=["try"]
for K in (32, 8, 4, 1):                                   # try 2 and 16 as well
    L, D, dim = mistral.n_layers, mistral.head_dim, mistral.dim
    kept = 2 * L * K * D * 2                              # bytes for each token
    matrices = 2 * dim * K * D * L                        # wk and wv of all layers
    print(f"K = {K:2}   {kept // 1024:3} KiB for each token   "
          f"{matrices / 1e9:.2f} billion parameters in wk and wv")

# %% [markdown]
# With K = 8, as published, a token costs a quarter of what it would cost without sharing. The matrices `wk`
# and `wv` shrink as well; the 0.8 billion parameters that this saves can be spent elsewhere.
#
# **In short:** heads differ by their queries, so keys and values can be shared; K chooses how much.

# %% [markdown]
# ## Who reads whom
#
# Four query heads, two key/value heads. The model was trained with one rule for who reads whom, and
# whoever runs it must use the same rule.

# %%
predict("rule", "Query heads 0, 1, 2, 3 and key/value heads 0, 1. Which one does "
        "query head 1 read in Mistral's models?",
        ["0: neighbours share, 0 0 1 1", "1: they take turns, 0 1 0 1",
         "any: the model finds out by itself"], answer="")

# %% [markdown]
# PyTorch offers both orders, under names that sound alike. Three heads, four times each; instead of
# numbers each head carries its own label.

# %%
label = torch.arange(3).view(1, 1, 3, 1)                  # (B, S, K, D), D = 1
beside = label.repeat_interleave(4, dim=2)                # (B, S, K * 4, D)
in_turn = label.repeat(1, 1, 4, 1)                        # (B, S, K * 4, D)
print("repeat_interleave:", beside.flatten().tolist())
print("repeat:           ", in_turn.flatten().tolist())
assert beside.shape == in_turn.shape
reveal("rule", "A", "Query head h reads key/value head h // n. With n = 4: heads 0 "
       "to 3 read head 0, heads 4 to 7 read head 1.")

# %% [markdown]
# The shapes are equal, so no error can tell you which one you took. What happens to a trained model
# when its heads are repeated in turn? We swap it into the shipped model and measure its loss on the ladder's
# validation tales, in nats for each byte.

# %%
predict("turn", "The shipped model, heads repeated in turn, not side by side:",
        ["hardly any difference: the same heads are there", "somewhat worse",
         "ruined: no better than the bigram of chapter 1"], answer="")

# %%
def repeat_in_turn(x, n):
    return x.repeat(1, 1, n, 1)


right = ch07.nats_per_byte(model)
with swap("attention.repeat_heads", repeat_in_turn):
    wrong = ch07.nats_per_byte(model)
    new = mm.generate(model, tokenizer.encode("The golden ring\n", bos=True), 30)
bigram = next(row for row, _ in ladder.rows() if row.name == "bigram")
print(f"side by side {right:.2f}, in turn {wrong:.2f}, bigram {bigram.loss:.2f}")
print(textwrap.fill(f"in turn it writes: {tokenizer.decode(new)}", 84))
assert wrong > 3 * right and wrong > bigram.loss
reveal("turn", "C", "Of the four query heads of a layer two search the wrong keys.")

# %% [markdown]
# No error, no warning, a model in ruins. And now the worst: the tests that one writes first do not see it.
# Let us try two common mistakes on several sizes: the wrong order, and K copies of each head
# instead of n = H / K.

# %%
def symptom(H, K, repeat):
    """What a test with these sizes sees of a wrong way to repeat."""
    q, k, v = (torch.randn(1, 5, heads, 6, generator=chance) for heads in (H, K, K))
    good = library.plain_attend(q, k, v, mask)
    try:
        bad = attend(q, repeat(k, H // K), repeat(v, H // K), mask)
    except RuntimeError:
        return "an error"
    return "nothing" if torch.allclose(good, bad) else "other numbers"


for H, K in ((4, 4), (4, 1), (4, 2), (12, 3)):
    copies = symptom(H, K, lambda x, n: library.repeat_heads(x, K))
    print(f"H = {H:2}, K = {K}   in turn: {symptom(H, K, repeat_in_turn):14} "
          f"K copies: {copies}")

# %% [markdown]
# With K = 1, or K = H, there is only one order. With 4 and 2, K and n are the same number. And a single
# head fits any number of query heads: PyTorch stretches an axis of size 1 by itself. Only the last line sees
# both mistakes. So whenever you test code with groups, take numbers such as 12 and 3. The checks below do.
#
# ### Your turn: each shared head, n times
#
# Repeat the heads of x: head h of the result is a copy of head h // n of x. The other axes stay as they
# are.

# %% tags=["your-turn"]
def repeat_heads(x, n):
    """Repeat each key/value head n times, copies side by side.

    x: (B, S, K, D) -> (B, S, K * n, D)
    """
    return ...


check("repeat_heads", repeat_heads)

# %% [markdown]
# `hint("repeat_heads")` helps one step at a time. Here is the library's line; from here on this notebook
# uses it.

# %%
# minimistral/attention.py
# show: repeat_heads

# %% [markdown]
# ### Your turn: a look with shared heads
#
# Now the look. q has H heads; k and v have K of them, and K divides H. Read both numbers from the
# shapes. You may use `attend` from chapter 2, which wants as many key heads as query heads, and `repeat_heads`.
# Or do it without copies, by cutting the heads of q into groups. The mask is as in chapter 2: (T, S) or
# (B, T, S), True = may attend. A query that may see nothing gets zeros.
#
# Example: q of shape (2, 5, 12, 6) and k, v of shape (2, 7, 3, 6) give (2, 5, 12, 6); heads 0 to 3 read
# key/value head 0.

# %% tags=["your-turn"]
def plain_attend(q, k, v, mask):
    """attend with shared heads: k and v may have fewer heads than q.

    q: (B, T, H, D), k and v: (B, S, K, D) with K dividing H -> (B, T, H, D)
    """
    n = ...           # how many query heads share one key/value head?
    return ...        # (B, T, H, D)


check("plain_attend", plain_attend)

# %%
# minimistral/attention.py
# show: plain_attend, fast_attend

# %% [markdown]
# The first is the plain way. The second is the same look by PyTorch's own kernel, which knows about shared
# heads (`enable_gqa`) and need not repeat them. A model that writes has one query at a time: then the n heads
# that share a key head take the place of n queries of one head, and the kernel reads each key once for all of
# them. A query that may see nothing gets zeros, as in ours.
#
# Two ways that must agree, with the sizes that see mistakes:

# %%
q = torch.randn(2, 5, 12, 6, generator=chance)            # (B, T, H, D)
k, v = torch.randn(2, 2, 7, 3, 6, generator=chance)       # (B, S, K, D) each
mask = library.causal(torch.arange(2, 7), torch.arange(7))
plain, fast = (way(q, k, v, mask) for way in (library.plain_attend, fast_attend))
assert torch.allclose(plain, fast, atol=1e-5)
print("plain and fast agree:", tuple(plain.shape))
my_model = mine()
print(my_model.write("The golden ring\n"))
my_model

# %% [markdown]
# That was the shipped model, running on every piece of yours that has passed. The whole attention of a layer
# is now in reach. It is the module that chapters 4 and 6 used without showing it.

# %%
# minimistral/attention.py
# show: Attention

# %% [markdown]
# In order: project, cut into heads, rotate queries and keys (chapter 3). Then comes the line that matters
# here: `cache.update` keeps the new keys and values, with **K** heads, and hands back all of them. Only
# after that are they repeated for the query heads, inside `look`. Whoever repeats first
# and keeps afterwards gets the same looks and saves nothing. (The window is chapter 8's; in this model it is None.)

# %%
predict("sizes", "In the shipped model dim is 128, H is 4, K is 2, D is 32. Which "
        "of the four matrices are smaller than without sharing?",
        ["wk and wv", "wq, wk and wv", "all four"], answer="")

# %%
layer = model.layers[0].attention
for name in ("wq", "wk", "wv", "wo"):
    print(name, tuple(getattr(layer, name).weight.shape))
assert layer.wk.weight.shape[0] * 2 == layer.wq.weight.shape[0]
reveal("sizes", "A", "Every query head still looks for itself and brings back a "
       "look of its own; wo joins all H of them.")

# %% [markdown]
# **In short:** query head h reads key/value head h // n; keep first, repeat afterwards; test with 12 and
# 3, never with 4 and 2.

# %% [markdown]
# ## What the published models keep
#
# The configurations of the published models are in `mm.MODELS`, and `mm.cache_bytes_per_token` is our
# formula. The Llama 2 models are there for comparison.

# %%
predict("most", "Which of these keeps the most for each token?",
        ["Llama 2 13B", "Llama 2 70B", "Mixtral 8x22B: it has 141 billion "
         "parameters"], answer="")

# %%
kib = {name: mm.cache_bytes_per_token(c) // 1024 for name, c in mm.MODELS.items()}
print(f"{'model':20} layers    H    K   KiB per token   GiB for 32,768 tokens")
for name, c in mm.MODELS.items():
    print(f"{name:20} {c.n_layers:6} {c.n_heads:4} {c.n_kv_heads:4} {kib[name]:9}"
          f" {kib[name] / 32:18.2f}")
assert kib["llama-2-13b"] > 2 * kib["llama-2-70b"] > 2 * kib["mixtral-8x22b-v0.1"]
reveal("most", "A", "The 70B model and every Mistral share; the 13B does not. "
       "Experts, which chapter 9 is about, have no keys or values at all.")

# %% [markdown]
# (With a sliding window the last column is an upper bound: the cache stops growing when the window is full.
# That is chapter 8.)
#
# A question for the explorer. You have **2 GiB** left for the cache, and a model with 32 layers of 32
# query heads, numbers of 16 bits. A text of 32,768 tokens should fit. How many query heads must share one
# key/value head? Which other controls get you there? (The blue lines are what a small and a large graphics
# card hold, weights and all.)

# %% tags=["try"]
explore(ch07.cache_explorer, query_heads=Choice([16, 32, 64, 128], 32),
        heads_that_share_one=Choice([1, 2, 4, 8, 16, 32, 64, 128], 4),
        layers=Slider(8, 96, 32, 8), bits=Choice([32, 16, 8, 4], 16),
        context=Choice([2048, 4096, 8192, 32768, 131072], 32768),
        settings=[{"heads_that_share_one": 1}, {"heads_that_share_one": 4},
                  {"heads_that_share_one": 32}])

# %% [markdown]
# The same as plain code. Eight heads must share one. Half the bits, half the layers or half the text
# would do as much as twice the sharing, because the factors are simply multiplied.

# %%
for n in (1, 2, 4, 8, 16, 32):
    config = ch07.your_config(query_heads=32, share_one=n, layers=32)
    size = 32768 * bytes_per_token(config, 2) / 2**30
    print(f"{n:2} share one: {size:5.2f} GiB", "fits" if size <= 2 else "too large")

# %% [markdown]
# ## The ladder
#
# So far sharing is all gain. What does it cost? One key has to serve several questions, so the model should
# become a little worse. We measure it with the ladder's standard run: a transformer with eight query heads
# in each of two layers, and K = 8, 4 or 1 key/value heads. Nothing else changes. (The model is narrower than that
# of chapter 4: compare K = 4 with K = 8 and 1, not with chapter 4's row.)

# %%
predict("quality", "From K = 8 to 4 to 1: what happens to the loss?",
        ["nothing that one could measure",
         "it rises a little each time, by less than 0.1 nats",
         "with K = 1 the model is no better than a bigram"], answer="")

# %% tags=["try"]
# NBVAL_IGNORE_OUTPUT: a model trained in this run
KV_HEADS = 4                              # 8, 4, 2 or 1; some ten seconds
torch.manual_seed(0)
grouped = mm.Transformer(mm.ModelConfig(
    dim=96, n_layers=2, n_heads=8, n_kv_heads=KV_HEADS, head_dim=12,
    hidden_dim=192, vocab_size=tokenizer.vocab_size))
ladder.fit(grouped)
own = ch07.nats_per_byte(grouped)
print(f"8 query heads on {KV_HEADS} key/value heads: {own:.4f} nats per byte")

# %%
# NBVAL_IGNORE_OUTPUT: a model trained in this run
display(ladder.run(f"transformer, 8 heads on {KV_HEADS}", grouped, chapter=7))

# %% [markdown]
# One run says little: another seed gives another number. So we have measured each K with three seeds
# (`benchmarks/shared_heads.py`; the file beside it says when and on which machine). Set `REPEAT` to True to
# train K = 8 and K = 1 here as well; it takes some twenty seconds.

# %%
# NBVAL_IGNORE_OUTPUT: one point is the model trained in this run
REPEAT = False
losses = ch07.recorded_runs(steps=ladder.standard.steps)
kept = {name: ch07.float32_bytes(name) for name in losses}
if REPEAT:
    for K in (8, 1):
        ladder.fit(fresh := ch07.ladder_model(K))
        print(f"K = {K}: {ch07.nats_per_byte(fresh):.4f}")
here = 4 * bytes_per_token(grouped.config, 1), own
show(ch07.quality_picture(losses, kept, here),
     alt="The loss rises from eight key/value heads to four to one, each time by "
     "one or two hundredths of a nat, while the cache shrinks to an eighth.",
     data={name: [round(x, 4) for x in losses[name]] for name in losses})

# %%
median = {name: sorted(values)[1] for name, values in losses.items()}
for name, values in losses.items():
    print(f"{name:25} {kept[name]:5} bytes a token  median {median[name]:.4f}  "
          f"spread of seeds {max(values) - min(values):.4f}")
assert median["K = 8"] < median["K = 4"] < median["K = 1"] < median["K = 8"] + 0.1
assert median["K = 8"] < median["K = 1, wider feed-forward"] < median["K = 1"]
widest = max(max(losses[f"K = {K}"]) - min(losses[f"K = {K}"]) for K in (8, 4, 1))
first = median["K = 4"] - median["K = 8"]
second = median["K = 1"] - median["K = 4"]
assert widest < first < 2 * widest < second
assert 0.40 < own < 0.55
reveal("quality", "B", "Fewer keys and values, a slightly higher loss.")

# %% [markdown]
# The order is what we expected, and the steps are small: the first is little more than the spread between
# seeds, the second more than twice that spread. Part of the loss comes from having fewer parameters: the
# squares are a model with K = 1 whose feed-forward is wider, so that it has as many as the one with K = 8.
# It gets back some of what was lost, and keeps the small cache.
#
# These are tiny models after a short training; read the order from them, not the size. Ainslie and others
# found the same order in large ones: groups came close to full heads, at nearly the speed of one.

# %% [markdown]
# ## The verdict on the headline

# %%
ours = {n: c for n, c in mm.MODELS.items() if not n.startswith("llama")}
sharing = [n for n, c in ours.items() if c.n_kv_heads < c.n_heads]
factor = bytes_per_token(llama, 2) / bytes_per_token(mistral, 2)
print(f"Llama 2 7B keeps {factor:.0f} times as much for each token as Mistral 7B")
print(f"{len(sharing)} of {len(ours)} Mistral configurations share heads; all with "
      f"K = {sorted({c.n_kv_heads for c in ours.values()})}")
assert factor == 4 and len(sharing) == len(ours)
verdict(5, "true", "The cache shrinks by H / K, exactly. The price in quality is "
        "small, and not zero.")

# %% [markdown]
# The claim is true, and more precise than most: by the factor H / K, four for Mistral 7B. It leaves two things
# out. The saving is in the **cache**, and only a little in the weights, so it matters for long texts and
# many of them. And Mistral did not invent it: Llama 2 70B had it two months earlier.
#
# A careful writer would have written: *Mistral 7B shares keys and values among groups of four heads, as
# Llama 2 70B did before. Its cache takes a quarter of the memory it would otherwise need, at a small
# cost in quality.*

# %% [markdown]
# Another headline of that year has two halves: the secret of Mistral 7B is *first of all the sliding
# window*, and only then the shared heads. The half about sharing is checked now: all configurations in
# our table kept it, from the first to the last. What about the window?

# %%
windowed = [n for n, c in ours.items() if c.sliding_window is not None]
print("with a sliding window:", windowed)
assert 0 < len(windowed) < len(ours) / 2

# %% [markdown]
# Keep this list in mind. Whether the window is a secret of success is the question of chapter 8.

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. say how many bytes a token leaves in the cache of any model, and check it with `nbytes`;
# 2. say when reading the cache takes longer than reading the weights;
# 3. write attention with shared heads (without copies: in the exercises);
# 4. tell which query head reads which key/value head, and choose sizes that see a mistake;
# 5. weigh memory against quality, with the spread of seeds in view.
#
# New words: *key/value head*, *multi-query*, *grouped-query*, *group*, *bytes per token*.

# %%
predict("long", "Mistral 7B v0.2 has no window. It reads a text of 131,072 tokens: "
        "how many GiB of cache, beside some 13.5 GiB of weights?", answer=None)

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | heads repeated in turn | no error; a trained model writes nonsense |
# | K copies instead of H / K | unseen with H = 4, K = 2; an error with 12 and 3 |
# | repeated before the cache | right looks, nothing saved |
# | queries shared as well | all heads of a group bring back the same |
# | H in the formula of the cache | H / K times too many bytes |

# %% [markdown]
# ## The question for chapter 8
#
# Sharing divides the cache by a number. But what remains still grows with every token, without end.

# %%
gib = 131072 * mm.cache_bytes_per_token(mistral) / 2**30
assert gib * 2**30 > mm.weight_bytes(mistral)
reveal("long", gib, "More than the weights, shared heads and all.")

# %% [markdown]
# Does a token really need to look at **all** that came before? Can a model with a short memory read a
# long text? That is chapter 8.

# %% [markdown]
# ## Further: heads that were never meant to share
#
# Everything from here on can be skipped without loss later.
#
# Suppose a model was trained without sharing, at great cost. Can it be turned into one that shares?
# Ainslie and others (2023) did it: average the key matrices of each group, and the value matrices; then train
# a little more, for 5% of the original steps. We try it on the shipped model, whose two key/value heads become
# one. Beside the average stand two cheaper ideas.

# %%
torch.manual_seed(0)
ways = {"average of both": lambda heads: heads.mean(0),   # (n, D, dim) -> (D, dim)
        "the first one": lambda heads: heads[0],
        "random numbers": lambda heads: torch.randn_like(heads[0]) * heads.std()}
made = {name: ch07.with_kv_heads(model, 1, way) for name, way in ways.items()}
after = {name: ch07.nats_per_byte(m) for name, m in made.items()}
print(f"as shipped, two heads  {right:.3f} nats per byte")
for name, loss in after.items():
    print(f"{name:20}   {loss:.3f}")
assert after["random numbers"] > 1.2 * after["average of both"] > 2.4 * right

# %% [markdown]
# The average is a poor model, and still a far better start than random numbers. From there we train for eight
# more steps, with the ladder's batches.

# %%
# NBVAL_IGNORE_OUTPUT: a model trained in this run
ladder.fit(made["average of both"], steps=8)
healed = ch07.nats_per_byte(made["average of both"])
print(f"one head, 8 steps later: {healed:.3f}; two heads, as shipped: {right:.3f}")

# %%
gap_before, gap_after = after["average of both"] - right, healed - right
assert 0 < gap_after < gap_before / 2
print("more than half of the damage is repaired:", gap_after < gap_before / 2)

# %% [markdown]
# So sharing can be decided late. Heads that were never meant to share lose much when they are averaged, and a
# little training repairs most of that.

# %% [markdown]
# ## Further: why copies are slow
#
# `plain_attend` repeats keys and values for every query head before it looks. When a model writes, that
# happens for every token: a cache of S tokens is read, written n times, and read again. We compare it with
# three other ways: one new token, 32 heads on 8, 4,096 tokens in the cache. First: how large is the
# largest tensor that a product reads?

# %%
def by_einsum(q, k, v):
    """q: (B, T, H, D), one new token that sees all: no mask. g: head of a group"""
    groups = q.unflatten(2, (k.shape[2], -1))             # (B, T, K, n, D)
    scores = torch.einsum("btkgd,bskd->bkgts", groups, k) / q.shape[-1]**0.5
    return torch.einsum("bkgts,bskd->btkgd", scores.softmax(-1), v).flatten(2, 3)


def by_matmul(q, k, v):
    """The same by @, with an axis of size 1 where the group shares its key."""
    groups = q.unflatten(2, (k.shape[2], -1))             # (B, T, K, n, D)
    groups = groups.permute(0, 2, 3, 1, 4)                # (B, K, n, T, D)
    k, v = (x.transpose(1, 2).unsqueeze(2) for x in (k, v))  # (B, K, 1, S, D)
    weights = (groups @ k.transpose(-2, -1) / q.shape[-1]**0.5).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2, 4).flatten(2, 3)

# %%
q = torch.randn(1, 1, 32, 64, generator=chance)
k, v = (torch.randn(1, 4096, 8, 64, generator=chance) for _ in "kv")
mask = torch.ones(1, 4096, dtype=torch.bool)
looks = {"copies, then attend": library.plain_attend,
         "einsum over groups": lambda q, k, v, mask: by_einsum(q, k, v),
         "matmul with a broadcast": lambda q, k, v, mask: by_matmul(q, k, v),
         "PyTorch's kernel": library.fast_attend}
results = {name: ch07.largest_stored(look, q, k, v, mask)
           for name, look in looks.items()}
for name, (out, numbers) in results.items():
    assert torch.allclose(out, results["copies, then attend"][0], atol=1e-5)
    print(f"{name:24} the largest is {numbers / k.numel():.0f} times the keys")

# %% [markdown]
# All four agree. The surprise is the third line: a broadcast looks free, and for sums it is. But `@`
# copies what it broadcasts, silently. `einsum` sees that the heads of a group can be rows of one product:
# for the shared keys they are simply n times as many queries. Now the time.

# %%
# NBVAL_IGNORE_OUTPUT: times differ by machine
with torch.no_grad():
    times = {name: ch07.best_seconds(lambda: look(q, k, v, mask))
             for name, look in looks.items()}
for name, seconds in times.items():
    print(f"{name:24} {1000 * seconds:6.1f} ms")

# %%
gain = times["copies, then attend"] / times["einsum over groups"]
assert gain > 1.5                                         # mostly far more
print("without copies it takes less than two thirds of the time:", gain > 1.5)
