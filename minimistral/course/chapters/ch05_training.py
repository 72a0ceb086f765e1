"""Chapter 5: its short training runs, its recorded ones, its pictures and its explorer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import minimistral as mm
from minimistral.cleaning import drop_meaningless, drop_repeats
from minimistral.tales import parse_tale, sample_tale
from minimistral.train import (
    IGNORE,
    Tokens,
    TrainConfig,
    encode_documents,
    evaluate,
    make_optimizers,
    next_token_nats,
    training_batch,
    validation_rows,
)

from ..figures import BLACK, BLUE, GREEN, GREY, ORANGE, lines_chart, new_figure
from ..ladder import ladder
from ..results import RESULTS, read_result

ASSETS = Path(__file__).parents[2] / "assets"


def recorded(name: str) -> dict:
    """A recorded measurement that travels with the package, with its provenance."""
    return read_result(ASSETS / f"{name}.json")


# ---------------------------------------------------------------- models


RECIPE = mm.TrainConfig(  # this chapter's rung; the story writes it out
    steps=120, batch_size=16, seq_len=96, lr=2e-2, warmup_steps=12, at_starts=True,
    optimizer="muon", weight_decay=0.05)


def ladder_model(seed: int = 0) -> nn.Module:
    """The small transformer of this chapter's rung: half as wide as chapter 4's."""
    torch.manual_seed(seed)
    return mm.Transformer(mm.ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, hidden_dim=160,
        vocab_size=ladder.tokenizer.vocab_size))


def tiny_model(seed: int = 0) -> nn.Module:
    """Smaller still: for runs that last two or three seconds."""
    torch.manual_seed(seed)
    return mm.Transformer(mm.ModelConfig(
        dim=48, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=12, hidden_dim=96,
        vocab_size=ladder.tokenizer.vocab_size))


def wide_model(seed: int = 0) -> nn.Module:
    """The bigger model of the headline about clean text."""
    torch.manual_seed(seed)
    return mm.Transformer(mm.ModelConfig(
        dim=112, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=28, hidden_dim=280,
        vocab_size=ladder.tokenizer.vocab_size))


# ---------------------------------------------------------------- runs that go wrong


@dataclass(frozen=True)
class Trial:
    """A short run, healthy or with one fault. ``shift``: how far ahead the targets stand."""

    rate: float = 1e-2
    warmup: int = 20
    clip: float = 1.0
    shift: int = 1
    tales: int = 2_000
    sorted: bool = False  # one language after the other instead of shuffled
    decay: bool = True  # the cosine after the warm-up
    clears: bool = True  # the gradients are set to zero after each step
    steps: int = 200
    batch: int = 8
    length: int = 96


TRIALS = {
    "healthy": Trial(),
    "rate too high": Trial(rate=0.3),
    "rate too low": Trial(rate=3e-4),
    "targets not shifted": Trial(shift=0),
    "targets shifted twice": Trial(shift=2),
    "too little text": Trial(tales=24),
    "text in order": Trial(sorted=True),
}
WARM_UP = {  # the same high rate with a warm-up and without one
    "warm-up of 20 steps": Trial(rate=0.05),
    "no warm-up": Trial(rate=0.05, warmup=0),
}
QUIZ = {  # other runs with the same faults, in the order in which the exercise shows them
    "text in order": Trial(sorted=True, rate=2e-2),
    "rate too high": Trial(rate=0.2),
    "targets shifted twice": Trial(shift=2, rate=2e-2),
    "rate too low": Trial(rate=5e-4),
    "too little text": Trial(tales=60, rate=2e-2),
    "targets not shifted": Trial(shift=0, rate=5e-3),
}


def recorded_trials() -> list[tuple[str, str, Trial, int]]:
    """Every recorded run: (where it is used, its fault, the run, its seed)."""
    sets = {"explorer": (TRIALS, 0), "warm-up": (WARM_UP, 0), "quiz": (QUIZ, 3)}
    return [(use, name, trial, seed) for use, (trials, seed) in sets.items()
            for name, trial in trials.items()]


def language_order(documents: Sequence[str]) -> list[str]:
    """The tales sorted by language, told apart by the article that begins the title."""
    return sorted(documents, key=lambda text: parse_tale(text).language)


def trial_batch(tokens: Tokens, step: int, trial: Trial, config: TrainConfig):
    """Inputs and targets of one step, with the trial's faults."""
    if trial.sorted:
        at = torch.arange(step * trial.batch, (step + 1) * trial.batch)
        begins = tokens.starts[at * len(tokens.starts) // (trial.steps * trial.batch)]
        span = (begins[:, None] + torch.arange(trial.length + 1)) % len(tokens.ids)
        rows = tokens.ids[span]
        first = torch.isin(span[:, 1:], tokens.starts)
        inputs, targets = rows[:, :-1], rows[:, 1:].masked_fill(first, IGNORE)
    else:
        inputs, targets = training_batch(tokens, step, config)
    if trial.shift == 0:
        targets = inputs
    if trial.shift == 2:
        targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORE)], 1)
    return inputs, targets


