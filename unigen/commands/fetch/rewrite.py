"""Records with addresses in, records with files out: where pictures are named, and the new data of ``unigen
fetch``."""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from unigen.commands.fetch.addresses import FetchError, is_address, parse_url, shown
from unigen.commands.fetch.store import FETCH, PictureStore
from unigen.config import UserError
from unigen.data.containers import parts, read_part
from unigen.data.formats import FORMATS, parse_raw
from unigen.data.json_text import parse_json
from unigen.files import sha256_of
from unigen.outputs import read_receipt, write_receipt
from unigen.sequence.types import BadRecord, Origin

# Fields that name pictures, and those that lead to more fields. `metadata` and texts are in neither: nothing
# is fetched for them.
_PATHS = [path.split(".") for entry in FORMATS.values() for path in entry.pictures]
PICTURE_FIELDS = {path[-1] for path in _PATHS}
NESTED_FIELDS = {name for path in _PATHS for name in path[:-1]}


class RewrittenFile(NamedTuple):
    """A file of records, and the file of the new data."""

    path: Path
    target: Path


class Place(NamedTuple):
    """Where a record names a picture: ``holder[key]`` is what to replace."""

    holder: Any
    key: Any
    value: str | bytes
    field: str


def records(source: RewrittenFile) -> Iterator[tuple[Origin, bytes | None, Any]]:
    """Each record: its place, its bytes where it has any, and its value or the BadRecord it is."""
    for part in parts(source.path, 0):
        for span, raw in read_part(part):
            origin = Origin(source.path, span.line or None, span.index)
            if not isinstance(raw, bytes):
                yield origin, None, raw
                continue
            try:
                value = parse_json(raw, span.line)
            except BadRecord as error:
                value = error
            yield origin, raw, value


def places(value: Any, where: str = "", depth: int = 3) -> Iterator[Place]:
    """Every picture that a record names by a path, an address, or its bytes. No format is nested deeper than
    three objects."""
    if not isinstance(value, dict) or depth == 0:
        return
    for name in value:
        at = f"{where}.{name}" if where else name
        if name in PICTURE_FIELDS:
            yield from _pictures(value, name, at)
        elif name in NESTED_FIELDS and isinstance(value[name], list):
            for i, item in enumerate(value[name]):
                yield from places(item, f"{at}[{i}]", depth - 1)


def _pictures(holder: Any, key: Any, at: str) -> Iterator[Place]:
    value = holder[key]
    if isinstance(value, list):
        for i, item in enumerate(value):
            if not isinstance(item, list):
                yield from _pictures(value, i, f"{at}[{i}]")
    elif isinstance(value, dict):
        if isinstance(value.get("url"), str):
            yield Place(value, "url", value["url"], f"{at}.url")
        else:  # an image column of datasets, whose bytes win; a path alone takes its place
            name = "path" if value.get("bytes") is None else "bytes"
            if isinstance(value.get(name), str | bytes):
                yield Place(holder, key, value[name], f"{at}.{name}")
    elif isinstance(value, str | bytes):
        yield Place(holder, key, value, at)


class Writer:
    """Writes the new data and ``failed.log``.

    Attributes:
        written: Records in the new data.
        left_out: Records with a failure.
        failures: Failures by reason.
        first: The first of each reason, as in ``failed.log``.
        unfit: Records in the new data that fit no format, or break its rules; the first of them is
            ``first_unfit``.
    """

    def __init__(self, store: PictureStore, deep: bool):
        self.store, self.deep = store, deep
        self.written = self.left_out = self.unfit = 0
        self.first_unfit: BadRecord | None = None
        self.failures: Counter[str] = Counter()
        self.first: dict[str, dict[str, Any]] = {}

    def run(self, sources: list[RewrittenFile], partial: bool) -> None:
        """Puts all files in their places at the end; without ``partial`` a single failure keeps the data
        back."""
        listing = self.store.drafts / "failed"
        drafts = [self.store.drafts / str(i) for i in range(len(sources))]
        with self.store.writing():
            with listing.open("xb") as listed:
                for source, draft in zip(sources, drafts):
                    with draft.open("xb") as file:
                        for line in self._lines(source, listed):
                            file.write(line + b"\n")
                            self.written += 1
                        _flush(file)
                _flush(listed)
            if self.failures and not partial:
                self.written = 0
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
        for origin, raw, value in records(source):
            line, failed = self._line(source, origin, raw, value)
            for failure in failed:
                self.failures[failure["reason"]] += 1
                self.first.setdefault(failure["reason"], failure)
                listed.write(json.dumps(failure).encode() + b"\n")
            self.left_out += bool(failed)
            if not failed:
                self._examine(source, line)
                yield line

    def _examine(self, source: RewrittenFile, line: bytes) -> None:
        """Notes a record of the new data that no training can use."""
        try:
            parse_raw(line, self.written + 1, Origin(source.target, None, self.written))
        except BadRecord as error:
            self.unfit += 1
            self.first_unfit = self.first_unfit or error

    def _line(
        self, source: RewrittenFile, origin: Origin, raw: bytes | None, value: Any
    ) -> tuple[bytes, list[dict[str, Any]]]:
        """The new line of a record, or its failures. A record without pictures keeps its very bytes."""
        if isinstance(value, BadRecord):
            return b"", [
                _failure(
                    origin,
                    value.field,
                    value.code,
                    f"found {value.found}; expected {value.expected}",
                    value.fix,
                )
            ]
        failed, changed = [], False
        for place in places(value):
            try:
                new = self._local(place.value, source)
            except FetchError as error:
                url = shown(place.value, 2000) if isinstance(place.value, str) else "(bytes)"
                failed.append(_failure(origin, place.field, error.reason, error.problem, error.fix, url))
                continue
            if new != place.holder[place.key]:
                place.holder[place.key], changed = new, True
        if failed or not (changed or raw is None or b"\n" in raw):
            return raw or b"", failed
        try:
            return _dumps(value), []
        except (ValueError, RecursionError) as error:  # 1e999 reads as infinity
            return b"", [
                _failure(origin, "(record)", "bad_json", str(error), "write ordinary numbers and depth")
            ]

    def _local(self, value: str | bytes, source: RewrittenFile) -> str:
        """The path of a picture as the new file names it. Raises FetchError."""
        if isinstance(value, bytes):
            file = self.store.keep("", value, self.deep).file
        elif is_address(value):
            entry = self.store.entries.get(str(parse_url(value)))
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
    try:
        path.encode()
    except UnicodeEncodeError:  # no path at all, as with a NUL: refused where the data is read
        return path
    if not path or path.startswith("/") or "\0" in path:
        return path
    old = os.path.join(source.path.parent, path)
    new = os.path.relpath(old, source.target.parent)
    same = _real(os.path.join(source.target.parent, os.path.dirname(new))) == _real(os.path.dirname(old))
    return new if same else os.path.abspath(source.path.parent) + os.sep + path


@lru_cache(4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
