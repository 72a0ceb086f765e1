"""A mixture of experts: a router sends each token to k of E feed-forwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minimistral.config import MoEConfig
from minimistral.layers import SwiGLU


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose k experts for each token and weigh them (Mixtral, section 2.1).

    logits: (N, E) -> weights (N, k), float32, rows summing to 1; experts (N, k), int64.
    The softmax is taken over the k chosen logits, which is the same as a softmax over
    all of them, cut to k and renormalised.
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

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)                            # (N, dim)
        weights, chosen = route(self.gate(tokens), self.k)   # (N, k) both
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(chosen == e)
            if len(token):
                share = weights[token, place, None].type_as(x)
                out[token] += share * expert(tokens[token])
        return out.view_as(x)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router's logits while the model runs inside the `with` block: one
    (N, E) tensor for each mixture layer and forward pass, in the order of the run."""
    seen: list[Tensor] = []
    hooks = [layer.gate.register_forward_hook(lambda _, __, out: seen.append(out))
             for layer in model.modules() if isinstance(layer, MoE)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(router_logits: list[Tensor], k: int, *, pooled: bool = False) -> Tensor:
    """How unevenly the experts are used: E * sum over experts of f * P, with f the
    share of tokens that choose an expert (summing to k) and P the router's mean
    probability for it (Fedus et al. 2021, section 2.2). Even use gives k, a collapse
    of everything onto the same k experts gives E.

    router_logits: one (N, E) tensor per layer. The loss is taken for each layer and
    averaged, or, if `pooled`, over all layers' tokens at once as Hugging Face does,
    which is lower when layers prefer different experts.
    """
    if pooled:
        router_logits = [torch.cat(list(router_logits))]
    losses = []
    for logits in router_logits:
        n_tokens, n_experts = logits.shape
        probabilities = logits.float().softmax(dim=-1)
        _, experts = route(logits, k)
        used = torch.bincount(experts.flatten(), minlength=n_experts) / n_tokens
        losses.append(n_experts * (used * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()
