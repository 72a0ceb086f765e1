"""Text from tokens, while they come.

A token is a piece of bytes. It may hold half a character, and a sequence that ends
the text may lie across several tokens. So what is not certain waits for the next.
"""

import codecs
from collections.abc import Iterable, Sequence


def whole_characters(raw: bytes) -> tuple[str, bytes]:
    """The text of all complete characters in UTF-8 bytes, and the bytes that wait:
    at the end, the beginning of a character whose rest is still to come.

    Bytes that belong to no character become U+FFFD, the replacement character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(raw), decoder.getstate()[0]


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Of text that nobody has seen yet: what may be shown, what has to wait, and
    whether it ends here.

    It ends before the first stop sequence. Where there is none, the longest end of
    the text that begins a stop sequence waits: the next piece may complete it.
    """
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[:min(found)], "", True
    longest = max(map(len, stops), default=0)
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], False
    return text, "", False


class TextStream:
    """Ids to text, token by token.

    stops     the text ends before the first of these
    strip     drop the space that SentencePiece puts before an answer
    .stopped  whether a stop sequence has ended the text
    """

    def __init__(self, tokenizer, stops: Iterable[str] = (), strip: bool = False):
        self.tokenizer, self.stops, self.strip = tokenizer, tuple(stops), strip
        self.raw, self.held = b"", ""                   # bytes and text that wait
        self.stopped, self.begun = False, False

    def feed(self, token: int) -> str:
        """The text that is certain after this token; "" is common."""
        raw = self.raw + self.tokenizer.id_to_bytes(token)
        text, self.raw = whole_characters(raw)
        return self.add(text)

    def finish(self) -> str:
        """What was held back, when no token comes any more."""
        last = self.add(self.raw.decode(errors="replace"))
        held, self.raw, self.held = self.held, b"", ""
        return last + held

    def add(self, text: str) -> str:
        """Put text behind what waits; the part of both that may be shown."""
        if self.stopped:
            return ""
        if text and not self.begun:
            text = text.removeprefix(" ") if self.strip else text
            self.begun = True
        shown, self.held, self.stopped = cut_at_stop(self.held + text, self.stops)
        return shown
