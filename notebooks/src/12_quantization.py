# %% [markdown]
# # 12. Quantization
#
# **How few bits does a weight need?**
#
# The core takes 50 minutes, the exercises an hour and a quarter, the sections under *Further* a quarter of an hour.
# You need chapter 4 and the models of chapter 10; what we borrow from them is repeated below.
#
# The shapes in this chapter: a weight matrix is **(out, in)**, a row for each output · **G** weights of a
# row form a group · **V** tokens in the vocabulary · a **bit** is one yes or no, 8 of them are a byte.

# %%
import tempfile

import torch

import minimistral as mm
from minimistral.course import (Choice, bet, check, explore, hint, ladder, mine,
                                predict, reveal, show, swap, verdict)
from minimistral.course.chapters import ch12_quantization as ch12
from minimistral.course.figures import bars_chart, new_figure

# %% [markdown]
# ## The headlines
#
# In 2024 the press promised Mistral's models to owners of small machines. Two of those promises follow.
# Place your bets: one letter between the quotation marks. The verdicts come at the end of the core.

# %%
bet(13, answer="")

# %%
bet(14, answer="")

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>How many parameters has Mistral 7B?</summary>
# 7.24 billion, nearly all of them in weight matrices.</details>
# <details><summary>What does a machine read from memory to write one token?</summary>
# Every active weight once, and the whole cache.</details>
# <details><summary>What is the floor on the ladder?</summary>
# The loss that the tales' own grammar leaves open. No model can go below it.</details>

# %% [markdown]
# ## Seven billion numbers
#
# A published checkpoint holds each weight in 16 bits, which is two bytes. Your laptop has 16 GB of memory.
# (1 GB is a billion bytes.) Does Mistral 7B fit?

# %%
predict("size", "Mistral 7B has 7.24 billion weights of 2 bytes each. How many GB?",
        answer=None)

# %%
config = mm.MODELS["mistral-7b-v0.2"]
total = mm.count_parameters(config).total
for bits in (32, 16, 8, 4.5, 4, 2):
    print(f"{bits:4} bits for a weight: {total * bits / 8 / 1e9:6.2f} GB")
assert 14 < total * 2 / 1e9 < 15
reveal("size", total * 2 / 1e9, "It leaves one and a half GB for everything else.")

# %% [markdown]
# At 16 bits the weights alone fill the machine. At 8 they take half of it, at 4 a quarter. Bits are also
# time: to write one token, a machine reads all these weights once, and half the bytes are read in half the
# time. ([Chapter 11](11_gpu_inference.ipynb) is about that.)
#
# So the question is what a weight loses with its bits. A byte has 256 values, half a byte has 16. Can a
# model run on sixteen different numbers?
#
# **In short:** memory and time per token are both weights × bits.

# %% [markdown]
# ## Five weights, by hand
#
# Take five weights and 4 bits. Sixteen values: we use the whole numbers from -7 to 7 and leave one out, so
# that there are as many below zero as above. The largest weight gets the largest number. That fixes the
# length of one step, which is called the **scale**.

# %%
weights = torch.tensor([0.70, -0.24, 0.04, 0.16, -0.61])
scale = weights.abs().max() / 7                           # 0.1: one step
print("scale:", round(scale.item(), 4))
print("in steps:", [round(w, 2) for w in (weights / scale).tolist()])
predict("hand", "Round each to a whole step. Which weight is lost altogether?",
        ["-0.24", "0.04", "none: there are 15 numbers for five weights"], answer="")

# %%
numbers = (weights / scale).round()                       # what is stored
again = numbers * scale                                   # what comes back
print("stored:   ", numbers.int().tolist())
print("come back:", [round(w, 2) for w in again.tolist()])
assert ((again - weights).abs() <= scale / 2 + 1e-6).all()
show(ch12.steps_picture(weights, 0.1, 7), alt="Five weights on a ruler of fifteen "
     "whole steps; each goes to the nearest step, and 0.04 goes to zero.")
reveal("hand", "B", "Whatever is below half a step becomes zero.")

