"""The learner's own pieces inside the library: save them, swap them in, run a model with them."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import inspect
import linecache
import math
import re
import sys
import textwrap
import threading
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from minimistral.files import write_whole
from minimistral.lab import from_here

from .exercises import Exercise, all_exercises
from .progress import work_folder
from .source import source_of
from .syllabus import TEACHING_MODULES

# ---------------------------------------------------------------- swap

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


# ---------------------------------------------------------------- saving and loading pieces

HEADER = '''"""Your own pieces for minimistral/{module}.py, saved by check() when they passed.

mine() runs the shipped model with them. Passing a piece again replaces its section; other
sections stay as they are. Each section stands alone.
"""
'''
SECTION = "# ---- piece: {name} ----\n{body}\n# ---- end: {name} ----\n"


def save_piece(exercise: Exercise, work) -> str:
    """Save a passed piece to mine/<module>.py in the work folder; returns a sentence for the learner.

    Saved with it: imports it uses, helper functions and classes of the same notebook that it
    refers to by name, and plain constants.
    """
    module, name = exercise.piece.split(".")[0], exercise.piece.split(".")[-1]
    if getattr(work, "__name__", "") == "<lambda>":  # its source is the whole call of check
        return "Not saved as your piece: a lambda has no text of its own. Write it with def, and check that."
    try:
        body = standalone_source(work)
    except (OSError, SyntaxError):
        return "Its source text could not be read, so it was not saved as your piece."
    try:
        loaded = _execute(exercise, body)
    except Exception as error:
        return f"Not saved as your piece: alone, it stops with {type(error).__name__}: {error}"
    from .checks import judge

    with swap(exercise.piece, loaded, check_signature=False):  # it must not need what it replaces
        again = judge(exercise, loaded)
    if "RecursionError" in again.message:
        return "Not saved as your piece: it calls the library's function, which it is meant to replace."
    if not again.passed:
        return f"Not saved as your piece: without the rest of the notebook it does not pass. {again.message}"
    path = work_folder() / "mine" / f"{module}.py"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else HEADER.format(module=module)
        section = SECTION.format(name=name, body=body.rstrip())
        found = _section(name).search(text)
        if found:
            text = text[: found.start()] + section + text[found.end() :]
        else:
            text = f"{text.rstrip()}\n\n\n{section}"
        write_whole(path, text)
    except OSError as error:
        return f"It could not be saved as your piece: {error}"
    return f"It is yours now: saved to {from_here(path)}; mine() runs the model with it."


def _section(name: str) -> re.Pattern:
    begin, end = (re.escape(f"# ---- {word}: {name} ----\n") for word in ("piece", "end"))
    return re.compile(f"^{begin}(.*?)^{end}", re.M | re.S)


def standalone_source(work) -> str:
    """The source of a function or class with what it needs from its notebook."""
    imports, before, main = [], [], source_of(work)
    namespace = getattr(inspect.unwrap(work), "__globals__", None)
    if namespace is None:
        methods = (m for m in vars(work).values() if inspect.isfunction(m))
        namespace = next(methods).__globals__
    waiting, seen = [main], {work.__name__}
    while waiting:
        for name in _names(waiting.pop()):
            if name in seen or name not in namespace or hasattr(builtins, name):
                continue
            seen.add(name)
            value = namespace[name]
            line = _import_line(name, value, work.__module__)
            if line:
                imports.append(line)
            elif inspect.isfunction(value) or inspect.isclass(value):
                text = source_of(value)
                before.insert(0, text)
                waiting.append(text)
            elif (written := _literal(value)) is not None:
                before.insert(0, f"{name} = {written}\n")
    blocks = ["\n".join(sorted(imports)), *before, main]
    return "\n\n".join(block.rstrip() for block in blocks if block) + "\n"


def _literal(value) -> str | None:
    """A constant as Python writes it, or None for what is no constant."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.dtype):
        return repr(value)
    try:
        return repr(value) if ast.literal_eval(repr(value)) == value else None
    except Exception:
        return None


def _names(source: str) -> list[str]:
    names = (n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name))
    return list(dict.fromkeys(names))


