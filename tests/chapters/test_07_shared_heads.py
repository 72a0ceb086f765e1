"""Chapter 7: its records are sound, its drafts agree with the library, its claims hold."""

import json
from pathlib import Path

import pytest
import story
import torch

import minimistral as mm
from minimistral.attention import attend, causal, fast_attend, plain_attend, repeat_heads
from minimistral.course import judge, verify
from minimistral.course.chapters import ch07_shared_heads as ch07
from minimistral.course.records.ch07 import EXERCISES

SOURCE = Path(__file__).parents[2] / "notebooks" / "src" / "07_shared_heads.py"
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


def drafts(*wanted: str) -> dict:
    return story.drafts(7, *wanted, torch=torch)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_model(n_kv_heads=3):
    torch.manual_seed(0)
    return mm.Transformer(mm.ModelConfig(dim=20, n_layers=2, n_heads=6, n_kv_heads=n_kv_heads,
                                         head_dim=4, hidden_dim=32, vocab_size=50))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("repeat_heads", lambda x, n: torch.cat([x, x], dim=2), "shape"),
        ("repeat_heads", lambda x, n: x.flip(2).repeat_interleave(n, 2), "xpected"),
        ("plain_attend", lambda q, k, v, mask: q, "xpected"),
        ("plain_attend", lambda q, k, v, mask: (q, k), "tensor"),
        ("cache_bytes", lambda config, length, batch_size, number_bytes: 0, "xpected"),
        ("attend_without_copies", lambda q, k, v, mask: k, "shape"),
        ("reorder_queries", lambda wq, wo, n_heads, n_kv_heads: wq, "xpected"),
        ("pool_heads", lambda weight, n_kv_heads, new: weight, "shape"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


def test_small_sizes_would_not_see_two_common_mistakes():
    """Why the fixtures have 12 heads on 3: with 4 on 2 a wrong number of copies is right."""
    in_turn = BY_NAME["repeat_heads"].misconceptions[0].wrong
    as_many = BY_NAME["repeat_heads"].misconceptions[1].wrong
    two, three = random(1, 2, 2, 5), random(1, 2, 3, 5)
    assert torch.equal(as_many(two, 2), repeat_heads(two, 2))
    assert not torch.equal(in_turn(two, 2), repeat_heads(two, 2))
    assert as_many(three, 4).shape != repeat_heads(three, 4).shape
    assert torch.equal(in_turn(three[:, :, :1], 4), repeat_heads(three[:, :, :1], 4))


# ---------------------------------------------------------------- the library


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 3), (10, 5), (6, 1), (3, 3)])
def test_plain_and_fast_agree_head_by_head(heads, kv_heads):
    q, k, v = random(2, 5, heads, 4), random(2, 7, kv_heads, 4, seed=1), random(2, 7, kv_heads, 4, seed=2)
    mask = causal(torch.arange(2, 7), torch.arange(7)).expand(2, 5, 7).clone()
    mask[1, 2] = False
    plain = plain_attend(q, k, v, mask)
    torch.testing.assert_close(fast_attend(q, k, v, mask), plain)
    for h in range(heads):
        g = h // (heads // kv_heads)
        alone = attend(q[:, :, h, None], k[:, :, g, None], v[:, :, g, None], mask)
        torch.testing.assert_close(plain[:, :, h, None], alone)
    assert (plain[1, 2] == 0).all()


