"""A learner's first minutes: a chapter in a real JupyterLab, run to its end, a slider moved.

Skipped where playwright or a Chromium-like browser is missing.
"""

import json
import secrets
import shutil
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

playwright = pytest.importorskip("playwright.sync_api")
if browser() is None:
    pytest.skip("no Chromium or Chrome here; CHROME names one", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {  # no news from elsewhere; every cell in the page, not only those in view
    "apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}
PATIENCE = 300_000  # milliseconds, as for a cell under nbval: other tests run beside this one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A work folder with one chapter in it, as `run.py lab` makes it."""
    work = tmp_path_factory.mktemp("work")
    (work / "notebooks").mkdir()
    chapter = next(ROOT.glob("notebooks/02_*.ipynb"), None)
    if chapter is not None:
        shutil.copy(chapter, work / "notebooks" / "chapter.ipynb")
    else:
        trial = build.targets(ROOT / "tests" / "fixtures" / "trial", ["notebooks/99"])[0].read()
        nbformat.write(trial, work / "notebooks" / "chapter.ipynb")
    return work


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """JupyterLab on a free port of this machine, with settings of its own; its address."""
    home = tmp_path_factory.mktemp("jupyter")
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
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/chapter.ipynb?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def tab(tmp_path):
    """A tab of a fresh browser that writes down its errors and every address it asks for."""
    with playwright.sync_playwright() as play:
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
        context.on("request", lambda request: page.asked.add(urlparse(request.url).hostname))
        page.on("websocket", lambda one: page.asked.add(urlparse(one.url).hostname))
        yield page
        context.close()


def test_a_chapter_runs_and_its_slider_moves_the_figure(lab, tab, folder, tmp_path):
    expect = playwright.expect
    tab.goto(lab)
    # The notebook's own indicator says idle before there is a kernel; the status bar does not.
    tab.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    wait_until_run(tab, folder / "notebooks" / "chapter.ipynb")

    slider = tab.locator(".noUi-handle").first
    slider.scroll_into_view_if_needed()
    cell = tab.locator(".jp-CodeCell").filter(has=tab.locator(".noUi-handle")).first
    picture = cell.locator(".jp-OutputArea img[alt]").first
    before, said = picture.get_attribute("src"), slider.get_attribute("aria-valuenow")
    picture.scroll_into_view_if_needed()
    tab.screenshot(path=tmp_path / "before.png")
    slider.focus()
    at_end = said == slider.get_attribute("aria-valuemax")
    tab.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
    expect(slider).not_to_have_attribute("aria-valuenow", said)
    expect(picture).not_to_have_attribute("src", before, timeout=PATIENCE)
    tab.screenshot(path=tmp_path / "after.png")
    assert len(picture.get_attribute("alt")) >= 30

    assert not tab.problems, tab.problems
    assert tab.asked - {None, ""} <= {"127.0.0.1"}, f"the page asked {tab.asked}"


def wait_until_run(tab, path: Path) -> None:
    """Wait for the last cell's number; then no cell but those on purpose has failed."""
    code = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    on_purpose = sum("raises-exception" in c.metadata.get("tags", []) for c in code)
    prompts = tab.locator(".jp-CodeCell .jp-InputArea-prompt")
    folded = sum(c.metadata.get("jupyter", {}).get("source_hidden", False) for c in code)
    playwright.expect(prompts).to_have_count(len(code) - folded, timeout=PATIENCE)
    playwright.expect(prompts.last).to_have_text(f"[{len(code)}]:", timeout=PATIENCE)
    # JupyterLab draws a traceback as stderr, and nothing else in a chapter writes there.
    errors = tab.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]')
    assert errors.count() == on_purpose, errors.all_inner_texts()
