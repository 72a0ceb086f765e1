"""One definition, one chapter, verbatim: what the notebooks show of the library."""

import ast
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from minimistral.course import syllabus
from minimistral.course.notebook_library import read_module, shown

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
WRITTEN = [c for c in syllabus.CHAPTERS if c.written]
MODULES = [m for m in syllabus.TEACHING_MODULES if (ROOT / "minimistral" / f"{m}.py").exists()]


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
    missing = syllabus.unassigned()
    assert not missing, f"no chapter shows {missing}: assign them in the syllabus"


@pytest.mark.parametrize("name", MODULES)
def test_the_syllabus_names_only_what_is_there(name):
    module = read_module(f"minimistral/{name}.py")
    there = {*module.definitions, *module.constants}
    gone = set(syllabus.DEFINITIONS.get(name, {})) - there
    assert not gone, f"the syllabus assigns {sorted(gone)}, which {module.path} does not define"


@pytest.mark.parametrize("chapter", WRITTEN, ids=lambda c: c.name)
def test_a_written_chapter_shows_what_it_owes(chapter):
    path = ROOT / chapter.path()
    assert path.exists(), f"{chapter.name} is called written, and {chapter.path()} is not there"
    owed = [
        f"{module}.{name}"
        for module, names in syllabus.DEFINITIONS.items()
        for name, number in names.items()
        if number == chapter.number and module in MODULES
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
    public = {name for module in MODULES for name in syllabus.public_definitions(module)}
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