# %% [markdown]
# $$ \text{scale} = \frac{\max_i |w_i|}{2^{b-1} - 1} \qquad
# n_i = \text{round}\left(\frac{w_i}{\text{scale}}\right) \qquad w_i \approx n_i \cdot \text{scale} $$
#
# In words: the largest weight decides the step, each weight is rounded to whole steps, and multiplying
# brings it back. This is called **absmax** quantization. With b = 8 bits the largest number is 127, with
# 4 bits it is 7. No weight moves by more than half a step.

# %% [markdown]
# The line that is easily wrong is the rounding. Turning floats into integers does not round: it cuts
# off what is behind the point. We do it wrong on purpose, for ten thousand weights.

# %% tags=["try"]
chance = torch.Generator().manual_seed(12)
many = torch.randn(10_000, generator=chance)
step = many.abs().max() / 7                               # try / 127 as well
for name, n in (("rounded", (many / step).round()),
                ("cut off", (many / step).to(torch.int8))):
    back = n * step
    print(f"{name}: error {(back - many).norm() / many.norm():.3f}, "
          f"size {back.norm() / many.norm():.3f} of what it was")

# %% [markdown]
# Cutting off pulls every weight towards zero, and the errors add up instead of cancelling. A layer with
# such weights gives too little, the next layer gets too little, and so on. There is no error message.
#
# **In short:** a weight is stored as a whole number of steps; the largest one sets the step.

# %% [markdown]
# ## One large weight
#
# Five weights shared one scale. A row of Mistral 7B has 4,096 weights. Who should share? Let us make a row
# of 128 ordinary weights, and then make a single one of them large.

# %%
row = torch.randn(1, 128, generator=chance)
others = torch.arange(128) != 77
predict("outlier", "One weight becomes 100 times as large as the rest. How many of "
        "the other 127 become zero in 4 bits?",
        ["about 1 in 100", "about half of them", "all of them"], answer="")

# %%
def there_and_back(w, bits):
    """Absmax along the last axis: to whole numbers and back."""
    most = 2 ** (bits - 1) - 1
    scale = w.abs().amax(-1, keepdim=True) / most
    return (w / scale).round() * scale


spoiled = row.clone()
spoiled[0, 77] = 100.0
back = there_and_back(spoiled, 4)[0, others]
print("zeros among the others:", int((back == 0).sum()), "of 127")
assert (back == 0).all()
reveal("outlier", "C", "The step is 100 / 7, more than 14. All the others are "
       "below half of that.")

# %% [markdown]
# One **outlier** decides the step for its whole row, and the row is lost. In real models such weights
# exist. The cure is to share among fewer: cut the row into **groups** of 32, each with a scale of its own.
# Then an outlier ruins 31 neighbours and nobody else.

# %%
sizes = [1, 3, 10, 30, 100]
errors = {"one scale for the row": [], "groups of 32": []}
for size in sizes:
    spoiled = row.clone()
    spoiled[0, 77] = size * row.abs().mean()
    for name, w in zip(errors, (spoiled, spoiled.view(4, 32))):
        back = there_and_back(w, 4).view(1, 128)
        wrong = (back - spoiled)[0, others].norm()
        errors[name].append((wrong / row[0, others].norm()).item())
show(ch12.outlier_picture(sizes, errors), alt="While one weight grows to 100 times "
     "the others, their error rises to 100% with one scale for the row, and to "
     "about half with groups of 32.", data={"size": sizes, **errors})
assert errors["one scale for the row"][-1] > 0.95 > 0.7 > errors["groups of 32"][-1]

# %% [markdown]
# Why half, if one group of four is lost? An error is a root of squares: a quarter of the squares is lost, and
# the root of a quarter is a half.
#
# Groups are not free: each scale has to be stored, too, here in 16 bits. So with 4-bit numbers and
# groups of 32 a weight costs more than 4 bits.

# %%
predict("bits", "4-bit numbers, one scale of 16 bits for 32 of them. How many bits "
        "does a weight take in all?", answer=None)

# %%
for bits, group in ((8, 4096), (8, 32), (4, 4096), (4, 128), (4, 32), (4, 8)):
    print(f"{bits}-bit numbers, {group:4} share a scale: "
          f"{bits + 16 / group:.3f} bits")
