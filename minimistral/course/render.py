"""Pictures of a notebook's page, to look at it without opening it.

    python -m minimistral.course.render notebooks/02_attention.ipynb page.png

writes page-light-1.png, page-light-2.png, ... and page-dark-1.png, ..., each 1000 wide and about 1600
pixels high. Needs playwright and a Chromium or Chrome (the variable CHROME names another one).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

WIDTH, HEIGHT = 1000, 1600
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
LOADED = re.compile(r'<script[^>]*src="https?://[^"]*"[^>]*></script>')


def browser() -> str | None:
    """The path of a Chromium-like browser on this machine, or None."""
    named = os.environ.get("CHROME")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


def page(path: Path, theme: str = "light") -> str:
    """The notebook as one HTML page in JupyterLab's light or dark theme, folded cells left out.

    Nothing is loaded from elsewhere, so formulas stay as they were typed.
    """
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, 4)
    folded = [c for c in notebook.cells if c.metadata.get("jupyter", {}).get("source_hidden")]
    for cell in folded:
        cell.source = "# (folded)"
    html, _ = HTMLExporter(theme=theme, embed_images=True).from_notebook_node(notebook)
    return LOADED.sub("", html)


def render(path: Path, picture: Path, themes: tuple[str, ...] = ("light", "dark")) -> list[Path]:
    """Write the pictures of a notebook and return their paths."""
    from playwright.sync_api import sync_playwright

    written = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=FLAGS)
        for theme in themes:
            html = Path(folder) / f"{theme}.html"
            html.write_text(page(path, theme), encoding="utf-8")
            tab = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=theme)
            tab.goto(html.as_uri())
            total = tab.evaluate("document.documentElement.scrollHeight")
            for number, top in enumerate(range(0, total, HEIGHT), start=1):
                part = picture.with_name(f"{picture.stem}-{theme}-{number}.png")
                area = {"x": 0, "y": top, "width": WIDTH, "height": min(HEIGHT, total - top)}
                tab.screenshot(path=part, clip=area, full_page=True)
                written.append(part)
        chromium.close()
    return written


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when the pictures were written."""
    parser = argparse.ArgumentParser(prog="render", description="Pictures of a notebook's page.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("picture", type=Path, help="page.png gives page-light-1.png and so on")
    parser.add_argument("--theme", choices=["light", "dark"], help="only this one")
    options = parser.parse_args(arguments)
    if browser() is None:
        print("No Chromium or Chrome was found; CHROME=/path/to/it names one.", file=sys.stderr)
        return 1
    themes = (options.theme,) if options.theme else ("light", "dark")
    print(*render(options.notebook, options.picture, themes), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
