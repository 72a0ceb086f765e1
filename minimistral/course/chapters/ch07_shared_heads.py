"""Chapter 7: its pictures, its measurements and the logic of its explorer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import minimistral as mm

from ..figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, new_figure
from ..ladder import ladder
from ..results import RESULTS, read_result
from ..timing import best_seconds  # noqa: F401 (the notebooks take it from here)

nats_per_byte = ladder.nats_per_byte

RECORDED = RESULTS / "shared_heads.json"
KIB, GIB = 2**10, 2**30


# ---------------------------------------------------------------- the ladder


def ladder_config(n_kv_heads: int, hidden_dim: int = 192) -> mm.ModelConfig:
    """The model of this chapter's rung: eight query heads in two layers."""
    return mm.ModelConfig(dim=96, n_layers=2, n_heads=8, n_kv_heads=n_kv_heads, head_dim=12,
                          hidden_dim=hidden_dim, vocab_size=ladder.tokenizer.vocab_size)


def ladder_model(n_kv_heads: int, hidden_dim: int = 192, seed: int = 0) -> mm.Transformer:
    """The same, untrained."""
    torch.manual_seed(seed)
    return mm.Transformer(ladder_config(n_kv_heads, hidden_dim))


def recorded_runs(steps: int) -> dict[str, list[float]]:
    """Name of a model -> its loss for each seed, as benchmarks/shared_heads.py measured them."""
    found: dict[str, list[float]] = {}
    for run in read_result(RECORDED)["runs"]:
        if run["steps"] == steps:
            found.setdefault(run["model"], []).append(run["nats_per_byte"])
    return found


def float32_bytes(name: str) -> int:
    """Cache bytes for each token of a recorded model, called "K = 4" or the like."""
    return mm.cache_bytes_per_token(ladder_config(int(name.split()[2].strip(","))), torch.float32)


# ---------------------------------------------------------------- sharing made from a model


def with_kv_heads(model: nn.Module, n_kv_heads: int, merge: Callable[[Tensor], Tensor]):
    """A copy of a model with fewer key/value heads; the model itself stays as it is.

    merge: the heads of one group (n, D, dim) -> one head (D, dim), for wk and for wv
    """
    old = model.config
    params = {**json.loads(old.to_json()), "n_kv_heads": n_kv_heads}
    new = mm.Transformer(mm.ModelConfig.from_json(params))
    state = copy.deepcopy(model.state_dict())
    for name, weight in state.items():
        if name.endswith(("wk.weight", "wv.weight")):
            groups = weight.unflatten(0, (n_kv_heads, -1, old.head_dim))  # (new, n, D, dim)
            state[name] = torch.cat([merge(group) for group in groups])
    new.load_state_dict(state)
    return new.eval()


# ---------------------------------------------------------------- measuring


