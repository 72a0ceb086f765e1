"""The engine: a fast model's step, compiled, and places in which texts are written.

Each place of the batch holds one text. A text that ends frees its place for the
next one while the others go on, so that a step always serves as many as there are.
"""

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minimistral.devices import (describe_device, memory_explained, pick_device,
                                 pick_dtype)
from minimistral.fast_model import FastModel
from minimistral.generate import as_prompts, choose, row_generator
from minimistral.model import check_ids
from minimistral.sampling import check_sampling

KNOBS = ("a smaller batch_size or max_length, dtype='bfloat16', weights in 8 or 4 "
         "bits (quantize.py)")


# ------------------------------------------------------------ the step


class Stepper:
    """A `FastModel` whose steps are compiled, each at its first use.

    model       a Transformer; it is moved to the device and cast to the dtype
    batch_size  how many texts have a place at once
    max_length  how many positions a layer without a window holds, 4,096 by default
    dtype       "float32" or "bfloat16"; None for the model's own
    device      None for where the model is, "auto" for the fastest that is there
    compile     "auto": compile, or warn and go on without; True: or raise; False
    chunk       tokens of a prompt read at once: 256 on a CPU, 2,048 on a GPU
    spare       how many of the last tokens can be taken back
    Raises ValueError for a wrong argument, MemoryError with an estimate.
    """

    def __init__(self, model: nn.Module, batch_size: int = 1, max_length=None, *,
                 dtype=None, device=None, compile="auto", chunk: int | None = None,
                 spare: int = 0, progress: bool = True):
        check_engine(batch_size, max_length, compile, chunk, spare)
        device = pick_device(device or model.device)
        dtype = pick_dtype(dtype) or model.tok_embeddings.weight.dtype
        weights = sum(
            w.numel() * (dtype if w.is_floating_point() else w.dtype).itemsize
            for w in (*model.parameters(), *model.buffers()))
        self.estimate = (f"the weights take {weights / 1e9:.2f} GB in {dtype}, "
                         f"besides the caches of {batch_size} texts")
        with memory_explained(self.estimate, KNOBS):
            model.to(device=device, dtype=dtype)
            self.fast = FastModel(model, batch_size, max_length, spare)
        self.config, self.batch_size = model.config, batch_size
        self.chunk = chunk or (256 if device.type == "cpu" else 2048)
        self.device, self.dtype, self.limit = device, dtype, self.fast.limit
        self.compile, self.progress = compile, progress
        self.ways: dict[tuple[int, int], tuple] = {}    # shape: how, and the step

    @torch.no_grad()
    def run(self, ids: list[list[int]], positions: list[list[int]]
            ) -> tuple[Tensor, Tensor]:
        """`FastModel.forward` in the fastest way there is: (R, T) -> logits (R, T,
        V), likeliest ids (R, T). Both may be overwritten by the next run."""
        shape = len(ids), len(ids[0])
        if shape not in self.ways:
            self.ways[shape] = fastest_step(self, *shape)
        how, step = self.ways[shape]
        with memory_explained(self.estimate, KNOBS):
            return step(torch.tensor(ids, device=self.device),
                        torch.tensor(positions, device=self.device))

    @torch.no_grad()
    def read(self, place: int, prompt: list[int], start: int = 0) -> Tensor:
        """Read a prompt into a place that holds `start` tokens, chunk by chunk: the
        logits after its last token, (V,)."""
        for part in range(0, len(prompt), self.chunk):
            ids = torch.tensor([prompt[part:part + self.chunk]], device=self.device)
            end = start + ids.shape[1]
            positions = torch.arange(start, end, device=self.device)[None]
            with memory_explained(self.estimate, "a smaller chunk; " + KNOBS):
                x = self.fast.features(ids, positions, slice(place, place + 1), end)
            start = end
        return self.fast.logits(x[:, -1])[0]    # of two axes: three would be copied