reveal("bits", 4 + 16 / 32, "That is the 4.5 in the first table.")

# %% [markdown]
# ### Your turn: whole numbers and scales
#
# Write it for a matrix. Cut each row into groups of `group` weights (None: the whole row is one), and find each
# group's largest absolute value. Return two tensors: the whole numbers, int8 in the shape of the weight,
# and the scales, bfloat16 with one column for each group. Divide by the scales **as stored**, after
# their rounding to bfloat16, and do it in float32: a weight may come in bfloat16, which is too coarse to
# round by. A group of zeros has the scale 0 and gives zeros, not NaN.
#
# Example: `[[0.7, -0.24, 3.0, 0.0]]`, 4 bits, group 2 gives numbers `[[7, -2, 7, 0]]` and about
# `[[0.1, 0.43]]`.

# %% tags=["your-turn"]
def quantize(weight, bits, group=None):
    """weight: (out, in), bits: 2 to 8, group: a divisor of in, or None

    -> whole numbers, int8 (out, in); scales, bfloat16 (out, in / group)
    """
    most = ...        # the largest whole number: 7 for 4 bits
    scales = ...      # from the largest of each group, in bfloat16
    return ...


check("quantize", quantize)

# %% [markdown]
# `hint("quantize")` helps, one step at a time. Here is the library's; from here on this notebook uses it.
# It adds the checks: a group that does not divide the row would reach over into the next one.

# %%
# minimistral/quantize.py
# show: quantize, dequantize

# %% [markdown]
# Why are the scales rounded before they are used? A scale that is stored a little too small is made up
# for by a number of steps a little larger. If we divided by the exact scale and multiplied by the stored
# one, all weights of a group would be wrong in the same direction.
#
# **In short:** a scale serves a row or a group; small groups keep outliers among themselves and cost
# 16 / G bits.

# %% [markdown]
# ## Two numbers in a byte
#
# PyTorch has a dtype for 8-bit numbers and none for 4. The smallest thing it can store is a byte. So we
# put two numbers in one. With signs that is easily wrong: in which bits is the minus?

# %%
pair = torch.tensor([-3, 5], dtype=torch.int8)
left, right = (pair + 8).tolist()                         # 5 and 13: no sign left
byte = left << 4 | right                                  # left half, right half
print(f"-3 and 5 -> {left} and {right} -> {left:04b} {right:04b} -> byte {byte}")
predict("byte", "Which number comes back from the right half, byte & 15, if we "
        "forget to take off the 8?", ["5", "-3", "13"], answer="")

# %%
print("left half: ", byte >> 4, "- 8 =", (byte >> 4) - 8)
print("right half:", byte & 15, "- 8 =", (byte & 15) - 8)
stored = torch.tensor([byte], dtype=torch.uint8)
print("and with uint8:", ((stored >> 4) - 8).tolist())    # no sign: 256 - 3
assert (byte >> 4) - 8 == -3 and (byte & 15) - 8 == 5
reveal("byte", "C", "Adding 8 moved -7..7 to 1..15. Forgotten on the way back, "
       "every weight of the model is far too large.")

# %% [markdown]
# The last line shows a trap: bytes have no sign, so 5 - 8 gives 253. Turn them into int8 **before** you
# subtract.
#
# ### Your turn: pack and unpack
#
# `pack` takes int8 numbers from -8 to 7, shape (out, in) with in even, and gives uint8 of shape (out, in / 2).
# Add 8; of two neighbours, the first is the left half of the byte (the 16s), the second the right half.
# Example: `[[-3, 5]]` gives `[[93]]`.

# %% tags=["your-turn"]
def pack(numbers):
    """int8 (out, in) -> uint8 (out, in / 2), two numbers in a byte"""
    shifted = ...     # 0 to 15, uint8
    return ...        # columns 0, 2, 4 ... left, columns 1, 3, 5 ... right


check("pack", pack)

# %% tags=["your-turn"]
def unpack(packed):
    """The inverse of pack: uint8 (out, in / 2) -> int8 (out, in)"""
    return ...


check("unpack", unpack)

# %%
# minimistral/quantize.py
# show: pack, unpack

