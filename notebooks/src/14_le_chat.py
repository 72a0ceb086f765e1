# %% [markdown]
# # 14. Le Chat and La Plateforme
#
# **What stands between a model and a product?**
#
# The core takes 60 minutes. The exercises take an hour and a quarter; the sections under *Further* come on
# top. You need chapter 6 and the chat format of chapter 13; what we borrow from them is repeated below.
#
# Words and letters in this chapter: **B** texts in a batch · a **turn** is a question with its answer · a
# **byte** is a number from 0 to 255, written with two hexadecimal digits, as in c3 · **loopback** is the
# network address of one's own machine, 127.0.0.1.

# %%
import json
import textwrap

import minimistral as mm
from minimistral.chat import Talk
from minimistral.course import (Choice, bet, check, explore, hint, mine, predict,
                                progress, reveal, show, swap, verdict)
from minimistral.course.chapters import ch14_le_chat as ch14
from minimistral.course.chat_panel import chat
from minimistral.course.figures import bars_chart, lines_chart, new_figure
from minimistral.course.panel import wrapped
from minimistral.instruct import encode_chat
from minimistral.serve import LocalServer
from minimistral.streaming import TextStream

NAME = "tales-chat"
model, tokenizer = mm.load_model(NAME), mm.load_tokenizer(NAME)

# %% [markdown]
# ## The headlines
#
# In 2024 the press wrote about an assistant called Le Chat, about a platform for developers, and about the
# cloud. Place your bets: one letter between the quotation marks. The verdicts come at the end of the core.

# %%
bet(15, answer="")

# %%
bet(25, answer="")

# %% [markdown] tags=["recall"]
# Three questions from before. Answer them in your head; skip them if you are in a hurry.
#
# <details><summary>What does a model return for a row of token ids?</summary>
# For every position one score for each token of the vocabulary, nothing else.</details>
# <details><summary>What did fine-tuning on conversations change?</summary>
# Some weights. The model still continues a text; it has learned how texts in the chat format go on.</details>
# <details><summary>What does the end-of-text token do?</summary>
# Nothing by itself. It is a token like others, and a program has to stop when it comes.</details>

# %% [markdown]
# ## A loop around a model
#
# Chapter 13 gave us `tales-chat`, which answers questions about a tale: who has a thing, and where somebody or
# something is. Three dots are its answer where the tale has not told it. Is that a chat already? Let us run
# one by hand. A conversation is a list of messages. We write it in the chat format, let the model
# continue, and stop at the end-of-text token.

# %%
TALE = ch14.TALE
eos = tokenizer.eos_id


def continued(messages, stop_ids=(eos,)):
    """What the model writes behind a list of messages."""
    ids, _ = encode_chat(tokenizer, messages)
    return tokenizer.decode(mm.generate(model, ids, 80, stop_ids=stop_ids))


asked = [{"role": "user", "content": TALE + "\nWho has the ring?"}]
print(wrapped(asked[0]["content"]))
print(" ->", continued(asked))
predict("stop", "And if nobody watches for the end-of-text token?",
        ["the model stops by itself", "it writes on, up to its limit of tokens",
         "an error: there is nothing after the end"], answer="")

# %%
ids, _ = encode_chat(tokenizer, asked)
endless = mm.generate(model, ids, 80)
at = endless.index(eos)
print("tokens:", len(endless), "· the end-of-text token stands at place", at)
print("behind it:", repr(tokenizer.decode(endless[at + 1:])[:60]), "...")
assert len(endless) == 80 and at < 79
reveal("stop", "B", "The model has no off switch. The program around it has.")

# %% [markdown]
# Stopping is the first thing that the program adds. The second is memory. We ask about the same tale once
# more, and a person would not tell the tale again.

# %%
again = {"role": "user", "content": "Where is Leo?"}
predict("memory", "We send the second question alone. What does the model know?",
        ["the tale: it has just read it", "nothing but this question",
         "the first answer, but not the tale"], answer="")

# %%
first = {"role": "assistant", "content": continued(asked)}
print("alone:       ", repr(continued([again])[:40]))
print("with history:", repr(continued([*asked, first, again])))
grown = [len(encode_chat(tokenizer, turns)[0]) for turns in
         ([again], asked, [*asked, first, again])]
print("tokens read for each:", grown)
assert grown[2] > grown[1] > grown[0]
assert continued([again]) != continued([*asked, first, again])
reveal("memory", "B", "A model remembers nothing between two calls. The whole "
       "conversation is sent again, each time.")

