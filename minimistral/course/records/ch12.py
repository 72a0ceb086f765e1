"""Chapter 12, quantization: its three core pieces and its exercises."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from minimistral.config import ModelConfig
from minimistral.model import Transformer
from minimistral.quantize import dequantize, pack, quantize, unpack

from ..exercises import Exercise, Hint, Misconception


def _weight(seed: int, *shape: int) -> Tensor:
    """Rows of different size, means that are not zero, no two weights alike."""
    chance = torch.Generator().manual_seed(seed)
    rows = 0.2 + 2 * torch.rand((*shape[:-1], 1), generator=chance)
    return rows * torch.randn(shape, generator=chance) + 0.07


# ---------------------------------------------------------------- piece: quantize


def five_rows_in_groups_of_eight():
    return _weight(1, 5, 24), 4, 8


def a_scale_for_each_row_in_8_bits():
    return _weight(2, 7, 20) / 16, 8, None      # some scales are below 0.001, as in real models


def three_bits_a_group_of_zeros_and_an_outlier():
    weight = _weight(3, 6, 32)
    weight[2, 8:16] = 0.0
    weight[4] = 0.0
    weight[1, 19] = -60.0
    return weight, 3, 8


def weights_in_bfloat16():
    return _weight(6, 9, 12).bfloat16(), 5, 4   # no group is all negative


def _quantizes(most=None, absmax=None, scale=None, turn=None, cut=None, dtype=torch.int8, order=1):
    """quantize with one step exchanged."""
    def quantize(weight, bits, group=None):
        top = most(bits) if most else 2 ** (bits - 1) - 1
        groups = cut(weight.float(), group) if cut else (
            weight.float().unflatten(1, (-1, group or weight.shape[1])))
        peak = absmax(groups) if absmax else groups.abs().amax(-1)
        scales = scale(peak / top) if scale else (peak / top).bfloat16()
        steps = groups / scales.float().clamp(min=1e-30)[..., None]
        numbers = turn(steps, top) if turn else steps.round().clamp(-top, top)
        numbers = numbers.to(dtype).reshape(weight.shape)
        return (numbers, scales.reshape(len(weight), -1))[::order]
    return quantize


def _quantize_by_loops(weight, bits, group=None):
    group = group or weight.shape[1]
    most = 2 ** (bits - 1) - 1
    numbers = torch.zeros(weight.shape, dtype=torch.int8)
    scales = torch.zeros(len(weight), weight.shape[1] // group, dtype=torch.bfloat16)
    for i in range(len(weight)):
        for g in range(scales.shape[1]):
            part = weight[i, g * group:(g + 1) * group].float()
            scales[i, g] = part.abs().max() / most
            if scales[i, g] > 0:
                steps = torch.round(part / scales[i, g].float())
                numbers[i, g * group:(g + 1) * group] = steps.clamp(-most, most).to(torch.int8)
    return numbers, scales


def _quantize_by_view(weight, bits, group=None):
    w = weight.float().contiguous()
    w = w.view(w.shape[0], -1, group or w.shape[1])
    top = 2 ** (bits - 1) - 1
    scales = (torch.maximum(w.amax(-1), -w.amin(-1)) / top).to(torch.bfloat16)
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    numbers = torch.round(w / safe.unsqueeze(-1)).clip(-top, top)
    return numbers.flatten(1).char(), scales


def _quantize_by_repeat(weight, bits, group=None):
    group = group or weight.shape[1]
    w, top = weight.float(), 2 ** (bits - 1) - 1
    scales = torch.stack([part.abs().amax(1) for part in w.split(group, dim=1)], 1)
    scales = (scales / top).bfloat16()
    wide = scales.float().repeat_interleave(group, dim=1)
    numbers = torch.nan_to_num(w / wide, nan=0.0).round().clamp(-top, top)
    return numbers.to(torch.int8), scales


def _quantize_without_the_last_clamp(weight, bits, group=None):
    numbers, scales = _quantizes(turn=lambda s, top: s.round())(weight, bits, group)
    return numbers, scales


def _nan_for_zeros(weight, bits, group=None):
    most = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    scales = (groups.abs().amax(-1) / most).bfloat16()
    steps = (groups / scales.float()[..., None]).round()
    numbers = torch.where(steps.isnan(), torch.full_like(steps, -128), steps).to(torch.int8)
    return numbers.flatten(1), scales


def _interleaved(weight, group):
    count = weight.shape[1] // (group or weight.shape[1])
    return weight.unflatten(1, (-1, count)).transpose(1, 2)


def _dequantized_instead(weight, bits, group=None):
    numbers, scales = quantize(weight, bits, group)
    return dequantize(numbers, scales), scales


def _over_the_groups(weight, bits, group=None):
    most = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    scales = (groups.abs().amax(1) / most).bfloat16()                    # (out, group)
    numbers = (groups / scales.float().clamp(min=1e-30)[:, None]).round()
    return numbers.to(torch.int8).flatten(1), scales


def _over_the_rows(weight, bits, group=None):
    most = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    scales = (groups.abs().amax(0) / most).bfloat16()                    # (groups, group)
    numbers = (groups / scales.float().clamp(min=1e-30)).round()
    return numbers.to(torch.int8).flatten(1), scales


def _over_the_groups_as_columns(weight, bits, group=None):
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    scales = groups.abs().amax(1) / (2 ** (bits - 1) - 1)
    return groups / scales[..., None], scales


def _group_as_their_number(weight, bits, group=None):
    return quantize(weight, bits, weight.shape[1] // group if group else None)


def _half_of_the_range(groups):
    return (groups.amax(-1) - groups.amin(-1)) / 2


def _as_neighbours_in_a_column(weight, bits, group=None):
    groups = weight.float().unflatten(1, (group or weight.shape[1], -1))
    scales = (groups.abs().amax(1) / (2 ** (bits - 1) - 1)).bfloat16()
    numbers = (groups / scales.float().clamp(min=1e-30)[:, None]).round()
    return numbers.to(torch.int8).flatten(1), scales


def _one_for_all_without_groups(weight, bits, group=None):
    if group:
        return quantize(weight, bits, group)
    scale = (weight.float().abs().max() / (2 ** (bits - 1) - 1)).bfloat16()
    return (weight.float() / scale.float()).round().to(torch.int8), scale


def _weights_rounded(weight, bits, group=None):
    scales = quantize(weight, bits, group)[1]
    steps = scales.float().clamp(min=1e-30)[..., None]
    groups = weight.float().unflatten(1, (scales.shape[1], -1)).round() / steps
    return groups.to(torch.int8).flatten(1), scales


def _steps_for_a_weight(weight, bits, group=None):
    most = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    scales = (most / groups.abs().amax(-1).clamp(min=1e-30)).bfloat16()
    return (groups * scales.float()[..., None]).round().to(torch.int8).flatten(1), scales


def _divided_in_turn(weight, bits, group=None):
    scales = quantize(weight, bits, group)[1]
    steps = scales.float().clamp(min=1e-30).repeat(1, weight.shape[1] // scales.shape[1])
    return (weight.float() / steps).round().to(torch.int8), scales


def _divisor_at_least(least):
    def quantize(weight, bits, group=None):
        scales = _quantizes()(weight, bits, group)[1]
        groups = weight.float().unflatten(1, (scales.shape[1], -1))
        steps = (groups / scales.float().clamp(min=least)[..., None]).round()
        return steps.to(torch.int8).flatten(1), scales
    return quantize


def _by_column(weight, bits, group=None):
    most = 2 ** (bits - 1) - 1
    scales = (weight.float().abs().amax(0) / most).bfloat16()
    numbers = (weight.float() / scales.float().clamp(min=1e-30)).round().clamp(-most, most)
    return numbers.to(torch.int8), scales[None]


def _one_for_all(weight, bits, group=None):
    most = 2 ** (bits - 1) - 1
    scale = (weight.float().abs().max() / most).bfloat16()
    numbers = (weight.float() / scale.float()).round().clamp(-most, most)
    shape = len(weight), weight.shape[1] // (group or weight.shape[1])
    return numbers.to(torch.int8), scale.expand(shape).clone()


def _multiplied(weight, bits, group=None):
    scales, most = quantize(weight, bits, group)[1], 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]
    return groups.round().clamp(-most, most).to(torch.int8).flatten(1), scales


def _group_first(weight, bits, group=None):
    most = 2 ** (bits - 1) - 1
    columns = weight.float().reshape(group or weight.shape[1], -1)
    scales = (columns.abs().amax(0) / most).bfloat16()
    numbers = (columns / scales.float().clamp(min=1e-30)).round().clamp(-most, most)
    return numbers.to(torch.int8).reshape(weight.shape), scales.reshape(len(weight), -1)


def _in_its_own_dtype(weight, bits, group=None, clamp=True):
    most = 2 ** (bits - 1) - 1
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    scales = (groups.abs().amax(-1) / most).bfloat16()
    numbers = (groups / scales.clamp(min=1e-30)[..., None]).round()
    numbers = numbers.clamp(-most, most) if clamp else numbers
    return numbers.to(torch.int8).flatten(1), scales


def _down_the_columns(weight, bits, group=None):
    most = 2 ** (bits - 1) - 1
    groups = weight.float().T.reshape(-1, group or weight.shape[1])
    scales = (groups.abs().amax(-1, keepdim=True) / most).bfloat16()
    numbers = (groups / scales.float().clamp(min=1e-30)).round().clamp(-most, most)
    return numbers.to(torch.int8).reshape(weight.T.shape).T, scales.reshape(len(weight), -1)


QUANTIZE = Exercise(
    name="quantize", chapter=12, kind="piece", piece="quantize.quantize", entry="quantize",
    title="Whole numbers and scales", difficulty="medium", importance="essential", minutes=9,
    reference=quantize,
    fixtures=(five_rows_in_groups_of_eight, a_scale_for_each_row_in_8_bits,
              three_bits_a_group_of_zeros_and_an_outlier, weights_in_bfloat16),
    equivalents={
        "loops": _quantize_by_loops, "view and where": _quantize_by_view,
        "split and repeat": _quantize_by_repeat, "unflatten": _quantizes(),
    },
    misconceptions=(
        Misconception("cut off instead of rounded",
            _quantizes(turn=lambda s, top: s.clamp(-top, top)),
            "Weights are pulled towards zero: turning floats into integers cuts off what is "
            "behind the point. Round first."),
        Misconception("rounded down",
            _quantizes(turn=lambda s, top: s.floor().clamp(-top, top)),
            "Every weight goes to the step below, and small negative ones become -1. Take the "
            "nearest step.",
            also=[_quantizes(turn=lambda s, top: s.floor())]),
        Misconception("a half added, then cut off", _quantizes(turn=lambda s, top: s + 0.5),
            "Weights above zero are right, those below come out a step too high: cutting off goes "
            "towards zero. Take a function that rounds."),
        Misconception("rounded before dividing", _weights_rounded,
            "The weights were rounded to whole numbers, not their steps. Divide by the scale first, "
            "then round."),
        Misconception("the largest number of 4 bits", _quantizes(most=lambda bits: 7),
            "Right in 4 bits only: the largest whole number was fixed at 7. It follows from the "
            "bits; with 8 it is 127."),
        Misconception("a hat for a power", _quantizes(most=lambda bits: 2 ^ (bits - 1) - 1),
            "The largest number is wrong: Python's hat is no power, it compares the bits of two "
            "numbers. A power has two stars.",
            also=[_quantizes(most=lambda bits: (2 ^ (bits - 1)) - 1)]),
        Misconception("one number too many", _quantizes(most=lambda bits: 2 ** (bits - 1)),
            "The largest whole number is too large by one, and one side is clipped. With 4 "
            "bits it is 7: as many above zero as below."),
        Misconception("no bit for the sign", _quantizes(most=lambda bits: 2**bits - 1),
            "The whole numbers need a bit more than there is. One of the bits is the sign: "
            "with 4 bits the largest number is 7."),
        Misconception("largest without its sign",
            _quantizes(absmax=lambda groups: groups.amax(-1)),
            "A group whose largest weight is negative gets too small a scale. Take the absolute "
            "values before the maximum.",
            also=[_quantizes(absmax=lambda groups: groups.amax(-1), turn=lambda s, top: s.round()),
                  _quantizes(absmax=lambda groups: groups.amax(-1).abs()),
                  _quantizes(absmax=lambda groups: groups.amax(-1).abs(),
                             turn=lambda s, top: s.round())]),
        Misconception("half of the range", _quantizes(absmax=_half_of_the_range),
            "The scale comes from the distance between the smallest and the largest weight. Here "
            "zero stays zero: take the largest absolute value.",
            also=[_quantizes(absmax=_half_of_the_range, turn=lambda s, top: s.round())]),
        Misconception("the largest as the scale", _quantizes(
                scale=lambda s: s.bfloat16(), most=lambda bits: 1),
            "The scale is the largest weight itself. One step is that weight over the largest "
            "whole number.",
            also=[lambda weight, bits, group=None: (
                quantize(weight, bits, group)[0], _quantizes(most=lambda bits: 1)(
                    weight, bits, group)[1])]),
        Misconception("steps for a weight", _steps_for_a_weight,
            "Your scale says how many steps a weight of 1 has. It is the other way round: the length "
            "of one step, largest weight over largest number."),
        Misconception("absmax over the wrong axis", _by_column,
            "There is a scale for each column. The weights of one row, or of a group in it, "
            "share a scale: reduce the last axis.",
            also=[_over_the_rows]),
        Misconception("maximum over the groups", _over_the_groups,
            "The maximum runs over the groups of a row, not within one. The axes are rows, groups, "
            "weights of a group: reduce the last.",
            also=[_over_the_groups_as_columns]),
        Misconception("one scale for the whole matrix", _one_for_all,
            "Rows share one scale, and the small rows are lost. Each group has its own; without "
            "groups, each row.",
            also=[_one_for_all_without_groups]),
        Misconception("group forgotten",
            lambda weight, bits, group=None: quantize(weight, bits, None),
            "There is one scale for each row, whatever the group. Cut the row into groups "
            "before you take the maximum.",
            also=[lambda weight, bits, group=None: (
                quantize(weight, bits, None)[0], quantize(weight, bits, None)[1].expand(
                    -1, weight.shape[1] // (group or weight.shape[1])).clone())]),
        Misconception("groups that are not neighbours", _quantizes(cut=_interleaved),
            "Your groups take every n-th weight. A group is neighbours in a row: the groups' axis "
            "comes before the axis within a group.",
            also=[_as_neighbours_in_a_column]),
        Misconception("group as the number of groups", _group_as_their_number,
            "Each row was cut into as many groups as one group has weights. The number given is the "
            "size of a group."),
        Misconception("scale used before it was rounded",
            lambda weight, bits, group=None: (
                _quantizes(scale=lambda s: s)(weight, bits, group)[0],
                quantize(weight, bits, group)[1]),
            "Some numbers differ by one. Divide by the scale as it is stored, after its "
            "rounding to bfloat16."),
        Misconception("largest rounded, then divided",
            lambda weight, bits, group=None: (
                _quantizes(absmax=lambda g: g.abs().amax(-1).bfloat16())(weight, bits, group)),
            "A few scales and numbers differ a little: the largest weight was rounded to bfloat16. "
            "Divide by the largest number first, then round the scale."),
        Misconception("scales in float32", _quantizes(scale=lambda s: s),
            "The scales are float32. They are stored in bfloat16, and used as they are stored."),
        Misconception("zeros divided by zero", _nan_for_zeros,
            "A group of zeros has scale 0, and 0 / 0 is not a number. Keep the divisor above 0."),
        Misconception("weights instead of numbers", _dequantized_instead,
            "The first result is weights again. Return the whole numbers, before they are "
            "multiplied by the scale."),
        Misconception("the two exchanged", _quantizes(order=-1),
            "Two results in the other order: whole numbers first, then scales."),
        Misconception("multiplied by the scale", _multiplied,
            "Nearly all numbers are 0 or far too large: the weights were multiplied by the "
            "scale. How many steps fit into a weight? Divide."),
        Misconception("scales with an axis too many", lambda weight, bits, group=None: (
                quantize(weight, bits, group)[0], quantize(weight, bits, group)[1][..., None]),
            "The numbers are right, the scales have an axis too many: one column for each group, "
            "and no more."),
        Misconception("scales of all rows in a line", lambda weight, bits, group=None: (
                quantize(weight, bits, group)[0], quantize(weight, bits, group)[1].flatten()),
            "The numbers are right, the scales have lost their rows. They have a row for each output, "
            "a column for each group.",
            also=[lambda weight, bits, group=None: (
                quantize(weight, bits, group)[0], quantize(weight, bits, group)[1].view(-1, 1))]),
        Misconception("scales taken in turn", _divided_in_turn,
            "The scales are right, but weights were divided by those of other groups. All of a group "
            "come first, then the next one's scale."),
        Misconception("groups not joined", lambda weight, bits, group=None: (
                quantize(weight, bits, group)[0].unflatten(1, (-1, group or weight.shape[1])),
                quantize(weight, bits, group)[1]),
            "The numbers still have an axis for the groups. Join it: the shape is that of the "
            "weight."),
        Misconception("groups down the columns", _down_the_columns,
            "Your groups run down the columns, through several rows. A group lies within one row: "
            "cut the matrix without turning it."),
        Misconception("group as the number of rows", _group_first,
            "Weights that share a scale are not neighbours. The last axis has to be the group: "
            "rows, groups, weights of a group."),
        Misconception("a scale for zeros", _quantizes(
                scale=lambda s: s.clamp(min=1e-8).bfloat16()),
            "A group of zeros is stored with a scale above 0. Its scale is 0; keep only the divisor "
            "above 0.",
            also=[_quantizes(scale=lambda s: torch.where(s == 0, 1.0, s).bfloat16())]),
        Misconception("a divisor too large", _divisor_at_least(1e-3),
            "Small weights become zero: what keeps a divisor above 0 is larger than their scale. "
            "Scales of 0.0001 are usual; take far less.",
            also=[_divisor_at_least(1e-2), _divisor_at_least(0.1)]),
        Misconception("divided in bfloat16", _in_its_own_dtype,
            "Some numbers differ by one: the division ran in bfloat16, whose three digits are too few "
            "to round by. Turn weights and scales into float32 first.",
            also=[lambda weight, bits, group=None: _in_its_own_dtype(weight, bits, group, False),
                  lambda weight, bits, group=None: _in_its_own_dtype(weight.bfloat16(), bits, group),
                  lambda weight, bits, group=None: _in_its_own_dtype(
                      weight.bfloat16(), bits, group, False)]),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take the row 0.7, -0.24, 3.0, 0.0 with groups of two. What are the largest absolute "
             "values, and what is one step?"),
        Hint("My shapes do not fit",
             "Give each row a new axis: (out, groups, group). The maximum over the last axis "
             "has a column for each group, and with one more axis it divides them."),
        Hint("Nearly right, but some numbers differ",
             "In this order: float32; absolute values and their maximum; divided by the largest "
             "number; bfloat16; back to float32 and at least 1e-30; divide; round; clamp; int8; "
             "flatten the groups."),
    ),
    praise="Every weight of a model is now a whole number of steps.",
)


# ---------------------------------------------------------------- pieces: pack and unpack


def numbers_of_both_signs():
    chance = torch.Generator().manual_seed(5)
    return (torch.randint(-7, 8, (3, 10), generator=chance).to(torch.int8),)


def all_sixteen_numbers():
    return (torch.stack([torch.arange(-8, 8), torch.arange(7, -9, -1)]).to(torch.int8),)


def a_single_pair():
    return (torch.tensor([[-3, 5]], dtype=torch.int8),)


def _pack_by_arithmetic(numbers):
    wide = numbers.to(torch.int32) + 8
    return (wide[:, ::2] * 16 + wide[:, 1::2]).to(torch.uint8)


def _pack_by_pairs(numbers):
    pairs = (numbers.int() + 8).unflatten(1, (-1, 2))
    return (pairs[..., 0] << 4 | pairs[..., 1]).to(torch.uint8)


def _pack_by_xor(numbers):
    halves = (numbers & 15) ^ 8
    return (halves[:, 0::2].to(torch.uint8) << 4) + halves[:, 1::2].to(torch.uint8)


def _pack_by_loop(numbers):
    rows = [[(row[i] + 8) * 16 + row[i + 1] + 8 for i in range(0, len(row), 2)]
            for row in numbers.tolist()]
    return torch.tensor(rows, dtype=torch.uint8)


def _shifted(numbers):
    return (numbers + 8).to(torch.uint8)


def _pack_halves_of_the_row(numbers):
    u, half = _shifted(numbers), numbers.shape[1] // 2
    return u[:, :half] << 4 | u[:, half:]


def _pack_rows(numbers):
    u = _shifted(numbers)
    return (u[:, 0::2] << 4 | u[:, 1::2]).flatten()


PACK = Exercise(
    name="pack", chapter=12, kind="piece", piece="quantize.pack", entry="pack",
    title="Two numbers in a byte", difficulty="easy", importance="essential", minutes=5,
    reference=pack,
    fixtures=(numbers_of_both_signs, all_sixteen_numbers, a_single_pair),
    equivalents={"times 16": _pack_by_arithmetic, "pairs": _pack_by_pairs,
                 "exclusive or": _pack_by_xor, "loop": _pack_by_loop},
    misconceptions=(
        Misconception("signs not shifted",
            lambda numbers: (numbers[:, 0::2].to(torch.uint8) << 4
                             | numbers[:, 1::2].to(torch.uint8)),
            "A negative number on the right fills the left half with ones. Add 8 first, so that "
            "no number has a sign.",
            also=[lambda numbers: numbers[:, 0::2] << 4 | numbers[:, 1::2]]),
        Misconception("two's complement kept",
            lambda numbers: (numbers[:, 0::2].to(torch.uint8) << 4
                             | numbers[:, 1::2].to(torch.uint8) & 15),
            "The halves hold negative numbers as 8 to 15. Ours are shifted by 8 instead, so "
            "that -8 becomes 0."),
        Misconception("halves exchanged",
            lambda numbers: _shifted(numbers)[:, 1::2] << 4 | _shifted(numbers)[:, 0::2],
            "The two numbers of each byte are exchanged. The first of a pair is the left half, "
            "the 16s."),
        Misconception("first half with second half", _pack_halves_of_the_row,
            "A byte holds a number of the row's first half and one of its second half. Pairs are "
            "neighbours: columns 0 and 1, 2 and 3."),
        Misconception("neighbours of two rows",
            lambda numbers: _shifted(numbers)[0::2] << 4 | _shifted(numbers)[1::2],
            "A byte holds numbers of two rows. Pairs lie within a row: even and odd columns."),
        Misconception("pairs that overlap",
            lambda numbers: _shifted(numbers)[:, :-1] << 4 | _shifted(numbers)[:, 1:],
            "Nearly every number is stored twice, once left and once right. Take every other column "
            "for each half."),
        Misconception("shifted to the right",
            lambda numbers: _shifted(numbers)[:, 0::2] >> 4 | _shifted(numbers)[:, 1::2],
            "The first numbers are gone: they were moved out of the byte. Move them to the left, by "
            "half a byte."),
        Misconception("not shifted",
            lambda numbers: _shifted(numbers)[:, 0::2] | _shifted(numbers)[:, 1::2],
            "Both numbers of a pair lie in the right half, one over the other. Move the first by "
            "half a byte to the left.",
            also=[lambda numbers: _shifted(numbers)[:, 0::2] + _shifted(numbers)[:, 1::2]]),
        Misconception("joined by and",
            lambda numbers: _shifted(numbers)[:, 0::2] << 4 & _shifted(numbers)[:, 1::2],
            "All bytes are 0: 'and' keeps only the bits that both halves have. Join them with 'or', "
            "or add them."),
        Misconception("added before shifting",
            lambda numbers: _shifted(numbers)[:, 0::2] << 4 + _shifted(numbers)[:, 1::2],
            "Python adds before it shifts, so the first numbers were moved out of the byte. Put "
            "the shift into brackets."),
        Misconception("8 added to the byte",
            lambda numbers: ((numbers[:, 0::2] << 4 | numbers[:, 1::2]) + 8).to(torch.uint8),
            "8 was added to the finished byte. Add it to every number, before two of them are "
            "joined.",
            also=[lambda numbers: (numbers[:, 0::2] * 16 + numbers[:, 1::2] + 8).to(torch.uint8)]),
        Misconception("shifted by 7",
            lambda numbers: (numbers + 7).to(torch.uint8)[:, 0::2] << 4
            | (numbers + 7).to(torch.uint8)[:, 1::2],
            "All numbers are one too small, and -8 has no place. Add 8: zero is stored as 8."),
        Misconception("one number for each byte", lambda numbers: _shifted(numbers),
            "Each number still has a byte of its own. Join neighbours: half as many columns.",
            also=[lambda numbers: torch.cat(
                      [_shifted(numbers)[:, 0::2] << 4, _shifted(numbers)[:, 1::2]], 1),
                  lambda numbers: torch.stack(
                      [_shifted(numbers)[:, 0::2] << 4, _shifted(numbers)[:, 1::2]], -1)]),
        Misconception("signed bytes",
            lambda numbers: pack(numbers).view(torch.int8),
            "The bytes are right but signed. The result is uint8."),
        Misconception("flattened", _pack_rows,
            "The rows are gone. The result has as many rows as the input and half the columns."),
    ),
    hints=(
        Hint("I do not know where to start",
             "What is stored for -3 and for 5? Write both in four bits, side by side."),
        Hint("The numbers come out wrong",
             "Add 8, turn into uint8. Columns 0, 2, 4 ... are the left halves, 1, 3, 5 ... the "
             "right ones; the left ones count sixteen times."),
        Hint("How do I take every other column?",
             "A slice with a step: [:, 0::2] and [:, 1::2]. Move the first by 4 bits with <<, "
             "join with |."),
    ),
    praise="Half a byte for a weight, and nothing is lost.",
)


def bytes_of_both_halves():
    return (pack(numbers_of_both_signs()[0]),)


def all_256_bytes():
    return (torch.arange(256).view(8, 32).to(torch.uint8),)


def a_single_byte():
    return (torch.tensor([[93]], dtype=torch.uint8),)


def _unpacks(left, right, join=None):
    def unpack(packed):
        a, b = left(packed), right(packed)
        return join(a, b) if join else torch.stack([a, b], -1).flatten(1)
    return unpack


def _high(p):
    return (p >> 4).to(torch.int8) - 8


def _low(p):
    return (p & 15).to(torch.int8) - 8


def _unpack_in_place(packed):
    out = torch.empty(len(packed), 2 * packed.shape[1], dtype=torch.int8)
    out[:, 0::2], out[:, 1::2] = _high(packed), _low(packed)
    return out


def _unpack_by_division(packed):
    wide = packed.int()
    pairs = torch.stack([torch.div(wide, 16, rounding_mode="floor"), wide % 16], dim=2)
    return (pairs - 8).reshape(len(packed), -1).to(torch.int8)


def _unpack_by_loop(packed):
    rows = [[n for byte in row for n in ((byte >> 4) - 8, byte % 16 - 8)]
            for row in packed.tolist()]
    return torch.tensor(rows, dtype=torch.int8)


UNPACK = Exercise(
    name="unpack", chapter=12, kind="piece", piece="quantize.unpack", entry="unpack",
    title="And back", difficulty="easy", importance="essential", minutes=5,
    reference=unpack,
    fixtures=(bytes_of_both_halves, all_256_bytes, a_single_byte),
    equivalents={"slices": _unpack_in_place, "division": _unpack_by_division,
                 "loop": _unpack_by_loop},
    misconceptions=(
        Misconception("8 not taken off",
            _unpacks(lambda p: (p >> 4).to(torch.int8), lambda p: (p & 15).to(torch.int8)),
            "All numbers are 8 too large and none is negative. Packing added 8; take it off.",
            also=[_unpacks(lambda p: p >> 4, lambda p: p & 15)]),
        Misconception("8 taken off one half only", _unpacks(_high, lambda p: (p & 15).to(torch.int8)),
            "One number of each pair is right, the other 8 too large. Take 8 off both halves.",
            also=[_unpacks(lambda p: (p >> 4).to(torch.int8), _low)]),
        Misconception("8 taken off the byte",
            _unpacks(lambda p: (p - 8 >> 4).to(torch.int8), lambda p: (p - 8 & 15).to(torch.int8)),
            "8 was taken off the whole byte, before it was cut. Take it off each half."),
        Misconception("7 taken off", lambda packed: unpack(packed) + 1,
            "All numbers are one too large. Packing added 8: what is stored as 8 is zero."),
        Misconception("subtracted before the half was taken",
            lambda packed: _unpacks(lambda p: p >> 4 - 8, lambda p: p & 15 - 8)(packed).to(torch.int8),
            "Python subtracts before it shifts or masks, so other bits were taken. Put the half into "
            "brackets, then subtract 8.",
            also=[_unpacks(_high, lambda p: p.to(torch.int8) & 15 - 8),
                  _unpacks(lambda p: p.to(torch.int8) >> 4 - 8, lambda p: p.to(torch.int8) & 15 - 8)]),
        Misconception("left half not moved",
            _unpacks(lambda p: (p & 240).to(torch.int8) - 8, _low),
            "The left half still counts sixteens. Move it to the right, by half a byte.",
            also=[_unpacks(lambda p: (p << 4).to(torch.int8) - 8, _low)]),
        Misconception("subtracted without a sign",
            _unpacks(lambda p: (p >> 4) - 8, lambda p: (p & 15) - 8),
            "Negative numbers come back near 250: bytes have no sign. Turn them into int8 "
            "before you subtract."),
        Misconception("halves exchanged", _unpacks(_low, _high),
            "The two numbers of each pair are exchanged. The left half, the 16s, comes first."),
        Misconception("all left halves, then all right ones",
            _unpacks(_high, _low, lambda a, b: torch.cat([a, b], 1)),
            "First come all left halves, then all right ones. The two numbers of a byte are "
            "neighbours: stack them on a new last axis, then flatten.",
            also=[_unpacks(_high, _low, lambda a, b: torch.stack([a, b]).reshape(len(a), -1))]),
        Misconception("rows doubled", _unpacks(_high, _low, lambda a, b: torch.cat([a, b], 0)),
            "There are twice as many rows. The two numbers of a byte are neighbours in a row.",
            also=[_unpacks(_high, _low, lambda a, b: torch.stack([a, b], 1).flatten(0, 1))]),
        Misconception("left half not cleared of the right",
            _unpacks(_high, lambda p: p.to(torch.int8) - 8),
            "The right half still carries the left one. Keep its four bits only, with & 15."),
        Misconception("masked with other bits", _unpacks(_high, lambda p: (p & 16).to(torch.int8) - 8),
            "The right half was masked with other bits than its own. The four right bits together "
            "are 15; 16, 8 or 7 are others.",
            also=[_unpacks(_high, lambda p: (p & 7).to(torch.int8) - 8),
                  _unpacks(_high, lambda p: (p & 8).to(torch.int8) - 8)]),
        Misconception("two's complement read",
            _unpacks(lambda p: ((p >> 4).to(torch.int8) ^ 8) - 8, lambda p: _low(p ^ 8)),
            "You read the halves as signed numbers, where 8 to 15 are negative. Ours are shifted by "
            "8: 0 is -8."),
        Misconception("kept as wide integers",
            lambda packed: unpack(packed).long(),
            "The numbers are right, but each takes 8 bytes. The result is int8."),
        Misconception("pairs on an axis of their own",
            _unpacks(_high, _low, lambda a, b: torch.stack([a, b], -1)),
            "The pairs still have an axis of their own. Join it with the columns: twice as "
            "many of them."),
        Misconception("int8 before the halves were taken",
            _unpacks(lambda p: (p.to(torch.int8) >> 4) - 8, lambda p: (p.to(torch.int8) & 15) - 8),
            "Left numbers above -1 come back below -8: as int8 the byte has a sign, which slides "
            "into the half. Take the halves first, then int8."),
        Misconception("rows lost", lambda packed: unpack(packed).flatten(),
            "The rows are gone. Join the last two axes only."),
    ),
    hints=(
        Hint("I do not know where to start",
             "The byte 93 is 5 times 16 and 13. Which two numbers were packed?"),
        Hint("My negative numbers are near 250",
             "uint8 has no sign. First take the half, with >> 4 or & 15, then int8, then "
             "subtract 8."),
        Hint("The order is wrong",
             "Stack left and right halves on a new last axis, (out, in / 2, 2), and flatten "
             "from axis 1 on."),
    ),
    praise="Packing and back: all 256 bytes survive.",
)


# ---------------------------------------------------------------- 1: scale and zero point


def rows_that_do_not_straddle_zero():
    return _weight(6, 5, 14) + torch.tensor([0.0, 4.0, -3.0, 0.5, 9.0])[:, None], 4


def a_constant_row_and_8_bits():
    weight = _weight(7, 4, 9)
    weight[1], weight[3] = 2.5, 0.0
    return weight, 8


def two_bits():
    return _weight(8, 6, 11) - 1.0, 2


def _affines(levels=None, low=None, high=None, turn=None, steps=None, range_of=None):
    def affine(weight, bits):
        top = levels(bits) if levels else 2**bits - 1
        small = low(weight) if low else weight.amin(-1, keepdim=True)
        large = high(weight) if high else weight.amax(-1, keepdim=True)
        width = range_of(small, large) if range_of else large - small
        scale = (width / top).clamp(min=1e-8)
        values = steps(weight, scale, small) if steps else (weight - small) / scale
        numbers = turn(values) if turn else values.round()
        return numbers.to(torch.uint8), scale, small
    return affine


def _affine_by_loop(weight, bits):
    numbers, scales, smalls = [], [], []
    for row in weight:
        small, scale = row.min(), torch.clamp((row.max() - row.min()) / (2**bits - 1), min=1e-8)
        numbers.append(torch.round((row - small) / scale).to(torch.uint8))
        scales.append(scale.view(1))
        smalls.append(small.view(1))
    return torch.stack(numbers), torch.stack(scales), torch.stack(smalls)


def _affine_by_aminmax(weight, bits):
    small, large = weight.aminmax(dim=1, keepdim=True)
    scale = torch.maximum((large - small) / (2**bits - 1), torch.tensor(1e-8))
    return torch.floor((weight - small) / scale + 0.5).clamp(0, 2**bits - 1).byte(), scale, small


def _scale_kept_positive(make):
    """The scale made in another way, everything else as asked."""
    def affine(weight, bits):
        small, large = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        scale = make(large - small, 2**bits - 1)
        return ((weight - small) / scale).round().to(torch.uint8), scale, small
    return affine


def _range_of_absmax(weight, bits, top=None):
    small = weight.amin(-1, keepdim=True)
    scale = (weight.abs().amax(-1, keepdim=True) / (top or 2**bits - 1)).clamp(min=1e-8)
    return ((weight - small) / scale).round().to(torch.uint8), scale, small


def _one_range(weight, bits):
    smallest = weight.min()
    scale = ((weight.max() - smallest) / (2**bits - 1)).clamp(min=1e-8)
    return ((weight - smallest) / scale).round().to(torch.uint8), scale, smallest


AFFINE = Exercise(
    name="affine", chapter=12, kind="complete", entry="affine",
    title="A scale and a smallest weight", difficulty="easy", importance="useful", minutes=7,
    reference=_affines(),
    fixtures=(rows_that_do_not_straddle_zero, a_constant_row_and_8_bits, two_bits),
    equivalents={"loop": _affine_by_loop, "aminmax, floor": _affine_by_aminmax,
                 "max of values": _affines(high=lambda w: w.max(dim=1, keepdim=True).values)},
    misconceptions=(
        Misconception("levels instead of steps", _affines(levels=lambda bits: 2**bits),
            "The step is a little too small: in 4 bits the largest weight gets number 16, which does "
            "not exist. Sixteen levels have fifteen steps between them."),
        Misconception("a hat for a power", _affines(levels=lambda bits: 2 ^ bits - 1),
            "The scale is wrong: Python's hat is no power, it compares the bits of two numbers. A "
            "power has two stars.",
            also=[_affines(levels=lambda bits: (2 ^ bits) - 1)]),
        Misconception("steps of one number of bits", _affines(levels=lambda bits: 15),
            "The number of steps was fixed. It follows from the bits: 3 for 2 bits, 15 for 4, 255 "
            "for 8.",
            also=[_affines(levels=lambda bits: 255)]),
        Misconception("steps for a weight", _scale_kept_positive(lambda width, top: top / width),
            "Your scale says how many steps a weight of 1 has. It is the other way round: the range "
            "over the number of steps.",
            also=[lambda weight, bits: (_affines()(weight, bits)[0], ((2**bits - 1) / (
                weight.amax(-1, keepdim=True) - weight.amin(-1, keepdim=True))).clamp(min=1e-8),
                weight.amin(-1, keepdim=True))]),
        Misconception("1 taken off the quotient",
            _scale_kept_positive(lambda width, top: (width / (top + 1) - 1).clamp(min=1e-8)),
            "The scale is 1 too small, nearly always 1e-8: the 1 was taken off after the division. "
            "Put the number of steps into brackets."),
        Misconception("a bit for the sign", _affines(levels=lambda bits: 2 ** (bits - 1) - 1),
            "Half of the numbers are unused: you kept a bit for the sign. Here all numbers "
            "count from 0 up."),
        Misconception("absmax kept", _affines(
                low=lambda w: -w.abs().amax(-1, keepdim=True),
                high=lambda w: w.abs().amax(-1, keepdim=True)),
            "The range is symmetric around zero, so a row far from zero wastes most of its "
            "numbers. Use the row's own smallest and largest.",
            also=[_range_of_absmax,
                  lambda weight, bits: _range_of_absmax(weight, bits, 2 ** (bits - 1) - 1),
                  _affines(low=lambda w: -w.abs().amax(-1, keepdim=True))]),
        Misconception("smallest not subtracted", _affines(steps=lambda w, s, low: w / s),
            "Rows far from zero do not fit: what is stored is the distance from zero. Count the "
            "steps from the smallest weight."),
        Misconception("steps from zero to the largest",
            _affines(range_of=lambda small, large: large),
            "One step is the range over the number of steps, and the range begins at the smallest "
            "weight, not at zero."),
        Misconception("no columns", _affines(low=lambda w: w.amin(-1), high=lambda w: w.amax(-1)),
            "A number for each row does not meet the columns. Keep the reduced axis, so that they "
            "are columns.",
            also=[lambda weight, bits: (_affines()(weight, bits)[0], *(
                x.flatten() for x in _affines()(weight, bits)[1:]))]),
        Misconception("divided before subtracting",
            _affines(steps=lambda w, s, low: w / s - low),
            "The smallest weight was subtracted from steps. Subtract first, in weights; then "
            "divide."),
        Misconception("multiplied by the scale", _affines(steps=lambda w, s, low: (w - low) * s),
            "Nearly all numbers are 0 or too large: the distance was multiplied by the scale. How "
            "many steps fit into it? Divide."),
        Misconception("only the smallest divided", _affines(steps=lambda w, s, low: w - low / s),
            "Only the smallest weight was divided by the scale. Put the subtraction into brackets."),
        Misconception("rounded twice",
            _affines(steps=lambda w, s, low: (w / s).round() - (low / s).round()),
            "Weights and smallest were rounded apart, so some numbers are one off. Subtract first, "
            "divide, and round once."),
        Misconception("smallest added", _affines(steps=lambda w, s, low: (w + low) / s),
            "The smallest weight was added. Its own distance from itself must come out as 0."),
        Misconception("cut off", _affines(turn=torch.floor),
            "All weights come back too small: they were cut off to the step below. Round to the "
            "nearest."),
        Misconception("one range for the matrix", _one_range,
            "All rows share one range, or one end of it. Each row has its own smallest and largest: "
            "reduce the last axis and keep it.",
            also=[_affines(low=lambda w: w.min()), _affines(high=lambda w: w.max()),
                  _affines(low=lambda w: w.min().expand(len(w), 1)),
                  _affines(low=lambda w: w.min().expand(len(w), 1), high=lambda w: w.max())]),
        Misconception("ranges of the columns",
            lambda weight, bits: tuple(x.T for x in _affines()(weight.T, bits)),
            "There is a range for each column. The weights of one row share scale and "
            "smallest."),
        Misconception("a scale of 0", lambda weight, bits: (
                _affines()(weight, bits)[0],
                (weight.amax(-1, keepdim=True) - weight.amin(-1, keepdim=True)) / (2**bits - 1),
                weight.amin(-1, keepdim=True)),
            "A row of equal weights has a scale of 0, or nearly. Keep the scale itself, after its "
            "division, at 1e-8 or above.",
            also=[_scale_kept_positive(lambda width, top: width.clamp(min=1e-8) / top)]),
        Misconception("1e-8 as the upper limit",
            _scale_kept_positive(lambda width, top: (width / top).clamp(max=1e-8)),
            "No scale is above 1e-8: the limit was taken as the largest scale. It is the smallest "
            "that is allowed."),
        Misconception("scale in bfloat16",
            _scale_kept_positive(lambda width, top: (width / top).clamp(min=1e-8).bfloat16()),
            "The scale has three digits only: it became bfloat16, as in the chapter's piece. Here it "
            "stays float32."),
    ),
    hints=(
        Hint("I do not know where to start",
             "A row lies between 4 and 7, with 2 bits. Which four values would you want?"),
        Hint("My numbers are clipped",
             "Count from the row's smallest weight: 0 for it, 2^bits - 1 for the largest. One "
             "step is the range over that number."),
        Hint("I have the idea, not the code",
             "Three lines: smallest along the last axis, kept as a column; scale from largest "
             "minus smallest over 2^bits - 1, at least 1e-8; rounded difference over scale."),
    ),
    praise="Two numbers for each row, and no value is wasted.",
)


# ---------------------------------------------------------------- 2: order

ORDER_LINES = (
    "numbers = unpack(packed)                     # int8 (out, in)",
    "groups = numbers.unflatten(1, (-1, G))       # (out, in / G, G)",
    "groups = groups.float()                      # room for fractions",
    "groups = groups * scales[..., None]          # steps become weights",
    "weight = groups.flatten(1)                   # (out, in)",
    "y = x @ weight.T                             # (T, out)",
)

ORDER = Exercise(
    name="plain_product_in_order", chapter=12, kind="order",
    title="From bytes to a product", difficulty="easy", importance="essential", minutes=4,
    lines=ORDER_LINES,
    distractors=("groups = groups / scales[..., None]          # steps become weights",),
    misconceptions=(
        Misconception("both ways", "with 3 and with 6",
            "One line too many: dividing and multiplying by the scale leaves nothing changed."),
        Misconception("divided by the scale", "with 6",
            "Dividing by the scale made the numbers; to undo it, the way back multiplies."),
        Misconception("grouped before unpacking", "1 before 0",
            "A byte holds two numbers: as long as they are packed, a group of G has G / 2 bytes. "
            "Unpack first."),
        Misconception("scaled before grouping", "3 before 1",
            "The scales have a column for each group. Cut the numbers into groups before they "
            "meet."),
        Misconception("floats before there are groups", "2 before 1",
            "Groups become floats before they are cut. Which line cuts them?"),
        Misconception("scaled before there are floats", "3 before 2",
            "Whole numbers times scales in bfloat16 give weights in bfloat16: three digits. Make room "
            "for fractions before you scale."),
        Misconception("product before the groups were joined", "5 before 4",
            "The product needs a matrix of two axes, out and in. Join the groups of each row "
            "first."),
        Misconception("scaled after joining", "4 before 3",
            "A scale belongs to a group. Once the groups are joined, the scales no longer line up "
            "with them."),
        Misconception("floats after joining", "4 before 2",
            "The weight is finished when its groups become floats, so that line has no effect. It "
            "belongs before the joining."),
    ),
    hints=(
        Hint("Where does it begin?", "Which line uses what the layer has stored, and nothing else?"),
        Hint("Two lines look alike", "A weight is about number times scale. Which of the two undoes "
             "what quantizing did?"),
        Hint("Nearly there", "Unpack, cut into groups, floats, scales, join the groups, product."),
    ),
    praise="This is the plain path of the library's layer.",
)


# ---------------------------------------------------------------- 3: bytes of a checkpoint


def a_matrix_in_4_bits():
    return (768, 2048), 4, 32, 16


def a_scale_for_each_row_of_8_bits():
    return (100, 37), 8, None, 16


def long_scales_in_small_groups():
    return (60, 96), 4, 8, 32


def odd_bits():
    return (49, 147), 3, 7, 16                             # one bit in the last byte


def a_part_of_a_byte_at_the_end():
    return (3, 7), 5, None, 6                              # 105 + 18 bits, 15.375 bytes


def _bytes(numbers=None, scales=None, total=None):
    def stored_bytes(shape, bits, group, scale_bits):
        rows, columns = shape
        count = scales(rows, columns, group) if scales else rows * columns // (group or columns)
        whole = numbers(rows * columns, bits) if numbers else rows * columns * bits
        if total:
            return total(whole, count, scale_bits)
        return -(-(whole + count * scale_bits) // 8)
    return stored_bytes


STORED_BYTES = Exercise(
    name="stored_bytes", chapter=12, kind="function", entry="stored_bytes",
    title="Bytes with everything in them", difficulty="easy", importance="essential", minutes=6,
    reference=_bytes(),
    fixtures=(a_matrix_in_4_bits, a_scale_for_each_row_of_8_bits, long_scales_in_small_groups,
              odd_bits, a_part_of_a_byte_at_the_end),
    equivalents={
        "bits for a weight": lambda shape, bits, group, scale_bits: round(
            shape[0] * shape[1] * (bits + scale_bits / (group or shape[1])) / 8 + 0.4999),
        "a loop over rows": lambda shape, bits, group, scale_bits: (sum(
            shape[1] * bits + shape[1] // (group or shape[1]) * scale_bits
            for _ in range(shape[0])) + 7) // 8,
    },
    misconceptions=(
        Misconception("None as a number",
            lambda shape, bits, group, scale_bits: -(-(shape[0] * shape[1] * bits + shape[0] * (
                shape[1] // group) * scale_bits) // 8),
            "The group may be None, and nothing can be divided by that. Then the whole row is one "
            "group."),
        Misconception("scales forgotten", _bytes(scales=lambda r, c, g: 0),
            "Too few bytes: the scales are stored as well, one for each group."),
        Misconception("bits taken for bytes", _bytes(total=lambda w, n, s: w + n * s),
            "Eight times too many: these are bits. Eight of them are a byte."),
        Misconception("one scale for the matrix", _bytes(scales=lambda r, c, g: 1),
            "Only one scale is counted. Every group of every row has one; without groups, every row.",
            also=[_bytes(scales=lambda r, c, g: r * c // g if g else 1)]),
        Misconception("a scale for each row only", _bytes(scales=lambda r, c, g: r),
            "One scale for each row is counted. With groups, a row has columns / group of them."),
        Misconception("groups along the columns",
            _bytes(scales=lambda r, c, g: (-(-r // g) if g else 1) * c),
            "The groups run down the columns. They lie within a row: columns / group for each."),
        Misconception("as many scales as a group has weights",
            _bytes(scales=lambda r, c, g: r * (g or 1)),
            "A row got as many scales as a group has weights. It has as many as it has groups: "
            "columns / group."),
        Misconception("a scale for each weight", _bytes(scales=lambda r, c, g: r * c),
            "Every weight got a scale of its own. The weights of a group share one."),
        Misconception("a bit for each scale", _bytes(total=lambda w, n, s: -(-(w + n) // 8)),
            "Each scale counts as one bit. It has as many as are given."),
        Misconception("scales always of 16 bits", _bytes(total=lambda w, n, s: -(-(w + 16 * n) // 8)),
            "Right while a scale has 16 bits. How many it has is given."),
        Misconception("a byte for each number", _bytes(numbers=lambda n, bits: 8 * n),
            "Each number has a byte of its own. Packed, it takes as many bits as it has."),
        Misconception("4 or 8 bits", _bytes(numbers=lambda n, bits: n * (4 if bits <= 4 else 8)),
            "Right in 4 and in 8 bits. Numbers of 3 bits got 4, those of 5 a byte: here they stand "
            "without a gap, whatever their bits."),
        Misconception("scale bits taken for bytes", _bytes(total=lambda w, n, s: -(-w // 8) + n * s),
            "The scales are counted eight times: their size is given in bits."),
        Misconception("whole bytes of a scale",
            _bytes(total=lambda w, n, s: -(-w // 8) + n * (s // 8)),
            "A scale's bits that do not fill a byte are dropped. Add the bits of all numbers and "
            "scales, then make bytes."),
        Misconception("scales of a single row", _bytes(scales=lambda r, c, g: c // (g or c)),
            "The scales of a single row are counted. Every row has its own."),
        Misconception("a part of a byte dropped", _bytes(total=lambda w, n, s: (w + n * s) // 8),
            "The bits that do not fill a byte are dropped. They need one, too: round up."),
        Misconception("not a whole number", _bytes(total=lambda w, n, s: (w + n * s) / 8),
            "A part of a byte is returned. It takes a whole one: round up."),
        Misconception("always a byte more", _bytes(total=lambda w, n, s: (w + n * s) // 8 + 1),
            "A byte was added although the last one is full. Only bits that are left over need "
            "one more."),
        Misconception("rounded up twice", _bytes(total=lambda w, n, s: -(-w // 8) + -(-n * s // 8)),
            "Numbers and scales were rounded up apart, which leaves a gap. Add all bits, then round up "
            "once."),
        Misconception("each row rounded up",
            lambda shape, bits, group, scale_bits: shape[0] * _bytes()(
                (1, shape[1]), bits, group, scale_bits),
            "Every row was rounded up to a byte, which leaves gaps. Add the bits of all rows, then "
            "round up once."),
        Misconception("each group rounded up",
            lambda shape, bits, group, scale_bits: shape[0] * (shape[1] // (group or shape[1]))
            * -(-((group or shape[1]) * bits + scale_bits) // 8),
            "Every group was rounded up to a byte, which leaves gaps. Add all bits, then round up "
            "once."),
        Misconception("without groups no scales",
            _bytes(scales=lambda r, c, g: r * c // g if g else 0),
            "Right with groups. Without them every row still has a scale, one: as many as there are "
            "rows.",
            also=[_bytes(scales=lambda r, c, g: r * c // g if g else c)]),
    ),
    hints=(
        Hint("I do not know where to start",
             "A row of 64 weights, 4 bits, groups of 32: how many numbers and how many scales?"),
        Hint("Too large by 8", "Add all bits first: numbers times bits, scales times their bits. "
             "Then eight bits are a byte; a part of a byte is a whole one."),
        Hint("How many scales?", "rows times columns / group; without groups one for each row."),
    ),
    praise="Bits for a weight: those of the number, and its part of the scale.",
)


# ---------------------------------------------------------------- 4: scale late


def a_batch_and_groups_of_six():
    numbers, scales = quantize(_weight(10, 7, 24), 4, 6)
    return _weight(11, 2, 5, 24), pack(numbers), scales


def one_row_and_one_group():
    numbers, scales = quantize(_weight(12, 9, 10), 4, None)
    return _weight(13, 1, 10), pack(numbers), scales


def groups_with_very_different_scales():
    weight = _weight(14, 5, 32) * torch.tensor([1.0, 50.0, 0.02, 7.0]).repeat_interleave(8)
    numbers, scales = quantize(weight, 4, 8)
    return _weight(15, 4, 3, 32), pack(numbers), scales


def _late_product(x, packed, scales):
    numbers = unpack(packed).float().unflatten(1, (scales.shape[1], -1))   # (out, n, G)
    parts = torch.einsum("...ng,ong->...on", x.unflatten(-1, (scales.shape[1], -1)), numbers)
    return (parts * scales.float()).sum(-1)


def _late_by_loop(x, packed, scales):
    numbers, out = unpack(packed).float(), 0.0
    size = numbers.shape[1] // scales.shape[1]
    for g in range(scales.shape[1]):
        part = slice(g * size, (g + 1) * size)
        out = out + x[..., part] @ numbers[:, part].T * scales[:, g].float()
    return out


def _plain(x, packed, scales):
    return x @ dequantize(unpack(packed), scales).T


def _late_scaled_by(pick):
    def late_product(x, packed, scales):
        numbers = unpack(packed).float()
        return x @ numbers.T * pick(scales.float())
    return late_product


def _late_loop(step, size=lambda columns, n: columns // n, few=0):
    """A loop over the groups that does ``step(so far, part, scale)``."""
    def late_product(x, packed, scales):
        numbers, n = unpack(packed).float(), scales.shape[1]
        y, width = 0, size(x.shape[-1], n)
        for g in range(n - few):
            part = slice(g * width, (g + 1) * width)
            y = step(y, x[..., part] @ numbers[:, part].T, scales[:, g].float())
        return y
    return late_product


def _late_groups_interleaved(x, packed, scales):
    n = scales.shape[1]
    numbers = unpack(packed).float().unflatten(1, (-1, n)).transpose(1, 2)
    parts = torch.einsum("...ng,ong->...on", x.unflatten(-1, (-1, n)).transpose(-1, -2), numbers)
    return (parts * scales.float()).sum(-1)


LATE = Exercise(
    name="late_product", chapter=12, kind="function", entry="late_product",
    title="Multiply first, scale late", difficulty="hard", importance="useful", minutes=14,
    reference=_late_product, tolerance=2e-5,
    fixtures=(a_batch_and_groups_of_six, one_row_and_one_group, groups_with_very_different_scales),
    equivalents={"a loop over groups": _late_by_loop, "dequantize first": _plain,
                 "scales on x": lambda x, packed, scales: torch.stack([
                     (x.unflatten(-1, (scales.shape[1], -1)) * s.float()[:, None]).flatten(-2)
                     @ row.float() for row, s in zip(unpack(packed), scales)], dim=-1)},
    misconceptions=(
        Misconception("scaled by the mean of the scales", _late_scaled_by(lambda s: s.mean(1)),
            "All groups of a row got their average scale. Each group's part of the sum is scaled "
            "by its own, before the parts are added."),
        Misconception("scaled by the sum of the scales", _late_scaled_by(lambda s: s.sum(1)),
            "The sum over all groups was scaled by the sum of the scales. A sum of products is "
            "not a product of sums: scale each part."),
        Misconception("scaled by the first", _late_scaled_by(lambda s: s[:, 0]),
            "Only the first scale of each row is used. A row has as many groups as scales: keep "
            "their parts apart until each is scaled."),
        Misconception("not scaled", _late_scaled_by(lambda s: 1.0),
            "The result counts steps, not weights: the scales are missing."),
        Misconception("divided by the scales",
            lambda x, packed, scales: x @ (unpack(packed).float().unflatten(
                1, (scales.shape[1], -1)) / scales.float()[..., None]).flatten(1).T,
            "You divided by the scales. The way back from steps to weights multiplies."),
        Misconception("x cut to whole numbers",
            lambda x, packed, scales: _plain(x.trunc(), packed, scales),
            "x lost its fractions: it was turned into whole numbers to fit the others. Turn the "
            "numbers into floats instead.",
            also=[lambda x, packed, scales: _plain(x.to(torch.int8).float(), packed, scales)]),
        Misconception("groups counted in bytes",
            _late_loop(lambda y, part, s: y + part * s, lambda columns, n: columns // 2 // n),
            "Only the first half of the columns is used: the size of a group was counted in bytes. "
            "A byte holds two numbers."),
        Misconception("the last group only", _late_loop(lambda y, part, s: part * s),
            "The part of a single group is returned. Add the parts of all groups.",
            also=[lambda x, packed, scales: _late_loop(
                lambda y, part, s: y + part * s, few=scales.shape[1] - 1)(x, packed, scales)]),
        Misconception("the sum so far scaled again", _late_loop(lambda y, part, s: (y + part) * s),
            "What was added before is scaled again with each group. Scale the new part alone, then "
            "add it."),
        Misconception("scaled twice", lambda x, packed, scales: x @ (unpack(packed).unflatten(
                1, (scales.shape[1], -1)) * scales.float()[..., None] ** 2).flatten(1).T,
            "The scales come in twice: with the numbers and with the parts. Once is enough, at the "
            "parts."),
        Misconception("8 taken off twice",
            lambda x, packed, scales: _plain(x, packed, scales) - 8 * (
                x.unflatten(-1, (scales.shape[1], -1)).sum(-1) @ scales.float().T),
            "Every weight is 8 steps too small. Unpacking takes the 8 off by itself."),
        Misconception("groups interleaved", _late_groups_interleaved,
            "Your groups take every n-th column. A group is neighbours: the axis of the groups "
            "comes first."),
        Misconception("8 left in",
            lambda x, packed, scales: _plain(x, packed, scales) + 8 * (
                x.unflatten(-1, (scales.shape[1], -1)).sum(-1) @ scales.float().T),
            "Every weight is 8 steps too large: the stored halves count from 0. Unpacking takes "
            "8 off."),
        Misconception("x and numbers cut differently",
            lambda x, packed, scales: _plain(x, pack(unpack(packed).unflatten(
                1, (-1, scales.shape[1])).transpose(1, 2).flatten(1)), scales),
            "x and the numbers were cut in different ways, so columns meet that don't belong "
            "together. Groups come first, then what is in a group."),
        Misconception("parts not added",
            lambda x, packed, scales: torch.einsum("...ng,ong,on->...on", x.unflatten(
                -1, (scales.shape[1], -1)), unpack(packed).float().unflatten(
                1, (scales.shape[1], -1)), scales.float()),
            "The parts of the groups stand side by side, well scaled. Add them: the result has one "
            "number for each output."),
        Misconception("product rounded to bfloat16",
            lambda x, packed, scales: (x.bfloat16() @ dequantize(
                unpack(packed), scales).bfloat16().T).float(),
            "Only three digits are right: somewhere the numbers became bfloat16. Make the scales "
            "float32 before you multiply.",
            also=[lambda x, packed, scales: (torch.einsum(
                      "...ng,ong->...on", x.unflatten(-1, (scales.shape[1], -1)),
                      unpack(packed).float().unflatten(1, (scales.shape[1], -1))).bfloat16()
                      * scales).sum(-1).float(),
                  lambda x, packed, scales: (torch.einsum(
                      "...ng,ong->...on", x.bfloat16().unflatten(-1, (scales.shape[1], -1)),
                      unpack(packed).bfloat16().unflatten(1, (scales.shape[1], -1)))
                      * scales).sum(-1).float()]),
        Misconception("parts averaged",
            lambda x, packed, scales: _plain(x, packed, scales) / scales.shape[1],
            "The result is too small by the number of groups: the parts were averaged. They are "
            "added."),
    ),
    hints=(
        Hint("Why should the scale wait?",
             "0.5 · 3 · x + 0.5 · 2 · y: what can stand outside, and for how many terms?"),
        Hint("Where do the groups go?",
             "Cut the last axis of x and of the numbers into (groups, group). Sum within a group "
             "first: a part for each output and group. Then scales, then the sum over groups."),
        Hint("How do I write that?",
             "One einsum over g leaves (..., out, groups); times the scales as float32; sum over the "
             "last axis. A loop over the groups does it as well."),
    ),
    praise="One multiplication by a scale for each group, in place of one for each weight.",
)


# ---------------------------------------------------------------- 5: find the bug


def columns_that_32_does_not_divide():
    return _weight(16, 6, 48), 4, 16


def four_columns_in_groups_of_two():
    return torch.tensor([[0.7, -0.24, 3.0, 0.0], [-0.9, 0.5, 0.02, -1.0], [5.0, 4.0, 2.2, 1.0]]), 4, 2


def eight_bits_in_groups_of_five():
    return _weight(17, 4, 15), 8, 5


def _round_trip(weight, bits, group):
    most = 2 ** (bits - 1) - 1
    groups = weight.unflatten(1, (-1, group))
    scales = groups.abs().amax(dim=-1, keepdim=True) / most
    return ((groups / scales).round() * scales).flatten(1)


def _round_trip_bug(weight, bits, group):
    most = 2 ** (bits - 1) - 1
    groups = weight.T.reshape(-1, group)
    scales = groups.abs().amax(dim=-1, keepdim=True) / most
    return ((groups / scales).int() * scales).reshape(weight.T.shape).T


def _only_rounding_repaired(weight, bits, group):
    most = 2 ** (bits - 1) - 1
    groups = weight.T.reshape(-1, group)
    scales = groups.abs().amax(dim=-1, keepdim=True) / most
    return ((groups / scales).round() * scales).reshape(weight.T.shape).T


def _only_groups_repaired(weight, bits, group):
    most = 2 ** (bits - 1) - 1
    groups = weight.reshape(-1, group)
    scales = groups.abs().amax(dim=-1, keepdim=True) / most
    return ((groups / scales).int() * scales).reshape(weight.shape)


def _trips(step=torch.round, scale=None, cut=lambda weight, group: weight.unflatten(1, (-1, group))):
    def round_trip(weight, bits, group):
        most = 2 ** (bits - 1) - 1
        groups = cut(weight, group)
        scales = (scale(groups) if scale else groups.abs().amax(-1, keepdim=True)) / most
        return (step(groups / scales) * scales).reshape(weight.shape)
    return round_trip


def _weights_trip_rounded(weight, bits, group):
    scales = weight.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    groups = weight.round().unflatten(1, (-1, group))
    return ((groups / scales).int() * scales).flatten(1)


BUG = Exercise(
    name="round_trip", chapter=12, kind="bug", entry="round_trip",
    title="Two slips on the way there and back", difficulty="medium", importance="essential",
    minutes=9, reference=_round_trip,
    fixtures=(columns_that_32_does_not_divide, four_columns_in_groups_of_two,
              eight_bits_in_groups_of_five),
    equivalents={
        "reshape": lambda weight, bits, group: _trips()(weight, bits, group).reshape(weight.shape),
        "add a half and floor": _trips(step=lambda s: (s + 0.5).floor()),
        "row by row": lambda weight, bits, group: torch.stack([
            _trips()(row[None], bits, group)[0] for row in weight]),
    },
    misconceptions=(
        Misconception("unchanged", _round_trip_bug,
            "Both slips are still there: look at which weights share a scale, and at how a "
            "fraction becomes a whole number."),
        Misconception("only the rounding repaired", _only_rounding_repaired,
            "The rounding is right now. The groups still run down the columns, through several rows; "
            "a group lies within one row."),
        Misconception("only the groups repaired", _only_groups_repaired,
            "The groups are right now. The numbers are still cut off, which pulls every "
            "weight towards zero."),
        Misconception("rounded down", _trips(step=torch.floor),
            "Every weight goes to the step below. Take the nearest one."),
        Misconception("one scale for everything", _trips(scale=lambda g: g.abs().max()),
            "All weights share one scale now. The maximum goes over the last axis only."),
        Misconception("one scale for each row", _trips(cut=lambda weight, group: weight),
            "A whole row shares one scale now. Cut the row into groups, and take the maximum within "
            "each."),
        Misconception("group as the number of groups",
            _trips(cut=lambda weight, group: weight.unflatten(1, (group, -1))),
            "There are as many groups as one has weights. The number given is the size of a group, "
            "and that is the last axis.",
            also=[_trips(cut=lambda weight, group: weight.reshape(group, -1))]),
        Misconception("largest without its sign", _trips(scale=lambda g: g.amax(-1, keepdim=True)),
            "Where the largest weight is negative, the scale is too small. The absolute value was "
            "right."),
        Misconception("given back in another shape",
            lambda weight, bits, group: _only_rounding_repaired(weight, bits, group).T.reshape(
                weight.shape),
            "The groups still come from the transposed matrix, and now the weights land in other "
            "places. Cut the matrix as it is.",
            also=[lambda weight, bits, group: _round_trip_bug(weight, bits, group).T.reshape(
                weight.shape)]),
        Misconception("turned on the way back",
            lambda weight, bits, group: _round_trip(weight, bits, group).reshape(weight.T.shape).T,
            "The groups are right. The last line still turns the matrix: give back the shape of the "
            "weight.",
            also=[lambda weight, bits, group: _only_groups_repaired(weight, bits, group).reshape(
                weight.T.shape).T]),
        Misconception("not rounded any more", _trips(step=lambda s: s),
            "Nothing is rounded now: the weights come back as they were. A weight is stored as a "
            "whole number of steps."),
        Misconception("something else rounded", lambda weight, bits, group: weight.round(),
            "Something else was rounded. What becomes whole is the number of steps: a weight divided "
            "by its scale.",
            also=[_weights_trip_rounded]),
        Misconception("a half added, then cut off", _trips(step=lambda s: (s + 0.5).int()),
            "Weights above zero are right, those below come out a step too high: cutting off goes "
            "towards zero. Take a function that rounds."),
        Misconception("scales in bfloat16",
            lambda weight, bits, group: dequantize(*quantize(weight, bits, group)),
            "Nearly: the library's functions round the scales to bfloat16. Here they stay as they are; "
            "repair the lines that are given."),
        Misconception("maximum over the groups", _trips(scale=lambda g: g.abs().amax(
                (0, 1), keepdim=True)),
            "The maximum runs over the groups, not within one. The last axis holds the weights "
            "that share a scale.",
            also=[_trips(scale=lambda g: g.abs().amax(1, keepdim=True))]),
    ),
    hints=(
        Hint("Which symptom belongs to what?",
             "Rounded weights are not smaller on the average. Are yours? And an outlier in row 0 "
             "must leave row 1 alone. Does it?"),
        Hint("I see too small weights", "A conversion to integers cuts off: 2.9 becomes 2. There is a "
             "function for the nearest whole number."),
        Hint("I see another row move", "A transposed matrix is read column by column. Cut the rows "
             "as they are, and give the result its shape back."),
    ),
    praise="An outlier stays in its group, and no weight is pulled towards zero.",
)


# ---------------------------------------------------------------- 6: clip


def a_row_with_one_outlier():
    weight = _weight(18, 5, 40)
    weight[1, 7], weight[3, 30] = 9.0, -14.0
    return weight, 4, (1.0, 0.9, 0.8, 0.75, 0.6, 0.4)


def three_bits_and_many_choices():
    return _weight(19, 6, 64), 3, tuple(1.0 - 0.05 * n for n in range(14))


def a_row_of_zeros():
    weight = _weight(20, 3, 16)
    weight[1] = 0.0
    return weight, 2, (0.65, 1.0, 0.5, 0.8)


def _clips(error=None, clamp=True, pick=None, rows=True, scale=None, low=0, back=False, high_only=False,
           peak=lambda w: w.abs().amax(-1, keepdim=True).clamp(min=1e-8), turn=torch.round, give=None,
           most=lambda bits: 2 ** (bits - 1) - 1):
    def best_clip(weight, bits, shares):
        top, largest = most(bits), peak(weight)
        errors = []
        for share in shares:
            step = scale(largest, share, top) if scale else share * largest / top
            steps = turn(weight / step)
            steps = steps.clamp(None if high_only else low - top, top) if clamp else steps
            again = steps * (largest / top if back else step)
            errors.append(error(again, weight) if error else (again - weight).pow(2).sum(-1))
        table = torch.stack(errors)                                     # (shares, out)
        if not rows:
            table = table.sum(-1, keepdim=True).expand_as(table)
        if give:
            return give(table, shares)
        return torch.tensor(shares)[pick(table) if pick else table.argmin(0)]
    return best_clip


def _clip_row_by_row(anew=True, patient=True):
    """A loop over rows; it may keep an earlier row's best, or stop where the sum first rises."""
    def best_clip(weight, bits, shares):
        most, chosen, best, lowest = 2 ** (bits - 1) - 1, [], shares[0], math.inf
        for row in weight:
            if anew:
                best, lowest = shares[0], math.inf
            for share in shares:
                step = share * row.abs().max().clamp(min=1e-8) / most
                again = (row / step).round().clamp(-most, most) * step
                cost = (again - row).square().sum().item()
                if cost < lowest:
                    best, lowest = share, cost
                elif not patient:
                    break
            chosen.append(best)
        return torch.tensor(chosen)
    return best_clip


