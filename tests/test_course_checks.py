"""The check engine against everything a learner's function may do to it."""

import dataclasses
import random
import sys
import threading
import time
from itertools import permutations

import numpy as np
import pytest
import torch
from course_examples import (
    ALL, CHOICE, HINTS, NUMBER, ORDER, PIECE, WEIGHTS, by_hand, chapter_99, columns, naive, weights_of,
)

from minimistral.course import check, hint, judge, lines, orders, verify
from minimistral.course.checks import NOT_ANSWERED, NOT_WRITTEN, PASS, TRY_AGAIN
from minimistral.course.compare import difference, overview
from minimistral.course.exercises import Misconception, all_exercises, find_exercise
from minimistral.course.sandbox import GLOBALS, guarded
from minimistral.course.watchdog import TimeIsUp, time_limit

HURRIED = dataclasses.replace(WEIGHTS, seconds=0.3)


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_records_of_this_file_are_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize("mistake", WEIGHTS.misconceptions, ids=lambda m: m.name)
def test_each_misconception_is_told_with_its_own_message(mistake):
    result = judge(WEIGHTS, mistake.wrong)
    assert result.status == TRY_AGAIN and not result
    assert result.matched == mistake.name
    assert result.message.startswith(mistake.message)


def test_a_message_gets_expected_and_actual_at_one_index():
    assert judge(WEIGHTS, columns).message.endswith(
        "At [0, 0] expected 0.2847, got 0.6582. (Input: three unequal rows.)"
    )


def test_a_mistake_that_shows_on_one_fixture_only_is_matched():
    assert judge(WEIGHTS, naive).matched == "overflow"


def test_of_two_mistakes_the_one_that_shows_first_is_named():
    result = judge(WEIGHTS, lambda s: columns(s) if len(s) == 3 else s.half())
    assert result.matched == "columns" and result.message.endswith("check again when it is repaired.")
    assert judge(WEIGHTS, lambda s: columns(s) + 1 if len(s) == 3 else columns(s)).matched is None


def test_a_misconception_runs_no_further_than_to_the_input_that_rules_it_out():
    runs = []

    def other(scores):
        runs.append(tuple(scores.shape))
        return scores + 1

    others = dataclasses.replace(WEIGHTS.misconceptions[0], name="other", wrong=other)
    exercise = dataclasses.replace(WEIGHTS, misconceptions=[others, *WEIGHTS.misconceptions])
    assert judge(exercise, columns).matched == "columns" and len(runs) == 1 < len(WEIGHTS.fixtures)

    def fails(scores):
        return scores.view(7)

    runs.clear()
    assert judge(exercise, fails).matched is None and len(runs) == 1  # errors are compared twice


SIX = torch.tensor([[1.0, -2.0, 4.0], [0.5, 3.0, 8.0]])


@pytest.mark.parametrize("actual, told", [
    (SIX * 2.5, "Every value is 2.5 times the expected one."),
    (-SIX, "Every value has the other sign."),
    (SIX - 0.25, "Every value is 0.25 too small."),
    (SIX * 0, "Every value is 0."),
    (SIX.flip(1), "The numbers are the expected ones, in other places."),
    (SIX.T, "The numbers are the expected ones, in another shape."),
    (torch.ones(3), ""),
    (SIX.square(), "Of 6 values 5 are wrong."),
    (SIX + torch.tensor([0.0, 0.0, 7.0]), "Of 6 values 2 are wrong, all at index 2 of axis 1."),
    (SIX + 7 * (SIX == 8), "Of 6 values one is wrong."),
    (SIX.exp(), "All 6 values are wrong."),
    (SIX * torch.nan, "All 6 values are wrong."),
    (SIX / 0, "All 6 values are wrong."),
    (SIX * 1.00005, "Of 6 values 5 are wrong."),
])
def test_an_unknown_mistake_is_told_by_what_all_values_have_in_common(actual, told):
    assert overview(difference(SIX, actual)) == told
    result = judge(dataclasses.replace(WEIGHTS, reference=lambda s: SIX, misconceptions=[]), lambda s: actual)
    assert told in result.message


