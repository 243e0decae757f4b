"""AdamW, its groups, its learning rate, its state by parameter name, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import Config, ConfigError
from unigen.training.checkpoint import CheckpointError

_EMBEDDINGS = ("embed_tokens", "position_embedding", "pos_embed")
_MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- the optimiser


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices decay; biases, norms and embeddings do not.

    Returns:
        Groups for a PyTorch optimiser, ``params`` as (name, parameter) pairs, so that it remembers ``param_names``.

    Raises:
        ConfigError: nothing is trainable.
    """
    names: dict[nn.Parameter, list[str]] = {}  # a tied parameter has several names, and one of them may be the embedding's
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    if not names:
        raise ConfigError("no parameter is trainable; unfreeze a part of the model (--freeze_llm, --freeze_vit, --freeze_und)")
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter, known_as in names.items():
        embedding = any(word in name for name in known_as for word in _EMBEDDINGS)
        decays = parameter.ndim >= 2 and not embedding
        groups[0 if decays else 1]["params"].append((known_as[0], parameter))
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of ``model``, in one fused kernel where they all live on CUDA."""
    groups = parameter_groups(model, config.weight_decay)
    fused = all(parameter.is_cuda for group in groups for _, parameter in group["params"])
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=fused or None,
        foreach=None if fused else True,
    )


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: ``exp_avg.<name>``, ``exp_avg_sq.<name>`` (the parameter's shape and dtype)
    and ``step.<name>`` (0-d float32).

    A parameter that has never had a gradient has no moments; ``step.<name>`` is 0 and stands for it alone, so that every
    trainable parameter is named and one that went missing is noticed. The tensors are the live ones, not copies.
    """
    result = {}
    for name, parameter in _optimised(optimizer, model).items():
        state = optimizer.state.get(parameter)
        result[f"step.{name}"] = state["step"] if state else torch.zeros(())
        if state:
            result |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
    return result


def load_optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts back what :func:`optimizer_tensors` gave, bit for bit. Learning rate and decay stay those of the optimiser.

    Raises:
        CheckpointError: a name is missing or unexpected, or a shape or dtype differs; nothing has been changed then.
    """
    parameters = _optimised(optimizer, model)
    expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for name, parameter in parameters.items():
        expected[f"step.{name}"] = (torch.Size(), torch.float32)
        step = tensors.get(f"step.{name}")
        if step is None or step.numel() != 1 or step.item() != 0:
            expected |= {f"{moment}.{name}": (parameter.shape, parameter.dtype) for moment in _MOMENTS}
    check_tensors(tensors, expected, "the optimiser's state")

    for name, parameter in parameters.items():
        optimizer.state.pop(parameter, None)
        step = tensors[f"step.{name}"]
        if step.item() == 0:
            continue
        # A fused step counts on the device, the others on the host.
        step = torch.empty((), device=parameter.device if optimizer.defaults["fused"] else "cpu").copy_(step)
        moments = {moment: torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"{moment}.{name}"]) for moment in _MOMENTS}
        optimizer.state[parameter] = {"step": step, **moments}


def _optimised(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for the parameters the optimiser holds."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter in held}
    assert len(named) == len(held), "the optimiser holds parameters of another model"
    return named


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[torch.Size, torch.dtype]], what: str) -> None:
    """Compares names, shapes and dtypes.

    Raises:
        CheckpointError: they differ; says which and how, ``what`` naming the whole.
    """
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        shape, dtype = expected[name]
        found = tensors[name]
        if (found.shape, found.dtype) != (shape, dtype):
            problems.append(f"{name} is {found.dtype} {list(found.shape)} instead of {dtype} {list(shape)}")
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(
            f"{what} in the checkpoint does not fit this run: {shown}. "
            "Cure: resume with the options of the run that saved it (freezing, precision, ema), or start from its weights (--model_path)"
        )


# ---- the learning rate


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
"""Share of the peak learning rate at ``progress`` in [0, 1] between the end of the warm-up and the end of training."""


def learning_rate_at(step: int, total_steps: int, config: Config) -> float:
    """The learning rate of optimiser step ``step`` (from 0), a pure function of its arguments.

    The warm-up rises linearly and reaches the peak on its last step; step 0 already learns. The decay would reach its end at
    ``step == total_steps``, so the last step still learns too.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is a hair above 7
    if step < warmup:
        return config.learning_rate * ((step + 1) / warmup)  # in this order the peak is exact
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return config.learning_rate * SCHEDULES[config.lr_scheduler_type](progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- clipping


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients together so that their total 2-norm is at most ``max_norm`` (0: only measures).

    Parameters without a gradient are left out. Where the norm is not finite the gradients stay as they are, for the caller
    to skip the step. No value travels to the host.

    Returns:
        The total norm before clipping, 0-d float32, on the device of the first gradient.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    norms = [torch._foreach_norm(same, 2, dtype=torch.float32) for same in by_kind.values()]
    total = torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for group in norms for n in group]))
    if max_norm > 0:
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        scale = torch.where(torch.isfinite(total), scale, torch.ones_like(scale))
        for (device, _), same in by_kind.items():
            torch._foreach_mul_(same, scale.to(device))
    return total
