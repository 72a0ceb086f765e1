"""Limits for a process that runs somebody else's notebook, and its end with all it has started.

Inside (`close_in`): limits of the kernel on memory, file size and processes; on Linux, where it is
allowed, namespaces of its own (no network but loopback, no sight of other processes) and Landlock
(writing in its own folder alone). Outside (`watch`): time, memory, processes, output and disk, looked
at ten times a second. This guards against mistakes and mischief. It is no security sandbox.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

stop = threading.Event()  # set: whatever is watched ends now
PAUSE = 0.1  # seconds between two looks
LONGEST_LOOK = 1.0  # what is longer was a pause of the machine
START = 120  # seconds that Python may take before the first cell
MB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one notebook may use."""

    seconds: float = 180.0
    memory_gb: float = 4.0
    output_mb: float = 20.0  # printed
    disk_mb: float = 500.0  # in its own folder
    processes: int = 32


# ---------------------------------------------------------------- inside the process


def close_in(folder: Path, limits: Limits, *, namespaces: bool, landlock: bool) -> None:
    """Give this process its limits; for good. What is asked for and fails raises OSError.

    With namespaces the rest of the program goes on in a child, and this call never returns here.
    """
    _kernel_limits(limits)
    if namespaces:
        _enter_namespaces()
    if landlock:
        _write_only_below(folder)


def _kernel_limits(limits: Limits) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    memory = int(limits.memory_gb * 2**30)
    wanted = {
        "RLIMIT_DATA": memory,  # own memory; a share of the address space is the library's files
        "RLIMIT_FSIZE": int(limits.disk_mb * MB),
        "RLIMIT_CPU": int(2 * limits.seconds) + 1,
        "RLIMIT_CORE": 0,
    }
    for name, most in wanted.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(number, (most, most))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # short of memory, this one goes first


_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_REC, _MS_PRIVATE, _MS_SAFE = 0x4000, 0x40000, 0x2 | 0x4 | 0x8  # no setuid, devices, programs
_SET_PDEATHSIG, _SET_NO_NEW_PRIVS = 1, 38


def _system(call: str, *arguments) -> int:
    result = getattr(ctypes.CDLL(None, use_errno=True), call)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _enter_namespaces() -> None:
    user, group = os.getuid(), os.getgid()
    _system("unshare", _NEWUSER | _NEWNS | _NEWIPC | _NEWPID | _NEWNET)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _loopback_up()
    _leave_to_child()  # the first process of the new namespace ...
    _system("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    _system("mount", b"proc", b"/proc", b"proc", _MS_SAFE, None)
    _leave_to_child()  # ... waits; when it ends, the kernel ends all others in there


def _loopback_up() -> None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, up and running


def _leave_to_child() -> None:
    child = os.fork()
    if child == 0:
        _system("prctl", _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


_WRITING = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))  # write, remove, make


