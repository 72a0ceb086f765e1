"""A mixture of experts: a router sends each token to k of E feed-forwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.config import MoEConfig
from minimistral.layers import SwiGLU


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose k experts for each token and weigh them (Mixtral, section 2.1).

    logits: (N, E) -> weights (N, k), float32, rows summing to 1; experts (N, k),
    int64. The softmax is taken over the k chosen logits, which is the same as a
    softmax over all of them, cut to k and renormalised.
    """
    chosen, experts = logits.float().topk(k, dim=-1)
    return chosen.softmax(dim=-1), experts


class MoE(nn.Module):
    """E feed-forwards, of which each token uses k. No token is ever dropped.

    x: (B, T, dim) -> (B, T, dim)
    """

    def __init__(self, dim: int, hidden_dim: int, moe: MoEConfig):
        super().__init__()
        self.k = moe.num_experts_per_tok
        self.gate = nn.Linear(dim, moe.num_experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGLU(dim, hidden_dim) for _ in range(moe.num_experts))
        self.seen = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)                            # (N, dim)
        logits = self.gate(tokens)                           # (N, E)
        if self.seen is not None:
            self.seen.append(logits)                         # see record_routing
        weights, chosen = route(logits, self.k)              # (N, k) both
        run = all_experts if torch.compiler.is_compiling() else chosen_experts
        return run(self.experts, tokens, weights.type_as(x), chosen).view_as(x)


def chosen_experts(experts: nn.ModuleList, x: Tensor, weights: Tensor,
                   chosen: Tensor) -> Tensor:
    """Each expert runs on the tokens that chose it, and on no others.

    x: (N, dim); weights and chosen: (N, k) -> (N, dim)
    """
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, place = torch.where(chosen == e)
        if len(token):
            share = weights[token, place, None]              # (n, 1)
            out.index_add_(0, token, share * expert(x[token]))
    return out


def all_experts(experts: nn.ModuleList, x: Tensor, weights: Tensor,
                chosen: Tensor) -> Tensor:
    """The same sum as one wide feed-forward: the experts side by side, the hidden
    numbers of those not chosen weighed by 0. E / k times the arithmetic, but in
    three large products, and no step depends on the data, as compiling needs it.

    x: (N, dim); weights and chosen: (N, k) -> (N, dim)
    """
    w1, w2, w3 = (torch.cat([getattr(e, name).weight for e in experts], dim=axis)
                  for name, axis in (("w1", 0), ("w2", 1), ("w3", 0)))
    hidden = F.silu(F.linear(x, w1)) * F.linear(x, w3)       # (N, E * hidden_dim)
    shares = weights.new_zeros(len(x), len(experts)).scatter(1, chosen, weights)
    by_expert = hidden.unflatten(1, (len(experts), -1)) * shares[:, :, None]
    return F.linear(by_expert.flatten(1), w2)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router's logits while the model runs inside the `with` block: one
    (N, E) tensor for each mixture layer and forward pass, in the order of the run.
    The list is filled when the block ends."""
    seen: list[Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    for layer in layers:
        layer.seen = []         # its own: all layers compile to one program
    try:
        yield seen
        seen += [logits for once in zip(*(layer.seen for layer in layers))
                 for logits in once]
    finally:
        for layer in layers:
            layer.seen = None


def balance_loss(router_logits: list[Tensor], k: int) -> Tensor:
    """How unevenly the experts are used: E * sum over experts of f * P, with f the
    share of tokens that choose an expert (summing to k) and P the router's mean
    probability for it (Fedus et al. 2021, section 2.2). Even use gives k, a
    collapse of everything onto the same k experts gives E.

    router_logits: one (N, E) tensor per layer. The loss is taken for each layer and
    averaged. Hugging Face takes it over all layers' tokens at once, which is lower
    when layers prefer different experts.
    """
    losses = []
    for logits in router_logits:
        n_tokens, n_experts = logits.shape
        probabilities = logits.float().softmax(dim=-1)
        _, experts = route(logits, k)
        used = torch.bincount(experts.flatten(), minlength=n_experts) / n_tokens
        losses.append(n_experts * (used * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()
