# %% [markdown]
# # 13. Fine-tuning and evaluation
#
# **How does a model that continues text become one that answers, and how would we know?**
#
# The core takes 55 minutes. The exercises and the sections under *Further* take another hour and three
# quarters.
# You need chapter 5 and the tokenizers of chapter 1; what we borrow is repeated below.
#
# The shapes in this chapter: **R** conversations, each a row · **T** tokens of a row · a matrix is
# **(out, in)** · **r** the rank of an adapter · **V** tokens in the vocabulary · **n** questions.

# %%
import tempfile
from random import Random

import torch
from torch import nn

import minimistral as mm
from minimistral import instruct, lora, questions
from minimistral.course import (Choice, Slider, bet, check, explore, hint, ladder,
                                mine, predict, reveal, show, swap, verdict)
from minimistral.course.chapters import ch13_fine_tuning as ch13
from minimistral.course.panel import wrapped


# %% [markdown]
# ## The headlines
#
# Two claims of the press of 2024. Place your bets: one letter between the quotation marks. The verdicts come
# at the end of the core.

# %%
bet(16, answer="")

# %%
bet(22, answer="")

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>What does a language model predict?</summary>
# The next token, from all tokens before it.</details>
# <details><summary>What is a control token?</summary>
# A token of its own, such as &lt;s&gt; or [INST], that no text can be encoded to.</details>
# <details><summary>What does AdamW keep for each parameter?</summary>
# Two running means: of the gradient and of its square.</details>

# %% [markdown]
# ## It continues
#
# Here is a tale that stops before its last sentence, and a question about it. The tales' own program draws
# both, and it knows the answer: so a score can be exact.

# %%
tokenizer = mm.load_tokenizer("tales-chat")
base, chat = mm.load_model("tales-dense"), mm.load_model("tales-chat")
question = questions.ask(Random(5), "who", "en")
print(wrapped(question.prompt))
print("\nright:", question.answer)
predict("base", "The base model, tales-dense, reads this text. What does it write?",
        ["the name", "more tale, as if nobody had asked", "nothing"], answer="")

# %%
ids = tokenizer.encode(question.prompt, bos=True)
new = mm.generate(base, ids, 40, stop_ids=(tokenizer.eos_id,))
print(wrapped("base writes:" + tokenizer.decode(new)))
print("chat writes:", *instruct.answers(chat, tokenizer, [question.messages]))
assert not questions.is_right(question, tokenizer.decode(new).strip())
reveal("base", "B", "A question inside a tale is followed by more tale. That is "
       "what it was trained for.")

# %% [markdown]
# The second model, tales-chat, is the first one after *fine-tuning*. By the end of the core we
# know what that did, and you will have tuned it further. It can be asked four kinds of questions: who has a
# thing, where a thing is, where somebody is, and things that the tale has *not* told. Then the answer is three
# dots, because the tales have no word for *not*. It matters most for an assistant: to say that it does not know.
#
# **In short:** a base model continues. Fine-tuning shows it what to continue a question with.

# %% [markdown]
# ## The format
#
# A model sees tokens only. So who speaks has to be written into them. The people at Mistral write
# `[INST]`, what you say, `[/INST]`, then the answer, then `</s>`.

# %%
talk = [*question.conversation, {"role": "user", "content": "Who has the hat?"},
        {"role": "assistant", "content": "..."}]
ids, learned = instruct.encode_chat(tokenizer, talk)
show(ch13.tokens_picture(tokenizer, ids, learned, "Two questions, two answers"),
     alt="The tokens of a conversation as boxes: marks of the format, what was "
     "said to the model, and the answers with the end token of each.")
predict("space", "In the format of Mistral 7B Instruct 0.1, is there a space "
        "between [/INST] and the answer?", ["yes", "no"], answer="")

# %%
for name, text in ch13.FORMATS.items():
    print(f"{name:9}  {text}\n           {ch13.USERS[name]}")
assert "[/INST]_Hi" in ch13.FORMATS["v1"]
assert "[/INST]Hi" in ch13.FORMATS["v3 Tekken"]
reveal("space", "A", "But nobody types it: that tokenizer puts a space before "
       "every piece of text that it encodes.")

# %% [markdown]
# A low line is such a space. Read the five lines slowly; they are easily mixed up. Three
# rules hold in all of them: `<s>` once, at the very start. `</s>` after every answer. Nothing
# after the last `[/INST]`: the answer begins there.
#
# In v1 the marks are plain text. From v2 on they are control tokens, which a user cannot type. (A
# system message goes before the first question in v1, before the last in v2 and v3, and has marks of its
# own from v7 on.)

# %% [markdown]
# (`encode_chat` is under *Further*, line by line.) What does a wrong space cost? We ask tales-chat 40 questions,
# each in the right format and in five that are nearly right.

# %%
predict("slip", "Which slip costs most?",
        ["a space after [INST]", "a second <s>", "a space after [/INST]"],
        answer="")

# %%
some = questions.ask_many(40, 21, language="en")
right = {name: ch13.score_with(chat, tokenizer, some, write)
         for name, write in ch13.slips(tokenizer).items()}
