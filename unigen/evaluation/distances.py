"""The mathematics of distances between two sets of features, in float64. Nothing here knows of pictures.

``x`` are the features of what was made [n, d], ``y`` of the references [m, d]. Where the same references are
asked for often, an object holds what depends on them alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_CELLS = 16_000_000  # similarities held at a time


def _double(features: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(features).to(torch.float64)


class Frechet:
    """Frechet distance of Gaussians with the sets' means and covariances (Dowson & Landau 1982; Heusel et al.
    2017, equation 6): ``|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))``.

    Covariances are unbiased (divided by n - 1), as in all published code. With ``C = R^T R`` the last trace
    is the sum of the singular values of ``R_x R_y^T``: no square root of a matrix that may have none, also
    where there are fewer samples than dimensions.
    """

    def __init__(self, references: np.ndarray | Tensor):
        assert len(references) > 1, "a covariance needs two samples"
        self.mean, self.root = _mean_and_root(_double(references))

    def __call__(self, x: np.ndarray | Tensor) -> float:
        """The distance of ``x`` [n, d], n > 1, to the references; at least 0."""
        assert len(x) > 1, "a covariance needs two samples"
        mean, root = _mean_and_root(_double(x))
        both = torch.linalg.svdvals(root @ self.root.T).sum()
        apart = ((mean - self.mean) ** 2).sum()
        distance = float(apart + (root**2).sum() + (self.root**2).sum() - 2 * both)
        return max(0.0, distance)  # rounding alone makes it negative


def _mean_and_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d], and R [min(n, d), d] with ``R^T R`` the covariance."""
    mean = x.mean(0)
    root = (x - mean) / (len(x) - 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if len(x) > x.shape[1] else root


def frechet_at_infinity(
    x: np.ndarray, references: np.ndarray, *, points: int = 15, least: int = 0, seed: int = 0
) -> float:
    """The Frechet distance that infinitely many samples would give (Chong & Forsyth 2020, section 4): a
    straight line through distances of random subsets against 1 / size, read at 0.

    Args:
        points: sizes, evenly spread from ``least`` to all; default a quarter of all, at least 50, at most
            5000.
    """
    n = min(len(x), len(references))
    least = least or min(5000, max(50, n // 4))
    assert least < n, f"it takes more than {least} samples"
    random = np.random.default_rng(seed)
    sizes = np.linspace(least, n, points).astype(int)
    # both sets shrink, since both bias the distance
    values = [
        Frechet(references[random.permutation(len(references))[:size]])(x[random.permutation(len(x))[:size]])
        for size in sizes
    ]
    _, at_zero = np.polyfit(1 / sizes, values, 1)
    return float(at_zero)


class Kernel:
    """Squared maximum mean discrepancy (Gretton et al. 2012) to references [m, d] by a kernel k.

    ``unbiased`` (their equation 3): means of k within x and within y leave out each sample with itself.
    Otherwise (equation 5) they hold them.
    """

    def __init__(self, references: np.ndarray | Tensor, *, unbiased: bool = True):
        self.y, self.unbiased = self.prepared(_double(references)), unbiased
        self.inside = self._inside(self.y)

    def prepared(self, x: Tensor) -> Tensor:
        return x

    def k(self, x: Tensor, y: Tensor) -> Tensor:
        """[n, d], [m, d] -> [n, m]."""
        raise NotImplementedError

    def itself(self, x: Tensor) -> Tensor:
        """k of each sample with itself: [n, d] -> [n]."""
        return torch.stack([self.k(one[None], one[None])[0, 0] for one in x])

    def __call__(self, x: np.ndarray | Tensor) -> float:
        x = self.prepared(_double(x))
        across = sum(float(self.k(part, self.y).sum()) for part in _parts(x, len(self.y)))
        return self._inside(x) + self.inside - 2 * across / (len(x) * len(self.y))

    def _inside(self, x: Tensor) -> float:
        n = len(x)
        total = sum(float(self.k(part, x).sum()) for part in _parts(x, n))
        if not self.unbiased:
            return total / n**2
        assert n > 1, "an unbiased estimate needs two samples"
        itself = float(self.itself(x).sum())
        return (total - itself) / (n * (n - 1))


class Kid(Kernel):
    """Kernel Inception distance (Bińkowski et al. 2018, section 4.1): unbiased, with the kernel
    ``(x y / d + 1)^3``. May be negative."""

    def k(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def itself(self, x: Tensor) -> Tensor:
        return ((x**2).mean(1) + 1) ** 3


class Cmmd(Kernel):
    """CMMD (Jayasumana et al. 2024, section 4): unit vectors, a Gaussian kernel with sigma 10, not unbiased,
    times 1000, as in its published code."""

    def __init__(self, references: np.ndarray | Tensor):
        super().__init__(references, unbiased=False)

    def prepared(self, x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=1)

    def k(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-_squared(x, y) / (2 * CMMD_SIGMA**2))

    def __call__(self, x: np.ndarray | Tensor) -> float:
        return CMMD_SCALE * super().__call__(x)


class Neighbours:
    """Precision and recall (Kynkäänniemi et al. 2019, equations 1-2), density and coverage (Naeem et al.
    2020, equations 4 and 6), by balls around samples that reach to their ``k``-th neighbour."""

    def __init__(self, references: np.ndarray | Tensor, k: int):
        assert len(references) > k, f"neighbour {k} needs more than {k} references"
        self.y, self.k = _double(references), k
        self.radii = _radii(self.y, k)

    def _within(self, x: Tensor) -> Iterator[Tensor]:
        """Whether each of some x lies in the ball of each reference: [some, m] at a time."""
        for part in _parts(x, len(self.y)):
            yield _squared(part, self.y) <= self.radii

    def precision(self, x: np.ndarray | Tensor) -> float:
        """Share of x within a ball around a reference."""
        return sum(int(inside.any(1).sum()) for inside in self._within(_double(x))) / len(x)

    def recall(self, x: np.ndarray | Tensor) -> float:
        """Share of references within a ball around one of x."""
        return Neighbours(x, self.k).precision(self.y)

    def density(self, x: np.ndarray | Tensor) -> float:
        """In how many balls around references one of x lies, by k; 1 where x are like the references."""
        return sum(int(inside.sum()) for inside in self._within(_double(x))) / (self.k * len(x))

    def coverage(self, x: np.ndarray | Tensor) -> float:
        """Share of references whose ball holds one of x."""
        held = torch.zeros(len(self.y), dtype=torch.bool)
        for inside in self._within(_double(x)):
            held |= inside.any(0)
        return float(held.double().mean())


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance [n] of each to its k-th neighbour, itself left out."""
    parts = [_squared(part, x).kthvalue(k + 1, dim=1).values for part in _parts(x, len(x))]
    return torch.cat(parts)


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [n, m], at least 0."""
    return ((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T).clamp_min(0)


def _parts(x: Tensor, others: int) -> Iterator[Tensor]:
    yield from x.split(max(1, _CELLS // max(1, others)))


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine [n] of each of x [n, d] with its partner of y [n, d]; 0 where one has no length."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.divide((x * y).sum(1), lengths, out=np.zeros(len(x)), where=lengths > 0)
