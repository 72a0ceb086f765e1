"""The pages made from records, recaps and syllabus: `python -m minimistral.course.indexes`.

    docs/exercises.md   every exercise: difficulty, importance, minutes, mistakes to expect, the question to ask
    docs/mistakes.md    every mistake that a check can name, and the symptoms that the chapters list
    docs/glossary.md    every new word
    docs/instructors.md the table of sections between its two markers; the rest is written by hand

    --check    write nothing; exit 1 if a page is not what the records say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

from minimistral.files import write_whole

from .exercises import Exercise, Misconception, chapter_exercises
from .glossary import terms
from .notebook_library import ROOT
from .plans import GUIDE
from .sections import Section, read_sections, recap_mistakes, section_of
from .syllabus import CHAPTERS, Chapter, chapter

DOCS = ROOT / "docs"
MEASURED = ROOT / "benchmarks" / "results" / "sections.json"
BEGIN, END = "<!-- sections -->", "<!-- /sections -->"
KINDS = {
    "complete": "complete some lines", "order": "put lines in order", "function": "write a function",
    "bug": "find the bug", "open": "an open task", "answer": "answer a question", "piece": "core piece",
}
TELLING = 3  # mistakes named for each exercise on the instructor's page
PAGE = "<!-- Made by python -m minimistral.course.indexes; edit the records, not this page. -->\n"


def link(section: Section) -> str:
    return f"[{plain(section.title)}](../{section.path}#{section.slug})"


def plain(text: str) -> str:
    """Text that Markdown leaves alone, outside of its own code spans."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if n % 2 else re.sub(r"([*_<>\[\]|$])", r"\\\1", p) for n, p in enumerate(parts))


def headed(chapter: Chapter) -> str:
    return f"## {chapter.number}. {chapter.title}\n"


def telling(exercise: Exercise) -> list[Misconception]:
    """The mistakes named on the instructor's page: the first that the record names."""
    return list(exercise.misconceptions[:TELLING])


def question(exercise: Exercise) -> str:
    """What to ask somebody who is stuck: the first hint is a question, never an answer."""
    return " ".join(exercise.hints[0].text.split())


# ---------------------------------------------------------------- the pages


def exercises_page() -> str:
    every = [e for c in CHAPTERS for e in chapter_exercises(c.number)]
    minutes = sum(e.minutes for e in every)
    lines = [
        PAGE, "# Exercises, for instructors\n",
        f"{len(every)} exercises, {minutes / 60:.0f} hours if somebody does them all. For each: what it takes, the "
        "question to ask somebody who is stuck, and the first mistakes that its record names, with the message "
        "that the check shows. The [index of mistakes](mistakes.md) has all of them.\n",
        "Ask first, then wait. The question is the exercise's first hint: it does not give the answer away.\n",
    ]
    for one in CHAPTERS:
        lines.append(headed(one))
        table = chapter_exercises(one.number)
        lines += ["| Exercise | Kind | Difficulty | Importance | Minutes | Mistakes known |",
                  "|---|---|---|---|---|---|"]
        lines += [f"| `{e.name}` | {KINDS[e.kind]} | {e.difficulty} | {e.importance} | {e.minutes} | "
                  f"{len(e.misconceptions)} |" for e in table]
        lines.append("")
        for e in table:
            lines += [f"### {plain(e.title)}\n", f"`{e.name}` · {_place(e)}\n", f"**Ask:** {plain(question(e))}\n"]
            lines += [f"- *{plain(m.name)}*: {plain(m.message)}" for m in telling(e)]
            lines.append("")
    return _page(lines)


