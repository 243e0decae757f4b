"""The exponential moving average of the weights: what a diffusion model is sampled with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unigen.training.optim import check_tensors


class EMA:
    """``average = decay * average + (1 - decay) * weights`` after every optimiser step, in float32, trainable parameters only.

    float32 because one step moves the average by far less than half a unit in the last place of bfloat16.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Starts from the weights as they are.

        Args:
            model: Its parameters that are trainable now are averaged.
            decay: Share of the old average that a step keeps, between 0 and 1.
        """
        assert 0 < decay < 1
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A dense copy in the parameter's own memory layout.
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights into the average; once after each optimiser step."""
        assert not self._swapped, "the model holds the average itself now"
        if not self._average:
            return
        weights = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1.0 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """Parameter name -> average, float32, the parameter's shape; the live tensors, not copies."""
        return dict(self._average)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what :meth:`tensors` gave, bit for bit.

        Raises:
            CheckpointError: a name is missing or unexpected, or a shape or dtype differs; nothing has been changed then.
        """
        assert not self._swapped, "the model holds the average itself now"
        expected = {name: (average.shape, torch.float32) for name, average in self._average.items()}
        check_tensors(tensors, expected, "the average of the weights")
        for name, average in self._average.items():
            average.copy_(tensors[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the averaged weights (in its own dtype) inside the ``with``, and its own bits again after it.

        The tensors change places, nothing is copied where the parameters are float32: inside, evaluate and save, and change no
        weight.
        """
        assert not self._swapped, "already swapped"
        own = {name: p.data for name, p in self._parameters.items()}
        self._swapped = True
        try:
            for name, p in self._parameters.items():
                p.data = self._average[name].to(p.dtype)
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]
            self._swapped = False
