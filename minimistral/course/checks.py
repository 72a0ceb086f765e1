"""check: run the learner's work, and if it is wrong say which mistake it is.

The learner's output is compared with the reference's on every fixture. If it is wrong, it is
compared with the output of every misconception on record; an equal one names the mistake. Of
two mistakes in one function the one that shows first is named.
"""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import os
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import orders
from .compare import Difference, describe, difference, overview, short
from .exercises import TYPED, Exercise, find_by_entry, find_exercise
from .panel import Panel
from .sandbox import Run, guarded
from .source import tree_of

PASS, TRY_AGAIN = "pass", "try again"
NOT_WRITTEN, NOT_ANSWERED = "not written yet", "not answered yet"
TONES = {PASS: "good", TRY_AGAIN: "bad", NOT_WRITTEN: "wait", NOT_ANSWERED: "wait"}
_NOTHING = object()


@dataclass
class Result:
    """The outcome of a check. True if it passed; shows itself as a panel."""

    exercise: Exercise
    status: str
    message: str = ""
    matched: str | None = None  # the misconception's name
    notes: list[str] = field(default_factory=list)
    picture: tuple[str, str] = ("", "")  # html, text

    @property
    def passed(self) -> bool:
        return self.status == PASS

    def __bool__(self) -> bool:
        return self.passed

    def panel(self) -> Panel:
        heading = f"{self.status.upper()} · {self.exercise.title}"
        lines = [line for line in [self.message, *self.notes] if line]
        if self.status == TRY_AGAIN and self.exercise.hints:
            lines.append(f'Stuck? hint("{self.exercise.name}") gives one step at a time.')
        html, text = self.picture
        tone = TONES[self.status]
        return Panel(heading, lines, tone=tone, extra_html=html, extra_text=text)

    def __repr__(self) -> str:
        return str(self.panel())

    def _repr_html_(self) -> str:
        return self.panel()._repr_html_()

    def _ipython_display_(self) -> None:
        if not _under_nbgrader():
            raise NotImplementedError  # IPython then shows the panel as the cell's value
        from IPython.display import display

        display(self.panel())  # nbgrader reads a cell's value as a share of the points


def _under_nbgrader() -> bool:
    """Is nbgrader running the notebook? For it a check that doesn't raise has passed."""
    return bool(os.environ.get("NBGRADER_EXECUTION"))


def check(name: str | Callable, work: Any = _NOTHING) -> Result:
    """Check the learner's work: ``check("attend", attend)``, ``check("order", "B A C")``.

    ``name`` is the exercise's name ("ch02.attend" if two chapters share one). A function alone
    is enough if its own name belongs to one exercise: ``check(attend)``. Never raises for what
    the learner's code does, except where nbgrader grades: there what has not passed is an
    AssertionError. The result is kept in the progress file; a passed core piece is saved to
    the work folder.
    """
    if not isinstance(name, str):
        work, name = name, find_by_entry(getattr(name, "__name__", "")).key
    exercise = find_exercise(name)
    attempt = attempted(exercise, None if work is _NOTHING else work)
    for listen in listeners:
        listen(attempt)
    result = verdict(attempt)
    from .progress import record_check

    record_check(exercise, result)
    if result.passed and exercise.piece:
        from .pieces import save_piece

        result.notes.append(save_piece(exercise, work))
    if not result.passed and _under_nbgrader():
        raise AssertionError(str(result))
    return result


def judge(exercise: Exercise, work: Any) -> Result:
    """The check itself, without any record kept."""
    return verdict(attempted(exercise, work))


@dataclass
class Outcome:
    """One run on one fixture."""

    fixture: str
    run: Run
    changed: str | None  # the input that was written into
    line: str = ""  # of the learner's code, where it failed

    @property
    def error(self) -> BaseException | None:
        return self.run.error


@dataclass
class Attempt:
    """What the learner's work gave: all that a verdict needs, whoever gives it."""

    exercise: Exercise
    answer: Any = None  # of an order or an answer
    status: str = ""  # where nothing was run: why, TRY_AGAIN with a message or NOT_WRITTEN
    message: str = ""
    outcomes: list[Outcome] = field(default_factory=list)


