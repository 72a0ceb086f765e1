"""Chapter 9: its pictures, its measurements and the logic of its explorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import minimistral as mm
from minimistral.moe import MoE, all_experts, record_routing, route
from minimistral.train import TrainConfig, validation_rows

from ..figures import BLACK, BLUE, GREEN, GREY, HATCHES, MARKERS, ORANGE, PINK, new_figure
from ..ladder import ladder
from ..results import RESULTS, read_result
from ..swaps import swap
from ..timing import best_seconds  # noqa: F401 (the notebooks take it from here)
from .ch02_attention import lines_of, pieces, shown

nats_per_byte = ladder.nats_per_byte

RECORDED = RESULTS / "mixture.json"

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


def small_model(name: str = "mixture", seed: int = 0,
                vocab_size: int | None = None) -> mm.Transformer:
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


def held_out_rows(tokenizer=None, documents: Sequence[str] | None = None, longest: int = 10**6):
    """The ladder's validation tales, or other documents, as rows of ``longest`` tokens at most."""
    documents = ladder.corpus.val_documents if documents is None else documents
    ids = (tokenizer or ladder.tokenizer).encode_batch(list(documents), bos=True, eos=True)
    return validation_rows(ids, min(longest, max(map(len, ids))))


@torch.no_grad()
def kept_by_the_chosen(model: nn.Module, rows) -> list[float]:
    """How much of a softmax over all experts the chosen ones have, on average, layer by layer."""
    with record_routing(model) as seen:
        model(rows.inputs, positions=rows.positions)
    real, k = (rows.positions >= 0).flatten(), model.config.moe.num_experts_per_tok
    return [logits[real].float().softmax(-1).topk(k).values.sum(-1).mean().item()
            for logits in seen]


def distinct(chosen: Tensor, batch: int, draws: int = 200, seed: int = 0,
             neighbours: bool = False) -> float:
    """Mean number of different experts that ``batch`` tokens touch, drawn at random or, as
    ``neighbours``, one after the other in a text.

    chosen: (N, k)
    """
    chance = torch.Generator().manual_seed(seed)
    if neighbours:
        first = torch.randint(len(chosen) - batch + 1, (draws, 1), generator=chance)
        places = first + torch.arange(batch)
    else:
        places = torch.randint(len(chosen), (draws, batch), generator=chance)
    return sum(len(set(row)) for row in chosen[places].flatten(1).tolist()) / draws


def expected_distinct(n_experts: int, k: int, batch: int) -> float:
    """The same if every token chose k of the experts evenly, independent of the others."""
    return n_experts * (1 - (1 - k / n_experts) ** batch)


# ---------------------------------------------------------------- recorded measurements


def recorded(part: str) -> list[dict]:
    """The runs of one part of benchmarks/mixture.py; empty if it was never run."""
    return read_result(RECORDED)[part] if RECORDED.exists() else []


def recorded_losses(steps: int) -> dict[str, list[float]]:
    """Name of a model -> its loss for each seed."""
    found: dict[str, list[float]] = {name: [] for name in QUALITY}
    for run in sorted(recorded("quality"), key=lambda run: run["seed"]):
        if run["steps"] == steps:
            found[run["model"]].append(run["nats_per_byte"])
    return found


def recorded_balance(seed: int = 0) -> dict[str, dict]:
    """"off", "on" and "too strong" -> the recorded run of one seed."""
    names = {0.0: "off", BALANCE: "on", TOO_STRONG: "too strong"}
    runs = [run for part in ("balance", "quality") for run in recorded(part)
            if run["model"] == "mixture" and run["seed"] == seed and run["steps"] == 120]
    found = {names[run["balance"]]: run for run in runs}
    return {name: found[name] for name in names.values()}


# ---------------------------------------------------------------- tales and their experts

LANGUAGES = {"English": "en", "French": "fr", "German": "de", "Spanish": "es", "Italian": "it"}


