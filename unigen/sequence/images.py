"""Pictures: opened safely, resized, turned into tensors and back.

This is the only module that imports PIL; everything else goes through it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from unigen.sequence.files import MAX_BYTES, Confined, PictureError, bad_picture, open_file, other_kind

__all__ = [
    "Confined",
    "PictureError",
    "area_means",
    "bad_picture",
    "bicubic",
    "bicubic_levels",
    "image_size",
    "open_image",
    "read_picture",
    "to_image",
]

PILImage = Image.Image
PictureSource = str | Path | Confined | bytes | PILImage
Fit = Callable[[int, int], tuple[int, int]]

MAX_PIXELS = 64_000_000  # larger pictures are refused from their header, before any memory is spent on them

# Formats that are decoded inside this process by code that reads pixels and nothing else: EPS, for one, would
# start another program. ICO is not among them: PIL decodes its pictures, of any size, while it reads the
# header.
_FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "TGA",
    "DIB",
    "PCX",
)

# What PIL may read before the size of a picture is known. Honest headers stay far below; crafted ones would
# cost minutes.
_MAX_HEADER_BYTES = 8 * 1024**2
_MAX_HEADER_READS = 10_000
_MAX_PNG_TEXT = 16 * 1024**2  # unpacked: all compressed texts and colour profiles together

MAX_SCANS = 100  # of a JPEG: each is decoded over the whole picture; progressive ones have about 10
MAX_SCANNED = 20 * MAX_PIXELS  # pixels of all its scans together
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # a marker of JPEG with a length behind it

# Scales at which a JPEG may be decoded, and how many times as large as the wanted picture the decoded one has
# to be. Over nine sharp photographs of 0.2 to 2 megapixels the worst difference to full decoding, after
# resizing, is 0.46 of 255 levels in the mean (PSNR 51 dB, no pixel above 9 levels); with 2 in place of 3 and
# 4 it would be 1.2 levels and 43 dB, at sharp edges visible.
_DRAFTS = ((8, 4), (4, 4), (2, 3))

_ORIENTATION = 0x0112  # EXIF tag
_PIL_MODULES = re.compile(r"PIL\.")


def open_image(source: PictureSource, fit: Fit | None = None) -> PILImage:
    """The picture as RGB, 8 bits, upright (EXIF orientation applied), transparency composed onto white, first
    frame only.

    Args:
        source: A path of a regular file, the bytes of such a file, or an opened picture (which is not
            changed).
        fit: Gives, for the picture's upright ``(width, height)``, the largest size that it will be resized
            to. A JPEG at least six times as large is then decoded at a half, a quarter or an eighth of its
            size, which no eye can tell after resizing (mean difference below half a level of 255, PSNR above
            50 dB) and takes less than half the time. Resize it with ``transform.ImageTransform`` and an
            explicit ``size``: the picture returned no longer tells its original size, and its ``info["box"]``
            says which part of it the original covers, a fraction of a pixel less than all.

    Raises:
        PictureError: The picture is missing, not a regular file, outside its root, above 64 megapixels,
            truncated, or not a picture.
    """
    # another library may have switched it on: half a picture would pass for a whole one
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with _opened(source) as (picture, name):
        with _explained(name):
            _check_scans(picture, name)
            orientation = _orientation(picture)
            box = None if fit is None or isinstance(source, PILImage) else _draft(picture, orientation, fit)
            size = picture.size
            picture.load()
        if picture.size != size:
            problem = (
                f"its header says {size[0]} x {size[1]}, but it holds {picture.size[0]} x {picture.size[1]}"
            )
            raise PictureError(
                "broken_picture", name, problem, "save the picture again, or leave the record out"
            )
        upright = _transposed(picture, orientation)
        with _explained(name):
            picture = _to_rgb(upright, name)
        # what was applied above (orientation, transparency) must not be applied again
        picture.info = {} if box is None else {"box": box}
        return picture


def image_size(source: PictureSource) -> tuple[int, int]:
    """``(width, height)`` of the upright picture, from its header alone: no pixel is decoded.

    Raises:
        PictureError: As :func:`open_image`, but for damage that only decoding shows.
    """
    with _opened(source) as (picture, name), _explained(name):
        width, height = picture.size
        return (height, width) if _orientation(picture) in (5, 6, 7, 8) else (width, height)


def read_picture(source: str | Path | Confined | bytes) -> bytes:
    """The encoded bytes of a picture, by the same rules for paths as :func:`open_image`, which takes them in
    place of the path.

    Raises:
        PictureError: The file is missing, not a regular file, outside its root, cannot be read, or has more
            than 256 MiB.
    """
    if isinstance(source, bytes):
        return source
    with open_file(source) as file:
        try:
            data = file.read(MAX_BYTES + 1)
        except OSError as error:
            problem = f"it cannot be read ({error.strerror or error})"
            raise PictureError(
                "unreadable_picture", str(source), problem, "check the disk and the connection to it"
            ) from None
    if len(data) > MAX_BYTES:  # it grew after it was opened
        raise PictureError(
            "huge_picture", str(source), f"the file has more than {MAX_BYTES:,} bytes", "scale it down"
        )
    return data


@contextmanager
def _opened(source: PictureSource) -> Iterator[tuple[PILImage, str]]:
    """The picture behind ``source`` with its header read and its size accepted, and the name that messages
    use."""
    if isinstance(source, PILImage):
        name = str(getattr(source, "filename", "") or "the given picture")
        _check_size(source, name)
        yield source, name
        return
    assert isinstance(source, str | Path | Confined | bytes), (
        f"a picture is a path, bytes or a PIL image, not {type(source).__name__}"
    )
    name = "the given bytes" if isinstance(source, bytes) else str(source)
    if isinstance(source, bytes) and len(source) > MAX_BYTES:
        problem = f"they are {len(source):,} bytes, above {MAX_BYTES:,}"
        raise PictureError("huge_picture", name, problem, "scale the picture down")
    with io.BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
        header = _Header(file, name)
        with _explained(name, file):
            _silence()
            Image.init()
            _check_png(header, name)
            picture = Image.open(header, formats=[f for f in _FORMATS if f in Image.OPEN])
        with picture:
            _check_size(picture, name)
            header.done()
            yield picture, name


class _Header:
    """A file of which only so much can be read until :meth:`done` is called. All else goes to the file
    itself."""

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._name, self._bytes, self._reads = file, name, 0, 0

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._file, attribute)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if size >= 0:  # WebP and AVIF are read whole, up to MAX_BYTES, and unpacked later
            self._bytes, self._reads = self._bytes + len(data), self._reads + 1
            if self._bytes > _MAX_HEADER_BYTES or self._reads > _MAX_HEADER_READS:
                problem = (
                    f"its header has more than {_MAX_HEADER_BYTES:,} bytes or {_MAX_HEADER_READS:,} parts"
                )
                raise PictureError(
                    "broken_picture", self._name, problem, "save the picture again without its metadata"
                )
        return data

    def done(self) -> None:
        self.read = self._file.read


def _check_png(header: _Header, name: str) -> None:
    """Refuses a PNG whose texts would unpack to more than a header may hold: PIL unpacks them before the size
    can be looked at."""
    unpacked = 0
    if header.read(8) == b"\x89PNG\r\n\x1a\n":
        while len(start := header.read(8)) == 8 and start[4:] not in (b"IDAT", b"IEND"):
            length = int.from_bytes(start[:4], "big")
            if start[4:] in (b"zTXt", b"iTXt", b"iCCP"):
                # deflate packs at most a thousandfold, and PIL stops at 1 MiB of one text
                unpacked += min(1024 * length, 1024**2)
            header.seek(length + 4, io.SEEK_CUR)
    if unpacked > _MAX_PNG_TEXT:
        problem = f"its texts may unpack to more than {_MAX_PNG_TEXT:,} bytes"
        raise PictureError("broken_picture", name, problem, "save the picture again without its metadata")
    header.seek(0)


def _check_scans(picture: PILImage, name: str) -> None:
    """Refuses a JPEG whose scans would take minutes to decode."""
    file = getattr(picture, "fp", None)
    if picture.format not in ("JPEG", "MPO") or file is None:  # or it is decoded already
        return
    at = file.tell()
    file.seek(0)
    scans = _scans(file.read())
    file.seek(at)
    if scans > MAX_SCANS or scans * picture.width * picture.height > MAX_SCANNED:
        problem = (
            f"its {scans:,} scans over {picture.width} x {picture.height} pixels take too long to decode (at"
            f" most {MAX_SCANS}, and {MAX_SCANNED:,} pixels in all)"
        )
        raise PictureError("huge_picture", name, problem, "save the picture again, as a baseline JPEG or PNG")


def _scans(data: bytes) -> int:
    """The scans of a JPEG's first picture: SOS markers outside of other segments."""
    at, count = 2, 0
    while (match := _SEGMENT.search(data, at)) and match[0] != b"\xff\xd9":
        start = match.end()
        count += match[0] == b"\xff\xda"
        at = start + max(2, int.from_bytes(data[start : start + 2], "big"))
    return count


