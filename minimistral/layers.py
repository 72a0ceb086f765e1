"""The two small layers of a block: RMSNorm and the SwiGLU feed-forward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide each row by its root mean square, then scale each column by a learned
    weight (Zhang and Sennrich 2019). The division is done in float32 and cast back
    before the scaling, as the reference does.

    x: (..., dim) -> (..., dim)
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = wide.pow(2).mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + self.eps)).type_as(x) * self.weight


class SwiGLU(nn.Module):
    """The feed-forward: w2(silu(w1 x) * w3 x), one gate, one value, one way back
    (Shazeer 2020). No biases.

    x: (..., dim) -> (..., dim)
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)     # the gate
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)     # the way back
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)     # the value

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
