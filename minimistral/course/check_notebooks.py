"""`minimistral check`: run the learner's notebooks from the terminal and say what passes.

Each notebook runs in a kernel of its own, from an own working copy in memory: no file of the
learner's changes. What ``check`` says there comes back through a report file.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .exercises import chapter_exercises
from .progress import REPORT, work_folder
from .syllabus import CHAPTERS, EXERCISES, NOTEBOOKS, Chapter, chapter

SECONDS = 180  # for one notebook


@dataclass
class NotebookRun:
    """What running one notebook gave."""

    path: Path
    results: dict[str, dict] = field(default_factory=dict)  # exercise key -> last report
    errors: list[str] = field(default_factory=list)  # cells that raised
    broken: str = ""  # why it could not be run to its end


def main(number: int | None = None, *, work: Path | None = None, seconds: float = SECONDS) -> int:
    """Check one chapter's notebooks in the work folder, or those of all chapters that are there.

    Prints one line per exercise. Returns 0 if every notebook ran to its end and everything
    attempted passes; what is not written yet is no failure. Returns 1 otherwise.
    Raises ValueError for an unknown chapter or one that is not in the work folder.
    """
    work = Path(work or work_folder())
    wanted = CHAPTERS if number is None else [chapter(number)]
    there = [c for c in wanted if any(path.exists() for path in _notebooks(work, c))]
    if not there:
        what = "no exercises" if number is None else f"no notebook of chapter {number}"
        raise ValueError(f"{work} has {what}; `minimistral lab` copies the course there")
    failed = [c.number for c in there if not _check_chapter(work, c, seconds)]
    if failed:
        print(f"Something to repair in chapter {', '.join(map(str, failed))}.")
    return 1 if failed else 0


def _notebooks(work: Path, wanted: Chapter) -> list[Path]:
    """The chapter's story, where its pieces are written, and its exercises."""
    return [work / wanted.path(folder) for folder in (NOTEBOOKS, EXERCISES)]


def _check_chapter(work: Path, wanted: Chapter, seconds: float) -> bool:
    print(f"Chapter {wanted.number}: {wanted.title}", flush=True)
    runs = [run_notebook(path, seconds) for path in _notebooks(work, wanted) if path.exists()]
    results = {key: result for run in runs for key, result in run.results.items()}
    good = True
    for exercise in chapter_exercises(wanted.number):
        result = results.get(exercise.key, {"status": "not checked", "message": "", "matched": ""})
        status, message = result["status"], ""
        if status == "try again" and result["matched"] == "unchanged":
            status = "bug not found yet"
        elif status == "try again":
            good, message = False, f": {result['message']}"
        print(f"  {status.upper():<18}{exercise.name:<24}{exercise.title}{message}")
    for run in runs:
        for problem in [*run.errors, *filter(None, [run.broken])]:
            good = False
            print(f"  PROBLEM           {run.path.parent.name}/{run.path.name}: {problem}")
    passed = sum(result["status"] == "pass" for result in results.values())
    print(f"  {passed} of {len(chapter_exercises(wanted.number))} passed", flush=True)
    return good


def run_notebook(path: Path, seconds: float = SECONDS) -> NotebookRun:
    """Run a notebook's cells in a new kernel, at most ``seconds`` for all of them."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    run = NotebookRun(path)
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # not JSON, not a notebook, not readable
        run.broken = f"not a readable notebook ({type(error).__name__}: {_one_line(error)})"
        return run
    deadline = None

    def time_left(cell) -> int:
        nonlocal deadline  # the clock starts with the first cell, not with the kernel
        deadline = deadline or time.monotonic() + seconds
        return max(1, int(deadline - time.monotonic()))

    with tempfile.TemporaryDirectory(prefix="minimistral-") as folder:
        report = Path(folder) / "report.jsonl"
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            allow_errors=True,
            timeout_func=time_left,
            startup_timeout=120,
            resources={"metadata": {"path": str(path.parent)}},
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
        try:
            client.execute(env={**os.environ, REPORT: str(report), "MPLBACKEND": "agg"})
        except CellTimeoutError:
            run.broken = f"stopped after {seconds:g} seconds"
        except DeadKernelError:
            run.broken = "its kernel died (out of memory, or the process was ended)"
        run.results = _read_report(report)
    run.errors = _errors(notebook)
    return run


def _read_report(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["key"]: line for line in lines}


def _errors(notebook) -> list[str]:
    """Cells that raised and were not meant to."""
    found = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for n, cell in enumerate(cells, start=1):
        tags = cell.metadata.get("tags", [])
        for output in cell.get("outputs", []):
            if output.output_type == "error" and "raises-exception" not in tags:
                found.append(f"code cell {n} stopped with {output.ename}: {_one_line(output.evalue)}")
    return found


def _one_line(text) -> str:
    return " ".join(str(text).split())[:200]
