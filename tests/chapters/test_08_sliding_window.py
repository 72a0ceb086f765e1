"""Chapter 8: its records are sound, its drafts agree with the library, its claims hold."""

import json
from pathlib import Path

import pytest
import story
import torch
import torch.nn.functional as F

import minimistral as mm
from minimistral.attention import attend, may_attend, within_window
from minimistral.cache import KVCache, LayerCache
from minimistral.course import judge, verify
from minimistral.course.chapters import ch08_sliding_window as ch08
from minimistral.course.records.ch08 import EXERCISES

SOURCE = Path(__file__).parents[2] / "notebooks" / "src" / "08_sliding_window.py"
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


def drafts(*wanted: str) -> dict:
    from minimistral import attention as library

    return story.drafts(8, *wanted, torch=torch, library=library,
                        table=F.scaled_dot_product_attention)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("within_window", lambda query_positions, key_positions, window: 3, "xpected"),
        ("write", lambda self, k, v, positions: self.keys.zero_(), "xpected"),
        ("update", lambda self, k, v, positions: (k, v), "unpack"),
        ("attended_pairs", lambda length, window: 0, "xpected"),
        ("ring_positions", lambda length, window: torch.zeros(window), "xpected"),
        ("look_into_ring", lambda q, ring, position, window: q, "xpected"),
        ("look_in_blocks", lambda q, k, v, window: v, "xpected"),
        ("pattern_bytes", lambda config, length, number_bytes: 1, "xpected"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


JOIN = "seen = [torch.cat(x, 1) for x in zip((self.keys, self.values, self.positions), (k, v, positions))]\n"


@pytest.mark.parametrize(
    ("branch", "named"),
    [
        (JOIN + "self.write(k, v, positions)\nreturn seen", None),
        (JOIN + "return seen", "not written"),
        ("self.write(k, v, positions)\n" + JOIN + "return seen", "written, then joined"),
        (JOIN, "written first"),
        ("self.write(k, v, positions)\nreturn k, v, positions", "the chunk alone"),
        (JOIN + "self.write(k, v, positions)\nreturn [x[:, -self.used:] for x in seen]",
         "cut to the size of the ring"),
    ],
)
def test_mistakes_in_the_chapters_stub_of_update_are_named(branch, named):
    """Around the learner's lines stands the stub, which treats single tokens already."""
    text = SOURCE.read_text(encoding="utf-8")
    stub = text[text.index("def update(self, k, v, positions):"):text.index('check("update"')]
    names = {"torch": torch}
    exec(stub.replace("...\n    self", branch.replace("\n", "\n" + 8 * " ") + "\n    self"), names)
    result = judge(BY_NAME["update"], names["update"])
    assert result.passed if named is None else result.matched == named


def test_blocks_that_fetch_everything_are_refused_however_they_hide_it():
    def one_table(q, k, v, window):
        p = torch.arange(q.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend(p, p, window))

    assert judge(BY_NAME["look_in_blocks"], one_table).matched == "one table of all scores"


# ---------------------------------------------------------------- window and reach


def test_a_query_sees_exactly_w_keys_its_own_included():
    p = torch.arange(17)
    mask = may_attend(p, p, 5)
    assert mask.sum(-1).tolist() == [min(t + 1, 5) for t in range(17)]
    assert not within_window(p, p, 5)[7, 2] and within_window(p, p, 5)[7, 3]


@pytest.mark.parametrize(("layers", "window"), [(1, 4), (3, 4), (4, 3), (5, 6), (3, 1)])
def test_reach_is_layers_times_window_less_one(layers, window):
    cells = ch08.moved_cells(ch08.random_model(layers, window), 40, moved=2)
    places = cells[-1].nonzero()[:, 0]
    assert places.min() == 2 and places.max() == 2 + layers * (window - 1)


def test_pairs_by_counting_and_the_published_ratios():
    p = torch.arange(23)
    for window in (1, 5, 23, 40):
        assert ch08.pairs(23, window) == may_attend(p, p, window).sum()
    assert round(ch08.pairs(16384) / ch08.pairs(16384, 4096), 2) == 2.29
    config = mm.MODELS["mistral-7b-v0.1"]
    full, few = (sum(ch08.prefill_operations(config, 16384, w)) for w in (None, 4096))
    assert round(full / few, 2) == 1.15


# ---------------------------------------------------------------- ring and cache


@pytest.mark.parametrize("chunks", [(1,) * 17, (3, 1, 7, 6), (17,), (5, 12)])
def test_any_chunks_through_the_ring_equal_one_pass(chunks):
    torch.manual_seed(0)
    model = mm.Transformer(mm.ModelConfig(dim=20, n_layers=3, n_heads=6, n_kv_heads=3, head_dim=4,
                                          hidden_dim=32, vocab_size=50, sliding_window=5))
    ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, 2)
    with torch.no_grad():
        parts = [model(part, cache) for part in ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-5)
    assert cache.layers[0].positions.tolist() == [[15, 16, 12, 13, 14]] * 2


def test_a_jumped_cache_is_as_large_and_as_full_as_a_read_one():
    model = ch08.random_model(2, 4).float()
    jumped, read = ch08.cache_at(model, 11), KVCache(model.config)
    model(torch.ones(1, 11, dtype=torch.int64), read)
    for a, b in zip(jumped.layers, read.layers):
        assert torch.equal(a.positions, b.positions)
    assert jumped.nbytes == read.nbytes and torch.equal(jumped.length, read.length)
    wide = ch08.cache_at(ch08.random_model(2, None).float(), 100)
    assert wide.layers[0].positions[0, :100].tolist() == list(range(100))


