"""The mutation report for people: the record as Markdown, and as one HTML page of its own."""

from __future__ import annotations

import html as markup
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .exercises import TYPED
from .panel import is_number
from .soundness import FEWEST_MISCONCEPTIONS

LEAST_COMPARED = 0.6  # share of a notebook's outputs
MOST_SECONDS, MOST_CELL_SECONDS = 60, 10  # of a chapter's three notebooks, of a cell
BELOW = "⚠ "  # before what falls short; words say it, too
MADE = "<!-- Made by python3 run.py report; edit the records, not this page. -->\n"


@dataclass
class Table:
    """A table of the page."""

    title: str
    words: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)


# ---------------------------------------------------------------- what falls short


def exercise_shortfalls(key: str, row: dict) -> list[str]:
    """What is wrong with one exercise, as sentences."""
    found = [f"{key}: {problem}" for problem in row["problems"]]
    if row["misconceptions"] < FEWEST_MISCONCEPTIONS.get(row["kind"], 0):
        found.append(f"{key}: only {row['misconceptions']} misconceptions")
    for part, whole, what in (
        ("refused", "misconceptions", "misconceptions pass"),
        ("diagnosed", "misconceptions", "misconceptions are not told with their own message"),
        ("accepted", "equivalents", "right solutions are refused"),
    ):
        if row[part] < row[whole]:
            found.append(f"{key}: {row[whole] - row[part]} {what}")
    return found + [f"{key}: a mutant passes: {name}" for name, why in row["survivors"].items() if not why]


def notebook_shortfalls(name: str, row: dict) -> list[str]:
    found = []
    if compared(row) < LEAST_COMPARED * row["outputs"]:
        found.append(f"{name}: {compared(row)} of {row['outputs']} outputs compared")
    if row.get("slowest_cell_seconds", 0) > MOST_CELL_SECONDS:
        found.append(f"{name}: a cell takes {row['slowest_cell_seconds']} seconds, {MOST_CELL_SECONDS} wanted")
    return found


def shortfalls(record: dict) -> list[str]:
    """Everything that falls short of the house's measures, as sentences."""
    found = [s for key, row in record["exercises"].items() for s in exercise_shortfalls(key, row)]
    found += [s for name, row in record["notebooks"].items() for s in notebook_shortfalls(name, row)]
    for chapter in sorted({row["chapter"] for row in record["notebooks"].values()}):
        took = sum(row.get("seconds", 0) for row in record["notebooks"].values() if row["chapter"] == chapter)
        if took > MOST_SECONDS:
            found.append(f"chapter {chapter}: its notebooks take {took:.0f} seconds, {MOST_SECONDS} wanted")
    return found


def compared(row: dict) -> int:
    return row["outputs"] - len(row["ignored"])


# ---------------------------------------------------------------- tables


def share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" + (f" ({100 * part / whole:.1f}%)" if whole else "")


def totals(record: dict) -> Table:
    exercises, notebooks = record["exercises"].values(), record["notebooks"].values()

    def total(name, rows=exercises):
        return sum(row[name] for row in rows)

    explained = sum(bool(why) for row in exercises for why in row["survivors"].values())
    table = Table("Totals", "", ["What", "How many"])
    table.rows = [
        ["Exercises", f"{len(exercises)}"],
        ["Misconceptions refused", share(total("refused"), total("misconceptions"))],
        ["Misconceptions told with their own message", share(total("diagnosed"), total("misconceptions"))],
        ["Equivalent solutions accepted", share(total("accepted"), total("equivalents"))],
        ["Mutants refused", share(total("mutants_refused"), total("mutants"))],
        ["Mutants told as one of the misconceptions", share(total("mutants_named"), total("mutants"))],
        ["Mutants that pass because they compute the same", f"{explained}"],
        ["Mutants that pass without a reason", f"{sum(len(r['survivors']) for r in exercises) - explained}"],
        ["Notebooks, and their code cells", f"{len(notebooks)}, {total('code_cells', notebooks):,}"],
        ["Outputs compared strictly", share(sum(map(compared, notebooks)), total("outputs", notebooks))],
    ]
    ran = [row for row in notebooks if "seconds" in row]
    if ran:
        table.rows += [
            ["Seconds of all notebooks, kernels' starts included", f"{total('seconds', ran):,.0f}"],
            ["Most memory of a kernel", f"{max(row['peak_megabytes'] or 0 for row in ran):,} MB"],
        ]
    return table


