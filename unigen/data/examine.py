"""One record judged before training: parsed, its pictures looked at, measured."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from unigen.data.containers import ByteSpan, Raw
from unigen.data.formats import parse_raw
from unigen.sequence.images import PictureError, image_size
from unigen.sequence.types import BadRecord, Image, Origin, Record

Measure = Callable[[Record], Sequence[int]]


class Examined(NamedTuple):
    """A sound record, the field each of its pieces came from, and what ``measure`` returned for it."""

    record: Record
    fields: list[str]
    size: Sequence[int] | None


def examine(
    raw: Raw,
    span: ByteSpan,
    file: Path,
    pictures: Pictures,
    measure: Measure | None = None,
    root: str | Path | None = None,
) -> Examined:
    """Judges what ``read_part`` gave: its format, the header of each of its pictures, and what ``measure``
    says.

    Raises:
        BadRecord: With its origin, and the field of the record.
    """
    origin = Origin(file, span.line or None, span.index)
    fields: list[str] = []
    try:
        record, fields = parse_raw(raw, span.line, origin, root)
        for i, (piece, field) in enumerate(zip(record.sample, fields)):
            if isinstance(piece, Image):
                record.sample[i] = replace(piece, size=pictures.size(piece.source, field))
        return Examined(record, fields, measure(record) if measure else None)
    except BadRecord as error:
        error.origin = error.origin or origin
        kind, _, number = error.field.partition(" ")
        # a measure knows the sample alone
        if kind == "piece" and number.isdecimal() and int(number) < len(fields):
            error.field = fields[int(number)]
        raise


class Pictures:
    """What the headers of pictures said. A path is looked at once; bytes are not compared with each other.

    Attributes:
        sound: Distinct pictures with a good header.
    """

    def __init__(self) -> None:
        self.sound = 0
        self._sizes = Numbers()
        self._errors: dict[str, PictureError] = {}

    def size(self, source: object, field: str) -> tuple[int, int]:
        """``(width, height)`` of the upright picture. Raises BadRecord for one that cannot be used."""
        if isinstance(source, bytes):
            return self._look(source, field)
        name = str(source)
        if name in self._errors:
            raise bad_picture(self._errors[name], field)
        key = key_of(name)
        known = self._sizes.get(key)
        if known is None:
            width, height = self._look(source, field)
            known = self._sizes[key] = width << 32 | height
        return known >> 32, known & 0xFFFFFFFF

    def _look(self, source: object, field: str) -> tuple[int, int]:
        try:
            size = image_size(source)  # type: ignore[arg-type]
        except PictureError as error:
            if not isinstance(source, bytes):
                self._errors[str(source)] = error
            raise bad_picture(error, field) from None
        self.sound += 1
        return size


class Numbers:
    """A dictionary of whole numbers below 2^64, keys above 0, in 32 to 64 bytes an entry; a dict takes about
    130."""

    def __init__(self) -> None:
        self._used, self._mask = 0, 1023
        self._keys, self._values = (array("Q", bytes(8 * 1024)) for _ in range(2))

    def __len__(self) -> int:
        return self._used

    def get(self, key: int) -> int | None:
        at = self._place(key)
        return self._values[at] if self._keys[at] else None

    def __setitem__(self, key: int, value: int) -> None:
        at = self._place(key)
        self._used += not self._keys[at]
        self._keys[at], self._values[at] = key, value
        if 2 * self._used > self._mask:
            keys, values = self._keys, self._values
            self._used, self._mask = 0, 2 * self._mask + 1
            self._keys, self._values = (array("Q", bytes(8 * (self._mask + 1))) for _ in range(2))
            for old, number in zip(keys, values):
                if old:
                    self[old] = number

    def _place(self, key: int) -> int:
        """Where the key is, or would be."""
        at = key & self._mask
        while self._keys[at] and self._keys[at] != key:
            at = (at + 1) & self._mask
        return at


def key_of(name: str) -> int:
    """64 bits that stand for a path; two of ten million distinct ones meet with a chance of 3 in a
    million."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def bad_picture(error: PictureError, field: str, origin: Origin | None = None) -> BadRecord:
    return BadRecord(
        error.code,
        field,
        f"{error.name}: {error.problem}",
        "a picture that can be decoded",
        error.fix,
        origin,
    )
