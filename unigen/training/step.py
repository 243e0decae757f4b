"""The training step on one screen: forward, losses, backward, guard, update.

The losses are sums over all targets of an optimiser step, divided by their global count. Text: cross-entropy,
mean over all label tokens. Images: squared error of the velocity, mean over the channels of a token, then
over all noised latent tokens. A target counts with its weight, which is 1 unless the data says otherwise.
Both means are over every rank and every micro-batch, so the split into micro-batches and ranks changes
nothing (:class:`Counts` are the denominators).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unigen.config import Config
from unigen.data.loader import MicroBatch
from unigen.model.bagel import Output
from unigen.sequence.types import Pack
from unigen.training import preserve
from unigen.training.engine import Engine
from unigen.training.run import Run


@dataclass(frozen=True)
class Counts:
    """What an optimiser step contains: text targets and image targets, each with its weight (the
    denominators), tokens, and the targets of both kinds at which the model is to stay what it was."""

    text: float
    image: float
    tokens: float = 0.0
    kept_text: float = 0.0
    kept_image: float = 0.0

    @classmethod
    def of(cls, packs: Sequence[Pack]) -> Counts:
        """Those of some packed sequences; those of a step are the sum over all processes."""
        return cls(
            sum(pack.target_weights[0] for pack in packs),
            sum(pack.target_weights[1] for pack in packs),
            sum(len(pack) for pack in packs),
            sum(pack.n_kept_labels for pack in packs),
            sum(pack.n_kept_image for pack in packs),
        )


@dataclass(frozen=True)
class StepResult:
    """The numbers of one optimiser step: losses are means over all its targets, on all ranks."""

    text_loss: float
    image_loss: float
    counts: Counts
    grad_norm: float
    refused: str  # why the step changed nothing; "" where it was taken
    kept: tuple[float, float] = (0.0, 0.0)  # mean distances to the model as it was: of texts, of images

    def metrics(self, config: Config) -> dict[str, float]:
        """The step as it is logged; a loss without targets is left out."""
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
        if config.preserve_weight is not None:
            values |= preserve.metrics(self.kept, self.counts.kept_text, self.counts.kept_image)
        if self.refused:
            values["skipped"] = 1.0
        return values


def train_step(run: Run, batches: Sequence[MicroBatch], lr: float, counts: Counts) -> StepResult:
    """Takes one optimiser step; all processes call it together.

    Args:
        batches: this process's micro-batches of the step.
        counts: of the whole step, on all processes.

    Raises:
        TrainingStopped: too many steps in a row were refused.
    """
    engine, guard = run.engine, run.guard
    engine.discard()
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for found in forward_backward(engine, [batch.pack for batch in batches], counts, run.config):
        sums += found
    text_sum, image_sum, *kept = engine.sum(sums.tolist())
    norm = engine.grad_norm()

    refused = guard.refuses((text_sum, image_sum, *kept), norm)
    overflow = not math.isfinite(norm)  # in float16 the business of the loss scale alone
    if refused or overflow:
        engine.discard()
    else:
        run.saver.settle()  # a checkpoint that is being copied needs the weights as they are
        run.position.sound = False
        engine.step(lr, norm)
        if run.ema is not None:
            run.ema.update()
    engine.scale.update(overflow)

    text_loss, image_loss = text_sum / (counts.text or 1), image_sum / (counts.image or 1)
    if refused:
        numbers = {"text_loss": text_loss, "image_loss": image_loss, "grad_norm": norm}
        guard.skipped(run.position.step + 1, refused, batches, numbers)
    else:
        guard.took(norm)
    apart = kept[0] / max(counts.kept_text, 1), kept[1] / max(counts.kept_image, 1)
    return StepResult(text_loss, image_loss, counts, norm, refused, apart)


def forward_backward(
    engine: Engine, packs: Sequence[Pack], counts: Counts, config: Config
) -> Iterator[Tensor]:
    """Forward and backward of packed sequences, one after another; the gradients add up.

    Args:
        packs: this process's micro-batches of the step.
        counts: of the whole step, on all processes.

    Yields:
        After each, the sums [4] of its text loss, of its image loss, and of its distances to the model as it
            was in texts and images, without gradients.
    """
    for i, pack in enumerate(packs):
        last = i == len(packs) - 1
        with engine.accumulate(last):
            pack = pack.to(engine.device)
            output = engine.forward(pack) if engine.teacher is None else engine.teacher.forward(pack)
            text_sum, image_sum = loss_sums(output)
            weights = config.text_loss_weight, config.image_loss_weight
            loss, kept = joint_loss(text_sum, image_sum, counts, *weights), output.read
            if kept is not None:
                apart = joint_loss(*kept, Counts(counts.kept_text, counts.kept_image), 1.0, 1.0)
                loss = loss + config.preserve_weight * apart
            engine.backward(loss, last)
        yield torch.stack([text_sum, image_sum, *(kept or text_sum.new_zeros(2))]).detach()


def loss_sums(output: Output) -> tuple[Tensor, Tensor]:
    """The text loss summed over label tokens and the image loss summed over noised tokens.

    Two float32 scalars with gradients; gradients of zero where a packed sequence has no such target.
    """
    image = output.mse.mean(dim=-1).sum() if output.mse.shape[-1] else output.mse.sum()
    return output.ce.sum(), image


def joint_loss(
    text_sum: Tensor, image_sum: Tensor, counts: Counts, text_weight: float, image_weight: float
) -> Tensor:
    """A packed sequence's part of the step's loss, a scalar: both sums over the step's global counts."""
    return text_weight * text_sum / (counts.text or 1) + image_weight * image_sum / (counts.image or 1)
