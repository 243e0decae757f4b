"""``UnifiedGenerationDataset``: files of records, checked once and read again one record at a time.

Only an index stays in memory, some 40 bytes a record: the file, the byte offset and length, the line, and a checksum of the
bytes. JSON lists keep byte offsets just as JSONL files do, so reading a record never parses its neighbours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unigen.config import UserError
from unigen.data.formats import FORMATS, parse_with_fields
from unigen.data.json_text import parse_json, split_json
from unigen.sequence.images import PictureError, image_size, open_image
from unigen.sequence.types import BadRecord, Image, Origin, Record, Sample

log = logging.getLogger(__name__)

AUTO_FULL_CHECK = 5000  # check_pictures="auto" decodes every picture when there are at most this many distinct ones
SHOWN = 20  # bad records that an error message shows; the rest are counted
TASKS = ("text", "understand", "generate", "edit", "interleaved")
_BOM = b"\xef\xbb\xbf"

Measure = Callable[[Record], list[int] | tuple[int, ...]]


class BadData(UserError):
    """Data that a run must not start with. ``records`` holds every :class:`BadRecord` behind it."""

    def __init__(self, message: str, records: list[BadRecord] | None = None):
        self.records = records or []
        super().__init__(message)

    def __reduce__(self):
        return (BadData, (self.args[0], self.records))


class _Span(NamedTuple):
    """Where the bytes of one record lie; a row of the index."""

    file: int
    offset: int
    length: int
    line: int  # 0 where a line holds several records and would not say which
    index: int
    crc: int


class _Index:
    """Rows of :class:`_Span` in compact arrays (a list of tuples would take ten times the memory)."""

    def __init__(self, spans: Iterable[_Span] = ()):
        self._columns = [array("I"), array("Q"), array("Q"), array("Q"), array("Q"), array("I")]
        for span in spans:
            self.append(span)

    def append(self, span: _Span) -> None:
        for column, value in zip(self._columns, span):
            column.append(value)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, i: int) -> _Span:
        return _Span(*(column[i] for column in self._columns))

    def digest(self) -> str:
        return hashlib.sha256(b"".join(column.tobytes() for column in self._columns)).hexdigest()


class UnifiedGenerationDataset:
    """Records in the seven formats, from a JSON or JSONL file, several files, or folders of them.

    Everything is checked at construction: every record is parsed, every picture found and its header read, so that a run does
    not stop after hours at a bad line. Reading a record later is safe from several threads and forked processes.

    Args:
        paths: Files (``.json``, ``.jsonl``) and folders (searched recursively, in sorted order, hidden entries left out).
        on_bad_record: ``error`` raises :class:`BadData` with all bad records; ``skip`` leaves them out, counted and listed.
        check_pictures: Decode every picture (``full``), read their headers only (``headers``), or decode when there are at most
            5,000 distinct ones (``auto``).
        measure: Called with every record; its results are kept in ``sizes``. It may raise BadRecord.
        bad_records_path: With ``skip``, a JSONL file that bad records are appended to.
        max_bad_share: With ``skip``, the share of bad records above which it raises all the same.

    Attributes:
        sizes: What ``measure`` returned, one entry per record; None without ``measure``.
        bad: The bad records that were left out.
        fingerprint: Hexadecimal digest of the files (names, sizes, contents) and of which of their records are in use.

    Raises:
        BadData: Nothing to read, bad records (with ``error``), too many of them (with ``skip``), or a JSON file with a syntax
            error, after which its records cannot be told apart.
    """

    def __init__(
        self,
        paths: str | Path | list[str] | list[Path],
        *,
        on_bad_record: Literal["error", "skip"] = "error",
        check_pictures: Literal["auto", "full", "headers"] = "auto",
        measure: Measure | None = None,
        bad_records_path: Path | None = None,
        max_bad_share: float = 0.01,
    ):
        assert on_bad_record in ("error", "skip") and check_pictures in ("auto", "full", "headers")
        named = _find_files([paths] if isinstance(paths, str | Path) else paths)
        self.files = [path for path, _ in named]
        self._index = _Index()
        self._counts: Counter[tuple[str, str]] = Counter()
        self.sizes: list[list[int] | tuple[int, ...]] | None = None if measure is None else []
        bad: list[tuple[_Span, BadRecord]] = []
        pictures: dict[str, PictureError | None] = {}
        unreadable, contents = [], []
        for number, (path, name) in enumerate(named):
            digest = hashlib.sha256()
            try:
                for span, data in _spans(number, path, digest):
                    try:
                        self._add(span, data, pictures, measure)
                    except BadRecord as error:
                        bad.append((span, error))
            except BadRecord as error:  # the whole file
                error.origin, error.field = Origin(path), "(file)"
                unreadable.append(error)
            contents.append([name, path.stat().st_size, digest.hexdigest()])
        if check_pictures == "full" or (check_pictures == "auto" and len(pictures) <= AUTO_FULL_CHECK):
            bad += self._drop_broken(pictures)
        self._distinct = sum(error is None for error in pictures.values())
        self.bad = [error for _, error in sorted(bad, key=lambda entry: entry[0][:2])]
        self._settle(unreadable, on_bad_record, bad_records_path, max_bad_share)
        self.fingerprint = hashlib.sha256(json.dumps([contents, self._index.digest()]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Record:
        """Record ``i``, read and parsed anew; its pictures are paths that are not opened.

        Raises:
            IndexError: There is no such record.
            BadData: Its file was changed after this data set was built.
        """
        return self._read(i)[0]

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def origin(self, i: int) -> Origin:
        """Where record ``i`` stands, without reading it."""
        return self._origin(self._index[self._checked(i)])

    def statistics(self) -> dict[str, Any]:
        """Counts: records, files, bad records, records per format and per task (see :func:`task`), text and image targets, pictures.

        ``pictures`` counts the image pieces of all records, ``distinct_pictures`` the files behind them.
        """

        def by(topic: str, names: Iterable[str]) -> dict[str, int]:
            return {name: self._counts[topic, name] for name in names if self._counts[topic, name]}

        return {
            "records": len(self),
            "files": len(self.files),
            "bad_records": len(self.bad),
            "formats": by("format", FORMATS),
            "tasks": by("task", TASKS),
            "text_targets": self._counts["pieces", "text_targets"],
            "image_targets": self._counts["pieces", "image_targets"],
            "pictures": self._counts["pieces", "pictures"],
            "distinct_pictures": self._distinct,
        }

    def describe(self) -> str:
        """:meth:`statistics` for a log, several lines."""
        s = self.statistics()

        def table(counts: dict[str, int]) -> str:
            return ", ".join(f"{name} {count:,} ({count / max(len(self), 1):.0%})" for name, count in counts.items())

        left_out = f", {s['bad_records']:,} bad ones left out" if s["bad_records"] else ""
        return "\n".join(
            [
                f"records   {s['records']:,} from {s['files']:,} file{'s' if s['files'] != 1 else ''}{left_out}",
                f"formats   {table(s['formats'])}",
                f"tasks     {table(s['tasks'])}",
                f"targets   {s['text_targets']:,} texts, {s['image_targets']:,} images",
                f"pictures  {s['pictures']:,} ({s['distinct_pictures']:,} distinct files)",
            ]
        )

    # ---- building ----

    def _add(self, span: _Span, data: bytes, pictures: dict[str, PictureError | None], measure: Measure | None) -> None:
        """Checks a record and puts it into the index. Raises BadRecord."""
        origin = self._origin(span)
        try:
            record, fields = parse_with_fields(parse_json(data, span.line), origin)
            for piece, field in zip(record.sample, fields):
                if isinstance(piece, Image):
                    _check_header(str(piece.source), field, pictures)
            size = measure(record) if measure else None
        except BadRecord as error:
            error.origin = error.origin or origin
            raise
        self._index.append(span)
        self._count(record, 1)
        if self.sizes is not None:
            assert size is not None, "measure returned nothing"
            self.sizes.append(size)

    def _drop_broken(self, pictures: dict[str, PictureError | None]) -> list[tuple[_Span, BadRecord]]:
        """Decodes every picture with a good header; takes the records of broken ones out of the index and returns them."""
        sound = [path for path, error in pictures.items() if error is None]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes without the interpreter lock
            broken = {path: error for path, error in zip(sound, pool.map(_decoding_error, sound)) if error is not None}
        if not broken:
            return []
        pictures.update(broken)
        bad, kept = [], []
        for i in range(len(self)):
            record, fields = self._read(i)
            hit = next(((p, f) for p, f in zip(record.sample, fields) if isinstance(p, Image) and str(p.source) in broken), None)
            if hit is None:
                kept.append(i)
                continue
            self._count(record, -1)
            bad.append((self._index[i], _bad_picture(broken[str(hit[0].source)], hit[1], record.origin)))
        self._index = _Index(self._index[i] for i in kept)
        if self.sizes is not None:
            self.sizes = [self.sizes[i] for i in kept]
        return bad

    def _settle(self, unreadable: list[BadRecord], on_bad_record: str, listing: Path | None, max_share: float) -> None:
        """Raises BadData, or writes down what is left out."""
        bad = unreadable + self.bad
        total = len(self) + len(bad)
        if bad and (on_bad_record == "error" or unreadable):
            cure = "Correct them"
            if not unreadable:
                cure += f", or leave them out with on_bad_record=skip (it stops above {max_share:.0%})"
            raise BadData(f"{len(bad):,} of {total:,} records cannot be used:\n{_list(bad)}\n{cure}.", bad)
        if bad and listing is not None:
            listing.parent.mkdir(parents=True, exist_ok=True)
            with listing.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(error.to_dict()) + "\n" for error in bad)
        if len(bad) > max_share * total:
            share = f"{len(bad):,} of {total:,} records ({len(bad) / total:.1%}) cannot be used"
            raise BadData(f"{share}, more than the {max_share:.0%} that may be left out:\n{_list(bad)}\nCorrect them.", bad)
        if not len(self):
            names = ", ".join(map(str, self.files[:5]))
            raise BadData(f"there is no record in {names}. Give files with at least one record.")
        if bad:
            where = f", listed in {listing}" if listing else ""
            log.warning("%d of %d records cannot be used and are left out%s:\n%s", len(bad), total, where, _list(bad))

    def _count(self, record: Record, sign: int) -> None:
        texts = sum(piece.target and not isinstance(piece, Image) for piece in record.sample)
        images = sum(piece.target and isinstance(piece, Image) for piece in record.sample)
        self._counts["format", record.format] += sign
        self._counts["task", task(record.sample)] += sign
        self._counts["pieces", "text_targets"] += sign * texts
        self._counts["pieces", "image_targets"] += sign * images
        self._counts["pieces", "pictures"] += sign * sum(isinstance(piece, Image) for piece in record.sample)

    # ---- reading ----

    def _read(self, i: int) -> tuple[Record, list[str]]:
        span = self._index[self._checked(i)]
        path = self.files[span.file]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # its own descriptor: no file position shared with anyone
        try:
            data = _pread(descriptor, span.length, span.offset)
        finally:
            os.close(descriptor)
        if zlib.crc32(data) != span.crc:
            where = self._origin(span)
            raise BadData(f"{where}: the file was changed while it was in use. Start again, or restore the file.")
        return parse_with_fields(parse_json(data, span.line), self._origin(span))

    def _origin(self, span: _Span) -> Origin:
        return Origin(self.files[span.file], span.line or None, span.index)

    def _checked(self, i: int) -> int:
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"record {i} of a data set of {n}")
        return i % n


def task(sample: Sample) -> str:
    """What a sample teaches, by its targets and its context.

    ``text``: texts, no picture anywhere; ``understand``: texts, with pictures as context; ``generate``: images alone, without
    a context picture; ``edit``: images alone, with a context picture; ``interleaved``: texts and images.
    """
    targets = {type(piece) for piece in sample if piece.target}
    context_picture = any(isinstance(piece, Image) and not piece.target for piece in sample)
    if len(targets) == 2:
        return "interleaved"
    if Image in targets:
        return "edit" if context_picture else "generate"
    return "understand" if context_picture else "text"


def _find_files(paths: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """Absolute paths of the files, each with the name it has in the fingerprint (which a moved folder keeps)."""
    found = []
    for given in paths:
        path = Path(given).absolute()
        if path.is_dir():
            names = sorted(p.relative_to(path) for p in path.rglob("*") if p.suffix in (".json", ".jsonl") and p.is_file())
            names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
            if not names:
                raise BadData(f"{given}: the folder holds no .json or .jsonl file. Name the folder or the files with the records.")
            found += [(path / name, name.as_posix()) for name in names]
        elif not path.is_file():
            problem = "it is not a regular file" if path.exists() else "there is no such file or folder"
            raise BadData(f"{given}: {problem}. Correct the path of the data.")
        elif path.suffix not in (".json", ".jsonl"):
            raise BadData(f"{given}: its name ends neither in .json nor in .jsonl. Rename it: .jsonl for one record a line, else .json.")
        else:
            found.append((path, path.name))
    if not found:
        raise BadData("no data is named. Give a JSON or JSONL file, or a folder of them.")
    return found


def _spans(number: int, path: Path, digest: Any) -> Iterator[tuple[_Span, bytes]]:
    """Every record of a file with its bytes; feeds the file's bytes to ``digest``. Raises BadRecord for an unreadable JSON file."""
    if path.suffix == ".json":
        data = path.read_bytes()
        digest.update(data)
        skip = len(_BOM) if data.startswith(_BOM) else 0
        records = split_json(data[skip:])
        lines = [line for _, _, line in records]
        telling = len(records) == 1 or len(set(lines)) == len(lines)
        for i, (offset, length, line) in enumerate(records):
            part = data[skip + offset : skip + offset + length]
            yield _Span(number, skip + offset, length, line if telling else 0, i, zlib.crc32(part)), part
        return
    offset = index = 0
    with path.open("rb") as file:
        for line, data in enumerate(file, 1):
            digest.update(data)
            start = offset + (len(_BOM) if data.startswith(_BOM) else 0)  # also inside: files joined with cat keep theirs
            part = data[start - offset :].rstrip(b" \t\r\n")
            offset += len(data)
            if part:
                yield _Span(number, start, len(part), line, index, zlib.crc32(part)), part
                index += 1


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    parts = []
    while length > 0 and (part := os.pread(descriptor, length, offset)):  # a read may return less than was asked for
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return b"".join(parts)


def _check_header(path: str, field: str, pictures: dict[str, PictureError | None]) -> None:
    if path not in pictures:
        try:
            image_size(path)
            pictures[path] = None
        except PictureError as error:
            pictures[path] = error
    error = pictures[path]
    if error is not None:
        raise _bad_picture(error, field)


def _decoding_error(path: str) -> PictureError | None:
    try:
        open_image(path)
    except PictureError as error:
        return error
    return None


def _bad_picture(error: PictureError, field: str, origin: Origin | None = None) -> BadRecord:
    return BadRecord(error.code, field, f"{error.name}: {error.problem}", "a picture that can be decoded", error.cure, origin)


def _list(bad: list[BadRecord]) -> str:
    more = f"\n  ... and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
    return "\n".join(f"  {error}" for error in bad[:SHOWN]) + more
