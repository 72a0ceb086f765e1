"""A notebook read as a text: chapters, sections, and what stands in them.

The indexes, the search, the slides and the instructor's guide all ask the same questions: which sections
has a chapter, in which one is this exercise. Nothing is run here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minimistral.lab import course_folder

from .syllabus import NOTEBOOKS, Chapter

HEADING = re.compile(r"^(#{1,4}) +(.+?) *$", re.M)


@dataclass(frozen=True)
class Part:
    """A stretch of prose, or one code cell with its outputs, below one heading."""

    kind: str  # "markdown" or "code"
    text: str
    cell: int  # number of the notebook's cell
    tags: frozenset[str] = frozenset()
    outputs: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Section:
    """What stands under one heading of level 1, 2 or 3, up to the next heading."""

    chapter: Chapter
    folder: str
    title: str
    level: int
    parts: tuple[Part, ...]

    @property
    def further(self) -> bool:
        """Whether it is one of the optional sections behind the core."""
        return self.title.startswith("Further")

    @property
    def path(self) -> str:
        return self.chapter.path(self.folder)

    @property
    def slug(self) -> str:
        """The heading's anchor as GitHub and MyST make it."""
        return re.sub(r"[^\w\- ]", "", self.title.lower()).replace(" ", "-")

    @property
    def cells(self) -> tuple[int, ...]:
        """The numbers of its code cells."""
        return tuple(part.cell for part in self.parts if part.kind == "code")


def read_sections(chapter: Chapter, folder: str = NOTEBOOKS, root: Path | None = None) -> tuple[Section, ...]:
    """The sections of one notebook, in order; empty where the chapter has no such notebook."""
    path = (root or course_folder()) / chapter.path(folder)
    return _read(path, chapter, folder, path.stat().st_mtime_ns) if path.exists() else ()


@cache
def _read(path: Path, chapter: Chapter, folder: str, stamp: int) -> tuple[Section, ...]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found: list[tuple[str, int, list[Part]]] = []
    for part in _parts(cells):
        match = HEADING.match(part.text) if part.kind == "markdown" else None
        if match and len(match[1]) <= 3:
            found.append((match[2], len(match[1]), []))
            part = Part("markdown", part.text[match.end():].strip(), part.cell, part.tags)
            if not part.text:
                continue
        found[-1][2].append(part)
    return tuple(Section(chapter, folder, title, level, tuple(parts)) for title, level, parts in found)


def _parts(cells: list[dict]) -> Iterator[Part]:
    """The cells; one with several headings is cut before each of them."""
    for number, cell in enumerate(cells):
        text = "".join(cell["source"])
        tags = frozenset(cell["metadata"].get("tags", []))
        if cell["cell_type"] == "code":
            yield Part("code", text, number, tags, tuple(joined(cell["outputs"])))
            continue
        cuts = [m.start() for m in HEADING.finditer(text)]
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            if piece := text[start:end].strip():
                yield Part("markdown", piece, number, tags)


def section_of(name: str, chapter: Chapter, root: Path | None = None) -> Section | None:
    """The section in which the exercise ``name`` is checked: in the story, or else among the exercises."""
    call = re.compile(rf"""\bcheck\(\s*["'](?:ch\d\d\.)?{re.escape(name)}["']""")
    for folder in (NOTEBOOKS, "exercises"):
        for section in read_sections(chapter, folder, root):
            if any(part.kind == "code" and call.search(part.text) for part in section.parts):
                return section
    return None


def recap_mistakes(chapter: Chapter, root: Path | None = None) -> list[tuple[str, str]]:
    """The rows (mistake, symptom) of the table that ends a chapter, as Markdown."""
    for section in read_sections(chapter, root=root):
        for part in section.parts:
            if part.kind == "markdown" and "mistakes and what they look like" in part.text:
                rows = re.findall(r"^\| (.+?) \| (.+?) \|$", part.text, re.M)
                return [row for row in rows if row != ("Mistake", "Symptom")]
    return []


def joined(outputs: Sequence[dict]) -> list[dict]:
    """A cell's outputs; what it printed without a break is one, where the kernel sent it in pieces."""
    found: list[dict] = []
    for output in outputs:
        last = found[-1] if found else {}
        if output["output_type"] == last.get("output_type") == "stream" and output["name"] == last["name"]:
            found[-1] = type(output)({**last, "text": output_text(last) + output_text(output)})
        else:
            found.append(output)
    return found


def output_text(output: dict) -> str:
    """An output's words: what was printed, or the plain text of what was shown."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
