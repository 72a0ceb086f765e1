"""Search all chapters and all known mistakes, offline: in a notebook and in a terminal.

    search("rolling buffer")      sections of stories and exercises, the best first
    mistakes("NaN")               mistakes whose name or message has the word
    mistakes(8)                   the mistakes of chapter 8 and their symptoms
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from .exercises import Exercise, all_exercises, chapter_exercises
from .glossary import terms
from .panel import Panel
from .sections import Section, read_sections, recap_mistakes
from .syllabus import CHAPTERS, EXERCISES, NOTEBOOKS, chapter

NOTHING = "Nothing has all of these words. Try fewer, or only their beginnings."
SHOWN = 10
SNIPPET = 150
# what a hit is worth; more than three in the same place say nothing new
TITLE, DEFINED, PROSE, CODE, PHRASE = 12, 8, 3, 1, 6


@dataclass(frozen=True)
class Hit:
    """One section that was found; the higher the score, the better."""

    section: Section
    score: float
    snippet: str

    @property
    def label(self) -> str:
        kind = "exercises, " if self.section.folder == EXERCISES else ""
        return f"Chapter {self.section.chapter.number}, {kind}“{self.section.title}”"


def find_sections(words: str) -> list[Hit]:
    """All sections that have every word, the best first; a word also finds words that begin with it."""
    asked = re.findall(r"[\w'+.]+", words.casefold())
    if not asked:
        raise ValueError("say what to search for: one word or several")
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}", re.I) for word in asked]
    phrase = re.compile(r"\W+".join(map(re.escape, asked)), re.I)
    new = {(number, part) for term in terms() for number in term.chapters
           for part in re.findall(r"[\w'+.]+", term.plain.casefold())}
    hits = []
    for one in CHAPTERS:
        for folder in (NOTEBOOKS, EXERCISES):
            for section in read_sections(one, folder):
                prose, code = _texts(section)
                score = 0.0
                for word, pattern in zip(asked, patterns):
                    counts = [min(3, len(pattern.findall(text))) for text in (section.title, prose, code)]
                    if not any(counts):
                        break
                    score += TITLE * bool(counts[0]) + PROSE * counts[1] + CODE * counts[2]
                    score += DEFINED * ((one.number, word) in new and folder == NOTEBOOKS)
                else:
                    if len(asked) > 1:
                        score += PHRASE * bool(phrase.search(f"{section.title}\n{prose}\n{code}"))
                    aside = section.further or folder == EXERCISES or section.title == "What you have now"
                    score *= 0.7 if aside else 1.0
                    hits.append(Hit(section, score, _snippet(prose, code, patterns)))
    return sorted(hits, key=lambda hit: -hit.score)


def search(words: str) -> Panel:
    """The sections that have all these words, the best first."""
    hits = find_sections(words)
    if not hits:
        return Panel(f"Search · {words}", [NOTHING])
    more = f"{len(hits)} sections; the best {SHOWN}:" if len(hits) > SHOWN else f"{len(hits)} sections:"
    text, items = [], []
    for hit in hits[:SHOWN]:
        text.append(f"{hit.label}\n    {hit.section.path}\n    {hit.snippet}")
        items.append(f'<li><a href="{address(hit.section.path, hit.section.title)}">{html.escape(hit.label)}</a><br>'
                     f"{html.escape(hit.snippet)}</li>")
    return Panel(f"Search · {words}", [more if len(hits) > 1 else "1 section:"],
                 extra_text="\n".join(text), extra_html=f"<ol>{''.join(items)}</ol>")


def address(path: str, title: str = "") -> str:
    """A link to a notebook (and a heading in it) from the notebook that runs now."""
    here = Path.cwd()
    start = "../" if here.name in (NOTEBOOKS, EXERCISES, "solutions") else ""
    return start + path + (f"#{quote(title.replace(' ', '-'))}" if title else "")


def _texts(section: Section) -> tuple[str, str]:
    prose = "\n\n".join(p.text for p in section.parts if p.kind == "markdown")
    code = [p.text for p in section.parts if p.kind == "code" and "imports" not in p.tags]
    return prose, "\n".join(code) if section.level > 1 else ""  # below the title stand imports


def _snippet(prose: str, code: str, patterns: list[re.Pattern]) -> str:
    """The sentence, or else the line of code, that has the most of the words."""
    text = re.sub(r"<[^>]+>|[*`$]|^\s*[|>-]\s*", "", prose, flags=re.M)
    pieces = [" ".join(piece.split()) for piece in re.split(r"(?<=[.?!])\s+|\n\n", text)] + code.splitlines()
    best = max(pieces, key=lambda piece: (sum(bool(p.search(piece)) for p in patterns), len(piece) > 40),
               default="").strip()
    if len(best) <= SNIPPET:
        return best
    first = min((m.start() for p in patterns if (m := p.search(best))), default=0)
    start = max(0, min(first - SNIPPET // 3, len(best) - SNIPPET))
    start = best.rfind(" ", 0, start) + 1
    end = best.rfind(" ", start, start + SNIPPET)
    end = end if end > start else start + SNIPPET
    return ("… " if start else "") + best[start:end] + (" …" if end < len(best) else "")


# ---------------------------------------------------------------- mistakes


def mistakes(asked: int | str = "") -> Panel:
    """Mistakes of a chapter (its number), of an exercise (its name), or those that have a word."""
    asked = str(asked).strip()
    if asked.isdigit():
        return _of_chapter(int(asked))
    named = [e for e in all_exercises() if asked in (e.name, e.key)]
    if named:
        return _listed(f"Mistakes · {asked}", [(e, m) for e in named for m in e.misconceptions], limit=None)
    if not asked:
        raise ValueError("name a chapter (8), an exercise (attend) or a word (NaN)")
    words = [re.compile(rf"(?<!\w){re.escape(word)}", re.I) for word in asked.split()]
    found = [(e, m) for e in all_exercises() for m in e.misconceptions
             if all(word.search(f"{m.name} {m.message}") for word in words)]
    recap = [row for c in CHAPTERS for row in _rows(c.number)
             if all(word.search(" ".join(row)) for word in words)]
    if not found and not recap:
        return Panel(f"Mistakes · {asked}", [NOTHING])
    return _listed(f"Mistakes · {asked}", found, recap)


def _rows(number: int) -> list[tuple[str, str, str]]:
    one = chapter(number)
    return [(f"{number} {one.title}", *(cell.replace("`", "") for cell in row)) for row in recap_mistakes(one)]


def _of_chapter(number: int) -> Panel:
    one = chapter(number)
    every = chapter_exercises(number)
    counts = ", ".join(f"{e.name} ({len(e.misconceptions)})" for e in every)
    rows = [row[1:] for row in _rows(number)]
    return Panel(f"Mistakes · chapter {number}, {one.title}",
                 [f"Known for each exercise: {counts}.", f'mistakes("{every[0].name}") lists those of one exercise.'],
                 table=(("Mistake", "Symptom"), rows) if rows else None)


def _listed(heading: str, found: list[tuple[Exercise, object]], recap: list = (), limit: int | None = 20) -> Panel:
    shown = found[:limit]
    said = [f"{e.key} · {m.name}: {' '.join(m.message.split())}" for e, m in shown]
    lines = [f"{len(found)} known" + (f"; the first {len(shown)}:" if len(found) > len(shown) else ".")]
    return Panel(heading, [*lines, *said], table=(("Chapter", "Mistake", "Symptom"), recap) if recap else None)
