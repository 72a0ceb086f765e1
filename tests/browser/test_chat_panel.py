"""The chat in a real JupyterLab, by keyboard alone: send, watch it grow, stop, turn a knob, go on."""

import re

import nbformat
import pytest

CELLS = (
    """import time
import minimistral.chat as room
from minimistral.course.chat_panel import chat
written = room.stream
def slowly(*arguments, **options):          # a reader has time to press Stop
    for token in written(*arguments, **options):
        time.sleep(0.15)
        yield token
room.stream = slowly""",
    "panel = chat('tales-dense', temperature=0.7, max_new_tokens=300, seed=1)",
)


@pytest.fixture
def page(lab, tab, tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in CELLS],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "chat.ipynb")
    lab.open(tab, tmp_path / "chat.ipynb")
    return tab


def test_a_conversation_by_keyboard(page, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=120_000)                                # other tests run beside this one
    log = page.get_by_role("group", name="Conversation")
    status = page.locator(".jp-OutputArea [role=status]")
    message = page.get_by_label("Your message")
    expect(log).to_contain_text("Your conversation will stand here.")

    message.focus()
    page.keyboard.type("Who has <the> key?")
    page.keyboard.press("Enter")
    expect(log).to_contain_text("You: Who has <the> key?")
    expect(status).to_have_text("The model is writing.")
    expect(log).to_contain_text(re.compile(r"tales-dense: .{12,}", re.S))
    before = log.inner_text()
    expect(log).not_to_have_text(before, use_inner_text=True)          # it grows
    expect(message).to_have_value("")
    expect(message).to_be_focused()

    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_focused()
    page.keyboard.press("Tab")
    stop = page.get_by_role("button", name="Stop", exact=True)
    expect(stop).to_be_focused()
    page.keyboard.press("Space")
    expect(status).to_contain_text("Stopped. tales-dense says:")
    expect(stop).to_be_focused()
    page.screenshot(path=tmp_path / "stopped.png")

    page.keyboard.press("Tab")                                         # New conversation
    page.keyboard.press("Tab")
    slider = page.get_by_role("slider", name="Temperature", exact=True)
    expect(slider).to_be_focused()
    was = slider.get_attribute("aria-valuenow")
    page.keyboard.press("ArrowLeft")
    expect(slider).not_to_have_attribute("aria-valuenow", was)
    for _ in range(3):
        page.keyboard.press("Tab")                                     # the number, Instructions
        if page.get_by_label("Instructions").evaluate("e => e === document.activeElement"):
            break
    page.keyboard.type("Be brief.")

    for _ in range(10):                                                # back, with nothing in the way
        page.keyboard.press("Shift+Tab")
        if message.evaluate("e => e === document.activeElement"):
            break
    expect(message).to_be_focused()
    page.keyboard.type("And now?")
    page.keyboard.press("Enter")
    expect(log).to_contain_text("You: And now?")
    expect(status).to_contain_text(re.compile("^tales-dense says:"))
    expect(log.locator("p")).to_have_count(4)
    page.screenshot(path=tmp_path / "second.png")

    page.get_by_role("button", name="New conversation").press("Enter")
    expect(log).to_contain_text("Your conversation will stand here.")
    expect.set_options(timeout=5_000)
    assert not page.problems, page.problems
