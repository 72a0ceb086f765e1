#!/usr/bin/env python3
"""Install the course from this folder, without a network.

  python3 install.py [FOLDER]      put the course into FOLDER (default: minimistral, where you are)
  python3 install.py --check       only compare this pack's files with their checksums

On Windows write `py install.py`. Afterwards go into FOLDER and run `python3 run.py lab`. Running it again
repairs an installation that was stopped; your own files in FOLDER/work stay as they are.
"""
# Standard library only, and a syntax that Python 3.6 can read, so that an old one gets a clear answer.
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SUMS = "SHA256SUMS"
SYSTEMS = {"linux": "linux", "win32": "windows", "darwin": "macos"}


def sha256(path):
    digest = hashlib.sha256()
    with open(str(path), "rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            digest.update(part)
    return digest.hexdigest()


def damaged(pack):
    """The files of a pack that are missing or changed, and how many there are in all."""
    lines = (pack / SUMS).read_text(encoding="utf-8").splitlines()
    bad = []
    for line in lines:
        digest, name = line.split("  ", 1)
        path = pack / name
        if not path.is_file() or sha256(path) != digest:
            bad.append(name)
    return bad, len(lines)


def unsuitable(pack):
    """Why this Python cannot use the pack's packages, or an empty text."""
    targets = json.loads((pack / "pack.json").read_text(encoding="utf-8"))["targets"]
    system = SYSTEMS.get(sys.platform, sys.platform)
    here = {"system": system, "python": "{}.{}".format(*sys.version_info[:2])}
    if here in targets:
        return ""
    held = ", ".join("Python {python} on {system}".format(**one) for one in targets)
    return "This is Python {python} on {system}; the pack is for: {held}.".format(held=held, **here)


def put_course(pack, folder):
    """Copies the course to `folder`. Raises OSError if something else is there."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "run.py").exists():
        raise OSError("{} is not empty and holds no course; name another folder".format(folder))
    shutil.copytree(str(pack / "course"), str(folder), dirs_exist_ok=True)


def set_up(pack, folder):
    """The course's own set-up, with this pack's packages in place of a network; its exit status."""
    environment = dict(
        os.environ,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=(pack / "wheels").as_uri(),  # pip splits this at spaces; an address has none
        PIP_CONFIG_FILE=os.devnull,
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PYTHONUTF8="1",
    )
    command = [sys.executable, "run.py", "lab", "--copy"]
    return subprocess.call(command, cwd=str(folder), env=environment)


def main(arguments):
    pack = Path(__file__).resolve().parent
    if any(one in ("-h", "--help") for one in arguments) or len(arguments) > 1:
        print(__doc__)
        return 0 if len(arguments) == 1 else 2
    only_check = arguments == ["--check"]
    problem = "" if only_check else unsuitable(pack)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    start = time.monotonic()
    bad, count = damaged(pack)
    if bad:
        print("{} of {} files are missing or damaged; copy the pack again:".format(len(bad), count),
              *bad[:20], sep="\n  ", file=sys.stderr)
        return 2
    print("All {} files of the pack are whole.".format(count), flush=True)
    if only_check:
        return 0
    folder = Path(arguments[0] if arguments else "minimistral").absolute()
    try:
        put_course(pack, folder)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    if set_up(pack, folder) != 0:
        return 1
    print('Ready in {:.0f} seconds. Now: cd "{}" and {} run.py lab'.format(
        time.monotonic() - start, folder, "py" if os.name == "nt" else "python3"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
