"""A folder of submissions, as platforms give it: who handed in which notebooks.

Everything is read once, before anything runs; what runs is a copy of what was read.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nbformat

from .exercises import Exercise, all_exercises, find_exercise
from .syllabus import CHAPTERS

MOST_BYTES = 30 * 2**20  # of one file
MOST_IN_ALL = 200 * 2**20  # of one student
IGNORED = re.compile(r"(^|/)(\.|__MACOSX|__pycache__)")
MOODLE = re.compile(r"_\d+_assignsubmission_\w*$")
CANVAS = re.compile(r"_(?:LATE_)?\d{3,}_\d{3,}_?")
CALL = re.compile(r"""\bcheck\(\s*["']([\w.]+)["']""")


@dataclass
class Notebook:
    """One notebook that was handed in."""

    name: str  # its path inside what the student handed in
    cells: list[str] = field(default_factory=list)  # code
    calls: dict[str, int] = field(default_factory=dict)  # exercise key -> the cell that checks it
    broken: str = ""  # why it cannot be read


@dataclass
class Student:
    """One student: a name, and files as they were handed in."""

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    notebooks: list[Notebook] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # files too large


def read_folder(folder: Path, chapter: int | None = None) -> list[Student]:
    """The students below `folder`: single notebooks, folders, zip files, or one zip of all these.

    Raises ValueError if there is no notebook anywhere.
    """
    if folder.is_file() and zipfile.is_zipfile(folder):
        found = _by_student(_without_wrapper(_unzipped(folder.read_bytes(), folder.name)))
    elif folder.is_dir():
        found = _by_student(_walk(folder))
    else:
        raise ValueError(f"{folder} is no folder and no zip file")
    students = []
    for name, files in sorted(found.items()):
        student = Student(name)
        total = 0
        for path, content in sorted(files.items()):
            total += len(content or b"")
            if content is None or total > MOST_IN_ALL:
                student.left_out.append(path)
            else:
                student.files[path] = content
        student.notebooks = [
            _read(path, content, chapter) for path, content in student.files.items() if path.endswith(".ipynb")
        ]
        if student.notebooks:
            students.append(student)
    if not students:
        raise ValueError(f"{folder} holds no notebook: one .ipynb or one folder for each student is wanted")
    return students


def _walk(folder: Path) -> dict[str, bytes | None]:
    """Plain files by their path; None for one that is too large. Links are not followed."""
    files: dict[str, bytes | None] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not IGNORED.search(name))
        for name in sorted(names):
            path = Path(place, name)
            inside = path.relative_to(folder).as_posix()
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or IGNORED.search(inside):
                continue
            content = path.read_bytes() if found.st_size <= MOST_BYTES else None
            if name.endswith(".zip") and content and zipfile.is_zipfile(io.BytesIO(content)):
                files |= {f"{inside[:-4]}/{p}": c for p, c in _unzipped(content, name).items()}
            else:
                files[inside] = content
    return files


def _unzipped(content: bytes, name: str) -> dict[str, bytes | None]:
    """A zip's plain files. Nothing is written, so no path in it can lead anywhere."""
    files: dict[str, bytes | None] = {}
    total = 0
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for info in archive.infolist():
                path = PurePosixPath(info.filename.replace("\\", "/"))
                inside = "/".join(part for part in path.parts if part not in ("/", ".."))
                if info.is_dir() or IGNORED.search(inside):
                    continue
                total += info.file_size
                too_large = info.file_size > MOST_BYTES or total > MOST_IN_ALL
                files[inside] = None if too_large else archive.read(info)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, ValueError):
        files[f"{name[:-4]}.ipynb"] = b""  # told as a notebook that cannot be read
    return files


def _by_student(files: dict[str, bytes | None]) -> dict[str, dict[str, bytes | None]]:
    """The first folder names the student; without one the file does."""
    found: dict[str, dict[str, bytes | None]] = {}
    for path, content in files.items():
        first, _, rest = path.partition("/")
        if rest:
            found.setdefault(_clean(first), {})[rest] = content
        elif path.endswith(".ipynb"):
            found.setdefault(_student_of(path), {})[path] = content
    return found


def _without_wrapper(files: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """A zip file often holds one folder with everything in it: what is in that folder."""
    if len({path.split("/")[0] for path in files}) != 1:
        return files
    inner = {path.partition("/")[2]: content for path, content in files.items()}
    return inner if any("/" in path for path in inner) else files


def _clean(folder: str) -> str:
    return MOODLE.sub("", folder).strip() or folder


def _student_of(path: str) -> str:
    """anna_02_attention.ipynb -> anna; what stays when chapter and platform's numbers are gone."""
    stem = path.removesuffix(".ipynb")
    if match := CANVAS.search(stem):
        return stem[: match.start()]
    for chapter in CHAPTERS:
        stem = stem.replace(chapter.name, " ")
    stem = re.sub(r"\s*\(\d+\)|(?:^|[ _-])\d\d(?=$|[ _-])", " ", stem)
    return re.sub(r"^[\s_.-]+|[\s_.-]+$", "", stem) or path.removesuffix(".ipynb")


def _read(path: str, content: bytes, chapter: int | None) -> Notebook:
    notebook = Notebook(path)
    try:
        if json.loads(content).get("nbformat", 0) < 1:
            raise ValueError("no notebook")
        cells = nbformat.reads(content.decode("utf-8"), as_version=4).cells
        notebook.cells = [str(cell.source) for cell in cells if cell.cell_type == "code"]
    except Exception as error:  # no JSON, no notebook, nested too deeply
        notebook.broken = f"not a readable notebook ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    for number, source in enumerate(notebook.cells):
        for name in CALL.findall(source):
            try:
                exercise = find_exercise(name)
            except ValueError:  # no exercise of ours
                continue
            if chapter in (None, exercise.chapter):
                notebook.calls[exercise.key] = number
    return notebook


def asked(students: list[Student]) -> list[Exercise]:
    """The exercises of this assignment: those that at least one notebook checks."""
    called = {key for student in students for notebook in student.notebooks for key in notebook.calls}
    return [exercise for exercise in all_exercises() if exercise.key in called]