def mistakes_page() -> str:
    chapters = CHAPTERS
    count = sum(len(e.misconceptions) for c in chapters for e in chapter_exercises(c.number))
    lines = [
        PAGE, "# Mistakes\n",
        f"What goes wrong, and how it looks. Each chapter begins with the symptoms of its recap; below them, folded, "
        f"stand the {count:,} mistakes that the checks can name, exercise by exercise.\n",
        "To look for a symptom, search this page in the browser, or ask in a terminal or a notebook: "
        "`minimistral mistakes NaN`, or `from minimistral.course import mistakes; mistakes(\"NaN\")`.\n",
    ]
    for one in chapters:
        lines.append(headed(one))
        if rows := recap_mistakes(one, ROOT):
            lines += ["| Mistake | Symptom |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
        for e in chapter_exercises(one.number):
            what = f"{escape(e.title)} ({e.name}): {len(e.misconceptions)}"
            lines += ["<details>", f"<summary>{what}</summary>\n", f"{_place(e)}\n"]
            lines += [f"- *{plain(m.name)}*: {plain(m.message)}" for m in e.misconceptions]
            lines += ["\n</details>\n"]
    return _page(lines)


def glossary_page() -> str:
    lines = [PAGE, "# Glossary\n",
             "The words of the course, and the chapter that introduces each. In a terminal: `minimistral glossary "
             "cache`. In a notebook: `from minimistral.course import glossary; glossary(\"cache\")`.\n"]
    letter = ""
    for term in terms():
        if (first := term.term[0].upper()) != letter:
            letter = first
            lines.append(f"## {letter}\n")
        places = ", ".join(f"[{chapter(n).title}](../{chapter(n).path()})" for n in term.chapters)
        number = "Chapter" if len(term.chapters) == 1 else "Chapters"
        told = " and ".join(map(str, term.chapters))
        lines.append(f"**{plain(term.term)}**: {plain(term.definition)} {number} {told}: {places}.\n")
    return _page(lines)


def _place(exercise: Exercise) -> str:
    """Where an exercise is, and what it takes, as one line of Markdown."""
    section = section_of(exercise.name, chapter(exercise.chapter), ROOT)
    if section is None:
        raise ValueError(f'{exercise.key}: no notebook says check("{exercise.name}", ...); write it, then '
                         f"python3 run.py build {exercise.chapter:02d}")
    where = "the story" if section.folder == "notebooks" else "the exercises"
    minutes = "minute" if exercise.minutes == 1 else "minutes"
    return (f"{KINDS[exercise.kind]} · {exercise.difficulty} · {exercise.importance} · "
            f"{exercise.minutes} {minutes} · in {where}: {link(section)}")


def _page(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


# ---------------------------------------------------------------- minutes of sections


def minutes_of_sections(one: Chapter) -> dict[str, int]:
    """The chapter's core minutes, divided among its sections of level 2.

    The readers' time is known for whole chapters. A section's share is weighed by its words (150 a
    minute), its lines of code (20 a minute) and the minutes of the pieces written in it.
    """
    weights: dict[str, float] = {}
    current = ""
    for section in read_sections(one, root=ROOT):
        if section.further:
            break
        if section.level <= 2:
            current = section.title
            weights[current] = 0.0
        weights[current] += _weight(section)
    first, *_ = weights
    head = weights.pop(first)  # title, imports: read with the first section
    weights[next(iter(weights))] += head
    total = sum(weights.values())
    exact = {name: one.core_minutes * weight / total for name, weight in weights.items()}
    whole = {name: max(1, int(value)) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: exact[n] - int(exact[n]), reverse=True):
        if sum(whole.values()) < one.core_minutes:
            whole[name] += 1
    return whole


def _weight(section: Section) -> float:
    weight = 0.0
    for part in section.parts:
        if part.kind == "markdown":
            weight += len(part.text.split()) / 150
        elif not part.tags & {"library", "imports"}:
            weight += len(part.text.splitlines()) / 20
            names = re.findall(r"""\bcheck\(\s*["'](\w+)["']""", part.text)
            weight += sum(e.minutes for e in chapter_exercises(section.chapter.number) if e.name in names)
    return weight


def sections_table() -> str:
    """Machine seconds and minutes of every core section, as the guide shows them."""
    result = json.loads(MEASURED.read_text(encoding="utf-8"))
    measured, walks = result["chapters"], result["walks"]
    lines = []
    for one in CHAPTERS:
        seconds: dict[str, float] = {}
        waits: dict[str, float] = {}
        current = ""
        for row in measured[one.name]["sections"]:
            if row["section"].startswith("Further"):
                break
            current = row["section"] if row["level"] <= 2 else current
            seconds[current] = seconds.get(current, 0.0) + row["seconds"]
            waits[current] = max([waits.get(current, 0.0), *(s for s, _ in row["long cells"])])
        first, *_ = seconds
        opening = seconds.pop(first)
        minutes = minutes_of_sections(one)
        total = sum(seconds.values()) + opening
        lines += ["<details>", f"<summary>{one.number}. {one.title}: {one.core_minutes} minutes, of which the machine "
                  f"works {total:.0f} seconds</summary>\n",
                  "| Section | Minutes | Machine, seconds | Longest wait, seconds |", "|---|---|---|---|"]
        lines += [f"| {plain(name)} | {minutes[name]} | {value:.0f} | {f'{waits[name]:.0f}' if waits[name] else ''} |"
                  for name, value in seconds.items() if name in minutes]
        lines += [f"\nThe imports before them: {opening:.0f} s.\n", "</details>\n"]
    told = []
    for minutes, row in sorted(walks.items(), key=lambda pair: int(pair[0])):
        longest = max((s for one in row["chapters"] for _, s in one["waits"]), default=0.0)
        total = sum(one["seconds"] for one in row["chapters"])
        told.append(f"{minutes} minutes: {total:.0f} s" + (f", the longest wait {longest:.0f} s" if longest else ", no wait"))
    lines.append("Each plan was also run in its order, every chapter cold and up to the plan's last section of it; nothing "
                 f"stopped. The machine worked ({'; '.join(told)}).\n")
    where = next(iter(measured.values()))["provenance"]
    lines.append(f"Seconds of the processor with one thread, one cold run each: {where['processor']}, {where['cores']} "
                 f"cores, torch {where['torch']}, {where['date'][:10]} (`python benchmarks/sections.py`).\n")
    return _page(lines)


def guide_page(text: str) -> str:
    """The guide with its table of sections made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{sections_table()}{END}{after}"


def pages() -> dict[Path, str]:
    """Every page and what it has to be."""
    made = {DOCS / "exercises.md": exercises_page(), DOCS / "mistakes.md": mistakes_page(),
            DOCS / "glossary.md": glossary_page()}
    if GUIDE.exists():
        made[GUIDE] = guide_page(GUIDE.read_text(encoding="utf-8"))
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when the pages are as they have to be."""
    parser = argparse.ArgumentParser(prog="indexes", description="Make docs/ from the records.")
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    options = parser.parse_args(arguments)
    made = pages()
    stale = [path for path, text in made.items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'stale' if options.check else 'written'}: {path.relative_to(ROOT).as_posix()}")
        if not options.check:
            write_whole(path, made[path])
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
