"""Chapter 12: its pictures, its measurements and the logic of its explorer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

import minimistral as mm
from minimistral.quantize import dequantize, quantize

from ..figures import BLACK, BLUE, GREEN, GREY, HATCHES, ORANGE, PINK, new_figure
from ..ladder import ladder
from ..results import RESULTS, read_result

nats_per_byte = ladder.nats_per_byte

RECORDED = RESULTS / "quantization.json"

# ---------------------------------------------------------------- measuring

LAYERS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")


@torch.no_grad()
def rounded(model, bits: int, group: int | None = 32, kinds: Sequence[str] = LAYERS):
    """A copy of a model whose matrices of these kinds went to a few bits and back; the model
    itself stays as it is."""
    new = copy.deepcopy(model)
    for name, weight in new.named_parameters():
        if weight.dim() == 2 and name.split(".")[-2] in kinds:
            weight.copy_(dequantize(*quantize(weight, bits, group)))
    return new


def numbers_of(model, kind: str) -> int:
    """How many weights all matrices of one kind have together."""
    return sum(w.numel() for name, w in model.named_parameters() if name.split(".")[-2:-1] == [kind])


def relative_error(weight: Tensor, bits: int, group: int | None = None) -> float:
    """The size of what rounding changes, over the size of the weights."""
    again = dequantize(*quantize(weight, bits, group))
    return ((again - weight).norm() / weight.norm()).item()


def recorded() -> dict:
    """What benchmarks/quantization.py measured."""
    return read_result(RECORDED)


# ---------------------------------------------------------------- pictures


def steps_picture(weights: Tensor, scale: float, most: int):
    """Weights above a ruler of whole steps, and the step to which each one goes."""
    figure, ax = new_figure(8.4, 2.5)
    ticks = [scale * n for n in range(-most, most + 1)]
    ax.plot(ticks, [0] * len(ticks), color=BLACK, linewidth=1, linestyle="-", marker="|",
            markersize=14)
    for n, x in zip(range(-most, most + 1), ticks):
        ax.text(x, -0.42, str(n), ha="center", va="top")
    for w in weights.tolist():
        goes_to = scale * max(-most, min(most, round(w / scale)))
        ax.annotate("", (goes_to, 0.06), (w, 0.75), arrowprops={"arrowstyle": "->", "color": BLUE})
        ax.plot(w, 0.8, marker="o", color=ORANGE, linestyle="none")
        ax.text(w, 0.98, f"{w:g}", ha="center", va="bottom")
    ax.text(ticks[0], -1.05, f"one step is the scale, {scale:g}", va="top", color=GREY)
    ax.set(xlim=(ticks[0] - scale, ticks[-1] + scale), ylim=(-1.5, 1.5),
           title="Each weight goes to the nearest whole step")
    ax.axis("off")
    return figure


def lines_over_bits(bits: Sequence[int], series: dict[str, Sequence[float]], floor: float,
                    whole: float):
    """How far above the floor the loss is, against bits, beside the model as it was trained."""
    figure, ax = new_figure(7.4, 3.8)
    for (label, values), colour, dash, marker in zip(
            series.items(), (ORANGE, BLUE), ("--", "-"), "so"):
        above = [value - floor for value in values]
        ax.plot(range(len(bits)), above, color=colour, linestyle=dash, marker=marker, label=label)
    ax.axhline(whole - floor, color=GREEN, linestyle="-.", linewidth=1.5, label="float32, 32 bits")
    ax.set_xticks(range(len(bits)), [str(b) for b in bits])
    ax.set(title="8 and 6 bits cost nothing, 4 a little; at 2 the model is lost", yscale="log",
           xlabel="bits of a number", ylabel="nats per byte above the floor (log)")
    ticks = [0.003, 0.01, 0.1, 1]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="upper left")
    return figure


def costs_picture(costs: dict[str, float], title: str):
    """One bar for each kind of matrix: what rounding it alone adds to the loss."""
    figure, ax = new_figure(7.4, 3.6)
    order = sorted(costs, key=costs.get)
    colours = [BLUE] * (len(order) - 1) + [ORANGE]
    bars = ax.barh(order, [costs[name] for name in order], color=colours, edgecolor="white")
    bars[-1].set_hatch(HATCHES[1])
    ax.bar_label(bars, labels=[f"{costs[name]:.4f}" for name in order], padding=4, fontsize=11)
    ax.set(title=title, xlabel="what it adds to the loss (nats per byte)")
    ax.margins(x=0.15)
    return figure


def outlier_picture(sizes: Sequence[float], series: dict[str, Sequence[float]]):
    """The error of all other weights while one of them grows."""
    figure, ax = new_figure(7.2, 3.5)
    for (label, values), colour, dash, marker in zip(
            series.items(), (ORANGE, BLUE), ("--", "-"), "so"):
        ax.plot(sizes, [100 * v for v in values], color=colour, linestyle=dash, marker=marker,
                label=label)
    ax.set(xscale="log", ylim=(0, 105), xlabel="size of the largest weight, times that of the others",
           ylabel="error of the others, in %",
           title="One large weight ruins its row, but only its group of 32")
    ax.set_xticks(list(sizes), [f"{s:g}" for s in sizes])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="upper left")
    return figure


# ---------------------------------------------------------------- will it fit

# name: (GB of memory in all, GB left for a model, GB read in a second at best)
DEVICES = {
    "laptop, 16 GB": (16, 12, 90),
    "phone, 8 GB": (8, 5, 60),
    "one GPU, 24 GB": (24, 22, 1008),
    "one GPU, 141 GB": (141, 136, 4800),
}
SHOWN = ("ministral-3-3b", "mistral-7b-v0.2", "ministral-8b-2410", "mistral-nemo-12b",
         "mistral-small-2501", "mixtral-8x7b-v0.1")


def resident_gb(config: mm.ModelConfig, bits: float, context: int) -> tuple[float, float]:
    """(GB of weights, GB of cache in 16 bits) for one text of this many tokens."""
    weights = mm.count_parameters(config).total * bits / 8e9
    windows = [config.window(layer) or context for layer in range(config.n_layers)]
    kept = sum(min(window, context) for window in windows) / config.n_layers
    return weights, kept * mm.cache_bytes_per_token(config) / 1e9


def read_gb(config: mm.ModelConfig, bits: float) -> float:
    """GB of weights read for one token of one text: of the input table a single row."""
    table = 0 if config.tied_embeddings else config.vocab_size * config.dim
    return (mm.count_parameters(config).active - table) * bits / 8e9


def fit_explorer(device: str, bits: float, context: int):
    """Which of the published models fit on a device, and how fast they could be at best."""
    memory, left, speed = DEVICES[device]
    figure, ax = new_figure(8.0, 4.0)
    sizes = {name: resident_gb(mm.MODELS[name], bits, context) for name in SHOWN}
    order = sorted(SHOWN, key=lambda name: -sum(sizes[name]))
    weights, caches = ([sizes[name][i] for name in order] for i in (0, 1))
    ax.barh(order, weights, color=BLUE, edgecolor="white", label="weights")
    ax.barh(order, caches, left=weights, color=PINK, hatch="//", edgecolor="white", label="cache")
    fitting = [name for name in order if sum(sizes[name]) <= left]
    edge = 2.4 * left                                                     # longer bars leave the picture
    for row, name in enumerate(order):
        size, verdict = sum(sizes[name]), "fits" if name in fitting else "too large"
        outside = size < 0.72 * edge
        ax.text(size + 0.015 * edge if outside else 0.985 * min(sizes[name][0], edge), row,
                f"{size:.1f} GB, {verdict}" + (" →" if size > edge else ""), va="center",
                ha="left" if outside else "right", zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.axvline(left, color=ORANGE, linestyle="--", linewidth=2, label=f"{left} GB left for a model")
    ax.set(xlim=(0, edge), xlabel="GB of memory",
           title=f"{len(fitting)} of {len(order)} models fit: {device}, {bits:g} bits")
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=3)
    best = {name: speed / (read_gb(mm.MODELS[name], bits) + sizes[name][1]) for name in order}
    fastest = max(fitting, key=best.get, default=None)
    told = (f"the fastest of them, {fastest}, at most {best[fastest]:.0f} tokens a second"
            if fastest else "none of them runs")
    sentence = (f"{device}, of which {left} GB are left, {bits:g} bits for a weight, {context:,} "
                f"tokens: {len(fitting)} of {len(order)} models fit; {told}.")
    table = {"model": order, "weights, GB": [round(x, 2) for x in weights],
             "cache, GB": [round(x, 2) for x in caches],
             "fits": ["yes" if name in fitting else "no" for name in order],
             "tokens a second, at most": [round(best[name], 1) for name in order]}
    return figure, sentence, table


# ---------------------------------------------------------------- further: a cache in few bits


def squeeze_cache(cache: mm.KVCache, bits: int) -> None:
    """Round all keys and values in place: one scale for each token and head."""
    for layer in cache.layers:
        for store in (layer.keys, layer.values):
            flat = store.flatten(0, -2)                              # (B * S * K, D)
            store.copy_(dequantize(*quantize(flat, bits)).view_as(store))


@torch.no_grad()
def loss_with_cache(model, rows: Tensor, half: int, bits: int | None) -> float:
    """Mean nats per token of the second halves of rows, the first halves read from a cache
    in few bits (None: as it is). rows: (N, T + 1)"""
    cache = mm.KVCache(model.config, len(rows), max_length=rows.shape[1])
    model(rows[:, :half], cache)
    if bits:
        squeeze_cache(cache, bits)
    logits = model(rows[:, half:-1], cache)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, half + 1:].flatten()).item()