listeners: list[Callable[[Attempt], None]] = []  # told of every attempt that is checked


def attempted(exercise: Exercise, work: Any) -> Attempt:
    """Run the learner's work on the fixtures. Nothing of it is compared here."""
    if exercise.kind in TYPED:
        return Attempt(exercise, work)
    if work is None or work is Ellipsis:
        return Attempt(exercise, status=NOT_WRITTEN)
    if not callable(work):
        told = f"Give check the function itself, without calling it; it got {describe(work)}."
        return Attempt(exercise, status=TRY_AGAIN, message=told)
    if line := _placeholder(work):
        return Attempt(exercise, status=NOT_WRITTEN, message=line)
    if problem := _wrong_arguments(exercise, work):
        return Attempt(exercise, status=TRY_AGAIN, message=problem)
    if "swap" in getattr(work, "__globals__", {}):
        from .swaps import load_library

        load_library()  # else the first swap would do it, within the time limit
    outcomes = outcomes_of(exercise, work, exercise.seconds)
    for outcome in outcomes:
        outcome.line = _line(work, outcome.error)
    return Attempt(exercise, outcomes=outcomes)


def verdict(attempt: Attempt, *, run: Callable | None = None, pictures: bool = True) -> Result:
    """Compare what the work gave with the reference and with the misconceptions.

    ``run(exercise, candidate)`` gives a candidate's outcomes: ``Outcomes``, or one that
    remembers them.
    """
    exercise = attempt.exercise
    if exercise.kind == "order":
        return _judge_order(exercise, attempt.answer)
    if exercise.kind == "answer":
        return _judge_answer(exercise, attempt.answer)
    if attempt.status:
        return Result(exercise, attempt.status, attempt.message)
    return _judge_function(exercise, attempt.outcomes, run or Outcomes, pictures)


# ---------------------------------------------------------------- functions and classes


def _judge_function(exercise: Exercise, outcomes: list[Outcome], run: Callable, pictures: bool) -> Result:
    def again(message, matched=None, notes=(), picture=("", "")):
        return Result(exercise, TRY_AGAIN, message, matched, list(notes), picture)

    if any(isinstance(o.error, NotImplementedError) for o in outcomes):
        return Result(exercise, NOT_WRITTEN)
    expected = list(run(exercise, exercise.reference))
    verdicts = [_difference(exercise, e, o) for e, o in zip(expected, outcomes)]
    notes = _notes(outcomes)
    first = next((i for i, verdict in enumerate(verdicts) if verdict), None)
    if len(outcomes) < len(expected) and first is None:
        first = len(outcomes) - 1  # a later fixture was never reached
    if first is None and not any(o.changed for o in outcomes):
        every = "All inputs gave what is expected." if len(outcomes) > 1 else ""
        return Result(exercise, PASS, " ".join(filter(None, [exercise.praise, every])), notes=notes)
    if first is None:
        changed = next(o for o in outcomes if o.changed)
        known, _ = _matching(exercise, outcomes, run)
        return again(
            known.message
            if known
            else f"The values are right, but your code wrote into its input {changed.changed}. "
            "Work on a copy, or with operations that return a new tensor.",
            known and known.name,
            notes,
        )
    outcome, found = outcomes[first], verdicts[first]
    if outcome.run.timed_out or isinstance(outcome.error, KeyboardInterrupt):
        return again(_explain(exercise, outcome, found), None, notes)
    picture = _picture(exercise, expected[first], outcome) if pictures else ("", "")
    known, whole = _matching(exercise, outcomes, run, first)
    if known:
        if outcome.error is None and found.text:
            fact = f"{_sentence(found.text)}{_on(exercise, outcome)}"
        else:
            fact = "" if outcome.error is None else f"It stopped with {_error(outcome.error)}."
        more = "" if whole else "That is not all: check again when it is repaired."
        return again(" ".join(filter(None, [known.message, fact, more])), known.name, notes, picture)
    return again(_explain(exercise, outcome, found), None, notes, picture)


