# %% [markdown]
# # Exercises 6: Generation and cache
#
# Eight exercises on chapter 6, about an hour and a half in all. The core pieces, `draw`, `keep_top_k` and
# `keep_top_p`, and the memory of a layer are written inside the chapter itself; here you vary, repair and
# use what you built.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.

# %%
import math

import torch
import torch.nn.functional as F

import minimistral as mm
from minimistral.course import check, hint, lines, progress
from minimistral.course.chapters import ch06_generation as ch06
from minimistral.tales import parse_tale

model = mm.load_model("tales-dense")
tokenizer = mm.load_tokenizer("tales-dense")

# %% [markdown]
# ## Exercise 1: the whole dial, zero included
#
# Difficulty: easy · importance: essential · 6 minutes
#
# Complete the two returns. `logits` has the shape (..., V), and each row becomes a distribution: divided
# by the temperature, then a softmax. Temperature 0 would be a division by zero; there the largest
# logit gets probability 1 and all others 0. Of equal largest logits the first gets it. The result has the
# dtype of the logits. Example: `[[1., 4., 4.]]` at 0 gives `[[0., 1., 0.]]`.


# %%
def with_temperature(logits, temperature):
    """The distribution at a temperature of 0 or more. (..., V) -> (..., V)"""
    if temperature == 0:
        ### BEGIN SOLUTION
        best = logits.argmax(dim=-1)                      # the first of equal ones
        return F.one_hot(best, logits.shape[-1]).to(logits.dtype)
        ### STUB
        # return ...
        ### END SOLUTION
    ### BEGIN SOLUTION
    return (logits / temperature).softmax(dim=-1)
    ### STUB
    # return ...
    ### END SOLUTION


check("with_temperature", with_temperature)

# %% [markdown] tags=["solution"]
# Zero is the end towards which the softmax goes as the temperature falls, except for equal logits, which
# would share. Greedy has to choose one of them, and `argmax` takes the first.

# %% [markdown]
# ## Exercise 2: the loop with a cache
#
# Difficulty: easy · importance: essential · 5 minutes
#
# These are the lines of a loop that writes at most `n` tokens after `prompt`, shuffled. `choose` makes a
# token from logits; `stop_ids` holds the stop tokens, which must not be in `new`. Each token is kept before
# it is read. One line is a mistake and stays out. Type the letters in order, with blanks between them.

# %%
lines("cached_loop_in_order")

# %%
### BEGIN SOLUTION
order = "B E H G A C F"
### STUB
# order = "..."
### END SOLUTION
check("cached_loop_in_order", order)

# %% [markdown] tags=["solution"]
# The prompt is read once. In the loop: choose, ask whether it ends the text, keep, read the one new
# token. The line that stays out reads the whole text into a cache that holds it already.

# %% [markdown]
# ## Exercise 3: another cut
#
# Difficulty: easy · importance: useful · 7 minutes
#
# Top-p looks at a sum. Another cut, known as min-p, compares each token with the likeliest one: a token stays
# if its probability is at least `share`, from 0 to 1, times the largest of its row. What is left is
# scaled so that each row sums to 1 again. Example: `[[0.5, 0.3, 0.2]]` with a share of 0.5 keeps the first
# two and gives `[[0.625, 0.375, 0]]`.


# %%
def keep_min_p(probabilities, share):
    """Leave the tokens with at least a share of the best. (B, V) -> (B, V)"""
    ### BEGIN SOLUTION
    limit = share * probabilities.amax(dim=-1, keepdim=True)            # (B, 1)
    kept = probabilities.masked_fill(probabilities < limit, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)
    ### END SOLUTION


check("keep_min_p", keep_min_p)

# %% [markdown] tags=["solution"]
# No sorting is needed. Where the model is sure, the limit is high and nearly everything is cut; at an
# open place it is low.

# %% [markdown]
# How many tokens does your cut leave at the three places of the chapter, at temperature 1.5?

