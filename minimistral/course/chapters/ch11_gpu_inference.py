"""Chapter 11: its arithmetic, its published measurements, its pictures and its explorer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import minimistral as mm

from ..figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, new_figure
from ..progress import work_folder
from ..results import RESULTS, read_result


# ---------------------------------------------------------------- two numbers


def step_bytes(config: mm.ModelConfig, batch: int, length: int, bits: float = 16) -> float:
    """Bytes that one step reads for ``batch`` texts of ``length`` tokens, weights of ``bits`` bits.

    Weights are read once for all texts, of a mixture the experts that any of them chose, if they
    choose evenly; of the input table a few rows, which are left out. Each text has its own cache,
    16 bits for a number, at most a window long.
    """
    weights = mm.count_parameters(config).active
    if not config.tied_embeddings:
        weights -= config.vocab_size * config.dim
    if config.moe:
        experts, k = config.moe.num_experts, config.moe.num_experts_per_tok
        touched = experts * (1 - (1 - k / experts) ** batch)
        weights += (touched - k) * 3 * config.dim * config.hidden_dim * config.n_layers
    return weights * bits / 8 + batch * cache_bytes(config, length)


def cache_bytes(config: mm.ModelConfig, length: int) -> float:
    """Bytes of keys and values that one text of ``length`` tokens looks at."""
    seen = (min(length, config.window(n) or length) for n in range(config.n_layers))
    return sum(seen) * mm.cache_bytes_per_token(config) / config.n_layers


def step_operations(config: mm.ModelConfig, batch: int, length: int) -> float:
    """Multiplications and additions of the same step: two for each active weight and text, and
    four for each number of a query head and each token it looks at."""
    weights = mm.count_parameters(config).active
    if not config.tied_embeddings:
        weights -= config.vocab_size * config.dim
    seen = sum(min(length, config.window(n) or length) for n in range(config.n_layers))
    return batch * (2 * weights + 4 * seen * config.n_heads * config.head_dim)


def step_seconds(config: mm.ModelConfig, batch: int, length: int, bits: float, gpu: str) -> float:
    """The least time of a step on one of ``GPUS``: reading or computing, whichever is longer."""
    speed, rate, _ = GPUS[gpu]
    return max(step_bytes(config, batch, length, bits) / (speed * 1e9),
               step_operations(config, batch, length) / (rate * 1e12))


# name: (GB read in a second, 10^12 operations a second in 16 bits, GB of memory), by the makers
GPUS = {
    "T4": (320, 65, 16),
    "RTX 4090": (1008, 165, 24),
    "A100, 80 GB": (2039, 312, 80),
    "H100": (3350, 989, 80),
    "H200": (4800, 989, 141),
}

# ---------------------------------------------------------------- what others measured


class Run(NamedTuple):
    """A published measurement: one GPU, one text at a time, compiled PyTorch."""

    gpu: str
    gb_per_second: float  # by the maker
    model: str
    bits: int
    tokens_per_second: float
    source: str


GPT_FAST = "gpt-fast, README of 2024"
TORCHAO = "torchao, README of 2025-12"
PUBLISHED = (
    Run("A100", 2039, "llama-2-7b", 16, 104.9, GPT_FAST),
    Run("A100", 2039, "llama-2-7b", 8, 155.58, GPT_FAST),
    Run("A100", 2039, "llama-3.1-8b", 16, 93.89, GPT_FAST),
    Run("A100", 2039, "llama-3.1-8b", 8, 137.64, GPT_FAST),
    Run("A100", 2039, "llama-2-70b", 8, 19.13, GPT_FAST),
    Run("A100", 2039, "mixtral-8x7b-v0.1", 8, 97.92, GPT_FAST),
    Run("H100", 3350, "llama-3.1-8b", 16, 126.9, TORCHAO),
    Run("H100", 3350, "llama-3.1-8b", 8, 198.85, TORCHAO),
    Run("MI250X, half", 1638, "llama-2-7b", 16, 76.33, GPT_FAST),
    Run("MI250X, half", 1638, "llama-2-7b", 8, 101.86, GPT_FAST),
)
EAGER = Run("A100", 2039, "llama-2-7b", 16, 25.5, "PyTorch's blog, 2023-11-30")
WITH_A_DRAFT = 48.4, 25.25           # Llama 2 70B in 4 bits with and without 7B's proposals, GPT_FAST
EIGHT_GPUS = {"mixtral-8x7b-v0.1": 227.82, "llama-2-70b": 62.5}    # 16 bits, GPT_FAST


def shape_of(name: str) -> mm.ModelConfig:
    """A published model's shape; Llama 3.1 8B is Mistral 7B with a larger vocabulary."""
    if name == "llama-3.1-8b":
        return replace(mm.MODELS["mistral-7b-v0.2"], vocab_size=128256)
    return mm.MODELS[name]