def _write_only_below(folder: Path) -> None:
    """Landlock: this process and its children write in `folder` and nowhere else."""
    number = {"create": 444, "add": 445, "restrict": 446}  # the same on every processor
    version = _system("syscall", number["create"], None, 0, 1)
    handled = _WRITING | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    scoped = 0b11 if version >= 6 else 0  # no signals and no abstract sockets to the outside
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("QQQ", handled, 0, scoped)[:size]
    ruleset = _system("syscall", number["create"], attributes, size, 0)
    file_only = (1 << 1) | (1 << 14 if version >= 3 else 0)
    for path, allowed in ((folder, handled), (Path("/dev/null"), file_only)):
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, opened)
        _system("syscall", number["add"], ruleset, 1, rule, 0)
        os.close(opened)
    _system("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _system("syscall", number["restrict"], ruleset, 0)
    os.close(ruleset)


# ---------------------------------------------------------------- what this machine allows


@dataclass(frozen=True)
class Available:
    """Which fences hold on this machine."""

    namespaces: bool = False
    landlock: bool = False

    def sentences(self, limits: Limits) -> list[tuple[str, bool, str]]:
        """(what is limited, whether the limit holds, how) for the report."""
        linux = sys.platform.startswith("linux")
        posix = os.name == "posix"
        looked = "looked at ten times a second: it may be passed for a moment"
        return [
            ("time", True, f"{limits.seconds:g} s for a notebook"),
            ("memory", True, f"{limits.memory_gb:g} GB, " + ("by the kernel" if linux else looked)),
            ("processes", True, f"{limits.processes}, {looked}"),
            ("printed output", True, f"{limits.output_mb:g} MB"),
            ("files written", True, f"{limits.disk_mb:g} MB, looked at every second"
             + ("; a single file by the kernel" if posix else "")),
            ("network", self.namespaces, "loopback alone" if self.namespaces
             else "not cut off: this system or container does not allow network namespaces"),
            ("other processes", self.namespaces, "neither seen nor reached, and none outlives its notebook"
             if self.namespaces else "not hidden: what leaves its process group may outlive the notebook"),
            ("other files", self.landlock, "written in the notebook's own folder alone" if self.landlock
             else "not write-protected: changes to the folder of submissions are found and put back"),
        ]


def available() -> Available:
    """Try each fence in a process of its own."""
    if not sys.platform.startswith("linux"):
        return Available()
    return Available(**{
        fence: subprocess.run(
            [sys.executable, "-P", __file__, "try", fence],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        ).returncode == 0
        for fence in ("namespaces", "landlock")
    })


# ---------------------------------------------------------------- outside


@dataclass
class Ending:
    """How a watched process came to its end."""

    limit: str = ""  # "time", "memory", "processes", "output" or "disk"; "" if it ended by itself
    code: int | None = None
    seconds: float = 0.0
    output: str = ""  # the last of it


def watch(
    command: list[str], folder: Path, environment: dict[str, str], limits: Limits, ready: Path
) -> Ending:
    """Run a command to its end, or to a limit, and end everything that it has started.

    The time counts from when the file ``ready`` is there: Python's own start is not the learner's.
    Nor is a pause in which nothing ran at all, as when a laptop sleeps.
    """
    options = {"start_new_session": True} if os.name == "posix" else {
        "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )
    ending, looked = Ending(), time.monotonic()
    late = looked + START
    tail, family = _Tail(process.stdout), _Family(process.pid)
    looks = 0
    try:
        while process.poll() is None and not ending.limit and not stop.is_set():
            time.sleep(PAUSE)
            looks += 1
            memory, count = family.look()
            now = time.monotonic()
            if ready.exists() or now > late:
                ending.seconds += min(now - looked, LONGEST_LOOK)
            looked = now
            if ending.seconds > limits.seconds:
                ending.limit = "time"
            elif memory > limits.memory_gb * 2**30:
                ending.limit = "memory"
            elif count > limits.processes:
                ending.limit = "processes"
            elif tail.length > limits.output_mb * MB:
                ending.limit = "output"
            elif looks % 10 == 0 and _size(folder) > limits.disk_mb * MB:
                ending.limit = "disk"
    finally:
        family.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.stdout.close() if tail.join() else None
    ending.code = process.returncode
    ending.output = tail.text()
    return ending


class _Tail:
    """Reads what a process prints, counts it, and keeps the last of it."""

    KEPT = 4000

    def __init__(self, pipe):
        self.length, self.kept, self.pipe = 0, b"", pipe
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while chunk := self.pipe.read1(65536):
                self.length += len(chunk)
                self.kept = (self.kept + chunk)[-self.KEPT :]

    def join(self) -> bool:
        self.thread.join(5)
        return not self.thread.is_alive()

    def text(self) -> str:
        return self.kept.decode("utf-8", "replace")


class _Family:
    """A process and all that descends from it, as far as it was ever seen."""

    def __init__(self, pid: int):
        self.pid = pid
        self.seen: dict[tuple, psutil.Process] = {}

    def look(self) -> tuple[int, int]:
        """Bytes of memory and number of processes now."""
        memory = count = 0
        for process in self._find():
            with contextlib.suppress(psutil.Error):
                memory += process.memory_info().rss
                count += process.status() != psutil.STATUS_ZOMBIE
        return memory, count

    def _find(self) -> list[psutil.Process]:
        roots = list(self.seen.values())
        with contextlib.suppress(psutil.Error):
            roots.append(psutil.Process(self.pid))
        for root in roots:
            with contextlib.suppress(psutil.Error):
                for process in (root, *root.children(recursive=True)):
                    self.seen[process.pid, process.create_time()] = process
        self.seen = {key: process for key, process in self.seen.items() if process.is_running()}
        return list(self.seen.values())

    def end(self) -> None:
        """Stop all, then kill all, until none is left."""
        for _ in range(50):
            if hasattr(os, "killpg"):
                with contextlib.suppress(OSError):
                    os.killpg(self.pid, signal.SIGKILL)
            living = [p for p in self._find() if _lives(p)]
            if not living:
                return
            for act in ("suspend", "kill"):
                for process in living:
                    with contextlib.suppress(psutil.Error):
                        getattr(process, act)()
            time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def main(what: str, argument: str) -> None:
    if what == "try":
        _enter_namespaces() if argument == "namespaces" else _write_only_below(Path.cwd())
        os._exit(0)
    folder = Path(argument)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    close_in(folder, Limits(**job["limits"]), **job["fences"])
    from minimistral.course import grade_run

    grade_run.main(folder, job["cells"], job["cell_seconds"])


if __name__ == "__main__":
    main(*sys.argv[1:])
