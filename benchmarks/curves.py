"""The recorded runs of chapter 5, kept in the package with their provenance.

    python benchmarks/curves.py [curves] [cleaning]

curves     short runs, one healthy and the others with one fault each    assets/curves.json
cleaning   one heap of text in four states, the same number of tokens    assets/cleaning.json
"""

import json
import sys
import time
from dataclasses import asdict

import torch

from minimistral.course.chapters import ch05_training as ch05
from minimistral.course.ladder import ladder
from minimistral.files import write_whole
from minimistral.provenance import provenance


def keep(what: str, facts: dict, began: float) -> None:
    made = provenance(f"python benchmarks/curves.py {what}",
                      processor_seconds=round(time.process_time() - began, 1))
    facts = {"provenance": made, **facts}
    text = json.dumps(facts, ensure_ascii=False)
    write_whole(ch05.ASSETS / f"{what}.json", text + "\n")
    print(f"{what}: {time.process_time() - began:.0f} s", flush=True)


def rounded(run: dict) -> dict:
    return {key: [round(value, 4) for value in values] for key, values in run.items()}


def curves() -> None:
    began, runs = time.process_time(), []
    for use, name, trial, seed in ch05.recorded_trials():
        run = ch05.run_trial(trial, seed)
        runs.append({"use": use, "name": name, "seed": seed, "trial": asdict(trial), **rounded(run)})
        print(f"{name:24} seed {seed}: loss {run['loss'][-1]:.3f}, val {run['val'][-1]:.3f}",
              flush=True)
    floor = ladder.corpus.floor_per_token(ladder.tokenizer)
    keep("curves", {"floor": floor, "every": 20, "runs": runs}, began)


def cleaning() -> None:
    began, rows = time.process_time(), []
    makers = {"small": ch05.ladder_model, "bigger": ch05.wide_model}
    for seed in range(3):
        heaps = ch05.heaps(seed)
        for size, state in [("small", s) for s in heaps] + [("bigger", "raw")]:
            model = makers[size](seed)
            loss = ch05.fixed_budget(heaps[state], model, seed=seed)
            rows.append({"seed": seed, "model": size, "text": state,
                         "parameters": sum(w.numel() for w in model.parameters()),
                         "documents": len(heaps[state]), "nats_per_byte": round(loss, 5)})
            print(rows[-1], flush=True)
            keep("cleaning", {"floor": ladder.corpus.floor, "runs": rows}, began)


def main() -> None:
    torch.set_num_threads(1)
    for what in sys.argv[1:] or ["curves", "cleaning"]:
        {"curves": curves, "cleaning": cleaning}[what]()


if __name__ == "__main__":
    main()