def _import_line(name, value, home) -> str | None:
    if inspect.ismodule(value):
        parent, _, last = value.__name__.rpartition(".")
        if name == value.__name__:
            return f"import {name}"
        return f"from {parent} import {last} as {name}" if parent else f"import {last} as {name}"
    origin = getattr(value, "__module__", None)
    if callable(value) and origin not in (None, home, "__main__", "builtins"):
        own = getattr(value, "__name__", name)
        if getattr(sys.modules.get(origin), own, None) is value:
            return f"from {origin} import {own}" + (f" as {name}" if own != name else "")
    return None


def _execute(exercise: Exercise, body: str):
    """Run a saved section in the names of the library's module; returns the piece."""
    library = importlib.import_module(f"minimistral.{exercise.piece.split('.')[0]}")
    module = types.ModuleType(f"mine.{exercise.piece}")
    names = {"torch": torch, "math": math, "F": F, "nn": nn}
    vars(module).update({**names, **vars(library), "__name__": module.__name__})
    filename = f"<your piece {exercise.piece}>"
    linecache.cache[filename] = (len(body), None, body.splitlines(True), filename)
    exec(compile(body, filename, "exec"), vars(module))
    return vars(module)[exercise.entry or exercise.piece.split(".")[-1]]


def load_pieces() -> tuple[dict[str, Any], list[str]]:
    """The learner's saved pieces, target -> function, each checked again; and what is wrong."""
    from .checks import judge

    pieces, problems = {}, []
    for exercise in all_exercises():
        if not exercise.piece:
            continue
        module, name = exercise.piece.split(".")[0], exercise.piece.split(".")[-1]
        path = work_folder() / "mine" / f"{module}.py"
        try:
            found = _section(name).search(path.read_text(encoding="utf-8"))
            if not found:
                continue
            piece = _execute(exercise, found[1])
            result = judge(exercise, piece)
        except FileNotFoundError:
            continue
        except Exception as error:  # the learner may have edited the file
            problems.append(f"your {name} cannot be used ({type(error).__name__}: {error}); the library's is")
            continue
        if result.passed:
            pieces[exercise.piece] = piece
        else:
            problems.append(f"your {name} no longer passes its check; the library's is used")
    return pieces, problems


# ---------------------------------------------------------------- mine


def mine(name: str | Path = "tales-dense", **options):
    """A model, running with every piece of yours that passed.

    name: a shipped model, or the folder of any checkpoint that load_model reads. It is loaded by
    your code, too, where a piece has to do with loading. A Transformer like any other, whose
    forward pass uses your code; ``.pieces`` maps library names to your functions, ``.problems``
    says what could not be used, ``.write(text)`` writes, if there is a tokenizer beside the model.
    """
    import minimistral as mm

    pieces, problems = load_pieces()
    with swap(pieces):
        model = mm.load_model(name, **options)
    model.pieces, model.problems = pieces, problems
    model.source, model.shipped_name = name, Path(name).name
    model.__class__ = _with_pieces(type(model))
    return model


def _with_pieces(base: type) -> type:
    class Mine(base):
        """A model whose forward pass runs with the learner's pieces."""

        def forward(self, *args, **kwargs):
            with swap(self.pieces, check_signature=False):
                return super().forward(*args, **kwargs)

        def features(self, *args, **kwargs):  # what reads a prompt before writing
            with swap(self.pieces, check_signature=False):
                return super().features(*args, **kwargs)

        def write(self, prompt: str = "", max_new_tokens: int = 80, *, temperature=0.0, seed=0, **options) -> str:
            """Continue a text with everything that is yours, sampling and cache included.

            Lines are broken between words, as a page would break them anywhere.
            """
            import minimistral as mm

            tokenizer = mm.load_tokenizer(self.source)
            with swap(self.pieces, check_signature=False):
                ids = tokenizer.encode(prompt, bos=True)
                new = mm.generate(
                    self, ids, max_new_tokens, temperature=temperature, seed=seed,
                    stop_ids=(tokenizer.eos_id,), **options,
                )
            lines = (prompt + tokenizer.decode(new)).split("\n")
            return "\n".join(textwrap.fill(line, 84) for line in lines)

        def __repr__(self) -> str:
            state = "running on the library's code: no piece of yours yet"
            if self.pieces:
                state = f"running on your {', '.join(self.pieces)}; the rest is the library's"
            lines = [f"{self.shipped_name}, {state}", *self.problems]
            return "\n".join(lines)

    return Mine
