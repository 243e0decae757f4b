"""Distances against closed forms and their definitions written out."""

import numpy as np
import pytest

from unigen.evaluation.distances import (
    Cmmd,
    Frechet,
    Kid,
    Neighbours,
    cosines,
    frechet_at_infinity,
)


def gaussian(mean: np.ndarray, root: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n samples whose mean and covariance are ``mean`` and ``root root^T`` exactly."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ root.T + mean


def square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def test_frechet_of_gaussians_that_commute_is_the_closed_form():
    # diagonal covariances: sum of (m - m')^2 + (s - s')^2
    mean_x, mean_y = np.array([0.0, 1, -2]), np.array([1.0, 1, 2])
    s_x, s_y = np.array([1.0, 2, 0.5]), np.array([3.0, 2, 1.5])
    x, y = gaussian(mean_x, np.diag(s_x), 50, 0), gaussian(mean_y, np.diag(s_y), 70, 1)
    assert Frechet(y)(x) == pytest.approx(((mean_x - mean_y) ** 2).sum() + ((s_x - s_y) ** 2).sum())


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 5), (10, 10, 30)])  # the second: fewer than dimensions
def test_frechet_is_that_of_matrix_square_roots(n, m, d):
    random = np.random.default_rng(2)
    x, y = random.normal(size=(n, d)) @ random.normal(size=(d, d)), random.normal(size=(m, d)) + 1
    c_x, c_y, root = np.cov(x.T), np.cov(y.T), square_root(np.cov(x.T))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c_x + c_y - 2 * square_root(root @ c_y @ root))
    assert Frechet(y)(x) == pytest.approx(expected) == Frechet(x)(y)


@pytest.mark.parametrize("n", [6, 8, 200])  # fewer samples than dimensions, as many, more
def test_frechet_of_a_set_to_itself_is_nothing(n):
    x = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    assert 0 <= Frechet(x)(x) < 1e-12


def test_frechet_at_infinity_takes_the_bias_away():
    pairs = [np.random.default_rng(seed).normal(size=(2, 400, 16)) for seed in range(10)]
    finite = np.mean([Frechet(y)(x) for x, y in pairs])
    infinite = np.mean([frechet_at_infinity(x, y) for x, y in pairs])
    assert finite > 0.35 and abs(infinite) < 0.06  # three times its standard error
    x, y = pairs[0]
    assert frechet_at_infinity(x + 0.5, y) == pytest.approx(16 * 0.25, rel=0.1)
    assert frechet_at_infinity(x, y) == frechet_at_infinity(x, y) != frechet_at_infinity(x, y, seed=1)


def test_kid_is_its_definition():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(6, 4)), random.normal(size=(9, 4)) + 0.3

    def k(a, b):
        return (a @ b / 4 + 1) ** 3

    inside = [
        sum(k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j) / (len(a) * (len(a) - 1))
        for a in (x, y)
    ]
    across = np.mean([k(a, b) for a in x for b in y])
    assert Kid(y)(x) == pytest.approx(sum(inside) - 2 * across)


def test_kid_is_unbiased():
    random = np.random.default_rng(0)
    values = [Kid(random.normal(size=(20, 3)))(random.normal(size=(20, 3))) for _ in range(500)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 500**0.5 and min(values) < 0


def test_cmmd_is_its_definition():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(5, 4)), random.normal(size=(7, 4))
    u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))

    def mean(a, b):
        return np.mean([np.exp(-((p - q) ** 2).sum() / 200) for p in a for q in b])

    assert Cmmd(y)(x) == pytest.approx(1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v)))
    assert Cmmd(y)(3 * y) == pytest.approx(0, abs=1e-9)  # directions alone count


def test_parts_at_a_time_change_nothing(monkeypatch):
    from unigen.evaluation import distances

    random = np.random.default_rng(0)
    x, y = random.normal(size=(23, 4)), random.normal(size=(31, 4))
    asked = [Kid, Cmmd, lambda r: Neighbours(r, 3).density, lambda r: Neighbours(r, 3).coverage]
    whole = [make(y)(x) for make in asked]
    monkeypatch.setattr(distances, "_CELLS", 100)
    assert [make(y)(x) for make in asked] == pytest.approx(whole)


@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_are_their_definitions(k):
    random = np.random.default_rng(k)
    x, y = random.normal(size=(12, 2)) + 0.7, random.normal(size=(15, 2))

    def apart(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    radius = {name: np.sort(apart(a, a), 1)[:, k] for name, a in {"x": x, "y": y}.items()}
    inside = apart(x, y) <= radius["y"]
    balls = Neighbours(y, k)
    assert balls.precision(x) == pytest.approx(inside.any(1).mean())
    assert balls.recall(x) == pytest.approx((apart(y, x) <= radius["x"]).any(1).mean())
    assert balls.density(x) == pytest.approx(inside.sum() / (k * 12))
    assert balls.coverage(x) == pytest.approx(inside.any(0).mean())


def test_neighbours_of_one_distribution_are_dense_and_of_another_far():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 500, 4))
    balls = Neighbours(y, 5)
    assert balls.density(x) == pytest.approx(1, abs=0.1) and balls.coverage(x) > 0.9
    assert balls.precision(x + 100) == balls.recall(x + 100) == balls.density(x + 100) == 0


def test_cosines():
    x = np.array([[1.0, 0], [1, 1], [0, 0]])
    assert cosines(x, np.array([[2.0, 0], [-1, -1], [1, 0]])) == pytest.approx([1, -1, 0])
