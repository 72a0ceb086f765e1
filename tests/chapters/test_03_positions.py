"""Chapter 3: its records are sound, its drafts agree with the library, its claims hold."""

import itertools
import math

import pytest
import story
import torch

import minimistral as mm
from minimistral.attention import attend, causal
from minimistral.checkpoint import unpermute_rotary
from minimistral.course import judge, swap, verify
from minimistral.course.chapters import ch03_positions as ch03
from minimistral.course.records.ch03 import EXERCISES
from minimistral.rope import rotary_angles, rotate

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


def drafts(*wanted: str, **names) -> dict:
    return story.drafts(3, *wanted, **dict(
        math=math, torch=torch, nn=torch.nn, attend=attend, causal=causal,
        rotary_angles=rotary_angles, rotate=rotate) | names)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = mm.ModelConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6,
                                hidden_dim=32, vocab_size=50, rope_theta=100.0)
        model = mm.Transformer(config)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data.mul_(10)
    return model.requires_grad_(False)


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("rotary_angles", lambda positions, head_dim, theta: positions, "tuple"),
        ("rotary_angles", lambda p, d, t: (p.float().cos(), p.float().sin()), "shape"),
        ("rotate", lambda x, cos, sin: cos, "shape"),
        ("rotate", lambda x, cos, sin: x @ cos, "stopped"),
        ("turn_complex", lambda x, positions, theta: x * theta, "xpected"),
        ("move_keys", lambda keys, steps, theta: keys + steps, "xpected"),
        ("to_neighbours", lambda weight, n_heads: weight.T, "shape"),
        ("loss_without_turning", lambda model, rows, pairs: ch03.loss_of(model, rows) * 2, "xpected"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


# ---------------------------------------------------------------- drafts


def test_one_turned_pair_equals_the_library():
    turn = drafts("turn")["turn"]
    x = random(1, 4, 1, 2)
    whole = rotate(x, *rotary_angles(torch.arange(4), 2, 10_000))
    for p in range(4):
        torch.testing.assert_close(whole[0, p, 0], turn(x[0, p, 0].tolist(), p * 1.0))


def test_the_other_layout_is_the_library_s_other_layout():
    for_halves, rotate_halves = drafts("for_halves", "rotate_halves").values()
    weight = random(24, 5)
    torch.testing.assert_close(unpermute_rotary(for_halves(weight, 3), 3), weight)
    x = random(2, 5, 3, 8)
    angles = rotary_angles(torch.arange(5), 8, 50.0)
    order = for_halves(torch.arange(8)[:, None], 1)[:, 0]
    torch.testing.assert_close(rotate_halves(x[..., order], *angles), rotate(x, *angles)[..., order])


def test_the_row_of_the_notebook_is_the_row_of_the_benchmark():
    size, bigram = 30, random(30, 30)
    own = drafts("LookBack", V=size, smooth=bigram)["LookBack"]
    for turning in (False, True):
        torch.manual_seed(0)
        mine = own(turning)
        torch.manual_seed(0)
        other = ch03.LookBack(bigram, turning)
        for model in (mine, other):
            model.output.weight.data = random(size, 64, seed=2)
        ids = torch.randint(size, (2, 7), generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(mine(ids), other(ids))


# ---------------------------------------------------------------- claims


def _look(x, mask=None):
    look = drafts("look", **dict(zip(("wq", "wk", "wv"), random(3, 8, 8, seed=1) / 2)))["look"]
    return look(x, mask)[0]


def test_attention_without_a_mask_is_blind_to_order_at_any_depth():
    x = random(4, 8, seed=2)
    for order in itertools.permutations(range(4)):
        y, z = x, x[list(order)]
        for _ in range(3):
            y, z = _look(y), _look(z)
        torch.testing.assert_close(z, y[list(order)], atol=1e-5, rtol=1e-4)


def test_with_the_causal_mask_one_layer_is_blind_and_two_are_not():
    x, mask = random(4, 8, seed=2), causal(torch.arange(4), torch.arange(4))
    turned = [2, 0, 1, 3]
    torch.testing.assert_close(_look(x[turned], mask)[-1], _look(x, mask)[-1])
    twice = [_look(_look(y, mask), mask)[-1] for y in (x, x[turned])]
    assert not torch.allclose(*twice, atol=1e-3)


@pytest.mark.parametrize("start", [1, 100, 5000])
def test_scores_depend_on_the_distance_only(start):
    q, k = random(2, 1, 6, 2, 8)
    scores = []
    for positions in (torch.arange(6), torch.arange(6) + start):
        angles = rotary_angles(positions, 8, 500.0)
        scores.append(torch.einsum("bthd,bshd->bhts", rotate(q, *angles), rotate(k, *angles)))
    torch.testing.assert_close(*scores, atol=5e-3, rtol=1e-3)


def test_turning_backwards_makes_the_score_depend_on_the_sum():
    q, k = random(2, 1, 1, 1, 2)

    def score(p, s):
        cos, sin = rotary_angles(torch.tensor([p]), 2, 10.0)
        turned = rotate(k, *rotary_angles(torch.tensor([-s]), 2, 10.0))
        return (rotate(q, cos, sin) * turned).sum().item()

    assert score(7, 4) == pytest.approx(score(6, 5), abs=1e-4)
    assert abs(score(7, 4) - score(17, 14)) > 0.05


def test_pairs_that_do_not_get_round_within_the_long_text():
    for theta, slow in ((1e4, 4), (1e6, 24)):
        turns = 2 * math.pi * theta ** (torch.arange(64).double() / 64)
        assert int((turns > 32_768).sum()) == slow
    assert [mm.MODELS[f"mistral-7b-v0.{n}"].rope_theta for n in (1, 2)] == [1e4, 1e6]


def test_bfloat16_puts_neighbours_onto_one_place():
    assert torch.tensor(256).bfloat16() == torch.tensor(257).bfloat16()


# ---------------------------------------------------------------- helpers and explorer


def test_different_counts_what_is_unequal():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])
    assert ch03.different([a, a + 1e-7, b]) == 2


