"""What the scripts in benchmarks/ measured, for the chapters that show it."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def read_result(path: Path) -> dict:
    """One record, with its provenance."""
    return json.loads(path.read_text(encoding="utf-8"))
