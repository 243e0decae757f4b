"""Passes over the model beside the training step: the dry batch before the first, and validation; and what a step's numbers are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from unigen.config import Config
from unigen.data.loader import Row, RowStream
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


def dry_batch(engine: Engine, stream: RowStream) -> None:
    """Forward and backward of the largest row, so that memory runs out now or never.

    Raises:
        TrainingStopped: it does not fit.
    """
    pack = stream.build_largest().pack
    trained = [shard.value for shard in engine.shards() if shard.trains]
    try:
        # AdamW will make its two moments at the first step; here their place is only held.
        dtype = torch.uint8 if engine.config.optimizer == "adamw8bit" else None
        moments = [torch.empty_like(value, dtype=dtype) for value in trained for _ in range(2)] if engine.device.type == "cuda" else []
        with engine.accumulate(last=True):
            text_sum, image_sum = loss_sums(engine.forward(pack.to(engine.device)))
            engine.backward(joint_loss(text_sum, image_sum, Counts.of([pack]), 1.0, 1.0), last=True)
    except torch.OutOfMemoryError as error:
        raise TrainingStopped(
            f"The largest row, {len(pack):,} tokens, does not fit into the memory of {engine.device} ({str(error).splitlines()[0]}). "
            "Cure: --gradient_checkpointing, --bf16, --engine fsdp2 on several GPUs, --optimizer adamw8bit, a smaller --batch_size, "
            "--max_num_tokens or --max_image_tokens, or freeze a part"
        ) from error
    del moments
    engine.discard()
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if engine.device.type == "cuda" else ""
    log.info("Dry batch: %s tokens of %d sample(s) went forward and backward%s", f"{len(pack):,}", pack.n_samples, peak)


@torch.no_grad()
def validation_losses(engine: Engine, config: Config, rows: Iterable[list[Row]], agree: Callable[[Row], bool]) -> dict[str, float] | None:
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
                [float(text_sum), float(image_sum), row.pack.n_text_labels, row.pack.n_image_targets], dtype=torch.float64
            )
    finally:
        engine.model.train()
    text_sum, image_sum, text, image = engine.sum(totals.tolist())
    values = {}
    if text:
        values["val_text_loss"] = text_sum / text
    if image:
        values["val_image_loss"] = image_sum / image
    weighted = config.text_loss_weight * values.get("val_text_loss", 0.0) + config.image_loss_weight * values.get("val_image_loss", 0.0)
    return values | {"val_loss": weighted}