# %% [markdown]
# A question alone gets nonsense: in all that tales-chat learned from, a tale came first.
#
# So the history is the program's, and it grows with every turn. Some day it is too long for the model. Then
# something has to go: the oldest question, **with** its answer, because the format wants them in turns. The
# instructions (the *system message*) and the last question stay. The library's function does that. Try other
# limits: where is the border, and what happens at 5?

# %% tags=["try"]
from minimistral.chat import fit_conversation

talk_so_far = [{"role": "system", "content": "Be brief."}, *asked, first, again]
for longest in (90, 20):
    kept = fit_conversation(tokenizer, talk_so_far, longest)
    print(f"at most {longest:3} tokens:", [m["role"] for m in kept])

# %% [markdown]
# With 20 tokens, the tale is gone. The model will answer all the same, and it will not say that it has
# forgotten. If an assistant suddenly no longer knows how a long talk began, this is one of the reasons.
#
# **In short:** a chat is a loop: history, format, stop. The model is one line of it.

# %% [markdown]
# ## Half a character
#
# Nobody wants to wait for the whole answer, so we show each token when it comes. A token is a piece of
# **bytes**. A letter without an accent is one byte, é is two, € is three, 😀 is four.

# %%
text = "La clé € 😀"
pieces = [tokenizer.id_to_bytes(i) for i in tokenizer.encode(text)]
show(ch14.bytes_picture(pieces, text), alt="The text's bytes in a row of boxes. "
     "The bytes of € and of the emoji lie in several tokens, one byte in each.",
     data={"token": range(len(pieces)), "bytes": [p.hex(" ") for p in pieces]})
predict("half", "We turn each token into text by itself. What is seen?",
        ["the text, a little later than usual", "marks such as � in the text",
         "an error at the first half character"], answer="")

# %%
shown = [piece.decode("utf-8", errors="replace") for piece in pieces]
print("token by token:", "".join(shown))
print("all at once:   ", b"".join(pieces).decode())
assert "\N{REPLACEMENT CHARACTER}" in "".join(shown)
reveal("half", "B", "Three bytes that belong together were decoded as three wrong "
       "characters. Nothing after that can repair it.")

# %% [markdown] tags=["slide"]
# This is the classic mistake of programs that stream, and its author never sees it, because English has no
# such characters. The cure: bytes that may be the beginning of a character wait for the next token.
#
# The rule of UTF-8: a byte below 80 (hexadecimal) is a character by itself. A character of several bytes
# begins with a byte from c0 up: it has 2 bytes in all, from e0 on 3, from f0 on 4. The bytes that follow lie
# between 80 and bf.

# %% [markdown] tags=["slide"]
# ### Your turn: never half a character
#
# You get bytes; return the text of all complete characters, and the bytes that have to wait. Only the
# **last** character can be incomplete. Bytes elsewhere that belong to no character become �, which is what
# `errors="replace"` does. Examples: `b"cl\xc3"` gives `("cl", b"\xc3")`, and `b"cl\xc3\xa9"` gives `("clé",
# b"")`.

# %% tags=["your-turn"]
def whole_characters(raw):
    """bytes -> (text of the complete characters, bytes that wait)"""
    waiting = ...     # how many bytes at the end have to wait: 0, 1, 2 or 3
    return ...


check("whole_characters", whole_characters)

# %% [markdown]
# `hint("whole_characters")` helps, one step at a time. Python has such a decoder built in; the library's
# version asks it, and you have seen what it does inside.

# %%
# minimistral/streaming.py
# show: whole_characters

# %% [markdown]
# **In short:** decode what is whole, keep the rest as bytes.

# %% [markdown]
# ## Stop before it is seen
#
# A caller may name texts that end the answer, **stop sequences**: an empty line, or the beginning of the next
# question. The caller does not want to see them. Here the text is "one END two", and the stop is "END".

# %%
pieces = [tokenizer.decode([i]) for i in tokenizer.encode("one END two")]
print(pieces)
predict("border", "We look for END in each piece before we show it. What is shown?",
        ["one", "one END two", "nothing"], answer="")

# %%
by_piece, whole = "", ""
for piece in pieces:
    if "END" in piece:
        break
    by_piece += piece
for piece in pieces:
    whole += piece                                        # shown at once
    if "END" in whole:
        break
