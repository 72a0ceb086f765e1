"""The mutation report: `python3 run.py report [NN ...] [OUT]`.

For every exercise what its check does with everything on record, and with mutants of its solution
(mutation.py); for every notebook what is compared, how long it runs and how much memory it takes.
The record is kept in ``benchmarks/results/report.json``, the page made from it in ``docs/report.md``;
OUT/report.html (OUT is `build` unless it is named) is the same as one page of its own, with tables to
be sorted.

    python3 run.py report             everything: 20 minutes on two free cores
    python3 run.py report 05 12       these chapters; the others' rows stay
    python3 run.py report --quick     two minutes: runs no notebook; their seconds and megabytes stay
    python3 run.py report --notebooks      nothing but those
    python3 run.py report --pages     measure nothing; make the pages from the record
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import torch

from minimistral.course import build, mutation, report_page
from minimistral.course.checks import NOT_WRITTEN, outcomes_of
from minimistral.course.exercises import TYPED, Exercise, all_exercises, find_exercise
from minimistral.course.notebook_library import ROOT
from minimistral.course.soundness import trials, verify
from minimistral.course.survivors import SAME
from minimistral.course.syllabus import chapter
from minimistral.files import write_whole
from minimistral.provenance import provenance

RECORD = ROOT / "benchmarks" / "results" / "report.json"
PAGE = ROOT / "docs" / "report.md"


# ---------------------------------------------------------------- exercises


def on_record(exercise: Exercise) -> dict:
    """What can be counted without running anything."""
    return {
        "chapter": exercise.chapter, "name": exercise.name, "kind": exercise.kind,
        "misconceptions": len(exercise.misconceptions), "equivalents": len(exercise.equivalents),
    }


def exercise_row(key: str) -> dict:
    """One exercise: everything on record and every mutant, given to its check."""
    torch.set_num_threads(1)
    exercise = find_exercise(key)
    began = time.perf_counter()
    tried = trials(exercise)
    seconds = time.perf_counter() - began
    wrong = [t for t in tried if t.kind == "wrong"]
    rights = [t for t in tried if t.kind == "right"]
    untouched = next(t.result for t in tried if t.kind == "nothing")
    stub = untouched.status
    if exercise.kind == "bug" and stub == NOT_WRITTEN:
        told = any(t.name == "unchanged" and t.as_it_should for t in wrong)
        stub = "refused with its own message" if told else "refused"
    row = on_record(exercise) | {
        "refused": sum(not t.result.passed for t in wrong),
        "diagnosed": sum(t.as_it_should for t in wrong),
        "accepted": sum(t.as_it_should for t in rights) - 1,  # the reference is no equivalent
        "stub": stub, "seconds": round(seconds, 2), "problems": verify(exercise),
    }
    if exercise.kind not in TYPED:
        took = sum(o.run.seconds for o in outcomes_of(exercise, exercise.reference))
        row["one_check_seconds"] = round(took, 3)
    return row | mutants_of(exercise)


def mutants_of(exercise: Exercise) -> dict:
    """How the mutants of the solution fare; a survivor has a reason where it computes the same."""
    tried = list(mutation.tried(exercise))
    same = SAME.get(exercise.key, {})
    return {
        "mutants": len(tried),
        "mutants_refused": sum(not result.passed for _, result in tried),
        "mutants_named": sum(result.matched is not None for _, result in tried),
        "survivors": {m.name: same.get(m.name) for m, result in tried if result.passed},
    }


# ---------------------------------------------------------------- notebooks


def stored(path: Path) -> dict:
    """What can be counted in a notebook as it is stored."""
    code = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    ignored = [c.metadata.get("not_compared", "no reason") for c in code
               if c.outputs and "nbval-ignore-output" in c.metadata.get("tags", [])]
    return {
        "code_cells": len(code), "outputs": sum(bool(c.outputs) for c in code), "ignored": ignored,
        "kilobytes": round(path.stat().st_size / 1000),
    }


def measured(target: build.Target) -> dict:
    """Run a notebook as the build does: seconds, the slowest cell, the kernel's peak memory."""
    peak = []
    began = time.monotonic()
    seconds = build.run(target.read(), target.notebook.parent,
                        after_cell=lambda pid: peak.append(peak_megabytes(pid)))
    return {
        "seconds": round(time.monotonic() - began, 1), "cells_seconds": round(sum(seconds), 1),
        "slowest_cell_seconds": round(max(seconds), 1), "peak_megabytes": peak[-1],
    }


