"""The checkpoint folder that a run began with, as it was then.

Checkpoints copy from it what does not train. Its files are held open, so that those which are removed or
replaced meanwhile are read all the same; one that is rewritten in place is recognised and read no more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from unigen.config import UserError
from unigen.model.storage import HELD, Stored, scan_folder

_HEAD, _BLOCK, _BLOCKS = 1 << 20, 1 << 12, 64  # bytes and blocks of a file that its stamp covers


class SourceChanged(UserError):
    """The folder changed at a moment when it had to stay as it was."""


@dataclass(frozen=True)
class Stamp:
    """What tells a file's bytes from others without reading all of them."""

    size: int
    mtime_ns: int
    digest: str  # of its head and of blocks spread over it

    @classmethod
    def of(cls, file: BinaryIO) -> Stamp:
        """Raises OSError."""
        status, number = os.fstat(file.fileno()), file.fileno()
        digest = hashlib.sha256(os.pread(number, _HEAD, 0))
        for at in range(_HEAD, status.st_size, max(_BLOCK, (status.st_size - _HEAD) // _BLOCKS)):
            digest.update(os.pread(number, _BLOCK, at))
        return cls(status.st_size, status.st_mtime_ns, digest.hexdigest())


class Source:
    """The weights of a checkpoint folder, held open until :meth:`close`.

    ``stored`` says where the tensors lie, by name; reading them goes through the open files. ``known``: where
    they lie, in place of the folder's first choice.

    Raises:
        CheckpointFolderError: as ``scan_folder``.
        SourceChanged: it is being written.
    """

    def __init__(self, folder: Path, known: Mapping[str, Stored] | None = None):
        self.folder = folder
        self._files: dict[Path, BinaryIO] = {}
        found = scan_folder(folder) if known is None else known
        try:
            for path in sorted({part.file for entry in found.values() for part in entry.parts}):
                self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115 (it stays open)
            self._stamps = {path: Stamp.of(file) for path, file in self._files.items()}
        except OSError as error:
            self.close()
            raise self._unsteady() from error
        if known is None and scan_folder(folder) != found:
            self.close()
            raise self._unsteady()
        self._paths = {HELD / str(file.fileno()): path for path, file in self._files.items()}
        through = {path: place for place, path in self._paths.items()}
        self.stored = {name: entry.through(through) for name, entry in found.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, name: str) -> Tensor:
        """A tensor in host memory, in the stored dtype. Raises SourceChanged where its file was rewritten."""
        value = self.stored[name].read()
        for path in {self._paths[part.file] for part in self.stored[name].parts}:
            status, stamp = os.fstat(self._files[path].fileno()), self._stamps[path]
            if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
                raise SourceChanged(f"{path} was rewritten while it was being copied")
        return value

    def rewritten(self) -> list[str]:
        """Names of the files whose bytes are no longer those of the start, or cannot be read any more."""
        return [path.name for path, file in self._files.items() if self._stamp(file) != self._stamps[path]]

    def moved(self) -> list[str]:
        """Names of the files that are no longer in the folder, or of which another has the name."""
        return [path.name for path, file in self._files.items() if not _is(path, file)]

    def files_of(self, name: str) -> set[str]:
        """Names of the files in which a tensor lies."""
        return {self._paths[part.file].name for part in self.stored[name].parts}

    def settle(self) -> None:
        """To be called when the weights are loaded. Raises SourceChanged where they may be of two models."""
        if self.rewritten() or self.moved():
            raise self._unsteady()

    @staticmethod
    def _stamp(file: BinaryIO) -> Stamp | None:
        try:
            return Stamp.of(file)
        except OSError:  # a network file system may lose a file that another machine removes
            return None

    def _unsteady(self) -> SourceChanged:
        return SourceChanged(
            f"{self.folder} changed while it was being read. Fix: start again when it is whole, and give the"
            " run a folder that nobody writes into"
        )


def _is(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False
