"""`minimistral check`: notebooks as learners leave them, each in a kernel of its own."""

import nbformat
import pytest

from minimistral.course import check_notebooks
from minimistral.course.check_notebooks import main, run_notebook
from minimistral.course.exercises import Exercise, Hint, Misconception

# what the kernel of a test notebook needs: chapter 99 exists there too
SETUP = """
import sys
sys.path.insert(0, {tests!r})
from course_examples import *
from minimistral.course import check, exercises
exercises.chapter_exercises = lambda n: ALL if n == 99 else ()
"""


@pytest.fixture
def write(tmp_path):
    def write(*cells, name="99_test", tags=()):
        nodes = [nbformat.v4.new_code_cell(cell, metadata={"tags": list(tags)}) for cell in cells]
        path = tmp_path / "work" / "exercises" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=nodes), path)
        return path

    return write


@pytest.fixture
def setup(request):
    return SETUP.format(tests=str(request.path.parent))


def test_what_a_notebook_says_comes_back(write, setup):
    path = write(
        setup,
        "def weights_of(scores):\n    return scores.softmax(0)\ncheck('weights', weights_of)",
        "1 / 0",
        "def (",
        "def weights(scores):\n    raise NotImplementedError\ncheck('causal', causal)",
        "check('pairs', 10), check('steps', '')",
    )
    run = run_notebook(path, seconds=500)
    assert run.broken == ""
    assert {key: result["status"] for key, result in run.results.items()} == {
        "ch99.weights": "try again", "ch99.causal": "pass",
        "ch99.pairs": "pass", "ch99.steps": "not answered yet",
    }
    assert run.results["ch99.weights"]["matched"] == "columns"
    assert [error.split(":")[0] for error in run.errors] == [
        "code cell 3 stopped with ZeroDivisionError", "code cell 4 stopped with SyntaxError",
    ]


def test_a_notebook_that_never_ends_is_stopped(write):
    run = run_notebook(write("while True: pass", "print(1)"), seconds=2)
    assert run.broken == "stopped after 2 seconds"


def test_a_kernel_that_dies_is_reported(write):
    assert "kernel died" in run_notebook(write("import os; os._exit(1)")).broken


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"cells": 3}'])
def test_a_file_that_is_no_notebook_is_reported(tmp_path, content):
    path = tmp_path / "broken.ipynb"
    path.write_bytes(content)
    assert run_notebook(path).broken.startswith("not a readable notebook")


# ---------------------------------------------------------------- the command, without kernels


def fake(name, kind="function"):
    three = tuple(Hint(f"{n}", "?") for n in range(3))
    return Exercise(name, 2, name.title(), kind, "easy", "useful", 5, entry=name, hints=three,
                    misconceptions=(Misconception("unchanged", None, "The bug is still there."),))


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    def command(results, errors=(), broken="", number=2):
        folder = tmp_path / "work" / "exercises"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "02_attention.ipynb").touch()
        monkeypatch.setattr(check_notebooks, "chapter_exercises", lambda n: [fake(name) for name in "abc"])
        reports = {f"ch02.{name}": {"status": s, "message": "Hm.", "matched": m} for name, (s, m) in results.items()}
        monkeypatch.setattr(
            check_notebooks, "run_notebook",
            lambda path, seconds: check_notebooks.NotebookRun(path, reports, list(errors), broken),
        )
        status = main(number, work=tmp_path / "work")
        return status, capsys.readouterr().out

    return command


def test_all_is_well_with_passes_and_stubs(command):
    status, out = command({"a": ("pass", ""), "b": ("not written yet", "")})
    assert status == 0
    assert "PASS              a" in out and "NOT WRITTEN YET   b" in out and "NOT CHECKED       c" in out
    assert "1 of 3 passed" in out


def test_an_untouched_bug_hunt_is_no_failure(command):
    status, out = command({"a": ("try again", "unchanged")})
    assert status == 0 and "BUG NOT FOUND YET" in out


@pytest.mark.parametrize(
    "results, errors, broken, words",
    [
        ({"a": ("try again", "")}, (), "", "TRY AGAIN         a                       A: Hm."),
        ({"a": ("pass", "")}, ["code cell 3 stopped with NameError: x"], "", "exercises/02_attention.ipynb: code cell 3"),
        ({}, (), "stopped after 180 seconds", "stopped after 180 seconds"),
    ],
)
def test_what_must_be_repaired_gives_status_1(command, results, errors, broken, words):
    status, out = command(results, errors, broken)
    assert status == 1 and words in out and "Something to repair in chapter 2." in out


def test_a_chapter_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="minimistral lab"):
        main(2, work=tmp_path)
    with pytest.raises(ValueError, match="no chapter 77"):
        main(77, work=tmp_path)
