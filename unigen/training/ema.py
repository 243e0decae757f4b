"""The exponential moving average of the weights: what a diffusion model is sampled with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from unigen.training.shards import Shard


class EMA:
    """``average = decay * average + (1 - decay) * weights`` after every optimiser step, in float32, trainable
    parameters only.

    float32 because one step moves the average by far less than half a unit in the last place of bfloat16.
    Each process averages what it holds.
    """

    def __init__(self, shards: Sequence[Shard], decay: float):
        """Starts from the weights as they are; ``decay`` is the share of the old average that a step keeps,
        between 0 and 1."""
        assert 0 < decay < 1
        self.decay = decay
        self.shards = [shard for shard in shards if shard.trains]
        self.values = {shard.name: shard.value.to(torch.float32, copy=True) for shard in self.shards}
        self._own: dict[str, Tensor] = {}  # the model's weights, while it holds the average
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights into the average; once after each optimiser step."""
        assert not self._swapped, "the model holds the average itself now"
        share = 1.0 - self.decay
        wide = [shard for shard in self.shards if shard.value.dtype == torch.float32]
        if wide:
            averages = [self.values[shard.name] for shard in wide]
            torch._foreach_lerp_(averages, [shard.value for shard in wide], share)
        for shard in self.shards:
            if shard.value.dtype != torch.float32:
                self.values[shard.name].lerp_(shard.value.float(), share)

    def average(self, name: str) -> Tensor:
        """The average of what this process holds of a parameter: flat float32, live."""
        assert not self._swapped, "the model holds the average itself now"
        return self.values[name]

    @torch.no_grad()
    def load(self, read: Callable[[Shard, Tensor], None]) -> None:
        """``read(shard, out)`` fills every average with what was saved."""
        assert not self._swapped, "the model holds the average itself now"
        for shard in self.shards:
            read(shard, self.values[shard.name])

    @contextmanager
    def swapped(self, refresh: Callable[[], None] = lambda: None) -> Iterator[None]:
        """The model holds the averaged weights (in its own dtype) inside the ``with``, and its own bits again
        after it: inside, evaluate, and change no weight. ``refresh`` tells the engine that the values
        changed."""
        assert not self._swapped, "already swapped"
        self._swap()
        self._swapped = True
        try:
            refresh()
            yield
        finally:
            self._swap()
            self._swapped = False
            refresh()

    @torch.no_grad()
    def _swap(self) -> None:
        for shard in self.shards:
            average, low = self.values[shard.name], shard.value.dtype != torch.float32
            if low and self._swapped:
                shard.value.copy_(self._own.pop(shard.name))
                continue
            own = shard.value.clone()
            shard.value.copy_(average)
            if low:  # exchanged, the average would lose digits
                self._own[shard.name] = own
            else:
                average.copy_(own)
