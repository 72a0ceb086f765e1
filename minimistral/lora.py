"""Low-rank adapters: a matrix stays as it is, and two narrow ones beside it learn.

What fine-tuning changes in a large matrix can be written with few numbers: the
change is up @ down, of rank r (Hu et al. 2021). Only these are trained and stored,
and one model can change its adapters as one changes clothes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.checkpoint_files import (
    match, read_weight, scan, write_json, write_weights, written_whole)
from minimistral.config import read_json

ATTENTION = ("wq", "wk", "wv", "wo")


class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) * up(down(x)) (Hu et al. 2021, section 4.1).

    down: (rank, inputs), drawn at random; up: (outputs, rank), zeros, so that at
    first nothing is changed. The base is frozen. x: (..., inputs) -> (..., outputs)
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        device = next(iter(base.state_dict().values())).device
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.normal_(self.down, std=base.in_features ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        narrow = F.linear(x.to(self.down.dtype), self.down)      # (..., rank)
        change = self.scale * F.linear(narrow, self.up)          # (..., outputs)
        return self.base(x) + change.type_as(x)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapters of a model by the names of the matrices they stand beside."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def matrices(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers' matrices whose last names these are, adapters looked through.
    Raises ValueError for a name that fits none."""
    found = {}
    for name, module in model.named_modules():
        module = module.base if isinstance(module, LoRALinear) else module
        in_layer = name.startswith("layers.") and hasattr(module, "in_features")
        if in_layer and name.rpartition(".")[2] in names:
            found[name] = module
    missing = set(names) - {name.rpartition(".")[2] for name in found}
    if missing or not found:
        raise ValueError(f"no layer has a matrix called {sorted(missing)}: they "
                         f"are wq, wk, wv, wo, w1, w2, w3")
    return found


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16.0,
             names: tuple[str, ...] = ATTENTION) -> nn.Module:
    """Freeze the model and give the matrices of these names adapters, in place.

    names: wq wk wv wo, w1 w2 w3, as the layers call them. Raises ValueError if
    there is an adapter already, a name fits nothing, or the rank is too wide.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: merge_lora or "
                         "remove_lora first, or load_adapter to change them")
    found = matrices(model, names)
    narrowest = min(min(m.in_features, m.out_features) for m in found.values())
    if not 1 <= rank <= narrowest:
        raise ValueError(f"rank={rank} must be from 1 to {narrowest}, the "
                         f"narrowest side of these matrices")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be above 0")
    model.requires_grad_(False)
    for name, base in found.items():
        replace_module(model, name, LoRALinear(base, rank, alpha))
    return model


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module where another of this dotted name stands."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def remove_lora(model: nn.Module) -> nn.Module:
    """Take the adapters off, in place: the model is what it was, and trainable."""
    for name, adapter in adapted(model).items():
        replace_module(model, name, adapter.base)
    return model.requires_grad_(True)


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add each adapter's change to its matrix, in place: the same function, as fast
    as before. Raises ValueError if there is nothing to merge, so that nothing is
    merged twice, or if a matrix is quantized and can't be added to."""
    adapters = adapted(model)
    if not adapters:
        raise ValueError("the model has no adapters: were they merged already?")
    for name, adapter in adapters.items():
        if not isinstance(adapter.base, nn.Linear):
            raise ValueError(f"{name} is a {type(adapter.base).__name__}, to which "
                             f"no change can be added: keep the adapter beside it")
    for adapter in adapters.values():
        weight = adapter.base.weight
        change = adapter.scale * (adapter.up @ adapter.down)     # (outputs, inputs)
        weight.copy_(weight.float() + change)
    return remove_lora(model)


def save_adapter(model: nn.Module, folder: str | Path, base: str = "") -> None:
    """Write adapter.json and adapter.safetensors, whole or not at all.

    base: name or folder of the model without adapters. With it, load_model reads
    the adapter's folder like any model's.
    """
    adapters = adapted(model)
    if not adapters:
        raise ValueError("the model has no adapters to save")
    first = next(iter(adapters.values()))
    rank = len(first.down)
    about = {"base": base, "rank": rank, "alpha": first.scale * rank,
             "names": sorted({name.rpartition(".")[2] for name in adapters})}
    weights = {f"{name}.{part}": getattr(adapter, part).detach()
               for name, adapter in adapters.items() for part in ("down", "up")}
    with written_whole(Path(folder), "adapter") as draft:
        write_weights(draft, "adapter", weights)
        write_json(draft / "adapter.json", about)


def read_about(folder: Path) -> dict:
    """What adapter.json says: base, rank, alpha, names. Raises ValueError."""
    about = read_json(folder / "adapter.json")
    if set(about) != {"base", "rank", "alpha", "names"}:
        raise ValueError(f"{folder / 'adapter.json'} must have base, rank, alpha "
                         f"and names, not {sorted(about)}")
    return about


def base_of(folder: Path) -> str:
    """The model that the adapter of a folder was made for: a name, or a folder."""
    base = read_about(folder)["base"]
    if not base:
        raise ValueError(f"{folder / 'adapter.json'} does not say for which model "
                         f"it was made: load that one, then load_adapter")
    return base


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give the model the adapters of a folder, in place of those it may have.

    Raises ValueError naming file and tensor, before anything is changed, if they
    were made for a model of another shape.
    """
    folder = Path(folder)
    about = read_about(folder)
    stored = scan([folder / "adapter.safetensors"])
    wanted = {}
    for name, base in matrices(model, tuple(about["names"])).items():
        wanted[f"{name}.down"] = (about["rank"], base.in_features)
        wanted[f"{name}.up"] = (base.out_features, about["rank"])
    match(wanted, stored, folder)
    weights = {name: read_weight(stored[name], lambda x: x, shape, None,
                                 torch.float32)
               for name, shape in wanted.items()}
    add_lora(remove_lora(model), about["rank"], about["alpha"],
             tuple(about["names"]))
    for name, adapter in adapted(model).items():
        adapter.down.copy_(weights[f"{name}.down"])
        adapter.up.copy_(weights[f"{name}.up"])
    return model
