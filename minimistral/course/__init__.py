"""The classroom: checks, hints, progress, figures, and your own pieces in the shipped model."""

from .checks import check, judge, lines
from .exercises import Exercise, Hint, Misconception
from .explorers import Button, Choice, Slider, Text, explore
from .figures import show
from .glossary import glossary
from .ladder import ladder
from .pieces import mine
from .predictions import bet, predict, reveal, verdict
from .progress import hint, progress
from .progress_page import progress_page
from .search import mistakes, search
from .soundness import verify
from .swaps import swap

__all__ = [
    "Button", "Choice", "Exercise", "Hint", "Misconception", "Slider", "Text", "bet", "check",
    "explore", "glossary", "hint", "judge", "ladder", "lines", "mine", "mistakes", "predict", "progress",
    "progress_page", "reveal", "search", "show", "swap", "verdict", "verify",
]
