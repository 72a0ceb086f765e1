# %% [markdown]
# # Exercises 14: Le Chat and La Plateforme
#
# Eight exercises on chapter 14, about an hour and a quarter in all. The two core pieces, `whole_characters`
# and `cut_at_stop`, are written inside the chapter itself; here you write the other side of the wire, repair
# a batch, and use what you built.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time; `check`
# may be called as often as you like.

# %%
import json

import torch

import minimistral as mm
from minimistral.course import check, hint, lines, progress
from minimistral.course.chapters import ch14_le_chat as ch14
from minimistral.sampling import draw
from minimistral.serve import LocalServer, embed

# %% [markdown]
# ## Exercise 1: the server's side of the wire
#
# Difficulty: easy · importance: essential · 6 minutes
#
# Write a stream. For each piece of text there is one event with the dictionary `{"choices": [{"delta":
# {"content": piece}, "finish_reason": None}]}`; then one that says why it ended, with an empty delta,
# `{"choices": [{"delta": {}, "finish_reason": reason}]}`; then the event `[DONE]`. The dictionaries become
# JSON by `json.dumps`. Return all events as one text. Complete the two lines.


# %%
def as_events(pieces, reason):
    """pieces of text and why it ended -> the whole stream, a str"""
    said = [{"delta": {"content": piece}, "finish_reason": None}
            for piece in pieces]
    said.append({"delta": {}, "finish_reason": reason})
    ### BEGIN SOLUTION
    events = [f"data: {json.dumps({'choices': [one]})}\n\n" for one in said]
    return "".join(events) + "data: [DONE]\n\n"
    ### STUB
    # events = ...      # one event, a text, for each choice in `said`
    # return ...        # all of them, and the last event
    ### END SOLUTION


check("as_events", as_events)

# %% [markdown] tags=["solution"]
# Two line breaks: the first ends the line, the second is the empty line that ends the event. A line break
# **inside** a piece does no harm, because JSON writes it as a backslash and an n.

# %% [markdown]
# ## Exercise 2: one turn of a chat, in order
#
# Difficulty: easy · importance: essential · 5 minutes
#
# These are the lines of one turn, shuffled. `turns` is the history, `text` the new message, `eos` the
# end-of-text token. One line is a mistake and stays out. Type the letters in order, with blanks between them.

# %%
lines("chat_loop_in_order")

# %%
### BEGIN SOLUTION
order = "C B G D H E A"
### STUB
# order = "..."
### END SOLUTION
check("chat_loop_in_order", order)

# %% [markdown] tags=["solution"]
# The message enters the history before the prompt is made; the answer enters it after what still waited was
# fetched. Making the stream may come anywhere before the loop.

# %% [markdown]
# ## Exercise 3: how it ended, and what it costs
#
# Difficulty: easy · importance: useful · 7 minutes
#
# A model has written `new_ids` behind `prompt_ids`, at most `limit` of them. If it ended by itself, the last
# of them is one of the `stop_ids`, a set. Return four things: the reason (`"stop"` or `"length"`), the tokens
# read, the tokens written, and the sum of the two. The token that ends a text is not counted as written.
# Every text here has at least one new token.
#
# Example: `[1, 40, 41], [7, 8, 2], 20, {2}` gives `("stop", 3, 2, 5)`.


# %%
def bill(prompt_ids, new_ids, limit, stop_ids):
    """-> (reason, prompt_tokens, completion_tokens, total_tokens)"""
    ### BEGIN SOLUTION
    stopped = new_ids[-1] in stop_ids
    written = len(new_ids) - stopped
    reason = "stop" if stopped else "length"
    return reason, len(prompt_ids), written, len(prompt_ids) + written
    ### END SOLUTION


check("bill", bill)

# %% [markdown] tags=["solution"]
# The limit is not needed. A text whose last allowed token is the end token has ended by itself; asking for
# the number first would call it cut.

