"""Chapter 6: its records are sound, its drafts agree with the library, its claims hold."""

import math

import pytest
import story
import torch

import minimistral as mm
from minimistral.course import judge, verify
from minimistral.course.chapters import ch06_generation as ch06
from minimistral.course.records.ch06 import EXERCISES
from minimistral.sampling import next_distribution
from minimistral.tales import parse_tale

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


def small_model(window=None, moe=None):
    torch.manual_seed(0)
    config = mm.ModelConfig(dim=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=4, hidden_dim=20,
                            vocab_size=37, sliding_window=window, moe=moe)
    model = mm.Transformer(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.eval()


def drafts(model) -> dict:
    return story.drafts(6, "write_rereading", "keys_of", "PlainLayer", "PlainCache",
                        torch=torch, model=model)


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("draw", lambda probabilities, uniforms: uniforms, "float"),
        ("draw", lambda probabilities, uniforms: probabilities.multinomial(1), "shape"),
        ("keep_top_k", lambda logits, k: logits, "inf"),
        ("keep_top_p", lambda probabilities, p: probabilities, ""),
        ("keep_top_p", lambda probabilities, p: probabilities.sort(-1)[0], ""),
        ("remember", lambda kept, k, v, positions: None, ""),
        ("until_stop", lambda ids, stops: ids[: ids.index(stops[0][0])], "elements"),
        ("beam", lambda next_logs, start, width, steps: start, ""),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


# ---------------------------------------------------------------- drafts


def test_the_rereading_loop_writes_what_generate_writes():
    model = small_model()
    ids = drafts(model)["write_rereading"]([1, 5, 9], 12, torch.argmax)
    assert ids[:3] == [1, 5, 9] and ids[3:] == mm.generate(model, [1, 5, 9], 12)


@pytest.mark.parametrize("pieces", [[17], [1] * 17, [5, 1, 7, 4]])
def test_the_plain_cache_changes_nothing(pieces):
    model = small_model()
    cache, ids = drafts(model)["PlainCache"](3), torch.arange(3, 20)[None]
    with torch.no_grad():
        parts = [model(part, cache) for part in ids.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-5)
    assert cache.length.item() == 17 and len(cache.layers[0].kept[0][0]) == 17


def test_old_keys_do_not_change_when_the_text_grows():
    keys_of = drafts(small_model())["keys_of"]
    for a, b in zip(keys_of([4, 8, 15]), keys_of([4, 8, 15, 16])):
        torch.testing.assert_close(a, b[:3])


# ---------------------------------------------------------------- claims


def test_a_cut_before_the_temperature_keeps_what_it_kept():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.5, -1.0]])
    first = next_distribution(logits, 2.5, top_p=0.8)
    early = next_distribution(logits, 1.0, top_p=0.8)
    late = (early.log() / 2.5).softmax(-1)
    assert (first > 0).sum() > (late > 0).sum() == (early > 0).sum()


def test_operations_are_two_for_each_weight_of_a_matrix_and_token():
    model = small_model()
    weights = sum(w.numel() for n, w in model.named_parameters() if w.dim() == 2 and "emb" not in n)
    ids = torch.ones(2, 5, dtype=torch.long)
    assert ch06.operations(model, ids) == 2 * 10 * weights
    cache = mm.KVCache(model.config, 2)
    model(ids, cache)
    assert ch06.operations(model, ids[:, :1], cache) == 2 * 2 * weights


def test_the_counter_of_operations_puts_everything_back():
    before = torch.nn.functional.linear
    with pytest.raises(ValueError):
        ch06.operations(small_model(), torch.full((1, 2), 99))
    assert torch.nn.functional.linear is before


def test_tokens_are_counted_with_and_without_a_cache():
    model = small_model()
    with ch06.counting(model) as count:
        mm.generate(model, [1, 2, 3], 10)
    assert count["tokens"] == 3 + 10 - 1
    with ch06.counting(model) as count:
        drafts(model)["write_rereading"]([1, 2, 3], 10, torch.argmax)
    assert count["tokens"] == sum(range(3, 13))
    model(torch.ones(1, 4, dtype=torch.long))
    assert count["tokens"] == sum(range(3, 13))  # the meter is off again


def test_time_of_a_token_is_measured_both_ways():
    assert all(0 < ch06.time_of_a_token(small_model(), 20, cached, 2) < 5 for cached in (True, False))


# ---------------------------------------------------------------- helpers and explorer


def test_the_contexts_are_beginnings_of_one_tale():
    assert all(ch06.TALE.startswith(text) for text in ch06.CONTEXTS.values())
    assert parse_tale(ch06.TALE + " ring.").consistent


@pytest.fixture(scope="module")
def shipped():
    return ch06.shipped(), mm.load_tokenizer("tales-dense")


def test_explorer_says_and_draws_what_the_library_gives(shipped):
    model, tokenizer = shipped
    draw = ch06.cuts_explorer(model, tokenizer)
    figure, sentence, data = draw("one of five places", 1.5, 3, "off")
    assert "3 of 960 tokens remain" in sentence
    assert figure.axes[0].get_title() == "3 of 960 tokens remain"
    assert sum(p > 0 for p in data["drawn from"]) == 3
    assert sum(data["drawn from"]) == pytest.approx(1, abs=2e-3)
    logits = ch06.next_logits(model, tokenizer, ch06.CONTEXTS["one of five places"])
    assert data["the model's own"][0] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-4)
    _, sentence, _ = draw("a thing we know", 1.0, "off", 0.5)
    assert "1 of 960 tokens remains" in sentence and "“ ring”" in sentence


def test_the_tail_grows_with_the_temperature(shipped):
    texts = [ch06.TALE + " ring."]
    cold, warm = (ch06.tail_per_token(*shipped, texts, t) for t in (1.0, 1.6))
    assert cold[0] < warm[0] and cold[1] > warm[1] and 0 <= warm[1] <= 1
    everything = ch06.tail_per_token(*shipped, texts, 1.0, rare=1.1)
    assert everything[0] == pytest.approx(1, abs=1e-4)


def test_texts_are_judged_by_the_grammar():
    tale = ch06.TALE + " ring."
    assert ch06.judged([tale, tale, "nonsense", ""])[1] == 3
    assert ch06.judged([tale, "nonsense"])[0] == 0.5
    assert ch06.in_groups([tale] * 3 + ["no"] * 6, size=4) == [3, 0]


def test_pictures_have_the_data_they_show():
    figure, data = ch06.temperatures_picture(torch.tensor([1.0, 3.0, 2.0]), ["b", "c"], [0.5, 2.0])
    assert data["token"] == ["b", "c"]
    assert data["temperature 0.5"][0] == pytest.approx(1 / (1 + math.exp(-2) + math.exp(-4)))
    assert len(figure.axes[0].lines) == 2
    assert len(ch06.line_picture(["a", "b"], torch.tensor([0.4, 0.6]), 0.5).axes[0].patches) >= 2


def test_a_command_says_its_error(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        ch06.command(f"minimistral postcard '{(tmp_path / 'none').as_posix()}' "
                     f"--out '{(tmp_path / 'card.html').as_posix()}'")


def test_a_framed_page_cannot_break_out():
    framed = ch06.Framed('<p title="x">&amp;</p>')._repr_html_()
    assert framed.count("<") == 2 and 'title="The postcard' in framed