# %% [markdown]
# **In short:** add 8, left half, right half; back the other way round, with a sign before the
# subtraction.

# %% [markdown]
# ## A layer, and a whole model
#
# The layer stores whole numbers and scales. When it is called, it makes the weights anew and
# multiplies as ever: that is the plain path. Only the weights are in few bits, x and the result are not: this is
# called **weight-only** quantization. PyTorch has a kernel that multiplies with the small numbers directly;
# for a few rows of x it is taken (`fast_int8`, see *Further*). Skip those lines at first.

# %%
# minimistral/quantize.py
# show: QuantizedLinear, quantize_model

# %% [markdown]
# One layer after the other is replaced, so the memory never holds two models. Three things are left in
# full: the norms (a few numbers), the token embeddings (of which a token reads one row), and in a mixture
# the router, `gate`. A small error in a weight moves a result a little. In the router it can send
# a token to another expert, and there is next to nothing to be saved.

# %%
predict("writes", "The shipped model, 4 bits, groups of 32. What does it write?",
        ["letters without sense", "a tale like any other",
         "nothing at all: it stops with an error"], answer="")

# %%
tokenizer = mm.load_tokenizer("tales-dense")
small = mine()                                            # with your pieces
with swap(small.pieces):
    mm.quantize_model(small, bits=4, group=32)
    print(small.write("The golden ring\n"))
layer = small.layers[0].feed_forward.w1
print("w1:", layer.packed.dtype, tuple(layer.packed.shape), "and scales",
      tuple(layer.scales.shape))
assert layer.packed.shape == (192, 64) and layer.scales.shape == (192, 4)
reveal("writes", "B", "Fifteen different numbers, times a scale, are enough.")

# %% [markdown]
# That was the shipped model on every piece of yours that has passed. One tale says little, of course.
# Is it as good as before?

# %% [markdown]
# ## How few bits?
#
# We take the model's matrices to 8, 6, 4, 3 and 2 bits and back, and measure the loss on the ladder's
# validation tales. The floor is what the grammar leaves open.

# %%
predict("few", "Where does the model break?",
        ["at 6 bits already", "between 4 and 2 bits",
         "not at all: training made it robust"], answer="")

# %%
model = mm.load_model("tales-dense")
whole, floor = ch12.nats_per_byte(model), ladder.corpus.floor
TRIED = (8, 6, 4, 3, 2)
by_row = [ch12.nats_per_byte(ch12.rounded(model, bits, None)) for bits in TRIED]

# %%
by_group = [ch12.nats_per_byte(ch12.rounded(model, bits, 32)) for bits in TRIED]
print(f"float32: {whole:.4f} nats per byte, {whole - floor:.4f} above the floor")
for bits, one, two in zip(TRIED, by_row, by_group):
    print(f"{bits} bits: above the floor {one - floor:.4f} with a scale for each "
          f"row, {two - floor:.4f} in groups of 32")
lines = {"a scale for each row": by_row, "groups of 32": by_group}
above = [f"{bits} bits {loss - floor:.4f}" for bits, loss in zip(TRIED, by_group)]
show(ch12.lines_over_bits(TRIED, lines, floor, whole), alt="Nats per byte above "
     f"the floor, in groups of 32: {', '.join(above)}; float32 "
     f"{whole - floor:.4f}. With a scale for each row it is more from 4 bits down.",
     data={"bits": TRIED, **lines})
assert by_group[0] < whole + 0.002 and by_group[2] < whole + 0.1
assert by_group[-1] > 2 * whole and by_row[2] > by_group[2] > by_group[1]
reveal("few", "B", "8 bits cost nothing that we could measure, 4 in groups a "
       "little; at 2 only -1, 0 and 1 are left.")

# %% [markdown]
# Each bit less about doubles the step, and so the error of every weight. (From 3 bits to 2 the step triples: 1 is
# the largest number, not 3.) A trained model bears that for a while, and then no longer. (The shipped model is tiny, and every weight of it is busy. Large models bear
# few bits better; read the order from these lines, not the place of the bend.)
#
# Which part breaks first? We round one kind of matrix at a time, to 3 bits, and leave the rest alone.

