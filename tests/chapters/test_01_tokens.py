"""Chapter 1: its records are sound, its drafts agree with the library, its claims hold."""

import re

import pytest
import story
import torch

import minimistral as mm
from minimistral import tokenizer as library
from minimistral.course import check, judge, ladder, mine, verify
from minimistral.course.chapters import ch01_tokens as ch01
from minimistral.course.records.ch01 import EXERCISES
from minimistral.tokenizer import (
    count_words,
    encode_plain,
    ranks_from_merges,
    train_bpe,
    train_bpe_plain,
)

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
TEXT = "The mountain and the mill. La montagne et le moulin. Der Schlüssel, la clé, 钥匙.\n" * 3
RANKS = ranks_from_merges(train_bpe(count_words([TEXT]), 80))


def draft(name: str, **names):
    return story.drafts(1, name, **names)[name]


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


def learner_returns_the_pair(ids, pair, new_id):
    return [new_id if i in pair else i for i in ids]


def learner_forgets_the_words(text, ranks, pattern=""):
    return [ranks[text.encode()]]


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("merge_pair", learner_returns_the_pair, ""),
        ("merge_pair", lambda ids, pair, new_id: tuple(ids), "merged"),
        ("encode_plain", learner_forgets_the_words, "KeyError"),
        ("count_letters", lambda data: data.decode(), "number"),
        ("whole_letters", lambda pieces: [p.decode() for p in pieces if p], ""),
        ("bigram_loss", lambda counts, ids, added: counts, "shape"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


def pieced_encode(text, ranks, pattern=library.PATTERN):
    return encode_plain(text, ranks, pattern)


def test_mine_reads_its_prompt_with_the_learners_encode_plain():
    model = mine()
    calls = []
    model.pieces = {"tokenizer.encode_plain": lambda *a: calls.append(a[0]) or encode_plain(*a)}
    plain = mm.load_model("tales-dense")
    tokenizer = mm.load_tokenizer("tales-dense")
    ids = tokenizer.encode("The old lantern\n", bos=True)
    new = mm.generate(plain, ids, 12, temperature=0.0, seed=0, stop_ids=(tokenizer.eos_id,))
    assert model.write("The old lantern\n", 12) == "The old lantern\n" + tokenizer.decode(new)
    assert calls == ["The old lantern\n"]
    assert library.FAST and library.encode_plain is encode_plain


def test_the_pieces_of_the_chapter_can_be_saved():
    result = check("encode_plain", pieced_encode)
    assert result.passed and any("It is yours now" in note for note in result.notes)


# ---------------------------------------------------------------- drafts and claims


def test_longest_first_spells_the_word_and_may_cut_it_differently():
    cut = draft("longest_first", ranks=RANKS)
    for word in re.findall(r" ?\w+", TEXT):
        assert b"".join(cut(word)) == word.encode()
    ranks = ranks_from_merges([(98, 99), (97, 98), (97, 256)])  # bc, ab, abc
    assert draft("longest_first", ranks=ranks)("abc") == [b"abc"]
    ranks = ranks_from_merges([(98, 99), (97, 98)])
    assert draft("longest_first", ranks=ranks)("abc") == [b"ab", b"c"]
    assert encode_plain("abc", ranks) == [97, 256]


def test_the_story_by_hand():
    merges = train_bpe_plain({b"anna and hanna": 1}, 3)
    assert merges == [(97, 110), (110, 97), (256, 257)]


def test_beginnings_of_the_merges_are_the_smaller_vocabularies():
    words = count_words([TEXT])
    long, short = train_bpe(words, 60), train_bpe(words, 25)
    assert long[:25] == short
    beginning = ch01.first_tokens(ranks_from_merges(long), 256 + 25)
    assert beginning == ranks_from_merges(short)


def test_parallel_texts_are_what_the_chapter_says():
    assert list(ch01.TEXTS)[:5] == ["English", "French", "German", "Spanish", "Italian"]
    assert " " not in ch01.text_in("Chinese") and ch01.words_in("Chinese") > 40
    words = [ch01.words_in(name) for name in ch01.TEXTS if name != "Python code"]
    assert 40 <= min(words) and max(words) <= 60


def test_tekken_brings_four_languages_close_to_english():
    pytest.importorskip("mistral_common")
    found = ch01.real_vocabularies()
    assert [v.vocab_size for v in found.values()] == [32_000, 131_072]
    costs = {name: dict(zip(ch01.TEXTS, ch01.tokens_per_word(v))) for name, v in found.items()}
    for name in ("French", "German", "Spanish", "Italian"):
        assert costs["Tekken"][name] < costs["Mistral 7B"][name]
        assert costs["Tekken"][name] < 1.25 * costs["Tekken"]["English"]


def test_without_mistral_common_the_chapter_goes_on_and_says_so(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "mistral_common", None)
    assert ch01.real_vocabularies.__wrapped__() == {}
    assert "not installed" in capsys.readouterr().out


# ---------------------------------------------------------------- helpers and explorer


def test_visible_shows_text_or_bytes():
    assert ch01.visible(b" la\n") == " la⏎"
    assert ch01.visible(b"\xc3") == "‹C3›"
    assert ch01.visible("钥".encode()) == "‹E9›‹92›‹A5›"  # not in the picture's font
    assert ch01.visible("é".encode()) == "é"


def test_lines_keep_every_token_and_the_width():
    tokens = [b"The", b" key", b"\n", *[b" word"] * 40]
    lines = ch01.set_in_lines(tokens, width=30)
    assert [i for line in lines for i, _, _ in line] == list(range(len(tokens)))
    assert all(column + len(text) <= 30 for line in lines for _, column, text in line)
    assert len(lines[0]) == 3  # the line break ends it


def test_cut_is_the_text():
    assert b"".join(ch01.cut("Où est la clé ?", RANKS)).decode() == "Où est la clé ?"


def test_explorer_says_what_it_draws():
    merges = train_bpe(count_words([TEXT]), 60)
    draw = ch01.vocabulary_explorer({"ours": merges})
    for size, wanted in ((256, 256), (280, 280), (900, 256 + len(merges))):
        figure, sentence, table = draw("the mountain", "ours", size)
        tokens = ch01.cut("the mountain", ch01.first_tokens(ranks_from_merges(merges), size))
        assert f"With {wanted} tokens" in sentence and f"become {len(tokens)} tokens" in sentence
        assert ("every word of it" in sentence) == (size == 900)
        assert f"become {len(tokens)}" in figure.axes[0].get_title()
        assert len(table["token"]) == len(table["number"])
    assert draw("", "ours", 300)[1].startswith("With 300 tokens of ours: 0 bytes become 0 tokens")


def test_the_size_at_which_a_word_becomes_whole():
    ranks = ranks_from_merges([(97, 98), (256, 99)])
    assert ch01.becomes_whole("abc", ranks) == 258 and ch01.becomes_whole("xyz", ranks) is None
    assert b"abc" in ch01.first_tokens(ranks, 258) and b"abc" not in ch01.first_tokens(ranks, 257)


def test_bigram_of_the_ladder_is_a_table_of_smoothed_counts():
    model = ch01.bigram(torch.tensor([0, 2, 0, 2, 1]), 4)
    shares = model(torch.tensor([[0, 3]])).softmax(-1)[0]
    torch.testing.assert_close(shares[0], torch.tensor([0.1, 0.1, 2.1, 0.1]) / 2.4)
    torch.testing.assert_close(shares[1], torch.full((4,), 0.25))


def test_bigram_of_the_ladder_is_the_recorded_one():
    recorded = next(row for row, own in ladder.rows() if row.name == "bigram" and not own)
    nats = ladder.validation_nats(ch01.bigram()) / len(ladder.corpus.val.encode())
    assert nats == pytest.approx(recorded.loss, rel=1e-5)
