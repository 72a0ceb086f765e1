"""What each part of the transformer does: take it out, train, measure. For chapter 4.

    python benchmarks/ablations.py [--seeds 2] [--out FILE]

Every variant of minimistral/course/chapters/ch04_transformer.py is trained on the ladder's tales,
from each seed once (the weights and the batches follow the seed), and judged on its validation
tales. One learning rate serves all of them. Every sample goes into the JSON file.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

from minimistral.course import ladder
from minimistral.course.chapters.ch04_transformer import (
    ABLATION_RUN,
    RESULT,
    VARIANTS,
    build_variant,
    measure_variant,
)
from minimistral.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    variants = [
        {
            "changed": name,
            "parameters": sum(p.numel() for p in build_variant(name, 0).parameters()),
            "nats_per_byte": [],
            "cpu_seconds": [],
        }
        for name in VARIANTS
    ]
    result = {
        "what": "validation loss of small models with one part changed, nats per UTF-8 byte",
        "provenance": provenance(f"python benchmarks/ablations.py --seeds {arguments.seeds}"),
        "run": asdict(ABLATION_RUN),
        "model": asdict(build_variant(next(iter(VARIANTS)), 0).config),
        "seeds": [],
        "floor": ladder.corpus.floor,
        "variants": variants,
    }
    for seed in range(arguments.seeds):  # whole rounds, so that a load on the machine hits all alike
        for entry in variants:
            start = time.process_time()
            loss = measure_variant(entry["changed"], seed)
            entry["nats_per_byte"].append(round(loss, 5))
            entry["cpu_seconds"].append(round(time.process_time() - start, 2))
            entry["median"] = statistics.median(entry["nats_per_byte"])
            print(seed, f"{loss:.4f}", entry["changed"], flush=True)
        result["seeds"] = list(range(seed + 1))
        text = json.dumps(result, indent=1) + "\n"
        arguments.out.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
