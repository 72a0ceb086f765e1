"""Chapter 6: its pictures, its counters, its contexts and the logic of its explorer."""

from __future__ import annotations

import contextlib
import html
import io
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minimistral as mm
from minimistral.sampling import next_distribution
from minimistral.tales import parse_tale

from ..figures import BLACK, BLUE, GREEN, GREY, ORANGE, lines_chart, new_figure
from .ch02_attention import shown


# ---------------------------------------------------------------- places in a tale

TALE = (
    "The golden ring\nOne morning Anna found a golden ring in the mill. Leo was at the lake. "
    "Anna went to the lake and saw Leo there. Anna gave the ring to Leo. The sun was shining. "
    "Now Leo has the"
)
CONTEXTS = {  # where a tale stands before its next token
    "a thing we know": TALE,
    "one of five places": TALE[: TALE.index(" mill")],
    "one of many names": TALE[: TALE.index(" Anna")],
}


@torch.no_grad()
def next_logits(model: nn.Module, tokenizer, text: str) -> Tensor:
    """The model's scores for the token after a text that begins a document. -> (V,)"""
    return model(torch.tensor([tokenizer.encode(text, bos=True)]))[0, -1]


# ---------------------------------------------------------------- pictures


def line_picture(words: Sequence[str], chances: Tensor, uniform: float):
    """The line from 0 to 1, cut into one piece for each word, and where a number falls."""
    figure, ax = new_figure(7.4, 2.0)
    left = 0.0
    for word, chance, colour in zip(words, chances.tolist(), (BLUE, ORANGE, GREEN, GREY)):
        ax.barh(0, chance, left=left, color=colour, edgecolor="white", height=0.6)
        ax.text(left + chance / 2, 0, f"{word}\n{chance:g}", ha="center", va="center",
                color="white", fontsize=11, weight="bold")
        left += chance
    ax.annotate(f"{uniform:g}", (uniform, 0.3), (uniform, 0.75), ha="center",
                arrowprops={"arrowstyle": "-|>", "color": BLACK})
    ax.set(xlim=(0, 1), ylim=(-0.4, 1.0), yticks=[],
           title="A long piece of the line is hit more often", xlabel="running sum")
    ax.spines["left"].set_visible(False)
    return figure


def temperatures_picture(logits: Tensor, names: Sequence[str], temperatures: Sequence[float]):
    """The likeliest tokens at several temperatures, as lines over the same tokens.

    logits: (V,); names: the texts of the likeliest tokens, in order
    """
    order = logits.argsort(descending=True)[: len(names)]
    series = {f"temperature {t:g}": (logits / t).softmax(-1)[order].tolist() for t in temperatures}
    figure, ax = new_figure(7.4, 3.6)
    lines_chart(ax, range(len(names)), series, ylabel="probability",
                title="A low temperature sharpens, a high one flattens")
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
    return figure, {"token": list(names), **series}


def growth_picture(lengths: Sequence[int], again: Sequence[float], kept: Sequence[float]):
    """Milliseconds for one more token against the length of the text, both ways."""
    figure, ax = new_figure(7.0, 3.4)
    series = {"reads everything again": again, "with a cache": kept}
    lines_chart(ax, lengths, series, title="Without a cache each token costs more than the last",
                xlabel="tokens of text so far", ylabel="milliseconds for one token")
    ax.set(ylim=(0, None))
    return figure


# ---------------------------------------------------------------- the explorer


def cuts_picture(logits: Tensor, tokenizer, drawn: Tensor, title: str, bars: int = 14):
    """The model's own probabilities as outlines, those that are drawn from as filled bars.

    logits, drawn: (V,)
    """
    plain = logits.softmax(-1)
    order = plain.argsort(descending=True, stable=True)[:bars]
    names = [tokenizer.decode([i]).strip() or "⏎" for i in order.tolist()] + ["all others"]
    before = [*plain[order].tolist(), 1 - plain[order].sum().item()]
    after = [*drawn[order].tolist(), max(0.0, 1 - drawn[order].sum().item())]
    figure, ax = new_figure(8.2, 3.8)
    places = range(len(names))
    ax.bar(places, after, color=BLUE, width=0.8, label="drawn from")
    ax.bar(places, before, facecolor="none", edgecolor=ORANGE, linewidth=2, linestyle="--",
           width=0.8, label="the model's own")
    top = max(0.5, 1.1 * max(before + after))
    for place, (own, value) in enumerate(zip(before, after)):
        if value == 0:
            ax.text(place, own + 0.02 * top, "cut", ha="center", va="bottom", rotation=90,
                    fontsize=11)
    ax.set_xticks(places, names, rotation=40, ha="right")
    ax.set(title=title, ylabel="probability", ylim=(0, top))
    ax.legend(frameon=False)
    data = {"token": names, "the model's own": [round(p, 4) for p in before],
            "drawn from": [round(p, 4) for p in after]}
    return figure, data


