"""How long does the machine work on each section of a story? And does a plan of the guide run through?

    python benchmarks/sections.py [NN ...]          measure these chapters (default: all)
    python benchmarks/sections.py --walk 90         walk through one plan: 90, 240 or 840 minutes

Every notebook is run as a learner runs it: a fresh kernel in a new working folder, cells from top to
bottom, one run; only that PyTorch gets one thread. Seconds are those of the processor, of the kernel and
the processes it starts, so that other work on the machine hardly counts; an idle machine with two threads
is rather faster. The clock's seconds stand beside them. A walk runs the plan's chapters in their order, all
with one working folder, each up to the plan's last section of it, and names the cells that one has to wait for.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import nbformat
import psutil

from minimistral.course.build import PlainClient
from minimistral.course.plans import GUIDE, read_plans
from minimistral.course.sections import read_sections
from minimistral.course.syllabus import CHAPTERS, Chapter
from minimistral.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "sections.json"
LONG = 5.0  # seconds; who waits longer than that should know


def run(chapter: Chapter, work: str, last: int | None = None) -> tuple[dict[int, float], float]:
    """Run a story up to the cell `last`: the processor's seconds for each code cell, and the clock's for all."""
    path = ROOT / chapter.path()
    notebook = nbformat.read(path, 4)
    if last is not None:
        notebook.cells = notebook.cells[: last + 1]
    before, seconds = {}, {}

    def spent() -> float:
        kernel = psutil.Process(client.km.provisioner.pid)
        times = [kernel.cpu_times(), *(child.cpu_times() for child in kernel.children(recursive=True))]
        return sum(t.user + t.system for t in times) + times[0].children_user + times[0].children_system

    def begin(cell_index, **_):
        before[cell_index] = spent()

    def end(cell_index, **_):
        seconds[cell_index] = spent() - before[cell_index]

    client = PlainClient(
        notebook, timeout=300, kernel_name="python3", store_widget_state=False, record_timing=False,
        startup_timeout=180,
        resources={"metadata": {"path": str(path.parent)}}, extra_arguments=["--IPKernelApp.log_level=40"],
        on_cell_execute=begin, on_cell_executed=end,
    )
    start = time.monotonic()
    client.execute(env={**os.environ, "MINIMISTRAL_WORK": work, "OMP_NUM_THREADS": "1"})
    return seconds, time.monotonic() - start


def by_section(chapter: Chapter, seconds: dict[int, float]) -> list[dict]:
    rows = []
    for section in read_sections(chapter, root=ROOT):
        own = {cell: seconds[cell] for cell in section.cells if cell in seconds}
        text = {part.cell: part.text for part in section.parts if part.kind == "code"}
        rows.append({
            "section": section.title, "level": section.level, "seconds": round(sum(own.values()), 2),
            "long cells": [[round(s, 2), text[c].splitlines()[0]] for c, s in own.items() if s > LONG],
        })
    return rows


def keep(part: str, name: str, value: dict) -> None:
    """Put one measurement into the file, beside those of before."""
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    result["what"] = ("seconds of the processor for each section of a story, run cold from top to bottom, "
                      "one thread, one run; walks: the plans of docs/instructors.md, chapter by chapter")
    rows = result.setdefault(part, {})
    rows[name] = value
    result[part] = dict(sorted(rows.items()))
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def measure(chapters: list[Chapter]) -> None:
    for chapter in chapters:
        with tempfile.TemporaryDirectory(prefix="minimistral-", ignore_cleanup_errors=True) as work:
            before = provenance("python benchmarks/sections.py", threads=1)
            seconds, clock = run(chapter, work)
        keep("chapters", chapter.name, {"clock": round(clock, 2), "sections": by_section(chapter, seconds),
                                        "provenance": before})
        print(f"{chapter.name}: {sum(seconds.values()):.1f} s of the processor, {clock:.1f} s by the clock", flush=True)


def walk(minutes: int) -> None:
    """Run a plan's chapters in order, cold; say how long each takes and where one waits."""
    plan = next(p for p in read_plans(GUIDE.read_text(encoding="utf-8")) if p.minutes == minutes)
    before, rows = provenance(f"python benchmarks/sections.py --walk {minutes}", threads=1), []
    with tempfile.TemporaryDirectory(prefix="minimistral-", ignore_cleanup_errors=True) as work:
        for chapter, sections in plan.by_chapter().items():
            found = read_sections(chapter, root=ROOT)
            last = max(part.cell for s in found if s.title in sections for part in s.parts)
            seconds, clock = run(chapter, work, last)
            waits = [[row["section"], s] for row in by_section(chapter, seconds) for s, _ in row["long cells"]]
            rows.append({"chapter": chapter.number, "cells": len(seconds), "seconds": round(sum(seconds.values()), 2),
                         "clock": round(clock, 2), "waits": waits})
            print(rows[-1], flush=True)
    keep("walks", str(minutes), {"chapters": rows, "provenance": before})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", type=int, metavar="NN")
    parser.add_argument("--walk", type=int, metavar="MINUTES")
    arguments = parser.parse_args()
    if arguments.walk:
        walk(arguments.walk)
    else:
        measure([c for c in CHAPTERS if not arguments.chapters or c.number in arguments.chapters])


if __name__ == "__main__":
    main()
