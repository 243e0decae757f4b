"""What a data set holds, in numbers: lengths, pictures, targets, repetitions, and what a limit or a token
budget would do.

A :class:`Tally` counts the records of one part; tallies are merged in the order of the parts. Per record it
keeps two hashes of 64 bits, per picture three numbers; everything else is counted.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from unigen.data.packing import best_fit
from unigen.sequence.plan import Measured, Planner
from unigen.sequence.ragged import Ragged
from unigen.sequence.types import Kind

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# lengths that rows are filled with: best-fit is a loop, and so many say it to a tenth of a percent
SAMPLE = 50_000
_FOLD = 64  # histograms that are kept apart before they are added up


class Histogram:
    """How often each whole number occurs; memory goes by the distinct numbers."""

    def __init__(self, numbers: Iterable[int] | np.ndarray = ()):
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        numbers = np.asarray(numbers if isinstance(numbers, np.ndarray) else list(numbers), np.int64)
        if numbers.size:
            self._parts.append(np.unique(numbers, return_counts=True))

    def merge(self, other: Histogram) -> None:
        self._parts += other._parts
        if len(self._parts) > _FOLD:
            self.arrays()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """``(numbers [n] int64, ascending; how often each occurs [n] int64)``."""
        if len(self._parts) != 1:
            numbers = np.concatenate([part[0] for part in self._parts] or [np.zeros(0, np.int64)])
            counts = np.concatenate([part[1] for part in self._parts] or [np.zeros(0, np.int64)])
            distinct, place = np.unique(numbers, return_inverse=True)
            self._parts = [(distinct, np.bincount(place, counts, len(distinct)).astype(np.int64))]
        return self._parts[0]

    def __len__(self) -> int:
        return int(self.arrays()[1].sum())

    def total(self) -> int:
        numbers, counts = self.arrays()
        return int((numbers * counts).sum())

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """The numbers of these ranks (0 is the smallest)."""
        numbers, counts = self.arrays()
        return numbers[np.searchsorted(np.cumsum(counts), ranks, side="right")]

    def quantile(self, share: float) -> int:
        """The smallest number that at least ``share`` of all do not exceed."""
        n = len(self)
        return int(self.at(np.array([max(int(np.ceil(share * n - 1e-9)) - 1, 0)]))[0])

    def spread(self, most: int) -> np.ndarray:
        """At most ``most`` of the numbers, evenly over their ranks, ascending."""
        n = len(self)
        return self.at(np.arange(n) if n <= most else (np.arange(most) * 2 + 1) * n // (2 * most))

    def bins(self) -> list[tuple[int, int, int]]:
        """``(from, to, count)``, both ends included: of equal width, or of half octaves where the numbers are
        far apart."""
        numbers, counts = self.arrays()
        if not len(numbers):
            return []
        low, high = int(numbers[0]), int(numbers[-1])
        if high - low < 16 or high < 4 * max(low, 1):
            step = _round_step((high - low + 1) / 16)
            edges = list(range(low // step * step, high + step + 1, step))
        else:
            octaves = [1, *(start for k in range(1, 62) for start in (1 << k, 3 << k >> 1))]
            edges = [0, *octaves] if low == 0 else octaves
            edges = edges[max(i for i, edge in enumerate(edges) if edge <= low) :]
            edges = edges[: next(i for i, edge in enumerate(edges) if edge > high) + 1]
        sums = np.bincount(np.searchsorted(edges, numbers, side="right") - 1, counts, len(edges) - 1).astype(
            np.int64
        )
        return [(a, b - 1, int(count)) for a, b, count in zip(edges, edges[1:], sums)]

    def describe(self) -> dict[str, Any]:
        """``count, total, mean, min, max, quantiles {share: number}, histogram [[from, to, count]]``; just
        ``count`` when empty."""
        n = len(self)
        if not n:
            return {"count": 0}
        numbers, _ = self.arrays()
        return {
            "count": n,
            "total": self.total(),
            "mean": round(self.total() / n, 2),
            "min": int(numbers[0]),
            "max": int(numbers[-1]),
            "quantiles": {f"{share:g}": self.quantile(share) for share in QUANTILES},
            "histogram": [list(entry) for entry in self.bins()],
        }


def _round_step(rough: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, ... that is not below ``rough``."""
    power = 1
    while True:
        for m in (1, 2, 5):
            if m * power >= rough:
                return m * power
        power *= 10