@pytest.mark.parametrize("expected, actual, told", [
    ([5, 7, 7], [5, 9], "The first difference: at [1] expected 7, got 9."),
    ([0.5, 0.25], [0.5], "As far as the shorter one goes, they agree."),
    ([5, 7], [], ""),
    (5, 7, ""),
    (torch.tensor([True, False]), torch.tensor([True, True]), "Of 2 values one is wrong."),
])
def test_an_unknown_mistake_in_a_list_is_told_by_its_first_difference(expected, actual, told):
    assert overview(difference(expected, actual)) == told


def test_digits_that_are_shown_show_the_difference():
    assert difference(89808, 56208.4).text == "expected 89808, got 56208"
    assert difference(0.12345678, 0.12345999).text == "expected 0.12345678, got 0.12345999"
    assert difference(torch.tensor(89808.0), torch.tensor(89803.0)).text == "expected 89808, got 89803"


def test_where_in_pytorch_an_error_arose_is_left_out():
    def fails(scores):
        raise RuntimeError("shape '[3]' is invalid\nException raised from infer_size_impl at InferSize.h:35")

    assert judge(WEIGHTS, fails).message.startswith("It stopped with RuntimeError: shape '[3]' is invalid. (")


def test_one_mistake_made_in_two_ways_is_told_by_the_same_message():
    first, *others = WEIGHTS.misconceptions
    two = dataclasses.replace(first, also=[lambda s: naive(s).T])
    assert judge(dataclasses.replace(WEIGHTS, misconceptions=[two, *others]), two.also[0]).matched == "overflow"
    assert judge(WEIGHTS, two.also[0]).matched is None
    partly = dataclasses.replace(first, also=[columns])
    exercise = dataclasses.replace(WEIGHTS, misconceptions=[partly, *others[1:]])
    assert judge(exercise, lambda s: columns(s) if len(s) == 3 else s.half()).matched == "overflow"
    hidden = dataclasses.replace(first, also=[others[0].wrong])
    found = verify(dataclasses.replace(WEIGHTS, misconceptions=[*others, hidden]))
    assert any(p.startswith("overflow: told as columns") for p in found)


def test_the_line_that_failed_is_the_learners_own_below_a_decorator():
    @torch.no_grad()
    def fails(scores):
        return scores.view(7)

    assert judge(WEIGHTS, fails).message.endswith("The line: return scores.view(7)")


def test_an_error_between_two_lines_is_told_without_a_line():
    """Where time is up an error comes at any instruction, also at one that belongs to no line."""
    def fails(scores):
        raise ValueError("here")

    fails.__code__ = fails.__code__.replace(co_linetable=b"\xff" * 9)
    message = judge(WEIGHTS, fails).message
    assert "ValueError: here" in message and "The line" not in message


def test_equivalent_solutions_pass():
    assert judge(WEIGHTS, by_hand).status == PASS
    assert judge(WEIGHTS, lambda s: np.asarray(weights_of(s)))
    assert judge(WEIGHTS, lambda s: weights_of(s).tolist())
    assert judge(WEIGHTS, lambda s: weights_of(s.double()))


# ---------------------------------------------------------------- awful code


def loops(scores):
    while True:
        pass


def swallows_everything(scores):
    while True:
        try:
            scores = scores + 1
        except:  # noqa: E722
            pass


def sleeps(scores):
    time.sleep(60)


@pytest.mark.parametrize("awful", [loops, swallows_everything, sleeps])
def test_endless_code_is_stopped(awful):
    began = time.perf_counter()
    result = judge(HURRIED, awful)
    assert time.perf_counter() - began < 3
    assert result.status == TRY_AGAIN and "longer than 0.3 seconds" in result.message


def test_the_time_limit_works_in_another_thread():
    stopped = []

    def work():
        try:
            with time_limit(0.2):
                loops(None)
        except TimeIsUp:
            stopped.append(True)
        sum(range(100_000))  # nothing arrives late

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5)
    assert stopped == [True]


