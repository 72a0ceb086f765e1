"""Chapter 11: its records are sound, its drafts agree with the library, its claims hold."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot

import minimistral as mm
from minimistral import speculative
from minimistral.course import judge, verify
from minimistral.course.chapters import ch11_gpu_inference as ch11
from minimistral.course.chapters.ch11_grown import grown
from minimistral.course.records.ch11 import EXERCISES, MIXED, PATTERN, WINDOWED
from minimistral.speculative import accept

SOURCE = Path(__file__).parents[2] / "notebooks" / "src" / "11_gpu_inference.py"
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


def draft(wanted: str):
    """A function that the chapter's own cells define, without running the rest."""
    names = {"torch": torch, "mm": mm, "ch11": ch11, "speculative": speculative}
    for cell in SOURCE.read_text(encoding="utf-8").split("\n# %%")[1:]:
        if "[markdown]" in cell.splitlines()[0]:
            continue
        for node in ast.parse("\n".join(cell.splitlines()[1:])).body:
            if getattr(node, "name", "") == wanted:
                exec(compile(ast.Module([node], []), str(SOURCE), "exec"), names)
    return names[wanted]


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("step_bytes", lambda config, batch, length, bits=16: 1.0, "xpected"),
        ("step_bytes", lambda config, batch, length, bits=16: None, "empty"),
        ("accept", lambda proposed, q, p, generator: [], "tokens"),
        ("accept", lambda proposed, q, p, generator: [*proposed, 0, 0], "ValueError"),
        ("time_it", lambda device, rounds, warm_up: None, "empty"),
        ("arithmetic_from", lambda config, speed, rate, bits: 3, "xpected"),
        ("texts_that_fit", lambda config, memory, length, bits: 5, "xpected"),
        ("speed_up", lambda acceptance, drafts, cost: 2.0, "xpected"),
        ("speculate_greedy", lambda model, propose, prompt, n, drafts: prompt, "xpected"),
        ("bigram_draft", lambda counts, text, count: None, "empty"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("config", [WINDOWED, PATTERN, MIXED, mm.MODELS["mixtral-8x7b-v0.1"]])
@pytest.mark.parametrize(("batch", "length", "bits"), [(1, 0, 16), (7, 90, 8), (64, 3000, 4.5)])
def test_the_chapters_own_bytes_are_the_helpers(config, batch, length, bits):
    own = draft("read_in_step")
    assert own(config, batch, length, bits) == pytest.approx(ch11.step_bytes(config, batch, length, bits))


def test_bytes_are_those_of_a_real_step():
    """One text, no cache: the active weights of a real model but for the input table."""
    model = ch11.lively(MIXED)
    expert = sum(w.numel() for w in model.layers[0].feed_forward.experts[0].parameters())
    idle = MIXED.n_layers * (MIXED.moe.num_experts - MIXED.moe.num_experts_per_tok) * expert
    stored = sum(w.numel() for w in model.parameters())
    table = model.tok_embeddings.weight.numel()
    assert ch11.step_bytes(MIXED, 1, 0, 32) == pytest.approx(4 * (stored - idle - table))
    cache = mm.KVCache(WINDOWED, 1, dtype=torch.bfloat16)
    ch11.lively(WINDOWED).bfloat16()(torch.zeros(1, 100, dtype=torch.int64), cache)
    assert ch11.cache_bytes(WINDOWED, 100) == cache.nbytes


def test_operations_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = ch11.DENSE
    model = ch11.lively(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(torch.full((3, 1), 7))
    products = ch11.step_operations(config, 3, 0)
    norms = 2 * 3 * config.dim * (2 * config.n_layers + 1)       # weights, but no products
    looks = counted.get_total_flops() - (products - norms)
    assert 0 <= looks <= ch11.step_operations(config, 3, 1) - products


def test_a_dense_model_turns_at_the_ridge_and_a_mixture_later():
    from minimistral.course.records.ch11 import TURN

    turn = TURN.reference
    assert turn(mm.MODELS["mistral-7b-v0.2"], 4800e9, 989e12, 16) == 207
    assert turn(mm.MODELS["mixtral-8x7b-v0.1"], 4800e9, 989e12, 16) > 3 * 207


# ---------------------------------------------------------------- what others measured


def test_published_runs_are_within_a_quarter_but_for_the_one_that_the_chapter_names():
    """The chapter's fit: five runs of Llama on the A100; the others are predictions."""
    fitted = [r for r in ch11.PUBLISHED if r.gpu == "A100" and "llama" in r.model]
    assert len(fitted) == 5 and len(ch11.PUBLISHED) == 10

    def off(run, share, per_layer):
        ratio = ch11.predicted(run, share, per_layer) / run.tokens_per_second
        return max(ratio, 1 / ratio)

    best = min((max(off(r, s / 100, n * 1e-6) for r in fitted), s, n)
               for s in range(50, 100) for n in range(0, 150, 5))
    wrong = [(r.gpu, r.bits) for r in ch11.PUBLISHED if off(r, best[1] / 100, best[2] * 1e-6) > 1.25]
    assert wrong == [("MI250X, half", 8)]


def test_the_reported_bandwidth_of_a_published_run_follows_from_its_bytes():
    run = ch11.PUBLISHED[0]
    read = ch11.step_bytes(ch11.shape_of(run.model), 1, 0, run.bits)
    assert run.tokens_per_second * read / 1e9 == pytest.approx(1397.31, rel=0.02)      # its README


def test_what_was_not_measured_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(ch11, "RESULTS", tmp_path)
    monkeypatch.setattr(ch11, "work_folder", lambda: tmp_path / "work")
    assert set(ch11.gpu_runs("decode-7b").values()) == {"not measured"}
    (tmp_path / "gpu.json").write_text(
        '{"rows": {"decode-7b": {"tokens_per_second": 201.4}, "int8-7b": {"not_measured": "memory"}},'
        ' "provenance": {"name": "a GPU", "date": "2026-12-01T00:00:00"}}')
    told = ch11.gpu_runs("decode-7b")
    assert told == {"your own GPU": "not measured",
                    "our own run": "201 tokens a second, a GPU, 2026-12-01"}
    assert ch11.gpu_runs("int8-7b")["our own run"] == "not measured"


# ---------------------------------------------------------------- tools


def test_the_fake_device_queues_its_work():
    device = ch11.FakeDevice([0.5, 0.1])
    device.run()
    device.run()
    device.run()
    assert device.clock() < 0.001
    device.wait()
    assert device.clock() == pytest.approx(0.7, rel=1e-3)
    device.wait()
    assert device.clock() == pytest.approx(0.7, rel=1e-3)


def test_a_wrong_token_in_the_toys_cache_shows():
    right, wrong = ch11.ToyModel(), ch11.ToyModel()
    after = [model.run(tokens) for model, tokens in ((right, [1, 2, 3]), (wrong, [1, 2, 9, 3]))]
    assert right.steps == wrong.steps == 1 and len(after[0]) == 3
    wrong.keep(2)
    assert wrong.run([3])[-1] == after[0][-1] and wrong.held == right.held


def test_the_tally_shows_the_mistake():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    drawn = q.multinomial(3000, True, generator=torch.Generator().manual_seed(1))
    assert (ch11.tally(accept, drawn, q, p, 3000) - p).abs().max() < 0.03
    assert (ch11.tally(draft("from_p"), drawn, q, p, 3000) - p).abs().max() > 0.08


def test_counting_changes_nothing():
    step = lambda: torch.ones(3) + torch.ones(3)  # noqa: E731
    assert ch11.started(step) == {"ones": 2, "add": 1}


# ---------------------------------------------------------------- explorer


@pytest.mark.parametrize("device", ch11.GPUS)
@pytest.mark.parametrize("model", ch11.EXPLORED)
def test_the_explorer_says_what_limits(device, model):
    for batch, tokens in ((1, 0), (1024, 0), (64, 8192)):
        figure, sentence, table = ch11.roofline_explorer(device, model, batch, 16, tokens)
        pyplot.close(figure)
        config = mm.MODELS[ch11.EXPLORED[model]]
        seconds = ch11.step_seconds(config, batch, tokens, 16, device)
        assert f"at most {batch / seconds:,.0f} tokens a second" in sentence
        assert table["ms for a step"] == sorted(table["ms for a step"])
    assert "limited by reading" in ch11.roofline_explorer(device, model, 1, 16, 0)[1]
    pyplot.close()


def test_the_explorer_says_what_fits():
    assert "and fits" in ch11.roofline_explorer("H200", "Mistral 7B", 1, 16, 0)[1]
    assert "does not fit" in ch11.roofline_explorer("T4", "Mixtral 8x7B", 1, 4.5, 0)[1]
    pyplot.close("all")


def test_the_recorded_run_has_its_provenance_and_every_sample():
    for name in ("decode-S", "decode-X", "decode-M"):
        row = ch11.recorded(name)
        assert {"date", "command", "commit"} <= set(row["provenance"])
        assert all(len(samples) >= 3 for samples in row["seconds"].values())
        assert {"plain", "engine", "transformers"} <= set(row["median"])


@pytest.mark.parametrize("shape", [(16, 2, 4, 2, 4, 24, 40), (40, 5, 6, 2, 8, 30, 40),
                                   (64, 6, 12, 4, 12, 24, 40)])
def test_a_grown_model_computes_what_the_small_one_does(shape):
    torch.manual_seed(0)
    small = mm.Transformer(mm.ModelConfig(16, 2, 4, 2, 4, 24, 40)).eval()
    for weight in small.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.3)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = small(ids)
        same = grown(small, mm.ModelConfig(*shape))(ids)
        noisy = grown(small, mm.ModelConfig(*shape), noise=0.2)(ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-4)
    assert (noisy - expected).abs().max() > 0.1


@pytest.mark.parametrize("name, value", [("dim", 8), ("n_layers", 1), ("hidden_dim", 8),
                                         ("vocab_size", 41), ("head_dim", 6), ("n_heads", 2),
                                         ("sliding_window", 4), ("moe", mm.MoEConfig(4, 2))])
def test_a_shape_into_which_a_small_model_does_not_fit_is_refused(name, value):
    small = mm.Transformer(mm.ModelConfig(16, 2, 4, 2, 4, 24, 40))
    with pytest.raises(ValueError, match="does not fit"):
        grown(small, replace(small.config, **{name: value}))
