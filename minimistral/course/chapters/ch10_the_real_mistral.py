"""Chapter 10: what a real checkpoint needs, its pictures, and the logic of its explorer."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import minimistral as mm
from minimistral.checkpoint_files import on_meta, open_folder
from minimistral.doctor import total_memory

from ..figures import BLACK, BLUE, GREEN, ORANGE, new_figure

GB = 1e9
DISK_SPEED = 1e9  # bytes a second: a disk of today; an old one reads a tenth of that


def largest_tensor(config: mm.ModelConfig) -> int:
    """How many numbers the largest weight of a model has."""
    return max(weight.numel() for weight in on_meta(config).parameters())


# ---------------------------------------------------------------- what a checkpoint needs


@dataclass(frozen=True)
class Plan:
    """What loading and running a checkpoint takes, computed from its headers alone."""

    name: str
    layout: str
    config: mm.ModelConfig
    dtype: torch.dtype
    disk: int       # bytes of the files
    weights: int    # bytes of the loaded weights
    largest: int    # bytes of the largest stored tensor, which is on its way
    cache: int      # bytes of keys and values of `tokens` tokens
    tokens: int
    available: int  # bytes of memory that are free now

    @property
    def peak(self) -> int:
        """While loading: the weights, and one tensor more; afterwards the cache."""
        return self.weights + max(self.largest, self.cache)

    @property
    def fits(self) -> bool:
        return self.peak < self.available

    def seconds(self, bandwidth: float) -> tuple[float, float]:
        """(to read the files, at least for one token): no token without reading its weights."""
        return self.disk / DISK_SPEED, read_per_token(self.config, self.dtype) / bandwidth

    def __str__(self) -> str:
        count = mm.count_parameters(self.config)
        kind = f"{count.total:,} parameters, {count.active:,} at work for a token"
        verdict = "it fits" if self.fits else "too little: it is not loaded"
        loading, token = self.seconds(memory_bandwidth())
        return "\n".join([
            f"{self.name}: {self.layout} layout, {kind}",
            f"disk    {size(self.disk)}",
            f"memory  {size(self.weights)} of weights as {str(self.dtype).removeprefix('torch.')}, "
            f"and the larger of two:",
            f"        {size(self.largest)}, the largest tensor on its way, while loading",
            f"        {size(self.cache)}, keys and values of {self.tokens:,} tokens, afterwards",
            f"        {size(self.peak)} at the peak, {size(self.available)} free: {verdict}",
            f"time    some {seconds(loading)} to read at 1 GB/s, then at least "
            f"{seconds(token)} for a token",
        ])


def plan(folder, *, dtype: torch.dtype | None = None, tokens: int = 4096,
         available: int | None = None) -> Plan:
    """What the checkpoint in `folder` needs. Reads its configuration and headers, no weights.

    dtype: what the weights shall become, None for what is stored
    available: bytes of free memory, None for this machine's
    """
    folder = Path(folder)
    config, layout, stored = open_folder(folder)
    size_of = {name: math.prod(entry.shape) * entry.dtype.itemsize
               for name, entry in stored.items()}
    embedding = next(entry for name, entry in stored.items() if "embed" in name)
    kept = dtype or embedding.dtype
    names = {"mistral": "Mistral's", "hf": "Hugging Face's", "stacked": "the first Mixtral's"}
    return Plan(
        name=folder.name, layout=names[layout], config=config, dtype=kept,
        disk=sum(file.stat().st_size for file in {entry.file for entry in stored.values()}),
        weights=mm.weight_bytes(config, kept), largest=max(size_of.values()),
        cache=cache_bytes(config, tokens, kept), tokens=tokens,
        available=free_memory() if available is None else available)


def cache_bytes(config: mm.ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a cache for so many tokens; a layer with a window stops at its window."""
    cache = mm.KVCache(config, max_length=tokens, device="meta", dtype=dtype)
    return cache.nbytes


def read_per_token(config: mm.ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of weights read to write one token: of the table of embeddings only a row."""
    rows = 0 if config.tied_embeddings else (config.vocab_size - 1) * config.dim
    return (mm.count_parameters(config).active - rows) * dtype.itemsize


def free_memory() -> int:
    """Bytes that a new tensor may take: asked of Linux, elsewhere three quarters of all."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return int(0.75 * (total_memory() or 4 * GB))
    try:  # a container may have less than its machine
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8").strip()
                       for name in ("max", "current"))
        return min(free, int(limit) - int(used)) if limit != "max" else free
    except (OSError, ValueError):
        return free


