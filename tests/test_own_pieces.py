"""Every story, for a learner who has come through: each stub is filled, each piece is their own.

The stories' stored outputs are those of a reader who has written nothing. Here every piece of the
whole course is saved, the stubs of the story are filled with them, and every cell has to run.
"""

import ast
import math
from pathlib import Path

import nbformat
import pytest

from minimistral.course.check_notebooks import run_notebook
from minimistral.course.exercises import all_exercises, chapter_exercises
from minimistral.course.pieces import load_pieces, save_piece
from minimistral.course.syllabus import CHAPTERS

ROOT = Path(__file__).parents[1]
FILLED = """
from minimistral.course.pieces import load_pieces
{name} = load_pieces()[0]["{piece}"]
"""


def block_forward(self, x, positions, angles, cache=None):
    x = x + self.attention(self.attention_norm(x), positions, angles, cache)
    return x + self.feed_forward(self.ffn_norm(x))


def learning_rate(step, config):
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    part = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    low = config.min_lr * config.lr
    return low + (config.lr - low) * (1 + math.cos(math.pi * part)) / 2


# Written out where none on record stands alone, as a piece that is saved must.
WRITTEN = {"ch04.block": block_forward, "ch05.learning_rate": learning_rate}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMISTRAL_WORK", str(folder))
        patch.delenv("MINIMISTRAL_TESTING")                  # it gives every process a folder of its own
        pieces = [exercise for exercise in all_exercises() if exercise.kind == "piece"]
        for exercise in pieces:
            known = [WRITTEN.get(exercise.key), exercise.reference, *exercise.equivalents.values()]
            said = (save_piece(exercise, own) for own in known if own is not None)
            assert any(not sentence.startswith(("Not saved", "Its source")) for sentence in said), exercise.key
        assert set(load_pieces()[0]) == {exercise.piece for exercise in pieces}
        yield folder


def fill(source: str, chapter: int) -> str:
    """A cell in which each piece that it checks is the learner's own."""
    pieces = {e.name: e.piece for e in chapter_exercises(chapter) if e.kind == "piece"}
    lines = source.splitlines()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
             and getattr(node.func, "id", "") == "check" and len(node.args) == 2
             and getattr(node.args[0], "value", None) in pieces and isinstance(node.args[1], ast.Name)]
    for call in sorted(calls, key=lambda call: -call.lineno):
        lines.insert(call.lineno - 1, FILLED.format(name=call.args[1].id, piece=pieces[call.args[0].value]))
    return "\n".join(lines)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: f"{chapter.number:02d}")
def test_a_story_runs_with_every_piece_the_learners_own(chapter, work, monkeypatch):
    monkeypatch.setenv("MINIMISTRAL_WORK", str(work))
    monkeypatch.delenv("MINIMISTRAL_TESTING", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")               # two workers, two cores
    story = ROOT / chapter.path("notebooks")
    notebook = nbformat.read(story, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "your-turn" in cell.metadata.get("tags", []):
            cell.source = fill(cell.source, chapter.number)
    copy = work / chapter.path("notebooks")
    copy.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, copy)
    run = run_notebook(copy, seconds=600)
    assert not run.broken and not run.errors, (run.broken, run.errors)
    for exercise in chapter_exercises(chapter.number):
        if exercise.kind == "piece":
            assert run.results[exercise.key]["status"] == "pass", run.results[exercise.key]
