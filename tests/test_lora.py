"""Adapters: nothing changes at first, only they learn, merged is the same, they can be swapped."""

import copy
import json

import pytest
import torch
from torch import nn

import minimistral as mm
from minimistral.lora import (
    LoRALinear,
    adapted,
    add_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
)

IDS = torch.tensor([[1, 5, 9, 3, 3, 7, 2], [4, 4, 8, 1, 0, 6, 5]])


@pytest.fixture(params=[None, mm.MoEConfig(3, 2)], ids=["dense", "mixture"])
def model(request):
    torch.manual_seed(0)
    model = mm.Transformer(mm.ModelConfig(dim=20, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=8, hidden_dim=28,
                                          vocab_size=11, moe=request.param))
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(10)                    # far from the small start of training
    return model


def disturb(model):
    """Adapters as training leaves them: no longer zero."""
    generator = torch.Generator().manual_seed(1)
    for adapter in adapted(model).values():
        adapter.up.data.normal_(std=0.3, generator=generator)
    return model


def test_an_adapter_is_what_its_formula_says():
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=False)
    adapter = LoRALinear(base, rank=2, alpha=7.0)
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(adapter(x), base(x))
    adapter.up.data.normal_()
    wanted = x @ (base.weight + 7.0 / 2 * adapter.up @ adapter.down).T
    torch.testing.assert_close(adapter(x), wanted)


def test_at_first_nothing_is_changed_and_only_adapters_learn(model):
    before = model(IDS)
    add_lora(model, rank=2, alpha=4.0, names=("wq", "wv", "w2"))
    assert torch.equal(model(IDS), before)
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning == {f"{name}.{part}" for name in adapted(model) for part in ("down", "up")}
    experts = 3 if model.config.moe else 1
    assert len(adapted(model)) == 2 * (2 + experts)
    model(IDS).square().sum().backward()
    assert all((weight.grad is None) == (name not in learning) for name, weight in model.named_parameters())


def test_merged_is_the_same_function_and_happens_once(model):
    disturb(add_lora(model, rank=3, alpha=2.0, names=("wk", "wo", "w1", "w3")))
    with torch.no_grad():
        beside = model(IDS)
        assert merge_lora(model) is model and not adapted(model)
        torch.testing.assert_close(model(IDS), beside, rtol=1e-4, atol=1e-5)   # sums in another order
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)


def test_taken_off_the_model_is_what_it_was(model):
    before, names = model(IDS), list(model.state_dict())
    remove_lora(disturb(add_lora(model)))
    assert torch.equal(model(IDS), before) and list(model.state_dict()) == names


def test_adapters_are_saved_loaded_and_swapped(model, tmp_path):
    plain = copy.deepcopy(model)
    first = disturb(add_lora(copy.deepcopy(plain), rank=2, alpha=6.0))
    second = disturb(add_lora(copy.deepcopy(plain), rank=3, alpha=1.0, names=("wq", "w2")))
    save_adapter(first, tmp_path / "first")
    save_adapter(second, tmp_path / "second")
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == ["adapter.json", "adapter.safetensors"]
    for folder, wanted in (("first", first), ("second", second), ("first", first)):
        load_adapter(plain, tmp_path / folder)
        assert torch.equal(plain(IDS), wanted(IDS)), folder
    assert torch.equal(remove_lora(plain)(IDS), remove_lora(first)(IDS))


def test_an_adapter_of_another_shape_changes_nothing(model, tmp_path):
    save_adapter(add_lora(copy.deepcopy(model), rank=2), tmp_path / "a")
    torch.manual_seed(1)
    other = mm.Transformer(mm.ModelConfig(dim=24, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=8, hidden_dim=28,
                                          vocab_size=11))
    before = other(IDS)
    with pytest.raises(ValueError, match=r"adapter.safetensors: tensor .*wq.down.* has shape \(2, 20\)"):
        load_adapter(other, tmp_path / "a")
    assert torch.equal(other(IDS), before) and not adapted(other)
    about = json.loads((tmp_path / "a" / "adapter.json").read_text(encoding="utf-8"))
    (tmp_path / "a" / "adapter.json").write_text(json.dumps({**about, "names": ["wq"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="has no place"):
        load_adapter(model, tmp_path / "a")
    assert not adapted(model)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"rank": 0}, "rank=0 must be from 1 to 8"),
        ({"rank": 9}, "rank=9 must be from 1 to 8"),
        ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"names": ("wq", "query")}, r"called \['query'\]"),
        ({"names": ("output",)}, r"called \['output'\]"),
    ],
)
def test_wrong_choices_are_named(model, choice, said):
    with pytest.raises(ValueError, match=said):
        add_lora(model, **choice)
    assert not adapted(model)
    add_lora(model, rank=1)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model)


def test_an_adapter_beside_bfloat16(model):
    model = add_lora(model.to(torch.bfloat16), rank=2)
    assert model(IDS).dtype == torch.float32
    assert all(adapter.down.dtype == torch.float32 for adapter in adapted(model).values())
    assert all(adapter(torch.zeros(1, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16
               for name, adapter in adapted(model).items() if name.endswith("wq"))


def test_a_folder_with_an_adapter_loads_like_any_model(tmp_path):
    base = mm.load_model("tales-dense")
    tuned = disturb(add_lora(mm.load_model("tales-dense"), rank=2))
    ids = torch.arange(3, 12)[None]
    save_adapter(tuned, tmp_path / "named", "tales-dense")
    loaded = mm.load_model(tmp_path / "named")
    assert not adapted(loaded) and loaded.config == base.config
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), tuned(ids), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(loaded(ids), base(ids), atol=1e-2)
    assert mm.load_model(tmp_path / "named", dtype=torch.bfloat16).output.weight.dtype == torch.bfloat16
    save_adapter(tuned, tmp_path / "nameless")
    with pytest.raises(ValueError, match="does not say for which model"):
        mm.load_model(tmp_path / "nameless")
