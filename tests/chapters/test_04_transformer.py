"""Chapter 4: its records are sound, its drafts agree with the library, its claims hold."""

import math
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
import story
import torch
import torch.nn.functional as F
from torch import nn

import minimistral as mm
from minimistral.course import judge, swap, verify
from minimistral.course.chapters import ch04_transformer as ch04
from minimistral.course.records.ch04 import EXERCISES

SOURCE = Path(__file__).parents[2] / "notebooks" / "src" / "04_transformer.py"
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
SMALL = dict(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, hidden_dim=32, vocab_size=50)


def drafts(*wanted: str) -> dict:
    return story.drafts(4, *wanted, math=math, torch=torch, nn=nn, F=F)


def small_model(**change):
    torch.manual_seed(0)
    return mm.Transformer(mm.ModelConfig(**{**SMALL, **change}))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


class LearnerNorm(nn.Module):
    """The weight under a name of the learner's own."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps, self.scale = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.scale.shape, self.scale, self.eps)


class LearnerSwiGLU(nn.Module):
    """Gate and value written back before they are multiplied."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, hidden_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x))) * self.w2(self.w3(x))


def learner_block(self, x, positions, angles, cache=None):
    h = x + self.attention(self.attention_norm(x))
    return h + self.feed_forward(self.ffn_norm(h))


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("RMSNorm", LearnerNorm, "weight"),
        ("RMSNorm", lambda dim, eps=1e-5: torch.ones(dim), "nn.Module"),
        ("SwiGLU", LearnerSwiGLU, "expected"),
        ("block", learner_block, "positions"),
        ("layer_norm", lambda x, weight, bias, eps=1e-5: x.mean(-1), "shape"),
        ("widest_hidden", lambda config, budget: budget, "expected"),
        ("norm_tokens", lambda x, weight: F.layer_norm(x, weight.shape, weight), "expected"),
        ("start_weights", lambda model: [w.data.zero_() for w in model.parameters()], "spread"),
        ("who_says_it", lambda model, ids, answer: model(ids[None])[0, -1, answer], "shape"),
        ("my_config", lambda: 3, "ModelConfig"),
        ("my_config", lambda: mm.MODELS["mistral-7b-v0.1"], "at most 300,000"),   # not built
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message


# ---------------------------------------------------------------- drafts and pieces


@pytest.mark.parametrize("name", ["tales-dense", "mistral-7b-v0.1", "mistral-large-2"])
def test_parameters_by_the_chapters_formula(name):
    config = mm.load_model(name).config if name == "tales-dense" else mm.MODELS[name]
    parts = drafts("parts_of")["parts_of"](config)
    assert sum(parts.values()) == mm.count_parameters(config).total


def test_the_lens_ends_with_the_models_own_prediction():
    model, ids = small_model(), torch.tensor([3, 1, 4, 1, 5])
    depths = drafts("predictions_by_depth")["predictions_by_depth"](model, ids)
    assert depths.shape == (3, 5, 50)
    torch.testing.assert_close(depths[-1], model(ids[None])[0].softmax(-1))
    alone = model.logits(model.norm(model.tok_embeddings(ids))).softmax(-1)
    torch.testing.assert_close(depths[0], alone)
    assert not model.layers[0]._forward_hooks


def test_size_and_likeness():
    measure = drafts("size_and_likeness")["size_and_likeness"]
    size, alike = measure(torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
    assert (size, alike) == pytest.approx((math.sqrt(125 / 4), 1.0))
    assert measure(torch.eye(3))[1] == pytest.approx(0.0, abs=1e-6)


def test_a_learners_pieces_run_the_shipped_model():
    ids = torch.tensor([[5, 40, 300, 7]])
    expected = mm.load_model("tales-dense")(ids)
    pieces = {e.piece: list(e.equivalents.values())[0] for e in EXERCISES if e.piece}
    assert sorted(pieces) == ["layers.RMSNorm", "layers.SwiGLU", "model.Block.forward"]
    with swap(pieces):
        model = mm.load_model("tales-dense")
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    wrong = {m.name: m.wrong for m in BY_NAME["block"].misconceptions}["norm after the sum"]
    with swap("model.Block.forward", wrong):
        assert not torch.allclose(model(ids), expected, atol=0.1)


# ---------------------------------------------------------------- claims


def test_looks_on_looks_become_one_and_a_stream_does_not():
    measure = drafts("size_and_likeness")["size_and_likeness"]
    torch.manual_seed(1)
    x = kept = torch.randn(1, 30, 64)
    config = mm.ModelConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=16,
                            hidden_dim=1, vocab_size=9)
    positions = torch.arange(30)
    from minimistral.attention import Attention
    from minimistral.rope import rotary_angles

    angles = rotary_angles(positions, 16, 1e4)
    with torch.no_grad():
        for _ in range(12):
            look = Attention(config)
            x, kept = look(x, positions, angles), kept + look(kept, positions, angles)
    assert measure(x[0])[1] > 0.99 and measure(kept[0])[1] < 0.4


