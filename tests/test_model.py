"""The properties that make a Mistral model one: what may influence what, positions,
shared heads, padding, and a cache that changes nothing."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimistral import attention
from minimistral.attention import (
    attend, causal, fast_attend, may_attend, plain_attend, repeat_heads, within_window)
from minimistral.cache import FIRST_SLOTS, KVCache
from minimistral.config import ModelConfig, MoEConfig
from minimistral.layers import RMSNorm, SwiGLU
from minimistral.model import Transformer
from minimistral.moe import MoE, balance_loss, record_routing, route
from minimistral.rope import rotary_angles, rotate

SMALL = ModelConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=40,
                    vocab_size=61)
CONFIGS = {
    "full": SMALL,
    "window 1": replace(SMALL, sliding_window=1),
    "window 2": replace(SMALL, sliding_window=2),
    "window 5": replace(SMALL, sliding_window=5),
    "window beyond the text": replace(SMALL, sliding_window=100),
    "pattern": replace(SMALL, sliding_window=(None, 3)),
    "mixture": replace(SMALL, moe=MoEConfig(4, 2), sliding_window=4),
    "tied": replace(SMALL, tied_embeddings=True),
}


def make(config, seed=0):
    """A model with large weights, so that every part of it is felt in the logits."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=1 / math.sqrt(weight.shape[1]))
        model.tok_embeddings.weight.normal_()
    return model


def text(length=21, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, (batch, length), generator=g)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


# ------------------------------------------------------------ masks


@pytest.mark.parametrize("window", [None, 1, 2, 5, 50])
def test_the_mask_by_its_definition(window):
    positions = torch.tensor([[0, 1, 2, 3, -1, 7, 9], [4, 5, -1, -1, 6, 11, 12]])
    mask = may_attend(positions, positions, window)
    for b in range(2):
        for i, query in enumerate(positions[b].tolist()):
            for j, key in enumerate(positions[b].tolist()):
                real = query >= 0 and key >= 0
                near = window is None or query - key < window
                assert mask[b, i, j] == (real and key <= query and near)


def test_the_two_rules_alone():
    steps = torch.arange(4)
    assert causal(steps, steps).int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert (causal(steps, steps) & within_window(steps, steps, 2)).int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert causal(torch.tensor([5]), torch.tensor([4, 5, 6])).tolist() == [[True, True, False]]


# ------------------------------------------------------------ attention


def qkv(heads=4, kv_heads=2, queries=5, keys=7, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(2, queries, heads, 8, dtype=torch.float64),
            torch.randn(2, keys, kv_heads, 8, dtype=torch.float64),
            torch.randn(2, keys, kv_heads, 8, dtype=torch.float64))


