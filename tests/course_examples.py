"""A chapter of exercises that exists only in tests: number 99, one record of each kind."""

import importlib

import pytest
import torch

from minimistral.course import exercises, syllabus
from minimistral.course.exercises import Exercise, Hint, Misconception

HINTS = (
    Hint("My rows do not sum to one", "Which axis belongs to one query?"),
    Hint("I get NaN", "How large is the exponential of 1000?"),
    Hint("I do not know how to begin", "Subtract, exponentiate, divide."),
)


def three_unequal_rows():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(3, 5, generator=generator) * torch.tensor([[1.0], [30.0], [1e-3]]),)


def values_that_overflow():
    return (torch.tensor([[1000.0, 0.0, -1000.0, 3.0], [0.0, 0.0, 0.0, 0.0]]),)


def weights_of(scores):
    return torch.softmax(scores, -1)


def by_hand(scores):
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def naive(scores):
    e = scores.exp()
    return e / e.sum(-1, keepdim=True)


def columns(scores):
    return torch.softmax(scores, 0)


def not_divided(scores):
    return scores.exp()


def one_by_one(scores):
    return torch.sigmoid(scores)


def raises(scores):
    return scores / scores.sum(1).view(7)


MISTAKES = (
    Misconception("overflow", naive, "Large scores overflow: subtract each row's largest score first."),
    Misconception("columns", columns, "Your columns sum to one instead of your rows; look at the axis."),
    Misconception("not divided", not_divided, "Your weights do not sum to one; divide each row by its sum."),
    Misconception("sigmoid", one_by_one, "Each score is squashed alone; the weights of a row must compete."),
    Misconception("raises", raises, "The sums have another shape than the scores; keep their axis."),
)

WEIGHTS = Exercise(
    "weights", 99, "From scores to weights", "function", "easy", "essential", 5,
    reference=weights_of, entry="weights_of", fixtures=(three_unequal_rows, values_that_overflow),
    equivalents={"by hand": by_hand}, misconceptions=MISTAKES, hints=HINTS,
    praise="These weights hold for scores of any size.",
)

ORDER = Exercise(
    "steps", 99, "The steps of attention", "order", "easy", "useful", 3,
    lines=("scores = q @ k.T", "scores = scores / d", "scores = hide(scores)", "w = softmax(scores, -1)"),
    distractors=("w = softmax(scores, 0)",),
    misconceptions=(
        Misconception("late mask", "3 before 2", "The mask comes after the softmax, too late for it."),
        Misconception("wrong axis", "with 4", "That softmax lets queries compete, not keys."),
        Misconception("no scores yet", "1 before 0", "The scores are divided before there are any."),
        Misconception("late scale", (0, 2, 1, 3), "The scale comes after the mask, in this order alone."),
        Misconception("early mask", "2 before 1", "The mask hides scores that are not finished."),
    ),
    hints=HINTS,
)

NUMBER = Exercise(
    "pairs", 99, "How many pairs", "answer", "easy", "useful", 3, reference=10,
    misconceptions=(
        Misconception("all", 16, "You counted future words too; half of them are hidden."),
        Misconception("no diagonal", 6, "A word sees itself as well; add the diagonal."),
    ),
    hints=HINTS,
)

CHOICE = Exercise(
    "axis", 99, "Which axis", "answer", "easy", "useful", 3, reference="B",
    options=("the queries", "the keys", "the heads"),
    misconceptions=(
        Misconception("queries", "A", "Then each column would sum to one, not each row."),
        Misconception("heads", "C", "Heads never mix here; each has weights of its own."),
    ),
    hints=HINTS,
)


def two_words():
    positions = torch.tensor([0, 1, 2, 7])
    return positions, torch.tensor([0, 1, 2, 3, 7])


def causal(query_positions, key_positions):
    return key_positions[..., None, :] <= query_positions[..., :, None]


PIECE = Exercise(
    "causal", 99, "Nobody sees the future", "piece", "easy", "essential", 5,
    piece="attention.causal", entry="causal", reference=causal, fixtures=(two_words,),
    misconceptions=(
        Misconception("strict", lambda q, k: k[None, :] < q[:, None], "A word must see itself as well."),
        Misconception("reverse", lambda q, k: k[None, :] >= q[:, None], "Your words see the future, not the past."),
        Misconception("transposed", lambda q, k: k[:, None] <= q[None, :], "Rows are queries here, columns keys."),
        Misconception("all", lambda q, k: torch.ones(len(q), len(k)).bool(), "Everybody sees everything; hide the future."),
        Misconception("hides", lambda q, k: k[None, :] > q[:, None], "True must mean that a word may be seen."),
    ),
    hints=HINTS,
)

ALL = (WEIGHTS, ORDER, NUMBER, CHOICE, PIECE)


@pytest.fixture
def chapter_99(monkeypatch, tmp_path):
    """A course of this one chapter, whose learner has an empty work folder."""
    extra = syllabus.Chapter(99, "test", "Test", "Does it work?", (), 1, 1, ())
    monkeypatch.setattr(syllabus, "CHAPTERS", (*syllabus.CHAPTERS, extra))
    monkeypatch.setattr(exercises, "chapter_exercises", lambda n: ALL if n == 99 else ())
    monkeypatch.delenv("MINIMISTRAL_TESTING", raising=False)
    monkeypatch.setenv("MINIMISTRAL_WORK", str(tmp_path / "work"))
    monkeypatch.setattr(importlib.import_module("minimistral.course.progress"), "_in_memory", None)
    return tmp_path / "work"
