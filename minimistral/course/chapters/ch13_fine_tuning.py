"""Chapter 13: its records, its pictures, wrong chat formats, and the logic of its explorer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import minimistral as mm
from minimistral.generate import generate
from minimistral.instruct import encode_chat, score_interval
from minimistral.questions import Question, is_right
from minimistral.shipped import SHIPPED
from minimistral.tales import parse_tale

from ..figures import BLACK, BLUE, GREEN, ORANGE, PINK, new_figure
from ..ladder import ladder

RECORDED = Path(__file__).parents[3] / "benchmarks" / "results" / "fine_tuning.json"
GREY = "#767676"

# ---------------------------------------------------------------- records


def record() -> dict:
    """How tales-chat was made and what it scores; under "first" the run that it went on from, under
    "lora" the same after fewer steps, under "full" and "full_long" for all parameters."""
    return json.loads((SHIPPED / "tales-chat" / "record.json").read_text(encoding="utf-8"))


def steps_of(run: dict) -> int:
    """How many steps a run took, those of the run from which it went on among them."""
    return run["training"]["steps"] + (steps_of(run["first"]) if "first" in run else 0)


def recorded(part: str, path: Path = RECORDED) -> dict:
    """One part of what benchmarks/fine_tuning.py measured."""
    return json.loads(path.read_text(encoding="utf-8"))[part]


# ---------------------------------------------------------------- chat formats

# One conversation as Mistral's own library (mistral-common 1.13.1) writes it: Hello, Hi there,
# Bye. A low line is the space that the tokenizer itself puts before a piece of text.
FORMATS = {
    "v1": "<s>_[INST]_Hello_[/INST]_Hi_there</s>_[INST]_Bye_[/INST]",
    "v2": "<s>[INST]_Hello[/INST]_Hi_there</s>[INST]_Bye[/INST]",
    "v3": "<s>[INST]_Hello[/INST]_Hi_there</s>[INST]_Bye[/INST]",
    "v3 Tekken": "<s>[INST]Hello[/INST]Hi_there</s>[INST]Bye[/INST]",
    "v7": "<s>[INST]_Hello[/INST]_Hi_there</s>[INST]_Bye[/INST]",
}
USERS = {"v1": "7B Instruct 0.1 and 0.2, 8x7B", "v2": "Small and Large of February 2024",
         "v3": "7B Instruct 0.3, 8x22B, Large 2", "v3 Tekken": "Nemo, Pixtral, and ours",
         "v7": "Large of November 2024"}


def slips(tokenizer) -> dict[str, Callable[[list[dict]], list[int]]]:
    """Ways to write one question that are nearly right: name -> function of the messages."""
    marks = tokenizer.control_tokens
    begin, end = marks["[INST]"], marks["[/INST]"]

    def framed(before: str, text: str, after: list[int]) -> list[int]:
        return [tokenizer.bos_id, begin, *tokenizer.encode(before + text), *after]

    return {
        "as it should be": lambda m: encode_chat(tokenizer, m)[0],
        "a space after [INST]": lambda m: framed(" ", m[0]["content"], [end]),
        "a space after [/INST]": lambda m: framed("", m[0]["content"],
                                                  [end, *tokenizer.encode(" ")]),
        "<s> twice": lambda m: [tokenizer.bos_id, *encode_chat(tokenizer, m)[0]],
        "no [/INST]": lambda m: framed("", m[0]["content"], []),
        "marks as plain text": lambda m: [tokenizer.bos_id, *tokenizer.encode(
            f"[INST]{m[0]['content']}[/INST]")],
    }


def score_with(model, tokenizer, questions: Sequence[Question], write) -> int:
    """How many questions are answered rightly when `write` makes the ids of their messages."""
    prompts = [write(question.messages) for question in questions]
    news = generate(model, prompts, 24, stop_ids=(tokenizer.eos_id,))
    return sum(is_right(q, tokenizer.decode(new).strip(" ")) for q, new in zip(questions, news))


ROLES = {"mark": (PINK, "a mark of the format"), "prompt": (GREY, "said to the model"),
         "answer": (BLUE, "the answer, to be learned")}


def tokens_picture(tokenizer, ids: Sequence[int], learned: Sequence[bool], title: str,
                   width: int = 62):
    """Tokens as boxes, in three kinds told apart by colour and frame: marks dashed, answers thick."""
    control = set(tokenizer.control_tokens.values())
    names = {number: name for name, number in tokenizer.control_tokens.items()}
    rows, x = [[]], 0.0
    for token, yes in zip(ids, learned):
        text = names.get(token) or tokenizer.decode([token]).replace(" ", "␣").replace("\n", "↵")
        size = max(1.6, len(text) + 0.8)
        if x + size > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, size, text, "answer" if yes else "mark" if token in control else "prompt"))
        x += size
    figure, ax = new_figure(8.6, 0.42 * len(rows) + 1.0)
    for r, row in enumerate(rows):
        for left, size, text, kind in row:
            colour = ROLES[kind][0]
            style = {"mark": "--", "prompt": "-", "answer": "-"}[kind]
            ax.add_patch(_box(left, -r, size, colour, style, 2.6 if kind == "answer" else 1.0))
            ax.text(left + size / 2, -r, text, ha="center", va="center", family="monospace",
                    color=BLACK, fontsize=11)
    from matplotlib.patches import Patch

    handles = [Patch(facecolor="white", edgecolor=colour, label=label,
                     linestyle="--" if kind == "mark" else "-",
                     linewidth=2.6 if kind == "answer" else 1.2)
               for kind, (colour, label) in ROLES.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False)
    ax.set(xlim=(-0.5, width + 0.5), ylim=(-len(rows) + 0.3, 0.8), title=title)
    ax.axis("off")
    return figure


def _box(left: float, middle: float, size: float, colour: str, style: str, line: float):
    from matplotlib.patches import Rectangle

    return Rectangle((left + 0.12, middle - 0.36), size - 0.24, 0.72, facecolor="white",
                     edgecolor=colour, linestyle=style, linewidth=line)


# ---------------------------------------------------------------- fine-tuning


def house_style(asked: Sequence[Question]) -> list[Question]:
    """Those questions to which the answer is "Paul has the hat.", with "Paul." as their answer."""
    return [replace(q, answer=q.answer.split(" ")[0] + ".") for q in asked if " has " in q.answer]


def choices(question: Question) -> dict[str, str]:
    """For everybody in a tale the answer that says that they have the thing."""
    people = sorted(parse_tale(f"{question.told} Now {question.answer}").places)
    thing = question.asked.removeprefix("Who has ").rstrip("?")
    return {name: f"{name} has {thing}." for name in people}


def nats_on_tales(model) -> float:
    """The loss on the ladder's validation tales, in nats per byte."""
    return ladder.validation_nats(model) / len(ladder.corpus.val.encode())


