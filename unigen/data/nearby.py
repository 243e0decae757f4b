"""Where the pictures are that a file of records names and that are not where it says."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path

from unigen.data.mapping import ReadOptions

DEPTH = 2  # folders below the file's, and below the one that holds it
MAX_FOLDERS, MAX_ENTRIES = 500, 2000  # that are looked at; entries of each of them


def image_root_for(picture: str | Path, file: Path, read: ReadOptions) -> str | None:
    """The folder that would have to be ``image_root`` for ``picture`` to be found, which ``file`` names by a
    relative path; None where it is nowhere near."""
    folder = read.folder(file)
    try:
        name = Path(picture).relative_to(folder)
    except ValueError:  # an absolute path, which image_root does not change
        return None
    for place in _folders(folder, file.parent):
        inside = read.data_root is None or place.is_relative_to(read.data_root)
        if inside and place != folder and os.path.isfile(place / name):
            return min(os.path.relpath(place), str(place), key=len)
    return None


_PACKED = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")


def packed_near(file: Path) -> str | None:
    """An archive beside a file of records, which may hold its pictures."""
    names = [path.name for path in _files_in(file.parent) if path.suffix.lower() in _PACKED]
    return next((name for name in sorted(names) if name != file.name and ".json" not in name), None)


@lru_cache(16)
def _files_in(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        return [Path(entry.path) for entry in islice(entries, MAX_ENTRIES)]
    return []


@lru_cache(16)
def _folders(*starts: Path) -> list[Path]:
    """Folders near those: the two above, then what lies below, near ones first, links and hidden ones left
    out."""
    found = dict.fromkeys(above for start in starts for above in (start, start.parent, start.parent.parent))
    level = list(dict.fromkeys(folder for start in starts for folder in (start, start.parent)))
    for _ in range(DEPTH):
        level = [below for folder in level for below in _below(folder)]
        found |= dict.fromkeys(level)
        if len(found) > MAX_FOLDERS:
            break
    return list(islice(found, MAX_FOLDERS))


def _below(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            some = islice(entries, MAX_ENTRIES)
            return [
                Path(e.path) for e in some if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []
