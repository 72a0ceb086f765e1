"""Chapter 0: the machine's report, the shipped models, its two pictures and the map of the course."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import minimistral as mm
from minimistral import doctor
from minimistral.shipped import SHIPPED
from minimistral.tales import parse_tale
from minimistral.tales_text import render

from ..figures import BLACK, BLUE, ORANGE, new_figure
from ..panel import Panel
from ..syllabus import CHAPTERS, Chapter
from .ch02_attention import attention_maps

# ---------------------------------------------------------------- the machine


def machine() -> Panel:
    """What `minimistral doctor` says about the things that the course needs, as a table."""
    looks = [look for look in doctor.CHECKS if look is not doctor.options]
    return _report([finding for look in looks for finding in look()])


def _report(findings: Sequence[doctor.Finding]) -> Panel:
    missing = [f.name for f in findings if f.status == doctor.MISSING]
    heading = "This machine is ready"
    if missing:
        heading = f"Not ready: {', '.join(missing)}. The repair stands in the table"
    rows = [(f.name, f.status, _details(f)) for f in findings]
    return Panel(heading, tone="bad" if missing else "good",
                 table=(("The course needs", "Status", "Found here"), rows))


def _details(finding: doctor.Finding) -> str:
    """Details without the folders of this machine, unless something has to be repaired."""
    if finding.repair:
        return f"{finding.detail}. {finding.repair}."
    return re.sub(r"(\b(is|at) )?\S*[/\\]\S*\s?", "", finding.detail).strip()


# ---------------------------------------------------------------- the shipped models


def shipped() -> dict[str, mm.Transformer]:
    """The models of the package that tell tales, by name; one line for each that is not there."""
    found = {}
    for name in ("tales-dense", "tales-moe"):
        if (SHIPPED / name / "params.json").exists():
            found[name] = mm.load_model(name)
        else:
            print(f"{name} is not in this copy of the package; we go on without it.\n")
    return found


def recorded(name: str) -> str:
    """Loss and floor of a shipped model, measured when it was made, as a sentence."""
    record = json.loads((SHIPPED / name / "record.json").read_text(encoding="utf-8"))
    facts = record["measured_on_stored_weights"]
    loss, floor = facts["val_nats_per_byte"], facts["floor_nats_per_byte"]
    return (f"loss {loss:.4f} nats per byte, floor {floor:.4f}: "
            f"{100 * (loss / floor - 1):.1f}% above the floor")


# ---------------------------------------------------------------- text as a picture

WIDTH = 82  # characters in a line, as many as fit into the figure at 12 points
FONT = "DejaVu Sans Mono"  # comes with Matplotlib
FEWEST_LINES = 4  # so that a page does not jump when a slider moves
GREY = "#666666"
FAINT, TALLEST = 0.03, 1.6  # weights below the first get no bar; the bar of weight 1, in lines


def text_of_each(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A letter of several tokens belongs to the last of them."""
    texts, done = [], 0
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        if n < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(text[done:])
        done = max(done, len(text))
    return texts


def set_in_lines(tokens: Sequence[str], width: int = WIDTH) -> list[tuple[int, int, str]]:
    """Where each token stands: (line, column, text). Lines break between words."""
    placed, line, column = [], 0, 0
    for i, token in enumerate(tokens):
        text = token
        if text.startswith(" "):
            rest = (j for j in range(i + 1, len(tokens)) if tokens[j][:1] in (" ", "\n"))
            word = tokens[i : next(rest, len(tokens))]
            if column and column + sum(map(len, word)) > width:
                line, column, text = line + 1, 0, text[1:]
        if column and column + len(text) > width:
            line, column = line + 1, 0
        shown = "".join(c for c in text if c.isprintable() and ord(c) in _letters())
        placed.append((line, column, shown))
        column += len(shown)
        if "\n" in text:
            line, column = line + 1, 0
    return placed


@cache
def _letters() -> set[int]:
    """The characters that the font of the pictures has."""
    from matplotlib import font_manager

    return set(font_manager.get_font(font_manager.findfont(FONT)).get_charmap())


