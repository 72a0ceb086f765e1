"""Chapter 8: its pictures, its measurements and the logic of its explorers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import minimistral as mm
from minimistral.cache import LayerCache
from minimistral.tales import parse_tale

from ..figures import BLACK, BLUE, GREY, ORANGE, lines_chart, new_figure
from ..ladder import ladder
from ..panel import wrapped
from ..results import RESULTS, read_result
from ..timing import best_seconds, one_thread  # noqa: F401 (the notebooks take it from here)

nats_per_byte = ladder.nats_per_byte


SPEED, RUNGS = RESULTS / "window.json", RESULTS / "window_ladder.json"


# ---------------------------------------------------------------- the ladder


def ladder_config(window: int | None) -> mm.ModelConfig:
    """The model of chapter 7's rung, with a window in both layers."""
    return mm.ModelConfig(dim=96, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=12,
                          hidden_dim=192, vocab_size=ladder.tokenizer.vocab_size,
                          sliding_window=window)


def ladder_model(window: int | None = 16, seed: int = 0) -> mm.Transformer:
    """The same, untrained. The recorded row is called "transformer, window 16"."""
    torch.manual_seed(seed)
    return mm.Transformer(ladder_config(window))


def one_layer(window: int) -> mm.Transformer:
    """A single layer for the bug hunt, whose heads do not share keys."""
    torch.manual_seed(0)
    return mm.Transformer(replace(ladder_config(window), n_layers=1, n_kv_heads=8))


# ---------------------------------------------------------------- one model, another window


def with_window(model: mm.Transformer, window) -> mm.Transformer:
    """The same weights, where every query sees the last `window` keys; None for all."""
    other = mm.Transformer(replace(model.config, sliding_window=window))
    other.load_state_dict(model.state_dict())
    return other.eval()


def many_tales(tokenizer, rows: int, length: int, seed: int = 0) -> Tensor:
    """Rows of validation tales, one after the other, in an order of their own. (rows, length)"""
    documents = tokenizer.encode_batch(ladder.corpus.val_documents, bos=True, eos=True)
    chance = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rows):
        order = torch.randperm(len(documents), generator=chance).tolist()
        made.append([token for n in order for token in documents[n]][:length])
    return torch.tensor(made)


@torch.no_grad()
def nats_by_place(model, ids: Tensor, eos_id: int, width: int) -> list[float]:
    """Mean nats per token in stretches of `width` tokens; what follows an end is not asked."""
    logits = model(ids[:, :-1])
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    nats, asked = nats.view(len(ids), -1), ids[:, :-1] != eos_id
    return [nats[:, s:s + width][asked[:, s:s + width]].mean().item()
            for s in range(0, nats.shape[1], width)]


@torch.no_grad()
def write_on(model, tokenizer, tokens: int, seed: int) -> tuple[list[str], mm.KVCache]:
    """Tale after tale in one text and one cache, at temperature 1: after </s> comes <s>."""
    cache, chance = mm.KVCache(model.config), torch.Generator().manual_seed(seed)
    ids = [tokenizer.bos_id]
    for _ in range(tokens):
        if ids[-1] == tokenizer.eos_id:
            chosen, _ = tokenizer.bos_id, model(torch.tensor([ids[-1:]]), cache)
        else:
            chances = model(torch.tensor([ids[-1:]]), cache)[0, -1].softmax(-1)
            chosen = int(torch.multinomial(chances, 1, generator=chance))
        ids.append(chosen)
    return tales_of(tokenizer, ids), cache


def tales_of(tokenizer, ids: Sequence[int]) -> list[str]:
    """The finished tales of a long text."""
    tales, current = [], []
    for token in ids:
        if token == tokenizer.eos_id:
            tales.append(tokenizer.decode(current))
        current = [] if token in (tokenizer.eos_id, tokenizer.bos_id) else [*current, token]
    return tales


def accepted(tales: Sequence[str]) -> float:
    """The share of tales that the grammar accepts."""
    return sum(parse_tale(tale).ok for tale in tales) / len(tales)


