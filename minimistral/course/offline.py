"""What a day without a network needs: `minimistral doctor --offline` looks, and tries it out.

Whatever is tried runs in processes that refuse every other machine, by the same hook as the tests, so a
hidden download shows as a failure here and not in the room.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock
from urllib.parse import urljoin, urlparse

import nbformat

from minimistral import lab
from minimistral.course import pack_install
from minimistral.course.check_notebooks import run_notebook
from minimistral.course.syllabus import CHAPTERS
from minimistral.doctor import INSTALL, MISSING, OK, OPTIONAL, Finding
from minimistral.shipped import NAMES

HOOK = Path(__file__).parents[1] / "assets" / "offline"
DOWNLOADS = re.compile(
    r"download\s*=\s*True|^\s*[!%]\s*(?:pip|conda|curl|wget|git)\b|urlopen\(|urlretrieve\(|get_encoding\("
    r"|Auto\w+\.from_pretrained\(|hf_hub_download\(|snapshot_download\(", re.M)
SECONDS = 600  # for chapter 0, on a machine that is busy with other things
AGAIN = "Check the repository out whole, or copy the pack again"

TRY_MODELS = f"""
import json
import minimistral as mm
for name in {NAMES!r}:
    model, tokenizer = mm.load_model(name), mm.load_tokenizer(name)
    text = tokenizer.decode(mm.generate(model, tokenizer.encode("The golden ring", bos=True), 5))
    print(json.dumps([name, "loads, and writes" if text.strip() else ""]), flush=True)
for name, options in (("tales", {{"n_tales": 20, "val_tales": 20}}), ("python", {{"max_bytes": 100_000}})):
    corpus = mm.load_corpus(name, **options)
    print(json.dumps([f"corpus {{name}}", f"{{len(corpus.train):,}} characters made here"]), flush=True)
"""


@contextmanager
def refusing() -> Iterator[None]:
    """Every Python that is started inside refuses other machines.

    It also keeps to one thread: on a machine that is busy, threads wait for each other for minutes.
    """
    path = os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}):
        yield


def models_and_corpora() -> Iterator[Finding]:
    """The shipped models with their tokenizers, and the corpora that are made here."""
    with refusing():
        done = subprocess.run([sys.executable, "-c", TRY_MODELS], capture_output=True, text=True)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    for name in (*NAMES, "corpus tales", "corpus python"):
        if found.get(name):
            yield Finding(name, OK, found[name])
        else:
            why = done.stderr.strip().splitlines()[-1:] or ["nothing came"]
            yield Finding(name, MISSING, why[0][:200], AGAIN)
            return


def shakespeare() -> Iterator[Finding]:
    from minimistral.corpora import load_corpus

    name = "corpus shakespeare"
    try:
        load_corpus("shakespeare")
        yield Finding(name, OK, "is here")
    except (OSError, ValueError):
        yield Finding(name, OPTIONAL, "not here; no cell needs it",
                      "Before you go: put its file into a folder, and name that with MINIMISTRAL_DATA")


class Links:
    """The addresses that the page of JupyterLab loads from."""

    def __init__(self, page: str, base: str):
        config = re.search(r'<script id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.S)
        parts = json.loads(config[1]).get("federated_extensions", []) if config else []
        loads = re.findall(r'<(?:script|link)[^>]+(?:src|href)="([^"]+)"', page)
        self.all = [urljoin(base, one) for one in loads]
        self.extensions = {e["name"]: urljoin(base, f"lab/extensions/{e['name']}/{e['load']}") for e in parts}


def front_end() -> Iterator[Finding]:
    """JupyterLab's page, everything it loads, its widgets and its formulas, from this machine alone."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, refusing(), _server(folder) as base:
        if base is None:
            yield Finding("JupyterLab's page", MISSING, "its server did not start", INSTALL)
            return
        links = Links(_get(urljoin(base, "lab")) or "", base)
        widgets = links.extensions.get("@jupyter-widgets/jupyterlab-manager")
        wanted = [*links.all, *links.extensions.values()]
        elsewhere = [one for one in wanted if urlparse(one).hostname != "127.0.0.1"]
        lacking = [one for one in wanted if one not in elsewhere and _get(one) is None]
    if not links.all or elsewhere or lacking:
        what = ", ".join([*elsewhere, *lacking][:3]) or "the page is empty"
        yield Finding("JupyterLab's page", MISSING, f"it lacks {what}", "Install JupyterLab again")
    else:
        yield Finding("JupyterLab's page", OK, f"{len(wanted)} scripts and styles, all from this machine")
    if widgets and widgets not in lacking:
        yield Finding("widgets in the browser", OK, "their scripts are here")
    else:
        yield Finding("widgets in the browser", MISSING, "their scripts are not here", "Install ipywidgets again")
    static = Path(sys.prefix) / "share/jupyter/lab/static"
    fonts = len([*static.glob("*.woff"), *static.glob("*.woff2")])
    if fonts and any(b"MathJax" in one.read_bytes() for one in static.glob("*.js")):
        yield Finding("formulas", OK, f"MathJax and {fonts} fonts are here")
    else:
        yield Finding("formulas", MISSING, "MathJax or its fonts are not here", "Install JupyterLab again")


