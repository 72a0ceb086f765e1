"""The source text of functions and classes, those written in a notebook's cells included."""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from typing import Any


def source_of(thing: Any) -> str:
    """Source text with decorators, not indented. Raises OSError if it cannot be had.

    ``inspect.getsource`` cannot find a class that was written in a notebook's cell: such a class
    has no file. Its methods have one, and the class stands around them.
    """
    if not inspect.isclass(thing):
        try:
            return textwrap.dedent(inspect.getsource(thing))
        except TypeError as error:
            raise OSError(str(error)) from None
    for method in vars(thing).values():
        method = inspect.unwrap(method) if callable(method) else method
        code = getattr(method, "__code__", None)
        if code is None:
            continue
        lines = linecache.getlines(code.co_filename)
        for node in ast.walk(ast.parse("".join(lines))):
            if isinstance(node, ast.ClassDef) and node.name == thing.__name__:
                if node.lineno <= code.co_firstlineno <= node.end_lineno:
                    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                    return textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
    raise OSError(f"the source of {thing!r} cannot be found")


def tree_of(thing: Any) -> ast.AST | None:
    """Its syntax tree, or None where there is no source."""
    try:
        return ast.parse(source_of(thing))
    except (OSError, SyntaxError):
        return None
