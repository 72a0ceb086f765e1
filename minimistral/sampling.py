"""From logits to the next token: the likeliest one, or one drawn after temperature,
top-k and top-p."""

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leave the k largest logits of each row, the others become -inf.

    logits: (B, V) -> (B, V)
    """
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    kept = torch.full_like(logits, -torch.inf)
    return kept.scatter(-1, best, logits.gather(-1, best))


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Leave the likeliest tokens until their sum passes p, the one that crosses p
    included, and scale what is left to sum to 1 (Holtzman et al. 2020, section
    3.1).

    probabilities: (B, V) -> (B, V)
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered           # the sum of likelier tokens
    ordered = ordered.masked_fill(before > p, 0.0)
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)


def next_distribution(logits: Tensor, temperature: float, top_k: int | None = None,
                      top_p: float | None = None) -> Tensor:
    """The probabilities from which the next token is drawn: temperature first, then
    top-k, then top-p.

    logits: (B, V), temperature above 0 -> float32 (B, V), rows summing to 1
    """
    scaled = logits.float() / temperature
    if top_k is not None:
        scaled = keep_top_k(scaled, top_k)
    probabilities = scaled.softmax(dim=-1)
    return probabilities if top_p is None else keep_top_p(probabilities, top_p)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Choose one token for each row: the one at which the running sum of the
    probabilities passes the row's uniform number.

    probabilities: (B, V), uniforms: (B,) in [0, 1) -> int64 (B,)
    """
    running = probabilities.double().cumsum(dim=-1)                   # (B, V)
    target = uniforms.double()[:, None] * running[:, -1:]
    return torch.searchsorted(running, target, right=True).squeeze(-1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None
                   ) -> None:
    """Raise ValueError for settings that define no distribution."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if top_k is not None and (top_k != int(top_k) or top_k < 1):
        raise ValueError(f"top_k={top_k} must be a whole number from 1 up, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie above 0 and up to 1, or be None")
