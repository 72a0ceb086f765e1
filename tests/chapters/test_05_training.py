"""Chapter 5: its records are sound, its recorded runs say what it says, its helpers hold."""

import json
import math
import re
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

import minimistral as mm
from minimistral.cleaning import drop_meaningless, drop_repeats
from minimistral.course import judge, verify
from minimistral.course.chapters import ch05_training as ch05
from minimistral.course.records.ch05 import EXERCISES
from minimistral.tales import parse_tale
from minimistral.train import IGNORE, Rows, Tokens, TrainConfig, evaluate, learning_rate

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
CURVES = ch05.recorded("curves")


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("next_token_nats", lambda logits, targets: logits, ""),
        ("learning_rate", lambda step, config: config.lr, ""),
        ("parameter_groups", lambda model, decay: [], "groups"),
        ("inputs_and_targets", lambda rows, start: rows, ""),
        ("clip_gradients", lambda gradients, limit: gradients[0], ""),
        ("adamw_step", lambda w, g, m, s, step, rate, decay: w - rate * g, ""),
        ("without_test_text", lambda documents, held_out, n: documents, ""),
        ("best_rate", lambda run, rates: min(rates), ""),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


def test_the_reference_step_is_pytorchs():
    chance = torch.Generator().manual_seed(3)
    w = torch.randn(4, 3, generator=chance)
    theirs = nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    mean = square = torch.zeros(4, 3)
    for step in range(1, 6):
        gradient = torch.randn(4, 3, generator=chance)
        theirs.grad = gradient.clone()
        optimizer.step()
        w, mean, square = BY_NAME["adamw_step"].reference(w, gradient, mean, square, step, 0.02, 0.3)
        torch.testing.assert_close(w, theirs.detach())


def test_the_reference_clips_as_pytorch_does():
    chance = torch.Generator().manual_seed(4)
    gradients = [torch.randn(3, 4, generator=chance), torch.randn(5, generator=chance)]
    for limit in (0.5, 100.0):
        weights = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for w, g in zip(weights, gradients):
            w.grad = g.clone()
        nn.utils.clip_grad_norm_(weights, limit)
        for ours, w in zip(BY_NAME["clip_gradients"].reference(gradients, limit), weights):
            torch.testing.assert_close(ours, w.grad, rtol=1e-5, atol=1e-6)


def test_the_evaluation_of_the_bug_hunt_is_the_librarys():
    ids = torch.randint(31, (9, 8), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    for r in range(9):
        targets[r, 1 + r % 6:] = IGNORE
    rows = Rows(ids[:, :-1], targets, torch.arange(7).expand(9, 7))
    model = ch05.mm.Transformer(mm.ModelConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1,
                                               head_dim=4, hidden_dim=12, vocab_size=31))
    expected = evaluate(model, rows).loss
    for size in (2, 4, 9):
        assert BY_NAME["nats_per_token"].reference(model, rows, size) == pytest.approx(expected)


# ---------------------------------------------------------------- recorded runs


@pytest.mark.parametrize("name", ["curves", "cleaning"])
def test_recorded_runs_say_where_they_come_from(name):
    facts = ch05.recorded(name)
    assert {"command", "date", "torch", "machine"} <= facts["provenance"].keys()
    assert facts["runs"] and len(json.dumps(facts)) < 200_000


def test_the_recorded_runs_are_those_of_the_code():
    from dataclasses import asdict

    stored = [(r["use"], r["name"], r["seed"], r["trial"]) for r in CURVES["runs"]]
    wanted = [(u, n, s, asdict(t)) for u, n, t, s in ch05.recorded_trials()]
    assert stored == wanted