def _costs_in_steps(goal):
    def best_clip(weight, bits, shares):
        most, largest = 2 ** (bits - 1) - 1, weight.abs().amax(1, keepdim=True).clamp(min=1e-8)
        steps = [s * largest / most for s in shares]
        costs = [((weight / s).round().clamp(-most, most) - goal(weight, s)).square().sum(1) for s in steps]
        return torch.tensor(shares)[torch.stack(costs).argmin(0)]
    return best_clip


def _clip_with_steps_as_they_were(weight, bits, shares):
    most, largest = 2 ** (bits - 1) - 1, weight.abs().amax(1, keepdim=True).clamp(min=1e-8)
    step, costs = largest / most, []
    for share in shares:
        again = (weight.clamp(-share * largest, share * largest) / step).round() * step
        costs.append((again - weight).square().sum(1))
    return torch.tensor(shares)[torch.stack(costs).argmin(0)]


def _clip_numbers_with_steps_as_they_were(weight, bits, shares):
    most, largest = 2 ** (bits - 1) - 1, weight.abs().amax(1, keepdim=True).clamp(min=1e-8)
    step = largest / most
    costs = [((weight / step).round().clamp(-s * most, s * most) * step - weight).square().sum(1)
             for s in shares]
    return torch.tensor(shares)[torch.stack(costs).argmin(0)]


def _clip_at_a_quantile(weight, bits, shares):
    most, costs = 2 ** (bits - 1) - 1, []
    for share in shares:
        step = weight.abs().quantile(share, 1, keepdim=True).clamp(min=1e-8) / most
        costs.append(((weight / step).round().clamp(-most, most) * step - weight).square().sum(1))
    return torch.tensor(shares)[torch.stack(costs).argmin(0)]


def _clip_by_loop(weight, bits, shares):
    most, chosen = 2 ** (bits - 1) - 1, []
    for row in weight:
        peak = max(row.abs().max().item(), 1e-8)
        def cost(share):
            step = share * peak / most
            return ((row / step).round().clamp(-most, most) * step - row).square().sum().item()
        chosen.append(min(shares, key=cost))
    return torch.tensor(chosen)


def _clip_at_once(weight, bits, shares):
    most, shares = 2 ** (bits - 1) - 1, torch.tensor(shares)
    steps = shares[:, None, None] * weight.abs().amax(-1, keepdim=True).clamp(min=1e-8) / most
    back = (weight / steps).round().clamp(-most, most) * steps
    return shares[(back - weight).square().mean(-1).argmin(0)]


CLIP = Exercise(
    name="best_clip", chapter=12, kind="function", entry="best_clip",
    title="Give up the largest", difficulty="hard", importance="optional", minutes=14,
    reference=_clips(),
    fixtures=(a_row_with_one_outlier, three_bits_and_many_choices, a_row_of_zeros),
    equivalents={"loops": _clip_by_loop, "all at once": _clip_at_once,
                 "root of the error": _clips(error=lambda b, w: (b - w).norm(dim=-1))},
    misconceptions=(
        Misconception("nothing clipped", _clips(clamp=False),
            "A smaller step always wins: what clipping costs is not counted. Clamp the whole "
            "numbers, and compare with the row as it was."),
        Misconception("largest error only", _clips(error=lambda b, w: (b - w).abs().amax(-1)),
            "The worst weight decides, and that is always the clipped one. Take the sum of "
            "squares over the row."),
        Misconception("errors with their signs", _clips(error=lambda b, w: (b - w).sum(-1)),
            "Errors above and below cancel. Square them before you add.",
            also=[_clips(error=lambda b, w: (b - w).sum(-1) ** 2)]),
        Misconception("errors in steps", _costs_in_steps(lambda w, step: w / step),
            "The differences were counted in steps, and steps differ in length. Go back to weights, "
            "and compare those with the row.",
            also=[_costs_in_steps(lambda w, step: w)]),
        Misconception("absolute errors", _clips(error=lambda b, w: (b - w).abs().sum(-1)),
            "Absolute errors were added. A square makes a clipped weight count more; the task asks "
            "for squares."),
        Misconception("one choice for all rows", _clips(rows=False),
            "All rows got the same share. Each row chooses for itself."),
        Misconception("an earlier row's sum kept", _clip_row_by_row(anew=False),
            "The smallest sum of an earlier row still counts for the next ones. Begin anew with each "
            "row."),
        Misconception("stopped at the first rise", _clip_row_by_row(patient=False),
            "The search stops as soon as a share is worse than the one before. A later one may be "
            "better: try them all."),
        Misconception("the largest number shrinks, too",
            _clips(scale=lambda peak, share, most: peak / most / share),
            "The step grows where it should shrink. A share of 0.5 means: half the largest weight "
            "is the largest number."),
        Misconception("numbers of the shares", _clips(give=lambda table, shares: table.argmin(0)),
            "You return which share it is. Return the share itself.",
            also=[_clips(give=lambda table, shares: table.argmin(0).float())]),
        Misconception("the error returned", _clips(give=lambda table, shares: table.amin(0)),
            "You return the smallest sum. Return the share that gave it."),
        Misconception("the largest sum", _clips(pick=lambda table: table.argmax(0)),
            "You chose the share with the largest sum. The best one has the smallest."),
        Misconception("chosen over the rows", _clips(pick=lambda table: table.argmin(1)),
            "There is a result for each share: the smallest sum was searched over the rows. Search "
            "over the shares."),
        Misconception("the last of equals",
            _clips(pick=lambda table: len(table) - 1 - table.flip(0).argmin(0)),
            "Where sums are equal, another share wins. The task asks for the first, in the order "
            "given.",
            also=[lambda weight, bits, shares: _clips()(weight, bits, sorted(shares)),
                  lambda weight, bits, shares: _clips()(weight, bits, sorted(shares)[::-1])]),
        Misconception("largest of the matrix",
            _clips(peak=lambda w: w.abs().max().clamp(min=1e-8)),
            "All rows share one step. Each row has its own largest weight."),
        Misconception("largest without its sign",
            _clips(peak=lambda w: w.amax(-1, keepdim=True).clamp(min=1e-8)),
            "Rows with a large negative weight are cut too soon. Take absolute values before the "
            "largest."),
        Misconception("cut off", _clips(turn=torch.trunc),
            "Whole numbers were cut off, not rounded, so a large step costs more than it should."),
        Misconception("one number too many", _clips(most=lambda bits: 2 ** (bits - 1)),
            "The largest whole number is one too large: with 4 bits it is 7, as many above zero as "
            "below."),
        Misconception("no bit for the sign", _clips(most=lambda bits: 2**bits - 1),
            "The whole numbers need a bit more than there is: with 4 bits the largest is 7."),
        Misconception("only one side clamped", _clips(high_only=True),
            "Large negative weights are not cut. Whole numbers go from -most to most."),
        Misconception("steps as they were", _clip_with_steps_as_they_were,
            "The largest weights are cut, but all steps stay as coarse as before. The share makes "
            "the step smaller.",
            also=[_clip_numbers_with_steps_as_they_were]),
        Misconception("step not divided", _clips(scale=lambda peak, share, most: share * peak),
            "One step is as long as the largest weight, so nearly all becomes 0 or 1. Divide by the "
            "largest whole number."),
        Misconception("a share of the weights", _clip_at_a_quantile,
            "A share of the weights was cut, counted by number. The share is one of the largest "
            "weight: 0.5 is half of it."),
        Misconception("-8 used as well", _clips(low=-1),
            "One side is cut later than the other. Whole numbers go from -most to most."),
        Misconception("back with the whole scale", _clips(back=True),
            "Nothing beats a share of 1, because finer steps are not seen to help. Are weights "
            "rounded to steps, and does the way back take the same step?",
            also=[_clips(turn=lambda s: s)]),
    ),
    hints=(
        Hint("Why clip at all?",
             "One weight is 9, the others about 1. What is one step without clipping, and what "
             "happens to the others?"),
        Hint("What do I compare?",
             "For each share: step = share · largest / most; round, clamp to ±most, back to weights; "
             "the sum of squared differences for each row."),
        Hint("How do I choose for each row?",
             "Stack the errors to (shares, out), argmin over the first axis, and index a tensor of "
             "the shares with it."),
    ),
    praise="For few bits it often pays to give up the largest weight for the many.",
)


