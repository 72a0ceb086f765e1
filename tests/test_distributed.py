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


SETTINGS = [{}, {"accumulation": 3, "optimizer": "muon"}, {"experts": True}]


def train_with(processes: int, settings: list[dict]) -> list[dict]:
    """What the processes print, in the order of the settings."""
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--nnodes", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), json.dumps(settings)],
        capture_output=True, text=True, env=LOOPBACK, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: line["number"])


def test_two_processes_give_the_losses_of_one_and_resume_together(tmp_path):
    """7 rows: one process takes 4 of them and the other 3, with unequal targets. The last
    run goes on from a checkpoint of one process that lost its final steps."""
    alone = train_with(1, [*SETTINGS, {"folder": str(tmp_path)}])
    newest = max(tmp_path.iterdir())
    newest.unlink()
    together = train_with(2, [*SETTINGS, {"folder": str(tmp_path)}])
    assert together[::2] == together[1::2] and len(together) == 8      # both the same bits
    for one, two in zip(alone, together[::2], strict=True):
        assert len(two["losses"]) == 14 and two["losses"][-1] < two["losses"][0] - 0.2
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert together[6]["losses"][:12] == alone[3]["losses"][:12]       # those it began with
    assert together[6]["weights"] != together[0]["weights"]
    assert max(tmp_path.iterdir()) == newest
