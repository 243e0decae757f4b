"""Records with addresses in, records with files out: where pictures are named, and the new data of ``unigen
fetch``."""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from unigen.bars import Bar
from unigen.commands.fetch.addresses import FetchError, masked, parse_url
from unigen.commands.fetch.store import FETCH, PictureStore
from unigen.config import UserError
from unigen.data.containers import parts, read_part
from unigen.data.embedded import Address
from unigen.data.formats import parse_with_fields, record_value
from unigen.data.keys import Unlearnt, all_learnt
from unigen.data.mapping import PLAIN, ReadOptions
from unigen.files import json_of, sha256_of
from unigen.outputs import read_receipt, write_receipt
from unigen.sequence.types import BadRecord, Image, Origin, Record

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")  # a name or a number on the way to a field


class RewrittenFile(NamedTuple):
    """A file of records, and the file of the new data."""

    path: Path
    target: Path
    read: ReadOptions = PLAIN


class Place(NamedTuple):
    """Where a record names a picture: ``holder[key]`` is what to replace."""

    holder: Any
    key: Any
    value: str | bytes | Address
    field: str


class Read(NamedTuple):
    """A record that was read: where, its bytes where it has any, its value, and where it names pictures; or
    what is wrong with it."""

    origin: Origin
    raw: bytes | None
    value: Any
    places: list[Place]
    problem: BadRecord | None = None
    learnt: bool = True  # False: it says that nothing of it is


def records(source: RewrittenFile) -> Iterator[Read]:
    """Every record of a file, under the names that the formats know. What training could not use is a
    problem."""
    plain = replace(source.read, fields={})
    for part in parts(source.path, 0):
        for span, raw in read_part(part):
            origin = Origin(source.path, span.line or None, span.index)
            text = raw if isinstance(raw, bytes) and not source.read.fields else None
            try:
                value = record_value(raw, span.line)
                if source.read.fields and isinstance(value, dict):
                    value, _ = source.read.renamed(value)
                record, fields = parse_with_fields(value, origin, plain, addresses=True)
            except Unlearnt:  # training leaves it out: nothing is fetched for it, and its paths stay true
                yield Read(origin, text, value, _paths_unlearnt(value, origin, plain), learnt=False)
                continue
            except BadRecord as error:
                yield Read(origin, None, None, [], error)
                continue
            yield Read(origin, text, value, list(places(value, record, fields)))


def _paths_unlearnt(value: Any, origin: Origin, read: ReadOptions) -> list[Place]:
    """Where a record of which nothing is learnt names pictures by paths."""
    try:
        record, fields = parse_with_fields(all_learnt(value), origin, read, addresses=True)
    except BadRecord:  # it could not be learnt either
        return []
    return [place for place in places(value, record, fields) if isinstance(place.value, str)]


def places(value: Any, record: Record, fields: list[str]) -> Iterator[Place]:
    """Every picture that a record names by a path, an address, or the bytes of a table, once."""
    pictures = {
        field: segment.source for segment, field in zip(record.sample, fields) if isinstance(segment, Image)
    }
    for field, source in pictures.items():
        way = [field] if field in value else [int(n) if n else name for name, n in _STEP.findall(field)]
        holder: Any = value
        for step in way[:-1]:
            holder = holder[step]
        key, found = way[-1], holder[way[-1]]
        if isinstance(found, dict):  # an image column: the path takes the place of it
            found = next(found[name] for name in ("bytes", "path", "url") if found.get(name) is not None)
        if isinstance(source, bytes) and not isinstance(found, bytes):
            continue  # base64 in JSON may stay where it is
        if isinstance(source, Address):
            found = source
        yield Place(holder, key, found, field)


