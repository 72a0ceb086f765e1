"""The pack for a room without a network, with stand-ins: tiny wheels, a tiny course, a set-up that only notes."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minimistral.course import pack, pack_install

ROOT = Path(__file__).parents[1]
PROJECT = """
[build-system]
requires = ["maker>=1"]
[project]
name = "minimistral"
dependencies = ["alpha>=1"]
[project.optional-dependencies]
course = ["minimistral[serve]", "beta[fast]>=2", "only-windows ; sys_platform == 'win32'"]
serve = ["gamma"]
other = ["never"]
"""
CONSTRAINTS = """
alpha==1.5
beta==2.0 ; sys_platform != 'win32'
beta==2.1 ; sys_platform == 'win32'
delta==4.0
gamma==3.0
only-windows==1.0
speed==1.0
"""
WHEELS = {  # name and version -> what it needs
    "alpha-1.5": ["delta"],
    "alpha-1.6": [],
    "beta-2.0": ["speed ; extra == 'fast'", "never ; extra == 'slow'", "never ; python_version < '3'"],
    "beta-2.1": ["speed ; extra == 'fast'"],
    "delta-4.0": ["alpha"],
    "gamma-3.0": [],
    "maker-1.0": [],
    "only_windows-1.0": [],
    "speed-1.0": ["never ; sys_platform == 'darwin'"],
    "never-1.0": [],
}
NOTES = "import json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open('noted.json', 'w'))\n"


def write_wheels(folder: Path) -> Path:
    folder.mkdir()
    for name, needs in WHEELS.items():
        package, version = name.split("-")
        lines = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}", "Provides-Extra: fast",
                 *(f"Requires-Dist: {need}" for need in needs)]
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.dist-info/METADATA", "\n".join(lines) + "\n")
            wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{name}.dist-info/RECORD", "")
    return folder


def write_course(root: Path) -> Path:
    """A git checkout with a pyproject, pins, and a run.py that notes how it was called."""
    (root / "notebooks").mkdir(parents=True)
    for name, text in {"pyproject.toml": PROJECT, "constraints.txt": CONSTRAINTS, "run.py": NOTES,
                       "notebooks/00_a.ipynb": "{}", ".gitignore": "work/\n"}.items():
        (root / name).write_text(text, encoding="utf-8")
    (root / "work").mkdir()
    (root / "work" / "mine.txt").write_text("mine", encoding="utf-8")
    for command in (["init", "-q"], ["add", "."],
                    ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


def only_from(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """pip takes packages from a folder and from nowhere else."""
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", folder.as_uri())
    patch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    folder = write_wheels(tmp_path / "tiny wheels")
    only_from(folder, monkeypatch)
    return folder


@pytest.fixture
def course(tmp_path):
    return write_course(tmp_path / "checkout")


def names(folder: Path) -> list[str]:
    return sorted("-".join(path.name.split("-")[:2]) for path in folder.iterdir())


# --- which packages

def test_packages_are_those_of_the_extra_at_their_pins(wheels, course, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    pack.collect(course, pack.here(), out)
    only = ["only_windows-1.0"] if sys.platform == "win32" else []
    beta = "beta-2.1" if sys.platform == "win32" else "beta-2.0"
    assert names(out) == ["alpha-1.5", beta, "delta-4.0", "gamma-3.0", "maker-1.0", *only, "speed-1.0"]


def test_packages_for_another_system_are_chosen_by_its_markers(wheels, course, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    other = pack.Target("windows" if pack.here().system != "windows" else "linux", "3.12")
    pack.collect(course, other, out)
    windows = other.system == "windows"
    assert ("only_windows-1.0" in names(out)) == windows
    assert ("beta-2.1" if windows else "beta-2.0") in names(out)


def test_a_package_that_is_not_there_is_an_error(wheels, course, tmp_path):
    (wheels / "delta-4.0-py3-none-any.whl").unlink()
    with pytest.raises(ValueError, match="could not get every package"):
        pack.collect(course, pack.here(), tmp_path)


def test_the_real_pins_have_one_version_on_every_system():
    for system in pack.PLATFORMS:
        for python in pack.PYTHONS:
            pins = pack.read_pins(ROOT, pack.Target(system, python).environment())
            assert pins["torch"].startswith("torch==") and len(pins) > 100
            assert ("colorama" in pins) == (system == "windows")


# --- the folder, and installing from it

@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    def pages(folder):
        folder.mkdir()
        (folder / "index.html").write_text("pages", encoding="utf-8")

    place = tmp_path_factory.mktemp("pack")
    with pytest.MonkeyPatch.context() as patch:
        only_from(write_wheels(place / "wheels"), patch)
        patch.setattr(pack, "web_edition", pages)
        pack.make(place / "pack", [pack.here()], write_course(place / "checkout"))
    return place / "pack"


@pytest.fixture
def made(made_once, tmp_path):
    """A pack of its own for each test, on a path with a space."""
    return Path(shutil.copytree(made_once, tmp_path / "a stick" / "pack"))


def install(made, *arguments, where):
    return subprocess.run([sys.executable, made / "install.py", *map(str, arguments)], cwd=where,
                          capture_output=True, text=True)


def test_a_pack_holds_everything_and_installs_without_an_index(made, tmp_path):
    assert sorted(path.name for path in made.iterdir()) == [
        "README.md", "SHA256SUMS", "course", "html", "install.py", "pack.json", "wheels"]
    assert not (made / "course" / "work").exists() and (made / "course" / "notebooks/00_a.ipynb").exists()
    readme = (made / "README.md").read_text(encoding="utf-8")
    assert "{" not in readme and f"Python {pack.here().python} on {pack.here().system}" in readme
    done = install(made, where=tmp_path)
    assert done.returncode == 0, done.stderr
    (arguments, environment) = json.loads((tmp_path / "minimistral/noted.json").read_text(encoding="utf-8"))
    assert arguments == ["lab", "--copy"]
    assert environment["PIP_NO_INDEX"] == "1" and environment["PIP_CONFIG_FILE"] == os.devnull
    # pip itself finds the wheels there, although the path has a space
    shown = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path / "d", "alpha"],
                           env=environment, capture_output=True, text=True)
    assert shown.returncode == 0 and names(tmp_path / "d") == ["alpha-1.5"], shown.stderr


def test_a_damaged_pack_is_named_and_not_installed(made, tmp_path):
    (wheel,) = (made / "wheels").glob("gamma*")
    wheel.write_bytes(wheel.read_bytes()[:-1])
    (made / "html" / "index.html").unlink()
    assert pack_install.damaged(made)[0] == ["html/index.html", f"wheels/{wheel.name}"]
    for arguments in ([], ["--check"]):
        done = install(made, *arguments, where=tmp_path)
        assert done.returncode == 2 and wheel.name in done.stderr and "2 of" in done.stderr
    assert not (tmp_path / "minimistral").exists()


def test_a_second_installation_keeps_the_learners_files(made, tmp_path):
    assert install(made, "here", where=tmp_path).returncode == 0
    (tmp_path / "here/work").mkdir()
    (tmp_path / "here/work/mine.ipynb").write_text("mine", encoding="utf-8")
    assert install(made, "here", where=tmp_path).returncode == 0
    assert (tmp_path / "here/work/mine.ipynb").read_text(encoding="utf-8") == "mine"


def test_a_folder_of_others_is_left_alone(made, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "photo.jpg").touch()
    done = install(made, "theirs", where=tmp_path)
    assert done.returncode == 2 and "name another folder" in done.stderr
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["photo.jpg"]


def test_another_python_is_told_what_the_pack_is_for(made, monkeypatch):
    assert pack_install.unsuitable(made) == ""
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    said = pack_install.unsuitable(made)
    assert "This is Python 3.9" in said and f"Python {pack.here().python}" in said


def test_an_old_python_can_read_install_py():
    source = Path(pack_install.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 6))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_a_pack_is_whole_or_not_there(wheels, course, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "ROOT", course)
    monkeypatch.setattr(pack, "web_edition", Path.mkdir)
    gamma = wheels / "gamma-3.0-py3-none-any.whl"
    gamma.rename(tmp_path / gamma.name)
    assert pack.main([str(tmp_path / "pack")]) == 2  # after alpha and beta have come
    assert not (tmp_path / "pack").exists()
    (tmp_path / gamma.name).rename(gamma)
    assert pack.main([str(tmp_path / "pack")]) == 0  # nothing of the first attempt is in the way
    assert "notebooks/00_a.ipynb" in files(tmp_path / "pack/course") and len(files(tmp_path / "pack/course")) == 5
    assert not (tmp_path / "pack.part").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there already"):
        pack.make(tmp_path / "there", [pack.here()], course)
    (course / ".git" / "HEAD").unlink()
    with pytest.raises(ValueError, match="git cannot read it"):
        pack.copy_course(course, tmp_path / "x")


def test_an_unpacked_archive_is_packed_without_git(course, tmp_path):
    assert pack.copy_course(course, tmp_path / "from git").startswith("the commit ")
    shutil.rmtree(course / ".git")
    inside = course / "pack.part" / "course"  # the pack may be made in the course's own folder
    assert pack.copy_course(course, inside) == "an unpacked archive"
    assert files(inside) == files(tmp_path / "from git") and len(files(inside)) == 5
    # what git leaves out is read as names: no paths, no exceptions
    assert not [line for line in (ROOT / ".gitignore").read_text("utf-8").splitlines() if re.search(r"^!|./.", line)
                and not line.startswith("#")]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
