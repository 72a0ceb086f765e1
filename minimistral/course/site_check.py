"""What may be wrong with a site that stands: links, pictures, headings; in a browser, accessibility.

A finding is one line of text that names page and place. `Reading` looks at one page without a browser.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from minimistral.course.figures import SHORTEST_ALT
from minimistral.course.render import FLAGS, browser

LOADS = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}
HOW = {"resultTypes": ["violations"], "preload": False}  # no reading of styles: a file's page may not
SERIOUS = ("serious", "critical")
VIEWS = (  # colours, width in pixels, what axe looks at: contrast takes long, and is no other on a narrow screen
    ("light", 1280, {}),
    ("dark", 1280, {"runOnly": ["color-contrast"]}),
    ("light", 390, {"rules": {"color-contrast": {"enabled": False}}}),
)

# Everything unfolded, which tells whether the page is too wide; then, of the thousands of coloured words,
# rows and items, a few of each kind, as the rest look alike.
UNFOLD_AND_THIN = """() => {
  for (const one of document.querySelectorAll("article details")) one.open = true;
  const wide = document.documentElement.scrollWidth > innerWidth, seen = new Set();
  const alike = [...document.querySelectorAll("article :is(tbody > tr, li):nth-child(n+5)")];
  for (const word of document.querySelectorAll("article pre span[class]")) {
    const kind = word.className + " in " + (word.closest(".cell_input, .cell_output, .panel")?.className);
    if (seen.has(kind)) word.replaceWith(...word.childNodes);
    seen.add(kind);
  }
  for (const one of alike) one.remove();
  return wide;
}"""


class Reading(HTMLParser):
    """What a page links to, loads and is made of."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.ids, self.problems = [], [], set(), []
        self.headings, self.language, self.figures = [], "", 0
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "id" in found:
            if found["id"] in self.ids:
                self.problems.append(f"the id {found['id']} stands here twice")
            self.ids.add(found["id"])
        if tag == "html":
            self.language = found.get("lang", "")
        elif tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        elif tag == "iframe" and not found.get("title"):
            self.problems.append("a frame without a title")
        if tag in LOADS and found.get(LOADS[tag]):
            if tag != "link" or "stylesheet" in found.get("rel", "") or "icon" in found.get("rel", ""):
                self.loads.append(found[LOADS[tag]])
        if tag == "img":
            self.figures += "figure" in self.open
            alt = (found.get("alt") or "").strip()
            if len(alt) < (SHORTEST_ALT if "figure" in self.open else 1):
                self.problems.append(f"a picture without a text that says what it shows: {alt!r}")
        if tag == "figure":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag == "figure" and self.open:
            self.open.pop()


def pages(site: Path) -> list[str]:
    """The pages of a site, as paths below it; the theme's own files are none."""
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [name for name in names if not name.startswith("_")]


def problems(site: Path) -> list[str]:
    """Everything that is wrong with a site's files."""
    site = site.resolve()
    read = {name: Reading((site / name).read_text(encoding="utf-8")) for name in pages(site)}
    found = []
    for name, page in read.items():
        own = list(page.problems)
        if not page.language:
            own.append("no language is set")
        if page.headings.count(1) != 1 or page.headings[:1] != [1]:
            own.append(f"headings of these levels, but one of level 1 comes first: {page.headings[:5]}")
        own += [f"a heading of level {b} below one of level {a}"
                for a, b in zip(page.headings, page.headings[1:]) if b > a + 1]
        own += [f"loads {address}" for address in page.loads if not _stands(site, name, address)]
        own += filter(None, (_link_problem(site, read, name, link) for link in page.links))
        found += [f"{name}: {one}" for one in own]
    return found


def _stands(site: Path, page: str, address: str) -> bool:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return parts.scheme == "data"
    return (site / page).parent.joinpath(unquote(parts.path)).is_file()


def _link_problem(site: Path, read: dict[str, Reading], page: str, link: str) -> str | None:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None  # a page elsewhere: nothing here can tell
    target = (site / page).parent.joinpath(unquote(parts.path)).resolve() if parts.path else site / page
    if not target.is_file() or not target.is_relative_to(site):
        return f"a link leads nowhere: {link}"
    if target.suffix != ".html":
        return None
    there = read[target.relative_to(site).as_posix()]
    if parts.fragment and unquote(parts.fragment) not in there.ids:
        return f"a link leads to a place that is not there: {link}"
    return None


def barriers(site: Path, names: Iterable[str], views=VIEWS) -> Iterator[str]:
    """Serious and critical findings of axe on these pages, everything unfolded; errors of scripts,
    and addresses that a page asks for, too."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    names = list(names)
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser(), args=FLAGS)
        for colours, width, rules in views:
            # What is still fading in has too little contrast: the style ends all movement for who asks for that.
            tab = chromium.new_page(color_scheme=colours, viewport={"width": width, "height": 900},
                                    reduced_motion="reduce")
            said = []
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("console", lambda one: one.type == "error" and said.append(one.text))
            tab.on("request", lambda one: one.url.startswith("http") and said.append(f"asks for {one.url}"))
            for page in names:
                tab.goto((site / page).as_uri())
                wide = tab.evaluate(UNFOLD_AND_THIN)
                tab.wait_for_timeout(100)  # the scripts that answer to it
                where = f"{page} ({colours}, {width} pixels)"
                if wide:
                    yield f"{where}: wider than the window"
                yield from (f"{where}: {one}" for one in said)
                for one in Axe().run(tab, options=HOW | rules).response["violations"]:
                    if one["impact"] in SERIOUS:
                        nodes = [" ".join(map(str, node["target"])) for node in one["nodes"]]
                        yield f"{where}: {one['id']}, {one['impact']}, {len(nodes)} times, e.g. {nodes[0]}"
                said.clear()
            tab.close()
        chromium.close()
