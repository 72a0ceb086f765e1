# %% [markdown]
# # Exercises 13: Fine-tuning and evaluation
#
# Seven exercises on chapter 13, about an hour and a half in all. The core pieces, `answer_rows` and
# `LoRALinear`, are written inside the chapter itself; here you vary, repair and use what you built.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.

# %%
from dataclasses import replace

import torch

import minimistral as mm
from minimistral import instruct, lora, questions
from minimistral.course import check, hint, lines, progress
from minimistral.train import IGNORE

# %% [markdown]
# ## Exercise 1: a format by hand
#
# Difficulty: easy · importance: essential · 10 minutes
#
# Write the ids of a conversation in the v3 Tekken format, for a conversation of user and assistant in turns (no
# system message): `<s>` once; each question between the control tokens `[INST]` and `[/INST]`; each answer
# followed by `</s>`. Spaces at the end of an answer are taken off, all other text stays as it is.
#
# You have `tokenizer.bos_id`, `tokenizer.eos_id`, `tokenizer.control_tokens["[INST]"]` and
# `tokenizer.encode(text)`, which adds neither. Complete the lines.


# %%
def chat_ids(tokenizer, messages):
    """messages: [{"role": "user" or "assistant", "content": text}, ...] -> ids"""
    ### BEGIN SOLUTION
    begin, end = (tokenizer.control_tokens[m] for m in ("[INST]", "[/INST]"))
    ids = [tokenizer.bos_id]
    for message in messages:
        text = message["content"]
        if message["role"] == "user":
            ids += [begin, *tokenizer.encode(text), end]
        else:
            ids += [*tokenizer.encode(text.rstrip(" ")), tokenizer.eos_id]
    return ids
    ### STUB
    # begin, end = (tokenizer.control_tokens[m] for m in ("[INST]", "[/INST]"))
    # ids = [tokenizer.bos_id]
    # for message in messages:
    #     text = message["content"]
    #     if message["role"] == "user":
    #         ids += ...
    #     else:
    #         ids += ...
    # return ids
    ### END SOLUTION


check("chat_ids", chat_ids)

# %% [markdown] tags=["solution"]
# No space is ours: with Tekken none is anywhere between the marks. And `</s>` is as much a part of the answer as
# its words, in the history as well: without it the model sees two speakers in one breath.

# %% [markdown]
# ## Exercise 2: one run of tuning, in order
#
# Difficulty: easy · importance: essential · 5 minutes
#
# These lines train an adapter, keep it in a folder and write it into the model; they are shuffled. One line is a
# mistake and stays out. Type the letters in order, with blanks between them.

# %%
lines("tuning_in_order")

# %%
### BEGIN SOLUTION
order = "A D E F C G"
### STUB
# order = "..."
### END SOLUTION
check("tuning_in_order", order)

# %% [markdown] tags=["solution"]
# First freeze and add, then train: `fine_tune` lets those parameters learn that it finds, and without an
# adapter these are all. Save before you merge: after that there is nothing left to save. The rows may be made
# at any time before the training.

# %% [markdown]
# ## Exercise 3: an adapter in numbers
#
# Difficulty: easy · importance: useful · 8 minutes
#
# How many numbers does an adapter have? `config` is a `ModelConfig` without experts; `names` are some of wq, wk,
# wv, wo, w1, w2, w3; every layer has each of them. A matrix (out, in) costs rank · (out + in). Remember the
# shapes: wq is (n_heads · head_dim, dim), wk and wv are (n_kv_heads · head_dim, dim), wo is the reverse of wq; w1 and w3
# are (hidden_dim, dim), w2 is the reverse.


# %%
def adapter_size(config, rank, names):
    """The numbers in all down and up matrices together."""
    ### BEGIN SOLUTION
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    other = {"wq": q, "wk": kv, "wv": kv, "wo": q, "w1": config.hidden_dim,
             "w2": config.hidden_dim, "w3": config.hidden_dim}
    return config.n_layers * sum(rank * (other[n] + config.dim) for n in names)
    ### END SOLUTION


check("adapter_size", adapter_size)

# %% [markdown] tags=["solution"]
# Every matrix has `dim` on one side; the other side is heads or hidden. The order of the two does not matter for the
# count, which is why a matrix and its reverse cost the same.

