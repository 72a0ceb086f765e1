"""Mistakes that a machine makes: right programs changed in one place, and what the checks say.

The records' misconceptions are mistakes that people make. Here each right program, as a learner would
write it, is changed in one place after the other: a constant off by one, a comparison or an
operator exchanged, a statement or an argument left out. A changed program ("mutant") that passes
the check is a survivor: it computes the same as before, or the fixtures have a hole. The survivors that
compute the same are listed with their reasons in ``survivors.py``.
"""

from __future__ import annotations

import __future__
import ast
import builtins
import copy
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from .checks import Result, judge
from .exercises import TYPED, Exercise
from .notebook_library import ROOT
from .notebook_source import REGION
from .source import tree_of

SECONDS = 2.0  # for one mutant on all fixtures; the right programs need milliseconds

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
               ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
               ast.IsNot: ast.Is}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
             ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
             ast.BitOr: ast.BitAnd}
SYMMETRIC = {"min", "max", "minimum", "maximum", "transpose", "swapaxes", "isclose", "zip"}


@dataclass(frozen=True)
class Program:
    """A right program: its definition, the names it sees, and the lines that the learner writes."""

    tree: ast.FunctionDef | ast.ClassDef
    names: dict
    lines: frozenset[int]


@dataclass(frozen=True)
class Mutant:
    """One change: where, what, and the definition with it."""

    name: str  # "old -> new", with a number where the same change is possible in several places
    tree: ast.FunctionDef | ast.ClassDef


# ---------------------------------------------------------------- the right programs


def program_of(exercise: Exercise) -> Program | None:
    """The solution that the course shows; for a piece the library's code; else the reference.

    None for what is typed, and where the reference is no more than a lambda.
    """
    if exercise.kind in TYPED:
        return None
    if exercise.kind != "piece" and (program := _solution(exercise)):
        return program
    reference = inspect.unwrap(exercise.reference)
    tree = tree_of(reference)
    if tree is None or not isinstance(tree.body[0], (ast.FunctionDef, ast.ClassDef)):
        return None
    names = dict(vars(inspect.getmodule(reference)))
    if not inspect.isclass(reference):
        names |= inspect.getclosurevars(reference).nonlocals
    definition = tree.body[0]
    return Program(definition, names, frozenset(range(1, definition.end_lineno + 1)))


@cache
def _source(chapter: int) -> tuple[ast.Module, frozenset[int]]:
    """The text of a chapter's solutions, and its lines between the solutions' markers."""
    found = sorted((ROOT / "solutions" / "src").glob(f"{chapter:02d}_*.py"))
    text = found[0].read_text(encoding="utf-8") if found else ""
    inside = set()
    for region in REGION.finditer(text):
        first, last = (text.count("\n", 0, place) + 1 for place in region.span("solution"))
        inside |= set(range(first, last + 1))
    return ast.parse(re.sub(r"^[%!].*$", "pass", text, flags=re.M)), frozenset(inside)


def _solution(exercise: Exercise) -> Program | None:
    tree, inside = _source(exercise.chapter)
    found = [n for n in tree.body if getattr(n, "name", "") == exercise.entry]
    if len(found) != 1:
        return None
    names: dict = {}
    _define(found[0], tree.body[: tree.body.index(found[0])], names)
    return Program(found[0], names, inside)


