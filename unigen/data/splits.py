"""Which files of a folder are meant: splits are never mixed unasked, and files that describe the data are no
data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from unigen.printing import printable

Split = Literal["train", "validation"]

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# as Hugging Face repositories name them: a word of its own, numbers may follow (val2017)
_SPLIT = re.compile(rf"(?:^|[-._ ])({'|'.join(_WORDS)})(?=$|[-._ 0-9])", re.IGNORECASE)
_SIDE = re.compile(
    r"(dataset_infos?|dataset_dict|parquet_info.*|.*_parquet_info|croissant)\.json|readme.*|licen[sc]e.*"
    r"|citation\.cff|\.gitattributes|\.gitignore|\.gitkeep",
    re.IGNORECASE,
)


class LeftOut(NamedTuple):
    """A file of a folder that is not read."""

    path: Path
    reason: str  # the split it belongs to; "" where it describes the data


def of_splits(left_out: Sequence[LeftOut], most: int = 6) -> str:
    """``val.jsonl (validation), test.jsonl (test)``: the files that are left out for their split; "" for
    none."""
    return _listed([f"{path.name} ({reason})" for path, reason in left_out if reason], most)


def describing(left_out: Sequence[LeftOut], most: int = 6) -> str:
    """The files that are left out since they describe the data; "" for none."""
    return _listed([path.name for path, reason in left_out if not reason], most)


def _listed(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return printable(", ".join(names[:most])) + more


def is_side_file(path: Path) -> bool:
    """Does a file of a folder describe the data, in place of holding records? ``path`` is relative to it."""
    return _SIDE.fullmatch(path.name) is not None or "parquet_info" in path.parts[:-1]


def split_of(path: Path) -> str | None:
    """The split that the name of a file, or else of the nearest folder around it, says; None for none."""
    for part in (path.name, *reversed(path.parts[:-1])):
        found = _SPLIT.search(part)
        if found:
            return _WORDS[found[1].lower()]
    return None


def choose(
    names: Sequence[Path], wanted: Split, told: Sequence[Path] | None = None
) -> tuple[list[Path], list[tuple[Path, str]], str]:
    """The files to read, those of other splits with their split, and what is wrong ("" where nothing is).

    Files of one split alone are taken whatever it is. Of several, or beside files that name none, the
    ``wanted`` one is; training data takes the files that name none, too, where no other split stands beside
    them, or where there is no train split. ``told`` is what says the split of each file, where
    that is not its path.
    """
    splits = {name: split_of(by) for name, by in zip(names, names if told is None else told)}
    held = {split for split in splits.values() if split}
    others = held - {wanted}
    alone = len(held) == 1 and None not in splits.values()
    if not held or alone or (wanted == "train" and not others):
        return list(names), [], ""
    taken: str | None = wanted
    if wanted not in held:
        taken = None
        if wanted == "validation" or None not in splits.values():
            return [], [], f"it holds {' and '.join(sorted(held))} data, and no {wanted} split"
    kept = [name for name in names if splits[name] == taken]
    return kept, [(name, splits[name] or "no split") for name in names if splits[name] != taken], ""
