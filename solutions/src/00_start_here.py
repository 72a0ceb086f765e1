# %% [markdown]
# # Exercises 0: Start here
#
# One exercise, so that you know how they work. Write your lines where it says *your code here*, and run
# the cell. `check` may be called as often as you like; `hint("nats_per_byte")` helps, one step at a
# time.

# %%
import math

import torch

import minimistral as mm
from minimistral.course import check, hint, progress
from minimistral.tales import log_probability

# %% [markdown]
# ## Exercise 1: the loss of a text
#
# Difficulty: easy · importance: useful · 5 minutes
#
# A model reads a text and gives each of its tokens a probability $p$, before it sees that token. Its
# surprise at one token is $-\ln p$, in *nats*: 0 nats for $p = 1$, 0.69 nats for $p = 0.5$. The loss of
# the text is the sum of these surprises, divided by the length of the text in **UTF-8 bytes**. So models
# that cut text into different tokens can be compared.
#
# By hand: two tokens with $p = 0.5$ and $p = 1$ for the text “clé”, which has 4 bytes, give
# 0.69 / 4 = 0.17.


# %%
def nats_per_byte(probabilities, text):
    """The loss of a text. probabilities: a list, one for each token -> a number"""
    ### BEGIN SOLUTION
    surprise = -sum(math.log(p) for p in probabilities)
    return surprise / len(text.encode("utf-8"))
    ### END SOLUTION


check("nats_per_byte", nats_per_byte)

# %% [markdown] tags=["solution"]
# Add logarithms, never multiply probabilities: a product of thousands of them is too small for a
# float and becomes 0. And `len(text)` would count characters; “é” is one character and two bytes.

# %% [markdown]
# What can we do with it? Of these tales we know the true probability, because we know the grammar. So we
# can put the model's loss beside the loss of somebody who knows everything that can be known.

# %%
model = mm.load_model("tales-dense")
tokenizer = mm.load_tokenizer("tales-dense")
TALE = """The golden key
Anna found a golden key in the mill. Leo was at the lake. Anna went to the lake \
and saw Leo there. Anna gave the key to Leo. Now Leo has the key."""

ids = torch.tensor(tokenizer.encode(TALE, bos=True, eos=True))
with torch.no_grad():
    chances = model(ids[None, :-1])[0].softmax(-1)        # (T, V)
given = chances.gather(-1, ids[1:, None])[:, 0].tolist()  # to each token
try:
    print(f"the model:   {nats_per_byte(given, TALE):.4f} nats per byte")
    print(f"the grammar: {-log_probability(TALE) / len(TALE.encode()):.4f}")
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# On one tale the model may be lucky and do better than the grammar. On the average over many tales nobody
# can, and that average is the floor.

# %%
# NBVAL_IGNORE_OUTPUT: it counts the exercises of all chapters, and grows with each
progress()
