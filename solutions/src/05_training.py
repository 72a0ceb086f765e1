# %% [markdown]
# # Exercises 5: Training
#
# Eight exercises on chapter 5, about an hour and a half in all. The pieces `next_token_nats`,
# `parameter_groups`, `learning_rate` and `accumulate_gradients` are written inside the chapter; here you vary,
# repair and use what you built.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.

# %%
import math

import torch

import minimistral as mm
from minimistral.course import check, hint, ladder, lines, progress, show
from minimistral.course.chapters import ch05_training as ch05
from minimistral.train import IGNORE, Rows, next_token_nats

# %% [markdown]
# ## Exercise 1: cut a row in two
#
# Difficulty: easy · importance: essential · 5 minutes
#
# `rows` are whole numbers of shape (R, T + 1); wherever a document begins there stands the token `start`. Return inputs
# and targets, each (R, T). A target that is `start` counts in no loss, so `IGNORE` takes its place. The
# inputs keep it. Leave `rows` as they are. With start 1 the row 1 7 2 1 5 gives the inputs 1 7 2 1 and
# the targets 7 2 IGNORE 5.


# %%
def inputs_and_targets(rows, start):
    """rows: (R, T + 1) -> inputs (R, T), targets (R, T)"""
    ### BEGIN SOLUTION
    inputs = rows[:, :-1]                                 # all but the last
    targets = rows[:, 1:]                                 # all but the first
    targets = targets.masked_fill(targets == start, IGNORE)
    ### STUB
    # inputs = ...
    # targets = ...
    ### END SOLUTION
    return inputs, targets


check("inputs_and_targets", inputs_and_targets)

# %% [markdown] tags=["solution"]
# `masked_fill` without an underscore makes a new tensor. A slice such as `rows[:, 1:]` shares the memory of `rows`, so
# writing into it would change the text for all later epochs.

# %% [markdown]
# ## Exercise 2: one step, line by line
#
# Difficulty: easy · importance: essential · 5 minutes
#
# These are the lines of one training step, shuffled. `batch` has shape (B, T + 1). One line is a mistake and stays
# out. Type the letters in order, with blanks between them. (One line may stand at several places; every right order
# is accepted.)

# %%
lines("one_step_in_order")

# %%
### BEGIN SOLUTION
order = "C A B F D H G"
### STUB
# order = "..."
### END SOLUTION
check("one_step_in_order", order)

# %% [markdown] tags=["solution"]
# The loss needs the logits, the gradient needs the loss, the clipping needs the gradient, and the step comes
# last. `zero_grad` may stand anywhere between the last step and this backward.

# %% [markdown]
# ## Exercise 3: shorten a gradient
#
# Difficulty: easy · importance: essential · 8 minutes
#
# `gradients` is a list of tensors of any shape. Taken together they are one long vector. If its length is above `limit`, return
# new tensors that are shorter by one common factor, so that the length is `limit`; else return them with the same
# values. All zeros stay zeros. The list with the tensors (3, 0) and (4) and limit 1 becomes (0.6, 0) and (0.8).


# %%
def clip_gradients(gradients, limit):
    """A list of tensors whose common length is at most limit."""
    ### BEGIN SOLUTION
    length = math.sqrt(sum(g.square().sum().item() for g in gradients))
    factor = min(1.0, limit / max(length, 1e-12))
    return [g * factor for g in gradients]
    ### END SOLUTION


check("clip_gradients", clip_gradients)

# %% [markdown] tags=["solution"]
# One factor for all: the direction of the step stays, only its length changes. Clipping every tensor, or every number, by
# itself would turn the step.

# %% [markdown]
# ## Exercise 4: one step of AdamW
#
# Difficulty: medium · importance: essential · 15 minutes
#
# `mean` and `square` are the running means so far; `step` counts from 1.
#
# 1. New mean: 0.9 of the old one, 0.1 of the gradient. New square: 0.95 of the old one, 0.05 of the
#    gradient squared.
# 2. Both began at 0: for this step divide them by $1 - 0.9^{step}$ and $1 - 0.95^{step}$.
# 3. The weight loses the share rate · decay of itself, then rate times the corrected mean over (root
#    of the corrected square, plus 1e-8).
#
# Return the new weight, mean and square (uncorrected). Weight 1, gradient 5, rate 0.1, decay 0: 0.9 at
# step 1.