def text_picture(tokens: Sequence[str], title: str, *, underlined: Collection[int] = (),
                 grey_from: int | None = None, bars: Tensor | None = None,
                 notes: Sequence[str] = ()):
    """A text with some tokens underlined, a part in grey italics, or a bar over each token.

    bars: (T,), from 0 to 1, the weights that the last token gives; notes: lines below the text
    """
    placed = set_in_lines(tokens)
    heights = _line_heights(placed, bars)
    base = [heights[0] - sum(heights[: line + 1]) for line in range(len(heights))]
    bottom = base[-1] - 0.6 - 1.1 * len(notes)
    figure, ax = new_figure(8.6, 0.5 + 0.27 * (heights[0] - bottom))
    for i, (line, column, text) in enumerate(placed):
        left, right, y = column + len(text) - len(text.lstrip()), column + len(text), base[line]
        broken = grey_from is not None and i >= grey_from
        asking = bars is not None and i == len(tokens) - 1
        colour = GREY if broken else ORANGE if asking else BLACK
        ax.text(column, y, text, family=FONT, fontsize=12, va="baseline", color=colour,
                style="italic" if broken else "normal", weight="bold" if asking else "normal",
                parse_math=False, in_layout=False)
        if left < right and (i in underlined or asking):
            ax.plot([left, right], [y - 0.22] * 2, linestyle="-", linewidth=2,
                    color=ORANGE if asking else BLUE)
        if left < right and bars is not None and bars[i] >= FAINT:
            height = TALLEST * bars[i].item()
            ax.bar((left + right) / 2, height, 0.9 * (right - left), bottom=y + 0.75, color=BLUE)
            ax.text((left + right) / 2, y + 0.85 + height, f"{bars[i]:.2f}".lstrip("0"),
                    ha="center", va="bottom", fontsize=11, color=BLUE, in_layout=False)
    for n, note in enumerate(reversed(notes)):
        ax.text(0, bottom + 0.35 + 1.1 * n, note, fontsize=11, color=GREY, in_layout=False)
    ax.set(xlim=(-0.5, WIDTH + 2.3), ylim=(bottom, heights[0]), title=title)
    ax.axis("off")
    return figure


def _line_heights(placed: Sequence[tuple[int, int, str]], bars: Tensor | None) -> list[float]:
    """Each line is 1 high, and higher where it carries bars and their numbers."""
    heights = [1.0] * (placed[-1][0] + 1)
    if bars is None:
        return heights + [1.0] * (FEWEST_LINES - len(heights))
    for (line, _, _), weight in zip(placed, bars.tolist()):
        if weight >= FAINT:
            heights[line] = max(heights[line], 2.0 + TALLEST * weight)
    return heights


# ---------------------------------------------------------------- temperature

LONGEST = 200  # tokens


@dataclass(frozen=True)
class Told:
    """What a model wrote, and what is to be said about it."""

    tokens: list[str]  # the title first
    drawn: list[int]  # places of those that were not the likeliest
    broken_at: int | None  # the token at which it stops being a tale
    lie: str  # a sentence that cannot be true, if there is one
    ended: bool
    share: Tensor  # (T,): the probability that the model gave to each token, 1 for the title

    def verdict(self) -> str:
        if not self.ended and (self.broken_at is None or self.broken_at > 0.8 * LONGEST):
            return f"no end within {LONGEST} tokens"
        if self.broken_at == 0:
            return "the grammar knows no such title"
        if self.broken_at is not None:
            return f"after {self.broken_at} tokens it is no tale any more"
        if self.lie:
            return "a tale, but it does not add up"
        if not self.drawn:
            return "a tale, and every token is the likeliest one"
        return f"a tale; {len(self.drawn)} of {len(self.tokens)} tokens were not the likeliest"


@torch.no_grad()
def tell_tale(model: nn.Module, tokenizer, title: str, temperature: float, seed: int) -> Told:
    """Let a model continue a title, and look at every choice that it made."""
    prompt = tokenizer.encode(f"{title}\n" if title else "", bos=True)
    new = mm.generate(model, prompt, LONGEST, temperature=temperature, seed=seed,
                      stop_ids=(tokenizer.eos_id,))
    ids = prompt + new
    chances = model(torch.tensor([ids]))[0].softmax(-1)                  # (T, V)
    drawn = [i for i in range(len(prompt), len(ids)) if chances[i - 1].argmax() != ids[i]]
    share = torch.ones(len(ids))
    for i in range(len(prompt), len(ids)):
        share[i] = chances[i - 1, ids[i]]
    tokens = text_of_each(tokenizer, ids)
    parse = parse_tale("".join(tokens))
    broken_at = None if parse.ok else token_at(tokens, parse.error_at)
    lies = [render(parse.language, parse.events[c.sentence]) for c in parse.contradictions]
    return Told(tokens[1:], [i - 1 for i in drawn], None if broken_at is None else
                max(0, broken_at - 1), lies[0] if lies else "", len(new) < LONGEST, share[1:])


