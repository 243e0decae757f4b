"""What the tests of bad input share: many generated cases, counted, and the parts of picture files."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

# The same cases every time; a case may take long on a busy machine.
FLAWLESS = settings(
    max_examples=1,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


def run(count: int, strategy: st.SearchStrategy, case: Callable[..., str]) -> Counter:
    """Runs ``case`` on at least ``count`` different drawn values; the verdicts, counted."""
    seen: dict[object, str] = {}

    @settings(FLAWLESS, max_examples=2 * count)
    @given(strategy)
    def check(value) -> None:
        if len(seen) < count:
            seen[repr(value)] = case(value)

    check()
    assert len(seen) >= count, f"{len(seen)} cases"
    return Counter(seen.values())


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
