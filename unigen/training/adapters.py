"""What is done to a model for training, from outside and in one order: dtypes at loading, time law, freezing, checkpointing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from unigen.config import Config, ConfigError
from unigen.model.bagel import Bagel
from unigen.model.compiling import CompiledLayers

log = logging.getLogger("unigen")

# Parameters that are not the weight or bias of a linear layer.
_NOT_LINEAR = ("norm", "embed_tokens", "position_embedding", "pos_embed")


def is_frozen(name: str, config: Config) -> bool:
    """Does the config keep this parameter as it is? The position tables never learn."""
    und = "_moe_gen" not in name and name.startswith(("language_model.", "vit_model.", "connector."))
    return (
        name.endswith("pos_embed.pos_embed")
        or (config.freeze_llm and name.startswith("language_model."))
        or (config.freeze_vit and name.startswith("vit_model."))
        or (config.freeze_und and und)
    )


def dtype_of(name: str, config: Config, computes: torch.dtype) -> torch.dtype:
    """The dtype a parameter is held in: float32, and bfloat16 for matrices that do not learn where the run ``computes`` in it.

    Under bf16 autocast a linear layer casts its weights to bfloat16 anyway, so this changes no number and halves their
    memory; saving writes their stored bytes all the same.
    """
    halved = computes == torch.bfloat16 and is_frozen(name, config) and not any(part in name for part in _NOT_LINEAR)
    return torch.bfloat16 if halved else torch.float32


def compiles(config: Config, device: str, engine: str) -> tuple[bool, str]:
    """Are the layers of a run compiled, and why so? ``device`` is cuda or cpu."""
    if config.compile != "auto":
        return config.compile == "on", "asked for"
    if device != "cuda":
        return False, "auto: steps on a CPU gain less than compiling costs"
    if config.recomputes_selectively:
        return False, "auto: checkpointing_policy is selective"
    if engine == "deepspeed":
        return False, "auto: the engine is deepspeed"
    return True, "auto: the device is a GPU"


def compile_layers(model: Bagel, config: Config, device: str, engine: str) -> CompiledLayers | None:
    """Compiles the layers of a prepared model where the config says so, and logs it."""
    on, why = compiles(config, device, engine)
    log.info("Layers: %s (%s)", "compiled, in the dry batch" if on else "not compiled", why)
    return CompiledLayers(model, strict=config.compile == "on") if on else None


def tell_compiling(options: Mapping[str, Any], compiled: bool) -> None:
    """Says where a resumed run goes on with layers compiled unlike those of its checkpoint, whose options are ``options``."""
    before = options.get("compile", "off") == "on"
    if before != compiled:
        log.warning(
            "This run's layers were %s and are %s now: its numbers can differ in the last digits from here on. Fix: --compile %s",
            *("compiled" if so else "not compiled" for so in (before, compiled)), "on" if before else "off",
        )  # fmt: skip


def prepare_model(model: Bagel, config: Config) -> Bagel:
    """Applies the config to ``model`` in place, and returns it.

    ``freeze_und`` also stops gradients through the understanding tokens, as the reference does.

    Raises:
        ConfigError: nothing would be left to train.
    """
    if config.timestep_shift is not None:
        model.config.timestep_shift = config.timestep_shift  # saved with the model
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(name, config))
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("freeze_llm, freeze_vit and freeze_und leave nothing to train; drop one of them")
    model.language_model.model.freeze_und = config.freeze_und
    model.use_gradient_checkpointing(config.gradient_checkpointing, config.checkpointing_policy)
    return model
