"""Many texts at once: one thread owns the engine and writes for everybody.

Requests come when they like and want different lengths. Whoever comes takes the next
free place, every step writes one token in all places together, and who is done makes
room: continuous batching (Orca, Yu et al. 2022). A step for eight texts reads the
weights once, which is what takes the time; so eight together are little slower than
one alone.
"""

import codecs
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from minimistral.engine import Engine


class Busy(RuntimeError):
    """Too many wait already: come back later."""


@dataclass(eq=False)
class Job:
    """One text that somebody wants.

    prompt_ids  what to continue;  sampling: temperature, top_p, seed, stop_ids ...
    limit       how many tokens may be written
    tell        called from the engine's thread, once for every token with its id; at
                the end with "stop" or "length", or with the exception that ended it
    """
    prompt_ids: Sequence[int]
    limit: int
    tell: Callable[[int | str | Exception], None]
    sampling: dict = field(default_factory=dict)
    written: int = 0
    gone: bool = False                  # nobody waits for it any more


class Desk:
    """Takes jobs from any thread and has them written, first come, first served.

    engine       whose places are used; nobody else may use it meanwhile
    max_waiting  jobs that may wait for a place; more are refused with Busy
    """

    def __init__(self, engine: Engine, max_waiting: int = 64):
        self.engine, self.max_waiting = engine, max_waiting
        self.waiting: deque[Job] = deque()
        self.seated: dict[int, Job] = {}
        self.errands: deque[Callable[[], None]] = deque()
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none of them. Raises Busy if too many wait."""
        with self.changed:
            if self.closed:
                raise Busy("the server is closing")
            if len(self.waiting) + len(jobs) > self.max_waiting:
                raise Busy(f"{len(self.waiting)} requests wait already")
            self.waiting.extend(jobs)
            self.changed.notify()

    def leave(self, job: Job) -> None:
        """Nobody waits for this job any more: its place is free before the next
        step."""
        with self.changed:
            job.gone = True
            self.changed.notify()

    def run_between(self, errand: Callable[[], None]) -> None:
        """Have something else done by the engine's thread, between two steps."""
        with self.changed:
            if len(self.errands) >= self.max_waiting:
                raise Busy(f"{len(self.errands)} requests wait already")
            self.errands.append(errand)
            self.changed.notify()

    def close(self) -> None:
        """Finish the current step, refuse what is not done, end the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    # ------------------------------------------------- in the engine's thread

    def work(self) -> None:
        """Until closed: errands, leavers, newcomers, one step."""
        while True:
            with self.changed:
                while not (self.waiting or self.seated or self.errands or self.closed):
                    self.changed.wait()
                errands, self.errands = self.errands, deque()
                closed = self.closed
            for errand in errands:
                errand()
            self.clear_places()
            if closed:
                break
            self.seat_newcomers()
            if self.seated:
                self.write_one_token()
        for job in [*self.seated.values(), *self.waiting]:
            job.tell(Busy("the server is closing"))

    def clear_places(self) -> None:
        for place, job in list(self.seated.items()):
            if job.gone:
                self.engine.release(place)
                del self.seated[place]

    def seat_newcomers(self) -> None:
        """Those who wait take the free places, in the order in which they came."""
        while len(self.seated) < self.engine.batch_size:
            with self.changed:
                if not self.waiting:
                    return
                job = self.waiting.popleft()
            if job.gone:
                continue
            try:
                place = self.engine.admit(
                    job.prompt_ids, max_new_tokens=job.limit, **job.sampling)
            except Exception as error:             # this job's fault alone
                job.tell(error)
            else:
                self.seated[place] = job

    def write_one_token(self) -> None:
        """One step for all; if it fails, all who are seated are told."""
        try:
            chosen = self.engine.step()
        except Exception as error:
            for place, job in self.seated.items():
                job.tell(error)
                if place in self.engine.seats:
                    self.engine.release(place)
            self.seated = {}
            return
        for place, token in chosen.items():
            job = self.seated[place]
            if token is None:                          # its place is free already
                job.tell("length" if job.written >= job.limit else "stop")
                del self.seated[place]
            else:
                job.written += 1
                job.tell(token)


class TextStream:
    """Ids to text, token by token: a character spread over several tokens waits for
    the last of them, and text that may become a stop sequence waits until it can't.

    stops  the text ends before the first of these; .stopped tells whether it has
    strip  drop the space that SentencePiece puts before an answer
    """

    def __init__(self, tokenizer, stops: Iterable[str] = (), strip: bool = False):
        self.tokenizer, self.stops, self.strip = tokenizer, tuple(stops), strip
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped, self.begun = "", False, False

    def feed(self, token: int) -> str:
        """The text that is certain after this token; "" is common."""
        return self._add(self.decoder.decode(self.tokenizer.id_to_bytes(token)))

    def finish(self) -> str:
        """What was held back, when no token comes any more."""
        last = self._add(self.decoder.decode(b"", final=True))
        held, self.held = self.held, ""
        return last + held

    def _add(self, text: str) -> str:
        if self.stopped:
            return ""
        if text and not self.begun:
            text = text.removeprefix(" ") if self.strip else text
            self.begun = True
        self.held += text
        ends = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            certain, self.held = self.held[:min(ends)], ""
            return certain
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        certain = self.held[:len(self.held) - keep]
        self.held = self.held[len(certain):]
        return certain


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text are the beginning of stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
