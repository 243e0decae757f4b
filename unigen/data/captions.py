"""A folder of pictures with texts beside them: ``a.png`` and ``a.txt`` are a record, the picture stands for
its file, and its text is what is read."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from pathlib import Path

from unigen.data.json_text import BrokenRow, decode
from unigen.data.words import Json
from unigen.printing import printable
from unigen.sequence.types import BadRecord

PICTURES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2",
    ".jfif", ".jpe", ".tga", ".ppm",
)  # fmt: skip
NO_PICTURES = (".heic", ".heif", ".jxl", ".svg", ".psd")
"""Endings of pictures of kinds that cannot be read."""
CAPTIONS = (".txt", ".caption")
_WRITTEN = [written for end in CAPTIONS for written in (end, end.upper(), end.title())]
MAX_CAPTION = 1 << 20  # bytes

_SHARD = 5  # digits, at least, of the number of a shard of img2dataset


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def caption_of(picture: Path) -> Path | None:
    """The file of its text, of several that of the first of :data:`CAPTIONS`; None where there is none."""
    return next((path for end in _WRITTEN if (path := picture.with_suffix(end)).is_file()), None)


def with_texts(names: Iterable[str]) -> set[str]:
    """The pictures among the files of one folder that have a text there, without their endings. A JSON file
    of such a name describes the picture, as img2dataset writes it."""
    ends = [os.path.splitext(name) for name in names]
    texts = {stem for stem, end in ends if end.lower() in CAPTIONS}
    return {stem for stem, end in ends if end.lower() in PICTURES and stem in texts}


def describing_tables(names: Iterable[Path], pictured: Container[Path]) -> list[Path]:
    """The tables that describe pictures with texts in folders of their names, as img2dataset writes
    ``00000.parquet`` beside ``00000``: those whose folder is one of ``pictured``, which have such pictures,
    and beside them those of other shards, of which no picture could be had. Numbers of shards have five
    digits or more."""
    tables = [name for name in names if name.suffix == ".parquet" and name.stem.isdecimal()]
    sure = [name for name in tables if name.with_suffix("") in pictured]
    of_shards = {name.parent for name in sure if len(name.stem) >= _SHARD}
    return [
        name for name in tables if name in sure or (len(name.stem) >= _SHARD and name.parent in of_shards)
    ]


def row_of_picture(picture: Path) -> tuple[bytes, Json]:
    """The bytes of a picture's text, and the record of the two; without a file of its text it has none. A
    text that cannot be read spoils its own record."""
    try:
        picture.name.encode()
    except UnicodeEncodeError:
        found = f"a file name that is no UTF-8, {printable(picture.name)}"
        return b"", BrokenRow(BadRecord("bad_path", "image", found, "a name in UTF-8", "rename the file"), {})
    path = caption_of(picture)
    if path is None:
        return b"", {"image": picture.name, "text": ""}
    with path.open("rb") as file:
        data = file.read(MAX_CAPTION + 1)
    made: Json = {"image": picture.name}
    try:
        if len(data) > MAX_CAPTION:
            found, expected = f"more than {MAX_CAPTION:,} bytes", "what the picture shows"
            raise BadRecord("huge_record", "text", found, expected, "write a shorter text")
        made["text"] = decode(data.removeprefix(b"\xef\xbb\xbf"), 1).strip()
    except BadRecord as error:
        error.field, error.found = "text", f"in {path.name}: {error.found}"
        return data, BrokenRow(error, made | {"text": data})
    return data, made
