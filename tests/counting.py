"""Bytes of tensors that are alive, counted as they are made and freed: what a device's memory would hold."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the tensors that are made inside; ``known`` ones count nothing."""

    def __init__(self, known: Any = ()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.seen: set[int] = set(self.known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += nbytes
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.seen.discard(key)
            self.now -= nbytes

        weakref.finalize(storage, gone)


def share(planned: float, measured: float) -> float:
    """How far a plan is off, as a share of what was measured."""
    return abs(planned / measured - 1)
