"""WebDataset tars: members with one key (``0001.jpg``, ``0001.txt``) are one record, read in place: it is a
run of bytes of the file, and nothing is unpacked to a disk.

The row of a record has a field for each member, named by its ending (``jpg``, ``txt``, ``json``), as Hugging
Face ``datasets`` has it in tables, too; :func:`members_record` makes a record of it.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from unigen.data.captions import NO_PICTURES, PICTURES
from unigen.data.json_text import decode, parse_json
from unigen.data.keys import RECORD, is_empty, refuse, weights_of_record
from unigen.data.layouts import OTHER_ANSWERS
from unigen.data.words import Json, cut
from unigen.sequence.types import BadRecord

KEY = "__key__"
TEXTS = ("txt", "text", "caption", "cap")
_TASKS = frozenset((*OTHER_ANSWERS, "prompt", "conversations", "messages", "instruction", "query"))
MAX_SAMPLE = 1 << 30  # bytes of the members of one key together
MAX_HEADER = 1 << 20  # bytes of a header for a long name
_BLOCK = 512
_REMEMBERED = 1000  # keys from the start of which a member that stands apart is found


class MemberSpan(NamedTuple):
    """Where the members of one key lie."""

    offset: int
    length: int


def runs(path: Path, first: int = 0, stop: int | None = None) -> Iterator[MemberSpan]:
    """The records of a tar between two bytes, from the headers of its members alone. Raises ValueError for a
    damaged one, and for one with links or sparse members; BadRecord where members of one key stand apart."""
    size = os.path.getsize(path)
    with _Headers(io.FileIO(path)) as file:
        file.seek(first)
        key, names, start, end = "", set[str](), first, 0
        met: dict[str, set[str]] = {}
        for member, _ in _members(file, whole=stop is None):
            if stop is not None and member.offset >= stop:
                break
            if member.offset_data + member.size > size:
                raise ValueError(f"its member {member.name!r} is cut off")
            here, ending = _split(member.name)
            if here != key or ending in names:
                if here != key and ending not in met.get(here, {ending}):
                    found = f"{cut(member.name)} apart from the other members of {cut(here)}"
                    fix = "pack them sorted by name, as tar --sort=name -cf data.tar -C FOLDER . does"
                    expected = "the members of one key behind one another"
                    raise BadRecord("broken_file", "(file)", found, expected, fix)
                if names:
                    yield _run(start, end, key)
                key, names, start = here, set(), member.offset
                if len(met) < _REMEMBERED:
                    met.setdefault(here, names)
            names.add(ending)
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if names:
            yield _run(start, min(end, size), key)


def member_names(path: Path) -> Iterator[str]:
    """The names of the members of a tar. Raises ValueError for a damaged one."""
    with _Headers(io.FileIO(path)) as file:
        yield from (member.name for member, _ in _members(file))


def row_at(path: Path, offset: int, length: int) -> Json:
    """The row at a place that :func:`runs` gave."""
    with path.open("rb") as file:
        file.seek(offset)
        return row_of(file.read(length))


def row_of(data: bytes) -> Json:
    """The row of the bytes of a run."""
    row: Json = {}
    for member, tar in _members(io.BytesIO(data)):
        row[KEY], ending = _split(member.name)
        file = tar.extractfile(member)
        assert file is not None
        row[ending] = file.read()
        if len(row[ending]) != member.size:
            raise ValueError(f"its member {member.name!r} is cut off")
    return row


def members_record(row: Json) -> Json:
    """The record of a row of members: the picture under ``image`` (that of ``0001.x.jpg`` under ``x``), the
    text under ``text``; the fields of the JSON too, but where picture and text stand already it is
    ``metadata``, without what any record may say of its learning, and what says another task than the text.

    Raises:
        BadRecord: Two members have one name, a text is no UTF-8, a JSON no object, or it has a field that
            is refused.
    """
    record: Json = {}
    described: Json = {}
    members: dict[str, str] = {}
    describing: dict[str, str] = {}

    def claim(name: str, members: dict[str, str], fix: str) -> None:
        if (other := members.setdefault(name, ending)) != ending:
            found = f"{cut(other)}, {cut(ending)}"
            raise BadRecord("ambiguous_piece", name, found, f"one member that is {cut(name)}", fix)

    held = {name: value for name, value in row.items() if value is not None and name not in (KEY, "__url__")}
    # a picture of a kind that cannot be read counts where there is no other, and is refused by its header
    readable = any(f".{ending.lower()}".endswith(PICTURES) for ending in held)
    for ending, value in held.items():
        stem, _, kind = ending.lower().rpartition(".")
        if kind == "json":
            said = _parsed(value, ending, parse_json)
            if not isinstance(said, dict):
                expected, fix = "a JSON object", "write one {...} there"
                raise BadRecord("wrong_type", ending, type(said).__name__, expected, fix)
            for name, made in said.items():
                if described.setdefault(name, made) != made:
                    claim(name, describing, "keep the field in one of them")
                describing.setdefault(name, ending)
            continue
        name, made = ending, value
        if f".{kind}" in (PICTURES if readable else (*PICTURES, *NO_PICTURES)):
            name = stem or "image"
        elif kind in TEXTS:
            name, made = stem or "text", _parsed(value, ending, lambda text, line: decode(text, line).strip())
        claim(name, members, "pack one of them alone, or the other as KEY.NAME.ENDING")
        record[name] = made
    if "image" in record and "text" in record:
        refuse(described)
        names = dict.fromkeys((*RECORD, *weights_of_record(described)))
        said = {name: described.pop(name) for name in names if name in described and name != "metadata"}
        meant = {
            name: value for name, value in described.items() if _another_task(name, value, record["text"])
        }
        described = {name: value for name, value in described.items() if name not in meant}
        return {**meant, **said, **record, "metadata": {**described, "key": row[KEY]}}
    return {**described, **record, "metadata": {"key": row[KEY]}}


def _another_task(name: str, value: Any, text: Any) -> bool:
    """Does a field of the JSON beside a picture and a text say what is to be learnt, in other words than the
    text? The record is judged with it then, as one of any other file."""
    if is_empty(value) or name not in _TASKS:
        return False
    same = isinstance(value, str) and isinstance(text, str) and value.split() == text.split()
    return not same and not (name == "label" and not isinstance(value, str))


class _Headers(io.BufferedReader):
    """A tar of which the headers alone are read: one for a long name may claim any size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        return super().read(size)


