"""A chat in the terminal: one line each, the answer as it is written."""

import argparse
import sys
from collections.abc import Callable, Iterator

import minimistral as mm
from minimistral.batching import TextStream
from minimistral.doctor import best_device
from minimistral.instruct import encode_chat

HELP = "/reset begins anew, /system TEXT sets the instructions, /quit ends it; Ctrl-C stops an answer"


class Talk:
    """A conversation with a model: `say` yields its answer piece by piece, and keeps it.

    sampling: max_new_tokens, temperature, top_p, seed, as generate knows them
    """

    def __init__(self, model, tokenizer, system: str = "", **sampling):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.sampling = sampling
        self.turns: list[dict[str, str]] = []

    def say(self, text: str) -> Iterator[str]:
        """Raises ValueError, with nothing kept, for text that cannot be encoded."""
        asked = [*self.turns, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt, _ = encode_chat(self.tokenizer, system + asked)
        stream, said = TextStream(self.tokenizer, strip=True), ""
        limit = self.sampling.get("max_new_tokens", 500)
        options = {k: v for k, v in self.sampling.items() if k != "max_new_tokens"}
        try:
            for token in mm.stream(self.model, prompt, limit, stop_ids=[self.tokenizer.eos_id], **options):
                said += (piece := stream.feed(token))
                yield piece
            said += (piece := stream.finish())
            yield piece
        finally:                               # what was stopped was said all the same
            self.turns = [*asked, {"role": "assistant", "content": said}]

    def reset(self) -> None:
        self.turns = []


def converse(talk: Talk, read: Callable[[str], str] = input, out=None) -> None:
    """Read lines until /quit or the end of the input."""
    out = out or sys.stdout
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            talk.reset()
            print("(a new conversation)", file=out)
        elif command == "/system":
            talk.system = rest.strip()
            print(f"(instructions: {talk.system or 'none'})", file=out)
        elif line.startswith("/"):
            print(f"({HELP})", file=out)
        elif line:
            answer(talk, line, out)


def answer(talk: Talk, line: str, out) -> None:
    """Print an answer as it comes; Ctrl-C stops it, bad input is told."""
    pieces = talk.say(line)
    try:
        for piece in pieces:
            print(piece, end="", file=out, flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print(" (stopped)", end="", file=out)
    except ValueError as error:
        print(f"({error})", end="", file=out)
    print(file=out)


def run(arguments: argparse.Namespace) -> None:
    """The command: arguments are those of `minimistral chat`."""
    model = mm.load_model(arguments.model, device=arguments.device or best_device())
    tokenizer = mm.load_tokenizer(arguments.model)
    talk = Talk(model, tokenizer, arguments.system, max_new_tokens=arguments.max_new_tokens,
                temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
    print(f"{arguments.model}. {HELP}.")
    converse(talk)
