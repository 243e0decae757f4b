"""ZeRO 1, 2 and 3: DeepSpeed, with an ordinary DeepSpeed JSON (``zero_json.py``).

DeepSpeed keeps the trainable weights of a group end to end in one flat float32 tensor, of which each process
holds a piece: in ZeRO 1 and 2 every process also keeps all weights to compute with, in ZeRO 3 each one is
gathered while its layer runs. A shard is the run of elements that a parameter and a process's piece have in
common; padding belongs to none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unigen.bars import each
from unigen.config import Config, UserError
from unigen.model.bagel import Output
from unigen.model.storage import Stored
from unigen.model.weights import read_parameter
from unigen.sequence.types import Pack
from unigen.training.deepspeed_json import loss_scale, read_settings
from unigen.training.engine import Engine
from unigen.training.optim import MOMENTS, adam_options, clipping, parameter_groups, set_learning_rate
from unigen.training.shards import Shard, share_out


@dataclass(frozen=True)
class Held:
    """Elements [start, start + length) of a parameter lie at ``offset`` of the flat tensor ``flat`` of its
    group."""

    flat: Tensor
    offset: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same place in a tensor laid out as ``flat``, live."""
        return tensor.detach().narrow(0, self.offset, self.length)


class DeepSpeed(Engine):
    """Parameters, gradients and moments as ZeRO divides them."""

    name = "deepspeed"
    grouped = True
    copies = 1

    def __init__(self, config: Config):
        super().__init__(config)
        self.deepspeed = _open_deepspeed(self.device)
        self._check_settings()
        self.scale = loss_scale(self.settings)
        self.sharded = self.stage == 3
        self.wrapped: Any = None
        self._zero: Any = None
        self._held: dict[str, Held] = {}
        self._counts: dict[int, set[float]] = {}

    def _start_group(self) -> None:
        # Before a group that would have to be ended.
        self.settings = read_settings(self.config, self.world, self.device, self.precision.name)
        self.stage = self.settings.stage
        os.environ.setdefault("LOCAL_RANK", "0")
        super()._start_group()

    def _check_settings(self) -> None:
        """Lets DeepSpeed itself read the settings."""
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig(self.settings.for_deepspeed())
        except (ValueError, TypeError, AssertionError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.settings.file}: DeepSpeed refuses it: {error} (--deepspeed_config ...)"
            ) from error

    def __exit__(self, *error: object) -> None:
        if self.wrapped is not None:
            self.wrapped.destroy()
        _restore_linear()
        if dist.is_initialized():
            self.deepspeed.comm.destroy_process_group()

    # ---- build

    def place(self, stored: dict[str, Stored]) -> None:
        """ZeRO 3: every process reads and holds its piece of each parameter. ZeRO 1, 2: the whole model."""
        self._stored = stored
        groups = parameter_groups(self.model, self.config)  # by shapes, which ZeRO 3 takes away
        self._groups = [([name for name, _ in group["params"]], group["weight_decay"]) for group in groups]
        if self.settings.held_dtype is not None:
            self.model.to(self.settings.held_dtype)
        if self.stage < 3:
            super().place(stored)
        else:
            self._partition(stored)

    def _partition(self, stored: dict[str, Stored]) -> None:
        zero = self.deepspeed.zero.Init(config_dict_or_path=self.settings.for_deepspeed())
        if self.settings.get("zero_optimization.memory_efficient_linear") is not False:
            zero._enable_mem_efficient_linear()  # else autograd would keep the gathered weights of all layers
        pairs = (self.settings.get("zero_optimization.zero_hpz_partition_size") or 1) > 1
        # One place for all whole parameters, in turn: only the pieces are read, and memory that is never
        # written to costs nothing on a CPU. (Taken and given back each time, it would leave holes that malloc
        # cannot use again, as large as the pieces together.)
        longest = max(p.numel() for p in self.model.parameters())
        dtypes = {p.dtype for p in self.model.parameters()}
        empty = partial(torch.empty, device=self.device)
        wholes = {dtype: empty(longest, dtype=dtype) for dtype in dtypes}
        pieces = {dtype: empty(-(-longest // self.world), dtype=dtype) for dtype in dtypes}
        for name, p in each("loading weights", list(self.model.named_parameters()), "tensors"):
            whole = nn.Parameter(wholes[p.dtype][: p.numel()].view(p.shape), requires_grad=p.requires_grad)
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, whole)
            start, stop = _piece(p.numel(), self.rank, self.world)
            piece = pieces[p.dtype][: stop - start]
            read_parameter(self.model, name, stored, piece, start)
            if pairs:  # DeepSpeed cuts its second, larger pieces from the whole
                read_parameter(self.model, name, stored, whole.data.view(-1))
            # not Init's own way, which has rank 0 send every parameter to all
            zero._convert_to_deepspeed_param(whole)
            whole.partition()
            whole.ds_tensor.data.view(-1)[: stop - start].copy_(piece)
        self.model.sharded = True

    def start(self) -> None:
        named = dict(self.model.named_parameters())
        fast = self.device.type == "cuda" or self.settings.offloads_optimizer
        groups = [
            {"params": [named[n] for n in names], "weight_decay": decay} for names, decay in self._groups
        ]
        self.optimizer = torch.optim.AdamW(
            groups, **adam_options(self.config), fused=fast or None, foreach=None if fast else True
        )
        # DeepSpeed makes the optimiser one over its flat tensors: what it holds is the state of the run.
        self.wrapped, self._zero, _, _ = self.deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=self.settings.for_deepspeed()
        )
        self._held = self._flattened() if self.stage < 3 else self._partitioned()
        if self.settings.held_dtype is not None:  # the float32 weights came from rounded ones
            for shard in self.shards():
                if shard.trains:
                    self._stored[shard.name].read_into(shard.value, shard.start)
        del self._stored

    def _flattened(self) -> dict[str, Held]:
        """ZeRO 1, 2: a process's piece is one run of the flat group and may begin and end within a
        parameter."""
        names = {p: name for name, p in self.model.named_parameters()}
        zero, found = self._zero, {}
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            begin = self.rank * len(flat)
            groups, offsets = zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i]
            for p, at in zip(groups, offsets, strict=True):
                a, b = max(at, begin), min(at + p.numel(), begin + len(flat))
                if a < b:
                    found[names[p]] = Held(flat, a - begin, a - at, b - a)
        return found

    def _partitioned(self) -> dict[str, Held]:
        """ZeRO 3: every parameter is cut into equal pieces, the last ones padded, and a process's pieces of a
        group lie in a row."""
        names = {p: name for name, p in self.model.named_parameters()}
        zero, found = self._zero, {}
        for p in (p for group in zero.fp16_groups for p in group):
            group, offset, _ = zero.grad_position[zero.get_param_id(p)]
            start, stop = _piece(p.ds_numel, self.rank, self.world)
            if start < stop:
                found[names[p]] = Held(zero.fp32_partitioned_groups_flat[group], offset, start, stop - start)
        return found

    # ---- the step

    def autocast(self) -> AbstractContextManager[None]:
        # DeepSpeed's own: it holds the weights in what it computes in, or casts by `torch_autocast`
        return contextlib.nullcontext()

    def forward(self, pack: Pack) -> Output:
        # DeepSpeed's own inherits that nothing is kept
        with torch.autocast(self.device.type, enabled=False, cache_enabled=False):
            return self.wrapped(pack)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        self.wrapped.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        # Gradients are averaged; the loss is a sum over processes.
        self.wrapped.backward(loss * (self.world * self.scale.scale), scale_wrt_gas=False)

    def gradients(self) -> dict[str, bool | None]:
        return {}  # its gradients lie in buffers of all parts

    def step(self, lr: float, norm: float) -> None:
        set_learning_rate(self.optimizer, lr)
        # DeepSpeed divides its float32 gradients by the loss scale: clipping goes the same way.
        zero, factor = self._zero, clipping(norm, self.config.max_grad_norm)
        zero.custom_loss_scaler, zero.external_loss_scale = True, self.scale.scale / factor
        self.wrapped.step()
        zero.custom_loss_scaler, zero.external_loss_scale = False, None
        self.discard()

    def discard(self) -> None:
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if self.settings.offloads_optimizer:
            zero.reset_cpu_buffers()
            for flat in self._flat():
                if flat.grad is not None:
                    flat.grad.zero_()
        if self.stage < 3:
            zero.micro_step_id = -1
            zero._release_preflattened_grad_buffers()
            for group in list(zero.averaged_gradients):
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        else:
            zero.averaged_gradients = {}

    def _flat(self) -> list[Tensor]:
        zero = self._zero
        return zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat

    def _gradients(self) -> list[Tensor]:
        if self.settings.offloads_optimizer:
            if self.stage < 3:
                self._zero._wait_for_offload_copies()
            return [held.of(held.flat.grad) for held in self._held.values() if held.flat.grad is not None]
        return [grad for group in self._zero.averaged_gradients.values() for grad in group or ()]

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """ZeRO 3 gathers all weights for as long, so that what is called inside need not be the same on all
        processes."""
        if self.stage < 3:
            yield
            return
        offload = self._zero.parameter_offload
        with self.deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(self.model)

    def tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, p in module.named_parameters():
            with self.deepspeed.zero.GatheredParameters([p]) if self.stage == 3 else contextlib.nullcontext():
                yield name, p.detach()

    # ---- state

    def shards(self) -> list[Shard]:
        named = list(self.model.named_parameters())
        owners = iter(share_out([p.numel() for _, p in named if not p.requires_grad], self.world))
        found = []
        for name, p in named:
            shape, held = getattr(p, "ds_shape", p.shape), self._held.get(name)
            if p.requires_grad and held is not None:
                start, value, owned = held.start, held.of(held.flat), True
            elif p.requires_grad:
                start, value, owned = 0, self._flat()[0].detach()[:0], False
            elif self.stage == 3:
                start, stop = _piece(p.ds_numel, self.rank, self.world)
                value, owned = p.ds_tensor.detach().view(-1)[: stop - start], start < stop
            else:
                start, value, owned = 0, p.detach().view(-1), next(owners) == self.rank
            found.append(Shard(name, shape, start if owned else 0, value, p.requires_grad, owned))
        return found

    def moments(self, shard: Shard) -> tuple[float, Tensor, Tensor] | None:
        held = self._held.get(shard.name)
        state = self.optimizer.state.get(held.flat) if held is not None else None
        if held is None or not state:
            return None
        return float(state["step"]), held.of(state[MOMENTS[0]]), held.of(state[MOMENTS[1]])

    def set_moments(self, shard: Shard, step: float, *moments: Tensor) -> None:
        held = self._held.get(shard.name)
        if held is None:
            return
        state = self.optimizer.state[held.flat]
        for name, moment in zip(MOMENTS, moments, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(held.flat, requires_grad=False)
            held.of(state[name]).copy_(moment)
        device = held.flat.device if self.optimizer.defaults["fused"] else "cpu"
        state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
        self._counts.setdefault(id(held.flat), set()).add(step)

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the weights that the model computes with up to date.

        Raises:
            UserError: parameters of one group were given different numbers of updates, of which DeepSpeed
                counts one for all.
        """
        counts, self._counts = self._counts, {}
        if any(len(steps) > 1 for steps in counts.values()):
            raise UserError(
                "The checkpoint's parameters had different numbers of updates"
                f" ({sorted(set.union(*counts.values()))}), for which DeepSpeed has no place. Fix: resume"
                " with --engine fsdp2 or ddp"
            )
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.invalidate_secondary_tensor()


def _piece(numel: int, rank: int, world: int) -> tuple[int, int]:
    """First and last + 1 of the elements that ZeRO 3 gives to a process."""
    size = -(-numel // world)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def _open_deepspeed(device: torch.device) -> Any:
    """The package, its processes known to it.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cpu":  # else it starts a program to count processors, many times a step
        os.environ.setdefault(
            "LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
        )
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of what was chosen on purpose
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"--engine deepspeed needs DeepSpeed ({error}). Fix: pip install"
            " 'deepspeed>=0.19,<0.20' (the extra deepspeed)"
        ) from error
    finally:
        logging.disable(silenced)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPUs it would compile an extension of its own for minutes, for a way of talking that training does
    # not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def _restore_linear() -> None:
    """ZeRO 3 puts a linear function of its own in the place of PyTorch's, for the whole process."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Inserted

    if hasattr(Inserted, "linear_bk"):
        nn.functional.linear = Inserted.linear_bk