# %%
try:
    for name, text in ch06.CONTEXTS.items():
        p = (ch06.next_logits(model, tokenizer, text) / 1.5).softmax(-1)
        print(f"{name:20}", int((keep_min_p(p[None], 0.1) > 0).sum()), "tokens")
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 4: stop at several tokens
#
# Difficulty: medium · importance: useful · 10 minutes
#
# Not every end is a single token. A chat may have to stop at a phrase, which is several tokens long. `ids` is
# a list of token ids, `stops` a list of stop sequences, each a list of one or more ids. Return the ids
# before the stop sequence that **begins** first, without it. A sequence counts only if it is there as a
# whole. If there is none, return all. Example: `[5, 1, 2, 6]` with `[[6], [1, 2]]` gives `[5]`.


# %%
def until_stop(ids, stops):
    """What stands before the first whole stop sequence."""
    ### BEGIN SOLUTION
    for i in range(len(ids)):
        if any(ids[i:i + len(stop)] == stop for stop in stops):
            return ids[:i]
    return ids
    ### END SOLUTION


check("until_stop", until_stop)

# %% [markdown] tags=["solution"]
# Going through the places in order finds the earliest by itself. A slice at the end is shorter than the
# sequence, so half a sequence is never equal to it. A loop that streams must also hold back a possible
# beginning of a stop sequence, until it knows.

# %% [markdown]
# ## Exercise 5: the text falls apart
#
# Difficulty: medium · importance: essential · 8 minutes
#
# Find the bug. This greedy loop has a cache and no error, but only its first new token is right. The next
# cell compares it with a loop that reads everything again. Run it, then repair the line.


# %%
@torch.no_grad()
def write_cached(model, prompt, n):
    """n new tokens after a prompt, each the likeliest, with a cache. -> list"""
    ### BEGIN SOLUTION
    cache = mm.KVCache(model.config)
    logits = model(torch.tensor([prompt]), cache)[0, -1]
    new = []
    for step in range(n):
        new.append(int(logits.argmax()))
        position = torch.tensor([len(prompt) + step])     # was step alone
        logits = model(torch.tensor([[new[-1]]]), cache, position)[0, -1]
    return new
    ### STUB
    # cache = mm.KVCache(model.config)
    # logits = model(torch.tensor([prompt]), cache)[0, -1]
    # new = []
    # for step in range(n):
    #     new.append(int(logits.argmax()))
    #     position = torch.tensor([step])
    #     logits = model(torch.tensor([[new[-1]]]), cache, position)[0, -1]
    # return new
    ### END SOLUTION


# %%
prompt = tokenizer.encode("The golden ring\nOne morning", bos=True)
right = list(prompt)
with torch.no_grad():
    for _ in range(14):
        right.append(int(model(torch.tensor([right]))[0, -1].argmax()))
print("uncached:", tokenizer.decode(right[len(prompt):]))
print("cached:  ", tokenizer.decode(write_cached(model, prompt, 14)))

# %%
check("write_cached", write_cached)

# %% [markdown] tags=["solution"]
# The first new token stands at position `len(prompt)`, not at 0. With the position of the step, the model
# takes it for a word from the beginning of the text, and it even overwrites what was there. Leaving positions
# out is a repair as well: the model goes on after what its cache has seen.

# %% [markdown]
# ## Exercise 6: what writing costs, exactly
#
# Difficulty: medium · importance: essential · 12 minutes
#
# Return two whole numbers: how many **tokens** go through the model, and how many **pairs** of query and key
# it looks at, when it writes `new` tokens (1 or more) after a prompt of `prompt` tokens. A token makes a pair
# with itself and with every token before it. The last new token is chosen and never read. Without a cache
# the whole text is read anew for each new token. Example: prompt 3 and 2 new tokens without a cache: 3 + 4
# = 7 tokens and 6 + 10 = 16 pairs; with a cache 4 tokens and 10 pairs.