print("looking at each piece:      ", repr(by_piece))
print("looking at all of the text: ", repr(whole))
assert by_piece == "one END two" and whole == "one END"
reveal("border", "B", "No piece holds the whole stop. And looking at all of the "
       "text finds it when it was shown already.")

# %% [markdown] tags=["slide"]
# Both ways are wrong. What was shown cannot be taken back. So text
# that **may become** a stop sequence has to wait: after "one E" we can show "one ". If "N" comes next, we
# wait on; if it is "L", then "EL" may go.
#
# ### Your turn: stop before it is seen
#
# You get text that nobody has seen yet, and the stop sequences. Return three things: what may be shown, what
# has to wait, and whether the text ends here. It ends before the **first** stop in it; what follows is
# dropped. Else the **longest** end of the text that begins a stop waits. Example: `"one EN", ["END"]` gives
# `("one ", "EN", False)`.

# %% tags=["your-turn"]
def cut_at_stop(text, stops):
    """-> (text to show, text that waits, whether a stop has ended it)"""
    found = ...       # where the stops stand that are in the text
    return ...


check("cut_at_stop", cut_at_stop)

# %% [markdown]
# Here are the library's, and the class that uses both pieces: bytes wait for bytes, then text waits for text.

# %%
# minimistral/streaming.py
# show: cut_at_stop, TextStream

# %%
stream = TextStream(tokenizer, stops=["END"])
for token in tokenizer.encode("clé 😀 ENd END two"):
    shown = stream.feed(token)
    print(f"{tokenizer.id_to_bytes(token)!s:14} shows {shown!r:8} "
          f"waiting: {stream.raw!s:18} {stream.held!r}")
assert stream.stopped and stream.finish() == ""

# %% [markdown]
# Read it from the top. The emoji is shown with its last byte. "EN" waits until "d" shows that it was no stop.
# The last "END" is never shown, nor is anything after it.
#
# **In short:** whatever could still become something else waits.

# %% [markdown]
# ## The chat
#
# Now the loop has all its parts, and it fits into one class. `say` is a generator: whoever reads it gets the
# answer piece by piece and may leave at any time. Then what was written so far goes into the history: you
# have read it, so the model should know that it said it.

# %%
# minimistral/chat.py
# show: fit_conversation, Talk

# %% [markdown]
# And here it is with a face. Type a message and press Enter; the cell has typed the first three. Tab leads
# from one control to the next; *Stop* ends an answer; *Temperature* and *Instructions* hold from the next
# answer on. If you read a page that nobody runs, you see no controls; the conversation follows as text.

# %% tags=["try"]
panel = chat(NAME, temperature=0.0, max_length=512, max_new_tokens=60)
for question in (TALE + "\nWho has the ring?", "Where is Leo?", "Where is Anna?"):
    panel.ask(question)
print(wrapped(str(panel)))
assert len(panel.talk.turns) == 6

# %% [markdown]
# The model knows one small world and a few kinds of question. Ask who **found** the ring: it says something about
# the ring, whether right or wrong. That is the model's doing. The loop would be the same around a model a
# thousand times as large.
#
# A tale of your own wants its question in the line below, as in all that the model learned from. The field has
# one line, so ask in a cell:
# `panel.ask("Leo found a key in the mill. Leo gave the key to Anna.\nWho has the key?")`.

# %% [markdown]
# ## An address
#
# A chat serves one person in one place. A **platform** gives the model an address, so that any program can
# use it: a request goes in, JSON comes out. Our server listens on loopback, which no other machine can reach.
# It runs in a thread of this notebook.

# %%
server = LocalServer(model, tokenizer, name=NAME, max_length=512, compile=False,
                     progress=False)
request = {"model": NAME, "messages": asked, "temperature": 0, "max_tokens": 60}
status, body = ch14.post(server.address, "/v1/chat/completions", request)
answer = json.loads(body)
answer["id"], answer["created"] = "chatcmpl-...", 0       # new with each request
print(status, json.dumps(answer, indent=1))
predict("usage", "The end-of-text token was chosen. Is it in completion_tokens?",
        ["yes: it was computed, so it is charged", "no: nobody sees it",
         "it is counted with the prompt"], answer="")

# %% [markdown]
# Each field has a purpose. `finish_reason` says why it ended: *stop* (by itself, or at a stop sequence), or
# *length* (cut at the limit, and perhaps in the middle of a word). `usage` is what a platform charges for.

