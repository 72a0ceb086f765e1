"""Two copies of the course for a class: `minimistral copies OUT`.

    OUT/student      stories, exercises and what they need; no solutions
    OUT/instructor   the same, with solutions, answer keys, slides and the guides

Each is complete: with Python and `python3 run.py lab` in it one can begin. The checks have to know the
right answers, so the package holds them in both copies; who looks into minimistral/course/records
finds them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from minimistral.files import write_whole
from minimistral.lab import course_folder

from .answers import answer_key
from .slides import write_slides
from .syllabus import CHAPTERS, EXERCISES, NOTEBOOKS, SOLUTIONS, Chapter, chapter

NEEDED = ("run.py", "pyproject.toml", "constraints.txt", "LICENSE")
LINK = re.compile(r"\[([^]]+)\]\(([\w./-]+\.(?:ipynb|md))(?:#[^)]*)?\)")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")

STUDENT = """# minimistral: the student's copy

{chapters}

## Begin

You need Python 3.11, 3.12 or 3.13. In this folder:

```
python3 run.py lab
```

On Windows: `py run.py lab`. The first time it installs what the course needs, which takes minutes and a
network (your instructor may have a pack that needs none). Then JupyterLab opens chapter 0. You work in copies
in `work/`; nothing here is changed.

## How a chapter goes

1. Read the story in `notebooks/`: guess, run, be surprised, write the piece.
2. Then do the exercises of the same name in `exercises/`. `check` says what is wrong, `hint("name")` helps.
3. Lost? `.venv/bin/minimistral progress` (on Windows `.venv\\Scripts\\minimistral progress`) names the next step,
   `search WORDS` and `glossary WORD` in its place find things; in a notebook: `search("...")`, `glossary("...")`.

There are no solutions in this copy. The checks know the answers, so they are somewhere in the package; looking
them up saves an hour and costs what you came for.
"""

INSTRUCTOR = """# minimistral: the instructor's copy

{chapters}

Not for students: this copy has the solutions.

| Where | What |
|---|---|
| [docs/instructors.md](docs/instructors.md) | the guide: three plans, what to say, where people get stuck |
| [docs/exercises.md](docs/exercises.md) | every exercise: minutes, the question to ask, mistakes to expect |
| `docs/` | the other pages: mistakes, glossary, grading and more |
| `notebooks/`, `exercises/` | what students have |
| `solutions/` | the exercises solved and explained |
| `answers/` | for each chapter: the predictions with their answers, the orders to type |
| `slides/` | one HTML file for each chapter; no network needed. Arrow keys go, N shows notes, F fills the screen; printing gives a handout |

`python3 run.py lab` opens the course here, as in the student's copy. The guide refers to what follows; it is from the
README of the whole course.

{start}
"""


def make_copies(out: Path, numbers: Sequence[int] = (), root: Path | None = None) -> list[Path]:
    """Write both copies below ``out``, of some chapters or of all; the two folders.

    Chapter 0 is always among them: JupyterLab opens it, and it says whether the machine has all.

    Raises FileExistsError if one is there already, ValueError for an exercise notebook that shows a
    passed check.
    """
    root = root or course_folder()
    chosen = [chapter(n) for n in sorted({0, *numbers})] if numbers else list(CHAPTERS)
    student, instructor = out / "student", out / "instructor"
    for folder in (student, instructor):
        if folder.exists():
            raise FileExistsError(f"{folder} exists; name another folder, or remove it")
    for one in chosen:
        _refuse_answers(root / one.path(EXERCISES))
    for folder in (student, instructor):
        _common(root, folder, chosen)
    write_whole(student / "README.md", STUDENT.format(chapters=_named(chosen)))
    start = "".join(_of_readme(root, heading) for heading in ("## Start", "### A small PyTorch on Linux"))
    write_whole(instructor / "README.md", INSTRUCTOR.format(chapters=_named(chosen), start=start.strip()))
    shutil.copy2(root / "CONTRIBUTING.md", instructor)
    _notebooks(root, instructor, SOLUTIONS, chosen)
    (instructor / "docs").mkdir()
    for page in (root / "docs").glob("*.md"):
        shutil.copy2(page, instructor / "docs")
    for one in chosen:
        write_slides(one.number, instructor / "slides", root=root)
        write_whole(instructor / "answers" / f"{one.name}.md", answer_key(one, root))
    _unlink(student)
    _unlink(instructor)
    return [student, instructor]


def _common(root: Path, folder: Path, chosen: Iterable[Chapter]) -> None:
    """What both copies need to run."""
    folder.mkdir(parents=True)
    for name in NEEDED:
        shutil.copy2(root / name, folder)
    shutil.copytree(root / "minimistral", folder / "minimistral", ignore=LEFT_OUT)
    shutil.copytree(root / "benchmarks" / "results", folder / "benchmarks" / "results")  # stories read these
    for kind in (NOTEBOOKS, EXERCISES):
        _notebooks(root, folder, kind, chosen)


def _notebooks(root: Path, folder: Path, kind: str, chosen: Iterable[Chapter]) -> None:
    (folder / kind).mkdir()
    for one in chosen:
        shutil.copy2(root / one.path(kind), folder / kind)


def _unlink(folder: Path) -> None:
    """A link to a page that this copy leaves out becomes its words."""
    for page in [*folder.glob("docs/*.md"), *folder.glob("*/*.ipynb")]:
        def there(link: re.Match, page=page) -> str:
            return link[0] if (page.parent / link[2]).exists() else link[1]

        write_whole(page, LINK.sub(there, page.read_text(encoding="utf-8")))


def _of_readme(root: Path, heading: str) -> str:
    """A section of the course's README, to the next heading."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    return re.search(rf"^{heading}\n.*?(?=^#)", readme, re.M | re.S)[0]


def _refuse_answers(path: Path) -> None:
    """An exercise notebook shows what its stubs give, never a pass; no cell is a solution."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        shown = json.dumps(cell.get("outputs", []), ensure_ascii=False)
        if "PASS ·" in shown or "solution" in cell["metadata"].get("tags", []):
            raise ValueError(f"{path.name} in {path.parent.name} shows an answer: build it anew (run.py build)")


def _named(chosen: Iterable[Chapter]) -> str:
    return "\n".join(f"- [{c.number}. {c.title}]({c.path()}): {c.question}" for c in chosen)
