"""Build the notebooks from their text sources: `python -m minimistral.course.build [NN ...]`.

    notebooks/src/NN_name.py  ->  notebooks/NN_name.ipynb     run, outputs kept
    solutions/src/NN_name.py  ->  solutions/NN_name.ipynb     run, outputs kept
                              ->  exercises/NN_name.ipynb     solutions blanked, run, outputs kept

People edit the sources (jupytext percent format: `# %%` and `# %% [markdown]`); nothing else writes
notebooks. When nothing changed, the files stay byte-identical. Names choose what is built: `02`,
`02_attention`, `solutions/02`.

    --check    run nothing; exit 1 if a notebook is not what its source and the library say
    --stale    build only what --check would name
    --fresh    keep no output of before; else an output that the tests would call equal stays

MARKUP OF A SOURCE

A library cell has two lines; the build puts in the library's code, verbatim, and before it a folded
cell with the imports, private helpers and constants which that code needs:

    # %%
    # minimistral/attention.py
    # show: causal, attend

A solution, in solutions/src, stands between two markers. The exercise shows `raise
NotImplementedError` instead, or, where there is one, the part after STUB with its "# " removed:
some lines left out, `answer = ...`, a whole wrong implementation to be repaired:

    ### BEGIN SOLUTION
    scores = q @ k.T / math.sqrt(d)
    ### STUB
    # scores = ...
    ### END SOLUTION

Where a cell of solutions/src ends in `check("name", ...)`, that line becomes a cell of its own, with
the metadata by which nbgrader grades it.

A cell tagged `solution` (`# %% [markdown] tags=["solution"]`) is left out of the exercises. A cell
whose output cannot be compared says why on a line that the learner does not see:
`# NBVAL_IGNORE_OUTPUT: times differ`. An error on purpose is tagged `raises-exception`. Cells in
which the learner acts are tagged `predict`, `your-turn`, `try` (change one knob) or `recall`,
unless they call predict(), check() or bet(). A cell tagged `slide-skip` makes no slide, prose tagged
`slide` is shown whole; what else becomes a slide, slides.py says.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from minimistral.course.notebook_compare import VIEW, difference, read_rules
from minimistral.course.notebook_library import ROOT
from minimistral.course.notebook_source import SourceError, read_source
from minimistral.course.sections import joined
from minimistral.files import write_whole

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Target:
    """One notebook to be built."""

    source: Path
    notebook: Path

    @property
    def name(self) -> str:
        """Folder and file, as messages name it: "exercises/02_attention.ipynb"."""
        return f"{self.notebook.parent.name}/{self.notebook.name}"

    def read(self) -> NotebookNode:
        """What the notebook has to be, not run."""
        return read_source(self.source, exercise=self.notebook.parent.name == "exercises")


def targets(root: Path = ROOT, only: list[str] = ()) -> list[Target]:
    """The notebooks that the sources below `root` make: all, or those that `only` names."""
    found = []
    for folder, into in [("notebooks", ["notebooks"]), ("solutions", ["solutions", "exercises"])]:
        for source in sorted((root / folder / "src").glob("[0-9][0-9]_*.py")):
            found += [Target(source, root / i / f"{source.stem}.ipynb") for i in into]
    if not only:
        return found
    chosen = [t for t in found if any(_names(o, t) for o in only)]
    unknown = [o for o in only if not any(_names(o, t) for t in found)]
    if unknown:
        known = ", ".join(sorted({t.source.stem for t in found})) or "none"
        raise SystemExit(f"no source is called {', '.join(unknown)}; there are: {known}")
    return chosen


def _names(word: str, target: Target) -> bool:
    folder, _, stem = word.removesuffix(".py").removesuffix(".ipynb").rpartition("/")
    stem = stem.zfill(2) if stem.isdigit() else stem
    in_folder = folder.removesuffix("/src").rpartition("/")[2] in ("", target.notebook.parent.name)
    return in_folder and target.source.stem.startswith(stem)


def stale(target: Target) -> str | None:
    """Why a notebook is not what its source and the library say, or None. Runs nothing."""
    if not target.notebook.exists():
        return "not built yet"
    try:
        stored, wanted = nbformat.read(target.notebook, 4), target.read()
    except SourceError as error:
        return f"its source cannot be read: {error}"
    if [_essence(c) for c in stored.cells] != [_essence(c) for c in wanted.cells]:
        return "its cells are not those of the source and the library"
    if stored.metadata != wanted.metadata:
        return "its outputs belong to another version of its source"
    return None


def _essence(cell: NotebookNode) -> tuple:
    return cell.cell_type, cell.id, cell.source, dict(cell.metadata)


def kernel_environment(work: str | Path) -> dict[str, str]:
    """The environment of built and tested notebooks: fresh progress, one thread, no GPU."""
    fixed = {
        "MINIMISTRAL_WORK": str(work),
        "MINIMISTRAL_TESTING": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    # MPLBACKEND=agg, a habit of CI machines, would remove every figure
    rest = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    return rest | fixed


class PlainClient(NotebookClient):
    """Leaves in the cell what a widget's callback shows, as nbval does: readers need no kernel."""

    def handle_comm_msg(self, outs, msg, cell_index):
        return None


