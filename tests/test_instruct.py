"""Chat formats against Mistral's own library, learning from answers, scores."""

import math
import pathlib
from random import Random

import pytest
import torch

import minimistral as mm
from minimistral.instruct import (
    IGNORE,
    answer_rows,
    answers,
    check_conversation,
    encode_chat,
    fine_tune,
    last_answer,
    option_nats,
    score_interval,
    tuning_batch,
)
from minimistral.preference import Preference, answer_log_probs, dpo_loss, learn_preferences
from minimistral.questions import (
    ASK, KINDS, NOT_TOLD, REQUESTS, as_conversation, ask, ask_about, ask_many, facts, interview, is_right,
    retold, shared)
from minimistral.tales import parse_tale, sample_tale
from minimistral.tales_plot import PRONOUN
from minimistral.tales_text import forms, render, write
from minimistral.tales_words import GENDER, NOUNS, PHRASES, PLACES
from minimistral.tokenizer import Tokenizer
from minimistral.train import TrainConfig, next_token_nats


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CHATS = {
    "one question": [user("Who has the key?")],
    "two turns": [user("Hello"), assistant("Hi there"), user("Bye")],
    "with a system message": [system("SYS"), user("Hello")],
    "system and two turns": [system("Be  brief."), user("Hello"), assistant("Hi"), user("Où est-elle ?\n")],
    "spaces and signs": [user(" two  spaces "), assistant("x = [INST] </s> 1  "), user("日本 🙂")],
    "answered": [user("Hello"), assistant("Hi"), user("Bye"), assistant("So long")],
}


# ---------------------------------------------------------------- as Mistral's library writes it


@pytest.fixture(scope="module")
def data():
    return pathlib.Path(pytest.importorskip("mistral_common").__file__).parent / "data"


OURS = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v3 Tekken": "tekken_240718.json",
}


def theirs(version):
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    makers = {"v1": MistralTokenizer.v1, "v2": MistralTokenizer.v2, "v3": MistralTokenizer.v3,
              "v7": MistralTokenizer.v7, "v3 Tekken": lambda: MistralTokenizer.v3(is_tekken=True)}
    return makers[version]()


@pytest.mark.parametrize("version", OURS)
def test_chats_have_mistral_commons_ids(version, data):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    ours, their = Tokenizer.load(data / OURS[version]), theirs(version)
    for name, messages in CHATS.items():
        if messages[-1]["role"] == "assistant":
            continue                                   # they encode what is to be answered
        request = ChatCompletionRequest(messages=messages)
        assert encode_chat(ours, messages)[0] == their.encode_chat_completion(request).tokens, name


@pytest.mark.parametrize("version", OURS)
def test_the_answers_are_what_is_learned(version, data):
    tokenizer = Tokenizer.load(data / OURS[version])
    ids, learned = encode_chat(tokenizer, CHATS["answered"])
    words = tokenizer.encode("Hi", eos=True) + tokenizer.encode("So long", eos=True)
    assert [token for token, yes in zip(ids, learned) if yes] == words
    asked, none = encode_chat(tokenizer, CHATS["answered"][:1])
    assert ids[: len(asked)] == asked and not any(none)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one"),
        ([system("x")], "one from the user"),
        ([assistant("x")], "message 0 is from the assistant"),
        ([user("x"), user("y")], "message 1 is from the user"),
        ([system("x"), user("x"), system("y")], "message 2 is from the system"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "user", "content": None}], "message 0 must have its text"),
    ],
)
def test_what_is_no_conversation_is_named(messages, said):
    with pytest.raises(ValueError, match=said):
        check_conversation(messages)


def test_a_tokenizer_without_the_marks_is_named(data):
    first = Tokenizer.load(data / OURS["v1"])
    first.version = "v3"
    with pytest.raises(ValueError, match=r"has no \[INST\]"):
        encode_chat(first, CHATS["one question"])


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize("kind", [*KINDS, *REQUESTS])
@pytest.mark.parametrize("language", ["en", "fr", "de", "es", "it"])
def test_every_question_has_its_answer(kind, language):
    rng = Random(3)
    for _ in range(30):
        question = ask(rng, kind, language)
        assert question.kind == kind and question.language == language
        assert is_right(question, question.answer)
        assert not is_right(question, question.answer + " And then?")
        assert question.conversation[-1]["content"] == question.answer


