"""Numbers for fixtures: nothing neutral in them that would let a mistake go unseen."""

from __future__ import annotations

import torch
from torch import Tensor


def random_tensors(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, ...]:
    """Tensors without zero means, whose rows differ in size."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        rows = 0.5 + torch.rand((*shape[:-1], 1), generator=chance)
        made.append(scale * (rows * torch.randn(shape, generator=chance) + 0.3))
    return tuple(made)


def random_tensor(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """One such tensor."""
    return random_tensors(seed, shape, scale=scale)[0]