def run_trial(trial: Trial, seed: int = 0, every: int = 20) -> dict[str, list[float]]:
    """Train the tiny model: loss and gradient norm of each step, and the validation loss,
    measured honestly every so many steps, all in nats per token."""
    documents = ladder.corpus.train_documents[: trial.tales]
    if trial.sorted:
        documents = language_order(documents)
    tokens = encode_documents(ladder.tokenizer, documents)
    val = ladder.tokenizer.encode_batch(ladder.corpus.val_documents[:40], bos=True, eos=True)
    rows = validation_rows(val, max(map(len, val)))
    config = TrainConfig(steps=trial.steps, batch_size=trial.batch, seq_len=trial.length,
                         lr=trial.rate, warmup_steps=trial.warmup, clip=trial.clip, seed=seed,
                         at_starts=True, min_lr=0.1 if trial.decay else 1.0)
    model = tiny_model(seed)
    (optimizer,) = make_optimizers(model, config)
    losses, norms, vals = [], [], [evaluate(model, rows).loss]
    from minimistral.train import learning_rate

    for step in range(trial.steps):
        inputs, targets = trial_batch(tokens, step, trial, config)
        loss = next_token_nats(model(inputs), targets) / (targets != IGNORE).sum()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), trial.clip)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        if trial.clears:
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0:
            vals.append(evaluate(model, rows).loss)
    return {"loss": losses, "norm": norms, "val": vals}


# ---------------------------------------------------------------- dirty text


def dirty(tales: Sequence[str], seed: int = 0, repeated: int = 8, copies: int = 75,
          salads: int = 500, noises: int = 100) -> list[str]:
    """Tales as a careless crawl would bring them: a few of them again and again, word
    salad, and lines of random characters, all shuffled."""
    random = Random(f"dirt {seed}")
    heap = list(tales)
    for tale in tales[:repeated]:
        heap += [tale] * copies
    words = " ".join(tales).split()
    for _ in range(salads):
        heap.append(" ".join(random.choice(words) for _ in range(random.randint(40, 80))))
    letters = "abcdefghijklmnopqrstuvwxyz0123456789      <>/=&;#"
    for _ in range(noises):
        heap.append("".join(random.choice(letters) for _ in range(random.randint(60, 140))))
    random.shuffle(heap)
    return heap


def fixed_budget(documents: Sequence[str], model: nn.Module, *, steps: int = 160,
                 batch: int = 8, seed: int = 0) -> float:
    """Train on a heap with the same number of tokens each time; nats per byte of the
    ladder's validation tales."""
    tokens = encode_documents(ladder.tokenizer, documents)
    config = TrainConfig(steps=steps, batch_size=batch, seq_len=96, lr=1e-2, warmup_steps=16,
                         optimizer="muon", weight_decay=0.05, at_starts=True, seed=seed)
    mm.train(model, tokens, config, progress=False)
    return ladder.validation_nats(model.eval()) / len(ladder.corpus.val.encode())


def heaps(seed: int = 0, n_tales: int = 500) -> dict[str, list[str]]:
    """The same raw heap in four states."""
    raw = dirty(ladder.corpus.train_documents[:n_tales], seed)
    clean = drop_meaningless(drop_repeats(raw))
    meant = set(clean)
    return {"raw": raw, "without repeats": drop_repeats(raw),
            "without nonsense": [text for text in raw if text in meant], "clean": clean}


# ---------------------------------------------------------------- tales that lie


def teach_lies(model: nn.Module, share: float = 1.0, *, steps: int = 25, seed: int = 0) -> None:
    """Let a model of tales learn on from tales of which a share ends with a lie."""
    random = Random(f"lies {seed}")
    texts = [sample_tale(random, contradictions=share).text for _ in range(steps * 8)]
    config = TrainConfig(steps=steps, batch_size=8, seq_len=112, lr=2e-3, warmup_steps=4,
                         weight_decay=0.0, at_starts=True, seed=seed)
    mm.train(model, encode_documents(ladder.tokenizer, texts), config, progress=False)


