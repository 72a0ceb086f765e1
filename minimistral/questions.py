"""Questions about the tales, each with the one right answer.

A tale is told up to its last sentence, and something is asked that its listener can
know: who has a thing, where a thing or a person is, or what the tale has not told.
The tales' own program knows the answers, so they can be scored exactly. They are
made of words that tales have: a base that never wrote a token does not learn it
easily.

Two requests have more than one right answer: to end the tale, and to retell it in
another language. The tales' grammar decides which answers are right.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from minimistral.tales import Tale, parse_tale, sample_tale
from minimistral.tales_plot import PRONOUN
from minimistral.tales_text import SLOT, forms, render, write
from minimistral.tales_words import GENDER, NOUNS

ASK = {                       # kind of question: its words in each language
    "who": {"en": "Who has {thing}?", "fr": "Qui a {thing} ?",
            "de": "Wer hat {thing}?", "es": "¿Quién tiene {thing}?",
            "it": "Chi ha {thing}?"},
    "where": {"en": "Where is {it}?", "fr": "Où est {it} ?", "de": "Wo ist {it}?",
              "es": "¿Dónde está {it}?", "it": "Dov'è {it}?"},
    "end": {"en": "In the end?", "fr": "À la fin ?", "de": "Am Ende?",
            "es": "¿Al final?", "it": "Alla fine?"},
    "retell": {"en": "In English?", "fr": "En français ?"},    # the language wanted
}
SAY = {                       # the words of the answers
    "held": {"en": "{who} has {thing:acc}.", "fr": "{who} a {thing:acc}.",
             "de": "{who} hat {thing:acc}.", "es": "{who} tiene {thing:acc}.",
             "it": "{who} ha {thing:acc}."},
    "with": {"en": "{who} was {place:in} with {thing:dat}.",
             "fr": "{who} était {place:in} avec {thing:dat}.",
             "de": "{who} war mit {thing:dat} {place:in}.",
             "es": "{who} estaba {place:in} con {thing:dat}.",
             "it": "{who} era {place:in} con {thing:dat}."},
}
NOT_TOLD = "..."              # the tales have no word for "not"
KINDS = ("who", "where", "person", "untold")
REQUESTS = ("end", "retell")


@dataclass(frozen=True)
class Question:
    """What is said to the assistant, and what it should say.

    kind: one of KINDS or REQUESTS. told: the tale, but for its last sentence.
    answer: the right one; of a request, one of them.
    """
    kind: str
    language: str
    asked: str
    answer: str
    told: str

    @property
    def prompt(self) -> str:
        return f"{self.told}\n{self.asked}"

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [*self.messages, {"role": "assistant", "content": self.answer}]


def ask(rng: Random, kind: str | None = None, language: str | None = None
        ) -> Question:
    """Draw a tale and a question about it.

    kind: one of KINDS or REQUESTS, or None for any of KINDS; language: en, fr, de,
    es, it, or None for the tales' own mixture. Raises ValueError for others.
    """
    if kind not in (None, *TELL):
        raise ValueError(f"kind {kind!r}: choose one of {', '.join(TELL)}")
    kind = kind or rng.choice(KINDS)
    return ask_about(sample_tale(rng, language), kind, rng)


def ask_about(tale: Tale, kind: str, rng: Random) -> Question:
    """A question of this kind about a tale, told but for its last sentence."""
    asked, answer = TELL[kind](rng, tale)
    told = write(tale.language, list(tale.events[:-1]))
    return Question(kind, tale.language, asked, answer, told)


def interview(rng: Random, n: int, language: str | None = None,
              kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Up to n different questions of these kinds about one tale."""
    tale = sample_tale(rng, language)
    drawn = [ask_about(tale, rng.choice(kinds), rng) for _ in range(n)]
    return list({question.asked: question for question in drawn}.values())


def as_conversation(questions: list[Question]) -> list[dict[str, str]]:
    """Questions about one tale, with their answers; the tale is told once."""
    messages = [message for question in questions for message in (
        {"role": "user", "content": question.asked},
        {"role": "assistant", "content": question.answer})]
    return [*questions[0].messages, *messages[1:]]


