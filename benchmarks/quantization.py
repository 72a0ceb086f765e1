"""Bytes against speed: one token of a dense model in float32, bfloat16, 8 and 4 bits, on the CPU.

    python benchmarks/quantization.py [--threads 2] [--rounds 15] [--out FILE]
    python benchmarks/quantization.py --memory          (that alone, into the same file)

The model has the shape M of the README's benchmarks with random weights, so only time and memory
mean anything, no text. Every variant decodes one token at a time after the same prompt, through the
plain `Transformer` and its cache; the output layer is called like any other layer. The variants
take turns (A B C A B C ...), and the median over the rounds counts. With one thread the clock is the
process's own, which stands still while other programs run; with more it is the wall's. The memory is
the process's peak while a checkpoint of M becomes a model in 8 bits.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import minimistral as mm
from minimistral.quantize import QuantizedLinear
from minimistral.provenance import provenance

OUT = Path(__file__).parent / "results" / "quantization.json"
SHAPE = dict(dim=768, n_layers=12, n_heads=12, n_kv_heads=4, head_dim=64, hidden_dim=2048,
             vocab_size=32000, sliding_window=1024)
PROMPT, WARM_UP, STEPS = 64, 2, 4


def bytes_read(model: mm.Transformer) -> int:
    """Bytes of weights that one token reads: all but the table of token embeddings."""
    return sum(x.nbytes for name, x in model.state_dict().items() if "tok_emb" not in name)


def variants() -> dict[str, mm.Transformer]:
    torch.manual_seed(0)
    base = mm.Transformer(mm.ModelConfig(**SHAPE)).eval()
    half = copy.deepcopy(base).to(torch.bfloat16)
    eight = mm.quantize_model(copy.deepcopy(half), 8)
    four = mm.quantize_model(copy.deepcopy(half), 4, 32)
    mm.use_kernels(four, output=True)
    plain = mm.quantize_model(copy.deepcopy(half), 8)
    for layer in plain.modules():
        if isinstance(layer, QuantizedLinear):
            layer.kernel = False
    return {"float32": base, "bfloat16": half, "8 bits, kernel": eight,
            "4 bits, groups of 32, kernel": four, "8 bits, plain path": plain}


@torch.no_grad()
def decode(model: mm.Transformer, ids: torch.Tensor, steps: int) -> list[float]:
    """Milliseconds of each of some greedy steps after a prompt."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    cache = mm.KVCache(model.config, dtype=model.tok_embeddings.weight.dtype)
    x = model.features(ids, cache)[:, -1:]
    times = []
    for _ in range(steps):
        began = clock()
        token = model.output(x).float().argmax(-1)
        x = model.features(token, cache)
        times.append(1000 * (clock() - began))
    return times


MEASURE_MEMORY = """
import sys, torch, minimistral as mm
from pathlib import Path
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(key)).split()[1])
torch.set_num_threads(1)
mm.load_quantized("tales-dense", 8)                # what is imported at first use
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
model = mm.load_quantized(sys.argv[1], 8)
print(memory("VmHWM") - before, sum(x.nbytes for x in model.state_dict().values()))
"""


def load_memory(model: mm.Transformer) -> dict | None:
    """Peak bytes while M is loaded from a float32 checkpoint in 8 bits; Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        mm.save_model(model, folder)
        runs = [subprocess.run([sys.executable, "-c", MEASURE_MEMORY, folder], check=True,
                               capture_output=True, text=True) for _ in range(3)]
    peaks, results = zip(*(map(int, run.stdout.split()) for run in runs))
    peak, result = median(peaks), results[0]
    floats = [w.nbytes for w in model.parameters()]
    return {"what": "load_quantized of M in 8 bits from a float32 checkpoint",
            "peak_bytes": peak, "peak_bytes_of_each_run": list(peaks), "result_bytes": result,
            "float32_model_bytes": sum(floats),
            "largest_float32_tensor_bytes": max(floats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=240, help="no new round after these")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--memory", action="store_true", help="measure the memory alone")
    arguments = parser.parse_args()
    if arguments.memory:
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
        torch.manual_seed(0)
        result["memory"] = load_memory(mm.Transformer(mm.ModelConfig(**SHAPE)).eval())
        result["memory"]["provenance"] = provenance(
            "python benchmarks/quantization.py --memory", threads=1)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8",
                                 newline="\n")
        print(result["memory"])
        return
    torch.set_num_threads(arguments.threads)
    about = provenance("python benchmarks/quantization.py " + " ".join(sys.argv[1:]), seed=0,
                       threads=arguments.threads,
                       instructions=torch.backends.cpu.get_cpu_capability())
    began = time.monotonic()
    models = variants()
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPE["vocab_size"], (1, PROMPT), generator=chance)
    samples: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        decode(model, ids, WARM_UP)
    for done in range(arguments.rounds):
        if done >= 3 and time.monotonic() - began > arguments.seconds:
            break
        for name, model in models.items():
            samples[name] += decode(model, ids, STEPS)
    result = {
        "what": "milliseconds for one token, batch 1, random weights in the shape M",
        "shape": SHAPE, "prompt": PROMPT, "warm_up_steps": WARM_UP, "steps_per_round": STEPS,
        "clock": "process" if arguments.threads == 1 else "wall",
        "variants": {name: {
            "bytes_read_per_token": bytes_read(model), "median_ms": round(median(times), 3),
            "best_ms": round(min(times), 3), "samples_ms": [round(t, 3) for t in times]}
            for (name, model), times in zip(models.items(), samples.values())},
        "memory": load_memory(models["float32"]),
        "provenance": about | {"load_after": os.getloadavg()[0] if hasattr(os, "getloadavg")
                               else None},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    for name, row in result["variants"].items():
        print(f"{name:30} {row['bytes_read_per_token'] / 1e6:7.1f} MB  {row['median_ms']:8.2f} ms "
              f"(best {row['best_ms']:.2f})")
    print(result["memory"])


if __name__ == "__main__":
    main()
