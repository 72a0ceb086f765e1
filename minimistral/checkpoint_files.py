"""Plumbing of checkpoint.py: which files a folder of weights holds, what stands in
them, Hugging Face's config.json, and writing a folder whole or not at all."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimistral.config import ModelConfig, MoEConfig, read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32,
          "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """One tensor in a file: known by shape and dtype, read only when asked."""
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


# ------------------------------------------------------------ what a folder holds


def find_weights(folder: Path, stem: str) -> list[Path]:
    """The files that hold a folder's weights, [] if there are none: `stem`.safetensors,
    the shards of its index, the shards without one, or Mistral's first pickles,
    consolidated.00.pth (7B v0.1) and consolidated.00.pt ... 07.pt (8x7B)."""
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return files_of_index(index)
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if shards:
        count = int(re.search(r"-of-0*(\d+)", shards[0].name)[1])
        if count != len(shards):
            raise ValueError(f"{folder} holds {len(shards)} of {count} files "
                             f"{stem}-...-of-{count:05}.safetensors: copy the others too")
        return shards
    if stem == "consolidated":
        for suffix in (".pth", ".pt"):
            if pickles := sorted(folder.glob(f"{stem}.[0-9][0-9]{suffix}")):
                return pickles
    return []


def files_of_index(index: Path) -> list[Path]:
    """The shards that an index names, each checked to lie beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map from tensors to files")
    files = sorted({str(name) for name in names.values()})
    for file in files:
        if Path(file).name != file or "\\" in file:
            raise ValueError(f"{index} names the file {file!r}, which is not beside it")
        if not (index.parent / file).is_file():
            lost = next(name for name in names if names[name] == file)
            raise ValueError(f"{index.parent / file} is missing: by its index it holds "
                             f"tensor {lost!r}")
    return [index.parent / file for file in files]


def scan(files: list[Path]) -> dict[str, Stored]:
    """Every tensor in these files, by the name it has there. Nothing is read yet."""
    stored = {}
    for file in files:
        pickled = file.suffix in (".pth", ".pt")
        for entry in (scan_pickle if pickled else scan_safetensors)(file):
            stored[entry.name] = entry
    return stored


def scan_safetensors(file: Path) -> Iterator[Stored]:
    try:
        with safe_open(file, framework="pt") as opened:
            headers = {name: opened.get_slice(name) for name in opened.keys()}
            headers = {name: (tuple(h.get_shape()), h.get_dtype())
                       for name, h in headers.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): copy or download "
                         f"it again") from None

    def reader(name):
        def read():                            # opened anew: the pages of the file are
            with safe_open(file, framework="pt") as again:      # freed with the tensor
                return again.get_tensor(name)
        return read

    for name, (shape, code) in headers.items():
        yield Stored(file, name, shape, known_dtype(DTYPES.get(code, code), file, name),
                     reader(name))


def scan_pickle(file: Path) -> Iterator[Stored]:
    """Tensors of a .pth file, mapped, not read. Only plain tensors are unpickled;
    PyTorch refuses everything else before any of its code could run."""
    try:
        values = torch.load(file, map_location="cpu", weights_only=True,
                            mmap=zipfile.is_zipfile(file))
    except Exception as error:                 # a hostile file may fail in any way
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file} is damaged, or a pickle that holds more than tensors; "
                         f"nothing in it was run ({reason})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not a dictionary of "
                         f"tensors by name")
    for name, tensor in values.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu":
            raise ValueError(f"{file}: {name!r} is a {type(tensor).__name__}, not a "
                             f"plain tensor; is this a training checkpoint?")
        yield Stored(file, str(name), tuple(tensor.shape),
                     known_dtype(tensor.dtype, file, name), lambda tensor=tensor: tensor)


def known_dtype(dtype, file: Path, name: str) -> torch.dtype:
    """The dtype, or ValueError for whole numbers and 8-bit floats."""
    if dtype not in DTYPES.values():
        raise ValueError(f"{file}: tensor {name!r} is stored as {dtype}; weights are "
                         f"read as {', '.join(str(d) for d in DTYPES.values())}. Is this "
                         f"a quantized checkpoint? Take the unquantized one.")
    return dtype


# ------------------------------------------------------------ config.json

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


# ------------------------------------------------------------ whole or not at all


def write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def written_whole(folder: Path, stale: str) -> Iterator[Path]:
    """Write a folder's files into the draft that this yields. Only when all of them
    are on the disk do they take the old ones' places, the weights first; then files
    that match the regular expression `stale` and are not among the new are removed.
    If anything fails before, the draft goes and the folder is as it was (OSError)."""
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; save_model writes a folder")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    try:
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            files = sorted(draft.iterdir(), key=lambda file: file.suffix == ".json")
            for file in files:
                with open(file, "r+b") as opened:
                    os.fsync(opened.fileno())
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} was not saved ({error}); what was there before is "
                          f"untouched") from error
        if not folder.exists():
            draft.rename(folder)
            return
        for file in files:
            file.replace(folder / file.name)
        new = {file.name for file in files}
        for file in folder.iterdir():
            if re.fullmatch(stale, file.name) and file.name not in new:
                file.unlink()
    finally:
        shutil.rmtree(draft, ignore_errors=True)
