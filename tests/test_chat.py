"""The chat in the terminal."""

import io

import pytest

import minimistral as mm
from minimistral.chat import Talk, converse
from minimistral.instruct import encode_chat


@pytest.fixture
def talk():
    return Talk(mm.load_model("tales-dense"), mm.load_tokenizer("tales-dense"), max_new_tokens=15, temperature=0.0)


def hold(talk, *lines):
    """What is printed when these lines are typed; an exception is raised in place of a line."""
    waiting, out = list(lines), io.StringIO()

    def read(prompt):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    converse(talk, read, out)
    assert not waiting or lines[-1] == "never reached"
    return out.getvalue()


def test_an_answer_is_what_the_model_writes_and_is_remembered(talk):
    shown, turns, wanted = hold(talk, "Hello", "Bye"), [], ""
    for asked in ("Hello", "Bye"):
        turns.append({"role": "user", "content": asked})
        ids, _ = encode_chat(talk.tokenizer, turns)
        new = mm.generate(talk.model, ids, 15, stop_ids=[talk.tokenizer.eos_id])
        turns.append({"role": "assistant", "content": talk.tokenizer.decode(new).removeprefix(" ")})
        wanted += turns[-1]["content"] + "\n"
    assert talk.turns == turns and shown == wanted + "\n"


def test_commands(talk):
    shown = hold(talk, "/system Be brief.", "", "/what", "Hello", "/reset", "/quit", "never reached")
    assert "(instructions: Be brief.)" in shown and "/reset begins anew" in shown
    assert talk.system == "Be brief." and talk.turns == [] and "(a new conversation)" in shown


def test_an_answer_can_be_stopped(talk, monkeypatch):
    def stream(*arguments, **options):
        yield talk.tokenizer.encode("One")[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(mm, "stream", stream)
    assert "(stopped)" in hold(talk, "Hello", KeyboardInterrupt())
    assert len(talk.turns) == 2 and talk.turns[1]["content"]


def test_what_cannot_be_encoded_is_told_and_forgotten(talk):
    shown = hold(talk, "a\ud800", "/quit")
    assert "(" in shown and talk.turns == []
