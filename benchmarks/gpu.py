"""Measure an NVIDIA GPU: what it can do at best, and how near the engine comes to that.

    python benchmarks/gpu.py [--only decode-7b ...] [--out FILE]
    python benchmarks/gpu.py --tiny --device cpu          the same code with tiny shapes, as a test

First the two numbers to which everything is held: bytes per second of a copy, and operations per
second of a matrix product. Then the shapes of published models with random bfloat16 weights, as
speed does not depend on what the weights say. Medians; all samples are kept in the JSON file.
Rows: decode-7b batch-7b int8-7b int4-7b window-7b prefill-7b decode-mixtral training-350m
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from minimistral.config import (MODELS, ModelConfig, MoEConfig, cache_bytes_per_token,
                                count_parameters)
from minimistral.devices import describe_device
from minimistral.engine import Engine
from minimistral.model import Transformer
from minimistral.provenance import provenance
from minimistral.quantize import quantize_model, use_kernels

SEED, BFLOAT16 = 0, torch.bfloat16
TINY = ModelConfig(64, 2, 4, 2, 16, 96, 128, sliding_window=32)
SHAPES = {"7b": MODELS["mistral-7b-v0.1"], "mixtral": MODELS["mixtral-8x7b-v0.1"],
          "350m": ModelConfig(1024, 24, 16, 4, 64, 2816, 32000)}
TINY_SHAPES = {"7b": TINY, "mixtral": replace(TINY, moe=MoEConfig(4, 2), sliding_window=None),
               "350m": replace(TINY, sliding_window=None)}


class Bench:
    """The device, the shapes and the lengths: real ones, or tiny ones for a test."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny = device, tiny
        self.shapes = TINY_SHAPES if tiny else SHAPES
        self.rounds = 2 if tiny else 7
        self.new = 4 if tiny else 200                     # tokens written in a sample
        self.copy_bytes = 2**20 if tiny else 4 * 2**30
        self.square = 64 if tiny else 8192
        self.batches = (1, 2) if tiny else (1, 2, 4, 8, 16, 32, 64)
        self.places = (32, 96) if tiny else (1024, 4096, 16_384, 131_072)
        self.prompt = 96 if tiny else 16_384
        self.training = (2, 16) if tiny else (16, 2048)   # rows and tokens of a batch
        self.chunk = 16 if tiny else 2048
        self.compile = False if tiny else "auto"

    def finish(self) -> None:
        """Wait until the device has done all that it was told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable, rounds: int | None = None, warm_up: int = 2) -> list[float]:
        """The time of each call, the device having finished before and after it."""
        samples = []
        for turn in range(warm_up + (rounds or self.rounds)):
            self.finish()
            begun = time.perf_counter()
            run()
            self.finish()
            samples.append(time.perf_counter() - begun)
        return [round(s, 7) for s in samples[warm_up:]]

    def model(self, name: str) -> Transformer:
        """Random weights, drawn where and as they are needed."""
        torch.manual_seed(SEED)
        before = torch.get_default_dtype()
        torch.set_default_dtype(BFLOAT16)
        try:
            with torch.device(self.device):
                return Transformer(self.shapes[name]).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(before)

    def ids(self, name: str, length: int) -> list[int]:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(3, self.shapes[name].vocab_size, (length,),
                             generator=generator).tolist()


@contextmanager
def room(bench: Bench):
    """What the last row held is given back before the next one begins."""
    try:
        yield
    finally:
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- what it can do at best


def measured_limits(bench: Bench) -> dict:
    """Bytes per second of a copy (read and written), operations per second of a product."""
    source = torch.ones(bench.copy_bytes // 2, dtype=BFLOAT16, device=bench.device)
    target = torch.empty_like(source)
    copy = bench.seconds(lambda: target.copy_(source))
    a, b = (torch.randn(bench.square, bench.square, device=bench.device).to(BFLOAT16)
            for _ in range(2))
    product = bench.seconds(lambda: a @ b)
    return {"copy_seconds": copy, "copy_bytes": 2 * source.nbytes,
            "bytes_per_second": 2 * source.nbytes / statistics.median(copy),
            "product_seconds": product, "product_operations": 2 * bench.square**3,
            "operations_per_second": 2 * bench.square**3 / statistics.median(product)}


# ---------------------------------------------------------------- writing


def bytes_per_token(config: ModelConfig, position: int, bits: float = 16) -> int:
    """What one step for one text must read: active weights but the embeddings, of which it
    reads one row, and the keys and values within the window."""
    matrices = count_parameters(config).active - config.vocab_size * config.dim
    seen = min(position, config.window(0) or position)
    return int(matrices * bits / 8) + seen * cache_bytes_per_token(config, BFLOAT16)


def decode_row(bench: Bench, limits: dict, name: str, bits: int = 16) -> dict:
    """Tokens per second of one text, and the share of the measured bandwidth that this is."""
    model = bench.model(name)
    group = None if bits == 8 else 32 if bench.tiny else 128
    if bits < 16:                                  # without the kernels weights are made anew
        use_kernels(quantize_model(model, bits, group), output=True)
    engine = Engine(model, max_length=64 + bench.new, chunk=bench.chunk, compile=bench.compile)
    prompt = bench.ids(name, 32)
    seconds = bench.seconds(lambda: engine.generate(prompt, bench.new))
    rate = bench.new / statistics.median(seconds)
    stored = 4 + 32 / group if bits == 4 else bits      # the kernel's pairs: scale and zero point
    needed = bytes_per_token(bench.shapes[name], 32 + bench.new // 2, stored)
    row = {"seconds": seconds, "new_tokens": bench.new, "tokens_per_second": rate,
           "bytes_per_token": needed, "engine": engine.describe(),
           "share_of_bandwidth": rate * needed / limits["bytes_per_second"]}
    if bits == 16 and importlib.util.find_spec("transformers") and not model.config.moe:
        row["transformers"] = transformers_rate(bench, name, prompt)
    return row


def transformers_rate(bench: Bench, name: str, prompt: list[int]) -> dict:
    """The same shape in transformers, with random weights of its own, its default settings."""
    from transformers import AutoModelForCausalLM, MistralConfig
    from transformers import __version__ as version
    c = bench.shapes[name]
    config = MistralConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_heads, sliding_window=c.window(0), eos_token_id=None)
    with torch.device(bench.device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=BFLOAT16).eval()
    ids = torch.tensor([prompt], device=bench.device)

    def write():
        with torch.no_grad():
            theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=bench.new, min_new_tokens=bench.new, pad_token_id=0)

    seconds = bench.seconds(write, rounds=2, warm_up=1)
    return {"version": version, "seconds": seconds,
            "tokens_per_second": bench.new / statistics.median(seconds)}


def batch_row(bench: Bench, limits: dict, name: str) -> dict:
    """Milliseconds of a step, and tokens per second, for more and more texts at once."""
    model, rows = bench.model(name), {}
    for batch in bench.batches:
        engine = Engine(model, batch, max_length=256, chunk=bench.chunk, compile=bench.compile)
        ids = [[7 + row] for row in range(batch)]     # a mixture must wake more than one text's experts
        positions = [[100]] * batch
        seconds = bench.seconds(lambda: engine.run(ids, positions)[1].tolist(), 5 * bench.rounds)
        step = statistics.median(seconds)
        rows[str(batch)] = {"seconds": seconds, "ms_per_step": 1000 * step,
                            "tokens_per_second": batch / step}
        del engine
    return {"batches": rows}


def window_row(bench: Bench, limits: dict, name: str) -> dict:
    """Milliseconds per token far into a text: with a window they stay the same."""
    engine = Engine(bench.model(name), chunk=bench.chunk, compile=bench.compile)
    text, rows = bench.ids(name, bench.places[-1] + 1), {}
    at = 0
    for place in bench.places:
        engine.read(0, text[at:place], at)
        at = place
        seconds = bench.seconds(lambda: engine.run([[text[at]]], [[at]])[1].tolist(),
                                10 * bench.rounds)
        rows[str(place)] = {"seconds": seconds, "ms_per_token": 1000 * statistics.median(seconds)}
    return {"positions": rows, "cache_bytes": engine.fast.nbytes}


# ---------------------------------------------------------------- reading and training


def operations(config: ModelConfig, length: int) -> float:
    """Multiplications and additions to read a prompt: two for each weight and token, and
    four for each number of a query's head and each key it may look at."""
    blocks = count_parameters(config).active - 2 * config.vocab_size * config.dim
    window = min(config.window(0) or length, length)
    pairs = window * (window + 1) / 2 + (length - window) * window
    return (2 * blocks * length + 4 * config.n_layers * config.n_heads * config.head_dim * pairs
            + 2 * config.vocab_size * config.dim)


