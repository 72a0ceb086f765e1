"""Small panels: plain text in a terminal, accessible HTML in a notebook, the same words in both.

Text keeps the page's own colour and the background stays the page's, so a panel is readable in
light and dark themes; the coloured edge only repeats what the words say.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

EDGES = {"good": "#009E73", "bad": "#D55E00", "wait": "#0072B2", "plain": "#767676"}
BOX = "border-left:6px solid {edge};padding:4px 12px;margin:4px 0;line-height:1.45"
FIXED = "font-family:ui-monospace,Consolas,monospace"
CELL = "border:1px solid #767676;padding:3px 9px;text-align:{align}"


@dataclass
class Panel:
    """A heading, a few lines, perhaps a table, perhaps a picture."""

    heading: str
    lines: Sequence[str] = ()
    tone: str = "plain"
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None  # header, rows
    marked_row: int | None = None  # shown bold with an edge; the row's words must say why
    code: str = ""  # shown as it is
    fixed: bool = False  # the code in a fixed font, also in JupyterLab, which takes the page's own
    extra_html: str = field(default="", repr=False)  # trusted: a picture made by us
    extra_text: str = field(default="", repr=False)

    def __str__(self) -> str:
        parts = [self.heading, *self.lines]
        if self.code:
            parts.append(self.code)
        if self.table:
            parts.append(text_table(*self.table))
        if self.extra_text:
            parts.append(self.extra_text)
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<strong>{html.escape(self.heading)}</strong>"]
        parts += [f"<div>{html.escape(line)}</div>" for line in self.lines]
        if self.code:
            style = f' style="{FIXED}"' if self.fixed else ""
            parts.append(f"<pre{style}>{html.escape(self.code)}</pre>")
        if self.table:
            parts.append(html_table(*self.table, marked_row=self.marked_row))
        box = BOX.format(edge=EDGES[self.tone])
        body = "\n".join(parts) + self.extra_html
        return f'<div role="status" style="{box}">{body}</div>'


def wrapped(text: str) -> str:
    """A text whose long lines are broken between words; a page would break them anywhere.

    Bytes that control a terminal, as a poor model may write them, are shown as �.
    """
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text)
    return "\n".join(textwrap.fill(line, 84) for line in text.split("\n"))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = []
    for row in cells:
        fields = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right))
        lines.append("  ".join(fields).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    marked_row: int | None = None,
) -> str:
    """A real table: header cells with scope, numbers to the right, text escaped."""
    right = [all(is_number(row[i]) for row in rows) for i in range(len(header))]
    aligns = ["right" if r else "left" for r in right]
    parts = ['<table style="border-collapse:collapse;margin:4px 0">']
    if caption:
        parts.append(f"<caption>{html.escape(caption)}</caption>")
    cells = "".join(
        f'<th scope="col" style="{CELL.format(align=align)}">{html.escape(str(cell))}</th>'
        for cell, align in zip(header, aligns)
    )
    parts.append(f"<thead><tr>{cells}</tr></thead><tbody>")
    for n, row in enumerate(rows):
        marked = f"font-weight:bold;border-left:6px solid {EDGES['bad']};" if n == marked_row else ""
        cells = "".join(
            f'<td style="{CELL.format(align=align)}">{html.escape(str(cell))}</td>'
            for cell, align in zip(row, aligns)
        )
        parts.append(f'<tr style="{marked}">{cells}</tr>')
    parts.append("</tbody></table>")
    return "".join(parts)


def is_number(text) -> bool:
    """Does a cell hold a number (or a dash for none)?"""
    text = str(text).strip().rstrip("%")
    if text in ("", "-", "–"):
        return True
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
