"""The data loader: one global order of samples, packed sequences, workers, state.

One global order of samples for (seed, epoch); packed sequences are cut from that one stream with a bounded
look-ahead, and those of a step are dealt to ranks and micro-batches. So the loader's state is (epoch,
position, the few samples in the packing buffer), whatever the number of workers and ranks, and going on from
it replays nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unigen.bars import Bar
from unigen.data.mixing import Mixture
from unigen.data.packing import Packer
from unigen.sequence.draw import RandomKey
from unigen.sequence.images import PictureError, bad_picture
from unigen.sequence.pack import pack_blocks
from unigen.sequence.types import Aim, BadRecord, Pack, each_of

CHUNK = 4096  # records whose lengths are computed at once
SMALL = 2**20  # bytes of a pack's tensors up to which they are sent through a pipe


@dataclass(frozen=True)
class LoaderState:
    """How far an epoch is: samples ``[0, position)`` of its order are packed, but for those in the buffer."""

    epoch: int = 0
    position: int = 0
    buffer: tuple[int, ...] = ()  # positions in the order, oldest first

    @property
    def done(self) -> int:
        """Samples of this epoch that are packed."""
        return self.position - len(self.buffer)


@dataclass
class MicroBatch:
    """One packed sequence, and the loader's state after the optimiser step it belongs to."""

    pack: Pack
    records: list[int]
    after: LoaderState
    bad: list[BadRecord] = field(default_factory=list)


