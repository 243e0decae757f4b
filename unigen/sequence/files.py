"""Which files may be opened as pictures: regular ones, outside the kernel's own file systems, inside a folder
where one is set (see ``unigen/foreign.py``)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from unigen import foreign, remote
from unigen.config import UserError
from unigen.foreign import ForeignFileError
from unigen.printing import printable
from unigen.sequence.neighbours import neighbour
from unigen.sequence.types import BadRecord, Origin

# larger files are refused: a picture of 64 megapixels in 8-bit RGB, uncompressed, has 192 MB
MAX_BYTES = 256 * 1024**2


class PictureError(UserError):
    """A picture that cannot be used; its string says which, what is wrong with it, and the fix.

    ``code`` is stable: ``missing_picture``, ``not_a_file``, ``outside_root``, ``unreadable_picture``,
    ``not_a_picture``, ``broken_picture``, ``huge_picture``, ``unsupported_picture`` or ``changed_picture``.
    """

    def __init__(self, code: str, name: str, problem: str, fix: str):
        self.code, self.name, self.problem, self.fix = code, *map(printable, (name, problem, fix))
        super().__init__(self.code, self.name, self.problem, self.fix)

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}. Fix: {self.fix}"


def bad_picture(
    error: PictureError, field: str | None, origin: Origin | None = None, segment: int | None = None
) -> BadRecord:
    """The record that shows a picture which cannot be used."""
    found = f"{error.name}: {error.problem}"
    return BadRecord(error.code, field, found, "a picture that can be decoded", error.fix, origin, segment)


@dataclass(frozen=True)
class Confined:
    """The path of a picture that must lie in the folder ``root``, for data that one does not trust. ``str()``
    is the path.

    What counts is where the opened file lies after all links are resolved, and ``root`` itself may be reached
    by links. A hard link inside ``root`` to a file outside cannot be told from that file; it takes write
    access to the same disk to make one.
    """

    path: str | Path
    root: str | Path

    def __str__(self) -> str:
        return str(self.path)


def open_file(path: str | Path | Confined) -> BinaryIO:
    """The regular file at ``path``, opened for reading. One that stands for a file of object storage is
    copied first, where it is not there yet.

    Raises:
        PictureError: ``missing_picture``, ``not_a_file`` (a folder, pipe, socket or device, or anything
            reached through ``/proc``, ``/sys`` or ``/dev``), ``outside_root`` (of a :class:`Confined`),
            ``huge_picture`` (more than 256 MiB), or ``unreadable_picture``. Nothing was opened then.
    """
    name, roots = str(path), (path.root,) if isinstance(path, Confined) else ()
    try:
        try:
            return foreign.open_file(name, roots, MAX_BYTES)
        except ForeignFileError as error:
            url = remote.url_of(name) if error.code == "missing" else None
            if url is None:
                raise
            remote.fetch_file(url, Path(name), MAX_BYTES)
            return foreign.open_file(name, roots, MAX_BYTES)
    except remote.RemoteError as error:
        raise PictureError(_CODES[error.code], error.url, error.problem, error.fix) from None
    except ForeignFileError as error:
        raise PictureError(_CODES[error.code], *_said(error, roots)) from None


_CODES = {
    "missing": "missing_picture", "not_a_file": "not_a_file", "outside": "outside_root",
    "huge": "huge_picture", "unreadable": "unreadable_picture",
}  # fmt: skip


def _said(error: ForeignFileError, roots: Sequence[str | Path]) -> tuple[str, str, str]:
    """The name of a picture, what is wrong with it, and the fix."""
    missing = error.name if error.code == "missing" else ""
    found = neighbour(missing) if missing else None
    if found and all(Path(os.path.realpath(found[0])).is_relative_to(os.path.realpath(r)) for r in roots):
        return error.name, error.problem, f"the file on disk is {found[0]}; {found[1]}"
    if re.search(r"(?:^|/)[A-Za-z]:[\\/]", missing):
        fix = "write it from a folder of pictures on, with /, and give that folder as --image_root"
        return error.name, "it is a path of Windows", fix
    # a path drops one of the slashes, and may begin with the folder of the file that names it
    if address := re.search(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/+([^/].*)", missing):
        fix = "download the picture and name its file (unigen fetch does so for records)"
        return "{}://{}".format(*address.groups()), "an address, and none is opened here", fix
    fixes = {
        "missing": "correct the path or put the picture there",
        "not_a_file": "name a regular file that holds a picture",
        "outside": "move the picture into that folder, or name another data_root",
        "huge": "save it compressed, as PNG, JPEG or WebP, or scale it down",
    }
    problem = error.problem.replace("in which it must lie", "in which all pictures must lie")
    return error.name, problem, fixes.get(error.code, error.fix)


_KINDS = (
    (re.compile(rb".{4}ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL), "it is a HEIC picture",
     "convert it to JPEG or PNG (in Python: pip install pillow-heif, register_heif_opener(), open, save)"),
    (re.compile(rb".{4}ftyp", re.DOTALL), "it is a video, not a picture", "take frames of it as pictures"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?<svg"), "it is a drawing in SVG", "save it as PNG"),
    (re.compile(rb"%PDF"), "it is a PDF document, not a picture", "save its pages as PNG or JPEG"),
    (re.compile(rb"PK\x03\x04"), "it is a zip archive, not a picture", "unpack it"),
)  # fmt: skip


def other_kind(start: bytes) -> tuple[str, str]:
    """What a file is whose first bytes are those of no known kind of picture, and the fix."""
    found = next(((problem, fix) for magic, problem, fix in _KINDS if magic.match(start)), None)
    unknown = "it is not a picture of a known format, or its header is damaged"
    return found or foreign.known_mistake(start) or (unknown, "save it again as PNG, JPEG or WebP")
