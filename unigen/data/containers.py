"""Kinds of files, and nothing about what their records mean: cutting them into parts, reading records.

One table, :data:`CONTAINERS`. A record comes out as ``Raw``: the bytes of its JSON text, or the row of a
table as a dict.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from unigen.config import UserError
from unigen.data import captions, delimited, tables, tar
from unigen.data.json_text import HEAD, MAX_RECORD, check_lines, split_json
from unigen.data.unpack import PACKED, open_packed
from unigen.foreign import known_mistake
from unigen.plugins import Registry
from unigen.sequence.types import BadRecord, Origin

Raw = bytes | dict[str, Any]

PART = 8 << 20  # bytes of a JSON Lines file that are read as one part
MAX_LINE = 256 << 20  # bytes; a longer line is no record but a file of another kind
MAX_JSON = 2 << 30  # bytes of a .json file, which is read whole
_DAMAGE = (OSError, EOFError, ValueError, LookupError, NotImplementedError, MemoryError, zlib.error)
_BOM = b"\xef\xbb\xbf"
_BLANK_LINE = re.compile(rb"^(?:\xef\xbb\xbf)?[ \t\r]*\n", re.MULTILINE)  # what _content finds nothing in


class BadData(UserError):
    """Data that a run must not start with. ``records`` holds every :class:`BadRecord` behind it."""

    def __init__(self, message: str, records: list[BadRecord] | None = None):
        self.records = records or []
        super().__init__(message)

    def __reduce__(self):
        return (BadData, (self.args[0], self.records))


def no_record(files: Sequence[Path], unlearnt: int = 0) -> BadRecord:
    """What is wrong with files that hold no record at all, or nothing but records of weight 0."""
    if unlearnt:
        found, fix = f"a weight of 0 in all {unlearnt:,} records", "give some a weight above 0"
        return BadRecord("no_target", "(file)", found, "a record that is learnt", fix, Origin(files[0]))
    names = ", ".join(map(str, files[:5]))
    found, fix = f"there is no record in {names}", "give files with at least one record"
    return BadRecord("no_record", "(file)", found, "at least one record", fix, Origin(files[0]))


class ByteSpan(NamedTuple):
    """Where one record lies; a row of an index."""

    file: int
    offset: int  # byte in the (unpacked) file; of a table the key of the group
    length: int  # bytes; of a table the row in its group
    line: int  # 0 where a line holds several records and would not say which, and in tables
    index: int  # of the record in its file, from 0
    crc: int  # of its contents


class FilePart(NamedTuple):
    """A portion of a file that can be read without the others, in any order and in another process."""

    path: Path
    file: int
    source: Path  # what is read: the file, or its unpacked copy
    start: int = 0  # byte, or key of a group
    stop: int | None = None  # byte; None to the end
    line: int = 1  # number of its first line
    index: int = 0  # of its first record
    size: int = 0  # bytes it stands for, for progress: those of all parts make about the size of the file


class Container(NamedTuple):
    """How files of one kind are cut and read."""

    cut: Callable[[FilePart, int], Iterator[FilePart]]
    walk: Callable[[FilePart, Any], Iterator[tuple[ByteSpan, Raw]]]
    group: Callable[[Path, int], Any] | None = None  # tables: reads the group of a key
    runs: bool = False  # reading a record costs reading its group
    # Where a record is not the bytes at its place: what they say (file, offset, length).
    record: Callable[[Path, int, int], Raw] | None = None


# ---- reading through


def parts(path: Path, number: int, size: int = PART, source: Path | None = None) -> Iterator[FilePart]:
    """Portions of a file for reading in parallel; together they hold every record once, in order.

    JSON Lines files are cut at line ends near every ``size`` bytes, tables by their groups; other files are
    one part. The generator reads a JSON Lines file once, to count its lines, and yields a part as soon as it
    is known.

    ``path`` comes from :func:`find_files`; ``source`` is the unpacked copy of a compressed file, which is cut
    like any other (``Reader.source`` has it).

    Raises:
        BadRecord: ``broken_file`` or ``unreadable_file``, with origin: the whole file, or what is left of it,
            is lost.
    """
    source = source or path
    with explained(path):
        whole = FilePart(path, number, source, size=source.stat().st_size)
        if is_packed(source):
            yield whole
        else:
            yield from container_of(path).cut(whole, size)


def read_part(part: FilePart, digest: Any = None) -> Iterator[tuple[ByteSpan, Raw]]:
    """Every record of a part. ``digest`` is a ``hashlib`` object that the contents are fed to; parts in order
    give the digest of the file.

    Raises:
        BadRecord: ``broken_file``, ``unreadable_file``, or ``bad_json`` and ``bad_utf8`` of a ``.json`` file,
            with field "(file)" and origin: what follows in this part is lost.
    """
    with explained(part.path):
        yield from container_of(part.path).walk(part, digest)


def feed(raw: Raw | Any, update: Callable[[bytes], Any]) -> None:
    """Feeds a record to ``update``, so that different records give different bytes."""
    if isinstance(raw, bytes):
        update(raw)
    elif isinstance(raw, str):
        update(raw.encode("utf-8", "surrogatepass"))
    elif isinstance(raw, dict | list | tuple):
        pairs = raw.items() if isinstance(raw, dict) else enumerate(raw)
        for key, value in pairs:
            length = len(value) if isinstance(value, bytes | str | dict | list | tuple) else -1
            update(f"{key!r}:{type(value).__name__}{length}=".encode("utf-8", "backslashreplace"))
            feed(value, update)
    else:
        update(repr(raw).encode("utf-8", "backslashreplace"))


def crc_of(raw: Raw) -> int:
    """CRC-32 of a record's contents."""
    if isinstance(raw, bytes):
        return zlib.crc32(raw)
    crc = 0

    def update(data: bytes) -> None:
        nonlocal crc
        crc = zlib.crc32(data, crc)

    feed(raw, update)
    return crc


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what reading a damaged file raises into BadRecord, and gives a BadRecord of the whole file its
    place."""
    try:
        yield
    except BadRecord as error:
        error.origin, error.field = Origin(path), "(file)"
        raise
    except UserError:
        raise
    except _DAMAGE as error:
        code, expected = "broken_file", "a whole file"
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        found = f"truncated or damaged contents ({told})"
        fix = "fetch or make the file again; what follows the damage cannot be read"
        if isinstance(error, OSError) and error.errno:
            if error.strerror:
                code, expected = "unreadable_file", "a file that can be read"
                found, fix = error.strerror, "check the path and the permissions"
        elif mistake := _mistake(path):
            found, fix = mistake
        raise BadRecord(code, "(file)", found, expected, fix, Origin(path)) from error


def _mistake(path: Path) -> tuple[str, str] | None:
    """What commonly stands in a file's place, and the fix; None where it is something else."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    return None if is_packed(path) and start else known_mistake(start)