def run(notebook: NotebookNode, folder: Path, after_cell: Callable[[int], None] | None = None) -> list[float]:
    """Run every cell in a fresh kernel whose working folder is `folder`; seconds per cell.

    After each cell `after_cell` gets the number of the kernel's process. Raises RuntimeError that
    shows the cell when one raised, wrote to stderr, or was tagged raises-exception and did not raise.
    """
    began: dict[int, float] = {}
    seconds = [0.0] * len(notebook.cells)

    def end(cell_index: int, **_) -> None:
        seconds[cell_index] = time.monotonic() - began[cell_index]
        if after_cell:
            after_cell(client.km.provisioner.pid)

    client = PlainClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--IPKernelApp.log_level=40"],
        on_cell_execute=lambda cell_index, **_: began.update({cell_index: time.monotonic()}),
        on_cell_executed=end,
    )
    metadata = copy.deepcopy(notebook.metadata)  # the client writes the kernel's versions into it
    with tempfile.TemporaryDirectory(prefix="minimistral-", ignore_cleanup_errors=True) as work:
        try:
            client.execute(env=kernel_environment(work))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise RuntimeError(ANSI.sub("", str(error))) from None
    notebook.metadata = metadata
    for cell in notebook.cells:
        _tidy(cell)
    return seconds


def _tidy(cell: NotebookNode) -> None:
    if cell.cell_type != "code":
        return
    cell.outputs = joined(cell.outputs)
    raises = "raises-exception" in cell.metadata.get("tags", [])
    if raises and not any(o.output_type == "error" for o in cell.outputs):
        raise RuntimeError(f"a cell tagged raises-exception does not raise:\n{cell.source}")
    for out in cell.outputs:
        if out.output_type == "stream" and out.name == "stderr":
            raise RuntimeError(f"this cell wrote to stderr:\n{cell.source}\n----\n{out.text}")
        if "data" in out:
            out.data.pop(VIEW, None)
        if out.output_type == "error":
            out.traceback = [_portable(line) for line in out.traceback]


def _portable(text: str) -> str:
    """A traceback without colours and without this machine's folders."""
    text = ANSI.sub("", text).replace(f"{ROOT}{os.sep}", "")
    return re.sub(r"\S*[\\/]site-packages[\\/]", "", text)


def keep_equal_outputs(notebook: NotebookNode, path: Path) -> None:
    """Where the tests would call a cell's outputs equal, the stored ones stay."""
    if not path.exists():
        return
    rules = read_rules(ROOT / "tests" / "nbval_sanitize.cfg")
    stored = {c.id: c for c in nbformat.read(path, 4).cells if c.cell_type == "code"}
    for cell in notebook.cells:
        old = stored.get(cell.id)
        if cell.cell_type != "code" or old is None:
            continue
        ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
        if ignored or difference(old.outputs, cell.outputs, rules) is None:
            count = cell.execution_count
            cell.outputs = old.outputs
            for out in cell.outputs:
                if out.output_type == "execute_result":
                    out.execution_count = count


def build(target: Target, fresh: bool = False) -> tuple[str, list[tuple[float, str]], str]:
    """Build one notebook: name, (seconds, first line) of each cell, error ("" when written).

    `fresh`: no stored output stays, not even of cells that are not compared.
    """
    try:
        notebook = target.read()
        seconds = run(notebook, target.notebook.parent)
        if not fresh:
            keep_equal_outputs(notebook, target.notebook)
        write(notebook, target.notebook)
    except (SourceError, RuntimeError) as error:
        return target.name, [], str(error)
    cells = [(s, c.source.splitlines()[0]) for s, c in zip(seconds, notebook.cells, strict=True)]
    return target.name, cells, ""


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all, with the same bytes on every system."""
    nbformat.validate(notebook)
    write_whole(path, nbformat.writes(notebook) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when everything was built, or is fresh."""
    parser = argparse.ArgumentParser(prog="build", description="Build the notebooks.")
    parser.add_argument("--check", action="store_true", help="run nothing, name what is stale")
    parser.add_argument("--stale", action="store_true", help="build only what is stale")
    parser.add_argument("--fresh", action="store_true", help="keep no output of before, not even of uncompared cells")
    parser.add_argument("names", nargs="*", metavar="NN", help="chapters or files (default: all)")
    options = parser.parse_args(arguments)
    chosen = targets(ROOT, options.names)
    if options.check or options.stale:
        reasons = {t: reason for t in chosen if (reason := stale(t))}
        if options.check:
            for target, reason in reasons.items():
                print(f"stale: {target.name}: {reason} (run.py build {target.source.stem})")
            return int(bool(reasons))
        chosen = list(reasons)
    for target in chosen:
        target.notebook.parent.mkdir(exist_ok=True)
    failed = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        for name, cells, error in pool.map(partial(build, fresh=options.fresh), chosen):
            total = sum(seconds for seconds, _ in cells)
            print(f"{name}: {'NOT WRITTEN' if error else f'{total:.1f} s'}", flush=True)
            for seconds, line in sorted(cells, reverse=True)[:3]:
                if seconds > 1:
                    print(f"    {seconds:5.1f} s  {line}")
            if error:
                print(error, file=sys.stderr)
                failed.append(name)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
