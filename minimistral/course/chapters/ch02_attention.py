"""Chapter 2: its pictures, its short training runs and the logic of its explorer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral import tales_text
from minimistral.attention import attend
from minimistral.tales import parse_tale, sample_tale
from minimistral.tales_words import GENDER

from ..figures import BLACK, BLUE, GREY, ORANGE, new_figure, table_of
from ..swaps import swap

# ---------------------------------------------------------------- pictures


def shapes_picture():
    """Queries times keys gives scores, softmax and values give the result: as boxes."""
    figure, ax = new_figure(9.4, 2.8)
    boxes = [  # x, width, height, name, shape
        (0.2, 0.9, 1.8, "q", "(T, D)"), (1.9, 2.6, 0.9, "k transposed", "(D, S)"),
        (5.8, 2.6, 1.8, "weights", "(T, S)"), (8.9, 0.9, 2.6, "v", "(S, D)"),
        (10.6, 0.9, 1.8, "result", "(T, D)"),
    ]
    for x, width, height, name, shape in boxes:
        ax.add_patch(_box(x, -height / 2, width, height))
        ax.text(x + width / 2, 0.0, shape, ha="center", va="center")
        ax.text(x + width / 2, -height / 2 - 0.28, name, ha="center", va="center")
    ax.add_patch(_box(5.8, 0.24, 2.6, 0.3, face=ORANGE))
    ax.text(7.1, 1.15, "one row: one query, sums to 1", ha="center", color=BLACK)
    for x, sign in ((1.5, "×"), (5.15, "→"), (8.65, "×"), (10.2, "=")):
        ax.text(x, 0.0, sign, ha="center", va="center", fontsize=16)
    ax.text(5.15, 0.45, "softmax", ha="center", va="center")
    ax.set(xlim=(0, 11.8), ylim=(-1.85, 1.5), aspect="equal",
           title="Every query meets every key: T × S weights")
    ax.axis("off")
    return figure


def _box(x, y, width, height, face="white"):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=face, edgecolor=BLACK, linewidth=1.5)


def mask_picture(mask: Tensor, words: Sequence[str], title: str):
    """A mask as a grid: a filled circle where the query (row) may attend to the key."""
    size = len(words)
    figure, ax = new_figure(4.6, 3.9)
    rows, columns = mask.nonzero().T.tolist()
    ax.scatter(columns, rows, s=150, color=BLUE, marker="o")
    rows, columns = (~mask).nonzero().T.tolist()
    ax.scatter(columns, rows, s=40, color=GREY, marker="x")
    ax.set_xticks(range(size), words)
    ax.set_yticks(range(size), words)
    ax.set(title=title, xlabel="key", ylabel="query", xlim=(-0.5, size - 0.5),
           ylim=(size - 0.5, -0.5))
    return figure


def names_table(weights: dict[str, Tensor]):
    """How much each head gives to each of some names, (L, H) each, as (header, rows)."""
    heads = [f"{name}, head {head}" for name, one in weights.items() for head in range(one.shape[1])]
    together = torch.cat(list(weights.values()), 1)
    return table_of(together, range(len(together)), heads, "layer")


def leak_table(losses: dict[str, list[float]], every: int = 10) -> dict[str, Tensor]:
    """Losses of runs of one length, each number the mean of ``every`` steps."""
    means = {label: torch.tensor(values[: len(values) // every * every]).view(-1, every).mean(1)
             for label, values in losses.items()}
    length = len(next(iter(means.values())))
    return {"training step": torch.arange(every, length * every + 1, every), **means}


def leak_picture(losses: dict[str, list[float]]):
    """The numbers of ``leak_table`` as curves."""
    figure, ax = new_figure(7.0, 3.4)
    table = leak_table(losses)
    for label, colour, dash in zip(losses, (BLUE, ORANGE), ("-", "--")):
        ax.plot(table["training step"], table[label], color=colour, linestyle=dash, label=label)
    ax.set(title="Who may see the next token soon has nothing left to predict",
           xlabel="training step", ylabel="loss (nats per token)", ylim=(0, None))
    ax.legend(frameon=False)
    return figure


# ---------------------------------------------------------------- short training runs


def rows_of(ids: Tensor, length: int) -> Tensor:
    """Tales laid end to end, cut into rows of ``length`` + 1 tokens. (N,) -> (R, T + 1)"""
    return ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)


def train_briefly(model: nn.Module, rows: Tensor, steps: int, *, batch: int = 16,
                  rate: float = 5e-3, seed: int = 0) -> list[float]:
    """The loop of chapter 1: predict the next token, measure, step. Returns the losses.

    rows: int (R, T + 1); the rows of a step are drawn with a generator of their own.
    """
    chance = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        chosen = rows[torch.randint(len(rows), (batch,), generator=chance)]
        logits = model(chosen[:, :-1])                                   # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- tales


def retell(tale: str, language: str) -> str:
    """The same tale, decision for decision, in another of the five languages."""
    return tales_text.write(language, list(parse_tale(tale).events))


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of every token by itself; control tokens by their names."""
    names = {i: name for name, i in tokenizer.control_tokens.items()}
    return [names.get(i) or tokenizer.decode([i]) for i in map(int, ids)]


