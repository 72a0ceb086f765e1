"""Chapter 3: its pictures, its toy task, the logic of its explorer, its row of the ladder."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.attention import attend, causal
from minimistral.checkpoint import permute_rotary
from minimistral.rope import rotary_angles, rotate
from minimistral.shipped import find_model
from minimistral.tales import sample_tale

from ..figures import BLACK, BLUE, GREEN, GREY, ORANGE, new_figure

QUERY, KEY = (1.7, 0.6), (1.0, -0.8)  # the explorer's two arrows, before any turn
SPEEDS = {"1 radian a place": 1.0, "0.1 radian a place": 0.1}


# ---------------------------------------------------------------- orders


def different(looks: Iterable[Tensor]) -> int:
    """How many of these looks are unequal, by more than rounding."""
    found: list[Tensor] = []
    for new in looks:
        if not any(torch.allclose(new, old, atol=1e-5) for old in found):
            found.append(new)
    return len(found)


# ---------------------------------------------------------------- arrows


def turned(pair: Sequence[float], angle: float) -> tuple[float, float]:
    """A pair of numbers as an arrow, turned to the left by an angle in radians."""
    a, b = pair
    cos, sin = math.cos(angle), math.sin(angle)
    return a * cos - b * sin, a * sin + b * cos


def score_at(query_position: int, key_position: int, speed: float) -> float:
    """The score of the explorer's two arrows at two positions."""
    q, k = turned(QUERY, query_position * speed), turned(KEY, key_position * speed)
    return q[0] * k[0] + q[1] * k[1]


def _circle(ax, radius: float, **options) -> None:
    from matplotlib.patches import Circle

    ax.add_patch(Circle((0, 0), radius, fill=False, edgecolor=GREY, linewidth=1, **options))


def _arrow(ax, end: tuple[float, float], colour: str, dashed: bool = False) -> None:
    from matplotlib.patches import FancyArrowPatch

    ax.add_patch(FancyArrowPatch(
        (0, 0), end, arrowstyle="-|>", mutation_scale=17, linewidth=2, color=colour,
        linestyle=(0, (4, 2)) if dashed else "-", shrinkA=0, shrinkB=0, zorder=3))


def _named(ax, end: tuple[float, float], text: str, colour: str, far: float = 0.42) -> None:
    length = math.hypot(*end)
    x, y = (value * (1 + far / length) for value in end)
    ax.text(x, y, text, color=colour, ha="center", va="center", weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})


def quarter_turns_picture(pair: tuple[float, float]):
    """One arrow and what a quarter, a half and three quarters of a turn make of it."""
    figure, ax = new_figure(4.4, 4.3)
    _circle(ax, math.hypot(*pair), linestyle="--")
    for quarter, (colour, name) in enumerate(zip((BLACK, BLUE, ORANGE, GREEN), "0123")):
        end = turned(pair, quarter * math.pi / 2)
        _arrow(ax, end, colour, dashed=quarter > 0)
        _named(ax, end, f"place {name}\n({end[0]:.0f}, {end[1]:.0f})", colour, far=0.75)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set(xlim=(-3.7, 3.7), ylim=(-3.5, 3.5), aspect="equal",
           title="A turn keeps the length of the arrow")
    ax.axis("off")
    return figure


def circle_picture(query_position: int, key_position: int, speed: float, title: str):
    """The explorer's two arrows, each turned by its position, before (left) and after (right)."""
    figure, axes = new_figure(8.6, 4.1, columns=2)
    angles = ((0.0, 0.0), (query_position * speed, key_position * speed))
    for ax, (of_query, of_key), name in zip(axes, angles, ("not turned", title)):
        q, k = turned(QUERY, of_query), turned(KEY, of_key)
        for arrow in (q, k):
            _circle(ax, math.hypot(*arrow), linestyle=":")
        _between(ax, q, k)
        _arrow(ax, q, BLUE)
        _arrow(ax, k, ORANGE, dashed=True)
        _named(ax, q, "query", BLUE)
        _named(ax, k, "key", ORANGE)
        ax.set(xlim=(-2.7, 2.7), ylim=(-2.5, 2.5), aspect="equal", title=name)
        ax.axis("off")
    return figure


