"""Writing: sampling against its definition, batches against single prompts."""

import math

import pytest
import torch

from minimistral.cache import KVCache
from minimistral.config import ModelConfig, MoEConfig
from minimistral.generate import generate, read_prompts, stream
from minimistral.model import Transformer
from minimistral.sampling import draw, keep_top_k, keep_top_p, next_distribution

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5], [7, 8, 9, 10]]


def lively(config: ModelConfig) -> Transformer:
    """A model with random weights large enough that its choices vary."""
    torch.manual_seed(7)
    model = Transformer(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module", params=[None, 1, 5, (None, 4)], ids=str)
def model(request):
    moe = MoEConfig(5, 2) if request.param == 5 else None
    return lively(ModelConfig(48, 2, 6, 2, 10, 40, 97, sliding_window=request.param,
                              moe=moe))


@pytest.mark.parametrize("options", [
    {}, {"prefill_chunk": 2}, {"stop_ids": range(5, 40)},
    {"temperature": 1.2, "seed": 3}, {"temperature": 0.7, "top_k": 9, "seed": 4},
    {"temperature": 1.0, "top_p": 0.8, "seed": 5, "stop_ids": range(20)},
], ids=lambda o: "-".join(o) or "greedy")
def test_each_row_of_a_batch_writes_what_it_writes_alone(model, options):
    together = generate(model, PROMPTS, 25, **options)
    for row, prompt in enumerate(PROMPTS):
        own = dict(options)
        if "seed" in own:
            own["seed"] += row
        assert generate(model, prompt, 25, **own) == together[row]
        assert list(stream(model, prompt, 25, **own)) == together[row]


def test_greedy_takes_the_largest_logit_of_the_uncached_model(model):
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(model, PROMPTS[0], 20) == ids[len(PROMPTS[0]):]


def test_a_stop_id_ends_its_row_and_is_left_out(model):
    free = generate(model, PROMPTS, 20)
    stop = free[0][6]
    stopped = generate(model, PROMPTS, 20, stop_ids=[stop])
    for before, after in zip(free, stopped):
        assert after == (before[:before.index(stop)] if stop in before else before)


def test_the_same_seed_writes_the_same_and_another_seed_something_else(model):
    one, again, other = (generate(model, [1, 2], 30, temperature=1.0, seed=s)
                         for s in (1, 1, 2))
    assert one == again != other


def test_a_seed_leaves_the_global_generator_alone(model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    generate(model, [1], 5, temperature=1.0, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_zero_new_tokens_is_an_empty_continuation(model):
    assert generate(model, [1, 2], 0) == []
    assert generate(model, [[1], [2, 3]], 0) == [[], []]


@pytest.mark.parametrize("call, words", [
    (lambda m: generate(m, [], 3), "empty"),
    (lambda m: generate(m, [[1], []], 3), "prompt 1 is empty"),
    (lambda m: generate(m, [1, 97], 3), "97 is outside 0..96"),
    (lambda m: generate(m, [-1], 3), "-1 is outside"),
    (lambda m: generate(m, "hello", 3), "encode it first"),
    (lambda m: generate(m, [1], 3, temperature=-1), "temperature=-1"),
    (lambda m: generate(m, [1], 3, temperature=math.nan), "temperature=nan"),
    (lambda m: generate(m, [1], 3, temperature=1, top_k=0), "top_k=0"),
    (lambda m: generate(m, [1], 3, temperature=1, top_p=0), "top_p=0"),
    (lambda m: generate(m, [1], 3, temperature=1, top_p=1.5), "top_p=1.5"),
    (lambda m: generate(m, [1], -1), "max_new_tokens=-1"),
    (lambda m: generate(m, [1], 3, prefill_chunk=0), "prefill_chunk=0"),
    (lambda m: list(stream(m, [[1], [2]], 3)), "one prompt"),
])
def test_wrong_arguments_are_named(model, call, words):
    with pytest.raises(ValueError, match=words.replace("..", r"\.\.")):
        call(model)


def test_nan_weights_are_said_and_not_written_with():
    model = lively(ModelConfig(48, 1, 6, 2, 10, 40, 97))
    with torch.no_grad():
        model.layers[0].feed_forward.w2.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(model, [1, 2], 3)


def test_a_prompt_longer_than_a_cache_without_window_is_refused_before_it_is_read():
    config = ModelConfig(48, 1, 6, 2, 10, 40, 97)
    model, cache = lively(config), KVCache(config, 1, max_length=8)
    with pytest.raises(ValueError, match="max_length=8"):
        read_prompts(model, [list(range(9))], cache)
    assert cache.length.tolist() == [0] and not cache.layers[0].keys.any()


# ------------------------------------------------------------ sampling


def test_top_k_keeps_k_even_among_ties():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    kept = keep_top_k(logits, 2).isfinite()
    assert kept.sum(dim=-1).tolist() == [2, 2] and kept[1].tolist()[:2] == [True, True]


def test_top_p_keeps_the_token_that_crosses_p():
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [0.98, 0.01, 0.01]])
    kept = keep_top_p(probabilities, 0.6)
    assert kept[0].tolist() == pytest.approx([0.0, 0.625, 0.375])
    assert kept[1].tolist() == pytest.approx([1.0, 0.0, 0.0])
    # At an exact boundary the next token still counts as the one that crosses.
    edge = keep_top_p(torch.tensor([[0.5, 0.25, 0.25]]), 0.5)
    assert edge[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0.0])


def test_temperature_comes_before_the_cuts():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    flat = next_distribution(logits, 10.0, top_p=0.5)
    sharp = next_distribution(logits, 0.1, top_p=0.5)
    assert (flat > 0).sum() == 2 and (sharp > 0).sum() == 1


def test_the_cuts_agree_with_transformers():
    hf = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(200, 83, generator=generator)
    for temperature, k, p in [(0.7, 11, 0.9), (1.5, 40, 0.5), (1.0, 83, 0.99)]:
        theirs = hf.TemperatureLogitsWarper(temperature)(None, logits)
        theirs = hf.TopKLogitsWarper(k)(None, theirs)
        theirs = hf.TopPLogitsWarper(p)(None, theirs).softmax(dim=-1)
        ours = next_distribution(logits, temperature, k, p)
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_draw_follows_the_probabilities():
    probabilities = torch.tensor([[0.0, 0.125, 0.0, 0.5, 0.375, 0.0]])
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(1))
    drawn = draw(probabilities.expand(40_000, -1), uniforms)
    shares = torch.bincount(drawn, minlength=6) / 40_000
    # Four standard errors of a share of one half are 0.01.
    assert torch.allclose(shares, probabilities[0], atol=0.01)
    assert shares[[0, 2, 5]].sum() == 0
    edges = draw(probabilities.expand(2, -1), torch.tensor([0.0, 1 - 2 ** -24]))
    assert edges.tolist() == [1, 4]
