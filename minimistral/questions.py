"""Questions about the tales, each with the one right answer.

A tale is told up to its last sentence, and something is asked that its listener can
know: who has a thing, where a thing or a person is; what the tale has not told; how a
sentence is said in another language; how the tale may end. The tales' own program
knows the answers, so they can be scored exactly.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from minimistral.tales import Tale, parse_tale, sample_tale
from minimistral.tales_plot import LANGUAGES
from minimistral.tales_text import forms, render, write
from minimistral.tales_words import GENDER, NOUNS

ASK = {                       # kind of question: its words in each language
    "who": {"en": "Who has {thing}?", "fr": "Qui a {thing} ?", "de": "Wer hat {thing}?",
            "es": "¿Quién tiene {thing}?", "it": "Chi ha {thing}?"},
    "where": {"en": "Where is {it}?", "fr": "Où est {it} ?", "de": "Wo ist {it}?",
              "es": "¿Dónde está {it}?", "it": "Dov'è {it}?"},
    "retell": {"en": "Tell it in English: ", "fr": "Tell it in French: ",
               "de": "Tell it in German: ", "es": "Tell it in Spanish: ",
               "it": "Tell it in Italian: "},
    "end": {"en": "How does it end?", "fr": "Comment cela finit-il ?",
            "de": "Wie geht es aus?", "es": "¿Cómo termina?", "it": "Come finisce?"},
}
NOBODY = {"en": "Nobody.", "fr": "Personne.", "de": "Niemand.", "es": "Nadie.",
          "it": "Nessuno."}
NOT_TOLD = {"en": "That is not told.", "fr": "Cela n'est pas dit.",
            "de": "Das wird nicht erzählt.", "es": "Eso no se cuenta.",
            "it": "Questo non si dice."}
KINDS = ("who", "where", "person", "untold", "retell", "end")


@dataclass(frozen=True)
class Question:
    """What is said to the assistant, and what it should say.

    kind: one of KINDS. told: the tale so far, empty where the question needs none.
    `end` has many right answers, of which `answer` is one: whatever ends the tale
    without a contradiction.
    """
    kind: str
    language: str
    asked: str
    answer: str
    told: str = ""

    @property
    def prompt(self) -> str:
        return f"{self.told}\n{self.asked}" if self.told else self.asked

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [*self.messages, {"role": "assistant", "content": self.answer}]


def ask(rng: Random, kind: str | None = None, language: str | None = None) -> Question:
    """Draw a tale and a question about it.

    kind: one of KINDS, or None for any; language: en, fr, de, es, it, or None for
    the tales' own mixture. Raises ValueError for others.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"kind {kind!r}: choose one of {', '.join(KINDS)}")
    kind = kind or rng.choice(KINDS)
    while True:
        if question := ask_about(sample_tale(rng, language), kind, rng):
            return question


def ask_about(tale: Tale, kind: str, rng: Random) -> Question | None:
    """A question of this kind about a tale; None if the tale has no answer to one."""
    found = TELL[kind](rng, tale)
    told = write(tale.language, list(tale.events[:-1])) if kind != "retell" else ""
    return Question(kind, tale.language, *found, told) if found else None


def interview(rng: Random, n: int, language: str | None = None) -> list[Question]:
    """Up to n different questions about one tale; how it ends is asked last."""
    tale = sample_tale(rng, language)
    drawn = [ask_about(tale, rng.choice(KINDS), rng) for _ in range(n)]
    different = {question.asked: question for question in drawn if question}
    return sorted(different.values(), key=lambda question: question.kind == "end")


def as_conversation(questions: list[Question]) -> list[dict[str, str]]:
    """Questions about one tale, with their answers; the tale is told once."""
    messages, told = [], False
    for question in questions:
        said = question.asked if told else question.prompt
        told = told or bool(question.told)
        messages += [{"role": "user", "content": said},
                     {"role": "assistant", "content": question.answer}]
    return messages


