"""Predict before you run: a question, the learner's answer, and later the truth.

Everything is plain text typed into a cell; nothing waits for an answer, so a notebook runs
from top to bottom whether or not the questions were answered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .compare import short
from .panel import Panel
from .progress import load_progress, update_progress

VERDICTS = ("true", "true with a condition", "false", "not checkable")
OPEN = (None, "", "?", "...", Ellipsis)

_asked: dict[str, tuple[str, ...]] = {}  # the options of the questions put in this kernel


def predict(name: str, question: str, options: Sequence[str] = (), *, answer: Any = None) -> Panel:
    """Ask for a prediction: ``answer="A"`` for one of the options, or a number without options.

    Unanswered it shows the question and how to answer. ``reveal(name, ...)`` compares later.
    """
    _asked[name] = tuple(options)
    shown = [f"{_letter(n)}  {option}" for n, option in enumerate(options)]
    if _is_open(answer):
        how = f"answer={_letter(0)!r}" if options else "answer=<your number>"
        return Panel(f"Predict · {question}", [f"Write {how}, run the cell, go on. Guessing is fine."],
                     tone="wait", code="\n".join(shown))
    answer = _as_letter(answer, options) if options else _as_number(answer)
    _remember(name, answer)
    said = f"{answer}  {options[ord(answer) - 65]}" if options else short(answer)
    return Panel(f"Predict · {question}", [f"You say: {said}"], tone="wait")


def reveal(name: str, truth: Any, why: str = "", *, options: Sequence[str] = ()) -> Panel:
    """Compare a prediction with the truth: the right letter, or the measured number."""
    options = options or _asked.get(name, ())
    answer = load_progress()["predictions"].get(name)
    truth = truth.item() if hasattr(truth, "item") else truth
    if isinstance(truth, str) and options:
        lines = [f"It is {truth}: {options[ord(truth) - 65]}"]
    else:
        lines = [f"It is: {truth if isinstance(truth, str) else short(truth)}"]
    if answer is not None and isinstance(truth, str):
        lines.insert(0, f"You said: {answer}. " + ("Right." if answer == truth else "A surprise, then."))
    elif answer is not None:
        lines.insert(0, f"You said: {short(answer)}. {_distance(float(answer), float(truth))}")
    if why:
        lines.append(why)
    return Panel("What happened", lines, tone="plain")


def bet(headline: int, answer: Any = None) -> Panel:
    """Your bet on a headline of the press: true, true with a condition, false, not checkable."""
    from .syllabus import headline as find

    claim = find(headline)
    return predict(f"headline {headline}", f"{claim.year}, in our words: “{claim.text}”", VERDICTS, answer=answer)


def verdict(headline: int, truth: str, why: str = "") -> Panel:
    """The verdict on a headline beside the learner's bet; ``truth`` is one of VERDICTS."""
    if truth not in VERDICTS:
        raise ValueError(f"{truth!r} is none of {', '.join(VERDICTS)}")
    letter = _letter(VERDICTS.index(truth))
    if f"headline {headline}" in load_progress()["predictions"]:  # won or lost, for the progress page
        update_progress(lambda data: data.setdefault("verdicts", {}).__setitem__(str(headline), letter))
    return reveal(f"headline {headline}", letter, why, options=VERDICTS)


def _is_open(answer) -> bool:
    return any(answer is value or (isinstance(answer, str) and answer == value) for value in OPEN)


def _letter(n: int) -> str:
    return chr(65 + n)


def _as_letter(answer, options) -> str:
    """"a", "A" or the option's own words -> "A"."""
    text = str(answer).strip()
    letters = [_letter(n) for n in range(len(options))]
    if text.upper() in letters:
        return text.upper()
    for letter, option in zip(letters, options):
        if text.casefold() == str(option).casefold():
            return letter
    raise ValueError(f"answer={answer!r} is none of {', '.join(letters)}")


def _as_number(answer) -> float:
    """14.5, "14.5", "14,5" and "14.5 GB" -> 14.5; "7,240" -> 7240."""
    if isinstance(answer, (int, float)):
        return answer
    text = re.sub(r",(?=\d{3}(\D|$))", "", str(answer)).replace(",", ".")
    number = re.match(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text)
    if number is None:
        raise ValueError(f"answer={answer!r} is no number: write one, as in answer=14.5")
    return float(number[0])


def _remember(name, answer):
    update_progress(lambda data: data["predictions"].__setitem__(name, answer))


def _distance(said: float, truth: float) -> str:
    if said == truth:
        return "Exactly."
    if said * truth <= 0:
        return f"Off by {short(abs(said - truth))}."
    factor = max(said / truth, truth / said)
    return f"Off by a factor of {factor:,.2f}."
