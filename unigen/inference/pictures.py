"""How a prompt's pictures become blocks: as in training, by the planner; or as the reference shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unigen.config import Config, TrainSource
from unigen.model.config import BagelConfig
from unigen.model.run_options import run_options
from unigen.sequence.contents import Viewer
from unigen.sequence.grid import patchify
from unigen.sequence.images import image_size, open_image
from unigen.sequence.plan import Planner
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import Block, Image, Kind, Sample


def run_transform(
    config: BagelConfig, sources: Sequence[TrainSource], max_image_tokens: int
) -> ImageTransform:
    """How a run resizes pictures for the VAE; where its sources differ, by the widest of their limits."""

    def widest(of: Callable[..., int], name: str, default: int) -> int:
        return of((getattr(source, name) or default for source in sources), default=default)

    return config.transforms(
        widest(max, "max_image_tokens", max_image_tokens),
        max_size=widest(max, "max_image_size", config.vae_transform["max_size"]),
        min_size=widest(min, "min_image_size", config.vae_transform["min_size"]),
    ).vae


def trained_transform(config: BagelConfig, folder: Path | None) -> ImageTransform:
    """How the run that wrote the checkpoint ``folder`` resized pictures for the VAE; without one, the default
    options.

    Raises:
        RunOptionsError: the run's options cannot be read.
    """
    run = run_options(folder) or Config()
    return run_transform(config, run.sources(), run.max_image_tokens)


def within(transform: ImageTransform, own: ImageTransform) -> ImageTransform:
    """``transform`` kept within the model's position table."""
    return replace(transform, limit=min(transform.limit or own.limit, own.limit))


def blocks_as_trained(planner: Planner, sample: Sample, number: int, draws: bool) -> list[Block]:
    """The blocks of picture ``number`` of a conversation, as training shows a context picture of such a
    sample.

    One that the model drew (``target``) keeps the grid it was drawn with, as the clean copy of a target does.

    Raises:
        PictureError: the picture cannot be read or decoded.
    """
    picture = sample[number]
    assert isinstance(picture, Image)
    return planner.context_blocks(picture.source, _viewer(planner, sample, number, draws))


def tokens_as_trained(planner: Planner, sample: Sample, draws: bool) -> int:
    """Tokens of a conversation in which the model draws or not; of pictures only headers are read.

    Raises:
        PictureError: a picture cannot be read.
    """
    return sum(
        planner.context_length(image_size(piece.source), _viewer(planner, sample, number, draws))
        if isinstance(piece, Image)
        else 2 + len(planner.tokenizer.encode(piece.text))
        for number, piece in enumerate(sample)
    )


def drawn_tokens(planner: Planner, shape: tuple[int, int], seen: bool) -> int:
    """Tokens of a picture of this height and width that the model draws; ``seen``: as what follows sees
    it."""
    height, width = shape
    if seen:
        return planner.context_length((width, height), unresized(planner.viewer_of(True, 1), width, height))
    stride = planner.geometry.latent_stride
    return 2 + (height // stride) * (width // stride)


def _viewer(planner: Planner, sample: Sample, number: int, draws: bool) -> Viewer:
    """How picture ``number`` of a conversation is shown."""
    viewer = planner.viewer_of(draws, sum(isinstance(piece, Image) for piece in sample))
    picture = sample[number]
    assert isinstance(picture, Image)
    return unresized(viewer, *picture.source.size) if picture.target else viewer


def unresized(viewer: Viewer, width: int, height: int) -> Viewer:
    """``viewer`` with a VAE that sees pictures of this size as they are."""
    assert viewer.vae is not None, "a context in which the model drew shows pictures to the VAE"
    sizes = {"max_size": max(width, height), "min_size": min(width, height), "max_pixels": width * height}
    return replace(viewer, vae=replace(viewer.vae, **sizes, max_tokens=None))


def blocks_as_reference(
    config: BagelConfig, vae: ImageTransform, vit: ImageTransform, picture: Any, draws: bool
) -> list[Block]:
    """The blocks of a picture as the reference shows it: resized for the VAE; both encoders see the
    result."""
    resized = vae.resize(open_image(picture))
    blocks = []
    if draws:
        pixels = vae(resized)
        grid = (pixels.shape[1] // config.latent_stride, pixels.shape[2] // config.latent_stride)
        blocks.append(Block(Kind.CLEAN, grid[0] * grid[1], 0, grid, pixels=pixels))
    if config.visual_und:
        pixels, patch = vit(resized), config.vit.patch_size
        grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
        blocks.append(Block(Kind.VIT, grid[0] * grid[1], 0, grid, patches=patchify(pixels, patch)))
    return blocks
