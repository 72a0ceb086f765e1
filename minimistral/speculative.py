"""Speculative decoding: a cheap draft proposes tokens, the model checks them all
in one step. The text, or its distribution, stays the model's own (Leviathan et al.
2023).

A step reads every weight whether it runs one token or five, so that checking five
proposals costs little more than writing one token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minimistral.engine import Engine, room_for
from minimistral.generate import as_prompts, row_generator
from minimistral.model import check_ids
from minimistral.sampling import check_sampling, draw, next_distribution


@dataclass
class Speculation:
    """What was written, and how much of what was proposed was right.

    steps  of the model, the reading of the prompt not counted
    """
    ids: list[int] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0
    steps: int = 0

    @property
    def acceptance(self) -> float:
        """The share of proposed tokens that were accepted."""
        return self.accepted / max(1, self.proposed)

    @property
    def tokens_per_step(self) -> float:
        return len(self.ids) / max(1, self.steps)


def speculate(engine: Engine, prompt_ids: Sequence[int], max_new_tokens: int,
              draft, *, drafts: int = 4, temperature: float = 0.0,
              top_k: int | None = None, top_p: float | None = None,
              seed: int | None = None, stop_ids: Sequence[int] = ()
              ) -> Speculation:
    """Continue a prompt as `engine.generate` does: greedily the same text, with a
    temperature the same distribution, though other draws.

    engine  made with spare=drafts or more, and free
    draft   PromptLookup() or DraftModel(engine of a small model)
    drafts  how many tokens are proposed at once
    Raises ValueError for arguments that do not fit, the draft's included.
    """
    check_sampling(temperature, top_k, top_p)
    (prompt,), _ = as_prompts([list(prompt_ids)])
    check_speculation(engine, drafts, prompt, max_new_tokens)
    generator = row_generator(seed, 0)

    def distribution(logits: Tensor) -> Tensor:
        """(n, V) -> probabilities; greedy choice is a distribution of one token."""
        if temperature == 0:
            return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
        return next_distribution(logits, temperature, top_k, top_p)

    draft.begin(engine, prompt, drafts, max_new_tokens)
    text, done = list(prompt), Speculation()
    p = distribution(engine.read(0, text)[None].cpu())
    found, longest = accept([], p[:0], p, generator), len(prompt) + max_new_tokens
    while extend(text, found, longest, stop_ids):
        count = min(drafts, longest - len(text) - 1)
        proposed, q = draft.propose(text, count, distribution, generator)
        p = distribution(check_drafts(engine, text, proposed, drafts))
        found = accept(proposed, q, p, generator)
        engine.fast.forget(0, len(text) + len(found) - 1)      # rejected ones go
        done.proposed += len(proposed)
        done.accepted += len(found) - 1
        done.steps += 1
    engine.fast.forget(0)
    done.ids = text[len(prompt):]
    return done


def extend(text: list[int], found: list[int], longest: int, stop_ids) -> bool:
    """Add tokens to the text up to a stop id or its full length; is there more?"""
    for token in found:
        if token in stop_ids or len(text) == longest:
            return False
        text.append(token)
    return len(text) < longest


def check_drafts(engine: Engine, ids: list[int], proposed: list[int], drafts: int
                 ) -> Tensor:
    """Run the last token of the text and the proposed ones in one step of fixed
    length: the logits after each of them, (len(proposed) + 1, V)."""
    tokens = [ids[-1], *proposed]
    empty = (drafts if proposed else 0) + 1 - len(tokens)
    start = len(ids) - 1
    positions = [*range(start, start + len(tokens))] + [-1] * empty
    logits, likeliest = engine.run([tokens + [0] * empty], [positions])
    if (likeliest[0, :len(tokens)] < 0).any():
        raise ValueError("the model's logits are NaN: its weights hold NaN or are "
                         "too large for their dtype; load it anew, or in float32")
    return logits[0, :len(tokens)].cpu()


def accept(proposed: list[int], q: Tensor, p: Tensor, generator) -> list[int]:
    """The proposed tokens up to the first rejected one, and one token more.

    Token x, drawn from q, is accepted with probability min(1, p(x) / q(x)); in
    place of a rejected one a token is drawn from what p has more than q, max(0, p -
    q). Both together draw from p (Leviathan et al. 2023, algorithm 1).

    q: (n, V), from which each of n tokens was drawn; p: (n + 1, V), the model's
    """
    for i, token in enumerate(proposed):
        chance = torch.rand((), generator=generator)
        if chance * q[i, token] < p[i, token]:
            continue
        rest = (p[i] - q[i]).clamp(min=0)
        rest = rest if rest.sum() > 0 else p[i]            # q is p but for rounding
        return [*proposed[:i], draw_one(rest, generator)]
    return [*proposed, draw_one(p[-1], generator)]


def draw_one(weights: Tensor, generator) -> int:
    """One token, with probabilities in proportion to its weights (V,)."""
    return int(draw(weights[None], torch.rand(1, generator=generator)))


def check_speculation(engine: Engine, drafts: int, prompt: list[int],
                      max_new_tokens: int) -> None:
    """Raise ValueError where an engine can't take back what is rejected."""
    if isinstance(drafts, bool) or not isinstance(drafts, int) or drafts < 1:
        raise ValueError(f"drafts={drafts!r} must be a whole number from 1 up")
    spare = min(ring.spare for ring in engine.fast.rings.values())
    if drafts > spare:
        raise ValueError(f"drafts={drafts} tokens can't be taken back: make the "
                         f"engine with spare={drafts}, it has spare={spare}")
    if engine.seats:
        raise ValueError(f"{len(engine.seats)} places are taken: speculative "
                         f"decoding needs the engine for itself")
    check_ids(torch.tensor([prompt]), engine.config.vocab_size)
    room_for(len(prompt), max_new_tokens, engine.limit)


