"""Pixels <-> latents: the FLUX VAE, and a parameter-free pixel codec for tiny
models.

A codec has ``downsample`` (pixels per latent cell), ``channels``, ``encode(pixels, noise)`` and
``decode(latents)``. Latents are normalised: ``scale * (z - shift)``.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigen.model.schemas import VAE
from unigen.model.storage import checkpoint_json, wrong
from unigen.model.vae import GROUPS, PixelDecoder, PixelEncoder
from unigen.sequence.grid import to_unit


@dataclass(frozen=True)
class VaeConfig:
    """``vae_config.json``; the defaults are FLUX's, which the release does not write down."""

    type: str = "flux"  # or "pixel": space to depth, no weights
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    downsample: int = 8
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VaeConfig:
        known = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
        if "ch_mult" in known:
            known["ch_mult"] = tuple(known["ch_mult"])
        config = cls(**known)
        if config.type not in CODECS:
            raise ValueError(f"vae_config.json: type is {config.type!r}; known types are {', '.join(CODECS)}")
        return config

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ch_mult": list(self.ch_mult)}

    def normalise(self, z: Tensor) -> Tensor:
        """What the model sees of VAE latents of any shape."""
        return self.scale_factor * (z - self.shift_factor)

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents / self.scale_factor + self.shift_factor

    def latent(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """The normalised latent that ``noise`` draws from a posterior; all of one shape."""
        return self.normalise(mean + std * noise.to(mean.dtype))


class Codec(nn.Module):
    """What both codecs share: normalisation, and that nothing here learns."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.downsample, self.channels = config.downsample, config.z_channels

    @classmethod
    def check(cls, config: VaeConfig) -> None:
        """Raises ValueError where no codec of this type can have such a config; names the key."""
        raise NotImplementedError(cls.__name__)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """``pixels`` [B, 3, H, W], uint8 or float in [-1, 1] -> normalised latents [B, C, H / f, W / f]; the
        posterior's mean, or its draw with ``noise`` of the latents' shape."""
        raise NotImplementedError(type(self).__name__)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] -> pixels [B, 3, h * f, w * f], about in [-1, 1]."""
        raise NotImplementedError(type(self).__name__)


class PixelCodec(Codec):
    """Space to depth: exact, without parameters. ``z_channels`` is 3 x downsample² for colour, or downsample²
    for gray pictures, whose three equal channels are kept once."""

    def __init__(self, config: VaeConfig):
        super().__init__(config)
        self.check(config)
        self.gray = config.z_channels == config.downsample**2

    @classmethod
    def check(cls, config: VaeConfig) -> None:
        gray, colour = config.downsample**2, 3 * config.downsample**2
        if config.z_channels not in (gray, colour):
            raise ValueError(
                f"vae_config.json: z_channels is {config.z_channels}; a pixel codec with downsample"
                f" {config.downsample} has {colour} (colour) or {gray} (gray)"
            )

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        pixels = to_unit(pixels)
        if self.gray:
            pixels = pixels.mean(dim=1, keepdim=True)
        return self.config.normalise(F.pixel_unshuffle(pixels, self.downsample))

    def decode(self, latents: Tensor) -> Tensor:
        pixels = F.pixel_shuffle(self.config.denormalise(latents), self.downsample)
        return pixels.expand(-1, 3, -1, -1) if self.gray else pixels


class FluxCodec(Codec):
    """The FLUX VAE of any width, from ``ae.safetensors`` in Black Forest Labs' key layout."""

    def __init__(self, config: VaeConfig):
        super().__init__(config)
        self.check(config)
        widths = [config.ch * factor for factor in config.ch_mult]
        self.encoder = PixelEncoder(config.ch, widths, config.num_res_blocks, config.z_channels)
        self.decoder = PixelDecoder(widths, config.num_res_blocks, config.z_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @classmethod
    def check(cls, config: VaeConfig) -> None:
        levels = len(config.ch_mult)
        if config.downsample != 2 ** (levels - 1):
            raise ValueError(
                f"vae_config.json: downsample is {config.downsample}; {levels} levels of ch_mult give"
                f" {2 ** (levels - 1)}"
            )
        if config.ch % GROUPS:
            problem = f"vae_config.json: ch is {config.ch}, not a multiple of {GROUPS}, its norms' groups"
            raise ValueError(problem)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the tensors of ``ae.safetensors``.

        Raises:
            ValueError: keys are missing, unexpected or misshapen; all are listed.
        """
        try:
            self.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            problem = f"ae.safetensors does not hold the VAE that vae_config.json describes: {error}"
            raise ValueError(problem) from error

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, C, h, w] of the latents of ``pixels`` [B, 3, H, W] before
        normalisation."""
        mean, logvar = self.encoder(to_unit(pixels).to(self.dtype)).chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(-30.0, 20.0)).exp()

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, std = self.posterior(pixels)
        return self.config.normalise(mean) if noise is None else self.config.latent(mean, std, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.config.denormalise(latents.to(self.dtype)))


CODECS = {"flux": FluxCodec, "pixel": PixelCodec}


@torch.no_grad()
def encode_all(codec: Codec, pixels: list[Tensor], noise: list[Tensor] | None = None) -> list[Tensor]:
    """Encodes pictures [3, H, W] of any sizes, those of one size together; a list of [C, h, w] in the given
    order."""
    latents: list[Tensor | None] = [None] * len(pixels)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(pixels):
        by_size.setdefault(tuple(p.shape), []).append(i)
    for size, members in by_size.items():
        # At most a megapixel at once: the VAE's activations, not its weights, fill the memory, and more
        # pictures are no faster.
        step = max(1, 2**20 // (size[1] * size[2]))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            drawn = torch.stack([noise[i] for i in part]) if noise else None
            found = codec.encode(torch.stack([pixels[i] for i in part]), drawn)
            for i, latent in zip(part, found, strict=True):
                latents[i] = latent
    return latents  # type: ignore[return-value]


def read_vae_config(folder: Path) -> VaeConfig:
    """``vae_config.json`` of a checkpoint folder, FLUX's where there is none."""
    path = folder / "vae_config.json"
    if not os.path.lexists(path):
        return VaeConfig()
    values = checkpoint_json(path, VAE)
    try:
        config = VaeConfig.from_dict(values)
        CODECS[config.type].check(config)
        return config
    except ValueError as error:
        raise wrong(folder, str(error)) from None
