# %% [markdown]
# # 0. Start here
#
# **What will we have built at the end, and does it run on this machine?**
#
# This takes ten minutes. You need a little Python and nothing else: no GPU, no network, no account.
#
# A notebook is a page with cells of code. Click into the first one and press Shift and Enter together:
# it runs, its result appears below it, and the next cell is chosen. Go through the page in this way,
# from top to bottom.

# %%
# NBVAL_IGNORE_OUTPUT: versions, memory and disk differ by machine
import textwrap
import time

import torch

import minimistral as mm
from minimistral.course import (check, explore, hint, predict, progress, reveal,
                                show, Button, Choice, Slider, Text)
from minimistral.course.chapters import ch00_start_here as ch00
from minimistral.tales import parse_tale, score_tales

ch00.machine()

# %% [markdown]
# Each line is something the course needs. If one is missing, its repair stands beside it. The same
# report comes in a terminal, where it also names your folders: `minimistral doctor`.
#
# ## A model that writes
#
# This package holds a language model, *tales-dense*. It is built like those of Mistral and was trained
# for this course, on tales that we invented, in five languages. Its file is small: less than 2 megabytes,
# about as much as one photo.
#
# In this course we guess before we run. A wrong guess teaches more than none. Put a letter between the
# quotation marks, then run the cell.

# %%
predict("writes", "What can a model of that size write?",
        ["words, but hardly a whole sentence",
         "whole tales, and some of them do not add up",
         "whole tales, and all of them add up"], answer="")

# %% [markdown]
# We give it a title. Everything below the title is the model's.

# %%
model = mm.load_model("tales-dense")
tokenizer = mm.load_tokenizer("tales-dense")
size = mm.count_parameters(model.config).total
assert 2 * size < 2_000_000                               # bytes of its file

def a_tale(model, title, temperature=0.7, seed=0):
    ids = tokenizer.encode(title + "\n", bos=True)
    new = mm.generate(model, ids, 200, temperature=temperature, seed=seed,
                      stop_ids=(tokenizer.eos_id,))
    return title + "\n" + textwrap.fill(tokenizer.decode(new), 84)

began = time.perf_counter()
print(a_tale(model, "The golden key", seed=2))
print(f"\n{size:,} parameters, {time.perf_counter() - began:.2f} s on this machine")

# %% [markdown]
# That ran on your own processor. The *parameters* are the numbers that training has set. A title in
# another language is all it takes to change the language.

# %%
for title in ("La clé dorée", "Der goldene Schlüssel", "La llave dorada",
              "La chiave dorata"):
    print(a_tale(model, title, seed=3), "\n")

# %% [markdown]
# Now the guess. We invented these tales with a grammar, so a program can check any text: is it a tale?
# Does it add up, or does somebody give away what they never had? We let the model write forty texts from
# nothing, with all the freedom it has, and ask that program.
#
# **The score** is the share of freely written texts that the grammar accepts. **The floor** is the loss
# that no model can get below: even somebody who knows the whole grammar cannot foresee whom it will
# send to the mill. (Loss is surprise, measured in *nats*; the exercise of this chapter computes it.)

# %%
begin = [tokenizer.bos_id]                                # no title, nothing
forty = mm.generate(model, [begin] * 40, 250, temperature=1.0, seed=1,
                    stop_ids=(tokenizer.eos_id,))
forty = [tokenizer.decode(ids) for ids in forty]
tales, add_up = score_tales(forty)
print(f"of 40 texts {40 * tales:.0f} are tales, and {40 * add_up:.0f} add up")
print("on new tales:", ch00.recorded("tales-dense"))
assert 0.8 <= tales < 1 and 0.3 <= add_up < tales
reveal("writes", "B", "Grammar comes early. The hard part is memory: who holds "
       "what, who went where. For that a model has to look back.")

# %% [markdown]
# ## A second model, with experts
#
# Mistral became famous for a second kind of model. Each layer of *tales-moe* holds several small
# networks, called *experts*, and every token is sent to only two of them. More numbers lie in memory,
# about as many are at work. Chapter 9 builds it; today it only writes.

# %%
models = ch00.shipped()                                   # name -> model
for name, writer in models.items():
    count = mm.count_parameters(writer.config)
    print(f"{name}: {count.total:,} parameters, {count.active:,} at work per token")
    print(a_tale(writer, "The blue map", seed=4), "\n")
    assert abs(count.active - size) < 0.05 * size

# %% [markdown]
# ## Temperature
#
# A model does not choose words. It gives every possible next token a probability, and somebody has to
# draw. (A *token* is a piece of text: a short word, or part of a long one.) *Temperature* says how
# boldly we draw: at 0 always the likeliest token, at 1 as often as the model says, above 1 the unlikely
# ones more often than that.
#
# **How high can you go before a tale falls apart?** Move the slider, with the mouse or with the arrow
# keys. Press the button for another tale. Type another title, such as *Le vieux chapeau*.

