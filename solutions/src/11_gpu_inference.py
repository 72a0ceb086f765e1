# %% [markdown]
# # Exercises 11: GPU inference
#
# Seven exercises on chapter 11, about an hour in all. `step_bytes` and the core piece `accept` are written inside the
# chapter itself; here you repair, count, and let models propose.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.

# %%
import statistics

import torch

import minimistral as mm
from minimistral.course import check, hint, ladder, lines, progress
from minimistral.course.chapters import ch11_gpu_inference as ch11
from minimistral.speculative import PromptLookup, speculate

# %% [markdown]
# ## Exercise 1: a benchmark that fools itself
#
# Difficulty: easy · importance: essential · 8 minutes
#
# Find the bugs. `device` is the chapter's fake GPU: `device.run()` starts a piece of work and returns at once,
# `device.wait()` returns when all work is done, `device.clock()` is a watch in seconds. Return the usual time of one piece of
# work: first `warm_up` runs that do not count, then `rounds` samples, each with the device idle before it and finished at its
# end; then their **median**. The next cell shows the symptom.


# %%
def time_it(device, rounds, warm_up):
    """Seconds of one piece of work, the median of `rounds` samples."""
    ### BEGIN SOLUTION
    for _ in range(warm_up):                              # was missing
        device.run()
    samples = []
    for _ in range(rounds):
        device.wait()                                     # was missing
        begun = device.clock()
        device.run()
        device.wait()                                     # was missing
        samples.append(device.clock() - begun)
    return statistics.median(samples)                     # was the mean
    ### STUB
    # samples = []
    # for _ in range(rounds):
    #     begun = device.clock()
    #     device.run()
    #     samples.append(device.clock() - begun)
    # return sum(samples) / len(samples)
    ### END SOLUTION


# %%
durations = [0.5, 0.05] + 4 * [0.002] + [0.040] + 5 * [0.002]
told = time_it(ch11.FakeDevice(durations), rounds=7, warm_up=2)
print(f"the usual piece takes 2 ms; measured: {1000 * told:.2f} milliseconds")

# %%
check("time_it", time_it)

# %% [markdown] tags=["solution"]
# Without waiting, the clock measures orders. Without a warm-up, the half second of the first run is in the mean. And a mean is
# moved by the one sample that another program disturbed.

# %% [markdown]
# ## Exercise 2: one step of speculative decoding
#
# Difficulty: easy · importance: essential · 4 minutes
#
# These lines are one turn of the loop, shuffled. `check_drafts` runs the last token of the text and the proposals in one step of
# the model; `engine.fast.forget(0, n)` takes back all but the first n tokens of the cache. One line is a mistake and stays out.
# Type the letters in order, with blanks between them.

# %%
lines("speculative_step_in_order")

# %%
### BEGIN SOLUTION
order = "A D G E F C"
### STUB
# order = "..."
### END SOLUTION
check("speculative_step_in_order", order)

# %% [markdown] tags=["solution"]
# Propose, check, decide, extend, take back. The last token that was found has not been run: the cache holds one token less than
# the text.

# %% [markdown]
# ## Exercise 3: where arithmetic takes over
#
# Difficulty: medium · importance: useful · 8 minutes
#
# From how many texts on is arithmetic the limit? Return the smallest batch for which a step's arithmetic takes at least as long
# as its reading. `speed` is in bytes a second, `rate` in operations a second, texts are short (length 0). You may use
# `ch11.step_bytes(config, batch, length, bits)` and `ch11.step_operations(config, batch, length)`.
#
# Example: Mistral 7B, 16 bits, on an H200 (4800e9, 989e12): 207.


# %%
def arithmetic_from(config, speed, rate, bits):
    """The smallest batch that is limited by arithmetic."""
    ### BEGIN SOLUTION
    batch = 1
    while (ch11.step_operations(config, batch, 0) / rate
           < ch11.step_bytes(config, batch, 0, bits) / speed):
        batch += 1
    return batch
    ### END SOLUTION