# %%
text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
print("chosen by the model, the end token included:", at + 1)
print("completion_tokens:                          ", usage["completion_tokens"])
assert usage["completion_tokens"] == at and usage["prompt_tokens"] == len(ids)
reveal("usage", "B", "Each platform decides that for itself, and it should say so. "
       "Ours counts what one gets.")

# %% [markdown]
# ### Streams
#
# With `"stream": true` the answer comes in **server-sent events**. An event is a line that begins with
# `data:`, and an **empty line** behind it. Each holds what is new, the *delta*; tokens that come quickly share
# one. The first tells only the role, the last but one why the text ended and what it cost. The last is
# `[DONE]`. Before we look at one, here is what the library writes: an event, and the usage (`Told` lists what
# has to be known of a text to count it).

# %%
# minimistral/api.py
# show: as_event, Told, count_usage

# %%
# NBVAL_IGNORE_OUTPUT: tokens that come quickly may share an event
other = [{"role": "user", "content": TALE + "\nWhere is Leo?"}]
status, body = ch14.post(server.address, "/v1/chat/completions",
                         {**request, "messages": other, "stream": True})
events = body.split("\n\n")
for event in events:
    start = event.find('"choices"')
    told = event[:6] + (event[start:] if start >= 0 else event[6:])
    print(textwrap.fill(told, 80, subsequent_indent=" " * 6))     # to fit the page
assert events[-2] == "data: [DONE]" and events[-1] == ""

# %% [markdown]
# ### What goes wrong, and how it is told
#
# Requests can be wrong in many ways. The rule: the client is told **what** is wrong, **where**, and with a
# number that programs understand. 400 means *your request is wrong*, 404 *there is no such thing*, 429 *come
# back later*, 500 *we failed*. One bad request must not harm the others.

# %%
predict("bad", 'A client sends "temperature": "hot". What should the server do?',
        ["take the default and answer", "answer 500: it could not compute that",
         "answer 400 and name the field"], answer="")

# %%
wrong = {"not JSON": b"{broken", "no messages": {"model": NAME},
         "hot": {**request, "temperature": "hot"},
         "another model": {**request, "model": "large"},
         "the assistant last": {**request, "messages": [*asked, first]},
         "too long": {**request, "max_tokens": 5000}}
for name, body in wrong.items():
    status, told = ch14.post(server.address, "/v1/chat/completions", body)
    error = json.loads(told)["error"]
    where = "" if error["message"].startswith(f"{error['param']}:") else \
        f"{error['param'] or 'body'}: "
    print(f"{name}: {status}, {where}"
          + textwrap.shorten(error["message"], 59, placeholder=" ..."))
    assert 400 <= status < 500
reveal("bad", "C", "A default would answer a question that nobody asked.")

# %% [markdown]
# ### A public client
#
# Now the proof. Mistral publishes a Python client for its platform. We do not change it; we only tell it
# another address. While it asks, every piece of yours that has passed stands in the library's place.

# %%
own = mine(NAME)
try:
    from mistralai.client import Mistral
except ImportError:
    print("pip install mistralai, and run this cell again")
else:
    client = Mistral(api_key="any", server_url=server.address)
    with swap(own.pieces):
        told = client.chat.complete(model=NAME, messages=asked, temperature=0)
    print([one.id for one in client.models.list().data])
    print(told.choices[0].message.content, told.usage.total_tokens, "tokens")
    assert told.choices[0].message.content == text
print("your pieces of this chapter in the server:",
      sum(name.startswith("streaming") for name in own.pieces), "of 2")

# %% [markdown]
# OpenAI's client works as well; the course's tests run both. That is what a *public shape* is good for: the
# model behind it can be exchanged. What has passed of your sampling and streaming ran here. Your attention did
# not: for speed the server's engine has a way of its own (chapter 11). `mine` runs yours.
#
# **In short:** an API is shapes: of requests, answers, events and errors. Stick to a public one, and programs
# that you have never seen can use your model.

# %% [markdown]
# ## What leaves the machine, and how fast is it?
#
# The first headline says that the cloud is slow and unsafe, and the device fast. Both halves can be looked
# at. A program can ask Python to call a function, a **hook**, before every connection. Ours writes down the
# hosts.

# %%
predict("hosts", "The chat answers, then the server answers a request. Which hosts "
        "were connected to?", ["none, then 127.0.0.1", "none at all",
                               "127.0.0.1, then Mistral's"], answer="")

# %%
with ch14.Watch() as at_home:
    "".join(Talk(model, tokenizer).say("Where is Leo?"))
