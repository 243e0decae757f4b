"""Random access to the records of files, one at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from unigen.data import tables
from unigen.data.containers import BadData, ByteSpan, Raw, container_of, crc_of, explained, is_packed
from unigen.data.unpack import unpacked
from unigen.sequence.types import BadRecord, Origin

GROUPS = 256 << 20  # bytes of table groups that a Reader keeps in each process
# groups it keeps even where they are larger: the order of training mixes as many, and would read each again
# for every record
LEAST = 4
MOST = 4 << 30  # bytes above which not even those are kept


class Reader:
    """Reads single records of files; safe in threads and forked processes, and pickled without what it keeps.

    Compressed files are unpacked into a cache folder when this is built. Groups of tables are kept, up to
    ``GROUPS`` bytes and at least ``LEAST`` of them, in each process.

    Args:
        files: What ``ByteSpan.file`` counts.

    Raises:
        BadData: A compressed file is damaged.
        UserError: There is no room to unpack one.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = list(files)
        self._sources = [self._source(path) for path in self.files]
        self._stamps = [_stamp(path) for path in self._sources]
        self._kept = _Kept()

    def source(self, number: int) -> Path:
        """The file itself, or its unpacked copy: what :func:`parts` should cut."""
        return self._sources[number]

    def read(self, span: ByteSpan) -> Raw:
        """The record at ``span``, as :func:`read_part` gave it.

        Raises:
            BadData: The file was changed or removed since.
        """
        path = self._sources[span.file]
        container = container_of(self.files[span.file])
        try:
            raw: Raw
            if container.group is None:
                raw = (container.record or _bytes_at)(path, span.offset, span.length)
            else:
                raw = tables.table_row(self._group(span, container.group), span.length)
            changed = crc_of(raw) != span.crc
        except (OSError, ValueError, LookupError, MemoryError, StopIteration) as error:
            raise BadData(
                f"{self._place(span)}: it cannot be read any more ({error}). Start again, or restore the"
                " file."
            ) from error
        if changed:
            raise BadData(
                f"{self._place(span)}: the file was changed while it was in use. Start again, or restore the"
                " file."
            )
        return raw

    def grouped(self, number: int) -> bool:
        """Whether reading a record of this file costs reading the group it lies in (``ByteSpan.offset`` names
        it)."""
        return container_of(self.files[number]).runs

    def _group(self, span: ByteSpan, load: Callable[[Path, int], Any]) -> Any:
        path = self._sources[span.file]
        if _stamp(path) != self._stamps[span.file]:  # a mapped file that shrank would end the process
            raise ValueError("it was changed while it was in use")
        if self._kept.process != os.getpid():  # a lock that another thread held at the fork would stay held
            self._kept = _Kept()
        return self._kept.get((span.file, span.offset), lambda: load(path, span.offset))

    def _place(self, span: ByteSpan) -> Origin:
        return Origin(self.files[span.file], span.line or None, span.index)

    def _source(self, path: Path) -> Path:
        if not is_packed(path):
            return path
        try:
            with explained(path):
                return unpacked(path)
        except BadRecord as error:
            raise BadData(str(error), [error]) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=_Kept())


class _Kept:
    """The groups used last, in one process."""

    def __init__(self) -> None:
        self.process, self.size = os.getpid(), 0
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], load: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            group = self._groups[key] = load()
            self.size += group.nbytes
            while self.size > GROUPS and len(self._groups) > (LEAST if self.size <= MOST else 1):
                self.size -= self._groups.popitem(last=False)[1].nbytes
            return group


def _bytes_at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:  # its own: no file position shared with anyone
        file.seek(offset)
        return file.read(length)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