def exercise_table(record: dict) -> Table:
    table = Table(
        "Exercises",
        "Refused, and told with its own message: of the misconceptions on record. Accepted: of the equivalent "
        "solutions. Mutants: the solution, changed in one place. Check: seconds that the right solution "
        "takes on all fixtures. All: seconds to judge everything on record.",
        ["Exercise", "Kind", "Refused", "Own message", "Accepted", "Untouched", "Mutants refused", "Check s", "All s"],
    )
    for key, row in record["exercises"].items():
        bad = BELOW if exercise_shortfalls(key, row) else ""
        table.rows.append([
            f"{bad}{key}", row["kind"], f"{row['refused']}/{row['misconceptions']}",
            f"{row['diagnosed']}/{row['misconceptions']}", f"{row['accepted']}/{row['equivalents']}",
            row["stub"], f"{row['mutants_refused']}/{row['mutants']}" if row["mutants"] else "–",
            "–" if row["kind"] in TYPED else f"{row['one_check_seconds']:.2f}", f"{row['seconds']:.1f}",
        ])
    return table


def notebook_table(record: dict) -> Table:
    table = Table(
        "Notebooks",
        "Compared: cells whose stored output a test run must give again. Memory: the most that the kernel has "
        "had resident. Seconds: with the kernel's start.",
        ["Notebook", "Code cells", "Compared", "Not compared", "Share", "Seconds", "Slowest cell s",
         "Memory MB", "File kB"],
    )
    for name, row in record["notebooks"].items():
        bad = BELOW if notebook_shortfalls(name, row) else ""
        table.rows.append([
            f"{bad}{name.removesuffix('.ipynb')}", f"{row['code_cells']}", f"{compared(row)}", f"{len(row['ignored'])}",
            f"{100 * compared(row) / row['outputs']:.0f}%" if row["outputs"] else "–",
            f"{row['seconds']:.1f}" if "seconds" in row else "–",
            f"{row['slowest_cell_seconds']:.1f}" if "seconds" in row else "–",
            f"{row.get('peak_megabytes') or '–'}", f"{row['kilobytes']}",
        ])
    return table


