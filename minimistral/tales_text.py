"""From decisions to words and back: the sentences of the five languages.

No sentence of a language is the beginning of another one, so there is one way at most to
cut a text into sentences and one set of decisions behind each of them.
"""

import re
from functools import cache

from minimistral import tales_words as words
from minimistral.tales_plot import (
    CLEAR, ENDINGS, EVENTS, LANGUAGES, OPENING, PRONOUN, THINGS, VARIANTS)

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

    A pronoun means the one who acted in the sentence `before`. Where that is unclear,
    the grammar still accepts it: it means whoever was named last and agrees, in
    `before["people"]`, and memory will find that it should have been a name.
    """
    for variant in VARIANTS[kind]:
        expression, says = pattern(language, kind, variant)
        if match := expression.match(text, start):
            sentence = {"kind": kind, "variant": variant}
            for (slot, values), said in zip(says, match.groups()):
                if values:
                    sentence.setdefault(slot, values[said])
            silent = kind in PRONOUN and variant == PRONOUN[kind]
            for who in meant(before) if silent else [None]:
                if silent:
                    sentence["who"] = who
                if render(language, sentence) == match[0]:  # agreement, repeated names
                    return sentence, match.end()
    return None


def meant(before: dict) -> list[str]:
    """Whom a pronoun may mean, the likeliest first."""
    clear = [before["who"]] if before.get("kind") in CLEAR else []
    return clear + before.get("people", [])


def read(text: str) -> tuple[list[dict], int | None]:
    """The sentences of a tale, and the character at which it stops being one, if it does."""
    for language in LANGUAGES:
        if found := read_sentence(language, "title", text, 0, {}):
            break
    else:
        return [], 0
    sentences, (sentence, end) = [], found
    sentence["language"], start, people = language, 0, []
    while True:
        sentences.append(sentence)
        if sentence["kind"] in ENDINGS:
            return sentences, None if end == len(text) else end
        if text[end:end + 1] != ("\n" if start == 0 else " "):
            return sentences, end
        start = end + 1
        told = len(sentences)
        people = [sentence[s] for s in ("who", "whom") if s in sentence] + people
        before = {**sentence, "people": people}
        expected = [OPENING[told]] if told < len(OPENING) else [*EVENTS, *ENDINGS]
        found = (read_sentence(language, kind, text, start, before) for kind in expected)
        sentence, end = next(filter(None, found), (None, start))
        if sentence is None:
            return sentences, start
