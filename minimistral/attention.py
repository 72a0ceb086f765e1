"""Attention: who may look at whom, the look itself, and the module around it.

One rule decides every mask: a query and a key each carry a position, and True means
"this query may attend to this key". A padded token has position -1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.rope import rotate

# The fast path is taken unless the classroom has replaced a plain piece.
FAST = True


# ------------------------------------------------------------ who may look at whom


def causal(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """True where the key is not later than the query.

    query_positions: (..., T), key_positions: (..., S) -> bool (..., T, S)
    """
    return key_positions.unsqueeze(-2) <= query_positions.unsqueeze(-1)


def within_window(query_positions: Tensor, key_positions: Tensor, window: int
                  ) -> Tensor:
    """True where fewer than `window` steps lie between key and query, so that a
    query sees `window` keys, its own included (Mistral 7B, section 2).

    query_positions: (..., T), key_positions: (..., S) -> bool (..., T, S)
    """
    return query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2) < window


def not_padding(key_positions: Tensor) -> Tensor:
    """True where the key is no padding (position -1). A padded query sees nothing
    either: all that causality leaves it is padding.

    key_positions: (..., S) -> bool (..., 1, S)
    """
    return (key_positions >= 0).unsqueeze(-2)


def may_attend(query_positions: Tensor, key_positions: Tensor,
               window: int | None = None) -> Tensor:
    """The one mask of the library: causal, real, and inside the window if any.

    query_positions: (..., T), key_positions: (..., S) -> bool (..., T, S)
    """
    mask = causal(query_positions, key_positions)
    mask = mask & not_padding(key_positions)
    if window is not None:
        mask = mask & within_window(query_positions, key_positions, window)
    return mask


# ------------------------------------------------------------ the look


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention, head by head (Vaswani et al. 2017, 3.2).

    q: (B, T, H, D), k and v: (B, S, H, D), mask: bool (T, S) or (B, T, S), True
    where the query may attend -> (B, T, H, D). The softmax is done in float32. A
    query that may attend to nothing gets zeros.
    """
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() / math.sqrt(q.shape[-1])
    hidden = ~mask.unsqueeze(-3)                            # the same for all heads
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).masked_fill(hidden, 0.0)  # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", weights.type_as(v), v)


def repeat_heads(x: Tensor, n: int) -> Tensor:
    """n copies of each key/value head side by side, so that query head h meets
    key/value head h // n (Ainslie et al. 2023).

    x: (B, S, K, D) -> (B, S, K * n, D)
    """
    return x if n == 1 else x.repeat_interleave(n, dim=2)


def plain_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`attend` with shared heads: k and v may have fewer heads than q.

    q: (B, T, H, D), k and v: (B, S, K, D) with K dividing H -> (B, T, H, D)
    """
    n = q.shape[2] // k.shape[2]
    return attend(q, repeat_heads(k, n), repeat_heads(v, n), mask)


def fast_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same as `plain_attend`, by PyTorch's fused kernel, which never repeats
    the shared heads and never stores the weights.

    q: (B, T, H, D), k and v: (B, S, K, D) with K dividing H -> (B, T, H, D)
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)                    # (B, K, S, D)
    mask = mask.view(-1, 1, *mask.shape[-2:])               # the same for all heads
    if q.shape[1] == 1:
        # One query: heads that share a key head look together, as queries of one.
        rows = q.reshape(len(q), k.shape[1], -1, q.shape[3])    # (B, K, H / K, D)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        return out.reshape(q.shape)
    q = q.transpose(1, 2)                                          # (B, H, T, D)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, in layers that have one, a
    sliding window (Mistral 7B, section 2).

    x: (B, T, dim) -> (B, T, dim)
    """

    def __init__(self, config, layer: int = 0):
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        queries = config.n_heads * config.head_dim
        keys = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, queries, bias=False)
        self.wk = nn.Linear(config.dim, keys, bias=False)
        self.wv = nn.Linear(config.dim, keys, bias=False)
        self.wo = nn.Linear(queries, config.dim, bias=False)

    def forward(self, x: Tensor, positions: Tensor, angles, cache=None) -> Tensor:
        """positions: (T,) or (B, T); angles: cosines and sines for them (rope.py);
        cache: this layer's, which is read and written, or None."""
        split = (-1, self.head_dim)
        q = rotate(self.wq(x).unflatten(-1, split), *angles)     # (B, T, H, D)
        k = rotate(self.wk(x).unflatten(-1, split), *angles)     # (B, T, K, D)
        v = self.wv(x).unflatten(-1, split)                      # (B, T, K, D)
        key_positions = positions
        if cache is not None:
            k, v, key_positions = cache.update(k, v, positions)  # (B, S, K, D)
        mask = may_attend(positions, key_positions, self.window)
        look = fast_attend if FAST else plain_attend
        return self.wo(look(q, k, v, mask).flatten(-2))
