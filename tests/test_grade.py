"""`minimistral grade`: a hostile class is graded to its end, and nobody speaks his own verdict."""

import csv
import json
import os
import time
import zipfile
from functools import cache
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

from minimistral import cli
from minimistral.course import grade, grade_pages
from minimistral.course.checks import Attempt, attempted, outcomes_of, verdict
from minimistral.course.exercises import chapter_exercises, find_exercise
from minimistral.course.grade_collect import read_folder
from minimistral.course.grade_fence import Available, Limits, available
from minimistral.course.grade_outputs import Unreadable, hand_over, take_over
from minimistral.course.soundness import typed_wrong

HEAD = "from minimistral.course import check"
RIGHT = """def cache_bytes(config, length, batch_size, number_bytes):
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * length * batch_size * number_bytes
"""
WRONG = RIGHT.replace("2 * config", "config")
CHECK, ORDER = 'check("cache_bytes", cache_bytes)', 'check("grouped_in_order", "D A E C B H F")'
BYTES, LINES = "ch07.cache_bytes", "ch07.grouped_in_order"
ASLEEP = "1807"  # seconds; how the test knows processes that a submission left
STUBBORN = "import itertools\nsum(itertools.repeat(0))"  # in C code: no signal is heard
ALONE = """import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
assert [name for _, name in socket.if_nameindex()] == ["lo"], "there is a network"
"""


def notebook(path: Path, *cells: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nodes = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=nodes), path)
    return path


def asleep() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if ASLEEP in (p.info["cmdline"] or [])]


# ---------------------------------------------------------------- a hostile class