# ---------------------------------------------------------------- reach


def random_model(layers: int, window: int | None) -> mm.Transformer:
    """Untrained, in float64, with weights large enough that no change dies out on its way."""
    chance = torch.Generator().manual_seed(8)
    model = mm.Transformer(mm.ModelConfig(dim=24, n_layers=layers, n_heads=3, n_kv_heads=1,
                                          head_dim=8, hidden_dim=32, vocab_size=50,
                                          sliding_window=window)).double()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=chance)
    return model.eval()


@torch.no_grad()
def moved_cells(model: mm.Transformer, length: int, moved: int) -> Tensor:
    """Another token at one place: where does the stream change? -> bool (L + 1, length)

    Row 0 is what enters the first layer, row l what leaves layer l.
    """
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, moved] = (ids[0, moved] + 1) % 50
    seen = []
    hooks = [layer.register_forward_hook(lambda _, x, out: seen.append((x[0], out)))
             for layer in model.layers]
    model(ids), model(other)
    for hook in hooks:
        hook.remove()
    first, second = seen[:len(model.layers)], seen[len(model.layers):]
    pairs = [(first[0][0], second[0][0]), *((a[1], b[1]) for a, b in zip(first, second))]
    return torch.stack([(a != b).any(-1)[0] for a, b in pairs])


def reach_explorer(layers: int, window: int):
    """Which tokens, after how many layers, feel that token 0 was exchanged?"""
    length = 40
    cells = moved_cells(random_model(layers, window), length, 0)         # (L + 1, length)
    figure, ax = new_figure(8.2, 1.5 + 0.33 * layers)
    for layer, row in enumerate(cells.tolist()):
        for place, changed in enumerate(row):
            ax.plot(place, layer, marker="o" if changed else ".", markersize=9 if changed else 4,
                    color=ORANGE if changed else GREY, linestyle="none")
    far = int(cells[-1].nonzero().max())
    names = ["tokens", *(f"layer {n}" for n in range(1, layers + 1))]
    ax.set(title=f"A change at token 0 is felt up to token {far}", xlabel="position",
           xlim=(-1, length), ylim=(-0.6, layers + 0.6), yticks=range(layers + 1))
    ax.set_yticklabels(names)
    edge = " (the picture ends there)" if far == length - 1 else ""
    sentence = (f"{layers} layer{'s' * (layers > 1)} with window {window}: token 0 reaches "
                f"position {far}{edge}; layers x (window - 1) is {layers * (window - 1)}.")
    farthest = [int(row.nonzero().max()) for row in cells]
    return figure, sentence, {"after": names, "last position that changed": farthest}


# ---------------------------------------------------------------- the ring


def filled(window: int, chunks: Sequence[Tensor]) -> LayerCache:
    """A ring with nothing in its keys, into which chunks of positions were written."""
    ring = LayerCache((1, window, 1, 2), True, None, torch.float32)
    for positions in chunks:
        k = torch.zeros(1, len(positions), 1, 2)
        ring.write(k, k, positions[None])
    return ring


def ring_picture(positions: Sequence[int], query: int, window: int, title: str,
                 old: Sequence[bool] = ()):
    """Slots on a circle with the positions they hold; filled where the query may look."""
    figure, ax = new_figure(4.6, 4.3)
    draw_ring(ax, positions, query, window, old)
    ax.set_title(title)
    return figure


def draw_ring(ax, positions, query, window, old=()):
    """One ring into the given axes."""
    slots = len(positions)
    turn = [2 * math.pi * n / 90 for n in range(91)]
    ax.plot([math.cos(a) for a in turn], [math.sin(a) for a in turn], color=GREY, linewidth=1, zorder=0)
    for slot, position in enumerate(positions):
        angle = math.pi / 2 - 2 * math.pi * slot / slots
        x, y = math.cos(angle), math.sin(angle)
        stale = bool(old and old[slot])
        seen = 0 <= position <= query and query - position < window
        newest = position == query and not stale
        ax.plot(x, y, marker="s" if stale else "o", markersize=34, linestyle="none",
                color=BLUE if seen else "white",
                markeredgecolor=ORANGE if newest else BLACK if position >= 0 else GREY,
                markeredgewidth=4 if newest else 1.5)
        ax.text(x, y, str(position) if position >= 0 else "–", ha="center", va="center",
                fontsize=13, color="white" if seen else "black")
        ax.text(0.6 * x, 0.6 * y, f"slot {slot}", ha="center", va="center", fontsize=11,
                color="#555555")
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.35, 1.35), aspect="equal")
    ax.axis("off")