def test_explorer_says_the_same_score_for_the_same_distance():
    draw = ch03.circle_explorer()
    near = draw(5, 2, "1 radian a place")
    for figure, sentence, table in (near, draw(45, 42, "1 radian a place")):
        assert sentence.endswith(f"Score {ch03.score_at(3, 0, 1.0):.2f}.")
        assert len(set(table["score"])) == 1 and "distance 3" in figure.axes[1].get_title()
    assert "2 places after it" in draw(0, 2, "0.1 radian a place")[1]
    assert "at the same place" in draw(4, 4, "0.1 radian a place")[1]


def test_the_far_distance_of_the_explorer_looks_like_the_near_one():
    assert ch03.score_at(47, 0, 1.0) == pytest.approx(ch03.score_at(3, 0, 1.0), abs=0.05)
    assert abs(ch03.score_at(47, 0, 0.1) - ch03.score_at(3, 0, 0.1)) > 0.3


def test_two_back_needs_positions():
    blind, turned = (ch03.learn_two_back(turn, steps=60) for turn in (False, True))
    assert blind[-1] > 1.7 and turned[-1] < 0.5
    assert ch03.learn_two_back(True, steps=5) == turned[:5]


def test_loss_by_stretch_is_the_loss_of_the_whole():
    model, rows = small_model(), torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(1))
    whole, parts = ch03.loss_of(model, rows), ch03.loss_of(model, rows, every=4)
    assert parts.shape == (3,) and parts.mean().item() == pytest.approx(whole.item(), rel=1e-5)
    moved = ch03.loss_of(model, rows, positions=torch.arange(12) + 50)
    assert moved.item() == pytest.approx(whole.item(), rel=1e-3)


def test_long_rows_hold_whole_tales():
    tokenizer = mm.load_tokenizer("tales-dense")
    rows = ch03.long_rows(tokenizer, 150, 2)
    assert rows.shape == (2, 151) and (rows[:, 0] == tokenizer.bos_id).all()
    assert (rows == tokenizer.eos_id).sum(1).min() >= 1
    assert ch03.trained_length() >= 100


def test_a_model_in_the_other_layout_needs_the_other_turn():
    model = small_model()
    other, ids = ch03.in_other_layout(model), torch.arange(10)[None]
    rotate_halves = drafts("rotate_halves")["rotate_halves"]
    assert not torch.allclose(other(ids), model(ids), atol=1e-2)
    with swap("rope.rotate", rotate_halves):
        logits = other(ids)
    torch.testing.assert_close(logits, model(ids), atol=1e-3, rtol=1e-3)