def tales_by_language(tokenizer, count: int, seed: int = 9) -> dict[str, list[list[int]]]:
    """Language -> ``count`` new tales as token ids."""
    from random import Random

    from minimistral.tales import sample_tale

    chance = Random(seed)
    return {name: [tokenizer.encode(sample_tale(chance, code).text, bos=True)
                   for _ in range(count)] for name, code in LANGUAGES.items()}


def first_choices(model: nn.Module, tales: Sequence[Sequence[int]]) -> Tensor:
    """The first expert of every token of some tales, layer by layer: (L, N)"""
    parts = [torch.stack([c[:, 0] for c in choices(model, torch.tensor(ids))]) for ids in tales]
    return torch.cat(parts, 1)


def guessed(keys: Tensor, experts: Tensor, new_keys: Tensor, new_experts: Tensor) -> float:
    """How often one guesses the expert who only knows a key of the token.

    For every key the expert is guessed that it had most often; for a new key the commonest.
    keys, experts: (N,) to learn from; new_keys, new_experts: (M,) to guess
    """
    n_keys = int(max(keys.max(), new_keys.max())) + 1
    table = torch.zeros(n_keys, int(max(experts.max(), new_experts.max())) + 1)
    table.index_put_((keys, experts), torch.tensor(1.0), accumulate=True)
    guess = table.argmax(1)
    guess[table.sum(1) == 0] = table.sum(0).argmax()
    return (guess[new_keys] == new_experts).float().mean().item()


def who_decides(model: nn.Module, tokenizer, count: int = 12) -> dict[str, list[float]]:
    """Guesses of the first expert, layer by layer, from nothing, the language, or the token."""
    told = tales_by_language(tokenizer, 2 * count)
    parts = []
    for half in (slice(0, count), slice(count, None)):
        tales = [ids for texts in told.values() for ids in texts[half]]
        language = [n for n, texts in enumerate(told.values()) for ids in texts[half] for _ in ids]
        token = torch.tensor([i for ids in tales for i in ids])
        parts.append((token, torch.tensor(language), first_choices(model, tales)))
    (token, language, old), (new_token, new_language, new) = parts
    keys = {"nothing": (token * 0, new_token * 0), "the language": (language, new_language),
            "the token": (token, new_token)}
    return {name: [guessed(a, old[i], b, new[i]) for i in range(len(old))]
            for name, (a, b) in keys.items()}


@torch.no_grad()
def cost_of_absence(model: nn.Module, documents: Sequence[str]) -> Tensor:
    """How much the loss rises without one expert of one layer: (L, E), in nats per byte."""
    rows = held_out_rows(documents=documents)
    n_bytes = sum(len(text.encode()) for text in documents)
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    costs = torch.zeros(len(layers), model.config.moe.num_experts)
    before = total_nats(model, rows) / n_bytes
    for i, layer in enumerate(layers):
        for e in range(costs.shape[1]):
            hide = layer.gate.register_forward_hook(
                lambda gate, args, out, e=e: out.index_fill(-1, torch.tensor(e), -torch.inf))
            costs[i, e] = total_nats(model, rows) / n_bytes - before
            hide.remove()
    return costs


def total_nats(model, rows) -> float:
    """Nats of all targets of some rows."""
    from minimistral.train import evaluate

    return evaluate(model, rows, batch_size=64).nats


# ---------------------------------------------------------------- pictures

TINTS = ("#cfe3f5", "#f9d9c3", "#cdebdf", "#f3d9e6", "#e3e3e3", "#fff0a8", "#d9d2f3", "#c9e9ee")


