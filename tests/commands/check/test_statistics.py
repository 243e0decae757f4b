"""Descriptions and repetitions agree with the slow way to count them."""

from itertools import pairwise

import numpy as np
import pytest

from unigen.commands.check.statistics import QUANTILES, bins, distribution_of, find_repeats


def test_numbers_are_described_as_numpy_counts_them():
    r = np.random.default_rng(0)
    numbers = np.concatenate([r.integers(0, 50, 300), r.integers(0, 100_000, 300), [0, 1 << 30]])
    found = distribution_of(numbers)
    assert (found["count"], found["total"], found["min"], found["max"]) == (602, numbers.sum(), 0, 1 << 30)
    assert list(found["quantiles"].values()) == [
        int(np.quantile(numbers, q, method="inverted_cdf")) for q in QUANTILES
    ]
    assert distribution_of(numbers[:0]) == {"count": 0}


@pytest.mark.parametrize(
    "numbers", [[*range(50), 100_000, 0], [5, 5, 30, 49], [7], [1000, 1001, 1015], [0], [0, 1 << 30]]
)
def test_bins_hold_every_number_once(numbers):
    ordered = np.sort(np.array(numbers, np.int32))
    found = bins(ordered)
    assert all(((ordered >= a) & (ordered <= b)).sum() == n for a, b, n in found)
    assert sum(n for *_, n in found) == len(numbers) and len(found) < 100
    assert all(a <= b for a, b, _ in found)
    assert all(first[1] + 1 == second[0] for first, second in pairwise(found))


def test_repeats_of_hashes():
    hashes = np.array([5, 0, 9, 5, 7, 9, 9, 0], np.uint64)
    found = find_repeats(hashes, 8)
    assert (found.distinct, found.surplus) == (3, 3)
    assert [tuple(m) for m in found.most] == [(3, [2, 5, 6]), (2, [0, 3])]
    assert find_repeats(np.zeros(0, np.uint64), 8) == (0, 0, [])