def _members(file: BinaryIO, whole: bool = False) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The files of a tar from where ``file`` stands on, each with the reader of its contents. Raises
    ValueError for a damaged one, ``whole``: also where its end mark is missing."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it holds nothing but ``file``)
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.size < 0:  # it would lead back, to be read for ever
                raise ValueError(f"its member {member.name!r} has a negative size")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise ValueError(f"its member {member.name!r} is no plain file")
            yield member, tar
    except (tarfile.TarError, RecursionError) as error:
        raise ValueError(str(error)) from None
    # the module takes any block that is no header for the end
    file.seek(tar.offset)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise ValueError(f"what stands behind byte {tar.offset:,} is no member")
        whole = False
    if whole:
        raise ValueError("its end mark is missing")


def _run(start: int, end: int, key: str) -> MemberSpan:
    if end - start > MAX_SAMPLE:
        raise ValueError(f"the members of {key!r} have more than {MAX_SAMPLE:,} bytes")
    return MemberSpan(start, end - start)


def _split(name: str) -> tuple[str, str]:
    """The key and the ending of a member: what stands before and behind the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _parsed(value: Any, field: str, parse: Callable[[bytes, int], Any]) -> Any:
    """A member's contents; a value of a table is as it is."""
    try:
        return parse(value, 0) if isinstance(value, bytes) else value
    except BadRecord as error:
        error.field = field
        raise