def test_update_must_read_before_it_writes():
    ring, (k, v, q) = LayerCache((1, 4, 2, 3), True, None, torch.float32), random(3, 1, 9, 2, 3)
    p = torch.arange(9)[None]
    looks = []
    for part in (slice(0, 3), slice(3, 9)):
        keys, values, held = ring.update(k[:, part], v[:, part], p[:, part])
        looks.append(attend(q[:, part], keys, values, may_attend(p[:, part], held, 4)))
    torch.testing.assert_close(torch.cat(looks, 1), attend(q, k, v, may_attend(p, p, 4)))


# ---------------------------------------------------------------- the bug hunt


def test_the_printed_sample_leaks_and_its_repairs_do_not():
    own = drafts("printed_look", "repaired_look", "block_look")
    q, k, v = random(3, 2, 4, 17, 6)
    mask = may_attend(torch.arange(17), torch.arange(17), 5)
    right = attend(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)
    torch.testing.assert_close(own["repaired_look"](q, k, v, 5), right)
    torch.testing.assert_close(own["block_look"](q, k, v, 5), right)
    moved = k.clone()
    moved[..., 9, :] += 1
    def changed(look):
        return (look(q, k, v) != look(q, moved, v)).any(-1).any(0).any(0).nonzero()[:, 0].tolist()
    assert changed(lambda q, k, v: own["printed_look"](q, k, v, 5, 1)) == list(range(4, 15))
    assert changed(lambda q, k, v: own["repaired_look"](q, k, v, 5)) == list(range(9, 14))


def test_the_second_text_token_by_token_never_sees_the_first():
    for window in (3, 5, 8):
        _, sentence, table = ch08.ring_explorer(window, 2 * window + 1, 1, 2)
        assert "sees the positions 0, 1." in sentence and len(table["holds"]) == window


def test_a_chunk_sees_the_text_before_unless_the_cache_was_reset():
    model = ch08.random_model(2, 5).float()
    first, second = torch.arange(12)[None], torch.arange(20, 28)[None]
    with torch.no_grad():
        alone, cache = model(second), KVCache(model.config)
        model(first, cache)
        cache.length.zero_()                                 # a new text, nothing wiped
        assert not torch.allclose(model(second, cache), alone, atol=1e-3)
        cache.reset()
        torch.testing.assert_close(model(second, cache), alone, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- claims


def test_which_configurations_have_a_window():
    ours = {n: c for n, c in mm.MODELS.items() if not n.startswith("llama")}
    assert [n for n, c in ours.items() if c.sliding_window] == ["mistral-7b-v0.1", "ministral-8b-2410"]


def test_recorded_speed_has_samples_provenance_and_reaches_its_goals():
    found = json.loads(ch08.SPEED.read_text(encoding="utf-8"))
    assert {"date", "command", "torch", "processor"} <= set(found["provenance"])
    rows = {(r["model"], r["position"]): r for r in found["decoding"]}
    assert all(len(r["samples_ms"]) >= 12 for r in rows.values())
    near, far = rows["window", 1024], rows["window", 65536]
    assert near["cache_bytes"] == far["cache_bytes"] == 256 * 2048
    assert far["median_ms"] < 1.05 * near["median_ms"]
    assert rows["no window", 8192]["median_ms"] > 1.2 * rows["no window", 1024]["median_ms"]
    prefill = found["prefill"]
    assert prefill["16384 in chunks"]["median_s"] < 2.2 * prefill["8192 in chunks"]["median_s"]
    memory = {(r["model"], r["tokens"]): r["peak_bytes"]
              for r in found["memory"] if r["chunk"] != "at once"}
    assert memory["window", 65536] < 1.05 * memory["window", 1024]


def test_recorded_rungs_have_their_provenance():
    runs = json.loads(ch08.RUNGS.read_text(encoding="utf-8"))["runs"]
    assert {(r["window"], r["steps"]) for r in runs} >= {(None, 120), (16, 120), (4, 120), (None, 480), (16, 480)}
    for run in runs:
        assert {"date", "command", "torch"} <= set(run["provenance"]) and run["nats_per_byte"] > run["floor"]


def test_the_chapters_ladder_model_is_the_one_of_the_module():
    text, config = SOURCE.read_text(encoding="utf-8"), ch08.ladder_config(16)
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim"):
        assert f"{name}={getattr(config, name)}" in text
    assert ch08.ladder_model().config == config


# ---------------------------------------------------------------- helpers


def test_another_window_leaves_the_model_alone():
    model = ch08.random_model(2, None)
    other = ch08.with_window(model.float(), 3)
    assert model.config.sliding_window is None and other.config.sliding_window == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_explorers_say_what_they_draw():
    _, sentence, table = ch08.reach_explorer(3, 5)
    assert "reaches position 12;" in sentence and table["last position that changed"] == [0, 4, 8, 12]
    figure, sentence, table = ch08.ring_explorer(5, 11, 1, 0)
    assert table["holds"] == [10, 11, 7, 8, 9] and "7, 8, 9, 10, 11" in sentence
    figure, sentence, _ = ch08.ring_explorer(4, 0, 0, 0)
    assert "Empty" in figure.axes[0].get_title() or "empty" in figure.axes[0].get_title()