print("the chat:      ", sorted(at_home.hosts) or "none")
assert not at_home.hosts
with ch14.Watch() as watch:
    ch14.post(server.address, "/v1/chat/completions", request)
print("with the server:", sorted(watch.hosts))
assert watch.hosts == {"127.0.0.1"}
reveal("hosts", "A", "Loopback leads from one program to another on this machine.")

# %% [markdown]
# Nothing left this machine: neither the question nor the answer. With a cloud, both leave it, each time with
# the whole history. Is that *unsafe*? That depends on contracts, laws and locks, and no cell can measure
# them. What can be said: what is not sent needs nobody's promise.

# %% [markdown]
# Now the speed. What counts for a reader is the time to the **first** word. Our model has about a million
# parameters, and we take the time. For larger ones we compute: before it can answer, a model has to read the
# prompt, with about 2 operations for each weight and token. We measure how many this machine does. For a data
# center we **assume** 400 trillion in a second (a large GPU, well used) and a way of 0.05 s there and back.

# %%
times = sorted(ch14.seconds_to_first_piece(server.address, request)
               for _ in range(5))
print("our first word in less than a second:", times[2] < 1)
assert times[2] < 1
here = ch14.operations_per_second()
assert 1e9 < here < 1e13
ours = mm.count_parameters(model.config).total
assert 5e5 < ours < 2e6
sizes = {"ours": ours, "3B": 3.4e9, "7B": 7.2e9, "24B": 23.6e9}
local = [ch14.first_word(n, 100, here) for n in sizes.values()]
cloud = [ch14.first_word(n, 100, 4e14, trip=0.05) for n in sizes.values()]
predict("first", "A prompt of 100 tokens. Where is Mistral 7B's first word sooner?",
        ["here: nothing travels", "in the data center", "about the same"],
        answer="")

# %%
# NBVAL_IGNORE_OUTPUT: the speed of this machine
figure, ax = new_figure(7.4, 3.6)
lines_chart(ax, list(sizes.values()),
            {"this machine": local, "a data center": cloud},
            title="The small model is first here, the large one there",
            xlabel="parameters (log)", ylabel="seconds to the first word (log)")
ax.set(xscale="log", yscale="log")
ax.set_xticks(list(sizes.values()), list(sizes), minor=False)
ax.minorticks_off()
border = 0.05 * here / (2 * 100)          # reading takes as long as the way
print(f"the border on this machine: {border / 1e6:.0f} million parameters")
seconds = [f"{name} {a:.3f} here, {b:.3f} in the data center"
           for name, a, b in zip(sizes, local, cloud)]
show(figure, alt=f"Seconds to the first word: {'; '.join(seconds)}.",
     data={"model": list(sizes), "here": local, "data center": cloud})
assert local[0] < cloud[0] and local[2] > cloud[2]
reveal("first", "B", "The way costs the same for all models. Reading does not.")

# %% [markdown]
# Speed is a matter of size. Below the border that the cell printed nothing beats being there; above it, a
# larger machine makes up for the way. A good GPU at home moves the border, and so do few bits (chapter 12).
# It does not vanish.
#
# **In short:** local means private by construction, and fast for what is small.

# %% [markdown]
# ## A list of numbers for a text
#
# The platform has a third address, `/v1/embeddings`: text in, a vector out. Ours takes the hidden states of
# the last layer, averages them over the tokens, and makes the length 1. Texts that are alike should point in
# the same direction: the product of two vectors is then near 1.

# %%
PAIRS = [("Anna found a key in the mill.", "Leo found a key in the mill."),
         ("Anna found a key in the mill.", "Anna trouva une clé dans le moulin."),
         ("Anna gave the key to Leo.", "Leo gave the key to Anna."),
         ("Anna gave the key to Leo.", "Who has the key?")]
predict("alike", "Which pair gets the larger product: a sentence and its "
        "translation (the second), or two that say the opposite (the third)?",
        ["the translation", "the opposites", "about the same"], answer="")

# %%
products = []
for pair in PAIRS:
    body = {"model": NAME, "input": list(pair)}
    data = json.loads(ch14.post(server.address, "/v1/embeddings", body)[1])["data"]
    one, other = (row["embedding"] for row in data)
    products.append(sum(a * b for a, b in zip(one, other)))
    print(f"{products[-1]:.2f}  {pair[0]}  |  {pair[1]}")
