"""Definitions of the library, as the notebooks show them: verbatim, with what they need.

A notebook's source names the file and the definitions; `shown` gives their code, `needed` the
imports, private helpers and constants without which that code does not run. Nothing is imported
here: everything is read from the text.
"""

from __future__ import annotations

import ast
import builtins
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 45
MAX_COLUMNS = 84

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Module:
    """The top level of one library file: its definitions, constants and imports by name."""

    path: str
    text: str
    definitions: dict[str, Definition] = field(default_factory=dict)
    constants: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    future_annotations: bool = False

    @property
    def dotted(self) -> str:
        """The module's importable name, "minimistral.attention"."""
        return self.path.removesuffix(".py").replace("/", ".")

    def node(self, name: str) -> ast.stmt:
        """The syntax tree of a definition or a constant."""
        return self.definitions.get(name) or self.constants[name]

    def travels(self, name: str) -> bool:
        """Whether a name comes along verbatim; others are imported from the library."""
        node = self.node(name)
        short = node.end_lineno - node.lineno < 10
        return name.startswith("_") or (name in self.constants and short)

    def code(self, name: str) -> str:
        """The lines of a definition or a constant in the file, decorators included."""
        node = self.node(name)
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(self.text.splitlines()[first - 1 : node.end_lineno])


@cache
def read_module(path: str, root: Path = ROOT) -> Module:
    """Read `path` ("minimistral/attention.py", relative to `root`) without importing it."""
    text = (root / path).read_text(encoding="utf-8")
    module = Module(path, text)
    for node in ast.parse(text).body:
        _file(module, node)
    return module


def _file(module: Module, node: ast.stmt) -> None:
    if isinstance(node, Definition):
        module.definitions[node.name] = node
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for name in (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
            module.constants[name] = node
    elif isinstance(node, ast.ImportFrom) and node.module == "__future__":
        module.future_annotations |= any(a.name == "annotations" for a in node.names)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        module.imports.update(import_lines(node, module.dotted))
    elif isinstance(node, ast.If | ast.Try):  # imports under TYPE_CHECKING or a guard
        for child in node.body:
            _file(module, child)


def import_lines(node: ast.Import | ast.ImportFrom, dotted: str) -> dict[str, str]:
    """One absolute import statement for each name that an import binds."""
    lines = {}
    if isinstance(node, ast.ImportFrom):
        package = dotted.split(".")[: -node.level] if node.level else []
        source = ".".join([*package, *([node.module] if node.module else [])])
        for a in node.names:
            lines[a.asname or a.name] = f"from {source} import {ast.unparse(a)}"
    else:
        for a in node.names:
            lines[a.asname or a.name.partition(".")[0]] = f"import {ast.unparse(a)}"
    return lines


def docstring_lines(node: ast.AST) -> int:
    """How many lines of a definition are docstrings, those of its methods included."""
    total = 0
    for n in ast.walk(node):
        if isinstance(n, Definition) and ast.get_docstring(n) is not None:
            total += n.body[0].end_lineno - n.body[0].lineno + 1
    return total


def shown(path: str, names: list[str], root: Path = ROOT) -> str:
    """The library cell: the file's name, then the named definitions verbatim, in this order."""
    module, blocks, length = read_module(path, root), [], 0
    for name in names:
        if name not in module.definitions and name not in module.constants:
            there = ", ".join([*module.definitions, *module.constants])
            raise ValueError(f"{path} has no {name!r}; it has {there}")
        blocks.append(module.code(name))
        node = module.definitions.get(name)
        length += len(blocks[-1].splitlines()) - (docstring_lines(node) if node else 0)
        long = [line for line in blocks[-1].splitlines() if len(line) > MAX_COLUMNS]
        if long:
            said = f"{len(long[0])} is over {MAX_COLUMNS} columns: {long[0].strip()}"
            raise ValueError(f"{path}, {name}: {said}")
    if length > MAX_LINES:
        raise ValueError(
            f"{path}: {', '.join(names)} have {length} lines without docstrings; a library cell "
            f"has at most {MAX_LINES}: show them in two cells, or split them in the library"
        )
    return f"# {path}\n" + "\n\n\n".join(blocks)


def needed(path: str, names: list[str], known: set[tuple[str, str]], root: Path = ROOT) -> str:
    """What the cell `shown(path, names)` needs before it, as code; "" when nothing.

    `known` holds what earlier cells of the notebook gave: (name, import statement) and, for
    library definitions, (name, "minimistral/attention.py"). What this cell and its needs give is
    added to it. Private helpers and short constants come verbatim; public definitions that the
    notebook did not show are imported from the library.
    """
    module = read_module(path, root)
    imports, copied = [], []
    if module.future_annotations and ("annotations", "__future__") not in known:
        # IPython keeps it for the cells that follow
        imports.append("from __future__ import annotations")
        known.add(("annotations", "__future__"))
    waiting = [n for name in names for n in _used(module, name)]
    seen = set(names)
    while waiting:
        name = waiting.pop(0)
        if name in seen or (name, path) in known:
            continue
        seen.add(name)
        if name in module.imports or not module.travels(name):
            line = module.imports.get(name, f"from {module.dotted} import {name}")
            source = line.split()[1].replace(".", "/") + ".py"
            if (name, line) not in known and (name, source) not in known:
                imports.append(line)
                known.add((name, line))
        else:
            copied.append(name)
            known.add((name, path))
            waiting.extend(_used(module, name))
    known.update((name, path) for name in names)
    copied.sort(key=lambda n: module.node(n).lineno)
    copies = list(dict.fromkeys(module.code(name) for name in copied))  # A, B = ... is one
    return "\n\n".join(["\n".join(_merged(imports)), *copies] if imports else copies)


def _used(module: Module, name: str) -> list[str]:
    """The names that a definition reads and that its module (not Python) must give."""
    node = module.node(name)
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    for n in ast.walk(node):  # a quoted annotation names things, too
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier():
            names.append(n.value)
    top = {*module.definitions, *module.constants, *module.imports} - set(dir(builtins))
    return [n for n in dict.fromkeys(names) if n in top]


def _merged(imports: list[str]) -> list[str]:
    """One line for each module imported from, Python's and PyTorch's before the library's."""
    names: dict[str, list[str]] = {}
    for line in imports:
        start, _, name = line.partition(" import ")
        names.setdefault(start if name else line, []).append(name)
    lines = [_narrow(start, ", ".join(sorted(n))) if n[0] else start
             for start, n in names.items()]
    return sorted(lines, key=lambda x: ("__future__" not in x, "minimistral" in x, x.split()[1], x))


def _narrow(start: str, names: str) -> str:
    """An import statement, in parentheses where it would be too wide for a cell."""
    line = f"{start} import {names}"
    if len(line) <= MAX_COLUMNS:
        return line
    inside = textwrap.fill(names, MAX_COLUMNS - 4, break_long_words=False)
    return f"{start} import (\n{textwrap.indent(inside, '    ')})"