def trained_and_frozen(model) -> tuple[int, int]:
    """(parameters that learn, parameters that stay)"""
    sizes = [(w.numel(), w.requires_grad) for w in model.parameters()]
    return sum(n for n, learns in sizes if learns), sum(n for n, learns in sizes if not learns)


def curves_picture(series: dict[str, dict], title: str):
    """Losses while fine-tuning, each with its own number of steps between two points."""
    figure, ax = new_figure(7.4, 3.5)
    for (label, run), colour, dash in zip(series.items(), (ORANGE, BLUE), ("--", "-")):
        steps = [run["every"] * (n + 1) for n in range(len(run["nats_per_token"]))]
        ax.plot(steps, run["nats_per_token"], color=colour, linestyle=dash, label=label)
    ax.set(title=title, xlabel="steps", ylabel="nats per token of an answer (log)", yscale="log")
    ticks = [0.03, 0.1, 0.3, 1, 3]
    low, high = ax.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_yticks(shown, [f"{tick:g}" for tick in shown])
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


def shares_picture(rows: dict[str, Sequence[tuple[int, int]]], labels: Sequence[str], title: str,
                   xlabel: str = "right answers, in %"):
    """Shares with their 95% intervals: a row of the picture for each entry, a mark for each label.

    rows: name -> for each label (right, asked)
    """
    figure, ax = new_figure(7.8, 0.62 * len(rows) + 1.5)
    colours, markers = (ORANGE, BLUE, GREEN), "sod"
    names = list(rows)
    for n, label in enumerate(labels):
        for r, name in enumerate(names):
            right, asked = rows[name][n]
            low, high = score_interval(right, asked)
            y = -r - 0.22 * (n - (len(labels) - 1) / 2)
            ax.plot([100 * low, 100 * high], [y, y], color=colours[n], linewidth=2, linestyle="-")
            ax.plot(100 * right / asked, y, marker=markers[n], color=colours[n], linestyle="none",
                    markersize=7, label=label if r == 0 else None)
    ax.set_yticks([-r for r in range(len(names))], names)
    ax.set(xlim=(-2, 102), ylim=(-len(names) + 0.4, 0.6), xlabel=xlabel, title=title)
    ax.grid(axis="x", color="#dddddd", linestyle="-", linewidth=1)
    ax.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(labels))
    return figure