# %%
predict("first", "Which kind costs most when it alone goes to 3 bits?",
        ["the token embeddings: every token begins there",
         "wq and wk, which decide where to look",
         "the output layer, which makes the logits"], answer="")

# %%
kinds = (*ch12.LAYERS, "tok_embeddings")
costs = {kind: ch12.nats_per_byte(ch12.rounded(model, 3, 32, [kind])) - whole
         for kind in kinds}
show(ch12.costs_picture(costs, "The output layer is the first to suffer"),
     alt="What each kind of matrix adds to the loss when it alone is rounded to 3 "
     f"bits: the output layer {costs['output']:.4f} nats per byte, the next one "
     f"{sorted(costs.values())[-2]:.4f}.",
     data={"kind": kinds, "cost": [round(costs[k], 4) for k in kinds],
           "weights": [ch12.numbers_of(model, k) for k in kinds]})
assert max(costs, key=costs.get) == "output"
assert costs["output"] > 3 * sorted(costs.values())[-2]
reveal("first", "C", "Nothing comes after it: what it gets wrong goes straight "
       "into the probabilities.")

# %% [markdown]
# A layer inside the model adds its error to a stream that many other layers add to, and norms and later
# layers damp it. The output layer has nobody behind it. That is why many tools keep it at 6 or 8 bits
# when the rest has 4. In our library it is one word, `skip`. Try it, and count the bytes as well.

# %% tags=["try"]
size = sum(x.nbytes for x in model.state_dict().values())
print(f"float32 {'':17} {size / 1e6:.2f} MB, {whole - floor:.4f} above the floor")
for skip in ((), ("output",), ("w2",)):
    mixed = mm.quantize_model(mm.load_model("tales-dense"), 4, 32, skip=skip)
    size = sum(x.nbytes for x in mixed.state_dict().values())
    print(f"4 bits, skip {skip!s:13} {size / 1e6:.2f} MB, "
          f"{ch12.nats_per_byte(mixed) - floor:.4f} above the floor")

# %% [markdown]
# **In short:** 8 bits are free, 4 bits in groups nearly, 2 are too few; the output layer suffers first.

# %% [markdown]
# ## Bytes against speed
#
# Half the bytes, half the time: is that so? `benchmarks/quantization.py` measured a larger model, with random
# weights (only the time counts), on one core of a server, one token at a time. Its file says when and how,
# and keeps every sample. The first number first: how many bytes does a token read?

# %%
runs = ch12.recorded()["variants"]
large = mm.count_parameters(mm.ModelConfig(**ch12.recorded()["shape"])).total
table = ch12.recorded()["shape"]["vocab_size"] * ch12.recorded()["shape"]["dim"]
print(f"{large / 1e6:.0f} million weights; {table / 1e6:.0f} million are the input "
      "table, of which a token reads one row")
for name, run in runs.items():
    print(f"{name:29} {run['bytes_read_per_token'] / 1e6:6.0f} MB for each token")
predict("speed", "8 bits read a quarter of float32's bytes. With the kernel, a "
        "token takes ...", ["a quarter of the time, or less",
                            "between a quarter and all of it",
                            "longer: the weights have to be made anew"], answer="")

# %%
base = runs["float32"]["median_ms"]
shown = {"float32": "float32", "bfloat16": "bfloat16", "8 bits, kernel": "8 bits",
         "4 bits, groups of 32, kernel": "4 bits", "8 bits, plain path": "8 plain"}
speedups = {short: base / runs[name]["median_ms"] for name, short in shown.items()}
figure, ax = new_figure(7.2, 3.4)
bars_chart(ax, speedups, ylabel="tokens a second, float32 = 1",
           title="With a kernel few bits are faster; without one, slower")
show(figure, alt=f"Tokens a second against float32: 8 bits "
     f"{speedups['8 bits']:.1f} times as many, and 4 bits {speedups['4 bits']:.1f} "
     f"times, with PyTorch's kernels; 8 bits on the plain path "
     f"{speedups['8 plain']:.2f} times.",
     data={"variant": list(shown),
           "ms for each token": [runs[name]["median_ms"] for name in shown]})

