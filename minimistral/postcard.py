"""`minimistral postcard`: a trained model on one HTML page that can be passed on.

The page is one file without scripts, fonts or pictures from elsewhere: the loss curve above what
is known about the text, the best of a few samples, and a card with the model's facts. It names
the text by its file name alone, never by its folder.
"""

import argparse
import html
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import minimistral as mm
from minimistral.files import write_whole

SAMPLES = 6  # texts written, of which one is shown
POINTS = 150  # of the curve, at most


@dataclass
class Card:
    """What a record says about a run; nats per token, steps counted from 1."""

    curve: list[tuple[float, float]]  # (step, loss), averaged
    evaluations: list[tuple[float, float]]  # (step, loss on held-out text)
    steps: int
    tokens: int  # read in training
    minutes: float
    known: dict[str, float] = field(default_factory=dict)  # what is known about the text
    data: str = ""
    training: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    where: str = ""
    date: str = ""


def run(arguments: argparse.Namespace) -> None:
    """Writes the page that the command line asks for and says where it is."""
    folder, out = Path(arguments.folder), Path(arguments.out)
    check_out(out, arguments.replace)
    card = read_card(folder)
    model, tokenizer = mm.load_model(folder, device="cpu"), mm.load_tokenizer(folder)
    sample = best_sample(model, tokenizer, arguments.prompt, arguments.seed)
    title = arguments.title or folder.resolve().name
    write_whole(out, page(title, card, model.config, sample, arguments.prompt))
    print(f"{out}: the postcard of {title}, {out.stat().st_size / 1000:.0f} kB. Open it in a browser.")


