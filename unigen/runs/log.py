"""A file that grows record by record, whatever the disk does; and is cut back where a run goes on from an
earlier step."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from unigen.files import atomic
from unigen.foreign import ForeignFileError, open_file

log = logging.getLogger(__name__)

MAX_WAITING = 64 * 2**20  # bytes kept in memory while the disk takes none


class JsonlLog:
    """Appends whole records, each in one write. A kill tears the last record at most (the kernel ends a
    killed write between two pages); readers skip such a line and a resume drops it (``drop_after``).

    What cannot be written (disk full, file system read-only, folder away) is kept in memory, in order, up to
    ``MAX_WAITING`` bytes, and written with the first record that can be. The outage is a warning, its end
    another line; nothing is raised.

    Args:
        path: The file; its folder is made when missing.
        prepare: Called once, before the file is opened for the first time; may raise OSError, and is then
            called again.
    """

    def __init__(self, path: Path, prepare: Callable[[], None] = lambda: None):
        self.path = path
        self._prepare: Callable[[], None] | None = prepare
        self._file: int | None = None
        self._waiting: deque[bytes] = deque()
        self._bytes = self._lost = 0
        self._outage = False
        self._flush()

    def append(self, record: bytes) -> None:
        """Writes the record now, or as soon as there is a place for it."""
        if self._bytes + len(record) > MAX_WAITING:
            self._lost += 1
        else:
            self._waiting.append(record)
            self._bytes += len(record)
        self._flush()

    def close(self) -> None:
        """Writes what waits, if it can, and says how much is lost; a second call does nothing."""
        self._flush()
        if self._waiting or self._lost:
            log.warning(
                "%s lacks %d record(s) that could not be written", self.path, len(self._waiting) + self._lost
            )
            self._waiting.clear()
            self._lost = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _flush(self) -> None:
        try:
            if self._prepare is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._prepare()
                self._prepare = None
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            while self._waiting:
                self._write(self._file, self._waiting[0])
                self._bytes -= len(self._waiting.popleft())
        except OSError as error:
            if not self._outage:
                log.warning(
                    "%s cannot be written; what is logged is kept in memory until it can. %s",
                    self.path,
                    error,
                )
            self._outage = True
            return
        if self._outage:
            lost = f"; {self._lost} record(s) are lost" if self._lost else "; nothing is lost"
            log.warning("%s is written again%s", self.path, lost)
            self._outage, self._lost = False, 0

    def _write(self, file: int, record: bytes) -> None:
        size = os.fstat(file).st_size
        written = os.write(file, record)
        if written != len(record):  # a disk that took only a part gets it cut off again
            os.ftruncate(file, size)
            raise OSError(f"no space left: {written} of {len(record)} bytes were taken")


def drop_after(path: Path, step: int, repeats: bool = False) -> None:
    """Rewrites a log of a JSON object with ``step`` a line, in one rename, without the lines after ``step``
    and without one that a kill cut short. With ``repeats`` the step's own line, the first that names it, is
    the last to stay.

    Raises:
        OSError: it cannot be read or written; it is as it was then.
    """
    kept, done = [], 0
    try:
        with open_file(path, [path.parent]) as file:
            lines = file.read().splitlines()
    except ForeignFileError as error:
        raise OSError(str(error)) from None
    for number, line in enumerate(lines, 1):
        try:
            at = json.loads(line)["step"]
            if at < step or (at == step and not (repeats and done == step)):
                kept.append(line + b"\n")
            done = at
        except (ValueError, KeyError, TypeError, RecursionError):
            log.warning("%s:%d is no line with a step; it is dropped: %r", path, number, line[:80])
    with atomic(path) as file:
        file.writelines(kept)
