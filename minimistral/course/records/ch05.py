"""Chapter 5, training: its core pieces and its exercises."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from minimistral.config import ModelConfig
from minimistral.model import Transformer
from minimistral.train import (
    IGNORE,
    Rows,
    TrainConfig,
    accumulate_gradients,
    forward_loss,
    learning_rate,
    next_token_nats,
    parameter_groups,
)

from ..exercises import Exercise, Hint, Misconception
from .fixtures import random_tensor


# ---------------------------------------------------------------- piece: next_token_nats


def two_rows_of_five_targets():
    targets = torch.tensor([[3, 0, IGNORE, 6, 2], [IGNORE, 5, 1, IGNORE, IGNORE]])
    return random_tensor(1, 2, 5, 7), targets


def very_sure_logits():
    targets = torch.tensor([[4, IGNORE, 2], [1, 0, 3], [IGNORE, 2, 2], [0, 4, IGNORE]])
    return random_tensor(2, 4, 3, 5, scale=90.0), targets


def a_row_without_targets():
    targets = torch.full((3, 4), IGNORE)
    targets[1] = torch.tensor([2, 8, 0, 5])
    return random_tensor(3, 3, 4, 9), targets


def _nats_and_gradient(candidate, logits, targets):
    """The result and what it asks of the logits: a loss without a gradient teaches nothing."""
    logits = logits.clone().requires_grad_()
    nats = candidate(logits, targets)
    (gradient,) = torch.autograd.grad(nats.sum(), logits)
    finite = nats.isfinite().all()
    return nats.detach(), gradient.flatten() if finite else torch.zeros(logits.numel())


def _gathered(logits, targets, log_p=None):
    log_p = logits.log_softmax(-1) if log_p is None else log_p
    picked = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked, targets != IGNORE


def _nats_by_gather(logits, targets):
    picked, counted = _gathered(logits, targets)
    return -(picked * counted).sum()


def _nats_by_loop(logits, targets):
    total = torch.zeros(())
    for b in range(targets.shape[0]):
        for t in range(targets.shape[1]):
            if targets[b, t] != IGNORE:
                row = logits[b, t]
                total = total + torch.logsumexp(row, 0) - row[targets[b, t]]
    return total


def _nats_by_transpose(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")


def _nats_masked(logits, targets):
    counted = targets != IGNORE
    return F.cross_entropy(logits[counted], targets[counted], reduction="sum")


def _entropy(reduction="sum", change=lambda logits: logits):
    def next_token_nats(logits, targets):
        return F.cross_entropy(change(logits).flatten(0, 1), targets.flatten(),
                               reduction=reduction)
    return next_token_nats


def _nats_shifted_again(logits, targets):
    return next_token_nats(logits[:, :-1], targets[:, 1:])


def _nats_with_token_zero(logits, targets):
    return -_gathered(logits, targets)[0].sum()


def _nats_naive(logits, targets):
    picked, counted = _gathered(logits, targets, logits.softmax(-1).log())
    return -picked[counted].sum()


def _nats_naive_times_mask(logits, targets):
    picked, counted = _gathered(logits, targets, logits.softmax(-1).log())
    return -(picked * counted).sum()


def _nats_over_positions(logits, targets):
    picked, counted = _gathered(logits, targets, logits.log_softmax(1))
    return -picked[counted].sum()


def _nats_other_ignored(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0,
                           reduction="sum")


def _nats_reshaped(logits, targets):
    B, T, V = logits.shape
    return F.cross_entropy(logits.reshape(B, V, T), targets, reduction="sum")


NATS = Exercise(
    name="next_token_nats", chapter=5, kind="piece", piece="train.next_token_nats",
    entry="next_token_nats", title="What the right tokens cost", difficulty="easy",
    importance="essential", minutes=6,
    reference=next_token_nats,
    fixtures=(two_rows_of_five_targets, very_sure_logits, a_row_without_targets),
    run=_nats_and_gradient,
    equivalents={
        "gather and mask": _nats_by_gather,
        "loop": _nats_by_loop,
        "cross_entropy with the vocabulary in the middle": _nats_by_transpose,
        "only the counted ones": _nats_masked,
    },
    misconceptions=(
        Misconception("mean", _entropy("mean"),
            "This is the mean over the counted targets. The sum was asked for: sums of parts "
            "can be added up, means cannot."),
        Misconception("every position by itself", _entropy("none"),
            "These are the nats of each position. One number is wanted: their sum."),
        Misconception("divided by all positions",
            lambda logits, targets: next_token_nats(logits, targets) / targets.numel(),
            "The sum was divided by the number of positions, the ignored ones included. Leave "
            "it a sum."),
        Misconception("shifted once more", _nats_shifted_again,
            "The targets arrive shifted by one already. You shifted again, so each position is "
            "asked for the token after the next."),
        Misconception("ignored targets read as token 0", _nats_with_token_zero,
            "Ignored places count as if token 0 were their answer. They must add nothing: "
            "neither to the sum nor to the gradient."),
        Misconception("logarithm of a softmax", _nats_naive,
            "A very small probability becomes 0, and its logarithm minus infinity, or NaN after "
            "a product. Take logarithm and softmax in one step, on the logits.",
            also=[_nats_naive_times_mask]),
        Misconception("three axes as they are", lambda logits, targets: F.cross_entropy(
                logits, targets, reduction="sum"),
            "Given three axes, cross-entropy takes the second one, T, for the vocabulary. Flatten "
            "the first two axes, of logits and of targets."),
        Misconception("softmax twice", _entropy(change=lambda logits: logits.softmax(-1)),
            "The softmax was done twice: cross-entropy wants the logits themselves and takes "
            "its own softmax."),
        Misconception("sign", lambda logits, targets: -next_token_nats(logits, targets),
            "The sign is turned round: logarithms of probabilities are negative, and the loss "
            "is minus their sum. Training would make the model worse."),
        Misconception("softmax over the positions", _nats_over_positions,
            "The softmax runs over the positions of the text. The tokens of the vocabulary "
            "compete with each other: the last axis."),
        Misconception("vocabulary axis by reshape", _nats_reshaped,
            "Reshaping to bring the vocabulary to the middle mixes the scores of different "
            "positions. Flatten the first two axes, or exchange axes."),
        Misconception("another value ignored", _nats_other_ignored,
            "A value other than IGNORE was left out, so -100 was looked up as if it were a "
            "token. Say that IGNORE does not count."),
        Misconception("a plain number", lambda logits, targets: next_token_nats(logits, targets).item(),
            "The result is a plain number without a way back. A loss must stay a tensor, or "
            "nothing can be learned from it."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take one position: the model's logits for it and the one right token. Which number "
             "says how surprised the model is?"),
        Hint("My shapes do not fit",
             "F.cross_entropy wants (N, V) and (N,). Every position is a case of its own, so "
             "N is B times T: flatten both."),
        Hint("The ignored places count",
             "F.cross_entropy takes ignore_index=IGNORE and reduction=\"sum\"; ignored places "
             "then add nothing."),
    ),
    praise="One number, and everything that training does follows from it.",
)


# ---------------------------------------------------------------- piece: learning_rate


def a_run_of_23_steps():
    return (TrainConfig(steps=23, lr=3e-3, min_lr=0.1, warmup_steps=5),)


def down_to_a_quarter_in_two_steps():
    return (TrainConfig(steps=9, lr=0.02, min_lr=0.25, warmup_steps=7),)


def without_warm_up():
    return (TrainConfig(steps=11, lr=0.5, min_lr=0.0, warmup_steps=0),)


def one_step_after_the_warm_up():
    return (TrainConfig(steps=5, lr=0.01, min_lr=0.1, warmup_steps=4),)


def _rates(candidate, config):
    """The rate of every step of the run."""
    return torch.tensor([float(candidate(step, config)) for step in range(config.steps)],
                        dtype=torch.float64)


def _schedule(rise=None, done=None, fall=None):
    """learning_rate with one part exchanged."""
    def learning_rate(step, config):
        if step < config.warmup_steps:
            return rise(step, config) if rise else config.lr * (step + 1) / config.warmup_steps
        falling = max(1, config.steps - 1 - config.warmup_steps)
        part = done(step, config) if done else (step - config.warmup_steps) / falling
        if fall:
            return fall(part, config)
        cosine = (1 + math.cos(math.pi * part)) / 2
        return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)
    return learning_rate


def _by_low_and_high(part, config):
    low = config.lr * config.min_lr
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * part))


def _by_sine(part, config):
    return config.lr * (1 - (1 - config.min_lr) * math.sin(math.pi * part / 2) ** 2)


RATE = Exercise(
    name="learning_rate", chapter=5, kind="piece", piece="train.learning_rate",
    entry="learning_rate", title="A rate for every step", difficulty="easy",
    importance="essential", minutes=8,
    reference=learning_rate,
    fixtures=(a_run_of_23_steps, down_to_a_quarter_in_two_steps, without_warm_up,
              one_step_after_the_warm_up),
    run=_rates,
    equivalents={
        "lowest and highest rate": _schedule(fall=_by_low_and_high),
        "a squared sine": _schedule(fall=_by_sine),
        "the smaller of two": _schedule(
            rise=lambda s, c: min(1.0, (s + 1) / c.warmup_steps) * c.lr),
    },
    misconceptions=(
        Misconception("begins at zero", _schedule(rise=lambda s, c: c.lr * s / c.warmup_steps),
            "The first step has rate 0 and teaches nothing. Steps count from 0, so the first one "
            "gets one part of the rise already.",
            also=[_schedule(
                      rise=lambda s, c: c.lr * s / c.warmup_steps,
                      done=lambda s, c: (s - c.warmup_steps) / (c.steps - c.warmup_steps))]),
        Misconception("one part too few",
            _schedule(rise=lambda s, c: c.lr * (s + 1) / (c.warmup_steps + 1)),
            "The warm-up ends below the highest rate. Its last step, number warmup_steps minus "
            "1, has the full rate."),
        Misconception("no warm-up", _schedule(rise=lambda s, c: c.lr),
            "The rate is at its highest from the first step. Over warmup_steps it has to rise in "
            "a straight line."),
        Misconception("ends one step late",
            _schedule(done=lambda s, c: (s - c.warmup_steps) / max(1, c.steps - c.warmup_steps)),
            "The last step does not reach the lowest rate. Steps count from 0, so the last one "
            "is steps minus 1."),
        Misconception("the fall counts from step 0",
            _schedule(done=lambda s, c: s / max(1, c.steps - 1)),
            "The cosine counts from the beginning of the run, so the rate jumps down after the "
            "warm-up. It starts where the warm-up ends."),
        Misconception("down to zero",
            _schedule(fall=lambda p, c: c.lr * (1 + math.cos(math.pi * p)) / 2),
            "The rate falls to 0. The lowest rate is min_lr times the highest one."),
        Misconception("min_lr is a rate", _schedule(
                fall=lambda p, c: c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * p)) / 2),
            "You took min_lr for a learning rate. It is a share of the highest rate: 0.1 means "
            "a tenth of it."),
        Misconception("the lowest rate added on top", _schedule(
                fall=lambda p, c: c.lr * (c.min_lr + (1 + math.cos(math.pi * p)) / 2)),
            "After the warm-up the rate lies above the highest one: the lowest share was added "
            "without taking it off the cosine."),
        Misconception("clamped from below", _schedule(
                fall=lambda p, c: c.lr * max(c.min_lr, (1 + math.cos(math.pi * p)) / 2)),
            "The rate is cut off flat at its lowest value. The cosine itself has to run from "
            "the highest to the lowest rate."),
        Misconception("whole cosine", _schedule(
                fall=lambda p, c: c.lr * (c.min_lr + (1 - c.min_lr) * math.cos(math.pi * p))),
            "The rate becomes negative: a cosine runs from 1 to minus 1. Lift it by 1 and halve "
            "it, so that it runs from 1 to 0."),
        Misconception("straight fall", _schedule(
                fall=lambda p, c: c.lr * (c.min_lr + (1 - c.min_lr) * (1 - p))),
            "The fall is a straight line. After the warm-up the rate follows half a cosine, flat "
            "at both ends."),
        Misconception("without pi", _schedule(
                fall=lambda p, c: c.lr * (c.min_lr + (1 - c.min_lr) * (1 + math.cos(p)) / 2)),
            "The fall stops halfway: the angle ends at 1. Half a cosine runs from angle 0 to pi."),
        Misconception("no room after the warm-up", _schedule(
                done=lambda s, c: (s - c.warmup_steps) / (c.steps - 1 - c.warmup_steps)),
            "Only one step is left after the warm-up, and you divided by 0 or gave it the lowest "
            "rate. It begins the fall: it has the full rate.",
            also=[_schedule(
                      done=lambda s, c: (s - c.warmup_steps) / (c.steps - 1 - c.warmup_steps)
                      if c.steps - 1 > c.warmup_steps else 1.0)]),
        Misconception("a share instead of a rate", lambda s, c: learning_rate(s, c) / c.lr,
            "The result is a share between 0 and 1. Multiply it by the highest rate, lr."),
    ),
    hints=(
        Hint("I do not know where to start",
             "With 5 steps of warm-up and a highest rate of 1: which rates do steps 0, 1 and 4 "
             "get? Which rate does the very last step get?"),
        Hint("The end does not fit",
             "After the warm-up let a number run from 0, at step warmup_steps, to 1, at step "
             "steps - 1. If there is no room between them, divide by 1."),
        Hint("The cosine does not fit",
             "(1 + cos(pi * done)) / 2 runs from 1 to 0. The share of lr is min_lr plus "
             "(1 - min_lr) times that."),
    ),
    praise="Slow at first, bold in the middle, careful at the end.",
)


# ---------------------------------------------------------------- piece: parameter_groups


def _model(seed: int = 0, **changes) -> Transformer:
    sizes = dict(dim=12, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=4, hidden_dim=20,
                 vocab_size=31)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(**{**sizes, **changes}))
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data.mul_(9)                       # far from the small start
    return model


def two_layers():
    return _model(), 0.1


def tied_embeddings():
    return _model(1, n_layers=1, tied_embeddings=True), 0.03


def _decay_of_each(candidate, model, weight_decay):
    """Which decay every parameter of the model gets, by name; twice or never is said too."""
    groups = [{**group, "params": list(group["params"])}
              for group in candidate(model, weight_decay)]
    found = {}
    for name, weight in model.named_parameters():
        decays = [float(group["weight_decay"]) for group in groups
                  for other in group["params"] if other is weight]
        found[name] = decays[0] if len(decays) == 1 else f"in {len(decays)} groups"
    strangers = sum(not any(other is w for w in model.parameters())
                    for group in groups for other in group["params"])
    decays = " and ".join(f"{float(group['weight_decay'])}" for group in groups)
    return {**found, "things that are no parameters": strangers, "decay of each group": decays}


def _grouped(decides, rest=True):
    def parameter_groups(model, weight_decay):
        named = list(model.named_parameters())
        decays = [w for name, w in named if decides(name, w)]
        stays = [w for name, w in named if not decides(name, w)]
        groups = [{"params": decays, "weight_decay": weight_decay}]
        return groups + [{"params": stays, "weight_decay": 0.0}] * rest
    return parameter_groups


def _by_modules(model, weight_decay):
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    inside = {id(w) for w in matrices}
    return [{"params": [w for w in model.parameters() if id(w) not in inside],
             "weight_decay": 0.0}, {"params": matrices, "weight_decay": weight_decay}][::-1]


def _generators(model, weight_decay):
    chosen = {name for name, w in model.named_parameters() if w.dim() == 2} - {
        "tok_embeddings.weight"}
    return ({"params": (w for name, w in model.named_parameters() if name in chosen),
             "weight_decay": weight_decay},
            {"params": (w for name, w in model.named_parameters() if name not in chosen),
             "weight_decay": 0})


def _pairs(model, weight_decay):
    matrix = {name: w.dim() == 2 and "embeddings" not in name
              for name, w in model.named_parameters()}
    return [{"params": [pair for pair in model.named_parameters() if matrix[pair[0]] == decays],
             "weight_decay": weight_decay * decays} for decays in (True, False)]


def _without_the_embeddings(model, weight_decay):
    groups = parameter_groups(model, weight_decay)
    groups[1]["params"] = [w for w in groups[1]["params"] if w.dim() == 1]
    return groups


def _lists_exchanged(model, weight_decay):
    matrices, rest = (group["params"] for group in parameter_groups(model, weight_decay))
    return [{"params": rest, "weight_decay": weight_decay},
            {"params": matrices, "weight_decay": 0.0}]


def _without_a_decay(model, weight_decay):
    groups = parameter_groups(model, weight_decay)
    del groups[1]["weight_decay"]
    return groups


def _in_both(model, weight_decay):
    groups = parameter_groups(model, weight_decay)
    groups[1]["params"] = list(model.parameters())
    return groups


def _swapped(model, weight_decay):
    groups = parameter_groups(model, weight_decay)
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.0, weight_decay
    return groups


GROUPS = Exercise(
    name="parameter_groups", chapter=5, kind="piece", piece="train.parameter_groups",
    entry="parameter_groups", title="Who is pulled towards zero", difficulty="easy",
    importance="useful", minutes=6,
    reference=parameter_groups,
    fixtures=(two_layers, tied_embeddings),
    run=_decay_of_each,
    equivalents={
        "by kind of module": _by_modules,
        "a tuple of generators": _generators,
        "two lists": _grouped(lambda name, w: w.ndim > 1 and "tok_embeddings" not in name),
    },
    misconceptions=(
        Misconception("everything decays", _grouped(lambda name, w: True),
            "All weights decay, the norms and the embeddings, too. Those two kinds stay out."),
        Misconception("embeddings decay", _grouped(lambda name, w: w.dim() >= 2),
            "The embeddings decay. They are a table of rows, of which a rare token's row would "
            "fade away. The name tells them apart."),
        Misconception("norms decay", _grouped(lambda name, w: "embeddings" not in name),
            "The norms' weights decay. They belong at 1, not at 0; they have one axis only."),
        Misconception("output stays out", _grouped(
                lambda name, w: w.dim() >= 2 and "embeddings" not in name and "output" not in name),
            "The output matrix was left out. It multiplies like every other matrix, so it decays."),
        Misconception("only what lies in the layers", _grouped(
                lambda name, w: name.startswith("layers")),
            "The norms inside the layers decay, and the output matrix does not. Ask for the "
            "number of axes, not for the place."),
        Misconception("nothing decays", _grouped(lambda name, w: False),
            "Nothing decays. Matrices have two axes: did the test for them ever come true?"),
        Misconception("groups exchanged", _swapped,
            "The two groups are exchanged: norms and embeddings are pulled towards 0, the "
            "matrices are not. The first group, which decays, is for the matrices.",
            also=[_lists_exchanged]),
        Misconception("the rest is missing", _grouped(
                lambda name, w: w.dim() >= 2 and "embeddings" not in name, rest=False),
            "Some weights are in no group, so they would never be trained. All that does not "
            "decay belongs to the second. (A generator is used up after one pass.)",
            also=[_without_the_embeddings]),
        Misconception("in both groups", _in_both,
            "Some weights stand in two groups; the optimiser refuses that. Each weight belongs "
            "to exactly one."),
        Misconception("the rest first", lambda model, weight_decay: parameter_groups(
                model, weight_decay)[::-1],
            "Every weight has its decay, but the order is turned round. The library takes the "
            "first group for the matrices."),
        Misconception("pairs instead of weights", _pairs,
            "The groups hold names, or pairs of name and weight. The optimiser wants the weights "
            "themselves."),
        Misconception("no decay given", _without_a_decay,
            "The second group has no weight_decay. Left out, the optimiser takes a decay of its "
            "own: give 0.0."),
        Misconception("a fixed decay", lambda model, weight_decay: parameter_groups(model, 0.1),
            "The decay is a number of your own. Use the one that the function is given."),
    ),
    hints=(
        Hint("I do not know what the result looks like",
             "A list of two dictionaries, each with the keys params (a list of weights) and "
             "weight_decay (a number). Which weights go where?"),
        Hint("How do I tell matrices from the rest",
             "model.named_parameters() gives pairs of name and weight. weight.dim() is 2 for a "
             "matrix and 1 for a norm."),
        Hint("The embeddings are in the wrong group",
             "They have two axes too, so ask the name: \"embeddings\" occurs in it. Everything "
             "that does not decay goes into the second group, with 0.0."),
    ),
    praise="Small print, but a wrong group costs a run.",
)


# ---------------------------------------------------------------- piece: accumulate_gradients


def _unequal_rows(seed: int, rows: int, length: int):
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(31, (rows, length + 1), generator=chance)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    for row in range(rows):
        targets[row, 1 + (3 * row) % length:] = IGNORE
    return inputs, targets


def seven_unequal_rows_in_three_parts():
    return _model(2), _unequal_rows(4, 7, 6), TrainConfig(steps=1, accumulation=3, batch_size=7)


def a_whole_batch_in_one_part():
    return _model(3), _unequal_rows(5, 4, 9), TrainConfig(steps=1, batch_size=4)


def the_second_of_two_processes():
    config = TrainConfig(steps=1, accumulation=2, batch_size=5)
    return _model(6), _unequal_rows(6, 5, 8), config, 1, 2


def _loss_and_gradient(candidate, model, batch, config, *process):
    """The loss, the gradient, and whether each part went backward before the next began."""
    backward, begun = [], []
    model.norm.weight.register_hook(backward.append)
    model.register_forward_pre_hook(lambda *_: begun.append(len(backward)))
    loss = torch.as_tensor(candidate(model, batch, config, *process))
    gradients = [torch.zeros(w.numel()) if w.grad is None else w.grad.flatten()
                 for w in model.parameters()]
    kept = "with a gradient" if loss.requires_grad else "without gradient"
    in_turn = begun == list(range(len(begun)))
    waiting = "each backward at once" if in_turn else "parts that wait for their backward"
    return loss.detach(), torch.cat(gradients), kept, waiting


def _parts(share, clear=False):
    """accumulate_gradients with one step exchanged; the divisor is
    share(counted in the part, counted in all, number of parts, the part's targets)."""
    def accumulate_gradients(model, batch, config, rank=0, world=1):
        inputs, targets = batch
        counted = (targets != IGNORE).sum()
        chunks = torch.arange(rank, len(inputs), world).chunk(config.accumulation)
        total = torch.zeros(())
        for rows in chunks:
            own = (targets[rows] != IGNORE).sum()
            by = share(own, counted, len(chunks), targets[rows])
            loss, _ = forward_loss(model, inputs[rows], targets[rows], config, by)
            if clear:
                model.zero_grad()
            loss.backward()
            total = total + loss.detach()
        return total
    return accumulate_gradients


def _parts_by_plain_sums(model, batch, config, rank=0, world=1):
    inputs, targets = batch
    counted = (targets != IGNORE).sum()
    loss = 0.0
    for part in range(config.accumulation):
        rows = range(rank, len(inputs), world)[part::config.accumulation]
        nats = next_token_nats(model(inputs[list(rows)]), targets[list(rows)]) / counted
        nats.backward()
        loss += nats.detach()
    return loss


def _by_the_mean_of_each(model, batch, config, rank=0, world=1):
    inputs, targets = batch
    counted, total = (targets != IGNORE).sum(), torch.zeros(())
    for x, y in zip(inputs[rank::world].chunk(config.accumulation),
                    targets[rank::world].chunk(config.accumulation)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss = loss * (y != IGNORE).sum() / counted
        loss.backward()
        total += loss.detach()
    return total


def _row_by_row(model, batch, config, rank=0, world=1):
    config = replace(config, accumulation=len(batch[0]))
    return accumulate_gradients(model, batch, config, rank, world)


def _processes(divisor=None, own_rows=True, loss="sum", backward="each"):
    """accumulate_gradients; divisor(targets of the batch, targets of the process's rows)."""
    def accumulate_gradients(model, batch, config, rank=0, world=1):
        inputs, targets = batch
        rows = torch.arange(rank, len(inputs), world) if own_rows else torch.arange(len(inputs))
        by = divisor(targets, targets[rows]) if divisor else (targets != IGNORE).sum()
        parts = []
        for part in rows.chunk(config.accumulation):
            parts.append(forward_loss(model, inputs[part], targets[part], config, by)[0])
            if backward == "each":
                parts[-1].backward()
        if backward == "last":
            sum(parts).backward()
        if loss == "last":
            return parts[-1].detach()
        total = torch.stack(parts).sum() / (len(parts) if loss == "mean" else 1)
        return total if loss == "kept" else total.detach()
    return accumulate_gradients


ACCUMULATE = Exercise(
    name="accumulate_gradients", chapter=5, kind="piece", piece="train.accumulate_gradients",
    entry="accumulate_gradients", title="A large batch in small parts", difficulty="medium",
    importance="useful", minutes=12,
    reference=accumulate_gradients,
    fixtures=(seven_unequal_rows_in_three_parts, a_whole_batch_in_one_part,
              the_second_of_two_processes),
    run=_loss_and_gradient,
    may_change_inputs=True,  # the gradients are written into the model
    tolerance=1e-4,
    equivalents={
        "plain sums": _parts_by_plain_sums,
        "each mean times its share": _by_the_mean_of_each,
        "row by row": _row_by_row,
    },
    misconceptions=(
        Misconception("mean of means", _parts(lambda own, all_, n, y: own * n),
            "Each part's mean counts the same, so a target in a part with few of them weighs "
            "too much. Divide by the targets of the whole batch."),
        Misconception("sum of means", _parts(lambda own, all_, n, y: own),
            "The parts' means were added up: loss and gradient come out several times too "
            "large. Divide by the targets of the whole batch."),
        Misconception("plain sum", _parts(lambda own, all_, n, y: torch.tensor(1)),
            "Loss and gradient are sums over all targets. They must be divided by the number of "
            "counted targets in the batch."),
        Misconception("ignored targets counted", _parts(
                lambda own, all_, n, y: all_ * 0 + y.numel() * n),
            "The divisor counts positions, the ignored ones too. Only counted targets belong "
            "into it, those of the whole batch.",
            also=[_processes(
                      lambda batch, own: torch.tensor(batch.numel()))]),
        Misconception("only the last part's gradient",
            _parts(lambda own, all_, n, y: all_, clear=True),
            "Only the last part's gradient is left: the others were cleared, or never went "
            "backward. Every part goes backward, and gradients add up by themselves."),
        Misconception("divided by parts once more", _parts(lambda own, all_, n, y: all_ * n),
            "Loss and gradient come out too small: you divided by the targets of the batch and "
            "then by the number of parts again."),
        Misconception("loss of the last part", lambda model, batch, config, rank=0, world=1: (
                accumulate_gradients(model, batch, config), forward_loss(
                    model, batch[0][-1:], batch[1][-1:], config,
                    (batch[1][-1:] != IGNORE).sum())[0].detach())[1],
            "The gradients are right, but the loss returned is that of the last part alone. "
            "Add up the parts' losses."),
        Misconception("loss divided by the parts", _processes(loss="mean"),
            "The gradients are right, but the loss was divided by the number of parts. Shares of "
            "the whole batch are added up, no more."),
        Misconception("targets of the own rows", _processes(
                lambda batch, own: (own != IGNORE).sum()),
            "This process divided by the targets of its own rows. The processes' losses are added "
            "up later, so count the whole batch."),
        Misconception("the rows of all processes", _processes(own_rows=False),
            "With two processes the rows of both were computed. Each takes every world-th row, "
            "from row number rank on."),
        Misconception("one backward for all", _processes(backward="last"),
            "Loss and gradient are right, but all parts wait for one backward, so all stay in "
            "memory. Go backward with each part."),
        Misconception("no backward", _processes(backward="never"),
            "The loss is right, but there is no gradient. Every part has to go backward."),
        Misconception("a loss with its graph", _processes(loss="kept"),
            "The loss still carries its gradient, which keeps every part in memory. Return it "
            "without."),
    ),
    hints=(
        Hint("I do not know where to start",
             "backward() adds to the gradients that are there. If every part's loss is its sum "
             "over the same number, what is the sum of all parts?"),
        Hint("It is refused, though one part works",
             "Count the targets that are not IGNORE in the whole batch, before the loop. Divide "
             "each part's sum of nats by that number."),
        Hint("I cannot put it together",
             "Loop over torch.arange(rank, len(inputs), world).chunk(config.accumulation). "
             "Inside: forward_loss of these rows, backward, add the detached loss. Return the sum."),
    ),
    praise="A batch of any size now fits into any memory, with the same gradient.",
)


# ---------------------------------------------------------------- exercise: inputs_and_targets


def three_rows_of_tales():
    return torch.tensor([[1, 7, 8, 9, 2, 1], [1, 5, 2, 1, 9, 9], [6, 6, 2, 1, 4, 1]]), 1


def another_beginning():
    return torch.tensor([[0, 3, 3, 8], [4, 0, 5, 0]]), 0


def _cut(inputs=lambda r: r[:, :-1], targets=lambda r: r[:, 1:], hidden=None, fill=IGNORE):
    def inputs_and_targets(rows, start):
        x, y = inputs(rows), targets(rows)
        if hidden is False:
            return x, y
        return x, y.masked_fill((hidden(rows) if hidden else y) == start, fill)
    return inputs_and_targets


def _cut_in_place(rows, start):
    targets = rows[:, 1:]
    targets[targets == start] = IGNORE
    return rows[:, :-1], targets


SHIFT = Exercise(
    name="inputs_and_targets", chapter=5, kind="complete", entry="inputs_and_targets",
    title="Cut a row in two", difficulty="easy", importance="essential", minutes=5,
    reference=_cut(),
    fixtures=(three_rows_of_tales, another_beginning),
    equivalents={
        "where": lambda rows, start: (rows[:, :-1], torch.where(
            rows[:, 1:] == start, IGNORE, rows[:, 1:])),
        "narrow": lambda rows, start: (rows.narrow(1, 0, rows.shape[1] - 1), torch.where(
            rows.narrow(1, 1, rows.shape[1] - 1) != start, rows[:, 1:], -100)),
        "lists": lambda rows, start: (torch.tensor([r[:-1] for r in rows.tolist()]), torch.tensor(
            [[IGNORE if t == start else t for t in r[1:]] for r in rows.tolist()])),
    },
    misconceptions=(
        Misconception("not shifted", _cut(targets=lambda r: r[:, :-1]),
            "Inputs and targets are the same tokens. The model has only to copy. The target of a "
            "position is the token after it."),
        Misconception("whole rows", _cut(inputs=lambda r: r, targets=lambda r: r),
            "The inputs are one token too long. A row of T + 1 tokens gives T inputs, without "
            "the last, and T targets, without the first.",
            also=[_cut(inputs=lambda r: r)]),
        Misconception("shifted the wrong way",
            _cut(inputs=lambda r: r[:, 1:], targets=lambda r: r[:, :-1]),
            "Inputs and targets are exchanged: the model would predict the token before. Inputs "
            "lack the last token, targets the first."),
        Misconception("inputs without the first token", _cut(inputs=lambda r: r[:, 1:]),
            "Inputs and targets both lack the first token, so the model only copies. The inputs "
            "lack the last one instead."),
        Misconception("rolled round", _cut(inputs=lambda r: r, targets=lambda r: r.roll(-1, 1)),
            "The last position is asked for the first token of its own row. Cut the row instead "
            "of turning it round."),
        Misconception("shifted over rows",
            _cut(inputs=lambda r: r[:-1], targets=lambda r: r[1:]),
            "You cut off rows instead of tokens. The tokens stand along the last axis."),
        Misconception("beginnings counted", _cut(hidden=False),
            "What begins a document follows the end of another with certainty or by chance. Such "
            "targets must be ignored; here they count."),
        Misconception("hidden where the input begins", _cut(hidden=lambda r: r[:, :-1]),
            "You ignore the first word of each document, not its begin token. Look at which of "
            "the two tables is compared."),
        Misconception("inputs hidden as well", lambda rows, start: tuple(
                part.masked_fill(part == start, IGNORE) for part in (rows[:, :-1], rows[:, 1:])),
            "The inputs lost their begin tokens, too. Only a target may be ignored; the model "
            "reads the inputs as they are."),
        Misconception("hidden with -1", _cut(fill=-1),
            "The sign for an ignored target is not minus 1 here: use IGNORE, the value that the "
            "loss knows."),
        Misconception("written into the rows", _cut_in_place,
            "The values are right, but the rows you were given have changed: a slice shares "
            "their memory. Make a new tensor."),
    ),
    hints=(
        Hint("Which tokens go where",
             "With the row 1 7 8 2: what does the model see when it has to predict 7? And when it "
             "has to predict 2?"),
        Hint("My result has the wrong length",
             "Rows have T + 1 tokens. Inputs are all but the last, targets all but the first; "
             "each has T."),
        Hint("The beginnings still count",
             "Where a target equals start, put IGNORE. masked_fill with a condition on the targets "
             "makes a new tensor."),
    ),
    praise="One row, and T questions with their answers.",
)


# ---------------------------------------------------------------- exercise: one step in order

_STEP = (
    "inputs, targets = batch[:, :-1], batch[:, 1:]",
    "logits = model(inputs)",
    "loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
    "optimizer.zero_grad()",
    "loss.backward()",
    "nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
    "optimizer.step()",
)

STEP = Exercise(
    name="one_step_in_order", chapter=5, kind="order", title="One step of training",
    difficulty="easy", importance="essential", minutes=5,
    lines=_STEP,
    distractors=("inputs, targets = batch, batch",),
    equivalents={
        "cleared first": (3, 0, 1, 2, 4, 5, 6),
        "cleared before the model": (0, 3, 1, 2, 4, 5, 6),
        "cleared before the loss": (0, 1, 3, 2, 4, 5, 6),
        "cleared last": (0, 1, 2, 4, 5, 6, 3),
    },
    misconceptions=(
        Misconception("not shifted", "with 7",
            "Inputs and targets are the same tokens: the model only copies. The target stands one "
            "token later."),
        Misconception("never cleared", "without 3",
            "The gradients are never cleared, so each step follows the sum of all batches so far. "
            "A line is missing."),
        Misconception("step before backward", "6 before 4",
            "The optimiser moves before the gradient of this batch is known. First backward, then "
            "the step."),
        Misconception("clipped before the gradient", "5 before 4",
            "When it is clipped there is no gradient yet: the backward pass makes it."),
        Misconception("clipped after the step", "6 before 5",
            "The step has used the long gradient before it was clipped. Clip between the backward "
            "pass and the optimiser."),
        Misconception("cleared before the clipping", "4 before 3 and 3 before 5",
            "The gradients are cleared as soon as they are there: nothing is left to clip or to "
            "follow."),
        Misconception("cleared before the step", "4 before 3 and 3 before 6",
            "The gradients are cleared just before the optimiser reads them: nothing moves. Clear "
            "before the backward pass or after the step."),
        Misconception("backward before the loss", "4 before 2",
            "The backward pass starts from the loss, and there is none yet."),
        Misconception("loss before the model", "2 before 1",
            "The loss compares scores with targets, and the model has not given any scores yet."),
        Misconception("model before the batch is cut", "1 before 0",
            "The model reads inputs that were not cut from the batch yet. Which line makes them?"),
    ),
    hints=(
        Hint("I do not know what comes first", "What does the loss need, and what does the "
             "gradient need?"),
        Hint("Where does zero_grad go",
             "backward adds to the gradients that are there. They must be cleared at any time "
             "between the last step and this backward."),
        Hint("Two lines look alike",
             "The model sees all tokens but the last and predicts all but the first."),
    ),
    praise="Seven lines; everything else in this chapter makes them better.",
)


# ---------------------------------------------------------------- exercise: clip_gradients


def a_long_gradient():
    return [random_tensor(7, 3, 5), random_tensor(8, 4), random_tensor(9, 2, 2, 3, scale=4.0)], 1.5


def a_short_gradient():
    return [random_tensor(10, 2, 3, scale=0.05), random_tensor(11, 5, scale=0.02)], 2.0


def a_gradient_of_zeros():
    return [torch.zeros(2, 3), torch.zeros(4)], 0.7


def _norm(gradients):
    return torch.stack([g.norm() for g in gradients]).norm()


def _clipped(factor):
    def clip_gradients(gradients, limit):
        scale = factor(gradients, limit)
        return [g * scale for g in gradients]
    return clip_gradients


def _right_factor(gradients, limit):
    return min(1.0, limit / max(_norm(gradients).item(), 1e-12))


def _clip_in_place(gradients, limit):
    scale = _right_factor(gradients, limit)
    return [g.mul_(scale) for g in gradients]


CLIP = Exercise(
    name="clip_gradients", chapter=5, kind="function", entry="clip_gradients",
    title="Shorten a gradient", difficulty="easy", importance="essential", minutes=8,
    reference=_clipped(_right_factor),
    fixtures=(a_long_gradient, a_short_gradient, a_gradient_of_zeros),
    equivalents={
        "one long vector": _clipped(lambda gs, limit: limit / max(
            limit, torch.cat([g.flatten() for g in gs]).norm().item())),
        "a square root of squares": _clipped(lambda gs, limit: min(1.0, limit / (math.sqrt(
            sum(g.square().sum().item() for g in gs)) + 1e-12))),
        "PyTorch's own size": _clipped(lambda gs, limit: (
            limit / (nn.utils.get_total_norm(gs) + 1e-9)).clamp(max=1.0)),
    },
    misconceptions=(
        Misconception("each tensor by itself", lambda gradients, limit: [
                g * min(1.0, limit / max(g.norm().item(), 1e-12)) for g in gradients],
            "Each tensor was clipped by itself, which turns the gradient's direction. There is "
            "one length, of all tensors together."),
        Misconception("by value", lambda gradients, limit: [
                g.clamp(-limit, limit) for g in gradients],
            "Single numbers were cut off. Clipping by length shrinks all numbers by one factor "
            "and keeps the direction."),
        Misconception("always to the limit", _clipped(
                lambda gs, limit: limit / max(_norm(gs).item(), 1e-12)),
            "A short gradient was stretched to the limit; one of zeros cannot be. Only a length "
            "above the limit is changed.",
            also=[_clipped(
                      lambda gs, limit: limit / math.sqrt(
                          sum(g.square().sum().item() for g in gs))),
                  _clipped(
                      lambda gs, limit: limit / _norm(gs))]),
        Misconception("joined as they are", _clipped(
                lambda gs, limit: limit / torch.cat(gs).norm().item()),
            "The tensors have different numbers of axes, so they cannot be joined as they are. "
            "Flatten each first, or add up the sums of squares."),
        Misconception("lengths added up", _clipped(lambda gs, limit: min(
                1.0, limit / max(sum(g.norm().item() for g in gs), 1e-12))),
            "The lengths of the tensors were added. The length of all together is the root of the "
            "sum of all squares."),
        Misconception("root forgotten", _clipped(lambda gs, limit: min(
                1.0, limit / max(_norm(gs).item() ** 2, 1e-12))),
            "You compared with the sum of squares. The length is its square root."),
        Misconception("the largest of the lengths", _clipped(lambda gs, limit: min(
                1.0, limit / max(max(g.norm().item() for g in gs), 1e-12))),
            "The longest tensor alone decided. The length is that of all numbers together."),
        Misconception("the largest number", _clipped(lambda gs, limit: min(
                1.0, limit / max(max(g.abs().max().item() for g in gs), 1e-12))),
            "The largest single number decided. The length is the root of the sum of all squares."),
        Misconception("divided by zero", _clipped(
                lambda gs, limit: (limit / _norm(gs)).clamp(max=1.0) if _norm(gs) > 0
                else torch.tensor(float("nan"))),
            "A gradient of zeros became NaN: 0 over 0. A gradient below the limit needs no "
            "division at all."),
        Misconception("never", lambda gradients, limit: [g.clone() for g in gradients],
            "A long gradient came back as it was. If its length is above the limit, shrink it to "
            "the limit."),
        Misconception("written into", _clip_in_place,
            "The values are right, but the gradients you were given have changed. Return new "
            "tensors."),
    ),
    hints=(
        Hint("What is the length of several tensors",
             "Think of all their numbers in one long row. What is the length of a vector with the "
             "numbers 3 and 4?"),
        Hint("A short gradient changes",
             "The factor is limit / length, but never above 1. With length 0.2 and limit 2 it is 1."),
        Hint("I cannot put it together",
             "Sum the squares of all numbers of all tensors, take the root; the factor is the "
             "smaller of 1 and limit / length; multiply every tensor by it."),
    ),
    praise="Same direction, bounded length: one bad batch can no longer ruin a run.",
)


# ---------------------------------------------------------------- exercise: adamw_step


def the_first_step():
    w = random_tensor(12, 3, 4)
    return w, random_tensor(13, 3, 4), torch.zeros(3, 4), torch.zeros(3, 4), 1, 0.02, 0.1


def the_seventh_step():
    w = random_tensor(14, 2, 5)
    return (w, random_tensor(15, 2, 5, scale=0.01), random_tensor(16, 2, 5, scale=0.1),
            random_tensor(17, 2, 5).square() * 0.03, 7, 0.003, 0.4)


def a_tiny_gradient():
    w = random_tensor(18, 6)
    return w, random_tensor(19, 6, scale=1e-7), torch.zeros(6), torch.zeros(6), 2, 0.5, 0.05


def _adamw(b1=0.9, b2=0.95, eps=1e-8, correct=(True, True), eps_inside=False, root=True,
           decay="decoupled", old=False, memory=True, late=0, squared=True):
    def adamw_step(weight, gradient, mean, square, step, rate, decay_rate):
        step = step + late
        g = gradient + decay_rate * weight if decay == "gradient" else gradient
        before = mean, square
        mean = b1 * mean + (1 - b1) * g if memory else g
        square = b2 * square + (1 - b2) * (g.square() if squared else g)
        m, s = before if old else (mean, square)
        m = m / (1 - b1 ** step) if correct[0] else m
        s = s / (1 - b2 ** step) if correct[1] else s
        length = (s + eps).sqrt() if eps_inside else (s.sqrt() if root else s) + eps
        if decay == "decoupled":
            weight = weight * (1 - rate * decay_rate)
        elif decay == "without rate":
            weight = weight * (1 - decay_rate)
        elif decay == "upwards":
            weight = weight * (1 + rate * decay_rate)
        elif decay == "last":
            return (weight - rate * m / length) * (1 - rate * decay_rate), mean, square
        elif decay == "corrected":
            return weight * (1 - rate * decay_rate) - rate * m / length, m, s
        return weight - rate * m / length, mean, square
    return adamw_step


def _adamw_by_numbers(weight, gradient, mean, square, step, rate, decay):
    result = []
    for w, g, m, s in zip(*(x.flatten().tolist() for x in (weight, gradient, mean, square))):
        m, s = 0.9 * m + 0.1 * g, 0.95 * s + 0.05 * g * g
        size = math.sqrt(s / (1 - 0.95 ** step)) + 1e-8
        result.append((w - rate * (decay * w + m / (1 - 0.9 ** step) / size), m, s))
    return tuple(torch.tensor(x).view_as(weight) for x in zip(*result))


def _adamw_by_lerp(weight, gradient, mean, square, step, rate, decay):
    mean = torch.lerp(mean, gradient, 0.1)
    square = torch.lerp(square, gradient ** 2, 0.05)
    move = (mean / (1 - 0.9 ** step)) / ((square / (1 - 0.95 ** step)).sqrt() + 1e-8)
    return weight - rate * decay * weight - rate * move, mean, square


ADAMW = Exercise(
    name="adamw_step", chapter=5, kind="function", entry="adamw_step",
    title="One step of AdamW", difficulty="medium", importance="essential", minutes=15,
    reference=_adamw(),
    fixtures=(the_first_step, the_seventh_step, a_tiny_gradient),
    equivalents={
        "number by number": _adamw_by_numbers,
        "lerp": _adamw_by_lerp,
        "written out": _adamw(),
    },
    misconceptions=(
        Misconception("a correction is missing", _adamw(correct=(False, False)),
            "The first steps have the wrong length: both means began at 0 and are too small. "
            "Divide each by one minus its own beta to the power of the step.",
            also=[_adamw(correct=(True, False)),
                  _adamw(correct=(False, True))]),
        Misconception("decay through the gradient", _adamw(decay="gradient"),
            "The decay went into the gradient, and so through the division. That is Adam with L2. "
            "AdamW shrinks the weight by itself."),
        Misconception("decay without the rate", _adamw(decay="without rate"),
            "The weight shrinks far too much: the decay is multiplied by the rate, so that a "
            "small step also decays little."),
        Misconception("no decay", _adamw(decay="none"),
            "The decay is missing: the weight first loses the share rate times decay of itself."),
        Misconception("no square root", _adamw(root=False),
            "You divided by the mean of the squares. Its square root has the size of a gradient, "
            "so that size cancels."),
        Misconception("epsilon under the root", _adamw(eps_inside=True),
            "Epsilon was added under the root, which matters for tiny gradients. It is added to "
            "the root."),
        Misconception("betas exchanged", _adamw(b1=0.95, b2=0.9),
            "The two memories are exchanged: the mean of the gradients keeps 0.9, that of the "
            "squares 0.95."),
        Misconception("the usual second beta", _adamw(b2=0.999),
            "The memory of the squares is PyTorch's default, 0.999. This course uses 0.95, as the "
            "text of the exercise says."),
        Misconception("old means used", _adamw(old=True),
            "The step was taken with the means from before. First update both with this gradient, "
            "then step."),
        Misconception("no epsilon", _adamw(eps=0.0),
            "Epsilon is missing, which shows with tiny gradients. Add 1e-8 to the root before "
            "you divide."),
        Misconception("decay after the step", _adamw(decay="last"),
            "The decay came last and shrank the step as well. The share is taken from the weight "
            "as it was before the step."),
        Misconception("corrected means returned", _adamw(decay="corrected"),
            "The weight is right, but the corrected means are returned. The next step goes on "
            "from the uncorrected ones."),
        Misconception("steps counted otherwise", _adamw(late=1),
            "The correction counts a step too many or too few. The given step counts from 1: it "
            "is 1 at the first step already.",
            also=[_adamw(late=-1)]),
        Misconception("step uphill",
            lambda w, g, m, s, step, rate, decay: (
                2 * w * (1 - rate * decay) - _adamw()(w, g, m, s, step, rate, decay)[0],
                *_adamw()(w, g, m, s, step, rate, decay)[1:]),
            "The weight moves with the gradient, which makes the loss larger. Move against it."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Three things are returned. Two of them are running means: one of the gradients, one "
             "of their squares. What are they after this gradient?"),
        Hint("The first step is wrong",
             "Both means began at 0. After step t they are too small by 1 - 0.9 ** t and 1 - 0.95 "
             "** t. Divide by that; return the uncorrected ones."),
        Hint("The weight is slightly off",
             "weight * (1 - rate * decay) first. Then subtract rate * corrected mean / (root of "
             "corrected square + 1e-8)."),
    ),
    praise="The optimiser of nearly every language model, in six lines.",
)


# ---------------------------------------------------------------- exercise: evaluate_text


def nine_unequal_rows():
    inputs, targets = _unequal_rows(20, 9, 7)
    return _model(4), Rows(inputs, targets, torch.arange(7).expand(9, 7).contiguous()), 4


def in_threes():
    inputs, targets = _unequal_rows(21, 7, 5)
    return _model(5), Rows(inputs, targets, torch.arange(5).expand(7, 5).contiguous()), 3


def _evaluated(total=True, ignored=False, drop=False, positions=True):
    @torch.no_grad()
    def nats_per_token(model, rows, batch_size):
        sums, counts, means = 0.0, 0, []
        for x, y, p in zip(*(column.split(batch_size) for column in rows)):
            if drop and len(x) < batch_size:
                continue
            logits = model(x, positions=p)
            nats = float(next_token_nats(logits, y))
            n = y.numel() if ignored else int((y != IGNORE).sum())
            sums, counts = sums + nats, counts + n
            means.append(nats / n)
        return sums / counts if total else sum(means) / len(means)
    return nats_per_token


@torch.no_grad()
def _evaluated_at_once(model, rows, batch_size):
    logits = model(rows.inputs, positions=rows.positions)
    return float(F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten()))


@torch.no_grad()
def _evaluated_row_by_row(model, rows, batch_size):
    nats = torch.zeros((), dtype=torch.float64)
    for x, y, p in zip(*rows):
        nats += next_token_nats(model(x[None], positions=p), y[None])
    return float(nats / (rows.targets != IGNORE).sum())


@torch.no_grad()
def _mean_over_batches_weighted(model, rows, batch_size):
    parts = []
    for x, y, p in zip(*(column.split(batch_size) for column in rows)):
        n = (y != IGNORE).sum()
        parts.append((F.cross_entropy(model(x, positions=p).flatten(0, 1), y.flatten()), n))
    return float(sum(mean * n for mean, n in parts) / sum(n for _, n in parts))


EVALUATE = Exercise(
    name="nats_per_token", chapter=5, kind="bug", entry="nats_per_token",
    title="A loss that depends on the batch size", difficulty="medium", importance="essential",
    minutes=10,
    reference=_evaluated(),
    fixtures=(nine_unequal_rows, in_threes),
    tolerance=1e-4,
    equivalents={
        "all at once": _evaluated_at_once,
        "row by row": _evaluated_row_by_row,
        "weighted means": _mean_over_batches_weighted,
    },
    misconceptions=(
        Misconception("unchanged", _evaluated(total=False, ignored=True),
            "Both slips are still there: the result depends on the batch size, and it is far too "
            "low. Which places are counted, and how are batches joined?"),
        Misconception("only the count repaired", _evaluated(total=False),
            "The count is right now. The result still depends on the batch size: a batch with few "
            "targets weighs as much as one with many."),
        Misconception("only the mean repaired", _evaluated(ignored=True),
            "The batches are joined well now. The result is still too low: the ignored places are "
            "in the divisor."),
        Misconception("last batch dropped", _evaluated(drop=True),
            "The last, smaller batch was left out. Every target counts once."),
        Misconception("last batch dropped, means", _evaluated(drop=True, total=False),
            "A smaller last batch was left out, and the others are joined by a mean of means. "
            "Every target counts once."),
        Misconception("sum", lambda model, rows, batch_size:
                _evaluated()(model, rows, batch_size) * int((rows.targets != IGNORE).sum()),
            "This is the sum over all targets. Divide it by their number, once, at the end."),
        Misconception("divided by batches", lambda model, rows, batch_size:
                _evaluated()(model, rows, batch_size) * int((rows.targets != IGNORE).sum())
                / len(rows.inputs.split(batch_size)),
            "These are nats for each batch. Divide the sum by the number of counted targets of "
            "the whole text."),
        Misconception("means added up", lambda model, rows, batch_size:
                _evaluated(total=False)(model, rows, batch_size)
                * len(rows.inputs.split(batch_size)),
            "The batches' means were added up. Add nats and targets instead, and divide once, at "
            "the end."),
        Misconception("perplexity", lambda model, rows, batch_size:
                math.exp(_evaluated()(model, rows, batch_size)),
            "The exponential of the loss came back, which is called perplexity. Nats per target "
            "are asked for."),
    ),
    hints=(
        Hint("I see no slip",
             "Look at the three lines of the symptom: batch sizes 2, 3 and 7. Should a model's loss on a text "
             "depend on that?"),
        Hint("It still depends on the batch size",
             "A mean of means gives every batch the same weight. Carry two sums, of nats and of "
             "targets, and divide once, at the end."),
        Hint("It is too low",
             "numel counts every place, the ignored ones, too. Count the targets that are not "
             "IGNORE."),
    ),
    praise="Two sums and one division, at the end: the only mean that does not lie.",
)


# ---------------------------------------------------------------- exercise: six curves

_CAUSES = (
    "the text comes in order, one language after another",
    "the learning rate is far too high",
    "the targets are shifted twice",
    "the learning rate is far too low",
    "there is too little text for so many steps",
    "the targets are not shifted at all",
)
_WHY = {
    (0, 1): "A rate too high is bad from the start to the end. Which of the two falls well and then jumps up again?",
    (0, 2): "Which of the two runs jumps up in the middle? Shifted targets give a smooth loss, but the honest validation loss rises.",
    (0, 3): "A low rate makes a smooth and slow curve. Text in order makes one that jumps when the language changes.",
    (0, 4): "Little text makes a loss that falls smoothly below the floor. Text in order makes jumps.",
    (0, 5): "Without the shift the loss falls to nothing and stays there. Text in order makes jumps.",
    (1, 2): "A rate too high stays at a high loss. Shifted twice, the training loss falls well, and only the validation shows it.",
    (1, 3): "Too high falls at once and then gets stuck; too low falls slowly all the time. Look at the first twenty steps.",
    (1, 4): "A rate too high never gets low. Which run has a training loss below the floor?",
    (1, 5): "A rate too high never gets low. Without the shift the loss falls to nothing.",
    (2, 3): "A low rate hurts both losses alike. Shifted twice, the training loss falls and the honest validation loss rises.",
    (2, 4): "Both have a rising validation loss. With little text the training loss falls below the floor; shifted twice it cannot.",
    (2, 5): "Not shifted, the answer stands in the input and the loss falls to nothing. Shifted twice, the task is harder.",
    (3, 4): "A rate too low stays high. Which run has a training loss below the floor?",
    (3, 5): "A rate too low stays high. Without the shift the loss falls to nothing.",
    (4, 5): "Both fall below the floor. Copying is learned at once, in a few dozen steps, and its validation loss is far above the first one.",
}


CURVES = Exercise(
    name="six_curves", chapter=5, kind="order", title="Six curves, six causes",
    difficulty="medium", importance="essential", minutes=12,
    lines=_CAUSES,
    distractors=("the model is too large",),
    misconceptions=tuple(
        Misconception(f"{i + 1} and {j + 1} taken for each other", f"{i} at {j} or {j} at {i}", why)
        for (i, j), why in _WHY.items()
    ) + (Misconception("a model too large", "with 6", "All six models have the same size. "
                       "A loss below the floor tells of too little text, or of an answer that leaks."),),
    hints=(
        Hint("All six look wrong to me",
             "Sort them first: which fall below the floor, which jump, which stay high? The floor "
             "cannot be beaten honestly."),
        Hint("Two of them fall below the floor",
             "Copying the input is learned at once. Learning a few tales by heart takes longer, "
             "and at first the validation loss falls as well."),
        Hint("Two of them stay high",
             "A high rate falls quickly for a few steps and is then stuck. A low rate falls "
             "slowly, evenly, and is still falling at the end."),
    ),
    praise="You can read a curve now; most people learn it by losing runs.",
)


# ---------------------------------------------------------------- exercise: without_test_text


def five_documents():
    documents = [
        "One day Anna found a key in the old mill and took it home.",
        "Leo was at the lake. He saw nobody there at all.",
        "A poem: anna FOUND a  key in\nthe old mill, they say.",
        "Key the in found Anna a mill old.",
        "Anna found a key in the old barn.",
        "Short one.",
        "WHAT ANNA FOUND: ANNA FOUND A KEY IN THE BARN.",
        "He saw\nnobody there at  all.",
    ]
    held_out = ["Once Anna found a key in the old mill.", "Nobody was there.",
                "He saw nobody there at all."]
    return documents, held_out, 6


def four_words_in_a_row():
    documents = ["a b c d", "x a b c d y", "x a b c y", "d c b a", "", "A B  C D E", "b c d e",
                 "k l m n o", "p k l m n", "z a b c", "c d e k", "x y w d e", "K L",
                 "k l m n q", "zz a b c d e k l m n o", "za b c dd", "K L", "y c d e"]
    return documents, ["zz a b c d e", "k l m n o", "k l"], 4


def _runs(text, n, split=True, fold=True):
    text = text.casefold() if fold else text
    words = text.split() if split else list(text)
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def _without(meets):
    def without_test_text(documents, held_out, n):
        return [d for d in documents if not meets(d, held_out, n)]
    return without_test_text


def _meets(document, held_out, n, **how):
    return any(_runs(document, n, **how) & _runs(text, n, **how) for text in held_out)


def _in_joined_words(document, held_out, n):
    words = document.casefold().split()
    texts = [f" {' '.join(text.casefold().split())} " for text in held_out]
    return any(f" {' '.join(words[i:i + n])} " in text
               for i in range(len(words) - n + 1) for text in texts)


def _slices(text, n, last):
    words = text.casefold().split()
    return {tuple(words[i:i + n]) for i in range(last(len(words)))}


def _share_slices(last):
    return _without(lambda d, held, n: any(
        _slices(d, n, lambda m: last(m, n)) & _slices(h, n, lambda m: last(m, n)) for h in held))


def _side_by_side(document, held_out, n):
    def blocks(text):
        words = text.casefold().split()
        return {tuple(words[i:i + n]) for i in range(0, len(words) - n + 1, n)}
    return any(blocks(document) & blocks(text) for text in held_out)


def _inside_the_string(document, held_out, n):
    known = " ".join(held_out).casefold()
    return any(" ".join(run) in known for run in _runs(document, n))


def _cut_at_blanks(document, held_out, n):
    def runs(text):
        words = text.casefold().split(" ")
        return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}
    return any(runs(document) & runs(text) for text in held_out)