# %%
def work_of_writing(prompt, new, cached):
    """(tokens read, pairs of query and key) for writing new tokens."""
    ### BEGIN SOLUTION
    lengths = range(prompt, prompt + new)           # of the text, at each choice
    if cached:
        lengths = lengths[-1:]                      # each token once
    return sum(lengths), sum(t * (t + 1) // 2 for t in lengths)
    ### END SOLUTION


check("work_of_writing", work_of_writing)

# %% [markdown] tags=["solution"]
# With a cache everything that is ever read is read once, as if the text (without its last token) went
# through in one piece. Without it the tokens grow with the square of the length and the pairs with the
# cube.

# %% [markdown]
# A check against the meter of the chapter, and the numbers of a long answer: how many times more work
# is it without a cache?

# %%
try:
    with ch06.counting(model) as count:
        mm.generate(model, prompt, 30)
    yours = work_of_writing(len(prompt), 30, True)[0]
    print("counted:", count["tokens"], " yours:", yours)
    with_cache = work_of_writing(500, 1000, True)
    without = work_of_writing(500, 1000, False)
    print("times more:", [round(a / b) for a, b in zip(without, with_cache)])
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 7: the likeliest text
#
# Difficulty: hard · importance: optional · 18 minutes
#
# Greedy takes the likeliest token at each step. The likeliest **text** may begin with a less likely token.
# Beam search keeps `width` beginnings. In each of `steps` steps every beginning is continued by every token;
# of all these continuations together the `width` likeliest are kept. The logarithm of a text's
# probability is the sum over its tokens. Return the new ids of the likeliest at the end, without `start`.
# `next_logs(ids)` gives log p of each next token, a tensor (V,); `start` is a list. All sums differ.


# %%
def beam(next_logs, start, width, steps):
    """The likeliest continuation that a beam of this width finds. -> list"""
    ### BEGIN SOLUTION
    beams = [(0.0, list(start))]                          # (log p, ids)
    for _ in range(steps):
        grown = [(total + log, ids + [token]) for total, ids in beams
                 for token, log in enumerate(next_logs(ids).tolist())]
        beams = sorted(grown, reverse=True)[:width]
    return beams[0][1][len(start):]
    ### END SOLUTION


check("beam", beam)

# %% [markdown] tags=["solution"]
# A width of 1 is greedy; a width of $V^{steps}$ would try everything. In between there is no promise, and
# the result may even get worse with a larger width. For stories it is a poor writer: the likeliest tale is
# an average one, and every beam writes it.

# %% [markdown]
# What does the shipped model write with it, and how likely is the text?

# %%
@torch.no_grad()
def next_logs(ids):
    return model(torch.tensor([ids]))[0, -1].log_softmax(-1)


try:
    for width in (1, 4):
        new = beam(next_logs, prompt, width, 12)
        text = prompt + new
        nats = -sum(next_logs(text[:i])[text[i]].item()
                    for i in range(len(prompt), len(text)))
        print(f"width {width}: {nats:.2f} nats: {tokenizer.decode(new)}")
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 8: which setting writes best?
#
# Difficulty: medium · importance: useful · 25 minutes
#
# An open task. First the measure: from a list of booleans, one for each text, make the share $s$ of the
# accepted and its standard error $\sqrt{s(1 - s)/n}$, where $n$ is the number of texts. Example: 30 of 40
# accepted give 0.75 and about 0.0685; return both unrounded. All accepted give an error of 0, which flatters: it is an estimate.


# %%
def share_and_error(accepted):
    """list of bool -> (share, standard error), two floats"""
    ### BEGIN SOLUTION
    n = len(accepted)
    share = sum(accepted) / n
    return share, math.sqrt(share * (1 - share) / n)
    ### END SOLUTION


check("share_and_error", share_and_error)

# %% [markdown]
# Then use it. Which setting would you ship: temperature, top-k, top-p, or your min-p? Write down what you
# expect, and measure. A difference that is smaller than two standard errors is no result: write more
# tales, or say that you cannot tell. And look at how many tales are *different*: temperature 0 is always
# accepted.

# %%
def try_out(n, **setting):
    rows = mm.generate(model, [[tokenizer.bos_id]] * n, 160, seed=1,
                       stop_ids=[tokenizer.eos_id], **setting)
    return [tokenizer.decode(row) for row in rows]


try:
    for setting in ({"temperature": 1.0}, {"temperature": 1.3, "top_p": 0.9}):
        tales = try_out(24, **setting)
        accepted = [parse_tale(t).error_at is None for t in tales]
        share, error = share_and_error(accepted)
        print(setting, f"accepted {share:.2f} ± {error:.2f},",
              f"{len(set(tales))} different")
except NotImplementedError:
    print("not written yet")

# %% [markdown] tags=["solution"]
# With 24 tales the error is often as large as the difference, and that is the lesson. Quality has several
# measures, and they pull in different directions: accepted tales, different tales, how often each name
# occurs. A setting is chosen for a purpose.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
