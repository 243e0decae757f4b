"""How sure a number is: bootstrap intervals, and whether one checkpoint beats another on the same samples.

A metric is a function of sums over samples (``Result.parts`` and a rule) or, where sums do not suffice, of
the samples themselves (``Result.rows`` and a function). Sums are resampled thousands of times in one matrix
product; functions are computed anew for every draw, some dozens of times. All draws come from a seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from unigen.evaluation.results import Result, digest_of

ALPHA = 0.05  # intervals hold 95 %
DRAWS = 2000  # resamples of sums
SHUFFLES = 9999  # of which, with what was seen, p is a fraction of 10,000
HALVES = 40  # draws where each computes the metric anew
EXACT = 12  # up to so many samples that differ, all ways of exchanging them are looked at
_CELLS = 4_000_000  # numbers held at a time
_NORMAL = NormalDist()

SumRule = Callable[[np.ndarray, int], np.ndarray]


def _mean(sums: np.ndarray, n: int) -> np.ndarray:
    return sums[..., 0] / n


def _ratio(sums: np.ndarray, n: int) -> np.ndarray:
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros_like(sums[..., 0]), where=sums[..., 1] > 0)


def _tasks(sums: np.ndarray, n: int) -> np.ndarray:
    """The mean of the tasks' means. ``sums``: for each task its values, and how many there are."""
    count = sums[..., 1::2]
    means = np.divide(sums[..., 0::2], count, out=np.zeros_like(count), where=count > 0)
    return means.sum(-1) / np.maximum((count > 0).sum(-1), 1)


def _perplexity(sums: np.ndarray, n: int) -> np.ndarray:
    """``sums``: negative log-likelihoods in nats, and tokens."""
    return np.exp(_ratio(sums, n))