# ---------------------------------------------------------------- maps


def attention_maps(model: nn.Module, ids: Sequence[int] | Tensor) -> Tensor:
    """The weights of every head while the model reads one text. ids: (T,) -> (L, H, T, T)"""
    kept = []

    def watched(q, k, v, mask):
        scores = torch.einsum("bthd,bshd->bhts", q, k).float() / math.sqrt(q.shape[-1])
        kept.append(scores.masked_fill(~mask, -torch.inf).softmax(-1)[0])
        return attend(q, k, v, mask)

    with swap("attention.attend", watched), torch.no_grad():
        model(torch.as_tensor(ids)[None])
    return torch.stack(kept)


# ---------------------------------------------------------------- the explorer's logic


def strongest(weights: Tensor, tokens: Sequence[str],
              count: int = 3) -> list[tuple[int, str, float]]:
    """The tokens with most weight: (position, token, weight), the heaviest first.

    weights: (S,)
    """
    order = weights.argsort(descending=True, stable=True)[:count].tolist()
    return [(i, tokens[i], weights[i].item()) for i in order]


def sentence_about(weights: Tensor, tokens: Sequence[str], position: int) -> str:
    """What one row of a map says, as a sentence."""
    seen = ", ".join(f"{shown(token)} at {i} ({weight:.2f})"
                     for i, token, weight in strongest(weights, tokens))
    return f"{shown(tokens[position])} at position {position} looks most at {seen}."


def shown(token: str) -> str:
    """A token in quotation marks, its line break and its leading space visible."""
    return f"“{token.replace(chr(10), '⏎')}”"