def token_at(tokens: Sequence[str], character: int) -> int:
    """The token that holds a character of the text; the last one beyond its end."""
    end = 0
    for i, token in enumerate(tokens):
        end += len(token)
        if character < end:
            return i
    return len(tokens) - 1


def tale_explorer(models: dict[str, nn.Module], tokenizer) -> Callable:
    """The explorer's function: draw(temperature, model, title, tale)."""

    def draw(temperature: float, model: str, title: str, tale: int):
        told = tell_tale(models[model], tokenizer, title.strip(), temperature, seed=tale)
        verdict = told.verdict()
        notes = {"underlined: not the likeliest token": told.drawn,
                 "grey italics: no tale any more": told.broken_at is not None,
                 f"cannot be true: “{told.lie}”": told.lie}
        figure = text_picture(
            told.tokens, f"Temperature {temperature:.1f}: {verdict}", underlined=told.drawn,
            grey_from=told.broken_at, notes=[note for note, holds in notes.items() if holds])
        text = " ".join("".join(told.tokens).split())
        sentence = f"{model} at temperature {temperature:.1f}: {verdict}. It wrote: {text}"
        table = {"token": [t.replace("\n", "(line break)") for t in told.tokens],
                 "probability": [f"{p:.3f}" for p in told.share.tolist()]}
        return figure, sentence, table

    return draw


# ---------------------------------------------------------------- one look inside


def places_of(tokens: Sequence[str], word: str) -> list[int]:
    """The tokens that spell the occurrences of a word."""
    text = "".join(tokens)
    ends = torch.tensor([len(token) for token in tokens]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    found = [m.span() for m in re.finditer(rf"\b{re.escape(word)}\b", text)]
    return [i for i, (start, end) in enumerate(zip(starts, ends))
            if any(start < b and end > a for a, b in found) and tokens[i].strip()]


@dataclass(frozen=True)
class Look:
    """Where the last token of a text looks, in one head."""

    layer: int
    head: int
    tokens: list[str]
    weights: Tensor  # (T,)
    on_word: float


def best_look(model: nn.Module, tokenizer, text: str, word: str) -> Look:
    """The head in which the last token gives a word most of its weight."""
    ids = tokenizer.encode(text, bos=True)
    tokens = text_of_each(tokenizer, ids)                                # "" for <s>
    rows = attention_maps(model, ids)[:, :, -1]                          # (L, H, T)
    on_word = rows[..., places_of(tokens, word)].sum(-1)                 # (L, H)
    layer, head = divmod(int(on_word.argmax()), rows.shape[1])
    return Look(layer, head, tokens[1:], rows[layer, head, 1:], on_word.max().item())


def look_picture(look: Look, title: str):
    """The text of a look, with a bar over each token, as high as its weight."""
    return text_picture(look.tokens, title, bars=look.weights)


def look_table(look: Look) -> dict[str, list]:
    """The tokens of a look that got most of its weight."""
    best = look.weights.argsort(descending=True, stable=True)[:8].tolist()
    return {"token": [f"“{look.tokens[i]}”" for i in best],
            "weight": [f"{look.weights[i]:.3f}" for i in best]}


# ---------------------------------------------------------------- the map of the course

PARTS = (
    (0, "A plain model that writes"),
    (7, "What makes it a Mistral"),
    (10, "The real thing"),
)


def course_map(chapters: Sequence[Chapter] = CHAPTERS) -> Panel:
    """All chapters with their questions, and the next one to open."""
    rows = [(str(c.number), c.title, c.question, _part(c)) for c in chapters]
    following = next((c for c in chapters if c.number), None)
    link = text = ""
    if following:
        name = html.escape(f"Chapter {following.number}: {following.title}")
        link = f'<div>Open next: <a href="{following.name}.ipynb">{name}</a></div>'
        text = f"Open next: {following.name}.ipynb"
    header = ("Number", "Chapter", "Its question", "Here begins")
    return Panel("The map of the course", table=(header, rows), extra_html=link, extra_text=text)


def _part(chapter: Chapter) -> str:
    """The name of the part that begins with this chapter."""
    return dict(PARTS).get(chapter.number, "")
