"""The words of the course: one definition each, and the chapter that introduces them.

The terms are those that the chapters' recaps call new. A word that two chapters use for two things has
two entries, told apart in brackets.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from .panel import Panel
from .syllabus import chapter

# term | chapters, the introducing one first | definition
TERMS = """
absmax | 12 | The largest absolute value of a group of weights. Divided by the largest whole number that the bits allow, it gives the group's scale.
acceptance | 11 | In speculative decoding: whether, or how often, the model keeps a token that the draft proposed. It keeps one with probability min(1, p / q), p the model's and q the draft's probability.
active (parameters) | 9 10 | The parameters at work for one token. In a mixture they are fewer than those in memory, because only the chosen experts count.
angle | 3 | By how much a pair of numbers is turned at a position: position times frequency.
attention map | 2 | The weights of one head as a picture: a row for each query, a column for each key. It shows where a head looks, not what it is for.
balance loss | 9 | An extra term of the loss that is smallest when all experts get equally many tokens. It keeps a router from collapsing.
bandwidth | 11 | How many bytes a memory delivers in a second. Writing for one reader is limited by it, because each token reads all active weights.
batch | 11 | Several texts that go through a model together, so that each weight is read once for all of them.
bigram | 1 | A pair of neighbours, and the model made of them: it predicts the next token from the last one alone.
block (of a model) | 4 | One layer of a transformer: a look and a feed-forward, each with a norm before it and a plus sign behind it.
block (of queries) | 8 | Neighbouring queries that look together at the few keys their windows reach, so that work grows with T · W instead of T · T.
byte | 1 | A number from 0 to 255. Every text in a computer is a row of bytes; a letter takes one to four of them.
bytes per token | 7 | What one token leaves in the cache: 2 · layers · key/value heads · head size · bytes of a number.
cache | 6 | The keys and values of all tokens read so far, kept so that they need not be computed again for each new token.
causal | 2 | A query may look at keys that stand at its own position or earlier, never later.
chat format | 13 | How a conversation becomes tokens: which control tokens and blanks stand around questions, answers and instructions.
checkpoint | 10 | A model in files: its weights by name, and the numbers that describe its shape.
chunk | 8 | A piece of a prompt that is read in one go. Any chunk size must give the same logits.
clipping | 5 | Shortening all gradients by one factor when together they are longer than a limit.
collapse | 9 | A router that sends nearly all tokens to a few experts, so that the others never learn.
contamination | 13 | Questions of an examination that were in the training data. The score then measures memory.
continuous batching | 14 | A server's way of writing: texts join and leave the batch between two steps, and nobody waits for the longest text.
core piece | 0 | A part of the model that you write yourself. Once it passes its check, `mine()` runs the shipped model with it.
cross-entropy | 5 | The mean surprise at the right tokens: minus the logarithm of the probability that the model gave each of them.
CUDA graph | 11 | A recorded sequence of a GPU's starts, replayed with one call. It saves the time between kernels.
draft | 11 | The cheap proposer in speculative decoding: a small model, or a look-up in the text so far.
embedding | 14 | A list of numbers that stands for a text (or, inside a model, for a token). Texts of similar use should get similar lists.
expert | 9 | One of several feed-forwards in a mixture layer. A token visits only the few that its router chooses.
feed-forward | 4 | The part of a block that works on each token alone: wider, a gate, and back.
floor | 5 0 | The loss that no model can go below, because the text itself cannot be foreseen any better. For the tales it is known exactly.
forgetting | 13 | What a model could do before fine-tuning and cannot do as well after it.
frequency | 3 | How fast a pair of numbers turns: radians for each token. The first pair is the fastest.
gate | 4 | A factor, computed from the token itself, that lets each hidden number of a feed-forward through or holds it back.
gradient | 5 | For each parameter: how the loss would change if the parameter grew a little.
greedy | 6 | Always taking the likeliest token; the same prompt then always gives the same text.
group (of heads) | 7 | The query heads that share one key/value head; H / K of them.
group (of weights) | 12 | Neighbouring weights of a row that share one scale.
grouped-query | 7 | Attention in which several query heads share one key/value head. It makes the cache H / K times smaller.
head | 2 | One of several looks that a layer does side by side, each with queries, keys and values of its own.
header | 10 | The beginning of a safetensors file: each tensor's name, type, shape and place. It can be read without the weights.
hop | 8 | One layer's step from a token to one at most W - 1 back. Over several layers hops add up to the reach.
instruction data | 13 | Questions with the answers one would like, in the chat format, to learn from.
kernel | 11 12 | A program that a processor or a GPU runs as a whole, such as one matrix product. Starting it costs time, too.
key | 2 | What a token can be found by: the list of numbers that queries are compared with.
key/value head | 7 | A head's keys and values, seen as one unit that several query heads may share.
ladder | 1 0 | The scoreboard of chapters 1 to 9: the same short training for every model, one row each, falling towards the floor.
layout | 10 | How a checkpoint names and orders its tensors. Mistral's files and Hugging Face's hold the same numbers in two layouts.
logit lens | 4 | The final norm and output matrix applied to the stream in the middle of the model, to see what it would say already.
loopback | 14 | A machine's address for itself, 127.0.0.1. What goes there never leaves the machine.
LoRA | 13 | Low-rank adaptation: beside a frozen matrix two narrow ones are trained, whose product is added to it.
loss | 1 5 | The number that training makes smaller: here the mean surprise at the next token, in nats.
merge (of an adapter) | 13 | Adding an adapter's product to the frozen matrix once, so that the model needs no adapter any more.
merge (of tokens) | 1 | Replacing a pair of neighbouring tokens by one new token, everywhere; also the rule that says so.
meta device | 10 | PyTorch's place for tensors with a shape and no numbers. A model of any size can be built there and counted.
multi-query | 7 | Attention in which all query heads share one key/value head.
nat | 5 | The unit of surprise: minus the natural logarithm of a probability. A coin's fall is worth 0.69 nats.
norm | 4 | A step that brings each token's numbers to a common size. RMSNorm divides by the root of their mean square.
outlier | 12 | A weight much larger than its neighbours. It makes their common scale, and so their rounding errors, large.
packing | 12 | Storing two 4-bit numbers in one byte.
pair | 3 | Two neighbouring numbers of a query or key that rotary positions turn together, as an arrow.
parity | 10 | Proof that two programs are the same model: equal logits for equal tokens, up to rounding.
permutation | 10 | A new order of rows. The two layouts order the rows of `wq` and `wk` differently within each head.
platform | 14 | What stands around an assistant for many customers: addresses, keys, limits, bills, and many texts at once.
position | 3 2 | A token's place in its text, counted from 0. Who may look at whom follows from positions alone.
pre-norm | 4 | The norm stands before each part of a block, on the copy that the part reads; the stream itself is not normed.
quantization | 12 | Storing weights as small whole numbers and a scale, in fewer bits.
query | 2 | What a token is looking for: the list of numbers that is compared with every key.
rank (of an adapter) | 13 | The narrow side of LoRA's two matrices. A small rank means few numbers to train.
rank (of a token) | 1 | The place of a merge in the order of learning, and so the token's id. Lower ranks are merged first.
reach | 8 | How far back a token can matter at all: layers times (W - 1). To reach is not yet to use.
residual stream | 4 | The list of numbers that each token carries through the model. Every block adds to it; none replaces it.
ring | 8 | The rolling buffer: a cache of W slots in which each new token takes the place of the one W earlier.
roofline | 11 | The rule that a step takes as long as its bytes or its operations, whichever needs more time.
rotary | 3 | Positions by turning: queries and keys are turned by an angle that grows with the position, so that scores depend on the distance.
router | 9 | The small matrix that gives each token a score for each expert.
scale | 12 | The factor that turns stored whole numbers back into weights.
score | 2 | How well a key fits a query: the sum of the products of their numbers, divided by the root of the head size.
seed | 6 | The number that a source of chance starts from. The same seed gives the same draws.
server-sent event | 14 | A line `data: ...` and an empty line behind it, sent over an open connection: a piece of an answer as soon as it is written.
shots | 13 | Solved examples put before a question. Zero shots: none.
slot | 8 | A place in the ring: position mod W.
speculative decoding | 11 | A cheap draft proposes several tokens; the model checks all of them in one step and keeps those that its own distribution allows.
stop sequence | 14 | A text at which writing ends; it is not shown itself.
stop token | 6 | A token that ends the text when it is drawn.
tail | 6 | The many tokens with a small probability each. Drawn often enough, one of them ruins a long text.
temperature | 6 0 | The number by which logits are divided before a draw. Below 1 the likely tokens become likelier still; above 1 the unlikely ones gain.
theta | 3 | The base of the frequencies of rotary positions. A larger theta makes the slow pairs slower.
token | 1 0 | A piece of text with a number, the unit that a model reads and writes.
top-k (of experts) | 9 | Sending a token to the k experts with the highest scores.
top-k (of tokens) | 6 | Drawing from the k likeliest tokens only.
top-p | 6 | Drawing from the smallest set of likeliest tokens that holds the share p of the probability.
total | 10 | All parameters that are stored, whether or not they are at work for a token.
turn | 14 | One question and its answer in a conversation.
usage | 14 | The count of tokens read and written that a service reports with an answer, and bills.
UTF-8 | 1 | The rule that writes each letter as one to four bytes.
validation | 5 | Text that training never sees, kept to measure what was learned.
value | 2 | What a token hands over when it is found.
vocabulary | 1 | All tokens that a model knows, each with its id.
warm-up | 5 | The first steps of training, in which the learning rate climbs from nearly nothing.
weight decay | 5 | Making the matrices' weights a little smaller in each step, whatever the gradient says.
weight-only | 12 | Quantization of the weights alone: they are stored in few bits, and computed with in more.
weights | 2 | In a look: the shares that a query gives to the keys, summing to 1. Elsewhere also the numbers of a model.
window | 8 | How many keys a query may see, its own included: those less than W back.
"""


@dataclass(frozen=True)
class Term:
    """One entry. ``word`` is the term without the brackets that tell two senses apart."""

    term: str
    chapters: tuple[int, ...]
    definition: str

    @property
    def word(self) -> str:
        return self.term.partition(" (")[0]

    @property
    def plain(self) -> str:
        """The term without its brackets: "active (parameters)" -> "active parameters"."""
        return self.term.replace("(", "").replace(")", "")


def terms() -> list[Term]:
    """All entries in alphabetical order."""
    rows = (line.split(" | ") for line in TERMS.strip().splitlines())
    found = [Term(term, tuple(map(int, numbers.split())), definition) for term, numbers, definition in rows]
    return sorted(found, key=lambda t: (t.term.casefold(), t.term))


def find(word: str) -> list[Term]:
    """The entries of a word in any case, or else those whose term contains it."""
    asked = word.strip().casefold()
    every = terms()
    return ([t for t in every if asked in (t.word.casefold(), t.plain.casefold())]
            or [t for t in every if asked in t.plain.casefold()])


def glossary(word: str = "") -> Panel:
    """What a word means, or all words. Raises ValueError for a word that is not there."""
    found = find(word) if word else terms()
    if not found:
        known = {t.word.casefold(): t.word for t in terms()}
        close = difflib.get_close_matches(word.casefold(), known, n=3, cutoff=0.6)
        advice = f"did you mean {' or '.join(known[c] for c in close)}?" if close else "try search()"
        raise ValueError(f"{word!r} is not in the glossary; {advice}")
    if word:
        lines = [f"{t.term}: {t.definition} {where(t)}" for t in found]
        return Panel(f"Glossary · {word}", lines)
    return Panel("Glossary", [f"{len(found)} words; glossary(\"cache\") says what one means."],
                 code=", ".join(t.term for t in found))


def where(term: Term) -> str:
    """"(chapter 6, Generation and cache)" """
    first = chapter(term.chapters[0])
    return f"(chapter {first.number}, {first.title})"
