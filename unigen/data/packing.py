"""Which samples share a packed sequence: best-fit packing with a bounded look-ahead.

A sequence starts with the oldest sample of the buffer, so none stays for ever; then the longest sample that
still fits goes in, until none does.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator

# Sequences are cut while the buffer holds so many samples and they fill so many sequences (short samples: 128
# of them may not fill one), but at most MOST: as many whole numbers are all that a resume needs.
LOOK_AHEAD, SEQUENCES_AHEAD, MOST = 128, 2, 8192


class Packer:
    """Samples in, packed sequences of at most ``budget`` tokens out (a longer sample gets one of its own),
    those of each chosen from ``look_ahead`` samples. ``buffer`` is the whole state."""

    def __init__(self, budget: int, look_ahead: int = LOOK_AHEAD):
        self.budget, self.look_ahead, self.tokens = budget, look_ahead, 0
        self._queue: deque[int] = deque()  # by age; packed ones stay until they come to the front
        self._lengths: dict[int, int] = {}  # of the samples in the buffer
        # (length, -sample): of equal lengths the older one is found first
        self._sorted: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def ready(self) -> bool:
        """Are there enough samples to choose from?"""
        enough = self.tokens >= SEQUENCES_AHEAD * self.budget or len(self) >= MOST
        return enough and len(self) >= self.look_ahead

    @property
    def buffer(self) -> tuple[int, ...]:
        """The samples not yet packed, oldest first."""
        return tuple(sample for sample in self._queue if sample in self._lengths)

    def add(self, sample: int, length: int) -> None:
        self._queue.append(sample)
        self.tokens += length
        self._lengths[sample] = length
        insort(self._sorted, (length, -sample))

    def take(self) -> list[int]:
        """The samples of the next sequence, the oldest first."""
        while self._queue[0] not in self._lengths:
            self._queue.popleft()
        first = self._queue.popleft()
        free = self.budget - self._lengths[first]
        self.tokens -= self._lengths[first]
        self._sorted.remove((self._lengths.pop(first), -first))
        taken = [first]
        while (at := bisect_right(self._sorted, (free, 1))) > 0:
            length, negative = self._sorted.pop(at - 1)
            del self._lengths[-negative]
            taken.append(-negative)
            free -= length
            self.tokens -= length
        return taken


def best_fit(lengths: Iterable[int], budget: int, look_ahead: int = LOOK_AHEAD) -> Iterator[list[int]]:
    """Sequences as lists of positions in ``lengths``, each met exactly once."""
    packer = Packer(budget, look_ahead)
    for sample, length in enumerate(lengths):
        packer.add(sample, length)
        while packer.ready:
            yield packer.take()
    while len(packer):
        yield packer.take()
