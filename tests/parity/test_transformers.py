"""Our logits, tokens and files against transformers, in float32 on the CPU.

The oracle's own traps are kept out of the way: its dynamic cache is wrong for a window
of 1, so that it is asked without a cache there, and always gets an attention mask.
"""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from oracles import TEXT, TOLERANCE, as_hf, random_config, unit_scale  # noqa: E402
from transformers import AutoModelForCausalLM                      # noqa: E402
from transformers.models.mixtral.modeling_mixtral import (         # noqa: E402
    load_balancing_loss_func)

from minimistral.cache import KVCache                              # noqa: E402
from minimistral.checkpoint import load_model, save_model          # noqa: E402
from minimistral.config import ModelConfig, MoEConfig              # noqa: E402
from minimistral.moe import balance_loss, record_routing           # noqa: E402

SEEDS = range(24)
PLAIN = ModelConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=12,
                    hidden_dim=56, vocab_size=128, rope_theta=12345.0, norm_eps=1e-5)


def texts(config, batch=2, length=TEXT, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=g)


def oracle_logits(oracle, ids):
    with torch.no_grad():
        return oracle(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def largest(a, b):
    return (a - b).abs().max().item()


def test_the_configurations_cover_what_they_must():
    configs = [random_config(seed) for seed in SEEDS]
    assert {c.sliding_window for c in configs} == {None, 1, 2, 7, 16, TEXT + 9}
    assert any(c.n_kv_heads == 1 for c in configs)
    assert any(c.n_kv_heads == c.n_heads for c in configs)
    assert any(1 < c.n_kv_heads < c.n_heads for c in configs)
    assert any(c.head_dim * c.n_heads != c.dim for c in configs)
    assert len({c.moe for c in configs}) >= 5
    assert any(c.moe and c.sliding_window for c in configs)
    assert len(set(configs)) == len(configs) >= 20


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_logits(seed, record_property):
    config = random_config(seed)
    model = unit_scale(config, seed)
    ids = texts(config, seed=seed)
    ours = model(ids)
    theirs = oracle_logits(as_hf(model), ids)
    assert 0.5 < theirs.std() < 2, "the tolerance is meant for logits of unit scale"
    record_property("largest_difference", largest(ours, theirs))
    assert largest(ours, theirs) < TOLERANCE
    # Our own ways agree with the oracle too: with a cache, by tokens and by chunks.
    for chunk in (1, 7, TEXT):
        cache = KVCache(config, batch_size=2)
        pieces = [model(piece, cache) for piece in ids.split(chunk, dim=1)]
        assert largest(torch.cat(pieces, dim=1), theirs) < TOLERANCE, chunk


@torch.no_grad()
@pytest.mark.parametrize("seed", [3, 4, 10])
def test_unequal_texts_in_a_batch(seed):
    config = random_config(seed)
    model = unit_scale(config, seed)
    ids = texts(config, batch=3)
    oracle = as_hf(model)
    lengths = [TEXT, 11, 1]
    positions = torch.arange(TEXT).expand(3, TEXT).clone()
    for row, length in enumerate(lengths):
        positions[row, length:] = -1
    for cache in (None, KVCache(config, batch_size=3)):
        ours = model(ids, cache, positions)
        for row, length in enumerate(lengths):
            theirs = oracle_logits(oracle, ids[row:row + 1, :length])
            assert largest(ours[row, :length], theirs[0]) < TOLERANCE


def greedy(model, oracle, prompt, steps):
    """Follow our model greedily with a cache; count the steps at which its token is not
    the oracle's best. Each must be one of the oracle's two best, closer than 1e-4; the
    text then goes on with the oracle's token. Returns (excused steps, steps)."""
    cache = KVCache(model.config)
    logits = model(prompt, cache)[0, -1]
    ids, excused = prompt, 0
    windowless = model.config.sliding_window is None
    past, new = None, prompt
    for _ in range(steps):
        told = oracle(new if windowless else ids, past_key_values=past,
                      attention_mask=torch.ones_like(ids), use_cache=windowless)
        past = told.past_key_values if windowless else None
        (best, second), (first, other) = told.logits[0, -1].topk(2)
        token = logits.argmax()
        if token != first:
            assert best - second < 1e-4 and token == other
            excused += 1
        new = first.view(1, 1)
        ids = torch.cat((ids, new), dim=1)
        logits = model(new, cache)[0, -1]
    return excused, steps


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 8, 9, 15])
def test_200_greedy_tokens(seed, record_property):
    config = random_config(seed)
    model = unit_scale(config, seed)
    excused, steps = greedy(model, as_hf(model), texts(config, batch=1, length=9), 200)
    record_property("excused_steps", f"{excused} of {steps}")
    print(f"seed {seed}: {excused} of {steps} steps were near ties")
    assert excused <= 0.01 * steps


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 8])
def test_greedy_tokens_of_both_generates(seed):
    """Whole programs against each other: our generate, their generate."""
    generate = pytest.importorskip("minimistral.generate").generate
    config = random_config(seed)
    model = unit_scale(config, seed)
    prompt = texts(config, batch=1, length=9)
    theirs = as_hf(model).generate(prompt, attention_mask=torch.ones_like(prompt),
                                   do_sample=False, max_new_tokens=30)
    assert generate(model, prompt[0].tolist(), 30) == theirs[0, 9:].tolist()


