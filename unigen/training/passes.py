"""Passes over the model beside the training step: the dry batch before the first, and validation; and what a
step's numbers are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unigen.config import Config
from unigen.data.loader import MicroBatch, PackStream
from unigen.sequence.types import Pack
from unigen.training.engine import Engine
from unigen.training.guards import TrainingStopped
from unigen.training.losses import Counts, joint_loss, loss_sums

log = logging.getLogger("unigen")


@dataclass
class StepResult:
    """What one optimiser step gave: means over all its targets, on all ranks."""

    text_loss: float
    image_loss: float
    counts: Counts
    tokens: float
    grad_norm: float = float("nan")
    refused: str = ""  # why the step changed nothing

    def metrics(self, config: Config) -> dict[str, float]:
        """As they are logged; a loss without targets is left out."""
        values = {
            "loss": config.text_loss_weight * self.text_loss + config.image_loss_weight * self.image_loss,
            "grad_norm": self.grad_norm,
            "text_tokens": self.counts.text,
            "image_tokens": self.counts.image,
        }
        if self.counts.text:
            values["text_loss"] = self.text_loss
        if self.counts.image:
            values["image_loss"] = self.image_loss
        if self.refused:
            values["skipped"] = 1.0
        return values


def micro_batches(engine: Engine, packs: Sequence[Pack], counts: Counts, config: Config) -> Iterator[Tensor]:
    """Forward and backward of a step's packed sequences on this process, one after another; the gradients add
    up.

    Args:
        engine, config: of the run.
        packs: this process's micro-batches of the step.
        counts: targets of the whole step, on all processes.

    Yields:
        After each, the sums [2] of its text and its image loss, without gradients.
    """
    for i, pack in enumerate(packs):
        last = i == len(packs) - 1
        with engine.accumulate(last):
            text_sum, image_sum = loss_sums(engine.forward(pack.to(engine.device)))
            engine.backward(
                joint_loss(text_sum, image_sum, counts, config.text_loss_weight, config.image_loss_weight),
                last,
            )
        yield torch.stack([text_sum, image_sum]).detach()


def dry_batch(engine: Engine, stream: PackStream, rows: int = 1) -> None:
    """Forward and backward of the largest row, so that memory runs out now or never.

    Where a step has several ``rows`` on each process it goes twice: the second forward runs while the
    gradients of the first are held, and that is the most a step takes. Weights and average lie there already;
    checkpoints, the best one too, are copied into host memory.

    Raises:
        TrainingStopped: it does not fit.
    """
    pack = stream.build_largest().pack
    packs, peaks = [pack] * min(rows, 2), []
    try:
        held = _moments_to_come(engine)
        _restart_peak(engine.device)
        for _ in micro_batches(engine, packs, Counts.of(packs), engine.config):
            peaks.append(_restart_peak(engine.device))
    except torch.OutOfMemoryError as error:
        which = "" if len(packs) == 1 else f" as micro-batch {len(peaks) + 1} of a step"
        raise TrainingStopped(
            f"The largest row, {len(pack):,} tokens, does not fit{which} into the memory of {engine.device}"
            f" ({str(error).splitlines()[0]}). Fix: --gradient_checkpointing, --precision bf16, --engine"
            " fsdp2 on several GPUs, --optimizer adamw8bit, a smaller --batch_size, --max_num_tokens or"
            " --max_image_tokens, or freeze a part"
        ) from error
    del held
    engine.discard()
    times = "" if len(packs) == 1 else " twice, as two micro-batches of a step"
    took = (
        ", at most " + " and ".join(f"{peak / 2**30:.1f} GiB" for peak in peaks)
        if engine.device.type == "cuda"
        else ""
    )
    log.info(
        "Dry batch: %s tokens of %d sample(s) went forward and backward%s%s",
        f"{len(pack):,}",
        pack.n_samples,
        times,
        took,
    )


def _moments_to_come(engine: Engine) -> list[Tensor]:
    """Memory of the size of AdamW's two moments, made at its first step; none where a resume brought them."""
    if engine.device.type != "cuda" or engine.optimizer.state:
        return []
    dtype = torch.uint8 if engine.config.optimizer == "adamw8bit" else None
    return [
        torch.empty_like(shard.value, dtype=dtype)
        for shard in engine.shards()
        if shard.trains
        for _ in range(2)
    ]


def _restart_peak(device: torch.device) -> int:
    """The most bytes of a GPU's memory that tensors took since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


@torch.no_grad()
def validation_losses(
    engine: Engine, config: Config, rows: Iterable[list[MicroBatch]], agree: Callable[[MicroBatch], bool]
) -> dict[str, float] | None:
    """Mean losses over rows with fixed noise and times: the same weights give the same numbers.

    Args:
        engine, config: of the run.
        rows: of this process, one at a time and on every process as many.
        agree: asked before each row, on all processes together; false breaks it off, and the answer is None.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    engine.model.eval()
    try:
        for (row,) in rows:
            if not agree(row):
                return None
            text_sum, image_sum = loss_sums(engine.forward(row.pack.to(engine.device)))
            totals += torch.tensor(
                [float(text_sum), float(image_sum), row.pack.n_text_labels, row.pack.n_image_targets],
                dtype=torch.float64,
            )
    finally:
        engine.model.train()
    text_sum, image_sum, text, image = engine.sum(totals.tolist())
    values = {}
    if text:
        values["val_text_loss"] = text_sum / text
    if image:
        values["val_image_loss"] = image_sum / image
    weighted = config.text_loss_weight * values.get(
        "val_text_loss", 0.0
    ) + config.image_loss_weight * values.get("val_image_loss", 0.0)
    return values | {"val_loss": weighted}