def _between(ax, q, k) -> None:
    """The smaller angle between two arrows, as an arc."""
    from matplotlib.patches import Arc

    first, second = (math.degrees(math.atan2(y, x)) for x, y in (k, q))
    if (second - first) % 360 > 180:
        first, second = second, first
    ax.add_patch(Arc((0, 0), 1.1, 1.1, theta1=first, theta2=second, color=BLACK, linewidth=2))


def circle_explorer() -> Callable:
    """The explorer's function: draw(query_position, key_position, speed)."""
    def draw(query_position: int, key_position: int, speed: str):
        score = score_at(query_position, key_position, SPEEDS[speed])
        distance = query_position - key_position
        where = (f"{distance} places before it" if distance > 0 else
                 f"{-distance} places after it" if distance < 0 else "at the same place")
        sentence = (f"At {speed}: query at {query_position}, key at {key_position}, "
                    f"{where}. Score {score:.2f}.")
        rows = [score_at(query_position + move, key_position + move, SPEEDS[speed])
                for move in (0, 1, 10, 1000)]
        table = {"both moved by": [0, 1, 10, 1000], "score": [round(s, 3) for s in rows]}
        return circle_picture(query_position, key_position, SPEEDS[speed],
                              f"distance {distance}: score {score:.2f}"), sentence, table
    return draw


def clocks_picture(distances: Sequence[int], frequencies: Tensor):
    """For each pair a dial: how far the angle of each distance has gone round.

    frequencies: (D/2,) radians for each place
    """
    figure, axes = new_figure(8.6, 3.3, columns=len(frequencies))
    styles = ((BLUE, False), (ORANGE, True), (GREEN, False))
    for i, (ax, frequency) in enumerate(zip(axes, frequencies.tolist())):
        _circle(ax, 1.0)
        for distance, (colour, dashed), length in zip(distances, styles, (1.0, 0.75, 0.5)):
            end = turned((length, 0.0), distance * frequency)
            _arrow(ax, end, colour, dashed)
        ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal",
               title=f"pair {i}\n{frequency:g} a place")
        ax.axis("off")
    names = [f"{'long' if n == 0 else 'short, dashed'}: distance {d}"
             for n, d in enumerate(distances)]
    figure.suptitle("Two distances: one hand cannot tell them apart, two can\n"
                    + "; ".join(names))
    return figure


def speeds_picture(turns: dict[str, Sequence[float]], limit: int, title: str):
    """How many tokens each pair needs for one turn, one line for each theta."""
    figure, ax = new_figure(7.4, 3.8)
    styles = ((BLUE, "-", "o"), (ORANGE, "--", "s"))
    for (name, values), (colour, dash, marker) in zip(turns.items(), styles):
        ax.plot(range(len(values)), list(values), color=colour, linestyle=dash, marker=marker,
                markevery=8, label=name)
    ax.axhline(limit, color=BLACK, linewidth=1.2, linestyle=":")
    ax.text(0, limit * 1.25, f"{limit:,} tokens", ha="left", va="bottom")
    ax.set(yscale="log", title=title, xlabel="pair of numbers", ylabel="tokens for one turn")
    ax.legend(frameon=False, loc="lower right")
    return figure


# ---------------------------------------------------------------- the toy task: two back


class OneLook(nn.Module):
    """One layer, one head, with or without rotary positions: as small as a model can be."""

    def __init__(self, turn: bool, letters: int = 12, dim: int = 32, head_dim: int = 32):
        super().__init__()
        self.turn, self.head_dim = turn, head_dim
        self.embedding = nn.Embedding(letters, dim)
        self.wq, self.wk, self.wv = (nn.Linear(dim, head_dim, bias=False) for _ in range(3))
        self.output = nn.Linear(head_dim, letters, bias=False)

    def forward(self, ids: Tensor) -> Tensor:                            # (B, T) -> (B, T, V)
        x = self.embedding(ids)
        q, k, v = (w(x)[:, :, None] for w in (self.wq, self.wk, self.wv))  # (B, T, 1, D)
        p = torch.arange(ids.shape[1])
        if self.turn:
            angles = rotary_angles(p, self.head_dim, 1e4)
            q, k = rotate(q, *angles), rotate(k, *angles)
        return self.output(attend(q, k, v, causal(p, p))[:, :, 0])