assert products[2] > products[1] + 0.05 and products[3] < min(products[:3])
reveal("alike", "B", "The opposite is nearer than the same thing said in French. "
       "Who gave and who got hardly shows.")

# %% [markdown]
# It finds texts about the same things, and little more. A question is far from the sentence that answers it,
# which is what a search engine would need. A trained **embedder** has learned from pairs that belong
# together. Ours has learned to predict the next token; the vectors are a by-product, and `serve.py` says so
# in its first lines.
#
# **In short:** every model has vectors; only training makes them a measure of meaning.

# %% [markdown]
# ## Many at once
#
# A product has many users and one machine. Each step reads all weights, to write a single token. With eight
# texts in a **batch** a step reads them once for eight tokens. `benchmarks/serving.py` measured the server
# with one client and with eight: a model of tales, and two larger ones with random weights, S and M. Eight
# times the tokens, then?

# %%
shapes = {"tales-dense": mm.load_model("tales-dense").config,
          "S": mm.ModelConfig(256, 6, 8, 2, 32, 768, 4096),
          "M": mm.ModelConfig(768, 12, 12, 4, 64, 2048, 32000)}
rows, gains = ch14.recorded(), {}
for name, shape in shapes.items():
    millions = mm.count_parameters(shape).total / 1e6
    gains[f"{name}\n{millions:.1f} million"] = rows[f"{name}, 1 thread"]["ratio"]
figure, ax = new_figure(6.4, 3.2)
bars_chart(ax, gains, ylabel="one client = 1", title="Eight clients together get "
           "several times one client's tokens")
show(figure, alt="Tokens a second for eight clients together over those of one: "
     + ", ".join(f"{name} {gain:.1f}" for name, gain in zip(shapes, gains.values()))
     + ".",
     data={"model": list(shapes), "times": list(gains.values())})
assert 2 < min(gains.values()) and max(gains.values()) < 8

# %% [markdown]
# Several times, not eight: a step shares the reading of the weights, but it computes each text by itself.
#
# Requests do not come in eights, and their answers are not of one length. **Static** batching takes who is
# there, and goes on until the longest answer is done. **Continuous** batching looks at every step: who is done
# leaves, who waits sits down.

# %%
predict("batching", "Twelve answers, four places. When does continuous batching "
        "gain nothing?", ["if all answers are alike", "if one is very long",
                     "if their lengths are mixed"], answer="")

# %% [markdown]
# A question for the explorer: **when does continuous batching gain most, and when nothing?**

# %% tags=["try"]
explore(ch14.batch_explorer, lengths=Choice(list(ch14.LENGTHS), "mixed"),
        arrivals=Choice(list(ch14.ARRIVALS)), places=Choice([2, 4, 8], 4),
        settings=[{"lengths": "mixed"}, {"lengths": "one very long"},
                  {"lengths": "all alike"}])

# %% [markdown]
# The same as plain code.

# %%
saved = {}
for name, lengths in ch14.LENGTHS.items():
    waiting = [(0, n) for n in lengths]
    steps = [ch14.figures_of(waiting, ch14.schedule(waiting, 4, way))[0]
             for way in (False, True)]
    print(f"{name:14} static {steps[0]:3} steps, continuous {steps[1]:3}")
    saved[name] = steps[0] - steps[1]
assert saved["all alike"] == 0 and max(saved, key=saved.get) == "mixed"
reveal("batching", "A", "All leave together, so nobody waits for the longest. "
       "Mixed lengths gain most: the longest of every batch keeps places empty.")

# %% [markdown]
# *Further* shows the loop that does better, and how a newcomer gets a place in the middle of the work.

# %% [markdown]
# ## The verdicts on the headlines

# %%
print("hosts that the local chat connected to:", sorted(at_home.hosts) or "none")
print("the small model's first word: sooner here than there:", local[0] < cloud[0])
print("7B's first word:              sooner here than there:", local[2] < cloud[2])
verdict(15, "true with a condition", "Nothing leaves the machine: that was shown. "
        "Fast it is for small models; for large ones the cloud is faster.")

# %% [markdown]
# A careful writer would have written: *What is computed on the device need not be sent to anybody. A small
# model answers there without delay. For a large one, a fast machine far away is sooner than a slow one here.*
#
# The second headline says two things. That Le Chat is a language model: we put the same loop around another
# model, one that was never tuned on conversations. And that Small, Large and Embed are optimised versions of
# the open models.

