"""Training: the order of the data, the loss, the optimiser, the schedule, the loop.

Everything random comes from `seed` and the number of the step, so that a run that
was stopped goes on as if nothing had happened, and several processes share a batch.
Saving, resuming and the wiring of processes are plumbing: train_run.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.moe import balance_loss, record_routing
from minimistral.train_run import Run, TrainRecord

IGNORE = -100                       # a target that counts in no loss


@dataclass(frozen=True)
class TrainConfig:
    """The numbers that define one training run.

    steps, batch_size   updates of the weights, and rows of text for each
    seq_len             tokens in a row
    lr, min_lr          highest learning rate, and the last one as a share of it
    warmup_steps        updates over which the rate rises to `lr`
    weight_decay        pull of the matrices towards zero, times the rate, each step
    betas               memory of AdamW's two running means
    clip                longest gradient (as a vector of all weights) let through
    accumulation        parts that a batch is computed in, to save memory
    optimizer           "adamw", or "muon" for the matrices inside the layers
    at_starts           every row begins where a document begins
    balance             weight of the experts' balance loss, taken for each part of
                        a batch by itself; 0 is off
    dtype               "float32", or "bfloat16" for the matrix products
    compile             let torch.compile fuse the layers (needs a C++ compiler)
    eval_every          steps between two evaluations
    seed                draws the order of the data
    folder, save_every  where to keep checkpoints, if anywhere, and how often
    """
    steps: int
    batch_size: int = 16
    seq_len: int = 256
    lr: float = 3e-3
    min_lr: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulation: int = 1
    optimizer: str = "adamw"
    at_starts: bool = False
    balance: float = 0.0
    dtype: str = "float32"
    compile: bool = False
    eval_every: int = 250
    seed: int = 0
    folder: str | None = None
    save_every: int = 250

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        check_train_config(self)


def check_train_config(config: TrainConfig) -> None:
    """Raise ValueError for numbers that no run can have."""
    for name in ("steps", "batch_size", "seq_len", "accumulation", "eval_every",
                 "save_every"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 up")
    for name in ("lr", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be above 0")
    for name in ("weight_decay", "balance", "warmup_steps"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must not be below 0")
    if not 0 <= config.min_lr <= 1:
        raise ValueError(f"min_lr={config.min_lr} is a share of lr, from 0 to 1: "
                         f"did you give a learning rate?")
    if config.batch_size < config.accumulation:
        raise ValueError(f"batch_size={config.batch_size} rows cannot be cut into "
                         f"accumulation={config.accumulation} parts")
    for name, legal in (("optimizer", ("adamw", "muon")),
                        ("dtype", ("float32", "bfloat16"))):
        if getattr(config, name) not in legal:
            raise ValueError(
                f"{name}={getattr(config, name)!r} must be one of {legal}")


# ---------------------------------------------------------------------- the data


class Tokens(NamedTuple):
    """Documents laid end to end.

    ids: int64 (N,), <s> ... </s> <s> ... </s> ...
    starts: int64 (D,), where each document begins. What stands there follows </s>
    with certainty, so as a target it is not counted.
    """
    ids: Tensor
    starts: Tensor


class Rows(NamedTuple):
    """Rows of text and what comes next, each (R, T): inputs; targets, IGNORE where
    nothing is to be predicted; positions, -1 for padding."""
    inputs: Tensor
    targets: Tensor
    positions: Tensor


def encode_documents(tokenizer, documents: Sequence[str]) -> Tokens:
    """Every document as <s> ... </s>, laid end to end."""
    encoded = tokenizer.encode_batch(list(documents), bos=True, eos=True)
    return join_documents(encoded)


def join_documents(documents: Sequence[Sequence[int]]) -> Tokens:
    """Lay encoded documents end to end and remember where each begins."""
    lengths = torch.tensor([0] + [len(ids) for ids in documents])
    ids = torch.tensor([token for ids in documents for token in ids])
    return Tokens(ids, lengths.cumsum(0)[:-1])


def row_starts(tokens: Tokens, config: TrainConfig, turn: int) -> Tensor:
    """Where the rows of one round through the text begin, shuffled: (rows,).

    Without `at_starts` a round cuts the text into rows side by side, from an offset
    that changes with every round.
    """
    random = torch.Generator().manual_seed(config.seed * 1_000_003 + turn)
    if config.at_starts:
        starts = tokens.starts
    else:
        rows = max(1, len(tokens.ids) // config.seq_len)
        offset = torch.randint(config.seq_len, (), generator=random)
        starts = offset + torch.arange(rows) * config.seq_len
    return starts[torch.randperm(len(starts), generator=random)]


def training_batch(tokens: Tokens, step: int, config: TrainConfig
                   ) -> tuple[Tensor, Tensor]:
    """The rows of one step: inputs and targets, each (batch_size, seq_len). A
    function of `seed` and `step` alone. After its end the text starts again.
    """
    begins, needed = [], config.batch_size
    rows = len(row_starts(tokens, config, 0))
    turn, place = divmod(step * config.batch_size, rows)
    while needed:
        begins.append(row_starts(tokens, config, turn)[place:place + needed])
        needed -= len(begins[-1])
        turn, place = turn + 1, 0
    span = torch.cat(begins)[:, None] + torch.arange(config.seq_len + 1)
    span = span % len(tokens.ids)                                    # (B, T + 1)
    first = torch.isin(span[:, 1:], tokens.starts)
    rows = tokens.ids[span]
    return rows[:, :-1], rows[:, 1:].masked_fill(first, IGNORE)


def validation_rows(documents: Sequence[Sequence[int]], seq_len: int) -> Rows:
    """Pack whole encoded documents into rows: each begins with a document and holds
    as many as fit; one that is longer than a row is cut, and goes on in the next.

    Every token is a target exactly once, but for the first of each document.
    """
    rows: list[list[tuple[int, int]]] = []
    for ids in documents:
        pairs = list(zip(ids[:-1], ids[1:]))
        for cut in range(0, len(pairs), seq_len):
            piece = pairs[cut:cut + seq_len]
            if rows and len(rows[-1]) + 1 + len(piece) <= seq_len:
                rows[-1] += [(before, IGNORE), *piece]           # </s>, then <s>
            else:
                rows.append(piece)
        before = ids[-1]
    inputs = torch.zeros(len(rows), seq_len, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE)
    positions = torch.full_like(inputs, -1)
    for r, row in enumerate(rows):
        inputs[r, :len(row)], targets[r, :len(row)] = torch.tensor(row).T
        positions[r, :len(row)] = torch.arange(len(row))
    return Rows(inputs, targets, positions)


# ---------------------------------------------------------------------- the loss


def next_token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of -ln p(target) over all counted targets, in nats.

    logits: (B, T, V); targets: (B, T), not counted where IGNORE
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                           ignore_index=IGNORE, reduction="sum")


class Evaluation(NamedTuple):
    """What predicting a text cost: nats in all, and how many tokens there were."""
    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def per_byte(self, n_bytes: int) -> float:
        """Nats per byte of the text, comparable across vocabularies."""
        return self.nats / n_bytes


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows, batch_size: int = 32) -> Evaluation:
    """Predict every target of the rows once, `batch_size` rows at a time."""
    nats = 0.0
    for part in zip(*(column.split(batch_size) for column in rows)):
        inputs, targets, positions = (x.to(model.device) for x in part)
        nats += float(next_token_nats(model(inputs, positions=positions), targets))
    return Evaluation(nats, int((rows.targets != IGNORE).sum()))


# ---------------------------------------------------- the optimiser, the schedule


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: matrices, which decay, and the rest, which does not.

    A norm's weights belong at 1, not at 0. A row of the embeddings moves only when
    its token occurs, but would decay at every step: rare tokens would fade away.
    """
    decays, stays = [], []
    for name, weight in model.named_parameters():
        matrix = weight.dim() >= 2 and "embeddings" not in name
        (decays if matrix else stays).append(weight)
    return [{"params": decays, "weight_decay": weight_decay},
            {"params": stays, "weight_decay": 0.0}]


