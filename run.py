#!/usr/bin/env python3
"""One command does it all. Nothing else has to be installed first.

  python3 run.py lab [options]           set up once, then open the course in JupyterLab
  python3 run.py test [08] [options]     set up once, then run every test, or those of chapter 8
  python3 run.py build [08] [options]    set up once, then rebuild the notebooks from their sources
  python3 run.py site [options]          the course as pages that need no server, in build/site
  python3 run.py pack OUT [options]      everything for a room without a network, in one folder
  python3 run.py report [08] [options]   what every check tells, and what every notebook costs
  python3 run.py publish                 write the links to the public address into README and docs/

On Windows write `py run.py lab`. Options go on to `minimistral lab`, to pytest and to the builder.
Needs Python 3.11, 3.12 or 3.13. The environment is .venv beside this file; MINIMISTRAL_VENV names
another place. After a change of pyproject.toml or constraints.txt it is brought up to date.
"""
# Standard library only, and a syntax that Python 3.6 can read, so that an old one gets a clear answer.
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENV = Path(os.environ.get("MINIMISTRAL_VENV") or ROOT / ".venv").absolute()
PYTHON = ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST, NEWEST = (3, 11), (3, 13)
EXTRAS = {"lab": "course", "test": "test", "build": "test", "report": "test", "site": "course,site", "pack": "course,site", "publish": "course"}


class Problem(Exception):
    """Something that the person at the keyboard can repair; the message says how."""


def check_python(version):
    """Raises Problem unless `version` (major, minor, ...) is one that the pinned packages exist for."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return
    here = ".".join(str(part) for part in version[:3])
    better = other_python()
    raise Problem(
        "This is Python {}; the course needs 3.11, 3.12 or 3.13. {}".format(
            here,
            "Found one: {} {} {}".format(better, sys.argv[0] or "run.py", " ".join(sys.argv[1:]) or "lab")
            if better
            else "Install one of them from your system's packages or from python.org, "
            "then run it in place of this one, e.g. python3.13 run.py lab",
        )
    )


def other_python():
    """The command of a suitable Python on this machine, or None."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        for command in (["py", "-3.{}".format(minor)], ["python3.{}".format(minor)]):
            if shutil.which(command[0]) is None:
                continue
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            if subprocess.call(command + ["--version"], **quiet) == 0:
                return " ".join(command)
    return None


def wanted(extra):
    """The text that a stamp holds when the environment has `extra` as this checkout describes it."""
    digest = hashlib.sha256(str(ROOT).encode("utf-8"))
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return "{} {}".format(extra, digest.hexdigest())


def stamp(extra):
    return ENV / "minimistral-{}.stamp".format(extra)


def is_ready(extra):
    """Whether a finished installation of `extra`, or of more, is there. Reads three small files."""
    return PYTHON.exists() and any(
        stamp(one).exists() and stamp(one).read_text(encoding="utf-8") == wanted(one)
        for one in (extra, "test")
    )


def check_folder():
    """Raises Problem if the environment's folder holds something that is not ours to change."""
    if ENV.exists() and any(ENV.iterdir()) and not (ENV / "pyvenv.cfg").exists():
        raise Problem(
            "{} exists, is not empty and is no Python environment. Name an empty or a new folder "
            "with MINIMISTRAL_VENV, or remove it yourself.".format(ENV)
        )


def make_environment():
    """Creates the environment, or repairs one that was interrupted while it was created."""
    if importlib.util.find_spec("ensurepip") is None:
        raise Problem(
            "This Python comes without pip. On Debian and Ubuntu: sudo apt install python3-venv. "
            "Then run the same command again."
        )
    print("Creating the environment {} ...".format(ENV), flush=True)
    # An environment whose Python is gone (the system's was upgraded) is of no use: start it afresh.
    try:
        venv.create(str(ENV), with_pip=True, clear=not PYTHON.exists(), symlinks=os.name != "nt")
    except OSError as error:
        raise Problem(
            "It cannot be created: {}. Move the course to a folder that you may write to, on a disk with "
            "4 GB of space.".format(error)
        )


def remove_half_installed():
    """Removes what a killed pip left, so that the next one installs it again.

    pip writes a package's RECORD last: a package without one was interrupted. Folders that start
    with ~ are packages that it was about to replace.
    """
    for site in list(ENV.glob("lib/python*/site-packages")) + [ENV / "Lib" / "site-packages"]:
        for folder in site.glob("*.dist-info"):
            if not (folder / "RECORD").exists():
                shutil.rmtree(str(folder))
        for folder in site.glob("~*"):
            shutil.rmtree(str(folder), ignore_errors=True)


