"""From a text source (jupytext percent format) to a notebook not run yet; markup: see build.py."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from minimistral.course.exercises import find_exercise
from minimistral.course.notebook_library import ROOT, import_lines, needed, shown

KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FILE_LINE = re.compile(r"# (minimistral/[\w/]+\.py)\n# show: (.+)\n?")
IGNORE = re.compile(r"^# NBVAL_IGNORE_OUTPUT: (\S.*)\n?", re.M)
REGION = re.compile(
    r"^(?P<in>[ \t]*)### BEGIN SOLUTION\n(?P<solution>.*?)"
    r"(?:^(?P=in)### STUB\n(?P<stub>.*?))?^(?P=in)### END SOLUTION[ \t]*$",
    re.M | re.S,
)
STUB = "# your code here\nraise NotImplementedError"


class SourceError(ValueError):
    """A source that cannot become a notebook; the message names the file and the cell."""


def read_source(path: Path, *, exercise: bool = False, root: Path = ROOT) -> NotebookNode:
    """The notebook of one source file, not run: library cells put in, solutions kept or blanked.

    In the notebooks of solutions/src each exercise's check stands in a cell of its own, which
    nbgrader grades.
    """
    source = jupytext.read(path, fmt="py:percent")
    cells: list[NotebookNode] = []
    known: set[tuple[str, str]] = set()
    for cell in source.cells:
        if not cell.source.strip() or (exercise and "solution" in cell.metadata.get("tags", [])):
            continue
        try:
            for made in _cells(cell, known, exercise, root):
                cells += _graded(made) if path.parents[1].name == "solutions" else [made]
        except (ValueError, SyntaxError, OSError) as error:
            raise SourceError(f"{path.name}, in the cell\n{cell.source}\n{error}") from error
    notebook = nbformat.v4.new_notebook(metadata=nbformat.from_dict(KERNEL), cells=cells)
    _number(notebook)
    notebook.metadata["minimistral"] = {"cells": fingerprint(notebook)}
    return notebook


def _cells(cell: NotebookNode, known: set, exercise: bool, root: Path) -> list[NotebookNode]:
    tags = list(cell.metadata.get("tags", []))
    if cell.cell_type != "code":
        return [_cell(cell.cell_type, cell.source, tags)]
    text, before = cell.source, []
    if match := FILE_LINE.fullmatch(text):
        path, names = match[1], [n.strip() for n in match[2].split(",")]
        text = shown(path, names, root)
        needs = needed(path, names, known, root)
        if needs:
            text_before = f"# what the next cell needs of {path}\n{needs}"
            before = [_cell("code", text_before, ["imports"])]
            before[0].metadata["jupyter"] = {"source_hidden": True}
        tags.append("library")
    elif "# show:" in text:
        raise ValueError("a library cell is two lines: '# minimistral/x.py', '# show: name, name'")
    text = choose(text, exercise)
    known.update(_imported(text))
    reasons = IGNORE.findall(text)
    cell = _cell("code", IGNORE.sub("", text).strip("\n"), tags)
    if reasons:
        cell.metadata["tags"] = [*tags, "nbval-ignore-output"]
        cell.metadata["not_compared"] = "; ".join(reasons)
    elif "NBVAL_IGNORE_OUTPUT" in text or "nbval-ignore-output" in tags:
        raise ValueError("say why: '# NBVAL_IGNORE_OUTPUT: reason'")
    return [*before, cell]


def _graded(cell: NotebookNode) -> list[NotebookNode]:
    """The work and its check in two cells, the second with nbgrader's metadata.

    The student's cells carry none: they stay as they were written. The check is locked, so that
    nbgrader puts it back as it was before it grades.
    """
    body = _parsed(cell.source) if cell.cell_type == "code" else []
    call = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "check":
        return [cell]
    if not isinstance(call.args[0], ast.Constant):
        raise ValueError("say the exercise's name here: check(\"name\", work)")
    exercise = find_exercise(call.args[0].value)
    lines = cell.source.splitlines()
    work = "\n".join(lines[: call.lineno - 1]).rstrip()
    check = _cell("code", "\n".join(lines[call.lineno - 1 :]), cell.metadata.get("tags", []))
    check.metadata["nbgrader"] = NotebookNode(
        schema_version=3, cell_type="code", grade=True, grade_id=exercise.key.replace(".", "_"),
        locked=True, points=exercise.points, solution=False, task=False,
    )
    cell.source = work
    return [cell, check] if work else [check]


def choose(text: str, exercise: bool) -> str:
    """A cell's text with every solution region replaced by its solution, or by its stub."""

    def one(match: re.Match) -> str:
        solution, stub, indent = match["solution"], match["stub"], match["in"]
        if not exercise:
            return solution.rstrip("\n")
        if stub is None:
            if not indent:
                raise ValueError("a solution outside a function needs a '### STUB' part")
            return "\n".join(indent + line for line in STUB.splitlines())
        return "\n".join(_uncomment(line, indent) for line in stub.rstrip("\n").splitlines())

    text = REGION.sub(one, text)
    if leftover := re.search(r"^\s*###.*(SOLUTION|STUB).*$", text, re.M):
        raise ValueError(f"a marker without its partner: {leftover[0].strip()}")
    return text


def _uncomment(line: str, indent: str) -> str:
    if not line.strip():
        return ""
    if not line.startswith(f"{indent}#"):
        raise ValueError(f"every line after '### STUB' is a comment; this is not: {line.strip()}")
    return (indent + re.sub(r"^# ?", "", line[len(indent) :])).rstrip()


def _cell(kind: str, source: str, tags: list[str]) -> NotebookNode:
    new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    return new(source, metadata=nbformat.from_dict({"tags": tags} if tags else {}))


def _imported(text: str) -> set[tuple[str, str]]:
    """(name, statement) of every import at the top level of a cell."""
    statements = (n for n in _parsed(text) if isinstance(n, ast.Import | ast.ImportFrom))
    return {pair for n in statements for pair in import_lines(n, "notebook").items()}


def _parsed(text: str) -> list[ast.stmt]:
    """A cell's statements; none of a cell that breaks on purpose."""
    try:
        return ast.parse(re.sub(r"^[%!?].*$", "", text, flags=re.M)).body
    except SyntaxError:
        return []


def _number(notebook: NotebookNode) -> None:
    """Ids that depend on the cells' texts alone, so that a rebuild changes nothing."""
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        key = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[key] = seen.get(key, 0) + 1
        cell.id = key if seen[key] == 1 else f"{key}-{seen[key]}"


def fingerprint(notebook: NotebookNode) -> str:
    """A hash of what is run: the cells' kinds, texts and metadata, library definitions included."""
    content = [[c.cell_type, c.source, dict(c.metadata)] for c in notebook.cells]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]