# %%
other = Talk(mm.load_model("tales-moe"), mm.load_tokenizer("tales-moe"))
said = "".join(other.say("Who has the ring?"))
print("another model, same chat:", " ".join(said.split())[:50], "...")
widths = {name: mm.MODELS[name].dim for name in
          ("mistral-7b-v0.2", "mixtral-8x7b-v0.1", "mixtral-8x22b-v0.1")}
print("widths of the open models of early 2024:",
      *(f"{name}: {width}" for name, width in widths.items()), sep="\n  ")
print("numbers in a vector of Mistral Embed: 1024")
assert 1024 not in widths.values()
verdict(25, "false", "False twice: an assistant is a program around a model, and "
        "the three were closed models of their own, with no published design.")

# %% [markdown]
# The loop is the same; what it says has become nonsense, for this model knows no questions. So the loop is not
# the model. The width of Embed is one of the few things known of it, and none of these open models has it. More
# cannot be computed: the three came without weights.
#
# A careful writer would have written: *Le Chat is an assistant: a page and a program around Mistral's models,
# which the user may choose. Small, Large and Embed are models that Mistral offers on its platform and, at
# that time, did not publish.*

# %% [markdown]
# ## What you have now
#
# You can now
#
# 1. build a chat from a model: history, format, stop, and what to drop when it gets long;
# 2. stream text without half characters and without a glimpse of a stop sequence;
# 3. read and write the shapes of a public API, its errors and its events;
# 4. say what leaves a machine and prove it, and compute when local is fast;
# 5. tell a model, an assistant and a platform apart.
#
# New words: *turn*, *stop sequence*, *server-sent event*, *usage*, *loopback*, *embedding*, *continuous
# batching*, *platform*.

# %%
show(ch14.layers_picture(), alt="Three boxes inside each other: the model, around "
     "it the assistant with history and stop, around both the platform.")

# %% [markdown]
# **This chapter's mistakes and what they look like**
#
# | Mistake | Symptom |
# |---|---|
# | each token decoded by itself | � among accents, nothing wrong in English |
# | the stop looked for in each piece | it is never found |
# | the stop looked for too late | its beginning was shown |
# | one message dropped from the history | two of the same role: the format refuses |
# | no empty line behind an event | the client waits for ever |
# | one source of chance for all | a seed repeats nothing while others are there |
# | a finished text's memory reused | newcomers go on with somebody else's text |

# %% [markdown]
# ## The end of the course
#
# There is no question for the next chapter. This is what you have built. Each piece that passed its check is
# yours, and `mine` runs the model with it.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
server.stop()
print(mine(NAME))
progress()

# %% [markdown]
# What is not yours yet can become yours in any order. From here, three ways lead on: train a model on a text
# of your own (`minimistral train`), load a real checkpoint (chapter 10), or put this library behind a program
# of yours (`minimistral serve`). And read the library once from `config.py` to `batching.py`. There should be
# nothing in it that you could not have written.
#
# We have been wrong often on the way, and found out each time by measuring. Keep that.

# %% [markdown]
# ## Further: a batch, step by step
#
# Everything from here on can be skipped without loss.
#
# A job is one text that somebody wants. The loop has three parts: those who left make room, those who wait
# take it, and everybody gets one token.

# %%
# minimistral/batching.py
# show: Busy, Job

# %%
# minimistral/batching.py
# show: Seating

# %% [markdown]
# Three requests, two places. We run the loop by hand, one round at a time, and look who sits where. The
# second reader leaves in the middle.

# %%
from minimistral.batching import Job, Seating
from minimistral.engine import Engine

engine = Engine(mm.load_model(NAME), 2, 256, compile=False, progress=False)
seating, names = Seating(engine), {}
for name, limit in (("A", 3), ("B", 9), ("C", 4)):
    names[job := Job(ids, limit, tell=lambda news: None)] = name
    seating.waiting.append(job)
for step in range(1, 9):
    seating.round()
    sit = {place: f"{names[job]} ({job.written} written)"
           for place, job in sorted(seating.seated.items())}
    print(f"round {step}: {sit} waiting: {[names[job] for job in seating.waiting]}")
    for job in seating.seated.values():
        job.gone = names[job] == "B" and step == 5

# %% [markdown]
# A has its three tokens in round 3. The engine tells that a text has ended instead of giving its next token: in
# round 4, and C sits down in round 5. B's reader went away in round 5, and in round 6 the place is free.
#
# Each place has its own part of the cache, with a position for every slot. A newcomer finds all positions at
# -1, which means that nothing of the old text is seen (chapter 8). The keys themselves are still there. They
# need not be wiped, because **positions decide**.

