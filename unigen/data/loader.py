"""Global order, packing, workers, state.

One global order of records for (seed, epoch); rows are cut from that one stream, and a step's rows are dealt to ranks and
micro-batches. So the state of a run is (epoch, position), whatever the number of workers and ranks, and going on from it
replays nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unigen.data.dataset import UnifiedGenerationDataset
from unigen.sequence.images import PictureError
from unigen.sequence.pack import pack_blocks
from unigen.sequence.plan import Draw, Planner
from unigen.sequence.types import BadRecord, Pack


@dataclass(frozen=True)
class Place:
    """Where the stream stands: records ``[0, position)`` of the epoch's order are done."""

    epoch: int = 0
    position: int = 0


@dataclass
class Row:
    """One packed row, and the stream's place after the optimiser step it belongs to."""

    pack: Pack
    records: list[int]
    after: Place
    bad: list[BadRecord] = field(default_factory=list)

    def pin_memory(self) -> Row:
        return Row(self.pack.map(lambda t: t.pin_memory()), self.records, self.after, self.bad)


@dataclass(frozen=True)
class Share:
    """This process's part of every step."""

    rank: int = 0
    world: int = 1
    rows: int = 1  # rows per process and step (gradient accumulation)

    @property
    def step_rows(self) -> int:
        return self.world * self.rows


