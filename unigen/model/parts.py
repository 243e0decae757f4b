"""Which part of the model a parameter belongs to, by its name in the published checkpoint.

Freezing, dtypes, optimiser groups, loading and summaries ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from unigen.config import ModelOptions

if TYPE_CHECKING:
    import torch

GEN = "_moe_gen"
"""In the names of the generation expert's parameters; without it they are the understanding expert's."""

DRAWING = ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")
SEEING = ("vit_model.", "connector.", "vit_pos_embed.")
WORDS = "language_model.model.embed_tokens.weight"
EMBEDDINGS = ("embed_tokens", "position_embedding", "pos_embed")

ADAPTER_MARKS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""In the names of an adapter's parameters, which peft gives."""

Patterns = Mapping[str, tuple[str, ...]]
_LAYERS = "language_model.model.layers.*"
_GEN = (f"{_LAYERS}.self_attn.[qkvo]_proj_moe_gen", f"{_LAYERS}.mlp_moe_gen.*")
_UND = (f"{_LAYERS}.self_attn.[qkvo]_proj", f"{_LAYERS}.mlp.*")

ADAPTED: Patterns = {
    "gen": _GEN, "und": _UND, "both": _GEN + _UND, "connector": ("connector.fc[12]",),
    "vit": ("vit_model.*_proj", "vit_model.*.mlp.fc[12]"),
}  # fmt: skip
"""What ``lora_targets`` may name -> patterns of the names of linear modules."""

TRAINED_WHOLE: Patterns = {
    "time_embedder": ("time_embedder.*",), "llm2vae": ("llm2vae.*",), "vae2llm": ("vae2llm.*",),
    "connector": ("connector.*",), "norms": ("language_model.*norm*",),
}  # fmt: skip
"""What ``train_also`` may name -> patterns of the names of parameters."""


def matches(name: str, word: str, known: Patterns) -> bool:
    """Does a word of an option mean this module or parameter? It is a key of ``known``, or a pattern such as
    ``*.q_proj_moe_gen`` of the name or of its end."""
    return any(fnmatchcase(name, pattern) for pattern in known.get(word, (word, f"*.{word}")))


def is_adapter(name: str) -> bool:
    return any(f".{mark}." in name for mark in ADAPTER_MARKS)


def published_name(name: str) -> str:
    """The name that a parameter has in the published checkpoint: peft moves a matrix with an adapter one
    level down."""
    return name.replace(".base_layer.", ".")


def trains_whole(name: str, words: Iterable[str] | None) -> bool:
    """Is it trained whole beside an adapter, as ``train_also`` says?"""
    name = published_name(name)
    return not is_table(name) and any(matches(name, word, TRAINED_WHOLE) for word in words or ())


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
    if options.lora_rank is not None:
        return not is_adapter(name) and not trains_whole(name, options.train_also)
    seeing = name.startswith(("language_model.", "vit_model.", "connector."))
    understanding = seeing and not is_generation_expert(name)
    return (
        is_table(name)
        or (options.freeze_llm and name.startswith("language_model."))
        or (options.freeze_vit and name.startswith("vit_model."))
        or (options.freeze_und and understanding)
    )


def rated_part(name: str) -> str:
    """The part (a word of RATED) whose learning rate and weight decay a parameter has; an adapter has those
    of its matrix."""
    if is_generation_expert(name) or name.startswith(DRAWING):
        return "gen"
    if name.startswith("vit_model."):
        return "vit"
    return "connector" if name.startswith(SEEING) else "und"


def is_low(name: str) -> bool:
    """Is it held in bfloat16 where trained weights are? Matrices of the decoder, of the ViT's layers and of
    the connector are; not what reads pictures, times and latents, nor norms and embeddings, all of them
    small or rarely met."""
    return is_linear(name) and not name.startswith(DRAWING) and "patch_embedding" not in name


def dtype_of(
    name: str, options: ModelOptions, computes: torch.dtype, stored: torch.dtype | None = None
) -> torch.dtype:
    """The dtype a parameter is held in: float32, and bfloat16 for matrices that do not learn where the run
    ``computes`` in it, or that do where ``weights`` says so.

    Under bf16 autocast a linear layer casts its weights to bfloat16 anyway, so this changes no number and
    halves their memory; saving writes their stored bytes all the same. Nor does it change one of the
    embedding of texts where that is ``stored`` so (None: as published, it is).
    """
    import torch

    if is_frozen(name, options):
        exact = name == WORDS and stored in (None, torch.bfloat16)
        low = computes == torch.bfloat16 and (is_linear(name) or exact)
    else:
        low = options.weights == "bf16" and is_low(name)
    return torch.bfloat16 if low else torch.float32


def title(name: str) -> str:
    """The part's name in summaries."""
    if is_adapter(name):
        return f"adapter of {title(name.partition('.lora_')[0])}"
    return "generation expert" if is_generation_expert(name) else name.split(".")[0]