@contextmanager
def _server(folder: str, patience: float = 60) -> Iterator[str | None]:
    """The address of a JupyterLab of its own, or None if it did not start in time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", *lab.lab_arguments(Path(folder)), "--no-browser",
               "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    base = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + patience
        while _get(base + "api") is None:
            if process.poll() is not None or time.monotonic() > deadline:
                yield None
                return
            time.sleep(0.2)
        _opener.addheaders = [("Authorization", f"token {token}")]
        yield base
    finally:
        process.terminate()
        process.wait(30)


# a proxy that the machine's settings name would be asked even for this machine's own addresses
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _get(address: str) -> str | None:
    """What the server answers, or None."""
    try:
        with _opener.open(address, timeout=60) as answer:
            return answer.read().decode("utf-8", errors="replace")
    except (urllib.error.URLError, OSError):
        return None


def notebooks() -> Iterator[Finding]:
    """Every notebook of the course, read; and chapter 0, run."""
    course = lab.course_folder()
    paths = [path for folder in lab.FOLDERS for path in sorted((course / folder).glob("*.ipynb"))]
    asking = []
    for path in paths:
        cells = nbformat.read(path, 4).cells
        if any(c.cell_type == "code" and DOWNLOADS.search(_code(c.source)) for c in cells):
            asking.append(f"{path.parent.name}/{path.name}")
    name = "the cells"
    if asking:
        yield Finding(name, MISSING, f"a download in {', '.join(asking[:5])}", "Leave those cells out in the room")
    else:
        yield Finding(name, OK, f"none of {len(paths)} notebooks downloads anything")
    yield _run(course / CHAPTERS[0].path())


def _code(source: str) -> str:
    """A cell without its comments."""
    return re.sub(r"#.*", "", source)


def _run(path: Path) -> Finding:
    """One notebook run from top to bottom without a network."""
    start = time.monotonic()
    with refusing():
        done = run_notebook(path, SECONDS)
    problem = done.broken or "; ".join(done.errors)
    if problem:
        return Finding(f"running {path.stem}", MISSING, problem[:300], AGAIN)
    return Finding(f"running {path.stem}", OK, f"{time.monotonic() - start:.0f} seconds, no other machine asked")


def pack() -> Iterator[Finding]:
    """The checksums of a pack, where one is: the current folder, or that above the course."""
    for folder in (Path.cwd(), lab.course_folder().parent):
        if (folder / pack_install.SUMS).is_file() and (folder / "pack.json").is_file():
            bad, count = pack_install.damaged(folder)
            if bad:
                yield Finding("pack", MISSING, f"{len(bad)} of {count} files differ, such as {bad[0]}",
                              "Copy the pack again")
            else:
                yield Finding("pack", OK, f"all {count} files of {folder} are as they were packed")
            return


CHECKS = (models_and_corpora, shakespeare, front_end, notebooks, pack)