# %% [markdown]
# Mistral 7B with rank 16 on all seven: how many, and how many MB with 2 bytes each?

# %%
config = mm.MODELS["mistral-7b-v0.3"]
try:
    count = adapter_size(config, 16, ("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
    print(f"{count:,} numbers, {2 * count / 1e6:.0f} MB,",
          f"{count / mm.count_parameters(config).total:.2%} of the model")
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 4: merge, and take it out again
#
# Difficulty: medium · importance: essential · 12 minutes
#
# Find the bugs. This function adds an adapter to a weight, `sign=1`, or takes it out again, `sign=-1`. It
# should return a **new** weight, and leave the old one alone. The next cell shows two symptoms.


# %%
def merged(weight, down, up, alpha, sign=1):
    """weight: (out, in), down: (r, in), up: (out, r) -> (out, in)"""
    ### BEGIN SOLUTION
    scale = alpha / down.shape[0]                         # was up.shape[0]
    return weight + sign * scale * (up @ down)            # was +=
    ### STUB
    # scale = alpha / up.shape[0]
    # weight += sign * scale * (up @ down)
    # return weight
    ### END SOLUTION


# %%
chance = torch.Generator().manual_seed(4)
weight, down, up = (torch.randn(*shape, generator=chance)
                    for shape in ((5, 6), (2, 6), (5, 2)))
x, before = torch.randn(3, 6, generator=chance), weight.clone()
beside = x @ weight.T + 8.0 / 2 * (x @ down.T) @ up.T
print("merged = beside:",
      torch.allclose(x @ merged(weight, down, up, 8.0).T, beside, atol=1e-4))
print("the weight is as it was:", torch.equal(weight, before))

# %%
check("merged", merged)

# %% [markdown] tags=["solution"]
# The rank is the narrow side: the rows of `down`, or the **columns** of `up`. And `+=` writes into the weight
# that was given: the next call adds the change once more. With a fresh weight at each call, nobody would see
# that one.

# %% [markdown]
# ## Exercise 5: nats of an answer
#
# Difficulty: medium · importance: essential · 14 minutes
#
# Score by likelihood. `logits` (R, T, V) are what the model says at each position of R rows, `targets` (R, T) what
# comes next, `IGNORE` (-100) where nothing counts. Return for each row the **mean** nats of its counted targets,
# (R,): minus the sum of ln p over these targets, divided by their number. A row with none gets 0.
#
# The mean, so that a long answer is not punished for its length. Benchmarks differ in this too, and it
# changes scores.


# %%
def answer_nats(logits, targets):
    """logits: (R, T, V), targets: (R, T) -> mean nats of each row's targets (R,)"""
    ### BEGIN SOLUTION
    counted = targets != IGNORE                           # (R, T)
    log_probs = logits.log_softmax(-1)                    # (R, T, V)
    said = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    nats = -(said * counted).sum(-1)                      # (R,)
    return nats / counted.sum(-1).clamp(min=1)
    ### END SOLUTION


check("answer_nats", answer_nats)

# %% [markdown] tags=["solution"]
# The logits at t belong to the target at t: `answer_rows` has shifted already. Whoever shifts again scores
# each token by the prediction made one step too early.

# %% [markdown]
# Sum or mean? One question, a long answer that is right, a short one that is not, and two models. What does each
# rule let them choose?

# %%
tokenizer = mm.load_tokenizer("tales-chat")
one = questions.ask_many(1, 0, kind="where", language="en")[0]
options = [one.answer, "..."]
rows = instruct.answer_rows(tokenizer, [[*one.messages, {
    "role": "assistant", "content": option}] for option in options])
counted = (rows.targets != IGNORE).sum(-1).tolist()
try:
    for name in ("tales-chat", "tales-dense"):
        with torch.no_grad():
            logits = mm.load_model(name)(rows.inputs, positions=rows.positions)
        means = [float(mean) for mean in answer_nats(logits, rows.targets)]
        print(name)
        for option, mean, n in zip(options, means, counted):
            print(f"{mean:6.2f} nats a token, {mean * n:6.2f} in all  {option}")
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown] tags=["solution"]
# tales-chat is sure, whichever way one counts. The base model never saw this format: by the sum it takes the three
# dots, which are fewer tokens, by the mean the right answer. So the rule belongs to a score.

# %% [markdown]
# ## Exercise 6: a score and its uncertainty
#
# Difficulty: medium · importance: essential · 14 minutes
#
# An examination has several kinds of questions, and not the same number of each. `marks` maps each kind to a list of
# booleans. Return `(share, low, high)` for **all** questions: the share of right ones and Wilson's interval
#
# $$ \frac{p + \frac{z^2}{2n} \pm z \sqrt{\frac{p(1-p)}{n} + \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}} $$
#
# with z = 1.96, p the share and n the number of questions. Every question counts the same, of whatever kind.
# Example: 3 right of 4 gives 0.75, and about 0.30 and 0.95.


# %%
def overall(marks):
    """marks: {kind: [True, False, ...]} -> (share, low, high)"""
    ### BEGIN SOLUTION
    answers = [mark for kind in marks.values() for mark in kind]
    n, z = len(answers), 1.96
    p = sum(answers) / n
    middle = p + z * z / (2 * n)
    spread = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    whole = 1 + z * z / n
    return p, (middle - spread) / whole, (middle + spread) / whole
    ### END SOLUTION


check("overall", overall)

# %% [markdown] tags=["solution"]
# A mean of the kinds' shares would give a kind with three questions as much weight as one with three hundred; that is a
# fair thing to report, but another one, and its interval is another one. The usual p ± z √(p(1-p)/n) says
# "100%, plus or minus nothing" after three right answers of three. Wilson's does not.

# %%
try:
    for right, asked in ((3, 3), (9, 10), (90, 100), (900, 1000)):
        marks = [True] * right + [False] * (asked - right)
        share, low, high = overall({"all": marks})
        print(f"{right:4} of {asked:4}: {share:.3f}, from {low:.3f} to {high:.3f}")
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown]
# ## Exercise 7: your own house style
#
# Difficulty: medium · importance: useful · 25 minutes
#
# An open task. First the tool: leave examples out that would spoil the examination. `split` gets a list of questions
# and a number n, and returns `(learn, exam)`: the **last** n questions are the examination; of the others those
# stay whose tale (`.told`) is not told in the examination. Both keep their order. n is at least 1.


