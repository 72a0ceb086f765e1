"""How the notebooks are tested: nbval, repaired, in the same environment in which they were built.

nbval 0.11 runs each code cell as one test and compares its outputs with the stored ones. Here it
learns to run cells as JupyterLab does, to wait on a busy machine, to compare pictures (ours are in
HTML), and to leave the comparison out where outputs are known to differ. Everything that runs here
is offline.
"""

from __future__ import annotations

import os
import re
import runpy
import tempfile
from collections import defaultdict
from pathlib import Path
from unittest import mock

import nbformat
from nbval import kernel, plugin

from minimistral.course.notebook_compare import difference, why_not_compared

ROOT = Path(__file__).resolve().parent
OFFLINE = ROOT / "minimistral" / "assets" / "offline"

runpy.run_path(str(OFFLINE / "sitecustomize.py"))
if str(OFFLINE) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    paths = [str(OFFLINE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

def pytest_report_header(config) -> str:
    reason = why_not_compared()
    if reason:
        return f"notebooks: outputs were not compared: {reason}; every cell and assert is run"
    return "notebooks: outputs are compared with the stored ones"


def pytest_terminal_summary(terminalreporter) -> None:
    """Seconds and compared outputs of each chapter's notebooks that ran, and what the course owes."""
    times, shares = defaultdict(list), defaultdict(list)
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        path = getattr(report, "nodeid", "").partition("::")[0]
        if path.endswith(".ipynb") and getattr(report, "when", None) == "call":
            times[path].append(report.duration)
    if not times:
        return
    for path in times:
        shares[chapter_of(path)] += compared_outputs(ROOT / path)
    terminalreporter.section("notebooks")
    for chapter in sorted(shares):
        cells = [t for path in times if chapter_of(path) == chapter for t in times[path]]
        terminalreporter.line(f"{chapter}  {sum(cells):5.1f} s, slowest cell {max(cells):4.1f} s, "
                              f"{sum(shares[chapter])} of {len(shares[chapter])} outputs compared")
    every = [share for chapter in shares.values() for share in chapter]
    terminalreporter.line(f"all {sum(map(sum, times.values())):5.1f} s, "
                          f"{100 * sum(every) / len(every):.0f}% of the outputs compared")


def chapter_of(path: str) -> str:
    return re.search(r"(\d\d)_\w+\.ipynb$", path)[1]


def compared_outputs(path: Path) -> list[bool]:
    """For each cell that has an output: is it compared?"""
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and c.outputs]
    return ["nbval-ignore-output" not in c.metadata.get("tags", []) for c in cells]


def _execute(self, source: str, allow_stdin: bool | None = None) -> str:
    """With history, as in JupyterLab: without it IPython ignores the semicolon after `plot();`."""
    return self.kc.execute(source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)


def _init(self, *args, **kwargs) -> None:
    _cell_init(self, *args, **kwargs)
    self.output_timeout = 60  # nbval's 5 s are short on a busy machine


def _setup(self) -> None:
    """The kernel starts in the build's environment, with a work folder of its own."""
    from minimistral.course.build import kernel_environment

    self.work = tempfile.TemporaryDirectory(prefix="minimistral-", ignore_cleanup_errors=True)
    with mock.patch.dict(os.environ, kernel_environment(self.work.name), clear=True):
        _file_setup(self)


def _teardown(self) -> None:
    _file_teardown(self)
    if hasattr(self, "work"):
        self.work.cleanup()


def _compare(self, fresh, stored, skip_compare=None) -> bool:
    if why_not_compared():
        return True
    found = difference(stored, fresh, list(self.parent.sanitize_patterns.items()))
    self.comparison_traceback = [found]
    return found is None


_cell_init = plugin.IPyNbCell.__init__
_file_setup, _file_teardown = plugin.IPyNbFile.setup, plugin.IPyNbFile.teardown
kernel.RunningKernel.execute_cell_input = _execute
plugin.IPyNbCell.__init__ = _init
plugin.IPyNbCell.compare_outputs = _compare
plugin.IPyNbFile.setup, plugin.IPyNbFile.teardown = _setup, _teardown
