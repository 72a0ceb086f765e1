"""Checkpoints: Mistral's own layout and Hugging Face's, in and out.

Inside the library everything bears Mistral's names. Hugging Face's layout is the same
numbers under other names, with the rows of wq and wk in another order; it is converted
here, at the door.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minimistral.checkpoint_files import (
    Stored, config_from_hf, config_to_hf, find_weights, scan, write_json,
    written_whole)
from minimistral.config import ModelConfig, count_parameters, read_json
from minimistral.model import Transformer

SHIPPED = Path(__file__).parent / "assets" / "models"

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
    weights) or Hugging Face's (config.json and model*.safetensors), or the name of a
    model that comes with this package, such as "tales-dense".
    device: None means the CPU.
    dtype: None keeps that of the stored weights (of the embeddings, if they differ);
    a shipped model on the CPU becomes float32, in which a CPU computes fastest.

    Each tensor goes straight from its file to its place, so the peak of memory is the
    model and one tensor more. Pickles (.pth, .pt) are read as plain tensors only.
    Raises ValueError, naming file and tensor, for a checkpoint that is damaged,
    incomplete, not finite, of another shape, or of a kind that is not built.
    """
    folder, shipped = find_model(folder_or_name)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point type, such as "
                         f"torch.bfloat16; quantized weights are made after loading")
    config, layout, stored = open_folder(folder)
    with torch.device("meta"):                      # shapes alone, no memory
        model = Transformer(config)
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    sources = find_sources(config, layout, shapes, stored, folder)
    if dtype is None:
        on_cpu = torch.device(device or "cpu").type == "cpu"
        dtype = (torch.float32 if shipped and on_cpu
                 else sources["tok_embeddings.weight"][0].dtype)
    weights = {name: read_weight(*source, device, dtype)
               for name, source in sources.items()}
    model.load_state_dict(weights, assign=True)     # the tensors themselves, no copy
    return model.eval()


def find_model(folder_or_name) -> tuple[Path, bool]:
    """The folder of a model, and whether it is one that comes with the package."""
    folder = Path(folder_or_name)
    if folder.is_dir():
        return folder, False
    names = sorted(path.name for path in SHIPPED.glob("*") if path.is_dir())
    if str(folder_or_name) in names:
        return SHIPPED / folder_or_name, True
    raise ValueError(f"{str(folder_or_name)!r} is neither a folder with a model nor one "
                     f"of the shipped models {names}: a published checkpoint is loaded "
                     f"from the folder that you downloaded it to")


def open_folder(folder: Path) -> tuple[ModelConfig, str, dict[str, Stored]]:
    """What a folder says about its model, the layout of its weights, "mistral", "hf"
    or "stacked" (the first 8x7B), and all tensors in it, not read yet."""
    for about, stem, layout, reader in [
            ("params.json", "consolidated", "mistral", ModelConfig.from_json),
            ("config.json", "model", "hf", config_from_hf)]:
        files = find_weights(folder, stem)
        if files and (folder / about).is_file():
            break
    else:
        raise ValueError(f"{folder} holds no model: there must be params.json with "
                         f"consolidated.safetensors (Mistral's layout), or config.json "
                         f"with model.safetensors (Hugging Face's); it holds "
                         f"{sorted(path.name for path in folder.iterdir())[:8]}")
    values = read_json(folder / about)
    try:
        config = reader(values)
    except KeyError as error:
        raise ValueError(f"{folder / about} lacks {error}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder / about}: {error}") from None
    stored = scan(files)
    if any(".block_sparse_moe.w1" in name for name in stored):
        layout = "stacked"
    described = count_parameters(config).total
    held = sum(math.prod(entry.shape) for entry in stored.values())
    if described > 100 * held:            # before a wrong number costs an hour
        raise ValueError(f"{folder / about} describes a model of {described:,} "
                         f"parameters, but {files[0]} and its like hold {held:,}")
    return config, layout, stored


Source = tuple[Stored, Callable[[Tensor], Tensor]]    # a tensor, what to do with it


def find_sources(config: ModelConfig, layout: str, shapes: dict[str, tuple],
                 stored: dict[str, Stored], folder: Path) -> dict[str, Source]:
    """Where each of the model's tensors comes from. Raises ValueError if one lacks, is
    left over or has another shape than `shapes`, the model's own, ask for."""
    sources, left = {}, set(stored)
    for name, shape in shapes.items():
        where, shape_there, convert = locate(name, shape, config, layout)
        if where not in stored:
            raise ValueError(f"{folder} lacks tensor {where!r}: is a file missing, or "
                             f"does another model's configuration lie beside it?")
        entry = stored[where]
        if entry.shape != shape_there:
            raise ValueError(f"{entry.file}: tensor {where!r} has shape {entry.shape}, "
                             f"but by the configuration it is {shape_there}")
        sources[name] = entry, convert
        left.discard(where)
    if left:
        name = min(left)
        raise ValueError(f"{stored[name].file}: tensor {name!r} (one of {len(left)}) has "
                         f"no place in this model: do configuration and weights belong "
                         f"together?")
    return sources