check("arithmetic_from", arithmetic_from)

# %% [markdown] tags=["solution"]
# For dense models the size drops out: rate · bits / (16 · speed). A mixture reads up to E experts and computes with k, so it
# turns later, by the factor of all weights over active ones.

# %%
try:
    for name in ("mistral-7b-v0.2", "llama-2-70b", "mixtral-8x7b-v0.1"):
        turns = [arithmetic_from(mm.MODELS[name], 4800e9, 989e12, bits)
                 for bits in (16, 8, 4)]
        print(f"{name:18} on an H200, 16, 8 and 4 bits:", turns)
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 4: how many texts fit
#
# Difficulty: easy · importance: useful · 6 minutes
#
# A large batch needs memory for its caches. `memory` is in bytes. The whole model has to be in it, with `bits` for each
# weight, tables included; the rest is for the caches of texts of `length` tokens, with 16 bits for a number and at most a
# window in each layer (`ch11.cache_bytes(config, length)`). How many texts fit? A whole number, 0 if none.


# %%
def texts_that_fit(config, memory, length, bits):
    """How many texts of this length can be written at once."""
    ### BEGIN SOLUTION
    weights = mm.count_parameters(config).total * bits / 8
    return max(0, int((memory - weights) // ch11.cache_bytes(config, length)))
    ### END SOLUTION


check("texts_that_fit", texts_that_fit)

# %% [markdown] tags=["solution"]
# Compare with exercise 3: 24 GB hold 7B in 16 bits and the caches of 17 texts of 4,096 tokens. Arithmetic would become the limit
# much later. On most machines memory ends the batch, not speed; and that is one more reason for shared heads, windows and
# few bits.

# %%
try:
    for name in ("mistral-7b-v0.1", "mistral-7b-v0.2", "llama-2-7b"):
        fits = [texts_that_fit(mm.MODELS[name], 24e9, n, 16) for n in (4096, 16384)]
        print(f"{name:16} 24 GB, 16 bits, texts of 4,096 and 16,384 tokens:", fits)
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 5: what proposals can gain
#
# Difficulty: medium · importance: useful · 8 minutes
#
# A step checks `drafts` proposals. Each one, if all before it were accepted, is accepted with probability `acceptance`,
# independently. The step always writes one token more than it accepts. One proposal takes `cost` times as long as a step of the
# model; checking takes one step. Return how many times as fast this is as plain writing, on average.
#
# Example: acceptance 0.5, two proposals, cost 0: 1.75.


# %%
def speed_up(acceptance, drafts, cost):
    """Tokens for the time of one plain step."""
    ### BEGIN SOLUTION
    written = sum(acceptance**i for i in range(drafts + 1))
    return written / (1 + drafts * cost)
    ### END SOLUTION


check("speed_up", speed_up)

# %% [markdown] tags=["solution"]
# Token i + 1 of a step is written if the first i proposals were accepted, with probability aⁱ. More proposals help less and less
# and cost the same each: for every a and cost there is a best number.

# %% [markdown]
# A draft of 7B for a model of 70B, both in 4 bits: by gpt-fast's measurements (25.25 and 196.8 tokens a second alone, 48.4
# together) a proposal costs 0.13 of a step, and the gain was 1.9 times. How often must the draft have been right for that?

# %%
try:
    cost = 25.25 / 196.8
    for a in (0.5, 0.7, 0.9):
        gains = [speed_up(a, n, cost) for n in range(1, 11)]
        best = max(range(10), key=lambda i: gains[i])
        print(f"acceptance {a}: {best + 1} proposals are best, {gains[best]:.2f} "
              "times as fast")
    needed = next(a for a in range(100) if 48.4 / 25.25 < max(
        speed_up(a / 100, n, cost) for n in range(1, 11)))
    print(f"for a gain of {48.4 / 25.25:.2f} at least {needed}% must be accepted")
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 6: fast, and not the same text
#
# Difficulty: hard · importance: essential · 12 minutes
#
# Find the bugs. Greedy speculative decoding with a toy: `model.run(tokens)` puts tokens into its cache and returns what comes
# next after **each** of them, in one step. `model.keep(n)` forgets all but the first n tokens of the cache. `propose(text, count)`
# returns `count` guesses. The result must be the n tokens that the model would write alone, in as few steps as the
# guesses allow.


# %%
def speculate_greedy(model, propose, prompt, n, drafts):
    """-> n new ids"""
    text = list(prompt)
    text.append(model.run(text)[-1])
    while len(text) < len(prompt) + n:
        proposed = propose(text, drafts)
        told = model.run([text[-1], *proposed])           # drafts + 1 answers
        right = 0
        while right < len(proposed) and proposed[right] == told[right]:
            right += 1
        ### BEGIN SOLUTION
        text += [*proposed[:right], told[right]]          # the model's own, always
        model.keep(len(text) - 1)                         # was missing
        ### STUB
        # text += proposed[:right] or told[:1]
        ### END SOLUTION
    return text[len(prompt):len(prompt) + n]


# %%
alone, fast = ch11.ToyModel(), ch11.ToyModel()
own = [alone.run([3, 1, 4])[-1]]
while len(own) < 20:
    own.append(alone.run(own[-1:])[-1])
quick = speculate_greedy(fast, ch11.count_up, [3, 1, 4], 20, 4)
print("alone:   ", own, f"{alone.steps} steps")
print("proposed:", quick, f"{fast.steps} steps")

# %%
check("speculate_greedy", speculate_greedy)

# %% [markdown] tags=["solution"]
# Rejected tokens stayed in the cache, and the model went on from a text that nobody wrote. That raises no error; greedy text that
# is not equal to the plain one is the only symptom, so test for equality. And the answer after the last accepted proposal was
# thrown away, though it was paid for.

# %% [markdown]
# ## Exercise 7: a draft of your own
#
# Difficulty: medium · importance: optional · 15 minutes
#
# An open task. First the tool: a draft that costs nothing. `counts` (V, V) says how often token j followed token i, at row i and
# column j. Propose `count` tokens: the one that most often follows the last token of the text, then the one that most often
# follows that, and so on. Return a list of ids.


# %%
def bigram_draft(counts, text, count):
    """-> a list of `count` ids"""
    ### BEGIN SOLUTION
    found, token = [], text[-1]
    for _ in range(count):
        token = int(counts[token].argmax())
        found.append(token)
    return found
    ### END SOLUTION


check("bigram_draft", bigram_draft)

# %% [markdown]
# Then use it: the shipped model writes a tale greedily, and two drafts propose. (`ch11.Proposing` turns your function into a draft
# that `speculate` can ask.) How many tokens a step? Can you beat both? A
# table of pairs and what follows them, look-up first and counts where it finds nothing, fewer proposals where you are unsure: all of
# them keep the text as it is.

# %%
model = mm.load_model("tales-dense")
engine = mm.Engine(model, spare=4, compile=False)
ids = ladder.tokens.ids                                   # two thousand tales
counts = torch.zeros(960, 960)
counts.index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
prompt = mm.load_tokenizer("tales-dense").encode("The golden ring\n", bos=True)
own = ch11.Proposing(lambda text, n: bigram_draft(counts, text, n), 960)
try:
    for name, draft in (("look-up", PromptLookup()), ("counts", own)):
        told = speculate(engine, prompt, 80, draft)
        assert told.ids == mm.generate(model, prompt, 80)
        print(f"{name:8} {told.acceptance:.2f} accepted, "
              f"{told.tokens_per_step:.2f} tokens a step")
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown] tags=["solution"]
# Look-up proposes only where it has seen the same tokens before; counts always propose, and are often wrong. So compare tokens a
# step, not acceptance. In a product the draft is a small model that was trained on the large one's text.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
