"""Histograms and repetitions agree with the slow way to count them."""

from itertools import pairwise

import numpy as np

from unigen.commands.check.statistics import Histogram, find_repeats


def test_histograms_count_like_numpy():
    r = np.random.default_rng(0)
    numbers = np.concatenate([r.integers(0, 50, 300), r.integers(0, 100_000, 300), [0, 1 << 40]])
    whole = Histogram()
    for piece in np.array_split(numbers, 200):
        whole.merge(Histogram(piece))
    assert len(whole) == 602 and whole.total() == numbers.sum()
    assert [whole.quantile(q) for q in (0.0, 0.25, 0.5, 0.99, 1.0)] == [
        int(np.quantile(numbers, q, method="inverted_cdf")) for q in (0.0, 0.25, 0.5, 0.99, 1.0)
    ]
    for some in (numbers, numbers[:300], np.array([7]), np.array([1000, 1001, 1015]), np.array([0])):
        bins = Histogram(some).bins()
        assert sum(n for *_, n in bins) == len(some) and all(a <= b for a, b, _ in bins)
        assert all(((some >= a) & (some <= b)).sum() == n for a, b, n in bins)
        assert all(first[1] + 1 == second[0] for first, second in pairwise(bins)) and len(bins) < 100
    assert np.array_equal(whole.spread(10_000), np.sort(numbers))
    assert Histogram().describe() == {"count": 0} and len(whole.spread(100)) == 100


def test_repeats_of_hashes():
    hashes = np.array([5, 0, 9, 5, 7, 9, 9, 0], np.uint64)
    found = find_repeats(hashes, None, 8)
    assert (found.distinct, found.surplus) == (3, 3)
    assert [tuple(m) for m in found.most] == [(3, [2, 5, 6]), (2, [0, 3])]
    assert find_repeats(np.zeros(0, np.uint64), None, 8) == (0, 0, [])