# %%
assert speedups["8 plain"] < 1 < speedups["8 bits"]
quarter = speedups["8 bits"] > 3.9
print(f"8 bits are faster than float32: {speedups['8 bits'] > 1}")
print(f"and the plain path is slower:   {speedups['8 plain'] < 1}")
reveal("speed", "A" if quarter else "B", "A quarter is read, but there are as many "
       "weights to multiply, and norms and looks read none of them. C is the plain "
       "path.")

# %% [markdown]
# (Read the order from these bars, not the factors: they are those of one machine, and its file says how busy that
# was. Half of the bytes need not be half of the time, look at bfloat16: bytes are one limit, arithmetic on a
# single core is another.)
#
# The plain path reads one byte, writes two or four, and reads them again. It saves memory and costs time. To be
# fast, whole numbers have to become floats inside the processor, on their way into the multiplication.
# That is what a kernel is for.
#
# **In short:** few bits save memory always, and time only with a kernel.

# %% [markdown]
# ## Will it fit?
#
# Now we can answer the headlines. A model fits if its weights and its cache are smaller than the memory
# that is left. We assume that the system and other programs keep 4 of the laptop's 16 GB, and 3 of a
# phone's 8. How fast it can be at best is the speed of the memory over the bytes read for a token: the
# weights, and the cache as far as it is filled.

# %%
predict("phone", "Mistral 7B with 4.5 bits, an empty cache, a phone that reads "
        "60 GB in a second: how many tokens a second at most?", answer=None)

# %%
def most_tokens(config, bits, speed, context=0):
    """At most this many tokens a second: GB in a second over GB for a token."""
    row_only = config.vocab_size * config.dim             # input table: one row
    read = (mm.count_parameters(config).active - row_only) * bits / 8
    return speed * 1e9 / (read + context * mm.cache_bytes_per_token(config))


best = most_tokens(config, 4.5, 60)
assert 14 < best < 16
reveal("phone", best, "An upper bound: a phone that gets warm becomes slower.")

# %% [markdown]
# A question for the explorer: **which models fit on a laptop with 16 GB, and from how few bits on?** Then take
# the phone. Is there anything that makes Mixtral fit there?

# %% tags=["try"]
explore(ch12.fit_explorer, device=Choice(list(ch12.DEVICES)),
        bits=Choice([16, 8, 6.5, 4.5, 3.5, 2.5], 4.5),
        context=Choice([2048, 8192, 32768], 8192),
        settings=[{"device": "laptop, 16 GB", "bits": 16},
                  {"device": "laptop, 16 GB", "bits": 4.5},
                  {"device": "phone, 8 GB", "bits": 4.5}])

# %% [markdown]
# The same as plain code: the largest number of bits with which each model fits, with a text of 8,192
# tokens.

# %%
limits = {}
for name in ("mistral-7b-v0.2", "mistral-nemo-12b", "mixtral-8x7b-v0.1"):
    for device, (_, left, speed) in ch12.DEVICES.items():
        fits = [bits for bits in (16, 8, 6.5, 4.5, 3.5, 2.5)
                if sum(ch12.resident_gb(mm.MODELS[name], bits, 8192)) <= left]
        limits[name, device] = max(fits, default=None)
        told = f"up to {fits[0]} bits" if fits else "not even with 2.5 bits"
        print(f"{name:18} {device:15} {told}")
assert limits["mistral-7b-v0.2", "laptop, 16 GB"] == 8
assert limits["mistral-7b-v0.2", "phone, 8 GB"] == 3.5
assert limits["mixtral-8x7b-v0.1", "laptop, 16 GB"] is None

# %% [markdown]
# A surprise: with a text of 8,192 tokens, 7B at 4.5 bits does not fit on our phone. The weights would (4.1 GB
# of 5), but the cache takes more than one GB. With a text of 2,048 tokens it fits; turn that knob. The
# weights are in 4 bits, the cache is not. (*Further* does something about it.)
#
# And Mixtral? All its experts have to be in memory, though a token uses only two of them.

# %% [markdown]
# ## The verdicts on the headlines

