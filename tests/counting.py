"""Bytes of tensors that are alive, counted as they are made and freed: what a device's memory would hold."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
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


class Held(TorchDispatchMode):
    """Knows the tensors that were made inside, those of ``dtype`` if one is given, by their memory."""

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype, self.made = dtype, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self.dtype in (None, tensor.dtype):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def nbytes(self) -> int:
        """Bytes of those that are still held."""
        return sum(nbytes for ref, nbytes in self.made.values() if not ref.expired())


def share(planned: float, measured: float) -> float:
    """How far a plan is off, as a share of what was measured."""
    return abs(planned / measured - 1)
