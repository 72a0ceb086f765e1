"""What a Mistral model is made of: its numbers, read from and written to
params.json, and the arithmetic of parameters and bytes that follows from them."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from minimistral.config_files import (
    FOREIGN_KEYS, HARMLESS_KEYS, check_config, config_to_params, moe_from_json,
    read_json, window_from_json)
from minimistral.files import write_whole


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: `num_experts` feed-forwards in each layer, of which
    every token uses `num_experts_per_tok` (Mixtral, section 2.1)."""
    num_experts: int
    num_experts_per_tok: int

    def __post_init__(self):
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between "
                f"1 and num_experts={self.num_experts}: did you swap the two?")


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define one model, under the names of params.json.

    dim            width of the residual stream
    n_layers       number of blocks
    n_heads        query heads per layer
    n_kv_heads     key/value heads per layer; divides n_heads
    head_dim       size of one head, even; n_heads * head_dim need not be dim
    hidden_dim     inner width of the feed-forward (of one expert)
    vocab_size     number of token ids
    norm_eps       added to the mean square in RMSNorm
    rope_theta     base of the rotary frequencies
    sliding_window how many keys a query sees, itself included: a number, None for
                   all, or a tuple of those, tiled over the layers
    moe            MoEConfig, or None for a dense model
    tied_embeddings  the output layer reuses the token embeddings
    not_built      why this configuration is here for arithmetic only
    """
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None | tuple[int | None, ...] = None
    moe: MoEConfig | None = None
    tied_embeddings: bool = False
    not_built: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if isinstance(self.sliding_window, list):
            object.__setattr__(self, "sliding_window", tuple(self.sliding_window))
        if isinstance(self.moe, dict):
            object.__setattr__(self, "moe", MoEConfig(**self.moe))
        check_config(self)

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees; None for all before it."""
        pattern = self.sliding_window
        if isinstance(pattern, tuple):
            return pattern[layer % len(pattern)]
        return pattern

    @classmethod
    def from_json(cls, source) -> "ModelConfig":
        """Read params.json: a path, its text, or the dictionary in it."""
        return config_from_params(read_json(source))

    def to_json(self, path=None) -> str:
        """The text of params.json; also written to `path` where one is given."""
        text = json.dumps(config_to_params(self), indent=2) + "\n"
        if path is not None:
            write_whole(Path(path), text)
        return text


def config_from_params(params: dict) -> ModelConfig:
    """A ModelConfig from the dictionary of a params.json file."""
    values = {k: v for k, v in params.items()
              if v is not None and k not in HARMLESS_KEYS}
    window = values.pop("_sliding_window", None)
    values.setdefault("sliding_window", window)
    for name in [n for n in values if n in FOREIGN_KEYS]:
        if values.pop(name):
            raise ValueError(f"params.json sets {name!r}: {FOREIGN_KEYS[name]}, "
                             f"which minimistral does not build")
    known = {f.name for f in fields(ModelConfig)} - {"not_built"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"params.json has unknown keys {unknown}: they may change "
                         f"the mathematics, so nothing is loaded; known are "
                         f"{sorted(known)}")
    needed = {"dim", "n_layers", "n_heads", "hidden_dim", "vocab_size"}
    missing = sorted(needed - set(values))
    if missing:
        raise ValueError(f"params.json lacks {missing}")
    values["sliding_window"] = window_from_json(values["sliding_window"])
    has_window = values["sliding_window"] is not None
    values.setdefault("rope_theta", 1e4 if has_window else 1e6)
    values.setdefault("n_kv_heads", values["n_heads"])
    values["moe"] = moe_from_json(values.get("moe"))
    if "head_dim" not in values:
        dim, heads = values["dim"], values["n_heads"]
        if not all(type(number) is int and number > 0 for number in (dim, heads)):
            raise ValueError(f"dim={dim!r} and n_heads={heads!r} must be whole "
                             f"numbers from 1 up")
        values["head_dim"] = dim // heads
    return ModelConfig(**values)