def test_a_cache_holds_shared_heads_once_and_changes_nothing():
    model, ids = small_model(), torch.arange(9)[None]
    cache = mm.KVCache(model.config, max_length=9)
    parts = [model(ids[:, t, None], cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-5)
    assert cache.nbytes == 9 * mm.cache_bytes_per_token(model.config, torch.float32)
    assert cache.nbytes == 9 * 2 * 2 * 3 * 4 * 4


# ---------------------------------------------------------------- drafts


def test_the_formula_is_the_librarys():
    own = drafts("bytes_per_token")["bytes_per_token"]
    for config in mm.MODELS.values():
        assert own(config, 2) == mm.cache_bytes_per_token(config, torch.bfloat16)


def test_einsum_and_matmul_drafts_equal_the_library_and_only_einsum_copies_nothing():
    own = drafts("by_einsum", "by_matmul")
    q, k, v = random(2, 1, 12, 6), random(2, 17, 3, 6, seed=1), random(2, 17, 3, 6, seed=2)
    mask = torch.ones(1, 17, dtype=torch.bool)
    sizes = {}
    for name, look in own.items():
        out, sizes[name] = ch07.largest_stored(lambda q, k, v, _: look(q, k, v), q, k, v, mask)
        torch.testing.assert_close(out, plain_attend(q, k, v, mask))
    copies = ch07.largest_stored(plain_attend, q, k, v, mask)[1]
    assert sizes["by_einsum"] == k.numel() and sizes["by_matmul"] == copies == 4 * k.numel()


def test_the_chapters_ladder_model_is_the_recorded_one():
    text = SOURCE.read_text(encoding="utf-8")
    config = ch07.ladder_config(4)
    for name in ("dim", "n_layers", "n_heads", "head_dim", "hidden_dim"):
        assert f"{name}={getattr(config, name)}" in text


# ---------------------------------------------------------------- claims


def test_recorded_runs_have_three_seeds_and_their_provenance():
    runs = json.loads(ch07.RECORDED.read_text(encoding="utf-8"))["runs"]
    found = ch07.recorded_runs(steps=120)
    assert set(found) == {"K = 8", "K = 4", "K = 1", "K = 1, wider feed-forward"}
    assert all(len(values) == 3 for values in found.values())
    for run in runs:
        assert {"date", "command", "torch", "processor"} <= set(run["provenance"])
        config = ch07.ladder_config(run["n_kv_heads"], run["hidden_dim"])
        assert run["parameters"] == mm.count_parameters(config).total
        assert run["cache_bytes_per_token"] == ch07.float32_bytes(run["model"])
        assert run["nats_per_byte"] > run["floor"]


def test_the_wider_model_has_as_many_parameters_as_the_one_without_sharing():
    count = [mm.count_parameters(ch07.ladder_config(*sizes)).total for sizes in ((8, 192), (1, 248))]
    assert count[0] == count[1]


def test_share_of_cache_by_hand():
    config = small_model().config
    weights = 2 * (mm.count_parameters(config).total - 50 * 20)
    cache = 3 * 11 * 2 * 2 * 3 * 4 * 2
    share = ch07.share_of_cache(config, 11, batch=3)
    assert share == pytest.approx(cache / (cache + weights))


def test_every_mistral_shares_and_llama_2_of_7_and_13_billion_do_not():
    for name, config in mm.MODELS.items():
        shares = config.n_kv_heads < config.n_heads
        assert shares == (name not in ("llama-2-7b", "llama-2-13b"))


# ---------------------------------------------------------------- helpers and explorer


def test_a_model_with_fewer_heads_leaves_the_first_alone():
    model = small_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    new = ch07.with_kv_heads(model, 1, lambda heads: heads.mean(0))
    assert new.config.n_kv_heads == 1 and model.config.n_kv_heads == 3
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    wk = model.layers[1].attention.wk.weight.unflatten(0, (3, 4))
    torch.testing.assert_close(new.layers[1].attention.wk.weight, wk.mean(0))


def test_merging_equal_heads_changes_nothing():
    model = small_model()
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.attention.wk.weight, layer.attention.wv.weight):
                weight.copy_(weight[:4].repeat(3, 1))
    new, ids = ch07.with_kv_heads(model, 1, lambda heads: heads[0]), torch.arange(7)[None]
    torch.testing.assert_close(new(ids), model(ids))


def test_explorer_says_what_it_draws():
    figure, sentence, table = ch07.cache_explorer(32, 4, 32, 32768, 16)
    assert "128 KiB for each token, 4.00 GiB" in sentence and "without sharing 16.00 GiB" in sentence
    sizes = dict(zip(table["model"], table["GiB"]))
    assert sizes["yours"] == sizes["Mistral 7B"] == 4.0 and sizes["Llama 2 7B"] == 16.0
    figure, sentence, _ = ch07.cache_explorer(16, 128, 8, 2048, 4)
    assert "on 1 key/value head," in sentence and "smallest" in figure.axes[0].get_title()


def test_sharing_picture_has_a_box_for_every_head():
    figure = ch07.sharing_picture(8, (8, 2, 1))
    assert [len(ax.patches) for ax in figure.axes] == [16, 10, 9]
    assert "4 share one" in figure.axes[1].get_title()
