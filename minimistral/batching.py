"""Many texts at once: one thread owns the engine and writes for everybody.

Requests come when they like and want different lengths. Whoever comes takes the
next free place, every step writes one token in all places together, and who is done
makes room: continuous batching (Orca, Yu et al. 2022). A step for eight texts reads
the weights once, which is what takes the time; so eight together are little slower
than one alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from minimistral.engine import Engine


class Busy(RuntimeError):
    """Too many wait already: come back later."""


@dataclass(eq=False)
class Job:
    """One text that somebody wants.

    prompt_ids  what to continue;  sampling: temperature, top_p, seed, stop_ids ...
    limit       how many tokens may be written
    tell        called from the engine's thread, once for every token with its id;
                at the end with "stop" or "length", or the exception that ended it
    """
    prompt_ids: Sequence[int]
    limit: int
    tell: Callable[[int | str | Exception], None]
    sampling: dict = field(default_factory=dict)
    written: int = 0
    gone: bool = False                  # nobody waits for it any more


class Seating:
    """Who waits and who sits in which place of the engine: the loop of a server,
    one round at a time. First come, first served."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.waiting: deque[Job] = deque()
        self.seated: dict[int, Job] = {}                       # place: its job

    def round(self) -> None:
        """Those who left make room, those who wait take it, one token for all."""
        self.clear_places()
        self.seat_newcomers()
        if self.seated:
            self.write_one_token()

    def clear_places(self) -> None:
        for place, job in list(self.seated.items()):
            if job.gone:
                self.engine.release(place)
                del self.seated[place]

    def seat_newcomers(self) -> None:
        while self.waiting and len(self.seated) < self.engine.batch_size:
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
        for place, token in self.engine.step().items():
            job = self.seated[place]
            if token is None:                          # its place is free already
                job.tell("length" if job.written >= job.limit else "stop")
                del self.seated[place]
            else:
                job.written += 1
                job.tell(token)


class Desk(Seating):
    """Takes jobs from any thread and has them written by one of its own.

    engine       whose places are used; nobody else may use it meanwhile
    max_waiting  jobs that may wait for a place; more are refused with Busy
    """

    def __init__(self, engine: Engine, max_waiting: int = 64):
        super().__init__(engine)
        self.max_waiting, self.closed = max_waiting, False
        self.errands: deque[Callable[[], None]] = deque()
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=work_until_closed, args=(self,),
                                       daemon=True)
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
        """Nobody waits for this job: its place is free before the next step."""
        with self.changed:
            job.gone = True
            with suppress(ValueError):                 # it does not wait any more
                self.waiting.remove(job)
            self.changed.notify()

    def run_between(self, errand: Callable[[], None]) -> None:
        """Have something else done by the engine's thread, between two steps."""
        with self.changed:
            if self.closed or len(self.errands) >= self.max_waiting:
                raise Busy(f"{len(self.errands)} requests wait already")
            self.errands.append(errand)
            self.changed.notify()

    def close(self) -> None:
        """Finish the current step, refuse what is not done, end the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()


def work_until_closed(desk: Desk) -> None:
    """What the desk's thread does until the desk is closed: errands, then a round.
    A step that fails ends the texts that took part, and nothing else."""
    while not desk.closed:
        with desk.changed:
            while not (desk.waiting or desk.seated or desk.errands or desk.closed):
                desk.changed.wait()
            errands, desk.errands = desk.errands, deque()
        for errand in errands:
            errand()
        try:
            desk.round()
        except Exception as error:
            end_all(desk, error)
    end_all(desk, Busy("the server is closing"))
    for job in desk.waiting:
        job.tell(Busy("the server is closing"))


def end_all(seating: Seating, error: Exception) -> None:
    """Tell all who are seated, and free their places."""
    for place, job in seating.seated.items():
        job.tell(error)
        if place in seating.engine.seats:
            seating.engine.release(place)
    seating.seated = {}
