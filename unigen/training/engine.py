"""Processes and devices: one process, or plain data parallel under ``torchrun``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from unigen.config import Config, ConfigError, UserError


class Engine:
    """What the trainer needs of the processes around it.

    ``torchrun`` sets the environment; without it there is one process. Use as a context manager: it ends the group.
    """

    def __init__(self, config: Config):
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world)))
        self.device = self._device(config, int(os.environ.get("LOCAL_RANK", "0")))
        self.main = self.rank == 0
        self.dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))

    @staticmethod
    def _device(config: Config, local_rank: int) -> torch.device:
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but no GPU is visible (--device cpu, or check the driver)")
        return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose forward and backward average gradients over the processes."""
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Gradients travel only with the last micro-batch of a step."""
        return contextlib.nullcontext() if last or self.world == 1 else model.no_sync()

    def autocast(self) -> AbstractContextManager[None]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of plain numbers over all processes."""
        if self.world == 1:
            return [float(v) for v in values]
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device if self.device.type == "cuda" else "cpu")
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, text: str) -> list[str]:
        """A short text of every process, in rank order."""
        if self.world == 1:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=self.device))
        longest = max(int(n) for n in sizes)
        rows = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world)]
        dist.all_gather(rows, torch.cat([data, data.new_zeros(longest - len(data))]))
        return [bytes(row[: int(n)].tolist()).decode() for row, n in zip(rows, sizes, strict=True)]

    def on_main(self, work: Callable[[], None]) -> None:
        """Runs ``work`` on rank 0 while the others wait; its failure is raised everywhere."""
        error: Exception | None = None
        if self.main:
            try:
                work()
            except Exception as caught:
                error = caught
        said = self.gather(f"{type(error).__name__}: {error}" if error else "")[0]
        if error is not None:
            raise error
        if said:
            raise UserError(f"rank 0 stopped: {said}")

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
