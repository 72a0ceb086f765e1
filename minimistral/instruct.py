"""From a model that continues text to one that answers: the chat format, learning
from answers alone, and scores with their uncertainty.

A conversation is a list of messages, {"role": "system" | "user" | "assistant",
"content": text}: at most one system message, first; then user and assistant by turns.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minimistral.generate import generate
from minimistral.train import (
    IGNORE, Rows, TrainConfig, accumulate_gradients, make_optimizers,
    next_token_nats, update)

Conversation = Sequence[dict[str, str]]
ROLES = ("system", "user", "assistant")


# ---------------------------------------------------------------- the chat format


def check_conversation(messages: Conversation) -> None:
    """Raise ValueError, naming the message, for what no chat format can write."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    turns = messages[1:] if messages[0].get("role") == "system" else messages
    first = len(messages) - len(turns)
    if not turns:
        raise ValueError("after the system message there must be one from the user")
    for n, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ValueError(f"message {n} has role {message.get('role')!r}: the "
                             f"roles are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {n} must have its text as 'content'")
    for n, message in enumerate(turns):
        expected = ("user", "assistant")[n % 2]
        if message["role"] != expected:
            raise ValueError(
                f"message {n + first} is from the {message['role']}, but it is the "
                f"{expected}'s turn: they alternate, the user first")


def place_system(messages: Conversation, version: str) -> tuple[str, list[dict]]:
    """Where the system message goes: (text of a block of its own, the turns).

    v1 writes it before the first user message, v2 and v3 before the last, with an
    empty line between; from v7 on it has a block of its own.
    """
    if messages[0]["role"] != "system":
        return "", list(messages)
    system, turns = messages[0]["content"], list(messages[1:])
    if version not in ("v1", "v2", "v3"):
        return system, turns
    asked = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
    n = asked[0] if version == "v1" else asked[-1]
    turns[n] = {"role": "user", "content": f"{system}\n\n{turns[n]['content']}"}
    return "", turns


def encode_chat(tokenizer, messages: Conversation) -> tuple[list[int], list[bool]]:
    """A conversation in the format of the tokenizer's version, token for token as
    Mistral's own library writes it: the ids, and which of them are answers (the
    assistant's words and the </s> that ends them), which is what may be learned.

        v1:  <s> [INST] Hello [/INST] Hi there</s> ...      the marks are plain text
        v2+: <s>[INST]Hello[/INST]Hi there</s>[INST]...     the marks are tokens
    """
    check_conversation(messages)
    system, turns = place_system(messages, tokenizer.version)
    parts = [([tokenizer.bos_id], False)]
    if system:
        parts.append((between(tokenizer, "SYSTEM_PROMPT", system), False))
    for turn in turns:
        text = turn["content"]
        if turn["role"] == "assistant":
            words = text if tokenizer.version == "v1" else text.rstrip(" ")
            parts.append((tokenizer.encode(words, eos=True), True))
        elif tokenizer.version == "v1":
            parts.append((tokenizer.encode(f"[INST] {text} [/INST]"), False))
        else:
            parts.append((between(tokenizer, "INST", text), False))
    ids = [token for tokens, _ in parts for token in tokens]
    return ids, [learned for tokens, learned in parts for _ in tokens]


def between(tokenizer, name: str, text: str) -> list[int]:
    """[NAME] text [/NAME], the marks as control tokens. Raises ValueError if the
    tokenizer has none of that name."""
    marks = f"[{name}]", f"[/{name}]"
    if missing := [mark for mark in marks if mark not in tokenizer.control_tokens]:
        raise ValueError(f"this tokenizer ({tokenizer.version}) has no {missing[0]}"
                         f": was it made for chats?")
    begin, end = (tokenizer.control_tokens[mark] for mark in marks)
    return [begin, *tokenizer.encode(text), end]


# ---------------------------------------------------------------- learning from answers