def test_attend_by_hand():
    q, k, v = qkv(kv_heads=4)
    mask = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    out = attend(q, k, v, mask)
    for b, t, h in [(0, 0, 0), (1, 4, 3), (0, 3, 2)]:
        seen = mask[b, t]
        scores = k[b, seen, h] @ q[b, t, h] / math.sqrt(8)
        torch.testing.assert_close(out[b, t, h], scores.softmax(0) @ v[b, seen, h],
                                   atol=1e-6, rtol=1e-6)     # the softmax is in float32


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_shared_heads_are_repeated_heads(heads, kv_heads):
    q, k, v = (x.float() for x in qkv(heads, kv_heads))
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    n = heads // kv_heads
    whole = attend(q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2), mask)
    close(plain_attend(q, k, v, mask), whole)
    close(fast_attend(q, k, v, mask), whole)
    one = torch.stack((mask[:1], torch.zeros_like(mask[:1])))       # the second sees nothing
    close(fast_attend(q[:, :1], k, v, one), plain_attend(q[:, :1], k, v, one))
    close(fast_attend(q[:, :1], k, v, mask[:1]), whole[:, :1])
    for head in range(heads):
        assert torch.equal(repeat_heads(k, n)[:, :, head], k[:, :, head // n])


@pytest.mark.parametrize("look", [plain_attend, fast_attend])
def test_who_sees_nothing_gets_zeros_and_finite_gradients(look):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    mask = torch.ones(2, 5, 7, dtype=torch.bool)
    mask[0, 2] = False
    mask[1] = False
    out = look(q, k, v, mask)
    assert out[0, 2].abs().max() == 0 and out[1].abs().max() == 0
    assert out[0, 1].abs().max() > 0
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert q.grad[0, 2].abs().max() == 0 and k.grad[1].abs().max() == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_fast_and_the_plain_look_agree_in_a_model(kind, monkeypatch):
    model = make(CONFIGS[kind])
    fast = model(text())
    monkeypatch.setattr(attention, "FAST", False)
    close(model(text()), fast)


# ------------------------------------------------------------ what influences what


def influences(model, length, token, least=0.0):
    """Which outputs change by more than `least` when one token does: positions."""
    ids = text(length, batch=1)
    changed = ids.clone()
    changed[0, token] = (ids[0, token] + 1) % SMALL.vocab_size
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    return set(difference.gt(least).nonzero().flatten().tolist())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_past_never_sees_the_future(kind):
    model = make(CONFIGS[kind])
    # In a mixture a changed token may change experts; then the other tokens' products
    # have another shape, and PyTorch another order of sums: 1e-7. A leak would be 1e-1.
    least = 1e-5 if model.config.moe else 0.0
    for token in (0, 7, 15):
        assert min(influences(model, 16, token, least)) == token


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_reach_is_exactly_layers_times_window_less_one(layers, window):
    model = make(replace(SMALL, n_layers=layers, sliding_window=window))
    reach = layers * (window - 1)
    assert influences(model, 20, 5) == set(range(5, 5 + reach + 1))


def test_rows_of_a_batch_do_not_meet():
    model = make(SMALL)
    a, b = text(seed=1), text(seed=1)
    b[1] = text(seed=2)[1]
    assert torch.equal(model(a)[0], model(b)[0])


# ------------------------------------------------------------ positions


def test_rotation_depends_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)
    def score(query, key):
        turned = [rotate(x, *rotary_angles(torch.tensor([p]), 16, 1e4))
                  for x, p in ((q, query), (k, key))]
        return (turned[0] * turned[1]).sum().item()
    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(1009, 1004) == pytest.approx(score(5, 0), abs=1e-3)    # float32 angles
    assert abs(score(9, 4) - score(9, 3)) > 1e-3


def test_rotation_turns_neighbouring_pairs():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    cos, sin = rotary_angles(torch.tensor([2]), 4, 100.0)
    assert cos.dtype == torch.float32 and cos.shape == (1, 2)
    out = rotate(x, cos, sin).flatten()
    slow = 2 * 100 ** -0.5
    torch.testing.assert_close(out, torch.tensor([
        math.cos(2), math.sin(2), -math.sin(slow), math.cos(slow)]))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    assert torch.equal(rotate(x, *rotary_angles(torch.tensor([0]), 4, 100.0)), x)


def test_a_model_sees_distances_alone():
    model = make(replace(SMALL, sliding_window=6))
    ids = text()
    close(model(ids, positions=torch.arange(100, 121)), model(ids))


# ------------------------------------------------------------ small layers


def test_rms_norm():
    torch.manual_seed(0)
    norm = RMSNorm(16, 1e-5)
    norm.weight.data.uniform_(0.5, 2)
    x = 3 * torch.randn(4, 5, 16)
    mean_square = (x.double() ** 2).mean(-1, keepdim=True)
    close(norm(x), (x / (mean_square + 1e-5).sqrt() * norm.weight).float())
    assert norm(torch.zeros(2, 16)).abs().max() == 0                # no division by zero
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_swiglu_has_its_gate_in_w1():
    torch.manual_seed(0)
    ffn = SwiGLU(6, 10)
    x = torch.randn(3, 6)
    gate, value = x @ ffn.w1.weight.T, x @ ffn.w3.weight.T
    close(ffn(x), (gate * gate.sigmoid() * value) @ ffn.w2.weight.T)


# ------------------------------------------------------------ mixture of experts


@pytest.mark.parametrize("k", [1, 2, 4])
def test_routing_is_a_renormalised_softmax(k):
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    weights, experts = route(logits, k)
    close(weights.sum(-1), torch.ones(30))
    shares = logits.softmax(-1).gather(1, experts)
    close(weights, shares / shares.sum(-1, keepdim=True))
    assert weights.dtype == torch.float32
    assert torch.equal(experts, logits.topk(k).indices)


@pytest.mark.parametrize("experts, k", [(4, 2), (8, 2), (3, 1), (4, 4)])
def test_mixture_is_the_weighted_sum_token_by_token(experts, k):
    torch.manual_seed(0)
    moe = MoE(12, 20, MoEConfig(experts, k))
    x = torch.randn(2, 9, 12)
    out = moe(x)
    for b in range(2):
        for t in range(9):
            weights, chosen = route(moe.gate(x[b, t])[None], k)
            close(out[b, t], sum(w * moe.experts[e](x[b, t])
                                 for w, e in zip(weights[0], chosen[0].tolist())))


def test_balance_loss_at_its_ends():
    even = torch.eye(4).repeat(6, 1) * 1e-4
    assert balance_loss([even], 1).item() == pytest.approx(1, abs=1e-3)
    collapsed = torch.tensor([[50.0, 50, -50, -50]]).repeat(10, 1)
    assert balance_loss([collapsed], 2).item() == pytest.approx(4, abs=1e-3)
    other = collapsed.flip(-1)
    assert balance_loss([collapsed, other], 2).item() == pytest.approx(4, abs=1e-3)
    assert balance_loss([torch.cat([collapsed, other])], 2).item() == pytest.approx(2, abs=1e-3)
    logits = torch.randn(9, 4, requires_grad=True)
    balance_loss([logits], 2).backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().max() > 0


def test_routing_is_recorded_inside_the_block_only():
    model = make(CONFIGS["mixture"])
    with record_routing(model) as seen:
        model(text())
    model(text())
    assert [tuple(logits.shape) for logits in seen] == [(42, 4)] * 2


# ------------------------------------------------------------ cache = no cache


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=12))
@torch.no_grad()
def test_any_chunking_equals_one_look(kind, chunks):
    model = make(CONFIGS[kind])
    ids = text(sum(chunks))
    cache = KVCache(model.config, batch_size=2)
    pieces = [model(piece, cache) for piece in ids.split(chunks, dim=1)]
    close(torch.cat(pieces, dim=1), model(ids))
    assert cache.length.tolist() == [sum(chunks)] * 2