def _removed_in_the_loop(documents, held_out, n):
    for document in documents:
        if _meets(document, held_out, n):
            documents.remove(document)
    return documents


def _by_positions(documents, held_out, n):
    known = {run for text in held_out for run in _runs(text, n)}
    kept = []
    for document in documents:
        if known.isdisjoint(_runs(document, n)):
            kept.append(document)
    return kept


DECONTAMINATE = Exercise(
    name="without_test_text", chapter=5, kind="function", entry="without_test_text",
    title="Keep the exam out of the textbook", difficulty="medium", importance="essential",
    minutes=12,
    reference=_without(_meets),
    fixtures=(five_documents, four_words_in_a_row),
    equivalents={
        "one set of known runs": _by_positions,
        "joined words": _without(_in_joined_words),
        "loops": _without(lambda d, held, n: any(
            d.casefold().split()[i:i + n] == h.casefold().split()[j:j + n]
            for h in held for i in range(len(d.split()) - n + 1)
            for j in range(len(h.split()) - n + 1))),
    },
    misconceptions=(
        Misconception("whole documents only", _without(lambda d, held, n: d in held),
            "Only documents that are equal as a whole went. A run of n words inside a longer "
            "document is the usual case."),
        Misconception("case counts", _without(
                lambda d, held, n: _meets(d, held, n, fold=False)),
            "A run in capital letters slipped through. Compare without differences of case."),
        Misconception("cut at every single blank", _without(_cut_at_blanks),
            "Words across a line break, or with two blanks between them, were not told apart. "
            "Without an argument split cuts at any white space."),
        Misconception("whole held-out texts", _without(lambda d, held, n: any(
                h.casefold() in d.casefold() for h in held)),
            "Only documents that contain a whole held-out text went. One run of n words of it is "
            "enough."),
        Misconception("letters instead of words", _without(
                lambda d, held, n: _meets(d, held, n, split=False)),
            "Runs of letters were compared, so too much went. Cut the text into words first."),
        Misconception("any order of the words", _without(lambda d, held, n: any(
                len(set(d.casefold().split()) & set(h.casefold().split())) >= n for h in held)),
            "Documents went that only use the same words. A run is n words in the same order, "
            "side by side."),
        Misconception("last run missing", _without(lambda d, held, n: any(
                {tuple(d.casefold().split()[i:i + n]) for i in range(len(d.split()) - n)}
                & {tuple(h.casefold().split()[i:i + n]) for i in range(len(h.split()) - n)}
                for h in held)),
            "The last run of each text was never looked at. A text of m words has m - n + 1 runs."),
        Misconception("runs of another length", _without(lambda d, held, n: _meets(d, held, n + 1)),
            "Runs of one word more or less than n were compared. Check where your slices end.",
            also=[_without(lambda d, held, n: _meets(d, held, n - 1))]),
        Misconception("blocks instead of runs", _without(_side_by_side),
            "The texts were cut into blocks of n words. A run may begin at any word, not only at "
            "every n-th one."),
        Misconception("removed in the loop", _removed_in_the_loop,
            "Documents were removed from the list while the loop went through it, so the next "
            "one was skipped. Build a new list."),
        Misconception("inside a string", _without(_inside_the_string),
            "A run was found inside longer words, or across the border of two texts. Compare "
            "whole words, one text at a time, not strings.",
            also=[_without(lambda d, held, n: any(
                      " ".join(run) in " ".join(d.casefold().split())
                      for h in held for run in _runs(h, n)))]),
        Misconception("ends shorter than n", _share_slices(lambda m, n: m),
            "Slices at the end of a text have fewer than n words, and they counted as runs. The "
            "last run begins n words before the end."),
        Misconception("short texts as a run", _share_slices(lambda m, n: max(1, m - n + 1)),
            "A text of fewer than n words was taken as a run. It has none, so the document "
            "stays."),
        Misconception("short ones dropped", _without(
                lambda d, held, n: _meets(d, held, n) or len(d.split()) < n),
            "Documents shorter than n words went too. They have no run of n words, so they share "
            "none: they stay."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Write down the runs of 3 words in: the old mill is closed. How many are there?"),
        Hint("Too much or too little goes",
             "casefold and split first. The runs of m words are words[i:i + n] for i from 0 to "
             "m - n; as tuples they go into a set."),
        Hint("I cannot put it together",
             "Collect the runs of all held-out texts in one set. Keep a document if the set of its "
             "own runs has nothing in common with it."),
    ),
    praise="Now a good score means that something was learned.",
)


# ---------------------------------------------------------------- exercise: best_rate


def a_valley():
    losses = {0.001: 3.1, 0.003: 2.2, 0.01: 1.4, 0.03: 1.9, 0.1: 5.5}
    return losses, [0.01, 0.001, 0.1, 0.003, 0.03]


def a_run_that_breaks():
    losses = {0.2: float("nan"), 0.02: 1.7, 0.002: 2.6, 2.0: None}
    return losses, [0.2, 2.0, 0.02, 0.002]


def still_falling_at_the_edge():
    return {0.1: 2.0, 0.2: 1.6, 0.4: 1.3, 0.8: 1.1, 1.6: 1.1, 0.05: 2.9}, [0.1, 0.2]


def _tried(candidate, losses, rates):
    """The result, and how often a run was made: runs are expensive."""
    calls = []

    def run(rate):
        calls.append(round(rate, 6))
        value = losses.get(round(rate, 6))
        if value is None:
            raise ValueError("the loss became nan")
        return value
    best = candidate(run, list(rates))
    return float(best), torch.tensor(sorted(calls), dtype=torch.float64)


def a_far_valley():
    losses = {0.001: 5.0, 0.002: 4.5, 0.004: 4.0, 0.008: 3.5, 0.016: 3.0, 0.032: 2.5, 0.064: 2.7}
    return losses, [0.002, 0.001]


def _searched(*, edge=True, broken=True, nan=True, pick=min, up=True, down=True, again=False,
              worst=math.inf, most=20, answer="best"):
    def best_rate(run, rates):
        found = {}

        def attempt(rate):
            try:
                loss = run(rate)
            except ValueError:
                if not broken:
                    raise
                loss = worst
            found[rate] = math.inf if nan and loss != loss else loss
            return found[rate]

        for rate in rates:
            attempt(rate)
        best = pick(found, key=found.get)
        new = best
        while edge and len(found) < min(20, len(rates) + most):
            if up and best == max(found):
                new = best * 2
            elif down and best == min(found):
                new = best / 2
            else:
                break
            attempt(new)
            if pick(found, key=found.get) == best:
                break
            best = pick(found, key=found.get)
        if again:
            run(best)
        return {"best": best, "loss": min(found.values()), "last": new}[answer]
    return best_rate


def _everywhere(run, rates, first=min, last=max):
    """Goes on beyond what first and last take for the edges, best there or not."""
    found = {}

    def attempt(rate):
        try:
            loss = run(rate)
        except ValueError:
            loss = math.inf
        found[rate] = math.inf if loss != loss else loss
        return found[rate]

    for rate in rates:
        attempt(rate)
    best = min(found, key=found.get)
    for edge, factor in ((last, 2), (first, 0.5)):
        while edge is None or best == edge(rates):
            rates = [*rates, best * factor] if factor == 2 else [best * factor, *rates]
            if not attempt(best * factor) < found[best]:
                break
            best = best * factor
    return best


def _compared_again(run, rates):
    def safe(rate):
        try:
            loss = run(rate)
        except ValueError:
            return math.inf
        return math.inf if loss != loss else loss

    found = {rate: safe(rate) for rate in rates}
    best = min(found, key=found.get)
    step = 2 if best == max(rates) else 0.5 if best == min(rates) else 0
    while step and safe(best * step) < safe(best):
        best *= step
    return best


def _by_sorting(run, rates):
    pairs = []
    for rate in rates:
        try:
            loss = run(rate)
        except ValueError:
            continue
        if not math.isnan(loss):
            pairs.append((loss, rate))
    best_loss, best = min(pairs)
    highest, lowest = max(rates), min(rates)
    step = 2 if best == highest else 0.5 if best == lowest else None
    while step:
        try:
            loss = run(best * step)
        except ValueError:
            break
        if not loss < best_loss:
            break
        best_loss, best = loss, best * step
    return best


def a_low_edge():
    return {0.4: 2.2, 0.2: 1.8, 0.1: 1.5, 0.05: float("nan")}, [0.4, 0.2, 0.1]


BEST_RATE = Exercise(
    name="best_rate", chapter=5, kind="open", entry="best_rate",
    title="Find a rate", difficulty="hard", importance="useful", minutes=20,
    reference=_searched(),
    fixtures=(a_valley, a_run_that_breaks, still_falling_at_the_edge, a_low_edge,
              a_far_valley),
    run=_tried,
    equivalents={"sorted pairs": _by_sorting},
    misconceptions=(
        Misconception("the edge taken for the best", _searched(edge=False),
            "The best rate stands at the edge of what was tried, so a better one may lie beyond. "
            "Double it, or halve it, until the loss rises."),
        Misconception("one direction only", _searched(up=False),
            "The search goes on in one direction only. At the highest rate double it, at the "
            "lowest halve it, until the loss no longer falls.",
            also=[_searched(down=False)]),
        Misconception("a broken run ends the search", _searched(broken=False),
            "A run raised an error, and the search ended with it. A broken run is a result: this "
            "rate is infinitely bad; note that and go on.",
            also=[_searched(broken=False, edge=False)]),
        Misconception("NaN is not infinite", _searched(nan=False),
            "A loss that is not a number compares as neither smaller nor larger, so the choice "
            "went wrong. Treat it as infinite."),
        Misconception("a broken run is the best", _searched(worst=0.0),
            "A run that broke was taken for the best one. Its loss is infinite, not 0."),
        Misconception("one step beyond the edge", _searched(most=1),
            "The search stopped one step beyond the edge. Go on as long as the new rate is "
            "better."),
        Misconception("the last rate tried", _searched(answer="last"),
            "The rate that was run last came back. It was worse than the one before: that one is "
            "the best."),
        Misconception("beyond a valley", lambda run, rates: _everywhere(run, rates, None, None),
            "New rates were run although the best one stood in the middle. Runs are expensive: go "
            "on only from an edge."),
        Misconception("a run repeated", _compared_again,
            "A run was made twice. Runs are expensive: keep each loss beside its rate.",
            also=[_searched(again=True)]),
    ),
    hints=(
        Hint("I do not know where to start",
             "Run every rate once and remember its loss. What do you note for a run that breaks?"),
        Hint("The best rate is at the edge",
             "If it is the highest one tried, run its double; if it is the lowest, its half. Go on "
             "as long as that is better."),
        Hint("I cannot put it together",
             "A dictionary from rate to loss, infinite for ValueError and for NaN. Find the "
             "smallest. A while loop moves outwards, one new run a turn."),
    ),
    praise="A search that looks beyond its own edge.",
)


EXERCISES = [NATS, GROUPS, RATE, ACCUMULATE, SHIFT, STEP, CLIP, ADAMW, EVALUATE, CURVES,
             DECONTAMINATE, BEST_RATE]
