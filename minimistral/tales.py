"""Tales whose probability is known: short stories in five languages, with memory.

A tale is drawn by one program: `tell` asks a chooser for every decision and remembers
who is where and who holds what. With a chooser that draws, it invents a tale; with one
that reads, it follows a given text and adds up -ln p. No text has two derivations,
because no sentence of a language is the beginning of another one, so the sum is exact.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from random import Random

from minimistral import tales_words as words

Odds = dict  # what may be chosen, with its probability; the values add up to 1
Chooser = Callable[[str, Odds], object]  # (slot, odds) -> one of the odds' keys


def odds(weights: dict) -> Odds:
    """Weights made probabilities; a weight of 0 is no choice at all."""
    total = math.fsum(weights.values())  # sum() rounds by the Python version
    return {value: w / total for value, w in weights.items() if w}


def evenly(values: Iterable) -> Odds:
    """Each of the values with the same probability."""
    values = list(values)
    return {value: 1 / len(values) for value in values}


def fading(values: Iterable) -> dict:
    """Weights 1, 1/2, 1/3 ...: the first values are the common ones, as in any text."""
    return {value: 1 / rank for rank, value in enumerate(values, start=1)}


LANGUAGES = odds({"en": 40, "fr": 15, "de": 15, "es": 15, "it": 15})
NAMES = odds({name: 1 / (i + 3) for i, name in enumerate(words.GENDER)})
PLACES = odds({place: 1 / (i + 3) for i, place in enumerate(words.PLACES)})


def new_things() -> Odds:
    """Noun and look together: every noun has its own favourite looks."""
    weights, looks = {}, list(words.LOOKS)
    for i, noun in enumerate(words.NOUNS):
        turned = looks[i % len(looks):] + looks[:i % len(looks)]
        for look, weight in odds(fading(turned)).items():
            weights[noun, look] = weight / (i + 3)
    return odds(weights)


THINGS = new_things()


@cache
def names_without(used: frozenset[str]) -> Odds:
    return odds({name: p for name, p in NAMES.items() if name not in used})


@cache
def things_without(used: frozenset[str]) -> Odds:
    return odds({new: p for new, p in THINGS.items() if new[0] not in used})


@cache
def places_without(here: str) -> Odds:
    return odds({place: p for place, p in PLACES.items() if place != here})


@dataclass
class World:
    """What a tale remembers."""

    language: str = "en"
    cast: dict[str, str] = field(default_factory=dict)  # name -> the place they are at
    where: dict[str, str] = field(default_factory=dict)  # thing -> its holder or place
    looks: dict[str, str] = field(default_factory=dict)  # thing -> how it looks
    last: str = ""  # the character mentioned last
    subject: str | None = None  # whom "he" or "she" would mean now
    before: str = ""  # the kind of the sentence before
    told: int = 0  # sentences, the title included
    ended: bool = False

    def held(self) -> list[str]:
        return [thing for thing, at in self.where.items() if at in words.GENDER]

    def lying(self) -> list[str]:
        return [thing for thing, at in self.where.items() if at not in words.GENDER]

    def at(self, place: str | None) -> list[str]:
        return [name for name in self.cast if self.cast[name] == place]

    def elsewhere(self, place: str | None) -> list[str]:
        return [name for name in self.cast if self.cast[name] != place]

    def others(self, *names: str) -> list[str]:
        return [name for name in self.cast if name not in names]

    def company(self, name: str) -> list[str]:
        here = self.at(self.cast.get(name))
        return [other for other in here if other != name]

    def place_of(self, thing: str) -> str | None:
        at = self.where.get(thing)
        return self.cast.get(at, at)

    def givable(self) -> list[str]:
        return [thing for thing in self.held() if self.company(self.where[thing])]

    def takeable(self) -> list[str]:
        return [thing for thing in self.lying() if self.at(self.where[thing])]

    def fetchable(self) -> list[str]:
        return [thing for thing in self.lying() if self.elsewhere(self.where[thing])]

    def travellers(self) -> list[str]:
        """Those who have somebody to meet at another place."""
        return [name for name in self.cast if self.elsewhere(self.cast[name])]

    def strangers(self) -> Odds:
        """Names that the tale has not used yet."""
        return names_without(frozenset(self.cast))

    def unseen(self) -> Odds:
        """Things that the tale has not used yet."""
        return things_without(frozenset(self.where))


def known(value: object) -> Odds:
    """The one value that memory allows; nothing, if there is none."""
    return {} if value is None else {value: 1.0}


def title(world: World, choose: Chooser) -> None:
    """The title names the thing that the tale is about, in the tale's language."""
    world.language = choose("language", LANGUAGES)
    noun, look = choose("new", THINGS)
    world.looks[noun] = look


