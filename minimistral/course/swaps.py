"""swap: put another function or class in the place of one of the library's, for a while."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from .syllabus import TEACHING_MODULES

_lock = threading.Lock()
_active: dict[str, dict] = {}  # target -> {"original", "places", "stack"}
_fast_before: dict[str, bool] = {}  # module -> its FAST before a plain piece was replaced


@cache
def load_library() -> None:
    """Import every module first: one imported during a swap would keep the replacement."""
    for module in TEACHING_MODULES:
        importlib.import_module(f"minimistral.{module}")
    import minimistral

    for name in minimistral.__all__:
        getattr(minimistral, name)


def find_target(target: str) -> tuple[Any, str]:
    """Where "attention.attend" or "cache.KVCache.reset" lives: (module or class, name)."""
    module, *path = target.split(".")
    try:
        holder = importlib.import_module(f"minimistral.{module}")
        for name in path[:-1]:
            holder = getattr(holder, name)
        getattr(holder, path[-1])
    except (ImportError, AttributeError, IndexError) as error:
        raise ValueError(
            f'the library has nothing called "{target}"; say module and name, as in "attention.attend" ({error})'
        ) from None
    return holder, path[-1]


@contextlib.contextmanager
def swap(target: str | Mapping[str, Any], replacement: Any = None, *, check_signature: bool = True) -> Iterator[Any]:
    """Within the block the library uses ``replacement`` for one of its functions or classes.

    ``swap("attention.attend", my_attend)``, or a dict of several. The name is replaced in every
    module of the library that imported it, and always put back. A replaced class serves models
    that are built within the block; models built before keep their own modules. All threads see
    the swap while it lasts.
    """
    pairs = dict(target) if isinstance(target, Mapping) else {target: replacement}
    pairs = {name.removeprefix("minimistral."): new for name, new in pairs.items()}
    with contextlib.ExitStack() as stack:
        for name, new in pairs.items():
            if check_signature:
                holder, attribute = find_target(name)
                problem = signature_problem(name, _original(name, holder, attribute), new)
                if problem:
                    raise ValueError(problem)
            stack.enter_context(_swapped(name, new))
        yield replacement


def _original(target, holder, attribute):
    return _active[target]["original"] if target in _active else inspect.getattr_static(holder, attribute)


@contextlib.contextmanager
def _swapped(target: str, replacement) -> Iterator[None]:
    load_library()
    holder, attribute = find_target(target)
    token = [replacement]  # a list of its own: two equal swaps stay two
    with _lock:
        if target not in _active:
            original = inspect.getattr_static(holder, attribute)
            places = _places(holder, attribute, original)
            _active[target] = {"original": original, "places": places, "stack": []}
        _active[target]["stack"].append(token)
        _install(target)
    try:
        yield
    finally:
        with _lock:
            stack = _active[target]["stack"]
            stack[:] = [entry for entry in stack if entry is not token]
            _install(target)
            if not stack:
                del _active[target]


def _places(holder, attribute, original) -> list[tuple[Any, str]]:
    """Every name in the library that refers to the original."""
    if inspect.isclass(holder):
        return [(holder, attribute)]
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "minimistral" and not name.startswith("minimistral.course")
    ]
    return [(m, name) for m in modules if m for name, value in list(vars(m).items()) if value is original]


def _install(target):
    state = _active[target]
    value = state["stack"][-1][0] if state["stack"] else state["original"]
    for holder, name in state["places"]:
        setattr(holder, name, value)
    _choose_path(_module(target))


def _choose_path(name: str) -> None:
    """A fast path would walk past a replaced plain function: switch it off meanwhile."""
    module = importlib.import_module(f"minimistral.{name}")
    if not hasattr(module, "FAST"):
        return
    replaced = [t for t in _active if _module(t) == name and _active[t]["stack"]]
    if any(not t.split(".")[1].startswith("fast") for t in replaced):
        _fast_before.setdefault(name, module.FAST)
        module.FAST = False
    elif name in _fast_before:
        module.FAST = _fast_before.pop(name)


def _module(target: str) -> str:
    return target.split(".")[0]


def signature_problem(target: str, original, replacement) -> str | None:
    """Why ``replacement`` cannot stand in for ``original``, or None."""
    name = target.split(".")[-1]
    if not callable(replacement):
        return f"{target} must be replaced by a function or class, got {type(replacement).__name__}"
    if inspect.isclass(original):
        if not inspect.isclass(replacement):
            return f"{target} is a class; a {type(replacement).__name__} cannot replace it"
        for method in ("__init__", "forward"):
            if method in vars(original) and hasattr(replacement, method):
                problem = _parameters_differ(
                    f"{name}.{method}", getattr(original, method), getattr(replacement, method)
                )
                if problem:
                    return problem
        return None
    if isinstance(original, (staticmethod, classmethod)):
        original = original.__func__
    return _parameters_differ(name, original, replacement)


def _parameters_differ(name, original, replacement) -> str | None:
    wanted = list(inspect.signature(original).parameters.values())
    given = list(inspect.signature(replacement).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given):
        return None
    given_by_name = {p.name: p for p in given}
    required = [p.name for p in given if p.default is p.empty]
    problems = [f"{p.name} is missing" for p in wanted if p.name not in given_by_name]
    problems += [f"{extra} is not in it" for extra in required if extra not in {p.name for p in wanted}]
    problems += [
        f"{p.name} needs a default"
        for p in wanted
        if p.default is not p.empty and p.name in required
    ]
    common = [p.name for p in given if p.name in {w.name for w in wanted}]
    if not problems and common != [p.name for p in wanted]:
        problems.append("the order differs")
    if not problems:
        return None
    names = ", ".join(p.name for p in wanted)
    yours = ", ".join(p.name for p in given)
    return f"{name} takes ({names}); yours takes ({yours}): {'; '.join(problems)}"
