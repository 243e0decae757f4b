"""What is done to a model for training, from outside and in one order: dtypes at loading, time law, freezing, checkpointing."""

from __future__ import annotations

import torch

from unigen.config import Config, ConfigError
from unigen.model.bagel import Bagel

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
