"""What the search shows below a page that it found: the words of every section, in one script.

Sphinx's own index says which pages hold a word. It would then read those pages to quote from them,
which a page of a file may not do; a script it may load.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from minimistral.course.site_check import pages

SILENT = ("script", "style", "math")


class Sections(HTMLParser):
    """[id, heading, text] of each section of a page's article, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[list[str]] = []
        self.open: list[list[str]] = []
        self.place = 0  # where text goes: 1 the heading, 2 the text, 0 nowhere
        self.feed(text)
        self.found = [[id, *(re.sub(r"\s+", " ", part).strip() for part in parts)] for id, *parts in self.found]

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "section":
            self.open.append([found.get("id", ""), "", ""])
            self.found.append(self.open[-1])
            self.place = 2
        elif re.fullmatch("h[1-6]", tag):
            self.place = 1
        elif tag in SILENT or "headerlink" in found.get("class", ""):
            self.place = 0

    def handle_endtag(self, tag):
        if tag == "section":
            self.open.pop()
        if tag in SILENT or re.fullmatch("section|h[1-6]", tag):
            self.place = 2

    def handle_data(self, data):
        if self.open and self.place:
            self.open[-1][self.place] += data


def write_search_text(site: Path) -> None:
    """Write searchtext.js beside Sphinx's index."""
    texts = {name: Sections((site / name).read_text(encoding="utf-8")).found for name in pages(site)}
    script = f"window.courseText = {json.dumps(texts, ensure_ascii=False, separators=(',', ':'))};\n"
    (site / "searchtext.js").write_text(script, encoding="utf-8", newline="\n")