def find(world: World, choose: Chooser) -> None:
    """Somebody finds the thing that the title names."""
    (promised,) = world.looks.items()
    noun, look = choose("new", known(promised))
    world.looks[noun] = look
    who = choose("who", NAMES)
    world.cast[who] = choose("place", PLACES)
    world.where[noun] = world.last = who


def arrive(world: World, choose: Chooser) -> None:
    """Somebody new enters the tale."""
    who = choose("who", world.strangers())
    world.cast[who] = choose("place", PLACES)
    world.last = who


def go(world: World, choose: Chooser) -> None:
    who = choose("who", odds({n: 3 if n == world.subject else 1 for n in world.cast}))
    world.cast[who] = choose("place", places_without(world.cast.get(who)))
    world.last = who


def meet(world: World, choose: Chooser) -> None:
    """Somebody goes to where somebody else is: the place is a matter of memory."""
    who = choose("who", evenly(world.travellers()))
    whom = choose("whom", evenly(world.elsewhere(world.cast.get(who))))
    world.cast[who] = choose("place", known(world.cast.get(whom)))
    world.last = who


def give(world: World, choose: Chooser) -> None:
    """Only the holder can give, and only to somebody at the same place."""
    thing = choose("thing", evenly(world.givable()))
    who = choose("who", known(world.where.get(thing)))
    world.where[thing] = world.last = choose("whom", evenly(world.company(who)))


def drop(world: World, choose: Chooser) -> None:
    thing = choose("thing", evenly(world.held()))
    who = choose("who", known(world.where.get(thing)))
    world.where[thing] = choose("place", known(world.cast.get(who)))
    world.last = who


def take(world: World, choose: Chooser) -> None:
    """Somebody takes what lies where they are."""
    thing = choose("thing", evenly(world.takeable()))
    who = choose("who", evenly(world.at(world.where.get(thing))))
    world.where[thing] = world.last = who


def fetch(world: World, choose: Chooser) -> None:
    """Somebody comes from elsewhere and takes what lies there."""
    thing = choose("thing", evenly(world.fetchable()))
    who = choose("who", evenly(world.elsewhere(world.where.get(thing))))
    world.cast[who] = choose("place", known(world.where.get(thing)))
    world.where[thing] = world.last = who


def discover(world: World, choose: Chooser) -> None:
    """Somebody finds one more thing where they are."""
    who = choose("who", evenly(world.cast))
    noun, look = choose("new", world.unseen())
    choose("place", known(world.cast.get(who)))
    world.looks[noun] = look
    world.where[noun] = world.last = who


def ask(world: World, choose: Chooser) -> None:
    thing = choose("thing", evenly(world.held()))
    holder = choose("whom", known(world.where.get(thing)))
    choose("who", evenly(world.others(holder)))
    world.last = holder


def ask_where(world: World, choose: Chooser) -> None:
    thing = choose("thing", evenly(world.lying()))
    who = choose("who", odds({n: RARE if n == world.last else 1 for n in world.cast}))
    world.last = choose("whom", evenly(world.others(who)))
    choose("place", known(world.where.get(thing)))


