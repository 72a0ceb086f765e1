"""Learning from preferences: of two answers to the same question one is better.

Where many answers are right there is none to imitate, but of two one can say which
is better. Direct preference optimisation (DPO, Rafailov et al. 2023) raises the better
one's probability over the other's, measured from where the model began.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.instruct import Conversation, answer_rows
from minimistral.train import IGNORE, Rows, TrainConfig, make_optimizers, update


class Preference(NamedTuple):
    """A conversation whose last message is the user's, and two answers to it."""
    messages: Conversation
    better: str
    worse: str


def answer_log_probs(model: nn.Module, rows: Rows) -> Tensor:
    """ln p of each row's answers, the sum over its counted targets: (R,)"""
    inputs, targets, positions = (column.to(model.device) for column in rows)
    log_probs = model(inputs, positions=positions).log_softmax(-1)    # (R, T, V)
    counted = targets != IGNORE
    said = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return said.where(counted, 0.0).sum(-1)


def dpo_loss(better: Tensor, worse: Tensor, better_before: Tensor,
             worse_before: Tensor, beta: float = 0.1) -> Tensor:
    """The mean of -ln sigmoid(beta * gain), where the gain is how much more ln p of
    the better answer has risen, since before the training, than that of the worse.

    All (R,). A small beta lets the model go far from where it began.
    """
    gain = (better - better_before) - (worse - worse_before)
    return -F.logsigmoid(beta * gain).mean()


def learn_preferences(model: nn.Module, tokenizer, pairs: Sequence[Preference],
                      config: TrainConfig, beta: float = 0.1) -> list[float]:
    """Train with DPO, in place, what `requires_grad` lets learn.

    Returns the losses, of which the first is ln 2, since nothing has changed yet.
    seq_len of the config is not used.
    """
    rows = answer_rows(tokenizer, [           # 2n rows: better, worse, better, ...
        [*pair.messages, {"role": "assistant", "content": text}]
        for pair in pairs for text in (pair.better, pair.worse)])
    with torch.no_grad():
        parts = zip(*(column.split(32) for column in rows))
        before = torch.cat([answer_log_probs(model, Rows(*part)) for part in parts])
    optimizers, losses = make_optimizers(model, config), []
    random = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        chosen = torch.randint(len(pairs), (config.batch_size,), generator=random)
        chosen = torch.stack([2 * chosen, 2 * chosen + 1], 1).flatten()
        longest = int((rows.positions[chosen] >= 0).sum(1).max())
        part = Rows(*(column[chosen, :longest] for column in rows))
        now, then = answer_log_probs(model, part), before[chosen.to(before.device)]
        loss = dpo_loss(now[0::2], now[1::2], then[0::2], then[1::2], beta)
        loss.backward()
        update(model, optimizers, step, config)
        losses.append(loss.item())
    return losses
