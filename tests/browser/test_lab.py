"""A learner's first minutes: a chapter in a real JupyterLab, run to its end, offline."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_chapter_runs_to_its_end(lab, tab):
    lab.open(tab, ROOT / "notebooks" / "02_attention.ipynb")
    assert not tab.problems, tab.problems
    assert tab.asked - {None, ""} <= {"127.0.0.1"}, f"the page asked {tab.asked}"