def _define(node: ast.stmt, before: list[ast.stmt], names: dict) -> None:
    """Put into ``names`` what the statement uses, from the statements before it."""
    own = _bound(node)
    for word in sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name)}):
        if word in names or hasattr(builtins, word):
            continue
        for place, one in reversed(list(enumerate(before))):
            if word in _bound(one):
                if one is not node and not (word in own and isinstance(node, ast.Import)):
                    _define(one, before[:place], names)
                    code = ast.fix_missing_locations(ast.Module([one], []))
                    exec(compile(code, "<solution>", "exec"), names)
                break


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement at the top level defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(a.asname or a.name).split(".")[0] for a in node.names}
    if isinstance(node, ast.Assign):
        return {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return set()


def build(tree: ast.AST, names: dict) -> Callable:
    """The function or class that a definition makes."""
    module = ast.fix_missing_locations(ast.Module([tree], []))
    flags = __future__.annotations.compiler_flag
    names = dict(names)
    exec(compile(module, "<mutant>", "exec", flags=flags, dont_inherit=True), names)
    return names[tree.name]


# ---------------------------------------------------------------- changes


def mutants(program: Program) -> list[Mutant]:
    """Every change of one place, always in the same order."""
    made, seen = [], {}
    for path, statement, node in _places(program):
        for new in _changes(node, program.names):
            old, changed = _words(node), _words(new)
            if old == changed:
                continue
            name = f"{old} -> {changed}"
            if node is not statement:
                name += f"  in  {_words(statement)}"
            seen[name] = seen.get(name, 0) + 1
            name += f" ({seen[name]})" if seen[name] > 1 else ""
            made.append(Mutant(name, _replaced(program.tree, path, new)))
    return made


def _words(node: ast.AST) -> str:
    """Its text; of a statement with a body, the first line."""
    return "nothing" if isinstance(node, ast.Pass) else ast.unparse(node).splitlines()[0]


def _places(program: Program) -> Iterator[tuple[list, ast.stmt, ast.AST]]:
    """The parts that may be changed: the way to each from the definition, its statement, the part."""
    def walk(node, path, statement):
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "defaults", "kw_defaults", "ctx"):
                continue
            for number, one in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(one, ast.AST) or isinstance(one, (ast.Raise, ast.Assert, ast.JoinedStr)):
                    continue
                here = [*path, (field, number)]
                inner = one if isinstance(one, ast.stmt) else statement
                if getattr(one, "lineno", None) in program.lines and not _is_text(one):
                    yield here, inner, one
                yield from walk(one, here, inner)
    yield from walk(program.tree, [], program.tree)


def _is_text(node) -> bool:
    """A docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _replaced(tree: ast.AST, path: list, new: ast.AST) -> ast.AST:
    changed = copy.deepcopy(tree)
    node = changed
    for field, number in path[:-1]:
        node = getattr(node, field) if number is None else getattr(node, field)[number]
    field, number = path[-1]
    if number is None:
        setattr(node, field, new)
    else:
        getattr(node, field)[number] = new
    return changed


def _changes(node: ast.AST, names: dict) -> Iterator[ast.AST]:
    """What may stand in a part's place."""
    def other(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1) if node.value else ast.UnaryOp(ast.USub(), ast.Constant(1))
    elif isinstance(node, ast.Constant) and type(node.value) is float:
        yield ast.Constant(2 * node.value if node.value else 1.0)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield other(ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield other(op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield other(op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield other(test=ast.Constant(True))
        yield other(test=ast.Constant(False))
    elif isinstance(node, ast.Slice):
        if node.lower and node.upper:
            yield other(lower=None)
            yield other(upper=None)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node, names, other)
    if isinstance(node, (ast.AugAssign, ast.Expr)):
        yield ast.Pass()


def _other_calls(node: ast.Call, names: dict, other: Callable) -> Iterator[ast.AST]:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if len(node.args) == 2 and not node.keywords and called not in SYMMETRIC:
        if not any(isinstance(a, ast.Starred) for a in node.args):
            yield other(args=node.args[::-1])
    for number, keyword in enumerate(node.keywords):
        if keyword.arg:
            yield other(keywords=node.keywords[:number] + node.keywords[number + 1:])
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if not isinstance(names.get(getattr(owner, "id", "")), types.ModuleType):
            yield owner  # x.float() -> x


# ---------------------------------------------------------------- what the checks say


def tried(exercise: Exercise) -> Iterator[tuple[Mutant, Result]]:
    """Every mutant with the check's answer. Raises ValueError if the program itself is refused."""
    program = program_of(exercise)
    if program is None:
        return
    plain = judge(exercise, build(program.tree, program.names))
    if not plain.passed:
        raise ValueError(f"{exercise.key}: the program to be changed is refused: {plain.message}")
    hurried = dataclasses.replace(exercise, seconds=min(SECONDS, exercise.seconds))
    for mutant in mutants(program):
        try:
            work = build(mutant.tree, program.names)
        except Exception as error:  # some changes are no program at all
            yield mutant, Result(exercise, "no program", str(error))
            continue
        yield mutant, judge(hurried, work)
