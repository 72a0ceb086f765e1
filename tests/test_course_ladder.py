"""The ladder with a tokenizer trained here: the shipped models are not needed."""

import importlib
import json
from dataclasses import asdict, replace
from random import Random

import pytest
import torch
from course_examples import chapter_99

import minimistral as mm
from minimistral.course.ladder import LONGEST_SENTENCE, Ladder, Row, Standard
from minimistral.tales import sample_tale

SMALL = Standard(n_tales=60, val_tales=5, steps=3, batch_size=4, seq_len=40, samples=6, longest=250)


@pytest.fixture(scope="module")
def board():
    rng = Random(1)
    texts = [sample_tale(rng).text for _ in range(100)]
    return Ladder(SMALL, tokenizer=mm.Tokenizer.train(texts, 400))


@pytest.fixture(scope="module")
def bigram(board):
    """The simplest thing that predicts: a table of pairs, counted."""
    ids, v = board.tokens.ids, board.tokenizer.vocab_size
    counts = torch.full((v, v), 0.01)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    table = (counts / counts.sum(1, keepdim=True)).log()
    return lambda ids: table[ids]


class Perfect:
    """Knows the validation tales by heart: probability 1 for the next token of each."""

    def __init__(self, board):
        self.documents = board.tokenizer.encode_batch(board.corpus.val_documents, bos=True, eos=True)
        self.size = board.tokenizer.vocab_size

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, self.size)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                start = t if row[t] == 1 else start
                for document in self.documents:
                    if document[: t + 1 - start] == row[start : t + 1] and t + 1 - start < len(document):
                        logits[b, t, document[t + 1 - start]] = 50
        return logits


def test_the_loss_is_total_nats_per_byte(board):
    uniform = board.validation_nats(lambda ids: torch.zeros(*ids.shape, board.tokenizer.vocab_size))
    tokens = sum(len(ids) + 1 for ids in board.tokenizer.encode_batch(board.corpus.val_documents))
    assert uniform == pytest.approx(tokens * torch.tensor(board.tokenizer.vocab_size).log().item(), rel=1e-5)


def test_knowing_everything_costs_what_chance_decides(board):
    nats = board.validation_nats(Perfect(board))
    assert nats < 5 * 5 * 3  # at most the choice between five tales wherever they part


def test_samples_are_reproducible_and_given_up_when_lost(board, bigram):
    first, second = (board.write(bigram, [""] * 6) for _ in range(2))
    assert first == second and len(set(first)) > 1
    assert board.write(bigram, [""] * 6, seed=1) != first


def test_a_lost_sample_stops_long_before_the_end():
    rng = Random(2)
    texts = [sample_tale(rng).text for _ in range(100)]
    board = Ladder(Standard(samples=2, longest=2000), tokenizer=mm.Tokenizer.train(texts, 300))
    letter = board.tokenizer.encode("a")[0]
    logits = torch.full((board.tokenizer.vocab_size,), -50.0)
    logits[letter] = 50
    text = board.write(lambda ids: logits.expand(*ids.shape, -1), [""])[0]
    assert set(text) == {"a"} and LONGEST_SENTENCE < len(text) <= LONGEST_SENTENCE + 10


def test_no_sentence_of_the_tales_is_longer_than_the_limit():
    rng = Random(3)
    for _ in range(300):
        text = sample_tale(rng).text
        assert max(map(len, text.replace("\n", ". ").split(". "))) < LONGEST_SENTENCE


def test_memorised_tales_parse(board):
    perfect = Perfect(board)
    assert board.write(perfect, ["", ""])[0] in board.corpus.val_documents


def test_fit_trains_and_a_transformer_uses_its_cache(board):
    torch.manual_seed(0)
    config = mm.ModelConfig(dim=12, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=4, hidden_dim=16,
                            vocab_size=board.tokenizer.vocab_size)
    model = mm.Transformer(config)
    board = Ladder(replace(SMALL, longest=30, samples=2), tokenizer=board.tokenizer)
    losses = board.fit(model, steps=12)
    assert len(losses) == 12 and losses[-1] < losses[0]
    row = board.measure("tiny", model, chapter=4)
    assert row.floor < row.loss and row.sample.startswith(SMALL.prompt)


def test_fit_is_reproducible(board):
    def trained():
        torch.manual_seed(0)
        v = board.tokenizer.vocab_size
        model = torch.nn.Sequential(torch.nn.Embedding(v, 6), torch.nn.Linear(6, v))
        return board.fit(model)

    assert trained() == trained()


def test_the_board_keeps_the_learners_rows_and_marks_the_newest(board, bigram, chapter_99, monkeypatch):
    module = importlib.import_module("minimistral.course.ladder")
    recorded = chapter_99.parent / "ladder.json"
    monkeypatch.setattr(module, "_recorded", lambda path=recorded: _read(path))
    board.record(Row("bigram, counted", 1, 1.5, 0.4, 0.0, "The hat"), "a command", recorded)
    board.run("my bigram", bigram, chapter=1)
    shown = board.run("my bigram", bigram, chapter=1)
    assert [(row.name, mine) for row, mine in board.rows()] == [("bigram, counted", False), ("my bigram", True)]
    assert "recorded" in str(shown) and "yours" in str(shown) and "my bigram writes:" in str(shown)
    assert shown.marked_row == 1
    provenance = json.loads(recorded.read_text("utf-8"))["rows"][0]["provenance"]
    assert {"date", "command", "standard", "torch", "machine"} <= set(provenance)


def test_a_chapter_shows_nothing_that_a_later_one_asks_for_a_guess_first(board, bigram, chapter_99, monkeypatch):
    module = importlib.import_module("minimistral.course.ladder")
    rows = [asdict(Row(name, chapter, 1.0, 0.4, 0.0, "The hat")) for name, chapter in (
        ("early", 2), ("the shipped one", 6), ("late", 8))]
    monkeypatch.setattr(module, "_recorded", lambda path=None: rows)
    board.run("mine of chapter 9", bigram, chapter=9)
    shown = str(board.run("mine of chapter 3", bigram, chapter=3))
    assert "early" in shown and "the shipped one" in shown and "mine of chapter 9" in shown
    assert "late" not in shown and "late" in str(board())


def _read(path):
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []


def test_an_empty_board_says_so(chapter_99, monkeypatch):
    module = importlib.import_module("minimistral.course.ladder")
    monkeypatch.setattr(module, "_recorded", lambda path=None: [])
    assert "No row yet" in str(Ladder()())