def seek(world: World, choose: Chooser) -> None:
    who = choose("who", evenly(world.travellers()))
    whom = choose("whom", evenly(world.elsewhere(world.cast.get(who))))
    choose("place", known(world.cast.get(whom)))
    world.last = whom


def mood(world: World, choose: Chooser) -> None:
    """Most often the mood of the one who was mentioned last."""
    likely = {name: 5 if name == world.last else 1 for name in world.cast}
    world.last = choose("who", odds(likely))


def weather(world: World, choose: Chooser) -> None:
    """Nothing that anybody has to remember."""


def end_held(world: World, choose: Chooser) -> None:
    thing = choose("thing", evenly(world.held()))
    choose("who", known(world.where.get(thing)))
    world.ended = True


def end_lying(world: World, choose: Chooser) -> None:
    thing = choose("thing", evenly(world.lying()))
    choose("place", known(world.where.get(thing)))
    world.ended = True


def end_with(world: World, choose: Chooser) -> None:
    """Two steps of memory: where is the one who holds the thing?"""
    thing = choose("thing", evenly(world.held()))
    holder = choose("who", known(world.where.get(thing)))
    choose("place", known(world.cast.get(holder)))
    world.ended = True


def end_both(world: World, choose: Chooser) -> None:
    thing = choose("thing", evenly(world.held()))
    holder = choose("who", known(world.where.get(thing)))
    whom = choose("whom", evenly(world.others(holder)))
    choose("place", known(world.cast.get(whom)))
    world.ended = True


OPENING = ("title", "find", "arrive")
EVENTS = {  # kind: (weight, what must be so in the world, how it is told)
    "arrive": (2, "strangers", arrive),
    "go": (6, "always", go),
    "meet": (8, "apart", meet),
    "give": (12, "givable", give),
    "drop": (4, "held", drop),
    "take": (6, "takeable", take),
    "fetch": (6, "fetchable", fetch),
    "discover": (2, "unseen", discover),
    "ask": (3, "held", ask),
    "ask_where": (4, "lying", ask_where),
    "seek": (2, "apart", seek),
    "mood": (3, "always", mood),
    "weather": (1, "always", weather),
}
ENDINGS = {
    "end_held": (4, "held", end_held),
    "end_lying": (8, "lying", end_lying),
    "end_with": (4, "held", end_with),
    "end_both": (4, "held", end_both),
}
TELLERS = {"title": title, "find": find,
           **{kind: row[2] for kind, row in {**EVENTS, **ENDINGS}.items()}}
END_AFTER = (0, 0.05, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7)  # by the number of events told
RARE = 0.02  # of a kind's weight, where it would be possible but no good style
RARE_AFTER = {
    "give": {"give"}, "drop": {"drop", "take"}, "take": {"drop"}, "fetch": {"drop"},
    "ask": {"ask"}, "ask_where": {"ask_where"}, "seek": {"seek"},
    "mood": {"mood"}, "weather": {"weather"}, "discover": {"discover"},
}


def kinds(world: World) -> Odds:
    """What the next sentence may be about."""
    if world.told < len(OPENING):
        return known(OPENING[world.told])
    rare = set(RARE_AFTER.get(world.before, ()))
    rare |= {"arrive"} if len(world.cast) > 2 else set()
    rare |= {"discover"} if len(world.where) > 1 else set()
    events = min(world.told - len(OPENING), len(END_AFTER) - 1)
    return kind_odds(situation(world), frozenset(rare), END_AFTER[events])


def situation(world: World) -> frozenset[str]:
    """Which of the conditions in EVENTS and ENDINGS hold."""
    at = list(world.cast.values())
    found = {"always"}
    found |= {"apart"} if len(set(at)) > 1 else set()
    found |= {"strangers"} if len(world.cast) < len(NAMES) else set()
    found |= {"unseen"} if len(world.where) < len(words.NOUNS) else set()
    for where in world.where.values():
        if where in words.GENDER:
            alone = at.count(world.cast.get(where)) == 1
            found |= {"held"} if alone else {"held", "givable"}
        else:
            here = at.count(where)
            found |= {"lying"}
            found |= {"takeable"} if here else set()
            found |= {"fetchable"} if here < len(at) else set()
    return frozenset(found)


