"""From `git clone` to chapter 0's first text: how long, how much to download, how much disk?

    python benchmarks/first_text.py [--source REPOSITORY] [--only-readme]

Clones the course into a temporary folder and runs `python3 run.py lab --no-browser` in it, with no package
cached, until the first words of the model's tale stand in the terminal and JupyterLab names its address; then once
more, to see what a second start takes. Afterwards the packages that were installed are downloaded once more,
into a folder, to count their bytes. One run, since nobody starts for the first time twice; README's sentence is
made from it. No seed: nothing here is drawn at random.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minimistral.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "first_text.json"
README = ROOT / "README.md"
LIMIT = 1200  # seconds, for a network that is slow


def size(folder: Path) -> int:
    """Bytes of the files below a folder; one that has two names counts once."""
    found = {(s.st_dev, s.st_ino): s.st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()
             for s in [p.stat()]}
    return sum(found.values())


def start(course: Path, environment: dict, began: float) -> dict[str, float]:
    """Run `run.py lab` until JupyterLab is there; seconds since `began` until what one waits for."""
    command = [sys.executable, "run.py", "lab", "--no-browser", "--", "--ServerApp.port=0"]
    process = subprocess.Popen(command, cwd=course, env=environment, text=True, encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    seen, text = {}, ""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(LIMIT)
    try:
        while letter := process.stdout.read(1):
            text += letter
            now = round(time.monotonic() - began, 1)
            if "first text" not in seen and re.search(r"tells a tale \(seed \d+\):\s+\w", text):
                seen["first text"] = now
            if re.search(r"http://\S+lab/tree\S*", text):
                seen["JupyterLab"] = now
                return seen
        raise RuntimeError(f"run.py lab ended without JupyterLab:\n{text[-3000:]}")
    finally:
        signal.alarm(0)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def downloads(course: Path, environment: dict, folder: Path) -> int:
    """Bytes of the packages that the new environment holds, as they are downloaded."""
    python = course / (".venv/Scripts/python.exe" if os.name == "nt" else ".venv/bin/python")
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze", "--exclude-editable"],
                            env=environment, check=True, capture_output=True, text=True).stdout.split()
    subprocess.run([python, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *listed],
                   env=environment, check=True)
    return size(folder)


def measure(source: str) -> dict:
    known = provenance("python benchmarks/first_text.py", network="packages from a mirror nearby, PyTorch's build for "
                       "the CPU from this machine's disk")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MINIMISTRAL_")}
    environment |= {"PIP_NO_CACHE_DIR": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory(prefix="first-text-", ignore_cleanup_errors=True) as place:
        course = Path(place, "minimistral")
        began = time.monotonic()
        subprocess.run(["git", "clone", "-q", "--no-local", source, course], check=True)
        cloned = round(time.monotonic() - began, 1)
        first = {"cloned": cloned, **start(course, environment, began)}
        print(f"first start: {first}", flush=True)
        second = start(course, environment, time.monotonic())
        print(f"second start: {second}", flush=True)
        disk = {"repository": size(course / ".git"), "files": size(course) - size(course / ".git")
                - size(course / ".venv"), "environment": size(course / ".venv")}
        packages = downloads(course, environment, Path(place, "wheels"))
        shutil.rmtree(Path(place, "wheels"))
    return {"provenance": known, "seconds": {"first start": first, "second start": second},
            "bytes": {"packages": packages, **disk}}


def sentence() -> str:
    """README's figures."""
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    seconds, held, known = record["seconds"], record["bytes"], record["provenance"]
    network = held["packages"] + held["repository"]
    disk = held["environment"] + held["files"] + held["repository"]
    return (f"Measured on Linux with two cores, PyTorch's build for the CPU, and packages from a mirror nearby: from "
            f"`git clone` to the first words of the tale {seconds['first start']['first text']:.0f} seconds, "
            f"{network / 1e6:.0f} MB to download (at 50 Mbit/s that is another {network * 8 / 50e6:.0f} seconds), "
            f"{disk / 1e9:.1f} GB of disk. A second start takes {seconds['second start']['first text']:.1f} seconds to "
            f"the tale (`benchmarks/first_text.py`, {known['date'][:10]}). PyTorch's usual build on Linux adds some "
            "3 GB.")


def write_readme() -> None:
    text = README.read_text(encoding="utf-8")
    text = re.sub(r"(<!-- first text -->\n).*?(\n<!-- /first text -->)", lambda m: m[1] + sentence() + m[2], text,
                  flags=re.S)
    README.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=str(ROOT), help="what is cloned (default: this checkout's commits)")
    parser.add_argument("--only-readme", action="store_true", help="measure nothing; write README's sentence")
    options = parser.parse_args()
    if not options.only_readme:
        record = measure(options.source)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    write_readme()


if __name__ == "__main__":
    main()
