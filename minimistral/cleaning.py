"""Cleaning a heap of documents: repeated, meaningless, and nearly repeated ones."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import torch
from torch import Tensor

PRIME = 2 ** 31 - 1                 # of the family of hash functions in `signature`


def normalised(document: str) -> str:
    """The document without differences of case and of white space."""
    return " ".join(document.casefold().split())


def drop_repeats(documents: Sequence[str]) -> list[str]:
    """The documents without those that equal an earlier one, once normalised."""
    seen, kept = set(), []
    for document in documents:
        digest = hashlib.blake2b(normalised(document).encode()).digest()
        if digest not in seen:
            kept.append(document)
        seen.add(digest)
    return kept


def common_pairs(documents: Sequence[str], least: int = 3) -> set[tuple[str, str]]:
    """Pairs of neighbouring words that at least `least` documents contain."""
    counts = Counter()
    for document in documents:
        counts.update(set(pairwise(normalised(document).split())))
    return {pair for pair, n in counts.items() if n >= least}


def drop_meaningless(documents: Sequence[str], share: float = 0.5,
                     least: int = 3) -> list[str]:
    """The documents of whose pairs of words at least `share` are common ones.

    Drop repeats first: nonsense that occurs often enough would be common too.
    """
    common, kept = common_pairs(documents, least), []
    for document in documents:
        pairs = list(pairwise(normalised(document).split()))
        if pairs and sum(pair in common for pair in pairs) >= share * len(pairs):
            kept.append(document)
    return kept


# ------------------------------------------------------------- nearly the same


def shingles(document: str, n: int = 3) -> set[int]:
    """Every run of n words as a number below PRIME; a short document is one run."""
    words = normalised(document).split()
    runs = {" ".join(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest())
            % PRIME for run in runs}


def similarity(one: set[int], other: set[int]) -> float:
    """What two sets share, as a part of all they have together (Jaccard 1912)."""
    return len(one & other) / len(one | other)


def signature(pieces: set[int], hashes: int = 64, seed: int = 0) -> Tensor:
    """MinHash (Broder 1997): the first piece in each of some random orders.

    -> int64 (hashes,). Two sets have the same first piece with a probability that
    is their similarity.
    """
    random = Random(seed)
    factors, shifts = torch.tensor(
        [[random.randrange(1, PRIME) for _ in range(hashes)] for _ in range(2)])
    values = torch.tensor(sorted(pieces))[:, None]                   # (pieces, 1)
    return ((values * factors + shifts) % PRIME).amin(0)


def drop_near_repeats(documents: Sequence[str], least: float = 0.5,
                      hashes: int = 64, bands: int = 16) -> list[str]:
    """The documents without those that resemble an earlier kept one: similarity of
    `least` or more. Only those that agree in a whole band of their signatures are
    compared at all.
    """
    shelves: dict[tuple, list[set[int]]] = defaultdict(list)
    kept = []
    for document in documents:
        pieces = shingles(document)
        cut = signature(pieces, hashes).view(bands, -1).tolist()
        keys = [(band, *row) for band, row in enumerate(cut)]
        if any(similarity(pieces, other) >= least
               for key in keys for other in shelves[key]):
            continue
        kept.append(document)
        for key in keys:
            shelves[key].append(pieces)
    return kept
