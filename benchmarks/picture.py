"""Draw the README's picture of the course from the recorded ladder: what six chapters' models make of
the same first line, and how far each is above the lowest loss that any model can reach.

    python benchmarks/picture.py

tests/test_figures.py holds the picture equal to what this script draws.
"""

import json
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
LADDER = ROOT / "minimistral" / "assets" / "ladder.json"
PICTURE = Path(__file__).parent / "course.svg"
README = ROOT / "README.md"
CHAPTERS = (1, 2, 3, 4, 5, 6)               # the plain model; later rungs change one thing of it
WIDTH, TOP, STEP, LEFT, FULL = 960, 74, 74, 24, 250
LINE, LINES = 76, 2                         # letters in a line of a sample, and its lines


def rungs() -> list[dict]:
    rows = json.loads(LADDER.read_text(encoding="utf-8"))["rows"]
    return [next(row for row in rows if row["chapter"] == number) for number in CHAPTERS]


def told(sample: str) -> list[str]:
    """What follows the first line, in a few lines; bytes that are no text become one mark."""
    _, _, rest = sample.partition("\n")
    rest = " ".join("".join(c if c.isprintable() else " " for c in rest.replace("\ufffd", "\u25a1")).split())
    return textwrap.wrap(rest, LINE, max_lines=LINES, placeholder=" \u2026")


def alt() -> str:
    rows = rungs()
    return (f"The same first line, continued by the models of chapters {CHAPTERS[0]} to {CHAPTERS[-1]}: the loss falls from "
            f"{rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f} nats per byte, the lowest possible is {rows[0]['floor']:.2f}, "
            f"and the text turns from scraps of words into a tale.")


def picture() -> str:
    rows = rungs()
    widest, floor = rows[0]["loss"], rows[0]["floor"]
    height = TOP + STEP * len(rows) + 34
    at_floor = LEFT + FULL * floor / widest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(alt())}" font-family="system-ui, sans-serif">',
        "<style>text{fill:#1f2328;font-size:14px}.q{font-size:13px;fill:#57606a}.h{font-size:17px;font-weight:600}"
        ".s{font-family:ui-monospace,monospace;font-size:13px}.b{fill:#0072B2}.f{stroke:#D55E00}"
        ".p{fill:#ffffff}@media(prefers-color-scheme:dark){text{fill:#e6edf3}.q{fill:#9aa4af}.b{fill:#4aa8e0}"
        ".f{stroke:#ff9a4d}.p{fill:#0d1117}}</style>",
        f'<rect class="p" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="h" x="{LEFT}" y="34">\u201cThe old lantern\u201d, continued by six chapters</text>',
        f'<text class="q" x="{LEFT}" y="56">loss in nats per byte; the dashed mark is the lowest that any model '
        f"can reach: {floor:.3f}</text>",
    ]
    for n, row in enumerate(rows):
        y = TOP + STEP * n
        parts.append(f'<text x="{LEFT}" y="{y + 14}">{row["chapter"]} \u00b7 {escape(row["name"])}</text>')
        parts.append(f'<rect class="b" x="{LEFT}" y="{y + 24}" width="{FULL * row["loss"] / widest:.1f}" height="16" rx="2"/>')
        parts.append(f'<text class="q" x="{LEFT + FULL * row["loss"] / widest + 8:.1f}" y="{y + 37}">{row["loss"]:.3f}</text>')
        for k, line in enumerate(told(row["sample"])):
            parts.append(f'<text class="s" x="{LEFT + FULL + 74}" y="{y + 14 + 20 * k}">{escape(line)}</text>')
        parts.append(f'<line class="f" x1="{at_floor:.1f}" x2="{at_floor:.1f}" y1="{y + 20}" y2="{y + 44}" '
                     'stroke-width="2" stroke-dasharray="4 2"/>')
    parts.append(f'<text class="q" x="{LEFT}" y="{height - 22}">Chapters 7 to 9 then change one thing each; 10 loads the '
                 "real checkpoints; 11 to 14 make them quick, small and useful.</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8", newline="\n")
    print(f"wrote {PICTURE}; its alt text in the README: {alt()}")
