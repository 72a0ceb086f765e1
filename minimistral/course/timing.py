"""Times that hold on a busy machine, too: those of the processor, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager

import torch


@contextmanager
def one_thread():
    """One thread meanwhile: threads that wait for each other on a busy machine count as work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_seconds(work: Callable, repeats: int = 5) -> float:
    """Seconds of the processor that the fastest of some calls takes, on one thread."""
    times = []
    with one_thread():
        for _ in range(repeats):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
    return min(times)
