"""Blocks -> one packed row. Training packs many samples; inference packs what is new and continues its caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unigen.sequence.grid import grid_positions
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Block, Kind, Pack

NO_LABEL = -100


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that a sequence depends on."""

    latent_stride: int  # pixels per latent token
    latent_patch: int  # latent cells per token, along a side
    patch_dim: int  # numbers per latent token
    max_latent_size: int  # side of the latent position table
    vit_patch: int  # pixels per ViT patch
    vit_side: int  # side of the ViT position table
    interpolate: bool = False  # position ids of pictures spread over the table
    posterior: bool = True  # latents are drawn from a posterior (a pixel codec has none)


class _Half:
    """Columns of one half of the row, block by block."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("ids", "position", "index", "kind", "sample", "span", "image", "noised", "label")
        }

    def add(self, **values: np.ndarray) -> None:
        for name, value in values.items():
            self.columns[name].append(value)


def pack_blocks(
    samples: Sequence[Sequence[Block]],
    special: SpecialIds,
    geometry: Geometry,
    positions: Sequence[int] | None = None,
    origins: Sequence[str] = (),
) -> Pack:
    """Packs filled-in blocks of several samples into one row.

    Args:
        samples: the blocks of each sample.
        special: ids of the tokens that open and close blocks.
        geometry: the model's sizes.
        positions: RoPE position at which each sample goes on (0 where nothing is given).
        origins: where each sample came from, for messages.
    """
    und, gen = _Half(), _Half()
    content = _Content(geometry)
    index = span = 0
    for s, blocks in enumerate(samples):
        position = positions[s] if positions else 0
        pictures: dict[int, tuple[bool, int]] = {}
        for block in blocks:
            if not block.dropped:
                _add_block(block, und, gen, special, position=position, index=index, sample=s, span=span)
                content.add(block, pictures)
                index += len(block)
                span += 1
            position = next_position(position, block)
    return _finish(und, gen, content, len(samples), list(origins))


def next_position(position: int, block: Block) -> int:
    """The RoPE position after ``block``: text takes one a token, an image one in all, a noised image none."""
    if block.kind == Kind.TEXT:
        return position + len(block)
    return position if block.kind == Kind.NOISED else position + 1


def _add_block(block: Block, und: _Half, gen: _Half, special: SpecialIds, *, position: int, index: int, sample: int, span: int) -> None:
    """Adds a block's tokens: all of a text or ViT image, and a VAE image's markers, to ``und``; its latents to ``gen``."""
    n = block.length
    text, noised = block.kind == Kind.TEXT, block.kind == Kind.NOISED
    label = np.full(n + 2, NO_LABEL, np.int64)
    ids = np.zeros(n + 2, np.int64)
    kind = np.full(n + 2, block.kind, np.uint8)
    if text:
        assert block.ids is not None and len(block.ids) == n
        ids[0], ids[1:-1], ids[-1] = special.text_start, block.ids, special.text_end
        if block.loss:
            label[:n] = block.ids
            label[n] = block.cut_label if block.cut else special.text_end
    else:
        ids[0], ids[-1] = special.image_start, special.image_end
        kind[0] = kind[-1] = Kind.TEXT
    if block.closing_label is not None:
        label[-1] = block.closing_label
    columns = {
        "ids": ids,
        "position": np.arange(position, position + n + 2) if text else np.full(n + 2, position),
        "index": np.arange(index, index + n + 2),
        "kind": kind,
        "sample": np.full(n + 2, sample),
        "span": np.full(n + 2, span),
        "image": np.full(n + 2, not text),
        "noised": np.full(n + 2, noised),
        "label": label,
    }
    if block.kind in (Kind.CLEAN, Kind.NOISED):
        und.add(**{name: value[[0, -1]] for name, value in columns.items()})
        gen.add(**{name: value[1:-1] for name, value in columns.items()})
    else:
        und.add(**columns)


class _Content:
    """What the tokens of images show."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.patches: list[Tensor] = []
        self.features: list[Tensor] = []
        self.ready: list[bool] = []
        self.vit_lengths: list[int] = []
        self.vit_position: list[Tensor] = []
        self.pixels: list[Tensor] = []
        self.posterior: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.block: list[tuple[bool, int]] = []  # has it pixels, and the number among its like
        self.grid: list[tuple[int, int]] = []
        self.vae_position: list[Tensor] = []
        self.u: list[Tensor] = []
        self.noise: list[Tensor] = []

    def add(self, block: Block, pictures: dict[int, tuple[bool, int]]) -> None:
        """``pictures`` maps the pieces of this sample to the pictures they became."""
        if block.kind == Kind.TEXT:
            return
        assert block.grid is not None and block.grid[0] * block.grid[1] == block.length
        g = self.geometry
        if block.kind == Kind.VIT:
            self._add_vit(block)
            self.vit_position.append(grid_positions(*block.grid, g.vit_side, g.interpolate))
            return
        if block.latent is not None or block.pixels is not None:
            if block.piece < 0 or block.piece not in pictures:
                pictures[block.piece] = self._add_picture(block)
            self.block.append(pictures[block.piece])
        self.grid.append(block.grid)
        self.vae_position.append(grid_positions(*block.grid, g.max_latent_size, g.interpolate))
        self.u.append(torch.full((block.length,), block.u))
        self.noise.append(block.noise if block.noise is not None else torch.zeros(block.length, g.patch_dim))

    def _add_vit(self, block: Block) -> None:
        shown = block.patches if block.features is None else block.features
        assert shown is not None and len(shown) == block.length
        (self.patches if block.features is None else self.features).append(shown)
        self.ready.append(block.features is not None)
        self.vit_lengths.append(block.length)

    def _add_picture(self, block: Block) -> tuple[bool, int]:
        if block.latent is not None:
            self.latents.append(block.latent)
            return False, len(self.latents) - 1
        assert block.pixels is not None
        self.pixels.append(block.pixels)
        if block.posterior is not None:
            self.posterior.append(block.posterior)
        return True, len(self.pixels) - 1


def _finish(und: _Half, gen: _Half, content: _Content, n_samples: int, origins: list[str]) -> Pack:
    assert len(content.posterior) in (0, len(content.pixels)), "all pictures of a row are drawn from their posteriors, or none"
    columns = {name: und.columns[name] + gen.columns[name] for name in und.columns}
    tensors = {
        name: torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64) for name, parts in columns.items()
    }
    # A row without blocks has the same types as any other.
    tensors["kind"] = tensors["kind"].to(torch.uint8)
    for name in ("image", "noised"):
        tensors[name] = tensors[name].bool()
    g = content.geometry

    def join(parts: list[Tensor], *empty: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat(parts) if parts else torch.zeros(*empty, dtype=dtype)

    return Pack(
        **tensors,
        n_und=sum(len(part) for part in und.columns["ids"]),
        n_samples=n_samples,
        vit_patches=join(content.patches, 0, g.vit_patch**2 * 3),
        vit_position=join(content.vit_position, 0, dtype=torch.int64),
        vit_lengths=content.vit_lengths,
        vae_pixels=content.pixels,
        vae_noise=content.posterior,
        latents=content.latents,
        vae_block=[number + len(content.latents) * pixels for pixels, number in content.block],
        vae_grid=content.grid,
        vae_position=join(content.vae_position, 0, dtype=torch.int64),
        u=join(content.u, 0),
        noise=join(content.noise, 0, g.patch_dim),
        origins=origins,
        vit_features=content.features,
        vit_ready=content.ready if content.features else [],
    )