def reasons_table(record: dict) -> Table:
    """Why outputs are not compared, the commonest reason first."""
    counts: dict[str, int] = {}
    for row in record["notebooks"].values():
        for reason in row["ignored"]:
            counts[reason] = counts.get(reason, 0) + 1
    rows = [[reason, f"{n}"] for reason, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    return Table("Why outputs are not compared", "", ["Reason", "Cells"], rows)


def survivors_table(record: dict) -> Table:
    rows = [[key, name, why or f"{BELOW}no reason known: a hole in the fixtures"]
            for key, row in record["exercises"].items() for name, why in row["survivors"].items()]
    return Table("Mutants that pass", "The change, its statement, and why it computes the same.",
                 ["Exercise", "Change", "Why it passes"], rows)


def tables(record: dict) -> list[Table]:
    return [totals(record), exercise_table(record), notebook_table(record), reasons_table(record),
            survivors_table(record)]


INTRODUCTION = (
    "Does a check refuse what is wrong, say which mistake it is, and accept what is right? For every "
    "exercise each misconception on record and each equivalent solution was given to its check, and so was "
    "the solution itself with one change at a time: a constant off by one, an operator or a comparison "
    "exchanged, arguments swapped, a statement or an argument left out."
)


def runs(record: dict) -> list[str]:
    """What ran where, a sentence for each run; the numbers of its rows stand in front."""
    told = []
    for date, run in record["runs"].items():
        counts = {kind: sum(row.get("run") == date for row in record[kind].values())
                  for kind in ("exercises", "notebooks")}
        told.append(
            f"{' and '.join(f'{n} {kind}' for kind, n in counts.items() if n)}: `{run['command']}`, {date[:10]}, "
            f"{run['processor']}, {run['cores']} cores (load {run['load_average'][0]:.1f}), {run['system']}, "
            f"Python {run['python']}, torch {run['torch']}" + (f"; {run['note']}." if run.get("note") else ".")
        )
    return told


# ---------------------------------------------------------------- pages


def markdown(record: dict) -> str:
    """The page for docs/, which reads well where the repository is shown, too."""
    parts = [MADE, "# Mutation report\n", INTRODUCTION + "\n", "## What falls short\n"]
    parts.append("".join(f"- {_cell(s)}\n" for s in shortfalls(record)) or "Nothing falls short.\n")
    for table in tables(record):
        right = [all(is_number(row[i]) for row in table.rows) for i in range(len(table.header))]
        parts.append(f"## {table.title}\n")
        if table.words:
            parts.append(table.words + "\n")
        lines = [table.header, ["---:" if r else "---" for r in right]]
        lines += [[_cell(one) for one in row] for row in table.rows]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    parts.append("## Where this was measured\n")
    parts.append("".join(f"- {run}\n" for run in runs(record)))
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Code as code; nothing that Markdown would read as markup."""
    if "->" in text:
        return re.sub(r"^(.*passes: )?(.*)$", r"\1`\2`", text).replace("|", "\\|")
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --page: #fff; --line: #767676; --soft: #f2f2f2; --bad: #8a3c00; --link: #005a94 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --page: #161616; --soft: #262626; --bad: #ffb27d; --link: #7cc4f5 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; max-width: 76rem; padding: 1rem }
a { color: var(--link) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; vertical-align: top }
thead th { background: var(--soft) } .number { text-align: right } td code { overflow-wrap: anywhere }
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: .2rem 0; cursor: pointer; text-align: inherit }
th[aria-sort=ascending] button::after { content: " \\25B2" } th[aria-sort=descending] button::after { content: " \\25BC" }
.short td, .short th { color: var(--bad); font-weight: bold }
:focus-visible { outline: 3px solid var(--link) }
"""
SORT = """
for (const table of document.querySelectorAll("table")) table.querySelectorAll("thead th").forEach((head, column) => {
  const button = document.createElement("button");
  button.append(...head.childNodes); head.append(button);
  button.onclick = () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("thead th").forEach(one => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].textContent, number = text => parseFloat(text.replaceAll(",", ""));
    const body = table.tBodies[0], rows = [...body.rows];
    rows.sort((a, b) => {
      const [x, y] = [number(value(a)), number(value(b))];
      return (isNaN(x) || isNaN(y) ? value(a).localeCompare(value(b)) : x - y) * (down ? -1 : 1);
    });
    body.append(...rows);
  };
});
"""


def html(record: dict) -> str:
    """One page without anything from elsewhere; its tables can be sorted by their headers."""
    say = markup.escape
    short = shortfalls(record)
    parts = [f"<h1>Mutation report</h1><p>{say(INTRODUCTION)}</p><h2>What falls short</h2>"]
    parts.append("<ul>" + "".join(f"<li>{say(s)}</li>" for s in short) + "</ul>" if short else "<p>Nothing falls short.</p>")
    parts += [_html_table(table, say) for table in tables(record)]
    parts.append("<h2>Where this was measured</h2><ul>")
    parts += [f"<li>{say(run.replace('`', ''))}</li>" for run in runs(record)] + ["</ul>"]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Mutation report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main><script>{SORT}</script></body></html>\n"
    )


def _html_table(table: Table, say: Callable) -> str:
    right = [all(is_number(row[i]) for row in table.rows) for i in range(len(table.header))]
    kinds = [' class="number"' if r else "" for r in right]
    name = table.title.lower().replace(" ", "-")
    parts = [f'<h2 id="{name}">{say(table.title)}</h2>' + (f"<p>{say(table.words)}</p>" if table.words else "")]
    parts.append(f'<div class="wide" tabindex="0" role="region" aria-labelledby="{name}"><table><thead><tr>')
    parts += [f'<th scope="col"{kind}>{say(title)}</th>' for kind, title in zip(kinds, table.header)]
    parts.append("</tr></thead><tbody>")
    for row in table.rows:
        bad = ' class="short"' if any(BELOW in one for one in row) else ""
        cells = [f"<code>{say(one)}</code>" if "->" in one else say(one) for one in row]
        first = f'<th scope="row"{kinds[0]}>{cells[0]}</th>'
        rest = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], cells[1:]))
        parts.append(f"<tr{bad}>{first}{rest}</tr>")
    return "".join(parts) + "</tbody></table></div>"
