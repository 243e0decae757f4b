"""``unigen demo``: real handwritten digits, a tiny model from scratch, minutes on a CPU.

The ordinary trainer and the ordinary inferencer do the work; this file writes the data and the model, asks the questions and
counts the right answers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from unigen.digits import write_tokenizer
from unigen.model.bagel import Bagel
from unigen.model.codec import PixelCodec, VaeConfig
from unigen.model.config import BagelConfig
from unigen.model.weights import save_bagel


def create_model(folder: Path, seed: int = 0, *, width: int = 128, layers: int = 4, inner: int = 384, size: int = 8, stride: int = 4, patch: int = 4) -> None:
    """Writes a tiny BAGEL with random weights, in the published layout, for pictures of ``size`` x ``size``."""
    from transformers import Qwen2Config, SiglipVisionConfig

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    llm = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    vit = SiglipVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4, image_size=size, patch_size=patch,
    )  # fmt: skip
    cells = stride // 2
    vae = VaeConfig(type="pixel", downsample=cells, z_channels=3 * cells**2, scale_factor=1.3, shift_factor=-0.4)
    picture = {"max_size": size, "min_size": size}
    config = BagelConfig(
        llm, vit, vae, max_latent_size=size // stride, vit_max_num_patch_per_side=size // patch,
        vae_transform=picture, vit_transform=picture, vit_edit_transform=picture,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Bagel(config)
    model.initialise(std=0.05)
    object.__setattr__(model, "codec", PixelCodec(vae))
    save_bagel(model, folder)
