"""Processes and devices. An engine holds the model in its own way; the trainer sees one small interface.

    single      one process
    ddp         every process a whole model (PyTorch's DistributedDataParallel)
    fsdp2       parameters, gradients, moments and average in shards (PyTorch's fully_shard), ``fsdp.py``
    deepspeed   ZeRO 1, 2, 3, ``deepspeed.py``

The optimiser works on plain tensors: on the parameters, or on what this process holds of them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unigen.config import Config, ConfigError, UserError
from unigen.model.adapters import NAME
from unigen.model.backends import autocast, pick_device, prefer_flash, use_expandable_segments, use_tf32
from unigen.model.bagel import Bagel, Output
from unigen.model.lora import base_digest, check_same_parts
from unigen.model.parts import dtype_of, is_adapter
from unigen.model.storage import Stored, scan_folder
from unigen.model.weights import build_bagel, load_codec, place_parameters
from unigen.runs.channel import Channel
from unigen.sequence.types import Pack
from unigen.training.optim import (
    LossScale,
    build_optimizer,
    clipping,
    moments_of,
    scale_gradients,
    set_learning_rate,
    set_moments_of,
    squared_norm,
)
from unigen.training.precision import DeviceFacts, check_head_width, choose_precision
from unigen.training.prepare import prepare
from unigen.training.shards import Shard, shards_of


class Engine:
    """One process, and the base of the others.

    ``torchrun`` sets the environment; without it there is one process. Use as a context manager: it ends the
    group.
    """

    name = "single"
    grouped = False  # does one process alone have a process group, too, and train by the same code as many?
    # does a forward gather parameters, so that all processes must do the same forwards in the same order?
    sharded = False
    averages = False  # are gradients averaged over the processes, though the loss is a sum over them?
    copies = 0  # of the gradient, over all processes that hold parts of it; 0: each has it whole

    def __init__(self, config: Config):
        self.config = config
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world)))
        self.device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
        self.main = self.rank == 0
        if self.device.type == "cuda":
            use_expandable_segments()
            torch.cuda.set_device(self.device)
        prefer_flash()
        self.facts = DeviceFacts.of(self.device)
        self.precision = choose_precision(config, self.facts)
        if self.device.type == "cuda" and self.dtype == torch.float32:
            use_tf32()
        self._start_group()
        self.channel = Channel(self.world, self.device)
        # sums of plain numbers over all processes; a short text of every process, in rank order
        self.sum, self.gather = self.channel.sum, self.channel.gather
        self._compute_alike()
        self.scale = LossScale(self.dtype == torch.float16)
        self.teacher: Any = None  # the model as it was, where the run stays near it (``preserve.py``)
        self.tick: Callable[[], None] = lambda: None  # told of progress
        self._optimised: dict[str, nn.Parameter] = {}  # what the optimiser holds of each trainable parameter

    @property
    def _limit(self) -> timedelta:
        """Of a collective. The heartbeat of the run speaks first (``hang_timeout``)."""
        return timedelta(seconds=2 * self.config.hang_timeout + 600)

    def _start_group(self) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if dist.is_initialized():
            return
        if self.world > 1:
            dist.init_process_group(backend, timeout=self._limit)
        elif self.grouped:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def _compute_alike(self) -> None:
        """Raises ConfigError where processes chose different precisions: their GPUs differ."""
        said = self.gather(self.precision.name)
        if len(set(said)) > 1:
            where = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(said))
            raise ConfigError(
                f"precision differs from process to process ({where}), as GPUs or options do. Fix:"
                " --precision ..."
            )

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return self.precision.dtype

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- words

    def background(self) -> Channel:
        """A channel of its own, for one thread beside the training; all processes call this together."""
        if self.world == 1:
            return self.channel
        group = dist.new_group(backend="gloo", timeout=self._limit)
        return Channel(self.world, torch.device("cpu"), group)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on rank 0, while the others wait; None on those. Its failure is raised
        everywhere."""
        found, error = None, None
        if self.main:
            try:
                found = work()
            except Exception as caught:
                error = caught
        said = self.gather(f"{type(error).__name__}: {error}" if error else "")[0]
        if error is not None:
            raise error
        if said:
            raise UserError(f"rank 0 stopped: {said}")
        return found

    # ---- build

    def load_model(self, folder: Path, stored: dict[str, Stored] | None = None) -> Bagel:
        """The model of a checkpoint folder ready for training, on this process's device. It reads only what
        it holds. ``stored``: where the weights lie, in place of the folder's first choice.

        Raises:
            CheckpointFolderError: as ``load_bagel``.
            ConfigError: nothing would train, or attention in this precision does not fit the GPU.
        """
        c = self.config
        given = stored or {}
        stored = scan_folder(folder) if stored is None else stored
        stored = {name: entry for name, entry in stored.items() if not is_adapter(name)}
        held = {name: entry.dtype for name, entry in stored.items()}
        model, stored = build_bagel(
            folder,
            lambda name: dtype_of(name, c, self.dtype, held.get(name)),
            visual_gen=c.visual_gen,
            visual_und=c.visual_und,
            stored=stored,
        )
        width = model.language_model.model.layers[0].self_attn.head_width
        check_head_width(self.precision, width, self.facts)
        codec = load_codec(folder, model.config, self.device) if c.visual_gen else None
        object.__setattr__(model, "codec", codec)
        self.compiled = prepare(model, c, self.device.type, self.name, self.dtype, fresh=not given)
        self.model = model.train()
        if adapter := model.adapters.get(NAME):
            # beside an adapter that goes on, what it trained whole is no longer the base's
            base = scan_folder(folder) if given else stored
            model.adapters[NAME] = replace(adapter, digest=base_digest(base))
            if given:
                check_same_parts(folder, dict(model.named_parameters()), given)
        self.place(stored | given)
        return self.model

    def place(self, stored: dict[str, Stored]) -> None:
        """Gives the parameters of ``self.model``, which lie nowhere yet, their memory and their values."""
        quantises = self.config.quantize is not None
        place_parameters(self.model, stored, self.device, quantises=quantises, tick=self.tick)

    def start(self) -> None:
        """Wraps the model for training and builds the optimiser."""
        self.wrapped = self.wrap(self.model)
        named = self.model.named_parameters()
        self._optimised = {name: self.local(p) for name, p in named if p.requires_grad}
        self.optimizer = build_optimizer(self.model, self._optimised, self.config)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward and backward add up gradients over the processes."""
        return model

    def local(self, p: nn.Parameter) -> nn.Parameter:
        """What this process holds of a parameter, as the optimiser's own."""
        return p

    # ---- the step

    @property
    def compiles(self) -> bool:
        return self.compiled is not None and self.compiled.on

    def autocast(self) -> AbstractContextManager[None]:
        """Around sampling, which uses every weight again and again."""
        return autocast(self.device, self.dtype, cache=True)

    def forward(self, pack: Pack, **more: Any) -> Output:
        """The training forward of a packed sequence; weights are used once, so no lowered copy is kept.
        ``more``: of ``Bagel.forward``."""
        with autocast(self.device, self.dtype, cache=False):
            return self.wrapped(pack, **more)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; ``last`` of its step."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of this process's part of the step's loss; after the last one it is that of all
        processes' sum."""
        (loss * ((self.world if self.averages else 1) * self.scale.scale)).backward()

    def grad_norm(self) -> float:
        """2-norm of the whole gradient, the same number on every process."""
        total = float(squared_norm(self._gradients()))
        if self.copies:
            total = self.sum([total])[0] / self.copies
        return total**0.5 / self.scale.scale

    def gradients(self) -> dict[str, bool | None]:
        """Has each parameter that trains a gradient that is not zero? None where it has none at all. The same
        on every process; empty where the engine cannot say."""
        held = [p.grad for p in self._optimised.values()]
        there = self.sum([float(grad is not None) for grad in held])
        some = self.sum([float(grad is not None and bool(grad.any())) for grad in held])
        found = zip(self._optimised, there, some, strict=True)
        return {name: n > 0 if known else None for name, known, n in found}

    def step(self, lr: float, norm: float) -> None:
        """An update with the gradient, whose norm is ``norm``, clipped to ``max_grad_norm``; the gradient is
        gone afterwards."""
        scale_gradients(self._gradients(), clipping(norm, self.config.max_grad_norm) / self.scale.scale)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        for p in self.model.parameters():
            p.grad = None
        for local in self._optimised.values():
            local.grad = None

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._optimised.values() if p.grad is not None]

    def whole(self) -> AbstractContextManager[None]:
        """Inside, parts of ``self.model`` may be called directly, not only the whole of it (sampling
        does)."""
        return contextlib.nullcontext()

    def tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The parameters of a part of the model by name, whole, one after another; all processes do this
        together."""
        yield from module.named_parameters()

    # ---- state

    def shards(self) -> list[Shard]:
        """What this process holds of every parameter, in the model's order."""
        return shards_of(self.model.named_parameters(), self.rank, self.world)

    def moments(self, shard: Shard) -> tuple[float, Tensor, Tensor] | None:
        """AdamW's step count and its two moments of a shard, flat float32; None before its first update."""
        return moments_of(self.optimizer, self._optimised[shard.name])

    def set_moments(self, shard: Shard, step: float, *moments: Tensor) -> None:
        """Puts back what :meth:`moments` gave."""
        set_moments_of(self.optimizer, self._optimised[shard.name], step, *moments)

    def refresh(self) -> None:
        """The values of shards were written to: brings copies of them up to date."""


class DataParallel(Engine):
    """Every process holds the whole model and takes its rows of every step."""

    name = "ddp"
    averages = True

    def wrap(self, model: nn.Module) -> nn.Module:
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.wrapped.no_sync()


ENGINES: dict[str, str] = {
    "single": "unigen.training.engine:Engine",
    "ddp": "unigen.training.engine:DataParallel",
    "fsdp2": "unigen.training.fsdp:FullyShard",
    "deepspeed": "unigen.training.deepspeed:DeepSpeed",
}
"""Name -> class, imported when it is asked for."""


def engine_name(config: Config, world: int) -> str:
    """The engine that the config asks for; ``auto`` is plain data parallel where there are several processes,
    and that of one process alone is ``single``."""
    name = config.engine if config.engine != "auto" else "ddp"
    return "single" if name == "ddp" and world == 1 else name


def open_engine(config: Config) -> Engine:
    """The engine that the config asks for.

    Raises:
        ConfigError: ``single`` with several processes; no GPU where one is asked for.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    name = engine_name(config, world)
    if name == "single" and world > 1:
        raise ConfigError(
            f"engine is single, but {world} processes were started; use --engine ddp or fsdp2, or start one"
            " without torchrun"
        )
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(config)
