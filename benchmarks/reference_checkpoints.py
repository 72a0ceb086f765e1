"""Write the scaled-down checkpoints that chapter 10 compares us with: transformers does all of it.

    python benchmarks/reference_checkpoints.py [--seed 0] [--out minimistral/assets/checkpoints]

Needs transformers. Beside the folders stands provenance.json: versions, command, sizes, hashes.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from minimistral.course.chapters import ch10_reference as reference
from minimistral.recipes import cpu_name


def provenance(out: Path, seed: int) -> dict:
    """What ran, and what it wrote."""
    import transformers

    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                          capture_output=True, text=True)
    files = sorted(path for kind in reference.KINDS for path in (out / kind).iterdir())
    return {
        "command": "python benchmarks/reference_checkpoints.py", "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": done.stdout.strip() or None,
        "system": platform.platform(terse=True), "processor": cpu_name(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": sys.version.split()[0], "torch": torch.__version__,
        "transformers": transformers.__version__, "attention": "eager", "dtype": "float32",
        "sha256": {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
                   for path in files},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=reference.SHIPPED)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in reference.KINDS:
        reference.write(kind, arguments.out / kind, arguments.seed)
    text = json.dumps(provenance(arguments.out, arguments.seed), indent=2) + "\n"
    path = arguments.out / "provenance.json"
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
