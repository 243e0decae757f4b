"""CSV and TSV files: the first line names the fields, every further one is a record; quoted texts may go over
several lines."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from unigen.data.captions import is_picture
from unigen.data.json_text import MAX_RECORD, BrokenRow, decode, refuse_utf16
from unigen.data.keys import in_text
from unigen.data.words import cut
from unigen.sequence.types import BadRecord

_BOM = b"\xef\xbb\xbf"
_MOST_LINES = 1000  # of a quoted text of TSV
_CELL = re.compile(r'(?:^|\t)(?:"([^"]*(?:""[^"]*)*)"(?=\t|\Z)|([^\t]*))')  # of TSV: quoted, or as it is


class Header(NamedTuple):
    """The first line of a file."""

    names: list[str]
    delimiter: str
    end: int  # the byte behind it
    blanks: bool  # each separator has a blank behind it, which is no part of what follows


class Lines:
    """The lines of a file from where it stands, decoded, and how much of it was read.

    Attributes:
        data: The bytes of the line that was read last.
        error: What is wrong with the bytes of a line since this was last None.
    """

    def __init__(self, file: Iterable[bytes], offset: int, line: int, digest: Any = None):
        self._file, self.offset, self.line, self._digest = iter(file), offset, line, digest
        self._again: list[bytes] = []
        self.data = b""
        self.error: BadRecord | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again:
            data = self._again.pop()
        else:
            data = next(self._file)
            if len(data) > MAX_RECORD:
                raise ValueError(f"line {self.line} is longer than {MAX_RECORD:,} bytes")
            if self._digest is not None:
                self._digest.update(data)
        self.data = data
        self.offset, self.line = self.offset + len(data), self.line + 1
        try:
            return decode(data, 0)
        except BadRecord as error:
            self.error = error
            return self.last

    @property
    def last(self) -> str:
        """The line that was read last."""
        return self.data.decode("utf-8", "replace")

    def back(self, lines: list[bytes]) -> None:
        """Puts the last lines back, to be read again."""
        self._again += reversed(lines)
        self.offset, self.line = self.offset - sum(map(len, lines)), self.line - len(lines)


def read_header(file: BinaryIO, suffix: str, digest: Any = None) -> Header:
    """Raises BadRecord where the first line names no fields, or one twice."""
    first = file.readline(MAX_RECORD)
    if digest is not None:
        digest.update(first)
    refuse_utf16(first)
    text = decode(first.removeprefix(_BOM), 1).rstrip("\r\n")
    delimiter = "\t"
    if suffix == ".csv":
        delimiter = next((mark for mark in ",;\t|" if mark in text), ",")
    csv.field_size_limit(MAX_RECORD)
    fix = "write a first line with a name for each column, such as image,text"
    try:
        names = next(csv.reader([text], delimiter=delimiter, skipinitialspace=True), [])
        names = [name.strip() for name in names]
    except csv.Error:  # a line may not end in CR alone
        names, fix = [], "save it with line ends of LF (or CR LF) and a first line such as image,text"
    if any(is_picture(Path(name)) or "://" in name for name in names):
        given = {True: "url" if "://" in "".join(names) else "image", False: "caption"}
        if len(names) == 2:
            told = delimiter.join(given[is_picture(Path(name)) or "://" in name] for name in names)
            fix += f", here: sed -i '1i {told}' FILE".replace("\t", "\\t")
        found = f"a record in the first line ({', '.join(names)[:60]})"
        raise BadRecord("bad_csv", "(file)", found, "a name for each column", fix)
    if len(names) > 1 and not names[0]:  # the index that pandas writes
        names[0] = "Unnamed: 0"
    if not names or "" in names or len(set(names)) < len(names) or len(first) == MAX_RECORD:
        raise BadRecord("bad_csv", "(file)", f"the first line {text[:60]!r}", "a name for each column", fix)
    return Header(names, delimiter, len(first), 0 < text.count(f"{delimiter} ") == len(names) - 1)


def rows(lines: Lines, header: Header) -> Iterator[dict[str, Any]]:
    """The records from there on, without empty cells: texts, and values where a column says what is learnt. A
    row that cannot be read is a ``BrokenRow``.

    Raises:
        BadRecord: A quote is never closed: what follows cannot be told apart.
        ValueError: A line, or a cell, is too long.
    """
    csv.field_size_limit(MAX_RECORD)
    reader = csv.reader(lines, delimiter=header.delimiter, strict=True, skipinitialspace=header.blanks)
    source = _tabbed(lines, len(header.names)) if header.delimiter == "\t" else reader
    while True:
        start, lines.error = lines.line, None
        try:
            cells = next(source, None)
        except csv.Error as error:
            yield _unquoted(error, lines, start)
            continue
        if cells is None:
            return
        problem = lines.error
        if cells and len(cells) != len(header.names):
            expected = f"{len(header.names)}, as the first line has ({', '.join(header.names)[:60]})"
            fix = 'put texts that hold the separator into quotes ("..."), or name the columns there'
            problem = BadRecord("bad_csv", "(record)", f"{len(cells)} cells", expected, fix)
        if problem is not None:
            yield BrokenRow(problem, {str(i): cell for i, cell in enumerate(cells)})
        else:
            yield {name: in_text(name, cell) for name, cell in zip(header.names, cells) if cell}


def _unquoted(error: csv.Error, lines: Lines, start: int) -> BrokenRow:
    """The row of CSV whose quotes break the rules. Raises as :func:`rows` does."""
    fix = 'put the whole text into quotes, and double those inside of it ("a ""red"" disc")'
    if "end of data" in str(error):
        found = f'a quote (") in the record at line {start} that nothing closes'
        raise BadRecord("bad_csv", "(file)", found, "texts whose quotes are closed", fix) from None
    if "limit" in str(error):
        raise ValueError(f"line {start}: {error}") from None
    found, expected = f'a quote (") inside of a text, at {cut(lines.last.strip())}', "texts whole in quotes"
    if '"' not in lines.last:
        found, expected, fix = str(error), "lines of text", "save the file with line ends of LF (or CR LF)"
    return BrokenRow(BadRecord("bad_csv", "(record)", found, expected, fix), {"row": lines.last})


def _tabbed(lines: Lines, width: int) -> Iterator[list[str]]:
    """The cells of each row of TSV. A cell is quoted only where the quotes hold all of it: such a text may go
    over several lines, of which none is a row by itself."""
    for text in lines:
        cells = _cells(text, width)
        if lines.error is None and text.count('"') % 2 and any(cell.startswith('"') for cell in cells):
            whole, more = text, list[bytes]()
            for line in islice(lines, _MOST_LINES):
                more.append(lines.data)
                whole += line
                if lines.error is not None or len(_cells(line, width)) == width:
                    break
                if whole.count('"') % 2 == 0 and len(found := _cells(whole, width, False)) == width:
                    cells, more = found, []
                    break
            lines.back(more)
            lines.error = None
        yield cells


def _cells(text: str, width: int, literal: bool = True) -> list[str]:
    text = text.rstrip("\r\n")
    cells = [quoted.replace('""', '"') or plain for quoted, plain in _CELL.findall(text)] if text else []
    return text.split("\t") if literal and cells and len(cells) != width else cells


def row_at(path: Path, offset: int, length: int) -> dict[str, Any]:
    """The record of the bytes at a place."""
    status = path.stat()
    header = _header(path, status.st_mtime_ns, status.st_size)
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    return next(rows(Lines(io.BytesIO(data), offset, 1), header))


@lru_cache(256)
def _header(path: Path, changed: int, size: int) -> Header:
    with path.open("rb") as file:
        return read_header(file, path.suffix.lower())