class Writer:
    """Writes the new data and ``failed.log``.

    Attributes:
        written: Records in the new data.
        learnt: Of them, those that are learnt from.
        left_out: Records with a failure.
        failures: Failures by reason.
        first: The first of each reason, as in ``failed.log``.
    """

    def __init__(self, store: PictureStore, deep: bool):
        self.store, self.deep = store, deep
        self.written = self.learnt = self.left_out = 0
        self.failures: Counter[str] = Counter()
        self.first: dict[str, dict[str, Any]] = {}

    def run(self, sources: list[RewrittenFile], partial: bool) -> None:
        """Puts all files in their places at the end; without ``partial`` a single failure keeps the data
        back."""
        listing = self.store.drafts / "failed"
        drafts = [self.store.drafts / str(i) for i in range(len(sources))]
        with self.store.writing():
            with listing.open("xb") as listed, Bar("writing records") as shown_bar:
                for source, draft in zip(sources, drafts):
                    with draft.open("xb") as file:
                        for line in self._lines(source, listed):
                            file.write(line + b"\n")
                            self.written += 1
                            shown_bar.update()
                        _flush(file)
                _flush(listed)
            if self.failures and not partial:
                self.written = self.learnt = 0
            else:
                self._answer_for(sources, drafts)
                for source, draft in zip(sources, drafts):
                    source.target.parent.mkdir(parents=True, exist_ok=True)
                    draft.replace(source.target)
            listing.replace(self.store.folder / "failed.log")

    def _answer_for(self, sources: list[RewrittenFile], drafts: list[Path]) -> None:
        """Notes the new data as ours; a kill leaves some of it, and some of what was there before."""
        own = read_receipt(self.store.folder, FETCH)
        for source, draft in zip(sources, drafts):
            name = source.target.relative_to(self.store.folder).as_posix()
            own[name] = [*own.get(name, [])[-1:], sha256_of(draft)]
        write_receipt(self.store.folder, FETCH, own)

    def _lines(self, source: RewrittenFile, listed: BinaryIO) -> Iterator[bytes]:
        for read in records(source):
            line, failed = self._line(source, read)
            for failure in failed:
                self.failures[failure["reason"]] += 1
                self.first.setdefault(failure["reason"], failure)
                listed.write(json_of(failure).encode() + b"\n")
            self.left_out += bool(failed)
            if not failed:
                self.learnt += read.learnt
                yield line

    def _line(self, source: RewrittenFile, read: Read) -> tuple[bytes, list[dict[str, Any]]]:
        """The new line of a record, or its failures. A record without pictures keeps its very bytes."""
        if read.problem is not None:
            problem = read.problem
            told = f"found {problem.found}; expected {problem.expected}"
            return b"", [_failure(read.origin, problem.field, problem.code, told, problem.fix)]
        failed, changed = [], False
        for place in read.places:
            try:
                new = self._local(place.value, source)
            except FetchError as error:
                url = masked(place.value.url, 2000) if isinstance(place.value, Address) else "(bytes)"
                failed.append(_failure(read.origin, place.field, error.reason, error.problem, error.fix, url))
                continue
            if new != place.holder[place.key]:
                place.holder[place.key], changed = new, True
        if failed or not (changed or read.raw is None or b"\n" in read.raw):
            return read.raw or b"", failed
        try:
            return _dumps(read.value), []
        except (ValueError, RecursionError) as error:  # 1e999 reads as infinity
            fix = "write ordinary numbers and depth"
            return b"", [_failure(read.origin, "(record)", "bad_json", str(error), fix)]

    def _local(self, value: str | bytes | Address, source: RewrittenFile) -> str:
        """The path of a picture as the new file names it. Raises FetchError."""
        if isinstance(value, bytes):
            file = self.store.keep("", value, self.deep).file
        elif isinstance(value, Address):
            entry = self.store.entries.get(str(parse_url(value.url)))
            if entry is None:
                raise UserError(f"{source.path}: it was changed while it was read. Run the command again.")
            if not entry.good:
                raise FetchError(entry.status, entry.problem, entry.cure)
            file = entry.file
        else:
            return _moved(value, source)
        return Path(os.path.relpath(self.store.folder / file, source.target.parent)).as_posix()


def _failure(
    origin: Origin, field: str, reason: str, problem: str, fix: str, url: str | None = None
) -> dict[str, Any]:
    """A line of ``failed.log``."""
    where = {"file": str(origin.file), "line": origin.line, "index": origin.index, "field": field}
    return {**where, "url": url, "reason": reason, "problem": problem, "cure": fix}


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _dumps(value: Any) -> bytes:
    """One line of JSON. Columns that JSON has no word for become texts."""

    def text(column: Any) -> str:
        return base64.b64encode(column).decode() if isinstance(column, bytes) else str(column)

    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=text).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: kept as it was escaped, for "unigen check" to find
        return json.dumps(value, allow_nan=False, default=text).encode("ascii")


def _moved(path: str, source: RewrittenFile) -> str:
    """A path relative to the source as one that means the same in the new file: relative where links allow
    it."""
    if path.startswith("/") or "://" in path or path.lower().startswith("file:"):
        return path
    folder = source.read.folder(source.path)
    old = os.path.join(folder, path)
    new = os.path.relpath(old, source.target.parent)
    same = _real(os.path.join(source.target.parent, os.path.dirname(new))) == _real(os.path.dirname(old))
    return new if same else os.path.abspath(folder) + os.sep + path


@lru_cache(4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