@cache
def kind_odds(possible: frozenset[str], rare: frozenset[str], end: float) -> Odds:
    """The tale ends with probability `end`; the rest is shared among the events."""
    weights = {kind: row[0] * (RARE if kind in rare else 1)
               for kind, row in EVENTS.items() if row[1] in possible}
    endings = {kind: row[0] for kind, row in ENDINGS.items() if row[1] in possible}
    return {**{kind: p * (1 - end) for kind, p in odds(weights).items()},
            **{kind: p * end for kind, p in odds(endings).items() if end}}


# After one of these a pronoun means the one who did it; after others it would be unclear.
CLEAR = ("find", "arrive", "go", "meet", "drop", "take", "fetch", "discover", "mood")
PRONOUN = {"go": 1, "drop": 1, "mood": 1}  # the variant that says "he" or "she"
VARIANTS = {kind: range(len(texts)) for kind, texts in words.PHRASES["en"].items()}


@cache
def variant_odds(kind: str, same: bool) -> Odds:
    """The ways to tell an event; a pronoun only if its subject is still the `same`."""
    weights = fading(VARIANTS[kind])
    if kind in PRONOUN:
        weights[PRONOUN[kind]] = 2 if same else 0
    return odds(weights)


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

    `surprise` is -ln p of the decisions so far, in nats. With `lie` the last sentence contradicts what the tale has told.
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
    """A writer that also adds up how uncertain each decision was: `entropy`, in nats."""

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


SLOT = re.compile(r"{(\w+):?(\w*)}")


@cache
def forms(language: str, slot: str, form: str) -> dict:
    """The texts of one slot in one form, by value."""
    if slot in ("who", "whom"):
        return {n: words.person_forms(language, n)[form] for n in words.GENDER}
    if slot == "thing":
        return {n: words.thing_forms(language, n)[form] for n in words.NOUNS}
    if slot == "new":
        return {new: words.new_forms(language, *new)[form] for new in THINGS}
    return {p: words.place_forms(language, p)[form] for p in words.PLACES}


@cache
def template(language: str, kind: str, variant: int) -> list:
    """A template in parts: texts, and (slot, its forms by value)."""
    parts = SLOT.split(words.PHRASES[language][kind][variant])
    text, slots, names = parts[0::3], parts[1::3], parts[2::3]
    found = [text[0]]
    for after, slot, form in zip(text[1:], slots, names):
        found += [(slot, forms(language, slot, form)), after]
    return found


def render(language: str, sentence: dict) -> str:
    """The words for the decisions of one sentence."""
    parts = template(language, sentence["kind"], sentence["variant"])
    return "".join(part if isinstance(part, str) else part[1][sentence[part[0]]]
                   for part in parts)


def write(language: str, sentences: list[dict]) -> str:
    """The text of a tale: its title on a line of its own, then everything else."""
    first, *rest = (render(language, sentence) for sentence in sentences)
    return first + "\n" + " ".join(rest)


@cache
def pattern(language: str, kind: str, variant: int) -> tuple[re.Pattern, list]:
    """A regular expression for one template, and what its groups say.

    A form in which values look alike ("sie" for every feminine thing) says nothing.
    """
    expression, says = "", []
    for part in template(language, kind, variant):
        if isinstance(part, str):
            expression += re.escape(part)
            continue
        slot, texts = part
        values = {text: value for value, text in texts.items()}
        expression += "(" + "|".join(map(re.escape, values)) + ")"
        says.append((slot, values if len(values) == len(texts) else {}))
    return re.compile(expression), says


