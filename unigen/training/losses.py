"""The joint loss: sums over all targets of an optimiser step, divided by their global count.

Text: cross-entropy, mean over all label tokens. Images: squared error of the velocity, mean over the channels
of a token, then over all noised latent tokens. Both means are over every rank and every micro-batch, so that
the split changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unigen.model.bagel import Output
from unigen.sequence.types import Pack


@dataclass(frozen=True)
class Counts:
    """Targets of a whole optimiser step: the denominators."""

    text: float
    image: float

    @classmethod
    def of(cls, packs: list[Pack]) -> Counts:
        """Those of one process."""
        return cls(sum(p.n_text_labels for p in packs), sum(p.n_image_targets for p in packs))


def loss_sums(output: Output) -> tuple[Tensor, Tensor]:
    """(sum of the text loss over label tokens, sum of the image loss over noised tokens), float32 scalars
    with gradients (zero ones where a row has no such target)."""
    image = output.mse.mean(dim=-1).sum() if output.mse.shape[-1] else output.mse.sum()
    return output.ce.sum(), image


def joint_loss(
    text_sum: Tensor, image_sum: Tensor, counts: Counts, text_weight: float, image_weight: float
) -> Tensor:
    """This row's part of the step's loss."""
    return text_weight * text_sum / max(counts.text, 1) + image_weight * image_sum / max(counts.image, 1)