class Outcomes:
    """What a candidate gives on each fixture, run when it is first asked for, and remembered."""

    def __init__(self, exercise: Exercise, candidate: Callable):
        self.known: list[Outcome] = []
        self.others = _outcomes(exercise, candidate, 60.0)

    def __iter__(self) -> Iterator[Outcome]:
        yield from self.known
        for outcome in self.others:
            self.known.append(outcome)
            yield outcome


def outcomes_of(exercise: Exercise, candidate: Callable, seconds: float = 60.0) -> list[Outcome]:
    """Run a candidate on every fixture, within ``seconds`` for all together.

    Stops after a fixture on which time ran out.
    """
    return list(_outcomes(exercise, candidate, seconds))


def _outcomes(exercise: Exercise, candidate: Callable, seconds: float) -> Iterator[Outcome]:
    for fixture in exercise.fixtures:
        args, kwargs = arguments_of(fixture)
        if exercise.run:
            run = guarded(exercise.run, candidate, *args, seconds=seconds, **kwargs)
        else:
            run = guarded(candidate, *args, seconds=seconds, **kwargs)
        changed = None
        if not exercise.may_change_inputs:
            changed = _changed_input(exercise, fixture, args, kwargs)
        run.value = _snapshot(run.value)
        yield Outcome(fixture.__name__.strip("_").replace("_", " "), run, changed)
        seconds = max(0.2, seconds - run.seconds)
        if run.timed_out or isinstance(run.error, KeyboardInterrupt):
            break


def arguments_of(fixture) -> tuple[tuple, dict]:
    arguments = fixture()
    return ((), arguments) if isinstance(arguments, dict) else (tuple(arguments), {})