def test_answers_agree_with_what_the_tale_says():
    rng = Random(8)
    for _ in range(200):
        question = ask(rng, "who", "en")
        said = f"Now {question.answer}" if " has " in question.answer else question.answer
        assert parse_tale(f"{question.told} {said}").consistent, question


@pytest.mark.parametrize("language", ["en", "fr", "de", "es", "it"])
def test_where_agrees_with_who_has_it_and_where_they_are(language):
    rng = Random(9)
    for _ in range(40):
        tale = sample_tale(rng, language)
        for thing in tale.holders:
            place = forms(language, "place", "in")[tale.places.get(tale.holders[thing], tale.holders[thing])]
            answers_to = {q.answer for q in (ask_about(tale, "where", rng) for _ in range(12))}
            assert any(place in text for text in answers_to), (thing, answers_to)
        who, at = rng.choice(sorted(tale.places.items()))
        said = {ask_about(tale, "person", rng).answer for _ in range(20)}
        assert all(forms(language, "place", "in")[at] in text for text in said if text.startswith(who))


def changed(events, n, slot, value):
    """The decisions of a tale, one of them another: None if it has none of that name, or that one."""
    if slot not in events[n] or events[n][slot] == value:
        return None
    return [{**event, slot: value} if i == n else event for i, event in enumerate(events)]


@pytest.mark.parametrize("language", ["en", "fr", "de", "es", "it"])
def test_a_tale_ends_in_every_way_that_adds_up_and_in_no_other(language):
    rng, refused, accepted = Random(11), 0, 0
    for _ in range(60):
        tale = sample_tale(rng, language)
        question = ask_about(tale, "end", rng)
        assert question.asked == ASK["end"][language] and is_right(question, question.answer)
        held = {thing: who for thing, who in tale.holders.items() if who in GENDER}
        for thing, who in held.items():                        # another end, as true
            for other in tale.places:
                said = render(language, {"kind": "end_held", "variant": 0, "who": other, "thing": thing})
                assert is_right(question, said) == (other == who), (question, said)
                accepted += other == who
                refused += other != who
        for thing, at in tale.holders.items():
            for place in PLACES:
                said = render(language, {"kind": "end_lying", "variant": 1, "thing": thing, "place": place})
                assert is_right(question, said) == (at == place), (question, said)
                refused += at != place
        unknown = rng.choice([noun for noun in NOUNS if noun not in tale.holders])
        other = "de" if language == "fr" else "fr"
        last = tale.events[-1]
        for said in (render(language, {**last, "thing": unknown}), render(other, last), question.told, "",
                     render(language, tale.events[-2]) if len(tale.events) > 3 else " ", NOT_TOLD,
                     question.answer + " ", " " + question.answer, question.answer[:-1], question.answer * 2,
                     f"{question.answer} {question.answer}", tale.text):
            assert not is_right(question, said), (question, said)
            refused += 1
    assert refused > 500 and accepted > 20


def test_a_tale_may_go_on_before_it_ends():
    tale = sample_tale(Random(6), "en")
    question = ask_about(tale, "end", Random(0))
    assert is_right(question, "It was raining. " + question.answer)
    assert not is_right(question, "It was raining.")


