"""`python3 run.py pack OUT`: everything for a room without a network, in one folder to carry there.

    python3 run.py pack OUT                                           for this system and this Python
    python3 run.py pack OUT --platform windows --platform linux --python 3.12 --python 3.13

OUT gets the course, the packages of its extra `course` at the pinned versions, the web edition to read
without installing anything, checksums of every file, and install.py, which needs Python alone. Packages for
another system are chosen by that system's markers; pip downloads them, from wherever it is told to look.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minimistral.course import pack_install
from minimistral.course.notebook_library import ROOT

EXTRA = "course"
PYTHONS = ("3.11", "3.12", "3.13")
# glibc 2.28 is that of systems from 2018 on; PyTorch asks for it
LINUX = ("linux", *(f"manylinux_2_{n}" for n in (28, *range(27, 16, -1), 12, 5)), "manylinux2014")
PLATFORMS = {
    "linux": (tuple(f"{tag}_x86_64" for tag in LINUX),
              {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}),
    "windows": (("win_amd64",),
                {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"}),
    "macos": (("macosx_14_0_arm64",),
              {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"}),
}
README = """# The course in this folder

Everything here works without a network. On each machine:

1. Copy this folder there, or read it from a stick or a shared folder.
2. In a folder of your own run `python3 PACK/install.py`, with this folder for PACK (on Windows
   `py PACK\\install.py`). It compares all files with their checksums, makes an environment and installs the
   course: some minutes, and {disk} of disk.
3. `cd minimistral` and `python3 run.py lab` (on Windows `py run.py lab`) opens chapter 0.

Python itself must be there already. This pack is for {targets}.

- `html/index.html` is the whole course to read in a browser, with nothing installed.
- `python3 install.py --check` only compares the files with `SHA256SUMS`; so does `sha256sum -c SHA256SUMS`.
- In the installed course, `.venv/bin/minimistral doctor --offline` (on Windows
  `.venv\\Scripts\\minimistral doctor --offline`) shows that a day without a network lacks nothing.

Made from {source} on {date}: {megabytes:.0f} MB in {files} files.
"""


@dataclass(frozen=True)
class Target:
    """A system and a Python that packages are collected for."""

    system: str
    python: str

    @property
    def is_here(self) -> bool:
        return self == here()

    def environment(self) -> dict[str, str]:
        """What the markers of requirements see there."""
        if self.is_here:
            return default_environment()
        known = PLATFORMS[self.system][1]
        return {**default_environment(), **known, "python_version": self.python,
                "python_full_version": f"{self.python}.9"}

    def options(self) -> list[str]:
        """pip's options for it; for this machine pip knows best itself."""
        if self.is_here:
            return ["--only-binary=:all:"]
        tags = [option for tag in PLATFORMS[self.system][0] for option in ("--platform", tag)]
        return ["--only-binary=:all:", "--implementation=cp", "--python-version", self.python, *tags]


def here() -> Target:
    system = pack_install.SYSTEMS.get(sys.platform, sys.platform)
    return Target(system, ".".join(platform.python_version_tuple()[:2]))


