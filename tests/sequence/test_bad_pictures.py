"""Damaged pictures: whatever the bytes, a picture is decoded to RGB of the announced size or refused with a
reason.

The cases are generated, by hypothesis with a fixed seed; each test counts its own and fails when there were
fewer than CASES says.
"""

import gc
import struct
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import chunk, encoded, run
from hypothesis import strategies as st
from PIL import Image

from unigen.sequence.images import PictureError, _scans, image_size, open_image
from unigen.sequence.transform import ImageTransform

CASES = {"bytes": 900, "parts": 900, "headers": 300}
CODES = {"not_a_picture", "broken_picture", "huge_picture", "unsupported_picture"}
SECONDS = 60.0  # for one case: only a hang takes longer


@pytest.fixture(autouse=True)
def nothing_left_open_by_others() -> None:
    """What earlier tests of this process left to the collector would warn where a picture must not."""
    gc.collect()


def _originals() -> dict[str, list[bytes]]:
    rng = np.random.default_rng(7)
    rgb = Image.fromarray(
        np.kron(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    )
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(rng.integers(0, 256, (40, 48), dtype=np.uint8)))
    deep = Image.fromarray(rng.integers(0, 65536, (40, 48), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    text = {"exif": exif, "icc_profile": bytes(range(256))}
    frames = {"save_all": True, "append_images": [rgb.rotate(90)]}
    return {
        "JPEG": [
            encoded(rgb, "JPEG", **text),
            encoded(rgb, "JPEG", progressive=True, quality=95, subsampling=0),
            encoded(rgb.convert("L"), "JPEG", comment=b"hello"),
            encoded(rgb.convert("CMYK"), "JPEG", restart_marker_blocks=2),
        ],
        "PNG": [
            encoded(rgb, "PNG", **text),
            encoded(rgba, "PNG", dpi=(72, 72)),
            encoded(rgb.quantize(16), "PNG", transparency=3),
            encoded(deep, "PNG"),
            encoded(rgb, "PNG", **frames),
        ],
        "WEBP": [
            encoded(rgb, "WEBP", **text),
            encoded(rgba, "WEBP", lossless=True),
            encoded(rgba, "WEBP", quality=50),
            encoded(rgb, "WEBP", **frames),
        ],
    }


ORIGINALS = _originals()
PICTURES = [(format, data) for format, datas in ORIGINALS.items() for data in datas]


def verdict(source: bytes | Path) -> str:
    """What became of a picture: ``decoded`` or the code of its refusal, after checking all that must hold in
    either case."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        announced, refusal = None, None
        try:
            announced = image_size(source)
        except PictureError as error:
            refusal = error
        try:
            picture = open_image(source)
        except PictureError as error:
            picture, refusal = None, error
    assert time.perf_counter() - start < SECONDS
    assert not warned, f"warned of {[str(w.message) for w in warned]}"
    if picture is None:
        assert refusal.code in CODES, refusal
        name, message = "the given bytes" if isinstance(source, bytes) else str(source), str(refusal)
        assert message.startswith(f"{name}: {refusal.problem}. Fix: ") and refusal.problem and refusal.fix
        assert len(message) < len(name) + 600 and message.isprintable(), message
        return refusal.code
    assert announced is not None, "decoded, though its header was refused"
    assert picture.mode == "RGB" and picture.size == announced
    pixels = ImageTransform(32, 16, 16)(picture)
    assert pixels.isfinite().all() and pixels.abs().max() <= 1
    return "decoded"


@pytest.mark.slow
def test_the_originals_are_sound() -> None:
    assert [verdict(data) for _, data in PICTURES] == ["decoded"] * len(PICTURES)


# ---- damage that knows nothing of the format


def truncated(data: bytes, at: float, *_) -> bytes:
    return data[: int(at * len(data))]


def flipped(data: bytes, at: float, size: float, other: bytes) -> bytes:
    rng, out = np.random.default_rng(int(at * 1e9)), bytearray(data)
    for place in rng.integers(0, len(out), 1 + int(size * 8)):
        out[place] ^= 1 << rng.integers(0, 8)
    return bytes(out)


def zeroed(data: bytes, at: float, size: float, other: bytes) -> bytes:
    a, n = int(at * len(data)), 1 + int(size * 200)
    return data[:a] + bytes(len(data[a : a + n])) + data[a + n :]


def deleted(data: bytes, at: float, size: float, other: bytes) -> bytes:
    a = int(at * len(data))
    return data[:a] + data[a + 1 + int(size * 100) :]


def inserted(data: bytes, at: float, size: float, other: bytes) -> bytes:
    a = int(at * len(data))
    return data[:a] + np.random.default_rng(int(size * 1e9)).bytes(1 + int(size * 300)) + data[a:]


def repeated(data: bytes, at: float, size: float, other: bytes) -> bytes:
    a = int(at * len(data))
    return data[: a + int(size * 300)] + data[a:]


def tailed(data: bytes, at: float, size: float, other: bytes) -> bytes:
    return data[: max(1, int(at * len(data)))] + np.random.default_rng(int(at * 1e9)).bytes(
        len(data) - int(at * len(data))
    )


def appended(data: bytes, at: float, size: float, other: bytes) -> bytes:
    return data + (other if size < 0.5 else np.random.default_rng(int(at * 1e9)).bytes(int(at * 5000)))


def prefixed(data: bytes, at: float, size: float, other: bytes) -> bytes:
    return np.random.default_rng(int(at * 1e9)).bytes(1 + int(size * 20)) + data


def mixed(data: bytes, at: float, size: float, other: bytes) -> bytes:
    return data[: int(at * len(data))] + other[int(size * len(other)) :]


DAMAGES = [truncated, flipped, zeroed, deleted, inserted, repeated, tailed, appended, prefixed, mixed]
SHARE = st.floats(0, 1, exclude_max=True, width=32)


@pytest.mark.slow
def test_damaged_bytes_are_decoded_to_the_announced_size_or_refused_with_a_reason(
    tmp_path: Path, capfd
) -> None:
    verdicts, path = {damage: Counter() for damage in DAMAGES}, tmp_path / "a picture"

    def case(drawn) -> str:
        damage, (_, data), (_, other), at, size, as_file = drawn
        data = damage(data, at, size, other)
        if as_file:
            path.write_bytes(data)
        found = verdict(path if as_file else data)
        verdicts[damage][found] += 1
        return found

    pictures = st.sampled_from(PICTURES)
    run(
        CASES["bytes"],
        st.tuples(st.sampled_from(DAMAGES), pictures, pictures, SHARE, SHARE, st.booleans()),
        case,
    )
    for damage, found in verdicts.items():
        assert found.total() >= 20, f"{damage.__name__} was hardly tried"
    assert verdicts[truncated]["decoded"] <= verdicts[truncated].total() // 10, (
        "half pictures pass for whole ones"
    )
    assert verdicts[appended]["decoded"] >= verdicts[appended].total() * 3 // 4, (
        "what follows a picture is not its damage"
    )
    assert capfd.readouterr() == ("", "")


# ---- damage to the parts of a format


def split_png(data: bytes) -> list[bytes]:
    parts, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at:end])
        at = end
    return parts


def split_jpeg(data: bytes) -> list[bytes]:
    parts, at = [data[:2]], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(data[at:end])
        at = end
    return [*parts, data[at:-2], data[-2:]]


def split_webp(data: bytes) -> list[bytes]:
    parts, at = [data[:12]], 12
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        parts.append(data[at : at + 8 + size + size % 2])
        at += 8 + size + size % 2
    return parts


SPLIT = {"PNG": split_png, "JPEG": split_jpeg, "WEBP": split_webp}
PARTS = [
    "swap",
    "repeat",
    "drop",
    "lie about the length",
    "wrong checksum",
    "empty",
    "from another",
    "many times",
    "garble one",
]


def rebuilt(format: str, parts: list[bytes], honest: bool) -> bytes:
    """The parts joined; ``honest`` makes checksums and the RIFF length right again, so that decoders look
    further."""
    if honest and format == "PNG":
        parts = [
            parts[0],
            *(p[:-4] + struct.pack(">I", zlib.crc32(p[4:-4])) if len(p) >= 12 else p for p in parts[1:]),
        ]
    data = b"".join(parts)
    if honest and format == "WEBP" and len(data) >= 12:
        data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    return data


def with_parts_damaged(
    format: str, data: bytes, other: bytes, how: str, places: tuple[int, int, int]
) -> bytes:
    parts, others = SPLIT[format](data), SPLIT[format](other)
    assert b"".join(parts) == data
    a, b = (1 + place % (len(parts) - 1) for place in places[:2])
    noise, honest = np.random.default_rng(places[2]), places[2] % 2 == 0
    part = parts[a]
    if how == "swap":
        parts[a], parts[b] = parts[b], parts[a]
    elif how == "repeat":
        parts.insert(b, part)
    elif how == "drop":
        del parts[a]
    elif how == "lie about the length":
        at, size = {"PNG": (0, 4), "JPEG": (2, 2), "WEBP": (4, 4)}[format]
        parts[a] = part[:at] + noise.bytes(size) + part[at + size :]
        honest = False
    elif how == "wrong checksum":
        parts[a], honest = part[:-4] + noise.bytes(4), False
    elif how == "empty":
        parts[a] = {"PNG": chunk(part[4:8], b""), "JPEG": part[:2] + b"\0\2", "WEBP": part[:4] + bytes(4)}[
            format
        ]
    elif how == "from another":
        parts[a] = others[1 + places[1] % (len(others) - 1)]
    elif how == "many times":
        parts[a : a + 1] = [part] * 300
    else:
        body = bytearray(part)
        for place in noise.integers(0, len(body), 4):
            body[place] = noise.integers(0, 256)
        parts[a] = bytes(body)
    return rebuilt(format, parts, honest)


@pytest.mark.slow
def test_damaged_parts_are_decoded_to_the_announced_size_or_refused_with_a_reason(capfd) -> None:
    verdicts = {how: Counter() for how in PARTS}

    def case(drawn) -> str:
        how, (format, data), which, places = drawn
        other = ORIGINALS[format][which % len(ORIGINALS[format])]
        found = verdict(with_parts_damaged(format, data, other, how, places))
        verdicts[how][found] += 1
        return found

    numbers = st.integers(0, 999)
    total = run(
        CASES["parts"],
        st.tuples(
            st.sampled_from(PARTS), st.sampled_from(PICTURES), numbers, st.tuples(numbers, numbers, numbers)
        ),
        case,
    )
    for how, found in verdicts.items():
        assert found.total() >= 20, f"{how} was hardly tried"
    assert total["decoded"] >= 50 and total.total() - total["decoded"] >= 200, total
    assert capfd.readouterr() == ("", "")


# ---- headers that lie

SIDES = [0, 1, 2, 39, 41, 47, 49, 300, 1500, 8001, 16383, 30000, 65535]
PNG_KINDS = [
    (depth, colour, interlace)
    for depth in (1, 2, 4, 8, 16, 3, 255)
    for colour in range(8)
    for interlace in (0, 1, 2)
]


def lying(format: str, data: bytes, width: int, height: int, kind: int) -> bytes:
    """The picture with another size, and another kind of pixels, in its header; checksums are right."""
    if format == "PNG":
        depth, colour, interlace = (data[24], data[25], 0) if kind < 100 else PNG_KINDS[kind % len(PNG_KINDS)]
        return (
            data[:8]
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
            + data[33:]
        )
    if format == "JPEG":
        parts = split_jpeg(data)
        at = next(i for i, part in enumerate(parts) if part[:1] == b"\xff" and part[1] in (0xC0, 0xC2))
        frame = bytearray(parts[at])
        frame[5:9] = struct.pack(">HH", height, width)
        if kind >= 100:
            frame[(4, 9, 11, 12, 1)[kind % 5]] = (1, 3, 4, 8, 12, 0x11, 0x22, 0xC1, 0xC2, 0xC9)[
                kind // 5 % 10
            ]
        parts[at] = bytes(frame)
        return b"".join(parts)
    if data[12:16] == b"VP8X":
        sides = (struct.pack("<I", max(side, 1) - 1)[:3] for side in (width, height))
        return data[:24] + b"".join(sides) + data[30:]
    if data[12:16] == b"VP8L":
        return (
            data[:21]
            + struct.pack("<I", (width & 16383) | (height & 16383) << 14 | (kind % 8) << 28)
            + data[25:]
        )
    return data[:26] + struct.pack("<HH", width & 16383, height & 16383) + data[30:]


@pytest.mark.slow
def test_headers_that_lie_about_size_or_pixels(capfd) -> None:
    def case(drawn) -> str:
        (format, data), width, height, kind = drawn
        found = verdict(lying(format, data, width, height, kind))
        if format == "PNG" and kind < 100:  # nothing but the size was changed
            assert (found == "huge_picture") == (width * height > 64_000_000), found
        return found

    total = run(
        CASES["headers"],
        st.tuples(
            st.sampled_from(PICTURES), st.sampled_from(SIDES), st.sampled_from(SIDES), st.integers(0, 999)
        ),
        case,
    )
    assert total["huge_picture"] >= 20 and total["broken_picture"] + total["not_a_picture"] >= 100, total
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_there_are_as_many_cases_as_were_promised() -> None:
    assert sum(CASES.values()) >= 2000


# ---- bounds


def with_scans(data: bytes, scans: int) -> bytes:
    """A JPEG whose last scan comes again and again."""
    last = data.rindex(b"\xff\xda")
    assert data.endswith(b"\xff\xd9")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


@pytest.mark.slow
def test_scans_of_a_jpeg_are_counted_before_any_is_decoded():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8))
    ordinary = encoded(picture, "JPEG", progressive=True, quality=90)
    assert 5 <= _scans(ordinary) <= 20 and verdict(ordinary) == "decoded"
    assert _scans(encoded(picture, "JPEG")) == 1 == _scans(ordinary[: ordinary.index(b"\xff\xda") + 9])
    inside = ordinary[:2] + b"\xff\xe1\x00\x0a" + b"\xff\xda" * 4 + ordinary[2:]  # as a thumbnail has them
    assert _scans(inside) == _scans(ordinary)
    assert verdict(with_scans(ordinary, 50)) == "decoded"
    with pytest.raises(PictureError, match=r"20,0\d\d scans over 256 x 256") as error:
        open_image(with_scans(ordinary, 20_000))
    assert error.value.code == "huge_picture"


@pytest.mark.slow
def test_the_scans_of_a_large_jpeg_count_by_its_pixels(monkeypatch: pytest.MonkeyPatch):
    picture = Image.new("RGB", (512, 512))
    data = with_scans(encoded(picture, "JPEG", progressive=True), 30)
    assert verdict(data) == "decoded"
    monkeypatch.setattr("unigen.sequence.images.MAX_SCANNED", 512 * 512 * 30)
    assert verdict(data) == "huge_picture"