def answer_rows(tokenizer, conversations: Sequence[Conversation]) -> Rows:
    """One row for each conversation, as long as the longest: inputs, targets and
    positions (R, T). Only answers are targets, each predicted from what is before
    it; the rest is IGNORE, and padding has position -1."""
    encoded = [encode_chat(tokenizer, messages) for messages in conversations]
    shape = len(encoded), max(len(ids) for ids, _ in encoded) - 1
    inputs = torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, IGNORE)
    positions = torch.full(shape, -1)
    for r, (ids, learned) in enumerate(encoded):
        n = len(ids) - 1
        inputs[r, :n] = torch.tensor(ids[:-1])
        counted = torch.tensor(learned[1:])
        targets[r, :n] = torch.tensor(ids[1:]).masked_fill(~counted, IGNORE)
        positions[r, :n] = torch.arange(n)
    return Rows(inputs, targets, positions)


def tuning_batch(rows: Rows, step: int, config: TrainConfig
                 ) -> tuple[Tensor, Tensor]:
    """The rows of one step, without columns in which all of them are padding:
    inputs and targets (B, T). Every round has an order of its own."""
    count = len(rows.inputs)
    places = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    chosen = []
    for turn in (places // count).unique().tolist():
        random = torch.Generator().manual_seed(config.seed * 1_000_003 + turn)
        order = torch.randperm(count, generator=random)
        chosen.append(order[places[places // count == turn] % count])
    chosen = torch.cat(chosen)
    longest = int((rows.positions[chosen] >= 0).sum(1).max())
    return rows.inputs[chosen, :longest], rows.targets[chosen, :longest]


def fine_tune(model: nn.Module, rows: Rows, config: TrainConfig) -> list[float]:
    """Train on the answers, in place: the whole model, or, if it has adapters,
    those alone. Returns the loss of every step, in nats per token of an answer.

    Padding is on the right, where causal attention never looks back from. The model
    learns only what `requires_grad` lets it; seq_len of the config is not used.
    """
    optimizers = make_optimizers(model, config)
    losses = []
    model.train()
    for step in range(config.steps):
        batch = tuning_batch(rows, step, config)
        loss = float(accumulate_gradients(model, batch, config))
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}: lower "
                             f"lr={config.lr}")
        update(model, optimizers, step, config)
        losses.append(loss)
    model.eval()
    return losses


# ---------------------------------------------------------------- answering, and scores


def answers(model: nn.Module, tokenizer, conversations: Sequence[Conversation],
            max_new_tokens: int = 100, batch_size: int = 32, **sampling
            ) -> list[str]:
    """What the model says to each conversation, whose last message is the user's.
    Greedy unless `sampling` says otherwise (see generate)."""
    prompts = [encode_chat(tokenizer, messages)[0] for messages in conversations]
    said: list[str] = []
    for start in range(0, len(prompts), batch_size):
        news = generate(model, prompts[start:start + batch_size], max_new_tokens,
                        stop_ids=(tokenizer.eos_id,), **sampling)
        said += [tokenizer.decode(new).strip(" ") for new in news]
    return said


@torch.no_grad()
def option_nats(model: nn.Module, tokenizer, messages: Conversation,
                options: Sequence[str]) -> list[float]:
    """-ln p of each option as the whole answer, its end included, in nats: the way
    a multiple-choice benchmark asks a model that it doesn't let speak. The
    likeliest option has the fewest nats; long ones have more than short ones."""
    told = [[*messages, {"role": "assistant", "content": text}] for text in options]
    rows = answer_rows(tokenizer, told)
    model_says = model(rows.inputs.to(model.device),
                       positions=rows.positions.to(model.device))    # (R, T, V)
    # only the last answer of a conversation is the option
    return [float(next_token_nats(logits[None], last_answer(targets)[None]))
            for logits, targets in zip(model_says.cpu(), rows.targets)]


def last_answer(targets: Tensor) -> Tensor:
    """The targets (T,) with all but the last run of counted ones set to IGNORE."""
    counted = (targets != IGNORE).nonzero().flatten()
    gaps = (counted[1:] - counted[:-1] > 1).nonzero()
    first = counted[int(gaps[-1]) + 1] if len(gaps) else counted[0]
    return torch.where(torch.arange(len(targets)) < first, IGNORE, targets)


def score_interval(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The range in which the true share of right answers lies, with 95% confidence
    for z = 1.96, when `right` of `asked` were right (Wilson 1927)."""
    if not 0 <= right <= asked or asked == 0:
        raise ValueError(f"{right} right answers of {asked}?")
    share = right / asked
    middle = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked**2))
    whole = 1 + z * z / asked
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)