def _silence() -> None:
    """PIL warns of odd metadata, a line for each tag, about pictures that are sound; what matters raises. The
    filter is for good, since ``warnings.catch_warnings`` is not safe in the threads that decode; here it is
    only put back to the front where others came later."""
    if not warnings.filters or warnings.filters[0][3] != _PIL_MODULES:
        warnings.filterwarnings("ignore", module=_PIL_MODULES.pattern)


def _draft(picture: PILImage, orientation: int, fit: Fit) -> tuple[float, float, float, float] | None:
    """Has a large JPEG decoded small. Returns the part of the upright small picture that the original covers;
    None for other pictures."""
    if picture.format not in ("JPEG", "MPO"):
        return None
    turned = orientation in (5, 6, 7, 8)  # the decoder sees the picture before it is turned upright
    (width, height), sign = picture.size, -1 if turned else 1
    wanted = fit(*picture.size[::sign])[::sign]
    ratio = min(width / wanted[0], height / wanted[1])
    scale = next((scale for scale, margin in _DRAFTS if ratio >= scale * margin), 1)
    if scale == 1 or picture.draft(None, (width // scale, height // scale)) is None:
        return None
    # The decoder rounds up: the last column and row lie partly outside of the original.
    covered, small = (width / scale, height / scale)[::sign], picture.size[::sign]
    left = small[0] - covered[0] if orientation in (2, 3, 6, 7) else 0
    top = small[1] - covered[1] if orientation in (3, 4, 7, 8) else 0
    return left, top, left + covered[0], top + covered[1]


@contextmanager
def _explained(name: str, file: BinaryIO | None = None) -> Iterator[None]:
    """Turns whatever PIL raises (it has no common base class) into a PictureError; ``file`` is looked at
    where it is of no known kind."""
    try:
        yield
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(
            "huge_picture", name, f"it is above {MAX_PIXELS:,} pixels ({error})", "scale it down"
        ) from error
    except Image.UnidentifiedImageError as error:
        assert file is not None
        file.seek(0)
        raise PictureError("not_a_picture", name, *other_kind(file.read(256))) from error
    except Exception as error:
        problem = f"it is truncated or damaged ({type(error).__name__}: {error})"
        raise PictureError(
            "broken_picture", name, problem, "fetch or save the picture again, or leave the record out"
        ) from error


def _check_size(picture: PILImage, name: str) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise PictureError(
            "broken_picture", name, f"its size is {width} x {height}", "save the picture again"
        )
    if width * height > MAX_PIXELS:
        problem = f"{width} x {height} is above {MAX_PIXELS:,} pixels"
        raise PictureError(
            "huge_picture", name, problem, "scale it down; the model sees about one megapixel of it"
        )


def _orientation(picture: PILImage) -> int:
    """EXIF orientation 1-8, known before any decoding, so that a size read from the header is the size that
    is decoded."""
    if picture.format == "TIFF":
        return 1  # PIL turns a TIFF itself, and reports its turned size
    try:
        # The method of the base class: PNG's own one decodes the whole picture, to look for EXIF data after
        # the pixels.
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
        # nothing shows through: the same picture in a fifth of the time
        if rgba.getextrema()[3] == (255, 255):
            return rgba.convert("RGB")
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


def bicubic(
    picture: PILImage, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> PILImage:
    """The picture, or the part ``box`` of it, at ``size``, ``(width, height)``."""
    return picture.resize(size, Image.Resampling.BICUBIC, box)


def area_means(picture: PILImage, size: tuple[int, int]) -> np.ndarray:
    """Gray levels ``[height, width]`` float32 in 0..255: means over the areas into which ``size``, ``(width,
    height)``, cuts the picture. A pixel on an edge counts where its centre lies."""
    return np.asarray(picture.convert("L").convert("F").resize(size, Image.Resampling.BOX))


def bicubic_levels(picture: PILImage, size: tuple[int, int]) -> np.ndarray:
    """Levels ``[3, height, width]`` float32 in 0..255 of an RGB picture at ``size``, ``(width, height)``,
    bicubic and not rounded to whole levels, as clean-fid resizes (Parmar et al. 2022)."""
    bands = [band.convert("F").resize(size, Image.Resampling.BICUBIC) for band in picture.split()]
    return np.stack([np.asarray(band) for band in bands]).clip(0, 255)


def to_image(pixels: Tensor) -> PILImage:
    """The RGB picture of ``pixels`` ``[3, H, W]``: in [-1, 1], ``floor(255 * clamp(x / 2 + 1 / 2))``; or
    uint8 as it is.

    Raises:
        PictureError: ``pixels`` holds NaN or infinite numbers.
    """
    assert pixels.ndim == 3 and pixels.shape[0] == 3, f"pixels are [3, H, W], not {list(pixels.shape)}"
    if pixels.dtype == torch.uint8:
        return Image.fromarray(pixels.cpu().permute(1, 2, 0).contiguous().numpy())
    pixels = pixels.detach().to("cpu", torch.float32)
    if not torch.isfinite(pixels).all():
        problem = "it holds numbers that are not finite"
        fix = "check the weights; try bf16 or float32 in place of fp16"
        raise PictureError("broken_picture", "the drawn picture", problem, fix)
    levels = (pixels * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