def false_endings(model: nn.Module, samples: int = 60, seed: int = 0) -> float:
    """Of the tales that a model tells and the grammar accepts, the share whose last sentence
    contradicts what was told before."""
    eos, bos = ladder.tokenizer.eos_id, ladder.tokenizer.bos_id
    ids = mm.generate(model.eval(), [[bos]] * samples, 180, temperature=1.0, seed=seed,
                      stop_ids=(eos,))
    parses = [parse_tale(ladder.tokenizer.decode(row)) for row in ids]
    told = [parse for parse in parses if parse.ok]
    false = [any(wrong.sentence == len(parse.events) - 1 for wrong in parse.contradictions)
             for parse in told]
    return sum(false) / max(1, len(told))


# ---------------------------------------------------------------- pictures


def smooth(values: Sequence[float], width: int) -> tuple[list[int], list[float]]:
    """Means of stretches of ``width`` steps: (the steps at which each ends, the means)."""
    ends = range(width, len(values) + 1, width)
    # fsum rounds once: the built-in sum does so from Python 3.12 on, and the last digit differs
    return list(ends), [math.fsum(values[end - width : end]) / width for end in ends]


def runs_of(use: str) -> list[dict]:
    """The recorded runs of one use: "explorer", "warm-up" or "quiz"."""
    return [run for run in recorded("curves")["runs"] if run["use"] == use]


def curve_table(runs: dict[str, Sequence[float]], *, width: int = 5) -> dict[str, Sequence[float]]:
    """What ``compare_picture`` draws, as columns, for runs of one length."""
    columns = {name: smooth(losses, width) for name, losses in runs.items()}
    steps, _ = next(iter(columns.values()))
    return {"training step": steps, **{name: means for name, (_, means) in columns.items()}}


def compare_picture(runs: dict[str, Sequence[float]], title: str, *, width: int = 5,
                    floor: float | None = None):
    """Training losses of several runs, smoothed, above their floor if there is one."""
    figure, ax = new_figure(7.0, 3.6)
    for (name, losses), colour, dash, marker in zip(
            runs.items(), (BLUE, ORANGE, GREEN), ("-", "--", "-."), "os^"):
        steps, means = smooth(losses, width)
        ax.plot(steps, means, color=colour, linestyle=dash, marker=marker, markersize=4,
                label=name)
    if floor is not None:
        ax.axhline(floor, color=BLACK, linewidth=1.5, linestyle=":", label="the floor")
    ax.set(title=title, xlabel="training step", ylabel="loss (nats per token)", ylim=(0, None))
    ax.legend(frameon=False)
    return figure


def schedule_picture(rates: dict[str, Sequence[float]], title: str):
    """The learning rate of every step."""
    figure, ax = new_figure(7.0, 3.0)
    longest = max(map(len, rates.values()))
    lines_chart(ax, range(longest), rates, title=title, xlabel="training step",
                ylabel="learning rate", markers=False)
    return figure


LETTERS = "ABCDEF"


def six_runs(use: str = "explorer") -> dict[str, dict]:
    """The runs that go wrong, under letters; the explorer's in another order than TRIALS."""
    runs = [run for run in runs_of(use) if run["name"] != "healthy"]
    if use == "explorer":
        runs = [runs[i] for i in (4, 1, 2, 5, 0, 3)]
    names = LETTERS if use == "explorer" else "123456"
    return {f"run {letter}": run for letter, run in zip(names, runs)}


def sentence_about(name: str, run: dict, floor: float) -> str:
    """What the curve of a run says, in words."""
    last = sum(run["loss"][-20:]) / 20
    place = "below" if last < floor else "above"
    lowest, final = min(run["val"]), run["val"][-1]
    validation = (f"rises again from {lowest:.2f} to {final:.2f}" if final > lowest + 0.3
                  else f"falls to {final:.2f}")
    return (f"{name[:1].upper()}{name[1:]}: the training loss ends at {last:.2f}, {place} the floor "
            f"of {floor:.2f}; the validation loss {validation}.")