# %%
explore(ch00.tale_explorer(models, tokenizer),
        temperature=Slider(0.0, 2.0, 0.7, step=0.1), model=Choice(list(models)),
        title=Text("The old lantern"), tale=Button("Another tale"),
        settings=[{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.6}])

# %% [markdown]
# The same in plain code. Change the numbers, run it again. At 0 nothing is left to chance: every seed
# gives the same tale.

# %% tags=["try"]
for temperature in (0.0, 1.0, 2.0):
    tale = a_tale(model, "The red hat", temperature, seed=5)
    print(f"temperature {temperature}: {tale[:400]}\n")

# %% [markdown]
# ## A look inside
#
# A tale again, and this time we stop before a word that needs some memory. Hugo and the lantern were in
# two places, and he left one of them.

# %%
TALE = """The red lantern
Hugo found a red lantern at the lake. Clara was at the market. \
Hugo left the lantern at the lake. Hugo went to the market and saw Clara there. \
The lantern is still at the"""

predict("place", "Which word will the model add?",
        ["market: the place that was named last", "lake: that is where it lies",
         "either: it draws a lot"], answer="")

# %%
ids = tokenizer.encode(TALE, bos=True)
word = tokenizer.decode(mm.generate(model, ids, 4)).split()[0].strip(".")
with torch.no_grad():
    chances = model(torch.tensor([ids]))[0, -1].softmax(-1)  # of every next token
for token in chances.topk(3).indices.tolist():
    print(f"{tokenizer.decode([token])!r:>12} {chances[token]:.3f}")
assert word == "lake"
reveal("place", "B", f"It writes “{word}”.")

# %% [markdown]
# Where does it get that from? For each new token a model looks back at all tokens before it, and gives
# each a weight. This is called *attention*, and the weights can be looked at. Here is one such look, the
# one of the last token, “ the”.

# %%
look = ch00.best_look(model, tokenizer, TALE, "lake")
title = "To find the next word, the last “ the” looks back at “ lake”"
show(ch00.look_picture(look, title), data=ch00.look_table(look),
     alt=f"The tale, a bar over each token. In layer {look.layer}, head "
     f"{look.head}, the last token gives the two “lake” {look.on_word:.2f} of its "
     "weight, nearly all to the one where Hugo left the lantern.")
assert 0.4 < look.on_word < look.weights.max() + 0.1

# %% [markdown]
# A model makes many such looks at once, and we chose the one that tells a story. Is that fair? Chapter 2
# builds attention, and then asks that question with an experiment.
#
# ## Your first answer, a wrong one
#
# You will write the pieces of this model yourself. Each is checked, and the check tries to say *which*
# mistake it sees. Here is a function with a mistake that we put in. It computes the score from above. Run
# it: a model whose tales you have read gets 0.

# %% tags=["your-turn"]
def share_of_tales(texts):
    """The share of texts that are tales, from 0 to 1."""
    count = sum(parse_tale(text).ok for text in texts)
    return count // len(texts)


print("score of the forty texts:", share_of_tales(forty))
check("share_of_tales", share_of_tales)

# %% [markdown]
# TRY AGAIN, and the reason. Repair the function in the cell above and run it once more, until it says
# PASS. If you are stuck, ask for a hint: there are three for every exercise, one at a time. Run this
# cell again for the next one.

# %%
hint("share_of_tales")

# %% [markdown]
# A cell that you have not filled in yet says *not written yet*, and the rest of the page still runs. You
# can try that in [the exercise of this chapter](../exercises/00_start_here.ipynb).
#
# ## Where your things are
#
# `run.py lab` gave you your own copy of this page, in the folder `work`. Change what you like: the
# originals stay as they are, and no update overwrites what you changed.
#
# Some functions are **core pieces**: parts of the model itself. When yours passes, it is saved to
# `work/mine`. Then `mine()` is the shipped model, running on your code. How many pieces are yours so far?

# %%
# NBVAL_IGNORE_OUTPUT: it counts the exercises of all chapters, and grows with each
progress()

# %% [markdown]
# ## What you will have built
#
# At the end your own code loads the real checkpoints of Mistral and Mixtral, gives the same numbers as
# Mistral's, and trains, shrinks and serves small models of the same family. On the way one scoreboard,
# the *ladder*, shows how every new part brings the loss nearer to the floor.
#
# The work on a chapter is always the same: guess, run, be surprised, write the piece, pass the check.
# Read the story in `notebooks`, then go to `exercises`; `solutions` is for afterwards.

# %% tags=["slide-skip"]
ch00.course_map()

# %% [markdown]
# Every chapter begins with a short refresher, so you can start where your question is. Chapter 1 is next:
# there the first pieces of your own model wait.