def memory_bandwidth(megabytes: int = 64) -> float:
    """Bytes a second that this machine's memory delivers to one copy, roughly."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def size(number: float) -> str:
    """Bytes in words: 14.48 GB."""
    for unit, name in ((GB, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} bytes"


def seconds(number: float) -> str:
    """A time in words."""
    if number >= 120:
        return f"{number / 60:.0f} minutes"
    return f"{number:.1f} s" if number >= 1 else f"{1000 * number:.3g} ms"


NO_FOLDER = """MINIMISTRAL_MODEL names no folder, so nothing is loaded. With one, this cell
1. reads the configuration and the headers, no weights, and says what is needed;
2. stops there if the memory is too small;
3. otherwise loads the model tensor by tensor and lets it write twenty tokens."""


def write_some(model, folder, prompt: str = "The", new: int = 20) -> str:
    """Let a loaded model go on with a prompt; what it wrote, and how long a token took."""
    try:
        tokenizer = mm.load_tokenizer(folder)
        ids = tokenizer.encode(prompt, bos=True)
    except (ValueError, ImportError):  # no tokenizer beside the weights, or none to read it
        tokenizer, ids = None, [1, 2, 3]
    began = time.perf_counter()
    told = mm.generate(model, ids, new, temperature=0)
    each = (time.perf_counter() - began) / max(1, len(told))
    text = prompt + tokenizer.decode(told) if tokenizer else f"the ids {told}; no tokenizer here"
    return f"{text}\n({seconds(each)} for a token)"


# ---------------------------------------------------------------- other people's tokenizers


def real_tokenizers() -> dict[str, object]:
    """The tokenizers of real models that came with mistral-common, if it is installed."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.origin:
        return {}
    data = Path(found.origin).parent / "data"
    files = {"v1, 7B v0.1": "tokenizer.model.v1",
             "v3, 7B v0.3": "mistral_instruct_tokenizer_240323.model.v3",
             "Tekken, Nemo": "tekken_240718.json"}
    tokenizers = {}
    for name, file in files.items():
        try:
            tokenizers[name] = mm.load_tokenizer(data / file)
        except (ImportError, ValueError, OSError):
            continue
    return tokenizers


# ---------------------------------------------------------------- pictures


def parts(config: mm.ModelConfig) -> dict[str, int]:
    """Shared by all tokens, one set of experts, and how many sets are stored and used."""
    stored, used = 1, 1
    if config.moe:
        stored, used = config.moe.num_experts, config.moe.num_experts_per_tok
    experts = 3 * config.dim * config.hidden_dim * config.n_layers
    shared = mm.count_parameters(config).total - stored * experts
    return {"shared": shared, "expert": experts, "stored": stored, "used": used}


def name_picture(names: dict[str, mm.ModelConfig], claims: dict[str, float]):
    """Each model's parameters: shared, active experts, resting experts; and what a name says."""
    figure, ax = new_figure(8.6, 1.3 + 0.75 * len(names))
    labels = list(names)[::-1]
    for y, label in enumerate(labels):
        of, left = parts(names[label]), 0.0
        pieces = [(of["shared"], BLACK, "", "shared"),
                  (of["used"] * of["expert"], BLUE, "//", "experts at work for a token"),
                  ((of["stored"] - of["used"]) * of["expert"], "#9a9a9a", "", "other experts")]
        for amount, colour, hatch, name in pieces:
            ax.barh(y, amount / 1e9, left=left, color=colour, hatch=hatch, edgecolor="white",
                    label=name if y == len(labels) - 1 else None, height=0.55)
            left += amount / 1e9
        text = f"{left:.1f}"
        if label in claims:
            ax.plot([claims[label]] * 2, [y - 0.36, y + 0.36], color=ORANGE, linewidth=3,
                    linestyle="-")
            text += f", and not {claims[label]:g}"
        ax.text(max(left, claims.get(label, 0)) + 2, y, text, va="center", fontsize=11)
    ax.plot([], [], color=ORANGE, linewidth=3, linestyle="-", label="what the name says")
    ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel="parameters (billions)", xlim=(0, 235),
           title="A name multiplies everything, a model only the experts")
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    return figure


