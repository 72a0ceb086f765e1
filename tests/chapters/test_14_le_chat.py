"""Chapter 14: its records are sound, its helpers and its explorer say what is so, its claims hold."""

import json
import random
import socket

import pytest
import torch

import minimistral as mm
from minimistral.batching import Job, Seating
from minimistral.course import judge, swap, verify
from minimistral.course.chapters import ch14_le_chat as ch14
from minimistral.course.records.ch14 import EXERCISES
from minimistral.engine import Engine
from minimistral.streaming import TextStream, cut_at_stop, whole_characters

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("whole_characters", lambda raw: raw.decode("utf-8", "replace"), "tuple of 2"),
        ("whole_characters", lambda raw: ("", raw, False), "2 elements"),
        ("cut_at_stop", lambda text, stops: (text, "", None), "xpected"),
        ("cut_at_stop", lambda text, stops: text, "tuple of 3"),
        ("as_events", lambda pieces, reason: pieces, "str"),
        ("as_events", lambda pieces, reason: "data: [DONE]\n\n", "Event 0"),
        ("bill", lambda prompt_ids, new_ids, limit, stop_ids: "stop", "tuple of 4"),
        ("read_text", lambda chunks: "", "xpected"),
        ("write_all", lambda paper, prompts, limits: [], "xpected"),
        ("keep_the_first", lambda messages, longest, count: messages[:2], "xpected"),
        ("choose_each", lambda logits, temperatures, generators: torch.zeros(len(logits)).long(), "xpected"),
        ("nearest", lambda query, vectors, k: [], "xpected"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


# ---------------------------------------------------------------- the pieces in the library


def test_every_cut_of_a_text_gives_the_text():
    chance = random.Random(14)
    raw = "Où est la clé ? 日本 🙂 ß".encode() + b"\xff ok"
    for _ in range(50):
        text, waits, at = "", b"", 0
        while at < len(raw):
            size = chance.randint(1, 5)
            piece, waits = whole_characters(waits + raw[at:at + size])
            text, at = text + piece, at + size
            assert len(waits) <= 3
        assert text + waits.decode("utf-8", "replace") == raw.decode("utf-8", "replace")


def test_what_was_shown_is_the_text_before_the_first_stop_however_it_is_cut():
    chance = random.Random(15)
    for _ in range(300):
        text = "".join(chance.choice("abc") for _ in range(12))
        stops = ["".join(chance.choice("abc") for _ in range(chance.randint(2, 3))) for _ in range(2)]
        shown, held, stopped, at = "", "", False, 0
        while at < len(text) and not stopped:
            size = chance.randint(1, 4)
            piece, held, stopped = cut_at_stop(held + text[at:at + size], stops)
            shown, at = shown + piece, at + size
        # A stop that is complete ends the text, although a longer one that began earlier might have come.
        ends = [text.find(stop) for stop in stops if stop in text]
        assert stopped == bool(ends)
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown) and (stopped or shown + held == text)


def test_pieces_of_the_learner_run_in_the_stream():
    seen = []

    def my_characters(raw):
        seen.append(raw)
        return whole_characters(raw)

    def my_cut(text, stops):
        return text.upper(), "", False

    tokenizer = mm.load_tokenizer("tales-dense")
    with swap({"streaming.whole_characters": my_characters, "streaming.cut_at_stop": my_cut}):
        stream = TextStream(tokenizer)
        said = "".join(stream.feed(i) for i in tokenizer.encode("clé"))
    assert said == "CLÉ" and seen
    assert TextStream(tokenizer).feed(tokenizer.encode("a")[0]) == "a"


# ---------------------------------------------------------------- helpers


def test_the_watch_sees_hosts_and_no_more_after_its_end():
    with ch14.Watch() as watch, socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    assert watch.hosts == {"127.0.0.1"}
    with ch14.Watch() as other:
        pass
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    assert other.hosts == set() and len(watch.hosts) == 1


def test_the_first_word_is_the_way_and_the_reading():
    assert ch14.first_word(1e9, 100, 1e12) == pytest.approx(0.2)
    assert ch14.first_word(1e9, 100, 1e12, trip=0.05) == pytest.approx(0.25)


