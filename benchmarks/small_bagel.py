"""A model of BAGEL's proportions that a CPU can run, with random weights, and what the benchmarks ask of it.

BAGEL-7B-MoT has hidden 3584, 28 layers, 28 query and 4 key-value heads of 128, MLP 18944 (5.29 x), and a ViT
of width 1152 (0.32 x), MLP 4304 (3.74 x), 26 layers, heads of 72. ``FULL`` keeps the proportions with hidden
512 and 8 layers. Of its 8 query heads of 64, four share a key-value head. Seven do in BAGEL, which does not
divide 8: four mean fewer copies of keys and values, which favours the plain version, and leave two groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unigen.model.bagel import Bagel
from unigen.model.codec import PixelCodec, VaeConfig
from unigen.model.config import BagelConfig
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import NAMES, SpecialIds, Tokenizer
from unigen.sequence.types import Block, Kind, Pack


@dataclass(frozen=True)
class Size:
    """The shape of a model, and the lengths of what it trains on and answers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    vit_hidden: int
    vit_heads: int
    vit_inner: int
    vit_layers: int  # that run
    side: int  # tokens along a side of every picture, for the ViT and for the latents
    caption: int  # tokens of the texts of a training sample, markers apart
    answer: int
    instruction: int
    question: int  # tokens of the prompt that is answered in text
    new_tokens: int
    prompt: int  # words of the prompt of a picture
    steps: int  # Euler steps


FULL = Size(
    hidden=512, layers=8, heads=8, kv_heads=2, inner=2688, vocabulary=8192,
    vit_hidden=160, vit_heads=4, vit_inner=576, vit_layers=7, side=16,
    caption=40, answer=80, instruction=20, question=200, new_tokens=64, prompt=40, steps=10,
)  # fmt: skip
SMALL = Size(
    hidden=64, layers=2, heads=4, kv_heads=2, inner=320, vocabulary=256,
    vit_hidden=32, vit_heads=2, vit_inner=96, vit_layers=2, side=4,
    caption=5, answer=9, instruction=3, question=12, new_tokens=6, prompt=7, steps=3,
)  # fmt: skip

LATENT_STRIDE, VIT_PATCH = 8, 14  # pixels
SPECIAL = SpecialIds(*range(len(NAMES)))


def model_config(size: Size) -> BagelConfig:
    """The shape of a model without a VAE."""
    from transformers import Qwen2Config, SiglipVisionConfig

    llm = Qwen2Config(
        hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, vocab_size=size.vocabulary,
        rms_norm_eps=1e-6, max_position_embeddings=32768, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    vit = SiglipVisionConfig(
        hidden_size=size.vit_hidden, intermediate_size=size.vit_inner, num_hidden_layers=size.vit_layers + 1,
        num_attention_heads=size.vit_heads, image_size=70 * VIT_PATCH, patch_size=VIT_PATCH,
        hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    # Pixels, unshuffled, are the latents: 64 numbers a token as FLUX's have, and no VAE in the measurement.
    scale = {"scale_factor": 1.0, "shift_factor": 0.0}
    vae = VaeConfig(type="pixel", downsample=LATENT_STRIDE // 2, z_channels=16, **scale)
    latent_side, vit_side = size.side * LATENT_STRIDE, size.side * VIT_PATCH
    seen = {"max_size": vit_side, "min_size": vit_side}
    return BagelConfig(
        llm, vit, vae, vae_transform={"max_size": latent_side, "min_size": latent_side},
        vit_transform=seen, vit_edit_transform=seen,
    )  # fmt: skip


def build_model(size: Size, seed: int = 0) -> Bagel:
    """A model with every weight random, so that no part is silent and the experts differ."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Bagel(model_config(size))
        model.initialise()
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape), alpha=0.02)
        model.llm2vae.weight.normal_(std=size.hidden**-0.5)
        model.language_model.lm_head.weight[SPECIAL.text_end] = 0.0  # never the likeliest: no text ends early
    object.__setattr__(model, "codec", PixelCodec(model.config.vae))
    return model.eval()


def training_samples(config: BagelConfig, size: Size, seed: int = 0) -> list[list[Block]]:
    """Twice a picture of a caption, an answer about a picture, and an edit of a picture."""
    g = torch.Generator().manual_seed(seed)
    n, p, c = size.side**2, config.latent_patch_size, config.vae.z_channels

    def text(length: int, loss: bool = False) -> Block:
        ids = torch.randint(len(NAMES), size.vocabulary, (length,), generator=g).tolist()
        return Block(Kind.TEXT, length, ids=ids, loss=loss)

    def seen() -> Block:
        patches = torch.randint(0, 256, (n, 3 * VIT_PATCH**2), dtype=torch.uint8, generator=g)
        return Block(Kind.VIT, n, 0, (size.side, size.side), patches=patches)

    def latent(kind: Kind, segment: int) -> Block:
        z = torch.randn(c, size.side * p, size.side * p, generator=g)
        return Block(kind, n, segment, (size.side, size.side), latent=z)

    def noised(segment: int) -> Block:
        block = latent(Kind.NOISED, segment)
        block.noise, block.loss = torch.randn(n, config.patch_dim, generator=g), True
        block.u = float(torch.randn((), generator=g))
        return block

    return [
        sample
        for _ in range(2)
        for sample in (
            [text(size.caption), noised(1)],
            [seen(), text(size.answer, loss=True)],
            [latent(Kind.CLEAN, 0), seen(), text(size.instruction), noised(2)],
        )
    ]


def training_pack(config: BagelConfig, size: Size, seed: int = 0) -> Pack:
    """The packed sequence of :func:`training_samples`: 2,872 tokens at full size, markers included."""
    return pack_blocks(training_samples(config, size, seed), SPECIAL, config.geometry)


class WordIds(Tokenizer):
    """A tokenizer whose words are ids: ``"17 4 230"`` is three tokens, and every id has a word."""

    def __init__(self) -> None:
        self.tokenizer, self.special = None, SPECIAL
        self._names = list(NAMES.values())

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self._names[i] if i < len(self._names) else str(i) for i in ids)

    def control_token(self, text: str) -> None:
        """No text has one: it is numbers."""


def words(size: Size, count: int, seed: int) -> str:
    """A text of ``count`` random words of :class:`WordIds`."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(NAMES), size.vocabulary, (count,), generator=g)
    return " ".join(str(i) for i in ids.tolist())


def noise(config: BagelConfig, size: Size, seed: int = 0) -> Tensor:
    """What a picture starts from: [side * side, patch_dim] standard normal."""
    return torch.randn(size.side**2, config.patch_dim, generator=torch.Generator().manual_seed(seed))


def picture(size: Size, seed: int = 0):
    """A picture of random pixels, as large as the model draws."""
    from PIL import Image

    side, g = size.side * LATENT_STRIDE, torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=g)
    return Image.fromarray(pixels.numpy())