# %% [markdown]
# ## Exercise 4: the client's side of the wire
#
# Difficulty: medium · importance: useful · 10 minutes
#
# You get the stream as it arrives: a list of `bytes`, cut **anywhere**, even within a character. Return the
# text: the contents of all deltas, joined. A line ends with `\n`. Lines that begin with a colon are comments, and
# may stand anywhere; empty lines and `data: [DONE]` hold no text. An event may have several choices or none, and
# a delta may have no content. No character of the text itself may be lost, whatever it says.


# %%
def read_text(chunks):
    """bytes as they arrive -> the text of the stream"""
    ### BEGIN SOLUTION
    said = ""
    for line in b"".join(chunks).decode("utf-8").split("\n"):
        if not line.startswith("data:") or line == "data: [DONE]":
            continue
        for choice in json.loads(line[5:])["choices"]:
            said += choice["delta"].get("content", "")
    return said
    ### END SOLUTION


check("read_text", read_text)

# %% [markdown] tags=["solution"]
# A network delivers bytes in order and promises nothing about where they are cut. This reader waits for the
# end of the stream; one that shows text at once would keep the last, unfinished line as bytes.

# %% [markdown]
# Does it read what the chapter's server sends? We cut its stream into pieces of 11 bytes.

# %%
model, tokenizer = mm.load_model("tales-dense"), mm.load_tokenizer("tales-dense")
request = {"model": "tales", "temperature": 0, "max_tokens": 30,
           "messages": [{"role": "user", "content": "La clé dorée"}]}
with LocalServer(model, tokenizer, name="tales", max_length=256, compile=False,
                 progress=False) as server:
    path = "/v1/chat/completions"
    whole = json.loads(ch14.post(server.address, path, request)[1])
    sent = ch14.post(server.address, path, {**request, "stream": True})[1].encode()
try:
    read = read_text([sent[i:i + 11] for i in range(0, len(sent), 11)])
    print("as the whole answer:", read == whole["choices"][0]["message"]["content"])
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 5: two slips in a batch
#
# Difficulty: medium · importance: essential · 12 minutes
#
# Find the bugs. `write_all` is continuous batching on paper: `paper` has places, each remembers the ids that
# it has read. `paper.next_ids()` is a list with the next id of **every** place (None for one that has never
# read anything), `paper.read(place, ids)` adds ids to a place, `paper.forget(place)` empties it. The next
# cell shows the symptom: texts differ from those written alone.


# %%
def write_all(paper, prompts, limits):
    """Every prompt's new ids, limits[i] of them, in the order of the prompts."""
    waiting, rows = list(range(len(prompts))), [[] for _ in prompts]
    seated = {}                                           # place: its prompt
    while waiting or seated:
        for place in range(len(paper.memory)):
            if place not in seated and waiting:
                seated[place] = waiting.pop(0)
                ### BEGIN SOLUTION
                paper.forget(place)                       # was missing
                paper.read(place, prompts[seated[place]])
                ### STUB
                # paper.read(place, prompts[seated[place]])
                ### END SOLUTION
        chosen = paper.next_ids()
        for n, (place, number) in enumerate(list(seated.items())):
            ### BEGIN SOLUTION
            token = chosen[place]                         # was chosen[n]
            ### STUB
            # token = chosen[n]
            ### END SOLUTION
            rows[number].append(token)
            paper.read(place, [token])
            if len(rows[number]) == limits[number]:
                del seated[place]
    return rows


# %%
prompts, limits = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12], [13]], [3, 7, 2, 5, 4]
written = write_all(ch14.PaperModel(2), prompts, limits)
for prompt, limit, row in zip(prompts, limits, written):
    same = row == ch14.alone(prompt, limit)
    print(f"{prompt!s:17} {'as alone' if same else 'another text than alone'}")

# %%
check("write_all", write_all)

# %% [markdown] tags=["solution"]
# The model answers for places, and the n-th of those who are left is not place n: while all places are taken,
# nobody notices. And a place remembers until it is told to forget. In a real server the second slip shows one
# user what another one wrote.

