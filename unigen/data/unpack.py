"""Compressed files (``.gz``, ``.zst``): read from the start as a stream, or unpacked once into a cache folder
for random access."""

from __future__ import annotations

import gzip
import io
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from unigen.config import UserError
from unigen.files import atomic, cache_folder, free_bytes, locked, sha256_of
from unigen.remote import RESERVE, copying_to
from unigen.sequence.types import BadRecord

PACKED = (".gz", ".zst")
MAX_RATIO = 200  # bytes that a compressed byte may stand for, on average: records have 3 to 50
RATIO_FREE = 64 << 20  # bytes of contents up to which the ratio does not matter
_BLOCK = 4 << 20
_UNFINISHED = ".unpacking-"


def open_packed(path: Path) -> BinaryIO:
    """The contents as a stream; several members or frames are one after another.

    Reading raises EOFError, OSError, ``zlib.error`` or ValueError where the file is truncated or damaged: it
    is never just short; and BadRecord ``huge_file`` above ``MAX_RATIO``.
    """
    if path.stat().st_size == 0:
        raise EOFError("it is empty")
    if path.suffix.lower() == ".gz":
        packed: Any = gzip.open(path, "rb")  # noqa: SIM115 (closed with what is around it)
    else:
        import pyarrow as pa

        packed = pa.input_stream(str(path), compression="zstd")
    return io.BufferedReader(_Bounded(packed, path.stat().st_size), 1 << 20)


class _Bounded(io.RawIOBase):
    """The contents of a compressed file of ``size`` bytes, up to ``MAX_RATIO`` times as many."""

    def __init__(self, packed: Any, size: int):
        self._packed, self._most, self._read = packed, max(RATIO_FREE, MAX_RATIO * size), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._packed.readinto(buffer)
        self._read += count
        if self._read > self._most:
            found = f"contents of more than {self._most:,} bytes, {MAX_RATIO} times those of the file"
            expected = "records, which do not compress so well"
            fix = "unpack the file yourself and look what it holds"
            raise BadRecord("huge_file", "(file)", found, expected, fix)
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()


def unpacked(path: Path) -> Path:
    """The unpacked copy of ``path``, made if it is not there yet, named by the hash of the compressed bytes.

    It lies in the folder ``unpacked`` of ``$UNIGEN_CACHE``, by default ``~/.cache/unigen``; it may be deleted
    between runs. Processes that want the same copy at once are safe: one unpacks, the others wait.

    Raises:
        UserError: There is no room for it, or the folder cannot be written to.
        EOFError, OSError, zlib.error, ValueError: As :func:`open_packed`.
    """
    folder = cache_folder() / "unpacked"
    name = sha256_of(path) + Path(path.stem).suffix
    with copying_to(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    with _alone(folder):
        if not (folder / name).is_file():
            _unpack(path, folder / name)
    return folder / name


def _unpack(path: Path, target: Path) -> None:
    _check_room(path, target.parent, _least_size(path))
    draft = target.with_name(_UNFINISHED + uuid.uuid4().hex)
    with ExitStack() as stack:
        with copying_to(target):
            out = stack.enter_context(atomic(target, draft, mode=0o600))
        packed = stack.enter_context(open_packed(path))
        while block := packed.read(_BLOCK):
            _check_room(path, target.parent, len(block))
            with copying_to(target):
                out.write(block)


def _check_room(path: Path, folder: Path, size: int) -> None:
    free = free_bytes(folder)
    if free < size + RESERVE:
        raise UserError(
            f"{path}: no room to unpack it: {free / 2**30:.1f} GiB are free in {folder}, at least"
            f" {(size + RESERVE) / 2**30:.1f} GiB are needed. Make room there, set UNIGEN_CACHE to a folder"
            " with more, or unpack the file yourself and name that."
        )


def _least_size(path: Path) -> int:
    """Bytes that the contents take at least, as far as can be told without unpacking."""
    size = path.stat().st_size
    if path.suffix.lower() != ".gz" or size < 18:
        return size
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return max(size // 1100, struct.unpack("<I", file.read(4))[0])  # of the last member, modulo 4 GiB


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; where the file system knows no locks, several do the same work and the last
    one's copy stays."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(locked(folder / ".lock"))
            for left in folder.glob(_UNFINISHED + "*"):  # by a process that was killed
                left.unlink()
        yield
