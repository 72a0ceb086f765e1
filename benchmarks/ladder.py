"""Measures the recorded rows of the ladder and keeps them in the package, with their provenance.

    python benchmarks/ladder.py

Every row comes from the standard run of minimistral/course/ladder.py: the same tales, tokenizer,
steps, judgement and prompt. The shipped models, trained far longer, are the last rows.
"""

import time

import torch
from torch import nn

import minimistral as mm
from minimistral.attention import attend, causal
from minimistral.course import ladder
from minimistral.course.chapters import ch01_tokens as ch01
from minimistral.course.chapters import ch03_positions as ch03
from minimistral.course.chapters import ch04_transformer as ch04
from minimistral.course.chapters import ch05_training as ch05
from minimistral.course.chapters import ch07_shared_heads as ch07

COMMAND = "python benchmarks/ladder.py"


class LookBack(nn.Module):
    """Chapter 2: the bigram, and one layer of attention with four heads that adds to its scores."""

    def __init__(self, dim: int = 64, n_heads: int = 4, head_dim: int = 16):
        super().__init__()
        size = ladder.tokenizer.vocab_size
        self.cut = (n_heads, head_dim)
        self.bigram = ch01.bigram()
        self.embedding = nn.Embedding(size, dim)
        self.wq, self.wk, self.wv = (
            nn.Linear(dim, n_heads * head_dim, bias=False) for _ in range(3))
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.output = nn.Linear(dim, size, bias=False)
        nn.init.zeros_(self.output.weight)                        # at first: a bigram

    def forward(self, ids):
        x = self.embedding(ids)                                   # (B, T, dim)
        q, k, v = (w(x).unflatten(-1, self.cut) for w in (self.wq, self.wk, self.wv))
        p = torch.arange(ids.shape[1])
        look = self.wo(attend(q, k, v, causal(p, p)).flatten(-2))
        return self.bigram(ids) + self.output(look)


def keep(name: str, chapter: int, model, learn=None) -> None:
    """Train if asked, measure, record, and say how long it took. learn: what trains the model."""
    start = time.perf_counter()
    if learn:
        learn(model)
    trained = time.perf_counter()
    row = ladder.measure(name, model, chapter=chapter)
    ladder.record(row, COMMAND)
    print(f"{name:28} {row.loss:.4f} nats per byte, {row.above_floor:.4f} above the floor, "
          f"{100 * row.parses:.0f}% parse; training {trained - start:.1f} s, "
          f"judging {time.perf_counter() - trained:.1f} s", flush=True)


def better_recipe(model) -> None:
    """Chapter 5's training: the same number of steps and tokens."""
    mm.train(model, ladder.tokens, ch05.RECIPE, progress=False)


def main() -> None:
    keep("bigram", 1, ch01.bigram())
    torch.manual_seed(0)
    keep("bigram and one look back", 2, LookBack(), ladder.fit)
    keep("one look back, with positions", 3, ch03.look_back_with_positions(), ladder.fit)
    keep(ch04.LADDER_ROW, 4, ch04.small_transformer(), ladder.fit)
    keep("a better recipe", 5, ch05.ladder_model(), better_recipe)
    keep("the shipped tales-dense", 6, mm.load_model("tales-dense"))
    keep("transformer, 8 heads on 4", 7, ch07.ladder_model(4), ladder.fit)
    keep("the shipped tales-moe", 9, mm.load_model("tales-moe"))


if __name__ == "__main__":
    main()