@pytest.mark.parametrize("language", ["en", "fr", "de", "es", "it"])
def test_a_retelling_says_the_same_in_the_other_language(language):
    rng, refused, others = Random(12), 0, 0
    new = retold(language)
    assert new != language
    for _ in range(40):
        tale = sample_tale(rng, language)
        question, events = ask_about(tale, "retell", rng), list(tale.events[:-1])
        assert is_right(question, question.answer) and question.answer == write(new, events)
        assert parse_tale(question.answer).events[0]["language"] == new
        wrong = [events[:n] + events[n + 1:] for n in range(2, len(events))]          # an event left out
        wrong += [events + [tale.events[-1]], events + [events[-1]], events[:1], [*events[:2], *events[:1:-1]]]
        for n, event in enumerate(events):
            for slot, values in (("who", GENDER), ("whom", GENDER), ("place", PLACES), ("thing", NOUNS)):
                value = rng.choice(list(values))
                wrong += [changed(events, n, slot, value)]
            ways = range(len(PHRASES[new][event["kind"]]))
            for way in ways:                                    # other words, and a pronoun for a name
                said = write(new, changed(events, n, "variant", way) or events)
                by_pronoun = {way, event["variant"]} & {PRONOUN.get(event["kind"])} and way != event["variant"]
                if not by_pronoun:
                    assert is_right(question, said), (question, said)
                    others += said != question.answer
                elif said != question.answer:
                    assert not is_right(question, said), (question, said)
        texts = [write(new, one) for one in wrong if one not in (None, events)]
        texts = [said for said in texts if said != question.answer]        # "she" is not told from another she
        texts += [write(other, events) for other in ("en", "fr", "de", "es", "it") if other != new]
        texts += [question.answer + "x", question.answer + " ", " " + question.answer, question.answer[:-1],
                  question.answer.replace("\n", " "), question.answer.replace("\n", "\n\n"), "", NOT_TOLD]
        for said in texts:
            assert not is_right(question, said), (question, said)
        refused += len(texts)
    assert refused > 500 and others > 100


def test_facts_are_the_same_in_every_language():
    tale = sample_tale(Random(2), "en")
    told = {language: parse_tale(write(language, list(tale.events))) for language in ("en", "fr", "de", "es", "it")}
    assert all(one.consistent and facts(one.events) == facts(tale.events) for one in told.values())


def test_questions_are_drawn_by_their_seed():
    some, again, others = ask_many(60, 1), ask_many(60, 1), ask_many(60, 2)
    assert some == again and len({q.prompt for q in some}) == 60
    assert len(shared(some, again)) == 60 and len(shared(some, others)) < 5
    with pytest.raises(ValueError, match="choose one of who"):
        ask(Random(0), "why")


def test_an_interview_tells_its_tale_once():
    rng = Random(4)
    for _ in range(60):
        talk = interview(rng, 7)
        messages = as_conversation(talk)
        check_conversation(messages)
        words = "".join(message["content"] for message in messages)
        told = {question.told for question in talk if question.told}
        assert len(told) <= 1 and all(words.count(tale) == 1 for tale in told)
        assert len({question.asked for question in talk}) == len(talk)


# ---------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def tokenizer():
    return mm.load_tokenizer("tales-dense")


@pytest.fixture
def small(tokenizer):
    torch.manual_seed(0)
    return mm.Transformer(mm.ModelConfig(dim=24, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=8, hidden_dim=40,
                                         vocab_size=tokenizer.vocab_size))


def test_only_answers_are_targets_and_padding_is_nothing(tokenizer, small):
    chats = [CHATS["answered"], ask(Random(0), "who").conversation, [user("a"), assistant("b")]]
    rows = answer_rows(tokenizer, chats)
    for r, chat in enumerate(chats):
        ids, learned = encode_chat(tokenizer, chat)
        n = len(ids) - 1
        assert rows.inputs[r, :n].tolist() == ids[:-1]
        wanted = [ids[t + 1] if learned[t + 1] else IGNORE for t in range(n)]
        assert rows.targets[r].tolist() == wanted + [IGNORE] * (rows.inputs.shape[1] - n)
        assert rows.positions[r].tolist() == [*range(n)] + [-1] * (rows.inputs.shape[1] - n)
    together = next_token_nats(small(rows.inputs), rows.targets)
    alone = sum(next_token_nats(small(one.inputs), one.targets)
                for one in (answer_rows(tokenizer, [chat]) for chat in chats))
    torch.testing.assert_close(together, alone)


