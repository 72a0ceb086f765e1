"""What a submission's process hands over: the outputs of its work, as JSON and safetensors.

It is written where the learner's code runs, and read where it is judged. Reading builds plain values
alone; nothing that is read is ever executed. A value of a kind that no exercise asks for arrives as
a name and a few characters.
"""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from minimistral.files import write_whole

from .checks import NOT_WRITTEN, TRY_AGAIN, Attempt, Outcome
from .compare import short
from .exercises import TYPED, Exercise
from .sandbox import KEEP_PRINTED, Run
from .syllabus import TEACHING_MODULES
from .watchdog import TimeIsUp

MOST_PARTS = 200_000  # values inside one result
MOST_BYTES = 64 * 2**20  # of one file
MOST_CHARACTERS = 2_000  # of a message


class Unreadable(ValueError):
    """What came back is not what a check hands over."""


# ---------------------------------------------------------------- writing


def hand_over(attempt: Attempt, folder: Path) -> None:
    """Write an attempt to `folder`; a later one at the same exercise takes its place."""
    tensors: dict[str, torch.Tensor] = {}
    said = {
        "status": attempt.status,
        "message": attempt.message,
        "answer": _encode(attempt.answer, tensors),
        "outcomes": [_encode_outcome(outcome, tensors) for outcome in attempt.outcomes],
    }
    files = {"safetensors": save(tensors), "json": json.dumps(said).encode()}
    for ending, content in files.items():
        write_whole(folder / f"{attempt.exercise.key}.{ending}", content)


def _encode_outcome(outcome: Outcome, tensors: dict) -> dict:
    run, error = outcome.run, outcome.run.error
    try:
        value = _encode(run.value, tensors)
    except (ValueError, RecursionError) as too_much:
        value, error = ["none"], ValueError(f"the result cannot be handed over: {too_much}")
    return {
        "value": value,
        "error": None if error is None else [_base(error), type(error).__name__, _text(error)],
        "line": outcome.line,
        "changed": outcome.changed,
        "printed": run.printed,
        "printed_length": run.printed_length,
        "restored": run.restored,
        "seconds": run.seconds,
    }


def _base(error: BaseException) -> str:
    """The nearest class of it that Python itself has, or TimeIsUp."""
    names = (c.__name__ for c in type(error).__mro__ if c is TimeIsUp or c.__module__ == "builtins")
    return next(names)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MOST_CHARACTERS]
    except Exception:
        return ""


def _encode(value: Any, tensors: dict, parts: list | None = None) -> list:
    parts = [] if parts is None else parts
    parts.append(None)
    if len(parts) > MOST_PARTS:
        raise ValueError(f"more than {MOST_PARTS:,} values")

    def inside(values) -> list:
        return [_encode(v, tensors, parts) for v in values]

    if value is None or value is Ellipsis:
        return ["none" if value is None else "ellipsis"]
    if type(value) is int:
        return ["int", hex(value)]  # of any length
    if type(value) in (bool, str):
        return ["plain", value]
    if type(value) is float:
        return ["float", repr(value)]  # infinities, too
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, tensors)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return [kind, *_encode_tensor(torch.from_numpy(np.array(value)), tensors)[1:]]
    if isinstance(value, dict):
        return ["dict", inside(value), inside(value.values())]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return ["object", _path(value), names, inside(getattr(value, name) for name in names)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ["object", _path(value), list(value._fields), inside(value)]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, inside(value)]
    return ["other", type(value).__name__, short(value)]


def _path(value) -> list[str]:
    return [type(value).__module__, type(value).__qualname__]


def _encode_tensor(value: torch.Tensor, tensors: dict) -> list:
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        return ["other", "Tensor", short(value)]
    value = value.detach().resolve_conj().cpu()
    is_complex = value.is_complex()
    name = str(len(tensors))
    tensors[name] = (torch.view_as_real(value) if is_complex else value).contiguous().clone()
    return ["tensor", name, is_complex]


# ---------------------------------------------------------------- reading


