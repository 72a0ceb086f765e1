"""The parity debugger finds the first module that differs, and says nothing where none does."""

import copy
from pathlib import Path

import pytest
import torch

import minimistral as mm
from minimistral.checkpoint import permute_rotary
from minimistral.course import swap
from minimistral.parity import compare, first_difference, record

CONFIG = mm.ModelConfig(dim=20, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=6, hidden_dim=28,
                        vocab_size=50, sliding_window=4)
IDS = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(1))


def make(**changes):
    torch.manual_seed(0)
    return mm.Transformer(mm.ModelConfig(**{**{f: getattr(CONFIG, f) for f in (
        "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size",
        "sliding_window")}, **changes}))


@pytest.mark.parametrize("moe", [None, mm.MoEConfig(5, 2)])
def test_equal_models_have_no_difference(moe):
    model = make(moe=moe)
    assert first_difference(model, copy.deepcopy(model), IDS) is None
    assert first_difference(model, record(model, IDS), IDS) is None
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", [
    "tok_embeddings", "layers.0.attention_norm", "layers.1.attention.wq",
    "layers.1.attention.wv", "layers.2.feed_forward.w2", "norm"])
def test_one_changed_weight_is_named(name):
    model = make()
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.get_submodule(name).weight
        weight[IDS[0, 0] if name == "tok_embeddings" else 0] += 0.5
    found = first_difference(model, other, IDS)
    assert found.name == name and found.weights == (f"{name}.weight",)
    assert found.largest > 1e-3 and name in str(found) and "expected" in str(found)


def test_the_matrix_before_the_logits_is_named():
    model = make()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.output.weight[3] += 1
    found = first_difference(model, other, IDS)
    assert found.name == "output" and found.index[-1] == 3


def test_a_forgotten_permutation_is_found_at_its_matrix():
    model = make()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[1].attention.wk.weight.copy_(
            permute_rotary(model.layers[1].attention.wk.weight, 2))
    assert first_difference(model, other, IDS).name == "layers.1.attention.wk"


def test_code_that_differs_is_found_in_a_recording():
    model = make()
    with swap("attention.within_window", lambda query_positions, key_positions, window: (
            query_positions[..., :, None] - key_positions[..., None, :] <= window)):
        wrong = record(model, IDS)
    found = first_difference(model, wrong, IDS)
    assert found.name == "layers.0.attention.wo"       # the first thing after the look
    assert found.index[1] >= CONFIG.sliding_window and found.weights == ()


def test_a_router_that_chooses_others_is_named_before_its_experts():
    model = make(moe=mm.MoEConfig(5, 2))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].feed_forward.gate.weight.neg_()
    assert first_difference(model, other, IDS).name == "layers.0.feed_forward.gate"


def test_a_recording_may_hold_some_names_only_and_other_shapes():
    model = make()
    some = {name: x for name, x in record(model, IDS).items() if name in ("layers.1", "norm")}
    assert first_difference(model, some, IDS) is None
    some["layers.1"] = some["layers.1"][:, :5]
    assert "(2, 11, 20), expected (2, 5, 20)" in str(first_difference(model, some, IDS))
    with pytest.raises(ValueError, match="nothing to compare"):
        first_difference(model, {"model.layers.1": some["norm"]}, IDS)


def test_not_a_number_and_infinity():
    a = torch.tensor([[1.0, torch.inf], [3.0, 4.0]])
    assert compare("x", a, a.clone(), 1e-4) is None
    b = a.clone()
    b[1, 0] = torch.nan
    assert compare("x", a, b, 1e-4).index == (1, 0)
    assert compare("x", b, a, 1e-4).largest == torch.inf
    assert compare("x", a + 3e-4, a, 1e-4) is None and compare("x", a + 5e-4, a, 1e-4)


def test_it_fits_on_two_pages():
    text = Path(mm.__file__).with_name("parity.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and max(map(len, text.splitlines())) <= 100
