"""Several sources as one stream of records, in one global order for (seed, epoch).

An epoch lasts until the last source that does not repeat has ended, each of its records met exactly once; a
source that repeats starts again meanwhile, each time in a new order. Weights are rates: a source of weight 2
is met twice as often as one of weight 1 while both run. Without weights every source is spread evenly over
the epoch. Everything follows from (seed, epoch) by counting, so there is no state to save.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from unigen.config import UserError
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.reader import LEAST
from unigen.sequence.draw import RandomKey
from unigen.sequence.plan import Planner
from unigen.sequence.types import Block, Origin, Record


@dataclass
class DataSource:
    """One source: its records, and how they become tokens. ``planner`` is the source's own, with its picture
    sizes."""

    name: str
    dataset: UnifiedGenerationDataset
    planner: Planner
    weight: float | None = None
    repeat: bool = False
    preserve: bool = False  # nothing is learnt from it: the model is to stay what it was there

    def __post_init__(self) -> None:
        assert self.dataset.lengths is not None, "the data set was built without token_lengths"
        self.lengths = self.dataset.lengths


@dataclass(frozen=True)
class EpochOrder:
    """The records of an epoch in order: their numbers over all sources [n] int64, and which pass over its
    source each one belongs to [n] int64 (the epoch, where a source does not repeat)."""

    records: np.ndarray
    passes: np.ndarray

    def __len__(self) -> int:
        return len(self.records)


class Mixture:
    """Sources as one set of records, numbered through, and their order in every epoch. Without ``training``
    that is the order of the files, each record once, whatever the weights.

    Raises:
        UserError: every source repeats and none has a weight: an epoch would have no end that means anything.
    """

    def __init__(self, parts: Sequence[DataSource], seed: int, training: bool = True):
        assert parts
        self.parts, self.seed, self.training = list(parts), seed, training
        self.starts = np.cumsum([0] + [len(part.dataset) for part in parts])
        held = np.cumsum([0] + [part.dataset.held for part in parts])
        # of each record over all sources, those counted that are left out: what RandomKey has
        self.numbers = np.concatenate([part.dataset.numbers + n for part, n in zip(parts, held)])
        if (
            training
            and len(parts) > 1
            and all(part.repeat for part in parts)
            and all(part.weight is None for part in parts)
        ):
            raise UserError(
                "train_sources: every source repeats and none has a weight. Fix: give weights, or leave"
                " repeat out"
            )
        weights = [part.weight or float(len(part.dataset)) for part in parts]
        ends = [len(part.dataset) / weight for part, weight in zip(parts, weights) if not part.repeat]
        # Where all repeat, an epoch has as many records as there are in all.
        length = max(ends) if ends else float(self.starts[-1]) / sum(weights)
        self.counts = [
            max(1, round(weight * length)) if p.repeat else len(p.dataset)
            for p, weight in zip(parts, weights)
        ]
        # records in an epoch if the source went on until its end
        self._rates = [weight * length for weight in weights]
        self.order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        """Records of an epoch, those that it repeats counted again."""
        return sum(self.counts) if self.training else self.total

    @property
    def total(self) -> int:
        """Records of all sources."""
        return int(self.starts[-1])

    @property
    def left_out(self) -> int:
        """Bad records of all sources that the data sets left out."""
        return sum(len(part.dataset.bad) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Digest of what the order and the aims depend on: the records, and with several sources their
        weights."""
        return self._fingerprint([part.dataset.fingerprint for part in self.parts])

    @property
    def named_fingerprint(self) -> str:
        """The same of files with their names, as older checkpoints hold it."""
        return self._fingerprint([part.dataset.named_fingerprint for part in self.parts])

    def _fingerprint(self, held: list[str]) -> str:
        if len(self.parts) == 1 and not self.parts[0].repeat:
            return held[0]
        rows = [
            [one, p.weight, p.repeat] + ["preserve"] * p.preserve
            for one, p in zip(held, self.parts, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def part(self, record: int) -> tuple[DataSource, int]:
        """The source of a record, and its number there."""
        at = int(np.searchsorted(self.starts, record, side="right")) - 1
        return self.parts[at], record - int(self.starts[at])

    def key(self, record: int, number: int) -> RandomKey:
        """The key of a record's random numbers; ``number`` is the epoch pass over its source."""
        return RandomKey(self.seed, number, int(self.numbers[record]), self.training)

    def of_key(self, key: RandomKey) -> int:
        """The record that a key belongs to."""
        return int(np.searchsorted(self.numbers, key.record))

    def __getitem__(self, record: int) -> Record:
        part, number = self.part(record)
        return part.dataset[number]

    def origin(self, record: int) -> Origin:
        part, number = self.part(record)
        return part.dataset.origin(number)

    def outline(self, record: int, key: RandomKey) -> tuple[Record, list[Block], Planner]:
        """The record, its blocks in this epoch pass (without contents), and the planner that fills them."""
        part, number = self.part(record)
        found = part.dataset[number]
        return found, part.planner.outline(found.sample, part.lengths[number], key), part.planner

    def lengths(self, records: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Tokens [n] int64 of epoch passes over the records, of which none is read."""
        found = np.zeros(len(records), np.int64)
        for i, part in enumerate(self.parts):
            here = (records >= self.starts[i]) & (records < self.starts[i + 1])
            for number in np.unique(passes[here]).tolist():
                chosen = here & (passes == number)
                epoch = number if self.training else None
                planner, some = part.planner, records[chosen]
                found[chosen] = part.lengths.of_passes(
                    some - int(self.starts[i]),
                    self.numbers[some],
                    self.seed,
                    epoch,
                    planner.options,
                    planner.max_length,
                )
        return found

    def full_lengths(self) -> np.ndarray:
        """The most tokens [records] int64 that an epoch pass over each record can have."""
        return np.concatenate([part.lengths.full(part.planner.max_length) for part in self.parts])

    def _order(self, epoch: int) -> EpochOrder:
        if not self.training:
            return EpochOrder(np.arange(self.total), np.zeros(self.total, np.int64))
        if len(self.parts) == 1 or all(
            part.weight is None and not part.repeat and part.dataset.runs is None for part in self.parts
        ):
            return self._shuffled(epoch)
        records, passes, times = [], [], []
        for i, part in enumerate(self.parts):
            count, n = self.counts[i], len(part.dataset)
            number = np.arange(count) + (epoch * count if part.repeat else epoch * n)
            chosen = np.zeros(count, np.int64)
            for once in np.unique(number // n).tolist():
                inside = number // n == once
                chosen[inside] = self._pass(i, once)[number[inside] % n]
            records.append(chosen + self.starts[i])
            passes.append(number // n)
            jitter = torch.rand(
                count, generator=RandomKey(self.seed, epoch, -1).generator(f"mix/{i}"), dtype=torch.float64
            ).numpy()
            times.append((np.arange(count) + jitter) / self._rates[i])
        order = np.argsort(np.concatenate(times), kind="stable")
        return EpochOrder(np.concatenate(records)[order], np.concatenate(passes)[order])

    def _shuffled(self, epoch: int) -> EpochOrder:
        """All sources shuffled together, each record once."""
        if len(self.parts) == 1 and (self.parts[0].repeat or self.parts[0].dataset.runs is not None):
            records = self._pass(0, epoch)
        else:
            records = torch.randperm(
                self.total, generator=RandomKey(self.seed, epoch, -1).generator("order")
            ).numpy()
        return EpochOrder(records, np.full(len(records), epoch))

    def _pass(self, source: int, number: int) -> np.ndarray:
        """One pass over a source: its records in a random order, near ones together where reading them apart
        is slow."""
        dataset = self.parts[source].dataset
        generator = RandomKey(self.seed, number, -1).generator(f"order/{source}")
        if dataset.runs is None:
            return torch.randperm(len(dataset), generator=generator).numpy()
        runs = [np.arange(start, stop) for start, stop in dataset.runs]
        turn = torch.randperm(len(runs), generator=generator).tolist()
        mixed = []
        for at in range(0, len(turn), LEAST):  # as many as the reader keeps open are shuffled together
            near = np.concatenate([runs[i] for i in turn[at : at + LEAST]])
            mixed.append(near[torch.randperm(len(near), generator=generator).numpy()])
        return np.concatenate(mixed)

    def describe(self) -> str:
        """The mix of an epoch: passes over records, and tokens of each kind, per source; a line each, and one
        for a weight that cannot hold."""
        tables = [part.lengths.tokens_by_kind(part.planner.max_length) for part in self.parts]
        passes = self.counts if self.training else [len(part.dataset) for part in self.parts]
        scaled = [
            {k: n * v / len(p.dataset) for k, n in t.items()} for t, v, p in zip(tables, passes, self.parts)
        ]
        whole = {kind: sum(t[kind] for t in scaled) for kind in scaled[0]}
        tokens = max(_shown_tokens(whole), 1.0)
        lines = [f"tokens    {_words(whole, tokens)}"]
        lengths = np.sort(self.full_lengths())
        lines.append(
            f"lengths   mean {lengths.mean():,.0f}, median {lengths[len(lengths) // 2]:,}, longest"
            f" {lengths[-1]:,} tokens of a record with nothing left out"
        )
        if len(self.parts) > 1:
            for part, table, count in zip(self.parts, scaled, passes):
                mine = _shown_tokens(table)
                share = (
                    f"{count:,} passes ({count / sum(passes):.1%}) over {len(part.dataset):,} records,"
                    f" {mine / tokens:.1%} of all tokens{', kept and not learnt' if part.preserve else ''}"
                )
                lines.append(f"source    {part.name}: {share}; {_words(table, max(mine, 1.0))}")
            lines += self._early() if self.training else []
        return "\n".join(lines)

    def _early(self) -> list[str]:
        """Sources whose weight holds for a part of the epoch only, and those that go by their records beside
        weights."""
        lines = []
        for part, count, rate in zip(self.parts, self.counts, self._rates):
            if not part.repeat and not math.isclose(count, rate, rel_tol=0.01):
                lines.append(
                    f"source    {part.name} ends after {count / rate:.0%} of the epoch; with repeat: true its"
                    " weight holds throughout"
                )
        weighed = [part.weight for part in self.parts if part.weight is not None]
        for part in self.parts if weighed else []:
            if part.weight is None:
                lines.append(
                    f"source    {part.name} has no weight beside those of others: its number of records,"
                    f" {len(part.dataset):,}, stands for it; give it a weight, or none to any"
                )
        return lines


def _words(table: dict[str, float], tokens: float) -> str:
    shares = ", ".join(f"{name} {table[kind] / tokens:.0%}" for kind, name in _KINDS.items() if table[kind])
    return f"{shares}; trained: {table['trained_text']:,.0f} text, {table['trained_image']:,.0f} image"


_KINDS = {"text": "text", "vit": "ViT", "clean": "clean latents", "noised": "drawn latents"}


def _shown_tokens(table: dict[str, float]) -> float:
    """All tokens of a table, each once."""
    return sum(table[kind] for kind in _KINDS)
