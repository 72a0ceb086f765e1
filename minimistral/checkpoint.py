"""Checkpoints: Mistral's own layout and Hugging Face's, in and out.

Inside the library everything bears Mistral's names. Hugging Face's layout is the
same numbers under other names, with the rows of wq and wk in another order; it is
converted here, at the door.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minimistral.checkpoint_files import (
    finite, match, on_meta, open_folder, read_weight, write_json, write_weights,
    written_whole)
from minimistral.checkpoint_hf import config_to_hf
from minimistral.config import ModelConfig
from minimistral.lora import base_of, load_adapter, merge_lora
from minimistral.model import Transformer
from minimistral.shipped import SHIPPED, find_model

# ------------------------------------------------------------ two layouts

HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "layers.{}.attention.wq": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.wk": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.wv": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    # dense
    "layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
    # mixture of experts
    "layers.{}.feed_forward.gate": "model.layers.{}.block_sparse_moe.gate",
    "layers.{}.feed_forward.experts.{}.w1":
        "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "layers.{}.feed_forward.experts.{}.w2":
        "model.layers.{}.block_sparse_moe.experts.{}.w2",
    "layers.{}.feed_forward.experts.{}.w3":
        "model.layers.{}.block_sparse_moe.experts.{}.w3",
}


def hf_name(name: str) -> str:
    """Hugging Face's name for one of Mistral's tensors.

    >>> hf_name("layers.3.attention.wq.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    stem = name.removesuffix(".weight")
    numbers = re.findall(r"\b\d+\b", stem)
    return HF_NAMES[re.sub(r"\b\d+\b", "{}", stem)].format(*numbers) + ".weight"


def permute_rotary(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of wq or wk from Mistral's layout to Hugging Face's: within
    each head the even rows first, then the odd ones, since Mistral turns the pairs
    (2i, 2i + 1) and Hugging Face the pairs (i, i + D/2).

    weight: (n_heads * D, dim) -> (n_heads * D, dim)
    """
    pairs = weight.unflatten(0, (n_heads, -1, 2))                # (H, D/2, 2, dim)
    return pairs.transpose(1, 2).reshape(weight.shape)


def unpermute_rotary(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `permute_rotary`: from Hugging Face's layout to Mistral's.

    weight: (n_heads * D, dim) -> (n_heads * D, dim)
    """
    halves = weight.unflatten(0, (n_heads, 2, -1))               # (H, 2, D/2, dim)
    return halves.transpose(1, 2).reshape(weight.shape)


def rotary_heads(name: str, config: ModelConfig) -> int | None:
    """How many heads a tensor that the layouts order differently has, else None."""
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])


# ------------------------------------------------------------ in


def load_model(folder_or_name, *, device=None, dtype=None) -> Transformer:
    """Load a model, ready to generate.

    folder_or_name: a folder in Mistral's layout (params.json and consolidated
    weights) or Hugging Face's (config.json and model*.safetensors), or the name of
    a model that comes with this package, such as "tales-dense".
    device: None means the CPU.
    dtype: None keeps that of the stored weights (of the embeddings, if they
    differ); a shipped model on the CPU becomes float32, in which a CPU is fastest.

    Each tensor goes straight from its file to its place, so the peak of memory is
    the model and one tensor more. Pickles (.pth, .pt) are read as plain tensors
    only. Raises ValueError, naming file and tensor, for a checkpoint that is
    damaged, incomplete, not finite, of another shape, or of a kind not built.
    """
    folder = find_model(folder_or_name)
    if (folder / "adapter.json").is_file():                             # chapter 13
        base = load_model(base_of(folder), device=device, dtype=dtype)  # chapter 13
        return merge_lora(load_adapter(base, folder))                   # chapter 13
    model, places, dtype = open_model(folder, device, dtype)
    weights = {name: read_weight(*place, device, dtype)
               for name, place in places.items()}
    model.load_state_dict(weights, assign=True)       # these tensors, not copies
    return model.eval()