def _snapshot(value):
    """The result as it is now; a function may return the same buffer every time."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_snapshot(v) for v in value)
    if type(value) is dict:
        return {key: _snapshot(v) for key, v in value.items()}
    return value


def _changed_input(exercise, fixture, args, kwargs) -> str | None:
    fresh_args, fresh_kwargs = arguments_of(fixture)
    names = _parameter_names(exercise, len(args))
    pairs = list(zip(names, fresh_args, args))
    pairs += [(name, fresh_kwargs[name], kwargs[name]) for name in fresh_kwargs]
    return next((name for name, before, after in pairs if is_changed(before, after)), None)


def is_changed(before, after) -> bool:
    if isinstance(before, torch.nn.Module):
        return is_changed(before.state_dict(), after.state_dict())
    if isinstance(before, torch.Tensor):
        return before.shape != after.shape or bool(
            difference(before, after, 0.0, same_dtype=True)
        )
    if isinstance(before, (list, tuple)):
        return len(before) != len(after) or any(map(is_changed, before, after))
    if isinstance(before, dict):
        return set(before) != set(after) or any(is_changed(before[k], after[k]) for k in before)
    if isinstance(before, (int, float, str, bytes, bool, set, type(None))):
        return bool(difference(before, after, 0.0))
    return False  # an object of another kind: its own business


def _parameter_names(exercise, count: int) -> list[str]:
    names = list(inspect.signature(exercise.reference).parameters)
    if exercise.run:  # its own arguments, after the candidate, where the learner knows their names
        used = list(inspect.signature(exercise.run).parameters)[1:]
        names = [name if name in names else "" for name in used]
    return [names[i] if any(names[i:i + 1]) else f"number {i + 1}" for i in range(count)]


def _difference(
    exercise: Exercise, expected: Outcome, actual: Outcome, words: Callable | None = None
) -> Difference | None:
    """How an outcome departs from another one. Of errors the kind counts, or what ``words`` gives."""
    if expected.error is not None or actual.error is not None:
        name = words or _kind  # by name: of a graded notebook only words come
        if name(expected.error) == name(actual.error):
            return None
        wanted = "no error" if expected.error is None else type(expected.error).__name__
        return Difference("error", f"expected {wanted}, got {describe(actual.run.value)}")
    if exercise.compare:
        result = guarded(exercise.compare, expected.run.value, actual.run.value)
        if result.error is not None:
            return difference(expected.run.value, actual.run.value) or Difference(
                "type", f"the result cannot be compared: {_error(result.error)}"
            )
        return Difference("value", result.value) if result.value else None
    strict = exercise.same_dtype or exercise.kind == "piece"
    try:
        return difference(expected.run.value, actual.run.value, exercise.tolerance, same_dtype=strict)
    except OverflowError:  # an int beyond every float
        return Difference("value", "a number in it is too large to be compared")


def _matching(exercise: Exercise, outcomes: list[Outcome], run: Callable, first: int | None = None):
    """The misconception that gives the learner's outcome, and whether it does so on every fixture.

    If none does: the one that agrees up to ``first``, the first fixture that went wrong, and on
    more fixtures than any other. Without ``first``, where only inputs were changed, none. Of an
    error every word counts; if that names nothing, not which of two sizes comes first.
    """
    wrongs = [(m, run(exercise, wrong)) for m in exercise.misconceptions for wrong in (m.wrong, *m.also)]
    known, whole = _fitting(exercise, outcomes, wrongs, first, _error)
    if whole or all(o.error is None for o in outcomes):
        return known, whole
    other = _fitting(exercise, outcomes, wrongs, first, _unordered)
    return other if other[1] or not known else (known, whole)


def _fitting(exercise: Exercise, outcomes: list[Outcome], wrongs: list, first: int | None, words: Callable):
    """What ``_matching`` gives, with errors compared by ``words``.

    A misconception is run no further than to the fixture that rules it out: up to ``first`` any
    difference does. Most are ruled out at once.
    """
    partly = {}  # name -> fixtures on which it agrees, and the misconception
    for misconception, theirs in wrongs:
        equal = count = 0
        for count, (outcome, their) in enumerate(zip(outcomes, theirs), 1):
            if first is None and their.changed != outcome.changed:
                break
            if not _difference(exercise, their, outcome, words):
                equal += 1
            elif first is None or count <= first + 1:
                break
        else:
            if equal == len(outcomes):
                return misconception, True
            if first is not None and count > first:
                seen, _ = partly.get(misconception.name, (0, None))
                partly[misconception.name] = max(equal, seen), misconception
    most = max((equal for equal, _ in partly.values()), default=0)
    best = [m for equal, m in partly.values() if equal == most]
    return best[0] if len(best) == 1 else None, False


# ---------------------------------------------------------------- words


def _kind(error: BaseException | None) -> str:
    return type(error).__name__


def _unordered(error: BaseException | None) -> tuple[str, list[str]]:
    """What an error says, whichever of two sizes it names first, or whichever index is out of bounds."""
    text = re.sub(r"index -?\d+ is out", "index is out", _error(error))
    return re.sub(r"\d+", "#", text), sorted(re.findall(r"\d+", text))


def _error(error: BaseException | None) -> str:
    if error is None:
        return ""
    text = " ".join(str(error).split()).split(" Exception raised from ")[0]  # and where in PyTorch
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."


def _on(exercise, outcome) -> str:
    return f" (Input: {outcome.fixture}.)" if len(exercise.fixtures) > 1 else ""


def _explain(exercise, outcome: Outcome, found: Difference | None) -> str:
    error, where = outcome.error, _on(exercise, outcome)
    if outcome.run.timed_out:
        return (
            f"It ran longer than {exercise.seconds:g} seconds and was stopped.{where} "
            "Does a loop end? Is a whole-tensor operation written as a loop?"
        )
    if isinstance(error, KeyboardInterrupt):
        return f"It was interrupted before it finished.{where}"
    if isinstance(error, SystemExit):
        return f"Your code called exit; return a value instead.{where}"
    if isinstance(error, RecursionError):
        return f"The function calls itself without end (RecursionError).{where}{outcome.line}"
    if error is not None:
        return f"It stopped with {_error(error)}.{where}{outcome.line}"
    if outcome.run.value is None and found.kind == "type":
        return f"It returned None: is a return missing?{where}"
    if outcome.run.value is Ellipsis:
        return f"It returned the placeholder itself.{where}"
    more = guarded(overview, found).value  # the learner's values may be of any kind
    return " ".join(filter(None, [_sentence(found.text), more])) + where


def _line(work, error) -> str:
    """The learner's own line that failed."""
    if error is None:
        return ""
    inner = inspect.unwrap(work) if callable(work) else work  # below torch.no_grad()
    filename = getattr(getattr(inner, "__code__", None), "co_filename", None)
    if filename is None and inspect.isclass(work):
        init = next((f for f in vars(work).values() if inspect.isfunction(f)), None)
        filename = init.__code__.co_filename if init else None
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if f.filename == filename and f.lineno]     # stopped between lines, it has none
    if not frames:
        return ""
    text = linecache.getline(filename, frames[-1].lineno).strip()
    return f" The line: {text}" if text else ""


