"""A large model that says what a small one says, for the draft of chapter 11.

A draft pays where the model is slow, and a slow model of tales is too large for the
course's files. It can be made from a small one: the small one's weights in one corner
of larger matrices, zeros where anything else would reach them, and layers between that
add nothing to the stream (after Chen, Goodfellow and Shlens 2016, "Net2Net").
"""

from dataclasses import replace

import torch
from torch import Tensor

import minimistral as mm


@torch.no_grad()
def grown(small: mm.Transformer, config: mm.ModelConfig, noise: float = 0.0, seed: int = 0
          ) -> mm.Transformer:
    """A model of a larger shape that computes what `small` does, but for rounding.

    noise  is added to each weight of the small model, as a share of its matrix's
           standard deviation, so that the large one has a mind of its own
    Raises ValueError where the small shape does not fit into the large one.
    """
    old = small.config
    check_fit(old, config)
    torch.manual_seed(seed)
    # The root mean square of a row falls with the zeros in it: so do its weight and eps.
    shrink = old.dim / config.dim
    large = mm.Transformer(replace(config, norm_eps=old.norm_eps * shrink)).eval()
    stream, hidden = torch.arange(old.dim), torch.arange(old.hidden_dim)
    # Pair i turns as pair i * turn of a longer head, and each head keeps its key head.
    turn = config.head_dim // old.head_dim
    pairs = (torch.arange(0, config.head_dim, 2 * turn)[:, None] + torch.arange(2)).flatten()
    shared = old.n_heads // old.n_kv_heads
    heads = torch.arange(old.n_heads)
    heads = heads // shared * (config.n_heads // config.n_kv_heads) + heads % shared
    queries = (heads[:, None] * config.head_dim + pairs).flatten()
    keys = (torch.arange(old.n_kv_heads)[:, None] * config.head_dim + pairs).flatten()

    def put(into: torch.nn.Module, source: torch.nn.Module, rows: Tensor, columns: Tensor,
            scale: float = 1.0) -> None:
        weight = source.weight * scale
        weight = weight + noise * weight.std() * torch.randn(weight.shape)
        into.weight[rows[:, None], columns] = weight

    for table in (large.tok_embeddings, large.output):
        table.weight.zero_()
        table.weight[:, stream] = getattr(
            small, "output" if table is large.output else "tok_embeddings").weight
    large.norm.weight[stream] = small.norm.weight * shrink ** 0.5
    every = config.n_layers // old.n_layers
    for i, layer in enumerate(large.layers):
        for silent in (layer.attention.wq, layer.attention.wo, layer.feed_forward.w2):
            silent.weight.zero_()
        if i % every or i // every >= old.n_layers:
            continue
        block = small.layers[i // every]
        for name in ("attention_norm", "ffn_norm"):
            getattr(layer, name).weight[stream] = getattr(block, name).weight * shrink ** 0.5
        a, b = layer.attention, block.attention
        put(a.wq, b.wq, queries, stream, turn ** 0.5)       # scores are divided by more
        put(a.wk, b.wk, keys, stream)
        put(a.wv, b.wv, keys, stream)
        put(a.wo, b.wo, stream, queries)
        a, b = layer.feed_forward, block.feed_forward
        put(a.w1, b.w1, hidden, stream)
        put(a.w2, b.w2, stream, hidden)
        put(a.w3, b.w3, hidden, stream)
    return large.requires_grad_(False)


def check_fit(old: mm.ModelConfig, new: mm.ModelConfig) -> None:
    """Raise ValueError unless a model of the first shape fits into the second."""
    groups = [c.n_heads // c.n_kv_heads for c in (old, new)]
    wrong = [name for name in ("dim", "n_layers", "n_kv_heads", "hidden_dim")
             if getattr(old, name) > getattr(new, name)]
    wrong += [name for name in ("vocab_size", "rope_theta", "sliding_window", "moe",
                                "tied_embeddings") if getattr(old, name) != getattr(new, name)]
    if wrong or new.head_dim % old.head_dim or groups[0] > groups[1] or old.moe:
        raise ValueError(f"a model of this shape does not fit: look at "
                         f"{', '.join(wrong) or 'heads'}, and mixtures can't grow")
