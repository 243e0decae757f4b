"""Intervals that cover, tests that hold their level, verdicts with the right sign."""

import itertools

import numpy as np
import pytest

from unigen.evaluation.distances import Frechet
from unigen.evaluation.results import Result
from unigen.evaluation.statistics import (
    RULES,
    _t_quantile,
    bootstrap,
    compare,
    estimate,
    estimate_by,
    half_samples,
    paired_bootstrap,
    paired_permutation,
    wilson,
)

LAWS = {
    "normal": (lambda random, n: random.normal(1, 2, n), 1),
    "exponential": (lambda random, n: random.exponential(1, n), 1),
    "uniform": (lambda random, n: random.random(n), 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_95_percent_intervals_cover_93_to_97_percent(law):
    draw, truth = LAWS[law]
    random, covered, times = np.random.default_rng(1), 0, 2000
    for seed in range(times):
        low, high = bootstrap(draw(random, 100)[:, None], draws=500, seed=seed)
        covered += low <= truth <= high
    assert 0.93 <= covered / times <= 0.97


@pytest.mark.slow
def test_the_interval_of_a_ratio_covers():
    random, covered, times = np.random.default_rng(2), 0, 1000
    for seed in range(times):
        lengths = random.integers(5, 30, 150).astype(float)
        low, high = bootstrap(
            np.stack([lengths * random.gamma(4, 0.25, 150), lengths], 1), "ratio", draws=500, seed=seed
        )
        covered += low <= 1 <= high
    assert 0.93 <= covered / times <= 0.97


@pytest.mark.slow
def test_the_interval_of_a_frechet_distance_covers_what_other_samples_would_give():
    random = np.random.default_rng(3)
    distance = Frechet(random.normal(size=(400, 6)))
    mean = np.mean([distance(random.normal(0.3, 1.2, (150, 6))) for _ in range(1500)])
    covered, times = 0, 600
    for seed in range(times):
        result = estimate_by("fd", random.normal(0.3, 1.2, (150, 6)), distance, seed=seed)
        covered += result.interval[0] <= mean <= result.interval[1]
    assert 0.92 <= covered / times <= 0.97  # the normal law around a statistic that is none: a little below


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_the_interval_of_a_share_covers_by_counting(share):
    # no simulation: every outcome with its binomial weight
    n, weight, covered = 200, (1 - share) ** 200, 0.0
    for hits in range(n + 1):
        low, high = wilson(hits, n)
        covered += weight * (low <= share <= high)
        weight *= (n - hits) / (hits + 1) * share / (1 - share)
    assert 0.93 <= covered <= 0.97


def test_a_share_of_none_or_all_is_not_certain():
    nothing, everything = estimate("a", np.zeros(20)), estimate("a", np.ones(20))
    assert nothing.value == 0 and nothing.interval[0] == 0 and 0.1 < nothing.interval[1] < 0.2
    assert everything.value == 1 and 0.8 < everything.interval[0] < 0.9 and everything.method == "Wilson"


def test_an_interval_holds_its_value_also_where_all_samples_are_equal():
    for n in (1, 2, 3, 10, 30, 97):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1
        for value in (0.1, 1 / 3, 0.7):
            for rule, parts in (("mean", np.full(n, value)), ("ratio", np.tile([value * 3, 3.0], (n, 1)))):
                one = estimate("a", parts, rule, draws=40)
                assert one.interval is None or one.interval[0] <= one.value <= one.interval[1]
            one = estimate_by("a", np.full(n, value), lambda rows: float(rows.mean()), bounds=(0, 1))
            assert one.interval is None or one.interval[0] <= one.value <= one.interval[1]


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)]
)
def test_students_quantiles_are_those_of_the_tables(freedom, expected):
    assert _t_quantile(0.975, freedom) == pytest.approx(expected, rel=0.01)


def test_the_bootstrap_of_a_mean_is_near_the_formula():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap(values[:, None], seed=1)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.97 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.97 * error, abs=0.15 * error)


def test_the_same_seed_gives_the_same_interval_to_the_digit():
    parts = np.random.default_rng(0).random((50, 1))
    assert bootstrap(parts, seed=3) == bootstrap(parts, seed=3) != bootstrap(parts, seed=4)


def test_the_interval_does_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    from unigen.evaluation import statistics

    parts = np.random.default_rng(0).random((50, 1))
    whole = bootstrap(parts, seed=3)
    monkeypatch.setattr(statistics, "_CELLS", 400)
    assert bootstrap(parts, seed=3) == pytest.approx(whole)


def test_halves_are_halves_without_repetition():
    halves = half_samples(11, 5, 0)
    assert [len(set(half.tolist())) for half in halves] == [5] * 5 and len({tuple(h) for h in halves}) == 5