def test_every_round_has_all_rows_in_an_order_of_its_own(tokenizer):
    rows = answer_rows(tokenizer, [q.conversation for q in ask_many(10, 4)])
    config = TrainConfig(steps=5, batch_size=4)
    seen = [row for step in range(5) for row in _which(tuning_batch(rows, step, config)[0], rows)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    longest = int((rows.positions[seen[:4]] >= 0).sum(1).max())
    inputs, targets = tuning_batch(rows, 0, config)
    assert inputs.shape == targets.shape == (4, longest)


def _which(inputs, rows):
    width = inputs.shape[1]
    return [next(i for i, row in enumerate(rows.inputs) if torch.equal(row[:width], one)) for one in inputs]


def test_a_tuned_model_answers_what_it_learned(tokenizer, small):
    questions = ask_many(6, 5, kind="untold", language="en")
    rows = answer_rows(tokenizer, [q.conversation for q in questions])
    losses = fine_tune(small, rows, TrainConfig(steps=60, batch_size=6, lr=1e-2, warmup_steps=5))
    assert losses[-1] < 0.1 * losses[0] and not small.training
    said = answers(small, tokenizer, [q.messages for q in questions], 20)
    assert said == [q.answer for q in questions]


def test_a_loss_that_is_no_number_stops(tokenizer, small):
    rows = answer_rows(tokenizer, [CHATS["answered"]])
    with torch.no_grad():
        small.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is nan at step 0"):
        fine_tune(small, rows, TrainConfig(steps=2, batch_size=1))


# ---------------------------------------------------------------- scores


@torch.no_grad()
def test_options_are_scored_as_whole_answers(tokenizer, small):
    for before in ([], [user("x"), assistant("y z")]):
        messages = [*before, user("Who has the key?")]
        options = ["Anna.", "Hugo has it.", "Nobody."]
        nats = option_nats(small, tokenizer, messages, options)
        prompt, _ = encode_chat(tokenizer, messages)
        for option, given in zip(options, nats):
            whole = tokenizer.encode(option, eos=True)
            ids = torch.tensor([prompt + whole])
            said = small(ids[:, :-1]).log_softmax(-1)[0, len(prompt) - 1:]
            wanted = -said.gather(1, torch.tensor(whole)[:, None]).sum()
            assert given == pytest.approx(wanted.item(), rel=1e-4)


def test_the_last_answer_alone_is_kept():
    targets = torch.tensor([IGNORE, 5, 6, IGNORE, IGNORE, 7, 8, IGNORE])
    assert last_answer(targets).tolist() == [IGNORE] * 5 + [7, 8, IGNORE]
    assert last_answer(targets[:4]).tolist() == [IGNORE, 5, 6, IGNORE]


def test_intervals_hold_the_true_share_as_often_as_they_say():
    low, high = score_interval(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-4) and high == pytest.approx(0.9448, abs=1e-4)
    assert score_interval(0, 20)[0] == 0 and score_interval(20, 20)[1] == pytest.approx(1)
    rng, hits = Random(0), 0
    for _ in range(2_000):
        low, high = score_interval(sum(rng.random() < 0.9 for _ in range(80)), 80)
        hits += low <= 0.9 <= high
    assert 0.93 < hits / 2_000 < 0.975
    with pytest.raises(ValueError, match="3 right answers of 2"):
        score_interval(3, 2)


# ---------------------------------------------------------------- preferences


def test_the_loss_begins_at_ln_2_and_falls_when_the_better_rises():
    better, worse = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -2.0])
    assert dpo_loss(better, worse, better, worse).item() == pytest.approx(math.log(2))
    up = dpo_loss(better + 2, worse - 1, better, worse, beta=0.5).item()
    assert up == pytest.approx(math.log1p(math.exp(-1.5)))
    assert dpo_loss(better - 1, worse - 1, better, worse).item() == pytest.approx(math.log(2))


def test_the_answers_log_probability_is_minus_their_nats(tokenizer, small):
    messages, options = [user("Who has the key?")], ["Anna.", "Hugo has it.", "Nobody."]
    rows = answer_rows(tokenizer, [[*messages, assistant(text)] for text in options])
    with torch.no_grad():
        said = answer_log_probs(small, rows)
    assert (-said).tolist() == pytest.approx(option_nats(small, tokenizer, messages, options), rel=1e-4)


def test_a_model_learns_which_answer_is_better(tokenizer, small):
    pairs = [Preference(q.messages, "Anna.", "Hugo.") for q in ask_many(4, 6, kind="who", language="en")]
    losses = learn_preferences(small, tokenizer, pairs,
                               TrainConfig(steps=40, batch_size=4, lr=5e-3, warmup_steps=2))
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4) and losses[-1] < 0.5 * losses[0]
