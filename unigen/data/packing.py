"""Which samples share a row: best-fit packing with a bounded look-ahead.

A row starts with the sample that has waited longest, so none waits for ever; then the longest waiting sample
that still fits goes in, until none does.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator

# Rows are cut while so many samples wait and they fill so many rows (short samples: 128 of them may not fill
# one), but at most MOST wait: as many whole numbers are all that a resume needs of the packing.
LOOK_AHEAD, ROWS_AHEAD, MOST = 128, 2, 8192


class Packer:
    """Samples in, rows out. ``waiting`` is the whole state.

    Args:
        budget: Tokens of a row; a longer sample gets a row of its own.
        look_ahead: Samples to choose from.
    """

    def __init__(self, budget: int, look_ahead: int = LOOK_AHEAD):
        self.budget, self.look_ahead, self.tokens = budget, look_ahead, 0
        self._queue: deque[int] = deque()  # by age; those already in a row stay until they come to the front
        self._lengths: dict[int, int] = {}  # the samples that wait
        # (length, -sample): of equal lengths the older one is found first
        self._sorted: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def ready(self) -> bool:
        """Do enough samples wait to choose a row from?"""
        return len(self) >= self.look_ahead and (self.tokens >= ROWS_AHEAD * self.budget or len(self) >= MOST)

    @property
    def waiting(self) -> tuple[int, ...]:
        """The samples not yet in a row, oldest first."""
        return tuple(sample for sample in self._queue if sample in self._lengths)

    def add(self, sample: int, length: int) -> None:
        self._queue.append(sample)
        self.tokens += length
        self._lengths[sample] = length
        insort(self._sorted, (length, -sample))

    def row(self) -> list[int]:
        """The next row, oldest sample first."""
        while self._queue[0] not in self._lengths:
            self._queue.popleft()
        first = self._queue.popleft()
        free = self.budget - self._lengths[first]
        self.tokens -= self._lengths[first]
        self._sorted.remove((self._lengths.pop(first), -first))
        row = [first]
        while (at := bisect_right(self._sorted, (free, 1))) > 0:
            length, negative = self._sorted.pop(at - 1)
            del self._lengths[-negative]
            row.append(-negative)
            free -= length
            self.tokens -= length
        return row


def best_fit(lengths: Iterable[int], budget: int, look_ahead: int = LOOK_AHEAD) -> Iterator[list[int]]:
    """Rows as lists of places in ``lengths``, each met exactly once."""
    packer = Packer(budget, look_ahead)
    for sample, length in enumerate(lengths):
        packer.add(sample, length)
        while packer.ready:
            yield packer.row()
    while len(packer):
        yield packer.row()
