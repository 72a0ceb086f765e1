"""Plumbing of checkpoint.py: Hugging Face's config.json, read and written."""

import torch

from minimistral.config import ModelConfig, MoEConfig

HF_CLASSES = {"mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM",
              "mixtral": "MixtralForCausalLM"}
# What transformers assumes where config.json is silent.
HF_DEFAULTS = {"mistral": (1e-6, 1e4, 4096), "ministral": (1e-6, 1e4, 4096),
               "mixtral": (1e-5, 1e6, None)}


def config_from_hf(values: dict) -> ModelConfig:
    """A ModelConfig from the dictionary of a config.json file."""
    kind = values.get("model_type")
    if kind not in HF_CLASSES:
        raise ValueError(f"model_type={kind!r} is not built; the text models "
                         f"{', '.join(HF_CLASSES)} are")
    eps, theta, window = HF_DEFAULTS[kind]
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={values['hidden_act']!r} is not built: silu is")
    if values.get("quantization_config"):
        raise ValueError("quantization_config is set: take the unquantized checkpoint")
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    moe = None
    if kind == "mixtral":
        moe = MoEConfig(values["num_local_experts"], values["num_experts_per_tok"])
    return ModelConfig(
        dim=dim, n_layers=values["num_hidden_layers"], n_heads=heads,
        n_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or dim // heads,
        hidden_dim=values["intermediate_size"], vocab_size=values["vocab_size"],
        norm_eps=values.get("rms_norm_eps", eps), rope_theta=hf_theta(values, theta),
        sliding_window=hf_windows(values, values.get("sliding_window", window)),
        moe=moe, tied_embeddings=values.get("tie_word_embeddings", False))


def hf_theta(values: dict, default: float) -> float:
    """rope_theta, which newer files keep inside rope_parameters."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rotary positions {rope} are not built: only plain ones are")
    return rope.get("rope_theta", values.get("rope_theta", default))


def hf_windows(values: dict, window: int | None):
    """The window or the shortest pattern of windows that layer_types tiles."""
    types = values.get("layer_types")
    if not types:
        return window
    legal = {"full_attention": None, "sliding_attention": window}
    if set(types) - set(legal) or len(types) != values["num_hidden_layers"]:
        raise ValueError(f"layer_types must name full_attention or sliding_attention "
                         f"for each of {values['num_hidden_layers']} layers: {types}")
    windows = tuple(legal[kind] for kind in types)
    period = next(n for n in range(1, len(windows) + 1)
                  if len(windows) % n == 0
                  and windows[:n] * (len(windows) // n) == windows)
    if period > 1 and values["model_type"] != "ministral":
        raise ValueError(f"layer_types mixes windows in a {values['model_type']!r} "
                         f"config, where transformers ignores it: is the model_type "
                         f"'ministral' meant?")
    return windows[0] if period == 1 else windows[:period]


def config_to_hf(config: ModelConfig, dtype: torch.dtype) -> dict:
    """The dictionary of a config.json file for transformers, old and new.

    Raises ValueError for windows that no class of transformers has: a mixture whose
    layers differ, or layers with windows of two sizes.
    """
    windows = [config.window(layer) for layer in range(config.n_layers)]
    sizes = {window for window in windows if window is not None}
    kind = "mixtral" if config.moe else "mistral"
    if len(set(windows)) > 1:
        if config.moe or len(sizes) > 1:
            what = ("a mixture of experts whose layers have different windows"
                    if config.moe else f"windows of {len(sizes)} sizes, {sorted(sizes)}")
            raise ValueError(f"transformers has no class for {what} "
                             f"(sliding_window={config.sliding_window}): save it with "
                             f"layout='mistral'")
        kind = "ministral"
    name = str(dtype).removeprefix("torch.")
    values = {
        "architectures": [HF_CLASSES[kind]], "model_type": kind,
        "hidden_size": config.dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim, "vocab_size": config.vocab_size,
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,               # read up to transformers 4, and
        "rope_parameters": {"rope_type": "default",    # from 5 on
                            "rope_theta": config.rope_theta},
        "sliding_window": max(sizes, default=None), "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": config.tied_embeddings,
        "dtype": name, "torch_dtype": name}
    if kind == "ministral":
        values["layer_types"] = ["full_attention" if window is None else
                                 "sliding_attention" for window in windows]
    if config.moe:
        values["num_local_experts"] = config.moe.num_experts
        values["num_experts_per_tok"] = config.moe.num_experts_per_tok
    return values
