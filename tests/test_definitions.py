"""One definition, one chapter, verbatim: what the notebooks show of the library."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import nbformat
import pytest

from minimistral.course import syllabus
from minimistral.course.notebook_library import read_module, shown

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
MODULES = syllabus.TEACHING_MODULES


@cache
def public_definitions(module: str) -> tuple[str, ...]:
    """Names of the public functions and classes that a library module defines itself."""
    tree = ast.parse((ROOT / "minimistral" / f"{module}.py").read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.ClassDef
    return tuple(n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_"))


def library_cells(path: Path) -> list[str]:
    cells = nbformat.read(path, 4).cells
    return [c.source for c in cells if "library" in c.metadata.get("tags", [])]


def parts(source: str) -> tuple[str, list[str]]:
    """The module and the names that a library cell shows."""
    file = source.splitlines()[0].removeprefix("# ")
    names = []
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        names.append(target.id if target is not None else node.name)
    return file, names


def shown_by(path: Path) -> list[str]:
    """What a notebook shows, as "attention.causal"."""
    found = []
    for source in library_cells(path):
        file, names = parts(source)
        found += [f"{Path(file).stem}.{name}" for name in names]
    return found


def test_every_public_definition_has_its_chapter():
    missing = [f"{module}.{name}" for module in MODULES for name in public_definitions(module)
               if name not in syllabus.DEFINITIONS.get(module, {})]
    assert not missing, f"no chapter shows {missing}: assign them in the syllabus"


@pytest.mark.parametrize("name", MODULES)
def test_the_syllabus_names_only_what_is_there(name):
    module = read_module(f"minimistral/{name}.py")
    there = {*module.definitions, *module.constants}
    gone = set(syllabus.DEFINITIONS.get(name, {})) - there
    assert not gone, f"the syllabus assigns {sorted(gone)}, which {module.path} does not define"


def test_the_plan_of_the_house_names_the_teaching_modules():
    (told,) = re.findall(r"teaching modules in reading order: (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert tuple(told.split(", ")) == MODULES, "CONTRIBUTING.md and the syllabus have different teaching modules"


@pytest.mark.parametrize("chapter", syllabus.CHAPTERS, ids=lambda c: c.name)
def test_a_chapter_shows_what_it_owes(chapter):
    path = ROOT / chapter.path()
    owed = [
        f"{module}.{name}"
        for module, names in syllabus.DEFINITIONS.items()
        for name, number in names.items()
        if number == chapter.number
    ]
    missing = sorted(set(owed) - set(shown_by(path)))
    assert not missing, f"{chapter.name} owes {missing}: show them in a library cell"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_library_cells_are_the_library(path):
    for source in library_cells(path):
        file, names = parts(source)
        assert source == shown(file, names), f"{path.name} differs from {file}: run.py build"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_definition_is_shown_where_it_belongs(path):
    for name in shown_by(path):
        module, _, definition = name.partition(".")
        number = syllabus.DEFINITIONS.get(module, {}).get(definition)
        assert number == int(path.stem[:2]), f"{path.name} shows {name}; it belongs to {number}"


def test_no_definition_is_shown_twice():
    counts = Counter(name for path in CHAPTERS for name in shown_by(path))
    assert not [name for name, count in counts.items() if count > 1]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_drafts_carry_other_names(path):
    """Outside of library cells only the learner's own turn defines a name of the library."""
    public = {name for module in MODULES for name in public_definitions(module)}
    for cell in nbformat.read(path, 4).cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type != "code" or tags & {"library", "your-turn"}:
            continue
        for node in ast.parse(plain(cell.source)).body:  # a method may have any name
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.name not in public, f"{path.name}: a draft is called {node.name}"


def plain(source: str) -> str:
    """Python without IPython's magics."""
    return "\n".join("pass" if x.lstrip()[:1] in ("%", "!") else x for x in source.splitlines())
