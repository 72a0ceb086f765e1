"""The plumbing of a training run: checkpoints, resuming, several processes, interrupts,
the progress line. What is being trained, and how, is in train.py."""

import atexit
import contextlib
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimistral import attention
from minimistral.files import draft_of, write_whole
from minimistral.onednn import wide_products

# Settings that a resumed run may change, as they do not change the weights.
FREE = {"folder", "save_every", "eval_every"}


@dataclass
class TrainRecord:
    """What happened in a run.

    config: the TrainConfig as a dict; losses: nats per token of every step; evaluations:
    (step, nats per token), the step counted from 1; floor: nats per token, or None;
    seconds: time spent training in all sittings; tokens: tokens read
    """
    config: dict
    floor: float | None = None
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self, path: str | Path | None = None) -> str:
        """The record as JSON text, also written to `path` if given."""
        text = json.dumps({**asdict(self), "tokens_per_second": self.tokens_per_second})
        if path is not None:
            write_whole(Path(path), text + "\n")
        return text


class Run:
    """One run of `train`: a context that resumes, saves, and ends in good order."""

    def __init__(self, model: nn.Module, optimizers: list, config, tokens, floor, progress):
        self.model, self.optimizers, self.config = model, optimizers, config
        self.rank, self.world = join_processes(model.device)
        if config.batch_size < self.world * config.accumulation:
            raise ValueError(f"batch_size={config.batch_size} rows are too few for "
                             f"{self.world} processes with accumulation={config.accumulation}")
        self.record = TrainRecord(asdict(config), floor)
        self.show = progress and self.rank == 0
        self.done = 0                                    # steps completed
        self.identity = {
            "config": {k: v for k, v in json.loads(json.dumps(asdict(config))).items()
                       if k not in FREE},
            "model": json.loads(model.config.to_json()),
            "tokens": fingerprint(tokens)}

    # ------------------------------------------------------------ beginning and end

    def __enter__(self) -> "Run":
        if self.world > 1:                               # all begin with the same weights
            for weight in self.model.parameters():
                dist.broadcast(weight.data, 0)
        if self.config.folder is not None:
            self.resume(Path(self.config.folder))
        self.interrupted, self.old_handler = False, None
        with contextlib.suppress(ValueError):            # not in the main thread: no handler
            self.old_handler = signal.signal(signal.SIGINT, self.on_interrupt)
        self.line = ProgressLine(self) if self.show else None
        self.quick = contextlib.ExitStack()
        if self.model.device.type == "cpu":
            self.quick.enter_context(kept_memory())
        if self.config.compile:
            if self.model.device.type == "cpu":
                self.quick.enter_context(matmul_attention())
                self.quick.enter_context(wide_products(self.model))
            self.quick.enter_context(compiled_layers(self.model))
        self.clock = time.perf_counter()
        return self

    def __exit__(self, error_type, error, trace) -> None:
        self.quick.close()
        if self.old_handler is not None:
            signal.signal(signal.SIGINT, self.old_handler)
        if self.line:
            self.line.close()

    def on_interrupt(self, *_) -> None:
        if self.interrupted:                             # the second time, without delay
            raise KeyboardInterrupt
        self.interrupted = True                          # the first time, after this step

    def steps_left(self) -> Iterator[int]:
        yield from range(self.done, self.config.steps)

    # ------------------------------------------------------------ during a step

    def sum_gradients(self, loss: Tensor) -> float:
        """Add up gradients and loss over the processes, in one message."""
        if self.world > 1:
            weights = [w for w in self.model.parameters()]
            for weight in weights:                       # an expert may have had no token
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            flat = torch.cat([w.grad.flatten() for w in weights] + [loss.reshape(1)])
            dist.all_reduce(flat)
            *grads, loss = flat.split([w.numel() for w in weights] + [1])
            for weight, grad in zip(weights, grads):
                weight.grad.copy_(grad.view_as(weight))
        return float(loss)

    def check_loss(self, loss: float, step: int, lr: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss became {loss} at step {step + 1} (learning rate {lr:.2e}); the "
                f"weights are those of before this step. Try a lower lr, more warmup_steps, "
                f"or look for NaN in the weights that training began with")

    def evaluated(self, step: int, loss: float) -> None:
        self.record.evaluations.append((step + 1, loss))

    def step_done(self, step: int, loss: float) -> None:
        """Note a finished step; save if it is time, or if the user wants to stop."""
        self.done = step + 1
        record, config = self.record, self.config
        record.losses.append(loss)
        record.tokens += config.batch_size * config.seq_len
        now = time.perf_counter()
        record.seconds, self.clock = record.seconds + now - self.clock, now
        last = self.done == config.steps
        if config.folder and (self.interrupted or last or self.done % config.save_every == 0):
            if self.rank == 0:
                self.save(Path(config.folder))
        if self.line:
            self.line.update(last)
        if self.interrupted and not last:
            kept = (f"; the same call resumes from {config.folder}" if config.folder else
                    "; the weights are those of this step (give a folder to resume)")
            raise KeyboardInterrupt(f"stopped after step {self.done} of {config.steps}{kept}")

    # ------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """Write weights and optimiser to a new file, whole or not at all; keep two."""
        record = asdict(self.record)
        state = {"step": self.done, "identity": self.identity, "record": record}
        path = folder / f"step-{self.done:08d}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in self.named_tensors()}
        try:
            with draft_of(path) as draft:
                save_file(tensors, draft, {"state": json.dumps(state)})
        except (OSError, SafetensorError) as error:
            raise OSError(f"could not write {path}: {error}. What was saved before is intact; "
                          f"free some disk space and run the same call again") from error
        killed = folder.glob(".step-*.part")             # what a save left that was killed
        for old in [*sorted(folder.glob("step-*.safetensors"))[:-2], *killed]:
            old.unlink()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.model.named_parameters():
            yield f"model.{name}", weight.data
            for i, optimizer in enumerate(self.optimizers):
                for key, value in optimizer.state.get(weight, {}).items():
                    yield f"optimizer.{i}.{key}.{name}", value

    def resume(self, folder: Path) -> None:
        """Go on from the newest checkpoint in the folder that can be read, if any."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
            try:
                with safe_open(path, "pt", device=str(self.model.device)) as file:
                    state = json.loads(file.metadata()["state"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
            except (SafetensorError, OSError, KeyError, TypeError, ValueError):
                continue                                 # damaged: the one before it serves
            self.check_identity(state["identity"], path)
            self.restore(state, tensors)
            return

    def check_identity(self, theirs: dict, path: Path) -> None:
        """Raise ValueError if the checkpoint belongs to another run."""
        for part, what in (("model", "model's"), ("config", "training's")):
            for key in self.identity[part].keys() | theirs[part].keys():
                here, there = self.identity[part].get(key), theirs[part].get(key)
                if here != there:
                    raise ValueError(f"{path} belongs to another run: the {what} {key} is "
                                     f"{here!r} here and {there!r} there. Use another "
                                     f"folder, or delete this one to begin again")
        if self.identity["tokens"] != theirs["tokens"]:
            raise ValueError(f"{path} belongs to a run on another text: use another folder, "
                             f"or delete this one to begin again")

    def restore(self, state: dict, tensors: dict[str, Tensor]) -> None:
        weights = dict(self.model.named_parameters())
        for name, weight in weights.items():
            weight.data.copy_(tensors.pop(f"model.{name}"))
        for full_name, tensor in tensors.items():
            _, i, key, name = full_name.split(".", 3)
            self.optimizers[int(i)].state[weights[name]][key] = tensor
        self.done = state["step"]
        record = self.record
        record.losses = state["record"]["losses"]
        record.evaluations = [tuple(pair) for pair in state["record"]["evaluations"]]
        record.seconds, record.tokens = state["record"]["seconds"], state["record"]["tokens"]


def fingerprint(tokens) -> str:
    """A hash of the text, so that a run never resumes on another one."""
    digest = hashlib.sha256()
    for part in tokens:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------- quicker steps


def masked_matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`attention.plain_attend` with the mask added inside the product of q and k.

    q: (B, T, H, D), k and v: (B, S, K, D), mask (T, S) or (B, T, S) -> (B, T, H, D)
    """
    n = q.shape[2] // k.shape[2]
    blind = ~mask.any(dim=-1, keepdim=True)                        # sees nothing: zeros
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    hidden = hidden.masked_fill(~(mask | blind), -math.inf).unsqueeze(-3)
    k, v = attention.repeat_heads(k, n), attention.repeat_heads(v, n)
    q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    out = (q @ k.transpose(-1, -2) + hidden).softmax(-1) @ v
    return out.transpose(1, 2).masked_fill(blind.unsqueeze(-1), 0.0)


