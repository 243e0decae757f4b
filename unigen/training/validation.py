"""Losses on held-out data with fixed noise and times: of all of it, by task, and by the time of the noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from unigen.bars import Bar
from unigen.data.dataset import TASKS, task
from unigen.data.loader import MicroBatch, PackStream
from unigen.data.mixing import Mixture
from unigen.model import flow
from unigen.model.bagel import Output
from unigen.sequence.types import Pack
from unigen.training.engine import Engine

BINS = 4  # of equal width in t: 0 is the picture, 1 the noise
TEXT_BY_TASK, IMAGE_BY_TASK, IMAGE_BY_TIME = "text_loss_by_task", "image_loss_by_task", "image_loss_by_time"
WRITTEN, DRAWN = ("text", "understand", "interleaved"), ("generate", "edit", "interleaved")  # tasks

# the packed sequences of some data in their order, this process's part
Batches = Callable[[PackStream], Iterable[list[MicroBatch]]]
# asked before each micro-batch, on all processes together; false breaks a measurement off
Agree = Callable[[MicroBatch, PackStream], bool]


class Losses(NamedTuple):
    """``values``: every loss by its name; what a token's forward takes on this process, in seconds; how many
    labels and samples there were."""

    values: dict[str, float]
    seconds_per_token: float
    labels: int
    samples: int


def bin_names() -> list[str]:
    """``0.00-0.25`` and so on."""
    return [f"{n / BINS:.2f}-{(n + 1) / BINS:.2f}" for n in range(BINS)]


class Tasks:
    """What each record of some data teaches (``unigen.data.dataset.task``), read when it is asked for."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self._known: dict[int, int] = {}

    def __getitem__(self, record: int) -> int:
        """The place of its task in ``TASKS``."""
        if record not in self._known:
            self._known[record] = TASKS.index(task(self.mixture[record].sample))
        return self._known[record]


@torch.no_grad()
def held_out_losses(
    engine: Engine, stream: PackStream, tasks: Tasks, batches: Iterable[list[MicroBatch]], agree: Agree
) -> Losses | None:
    """Mean losses over packed sequences with fixed noise and times: equal weights give equal numbers.

    Args:
        stream: the data, and ``tasks`` of its records.
        batches: of this process, one at a time, and as many on every process.
        agree: false breaks it off, and the answer is None.
    """
    parts = torch.zeros(2, 2 * len(TASKS) + BINS, dtype=torch.float64)
    took: list[tuple[float, int]] = []
    seen = [0, 0]
    engine.model.eval()
    total = stream.steps_in(0, engine.world)
    shown = Bar("validating", total)
    try:
        for (batch,) in batches:
            if not agree(batch, stream):
                return None
            began = time.perf_counter()
            output = engine.forward(batch.pack.to(engine.device))
            which = torch.tensor([tasks[record] for record in batch.records], dtype=torch.int64)
            parts += _parts(output, batch.pack, which, engine.model.config.timestep_shift)
            took.append((time.perf_counter() - began, len(batch.pack)))
            seen = [seen[0] + batch.pack.n_text_labels, seen[1] + batch.pack.n_samples]
            shown.update()
    finally:
        shown.close()
        engine.model.train()
    parts = torch.tensor(engine.sum(parts.flatten().tolist()), dtype=torch.float64).view_as(parts)
    values = {}
    for name, columns in (("text_loss", parts[:, : len(TASKS)]), ("image_loss", parts[:, -BINS:])):
        total, count = columns.sum(dim=1).tolist()
        if count:
            values[name] = total / count
    config = engine.config
    weighted = config.text_loss_weight * values.get("text_loss", 0.0)
    values["loss"] = weighted + config.image_loss_weight * values.get("image_loss", 0.0)
    names = [f"{group}/{name}" for group in (TEXT_BY_TASK, IMAGE_BY_TASK) for name in TASKS]
    names += [f"{IMAGE_BY_TIME}/{name}" for name in bin_names()]
    for name, total, count in zip(names, *parts.tolist(), strict=True):
        if count:
            values[name] = total / count
    took = took[1:] or took  # the first one may compile, or fill caches
    tokens = sum(count for _, count in took)
    labels, samples = map(int, engine.sum(seen))
    return Losses(values, sum(s for s, _ in took) / tokens if tokens else 0.0, labels, samples)


def _parts(output: Output, pack: Pack, tasks: Tensor, shift: float) -> Tensor:
    """Sums and weights [2, tasks + tasks + bins] float64 of the text loss by task, and of the image loss by
    task and by time. On the CPU, where the order of a sum does not change from one time to another; ``pack``
    lies there, too. ``tasks`` [samples] int64: each sample's."""
    text = output.ce.double().cpu()
    image = output.mse.double().mean(dim=-1).cpu() if len(pack.noised_rows) else text.new_zeros(0)
    generation = pack.sample[pack.n_und :]
    times = flow.training_time(pack.u[pack.noised_rows], shift)
    labels, noised = (
        torch.ones_like(losses) if weight is None else weight.double()
        for losses, weight in ((text, pack.label_weight), (image, pack.noised_weight))
    )
    groups = (
        (text, labels, tasks[pack.sample[pack.label_rows]], len(TASKS)),
        (image, noised, tasks[generation[pack.noised_rows]], len(TASKS)),
        (image, noised, (times * BINS).long().clamp(0, BINS - 1), BINS),
    )
    sums = [torch.bincount(where, weights=losses, minlength=n) for losses, _, where, n in groups]
    counts = [torch.bincount(where, weights=weights, minlength=n) for _, weights, where, n in groups]
    return torch.stack([torch.cat(sums), torch.cat(counts)])
