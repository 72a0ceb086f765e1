"""Chapter 0, start here: the first answer, which is wrong on purpose, and a first exercise."""

from __future__ import annotations

import math
import statistics
import sys
from random import Random

import numpy as np
import torch

from minimistral.tales import parse_tale, sample_tale, score_tales

from ..exercises import Exercise, Hint, Misconception

# ---------------------------------------------------------------- bug: share_of_tales


def seven_texts():
    true = [sample_tale(Random(seed), language).text for seed, language in
            ((1, "en"), (2, "fr"), (3, "de"))]
    lie = sample_tale(Random(4), "es", contradictions=1.0).text
    cut = true[0][: true[0].rindex(". ") + 3]
    return ([true[0], cut, true[1], lie, "The golden key", true[2], true[0]],)


def five_tales():
    return ([sample_tale(Random(seed)).text for seed in range(5, 10)],)


def three_texts_and_no_tale():
    return (["", "Anna found a golden key.", "La clé dorée\nAnna a la clé."],)


def _ok(texts):
    return [parse_tale(text).ok for text in texts]


def _share_by_loop(texts):
    count = 0
    for text in texts:
        if parse_tale(text).ok:
            count += 1
    return count / len(texts)


SHARE_OF_TALES = Exercise(
    name="share_of_tales", chapter=0, kind="bug", entry="share_of_tales",
    title="The share of tales", difficulty="easy", importance="essential", minutes=2,
    reference=lambda texts: sum(_ok(texts)) / len(texts),
    fixtures=(seven_texts, five_tales, three_texts_and_no_tale),
    equivalents={
        "loop": _share_by_loop,
        "mean": lambda texts: statistics.fmean(_ok(texts)),
        "NumPy": lambda texts: np.mean(_ok(texts)),
        "filtered list": lambda texts: len([t for t in texts if parse_tale(t).ok]) / len(texts),
        "the library's": lambda texts: score_tales(texts)[0],
        "one minus the rest": lambda texts: 1 - sum(not ok for ok in _ok(texts)) / len(texts),
    },
    misconceptions=(
        Misconception("unchanged", lambda texts: sum(_ok(texts)) // len(texts),
            "The result is a whole number, and a share below 1 becomes 0. This division throws "
            "away what stands behind the point. Look at the division sign."),
        Misconception("count instead of share", lambda texts: sum(_ok(texts)),
            "You returned how many texts are tales. A share lies between 0 and 1: divide by "
            "the number of texts."),
        Misconception("percent", lambda texts: 100 * sum(_ok(texts)) / len(texts),
            "You returned percent. Here a share lies between 0 and 1, so nothing is "
            "multiplied by a hundred.", also=[lambda texts: 100 * sum(_ok(texts)) // len(texts)]),
        Misconception("turned round", lambda texts: len(texts) / max(1, sum(_ok(texts))),
            "The division is turned round: the whole was divided by the part. A share is never above 1.",
            also=[lambda texts: len(texts) / sum(_ok(texts))]),
        Misconception("those that are none", lambda texts: 1 - sum(_ok(texts)) / len(texts),
            "You counted the texts that are no tales. The score is the share of those that are."),
        Misconception("only what adds up", lambda texts: score_tales(texts)[1],
            "Too few: you counted only tales that add up. A tale with a lie in it is a tale "
            "for the grammar."),
        Misconception("every answer counts",
            lambda texts: sum(bool(parse_tale(text)) for text in texts) / len(texts),
            "Every text counts as a tale. The parser always answers with an object, and an "
            "object counts as true. Ask for its field that says ok."),
        Misconception("rounded", lambda texts: round(sum(_ok(texts)) / len(texts), 2),
            "The share is rounded. Keep the number as it is; it is rounded when it is shown "
            "to somebody.", also=[lambda texts: round(sum(_ok(texts)) / len(texts), 1)]),
        Misconception("rounded to a whole number", lambda texts: round(sum(_ok(texts)) / len(texts)),
            "A share is rarely a whole number, and yours always is: it is rounded to 0 or 1. Keep what "
            "stands behind the point."),
        Misconception("divided by forty", lambda texts: sum(_ok(texts)) / 40,
            "Right for the forty texts of this page only. The function must work for any "
            "number of texts: divide by how many it was given."),
        Misconception("remainder", lambda texts: sum(_ok(texts)) % len(texts),
            "The percent sign does not make percent: in Python it gives the remainder of a "
            "division. A share needs the plain division."),
    ),
    hints=(
        Hint("The result is 0, although nearly all are tales",
             "Say 38 of 40 texts are tales. What does Python make of 38 // 40?"),
        Hint("What is the difference between / and //",
             "7 // 2 is 3: what stands behind the point is thrown away. 7 / 2 is 3.5."),
        Hint("I am not sure what is divided by what",
             "The number of texts whose parse is ok, over the number of all texts, with one "
             "slash: 4 of 7 give 0.5714."),
    ),
    praise="You repaired a score that every chapter up to 9 uses.",
)


# ---------------------------------------------------------------- exercise: nats_per_byte


def a_french_title():
    return [0.4, 0.03, 0.9, 0.25, 1.0], "La clé dorée"


def two_german_lines():
    return [0.1, 0.5, 0.02, 0.7, 0.6, 0.05, 0.99], "Der grüne Schlüssel\nEs regnete über Nacht."


def a_long_tale():
    chance = Random(0)
    return [0.2 + 0.6 * chance.random() for _ in range(3_000)], "À la fin, Emma gagna. " * 500


def _sum_of_logs(probabilities, log=math.log):
    return sum(log(p) for p in probabilities)


def _nats_by_loop(probabilities, text):
    total = 0.0
    for p in probabilities:
        total -= math.log(p)
    return total / len(text.encode("utf-8"))


NATS_PER_BYTE = Exercise(
    name="nats_per_byte", chapter=0, kind="function", entry="nats_per_byte",
    title="The loss of a text", difficulty="easy", importance="useful", minutes=5,
    reference=lambda probabilities, text: -_sum_of_logs(probabilities) / len(text.encode()),
    fixtures=(a_french_title, two_german_lines, a_long_tale),
    equivalents={
        "loop": _nats_by_loop,
        "one over p": lambda p, text: _sum_of_logs([1 / x for x in p]) / len(bytes(text, "utf-8")),
        "NumPy": lambda p, text: -np.log(p).sum() / len(text.encode()),
        "PyTorch": lambda p, text: -torch.tensor(p).double().log().sum() / len(text.encode()),
        "mean times tokens": lambda p, text:
            len(p) * -statistics.fmean(map(math.log, p)) / len(text.encode()),
    },
    misconceptions=(
        Misconception("per character", lambda p, text: -_sum_of_logs(p) / len(text),
            "Too large where letters have accents: you divided by characters. In UTF-8 an "
            "accented letter takes two bytes, and bytes are counted here."),
        Misconception("per token", lambda p, text: -_sum_of_logs(p) / len(p),
            "You divided by the number of tokens. Another tokenizer cuts the same text into "
            "other pieces; bytes stay the same."),
        Misconception("per word", lambda p, text: -_sum_of_logs(p) / len(text.split()),
            "You divided by the number of words. Here the bytes of the text are counted."),
        Misconception("Python's size of the text",
            lambda p, text: -_sum_of_logs(p) / sys.getsizeof(text),
            "That is what Python needs to keep the text, its own notes about it included. Count the "
            "bytes of the text in UTF-8."),
        Misconception("whole division", lambda p, text: -_sum_of_logs(p) // len(text.encode()),
            "The result is a whole number: two slashes throw away what stands behind the point."),
        Misconception("rounded", lambda p, text: round(-_sum_of_logs(p) / len(text.encode()), 2),
            "The loss is rounded. Return the number as it is; the example shows two digits only to be "
            "short."),
        Misconception("no minus", lambda p, text: _sum_of_logs(p) / len(text.encode()),
            "The loss is below zero. The logarithm of a probability is never above zero; the "
            "surprise is that number with the other sign."),
        Misconception("bits", lambda p, text: -_sum_of_logs(p, math.log2) / len(text.encode()),
            "These are bits: the logarithm was taken to the base 2. A nat belongs to the "
            "natural logarithm."),
        Misconception("base ten", lambda p, text: -_sum_of_logs(p, math.log10) / len(text.encode()),
            "Too small by a factor of 2.3: the logarithm was taken to the base 10. A nat belongs to the "
            "natural one."),
        Misconception("not divided", lambda p, text: -_sum_of_logs(p),
            "This is the surprise of the whole text. Long texts surprise more; divide by the "
            "number of bytes."),
        Misconception("product first",
            lambda p, text: -math.log(math.prod(p)) / len(text.encode()),
            "The product of thousands of probabilities is too small for any float and becomes "
            "0, which has no logarithm. Take logarithms first, then add them."),
        Misconception("logarithm of the mean",
            lambda p, text: -math.log(sum(p) / len(p)) / len(text.encode()),
            "You took one logarithm, of all probabilities together. Each token surprises by "
            "itself: take each logarithm first, then add.",
            also=[lambda p, text: -math.log(sum(p)) / len(text.encode())]),
        Misconception("no logarithm", lambda p, text: sum(p) / len(text.encode()),
            "The probabilities themselves were added. The surprise at a token is minus the logarithm "
            "of its probability.",
            also=[lambda p, text: -sum(p) / len(text.encode()),
                  lambda p, text: sum(1 - x for x in p) / len(text.encode())]),
        Misconception("logarithm of the rest",
            lambda p, text: -_sum_of_logs([1 - x for x in p]) / len(text.encode()),
            "You took the logarithm of the other tokens' share. The token that came has the "
            "probability p, and 1 for a sure one."),
        Misconception("entropy",
            lambda p, text: -sum(x * math.log(x) for x in p) / len(text.encode()),
            "Each surprise was weighed by its probability. That averages over what might come; here "
            "each token did come, so it counts whole."),
        Misconception("one token only", lambda p, text: -math.log(p[-1]) / len(text.encode()),
            "Only one token was counted. Add up the surprises at all of them.",
            also=[lambda p, text: -math.log(p[0]) / len(text.encode())]),
        Misconception("perplexity",
            lambda p, text: math.exp(-_sum_of_logs(p) / len(text.encode())),
            "This is the exponential of the loss, which is called perplexity. The loss itself "
            "is wanted; leave the last step out."),
        Misconception("divided twice",
            lambda p, text: -_sum_of_logs(p) / len(p) / len(text.encode()),
            "Much too small: divided by the tokens and by the bytes as well. Add up over the "
            "tokens, then divide by the bytes alone."),
    ),
    hints=(
        Hint("I do not know where to start",
             "A token of probability 1 surprises by 0, one of 0.5 by 0.69. Which function of "
             "Python's math gives these numbers, up to the sign?"),
        Hint("It is refused for a text with accents",
             "“clé” has 3 characters and 4 bytes. text.encode() gives the bytes, and "
             "len counts them."),
        Hint("I cannot put it together",
             "Add up math.log(p) for all p, turn the sign, divide by the number of bytes."),
    ),
    praise="This is the number that every training in this course makes smaller.",
)

EXERCISES = [SHARE_OF_TALES, NATS_PER_BYTE]
