"""The key-value cache of one context."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor


class Cache:
    """Keys and values of one context, layer by layer, and the RoPE position that comes next.

    ``snapshot()`` costs nothing: copies share their buffers, and only a context that grows away from the
    shared part copies it. Cached tokens are seen by all that follows (noised images never enter a cache), so
    their order is free.
    """

    def __init__(self, n_layers: int):
        self.layers: list[_Buffer | None] = [None] * n_layers
        self.length = 0  # tokens
        self.position = 0  # next RoPE position

    def snapshot(self) -> Cache:
        other = copy.copy(self)
        other.layers = list(self.layers)
        return other

    def past_key_values(self, layer: int) -> Tensor:
        """[2, P, G, d]: keys and values so far."""
        buffer = self.layers[layer]
        assert buffer is not None and self.length
        return buffer.data[:, : self.length]

    def room(self, layer: int, n: int, like: Tensor) -> Tensor:
        """[2, P + n, G, d]: keys and values so far, and after them the places of ``n`` tokens, for the caller
        to fill.

        ``length`` itself moves when all layers are done. ``like`` [n, G, d] gives shape, dtype and device.
        """
        buffer, end = self.layers[layer], self.length + n
        if buffer is None or buffer.used != self.length or end > buffer.data.shape[1]:
            data = like.new_empty(2, max(end + 64, end * 5 // 4), *like.shape[1:])
            if buffer is not None and self.length:
                data[:, : self.length] = buffer.data[:, : self.length]
            buffer = self.layers[layer] = _Buffer(data, self.length)
        buffer.used = end
        return buffer.data[:, :end]


@dataclass
class _Buffer:
    data: Tensor  # [2, capacity, G, d]
    used: int