def simulated(requests, places, continuous):
    """Step by step, with nothing clever: (begin, end) of each request."""
    left, begun, ended = {}, {}, {}
    waiting, now, blocked = [i for i in range(len(requests))], 0, set()
    while waiting or left:
        if not left:
            blocked = set()
        room = places - len(left) - len(blocked)
        if continuous or not (left or blocked):
            for i in [i for i in waiting if requests[i][0] <= now][:room]:
                left[i], begun[i] = requests[i][1], now
                waiting.remove(i)
        now += 1
        for i in list(left):
            left[i] -= 1
            if not left[i]:
                ended[i] = now
                del left[i]
                if not continuous:
                    blocked.add(i)
    return [(begun[i], ended[i]) for i in range(len(requests))]


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("places", [2, 4, 8])
def test_the_schedule_is_what_a_simulation_step_by_step_gives(places, continuous):
    for every in ch14.ARRIVALS.values():
        for lengths in ch14.LENGTHS.values():
            requests = [(i * every, n) for i, n in enumerate(lengths)]
            plan = ch14.schedule(requests, places, continuous)
            assert [(b, e) for _, b, e in plan] == simulated(requests, places, continuous)
            for i, one in enumerate(plan):                        # nobody shares a place
                assert not any(one[0] == p and one[1] < e and b < one[2]
                               for j, (p, b, e) in enumerate(plan) if j != i)


def test_the_schedule_is_the_library_loops():
    """The explorer's continuous batching is what Seating does: the same begins and ends."""
    lengths = (6, 3, 10, 2, 4, 8)
    plan = ch14.schedule([(0, n) for n in lengths], 2, True)

    class Paper:                                                  # an engine that counts
        batch_size = 2

        def __init__(self):
            self.seats = {}

        def admit(self, prompt, *, max_new_tokens):
            place = min({0, 1} - set(self.seats))
            self.seats[place] = max_new_tokens
            return place

        def step(self):
            out = {}
            for place in list(self.seats):
                self.seats[place] -= 1
                out[place] = 7
            return out

    seating, begun = Seating(Paper()), {}
    jobs = [Job([i], n, lambda news: None) for i, n in enumerate(lengths)]
    seating.waiting.extend(jobs)
    for step in range(40):
        for place, job in list(seating.seated.items()):           # no round is lost for the end's None
            if job.written == job.limit:
                del seating.seated[place], seating.engine.seats[place]
        seating.round()
        for job in seating.seated.values():
            begun.setdefault(job.prompt_ids[0], step)
    assert [begun[i] for i in range(len(lengths))] == [b for _, b, _ in plan]


@pytest.mark.parametrize("lengths", ch14.LENGTHS)
@pytest.mark.parametrize("places", [2, 8])
def test_the_explorer_says_both_numbers(lengths, places):
    figure, sentence, table = ch14.batch_explorer(lengths, "all at once", places)
    requests = [(0, n) for n in ch14.LENGTHS[lengths]]
    static, continuous = (ch14.figures_of(requests, ch14.schedule(requests, places, way))[0]
                          for way in (False, True))
    assert f"takes {static} steps" in sentence and f"takes {continuous} with" in sentence
    assert static >= continuous and len(table["request"]) == 12


def test_paper_texts_depend_on_all_that_was_read():
    assert ch14.alone([1, 2, 3], 5) != ch14.alone([1, 3, 2], 5) != ch14.alone([9, 1, 3, 2], 5)
    paper = ch14.PaperModel(2)
    paper.read(1, [1, 2, 3])
    first = paper.next_ids()
    assert first[0] is None and first[1] == ch14.alone([1, 2, 3], 1)[0]


# ---------------------------------------------------------------- claims


def test_a_newcomer_sees_nothing_of_who_sat_there_before():
    model, tokenizer = mm.load_model("tales-moe"), mm.load_tokenizer("tales-moe")
    ids = tokenizer.encode("The golden ring\n", bos=True)
    alone = mm.generate(model, ids, 20)
    engine = Engine(mm.load_model("tales-moe"), 2, 128, compile=False, progress=False)
    engine.generate([ids, ids], 80, temperature=1.0, seed=1)
    assert engine.generate(ids, 20) == alone


def test_the_recorded_run_has_its_provenance_and_reaches_three_times():
    rows = ch14.recorded()
    ours = {name: row for name, row in rows.items() if "1 thread" in name}
    assert {name.partition(",")[0] for name in ours} == {"tales-dense", "S", "M"}
    for row in ours.values():
        assert row["ratio"] >= 3
        assert {"date", "command", "torch", "cores", "commit", "load_average"} <= set(row["provenance"])
        assert row["gate"]["texts_equal"] + len(row["gate"]["tied_by"]) == 8
        assert row["the_same_texts_in_every_round"]
        for clients, rates in row["rate_samples"].items():
            assert len(rates) >= 3 and min(rates) <= row["tokens_per_second"][clients] <= max(rates)
    assert len(json.dumps(rows)) > 3000