class RowStream:
    """The rows of a data set in global order, and how many steps they make."""

    def __init__(self, dataset: UnifiedGenerationDataset, planner: Planner, seed: int, training: bool = True):
        self.dataset, self.planner, self.seed, self.training = dataset, planner, seed, training
        self.batch_size, self.budget = planner.options.batch_size, planner.options.max_num_tokens
        self.unreadable: set[str] = set()  # origins of the records left out since the data was checked
        self.steps_in = lru_cache(maxsize=None)(self._steps_in)

    def order(self, epoch: int) -> list[int]:
        """Record numbers in this epoch's order; validation keeps the file's."""
        n = len(self.dataset)
        if not self.training:
            return list(range(n))
        return torch.randperm(n, generator=Draw(self.seed, epoch, -1).normal("order")).tolist()

    def draw(self, epoch: int, record: int) -> Draw:
        return Draw(self.seed, epoch, record, self.training)

    def rows(self, epoch: int, position: int = 0) -> Iterator[tuple[list[int], int]]:
        """(records of the row, position after it), from ``position`` on."""
        order = self.order(epoch)
        row, filled, at = [], 0, position
        for at, record in enumerate(order[position:], start=position):
            length = 0
            if self.budget is not None:
                length = self.planner.length(self.dataset[record].sample, self.dataset.sizes[record], self.draw(epoch, record))
            full = len(row) >= self.batch_size if self.budget is None else bool(row) and filled + length > self.budget
            if full:
                yield row, at
                row, filled = [], 0
            row.append(record)
            filled += length
        if row:
            yield row, at + 1

    def steps(self, place: Place, step_rows: int) -> Iterator[tuple[list[list[int]], Place]]:
        """The rows of each optimiser step and the place after it, epoch after epoch without end. The last step of an
        epoch may have fewer rows than ``step_rows``; every record is met once an epoch."""
        epoch, position = place.epoch, place.position
        while True:
            if position >= len(self.dataset):
                epoch, position = epoch + 1, 0
            step: list[list[int]] = []
            for row, after in self.rows(epoch, position):
                step.append(row)
                position = after
                if len(step) == step_rows:
                    yield step, Place(epoch, position)
                    step = []
            if step:
                yield step, Place(epoch, position)

    def _steps_in(self, epoch: int, step_rows: int) -> int:
        """Optimiser steps of an epoch."""
        if self.budget is None:
            rows = -(-len(self.dataset) // self.batch_size)
        else:
            rows = sum(1 for _ in self.rows(epoch))
        return -(-rows // step_rows)

    def largest_row(self, limit: int = 2000) -> list[int]:
        """The records of the longest row that the first ``limit`` records can make."""
        n = min(len(self.dataset), limit)
        whole = [Draw(self.seed, 0, i, training=False) for i in range(n)]  # nothing dropped
        lengths = [self.planner.length(self.dataset[i].sample, self.dataset.sizes[i], whole[i]) for i in range(n)]
        by_length = sorted(range(n), key=lambda i: -lengths[i])
        if self.budget is None:
            return by_length[: self.batch_size]
        row: list[int] = []
        for i in by_length:  # fill the budget, the longest first
            if not row or sum(lengths[j] for j in row) + lengths[i] <= self.budget:
                row.append(i)
        return row

    def describe(self) -> str:
        """Tokens per sample and the share of each modality, over (at most 2,000 samples of) the data."""
        totals: dict[str, int] = {}
        lengths = []
        for i in range(0, len(self.dataset), max(1, len(self.dataset) // 2000)):
            blocks = self.planner.outline(self.dataset[i].sample, self.dataset.sizes[i], Draw(0, 0, i, training=False))
            lengths.append(sum(len(b) for b in blocks))
            for block in blocks:
                name = block.kind.name.lower()
                totals[name] = totals.get(name, 0) + len(block)
        lengths.sort()
        everything = max(sum(totals.values()), 1)
        shares = ", ".join(f"{name} {100 * n / everything:.0f} %" for name, n in totals.items())
        mean, median = sum(lengths) / len(lengths), lengths[len(lengths) // 2]
        return f"tokens    per sample: mean {mean:,.0f}, median {median:,}, longest {lengths[-1]:,}; {shares}"

    def build(self, records: Sequence[int], epoch: int, after: Place, whole: bool = False) -> Row:
        """Decodes and packs the records of a row; those whose pictures turn out unreadable are left out and listed.

        ``whole`` drops nothing for guidance, so that the row has its full size.
        """
        samples, origins, bad, good = [], [], [], []
        for i in records:
            record, draw = self.dataset[i], Draw(self.seed, epoch, i, self.training and not whole)
            try:
                blocks = self.planner.fill(record.sample, self.planner.outline(record.sample, self.dataset.sizes[i], draw), draw)
            except PictureError as error:
                found = f"{error.name}: {error.problem}"
                bad.append(BadRecord(error.code, "image", found, "a readable picture", error.cure, record.origin))
                continue
            samples.append(blocks)
            origins.append(str(record.origin))
            good.append(i)
        planner = self.planner
        return Row(pack_blocks(samples, planner.tokenizer.special, planner.geometry, origins=origins), good, after, bad)


class _Rows(IterableDataset):
    """The rows of one process; a worker builds every ``num_workers``-th of them."""

    def __init__(self, stream: RowStream, share: Share, place: Place, limit: int | None):
        self.stream, self.share, self.place, self.limit = stream, share, place, limit

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        count = 0
        for n, (step, after) in enumerate(self.stream.steps(self.place, self.share.step_rows)):
            if self.limit is not None and n >= self.limit:
                return
            for micro in range(self.share.rows):
                if count % workers == worker:
                    at = micro * self.share.world + self.share.rank
                    # A process without a row of its own still takes part in the step, with an empty one.
                    yield self.stream.build(step[at] if at < len(step) else [], after.epoch, after)
                count += 1


def load_rows(
    stream: RowStream, share: Share, place: Place, *, num_workers: int = 0, limit: int | None = None, pin: bool = False
) -> Iterator[list[Row]]:
    """The rows of this process, step by step (``share.rows`` at a time), from ``place`` on; ``limit`` ends it after so many steps."""
    if num_workers:
        # The tokenizers' threads and forked workers do not mix; one thread a worker is the point of workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        _Rows(stream, share, place, limit),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_same,
        pin_memory=pin,
        prefetch_factor=max(2, share.rows) if num_workers else None,
        # It draws a seed for its workers, which use none; from the global generator that draw would change what a resume restores.
        generator=torch.Generator(),
    )
    step: list[Row] = []
    for row in loader:
        step.append(row)
        if len(step) == share.rows:
            yield step
            step = []


def _same(row: Row) -> Row:
    return row