def fastest_step(stepper: Stepper, rows: int, tokens: int) -> tuple:
    """How a step of this shape is run, in words, and the function that runs it:
    compiled and on an NVIDIA GPU recorded, or as it stands where that fails."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device=stepper.device)
    nowhere = torch.full_like(ids, -1)              # written into no slot
    how, step, begun = "eager", stepper.fast.forward, time.perf_counter()
    wanted = stepper.compile is True or (stepper.compile == "auto"
                                         and stepper.device.type in ("cpu", "cuda"))
    if wanted:
        say(stepper, f"compiling the step for {rows} x {tokens} tokens ...")
        try:
            compiled = compiled_step(stepper.fast)
            compiled(ids, nowhere)
            how, step = "compiled", compiled
        except Exception as error:
            if stepper.compile is True:
                raise
            why = str(error).strip().partition("\n")[0]
            warnings.warn(f"torch.compile failed, so the engine goes on without, "
                          f"which is slower: {type(error).__name__}: {why}; "
                          f"compile=False asks for this quietly", stacklevel=2)
        say(stepper, f" {how} after {time.perf_counter() - begun:.0f} s\n")
    if stepper.device.type == "cuda" and stepper.compile is not False:
        try:
            how, step = f"{how}, as a CUDA graph", Recording(step, ids, nowhere)
        except RuntimeError as error:
            warnings.warn(f"the step can't be recorded as a CUDA graph, so each "
                          f"operation is started by Python: {error}", stacklevel=2)
    return how, step


def say(stepper: Stepper, text: str) -> None:
    """A line that shows what takes so long, on the error stream."""
    if stepper.progress:
        print(text, end="", file=sys.stderr, flush=True)


def compiled_step(fast: FastModel):
    """The whole step as one compiled function of fixed shapes."""
    def step(ids: Tensor, positions: Tensor):
        return fast.forward(ids, positions)

    # PyTorch counts versions per piece of code and gives up after a few: a model
    # of another engine is no version of this one's.
    step.__code__ = step.__code__.replace()
    # Before each call it would look whether any layer is another one now, which
    # takes a tenth of a small model's step; here shapes and layers are fixed.
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    if fast.model.device.type == "cuda":
        options["coordinate_descent_tuning"] = True       # for products of one row
    return torch.compile(step, fullgraph=True, dynamic=False, options=options)


class Recording:
    """A step as a CUDA graph: its operations are recorded once, then all started by
    one call. Inputs and outputs keep their place in memory."""

    def __init__(self, step, ids: Tensor, positions: Tensor):
        self.ids, self.positions = ids, positions
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):                            # what is set up once, is
                step(ids, positions)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = step(ids, positions)

    def __call__(self, ids: Tensor, positions: Tensor):
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.out


def check_engine(batch_size: int, max_length, compile, chunk, spare: int) -> None:
    """Raise ValueError for numbers with which no engine can be made."""
    for name, value, least in [("batch_size", batch_size, 1), ("chunk", chunk, 1),
                               ("max_length", max_length, 1), ("spare", spare, 0)]:
        if name in ("max_length", "chunk") and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least "
                             f"{least}")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile={compile!r} must be 'auto', True or False")


# ------------------------------------------------------------ places


@dataclass
class Seat:
    """One text that is being written.

    position  of the next token to be run;  left  how many may still be chosen
    token     chosen and not yet run, None just after the prompt
    """
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None
    stop_ids: frozenset[int]
    position: int
    left: int
    logits: Tensor                          # (V,)
    likeliest: int = -1                     # -1: to be found, from the logits
    token: int | None = None

    def choose(self) -> int | None:
        """The next token; None when the text has ended."""
        if self.left == 0:
            return None
        self.left -= 1
        if self.temperature == 0 and self.likeliest >= 0:
            self.token = self.likeliest
        else:
            self.token = int(choose(self.logits[None], self.temperature, self.top_k,
                                    self.top_p, [self.generator]))
        return None if self.token in self.stop_ids else self.token


class Places(Stepper):
    """Texts come and go while others are written: `admit` a prompt, `step` all
    texts by one token, `release` a place early. One thread at a time may call.

    seats  {place: the text that is written there}
    """

    seats: dict[int, Seat]

    def admit(self, prompt_ids: Sequence[int], *, max_new_tokens: int | None = None,
              temperature: float = 0.0, top_k: int | None = None,
              top_p: float | None = None, seed: int | None = None,
              stop_ids: Sequence[int] = ()) -> int:
        """Read a prompt into a free place, and return the place's number.

        Raises ValueError where no place is free or the text would be too long.
        """
        (prompt,), _ = as_prompts([list(prompt_ids)])
        check_sampling(temperature, top_k, top_p)
        check_ids(torch.tensor([prompt]), self.config.vocab_size)
        left = room_for(len(prompt), max_new_tokens, self.limit)
        free = set(range(self.batch_size)) - set(self.seats)
        if not free:
            raise ValueError(f"all {self.batch_size} places are taken: release "
                             f"one, or make an Engine with a larger batch_size")
        place = min(free)
        self.fast.forget(place)
        self.seats[place] = Seat(
            temperature, top_k, top_p, row_generator(seed, 0), frozenset(stop_ids),
            len(prompt), left, self.read(place, prompt))
        return place

    def step(self) -> dict[int, int | None]:
        """Write one token in every place: {place: its id}, or None for a text that
        has ended, whose place is then free. A stop id is not returned."""
        run_seats(self, self.seats)
        chosen = {place: seat.choose() for place, seat in self.seats.items()}
        for place, token in chosen.items():
            if token is None:
                self.release(place)
        return chosen

    def release(self, place: int) -> None:
        """Free a place at once; what it wrote is forgotten."""
        if self.seats.pop(place, None) is None:
            raise ValueError(f"place {place} is free already")
        self.fast.forget(place)


def run_seats(stepper: Stepper, seats: dict[int, Seat]) -> None:
    """Run the token that each text chose last, all of them in one step. Places
    without one take part with position -1. A text alone in place 0 runs alone."""
    moving = {place: seat for place, seat in seats.items()
              if seat.token is not None and seat.left}
    if not moving:
        return
    rows = 1 if max(moving) == 0 else stepper.batch_size
    ids, positions = [[0] for _ in range(rows)], [[-1] for _ in range(rows)]
    for place, seat in moving.items():
        ids[place], positions[place] = [seat.token], [seat.position]
        seat.position += 1
    logits, likeliest = stepper.run(ids, positions)
    found = likeliest[:, 0].tolist()
    for place, seat in moving.items():
        seat.logits, seat.likeliest = logits[place, 0], found[place]


def room_for(length: int, max_new_tokens: int | None, limit: int | None) -> int:
    """How many tokens may follow a prompt of this length. The last one is never
    run, so that it needs no position."""
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
    longest = sys.maxsize if limit is None else limit - length + 1
    if (max_new_tokens or 1) > longest:
        raise ValueError(f"a prompt of {length} and {max_new_tokens or 1} new "
                         f"tokens do not fit into {limit} positions: make an "
                         f"Engine with a larger max_length")
    return longest if max_new_tokens is None else max_new_tokens


# ------------------------------------------------------------ the engine


class Engine(Places):
    """The fast way to write: `generate` and `stream` as in generate.py, and the
    places on which a server stands. Its arguments are those of `Stepper`.

    >>> engine = Engine(model, batch_size=8)
    >>> engine.generate(prompts, 100, temperature=0.8, seed=1)
    """

    def __init__(self, model: nn.Module, batch_size: int = 1, max_length=None,
                 **options):
        super().__init__(model, batch_size, max_length, **options)
        self.seats = {}
        for rows in {1, batch_size}:                 # compiled before they are used
            self.run([[0]] * rows, [[-1]] * rows)

    def generate(self, prompt_ids, max_new_tokens: int, *, seed: int | None = None,
                 **sampling):
        """Continue a prompt, or a list of any number of prompts, as
        `minimistral.generate` does. sampling: temperature, top_k, top_p, stop_ids.
        """
        prompts, alone = as_prompts(prompt_ids)
        if self.seats:
            raise ValueError(f"{len(self.seats)} places are taken: generate needs "
                             f"the engine for itself; beside others admit and step")
        for prompt in prompts:
            room_for(len(prompt), max_new_tokens, self.limit)
        seeds = [None if seed is None else seed + i for i in range(len(prompts))]
        try:
            rows = write_all(self, prompts, seeds, max_new_tokens=max_new_tokens,
                             **sampling)
        finally:
            for place in list(self.seats):
                self.release(place)
        return rows[0] if alone else rows

    def stream(self, prompt_ids: Sequence[int], max_new_tokens: int, **sampling
               ) -> Iterator[int]:
        """The same for one prompt, each id as soon as it is chosen."""
        place = self.admit(prompt_ids, max_new_tokens=max_new_tokens, **sampling)
        try:
            while (token := self.step()[place]) is not None:
                yield token
        finally:
            if place in self.seats:
                self.release(place)

    def describe(self) -> dict[str, str]:
        """What is really in use: device, numbers, kernels, how each step is run."""
        steps = ", ".join(f"{rows} x {tokens}: {how}"
                          for (rows, tokens), (how, _) in self.ways.items())
        return describe_device(self.device, self.dtype) | {"steps": steps}


def write_all(places: Places, prompts: list[list[int]], seeds: list[int | None],
              **sampling) -> list[list[int]]:
    """Continue any number of prompts: as soon as a text ends, the next prompt takes
    its place."""
    rows: list[list[int]] = [[] for _ in prompts]
    waiting, owner = list(range(len(prompts)))[::-1], {}         # place: its prompt
    while waiting or owner:
        while waiting and len(owner) < places.batch_size:
            row = waiting.pop()
            place = places.admit(prompts[row], seed=seeds[row], **sampling)
            owner[place] = row
        for place, token in places.step().items():
            if token is None:
                owner.pop(place)
            else:
                rows[owner[place]].append(token)
    return rows