@pytest.mark.parametrize("kind", ["full", "window 1", "window 5", "pattern", "mixture"])
@torch.no_grad()
def test_padded_batch_equals_single_texts_and_goes_on(kind):
    model = make(CONFIGS[kind])
    lengths, ids, more = [13, 4, 1], text(13, batch=3), text(6, batch=3, seed=5)
    for side in ("right", "left"):
        positions = torch.full((3, 13), -1)
        padded = torch.zeros_like(ids)
        for row, n in enumerate(lengths):
            place = slice(0, n) if side == "right" else slice(13 - n, 13)
            positions[row, place], padded[row, place] = torch.arange(n), ids[row, :n]
        cache = KVCache(model.config, batch_size=3)
        first = model(padded, cache, positions)
        assert cache.length.tolist() == lengths
        rest = [model(piece, cache) for piece in more.split(2, dim=1)]
        for row, n in enumerate(lengths):
            alone = model(torch.cat((ids[row, :n], more[row]))[None])[0]
            close(first[row, positions[row] >= 0], alone[:n])
            close(torch.cat(rest, dim=1)[row], alone[n:])


@torch.no_grad()
def test_padding_is_seen_by_nobody_and_never_stored():
    model = make(replace(SMALL, sliding_window=3))
    ids = text(5, batch=1)
    positions = torch.tensor([[0, 1, -1, 2, -1]])
    other = ids.clone()
    other[0, [2, 4]] += 1
    other %= SMALL.vocab_size
    real = positions[0] >= 0
    caches = [KVCache(model.config), KVCache(model.config)]
    outs = [model(x, cache, positions) for x, cache in zip((ids, other), caches)]
    assert torch.equal(outs[0][:, real], outs[1][:, real])
    for a, b in zip(caches[0].layers, caches[1].layers):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        assert a.positions.sort().values.tolist() == [[0, 1, 2]]
    assert outs[0].isfinite().all()


def test_gradients_are_finite_with_padding():
    model = make(SMALL)
    model(text(5), positions=torch.tensor([[0, 1, 2, -1, -1], [-1] * 5])).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


# ------------------------------------------------------------ the cache's memory


@pytest.mark.parametrize("window, max_length, slots", [
    (5, None, 5), (5, 100, 5), (5, 3, 3), (1, None, 1), (None, 30, 30), ((None, 5), 30, None)])
@torch.no_grad()
def test_memory_of_a_cache_is_what_the_formula_says(window, max_length, slots):
    config = replace(SMALL, sliding_window=window)
    cache = KVCache(config, batch_size=3, max_length=max_length, dtype=torch.bfloat16)
    per_slot = 2 * config.n_kv_heads * config.head_dim * 2           # key, value; 2 bytes
    slots = [30, 5] if slots is None else [slots] * 2
    assert cache.nbytes == 3 * per_slot * sum(slots)
    cache = KVCache(config, batch_size=2, max_length=max_length)
    before = cache.nbytes
    pointers = [layer.keys.data_ptr() for layer in cache.layers]
    model = make(config)
    for piece in text(max_length if max_length in (3, 30) else 60).split(7, dim=1):
        model(piece, cache)
    assert cache.nbytes == before
    assert pointers == [layer.keys.data_ptr() for layer in cache.layers]


