"""Put the lines in order: which mistake an order shows, and whether every wrong order is told.

Line numbers count through an exercise's ``lines``, in their right order, and on through its
``distractors``. An order is a tuple of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, permutations

from .exercises import Exercise, Misconception

EVERY = 7  # up to so many lines, all their orders are tried; of more lines those near a right one


def shows(order: tuple[int, ...], wrong: tuple[int, ...] | str) -> bool:
    """Does an order show a mistake? The mistake is a whole order, or what it consists of:

    "3 before 2"   both lines are there, line 3 earlier
    "with 7"       line 7 is there
    "without 4"    line 4 is missing
    "1 at 0"       line 1 stands in place 0, the first

    Several are joined by "and", alternatives by "or": "with 7 and 7 before 1 or without 2".
    """
    if not isinstance(wrong, str):
        return order == tuple(wrong)
    place = {line: n for n, line in enumerate(order)}
    return any(all(_holds(part, place) for part in parts) for parts in _parsed(wrong))


@cache
def _parsed(wrong: str) -> list[list[tuple]]:
    """The alternatives, each a list of parts as (word, number, number or None)."""
    return [[_part(part) for part in alternative.split(" and ")] for alternative in wrong.split(" or ")]


def _part(text: str) -> tuple:
    match text.split():
        case [line, "before" | "at" as word, other]:
            return word, int(line), int(other)
        case ["with" | "without" as word, line]:
            return word, int(line), None
    raise ValueError(f'{text!r} is none of "3 before 2", "with 7", "without 4", "1 at 0"')


def _holds(part: tuple, place: dict[int, int]) -> bool:
    word, line, other = part
    if word == "without":
        return line not in place
    if line not in place:
        return False
    if word == "before":
        return other in place and place[line] < place[other]
    return word == "with" or place[line] == other


def mistake(exercise: Exercise, order: tuple[int, ...]) -> Misconception | None:
    """The first misconception on record that an order shows."""
    return next((m for m in exercise.misconceptions if shows(order, m.wrong)), None)


def near(exercise: Exercise) -> Iterator[tuple[int, ...]]:
    """Wrong orders: first those one step from a right one, then those two steps away.

    A step moves a line, leaves one out, or puts a distractor in, also in a line's stead. Orders
    that lack more than one line are left out: they are told the number of lines, whatever else.
    """
    known, fewest = set(exercise.right_orders), len(exercise.lines) - 1
    reached = exercise.right_orders
    for _ in range(2):
        before, reached = reached, []
        for order in chain.from_iterable(_steps(exercise, order) for order in before):
            if len(order) >= fewest and order not in known:
                known.add(order)
                reached.append(order)
                yield order


def _steps(exercise: Exercise, order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    first = len(exercise.lines)
    extra = [n for n in range(first, first + len(exercise.distractors)) if n not in order]
    for i, line in enumerate(order):
        rest = order[:i] + order[i + 1:]
        yield rest
        for j in range(len(order)):
            yield rest[:j] + (line,) + rest[j:]
        for other in extra:
            yield rest[:i] + (other,) + rest[i:]
    for other in extra:
        for i in range(len(order) + 1):
            yield order[:i] + (other,) + order[i:]


def example(exercise: Exercise, misconception: Misconception) -> tuple[int, ...] | None:
    """An order that is told as this misconception; None if none was found."""
    if not isinstance(misconception.wrong, str):
        return tuple(misconception.wrong)
    return next((order for order in near(exercise) if mistake(exercise, order) is misconception), None)


def wrong_orders(exercise: Exercise) -> list[tuple[int, ...]]:
    """Wrong orders of the right lines, all of them or the near ones, and near ones with a distractor."""
    count = len(exercise.lines)
    close = [order for order in islice(near(exercise), 5_000)
             if len(order) >= count and not (count <= EVERY and max(order) < count)]
    every = permutations(range(count)) if count <= EVERY else ()
    return close + [order for order in every if order not in exercise.right_orders]


def problems(exercise: Exercise) -> list[str]:
    """What is wrong with an order's record, as sentences."""
    found = [] if exercise.distractors else ["an order needs a distractor that is a real mistake"]
    found += [f"{m.name}: the right order {order} shows it too"
              for order in exercise.right_orders if (m := mistake(exercise, order))]
    nameless = [order for order in wrong_orders(exercise) if mistake(exercise, order) is None]
    if nameless:
        found.append(f"{len(nameless)} wrong orders show no mistake on record, as {nameless[0]}")
    return found
