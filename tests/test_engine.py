"""The engine against the plain path: the same texts, from fixed shapes, in shared places."""

import mmap

import pytest
import torch

import minimistral.engine as engine_module
from minimistral import devices, large_pages, onednn
from minimistral.config import ModelConfig, MoEConfig
from minimistral.engine import Engine
from minimistral.attention import plain_attend
from minimistral.fast_model import (AllCores, FastExperts, FastModel, attend_to_slots,
                                    gathered_experts, join_weights, product, stacked_experts)
from minimistral.generate import generate
from minimistral.model import Transformer
from minimistral.moe import MoE, route
from minimistral.quantize import QuantizedLinear, quantize_model, use_kernels
from minimistral.sampling import next_distribution
from minimistral.speculative import DraftModel, PromptLookup, accept, speculate

# Longer than the ring, of one token, and more of them than places.
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5], list(range(30, 61)), [7, 8, 9, 10], [3, 3]]
SHAPES = {
    "dense": {}, "all heads": {"n_kv_heads": 6}, "one shared head": {"n_kv_heads": 1},
    "window 1": {"sliding_window": 1}, "window 5": {"sliding_window": 5},
    "pattern": {"sliding_window": (None, 4)}, "mixture": {"moe": MoEConfig(5, 2)},
    "mixture with window": {"moe": MoEConfig(4, 3), "sliding_window": 7},
    "tied": {"tied_embeddings": True}, "large window": {"sliding_window": 50},
}
SAMPLINGS = [{}, {"stop_ids": range(5, 40)}, {"temperature": 1.2, "seed": 3},
             {"temperature": 1.0, "top_p": 0.8, "top_k": 20, "seed": 5, "stop_ids": range(20)}]


def lively(seed=7, **shape) -> Transformer:
    """A model with random weights large enough that its choices vary."""
    torch.manual_seed(seed)
    numbers = dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, hidden_dim=40,
                   vocab_size=97) | shape
    model = Transformer(ModelConfig(**numbers))
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def plain_engine(model, batch_size=1, max_length=None, **options) -> Engine:
    return Engine(model, batch_size, max_length, compile=False, **options)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def model(request):
    return lively(**SHAPES[request.param])


# ------------------------------------------------------------ the same texts


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: "-".join(s) or "greedy")
def test_the_engine_writes_what_the_plain_path_writes(model, sampling):
    expected = generate(model, PROMPTS, 25, **sampling)
    assert plain_engine(model, 3, chunk=7).generate(PROMPTS, 25, **sampling) == expected
    alone = plain_engine(model)
    for prompt, row in zip(PROMPTS[:2], expected):
        assert list(alone.stream(prompt, 25, **sampling)) == row      # a second prompt too
        sampling = sampling | ({"seed": sampling["seed"] + 1} if "seed" in sampling else {})


