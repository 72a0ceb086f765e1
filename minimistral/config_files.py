"""Plumbing of config.py: what stands in params.json, read and written."""

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
