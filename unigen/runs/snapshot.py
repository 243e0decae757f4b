"""Copies of a run's tensors in host memory, from which a checkpoint is written beside the training.

Tensors in host memory are copied at once. Those on a GPU are copied by the thread that writes, on a stream of
its own, through two pinned buffers that serve every save: one is filled while the other is emptied. Until
then the tensors must not change, see ``Saver.settle``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

# bytes of a pinned buffer: some milliseconds of copying, beside which starting a copy is nothing
BUFFER = 1 << 26


def copied_later(tensor: Tensor) -> bool:
    """Is this tensor copied by the writing thread, and has to stay as it is until then?"""
    return tensor.is_cuda


class GpuLane:
    """Pinned buffers [BUFFER] uint8 and a stream of their own on one GPU."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._done = [torch.cuda.Event() for _ in self.buffers]

    def begin(self) -> None:
        """What is copied from now on has the values that the calling thread's work so far gives it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def entered(self) -> AbstractContextManager[object]:
        """Around :meth:`start`, and what makes its sources."""
        return torch.cuda.stream(self.stream)

    def start(self, slot: int, source: Tensor) -> None:
        """Begins to copy ``source`` [n] uint8 to the front of a buffer."""
        self.buffers[slot][: len(source)].copy_(source, non_blocking=True)
        self._done[slot].record()

    def finish(self, slot: int) -> None:
        """Returns when the last copy to a buffer is there."""
        self._done[slot].synchronize()


def copy_out(lane: GpuLane, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Contiguous copies of ``tensors`` in host memory, of the same shapes and dtypes."""
    under_way: deque[tuple[int, Tensor]] = deque()  # (buffer, where its bytes go), the oldest first
    copies = []

    def empty() -> None:
        slot, target = under_way.popleft()
        lane.finish(slot)
        target.copy_(lane.buffers[slot][: len(target)])

    started = 0
    with lane.entered():
        for tensor in tensors:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
            source, target = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (tensor, copy))
            for at in range(0, len(target), BUFFER):
                if len(under_way) == len(lane.buffers):
                    empty()
                slot = started % len(lane.buffers)
                lane.start(slot, source[at : at + BUFFER])
                under_way.append((slot, target[at : at + BUFFER]))
                started += 1
            copies.append(copy)
        while under_way:
            empty()
    return copies