@contextmanager
def _opened(part: FilePart) -> Iterator[BinaryIO]:
    with open_packed(part.source) if is_packed(part.source) else part.source.open("rb") as file:
        yield file


def _cut_lines(whole: FilePart, size: int) -> Iterator[FilePart]:
    start, line, index = 0, 1, 0
    with whole.source.open("rb") as file:
        while block := file.read(size):
            if not start:
                check_lines(block)
            last, ended = block.rfind(b"\n") + 1, block.endswith(b"\n")
            read, lines = len(block), block.count(b"\n")
            if not ended:  # the rest of its last line
                rest, more, ended = _line(file)
                read, lines = read + more, lines + ended
                length = read - last - ended
                if length > MAX_LINE:
                    raise _too_long(line + lines - ended)
                block = block + rest if length <= MAX_RECORD else block[:last]  # a longer one is not blank
            yield whole._replace(start=start, stop=start + read, line=line, index=index, size=read)
            start, line, index = start + read, line + lines, index + lines - _blank_lines(block)


def _line(file: BinaryIO, update: Callable[[bytes], Any] = lambda data: None) -> tuple[bytes, int, bool]:
    """The next line, of which ``MAX_RECORD`` bytes and one more are kept at most: those, how many it has (not
    counted far above ``MAX_LINE``), and whether it ended."""
    kept = data = file.readline(MAX_RECORD + 1)
    size = len(kept)
    update(data)
    while data and not data.endswith(b"\n") and size <= MAX_LINE:
        data = file.readline(1 << 20)
        size += len(data)
        update(data)
    return kept, size, data.endswith(b"\n")


def _too_long(line: int) -> ValueError:
    return ValueError(f"line {line} is longer than {MAX_LINE:,} bytes")


def _blank_lines(block: bytes) -> int:
    """Lines of a block that hold no record; a block without any costs a few scans."""
    if block[:1] in b" \t\r\n" or any(mark in block for mark in (b"\n\n", b"\n\r", b"\n ", b"\n\t", _BOM)):
        return len(_BLANK_LINE.findall(block))
    return 0


def _content(line: bytes) -> tuple[int, bytes]:
    """Where the record of a line starts, and its bytes."""
    skip = len(_BOM) if line.startswith(_BOM) else 0  # also inside a file: files joined with cat keep theirs
    return skip, line[skip:].rstrip(b" \t\r\n")


def _walk_lines(part: FilePart, digest: Any) -> Iterator[tuple[ByteSpan, Raw]]:
    if is_packed(part.source):  # others were looked at when they were cut
        with _opened(part) as file:
            check_lines(file.read(HEAD))
    offset, index, line = part.start, part.index, part.line
    with _opened(part) as file:
        if part.start:
            file.seek(part.start)
        while part.stop is None or offset < part.stop:
            data, size, ended = _line(file, (lambda data: None) if digest is None else digest.update)
            if not size:
                break
            if size - ended > MAX_LINE:
                raise _too_long(line)
            # of a record that is too long its beginning stands for it: it is refused for its length
            skip, content = _content(data) if size - ended <= MAX_RECORD else (0, data)
            if content:
                yield (
                    ByteSpan(part.file, offset + skip, len(content), line, index, zlib.crc32(content)),
                    content,
                )
                index += 1
            offset, line = offset + size, line + 1
    if part.stop is not None and offset != part.stop:
        raise ValueError("it was changed while it was read")


