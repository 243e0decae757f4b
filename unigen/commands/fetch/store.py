"""Pictures that were fetched: checked by their contents, kept under the name of their hash, and written down
as they come.

``pictures/ab/<sha256>.<kind>`` holds the pictures, ``fetched.log`` one line for every attempt. A file appears
under its name when it is whole, never before, so whatever ends the process at whatever moment leaves a folder
that the next run continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from unigen.bars import each
from unigen.commands.fetch.addresses import FetchError
from unigen.files import atomic, sha256_of
from unigen.foreign import kind_of_start
from unigen.outputs import unwritten
from unigen.sequence.images import PictureError, image_size, open_image

FETCH = "unigen fetch"  # the mark of its folder
LOG, DRAFTS = "fetched.log", ".new"
OWN = (LOG, DRAFTS, "failed.log", "pictures", ".lock")  # what a fetch has in its folder beside the data
FETCHED = "fetched"  # the status of a picture that is there
_FILE = re.compile(r"pictures/([0-9a-f]{2})/(\1[0-9a-f]{62})\.[a-z0-9]+")
# a picture of 64 megapixels takes 192 MB: not one for every connection
_DECODING = threading.Semaphore(os.cpu_count() or 1)

_PAGE = re.compile(rb"<!doctype html|<html|<head|<body|<script", re.IGNORECASE)


class Entry(NamedTuple):
    """What became of an address: a line of ``fetched.log``."""

    url: str
    status: str  # FETCHED, or the reason of a FetchError
    time: str  # UTC, ISO 8601
    file: str = ""  # relative to the folder
    sha256: str = ""
    bytes: int = 0
    problem: str = ""
    cure: str = ""  # the log's name for the fix

    @classmethod
    def failed(cls, url: str, error: FetchError) -> Entry:
        return cls(url, error.reason, _now(), problem=error.problem, cure=error.fix)

    @property
    def good(self) -> bool:
        return self.status == FETCHED

    def line(self) -> bytes:
        held = {name: value for name, value in self._asdict().items() if value != ""}
        return json.dumps(held).encode() + b"\n"


def picture_kind(data: bytes, deep: bool = False) -> str:
    """The file extension of a picture, told by its first bytes and by nothing else; its header is read, or
    where ``deep`` all of it decoded.

    Raises:
        FetchError: ``empty``, ``html``, or a code of :class:`PictureError`.
    """
    if not data:
        raise FetchError("empty", "the answer is empty", "check the address in a browser")
    kind = kind_of_start(data)
    if kind is None:
        start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"<") and _PAGE.search(start):
            fix = "open the address in a browser and copy that of the picture itself"
            raise FetchError("html", "it is a web page, not a picture", fix)
        problem = f"it starts with {data[:12]!r}, as no known kind of picture does"
        if b"<svg" in start:
            problem = "it is a drawing in SVG"
        fix = "name the address of a PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000 file"
        raise FetchError("not_a_picture", problem, fix)
    try:
        if deep:
            with _DECODING:
                open_image(data)
        else:
            image_size(data)
    except PictureError as error:
        raise FetchError(error.code, error.problem, error.fix) from None
    return kind


class PictureStore:
    """The folder of a fetch, made if it is not there: ``entries`` are those of its log by address. One
    process at a time, many threads.

    Raises:
        UserError: The folder cannot be written to.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # what is not whole yet; on the same disk, so that a rename puts it in its place
        self.drafts = folder / DRAFTS
        self.log = folder / LOG
        with self.writing():
            shutil.rmtree(self.drafts, ignore_errors=True)
            self.drafts.mkdir(parents=True, exist_ok=True)
            self.entries = {entry.url: entry for entry in _read(self.log)}
            self.settle()  # without what a killed run wrote of a line
            self._log = self.log.open("ab", buffering=0)

    def settle(self) -> None:
        """Leaves one line for each address in ``fetched.log``; nothing may be noted afterwards."""
        with self.writing():
            self.save(self.log, (entry.line() for entry in self.entries.values()))

    def close(self) -> None:
        self._log.close()
        shutil.rmtree(self.drafts, ignore_errors=True)

    def writing(self) -> AbstractContextManager[None]:
        """Turns the errors of a disk into a UserError."""
        return unwritten("output_dir", self.folder)

    def keep(self, url: str, data: bytes, deep: bool = False) -> Entry:
        """Stores a picture. Raises FetchError as :func:`picture_kind`, and UserError."""
        kind, sha = picture_kind(data, deep), hashlib.sha256(data).hexdigest()
        name = f"pictures/{sha[:2]}/{sha}.{kind}"
        with self.writing():
            self.save(self.folder / name, [data])
        return Entry(url, FETCHED, _now(), name, sha, len(data))

    def note(self, entry: Entry) -> None:
        """Writes an entry down, at once."""
        self.entries[entry.url] = entry
        with self.writing():
            self._log.write(entry.line())

    def save(self, path: Path, parts: Iterable[bytes]) -> None:
        """A whole file or none: written beside, flushed to the disk, renamed. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, self.drafts / uuid.uuid4().hex) as file:
            file.writelines(parts)

    def verify(self, urls: Iterable[str]) -> int:
        """Forgets the pictures of ``urls`` that are not there, or not what was fetched; the number of those
        with another content."""
        files = sorted({entry.file for url in urls if (entry := self.entries.get(url)) and entry.good})
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter lock
            sound = dict(zip(each("verifying", files, "pictures"), pool.map(self._sound, files)))
        damaged = [file for file in files if sound[file] is False]
        with self.writing():
            for file in damaged:
                (self.folder / file).unlink()
        self.entries = {
            url: entry for url, entry in self.entries.items() if not entry.good or sound.get(entry.file, True)
        }
        return len(damaged)

    def _sound(self, file: str) -> bool | None:
        """Whether a file has the content its name says; None where there is none."""
        try:
            return sha256_of(self.folder / file) == Path(file).stem
        except FileNotFoundError:
            return None
        except OSError:
            return False


def is_log(path: Path) -> bool:
    """Is it a log of fetches?"""
    return path.is_file() and next(_read(path), None) is not None


def _read(path: Path) -> Iterator[Entry]:
    """The entries of a log; lines that are cut or not ours are left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                continue
            texts = all(isinstance(value, str) for name, value in entry._asdict().items() if name != "bytes")
            if texts and isinstance(entry.bytes, int) and (not entry.good or _FILE.fullmatch(entry.file)):
                yield entry


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
