"""The public shapes in which a server answers: errors, answers, events, usage.

They are those of OpenAI's interface, which Mistral's follows with few changes. An
answer is JSON. A stream is a row of server-sent events, each of which is a line
`data: JSON` and an empty line; the last one is `data: [DONE]`.
"""

import json
import time
import uuid
from typing import Protocol

from minimistral.batching import Busy

DONE = "data: [DONE]\n\n"


class Refused(Exception):
    """An answer of status 4xx or 5xx: what was wrong, where, a word for programs.

    kind   invalid_request_error, authentication_error, rate_limit_error ...
    param  the field that is wrong, if it is one;  code: a more exact word
    """

    def __init__(self, status: int, message: str,
                 kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None):
        super().__init__(message)
        self.status = status
        self.details = {"message": message, "type": kind, "param": param,
                        "code": code}

    @property
    def body(self) -> dict:
        """OpenAI's shape has the details under "error", Mistral's at the top."""
        return {"object": "error", **self.details, "error": self.details}


def as_refusal(error: Exception) -> Refused:
    """What a failed job tells its client. Of our own faults it says no details."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, str(error), "rate_limit_error", code="busy")
    if isinstance(error, ValueError):
        too_long = "do not fit into" in str(error)
        code = "context_length_exceeded" if too_long else None
        return Refused(400, str(error), code=code)
    told = f"the server failed: {type(error).__name__}"
    return Refused(500, told, "server_error")


def as_event(body: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class Told(Protocol):
    """A text as its answer tells of it."""
    read: int                           # tokens of the prompt
    written: int                        # tokens of the text; the end token is none
    reason: str | None                  # why it ended: "stop" or "length"


def count_usage(texts: list[Told]) -> dict[str, int]:
    """How many tokens were read and written for the texts of one request, whose
    prompt is read once."""
    read, written = texts[0].read, sum(text.written for text in texts)
    return {"prompt_tokens": read, "completion_tokens": written,
            "total_tokens": read + written}


class Shape:
    """How the texts of one request are wrapped: as a chat's messages, or plain."""

    def __init__(self, model: str, chat: bool):
        self.chat = chat
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
                     "created": int(time.time()), "model": model}

    def whole(self, texts: list[Told], written: list[str]) -> dict:
        """The answer to a request without stream."""
        choices = [self.choice(i, "message", text, told.reason)
                   for i, (told, text) in enumerate(zip(texts, written))]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices,
                "usage": count_usage(texts)}

    def chunk(self, choices: list[dict], **more) -> str:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return as_event({**self.head, "object": kind, "choices": choices, **more})

    def choice(self, index: int, key: str, text: str, reason: str | None) -> dict:
        """One text, or a piece of it; key: "message" or "delta"."""
        end = {"index": index, "finish_reason": reason}
        if not self.chat:
            return {**end, "text": text, "logprobs": None}
        said = {"role": "assistant", "content": text}
        if key == "delta" and reason is not None:
            said = {"content": text}
        return {**end, key: said}
