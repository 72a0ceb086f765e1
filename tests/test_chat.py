"""The chat in the terminal."""

import io
import threading
import time

import pytest

import minimistral as mm
from minimistral import chat
from minimistral.chat import Talk, fit_conversation
from minimistral.chat_command import converse
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


def test_a_line_that_ends_with_a_backslash_goes_on(talk):
    hold(talk, "The golden ring\\", "Anna has it. \\", "Who has it?", "/quit")
    assert talk.turns[0]["content"] == "The golden ring\nAnna has it.\nWho has it?" and len(talk.turns) == 2


def test_an_answer_can_be_stopped(talk, monkeypatch):
    def stream(*arguments, **options):
        yield talk.tokenizer.encode("One")[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", stream)
    assert "(stopped)" in hold(talk, "Hello", KeyboardInterrupt())
    assert len(talk.turns) == 2 and talk.turns[1]["content"]


def test_what_cannot_be_encoded_is_told_and_forgotten(talk):
    shown = hold(talk, "a\ud800", "/quit")
    assert "(" in shown and talk.turns == []


def test_temperature_and_history(talk):
    shown = hold(talk, "/temperature hot", "/temperature -1", "/temperature 0", "/history", "Hello", "/history")
    assert shown.count("a number from 0") == 2 and "(temperature: 0)" in shown and "(nothing was said yet)" in shown
    assert talk.sampling["temperature"] == 0
    assert f"user: Hello\nassistant: {talk.turns[1]['content']}" in shown


def test_a_chosen_temperature_and_seed_repeat_an_answer():
    talks = [Talk(mm.load_model("tales-dense"), mm.load_tokenizer("tales-dense"), max_new_tokens=20,
                  temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    said = ["".join(talk.say("Hello")) for talk in talks]
    assert said[0] == said[1] != said[2]


# ---------------------------------------------------------------- a conversation that grows


def say(role, text):
    return {"role": role, "content": text}


def test_old_turns_go_first_and_whole():
    tokenizer = mm.load_tokenizer("tales-dense")
    told = [say("system", "Be brief."), say("user", "One"), say("assistant", "Two, three"), say("user", "Four"),
            say("assistant", "Five"), say("user", "Six")]

    def size(messages):
        return len(encode_chat(tokenizer, messages)[0])

    shorter, shortest = [told[0], *told[3:]], [told[0], told[5]]
    assert fit_conversation(tokenizer, told, size(told)) == told
    assert fit_conversation(tokenizer, told, size(told) - 1) == shorter
    assert fit_conversation(tokenizer, told, size(shorter)) == shorter
    assert fit_conversation(tokenizer, told, size(shorter) - 1) == shortest
    assert fit_conversation(tokenizer, told[1:], size(told[3:])) == told[3:]
    with pytest.raises(ValueError, match="shorten it"):
        fit_conversation(tokenizer, told, size(shortest) - 1)


def test_a_talk_goes_on_when_its_history_is_too_long():
    tokenizer = mm.load_tokenizer("tales-dense")
    talk = Talk(mm.load_model("tales-dense"), tokenizer, max_length=40, max_new_tokens=8, temperature=0.0)
    for _ in range(6):
        "".join(talk.say("Who has the key?"))
    assert len(talk.turns) == 12 and len(encode_chat(tokenizer, talk.turns[:-1])[0]) > 40
    with pytest.raises(ValueError, match="shorten it"):
        next(talk.say("the key " * 40))
    assert len(talk.turns) == 12


# ---------------------------------------------------------------- the chat in the notebook


@pytest.fixture
def panel(talk):
    pytest.importorskip("ipywidgets")
    from minimistral.course.chat_panel import ChatPanel

    return ChatPanel(talk, "tales")


def test_the_panel_answers_as_the_talk_does(panel, talk):
    said = panel.ask("Hello")
    ids, _ = encode_chat(talk.tokenizer, [say("user", "Hello")])
    new = mm.generate(talk.model, ids, 15, stop_ids=[talk.tokenizer.eos_id])
    assert said == talk.tokenizer.decode(new).removeprefix(" ")
    assert said in panel.log.value and f"tales says: {said}" in panel.status.value
    assert repr(panel) == repr(panel.box) == f"You: Hello\ntales: {said}"


def test_enter_sends_and_leaving_the_field_does_not(panel, talk):
    """As the page tells it: leaving is a new text; Enter is an event and then the new text."""
    panel.message.value = "Hel"
    assert panel.thread is None
    panel.message._handle_custom_msg({"event": "submit"}, [])
    assert panel.thread is None
    panel.message.value = "Hello"
    panel.thread.join()
    assert panel.message.value == "" and talk.turns[0] == say("user", "Hello") and not panel.entered


def test_enter_after_coming_back_sends_what_is_there(panel, talk, monkeypatch):
    monkeypatch.setattr("minimistral.course.chat_panel.ENTER_WAITS", 0.05)
    panel.message.value = "Hello"
    panel.message._handle_custom_msg({"event": "submit"}, [])
    deadline = time.monotonic() + 20
    while len(talk.turns) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    panel.message.value = "  "
    panel.send.click()
    assert len(talk.turns) == 2


def test_the_panels_knobs_reach_the_model(panel, talk):
    panel.temperature.value, panel.system.value = 1.2, " Be brief. "
    panel.ask("Hello")
    assert talk.sampling["temperature"] == 1.2 and talk.system == "Be brief."
    panel.new.click()
    assert talk.turns == [] and "new conversation" in panel.status.value


def test_the_panel_stops_and_says_so(panel, talk, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def stream(*arguments, **options):
        for token in talk.tokenizer.encode("One two three"):
            yield token
            begun.set()
            assert go.wait(20)

    monkeypatch.setattr(chat, "stream", stream)
    panel.message.value = "Hello"
    panel.send.click()
    assert begun.wait(20)
    assert not panel.start("Bye") and "stop it first" in panel.status.value
    panel.stop.click()
    go.set()
    panel.thread.join(20)
    assert panel.told.startswith("Stopped.") and len(talk.turns) == 2
    assert len(talk.turns[1]["content"]) < len("One two three")


def test_the_panel_tells_what_it_cannot_read_and_escapes_what_it_shows(panel, talk):
    with pytest.raises(ValueError, match="Not sent"):
        panel.ask("a\ud800")
    assert talk.turns == []
    panel.ask("<b>bold</b>")
    assert "<b>" not in panel.log.value and "&lt;b&gt;" in panel.log.value


def test_every_control_of_the_panel_has_a_name(panel):
    controls = [panel.message, panel.system, panel.temperature, panel.send, panel.stop, panel.new]
    assert all(control.description for control in controls) and not any(c.disabled for c in controls)
