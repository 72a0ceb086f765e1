"""Chapter 0: its two exercises, its two pictures, the machine's report and the map."""

from dataclasses import replace
from random import Random

import pytest
import torch

from minimistral import Tokenizer, Transformer, doctor
from minimistral.config import ModelConfig
from minimistral.course import judge, verify
from minimistral.course.chapters import ch00_start_here as ch00
from minimistral.course.exercises import chapter_exercises
from minimistral.course.explorers import render
from minimistral.course.syllabus import CHAPTERS
from minimistral.tales import parse_tale, sample_tale

EXERCISES = {exercise.name: exercise for exercise in chapter_exercises(0)}
TALE = ("The red lantern\nHugo found a red lantern at the lake. Clara was at the market. "
        "Hugo left the lantern at the lake. Hugo went to the market and saw Clara there. "
        "The lantern is still at the lake.")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([sample_tale(Random(seed)).text for seed in range(150)], 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return Transformer(ModelConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8,
                                   hidden_dim=16, vocab_size=tokenizer.vocab_size))


# ---------------------------------------------------------------- exercises


@pytest.mark.parametrize("name", EXERCISES)
def test_record_is_sound(name):
    assert verify(EXERCISES[name]) == []


def test_the_given_mistake_is_named_and_its_number_shown():
    def share_of_tales(texts):
        count = sum(parse_tale(text).ok for text in texts)
        return count // len(texts)

    result = judge(EXERCISES["share_of_tales"], share_of_tales)
    assert result.matched == "unchanged"
    assert "Expected 0.7143, got 0." in result.message


# ---------------------------------------------------------------- the machine


def test_the_report_has_a_line_for_each_need_and_names_no_folder():
    panel = ch00.machine()
    names = [row[0] for row in panel.table[1]]
    assert {"Python", "torch", "device", "memory", "kernel", "work folder"} <= set(names)
    assert "transformers" not in names
    for name, status, details in panel.table[1]:
        assert status != doctor.OK or not set("/\\") & set(details), (name, details)


def test_what_is_missing_is_said_first_with_its_repair():
    finding = doctor.Finding("tiktoken", doctor.MISSING, "not installed", "Install it")
    panel = ch00._report([doctor.Finding("torch", doctor.OK, "2.13"), finding])
    assert "tiktoken" in panel.heading and panel.tone == "bad"
    assert panel.table[1][1] == ("tiktoken", "MISSING", "not installed. Install it.")


@pytest.mark.parametrize("detail, shown", [
    ("3.11.2 at /usr/bin/python3", "3.11.2"),
    ("12.3 GiB free at C:\\Users\\me\\work", "12.3 GiB free"),
    ("python3 is /opt/venv/bin/python", "python3"),
    ("/home/me/work can be written", "can be written"),
    ("cpu, 2 threads; enough for the course", "cpu, 2 threads; enough for the course"),
])
def test_folders_are_left_out(detail, shown):
    assert ch00._details(doctor.Finding("x", doctor.OK, detail)) == shown


# ---------------------------------------------------------------- text as a picture


def test_lines_break_between_words_and_lose_nothing(tokenizer):
    tokens = ch00.text_of_each(tokenizer, tokenizer.encode(TALE))
    assert "".join(tokens) == TALE
    placed = ch00.set_in_lines(tokens, width=40)
    lines: dict[int, str] = {}
    for line, column, text in placed:
        assert column == len(lines.get(line, ""))
        lines[line] = lines.get(line, "") + text
    assert max(map(len, lines.values())) <= 40
    assert " ".join(line.strip() for line in lines.values()) == TALE.replace("\n", " ")


def test_a_letter_of_several_tokens_belongs_to_its_last(tokenizer):
    ids = tokenizer.encode("ж→é")
    assert len(ids) > 3 and "".join(ch00.text_of_each(tokenizer, ids)) == "ж→é"


