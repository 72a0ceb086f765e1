"""Weights on large pages: plumbing of fast_model.py.

A processor looks up where each page of memory lies, and begins anew to read ahead at its start.
With the usual pages of 4 kB it may read weights at half its speed. Linux has pages of 2 MB for
a program that asks for them; elsewhere, and on a GPU, nothing changes here.
"""

import contextlib
import mmap
import warnings

import torch
from torch import Tensor

PAGE, AREA, SMALL = 2**21, 2**25, 2**16             # bytes; what is small stays where it is
THERE = hasattr(mmap, "MADV_HUGEPAGE")
areas: set[int] = set()                             # where they begin
free: list[Tensor] = []                             # the rest of the newest one


def wanted(weight: Tensor) -> bool:
    """Whether a weight would be read faster from another place."""
    return (THERE and weight.device.type == "cpu" and weight.nbytes >= SMALL
            and weight.untyped_storage().data_ptr() not in areas)


def empty_like(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of this shape where a weight of that kind is read fast. Weights lie one
    behind the other in an area, which is given back when the last of them is gone."""
    size = torch.Size(shape).numel() * weight.dtype.itemsize
    if not THERE or weight.device.type != "cpu" or size < SMALL:
        return weight.new_empty(shape)
    if not free or len(free[0]) < size:
        free[:] = [new_area(max(AREA, size))]
    room, rest = free[0][:size], free[0][-(-size // 64) * 64:]       # whole cache lines
    free[:] = [rest]
    return room.view(weight.dtype).view(shape)


def new_area(size: int) -> Tensor:
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):                  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        area = torch.frombuffer(memory, dtype=torch.uint8)
    areas.add(area.data_ptr())
    start = -area.data_ptr() % PAGE
    return area[start:start + size]