class _Place(NamedTuple):
    """Where a tensor lies in a buffer."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def view(self, buffer: Tensor) -> Tensor:
        size = self.dtype.itemsize * math.prod(self.shape)
        return buffer[self.offset :][:size].view(self.dtype).view(self.shape)


class _Parcel:
    """A micro-batch on its way from a worker, all its tensors in one buffer.

    Each tensor sent by itself would cost a file descriptor, of which a process has few, and more time than a
    small picture takes to decode.
    """

    def __init__(self, batch: MicroBatch):
        self.rest = batch.records, batch.after, batch.bad
        placed: list[tuple[_Place, Tensor]] = []
        size = 0

        def place(tensor: Tensor) -> _Place:
            nonlocal size
            placed.append((_Place(size, tensor.dtype, tensor.shape), tensor))
            size += -(-tensor.nbytes // 16) * 16  # aligned, so that a view of any type can start there
            return placed[-1][0]

        self.fields = {name: each_of(value, Tensor, place) for name, value in vars(batch.pack).items()}
        self.buffer = torch.empty(size, dtype=torch.uint8)
        for at, tensor in placed:
            at.view(self.buffer).copy_(tensor)

    def __getstate__(self) -> dict[str, Any]:
        """Shared memory is handed over by a thread of the worker, which waits for its turn while the next
        pack is built; so what is small goes through the pipe itself."""
        small = {"buffer": self.buffer.numpy()} if self.buffer.nbytes <= SMALL else {}
        return {**self.__dict__, **small}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, buffer=torch.as_tensor(state["buffer"]))

    def pin_memory(self) -> _Parcel:
        self.buffer = self.buffer.pin_memory()
        return self

    def open(self) -> MicroBatch:
        """The micro-batch; its tensors are views of the one buffer."""
        opened = {
            name: each_of(value, _Place, lambda place: place.view(self.buffer))
            for name, value in self.fields.items()
        }
        return MicroBatch(Pack(**opened), *self.rest)


@dataclass(frozen=True)
class RankSlice:
    """This process's part of every step, whose packed sequences are dealt one by one."""

    rank: int = 0
    world: int = 1
    global_batch: int = 1  # packed sequences of a step, all processes together

    @property
    def micro_batches(self) -> int:
        """Packed sequences of a step for each process; where there are not enough, some are empty."""
        return -(-self.global_batch // self.world)


class PackStream:
    """The packed sequences of a mixture in global order, and how many steps they make."""

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int = 1,
        budget: int | None = None,
        masks: bool = False,
        kept_share: float = 0.0,
    ):
        """``batch_size`` samples a sequence, or with ``budget`` as many as its tokens hold; ``masks`` as in
        :func:`pack_blocks`; ``kept_share``: chance that a sample that learns is also kept (:meth:`aim`)."""
        self.mixture, self.batch_size, self.budget, self.masks = mixture, batch_size, budget, masks
        self.kept_share = kept_share
        self.keeps = kept_share > 0 or any(part.preserve for part in mixture.parts)
        self.unreadable: set[str] = set()  # origins of the records left out since the data was checked
        self.steps_in = lru_cache(maxsize=None)(self._steps_in)

    def longest_key(self, record: int) -> RandomKey:
        """Of a sample with all clean copies and nothing dropped."""
        return replace(self.mixture.key(record, 0), training=False, all_clean_copies=True)

    def aim(self, key: RandomKey) -> Aim:
        """What a sample is trained for; in the warm-up batch for all that it can be."""
        if self.mixture.part(self.mixture.of_key(key))[0].preserve:
            return Aim.KEEP
        chance = key.choices("preserve").random() if key.training else 0.0
        return Aim.LEARN | Aim.KEEP if chance < self.kept_share else Aim.LEARN

    def sequences(self, state: LoaderState) -> Iterator[tuple[list[int], LoaderState]]:
        """The packed sequences of the rest of an epoch: positions in its order, and the state after each."""
        epoch, end = state.epoch, len(self.mixture)
        position, buffer = state.position, list(state.buffer)
        if self.budget is None:
            size = self.batch_size
            while buffer or position < end:
                taken, buffer = buffer[:size], buffer[size:]
                fresh = min(size - len(taken), end - position)
                taken += range(position, position + fresh)
                position += fresh
                yield taken, LoaderState(epoch, position, tuple(buffer))
            return
        packer = Packer(self.budget)
        for at, length in zip(buffer, self._lengths(epoch, np.array(buffer, np.int64)).tolist()):
            packer.add(at, length)
        for start in range(position, end, CHUNK):
            upcoming = np.arange(start, min(start + CHUNK, end))
            for at, length in zip(upcoming.tolist(), self._lengths(epoch, upcoming).tolist()):
                packer.add(at, length)
                while packer.ready:
                    yield packer.take(), LoaderState(epoch, at + 1, packer.buffer)
        while len(packer):
            yield packer.take(), LoaderState(epoch, end, packer.buffer)

    def _lengths(self, epoch: int, places: np.ndarray) -> np.ndarray:
        order = self.mixture.order(epoch)
        return self.mixture.lengths(order.records[places], order.passes[places])

    def steps(self, state: LoaderState, global_batch: int) -> Iterator[tuple[list[list[int]], LoaderState]]:
        """The packed sequences of each optimiser step and the state after it, epoch after epoch without end.

        The last step of an epoch may have fewer than ``global_batch``; every sample is met once an epoch.
        """
        while True:
            if state.position >= len(self.mixture) and not state.buffer:
                state = LoaderState(state.epoch + 1)
            step: list[list[int]] = []
            for sequence, after in self.sequences(state):
                step.append(sequence)
                state = after
                if len(step) == global_batch:
                    yield step, state
                    step = []
            if step:
                yield step, state

    def _steps_in(self, epoch: int, global_batch: int) -> int:
        """Optimiser steps of an epoch."""
        if self.budget is None:
            count = -(-len(self.mixture) // self.batch_size)
        else:
            count = 0
            with Bar(f"planning epoch {epoch}", len(self.mixture), "records") as shown:
                for _, after in self.sequences(LoaderState(epoch)):
                    count += 1
                    shown.update(after.done - shown.done)
        return -(-count // global_batch)

    def largest(self) -> list[int]:
        """The records of the longest packed sequence that can come."""
        lengths = self.mixture.full_lengths()
        by_length = np.argsort(-lengths, kind="stable")
        if self.budget is None:
            return by_length[: self.batch_size].tolist()
        found = [int(by_length[0])]
        free = self.budget - int(lengths[found[0]])
        # fill the budget, the longest first
        for record in by_length[1:][lengths[by_length[1:]] <= free].tolist():
            if lengths[record] <= free:
                found.append(record)
                free -= int(lengths[record])
        return found

    def build(self, positions: Sequence[int], after: LoaderState) -> MicroBatch:
        """Decodes and packs samples (positions in the order of ``after.epoch``); records whose pictures turn
        out unreadable are left out and listed."""
        order = self.mixture.order(after.epoch)
        at = np.array(positions, np.int64)
        passes = zip(order.records[at].tolist(), order.passes[at].tolist(), strict=True)
        return self.build_samples([self.mixture.key(record, number) for record, number in passes], after)

    def build_largest(self) -> MicroBatch:
        """:meth:`largest` with all clean copies and nothing dropped."""
        return self.build_samples([self.longest_key(record) for record in self.largest()], LoaderState())

    def build_samples(self, keys: Sequence[RandomKey], after: LoaderState) -> MicroBatch:
        """:meth:`build` for any epoch passes."""
        samples, origins, bad, good, aims = [], [], [], [], []
        for key in keys:
            number = self.mixture.of_key(key)
            record, blocks, planner = self.mixture.outline(number, key)
            try:
                samples.append(planner.fill(record.sample, blocks, key))
            except PictureError as error:
                bad.append(bad_picture(error, "image", record.origin))
                continue
            origins.append(str(record.origin))
            good.append(number)
            aims += [self.aim(key)] if self.keeps else []
        # tokens and geometry are those of the model, whatever the source
        planner = self.mixture.parts[0].planner
        pack = pack_blocks(
            samples,
            planner.tokenizer.special,
            planner.geometry,
            origins=origins,
            masks=self.masks,
            aims=aims if self.keeps else None,
        )
        return MicroBatch(pack, good, after, bad)


class _RankBatches(IterableDataset):
    """The micro-batches of one process; a worker builds every ``num_workers``-th of them."""

    def __init__(self, stream: PackStream, rank_slice: RankSlice, start: LoaderState, limit: int | None):
        self.stream, self.slice, self.start, self.limit = stream, rank_slice, start, limit

    def __iter__(self) -> Iterator[MicroBatch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        count = 0
        for n, (step, after) in enumerate(self.stream.steps(self.start, self.slice.global_batch)):
            if self.limit is not None and n >= self.limit:
                return
            for micro in range(self.slice.micro_batches):
                if count % workers == worker:
                    at = micro * self.slice.world + self.slice.rank
                    # A process without one of its own still takes part in the step, with an empty one.
                    yield self.stream.build(step[at] if at < len(step) else [], after)
                count += 1


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(processes: int = 1) -> int:
    """Workers for each of the training processes on this machine: its cores but one, at most 4."""
    return min(4, max(0, cores() // processes - 1))


def load_batches(
    stream: PackStream,
    rank_slice: RankSlice,
    start: LoaderState,
    *,
    num_workers: int = 0,
    limit: int | None = None,
    pin: bool = False,
    worker_init: Callable[[int], None] | None = None,
    starting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of this process, step by step, from ``start`` on; ``limit`` ends it after so many
    steps.

    ``worker_init`` runs first in every worker, ``starting`` is a context around their start.
    """
    if num_workers:
        # The tokenizers' threads and forked workers do not mix; one thread a worker is the point of workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        _RankBatches(stream, rank_slice, start, limit),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_Parcel if num_workers or pin else None,
        pin_memory=pin,
        prefetch_factor=max(2, rank_slice.micro_batches) if num_workers else None,
        worker_init_fn=worker_init,
        # It draws a seed for its workers, which use none; from the global generator that draw would change
        # what a resume restores.
        generator=torch.Generator(),
    )
    with starting():
        items = iter(loader)
    step: list[MicroBatch] = []
    for item in items:
        step.append(item.open() if isinstance(item, _Parcel) else item)
        if len(step) == rank_slice.micro_batches:
            yield step
            step = []