def test_no_alarm_is_left_behind():
    for _ in range(50):
        with time_limit(0.02):
            pass
    time.sleep(0.05)


def exits(scores):
    sys.exit(0)


def interrupts(scores):
    raise KeyboardInterrupt


def recurses(scores):
    return recurses(scores)


def multiplies(scores):
    product = scores @ scores
    return product


def asks(scores):
    return input("which?")


def swallowed_memory(scores):
    raise MemoryError


@pytest.mark.parametrize(
    "awful, words",
    [
        (exits, "called exit"),
        (interrupts, "interrupted"),
        (recurses, "calls itself without end"),
        (multiplies, "The line: product = scores @ scores"),
        (asks, "keyboard input"),
        (swallowed_memory, "MemoryError"),
        (lambda s: None or s.missing, "AttributeError"),
    ],
)
def test_code_that_raises_is_survived_and_explained(awful, words):
    result = judge(WEIGHTS, awful)
    assert result.status == TRY_AGAIN and words in result.message


def test_a_flood_of_text_is_captured(capsys):
    def floods(scores):
        for _ in range(10_000):
            print("<b>" * 350)
        return weights_of(scores)

    result = judge(WEIGHTS, floods)
    assert capsys.readouterr() == ("", "")
    assert result.passed
    assert "It printed 21,020,000 characters" in result.notes[0]
    assert "<b>" not in result._repr_html_() and "&lt;b&gt;" in result._repr_html_()
    assert len(repr(result)) < 1000


def test_writing_into_an_input_is_a_mistake_even_if_the_values_are_right():
    def writes(scores):
        scores -= scores.amax(-1, keepdim=True)
        return weights_of(scores)

    result = judge(WEIGHTS, writes)
    assert result.status == TRY_AGAIN and "wrote into its input scores" in result.message
    assert judge(dataclasses.replace(WEIGHTS, may_change_inputs=True), writes).passed
    known = Misconception("writes", writes, "You changed the scores themselves; work on a copy.")
    result = judge(dataclasses.replace(WEIGHTS, misconceptions=[known]), writes)
    assert result.matched == "writes"


def test_global_state_is_put_back_and_told():
    def meddles(scores):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        sys.setrecursionlimit(5000)
        return weights_of(scores)

    before = {name: read() for name, (read, _) in GLOBALS.items()}
    result = judge(WEIGHTS, meddles)
    after = {name: read() for name, (read, _) in GLOBALS.items()}
    assert before == after
    assert result.passed
    for name in ("torch's global random state", "torch's default dtype", "the gradient mode"):
        assert name in result.notes[0]


def test_a_check_draws_no_random_number():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    judge(WEIGHTS, lambda s: weights_of(s) + torch.rand(1) * 0)
    assert torch.equal(torch.rand(4), wanted)


def test_the_same_buffer_returned_twice_is_seen_as_it_was():
    buffer = {}

    def reuses(scores):
        result = weights_of(scores)
        return buffer.setdefault(scores.shape, result).copy_(result)

    assert judge(WEIGHTS, reuses).passed


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda s: weights_of(s)[None], "Expected shape (3, 5), got (1, 3, 5)."),
        (lambda s: weights_of(s).half(), "Expected float32, got float16 (the dtype)."),
        (lambda s: weights_of(s).bool(), "Expected float32, got bool"),
        (lambda s: weights_of(s) * float("nan"), "At [0, 0] expected 0.2847, got NaN (not a number)."),
        (lambda s: "weights", "Expected a tensor of shape (3, 5), got str 'weights'."),
        (lambda s: (weights_of(s),), "Expected a tensor of shape (3, 5), got a tuple of 1."),
        (lambda s: {"weights": weights_of(s)}, "got a dict of 1"),
        (lambda s: weights_of(s) * 1.0001, "At [0, 0] expected 0.28"),
    ],
)
def test_a_wrong_result_is_described_exactly(wrong, words):
    result = judge(WEIGHTS, wrong)
    assert result.status == TRY_AGAIN and words in result.message


