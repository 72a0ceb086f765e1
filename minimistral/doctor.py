"""`minimistral doctor`: one line per thing that the course needs, with the repair for what is missing.

Offline, standard library only but for what is being looked at, and a few seconds at most. With --offline it
also tries out what a day without a network needs (course/offline.py): half a minute.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minimistral.lab import course_work_folder
from minimistral.shipped import NAMES, SHIPPED

OK, WARN, MISSING, OPTIONAL = "OK", "WARN", "MISSING", "OPTIONAL"
PYTHON = f'"{sys.executable}"' if " " in sys.executable else sys.executable  # to be copied from the report
INSTALL = f'{PYTHON} -m pip install "minimistral[course]", or run.py lab'
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `repair` says what to do; it is empty where nothing is to be done."""

    name: str
    status: str
    detail: str
    repair: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<8}  {self.name}: {self.detail}"
        return f"{line}. {self.repair}." if self.repair else line


def main(offline: bool = False) -> int:
    """Prints the report; 0 if nothing that the course needs is missing, else 1."""
    checks = list(CHECKS)
    if offline:
        from minimistral.course import offline as tried

        checks += tried.CHECKS
    missing = 0
    for check in checks:
        for finding in check():
            print(finding, flush=True)
            missing += finding.status == MISSING
    verdict = "Ready." if not missing else f"{missing} missing: the repair stands on each line."
    print(f"\n{verdict} (OPTIONAL parts are needed by some chapters' extras and by the tests only.)")
    return 1 if missing else 0


def python() -> Iterator[Finding]:
    here = platform.python_version()
    detail = f"{here} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield Finding("Python", OK, detail)
    else:
        yield Finding("Python", MISSING, detail, "Use Python 3.11, 3.12 or 3.13")


def libraries() -> Iterator[Finding]:
    """The four that the library itself stands on, imported for real."""
    for name in ("torch", "numpy", "safetensors", "tiktoken"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary raises OSError, a half-installed one anything
            yield Finding(name, MISSING, f"{type(error).__name__}: {error}", _pip_install(name))
            continue
        version = importlib.metadata.version(name)
        if name == "torch" and _number(version) < (2, 9):
            yield Finding(name, MISSING, f"{version} is too old", _pip_install("torch>=2.9"))
        else:
            yield Finding(name, OK, version)


def device() -> Iterator[Finding]:
    """The device that `train` and `generate` use when none is named."""
    torch = _import("torch")
    if torch is None:
        yield Finding("device", MISSING, "unknown without torch", _pip_install("torch"))
        return
    from minimistral.devices import pick_device

    chosen = pick_device().type
    if chosen == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        yield Finding("device", OK, f"cuda, {torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    elif chosen == "mps":
        yield Finding("device", OK, "mps (Apple's GPU)")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "device", WARN, "cpu, although an NVIDIA driver is here",
            "Install the CUDA build of PyTorch if you want the GPU; the course runs without",
        )
    else:
        yield Finding("device", OK, f"cpu, threads used: {torch.get_num_threads()}; enough for the course")


def memory() -> Iterator[Finding]:
    size = total_memory()
    if size is None:
        yield Finding("memory", WARN, "size unknown", "The course wants 4 GiB")
    elif size < 3.5 * GIB:
        yield Finding(
            "memory", WARN, f"{size / GIB:.1f} GiB in all",
            "Keep one notebook open at a time; 4 GiB are comfortable",
        )
    else:
        yield Finding("memory", OK, f"{size / GIB:.1f} GiB in all")


def total_memory() -> int | None:
    """Bytes of main memory of this machine, or None where no way to ask is known."""
    try:
        if sys.platform == "win32":
            return _windows_memory()
        if sys.platform == "darwin":
            return int(subprocess.check_output(["sysctl", "-n", "hw.memsize"], timeout=2))
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _windows_memory() -> int:
    import ctypes

    class Status(ctypes.Structure):  # MEMORYSTATUSEX of the Windows API
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "page_total", "page_free", "v_total", "v_free", "v_ext")
        ]

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return status.total


def disk() -> Iterator[Finding]:
    folder = _existing(course_work_folder())
    free = shutil.disk_usage(folder).free
    status, repair = (OK, "") if free > GIB else (WARN, "Free 1 GiB for trained models")
    yield Finding("disk", status, f"{free / GIB:.1f} GiB free at {folder}", repair)


