"""What do fewer key/value heads cost in quality? The ladder's model with 8, 4 and 1 of them.

    python benchmarks/shared_heads.py [--steps 120] [--seeds 0 1 2] [--out FILE]

Each run is the ladder's standard training (tales, tokenizer, batches) with nothing changed but the
number of key/value heads. One model more has a single one, and in a wider feed-forward the
parameters which that saves. A run that is in the file already is not repeated: delete the file to
measure everything again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import minimistral as mm
from minimistral.course import ladder
from minimistral.course.chapters import ch07_shared_heads as ch07
from minimistral.provenance import provenance

# name: key/value heads, width of the feed-forward
MODELS = {"K = 8": (8, 192), "K = 4": (4, 192), "K = 1": (1, 192),
          "K = 1, wider feed-forward": (1, 248)}


def measure(name: str, steps: int, seed: int) -> dict:
    """One training and its judgement. Losses do not depend on the machine's speed."""
    kv_heads, hidden = MODELS[name]
    model = ch07.ladder_model(kv_heads, hidden, seed)
    start = time.perf_counter(), time.process_time()
    ladder.fit(model, seed=seed, steps=steps)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return {
        "model": name, "n_kv_heads": kv_heads, "hidden_dim": hidden, "steps": steps, "seed": seed,
        "parameters": mm.count_parameters(model.config).total,
        "cache_bytes_per_token": mm.cache_bytes_per_token(model.config, torch.float32),
        "nats_per_byte": ch07.nats_per_byte(model), "floor": ladder.corpus.floor,
        "wall_seconds": round(seconds[0], 1), "cpu_seconds": round(seconds[1], 1),
        "provenance": provenance("python benchmarks/shared_heads.py"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ch07.RECORDED)
    parser.add_argument("--steps", type=int, nargs="+", default=[ladder.standard.steps])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = arguments.out
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    done = {(run["model"], run["steps"], run["seed"]) for run in runs}
    wanted = [(name, steps, seed) for steps in arguments.steps for seed in arguments.seeds
              for name in MODELS]
    for key in wanted:
        if key in done:
            continue
        runs.append(measure(*key))
        print(*key, f"{runs[-1]['nats_per_byte']:.4f} nats per byte", flush=True)
        result = {"what": "the ladder's standard run with 8, 4 and 1 key/value heads",
                  "runs": runs}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