def ring_explorer(window: int, prompt: int, then: int, second_text: int):
    """A prompt read at once, single tokens after it, and a second text into the same ring.

    prompt: tokens read in one piece; then: single tokens after them; second_text: tokens of a
    new text, which begins at position 0 in a ring that nobody has wiped; 0 for none.
    """
    chunks = [torch.arange(prompt)] if prompt else []
    chunks += [torch.tensor([p]) for p in range(prompt, prompt + then)]
    ring = filled(window, chunks)
    before = ring.positions[0].tolist()
    newest = prompt + then - 1
    if second_text:
        for p in range(second_text):
            ring.write(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.tensor([[p]]))
        newest = second_text - 1
    held = ring.positions[0].tolist()
    fresh = {p % window for p in range(second_text)} if second_text else set(range(window))
    old = [slot not in fresh and held[slot] >= 0 for slot in range(window)]
    query = max(newest, 0)
    seen = sorted(p for p in held if 0 <= p <= query and query - p < window)
    stale = [p for p, is_old in zip(held, old) if is_old]
    title = (f"The newest token, {newest}, sees {len(seen)} tokens" if newest >= 0
             else "An empty ring")
    figure = ring_picture(held, query, window, title, old)
    words = ", ".join(map(str, seen)) or "nothing"
    sentence = f"Window {window}: the newest token sees the positions {words}."
    if stale:
        sentence += (f" The squares, {', '.join(map(str, stale))}, are of the first text: later "
                     "than the query, so it does not see them.")
    elif second_text:
        sentence += " Nothing of the first text is left."
    return figure, sentence, {"slot": list(range(window)), "held before": before, "holds": held}


# ---------------------------------------------------------------- the sample, and the arithmetic


def pairs(length: int, window: int | None = None) -> int:
    """Pairs of query and key in one head: each query with itself and what it may see."""
    window = min(window or length, length)
    return window * (window + 1) // 2 + (length - window) * window


def prefill_operations(config: mm.ModelConfig, length: int, window: int | None) -> tuple:
    """(in the matrices, in the looks): operations to read a text, two for a weight and token, four
    for each number of a pair's head."""
    rows = config.vocab_size * config.dim
    matrices = 2 * (mm.count_parameters(config).active - rows) * length
    looks = 4 * config.n_layers * config.n_heads * config.head_dim * pairs(length, window)
    return matrices, looks


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def cache_at(model: mm.Transformer, position: int) -> mm.KVCache:
    """A cache as it is when `position` tokens were read. With a window only the last of them are
    really read; without one the older keys are whatever noise: time does not ask."""
    cache = mm.KVCache(model.config)
    window = model.config.window(0)
    cache.make_room(position)
    chance = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        slots = layer.keys.shape[1]
        layer.keys.copy_(torch.randn(layer.keys.shape, generator=chance))
        layer.values.copy_(torch.randn(layer.values.shape, generator=chance))
        held = torch.arange(max(0, position - (window or slots)), position)
        layer.positions[0, held % slots] = held
    cache.length[:] = position
    return cache


@torch.no_grad()
def milliseconds_per_token(model: mm.Transformer, places: Sequence[int], rounds: int,
                           tokens: int = 8) -> dict[int, list[float]]:
    """Time of the processor for one more token at each place, in turns (A B C A B C): one sample for each round."""
    caches = {place: cache_at(model, place) for place in places}
    ids = torch.tensor([[5]])
    for cache in caches.values():
        model(ids, cache)                                   # warm
    samples: dict[int, list[float]] = {place: [] for place in places}
    for _ in range(rounds):
        for place, cache in caches.items():
            began = time.process_time()
            for _ in range(tokens):
                model(ids, cache)
            samples[place].append(1000 * (time.process_time() - began) / tokens)
    return samples


