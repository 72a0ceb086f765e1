"""The learner's own pieces inside the library: save them, and run a model with them."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import linecache
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from minimistral.files import write_whole
from minimistral.lab import from_here

from .exercises import Exercise, all_exercises
from .panel import wrapped
from .progress import work_folder
from .source import source_of
from .swaps import swap

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
            return wrapped(prompt + tokenizer.decode(new))

        def __repr__(self) -> str:
            state = "running on the library's code: no piece of yours yet"
            if self.pieces:
                state = f"running on your {', '.join(self.pieces)}; the rest is the library's"
            lines = [f"{self.shipped_name}, {state}", *self.problems]
            return "\n".join(lines)

    return Mine
