"""How the notebooks are tested: nbval, repaired, in the same environment in which they were built.

nbval 0.11 runs each code cell as one test and compares its outputs with the stored ones. Here it
learns to run cells as JupyterLab does, to wait on a busy machine, to compare pictures (ours are in
HTML), and to leave the comparison out where outputs are known to differ. Everything that runs here
is offline.
"""

from __future__ import annotations

import os
import runpy
import tempfile
from pathlib import Path
from unittest import mock

from nbval import kernel, plugin

from minimistral.course.notebook_compare import difference, why_not_compared

ROOT = Path(__file__).resolve().parent
OFFLINE = ROOT / "tests" / "offline"

runpy.run_path(str(OFFLINE / "sitecustomize.py"))
if str(OFFLINE) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    paths = [str(OFFLINE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

def pytest_report_header(config) -> str:
    reason = why_not_compared()
    if reason:
        return f"notebooks: outputs were not compared: {reason}; every cell and assert is run"
    return "notebooks: outputs are compared with the stored ones"


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
