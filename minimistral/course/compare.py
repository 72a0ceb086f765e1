"""Are two results equal, and if not, how does one say it?"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

FLOOR = 1e-12  # absolute; matters only where a whole row should be zero


@dataclass(frozen=True)
class Difference:
    """Where a result departs from the expected one."""

    kind: str  # "type", "dtype", "shape", "length", "nan", "value"
    text: str  # a sentence for the learner
    between: tuple = field(default=(), repr=False, compare=False)  # what ``overview`` needs


def difference(
    expected: Any, actual: Any, tolerance: float = 1e-5, *, same_dtype: bool = False, where: str = ""
) -> Difference | None:
    """The first difference between two results, or None.

    Tensors may differ by ``tolerance`` times the largest expected value in the same row (last
    axis). Lists and arrays are converted unless ``same_dtype``; a wider float is welcome then.
    Tuples and lists count as the same; dicts are compared key by key.
    """
    if isinstance(expected, np.ndarray):
        expected = torch.from_numpy(np.ascontiguousarray(expected))
    if isinstance(expected, (list, tuple)) and _all_floats(expected) and not same_dtype:
        expected = torch.tensor(expected, dtype=torch.float64)
        if isinstance(actual, (list, tuple)) and len(actual) != len(expected):
            return _length(expected.tolist(), actual, where)
        if isinstance(actual, (list, tuple)) and all(type(v) in (float, int) for v in actual):
            actual = torch.tensor(actual, dtype=torch.float64)
        if isinstance(actual, torch.Tensor) and actual.is_floating_point():
            actual = actual.double()
    if isinstance(expected, torch.Tensor):
        return _tensor_difference(expected, actual, tolerance, same_dtype, where)
    if isinstance(actual, (torch.Tensor, np.ndarray, np.generic)) and not same_dtype:
        actual = actual.tolist()
    if isinstance(expected, (list, tuple)):
        if not isinstance(actual, (list, tuple)):
            return _type(f"{type(expected).__name__} of {len(expected)}", actual, where)
        if len(actual) != len(expected):
            return _length(expected, actual, where)
        pairs = [(i, expected[i], actual[i]) for i in range(len(expected))]
    elif isinstance(expected, dict):
        if not isinstance(actual, dict):
            return _type("dict", actual, where)
        if set(expected) != set(actual):
            return _value(sorted(map(str, expected)), sorted(map(str, actual)), f"{where} keys")
        pairs = [(repr(key), expected[key], actual[key]) for key in expected]
    else:
        return _scalar_difference(expected, actual, tolerance, where)
    for i, e, a in pairs:
        found = difference(e, a, tolerance, same_dtype=same_dtype, where=f"{where}[{i}]")
        if found:
            return found
    return None


def _all_floats(values):
    return len(values) > 0 and all(type(v) in (float, int) for v in values) and float in map(type, values)


def describe(value: Any) -> str:
    """What kind of thing this is, for a sentence."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of shape {value.shape}"
    if value is None:
        return "None (is a return missing?)"
    if isinstance(value, (list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {short(value)}"


def short(value: Any, limit: int = 60) -> str:
    """A value in few characters; floats with four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _type(wanted, actual, where):
    return Difference("type", f"{_at(where)}expected {wanted}, got {describe(actual)}")


def _length(expected, actual, where):
    text = f"{_at(where)}expected {len(expected)} elements, got {len(actual)}"
    return Difference("length", text, (expected, actual))


def _value(expected, actual, where, between=()):
    wanted, got = _digits(expected), _digits(actual)
    if wanted == got and isinstance(expected, float) and isinstance(actual, (float, int)):
        wanted, got = f"{expected:.9g}", f"{actual:.9g}"  # what is shown must show the difference
    return Difference("value", f"{_at(where)}expected {wanted}, got {got}", between)


def _digits(value):
    """A value in few characters, large numbers without powers of ten."""
    return f"{value:.0f}" if isinstance(value, float) and 1e4 <= abs(value) < 1e12 else short(value)


def _at(where):
    return f"at {where.strip()} " if where else ""


def _scalar_difference(expected, actual, tolerance, where):
    if isinstance(expected, numbers.Number) and not isinstance(expected, bool):
        if isinstance(actual, bool) or not isinstance(actual, numbers.Number):
            return _type(f"a number, {short(expected)}", actual, where)
        if expected == actual or (expected != expected and actual != actual):
            return None
        if actual != actual:
            return Difference("nan", f"{_at(where)}expected {short(expected)}, got NaN")
        exact = isinstance(expected, int) and isinstance(actual, int)
        if not exact and abs(expected - actual) <= tolerance * abs(expected) + FLOOR:
            return None
        return _value(expected, actual, where)
    if type(expected) is not type(actual) and not _equal(expected, actual):
        return _type(describe(expected), actual, where)
    return None if _equal(expected, actual) else _value(expected, actual, where)


def _equal(expected, actual):
    try:
        return bool(expected == actual)
    except Exception:
        return expected is actual


def _tensor_difference(expected, actual, tolerance, same_dtype, where):
    wanted = f"a tensor of shape {tuple(expected.shape)}"
    if not isinstance(actual, torch.Tensor):
        if same_dtype or actual is None or isinstance(actual, (str, bytes, dict)):
            return _type(wanted, actual, where)
        try:
            actual = torch.as_tensor(actual)
        except Exception:
            return _type(wanted, actual, where)
    if actual.shape != expected.shape:
        shapes = f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
        return Difference("shape", _at(where) + shapes, (expected, actual))
    if not _dtype_fits(expected.dtype, actual.dtype, same_dtype):
        names = f"expected {_name(expected.dtype)}, got {_name(actual.dtype)}"
        return Difference("dtype", f"{_at(where)}{names} (the dtype)")
    try:
        expected, actual = expected.detach().cpu(), actual.detach().cpu().to_dense()
    except Exception:
        return _type(wanted, actual, where)
    wrong = _wrong_places(expected, actual, tolerance)
    if not wrong.any():
        return None
    index = tuple(wrong.nonzero()[0].tolist())
    e, a = expected[index].item(), actual[index].item()
    place = f"{where}{list(index)}" if index else where
    between = expected, actual, wrong
    if a != a:
        return Difference("nan", f"{_at(place)}expected {short(e)}, got NaN (not a number)", between)
    return _value(e, a, place, between)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _dtype_fits(expected, actual, same_dtype):
    if expected == actual:
        return True
    if same_dtype:
        return False
    if expected.is_floating_point and actual.is_floating_point:
        return torch.finfo(actual).eps <= torch.finfo(expected).eps
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return expected in whole and actual in whole


def _wrong_places(expected, actual, tolerance):
    if expected.is_complex():
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual.to(expected.dtype))
        return _wrong_places(expected, actual, tolerance).any(-1)
    if not expected.is_floating_point():
        return expected != actual
    if torch.finfo(expected.dtype).bits < 32:  # half precision carries 3 digits, not 5
        tolerance = max(tolerance, 4 * torch.finfo(expected.dtype).eps)
    e, a = expected.double(), actual.double()
    size = torch.where(e.isfinite(), e.abs(), 0)
    if e.dim() and e.numel():
        size = size.amax(-1, keepdim=True)
    near = (e - a).abs() <= tolerance * size + FLOOR
    same = (e == a) | (e.isnan() & a.isnan())
    return ~(near & e.isfinite() | same)


# ---------------------------------------------------------------- more than the first difference


def overview(found: Difference) -> str:
    """What all values together say about a difference, as a sentence; empty where that is nothing."""
    if not found.between:
        return ""
    expected, actual, *wrong = found.between
    if found.kind == "length":
        return _where_lists_part(expected, actual)
    if expected.dtype == torch.bool or expected.is_complex() or expected.numel() < 2:
        return _how_many(wrong[0]) if wrong else ""
    e, a = expected.detach().cpu().double(), actual.detach().cpu().to_dense().double()
    same = e.numel() == a.numel() and e.unique().numel() > 1 and _near(
        e.flatten().sort().values, a.flatten().sort().values)
    if not wrong:
        return "The numbers are the expected ones, in another shape." if same else ""
    if _near(e, a):
        return _how_many(wrong[0])
    if same:
        return "The numbers are the expected ones, in other places."
    return _alike_everywhere(e, a) or _how_many(wrong[0])


def _near(expected, actual):
    return bool(((actual - expected).abs() <= 1e-4 * expected.abs().max()).all())


def _alike_everywhere(expected, actual):
    """The same thing done to every value: multiplied by a number, or a number added."""
    if not actual.any():
        return "Every value is 0."
    if not actual.isfinite().all() or not expected.isfinite().all() or not expected.any():
        return ""
    times = float((expected * actual).sum() / expected.square().sum())
    if abs(times) > 1e-6 and _near(times * expected, actual):
        many = f"{times:.4g} times the expected one"
        return f"Every value {'has the other sign' if abs(times + 1) < 1e-3 else f'is {many}'}."
    more = actual - expected
    if _near(more.mean().expand(more.shape), more):
        return f"Every value is {abs(more.mean()):.4g} too {'large' if more.mean() > 0 else 'small'}."
    return ""


def _how_many(wrong):
    """Of how many values how many are wrong, and whether they lie at one index of an axis."""
    number, total = int(wrong.sum()), wrong.numel()
    if number == total:
        return f"All {total} values are wrong." if total > 1 else ""
    if number == 1:
        return f"Of {total} values one is wrong."
    for axis, size in enumerate(wrong.shape):
        at = wrong.movedim(axis, 0).reshape(size, -1).any(1).nonzero().flatten().tolist()
        if len(at) == 1 < size:
            return f"Of {total} values {number} are wrong, all at index {at[0]} of axis {axis}."
    return f"Of {total} values {number} are wrong."


def _where_lists_part(expected, actual):
    for i, (e, a) in enumerate(zip(expected, actual)):
        if found := difference(e, a, where=f"[{i}]"):
            return f"The first difference: {found.text}."
    shorter = min(len(expected), len(actual))
    return "As far as the shorter one goes, they agree." if shorter else ""