# ---------------------------------------------------------------- 7: bits for each kind (open)


def a_small_model_and_three_kinds():
    torch.manual_seed(21)
    model = Transformer(ModelConfig(dim=24, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=8,
                                    hidden_dim=40, vocab_size=30))
    return model, {"w2": 3, "wq": 4, "output": 2}


def the_embeddings_as_well():
    model, _ = a_small_model_and_three_kinds()
    return model, {"w1": 5, "tok_embeddings": 3}


def nothing_to_do():
    model, _ = a_small_model_and_three_kinds()
    return model, {}


def _run_mixed(candidate, model, bits_of):
    before = copy.deepcopy(model.state_dict())
    made = candidate(model, bits_of)
    if made is None:
        return None
    kept = all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    return [float(kept), *(w.detach().clone() for w in made.state_dict().values())]


@torch.no_grad()
def _mixes_the_wrong_one(model, bits_of):
    new = copy.deepcopy(model)
    _mixes(same=True)(model, bits_of)
    return new


@torch.no_grad()
def _mix_once(model, bits_of):
    new = copy.deepcopy(model)
    for name, weight in new.named_parameters():
        if (kind := name.split(".")[-2]) in bits_of:
            weight.copy_(dequantize(*quantize(weight, bits_of[kind])))
            break
    return new


