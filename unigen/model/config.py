"""What a checkpoint folder says of its model, and the constants that no file of the release holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unigen.config import ConfigError, DataOptions, TrainSource
from unigen.model.codec import VaeConfig, read_vae_config
from unigen.model.schemas import CONFIG, LLM, VIT, contradictions, misfits
from unigen.model.storage import checkpoint_json, config_json, need_folder, wrong
from unigen.sequence.pack import Geometry
from unigen.sequence.plan import Planner, Transforms
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.transform import ImageTransform


@dataclass
class BagelConfig:
    """The model's shape. ``llm`` and ``vit`` are the transformers configs of Qwen2 and SigLIP."""

    llm: Any
    vit: Any
    vae: VaeConfig
    latent_patch_size: int = 2
    max_latent_size: int = 64  # side of the latent position table, in tokens
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    timestep_shift: float = 1.0
    visual_gen: bool = True
    visual_und: bool = True
    # longest and shortest side in pixels: of latents; of ViT pictures; of ViT pictures in samples that draw
    vae_transform: dict[str, int] = field(default_factory=lambda: {"max_size": 1024, "min_size": 512})
    vit_transform: dict[str, int] = field(default_factory=lambda: {"max_size": 980, "min_size": 224})
    vit_edit_transform: dict[str, int] = field(default_factory=lambda: {"max_size": 518, "min_size": 224})

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token."""
        return self.vae.downsample * self.latent_patch_size

    @property
    def patch_dim(self) -> int:
        """Numbers per latent token."""
        return self.vae.z_channels * self.latent_patch_size**2

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            latent_stride=self.latent_stride,
            latent_patch=self.latent_patch_size,
            patch_dim=self.patch_dim,
            max_latent_size=self.max_latent_size,
            vit_patch=self.vit.patch_size,
            vit_side=self.vit_max_num_patch_per_side,
            interpolate=self.interpolate_pos,
            posterior=self.vae.type != "pixel",
        )

    def transforms(self, max_image_tokens: int | None = None, **vae: int) -> Transforms:
        """How pictures are resized for this model; no picture outgrows its position tables. ``vae``: another
        max_size, min_size."""
        stride, patch = self.latent_stride, self.vit.patch_size
        limit, vit_limit = self.max_latent_size * stride, self.vit_max_num_patch_per_side * patch
        vae = {**self.vae_transform, **vae}
        return Transforms(
            vae=ImageTransform(**vae, stride=stride, limit=limit, max_tokens=max_image_tokens),
            vit=ImageTransform(**self.vit_transform, stride=patch, limit=vit_limit),
            vit_edit=ImageTransform(**self.vit_edit_transform, stride=patch, limit=vit_limit),
        )

    def planner(
        self, tokenizer: Tokenizer, options: DataOptions, source: TrainSource | None = None
    ) -> Planner:
        """What turns samples into blocks for this model; a source's own picture sizes win over those of the
        model and the options."""
        asked = {"max_size": source.max_image_size, "min_size": source.min_image_size} if source else {}
        self._check_sizes(source, asked)
        longest = self.llm.max_position_embeddings
        if (options.max_sequence_length or 0) > longest:
            raise ConfigError(
                f"max_sequence_length is {options.max_sequence_length}, and this model's positions end at"
                f" {longest} (max_position_embeddings in llm_config.json). Fix: --max_sequence_length"
                f" {longest}, or leave it out"
            )
        tokens = (source.max_image_tokens if source else None) or options.max_image_tokens
        sizes = {name: size for name, size in asked.items() if size is not None}
        return Planner(tokenizer, self.geometry, self.transforms(tokens, **sizes), options, longest)

    def _check_sizes(self, source: TrainSource | None, asked: dict[str, int | None]) -> None:
        """Raises ConfigError where a size that a source asks for would become another one."""
        stride, limit = self.latent_stride, self.max_latent_size * self.latent_stride
        for name, size in asked.items():
            becomes = min(max(size or stride, stride), limit) // stride * stride
            if source is not None and size not in (None, becomes):
                key = name.replace("_size", "_image_size")
                raise ConfigError(
                    f"train_sources: {key} of {source.name} is {size} and would become {becomes}: this model"
                    f" takes multiples of {stride} up to {limit} pixels. Fix: {key}: {becomes}"
                )

    def to_dict(self) -> dict[str, Any]:
        """``config.json``: what serving engines expect, and every constant."""
        return {
            "architectures": ["BagelForConditionalGeneration"],
            "model_type": "bagel",
            **{name: getattr(self, name) for name in CONSTANTS},
            "llm_config": self.llm.to_diff_dict(),
            "vit_config": self.vit.to_diff_dict(),
            "vae_config": self.vae.to_dict(),
        }


CONSTANTS = (
    "latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side", "connector_act", "interpolate_pos",
    "timestep_shift", "vae_transform", "vit_transform", "vit_edit_transform",
)  # fmt: skip


def read_config(folder: Path, shapes: dict[str, tuple[int, ...]], **overrides: Any) -> BagelConfig:
    """The config of a checkpoint folder.

    ``overrides`` win over ``config.json``; where neither knows the side of a position table, the ``shapes``
    of the stored tensors do.

    Raises:
        CheckpointFolderError: a file is missing or breaks its schema, values exclude each other, or do not
            fit the ``shapes``; with file and key.
    """
    from transformers import Qwen2Config, SiglipVisionConfig

    need_folder(folder)
    said = checkpoint_json(folder / "llm_config.json", LLM)
    if "rope_theta" not in said and "rope_theta" not in (said.get("rope_parameters") or {}):
        raise wrong(folder, "llm_config.json: rope_theta is missing")
    llm = Qwen2Config.from_dict(LLM.known(said))
    vit = SiglipVisionConfig.from_dict(VIT.known(checkpoint_json(folder / "vit_config.json", VIT)))
    stored = config_json(folder, CONFIG)
    constants = {name: stored[name] for name in CONSTANTS if stored.get(name) is not None}
    constants.setdefault("vit_max_num_patch_per_side", min(vit.image_size // vit.patch_size, 1024))
    table = shapes.get("latent_pos_embed.pos_embed")
    if table:
        constants.setdefault("max_latent_size", min(max(math.isqrt(table[0]), 1), 1024))
    constants.update({name: value for name, value in overrides.items() if value is not None})
    for problem in contradictions(llm, vit, constants):
        raise wrong(folder, ": ".join(problem))
    config = BagelConfig(llm, vit, read_vae_config(folder), **constants)
    if found := misfits(config, shapes):
        raise wrong(folder, "; ".join(found), "take weights and config files of one and the same checkpoint")
    return config


def small_config(
    vocabulary: int,
    side: int,
    *,
    width: int = 128,
    layers: int = 4,
    inner: int = 384,
    stride: int = 4,
    patch: int = 4,
    colour: bool = False,
) -> BagelConfig:
    """A tiny model for pictures of up to ``side`` x ``side`` pixels, to train from scratch in minutes. In
    place of a VAE it has the codec of pixels, which is exact and learns nothing.

    Args:
        vocabulary: tokens of the text.
        side: pixels of a picture's side; ``stride`` (pixels per latent token) and ``patch`` (of the ViT)
            divide it.
        width: hidden size of decoder and ViT; layers, inner: layers and MLP width of the decoder.
        colour: pictures in colour; without it light ink on black in gray.
    """
    from transformers import Qwen2Config, SiglipVisionConfig

    assert side % stride == 0 and side % patch == 0 and stride % 2 == 0
    llm = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096 if colour else 1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    vit = SiglipVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4,
        image_size=side, patch_size=patch,
    )  # fmt: skip
    cells = stride // 2
    # Scale and shift bring pixels to about mean 0 and variance 1, as the flow's noise has.
    scale, shift, channels = (2.0, 0.0, 3 * cells**2) if colour else (1.3, -0.4, cells**2)
    vae = VaeConfig("pixel", z_channels=channels, downsample=cells, scale_factor=scale, shift_factor=shift)
    picture = {"max_size": side, "min_size": side}
    return BagelConfig(
        llm, vit, vae, max_latent_size=side // stride, vit_max_num_patch_per_side=side // patch,
        vae_transform=picture, vit_transform=picture, vit_edit_transform=picture,
    )  # fmt: skip