@dataclass
class Tally:
    """What the records of some parts add up to."""

    limits: tuple[int, ...]  # lengths for which it is counted what they would cut
    # (topic, name): records, pieces, tokens
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: Histogram = field(default_factory=Histogram)
    sizes: Histogram = field(default_factory=Histogram)  # width << 32 | height of every picture piece
    latent: Histogram = field(default_factory=Histogram)  # latent tokens of the pictures that the VAE encodes
    vit: Histogram = field(default_factory=Histogram)
    # [limits, 3]: records cut, target tokens lost, refused
    cuts: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    near_empty: list[tuple[str, str]] = field(default_factory=list)  # (origin, text) of the first few
    # A row for every record read, in order; 0 where there is nothing to compare.
    parts: array = field(default_factory=lambda: array("Q"))  # records of each part
    records: array = field(default_factory=lambda: array("Q"))  # a hash of the sample
    texts: array = field(default_factory=lambda: array("Q"))  # a hash of its text targets
    # A row for every picture piece of a good record.
    # a hash of the path, or of the bytes of a picture inside a record
    pictures: array = field(default_factory=lambda: array("Q"))
    # 256 * the number of its record + its piece there
    places: array = field(default_factory=lambda: array("Q"))
    # a hash of the file's bytes; empty unless files were read
    contents: array = field(default_factory=lambda: array("Q"))

    def __post_init__(self) -> None:
        if not len(self.cuts):
            self.cuts = np.zeros((len(self.limits), 3), np.int64)

    @property
    def read(self) -> int:
        """Records read, good and bad."""
        return len(self.records)

    def merge(self, other: Tally) -> None:
        """Adds the tally of the parts that follow."""
        assert self.limits == other.limits
        first = self.read
        self.counts.update(other.counts)
        for name in ("lengths", "sizes", "latent", "vit"):
            getattr(self, name).merge(getattr(other, name))
        self.cuts = self.cuts + other.cuts
        self.near_empty = (self.near_empty + other.near_empty)[:NEAR_EMPTY_SHOWN]
        for name in ("parts", "records", "texts", "pictures", "contents"):
            getattr(self, name).extend(getattr(other, name))
        self.places.frombytes((_numbers(other.places) + np.uint64(256 * first)).tobytes())

    def measure(
        self, rows: Ragged, good: np.ndarray, tasks: Sequence[str], planner: Planner, first: int
    ) -> None:
        """Counts tokens.

        Args:
            rows: What ``planner.measure`` gave for each record.
            good: [records] bool; the others are too long, and only count as refused.
            tasks: The task of each record.
            planner: One without a limit, so that lengths are whole.
            first: The number of the first record, which with ``rows`` decides what is drawn.
        """
        if not len(rows):
            return
        measured, every = Measured(*rows.arrays()), np.arange(len(rows))
        whole = planner.lengths(measured, every + first, seed=0, epoch=None, first=first)
        table = _Blocks(measured, every)
        text = table.sums(table.trained_text, table.length - (not planner.options.train_transitions))
        image = table.sums(table.kind == Kind.NOISED, table.length - 2)
        least = table.sums(
            table.kind >= 0, np.where(table.trained_text, np.minimum(table.length, 3), table.length)
        )
        for row, limit in enumerate(self.limits):
            refused = least > limit
            # a cut takes no more than it must, from text targets alone
            over = np.where(refused, 0, np.maximum(whole - limit, 0))
            self.cuts[row] += [int((over > 0).sum()), int(over.sum()), int(refused.sum())]
        self.lengths.merge(Histogram(whole[good]))
        for name, count in measured.tokens_by_kind(every[good]).items():
            self.counts["kind", name] += count
        names = np.array(tasks)[good]
        for task in sorted(set(names.tolist())):
            self.counts["text_tokens", task] += int(text[good][names == task].sum())
            self.counts["image_tokens", task] += int(image[good][names == task].sum())


NEAR_EMPTY_SHOWN = 10


