"""What does a short window cost in quality, after a short training and after a longer one?

    python benchmarks/window_ladder.py [--steps 120 480] [--seeds 0] [--out FILE]

Each run is the ladder's training (tales, tokenizer, batches) with nothing changed but the window of
the model and the number of steps. A run that is in the file already is not repeated: delete the
file to measure everything again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from minimistral.course import ladder
from minimistral.course.chapters import ch08_sliding_window as ch08
from minimistral.provenance import provenance

WINDOWS = (None, 16, 4)
SHORT = {4}                     # windows that are trained for the standard number of steps only


def measure(window: int | None, steps: int, seed: int) -> dict:
    """One training and its judgement. Losses do not depend on the machine's speed."""
    model = ch08.ladder_model(window, seed)
    start = time.perf_counter(), time.process_time()
    ladder.fit(model, seed=seed, steps=steps)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return {
        "window": window, "steps": steps, "seed": seed,
        "nats_per_byte": ch08.nats_per_byte(model), "floor": ladder.corpus.floor,
        "wall_seconds": round(seconds[0], 1), "cpu_seconds": round(seconds[1], 1),
        "provenance": provenance("python benchmarks/window_ladder.py"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ch08.RUNGS)
    parser.add_argument("--steps", type=int, nargs="+", default=[ladder.standard.steps, 480])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = arguments.out
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    done = {(run["window"], run["steps"], run["seed"]) for run in runs}
    wanted = [(window, steps, seed) for seed in arguments.seeds for steps in arguments.steps
              for window in WINDOWS if steps == ladder.standard.steps or window not in SHORT]
    for key in wanted:
        if key in done:
            continue
        runs.append(measure(*key))
        print(*key, f"{runs[-1]['nats_per_byte']:.4f} nats per byte", flush=True)
        result = {"what": "the ladder's run with and without a window, short and longer",
                  "runs": runs}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