def test_a_forgotten_return_is_named():
    def forgets(scores):
        weights = weights_of(scores)  # noqa: F841

    assert "is a return missing" in judge(WEIGHTS, forgets).message


def dots(scores): ...


def only_words(scores):
    """To be written."""


def half_done(scores):
    weights = ...
    return weights


def not_implemented(scores):
    raise NotImplementedError


class NotWritten(torch.nn.Module):
    def forward(self, x):
        raise NotImplementedError


@pytest.mark.parametrize("stub", [dots, only_words, half_done, not_implemented, None, ...])
def test_a_stub_is_not_written_yet(stub):
    assert judge(WEIGHTS, stub).status == NOT_WRITTEN


def test_a_reference_that_raises_asks_for_the_same_kind_of_error():
    def refuses(scores):
        raise ValueError(f"shape {scores.shape}")

    def refuses_in_other_words(scores):
        raise ValueError("no")

    exercise = dataclasses.replace(WEIGHTS, reference=refuses, misconceptions=(), equivalents={})
    assert judge(exercise, refuses_in_other_words)
    assert "Expected ValueError, got a tensor" in judge(exercise, weights_of).message


def test_an_ellipsis_index_is_no_stub():
    def fine(scores):
        return weights_of(scores)[..., :]

    assert judge(WEIGHTS, fine).passed


@pytest.mark.parametrize("thing", [3, torch.ones(2), "weights"])
def test_a_result_instead_of_the_function_is_told(thing):
    assert "without calling it" in judge(WEIGHTS, thing).message


def test_wrong_parameters_are_told_before_anything_runs():
    assert judge(WEIGHTS, lambda a, b: a).message == "weights_of takes (scores); yours takes (a, b)."


