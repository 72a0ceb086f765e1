"""Make the README's table of speeds, and its chart, from the JSON files in results/.

    python benchmarks/figures.py

A row that no file holds is "not measured". tests/test_figures.py holds README and chart equal to
what this script makes.
"""

import json
import statistics
from html import escape
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
CHART = Path(__file__).parent / "figures.svg"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
NO = "not measured"

# what is measured, the row in inference.json, contestant, its rival
AGAINST = [
    ("Writing, S (7M parameters), float32", "decode-S", "engine", None),
    ("Writing, S, the plain page", "decode-S", "plain", None),
    ("Writing, M (125M parameters), float32", "decode-M", "engine", None),
    ("Writing, M, bfloat16", "decode-M-bfloat16", "engine", None),
    ("Writing, M in 8 bits, beside float32", "decode-M-8-bit", "engine", None),
    ("Writing, M in 4 bits, beside float32", "decode-M-4-bit", "engine", None),
    ("Writing, X (8 experts), float32", "decode-X", "engine", None),
    ("Reading 4,096 tokens, S, beside the default", "prefill-S-4096", "engine",
     "transformers, whole"),
    ("Reading 4,096 tokens, S, beside chunks of 512", "prefill-S-4096", "engine",
     "transformers, chunks of 512"),
    ("Reading 16,384 tokens, S, beside the default", "prefill-S-16384", "engine",
     "transformers, whole"),
    ("Reading 16,384 tokens, S, beside chunks of 512", "prefill-S-16384", "engine",
     "transformers, chunks of 512"),
]
FIRST = {  # the rows that stand open; all others are folded
    "Writing, S (7M parameters), float32", "Writing, S, the plain page", "Writing, M (125M parameters), float32",
    "Writing, M, bfloat16", "Writing, M in 4 bits, beside float32", "Writing, X (8 experts), float32",
    "Reading 16,384 tokens, S, beside the default", "Reading 16,384 tokens, S, beside chunks of 512",
    "Writing, M, float32, below the window", "Training, S, 8 x 256, float32",
    "Tiny Shakespeare, beside nanoGPT's recipe for a CPU", "Everything on a GPU",
}
TRAINING = [("Training, S, 8 x 256, float32", "S-float32", "transformers"),
            ("Training, S, 8 x 256, bfloat16 products", "S-bfloat16", "transformers"),
            ("Training, S, bfloat16 products, beside float32", "S-bfloat16",
             "float32 in transformers"),
            ("Training, X, 4 x 256, float32, not compiled", "X-float32", "transformers")]


def load(name: str) -> dict:
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def lines() -> list[tuple[str, str, str, str, str]]:
    """What; ours; transformers' best, or the rival named; how many times faster; command."""
    rows = load("inference.json").get("rows", {})
    made = []
    for what, key, way, rival in AGAINST:
        row = rows.get(key)
        command = f"inference.py --only {key}"
        if row is None:
            made.append((what, NO, NO, "", command))
            continue
        median, better = row["median"], max if row["unit"].endswith("/s") else min
        theirs = median[rival] if rival else better(
            value for name, value in median.items() if name.startswith("transformers"))
        times = median[way] / theirs if better is max else theirs / median[way]
        unit = row["unit"]
        made.append((what, f"{number(median[way])} {unit}", f"{number(theirs)} {unit}",
                     f"{times:.2f}", command))
    made += position_lines(rows) + mixture_lines(rows) + other_lines(rows) + guest_lines()
    training = load("training.json").get("beside_transformers", {})
    for what, key, rival in TRAINING:
        row, command = training.get(key), f"training.py --beside {key}"
        if row is None or not any(name.startswith(rival) for name in row["median"]):
            made.append((what, NO, NO, "", command))
            continue
        best = {who: max(v for name, v in row["median"].items() if name.startswith(who))
                for who in ("minimistral", rival)}
        made.append((what, *(f"{number(v)} tokens/s" for v in best.values()),
                     f"{best['minimistral'] / best[rival]:.2f}", command))
    return [*made, shakespeare_line(), ("Everything on a GPU", NO, NO, "", "gpu.py")]


