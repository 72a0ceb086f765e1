"""Measure the tokenizer: training, plain and fast, and encoding, plain and by tiktoken.

    python benchmarks/tokenizer.py [--out FILE]

The text is the standard library of the running Python, read from its folder in the order of
paths, without its tests and without installed packages: at most 10 MB of it. Every sample goes
into the JSON file, with what ran it. No seed: nothing here is drawn at random.
"""

import argparse
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from minimistral.provenance import provenance
from minimistral.tokenizer import (
    Tokenizer,
    count_words,
    encode_plain,
    ranks_from_merges,
    train_bpe,
    train_bpe_plain,
)

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


def library_files(limit: int) -> list[str]:
    """Sources of the standard library by path, each one that still fits into `limit` bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    texts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if size + len(text.encode()) > limit:
            continue
        texts.append(text)
        size += len(text.encode())
    return texts


def seconds(work: Callable[[], object], samples: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Wall and processor time of each sample, after `warm_up` runs that don't count.

    On a machine that does other work too, the processor's time is the steadier of the two.
    """
    wall, cpu = [], []
    for _ in range(warm_up + samples):
        start = time.perf_counter(), time.process_time()
        work()
        wall.append(round(time.perf_counter() - start[0], 4))
        cpu.append(round(time.process_time() - start[1], 4))
    return {"wall": wall[warm_up:], "cpu": cpu[warm_up:]}


def train_in_full(texts: list[str], size: int) -> dict:
    """Train a whole vocabulary, three times, its two parts timed apart."""
    counts = count_words(texts)
    n_merges = size - 276
    return {
        "vocab_size": size,
        "bytes": sum(len(text.encode()) for text in texts),
        "distinct_words": len(counts),
        "seconds": seconds(lambda: Tokenizer.train(texts, size), 3),
        "seconds_counting_words": seconds(lambda: count_words(texts), 3),
        "seconds_merging": seconds(lambda: train_bpe(counts, n_merges), 3),
    }


def plain_beside_fast(texts: list[str], n_merges: int) -> dict:
    """The same merges by both ways, on a smaller text."""
    counts = count_words(texts)
    if train_bpe_plain(counts, n_merges) != train_bpe(counts, n_merges):
        raise AssertionError("the two ways of training disagree")
    return {
        "merges": n_merges,
        "bytes": sum(len(text.encode()) for text in texts),
        "distinct_words": len(counts),
        "same_merges": True,
        "seconds_plain": seconds(lambda: train_bpe_plain(counts, n_merges), 3),
        "seconds_fast": seconds(lambda: train_bpe(counts, n_merges), 3),
    }


def encoding(texts: list[str], tokenizer: Tokenizer) -> dict:
    """Seconds to encode one text: plain, by tiktoken, and cut into pieces on threads."""
    text = "".join(texts)
    lines = text.splitlines(keepends=True)
    batch = ["".join(lines[i : i + 500]) for i in range(0, len(lines), 500)]
    plain = encode_plain(text, tokenizer.ranks)
    if [rank + tokenizer.n_control for rank in plain] != tokenizer.encode(text):
        raise AssertionError("the plain encoder and tiktoken disagree")
    return {
        "bytes": len(text.encode()),
        "tokens": len(plain),
        "same_ids": True,
        "warm_up": 1,
        "seconds_plain": seconds(lambda: encode_plain(text, tokenizer.ranks), 3, warm_up=1),
        "seconds_tiktoken": seconds(lambda: tokenizer.encode(text), 5, warm_up=1),
        "texts_in_batch": len(batch),
        "seconds_batch": seconds(lambda: tokenizer.encode_batch(batch), 5, warm_up=1),
        "short_texts_in_batch": len(lines),
        "seconds_batch_of_lines": seconds(lambda: tokenizer.encode_batch(lines), 5, warm_up=1),
        "seconds_threads_on_lines": seconds(
            lambda: tokenizer.encoding.encode_ordinary_batch(lines, num_threads=os.cpu_count()),
            samples=5,
            warm_up=1,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "tokenizer.json")
    arguments = parser.parse_args()
    run = provenance("python benchmarks/tokenizer.py", tiktoken=version("tiktoken"),
                     regex=version("regex"))
    ten, one, small = library_files(10_000_000), library_files(1_000_000), library_files(100_000)
    tokenizer = Tokenizer(ranks_from_merges(train_bpe(count_words(ten), 8192 - 276)))
    result = {
        "what": "byte-level BPE: training and encoding, seconds of wall and processor time",
        "text": f"standard library of Python {sys.version.split()[0]}, without tests",
        "provenance": run,
        "training": train_in_full(ten, 8192),
        "training_plain_and_fast": plain_beside_fast(small, 500),
        "encoding": encoding(one, tokenizer),
    }
    text = json.dumps(result, indent=1) + "\n"
    arguments.out.write_text(text, encoding="utf-8", newline="\n")
    print(text)


if __name__ == "__main__":
    main()