def read_sentence(language: str, kind: str, text: str, start: int, before: dict):
    """The decisions of a sentence of this kind at `start` and where it ends, or None.

    Who a pronoun means is known from the sentence `before`.
    """
    subject = {"who": before["who"]} if before.get("kind") in CLEAR else {}
    for variant in VARIANTS[kind]:
        expression, says = pattern(language, kind, variant)
        if match := expression.match(text, start):
            sentence = {"kind": kind, "variant": variant}
            for (slot, values), said in zip(says, match.groups()):
                if values:
                    sentence.setdefault(slot, values[said])
            if kind in PRONOUN and variant == PRONOUN[kind]:
                sentence |= subject
                if not subject:
                    return None
            if render(language, sentence) == match[0]:  # agreement, repeated names
                return sentence, match.end()
    return None


def read(text: str) -> tuple[list[dict], list[int], int | None]:
    """The sentences of a tale, where each starts, and where it stops being a tale."""
    for language in LANGUAGES:
        if found := read_sentence(language, "title", text, 0, {}):
            break
    else:
        return [], [], 0
    sentences, starts, (sentence, end) = [], [], found
    sentence["language"], start = language, 0
    while True:
        sentences.append(sentence)
        starts.append(start)
        if sentence["kind"] in ENDINGS:
            return sentences, starts, None if end == len(text) else end
        if text[end:end + 1] != ("\n" if start == 0 else " "):
            return sentences, starts, end
        start = end + 1
        told = len(sentences)
        expected = [OPENING[told]] if told < len(OPENING) else [*EVENTS, *ENDINGS]
        found = (read_sentence(language, kind, text, start, sentence) for kind in expected)
        sentence, end = next(filter(None, found), (None, start))
        if sentence is None:
            return sentences, starts, start


@dataclass(frozen=True)
class Parse:
    """What a text says. `ok`: the grammar accepts it, true or not.

    `surprise` is -ln p(text) in nats, its end included; infinite unless `consistent`.
    """

    ok: bool
    error_at: int | None = None  # the character at which it stops being a tale
    language: str | None = None
    events: tuple[dict, ...] = ()
    contradictions: tuple[Contradiction, ...] = ()
    surprise: float = math.inf
    holders: dict[str, str] = field(default_factory=dict)  # thing -> holder or place
    places: dict[str, str] = field(default_factory=dict)  # name -> place

    @property
    def consistent(self) -> bool:
        return self.ok and not self.contradictions


def parse_tale(text: str) -> Parse:
    """Read a tale: the one derivation it can have, and what contradicts its memory."""
    sentences, _, error_at = read(text)
    if error_at is not None:
        return Parse(False, error_at, events=tuple(sentences))
    reader = Reader(sentences)
    world = tell(reader)
    return Parse(True, None, world.language, tuple(sentences),
                 tuple(reader.contradictions), reader.surprise,
                 dict(world.where), dict(world.cast))


def log_probability(text: str) -> float:
    """ln p(text) in nats, the end of the tale included; -inf if it is not a tale."""
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
    """Draw one tale. With probability `contradictions` its last sentence is untrue."""
    if language not in (None, *LANGUAGES):
        raise ValueError(f"language {language!r}: choose one of {', '.join(LANGUAGES)}, "
                         "or None for a mixture; is it a name instead of a code?")
    if not 0 <= contradictions <= 1:
        raise ValueError(f"contradictions {contradictions}: a share from 0 to 1; "
                         "did you mean per cent?")
    lie = contradictions > 0 and rng.random() < contradictions
    writer = Writer(rng, language, lie)
    world = tell(writer)
    return Tale(write(world.language, writer.sentences), world.language,
                tuple(writer.sentences), dict(world.where), dict(world.cast))


def source_entropy(n: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The entropy of the source in nats per tale: its mean over n tales, and the
    standard error of that mean. What is averaged is not -ln p of each tale but the exact
    entropy of every decision on its way: the same mean with a smaller error.
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