def check_out(out: Path, replace: bool) -> None:
    """Raises ValueError where the page must not or cannot be written, before any work is done."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, such as {out / 'card.html'}")
    if out.exists() and not replace:
        raise ValueError(f"--out {out} is there already: name another file, or add --replace")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")


# ---------------------------------------------------------------- reading the record


def read_card(folder: Path) -> Card:
    """The record of `minimistral train`, or of a recipe. ValueError that names what is wrong."""
    path = folder / "record.json"
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that minimistral train has filled")
    if not path.exists():
        stopped = (folder / "training").exists()
        said = f"the run in it is not finished; minimistral train --out {folder} --resume goes on"
        raise ValueError(f"{folder} holds no record.json: " + (
            said if stopped else "is it a folder that minimistral train has filled?"))
    try:
        record = json.loads(path.read_text("utf-8"))
        card = from_recipe(record) if "minutes_of_training" in record else from_train(record)
        if not card.curve:
            raise ValueError("it has no losses")
        numbers = [value for point in card.curve + card.evaluations for value in point]
        numbers += [card.minutes, card.tokens, *card.known.values()]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("it holds a number that is not finite")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be read as the record of a run: {what}") from None
    return card


def from_train(record: dict) -> Card:
    """A record of `minimistral train`; its `about` is missing in records of before the postcard."""
    losses, about = record["losses"], record.get("about", {})
    data = about.get("corpus", "")
    if data:
        data += (f": {about['train_bytes']:,} bytes, {about['train_tokens']:,} tokens to learn from; "
                 f"{about['val_bytes']:,} bytes held out")
    known = {"frequencies of tokens alone": about["frequencies"]} if "frequencies" in about else {}
    if record["floor"] is not None:
        known["floor: no model can do better"] = record["floor"]
    return Card(averaged(losses), [(s, v) for s, v in record["evaluations"]], len(losses),
                record["tokens"], record["seconds"] / 60, known, data, record["config"],
                about.get("versions", {}), about.get("device", ""), about.get("date", ""))


def from_recipe(record: dict) -> Card:
    """The record of a shipped model (recipes.py), whose losses are averaged already."""
    every, losses = record["losses"]["every"], record["losses"]["nats_per_token"]
    curve = [(every * (n + 0.5), loss) for n, loss in enumerate(losses)]
    known = {"floor: no model can do better": record["floor_nats_per_token"]}
    return Card(curve, [(s, v) for s, v in record["evaluations"]], record["steps"],
                record["tokens"], record["minutes_of_training"], known,
                f"tales: {record['tales']['n_tales']:,} to learn from", record["training"],
                record["versions"], record["host"]["cpu"], record["date"])


def averaged(losses: list[float], points: int = POINTS) -> list[tuple[float, float]]:
    """The curve in at most so many points, each the mean of its steps."""
    every = math.ceil(len(losses) / points) or 1
    return [(i + (len(part) + 1) / 2, sum(part) / len(part))
            for i in range(0, len(losses), every) for part in [losses[i : i + every]]]


# ---------------------------------------------------------------- the sample


@dataclass
class Sample:
    """A text and how surprised the model itself is by it, in nats per token."""

    text: str
    nats: float
    tokens: int


def best_sample(model, tokenizer, prompt: str = "", seed: int = 0, length: int = 120) -> Sample:
    """Of some texts the one that the model finds likeliest, token for token.

    A text that repeats itself is likely without being good, and a short one proves little: both
    stand back while there is another.
    """
    start = tokenizer.encode(prompt, bos=True)
    options = {"temperature": 0.8, "top_p": 0.95, "seed": seed, "stop_ids": [tokenizer.eos_id]}
    rows = mm.generate(model, [start] * SAMPLES, length, **options)
    found = [(row, nats_per_token(model, start, row)) for row in rows if row]
    if not found:
        return Sample("", 0.0, 0)
    good = [pair for pair in found if len(pair[0]) >= 20 and variety(pair[0]) > 0.7]
    row, nats = min(good or found, key=lambda pair: pair[1])
    return Sample(tokenizer.decode(row), nats, len(row))


@torch.no_grad()
def nats_per_token(model, start: list[int], new: list[int]) -> float:
    """Mean of -ln p over the new tokens, at temperature 1 and without cuts."""
    ids = torch.tensor([start + new])
    losses = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")
    return losses[-len(new):].mean().item()


def variety(ids: list[int], size: int = 4) -> float:
    """The share of different runs of four tokens: 1 where nothing is said twice."""
    runs = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


# ---------------------------------------------------------------- the page

STYLE = """
:root { --ink: #1a1a1a; --soft: #595959; --paper: #ffffff; --edge: #b9b9b9; --line: #0072B2;
        --held: #B84A00; --box: #f4f4f1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eeeeee; --soft: #b8b8b8; --paper: #16181c; --edge: #565b63; --line: #66b8ea;
          --held: #ff9d57; --box: #20242a; } }
body { font: 17px/1.5 Georgia, "Times New Roman", serif; color: var(--ink);
       background: var(--paper); margin: 0; }
main { max-width: 46rem; margin: 0 auto; padding: 2rem 1.2rem 3rem; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
ul.facts { list-style: none; display: flex; flex-wrap: wrap; gap: .6rem; padding: 0;
           margin: 1.1rem 0; }
ul.facts li { border: 1px solid var(--edge); border-radius: 6px; padding: .35rem .8rem; }
ul.facts b { display: block; font-size: 1.25rem; }
blockquote { background: var(--box); border-left: 5px solid var(--line); margin: .6rem 0;
             padding: .8rem 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
         border-bottom: 1px solid var(--edge); overflow-wrap: anywhere; }
th { font-weight: normal; color: var(--soft); width: 11rem; }
svg { width: 100%; height: auto; } svg text { font: 14px Georgia, serif; fill: var(--ink); }
"""


def page(title: str, card: Card, config, sample: Sample, prompt: str = "") -> str:
    """The whole page as text."""
    name = html.escape(title)
    count = mm.count_parameters(config)
    facts = {"parameters": f"{count.total:,}", "training": duration(card.minutes),
             "tokens read": f"{card.tokens:,}", "loss (nats per token)": f"{last_loss(card):.3f}"}
    boxes = "".join(f"<li><b>{value}</b> {what}</li>" for what, value in facts.items())
    rows = "".join(f"<tr><th scope=\"row\">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>"
                   for k, v in card_rows(card, config).items())
    asked = f"<p class=\"soft\">Continuing “{html.escape(prompt)}”</p>" if prompt else ""
    text = html.escape(sample.text.strip()) or "(It ends the text at once.)"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: a language model of my own</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{name}</h1>
<p class="soft">A language model of my own, of the Mistral family, built and trained with minimistral.</p>
<ul class="facts">{boxes}</ul>
<h2>How it learned</h2>
{curve_svg(card, config.vocab_size)}
<h2>What it writes</h2>
{asked}<blockquote>{text}</blockquote>
<p class="soft">Of {SAMPLES} texts the one that the model itself finds likeliest
({sample.nats:.2f} nats per token); temperature 0.8, top-p 0.95.</p>
<h2>Model card</h2>
<table>{rows}</table>
</main>
</body>
</html>
"""


def duration(minutes: float) -> str:
    """Minutes, or seconds where there are few."""
    if minutes < 1 / 60:
        return "under a second"
    return f"{60 * minutes:.0f} seconds" if minutes < 1.5 else f"{minutes:,.0f} minutes"


def last_loss(card: Card) -> float:
    """The last loss on held-out text, or in training where nothing was held out."""
    return (card.evaluations or card.curve)[-1][1]


def card_rows(card: Card, config) -> dict[str, str]:
    """The model card: what somebody else needs to know, or to do it again."""
    count, training = mm.count_parameters(config), card.training
    shape = (f"{config.n_layers} layer{'s' * (config.n_layers > 1)}, width {config.dim}, {config.n_heads} query heads, "
             f"{config.n_kv_heads} key/value heads of {config.head_dim}, feed-forward "
             f"{config.hidden_dim}, vocabulary {config.vocab_size:,}")
    if config.moe:
        shape += f", {config.moe.num_experts} experts, {config.moe.num_experts_per_tok} of them for a token"
    if config.sliding_window:
        shape += f", window {config.sliding_window}"
    active = f" ({count.active:,} active)" if count.active != count.total else ""
    wanted = ("batch_size", "seq_len", "lr", "optimizer", "seed", "dtype")
    recipe = ", ".join(f"{name.replace('_', ' ')} {training[name]}" for name in wanted if name in training)
    rows = {
        "Data": card.data or "not recorded",
        "Tokens read": f"{card.tokens:,} in {card.steps:,} steps",
        "Training": recipe or "not recorded",
        "Time": duration(card.minutes) + (f" on {card.where}" if card.where else ""),
        "Parameters": f"{count.total:,}{active}",
        "Shape": shape,
        "Loss": f"{last_loss(card):.4f} nats per token"
                + (" on held-out text" if card.evaluations else " in training"),
        **{what[:1].upper() + what[1:].partition(":")[0]: f"{value:.4f} nats per token"
           for what, value in card.known.items()},
        "Versions": ", ".join(f"{name} {version}" for name, version in card.versions.items()),
        "Date": card.date,
        "Use and limits": "Made for learning. It continues text in the manner of its data; nothing "
                          "it writes has been checked, and it knows nothing else.",
    }
    return {what: value for what, value in rows.items() if value}


def curve_svg(card: Card, vocab_size: int) -> str:
    """The loss curve above what is known, as inline SVG with its finding as a label."""
    width, height, left, right, top, bottom = 760, 380, 62, 16, 18, 52
    lines = {"knowing nothing": math.log(vocab_size), **card.known}
    values = [y for _, y in card.curve + card.evaluations] + list(lines.values())
    low, high = min([0.0, *values]), 1.05 * max(values)
    last = max(card.steps, *(s for s, _ in card.curve + card.evaluations))

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(nats: float) -> float:
        return top + (height - top - bottom) * (high - nats) / (high - low)

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
                     f'stroke="var(--edge)" stroke-width="0.5"/>'
                     f'<text x="{left - 8}" y="{y(tick) + 5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(0, last):
        parts.append(f'<text x="{x(tick):.1f}" y="{height - bottom + 20}" text-anchor="middle">{tick:,g}</text>')
    taken: list[float] = []
    for what, nats in sorted(lines.items(), key=lambda pair: -pair[1]):
        below = nats <= last_loss(card)  # the curve runs above this line
        at = y(nats) + (16 if below else -6)
        while any(abs(at - other) < 16 for other in taken):
            at += 17  # where the place is taken
        taken.append(at)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(nats):.1f}" y2="{y(nats):.1f}" '
                     f'stroke="var(--ink)" stroke-width="1.5" stroke-dasharray="7 5"/>'
                     f'<text x="{width - right}" y="{at:.1f}" text-anchor="end">{html.escape(what)} '
                     f'{nats:.2f}</text>')
    path = " ".join(f"{x(step):.1f},{y(nats):.1f}" for step, nats in card.curve)
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--line)" stroke-width="2.5"/>')
    for step, nats in card.evaluations:
        parts.append(f'<circle cx="{x(step):.1f}" cy="{y(nats):.1f}" r="5" fill="var(--held)"/>')
    held = "; circles: held-out text" if card.evaluations else ""
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">'
                 f'training step (line: training text{held})</text>')
    parts.append(f'<text transform="translate(16 {(top + height - bottom) / 2}) rotate(-90)" '
                 f'text-anchor="middle">loss (nats per token)</text>')
    first, end = card.curve[0][1], last_loss(card)
    said = "; ".join(f"{what} {nats:.2f}" for what, nats in lines.items())
    label = f"The loss falls from {first:.2f} to {end:.2f} nats per token in {card.steps:,} steps; {said}."
    if end >= first:
        label = label.replace("falls", "goes")
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
            f'<title>{html.escape(label)}</title>{"".join(parts)}</svg>')


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about so many."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * n for n in (1, 2, 5, 10) if size * n >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]