def _notes(outcomes: list[Outcome]) -> list[str]:
    notes = []
    restored = sorted({name for o in outcomes for name in o.run.restored})
    if restored:
        notes.append(f"Your code changed {' and '.join(restored)}; it was put back.")
    printed = sum(o.run.printed_length for o in outcomes)
    if printed:
        first = next(o.run.printed for o in outcomes if o.run.printed).strip().splitlines()
        beginning = f", beginning: {short(first[0])}" if first else ""
        notes.append(f"It printed {printed:,} characters{beginning}")
    return notes


def _placeholder(work) -> str:
    """Is there a ``...`` left where code should be? Say so in a sentence."""
    function = work.__init__ if inspect.isclass(work) else work
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None and not inspect.isclass(work):
        skip = ("RESUME", "NOP", "COPY_FREE_VARS")
        steps = [i for i in dis.get_instructions(code) if i.opname not in skip]
        names = [i.opname for i in steps]
        returns_none = names in (["LOAD_CONST", "RETURN_VALUE"], ["RETURN_CONST"])
        if returns_none and steps[0].argval is None and not _says_return(work):
            return "The function is still empty."
    tree = tree_of(work)
    for node in ast.walk(tree) if tree else ():
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            parts = value.elts if isinstance(value, ast.Tuple) and value.elts else [value]
            if all(isinstance(part, ast.Constant) and part.value is Ellipsis for part in parts):
                return f"There is still a ... in line {node.lineno} of it."
    return ""


def _says_return(work) -> bool:
    tree = tree_of(work)
    return tree is not None and any(isinstance(node, ast.Return) for node in ast.walk(tree))


def _wrong_arguments(exercise: Exercise, work) -> str:
    """Can the function be called as the exercise calls it?"""
    if exercise.run or not exercise.fixtures:
        return ""
    try:
        signature = inspect.signature(work)
    except (TypeError, ValueError):  # some built-in functions have none
        return ""
    args, kwargs = arguments_of(exercise.fixtures[0])
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        wanted = ", ".join(inspect.signature(exercise.reference).parameters)
        yours = ", ".join(signature.parameters) or "nothing"
        return f"{exercise.entry or exercise.name} takes ({wanted}); yours takes ({yours})."
    return ""


# ---------------------------------------------------------------- pictures


def _picture(exercise, expected: Outcome, actual: Outcome) -> tuple[str, str]:
    """Your output beside the expected one, as HTML and as text; empty where none helps."""
    if actual.error is not None:
        return "", ""
    wanted, got = expected.run.value, actual.run.value
    if exercise.picture:
        from .figures import figure_html

        drawn = guarded(lambda: figure_html(*exercise.picture(wanted, got)))
        return ("", "") if drawn.error is not None else (drawn.value, "")
    if not _is_mask(wanted) or not _is_mask(got):
        return "", ""
    text = _side_by_side(_draw(wanted), _draw(got))
    label = "Expected mask on the left, yours on the right; x may attend, dot may not:"
    return f"<div>{label}</div><pre>{text}</pre>", f"{label}\n{text}"


def _is_mask(value) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.bool
        and value.dim() >= 2
        and max(value.shape[-2:]) <= 24
        and value.numel() > 0
    )


def _draw(mask) -> list[str]:
    plane = mask.reshape(-1, *mask.shape[-2:])[0].tolist()
    return ["".join(" x" if cell else " ." for cell in row) for row in plane]


