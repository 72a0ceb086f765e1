"""Chapter 4: the ladder's model, models with a part taken out, and the chapter's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from minimistral.config import ModelConfig
from minimistral.model import Transformer

from ..figures import BLACK, BLUE, GREEN, GREY, HATCHES, ORANGE, PINK, new_figure
from ..ladder import Ladder, Standard, ladder
from ..results import RESULTS, read_result
from .ch02_attention import shown

# ---------------------------------------------------------------- the ladder's row

LADDER_ROW = "a small transformer"


def small_transformer(vocab_size: int | None = None) -> Transformer:
    """The model of this chapter's rung, with the weights it starts from."""
    torch.manual_seed(0)
    return Transformer(ModelConfig(
        dim=128, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=32, hidden_dim=192,
        vocab_size=vocab_size or ladder.tokenizer.vocab_size))


# ---------------------------------------------------------------- parts taken out

RESULT = RESULTS / "ablations.json"
ABLATION_RUN = Standard(batch_size=8)  # tales, tokenizer and judgement as on the ladder


class Changed(nn.Module):
    """A block whose parts are put together in another way."""

    def __init__(self, block: nn.Module, rule: Callable):
        super().__init__()
        self.block, self.rule = block, rule

    def forward(self, x: Tensor, positions: Tensor, angles, cache=None) -> Tensor:
        block = self.block
        return self.rule(block, x, lambda y: block.attention(y, positions, angles, cache))


class NoTurn(nn.Module):
    """A block for which every token stands at position 0, so that nothing is turned."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, positions: Tensor, angles, cache=None) -> Tensor:
        cos, sin = angles
        return self.block(x, positions, (torch.ones_like(cos), torch.zeros_like(sin)), cache)


class TwoMatrices(nn.Module):
    """The older feed-forward, w2(f(w1 x)), half as wide again: as many parameters as SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int, function: Callable, narrow: float):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim * 3 // 2, bias=False)
        self.w2 = nn.Linear(hidden_dim * 3 // 2, dim, bias=False)
        self.function = function
        nn.init.normal_(self.w1.weight, std=0.02)
        nn.init.normal_(self.w2.weight, std=narrow)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.function(self.w1(x)))


def _no_stream(block, x, look):
    return block.feed_forward(block.ffn_norm(look(block.attention_norm(x))))


def _norm_after(block, x, look):
    x = block.attention_norm(x + look(x))
    return block.ffn_norm(x + block.feed_forward(x))


def _no_attention(block, x, look):
    return x + block.feed_forward(block.ffn_norm(x))


def _no_feed_forward(block, x, look):
    return x + look(block.attention_norm(x))


def _rewired(rule: Callable) -> Callable:
    def change(model):
        for n, block in enumerate(model.layers):
            model.layers[n] = Changed(block, rule)
    return change


def _no_norms(model):
    for block in model.layers:
        block.attention_norm = block.ffn_norm = nn.Identity()
    model.norm = nn.Identity()


def _no_positions(model):
    for n, block in enumerate(model.layers):
        model.layers[n] = NoTurn(block)


def _two_matrices(function: Callable) -> Callable:
    def change(model):
        c = model.config
        for block in model.layers:
            narrow = 0.02 / (2 * c.n_layers) ** 0.5
            block.feed_forward = TwoMatrices(c.dim, c.hidden_dim, function, narrow)
    return change


# what is changed, in the words of the page -> the change, made on a new model
VARIANTS: dict[str, Callable | None] = {
    "nothing: the whole model": None,
    "ReLU in place of the gate": _two_matrices(torch.relu),
    "a linear feed-forward": _two_matrices(lambda x: x),
    "no feed-forward": _rewired(_no_feed_forward),
    "norm after the sum": _rewired(_norm_after),
    "no norms": _no_norms,
    "no positions": _no_positions,
    "no residual stream": _rewired(_no_stream),
    "no attention": _rewired(_no_attention),
}


