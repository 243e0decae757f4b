"""Which part of the model a parameter belongs to, by its name in the published checkpoint.

Freezing, dtypes, optimiser groups, loading and summaries ask here.
"""

from __future__ import annotations

import torch

from unigen.config import ModelOptions

GEN = "_moe_gen"
"""In the names of the generation expert's parameters; without it they are the understanding expert's."""

DRAWING = ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")
SEEING = ("vit_model.", "connector.", "vit_pos_embed.")
EMBEDDINGS = ("embed_tokens", "position_embedding", "pos_embed")


def is_generation_expert(name: str) -> bool:
    return GEN in name


def is_table(name: str) -> bool:
    """A fixed position table, which is computed and never learns."""
    return name.endswith("pos_embed.pos_embed")


def is_embedding(name: str) -> bool:
    """A table that is looked up: of tokens or of positions."""
    return any(part in name for part in EMBEDDINGS)


def is_linear(name: str) -> bool:
    """The weight or bias of a linear layer: no norm, no embedding."""
    return "norm" not in name and not is_embedding(name)


def writes_into_residual(name: str) -> bool:
    """The last product of attention or of an MLP, in the decoder or the ViT."""
    return any(part in name for part in ("o_proj", "down_proj", "out_proj", "mlp.fc2"))


def is_left_out(name: str, visual_gen: bool, visual_und: bool) -> bool:
    """Is it of a part that a model without drawing (``visual_gen``) or without its ViT (``visual_und``) has
    not?"""
    drawing = is_generation_expert(name) or name.startswith(DRAWING)
    return (drawing and not visual_gen) or (name.startswith(SEEING) and not visual_und)


def is_frozen(name: str, options: ModelOptions) -> bool:
    """Do the options keep this parameter as it is?"""
    understanding = not is_generation_expert(name) and name.startswith(
        ("language_model.", "vit_model.", "connector.")
    )
    return (
        is_table(name)
        or (options.freeze_llm and name.startswith("language_model."))
        or (options.freeze_vit and name.startswith("vit_model."))
        or (options.freeze_und and understanding)
    )


def dtype_of(name: str, options: ModelOptions, computes: torch.dtype) -> torch.dtype:
    """The dtype a parameter is held in: float32, and bfloat16 for matrices that do not learn where the run
    ``computes`` in it.

    Under bf16 autocast a linear layer casts its weights to bfloat16 anyway, so this changes no number and
    halves their memory; saving writes their stored bytes all the same.
    """
    return (
        torch.bfloat16
        if computes == torch.bfloat16 and is_frozen(name, options) and is_linear(name)
        else torch.float32
    )


def title(name: str) -> str:
    """The part's name in summaries."""
    return "generation expert" if is_generation_expert(name) else name.split(".")[0]