# %% [markdown]
# ## Exercise 6: a history that keeps its beginning
#
# Difficulty: medium · importance: useful · 12 minutes
#
# The chapter drops the oldest turn first, and with it the tale that everything is about. Write another rule:
# keep the system message (if there is one, it is first), the first question **with** its answer, and the last
# message, which is a question. Drop the turns between them, oldest first, a question together with its
# answer, until `count(messages)` is at most `longest`. If nothing is left to drop, or a single question is all
# there is, return what is there. The given list stays as it is.


# %%
def keep_the_first(messages, longest, count):
    """messages: a question, its answer, ..., a last question -> a new list"""
    ### BEGIN SOLUTION
    first = 1 if messages[0]["role"] == "system" else 0
    kept = list(messages)
    while count(kept) > longest and len(kept) > first + 3:
        del kept[first + 2:first + 4]
    return kept
    ### END SOLUTION


check("keep_the_first", keep_the_first)

# %% [markdown] tags=["solution"]
# There is no right rule for all assistants. Others let the model write a summary of what is dropped. All of
# them are programs around the model, and few of them tell the user what was forgotten.

# %% [markdown]
# ## Exercise 7: chance of one's own
#
# Difficulty: medium · importance: essential · 10 minutes
#
# In a batch every row belongs to another request. Choose one token for each: row i of `logits` (B, V) with
# `temperatures[i]`, and with `generators[i]` as its source of chance. Temperature 0 takes the likeliest
# token. Else: softmax of logits over temperature, **one** uniform number by `torch.rand(1, generator=...)`,
# then `draw(probabilities, uniform)` with shapes (1, V) and (1,). Return the tokens, (B,).
#
# `draw` takes the token at which the running sum of the probabilities passes the uniform number (chapter 6).


# %%
def choose_each(logits, temperatures, generators):
    """logits: (B, V) -> int64 (B,)"""
    ### BEGIN SOLUTION
    chosen = []
    for row, temperature, generator in zip(logits, temperatures, generators):
        if temperature == 0:
            chosen.append(int(row.argmax()))
        else:
            uniform = torch.rand(1, generator=generator)
            probabilities = (row / temperature).softmax(-1)[None]     # (1, V)
            chosen.append(int(draw(probabilities, uniform)))
    return torch.tensor(chosen)
    ### END SOLUTION


check("choose_each", choose_each)

# %% [markdown] tags=["solution"]
# With one generator for all, your text would depend on who else is asking, and a seed would promise nothing.
# The server gives each request a generator of its own, and draws a seed for those who name none.

# %% [markdown]
# ## Exercise 8: a search engine in ten lines
#
# Difficulty: medium · importance: optional · 14 minutes
#
# An open task. First the tool: `query` is a vector (D,), `vectors` are (N, D), of any lengths. Return the
# numbers of the `k` rows whose **direction** is nearest to the query's (the largest cosine: the product over
# both lengths), nearest first, as a list. With fewer than k rows, all of them.


# %%
def nearest(query, vectors, k):
    """query: (D,), vectors: (N, D) -> a list of at most k row numbers"""
    ### BEGIN SOLUTION
    cosines = (vectors @ query) / (vectors.norm(dim=-1) * query.norm())   # (N,)
    return cosines.argsort(descending=True)[:k].tolist()
    ### END SOLUTION


check("nearest", nearest)

# %% [markdown]
# Then use it. Put your own sentences in, and look for what it finds and what it misses.

# %%
sentences = ["Anna found a key in the mill.", "Leo was at the lake.",
             "Anna gave the key to Leo.", "Anna trouva une clé dans le moulin."]


def vector(text):
    return torch.tensor(embed(model, tokenizer.encode(text, bos=True)))


vectors = torch.stack(list(map(vector, sentences)))
for question in ("Where did Anna find the key?", "Leo found a key in the mill."):
    try:
        rows = nearest(vector(question), vectors, 2)
        print(question, *(sentences[i] for i in rows), sep="\n   ")
    except (NotImplementedError, TypeError):
        print("not written yet")

# %% [markdown] tags=["solution"]
# Sentences with the same words are found. A question finds what looks like it, which need not be its answer,
# and the French sentence is far from the English one that says the same. Embedders are trained on such pairs.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