def cost_table(run: dict) -> list[tuple[str, float, float, float]]:
    """What one recorded run of the layers cost: name, GFLOP, MB of weights read, milliseconds.

    A multiplication and an addition are two operations; a weight has 4 bytes. The router is
    left out: it has dim numbers for each expert.
    """
    one = 3 * run["dim"] * run["hidden_dim"]                 # the weights of one expert
    works = {"dense": run["chosen"], "chosen experts": run["chosen"], "all experts": run["experts"]}
    reads = works | {"chosen experts": run["distinct"]}
    return [(name, 2e-9 * run["tokens"] * works[name] * one, 4e-6 * reads[name] * one,
             1e3 * run["medians"][name]) for name in works]


def layer_picture(n_experts: int = 8, chosen: Sequence[int] = (2, 5)):
    """A dense layer and a mixture, side by side, for one token."""
    from matplotlib.patches import Rectangle

    figure, axes = new_figure(9.4, 2.9, columns=2)
    for ax, count in zip(axes, (1, n_experts)):
        for e in range(count):
            width = 2.0 if count == 1 else 0.8
            x = (n_experts - width) / 2 if count == 1 else e + 0.1
            active = count == 1 or e in chosen
            ax.add_patch(Rectangle((x, 1.5), width, 1.0, facecolor=TINTS[1] if active else "white",
                                   edgecolor=BLACK if active else "#9a9a9a", linewidth=1.5,
                                   linestyle="-" if active else "--"))
            ax.text(x + width / 2, 2.0, "feed-\nforward" if count == 1 else str(e), ha="center",
                    va="center")
            if active:
                for low, high in ((0.75, 1.5), (2.5, 3.2)):
                    ax.plot([n_experts / 2, x + width / 2][::1 if low < 1 else -1], [low, high],
                            color=BLACK, linewidth=1.5, linestyle="-")
        name = "router" if count > 1 else "token"
        ax.add_patch(Rectangle((n_experts / 2 - 1, 0.25), 2, 0.5, facecolor="white",
                               edgecolor=BLACK, linewidth=1.5))
        ax.text(n_experts / 2, 0.5, name, ha="center", va="center")
        ax.text(n_experts / 2, 3.3, "weighted sum" if count > 1 else "result", ha="center",
                va="bottom")
        ax.set(xlim=(0, n_experts), ylim=(0.1, 3.8),
               title="dense: one for all tokens" if count == 1
               else f"mixture: {len(chosen)} of {n_experts} for this token")
        ax.axis("off")
    return figure


def experts_picture(tokens: Sequence[str], experts: Tensor, title: str):
    """A text whose tokens stand on the colour of their first expert, its number below.

    experts: (T,)
    """
    from matplotlib.patches import Rectangle

    lines = lines_of(tokens)
    figure, ax = new_figure(8.6, 0.72 * len(lines) + 0.5)
    for row, line in enumerate(lines):
        for i, column, text in line:
            e = int(experts[i])
            ax.add_patch(Rectangle((column, -row), len(text), 0.78, linewidth=0.8,
                                   facecolor=TINTS[e % len(TINTS)], edgecolor="white"))
            ax.text(column, -row + 0.42, text, family="DejaVu Sans Mono", fontsize=12,
                    va="bottom", color=BLACK)
            ax.text(column + len(text) / 2, -row + 0.05, str(e), fontsize=11, ha="center",
                    va="bottom", color="#333333")
    ax.set(xlim=(-1, 78), ylim=(-len(lines) + 0.9, 0.95), title=title)
    ax.axis("off")
    return figure


def experts_explorer(model: nn.Module, told: dict[str, list[int]], tokenizer) -> Callable:
    """The explorer's function: draw(language, layer). told: language -> ids of the same tale"""
    texts = {name: pieces(tokenizer, ids) for name, ids in told.items()}
    firsts = {name: first_choices(model, [ids]) for name, ids in told.items()}

    def draw(language: str, layer: int):
        experts = firsts[language][layer]
        count = torch.bincount(experts, minlength=model.config.moe.num_experts)
        most = int(count.argmax())
        words = list(dict.fromkeys(shown(t) for t, e in zip(texts[language], experts.tolist())
                                   if e == most))[:5]
        share = 100 * count[most].item() / len(experts)
        sentence = (f"{language}, layer {layer}: expert {most} is first for {share:.0f}% of the "
                    f"tokens, among them {', '.join(words)}.")
        table = {"expert": list(range(len(count))), "tokens": count.tolist()}
        title = f"Layer {layer}: the first expert of every token"
        return experts_picture(texts[language], experts, title), sentence, table
    return draw


