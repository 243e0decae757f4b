"""What the processes of a run say to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


class Channel:
    """What the processes say to each other, in plain numbers and short texts. ``group`` None is the default
    one."""

    def __init__(self, world: int, device: torch.device, group: dist.ProcessGroup | None = None):
        self.world, self.device, self.group = world, device, group

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of plain numbers over all processes."""
        if self.world == 1:
            return [float(v) for v in values]
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def gather(self, text: str) -> list[str]:
        """A short text of every process, in rank order."""
        if self.world == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(self.device)[
            : len(text.encode())
        ]
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=self.device), group=self.group)
        longest = max(int(n) for n in sizes)
        rows = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world)]
        dist.all_gather(rows, torch.cat([data, data.new_zeros(longest - len(data))]), group=self.group)
        return [row[: int(n)].cpu().numpy().tobytes().decode() for row, n in zip(rows, sizes, strict=True)]


@contextmanager
def processes() -> Iterator[tuple[int, Channel]]:
    """The number of this process among those that ``torchrun`` started, and how they speak to each other;
    without ``torchrun`` it is alone. For work that shares nothing but words: they go over gloo."""
    world, cpu = int(os.environ.get("WORLD_SIZE", "1")), torch.device("cpu")
    if world == 1:
        yield 0, Channel(1, cpu)
        return
    # one that ended is noticed at once; one that is slow may be waited for
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield dist.get_rank(), Channel(world, cpu)
    finally:
        dist.destroy_process_group()


def is_broken(error: BaseException) -> bool:
    """Does the error say that another process cannot be reached any more?"""
    words = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe", "Connection refused")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
