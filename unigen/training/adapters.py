"""What is done to a loaded model before it trains, from outside and in one order: time law, freezing, dtype of frozen parts, checkpointing."""

from __future__ import annotations

import torch
from torch import nn

from unigen.config import Config, ConfigError
from unigen.model.bagel import Bagel


def prepare_model(model: Bagel, config: Config) -> Bagel:
    """Applies the config to ``model`` in place, and returns it.

    Raises:
        ConfigError: nothing would be left to train.
    """
    if config.timestep_shift is not None:
        model.timestep_shift = config.timestep_shift
    freeze(model, config)
    if config.bf16:
        halve_frozen(model)
    model.use_gradient_checkpointing(config.gradient_checkpointing)
    return model


def freeze(model: Bagel, config: Config) -> None:
    """What does not learn: the parts the config freezes, and always the position tables and the codec.

    ``freeze_und`` also stops gradients through the understanding tokens, as the reference does.
    """
    for name, p in model.named_parameters():
        und = "_moe_gen" not in name and name.startswith(("language_model.", "vit_model.", "connector."))
        frozen = (
            name.endswith("pos_embed.pos_embed")
            or (config.freeze_llm and name.startswith("language_model."))
            or (config.freeze_vit and name.startswith("vit_model."))
            or (config.freeze_und and und)
        )
        p.requires_grad_(not frozen)
    model.language_model.model.freeze_und = config.freeze_und
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("freeze_llm, freeze_vit and freeze_und leave nothing to train; drop one of them")


def halve_frozen(model: Bagel) -> None:
    """Keeps the matrices that do not learn in bfloat16. Under bf16 autocast a linear layer casts its weights to bfloat16
    anyway, so this changes no number and halves their memory; saving writes their stored bytes all the same."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters()):
            module.to(torch.bfloat16)
