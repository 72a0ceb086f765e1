"""Plumbing of checkpoint.py: which files a folder of weights holds, what stands in
them, and writing a folder whole or not at all."""

import json
import math
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
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minimistral.checkpoint_hf import config_from_hf
from minimistral.config import ModelConfig, count_parameters
from minimistral.config_files import read_json
from minimistral.files import draft_of, write_whole
from minimistral.model import Transformer

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


# ------------------------------------------------------------ reading


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
        if (folder / "quantized.safetensors").is_file():
            raise ValueError(f"{folder} holds a quantized model: load_quantized reads it")
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


def match(wanted: dict[str, tuple], stored: dict[str, Stored], folder: Path) -> None:
    """Raise ValueError unless each wanted name is stored in its shape, and nothing else is."""
    for name, shape in wanted.items():
        if name not in stored:
            raise ValueError(f"{folder} lacks tensor {name!r}: is a file missing, or "
                             f"does another model's configuration lie beside it?")
        if stored[name].shape != shape:
            raise ValueError(f"{stored[name].file}: tensor {name!r} has shape "
                             f"{stored[name].shape}, but the configuration asks for "
                             f"{shape}")
    if left := sorted(set(stored) - set(wanted)):
        raise ValueError(f"{stored[left[0]].file}: tensor {left[0]!r} has no place in "
                         f"this model ({len(left)} in all): do configuration and weights "
                         f"belong together?")


class Undrawn(TorchFunctionMode):
    """Inside this block no random weights are drawn. On the meta device there is nothing
    to draw, but PyTorch would load a compiler of several seconds for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ == "normal_":
            return (*args, *(kwargs or {}).values())[0]
        return function(*args, **(kwargs or {}))


def on_meta(config: ModelConfig) -> Transformer:
    """The model with shapes and without numbers: the meta device takes no memory."""
    with torch.device("meta"), Undrawn():
        return Transformer(config)


def read_stored(entry: Stored, convert) -> Tensor:
    """Read one tensor, converted. What needs no conversion is no copy: it is read from the
    file where it is used."""
    stored = convert(entry.read())
    if not finite(stored):
        raise ValueError(f"{entry.file}: tensor {entry.name!r} holds NaN or infinity: "
                         f"the file is damaged, or its training had diverged")
    return stored


def read_weight(entry: Stored, convert, shape, device, dtype) -> Tensor:
    """The same in memory of its own, which is taken first: so the converted copy, freed
    after, leaves no hole between the weights."""
    weight = torch.empty(shape, device=device or "cpu", dtype=dtype)
    return weight.copy_(read_stored(entry, convert))


def finite(weight: Tensor) -> bool:
    """Whether all numbers are finite: NaN is the extreme of any set it is in, so that
    no mask as large as the weights is needed."""
    low, high = weight.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())


# ------------------------------------------------------------ whole or not at all


def write_json(path: Path, values: dict) -> None:
    write_whole(path, json.dumps(values, indent=2) + "\n")


@contextmanager
def written_whole(folder: Path, stem: str) -> Iterator[Path]:
    """Write a folder's files, each whole, into the draft that this yields. Only when all
    are there do they take the old ones' places, the weights first; then older
    weights of the same `stem` that lie beside them under other names are removed.
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
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} was not saved ({error}); what was there before is "
                          f"untouched") from error
        if not folder.exists():
            draft.rename(folder)
            return
        for file in files:
            file.replace(folder / file.name)
        new = {file.name for file in files}
        weights = stem + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
        for file in folder.iterdir():
            if file.name not in new and re.fullmatch(weights, file.name):
                file.unlink()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_weights(folder: Path, stem: str, weights: dict[str, Tensor],
                  convert=lambda *pair: pair, max_bytes: float = math.inf) -> None:
    """Write `stem`.safetensors, or numbered files of at most `max_bytes` and an index.
    convert(name, weight) gives the name and the tensor as they are stored; it is called
    file by file, so that copies of one file's tensors exist at a time."""
    shards, room = [[]], max_bytes
    for name, weight in weights.items():
        if shards[-1] and weight.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= weight.nbytes
    index = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else f"{stem}.safetensors"
        tensors = dict(convert(name, weights[name]) for name in names)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with draft_of(folder / file) as draft:
            save_file(tensors, draft, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(weight.nbytes for weight in weights.values())
        write_json(folder / f"{stem}.safetensors.index.json",
                   {"metadata": {"total_size": size}, "weight_map": index})