# %%
nemo, mixtral = (mm.count_parameters(mm.MODELS[n]).total for n in
                 ("mistral-nemo-12b", "mixtral-8x7b-v0.1"))
for name, count in (("7B", total), ("Nemo 12B", nemo), ("8x7B", mixtral)):
    sizes = [f"{bits} bits {count * bits / 8e9:5.1f} GB" for bits in (16, 8.5, 4.5)]
    print(f"{name:9}", ", ".join(sizes))
assert total * 4.5 / 8e9 < 5 < 12 < total * 2 / 1e9 < mixtral * 4.5 / 8e9
verdict(13, "true with a condition", "7B in 8 or 4.5 bits fits, in 16 bits it does "
        "not, and 8x7B does not at any usable number of bits.")

# %%
short = sum(ch12.resident_gb(config, 4.5, 2048))
print(f"7B, 4.5 bits, 2,048 tokens: {short:.2f} GB")
for device in ("laptop, 16 GB", "phone, 8 GB"):
    _, left, speed = ch12.DEVICES[device]
    print(f"{device}, {left} GB left: at most "
          f"{most_tokens(config, 4.5, speed, 2048):.0f} tokens a second")
assert short < 5 and 18 < most_tokens(config, 4.5, 90, 2048) < 22
verdict(14, "true with a condition", "7B in 4.5 bits fits into a large phone, with "
        "a short text, and slowly. 8x7B does not fit into any.")

# %% [markdown]
# Both headlines say *the model*, and that is the weak word: it is true of 7B and false of 8x7B, which the
# same articles praised. Both leave out the price, a small loss of quality, and the speed.
#
# A careful writer would have written: *With 4 or 5 bits for each weight, Mistral 7B needs about 4 GB. So it
# runs on a laptop with 16 GB, at best at some 20 tokens a second, and on a phone with 8 GB more slowly. It is a
# little less accurate. Mixtral needs 26 GB.*

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. turn weights into whole numbers and a scale, by hand and in code;
# 2. say what an outlier does, and what groups do about it, at what price;
# 3. put two signed numbers into a byte and get them back;
# 4. measure what each number of bits costs, and which part of a model suffers first;
# 5. say which model fits where, and how fast it can be at best.
#
# New words: *quantization*, *scale*, *absmax*, *group*, *outlier*, *packing*, *kernel*, *weight-only*.

# %%
predict("last", "We ask our small model, in 4 bits: Where is the golden ring? What "
        "does it write?", ["it is in the mill", "a tale like any other",
                           "nothing: a question is no title"], answer="")

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | cut off, not rounded | no error; every layer gives too little |
# | absmax along the wrong axis | errors of the wrong rows; scales of the wrong shape |
# | groups across two rows | right while the columns divide evenly |
# | the 8 not taken off | weights far too large, all of them positive |
# | uint8 minus 8 | -3 comes back as 253 |
# | bytes without the scales | 4 bits are counted, 4.5 are stored |

# %% [markdown]
# ## The question for chapter 13

# %%
with swap(small.pieces):
    told = small.write("Where is the golden ring?\n")
print(told)
titles = [tale.split("\n")[0] for tale in ladder.corpus.train_documents]
assert told.count(".") > 3 and not any("?" in title for title in titles)
reveal("last", "B", "It takes the question for a title and goes on.")

# %% [markdown]
# (In French, even: no title of our tales has a question mark, so the model is on its own here.) Our small models continue texts. So does 7B, in any number of bits: ask it
# something, and it may answer with more questions, as a page on the web would.
#
# How does a model that continues text become one that answers, and how would we know? That is chapter 13.

# %% [markdown]
# ## Further: the kernels that PyTorch has
#
# Everything from here on can be skipped without loss later.
#
# PyTorch has a product with 8-bit weights and one with 4-bit weights in groups. Their names begin with an
# underscore: they are not promised to stay. So the library asks at the start: is the kernel there, does it
# take this shape, does it give the plain result? If not, the layer stays on the plain path.

# %%
# minimistral/quantize.py
# show: fast_int8, fast_int8_fits, agrees