def test_classes_are_checked_through_run():
    class Doubler(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    exercise = dataclasses.replace(
        WEIGHTS, reference=Doubler, run=lambda cls, x: cls()(x), misconceptions=(), equivalents={}
    )
    assert judge(exercise, Doubler).passed
    assert judge(exercise, NotWritten).status == NOT_WRITTEN
    assert not judge(exercise, torch.nn.Identity)


def test_a_mask_is_drawn_beside_the_expected_one():
    result = judge(PIECE, PIECE.misconceptions[0].wrong)
    assert " x . . . .   |   . . . . ." in repr(result)
    assert "<pre>" in result._repr_html_()


def test_a_picture_that_fails_does_not_stop_the_check():
    broken = dataclasses.replace(WEIGHTS, picture=lambda expected, actual: 1 / 0)
    assert judge(broken, columns).matched == "columns"


# ---------------------------------------------------------------- typed answers


def test_orders():
    right = ORDER.spell(range(4))
    assert judge(ORDER, right).passed
    assert judge(ORDER, right.lower().replace(" ", ", ")).passed
    assert judge(ORDER, list(right.replace(" ", ""))).passed
    assert judge(ORDER, ORDER.spell((0, 1, 3, 2))).matched == "late mask"
    assert judge(ORDER, ORDER.spell((3, 2, 1, 0))).matched == "late mask"  # whatever else is wrong
    assert judge(ORDER, ORDER.spell((4, 0, 1, 2))).matched == "wrong axis"
    assert judge(ORDER, ORDER.spell((0, 2, 1, 3))).matched == "late scale"
    assert judge(ORDER, ORDER.spell((0, 2, 3))).message == "One line is missing."
    assert "at most once" in judge(ORDER, "A A B C").message
    assert "unknown: Z" in judge(ORDER, "A Z").message
    assert "4 lines are needed" in judge(ORDER, ORDER.spell((0, 1))).message
    for nothing in (None, "", "...", ...):
        assert judge(ORDER, nothing).status == NOT_ANSWERED


@pytest.mark.parametrize("shown, mistake", [
    (True, "2 before 0"), (False, "0 before 2"), (False, "2 before 7"), (True, "with 2"),
    (True, "without 7"), (True, "0 at 1"), (False, "7 at 1"), (False, "with 7 and with 2"),
    (True, "with 7 and with 2 or without 3"), (True, (2, 0, 1)), (False, (2, 0)),
])
def test_an_order_shows_a_mistake(shown, mistake):
    assert orders.shows((2, 0, 1), mistake) is shown


def test_a_mistake_that_nobody_can_read_is_refused():
    with pytest.raises(ValueError, match="'3 after 2' is none of"):
        orders.shows((0, 1), "3 after 2")


@pytest.mark.parametrize("told, words", [
    (ORDER.misconceptions[:2], "wrong orders show no mistake on record"),
    ((*ORDER.misconceptions, Misconception("right", "0 before 3", "It is right, and yet it is told.")),
     "the right order (0, 1, 2, 3) shows it too"),
    ((*ORDER.misconceptions, Misconception("late again", "3 before 2 and 2 before 1", "It came too late.")),
     "late again: told as None"),
])
def test_an_order_whose_wrong_orders_are_not_all_told_is_not_sound(told, words):
    found = verify(dataclasses.replace(ORDER, misconceptions=told))
    assert any(words in problem for problem in found), found


EVERY_ORDER = [e for e in all_exercises() if e.kind == "order" and len(e.lines) <= 6]


@pytest.mark.parametrize("exercise", EVERY_ORDER, ids=lambda e: e.key)
def test_of_all_orders_of_the_lines_each_is_right_or_told(exercise):
    told = {order: judge(exercise, exercise.spell(order))
            for order in permutations(range(len(exercise.lines)))}
    right = [order for order, result in told.items() if result.passed]
    assert sorted(right) == sorted(exercise.right_orders)
    assert all(result.matched for result in told.values() if not result.passed)


def test_answers():
    assert judge(NUMBER, 10) and judge(NUMBER, "10") and judge(NUMBER, torch.tensor(10))
    assert judge(NUMBER, 16).matched == "all"
    assert judge(NUMBER, 11).message == "11 is too large."
    assert not judge(NUMBER, "ten")
    assert judge(CHOICE, " b ") and judge(CHOICE, "A").matched == "queries"
    assert judge(CHOICE, "X").message == "Answer with one letter of A B C."
    assert judge(CHOICE, "").status == NOT_ANSWERED


def test_the_lines_of_an_order_are_shown_shuffled(chapter_99):
    shown = str(lines("steps"))
    assert all(line in shown for line in [*ORDER.lines, *ORDER.distractors])
    assert ORDER.spell(range(4)) != "A B C D"
    assert "A   the queries" in str(lines("axis"))


# ---------------------------------------------------------------- verify finds bad records


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"misconceptions": WEIGHTS.misconceptions[:4]}, "4 misconceptions, at least 5"),
        ({"hints": HINTS[:2]}, "2 hints"),
        ({"reference": columns}, "by hand is refused"),
        ({"equivalents": {"also": naive}}, "also is refused"),
        ({"fixtures": [lambda: (torch.rand(2, 3),)]}, "different inputs each time"),
        ({"fixtures": ()}, "needs fixtures"),
        ({"kind": "bug"}, "named 'unchanged'"),
        ({"fixtures": WEIGHTS.fixtures[:1]}, "overflow: passes as if it were right"),
    ],
)
def test_verify_complains(change, complaint):
    assert complaint in "; ".join(verify(dataclasses.replace(WEIGHTS, **change)))


@pytest.mark.parametrize(
    "message, complaint",
    [
        ("Wrong.", "has 1 words"),
        ("word " * 31, "has 31 words"),
        ("Divide by the sum with scores.sum(-1) here please.", "contains code"),
        ("Use `keepdim` so that the rows stay in place.", "contains code"),
    ],
)
def test_verify_reads_messages(message, complaint):
    mistake = Misconception("columns", columns, message)
    exercise = dataclasses.replace(WEIGHTS, misconceptions=[mistake, *WEIGHTS.misconceptions[2:]])
    assert complaint in "; ".join(verify(exercise))