@pytest.mark.parametrize("use", ["explorer", "quiz"])
def test_every_fault_has_the_symptom_that_the_chapter_names(use):
    floor, runs = CURVES["floor"], {r["name"]: r for r in ch05.six_runs(use).values()}
    last = {name: sum(run["loss"][-20:]) / 20 for name, run in runs.items()}
    turned = {name: run["val"][-1] > min(run["val"]) + 0.3 for name, run in runs.items()}
    below = {name for name in runs if last[name] < floor}
    assert below == {"targets not shifted", "too little text"}
    copied, learned = (runs[n]["loss"] for n in ("targets not shifted", "too little text"))
    assert sum(copied[40:60]) / 20 < sum(learned[40:60]) / 20 or use == "quiz"
    assert turned["targets shifted twice"] and last["targets shifted twice"] < 2.5
    _, means = ch05.smooth(runs["text in order"]["loss"], 10)
    assert sum(b > a + 0.3 for a, b in zip(means, means[1:])) >= 2
    high, low = runs["rate too high"]["loss"], runs["rate too low"]["loss"]
    assert sum(high[15:20]) < sum(low[15:20]) - 3 and last["rate too low"] > 4.5
    for name in ("rate too high", "rate too low"):
        assert last[name] > 3 and not turned[name]


def test_the_lines_of_the_quiz_stand_in_the_order_of_its_runs():
    keys = ["order", "far too high", "twice", "far too low", "too little text", "not shifted at all"]
    names = ["text in order", "rate too high", "targets shifted twice", "rate too low",
             "too little text", "targets not shifted"]
    assert [r["name"] for r in ch05.six_runs("quiz").values()] == names == list(ch05.QUIZ)
    assert all(key in line for key, line in zip(keys, BY_NAME["six_curves"].lines))


def test_cleaning_was_worth_more_than_size():
    above = ch05.cleaning_table()
    assert above["small", "clean"] < min(v for k, v in above.items() if k != ("small", "clean"))
    facts = ch05.recorded("cleaning")["runs"]
    sizes = {row["model"]: row["parameters"] for row in facts}
    assert sizes["bigger"] > 2.9 * sizes["small"]


# ---------------------------------------------------------------- helpers


def test_dirt_and_its_cleaning():
    tales = ch05.ladder.corpus.train_documents[:300]
    raw = ch05.dirty(tales, repeated=3, copies=20, salads=50, noises=10)
    assert len(raw) == 300 + 60 + 60 and raw != sorted(raw)
    clean = drop_meaningless(drop_repeats(raw))
    assert set(clean) <= set(tales) and len(clean) > 280
    heaps = ch05.heaps(n_tales=100)
    assert len(heaps["clean"]) < min(len(heaps["without repeats"]), len(heaps["without nonsense"]))


def test_trial_batches_have_the_faults_they_are_named_for():
    tokens = Tokens(torch.arange(50, 450), torch.arange(0, 400, 20))
    config = TrainConfig(steps=10, batch_size=2, seq_len=6, at_starts=True)

    def batch(**fault):
        trial = ch05.Trial(steps=10, batch=2, length=6, **fault)
        return ch05.trial_batch(tokens, 0, trial, config)

    inputs, targets = batch()
    assert torch.equal(inputs + 1, targets)
    inputs, targets = batch(shift=0)
    assert torch.equal(inputs, targets)
    inputs, targets = batch(shift=2)
    assert torch.equal(inputs[:, :-1] + 2, targets[:, :-1]) and (targets[:, -1] == IGNORE).all()
    inputs, _ = batch(sorted=True)
    assert inputs[:, 0].tolist() == [50, 70]  # in order


def test_language_order():
    tales = ch05.ladder.corpus.train_documents[:40]
    languages = [parse_tale(t).language for t in ch05.language_order(tales)]
    assert languages == sorted(languages) and len(set(languages)) == 5


def test_a_models_endings_are_judged():
    tokenizer = ch05.ladder.tokenizer
    from random import Random

    true = ch05.sample_tale(Random(1), "en").text
    false = ch05.sample_tale(Random(1), "en", contradictions=1.0).text
    told = [tokenizer.encode(text) for text in (true, false, "no tale at all")]
    model = ch05.tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ch05.mm, "generate", lambda *args, **kwargs: told)
        assert ch05.false_endings(model, 3) == 0.5


