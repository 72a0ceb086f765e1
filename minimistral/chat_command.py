"""A chat in the terminal: one line each, or several with a backslash at the end of all but the
last; the answer as it is written."""

import argparse
import sys
from collections.abc import Callable

import minimistral as mm
from minimistral.chat import Talk
from minimistral.devices import pick_device
from minimistral.sampling import check_sampling

HELP = ("/reset begins anew, /system TEXT sets the instructions, /temperature X the chance, "
        "/history shows what was said, /quit ends it; Ctrl-C stops an answer; "
        "a line that ends with \\ goes on in the next")


def converse(talk: Talk, read: Callable[[str], str] = input, out=None) -> None:
    """Read lines until /quit or the end of the input."""
    out = out or sys.stdout
    while True:
        try:
            line = read("> ").strip()
            while line.endswith("\\"):
                line = line[:-1].rstrip() + "\n" + read("  ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command.startswith("/"):
            print(f"({obey(talk, command, rest.strip())})", file=out)
        elif line:
            answer(talk, line, out)


def obey(talk: Talk, command: str, rest: str) -> str:
    """Do what a command says; the sentence that tells it."""
    if command == "/reset":
        talk.reset()
        return "a new conversation"
    if command == "/system":
        talk.system = rest
        return f"instructions: {rest or 'none'}"
    if command == "/temperature":
        try:
            check_sampling(float(rest), None, None)
        except ValueError:
            return "a temperature is a number from 0, the likeliest token, up; as in /temperature 0.7"
        talk.sampling["temperature"] = float(rest)
        return f"temperature: {float(rest):g}"
    if command == "/history":
        said = [f"{turn['role']}: {turn['content']}" for turn in talk.turns]
        return "\n".join(said) or "nothing was said yet"
    return HELP


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
    check_sampling(arguments.temperature, None, arguments.top_p)
    model = mm.load_model(arguments.model, device=pick_device(arguments.device))
    tokenizer = mm.load_tokenizer(arguments.model)
    talk = Talk(model, tokenizer, arguments.system, arguments.max_length,
                max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
                top_p=arguments.top_p, seed=arguments.seed)
    print(f"{arguments.model}. {HELP}.")
    converse(talk)
