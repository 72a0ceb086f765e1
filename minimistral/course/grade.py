"""`minimistral grade FOLDER`: run a class's notebooks, each fenced in, and say what passes.

Three kinds of processes, so that no submission speaks its own verdict: this one, which reads the
folder, starts and ends the others; one for each notebook (grade_run), which runs the learner's code
and hands over outputs; and one that compares those outputs (`_judging`), which never runs any of the
learner's code. A verdict thus depends on outputs alone.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from threading import Lock

from . import grade_fence
from .exercises import Exercise, all_exercises, find_exercise
from .grade_collect import Notebook, Student, asked, read_folder
from .grade_fence import Available, Ending, Limits, available, watch

PASSED, NOT_YET, NOT_WRITTEN = "passed", "not yet", "not written"
CRASHED, LIMIT, UNREADABLE = "crashed", "limit", "unreadable"
NO_CHECK, NOT_HANDED_IN = "no check", "not handed in"
RANKS = (PASSED, NOT_YET, LIMIT, CRASHED, NOT_WRITTEN, NO_CHECK, UNREADABLE, NOT_HANDED_IN)
JUDGING_SECONDS = 120.0


@dataclass
class Grade:
    """What is said about one student's work at one exercise."""

    exercise: Exercise
    status: str
    message: str = ""
    misconception: str = ""
    limit: str = ""  # which one, if a limit ended it
    notebook: str = ""

    @property
    def label(self) -> str:
        return f"{self.limit} limit" if self.status == LIMIT else self.status

    @property
    def points(self) -> int:
        return self.exercise.points if self.status == PASSED else 0


@dataclass
class Row:
    """One student's grades, one for each exercise of the assignment, and what else is to be told."""

    student: str
    grades: dict[str, Grade]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def points(self) -> int:
        return sum(grade.points for grade in self.grades.values())

    @property
    def passed(self) -> int:
        return sum(grade.status == PASSED for grade in self.grades.values())


@dataclass
class Report:
    """Everything that a grading found."""

    folder: str
    when: str
    exercises: list[Exercise]
    rows: list[Row]
    fences: list[tuple[str, bool, str]]
    notes: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        return sum(exercise.points for exercise in self.exercises)


def main(
    folder: str | Path, out: str | Path | None = None, *, chapter: int | None = None,
    seconds: float = 180.0, memory: float = 4.0, jobs: int | None = None,
) -> int:
    """Grade every submission below `folder`; write tables and an overview to `out`.

    Returns 0 when every submission was graded, whatever its grades. Raises ValueError for a folder
    without notebooks or a limit that makes no sense.
    """
    from . import grade_pages

    folder = Path(folder)
    out = Path(out) if out else folder.with_name(f"{folder.stem}-graded")
    for name, value in (("seconds", seconds), ("memory", memory), ("jobs", jobs)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value:g} must be at least 1")
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise ValueError(
            f"{out} lies inside the folder of submissions; choose a place outside with --out"
        )
    report = grade(
        folder, Limits(seconds=seconds, memory_gb=memory), chapter=chapter, jobs=jobs,
        tell=lambda line: print(line, flush=True),
    )
    out.mkdir(parents=True, exist_ok=True)
    for path in grade_pages.write(report, out):
        print(f"written: {path}")
    return 0


