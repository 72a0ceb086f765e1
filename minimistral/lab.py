"""The learner's own folder: chapters copied to `work/`, a greeting, JupyterLab.

Chapters, exercises and solutions are copied, and JupyterLab opens the copies: nothing that a
learner does changes the originals, and no new version of an original overwrites their work.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from minimistral.files import write_whole

FOLDERS = ("notebooks", "exercises", "solutions")
FIRST = "notebooks/00_start_here.ipynb"
MANIFEST = ".copied.json"  # path in work/: SHA-256 of what was copied there


def course_folder() -> Path:
    """The checkout that holds `notebooks/`: beside the package, or the current folder.

    Raises FileNotFoundError where there is none: the chapters are no part of the wheel.
    """
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if any(folder.glob("notebooks/[0-9][0-9]_*.ipynb")):
            return folder
    raise FileNotFoundError(
        "no notebooks/ beside the package or in the current folder: the chapters come with the "
        "project's repository; run `python3 run.py lab` there"
    )


def course_work_folder() -> Path:
    """Where the learner's files are: MINIMISTRAL_WORK, or `work/` in the course's checkout, or
    here where there is none."""
    try:
        beside = course_folder()
    except FileNotFoundError:
        beside = Path.cwd()
    return Path(os.environ.get("MINIMISTRAL_WORK") or beside / "work").absolute()


def from_here(path: Path) -> str:
    """A path as it is told to the learner: from the current folder, where that is shorter."""
    try:
        return min(os.path.relpath(path), str(path), key=len)
    except ValueError:  # another drive of Windows
        return str(path)


def copy_course(course: Path, work: Path) -> list[Path]:
    """Copies every notebook of `course` to `work`; returns the files written, relative to `work`.

    A copy that the learner has not changed follows its original. One that they changed is never
    touched: a new version of the original is put beside it, once, as `NAME.new.ipynb`.
    """
    manifest_file = work / MANIFEST
    copied = json.loads(manifest_file.read_text("utf-8")) if manifest_file.exists() else {}
    written = []
    for folder in FOLDERS:
        for original in sorted((course / folder).glob("*.ipynb")):
            content = original.read_bytes()
            target = _place(work, Path(folder) / original.name, _digest(content), copied)
            if target is None:
                continue
            write_whole(work / target, content)
            copied[target.as_posix()] = _digest(content)
            write_whole(manifest_file, json.dumps(copied, indent=1))
            written.append(target)
    return written


def reset_chapter(course: Path, work: Path, number: int) -> list[tuple[Path, Path | None]]:
    """Puts fresh copies of a chapter into `work`; a changed file is kept beside, as `NAME.old.ipynb`.

    Returns what was replaced and where the old file is (None if there was none, or an equal one),
    relative to `work`. Raises ValueError for a chapter that does not exist.
    """
    manifest_file = work / MANIFEST
    copied = json.loads(manifest_file.read_text("utf-8")) if manifest_file.exists() else {}
    done = []
    for original in (o for folder in FOLDERS
                     for o in sorted((course / folder).glob(f"{number:02d}_*.ipynb"))):
        name, content = original.relative_to(course), original.read_bytes()
        kept = None
        if (work / name).exists() and (work / name).read_bytes() != content:
            kept = next(c for c in _candidates(name, "old") if c != name and not (work / c).exists())
            os.replace(work / name, work / kept)
        write_whole(work / name, content)
        copied[name.as_posix()] = _digest(content)
        write_whole(manifest_file, json.dumps(copied, indent=1))
        done.append((name, kept))
    if not done:
        raise ValueError(f"there is no chapter {number} in {course}")
    return done


def _place(work: Path, name: Path, digest: str, copied: dict[str, str]) -> Path | None:
    """Where a version of an original belongs, or None if the learner has, or had, that version."""
    for target in _candidates(name, "new"):
        last = copied.get(target.as_posix())
        if not (work / target).exists():
            deleted_update = target != name and last == digest
            return None if deleted_update else target
        found = _digest((work / target).read_bytes())
        if digest in (found, last):
            return None  # up to date, or the learner's work on this very version
        if found == last:
            return target  # untouched since it was copied


def _candidates(name: Path, word: str) -> Iterator[Path]:
    """NAME.ipynb, NAME.word.ipynb, NAME.word2.ipynb, ..."""
    yield name
    yield name.with_suffix(f".{word}.ipynb")
    number = 2
    while True:
        yield name.with_suffix(f".{word}{number}.ipynb")
        number += 1


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def greet(model_name: str = "tales-dense", seed: int | None = None) -> None:
    """A shipped model tells a short tale in the terminal; says so in one line if it cannot."""
    seed = random.randrange(1000) if seed is None else seed
    try:
        import minimistral as mm

        model, tokenizer = mm.load_model(model_name), mm.load_tokenizer(model_name)
        print(f"{model_name}, a model trained for this course, tells a tale (seed {seed}):\n")
        ids = mm.stream(model, [tokenizer.bos_id], 160, temperature=0.7, seed=seed, stop_ids=[tokenizer.eos_id])
        for text in tokenizer.decode_stream(ids):
            print(text, end="", flush=True)
        print("\n")
    except Exception as error:  # a greeting is no reason to keep the learner out of the course
        print(f"(The shipped model could not greet you: {error}. `minimistral doctor` tells more.)\n")


def open_lab(work: Path, options: list[str]) -> int:
    """Starts JupyterLab in `work` at chapter 0 and waits for its end; returns its exit status."""
    command = [sys.executable, "-m", "jupyterlab", *lab_arguments(work), *options]
    return subprocess.call(command, cwd=work)


def lab_arguments(work: Path) -> list[str]:
    """JupyterLab's arguments: the learner's folder is its root, chapter 0 its first page.

    Our settings folder only changes defaults: JupyterLab doesn't look for news and updates, nor
    ask whether it may, so that a course without a network starts without a question.
    """
    arguments = [
        f"--ServerApp.root_dir={work}",
        f"--LabApp.default_url=/lab/tree/{FIRST}",
        f"--LabApp.app_settings_dir={Path(__file__).parent / 'assets' / 'jupyterlab'}",
        "--Application.log_level=WARN",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--allow-root")  # in a container; Jupyter refuses root otherwise
    return arguments


def main(*, browser: bool, options: list[str], only_copy: bool = False) -> int:
    """Copy, greet, open: the whole of `minimistral lab`. `only_copy` ends after the first."""
    course, work = course_folder(), course_work_folder()
    written = copy_course(course, work)
    if written:
        print(f"Copied {len(written)} notebooks to {from_here(work)}")
    for target in written:
        if target.suffixes != [".ipynb"]:
            print(f"  {target.as_posix()}: a newer version, put beside the one you changed")
    if only_copy:
        return 0
    greet()
    return open_lab(work, ([] if browser else ["--no-browser"]) + options)
