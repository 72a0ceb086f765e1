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

COMMAND = "python benchmarks/ladder.py"


def bigram() -> nn.Module:
    """Chapter 1: how often does each token follow each other one? No pair is impossible."""
    size = ladder.tokenizer.vocab_size
    ids = ladder.tokens.ids
    counts = torch.zeros(size, size)
    counts.index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    return nn.Embedding.from_pretrained((counts + 0.1).log())


class LookBack(nn.Module):
    """Chapter 2: the bigram, and one layer of attention with four heads that adds to its scores."""

    def __init__(self, dim: int = 64, n_heads: int = 4, head_dim: int = 16):
        super().__init__()
        size = ladder.tokenizer.vocab_size
        self.cut = (n_heads, head_dim)
        self.bigram = bigram()
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


def keep(name: str, chapter: int, model, learn: bool = False) -> None:
    """Train if asked, measure, record, and say how long it took."""
    start = time.perf_counter()
    if learn:
        ladder.fit(model)
    trained = time.perf_counter()
    row = ladder.measure(name, model, chapter=chapter)
    ladder.record(row, COMMAND)
    print(f"{name:28} {row.loss:.4f} nats per byte, {row.above_floor:.4f} above the floor, "
          f"{100 * row.parses:.0f}% parse; training {trained - start:.1f} s, "
          f"judging {time.perf_counter() - trained:.1f} s", flush=True)


def main() -> None:
    keep("bigram", 1, bigram())
    torch.manual_seed(0)
    keep("bigram and one look back", 2, LookBack(), learn=True)
    keep("the shipped tales-dense", 6, mm.load_model("tales-dense"))
    keep("the shipped tales-moe", 9, mm.load_model("tales-moe"))


if __name__ == "__main__":
    main()