def predicted(run: Run, share: float, per_layer: float) -> float:
    """Tokens a second: a share of the maker's GB a second, and seconds more for each layer."""
    config = shape_of(run.model)
    reading = step_bytes(config, 1, 0, run.bits) / (share * run.gb_per_second * 1e9)
    return 1 / (reading + per_layer * config.n_layers)


def gpu_runs(row: str) -> dict[str, str]:
    """Who measured a row of benchmarks/gpu.py: the learner's own GPU, and ours; in words."""
    told = {}
    for who, path in (("your own GPU", work_folder() / "gpu.json"),
                      ("our own run", RESULTS / "gpu.json")):
        found = read_result(path) if path.exists() else None
        told[who] = "not measured"
        if found and "tokens_per_second" in found["rows"].get(row, {}):
            about = found["provenance"]
            told[who] = (f"{found['rows'][row]['tokens_per_second']:.0f} tokens a second, "
                         f"{about['name']}, {about['date'][:10]}")
    return told


def recorded(row: str) -> dict:
    """A row of what benchmarks/inference.py measured on a CPU."""
    return read_result(RESULTS / "inference.json")["rows"][row]


def measure_again(row: str) -> dict:
    """Measure a row of benchmarks/inference.py here and now; nothing of ours is overwritten."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "inference.json"
        subprocess.run([sys.executable, RESULTS.parent / "inference.py", "--only", row, "--out", out],
                       check=True)
        return read_result(out)["rows"][row]


# ---------------------------------------------------------------- this machine

DENSE = mm.ModelConfig(512, 6, 8, 2, 64, 2048, 2048)
MIXTURE = replace(DENSE, hidden_dim=1024, moe=mm.MoEConfig(8, 2))
TINY = replace(DENSE, dim=16, n_heads=2, head_dim=8, hidden_dim=16)


class _Started(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def started(run: Callable) -> Counter:
    """The operations that PyTorch starts during ``run()``: name -> how often."""
    with torch.no_grad(), _Started() as counting:
        run()
    return counting.names


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was told to do. A CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class FakeDevice:
    """A GPU's manners without a GPU: work is queued and done later, by a clock of its own.

    durations  seconds of the first, second ... piece of work; the last one stays
    """

    def __init__(self, durations: Sequence[float] = (0.002,), start: float = 1e-5):
        self.durations, self.start = list(durations), start
        self._now = self._done = 0.0
        self.calls = 0

    def clock(self) -> float:
        """What a watch says, in seconds."""
        return self._now

    def run(self) -> None:
        """Start the next piece of work, and return at once."""
        self._now += self.start
        duration = self.durations[min(self.calls, len(self.durations) - 1)]
        self._done = max(self._done, self._now) + duration
        self.calls += 1

    def wait(self) -> None:
        """Return when all work is done."""
        self._now = max(self._now, self._done)


# ---------------------------------------------------------------- proposals


def tally(accept: Callable, proposals: Tensor, q: Tensor, p: Tensor, n: int, seed: int = 0
          ) -> Tensor:
    """How often each token comes first when one proposal, drawn from q, is checked: (V,)

    q and p: (V,); proposals: (n,), drawn from q
    """
    chance = torch.Generator().manual_seed(seed)
    both, found = torch.stack([p, p]), torch.zeros(len(p))
    for token in proposals[:n].tolist():
        found[accept([token], q[None], both, chance)[0]] += 1
    return found / n


class ToyModel:
    """Greedy writing by a rule, with a cache that must hold the right tokens: the next token
    depends on all that is held, so that a wrong token in it shows at once."""

    def __init__(self, sure: int = 3):
        self.sure, self.held, self.steps = sure, [], 0

    def run(self, tokens: list[int]) -> list[int]:
        """Hold these tokens, too, in one step: what comes next after each of them."""
        self.steps += 1
        found = []
        for token in tokens:
            self.held.append(token)
            mixed = sum((i + 3) * t for i, t in enumerate(self.held[-5:])) + len(self.held)
            found.append((self.held[-1] + 1) % 11 if mixed % self.sure else mixed % 11)
        return found

    def keep(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        del self.held[length:]


def count_up(text: list[int], count: int) -> list[int]:
    """A cheap draft: it counts on from the last token."""
    return [(text[-1] + 1 + i) % 11 for i in range(count)]


class Proposing:
    """Makes a draft for ``speculate`` out of a function of (text, count) that returns ids."""

    def __init__(self, function: Callable, vocab_size: int):
        self.function, self.vocab_size = function, vocab_size

    def begin(self, engine, prompt, drafts, max_new_tokens) -> None:
        pass

    def propose(self, text, count, distribution, generator):
        ids = [int(i) for i in self.function(text, count)][:count]
        hot = torch.nn.functional.one_hot(torch.tensor(ids, dtype=torch.int64), self.vocab_size)
        return ids, hot.float()


# ---------------------------------------------------------------- pictures


def roofline_picture(speed: float, rate: float, points: dict[str, float], title: str):
    """Operations a second against operations for each byte, with points on the roof.

    speed: bytes a second, rate: operations a second, points: name -> operations for each byte
    """
    figure, ax = new_figure(7.4, 3.8)
    ridge = rate / speed
    low, high = min(0.1, *points.values()) / 2, max(ridge, *points.values()) * 6
    ax.plot([low, ridge, high], [low * speed, rate, rate], color=BLACK, linestyle="-")
    ax.plot([ridge, ridge], [low * speed, rate], color=GREY, linestyle=":", linewidth=1.5)
    for n, (name, density) in enumerate(points.items()):
        ax.plot(density, min(density * speed, rate), color=BLUE if density < ridge else ORANGE,
                marker="o" if density < ridge else "s", linestyle="none", markersize=8)
        ax.annotate(name, (density, min(density * speed, rate)), textcoords="offset points",
                    xytext=(-8, 8) if density < ridge else (0, -18), ha="right" if
                    density < ridge else "center")
    ax.set(xscale="log", yscale="log", title=title, xlabel="operations for each byte read",
           ylabel="operations a second")
    ax.text(ridge * 1.15, low * speed * 1.5, f"from {ridge:.0f} on\narithmetic is\nthe limit",
            color=BLACK, va="bottom")
    return figure


def measured_picture(batches: Sequence[int], expected: dict[str, list], found: dict[str, list]):
    """Milliseconds of a step against the batch: predicted as lines, measured as marks."""
    figure, ax = new_figure(7.4, 3.8)
    for n, name in enumerate(expected):
        colour, mark = (BLUE, "o") if n == 0 else (ORANGE, "s")
        ax.plot(batches, expected[name], color=colour,
                linestyle="--" if n else "-", label=f"{name}, predicted")
        ax.plot(batches, found[name], color=colour, marker=mark,
                linestyle="none", markersize=8, label=f"{name}, measured")
    ax.set(xscale="log", yscale="log", xlabel="texts written at once",
           ylabel="milliseconds for a step", title="A step for many texts: predicted and measured")
    ax.set_xticks(list(batches), [str(b) for b in batches])
    low, high = (f([f(times) for times in [*expected.values(), *found.values()]]) for f in (min, max))
    ticks = [n * 10**e for e in range(-3, 3) for n in (1, 2, 5) if low <= n * 10**e <= high]
    ax.set_yticks(ticks, [f"{1000 * t:g}" for t in ticks])
    ax.set_ylim(0.8 * low, 2.5 * high)                  # room for the legend
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


def gain_picture(batches: Sequence[int], gains: Sequence[float], claimed: float):
    """How many times faster Mixtral is than Llama 2 70B, against the batch."""
    figure, ax = new_figure(7.4, 3.6)
    ax.plot(batches, gains, color=BLUE, linestyle="-")
    ax.axhline(claimed, color=ORANGE, linestyle="--", linewidth=1.5)
    ax.text(batches[-1], claimed + 0.1, "the headline", ha="right", color=BLACK)
    least = min(range(len(gains)), key=lambda i: gains[i])
    ax.annotate(f"{gains[least]:.1f} times", (batches[least], gains[least]),
                textcoords="offset points", xytext=(0, 14), ha="center")
    ax.set(xscale="log", ylim=(0, 6.8), xlabel="texts written at once",
           ylabel="times as fast as Llama 2 70B",
           title="Mixtral's gain: five times for one text, 1.5 for a few dozen")
    ticks = [1, 4, 16, 64, 256, 1024]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    return figure


def draws_picture(names: Sequence[str], series: dict[str, Sequence[float]]):
    """Groups of bars: how often each token comes, one bar for each way."""
    figure, ax = new_figure(7.4, 3.4)
    width = 0.8 / len(series)
    for n, ((label, values), colour, hatch) in enumerate(
            zip(series.items(), (BLACK, BLUE, ORANGE, PINK), ("", "//", "..", "xx"))):
        places = [i + (n - (len(series) - 1) / 2) * width for i in range(len(names))]
        ax.bar(places, list(values), width, color=colour, hatch=hatch, edgecolor="white",
               label=label)
    ax.set_xticks(range(len(names)), list(names))
    ax.set(xlabel="token", ylabel="share of the draws",
           title="Checked proposals have the model's distribution, not the draft's")
    ax.legend(frameon=False)
    return figure


EXPLORED = {"Mistral 7B": "mistral-7b-v0.2", "Mixtral 8x7B": "mixtral-8x7b-v0.1",
            "Llama 2 70B": "llama-2-70b"}


def roofline_explorer(device: str, model: str, batch: int, bits: float, tokens: int):
    """Tokens a second of a model on a device: the bound, and what limits it."""
    speed, rate, memory = GPUS[device]
    config = mm.MODELS[EXPLORED[model]]
    batches = [2**n for n in range(11)]
    times = [step_seconds(config, b, tokens, bits, device) for b in batches]
    read = step_bytes(config, batch, tokens, bits) / (speed * 1e9)
    compute = step_operations(config, batch, tokens) / (rate * 1e12)
    step, limit = max(read, compute), "reading" if read > compute else "arithmetic"
    needed = (mm.count_parameters(config).total * bits / 8 + batch * cache_bytes(config, tokens))
    each = f"{tokens:,} tokens each" if tokens else "short texts"
    figure, ax = new_figure(7.4, 3.7)
    ax.plot(batches, [b / s for b, s in zip(batches, times)], color=BLUE, linestyle="-")
    ax.plot(batches, [b / times[0] for b in batches], color=GREY, linestyle=":",
            label="if a step always took as long as for one text")
    ax.plot(batch, batch / step, color=ORANGE, marker="s", markersize=9, linestyle="none",
            label=f"{batch} {'text' if batch == 1 else 'texts'}, limited by {limit}")
    ax.set(xscale="log", yscale="log", xlabel="texts written at once",
           ylabel="tokens a second, at most", title=f"{model}, {bits:g} bits, {device}, {each}")
    ticks = [1, 4, 16, 64, 256, 1024]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="upper left")
    fits = "fits" if needed <= memory * 1e9 else "does not fit"
    sentence = (f"{model} with {bits:g} bits on {device}, {batch} at once, {each}: "
                f"at most {batch / step:,.0f} tokens a second, {1 / step:,.0f} for each text, "
                f"limited by {limit}. It needs {needed / 1e9:.0f} GB of {memory} and {fits}.")
    return figure, sentence, {"texts": batches, "ms for a step": [round(1000 * s, 2) for s in times],
                              "tokens a second": [round(b / s) for b, s in zip(batches, times)]}


def lively(config: mm.ModelConfig, seed: int = 0) -> mm.Transformer:
    """Random weights, quickly drawn: speed does not depend on what they say."""
    with torch.device("meta"):
        model = mm.Transformer(config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    chance = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.uniform_(-0.05, 0.05, generator=chance)
    return model


def speeds_picture(rows: dict[str, dict[str, float]]):
    """Groups of bars: how many times faster than transformers, for each shape."""
    figure, ax = new_figure(7.4, 3.5)
    ways = list(next(iter(rows.values())))
    for n, (way, colour, hatch) in enumerate(zip(ways, (GREEN, BLUE), ("//", ""))):
        places = [i + (n - (len(ways) - 1) / 2) * 0.36 for i in range(len(rows))]
        bars = ax.bar(places, [row[way] for row in rows.values()], 0.34, color=colour, hatch=hatch,
                      edgecolor="white", label=way)
        ax.bar_label(bars, fmt="%.1f", fontsize=11, padding=3, zorder=3,
                     bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    ax.axhline(1, color=BLACK, linestyle=":", linewidth=1.5)
    ax.set_xticks(range(len(rows)), list(rows))
    ax.set(ylabel="times as fast as transformers", xlabel="megabytes read for each token",
           title="The fewer bytes a step reads, the more the compiled step gains")
    ax.margins(y=0.15)
    ax.legend(frameon=False)
    return figure