def curve_picture(name: str, run: dict, floor: float, healthy: dict | None = None, *,
                  width: int = 5, validation: bool = True, top: float = 9.0):
    """One run above the floor, with its honest validation loss and a healthy run beside it."""
    figure, ax = new_figure(7.4, 3.8)
    if healthy:
        ax.plot(*smooth(healthy["loss"], width), color=GREY, linestyle=":", linewidth=2.5,
                label="a healthy run")
    ax.plot(*smooth(run["loss"], width), color=BLUE, label="training loss")
    if validation:
        steps = range(0, len(run["loss"]) + 1, len(run["loss"]) // (len(run["val"]) - 1))
        ax.plot(steps, run["val"], color=ORANGE, linestyle="--", marker="s", markersize=5,
                label="validation loss")
    ax.axhline(floor, color=BLACK, linewidth=1.5, linestyle=(0, (5, 1, 1, 1)), label="the floor")
    ax.set(title=name, xlabel="training step", ylabel="loss (nats per token)", ylim=(-0.2, top))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def curve_explorer(runs: dict[str, dict], floor: float, healthy: dict) -> Callable:
    """The explorer's function: draw(run, steps_per_point, validation_loss, cause)."""
    def draw(run: str, steps_per_point: int, validation_loss: str, cause: str):
        chosen = runs[run]
        sentence = sentence_about(run, chosen, floor)
        if cause == "shown":
            sentence += f" The cause: {chosen['name']}."
        title = f"{run}: {chosen['name']}" if cause == "shown" else f"{run}: what went wrong?"
        top = 9.0 if max(chosen["val"]) < 9 else 15.5
        figure = curve_picture(title, chosen, floor, healthy, width=steps_per_point,
                               validation=validation_loss == "shown", top=top)
        steps, means = smooth(chosen["loss"], 20)
        table = {"step": steps, "training loss": means, "validation loss": chosen["val"][1:]}
        return figure, sentence, table
    return draw


def quiz_picture():
    """The six runs of the exercise, numbered, each above the floor: (figure, alt text)."""
    from matplotlib import pyplot

    from ..figures import STYLE
    import matplotlib

    floor, runs = recorded("curves")["floor"], six_runs("quiz")
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(2, 3, figsize=(10.0, 5.6), sharex=True, sharey=True)
    for ax, (name, run) in zip(axes.flat, runs.items()):
        ax.plot(*smooth(run["loss"], 5), color=BLUE, label="training")
        steps = range(0, len(run["loss"]) + 1, len(run["loss"]) // (len(run["val"]) - 1))
        ax.plot(steps, run["val"], color=ORANGE, linestyle="--", marker="s", markersize=4,
                label="validation")
        ax.axhline(floor, color=BLACK, linewidth=1.5, linestyle=":", label="floor")
        ax.set(title=name, ylim=(-0.3, 10.0))
    for ax in axes[1]:
        ax.set_xlabel("training step")
    for ax in axes[:, 0]:
        ax.set_ylabel("nats per token")
    axes[0, 1].legend(frameon=False)
    alt = "Six training curves above the floor. " + " ".join(
        sentence_about(name, run, floor) for name, run in runs.items())
    return figure, alt


def cleaning_table() -> dict[tuple[str, str], float]:
    """(model, text) -> nats per byte above the floor, the mean over the seeds."""
    facts = recorded("cleaning")
    found: dict[tuple[str, str], list[float]] = {}
    for row in facts["runs"]:
        found.setdefault((row["model"], row["text"]), []).append(row["nats_per_byte"])
    return {key: sum(values) / len(values) - facts["floor"] for key, values in found.items()}


def cleaning_picture(title: str):
    """Each measured run as a point: what was read, and how far above the floor it ended."""
    facts = recorded("cleaning")
    figure, ax = new_figure(7.4, 3.4)
    labels = list(dict.fromkeys((row["model"], row["text"]) for row in facts["runs"]))
    for n, label in enumerate(reversed(labels)):
        values = [row["nats_per_byte"] - facts["floor"] for row in facts["runs"]
                  if (row["model"], row["text"]) == label]
        bigger = label[0] == "bigger"
        ax.scatter(values, [n] * len(values), s=50, color=ORANGE if bigger else BLUE,
                   marker="s" if bigger else "o")
    ax.set_yticks(range(len(labels)), [f"{model} model, {text}" for model, text in reversed(labels)])
    ax.set(title=title, xlabel="nats per byte above the floor", ylim=(-0.6, len(labels) - 0.4))
    ax.grid(axis="x", color="#cccccc", linewidth=0.8)
    ax.set_axisbelow(True)
    return figure


SHAKESPEARE = RESULTS / "shakespeare.json"


def shakespeare_record() -> str:
    """The record on tiny Shakespeare as a table of text, where one is kept; else ""."""
    if not SHAKESPEARE.exists():
        return ""
    record = read_result(SHAKESPEARE)
    lines = [f"{'nats per character':32} {'median':>7} {'lowest':>7} {'highest':>7} {'runs':>4} {'seconds':>7}"]
    for name in record["names"]:
        runs = [run for run in record["runs"] if run["name"] == name]
        if runs:
            losses = [run["nats_per_character"] for run in runs]
            seconds = median(run["wall_seconds"] for run in runs)
            lines.append(f"{name:32} {median(losses):7.3f} {min(losses):7.3f} {max(losses):7.3f} "
                         f"{len(runs):4} {seconds:7.0f}")
    made = record["runs"][-1]["provenance"]
    lines.append(f"{made['date'][:10]}, {made['threads']} threads of {made['processor']}")
    return "\n".join(lines)
