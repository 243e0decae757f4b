"""Random numbers by counting: each follows from (seed, epoch, record) and a purpose, and from nothing else.

So workers, ranks and resumes cannot change them, and none is saved.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_STEP, _ALL = 0x9E3779B97F4A7C15, 2**64 - 1


@dataclass(frozen=True)
class RandomKey:
    """Names the random numbers of one epoch pass over one record."""

    seed: int
    epoch: int
    record: int
    training: bool = True  # validation drops nothing
    # also the clean copies that single_image_stop_prob of the passes have
    all_clean_copies: bool = False

    def seed_for(self, purpose: str) -> int:
        text = f"{self.seed}/{self.epoch if self.training else 'validation'}/{self.record}/{purpose}"
        return _digest(text) >> 1

    def choices(self, purpose: str) -> random.Random:
        return random.Random(self.seed_for(purpose))

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed_for(purpose))

    def structure(self, n: int) -> list[float]:
        """``n`` numbers in [0, 1) that decide which blocks a pass has: the first decides on clean copies, the
        others on each block's dropout."""
        base = _structure_base(self.seed, self.epoch if self.training else None)
        key = _scramble(base + self.record * _STEP & _ALL)
        return [(_scramble(key + i * _STEP & _ALL) >> 11) * 2.0**-53 for i in range(1, n + 1)]


def structure_numbers(seed: int, epoch: int | None, records: np.ndarray, n: int) -> np.ndarray:
    """:meth:`RandomKey.structure` of many records at once: ``[records, n]`` float64; ``epoch`` is None for
    validation.

    A hash of counters (the finaliser of SplitMix64; Steele, Lea and Flood 2014), so that lengths of a whole
    epoch cost no loop.
    """
    step = np.uint64(_STEP)
    with np.errstate(over="ignore"):
        keys = _scramble(np.uint64(_structure_base(seed, epoch)) + records.astype(np.uint64) * step)
        bits = _scramble(keys[:, None] + np.arange(1, n + 1, dtype=np.uint64) * step)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=64)
def _structure_base(seed: int, epoch: int | None) -> int:
    return _digest(f"{seed}/{'validation' if epoch is None else epoch}/structure")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _scramble(z: Any) -> Any:
    """Mixes the bits of a number below 2^64, or of an array of them (whose products wrap by themselves)."""
    number = np.uint64 if isinstance(z, np.ndarray) else int
    z = (z ^ (z >> number(30))) * number(0xBF58476D1CE4E5B9) & number(_ALL)
    z = (z ^ (z >> number(27))) * number(0x94D049BB133111EB) & number(_ALL)
    return z ^ (z >> number(31))
