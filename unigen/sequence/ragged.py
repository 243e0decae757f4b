"""Arrays of one dtype and different lengths, kept compactly: their own bytes, and 8 for each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np


class Ragged:
    """A growing list of arrays of one dtype. A list of Python lists of the same numbers takes about ten times
    the memory."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        # views of both exist in the methods below alone: while there is one, nothing can be appended
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, row: np.ndarray | Sequence[Any]) -> None:
        self._bytes += np.array(row, self.dtype).tobytes()
        self._ends.append(len(self._bytes) // self.dtype.itemsize)

    def extend(self, other: Ragged) -> None:
        """Appends all rows of another one."""
        first = self._ends[-1]
        self._bytes += other._bytes
        self._ends.extend(first + end for end in other._ends[1:])

    @classmethod
    def of(cls, values: np.ndarray, ends: np.ndarray) -> Ragged:
        """What :meth:`values` and :meth:`ends` say. Raises ValueError where they do not belong together."""
        made = cls(values.dtype)
        if (
            ends.dtype != np.int64
            or ends.ndim != 1
            or not len(ends)
            or ends[0] != 0
            or ends[-1] != len(values)
        ):
            raise ValueError("ends of other rows")
        made._bytes, made._ends = bytearray(values.tobytes()), array("q", ends.tobytes())
        return made

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        size = self.dtype.itemsize
        return np.frombuffer(self._bytes[self._ends[i] * size : self._ends[i + 1] * size], self.dtype)

    def ends(self) -> np.ndarray:
        """[rows + 1] int64: row i is ``values()[ends[i]:ends[i + 1]]``."""
        return np.array(self._ends)

    def values(self) -> np.ndarray:
        """All rows, one after another [N]."""
        return np.frombuffer(bytes(self._bytes), self.dtype)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The given rows one after another [N], and how long each is [n] int64."""
        ends = np.frombuffer(self._ends, np.int64)
        counts = ends[rows + 1] - ends[rows]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        values = np.frombuffer(self._bytes, self.dtype)
        # twice as fast as indexing where the dtype has fields
        return values.take(np.repeat(ends[rows], counts) + inside), counts