# ------------------------------------------------------------ two kinds of draft


class PromptLookup:
    """Proposes what followed the last few tokens where they stood before in the
    text: names, quotations, code (Saxena 2023, "prompt lookup decoding").

    longest  how many tokens must be the same, at most; failing that it tries fewer
    """

    def __init__(self, longest: int = 3):
        self.longest = longest

    def begin(self, engine: Engine, prompt, drafts, max_new_tokens) -> None:
        self.vocab_size = engine.config.vocab_size
        self.after: dict[tuple, int] = {}         # a few tokens: where they went on
        self.known = 1

    def propose(self, text: list[int], count: int, distribution: Callable, generator
                ) -> tuple[list[int], Tensor]:
        """At most `count` tokens, each of them proposed with probability 1."""
        for end in range(self.known, len(text)):
            for n in range(1, min(self.longest, end) + 1):
                self.after[tuple(text[end - n:end])] = end
        self.known = len(text)
        ends = (tuple(text[-n:]) for n in range(self.longest, 0, -1))
        found = [self.after[end] for end in ends if end in self.after]
        start = found[0] if found else len(text)
        proposed = text[start:start + count]
        q = F.one_hot(torch.tensor(proposed, dtype=torch.int64), self.vocab_size)
        return proposed, q.float()


class DraftModel:
    """Proposes what a smaller model with the same vocabulary writes.

    engine  of the small model, with spare=drafts or more, for itself alone
    """

    def __init__(self, engine: Engine):
        self.engine = engine

    def begin(self, engine: Engine, prompt, drafts, max_new_tokens) -> None:
        """Read all of the prompt but its last token."""
        check_speculation(self.engine, drafts, prompt, max_new_tokens)
        sizes = self.engine.config.vocab_size, engine.config.vocab_size
        if sizes[0] != sizes[1] or engine is self.engine:
            raise ValueError(f"a draft is another engine's, with the same "
                             f"vocabulary; it has {sizes[0]} tokens for {sizes[1]}")
        self.engine.fast.forget(0)
        self.held, self.drafts = prompt[:-1], drafts          # what the cache holds
        if self.held:
            self.engine.read(0, self.held)

    def propose(self, text: list[int], count: int, distribution: Callable, generator
                ) -> tuple[list[int], Tensor]:
        """`count` tokens, and the distributions (count, V) they are drawn from."""
        same = max(0, len(self.held) - self.drafts)
        known = min(len(self.held), len(text) - 1)
        while same < known and self.held[same] == text[same]:
            same += 1
        del self.held[same:]                             # what was rejected
        self.engine.fast.forget(0, same)
        proposed, q, waiting = [], [], text[same:]
        while len(proposed) < count:
            for token in waiting:
                logits, _ = self.engine.run([[token]], [[len(self.held)]])
                self.held.append(token)
            q.append(distribution(logits[0].cpu()))                         # (1, V)
            proposed.append(draw_one(q[-1][0], generator))
            waiting = proposed[-1:]
        return proposed, torch.cat(q) if q else torch.zeros(0)