# %%
def adamw_step(weight, gradient, mean, square, step, rate, decay):
    """Tensors of one shape -> weight, mean, square after the step"""
    ### BEGIN SOLUTION
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.95 * square + 0.05 * gradient.square()
    m = mean / (1 - 0.9 ** step)
    s = square / (1 - 0.95 ** step)
    weight = weight * (1 - rate * decay) - rate * m / (s.sqrt() + 1e-8)
    return weight, mean, square
    ### END SOLUTION


check("adamw_step", adamw_step)

# %% [markdown] tags=["solution"]
# At the first step the corrected mean is the gradient and the corrected root its size: every weight moves by the
# rate, whatever the gradient's size. The decay never meets the division; that is the W in AdamW.

# %% [markdown]
# Does your optimiser learn? Here it trains the tiny model for 40 steps.

# %%
# NBVAL_IGNORE_OUTPUT: the loss of a model trained in this run
try:
    model, state = ch05.tiny_model(), {}
    plan = mm.TrainConfig(steps=40, batch_size=8, seq_len=64, at_starts=True)
    for step in range(40):
        inputs, targets = ch05.training_batch(ladder.tokens, step, plan)
        nats = next_token_nats(model(inputs), targets)
        (nats / (targets != IGNORE).sum()).backward()
        for w in model.parameters():
            old = state.get(w, (torch.zeros_like(w), torch.zeros_like(w)))
            new, *state[w] = adamw_step(w.data, w.grad, *old, step + 1, 0.01, 0.0)
            w.data, w.grad = new, None
    print(f"{nats.item() / (targets != IGNORE).sum():.2f} nats per token")
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 5: a loss that depends on the batch size
#
# Difficulty: medium · importance: essential · 10 minutes
#
# Find the bugs. This function measures nats per counted target of a text in rows (inputs, targets and
# positions, each (R, T)); places with `IGNORE` do not count. Two lines hold a slip each. The next cell shows the
# symptom: another batch size, another loss. Repair it, so that the result is the same for every batch size.


# %%
@torch.no_grad()
def nats_per_token(model, rows, batch_size):
    """rows: Rows of (R, T) -> nats per counted target, a float"""
    ### BEGIN SOLUTION
    nats, counted = 0.0, 0
    for x, y, positions in zip(*(part.split(batch_size) for part in rows)):
        nats += float(next_token_nats(model(x, positions=positions), y))
        counted += int((y != IGNORE).sum())               # was y.numel()
    return nats / counted                                 # was a mean of means
    ### STUB
    # losses = []
    # for x, y, positions in zip(*(part.split(batch_size) for part in rows)):
    #     nats = float(next_token_nats(model(x, positions=positions), y))
    #     losses.append(nats / y.numel())
    # return sum(losses) / len(losses)
    ### END SOLUTION


# %%
chance = torch.Generator().manual_seed(5)
ids = torch.randint(960, (7, 13), generator=chance)
targets = ids[:, 1:].clone()
for r in range(7):
    targets[r, 2 + (5 * r) % 11:] = IGNORE                # rows of unequal length
rows = Rows(ids[:, :-1], targets, torch.arange(12).expand(7, 12))
for size in (2, 3, 7):
    loss = nats_per_token(ch05.tiny_model(), rows, size)
    print(f"batch size {size}: {loss:.3f}   (ln V is {math.log(960):.3f})")

# %%
check("nats_per_token", nats_per_token)

# %% [markdown] tags=["solution"]
# Carry two sums and divide once, at the end. A model with random weights must pay about $\ln V$ for each token; a result
# far below it was the second symptom: the divisor counted places that ask no question.

# %% [markdown]
# ## Exercise 6: six curves, six causes
#
# Difficulty: medium · importance: essential · 12 minutes
#
# Six runs with one fault each. They are not those of the chapter. The line is the training loss, the squares are the
# loss on unseen tales, always measured rightly; in run 6 they leave the picture. The dots are the floor.

# %%
figure, alt = ch05.quiz_picture()
show(figure, alt=alt)

# %% [markdown]
# Type the letters of the causes in the order of the runs: first the cause of run 1, then that of run 2, and so on. One cause
# belongs to none of them.

