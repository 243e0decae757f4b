"""Files of records: what is named, and what of a folder is meant."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unigen import remote
from unigen.data.captions import (
    CAPTIONS,
    NO_PICTURES,
    caption_of,
    describing_tables,
    is_picture,
    with_texts,
)
from unigen.data.containers import CONTAINERS, BadData, kind_of
from unigen.data.embedded import place_of
from unigen.data.splits import LeftOut, Split, choose, is_side_file, split_of
from unigen.data.storage import addresses, brought
from unigen.data.unpack import PACKED
from unigen.files import meant
from unigen.messages import listed
from unigen.outputs import is_output
from unigen.printing import printable

log = logging.getLogger(__name__)

# ends like data of a kind that cannot be read, or not in this packing
_LIKE_DATA = re.compile(
    r".*\.(ndjson|tfrecord|mds|lmdb|mdb|feather|npz|pkl|pickle|h5|hdf5|db|sqlite"
    r"|(jsonl?|csv|tsv|tar|parquet|arrow)\.(gz|bz2|xz|zst|zip|7z|txt)|tgz|xlsx?|ods)",
    re.IGNORECASE,
)
MAX_STATE = 16 << 20  # bytes of a description that Hugging Face datasets wrote
_HF_FILES = ("state.json", "dataset_info.json")
_HF_SPLITS = "dataset_dict.json"
# What holds the records where files of several kinds lie in one folder: the others describe them, as the
# tables beside the tars that img2dataset writes.
_FIRST = ((".tar",), (".jsonl", ".json", ".parquet", ".arrow"), (".csv", ".tsv"))


def find_files(
    paths: Iterable[str | Path],
    root: str | Path | None = None,
    split: Split | None = "train",
    left_out: list[LeftOut] | None = None,
    asked: str | None = None,
    alone: bool = False,
) -> list[tuple[Path, str]]:
    """Absolute paths of the files, each with its name in the folder that was given.

    Folders are searched recursively, in sorted order, hidden entries left out; linked ones too, each place
    once. A folder that Hugging Face ``datasets`` saved stands for its Arrow files.

    Args:
        paths: Files, folders, patterns, or several of them with commas between (:func:`expand`).
        root: ``data_root``, which no linked folder may leave; None: no limit.
        split: What to take of a folder that holds several splits; None: everything.
        left_out: Gets the files of folders that are not read: those of other splits, and those that describe
            the data.
        asked: The name of the split to take, or several with + between them.
        alone: Pictures of which none has a text are records, too (``trigger_word`` is all of it).

    Raises:
        BadData: No path is given, one does not exist or is of no known kind, a folder holds nothing to read,
            or a file or linked folder in it that may not be read.
    """
    found, left_out = [], [] if left_out is None else left_out
    given_paths = [one for path in paths for one in expand(path, left_out)]
    for given in given_paths:
        if isinstance(given, str) and remote.scheme_of(given):
            path = brought(given, split, asked, more := [])
            _warn_of_data(given, (name.relative_to(path) for name, reason in more if not reason))
            left_out += more
        else:
            path = Path(given).absolute()
        if path.is_dir():
            lies = _searched(path, root)
            sides, unknown = lies.sides, lies.unknown
            shards = describing_tables(lies.names, lies.pictured)
            names = sorted(set(lies.names) - set(shards))
            sides += shards
            if not names:
                names = sorted(_captioned(path, root, sides, alone))
                unknown = [name for name in unknown if name.suffix.lower() not in CAPTIONS]
            sides += unknown
            _warn_of_data(given, unknown)
            others: list[tuple[Path, str]] = []
            if split is not None:
                # of a picture the folders alone tell its split
                told = {name: name.parent for name in names if is_picture(name)} | lies.saved
                names, others = choose(given, names, split, asked, told)
            names = _first_kind(path, names, sides)
            left_out += [LeftOut(path / name, "") for name in sorted(sides)]
            left_out += [LeftOut(path / name, reason) for name, reason in others]
            if not names:
                raise BadData(f"{given}: the folder holds {_nothing(path)}")
            found += [(path / name, name.as_posix()) for name in names]
        elif not path.is_file():
            need_paths([given])
            raise BadData(f"{given}: it is not a regular file. Fix: name a file or a folder")
        elif kind_of(path) is None:
            known = ", ".join(CONTAINERS)
            raise BadData(
                f"{given}: its name ends in none of {known}, nor in .json or .jsonl and one"
                f" of {', '.join(PACKED)}. Fix: {_renamed(path)}"
            )
        elif asked and not any(remote.scheme_of(str(one)) or Path(one).is_dir() for one in given_paths):
            what = "this is one file" if len(given_paths) == 1 else "files alone are named"
            raise BadData(
                f"{given}: split is {asked!r}, and {what}. Fix: leave split out, or name the folder"
            )
        else:
            found.append((path, path.name))
    if not found:
        raise BadData("no data is named. Give a JSON or JSONL file, or a folder of them.")
    return found


def need_paths(paths: Iterable[str | Path]) -> None:
    """Raises BadData where nothing is at a path of this machine: to be known before slower work begins."""
    here = [path for path in paths if not remote.scheme_of(os.fspath(path))]
    for given in (one for path in here for one in expand(path)):
        if remote.scheme_of(os.fspath(given)) or Path(given).exists():
            continue
        near = meant(Path(given))
        raise BadData(
            f"{given}: there is no such file or folder"
            + (f"; did you mean {near}?" if near else ".")
            + " Fix: correct the path of the data"
        )


def _warn_of_data(folder: str | Path, unknown: Iterable[Path]) -> None:
    """Says which files of a folder look like data and are not read."""
    for path in sorted(name for name in unknown if _LIKE_DATA.fullmatch(name.name)):
        log.warning("%s of %s is not read. Fix: %s", printable(str(path)), folder, _renamed(path))


def expand(given: str | Path, left_out: list[LeftOut] | None = None) -> list[str | Path]:
    """What a path names: itself where it is there; what the pattern ``data/**/*.jsonl`` matches; or each of
    several, ``a.jsonl,b.jsonl``.

    Of what a pattern matches the files of known kinds are meant, and folders where there are none;
    ``left_out`` gets the others. Raises BadData for a pattern that matches nothing.
    """
    text = os.fspath(given)
    parts = [part.strip() for part in text.split(",")]
    if scheme := remote.scheme_of(text):
        if len(parts) > 1 and all(kind_of(Path(part)) for part in parts):  # some may be no addresses
            return [one for part in parts for one in expand(part, left_out)]
        return list(addresses(scheme + text[len(scheme) :]))
    if text.lower().startswith("file:"):
        given = text = _path_of(text)
    if os.path.lexists(text):
        return [given]
    if pattern := glob.has_magic(text):
        matched = [Path(path) for path in sorted(glob.glob(text, recursive=True))]
        if files := [path for path in matched if _is_data(path)]:
            if left_out is not None:
                left_out += [LeftOut(path, "") for path in matched if path.is_file() and path not in files]
            return list(files)
        if matched:
            return [path for path in matched if not any(above in matched for above in path.parents)]
    if "," in text:
        return list(dict.fromkeys(os.fspath(one) for part in parts if part for one in expand(part, left_out)))
    if pattern:
        above = [place for place in Path(text).parents if not glob.has_magic(str(place)) and place.is_dir()]
        raise BadData(
            f"{given}: no file or folder matches this pattern"
            + (f"; {above[0]} holds {_holding(above[0])}" if above else "; its folder is not there")
            + ". Fix: correct the pattern, or name the files"
        )
    return [given]


def _path_of(address: str) -> str:
    """The path that a ``file:`` address names. Raises BadData where it names none on this machine."""
    try:
        return str(place_of(address))
    except ValueError as error:
        why, fix = error.args
        raise BadData(f"{address}: {why}. Fix: {fix}") from None


def _is_data(path: Path) -> bool:
    """Does a file that a pattern matches hold records?"""
    described = is_side_file(Path(path.name)) or path.name in (*_HF_FILES, _HF_SPLITS)
    return bool(kind_of(path)) and path.is_file() and not described


def _holding(folder: Path) -> str:
    """What a folder holds, the first few names."""
    names = sorted(f"{path.name}{'/' * path.is_dir()}" for path in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return printable(", ".join(names[:8])) + more if names else "nothing"


def _renamed(path: Path) -> str:
    """How a file of no known kind gets to be read."""
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst")):
        return "unpack it to a .tar, whose members are then read in place"
    if path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z"):
        return "unpack it"
    text = path.suffix.lower() in CAPTIONS
    if is_picture(path) or (text and any(map(is_picture, path.parent.glob(f"{glob.escape(path.stem)}.*")))):
        return f"name its folder, {path.parent}: each picture there with a text beside it is a record"
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        return "save it as CSV"
    if path.suffix.lower() != ".ndjson" and _LIKE_DATA.fullmatch(path.name):
        return "write its records as JSON Lines or Parquet"
    return (
        "name it after what it holds: .jsonl one record a line, .json a list of records, .csv or .tsv a table"
        " with a first line of names"
    )


def _nothing(folder: Path) -> str:
    """What a folder without records holds, and what to do."""
    kinds = "no .json or .jsonl, Parquet, Arrow, CSV, TSV or tar file"
    if any(is_picture(name) for name in _everything(folder)):
        return (
            "pictures, and nothing that says what they show. Fix: put a text beside each (a.png, a.txt), or"
            ' write a metadata.jsonl with lines such as {"file_name": "a.png", "text": "..."}, or give'
            " --trigger_word as the text of all"
        )
    return f"{kinds}. Name the folder or the files with the records."


def _first_kind(folder: Path, names: list[Path], sides: list[Path]) -> list[Path]:
    """The files of the first of ``_FIRST`` that are there; ``sides`` gets the others. Raises BadData where
    one of those may be the data: a table of pictures that lie in tars, or a file named by a split."""
    for kinds in _FIRST:
        kept = [name for name in names if kind_of(name) in kinds]
        if kept:
            others = [name for name in names if kind_of(name) not in kinds]
            stems, splits = {name.with_suffix("") for name in kept}, {None, *map(split_of, kept)}
            for name in others:
                if split_of(name) not in splits or (kinds == (".tar",) and not _describes(name, stems)):
                    both = printable(listed(map(str, (kept[0], name))))
                    raise BadData(
                        f"{folder}: {both} may both hold records. Fix: name the files that do, or move the"
                        " others out of the folder."
                    )
            sides += others
            return kept
    return names


def _describes(name: Path, stems: set[Path]) -> bool:
    """Is a table named after a file, as ``00000.parquet`` and ``00000_stats.json`` beside ``00000.tar``?"""
    parts = re.split("([-._])", name.name)
    return any(name.with_name("".join(parts[:n])) in stems for n in range(1, len(parts), 2) if parts[0])


def _captioned(folder: Path, root: str | Path | None, sides: list[Path], alone: bool) -> list[Path]:
    """The pictures of a folder with texts beside them; ``sides`` gets the texts that are not read. Raises
    BadData for a text outside of ``root``, and for a picture that is a link to nowhere."""
    names = list(_everything(folder))
    read = {name: caption_of(folder / name) for name in names if is_picture(name)}
    if not alone and not any(read.values()):
        read = {}
    for picture, text in read.items():
        _require_file(folder / picture)
        if text and root is not None and not _is_inside(text, root):
            raise BadData(
                f"{text}: this link leads out of data_root, {root}. Fix: remove the link, or put the text"
                " itself there"
            )
    # folders of kohya-ss (10_name)
    told = {part for picture in read for part in picture.parent.parts if re.match(r"\d+_.", part)}
    if len({name.partition("_")[0] for name in told}) > 1:
        named = printable(", ".join(sorted(told)[:4]))
        fix = "name them as train_sources with weight, which says how often each is met"
        log.warning("%s: the numbers before %s are no repeats here. Fix: %s", folder, named, fix)
    known = {picture.with_suffix("") for picture in read}  # one of them may be read under another ending
    lost = [
        name for name in names if name.suffix.lower() in NO_PICTURES and name.with_suffix("") not in known
    ]
    if lost := sorted(name for name in lost if caption_of(folder / name)):
        fix = "convert them to JPEG or PNG (HEIC in Python: pip install pillow-heif)"
        told_first = printable(str(lost[0]))
        log.warning(
            "%s: %s pictures with texts are not read, as %s. Fix: %s", folder, len(lost), told_first, fix
        )
    if read:
        texts = {name for name in names if name.suffix.lower() in CAPTIONS and not is_side_file(name)}
        sides += texts - {text.relative_to(folder) for text in read.values() if text}
    return list(read)


def _is_inside(path: Path, root: str | Path) -> bool:
    """Does a path lie in a folder, after all links are resolved?"""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _everything(folder: Path) -> Iterator[Path]:
    """The files of a folder, relative to it; hidden entries, linked folders and what this program wrote
    left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not is_output(Path(place, n)))
        yield from (Path(place, name).relative_to(folder) for name in names if not name.startswith("."))