@torch.no_grad()
def _mix_with_every_bits(model, bits_of):
    new = model
    for bits in bits_of.values():
        new = _mixes()(new, dict.fromkeys(bits_of, bits))
    return copy.deepcopy(new)


@torch.no_grad()
def _mix_with_float_scales(model, bits_of):
    new = copy.deepcopy(model)
    for name, weight in new.named_parameters():
        if (kind := name.split(".")[-2]) in bits_of:
            step = weight.abs().amax(1, keepdim=True) / (2 ** (bits_of[kind] - 1) - 1)
            weight.copy_((weight / step.clamp(min=1e-30)).round() * step)
    return new


def _mixes(choose=None, group=None, bits=None, same=False, back=None, every=False):
    @torch.no_grad()
    def with_bits(model, bits_of):
        new = model if same else copy.deepcopy(model)
        for name, weight in new.named_parameters():
            kind = choose(name) if choose else name.split(".")[-2]
            if (every or kind in bits_of) and weight.dim() == 2:
                b = bits(bits_of, kind) if bits else bits_of[kind]
                pair = quantize(weight, b, group)
                weight.copy_((back or dequantize)(*pair))
        return new
    return with_bits


@torch.no_grad()
def _mix_by_modules(model, bits_of):
    new = copy.deepcopy(model)
    for name, module in new.named_modules():
        if name.split(".")[-1] in bits_of:
            module.weight.data = dequantize(*quantize(module.weight, bits_of[name.split(".")[-1]]))
    return new


