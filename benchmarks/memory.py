"""How much memory does one learner need on a hub? The server of JupyterLab, and a kernel per notebook.

    python benchmarks/memory.py [NN ...]    measure these chapters (default: all), keep the others' rows
    python benchmarks/memory.py --only-page measure nothing; write the table of docs/hub.md

Every notebook runs as a learner runs it, from top to bottom, in a fresh kernel with one thread and a new
working folder. Every 50 ms the memory (resident set) of the kernel and of all processes that it started is
added up. Files that two processes share, such as PyTorch's libraries, count in each of them: a sum over
learners is therefore on the safe side. The server is measured with a browser's first requests answered, and
has no kernel of its own. No seed: nothing here is drawn at random.
"""

import argparse
import contextlib
import json
import math
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import nbformat
import psutil

from minimistral.course.build import PlainClient, kernel_environment
from minimistral.course.syllabus import CHAPTERS, EXERCISES, NOTEBOOKS, SOLUTIONS
from minimistral.lab import lab_arguments
from minimistral.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "memory.json"
PAGE = ROOT / "docs" / "hub.md"
INTERVAL = 0.05
MIB = 2**20


def resident(processes: list[psutil.Process]) -> int:
    """Bytes that these processes hold together."""
    total = 0
    for one in processes:
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            total += one.memory_info().rss
    return total


class Watch(threading.Thread):
    """Samples what the processes below this one hold, until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = self.last = 0
        self.done = threading.Event()

    def run(self) -> None:
        here = psutil.Process()
        while not self.done.wait(INTERVAL):
            with contextlib.suppress(psutil.Error):
                self.last = resident(here.children(recursive=True))
                self.peak = max(self.peak, self.last)


def notebook(path: Path) -> dict:
    """MiB of a notebook's kernel: at most, and when its last cell has run."""
    client = PlainClient(
        nbformat.read(path, 4), timeout=600, kernel_name="python3", store_widget_state=False,
        allow_errors=True, resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="minimistral-", ignore_cleanup_errors=True) as work:
        watch.start()
        with client.setup_kernel(env=kernel_environment(work)):
            for index, cell in enumerate(client.nb.cells):
                if cell.cell_type == "code":
                    client.execute_cell(cell, index)
            after = watch.last
        watch.done.set()
        watch.join()
    return {"peak": round(watch.peak / MIB), "after": round(after / MIB)}


def server() -> dict:
    """MiB of JupyterLab's server: started, and when a browser's first requests are answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        chapter = Path(folder, "chapter.ipynb")
        chapter.write_bytes((ROOT / CHAPTERS[2].path()).read_bytes())
        command = [sys.executable, "-m", "jupyterlab", *lab_arguments(Path(folder)), "--no-browser",
                   "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--IdentityProvider.token="]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _answers(port, "api", 120)
            started = resident([psutil.Process(process.pid)])
            for path in ("lab", "lab/api/settings", "lab/api/translations/", "api/contents",
                         "api/contents/chapter.ipynb", "api/kernelspecs", "api/sessions"):
                _answers(port, path, 60)
            return {"started": round(started / MIB),
                    "serving": round(resident([psutil.Process(process.pid)]) / MIB)}
        finally:
            process.terminate()
            process.wait(30)


def _answers(port: int, path: str, seconds: float) -> None:
    """Waits for an answer of the server; raises TimeoutError if none comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=seconds) as answer:
                answer.read()
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"no answer to /{path} within {seconds} seconds")


def table() -> str:
    """What docs/hub.md says, from the record."""
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows, serving = record["notebooks"], record["server"]["serving"]
    lines = ["| | Chapter | Its story, MiB | Its exercises, MiB | Its solutions, MiB |", "|---|---|---|---|---|"]
    for chapter in CHAPTERS:
        peaks = [rows[chapter.path(folder)]["peak"] for folder in (NOTEBOOKS, EXERCISES, SOLUTIONS)]
        lines.append(f"| {chapter.number} | {chapter.title} | {' | '.join(map(str, peaks))} |")
    stories = sorted(rows[c.path()]["peak"] for c in CHAPTERS)
    both = max(rows[c.path()]["after"] + rows[c.path(EXERCISES)]["peak"] for c in CHAPTERS)
    worst = next(c for c in CHAPTERS if rows[c.path()]["peak"] == stories[-1])
    above = [p for p in stories if p > 1000]
    known = record["provenance"]
    return "\n".join([
        f"Measured (`benchmarks/memory.py`, {known['date'][:10]}, Linux, PyTorch {known['torch']}, one thread): JupyterLab's "
        f"server holds {serving} MiB for each learner, and a kernel at most what the table says. With one notebook "
        f"open that is {(serving + stories[-1]) / 1024:.1f} GiB at the highest, for a moment of chapter {worst.number}; "
        f"{len(above)} of {len(stories)} stories go above 1,000 MiB, the middle one takes {stories[len(stories) // 2]}. A "
        f"story left open after its last cell and its exercises beside it take "
        f"{(serving + both) / 1024:.1f} GiB at the highest. A limit of {limit(serving, rows)} GiB for each learner "
        "holds every chapter.", "", *lines])


def limit(serving: int, rows: dict) -> int:
    """Whole GiB that hold the server, the largest notebook, and a fifth to spare."""
    return math.ceil(1.2 * (serving + max(row["peak"] for row in rows.values())) / 1024)


def write_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(r"(<!-- memory -->\n).*?(<!-- /memory -->)", lambda m: f"{m[1]}{table()}\n{m[2]}", text, flags=re.S)
    PAGE.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", type=int)
    parser.add_argument("--only-page", action="store_true")
    options = parser.parse_args()
    if options.only_page:
        return write_page()
    numbers = options.chapters
    record = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"notebooks": {}}
    record["provenance"], record["unit"] = provenance("python benchmarks/memory.py", threads=1), "MiB"
    record["server"] = server()
    print(f"server: {record['server']}", flush=True)
    for chapter in (c for c in CHAPTERS if not numbers or c.number in numbers):
        for folder in (NOTEBOOKS, EXERCISES, SOLUTIONS):
            path = ROOT / chapter.path(folder)
            if path.exists():
                record["notebooks"][chapter.path(folder)] = row = notebook(path)
                print(f"{chapter.path(folder)}: {row}", flush=True)
        record["notebooks"] = dict(sorted(record["notebooks"].items()))
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    write_page()


if __name__ == "__main__":
    main()