rows = {name: [(n, 40)] for name, n in right.items()}
title = "Some slips cost nothing, some all"
show(ch13.shares_picture(rows, ["right of 40"], title),
     alt=ch13.shares_text(rows, ["right"]), data=ch13.shares_data(rows, ["right"]))
harmless = ("a space after [INST]", "<s> twice")
assert all(right["as it should be"] - right[name] < 5 for name in harmless)
assert max(n for name, n in right.items() if name not in (
    "as it should be", *harmless)) < 10
reveal("slip", "C", "Every answer it learned from stood right behind the mark. "
       "There was no error message in any of the six.")

# %% [markdown]
# **In short:** the format is part of the model. Take its own, token for token, and never type the marks.

# %% [markdown]
# ## Learning from answers alone
#
# Now to the training. It is the loop of chapter 5, and a conversation is a row of tokens. But which of them
# should the model learn to predict? The questions are the user's business.

# %%
rng = Random(3)
talks = [questions.as_conversation(questions.interview(rng, 4)) for _ in range(200)]
talks = [talk for talk in talks if talk]
counts = [(sum(learned), len(ids)) for ids, learned in
          (instruct.encode_chat(tokenizer, talk) for talk in talks)]
share = sum(a for a, _ in counts) / sum(n for _, n in counts)
print(f"four questions to a tale: {share:.2f} of the tokens are answers")
assert 0.1 < share < 0.4

# %% [markdown]
# Counted together, most targets would be the user's words. So these are marked with `IGNORE`, and the loss does
# not count them. Two things go wrong easily here.
#
# First the shift: position t predicts token t + 1. The row's inputs are all tokens but the last, its targets all
# but the first, and what `learned` says is about the **target**.
#
# By hand: the tokens `<s> [INST] who? [/INST] Leo </s>`, of which the last two are learned.

# %%
words = ["<s>", "[INST]", "who?", "[/INST]", "Leo", "</s>"]
is_answer = [False, False, False, False, True, True]
predict("first", "At which input does the loss count for the first time?",
        ["[/INST]", "Leo", "who?"], answer="")

# %%
for t in range(len(words) - 1):
    target = words[t + 1] if is_answer[t + 1] else "IGNORE"
    print(f"input {t}: {words[t]:8} target {target}")
reveal("first", "A", "The mark that ends the question has to predict the answer's "
       "first word. And Leo has to predict the end.")

# %% [markdown]
# The second: the end token is part of the answer. A model that never learned to stop goes on, and asks
# itself the next question.
#
# ### Your turn: rows of answers
#
# Write it for several conversations. `instruct.encode_chat(tokenizer, messages)` gives the ids and `learned`, one
# boolean for each id. Return `Rows(inputs, targets, positions)`, each int64 of shape (R, T), where T is the
# longest row: its number of tokens less one. Padding, on the right: input 0, target `IGNORE`, position -1.
# Other positions count from 0.

# %% tags=["your-turn"]
from minimistral.instruct import encode_chat
from minimistral.train import IGNORE, Rows


def answer_rows(tokenizer, conversations):
    """Rows(inputs, targets, positions), each (R, T); only answers are targets"""
    encoded = [encode_chat(tokenizer, messages) for messages in conversations]
    inputs = ...      # zeros, then each row's tokens but the last
    targets = ...     # IGNORE, then each row's tokens but the first, where learned
    positions = ...   # -1, then 0, 1, 2 ...
    return Rows(inputs, targets, positions)


check("answer_rows", answer_rows)

# %% [markdown]
# `hint("answer_rows")` helps, one step at a time. Here is the library's. The loop around it, `fine_tune`, is
# under *Further*: its gradients and steps are those of chapter 5.

# %%
# minimistral/instruct.py
# show: answer_rows

# %% [markdown]
# **In short:** all tokens are read, only answers are learned, and the end token is one of them.

# %% [markdown]
# ## All parameters
#
# The plain way is to let every parameter learn. We did that with interviews about English tales, and scored the
# model before and after with 240 questions: 60 of each kind, about tales that are not among those it learned
# from. It takes too long for a notebook, so the run is recorded. (`python -m minimistral.chat_recipe --full
# --out FOLDER` repeats it.)

# %%
record = ch13.record()
run = record["full"]
print(run["command"], "·", run["date"])
print(run["interviews"], "interviews,", run["questions"], "answers")
before, full = record["before"]["all"], run["after"]["all"]
print(f"before: {before['right']} of {before['asked']}")
print(f"after:  {full['right']} of {full['asked']}")
assert before["share"] < 0.1 and full["share"] >= 0.9

# %% [markdown]
# The model could follow the tales before. It had never been asked.
#
# What does that cost with a model of 7 billion parameters? While it learns, AdamW keeps for each parameter
# a gradient, two running means and a copy in full: 16 bytes, beside the 2 bytes of the weight itself.

