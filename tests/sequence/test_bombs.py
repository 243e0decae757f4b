"""Pictures that would cost far more than their size: refused from their headers, within 50 ms and 50 MB
each."""

import json
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from cases import chunk, encoded
from PIL import Image

from unigen.sequence.images import image_size, open_image

CODES = {"not_a_picture", "broken_picture", "huge_picture"}


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def ifd(*entries: tuple[int, int, int, int], count: int | None = None, tail: bytes = b"") -> bytes:
    """A TIFF structure of ``(tag, type, count, value or offset)`` entries; ``tail`` starts behind them."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries) if count is None else count) + body + bytes(4) + tail


SMALL = Image.new("RGB", (16, 16))
PNG_START = b"\x89PNG\r\n\x1a\n"


def png(width: int, height: int, *chunks: bytes) -> bytes:
    data = chunk(b"IDAT", zlib.compress(bytes(64)))
    return (
        PNG_START
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + b"".join(chunks)
        + data
        + chunk(b"IEND", b"")
    )


def bits(side: int) -> bytes:
    """A whole black PNG of a bit a pixel: 20 kB for 13,000 x 13,000 pixels, which PIL holds in a byte
    each."""
    data = zlib.compress(bytes((1 + (side + 7) // 8) * side))
    start = PNG_START + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return start + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(*segments: bytes, size: tuple[int, int] | None = None) -> bytes:
    data = encoded(SMALL, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    if size is not None:
        data = data[:at] + struct.pack(">HH", *size[::-1]) + data[at + 4 :]
    return data[:20] + b"".join(segments) + data[20:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int, *blocks: bytes, frames: int = 1) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + b"".join(blocks)
        + frame * frames
        + b";"
    )


def tiff(width: int, height: int, *tags: tuple[int, int, int, int], tail: bytes = b"") -> bytes:
    grey = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
    ]
    rows = [(278, 4, 1, height), (279, 4, 1, width * height & 0xFFFFFFFF)]
    return ifd(*sorted({tag[0]: tag for tag in (*grey, *rows, *tags)}.values()), tail=tail)


def replaced(data: bytes, mark: bytes, skip: int, new: bytes) -> bytes:
    at = data.index(mark) + skip
    return data[:at] + new + data[at + len(new) :]


def _bombs() -> dict[str, bytes]:
    packed, million = zlib.compress(bytes(200_000_000), 1), zlib.compress(bytes(1_000_000), 9)
    huge, many = struct.pack(">II", 100_000, 100_000), 300_000
    still = encoded(SMALL, "WEBP", lossless=True)[20:]
    frame = (
        b"ANMF",
        bytes(6) + struct.pack("<I", 15)[:3] * 2 + bytes(4) + b"VP8L" + struct.pack("<I", len(still)) + still,
    )
    animation = [(b"ANIM", bytes(6)), *[frame] * 100]
    tags = [(1 + i, 7, 9_000_000, 8) for i in range(4000)]
    bitmap, two_sides = encoded(SMALL, "BMP"), struct.pack("<ii", 100_000, 100_000)
    found = {
        "png 1e5 x 1e5": png(100_000, 100_000),
        "png 8001 x 8000": png(8001, 8000),
        "png zTXt": png(16, 16, chunk(b"zTXt", b"a\0\0" + packed)),
        "png iTXt": png(16, 16, chunk(b"iTXt", b"a\0\1\0\0\0" + packed)),
        "png iCCP": png(16, 16, chunk(b"iCCP", b"a\0\0" + packed)),
        "png packed exif": png(16, 16, chunk(b"zTXt", b"Raw profile type exif\0\0" + packed)),
        "png many zTXt": png(16, 16, *[chunk(b"zTXt", b"a%d\0\0" % i + million) for i in range(300)]),
        "png many iTXt": png(16, 16, *[chunk(b"iTXt", b"a%d\0\1\0\0\0" % i + million) for i in range(300)]),
        "png many iCCP": png(16, 16, *[chunk(b"iCCP", b"a\0\0" + million)] * 300),
        "png big tEXt": png(16, 16, chunk(b"tEXt", b"a\0" + bytes(20_000_000))),
        "png many chunks": png(16, 16, chunk(b"abCd", b"") * many),
        "png many frames": png(
            8000, 8000, chunk(b"acTL", struct.pack(">II", 0x7FFFFFFF, 0)), chunk(b"fcTL", bytes(26)) * many
        ),
        "png exif tags": png(16, 16, chunk(b"eXIf", ifd(*tags, tail=bytes(9_000_000)))),
        "jpeg 65500 x 65500": jpeg(size=(65500, 65500)),
        "jpeg 8001 x 8000": jpeg(size=(8001, 8000)),
        "jpeg many comments": jpeg(segment(0xFE, b"") * many),
        "jpeg fill bytes": b"\xff\xd8" + b"\xff" * 10_000_000 + jpeg()[2:],
        "jpeg many tables": jpeg(segment(0xDB, bytes(65)) * many),
        "jpeg many profiles": jpeg(segment(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(60_000)) * 300),
        "tiff 1e5 x 1e5": tiff(100_000, 100_000),
        "tiff tag data": ifd(*tags, tail=bytes(9_000_000)),
        "tiff tag count": ifd((256, 3, 1, 16), count=65535),
        "tiff long array": tiff(16, 16, (700, 4, 2_500_000, 8), tail=bytes(10_000_000)),
        "tiff rational array": tiff(16, 16, (282, 5, 1_250_000, 8), tail=bytes(10_000_000)),
        "tiff strips": tiff(
            7000, 9000, (273, 4, 2_500_000, 8), (279, 4, 2_500_000, 8), tail=bytes(10_000_000)
        ),
        "webp animation 16384 x 16384": webp((b"VP8X", b"\2\0\0\0" + b"\xff\x3f\0" * 2), *animation),
        "webp animation 2 ** 24 x 200": webp(
            (b"VP8X", b"\2\0\0\0" + b"\xff\xff\xff" + b"\xc7\0\0"), *animation
        ),
        "webp animation 8000 x 8001": webp(
            (b"VP8X", b"\2\0\0\0" + b"\x3f\x1f\0" + b"\x40\x1f\0"), *animation
        ),
        "webp lossless 16383 x 16383": webp(
            (b"VP8L", b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(99))
        ),
        "webp lossy 16383 x 16383": webp(
            (b"VP8 ", b"\x10\0\0\x9d\1\x2a" + struct.pack("<HH", 16383, 16383) + bytes(99))
        ),
        "gif 65535 x 65535": gif(65535, 65535),
        "gif frame beyond its screen": replaced(
            gif(16, 16), b"\x2c\0\0\0\0", 5, struct.pack("<HH", 65535, 65535)
        ),
        "gif many comments": gif(16, 16, b"\x21\xfe\4aaaa\0" * many),
        "bmp 1e5 x 1e5": bitmap[:18] + two_sides + bitmap[26:],
        "dib 1e5 x 1e5": bitmap[14:18] + two_sides + bitmap[26:],
        "jp2 1e5 x 1e5": replaced(encoded(SMALL, "JPEG2000"), b"ihdr", 4, huge),
        "j2k 1e5 x 1e5": replaced(encoded(SMALL, "JPEG2000")[85:], b"\xff\x51", 6, huge),
        "ppm 1e5 x 1e5": b"P6\n100000 100000\n255\n" + bytes(99),
        "ppm spaces": b"P6\n" + b" " * 10_000_000 + b"16 16\n255\n" + bytes(768),
        "ppm comment": b"P6\n#" + b"a" * 10_000_000 + b"\n16 16\n255\n" + bytes(768),
        "tga 65535 x 65535": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0)
        + bytes(99),
        "pcx 65535 x 65535": struct.pack("<BBBBHHHHHH", 10, 5, 1, 8, 0, 0, 65534, 65534, 72, 72)
        + bytes(49)
        + b"\3\xff\xff\1"
        + bytes(58),
        "ico with a png": b"\0\0\1\0\1\0"
        + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, 99, 22)
        + bits(13_000),
    }
    if "AVIF" in Image.SAVE:
        found["avif 1e5 x 1e5"] = replaced(encoded(Image.new("RGB", (64, 64)), "AVIF"), b"ispe", 8, huge)
    return found


MEASURE = """
import json, resource, sys, time
from pathlib import Path
from unigen.sequence.images import PictureError, image_size, open_image

