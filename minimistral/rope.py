"""Rotary positions: each pair of numbers in a query or a key is an arrow, turned by
an angle that grows with the token's position (RoFormer, section 3.4.2)."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, theta: float
                  ) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle by which a head's pairs are turned.

    positions: (..., T) whole numbers; pair i of D/2 turns by theta^(-2i/D) radians
    per position, from one radian (i = 0) down to almost none.
    Returns two float32 tensors of shape (..., T, D/2).
    """
    pair = torch.arange(0, head_dim, 2, device=positions.device).float()
    frequencies = theta ** (-pair / head_dim)                        # (D/2,)
    angles = positions.float()[..., None] * frequencies              # (..., T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the neighbouring pairs (x0, x1), (x2, x3), ... of every head.

    x: (B, T, H, D); cos, sin: (B, T, D/2) or (T, D/2). The turn is done in float32
    and the result has x's dtype. This interleaved layout is that of Mistral's own
    checkpoints; Hugging Face's pairs i with i + D/2 instead.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)              # one for all heads
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)      # (B, T, H, D/2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)
