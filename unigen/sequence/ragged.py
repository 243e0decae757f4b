"""Rows of whole numbers of different lengths, kept compactly: 4 bytes a number, 8 a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np


class Ragged:
    """A growing list of rows of int32. A list of Python lists of the same numbers takes about ten times the
    memory."""

    def __init__(self, rows: Iterable[Sequence[int]] = ()):
        self._values, self._ends = array("i"), array("q", [0])
        for row in rows:
            self.append(row)

    def append(self, row: Sequence[int]) -> None:
        self._values.extend(row)
        self._ends.append(len(self._values))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> list[int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        return self._values[self._ends[i] : self._ends[i + 1]].tolist()

    def keep(self, rows: Iterable[int]) -> Ragged:
        """The given rows alone, in the given order."""
        return Ragged(self[i] for i in rows)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """``(values [N] int32, ends [rows + 1] int64)``: row i is ``values[ends[i]:ends[i + 1]]``. Copies, as
        the rows may still grow."""
        return np.array(self._values, dtype=np.int32), np.array(self._ends, dtype=np.int64)
