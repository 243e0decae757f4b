"""Where the pictures are that a file of records names and that are not where it says."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path

from unigen.data.mapping import ReadOptions
from unigen.data.tar import member_names

DEPTH = 2  # folders below the file's, and below the one that holds it
MAX_FOLDERS, MAX_ENTRIES = 500, 2000  # that are looked at; entries of each of them
MAX_MEMBERS = 100_000  # of a tar whose names are looked at


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
_PICTURES = ("image", "images", "img", "imgs", "pics", "picture", "pictures", "photos")


def packed_near(picture: str | Path, file: Path) -> str | None:
    """An archive beside a file of records that holds ``picture``; of one that cannot be looked into its name
    says so: that of the file, of a folder of the picture's path, or one of pictures."""
    for path in _archives_in(file.parent):
        names = _names_in(path) if path != file else ()
        if names is None:
            stem = path.name.partition(".")[0]
            found = stem.lower() in _PICTURES or stem in (file.stem, *Path(picture).parts[-3:-1])
        else:
            found = Path(picture).name in names
        if found:
            return path.name
    return None


@lru_cache(16)
def _archives_in(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        paths = sorted(Path(entry.path) for entry in islice(entries, MAX_ENTRIES))
        return [path for path in paths if path.suffix.lower() in _PACKED and ".json" not in path.name]
    return []


@lru_cache(16)
def _names_in(archive: Path) -> frozenset[str] | None:
    """The names of files, without their folders, that the first members of an archive have; None where it
    cannot be told."""
    with suppress(OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as packed:
                return frozenset(name.rpartition("/")[2] for name in packed.namelist())
        if archive.suffix.lower() == ".tar":
            return frozenset(name.rpartition("/")[2] for name in islice(member_names(archive), MAX_MEMBERS))
    return None


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
