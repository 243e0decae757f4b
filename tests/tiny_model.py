"""A model small enough for hundreds of forwards, and random samples for it."""

import random

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from unigen.model.bagel import Bagel, StateReader
from unigen.model.codec import PixelCodec, VaeConfig
from unigen.model.config import BagelConfig
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Block, Kind, Pack
from unigen.training.prepare import hold_understanding
from unigen.training.recompute import recompute_layers

SPECIAL = SpecialIds(35, 36, 37, 38, 39)


def config(**overrides) -> BagelConfig:
    llm = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    vit = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=2,
        hidden_act="gelu_pytorch_tanh",
    )
    vae = VaeConfig(type="pixel", downsample=2, z_channels=12, scale_factor=2.0, shift_factor=0.25)
    return BagelConfig(
        llm,
        vit,
        vae,
        **{"max_latent_size": 8, "vit_max_num_patch_per_side": 8, "timestep_shift": 2.0, **overrides},
    )


def build(seed: int = 0, **overrides) -> Bagel:
    """Every weight random, so that no part is silent and the experts differ."""
    model = Bagel(config(**overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.initialise()
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(
                    torch.randn(p.shape, generator=generator) * 0.15
                    + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
                )
    object.__setattr__(model, "codec", PixelCodec(model.config.vae))
    return model.eval()


def text(r: random.Random, length: int | None = None, loss: bool = False, **options) -> Block:
    n = r.randint(0, 6) if length is None else length
    return Block(Kind.TEXT, n, ids=[r.randrange(35) for _ in range(n)], loss=loss, **options)


def image(
    r: random.Random, kind: Kind, piece: int = 0, grid: tuple[int, int] | None = None, **options
) -> Block:
    grid = grid or (r.randint(1, 3), r.randint(1, 3))
    n, g = grid[0] * grid[1], torch.Generator().manual_seed(r.randrange(2**31))
    content = (
        {"patches": torch.randn(n, 12, generator=g)}
        if kind == Kind.VIT
        else {"latent": torch.randn(12, grid[0] * 2, grid[1] * 2, generator=g)}
    )
    if kind == Kind.NOISED:
        content |= {
            "noise": torch.randn(n, 48, generator=g),
            "u": float(torch.randn((), generator=g)),
            "loss": True,
        }
    return Block(kind, n, piece, grid, **content, **options)


def sample(r: random.Random, blocks: int | None = None, kinds=tuple(Kind)) -> list[Block]:
    made = []
    for piece in range(blocks or r.randint(1, 5)):
        kind = r.choice(kinds)
        closing = r.choice([None, None, SPECIAL.end])
        made.append(
            text(r, loss=r.random() < 0.6, closing_label=closing)
            if kind == Kind.TEXT
            else image(r, kind, piece, closing_label=closing)
        )
    return made


def row(samples: list[list[Block]], model: Bagel, positions: list[int] | None = None) -> Pack:
    return pack_blocks(samples, SPECIAL, model.config.geometry, positions)


def states(model: Bagel, pack: Pack) -> torch.Tensor:
    """Hidden states [T, D] of all tokens in stored order, by the training forward."""
    return model(pack, reader=StateReader.of_all(pack)).read


def in_order(pack: Pack, values: torch.Tensor) -> torch.Tensor:
    return values[pack.index.argsort()]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return a.shape == b.shape and bool(
        torch.allclose(
            a, b, atol=tolerance * max(1.0, float(b.detach().abs().max()) if b.numel() else 1.0), rtol=0
        )
    )


def wrap(model: Bagel, policy: str = "none", held: bool = False) -> None:
    """Layers recomputed by ``policy`` ("none": not at all), and with ``held`` no gradients for understanding;
    earlier wrappers are taken off."""
    decoder = model.language_model.model
    vit = model.vit_model.vision_model.encoder.layers if model.config.visual_und else []
    for part in (decoder, *decoder.layers, *vit):
        for name in ("forward", "before", "after", "normed"):
            part.__dict__.pop(name, None)
    if policy != "none":
        recompute_layers(model, policy)
    if held:
        hold_understanding(model)