def ask_who(rng: Random, tale) -> tuple[str, str]:
    """Who has a thing of the tale? Nobody, if it lies somewhere."""
    thing = rng.choice(sorted(tale.holders))
    asked = ASK["who"][tale.language].format(
        thing=forms(tale.language, "thing", "acc")[thing])
    holder = tale.holders[thing]
    return asked, f"{holder}." if holder in GENDER else NOBODY[tale.language]


def ask_where(rng: Random, tale) -> tuple[str, str]:
    """Where is a thing? Where it lies, or where the one is who has it: two steps."""
    thing = rng.choice(sorted(tale.holders))
    place = tale.places.get(tale.holders[thing], tale.holders[thing])
    asked = ASK["where"][tale.language].format(
        it=forms(tale.language, "thing", "the")[thing])
    return asked, sentence_of(tale.language, place)


def ask_person(rng: Random, tale) -> tuple[str, str]:
    """Where is somebody of the tale?"""
    who = rng.choice(sorted(tale.places))
    asked = ASK["where"][tale.language].format(it=who)
    return asked, sentence_of(tale.language, tale.places[who])


def ask_untold(rng: Random, tale) -> tuple[str, str]:
    """One of the questions above, about a thing or somebody not in the tale."""
    thing = rng.choice([noun for noun in NOUNS if noun not in tale.holders])
    who = rng.choice([name for name in GENDER if name not in tale.places])
    the, acc = (forms(tale.language, "thing", form)[thing] for form in ("the", "acc"))
    asked = rng.choice([ASK["who"][tale.language].format(thing=acc),
                        ASK["where"][tale.language].format(it=the),
                        ASK["where"][tale.language].format(it=who)])
    return asked, NOT_TOLD[tale.language]


def ask_retell(rng: Random, tale) -> tuple[str, str]:
    """A sentence of the tale in another language. Sentences with a pronoun or with
    words whose translation depends on more than the sentence are left out."""
    sentences = [event for event in tale.events[1:-1] if says_all(tale.language, event)]
    if not sentences:
        return ()
    event = rng.choice(sentences)
    other = rng.choice([language for language in LANGUAGES if language != tale.language])
    return ASK["retell"][other] + render(tale.language, event), render(other, event)


def says_all(language: str, event: dict) -> bool:
    """Whether the sentence alone says all that its telling in any language needs."""
    texts = {render(language, {**event, "who": name}) for name in GENDER}
    return "who" not in event or len(texts) == len(GENDER)


def ask_end(rng: Random, tale) -> tuple[str, str]:
    """The last sentence: any that is true will do."""
    return ASK["end"][tale.language], render(tale.language, tale.events[-1])


TELL = {"who": ask_who, "where": ask_where, "person": ask_person, "untold": ask_untold,
        "retell": ask_retell, "end": ask_end}


def sentence_of(language: str, place: str) -> str:
    """A place as an answer: "In the garden."."""
    words = forms(language, "place", "in")[place]
    return words[0].upper() + words[1:] + "."


def ask_many(n: int, seed: int = 0, **choice) -> list[Question]:
    """n different questions. Of two seeds the questions are drawn apart; whether a
    tale of one is among those of the other, `shared` tells."""
    rng, found = Random(seed), {}
    while len(found) < n:
        question = ask(rng, **choice)
        found[question.prompt] = question
    return list(found.values())


def shared(some: Iterable[Question], others: Iterable[Question]) -> list[Question]:
    """The questions of `some` whose tale is among the others' tales; where no tale is
    told, whose words are among theirs."""
    seen = {question.told or question.asked for question in others}
    return [question for question in some if (question.told or question.asked) in seen]


def is_right(question: Question, answer: str) -> bool:
    """Exact match; for an `end`, whether it ends the tale without a contradiction."""
    if question.kind == "end":
        return parse_tale(f"{question.told} {answer}").consistent
    return answer == question.answer