def refusal(fn, path):
    try:
        return f"accepted as {fn(path)}", ""
    except PictureError as error:
        return "", error.code

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def cost(fn, path):
    best = 999.0
    for _ in range(3):
        start = time.process_time()
        answer = refusal(fn, path)
        best = min(best, time.process_time() - start)
    return best, answer

sound, _ = cost(open_image, sys.argv[2])
for path in sorted(Path(sys.argv[1]).iterdir()):
    before = peak()
    (first, _), (second, (accepted, code)) = (cost(fn, path) for fn in (image_size, open_image))
    print(json.dumps([path.name, accepted, code, max(first, second) / sound, peak() - before]), flush=True)
"""


def two_megapixels() -> bytes:
    """A sound picture, which other costs are compared with."""
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_bomb_costs_less_than_a_sound_picture_and_50_mb(tmp_path: Path) -> None:
    bombs = _bombs()
    (tmp_path / "bombs").mkdir()
    for name, data in bombs.items():
        (tmp_path / "bombs" / name).write_bytes(data)
    (tmp_path / "sound.png").write_bytes(two_megapixels())
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "bombs"), str(tmp_path / "sound.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(bombs) >= 40
    for name, accepted, code, ratio, grown in rows:
        assert not accepted and code in CODES, f"{name}: {accepted or code}"
        assert ratio < 1, f"{name} took {ratio:.1f} times as long as a sound picture of 2 megapixels"
        # The peak never falls: one that an earlier bomb hides was below 50 MB as well.
        assert grown < 50e6, f"{name} took {grown / 1e6:.0f} MB"
    assert sum(row[4] for row in rows) < 50e6, "together"


@pytest.mark.slow
@pytest.mark.parametrize("bomb", ["exif", "many exif"])
def test_exif_data_that_names_itself_many_times_costs_little(bomb: str) -> None:
    tags = [(0x100 + i, 7, 60_000, 8) for i in range(4900)]
    first = segment(0xE1, b"Exif\0\0" + ifd(*tags, tail=bytes(6000)))
    data = jpeg(first, *[segment(0xE1, b"Exif\0\0" + bytes(60_000))] * (100 if bomb == "many exif" else 0))
    whole = two_megapixels()
    start = time.process_time()
    open_image(whole)
    sound = time.process_time() - start
    start = time.process_time()
    assert open_image(data).size == image_size(data) == (16, 16)
    assert time.process_time() - start < 20 * sound


def test_ordinary_metadata_is_no_bomb() -> None:
    texts = [chunk(b"zTXt", b"a%d\0\0" % i + zlib.compress(b"some text " * 50)) for i in range(30)]
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(500_000)))
    noise = np.random.default_rng(0)
    still = encoded(Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)), "PNG")
    assert open_image(still[:33] + b"".join(texts) + profile + still[33:]).size == (16, 16)
    assert open_image(
        jpeg(*[segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + noise.bytes(60_000)) for _ in range(50)])
    ).size == (16, 16)


@pytest.mark.parametrize("format", ["BMP", "TIFF", "PNG", "PPM", "TGA"])
def test_what_a_header_may_hold_does_not_limit_the_pixels(format: str, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (1700, 1800, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a", format, **({"compress_level": 0} if format == "PNG" else {}))
    assert (tmp_path / "a").stat().st_size > 8 * 1024**2
    assert (np.asarray(open_image(tmp_path / "a")) == levels).all()