def read_pins(root: Path, environment: dict[str, str]) -> dict[str, str]:
    """name -> "name==version" of constraints.txt, as it holds in an environment."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): f"{r.name}{r.specifier}" for r in found
            if r.marker is None or r.marker.evaluate(environment)}


def collect(root: Path, target: Target, folder: Path) -> None:
    """Download the wheels of the extra `course`, with all that they need in turn, into ``folder``."""
    environment = target.environment()
    pins = read_pins(root, environment)
    whole = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = whole["project"]
    own = canonicalize_name(project["name"])
    extras = project["optional-dependencies"]
    needs = [Requirement(f"{own}[{EXTRA}]"), *map(Requirement, whole["build-system"]["requires"])]
    seen: set[tuple[str, str]] = set()
    there: set[str] = set()
    while needs:
        fresh: dict[str, str] = {}
        asked: list[tuple[str, str]] = []
        for need in needs:
            name = canonicalize_name(need.name)
            asked += [(name, extra) for extra in ("", *sorted(need.extras)) if (name, extra) not in seen]
            if name != own and name not in there:
                fresh[name] = pins.get(name) or _as_installed(name) or f"{need.name}{need.specifier}"
        seen.update(asked)
        there.update(fresh)
        if fresh:
            _download(sorted(fresh.values()), target, folder)
        needs = []
        for name, extra in asked:
            if name == own:
                lines = extras[extra] if extra else project["dependencies"]
                needs += map(Requirement, lines)
            else:
                needs += _requirements(folder, name, extra, environment)
        needs = [n for n in needs if n.marker is None or n.marker.evaluate({**environment, "extra": ""})]


def _as_installed(name: str) -> str | None:
    """What has no pin (the build's setuptools) is taken in the version that this course runs with."""
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return None


def _download(what: list[str], target: Target, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--dest", str(folder), *target.options(), *what]
    if subprocess.call(command) != 0:
        raise ValueError(f"pip could not get every package for Python {target.python} on {target.system}; "
                         "its lines above name them")


def _requirements(folder: Path, name: str, extra: str, environment: dict[str, str]) -> list[Requirement]:
    """What a wheel in ``folder`` needs: without extras, or what one extra adds."""
    wheel = next(w for w in folder.glob("*.whl") if canonicalize_name(w.name.split("-")[0]) == name)
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(entry).decode("utf-8"))
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    plain = [r for r in found if r.marker is None or r.marker.evaluate({**environment, "extra": ""})]
    if not extra:
        chosen = plain
    else:
        chosen = [r for r in found if r not in plain and r.marker.evaluate({**environment, "extra": extra})]
    for one in chosen:
        one.marker = None  # it holds there
    return chosen


def copy_course(root: Path, folder: Path) -> str:
    """Copy what git keeps of the course, or of an unpacked archive what it would keep; returns from what."""
    if not (root / ".git").exists():
        left_out = [line.strip("/") for line in (root / ".gitignore").read_text(encoding="utf-8").splitlines()]
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(folder.parent.name, *left_out))
        return "an unpacked archive"
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True).stdout
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, check=True,
                                capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{root} is a git checkout, but git cannot read it: {error}") from None
    for name in filter(None, listed.decode("utf-8").split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    return f"the commit {commit}"


def web_edition(folder: Path) -> None:
    """The course as pages that need no server."""
    from minimistral.course import site

    with tempfile.TemporaryDirectory() as place:
        if site.build(Path(place, "site")) != 0:
            raise ValueError("the web edition could not be built; the lines above say why")
        shutil.move(Path(place, "site"), folder)


def write_sums(pack: Path) -> int:
    """SHA256SUMS of every file of the pack, in the form of sha256sum; how many there are."""
    files = sorted(path for path in pack.rglob("*") if path.is_file() and path.name != pack_install.SUMS)
    lines = [f"{pack_install.sha256(path)}  {path.relative_to(pack).as_posix()}" for path in files]
    (pack / pack_install.SUMS).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return len(lines)


def make(out: Path, targets: list[Target], root: Path | None = None) -> None:
    """The whole pack of the course (of ROOT) in ``out``, a new folder; it appears when it is complete."""
    root = root or ROOT
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")
    draft = out.with_name(f"{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "wheels").mkdir(parents=True)
    source = copy_course(root, draft / "course")
    for target in targets:
        print(f"Packages for Python {target.python} on {target.system} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=draft) as place:
            collect(root, target, Path(place))
            for wheel in Path(place).iterdir():
                wheel.replace(draft / "wheels" / wheel.name)
    print("The web edition ...", flush=True)
    web_edition(draft / "html")
    shutil.copyfile(pack_install.__file__, draft / "install.py")
    described = [{"system": t.system, "python": t.python} for t in targets]
    record = {"source": source, "date": datetime.now(UTC).date().isoformat(), "targets": described}
    (draft / "pack.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    (draft / "README.md").write_text(_readme(draft, record, targets), encoding="utf-8", newline="\n")
    write_sums(draft)
    draft.replace(out)


def _readme(draft: Path, record: dict, targets: list[Target]) -> str:
    sizes = [path.stat().st_size for path in draft.rglob("*") if path.is_file()]
    unpacked = sum(info.file_size for wheel in (draft / "wheels").glob("*.whl")
                   for info in zipfile.ZipFile(wheel).infolist()) / len(targets)
    return README.format(
        targets=", ".join(f"Python {t.python} on {t.system}" for t in targets),
        disk=f"about {unpacked / 1e9 + 0.2:.1f} GB", source=record["source"], date=record["date"],
        megabytes=sum(sizes) / 1e6, files=len(sizes) + 2,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py pack", description="Everything for a room without a network.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, such as one on a stick")
    parser.add_argument("--platform", action="append", choices=sorted(PLATFORMS), help="again for more (default: this)")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="again for more (default: this)")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    targets = [Target(system, python) for system in options.platform or [here().system]
               for python in options.python or [here().python]]
    out = options.out.absolute()
    try:
        make(out, targets)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f"{out}: {size:.0f} MB in {time.monotonic() - start:.0f} seconds. Its README.md says how to install.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
