"""The index of data that was read before, kept in the cache folder: a resume does not read a million records
again.

An entry holds for the same files (by path, size, times and inode), read by the same rules, in the same way.
Of pictures the folders are compared: an entry falls when something was put into one, taken away or renamed;
and those that could not be used: it falls when one of them was mended. A sound picture
that is overwritten in place is found when it is used (``changed_picture``, ``broken_picture``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from unigen.data.captions import caption_of, is_picture
from unigen.data.containers import ByteSpan
from unigen.data.examine import stamp
from unigen.data.indexing import Found, Index
from unigen.data.keys import Notes
from unigen.files import atomic, cache_folder, free_bytes
from unigen.remote import RESERVE
from unigen.sequence.lengths import TokenLengths
from unigen.sequence.types import BadRecord, Origin
from unigen.version import __version__

DAYS = 30  # after which an entry that no run used is removed
LEAST = 1 << 20  # bytes of data below which reading it again costs nothing
_ROOMS = ("data", "sequence")  # folders of the package whose rules decide what a record becomes

log = logging.getLogger("unigen")


def key_of_data(files: Sequence[Path], *how: Any) -> str:
    """Names the index of ``files``, read as ``how`` says."""
    status = [(str(path), stamp(path)) for path in (*files, *_beside(files))]
    return hashlib.sha256(repr((_rules(), status, how)).encode("utf-8", "surrogateescape")).hexdigest()


def load_index(key: str, files: Sequence[Path]) -> Found | None:
    """The index that was kept under ``key``; None where there is none, or where pictures may have changed."""
    path = _folder() / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            told = json.loads(arrays["told"].tobytes())
            if any(stamp(name) != before for name, before in (told["folders"] | told["faulty"]).items()):
                return None
            found = _restored(told, arrays, files)
        os.utime(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # of numpy and zipfile, for a damaged file; it is read anew
        log.info("The kept index %s cannot be used (%s); the data is read again", path, error)
        return None
    return found


def save_index(key: str, found: Found) -> None:
    """Keeps an index. Where it cannot be written, the data is read again next time, which is said."""
    told = {
        "counts": [[*name, n] for name, n in found.counts.items()],
        "notes": [[*name, n] for name, n in found.notes.items()],
        "bad": [[list(span), _told(error)] for span, error in found.bad],
        "folders": {name: stamp(name) for name in sorted(found.folders)},
        "faulty": found.faulty,
        "distinct": found.distinct,
        "digests": found.digests,
        "held": found.held,
        "lengths": found.lengths is not None,
    }
    arrays = {"told": np.frombuffer(json.dumps(told).encode(), np.uint8)}
    arrays["index"] = found.index.rows()
    if found.lengths is not None:
        arrays |= {f"lengths{i}": values for i, values in enumerate(found.lengths.arrays())}
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(folder)
        if free_bytes(folder) < RESERVE + sum(values.nbytes for values in arrays.values()):
            raise OSError("no room")
        with atomic(folder / f"{key}.npz", folder / f".{key}.{os.getpid()}", sync=False, mode=0o600) as file:
            np.savez(file, **arrays)
    except OSError as error:
        log.info("The index of the data is not kept in %s (%s): the next start reads it again", folder, error)


def _restored(told: dict[str, Any], arrays: Any, files: Sequence[Path]) -> Found:
    found = Found(told["lengths"])
    found.index = Index(arrays["index"])
    if told["lengths"]:
        found.lengths = TokenLengths.of([arrays[f"lengths{i}"] for i in range(6)])
        if len(found.lengths) != len(found.index):
            raise ValueError("lengths of other records")
    found.counts = Counter({(what, name): n for what, name, n in told["counts"]})
    found.notes = Notes({(what, name): n for what, name, n in told["notes"]})
    for values, (code, field, text, expected, fix) in told["bad"]:
        span = ByteSpan(*values)
        origin = Origin(files[span.file], span.line or None, span.index)
        found.refuse(span, BadRecord(code, field, text, expected, fix, origin))
    found.held = Counter({int(number): n for number, n in told["held"].items()})
    found.inside, found.digests = told["distinct"], {int(n): d for n, d in told["digests"].items()}
    return found


def _told(error: BadRecord) -> list[str]:
    return [error.code, error.field, error.found, error.expected, error.fix]


def _folder() -> Path:
    return cache_folder() / "index"


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        if path.stat().st_mtime < time.time() - DAYS * 86400:
            path.unlink(missing_ok=True)


def _beside(files: Sequence[Path]) -> Iterator[Path]:
    """The files of the texts of pictures that are records."""
    for path in files:
        if is_picture(path) and (caption := caption_of(path)):
            yield caption


@cache
def _rules() -> str:
    """A digest of the code that decides what records become, and of the decoder of pictures."""
    digest = hashlib.sha256(f"{__version__} {version('pillow')} {np.__version__}".encode())
    package = Path(__file__).parents[1]
    for room in _ROOMS:
        for path in sorted((package / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
