"""Measure a step of training: tokens per second of the shipped models, and what each way of
making it faster is worth.

    python benchmarks/training.py [--threads 1] [--out FILE]
    python benchmarks/training.py --beside S-float32 S-bfloat16 X-float32 [--threads 2]

Random tokens, as speed does not depend on what they say. Every sample goes into the JSON file,
with what ran it; the processor's time is the steadier one on a machine that does other work too.
The second form trains the same weights in transformers as well, step by step in turns with ours,
both with fused AdamW, compiled and not; it adds its rows to the file.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.inference import CONFIGS, in_transformers, lively      # noqa: E402

from minimistral import train_run
from minimistral.onednn import wide_products
from minimistral.provenance import provenance
from minimistral.recipes import RECIPES, new_model, quick_products
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


# name: shape of benchmarks/inference.py, rows of 256 tokens, bfloat16 products, compiled, too
BESIDE = {"S-float32": ("S", 8, False, True), "S-bfloat16": ("S", 8, True, True),
          "X-float32": ("X", 4, False, False)}          # compiling X takes minutes


def steps_of(model, ids, bfloat16: bool, adamw, compiled: bool):
    """One step of training by everybody's own forward and PyTorch's own loss and optimiser."""
    run = torch.compile(model, dynamic=False) if compiled else model
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = run(inputs)
        logits = getattr(logits, "logits", logits)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(),
                                                 targets.flatten())
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        return float(loss.detach())
    return step


def ours(model, ids, bfloat16: bool, compiled: bool, wide: bool = False):
    """One step of `minimistral.train`, with its schedule and clipping. `wide`: float32 products
    by oneDNN, as the command `minimistral train` and compiled training have them."""
    batch, length = ids.shape[0], ids.shape[1] - 1
    config = TrainConfig(steps=10_000, batch_size=batch, seq_len=length,
                         dtype="bfloat16" if bfloat16 else "float32", compile=compiled)
    optimizers, stack = make_optimizers(model, config), contextlib.ExitStack()
    if wide or compiled:
        stack.enter_context(wide_products(model))
    if compiled:
        stack.enter_context(train_run.compiled_layers(model))
    count = iter(range(10_000))

    def step(stack=stack) -> float:                    # which lives as long as the step
        attention = train_run.matmul_attention() if compiled else contextlib.nullcontext()
        with attention:                                # as train_run.py does
            loss = float(accumulate_gradients(model, (ids[:, :-1], ids[:, 1:]), config))
        update(model, optimizers, next(count), config)
        return loss
    return step


def beside(name: str, samples: int) -> dict:
    """Seconds of training steps, all contestants in turns: `minimistral.train`, and both models
    in one and the same loop, without clipping and schedule."""
    shape, batch, bfloat16, compiling = BESIDE[name]
    base = lively(CONFIGS[shape])
    torch.manual_seed(SEED)
    ids = torch.randint(3, base.config.vocab_size, (batch, 257))
    steps = {}
    if not bfloat16:
        mine = copy.deepcopy(base).requires_grad_(True).train()
        steps["minimistral.train, oneDNN"] = ours(mine, ids, bfloat16, False, wide=True)
    for compiled in (False, True)[:1 + compiling]:
        words = "compiled" if compiled else "eager"
        mine = copy.deepcopy(base).requires_grad_(True).train()
        steps[f"minimistral.train, {words}"] = ours(mine, ids, bfloat16, compiled)
        mine = copy.deepcopy(base).requires_grad_(True).train()
        adamw = torch.optim.AdamW(mine.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
        steps[f"minimistral, {words}"] = steps_of(mine, ids, bfloat16, adamw, compiled)
        theirs = in_transformers(base).requires_grad_(True).train()
        theirs.config.use_cache = False
        adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
        steps[f"transformers, {words}"] = steps_of(theirs, ids, bfloat16, adamw, compiled)
        if bfloat16:
            theirs = in_transformers(base).requires_grad_(True).train()
            theirs.config.use_cache = False
            adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-3, betas=(0.9, 0.95),
                                      fused=True)
            steps[f"float32 in transformers, {words}"] = steps_of(theirs, ids, False, adamw,
                                                                  compiled)
    seconds, failed = {}, {}
    for way in list(steps):
        try:
            first = [steps[way]() for _ in range(WARM_UP)]
            print(way, "first losses", first, flush=True)
            seconds[way] = []
        except Exception as error:                     # a peer that can't be compiled
            failed[way] = f"{type(error).__name__}: {str(error)[:200]}"
    for _ in range(samples):
        for way in seconds:
            memory = (train_run.kept_memory() if way.startswith("minimistral.train") else
                      contextlib.nullcontext())        # as train_run.py does
            with memory:
                steps[way]()                           # the one before it was another's
                begun = time.perf_counter()
                steps[way]()
                seconds[way].append(round(time.perf_counter() - begun, 4))
    median = {way: statistics.median(times) for way, times in seconds.items()}
    theirs = min(m for way, m in median.items() if way.startswith("transformers"))
    return {"what": f"{name}: one step of {batch} x 256 tokens", "unit": "tokens/s",
            "seconds": seconds, "failed": failed,
            "median": {way: round(batch * 256 / m, 1) for way, m in median.items()},
            "times_faster_than_transformers": {
                way: round(theirs / m, 3) for way, m in median.items()}}


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
    parser.add_argument("--beside", nargs="+", choices=BESIDE, help="rows with transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.beside or ():
        about = provenance(
            f"python benchmarks/training.py --beside {name} --threads {arguments.threads}",
            seed=SEED, warm_up_steps=WARM_UP, threads=arguments.threads,
            transformers=importlib.metadata.version("transformers"))
        row = beside(name, arguments.samples) | {"provenance": about}
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
        result.setdefault("beside_transformers", {})[name] = row
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8",
                                 newline="\n")
        print(name, json.dumps(row["times_faster_than_transformers"]), row["failed"], flush=True)
    if arguments.beside:
        return
    run = provenance("python benchmarks/training.py", seed=SEED, warm_up_steps=WARM_UP,
                     threads=arguments.threads)
    rows = []
    for name in RECIPES:
        for way in WAYS:
            rows.append(measure(name, way, arguments.samples))
            print(name, way, rows[-1]["tokens_per_cpu_second"], flush=True)
    old = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    result = {"what": "one training step of the shipped models: seconds of wall and processor",
              "provenance": run, "steps": rows,
              "beside_transformers": old.get("beside_transformers", {})}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
