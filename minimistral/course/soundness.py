"""Are the records sound? Everything on record is given to the check, which must tell it rightly.

The reference and every equivalent pass, every misconception is refused with its own message, a
stub is told as one; words, hints and fixtures keep their measures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from . import orders
from .checks import (
    NOT_ANSWERED, NOT_WRITTEN, TRY_AGAIN, Result, arguments_of, is_changed, judge, outcomes_of,
)
from .exercises import TYPED, Exercise, Misconception

FEWEST_MISCONCEPTIONS = {"complete": 5, "function": 5, "bug": 5, "piece": 5, "order": 2, "answer": 2}
CODE = re.compile(r"`|==|->|\w\(|\)\.|\n|\btorch\.|\[[:\d]")


@dataclass
class Trial:
    """Something on record, judged: a right solution, a misconception, or nothing at all."""

    kind: str  # "right", "wrong", "also" (another way to a wrong one) or "nothing"
    name: str
    result: Result

    @property
    def as_it_should(self) -> bool:
        if self.kind in ("wrong", "also"):
            return self.result.status == TRY_AGAIN and self.result.matched == self.name
        if self.kind == "nothing":
            return self.result.status in (NOT_WRITTEN, NOT_ANSWERED)
        return self.result.passed


def trials(exercise: Exercise) -> list[Trial]:
    """The reference, every equivalent, every misconception and a stub, each given to the check."""
    if exercise.kind in TYPED:
        return _typed_trials(exercise)
    rights = {"reference": exercise.reference, **exercise.equivalents}
    made = [Trial("right", name, judge(exercise, work)) for name, work in rights.items()]
    made += [Trial("wrong", m.name, judge(exercise, m.wrong)) for m in exercise.misconceptions]
    made += [Trial("also", m.name, judge(exercise, w)) for m in exercise.misconceptions for w in m.also]

    def stub(*args, **kwargs):
        raise NotImplementedError

    return [*made, Trial("nothing", "a stub", judge(exercise, stub))]


def _typed_trials(exercise: Exercise) -> list[Trial]:
    if exercise.kind == "order":
        rights = [exercise.spell(order) for order in exercise.right_orders]
    else:
        rights = [exercise.reference, *exercise.equivalents.values()]
    made = [Trial("right", repr(right), judge(exercise, right)) for right in rights]
    made += [Trial("wrong", m.name, judge(exercise, typed_wrong(exercise, m))) for m in exercise.misconceptions]
    return made + [Trial("nothing", repr(n), judge(exercise, n)) for n in (None, "", "...", Ellipsis)]


def typed_wrong(exercise: Exercise, misconception: Misconception) -> Any:
    """What somebody with this misconception types."""
    if exercise.kind == "answer":
        return misconception.wrong
    return exercise.spell(orders.example(exercise, misconception) or ())


def verify(exercise: Exercise) -> list[str]:
    """Everything that is wrong with a record, as sentences; an empty list is a sound record."""
    problems = _verify_words(exercise)
    if exercise.kind in TYPED:
        problems += _verify_typed(exercise)
    elif not exercise.fixtures or not exercise.entry:
        return problems + ["a function exercise needs fixtures and an entry"]
    else:
        problems += _verify_function(exercise)
    return problems + [_complaint(t) for t in trials(exercise) if not t.as_it_should]


def _complaint(trial: Trial) -> str:
    if trial.kind == "nothing":
        return f"{trial.name} is told '{trial.result.status}', not that there is nothing yet"
    if trial.kind == "right":
        return f"{trial.name} is refused: {trial.result.message}"
    if trial.result.passed:
        return f"{trial.name}: passes as if it were right"
    return f"{trial.name}: told as {trial.result.matched}: {trial.result.message}"


def _verify_words(exercise) -> list[str]:
    problems = []
    fewest = FEWEST_MISCONCEPTIONS.get(exercise.kind, 0)
    if len(exercise.misconceptions) < fewest:
        problems.append(f"{len(exercise.misconceptions)} misconceptions, at least {fewest} wanted")
    for m in exercise.misconceptions:
        words = len(m.message.split())
        if not 4 <= words <= 30:
            problems.append(f"{m.name}: the message has {words} words, 4 to 30 wanted")
        if CODE.search(m.message):
            problems.append(f"{m.name}: the message contains code: {CODE.search(m.message)[0]!r}")
    for what, values in {
        "misconception": [m.name for m in exercise.misconceptions],
        "message": [m.message for m in exercise.misconceptions],
        "hint": [h.symptom for h in exercise.hints],
    }.items():
        if len(set(values)) < len(values):
            problems.append(f"a {what} occurs twice")
    if len(exercise.hints) != 3 or not all(h.symptom and h.text for h in exercise.hints):
        problems.append(f"{len(exercise.hints)} hints; three wanted, each with symptom and text")
    if exercise.kind == "bug" and "unchanged" not in [m.name for m in exercise.misconceptions]:
        problems.append("a bug hunt needs a misconception named 'unchanged': the bug itself")
    return problems


def _verify_typed(exercise) -> list[str]:
    problems = orders.problems(exercise) if exercise.kind == "order" else []
    if exercise.options:
        letters = [chr(65 + i) for i in range(len(exercise.options))]
        told = [exercise.reference, *exercise.equivalents.values()]
        told += [m.wrong for m in exercise.misconceptions]
        problems += [f"option {letter} has no message" for letter in letters if letter not in told]
    return problems


def _verify_function(exercise) -> list[str]:
    problems = []
    for fixture in exercise.fixtures:
        first, second = arguments_of(fixture), arguments_of(fixture)
        if is_changed(list(first[0]), list(second[0])) or is_changed(first[1], second[1]):
            problems.append(f"fixture {fixture.__name__} gives different inputs each time")
    for o in outcomes_of(exercise, exercise.reference):
        if o.changed:
            problems.append(f"the reference writes into its input {o.changed}")
        if o.run.restored:
            problems.append(f"the reference changes {o.run.restored}")
    if exercise.piece:
        from .swaps import find_target, signature_problem

        holder, attribute = find_target(exercise.piece)
        problem = signature_problem(exercise.piece, getattr(holder, attribute), exercise.reference)
        problems += [problem] if problem else []
    return problems