# %%
window = mm.load_model("tales-moe").config.sliding_window
rolling = Engine(mm.load_model("tales-moe"), 2, 256, compile=False, progress=False)
prompt = mm.load_tokenizer("tales-moe").encode("The golden ring\n", bos=True)
alone = mm.generate(rolling.fast.model, prompt, 70)
rolling.generate([prompt] * 2, 70, temperature=1.0, seed=3)  # others sat there
place = rolling.admit(prompt, max_new_tokens=70)
ring = next(iter(rolling.fast.rings.values()))
print("slots that hold something:", int((ring.positions[place] >= 0).sum()),
      "of", window)
again = [rolling.step()[place] for _ in range(70)]
print("the ring is full:", int((ring.positions[place] >= 0).sum()) == window)
print("and the text is the one written alone:", again == alone)
assert again == alone

# %% [markdown]
# The desk is the same loop in a thread of its own. Requests come from other threads, so a lock guards the
# list of those who wait. If a step fails, all who took part are told, and the next ones are served.

# %%
# minimistral/batching.py
# show: Desk

# %%
# minimistral/batching.py
# show: work_until_closed, end_all

# %% [markdown]
# ## Further: in the terminal, and on a machine of one's own
#
# The chat of this chapter in a terminal, and the server as a program:
#
# ```
# minimistral chat --temperature 0
# minimistral serve --port 8000 --no-compile
# curl http://127.0.0.1:8000/v1/models
# ```
#
# In the chat one line is one message, and a line that ends with `\` goes on in the next. End a tale so:
# `tales-chat` has learned questions that stand *below* their tale. `/help` lists the commands, and Ctrl-C
# stops an answer. Without `--no-compile` the server compiles its steps before it answers anybody (chapter 11).
# Large models write faster then, but the start may take minutes.
#
# In a container the server has to listen at all addresses, and then it refuses to start without a key. We
# have not built this one:
#
# ```
# FROM python:3.12-slim
# COPY . /course
# RUN pip install "/course[serve]"
# CMD ["minimistral", "serve", "--host", "0.0.0.0", "--no-compile"]
# ```

# %% [markdown]
# `docker run -p 127.0.0.1:8000:8000 -e MINIMISTRAL_API_KEY=... IMAGE` would start it.
#
# For a server that starts with the machine, Linux has *systemd*. `systemd-analyze verify` finds nothing wrong
# with this file; more was not tried:
#
# ```
# [Unit]
# Description=A small language model
#
# [Service]
# ExecStart=/opt/course/.venv/bin/minimistral serve --model /opt/models/mine
# EnvironmentFile=/etc/minimistral.env
# DynamicUser=yes
# Restart=on-failure
#
# [Install]
# WantedBy=multi-user.target
# ```
#
# It belongs in `/etc/systemd/system/minimistral.service`, and `systemctl enable --now minimistral` starts it. The
# second file, for root's eyes alone, has a line such as `MINIMISTRAL_API_KEY=a-long-random-text`.
#
# ## Further: the shapes, and the errors
#
# What the core has shown as JSON is made by one class. And every error on its way to a client goes through
# one function: of its own faults the server tells nothing but that there was one.

# %%
# minimistral/api.py
# show: Shape

# %%
# minimistral/api.py
# show: Refused, as_refusal

# %% [markdown]
# ## Further: keys, and pages that should not ask
#
# At loopback no key is needed, for other machines can't get there. But web pages can try: a page that you
# visit may send requests to 127.0.0.1 from your own browser. So the server looks at two lines that browsers
# always send: under which name it was called, and from which page.

# %%
with LocalServer(model, tokenizer, name=NAME, api_key="a-long-random-text",
                 max_length=256, compile=False, progress=False) as locked:
    callers = {"no key": {}, "a wrong key": {"Authorization": "Bearer guess"},
               "a page from elsewhere": {"Origin": "https://shop.example"},
               "the right key": {"Authorization": "Bearer a-long-random-text"}}
    for who, headers in callers.items():
        status, _ = ch14.post(locked.address, "/v1/chat/completions",
                              {**request, "max_tokens": 1}, **headers)
        print(f"{who:22} {status}")

# %% [markdown]
# The key comes from the environment variable `MINIMISTRAL_API_KEY`, not from the command line, where every
# user of the machine could read it. And it travels in the clear: between machines, put a server with TLS in
# front.
