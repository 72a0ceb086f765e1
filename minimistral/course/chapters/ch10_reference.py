"""Scaled-down checkpoints of three kinds, written by transformers, with what it computes from them.

Nothing of this library takes part: transformers builds the models, writes the folders and
computes the numbers, so that they can be held against ours. `benchmarks/reference_checkpoints.py`
wrote the ones that ship; the chapter writes a fresh one where transformers is installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHIPPED = Path(__file__).parents[2] / "assets" / "checkpoints"
TEXTS, TOKENS = 2, 17  # more than three windows

COMMON = dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=6,
              vocab_size=60, rms_norm_eps=1e-5, sliding_window=None, pad_token_id=None,
              tie_word_embeddings=False)
KINDS = {  # like 7B v0.1, like 8x7B, like Ministral 8B
    "mistral": dict(num_hidden_layers=3, intermediate_size=40, sliding_window=5,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "mixtral": dict(num_hidden_layers=2, intermediate_size=20, num_local_experts=5,
                    num_experts_per_tok=2,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "ministral": dict(num_hidden_layers=4, intermediate_size=28, sliding_window=5,
                      layer_types=["full_attention"] + 3 * ["sliding_attention"],
                      rope_parameters={"rope_type": "default", "rope_theta": 1e8}),
}


def installed() -> bool:
    """Whether transformers can be imported here."""
    return importlib.util.find_spec("transformers") is not None


def build(kind: str, seed: int):
    """A random model of transformers, its numbers about 1 in size so that each part is felt."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = kind.capitalize()
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **KINDS[kind]})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=1 / math.sqrt(weight.shape[-1]))
        model.get_input_embeddings().weight.normal_()
    return model


@torch.no_grad()
def activations(model, ids: Tensor) -> dict[str, Tensor]:
    """What transformers computes on the way, under Mistral's names, and the logits."""
    kept = {}

    def keep(name):
        def hook(module, inputs, output):
            kept[name] = (output[0] if isinstance(output, tuple) else output).clone()
        return hook

    inner = model.model
    handles = [inner.embed_tokens.register_forward_hook(keep("tok_embeddings")),
               inner.norm.register_forward_hook(keep("norm"))]
    for i, layer in enumerate(inner.layers):
        handles += [layer.self_attn.register_forward_hook(keep(f"layers.{i}.attention")),
                    layer.mlp.register_forward_hook(keep(f"layers.{i}.feed_forward")),
                    layer.register_forward_hook(keep(f"layers.{i}"))]
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return {**kept, "logits": logits}


def write(kind: str, folder: Path, seed: int = 0) -> None:
    """A checkpoint of this kind in `folder`, with token ids and what transformers makes of them."""
    model = build(kind, seed)
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(COMMON["vocab_size"], (TEXTS, TOKENS), generator=chance)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    values = {"token_ids": ids, **activations(model, ids)}
    save_file({name: x.contiguous() for name, x in values.items()},
              folder / "reference.safetensors")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner alone


def read(kind_or_folder: str | Path) -> tuple[Path, Tensor, dict[str, Tensor]]:
    """(folder, token ids, what transformers computed from them) of a scaled-down checkpoint."""
    folder = SHIPPED / str(kind_or_folder)
    folder = folder if folder.is_dir() else Path(kind_or_folder)
    values = load_file(folder / "reference.safetensors")
    return folder, values.pop("token_ids"), values


def provenance() -> dict:
    """What wrote the shipped ones: versions, seeds, date."""
    return json.loads((SHIPPED / "provenance.json").read_text(encoding="utf-8"))