# %%
def split(asked, n):
    """A list of questions -> (those to learn from, the last n)"""
    ### BEGIN SOLUTION
    exam = asked[-n:]
    seen = {question.told for question in exam}
    learn = [question for question in asked[:-n] if question.told not in seen]
    return learn, exam
    ### END SOLUTION


check("split", split)

# %% [markdown]
# Then use it: invent a style for answers (another language, capital letters, a word about the weather first), change the
# answers of some hundred questions, train an adapter as the chapter did, and score it. How few examples
# are enough? Which rank? What happens to questions of other kinds?

# %%
asked = questions.ask_many(120, 7, kind="person", language="en")
sunny = [replace(q, answer="The sun was shining. " + q.answer) for q in asked]
try:
    learn, exam = split(sunny, 20)
    torch.manual_seed(7)
    model = lora.add_lora(mm.load_model("tales-chat"), rank=4, alpha=16.0)
    rows = instruct.answer_rows(tokenizer, [q.conversation for q in learn])
    instruct.fine_tune(model, rows, mm.TrainConfig(
        steps=40, batch_size=8, lr=1e-2, warmup_steps=3, weight_decay=0.0))
    said = instruct.answers(model, tokenizer, [q.messages for q in exam], 24)
    print(said[0], "·", sum(map(questions.is_right, exam, said)), "of", len(exam))
    others = questions.ask_many(20, 8, kind="where", language="en")
    said = instruct.answers(model, tokenizer, [q.messages for q in others], 24)
    print("where is it? in the style too:",
          sum("sun" in text for text in said), "of 20")
except (NotImplementedError, TypeError):
    print("not written yet")

# %% [markdown] tags=["solution"]
# A fixed beginning is learned within seconds, and nearly all answers after it stay right. But the style spreads: most
# questions of another kind, which no example showed, get it as well. Nothing told the adapter that it was meant
# for one kind only. Put some questions of the other kinds among the examples, with their plain answers, and see.
# Then take rank 1, with as many steps and with twice as many: is it the style that suffers, or what is said after it?

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