@pytest.mark.parametrize("chunk", [1, 4, 9, 512])
def test_read_in_chunks_or_whole(model, chunk):
    whole = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        expected = model(whole)[0, -1]
    found = plain_engine(model, 2, chunk=chunk).read(1, PROMPTS[2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_step_of_several_tokens_is_as_many_steps_of_one(model):
    ids = PROMPTS[2][:20]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
        fast = FastModel(model, 2, spare=4)
        found = [fast.forward(torch.tensor([ids[i:i + 5]] * 2),
                              torch.tensor([[*range(i, i + 5)], [-1] * 5]))[0]
                 for i in range(0, 20, 5)]
    torch.testing.assert_close(torch.cat(found, dim=1)[0], expected, rtol=1e-4, atol=1e-5)
    assert all((ring.positions[1] == -1).all() for ring in fast.rings.values())


def test_what_is_taken_back_was_never_there(model):
    """After tokens were taken back the model goes on as if they had not been."""
    ids = PROMPTS[2]
    fast = FastModel(model, 1, spare=3)

    def run(tokens, start):
        positions = torch.arange(start, start + len(tokens))[None]
        return fast.forward(torch.tensor([tokens]), positions)[0]

    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
        for i in range(0, len(ids)):
            run([90, 91, 92, 93], i)
            fast.forget(0, i)
            found = run([ids[i]], i)
            torch.testing.assert_close(found[0, 0], expected[i], rtol=1e-4, atol=1e-5)


def test_places_come_and_go_while_others_write(model):
    together = plain_engine(model, 2)
    first = together.admit(PROMPTS[0])
    written = {first: [together.step()[first] for _ in range(3)]}
    second = together.admit(PROMPTS[1], temperature=0.9, seed=4, max_new_tokens=5)
    written[second] = []
    with pytest.raises(ValueError, match="all 2 places are taken"):
        together.admit([1])
    while second in together.seats:
        for place, token in together.step().items():
            written[place] += [] if token is None else [token]
    third = together.admit(PROMPTS[2])
    assert third == second
    more = [together.step() for _ in range(6)]
    assert written[first] + [m[first] for m in more] == generate(model, PROMPTS[0], 15)
    assert written[second] == generate(model, PROMPTS[1], 5, temperature=0.9, seed=4)
    assert [m[third] for m in more] == generate(model, PROMPTS[2], 6)
    together.release(first)
    with pytest.raises(ValueError, match="free already"):
        together.release(first)
    assert set(together.step()) == {third}
    together.release(third)
    assert together.step() == {}


def test_a_stream_that_is_dropped_frees_its_place():
    engine = plain_engine(lively())
    begun = engine.stream([1, 2], 10)
    next(begun)
    assert engine.seats
    begun.close()
    assert not engine.seats
    assert engine.generate([1, 2], 4) == generate(engine.fast.model, [1, 2], 4)


# ------------------------------------------------------------ its parts


def test_products_of_one_row():
    g = torch.Generator().manual_seed(0)
    for rows, parts in ((6, 1), (6, 2), (6, 3), (7, 1)):
        weight, x = torch.randn(rows, 5, generator=g), torch.randn(1, 1, 5, generator=g)
        torch.testing.assert_close(product(x, weight, parts), x @ weight.T)
        torch.testing.assert_close(product(x[0, 0], weight, parts), weight @ x[0, 0])


def test_joined_weights_add_no_memory_and_stay_the_models():
    model = lively()
    attention = model.layers[0].attention
    before = [w.weight.clone() for w in (attention.wq, attention.wk, attention.wv)]
    joint = join_weights([attention.wq, attention.wk, attention.wv])
    assert torch.equal(joint, torch.cat(before))
    assert join_weights([attention.wq, attention.wk, attention.wv]).data_ptr() == joint.data_ptr()
    assert attention.wk.weight.untyped_storage().data_ptr() == joint.untyped_storage().data_ptr()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    state["layers.0.attention.wk.weight"] += 1
    model.load_state_dict(state)
    assert torch.equal(joint[60:80], before[1] + 1)                    # H * D = 60 rows before


@pytest.mark.skipif(not large_pages.THERE, reason="a matter of Linux")
def test_large_weights_move_to_large_pages_once():
    first, second = torch.nn.Linear(256, 300, bias=False), torch.nn.Linear(256, 20, bias=False)
    small = torch.nn.Linear(8, 8, bias=False)
    before, there = torch.cat((first.weight, second.weight)).detach(), small.weight.data_ptr()
    joint = join_weights([first, second])
    assert torch.equal(joint, before) and torch.equal(second.weight, before[300:])
    assert joint.data_ptr() == first.weight.data_ptr() and not large_pages.wanted(joint)
    assert join_weights([first, second]).data_ptr() == joint.data_ptr()
    assert join_weights([small]).data_ptr() == there
    more = [large_pages.empty_like(joint, (n, 1001)).fill_(n) for n in (17, 9000, 30)]
    assert torch.equal(joint, before)
    for n, weight in zip((17, 9000, 30), more):               # none lies on another
        assert bool((weight == n).all()) and weight.data_ptr() % 64 == 0


@pytest.mark.skipif(not large_pages.THERE, reason="a matter of Linux")
def test_a_kernel_without_large_pages_gives_usual_ones(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    monkeypatch.setattr(large_pages, "free", [])
    weight = torch.ones(256, 300)
    assert large_pages.empty_like(weight, (300, 256)).fill_(2).sum() == 2 * 256 * 300


def test_all_cores_give_one_row_the_same_sums():
    model, ids = lively(), torch.tensor([[3], [5]])
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            alone, both, shared = model(ids[:1]), model(ids), AllCores(model)
            with shared:
                assert all("forward" in vars(layer) for layer in layers)
                assert not AllCores(model).ways                   # they are taken
                torch.testing.assert_close(model(ids[:1]), alone)
                assert torch.equal(model(ids), both)
    finally:
        torch.set_num_threads(threads)
    assert not any("forward" in vars(layer) for layer in layers)
    assert not AllCores(model.to(torch.bfloat16)).ways


def test_attention_to_slots_is_plain_attention():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 4, generator=g) for n, h in ((3, 6), (5, 2), (5, 2)))
    mask = torch.rand(2, 3, 5, generator=g) > 0.4
    mask[0, 1] = False                                                 # sees nothing: zeros
    found = attend_to_slots(q, k.transpose(1, 2), v.transpose(1, 2), mask)
    torch.testing.assert_close(found, plain_attend(q, k, v, mask))
    assert not found[0, 1].any()


def test_a_long_chunk_in_which_some_places_take_no_part(model):
    """More queries than FEW, and a place of padding beside: nothing of it is kept."""
    ids = PROMPTS[2][:20]
    fast = FastModel(model, 2, spare=4)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
        positions = torch.tensor([[*range(20)], [-1] * 20])
        found = fast.features(torch.tensor([ids] * 2), positions, slice(2), end=20)
    torch.testing.assert_close(fast.logits(found)[0], expected, rtol=1e-4, atol=1e-5)
    assert found.isfinite().all()
    assert all((ring.positions[1] == -1).all() for ring in fast.rings.values())


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 80])
def test_each_way_of_a_mixture_is_the_plain_one(tokens):
    torch.manual_seed(tokens)
    moe = MoE(12, 20, MoEConfig(5, 2))
    x = torch.randn(1, tokens, 12)
    expected = moe(x)
    fast = FastExperts(moe)
    torch.testing.assert_close(fast(x), expected)
    weights, chosen = route(moe.gate(x.flatten(0, 1)), moe.k)
    for way in (gathered_experts, stacked_experts):
        found = way(fast.w13, fast.w2, x.flatten(0, 1), weights, chosen)
        torch.testing.assert_close(found.view_as(x), expected)