def make_optimizers(model: nn.Module, config: TrainConfig
                    ) -> list[torch.optim.Optimizer]:
    """AdamW for everything (Loshchilov and Hutter 2019), or Muon for the matrices
    inside the layers (Jordan et al. 2024) and AdamW for what is left.

    Muon's steps are scaled to the length of AdamW's, so one rate serves both.
    """
    groups = parameter_groups(model, config.weight_decay)
    optimizers = []
    if config.optimizer == "muon":
        inside = {w for w in model.layers.parameters() if w.dim() == 2}
        groups[0]["params"] = [w for w in groups[0]["params"] if w not in inside]
        optimizers.append(torch.optim.Muon(
            [w for w in model.parameters() if w in inside], lr=config.lr,
            weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    groups = [group for group in groups if group["params"]]
    optimizers.append(torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, fused=True))
    return optimizers


def learning_rate(step: int, config: TrainConfig) -> float:
    """A straight rise over `warmup_steps`, then half a cosine down to min_lr * lr
    at the last step. Steps count from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    falling = max(1, config.steps - 1 - config.warmup_steps)
    done = (step - config.warmup_steps) / falling
    cosine = (1 + math.cos(math.pi * done)) / 2                      # from 1 to 0
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


# ---------------------------------------------------------------------- the loop


def accumulate_gradients(model: nn.Module, batch: tuple[Tensor, Tensor],
                         config: TrainConfig, rank: int = 0, world: int = 1
                         ) -> Tensor:
    """Add the gradient of the batch's loss to the weights, part by part. Returns
    the loss in nats per counted target.

    Each part is divided by the targets of the *whole* batch. A mean of the parts'
    means would give a target in a part with few of them too much weight. Of several
    processes each takes every `world`-th row; the sums of their losses and of their
    gradients are those of the whole batch.
    """
    inputs, targets = batch
    counted = (targets != IGNORE).sum().clamp(min=1)
    loss = torch.zeros((), device=model.device)
    for rows in torch.arange(rank, len(inputs), world).chunk(config.accumulation):
        part_loss, extra = forward_loss(
            model, inputs[rows], targets[rows], config, counted)
        (part_loss + extra * len(rows) / len(inputs)).backward()
        loss += part_loss.detach()
    return loss


def forward_loss(model: nn.Module, inputs: Tensor, targets: Tensor,
                 config: TrainConfig, counted: Tensor
                 ) -> tuple[Tensor, Tensor | float]:
    """One forward pass: the nats of the targets over `counted`, and the weighted
    balance loss of the experts (0 where there is none)."""
    device = model.device
    inputs, targets = inputs.to(device), targets.to(device)
    half = config.dtype == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half), \
            record_routing(model) as routing:                           # chapter 9
        logits = model(inputs)
    loss = next_token_nats(logits, targets) / counted.to(device)
    if not (config.balance and routing):
        return loss, 0.0
    k = model.config.moe.num_experts_per_tok                            # chapter 9
    return loss, config.balance * balance_loss(routing, k)              # chapter 9


def update(model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int,
           config: TrainConfig) -> None:
    """Move the weights one step along their gradients, which are clipped before and
    cleared after."""
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()


def train(model: nn.Module, tokens: Tokens | Tensor, config: TrainConfig, *,
          val_rows: Rows | None = None, floor: float | None = None,
          progress: bool = True) -> TrainRecord:
    """Train the model in place, on its device. Returns the record of losses.

    tokens: `encode_documents`' result, or a plain int tensor (N,) of one long text
    val_rows: what to evaluate on; floor: the loss that no model can beat, in nats
    per token, shown beside the losses. With `config.folder` a run that was stopped
    goes on from its last checkpoint. Under torchrun the processes share each batch.
    """
    tokens = check_tokens(tokens, model.config.vocab_size, config)
    optimizers = make_optimizers(model, config)
    with Run(model, optimizers, config, tokens, floor, progress) as run:
        for step in run.steps_left():
            batch = training_batch(tokens, step, config)
            loss = accumulate_gradients(model, batch, config, run.rank, run.world)
            loss = run.sum_gradients(loss)          # over the processes, if several
            run.check_loss(loss, step, learning_rate(step, config))
            update(model, optimizers, step, config)
            due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
            if val_rows is not None and due:
                run.evaluated(step, evaluate(model, val_rows).loss)
            run.step_done(step, loss)
    return run.record


def check_tokens(tokens: Tokens | Tensor, vocab_size: int, config: TrainConfig
                 ) -> Tokens:
    """Raise ValueError for text that cannot be trained on; wrap a plain tensor."""
    if isinstance(tokens, Tensor):
        tokens = Tokens(tokens, torch.zeros(0, dtype=torch.long))
    ids = tokens.ids
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"tokens must be whole numbers of shape (N,), not "
                         f"{ids.dtype} of shape {tuple(ids.shape)}")
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens are too few to train on: at least 2")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"tokens from {low} to {high} do not fit a vocabulary of "
                         f"{vocab_size}: do the tokenizer and the model match?")
    if config.at_starts and not len(tokens.starts):
        raise ValueError("at_starts=True needs to know where documents start: "
                         "make tokens with encode_documents")
    return Tokens(ids.long(), tokens.starts)