def largest_stored(look: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple:
    """(the look, the numbers in the largest tensor that entered one of its products).

    What training would have to keep is exactly what the products read: copies show up here.
    """
    numbers = 0

    def seen(x):
        nonlocal numbers
        numbers = max(numbers, x.untyped_storage().nbytes() // x.element_size())
        return x

    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
        out = look(q, k, v, mask)
    return out, numbers


# ---------------------------------------------------------------- pictures

COLOUR_OF_GROUP = (BLUE, ORANGE, GREEN, PINK)


def sharing_picture(n_heads: int, choices: Sequence[int]):
    """Which query head reads which key/value head: one panel for each number of the latter."""
    figure, axes = new_figure(9.4, 2.9, columns=len(choices))
    for ax, kv_heads in zip(axes, choices):
        n = n_heads // kv_heads
        for h in range(n_heads):
            group = h // n
            at = (group + 0.5) * n - 0.5
            ax.plot([h, at], [1 - 0.17, 0.17], color=GREY, linewidth=1, linestyle="-", zorder=1)
            _box(ax, h, 1, str(h), None if n == 1 else group)
        for group in range(kv_heads):
            _box(ax, (group + 0.5) * n - 0.5, 0, str(group),
                 *((None, 0.8) if n == 1 else (group, 1.0)))
        share = "each its own" if n == 1 else f"{n} share one"
        ax.set(title=f"{kv_heads} key/value head{'s' * (kv_heads > 1)}: {share}",
               xlim=(-0.7, n_heads - 0.3), ylim=(-0.45, 1.45))
        ax.set_yticks([0, 1], ["keys,\nvalues", "queries"] if ax is axes[0] else ["", ""])
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return figure


def _box(ax, x, y, text, group, width=0.8):
    """group: its colour; None for a head that shares with no other."""
    from matplotlib.patches import Rectangle

    colour = BLACK if group is None else COLOUR_OF_GROUP[group % len(COLOUR_OF_GROUP)]
    ax.add_patch(Rectangle((x - width / 2, y - 0.17), width, 0.34, facecolor="white", zorder=2,
                           edgecolor=colour, linewidth=2))
    ax.text(x, y, text, ha="center", va="center", fontsize=12, zorder=3)


def share_of_cache(config: mm.ModelConfig, length: int, dtype=torch.bfloat16,
                   batch: int = 1) -> float:
    """Of the bytes read to write one token for each text: the part that is keys and values.

    Every active weight is read once for the whole batch (of the table of token embeddings only a
    row), and the cache of every text.
    """
    rows = 0 if config.tied_embeddings else config.vocab_size * config.dim
    weights = (mm.count_parameters(config).active - rows) * dtype.itemsize
    cache = batch * length * mm.cache_bytes_per_token(config, dtype)
    return cache / (weights + cache)


def quality_picture(losses: dict[str, list[float]], cache_bytes: dict[str, int], own=None):
    """Loss against cache bytes per token: a point for each seed, a line through the medians.

    own: (cache bytes, loss) of the learner's model, or None
    """
    figure, ax = new_figure(7.4, 3.9)
    same = [name for name in losses if "wider" not in name]
    medians = [sorted(losses[name])[len(losses[name]) // 2] for name in same]
    ax.plot([cache_bytes[name] for name in same], medians, color=BLACK, linewidth=1.5,
            linestyle="-", label="recorded: median of three seeds")
    for name, values in losses.items():
        wider = name not in same
        ax.scatter([cache_bytes[name]] * len(values), values, s=45, zorder=3,
                   marker="s" if wider else "o", color=ORANGE if wider else BLACK,
                   facecolors="none" if wider else None,
                   label="recorded: K = 1, wider feed-forward" if wider else None)
    if own:
        ax.scatter(*own, s=110, marker="D", color=BLUE, zorder=2, label="trained here")
    ax.set_xscale("log", base=2)
    ticks = [cache_bytes[name] for name in same]
    ax.set_xticks(ticks, [f"{name}\n{bytes_}" for name, bytes_ in zip(same, ticks)])
    ax.minorticks_off()
    ax.set(title="The fewer key/value heads, the higher the loss: by hundredths of a nat",
           xlabel="key/value heads, and bytes of cache for each token",
           ylabel="loss (nats per byte)")
    ax.margins(0.12, 0.12)
    ax.legend(frameon=False, loc="upper right")
    return figure


# ---------------------------------------------------------------- the explorer's logic

SHOWN = {"Llama 2 7B": "llama-2-7b", "Llama 2 13B": "llama-2-13b", "Llama 2 70B": "llama-2-70b",
         "Mistral 7B": "mistral-7b-v0.2", "Mistral Large 2": "mistral-large-2"}


def cache_gib(config: mm.ModelConfig, length: int, bits: int = 16) -> float:
    """GiB of keys and values of one text, no window counted."""
    return length * mm.cache_bytes_per_token(config, torch.int8) * bits / 8 / GIB


def your_config(query_heads: int, share_one: int, layers: int) -> mm.ModelConfig:
    """A model with heads of 128 numbers, as in all published models of the table."""
    kv_heads = max(1, query_heads // share_one)
    return mm.ModelConfig(dim=128 * query_heads, n_layers=layers, n_heads=query_heads,
                          n_kv_heads=kv_heads, head_dim=128, hidden_dim=512 * query_heads,
                          vocab_size=32000)


def cache_explorer(query_heads: int, heads_that_share_one: int, layers: int, context: int,
                   bits: int):
    """Your model's cache beside those of published models, at one length of the text."""
    config = your_config(query_heads, heads_that_share_one, layers)
    sizes = {"yours": cache_gib(config, context, bits)}
    sizes |= {label: cache_gib(mm.MODELS[name], context) for label, name in SHOWN.items()}
    order = sorted(sizes, key=sizes.get)
    figure, ax = new_figure(7.8, 3.6)
    bars = ax.barh(order, [sizes[name] for name in order], color=[
        ORANGE if name == "yours" else "#9a9a9a" for name in order], edgecolor="black")
    bars[order.index("yours")].set_hatch("//")
    for text in ax.bar_label(bars, labels=[f"{sizes[name]:.2f}" for name in order], padding=4,
                             fontsize=11):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    for size, style in ((16, "--"), (80, ":")):
        ax.axvline(size, ymax=0.9, color=BLUE, linestyle=style, linewidth=1.5, zorder=0)
        ax.text(size, len(order) - 0.35, f"{size} GiB", color=BLUE, ha="center", fontsize=11)
    place = len(order) - order.index("yours")
    text = {6: "the smallest", 1: "the largest"}.get(place, f"number {place} from the top")
    ax.set(xscale="log", xlim=(0.01, 2000), ylim=(-0.6, len(order) + 0.1),
           xlabel=f"GiB of cache for one text of {context:,} tokens (log scale)",
           title=f"Your cache is {text} of these six")
    kv_heads = config.n_kv_heads
    per_token = mm.cache_bytes_per_token(config, torch.int8) * bits / 8
    alone = cache_gib(your_config(query_heads, 1, layers), context, bits)
    sentence = (f"{query_heads} query heads on {kv_heads} key/value head{'s' * (kv_heads > 1)}, "
                f"{layers} layers, {bits} bits: "
                f"{per_token / KIB:.0f} KiB for each token, {sizes['yours']:.2f} GiB for "
                f"{context:,} tokens; without sharing {alone:.2f} GiB.")
    return figure, sentence, {"model": order, "GiB": [round(sizes[name], 3) for name in order]}