@torch.no_grad()
def test_a_ring_keeps_the_last_positions():
    model = make(replace(SMALL, sliding_window=4))
    cache = KVCache(model.config, batch_size=2)
    model(text(50), cache)                     # a prompt of many windows at once
    for layer in cache.layers:
        assert layer.positions.tolist() == [[48, 49, 46, 47]] * 2       # slot = p mod 4


@torch.no_grad()
def test_a_cache_without_window_doubles():
    model = make(SMALL)
    cache = KVCache(SMALL, batch_size=2)
    slots, ids = [], text(200)
    pieces = []
    for piece in ids.split(10, dim=1):
        pieces.append(model(piece, cache))
        slots.append(cache.layers[0].keys.shape[1])
    assert sorted(set(slots)) == [FIRST_SLOTS, 2 * FIRST_SLOTS, 4 * FIRST_SLOTS]
    close(torch.cat(pieces, dim=1), model(ids))


@pytest.mark.parametrize("kind", ["full", "window 5", "pattern"])
@torch.no_grad()
def test_a_cache_can_be_used_again(kind):
    model = make(CONFIGS[kind])
    cache = KVCache(model.config, batch_size=2)
    first = model(text(), cache)
    model(text(9, seed=3), cache)
    cache.reset()
    assert cache.length.tolist() == [0, 0]
    assert torch.equal(model(text(), cache), first)


@torch.no_grad()
def test_a_full_cache_says_so_and_is_unchanged():
    model = make(SMALL)
    cache = KVCache(SMALL, batch_size=2, max_length=10)
    ids = text(12)
    model(ids[:, :8], cache)
    with pytest.raises(ValueError, match="position 10.*max_length=10"):
        model(ids[:, 8:11], cache)
    close(model(ids[:, 8:10], cache), model(ids)[:, 8:10])
    with pytest.raises(ValueError, match="max_length=10"):
        model(ids[:, 10:], cache)
    # A cache shorter than the window cannot roll either.
    windowed = make(replace(SMALL, sliding_window=20))
    with pytest.raises(ValueError, match="max_length=10"):
        windowed(ids, KVCache(windowed.config, batch_size=2, max_length=10))


# ------------------------------------------------------------ the whole


def test_tied_embeddings():
    tied, loose = make(CONFIGS["tied"]), make(SMALL)
    assert tied.output is None
    assert set(loose.state_dict()) - set(tied.state_dict()) == {"output.weight"}
    loose.load_state_dict(tied.state_dict()
                          | {"output.weight": tied.tok_embeddings.weight.detach().clone()})
    assert torch.equal(tied(text()), loose(text()))


@pytest.mark.parametrize("config", [SMALL, CONFIGS["mixture"], CONFIGS["tied"]])
def test_a_new_model_knows_nothing(config):
    torch.manual_seed(0)
    ids = text(50, batch=8)
    with torch.no_grad():
        logits = Transformer(config)(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.05)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("kind", CONFIGS)
def test_everything_is_deterministic(kind):
    def run():
        model = make(CONFIGS[kind])
        out = model(text())
        out.square().mean().backward()
        return out, *(weight.grad for weight in model.parameters())
    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@torch.no_grad()
def test_low_precision_runs_with_its_own_cache():
    model = make(replace(SMALL, sliding_window=4)).bfloat16()
    ids = text()
    whole = model(ids)
    assert whole.dtype == torch.float32
    cache = KVCache(model.config, batch_size=2, dtype=torch.bfloat16)
    pieces = [model(piece, cache) for piece in ids.split(1, dim=1)]
    # bfloat16 has 8 bits of mantissa; sums in another order differ in the last ones.
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=0.15, rtol=0)


@pytest.mark.parametrize("call, match", [
    (lambda m: m(torch.tensor([[61]])), "token id 61 is outside 0..60.*tokenizer"),
    (lambda m: m(torch.tensor([[-1]])), "token id -1"),
    (lambda m: m(torch.tensor([1, 2])), r"shape \(B, T\).*\(2,\)"),
    (lambda m: m(torch.ones(1, 2)), "float32"),
    (lambda m: m(text(), positions=torch.arange(3)), r"positions of shape \(3,\)"),
    (lambda m: m(text(), KVCache(SMALL)), "batch_size=1.*2 rows"),
    (lambda m: KVCache(SMALL, batch_size=0), "batch_size=0"),
    (lambda m: KVCache(SMALL, max_length=0), "max_length=0"),
])
def test_wrong_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call(make(SMALL))
