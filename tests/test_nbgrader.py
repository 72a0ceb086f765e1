"""The exercises as a school's nbgrader takes them: its own commands, one right and one wrong student.

Chapter 0 always; MINIMISTRAL_NBGRADER=all takes every chapter, some minutes.
"""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from minimistral.course import checks
from minimistral.course.exercises import chapter_exercises, find_exercise

pytest.importorskip("nbgrader")

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = sorted(ROOT.glob("exercises/[0-9][0-9]_*.ipynb"))
CHOSEN = EXERCISES if os.environ.get("MINIMISTRAL_NBGRADER") == "all" else EXERCISES[:1]


def graded(path: Path) -> dict:
    """The cells that nbgrader grades, by their grade_id."""
    cells = nbformat.read(path, 4).cells
    return {c.metadata.nbgrader.grade_id: c for c in cells if "nbgrader" in c.metadata}


@pytest.mark.parametrize("path", EXERCISES, ids=lambda p: p.stem)
def test_every_check_is_a_locked_cell_with_points(path):
    from nbgrader.nbgraderformat import MetadataValidator

    cells = graded(path)
    assert cells.keys() == graded(ROOT / "solutions" / path.name).keys()
    inside = {e.key.replace(".", "_"): e for e in chapter_exercises(int(path.stem[:2])) if e.kind != "piece"}
    assert cells.keys() <= inside.keys() and len(cells) >= min(5, len(inside) - 1)
    for name, cell in cells.items():
        assert cell.source.startswith(f'check("{inside[name].name}"') and "\n" not in cell.source
        said = cell.metadata.nbgrader
        assert said.points == inside[name].points and said.grade and said.locked and not said.solution
    MetadataValidator().validate_nb(nbformat.read(path, 4))


def test_under_nbgrader_what_has_not_passed_raises(monkeypatch):
    name, right = "ch07.cache_bytes", find_exercise("ch07.cache_bytes").reference
    assert checks.check(name, right) and not checks.check(name, lambda *args: 0)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert checks.check(name, right)
    with pytest.raises(AssertionError, match="TRY AGAIN · The bytes of a cache"):
        checks.check(name, lambda *args: 0)
    with pytest.raises(AssertionError, match="NOT WRITTEN YET"):
        checks.check(name, ...)


def nbgrader(folder: Path, *arguments: str) -> str:
    """Run one of nbgrader's commands; its own helpers are looked for beside this Python."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MINIMISTRAL_TESTING", "MINIMISTRAL_WORK")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments], cwd=folder, env=environment, timeout=1200,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_a_right_student_has_all_points_and_a_wrong_one_none(tmp_path):
    """Assign, hand in, grade, export. The wrong one hands in what was given out, and a trick."""
    (tmp_path / "nbgrader_config.py").write_text(
        'c = get_config()\nc.CourseDirectory.course_id = "minimistral"\n'
        "c.Execute.timeout = 120\nc.Execute.startup_timeout = 300\n", encoding="utf-8"
    )
    (tmp_path / "source" / "first").mkdir(parents=True)
    for path in CHOSEN:
        shutil.copy(path, tmp_path / "source" / "first")
    nbgrader(tmp_path, "generate_assignment", "first", "--create")
    released = tmp_path / "release" / "first"
    for student in ("right", "wrong"):
        (tmp_path / "submitted" / student).mkdir(parents=True)
        shutil.copytree(released, tmp_path / "submitted" / student / "first")
    for path in CHOSEN:
        shutil.copy(ROOT / "solutions" / path.name, tmp_path / "submitted" / "right" / "first")
    trick = tmp_path / "submitted" / "wrong" / "first" / CHOSEN[0].name
    notebook = nbformat.read(trick, 4)
    for cell in notebook.cells:
        if "nbgrader" in cell.metadata:
            cell.source = "pass  # a check that I like better"
    nbformat.write(notebook, trick)
    nbgrader(tmp_path, "autograde", "first", "--create")
    nbgrader(tmp_path, "export")
    with (tmp_path / "grades.csv").open(encoding="utf-8") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    points = sum(find_exercise(name.replace("_", ".", 1)).points for path in CHOSEN for name in graded(path))
    assert {s: (float(r["score"]), float(r["max_score"])) for s, r in rows.items()} == {
        "right": (points, points), "wrong": (0, points)}
    told = graded(tmp_path / "autograded" / "wrong" / "first" / CHOSEN[0].name)
    assert all("AssertionError" in str(cell.outputs) for cell in told.values())


def test_nbgrader_validates_the_solutions(tmp_path):
    shutil.copy(ROOT / "solutions" / CHOSEN[0].name, tmp_path)
    assert "passes all the tests" in nbgrader(tmp_path, "validate", CHOSEN[0].name)
