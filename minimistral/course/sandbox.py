"""Run the learner's code so that nothing it does harms the notebook it runs in."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .watchdog import TimeIsUp, time_limit

KEEP_PRINTED = 1000  # characters


@dataclass
class Run:
    """What happened when a function was called."""

    value: Any = None
    error: BaseException | None = None
    printed: str = ""  # the beginning
    printed_length: int = 0
    restored: list[str] = field(default_factory=list)  # global things it had changed
    seconds: float = 0.0

    @property
    def timed_out(self) -> bool:
        return isinstance(self.error, TimeIsUp)


class _Capped(io.TextIOBase):
    """Takes any amount of text, keeps the beginning, counts the rest."""

    encoding = "utf-8"

    def __init__(self):
        self.kept, self.length = "", 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        text = str(text)
        self.kept += text[: max(0, KEEP_PRINTED - len(self.kept))]
        self.length += len(text)
        return len(text)


def _numpy_state():
    name, keys, *rest = np.random.get_state()
    return name, keys.tobytes(), *rest


def _set_numpy_state(state):
    name, keys, *rest = state
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))


# what a careless function may change: name -> (read, restore)
GLOBALS: dict[str, tuple[Callable, Callable]] = {
    "torch's global random state": (
        lambda: torch.get_rng_state().numpy().tobytes(),
        lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    ),
    "NumPy's global random state": (_numpy_state, _set_numpy_state),
    "Python's global random state": (random.getstate, random.setstate),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "the working folder": (os.getcwd, os.chdir),
}


def _no_input(prompt=""):
    raise RuntimeError("a checked function cannot ask for keyboard input")


@contextlib.contextmanager
def _globals_restored(restored: list[str]):
    """Start from fixed seeds, put everything back, and note what the code itself changed."""
    outside = {name: read() for name, (read, _) in GLOBALS.items()}
    torch.default_generator.manual_seed(0), np.random.seed(0), random.seed(0)
    start = {name: read() for name, (read, _) in GLOBALS.items()}
    real_input, builtins.input = builtins.input, _no_input
    try:
        yield
    finally:
        builtins.input = real_input
        for name, (read, restore) in GLOBALS.items():
            now = read()
            if now != start[name]:
                restored.append(name)
            if now != outside[name]:
                restore(outside[name])


def guarded(function: Callable, *args, seconds: float = 10.0, **kwargs) -> Run:
    """Call ``function``; survive errors, endless loops, floods of text and sys.exit.

    Random state is fixed before the call and put back after it, so that two calls agree.
    """
    run, text = Run(), _Capped()
    began = time.perf_counter()
    with _globals_restored(run.restored), warnings.catch_warnings():
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                with time_limit(seconds):
                    run.value = function(*args, **kwargs)
            except BaseException as error:  # SystemExit, KeyboardInterrupt and TimeIsUp too
                run.error = error
    run.seconds = time.perf_counter() - began
    run.printed, run.printed_length = text.kept, text.length
    return run