def learn_two_back(turn: bool, steps: int = 100, letters: int = 12) -> list[float]:
    """Train a OneLook to name the letter two places back; the losses in nats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OneLook(turn, letters)
    chance = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        ids = torch.randint(letters, (16, 24), generator=chance)
        loss = F.cross_entropy(model(ids)[:, 2:].flatten(0, 1), ids[:, :-2].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- the ladder's row


class LookBack(nn.Module):
    """The bigram and one layer of attention with four heads, whose queries and keys may be
    turned by their positions."""

    def __init__(self, bigram: Tensor, turn: bool, dim: int = 64, n_heads: int = 4,
                 head_dim: int = 16):
        super().__init__()
        size = len(bigram)
        self.bigram, self.turn, self.cut = bigram, turn, (n_heads, head_dim)
        self.embedding = nn.Embedding(size, dim)
        self.wq, self.wk, self.wv = (
            nn.Linear(dim, n_heads * head_dim, bias=False) for _ in range(3))
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.output = nn.Linear(dim, size, bias=False)
        nn.init.zeros_(self.output.weight)                               # at first: a bigram

    def forward(self, ids: Tensor) -> Tensor:                            # (B, T) -> (B, T, V)
        x = self.embedding(ids)
        q, k, v = (w(x).unflatten(-1, self.cut) for w in (self.wq, self.wk, self.wv))
        p = torch.arange(ids.shape[1])
        if self.turn:
            angles = rotary_angles(p, self.cut[1], 10_000)
            q, k = rotate(q, *angles), rotate(k, *angles)
        look = self.wo(attend(q, k, v, causal(p, p)).flatten(-2))
        return self.bigram[ids] + self.output(look)


def look_back(turn: bool = True) -> nn.Module:
    """The chapter's model for the ladder, not yet trained; without turning, chapter 2's."""
    from .ch01_tokens import bigram

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LookBack(bigram().weight, turn)


# ---------------------------------------------------------------- long texts


def trained_length(name: str = "tales-dense") -> int:
    """How many tokens a row had in the training of a shipped model."""
    record = json.loads((find_model(name) / "record.json").read_text(encoding="utf-8"))
    return record["training"]["seq_len"]


def long_rows(tokenizer, length: int, rows: int, seed: int = 5) -> Tensor:
    """Tales in five languages, end to end, each with its start and end. -> (rows, length + 1)"""
    chance, made = Random(seed), []
    for _ in range(rows):
        ids: list[int] = []
        while len(ids) <= length:
            tale = sample_tale(chance, chance.choice(["en", "fr", "de", "es", "it"])).text
            ids += [*tokenizer.encode(tale, bos=True), tokenizer.eos_id]
        made.append(ids[: length + 1])
    return torch.tensor(made)


@torch.no_grad()
def loss_of(model: nn.Module, rows: Tensor, positions: Tensor | None = None,
            every: int | None = None) -> Tensor:
    """Mean loss in nats per token: one number, or one for each stretch of ``every`` tokens.

    rows: (R, T + 1); positions: (T,) or None for 0, 1, 2, ...
    """
    logits = model(rows[:, :-1], positions=positions)                    # (R, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(rows), -1, every or rows.shape[1] - 1).mean((0, 2)).squeeze()


# ---------------------------------------------------------------- the other layout


def in_other_layout(model: nn.Module) -> nn.Module:
    """A copy of a model whose queries and keys have the rows of Hugging Face's layout: within
    each head first the even rows, then the odd ones."""
    other = copy.deepcopy(model)
    for layer in other.layers:
        for linear, heads in ((layer.attention.wq, other.config.n_heads),
                              (layer.attention.wk, other.config.n_kv_heads)):
            linear.weight.data = permute_rotary(linear.weight.data, heads)
    return other