def shakespeare_line() -> tuple:
    """Our last recipe beside nanoGPT's, after as many characters."""
    what, command = "Tiny Shakespeare, beside nanoGPT's recipe for a CPU", "shakespeare.py"
    record = load("shakespeare.json")
    if not record:
        return what, NO, NO, "", command
    told = []
    for name in (record["names"][-1], "nanoGPT"):
        runs = [run for run in record["runs"] if run["name"] == name]
        loss, seconds = (statistics.median(run[key] for run in runs)
                         for key in ("nats_per_character", "wall_seconds"))
        told.append(f"{loss:.3f} nats per character in {seconds:.0f} s")
    return what, told[0], f"nanoGPT: {told[1]}", "", command


def guest_lines() -> list[tuple]:
    """The engine beside litgpt and llama.cpp: its rate, theirs with how many times faster."""
    made, rows = [], load("others.json").get("rows", {})
    for name in ("S", "M"):
        what, command = f"Writing, {name}, float32, below the window", f"others.py --only {name}"
        row = rows.get(name)
        theirs = NO if row is None else ", ".join(
            f"{guest}: {number(row['median'][guest])} tokens/s ({times:.2f} times)"
            for guest, times in row["times_faster"].items())
        ours = NO if row is None else f"{number(row['median']['engine'])} tokens/s"
        made.append((what, ours, theirs, "", command))
    return made


def position_lines(rows: dict) -> list[tuple]:
    command, row = "inference.py --only position-S", rows.get("position-S")
    if row is None:
        return [("Writing at position 32,768, S", NO, NO, "", command)]
    made = []
    for place, about in row["positions"].items():
        ours, theirs = about["median"]["engine"], about["median"]["transformers"]
        made.append((f"Writing at position {int(place):,}, S", f"{number(ours)} ms/token",
                     f"{number(theirs)} ms/token", f"{theirs / ours:.2f}", command))
    return made


def mixture_lines(rows: dict) -> list[tuple]:
    command, row = "inference.py --only moe-X", rows.get("moe-X")
    if row is None:
        return [("A mixture layer of X", NO, NO, "", command)]
    made = []
    for count, about in row["tokens"].items():
        ours, theirs = about["median"]["engine"], about["median"]["transformers"]
        made.append((f"A mixture layer of X, {int(count):,} token{'s' * (count != '1')}",
                     f"{number(ours)} ms", f"{number(theirs)} ms", f"{theirs / ours:.2f}",
                     command))
    return made


def other_lines(rows: dict) -> list[tuple]:
    """Figures without a peer: eight texts, speculation, memory."""
    made = []
    row = rows.get("batch-S")
    ours = NO if row is None else (f"{number(row['median']['eight texts'])} tokens/s, "
                                   f"{row['eight_over_one']:.2f} times one text's")
    made.append(("Eight texts at once, S", ours, "", "", "inference.py --only batch-S"))
    row = rows.get("speculation")
    ours = NO if row is None else ", ".join(
        f"{way}: {number(value)} tokens/s" for way, value in row["median"].items()
        ) + elsewhere(row, rows)
    made.append(("Speculative decoding of tales", ours, "", "",
                 "inference.py --only speculation"))
    row = rows.get("speculation-grown")
    ours = NO if row is None else (f"{number(row['median']['tales-dense drafts'])} tokens/s, "
                                   f"{row['draft_over_engine']:.2f} times the engine's without")
    made.append(("A draft for a model 104 times its size, the same text", ours, "", "",
                 "inference.py --only speculation-grown"))
    row = rows.get("position-S")
    ours = NO if row is None else f"{row['cache_bytes']['engine'] / 2**20:.2f} MiB"
    made.append(("Keys and values of S, at any position", ours, "", "",
                 "inference.py --only position-S"))
    row = rows.get("prefill-memory-S")
    ours = NO if row is None else ", ".join(
        f"{int(length):,}: {about['extra_peak_bytes'] / 2**20:.0f} MiB"
        for length, about in row["prompts"].items())
    made.append(("Extra memory while reading, S", ours, "", "",
                 "inference.py --only prefill-memory-S"))
    memory = load("quantization.json").get("memory")
    ours = NO if memory is None else (
        f"{memory['peak_bytes'] / 1e6:.0f} MB at most, {memory['result_bytes'] / 1e6:.0f} MB "
        f"after, largest float32 tensor {memory['largest_float32_tensor_bytes'] / 1e6:.0f} MB")
    made.append(("Loading M in 8 bits", ours, "", "", "quantization.py"))
    return made


