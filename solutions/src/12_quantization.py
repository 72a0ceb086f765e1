# %% [markdown]
# # Exercises 12: Quantization
#
# Seven exercises on chapter 12, about an hour and a quarter in all. The three core pieces, `quantize`,
# `pack` and `unpack`, are written inside the chapter itself; here you vary, repair and use what you built.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.

# %%
import copy

import torch

import minimistral as mm
from minimistral.course import check, hint, ladder, lines, progress
from minimistral.course.chapters import ch12_quantization as ch12
from minimistral.quantize import dequantize, pack, quantize, unpack

# %% [markdown]
# ## Exercise 1: a scale and a smallest weight
#
# Difficulty: easy · importance: useful · 7 minutes
#
# Absmax keeps zero in the middle. A row whose weights all lie between 4 and 7 wastes most of its numbers. The
# other usual way stores for each row a scale **and** the smallest weight: 0 stands for the smallest,
# `2**bits - 1` for the largest. (Many formats store the number of zero instead, the *zero point*; it says the same.)
#
# Complete the three lines. `scale` and `smallest` are columns, (out, 1); the scale is at least 1e-8, so that a
# row of equal weights does not divide by zero. Example: `[[4.0, 5.2, 7.0]]` with 2 bits gives numbers
# `[[0, 1, 3]]`, scale `[[1.0]]`, smallest `[[4.0]]`.


# %%
def affine(weight, bits):
    """(out, in) -> numbers, uint8 (out, in); scale (out, 1); smallest (out, 1)"""
    ### BEGIN SOLUTION
    smallest = weight.amin(dim=-1, keepdim=True)          # (out, 1)
    steps = 2**bits - 1                                   # between 2**bits levels
    scale = ((weight.amax(dim=-1, keepdim=True) - smallest) / steps).clamp(min=1e-8)
    numbers = ((weight - smallest) / scale).round().clamp(0, steps)
    ### STUB
    # smallest = ...
    # scale = ...
    # numbers = ...
    ### END SOLUTION
    return numbers.to(torch.uint8), scale, smallest


check("affine", affine)

# %% [markdown] tags=["solution"]
# Sixteen levels have fifteen steps between them, so the divisor is `2**bits - 1`. Nothing needs a sign: numbers
# count from the smallest weight up. Weights of a trained model lie around zero, so the gain is small, and it is
# paid for with a second number for each row and an addition on the way back.

# %% [markdown]
# How much does the smallest weight gain on a real matrix? Compare with absmax.

# %%
model = mm.load_model("tales-dense")
weight = model.layers[0].feed_forward.w1.weight.detach()

try:
    numbers, scale, smallest = affine(weight, 4)
    back = numbers * scale + smallest
    error = (back - weight).norm() / weight.norm()
    print(f"with a smallest weight: error {error:.4f}")
    print(f"absmax:                 error {ch12.relative_error(weight, 4):.4f}")
