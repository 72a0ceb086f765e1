"""What may happen in a tale, how likely it is, and what the tale must remember.

Every event is told by a function that asks a chooser for each decision, (slot, odds), and
then changes the world accordingly. What memory decides comes with a single choice, or with
none at all if the event cannot happen; `tales.py` has the choosers.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

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