@dataclass
class _Folder:
    """What lies in a folder, each relative to it."""

    names: list[Path] = field(default_factory=list)  # files with records
    sides: list[Path] = field(default_factory=list)  # files about them, and folders that this program wrote
    saved: dict[Path, str] = field(default_factory=dict)  # the split, of those in a saved DatasetDict
    unknown: list[Path] = field(default_factory=list)  # files of other kinds, without pictures
    pictured: set[Path] = field(default_factory=set)  # folders of pictures with texts


def _searched(folder: Path, root: str | Path | None) -> _Folder:
    """What lies in a folder and those below it. Raises BadData for one that may not be read or followed."""
    found = _Folder()
    met: set[tuple[int, int]] = set()
    linked = [folder]  # folders behind links come last: what lies here really keeps its name
    for top in linked:
        for place, folders, names in os.walk(top, onerror=_unlisted):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in met:  # a loop, or a second way
                folders.clear()
                continue
            met.add((status.st_dev, status.st_ino))
            _search_one(found, folder, Path(place).relative_to(folder), folders, names)
            links = [Path(place, name) for name in sorted(folders) if os.path.islink(Path(place, name))]
            for link in links:
                _check_link(link, folder, root)
            linked += links
    return found


def _search_one(found: _Folder, folder: Path, at: Path, folders: list[str], names: list[str]) -> None:
    """Adds the files in the folder ``at`` of ``folder``; ``folders`` keeps those to be searched, too."""
    ours = {name for name in folders if is_output(folder / at / name)}
    pictured = with_texts(names)
    if pictured:
        found.pictured.add(at)
    described = {
        name for name in names
        if is_side_file(at / name) or (name.lower().endswith(".json") and name[:-5] in pictured)
    }  # fmt: skip
    found.sides += [at / name for name in sorted(ours | (described - {*_HF_FILES, _HF_SPLITS}))]
    folders[:] = [name for name in folders if name not in ours and not name.startswith(".")]
    if _HF_SPLITS in names:
        for split in _saved_splits(folder / at, folders):
            files = [at / split / name for name in _saved_files(folder / at / split)]
            found.saved |= dict.fromkeys(files, split)
            found.names += files
        folders.clear()
    elif all(name in names for name in _HF_FILES):
        found.names += [at / name for name in _saved_files(folder / at)]
        folders.clear()
    else:
        # as in the cache of datasets: a description beside the data
        described |= set(_HF_FILES) if any(name.endswith(".arrow") for name in names) else set()
        for name in names:
            if name.startswith(".") or name in described:
                continue
            if kind_of(at / name):
                _require_file(folder / at / name)
                found.names.append(at / name)
            elif not is_picture(at / name):
                found.unknown.append(at / name)