# %% [markdown]
# The question about the shape is not politeness. On a CPU this kernel does not look at what it is given,
# and with 17 columns it brings down the whole program. No `try` catches that.
#
# The 4-bit kernel wants its numbers in an order of its own, other on each kind of machine. `use_kernels` puts
# them there; a model is saved before.

# %%
# minimistral/quantize.py
# show: fast_int4, Int4Linear

# %%
# minimistral/quantize.py
# show: use_kernels

# %% [markdown]
# Two ways that must agree. The kernels multiply in bfloat16, which has about three digits, so they agree
# to about three digits.

# %%
eight = mm.quantize_model(mm.load_model("tales-dense"), 8)
four = mm.quantize_model(mm.load_model("tales-dense"), 4, 32)
ids = torch.tensor([tokenizer.encode("The golden ring\n", bos=True)])
with torch.no_grad():
    plain = four(ids)                                     # (1, T, V)
    mm.use_kernels(four)
    distance = ((four(ids) - plain).norm() / plain.norm()).item()
print("the kernels' logits are within 1% of the plain ones:", distance < 0.01)
assert distance < 0.01

# %% [markdown]
# ## Further: which layers, and files
#
# Before it changes anything, `quantize_model` looks whether everything fits: a wrong number is named, and
# the model is as it was.

# %%
# minimistral/quantize.py
# show: layers_to_quantize

# %% tags=["raises-exception"]
mm.quantize_model(mm.load_model("tales-dense"), bits=4, group=128)

# %% [markdown]
# `mm.save_quantized` writes a folder with two tensors for each layer: `packed` and `scales`. And a checkpoint
# that is not quantized can be made small **on its way in**, one tensor after the other, so that a machine
# never holds the large model. `mm.load_quantized` does both.

# %%
with tempfile.TemporaryDirectory() as folder:
    mm.save_quantized(mm.quantize_model(mm.load_model("tales-moe"), 4, 32), folder)
    saved = mm.load_quantized(folder)
loaded = mm.load_quantized("tales-moe", bits=4, group=32)
assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(),
                                             loaded.state_dict().values()))
gates = [m.gate for m in loaded.modules() if hasattr(m, "gate")]
share = (sum(gate.weight.numel() for gate in gates)
         / mm.count_parameters(loaded.config).total)
assert share < 0.01
print(f"the same model both ways; the gates are still {type(gates[0]).__name__}, "
      f"{100 * share:.1f}% of the weights")

# %% [markdown]
# ## Further: a cache in few bits
#
# The cache was what kept 7B off the phone. Can keys and values have few bits as well? We read the first
# half of some tales into a cache, round what is in it (one scale for each token and head), and measure the loss
# of the second half.

# %%
tales = tokenizer.encode_batch(ladder.corpus.val_documents, bos=True)
texts = [ids for ids in tales if len(ids) > 64]
rows = torch.tensor([ids[:65] for ids in texts])          # (N, T + 1)
cached = {bits: ch12.loss_with_cache(model, rows, 32, bits)
          for bits in (None, 8, 4, 3, 2)}
for bits, loss in cached.items():
    print(f"{bits or 32:2} bits in the cache: {loss:.4f} nats per token")
assert abs(cached[8] - cached[None]) < 0.01 < cached[2] - cached[None]

# %% [markdown]
# The same bend as before: 8 bits cost nothing, 2 are too few. A cache grows with the text, so for long texts
# this saves more than the weights do. It is harder in practice: the rounding happens with every new token,
# and has to be fast.

# %% [markdown]
# ## Further: why 15 numbers and not 16
#
# Four bits could also hold -8. Then one side has a step more than the other. For a group whose largest
# weight is negative that is a gain: with a scale of its own sign, its largest weight becomes -8. Some
# formats do that.

# %%
flat = model.layers[0].feed_forward.w1.weight.detach().reshape(-1, 32)
peak = flat.gather(1, flat.abs().argmax(1, keepdim=True))  # with its sign
ways = {"-7 to 7": (peak.abs() / 7, -7), "-8 to 7": (peak / -8, -8)}
for name, (scale, low) in ways.items():
    back = (flat / scale).round().clamp(low, 7) * scale
    print(f"{name}: error {(back - flat).norm() / flat.norm():.4f}")
