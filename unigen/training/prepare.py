"""What is done to a model for training, from outside and in one order: time law, freezing, checkpointing,
compiling."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from unigen.config import Config, ConfigError
from unigen.model.bagel import Bagel
from unigen.model.compiling import CompiledLayers
from unigen.model.parts import is_frozen

log = logging.getLogger("unigen")


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
    log.info("Layers: %s (%s)", "compiled, in the warm-up batch" if on else "not compiled", why)
    return CompiledLayers(model, strict=config.compile == "on") if on else None


def tell_compiling(options: Mapping[str, Any], compiled: bool) -> None:
    """Says where a resumed run goes on with layers compiled unlike those of its checkpoint, whose options are
    ``options``."""
    before = options.get("compile", "off") == "on"
    if before != compiled:
        log.warning(
            "This run's layers were %s and are %s now: its numbers can differ in the last digits from here "
            "on. Fix: --compile %s",
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
