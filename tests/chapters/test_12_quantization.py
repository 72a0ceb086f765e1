"""Chapter 12: its records are sound, its drafts agree with the library, its claims hold."""

import json

import pytest
import story
import torch

import minimistral as mm
from minimistral.course import judge, verify
from minimistral.course.chapters import ch12_quantization as ch12
from minimistral.course.records.ch12 import EXERCISES
from minimistral.quantize import dequantize, quantize

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


def drafts(*wanted: str) -> dict:
    return story.drafts(12, *wanted, torch=torch, mm=mm)


def small_model():
    torch.manual_seed(0)
    return mm.Transformer(mm.ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
                                         hidden_dim=64, vocab_size=50)).eval()


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("quantize", lambda weight, bits, group=None: weight, "tuple of 2"),
        ("quantize", lambda weight, bits, group=None: quantize(weight * 2, bits, group), "xpected"),
        ("pack", lambda numbers: numbers, "shape"),
        ("unpack", lambda packed: packed[:, :0], "shape"),
        ("affine", lambda weight, bits: (weight, weight, weight), "xpected"),
        ("stored_bytes", lambda shape, bits, group, scale_bits: None, "empty"),
        ("late_product", lambda x, packed, scales: x, "shape"),
        ("round_trip", lambda weight, bits, group: weight, "xpected"),
        ("best_clip", lambda weight, bits, shares: weight[:, 0], "xpected"),
        ("with_bits", lambda model, bits_of: None, "empty"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


# ---------------------------------------------------------------- drafts and helpers


def test_the_draft_agrees_with_the_library_but_for_the_scales_rounding():
    own = drafts("there_and_back")["there_and_back"]
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    for bits in (8, 4, 2):
        theirs = dequantize(*quantize(weight, bits))
        assert (own(weight, bits) - theirs).norm() < 0.05 * weight.norm()


def test_only_the_named_kinds_are_rounded_and_the_model_stays():
    model = small_model()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    new = ch12.rounded(model, 3, 32, ["w2", "output"])
    changed = {name for name, w in new.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == {"layers.0.feed_forward.w2.weight", "layers.1.feed_forward.w2.weight",
                       "output.weight"}
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert ch12.numbers_of(model, "w2") == 2 * 32 * 64


def test_fewer_bits_are_a_larger_error_and_groups_a_smaller_one():
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(2))
    errors = [ch12.relative_error(weight, bits) for bits in (8, 6, 4, 3, 2)]
    assert errors == sorted(errors)
    assert all(ch12.relative_error(weight, bits, 32) < ch12.relative_error(weight, bits)
               for bits in (8, 4, 2))


def test_a_squeezed_cache_still_has_its_positions_and_nearly_its_numbers():
    model, ids = small_model(), torch.arange(20)[None]
    cache = mm.KVCache(model.config, max_length=30)
    model(ids, cache)
    keys, positions = cache.layers[0].keys.clone(), cache.layers[0].positions.clone()
    ch12.squeeze_cache(cache, 8)
    assert torch.equal(cache.layers[0].positions, positions)
    assert 0 < (cache.layers[0].keys - keys).norm() < 0.01 * keys.norm()
    rows = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(3))
    plain = ch12.loss_with_cache(model, rows, 8, None)
    whole = torch.nn.functional.cross_entropy(model(rows[:, :-1])[:, 8:].flatten(0, 1),
                                              rows[:, 9:].flatten()).item()
    assert plain == pytest.approx(whole, rel=1e-5)
    assert ch12.loss_with_cache(model, rows, 8, 8) == pytest.approx(plain, rel=1e-2)


# ---------------------------------------------------------------- will it fit


def test_sizes_are_those_of_the_published_arithmetic():
    seven = mm.MODELS["mistral-7b-v0.2"]
    weights, cache = ch12.resident_gb(seven, 4.5, 8192)
    assert weights == pytest.approx(4.07, abs=0.01)
    assert cache == pytest.approx(8192 * 131072 / 1e9)
    assert ch12.resident_gb(mm.MODELS["mixtral-8x7b-v0.1"], 4.5, 1)[0] == pytest.approx(26.27, abs=0.01)
    assert ch12.read_gb(seven, 16) == pytest.approx(14.22, abs=0.01)
    assert ch12.read_gb(mm.MODELS["ministral-3-3b"], 16) == pytest.approx(6.86, abs=0.01)


def test_a_window_bounds_the_cache():
    config = mm.MODELS["mistral-7b-v0.1"]
    assert ch12.resident_gb(config, 4, 32768)[1] == ch12.resident_gb(config, 4, 4096)[1]


@pytest.mark.parametrize("device", ch12.DEVICES)
@pytest.mark.parametrize("bits", [16, 4.5, 2.5])
def test_the_explorer_says_who_fits(device, bits):
    figure, sentence, table = ch12.fit_explorer(device, bits, 8192)
    left = ch12.DEVICES[device][1]
    sizes = [a + b for a, b in zip(table["weights, GB"], table["cache, GB"])]
    assert [size <= left for size in sizes] == [said == "yes" for said in table["fits"]]
    assert f"{table['fits'].count('yes')} of 6 models fit" in sentence
    assert "none of them runs" in sentence or "at most" in sentence


# ---------------------------------------------------------------- claims


def test_the_recorded_run_has_its_provenance_and_every_sample():
    result = ch12.recorded()
    assert {"date", "command", "torch", "processor", "threads", "commit"} <= set(result["provenance"])
    runs = result["variants"]
    assert len(runs) == 5
    for run in runs.values():
        times = sorted(run["samples_ms"])
        assert len(times) >= 12 and times[0] <= run["median_ms"] <= times[-1]
    read = {name: run["bytes_read_per_token"] for name, run in runs.items()}
    assert read["float32"] == 2 * read["bfloat16"]
    assert 0.5 < read["8 bits, kernel"] / read["bfloat16"] < 0.51
    memory = result["memory"]
    if memory:                                            # one float32 tensor, and the file's pages
        above = memory["peak_bytes"] - memory["result_bytes"]
        assert above < 2 * memory["largest_float32_tensor_bytes"] + 60e6
        assert memory["peak_bytes"] < 0.8 * memory["float32_model_bytes"]


def test_results_are_not_written_by_hand():
    text = json.dumps(ch12.recorded())
    assert "samples_ms" in text and len(text) > 1000
