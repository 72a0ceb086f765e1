"""The numbers of a model: published totals, params.json in and out, refusals."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from minimistral.config import (
    MODELS, ModelConfig, MoEConfig, cache_bytes_per_token, count_parameters, weight_bytes)
from minimistral.model import Transformer

SMALL = dict(dim=24, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=40,
             vocab_size=61)

# Counted in the published checkpoints, not by our formula: name, total, active,
# KiB of bfloat16 cache per token.
PUBLISHED = [
    ("mistral-7b-v0.1", 7_241_732_096, None, 128),
    ("mistral-7b-v0.2", 7_241_732_096, None, 128),
    ("mistral-7b-v0.3", 7_248_023_552, None, 128),
    ("mixtral-8x7b-v0.1", 46_702_792_704, 12_879_925_248, 128),
    ("mixtral-8x22b-v0.1", 140_620_634_112, 39_152_031_744, 224),
    ("mixtral-8x22b-v0.3", 140_630_071_296, 39_161_468_928, 224),
    ("mistral-nemo-12b", 12_247_782_400, None, 160),
    ("ministral-8b-2410", 8_019_808_256, None, 144),
    ("mistral-small-2501", 23_572_403_200, None, 160),
    ("mistral-small-3.1", 23_572_403_200, None, 160),
    ("mistral-large-2", 122_610_069_504, None, 352),
    ("ministral-3-3b", 3_429_006_336, None, 104),
    ("ministral-3-8b", 8_489_553_920, None, 136),
    ("llama-2-7b", 6_738_415_616, None, 512),
    ("llama-2-13b", 13_015_864_320, None, 800),
    ("llama-2-70b", 68_976_648_192, None, 320),
]


@pytest.mark.parametrize("name, total, active, kib", PUBLISHED)
def test_published_totals(name, total, active, kib):
    assert count_parameters(MODELS[name]) == (total, active or total)
    assert weight_bytes(MODELS[name]) == 2 * total
    assert weight_bytes(MODELS[name], torch.float32) == 4 * total
    assert cache_bytes_per_token(MODELS[name]) == kib * 1024


def test_every_model_is_checked_against_its_published_total():
    assert [row[0] for row in PUBLISHED] == list(MODELS)


@pytest.mark.parametrize("changes", [
    {}, {"moe": MoEConfig(4, 2)}, {"tied_embeddings": True}, {"n_kv_heads": 1}])
def test_the_formula_counts_what_is_built(changes):
    config = ModelConfig(**SMALL | changes)
    built = sum(parameter.numel() for parameter in Transformer(config).parameters())
    assert count_parameters(config).total == built


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "mixtral-8x7b-v0.1",
                                  "ministral-8b-2410"])
def test_the_formula_counts_the_real_ones(name):
    with torch.device("meta"):
        model = Transformer(MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == count_parameters(MODELS[name])[0]


@pytest.mark.parametrize("name, reason", [
    ("ministral-3-3b", "YaRN"), ("ministral-3-8b", "YaRN"), ("llama-2-7b", "Llama 2"),
    ("llama-2-13b", "Llama 2"), ("llama-2-70b", "Llama 2")])
def test_models_for_arithmetic_alone_say_why(name, reason):
    with pytest.raises(ValueError, match=f"arithmetic only.*{reason}"):
        Transformer(MODELS[name])


def test_windows_of_the_layers():
    assert [ModelConfig(**SMALL).window(i) for i in range(2)] == [None, None]
    assert [ModelConfig(**SMALL, sliding_window=3).window(i) for i in range(2)] == [3, 3]
    tiled = ModelConfig(**SMALL, sliding_window=[None, 5])
    assert [tiled.window(i) for i in range(4)] == [None, 5, None, 5]
    ragged = MODELS["ministral-8b-2410"]
    assert [ragged.window(i) for i in (0, 1, 3, 4, 35)] == [None, 32768, 32768, None, 32768]


def test_a_configuration_is_frozen_and_hashable():
    config = ModelConfig(**SMALL, sliding_window=[None, 5])
    with pytest.raises(FrozenInstanceError):
        config.dim = 1
    assert hash(config) == hash(replace(config))


# ------------------------------------------------------------ params.json


@pytest.mark.parametrize("name", MODELS)
def test_params_json_round_trip(name, tmp_path):
    config = MODELS[name]
    text = config.to_json(tmp_path / "params.json")
    for source in (text, json.loads(text), tmp_path / "params.json",
                   str(tmp_path / "params.json")):
        assert ModelConfig.from_json(source) == config
    assert ModelConfig.from_json(text).to_json() == text


def params(**changes):
    return {name: value for name, value in (SMALL | changes).items() if value != "gone"}


@pytest.mark.parametrize("changes, theta", [
    ({}, 1e6), ({"sliding_window": 8}, 1e4), ({"sliding_window": [None, 8]}, 1e4),
    ({"sliding_window": None}, 1e6), ({"rope_theta": 5e4}, 5e4),
    ({"rope_theta": 5e4, "sliding_window": 8}, 5e4)])
def test_theta_that_a_file_leaves_out(changes, theta):
    assert ModelConfig.from_json(params(**changes)).rope_theta == theta


@pytest.mark.parametrize("changes, window", [
    ({"sliding_window": "4096"}, 4096), ({"_sliding_window": 9}, 9),
    ({"sliding_window": 8, "_sliding_window": 8}, 8), ({"sliding_window": [None, "8"]}, (None, 8)),
    ({"sliding_window": None, "_sliding_window": [None, 4]}, (None, 4))])
def test_spellings_of_the_window(changes, window):
    assert ModelConfig.from_json(params(**changes)).sliding_window == window


def test_what_older_files_leave_out_or_add():
    config = ModelConfig.from_json(params(n_kv_heads="gone", head_dim="gone", max_batch_size=4,
                                          model_type="transformer", yarn=None))
    assert (config.n_kv_heads, config.head_dim, config.norm_eps) == (4, 6, 1e-5)
    config = ModelConfig.from_json(params(moe={"num_experts": 8, "num_experts_per_tok": 2}))
    assert config.moe == MoEConfig(8, 2)


@pytest.mark.parametrize("key", ["yarn", "llama_4_scaling", "q_lora_rank", "kv_lora_rank",
                                 "v_head_dim", "vision_encoder", "lora"])
def test_other_mathematics_is_refused(key):
    with pytest.raises(ValueError, match=f"{key}.*does not build"):
        ModelConfig.from_json(params(**{key: {"rank": 8}}))


@pytest.mark.parametrize("changes, match", [
    ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1}}, "shared"),
    ({"moe": {"num_experts": 8}}, "num_experts_per_tok"),
    ({"wobble": 3}, "unknown keys.*wobble"),
    ({"dim": "gone", "vocab_size": "gone"}, r"lacks \['dim', 'vocab_size'\]"),
    ({"sliding_window": "wide"}, "sliding_window='wide'"),
])
def test_other_params_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_json(params(**changes))


@pytest.mark.parametrize("source, match", [
    ("{", "the given text is not JSON"), ({}, "lacks"), ("{}", "lacks")])
def test_text_that_is_no_params_json(source, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_json(source)


def test_a_file_that_is_no_params_json(tmp_path):
    for content, match in [(b"[1, 2]", "list"), (b"\xff\xfe", "is not JSON"), (b"", "not JSON")]:
        (tmp_path / "params.json").write_bytes(content)
        with pytest.raises(ValueError, match=match):
            ModelConfig.from_json(tmp_path / "params.json")


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize("changes, match", [
    ({"dim": 0}, "dim=0 must be a whole number from 1 up"),
    ({"n_layers": 2.5}, "n_layers=2.5"), ({"vocab_size": True}, "vocab_size=True"),
    ({"hidden_dim": "40"}, "hidden_dim='40'"),
    ({"n_heads": 2, "n_kv_heads": 4}, "n_heads=2.*n_kv_heads=4: did you swap"),
    ({"n_heads": 6, "n_kv_heads": 4}, "n_heads=6.*n_kv_heads=4.*same number"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"norm_eps": 0}, "norm_eps=0"), ({"rope_theta": -1.0}, "rope_theta=-1.0"),
    ({"sliding_window": 0}, "sliding_window=0.*at least 1"),
    ({"sliding_window": (None, 2, 3)}, "3 entries.*n_layers=4"),
    ({"sliding_window": ()}, "0 entries"),
    ({"sliding_window": (None, -3)}, "sliding_window=-3"),
])
def test_numbers_that_no_model_can_have(changes, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig(**SMALL | changes)


def test_experts_swapped():
    with pytest.raises(ValueError, match="num_experts_per_tok=8.*num_experts=2.*swap"):
        MoEConfig(num_experts=2, num_experts_per_tok=8)
    with pytest.raises(ValueError, match="num_experts_per_tok=0"):
        MoEConfig(4, 0)


@pytest.mark.parametrize("change, words", [
    ({"moe": 4}, "moe=4"),
    ({"moe": {"num_experts": 8}}, "num_experts_per_tok alone"),
    ({"n_heads": 0}, "n_heads=0"),
    ({"dim": "wide"}, "dim='wide'"),
])
def test_params_with_the_wrong_kind_of_value_are_refused_by_name(change, words):
    params = {"dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 40, "vocab_size": 97}
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_json(params | change)
