"""Chapter 9, mixture of experts: its two core pieces and its exercises."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimistral.config import ModelConfig, MoEConfig, count_parameters
from minimistral.layers import SwiGLU
from minimistral.moe import balance_loss, chosen_experts, route

from ..compare import difference
from ..exercises import Exercise, Hint, Misconception


def _random(seed: int, *shape: int) -> Tensor:
    """Numbers without zero means, whose rows differ in size."""
    chance = torch.Generator().manual_seed(seed)
    rows = 0.5 + torch.rand((*shape[:-1], 1), generator=chance)
    return rows * torch.randn(shape, generator=chance) + 0.3


# ---------------------------------------------------------------- piece: route


def seven_tokens_five_experts():
    return 2 * _random(1, 7, 5), 2


def nine_tokens_six_experts_three_chosen():
    logits = _random(2, 9, 6)
    logits[4] = torch.tensor([0.1, -0.2, 0.3, 0.2, -0.4, 0.0])
    return logits, 3


def logits_as_large_as_a_thousand():
    logits = _random(3, 4, 7)
    logits[1] += 900
    logits[2] *= 200
    return logits, 2


def half_precision():
    return _random(4, 5, 6).bfloat16(), 2


def scores_that_tie():
    return (4 * _random(6, 11, 6)).round() / 2, 3


def all_experts_chosen():
    return _random(5, 3, 4), 4


def _as_table(value):
    """(shape, share of every expert for every token) where it is a routing, else itself.

    The order in which a token names its experts is free.
    """
    if not (isinstance(value, tuple | list) and len(value) == 2
            and all(isinstance(part, Tensor) for part in value)):
        return value
    weights, experts = value
    if (weights.dtype != torch.float32 or experts.dtype != torch.int64 or weights.dim() != 2
            or weights.shape != experts.shape or experts.min() < 0 or experts.max() > 15):
        return value
    table = torch.zeros(len(weights), 16).scatter_add(1, experts, weights)
    return tuple(weights.shape), table


def _same_routing(expected, actual) -> str | None:
    wanted, got = _as_table(expected), _as_table(actual)
    if wanted is expected or got is actual or wanted[0] != got[0]:   # no routing, another shape
        found = difference(expected, actual, same_dtype=True)
        return found and found.text
    if difference(wanted, got, same_dtype=True) is None:
        return None
    wrong = (wanted[1] - got[1]).abs().nan_to_num(9.0).amax(1).argmax().item()
    names = [", ".join(f"{e}: {row[e]:.2f}" for e in row.nonzero().flatten().tolist())
             for row in (wanted[1][wrong], got[1][wrong])]
    return f"for token {wrong} expected {{{names[0]}}}, got {{{names[1]}}}"


def _ties_free(candidate, logits, k):
    """The routing, with the first of equal scores in the place of each: which of them wins is free.
    A right one has to be one that can learn, too."""
    scores = logits.clone()

    def tidied(routing):
        if _as_table(routing) is routing or routing[1].max() >= scores.shape[1]:
            return routing
        first = (scores[:, :, None] == scores[:, None, :]).int().argmax(-1)      # (N, E)
        return routing[0], first.gather(1, routing[1])

    routing = tidied(candidate(logits, k))
    if _same_routing(tidied(route(scores, k)), routing) is None:
        weights, _ = candidate(scores.requires_grad_() * 1, k)
        return routing if weights.requires_grad else "weights that no gradient leaves"
    return routing


def _softmax_first(logits, k):
    shares, experts = logits.float().softmax(-1).topk(k, dim=-1)
    return shares / shares.sum(-1, keepdim=True), experts


def _by_sorting(logits, k):
    experts = logits.float().argsort(dim=-1)[:, -k:]                 # ascending
    return logits.float().gather(1, experts).softmax(-1), experts


def _by_hiding(logits, k):
    logits = logits.float()
    experts = logits.topk(k).indices
    hidden = torch.full_like(logits, -torch.inf).scatter(1, experts, logits.gather(1, experts))
    return hidden.softmax(-1).gather(1, experts), experts


def _by_loop(logits, k):
    weights, experts = [], []
    for row in logits.float():
        best = sorted(range(len(row)), key=lambda e: -row[e].item())[:k]
        weights.append(torch.softmax(row[best], 0))
        experts.append(best)
    return torch.stack(weights), torch.tensor(experts)


def _top(logits, k, share, **options):
    """route from a function of the chosen logits."""
    chosen, experts = logits.float().topk(k, dim=-1, **options)
    return share(chosen), experts


def _sorted_experts_only(logits, k):
    weights, experts = route(logits, k)
    return weights, experts.sort(dim=-1).values


def _over_tokens(logits, k):
    shares, experts = logits.float().softmax(0).topk(k, dim=-1)
    return shares / shares.sum(-1, keepdim=True), experts


def _topk_over_tokens(logits, k):
    chosen, experts = logits.float().topk(k, dim=0)
    return chosen.softmax(-1), experts


def _full_width(logits, k):
    weights, experts = route(logits, k)
    table = torch.zeros(logits.shape).scatter(1, experts, weights)
    return table, torch.arange(logits.shape[1]).expand_as(table)


def _table_kept(logits, k):
    logits = logits.float()
    experts = logits.topk(k).indices
    hidden = torch.full_like(logits, -torch.inf).scatter(1, experts, logits.gather(1, experts))
    return hidden.softmax(-1), experts


def _others_at_zero(logits, k):
    top, experts = logits.float().topk(k)
    return torch.zeros(logits.shape).scatter(1, experts, top).softmax(-1).gather(1, experts), experts


def _plain_numbers(logits, k):
    return tuple(map(torch.tensor, (part.tolist() for part in route(logits, k))))


def _by_threshold(logits, k):
    logits = logits.float()
    lowest = logits.topk(k).values[:, -1:]
    return tuple(logits.masked_fill(logits < lowest, -torch.inf).softmax(-1).topk(k))


def _one_sum(logits, k):
    shares, experts = logits.float().softmax(-1).topk(k, dim=-1)
    return shares / shares.sum(), experts


ROUTE = Exercise(
    name="route", chapter=9, kind="piece", piece="moe.route", entry="route",
    title="The router's choice", difficulty="medium", importance="essential", minutes=8,
    reference=route,
    fixtures=(seven_tokens_five_experts, nine_tokens_six_experts_three_chosen,
              logits_as_large_as_a_thousand, half_precision, scores_that_tie, all_experts_chosen),
    run=_ties_free, compare=_same_routing,
    equivalents={
        "softmax, then top-k, then renormalise": _softmax_first,
        "by sorting": _by_sorting,
        "the others hidden": _by_hiding,
        "token by token": _by_loop,
        "exponentials by hand": lambda logits, k: _top(logits, k, lambda c: (
            c - c.amax(-1, keepdim=True)).exp() / (c - c.amax(-1, keepdim=True)).exp().sum(
                -1, keepdim=True)),
    },
    misconceptions=(
        Misconception("not renormalised", lambda logits, k: tuple(
                logits.float().softmax(-1).topk(k, dim=-1)),
            "The weights of a token sum to less than 1: those left out took a share. Divide by "
            "the sum of the chosen, or choose before the softmax."),
        Misconception("softmax over the tokens", _over_tokens,
            "The softmax ran down the tokens, so one token's weights depend on the others. "
            "Each row belongs to one token."),
        Misconception("softmax of the chosen over the tokens",
            lambda logits, k: _top(logits, k, lambda c: c.softmax(0)),
            "The right experts, but the softmax ran over the tokens. The k weights of one "
            "token have to sum to 1."),
        Misconception("top-k over the tokens", _topk_over_tokens,
            "The best tokens were chosen for each expert. Here each token chooses its "
            "experts: take the top k along the last axis."),
        Misconception("one sum for all tokens", _one_sum,
            "You divided by one sum over all tokens. Each token has its own sum, over its k "
            "weights: keep the axis of the tokens."),
        Misconception("sums of the columns",
            lambda logits, k: (lambda top: (top.values / top.values.sum(0), top.indices))(
                logits.float().softmax(-1).topk(k)),
            "Each weight was divided by a sum over all tokens of its column. The k weights of a token "
            "are divided by their own sum."),
        Misconception("sums without their axis",
            lambda logits, k: (lambda top: (top.values / top.values.sum(-1), top.indices))(
                logits.float().softmax(-1).topk(k)),
            "The sums of the rows have lost their axis, so the shapes do not fit. Keep it: one "
            "sum beside each row."),
        Misconception("the lowest", lambda logits, k: _top(
                logits, k, lambda c: c.softmax(-1), largest=False),
            "These are the k experts with the lowest scores. The router's highest scores win."),
        Misconception("experts sorted, weights not", _sorted_experts_only,
            "Right experts and right weights, but not side by side: one was sorted without the "
            "other. Weight i belongs to expert i of the same row."),
        Misconception("shares of the scores", lambda logits, k: _top(
                logits, k, lambda c: c / c.sum(-1, keepdim=True)),
            "The scores were divided by their sum, without exponentials. Scores may be "
            "negative, so this is no set of shares. Use a softmax."),
        Misconception("softmax twice", lambda logits, k: tuple(
                (lambda top: (top.values.softmax(-1), top.indices))(
                    logits.float().softmax(-1).topk(k))),
            "The weights are too even: a softmax of a softmax. After a softmax over all, only "
            "divide by the sum of the chosen."),
        Misconception("sigmoid, renormalised", lambda logits, k: _top(
                logits, k, lambda c: c.sigmoid() / c.sigmoid().sum(-1, keepdim=True)),
            "A sigmoid in the place of the exponential: other models route so. Mixtral takes a "
            "softmax over the chosen scores."),
        Misconception("experts first", lambda logits, k: route(logits, k)[::-1],
            "Weights and experts are returned in the wrong order: weights first, then the "
            "numbers of the experts."),
        Misconception("all experts with zeros", _full_width,
            "There is a column for every expert, with zeros. Only the k chosen are wanted, so "
            "that the others need not be computed."),
        Misconception("a column for every expert", _table_kept,
            "The experts are k for each token, the weights one for every expert. Pick the weights of the "
            "chosen."),
        Misconception("others at zero", _others_at_zero,
            "The scores of those left out were set to 0, which still takes a share: e to the 0 is 1. To "
            "leave out means minus infinity."),
        Misconception("everything above a threshold", _by_threshold,
            "Where scores tie with the last one chosen, more than k experts got a share. Take k of them, "
            "whatever ties."),
        Misconception("all alike", lambda logits, k: _top(logits, k, lambda c: torch.full_like(c, 1 / k)),
            "All chosen experts weigh the same. The better score gets the larger weight: a softmax of the "
            "chosen scores."),
        Misconception("rows picked by experts", lambda logits, k: (lambda experts: (
                logits.float()[experts].softmax(-1), experts))(logits.topk(k).indices),
            "The weights have a third axis: the experts' numbers were used to pick whole rows. gather picks "
            "numbers within each row."),
        Misconception("plain numbers", _plain_numbers,
            "The weights were made of plain numbers or detached, so no gradient gets from them to the scores, "
            "and the router never learns."),
        Misconception("one expert", lambda logits, k: route(logits, 1),
            "Only one expert is chosen for each token. k says how many."),
        Misconception("always two", lambda logits, k: route(logits, 2),
            "Two experts are chosen whatever k says. Mixtral takes two; other models take more."),
        Misconception("half precision kept", lambda logits, k: (
                logits.topk(k).values.softmax(-1), logits.topk(k).indices),
            "With half-precision scores the weights are half precision as well, and rounded. "
            "The router computes in float32."),
        Misconception("float32 too late", lambda logits, k: (
                logits.topk(k).values.softmax(-1).float(), logits.topk(k).indices),
            "The weights are float32, but were rounded before: the softmax ran in half precision. Change the "
            "type of the scores first."),
        Misconception("exponentials overflow", lambda logits, k: _top(
                logits, k, lambda c: c.exp() / c.exp().sum(-1, keepdim=True)),
            "With scores near a thousand the exponential is infinite and gives NaN. The "
            "library's softmax takes care of that."),
        Misconception("scores as weights", lambda logits, k: _top(logits, k, lambda c: c),
            "The scores themselves came out as weights. Make shares of the chosen scores that "
            "sum to 1."),
        Misconception("the first k", lambda logits, k: (
                logits[:, :k].float().softmax(-1),
                torch.arange(k).expand(len(logits), k)),
            "Every token got experts 0, 1 and so on. Which experts are chosen depends on the "
            "token's own scores."),
    ),
    hints=(
        Hint("I do not know where to start",
             "For scores 2.0, 0.1, 1.0 and k = 2: which two experts win, and which two numbers "
             "does the softmax get to see?"),
        Hint("My weights do not sum to 1",
             "Over the chosen scores 2.0 and 1.0 alone the softmax gives 0.73 and 0.27. Over all "
             "three it would leave a part with the third."),
        Hint("I cannot find the operations",
             "scores.float().topk(k, dim=-1) returns values and indices. A softmax over the "
             "last axis of the values; return it with the indices."),
    ),
    praise="Each token names its own experts: the switch of every Mixtral.",
)


# ---------------------------------------------------------------- piece: chosen_experts


class Counting(SwiGLU):
    """A feed-forward that counts the rows it computed."""

    rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += x.numel() // x.shape[-1]
        return super().forward(x)


def _experts(seed: int, count: int, dim: int, hidden: int) -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.ModuleList(Counting(dim, hidden) for _ in range(count))
    for parameter in made.parameters():
        parameter.requires_grad_(False).mul_(2.0)
    return made


def _job(seed, count, dim, hidden, tokens, k, idle=()):
    """experts, x, weights that do not sum to 1, and who was chosen, in no order."""
    chance = torch.Generator().manual_seed(seed)
    busy = torch.tensor([e for e in range(count) if e not in idle])
    chosen = torch.stack([busy[torch.randperm(len(busy), generator=chance)[:k]]
                          for _ in range(tokens)])
    x = _random(seed, tokens, dim)
    x[tokens // 2] = 0.0
    weights = 0.1 + 0.8 * torch.rand(tokens, k, generator=chance)
    return _experts(seed, count, dim, hidden), x, weights, chosen


def seven_tokens_and_an_idle_expert():
    return _job(11, 5, 6, 9, 7, 2, idle=(3,))


def thirteen_tokens_three_of_four():
    return _job(12, 4, 5, 7, 13, 3)


def all_to_the_same_two():
    experts, x, weights, _ = _job(13, 6, 4, 3, 8, 2)
    return experts, x, weights, torch.tensor([5, 0]).repeat(8, 1)


def one_expert_each():
    return _job(14, 5, 6, 4, 9, 1)


def tokens_in_bfloat16():
    experts, x, weights, chosen = _job(15, 4, 6, 5, 9, 2)
    return experts.bfloat16(), x.bfloat16(), weights.bfloat16(), chosen


def _with_count(candidate, experts, x, weights, chosen):
    """The sum, how much work it was, and what could learn from it."""
    out = candidate(experts, x, weights, chosen)
    rows = sum(expert.rows for expert in experts)
    work = "only what was chosen" if rows <= chosen.numel() else "more rows than were chosen"
    x, weights = (part.clone().requires_grad_() for part in (x, weights))
    again = candidate(experts, x * 1, weights * 1, chosen)
    if again.requires_grad:
        again.sum().backward()
    reached = [name for name, part in (("x", x), ("weights", weights)) if part.grad is not None]
    return out, work, f"gradients reach {' and '.join(reached) or 'nothing'}"


def _parts(body):
    """chosen_experts with the step of one expert exchanged: body(out, e, expert, x, w, chosen)"""
    def run(experts, x, weights, chosen):
        out = torch.zeros_like(x)
        for e, expert in enumerate(experts):
            body(out, e, expert, x, weights, chosen)
        return out
    return run


def _step(weigh=lambda w, token, place: w[token, place, None], feed=lambda x, w: x,
          add=lambda out, token, part: out.index_add_(0, token, part)):
    def body(out, e, expert, x, weights, chosen):
        token, place = torch.where(chosen == e)
        if len(token):
            rows = feed(x[token], weights[token, place, None])
            part = weigh(weights, token, place) * expert(rows)
            add(out, token, part)
    return _parts(body)


def _overwrite(out, token, part):
    out[token] = part


def _token_by_token(experts, x, weights, chosen):
    return torch.stack([sum(w * experts[e](row[None])[0] for w, e in zip(ws, es.tolist()))
                        for row, ws, es in zip(x, weights, chosen)])


def _place_by_place(experts, x, weights, chosen):
    out = torch.zeros_like(x)
    for place in range(chosen.shape[1]):
        for e in chosen[:, place].unique().tolist():
            rows = chosen[:, place] == e
            out[rows] += weights[rows, place, None] * experts[e](x[rows])
    return out


def _sorted_once(experts, x, weights, chosen):
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    token = order // chosen.shape[1]
    parts = torch.cat([expert(rows) for expert, rows in zip(experts, x[token].split(counts))])
    return torch.zeros_like(x).index_add_(0, token, weights.flatten()[order, None] * parts)


def _gathered_weights(experts, x, weights, chosen):
    w1, w2, w3 = (torch.stack([getattr(e, n).weight for e in experts])[chosen]
                  for n in ("w1", "w2", "w3"))
    hidden = F.silu(torch.einsum("nkhd,nd->nkh", w1, x)) * torch.einsum("nkhd,nd->nkh", w3, x)
    return torch.einsum("nk,nkdh,nkh->nd", weights, w2, hidden)


def _in_expert_order(experts, x, weights, chosen):
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    rows = x[order // chosen.shape[1]]
    parts = torch.cat([expert(r) for expert, r in zip(experts, rows.split(counts))])
    parts = weights.flatten()[order, None] * parts
    return parts.view(len(x), -1, x.shape[1]).sum(1)


def _dense_sum(experts, x, weights, chosen):
    shares = weights.new_zeros(len(x), len(experts)).scatter(1, chosen, weights)
    return torch.stack([expert(x) for expert in experts], 1).mul(shares[:, :, None]).sum(1)


def _exchanged(read=False, write=False, both=False):
    """Rows and places mixed up: where rows are read, where answers go, or everywhere."""
    def body(out, e, expert, x, weights, chosen):
        token, place = torch.where(chosen == e)
        if both:
            token, place = place, token
        part = weights[token, place, None] * expert(x[place if read else token])
        out[place if write else token] += part
    return _parts(body)


def _after_one_expert(experts, x, weights, chosen):
    token, place = torch.where(chosen == 0)
    return torch.zeros_like(x).index_add_(
        0, token, weights[token, place, None] * experts[0](x[token]))


def _begun_with_x(experts, x, weights, chosen):
    out = x
    for e, expert in enumerate(experts):
        token, place = torch.where(chosen == e)
        out[token] += weights[token, place, None] * expert(x[token])
    return out


def _weights_as_numbers(experts, x, weights, chosen):
    return _token_by_token(experts, x, weights.tolist(), chosen)


def _zeros_of_float32(experts, x, weights, chosen):
    out = torch.zeros(x.shape)
    for e, expert in enumerate(experts):
        token, place = torch.where(chosen == e)
        out[token] += weights[token, place, None] * expert(x[token])
    return out


def _into_the_input(experts, x, weights, chosen):
    x.copy_(chosen_experts(experts, x, weights, chosen))
    return x


def _expert_of_the_place(experts, x, weights, chosen):
    out = torch.zeros_like(x)
    for place in range(chosen.shape[1]):
        out += weights[:, place, None] * experts[place](x)
    return out


def _weights_of_the_expert(experts, x, weights, chosen):
    return _parts(lambda out, e, expert, x, w, chosen: (
        lambda token: out.index_add_(0, token, w[token, e, None] * expert(x[token])))(
            torch.where(chosen == e)[0]))(experts, x, weights, chosen)


CHOSEN_EXPERTS = Exercise(
    name="chosen_experts", chapter=9, kind="piece", piece="moe.chosen_experts",
    entry="chosen_experts", title="The sum over the chosen experts", difficulty="hard",
    importance="essential", minutes=12,
    reference=chosen_experts, run=_with_count,
    fixtures=(seven_tokens_and_an_idle_expert, thirteen_tokens_three_of_four,
              all_to_the_same_two, one_expert_each, tokens_in_bfloat16),
    equivalents={
        "token by token": _token_by_token,
        "place by place": _place_by_place,
        "sorted once": _sorted_once,
        "the weights of the experts gathered": _gathered_weights,
        "added by index": _step(add=lambda out, token, part: out.__setitem__(
            token, out[token] + part)),
    },
    misconceptions=(
        Misconception("overwritten", _step(add=_overwrite),
            "Each token has the answer of one of its experts only, that with the highest number: "
            "the earlier ones were overwritten. Add them up."),
        Misconception("no weights", _step(weigh=lambda w, token, place: 1.0),
            "The experts' answers were added without their weights. Each answer counts as much "
            "as the router says."),
        Misconception("into a copy", _step(add=lambda out, token, part: out[token].add_(part)),
            "All sums are zero: rows picked with a list of numbers are a copy, and the answers went into "
            "that. Add into the table itself."),
        Misconception("weight of the first place",
            _step(weigh=lambda w, token, place: w[token, 0, None]),
            "Every expert was weighed with the token's first weight. An expert that was named "
            "second has the second weight."),
        Misconception("weights not cut to the place",
            _step(weigh=lambda w, token, place: w[token]),
            "All k weights of a token meet the numbers of one answer. Pick one "
            "weight for each row, and give it an axis of size 1."),
        Misconception("no axis for the weights",
            _step(weigh=lambda w, token, place: w[token, place]),
            "There is one weight for each row, but no axis for the numbers in the row, so the "
            "shapes do not fit. Add an axis of size 1."),
        Misconception("added to every row", _step(add=lambda out, token, part: out.add_(part)),
            "The answers of a few rows were added to the whole table, so the shapes do not fit. "
            "Add them to the rows that chose this expert."),
        Misconception("column of the expert", _weights_of_the_expert,
            "The weights were read in the column of the expert's number. They have k columns, "
            "in the order in which the token named its experts."),
        Misconception("only the first choice",
            lambda experts, x, weights, chosen: chosen_experts(
                experts, x, weights[:, :1], chosen[:, :1]),
            "Only each token's first expert was asked. A token has k of them; all their "
            "answers are added."),
        Misconception("every expert on every token", _dense_sum,
            "The values are right, but every expert read every token, and most answers were "
            "thrown away. Give an expert only the rows that chose it."),
        Misconception("expert by place", _expert_of_the_place,
            "Experts 0 to k - 1 did all the work. The place is not the number of the expert: "
            "that stands in chosen."),
        Misconception("order of the experts kept", _in_expert_order,
            "The answers came out in the order of the experts, not of the tokens. Each answer "
            "must go back to the row it came from."),
        Misconception("weights inside", _step(weigh=lambda w, token, place: 1.0,
                                              feed=lambda x, w: w * x),
            "The weight was put on the token before the expert read it. An expert is not "
            "linear: weigh its answer."),
        Misconception("renormalised here",
            lambda experts, x, weights, chosen: chosen_experts(
                experts, x, weights / weights.sum(-1, keepdim=True), chosen),
            "The weights were made to sum to 1 once more. That is the router's work; take them "
            "as they come."),
        Misconception("softmax here",
            lambda experts, x, weights, chosen: chosen_experts(
                experts, x, weights.softmax(-1), chosen),
            "The weights went through a softmax. The router has done that; take them as they come."),
        Misconception("residual added",
            lambda experts, x, weights, chosen: x + chosen_experts(experts, x, weights, chosen),
            "The input was added to the result. The block does that; here only the experts' "
            "answers are summed."),
        Misconception("rows and columns exchanged", _exchanged(both=True),
            "Rows and columns have changed places. The first list has the rows, which are tokens; "
            "the second has the columns, which are places."),
        Misconception("rows read by place", _exchanged(read=True),
            "The experts read rows of x by column number, so only the first k tokens are read. "
            "Take the rows from the list of tokens."),
        Misconception("answers put by place", _exchanged(write=True),
            "Only the first k rows of the result were filled: answers went to column numbers. "
            "Each answer goes back to its token's row."),
        Misconception("returned within the loop", _after_one_expert,
            "Only expert 0 was asked: the result was returned inside the loop. Return it "
            "after all experts."),
        Misconception("begun with x", _begun_with_x,
            "The sum began with x itself, so x was counted too, and changed while later experts "
            "still read it. Begin with zeros."),
        Misconception("zeros of float32", _zeros_of_float32,
            "For tokens in half precision the sum is float32: the zeros have the shape of x, but "
            "not its type."),
        Misconception("weights as numbers", _weights_as_numbers,
            "The values are right, but the weights were made plain numbers. No gradient reaches the router "
            "then, and it never learns."),
        Misconception("no gradient", torch.no_grad()(chosen_experts),
            "The values are right, but gradients are switched off or cut. Neither the router nor what lies "
            "below could learn."),
        Misconception("written into the input", _into_the_input,
            "The result was written into x. Begin with zeros of the same shape."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take one expert, e. In which rows of chosen does its number stand, and in which "
             "column? torch.where of a table of booleans returns both."),
        Hint("Shapes do not fit when I weigh",
             "n tokens chose expert e. Its answer is (n, dim), so its weights must be (n, 1): "
             "index with token and place, and add an axis."),
        Hint("The values are wrong, the shape is right",
             "A token's answer is a sum over k experts: begin with zeros and add into the rows "
             "token, for each expert. Do not overwrite."),
    ),
    praise="Eight experts in memory, two at work: your mixture computes only what was chosen.",
)


# ---------------------------------------------------------------- exercise: total_and_active


def five_layers_of_seven_experts():
    return ModelConfig(dim=10, n_layers=5, n_heads=3, n_kv_heads=1, head_dim=4, hidden_dim=13,
                       vocab_size=90, moe=MoEConfig(7, 2)),


def mixtral_8x7b():
    return ModelConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
                       hidden_dim=14336, vocab_size=32000, moe=MoEConfig(8, 2)),


def three_of_four():
    return ModelConfig(dim=6, n_layers=2, n_heads=5, n_kv_heads=5, head_dim=2, hidden_dim=11,
                       vocab_size=70, moe=MoEConfig(4, 3)),


def _numbers(of):
    """total_and_active from a function of (L, dim, hidden, E, k)."""
    return lambda config: of(config.n_layers, config.dim, config.hidden_dim,
                             config.moe.num_experts, config.moe.num_experts_per_tok)


def _other_parts(config):
    """Everything of a model that is not a feed-forward or a router."""
    attention = 2 * config.dim * config.head_dim * (config.n_heads + config.n_kv_heads)
    return (config.n_layers * (attention + 2 * config.dim)
            + 2 * config.vocab_size * config.dim + config.dim)


def _from_the_library(config):
    count = count_parameters(config)
    return count.total - _other_parts(config), count.active - _other_parts(config)


def _by_modules(config):
    sizes = []
    for n in (config.moe.num_experts, config.moe.num_experts_per_tok):
        with torch.device("meta"):
            experts = [SwiGLU(config.dim, config.hidden_dim) for _ in range(n)]
            gate = nn.Linear(config.dim, config.moe.num_experts, bias=False)
        sizes.append(config.n_layers * sum(
            w.numel() for part in (*experts, gate) for w in part.parameters()))
    return tuple(sizes)


TOTAL_AND_ACTIVE = Exercise(
    name="total_and_active", chapter=9, kind="complete", entry="total_and_active",
    title="In memory, and at work", difficulty="easy", importance="essential", minutes=6,
    reference=_numbers(lambda L, d, h, E, k: (L * (E * 3 * d * h + d * E),
                                              L * (k * 3 * d * h + d * E))),
    fixtures=(five_layers_of_seven_experts, mixtral_8x7b, three_of_four),
    equivalents={
        "the library's count": _from_the_library,
        "real modules": _by_modules,
        "as a list": lambda c: list(_from_the_library(c)),
    },
    misconceptions=(
        Misconception("no router", _numbers(lambda L, d, h, E, k: (
                L * E * 3 * d * h, L * k * 3 * d * h)),
            "The router is missing: in each layer one row of dim numbers for every expert."),
        Misconception("router of the chosen only", _numbers(lambda L, d, h, E, k: (
                L * (E * 3 * d * h + d * E), L * (k * 3 * d * h + d * k))),
            "The active number has a router for k experts. To choose, the router has to score "
            "all E of them."),
        Misconception("router only in the total", _numbers(lambda L, d, h, E, k: (
                L * (E * 3 * d * h + d * E), L * k * 3 * d * h)),
            "The router is missing from the active parameters. It works for every token."),
        Misconception("two matrices", _numbers(lambda L, d, h, E, k: (
                L * (E * 2 * d * h + d * E), L * (k * 2 * d * h + d * E))),
            "Each expert was counted with two matrices. A SwiGLU has three: the gate, the value "
            "and the way back."),
        Misconception("one matrix", _numbers(lambda L, d, h, E, k: (
                L * (E * d * h + d * E), L * (k * d * h + d * E))),
            "Each expert was counted with one matrix. A SwiGLU has three of this size."),
        Misconception("those at rest", _numbers(lambda L, d, h, E, k: (
                L * (E * 3 * d * h + d * E), L * (E - k) * 3 * d * h)),
            "The second number has the experts that rest. Those that work are asked for: k of them."),
        Misconception("one layer", _numbers(lambda L, d, h, E, k: (
                E * 3 * d * h + d * E, k * 3 * d * h + d * E)),
            "That is one layer. Every layer has experts and a router of its own."),
        Misconception("one router for all layers", _numbers(lambda L, d, h, E, k: (
                L * E * 3 * d * h + d * E, L * k * 3 * d * h + d * E)),
            "The router was counted once for the whole model. Each layer has its own."),
        Misconception("a router for every expert", _numbers(lambda L, d, h, E, k: (
                L * E * (3 * d * h + d * E), L * k * (3 * d * h + d * E))),
            "The router was counted once for every expert. A layer has one router, which scores "
            "all of them."),
        Misconception("router reads the hidden numbers", _numbers(lambda L, d, h, E, k: (
                L * (E * 3 * d * h + h * E), L * (k * 3 * d * h + h * E))),
            "The router was given hidden_dim numbers for each expert. It reads the token, which "
            "has dim numbers."),
        Misconception("all active", _numbers(lambda L, d, h, E, k: (
                L * (E * 3 * d * h + d * E),) * 2),
            "Both numbers are the total. Only k of the E experts work on a token."),
        Misconception("one expert active", _numbers(lambda L, d, h, E, k: (
                L * (E * 3 * d * h + d * E), L * (3 * d * h + d * E))),
            "One expert was counted as active. A token uses k of them."),
        Misconception("the wrong way round", _numbers(lambda L, d, h, E, k: (
                L * (k * 3 * d * h + d * E), L * (E * 3 * d * h + d * E))),
            "The two numbers are exchanged: first all that lies in memory, then what works on "
            "one token."),
        Misconception("whole model", lambda c: tuple(count_parameters(c)),
            "You counted the whole model. Attention, norms and embeddings are there once and are "
            "not asked for here."),
        Misconception("width shared out", _numbers(lambda L, d, h, E, k: (
                L * (3 * d * h + d * E), L * (3 * d * h * k // E + d * E))),
            "The width was divided among the experts. In Mistral's files hidden_dim is the width "
            "of one expert."),
    ),
    hints=(
        Hint("I do not know where to start",
             "How many numbers has one expert? It has three matrices, each of dim times "
             "hidden_dim numbers."),
        Hint("It is too small by a little",
             "The router of a layer has dim times E numbers. For Mixtral that is 32,768 in each "
             "layer, in both results."),
        Hint("The two results are equal, or far off",
             "L * (experts * 3 * dim * hidden_dim + dim * E): once with all E experts, once with "
             "the k chosen ones."),
    ),
    praise="Memory follows the first number, arithmetic the second.",
)


# ---------------------------------------------------------------- exercise: order

MIXTURE_IN_ORDER = Exercise(
    name="mixture_in_order", chapter=9, kind="order", title="One layer of experts",
    difficulty="easy", importance="essential", minutes=6,
    lines=(
        "tokens = x.flatten(0, -2)",
        "logits = gate(tokens)",
        "best, chosen = logits.topk(k, dim=-1)",
        "weights = best.softmax(dim=-1)",
        "out = torch.zeros_like(tokens)",
        "for e, expert in enumerate(experts):",
        "    token, place = torch.where(chosen == e)",
        "    out[token] += weights[token, place, None] * expert(tokens[token])",
        "return out.view_as(x)",
    ),
    distractors=("weights = logits.softmax(dim=-1)[:, :k]",),
    equivalents={
        f"zeros in place {place}": tuple(
            [0, 1, 2, 3][:place] + [4] + [0, 1, 2, 3][place:] + [5, 6, 7, 8])
        for place in range(1, 4)
    },
    misconceptions=(
        Misconception("weights of the first k experts", "with 9 and without 3",
            "One line takes the shares of experts 0 to k - 1, whoever was chosen. The weights "
            "belong to the chosen scores."),
        Misconception("both kinds of weights", "with 9",
            "Two lines make weights, and the later one undoes the other. One of them is the "
            "mistake that stays out."),
        Misconception("no softmax", "without 3",
            "The weights are never made. The best scores have to become shares first."),
        Misconception("no zeros", "without 4",
            "There is nothing to add to: the sum needs zeros to begin with."),
        Misconception("tokens not laid in a row", "without 0 or 1 before 0 or 4 before 0",
            "The batch was not laid out as rows of tokens, which the first lines need."),
        Misconception("chosen before there are scores", "2 before 1",
            "The best experts are chosen before there are scores. Which line makes them?"),
        Misconception("softmax before the choice", "3 before 2",
            "The best scores are used before they are chosen. Among these lines, the choice comes "
            "first."),
        Misconception("zeros for every expert", "5 before 4",
            "The zeros come after the loop has begun, so answers that were added are wiped out. "
            "Make them once, before the loop."),
        Misconception("weights in the loop", "5 before 3",
            "The loop begins before the weights are made. They are made once, for all experts."),
        Misconception("indented above the loop", "6 before 5",
            "An indented line belongs to the loop, so it stands below the loop's first line."),
        Misconception("used before found", "7 before 6",
            "An expert's rows are used before they are looked up."),
        Misconception("returned within the loop", "8 before 7",
            "The result is returned before anything was added to it. All experts come first."),
    ),
    hints=(
        Hint("I do not know which line is first",
             "Which line needs nothing but x? Which one needs only what that line makes?"),
        Hint("Two lines make weights",
             "For scores 2.0, 0.1, 1.0 and k = 2 experts 0 and 2 are chosen. Which line gives "
             "expert 2 its own weight?"),
        Hint("The order is still refused",
             "Rows, scores, choice, weights, zeros; then the loop: find the rows, add the "
             "answers; last, the old shape."),
    ),
    praise="Score, choose, weigh, sum: nine lines make a mixture.",
)


# ---------------------------------------------------------------- exercise: tidy_route (bug)


def _tidy(weights, experts):
    """tidy_route from what is done to the weights and to the experts of route."""
    def tidy_route(logits, k):
        w, e = route(logits, k)
        order = e.argsort(dim=-1)
        return weights(w, e, order), experts(w, e, order)
    return tidy_route


def _gathered(x, order):
    return x.gather(1, order)


def _ordered(expected, actual) -> str | None:
    found = difference(expected, actual, same_dtype=True)
    return found and found.text


TIDY_ROUTE = Exercise(
    name="tidy_route", chapter=9, kind="bug", entry="tidy_route",
    title="A tidy router that makes the model worse", difficulty="medium",
    importance="essential", minutes=8,
    reference=_tidy(lambda w, e, o: _gathered(w, o), lambda w, e, o: _gathered(e, o)),
    fixtures=(seven_tokens_five_experts, nine_tokens_six_experts_three_chosen),
    compare=_ordered,
    equivalents={
        "the experts sorted, then their scores": lambda logits, k: (
            lambda e: (logits.float().gather(1, e).softmax(-1), e))(
                logits.topk(k).indices.sort(dim=-1).values),
        "row by row": lambda logits, k: tuple(torch.stack(x) for x in zip(*[
            (w[e.argsort()], e.sort().values) for w, e in zip(*route(logits, k))])),
        "take_along_dim": _tidy(lambda w, e, o: torch.take_along_dim(w, o, 1),
                                lambda w, e, o: e.sort(dim=-1).values),
    },
    misconceptions=(
        Misconception("unchanged", _tidy(lambda w, e, o: w, lambda w, e, o: e.sort(dim=-1).values),
            "The experts are sorted and their weights stay where they were: many experts now "
            "have another one's weight. Both must move together."),
        Misconception("weights sorted as well",
            _tidy(lambda w, e, o: w.sort(dim=-1).values, lambda w, e, o: e.sort(dim=-1).values),
            "The weights were sorted by their own size. They have to follow their experts, so "
            "use the order that sorted those."),
        Misconception("nothing sorted", lambda logits, k: route(logits, k),
            "The experts come by score again. They should be in rising order, each with its own "
            "weight."),
        Misconception("order applied the wrong way",
            _tidy(lambda w, e, o: torch.zeros_like(w).scatter(1, o, w),
                  lambda w, e, o: e.sort(dim=-1).values),
            "The weights were moved, but in the inverse direction. With three chosen experts the "
            "two differ; gather, do not scatter."),
        Misconception("order of the tokens",
            _tidy(lambda w, e, o: w.gather(0, o), lambda w, e, o: e.sort(dim=-1).values),
            "The order was applied along the tokens, so weights came from other rows. It belongs "
            "to the last axis."),
        Misconception("experts for places",
            _tidy(lambda w, e, o: w.gather(1, e.sort(dim=-1).values), lambda w, e, o: e.sort(dim=-1).values),
            "The experts' numbers were used as places among k weights. The order that sort returns names "
            "places."),
        Misconception("softmax over all",
            lambda logits, k: (lambda e: (logits.float().softmax(-1).gather(1, e), e))(
                logits.topk(k).indices.sort(dim=-1).values),
            "The weights are shares among all experts, so they sum to less than 1. Those of route only "
            "change places."),
        Misconception("scores for weights",
            lambda logits, k: (lambda e: (logits.float().gather(1, e), e))(
                logits.topk(k).indices.sort(dim=-1).values),
            "These are the experts' scores. Their weights, which route has made, should change places."),
        Misconception("weights indexed by the order",
            _tidy(lambda w, e, o: w[o], lambda w, e, o: e.sort(dim=-1).values),
            "The weights got a third axis: the order was used to pick whole rows. It names "
            "places within each row; gather picks those."),
        Misconception("falling order",
            _tidy(lambda w, e, o: _gathered(w, o.flip(-1)),
                  lambda w, e, o: _gathered(e, o.flip(-1))),
            "Experts and weights move together, but the experts fall. They should rise."),
        Misconception("sorted by weight",
            _tidy(lambda w, e, o: w.flip(-1), lambda w, e, o: e.flip(-1)),
            "Pairs stay together, but in the order of their weights. The experts' numbers should "
            "rise."),
        Misconception("experts left, weights moved",
            _tidy(lambda w, e, o: _gathered(w, o), lambda w, e, o: e),
            "Now the weights have moved and the experts have not. Apply the same order to both."),
        Misconception("the order for the experts",
            _tidy(lambda w, e, o: _gathered(w, o), lambda w, e, o: o),
            "The order itself was returned as the experts. It says which place comes first, not "
            "which expert stands there."),
    ),
    hints=(
        Hint("I do not see the bug",
             "A token chose expert 3 with weight 0.9 and expert 1 with 0.1. What are its two "
             "rows after the sort?"),
        Hint("I can sort the experts but not the weights",
             "sort returns two things: values 1, 3 and the order 1, 0. The order says from which "
             "place each value came."),
        Hint("I cannot apply the order",
             "weights.gather(-1, order) picks, in each row, the numbers at the places that order "
             "names."),
    ),
    praise="Experts and weights move together: a pair that is sorted apart is lost.",
)


# ---------------------------------------------------------------- exercise: balance_of_real_tokens


def _padded(seed, tokens, experts, real):
    logits = 1.5 * _random(seed, tokens, experts)
    logits[:, 1] += 1.2
    logits[~real] -= torch.arange(experts) * 1.5
    return logits, real


def eleven_tokens_four_of_padding():
    real = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0]).bool()
    logits, real = _padded(21, 11, 5, real)
    return logits, 2, real


def nine_tokens_of_seven_experts():
    real = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1, 1]).bool()
    logits, real = _padded(22, 9, 7, real)
    logits[real, 6] -= 9.0                          # no real token chooses the last expert
    return logits, 3, real


def no_padding_at_all():
    logits, real = _padded(23, 6, 4, torch.ones(6).bool())
    return logits, 1, real


def _balance(used=None, wanted=None, join=None):
    """balance_of_real_tokens from its three steps."""
    def balance_of_real_tokens(logits, k, real):
        E = logits.shape[1]
        f = (used or _right_used)(logits, k, real)
        P = (wanted or _right_wanted)(logits, k, real)
        return (join or (lambda E, k, f, P: E * (f * P).sum()))(E, k, f, P)
    return balance_of_real_tokens


def _counted(chosen, E):
    return torch.bincount(chosen.flatten(), minlength=E).float()


def _right_used(logits, k, real):
    return _counted(route(logits[real], k)[1], logits.shape[1]) / real.sum()


def _right_wanted(logits, k, real):
    return logits[real].softmax(-1).mean(0)


def _one_number(expected, actual) -> str | None:
    if isinstance(actual, Tensor) and actual.numel() == 1:
        actual = actual.reshape(())
    if isinstance(expected, Tensor) and expected.numel() == 1:
        expected = expected.reshape(())
    found = difference(expected, actual)
    return found and found.text


def _weighed_table(logits, k):
    weights, experts = route(logits, k)
    return torch.zeros(logits.shape).scatter(1, experts, weights)


BALANCE = Exercise(
    name="balance_of_real_tokens", chapter=9, kind="function", entry="balance_of_real_tokens",
    title="Padding does not count", difficulty="medium", importance="essential", minutes=12,
    reference=_balance(),
    fixtures=(eleven_tokens_four_of_padding, nine_tokens_of_seven_experts, no_padding_at_all),
    compare=_one_number,
    equivalents={
        "a tensor with an axis": lambda logits, k, real: balance_loss([logits[real]], k)[None],
        "a Python number": lambda logits, k, real: balance_loss([logits[real]], k).item(),
        "the library's on what is left": lambda logits, k, real: balance_loss([logits[real]], k),
        "with a mask": lambda logits, k, real: logits.shape[1] * (
            (torch.zeros(logits.shape).scatter(1, logits.topk(k).indices, 1.0)
             * real[:, None]).sum(0) / real.sum()
            * (logits.softmax(-1) * real[:, None]).sum(0) / real.sum()).sum(),
        "expert by expert": lambda logits, k, real: sum(
            (logits[real].topk(k).indices == e).sum() / real.sum()
            * logits[real].softmax(-1)[:, e].mean() for e in range(logits.shape[1])
        ) * logits.shape[1],
    },
    misconceptions=(
        Misconception("padding counts", lambda logits, k, real: balance_loss([logits], k),
            "Padding was counted like real tokens. Both shares, of the choices and of the "
            "probabilities, are taken over real tokens only."),
        Misconception("padding set to zero",
            lambda logits, k, real: balance_loss([logits * real[:, None]], k),
            "The scores of padding were set to 0, but its rows are still there: they choose "
            "experts and have probabilities. Leave the rows out."),
        Misconception("padding minus infinity", lambda logits, k, real: balance_loss(
                [logits.masked_fill(~real[:, None], -torch.inf)], k),
            "A row of minus infinities has no softmax, only NaN. Leave the rows of padding out "
            "altogether."),
        Misconception("padding only", lambda logits, k, real: balance_loss([logits[~real]], k),
            "The loss was taken over the padding. Real tokens are those where real is True."),
        Misconception("choices of padding count",
            _balance(used=lambda x, k, r: _counted(route(x, k)[1], x.shape[1]) / len(x)),
            "The probabilities leave padding out, the choices still count it."),
        Misconception("probabilities of padding count",
            _balance(wanted=lambda x, k, r: x.softmax(-1).mean(0)),
            "The choices leave padding out, the mean probabilities still contain it."),
        Misconception("divided by all tokens",
            _balance(used=lambda x, k, r: _counted(route(x[r], k)[1], x.shape[1]) / len(x)),
            "One of the two sums over real tokens was divided by the number of all tokens. Divide "
            "both by the number of real ones."),
        Misconception("both divided by all tokens",
            _balance(used=lambda x, k, r: _counted(route(x[r], k)[1], x.shape[1]) / len(x),
                     wanted=lambda x, k, r: x[r].softmax(-1).sum(0) / len(x)),
            "Both sums over real tokens were divided by the number of all tokens. Divide by the "
            "real ones, twice."),
        Misconception("last experts cut off",
            _balance(used=lambda x, k, r: torch.bincount(route(x[r], k)[1].flatten()) / r.sum()),
            "The counts end with the highest expert that was chosen, so f is shorter than P. It "
            "needs an entry for every expert."),
        Misconception("no mean over the tokens",
            _balance(wanted=lambda x, k, r: x[r].softmax(-1).sum(0)),
            "The probabilities were added over the tokens. P is their mean over the real tokens."),
        Misconception("f sums to 1",
            _balance(used=lambda x, k, r: _counted(route(x[r], k)[1], x.shape[1]) / (k * r.sum())),
            "It is k times too small: you divided by the number of choices. f is taken per "
            "token and sums to k."),
        Misconception("no factor E", _balance(join=lambda E, k, f, P: (f * P).sum()),
            "It is E times too small: the factor E is missing, or a mean was taken over the "
            "experts where their sum belongs."),
        Misconception("first choices only",
            _balance(used=lambda x, k, r: _counted(x[r].argmax(-1), x.shape[1]) / r.sum()),
            "Only each token's first choice was counted. All k choices are use of an expert."),
        Misconception("weights for choices",
            _balance(used=lambda x, k, r: _weighed_table(x[r], k).mean(0)),
            "For f the weights were added up. f counts choices: each of the k counts 1, however "
            "small its weight."),
        Misconception("probabilities for choices", _balance(used=_right_wanted),
            "Both factors are mean probabilities. f is counted from the choices that were made."),
        Misconception("choices for probabilities", _balance(wanted=_right_used),
            "Both factors are counts, and counts have no gradient: nothing could be learned. P "
            "is the mean of the softmax."),
        Misconception("weights for probabilities",
            _balance(wanted=lambda x, k, r: _weighed_table(x[r], k).mean(0)),
            "P was taken from the renormalised weights of the chosen. It is the mean of the "
            "softmax over all experts."),
        Misconception("softmax over the tokens",
            _balance(wanted=lambda x, k, r: x[r].softmax(0).mean(0)),
            "The softmax ran over the tokens, which makes every P the same. It runs over the "
            "experts, row by row."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Which rows are real? If you take only those first, what is left to be done?"),
        Hint("Even use does not give k",
             "4 experts, k = 2, even: f is 0.5 each, P is 0.25 each, so the sum is 0.5, and "
             "times E it is 2."),
        Hint("I do not know how to count choices",
             "bincount of the flattened top-k indices, with minlength = E, over the number of "
             "real tokens."),
    ),
    praise="Short texts in a batch no longer teach the router where padding should go.",
)


# ---------------------------------------------------------------- exercise: group_by_expert


def _chosen(seed, tokens, experts, k, idle):
    chance = torch.Generator().manual_seed(seed)
    busy = torch.tensor([e for e in range(experts) if e not in idle])
    rows = [busy[torch.randperm(len(busy), generator=chance)[:k]] for _ in range(tokens)]
    return torch.stack(rows), experts


def seven_tokens_two_idle_experts():
    return _chosen(31, 7, 6, 2, idle=(2, 5))


def eleven_tokens_three_choices():
    return _chosen(32, 11, 5, 3, idle=())


def one_choice_each():
    return _chosen(33, 8, 4, 1, idle=(0,))


def _grouped(token=lambda o, k: o // k, place=lambda o, k: o % k,
             counts=lambda c, E: torch.bincount(c.flatten(), minlength=E),
             order=lambda c: c.flatten().argsort(stable=True)):
    def group_by_expert(chosen, n_experts):
        o, k = order(chosen), chosen.shape[1]
        return token(o, k), place(o, k), counts(chosen, n_experts)
    return group_by_expert


def _by_where(chosen, n_experts):
    found = [torch.where(chosen == e) for e in range(n_experts)]
    return (torch.cat([t for t, _ in found]), torch.cat([p for _, p in found]),
            torch.tensor([len(t) for t, _ in found]))


def _by_lists(chosen, n_experts):
    rows = sorted((e, t, p) for t, row in enumerate(chosen.tolist()) for p, e in enumerate(row))
    counts = [sum(e == n for e, _, _ in rows) for n in range(n_experts)]
    return [t for _, t, _ in rows], [p for _, _, p in rows], counts


def _same_groups(expected, actual) -> str | None:
    found = difference(expected, actual)
    if found is None:
        return None
    try:
        wanted, got = ([torch.as_tensor(part) for part in parts] for parts in (expected, actual))
        groups = torch.arange(len(wanted[2])).repeat_interleave(wanted[2])
        pairs = [sorted(zip(groups.tolist(), t.tolist(), p.tolist())) for t, p, _ in (wanted, got)]
        if pairs[0] == pairs[1] and torch.equal(wanted[2], got[2]):
            return ("every group has the right members, but their rows do not rise; a stable sort, "
                    "row by row, keeps them in order")
    except Exception:  # of another kind, or another length: the difference says it
        pass
    return found.text


GROUP = Exercise(
    name="group_by_expert", chapter=9, kind="function", entry="group_by_expert",
    title="Sort once, cut into groups", difficulty="hard", importance="useful", minutes=12,
    reference=_grouped(),
    fixtures=(seven_tokens_two_idle_experts, eleven_tokens_three_choices, one_choice_each),
    compare=_same_groups,
    equivalents={
        "where for every expert": _by_where,
        "lists": _by_lists,
        "divmod": lambda chosen, n_experts: (
            lambda o: (torch.div(o, chosen.shape[1], rounding_mode="floor"),
                       torch.remainder(o, chosen.shape[1]),
                       torch.stack([(chosen == e).sum() for e in range(n_experts)])))(
                chosen.flatten().sort(stable=True).indices),
    },
    misconceptions=(
        Misconception("slots for tokens", _grouped(token=lambda o, k: o),
            "The first result counts slots up to N times k. Slot s belongs to token s // k."),
        Misconception("remainder for the token", _grouped(token=lambda o, k: o % k,
                                                          place=lambda o, k: o // k),
            "Token and place are exchanged: k slots in a row belong to one token, so the token "
            "is s // k and the place s % k."),
        Misconception("divided by the number of tokens",
            lambda chosen, n_experts: (lambda o, n: (
                o // n, o % n, torch.bincount(chosen.flatten(), minlength=n_experts)))(
                    chosen.flatten().argsort(stable=True), len(chosen)),
            "Slots were divided by the number of tokens. Row by row there are k slots for each "
            "token: divide by k."),
        Misconception("divided by the number of experts",
            lambda chosen, n_experts: _grouped(token=lambda o, k: o // n_experts,
                                               place=lambda o, k: o % n_experts)(chosen, n_experts),
            "Slots were divided by the number of experts. The table has k columns: divide by k."),
        Misconception("k taken for two", _grouped(token=lambda o, k: o // 2, place=lambda o, k: o % 2),
            "Slots were divided by 2. A token has k of them, as many as the table has columns."),
        Misconception("where each slot goes",
            _grouped(order=lambda c: c.flatten().argsort(stable=True).argsort()),
            "This is the inverse: for each slot its place in the sorted row. What is asked for is which slot "
            "stands there."),
        Misconception("rows numbered in turn", lambda chosen, n_experts: (lambda o: (
                torch.arange(len(chosen)).repeat(chosen.shape[1])[o], o % chosen.shape[1],
                torch.bincount(chosen.flatten(), minlength=n_experts)))(chosen.flatten().argsort(stable=True)),
            "The rows were numbered 0, 1, 2 ... again and again. Row by row each number comes k times before "
            "the next."),
        Misconception("sorted experts for the order",
            _grouped(order=lambda c: c.flatten().sort().values),
            "The sorted expert numbers were used as if they were slots. The order is what argsort "
            "returns: where each entry stood."),
        Misconception("not grouped", _grouped(order=lambda c: torch.arange(c.numel())),
            "The slots are still in the order of the table. All slots of expert 0 come first, "
            "then those of expert 1."),
        Misconception("tokens and places both floored", _grouped(place=lambda o, k: o // k),
            "The places are token numbers. Within the k slots of a token the place is the "
            "remainder."),
        Misconception("flattened the other way",
            _grouped(order=lambda c: c.T.flatten().argsort(stable=True)),
            "The table was flattened column by column, and then cut as if row by row. Slots of "
            "one token must lie side by side."),
        Misconception("falling order",
            _grouped(order=lambda c: c.flatten().argsort(descending=True, stable=True)),
            "The groups come from the last expert to the first. Expert 0 is first, as in the "
            "counts."),
        Misconception("idle experts left out",
            _grouped(counts=lambda c, E: c.unique(return_counts=True)[1]),
            "Experts that nobody chose have no entry in the counts. There has to be one for "
            "every expert, 0 included."),
        Misconception("last experts cut off",
            _grouped(counts=lambda c, E: torch.bincount(c.flatten())),
            "The counts end with the highest expert that was chosen. They need an entry for "
            "every expert."),
        Misconception("borders for counts",
            _grouped(counts=lambda c, E: torch.bincount(c.flatten(), minlength=E).cumsum(0)),
            "The third result has the ends of the groups. Their sizes are asked for."),
        Misconception("first choices counted",
            _grouped(counts=lambda c, E: torch.bincount(c[:, 0], minlength=E)),
            "Only first choices were counted. All k columns belong to some group."),
        Misconception("rows sorted one by one",
            lambda chosen, n_experts: (
                torch.arange(len(chosen)).repeat_interleave(chosen.shape[1]),
                chosen.argsort(dim=-1).flatten(),
                torch.bincount(chosen.flatten(), minlength=n_experts)),
            "Every row was sorted by itself, so the groups are still mixed. Lay all slots in one "
            "row and sort that."),
        Misconception("experts for places",
            lambda chosen, n_experts: (
                _by_where(chosen, n_experts)[0], chosen.flatten().sort().values,
                _by_where(chosen, n_experts)[2]),
            "The second result holds the experts themselves. The column is asked for in which "
            "the token named them."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Lay the table in one row. With k = 2, to which token and to which column belongs "
             "slot 5?"),
        Hint("Right numbers, other order within a group",
             "Within a group the tokens rise. A stable argsort keeps equal entries in the order "
             "in which they stood."),
        Hint("I need the structure",
             "order = argsort of the flattened table, stable; token = order // k; place = order "
             "% k; counts by bincount with minlength."),
    ),
    praise="One sort, and every expert's rows lie side by side: so large libraries do it.",
)


# ---------------------------------------------------------------- exercise: expected_experts


def eight_experts_five_tokens():
    return 8, 2, 5


def six_experts_four_tokens():
    return 6, 3, 4


def one_token():
    return 9, 2, 1


def a_hundred_experts():
    return 128, 4, 33


EXPECTED = Exercise(
    name="expected_experts", chapter=9, kind="complete", entry="expected_experts",
    title="How many experts a batch wakes up", difficulty="medium", importance="useful",
    minutes=8,
    reference=lambda E, k, batch: E * (1 - (1 - k / E) ** batch),
    fixtures=(eight_experts_five_tokens, six_experts_four_tokens, one_token, a_hundred_experts),
    equivalents={
        "step by step": lambda E, k, batch: _stepwise(E, k, batch),
        "a geometric sum": lambda E, k, batch: k * sum((1 - k / E) ** b for b in range(batch)),
        "as a tensor": lambda E, k, batch: torch.tensor(
            E - E * ((E - k) / E) ** batch, dtype=torch.float64),
    },
    misconceptions=(
        Misconception("no overlap", lambda E, k, batch: min(E, k * batch),
            "You let all tokens choose different experts. They choose without looking at each "
            "other, so they often agree."),
        Misconception("no overlap, no end", lambda E, k, batch: k * batch,
            "That is the number of choices. Several tokens may choose the same expert, and there "
            "are only E."),
        Misconception("the two choices independent",
            lambda E, k, batch: E * (1 - (1 - 1 / E) ** (k * batch)),
            "One token gives less than k here: its choices were drawn with repetition. The k "
            "experts of one token differ from each other."),
        Misconception("one choice for each token",
            lambda E, k, batch: E * (1 - (1 - 1 / E) ** batch),
            "It counts one choice for each token. An expert is spared by a token with "
            "probability 1 - k / E."),
        Misconception("k counted twice", lambda E, k, batch: E * (1 - (1 - k / E) ** (k * batch)),
            "All k choices of a token are in 1 - k / E already. The power is the number of tokens."),
        Misconception("times for power", lambda E, k, batch: E * (1 - (1 - k / E) * batch),
            "The probability was multiplied by the batch. That every one of the tokens spares an "
            "expert is a product: a power."),
        Misconception("batch and k exchanged", lambda E, k, batch: E * (1 - (1 - batch / E) ** k),
            "Batch and k have changed places. A token spares an expert with 1 - k / E, and every token of "
            "the batch has to."),
        Misconception("k in front", lambda E, k, batch: k * (1 - (1 - k / E) ** batch),
            "The probability was multiplied by k. It belongs to each of E experts."),
        Misconception("a probability taken from E", lambda E, k, batch: E - (1 - k / E) ** batch,
            "A probability was taken away from a number of experts. On average E times that probability are "
            "spared."),
        Misconception("power without brackets", lambda E, k, batch: E * (1 - (1 - k / E**batch)),
            "Only E was raised to the power. The whole of 1 - k / E needs brackets."),
        Misconception("rounded", lambda E, k, batch: round(E * (1 - (1 - k / E) ** batch)),
            "The result was made a whole number. A mean over many batches need not be one.",
            also=[lambda E, k, batch: int(E * (1 - (1 - k / E) ** batch)),
                  lambda E, k, batch: math.ceil(E * (1 - (1 - k / E) ** batch)),
                  lambda E, k, batch: round(E * (1 - (1 - k / E) ** batch), 1)]),
        Misconception("a probability", lambda E, k, batch: 1 - (1 - k / E) ** batch,
            "That is the probability for one expert. There are E of them: add up.",
            also=[lambda E, k, batch: (1 - k / E) ** batch]),
        Misconception("those at rest", lambda E, k, batch: E * (1 - k / E) ** batch,
            "That is the number of experts that nobody chose. The others are asked for."),
        Misconception("everybody chooses it", lambda E, k, batch: E * (1 - (k / E) ** batch),
            "You took the probability that all tokens choose an expert. What counts is that "
            "none of them does."),
        Misconception("all tokens agree", lambda E, k, batch: E * (k / E) ** batch,
            "That counts experts chosen by every token. One token is enough to wake an expert."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Take one expert. With what probability does a single token leave it alone? And all "
             "tokens of the batch?"),
        Hint("One token does not give k",
             "With 8 experts and 2 chosen a token leaves an expert alone with probability 6 / 8. "
             "For B tokens: (6 / 8) to the power B."),
        Hint("I have the probability",
             "The expected number is E times the probability that an expert is chosen by at "
             "least one token."),
    ),
    praise="Two experts for one token, nearly all of them for sixteen.",
)


def _stepwise(E, k, batch):
    awake = 0.0
    for _ in range(batch):
        awake += k * (1 - awake / E)
    return awake


# ---------------------------------------------------------------- exercise: cut_feed_forward


def _matrices(seed, dim, hidden, parts):
    return (_random(seed, hidden, dim), _random(seed + 1, dim, hidden),
            _random(seed + 2, hidden, dim), parts)


def twelve_wide_in_three():
    return _matrices(41, 5, 12, 3)


def twenty_wide_in_five():
    return _matrices(45, 7, 20, 5)


def _use_experts(candidate, w1, w2, w3, parts):
    """How many experts, their shapes, and the sum of their answers on some rows."""
    experts = candidate(w1, w2, w3, parts)
    shapes = [tuple(tuple(m.shape) for m in expert) for expert in experts]
    x = _random(49, 4, w1.shape[1])
    try:
        total = sum(F.linear(F.silu(F.linear(x, a)) * F.linear(x, c), b) for a, b, c in experts)
    except (RuntimeError, ValueError):
        total = "shapes that do not fit"
    return {"the number of experts": len(shapes), "the shapes": shapes, "the sum of the answers": total}


def _cut(first=lambda w, n: w.chunk(n), second=lambda w, n: w.chunk(n, dim=1),
         third=lambda w, n: w.chunk(n)):
    return lambda w1, w2, w3, parts: list(zip(first(w1, parts), second(w2, parts),
                                              third(w3, parts)))


CUT = Exercise(
    name="cut_feed_forward", chapter=9, kind="open", entry="cut_feed_forward",
    title="Experts made from a dense model", difficulty="hard", importance="optional",
    minutes=20,
    reference=_cut(),
    fixtures=(twelve_wide_in_three, twenty_wide_in_five),
    run=_use_experts,
    equivalents={
        "slices": lambda w1, w2, w3, n: [
            (w1[i:i + len(w1) // n], w2[:, i:i + len(w1) // n], w3[i:i + len(w1) // n])
            for i in range(0, len(w1), len(w1) // n)],
        "every n-th number": lambda w1, w2, w3, n: [
            (w1[i::n], w2[:, i::n], w3[i::n]) for i in range(n)],
        "in reverse order": lambda w1, w2, w3, n: _cut()(w1, w2, w3, n)[::-1],
        "unflatten": lambda w1, w2, w3, n: list(zip(
            w1.unflatten(0, (n, -1)), w2.unflatten(1, (n, -1)).unbind(1),
            w3.unflatten(0, (n, -1)))),
    },
    misconceptions=(
        Misconception("a copy for each", lambda w1, w2, w3, n: [(w1, w2, w3)] * n,
            "Every expert is the whole feed-forward, so the sum is too large by the number of "
            "experts. Each should have a part of the hidden numbers."),
        Misconception("copies, divided", lambda w1, w2, w3, n: [(w1, w2 / n, w3)] * n,
            "The sum is right, but every expert is the whole feed-forward, so nothing is saved. "
            "Each should have a part of the hidden numbers."),
        Misconception("w2 cut by rows", _cut(second=lambda w, n: w.tensor_split(n)),
            "w2 was cut along the numbers that come out. The hidden numbers are the columns of "
            "w2: that is the axis to cut."),
        Misconception("w1 and w3 cut by columns",
            _cut(first=lambda w, n: w.tensor_split(n, dim=1),
                 third=lambda w, n: w.tensor_split(n, dim=1)),
            "w1 and w3 were cut along the numbers that come in. Each expert reads the whole "
            "token; the hidden numbers are the rows."),
        Misconception("w1 or w3 not cut", _cut(third=lambda w, n: [w] * n),
            "w1 or w3 is whole in every expert. Gate and value meet number by number, so both "
            "need the same rows."),
        Misconception("w2 turned", _cut(second=lambda w, n: [p.T for p in w.chunk(n, 1)]),
            "w2 was transposed as well as cut. It stays (dim, hidden), with fewer columns."),
        Misconception("w2 reshaped", _cut(second=lambda w, n: w.reshape(n, len(w), -1)),
            "w2 was reshaped, which cuts along its rows. The parts have the right shape and the wrong numbers: "
            "cut between columns."),
        Misconception("other columns", _cut(first=lambda w, n: [w[i::n] for i in range(n)],
                                            third=lambda w, n: [w[i::n] for i in range(n)]),
            "The three matrices of an expert do not have the same hidden numbers: row by row in w1 and w3, "
            "column by column in w2.", also=[_cut(third=lambda w, n: [w[i::n] for i in range(n)])]),
        Misconception("read once", lambda w1, w2, w3, n: zip(w1.chunk(n), w2.chunk(n, 1), w3.chunk(n)),
            "This can be read once only, and a layer reads its experts at every call. Make a list of it."),
        Misconception("w2 not cut", _cut(second=lambda w, n: [w] * n),
            "w2 is whole in every expert. It leads back from the hidden numbers that the expert "
            "has, so it needs their columns only."),
        Misconception("w3 before w2",
            lambda w1, w2, w3, n: [(a, c, b) for a, b, c in _cut()(w1, w2, w3, n)],
            "The second matrix of a triple is not the way back. The order is w1, w2, w3."),
        Misconception("three lists",
            lambda w1, w2, w3, n: [w1.chunk(n), w2.chunk(n, dim=1), w3.chunk(n)],
            "There are three lists, one for each matrix. Wanted is one triple for each expert: "
            "the first pieces together, the second pieces together."),
        Misconception("w2 shared out", _cut(second=lambda w, n: [p / n for p in w.chunk(n, 1)]),
            "The sum is too small by the number of experts. The parts already add up; nothing "
            "needs to be divided."),
        Misconception("the first part again",
            lambda w1, w2, w3, n: [_cut()(w1, w2, w3, n)[0]] * n,
            "All experts are the first part. Together they must have every hidden number once."),
        Misconception("parts that overlap", lambda w1, w2, w3, n: [
            (w1[i:i + len(w1) // n], w2[:, i:i + len(w1) // n], w3[i:i + len(w1) // n])
            for i in range(n)],
            "The parts overlap: each begins one number after the one before it. It should begin "
            "where that one ends."),
        Misconception("parts of that size",
            lambda w1, w2, w3, n: list(zip(w1.split(n), w2.split(n, dim=1), w3.split(n))),
            "The number was taken for the size of a part. It says how many experts there are."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Which axis of w1, of w2 and of w3 counts the hidden numbers? Their shapes are "
             "(hidden, dim), (dim, hidden), (hidden, dim)."),
        Hint("The sum is not the dense result",
             "Hidden number 5 is row 5 of w1, row 5 of w3 and column 5 of w2. The three stay "
             "together."),
        Hint("I need the structure",
             "Cut w1 and w3 along axis 0 and w2 along axis 1 into the same parts, and zip the "
             "three lists."),
    ),
    praise="A dense feed-forward is a mixture in which everybody is always chosen.",
)


EXERCISES = [
    ROUTE, CHOSEN_EXPERTS, TOTAL_AND_ACTIVE, MIXTURE_IN_ORDER, TIDY_ROUTE, BALANCE, GROUP,
    EXPECTED, CUT,
]
