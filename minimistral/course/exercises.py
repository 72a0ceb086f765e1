"""What an exercise is: a reference, fixtures, equivalent solutions, and misconceptions.

A chapter's exercises live in ``records/chNN.py`` as a list named ``EXERCISES``. ``check`` runs
the learner's work against such a record; ``verify`` (soundness.py) proves that a record is sound.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

KINDS = ("complete", "order", "function", "bug", "open", "answer", "piece")
TYPED = ("order", "answer")  # the learner types a value; every other kind hands over a function
DIFFICULTIES = ("easy", "medium", "hard")
IMPORTANCES = ("essential", "useful", "optional")
MINUTES_PER_POINT = 5


@dataclass(frozen=True)
class Misconception:
    """One mistake that people make, and the message that helps.

    name      a few words, unique within the exercise; shown in reports, not to learners
    wrong     a wrong implementation; for an answer a value; for an order what it shows, such as
              "3 before 2" (``orders.shows``), or a whole order as a tuple of line numbers
    message   at most 30 words: symptom, broken rule, where to look. No code. The engine appends
              expected and actual at one index.
    also      other implementations of the same mistake, told by the same message, such as one
              that clamps and one that does not
    """

    name: str
    wrong: Any
    message: str
    also: Sequence[Callable] = ()


@dataclass(frozen=True)
class Hint:
    """One step of help, titled by the symptom the learner sees."""

    symptom: str
    text: str


@dataclass(frozen=True, eq=False)
class Exercise:
    """One exercise. Fields that a kind does not use keep their defaults.

    name          short, unique within the chapter: ``check("attend", attend)``
    reference     the right function (or class); for an answer the right value;
                  for an order leave it None: the right order is ``lines`` as written
    entry         the name of the learner's function or class in the notebook
    fixtures      functions without arguments, each returning fresh arguments for one run: a tuple
                  (positional) or a dict (by name). Deterministic: use a generator with a seed.
                  The function's name is told to the learner ("on the input 'three unequal rows'").
    run           how to use the learner's object, if it is not simply called:
                  ``run(candidate, *arguments) -> output``. For classes, for two runs that must
                  agree, for functions that are called many times.
    equivalents   name -> another right function (for an order: another right tuple of line
                  numbers; for an answer: another right value)
    misconceptions, hints    see above; hints are exactly three
    tolerance     relative to the largest value in the same row (last axis)
    compare       replaces the comparison: ``compare(expected, actual) -> None or a sentence``
    same_dtype    True: the exact dtype and a real tensor are demanded (always so for a piece);
                  else lists and arrays are converted, and a wider float is welcome
    may_change_inputs   True where writing into an argument is the task
    picture       ``picture(expected, actual) -> (figure, alt text)``, shown beside a refusal;
                  small boolean masks get one by themselves
    piece         library target of a core piece, such as "attention.attend"
    lines, distractors    an order's right lines, and lines that must stay out
    options       an answer's choices, shown as A, B, C ...; then reference and wrong are letters
    praise        one sentence shown with PASS: what the learner has now
    seconds       time limit for all fixtures together
    """

    name: str
    chapter: int
    title: str
    kind: str
    difficulty: str
    importance: str
    minutes: int
    reference: Any = None
    entry: str = ""
    fixtures: Sequence[Callable[[], tuple | dict]] = ()
    run: Callable | None = None
    equivalents: dict[str, Any] = field(default_factory=dict)
    misconceptions: Sequence[Misconception] = ()
    hints: Sequence[Hint] = ()
    tolerance: float = 1e-5
    compare: Callable[[Any, Any], str | None] | None = None
    same_dtype: bool = False
    may_change_inputs: bool = False
    picture: Callable | None = None
    piece: str | None = None
    lines: Sequence[str] = ()
    distractors: Sequence[str] = ()
    options: Sequence[str] = ()
    praise: str = ""
    seconds: float = 10.0

    def __post_init__(self):
        for value, legal, what in (
            (self.kind, KINDS, "kind"),
            (self.difficulty, DIFFICULTIES, "difficulty"),
            (self.importance, IMPORTANCES, "importance"),
        ):
            if value not in legal:
                raise ValueError(f"{self.name}: {what} {value!r} is none of {', '.join(legal)}")
        if (self.kind == "piece") != (self.piece is not None):
            raise ValueError(f"{self.name}: kind 'piece' and the field piece belong together")

    @property
    def key(self) -> str:
        """The full name, as in "ch02.attend"."""
        return f"ch{self.chapter:02d}.{self.name}"

    @property
    def header(self) -> str:
        """The line under an exercise's title: difficulty, importance, minutes."""
        return f"Difficulty: {self.difficulty} · importance: {self.importance} · {self.minutes} minutes"

    @property
    def points(self) -> int:
        """What a school may give for it: one point for every five minutes begun."""
        return math.ceil(self.minutes / MINUTES_PER_POINT)

    @property
    def right_orders(self) -> list[tuple[int, ...]]:
        return [tuple(range(len(self.lines))), *map(tuple, self.equivalents.values())]

    def letters(self) -> dict[str, int]:
        """Letter -> line number of an order exercise, shuffled, the same on every machine.

        Line numbers count through ``lines`` and on through ``distractors``.
        """
        numbers = list(range(len(self.lines) + len(self.distractors)))
        shuffled = numbers[:]
        generator = random.Random(self.key)
        while shuffled == numbers or shuffled[: len(self.lines)] in map(list, self.right_orders):
            generator.shuffle(shuffled)
        return dict(zip(string.ascii_uppercase, shuffled))

    def spell(self, order: Sequence[int]) -> str:
        """Line numbers as the learner would type them: (0, 2, 1) -> "B A D"."""
        letter = {number: letter for letter, number in self.letters().items()}
        return " ".join(letter[number] for number in order)


