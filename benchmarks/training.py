"""Measure a step of training: tokens per second of the shipped models, and what each way of
making it faster is worth.

    python benchmarks/training.py [--threads 1] [--out FILE]

Random tokens, as speed does not depend on what they say. Every sample goes into the JSON file,
with what ran it; the processor's time is the steadier one on a machine that does other work too.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from minimistral import train_run
from minimistral.recipes import RECIPES, cpu_name, new_model, quick_products
from minimistral.train import (Tokens, TrainConfig, accumulate_gradients, make_optimizers,
                               training_batch, update)

SEED, WARM_UP = 0, 2

# name: (fused attention instead of matrix products, bfloat16 products, compiled, optimiser)
WAYS = {                              # fused attention, bfloat16 products, compiled, optimizer
    "fused attention": (True, False, False, "adamw"),
    "attention by matrix products": (False, False, False, "adamw"),
    "fused, products in bfloat16": (True, True, False, "adamw"),
    "fused, bfloat16, compiled": (True, True, True, "adamw"),
    "matrix products, bfloat16, compiled": (False, True, True, "adamw"),
    "matrix products, bfloat16, compiled, Muon": (False, True, True, "muon"),
}


def provenance(threads: int) -> dict:
    """What ran: machine, load, versions, command, commit."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                          capture_output=True, text=True)
    return {
        "command": "python benchmarks/training.py", "seed": SEED, "warm_up_steps": WARM_UP,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": done.stdout.strip() or None,
        "system": platform.platform(terse=True), "processor": cpu_name(),
        "cores": os.cpu_count(), "threads": threads,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": sys.version.split()[0], "torch": torch.__version__,
    }


def measure(name: str, way: str, samples: int) -> dict:
    """Seconds of each step, after steps that do not count (the first of them compiles)."""
    fused, bfloat16, compiled, optimizer = WAYS[way]
    torch._dynamo.reset()                          # what another way compiled counts no more
    recipe = RECIPES[name]
    config = replace(recipe.training, optimizer=optimizer)
    torch.manual_seed(SEED)
    ids = torch.randint(20, recipe.model.vocab_size, (200_000,))
    tokens = Tokens(ids, torch.arange(0, 200_000, 75))
    model = new_model(recipe, config)
    optimizers = make_optimizers(model, config)
    wall, cpu = [], []
    with contextlib.ExitStack() as stack:
        if not fused:
            stack.enter_context(train_run.matmul_attention())
        if bfloat16:
            stack.enter_context(quick_products())
        if compiled:
            stack.enter_context(train_run.compiled_layers(model))
        for step in range(WARM_UP + samples):
            start = time.perf_counter(), time.process_time()
            one_step(model, optimizers, tokens, step, config)
            wall.append(round(time.perf_counter() - start[0], 4))
            cpu.append(round(time.process_time() - start[1], 4))
    per_step = config.batch_size * config.seq_len
    best = min(cpu[WARM_UP:])
    return {"model": name, "way": way, "tokens_per_step": per_step,
            "wall_seconds": wall[WARM_UP:], "cpu_seconds": cpu[WARM_UP:],
            "warm_up_wall_seconds": wall[:WARM_UP],
            "tokens_per_cpu_second": round(per_step / best)}


def one_step(model, optimizers, tokens: Tokens, step: int, config: TrainConfig) -> float:
    batch = training_batch(tokens, step, config)
    loss = float(accumulate_gradients(model, batch, config))
    update(model, optimizers, step, config)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "training.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = provenance(arguments.threads)
    rows = []
    for name in RECIPES:
        for way in WAYS:
            rows.append(measure(name, way, arguments.samples))
            print(name, way, rows[-1]["tokens_per_cpu_second"], flush=True)
    result = {"what": "one training step of the shipped models: seconds of wall and processor",
              "provenance": run, "steps": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