def grade(
    folder: Path, limits: Limits, *, chapter: int | None = None, jobs: int | None = None,
    fences: Available | None = None, tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run and judge all submissions; nothing in `folder` is changed, and nothing written."""
    students = read_folder(folder, chapter)
    exercises = asked(students)
    fences = fences or available()
    if jobs is None:
        jobs = max(1, min(4, (os.cpu_count() or 2) // 2))
    number = sum(len(student.notebooks) for student in students)
    tell(f"{len(students)} students, {number} notebooks, {len(exercises)} exercises")
    for what, holds, how in fences.sentences(limits):
        if not holds:
            tell(f"  {what}: {how}")
    guard, judge = _Guard(folder), _Judge()
    when = datetime.now().astimezone().isoformat(timespec="minutes")
    report = Report(str(folder), when, exercises, [], fences.sentences(limits))

    def one(student: Student) -> Row:
        row = _grade_student(student, exercises, limits, fences, judge)
        if changed := guard.put_back():
            names = ", ".join(changed)
            report.notes.append(f"While {student.name}'s work ran, {names} was changed; it was put back.")
        head = f"{student.name}: {row.passed} of {len(exercises)} passed, {row.seconds:.0f} s"
        tell("\n  ".join([head, *row.notes]))
        return row

    grade_fence.stop.clear()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                report.rows = list(pool.map(one, students))
            except BaseException:  # Ctrl-C ends the notebooks that run, too
                grade_fence.stop.set()
                raise
    finally:
        judge.close()
    return report


# ---------------------------------------------------------------- one student


def _grade_student(student: Student, exercises, limits: Limits, fences: Available, judge: _Judge) -> Row:
    row = Row(student.name, {e.key: Grade(e, NOT_HANDED_IN) for e in exercises})
    row.notes += [f"{path} is too large and was left out" for path in student.left_out]
    for notebook in student.notebooks:
        try:
            found, seconds = _grade_notebook(student, notebook, limits, fences, judge, row.notes)
        except Exception as error:  # of this program: the others are graded all the same
            told, seconds = f"could not be graded ({type(error).__name__}: {error})", 0.0
            found = {key: (CRASHED, f"It {told}", "", "") for key in notebook.calls}
            row.notes.append(f"{notebook.name} {told}")
        row.seconds += seconds
        if notebook.broken:
            found = {key: (UNREADABLE, notebook.broken, "", "") for key in row.grades}
            row.notes.append(f"{notebook.name}: {notebook.broken}")
        for key, (status, message, misconception, limit) in found.items():
            new = Grade(find_exercise(key), status, message, misconception, limit, notebook.name)
            if key in row.grades and RANKS.index(status) < RANKS.index(row.grades[key].status):
                row.grades[key] = new
    return row


def _grade_notebook(
    student: Student, notebook: Notebook, limits: Limits, fences: Available, judge: _Judge, notes: list[str]
) -> tuple[dict[str, tuple], float]:
    """(status, message, misconception, limit) of each exercise that the notebook checks; seconds."""
    if notebook.broken or not notebook.calls:
        return {}, 0.0
    with tempfile.TemporaryDirectory(prefix="minimistral-grade-", ignore_cleanup_errors=True) as name:
        home = Path(name).resolve()
        ending = _run(student, notebook, home, limits, fences)
        results = judge.ask(home / "out", list(notebook.calls))
        cells = _cells(home / "out" / "cells.jsonl", len(notebook.cells))
        _make_deletable(home)
    if ending.limit:
        notes.append(f"{notebook.name}: stopped at the {ending.limit} limit after {ending.seconds:.0f} s")
    elif ending.code and cells["last"] is None:
        said = ending.output.strip().splitlines()[-1:] or ["nothing was said"]
        notes.append(f"{notebook.name}: could not be started ({said[0][:200]})")
    elif ending.code != 0 or cells["last"] != len(notebook.cells) - 1:
        notes.append(f"{notebook.name}: its process ended in code cell {(cells['last'] or 0) + 1}")
    late = sorted(cells["late"])
    hungry = [n for n, told in sorted(cells["errors"].items())
              if told.startswith("MemoryError") or "can't allocate memory" in told]
    notes += [f"{notebook.name}: code cell {n + 1} ran too long and was stopped" for n in late]
    notes += [f"{notebook.name}: code cell {n + 1} was refused memory" for n in hungry]
    found = {}
    for key, at in notebook.calls.items():
        found[key] = tuple(results[key]) if key in results else _no_result(at, ending, cells)
    return found, ending.seconds


def _no_result(at: int, ending: Ending, cells: dict) -> tuple[str, str, str, str]:
    """Why a check that stands in cell `at` gave nothing."""
    where = f"Code cell {at + 1}"
    if at in cells["late"]:
        return LIMIT, f"{where} ran too long and was stopped.", "", "time"
    if at in cells["errors"]:
        before = cells["errors"].get(at - 1)
        before = f"; the cell before it with {before}" if before else ""
        return CRASHED, f"{where} stopped with {cells['errors'][at]}{before}", "", ""
    last = cells["last"]
    if last is not None and last <= at:
        why = f"at the {ending.limit} limit" if ending.limit else "by itself"
        how = "" if last == at else f"; code cell {at + 1} was not reached"
        told = f"The notebook's process ended {why} in code cell {last + 1}{how}."
        return (LIMIT if ending.limit else CRASHED), told, "", ending.limit
    if last is None:
        return (LIMIT if ending.limit else CRASHED), "The notebook could not be started.", "", ending.limit
    return NO_CHECK, f"{where} ran, and no check of it came back.", "", ""


def _run(student: Student, notebook: Notebook, home: Path, limits: Limits, fences: Available) -> Ending:
    """Run one notebook on a copy of what its student handed in."""
    for name in ("here", "out", "tmp", "home", "work"):
        (home / name).mkdir()
    for path, content in student.files.items():
        copy = home / "here" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    job = {"cells": notebook.cells, "limits": asdict(limits), "fences": asdict(fences),
           "cell_seconds": max(1.0, limits.seconds / 3)}
    (home / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-P", grade_fence.__file__, "run", str(home)]
    return watch(command, home, _environment(home), limits, home / "out" / "cells.jsonl")


KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT", "SYSTEMDRIVE", "COMSPEC",
        "PATHEXT", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "MINIMISTRAL_DATA")


def _environment(home: Path) -> dict[str, str]:
    """No secret of the instructor's shell, and every folder that programs write to inside `home`."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    folders = {name: str(home / "tmp") for name in ("TMPDIR", "TEMP", "TMP")}
    folders |= {name: str(home / "home") for name in ("HOME", "USERPROFILE", "IPYTHONDIR", "MPLCONFIGDIR")}
    with contextlib.suppress(ImportError, OSError):  # Matplotlib takes seconds to look for fonts anew
        import matplotlib

        for fonts in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
            shutil.copy(fonts, home / "home")
    return kept | folders | {
        "MINIMISTRAL_WORK": str(home / "work"), "MPLBACKEND": "agg", "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def _cells(path: Path, count: int) -> dict:
    """What the process said about its cells; it may say anything, so only plain facts are kept."""
    from .grade_outputs import Unreadable, read_bytes

    found = {"last": None, "errors": {}, "late": set()}
    with contextlib.suppress(Unreadable, UnicodeDecodeError):
        for line in read_bytes(path).decode("utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                said = json.loads(line)
                number = said.get("begun", said.get("cell"))
                if type(number) is not int or not 0 <= number < count:
                    continue
                if "begun" in said:
                    found["last"] = number
                elif "late" in said:
                    found["late"].add(number)
                else:
                    found["errors"][number] = str(said["error"])[:300]
    return found


def _make_deletable(home: Path) -> None:
    """A submission may have taken rights away from its own folders."""
    for place, folders, _ in os.walk(home):
        for name in folders:
            with contextlib.suppress(OSError):
                path = Path(place, name)
                path.is_symlink() or path.chmod(0o700)


# ---------------------------------------------------------------- the folder stays as it was


class _Guard:
    """Knows every file of the folder, and puts back what a submission changed or deleted."""

    def __init__(self, folder: Path):
        self.lock = Lock()
        found = [folder] if folder.is_file() else folder.rglob("*")
        paths = [path for path in found if path.is_file() and not path.is_symlink()]
        self.folder = folder if folder.is_dir() else folder.parent
        self.files = {path: (self._mark(path), path.read_bytes()) for path in paths}

    @staticmethod
    def _mark(path: Path):
        with contextlib.suppress(OSError):
            found = path.lstat()
            return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode
        return None

    def put_back(self) -> list[str]:
        """Names of the files that were changed since the last look; they are as before now."""
        changed = []
        with self.lock:
            for path, (mark, content) in self.files.items():
                if self._mark(path) == mark:
                    continue
                changed.append(path.relative_to(self.folder).as_posix())
                if path.is_symlink():
                    path.unlink()
                elif path.is_dir():
                    shutil.rmtree(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                path.write_bytes(content)
                if mark:
                    path.chmod(mark[3] & 0o777)
                    os.utime(path, ns=(mark[2], mark[2]))
                self.files[path] = (self._mark(path), content)
        return changed


# ---------------------------------------------------------------- the verdict, in a process of its own


class _Judge:
    """Asks the judging process, one question at a time; a new one takes over if it fails."""

    def __init__(self):
        self.lock = Lock()
        self._start()

    def ask(self, folder: Path, keys: list[str]) -> dict[str, list[str]]:
        """[status, message, misconception, limit] for each exercise of which something came back."""
        found = {}
        with self.lock:
            for key in keys:
                found |= self._ask(folder, key)
        return found

    def _ask(self, folder: Path, key: str) -> dict[str, list[str]]:
        try:
            if self.process is None:
                self._start()
            if not self.ready:
                if not self.line.poll(grade_fence.START):
                    raise EOFError("it does not start")
                self.ready = bool(self.line.recv_bytes())
            self.line.send_bytes(json.dumps([str(folder), key]).encode())
            if self.line.poll(JUDGING_SECONDS):
                return json.loads(self.line.recv_bytes())
            told = f"what came back could not be compared within {JUDGING_SECONDS:g} seconds"
        except (OSError, EOFError):
            told = "what came back ended the comparison"
        self.close()
        return {key: [CRASHED, told, "", ""]}

    def _start(self) -> None:
        context, self.ready = multiprocessing.get_context("spawn"), False
        self.line, other = context.Pipe()
        self.process = context.Process(target=_judging, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def close(self) -> None:
        if self.process is not None:
            self.line.close()
            self.process.kill()
            self.process.join(10)
        self.process = self.line = None


def _judging(line) -> None:
    """Compare what came back, for as long as somebody asks. What the records give is remembered."""
    import torch

    from . import checks
    from .grade_outputs import Unreadable, take_over

    torch.set_num_threads(1)
    all_exercises()
    line.send_bytes(b"ready")  # the first question's time does not pay for the start
    run = cache(checks.Outcomes)
    statuses = {checks.PASS: PASSED, checks.TRY_AGAIN: NOT_YET, checks.NOT_WRITTEN: NOT_WRITTEN,
                checks.NOT_ANSWERED: NOT_WRITTEN}
    while True:
        try:
            folder, key = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            return
        answer = {}
        try:
            attempt = take_over(find_exercise(key), Path(folder))
            if attempt:
                result = checks.verdict(attempt, run=run, pictures=False)
                status, told = statuses[result.status], "" if result.passed else result.message
                if result.matched == "unchanged":  # a bug hunt as it was given out
                    answer[key] = [NOT_WRITTEN, told, "", ""]
                else:
                    answer[key] = [status, told, result.matched or "", ""]
        except Unreadable as problem:
            answer[key] = [CRASHED, f"what came back is no result of a check ({problem})", "", ""]
        except Exception as error:
            answer[key] = [CRASHED, f"what came back cannot be compared ({type(error).__name__})", "", ""]
        line.send_bytes(json.dumps(answer).encode())