def build_variant(name: str, seed: int, vocab_size: int | None = None) -> Transformer:
    """A small model with one thing changed. The whole model has the same weights at the start."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(
        dim=96, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=24, hidden_dim=192,
        vocab_size=vocab_size or ladder.tokenizer.vocab_size))
    change = VARIANTS[name]
    if change:
        change(model)
    return model


@cache
def _ladder(standard: Standard) -> Ladder:
    return Ladder(standard)  # encodes its tales once


def measure_variant(name: str, seed: int, standard: Standard = ABLATION_RUN) -> float:
    """Train one variant and measure it on the validation tales, in nats per byte."""
    judge = _ladder(standard)
    model = build_variant(name, seed)
    judge.fit(model, seed=seed)
    return judge.validation_nats(model) / len(judge.corpus.val.encode())


def recorded_ablations() -> dict:
    """The recorded result of benchmarks/ablations.py, with its provenance."""
    return read_result(RESULT)


def ablation_picture(result: dict):
    """Every variant as a line from its lowest to its highest loss, its median as a point."""
    rows = sorted(result["variants"], key=lambda v: v["median"])
    figure, ax = new_figure(8.2, 0.42 * len(rows) + 1.3)
    for y, row in enumerate(rows):
        whole = row["changed"].startswith("nothing")
        low, high = min(row["nats_per_byte"]), max(row["nats_per_byte"])
        ax.plot([low, high], [y, y], "-", color=BLACK, linewidth=2)
        ax.plot(row["median"], y, "D" if whole else "o", color=BLUE if whole else ORANGE,
                markersize=9)
        ax.text(high + 0.03, y, f"{row['median']:.3f}", va="center")
    ax.axvline(result["floor"], color=GREY, linestyle=":")
    ax.text(result["floor"] + 0.02, len(rows) - 0.45, "floor", color="#555555", va="top")
    ax.set_yticks(range(len(rows)), [row["changed"] for row in rows])
    ax.set(xlabel="validation loss (nats per byte): median, lowest and highest of the seeds",
           ylim=(-0.6, len(rows) - 0.4),
           xlim=(0.1, max(max(r["nats_per_byte"]) for r in rows) + 0.15),
           title="Without the stream or the norms hardly anything is learned")
    return figure


# ---------------------------------------------------------------- pictures


def stream_picture():
    """The residual stream as one long arrow; the parts of two blocks read it and add to it."""
    from matplotlib.patches import Circle, Rectangle

    figure, ax = new_figure(9.8, 3.3)
    ax.annotate("", (11.6, 0), (0.2, 0), arrowprops={"arrowstyle": "-|>", "lw": 5, "color": BLUE})
    ax.text(0.2, -0.42, "embedding\nof the token", va="top", ha="left")
    ax.text(11.6, -0.42, "to the last\nnorm", va="top", ha="right")
    ax.text(5.9, -0.42, "the residual stream: (B, T, dim) all the way", va="top", ha="center",
            color=BLUE)
    names = ("attention", "feed-\nforward") * 2
    for n, name in enumerate(names):
        x = 1.6 + 2.4 * n
        ax.add_patch(Rectangle((x, 0.75), 0.62, 0.62, facecolor="white", edgecolor=BLACK, lw=1.5))
        ax.text(x + 0.31, 1.06, "norm", ha="center", va="center")
        ax.add_patch(Rectangle((x + 0.85, 0.6), 1.05, 0.92, facecolor="white", edgecolor=ORANGE,
                               lw=2))
        ax.text(x + 1.375, 1.06, name, ha="center", va="center")
        for start, end in (((x + 0.31, 0.05), (x + 0.31, 0.75)),
                           ((x + 0.62, 1.06), (x + 0.85, 1.06)),
                           ((x + 1.6, 0.6), (x + 1.6, 0.2))):
            ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.5})
        ax.add_patch(Circle((x + 1.6, 0), 0.2, facecolor="white", edgecolor=BLACK, zorder=3))
        ax.text(x + 1.6, -0.01, "+", ha="center", va="center", zorder=4, fontsize=13)
    for x, name in ((1.45, "block 0"), (6.25, "block 1")):
        ax.add_patch(Rectangle((x, -0.3), 4.6, 2.1, facecolor="none", edgecolor=GREY,
                               linestyle="--"))
        ax.text(x + 0.1, 1.88, name, va="bottom")
    ax.set(xlim=(0, 11.9), ylim=(-1.15, 2.3), aspect="equal",
           title="Every part reads a normed copy of the stream and adds to the stream")
    ax.axis("off")
    return figure


def shares_picture(parts: dict[str, dict[str, int]]):
    """Where the parameters of some models are: one bar for each model, cut into its parts."""
    names = list(next(iter(parts.values())))
    figure, ax = new_figure(8.6, 0.75 * len(parts) + 1.5)
    colours = dict(zip(names, (BLUE, ORANGE, GREEN, PINK)))
    for y, (model, counts) in enumerate(parts.items()):
        left, total = 0.0, sum(counts.values())
        for name, hatch in zip(names, HATCHES):
            share = 100 * counts[name] / total
            ax.barh(y, share, left=left, color=colours[name], hatch=hatch, edgecolor="white",
                    label=name if y == 0 else None, height=0.6)
            if share > 7:
                ax.text(left + share / 2, y, f"{share:.0f}%", ha="center", va="center",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
            left += share
    ax.set_yticks(range(len(parts)), list(parts))
    ax.invert_yaxis()
    ax.set(xlabel="share of all parameters (%)", xlim=(0, 100),
           title="In the large model most is feed-forward; in the small one the tables weigh")
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.35), ncols=4)
    return figure


# ---------------------------------------------------------------- reading the stream


def settles_at(first_choices: Sequence[int]) -> int:
    """The first depth from which on the first choice stays what it is at the end."""
    depth = len(first_choices) - 1
    while depth and first_choices[depth - 1] == first_choices[-1]:
        depth -= 1
    return depth


def depth_name(depth: int) -> str:
    """How the explorer calls a place in the stream."""
    return "the embedding" if depth == 0 else f"after block {depth - 1}"


def lens_explorer(chances: dict[str, Tensor], tokens: dict[str, list[str]],
                  decode: Callable[[int], str]) -> Callable:
    """The explorer's function: draw(language, position).

    chances: language -> (L + 1, T, V), what each depth of the stream would predict;
    tokens: language -> T texts. A position behind the last but one is that one.
    """
    def draw(language: str, position: int):
        texts = tokens[language]
        at = max(0, min(position, len(texts) - 2))
        best = chances[language][:, at].topk(3)                          # (L + 1, 3) both
        names = [[decode(i) for i in row] for row in best.indices.tolist()]
        depth = settles_at(best.indices[:, 0].tolist())
        asked, final, truth = shown(texts[at]), shown(names[-1][0]), shown(texts[at + 1])
        when = "the embedding alone says" if depth == 0 else f"settled {depth_name(depth)}:"
        figure = lens_picture(best.values, names, texts, at, f"After {asked}, {when} {final}")
        sentence = (f"After {asked} at position {at}: first choice of "
                    + "; ".join(f"{depth_name(d)} {shown(row[0])} ({best.values[d, 0]:.2f})"
                                for d, row in enumerate(names))
                    + f". The tale goes on with {truth}.")
        table = (["", "first", "second", "third"],
                 [[depth_name(d), *(f"{shown(n)} {v:.3f}" for n, v in zip(row, best.values[d]))]
                  for d, row in enumerate(names)])
        return figure, sentence, table
    return draw


def lens_picture(values: Tensor, names: Sequence[Sequence[str]], texts: Sequence[str],
                 position: int, title: str):
    """The three likeliest tokens at each depth; what the text goes on with has a frame.

    values: (L + 1, 3)
    """
    from matplotlib.patches import Rectangle

    figure, ax = new_figure(8.0, 0.52 * len(names) + 1.7)
    image = ax.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, (tokens, chances) in enumerate(zip(names, values.tolist())):
        for column, (token, chance) in enumerate(zip(tokens, chances)):
            red, green, blue, _ = image.cmap(image.norm(chance))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            ax.text(column, row, f"{shown(token)} {chance:.2f}", ha="center", va="center",
                    color="white" if dark else "black")
            if token == texts[position + 1]:
                ax.add_patch(Rectangle((column - 0.47, row - 0.42), 0.94, 0.84, fill=False,
                                       edgecolor="white", linewidth=5))
                ax.add_patch(Rectangle((column - 0.47, row - 0.42), 0.94, 0.84, fill=False,
                                       edgecolor=ORANGE, linewidth=3))
    before = "".join(texts[max(0, position - 9): position + 1]).replace("\n", "⏎")
    ax.set_yticks(range(len(names)), [depth_name(d) for d in range(len(names))])
    ax.set_xticks(range(3), ["first choice", "second", "third"])
    ax.set(title=title, xlabel=f"“… {before.strip()}” goes on with "
           f"{shown(texts[position + 1])} (framed)")
    ax.spines[:].set_visible(False)
    return figure