class Scaled(torch.nn.Module):
    """A layer that is no nn.Linear, as a quantized one is none."""

    def __init__(self, linear):
        super().__init__()
        self.kept = torch.nn.Parameter(linear.weight.detach() * 2)

    def forward(self, x):
        return x @ (self.kept / 2).T


@pytest.mark.parametrize("moe", [None, MoEConfig(5, 2)], ids=["dense", "mixture"])
def test_layers_of_another_kind_are_called_as_they_are(moe):
    model = lively(moe=moe, sliding_window=6)
    expected = generate(model, PROMPTS, 12)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and name != "gate":
                setattr(module, name, Scaled(child))
    assert plain_engine(model, 2).generate(PROMPTS, 12) == expected


# ------------------------------------------------------------ speculative decoding

REPEATING = [4, 8, 15, 16, 23, 42] * 4 + [4, 8]


def draft_of(model, kind):
    """Look-up, a strange model, or the model itself, all of whose proposals are right."""
    if kind == "look-up":
        return PromptLookup()
    small = Transformer(model.config) if kind == "itself" else lively(
        3, dim=32, n_layers=1, sliding_window=3)
    if kind == "itself":
        small.load_state_dict(model.state_dict())
    return DraftModel(plain_engine(small, spare=5))


@pytest.mark.parametrize("kind", ["look-up", "strange", "itself"])
def test_speculation_writes_the_greedy_text(model, kind):
    engine, draft = plain_engine(model, spare=5), draft_of(model, kind)
    for prompt in (REPEATING, [5]):
        expected = generate(model, prompt, 30)
        for drafts in (1, 5):
            done = speculate(engine, prompt, 30, draft, drafts=drafts)
            assert done.ids == expected
            assert 0 <= done.accepted <= done.proposed and done.steps <= 29
            if kind == "itself":
                assert done.acceptance == 1 and done.steps == -(-29 // (drafts + 1))
        stop = expected[12]
        stopped = speculate(engine, prompt, 30, draft, stop_ids=[stop])
        assert stopped.ids == generate(model, prompt, 30, stop_ids=[stop])
        assert all((ring.positions == -1).all() for ring in engine.fast.rings.values())


def test_rejected_tokens_do_not_stay_in_the_cache(monkeypatch):
    model = lively(sliding_window=6)
    engine, draft = plain_engine(model, spare=4), draft_of(model, "strange")
    begun = []

    def look(*arguments):
        """Before each proposal both caches hold positions that are in the text, no others."""
        held = engine.fast.rings[6].positions
        begun.append(len(arguments[0]))
        assert sorted(held[held >= 0].tolist())[-6:] == [*range(len(arguments[0]) - 1)][-6:]
        return propose(*arguments)

    propose, draft.propose = draft.propose, look
    done = speculate(engine, REPEATING, 30, draft)
    assert done.accepted < done.proposed and len(begun) == done.steps


def test_an_accepted_token_is_drawn_from_the_models_distribution():
    """8,000 draws through the rule, against p, by chi square."""
    p = torch.tensor([[0.5, 0.2, 0.0, 0.25, 0.05], [0.1, 0.2, 0.3, 0.3, 0.1]])
    q = torch.tensor([[0.1, 0.3, 0.4, 0.2, 0.0]])
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(5)
    for token in torch.multinomial(q[0], 8_000, replacement=True, generator=generator).tolist():
        counts[accept([token], q, p, generator)[0]] += 1
    assert counts[2] == 0
    expected = p[0] * 8_000
    chi_square = ((counts - expected) ** 2 / expected)[p[0] > 0].sum()
    assert chi_square < 16.3                # 3 degrees of freedom: passed by 999 of 1,000


@pytest.mark.parametrize("kind", ["look-up", "strange"])
def test_sampled_texts_have_the_models_distribution(kind):
    """The second and third token of 400 texts against p(b, c), by chi square."""
    small = dict(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=8,
                 vocab_size=4)
    model, n_texts = lively(1, **small, sliding_window=3), 400
    draft = PromptLookup() if kind == "look-up" else DraftModel(plain_engine(lively(2, **small)))
    prompt, engine = [0, 1, 2, 3, 0, 1], plain_engine(model, spare=2)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)               # (64, 3): all a, b, c
    with torch.no_grad():
        logits = model(torch.cat((torch.tensor([prompt] * 64), every), dim=1))[:, 5:8]
    p = next_distribution(logits.flatten(0, 1), 0.8).view(64, 3, 4)
    p = p.gather(2, every[:, :, None]).prod(dim=1).view(4, 4, 4).sum(dim=0)     # p(b, c)
    assert p.sum().item() == pytest.approx(1)
    counts, accepted, proposed = torch.zeros(4, 4), 0, 0
    for seed in range(n_texts):
        done = speculate(engine, prompt, 4, draft, drafts=2, temperature=0.8, seed=seed)
        counts[done.ids[1], done.ids[2]] += 1
        accepted, proposed = accepted + done.accepted, proposed + done.proposed
    assert 0.1 < accepted / proposed < 0.9, "both sides of the rule must have been taken"
    common = p * n_texts >= 5                             # chi square needs 5 of each
    chi_square = ((counts - p * n_texts) ** 2 / (p * n_texts))[common].sum()
    assert common.sum() > 6
    assert chi_square < 37.7                # at most 15 degrees: passed by 999 of 1,000


