"""One record checked before training: parsed, the headers of its pictures read, its tokens counted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from unigen.data.containers import ByteSpan, Raw
from unigen.data.formats import parse_raw
from unigen.data.mapping import PLAIN, ReadOptions
from unigen.data.nearby import image_root_for, packed_near
from unigen.printing import printable, typed
from unigen.sequence.images import PictureError, bad_picture, image_size
from unigen.sequence.lengths import RecordLengths
from unigen.sequence.types import BadRecord, Image, Origin, Record, without_trace

# the field of texts -> the program of jq that puts <image> in the place of <img>: of Qwen-VL, where the path
# stands inside, and of OmniGen, where its number does
_WITH_IMG = {
    "conversations": '.images = [.conversations[].value | scan("<img>(.*?)</img>")[0]]'
    ' | .conversations[].value |= gsub("<img>.*?</img>"; "<image>")',
    "instruction": r'.instruction |= gsub("(<img>)?<\\|image_[0-9]+\\|>(</img>)?"; "<image>")',
}
FileStamp = list[int] | None
CountTokens = Callable[[Record], RecordLengths]


class Examined(NamedTuple):
    """A sound record, the field each of its segments came from, and its token lengths where they were
    counted."""

    record: Record
    fields: list[str]
    lengths: RecordLengths | None


def examine(
    raw: Raw,
    span: ByteSpan,
    file: Path,
    pictures: PictureHeaders,
    token_lengths: CountTokens | None = None,
    read: ReadOptions = PLAIN,
) -> Examined:
    """Checks a record that ``read_part`` gave: its format, the headers of its pictures, its token lengths.

    Raises:
        BadRecord: With its origin, and the field of the record.
    """
    origin = Origin(file, span.line or None, span.index)
    fields: list[str] = []
    try:
        record, fields = parse_raw(raw, span.line, origin, read)
        for i, (segment, field) in enumerate(zip(record.sample, fields)):
            if isinstance(segment, Image):
                record.sample[i] = replace(segment, size=_size(segment, field, pictures, file, read))
        return Examined(record, fields, token_lengths(record) if token_lengths else None)
    except BadRecord as error:
        locate(error, origin, fields)
        raise


def locate(error: BadRecord, origin: Origin, fields: list[str]) -> None:
    """Fills in the place of an error, and for tags of other trainers the fix."""
    error.locate(origin, fields)
    if error.code != "tag_without_picture":
        return
    program, kind = _WITH_IMG.get(error.field.partition("[")[0]), origin.file.suffix.lower()
    if "<image>" in error.found.lower() and "<image>" not in error.found:
        error.fix = "write <image> there, in small letters, or learn it as text: --allow_control_tokens"
    elif "<bbox>" in error.found or "<ref-object>" in error.found:
        error.fix = "write names and boxes into the text, or learn the tag as text: --allow_control_tokens"
    elif ("<img>" in error.found or "<|image_" in error.found) and program and kind in (".json", ".jsonl"):
        each = ".[] | " if kind == ".json" else ""
        error.fix = f"write <image> there: jq -c '{each}{program}' OLD > NEW.jsonl"


def _size(
    segment: Image, field: str, pictures: PictureHeaders, file: Path, read: ReadOptions
) -> tuple[int, int]:
    """The size of a picture; a missing one, where none was found yet, is looked for nearby. Raises
    BadRecord."""
    try:
        return pictures.size(segment.source, field)
    except BadRecord as error:
        if error.code == "missing_picture" and not pictures.sound:
            root = image_root_for(str(segment.source), file, read)
            packed = None if root else packed_near(str(segment.source), file)
            if packed:
                error.fix = f"unpack {printable(packed)}, and give its folder as --image_root"
            if root:
                error.fix = f"it lies in {printable(root)}: give --image_root {typed(printable(root))}"
        raise


class PictureHeaders:
    """What the headers of pictures said. A path is looked at once; bytes are not compared with each other.

    Attributes:
        sound: Distinct pictures with a good header.
        faulty: Paths of others that were asked for, each with its :func:`stamp` when it was looked at; who
            wants those of a part of the data sets it.
        folders: Where the pictures lie that were asked for, set likewise.
    """

    def __init__(self) -> None:
        self.sound = 0
        # by key_of, about 110 bytes a picture: names would take more, and the few sizes there are are shared
        self._sizes: dict[int, tuple[int, int]] = {}
        self._shared: dict[tuple[int, int], tuple[int, int]] = {}
        self._errors: dict[str, tuple[PictureError, FileStamp]] = {}
        self.faulty: dict[str, FileStamp] = {}
        self.folders: set[str] = set()

    def size(self, source: object, field: str) -> tuple[int, int]:
        """``(width, height)`` of the upright picture. Raises BadRecord for one that cannot be used."""
        name, key = "", 0  # bytes have none
        if not isinstance(source, bytes):
            name = str(source)
            key = key_of(name)
            self.folders.add(os.path.dirname(name))
        if key in self._sizes:
            return self._sizes[key]
        if name not in self._errors:
            try:
                size = image_size(source)  # type: ignore[arg-type]
            except PictureError as error:
                if not name:
                    raise bad_picture(error, field) from None
                self._errors[name] = without_trace(error), stamp(name)
            else:
                self.sound += 1
                if name:
                    self._sizes[key] = self._shared.setdefault(size, size)
                return size
        error, self.faulty[name] = self._errors[name]
        raise bad_picture(error, field)


def stamp(path: str | Path) -> FileStamp:
    """What tells whether a file is the one that was read: size, times, inode. None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a name that no file can have
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def hash_of(value: bytes) -> int:
    """64 bits that tell ``value`` from others, never 0, which stands for nothing; two of ten million distinct
    ones meet with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little") or 1


def key_of(name: str) -> int:
    """:func:`hash_of` a path."""
    return hash_of(name.encode("utf-8", "surrogateescape"))
