"""Chapter 13, fine-tuning and evaluation: its two core pieces and its exercises."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from minimistral.config import ModelConfig
from minimistral.instruct import answer_rows, encode_chat
from minimistral.lora import LoRALinear
from minimistral.questions import Question, as_conversation, ask, interview
from minimistral.tokenizer import load_tokenizer
from minimistral.train import IGNORE, Rows

from ..exercises import Exercise, Hint, Misconception
from .fixtures import random_tensor, random_tensors


@cache
def _tokenizer():
    return load_tokenizer("tales-dense")


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- piece: answer_rows


def two_turns_and_one_of_other_lengths():
    return _tokenizer(), [
        [_user("Who has the key?"), _assistant("Anna."), _user("Où est-elle ?"), _assistant("Au moulin.")],
        [_user("Hello"), _assistant("Good morning to you")],
        [_user("Where is the very old lantern?"), _assistant("Nobody.")],
    ]


def interviews_about_tales():
    rng = Random(2)
    return _tokenizer(), [as_conversation(interview(rng, n)) for n in (3, 1, 5)]


def a_system_message_before_the_question():
    return _tokenizer(), [
        [{"role": "system", "content": "Be brief."}, _user("Where is Leo?"), _assistant("At school.")],
        [_user("a"), _assistant("b"), _user("c"), _assistant("d e"), _user("f"), _assistant("g")],
    ]


def _rows_by_name(candidate, tokenizer, conversations):
    """The three columns as the loop reads them: by their names."""
    rows = candidate(tokenizer, conversations)
    return Rows(rows.inputs, rows.targets, rows.positions)


def _rows(shift=True, mask="targets", pad=IGNORE, keep=None, positions=None, fill=0):
    """answer_rows with one step exchanged."""
    def answer_rows(tokenizer, conversations):
        encoded = [encode_chat(tokenizer, messages) for messages in conversations]
        if keep:
            encoded = [keep(tokenizer, ids, learned) for ids, learned in encoded]
        size = max(len(ids) for ids, _ in encoded) - (1 if shift else 0)
        shape = len(encoded), size
        inputs = torch.full(shape, fill)
        targets = torch.full(shape, pad)
        places = torch.full(shape, -1)
        for r, (ids, learned) in enumerate(encoded):
            n = len(ids) - (1 if shift else 0)
            inputs[r, :n] = torch.tensor(ids[:n])
            aims = torch.tensor(ids[1:] if shift else ids)
            flags = learned[1:] if mask == "targets" else learned[:-1]
            if not shift:
                flags = learned
            counted = torch.tensor(flags) if mask else torch.ones(n, dtype=torch.bool)
            targets[r, :n] = aims.masked_fill(~counted, IGNORE)
            places[r, :n] = torch.arange(n) if positions is None else positions(n, size)
        return Rows(inputs, targets, places)
    return answer_rows


def _answer_rows_by_pad(tokenizer, conversations):
    from torch.nn.utils.rnn import pad_sequence

    pairs = [encode_chat(tokenizer, c) for c in conversations]
    ids = [torch.tensor(i) for i, _ in pairs]
    aims = [torch.where(torch.tensor(l), i, IGNORE)[1:] for i, (_, l) in zip(ids, pairs)]
    return Rows(pad_sequence([i[:-1] for i in ids], batch_first=True),
                pad_sequence(aims, batch_first=True, padding_value=IGNORE),
                pad_sequence([torch.arange(len(a)) for a in aims], batch_first=True, padding_value=-1))


def _answer_rows_by_lists(tokenizer, conversations):
    rows, longest = [], 0
    for messages in conversations:
        ids, learned = encode_chat(tokenizer, messages)
        aims = [token if yes else IGNORE for token, yes in zip(ids[1:], learned[1:])]
        rows.append((ids[:-1], aims, list(range(len(aims)))))
        longest = max(longest, len(aims))
    filled = [[row[k] + [(0, IGNORE, -1)[k]] * (longest - len(row[k])) for row in rows] for k in range(3)]
    return Rows(*(torch.tensor(part) for part in filled))


def _left_padded(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    out = [torch.full_like(x, value) for x, value in zip(rows, (0, IGNORE, -1))]
    for r, places in enumerate(rows.positions):
        n = int((places >= 0).sum())
        for new, old in zip(out, rows):
            new[r, -n:] = old[r, :n]
    return Rows(*out)


def _without_end(tokenizer, ids, learned):
    return ids, [yes and token != tokenizer.eos_id for token, yes in zip(ids, learned)]


def _without_inner_ends(tokenizer, ids, learned):
    last = len(ids) - 1
    return ids, [yes and (token != tokenizer.eos_id or n == last)
                 for n, (token, yes) in enumerate(zip(ids, learned))]


def _zero_where_ignored(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    return Rows(rows.inputs, rows.targets.masked_fill(rows.targets == IGNORE, 0), rows.positions)


def _inputs_masked(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    return Rows(rows.inputs.masked_fill(rows.targets == IGNORE, 0), rows.targets, rows.positions)


def _positions_go_on(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    count, longest = rows.inputs.shape
    return Rows(rows.inputs, rows.targets, torch.arange(longest).repeat(count, 1))


def _one_column_more(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    return Rows(*(F.pad(x, (0, 1), value=value) for x, value in zip(rows, (0, IGNORE, -1))))


def _all_are_inputs(tokenizer, conversations):
    inputs, targets, positions = _one_column_more(tokenizer, conversations)
    for r, messages in enumerate(conversations):
        ids, _ = encode_chat(tokenizer, messages)
        inputs[r, len(ids) - 1], positions[r, len(ids) - 1] = ids[-1], len(ids) - 1
    return Rows(inputs, targets, positions)


def _targets_not_shifted(tokenizer, conversations):
    inputs, targets, positions = answer_rows(tokenizer, conversations)
    targets = torch.full_like(targets, IGNORE)
    for r, messages in enumerate(conversations):
        ids, learned = encode_chat(tokenizer, messages)
        flags = torch.tensor(learned[:-1])
        targets[r, :len(flags)] = torch.tensor(ids[:-1]).masked_fill(~flags, IGNORE)
    return Rows(inputs, targets, positions)


def _flags_shifted_alone(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    return Rows(rows.inputs, rows.inputs.masked_fill(rows.targets == IGNORE, IGNORE), rows.positions)


def _padded_then_cut(tokenizer, conversations):
    inputs, targets, positions = _all_are_inputs(tokenizer, conversations)
    return Rows(inputs[:, :-1], targets[:, :-1], positions[:, :-1])


def _last_inputs_kept(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    return Rows(_padded_then_cut(tokenizer, conversations).inputs, rows.targets, rows.positions)


def _padded_with_the_end(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    return Rows(rows.inputs.masked_fill(rows.positions < 0, tokenizer.eos_id), rows.targets, rows.positions)


def _answers_alone_read(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    answers = F.pad(rows.targets[:, :-1] != IGNORE, (1, 0))           # inputs that belong to an answer
    return Rows(rows.inputs * answers, rows.targets, rows.positions)


def _last_answer_only(tokenizer, ids, learned):
    asked = max(n for n, yes in enumerate(learned[:-1]) if not yes)
    return ids, [yes and n > asked for n, yes in enumerate(learned)]


def _padding_at_0(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    return Rows(rows.inputs, rows.targets, rows.positions.clamp(min=0))


def _questions_learned(tokenizer, ids, learned):
    return ids, [not yes for yes in learned]


def _shifted_twice(tokenizer, conversations):
    rows = answer_rows(tokenizer, conversations)
    return Rows(rows.inputs, F.pad(rows.targets[:, 1:], (0, 1), value=IGNORE), rows.positions)


ANSWER_ROWS = Exercise(
    name="answer_rows", chapter=13, kind="piece", piece="instruct.answer_rows", entry="answer_rows",
    title="Rows of answers", difficulty="medium", importance="essential", minutes=9,
    reference=answer_rows, run=_rows_by_name,
    fixtures=(two_turns_and_one_of_other_lengths, interviews_about_tales,
              a_system_message_before_the_question),
    equivalents={"pad_sequence": _answer_rows_by_pad, "lists": _answer_rows_by_lists},
    misconceptions=(
        Misconception("loss on the prompt", _rows(mask=None),
            "Questions are targets too. Where what comes next is not learned, the target is IGNORE."),
        Misconception("shift forgotten", _targets_not_shifted,
            "Each position has itself as its target, which it can copy. Inputs leave out the last "
            "token, targets the first."),
        Misconception("flags shifted alone", _flags_shifted_alone,
            "The flags are shifted and the ids are not: the first target of each answer is the mark before "
            "it. Both begin with the second."),
        Misconception("nothing left out", _rows(shift=False),
            "Inputs and targets are the same tokens, all of them. A target is the token that comes next."),
        Misconception("the last token is an input", _all_are_inputs,
            "The last token is an input, but nothing comes after it. Inputs are all tokens but the last."),
        Misconception("padded, then cut", _padded_then_cut,
            "The last column was cut off the padded rows, so shorter rows keep their last token. Cut each "
            "row before it is padded."),
        Misconception("last inputs kept", _last_inputs_kept,
            "Shorter rows still have their last token among the inputs, where the padding should begin: "
            "nothing comes after it."),
        Misconception("learned of the inputs", _rows(mask="inputs"),
            "The first word of each answer is not learned, and what follows its end is. The flags "
            "belong to the targets, one place further."),
        Misconception("end token not learned", _rows(keep=_without_end),
            "The end token has no target. It belongs to the answer: without it the model never "
            "learns to stop.", also=[_rows(keep=_without_inner_ends)]),
        Misconception("padding is a target", _rows(pad=0),
            "Padding counts in the loss: its targets are 0, a token like any other. Start from "
            "rows full of IGNORE."),
        Misconception("prompt targets are 0", _zero_where_ignored,
            "Where nothing is to be learned, the target is 0, which is a token. It has to be IGNORE."),
        Misconception("inputs masked, too", _inputs_masked,
            "The inputs are masked as well, so the model cannot read the question. All tokens are read; "
            "only targets get IGNORE."),
        Misconception("answers alone are read", _answers_alone_read,
            "The inputs that are no answers were set to 0, so there is no question to read. All tokens are "
            "read; only targets get IGNORE."),
        Misconception("only the last answer", _rows(keep=_last_answer_only),
            "Only the last answer of a conversation has targets. Every answer in it is learned."),
        Misconception("padded with the end token", _padded_with_the_end,
            "Padded inputs are the end token, as elsewhere. Here they are 0."),
        Misconception("no names", lambda tokenizer, conversations: tuple(answer_rows(tokenizer, conversations)),
            "This is a tuple without names. The training reads inputs, targets and positions by name: return Rows."),
        Misconception("padded with IGNORE in the inputs", _rows(fill=IGNORE),
            "The inputs hold IGNORE, and no embedding has that number. Padded inputs are 0."),
        Misconception("positions of padding go on",
            _positions_go_on,
            "Padding has positions like real tokens. It has position -1, by which attention knows it."),
        Misconception("positions begin at 1", _rows(positions=lambda n, size: torch.arange(1, n + 1)),
            "Positions are one too large. They count from 0; only padding has -1."),
        Misconception("padding on the left", _left_padded,
            "The padding is on the left. Here it is on the right, where no token looks back to it."),
        Misconception("a column too many", _one_column_more,
            "There is a column too many. The longest row has one input less than tokens: its last token "
            "is never an input."),
        Misconception("padding at position 0", _padding_at_0,
            "Padding stands at position 0, like each row's first token. Its position is -1."),
        Misconception("mask the wrong way round", _rows(keep=_questions_learned),
            "The questions are learned, and the answers are ignored: the flags are the wrong way round."),
        Misconception("shifted twice", _shifted_twice,
            "Each position has to predict the token after the next. Shift the ids and their flags once."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take one conversation with five ids. How many inputs does it have, and how many targets? "
             "Which id is never an input?"),
        Hint("My targets are off by one",
             "With n ids: inputs are ids 0 to n - 2, targets are ids 1 to n - 1, and the flags that "
             "belong to the targets are flags 1 to n - 1."),
        Hint("My rows have different lengths",
             "Make three full tensors first, (R, T) with T = longest - 1: zeros, IGNORE, -1. Then write "
             "into the first n - 1 places of row r; masked_fill puts IGNORE where a flag is False."),
    ),
    praise="Any conversation can now be learned from.",
)


# ---------------------------------------------------------------- piece: LoRALinear


def _layer(seed: int, outputs: int, inputs: int, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data = random_tensor(seed, outputs, inputs)
    if bias:
        layer.bias.data = random_tensor(seed + 100, outputs)
    return layer


def rank_three_alpha_seven():
    return _layer(1, 5, 8, bias=True), 3, 7.0, random_tensor(2, 2, 4, 8)


def one_row_and_rank_two():
    return _layer(3, 9, 6), 2, 1.0, random_tensor(4, 7, 6)


class _Halved(nn.Module):
    """A layer of another kind, as a quantized one is: no parameter is called weight."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.numbers = nn.Parameter(2 * layer.weight.data)

    def forward(self, x):
        return 0.5 * (x @ self.numbers.T)