# ---- pairs


def test_the_exact_permutation_test_is_that_of_its_definition():
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, (8, 1)), random.normal(0.8, 1, (8, 1))
    seen, difference = abs((b - a).mean()), (b - a)[:, 0]
    all_ways = [abs((difference * signs).mean()) for signs in itertools.product([1, -1], repeat=8)]
    expected = sum(value >= seen - 1e-12 for value in all_ways) / len(all_ways)
    assert paired_permutation(a, b) == expected


def test_the_sampled_permutation_test_is_near_the_exact_one(monkeypatch):
    from unigen.evaluation import statistics

    random = np.random.default_rng(1)
    a, b = random.normal(0, 1, (12, 1)), random.normal(0.5, 1, (12, 1))
    exact = paired_permutation(a, b)
    monkeypatch.setattr(statistics, "EXACT", 0)
    assert paired_permutation(a, b) == pytest.approx(exact, abs=0.02) and 0.01 < exact < 0.9


@pytest.mark.slow
def test_checkpoints_that_do_not_differ_are_told_apart_in_5_of_100():
    random, told = np.random.default_rng(5), 0
    for seed in range(400):
        quality = random.normal(0, 1, 60)
        a, b = (estimate("m", quality + random.normal(0, 0.5, 60), draws=0) for _ in "ab")
        told += compare(a, b, seed=seed, draws=500, shuffles=999).verdict != "no difference shown"
    assert 0.02 <= told / 400 <= 0.075


def test_a_checkpoint_against_itself_never_differs():
    result = estimate("m", np.random.default_rng(0).random(30))
    assert compare(result, result).verdict == "no difference shown" and compare(result, result).p == 1


def test_a_paired_difference_is_seen_that_two_intervals_would_hide():
    random = np.random.default_rng(2)
    quality = random.normal(0, 1, 200)
    a, b = (estimate("m", quality + shift + random.normal(0, 0.05, 200)) for shift in (0, 0.05))
    assert a.interval[1] > b.interval[0]  # the intervals overlap
    found = compare(a, b)
    assert found.verdict == "better" and found.interval[0] < 0.05 < found.interval[1] and found.p < 0.001
    low, high = paired_bootstrap(a.parts, b.parts)
    assert found.interval == (low, high)
    assert found.sentence().startswith("better by 0.046") and "n = 200" in found.sentence()


@pytest.mark.parametrize(
    ("higher", "shift", "verdict"),
    [
        (True, 1, "better"),
        (True, -1, "worse"),
        (False, 1, "worse"),
        (False, -1, "better"),
        (None, 1, "differs"),
    ],
)
def test_the_verdict_knows_which_end_is_good(higher, shift, verdict):
    values = np.random.default_rng(0).random(40)
    a, b = (estimate("m", x, higher_is_better=higher) for x in (values, values + shift * (1 + values)))
    found = compare(a, b)
    assert found.verdict == verdict and np.sign(found.difference) == shift
    assert found.sentence().startswith(f"{verdict} by {abs(found.difference):.4g} [")


def test_functions_of_samples_are_compared_too():
    random = np.random.default_rng(0)
    distance = Frechet(random.normal(size=(200, 4)))
    near, far, near_again = (
        estimate_by("fd", random.normal(shift, 1, (60, 4)), distance, higher_is_better=False)
        for shift in (0.2, 1, 0.2)
    )
    assert compare(far, near).verdict == "better" and compare(near, far).verdict == "worse"
    assert compare(near, near_again).verdict == "no difference shown"
    assert compare(near, near).p == 1


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"name": "m[n=3]"}, "different things"),
        ({"data": "x"}, "different references"),
        ({"value": None, "reason": "no library"}, "no library"),
        ({"n": 4}, "same samples"),
        ({"parts": None}, "not kept"),
    ],
)
def test_what_cannot_be_compared_is_not(other, reason):
    known = {"name": "m", "value": 0.5, "n": 3, "parts": np.array([[0.0], [0.5], [1]]), "data": "d"}
    found = compare(Result(**known), Result(**{**known, **other}))
    assert found.verdict == "not compared" and reason in found.sentence() and found.p is None


def test_one_sample_has_no_interval():
    assert estimate("m", np.array([0.3])).interval is None


def test_rules_take_many_sums_at_once():
    random = np.random.default_rng(0)
    for rule, width in {"mean": 1, "ratio": 2, "bleu": 10, "chrf": 18}.items():
        sums = random.integers(1, 50, (7, width)).astype(float)
        if rule == "bleu":
            sums[:, 6:] += sums[:, 2:6]
        many = RULES[rule](sums, 5)
        assert many.shape == (7,) and many == pytest.approx([float(RULES[rule](one, 5)) for one in sums])