def pip_works():
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return PYTHON.exists() and subprocess.call([str(PYTHON), "-m", "pip", "--version"], **quiet) == 0


def install(extra):
    """pip installs the project with `extra` at the pinned versions; one line tells how long."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["-c", "constraints.txt", "-e", ".[{}]".format(extra)]
    note = "Installing, a minute to ten the first time"
    offline = os.environ.get("PIP_NO_INDEX")  # from a pack: nothing is downloaded
    if not offline and sys.platform == "linux" and not shutil.which("nvidia-smi") and not list(
        ENV.glob("lib/python*/site-packages/torch")
    ):
        note += " (3 GB at most; README, 'A small PyTorch on Linux', shows how to save most of it)"
    print(note + " ...", flush=True)
    start, done = time.monotonic(), threading.Event()
    threading.Thread(target=tell_time, args=(done, start), daemon=True).start()
    try:
        status = subprocess.call(command, cwd=str(ROOT))
    finally:
        done.set()
    if status != 0:
        raise Problem(
            "The installation did not finish; the lines above say why. It needs a network and some "
            "4 GB of disk, once. Run the same command again: it goes on from there. For a machine "
            "without a network, docs/opening.md has a pack."
        )
    print("Installed in {:.0f} seconds.".format(time.monotonic() - start), flush=True)


def tell_time(done, start):
    """Says twice a minute that pip, which is silent, is still at work."""
    before = shutil.disk_usage(str(ROOT)).free
    while not done.wait(30):
        written = max(0, before - shutil.disk_usage(str(ROOT)).free) / 1e9
        print("  {:.0f} seconds, {:.1f} GB on the disk so far".format(time.monotonic() - start, written), flush=True)


def ready(extra):
    """Brings the environment up to what `extra` needs; returns at once when it is there."""
    if is_ready(extra):
        return
    check_folder()
    if stamp(extra).exists():
        stamp(extra).unlink()
    remove_half_installed()
    if not pip_works():
        make_environment()
    install(extra)
    stamp(extra).write_text(wanted(extra), encoding="utf-8")


def chapter_paths(number):
    """What belongs to one chapter: its notebooks in three folders and its tests."""
    name = "{:02d}".format(int(number))
    patterns = [folder + "/" + name + "_*.ipynb" for folder in ("notebooks", "solutions", "exercises")]
    patterns.append("tests/chapters/test_" + name + "_*.py")
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    if not paths:
        there = sorted({path.name[:2] for path in ROOT.glob("notebooks/[0-9][0-9]_*.ipynb")})
        raise Problem(
            "There is no chapter {} here yet. Chapters: {}.".format(name, ", ".join(there) or "none")
        )
    return [path.relative_to(ROOT).as_posix() for path in paths]


def split_chapters(options):
    """The chapter numbers at the front of `options`, and the rest of them."""
    count = 0
    while count < len(options) and re.fullmatch(r"\d{1,2}", options[count]):
        count += 1
    return options[:count], options[count:]


def command_line(task, options):
    """The arguments for the environment's Python that carry out `task`."""
    if task == "lab":
        return ["-m", "minimistral", "lab"] + options
    if task in ("build", "report", "site", "pack", "publish"):
        return ["-m", "minimistral.course." + task] + options
    chapters, rest = split_chapters(options)
    paths = [path for number in chapters for path in chapter_paths(number)]
    # Two workers, each notebook whole on one of them: cells of one notebook need one kernel.
    workers = [] if any(re.match("-n|--numprocesses", one) for one in rest) else ["-n", "2"]
    return ["-m", "pytest"] + workers + ["--dist", "loadfile"] + paths + rest


def main(arguments):
    task, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    if task not in EXTRAS:
        print(__doc__)
        return 0 if task in ("-h", "--help") else 2
    environment = dict(os.environ, PYTHONUTF8="1")
    if task == "test":  # the two workers would fight for the cores with a thread per core each
        environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        check_python(sys.version_info)
        command = command_line(task, options)
        ready("test" if task == "site" and "--check" in options else EXTRAS[task])
        return subprocess.call([str(PYTHON)] + command, cwd=str(ROOT), env=environment)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
