"""The untrusted half of `minimistral grade`: run one notebook and hand over what its work gave.

It goes on where grade_fence has closed the process in. Its folder holds here/ (the submission's
files) and out/ (what comes back). No verdict is given here: whatever this process writes is only
compared, elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

from . import checks, grade_outputs
from .exercises import all_exercises
from .watchdog import TimeIsUp, time_limit


def main(folder: Path, cells: list[str], cell_seconds: float) -> None:
    """Run the cells one after the other, each at most ``cell_seconds``; then end the process."""
    all_exercises()  # read all records before the clock of the first cell runs
    out = folder / "out"
    checks.listeners.append(lambda attempt: grade_outputs.hand_over(attempt, out))
    shell = InteractiveShell.instance(colors="NoColor")
    shell.enable_gui = lambda gui=None: None
    os.chdir(folder / "here")
    sys.path.insert(0, "")
    with open(out / "cells.jsonl", "w", encoding="utf-8") as log:

        def note(**said) -> None:
            log.write(json.dumps(said) + "\n")
            log.flush()

        for number, source in enumerate(cells):
            note(begun=number)
            _stand_in(folder / "here")
            error = None
            try:
                with time_limit(cell_seconds):
                    result = shell.run_cell(source, store_history=True)
                error = result.error_before_exec or result.error_in_exec
            except TimeIsUp as late:
                error = late
            if isinstance(error, TimeIsUp):
                note(cell=number, late=True)
            elif error is not None:
                text = " ".join(str(error).split())[:200]
                note(cell=number, error=f"{type(error).__name__}: {text}")
    os._exit(0)  # whatever threads are left


def _stand_in(folder: Path) -> None:
    """Go to the working folder if there is none, or none any more."""
    try:
        os.getcwd()
    except FileNotFoundError:  # a cell before has deleted it
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
