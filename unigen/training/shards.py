"""What one process holds of the model: runs of elements, whatever the engine.

Plain and data-parallel training hold every parameter whole; FSDP2 holds some rows, ZeRO some elements. All of
them are elements [start, stop) of the flattened parameter, so the average, the checkpoint and the comparison
of runs need know no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unigen.model import quantise


@dataclass(frozen=True)
class Shard:
    """Elements [start, start + len(value)) of the flattened parameter ``name``.

    ``value`` [n] is flat and live: writing to it changes the weight (the engine's ``refresh`` then brings its
    copies up to date). Where the parameter trains it is float32, or bfloat16 as ``weights`` says. Of the
    processes that hold the same elements one has ``owned``: it writes them.
    """

    name: str
    shape: torch.Size
    start: int
    value: Tensor
    trains: bool
    owned: bool = True
    count: int = 0  # numbers that a quantised ``value`` stands for

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.count or self.shape.numel()

    @property
    def whole(self) -> bool:
        return len(self.value) == self.shape.numel()


def shards_of(parameters: Iterable[tuple[str, nn.Parameter]], rank: int = 0, world: int = 1) -> list[Shard]:
    """Whole parameters; of ``world`` processes that all hold them, each owns about as many bytes."""
    named = list(parameters)
    owners = share_out([p.numel() * p.element_size() for _, p in named], world)
    found = []
    for (name, p), owner in zip(named, owners, strict=True):
        assert p.is_contiguous(), name
        flat = p.detach().view(-1)
        found.append(Shard(name, p.shape, 0, flat, p.requires_grad, owner == rank, quantise.count(p)))
    return found


def share_out(sizes: Sequence[int], world: int) -> list[int]:
    """Which of ``world`` processes takes each item, so that all have about as much: the largest first, always
    to the least laden."""
    load, owners = [0] * world, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[i] = min(range(world), key=lambda r: (load[r], r))
        load[owners[i]] += sizes[i]
    return owners
