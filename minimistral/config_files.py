"""Plumbing of config.py: what stands in params.json, read, written and checked."""

import json
from dataclasses import asdict
from pathlib import Path

# Keys of published params.json files that say nothing about the mathematics.
HARMLESS_KEYS = {"max_batch_size", "max_seq_len", "max_position_embeddings",
                 "model_type", "dtype", "torch_dtype", "pad_token_id"}
# Keys that do, and that this library does not build.
FOREIGN_KEYS = {
    "yarn": "YaRN scaling of the rotary positions",
    "llama_4_scaling": "scaling of the queries with their position",
    "q_lora_rank": "multi-head latent attention",
    "kv_lora_rank": "multi-head latent attention",
    "qk_nope_head_dim": "multi-head latent attention",
    "qk_rope_head_dim": "multi-head latent attention",
    "v_head_dim": "multi-head latent attention",
    "vision_encoder": "a vision tower",
    "vision_adapter": "a vision tower",
    "multimodal": "inputs other than text",
    "lora": "adapters inside the checkpoint",
    "use_biases": "biases in the linear layers",
}


def read_json(source) -> dict:
    """The dictionary in a JSON file, given as path, text or dictionary."""
    if isinstance(source, dict):
        return source
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    try:
        text = source if is_text else Path(source).read_text(encoding="utf-8")
        values = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = "the given text" if is_text else source
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__}, "
                         f"not a JSON object of names and values")
    return values


def moe_from_json(value) -> dict | None:
    """What MoEConfig takes: an object of two numbers, or nothing at all."""
    if not value:
        return None
    keys = {"num_experts", "num_experts_per_tok"}
    if not isinstance(value, dict) or {k for k in value if value[k]} != keys:
        raise ValueError(f"moe={value!r} in params.json must hold num_experts and "
                         f"num_experts_per_tok alone: shared experts and other "
                         f"routers are not built")
    return {k: value[k] for k in keys}


def window_from_json(value):
    """params.json writes a window as a number, a string, a list or null."""
    if isinstance(value, list | tuple):
        return tuple(window_from_json(v) for v in value)
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    return value


def config_to_params(config) -> dict:
    """The dictionary of a params.json file for a ModelConfig; what is None or off is left out."""
    return {name: value for name, value in asdict(config).items()
            if value is not None and value is not False and name != "not_built"}


def check_config(config) -> None:
    """Raise ValueError for a ModelConfig of numbers that no model can have."""
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                 "hidden_dim", "vocab_size"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 up")
    if config.n_heads % config.n_kv_heads:
        slip = ("did you swap n_heads and n_kv_heads?"
                if config.n_kv_heads > config.n_heads
                else "each key/value head serves the same number of query heads")
        raise ValueError(f"n_heads={config.n_heads} is not a multiple of "
                         f"n_kv_heads={config.n_kv_heads}: {slip}")
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim={config.head_dim} must be even, as rotary positions turn "
            f"pairs; {config.dim} / {config.n_heads} is "
            f"{config.dim / config.n_heads:g}: did you swap n_layers and n_heads?")
    for name in ("norm_eps", "rope_theta"):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{name}={value!r} must be a positive number")
    windows = config.sliding_window
    windows = windows if isinstance(windows, tuple) else (windows,)
    if not windows or config.n_layers % len(windows):
        raise ValueError(f"sliding_window has {len(windows)} entries, which must "
                         f"divide n_layers={config.n_layers} to be tiled over them")
    for window in windows:
        if window is not None and (isinstance(window, bool)
                                   or not isinstance(window, int) or window < 1):
            raise ValueError(f"sliding_window={window!r} must be None or at least "
                             f"1: it counts the query's own position")
