# %% [markdown]
# # Exercises 9: Mixture of experts
#
# Seven exercises on chapter 9, about an hour and a quarter in all. The two core pieces, `route` and
# `chosen_experts`, are written inside the chapter itself; here you count, order, repair, generalise and
# convert.
#
# Run a cell unchanged and it says *not written yet*. `hint("name")` gives three hints, one at a time;
# `check` may be called as often as you like.
#
# E experts, k of them chosen for a token; N tokens laid in a row; L layers.

# %%
import torch
import torch.nn.functional as F

import minimistral as mm
from minimistral.course import check, hint, ladder, lines, progress, swap
from minimistral.course.chapters import ch09_mixture_of_experts as ch09
from minimistral.moe import chosen_experts, route

model, tokenizer = mm.load_model("tales-moe"), mm.load_tokenizer("tales-moe")
tales = ladder.corpus.val_documents[:12]
size = sum(len(text.encode()) for text in tales)

# %% [markdown]
# ## Exercise 1: in memory, and at work
#
# Difficulty: easy · importance: essential · 6 minutes
#
# How many parameters have the **feed-forward halves** of a mixture, routers included: all of them, and
# those that work for one token? Complete the lines and return both, the total first. `config` has `n_layers`, `dim`,
# `hidden_dim` (the width of one expert), and `config.moe` has `num_experts` and `num_experts_per_tok`.
#
# Example: one layer, dim 4, hidden_dim 5, 3 experts, 2 chosen: (3 · 60 + 12, 2 · 60 + 12) = (192, 132).


# %%
def total_and_active(config):
    """(all, those that work for one token) of the experts and routers."""
    ### BEGIN SOLUTION
    E, k = config.moe.num_experts, config.moe.num_experts_per_tok
    expert, router = 3 * config.dim * config.hidden_dim, config.dim * E
    return config.n_layers * (E * expert + router), config.n_layers * (
        k * expert + router)
    ### STUB
    # E, k = config.moe.num_experts, config.moe.num_experts_per_tok
    # expert, router = ..., ...
    # return ..., ...
    ### END SOLUTION


check("total_and_active", total_and_active)

# %% [markdown] tags=["solution"]
# The router is there in both: to choose k experts it has to score all E.

# %% [markdown]
# ## Exercise 2: one layer of experts
#
# Difficulty: easy · importance: essential · 6 minutes
#
# These are the lines of a mixture's forward pass, shuffled. `gate` is the router, `experts` a list. One line is a
# mistake and stays out. Type the letters in order, with blanks between them.

# %%
lines("mixture_in_order")

# %%
### BEGIN SOLUTION
order = "F E J C G D I B A"
### STUB
# order = "..."
### END SOLUTION
check("mixture_in_order", order)

# %% [markdown] tags=["solution"]
# Score, choose, softmax over the chosen, then the sum. The line that stays out takes the shares of the *first* k
# experts, whoever was chosen. (The zeros may be made anywhere between the rows and the loop.)

# %% [markdown]
# ## Exercise 3: a tidy router that makes the model worse
#
# Difficulty: medium · importance: essential · 8 minutes
#
# Find the bug. Somebody likes tables tidy: the experts of each token should come in rising order. The shapes are right, the
# weights sum to 1, the right experts are asked. Yet the shipped mixture gets much worse; the next cell measures it.
# Repair the line that makes `experts`, so that the experts rise and each keeps its own weight. `sort` returns values
# and the order in which they stood.


# %%
def tidy_route(logits, k):
    """route, with the experts of each token in rising order. logits: (N, E)"""
    weights, experts = route(logits, k)                   # (N, k) both
    ### BEGIN SOLUTION
    experts, order = experts.sort(dim=-1)
    weights = weights.gather(-1, order)                   # move together
    ### STUB
    # experts = experts.sort(dim=-1).values
    ### END SOLUTION
    return weights, experts


