"""Chapter 9: its records are sound, its drafts agree with the library, its claims hold."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import story
import torch

import minimistral as mm
from minimistral import moe as library
from minimistral.course import judge, verify
from minimistral.course.chapters import ch09_mixture_of_experts as ch09
from minimistral.course.records.ch09 import EXERCISES
from minimistral.layers import SwiGLU

SOURCE = Path(__file__).parents[2] / "notebooks" / "src" / "09_mixture_of_experts.py"
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


def drafts(*wanted: str) -> dict:
    return story.drafts(9, *wanted, torch=torch, route=library.route)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_mixture(experts=5, chosen=2):
    torch.manual_seed(0)
    return mm.Transformer(mm.ModelConfig(dim=12, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=4,
                                         hidden_dim=10, vocab_size=50,
                                         moe=mm.MoEConfig(experts, chosen)))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("route", lambda logits, k: logits, "tensor"),
        ("route", lambda logits, k: (logits.float().softmax(-1), logits.argsort(-1)), "xpected"),
        ("chosen_experts", lambda experts, x, weights, chosen: x, "xpected"),
        ("chosen_experts", lambda experts, x, weights, chosen: weights, "shape"),
        ("total_and_active", lambda config: (0, 0), "xpected"),
        ("balance_of_real_tokens", lambda logits, k, real: 0.0, "xpected"),
        ("group_by_expert", lambda chosen, n_experts: chosen, "xpected"),
        ("expected_experts", lambda E, k, batch: E, "xpected"),
        ("cut_feed_forward", lambda w1, w2, w3, parts: [(w1, w2, w3)], "xpected"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


def test_the_order_within_a_row_is_free_and_a_lost_pair_is_not():
    def upside_down(logits, k):
        return tuple(part.flip(-1) for part in library.route(logits, k))

    def torn(logits, k):
        weights, experts = library.route(logits, k)
        return weights, experts.flip(-1)
    assert judge(BY_NAME["route"], upside_down).passed
    assert not judge(BY_NAME["route"], torn).passed


def test_half_a_routing_is_told_as_it_is_and_not_as_the_comparison_sees_it():
    for wrong, told in (
        (lambda logits, k: library.route(logits, k)[0], "xpected tuple of 2"),
        (lambda logits, k: tuple(part.float() for part in library.route(logits, k)), "int64"),
        (lambda logits, k: (library.route(logits, k)[0].half(), logits.topk(k)[1]), "float16"),
    ):
        assert told in judge(BY_NAME["route"], wrong).message


def test_groups_in_another_order_within_are_told_so():
    def backwards(chosen, n_experts):
        rows = sorted((e, -t, p) for t, row in enumerate(chosen.tolist())
                      for p, e in enumerate(row))
        counts = torch.bincount(chosen.flatten(), minlength=n_experts)
        return [-t for _, t, _ in rows], [p for _, _, p in rows], counts
    assert "do not rise" in judge(BY_NAME["group_by_expert"], backwards).message


def test_an_unchanged_first_exercise_is_not_written_yet():
    def total_and_active(config):
        E, k = config.moe.num_experts, config.moe.num_experts_per_tok
        expert, router = ..., ...
        return ..., ...
    assert judge(BY_NAME["total_and_active"], total_and_active).status == "not written yet"


# ---------------------------------------------------------------- the library


@pytest.mark.parametrize(("experts", "k", "tokens"), [(5, 2, 7), (4, 3, 13), (3, 1, 1), (6, 6, 4)])
def test_three_ways_to_one_sum(experts, k, tokens):
    plain = drafts("plain_mixture")["plain_mixture"]
    layer = small_mixture(experts, k).layers[0].feed_forward
    x = random(tokens, 12)
    weights, chosen = library.route(layer.gate(x), k)
    wanted = plain(layer.experts, x, weights, chosen)
    for way in (library.chosen_experts, library.all_experts):
        torch.testing.assert_close(way(layer.experts, x, weights, chosen), wanted)


def test_the_chosen_experts_compute_what_was_chosen_and_nothing_else():
    layer, rows = small_mixture().layers[0].feed_forward, []
    for expert in layer.experts:
        expert.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    layer(random(1, 9, 12))
    assert sum(rows) == 18


def test_gradients_of_both_ways_agree():
    layer = small_mixture().layers[0].feed_forward
    grads = []
    for way in (library.chosen_experts, library.all_experts):
        layer.zero_grad()
        x = random(9, 12).requires_grad_()
        weights, chosen = library.route(layer.gate(x), 2)
        way(layer.experts, x, weights, chosen).square().sum().backward()
        grads.append((x.grad, layer.gate.weight.grad.clone()))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_half_precision_experts_add_up_in_a_wider_stream():
    layer, x = small_mixture().layers[0].feed_forward, random(1, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out, layer(x), atol=0.02, rtol=0.1)


# ---------------------------------------------------------------- claims


def test_recorded_runs_have_their_provenance_and_counts():
    for part in ("quality", "balance", "speed"):
        assert ch09.recorded(part)
        for run in ch09.recorded(part):
            assert {"date", "command", "torch", "processor"} <= set(run["provenance"])
    for run in ch09.recorded("quality"):
        count = mm.count_parameters(ch09.small_config(*ch09.QUALITY[run["model"]]))
        assert (run["total_parameters"], run["active_parameters"]) == count[:2]
        assert run["nats_per_byte"] > 1.05 * run["floor"]


def test_the_rivals_are_equal_in_what_they_say():
    count = {name: mm.count_parameters(ch09.small_config(*sizes))
             for name, sizes in ch09.QUALITY.items()}
    routers = 2 * 64 * ch09.EXPERTS
    assert count["mixture"].active - routers == count["dense, equal active"].active
    assert count["mixture"].total - routers == count["dense, equal total"].total


def test_the_mixture_beats_the_dense_model_of_equal_cost_by_more_than_the_seeds_differ():
    paid = ch09.recorded_losses(steps=400)
    assert {len(values) for values in paid.values()} == {3}
    dense, ours = paid["dense, equal active"], paid["mixture"]
    spread = max(max(values) - min(values) for values in (dense, ours))
    assert sorted(dense)[1] - sorted(ours)[1] > spread and max(ours) < min(dense)


def test_without_the_balance_loss_experts_fall_asleep_with_every_seed():
    for seed in (0, 1, 2):
        runs = ch09.recorded_balance(seed)
        least = {name: min(map(min, run["shares"])) for name, run in runs.items()}
        assert least["off"] < 0.04 < 0.06 < least["on"]
        if "too strong" in runs:
            assert runs["too strong"]["nats_per_byte"] > runs["on"]["nats_per_byte"] + 0.03


def test_the_grouped_path_costs_what_its_arithmetic_costs():
    run = next(run for run in ch09.recorded("speed") if run["tokens"] == 4096)
    for name, seconds in run["seconds"].items():
        assert run["medians"][name] == pytest.approx(sorted(seconds)[len(seconds) // 2])
    assert run["medians"]["chosen experts"] <= 1.15 * run["medians"]["dense"]


def test_the_chapters_ladder_model_is_the_recorded_one():
    config, text = ch09.ladder_model().config, SOURCE.read_text(encoding="utf-8")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim"):
        assert f"{name}={getattr(config, name)}" in text
    assert f"MoEConfig({config.moe.num_experts}, {config.moe.num_experts_per_tok})" in text


# ---------------------------------------------------------------- helpers and explorer


def test_choices_leave_padding_out_and_shares_sum_to_one():
    model = small_mixture()
    ids, positions = torch.arange(14).view(2, 7), torch.arange(7).repeat(2, 1)
    positions[1, 4:] = -1
    chosen = ch09.choices(model, ids, positions)
    assert [tuple(c.shape) for c in chosen] == [(11, 2)] * 2
    assert ch09.shares(chosen[0], 5).sum().item() == pytest.approx(1)


def test_distinct_experts_follow_the_formula_when_choices_are_even():
    chance = torch.Generator().manual_seed(0)
    chosen = torch.rand(4000, 8, generator=chance).topk(2).indices
    for batch in (1, 2, 5, 16):
        wanted = ch09.expected_distinct(8, 2, batch)
        assert ch09.distinct(chosen, batch, draws=1500) == pytest.approx(wanted, abs=0.1)
    assert ch09.expected_distinct(8, 2, 2) == 3.5


def test_neighbours_are_rows_that_follow_each_other():
    chosen = torch.arange(40).repeat_interleave(2).view(-1, 2)     # row n names n twice
    assert ch09.distinct(chosen, 5, neighbours=True) == 5
    assert ch09.distinct(chosen, 5) < 5                            # drawn with repetition
    pairs = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(50, 0)
    assert ch09.distinct(pairs, 2, neighbours=True) < 2.2 < ch09.distinct(pairs, 2)


def test_what_the_chosen_keep_is_the_sum_of_their_shares():
    model = small_mixture()
    ids = torch.arange(14).view(2, 7)
    positions = torch.arange(7).repeat(2, 1)
    positions[1, 4:] = -1
    rows = SimpleNamespace(inputs=ids, positions=positions)
    for part in model.layers:
        torch.nn.init.zeros_(part.feed_forward.gate.weight)
    assert ch09.kept_by_the_chosen(model, rows) == pytest.approx([2 / 5, 2 / 5])


def test_the_table_of_costs_counts_arithmetic_by_choices_and_bytes_by_experts():
    run = {"tokens": 16, "dim": 512, "hidden_dim": 1024, "chosen": 2, "experts": 8, "distinct": 7,
           "medians": {"dense": 0.001, "chosen experts": 0.002, "all experts": 0.003}}
    dense, chosen, everything = ch09.cost_table(run)
    assert dense[1] == chosen[1] == pytest.approx(2 * 16 * 2 * 3 * 512 * 1024 / 1e9)
    assert everything[1] == pytest.approx(4 * dense[1])
    assert chosen[2] == pytest.approx(3.5 * dense[2]) and everything[2] == pytest.approx(4 * dense[2])
    assert [row[3] for row in (dense, chosen, everything)] == pytest.approx([1, 2, 3])


def test_guessing_knows_what_it_was_told_and_no_more():
    keys, experts = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 1, 0, 3, 3])
    assert ch09.guessed(keys, experts, torch.tensor([0, 1, 2]), torch.tensor([1, 0, 3])) == 1.0
    assert ch09.guessed(keys, experts, torch.tensor([7]), torch.tensor([1])) == 1.0
    assert ch09.guessed(keys * 0, experts, torch.tensor([0, 0]), torch.tensor([1, 0])) == 0.5


def test_an_expert_is_absent_only_while_it_is_measured():
    model = mm.load_model("tales-moe")
    text = ch09.ladder.corpus.val_documents[:2]
    costs = ch09.cost_of_absence(model, text)
    assert costs.shape == (model.config.n_layers, model.config.moe.num_experts)
    assert torch.equal(costs, ch09.cost_of_absence(model, text)) and costs.abs().max() > 0
    assert not model.layers[0].feed_forward.gate._forward_hooks


def test_explorer_says_what_it_draws():
    model, tokenizer = mm.load_model("tales-moe"), mm.load_tokenizer("tales-moe")
    ids = tokenizer.encode("The golden ring\nAnna was in the mill.", bos=True)
    figure, sentence, table = ch09.experts_explorer(model, {"English": ids}, tokenizer)("English", 1)
    assert "English, layer 1" in sentence and sum(table["tokens"]) == len(ids)
    assert len(figure.axes[0].patches) == len(ids)


def test_training_swaps_the_fast_way_in_and_out_again():
    model = ch09.learn(ch09.ladder_model(), steps=1)
    assert isinstance(model.layers[0].feed_forward.experts[0], SwiGLU)
    assert library.MoE.forward.__globals__["chosen_experts"] is library.chosen_experts
    assert json.loads(model.config.to_json())["moe"]["num_experts"] == ch09.EXPERTS