def elsewhere(row: dict, rows: dict) -> str:
    """The machine of a row, where it is not the one named below the table."""
    machine = row["provenance"]["name"]
    usual = rows.get("decode-S", row)["provenance"]["name"]
    return "" if machine == usual else f" (on {machine})"


def table() -> str:
    """The rows of FIRST, then all others, folded."""
    rows = load("inference.json").get("rows", {})
    about = rows.get("decode-S", {}).get("provenance", {})
    head = ["| What, and `python benchmarks/...` | minimistral | transformers | times |",
            "|---|---|---|---|"]
    where = (f"Measured on {about['name']}, torch {about['torch']}, transformers "
             f"{about['transformers']}, {about['date'][:10]}." if about else NO)
    body = {what: f"| {what}<br>`{command}` | {ours} | {theirs} | {times} |"
            for what, ours, theirs, times, command in lines()}
    first = [row for what, row in body.items() if what in FIRST]
    others = [row for what, row in body.items() if what not in FIRST]
    return "\n".join([*head, *first, "", f"<details>\n<summary>{len(others)} more</summary>\n", *head, *others,
                      "\n</details>", "", where])


def bars() -> list[tuple[str, float]]:
    return [(what, float(times)) for what, _, _, times, _ in lines() if times]


def alt_text() -> str:
    """The finding of the chart in a sentence."""
    found = bars()
    if not found:
        return "Nothing was measured yet."
    most, least = max(found, key=lambda b: b[1]), min(found, key=lambda b: b[1])
    ahead = sum(times > 1 for _, times in found)
    return (f"Times faster than transformers: in {ahead} of {len(found)} measurements "
            f"minimistral is faster, most in '{most[0]}' ({most[1]:.2f}), least in "
            f"'{least[0]}' ({least[1]:.2f}).")


def chart() -> str:
    """Bars for the times, with a line at 1, as SVG. Beyond 6 a bar is cut."""
    found, left, unit, step = bars(), 330, 75, 24
    height = step * len(found) + 40
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 6 * unit + 110}" '
             f'height="{height}" font-family="sans-serif" font-size="13" role="img">',
             f"<title>{escape(alt_text())}</title>",
             '<rect width="100%" height="100%" fill="white"/>']
    for i, (what, times) in enumerate(found):
        y, width = 30 + i * step, min(times, 6) * unit
        more = " (bar cut)" if times > 6 else ""
        parts += [f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(what)}</text>',
                  f'<rect x="{left}" y="{y}" width="{width:.0f}" height="17" fill="#3b6ea5"/>',
                  f'<text x="{left + max(width, unit) + 5:.0f}" y="{y + 13}">{times:.2f}{more}</text>']
    parts += [f'<line x1="{left + unit}" x2="{left + unit}" y1="22" y2="{height - 8}" '
              f'stroke="black" stroke-dasharray="4 3"/>',
              f'<text x="{left + unit}" y="16" text-anchor="middle">as fast as transformers'
              f"</text>", "</svg>"]
    return "\n".join(parts) + "\n"


def section() -> str:
    return f"{BEGIN}\n![{alt_text()}](benchmarks/{CHART.name})\n\n{table()}\n{END}"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + section() + after, encoding="utf-8", newline="\n")
    CHART.write_text(chart(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