# %%
lines("six_curves")

# %%
### BEGIN SOLUTION
causes = "F C G D B E"
### STUB
# causes = "..."
### END SOLUTION
check("six_curves", causes)

# %% [markdown] tags=["solution"]
# Sort them: runs 5 and 6 fall below the floor, so the text is known by heart or the answer leaks; copying is learned at once. Run 1
# jumps: the text changes. Run 3 looks fine to the training loss alone. Runs 2 and 4 stay high: one fell at once and
# stuck, the other is still falling.

# %% [markdown]
# ## Exercise 7: keep the exam out of the textbook
#
# Difficulty: medium · importance: essential · 12 minutes
#
# If a text that judges a model also stands in what it learned from, a good score means nothing. Return the documents that have no run of `n`
# words side by side in common with any text of `held_out`, in their order. Compare without differences of case;
# words are what `split()` gives. A document of fewer than n words has no run, so it stays. With n = 3, "the OLD mill burns" goes if
# a held-out text says "in the old mill".


# %%
def without_test_text(documents, held_out, n):
    """The documents that share no run of n words with a held-out text."""
    ### BEGIN SOLUTION
    def runs(text):
        words = text.casefold().split()
        return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}

    known = set().union(*map(runs, held_out))
    return [text for text in documents if not runs(text) & known]
    ### END SOLUTION


check("without_test_text", without_test_text)

# %% [markdown] tags=["solution"]
# The held-out runs are collected once; each document then needs one intersection. Real pipelines do the same with runs
# of 8 to 13 words and hashes instead of tuples.

# %% [markdown]
# How much do our own training tales share with the validation tales? They come from one grammar, so short runs are
# everywhere. Look at how the share falls with n.

# %%
try:
    train = ladder.corpus.train_documents[:300]
    for n in (3, 6, 12, 24):
        kept = without_test_text(train, ladder.corpus.val_documents, n)
        print(f"n = {n:2}: {len(kept)} of {len(train)} tales share no run")
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 8: find a rate
#
# Difficulty: hard · importance: useful · 20 minutes
#
# An open task. The learning rate is the first number to look for. `run(rate)` trains a model and returns its loss; it raises
# ValueError if the loss broke, or returns NaN: both mean *infinitely bad*. Run every rate of `rates` once. If the best
# is the highest (or the lowest) that was tried, a better one may lie beyond: run its double (its half), and go on as long as that is better.
# Return the best rate. Runs are expensive: never run a rate twice. The rates come in any order, and between
# the edges nothing new is run.


# %%
def best_rate(run, rates):
    """The rate with the smallest loss, looked for beyond the edges as well."""
    ### BEGIN SOLUTION
    found = {}

    def attempt(rate):
        try:
            loss = run(rate)
        except ValueError:
            loss = math.inf
        found[rate] = math.inf if math.isnan(loss) else loss

    for rate in rates:
        attempt(rate)
    best = min(found, key=found.get)
    factor = 2 if best == max(found) else 0.5 if best == min(found) else None
    while factor:
        attempt(best * factor)
        if found[best * factor] >= found[best]:
            break
        best *= factor
    return best
    ### END SOLUTION


check("best_rate", best_rate)

# %% [markdown]
# Then use it: which rate suits the tiny model in 25 steps? Write down what you expect. Then ask again with 50 steps, or with
# `optimizer="muon"`: does the best rate move?

# %%
# NBVAL_IGNORE_OUTPUT: losses of models trained in this run
def short_run(rate, steps=25):
    plan = mm.TrainConfig(steps=steps, batch_size=8, seq_len=64, lr=rate,
                          warmup_steps=5, at_starts=True)
    record = mm.train(ch05.tiny_model(), ladder.tokens, plan, progress=False)
    loss = sum(record.losses[-5:]) / 5
    print(f"rate {rate:.4f}: {loss:.2f}")
    return loss


try:
    print("best:", best_rate(short_run, [0.003, 0.01]))
except NotImplementedError:
    print("not written yet")

# %% [markdown] tags=["solution"]
# A search that stops at its own edge reports the edge. And one short run is one observation: with another seed neighbours may change
# places, and a rate that is best for 25 steps is often too high for a thousand.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
