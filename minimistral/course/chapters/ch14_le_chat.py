"""Chapter 14: its small HTTP client, a watch on connections, its pictures and the logic of its explorer."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Sequence

import torch
from matplotlib.patches import Rectangle

from ..figures import BLUE, COLOURS, GREY, HATCHES, ORANGE, new_figure
from ..results import RESULTS, read_result

RECORDED = RESULTS / "serving.json"

TALE = """The golden ring
One morning Anna found a golden ring in the mill. Leo was at the lake. \
Anna went to the lake and saw Leo there. Anna gave the ring to Leo."""

# ---------------------------------------------------------------- talking to a server


def post(address: str, path: str, body: dict | bytes, **headers: str) -> tuple[int, str]:
    """Send a request as any program would: (status, text of the answer)."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", path, content, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def seconds_to_first_piece(address: str, body: dict) -> float:
    """From the request to the first event with text in it."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}),
                       {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            break
    seconds = time.perf_counter() - began
    connection.close()
    return seconds


# ---------------------------------------------------------------- what leaves the machine

_watching: list[set[str]] = []


def _see(event: str, arguments: tuple) -> None:
    if _watching and event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        where = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = where[0] if isinstance(where, tuple) else str(where)
        for seen in _watching:
            seen.add(str(host))


class Watch:
    """Within the block, every host that this program connects to or looks up: .hosts.

    Python calls such a hook before every connection, and it can't be taken away again. The
    course's tests refuse connections with one of the same kind; this one only writes down.
    """

    def __enter__(self) -> Watch:
        if not hasattr(sys, "minimistral_watch"):
            sys.minimistral_watch = True
            sys.addaudithook(_see)
        self.hosts: set[str] = set()
        _watching.append(self.hosts)
        return self

    def __exit__(self, *_) -> None:
        _watching[:] = [seen for seen in _watching if seen is not self.hosts]


# ---------------------------------------------------------------- how long until the first word


def operations_per_second(size: int = 768, rounds: int = 3) -> float:
    """What this machine computes in a large product of matrices: the best of a few rounds."""
    a, best = torch.ones(size, size), 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def first_word(parameters: float, prompt: int, per_second: float, trip: float = 0.0) -> float:
    """Seconds until the first token: the way there and back, and 2 operations for each weight
    and token of the prompt."""
    return trip + 2 * parameters * prompt / per_second


def recorded() -> dict:
    """What benchmarks/serving.py measured."""
    return read_result(RECORDED)["rows"]


# ---------------------------------------------------------------- pictures


def bytes_picture(tokens: Sequence[bytes], text: str):
    """The bytes of a text in boxes, coloured by token, with the characters they make above."""
    figure, ax = new_figure(8.4, 2.4)
    owner = [n for n, token in enumerate(tokens) for _ in token]
    raw = b"".join(tokens)
    for at, (n, byte) in enumerate(zip(owner, raw)):
        colour, hatch = (BLUE, "") if n % 2 else (ORANGE, "//")
        ax.bar(at, 1, width=0.9, color="white", edgecolor=colour, hatch=hatch, linewidth=2)
        ax.text(at, 0.5, f"{byte:02x}", ha="center", va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    at = 0
    for character in text:
        width = len(character.encode())
        ax.plot([at - 0.4, at + width - 0.6], [1.25, 1.25], color=GREY, linewidth=2, linestyle="-")
        ax.text(at + width / 2 - 0.5, 1.35, {" ": "space"}.get(character, character), ha="center")
        at += width
    at = 0
    for n, token in enumerate(tokens):
        ax.text(at + len(token) / 2 - 0.5, -0.35, str(n), ha="center")
        at += len(token)
    for height, word in ((1.35, "text"), (0.5, "bytes"), (-0.35, "token")):
        ax.text(-0.8, height, word, ha="right", va="baseline" if height != 0.5 else "center", color=GREY)
    ax.set(xlim=(-2.2, len(raw) - 0.4), ylim=(-0.6, 1.9),
           title="Above the characters, below the tokens: the borders differ")
    ax.axis("off")
    return figure


def layers_picture():
    """Model, assistant, platform: what each adds around the one before."""
    figure, ax = new_figure(8.4, 3.4)
    boxes = [("platform", "addresses, keys, errors, usage, many clients at once", 10.0, 3.0),
             ("assistant", "history, chat format, stop, tuning on answers", 8.2, 2.1),
             ("model", "token ids in, one distribution out", 6.2, 1.2)]
    for n, (name, what, width, height) in enumerate(boxes):
        ax.add_patch(Rectangle((5 - width / 2, 0.3 * n + 0.1), width, height - 0.3 * n, facecolor="white",
                               edgecolor=COLOURS[1 + n], linestyle=("-", "--", "-.")[n], linewidth=2))
        top = 0.1 + height
        ax.text(5, top - 0.28, f"{name}: {what}", ha="center", va="center")
    ax.set(xlim=(-0.1, 10.1), ylim=(0, 3.2), title="A product is layers around a model")
    ax.axis("off")
    return figure


# ---------------------------------------------------------------- who sits where, and when


def schedule(requests: Sequence[tuple[int, int]], places: int, continuous: bool
             ) -> list[tuple[int, int, int]]:
    """(place, first step, step after the last) for each request, an (arrival, length) pair.

    One token is written in every taken place in each step. Static batching takes as many as there are
    places when all of them are empty, and gives no place away until the longest text is done.
    """
    free_from, found = [0] * places, {}
    waiting = sorted(range(len(requests)), key=lambda i: (requests[i][0], i))
    now = 0
    while waiting:
        here = [i for i in waiting if requests[i][0] <= now]
        free = [p for p in range(places) if free_from[p] <= now]
        if not continuous and len(free) < places:
            free = []
        taken = list(zip(here, free))
        for i, place in taken:
            found[i] = (place, now, now + requests[i][1])
            free_from[place] = now + requests[i][1]
            waiting.remove(i)
        if taken and not continuous:
            last = max(found[i][2] for i, _ in taken)
            free_from = [last] * places
        coming = [requests[i][0] for i in waiting if requests[i][0] > now]
        now = min([t for t in (*free_from, *coming) if t > now], default=now + 1)
    return [found[i] for i in range(len(requests))]


LENGTHS = {
    "all alike": (20,) * 12,
    "mixed": (6, 30, 10, 22, 4, 38, 12, 8, 26, 14, 5, 17),
    "one very long": (6, 8, 60, 7, 9, 5, 8, 6, 10, 7, 5, 8),
}
ARRIVALS = {"all at once": 0, "one every 2 steps": 2, "one every 8 steps": 8}


def figures_of(requests, plan) -> tuple[int, float, int]:
    """(steps until the last text is done, mean wait, longest wait), in steps."""
    waits = [begin - arrival for (arrival, _), (_, begin, _) in zip(requests, plan)]
    return max(end for _, _, end in plan), sum(waits) / len(waits), max(waits)


def batch_explorer(lengths: str, arrivals: str, places: int):
    """Twelve requests on two timelines: static batching above, continuous batching below."""
    every = ARRIVALS[arrivals]
    requests = [(i * every, length) for i, length in enumerate(LENGTHS[lengths])]
    plans = {"static": schedule(requests, places, False), "continuous": schedule(requests, places, True)}
    told = {name: figures_of(requests, plan) for name, plan in plans.items()}
    figure, axes = new_figure(8.4, 1.6 + 0.62 * places, columns=1)
    ax, height = axes, places + 1.2
    last = max(steps for steps, _, _ in told.values())
    for n, (name, plan) in enumerate(plans.items()):
        top = -n * height
        for i, (place, begin, end) in enumerate(plan):
            colour, hatch = COLOURS[1 + i % 4], HATCHES[i % 4]
            ax.barh(top - place, end - begin, left=begin, height=0.8, color="white",
                    edgecolor=colour, hatch=hatch, linewidth=1.5)
            if end - begin > last / 40:
                ax.text((begin + end) / 2, top - place, str(i + 1), ha="center", va="center",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        ax.text(last / 120, top + 0.55, f"{name}: {told[name][0]} steps", ha="left", va="bottom")
    ticks = [-n * height - p for n in range(2) for p in range(places)]
    ax.set_yticks(ticks, [f"place {p + 1}" for _ in range(2) for p in range(places)])
    saved = told["static"][0] - told["continuous"][0]
    ax.set(xlabel="step of the model", ylim=(-2 * height + 1.5, 1.4), xlim=(0, last * 1.02),
           title=f"Continuous batching saves {saved} of {told['static'][0]} steps")
    sentence = (f"{lengths}, {arrivals}, {places} places: static batching takes {told['static'][0]} steps "
                f"with a mean wait of {told['static'][1]:.1f}; continuous batching takes "
                f"{told['continuous'][0]} with a mean wait of {told['continuous'][1]:.1f}.")
    table = {"request": [i + 1 for i in range(len(requests))],
             "arrives": [a for a, _ in requests], "tokens": [n for _, n in requests],
             "waits, static": [p[1] - r[0] for p, r in zip(plans["static"], requests)],
             "waits, continuous": [p[1] - r[0] for p, r in zip(plans["continuous"], requests)]}
    return figure, sentence, table


# ---------------------------------------------------------------- a writer made of paper, for exercises


class PaperModel:
    """A stand-in for a model with a cache: each place remembers the ids it has read, and the next
    id depends on all of them, and on nothing else.

    read(place, ids)   add ids to what the place remembers
    forget(place)      empty it
    next_ids()         the next id of every place, as a list; None for an empty place
    """

    def __init__(self, places: int, vocab: int = 97):
        self.memory: list[list[int]] = [[] for _ in range(places)]
        self.vocab, self.steps = vocab, 0

    def read(self, place: int, ids: Sequence[int]) -> None:
        self.memory[place] += list(ids)

    def forget(self, place: int) -> None:
        self.memory[place] = []

    def next_ids(self) -> list[int | None]:
        self.steps += 1
        return [self.follow(ids) if ids else None for ids in self.memory]

    def follow(self, ids: Sequence[int]) -> int:
        value = 7
        for token in ids:
            value = (value * 31 + token + 1) % 1_000_003
        return value % self.vocab


def alone(prompt: Sequence[int], limit: int) -> list[int]:
    """What the paper model writes for one prompt by itself."""
    paper, ids = PaperModel(1), list(prompt)
    for _ in range(limit):
        ids.append(paper.follow(ids))
    return ids[len(prompt):]