def ask_who(rng: Random, tale) -> tuple[str, str]:
    """Who has a thing of the tale? If nobody has it: where does it lie?"""
    thing = rng.choice(sorted(tale.holders))
    asked = ASK["who"][tale.language].format(
        thing=forms(tale.language, "thing", "acc")[thing])
    holder = tale.holders[thing]
    if holder in GENDER:
        return asked, say(tale.language, "held", who=holder, thing=thing)
    return asked, lying(tale.language, thing, holder)


def ask_where(rng: Random, tale) -> tuple[str, str]:
    """Where is a thing? Where it lies, or where its holder is: two steps."""
    thing = rng.choice(sorted(tale.holders))
    holder = tale.holders[thing]
    asked = ASK["where"][tale.language].format(
        it=forms(tale.language, "thing", "the")[thing])
    if holder in GENDER:
        return asked, say(tale.language, "with", who=holder, thing=thing,
                          place=tale.places[holder])
    return asked, lying(tale.language, thing, holder)


def ask_person(rng: Random, tale) -> tuple[str, str]:
    """Where is somebody of the tale?"""
    who = rng.choice(sorted(tale.places))
    asked = ASK["where"][tale.language].format(it=who)
    event = {"kind": "arrive", "variant": 0, "who": who, "place": tale.places[who]}
    return asked, render(tale.language, event)


def lying(language: str, thing: str, place: str) -> str:
    """ "The hat is still in the mill.", as a tale may end."""
    event = {"kind": "end_lying", "variant": 0, "thing": thing, "place": place}
    return render(language, event)


def say(language: str, answer: str, **values: str) -> str:
    """The words of an answer, each of its slots in the form that it asks for."""
    def word(match) -> str:
        slot, form = match.groups()
        return forms(language, slot, form or "")[values[slot]]

    return SLOT.sub(word, SAY[answer][language])


def ask_untold(rng: Random, tale) -> tuple[str, str]:
    """One of the questions above, about a thing or somebody not in the tale."""
    thing = rng.choice([noun for noun in NOUNS if noun not in tale.holders])
    who = rng.choice([name for name in GENDER if name not in tale.places])
    the, acc = (forms(tale.language, "thing", form)[thing]
                for form in ("the", "acc"))
    asked = rng.choice([ASK["who"][tale.language].format(thing=acc),
                        ASK["where"][tale.language].format(it=the),
                        ASK["where"][tale.language].format(it=who)])
    return asked, NOT_TOLD


def ask_end(rng: Random, tale) -> tuple[str, str]:
    """How does the tale end?"""
    return ASK["end"][tale.language], render(tale.language, tale.events[-1])


def ask_retell(rng: Random, tale) -> tuple[str, str]:
    """What was told, sentence by sentence, in another language."""
    other = retold(tale.language)
    return ASK["retell"][other], write(other, list(tale.events[:-1]))


def retold(language: str) -> str:
    """The language in which a tale is retold: French; a French one in English."""
    return "en" if language == "fr" else "fr"


TELL = {"who": ask_who, "where": ask_where, "person": ask_person,
        "untold": ask_untold, "end": ask_end, "retell": ask_retell}


def ask_many(n: int, seed: int = 0, **choice) -> list[Question]:
    """n different questions. Of two seeds the questions are drawn apart; whether a
    tale of one is among those of the other, `shared` tells."""
    rng, found = Random(seed), {}
    while len(found) < n:
        question = ask(rng, **choice)
        found[question.prompt] = question
    return list(found.values())


def shared(some: Iterable[Question], others: Iterable[Question]) -> list[Question]:
    """The questions of `some` whose tale is among the others' tales."""
    seen = {question.told for question in others}
    return [question for question in some if question.told in seen]


def is_right(question: Question, answer: str) -> bool:
    """Exact match: the answer, and not a letter more. To a request every answer is
    right that makes the tale end well, or tells the same in the other language.
    """
    if question.kind == "end":
        return parse_tale(f"{question.told} {answer}").consistent
    if question.kind == "retell":
        said = list(parse_tale(answer).events)
        return (facts(said) == facts(parse_tale(question.told).events)
                and answer == write(retold(question.language), said))
    return answer == question.answer


def facts(events: Iterable[dict]) -> list[dict]:
    """What a tale says, in whatever language and words. But where it says "she" and
    where a name must agree: it isn't everywhere clear whom "she" would mean."""
    return [{**event, "language": None,
             "variant": event["variant"] == PRONOUN.get(event["kind"])}
            for event in events]
