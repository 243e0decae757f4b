"""Data sets in object storage: what of a remote folder is copied before it is read like any other."""

from __future__ import annotations

import glob
import logging
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath

from unigen import remote
from unigen.bars import each
from unigen.data.captions import CAPTIONS, describing_tables, is_picture, with_texts
from unigen.data.containers import BadData, kind_of
from unigen.data.splits import LeftOut, Split, choose, is_side_file

log = logging.getLogger("unigen")
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")


def addresses(text: str) -> list[str]:
    """The addresses that a text names: one, several with commas between, or what a pattern matches. Raises
    BadData for a pattern that matches nothing."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and all(map(remote.scheme_of, parts)):
        return [one for part in parts for one in addresses(part)]
    if not glob.has_magic(text) or remote.scheme_of(text) in ("http", "https"):
        return [text]
    try:
        system, place = remote.open_store(text)
        with remote.told_as_remote(text):
            matched = sorted(system.glob(place))
    except remote.RemoteError as error:
        raise BadData(str(error)) from None
    if not matched:
        raise BadData(f"{text}: no file or folder matches this pattern. Fix: correct it, or name the files")
    bare = place.lstrip("/")
    head = text.removesuffix(bare) if text.endswith(bare) else f"{remote.scheme_of(text)}://"
    found = [f"{head}{name.lstrip('/')}" for name in matched]
    return [url for url in found if kind_of(Path(url))] or found


def brought(url: str, split: Split | None, asked: str | None, left_out: list[LeftOut]) -> Path:
    """The copy of a remote file or folder, up to date. Of a folder with several splits that which is meant
    alone is copied; ``left_out`` gets the others, and files that hold no records.

    Raises:
        BadData: It cannot be read, or holds nothing, or several splits might be meant.
    """
    try:
        system, place = remote.open_store(url)
        target = remote.copy_of(url)
        names = _listed(system, place, url)
        if names is None:
            remote.refresh(url, target)
            return target
        wanted, others = _wanted(url, names, split, asked)
        met = {*wanted, *(name for name, _ in others)}
        others += [(name, "") for name in names if name not in met and not is_picture(name)]
        log.info("Copying what is new of %s, %s file(s), to %s", url, f"{len(wanted):,}", target)
        left_out += [LeftOut(target / name, reason) for name, reason in others]
        for name in each("copying", wanted, "files"):
            remote.refresh(f"{url.rstrip('/')}/{name.as_posix()}", target / name)
        _forget(target, set(names))
    except remote.RemoteError as error:
        raise BadData(str(error)) from None
    return target


def _listed(system: object, place: str, url: str) -> list[Path] | None:
    """The files below a place; None for a file. Raises RemoteError."""
    with remote.told_as_remote(url):
        if system.isfile(place):  # type: ignore[attr-defined]
            return None
        found = [PurePosixPath(name).relative_to(place) for name in system.find(place)]  # type: ignore[attr-defined]
    if not found:
        raise remote.RemoteError("missing", url, "there is no such file or folder", "correct the address")
    return [Path(name) for name in found if ".." not in name.parts and not _hidden(Path(name))]


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _wanted(
    url: str, names: list[Path], split: Split | None, asked: str | None
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """What of a folder is copied: the files with records, or else the pictures and their texts; and those of
    other splits."""
    sides = [name for name in names if name.name in DESCRIPTIONS]
    data = [name for name in names if kind_of(name) and name not in sides and not is_side_file(name)]
    folder = attrgetter("parent")
    files = groupby(sorted(names, key=folder), folder)
    shown = {at: with_texts([name.name for name in there]) for at, there in files}
    about = set(describing_tables(data, {at for at, pictures in shown.items() if pictures}))
    about |= {name for name in data if name.suffix.lower() == ".json" and name.stem in shown[name.parent]}
    data = [name for name in data if name not in about]
    if not data:
        return [name for name in names if is_picture(name) or name.suffix.lower() in CAPTIONS], []
    if split is None or any(name.name == "dataset_dict.json" for name in sides):
        return sides + data, []
    kept, others = choose(url, data, split, asked)
    return sides + kept, others


def _forget(target: Path, names: set[Path]) -> None:
    """Removes copies of files of records that are there no more."""
    for path in target.rglob("*"):
        name = path.relative_to(target)
        if not _hidden(name) and name not in names and kind_of(path) and path.is_file():
            path.unlink()