def take_over(exercise: Exercise, folder: Path) -> Attempt | None:
    """What came back for an exercise; None if nothing did. Raises Unreadable."""
    path = folder / f"{exercise.key}.json"
    if not os.path.lexists(path):
        return None
    try:
        said = json.loads(read_bytes(path))
        tensors = load(read_bytes(path.with_suffix(".safetensors")))
        outcomes = [_decode_outcome(o, tensors) for o in said["outcomes"]]
        answer = _decode(said["answer"], tensors)
        status, message = said["status"], str(said["message"])[:MOST_CHARACTERS]
    except Unreadable:
        raise
    except Exception as error:  # whatever a hostile file may cause
        raise Unreadable(f"{type(error).__name__}: {error}"[:200]) from None
    if exercise.kind in TYPED:
        return Attempt(exercise, answer)
    if status in (NOT_WRITTEN, TRY_AGAIN):
        return Attempt(exercise, status=status, message=message)
    cut = bool(outcomes) and (
        outcomes[-1].run.timed_out or isinstance(outcomes[-1].error, KeyboardInterrupt)
    )
    wanted = len(exercise.fixtures)
    if status or len(outcomes) > wanted or (len(outcomes) < wanted and not cut):
        raise Unreadable(f"{len(outcomes)} results for {wanted} inputs, status {short(status)}")
    for outcome, fixture in zip(outcomes, exercise.fixtures):
        outcome.fixture = fixture.__name__.strip("_").replace("_", " ")
    return Attempt(exercise, outcomes=outcomes)


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A plain file's content. Raises Unreadable for a link, a pipe, a folder, a file too large."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # each where the system has it
        flags |= getattr(os, name, 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > most:
                raise Unreadable(f"{path.name} is no plain file of at most {most:,} bytes")
            return file.read(most)
    except OSError as error:
        raise Unreadable(f"{path.name}: {error.strerror}") from None


def _decode_outcome(said: dict, tensors: dict) -> Outcome:
    run = Run(
        value=_decode(said["value"], tensors),
        error=None if said["error"] is None else _decode_error(*map(str, said["error"])),
        printed=str(said["printed"])[:KEEP_PRINTED],
        printed_length=int(said["printed_length"]),
        restored=[str(name)[:100] for name in said["restored"]][:20],
        seconds=float(said["seconds"]),
    )
    changed = None if said["changed"] is None else str(said["changed"])[:100]
    return Outcome("", run, changed, str(said["line"])[:200])


def _decode_error(base: str, name: str, text: str) -> BaseException:
    parent = TimeIsUp if base == "TimeIsUp" else getattr(builtins, base, Exception)
    if not (isinstance(parent, type) and issubclass(parent, BaseException)):
        parent = Exception
    if issubclass(parent, BaseExceptionGroup):
        parent = Exception
    kind = type(name[:100], (parent,), {"__str__": lambda self: text[:MOST_CHARACTERS]})
    return kind.__new__(kind)


def _decode(said: list, tensors: dict) -> Any:
    kind, *rest = said

    def inside(values) -> list:
        return [_decode(v, tensors) for v in values]

    if kind in ("none", "ellipsis"):
        return None if kind == "none" else Ellipsis
    if kind == "plain" and type(rest[0]) in (bool, str):
        return rest[0]
    if kind == "int":
        return int(rest[0], 16)
    if kind == "float":
        return float(rest[0])
    if kind == "bytes":
        return bytes.fromhex(rest[0])
    if kind == "dtype" and isinstance(getattr(torch, rest[0], None), torch.dtype):
        return getattr(torch, rest[0])
    if kind in ("tensor", "array", "scalar"):
        value = tensors[rest[0]]
        value = torch.view_as_complex(value) if rest[1] else value
        return value if kind == "tensor" else value.numpy() if kind == "array" else value.numpy()[()]
    if kind == "dict":
        return dict(zip(inside(rest[0]), inside(rest[1]), strict=True))
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(inside(rest[0]))
    if kind == "object":
        return _object(*rest[0], rest[1], inside(rest[2]))
    if kind == "other":
        return _other(*map(str, rest))
    raise Unreadable(f"a value of kind {short(kind)}")


def _object(module: str, name: str, names: list[str], values: list) -> Any:
    """A value class of the library, with plain content; any other one by name."""
    package, _, last = module.rpartition(".")
    if package == "minimistral" and last in TEACHING_MODULES:
        made = getattr(importlib.import_module(module), name, None)
        if dataclasses.is_dataclass(made) or hasattr(made, "_fields"):
            return made(**dict(zip(names, values, strict=True)))
    return _other(name, ", ".join(f"{n}={short(v)}" for n, v in zip(names, values)))


def _other(name: str, text: str) -> Any:
    """Something that equals nothing else: its name and a few characters of it."""
    return type(name[:100], (), {"__repr__": lambda self: text[:100]})()