def recorded_speed() -> dict:
    """What benchmarks/window.py measured."""
    return read_result(SPEED)


def recorded_rungs() -> dict[tuple[int | None, int], list[float]]:
    """(window, steps) -> loss for each seed, as benchmarks/window_ladder.py measured them."""
    found: dict[tuple[int | None, int], list[float]] = {}
    for run in read_result(RUNGS)["runs"]:
        found.setdefault((run["window"], run["steps"]), []).append(run["nats_per_byte"])
    return found


# ---------------------------------------------------------------- pictures


def collapse_picture(places: Sequence[int], losses: dict[str, list[float]], trained: int):
    """Loss along a long text, for one model with and without a window."""
    figure, ax = new_figure(7.6, 3.6)
    lines_chart(ax, places, losses, xlabel="position in the text (middle of 200 tokens)",
                title="Without a window the model fails beyond the lengths it was trained on",
                ylabel="loss (nats per token)")
    ax.axvline(trained, color=GREY, linestyle=":", linewidth=1.5)
    ax.text(trained + 15, 0.92 * max(map(max, losses.values())),
            "longest row\nin training", fontsize=11, color="#444444", va="top")
    ax.set_ylim(0)
    ax.legend(frameon=False, loc="center right")
    return figure


def speed_picture(recorded: dict):
    """Milliseconds per token at each position: medians, and the middle half of the samples."""
    figure, ax = new_figure(7.2, 3.6)
    shown = (("window 256", "window", BLUE, "o", "-"), ("no window", "no window", ORANGE, "s", "--"))
    for label, key, colour, marker, dash in shown:
        rows = [row for row in recorded["decoding"] if row["model"] == key]
        x = [row["position"] for row in rows]
        y = [row["median_ms"] for row in rows]
        ax.plot(x, y, color=colour, marker=marker, linestyle=dash, label=label)
    ax.set_xscale("log", base=2)
    places = sorted({row["position"] for row in recorded["decoding"]})
    ax.set_xticks(places, [f"{p:,}" for p in places])
    ax.minorticks_off()
    ax.set(title="With the ring a token costs the same at every position",
           xlabel="tokens read before", ylabel="ms for one token", ylim=(0, None))
    ax.legend(frameon=False)
    return figure


def rungs_picture(rungs: dict[tuple, float], own: float | None = None):
    """Loss of the ladder's model by window, after a short and after a longer training."""
    figure, ax = new_figure(7.2, 3.6)
    windows = [4, 16, None]
    styles = ((BLACK, "o", "-"), (BLUE, "s", "--"))
    for (colour, marker, dash), steps in zip(styles, sorted({steps for _, steps in rungs})):
        x = [n for n, w in enumerate(windows) if (w, steps) in rungs]
        ax.plot(x, [rungs[windows[n], steps] for n in x], color=colour, linestyle=dash,
                marker=marker, label=f"recorded, {steps} steps")
    if own is not None:
        ax.scatter([1], [own], s=110, marker="D", color=ORANGE, zorder=1, label="trained here")
    ax.set_xticks(range(3), ["window 4", "window 16", "no window"])
    ax.set(xlim=(-0.3, 2.3), ylabel="loss (nats per byte)", xlabel="the model of chapter 7",
           title="The short window's lead shrinks with training", ylim=(0, 0.6))
    ax.legend(frameon=False, loc="lower left")
    return figure


@torch.no_grad()
def mean_nats(model, rows: Tensor) -> float:
    """Nats per token on rows (R, T + 1), with whatever attention the library has now."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()


def say(name: str, text: str) -> None:
    """A sample with its name, its lines joined."""
    print(wrapped(f"{name}: {text.strip()}".replace("\n", " / ")))
