"""Two processes under torchrun give the losses of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

SCRIPT = Path(__file__).with_name("training_script.py")
LOOPBACK = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux",
    reason="torchrun over gloo on the loopback device is tested on Linux")


def train_with(processes: int, folder: str, settings: dict) -> list[dict]:
    """What each process prints at its end."""
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--nnodes", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), folder, json.dumps(settings)],
        capture_output=True, text=True, env=LOOPBACK, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("settings", [{}, {"accumulation": 3, "optimizer": "muon"},
                                      {"experts": True}], ids=str)
def test_two_processes_give_the_losses_of_one(settings):
    """7 rows: one process takes 4 of them and the other 3, with unequal targets."""
    [alone] = train_with(1, "-", settings)
    first, second = train_with(2, "-", settings)
    assert first == second
    assert len(first["losses"]) == 14 and alone["losses"][-1] < alone["losses"][0] - 0.2
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_two_processes_resume_together(tmp_path):
    whole = train_with(2, "-", {})
    train_with(2, str(tmp_path), {})
    newest = max(tmp_path.iterdir())
    newest.unlink()                                  # what was saved before it is left
    assert train_with(2, str(tmp_path), {}) == whole
    assert max(tmp_path.iterdir()) == newest
