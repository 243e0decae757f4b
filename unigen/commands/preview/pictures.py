"""Pictures of the preview's page: what an image block shows under the grid of its tokens, and the mask."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unigen.commands.preview.view import BlockView, PictureView, SampleView, mask
from unigen.model import flow
from unigen.sequence.images import to_image
from unigen.sequence.types import Kind
from unigen.show.pages import data_uri

# up to so many image blocks in a sample: side of their tiles in pixels
TILES = ((6, 320), (12, 224), (40, 128))
SMALLEST = 72
COLOURS = {
    Kind.TEXT: (0x3F, 0x83, 0xC8),
    Kind.VIT: (0x2F, 0x9E, 0x6E),
    Kind.CLEAN: (0x8A, 0x63, 0xD2),
    Kind.NOISED: (0xD9, 0x82, 0x2B),
}
TOKENS = 400  # up to this length each token is a pixel of the mask
BLOCKS = 96  # that the mask shows at most
LABELLED = 24  # up to so many blocks the mask names them
SIDE = 480  # of the mask of a longer sample, in pixels
WIDTH = 560  # in the page, at most
HATCHED = 120  # opacity, of 255


class Tile(NamedTuple):
    """A picture, and the grid to draw over it."""

    src: str
    width: int  # in the page
    rows: int
    columns: int
    opacity: float  # of the grid
    small: bool  # shown larger than it is


def tile_side(blocks: Sequence[BlockView]) -> int:
    """Side of a sample's tiles in pixels: smaller where there are many, so that pages stay small."""
    n = sum(shown.picture is not None for shown in blocks)
    return next((side for most, side in TILES if n <= most), SMALLEST)


def tile(shown: BlockView, side: int) -> Tile:
    """The picture of a block, at most ``side`` pixels wide and high."""
    assert shown.picture is not None and shown.block.grid is not None
    rows, columns = shown.block.grid
    image = to_image(shown.picture.pixels)
    image.thumbnail((side, side))
    if shown.picture.time is not None:
        image = to_image(noised(image, shown.picture, (rows, columns)))
    width = max(24, round(side * min(1.0, image.width / image.height)))
    faint = min(0.6, max(0.25, width / columns / 16))  # a fine grid must not hide the picture
    src = encoded(image, "png") if max(image.size) <= 64 else encoded(image, "jpeg", quality=82)
    return Tile(src, width, rows, columns, round(faint, 2), image.width < width)


def encoded(image: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), **options)
    return data_uri(buffer.getvalue(), kind)


def noised(image: Any, picture: PictureView, grid: tuple[int, int]) -> Tensor:
    """[3, H, W] float32: a small picture mixed with noise at the block's time, one value a latent cell, to
    show how much is left of it."""
    assert picture.time is not None
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    noise = torch.randn(1, 3, 2 * grid[0], 2 * grid[1], generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.interpolate(noise, x.shape[1:])[0]
    t = torch.full((x[0].numel(),), picture.time)
    return flow.mix(x.flatten(1).T, noise.flatten(1).T, t).T.reshape(x.shape).clamp(-1, 1)


class MaskPicture(NamedTuple):
    """The mask: a row of pixels for each token that looks, a column for each that is seen."""

    image: Any  # PIL, RGBA; opaque where a token is seen, in the colour of its kind
    sizes: list[int]  # pixels of each block
    blocks: list[BlockView]
    by_token: bool  # every token is one pixel; else some of each block's tokens speak for all

    @property
    def side(self) -> int:
        return sum(self.sizes)

    @property
    def width(self) -> int:
        """In the page: whole points for a pixel."""
        return self.side * max(1, WIDTH // self.side)

    @property
    def axis(self) -> list[tuple[int, int, int]]:
        """Start and size of each block, and its size in the page."""
        starts = accumulate(self.sizes, initial=0)
        return [(start, size, size * self.width // self.side) for start, size in zip(starts, self.sizes)]


def mask_picture(view: SampleView) -> MaskPicture:
    """The mask of the sample in the order of its sequence: token by token where it is short, else by tokens
    picked from each block."""
    blocks = view.kept[:BLOCKS]
    lengths = [shown.stop - shown.start for shown in blocks]
    by_token = sum(lengths) == len(view.pack) <= TOKENS
    sizes = lengths if by_token else _sizes(lengths)
    places = torch.cat(
        [
            torch.linspace(shown.start, shown.stop - 1, size).round().long()
            for shown, size in zip(blocks, sizes)
        ]
    )
    seen = mask(view.pack, places)
    kinds = torch.tensor([shown.kind for shown in blocks]).repeat_interleave(torch.tensor(sizes))
    # what stands before and yet is not seen is hatched
    hidden = ~seen & (places < places[:, None])
    stripes = (torch.arange(len(places)) + torch.arange(len(places))[:, None]) % 8 < 3
    alpha = (255 * seen + HATCHED * (hidden & stripes)).to(torch.uint8)
    palette = torch.tensor([COLOURS[kind] for kind in Kind], dtype=torch.uint8)
    image = to_image(palette[kinds].T[:, None].expand(3, *seen.shape))
    image.putalpha(to_image(alpha.expand(3, *seen.shape)).convert("L"))
    return MaskPicture(image, sizes, blocks, by_token)


def _sizes(lengths: Sequence[int]) -> list[int]:
    """Pixels of each block in a mask that is drawn smaller than it is long: a text still shows beside a
    picture."""
    roots = torch.tensor(lengths).sqrt() + 3
    if len(lengths) <= LABELLED:
        roots = roots.clamp(min=0.03 * float(roots.sum()))
    return (roots / roots.sum() * SIDE).round().clamp(min=1).int().tolist()
