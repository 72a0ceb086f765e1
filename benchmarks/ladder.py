"""Measures the recorded rows of the ladder and keeps them in the package, with their provenance.

    python benchmarks/ladder.py

Every row comes from the standard run of minimistral/course/ladder.py: the same tales, tokenizer,
steps, judgement and prompt. The shipped models, trained far longer, are the last rows.

The rows of chapters 5 and 9 are trained with Muon, which computes in bfloat16: another processor
rounds differently and ends a thousandth of a nat higher or lower. Record them, with
OMP_NUM_THREADS=1, on the kind of machine that builds the notebooks.
"""

import time

import minimistral as mm
from minimistral.course import ladder
from minimistral.course.chapters import ch01_tokens as ch01
from minimistral.course.chapters import ch03_positions as ch03
from minimistral.course.chapters import ch04_transformer as ch04
from minimistral.course.chapters import ch05_training as ch05
from minimistral.course.chapters import ch07_shared_heads as ch07
from minimistral.course.chapters import ch08_sliding_window as ch08
from minimistral.course.chapters import ch09_mixture_of_experts as ch09

COMMAND = "python benchmarks/ladder.py"


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
    keep("bigram and one look back", 2, ch03.look_back(turn=False), ladder.fit)
    keep("one look back, with positions", 3, ch03.look_back(), ladder.fit)
    keep(ch04.LADDER_ROW, 4, ch04.small_transformer(), ladder.fit)
    keep("a better recipe", 5, ch05.ladder_model(), better_recipe)
    keep("the shipped tales-dense", 6, mm.load_model("tales-dense"))
    keep("transformer, 8 heads on 4", 7, ch07.ladder_model(4), ladder.fit)
    keep("transformer, window 16", 8, ch08.ladder_model(16), ladder.fit)
    keep(ch09.LADDER_ROW, 9, ch09.ladder_model(), ch09.learn)
    keep("the shipped tales-moe", 9, mm.load_model("tales-moe"))


if __name__ == "__main__":
    main()
