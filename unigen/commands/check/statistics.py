"""What a data set holds, in numbers: lengths, pictures, targets, repetitions, and what a limit or a token
budget would do.

A :class:`Tally` has a row for each record and each picture; everything else is computed from these tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from unigen.data.keys import Notes
from unigen.data.packing import best_fit
from unigen.sequence.lengths import TokenLengths
from unigen.sequence.plan import Planner
from unigen.sequence.types import Kind

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# lengths that are packed: best-fit is a loop, and so many say it to a tenth of a percent
SAMPLE = 50_000
KINDS = tuple(kind.name.lower() for kind in Kind)

# 60 bytes a record read; all zeros for a bad one, but for the lengths of one that is too long
RECORD = np.dtype(
    [
        ("sample", np.uint64),  # a hash of the sample
        ("texts", np.uint64),  # a hash of its text targets; 0 where there is none
        ("good", bool),
        ("near_empty", bool),  # a picture's description says next to nothing
        ("format", np.uint8),  # number of the format in FORMATS
        ("task", np.uint8),  # number of the task in TASKS
        ("text_targets", np.int32),
        ("image_targets", np.int32),
        ("length", np.int32),  # tokens without any limit
        ("least", np.int32),  # tokens that no limit can cut
        ("text_tokens", np.int32),  # trained ones: labels, also those that say what follows a prompt
        ("image_tokens", np.int32),
        *((kind, np.int32) for kind in KINDS),
    ]
)
PICTURE = np.dtype(
    [
        ("key", np.uint64),  # a hash of the path, or of the bytes of a picture inside a record
        ("content", np.uint64),  # a hash of the file's bytes; 0 unless files were read
        ("record", np.int64),  # number of its record
        ("segment", np.int32),  # number of its segment there
        ("width", np.int32),
        ("height", np.int32),
        ("latent", np.int32),  # latent tokens; 0 where the VAE does not encode it
        ("vit", np.int32),
        ("upscaled", bool),
    ]
)


class Tally(NamedTuple):
    """What was read: a row for each record, good or bad, and for each picture of the good ones."""

    records: np.ndarray  # [records] RECORD
    pictures: np.ndarray  # [pictures] PICTURE
    near_empty: list[tuple[str, str]]  # (origin, text) of the first few
    notes: Notes  # of the good records

    @classmethod
    def join(cls, tallies: Sequence[Tally]) -> Tally:
        """One tally of parts that follow one another."""
        first, pictures, notes = 0, [], Notes()
        for tally in tallies:
            pictures.append(tally.pictures.copy())
            pictures[-1]["record"] += first
            first += len(tally.records)
            for note, times in tally.notes.items():
                notes.add([note], times)
        return cls(
            np.concatenate([np.zeros(0, RECORD), *(tally.records for tally in tallies)]),
            np.concatenate([np.zeros(0, PICTURE), *pictures]),
            [entry for tally in tallies for entry in tally.near_empty][:NEAR_EMPTY_SHOWN],
            notes,
        )

    @property
    def good(self) -> np.ndarray:
        return self.records[self.records["good"]]


NEAR_EMPTY_SHOWN = 10


def count_tokens(
    records: np.ndarray, rows: Sequence[int], lengths: TokenLengths, planner: Planner, first: int
) -> None:
    """Fills in the token columns of ``rows`` of ``records`` [n] RECORD.

    Args:
        lengths: Those of each row's record.
        planner: One without a limit, so that lengths are whole.
        first: The number of the first record, which decides what is drawn.
    """
    every = np.arange(len(lengths))
    blocks = lengths.blocks(every)
    tokens, kind = blocks.table["tokens"], blocks.table["kind"]
    trained = blocks.table["target"] & (kind == Kind.TEXT)

    def put(name: str, which: np.ndarray, values: np.ndarray) -> None:
        records[name][rows] = blocks.sums(np.where(which, values, 0), len(every))

    records["length"][rows] = lengths.of_passes(
        every, every + first, 0, None, planner.options, planner.max_length
    )
    put("least", np.ones(len(tokens), bool), np.where(trained, np.minimum(tokens, 3), tokens))
    put("text_tokens", ~blocks.table["by_chance"], blocks.table["labels"])
    put("image_tokens", kind == Kind.NOISED, tokens - 2)
    for number, name in enumerate(KINDS):
        put(name, (kind == number) & ~blocks.table["by_chance"], tokens)


def distribution_of(numbers: np.ndarray) -> dict[str, Any]:
    """``count, total, mean, min, max, quantiles {share: number}, histogram [[from, to, count]]`` of whole
    numbers [n]; just ``count`` where there are none. A quantile is the smallest number that at least its
    share of all do not exceed."""
    n = len(numbers)
    if not n:
        return {"count": 0}
    ordered = np.sort(numbers)
    total = int(ordered.sum(dtype=np.int64))
    return {
        "count": n,
        "total": total,
        "mean": round(total / n, 2),
        "min": int(ordered[0]),
        "max": int(ordered[-1]),
        "quantiles": {
            f"{share:g}": int(ordered[max(int(np.ceil(share * n - 1e-9)) - 1, 0)]) for share in QUANTILES
        },
        "histogram": bins(ordered),
    }


def bins(ordered: np.ndarray) -> list[list[int]]:
    """``[from, to, count]``, both ends included: of equal width, or of half octaves where the numbers are far
    apart."""
    low, high = int(ordered[0]), int(ordered[-1])
    if high - low < 16 or high < 4 * max(low, 1):
        step = _round_step((high - low + 1) / 16)
        edges = list(range(low // step * step, high + step + 1, step))
    else:
        octaves = [1, *(start for k in range(1, 62) for start in (1 << k, 3 << k >> 1))]
        edges = [0, *octaves] if low == 0 else octaves
        edges = edges[max(i for i, edge in enumerate(edges) if edge <= low) :]
        edges = edges[: next(i for i, edge in enumerate(edges) if edge > high) + 1]
    counts = np.diff(np.searchsorted(ordered, edges))
    return [[a, b - 1, int(count)] for (a, b), count in zip(pairwise(edges), counts)]


def _round_step(rough: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, ... that is not below ``rough``."""
    power = 1
    while True:
        for m in (1, 2, 5):
            if m * power >= rough:
                return m * power
        power *= 10