# %%
config = mm.MODELS["mistral-7b-v0.3"]
total = mm.count_parameters(config).total
for name, trained in (("all parameters", total), ("1 in 100", total // 100)):
    parts = ch13.bytes_to_tune(config, trained)
    print(f"{name:17}", ", ".join(f"{k} {v:.1f} GB" for k, v in parts.items()))
assert ch13.bytes_to_tune(config, total)["for learning"] > 100

# %% [markdown]
# And the result is another model of the same size, for every customer and every task. If only one parameter
# in a hundred had to learn!
#
# **In short:** full fine-tuning works, and needs about nine times the memory of the weights.

# %% [markdown]
# ## Two narrow matrices
#
# Leave the weight W as it is, and add a **change** that has few numbers. A matrix of 3 × 4 has 12. But this
# one can be written with 7:

# %%
up = torch.tensor([[1.0], [2.0], [-1.0]])                 # (out, r) = (3, 1)
down = torch.tensor([[0.5, 0.0, 1.0, 2.0]])               # (r, in) = (1, 4)
print(up @ down)                                          # (out, in)

print("4,096 x 4,096 with r = 8:", 2 * 8 * 4096, "numbers,",
      f"{(2 * 8 * 4096) / 4096**2:.2%} of", 4096 * 4096)

# %% [markdown]
# Each row of the change is a mixture of r rows and nothing else. That is what **rank** r means.
#
# $$ \text{LoRA}(x) = W x + \frac{\alpha}{r}\; U (D x) \qquad
# D: r \times \text{in}, \quad U: \text{out} \times r $$
#
# In words: go down to r numbers, up again, scale, and add to what the matrix says anyway. Only `down` and `up`
# learn (Hu and others, 2021). `alpha` over `rank` is a plain factor; it is there so that another rank
# needs no other learning rate.
#
# How should they start? The model must be as good as before at step 0, so `up @ down` must be 0. And both have
# to learn from then on. We try three starts.

# %%
predict("start", "Which start can learn, and changes nothing at first?",
        ["both zero", "both random", "down random, up zero"], answer="")

# %%
x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
for name, d, u in (("both zero", 0.0, 0.0), ("both random", 1.0, 1.0),
                   ("down random, up zero", 1.0, 0.0)):
    chance = torch.Generator().manual_seed(2)
    D = (d * torch.randn(2, 4, generator=chance)).requires_grad_()
    U = (u * torch.randn(3, 2, generator=chance)).requires_grad_()
    change = x @ D.T @ U.T                                # (5, 3)
    (change - 1).square().sum().backward()                # some loss
    print(f"{name:21} change {change.abs().max():.2f}, gradient of down "
          f"{D.grad.norm():.2f}, of up {U.grad.norm():.2f}")
reveal("start", "C", "With both zero each waits for the other: both gradients are "
       "0 for ever. With both random the model is spoiled before the first step.")

# %% [markdown]
# ### Your turn: the layer
#
# Write it as a module. `base` is a layer with `in_features` and `out_features`, mostly an `nn.Linear`. Keep
# it as `self.base`, and freeze it. `self.down` and `self.up` are `nn.Parameter`s of the shapes above: `down` drawn
# from a normal distribution with standard deviation in_features ** -0.5, `up` zeros. Keep alpha / rank
# as `self.scale`. `forward` takes x of shape (..., in).

# %% tags=["your-turn"]
class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) * up(down(x)); x: (..., in) -> (..., out)"""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = ...
        self.scale = ...
        self.down = ...
        self.up = ...

    def forward(self, x):
        return ...


check("LoRALinear", LoRALinear)

# %% [markdown]
# The library's takes care of two things more: the device, and models in half precision, whose adapters stay in
# float32 while they learn.

# %%
# minimistral/lora.py
# show: LoRALinear

# %% [markdown]
# And now we train one, here. Our customer is in a hurry: not *Paul has the hat.* but *Paul.* We take
# tales-chat, running on your pieces, give its attention adapters of rank 2, and show it two hundred questions.

# %%
style = ch13.house_style(questions.ask_many(500, 31, kind="who", language="en"))
lesson, exam = style[:200], style[200:240]
print(lesson[0].asked, "->", lesson[0].answer)
mine_chat = mine("tales-chat")
torch.manual_seed(13)
with swap(mine_chat.pieces):
    lora.add_lora(mine_chat, rank=2, alpha=8.0)
print("{:,} numbers learn, {:,} stay".format(*ch13.trained_and_frozen(mine_chat)))
predict("style", "40 questions it never saw: how many in the new style after a few "
        "seconds?", answer=None)

# %%
with swap(mine_chat.pieces):
    rows = instruct.answer_rows(tokenizer, [q.conversation for q in lesson])
    losses = instruct.fine_tune(mine_chat, rows, mm.TrainConfig(
        steps=40, batch_size=8, lr=1e-2, warmup_steps=4, weight_decay=0.0))
    said = instruct.answers(mine_chat, tokenizer, [q.messages for q in exam], 20)
score = sum(map(questions.is_right, exam, said))
print(exam[0].asked, "->", said[0])
assert losses[-1] < 0.2 * losses[0] and score > 30
reveal("style", score, "It knew the answers. Only the manner is new, and that "
       "takes few numbers.")

# %% [markdown]
# **In short:** freeze W, learn two narrow matrices beside it; one starts random, the other at zero.

# %% [markdown]
# ## Merge, save, swap
#
# Beside a matrix, an adapter costs time with every token. But with s for alpha / r, W x + s U D x = (W + s U D) x.
# So it can be added to the matrix once, and is gone. (Merge it twice, and the change counts twice: the library refuses.)

# %%
# minimistral/lora.py
# show: merge_lora

# %%
folder = tempfile.mkdtemp()
ids = torch.tensor([instruct.encode_chat(tokenizer, exam[1].messages)[0]])
with swap(mine_chat.pieces), torch.no_grad():
    lora.save_adapter(mine_chat, folder, "tales-chat")
    beside = mine_chat(ids)                               # (1, T, V)
    merged = lora.merge_lora(mine_chat)(ids)
print("the same to within rounding:", torch.allclose(beside, merged, atol=1e-3))
assert torch.allclose(beside, merged, atol=1e-3)

# %% [markdown]
# What is stored is small. And one model can have many adapters, one at a time: load another, or take it off.

# %%
size = sum(p.stat().st_size for p in ch13.files(folder))
print(f"this adapter: {size / 1e3:.0f} kB,",
      f"the base: {ch13.base_bytes() / 1e3:.0f} kB")
model = mm.load_model("tales-chat")
for what in ("plain", "style", "plain again"):
    if what == "style":
        lora.load_adapter(model, folder)
    elif what == "plain again":
        lora.remove_lora(model)
    print(f"{what:12}", *instruct.answers(model, tokenizer, [exam[0].messages]))

# %% [markdown]
# A manner of answering is one thing. Can an adapter also learn to answer at all? We gave tales-dense adapters of rank 4
# on the four matrices of its attention, and the same questions in the same order. (Each learned at a rate of
# its own: the next cell but one prints them.)

# %%
predict("reach", "The adapter's right answers over those of all parameters?",
        ["below 0.8", "0.8 to 0.95", "above 0.95"], answer="")

# %%
tuned, part = record["lora"]["after"], record["lora"]["parameters"]
print(f"{part['trained']:,} numbers beside {part['total']:,}: {part['share']:.2%},",
      f"rate {record['lora']['training']['lr']} ({run['training']['lr']} for all)")
attempts = {"all parameters": run["after"], "adapter": tuned}
rows = ch13.by_kind(attempts)
show(ch13.shares_picture(rows, list(attempts), "An adapter learns it more slowly"),
     alt=ch13.shares_text(rows, list(attempts)),
     data=ch13.shares_data(rows, list(attempts)))
shares = {name: r["all"]["share"] for name, r in attempts.items()}
print({name: round(share, 3) for name, share in shares.items()})
ratio = shares["adapter"] / shares["all parameters"]
assert part["share"] < 0.02 and ratio < 0.8
reveal("reach", "A", f"{ratio:.2f}. (The bars are 95% intervals; see below.)")

# %%
curves = {"adapter": record["lora"]["losses"], "all parameters": run["losses"]}
late = {name: [sum(c["nats_per_token"][i:i + 10]) / 10 for i in (70, 90)]
        for name, c in curves.items()}                    # of 100 points
show(ch13.curves_picture(curves, "The same lessons, step by step"),
     alt="Nats per token of an answer, in the eighth tenth of the steps and in the "
     "last: " + "; ".join(
         f"{name} {a:.3f}, {b:.3f}" for name, (a, b) in late.items()) + ".",
     data={"": list(late),
           "the eighth tenth": [f"{a:.3f}" for a, _ in late.values()],
           "the last tenth": [f"{b:.3f}" for _, b in late.values()]})
assert late["adapter"][0] > late["adapter"][1] > 2 * late["all parameters"][1]
for name, key in (("adapter", "first"), ("adapter", ""), ("all", "full_long")):
    facts = record[key] if key else record
    print(f"{ch13.steps_of(facts):,} steps, {name}: "
          f"{facts['after']['all']['share']:.3f} right, loss on tales "
          f"{facts['after']['tales_nats_per_byte']:.2f} nats per byte")
after, first, best = (facts["after"]["all"]["share"] for facts in (
    record, record["first"], record["full_long"]))
assert after >= first > shares["all parameters"] and after / best > 0.95

# %% [markdown]
# After 600 steps the adapter answers about half, and its loss still falls. Too narrow,
# or only slow? After 5,000 it answers more than all parameters did after 600. With 2,000 more, at half
# the rate, **it is tales-chat**: a small file, which `load_model` merges into tales-dense. All parameters,
# after 3,000, answer nearly every question, and have forgotten the tales. The adapter gets above 95% of
# their right answers, in more than twice the steps: only four directions of a matrix can change (we guess).
#
# An adapter inside the layers cannot teach the output layer new tokens. (*Further* counts some.)
#
# **In short:** merged or beside, the same function; the file is small, and the base stays what it was.

# %% [markdown]
# ## What it forgets
#
# The model now answers. Can it still tell tales? It read tales while it learned, but none was a target.

# %%
predict("forget", "The loss on tales (nats per byte), after fine-tuning:",
        ["lower: it has read more tales", "the same", "higher"], answer="")

# %%
floor = record["before"]["floor_nats_per_byte"]
losses = {"base": record["before"], "all": run["after"],
          "LoRA, 600 steps": record["lora"]["after"], "tales-chat": record["after"]}
for name, facts in losses.items():
    print(f"{name:15} {facts['tales_nats_per_byte']:.4f} nats per byte, "
          f"{facts['tales_nats_per_byte'] - floor:.4f} above the floor")
live = ch13.nats_on_tales(chat)
print(f"tales-chat here, on the ladder's tales: {live:.4f}")
assert live > ch13.nats_on_tales(base) + 0.005
reveal("forget", "C", "What is not practised fades. An adapter can be taken off, "
       "and the base is back.")

# %% [markdown]
# This is called *catastrophic forgetting*, and it is why a tuned model has to be examined in what it could do
# before, too. Common cures: a lower rate, fewer steps, some of the old texts among the new ones.
#
# **In short:** measure before and after, on the old task as well as on the new one.

# %% [markdown]
# ## What is a score?
#
# We have been quoting scores as if they were facts about a model. Each is a fact about a model **and** some
# questions. Other questions would have given another score. How far apart? There is a formula for the range in
# which the true share lies, 19 times of 20 (Wilson, 1927). `score_interval` is the formula, and an exercise.

# %%
sizes = (50, 100, 200, 400, 800, 1600, 3200)
show(ch13.widths_picture(sizes, 0.9), alt="The half width of the interval falls "
     "from about 8 points with 50 questions to about 1 with 3,200.",
     data={"questions": sizes, "plus or minus, in % points": [
         f"{100 * ch13.halves(n, 0.9):.1f}" for n in sizes]})
low, high = instruct.score_interval(54, 60)
print(f"54 of 60: between {low:.2f} and {high:.2f}")
assert high - low > 0.14 and ch13.halves(3200, 0.9) < 0.012

# %% [markdown]
# To see a difference of one point takes thousands of questions. So a rule for the table in the next press
# release: two scores whose intervals overlap widely are no news. And
# the n in the formula is the number of *questions*; a hundred answers to the same ten questions are ten.
#
# Now the manner of asking. A base model does not answer, so benchmarks let it **choose**: which of the given
# answers has the largest probability? That is scoring by likelihood.

# %%
options = ch13.choices(question)                          # name: the answer with it
for name, model in (("base", base), ("chat", chat)):
    nats = instruct.option_nats(model, tokenizer, question.messages,
                                list(options.values()))
    print(name, {o: round(n, 1) for o, n in zip(options, nats)})
predict("rule", "Asked who has the thing: which of tales-chat and tales-moe, a "
        "larger base model, is right more often?",
        ["tales-chat", "tales-moe", "it depends on the wording"], answer="")

# %% [markdown]
# We recorded more of this: two models, the same 60 questions, three wordings, with 0, 1 or 3 solved questions
# before (called *shots*), scored in two ways. The wordings: the chat format; plain text with *Question:* and
# *Answer:*; and the end of the tale, *Now ... has the hat*, which is how a tale itself would go on.

# %%
scores = ch13.recorded("scores")
print(scores["provenance"]["command"], "·", scores["provenance"]["date"][:10])
rows = {}
for wording in ch13.WORDINGS:
    for rule in ch13.RULES:
        marks = [ch13.marks_of(m, wording, 0, rule) for m in ch13.MODELS]
        rows[f"{wording}, {rule}"] = [(m.count("1"), len(m)) for m in marks]
show(ch13.shares_picture(rows, ch13.MODELS, "Which model is better? It depends"),
     alt=ch13.shares_text(rows, ch13.MODELS),
     data=ch13.shares_data(rows, ch13.MODELS))
ahead = {k for k, (a, b) in rows.items() if a > b}
assert 0 < len(ahead) < len(rows)
reveal("rule", "C", "Asked as a tale would go on, the base model knows. Asked in a "
       "format it never saw, it guesses.")

# %% [markdown]
# The question for the explorer: **with which wording, rule and number of shots does tales-moe beat
# tales-chat, so clearly that the intervals do not overlap? And how many questions does it take to see
# it?**

# %% tags=["try"]
explore(ch13.score_explorer, wording=Choice(list(ch13.WORDINGS), "end of the tale"),
        rule=Choice(list(ch13.RULES)), questions=Slider(10, 60, 60, 10),
        settings=[
            {"wording": "chat format", "rule": "generated", "questions": 60},
            {"wording": "end of the tale", "rule": "generated", "questions": 60},
            {"wording": "end of the tale", "rule": "likelihood", "questions": 10}])

# %% [markdown]
# The same as plain code: every way of asking, and which of the two is clearly ahead. The last loop prints
# nothing: it checks what we say of the shots below.

# %%
for wording in ch13.WORDINGS:
    for rule in ch13.RULES:
        for shots in (0, 1, 3):
            a, b = (ch13.marks_of(m, wording, shots, rule).count("1")
                    for m in ch13.MODELS)
            clear = ch13.clearly_ahead(a, b, 60)
            print(f"{wording:16} {rule:11} {shots} shots: {a:3} {b:3}  {clear}")

few = [ch13.marks_of(m, "end of the tale", 0, "likelihood") for m in ch13.MODELS]
for n in (20, 40, 60):
    a, b = (marks[:n].count("1") for marks in few)
    print(f"end of the tale, likelihood, the first {n}: {a} and {b},",
          ch13.clearly_ahead(a, b, n))

for model in ch13.MODELS:                                 # what three shots do
    for wording in ch13.WORDINGS:
        for rule in ch13.RULES:
            none, three = (instruct.score_interval(ch13.marks_of(
                model, wording, shots, rule).count("1"), 60) for shots in (0, 3))
            own = (model, wording, rule) == (
                "tales-chat", "chat format", "generated")
            assert three[1] < none[0] if own else three[0] <= none[1]

# %% [markdown]
# Solved questions before help nowhere here, and they harm tales-chat when it writes in its own format. We guess
# why: every conversation that it learned from told one tale, at its beginning. Three shots are three more tales,
# and longer than anything it learned from. No cell here tests that.
#
# And one more way to a high score. A model reads what lies on the web, and benchmarks lie on the web.
# What if the examination was among the texts it learned from? We let tales-dense learn 30 questions with
# their answers by heart. Beside it stands tales-chat, which never saw them. We did it four times, with other
# questions each time.

# %%
rounds = ch13.recorded("contaminated")["rounds"]
exams, gains = ["this examination", "a new one"], []
for n, one in enumerate(rounds):
    print(f"round {n + 1}, right of 30:", {
        name: tuple(r[e] for e in exams) for name, r in one["right"].items()})
    honest, knew = one["right"].values()
    gains.append(knew["this examination"] - honest["this examination"])
    assert knew["this examination"] == 30 and knew["a new one"] < 15
n = sum(gains)
print(f"they differ in {n} of {30 * len(rounds)} answers, and all go one way")
print(f"a coin that falls {n} times on the same side: 1 in {2 ** (n - 1)}")
rows = {name: [(sum(one["right"][name][e] for one in rounds), 30 * len(rounds))
               for e in exams] for name in rounds[0]["right"]}
show(ch13.shares_picture(rows, exams, "Learned by heart: right here only"),
     alt=ch13.shares_text(rows, exams), data=ch13.shares_data(rows, exams))
assert ch13.clearly_ahead(*(row[0][0] for row in rows.values()), 120) == "-"
assert min(gains) > 0 and 2 ** (1 - n) < 0.05

# %% [markdown]
# In this examination the contaminated model is ahead each time, although the intervals overlap: above a model that
# answers nearly all there is little room. But both were asked the same questions. Then we may count
# those in which they differ. All go one way, and a coin seldom does that. With new questions the contaminated model
# falls far behind. Contamination looks like skill; only new questions tell.
#
# **In short:** a score belongs to a model, its questions, their wording, the shots and the rule. Say all
# five, and the interval.

# %% [markdown]
# ## The verdicts on the headlines

# %%
print(f"a manner of answering: rank 2, {size / 1e3:.0f} kB beside",
      f"{ch13.base_bytes() / 1e3:.0f} kB, {score} of 40 right")
for way in (run, record):
    result, steps = way["after"], ch13.steps_of(way)
    print(f"to answer at all, {way['parameters']['share']:.1%} of the parameters, "
          f"{steps:,} steps: {result['all']['share']:.3f} right, "
          f"loss on tales {result['tales_nats_per_byte']:.3f}")
assert size < 0.1 * ch13.base_bytes() and score > 30
print("ways of asking in which tales-chat is ahead:", len(ahead), "of 6")
display(verdict(16, "true with a condition", "A new manner is cheap. A new skill "
                "took a small adapter far longer, and the tales were forgotten."),
        verdict(22, "true with a condition", "Ahead in the way it was asked. "
                "Another wording turned the order of our two models round."))

# %% [markdown]
# Both headlines leave out what would make them checkable. A careful writer would have written: *On a laptop an
# adapter with about a hundredth of the parameters changed a model's manner within seconds. For a new skill, with
# thousands of exact examples, 600 steps of all parameters were enough, and a small adapter got there in thousands;
# and then the model was worse at what it did before.*
#
# And: *Mistral's own measurement puts 7B ahead of all open models up to 13B, in these benchmarks, with these shots
# and this rule. Others have to repeat it with questions that no model has seen.*

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. write a conversation in a model's own format, and say what a wrong token does;
# 2. teach a model answers, and nothing but answers;
# 3. build an adapter, start it rightly, merge it, save it and change it;
# 4. measure what was learned and what was forgotten;
# 5. read a benchmark's score: with which questions, wording, shots and rule, and how far off by chance.
#
# New words: *instruction data*, *chat format*, *LoRA*, *rank*, *merge*, *forgetting*, *shots*, *contamination*.

# %%
predict("last", "Ten people chat with one model at the same time. What is missing?",
        ["nothing: each waits for the others", "ten copies of the model",
         "a program that lets all of them share the model's steps"], answer="")

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | a space or a mark too many in the format | no error; fewer right answers, or none |
# | no end token learned | the answer is right, and then it goes on |
# | the prompt counted in the loss | it writes questions, too |
# | not shifted, or shifted twice | a loss near zero, or one that stays high |
# | both matrices zero | the loss does not move |
# | scale forgotten or upside down | right with alpha = r only |
# | merged twice | twice the change |
# | two scores without intervals | chance is news |

# %% [markdown]
# ## The question for chapter 14
#
# We have a model that answers, and we can say how well. It sits in a notebook.

# %%
reveal("last", "C", "Each step of the model can serve all ten. Somebody has to "
       "bring them together, and to speak a protocol.")

# %% [markdown]
# What stands between a model and a product? That is chapter 14.

# %% [markdown]
# ## Further: what may be asked
#
# Everything from here on can be skipped without loss later.
#
# The questions come from the tales' own program: it knows who holds what. Each kind is a function of the
# tale; an interview asks several about one tale, which teaches several answers for one reading.

# %%
# minimistral/questions.py
# show: Question, ask, ask_about

# %%
# minimistral/questions.py
# show: interview, as_conversation, ask_many, shared

# %%
# minimistral/questions.py
# show: ask_who, ask_where, ask_person

# %%
# minimistral/questions.py
# show: lying, say, ask_untold

# %% [markdown]
# An examination is worth nothing if the model has seen it. Of two seeds the tales are drawn apart, but short
# tales can meet by chance, so `shared` looks. The recipe of tales-chat leaves such questions out of what is
# learned.

# %%
learned_from, asked = questions.ask_many(2000, 1), questions.ask_many(500, 2)
print("questions of 500 about a tale of the other 2,000:",
      len(questions.shared(asked, learned_from)))
print("and in the record of tales-chat:", record["shared_with_examination"])
assert record["shared_with_examination"] == 0

# %% [markdown]
# It is worth little, too, if it chooses among models: the one that was lucky here would win. We had two
# adapters, of 5,000 steps and of 2,000 more. So 1,200 other questions chose (closely:
# the intervals overlap), and the examination is for the chosen one.

# %%
choice = record["chosen_by"]
for name in ("first", "went on"):
    low, high = instruct.score_interval(choice[name], choice["asked"])
    print(f"{name:8} {choice[name]} of {choice['asked']}: {low:.3f} to {high:.3f}")

# %% [markdown]
# ## Further: requests with many right answers
#
# Each of these questions has one right answer. Two requests have many. *In the end?* asks how the tale ends, and
# *En français ?* asks for the tale in French. We cannot list all that is right. But the tales' grammar can read
# an answer and say what it means. An end is right if the tale adds up with it. A retelling is right if it says
# the same, sentence by sentence, in whatever words.

# %%
# minimistral/questions.py
# show: ask_end, ask_retell, retold

# %%
# minimistral/questions.py
# show: is_right, facts

# %%
from minimistral.tales import parse_tale, sample_tale

tale = sample_tale(Random(30), "en")
wishes = {kind: questions.ask_about(tale, kind, Random(0))
          for kind in questions.REQUESTS}
print(wrapped(wishes["end"].prompt), "\n")
for said in ("The ring is still in the mill.",
             "It was raining. In the end the ring stayed in the mill.",
             "The ring is still in the garden.", "Now Anna has the ring."):
    print(questions.is_right(wishes["end"], said), said)
print()
print(wrapped(wishes["retell"].answer), "\n")
for old, new in (("Un matin, Hugo", "Hugo"), ("Anna", "Nora"), ("jardin", "moulin"),
                 ("un petit anneau", "un anneau")):
    said = wishes["retell"].answer.replace(old, new)
    print(questions.is_right(wishes["retell"], said), old, "->", new)

# %% [markdown]
# Can our small model learn to do that? All parameters of tales-dense learned from interviews with all six kinds, and
# so did tales-chat's adapter, from where it stood; 1,500 steps each (`--all-kinds`, with `--full` and with
# `--start`).

# %%
predict("six", "Tales retold rightly in French, of 60 new ones?",
        ["most of them, by both", "some by all parameters, none by the adapter",
         "none by either"], answer="")

# %%
attempts = {"all parameters": record["full_all_kinds"]["after"],
            "adapter": record["lora_all_kinds"]["after"]}
rows = ch13.by_kind(attempts)
show(ch13.shares_picture(rows, list(attempts), "To retell is beyond this adapter"),
     alt=ch13.shares_text(rows, list(attempts)),
     data=ch13.shares_data(rows, list(attempts)))
(whole, asked), (narrow, _) = rows["retell"]
assert 0.2 * asked < whole < 0.6 * asked and narrow == 0
assert rows["end"][0][0] > 0.9 * asked > 0.75 * asked > rows["end"][1][0]
reveal("six", "B", "And what the adapter writes is French.")

# %%
kept = {}
for name, attempt in attempts.items():
    asked_for, said = attempt["samples"][-2]
    told, heard = (questions.facts(parse_tale(text).events) for text in (
        asked_for.rpartition("\n")[0], said))
    kept[name] = sum(fact in told for fact in heard)
    print(f"{name}, {kept[name]} of {len(told)} sentences:")
    print(wrapped(said), "\n")
print(wrapped(asked_for))
assert kept["adapter"] < len(told) / 2 < kept["all parameters"] < len(told)

# %% [markdown]
# Both write French, and each writes a tale. All parameters kept most of what was told and lost their way in the middle;
# the adapter tells a tale of its own. Fluent and untrue: an exact score finds it, a reader in a hurry may not.
# Whether more steps would do, we did not try. So tales-chat is the adapter that learned four kinds.

# %% [markdown]
# ## Further: conversations, checked and answered
#
# What the core used of the library: the format, the loop, letting a model speak, and the scores. A conversation that
# no format can write is refused with the number of its message.

# %%
# minimistral/instruct.py
# show: encode_chat, between

# %%
# minimistral/instruct.py
# show: check_conversation

# %%
# minimistral/instruct.py
# show: place_system, answers

# %%
# minimistral/instruct.py
# show: tuning_batch, fine_tune

# %%
# minimistral/instruct.py
# show: score_interval, option_nats, last_answer

# %% tags=["raises-exception"]
instruct.check_conversation([{"role": "user", "content": "Hello"},
                             {"role": "user", "content": "Are you there?"}])

# %% [markdown]
# ## Further: adapters, in and out
#
# Which matrices get an adapter is told by the last part of their names. Everything is looked at before
# anything is changed.

# %%
# minimistral/lora.py
# show: adapted, matrices, replace_module, remove_lora

# %%
# minimistral/lora.py
# show: add_lora

# %%
# minimistral/lora.py
# show: save_adapter, read_about, base_of

# %%
# minimistral/lora.py
# show: load_adapter

# %% [markdown]
# ## Further: tokens that the base never wrote
#
# How often do the tokens of an answer occur in the ladder's two thousand tales? What never occurs has
# never been a target: the output layer has learned one thing about it, to make it unlikely.

# %%
seen = ladder.tokens.ids.bincount(minlength=tokenizer.vocab_size)
for text in ("That is not told.", "...", "Paul has the hat."):
    print(*(f"{tokenizer.decode([i])!r} {seen[i]}" for i in tokenizer.encode(text)),
          sep="  ")
assert min(int(seen[i]) for i in tokenizer.encode("That is not told.")) == 0

# %% [markdown]
# ## Further: of two answers the better one
#
# To imitate, one needs right answers. Often there are none at hand, or too many. But of two answers one can often
# say which is better. *Direct preference optimisation* (DPO, Rafailov and others, 2023) learns from such
# pairs.

# %% [markdown]
# $$ \text{loss} = -\ln \sigma\left(\beta \left[ \ln\frac{p(\text{better})}{p_0(\text{better})} -
# \ln\frac{p(\text{worse})}{p_0(\text{worse})} \right]\right) $$
#
# In words: by how much has the better answer become likelier, since the start, than the worse one has? The loss
# falls as this gain grows. The start, $p_0$, keeps the model from running away: only changes count.

# %%
# minimistral/preference.py
# show: dpo_loss, answer_log_probs, Preference

# %%
# minimistral/preference.py
# show: learn_preferences

# %% [markdown]
# By hand: at the start nothing has changed, the gain is 0, and the loss is ln 2.

# %%
from minimistral.preference import dpo_loss

then = torch.tensor([-3.0, -9.0])                         # ln p at the start
for rise, fall in ((0.0, 0.0), (2.0, 0.0), (2.0, 2.0), (-1.0, 3.0)):
    loss = dpo_loss(then + rise, then - fall, then, then, beta=0.5)
    print(f"better {rise:+.0f}, worse {0 - fall:+.0f}: loss {loss:.3f}")

# %% [markdown]
# The last line is the trap. The better answer has become *less* likely, and the loss still falls, because the worse
# one fell further. We let tales-chat draw three answers to each of some hundred questions, at temperature 1, took a
# right and a wrong one where there were both, and trained an adapter with this loss. The run is recorded
# (`python benchmarks/fine_tuning.py preferences`).

# %%
dpo = ch13.recorded("preferences")
asked, first, last = dpo["before"]["asked"], dpo["losses"][0], dpo["losses"][-10:]
print(f"{dpo['pairs']} pairs; loss {first:.3f} at first,",
      f"{sum(last) / 10:.3f} at last")
ends = {}
for key in ("right_drawn", "right_greedy"):
    for when in ("before", "after"):
        n = dpo[when][key]
        ends[key, when] = low, high = instruct.score_interval(n, asked)
        print(f"{key.replace('_', ' '):12} {when:6} {n} of {asked}: "
              f"{low:.2f} to {high:.2f}")
    assert ends[key, "before"][0] < ends[key, "after"][1]  # no harm to be seen
assert sum(last) / 10 < first - 0.02

# %% [markdown]
# The loss fell, so the preferences were learned. Do we have a better model? Before and after overlap nearly
# everywhere: so small a difference is within chance. These few pairs did neither harm nor good that 80 questions
# could show. Whether more pairs would help, we did not try.