def lines_of(tokens: Sequence[str], width: int = 76) -> list[list[tuple[int, int, str]]]:
    """Tokens set in lines of at most ``width`` characters, no word cut: (index, column, text)."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for word in words_of(tokens):
        texts = [tokens[i].replace("\n", "⏎") for i in word]
        if column and column + sum(map(len, texts)) > width:
            lines.append([])
            column = 0
            texts[0] = texts[0].lstrip(" ") or texts[0]
        for i, text in zip(word, texts):
            lines[-1].append((i, column, text))
            column += len(text)
        if "\n" in tokens[word[-1]]:
            lines.append([])
            column = 0
    return [line for line in lines if line]


def words_of(tokens: Sequence[str]) -> list[list[int]]:
    """The positions of the tokens, word by word: a word begins with a blank or a new line."""
    words: list[list[int]] = []
    for i, token in enumerate(tokens):
        if not words or token[:1] in (" ", "\n") or tokens[i - 1].endswith("\n"):
            words.append([])
        words[-1].append(i)
    return words


def map_picture(weights: Tensor, tokens: Sequence[str], position: int, title: str):
    """A text whose tokens carry bars, as high as the weight that one query gives them.

    weights: (S,), the row of the map that belongs to the query at ``position``
    """
    lines = lines_of(tokens)
    figure, ax = new_figure(8.4, 0.8 * len(lines) + 0.6)
    top = {i for i, _, weight in strongest(weights, tokens) if weight >= 0.1}
    for row, line in enumerate(lines):
        base = -row
        for i, column, text in line:
            lead = len(text) - len(text.lstrip(" "))
            asking = i == position
            ax.text(column, base, text, family="DejaVu Sans Mono", fontsize=12, va="bottom",
                    color=ORANGE if asking else BLACK,
                    weight="bold" if asking else "normal")
            weight = weights[i].item() if i < len(weights) else 0.0
            left, width = column + lead, max(1, len(text) - lead)
            ax.bar(left + width / 2, 0.4 * weight, width * 0.9, bottom=base + 0.28, color=BLUE)
            if i in top:
                number = f"{weight:.2f}"[1:] if weight < 0.995 else "1"
                ax.text(left + width / 2, base + 0.29 + 0.4 * weight, number, ha="center",
                        va="bottom", fontsize=11, color=BLUE)
            if asking:
                ax.plot([left, left + width], [base - 0.02] * 2, color=ORANGE, linewidth=3)
    ax.set(xlim=(-1, 77), ylim=(-len(lines) + 0.9, 0.95), title=title)
    ax.axis("off")
    return figure


def map_explorer(maps: dict[str, Tensor], tokens: dict[str, list[str]]) -> Callable:
    """The explorer's function: draw(language, layer, head, position).

    maps: language -> (L, H, T, S); tokens: language -> T texts. A position behind the end of
    a shorter text is its last token.
    """
    def draw(language: str, layer: int, head: int, position: int):
        texts = tokens[language]
        at = max(0, min(position, len(texts) - 1))
        row = maps[language][layer, head, at]
        sentence = f"Layer {layer}, head {head}: {sentence_about(row, texts, at)}"
        table = {"token": [shown(t) for _, t, _ in strongest(row, texts, 8)],
                 "position": [i for i, _, _ in strongest(row, texts, 8)],
                 "weight": [round(w, 3) for _, _, w in strongest(row, texts, 8)]}
        title = f"{shown(texts[at])} looks most at {shown(strongest(row, texts)[0][1])}"
        return map_picture(row, texts, at, title), sentence, table
    return draw


def position_before(tokens: Sequence[str], word: str) -> int:
    """The position just before the last token that is ``word``."""
    return max(i for i, token in enumerate(tokens) if token == word) - 1


def three_settings(maps: Tensor, tokens: Sequence[str], position: int) -> list[dict]:
    """Three rows worth a look at this position: the head that looks most at one earlier
    name, the one that looks most at itself, and the one that spreads
    its weight most evenly.

    maps: (L, H, T, S)
    """
    rows = maps[:, :, position]                                          # (L, H, S)
    names = torch.tensor([t.strip() in GENDER and i < position for i, t in enumerate(tokens)])
    spread = -torch.special.xlogy(rows, rows).sum(-1)                    # (L, H)
    chosen = [(rows * names).amax(-1), rows[..., position], spread]
    places = [divmod(int(values.argmax()), maps.shape[1]) for values in chosen]
    return [{"layer": layer, "head": head, "position": position} for layer, head in places]


# ---------------------------------------------------------------- maps against effects


@dataclass(frozen=True)
class Question:
    """A tale cut just before the name of the holder, and the name's first token."""

    ids: list[int]
    answer: int
    names: list[int]  # where that token stands in ids