def test_smooth():
    assert ch05.smooth([1, 3, 5, 7, 100], 2) == ([2, 4], [2, 6])


def test_the_story_tells_which_run_has_which_fault():
    source = Path(__file__).resolve().parents[2] / "notebooks/src/05_training.py"
    told = " ".join(source.read_text("utf-8").replace("\n#", "\n").split())
    for name, run in ch05.six_runs().items():
        assert f"{name[-1]}: {run['name']}." in told


def test_the_explorer_draws_what_it_says():
    runs = ch05.six_runs()
    healthy = next(run for run in CURVES["runs"] if run["name"] == "healthy")
    draw = ch05.curve_explorer(runs, CURVES["floor"], healthy)
    for name, run in runs.items():
        figure, hidden, table = draw(name, 5, "hidden", "hidden")
        assert run["name"] not in hidden and run["name"] not in figure.axes[0].get_title()
        assert "validation loss" not in figure.axes[0].get_legend_handles_labels()[1]
        figure, told, _ = draw(name, 10, "shown", "shown")
        assert run["name"] in told and "validation loss" in figure.axes[0].get_legend_handles_labels()[1]
        assert len(table["step"]) == len(table["validation loss"]) == 10


def test_sentences_about_runs():
    run = {"loss": [1.0] * 40, "val": [3.0, 2.0, 2.9], "name": "x"}
    said = ch05.sentence_about("run A", run, 0.5)
    assert said.startswith("Run A: the training loss ends at 1.00, above") and "rises again" in said
    assert "falls to 1.00" in ch05.sentence_about("run A", {**run, "val": [3.0, 1.0]}, 2.0)


def test_a_trial_repeats_and_learns():
    trial = ch05.Trial(steps=12, batch=4, length=32, tales=30)
    one, other = (ch05.run_trial(trial, every=6) for _ in range(2))
    assert one == other and one["loss"][-1] < one["loss"][0] - 0.5
    assert len(one["val"]) == 3 and one["val"][0] == pytest.approx(math.log(960), abs=0.1)


def test_the_schedule_of_the_chapters_example():
    config = TrainConfig(steps=5, lr=1.0, min_lr=0.0, warmup_steps=2)
    rates = [learning_rate(step, config) for step in range(5)]
    assert rates == pytest.approx([0.5, 1, 1, 0.5, 0])


# ---------------------------------------------------------------- the rung


def test_the_recorded_rung_is_trained_as_the_story_says():
    source = Path(__file__).resolve().parents[2] / "notebooks/src/05_training.py"
    told = re.search(r"^recipe = (mm\.TrainConfig\(.*?\))$", source.read_text("utf-8"), re.S | re.M)
    assert eval(told[1], {"mm": mm}) == ch05.RECIPE


def test_tiny_shakespeare_went_as_the_story_tells():
    """What the chapter says of each row of the record; a measured file, so bands and orders."""
    record = json.loads(ch05.SHAKESPEARE.read_text(encoding="utf-8"))
    loss, seconds = ({name: median(run[key] for run in record["runs"] if run["name"] == name)
                      for name in record["names"]} for key in ("nats_per_character", "wall_seconds"))
    theirs, plain, higher, muon, falling, narrow, last = record["names"]
    seeds = [run["seed"] for run in record["runs"] if run["name"] in (theirs, last)]
    assert sorted(seeds) == [0, 0, 1, 1, 2, 2]
    assert loss[plain] < loss[theirs] - 0.15               # a large gain
    assert -0.03 < loss[higher] - loss[plain] < 0.03       # none
    assert loss[muon] < loss[higher] - 0.1                 # the second large gain
    assert 0.15 < 1 - seconds[higher] / seconds[muon] < 0.35           # a quarter of the time
    assert abs(loss[falling] - loss[muon]) < 0.01          # less than another seed
    assert loss[narrow] < loss[falling] + 0.01             # nothing is lost
    assert loss[narrow] < loss[last] < 1.60                # rises a little
    assert seconds[last] <= seconds[theirs]
