"""What a grading leaves: tables for a spreadsheet, JSON, and an overview as one HTML page.

Names, messages and errors come from submissions: in HTML all of them are escaped, and in a table none
can begin as a formula.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections import Counter
from pathlib import Path

from minimistral.files import write_whole

from .exercises import Exercise
from .grade import CRASHED, LIMIT, NO_CHECK, NOT_HANDED_IN, NOT_WRITTEN, NOT_YET, PASSED, UNREADABLE, Grade, Report
from .syllabus import chapter

SIGNS = {PASSED: "✓", NOT_YET: "✗", NOT_WRITTEN: "○", CRASHED: "!", LIMIT: "■", UNREADABLE: "?",
         NO_CHECK: "?", NOT_HANDED_IN: "–"}
CLASSES = {PASSED: "good", NOT_YET: "bad", CRASHED: "stop", LIMIT: "stop", UNREADABLE: "stop",
           NO_CHECK: "wait", NOT_WRITTEN: "wait", NOT_HANDED_IN: "none"}


def write(report: Report, out: Path) -> list[Path]:
    """Write the four files to a folder that is there; returns their paths."""
    files = {
        "overview.html": page(report),
        "grades.csv": _table(wide(report)),
        "details.csv": _table(long(report)),
        "grades.json": json.dumps(as_data(report), indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in files.items():
        write_whole(out / name, text)
    return [out / name for name in files]


# ---------------------------------------------------------------- tables and JSON


def wide(report: Report) -> list[list]:
    """One row for each student: points, then one column for each exercise."""
    head = ["student", "points", "of", "passed", "exercises", *(e.key for e in report.exercises), "notes"]
    rows = [
        [row.student, row.points, report.points, row.passed, len(report.exercises),
         *(grade.label for grade in row.grades.values()), "; ".join(row.notes)]
        for row in report.rows
    ]
    return [head, *rows]


def long(report: Report) -> list[list]:
    """One row for each student and exercise."""
    head = ["student", "chapter", "exercise", "title", "status", "points", "of", "misconception", "message", "notebook"]
    rows = [
        [row.student, e.chapter, e.name, e.title, grade.label, grade.points, e.points, grade.misconception,
         grade.message, grade.notebook]
        for row in report.rows for e, grade in zip(report.exercises, row.grades.values())
    ]
    return [head, *rows]


def _table(rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([[_harmless(cell) for cell in row] for row in rows])
    return "\ufeff" + text.getvalue().replace("\r\n", "\n")  # the mark by which Excel knows UTF-8


def _harmless(cell):
    """A spreadsheet takes a cell that begins so for a formula; an apostrophe makes it a text."""
    if isinstance(cell, str):
        cell = " ".join(cell.split())
        return f"'{cell}" if cell.lstrip("\ufeff '\"").startswith(("=", "+", "-", "@", "|", "%")) else cell
    return cell


def as_data(report: Report) -> dict:
    """The whole report as plain values."""
    return {
        "folder": report.folder,
        "when": report.when,
        "limits": [{"what": what, "holds": holds, "how": how} for what, holds, how in report.fences],
        "notes": report.notes,
        "exercises": [
            {"key": e.key, "title": e.title, "points": e.points, "minutes": e.minutes, **_totals(report, e.key)}
            for e in report.exercises
        ],
        "students": [
            {
                "student": row.student, "points": row.points, "of": report.points, "passed": row.passed,
                "seconds": round(row.seconds, 1), "notes": row.notes,
                "grades": {
                    key: {"status": g.status, "limit": g.limit, "points": g.points, "misconception": g.misconception,
                          "message": g.message, "notebook": g.notebook}
                    for key, g in row.grades.items()
                },
            }
            for row in report.rows
        ],
    }


def _totals(report: Report, key: str) -> dict:
    grades = [row.grades[key] for row in report.rows]
    met = Counter(grade.misconception for grade in grades if grade.misconception)
    return {
        "passed": sum(grade.status == PASSED for grade in grades),
        "tried": sum(grade.status in (PASSED, NOT_YET, CRASHED, LIMIT) for grade in grades),
        "misconceptions": dict(met.most_common()),
    }


# ---------------------------------------------------------------- the overview

STYLE = """
:root { color-scheme: light dark; --page:#fff; --text:#1b1b1b; --soft:#595959; --line:#767676; --head:#f2f2f2;
  --good:#00664b; --goodback:#e3f4ee; --bad:#9a3a00; --badback:#fdeee4; --stop:#7a1f5c; --stopback:#f8e8f2;
  --link:#00558b; }
@media (prefers-color-scheme: dark) { :root { --page:#161616; --text:#ececec; --soft:#b5b5b5; --line:#8a8a8a;
  --head:#262626; --good:#6fdcb4; --goodback:#10342a; --bad:#ffb083; --badback:#43230f; --stop:#f3a6d6;
  --stopback:#401a33; --link:#8cc8f5; } }
* { box-sizing: border-box; }
body { margin:0 auto; padding:1rem clamp(.75rem, 3vw, 2.5rem) 3rem; max-width:110rem; background:var(--page);
  color:var(--text); font:1rem/1.5 system-ui, sans-serif; }
h1 { font-size:1.6rem; line-height:1.2; } h2 { font-size:1.2rem; margin-top:2.2rem; }
p, li { max-width:46rem; }
a { color:var(--link); }
.scroll { overflow-x:auto; border:1px solid var(--line); }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline:3px solid var(--link); outline-offset:2px; }
table { border-collapse:separate; border-spacing:0; font-size:.9rem; width:100%; }
th, td { padding:.35rem .6rem; text-align:left; vertical-align:top; border-top:1px solid var(--line); }
th { background:var(--head); font-weight:600; }
thead th { vertical-align:bottom; border-top:0; }
.grid th, .grid td { border-left:1px solid var(--line); }
.grid th:first-child { position:sticky; left:0; z-index:1; border-left:0; max-width:11rem; overflow-wrap:anywhere; }
.grid thead th { min-width:6.6rem; max-width:9rem; overflow-wrap:anywhere; font-size:.82rem; }
.grid td { font-size:.82rem; min-width:6.6rem; max-width:10rem; line-height:1.3; }
.number { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap; }
.sign { font-weight:700; }
.said { display:block; color:inherit; overflow-wrap:anywhere; }
.good { background:var(--goodback); color:var(--good); } .bad { background:var(--badback); color:var(--bad); }
.stop { background:var(--stopback); color:var(--stop); } .wait, .none { color:var(--soft); }
.bar { display:inline-block; width:6rem; height:.7rem; border:1px solid var(--line); vertical-align:baseline; }
.bar i { display:block; height:100%; background:var(--good); }
details { border-top:1px solid var(--line); padding:.4rem 0; } summary { cursor:pointer; padding:.2rem 0; }
details dl { margin:.4rem 0 1rem; display:grid; grid-template-columns:minmax(9rem, 16rem) 1fr; gap:.3rem 1rem; }
details dt { font-weight:600; overflow-wrap:anywhere; } details dd { margin:0; overflow-wrap:anywhere; max-width:46rem; }
@media (max-width:40rem) { details dl { grid-template-columns:1fr; gap:0; } details dd { margin-bottom:.6rem; }
  .grid th:first-child { max-width:7rem; } }
@media print { .scroll { overflow:visible; border:0; } body { max-width:none; } }
"""


def page(report: Report) -> str:
    """The overview: who passed what, which mistakes the class makes, which limits there were."""
    esc = html.escape
    chapters = sorted({e.chapter for e in report.exercises})
    names = ", ".join(f"{n} {chapter(n).title}" for n in chapters)
    title = f"Grades: {names}" if names else "Grades"
    parts = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{esc(title)}</title>", f"<style>{STYLE}</style>", "</head>", "<body>", "<main>",
        f"<h1>{esc(title)}</h1>",
        f"<p>{len(report.rows)} students, {len(report.exercises)} exercises, {report.points} points; "
        f"graded {esc(report.when.replace('T', ' '))}. A point stands for five minutes begun.</p>",
    ]
    if report.notes:
        parts += ["<h2>To look at</h2>", "<ul>", *(f"<li>{esc(note)}</li>" for note in report.notes), "</ul>"]
    parts += [_grid(report), _exercises(report), _students(report), _limits(report)]
    return "\n".join([*parts, "</main>", "</body>", "</html>"]) + "\n"


def _grid(report: Report) -> str:
    esc = html.escape
    heads = "".join(
        f'<th scope="col">{_name(e)}<span class="said">{e.points} '
        f'{"point" if e.points == 1 else "points"}</span></th>' for e in report.exercises
    )
    rows = [
        f'<tr><th scope="row"><a href="#s{n}">{esc(row.student)}</a></th>'
        f'<td class="number">{row.points} of {report.points}</td>'
        + "".join(map(_cell, row.grades.values())) + "</tr>"
        for n, row in enumerate(report.rows)
    ]
    return (
        '<h2 id="class">The class</h2>\n<p>Each cell: the outcome and, where one was recognised, the first '
        "misconception met. A student's name leads to the messages.</p>\n"
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="class"><table class="grid">'
        f'<thead><tr><th scope="col">Student</th><th scope="col">Points</th>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _cell(grade: Grade) -> str:
    said = f'<span class="said">{html.escape(grade.misconception)}</span>' if grade.misconception else ""
    return f'<td class="{CLASSES[grade.status]}">{_label(grade)}{said}</td>'


def _name(exercise: Exercise) -> str:
    """Chapter and name; a long name may be broken after an underscore."""
    return f"{exercise.chapter} · {html.escape(exercise.name).replace('_', '_<wbr>')}"


def _label(grade: Grade) -> str:
    return f'<span class="sign" aria-hidden="true">{SIGNS[grade.status]}</span> {html.escape(grade.label)}'


def _exercises(report: Report) -> str:
    rows = []
    for e in report.exercises:
        totals = _totals(report, e.key)
        share = 100 * totals["passed"] / max(1, len(report.rows))
        messages = {m.name: m.message for m in e.misconceptions}
        met = "".join(
            f"<li><b>{html.escape(name)}</b> ({count}): {html.escape(messages.get(name, ''))}</li>"
            for name, count in list(totals["misconceptions"].items())[:3]
        )
        rows.append(
            f'<tr><th scope="row">{_name(e)}<span class="said wait">{html.escape(e.title)}'
            f'</span></th><td class="number">{totals["passed"]} of {len(report.rows)} '
            f'<span class="bar" aria-hidden="true"><i style="width:{share:.0f}%"></i></span></td>'
            f'<td class="number">{totals["tried"]}</td><td>{f"<ul>{met}</ul>" if met else "none recognised"}</td></tr>'
        )
    return (
        '<h2 id="exercises">The exercises</h2>\n<p>The misconceptions most often met, with the message that the '
        'learner was shown.</p>\n<div class="scroll" role="region" tabindex="0" aria-labelledby="exercises"><table><thead><tr><th scope="col">Exercise</th><th scope="col" class="number">Passed</th>'
        '<th scope="col" class="number">Tried</th><th scope="col">Misconceptions</th></tr></thead>\n<tbody>\n'
        + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _students(report: Report) -> str:
    esc = html.escape
    parts = ['<h2 id="students">The students</h2>']
    for n, row in enumerate(report.rows):
        lines = "".join(
            f"<dt>{_name(grade.exercise)}</dt><dd><b>{_label(grade)}</b>"
            f"{f': {esc(grade.message)}' if grade.message else ''}</dd>"
            for grade in row.grades.values()
        )
        notes = "".join(f"<li>{esc(note)}</li>" for note in row.notes)
        notes = f"<ul>{notes}</ul>" if notes else ""
        parts.append(
            f'<details id="s{n}"><summary>{esc(row.student)}: {row.passed} of {len(report.exercises)} passed, '
            f"{row.points} of {report.points} points</summary>{notes}<dl>{lines}</dl></details>"
        )
    return "\n".join(parts) + (
        "\n<script>const open = () => { const d = document.getElementById(location.hash.slice(1));"
        " if (d && d.tagName === 'DETAILS') d.open = true; };"
        " addEventListener('hashchange', open); open();</script>"
    )


def _limits(report: Report) -> str:
    lines = "".join(
        f"<dt>{html.escape(what)}</dt><dd>{'' if holds else '<b>Not available here.</b> '}{html.escape(how)}</dd>"
        for what, holds, how in report.fences
    )
    return (
        '<h2 id="limits">Limits</h2>\n<p>Every notebook ran on a copy, in processes of its own. '
        "This guards against mistakes and mischief. It is no security sandbox: grade work of people you do not "
        "trust on a machine that holds nothing else.</p>"
        f"<details open><summary>Limits for one notebook</summary><dl>{lines}</dl></details>"
    )