@contextlib.contextmanager
def matmul_attention() -> Iterator[None]:
    """Train with two matrix products instead of PyTorch's fused kernel. Compiled, a CPU
    is faster this way (benchmarks/training.py measures both)."""
    fused, attention.fast_attend = attention.fast_attend, masked_matmul
    try:
        yield
    finally:
        attention.fast_attend = fused


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory for the next step. By itself glibc gives each block above 32 MB, as
    logits are, back to Linux, which fills it with zeros for the next step, page by page. Kept,
    a training holds up to an eighth more memory, that of a mixture up to a third."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, give_back = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):                   # not Linux, or another libc
        yield
        return
    trim, threshold, blocks = -1, -3, -4                           # malloc.h
    mallopt(blocks, 0)
    mallopt(trim, 2**31 - 1)
    try:
        yield
    finally:                                                       # where glibc itself ends up
        mallopt(blocks, 65536)
        mallopt(threshold, 2**25)
        mallopt(trim, 2**26)
        give_back(0)


@contextlib.contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Run the layers through torch.compile wherever gradients are asked for."""
    for layer in model.layers:
        layer.forward = when_learning(torch.compile(layer.forward), layer.forward)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward                                      # the class's again


def when_learning(compiled, plain):
    def forward(*args, **kwargs):
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)
    return forward


# ---------------------------------------------------------------- several processes


def join_processes(device: torch.device) -> tuple[int, int]:
    """(rank, world) as torchrun set them, else (0, 1). The processes meet at the first call
    and part when they end."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def process_device() -> torch.device:
    """The device of this process: its own GPU under torchrun, if there are GPUs."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


# ---------------------------------------------------------------- the progress line


class ProgressLine:
    """One line on standard error with loss, floor and speed: rewritten in place on a
    terminal, a new one every 20 seconds in a log."""

    def __init__(self, run: Run):
        self.run, self.start_step, self.start = run, run.done, time.perf_counter()
        self.in_place = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.pause = 0.5 if self.in_place else 20.0
        self.next = self.start

    def update(self, last: bool) -> None:
        now = time.perf_counter()
        if now >= self.next or last:
            self.next = now + self.pause
            end = "" if self.in_place else "\n"
            sys.stderr.write(("\r" if self.in_place else "") + self.text(now) + end)
            sys.stderr.flush()

    def text(self, now: float) -> str:
        run, record = self.run, self.run.record
        recent = record.losses[-50:]
        pace = (run.done - self.start_step) / max(now - self.start, 1e-9)
        left = (run.config.steps - run.done) / max(pace, 1e-9)
        parts = [f"step {run.done}/{run.config.steps}",
                 f"loss {sum(recent) / len(recent):.4f}"]
        if record.evaluations:
            parts.append(f"val {record.evaluations[-1][1]:.4f}")
        if record.floor is not None:
            parts.append(f"floor {record.floor:.4f}")
        rate = pace * run.config.batch_size * run.config.seq_len
        parts += [f"{rate:,.0f} tokens/s", f"{left / 60:.1f} min left  "]
        return "  ".join(parts)

    def close(self) -> None:
        if self.in_place:
            sys.stderr.write("\n")
