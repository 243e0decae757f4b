"""CSV and TSV files: the first line names the fields, every further one is a record; quoted texts may go over
several lines."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from unigen.data.captions import is_picture
from unigen.data.json_text import MAX_RECORD, decode
from unigen.data.keys import in_text
from unigen.sequence.types import BadRecord

_BOM = b"\xef\xbb\xbf"


class Header(NamedTuple):
    """The first line of a file."""

    names: list[str]
    delimiter: str
    end: int  # the byte behind it


class Lines:
    """The lines of a file from where it stands, decoded, and how much of it was read."""

    def __init__(self, file: Iterable[bytes], offset: int, line: int, digest: Any = None):
        self._file, self.offset, self.line, self._digest = iter(file), offset, line, digest

    def __iter__(self) -> Iterator[str]:
        for data in self._file:
            if len(data) > MAX_RECORD:
                raise ValueError(f"line {self.line} is longer than {MAX_RECORD:,} bytes")
            if self._digest is not None:
                self._digest.update(data)
            text = decode(data, self.line)
            self.offset, self.line = self.offset + len(data), self.line + 1
            yield text


def read_header(file: BinaryIO, suffix: str, digest: Any = None) -> Header:
    """Raises BadRecord where the first line names no fields, or one twice."""
    first = file.readline(MAX_RECORD)
    if digest is not None:
        digest.update(first)
    text = decode(first.removeprefix(_BOM), 1).rstrip("\r\n")
    delimiter = "\t"
    if suffix == ".csv":
        delimiter = next((mark for mark in ",;\t" if mark in text), ",")
    csv.field_size_limit(MAX_RECORD)
    fix = "write a first line with a name for each column, such as image,text"
    try:
        names = next(csv.reader([text], delimiter=delimiter), [])
    except csv.Error:  # a line may not end in CR alone
        names, fix = [], "save it with line ends of LF (or CR LF) and a first line such as image,text"
    if any(is_picture(Path(name)) for name in names):
        found = f"a record in the first line ({', '.join(names)[:60]})"
        raise BadRecord("bad_csv", "(file)", found, "a name for each column", fix)
    if not names or "" in names or len(set(names)) < len(names) or len(first) == MAX_RECORD:
        raise BadRecord("bad_csv", "(file)", f"the first line {text[:60]!r}", "a name for each column", fix)
    return Header(names, delimiter, len(first))


def rows(lines: Lines, header: Header) -> Iterator[dict[str, Any]]:
    """The records from there on, without empty cells: texts, and values where a column says what is learnt.
    Raises BadRecord, or ValueError."""
    csv.field_size_limit(MAX_RECORD)
    reader = csv.reader(lines, delimiter=header.delimiter, strict=True)
    try:
        start = lines.line
        for cells in reader:
            if cells and len(cells) != len(header.names):
                found = f"{len(cells)} cells at line {start}"
                expected = f"{len(header.names)}, as the first line has ({', '.join(header.names)[:60]})"
                fix = 'put texts that hold the separator into quotes ("..."), or name the columns there'
                raise BadRecord("bad_csv", "(file)", found, expected, fix)
            yield {name: in_text(name, cell) for name, cell in zip(header.names, cells) if cell}
            start = lines.line
    except csv.Error as error:
        raise ValueError(f"line {lines.line}: {error}") from None


def row_at(path: Path, offset: int, length: int) -> dict[str, Any]:
    """The record of the bytes at a place."""
    status = path.stat()
    header = _header(path, status.st_mtime_ns, status.st_size)
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    return next(rows(Lines(data.splitlines(keepends=True), offset, 1), header))


@lru_cache(256)
def _header(path: Path, changed: int, size: int) -> Header:
    with path.open("rb") as file:
        return read_header(file, path.suffix.lower())
