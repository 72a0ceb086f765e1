"""Chapter 7, shared heads: its two core pieces and its exercises."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from minimistral.attention import attend, causal, plain_attend, repeat_heads
from minimistral.cache import KVCache
from minimistral.config import MODELS, ModelConfig, cache_bytes_per_token

from ..chapters.ch07_shared_heads import largest_stored
from ..exercises import Exercise, Hint, Misconception
from .fixtures import random_tensors


# ---------------------------------------------------------------- piece: repeat_heads


def three_heads_four_times():
    return (*random_tensors(1, (2, 5, 3, 6)), 4)


def five_heads_twice():
    return (*random_tensors(2, (3, 7, 5, 4)), 2)


def one_head_six_times():
    return (*random_tensors(3, (2, 5, 1, 4)), 6)


def three_heads_once():
    return (*random_tensors(4, (2, 4, 3, 6)), 1)


def _cut(wide, x):
    """Numbers cut anew into heads as long as those of x."""
    return wide.reshape(*x.shape[:2], -1, x.shape[-1])


REPEAT_HEADS = Exercise(
    name="repeat_heads", chapter=7, kind="piece", piece="attention.repeat_heads",
    entry="repeat_heads", title="Each shared head, n times", difficulty="easy",
    importance="essential", minutes=5,
    reference=repeat_heads,
    fixtures=(three_heads_four_times, five_heads_twice, one_head_six_times, three_heads_once),
    equivalents={
        "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=2),
        "expand and reshape": lambda x, n: _cut(
            x[:, :, :, None].expand(*x.shape[:3], n, x.shape[3]), x),
        "an index": lambda x, n: x[:, :, torch.arange(x.shape[2] * n) // n],
        "stack and flatten": lambda x, n: torch.stack([x] * n, dim=3).flatten(2, 3),
        "repeat the numbers, then cut": lambda x, n: _cut(x.repeat(1, 1, 1, n), x),
        "einsum with ones": lambda x, n: torch.einsum(
            "bskd,n->bsknd", x, torch.ones(n)).flatten(2, 3),
        "loop": lambda x, n: torch.cat(
            [x[:, :, k:k + 1] for k in range(x.shape[2]) for _ in range(n)], dim=2),
    },
    misconceptions=(
        Misconception("the whole row again", lambda x, n: x.repeat(1, 1, n, 1),
            "The heads come in turn, 0 1 2 0 1 2. Copies of one head stand side by side: new "
            "head h is old head h // n."),
        Misconception("as often as there are heads",
            lambda x, n: x.repeat_interleave(x.shape[2], dim=2),
            "Each head is there as often as x has heads. It must be n times; the two numbers "
            "are equal in small examples only."),
        Misconception("n taken for the heads at the end",
            lambda x, n: x.repeat_interleave(n // x.shape[2], dim=2),
            "You took n for the number of heads at the end. It says how often each head is "
            "repeated: the result has n times as many heads as x."),
        Misconception("positions repeated", lambda x, n: x.repeat_interleave(n, dim=1),
            "Every position of the text is there n times, and no head is. Count the axes: "
            "text, position, head, number."),
        Misconception("numbers repeated", lambda x, n: x.repeat_interleave(n, dim=3),
            "Each head has become n times as long. It is the axis of the heads that grows, not "
            "that of their numbers.",
            also=[lambda x, n: x.repeat(1, 1, 1, n)]),
        Misconception("no axis named", lambda x, n: x.repeat_interleave(n),
            "The result is one long row: without an axis everything is flattened first. Name "
            "the axis of the heads."),
        Misconception("a new axis left open",
            lambda x, n: x[:, :, :, None].expand(*x.shape[:3], n, x.shape[3]),
            "There is one axis too many. The copies of one head stand side by side: put their "
            "axis after that of the heads, and join the two.",
            also=[lambda x, n: torch.stack([x] * n, dim=2)]),
        Misconception("the axis of the heads expanded",
            lambda x, n: x.expand(-1, -1, n, -1),
            "Only an axis of size 1 can be expanded, and the heads are several. Make a new "
            "axis for the copies first."),
        Misconception("repeat with one number", lambda x, n: x.repeat(n),
            "repeat wants a number for each axis, and four axes got one. Say how often each of "
            "the four is repeated, or name the axis of the heads."),
        Misconception("divided by the number of heads",
            lambda x, n: torch.stack(
                [x[:, :, h // x.shape[2]] for h in range(x.shape[2] * n)], dim=2),
            "You divided by the number of heads in x. New head h is old head h // n, and n is "
            "how often each is repeated."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Write down the wanted order for two heads a and b and n = 3. Is it a b a b a b, or "
             "a a a b b b?"),
        Hint("The shape is right, the values are not",
             "Result head h has to be a copy of head h // n: with n = 4 the results 0 to 3 are "
             "copies of head 0, and 4 to 7 of head 1."),
        Hint("I cannot find the operation",
             "Either x.repeat_interleave(how often, dim=which axis); or a new axis right after "
             "the heads, expand it to n, and join the two axes."),
    ),
    praise="Copies side by side: the order in which every Mistral checkpoint was trained.",
)


# ---------------------------------------------------------------- piece: plain_attend


def twelve_heads_on_three():
    q, k, v = random_tensors(5, (2, 5, 12, 6), (2, 7, 3, 6), (2, 7, 3, 6))
    return q, k, v, causal(torch.arange(2, 7), torch.arange(7))


def ten_heads_on_five_with_a_mask_for_each_text():
    q, k, v = random_tensors(6, (3, 4, 10, 4), (3, 9, 5, 4), (3, 9, 5, 4))
    mask = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[..., 2] = True
    mask[1, 3] = False  # a query that may see nothing
    return q, k, v, mask


def six_heads_on_one():
    q, k, v = random_tensors(8, (2, 5, 6, 4), (2, 7, 1, 4), (2, 7, 1, 4))
    return q, k, v, causal(torch.arange(2, 7), torch.arange(7))


def three_heads_of_their_own():
    q, k, v = random_tensors(9, (2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    return q, k, v, causal(torch.arange(2, 7), torch.arange(7))


def _group_size(q, k):
    return q.shape[2] // k.shape[2]


def _repeated(spread, n=_group_size):
    """plain_attend with another way of repeating, or another number of copies."""
    def shared(q, k, v, mask):
        times = n(q, k)
        return attend(q, spread(k, times), spread(v, times), mask)
    return shared


def _grouped(scale=None, hide=None, soften=None, split=None, join=None, room=None):
    """plain_attend by einsum over groups, with one step exchanged."""
    def shared(q, k, v, mask):
        kv_heads, n = k.shape[2], _group_size(q, k)
        groups = split(q, kv_heads, n) if split else q.unflatten(2, (kv_heads, n))
        hidden = ~(room(mask) if room else mask.unsqueeze(-3).unsqueeze(-3))
        scores = torch.einsum("btkgd,bskd->bkgts", groups, k).float()
        scores = scores * scale(q) if scale else scores / math.sqrt(q.shape[-1])
        low = hide if hide is not None else torch.finfo(scores.dtype).min
        scores = scores.masked_fill(hidden, low)
        if soften:
            weights = soften(scores, hidden)
        else:
            weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        out = torch.einsum("bkgts,bskd->btkgd", weights.to(v.dtype), v)
        return join(out) if join else out.flatten(2, 3)
    return shared


def _by_kv_head(q, k, v, mask):
    n = _group_size(q, k)
    looks = [attend(q[:, :, i * n:(i + 1) * n], k[:, :, i:i + 1].expand(-1, -1, n, -1),
                    v[:, :, i:i + 1].expand(-1, -1, n, -1), mask) for i in range(k.shape[2])]
    return torch.cat(looks, dim=2)


def _by_query_head(q, k, v, mask):
    n = _group_size(q, k)
    looks = [attend(q[:, :, h, None], k[:, :, h // n, None], v[:, :, h // n, None], mask)
             for h in range(q.shape[2])]
    return torch.cat(looks, dim=2)


def _heads_as_queries(q, k, v, mask):
    """The n heads of a group are n times as many queries of one head."""
    (B, T, H, D), n = q.shape, _group_size(q, k)
    rows = q.unflatten(2, (-1, n)).transpose(2, 3).reshape(B, T * n, -1, D)
    out = attend(rows, k, v, mask.repeat_interleave(n, dim=-2))
    return out.reshape(B, T, n, -1, D).transpose(2, 3).reshape(B, T, H, D)


def _fused(q, k, v, mask):
    mask = mask.unsqueeze(-3)
    blind = ~mask.any(-1, keepdim=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, enable_gqa=True)
    return out.masked_fill(blind, 0.0).transpose(1, 2)


PLAIN_ATTEND = Exercise(
    name="plain_attend", chapter=7, kind="piece", piece="attention.plain_attend",
    entry="plain_attend", title="A look with shared heads", difficulty="medium",
    importance="essential", minutes=8,
    reference=plain_attend,
    fixtures=(twelve_heads_on_three, ten_heads_on_five_with_a_mask_for_each_text,
              six_heads_on_one, three_heads_of_their_own),
    equivalents={
        "repeat_interleave": _repeated(lambda x, n: x.repeat_interleave(n, dim=2)),
        "expand and reshape": _repeated(lambda x, n: _cut(
            x[:, :, :, None].expand(*x.shape[:3], n, x.shape[3]), x)),
        "einsum over groups": _grouped(),
        "one key/value head at a time": _by_kv_head,
        "one query head at a time": _by_query_head,
        "heads as queries": _heads_as_queries,
        "scaled_dot_product_attention": _fused,
    },
    misconceptions=(
        Misconception("heads in turn", _repeated(lambda x, n: x.repeat(1, 1, n, 1)),
            "Query heads 0, 1, 2 read key/value heads 0, 1, 2 in turn. The rule: neighbours "
            "share, so query head h reads key/value head h // n."),
        Misconception("as many copies as heads",
            _repeated(repeat_heads, lambda q, k: k.shape[2]),
            "Each shared head was repeated K or H times. It must serve H / K query heads; in an "
            "example with 4 and 2 this equals K.",
            also=[_repeated(repeat_heads, lambda q, k: q.shape[2])]),
        Misconception("group size from the positions",
            _repeated(repeat_heads, lambda q, k: q.shape[1] // k.shape[1]),
            "The number of copies was taken from the positions. The heads are the third axis "
            "of q and k."),
        Misconception("group size from the wrong end",
            _repeated(repeat_heads, lambda q, k: k.shape[2] // q.shape[2]),
            "You divided the shared heads by the query heads, which gives 0. There are more "
            "query heads: divide the other way round."),
        Misconception("keys or values not repeated",
            lambda q, k, v, mask: attend(q, repeat_heads(k, _group_size(q, k)), v, mask),
            "H heads meet K heads. Keys and values both have to serve their whole group: which of "
            "them still has K heads?"),
        Misconception("keys and values exchanged",
            lambda q, k, v, mask: attend(q, repeat_heads(v, _group_size(q, k)),
                                         repeat_heads(k, _group_size(q, k)), mask),
            "Keys and values have changed places. The order of the arguments is queries, "
            "keys, values, mask."),
        Misconception("queries repeated as well",
            lambda q, k, v, mask: attend(*(repeat_heads(x, _group_size(q, k))
                                           for x in (q, k, v)), mask),
            "The queries were repeated too, so they are again more than the keys. Only keys "
            "and values are too few."),
        Misconception("a group size with a decimal point",
            _repeated(repeat_heads, lambda q, k: q.shape[2] / k.shape[2]),
            "The number of copies is a decimal number, and nothing can be repeated 4.0 times. "
            "Divide as whole numbers."),
        Misconception("mask without axes for the heads", _grouped(room=lambda mask: mask),
            "It works while all texts have one mask. With a mask for each text it needs two new "
            "axes, as the scores have two axes of heads.",
            also=[_grouped(room=lambda mask: mask.unsqueeze(-3))]),
        Misconception("mask forgotten",
            lambda q, k, v, mask: plain_attend(q, k, v, torch.ones_like(mask)),
            "Hidden keys get weight: the mask was not handed on. It is the same for all "
            "heads."),
        Misconception("looks joined in another order",
            _grouped(join=lambda out: out.transpose(2, 3).flatten(2, 3)),
            "Each look is right, but stands in the place of another head. Join the axes in "
            "the order in which you cut them: group, then member."),
        Misconception("no zeros where nothing may be seen",
            _grouped(hide=-torch.inf, soften=lambda s, hidden: s.softmax(-1)),
            "A query that may see nothing gives NaN, or an average of all values. As in chapter "
            "2, its result is zeros.",
            also=[_grouped(soften=lambda s, hidden: s.softmax(-1))]),
    ),
    hints=(
        Hint("I do not know where to start",
             "q has 12 heads and k has 3. How many query heads does each key/value head serve, "
             "and from which two shapes do you read that?"),
        Hint("The numbers of heads do not fit",
             "n = H / K, both from axis 2. With keys and values repeated n times, attend of "
             "chapter 2 does the rest; the mask is handed on as it is."),
        Hint("I want to do it without copies",
             "Cut the heads of q into (K, n) with unflatten. Then einsum "
             "\"btkgd,bskd->bkgts\", softmax as in chapter 2, and join k and g again at the "
             "end."),
    ),
    praise="Many queries, few keys and values: grouped-query attention is yours.",
)


# ---------------------------------------------------------------- exercise: cache_bytes


def _config(**changes):
    return ModelConfig(**{**dict(dim=40, n_layers=5, n_heads=12, n_kv_heads=3, head_dim=6,
                                 hidden_dim=50, vocab_size=90), **changes})


def seventeen_tokens_of_three_texts():
    return _config(), 17, 3, 4


def one_long_text_of_mistral_7b():
    return MODELS["mistral-7b-v0.2"], 32768, 1, 2


def _bytes(numbers):
    """cache_bytes from a formula of (config, length, batch, size)."""
    return lambda config, length, batch_size, number_bytes: numbers(
        config, length, batch_size, number_bytes)


def _right_bytes(c, s, b, size):
    return 2 * c.n_layers * c.n_kv_heads * c.head_dim * s * b * size


def _bytes_of_a_real_cache(config, length, batch_size, number_bytes):
    dtype = {2: torch.bfloat16, 4: torch.float32}[number_bytes]
    cache = KVCache(config, batch_size, max_length=length, device="meta", dtype=dtype)
    return cache.nbytes


CACHE_BYTES = Exercise(
    name="cache_bytes", chapter=7, kind="complete", entry="cache_bytes",
    title="The bytes of a cache", difficulty="easy", importance="essential", minutes=5,
    reference=_bytes(_right_bytes),
    fixtures=(seventeen_tokens_of_three_texts, one_long_text_of_mistral_7b),
    equivalents={
        "the library's number": _bytes(lambda c, s, b, size: cache_bytes_per_token(
            c, {2: torch.bfloat16, 4: torch.float32}[size]) * s * b),
        "a cache that is really made": _bytes_of_a_real_cache,
        "keys and values apart": _bytes(lambda c, s, b, size: sum(
            math.prod((b, s, c.n_kv_heads, c.head_dim)) * size
            for _ in range(c.n_layers) for _ in "kv")),
        "as a float": _bytes(lambda c, s, b, size: float(_right_bytes(c, s, b, size))),
    },
    misconceptions=(
        Misconception("keys only", _bytes(lambda c, s, b, z: _right_bytes(c, s, b, z) // 2),
            "Half of it is missing. The cache keeps two things for each token and head."),
        Misconception("query heads", _bytes(
                lambda c, s, b, z: 2 * c.n_layers * c.n_heads * c.head_dim * s * b * z),
            "That is the cache without sharing. Only the key/value heads are kept; queries "
            "are used once and forgotten."),
        Misconception("one layer", _bytes(
                lambda c, s, b, z: 2 * c.n_kv_heads * c.head_dim * s * b * z),
            "That is the cache of one layer. Every layer has keys and values of its own."),
        Misconception("one text", _bytes(
                lambda c, s, b, z: _right_bytes(c, s, 1, z)),
            "That is enough for one text. Each text of the batch has keys and values of its "
            "own."),
        Misconception("one token", _bytes(lambda c, s, b, z: _right_bytes(c, 1, b, z)),
            "That is what one token adds. The cache holds every token of the text."),
        Misconception("numbers, not bytes", _bytes(lambda c, s, b, z: _right_bytes(c, s, b, 1)),
            "You counted numbers. Each takes several bytes in memory; the last argument says "
            "how many."),
        Misconception("GiB", _bytes(lambda c, s, b, z: _right_bytes(c, s, b, z) / 2**30),
            "That is the size in GiB. Bytes are asked for; the 4 GiB of the example only say "
            "how much it is."),
        Misconception("group size for the number of groups", _bytes(
                lambda c, s, b, z: _right_bytes(c, s, b, z) // c.n_kv_heads * (
                    c.n_heads // c.n_kv_heads)),
            "You used how many query heads share one. What counts is how many key/value heads "
            "there are."),
        Misconception("head size from the width", _bytes(
                lambda c, s, b, z: 2 * c.n_layers * c.n_kv_heads * (c.dim // c.n_heads) * s * b * z),
            "The size of a head was taken as the width over the number of heads. It need not "
            "be that; the configuration says it."),
        Misconception("the model's width", _bytes(
                lambda c, s, b, z: 2 * c.n_layers * c.dim * s * b * z),
            "You used the width of the model. A key has as many numbers as a head, and there "
            "is one for each key/value head."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Which numbers does a layer keep for one token? How many are they, and which of "
             "them is kept for how many heads?"),
        Hint("It is too small by a whole number",
             "Seven factors: 2 for keys and values, layers, key/value heads, numbers in a "
             "head, tokens, texts, bytes of a number. Which one is missing?"),
        Hint("It is too large",
             "For Mistral 7B: 2 * 32 layers * 8 heads * 128 numbers * 2 bytes = 131,072 bytes "
             "for each token. Queries are not kept."),
    ),
    praise="Seven factors, and grouped heads make one of them smaller.",
)


# ---------------------------------------------------------------- exercise: order

_ORDER_FREE = {  # the queries may be made anywhere before the look
    f"queries in place {place + 1}": tuple(
        [1, 2, 3, 4][:place] + [0] + [1, 2, 3, 4][place:] + [5, 6])
    for place in range(1, 5)
}

GROUPED_IN_ORDER = Exercise(
    name="grouped_in_order", chapter=7, kind="order",
    title="One step with a cache and groups", difficulty="easy", importance="essential",
    minutes=6,
    lines=(
        "q = rotate(wq(x).unflatten(-1, (H, D)), *angles)",
        "k, v = (w(x).unflatten(-1, (K, D)) for w in (wk, wv))",
        "k = rotate(k, *angles)",
        "k, v, key_positions = cache.update(k, v, positions)",
        "k, v = repeat_heads(k, H // K), repeat_heads(v, H // K)",
        "look = attend(q, k, v, may_attend(positions, key_positions))",
        "return wo(look.flatten(-2))",
    ),
    distractors=("k, v = (w(x).unflatten(-1, (H, D)) for w in (wk, wv))",),
    equivalents=_ORDER_FREE,
    misconceptions=(
        Misconception("nothing shared", "with 7 and without 4",
            "That is a layer without sharing. wk and wv make K heads, which are kept as they are "
            "and repeated for the look."),
        Misconception("keys cut into H heads", "with 7",
            "One line cuts keys and values into H heads. They have K heads: that is what is "
            "shared."),
        Misconception("rotated after the cache", "3 before 2",
            "The keys go into the cache unrotated, and old keys would then be turned by the new "
            "token's angle. A key is rotated once, at its own position."),
        Misconception("repeated before the cache", "4 before 3",
            "The cache would hold H heads, and nothing is saved. Repeat what comes out of the "
            "cache."),
        Misconception("no repeat", "without 4",
            "Queries with H heads would meet keys with K. The line that gives each query head its "
            "key is missing."),
        Misconception("no cache", "without 3",
            "The new token would see only itself: the line that fetches the earlier keys and "
            "values is missing."),
        Misconception("keys not rotated", "without 2",
            "Queries know their positions, keys do not. One line is missing."),
        Misconception("rotated before it is made", "2 before 1",
            "A key is rotated before it is made. Which line makes keys of x?"),
        Misconception("look before the repeat", "5 before 4",
            "Queries with H heads look at K heads of keys. The repeat comes before the look."),
        Misconception("look before the queries", "5 before 0",
            "The look needs queries, and they are not made yet."),
        Misconception("returned before the look", "6 before 5",
            "The result is returned before anything was looked up. The way back comes last."),
    ),
    hints=(
        Hint("I do not know which line is first",
             "Each line uses names. Which lines need nothing but x, the weights and the angles?"),
        Hint("Two lines look alike",
             "With H = 32 and K = 8: keys come out of wk with 8 heads of 128 numbers. Which of "
             "the two lines cuts them so?"),
        Hint("The order is still refused",
             "Make q, k and v; rotate k; keep; repeat what was kept; look; project back."),
    ),
    praise="Shared heads are kept once and repeated only for the look.",
)


# ---------------------------------------------------------------- exercise: spread_heads (bug)


def _spread(make_wide):
    """spread_heads with another line for `wide`; its last line is given."""
    def spread_heads(x, n):
        B, S, K, D = x.shape
        return make_wide(x, n).reshape(B, S, K * n, D)
    return spread_heads


def _expanded(axis):
    """x with a new axis of n at one place, joined again."""
    return _spread(lambda x, n: x.unsqueeze(axis).expand(
        *x.shape[:axis], n, *x.shape[axis:]))


SPREAD_HEADS = Exercise(
    name="spread_heads", chapter=7, kind="bug", entry="spread_heads",
    title="Every test passes and the model writes nonsense", difficulty="medium",
    importance="essential", minutes=8,
    reference=_expanded(3),
    fixtures=(three_heads_four_times, five_heads_twice, one_head_six_times),
    equivalents={
        "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=2),
        "an index": lambda x, n: x[:, :, torch.arange(x.shape[2] * n) // n],
        "transposed back": lambda x, n: x[:, :, None].expand(
            -1, -1, n, -1, -1).transpose(2, 3).flatten(2, 3),
    },
    misconceptions=(
        Misconception("unchanged", _expanded(2),
            "The heads still come in turn, 0 1 2 0 1 2. The new axis stands before the heads, "
            "so joining the two runs through all heads first."),
        Misconception("the new axis behind the numbers", _expanded(4),
            "The new axis stands behind the numbers of a head, so each number is repeated and "
            "heads are cut apart. It belongs between heads and numbers."),
        Misconception("the new axis before the positions", _expanded(1),
            "The new axis stands before the positions, and joining mixes tokens. It belongs "
            "between heads and numbers."),
        Misconception("new axis moved, sizes not",
            _spread(lambda x, n: x[:, :, :, None].expand(*x.shape[:2], n, *x.shape[2:])),
            "The new axis stands after the heads now, but the sizes to expand to still name "
            "it before them. Both must say the same."),
        Misconception("sizes moved, new axis not",
            _spread(lambda x, n: x[:, :, None].expand(*x.shape[:3], n, x.shape[3])),
            "The sizes name the new axis after the heads, but it still stands before them. "
            "Both must say the same."),
        Misconception("nothing expanded", _spread(lambda x, n: x[:, :, :, None]),
            "The new axis has the right place and the size 1. It still has to be expanded to "
            "n copies, as before."),
        Misconception("as many copies as heads",
            _spread(lambda x, n: x[:, :, :, None].expand(*x.shape[:3], *x.shape[2:])),
            "The new axis has the right place, but not the size n: there are as many copies "
            "as heads."),
    ),
    hints=(
        Hint("I do not see the bug",
             "Take K = 2, n = 2 and write down which head stands at each place of the result. "
             "Then do the same for the rule h // n."),
        Hint("Why do tests with K = 1 or n = 1 pass?",
             "With one head, or one copy, there is only one order. Joining two axes runs "
             "through the second one first: (n, K) gives 0 1 2 0 1 2."),
        Hint("I cannot repair it",
             "The new axis of size n must stand right after the heads: x[:, :, :, None], then "
             "expand to (B, S, K, n, D), then reshape as before."),
    ),
    praise="Two axes joined run through the last one first. That order is the whole bug.",
)


# ---------------------------------------------------------------- exercise: attend_without_copies


def one_new_token_of_two_texts():
    q, k, v = random_tensors(10, (2, 1, 12, 6), (2, 17, 3, 6), (2, 17, 3, 6))
    mask = torch.ones(2, 1, 17, dtype=torch.bool)
    mask[1, :, 11:] = False  # the second text is shorter
    return q, k, v, mask


def a_chunk_of_three_tokens():
    q, k, v = random_tensors(11, (2, 3, 10, 8), (2, 9, 5, 8), (2, 9, 5, 8))
    return q, k, v, causal(torch.arange(6, 9), torch.arange(9))


def _run_watched(work, q, k, v, mask):
    """The look, and whether something as large as repeated keys was stored on the way."""
    out, numbers = largest_stored(work, q, k, v, mask)
    copied = numbers >= k.numel() * _group_size(q, k)
    return {"look": out, "copies of the keys or values": "yes" if copied else "no"}


def _by_folded_matmul(q, k, v, mask):
    """The heads of a group are rows of one matrix product."""
    (B, T, H, D), K = q.shape, k.shape[2]
    rows = q.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, K, n * T, D)
    scores = rows @ k.permute(0, 2, 3, 1) / math.sqrt(D)                 # (B, K, n * T, S)
    hidden = ~mask.repeat(*([1] * (mask.dim() - 2)), H // K, 1).unsqueeze(-3)
    weights = scores.masked_fill(hidden, -1e30).softmax(-1)
    out = (weights @ v.transpose(1, 2)).unflatten(2, (H // K, T))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _queries_split_wrong(q, k, v, mask):
    return _grouped(split=lambda q, K, n: q.unflatten(2, (n, K)).transpose(2, 3))(q, k, v, mask)


def _rows_with_wrong_mask(q, k, v, mask):
    (B, T, H, D), n = q.shape, _group_size(q, k)
    rows = q.unflatten(2, (-1, n)).transpose(2, 3).reshape(B, T * n, -1, D)
    out = attend(rows, k, v, mask.repeat(*([1] * (mask.dim() - 2)), n, 1))
    return out.reshape(B, T, n, -1, D).transpose(2, 3).reshape(B, T, H, D)


def _rows_by_head(q, k, v, mask):
    """Rows one head after another; the mask as it is given."""
    (B, T, H, D), n = q.shape, _group_size(q, k)
    rows = q.unflatten(2, (-1, n)).permute(0, 3, 1, 2, 4).reshape(B, n * T, -1, D)
    out = attend(rows, k, v, mask)
    return out.reshape(B, n, T, -1, D).permute(0, 2, 3, 1, 4).reshape(B, T, H, D)


def _rows_by_head_mask(q, k, v, mask):
    """The same, each row of the mask n times."""
    return _rows_by_head(q, k, v, mask.repeat_interleave(_group_size(q, k), dim=-2))


def _hidden_after_softmax(q, k, v, mask):
    groups = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btkgd,bskd->bkgts", groups, k) / math.sqrt(q.shape[-1])
    weights = scores.softmax(-1) * mask.unsqueeze(-3).unsqueeze(-3)
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3)


def _scores_times_mask(q, k, v, mask):
    groups = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btkgd,bskd->bkgts", groups, k) / math.sqrt(q.shape[-1])
    weights = (scores * mask.unsqueeze(-3).unsqueeze(-3)).softmax(-1)
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3)


def _rows_without_swap(q, k, v, mask):
    (B, T, H, D), n = q.shape, _group_size(q, k)
    out = attend(q.reshape(B, T * n, -1, D), k, v, mask.repeat_interleave(n, dim=-2))
    return out.reshape(B, T, H, D)


WITHOUT_COPIES = Exercise(
    name="attend_without_copies", chapter=7, kind="function", entry="attend_without_copies",
    title="A grouped look without copies", difficulty="hard", importance="useful", minutes=15,
    reference=_grouped(),
    fixtures=(one_new_token_of_two_texts, a_chunk_of_three_tokens),
    run=_run_watched,
    equivalents={
        "heads as queries": _heads_as_queries,
        "one matrix product for a group": _by_folded_matmul,
        "one query head at a time": _by_query_head,
        "every n-th query head at a time": lambda q, k, v, mask: torch.stack(
            [attend(q[:, :, i::_group_size(q, k)], k, v, mask)
             for i in range(_group_size(q, k))], dim=3).flatten(2, 3),
        "scores and mixture one group at a time": lambda q, k, v, mask: torch.cat([
            _grouped()(q[:, :, i * _group_size(q, k):(i + 1) * _group_size(q, k)],
                       k[:, :, i:i + 1], v[:, :, i:i + 1], mask)
            for i in range(k.shape[2])], dim=2),
    },
    misconceptions=(
        Misconception("copies", plain_attend,
            "The look is right, but a product read something as large as repeated keys. "
            "Repeating copies; so does reshaping after expanding, and a matrix product that "
            "broadcasts."),
        Misconception("groups cut the other way", _queries_split_wrong,
            "The groups hold every K-th head. Neighbours share: cut the heads into groups "
            "first, members second, in this order."),
        Misconception("looks joined in another order",
            _grouped(join=lambda out: out.transpose(2, 3).flatten(2, 3)),
            "Each look is right, but stands in the place of another head. Join the axes in "
            "the order in which you cut them."),
        Misconception("mask repeated in the wrong order", _rows_with_wrong_mask,
            "Queries of a chunk see each other's keys: the rows of the mask no longer belong "
            "to the rows of the queries. In which order do your rows run?"),
        Misconception("heads cut into rows without a swap", _rows_without_swap,
            "The heads of a group stand side by side in q; cutting the axis into members "
            "first mixes groups. Cut into groups and members, then swap."),
        Misconception("groups not joined", _grouped(join=lambda out: out),
            "The looks are right, but groups and members still have an axis each. Join them "
            "to H heads."),
        Misconception("mask without axes for the heads", _grouped(room=lambda mask: mask),
            "The mask met the axes of the heads. The scores have two of those, group and member: "
            "it needs two new axes after that of the texts.",
            also=[_grouped(room=lambda mask: mask.unsqueeze(-3))]),
        Misconception("mask ignored",
            lambda q, k, v, mask: _grouped()(q, k, v, torch.ones_like(mask)),
            "Hidden keys get weight. The mask needs an axis for the groups and one for their "
            "members."),
        Misconception("scores multiplied by the mask", _scores_times_mask,
            "Hidden keys get weight: a score of 0 is not a weight of 0. Hide scores before the "
            "softmax, so that their weights vanish."),
        Misconception("mask after the softmax", _hidden_after_softmax,
            "Hidden keys took their part of the softmax, so the other weights sum to less than "
            "1. Hide scores before the softmax."),
        Misconception("positions and heads mixed at the end",
            _grouped(join=lambda out: out.permute(0, 2, 3, 1, 4).reshape(
                out.shape[0], out.shape[1], -1, out.shape[4])),
            "The looks stood in another order of axes, and reshape does not swap axes: "
            "positions and heads are mixed. Put the positions second, then join."),
        Misconception("mask not repeated for rows", _rows_by_head,
            "There are n times as many rows of queries now, and the mask still has T. Each "
            "row needs the mask of its position."),
        Misconception("mask interleaved for rows one head after another", _rows_by_head_mask,
            "Your rows run through all queries of one head, then the next head; the mask "
            "repeats each query n times in a row. Both must run alike."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Twelve query heads on three shared ones. Give q the shape (B, T, 3, 4, D). Which "
             "axis do q and k then have in common?"),
        Hint("The look is right, but it says that something was copied",
             "repeat, repeat_interleave and reshape after expand store n times the keys; so "
             "does matmul when it broadcasts. einsum does not, nor a product in which the heads "
             "of a group are rows."),
        Hint("I cannot put it together",
             "q.unflatten(2, (K, n)); scores by einsum \"btkgd,bskd->bkgts\" over the root of "
             "D; hide, softmax over s; mix by \"bkgts,bskd->btkgd\"; flatten(2, 3)."),
    ),
    praise="For the shared keys, the heads of a group are simply more queries.",
)


# ---------------------------------------------------------------- exercise: look_and_keep (bug)


def nine_tokens_one_by_one():
    q, k, v = random_tensors(12, (2, 9, 12, 6), (2, 9, 3, 6), (2, 9, 3, 6))
    return q, k, v, (1,) * 9


def a_prompt_and_then_single_tokens():
    q, k, v = random_tensors(13, (3, 7, 10, 4), (3, 7, 5, 4), (3, 7, 5, 4))
    return q, k, v, (1, 1, 2, 3)


def _run_steps(work, q, k, v, sizes):
    """Feed the tokens piece by piece; the last looks, and how many numbers were kept."""
    kept, looks = [], []
    for q_, k_, v_ in zip(*(x.split(sizes, dim=1) for x in (q, k, v))):
        looks.append(work(q_, k_, v_, kept))
    keys, values = (sum(pair[i].numel() for pair in kept) for i in (0, 1))
    return {"looks": torch.cat(looks, dim=1), "numbers kept for keys": keys,
            "numbers kept for values": values}


def _seen(q, keys):
    total = keys.shape[1]
    return causal(torch.arange(total - q.shape[1], total), torch.arange(total))


def _keeping(before=lambda x, n: x, after=repeat_heads, values_after=None, store=None):
    def look_and_keep(q, k, v, kept):
        n = _group_size(q, k)
        pair = before(k, n), before(v, n) if values_after is None else values_after[0](v, n)
        if store:
            store(kept, pair)
        else:
            kept.append(pair)
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*kept))
        last = after if values_after is None else values_after[1]
        return attend(q, after(keys, n), last(values, n), _seen(q, keys))
    return look_and_keep


def _same(x, n):
    return x


def _keep_all_again(kept, pair):
    """The joined keys are appended to what they were joined from."""
    joined = [torch.cat([*(old[i] for old in kept), pair[i]], dim=1) for i in (0, 1)]
    kept[:] = [tuple(joined)]


def _look_at(q, keys, values):
    return plain_attend(q, keys, values, _seen(q, keys))


def _keep_and_append_joined(q, k, v, kept):
    kept.append((k, v))
    keys, values = (torch.cat(parts, dim=1) for parts in zip(*kept))
    kept.append((keys, values))
    return _look_at(q, keys, values)


LOOK_AND_KEEP = Exercise(
    name="look_and_keep", chapter=7, kind="bug", entry="look_and_keep",
    title="A cache that shares nothing", difficulty="medium", importance="essential",
    minutes=8,
    reference=_keeping(),
    fixtures=(nine_tokens_one_by_one, a_prompt_and_then_single_tokens),
    run=_run_steps,
    may_change_inputs=True,
    equivalents={
        "plain_attend after the cache": lambda q, k, v, kept: (
            kept.append((k, v)),
            plain_attend(q, *(torch.cat(parts, 1) for parts in zip(*kept)),
                         _seen(q, torch.cat([k for k, _ in kept], 1))))[1],
        "repeat_interleave after the cache":
            _keeping(after=lambda x, n: x.repeat_interleave(n, 2)),
        "one joined pair": _keeping(store=_keep_all_again),
    },
    misconceptions=(
        Misconception("unchanged", _keeping(before=repeat_heads, after=_same),
            "The looks are right, but the list holds every key and value H / K times. What is "
            "shared must be kept once."),
        Misconception("only the keys moved",
            _keeping(values_after=(repeat_heads, _same)),
            "The keys are kept once now; the values are still repeated before they are kept."),
        Misconception("only the values moved",
            _keeping(before=repeat_heads, after=_same, values_after=(_same, repeat_heads)),
            "The values are kept once now; the keys are still repeated before they are kept."),
        Misconception("not repeated at all", _keeping(after=_same),
            "The list is small now, but no shared head reaches its group: keys with K heads "
            "meet queries with H. Repeat what comes out of the list."),
        Misconception("as many copies as shared heads",
            lambda q, k, v, kept: _keeping(after=lambda x, n: repeat_heads(x, x.shape[2]))(
                q, k, v, kept),
            "The list is small now, but each shared head was repeated K times. It serves H / "
            "K query heads."),
        Misconception("joined pairs beside the old ones",
            lambda q, k, v, kept: (
                kept.append(tuple(torch.cat(parts, 1) for parts in zip(*kept, (k, v)))),
                plain_attend(q, *kept[-1], _seen(q, kept[-1][0])))[1],
            "Old tokens are kept several times: what was joined went into the list beside its "
            "parts. Keep the new pair only."),
        Misconception("joined pairs appended as well", _keep_and_append_joined,
            "Old tokens are kept several times: the joined pair was appended to the pairs it "
            "was made of. Either keep single pairs, or the joined one alone."),
        Misconception("repeated before and after",
            _keeping(before=repeat_heads, after=repeat_heads),
            "Keys and values are repeated twice on the way to the look. Keep them as they "
            "come, and repeat once, after the list."),
        Misconception("only the new keys are looked at",
            lambda q, k, v, kept: (kept.append((k, v)), plain_attend(q, k, v, _seen(q, k)))[1],
            "Everything is kept, but the look uses the new keys and values alone. Join the "
            "kept ones first."),
    ),
    hints=(
        Hint("The looks are right. What is wrong?",
             "Count what is kept for one token: how many numbers has k when it comes in, and "
             "how many when it is put into the list?"),
        Hint("I do not see which line",
             "12 query heads, 3 shared ones, 6 numbers: 2 * 3 * 6 = 36 numbers for each token. "
             "Kept are 2 * 12 * 6 = 144."),
        Hint("I cannot repair it",
             "Keep k and v as they come. Join what was kept, and repeat the joined keys and "
             "values just before the look."),
    ),
    praise="Same looks, a smaller cache: what is shared is kept once.",
)


# ---------------------------------------------------------------- exercise: reorder_queries


def twelve_heads_in_turn_on_three():
    wq, wo = random_tensors(14, (72, 10), (10, 72))
    return wq, wo, 12, 3


def ten_heads_in_turn_on_five():
    wq, wo = random_tensors(15, (40, 14), (14, 40))
    return wq, wo, 10, 5


def _reordered(order, queries=True, output=True):
    def reorder_queries(wq, wo, n_heads, n_kv_heads):
        places = order(n_heads, n_kv_heads)
        new_q = wq.unflatten(0, (n_heads, -1))[places].flatten(0, 1) if queries else wq
        new_o = wo.unflatten(1, (n_heads, -1))[:, places].flatten(1) if output else wo
        return new_q, new_o
    return reorder_queries


def _side_by_side(H, K):
    return torch.arange(H).view(H // K, K).T.flatten()


def _inverse(H, K):
    return torch.arange(H).view(K, H // K).T.flatten()


def _reordered_by_loop(wq, wo, n_heads, n_kv_heads):
    size, n = wq.shape[0] // n_heads, n_heads // n_kv_heads
    rows, columns = [], []
    for h in range(n_heads):
        old = (h % n) * n_kv_heads + h // n
        rows.append(wq[old * size:(old + 1) * size])
        columns.append(wo[:, old * size:(old + 1) * size])
    return torch.cat(rows), torch.cat(columns, 1)


def _reordered_by_view(wq, wo, n_heads, n_kv_heads):
    n = n_heads // n_kv_heads
    new_q = wq.unflatten(0, (n, n_kv_heads, -1)).transpose(0, 1).flatten(0, 2)
    new_o = wo.unflatten(1, (n, n_kv_heads, -1)).transpose(1, 2).flatten(1)
    return new_q, new_o


def _reordered_torn(wq, wo, n_heads, n_kv_heads):
    """Cut into numbers first, heads second."""
    order = _side_by_side(n_heads, n_kv_heads)
    return (wq.unflatten(0, (-1, n_heads))[:, order].flatten(0, 1),
            wo.unflatten(1, (-1, n_heads))[:, :, order].flatten(1))


def _reordered_by_wrong_step(wq, wo, n_heads, n_kv_heads):
    n = n_heads // n_kv_heads
    order = [h for g in range(n_kv_heads) for h in range(g, n_heads, n)]
    return _reordered(lambda H, K: order)(wq, wo, n_heads, n_kv_heads)


REORDER_QUERIES = Exercise(
    name="reorder_queries", chapter=7, kind="function", entry="reorder_queries",
    title="A checkpoint from another world", difficulty="hard", importance="useful",
    minutes=15,
    reference=_reordered(_side_by_side),
    fixtures=(twelve_heads_in_turn_on_three, ten_heads_in_turn_on_five),
    equivalents={
        "loop": _reordered_by_loop,
        "three axes": _reordered_by_view,
        "sorted by the head they read": _reordered(
            lambda H, K: (torch.arange(H) % K).argsort(stable=True)),
    },
    misconceptions=(
        Misconception("the other direction", _reordered(_inverse),
            "This is the way back. At place h must stand an old head that read key/value head "
            "h // n."),
        Misconception("only one in order", _reordered(_side_by_side, output=False),
            "Only one of the two matrices is in the new order. A look moves with its query: its "
            "place in wo is a block of columns.",
            also=[_reordered(_side_by_side, queries=False)]),
        Misconception("cut into numbers first, heads second", _reordered_torn,
            "Heads are torn apart: the rows were cut as if the first number of every head came "
            "first. A head is D rows that stand together."),
        Misconception("every n-th head for a group", _reordered_by_wrong_step,
            "The number of rows has changed: heads are lost or there twice. Those that read "
            "one key/value head stand K apart in the old order, not n."),
        Misconception("one row for each head", lambda wq, wo, H, K: (
                wq[_side_by_side(H, K)], wo[:, _side_by_side(H, K)]),
            "Only H rows and columns are left: the order of heads was used for single rows. A "
            "head is a block of D rows."),
        Misconception("rows of wo moved", lambda wq, wo, H, K: (
                _reordered(_side_by_side)(wq, wo, H, K)[0], wo[_side_by_side(H, K)]),
            "The rows of wo were moved, or cut into heads; they belong to the outputs of the "
            "layer. Head h enters wo by its columns.",
            also=[lambda wq, wo, H, K: (
                      _reordered(_side_by_side)(wq, wo, H, K)[0],
                      wo.reshape(H, -1, wo.shape[1])[_side_by_side(H, K)].flatten(0, 1))]),
        Misconception("heads not joined", lambda wq, wo, H, K: (
                wq.unflatten(0, (H, -1))[_side_by_side(H, K)],
                wo.unflatten(1, (H, -1))[:, _side_by_side(H, K)]),
            "The order is right, but heads and their numbers still have an axis each. Join "
            "them, so that both are matrices again."),
        Misconception("nothing moved", lambda wq, wo, n_heads, n_kv_heads: (wq, wo),
            "Nothing has moved. Old head 1 read key/value head 1; where must it stand to read "
            "it under our rule?"),
        Misconception("shared head taken for a query head",
            _reordered(lambda H, K: torch.arange(H) // (H // K)),
            "Some heads are there several times and others are lost: the order holds numbers "
            "of key/value heads. Every old query head must appear once."),
    ),
    hints=(
        Hint("I do not know where to start",
             "H = 4, K = 2. In the other library heads 0, 1, 2, 3 read key/value heads 0, 1, 0, "
             "1. Ours read 0, 0, 1, 1. Which old heads come first?"),
        Hint("The values stand in wrong places",
             "New order for H = 12, K = 3: old heads 0 3 6 9, then 1 4 7 10, then 2 5 8 11. Row "
             "block h of wq and column block h of wo move together."),
        Hint("I cannot put it together",
             "order = arange(H) as a table of n rows and K columns, read down the columns. "
             "Unflatten wq's rows and wo's columns into (H, D), index with order, flatten."),
    ),
    praise="Neither order is better. It belongs to the checkpoint, like the layout of the rotary pairs.",
)


# ---------------------------------------------------------------- exercise: pool_heads


def six_heads_into_two():
    return (*random_tensors(16, (30, 14)), 6, 2)


def twelve_heads_into_three():
    return (*random_tensors(17, (48, 10)), 12, 3)


def four_heads_into_one():
    return (*random_tensors(18, (24, 9)), 4, 1)


def _pooled(merge):
    """merge: (new, size of a group, D, dim) -> (new, D, dim)"""
    def pool_heads(weight, n_kv_heads, new):
        heads = weight.unflatten(0, (new, n_kv_heads // new, -1))
        return merge(heads).flatten(0, 1)
    return pool_heads


def _pool_by_loop(weight, n_kv_heads, new):
    size, n = weight.shape[0] // n_kv_heads, n_kv_heads // new
    heads = weight.split(size)
    return torch.cat([sum(heads[g * n:(g + 1) * n]) / n for g in range(new)])


def _pool_by_matrix(weight, n_kv_heads, new):
    size, n = weight.shape[0] // n_kv_heads, n_kv_heads // new
    groups = torch.eye(new).repeat_interleave(n, dim=1) / n              # (new, K)
    return torch.kron(groups, torch.eye(size)) @ weight


POOL_HEADS = Exercise(
    name="pool_heads", chapter=7, kind="open", entry="pool_heads",
    title="Turn many heads into few", difficulty="medium", importance="useful", minutes=20,
    reference=_pooled(lambda heads: heads.mean(1)),
    fixtures=(six_heads_into_two, twelve_heads_into_three, four_heads_into_one),
    equivalents={
        "loop": _pool_by_loop,
        "a matrix of averages": _pool_by_matrix,
        "sum over n": _pooled(lambda heads: heads.sum(1) / heads.shape[1]),
    },
    misconceptions=(
        Misconception("every new-th head",
            lambda w, K, new: w.unflatten(0, (K // new, new, -1)).mean(0).flatten(0, 1),
            "Heads far from each other were averaged. The heads of one group stand side by "
            "side, because query head h reads key/value head h // n."),
        Misconception("sum", _pooled(lambda heads: heads.sum(1)),
            "The heads of a group were added up, so keys and values become too large. An "
            "average divides by their number."),
        Misconception("slices of the wrong length", lambda w, K, new: torch.cat(
                [w.unflatten(0, (K, -1))[g * new:(g + 1) * new].mean(0) for g in range(new)]),
            "As many heads were averaged as new ones are wanted. A group has K / new members, "
            "and begins where the last one ended."),
        Misconception("one head for all", lambda w, K, new: w.unflatten(0, (K, -1)).mean(0),
            "One head is left: the average ran over all of them. There must be one for each "
            "group."),
        Misconception("first head of each group", _pooled(lambda heads: heads[:, 0]),
            "Only the first head of each group was kept. The task is the average of the "
            "group; the cell below compares the two."),
        Misconception("averaged over rows",
            lambda w, K, new: w.unflatten(0, (new, -1)).mean(1),
            "A single row is left of each head or group: the average ran over rows. It runs over "
            "the heads of a group, and each keeps its D rows.",
            also=[lambda w, K, new: w.unflatten(0, (new, K // new, -1)).mean(2).flatten(0, 1)]),
        Misconception("heads not joined",
            lambda w, K, new: w.unflatten(0, (new, K // new, -1)).mean(1),
            "The averages are right, but the heads have an axis of their own. Join it with "
            "that of their rows."),
        Misconception("average across groups",
            lambda w, K, new: w.unflatten(0, (new, K // new, -1)).mean(0).flatten(0, 1),
            "The average ran across the groups instead of inside them. After cutting into "
            "groups, members and rows, it is the members that are averaged."),
        Misconception("kept as many heads",
            lambda w, K, new: w.unflatten(0, (new, K // new, -1)).mean(
                1, keepdim=True).expand(-1, K // new, -1, -1).flatten(0, 2),
            "The averages are right, but each is still there several times. The new matrix "
            "has fewer rows: one block for each new head."),
    ),
    hints=(
        Hint("I do not know where to start",
             "Six heads become two. Which old heads were read by the query heads that will "
             "read new head 0?"),
        Hint("The shape is right, the values are not",
             "wk.weight has K * D rows: head 0 is rows 0 to D - 1. With six heads into two, "
             "average heads 0, 1, 2, and heads 3, 4, 5, row by row."),
        Hint("I cannot put it together",
             "unflatten the rows into (new, K // new, D), take the mean over the middle axis, "
             "and flatten the first two axes again."),
    ),
    praise="An average of heads is a start; the model has to be trained further with it.",
)


EXERCISES = [REPEAT_HEADS, PLAIN_ATTEND, CACHE_BYTES, GROUPED_IN_ORDER, SPREAD_HEADS,
             WITHOUT_COPIES, LOOK_AND_KEEP, REORDER_QUERIES, POOL_HEADS]
