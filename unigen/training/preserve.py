"""Keeping what a model could: the distance to the model as it was before the training.

At the labels of the samples that are kept it is the Kullback-Leibler divergence KL(before || now) of the text
logits (as in distillation, Hinton et al. 2015), at their noised tokens the squared error between both
velocities, with the same noise and time, mean over channels. Each is a mean over all such targets of a step
(without the weights that records give them), and both add up (:func:`unigen.training.step.joint_loss`).

The model as it was is the model itself, without its adapters and with the trained weights of ``model_path``
in place: there is no second model, and beside adapters no second copy of anything but what ``train_also``
trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unigen.bars import each
from unigen.config import UserError
from unigen.model.bagel import Bagel, Output, StateReader
from unigen.model.lora import adapters_off, base_digest
from unigen.model.parts import is_adapter
from unigen.model.sdpa import Halves
from unigen.model.source import Source
from unigen.model.weights import read_parameter
from unigen.sequence.types import Pack

CHUNK = 1024  # label tokens whose logits are there at once, beside those of the model as it was


class ReferenceOutput(NamedTuple):
    """What the model as it was says of the targets of a packed sequence that are kept."""

    logits: Tensor  # [labels, vocabulary], in the dtype of the text head
    velocities: Tensor  # [noised tokens, patch_dim] float32


class Teacher:
    """The model as it was.

    Each process holds the trained weights of ``model_path`` as it holds the weights themselves (whole, or its
    shards), and exchanges them for the teacher's forward.

    Raises:
        UserError: the run goes on, and ``model_path`` is not what it began with.
    """

    def __init__(self, engine: Any, source: Source, resumed: Mapping[str, Any] | None):
        """``source``: the weights of ``model_path``. ``resumed``: what a checkpoint says of its run, if the
        run goes on from one."""
        self.engine, self.model = engine, engine.model
        self.settle: Callable[[], None] = lambda: None  # waits until no weight is being saved
        self.digest = base_digest(source.stored)
        path = engine.config.model_path
        other = source.folder != Path(path) or (resumed or {}).get("preserved", self.digest) != self.digest
        if resumed is not None and other:
            raise UserError(
                f"preserve_weight: {path} is gone, or not what this run began with and stays near. Fix:"
                " --model_path the checkpoint that it began with"
            )
        self.shards = [s for s in engine.shards() if s.trains and not is_adapter(s.name)]
        self.values: list[Tensor] = []
        for shard in each("loading the weights to stay near", self.shards, "tensors"):
            engine.tick()
            value = torch.empty_like(shard.value)
            read_parameter(self.model, shard.name, source.stored, value, shard.start)
            self.values.append(value)

    def forward(self, pack: Pack) -> Output:
        """The training forward; ``read`` holds the sums of both distances, with gradients; None where nothing
        is kept."""
        if not (self.engine.sharded or pack.n_kept_labels or pack.n_kept_image):
            return self.engine.forward(pack)
        latents = self.model.latents_of(pack)
        before = self.predict(pack, latents)

        def read(model: Bagel, hidden: Halves) -> tuple[Tensor, Tensor]:
            return distances(model, hidden, before)

        return self.engine.forward(pack, latents=latents, reader=StateReader(_kept(pack), read))

    @torch.no_grad()
    def predict(self, pack: Pack, latents: Sequence[Tensor]) -> ReferenceOutput:
        """What the model as it was says. Latents: [C, h, w] of the sequence's pictures."""
        # its own losses are asked of nobody
        none = {"label_weight": None, "noised_weight": None, "weight_sums": None}
        bare = replace(pack, label_rows=pack.label_rows[:0], noised_rows=pack.noised_rows[:0], **none)

        def read(model: Bagel, hidden: Halves) -> ReferenceOutput:
            words, drawn = hidden
            seen = model.velocities(drawn) if model.config.visual_gen else drawn.new_zeros(0, 0)
            return ReferenceOutput(model.logits(words), seen)

        with self.in_place():
            return self.engine.forward(bare, latents=latents, reader=StateReader(_kept(pack), read)).read

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model is what it was; its own weights come back bit for bit."""
        if self.shards:
            self.settle()
        self._exchange()
        try:
            with adapters_off(self.model):
                yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for shard, value in zip(self.shards, self.values, strict=True):
            now = shard.value.clone()
            shard.value.copy_(value)
            value.copy_(now)
        if self.shards:
            self.engine.refresh()


def _kept(pack: Pack) -> tuple[Tensor, Tensor]:
    """Rows of each half: the labels and the noised tokens that are kept."""
    assert pack.kept_label_rows is not None and pack.kept_noised_rows is not None
    return pack.kept_label_rows, pack.kept_noised_rows


def distances(model: Bagel, hidden: Halves, before: ReferenceOutput) -> tuple[Tensor, Tensor]:
    """The distances summed over labels and over noised tokens: two float32 scalars with gradients, of zero
    where there is none.

    Args:
        model: as it is now; hidden: its states [n, D] at the labels and at the noised tokens that are kept.
        before: what the model as it was said of them.
    """
    words, drawn = hidden
    texts = divergence(model.logits, words, before.logits)
    if not model.config.visual_gen:
        return texts, drawn.float().sum()
    return texts, ((model.velocities(drawn) - before.velocities) ** 2).mean(dim=-1).sum()


def divergence(head: Callable[[Tensor], Tensor], hidden: Tensor, before: Tensor) -> Tensor:
    """KL(before || now) in nats, summed over tokens, a float32 scalar.

    Args:
        head: hidden states [n, D] -> logits [n, vocabulary].
        hidden: [n, D]; more than CHUNK of them go through the head in pieces that the backward pass computes
            again.
        before: logits [n, vocabulary].
    """

    def piece(h: Tensor, then: Tensor) -> Tensor:
        now, then = (logits.float().log_softmax(-1) for logits in (head(h), then))
        return F.kl_div(now, then, reduction="sum", log_target=True)

    if len(hidden) <= CHUNK:
        return piece(hidden, before)
    pieces = zip(hidden.split(CHUNK), before.split(CHUNK), strict=True)
    return torch.stack([checkpoint(piece, h, then, use_reentrant=False) for h, then in pieces]).sum()


def metrics(means: tuple[float, float], texts: float, images: float) -> dict[str, float]:
    """The distances of a step as they are logged; those without targets are left out. ``means``: of the
    divergence over ``texts`` labels, of the squared error over ``images`` noised tokens."""
    found = {"preserve_loss": sum(means), "preserve_text_tokens": texts, "preserve_image_tokens": images}
    found |= {"preserve_text_loss": means[0]} if texts else {}
    return found | ({"preserve_image_loss": means[1]} if images else {})
