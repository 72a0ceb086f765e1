"""Chapter 13: its records are sound, its drafts agree with the library, its claims hold."""

import pytest

import minimistral as mm
from minimistral.chat_recipe import RECIPE, examination, interviews
from minimistral.course import judge, verify
from minimistral.course.chapters import ch13_fine_tuning as ch13
from minimistral.course.records.ch13 import EXERCISES
from minimistral.instruct import encode_chat, score_interval
from minimistral.questions import KINDS, ask_many, is_right, shared
from minimistral.tales import parse_tale

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


@pytest.fixture(scope="module")
def tokenizer():
    return mm.load_tokenizer("tales-chat")


# ---------------------------------------------------------------- records of exercises


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_record_is_sound(exercise):
    assert verify(exercise) == []


@pytest.mark.parametrize(
    ("name", "work", "told"),
    [
        ("answer_rows", lambda tokenizer, conversations: (tokenizer, []), "elements"),
        ("LoRALinear", lambda base, rank, alpha: base, "stopped with"),
        ("chat_ids", lambda tokenizer, messages: [], "elements"),
        ("adapter_size", lambda config, rank, names: 0, "xpected"),
        ("merged", lambda weight, down, up, alpha, sign=1: down, "shape"),
        ("answer_nats", lambda logits, targets: logits, "shape"),
        ("overall", lambda marks: 0.5, "xpected"),
        ("split", lambda asked, n: asked, "elements"),
    ],
)
def test_other_wrong_answers_get_a_sentence(name, work, told):
    result = judge(BY_NAME[name], work)
    assert not result.passed and told in result.message and len(result.message) > 10


def test_alpha_equal_to_the_rank_would_hide_a_forgotten_scale():
    """Why no fixture of the layer has it."""
    for fixture in BY_NAME["LoRALinear"].fixtures:
        _, rank, alpha, _ = fixture()
        assert alpha / rank not in (1.0, rank / alpha)


# ---------------------------------------------------------------- formats


def test_the_formats_are_those_of_mistrals_library():
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    makers = {"v1": MistralTokenizer.v1, "v2": MistralTokenizer.v2, "v3": MistralTokenizer.v3,
              "v7": MistralTokenizer.v7, "v3 Tekken": lambda: MistralTokenizer.v3(is_tekken=True)}
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"},
                {"role": "user", "content": "Bye"}]
    assert set(ch13.FORMATS) == set(ch13.USERS) == set(makers)
    for name, make in makers.items():
        their = make()
        ids = their.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        inner = their.instruct_tokenizer.tokenizer
        if name == "v3 Tekken":
            text = inner.decode(ids, special_token_policy=SpecialTokenPolicy.KEEP).replace(" ", "_")
        else:
            text = "".join(inner.id_to_piece(i) for i in ids).replace("\u2581", "_")
        assert text == ch13.FORMATS[name], name


def test_every_slip_differs_from_the_right_format(tokenizer):
    messages = ask_many(1, 3, kind="who", language="en")[0].messages
    right, _ = encode_chat(tokenizer, messages)
    written = {name: write(messages) for name, write in ch13.slips(tokenizer).items()}
    assert written.pop("as it should be") == right and len(written) == 5
    assert all(ids != right for ids in written.values())
    assert len({tuple(ids) for ids in written.values()}) == 5


# ---------------------------------------------------------------- helpers


def test_the_house_style_names_the_holder():
    asked = ask_many(60, 5, kind="who", language="en")
    short = ch13.house_style(asked)
    assert 10 < len(short) < 60
    for question, one in zip([q for q in asked if " has " in q.answer], short):
        options = ch13.choices(question)
        assert options[one.answer[:-1]] == question.answer
        true = [parse_tale(f"{question.told} Now {text}").consistent for text in options.values()]
        assert sum(true) == 1


def test_the_interval_narrows_with_the_root_of_n():
    assert ch13.halves(400, 0.9) == pytest.approx(2 * ch13.halves(1600, 0.9), rel=0.05)


def test_full_tuning_of_7b_needs_more_than_100_gb():
    config = mm.MODELS["mistral-7b-v0.3"]
    total = mm.count_parameters(config).total
    parts = ch13.bytes_to_tune(config, total)
    assert parts["for learning"] == pytest.approx(8 * parts["weights"])


# ---------------------------------------------------------------- tales-chat and its record


def test_the_examination_is_even_and_nobody_learned_from_it(tokenizer):
    asked = examination()
    assert len(asked) == len({q.prompt for q in asked}) == RECIPE.each * len(KINDS) * len(RECIPE.languages)
    learned = [q for talk in interviews(RECIPE, 300, tokenizer) for q in talk]
    assert not shared(learned, asked) and not shared(asked, learned)


def test_the_record_says_what_was_measured():
    run = ch13.record()
    assert run["shared_with_examination"] == 0 == run["lora"]["shared_with_examination"]
    assert run["before"]["all"]["share"] < 0.1
    assert run["after"]["all"]["share"] >= 0.9
    assert run["lora"]["parameters"]["share"] <= 0.02
    for part in (run["before"], run["after"], run["lora"]["after"]):
        counted = part["all"]
        assert sum(kind["right"] for kind in part["kinds"].values()) == counted["right"]
        assert sum(tongue["asked"] for tongue in part["languages"].values()) == counted["asked"]
        assert counted["interval"] == pytest.approx(score_interval(counted["right"], counted["asked"]))


def test_the_shipped_model_answers_as_its_record_says(tokenizer):
    from minimistral.instruct import answers

    model, asked = mm.load_model("tales-chat"), examination()[::5]
    said = answers(model, tokenizer, [q.messages for q in asked], 60)
    share = sum(map(is_right, asked, said)) / len(asked)
    assert abs(share - ch13.record()["after"]["all"]["share"]) < 0.15      # 48 of the 240 questions
    assert ch13.record()["chat_format"] == tokenizer.version
