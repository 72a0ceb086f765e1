"""The progress page: what passed, what went wrong on the way, and what to do next.

    progress_page()            in a notebook: buttons to choose chapters, if ipywidgets is there
    minimistral progress       the same as text, in a terminal

The page is plain HTML: a table, and for every chapter that was begun a part to open. It is read from
``work/progress.json`` each time it is shown.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from minimistral.lab import from_here

from .exercises import Exercise, chapter_exercises
from .panel import BOX, CELL, EDGES, text_table
from .progress import load_progress, progress, work_folder
from .search import address
from .syllabus import CHAPTERS, EXERCISES, NOTEBOOKS, Chapter

SHOW = ("all chapters", "begun", "not finished")


@dataclass(frozen=True)
class Line:
    """One chapter on the page."""

    chapter: Chapter
    exercises: tuple[Exercise, ...]
    entries: dict[str, dict]  # exercise's name -> what progress.json says
    bets: tuple[int, int, int]  # won, decided, placed
    rung: str  # the learner's best own row on the ladder

    def passed(self, exercise: Exercise) -> bool:
        return self.entries.get(exercise.name, {}).get("status") == "pass"

    @property
    def n_passed(self) -> int:
        return sum(map(self.passed, self.exercises))

    @property
    def begun(self) -> bool:
        return bool(self.entries or self.bets[2] or self.rung)

    @property
    def finished(self) -> bool:
        return self.n_passed == len(self.exercises)

    @property
    def met(self) -> list[tuple[Exercise, str, int, bool]]:
        """(exercise, message, how often, passed since) of each mistake that a check named."""
        found = []
        for exercise in self.exercises:
            counts = self.entries.get(exercise.name, {}).get("misconceptions", {})
            for m in exercise.misconceptions:
                if counts.get(m.name):
                    found.append((exercise, " ".join(m.message.split()), counts[m.name], self.passed(exercise)))
        return found

    @property
    def cells(self) -> tuple[str, ...]:
        won, decided, placed = self.bets
        bets = f"{won} of {decided}" if decided else f"{placed} open" if placed else "-"
        return (f"{self.chapter.number} {self.chapter.title}", f"{self.n_passed} of {len(self.exercises)}",
                str(len(self.met) or "-"), bets, self.rung or "-")


HEADER = ("Chapter", "Exercises passed", "Mistakes met", "Bets won", "Your ladder, nats per byte")


def read_page() -> list[Line]:
    data = load_progress()
    verdicts, lines = data.get("verdicts", {}), []
    for one in CHAPTERS:
        exercises = chapter_exercises(one.number)
        entries = {e.name: data["exercises"][e.key] for e in exercises if e.key in data["exercises"]}
        bets = {str(h.number): data["predictions"].get(f"headline {h.number}") for h in one.headlines}
        placed = {number: answer for number, answer in bets.items() if answer is not None}
        won = sum(verdicts.get(number) == answer for number, answer in placed.items())
        own = [row["loss"] for row in data["ladder"] if row.get("chapter") == one.number and "loss" in row]
        if exercises:
            lines.append(Line(one, exercises, entries, (won, sum(n in verdicts for n in placed), len(placed)),
                              f"{min(own):.4f}" if own else ""))
    return lines


def next_step(lines: list[Line]) -> tuple[str, str]:
    """What to do now, and the notebook to do it in: the open essential exercises of the newest chapter
    that was begun, then the next chapter's story."""
    begun = [line for line in lines if line.begun]
    if not begun:
        return "Open chapter 0, Start here.", CHAPTERS[0].path()
    line = begun[-1]
    open_ones = [e for e in line.exercises if e.importance == "essential" and not line.passed(e)]
    if open_ones:
        e = open_ones[0]
        rest = f" {len(open_ones)} essential ones are open in this chapter." if len(open_ones) > 1 else ""
        in_story = e.piece or e.name == "share_of_tales"
        return (f"Chapter {e.chapter}: {e.title} ({e.name}), about {e.minutes} minutes.{rest}",
                line.chapter.path(NOTEBOOKS if in_story else EXERCISES))
    later = [c for c in CHAPTERS if c.number > line.chapter.number]
    if later:
        return f"Open chapter {later[0].number}, {later[0].title}: {later[0].question}", later[0].path()
    missing = [one for one in lines if not one.finished]
    if missing:
        return (f"The last chapter is done. Chapter {missing[0].chapter.number} has open exercises.",
                missing[0].chapter.path(EXERCISES))
    return "Everything has passed.", CHAPTERS[-1].path()


