"""What a measurement was made with: the part of every record that lets somebody repeat it."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from minimistral.devices import processor_name


def provenance(command: str, **more: Any) -> dict[str, Any]:
    """Command, time, commit, machine with its load, versions; ``more`` is added, or put instead.

    Take it before the work, so that the load is the others' and not the measurement's own.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_of(Path(__file__).parent),
        "system": platform.platform(terse=True), "machine": platform.machine(),
        "processor": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(), "torch": torch.__version__, **more,
    }


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out in a folder, or None."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None
