"""Tales whose probability is known: short stories in five languages, with memory.

A tale is drawn by one program: `tell` asks a chooser for every decision and
remembers who is where and who holds what. With a chooser that draws, it invents a
tale; with one that reads, it follows a given text and adds up -ln p. No text has
two derivations, because no sentence is the beginning of another: the sum is exact.

The events are in tales_plot.py, the sentences in tales_text.py and tales_words.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from minimistral.tales_plot import (
    CLEAR, ENDINGS, LANGUAGES, PLACES, TELLERS, Chooser, Odds, World, evenly, kinds,
    known, variant_odds)
from minimistral.tales_text import read, write


def tell(choose: Chooser) -> World:
    """The program of every tale; returns what is true at its end."""
    world = World()
    while not world.ended:
        kind = choose("kind", kinds(world))
        TELLERS[kind](world, choose)
        choose("variant", variant_odds(kind, world.last == world.subject))
        world.before = kind
        world.subject = world.last if kind in CLEAR else None
        world.told += 1
    return world


class Writer:
    """A chooser that draws; its decisions, sentence by sentence, are a tale.

    `surprise` is -ln p of the decisions so far, in nats. With `lie` the last
    sentence contradicts what the tale has told.
    """

    def __init__(self, rng: Random, language: str | None = None, lie: bool = False):
        self.rng, self.language, self.lie = rng, language, lie
        self.sentences: list[dict] = []
        self.surprise = 0.0

    def __call__(self, slot: str, choices: Odds) -> object:
        if slot == "language" and self.language:
            choices = known(self.language)
        if slot == "kind":
            self.sentences.append({})
        sentence = self.sentences[-1]
        if self.lie and slot in ("who", "place") and sentence["kind"] in ENDINGS:
            choices, self.lie = evenly(self.untrue(slot, choices)), False
        sentence[slot] = value = self.draw(choices)
        self.surprise -= math.log(choices[value])
        return value

    def draw(self, choices: Odds) -> object:
        left = self.rng.random() if len(choices) > 1 else 0.0
        for value, p in choices.items():
            left -= p
            if left < 0:
                break
        return value

    def untrue(self, slot: str, truth: Odds) -> list[str]:
        """Somebody else of this tale, or some other place."""
        cast = [s["who"] for s in self.sentences if s["kind"] in ("find", "arrive")]
        return [value for value in (cast if slot == "who" else PLACES)
                if value not in truth]


class Surveyor(Writer):
    """A writer that adds up how uncertain each decision was: `entropy`, in nats."""

    entropy = 0.0

    def draw(self, choices: Odds) -> object:
        self.entropy -= math.fsum(p * math.log(p) for p in choices.values())
        return super().draw(choices)


@dataclass(frozen=True)
class Contradiction:
    """A sentence that is good grammar but cannot be true in its tale."""

    sentence: int  # 0 is the title
    slot: str
    said: object
    possible: tuple  # what memory allowed


class Reader:
    """A chooser that follows given decisions, and notes where memory is violated.

    `surprise` becomes infinite at the first decision that has no probability.
    """

    def __init__(self, sentences: list[dict]):
        self.sentences, self.at = sentences, -1
        self.surprise = 0.0
        self.contradictions: list[Contradiction] = []

    def __call__(self, slot: str, choices: Odds) -> object:
        self.at += slot == "kind"
        value = self.sentences[self.at][slot]
        p = choices.get(value, 0.0)
        self.surprise -= math.log(p) if p else -math.inf
        told = {one.sentence for one in self.contradictions}
        if not p and slot != "kind" and self.at not in told:
            self.contradictions.append(
                Contradiction(self.at, slot, value, tuple(choices)))
        return value


@dataclass(frozen=True)
class Parse:
    """What a text says. `ok`: the grammar accepts it, true or not.

    `surprise` is -ln p(text) in nats, end included; infinite unless `consistent`.
    """

    ok: bool
    error_at: int | None = None  # the character at which it stops being a tale
    language: str | None = None
    events: tuple[dict, ...] = ()
    contradictions: tuple[Contradiction, ...] = ()
    surprise: float = math.inf
    holders: dict[str, str] = field(default_factory=dict)  # thing -> name or place
    places: dict[str, str] = field(default_factory=dict)  # name -> place

    @property
    def consistent(self) -> bool:
        return self.ok and not self.contradictions


def parse_tale(text: str) -> Parse:
    """The one derivation that a text can have, and what in it cannot be true."""
    sentences, error_at = read(text)
    if error_at is not None:
        return Parse(False, error_at, events=tuple(sentences))
    reader = Reader(sentences)
    world = tell(reader)
    return Parse(True, None, world.language, tuple(sentences),
                 tuple(reader.contradictions), reader.surprise,
                 dict(world.where), dict(world.cast))


def log_probability(text: str) -> float:
    """ln p(text) in nats, the end of the tale included; -inf if it is no tale."""
    return -parse_tale(text).surprise


@dataclass(frozen=True)
class Tale:
    """A tale, its decisions sentence by sentence, and what is true at its end."""

    text: str
    language: str
    events: tuple[dict, ...]
    holders: dict[str, str]  # thing -> who holds it, or the place where it lies
    places: dict[str, str]  # name -> where they are


def sample_tale(rng: Random, language: str | None = None,
                contradictions: float = 0.0) -> Tale:
    """Draw one tale; with probability `contradictions` its last sentence lies."""
    if language not in (None, *LANGUAGES):
        raise ValueError(
            f"language {language!r}: choose {', '.join(LANGUAGES)}, or None for a "
            "mixture; is it a name instead of a code?")
    if not 0 <= contradictions <= 1:
        raise ValueError(f"contradictions {contradictions}: a share from 0 to 1; "
                         "did you mean per cent?")
    lie = contradictions > 0 and rng.random() < contradictions
    writer = Writer(rng, language, lie)
    world = tell(writer)
    return Tale(write(world.language, writer.sentences), world.language,
                tuple(writer.sentences), dict(world.where), dict(world.cast))


def source_entropy(n: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The entropy of the source in nats per tale: the mean over n tales, and its
    standard error. What is averaged is not -ln p of each tale but the exact entropy
    of every decision on its way: the same mean, a smaller error.
    """
    rng, total, squares = Random(seed), 0.0, 0.0
    for _ in range(n):
        surveyor = Surveyor(rng)
        tell(surveyor)
        total += surveyor.entropy
        squares += surveyor.entropy ** 2
    mean = total / n
    return mean, math.sqrt((squares / n - mean ** 2) / (n - 1))


def score_tales(texts: Iterable[str]) -> tuple[float, float]:
    """The share of texts that parse, and the share that are consistent as well."""
    parses = [parse_tale(text) for text in texts]
    return (sum(parse.ok for parse in parses) / len(parses),
            sum(parse.consistent for parse in parses) / len(parses))