def cuts_explorer(model: nn.Module, tokenizer) -> Callable:
    """The explorer's function: draw(context, temperature, top_k, top_p).

    ``top_k`` and ``top_p`` are numbers or the word "off".
    """
    scores = {name: next_logits(model, tokenizer, text) for name, text in CONTEXTS.items()}

    def draw(context: str, temperature: float, top_k, top_p):
        drawn = next_distribution(scores[context][None], temperature,
                                  None if top_k == "off" else int(top_k),
                                  None if top_p == "off" else float(top_p))[0]
        left, best = int((drawn > 0).sum()), drawn.argmax()
        title = f"{left} of {len(drawn)} tokens {'remains' if left == 1 else 'remain'}"
        sentence = (
            f"Before {context}, at temperature {temperature:.1f}, top-k {top_k}, top-p {top_p}: "
            f"{title}; the likeliest, {shown(tokenizer.decode([int(best)]))}, is drawn with "
            f"probability {drawn[best]:.2f}."
        )
        figure, data = cuts_picture(scores[context], tokenizer, drawn, title)
        return figure, sentence, data

    return draw


# ---------------------------------------------------------------- judging what is written


def judged(texts: Sequence[str]) -> tuple[float, int]:
    """(share of the texts that the tales' grammar accepts, how many different ones)."""
    accepted = [parse_tale(text).error_at is None for text in texts]
    return sum(accepted) / len(texts), len(set(texts))


def in_groups(texts: Sequence[str], size: int = 8) -> list[int]:
    """How many texts of each group of ``size`` the grammar accepts."""
    accepted = [parse_tale(text).error_at is None for text in texts]
    return [sum(accepted[i : i + size]) for i in range(0, len(texts) - size + 1, size)]


@torch.no_grad()
def tail_per_token(model: nn.Module, tokenizer, texts: Sequence[str], temperature: float,
                   rare: float = 1e-3) -> tuple[float, float]:
    """How much probability falls on tokens that the model itself holds for rarer than
    ``rare`` at temperature 1: (mean for one token, chance that no token of a text is one).
    """
    masses = []
    for text in texts:
        ids = tokenizer.encode(text, bos=True, eos=True)
        logits = model(torch.tensor([ids[:-1]]))[0]                      # (T, V)
        unlikely = logits.softmax(-1) < rare
        masses.append(((logits / temperature).softmax(-1) * unlikely).sum(-1))
    clean = [(1 - mass).log().sum().exp().item() for mass in masses]
    return torch.cat(masses).mean().item(), sum(clean) / len(clean)


# ---------------------------------------------------------------- counting and timing


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[dict]:
    """Counts how many tokens go through the model within the block: ``count["tokens"]``."""
    count = {"tokens": 0}

    def note(module, inputs):
        count["tokens"] += math.prod(inputs[0].shape[:2])                # (B, T, dim)

    handle = model.layers[0].register_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()


@torch.no_grad()
def operations(model: nn.Module, ids: Tensor, cache=None) -> int:
    """Products and sums in the model's matrices during one call, counted as they run."""
    total, linear = 0, F.linear

    def counted(x, weight, bias=None):
        nonlocal total
        total += 2 * x.numel() * len(weight)                             # (..., n) and (m, n)
        return linear(x, weight, bias)

    F.linear = counted
    try:
        model(ids, cache)
    finally:
        F.linear = linear
    return total


@torch.no_grad()
def time_of_a_token(model: nn.Module, length: int, cached: bool, repeats: int = 7) -> float:
    """Seconds for the token after ``length`` others: the best of some repeats."""
    chance = torch.Generator().manual_seed(6)
    ids = torch.randint(5, model.config.vocab_size, (1, length), generator=chance)
    times = []
    cache = mm.KVCache(model.config, max_length=length + repeats + 1) if cached else None
    if cached:
        model(ids[:, :-1], cache)
    for _ in range(repeats + 1):                                         # the first warms up
        began = time.perf_counter()
        model(ids[:, -1:] if cached else ids, cache)
        times.append(time.perf_counter() - began)
    return min(times[1:])


# ---------------------------------------------------------------- the ladder


def shipped() -> nn.Module:
    """The row of this chapter: the shipped model as it is."""
    return mm.load_model("tales-dense")


# ---------------------------------------------------------------- your own Mistral


def command(line: str) -> str:
    """Run a line of the command line here and now; returns what it prints.

    ValueError with its one line of error if it ends with anything but 0.
    """
    from minimistral import cli

    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = cli.main(shlex.split(line)[1:])
    if status:
        raise ValueError(complained.getvalue().strip().splitlines()[-1])
    return said.getvalue()


class Framed:
    """A whole HTML page shown inside a notebook's page."""

    def __init__(self, page: str, height: int = 970):
        self.page, self.height = page, height

    def __repr__(self) -> str:
        return f"an HTML page of {len(self.page):,} characters"

    def _repr_html_(self) -> str:
        return (f'<iframe title="The postcard of the model" srcdoc="{html.escape(self.page)}" '
                f'style="width:100%;height:{self.height}px;border:1px solid {GREY}"></iframe>')