def a_base_of_another_kind():
    return _Halved(_layer(7, 6, 10)), 2, 3.0, random_tensor(8, 5, 10)


def a_wide_layer():
    return _layer(5, 4, 256), 4, 10.0, random_tensor(6, 3, 256)


def _drawn(down):
    """How the numbers of down seem to be drawn, told only where chance cannot be the reason."""
    z = down.detach().flatten() * down.shape[-1] ** 0.5           # deviations, if all is right
    if z.unique().numel() < 0.9 * z.numel():
        return "some numbers repeat"
    if z.min() >= 0:
        return "none below zero"
    spread, enough = float(z.std()), z.numel() > 500
    if enough and abs(z.mean()) > 0.3 * spread:
        return "not around zero"
    if enough and ((z / spread).abs() > 2).float().mean() < 0.01:  # of a normal distribution: 0.046
        return "none far from zero"
    low, high = (0.85, 1.15) if enough else (0.3, 2.0)             # five deviations of chance and more
    return "right" if low < spread < high else "too wide" if spread > 1 else "too narrow"


def _use_layer(candidate, base, rank, alpha, x):
    """What a layer gives, which parts learn, how they start, and what reaches the layers below."""
    with torch.random.fork_rng():
        torch.manual_seed(17)
        layer, another = candidate(base, rank, alpha), candidate(deepcopy(base), rank, alpha)
    if isinstance(layer.down, nn.Module) or isinstance(layer.up, nn.Module):
        raise TypeError("down and up are layers; they have to be parameters, plain matrices")
    start = layer(x)
    if start.requires_grad:
        (start - 1).square().sum().backward()
    learns = {name: float(w.grad is not None and w.grad.norm() > 0)
              for name, w in sorted(layer.named_parameters()) if w.requires_grad}
    drawn = _drawn(layer.down)
    if drawn == "right" and torch.equal(layer.down, another.down):
        drawn = "the same every time"
    shapes = tuple(layer.down.shape), tuple(layer.up.shape)
    fresh = random_tensors(18, tuple(layer.down.shape), tuple(layer.up.shape))
    start_of_up = "other numbers" if layer.up.any() else "zeros"
    with torch.no_grad():
        layer.up.zero_()
        without = layer(x)
        layer.down.copy_(fresh[0])
        layer.up.copy_(fresh[1])
    below = x.clone().requires_grad_()
    after = layer(below)
    if after.requires_grad:
        after.square().sum().backward()
    return {"shapes of down and up": shapes, "start of up": start_of_up, "with zeros in up": without,
            "with other numbers in down and up": after.detach(), "scale": float(layer.scale),
            "what learns": learns, "base frozen": not any(w.requires_grad for w in base.parameters()),
            "numbers in down": drawn, "base kept": layer.base is base,
            "what learns later": {name: w.grad is not None and bool(w.grad.any())
                                  for name, w in sorted(layer.named_parameters()) if w.requires_grad},
            "gradient of x": torch.zeros_like(x) if below.grad is None else below.grad}