def open_model(folder: Path, device, dtype) -> tuple:
    """A folder's model, still without numbers; what read_weight asks, by weight;
    and the dtype of all. Every name and shape is compared."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point type such as "
                         f"torch.bfloat16; a model is quantized after it is loaded")
    config, layout, stored = open_folder(folder)
    model = on_meta(config)                           # shapes alone, no numbers
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    places = {name: locate(name, shape, config, layout)
              for name, shape in shapes.items()}
    match({place.name: place.shape for place in places.values()}, stored, folder)
    if dtype is None:
        shipped_on_cpu = (folder.parent == SHIPPED
                          and torch.device(device or "cpu").type == "cpu")
        dtype = (torch.float32 if shipped_on_cpu
                 else stored[places["tok_embeddings.weight"].name].dtype)
    return model, {name: (stored[place.name], place.convert, shapes[name])
                   for name, place in places.items()}, dtype


class Place(NamedTuple):
    """Where a file keeps one of the model's tensors, and the way from there."""
    name: str
    shape: tuple[int, ...]
    convert: Callable[[Tensor], Tensor]


def locate(name: str, shape: tuple, config: ModelConfig, layout: str) -> Place:
    """The place of one tensor in the layout "mistral", "hf", or "stacked": that of
    the first Mixtral 8x7B, which kept a layer's experts in one matrix."""
    heads = rotary_heads(name, config)
    if layout == "hf" and heads:
        return Place(hf_name(name), shape, partial(unpermute_rotary, n_heads=heads))
    if layout == "hf":
        return Place(hf_name(name), shape, as_it_is)
    if layout == "stacked":
        name = name.replace("feed_forward", "block_sparse_moe")
        if ".experts." in name:
            stem, expert, matrix = re.split(r"\.experts\.(\d+)", name)
            matrix = matrix.removesuffix(".weight")           # .w1, .w2 or .w3
            experts, hidden = config.moe.num_experts, config.hidden_dim
            convert = partial(unstack, expert=int(expert), hidden_dim=hidden,
                              transposed=matrix == ".w2")
            return Place(stem + matrix, (experts * hidden, config.dim), convert)
    return Place(name, shape, as_it_is)


def as_it_is(weight: Tensor) -> Tensor:
    """No conversion: the tensor itself."""
    return weight


def unstack(weight: Tensor, expert: int, hidden_dim: int, transposed: bool
            ) -> Tensor:
    """One expert's matrix out of a stack of them: (E * hidden_dim, dim) ->
    (hidden_dim, dim), or (dim, hidden_dim) if it is to be transposed."""
    rows = weight[expert * hidden_dim:(expert + 1) * hidden_dim]
    return rows.T if transposed else rows


# ------------------------------------------------------------ out


def save_model(model: Transformer, folder, *, layout: str = "mistral",
               max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model's weights and configuration into a folder, whole or not at all.

    layout: "mistral" (params.json, consolidated.safetensors) or "hf" (config.json,
    model.safetensors, or several files of at most max_shard_bytes and an index).
    Other files in the folder, such as a tokenizer, stay.
    Raises ValueError for weights that are not finite and, for "hf", for a model
    that transformers has no class for; OSError if the disk is full or not writable.
    The folder's old files are then as they were.
    """
    config = model.config
    weights = model.state_dict()
    for name, weight in weights.items():
        if not finite(weight):
            raise ValueError(f"tensor {name!r} holds NaN or infinity: nothing was "
                             f"saved")
    if layout == "mistral":
        with written_whole(folder, stem="consolidated") as draft:
            write_weights(draft, "consolidated", weights)
            config.to_json(draft / "params.json")
    elif layout == "hf":
        about = config_to_hf(config, weights["tok_embeddings.weight"].dtype)
        with written_whole(folder, stem="model") as draft:
            convert = partial(as_hf, config=config)
            write_weights(draft, "model", weights, convert, max_shard_bytes)
            write_json(draft / "config.json", about)
    else:
        raise ValueError(f"layout={layout!r} must be 'mistral' or 'hf'")


def as_hf(name: str, weight: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """A tensor and its name as Hugging Face's layout has them."""
    heads = rotary_heads(name, config)
    return hf_name(name), permute_rotary(weight, heads) if heads else weight
