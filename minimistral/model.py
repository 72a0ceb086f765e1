"""The transformer: blocks on a residual stream, from token ids to logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.attention import Attention
from minimistral.cache import KVCache
from minimistral.config import ModelConfig
from minimistral.layers import RMSNorm, SwiGLU
from minimistral.moe import MoE
from minimistral.rope import rotary_angles


class Block(nn.Module):
    """One layer: attention, then a feed-forward, each reading a normed copy of the
    residual stream and adding to it.

    x: (B, T, dim) -> (B, T, dim)
    """

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        dim, hidden = config.dim, config.hidden_dim
        self.attention_norm = RMSNorm(dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(dim, config.norm_eps)
        if config.moe is None:
            self.feed_forward = SwiGLU(dim, hidden)
        else:                                                       # chapter 9
            self.feed_forward = MoE(dim, hidden, config.moe)        # chapter 9

    def forward(self, x: Tensor, positions: Tensor, angles, cache=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, angles, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A Mistral model. Its modules bear the names of Mistral's own checkpoints.

    >>> model = Transformer(config)
    >>> model(token_ids)                # (B, T) -> logits (B, T, V), float32
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.not_built:
            raise ValueError(f"this configuration is for arithmetic only: "
                             f"{config.not_built}")
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None
        if not config.tied_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        initialise(self)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def forward(self, token_ids: Tensor, cache: KVCache | None = None,
                positions: Tensor | None = None) -> Tensor:
        """token_ids: int (B, T) -> logits (B, T, V), float32.

        positions: (T,) or (B, T), -1 for padding; left out, the tokens continue
        after what the cache has seen. The cache is read and extended.
        """
        return self.logits(self.features(token_ids, cache, positions))

    def features(self, token_ids: Tensor, cache: KVCache | None = None,
                 positions: Tensor | None = None) -> Tensor:
        """The residual stream after the last block, normed: (B, T) -> (B, T,
        dim)."""
        check_ids(token_ids, self.config.vocab_size)
        positions = find_positions(token_ids, cache, positions)
        config = self.config
        angles = rotary_angles(positions, config.head_dim, config.rope_theta)
        x = self.tok_embeddings(token_ids)                           # (B, T, dim)
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, angles, cache.layers[i] if cache else None)
        if cache is not None:
            cache.advance(positions)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """A score for every token of the vocabulary, (..., dim) -> (..., V)
        float32."""
        if self.output is None:                     # one table at both ends
            return F.linear(x, self.tok_embeddings.weight).float()
        return self.output(x).float()


def initialise(model: Transformer) -> None:
    """Draw all matrices from a normal distribution of standard deviation 0.02,
    those that write into the residual stream narrower, as it adds up 2 * n_layers
    of them (GPT-2, section 2.3)."""
    narrow = 0.02 / (2 * model.config.n_layers) ** 0.5
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            into_stream = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(weight, std=narrow if into_stream else 0.02)


def check_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for ids outside the vocabulary. On an accelerator the look
    would stall the queue of work, so only ids on the CPU are looked at."""
    if token_ids.dim() != 2 or token_ids.is_floating_point():
        raise ValueError(f"token_ids must be whole numbers of shape (B, T), not "
                         f"{token_ids.dtype} of shape {tuple(token_ids.shape)}: "
                         f"one text alone is a batch of one, ids[None]")
    if token_ids.device.type == "cpu" and token_ids.numel():
        low, high = token_ids.aminmax()
        if low < 0 or high >= vocab_size:
            wrong = int(low) if low < 0 else int(high)
            raise ValueError(f"token id {wrong} is outside 0..{vocab_size - 1}: do "
                             f"the tokenizer and the model belong together?")


def find_positions(token_ids: Tensor, cache: KVCache | None,
                   positions: Tensor | None) -> Tensor:
    """The position of every token: (T,) or, with a cache, (B, T)."""
    batch, length = token_ids.shape
    if cache is not None and len(cache.length) != batch:
        raise ValueError(f"the cache was made for batch_size={len(cache.length)}, "
                         f"but token_ids has {batch} rows")
    steps = torch.arange(length, device=token_ids.device)
    if positions is not None:
        if positions.shape not in ((length,), (batch, length)):
            raise ValueError(f"positions of shape {tuple(positions.shape)} do not "
                             f"fit token_ids of shape {(batch, length)}")
        if cache is not None:
            cache.make_room(int(positions.max()) + 1)
            positions = positions.expand(batch, length)
        return positions
    if cache is None:
        return steps
    cache.make_room(cache.end + length)
    return cache.length[:, None] + steps