def prefill_row(bench: Bench, limits: dict, name: str) -> dict:
    """Seconds to read a long prompt in chunks, and the share of the measured matrix rate."""
    engine = Engine(bench.model(name), compile=False, chunk=bench.chunk)
    text = bench.ids(name, bench.prompt)

    def read():
        engine.fast.forget(0)
        engine.read(0, text)

    seconds = bench.seconds(read, rounds=3, warm_up=1)
    needed = operations(bench.shapes[name], bench.prompt)
    rate = needed / statistics.median(seconds)
    return {"seconds": seconds, "tokens": bench.prompt, "operations": needed,
            "tokens_per_second": bench.prompt / statistics.median(seconds),
            "share_of_matrix_rate": rate / limits["operations_per_second"]}


def training_row(bench: Bench, limits: dict, name: str) -> dict:
    """Tokens per second of training steps: bfloat16 products, compiled, fused AdamW."""
    config, (rows, length) = bench.shapes[name], bench.training
    torch.manual_seed(SEED)
    with torch.device(bench.device):
        model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (rows, length + 1), device=bench.device)
    forward = model if bench.tiny else torch.compile(model)

    def step():
        with torch.autocast(bench.device.type, BFLOAT16):
            logits = forward(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = bench.seconds(step, warm_up=3)
    needed = 3 * rows * (operations(config, length)                   # forward, twice back
                         + 2 * config.vocab_size * config.dim * (length - 1))
    rate = needed / statistics.median(seconds)
    return {"seconds": seconds, "tokens_per_step": rows * length, "operations": needed,
            "parameters": count_parameters(config).total,
            "tokens_per_second": rows * length / statistics.median(seconds),
            "share_of_matrix_rate": rate / limits["operations_per_second"]}


ROWS: dict[str, Callable[[Bench, dict], dict]] = {
    "decode-7b": lambda bench, limits: decode_row(bench, limits, "7b"),
    "batch-7b": lambda bench, limits: batch_row(bench, limits, "7b"),
    "int8-7b": lambda bench, limits: decode_row(bench, limits, "7b", bits=8),
    "int4-7b": lambda bench, limits: decode_row(bench, limits, "7b", bits=4),
    "window-7b": lambda bench, limits: window_row(bench, limits, "7b"),
    "prefill-7b": lambda bench, limits: prefill_row(bench, limits, "7b"),
    "decode-mixtral": lambda bench, limits: decode_row(bench, limits, "mixtral"),
    "training-350m": lambda bench, limits: training_row(bench, limits, "350m"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a test of the code")
    parser.add_argument("--out", type=Path)
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    if chosen.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here, so nothing is measured; "
                         "--tiny --device cpu tests the code")
    bench = Bench(torch.device(chosen.device), chosen.tiny)
    result = {"what": "an NVIDIA GPU: its limits, and how near the engine comes",
              "provenance": provenance(" ".join(["python benchmarks/gpu.py", *given]), seed=SEED,
                                       **describe_device(bench.device, BFLOAT16)), "limits": measured_limits(bench), "rows": {}}
    results = Path(__file__).parent / "results"
    out = chosen.out or (None if chosen.tiny else results / "gpu.json")
    if out is not None and out.exists():
        result["rows"] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    for name in chosen.only:
        with room(bench):
            print(name, "...", flush=True)
            try:
                row = ROWS[name](bench, result["limits"])
            except (MemoryError, torch.OutOfMemoryError) as error:
                row = {"not_measured": str(error)}
        result["rows"][name] = row
        print(name, {k: v for k, v in row.items() if isinstance(v, float | str)}, flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
