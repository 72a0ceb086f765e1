"""Cleaning: what is dropped, what is kept, and that the quick way finds what the slow one finds."""

from itertools import combinations
from random import Random

import pytest
import torch

from minimistral.cleaning import (common_pairs, drop_meaningless, drop_near_repeats, drop_repeats,
                                  normalised, shingles, signature, similarity)
from minimistral.tales import sample_tale

RANDOM = Random(5)
TALES = [sample_tale(RANDOM).text for _ in range(300)]


def test_the_first_of_equal_documents_stays_in_its_place():
    documents = ["One  key.", "Zwei Türen", "one key.\n", "ONE KEY.", "zwei türen!", ""]
    assert drop_repeats(documents) == ["One  key.", "Zwei Türen", "zwei türen!", ""]
    assert drop_repeats(TALES + TALES[::-1]) == TALES
    assert normalised("  Ein\tKleiner\n STRASSE ") == "ein kleiner strasse"


def test_pairs_are_counted_once_a_document():
    documents = ["a b a b a b", "A b c", "b c d"]
    assert common_pairs(documents, 2) == {("a", "b"), ("b", "c")}
    assert common_pairs(documents, 3) == set()


def test_nonsense_goes_and_tales_stay():
    words = " ".join(TALES).split()
    salad = [" ".join(RANDOM.choice(words) for _ in range(50)) for _ in range(20)]
    heap = TALES + salad + ["", "x", "qz wv kk pp ll"]
    kept = drop_meaningless(heap)
    assert not set(kept) & set(salad) and not {"", "x"} & set(kept)
    assert len(set(kept) & set(TALES)) > 0.9 * len(TALES)
    assert kept == [text for text in heap if text in set(kept)]


def test_repeated_nonsense_passes_unless_repeats_are_dropped_first():
    heap = TALES + ["buy cheap lamps here now " * 3] * 9
    assert len(drop_meaningless(heap)) > len(drop_meaningless(drop_repeats(heap)))
    assert not any("lamps" in text for text in drop_meaningless(drop_repeats(heap)))


def test_similarity_of_sets():
    assert similarity({1, 2, 3}, {2, 3, 4, 5}) == 2 / 5
    assert similarity({1}, {1}) == 1 and similarity({1}, {2}) == 0


def test_shingles_of_short_and_long_documents():
    assert len(shingles("a b c d", 3)) == 2 and len(shingles("a b")) == 1 and len(shingles("")) == 1
    assert shingles("The old  Key is here") == shingles("the OLD key is here")


@pytest.mark.parametrize("shared", [20, 60, 90])
def test_equal_firsts_estimate_the_similarity(shared):
    values = Random(shared).sample(range(2 ** 31 - 1), 200 - shared)
    one, other = set(values[:100]), set(values[-100:])
    same = torch.mean((signature(one, 800) == signature(other, 800)).float())
    assert same.item() == pytest.approx(similarity(one, other), abs=0.06)
    assert torch.equal(signature(one), signature(one))


def test_the_quick_way_finds_what_comparing_all_pairs_finds():
    heap = TALES[:60]
    for tale in TALES[:12]:
        heap.append(tale.replace(".", ". ", 1).replace("The", "That", 1) + " The end.")
    slow = []
    for tale in heap:
        if all(similarity(shingles(tale), shingles(k)) < 0.7 for k in slow):
            slow.append(tale)
    assert drop_near_repeats(heap, least=0.7) == slow
    assert len(slow) < len(heap)
    pairs = combinations(map(shingles, slow), 2)
    assert max(similarity(a, b) for a, b in pairs) < 0.7
