"""A real JupyterLab and a real browser, for the tests beside this file.

They are skipped where playwright or a Chromium-like browser is missing.
"""

import json
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import pytest

from minimistral.course import build
from minimistral.course.render import FLAGS, browser

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {  # no news from elsewhere; every cell in the page, not only those in view
    "apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}
PATIENCE = 300_000  # milliseconds, as for a cell under nbval: other tests run beside this one


@pytest.fixture(scope="session", autouse=True)
def somebody_to_look():
    """The tests here need a browser, and the library that drives it."""
    pytest.importorskip("playwright.sync_api")
    if browser() is None:
        pytest.skip("no Chromium or Chrome here; CHROME names one")


class Lab:
    """A running JupyterLab; `folder` is what it serves."""

    def __init__(self, folder: Path, port: int, token: str):
        self.folder, self.port, self.token = folder, port, token

    def ask(self, path: str, method: str = "GET") -> bytes:
        """The server's answer on one of its own addresses."""
        address = f"http://127.0.0.1:{self.port}/api{path}?token={self.token}"
        with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=60) as a:
            return a.read()

    def open(self, tab, path: Path, *, cells: range | None = None) -> Path:
        """Open a copy of a notebook, or of some of its cells, and run all of it."""
        notebook = nbformat.read(path, 4)
        if cells is not None:
            notebook.cells = [notebook.cells[i] for i in cells]
        copy = self.folder / path.name
        nbformat.write(notebook, copy)
        tab.goto(f"http://127.0.0.1:{self.port}/lab/tree/{copy.name}?token={self.token}&reset")
        # The notebook's own indicator says idle before there is a kernel; the status bar does not.
        tab.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        wait_until_run(tab, notebook)
        return copy

    def close_kernels(self) -> None:
        for session in json.loads(self.ask("/sessions")):
            self.ask(f"/sessions/{session['id']}", method="DELETE")


def wait_until_run(tab, notebook) -> None:
    """Wait for the last cell's number; then no cell but those on purpose has failed."""
    from playwright.sync_api import expect

    code = [c for c in notebook.cells if c.cell_type == "code"]
    on_purpose = sum("raises-exception" in c.metadata.get("tags", []) for c in code)
    prompts = tab.locator(".jp-CodeCell .jp-InputArea-prompt")
    folded = sum(c.metadata.get("jupyter", {}).get("source_hidden", False) for c in code)
    expect(prompts).to_have_count(len(code) - folded, timeout=PATIENCE)
    # JupyterLab draws a traceback as stderr, and nothing else in a chapter writes there. After a
    # failure no later cell is run: say which it was, instead of waiting for the last one.
    errors = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
    tab.wait_for_function(
        """([prompts, errors, last, most]) => document.querySelectorAll(errors).length > most
           || [...document.querySelectorAll(prompts)].at(-1).textContent === last""",
        arg=[".jp-CodeCell .jp-InputArea-prompt", errors, f"[{len(code)}]:", on_purpose],
        timeout=PATIENCE)
    assert tab.locator(errors).count() == on_purpose, tab.locator(errors).all_inner_texts()


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory):
    """JupyterLab on a free port of this machine, with settings of its own."""
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("work")
    for file, setting in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting), encoding="utf-8")
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    environment = build.kernel_environment(folder) | {k: str(home / v) for k, v in places.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder,
        "IdentityProvider.token": token,
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with open(home / "lab.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    lab = Lab(folder, port, token)
    try:
        for _ in range(600):
            try:
                lab.ask("")
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-2000:]}")
        yield lab
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def lab(lab_server):
    """The same server for all tests; the kernels of each are ended after it."""
    yield lab_server
    lab_server.close_kernels()


@pytest.fixture
def tab(tmp_path):
    """A tab of a fresh browser that writes down its errors and every address it asks for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=browser(),
            headless=True,
            args=FLAGS,
            viewport={"width": 1200, "height": 1400},
        )
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.problems, page.asked = [], set()
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda said: said.type == "error" and page.problems.append(said.text))
        context.on("request", lambda request: page.asked.add(urlparse(request.url).hostname))
        page.on("websocket", lambda one: page.asked.add(urlparse(one.url).hostname))
        yield page
        context.close()