def holder_questions(tokenizer, count: int, seed: int = 2, longest: int = 90) -> list[Question]:
    """English tales that end with "Now ... has the ...", where the thing once changed hands."""
    chance, found = Random(seed), []
    while len(found) < count:
        tale = sample_tale(chance, "en")
        last, text = tale.events[-1], tale.text
        if (last["kind"], last["variant"]) != ("end_held", 0) or " gave " not in text:
            continue
        cut = text.rindex("Now ") + len("Now")
        ids = tokenizer.encode(text[:cut], bos=True)
        answer = tokenizer.encode(f" {last['who']}")[0]
        if len(ids) <= longest:
            found.append(Question(ids, answer, [i for i, t in enumerate(ids) if t == answer]))
    return found


@torch.no_grad()
def mean_probability(model: nn.Module, questions: Sequence[Question]) -> float:
    """The mean probability of the right answers, all questions in one padded batch."""
    longest = max(len(q.ids) for q in questions)
    ids = torch.zeros(len(questions), longest, dtype=torch.long)
    positions = torch.full_like(ids, -1)
    for row, q in enumerate(questions):
        ids[row, : len(q.ids)] = torch.tensor(q.ids)
        positions[row, : len(q.ids)] = torch.arange(len(q.ids))
    x = model.features(ids, positions=positions)                         # (B, T, dim)
    last = x[torch.arange(len(questions)), torch.tensor([len(q.ids) - 1 for q in questions])]
    chances = model.logits(last).softmax(-1)                             # (B, V)
    return chances[torch.arange(len(questions)), [q.answer for q in questions]].mean().item()


def weight_on_answer(maps: Tensor, question: Question) -> Tensor:
    """How much of its weight the last token gives to the answer's tokens. -> (L, H)

    maps: (L, H, T, S) of the question's ids
    """
    return maps[:, :, -1, question.names].sum(-1)


def effects_table(seen: Tensor, falls: Tensor) -> dict[str, list]:
    """Every head with its weight on the answer and what its absence costs."""
    places = [divmod(n, seen.shape[1]) for n in range(seen.numel())]
    return {"layer": [layer for layer, _ in places], "head": [head for _, head in places],
            "weight on the answer": [round(seen[p].item(), 3) for p in places],
            "fall of probability": [round(falls[p].item(), 3) for p in places]}


def time_attention(attend: Callable, length: int, heads: int, size: int, repeats: int = 9) -> float:
    """Seconds that one causal look of ``length`` tokens takes: the best of some repeats."""
    chance = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, length, heads, size, generator=chance)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        attend(q, k, v, mask)
        times.append(time.perf_counter() - began)
    return min(times)


def effects_picture(seen: Tensor, falls: Tensor, title: str):
    """Each head as a point: weight on the answer, and what its absence costs.

    seen, falls: (L, H)
    """
    figure, ax = new_figure(7.4, 4.4)
    for layer, (x, y) in enumerate(zip(seen, falls)):
        ax.scatter(x.tolist(), y.tolist(), s=60, marker="os^Dv"[layer % 5],
                   color=(BLACK, BLUE, ORANGE, "#009E73", "#CC79A7")[layer % 5],
                   label=f"layer {layer}", zorder=3)
    for layer, head in dict.fromkeys([*ranking(seen)[:2], *ranking(falls)[:2]]):
        ax.annotate(f"layer {layer}, head {head}", (seen[layer, head], falls[layer, head]),
                    textcoords="offset points", xytext=(9, 6))
    ax.axhline(0, color=GREY, linewidth=1)
    low, high = falls.min().item(), falls.max().item()
    ax.set(title=title, xlabel="what the map shows: weight on the answer",
           ylabel="what its absence costs",
           xlim=(-0.04 * seen.max().item(), 1.3 * seen.max().item()),
           ylim=(low - 0.1 * (high - low), high + 0.15 * (high - low)))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def ranking(table: Tensor) -> list[tuple[int, int]]:
    """The places (layer, head) of a table, the largest number first."""
    order = table.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(place, table.shape[1]) for place in order]