def _side_by_side(left: list[str], right: list[str]) -> str:
    height, width = max(len(left), len(right)), len(left[0])
    left, right = ([*rows, *[""] * (height - len(rows))] for rows in (left, right))
    return "\n".join(f"{a.ljust(width)}   |  {b}".rstrip() for a, b in zip(left, right))


# ---------------------------------------------------------------- orders and answers


def _unanswered(work) -> bool:
    return work is None or work is Ellipsis or str(work).strip(" .?_") == ""


def _judge_order(exercise: Exercise, work) -> Result:
    if _unanswered(work):
        return Result(exercise, NOT_ANSWERED, "Type the letters in order, as in: B A C")
    letters = exercise.letters()
    typed = re.findall(r"[A-Z]", (work if isinstance(work, str) else " ".join(map(str, work))).upper())
    unknown = [letter for letter in typed if letter not in letters]
    twice = sorted({letter for letter in typed if typed.count(letter) > 1})
    if unknown or twice or not typed:
        legal = " ".join(letters)
        what = f"unknown: {' '.join(unknown)}" if unknown else f"twice: {' '.join(twice)}"
        return Result(exercise, TRY_AGAIN, f"Use each letter at most once, from {legal} ({what}).")
    order = tuple(letters[letter] for letter in typed)
    if order in exercise.right_orders:
        return Result(exercise, PASS, exercise.praise)
    if len(order) < len(exercise.lines) - 1:
        message = f"{len(exercise.lines)} lines are needed, you gave {len(order)}."
        return Result(exercise, TRY_AGAIN, message)
    if known := orders.mistake(exercise, order):
        return Result(exercise, TRY_AGAIN, known.message, known.name)
    lacks = len(order) < len(exercise.lines)
    return Result(exercise, TRY_AGAIN, "One line is missing." if lacks else "The order is not right yet.")


def _judge_answer(exercise: Exercise, work) -> Result:
    if _unanswered(work):
        return Result(exercise, NOT_ANSWERED)
    rights = [exercise.reference, *exercise.equivalents.values()]
    if any(_same_answer(exercise, right, work) for right in rights):
        return Result(exercise, PASS, exercise.praise)
    for misconception in exercise.misconceptions:
        if _same_answer(exercise, misconception.wrong, work):
            return Result(exercise, TRY_AGAIN, misconception.message, misconception.name)
    if exercise.options:
        letters = " ".join(chr(65 + i) for i in range(len(exercise.options)))
        return Result(exercise, TRY_AGAIN, f"Answer with one letter of {letters}.")
    message = f"{short(work)} is not the answer."
    if isinstance(exercise.reference, (int, float)) and isinstance(work, (int, float)):
        size = "large" if work > exercise.reference else "small"
        message = f"{short(work)} is too {size}."
    return Result(exercise, TRY_AGAIN, message)


def _same_answer(exercise, right, given) -> bool:
    if isinstance(right, str):
        return " ".join(str(given).split()).casefold() == " ".join(right.split()).casefold()
    if isinstance(given, str) and isinstance(right, (int, float)):
        try:
            given = float(given.replace(",", "").replace("_", ""))
        except ValueError:
            return False
    return difference(right, given, exercise.tolerance) is None


def lines(name: str) -> Panel:
    """Show the shuffled lines of an order exercise, or the choices of an answer."""
    exercise = find_exercise(name)
    if exercise.kind == "order":
        all_lines = [*exercise.lines, *exercise.distractors]
        shown = [f"{letter}   {all_lines[n]}" for letter, n in exercise.letters().items()]
        n = len(exercise.distractors)
        extra = f", {n} {'stays' if n == 1 else 'stay'} out" if n else ""
        ask = f'{len(exercise.lines)} lines in order{extra}. Answer: check("{exercise.name}", "A B ...")'
        return Panel(exercise.title, [ask], tone="wait", code="\n".join(shown), fixed=True)
    shown = [f"{chr(65 + i)}   {option}" for i, option in enumerate(exercise.options)]
    return Panel(exercise.title, [f'Answer: check("{exercise.name}", "A")'], tone="wait", code="\n".join(shown))