def shares_picture(runs: dict[str, list[list[float]]]):
    """Shares of the experts, sorted, for some models: one panel for each layer.

    runs: name -> layers of shares that sum to 1
    """
    layers = len(next(iter(runs.values())))
    figure, axes = new_figure(9.2, 3.3, columns=layers, sharey=True)
    colours = (ORANGE, BLUE, GREEN, PINK)
    for layer, ax in enumerate(axes):
        width = 0.8 / len(runs)
        for n, (name, values) in enumerate(runs.items()):
            ordered = sorted(values[layer], reverse=True)
            at = [x + (n - (len(runs) - 1) / 2) * width for x in range(len(ordered))]
            ax.bar(at, [100 * v for v in ordered], width, color=colours[n], edgecolor="white",
                   hatch=HATCHES[n], label=name)
        even = 100 / len(ordered)
        ax.axhline(even, color=BLACK, linewidth=1, linestyle="--")
        ax.text(len(ordered) - 0.4, even, "even", ha="right", va="bottom")
        ax.set(title=f"layer {layer}", xlabel="experts, the busiest first",
               ylabel="% of all choices" if layer == 0 else "")
        ax.set_xticks(range(len(ordered)), [str(x + 1) for x in range(len(ordered))])
    axes[-1].legend(frameon=False)
    figure.suptitle("Without the balance loss some experts do hardly anything")
    return figure


def quality_picture(losses: dict[str, list[float]], floor: float, title: str):
    """Loss of every seed, a row for each model; the floor, far to the left, is only named."""
    figure, ax = new_figure(7.6, 2.9)
    for n, (name, values) in enumerate(losses.items()):
        ax.scatter(values, [n] * len(values), s=60, marker=MARKERS[n],
                   color=(BLACK, ORANGE, BLUE)[n], zorder=3)
        ax.plot([sorted(values)[len(values) // 2]] * 2, [n - 0.25, n + 0.25], color=GREY,
                linestyle="-", linewidth=2)
    ax.text(0.01, 0.04, f"\u2190 the floor, {floor:.3f}", color="#006E50", transform=ax.transAxes)
    ax.set_yticks(range(len(losses)), list(losses))
    ax.set(title=title, xlabel="loss (nats per byte); a mark for each seed, a bar at the median",
           ylim=(len(losses) - 0.3, -0.6))
    return figure


def speed_picture(runs: Sequence[dict]):
    """Times of a mixture's layer over those of the dense one, by number of tokens."""
    figure, ax = new_figure(7.2, 3.5)
    tokens = [run["tokens"] for run in runs]
    for n, name in enumerate(("chosen experts", "all experts")):
        ratio = [run["medians"][name] / run["medians"]["dense"] for run in runs]
        ax.plot(tokens, ratio, color=(ORANGE, BLUE)[n], linestyle=("-", "--")[n],
                marker=MARKERS[n], label=f"{name}, of {EXPERTS}")
    ax.axhline(1, color=BLACK, linewidth=1, linestyle=":")
    ax.set_xscale("log", base=4)
    ax.set_yscale("log", base=2)
    ax.set_xticks(tokens, [f"{t:,}" for t in tokens])
    top = max(run["medians"]["all experts"] / run["medians"]["dense"] for run in runs)
    ticks = [2 ** n for n in range(10) if 2 ** n <= top]
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set(title="With many tokens, 2 of 8 experts cost what their arithmetic costs",
           xlabel="tokens in one go", ylabel="times a dense layer of\nequal active parameters")
    ax.legend(frameon=False)
    return figure
