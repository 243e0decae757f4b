"""Which files of a folder are meant: splits are never mixed unasked, and files that describe the data are no
data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from unigen.data.containers import BadData
from unigen.messages import listed
from unigen.printing import printable

Split = Literal["train", "validation"]

_WORDS = {
    **dict.fromkeys(("train", "training", "trainset", "训练"), "train"),
    **dict.fromkeys(
        ("validation", "valid", "val", "dev", "eval", "evaluation", "valset", "devset", "验证", "评测"),
        "validation",
    ),
    **dict.fromkeys(("test", "testing", "testset", "testdev", "测试"), "test"),
}
# names of their own: --split holdout means no file that is called test
_KINDS = {**_WORDS, "minival": "validation", "holdout": "test", "heldout": "test"}
# as Hugging Face repositories name them: a word of its own, numbers or one capital may follow (val2017,
# testA); Chinese has no blanks between words
_SPLIT = re.compile(
    rf"(?:^|[-._ ])(?P<word>{'|'.join(word for word in _KINDS if word.isascii())})"
    r"(?=$|[-._ 0-9]|(?-i:[A-Z])(?![A-Za-z]))"
    rf"|(?P<within>{'|'.join(word for word in _KINDS if not word.isascii())})",
    re.IGNORECASE,
)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}[-.].*")  # of a split that Hugging Face stores in pieces
_SIDE = re.compile(
    r"(dataset_infos?|dataset_dict|dataset-metadata|datapackage|index|classes|class_names|label2id|id2label"
    r"|vocab|tokenizer|special_tokens_map|added_tokens|parquet_info.*|.*_parquet_info|croissant|(.*[-_.])?config|package(-lock)?"
    r"|(.*[-_.])?stat(istic)?s)\.json|readme.*|licen[sc]e.*"
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
    others = [entry for entry in left_out if entry.reason]
    often = Counter(path.name for path, _ in others)
    names = [path.name if often[path.name] == 1 else f"{path.parent.name}/{path.name}" for path, _ in others]
    return _listed([f"{name} ({reason})" for name, (_, reason) in zip(names, others)], most)


def describing(left_out: Sequence[LeftOut], most: int = 6) -> str:
    """The files that are left out since they describe the data or are of no kind that is read, and the
    folders that this program wrote; "" for none."""
    paths = [path for path, reason in left_out if not reason]
    return _listed([p.name + "/" * (n < most and p.is_dir()) for n, p in enumerate(paths)], most)


def _listed(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return printable(", ".join(names[:most])) + more


def is_side_file(path: Path) -> bool:
    """Does a file of a folder describe the data, in place of holding records? ``path`` is relative to it."""
    return _SIDE.fullmatch(path.name) is not None or "parquet_info" in path.parts[:-1]


def split_of(path: Path) -> str | None:
    """The kind of split that the name of a file, or else of the nearest folder around it, says; None for
    none."""
    for part in (path.name, *reversed(path.parts[:-1])):
        found = _SPLIT.search(part)
        if found:
            return _KINDS[(found["word"] or found["within"]).lower()]
    return None


class _Told(NamedTuple):
    """What a file says of its split."""

    kind: str | None  # train, validation or test; of a split with a name of another kind that name
    own: str | None  # its own name, where it has one: train_sft of train_sft-00000-of-00002.parquet


def _told(path: Path, saved: str | None) -> _Told:
    shard = _SHARD.fullmatch(path.name)
    own = saved or (shard[1] if shard and _SPLIT.search(shard[1]) else None)
    return _Told(split_of(Path(own)) or own if own else split_of(path), own)


def choose(
    given: str | Path,
    names: Sequence[Path],
    wanted: Split,
    asked: str | None = None,
    told: Mapping[Path, Path | str] | None = None,
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The files to read of a folder ``given``, and those of other splits with their split.

    Files of one split alone are taken whatever it is. Of several, or beside files that name none, the
    ``wanted`` one is; training data takes the files that name none, too, where no other split stands beside
    them, or where there is no train split. Where one is ``asked`` for by its name (or several with + between
    them), that and nothing else is taken. ``told`` says the split of a file where that is not its path: by
    another path, or the split's name. Raises BadData where it cannot be told which is meant.
    """
    by = {name: (told or {}).get(name, name) for name in names}
    splits = {name: _told(name, b) if isinstance(b, str) else _told(b, None) for name, b in by.items()}
    try:
        found = [_named(one, splits) for one in asked.split("+")] if asked else [_unasked(splits, wanted)]
    except _NotOne as error:
        flag = "--split NAME" if wanted == "train" else "--val_split NAME, evaluate: --split NAME"
        fix = "name one of them" if asked else f"say which is meant ({flag})"
        fix = "leave the split out" if str(error).endswith("no file names one") else fix
        raise BadData(f"{given}: {error}. Fix: {fix}, or name the files.") from None
    kept = {name for files in found for name in files}
    others = [
        (name, told.own or told.kind or "no split") for name, told in splits.items() if name not in kept
    ]
    return [name for name in names if name in kept], others


class _NotOne(ValueError):
    """What is wrong with the splits of a folder."""


def _unasked(splits: Mapping[Path, _Told], wanted: Split) -> list[Path]:
    """The files of the ``wanted`` split."""
    held = {told.kind for told in splits.values() if told.kind}
    unnamed = any(told.kind is None for told in splits.values())
    taken: str | None = wanted
    if not held or (wanted == "train" and held == {wanted}):
        taken = None
    elif wanted not in held:
        if len(held) == 1 and not unnamed:
            taken = held.pop()
        elif wanted == "validation" or not unnamed:
            raise _NotOne(f"it holds {listed(sorted(held))} data, and no {wanted} split")
        else:
            return [name for name, told in splits.items() if told.kind is None]
    found = {name: told for name, told in splits.items() if taken is None or told.kind == taken}
    return _of_one_name(found, taken or wanted)


def _of_one_name(found: Mapping[Path, _Told], kind: str) -> list[Path]:
    """Of files of one kind those of one split: of ``train`` and ``train_sft`` the former."""
    own = {told.own for told in found.values() if told.own}
    if len(own) < 2:
        return list(found)
    plain = {name for name in own if _WORDS.get(name.lower()) == kind}
    if len(plain) != 1:
        raise _NotOne(f"it holds several {kind} splits, {listed(sorted(own))}")
    return [name for name, told in found.items() if told.own is None or told.own in plain]


def _named(asked: str, splits: Mapping[Path, _Told]) -> list[Path]:
    """The files of the split that is called so."""
    exact = [
        name
        for name, told in splits.items()
        if asked in (told.own or name.name.partition(".")[0], *name.parts[:-1])
    ]
    kind = _WORDS.get(asked.lower())
    of_kind = {name: told for name, told in splits.items() if told.kind == kind}
    found = exact if kind is None else _of_one_name(of_kind, kind)
    if found:
        return found
    there = sorted({told.own or told.kind for told in splits.values()} - {None})  # type: ignore[type-var]
    if not there:
        raise _NotOne(f"there is no split {asked}; no file names one")
    raise _NotOne(f"there is no split {asked}; it has {', '.join(there)}")