@pytest.mark.parametrize("options, words", [
    ({"drafts": 3}, "spare=3, it has spare=2"), ({"drafts": 0}, "drafts=0"),
    ({"temperature": -1}, "temperature=-1"), ({"max_new_tokens": -1}, "max_new_tokens=-1"),
])
def test_a_wrong_speculation_is_named(options, words):
    engine = plain_engine(lively(sliding_window=4), spare=2)
    options = {"max_new_tokens": 3, "drafts": 2} | options
    with pytest.raises(ValueError, match=words):
        speculate(engine, [1, 2], options.pop("max_new_tokens"), PromptLookup(), **options)
    other = DraftModel(plain_engine(lively(vocab_size=90), spare=2))
    with pytest.raises(ValueError, match="same vocabulary.*90 tokens for 97"):
        speculate(engine, [1, 2], 3, other, drafts=2)


# ------------------------------------------------------------ compiled, and not


def test_compiled_is_eager(tmp_path, capsys):
    model = lively(moe=MoEConfig(5, 2), sliding_window=6)
    torch._dynamo.utils.counters.clear()
    engine = Engine(model, batch_size=2, compile=True)
    assert not torch._dynamo.utils.counters["graph_break"], "the step is one piece"
    assert "compiling the step for 2 x 1" in capsys.readouterr().err
    assert engine.describe()["steps"] == "1 x 1: compiled, 2 x 1: compiled"
    for sampling in SAMPLINGS[1:3]:
        expected = generate(model, PROMPTS, 20, **sampling)
        assert engine.generate(PROMPTS, 20, **sampling) == expected
    assert engine.generate(PROMPTS[2], 20) == generate(model, PROMPTS[2], 20)