# ---------------------------------------------------------------- finding an exercise


@cache
def chapter_exercises(chapter: int) -> tuple[Exercise, ...]:
    """The records of one chapter; empty if the chapter is not written yet."""
    module = f"minimistral.course.records.ch{chapter:02d}"
    if importlib.util.find_spec(module) is None:
        return ()
    exercises = tuple(importlib.import_module(module).EXERCISES)
    names = [exercise.name for exercise in exercises]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or any(exercise.chapter != chapter for exercise in exercises):
        raise ValueError(f"{module}: names used twice {twice}, or a wrong chapter number")
    return exercises


def all_exercises() -> tuple[Exercise, ...]:
    """Every record of every written chapter, in the order of the course."""
    return tuple(exercise for n in range(100) for exercise in chapter_exercises(n))


def find_exercise(name: str) -> Exercise:
    """The exercise called "attend" or, if two chapters use that name, "ch02.attend"."""
    if name[:2] == "ch" and name[2:4].isdigit() and name[4:5] == ".":
        candidates = chapter_exercises(int(name[2:4]))
        found = [exercise for exercise in candidates if exercise.key == name]
    else:
        candidates = all_exercises()
        found = [exercise for exercise in candidates if exercise.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        keys = ", ".join(f'"{exercise.key}"' for exercise in found)
        raise ValueError(f'"{name}" is the name of several exercises; say one of {keys}')
    known = [exercise.name for exercise in candidates] + [exercise.key for exercise in candidates]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    advice = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f'no exercise is called "{name}"{advice}')


def find_by_entry(entry: str) -> Exercise:
    """The one exercise whose learner's function is called ``entry``."""
    found = [exercise for exercise in all_exercises() if exercise.entry == entry]
    if len(found) != 1:
        names = ", ".join(exercise.key for exercise in found) or "none"
        raise ValueError(
            f'exercises for a function called {entry}: {names}. Name the exercise: check("name", {entry})'
        )
    return found[0]
