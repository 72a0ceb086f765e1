"""Installs the course beside what Colab brings; the first cell of each copy for Colab runs this file.

Colab's own PyTorch and widgets stay: another PyTorch would cost minutes, and Colab's pages understand
the widgets of its own version. Standard library only: it runs before anything is installed.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("torch", "numpy", "ipywidgets", "matplotlib", "jupyterlab")


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower()


def wanted(root: Path = ROOT) -> list[str]:
    """What the course needs beyond Colab's own, as pyproject.toml asks for it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["course"] + extras["serve"]
    return [one for one in needed if name_of(one) not in (*KEPT, "minimistral")]


def kept() -> list[str]:
    """The pins that hold Colab's own packages where they are."""
    pins = []
    for name in KEPT:
        try:
            pins.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return pins


def installed() -> bool:
    """Whether an earlier run in this session has finished."""
    try:
        return bool(version("minimistral"))
    except PackageNotFoundError:
        return False


def main() -> int:
    if installed():
        return 0
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "kept.txt")
        pins.write_text("\n".join(kept()) + "\n", encoding="utf-8")
        for command in ([*pip, "-c", str(pins), *wanted()], [*pip, "--no-deps", "-e", str(ROOT)]):
            if subprocess.call(command) != 0:
                print("The course could not be installed; the lines above say why. Run this cell again.")
                return 1
    print("The course is here. Colab forgets it, and your files, when the session ends: download what you keep.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
