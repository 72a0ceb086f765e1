"""A chat: a loop around a model. What was said so far is written down in the chat
format, the model continues it, and what it wrote is added to what was said.
"""

from collections.abc import Iterator

from minimistral.generate import stream
from minimistral.instruct import Conversation, encode_chat
from minimistral.streaming import TextStream


def fit_conversation(tokenizer, messages: Conversation, longest: int) -> list[dict]:
    """What of a conversation has at most `longest` tokens: the oldest question goes
    first, its answer with it; the system message and the last message stay.

    Raises ValueError if those two alone are too long.
    """
    kept = list(messages)
    first = 1 if kept[0]["role"] == "system" else 0
    while (length := len(encode_chat(tokenizer, kept)[0])) > longest:
        if len(kept) == first + 1:
            raise ValueError(f"the message has {length} tokens with its marks and "
                             f"the instructions, and {longest} may be read: "
                             f"shorten it")
        del kept[first:first + 2]
    return kept


class Talk:
    """A conversation with a model: `say` yields its answer piece by piece.

    system      instructions for the whole talk
    max_length  tokens that the model may read and write: old turns are left out of
                what it reads, but not out of .turns
    sampling    max_new_tokens, temperature, top_p, seed, as generate knows them
    """

    def __init__(self, model, tokenizer, system: str = "", max_length: int = 4096,
                 **sampling):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.max_length, self.sampling = max_length, sampling
        self.turns: list[dict[str, str]] = []

    def say(self, text: str) -> Iterator[str]:
        """Raises ValueError, with nothing kept, for text that can't be read."""
        asked = [*self.turns, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        options = {"max_new_tokens": 500, **self.sampling}
        room = self.max_length - options["max_new_tokens"]
        prompt, _ = encode_chat(self.tokenizer, fit_conversation(
            self.tokenizer, system + asked, room))
        written, said = TextStream(self.tokenizer, strip=True), ""
        try:
            for token in stream(self.model, prompt, **options,
                                stop_ids=[self.tokenizer.eos_id]):
                said += (piece := written.feed(token))
                yield piece
            said += (piece := written.finish())
            yield piece
        finally:                           # what was stopped was said all the same
            self.turns = [*asked, {"role": "assistant", "content": said}]

    def reset(self) -> None:
        self.turns = []