# %%
rows = ch09.held_out_rows(tokenizer, tales)
before = ch09.total_nats(model, rows) / size
with swap("moe.route", lambda logits, k: tidy_route(logits, k)):
    after = ch09.total_nats(model, rows) / size
print("as good as with the library's route:", abs(after - before) < 1e-4)

# %%
check("tidy_route", tidy_route)

# %% [markdown] tags=["solution"]
# A weight belongs to its expert by its place alone. Whatever moves one of the two tables must move the other.

# %% [markdown]
# ## Exercise 4: padding does not count
#
# Difficulty: medium · importance: essential · 12 minutes
#
# Padding should not teach the router anything. Write the balance loss of **one**
# layer, taken over the real tokens only: E times the sum over experts of f · P. f is the share of real tokens that
# chose the expert (summing to k), P the mean over real tokens of its softmax probability among all E. `logits` is (N, E),
# `real` is bool (N,), and at least one token is real. Return a number or a tensor with one number.
#
# Example: logits [[9, 0], [0, 9], [9, 0]], k = 1, real [True, True, False]: f = P = [0.5, 0.5], so the loss is 1.0.


# %%
def balance_of_real_tokens(logits, k, real):
    """logits: (N, E), real: bool (N,) -> one number"""
    ### BEGIN SOLUTION
    logits = logits[real]                                 # (R, E)
    n_real, n_experts = logits.shape
    P = logits.softmax(dim=-1).mean(dim=0)                # (E,)
    experts = logits.topk(k, dim=-1).indices              # (R, k)
    f = torch.bincount(experts.flatten(), minlength=n_experts) / n_real
    return n_experts * (f * P).sum()
    ### END SOLUTION


check("balance_of_real_tokens", balance_of_real_tokens)

# %% [markdown] tags=["solution"]
# Taking the real rows first makes every later mean right by itself. f has no gradient and needs none: P has one.

# %% [markdown]
# ## Exercise 5: sort once, cut into groups
#
# Difficulty: hard · importance: useful · 12 minutes
#
# The chapter looks for the rows of each expert anew, E times. Large libraries sort once. `chosen` is (N, k). Return
# three lists or int tensors: `token` and `place`, each of N · k numbers, say in which row and column of `chosen` an
# expert was named, ordered by expert, and within an expert by row; `counts`, of `n_experts` numbers, says how
# often each expert was named, 0 included.
#
# Example: chosen [[2, 0], [0, 1]] and 4 experts: token [0, 1, 1, 0], place [1, 0, 1, 0], counts [2, 1, 1, 0].


# %%
def group_by_expert(chosen, n_experts):
    """chosen: (N, k) -> token (N * k,), place (N * k,), counts (n_experts,)"""
    ### BEGIN SOLUTION
    k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)         # slots, by expert
    counts = torch.bincount(chosen.flatten(), minlength=n_experts)
    return order // k, order % k, counts
    ### END SOLUTION


check("group_by_expert", group_by_expert)

# %% [markdown] tags=["solution"]
# Slot s of the flattened table belongs to row s // k and column s % k. A stable sort keeps rows in order.

# %% [markdown]
# With it, the mixture becomes: gather all rows once, cut, compute, add back once.

# %%
try:
    layer = model.layers[0].feed_forward
    x = torch.randn(9, model.config.dim, generator=torch.Generator().manual_seed(3))
    weights, chosen = route(layer.gate(x), 2)
    token, place, counts = map(torch.as_tensor,
                               group_by_expert(chosen, len(layer.experts)))
    parts = x[token].split(counts.tolist())               # one for each expert
    answers = torch.cat([e(rows_) for e, rows_ in zip(layer.experts, parts)])
    answers = weights[token, place, None] * answers       # (N * k, dim)
    out = torch.zeros_like(x).index_add(0, token, answers)
    other = chosen_experts(layer.experts, x, weights, chosen)
    print("the same sum:", torch.allclose(out, other, atol=1e-5))
except NotImplementedError:
    print("not written yet")