def _lora(scale=lambda alpha, rank: alpha / rank, init="right", freeze=True, forward=None,
          parameter=nn.Parameter, std=None, draw=None):
    class Layer(nn.Module):
        def __init__(self, base, rank, alpha):
            super().__init__()
            self.base = base.requires_grad_(False) if freeze else base
            if freeze == "weight" and getattr(base, "bias", None) is not None:
                base.bias.requires_grad_(True)
            self.scale = scale(alpha, rank)
            spread = base.in_features ** -0.5 if std is None else std(base, rank)
            down = draw(rank, base.in_features) if draw else torch.randn(rank, base.in_features) * spread
            up = torch.randn(base.out_features, rank) * spread
            if init in ("right", "both zero"):
                up = torch.zeros_like(up)
            if init in ("both zero", "wrong one zero"):
                down = torch.zeros_like(down)
            self.down, self.up = parameter(down), parameter(up)

        def forward(self, x):
            if forward:
                return forward(self, x)
            return self.base(x) + self.scale * (x @ self.down.T) @ self.up.T
    return Layer


class _ByMatrices(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base
        for weight in self.base.parameters():
            weight.requires_grad = False
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        change = self.up @ self.down                              # (out, in)
        return self.base(x) + self.scale * torch.einsum("oi,...i->...o", change, x)


class _SizesOfTheWeight(_lora()):
    def __init__(self, base, rank, alpha):
        outputs, inputs = base.weight.shape
        super().__init__(base, rank, alpha)


class _Transposed(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.down = nn.Parameter(torch.randn(base.in_features, rank) * base.in_features ** -0.5)
        self.up = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x):
        return self.base(x) + self.scale * x @ self.down @ self.up


LORA_LINEAR = Exercise(
    name="LoRALinear", chapter=13, kind="piece", piece="lora.LoRALinear", entry="LoRALinear",
    title="A layer with an adapter", difficulty="medium", importance="essential", minutes=10,
    reference=LoRALinear, run=_use_layer, may_change_inputs=True,
    fixtures=(rank_three_alpha_seven, one_row_and_rank_two, a_wide_layer, a_base_of_another_kind),
    equivalents={
        "products with transposes": _lora(), "a matrix of the change": _ByMatrices,
        "F.linear": _lora(forward=lambda s, x: s.base(x)
                          + F.linear(F.linear(x, s.down), s.up) * s.scale),
    },
    misconceptions=(
        Misconception("scale forgotten", _lora(forward=lambda s, x: s.base(x)
                                               + (x @ s.down.T) @ s.up.T),
            "The change comes in unscaled. It is multiplied by alpha over rank."),
        Misconception("alpha over the root", _lora(scale=lambda alpha, rank: alpha / rank ** 0.5),
            "The scale is alpha over the root of the rank. It is alpha over the rank itself."),
        Misconception("alpha without rank", _lora(scale=lambda alpha, rank: alpha),
            "The scale is alpha alone. It is alpha over rank, so that another rank needs no other "
            "learning rate."),
        Misconception("rank over alpha", _lora(scale=lambda alpha, rank: rank / alpha),
            "The scale is the wrong way up: alpha over rank."),
        Misconception("both zero", _lora(init="both zero"),
            "Nothing can learn: with both matrices zero, both gradients are zero for ever. Draw down "
            "at random."),
        Misconception("both random", _lora(init="both random"),
            "The layer gives something else before any training. One matrix, up, starts at zero."),
        Misconception("the wrong one zero", _lora(init="wrong one zero"),
            "Here down is zero and up is random. It would learn, but the agreed start is the "
            "other way round."),
        Misconception("base not frozen", _lora(freeze=False),
            "The base learns too. Freeze its parameters; only down and up learn."),
        Misconception("bias not frozen", _lora(freeze="weight"),
            "The base's bias still learns. Freeze all parameters of the base, not its weight alone."),
        Misconception("detached, not frozen", _lora(freeze=False, forward=lambda s, x: s.base(x).detach()
                                                    + s.scale * (x @ s.down.T) @ s.up.T),
            "The base's computation is cut off, and its parameters are still up for learning. Freeze the "
            "parameters: layers below need the gradient."),
        Misconception("down fixed",
            _lora(parameter=lambda w: nn.Parameter(w, requires_grad=not w.any())),
            "Only up learns. After its random start down learns as well."),
        Misconception("up is no parameter",
            _lora(parameter=lambda w: nn.Parameter(w) if w.any() else w),
            "One of the two is a plain tensor, which no optimiser sees. Both have to be parameters."),
        Misconception("down and up are buffers",
            _lora(parameter=lambda w: w.requires_grad_()),
            "No optimiser would train down and up. Make them parameters, and freeze nothing but the base."),
        Misconception("alpha // rank", _lora(scale=lambda alpha, rank: alpha // rank),
            "The scale was rounded down to a whole number. Alpha over rank is a plain division."),
        Misconception("the base's weight alone", _lora(forward=lambda s, x: x @ s.base.weight.T
                                                       + s.scale * (x @ s.down.T) @ s.up.T),
            "The base's bias is lost. Call the base instead of using its weight: it need not be an "
            "ordinary linear layer."),
        Misconception("sizes of the weight", _SizesOfTheWeight,
            "The sizes were read from the base's weight, which not every layer has. Ask it for in_features and "
            "out_features."),
        Misconception("no gradient through the base", _lora(forward=lambda s, x: s.base(x).detach()
                                                            + s.scale * (x @ s.down.T) @ s.up.T),
            "No gradient passes through the base, so adapters in the layers below learn wrongly. Freeze its "
            "parameters, not its computation."),
        Misconception("spread by outputs", _lora(std=lambda base, rank: base.out_features ** -0.5),
            "In a wide layer the numbers in down are too large. Their spread falls with the root of the number "
            "of inputs, and of nothing else."),
        Misconception("base left out", _lora(forward=lambda s, x: s.scale * (x @ s.down.T) @ s.up.T),
            "The layer gives the change alone, zero at first. The base's own result is added to it."),
        Misconception("base scaled as well", _lora(forward=lambda s, x: s.scale * (
                s.base(x) + (x @ s.down.T) @ s.up.T)),
            "The base's result is scaled, too. Only the change is multiplied by alpha over rank."),
        Misconception("transposed shapes", _Transposed,
            "The numbers are right, the shapes are transposed: down is (rank, in) and up is "
            "(out, rank), as the library merges them."),
        Misconception("spread of one", _lora(std=lambda base, rank: 1.0),
            "The numbers in down are too large. Their standard deviation is one over the root of the "
            "number of inputs."),
        Misconception("spread over inputs", _lora(std=lambda base, rank: 1 / base.in_features),
            "The numbers in down are too small. Their standard deviation is one over the root of the number "
            "of inputs, not over the number."),
        Misconception("a fixed spread", _lora(std=lambda base, rank: 0.02),
            "The numbers in down are much too small. Their standard deviation depends on the number of inputs: "
            "one over its root."),
        Misconception("rand", _lora(draw=lambda rank, inputs: torch.rand(rank, inputs) * inputs ** -0.5),
            "No number in down is below zero. A normal distribution lies around zero, as randn draws it; rand "
            "gives 0 to 1."),
        Misconception("uniform", _lora(draw=lambda rank, inputs: (2 * torch.rand(rank, inputs) - 1)
                                       * (3 / inputs) ** 0.5),
            "The numbers in down lie evenly between two bounds. They are to be normal, as randn draws "
            "them."),
        Misconception("seeded inside", _lora(draw=lambda rank, inputs: torch.randn(
                rank, inputs, generator=torch.Generator().manual_seed(0)) * inputs ** -0.5),
            "Every layer starts with the same numbers in down: there is a seed inside the layer. Whoever "
            "builds the model sets it."),
        Misconception("one row for all", _lora(draw=lambda rank, inputs: (
                torch.randn(inputs) * inputs ** -0.5).repeat(rank, 1)),
            "Numbers in down repeat. Draw each for itself: with equal rows the change has rank one."),
        Misconception("a nonlinearity between", _lora(forward=lambda s, x: s.base(x)
                + s.scale * torch.relu(x @ s.down.T) @ s.up.T),
            "There is a nonlinearity between down and up. Without one, the change is a matrix that "
            "can be merged."),
    ),
    hints=(
        Hint("I do not know where to start",
             "x has 8 numbers, the rank is 3, the layer gives 5. What shapes must down and up have, so "
             "that 8 become 3 and 3 become 5?"),
        Hint("It gives the wrong numbers",
             "base(x), plus alpha over rank times what up makes of what down makes of x. For a matrix "
             "(out, in), the product is x times its transpose."),
        Hint("It does not learn, or is wrong at first",
             "Both have to be nn.Parameter; down from torch.randn times in_features ** -0.5, up from "
             "torch.zeros; the base with requires_grad_(False)."),
    ),
    praise="A matrix that learns, and stays what it was.",
)


# ---------------------------------------------------------------- 1: a format by hand


def one_question():
    return _tokenizer(), [_user("Who has the key?")]


def two_turns_with_spaces():
    return _tokenizer(), [_user(" two  spaces "), _assistant(" x = [INST] 1\n  "), _user("Où est-elle ?\n"),
                          _assistant("Au moulin.")]


def three_questions():
    return _tokenizer(), [_user("Hello"), _assistant("Hi there"), _user("Bye"), _assistant("So long"),
                          _user("日本")]


def _end_after_the_last(tokenizer, messages):
    ids = _chat(closed=False)(tokenizer, messages)
    return ids + [tokenizer.eos_id] * (messages[-1]["role"] == "assistant")


def _chat(question=None, answer=None, closed=True):
    def chat_ids(tokenizer, messages):
        first, last = (tokenizer.control_tokens[m] for m in ("[INST]", "[/INST]"))
        ids = [tokenizer.bos_id]
        for n, message in enumerate(messages):
            text = message["content"]
            if message["role"] == "user":
                ids += question(tokenizer, first, last, text, n) if question else [
                    first, *tokenizer.encode(text), last]
            else:
                words = answer(text) if answer else text.rstrip(" ")
                ids += [*tokenizer.encode(words), *([tokenizer.eos_id] if closed else [])]
        return ids
    return chat_ids


CHAT_IDS = Exercise(
    name="chat_ids", chapter=13, kind="complete", entry="chat_ids",
    title="A format by hand", difficulty="easy", importance="essential", minutes=10,
    reference=_chat(),
    fixtures=(one_question, two_turns_with_spaces, three_questions),
    equivalents={"the library's": lambda tokenizer, messages: encode_chat(tokenizer, messages)[0]},
    misconceptions=(
        Misconception("space after [INST]", _chat(lambda t, a, b, text, n: [a, *t.encode(" " + text), b]),
            "A space was put before the question. This tokenizer gets the text as it is; the other "
            "kind adds its space by itself."),
        Misconception("space before the answer", _chat(answer=lambda text: " " + text.rstrip(" ")),
            "A space was put before the answer. The answer begins right after the mark."),
        Misconception("marks as plain text",
            _chat(lambda t, a, b, text, n: t.encode(f"[INST]{text}[/INST]")),
            "The marks became several tokens of plain text. They are control tokens, with numbers of "
            "their own."),
        Misconception("no end after answers", _chat(closed=False),
            "Answers do not end. After each of them comes the end token."),
        Misconception("end as plain text", _chat(answer=lambda text: text.rstrip(" ") + "</s>", closed=False),
            "The end became letters of plain text. It is a token with a number of its own."),
        Misconception("a mark is no list", _chat(lambda t, a, b, text, n: a + t.encode(text) + b),
            "A mark is one number, and the text a list of them: they cannot be added. Put the marks "
            "into the list."),
        Misconception("a list inside the list",
            _chat(lambda t, a, b, text, n: [a, t.encode(text), b]),
            "There is a list inside the list. The ids of the text have to stand between the marks one by "
            "one."),
        Misconception("no closing mark", _chat(lambda t, a, b, text, n: [a, *t.encode(text)]),
            "The mark that closes a question is missing, and the answer would begin after it."),
        Misconception("no opening mark", _chat(lambda t, a, b, text, n: [*t.encode(text), b]),
            "The mark that opens a question is missing. Questions stand between two marks."),
        Misconception("marks exchanged", _chat(lambda t, a, b, text, n: [b, *t.encode(text), a]),
            "The two marks are exchanged: the closing one stands before the question."),
        Misconception("end after the last answer only", _end_after_the_last,
            "Only an answer at the very end is closed. After every answer comes the end token."),
        Misconception("beginning at every question",
            _chat(lambda t, a, b, text, n: [t.bos_id, a, *t.encode(text), b]),
            "The beginning token stands before every question. It stands once, at the very start."),
        Misconception("answers not stripped", _chat(answer=lambda text: text),
            "An answer kept the spaces at its end. They are taken off."),
        Misconception("answers stripped of more", _chat(answer=lambda text: text.strip()),
            "An answer lost more than the spaces at its end: its line break, or a space before it. All of "
            "these stay."),
        Misconception("answers stripped at both ends", _chat(answer=lambda text: text.strip(" ")),
            "An answer lost the space before it. Spaces are taken off at its end only."),
        Misconception("one space off", _chat(answer=lambda text: text.removesuffix(" ")),
            "An answer lost one space of several. All of them at its end are taken off."),
        Misconception("answers' line breaks lost", _chat(answer=lambda text: text.rstrip()),
            "An answer lost the line break at its end. Only spaces are taken off there."),
        Misconception("questions stripped, too",
            _chat(lambda t, a, b, text, n: [a, *t.encode(text.strip()), b]),
            "The question lost its spaces and line breaks. It stays as it is; only the ends of answers change."),
        Misconception("questions stripped at the end",
            _chat(lambda t, a, b, text, n: [a, *t.encode(text.rstrip(" ")), b]),
            "The question lost the spaces at its end, as an answer does. It stays as it is."),
        Misconception("end after the question",
            _chat(lambda t, a, b, text, n: [a, *t.encode(text), b, t.eos_id]),
            "There is an end token after the question. Then the answer would begin a new text."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Write the tokens of: Hello, Hi there, Bye. How many of them are control tokens?"),
        Hint("My ids differ from the first one on",
             "In this order: the beginning once; for a question its mark, the text, the closing mark; for "
             "an answer its text without spaces at the end, then the end token."),
        Hint("My ids are longer than expected",
             "encode turns the letters of a mark into several tokens. Put the numbers begin and end "
             "around the list that encode gives."),
    ),
    praise="Token for token what Mistral's own library writes.",
)


# ---------------------------------------------------------------- 2: in order

TUNING_IN_ORDER = Exercise(
    name="tuning_in_order", chapter=13, kind="order",
    title="One run of tuning, in order", difficulty="easy", importance="essential", minutes=5,
    lines=(
        "model = mm.load_model('tales-dense')",
        "lora.add_lora(model, rank=4)                     # freezes everything else",
        "rows = instruct.answer_rows(tokenizer, lesson)",
        "losses = instruct.fine_tune(model, rows, config)  # makes its own optimiser",
        "lora.save_adapter(model, folder, 'tales-dense')",
        "lora.merge_lora(model)",
    ),
    distractors=("model.requires_grad_(True)",),
    equivalents={"rows before the adapter": (0, 2, 1, 3, 4, 5), "rows first": (2, 0, 1, 3, 4, 5)},
    misconceptions=(
        Misconception("no adapter at all", "without 1",
            "No adapter was added, so the whole model learned and there is none to save."),
        Misconception("made trainable and frozen again", "6 before 1",
            "One line lets all parameters learn, and a later one freezes them again. It has no use "
            "here."),
        Misconception("everything made trainable", "with 6",
            "After the model was frozen, one line lets all of it learn again. Only the adapter is "
            "to learn."),
        Misconception("merged before it learned", "5 before 3",
            "An adapter that has not learned anything was merged, and then all parameters were "
            "trained. Merging comes last."),
        Misconception("trained before the adapter", "3 before 1",
            "The whole model was trained, and the adapter saved is still the empty one. First the "
            "adapter, then the training."),
        Misconception("trained before there are rows", "3 before 2",
            "The training comes before its rows. What it learns from has to be made first."),
        Misconception("saved before it learned", "4 before 3",
            "The file holds an adapter that changes nothing: it was saved before it learned."),
        Misconception("merged before it was saved", "5 before 4",
            "After merging there is no adapter left to save. Save first, then merge."),
        Misconception("adapter before the model", "1 before 0",
            "An adapter is added to a model that is not loaded yet."),
    ),
    hints=(
        Hint("I do not know where to start", "Which line needs nothing from the others?"),
        Hint("Where does merging belong?",
             "merge_lora adds the change to the weights and takes the adapters off. What can no longer "
             "be done after that?"),
        Hint("Which line stays out?",
             "add_lora froze the model on purpose. One line would undo that."),
    ),
    praise="Load, add, learn, save, merge.",
)


# ---------------------------------------------------------------- 3: an adapter in numbers


def _config(**changes) -> ModelConfig:
    return ModelConfig(**{**dict(dim=24, n_layers=5, n_heads=6, n_kv_heads=2, head_dim=8, hidden_dim=68,
                                 vocab_size=50), **changes})


def shared_heads_rank_three():
    return _config(), 3, ("wq", "wk", "wo", "w2")


def all_seven():
    return _config(n_kv_heads=3, n_layers=3, hidden_dim=40), 4, ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def a_single_matrix():
    return _config(dim=64), 1, ("w1",)


def _sizes(q=None, kv=None, other=None, layers=None, per=None):
    def adapter_size(config, rank, names):
        heads = q(config) if q else config.n_heads * config.head_dim
        shared = kv(config) if kv else config.n_kv_heads * config.head_dim
        side = {"wq": heads, "wk": shared, "wv": shared, "wo": heads, "w1": config.hidden_dim,
                "w2": config.hidden_dim, "w3": config.hidden_dim}
        one = per or (lambda a, b: rank * (a + b))
        n = layers(config) if layers else config.n_layers
        if per:
            return n * sum(per(rank, side[name], config.dim) for name in names)
        return n * sum(one(side[name], config.dim) for name in names)
    return adapter_size


def _only_down(config, rank, names):
    inputs = {"wo": config.n_heads * config.head_dim, "w2": config.hidden_dim}
    return config.n_layers * rank * sum(inputs.get(name, config.dim) for name in names)


def _size_by_loops(config, rank, names):
    total = 0
    for _ in range(config.n_layers):
        for name in names:
            if name in ("wq", "wo"):
                out = config.n_heads * config.head_dim
            elif name in ("wk", "wv"):
                out = config.n_kv_heads * config.head_dim
            else:
                out = config.hidden_dim
            total += rank * config.dim + out * rank
    return total


ADAPTER_SIZE = Exercise(
    name="adapter_size", chapter=13, kind="function", entry="adapter_size",
    title="An adapter in numbers", difficulty="easy", importance="useful", minutes=8,
    reference=_sizes(), fixtures=(shared_heads_rank_three, all_seven, a_single_matrix),
    equivalents={"loops": _size_by_loops},
    misconceptions=(
        Misconception("one layer", _sizes(layers=lambda c: 1),
            "This is one layer. Every layer has matrices of these names."),
        Misconception("all matrices square", _sizes(q=lambda c: c.dim, kv=lambda c: c.dim),
            "Attention's matrices were taken as square. Their other side is heads times the size of "
            "a head."),
        Misconception("queries square", _sizes(q=lambda c: c.dim),
            "The matrices of the queries and of the output were taken as square. One side is all heads "
            "times the size of a head."),
        Misconception("all heads for keys and values", _sizes(kv=lambda c: c.n_heads * c.head_dim),
            "Keys and values have fewer heads than queries. Count n_kv_heads for them."),
        Misconception("the whole matrix", _sizes(per=lambda r, a, b: a * b),
            "These are the matrices themselves. An adapter has two narrow ones, one for each side."),
        Misconception("rank times the whole matrix", _sizes(per=lambda r, a, b: r * a * b),
            "The two sides were multiplied. Down has rank times in, up has out times rank: add them."),
        Misconception("rank forgotten", _sizes(per=lambda r, a, b: a + b),
            "The rank is missing: both matrices have it as one of their sides."),
        Misconception("heads without their size",
            _sizes(q=lambda c: c.n_heads, kv=lambda c: c.n_kv_heads),
            "Heads were counted, not their numbers. Each head has head_dim of them."),
        Misconception("only one of the two", _sizes(per=lambda r, a, b: r * a),
            "Only one of the two matrices was counted. There is down as well as up."),
        Misconception("only down", _only_down,
            "This is all down matrices alone. Each has an up beside it, with rank times out numbers."),
        Misconception("twice", _sizes(per=lambda r, a, b: 2 * r * (a + b)),
            "This is twice as many. Out plus in holds both matrices already, and bytes are not asked for."),
        Misconception("names not looked at", lambda config, rank, names: _sizes()(
                config, rank, ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
            "All seven matrices were counted. Only those of the names that are given have an adapter."),
        Misconception("heads that fill dim",
            _sizes(q=lambda c: c.dim, kv=lambda c: c.n_kv_heads * c.dim // c.n_heads),
            "The size of a head was taken as dim over heads. The configuration has a number of its own for "
            "it."),
        Misconception("both of the same side", _sizes(per=lambda r, a, b: 2 * r * b),
            "Both matrices were counted with dim. One has the other side: heads or hidden."),
    ),
    hints=(
        Hint("I do not know where to start",
             "A matrix of 5 × 8 with rank 3: what shapes have down and up, and how many numbers?"),
        Hint("It is right for some names only",
             "wq and wo: n_heads times head_dim; wk and wv: n_kv_heads times head_dim; w1, w2, w3: "
             "hidden_dim. The other side is always dim."),
        Hint("Too small by a whole factor",
             "Sum over the names, times the rank, times the number of layers."),
    ),
    praise="Small enough to send by mail.",
)


# ---------------------------------------------------------------- 4: merge, and take it out


def rank_two_of_a_wide_matrix():
    weight, down, up = random_tensors(31, (5, 9), (2, 9), (5, 2))
    return weight, down, up, 7.0


def taken_out_again():
    weight, down, up = random_tensors(32, (8, 6), (3, 6), (8, 3))
    return weight, down, up, 2.0, -1


def a_rank_of_four():
    weight, down, up = random_tensors(33, (6, 6), (4, 6), (6, 4))
    return weight, down, up, 16.0


def _merge_and_look(candidate, weight, down, up, *arguments):
    """The merged weight, and what has become of what was given."""
    before = down.clone(), up.clone()
    return {"merged": candidate(weight, down, up, *arguments), "the weight that was given": weight,
            "down and up as they were": torch.equal(down, before[0]) and torch.equal(up, before[1])}


def _merges(scale=None, product=None, signed=True, in_place=False):
    def merged(weight, down, up, alpha, sign=1):
        s = scale(alpha, down, up) if scale else alpha / down.shape[0]
        change = s * (product(down, up) if product else up @ down)
        change = sign * change if signed else change
        if in_place:
            weight += change
            return weight
        return weight + change
    return merged


def _copy_returned(weight, down, up, alpha, sign=1):
    copy = weight.clone()
    weight += sign * alpha / down.shape[0] * (up @ down)
    return copy


def _adapter_scaled(weight, down, up, alpha, sign=1):
    up *= sign * alpha / down.shape[0]
    return weight + up @ down


MERGED = Exercise(
    name="merged", chapter=13, kind="bug", entry="merged",
    title="Merge, and take it out again", difficulty="medium", importance="essential", minutes=12,
    reference=_merges(), run=_merge_and_look, may_change_inputs=True,
    fixtures=(rank_two_of_a_wide_matrix, taken_out_again, a_rank_of_four),
    equivalents={
        "clone first": lambda weight, down, up, alpha, sign=1: weight.clone().add_(
            (up @ down) * (sign * alpha / up.shape[1])),
        "addmm": lambda weight, down, up, alpha, sign=1: torch.addmm(
            weight, up, down, alpha=sign * alpha / len(down)),
    },
    misconceptions=(
        Misconception("unchanged", _merges(scale=lambda a, d, u: a / u.shape[0], in_place=True),
            "Both bugs are still there. Which side of up is the rank? And whose weight does the last "
            "step change?"),
        Misconception("only the weight repaired", _merges(scale=lambda a, d, u: a / u.shape[0]),
            "The old weight is left alone now. But the change is divided by the wrong side of up: the "
            "rank is the narrow one."),
        Misconception("only the scale repaired", _merges(in_place=True),
            "The scale is right now. But the weight that was given is written into, so a second call "
            "adds the change once more."),
        Misconception("inputs taken for the rank", _merges(scale=lambda a, d, u: a / d.shape[1]),
            "The change is divided by the number of inputs. The rank is the other side of down."),
        Misconception("alpha alone", _merges(scale=lambda a, d, u: a),
            "The change is too large by the rank. Its factor is alpha over rank."),
        Misconception("rank over alpha", _merges(scale=lambda a, d, u: len(d) / a),
            "The scale is not alpha over rank: it is upside down, or has a root.",
            also=[_merges(scale=lambda a, d, u: a / len(d) ** 0.5)]),
        Misconception("the change alone", lambda weight, down, up, alpha, sign=1: sign * alpha / len(down)
                      * (up @ down),
            "This is the change alone. A new weight is the old one plus the change."),
        Misconception("sign forgotten", _merges(signed=False),
            "Taking out adds once more. The sign belongs to the change."),
        Misconception("sign of everything",
            lambda weight, down, up, alpha, sign=1: sign * (weight + alpha / len(down) * (up @ down)),
            "Taking out turns the sign of the weight as well. The sign belongs to the change alone."),
        Misconception("adapter written into", _adapter_scaled,
            "The merged weight is right, but down or up was multiplied in place: the next call scales it once "
            "more."),
        Misconception("the copy returned, the original changed", _copy_returned,
            "The copy comes back without the change, and the old weight has it. Change the copy."),
    ),
    hints=(
        Hint("I do not know where to start",
             "up is (out, r) and down is (r, in). Which two of these four numbers are the rank?"),
        Hint("Merged and beside differ",
             "The change is alpha over rank, times up times down. In the cell above the rank is 2, and "
             "up has 5 rows."),
        Hint("The weight changes",
             "A sum with + makes a new tensor; += writes into the old one."),
    ),
    praise="In and out again, as often as you like.",
)


# ---------------------------------------------------------------- 5: nats of an answer


def rows_of_unequal_answers():
    logits = random_tensor(41, 4, 7, 11, scale=2.0)
    chance = torch.Generator().manual_seed(42)
    targets = torch.randint(11, (4, 7), generator=chance)
    targets[0, :3], targets[1, :5], targets[1, 6] = IGNORE, IGNORE, IGNORE
    targets[2, 0] = IGNORE
    targets[3, 2:5] = IGNORE
    return logits, targets


def a_row_without_an_answer():
    logits, targets = rows_of_unequal_answers()
    targets = targets.clone()
    targets[2] = IGNORE
    return 3 * logits.flip(0), targets


def large_logits():
    logits, targets = rows_of_unequal_answers()
    return 90 * logits, targets


def _nats(mean="own", log=None, clamp=True, shift=0, keep=None, sign=-1):
    def answer_nats(logits, targets):
        counted = targets != IGNORE
        log_probs = log(logits) if log else logits.log_softmax(-1)
        if shift:
            log_probs, targets, counted = log_probs[:, :-1], targets[:, 1:], counted[:, 1:]
        said = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        used = torch.ones_like(said) if keep == "all" else counted.float()
        nats = sign * (said * used).sum(-1)
        number = counted.sum(-1)
        if mean == "own":
            return nats / number.clamp(min=1)
        if mean == "bare":
            return nats / number
        if mean == "columns":
            return nats / targets.shape[1]
        if mean == "everybody's":
            return nats / number.sum()
        return nats
    return answer_nats


def _log_of_the_mean(logits, targets):
    mean = -_nats(log=lambda x: x.softmax(-1))(logits, targets)
    return torch.where((targets == IGNORE).all(-1), 0.0, -mean.log())


def _nats_by_loop(logits, targets):
    out = []
    for row, aims in zip(logits, targets):
        places = (aims != IGNORE).nonzero().flatten()
        each = [-row[t].log_softmax(0)[aims[t]] for t in places]
        out.append(torch.stack(each).mean() if each else torch.tensor(0.0))
    return torch.stack(out)


def _nats_by_cross_entropy(logits, targets):
    each = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    return each.sum(1) / (targets != IGNORE).sum(1).clamp(min=1)


ANSWER_NATS = Exercise(
    name="answer_nats", chapter=13, kind="function", entry="answer_nats",
    title="Nats of an answer", difficulty="medium", importance="essential", minutes=14,
    reference=_nats(), tolerance=1e-4,
    fixtures=(rows_of_unequal_answers, a_row_without_an_answer, large_logits),
    equivalents={"loop": _nats_by_loop, "cross_entropy": _nats_by_cross_entropy},
    misconceptions=(
        Misconception("shifted again", _nats(shift=1),
            "Each target is scored by the prediction one step before. The rows are shifted already: "
            "logits and targets of one column belong together."),
        Misconception("sum instead of mean", _nats(mean="sum"),
            "These are sums, so long answers look unlikely. Divide by the number of counted targets."),
        Misconception("over all columns", _nats(mean="columns"),
            "The sum was divided by all columns. Ignored targets do not count."),
        Misconception("divided by everybody's targets", _nats(mean="everybody's"),
            "Each row was divided by the counted targets of all rows together. A row has its own number."),
        Misconception("one number for all", lambda logits, targets: F.cross_entropy(
                logits.flatten(0, 1), targets.flatten()),
            "This is one mean for all rows together. Each row has its own."),
        Misconception("0 / 0", _nats(mean="bare"),
            "A row without any target gives 0 / 0. It should get 0."),
        Misconception("prompt counted", _nats(keep="all"),
            "Ignored targets are in the sum, as if they were token 0. Leave them out."),
        Misconception("prompt counted in sum and number", _nats(keep="all", mean="columns"),
            "Ignored targets count like token 0, in the sum as well as in the number. Leave them out of "
            "both."),
        Misconception("IGNORE looked up", lambda logits, targets: -logits.log_softmax(-1).gather(
                -1, targets[..., None])[..., 0].sum(-1),
            "IGNORE is -100, and no vocabulary has such a place. Look up a legal number there, and "
            "leave it out of the sum."),
        Misconception("token 0 left out", lambda logits, targets: _nats()(
                logits, targets.masked_fill(targets == 0, IGNORE)),
            "Token 0 is left out as if it were IGNORE. It is a token like any other."),
        Misconception("probabilities", _nats(log=lambda x: x.softmax(-1)),
            "Probabilities were averaged. Nats are minus their logarithms."),
        Misconception("logarithm of the mean", _log_of_the_mean,
            "The probabilities were averaged before the logarithm. Take the logarithm of each, then the mean."),
        Misconception("log of softmax", _nats(log=lambda x: x.softmax(-1).log()),
            "Very unlikely tokens give infinity: their probability was rounded to 0 before the "
            "logarithm. Take the logarithm of the softmax in one step."),
        Misconception("logits as they are", _nats(log=lambda x: x),
            "Logits are not logarithms of probabilities yet: they do not sum to 1. A log-softmax over "
            "the vocabulary is missing."),
        Misconception("softmax over positions", _nats(log=lambda x: x.log_softmax(1)),
            "The softmax runs over positions. Probabilities belong to the vocabulary, the last axis."),
        Misconception("sign lost", _nats(sign=1),
            "The numbers are negative. Nats are minus the logarithm of the probability."),
    ),
    hints=(
        Hint("I do not know where to start",
             "One row, one counted target, p = 0.5: how many nats? And with two such targets?"),
        Hint("How do I get ln p of the targets?",
             "log_softmax over the last axis, then gather at the targets. -100 is no index: clamp it "
             "to 0 first, and leave it out after."),
        Hint("A row gives nan or the wrong mean",
             "Multiply by the mask, sum over the last axis, and divide by the row's own number of "
             "counted targets, at least 1."),
    ),
    praise="That is how a benchmark lets a model choose.",
)


# ---------------------------------------------------------------- 6: a score and its uncertainty


def two_kinds_of_unequal_size():
    return ({"who": [True] * 17 + [False] * 3, "where": [True, False, True, False, False]},)


def three_right_of_four():
    return ({"who": [True, True], "end": [True, False]},)


def all_right():
    return ({"who": [True] * 9, "where": [True] * 2, "untold": [True]},)


def none_right_of_thirty():
    return ({"who": [False] * 21, "where": [False] * 9},)


def seven_right_of_thirty():
    return ({"who": [True, False, False] * 5 + [False] * 6, "where": [True, True] + [False] * 7},)


def _overalls(share=None, size=None, z=1.96, middle=None, spread=None, below=None, clip=False, scale=1):
    def overall(marks):
        answers = [mark for kind in marks.values() for mark in kind]
        n = size(marks) if size else len(answers)
        p = share(marks) if share else sum(answers) / len(answers)
        center = middle(p, n) if middle else p + z * z / (2 * n)
        wide = spread(p, n) if spread else z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        whole = below(n) if below else 1 + z * z / n
        low, high = (center - wide) / whole, (center + wide) / whole
        if clip:
            low, high = max(0.0, low), min(1.0, high)
        return scale * p, scale * low, scale * high
    return overall


def _kind_means(marks):
    return sum(sum(m) / len(m) for m in marks.values()) / len(marks)


OVERALL = Exercise(
    name="overall", chapter=13, kind="function", entry="overall",
    title="A score and its uncertainty", difficulty="medium", importance="essential", minutes=14,
    reference=_overalls(), tolerance=1e-4,
    fixtures=(two_kinds_of_unequal_size, three_right_of_four, all_right, none_right_of_thirty,
              seven_right_of_thirty),
    equivalents={"clipped to 0 and 1": _overalls(clip=True)},
    misconceptions=(
        Misconception("mean of the kinds' means", _overalls(share=_kind_means),
            "This is the mean of the kinds' shares: a question of a rare kind counts more. Put all "
            "questions together first."),
        Misconception("n is the number of kinds", _overalls(size=len),
            "The interval is far too wide: n is the number of questions, not of kinds."),
        Misconception("the simple interval", _overalls(middle=lambda p, n: p,
                spread=lambda p, n: 1.96 * (p * (1 - p) / n) ** 0.5, below=lambda n: 1.0),
            "With all answers right this interval has no width at all. Wilson's formula has more terms, "
            "in the middle and under the root."),
        Misconception("n once under the root",
            _overalls(spread=lambda p, n: 1.96 * (p * (1 - p) / n + 1.96**2 / (4 * n)) ** 0.5),
            "The interval is far too wide: under the root, the second term is divided by n twice."),
        Misconception("products not in brackets", _overalls(middle=lambda p, n: p + 1.96**2 / 2 * n,
                spread=lambda p, n: 1.96 * (p * (1 - p) / n + 1.96**2 / 4 * n**2) ** 0.5),
            "The ends lie far outside 0 and 1: after a division n multiplies. What stands below a line "
            "needs brackets.", also=[_overalls(middle=lambda p, n: p + 1.96**2 / 2 * n)]),
        Misconception("z not squared in the middle", _overalls(middle=lambda p, n: p + 1.96 / (2 * n)),
            "The interval lies a little too low: in the middle, too, z is squared."),
        Misconception("only the root divided", _overalls(middle=lambda p, n: (p + 1.96**2 / (2 * n))
                                                         * (1 + 1.96**2 / n)),
            "Only the part with the root is divided at the end. The middle is above that line, too."),
        Misconception("only the middle divided",
            _overalls(spread=lambda p, n: 1.96 * (p * (1 - p) / n + 1.96**2 / (4 * n * n)) ** 0.5
                      * (1 + 1.96**2 / n)),
            "Only the middle is divided at the end. The part with the root is above that line, too."),
        Misconception("z before the root forgotten",
            _overalls(spread=lambda p, n: (p * (1 - p) / n + 1.96**2 / (4 * n * n)) ** 0.5),
            "The interval is about half as wide as it should be: the root is multiplied by z."),
        Misconception("middle for the share", lambda marks: (
                (sum(_overalls()(marks)[1:]) / 2), *_overalls()(marks)[1:]),
            "The first number is the middle of the interval. The share is right ones over all."),
        Misconception("share rounded", _overalls(share=lambda marks: round(
                sum(map(sum, marks.values())) / sum(map(len, marks.values())), 2)),
            "The share was rounded. Round what is printed, not what is reckoned with."),
        Misconception("the kinds' intervals averaged", lambda marks: tuple(
                sum(ends) / len(marks) for ends in zip(*(_overalls()({"": m}) for m in marks.values()))),
            "The kinds' intervals were averaged. More questions make a narrower one: put all of them "
            "together first."),
        Misconception("not divided at the end", _overalls(below=lambda n: 1.0),
            "The interval lies too high: everything is divided by 1 + z² / n at the end."),
        Misconception("in percent", _overalls(scale=100),
            "These are percent. Return shares, from 0 to 1.",
            also=[lambda marks: (100 * _overalls()(marks)[0], *_overalls()(marks)[1:])]),
        Misconception("plus and minus exchanged",
            lambda marks: tuple(_overalls()(marks)[i] for i in (0, 2, 1)),
            "The ends are exchanged: first the share, then the low end, then the high one."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Two kinds, 20 and 5 questions. What is n? And the share, if 17 and 2 are right?"),
        Hint("My share is right, the interval is not",
             "Three parts: p + z²/(2n); z times the root of p(1-p)/n + z²/(4n²); and both over 1 + z²/n."),
        Hint("The example does not come out",
             "p = 0.75, n = 4, z = 1.96: the middle is 1.2302, the spread 0.6447, the divisor 1.9604."),
    ),
    praise="Now a score says how far off it may be.",
)


# ---------------------------------------------------------------- 7: your own house style


def _asked(seed: int, repeat: bool) -> list[Question]:
    rng = Random(seed)
    tales = [ask(rng, kind, "en") for kind in ("who", "person", "where", "who", "where", "person", "who")]
    if not repeat:
        return tales
    title, (_, rest) = tales[6].told.split("\n")[0], tales[2].told.split("\n", 1)
    tales[2] = replace(tales[2], told=f"{title}\n{rest}")                    # another tale of the same title
    again = [Question("where", "en", "Where is Nora?", "At school.", tales[n].told) for n in (5, 1, 6)]
    return [again[0], tales[6], again[1], *tales, again[2]]


def tales_that_come_back():
    return _asked(51, True), 4


def one_question_in_the_examination():
    return _asked(52, True), 1


def nothing_shared():
    return _asked(53, False), 2


def a_tale_that_begins_another():
    asked = _asked(54, False)
    for inner, outer in ((0, 6), (5, 1)):              # one to learn from, one of the examination
        longer = f"{asked[inner].told}\n{asked[outer].told}"
        asked[outer] = replace(asked[outer], told=longer)
    return asked, 2


def _splits(exam=None, rest=None, key=None):
    def split(asked, n):
        last = exam(asked, n) if exam else asked[-n:]
        others = rest(asked, n) if rest else asked[:-n]
        take = key or (lambda q: q.told)
        seen = {take(q) for q in last}
        return [q for q in others if take(q) not in seen], last
    return split


def _split_while_looping(asked, n):
    learn, exam = asked[:-n], asked[-n:]
    for question in learn:
        if question.told in {q.told for q in exam}:
            learn.remove(question)
    return learn, exam


def _split_by_loop(asked, n):
    learn, exam = [], list(asked[len(asked) - n:])
    for question in asked[:len(asked) - n]:
        if all(question.told != other.told for other in exam):
            learn.append(question)
    return learn, exam


def _split_by_parts(same):
    def split(asked, n):
        exam = asked[-n:]
        return [q for q in asked[:-n] if not any(same(q.told, other.told) for other in exam)], exam
    return split


SPLIT = Exercise(
    name="split", chapter=13, kind="open", entry="split",
    title="Your own house style", difficulty="medium", importance="useful", minutes=25,
    reference=_splits(),
    fixtures=(tales_that_come_back, one_question_in_the_examination, nothing_shared,
              a_tale_that_begins_another),
    equivalents={"loop": _split_by_loop},
    misconceptions=(
        Misconception("tales not looked at", lambda asked, n: (asked[:-n], asked[-n:]),
            "A tale of the examination is among those to learn from. Leave such questions out."),
        Misconception("whole questions compared", _splits(key=lambda q: q),
            "Another question about a tale of the examination is still learned from. Compare the "
            "tales, not the questions."),
        Misconception("words compared", _splits(key=lambda q: q.asked),
            "The words of the questions were compared. Other tales are asked about in the same words: compare "
            "the tales."),
        Misconception("titles compared", _splits(key=lambda q: q.told.split("\n")[0]),
            "The titles were compared. Two tales may have one title: compare all that is told."),
        Misconception("one tale inside another", _split_by_parts(lambda mine, theirs: mine in theirs),
            "A tale that is only the beginning of another one counted as the same. Two tales are the "
            "same if they are equal.",
            also=[_split_by_parts(lambda mine, theirs: theirs in mine),
                  _split_by_parts(lambda mine, theirs: mine in theirs or theirs in mine)]),
        Misconception("first instead of last",
            _splits(exam=lambda a, n: a[:n], rest=lambda a, n: a[n:]),
            "The examination took the first questions. It is the last n."),
        Misconception("exchanged", lambda asked, n: _splits()(asked, n)[::-1],
            "The two lists are exchanged: first what is learned from, then the examination."),
        Misconception("examination left in", lambda asked, n: (asked, asked[-n:]),
            "The examination itself is among what is learned from. Take its questions out, and all "
            "others about its tales."),
        Misconception("taken out of the examination",
            lambda asked, n: (asked[:-n], [q for q in asked[-n:]
                                           if q.told not in {o.told for o in asked[:-n]}]),
            "The examination lost questions. It stays whole; what is learned from gives way."),
        Misconception("removed while looping", _split_while_looping,
            "Of two neighbours that had to go one stayed: the list was changed while a loop went through it. "
            "Build a new list."),
        Misconception("the rest kept", lambda asked, n: (
                [q for q in asked[:-n] if q.told in {o.told for o in asked[-n:]}], asked[-n:]),
            "What is left to learn from is just what had to go: the tales of the examination."),
        Misconception("one question a tale", lambda asked, n: (
                _splits()(asked, n)[0], list({q.told: q for q in asked[-n:]}.values())),
            "The examination has one question for each tale now. It is the last n, whole: two may share a tale."),
        Misconception("order lost", lambda asked, n: tuple(
                sorted(part, key=lambda q: q.prompt) for part in _splits()(asked, n)),
            "The questions are there, in another order. Keep the order they came in.",
            also=[lambda asked, n: (_splits()(asked, n)[0], asked[:-n - 1:-1])]),
    ),
    hints=(
        Hint("I do not know where to start", "With ten questions and n = 3: which are the examination?"),
        Hint("Something is still shared",
             "Collect the tales of the examination in a set: question.told of each. Then go through the "
             "others and keep those whose tale is not in it."),
        Hint("The shape of the answer",
             "Two lists, in a tuple: learn, exam. Slices with -n take the end."),
    ),
    praise="What it learned from and what it is asked are apart.",
)

EXERCISES = [ANSWER_ROWS, LORA_LINEAR, CHAT_IDS, TUNING_IN_ORDER, ADAPTER_SIZE, MERGED, ANSWER_NATS,
             OVERALL, SPLIT]