LIMITS = Limits(seconds=24, memory_gb=2, output_mb=2, processes=12)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder, what was in it, and the report."""
    folder = tmp_path_factory.mktemp("hostile") / "class"
    victim = folder / "anna" / "07_shared_heads.ipynb"
    fake = "import json, os\nfor key in ('ch07.cache_bytes', 'ch07.grouped_in_order'):\n" \
           "    path = os.path.join('..', 'out', key + '.json')\n" \
           "    open(path, 'w').write(json.dumps({'status': 'pass', 'message': 'PASS', 'answer': ['none'], " \
           "'outcomes': []}))\n    open(path.replace('.json', '.safetensors'), 'wb').write(b'')"
    patch = "import minimistral.course as course, minimistral.course.checks as checks\n" \
            "checks.verdict = checks.judge = lambda *a, **k: checks.Result(a[0].exercise, 'pass')\n" \
            "checks.difference = lambda *a, **k: None\nprint('PASS 2 of 2')"
    many = f"import subprocess, sys, time\nfor n in range(30):\n    subprocess.Popen([sys.executable, '-c', " \
           f"'import time; time.sleep({ASLEEP})', '{ASLEEP}'], start_new_session=True)\ntime.sleep(60)"
    submissions = {
        "anna": (HEAD, RIGHT, CHECK, ORDER),
        "deletes": (HEAD, "import shutil, os\nshutil.rmtree(os.getcwd())", RIGHT + CHECK, ORDER),
        "fakes": (HEAD, WRONG + CHECK, fake, "raise SystemExit", "import os\nos._exit(0)", ORDER),
        "floods": (HEAD, RIGHT + CHECK, "while True:\n    print('x' * 10_000)", ORDER),
        "forks": (HEAD, RIGHT + CHECK, many, ORDER),
        "leaves": (HEAD, RIGHT + CHECK, "import os\nos._exit(0)", ORDER),
        "loops": (HEAD, RIGHT + CHECK, STUBBORN, ORDER),
        "memory": (HEAD, "hoard = bytearray(10 * 2**30)", RIGHT + CHECK, ORDER),
        "network": (HEAD, RIGHT + CHECK, ALONE + ORDER),
        "patches": (HEAD, patch, WRONG + CHECK, "check('grouped_in_order', 'A')"),
        "waits": (HEAD, "name = input('your name? ')", "import sys\nsys.stdin.read()\nsys.exit(1)",
                  "while True: pass", RIGHT + CHECK, ORDER),
        "writes": (HEAD, f"open({str(victim)!r}, 'w').write('gone')",
                   f"import shutil\nshutil.rmtree({str(folder / 'deletes')!r})", WRONG + CHECK, ORDER),
    }
    for name, cells in submissions.items():
        notebook(folder / name / "07_shared_heads.ipynb", *cells)
    (folder / "broken").mkdir()
    (folder / "broken" / "07_shared_heads.ipynb").write_text('{"cells": [', encoding="utf-8")
    before = {path: path.read_bytes() for path in folder.rglob("*.ipynb")}
    began = time.monotonic()
    report = grade.grade(folder, LIMITS, jobs=2)
    print(f"{len(before)} submissions in {time.monotonic() - began:.0f} s")
    return folder, before, report


@pytest.mark.parametrize(
    ("student", "labels"),
    {
        "anna": ("passed", "passed"),
        "broken": ("unreadable", "unreadable"),
        "deletes": ("passed", "passed"),
        "fakes": ("crashed", "crashed"),
        "floods": ("passed", "output limit"),
        "forks": ("passed", "processes limit"),
        "leaves": ("passed", "crashed"),
        "loops": ("passed", "time limit"),
        "memory": ("passed", "passed"),
        "patches": ("not yet", "not yet"),
        "waits": ("passed", "passed"),
        "writes": ("not yet", "passed"),
    }.items(),
)
def test_everybody_is_graded_to_the_end(hostile, student, labels):
    row = next(row for row in hostile[2].rows if row.student == student)
    messages = [grade.message for grade in row.grades.values()]
    assert (row.grades[BYTES].label, row.grades[LINES].label) == labels, [*messages, *row.notes]


def test_no_submission_changed_another_one(hostile):
    folder, before, report = hostile
    assert {path: path.read_bytes() for path in folder.rglob("*.ipynb")} == before
    if available().landlock:
        assert report.notes == []


def test_what_a_submission_started_ends_with_it(hostile):
    assert asleep() == []


def test_limits_held_and_are_told(hostile):
    rows = {row.student: row for row in hostile[2].rows}
    assert LIMITS.seconds <= rows["loops"].seconds < LIMITS.seconds + 10
    assert "stopped at the time limit" in rows["loops"].notes[0]
    assert any("code cell 2 was refused memory" in note for note in rows["memory"].notes)
    assert "code cell 4 ran too long" in rows["waits"].notes[0]
    assert "ended" in rows["leaves"].notes[0] and "cell 3" in rows["leaves"].grades[LINES].message


def test_the_network_is_cut_off_where_that_is_possible(hostile):
    told = {what: holds for what, holds, _ in hostile[2].fences}
    assert told["network"] == available().namespaces
    row = next(row for row in hostile[2].rows if row.student == "network")
    if told["network"]:
        assert row.grades[LINES].status == "passed", row.grades[LINES].message


def test_the_report_names_the_misconception(hostile):
    row = next(row for row in hostile[2].rows if row.student == "patches")
    assert row.grades[BYTES].misconception == "keys only"


# ---------------------------------------------------------------- without the kernel's help


def test_without_fences_changes_are_put_back_and_strays_are_ended(tmp_path):
    """As on a system without namespaces and Landlock."""
    folder = tmp_path / "class"
    victim = notebook(folder / "bea.ipynb", HEAD, RIGHT + CHECK)
    stray = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; " \
            f"time.sleep({ASLEEP})', '{ASLEEP}'], start_new_session=True)\ntime.sleep(1)"
    notebook(folder / "carl.ipynb", HEAD, f"open({str(victim)!r}, 'w').write('gone')", stray, ORDER)
    before = victim.read_bytes()
    report = grade.grade(folder, LIMITS, jobs=2, fences=Available())
    assert victim.read_bytes() == before and asleep() == []
    assert len(report.notes) == 1 and "bea.ipynb was changed; it was put back" in report.notes[0]
    assert [row.passed for row in report.rows] == [1, 1]
    unavailable = [what for what, holds, _ in report.fences if not holds]
    assert unavailable == ["network", "other processes", "other files"]
    assert "Not available here" in grade_pages.page(report)


# ---------------------------------------------------------------- what crosses over


@pytest.mark.parametrize(
    "name", ["premium", "rotate", "my_config", "one_step_in_order", "chosen_experts", "answer_rows",
             "split", "whole_characters"],
)
def test_the_verdict_is_the_same_on_the_other_side(name, tmp_path):
    """Of every right and wrong solution on record: status, misconception and words."""
    run, exercise = cache(outcomes_of), find_exercise(name)
    order = exercise.kind == "order"
    right = exercise.spell(exercise.right_orders[0]) if order else exercise.reference
    wrong = [typed_wrong(exercise, m) if order else m.wrong for m in exercise.misconceptions]
    for work in (right, *wrong):
        attempt = attempted(exercise, work)
        hand_over(attempt, tmp_path)
        here = verdict(attempt, run=run, pictures=False)
        there = verdict(take_over(exercise, tmp_path), run=run, pictures=False)
        assert (here.status, here.matched, here.message) == (
            there.status, there.matched, there.message)


EXERCISE = find_exercise(BYTES)


def outcomes(value) -> Attempt:
    attempt = attempted(EXERCISE, EXERCISE.reference)
    for one in attempt.outcomes:
        one.run.value = value
    return attempt


@pytest.mark.parametrize(
    "value",
    [object(), type, print, range(10**9), [[]] * 3, {1: {2, 3}}, float("nan"), 10**5000, "x" * 10**6, b"\x00" * 9,
     torch.zeros(3).to_sparse(), torch.tensor([1 + 2j]), torch.float16, ..., list(range(300_000))],
    ids=lambda value: type(value).__name__,
)
def test_any_result_crosses_or_is_told(value, tmp_path):
    hand_over(outcomes(value), tmp_path)
    try:
        attempt = take_over(EXERCISE, tmp_path)
    except Unreadable:
        return
    assert verdict(attempt, pictures=False).status == "try again"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"status": "pass", "message": "", "answer": ["none"], "outcomes": []}',
     '{"status": "", "message": "", "answer": ["none"], "outcomes": []}',
     '{"status": "", "message": "", "answer": ["object", ["os", "system"], ["command"], []], "outcomes": []}'],
    ids=["empty", "cut", "list", "deep", "pass", "no outcomes", "code"],
)
def test_what_no_check_hands_over_is_refused(text, tmp_path):
    hand_over(outcomes(1), tmp_path)
    (tmp_path / f"{BYTES}.json").write_text(text, encoding="utf-8")
    with pytest.raises(Unreadable):
        take_over(EXERCISE, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of Unix")
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_plain_files_are_read(kind, tmp_path):
    path = tmp_path / f"{BYTES}.json"
    {"link": lambda: path.symlink_to("/etc/passwd"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(Unreadable):
        take_over(EXERCISE, tmp_path)


# ---------------------------------------------------------------- who handed in what


def test_folders_files_and_zips_name_their_students(tmp_path):
    flat, moodle = tmp_path / "flat", tmp_path / "moodle"
    for name in ("anna_02_attention", "02_attention-bea (1)", "02_attention", "smithjo_12345_67890_02_attention"):
        notebook(flat / f"{name}.ipynb", 'check("look", 1)')
    notebook(flat / ".ipynb_checkpoints" / "x.ipynb", "1")
    assert [s.name for s in read_folder(flat)] == ["02_attention", "anna", "bea", "smithjo"]
    inside = notebook(moodle / "Ann Lee_77_assignsubmission_file_" / "work" / "exercises" / "02_attention.ipynb", "1")
    with zipfile.ZipFile(moodle / "Bo Kim.zip", "w") as archive:
        archive.write(inside, "../../02_attention.ipynb")
        archive.writestr("__MACOSX/._02_attention.ipynb", b"?")
    whole = tmp_path / "all.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for path in moodle.rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
    for folder in (moodle, whole):
        found = {s.name: [n.name for n in s.notebooks] for s in read_folder(folder)}
        assert found["Ann Lee"] == ["work/exercises/02_attention.ipynb"]
    assert [n.name for n in read_folder(moodle)[1].notebooks] == ["02_attention.ipynb"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no notebook"):
        read_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder"):
        read_folder(tmp_path / "nowhere")


def test_a_link_is_not_followed_and_a_huge_file_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("minimistral.course.grade_collect.MOST_BYTES", 5000)
    path = notebook(tmp_path / "class" / "dan" / "02.ipynb", "1")
    (path.parent / "data.bin").write_bytes(bytes(6000))
    if os.name == "posix":
        (path.parent / "passwd.ipynb").symlink_to("/etc/passwd")
    (student,) = read_folder(tmp_path / "class")
    assert list(student.files) == ["02.ipynb"] and student.left_out == ["data.bin"]


# ---------------------------------------------------------------- tables, page, command


@pytest.fixture
def report():
    exercises = [find_exercise(BYTES), find_exercise(LINES)]
    evil = '=HYPERLINK("http://x")<script>alert(1)</script>'
    grades = {BYTES: grade.Grade(exercises[0], "not yet", evil, "keys only"),
              LINES: grade.Grade(exercises[1], "passed", "Well.")}
    rows = [grade.Row(evil, grades, ["-1+1"]), grade.Row("+33", grades)]
    return grade.Report("class", "2030-01-01T10:00", exercises, rows, Available().sentences(LIMITS))


def test_tables_hold_no_formula_and_the_page_no_foreign_tag(report, tmp_path):
    overview, wide, long, data = grade_pages.write(report, tmp_path)
    text = overview.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    for path in (wide, long):
        for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()):
            assert not [cell for cell in row if cell[:1] in tuple("=+-@\t\r")]
    rows = list(csv.DictReader(wide.read_text(encoding="utf-8-sig").splitlines()))
    assert [(r["student"][:2], r["points"], r["of"], r[BYTES]) for r in rows] == [
        ("'=", "2", "3", "not yet"), ("'+", "2", "3", "not yet")]
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found["exercises"][0]["misconceptions"] == {"keys only": 2}
    assert found["students"][0]["grades"][LINES]["points"] == 2


def test_a_point_stands_for_five_minutes_begun():
    minutes = {exercise.minutes: exercise.points for n in range(15) for exercise in chapter_exercises(n)}
    assert minutes[5] == 1 and minutes[6] == minutes[10] == 2 and minutes[20] == 4
    assert min(minutes.values()) == 1


def test_the_command_writes_and_refuses(tmp_path, capsys, monkeypatch, report):
    monkeypatch.setattr(grade, "grade", lambda folder, limits, **options: report)
    assert cli.main(["grade", str(tmp_path / "class"), "--seconds", "9", "--jobs", "1"]) == 0
    assert {p.name for p in (tmp_path / "class-graded").iterdir()} == {
        "overview.html", "grades.csv", "details.csv", "grades.json"}
    for wrong, words in ((["--seconds", "0"], "at least 1"), (["--out", str(tmp_path / "class" / "x")], "inside the folder")):
        assert cli.main(["grade", str(tmp_path / "class"), *wrong]) == 2
        assert words in capsys.readouterr().err


def test_nothing_of_the_shell_reaches_a_submission(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    (tmp_path / "home").mkdir()
    environment = grade._environment(tmp_path)
    assert "secret" not in environment.values() and environment["HOME"] == str(tmp_path / "home")