def locate(name: str, shape: tuple, config: ModelConfig, layout: str
           ) -> tuple[str, tuple, Callable[[Tensor], Tensor]]:
    """The name and shape that one tensor has in a layout, and how to convert it."""
    if layout == "hf":
        heads = rotary_heads(name, config)
        return (hf_name(name), shape,
                partial(unpermute_rotary, n_heads=heads) if heads else as_it_is)
    if layout == "stacked" and ".feed_forward.experts." in name:
        stem, _, expert, matrix, _ = name.rsplit(".", 4)
        hidden, experts = config.hidden_dim, config.moe.num_experts
        stack = stem.replace("feed_forward", "block_sparse_moe") + f".{matrix}"
        return (stack, (experts * hidden, config.dim),
                partial(unstack, expert=int(expert), hidden=hidden,
                        transposed=matrix == "w2"))
    if layout == "stacked":
        name = name.replace("feed_forward.gate", "block_sparse_moe.gate")
    return name, shape, as_it_is


def as_it_is(weight: Tensor) -> Tensor:
    return weight


def unstack(weight: Tensor, expert: int, hidden: int, transposed: bool) -> Tensor:
    """One expert out of a stack, (E * hidden, dim) -> (hidden, dim), as the first 8x7B
    stores them; its w2 is transposed there -> (dim, hidden)."""
    rows = weight[expert * hidden:(expert + 1) * hidden]
    return rows.T if transposed else rows


def read_weight(entry: Stored, convert, device, dtype) -> Tensor:
    """Read one tensor into memory of its own."""
    weight = convert(entry.read())
    if not finite(weight):
        raise ValueError(f"{entry.file}: tensor {entry.name!r} holds NaN or infinity: "
                         f"the file is damaged, or its training had diverged")
    return weight.to(device=device or "cpu", dtype=dtype, copy=True,
                     memory_format=torch.contiguous_format)


def finite(weight: Tensor) -> bool:
    """Whether all numbers are finite: NaN is the extreme of any set it is in, so that
    no mask as large as the weights is needed."""
    low, high = weight.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())


# ------------------------------------------------------------ out


def save_model(model: Transformer, folder, *, layout: str = "mistral",
               max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model's weights and configuration into a folder, whole or not at all.

    layout: "mistral" (params.json, consolidated.safetensors) or "hf" (config.json,
    model.safetensors, or several files of at most max_shard_bytes and their index).
    Other files in the folder, such as a tokenizer, stay.
    Raises ValueError for weights that are not finite and, for "hf", for a model that
    transformers has no class for; OSError if the disk is full or not writable. In both
    cases the folder's old files are as they were.
    """
    weights = {name: w.detach() for name, w in model.state_dict().items()}
    for name, weight in weights.items():
        if not finite(weight):
            raise ValueError(f"tensor {name!r} holds NaN or infinity: nothing was saved")
    if layout == "mistral":
        with written_whole(folder, stale=r"consolidated.*\.(safetensors|index\.json|pth?)"
                           ) as draft:
            tensors = {name: w.cpu().contiguous() for name, w in weights.items()}
            save_file(tensors, draft / "consolidated.safetensors", {"format": "pt"})
            model.config.to_json(draft / "params.json")
    elif layout == "hf":
        about = config_to_hf(model.config, weights["tok_embeddings.weight"].dtype)
        with written_whole(folder, stale=r"model.*\.safetensors(\.index\.json)?") as draft:
            save_hf(weights, model.config, draft, max_shard_bytes)
            write_json(draft / "config.json", about)
    else:
        raise ValueError(f"layout={layout!r} must be 'mistral' or 'hf'")


def save_hf(weights: dict[str, Tensor], config: ModelConfig, folder: Path,
            max_shard_bytes: int) -> None:
    """Write weights under Hugging Face's names, into one file or several."""
    shards = [[]]
    room = max_shard_bytes
    for name, weight in weights.items():
        if shards[-1] and weight.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= weight.nbytes
    index = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            heads = rotary_heads(name, config)
            weight = permute_rotary(weights[name], heads) if heads else weights[name]
            tensors[hf_name(name)] = weight.cpu().contiguous()
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(weight.nbytes for weight in weights.values())
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": size}, "weight_map": index})
