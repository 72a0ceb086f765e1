"""Write the scaled-down checkpoints that chapter 10 compares us with: transformers does all of it.

    python benchmarks/reference_checkpoints.py [--seed 0] [--out minimistral/assets/checkpoints]

Needs transformers. Beside the folders stands provenance.json: versions, command, sizes, hashes.
"""

import argparse
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch

from minimistral.course.chapters import ch10_reference as reference
from minimistral.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=reference.SHIPPED)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in reference.KINDS:
        reference.write(kind, arguments.out / kind, arguments.seed)
    files = sorted(path for kind in reference.KINDS for path in (arguments.out / kind).iterdir())
    made = provenance(
        "python benchmarks/reference_checkpoints.py", seed=arguments.seed,
        transformers=version("transformers"), attention="eager", dtype="float32",
        sha256={f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
                for path in files})
    text = json.dumps(made, indent=2) + "\n"
    path = arguments.out / "provenance.json"
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