KINDS = {
    "dense": {},
    "window": {"sliding_window": 7},
    "ministral": {"sliding_window": (None, 7, 7, 7)},
    "mixtral": {"moe": MoEConfig(4, 2)},
    "windowed mixtral": {"moe": MoEConfig(8, 3), "sliding_window": 5},
    "tied": {"tied_embeddings": True},
}


def kind_of_model(kind):
    values = {f: getattr(PLAIN, f) for f in PLAIN.__dataclass_fields__}
    return unit_scale(ModelConfig(**values | KINDS[kind]), seed=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_we_write(tmp_path, kind):
    model = kind_of_model(kind)
    save_model(model, tmp_path, layout="hf", max_shard_bytes=30000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    oracle, told = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    ids = texts(model.config)
    assert largest(model(ids), oracle_logits(oracle, ids)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("shards", ["10GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_they_write(tmp_path, kind, shards):
    model = kind_of_model(kind)
    as_hf(model).save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shards == "10GB")
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    for (name, ours), back in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(ours, back), name


@torch.no_grad()
def test_config_json_of_transformers_4(tmp_path):
    """The older spellings: rope_theta outside rope_parameters, torch_dtype."""
    model = kind_of_model("window")
    as_hf(model).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values["torch_dtype"] = values.pop("dtype")
    file.write_text(json.dumps(values), encoding="utf-8")
    assert load_model(tmp_path).config == model.config


@torch.no_grad()
def test_without_the_permutation_the_logits_are_far_off():
    """The test above would notice: the permutation matters and never crashes."""
    model = kind_of_model("dense")
    oracle = as_hf(model)
    for layer, ours in zip(oracle.model.layers, model.layers):
        layer.self_attn.q_proj.weight.copy_(ours.attention.wq.weight)
        layer.self_attn.k_proj.weight.copy_(ours.attention.wk.weight)
    ids = texts(model.config)
    assert largest(model(ids), oracle_logits(oracle, ids)) > 0.1


@pytest.mark.parametrize("experts, k", [(4, 2), (8, 2), (8, 3), (3, 1), (4, 4)])
def test_pooled_balance_loss(experts, k):
    torch.manual_seed(experts + k)
    logits = [2 * torch.randn(50, experts) for _ in range(3)]
    theirs = load_balancing_loss_func(tuple(logits), experts, k)
    torch.testing.assert_close(balance_loss([torch.cat(logits)], k), theirs,
                               atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_balance_loss_of_a_whole_model():
    model = kind_of_model("mixtral")
    ids = texts(model.config)
    with record_routing(model) as routing:
        model(ids)
    told = as_hf(model)(ids, attention_mask=torch.ones_like(ids),
                        output_router_logits=True, use_cache=False)
    for ours, theirs in zip(routing, told.router_logits, strict=True):
        assert largest(ours, theirs) < TOLERANCE
    theirs = load_balancing_loss_func(told.router_logits, 4, 2)
    assert abs(balance_loss([torch.cat(routing)], 2) - theirs) < 1e-5
    assert balance_loss(routing, 2) > theirs              # pooling hides an imbalance
