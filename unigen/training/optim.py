"""AdamW, its groups, its learning rate, its moments, clipping, and the scale of float16 losses."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import RATED, Config, ConfigError
from unigen.model.parts import is_embedding, rated_part
from unigen.topics import OPTIMIZERS, SCHEDULES

MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- the optimiser


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The trainable parameters in groups: matrices decay; biases, norms and embeddings do not; parts may have
    rates of their own.

    Returns:
        Groups for a PyTorch optimiser, ``params`` as (name, parameter) pairs, so that it remembers
        ``param_names``; ``rate``: what the learning rate is multiplied with.

    Raises:
        ConfigError: nothing is trainable.
    """
    # a tied parameter has several names, and one of them may be the embedding's
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    if not names:
        raise ConfigError(
            "no parameter is trainable; unfreeze a part of the model (--freeze_llm, --freeze_vit,"
            " --freeze_und)"
        )
    groups: dict[tuple[bool, float, float], list[tuple[str, nn.Parameter]]] = {}
    for parameter, known_as in names.items():
        part = rated_part(known_as[0])
        decay = getattr(config, f"weight_decay_{part}")
        still = parameter.ndim < 2 or any(map(is_embedding, known_as))
        decay = 0.0 if still else config.weight_decay if decay is None else decay
        groups.setdefault((still, decay, rate_of(config, part)), []).append((known_as[0], parameter))
    return [
        {"params": params, "weight_decay": decay, "rate": rate}
        for (_, decay, rate), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def rate_of(config: Config, part: str) -> float:
    """What the learning rate is multiplied with for a part (a word of RATED)."""
    own = getattr(config, f"learning_rate_{part}")
    return 1.0 if own is None else own / config.learning_rate


def rates(config: Config, lr: float) -> dict[str, float]:
    """The learning rates of the parts that have their own, for the log: ``learning_rate_gen`` -> rate, where
    ``lr`` is that of the others."""
    own = [part for part in RATED if getattr(config, f"learning_rate_{part}") is not None]
    return {f"learning_rate_{part}": lr * rate_of(config, part) for part in own}


def build_optimizer(
    model: nn.Module, held: Mapping[str, nn.Parameter], config: Config
) -> torch.optim.Optimizer:
    """The optimiser, a row of OPTIMIZERS, over what this process holds of the trainable parameters: ``held``,
    name -> plain tensor. ``model`` decides the groups by names and shapes."""
    groups = parameter_groups(model, config)
    for group in groups:
        group["params"] = [(name, held[name]) for name, _ in group["params"]]
    module, _, function = OPTIMIZERS[config.optimizer].partition(":")
    made = getattr(importlib.import_module(module), function)(groups, config)
    if config.optimizer != "adamw8bit" and not isinstance(made, torch.optim.AdamW):
        raise ConfigError(
            f"optimizer {config.optimizer} makes a {type(made).__name__}, and checkpoints hold the state of"
            " AdamW. Fix: a subclass of torch.optim.AdamW (docs/extending.md)"
        )
    return made


def build_adamw(groups: list[dict[str, Any]], config: Config) -> torch.optim.AdamW:
    """AdamW, in one fused kernel where all of it lives on CUDA; with bfloat16 weights the one that rounds
    stochastically."""
    if config.weights == "bf16":
        from unigen.training.rounding import RoundedAdamW

        made = RoundedAdamW(groups, **adam_options(config))
        made.seed = config.seed
        return made
    fused = all(parameter.is_cuda for group in groups for _, parameter in group["params"])
    return torch.optim.AdamW(
        groups, **adam_options(config), fused=fused or None, foreach=None if fused else True
    )


def adam_options(config: Config) -> dict[str, Any]:
    """What every kind of AdamW is given of the options."""
    betas = (config.adam_beta1, config.adam_beta2)
    return {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}


def moments_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> tuple[float, Tensor, Tensor] | None:
    """Updates so far and the two moments, flat float32 [n]: the live ones, with 8 bits copies in host memory.
    None before an update."""
    if not isinstance(optimizer, torch.optim.AdamW):
        from unigen.training import adam8bit

        return adam8bit.moments(optimizer, parameter)
    state = optimizer.state.get(parameter)
    return (float(state["step"]), *(state[moment].view(-1) for moment in MOMENTS)) if state else None


def set_moments_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: float, *moments: Tensor
) -> None:
    """Puts back what :func:`moments_of` gave, bit for bit. Learning rate and decay stay those of the
    optimiser."""
    if not isinstance(optimizer, torch.optim.AdamW):
        from unigen.training import adam8bit

        return adam8bit.set_moments(optimizer, parameter, step, *moments)
    optimizer.state.pop(parameter, None)
    if step == 0:
        return None
    fused = bool(optimizer.defaults["fused"])  # a fused step counts on the device, the others on the host
    state: dict[str, Tensor] = {
        "step": torch.tensor(step, dtype=torch.float32, device=parameter.device if fused else "cpu")
    }
    for name, moment in zip(MOMENTS, moments, strict=True):
        dtype = getattr(optimizer, "moment_dtype", parameter.dtype)
        state[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        state[name].copy_(moment.view(parameter.shape))
    optimizer.state[parameter] = state
    return None


# ---- the learning rate


def learning_rate_at(step: int, total_steps: int, config: Config) -> float:
    """The learning rate of optimiser step ``step`` (from 0), a pure function of its arguments.

    The warm-up rises linearly and reaches the peak on its last step; step 0 already learns. The decay would
    reach its end at ``step == total_steps``, so the last step still learns too.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is a hair above 7
    if step < warmup:
        return config.learning_rate * ((step + 1) / warmup)  # in this order the peak is exact
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    share = SCHEDULES[config.lr_scheduler_type](progress)
    if not 0 <= share < math.inf:  # of a plugin
        raise ConfigError(
            f"lr_scheduler_type {config.lr_scheduler_type} gives {share} at {progress:.4f} of the steps. Fix:"
            " its row must give a share of the peak, from 0 on"
        )
    return config.learning_rate * share


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, times its own ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)


# ---- gradients


@torch.no_grad()
def squared_norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all gradients, 0-d float64 on the device of the first; no value travels to the
    host."""
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    norms = [n for same in _by_kind(grads) for n in torch._foreach_norm(same, 2, dtype=torch.float32)]
    return torch.stack([n.to(grads[0].device, torch.float64) for n in norms]).square().sum()


@torch.no_grad()
def scale_gradients(grads: Sequence[Tensor], factor: float) -> None:
    if factor != 1:
        for same in _by_kind(grads):
            torch._foreach_mul_(same, factor)


def _by_kind(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    return list(kinds.values())


def clipping(norm: float, max_norm: float) -> float:
    """What a gradient of this norm is multiplied by, so that its norm is at most ``max_norm`` (0: no
    limit)."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


class LossScale:
    """The scale of float16 losses (Micikevicius et al. 2018, sec. 3.2): halved at an overflow, doubled after
    ``INTERVAL`` good steps."""

    INTERVAL = 2000

    def __init__(self, enabled: bool):
        self.scale, self.good = (2.0**16 if enabled else 1.0), 0
        self.enabled = enabled

    def update(self, overflow: bool) -> None:
        if not self.enabled:
            return
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.scale /= 2
        elif self.good == self.INTERVAL:
            self.scale, self.good = self.scale * 2, 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good": self.good}

    def load(self, state: dict[str, float]) -> None:
        if self.enabled:
            self.scale, self.good = state["scale"], int(state["good"])
