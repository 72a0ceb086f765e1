"""A time limit for code that somebody else wrote.

In the main thread of Unix a timer signal interrupts even a sleep. Elsewhere (Windows, other
threads) a second thread asks the interpreter to raise the exception; it arrives at the next
Python instruction. A loop inside C code is beyond both.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator

REPEAT = 0.05  # seconds; `except: pass` may swallow the first interruption, so it comes again


class TimeIsUp(BaseException):
    """Raised inside the code that ran too long. Not an Exception, so few handlers catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the enclosed code after ``seconds``."""
    in_main = threading.current_thread() is threading.main_thread()
    with _signal_limit(seconds) if in_main and hasattr(signal, "setitimer") else _thread_limit(seconds):
        yield


@contextlib.contextmanager
def _signal_limit(seconds):
    armed = True

    def ring(signum, frame):
        if armed:
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT)
    try:
        yield
    finally:
        while armed:  # the alarm may ring in here, too
            with contextlib.suppress(TimeIsUp):
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
                armed = False


@contextlib.contextmanager
def _thread_limit(seconds):
    target = ctypes.c_ulong(threading.get_ident())
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    finished, turn = threading.Event(), threading.Lock()

    def watch():
        pause = seconds
        while not finished.wait(pause):
            with turn:
                if not finished.is_set():
                    raise_in(target, ctypes.py_object(TimeIsUp))
            pause = REPEAT

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        while not finished.is_set():  # an interruption may arrive in here, too
            with contextlib.suppress(TimeIsUp), turn:
                raise_in(target, None)  # withdraw one that has not arrived yet
                finished.set()
        watcher.join()
