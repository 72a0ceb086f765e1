"""A parity debugger: where do two models, or a model and a recording, first differ?

Two models that ought to compute the same are run on the same tokens. What every
module hands on is compared in the order in which it is computed, so that the first
difference is near its cause; all later ones are consequences.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Difference(NamedTuple):
    """The first place where two runs part.

    name     the module, such as "layers.2.attention.wq", or "logits"
    largest  the largest difference there, as a share of the largest number
             expected; infinity for another shape, or where one is not a number
    index    where in the tensor the largest is
    ours, theirs  the two numbers there, or the two shapes
    weights  those of the module's own weights that differ between two models
    """
    name: str
    largest: float
    index: tuple[int, ...]
    ours: float | tuple
    theirs: float | tuple
    weights: tuple[str, ...] = ()

    def __str__(self) -> str:
        if isinstance(self.ours, tuple):
            text = f"{self.name} has shape {self.ours}, expected {self.theirs}"
        else:
            text = (f"{self.name} differs first: at {list(self.index)} it is "
                    f"{self.ours:.4g}, expected {self.theirs:.4g}")
        if self.weights:
            text += f"; weights that differ: {', '.join(self.weights)}"
        return text


def first_difference(model: nn.Module, other: nn.Module | Mapping[str, Tensor],
                     token_ids: Tensor, tolerance: float = 1e-4
                     ) -> Difference | None:
    """The first module whose output differs by more than `tolerance`, as a share of
    the largest number expected there; None if the two agree.

    other: a model with the same names, or a recording {name: tensor} of some
    modules by Mistral's names, from `record` or from another program. Only names
    that both have are compared. Raises ValueError if they have none in common.
    """
    ours = record(model, token_ids)
    is_model = isinstance(other, nn.Module)
    theirs = record(other, token_ids) if is_model else other
    common = [name for name in ours if name in theirs]
    if not common:
        raise ValueError(f"nothing to compare: the model has {list(ours)[:4]} ..., "
                         f"the other {list(theirs)[:4]} ...; are the names "
                         f"Mistral's?")
    for name in common:
        found = compare(name, ours[name], theirs[name], tolerance)
        if found:
            return found._replace(weights=differing(model, other, name)
                                  if is_model else ())
    return None


@torch.no_grad()
def record(model: nn.Module, token_ids: Tensor) -> dict[str, Tensor]:
    """What every module hands on while the model reads token_ids (B, T), by name,
    in the order in which it is computed; last the logits."""
    seen: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            if isinstance(output, Tensor):
                seen[name] = output.detach().clone()
        return hook

    handles = [module.register_forward_hook(keep(name))
               for name, module in model.named_modules() if name]
    try:
        seen["logits"] = model(token_ids).detach()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def compare(name: str, ours: Tensor, theirs: Tensor, tolerance: float
            ) -> Difference | None:
    """Whether one output differs, and where most."""
    if ours.shape != theirs.shape:
        return Difference(name, torch.inf, (), tuple(ours.shape),
                          tuple(theirs.shape))
    if not ours.numel():
        return None
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    apart = (ours - theirs).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    apart = apart.masked_fill(ours == theirs, 0)     # two equal infinities
    size = theirs.abs().nan_to_num(nan=0, posinf=0).max().item()
    largest = apart.max().item() / max(size, 1e-12)
    if largest <= tolerance:
        return None
    index = torch.unravel_index(apart.argmax(), apart.shape)
    return Difference(name, largest, tuple(int(i) for i in index),
                      ours[index].item(), theirs[index].item())


def differing(model: nn.Module, other: nn.Module, name: str) -> tuple[str, ...]:
    """The weights of one module, by full names, that are not equal in both."""
    if name not in dict(model.named_modules()):
        return ()                                    # "logits" is no module
    theirs = dict(other.get_submodule(name).named_parameters())
    return tuple(f"{name}.{key}"
                 for key, weight in model.get_submodule(name).named_parameters()
                 if key in theirs and not torch.equal(weight, theirs[key]))