except (NotImplementedError, TypeError, AttributeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 2: from bytes to a product
#
# Difficulty: easy · importance: essential · 4 minutes
#
# These are the lines of the plain path, shuffled: `packed` (out, in / 2) and `scales` (out, in / G, bfloat16)
# belong to a layer in 4 bits, `x` has shape (T, in). One line is a mistake and stays out. Type the letters in
# order, with blanks between them.

# %%
lines("plain_product_in_order")

# %%
### BEGIN SOLUTION
order = "B F A E D G"
### STUB
# order = "..."
### END SOLUTION
check("plain_product_in_order", order)

# %% [markdown] tags=["solution"]
# Unpack, cut into groups, floats, scales, join, multiply. Quantizing divided by the scale; the way back
# multiplies.

# %% [markdown]
# ## Exercise 3: bytes with everything in them
#
# Difficulty: easy · importance: essential · 6 minutes
#
# How many bytes does a quantized matrix of `shape` (rows, columns) take? It holds numbers of `bits` bits, and
# a scale of `scale_bits` bits for each group of `group` neighbours in a row (`group` divides the columns; None
# means one scale for each row). All is packed without a gap, from the first number to the last scale. A last byte
# that is only filled in part counts as a whole one.
#
# Example: `(2, 64), 4, 32, 16` are 128 · 4 + 4 · 16 = 576 bits, which is 72 bytes.


# %%
def stored_bytes(shape, bits, group, scale_bits):
    """Bytes of the numbers and the scales of one matrix."""
    ### BEGIN SOLUTION
    rows, columns = shape
    scales = rows * columns // (group or columns)
    total_bits = rows * columns * bits + scales * scale_bits
    return (total_bits + 7) // 8
    ### END SOLUTION


check("stored_bytes", stored_bytes)

# %% [markdown] tags=["solution"]
# For large matrices it is bits + scale_bits / group for each weight. With groups of 8 and scales of 32 bits,
# "4 bits" are 8 bits.

# %% [markdown]
# Mistral 7B in an imagined format: 3 bits, groups of 16, scales of 16 bits. How many GB? Take all weights as one
# matrix. Which of the two formats below is smaller? Guess first.

# %%
try:
    total = mm.count_parameters(mm.MODELS["mistral-7b-v0.2"]).total
    gb = [stored_bytes((total // 4096, 4096), *how) / 1e9
          for how in ((3, 16, 16), (4, None, 16))]
    print(f"3 bits in groups of 16: {gb[0]:.2f} GB")
    print(f"4 bits, whole rows:     {gb[1]:.2f} GB")
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 4: multiply first, scale late
#
# Difficulty: hard · importance: useful · 14 minutes
#
# The plain path makes every weight a float, with one multiplication for each. There is a cheaper order: within
# a group all weights share a scale, so it can be put outside the sum. Multiply x with the whole
# numbers, group by group, scale each group's **part**, and add the parts.
#
# `x` (..., in) is float32, `packed` uint8 (out, in / 2) as in the chapter, `scales` bfloat16 (out, n) with n
# groups in a row. Return x times the transposed weight, (..., out), float32. You may use `unpack`. Do it
# without making the matrix of weights (the check sees results only, not how you got them).


# %%
def late_product(x, packed, scales):
    """x: (..., in), packed: (out, in / 2), scales: (out, n) -> (..., out)"""
    ### BEGIN SOLUTION
    n = scales.shape[1]
    numbers = unpack(packed).float().unflatten(1, (n, -1))     # (out, n, G)
    x = x.unflatten(-1, (n, -1))                               # (..., n, G)
    parts = torch.einsum("...ng,ong->...on", x, numbers)       # (..., out, n)
    return (parts * scales.float()).sum(dim=-1)                # (..., out)
    ### END SOLUTION


check("late_product", late_product)

# %% [markdown] tags=["solution"]
# One multiplication by a scale for each group and output, in place of one for each weight. Kernels do it in
# this order: they multiply whole numbers, which is fast, and touch the scales once for each group.

# %%
small = mm.quantize_model(mm.load_model("tales-dense"), 4, 32)
layer = small.layers[1].attention.wq
x = torch.randn(3, 128, generator=torch.Generator().manual_seed(4))
try:
    gap = (late_product(x, layer.packed, layer.scales) - layer(x)).abs().max()
    print("the same as the library's layer:", gap.item() < 1e-4)
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 5: two slips on the way there and back
#
# Difficulty: medium · importance: essential · 9 minutes
#
# Find the bugs. This function takes a matrix to a few bits in groups and back. It runs, and the shape is right.
# The next cell shows two symptoms. First: rounding should leave the size of the weights as it is; here
# they shrink. Second: an outlier in row 0 should not move row 1. No group is all zeros here.


# %%
def round_trip(weight, bits, group):
    """(out, in) -> (out, in), a scale for each group of neighbours in a row"""
    ### BEGIN SOLUTION
    most = 2 ** (bits - 1) - 1
    groups = weight.reshape(-1, group)                    # was weight.T
    scales = groups.abs().amax(dim=-1, keepdim=True) / most
    numbers = (groups / scales).round()                   # was int()
    return (numbers * scales).reshape(weight.shape)
    ### STUB
    # most = 2 ** (bits - 1) - 1
    # groups = weight.T.reshape(-1, group)
    # scales = groups.abs().amax(dim=-1, keepdim=True) / most
    # numbers = (groups / scales).int()
    # return (numbers * scales).reshape(weight.T.shape).T
    ### END SOLUTION


# %%
weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(5))
spoiled = weight.clone()
spoiled[0, 3] = 40.0
back, moved = round_trip(weight, 4, 16), round_trip(spoiled, 4, 16)
print(f"size after the round trip: {back.norm() / weight.norm():.3f}")
print("row 1 moved by the outlier in row 0:", not torch.equal(back[1], moved[1]))

# %%
check("round_trip", round_trip)

# %% [markdown] tags=["solution"]
# `int()` cuts off what is behind the point, so every weight moved towards zero. And a transposed matrix is read
# column by column: its groups hold weights of several rows. Neither raises an error; with a square matrix of
# even sizes not even the shapes would look odd.

# %% [markdown]
# ## Exercise 6: give up the largest
#
# Difficulty: hard · importance: optional · 14 minutes
#
# With few bits it can pay to clip: let a **share** of the largest weight be the largest number. The few above it
# are cut to it, and all others get finer steps. Find the best share for each row.
#
# For a share s: step = s · (largest absolute weight of the row, at least 1e-8) / most, with most =
# `2**(bits - 1) - 1`. Round, clamp to ±most, go back to weights, and sum the squared differences to the row.
# Return for each row the share of `shares` with the smallest sum (the first of equals), float32 (out,).


# %%
def best_clip(weight, bits, shares):
    """weight: (out, in), shares: a tuple of numbers -> a share each (out,)"""
    ### BEGIN SOLUTION
    most = 2 ** (bits - 1) - 1
    largest = weight.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8)
    errors = []
    for share in shares:
        step = share * largest / most                     # (out, 1)
        back = (weight / step).round().clamp(-most, most) * step
        errors.append((back - weight).square().sum(dim=-1))
    return torch.tensor(shares)[torch.stack(errors).argmin(dim=0)]
    ### END SOLUTION


check("best_clip", best_clip)

# %% [markdown] tags=["solution"]
# A clipped weight is wrong by a lot, all others by less. Squares weigh the two against each other. Methods such as
# AWQ and GPTQ go on from here: they look at what the layer's **outputs** lose, with real inputs.

# %%
weight = model.output.weight.detach()
try:
    for bits in (8, 4, 3, 2):
        best = best_clip(weight, bits, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
        print(f"{bits} bits: the best share is {best.mean():.2f} on the average")
except (NotImplementedError, TypeError, AttributeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 7: bits where they matter
#
# Difficulty: medium · importance: useful · 18 minutes
#
# An open task. First write the tool: a **copy** of a model in which each kind of matrix went to its own number of
# bits and back, with one scale for each row (`quantize` and `dequantize`). `bits_of` maps kinds to bits, for
# instance `{"w2": 4, "output": 8}`; the kind of `layers.1.feed_forward.w2.weight` is `w2`, that of
# `output.weight` is `output`, that of `tok_embeddings.weight` is `tok_embeddings`. All other weights stay as
# they are, and so does the model itself.


# %%
@torch.no_grad()
def with_bits(model, bits_of):
    """A copy of the model, its matrices of these kinds in few bits and back."""
    ### BEGIN SOLUTION
    new = copy.deepcopy(model)
    for name, weight in new.named_parameters():
        kind = name.split(".")[-2]
        if kind in bits_of:
            weight.copy_(dequantize(*quantize(weight, bits_of[kind])))
    return new
    ### END SOLUTION


check("with_bits", with_bits)

# %% [markdown]
# Then use it. "3 bits for all, 6 for the output layer" makes 3.6 bits for a weight on the average, over the kinds in
# the list. Who should get more, who less? Write down what you expect, measure, and try to beat it without
# spending more bits.

# %%
plan = {kind: 3 for kind in ch12.LAYERS} | {"output": 6}
sizes = {kind: ch12.numbers_of(model, kind) for kind in plan}
mean = sum(plan[kind] * n for kind, n in sizes.items()) / sum(sizes.values())
try:
    loss = ch12.nats_per_byte(with_bits(model, plan))
    print(f"{mean:.2f} bits on the average: {loss - ladder.corpus.floor:.4f} above "
          "the floor")
except (NotImplementedError, TypeError, AttributeError):
    print("not written yet")

# %% [markdown] tags=["solution"]
# The output layer deserves its bits first, then w2 and wo, which write into the stream that all later layers read. One
# measurement for each kind, as in the chapter, gives a good order; whether costs add up has to be measured,
# because errors of different layers meet.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
