"""The learner's progress, in work/progress.json: what passed, what was tried, what was bet.

A damaged file is kept beside and a new one begun; writing is atomic; two notebooks may write at
the same time. Nothing here ever stops a check: without a writable folder progress lasts as long
as the kernel.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from minimistral import lab
from minimistral.files import write_whole

from .panel import Panel

REPORT = "MINIMISTRAL_REPORT"  # names the file in which `minimistral check` reads results

_in_memory: dict | None = None  # used once the folder has proved unwritable


def work_folder() -> Path:
    """Where the learner's own things are kept.

    Under ``MINIMISTRAL_TESTING=1`` a temporary folder of this process, so that no automated run
    depends on an earlier one; else ``MINIMISTRAL_WORK`` if it is set; else the nearest course
    folder called "work", upwards from here, or the place for one in a copy of the course (on a
    hub the notebooks are opened where they were fetched to); else that of the course beside the
    package; else ./work.
    """
    if os.environ.get("MINIMISTRAL_TESTING") == "1":
        return _temporary_folder()
    if folder := os.environ.get("MINIMISTRAL_WORK"):
        return Path(folder)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if folder.name == "work" and _is_ours(folder):
            return folder
        if _is_ours(folder / "work") or all((folder / name).is_dir() for name in ("notebooks", "exercises")):
            return folder / "work"
    return lab.course_work_folder()


def _is_ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("progress.json", "mine", "notebooks", "exercises"))


@cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="minimistral-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _empty() -> dict:
    return {"version": 1, "exercises": {}, "predictions": {}, "ladder": []}


def load_progress() -> dict:
    """The whole record: {"exercises": ..., "predictions": ..., "ladder": ...}."""
    if _in_memory is not None:
        return _in_memory
    path = work_folder() / "progress.json"
    try:
        return {**_empty(), **_checked(json.loads(path.read_text(encoding="utf-8")))}
    except FileNotFoundError:
        return _empty()
    except (ValueError, OSError):  # damaged: keep it for repair, begin a new one
        with contextlib.suppress(OSError):
            os.replace(path, _free_name(path))
        return _empty()


def _checked(data) -> dict:
    empty = _empty()
    if not isinstance(data, dict) or any(
        name in data and type(data[name]) is not type(value) for name, value in empty.items()
    ):
        raise ValueError("not a progress file")
    if not all(isinstance(entry, dict) for entry in data.get("exercises", {}).values()):
        raise ValueError("not a progress file")
    return data


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"progress.damaged-{n}.json") for n in range(1, 1000))
    return next(name for name in names if not name.exists())


def update_progress(change: Callable[[dict], None]) -> dict:
    """Read, change, write back; returns the new record."""
    global _in_memory
    try:
        folder = work_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "progress.lock"):
            data = load_progress()
            change(data)
            if _in_memory is None:
                write_whole(folder / "progress.json", json.dumps(data, indent=1, ensure_ascii=False))
    except OSError:
        _in_memory = load_progress()
        change(_in_memory)
        data = _in_memory
    return data


@contextlib.contextmanager
def _lock(path: Path, patience: float = 2.0) -> Iterator[None]:
    """A file that only one process can create; one left by a crash is taken over."""
    began = time.monotonic()
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            break
        except (FileExistsError, PermissionError):  # Windows says "permission" while it is deleted
            if not path.exists() and not os.access(path.parent, os.W_OK):
                raise
            if time.monotonic() - began > patience:
                break
            time.sleep(0.01)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- what is recorded


def entry_of(data: dict, key: str) -> dict:
    blank = {"status": "", "attempts": 0, "hints": 0, "misconceptions": {}}
    entry = data["exercises"].setdefault(key, {})
    for name, value in blank.items():
        entry.setdefault(name, value)
    return entry


def record_check(exercise, result) -> None:
    """Count an attempt. A stub is no attempt, and a pass is never lost again."""
    if report := os.environ.get(REPORT):
        line = {"key": exercise.key, "status": result.status, "message": result.message,
                "matched": result.matched or ""}
        with open(report, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
    if result.status not in ("pass", "try again"):
        return

    def change(data):
        entry = entry_of(data, exercise.key)
        entry["attempts"] += 1
        if entry["status"] != "pass":
            entry["status"] = result.status
        if result.matched:
            met = entry["misconceptions"]
            met[result.matched] = met.get(result.matched, 0) + 1

    update_progress(change)


def hint(name: str) -> Panel:
    """The next of an exercise's three hints; the third is repeated."""
    from .exercises import find_exercise

    exercise = find_exercise(name)

    def change(data):
        entry = entry_of(data, exercise.key)
        entry["hints"] = min(entry["hints"] + 1, max(1, len(exercise.hints)))

    step = update_progress(change)["exercises"][exercise.key]["hints"]
    if not exercise.hints:
        return Panel(f"{exercise.title}: no hints for this one", tone="wait")
    shown = exercise.hints[step - 1]
    heading = f"Hint {step} of {len(exercise.hints)} · {shown.symptom}"
    last = ("The last hint. The library's own cell comes next: read it, then write yours." if exercise.piece
            else "The last hint. The solution is in the folder solutions.")
    more = [] if step < len(exercise.hints) else [last]
    return Panel(heading, [shown.text, *more], tone="wait")


def progress() -> Panel:
    """What is yours so far: exercises by chapter, and the core pieces."""
    from .exercises import all_exercises, chapter_exercises
    from .syllabus import CHAPTERS

    done = load_progress()["exercises"]

    def passed(exercises):
        return sum(done.get(e.key, {}).get("status") == "pass" for e in exercises)

    rows = []
    for chapter in CHAPTERS:
        exercises = chapter_exercises(chapter.number)
        if exercises:
            pieces = [e for e in exercises if e.piece]
            yours = f"{passed(pieces)} of {len(pieces)}" if pieces else "-"
            rows.append((f"{chapter.number} {chapter.title}", f"{passed(exercises)} of {len(exercises)}", yours))
    pieces = [e for e in all_exercises() if e.piece]
    names = [e.piece.split(".")[-1] for e in pieces if done.get(e.key, {}).get("status") == "pass"]
    lines = [f"Core pieces that are yours: {len(names)} of {len(pieces)}"]
    if names:
        lines[0] += f" ({', '.join(names)})"
    return Panel("Your progress", lines, table=(("Chapter", "Exercises passed", "Core pieces"), rows))