@torch.no_grad()
def _mix_by_state(model, bits_of):
    state = {name: dequantize(*quantize(w, bits_of[name.split(".")[-2]]))
             if name.split(".")[-2] in bits_of else w.clone()
             for name, w in model.state_dict().items()}
    new = copy.deepcopy(model)
    new.load_state_dict(state)
    return new


MIXED = Exercise(
    name="with_bits", chapter=12, kind="open", entry="with_bits",
    title="Bits where they matter", difficulty="medium", importance="useful", minutes=18,
    reference=_mixes(), run=_run_mixed,
    fixtures=(a_small_model_and_three_kinds, the_embeddings_as_well, nothing_to_do),
    equivalents={"modules": _mix_by_modules, "state_dict": _mix_by_state, "parameters": _mixes()},
    misconceptions=(
        Misconception("the model itself changed", _mixes(same=True),
            "The model that was handed in has changed. Work on a copy, and give that back.",
            also=[_mixes_the_wrong_one]),
        Misconception("every matrix", _mixes(
                bits=lambda d, kind: d.get(kind, 8), every=True),
            "All matrices were rounded. Only the kinds that are named change.",
            also=[_mixes(bits=lambda d, kind: d.get(kind, 4), every=True)]),
        Misconception("one number of bits for all", _mixes(bits=lambda d, kind: min(d.values())),
            "The kinds did not get their own bits, but the same. Look them up by the kind.",
            also=[_mixes(bits=lambda d, kind: next(iter(d.values()))), _mix_with_every_bits]),
        Misconception("the first match only", _mix_once,
            "A single matrix changed: the function returns inside the loop. Return the copy when all "
            "names have been seen."),
        Misconception("scales of float32", _mix_with_float_scales,
            "Nearly: the scales were not rounded to bfloat16. The two functions of the chapter do "
            "that."),
        Misconception("first layer only",
            _mixes(choose=lambda name: name.split(".")[-2] if "layers.1" not in name else ""),
            "Only the first layer changed. A kind is all matrices of that name, in every layer."),
        Misconception("the output layer forgotten",
            _mixes(choose=lambda name: name.split(".")[-2] if "layers" in name else ""),
            "The output layer was left alone. It stands outside of the layers, under its own "
            "name."),
        Misconception("whole numbers left in place", _mixes(back=lambda n, s: n.float()),
            "The weights are whole numbers now. Multiply by the scales to get weights again."),
        Misconception("nothing changed", lambda model, bits_of: copy.deepcopy(model),
            "Nothing was rounded. Does a kind meet its part of the name, and are the rounded numbers "
            "written into the copy?"),
        Misconception("first part of the name", _mixes(choose=lambda name: name.split(".")[0]),
            "The matrices inside the layers are as before. A kind is the last but one part of the "
            "name."),
        Misconception("linear layers only", _mixes(
                choose=lambda name: name.split(".")[-2].replace("tok_embeddings", "")),
            "The token embeddings were left alone. They are no linear layer, but a matrix with a "
            "name."),
        Misconception("groups of 32", _mixes(group=32),
            "The rows were cut into groups. Here each row has one scale."),
    ),
    hints=(
        Hint("I do not know where to start",
             "What is the name of w2's weight in the second layer, and which part of it says w2?"),
        Hint("How do I change a weight in place?",
             "Under torch.no_grad, the weight's copy_ takes new numbers. First copy.deepcopy the "
             "model."),
        Hint("Which names do I get?",
             "named_parameters gives layers.1.feed_forward.w2.weight and output.weight. Split at "
             "the dots: the last but one is the kind."),
    ),
    praise="Now measure: which kinds deserve their bits?",
)


EXERCISES = [QUANTIZE, PACK, UNPACK, AFFINE, ORDER, STORED_BYTES, LATE, BUG, CLIP, MIXED]
