"""A chat in the notebook: widgets around a Talk, usable by keyboard alone.

    panel = chat("tales-chat", temperature=0.7)

Enter or the button Send sends, Stop stops, Tab leads from one control to the next. The answer grows
on the page as it is written; when it is whole, it is told once more as a status, so that a screen
reader reads it in one piece.
"""

from __future__ import annotations

import html
import threading
import time

import minimistral as mm
from minimistral.chat import Talk

from .explorers import told_box

SHOWN_EVERY = 0.05  # seconds between two pictures of a growing answer
ENTER_WAITS = 0.5  # seconds after which Enter sends a message that had reached the kernel before
LOG = "white-space:pre-wrap;line-height:1.45;border:1px solid #767676;padding:6px 12px"


class ChatPanel:
    """The widgets of one conversation. ``ask`` does what the page does, for code cells and tests."""

    def __init__(self, talk: Talk, name: str):
        import ipywidgets

        self.talk, self.name = talk, name
        self.thread: threading.Thread | None = None
        self.stopping = threading.Event()
        style, wide = {"description_width": "10em"}, {"width": "95%", "max_width": "700px"}
        self.log, self.status = ipywidgets.HTML(), ipywidgets.HTML()
        self.message = ipywidgets.Text(
            description="Your message", placeholder="write it, then press Enter",
            continuous_update=False, style=style, layout=wide)
        self.system = ipywidgets.Text(
            value=talk.system, description="Instructions", placeholder="none",
            style=style, layout=wide)
        self.temperature = ipywidgets.FloatSlider(
            value=talk.sampling.get("temperature", 0.0), min=0.0, max=1.5, step=0.1,
            description="Temperature", style=style, layout=wide)
        self.send, self.stop, self.new = (ipywidgets.Button(description=label, tooltip=tip) for label, tip in (
            ("Send", "Send your message"), ("Stop", "Stop the answer"),
            ("New conversation", "Forget what was said")))
        self.entered = False
        self.message.on_msg(self._on_message)
        self.message.observe(self._on_value, names="value")
        self.send.on_click(lambda _: self._submit())
        self.stop.on_click(lambda _: self.stopping.set())
        self.new.on_click(lambda _: self.reset())
        self.box = told_box([self.log, self.message, ipywidgets.HBox([self.send, self.stop, self.new]),
                             self.temperature, self.system, self.status], self)
        self._show("")
        self._say("Nothing was said yet.")

    # ------------------------------------------------ what hands do

    # The page tells that Enter was pressed before it tells the text (and when the field is left,
    # the text alone, which sends nothing). So Enter waits for the text, and not for ever: a text
    # that is here already does not come again.

    def _on_message(self, widget, content, buffers) -> None:
        if content.get("event") == "submit":
            self.entered = True
            threading.Timer(ENTER_WAITS, self._on_value).start()

    def _on_value(self, change=None) -> None:
        if self.entered:
            self.entered = False
            self._submit()

    def _submit(self) -> None:
        text = self.message.value.strip()
        if text and self.start(text):
            self.message.value = ""

    def start(self, text: str) -> bool:
        """Begin an answer in a thread of its own; False while another one is being written."""
        if self.thread is not None and self.thread.is_alive():
            self._say("An answer is being written: stop it first.")
            return False
        self.talk.system = self.system.value.strip()
        self.talk.sampling["temperature"] = round(self.temperature.value, 2)
        self.stopping.clear()
        self.thread = threading.Thread(target=self._answer, args=(text,), daemon=True)
        self.thread.start()
        return True

    def ask(self, text: str) -> str:
        """Send a message and wait for the whole answer."""
        if not self.start(text):
            raise RuntimeError("an answer is being written: stop it first")
        self.thread.join()
        if not self.talk.turns or self.talk.turns[-2]["content"] != text:
            raise ValueError(self.told)
        return self.talk.turns[-1]["content"]

    def reset(self) -> None:
        """Stop, and begin anew."""
        self.stopping.set()
        if self.thread is not None:
            self.thread.join()
        self.talk.reset()
        self._show("")
        self._say("A new conversation.")

    # ------------------------------------------------ in the answer's thread

    def _answer(self, text: str) -> None:
        self._say("The model is writing.")
        pieces, said, shown = self.talk.say(text), "", 0.0
        try:
            for piece in pieces:
                said += piece
                if time.monotonic() - shown > SHOWN_EVERY:
                    self._show(said, asked=text)
                    shown = time.monotonic()
                if self.stopping.is_set():
                    break
        except Exception as error:
            self._show("")
            self._say(f"Not sent: {error}")
            return
        pieces.close()
        self._show("")
        stopped = "Stopped. " if self.stopping.is_set() else ""
        self._say(f"{stopped}{self.name} says: {self.talk.turns[-1]['content']}")

    def _show(self, growing: str, asked: str = "") -> None:
        """The conversation, and below it an answer that is being written."""
        lines = [(turn["role"], turn["content"]) for turn in self.talk.turns]
        if asked:
            lines += [("user", asked), ("assistant", growing)]
        names = {"user": "You", "assistant": self.name}
        told = "".join(f"<p><strong>{html.escape(names[role])}:</strong> {html.escape(said)}</p>"
                       for role, said in lines)
        self.log.value = (f'<div role="group" aria-label="Conversation" style="{LOG}">'
                          f"{told or 'Your conversation will stand here.'}</div>")

    def _say(self, text: str) -> None:
        self.told = text
        self.status.value = f'<div role="status" aria-live="polite">{html.escape(text)}</div>'

    def __repr__(self) -> str:
        said = [f"{'You' if turn['role'] == 'user' else self.name}: {turn['content']}" for turn in self.talk.turns]
        return "\n".join(said) or f"a chat with {self.name}: nothing was said yet"


def chat(model="tales-chat", tokenizer=None, *, system: str = "", temperature: float = 0.7,
         max_length: int = 4096, **sampling) -> ChatPanel:
    """Show a chat with a model: a shipped name, a folder, or a model with its tokenizer.

    sampling: max_new_tokens, top_p, seed
    """
    from IPython.display import display

    name = getattr(model, "shipped_name", "the model") if tokenizer else str(model)
    if tokenizer is None:
        model, tokenizer = mm.load_model(model), mm.load_tokenizer(model)
    panel = ChatPanel(Talk(model, tokenizer, system, max_length, temperature=temperature, **sampling), name)
    display(panel.box)
    return panel