def choose(lines: list[Line], show: str) -> list[Line]:
    keep = {"begun": lambda one: one.begun, "not finished": lambda one: not one.finished}
    return list(filter(keep.get(show, lambda one: True), lines))


# ---------------------------------------------------------------- as text and as a page


def as_text(show: str = SHOW[0]) -> str:
    lines = read_page()
    said, where = next_step(lines)
    parts = ["Your progress", progress().lines[0]]
    if chosen := choose(lines, show):
        parts.append(text_table(HEADER, [line.cells for line in chosen]))
    for line in chosen:
        for exercise, message, count, passed in line.met:
            parts.append(f"{exercise.key}, {_times(count)}{', passed since' if passed else ''}: {message}")
    return "\n".join([*parts, f"Next: {said}", f"      {from_here(work_folder() / where)}"])


def as_html(show: str = SHOW[0]) -> str:
    lines = read_page()
    said, where = next_step(lines)
    body = [f"<div>{html.escape(progress().lines[0])}</div>",
            f'<div><strong>Next:</strong> <a href="{address(where)}">{html.escape(said)}</a></div>']
    chosen = choose(lines, show)
    if not chosen:
        body.append(f"<div>No chapter is {html.escape(show)}.</div>")
    else:
        heads = "".join(f'<th scope="col" style="{CELL.format(align="left")}">{h}</th>' for h in HEADER)
        rows = []
        for line in chosen:
            name, *cells = line.cells
            link = f'<a href="{address(line.chapter.path())}">{html.escape(name)}</a>'
            row = f'<th scope="row" style="{CELL.format(align="left")};font-weight:normal">{link}</th>'
            row += "".join(f'<td style="{CELL.format(align="right")}">{cell}</td>' for cell in cells)
            rows.append(f"<tr>{row}</tr>")
        body.append('<table style="border-collapse:collapse;margin:4px 0">'
                    f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
        body += [_details(line) for line in chosen if line.begun]
    box = BOX.format(edge=EDGES["plain"])
    return f'<div style="{box}"><strong>Your progress</strong>{"".join(body)}</div>'


def _details(line: Line) -> str:
    items = []
    for e in line.exercises:
        entry = line.entries.get(e.name, {})
        tried = entry.get("attempts", 0)
        state = "passed" if line.passed(e) else f"tried {_times(tried)}" if tried else "open"
        met = "".join(f"<li>met {_times(count)}: {html.escape(message)}</li>"
                      for exercise, message, count, _ in line.met if exercise is e)
        items.append(f"<li>{state}: {html.escape(e.title)} (<code>{e.name}</code>)"
                     + (f"<ul>{met}</ul>" if met else "") + "</li>")
    links = " · ".join(f'<a href="{address(line.chapter.path(folder))}">{word}</a>'
                       for folder, word in ((NOTEBOOKS, "the story"), (EXERCISES, "the exercises")))
    summary = f"{line.chapter.number} {html.escape(line.chapter.title)}: the exercises one by one"
    return f"<details><summary>{summary}</summary><div>{links}</div><ul>{''.join(items)}</ul></details>"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


# ---------------------------------------------------------------- in a notebook


class StaticPage:
    """The page with all chapters, for notebooks without widgets and for terminals."""

    def __repr__(self) -> str:
        return as_text()

    def _repr_html_(self) -> str:
        return as_html()


def progress_page():
    """The page with its choice of chapters; without ipywidgets the page alone, with all chapters."""
    try:
        import ipywidgets
    except ImportError:
        return StaticPage()

    class Page(ipywidgets.VBox):
        def __repr__(self):
            return as_text(choice.value)

    choice = ipywidgets.RadioButtons(options=SHOW, description="Show", orientation="horizontal",
                                     style={"description_width": "initial"}, layout={"width": "95%"})
    again = ipywidgets.Button(description="Read again", tooltip="Read progress.json again")
    page = ipywidgets.HTML(as_html())

    def draw(_=None):
        page.value = as_html(choice.value)

    choice.observe(draw, names="value")
    again.on_click(draw)
    return Page([choice, again, page])