def rows_picture(D: int = 8):
    """Where each row of a head goes: Mistral's order on the left, Hugging Face's on the right."""
    figure, ax = new_figure(6.2, 0.8 + 0.42 * D)
    order = [*range(0, D, 2), *range(1, D, 2)]
    for place, row in enumerate(order):
        colour, style = (BLUE, "-") if row % 2 == 0 else (ORANGE, "--")
        ax.plot([0.1, 0.9], [D - 1 - row, D - 1 - place], color=colour, linestyle=style)
    for x, rows in ((0, range(D)), (1, order)):
        for place, row in enumerate(rows):
            pair = f"{'ab'[row % 2]}{row // 2}"
            ax.text(x, D - 1 - place, f"{row}: {pair}", ha="center", va="center", fontsize=12,
                    bbox={"facecolor": "white", "edgecolor": BLACK, "pad": 4})
    ax.text(0, D - 0.3, "Mistral", ha="center", fontsize=12)
    ax.text(1, D - 0.3, "Hugging Face", ha="center", fontsize=12)
    ax.set(xlim=(-0.3, 1.35), ylim=(-0.7, D + 0.2),
           title="The first numbers of all pairs go up, the second ones down")
    ax.axis("off")
    return figure


def mixture(experts: int, chosen: int) -> mm.ModelConfig:
    """Mistral 7B with its feed-forward replaced by a mixture."""
    params = json.loads(mm.MODELS["mistral-7b-v0.2"].to_json())
    if experts > 1:
        params["moe"] = {"num_experts": experts, "num_experts_per_tok": min(chosen, experts)}
    return mm.ModelConfig.from_json(params)


def mixture_explorer(experts: int, chosen: int, bits: float):
    """A mixture of Mistral 7B's shape: as many whole models, what is stored, what works."""
    config = mixture(experts, chosen)
    count = mm.count_parameters(config)
    seven = mm.count_parameters(mm.MODELS["mistral-7b-v0.2"]).total
    values = {"as whole models": experts * seven / 1e9, "stored": count.total / 1e9,
              "at work for a token": count.active / 1e9}
    gigabytes = {name: value * bits / 8 for name, value in values.items()}
    figure, ax = new_figure(7.8, 2.9)
    names = list(gigabytes)[::-1]
    bars = ax.barh(names, [gigabytes[name] for name in names], height=0.6,
                   color=[BLUE, BLACK, "#9a9a9a"], edgecolor="black")
    bars[0].set_hatch("//")
    for text in ax.bar_label(bars, labels=[f"{gigabytes[n]:.1f} GB, {values[n]:.1f}B"
                                           for n in names], padding=4, fontsize=11):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    for limit, style in ((16, "--"), (80, ":")):
        ax.axvline(limit, ymax=0.86, color=GREEN, linestyle=style, linewidth=1.5, zorder=0)
        ax.text(limit, 2.5, f"{limit} GB", color="#00664a", ha="center", fontsize=11)
    fit = "fits" if gigabytes["stored"] < 80 else "does not fit"
    ax.set(xscale="log", xlim=(1, 3000), ylim=(-0.5, 2.9),
           xlabel=f"GB at {bits:g} bits a weight (log scale)",
           title=f"{experts} x 7B, {min(chosen, experts)} at work: {fit} into 80 GB")
    sentence = (f"{experts} expert{'s' * (experts > 1)}, {min(chosen, experts)} at work, {bits:g} bits: "
                f"{count.total / 1e9:.1f} billion parameters stored, {gigabytes['stored']:.1f} GB; "
                f"{count.active / 1e9:.1f} billion at work; as many whole models would store "
                f"{values['as whole models']:.1f} billion.")
    return figure, sentence, {"": list(values), "billions": [round(v, 2) for v in values.values()],
                              "GB": [round(v, 2) for v in gigabytes.values()]}


# ---------------------------------------------------------------- measuring


def largest_apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors."""
    return (ours - theirs).abs().max().item()


def peak_memory() -> int:
    """Bytes that this process held at its peak; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def peak_while(work: Callable) -> int | None:
    """Bytes by which this process grew at the peak of some work; None where Linux is not asked."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def held(key: str) -> int:
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(x for x in lines if x.startswith(key)).split()[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # give back what was freed, or it is used again
    except (OSError, AttributeError, TypeError):
        pass
    try:
        reset.write_text("5", encoding="utf-8")  # forget the peak so far
        before = held("VmRSS")
    except (OSError, StopIteration):
        return None
    kept = work()
    peak = held("VmHWM") - before
    del kept
    return peak


def save_constant(config: mm.ModelConfig, folder: Path, layout: str = "mistral") -> None:
    """Save a 16-bit model of this shape whose numbers are all the same: made fast, and as large."""
    model = on_meta(config).to(torch.bfloat16).to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.constant_(weight, 0.5)
    mm.save_model(model, folder, layout=layout)