def _walk_json(part: FilePart, digest: Any) -> Iterator[tuple[ByteSpan, Raw]]:
    with _opened(part) as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        found, expected = f"more than {MAX_JSON:,} bytes", "a .json file that can be read whole"
        fix = "save it as .jsonl, one record a line: such a file may have any size"
        raise BadRecord("huge_file", "(file)", found, expected, fix)
    if digest is not None:
        digest.update(data)
    skip = len(_BOM) if data.startswith(_BOM) else 0
    records, broken = split_json(data[skip:])
    lines = [line for _, _, line in records]
    telling = len(records) == 1 or len(set(lines)) == len(lines)
    for i, (offset, length, line) in enumerate(records):
        content = data[skip + offset : skip + offset + length]
        yield (
            ByteSpan(part.file, skip + offset, length, line if telling else 0, i, zlib.crc32(content)),
            content,
        )
    if broken:
        raise broken


def _cut_groups(
    groups: Callable[[Path], Iterable[tables.Group]], whole: FilePart, size: int
) -> Iterator[FilePart]:
    index = 0
    for key, rows, of in groups(whole.source):
        yield whole._replace(start=key, index=index, size=of)
        index += rows


def _walk_rows(
    rows: Callable[[Path, int], Iterator[tables.TableRow]], part: FilePart, digest: Any
) -> Iterator[tuple[ByteSpan, Raw]]:
    for i, row in enumerate(rows(part.source, part.start)):
        if digest is not None:
            feed(row, digest.update)
        yield ByteSpan(part.file, part.start, i, 0, part.index + i, crc_of(row)), row


def _one_part(whole: FilePart, size: int) -> Iterator[FilePart]:
    yield whole


def _walk_delimited(part: FilePart, digest: Any) -> Iterator[tuple[ByteSpan, Raw]]:
    with part.source.open("rb") as file:
        header = delimited.read_header(file, part.path.suffix.lower(), digest)
        lines = delimited.Lines(file, header.end, 2, digest)
        offset, line, index = lines.offset, lines.line, 0
        for row in delimited.rows(lines, header):
            if row:
                yield ByteSpan(part.file, offset, lines.offset - offset, line, index, crc_of(row)), row
                index += 1
            offset, line = lines.offset, lines.line


def _cut_tar(whole: FilePart, size: int) -> Iterator[FilePart]:
    start = index = count = 0
    end = 0
    for run in tar.runs(whole.source):
        if count and run.offset - start >= size:
            yield whole._replace(start=start, stop=run.offset, index=index, size=run.offset - start)
            start, index, count = run.offset, index + count, 0
        count, end = count + 1, run.offset + run.length
    if count:
        yield whole._replace(start=start, stop=end, index=index, size=end - start)


def _walk_tar(part: FilePart, digest: Any) -> Iterator[tuple[ByteSpan, Raw]]:
    index = part.index
    for run in tar.runs(part.source, part.start, part.stop):
        row = tar.row_at(part.source, run.offset, run.length)
        if digest is not None:
            feed(row, digest.update)
        yield ByteSpan(part.file, run.offset, run.length, 0, index, crc_of(row)), row
        index += 1


def _walk_caption(part: FilePart, digest: Any) -> Iterator[tuple[ByteSpan, Raw]]:
    data, row = captions.row_of_picture(part.source)
    if digest is not None:
        digest.update(data)
    yield ByteSpan(part.file, 0, len(data), 0, 0, crc_of(row)), row


_DELIMITED = Container(_one_part, _walk_delimited, record=delimited.row_at)
_PICTURE = Container(
    _one_part, _walk_caption, record=lambda path, offset, length: captions.row_of_picture(path)[1]
)

CONTAINERS: Registry[Container] = Registry(
    {
        ".jsonl": Container(_cut_lines, _walk_lines),
        ".json": Container(_one_part, _walk_json),
        ".parquet": Container(
            partial(_cut_groups, tables.parquet_groups),
            partial(_walk_rows, tables.parquet_rows),
            tables.parquet_group,
            runs=True,
        ),
        ".arrow": Container(
            partial(_cut_groups, tables.arrow_groups),
            partial(_walk_rows, tables.arrow_rows),
            tables.arrow_group,
        ),
        ".csv": _DELIMITED,
        ".tsv": _DELIMITED,
        ".tar": Container(_cut_tar, _walk_tar, record=tar.row_at),
    }
)


def kind_of(path: Path) -> str | None:
    """The key of a file in CONTAINERS; None where it is of no known kind."""
    kind = path.suffix.lower()
    if kind in PACKED:
        kind = Path(path.stem).suffix.lower()
        return kind if kind in (".json", ".jsonl") else None
    return kind if kind in CONTAINERS else None


def container_of(path: Path) -> Container:
    if captions.is_picture(path):
        return _PICTURE
    kind = kind_of(path)
    assert kind is not None, f"{path} did not come from find_files"
    return CONTAINERS[kind]


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in PACKED
