"""Pictures: opened safely, resized as the reference does, turned into tensors and back.

This is the only module that imports PIL; everything else goes through it.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from unigen.config import UserError

PILImage = Image.Image
Source = str | Path | bytes | PILImage

MAX_PIXELS = 64_000_000  # larger pictures are refused from their header, before any memory is spent on them

# Formats that are decoded inside this process by code that reads pixels and nothing else: EPS, for one, would start another program.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "DIB", "PCX")

_ORIENTATION = 0x0112  # EXIF tag


class PictureError(UserError):
    """A picture that cannot be used; its string says which, what is wrong with it, and the cure.

    ``code`` is stable: ``missing_picture``, ``not_a_file``, ``unreadable_picture``, ``not_a_picture``, ``broken_picture``,
    ``huge_picture`` or ``unsupported_picture``.
    """

    def __init__(self, code: str, name: str, problem: str, cure: str):
        self.code, self.name, self.problem, self.cure = code, name, problem, cure
        super().__init__(code, name, problem, cure)

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}. Cure: {self.cure}"


def open_image(source: Source) -> PILImage:
    """The picture as RGB, 8 bits, upright (EXIF orientation applied), transparency composed onto white, first frame only.

    Args:
        source: A path of a regular file, the bytes of such a file, or an opened picture (which is not changed).

    Raises:
        PictureError: The picture is missing, not a regular file, above 64 megapixels, truncated, or not a picture.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have switched it on: half a picture would pass for a whole one
    with _opened(source) as (picture, name):
        with _explained(name):
            orientation = _orientation(picture)
            picture.load()
        upright = _transposed(picture, orientation)
        with _explained(name):
            picture = _to_rgb(upright, name)
        picture.info = {}  # what was applied above (orientation, transparency) must not be applied again
        return picture


def image_size(source: Source) -> tuple[int, int]:
    """``(width, height)`` of the upright picture, from its header alone: no pixel is decoded.

    Raises:
        PictureError: As :func:`open_image`, but for damage that only decoding shows.
    """
    with _opened(source) as (picture, name), _explained(name):
        width, height = picture.size
        return (height, width) if _orientation(picture) in (5, 6, 7, 8) else (width, height)


@contextmanager
def _opened(source: Source) -> Iterator[tuple[PILImage, str]]:
    """The picture behind ``source`` with its header read and its size accepted, and the name that messages use."""
    if isinstance(source, PILImage):
        name = str(getattr(source, "filename", "") or "the given picture")
        _check_size(source, name)
        yield source, name
        return
    assert isinstance(source, str | Path | bytes), f"a picture is a path, bytes or a PIL image, not {type(source).__name__}"
    name = "the given bytes" if isinstance(source, bytes) else str(source)
    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(source) as file:
        with _explained(name):
            Image.init()
            picture = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
        with picture:
            _check_size(picture, name)
            yield picture, name