@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2)], ids=["dense", "mixture"])
@pytest.mark.parametrize("bits, group", [(8, None), (4, 32)], ids=["8 bits", "4 bits"])
def test_a_quantized_model_is_compiled_whole(bits, group, moe):
    """Without the 8-bit kernel, which rounds what the compiled loop does not. A model of
    another engine has other layers, though the steps look the same."""
    models = [quantize_model(lively(seed, dim=64, n_heads=4, head_dim=16, hidden_dim=96,
                                    vocab_size=96, sliding_window=6, moe=moe), bits, group)
              for seed in (7, 8)]
    for layer in (layer for model in models for layer in model.modules()):
        if isinstance(layer, QuantizedLinear):
            layer.kernel = False
    kernels = [use_kernels(model, output=True) for model in models] if bits == 4 else [1]
    assert all(kernels)
    engines = [Engine(model, compile=True, progress=False, spare=2) for model in models]
    for model, engine in zip(models, engines):
        assert engine.describe()["steps"] == "1 x 1: compiled"
        assert engine.generate(PROMPTS[0], 12) == generate(model, PROMPTS[0], 12)
    assert engines[0].generate(PROMPTS[0], 12) != engines[1].generate(PROMPTS[0], 12)
    done = speculate(engines[0], REPEATING, 12, PromptLookup(), drafts=2)
    assert done.ids == generate(models[0], REPEATING, 12)             # 3 rows at once


@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17])
def test_a_product_of_few_rows(rows):
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, 48, generator=random)
    weight = torch.randn(20, 48, generator=random)
    for parts in (1, 2):
        torch.testing.assert_close(product(x, weight, parts), x @ weight.T)
        half = product(x.bfloat16(), weight.bfloat16(), parts)
        torch.testing.assert_close(half.float(), x @ weight.T, rtol=0.02, atol=0.2)


