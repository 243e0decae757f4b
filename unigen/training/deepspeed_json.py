"""An ordinary DeepSpeed JSON, brought to agree with the options of the run.

What the file says is kept. What it leaves open ("auto", or nothing) comes from the options, or else from
DeepSpeed's own defaults. Where file and options say different things, or the file asks for what this trainer
does not do, the error names file and key.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

from unigen.config import Config, UserError, nearest
from unigen.foreign import RepeatedName, once
from unigen.messages import listed
from unigen.training.optim import LossScale

_KNOWN = (
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "csv_monitor",
    "data_types", "dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state",
    "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "log_level",
    "managed_gradient_accumulation", "memory_breakdown", "optimizer", "prescale_gradients",
    "sparse_gradients", "steps_per_print",
    "tensorboard", "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip

# Key -> why it cannot be had, and the fix. `{"enabled": false}`, false and null ask for nothing.
_REFUSED = {
    "amp": "apex is not used; use --bf16",
    "autotuning": "tune without it",
    "compile": "models are not compiled",
    "compression_training": "weights are trained as they are",
    "curriculum_learning": "the order of the data is that of the run (--seed)",
    "data_efficiency": "the order of the data is that of the run (--seed)",
    "data_parallel_size": "all processes are data-parallel",
    "elasticity": "a run resumes on any number of processes without it",
    "expert_parallel": "the model has no experts to spread",
    "hybrid_engine": "it is for reinforcement learning",
    "pipeline": "the model is not cut into a pipeline",
    "scheduler": "the learning rate follows --lr_scheduler_type and --warmup_steps",
    "sequence_parallel_size": "rows are not cut over processes",
    "tensor_parallel": "layers are not cut over processes",
    "weight_quantization": "weights are trained as they are",
    "zero_force_ds_cpu_optimizer": "it compiles DeepSpeedCPUAdam; offloaded steps use PyTorch's fused AdamW",
    "zero_optimization.elastic_checkpoint": "checkpoints are not DeepSpeed's",
    "zero_optimization.round_robin_gradients": "it has no use without DeepSpeedCPUAdam",
    "zero_optimization.zenflow": "the optimiser is plain AdamW",
    "zero_optimization.zero_quantized_nontrainable_weights": "frozen weights keep their values",
    "zero_optimization.offload_optimizer.super_offload": "the optimiser is plain AdamW",
    "bf16.bf16_master_weights_and_grads": "weights are updated and averaged in float32",
    "bf16.bf16_optimizer_states": "moments are float32",
    "fp16.fp16_master_weights_and_grads": "weights are updated and averaged in float32",
}


# Key -> what alone it may say, and why.
_ALONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "zero_optimization.offload_optimizer.device": (("cpu", "none"), "checkpoints cannot read it"),
    "zero_optimization.offload_param.device": (("cpu", "none"), "checkpoints cannot read it"),
    "zero_optimization.offload_optimizer.ratio": ((1,), "it needs DeepSpeedCPUAdam, which is not used"),
    "managed_gradient_accumulation": ((True,), "the trainer says which micro-batch is the last"),
    "gradient_allreduce_op": (("mean",), "losses are sums over all targets"),
    "optimizer.params.adam_w_mode": ((True,), "the decay is decoupled"),
}


class DeepSpeedSettings:
    """The content of a DeepSpeed JSON and where it came from; keys are dotted paths."""

    def __init__(self, file: str | None):
        """Reads ``file``; without one, ZeRO 2 and DeepSpeed's defaults.

        Raises:
            UserError: the file cannot be read, is no JSON object, or has a key twice or one that nobody
                knows.
        """
        self.file = file or "the built-in DeepSpeed settings"
        self.values: dict[str, Any] = _read(Path(file)) if file else {"zero_optimization": {"stage": 2}}
        for key in self.values:
            if key not in _KNOWN and key not in _REFUSED:
                meant = nearest(key, [*_KNOWN])
                fix = f"did you mean {meant}?" if meant else "leave it out"
                self.fail(key, "is not a key of DeepSpeed's that is known here", fix)

    def fail(self, key: str, problem: str, fix: str) -> None:
        """Raises the error about ``key``."""
        raise UserError(f"{self.file}: {key} {problem}. Fix: {fix} (--deepspeed_config ...)")

    def get(self, key: str) -> Any:
        """The value; None where it is missing or "auto"."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, dict):
                fix = "see DeepSpeed's documentation of this file"
                self.fail(key.rpartition(".")[0], "is no object", fix)
            value = value.get(part)
            if value is None or value == "auto":
                return None
        return value

    def put(self, key: str, value: Any) -> None:
        *path, last = key.split(".")
        place = self.values
        for part in path:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value

    def agree(self, key: str, wanted: Any, option: str) -> None:
        """Fills what is open; what is said has to be ``wanted``, the value of ``option``."""
        said = self.get(key)
        if said is None:
            self.put(key, wanted)
        elif said != wanted or isinstance(said, bool) != isinstance(wanted, bool):
            problem = f"is {json.dumps(said)}, but {option} says {json.dumps(wanted)}"
            self.fail(key, problem, 'write "auto", or the same in both')

    @property
    def stage(self) -> int:
        return self.values["zero_optimization"]["stage"]

    @property
    def held_dtype(self) -> torch.dtype | None:
        """What DeepSpeed turns the working copies of all weights into; None leaves them as they are."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return next((dtype for kind, dtype in low.items() if self.get(f"{kind}.enabled")), None)

    @property
    def offloads_optimizer(self) -> bool:
        return self.get("zero_optimization.offload_optimizer.device") == "cpu"

    def for_deepspeed(self) -> dict[str, Any]:
        """A copy for DeepSpeed, which changes what it is given."""
        return copy.deepcopy(self.values)


def read_settings(config: Config, world: int, device: torch.device, precision: str) -> DeepSpeedSettings:
    """The DeepSpeed settings of a run that computes in ``precision`` (bf16, fp16 or fp32).

    Raises:
        UserError: they cannot work, or contradict the options; names file and key.
    """
    settings = DeepSpeedSettings(config.deepspeed_config)
    for key, reason in _REFUSED.items():
        value = settings.get(key)
        on = value.get("enabled", True) is not False if isinstance(value, dict) else bool(value)
        if on and not (key.endswith("_size") and value == 1):
            settings.fail(key, f"cannot be used here: {reason}", "leave the key out")
    stage = settings.get("zero_optimization.stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        fix = "1, 2 or 3; without ZeRO use --engine ddp"
        settings.fail("zero_optimization.stage", f"is {json.dumps(stage)}", fix)
    for key, (fine, why) in _ALONE.items():
        if (value := settings.get(key)) is not None and value not in fine:
            settings.fail(key, f"is {json.dumps(value)}: {why}", listed(map(json.dumps, fine), "or"))
    _check_batch(settings, config, world)
    _check_optimizer(settings, config)
    _check_precision(settings, precision, device)
    _fill(settings)
    settings.values = _without_auto(settings.values)
    for key in [key for key in settings.values if key in _REFUSED and key not in _KNOWN]:
        del settings.values[key]
    return settings


def loss_scale(settings: DeepSpeedSettings) -> LossScale:
    """The scale of float16 losses, begun and kept as ``fp16`` says. DeepSpeed's own is 1: one place decides
    about skipped steps."""
    scale = LossScale(settings.get("fp16.enabled"))
    if scale.enabled:
        said = settings.values["fp16"]
        fixed, power = said.pop("loss_scale", 0), said.get("initial_scale_power", 16)
        scale.INTERVAL = said.get("loss_scale_window", scale.INTERVAL)  # type: ignore[misc]
        scale.scale, scale.enabled = float(fixed or 2.0**power), not fixed
        settings.put("fp16.loss_scale", 1.0)
    return scale


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"), object_pairs_hook=once)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}). Fix: give a DeepSpeed JSON (--deepspeed_config ...)"
        ) from error
    except RepeatedName as error:
        raise UserError(
            f"{file}: {error.name} is there twice. Fix: keep one (--deepspeed_config ...)"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}:{error.lineno}: no JSON: {error.msg} in column {error.colno} (--deepspeed_config ...)"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: a DeepSpeed JSON is an object, {{...}} (--deepspeed_config ...)")
    return values


def _check_batch(settings: DeepSpeedSettings, config: Config, world: int) -> None:
    settings.agree("train_micro_batch_size_per_gpu", config.batch_size, "--batch_size")
    settings.agree(
        "gradient_accumulation_steps", config.gradient_accumulation_steps, "--gradient_accumulation_steps"
    )
    total = config.batch_size * config.gradient_accumulation_steps * world
    settings.agree(
        "train_batch_size", total, f"--batch_size {config.batch_size} x --gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps} x {world} process(es)",
    )  # fmt: skip
    # DeepSpeed takes one micro-batch for one sample. It is told of two or more of them, since which is the
    # last is said to it.
    steps = max(2, config.gradient_accumulation_steps)
    settings.values |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": steps,
        "train_batch_size": steps * world,
    }


def _check_optimizer(settings: DeepSpeedSettings, config: Config) -> None:
    name = settings.get("optimizer.type")
    if name is not None and str(name).lower() != "adamw":
        settings.fail("optimizer.type", f"is {json.dumps(name)}", '"AdamW", or leave "optimizer" out')
    wanted: dict[str, tuple[Any, str]] = {
        "lr": (config.learning_rate, "--learning_rate"),
        "betas": ([config.adam_beta1, config.adam_beta2], "--adam_beta1, --adam_beta2"),
        "eps": (config.adam_epsilon, "--adam_epsilon"),
        "weight_decay": (config.weight_decay, "--weight_decay"),
    }
    extra = set(settings.get("optimizer.params") or {}) - {*wanted, "torch_adam", "adam_w_mode"}
    for key in sorted(extra):
        settings.fail(f"optimizer.params.{key}", "is not an option of AdamW here", "leave it out")
    for key, (value, option) in wanted.items():
        settings.agree(f"optimizer.params.{key}", value, option)
    del settings.values["optimizer"]  # PyTorch's AdamW is handed over, with its groups
    settings.agree("gradient_clipping", config.max_grad_norm, "--max_grad_norm")
    settings.values["gradient_clipping"] = 0.0  # the trainer's: it decides by the norm whether to step at all


def _check_precision(settings: DeepSpeedSettings, precision: str, device: torch.device) -> None:
    if settings.get("torch_autocast.enabled"):
        said = str(settings.get("torch_autocast.dtype") or precision).removeprefix("torch.")
        said = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}.get(said, said)
        if said != precision or precision != "bf16":
            problem = f"computes in {said}, but the run in {precision}"
            settings.fail("torch_autocast", problem, "use it with bfloat16 and --precision bf16")
        if settings.get("bf16.enabled"):
            settings.fail("torch_autocast.enabled", "and bf16.enabled exclude each other", "keep one")
        settings.put("torch_autocast.dtype", "bfloat16")
        settings.put("bf16.enabled", False)
    else:
        settings.agree("bf16.enabled", precision == "bf16", f"the precision, {precision} (--precision),")
    settings.agree("fp16.enabled", precision == "fp16", f"the precision, {precision} (--precision),")
    if precision == "fp16" and device.type == "cpu":
        problem = "is true, which DeepSpeed cannot do on a CPU"
        settings.fail("fp16.enabled", problem, "--precision bf16 or fp32")
    low, accumulated = settings.held_dtype is not None, settings.get("data_types.grad_accum_dtype")
    if low and settings.stage == 1 and accumulated == "fp32":
        problem = 'is "fp32", which ZeRO 1 does by another optimiser'
        settings.fail("data_types.grad_accum_dtype", problem, "ZeRO 2, or leave it out")
    if low and settings.stage > 1 and accumulated is None:
        settings.put("data_types.grad_accum_dtype", "fp32")  # as the other engines do


def _fill(settings: DeepSpeedSettings) -> None:
    if settings.get("steps_per_print") is None:
        settings.put("steps_per_print", sys.maxsize)  # the trainer prints
    settings.put("zero_force_ds_cpu_optimizer", False)
    norm = "zero_optimization.compute_grad_norm"
    if settings.stage < 3 and not settings.offloads_optimizer and settings.get(norm) is None:
        settings.put(norm, False)  # known before the step


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is still "auto": DeepSpeed's own default."""
    said = {key: value for key, value in values.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in said.items()}