def test_verify_finds_a_mistake_hidden_behind_another():
    twin = Misconception("twin", lambda s: torch.softmax(s, -2), "The same mistake as another one on record.")
    exercise = dataclasses.replace(WEIGHTS, misconceptions=[*WEIGHTS.misconceptions, twin])
    assert any(p.startswith("twin: told as columns") for p in verify(exercise))


def test_verify_wants_a_message_for_every_option():
    exercise = dataclasses.replace(CHOICE, options=(*CHOICE.options, "the batch"))
    assert "option D has no message" in verify(exercise)


# ---------------------------------------------------------------- check itself


def test_check_finds_exercises_by_name_key_and_function(chapter_99):
    assert check("weights", weights_of) and check("ch99.weights", weights_of) and check(weights_of)
    with pytest.raises(ValueError, match="did you mean weights"):
        find_exercise("wieghts")
    with pytest.raises(ValueError, match='check\\("name", by_hand\\)'):
        check(by_hand)


def test_check_without_work_is_not_answered(chapter_99):
    assert check("steps").status == NOT_ANSWERED


def test_hints_come_one_by_one(chapter_99):
    shown = [str(hint("weights")) for _ in range(4)]
    assert [s.split(" · ")[0] for s in shown] == ["Hint 1 of 3", "Hint 2 of 3", "Hint 3 of 3", "Hint 3 of 3"]
    assert "My rows do not sum to one" in shown[0] and "Which axis" in shown[0]


def test_a_result_is_a_panel_that_a_screen_reader_announces():
    page = judge(WEIGHTS, columns)._repr_html_()
    assert 'role="status"' in page and "TRY AGAIN" in page
    assert "background" not in page and ";color:" not in page  # the page's theme decides


def test_guarded_keeps_the_beginning_of_what_was_printed():
    run = guarded(lambda: print("x" * 5000))
    assert (len(run.printed), run.printed_length) == (1000, 5001)


# ---------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    "expected, actual, equal",
    [
        (torch.tensor([1.0, 1e-9]), torch.tensor([1.0, 2e-9]), True),  # one row: its largest counts
        (torch.tensor([[1.0], [1e-9]]), torch.tensor([[1.0], [2e-9]]), False),  # rows on their own
        (torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1e-9]), False),
        (torch.tensor([float("-inf"), 1.0]), torch.tensor([float("-inf"), 1.0]), True),
        (torch.tensor([float("-inf"), 1.0]), torch.tensor([-1e30, 1.0]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), True),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), False),
        (torch.tensor([True]), torch.tensor([1]), False),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.004], dtype=torch.bfloat16), True),
        ([1.0, 2.0], torch.tensor([1.0, 2.0]), True),
        ([1, 2], (1, 2), True),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1.0}, {"a": 1.0 + 1e-7}, True),
        ({"a": 1}, {"b": 1}, False),
        (0.1 + 0.2, 0.3, True),
        (3, 3.0, True),
        (1, True, False),
        (True, True, True),
        ("a", "b", False),
        (None, None, True),
        (None, 0, False),
        (torch.tensor(2.0), 2.0, True),
        (torch.tensor([[1.0, 2.0]]), [[1.0, 2.0]], True),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), True),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j]), False),
    ],
)
def test_difference(expected, actual, equal):
    assert (difference(expected, actual) is None) == equal


def test_a_piece_must_keep_the_exact_dtype():
    assert difference(torch.ones(2), torch.ones(2).double(), same_dtype=True).kind == "dtype"
    assert difference(torch.ones(2), [1.0, 1.0], same_dtype=True).kind == "type"


def test_digits_are_added_until_a_difference_shows():
    found = difference(torch.tensor([1.0]), torch.tensor([1.00002]))
    assert "expected 1," not in found.text or "1.00002" in found.text


@pytest.mark.parametrize("kind", [list, tuple])
def test_plain_numbers_are_compared_as_they_are(kind):
    assert difference((0.1, 0.25), kind([0.1, 0.25])) is None
    assert difference([0.5, 1.0], kind([0.5, 1])) is None
    assert difference([0.1, 0.25], kind([0.1, 0.26])).kind == "value"