def peak_megabytes(pid: int) -> int | None:
    """The most memory that a process has had resident; None where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    kilobytes = next((x.split()[1] for x in status.read_text().splitlines() if x.startswith("VmHWM")), None)
    return kilobytes and round(int(kilobytes) * 1024 / 1e6)


# ---------------------------------------------------------------- the record


RUN = ("seconds", "cells_seconds", "slowest_cell_seconds", "peak_megabytes", "run")


def gather(chapters: list[int], parts: list[str], command: str, note: str | None) -> dict:
    """The rows of some chapters, or of all, made anew."""
    chosen = {e.key: e for e in all_exercises() if not chapters or e.chapter in chapters}
    targets = [t for t in build.targets() if not chapters or int(t.notebook.name[:2]) in chapters]
    told = provenance(command, threads=1, note=note)
    made: dict = {"runs": {told["date"]: told}, "exercises": {}, "notebooks": {}}
    with ProcessPoolExecutor(max_workers=2) as pool:
        for key, row in zip(chosen, pool.map(exercise_row, chosen)) if "exercises" in parts else ():
            made["exercises"][key] = row | {"run": told["date"]}
            print(f"{key}: {row['diagnosed']} of {row['misconceptions']} told with their message, "
                  f"{row['mutants_refused']} of {row['mutants']} mutants refused", flush=True)
        new = pool.map(measured, targets) if "notebooks" in parts else [{}] * len(targets)
        for target, run in zip(targets, new):
            row = {"chapter": int(target.notebook.name[:2]), **stored(target.notebook), **run}
            made["notebooks"][target.name] = row | ({"run": told["date"]} if run else {})
            if run:
                print(f"{target.name}: {run['seconds']} s, {run['peak_megabytes']} MB", flush=True)
    return made


def merged(old: dict, new: dict) -> dict:
    """The record with new rows. Of a notebook that was not run the old seconds stay."""
    exercises = {**old.get("exercises", {}), **new["exercises"]}
    notebooks = dict(old.get("notebooks", {}))
    for name, row in new["notebooks"].items():
        notebooks[name] = {k: v for k, v in notebooks.get(name, {}).items() if k in RUN} | row
    keys, names = [e.key for e in all_exercises()], sorted(t.name for t in build.targets())
    record = {
        "exercises": {key: exercises[key] for key in keys if key in exercises},
        "notebooks": {name: notebooks[name] for name in names if name in notebooks},
    }
    used = {row.get("run") for part in record.values() for row in part.values()}
    runs = {**old.get("runs", {}), **new["runs"]}
    return {"runs": {date: run for date, run in sorted(runs.items()) if date in used}, **record}


def read_record() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where something falls short."""
    parser = argparse.ArgumentParser(prog="run.py report", description="Make the mutation report.")
    parser.add_argument("words", nargs="*", metavar="NN | OUT",
                        help="chapters (default: all), and a folder for report.html (default: build)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quick", dest="parts", action="store_const", const=["exercises"], help="run no notebook")
    only.add_argument("--notebooks", dest="parts", action="store_const", const=["notebooks"], help="judge no exercise")
    only.add_argument("--pages", dest="parts", action="store_const", const=[], help="measure nothing")
    parser.add_argument("--note", help="what a reader must know about this run")
    options = parser.parse_intermixed_args(arguments)
    try:
        chapters = [chapter(int(word)).number for word in options.words if word.isdigit()]
    except ValueError as error:
        parser.error(str(error))
    out = next((Path(word) for word in options.words if not word.isdigit()), ROOT / "build")
    parts = ["exercises", "notebooks"] if options.parts is None else options.parts
    if parts:
        told = " ".join(["python3 run.py report", *(sys.argv[1:] if arguments is None else arguments)])
        rows = gather(chapters, parts, told, options.note)
        record = merged(read_record(), rows)  # read late: another run may have written meanwhile
        write_whole(RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    record = read_record()
    write_whole(PAGE, report_page.markdown(record))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "report.html", report_page.html(record))
    print(f"{RECORD.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}, {out / 'report.html'}")
    short = report_page.shortfalls(record)
    print("\n".join(short) or "Nothing falls short.")
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