@pytest.mark.skipif(not onednn.THERE, reason="this PyTorch has no oneDNN")
def test_products_by_onednn_are_products_with_their_gradients():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 48, generator=random, requires_grad=True)
    weight = torch.randn(20, 48, generator=random, requires_grad=True)
    grad = torch.randn(3, 7, 20, generator=random)
    found = []
    for way in (onednn.wide_product, torch.nn.functional.linear):
        out = way(x, weight)
        found.append((out, *torch.autograd.grad(out, (x, weight), grad)))
    for mine, expected in zip(*found):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_wide_products_leave_the_model_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(8, 12, bias=False), torch.nn.Linear(12, 4))
    x = torch.randn(30, 8)
    expected = model(x)
    with onednn.wide_products(model):
        assert ("forward" in vars(model[0])) == onednn.THERE and "forward" not in vars(model[1])
        torch.testing.assert_close(model(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model[0](x).dtype == torch.bfloat16
    assert "forward" not in vars(model[0])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")             # PyTorch's own way is the quicker
    try:
        with onednn.wide_products(model):
            assert "forward" not in vars(model[0])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("when", ["at once", "at the first step"])
def test_a_compiler_that_fails_is_told_once(monkeypatch, when, recwarn):
    def broken(*args, **options):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(engine_module.torch, "compile",
                        broken if when == "at once" else lambda *a, **k: broken)
    model = lively()
    engine = Engine(model, batch_size=1, progress=False)
    assert engine.generate(PROMPTS, 8) == generate(model, PROMPTS, 8)
    told = [str(w.message) for w in recwarn if "torch.compile failed" in str(w.message)]
    assert len(told) == 1 and "no C++ compiler; compile=False" in told[0]
    assert engine.describe()["steps"] == "1 x 1: eager"
    with pytest.raises(RuntimeError, match="no C"):
        Engine(model, compile=True, progress=False)


def test_bfloat16_is_close_and_counts_half():
    model = lively(sliding_window=9)
    wide = plain_engine(model)
    expected, bytes_before = wide.read(0, PROMPTS[2]), wide.fast.nbytes
    engine = plain_engine(model, dtype="bfloat16")
    found = engine.read(0, PROMPTS[2])
    assert engine.dtype == model.tok_embeddings.weight.dtype == torch.bfloat16
    assert engine.fast.nbytes == bytes_before // 2
    assert found.dtype == torch.float32
    # bfloat16 keeps 8 bits: two layers of logits of size 1 differ by a few hundredths
    assert 0 < (found - expected).abs().max() < 0.15
    assert len(engine.generate(PROMPTS, 5)) == len(PROMPTS)


# ------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize("options, words", [
    ({"batch_size": 0}, "batch_size=0"), ({"chunk": 0}, "chunk=0"), ({"spare": -1}, "spare=-1"),
    ({"max_length": 0}, "max_length=0"), ({"compile": "yes"}, "compile='yes'"),
    ({"dtype": "float8"}, "float8.*float32, bfloat16.*quantize"),
    ({"device": "tpu"}, "'tpu' is unknown"), ({"device": "cuda:77"}, "cuda:77.*not there"),
])
def test_a_wrong_argument_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        Engine(lively(), **options)


@pytest.mark.parametrize("call, words", [
    (lambda e: e.generate([], 3), "empty"), (lambda e: e.generate([[1], [97]], 3), "0..96"),
    (lambda e: e.generate([1], 3, temperature=-1), "temperature=-1"),
    (lambda e: e.generate([1], -1), "max_new_tokens=-1"),
    (lambda e: e.generate([1] * 8, 6), "8 and 6 new tokens.*12 positions.*max_length"),
    (lambda e: e.admit([1] * 13), "13 and 1 new"),
])
def test_a_wrong_call_is_named_and_leaves_the_engine_free(call, words):
    engine = plain_engine(lively(), max_length=12)
    with pytest.raises(ValueError, match=words.replace("..9", r"\.\.9")):
        call(engine)
    assert not engine.seats
    assert len(engine.generate([1] * 8, 5)) == 5                       # just fits


def test_nan_is_said():
    model = lively()
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        plain_engine(model).generate([1, 2], 3)


def test_out_of_memory_is_told_with_the_estimate(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(engine_module, "FastModel", full)
    with pytest.raises(MemoryError, match=r"weights take 0.00 GB.*batch_size or max_length"):
        plain_engine(lively())


# ------------------------------------------------------------ devices


def test_the_description_says_what_is_used():
    about = plain_engine(lively(), batch_size=2).describe()
    assert about["device"] == "cpu" and about["dtype"] == "float32"
    assert "threads" in about["name"] and about["steps"] == "1 x 1: eager, 2 x 1: eager"
    assert devices.describe_device("auto", "bfloat16")["dtype"] == "bfloat16"


def test_the_self_test_passes_here_and_would_notice(monkeypatch):
    assert devices.gives_the_same_as_the_cpu("cpu")
    calls = []

    def wrong_on_the_device(x, *rest):
        calls.append(1)
        return x.sigmoid() * x if len(calls) > 1 else x.sigmoid()      # the device comes first

    monkeypatch.setattr(devices.F, "silu", wrong_on_the_device)
    assert not devices.gives_the_same_as_the_cpu("cpu")


def test_a_mac_that_fails_the_self_test_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices, "gives_the_same_as_the_cpu", lambda device: False)
    assert devices.pick_device().type == "cpu"
    with pytest.warns(UserWarning, match="do not trust"):
        assert devices.pick_device("mps").type == "mps"