# ---------------------------------------------------------------- arithmetic


class ParameterCount(NamedTuple):
    """`total` parameters are stored; `active` ones work for any one token."""
    total: int
    active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of a model by formula, without building it."""
    queries = config.n_heads * config.head_dim
    keys = config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * queries + 2 * config.dim * keys
    expert = 3 * config.dim * config.hidden_dim
    norms = 2 * config.dim
    stored = used = 1
    router = 0
    if config.moe:
        stored, used = config.moe.num_experts, config.moe.num_experts_per_tok
        router = config.dim * stored
    tables = 1 if config.tied_embeddings else 2
    outside = tables * config.vocab_size * config.dim + config.dim
    shared = attention + router + norms
    total = config.n_layers * (shared + stored * expert) + outside
    active = config.n_layers * (shared + used * expert) + outside
    return ParameterCount(total, active)


def weight_bytes(config: ModelConfig, dtype=torch.bfloat16) -> int:
    """Bytes that all weights take in memory in this dtype."""
    return count_parameters(config).total * dtype.itemsize


def cache_bytes_per_token(config: ModelConfig, dtype=torch.bfloat16) -> int:
    """Bytes of keys and values that one token adds to the cache, while no window
    is full yet: a key and a value for each layer and key/value head."""
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return numbers * dtype.itemsize


def published(dim, layers, heads, kv_heads, hidden, vocab, theta, **more
              ) -> ModelConfig:
    """A published configuration: head_dim is 128 in all of them."""
    return ModelConfig(dim, layers, heads, kv_heads, 128, hidden, vocab,
                       rope_theta=theta, **more)


TWO_OF_EIGHT = MoEConfig(num_experts=8, num_experts_per_tok=2)
RAGGED = (None, 32768, 32768, 32768)
YARN = "its rotary positions use YaRN scaling, which minimistral does not build"
LLAMA = "Llama 2 is here to be compared with; minimistral builds Mistral's family"

MODELS = {
    "mistral-7b-v0.1": published(4096, 32, 32, 8, 14336, 32000, 1e4,
                                 sliding_window=4096),
    "mistral-7b-v0.2": published(4096, 32, 32, 8, 14336, 32000, 1e6),
    "mistral-7b-v0.3": published(4096, 32, 32, 8, 14336, 32768, 1e6),
    "mixtral-8x7b-v0.1": published(4096, 32, 32, 8, 14336, 32000, 1e6,
                                   moe=TWO_OF_EIGHT),
    "mixtral-8x22b-v0.1": published(6144, 56, 48, 8, 16384, 32000, 1e6,
                                    moe=TWO_OF_EIGHT),
    "mixtral-8x22b-v0.3": published(6144, 56, 48, 8, 16384, 32768, 1e6,
                                    moe=TWO_OF_EIGHT),
    "mistral-nemo-12b": published(5120, 40, 32, 8, 14336, 131072, 1e6),
    "ministral-8b-2410": published(4096, 36, 32, 8, 12288, 131072, 1e8,
                                   sliding_window=RAGGED),
    "mistral-small-2501": published(5120, 40, 32, 8, 32768, 131072, 1e8),
    "mistral-small-3.1": published(5120, 40, 32, 8, 32768, 131072, 1e9),
    "mistral-large-2": published(12288, 88, 96, 8, 28672, 32768, 1e6),
    "ministral-3-3b": published(3072, 26, 32, 8, 9216, 131072, 1e6,
                                tied_embeddings=True, not_built=YARN),
    "ministral-3-8b": published(4096, 34, 32, 8, 14336, 131072, 1e6,
                                not_built=YARN),
    "llama-2-7b": published(4096, 32, 32, 32, 11008, 32000, 1e4, not_built=LLAMA),
    "llama-2-13b": published(5120, 40, 40, 40, 13824, 32000, 1e4, not_built=LLAMA),
    "llama-2-70b": published(8192, 80, 64, 8, 28672, 32000, 1e4, not_built=LLAMA),
}
