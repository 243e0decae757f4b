"""Fully sharded data parallel: PyTorch's ``fully_shard`` (FSDP2). Each process holds its rows of every
parameter, of its gradient, moments and average; a layer is gathered while it runs.

With ``shard_size`` the processes form groups that each hold one copy between them (hybrid sharding):
gathering then stays inside a group, say a node, and only gradients travel between groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Rows
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from unigen.bars import each
from unigen.config import Config, ConfigError
from unigen.model.storage import Stored
from unigen.model.weights import read_parameter
from unigen.training.engine import Engine
from unigen.training.shards import Shard


class FullyShard(Engine):
    """Each process holds its rows of every parameter (FSDP2)."""

    name = "fsdp2"
    grouped = True
    sharded = averages = True

    def __init__(self, config: Config):
        super().__init__(config)
        size = config.shard_size or self.world
        if self.world % size:
            raise ConfigError(
                f"shard_size is {size}, which does not divide the {self.world} processes (--shard_size ...)"
            )
        names = ("replicate", "shard") if size < self.world else ("shard",)
        shape = (self.world // size, size) if size < self.world else (self.world,)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.copies = self.world // size

    # ---- build

    def place(self, stored: dict[str, Stored]) -> None:
        """Shards the model while it lies nowhere; then every process reads its rows."""
        c, model = self.config, self.model
        offload = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if c.cpu_offload else OffloadPolicy()
        )
        # Layers are gathered in the dtype they compute in. Embeddings, text head, final norms, and the
        # residual stream between layers stay as they are without sharding. On a CPU autocast alone lowers the
        # precision, of what it can be lowered for.
        dtype = None if self.dtype == torch.float32 or self.device.type == "cpu" else self.dtype
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
        )
        layers: list[nn.Module] = [*model.language_model.model.layers]
        if model.config.visual_und:
            layers += model.vit_model.vision_model.encoder.layers
        for layer in layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        # The root is needed at both ends of a step and stays gathered in between.
        fully_shard(model, mesh=self.mesh, reshard_after_forward=False, offload_policy=offload)
        model.sharded = True
        model.to_empty(device="cpu" if c.cpu_offload else self.device)
        for shard in each("loading weights", self.shards(), "tensors"):
            self.tick()
            read_parameter(model, shard.name, stored, shard.value, shard.start)

    def local(self, p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(_rows(p))

    # ---- the step

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        # Gradients are summed into shards with every micro-batch: kept whole they would fill the memory that
        # sharding saves. Between the copies of hybrid sharding they travel once a step.
        self.model.set_requires_all_reduce(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_is_last_backward(last)
        super().backward(loss, last)
        if last:
            for name, p in self.model.named_parameters():
                if p.grad is not None:
                    self._optimised[name].grad = _rows(p.grad)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()

    def tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, p in module.named_parameters():
            yield name, p.detach().full_tensor() if isinstance(p, DTensor) else p

    # ---- state

    def refresh(self) -> None:
        """After a forward without a backward the root is still gathered, with the values of before."""
        self.model.reshard()

    def shards(self) -> list[Shard]:
        self.model.reshard()  # gathered, a parameter would not be this process's part of it
        found = []
        first_copy = len(self.mesh.shape) == 1 or self.mesh.get_local_rank("replicate") == 0
        for name, p in self.model.named_parameters():
            assert isinstance(p, DTensor) and p.placements[-1] == Rows(0), name
            value = _rows(p).view(-1)
            _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            start = offset[0] * p.shape[1:].numel() if len(value) else 0
            found.append(
                Shard(name, p.shape, start, value, p.requires_grad, owned=first_copy and len(value) > 0)
            )
        return found


def _rows(tensor: Tensor) -> Tensor:
    """The rows of this process: live, plain, contiguous."""
    assert isinstance(tensor, DTensor)
    local = tensor.detach().to_local()
    assert local.is_contiguous()
    return local