# ---- repetitions


class Repeat(NamedTuple):
    """Something that occurs ``count`` times; ``rows`` of the table are the first few."""

    count: int
    rows: list[int]


class Repeats(NamedTuple):
    """``distinct`` different things; ``surplus`` more, which repeat one of them; ``most`` are the most
    frequent."""

    distinct: int
    surplus: int
    most: list[Repeat]


def find_repeats(hashes: np.ndarray, shown: int) -> Repeats:
    """What occurs more than once among ``hashes`` [n] uint64 (0 is nothing)."""
    distinct, counts = np.unique(hashes[hashes != 0], return_counts=True)
    often = np.flatnonzero(counts > 1)
    often = often[np.argsort(-counts[often], kind="stable")][:shown]
    most = [Repeat(int(counts[i]), np.flatnonzero(hashes == distinct[i])[:3].tolist()) for i in often]
    most.sort(key=lambda repeat: (-repeat.count, repeat.rows))
    return Repeats(len(distinct), int(counts.sum()) - len(distinct), most)


def repeats(tally: Tally, shown: int = 5) -> dict[str, Repeats]:
    """The repeated ``records``, ``texts`` (all text targets of a record alike) and ``pictures``: the same
    file or, where contents were read, different files of the same bytes (``copies``)."""
    pictures = tally.pictures
    found = {
        "records": find_repeats(tally.records["sample"], shown),
        "texts": find_repeats(tally.records["texts"], shown),
        "pictures": find_repeats(pictures["key"], shown),
    }
    if pictures["content"].any():
        contents = np.zeros(len(pictures), np.uint64)  # of the first picture of each key alone
        _, first = np.unique(pictures["key"], return_index=True)
        contents[first] = pictures["content"][first]
        found["copies"] = find_repeats(contents, shown)
    return found


# ---- limits and budgets


def what_limits_cut(records: np.ndarray, limits: Sequence[int]) -> list[dict[str, int | float]]:
    """For each ``max_sequence_length``: records ``cut``, target ``tokens_lost`` and their share of all,
    records ``refused``."""
    tokens = int(records["text_tokens"][records["good"]].sum(dtype=np.int64))
    found: list[dict[str, int | float]] = []
    for limit in limits:
        refused = records["least"] > limit
        # a cut takes no more than it must, from text targets alone
        over = np.where(refused, 0, np.maximum(records["length"] - limit, 0))
        lost = int(over.sum(dtype=np.int64))
        found.append(
            {
                "max_sequence_length": limit,
                "cut": int((over > 0).sum()),
                "tokens_lost": lost,
                "share_lost": lost / max(tokens, 1),
                "refused": int(refused.sum()),
            }
        )
    return found


def how_full_packs_get(lengths: np.ndarray, budgets: Sequence[int]) -> list[dict[str, int | float]]:
    """For each ``max_num_tokens``: ``fill`` of the packed sequences (``rows``) that training makes of at most
    50,000 lengths, shuffled; ``single`` with one sample in each, samples in each, and how many samples of all
    are ``longer`` than the budget."""
    n = len(lengths)
    if not n:
        return []
    ordered = np.sort(lengths)
    spread = ordered if n <= SAMPLE else ordered[(np.arange(SAMPLE) * 2 + 1) * n // (2 * SAMPLE)]
    sample = np.random.default_rng(0).permutation(spread).tolist()
    found: list[dict[str, int | float]] = []
    for budget in budgets:
        packs = [sum(sample[i] for i in pack) for pack in best_fit(sample, budget)]
        found.append(
            {
                "max_num_tokens": budget,
                "fill": sum(packs) / sum(max(tokens, budget) for tokens in packs),
                "single": sum(sample) / sum(max(n, budget) for n in sample),
                "rows": len(packs),
                "samples_per_row": len(sample) / len(packs),
                "longer": int((lengths > budget).sum()),
            }
        )
    return found