def test_the_tokens_of_a_word_are_found(tokenizer):
    tokens = ch00.text_of_each(tokenizer, tokenizer.encode(TALE))
    places = ch00.places_of(tokens, "lake")
    assert "".join(tokens[i] for i in places).replace(" ", "") == "lakelakelake"
    assert ch00.places_of(tokens, "lak") == []


# ---------------------------------------------------------------- temperature


def test_at_temperature_0_every_token_is_the_likeliest(model, tokenizer):
    told = ch00.tell_tale(model, tokenizer, "The red hat", 0.0, seed=0)
    assert told.drawn == []
    hot = ch00.tell_tale(model, tokenizer, "The red hat", 2.0, seed=0)
    assert hot.drawn and hot.tokens != told.tokens
    assert "".join(hot.tokens).startswith("The red hat\n") and len(hot.share) == len(hot.tokens)


def test_the_verdict_says_what_happened(model, tokenizer):
    told = replace(ch00.tell_tale(model, tokenizer, "The red hat", 1.0, seed=0),
                   broken_at=None, lie="", ended=True, drawn=[3])
    assert told.verdict().startswith("a tale; 1 of")
    assert replace(told, drawn=[]).verdict() == "a tale, and every token is the likeliest one"
    assert replace(told, lie="Anna has it.").verdict() == "a tale, but it does not add up"
    assert replace(told, broken_at=7).verdict() == "after 7 tokens it is no tale any more"
    assert replace(told, broken_at=0).verdict() == "the grammar knows no such title"
    for at in (None, 190):
        assert replace(told, ended=False, broken_at=at).verdict().startswith("no end within")


def test_the_place_where_a_tale_breaks(tokenizer):
    broken = TALE + " The lantern dances."
    tokens = ch00.text_of_each(tokenizer, tokenizer.encode(broken))
    at = ch00.token_at(tokens, parse_tale(broken).error_at)
    assert len("".join(tokens[:at])) <= parse_tale(broken).error_at < len("".join(tokens[: at + 1]))
    assert ch00.token_at(tokens, 10**6) == len(tokens) - 1


@pytest.mark.parametrize("setting", [
    {"temperature": 0.0, "model": "a", "title": "The red hat", "tale": 0},
    {"temperature": 2.0, "model": "a", "title": "", "tale": 3},
    {"temperature": 1.0, "model": "a", "title": "Œuf → ж $x$", "tale": 1},
])
def test_the_explorer_draws_every_setting(model, tokenizer, setting):
    page, sentence = render(ch00.tale_explorer({"a": model}, tokenizer), setting)
    assert "<img" in page and sentence.startswith(f"a at temperature {setting['temperature']:.1f}")


# ---------------------------------------------------------------- one look


def test_the_best_look_is_the_best(model, tokenizer):
    text = TALE[: -len(" lake.")]
    look = ch00.best_look(model, tokenizer, text, "lake")
    maps = ch00.attention_maps(model, tokenizer.encode(text, bos=True))[:, :, -1]
    places = [1 + i for i in ch00.places_of(look.tokens, "lake")]
    assert look.on_word == pytest.approx(maps[..., places].sum(-1).max().item())
    assert len(look.weights) == len(look.tokens)
    assert torch.equal(look.weights, maps[look.layer, look.head, 1:])
    assert len(ch00.look_table(look)["token"]) == 8
    assert ch00.look_picture(look, "The last token looks back").axes


def test_the_tale_of_the_chapter_is_a_tale_that_adds_up():
    parse = parse_tale(TALE)
    assert parse.ok and parse.consistent and parse.holders == {"lantern": "lake"}


# ---------------------------------------------------------------- the map


def test_the_map_says_what_is_there_and_where_to_go():
    panel = ch00.course_map()
    assert [row[1] for row in panel.table[1]] == [c.title for c in CHAPTERS]
    assert f'href="{CHAPTERS[1].name}.ipynb"' in panel.extra_html


def test_a_course_of_chapter_0_alone_has_no_next():
    assert not ch00.course_map(CHAPTERS[:1]).extra_html
