"""Pictures to the sizes and numbers that the models see, as the reference does it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from unigen.sequence.grid import to_unit
from unigen.sequence.images import PILImage, bicubic


@dataclass(frozen=True)
class ImageTransform:
    """Resize (bicubic, sides multiples of ``stride``) and normalise to [-1, 1], number for number as the
    reference."""

    max_size: int  # the longest side in pixels that a picture is scaled down to
    min_size: int  # the shortest side in pixels that a picture is scaled up to
    stride: int  # both sides become multiples of it: 16 for the VAE, the patch size for the ViT
    max_pixels: int = 14 * 14 * 9 * 1024  # of all the pictures of a sample together
    limit: int | None = None  # largest side the position table has room for; wins over everything else
    max_tokens: int | None = None  # (w / stride) * (h / stride) of one picture

    def __post_init__(self) -> None:
        assert self.limit is None or self.limit >= self.stride, "limit is below one token"
        assert self.max_tokens is None or self.max_tokens >= 1, "max_tokens is below one"

    def size(self, width: int, height: int, images: int = 1) -> tuple[int, int]:
        """``(width, height)`` after the resize, for one of the ``images`` pictures of its sample."""
        assert width >= 1 and height >= 1 and images >= 1
        max_size = self.max_size
        if self.limit is not None:
            max_size = min(max_size, self.limit // self.stride * self.stride)
        scale = max(min(max_size / max(width, height), 1.0), self.min_size / min(width, height))
        w, h = self._scaled(width, height, scale)
        budget = self.max_pixels / images
        if w * h > budget:
            # a ratio of areas applied to sides, without a root: as the reference
            w, h = self._scaled(w, h, budget / (w * h))
        if max(w, h) > max_size:
            w, h = self._scaled(w, h, max_size / max(w, h))
        if self.max_tokens is not None and (w // self.stride) * (h // self.stride) > self.max_tokens:
            w, h = self._within_tokens(w, h, width / height)
        return w, h

    def resize(self, picture: PILImage, images: int = 1, size: tuple[int, int] | None = None) -> PILImage:
        """The RGB picture at ``size``, bicubic; by default at :meth:`size` of its own. One opened with
        ``fit`` needs the explicit size."""
        box = picture.info.get("box")
        assert box is None or size is not None, (
            "a picture that was decoded small does not know its size: give the size"
        )
        size = size or self.size(*picture.size, images=images)
        return picture if size == picture.size else bicubic(picture, size, box)

    def __call__(self, picture: PILImage, images: int = 1, size: tuple[int, int] | None = None) -> Tensor:
        """``[3, H, W]`` float32 in [-1, 1] of an RGB picture, resized as by :meth:`resize`."""
        return to_unit(self.levels(picture, images, size))

    def levels(self, picture: PILImage, images: int = 1, size: tuple[int, int] | None = None) -> Tensor:
        """``[3, H, W]`` uint8 of an RGB picture, resized as by :meth:`resize`; ``to_unit`` makes it what
        models see."""
        assert picture.mode == "RGB", f"open pictures with open_image: mode is {picture.mode}"
        picture = self.resize(picture, images, size)
        levels = np.empty((3, picture.height, picture.width), np.uint8)
        for band, plane in zip(picture.split(), levels):
            plane[:] = band
        return torch.from_numpy(levels)

    def patches(self, picture: PILImage, images: int = 1, size: tuple[int, int] | None = None) -> Tensor:
        """``[rows * columns, stride * stride * 3]`` uint8: ``patchify`` of :meth:`levels`."""
        assert picture.mode == "RGB", f"open pictures with open_image: mode is {picture.mode}"
        levels = np.asarray(self.resize(picture, images, size))
        return torch.from_numpy(
            np.array(
                rearrange(levels, "(h p) (w q) c -> (h w) (p q c)", p=self.stride, q=self.stride), order="C"
            )
        )

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        w, h = (
            max(self.stride, round(round(side * scale) / self.stride) * self.stride)
            for side in (width, height)
        )
        return w, h

    def _within_tokens(self, width: int, height: int, aspect: float) -> tuple[int, int]:
        """The grid of at most ``max_tokens`` tokens nearest in shape to ``aspect``, from those next to the
        exact scale."""
        assert self.max_tokens is not None
        most, columns, rows = self.max_tokens, width // self.stride, height // self.stride
        scale = math.sqrt(most / (columns * rows))
        near_columns, near_rows = (
            (max(1, math.floor(side * scale)), math.ceil(side * scale)) for side in (columns, rows)
        )
        grids = [(min(c, most), min(r, most // min(c, most))) for c in near_columns for r in near_rows]
        c, r = min(grids, key=lambda grid: (abs(math.log(grid[0] / grid[1] / aspect)), -grid[0] * grid[1]))
        return c * self.stride, r * self.stride