def jupyter() -> Iterator[Finding]:
    """JupyterLab, and a kernel named python3 that is this very Python."""
    if not _has("jupyterlab"):
        yield Finding("JupyterLab", MISSING, "not installed", INSTALL)
    else:
        yield Finding("JupyterLab", OK, importlib.metadata.version("jupyterlab"))
    if not _has("ipykernel"):
        yield Finding("kernel", MISSING, "ipykernel is not installed", INSTALL)
        return
    from jupyter_core.paths import jupyter_path

    repair = f"{PYTHON} -m ipykernel install --sys-prefix"
    specs = [Path(folder) / "python3" / "kernel.json" for folder in jupyter_path("kernels")]
    spec = next((one for one in specs if one.exists()), None)  # in Jupyter's order of search
    if spec is None:
        yield Finding("kernel", MISSING, "no kernel named python3", repair)
        return
    command = json.loads(spec.read_text("utf-8"))["argv"][0]
    # Jupyter starts a bare `python` as its own Python; two names in one folder are one Python.
    here = Path(sys.executable).absolute()
    if Path(command).name == command or Path(command).absolute().parent == here.parent:
        yield Finding("kernel", OK, f"python3 is {here}")
    else:
        yield Finding("kernel", MISSING, f"python3 is another Python, {command}", repair)


def widgets() -> Iterator[Finding]:
    """The sliders need two halves: ipywidgets here, and its part that runs in the browser."""
    if not _has("ipywidgets"):
        yield Finding("widgets", MISSING, "ipywidgets is not installed", INSTALL)
        return
    manager = Path("share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager/package.json")
    if (Path(sys.prefix) / manager).exists():
        yield Finding("widgets", OK, f"ipywidgets {importlib.metadata.version('ipywidgets')}")
    else:
        yield Finding(
            "widgets", MISSING, "the browser's half is not in this environment",
            _pip_install("--force-reinstall --no-deps jupyterlab_widgets"),
        )


def figures() -> Iterator[Finding]:
    for name in ("matplotlib", "tqdm"):
        if _has(name):
            yield Finding(name, OK, importlib.metadata.version(name))
        else:
            yield Finding(name, MISSING, "not installed", INSTALL)


def work() -> Iterator[Finding]:
    """Whether the learner's files can be written."""
    folder = course_work_folder()
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            yield Finding("work folder", OK, f"{folder} can be written")
    except OSError as error:
        yield Finding(
            "work folder", MISSING, f"{folder} cannot be written ({error.strerror})",
            "Change its permissions, or name another folder with MINIMISTRAL_WORK",
        )


def models() -> Iterator[Finding]:
    absent = [name for name in NAMES if not any((SHIPPED / name).glob("*.safetensors"))]
    if absent:
        yield Finding(
            "shipped models", MISSING, ", ".join(absent) + " not in the package",
            "Install minimistral again, or check the repository out whole",
        )
    else:
        yield Finding("shipped models", OK, ", ".join(NAMES))


def options() -> Iterator[Finding]:
    """What some extras of the course and the tests use; nothing here is needed to learn."""
    for module, purpose, extra in (
        ("sentencepiece", "tokenizers of Mistral's early models", "real"),
        ("transformers", "parity tests", "test"),
        ("mistral_common", "parity tests of the tokenizer", "test"),
        ("uvicorn", "the local server", "serve"),
    ):
        if _has(module):
            yield Finding(module, OK, importlib.metadata.version(module.replace("_", "-")))
        else:
            repair = _pip_install(f'"minimistral[{extra}]"')
            yield Finding(module, OPTIONAL, f"not installed; for {purpose}", repair)
    yield _checkpoint()
    yield _browser()


def _checkpoint() -> Finding:
    """A real model's folder, which MINIMISTRAL_CHECKPOINT names."""
    name = "real checkpoint"
    named = os.environ.get("MINIMISTRAL_CHECKPOINT")
    if not named:
        return Finding(
            name, OPTIONAL, "none named",
            "If you have one, set MINIMISTRAL_CHECKPOINT to its folder",
        )
    if any((Path(named) / file).exists() for file in ("params.json", "config.json", "adapter.json")):
        return Finding(name, OK, named)
    return Finding(
        name, WARN, f"{named} has no params.json, config.json or adapter.json",
        "Set MINIMISTRAL_CHECKPOINT to a model's folder",
    )


def _browser() -> Finding:
    for command in ("chromium", "google-chrome", "chrome"):
        if shutil.which(command):
            return Finding("Chromium", OK, str(shutil.which(command)))
    return Finding(
        "Chromium", OPTIONAL, "not found; the tests in a browser are skipped without it",
        "Install it from your system's packages",
    )


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python, libraries, device, memory, disk, jupyter, widgets, figures, work, models, options,
)


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _import(module: str):
    try:
        return importlib.import_module(module)
    except Exception:  # already reported by `libraries`
        return None


def _number(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _pip_install(what: str) -> str:
    return f"{PYTHON} -m pip install {what}"