def test_a_new_model_is_ignorant():
    model = small_model(vocab_size=500)
    ids = torch.randint(0, 500, (4, 40), generator=torch.Generator().manual_seed(2))
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)


# ---------------------------------------------------------------- variants


def test_every_variant_runs_and_only_the_linear_in_size_differ():
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for name in ch04.VARIANTS:
        model = ch04.build_variant(name, 0, vocab_size=50)
        assert model(ids).shape == (1, 5, 50)
    sizes = [sum(p.numel() for p in ch04.build_variant(name, 0, vocab_size=50).parameters())
             for name in list(ch04.VARIANTS)[:3]]
    assert len(set(sizes)) == 1


@torch.no_grad()
def test_what_the_variants_can_no_longer_do():
    ids, other = torch.tensor([[3, 1, 4, 9]]), torch.tensor([[8, 1, 4, 9]])
    swapped = torch.tensor([[1, 3, 4, 9]])

    def last(name, tokens):
        return ch04.build_variant(name, 0, vocab_size=50)(tokens)[0, -1]

    whole = "nothing: the whole model"
    assert not torch.equal(last(whole, ids), last(whole, other))
    assert torch.equal(last("no attention", ids), last("no attention", other))
    # one layer of attention without turned pairs cannot tell the order of what came before;
    # three can, by the causal mask: but the first layer's view is the same
    one = ch04.build_variant("no positions", 0, vocab_size=50)
    one.layers = one.layers[:1]
    torch.testing.assert_close(one(ids)[0, -1], one(swapped)[0, -1])


def test_the_recorded_ablations_are_of_these_variants():
    result = ch04.recorded_ablations()
    assert [v["changed"] for v in result["variants"]] == list(ch04.VARIANTS)
    assert result["run"] == asdict(ch04.ABLATION_RUN)
    for entry in result["variants"]:
        assert len(entry["nats_per_byte"]) == len(result["seeds"]) >= 2
        assert entry["median"] == pytest.approx(statistics.median(entry["nats_per_byte"]))
        model = ch04.build_variant(entry["changed"], 0, vocab_size=960)
        assert entry["parameters"] == sum(p.numel() for p in model.parameters())
    for key in ("command", "date", "system", "torch", "threads"):
        assert result["provenance"][key]


def test_the_ladders_model_is_the_chapters():
    c = ch04.small_transformer(vocab_size=960).config
    text = (f"dim={c.dim}, n_layers={c.n_layers}, n_heads={c.n_heads}, "
            f"n_kv_heads={c.n_kv_heads}, head_dim={c.head_dim}, hidden_dim={c.hidden_dim}")
    source = " ".join(SOURCE.read_text(encoding="utf-8").split())
    assert text in source and f'"{ch04.LADDER_ROW}"' in source


# ---------------------------------------------------------------- helpers and explorer


def test_settles_at_the_depth_from_which_nothing_changes():
    assert ch04.settles_at([4, 7, 7, 7]) == 1
    assert ch04.settles_at([7, 4, 7]) == 2
    assert ch04.settles_at([7, 7]) == 0


def test_explorer_draws_what_it_says():
    chances = torch.full((3, 4, 6), 0.02)
    for depth, first in enumerate((2, 5, 5)):
        chances[depth, 1, first] = 0.9
    texts = ["<s>", " Now", " Leo", "."]
    names = ["a", "b", "c", "d", "e", " Leo"]
    draw = ch04.lens_explorer({"English": chances}, {"English": texts}, names.__getitem__)
    figure, sentence, (header, rows) = draw("English", 1)
    assert "the embedding “c” (0.90); after block 0 “ Leo” (0.90)" in sentence
    assert "goes on with “ Leo”" in sentence and len(rows) == 3 and len(header) == 4
    assert "settled after block 0" in figure.axes[0].get_title()
    assert draw("English", 99)[1].startswith("After “ Leo” at position 2")