def _bleu(sums: np.ndarray, n: int) -> np.ndarray:
    """Papineni et al. 2002, equation 3, times 100, with sacrebleu's smoothing ``exp``. ``sums``: length of
    the predictions, of the references, then matches of 1 to 4-grams, then how many there are."""
    length, reference, matches, totals = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    # the k-th order without a match counts as 1 / 2^k of one match
    zeros = np.cumsum((matches == 0) & (totals > 0), axis=-1)
    counted = np.where(matches == 0, 0.5**zeros, matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(counted / totals).mean(-1)
        score = 100 * np.exp(np.minimum(0, 1 - reference / length) + logs)
    usable = (totals > 0).all(-1) & (matches > 0).any(-1)
    return np.where(usable, score, 0.0)


def _chrf(sums: np.ndarray, n: int, beta: float = 2.0) -> np.ndarray:
    """Popović 2015 with sacrebleu's effective order. ``sums``: for each order, n-grams of the prediction, of
    the reference, and matches."""
    made, wanted, matched = (sums[..., start::3] for start in range(3))
    there = (made > 0) & (wanted > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        orders = there.sum(-1)
        precision = np.where(there, matched / made, 0).sum(-1) / orders
        recall = np.where(there, matched / wanted, 0).sum(-1) / orders
        score = 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
    return np.nan_to_num(score)


RULES: dict[str, SumRule] = {
    "mean": _mean,
    "ratio": _ratio,
    "tasks": _tasks,
    "perplexity": _perplexity,
    "bleu": _bleu,
    "chrf": _chrf,
}
"""From sums [..., k] over n samples to values [...]."""


def value_of(parts: np.ndarray, rule: str) -> float:
    """The metric of ``parts`` [n, k]."""
    return float(RULES[rule](parts.sum(0), len(parts)))


def estimate(
    name: str, parts: np.ndarray, rule: str = "mean", *, seed: int = 0, draws: int = DRAWS, **known: object
) -> Result:
    """The :class:`Result` of ``parts`` [n, k] or, of a mean, [n]: value and interval, by :func:`bootstrap`,
    of a share of samples by :func:`wilson`. ``known``: further fields."""
    parts = np.asarray(parts, np.float64)
    parts = parts[:, None] if parts.ndim == 1 else parts
    samples = parts[:, 0] if rule == "mean" else None
    result = Result(name, value_of(parts, rule), len(parts), samples=samples, parts=parts, rule=rule)
    interval, method = None, ""
    if samples is not None and np.isin(samples, (0, 1)).all():
        interval, method = wilson(int(samples.sum()), len(samples)), "Wilson"
    elif draws and len(parts) > 1:
        interval = bootstrap(parts, rule, seed=seed, draws=draws)
        method = f"bootstrap BCa, {draws} draws, seed {seed}"
    return replace(result, interval=interval, method=method, **known)  # type: ignore[arg-type]


def estimate_by(
    name: str,
    rows: np.ndarray,
    function: Callable[[np.ndarray], float],
    *,
    seed: int = 0,
    draws: int = HALVES,
    least: int = 4,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    **known: object,
) -> Result:
    """The :class:`Result` of a function of n ``rows``: its value, and an interval by :func:`half_samples`,
    which needs ``least`` rows in a half and stays within ``bounds``."""
    value, interval, method = function(rows), None, ""
    if draws and len(rows) // 2 >= least:
        values = np.array([function(rows[half]) for half in half_samples(len(rows), draws, seed)])
        low, high = _around(value, values)
        interval = _holding(value, max(bounds[0], low), min(bounds[1], high))
        method = f"half-samples, {draws} draws, seed {seed}"
    result = Result(name, value, len(rows), interval, method, rows=rows, function=function)
    return replace(result, **known)  # type: ignore[arg-type]


# ---- intervals


def bootstrap(
    parts: np.ndarray, rule: str = "mean", *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the metric of ``parts`` [n, k].

    Efron & Tibshirani 1993: bias-corrected and accelerated (14.9-14.15), expanded as Hesterberg 2015
    (section 3.4) has it, since a bootstrap over n samples is too narrow by the factor sqrt((n - 1) / n) and
    by the step from the normal law to Student's.
    """
    return _interval(parts, RULES[rule], draws, seed)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, ``hits`` of ``n`` (Wilson 1927). A bootstrap of n equal answers would
    claim to be sure."""
    z, share = _NORMAL.inv_cdf(1 - ALPHA / 2), hits / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return _holding(share, max(0.0, middle - margin), min(1.0, middle + margin))


def _holding(value: float, low: float, high: float) -> tuple[float, float]:
    """The ends of an interval with the value within them. Where all samples are equal, or a share is 0 or 1,
    the value is an end, and rounding would put it outside."""
    return min(value, low), max(value, high)


def _interval(parts: np.ndarray, rule: SumRule, draws: int, seed: int) -> tuple[float, float]:
    n = len(parts)
    assert n > 1, "one sample has no interval"
    total = parts.sum(0)
    values = np.sort(np.concatenate([rule(counts @ parts, n) for counts in _resamples(n, draws, seed)]))
    seen = float(rule(total, n))
    # the expanded level, as a normal quantile
    edge = np.sqrt(n / (n - 1)) * _t_quantile(1 - ALPHA / 2, n - 1)
    # samples that equal what was seen count half: metrics of few samples take few values
    below = ((values < seen).sum() + (values == seen).sum() / 2) / len(values)
    shift = _NORMAL.inv_cdf(float(np.clip(below, 1 / (2 * draws), 1 - 1 / (2 * draws))))
    without = rule(total - parts, n - 1)
    deviation = without.mean() - without
    spread = float((deviation**2).sum()) ** 1.5
    acceleration = float((deviation**3).sum()) / (6 * spread) if spread > 0 else 0.0
    ends = (shift - edge, shift + edge)
    low, high = (_NORMAL.cdf(shift + z / max(1 - acceleration * z, 1e-3)) for z in ends)
    return _holding(seen, float(np.quantile(values, low)), float(np.quantile(values, high)))


def _resamples(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n samples is drawn: [some, n] at a time, ``draws`` in all."""
    random = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for start in range(0, draws, step):
        some = min(step, draws - start)
        picked = random.integers(0, n, (some, n), dtype=np.int64)
        picked += np.arange(some)[:, None] * n
        yield np.bincount(picked.ravel(), minlength=some * n).reshape(some, n).astype(np.float64)


def half_samples(n: int, draws: int, seed: int) -> list[np.ndarray]:
    """Indices [n // 2] of random halves without repetition.

    The delete-d jackknife (Shao & Wu 1989, equation 2.2) with d = n / 2: values over halves spread around
    their own mean as the value over all n spreads around the truth. Draws with repetition would not do for
    distances of distributions, which take copies for concentration.
    """
    random = np.random.default_rng(seed)
    return [np.sort(random.permutation(n)[: n // 2]) for _ in range(draws)]


def _around(value: float, halves: np.ndarray) -> tuple[float, float]:
    """A value plus and minus what the values of its halves spread, by Student's law."""
    margin = _t_quantile(1 - ALPHA / 2, len(halves) - 1) * float(halves.std(ddof=1))
    return value - margin, value + margin


def _t_quantile(probability: float, freedom: int) -> float:
    """Student's quantile: exact for 1 and 2 degrees of freedom, beyond them by the expansion of Abramowitz &
    Stegun 26.7.5 (within 1 % at 3 degrees, for 95 % intervals)."""
    if freedom == 1:
        return float(np.tan(np.pi * (probability - 0.5)))
    if freedom == 2:
        return float((2 * probability - 1) / np.sqrt(2 * probability * (1 - probability)))
    z = _NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))


# ---- comparisons


@dataclass(frozen=True)
class Comparison:
    """What can be said of B against A on the same samples.

    Args:
        name: identity of the metric.
        a, b: the two values.
        difference: b - a; interval: its 95 % interval; p: of the paired permutation test, two-sided.
        n: pairs.
        verdict: ``better`` or ``worse`` (of B), ``differs`` where neither end is good, ``no difference
            shown``, or ``not compared``, with the ``reason``; otherwise the reason says over which of the
            samples it is, where not over all.
    """

    name: str
    verdict: Literal["better", "worse", "differs", "no difference shown", "not compared"]
    a: float | None = None
    b: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    n: int = 0
    reason: str = ""

    def sentence(self) -> str:
        """``better by 0.031 [0.012, 0.05], p = 0.0021, n = 297``; the size is given without a sign."""
        if self.verdict == "not compared":
            return f"not compared: {self.reason}"
        over = f", {self.reason}" if self.reason else ""
        if self.verdict == "no difference shown":
            return f"no difference shown with n = {self.n} (p = {self.p:.2g}){over}"
        assert self.difference is not None and self.interval is not None and self.p is not None
        low, high = self.interval if self.difference > 0 else (-self.interval[1], -self.interval[0])
        size = f"{abs(self.difference):.4g} [{low:.4g}, {high:.4g}]"
        return f"{self.verdict} by {size}, p = {self.p:.2g}, n = {self.n}{over}"


def compare(
    a: Result, b: Result, *, seed: int = 0, draws: int = DRAWS, shuffles: int = SHUFFLES
) -> Comparison:
    """Is B better than A? Both over the same samples in the same order or, where they say what their samples
    are (``Result.pairs``), over those that both have.

    A difference counts as shown where the paired permutation test gives p < 0.05 and the paired bootstrap's
    95 % interval leaves out 0.
    """
    over = ""
    if a.pairs is not None and b.pairs is not None and a.pairs != b.pairs:
        there = {*a.pairs} & {*b.pairs}
        a, b, over = _over(a, there), _over(b, there), "over the samples that both have"
    reason = _not_comparable(a, b)
    if reason:
        return Comparison(a.name, "not compared", a.value, b.value, n=a.n, reason=reason)
    assert a.value is not None and b.value is not None
    if a.parts is not None and b.parts is not None:
        interval = paired_bootstrap(a.parts, b.parts, a.rule, draws=draws, seed=seed)
        p = paired_permutation(a.parts, b.parts, a.rule, draws=shuffles, seed=seed)
    else:
        assert a.rows is not None and b.rows is not None and a.function is not None
        interval, p = _compare_rows(a.rows, b.rows, a.function, seed)
    difference = b.value - a.value
    shown = p < ALPHA and not interval[0] <= 0 <= interval[1]
    if not shown:
        verdict = "no difference shown"
    elif a.higher_is_better is None:
        verdict = "differs"
    else:
        verdict = "better" if (difference > 0) == a.higher_is_better else "worse"
    return Comparison(a.name, verdict, a.value, b.value, difference, interval, p, a.n, over)  # type: ignore[arg-type]


def _over(result: Result, there: set[Any]) -> Result:
    """The result over these of its samples, as if it had been measured on them alone."""
    kept = [number for number, pair in enumerate(result.pairs or ()) if pair in there]
    pairs = tuple((result.pairs or ())[number] for number in kept)
    result = replace(result, n=len(kept), pairs=pairs, data=digest_of(pairs))
    if result.parts is None or not kept:
        return result
    name, parts = re.sub(r"\|n=\d+", f"|n={len(kept)}", result.name), result.parts[kept]
    return replace(result, name=name, parts=parts, value=value_of(parts, result.rule))


def _not_comparable(a: Result, b: Result) -> str:
    for result in (a, b):
        if result.value is None:
            return f"one has no value ({result.reason})"
    if a.name != b.name:
        return f"they measured different things, {a.name} and {b.name}"
    if a.data != b.data:
        return "they measured other samples or were held against different references"
    if a.n != b.n or a.n < 2:
        return f"a paired test needs the same samples, at least two (n = {a.n} and {b.n})"
    for result in (a, b):
        if result.parts is None or result.rule not in RULES:
            if result.rows is None or result.function is None:
                return "the values of the samples were not kept"
            if result.interval is None:
                return f"{a.n} samples are too few to say how sure the difference is"
    return ""


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, rule: str = "mean", *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval (BCa) of ``metric(b) - metric(a)``, both [n, k], with the same samples drawn of both
    (Koehn 2004, for translation; Efron & Tibshirani 1993, section 8.3)."""
    assert a.shape == b.shape, f"pairs need equal shapes, not {a.shape} and {b.shape}"
    k, inner = a.shape[1], RULES[rule]

    def difference(sums: np.ndarray, n: int) -> np.ndarray:
        return inner(sums[..., k:], n) - inner(sums[..., :k], n)

    return _interval(np.concatenate([a, b], 1), difference, draws, seed)


def paired_permutation(
    a: np.ndarray, b: np.ndarray, rule: str = "mean", *, draws: int = SHUFFLES, seed: int = 0
) -> float:
    """Two-sided p of "A and B are exchangeable sample by sample" for ``metric(b) - metric(a)``, both [n, k].

    Fisher's permutation test (approximate randomization, Noreen 1989; Riezler & Maxwell 2005): the share of
    ways to exchange the two answers to some of the samples that give a difference as large as what was seen,
    which is one of them. All ways where at most 12 samples differ, else ``draws`` of them.
    """
    assert a.shape == b.shape, f"pairs need equal shapes, not {a.shape} and {b.shape}"
    n, inner = len(a), RULES[rule]
    total_a, total_b = a.sum(0), b.sum(0)
    differs = np.flatnonzero((a != b).any(1))
    change = (b - a)[differs]
    seen = abs(float(inner(total_b, n) - inner(total_a, n)))
    bound = seen * (1 - 1e-12) - 1e-15  # equal up to the order of summation is equal
    extreme, looked = 0, 0
    for exchanged in _exchanges(len(differs), draws, seed):
        moved = exchanged @ change
        values = inner(total_b - moved, n) - inner(total_a + moved, n)
        extreme += int((np.abs(values) >= bound).sum())
        looked += len(values)
    exact = len(differs) <= EXACT
    return extreme / looked if exact else (extreme + 1) / (looked + 1)


def _exchanges(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Which of n samples are exchanged: [some, n] of 0 and 1 at a time."""
    if n <= EXACT:
        yield ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)
        return
    random = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for start in range(0, draws, step):
        yield random.integers(0, 2, (min(step, draws - start), n), dtype=np.int8).astype(np.float64)


def _compare_rows(
    a: np.ndarray, b: np.ndarray, function: Callable[[np.ndarray], float], seed: int, shuffles: int = 199
) -> tuple[tuple[float, float], float]:
    """Interval of ``function(b) - function(a)`` by halves of the same samples, and p by permutation."""
    seen = function(b) - function(a)
    if all(np.array_equal(x, y) for x, y in zip(a, b)):
        return (0.0, 0.0), 1.0
    halves = half_samples(len(a), HALVES, seed)
    values = np.array([function(b[half]) - function(a[half]) for half in halves])
    random, extreme = np.random.default_rng(seed), 1
    for _ in range(shuffles):
        exchanged = random.integers(0, 2, len(a)).astype(bool)
        first, second = a.copy(), b.copy()
        first[exchanged], second[exchanged] = b[exchanged], a[exchanged]
        extreme += abs(function(second) - function(first)) >= abs(seen)
    return _around(seen, values), extreme / (shuffles + 1)