class _Blocks:
    """The blocks of many records, taken apart: arrays [blocks]."""

    def __init__(self, measured: Measured, records: np.ndarray):
        blocks, counts, _ = measured.blocks(records)
        self.n, self.visit = len(records), np.repeat(np.arange(len(records)), counts)
        self.length, self.kind = blocks >> 5, blocks & 3
        self.trained_text = (blocks & 16 != 0) & (self.kind == Kind.TEXT)

    def sums(self, which: np.ndarray, values: np.ndarray) -> np.ndarray:
        """[records] int64: the values of each record's blocks, those of ``which`` alone."""
        return np.bincount(self.visit, np.where(which, values, 0), self.n).astype(np.int64)


def _numbers(column: array) -> np.ndarray:
    return np.frombuffer(column, np.uint64) if len(column) else np.zeros(0, np.uint64)


# ---- repetitions


class Repeat(NamedTuple):
    """Something that occurs ``count`` times; ``places`` are the first few: numbers of records, or
    ``Tally.places``."""

    count: int
    places: list[int]


class Repeats(NamedTuple):
    """``distinct`` different things; ``surplus`` more, which repeat one of them; ``most`` are the most
    frequent."""

    distinct: int
    surplus: int
    most: list[Repeat]


def find_repeats(hashes: np.ndarray, places: np.ndarray | None, shown: int) -> Repeats:
    """What occurs more than once among ``hashes`` [n] uint64 (0 is nothing); ``places`` [n] says where,
    default the index."""
    ordered = np.sort(hashes[hashes != 0])
    starts = (
        np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        if len(ordered)
        else np.zeros(0, np.int64)
    )
    counts = np.diff(np.append(starts, len(ordered)))
    often = np.flatnonzero(counts > 1)
    often = often[np.lexsort((ordered[starts[often]], -counts[often]))][:shown]
    most = []
    for i in often.tolist():
        at = np.flatnonzero(hashes == ordered[starts[i]])[:3]
        most.append(Repeat(int(counts[i]), [int(n) for n in (at if places is None else places[at])]))
    return Repeats(
        len(starts),
        len(ordered) - len(starts),
        sorted(most, key=lambda repeat: (-repeat.count, repeat.places)),
    )


def repeats(tally: Tally, shown: int = 5) -> dict[str, Repeats]:
    """The repeated ``records``, ``texts`` (all text targets of a record alike) and ``pictures``: the same
    file or, where contents were read, different files of the same bytes (``copies``)."""
    pictures, places = _numbers(tally.pictures), _numbers(tally.places)
    found = {
        "records": find_repeats(_numbers(tally.records), None, shown),
        "texts": find_repeats(_numbers(tally.texts), None, shown),
        "pictures": find_repeats(pictures, places, shown),
    }
    if len(tally.contents):
        _, first = np.unique(pictures, return_index=True)
        first.sort()
        found["copies"] = find_repeats(_numbers(tally.contents)[first], places[first], shown)
    return found


# ---- limits and budgets


def what_limits_cut(tally: Tally) -> list[dict[str, int | float]]:
    """For each ``max_sequence_length``: records ``cut``, target ``tokens_lost`` and their share of all,
    records ``refused``."""
    tokens = sum(n for (topic, _), n in tally.counts.items() if topic == "text_tokens")
    return [
        {
            "max_sequence_length": limit,
            "cut": cut,
            "tokens_lost": lost,
            "share_lost": lost / max(tokens, 1),
            "refused": refused,
        }
        for limit, (cut, lost, refused) in zip(tally.limits, tally.cuts.tolist())
    ]


def how_full_rows_get(lengths: Histogram, budgets: Sequence[int]) -> list[dict[str, int | float]]:
    """For each ``max_num_tokens``: ``fill`` of the ``rows`` that training packs (of at most 50,000 lengths,
    shuffled), ``single`` with one sample a row, samples a row, and how many samples of all are ``longer``
    than the budget."""
    if not len(lengths):
        return []
    sample = np.random.default_rng(0).permutation(lengths.spread(SAMPLE)).tolist()
    numbers, counts = lengths.arrays()
    found: list[dict[str, int | float]] = []
    for budget in budgets:
        rows = [sum(sample[i] for i in row) for row in best_fit(sample, budget)]
        found.append(
            {
                "max_num_tokens": budget,
                "fill": sum(rows) / sum(max(row, budget) for row in rows),
                "single": sum(sample) / sum(max(n, budget) for n in sample),
                "rows": len(rows),
                "samples_per_row": len(sample) / len(rows),
                "longer": int(counts[numbers > budget].sum()),
            }
        )
    return found
