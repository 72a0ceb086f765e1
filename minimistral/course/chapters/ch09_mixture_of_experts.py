"""Chapter 9: its pictures, its measurements and the logic of its explorer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import minimistral as mm
from minimistral import moe as library
from minimistral.moe import MoE, all_experts, record_routing, route
from minimistral.train import TrainConfig, validation_rows

from ..figures import BLACK, BLUE, GREEN, HATCHES, MARKERS, ORANGE, PINK, new_figure
from ..ladder import ladder
from ..pieces import swap
from .ch02_attention import lines_of, pieces, shown

RECORDED = Path(__file__).parents[3] / "benchmarks" / "results" / "mixture.json"
GREY = "#767676"

# ---------------------------------------------------------------- the models of this chapter

EXPERTS, CHOSEN, HIDDEN = 8, 2, 16  # Mixtral's 8 and 2; the width of one expert
LADDER_ROW = "8 experts, 2 chosen"
# name -> (width of a feed-forward, experts, chosen)
QUALITY = {
    "dense, equal active": (CHOSEN * HIDDEN, None),
    "mixture": (HIDDEN, (EXPERTS, CHOSEN)),
    "dense, equal total": (EXPERTS * HIDDEN, None),
}
BALANCE = 0.1  # the weight of the balance loss; 0 is off
TOO_STRONG = 10.0


def small_config(hidden_dim: int, experts: tuple[int, int] | None = None,
                 vocab_size: int | None = None) -> mm.ModelConfig:
    """Chapter 5's rung, with another feed-forward. experts: (how many, chosen) or None"""
    return mm.ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16,
                          hidden_dim=hidden_dim, moe=mm.MoEConfig(*experts) if experts else None,
                          vocab_size=vocab_size or ladder.tokenizer.vocab_size)


def small_model(name: str = "mixture", seed: int = 0, vocab_size: int | None = None) -> mm.Transformer:
    """One of the models of ``QUALITY``, untrained."""
    torch.manual_seed(seed)
    return mm.Transformer(small_config(*QUALITY[name], vocab_size=vocab_size))


def recipe(balance: float = BALANCE, seed: int = 0, steps: int = 120) -> TrainConfig:
    """Chapter 5's better recipe, with the balance loss."""
    return TrainConfig(steps=steps, batch_size=16, seq_len=96, lr=2e-2, warmup_steps=steps // 10,
                       at_starts=True, optimizer="muon", weight_decay=0.05, balance=balance,
                       seed=seed)


def learn(model: nn.Module, tokens=None, *, balance: float = BALANCE, seed: int = 0,
          steps: int = 120) -> nn.Module:
    """Train with this chapter's recipe; by default on the ladder's tales.

    Experts as small as these are computed fastest all at once, so ``all_experts`` is swapped in.
    It gives the same sums.
    """
    if model.config.moe is None:
        balance = 0.0
    with swap("moe.chosen_experts", all_experts):
        mm.train(model, tokens or ladder.tokens, recipe(balance, seed, steps), progress=False)
    return model.eval()


def ladder_model(seed: int = 0) -> mm.Transformer:
    """The model of this chapter's rung, untrained. ``learn(ladder_model())`` trains it."""
    return small_model("mixture", seed)


def nats_per_byte(model) -> float:
    """The loss on the ladder's validation tales, as the scoreboard counts it."""
    return ladder.validation_nats(model) / len(ladder.corpus.val.encode())


# ---------------------------------------------------------------- who goes where


@torch.no_grad()
def choices(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> list[Tensor]:
    """The chosen experts of every token, layer by layer: (N, k) each; no padding.

    ids: (B, T) or a list of ids
    """
    ids = torch.as_tensor(ids)
    ids = ids[None] if ids.dim() == 1 else ids
    with record_routing(model) as seen:
        model(ids, positions=positions)
    kept = torch.ones(ids.numel(), dtype=torch.bool)
    if positions is not None:
        kept = (positions >= 0).expand_as(ids).flatten()
    return [route(logits[kept], model.config.moe.num_experts_per_tok)[1] for logits in seen]


def shares(chosen: Tensor, n_experts: int) -> Tensor:
    """Of all assignments the part that each expert got: (N, k) -> (E,), summing to 1."""
    return torch.bincount(chosen.flatten(), minlength=n_experts) / chosen.numel()


def held_out_rows(tokenizer=None, documents: Sequence[str] | None = None):
    """The ladder's validation tales as rows with positions."""
    documents = ladder.corpus.val_documents if documents is None else documents
    ids = (tokenizer or ladder.tokenizer).encode_batch(list(documents), bos=True, eos=True)
    return validation_rows(ids, max(map(len, ids)))


def usage(model: nn.Module, rows=None) -> list[Tensor]:
    """The share of each expert on held-out text, layer by layer: (E,) each."""
    rows = held_out_rows() if rows is None else rows
    n_experts = model.config.moe.num_experts
    return [shares(c, n_experts) for c in choices(model, rows.inputs, rows.positions)]


def distinct(chosen: Tensor, batch: int, draws: int = 200, seed: int = 0) -> float:
    """Mean number of different experts that ``batch`` tokens, drawn at random, touch.

    chosen: (N, k)
    """
    chance = torch.Generator().manual_seed(seed)
    picked = chosen[torch.randint(len(chosen), (draws, batch), generator=chance)].flatten(1)
    return sum(len(set(row)) for row in picked.tolist()) / draws


def expected_distinct(n_experts: int, k: int, batch: int) -> float:
    """The same if every token chose k of the experts evenly, independent of the others."""
    return n_experts * (1 - (1 - k / n_experts) ** batch)


# ---------------------------------------------------------------- recorded measurements


def recorded(part: str, path: Path = RECORDED) -> list[dict]:
    """The runs of one part of benchmarks/mixture.py; empty if it was never run."""
    return json.loads(path.read_text(encoding="utf-8"))[part] if path.exists() else []


def recorded_losses() -> dict[str, list[float]]:
    """Name of a model -> its loss for each seed."""
    found: dict[str, list[float]] = {name: [] for name in QUALITY}
    for run in recorded("quality"):
        found[run["model"]].append(run["nats_per_byte"])
    return found