def _open_file(path: str | Path) -> BinaryIO:
    name = str(path)
    try:
        # Without O_NONBLOCK the open itself would wait for ever on a named pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise PictureError("missing_picture", name, "there is no such file", "correct the path or put the picture there") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        problem = f"it cannot be opened ({getattr(error, 'strerror', None) or error})"
        raise PictureError("unreadable_picture", name, problem, "check the path and the permissions") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PictureError("not_a_file", name, "it is a folder, pipe or device", "name a regular file that holds a picture")
    return os.fdopen(descriptor, "rb")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns whatever PIL raises (it has no common base class) into a PictureError."""
    try:
        yield
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError("huge_picture", name, f"it is above {MAX_PIXELS:,} pixels ({error})", "scale it down") from error
    except Image.UnidentifiedImageError as error:
        problem = "it is not a picture of a known format, or its header is damaged"
        raise PictureError("not_a_picture", name, problem, "save it again as PNG, JPEG or WebP") from error
    except Exception as error:
        problem = f"it is truncated or damaged ({type(error).__name__}: {error})"
        raise PictureError("broken_picture", name, problem, "fetch or save the picture again, or leave the record out") from error


def _check_size(picture: PILImage, name: str) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise PictureError("broken_picture", name, f"its size is {width} x {height}", "save the picture again")
    if width * height > MAX_PIXELS:
        problem = f"{width} x {height} is above {MAX_PIXELS:,} pixels"
        raise PictureError("huge_picture", name, problem, "scale it down; the model sees about one megapixel of it")


def _orientation(picture: PILImage) -> int:
    """EXIF orientation 1-8, known before any decoding, so that a size read from the header is the size that is decoded."""
    if picture.format == "TIFF":
        return 1  # PIL turns a TIFF itself, and reports its turned size
    try:
        # The method of the base class: PNG's own one decodes the whole picture, to look for EXIF data after the pixels.
        return int(Image.Image.getexif(picture).get(_ORIENTATION, 1))
    except (ValueError, TypeError, SyntaxError, OSError, KeyError, struct.error):
        return 1  # damaged EXIF data is no reason to refuse sound pixels; viewers show them unturned


def _transposed(picture: PILImage, orientation: int) -> PILImage:
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return picture if method is None else picture.transpose(method)


def _to_rgb(picture: PILImage, name: str) -> PILImage:
    if picture.mode.startswith("I"):
        return _from_16_bit(picture, name)
    if picture.mode == "F":
        problem = "its pixels are floating-point numbers without a known range"
        raise PictureError("unsupported_picture", name, problem, "save it with 8 or 16 bits per channel")
    if picture.has_transparency_data or picture.mode in ("La", "RGBa"):
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    if picture.mode == "LAB":
        raise PictureError("unsupported_picture", name, "its colours are CIE L*a*b*", "save it as RGB")
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()


def _from_16_bit(picture: PILImage, name: str) -> PILImage:
    """PIL's own conversion would clip at 255 and turn nearly everything white."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        problem = f"its pixels run from {values.min()} to {values.max()}, beyond 16 bits"
        raise PictureError("unsupported_picture", name, problem, "save it with 8 or 16 bits per channel")
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """Resize (bicubic, sides multiples of ``stride``) and normalise to [-1, 1], number for number as the reference.

    Args:
        max_size: The longest side in pixels that a picture is scaled down to.
        min_size: The shortest side in pixels that a picture is scaled up to.
        stride: Both sides become multiples of it: 16 for the VAE, the patch size for the ViT.
        max_pixels: Most pixels of all the pictures of a sample together.
        limit: Largest side the position table has room for; wins over everything else.
        max_tokens: Most tokens ``(w / stride) * (h / stride)`` of one picture; None for no limit.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024
    limit: int | None = None
    max_tokens: int | None = None

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
            w, h = self._scaled(w, h, budget / (w * h))  # a ratio of areas applied to sides, without a root: as the reference
        if max(w, h) > max_size:
            w, h = self._scaled(w, h, max_size / max(w, h))
        if self.max_tokens is not None and (w // self.stride) * (h // self.stride) > self.max_tokens:
            w, h = self._within_tokens(w, h, width / height)
        return w, h

    def resize(self, picture: PILImage, images: int = 1) -> PILImage:
        """The RGB picture at :meth:`size`, bicubic."""
        size = self.size(*picture.size, images=images)
        return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)

    def __call__(self, picture: PILImage, images: int = 1) -> Tensor:
        """``[3, H, W]`` float32 in [-1, 1] of an RGB picture."""
        assert picture.mode == "RGB", f"open pictures with open_image: mode is {picture.mode}"
        pixels = torch.from_numpy(np.array(self.resize(picture, images)))
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255).sub_(0.5).div_(0.5)

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        w, h = (max(self.stride, round(round(side * scale) / self.stride) * self.stride) for side in (width, height))
        return w, h

    def _within_tokens(self, width: int, height: int, aspect: float) -> tuple[int, int]:
        """The grid of at most ``max_tokens`` tokens nearest in shape to ``aspect``, from those next to the exact scale."""
        assert self.max_tokens is not None
        most, columns, rows = self.max_tokens, width // self.stride, height // self.stride
        scale = math.sqrt(most / (columns * rows))
        near_columns, near_rows = ((max(1, math.floor(side * scale)), math.ceil(side * scale)) for side in (columns, rows))
        grids = [(min(c, most), min(r, most // min(c, most))) for c in near_columns for r in near_rows]
        c, r = min(grids, key=lambda grid: (abs(math.log(grid[0] / grid[1] / aspect)), -grid[0] * grid[1]))
        return c * self.stride, r * self.stride


def to_image(pixels: Tensor) -> PILImage:
    """The RGB picture of ``pixels`` ``[3, H, W]`` in [-1, 1]: ``floor(255 * clamp(x / 2 + 1 / 2))``.

    Raises:
        PictureError: ``pixels`` holds NaN or infinite numbers.
    """
    assert pixels.ndim == 3 and pixels.shape[0] == 3, f"pixels are [3, H, W], not {list(pixels.shape)}"
    pixels = pixels.detach().to("cpu", torch.float32)
    if not torch.isfinite(pixels).all():
        problem = "it holds numbers that are not finite"
        raise PictureError("broken_picture", "the drawn picture", problem, "check the weights; try bf16 or float32 in place of fp16")
    levels = (pixels * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