# %% [markdown]
# ## Exercise 6: how many experts a batch wakes up
#
# Difficulty: medium · importance: useful · 8 minutes
#
# Each of `batch` tokens chooses k different experts out of E, evenly and without looking at the others. How many
# different experts are chosen by at least one token, on average? Complete the lines. Think of one expert: with what
# probability does nobody choose it?
#
# Example: 8 experts, 2 chosen, 2 tokens: 3.5.


# %%
def expected_experts(E, k, batch):
    """The mean number of different experts that a batch touches."""
    ### BEGIN SOLUTION
    spared = (1 - k / E) ** batch                         # by every token
    return E * (1 - spared)
    ### STUB
    # spared = ...      # the probability that one expert is chosen by no token
    # return ...
    ### END SOLUTION


check("expected_experts", expected_experts)

# %% [markdown] tags=["solution"]
# One token spares an expert with probability 1 - k / E, not (1 - 1 / E) to the power k: its k experts differ from each other.

# %% [markdown]
# ## Exercise 7: experts made from a dense model
#
# Difficulty: hard · importance: optional · 20 minutes
#
# An open task. First a function: cut a dense feed-forward, w2(silu(w1 x) · w3 x), into experts of equal width whose
# answers **add up** to the dense answer. `w1` and `w3` are (hidden, dim), `w2` is (dim, hidden), and `parts`
# divides hidden. Return a list of triples (w1, w2, w3), one for each expert; which hidden numbers an expert gets is
# up to you.
#
# Example: hidden 6, two parts: each expert has w1 (3, dim), w2 (dim, 3), w3 (3, dim).


# %%
def cut_feed_forward(w1, w2, w3, parts):
    """-> a list of `parts` triples (w1, w2, w3)"""
    ### BEGIN SOLUTION
    return list(zip(w1.chunk(parts), w2.chunk(parts, dim=1), w3.chunk(parts)))
    ### END SOLUTION


check("cut_feed_forward", cut_feed_forward)

# %% [markdown] tags=["solution"]
# Hidden number i is row i of w1 and w3 and column i of w2. As long as the three stay together, any division of the
# hidden numbers will do.

# %% [markdown]
# Then use it. The feed-forwards of the shipped *dense* model are cut into four experts, and for each token only those with the
# largest answers are kept. How many does it need? Write down what you expect. Then think of a router: it
# would have to *predict* which answers are large. And is there a better way to divide the hidden numbers?

# %%
def keep_largest(layer, parts, k):
    """A hook: of `parts` experts, each token keeps the k largest answers."""
    ffn = layer.feed_forward
    experts = cut_feed_forward(ffn.w1.weight, ffn.w2.weight, ffn.w3.weight, parts)

    def instead(module, inputs, output):
        x = inputs[0]                                     # (B, T, dim)
        all_ = torch.stack([F.linear(F.silu(F.linear(x, a)) * F.linear(x, c), b)
                            for a, b, c in experts])      # (parts, B, T, dim)
        sizes = all_.norm(dim=-1)                         # (parts, B, T)
        kept = torch.zeros_like(sizes).scatter(0, sizes.topk(k, dim=0).indices, 1.0)
        return (all_ * kept[..., None]).sum(0)
    return ffn.register_forward_hook(instead)


# %%
dense = mm.load_model("tales-dense")
rows = ch09.held_out_rows(ladder.tokenizer, tales)
try:
    for k in (4, 3, 2, 1):
        with torch.no_grad():
            hooks = [keep_largest(layer, 4, k) for layer in dense.layers]
            loss = ch09.total_nats(dense, rows) / size
        for hook in hooks:
            hook.remove()
        print(f"{k} of 4 experts: {loss:.3f} nats per byte")
except NotImplementedError:
    print("not written yet")

# %% [markdown] tags=["solution"]
# Four of four is the dense model itself. What is lost with fewer shows that it was never trained to do without: a mixture
# made in this way has to be trained further, and its router from the beginning.

# %%
# NBVAL_IGNORE_OUTPUT: the table grows with every chapter
progress()