def _check_link(link: Path, folder: Path, root: str | Path | None) -> None:
    """Raises BadData for a linked folder that is not to be followed."""
    if _is_inside(link, folder):
        return
    if root is not None and not _is_inside(link, root):
        raise BadData(
            f"{link}: this link leads to a folder outside data_root, {root}. Fix: move that folder into"
            " data_root, name another one, or remove the link."
        )
    if _is_inside(folder, link):
        raise BadData(
            f"{link}: this link leads to a folder that holds {folder} itself. Fix: remove the link, or name"
            " that folder."
        )


def _require_file(path: Path) -> None:
    """Raises BadData for an entry of a folder that cannot be read as a file."""
    if not path.is_file():
        raise BadData(
            f"{path}: it is a link that leads nowhere, or no regular file. Fix: remove it, or put the file"
            " there."
        )


def _unlisted(error: OSError) -> None:
    raise BadData(f"{error.filename}: the folder cannot be read ({error.strerror}). Check its permissions.")


def _saved_splits(folder: Path, folders: list[str]) -> list[str]:
    """The splits of a saved ``DatasetDict``, checked to be all there."""
    splits = [name for name in _json_field(folder / _HF_SPLITS, "splits") if isinstance(name, str)]
    missing = [name for name in splits if name not in folders]
    if missing or not splits:
        what = f"the split {missing[0]}, which {_HF_SPLITS} names," if missing else "every split"
        raise BadData(f"{folder}: {what} is missing. Fix: copy the whole folder again.")
    return splits


def _saved_files(folder: Path) -> list[str]:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote, checked to be all there."""
    state = folder / "state.json"
    if _json_field(state, "_indices_files", missing=[]):
        raise BadData(
            f"{folder}: an old version of datasets saved a selection of its rows there. Save it again with"
            " datasets 2 or newer."
        )
    names = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in _json_field(state, "_data_files")
    ]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or kind_of(Path(name)) is None:
            raise BadData(
                f"{state}: _data_files names {name!r}, which is no Arrow file of this folder. Save the data"
                " set again."
            )
        if not (folder / name).is_file():
            raise BadData(
                f"{folder}: {name} is missing, which state.json names. Copy the whole folder again."
            )
    return names


def _json_field(path: Path, name: str, missing: Any = None) -> list[Any]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_STATE:
            raise ValueError(f"it is no regular file of at most {MAX_STATE:,} bytes")
        value = json.loads(path.read_bytes()).get(name, missing)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadData(f"{path}: it cannot be read ({error}). Save the data set again.") from None
    if not isinstance(value or missing, list):
        raise BadData(f"{path}: {name} is not a list. Save the data set again.")
    return value or []
