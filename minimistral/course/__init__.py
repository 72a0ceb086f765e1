"""The classroom: checks, hints, progress, figures, and your own pieces in the shipped model."""

from .checks import check, judge, lines, verify
from .exercises import Exercise, Hint, Misconception
from .pieces import mine, swap
from .progress import hint, progress

__all__ = [
    "Exercise", "Hint", "Misconception", "check", "hint", "judge", "lines", "mine", "progress",
    "swap", "verify",
]