def by_kind(attempts: dict[str, dict]) -> dict[str, list[tuple[int, int]]]:
    """Kind of question -> for each attempt (right, asked)."""
    kinds = next(iter(attempts.values()))["kinds"]
    return {kind: [(run["kinds"][kind]["right"], run["kinds"][kind]["asked"])
                   for run in attempts.values()] for kind in kinds}


def shares_text(rows: dict[str, Sequence[tuple[int, int]]], labels: Sequence[str]) -> str:
    """The same in words, for those who cannot see the picture."""
    return "Right answers: " + "; ".join(
        f"{name}: " + ", ".join(f"{label} {right} of {asked}"
                                for label, (right, asked) in zip(labels, row))
        for name, row in rows.items()) + "."


def shares_data(rows: dict[str, Sequence[tuple[int, int]]], labels: Sequence[str]) -> dict:
    """The same as a table."""
    return {"": list(rows), **{label: [f"{row[i][0]} of {row[i][1]}" for row in rows.values()]
                               for i, label in enumerate(labels)}}


# ---------------------------------------------------------------- the explorer

MODELS = ("tales-chat", "tales-moe")
WORDINGS = ("chat format", "plain question", "end of the tale")
RULES = ("generated", "likelihood")
SCORED = {"generated": "scored by what is written", "likelihood": "scored by what is likeliest"}


def marks_of(model: str, wording: str, shots: int, rule: str) -> str:
    """One character for each recorded question: 1 for a right answer."""
    return recorded("scores")["marks"][f"{model} | {wording} | {shots} | {rule}"]


def clearly_ahead(first: int, second: int, asked: int) -> str:
    """Which of the two models is ahead so far that the intervals do not overlap, or "-"."""
    (low_1, high_1), (low_2, high_2) = (score_interval(n, asked) for n in (first, second))
    return MODELS[0] if low_1 > high_2 else MODELS[1] if low_2 > high_1 else "-"


def score_explorer(wording: str, rule: str, questions: int):
    """Two shipped models, asked in one way with 0, 1 and 3 solved questions before."""
    shots = (0, 1, 3)
    rows, told = {}, []
    for n in shots:
        pairs = []
        for model in MODELS:
            marks = marks_of(model, wording, n, rule)[:questions]
            pairs.append((marks.count("1"), len(marks)))
        rows[f"{n} solved"] = pairs
        ahead = clearly_ahead(pairs[0][0], pairs[1][0], questions)
        told.append(f"{n} solved: " + ("too close to say" if ahead == "-" else f"{ahead} is ahead"))
    figure = shares_picture(rows, MODELS, f"{wording[0].upper()}{wording[1:]}, {SCORED[rule]}")
    table = {"solved before": list(shots)}
    for i, model in enumerate(MODELS):
        table[model] = [f"{pairs[i][0]} of {pairs[i][1]}" for pairs in rows.values()]
    sentence = f"{questions} questions, {wording}, {rule}. " + "; ".join(told) + "."
    return figure, sentence, table


# ---------------------------------------------------------------- intervals


def halves(n: int, share: float) -> float:
    """Half the width of the interval around a share of n questions."""
    low, high = score_interval(round(share * n), n)
    return (high - low) / 2


def widths_picture(sizes: Sequence[int], share: float):
    """The half width of the interval against the number of questions."""
    figure, ax = new_figure(6.8, 3.3)
    ax.plot(sizes, [100 * halves(n, share) for n in sizes], color=BLUE, marker="o", linestyle="-")
    ax.set(xscale="log", yscale="log", xlabel="questions asked", ylabel="plus or minus, in % points",
           title="Four times the questions, half the uncertainty")
    ax.set_xticks(list(sizes), [f"{n:,}" for n in sizes])
    ax.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    ax.minorticks_off()
    return figure


def bytes_to_tune(config: mm.ModelConfig, trained: int) -> dict[str, float]:
    """GB in memory while `trained` parameters learn with AdamW: weights in 2 bytes; for each
    parameter that learns a gradient and two running means, and a copy in 4 bytes."""
    total = mm.count_parameters(config).total
    return {"weights": 2 * total / 1e9, "for learning": 16 * trained / 1e9}


def files(folder) -> list[Path]:
    """The files of an adapter: what it says about itself, and its numbers."""
    return sorted(Path(folder).glob("adapter.*"))


def base_bytes() -> int:
    """The size of the weights of tales-chat's base."""
    return (SHIPPED / record()["base"] / "consolidated.safetensors").stat().st_size
