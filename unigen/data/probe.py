"""What is told of a source before all of it is read: are its folders there, does the mapping of its fields
match anything."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

from unigen import remote
from unigen.config import nearest
from unigen.data.containers import BadData, parts, read_part
from unigen.data.formats import FORMATS, parse_with_fields, record_value
from unigen.data.keys import LEARNING, RECORD
from unigen.data.mapping import ReadOptions, found_at
from unigen.data.words import Json, names
from unigen.printing import typed
from unigen.sequence.types import BadRecord, Origin

FIRST = 1000
"""Records among which every place of a mapping must be found once."""


def check_roots(read: ReadOptions) -> None:
    """Raises BadData where a folder that is named is none."""
    for name, what in (("data_root", "that all pictures lie in"), ("image_root", "that paths start from")):
        path = getattr(read, name)
        if path is not None and not path.is_dir() and not remote.url_of(path):
            raise BadData(f"{path}: {name} is no folder. Fix: name the folder {what} (--{name} ...)")


def require_match(files: Sequence[Path], read: ReadOptions) -> None:
    """Raises BadData where no format has a field that ``read.fields`` makes, where a place of it is in none
    of the first records of the files, or where ``read.trigger_word`` changes none of these."""
    if read.trigger_word and not any(_is_captioned(value, read) for value in islice(_values(files), FIRST)):
        raise BadData(
            f"trigger_word is {read.trigger_word!r}, and none of the first {FIRST:,} records of {files[0]} is"
            " a picture with a text (format 11). Fix: leave it out, or give it to the source that it is meant"
            " for (train_sources)"
        )
    if not read.fields:
        return
    known = {name for entry in FORMATS.values() for name in entry.known} | {*RECORD, *LEARNING}
    for name, place in read.fields.items():
        if name not in known and not re.fullmatch(r"(problem|reasoning)_image_\d+", name):
            fix = _turned(name, place, known, files)
            if not fix:
                near = nearest(name, sorted(known))
                fix = f"did you mean {near}? Otherwise " if near else ""
                fix += "give a name that docs/data_formats.md has on the left"
            raise BadData(f"--fields {name}={place}: no format has a field {name}. Fix: {fix}")
    left, seen = dict(read.fields), dict[str, None]()
    for record in islice(_values(files), FIRST):
        seen |= dict.fromkeys(record)
        left = {new: old for new, old in left.items() if found_at(record, old) is None}
        if not left:
            return
    new, old = next(iter(left.items()))
    found, expected = f"fields {names(dict.fromkeys(seen, True))}", f"{old}, which --fields {new}={old} names"
    turned = (_turned(name, place, known, files) for name, place in read.fields.items())
    fix = next(filter(None, turned), "correct --fields")
    problem = BadRecord("missing_field", old, found, expected, fix, Origin(files[0]))
    raise BadData(f"{problem} (none of the first {FIRST:,} records has it)", [problem])


def _turned(name: str, place: str, known: Collection[str], files: Sequence[Path]) -> str:
    """The fix of a pair that stands the wrong way round: the records have its name, and a format its place;
    "" for others."""
    first = list(islice(_values(files), FIRST)) if place in known else []
    there = any(found_at(record, name) is not None for record in first)
    if not there or any(found_at(record, place) is not None for record in first):
        return ""
    pair = typed(f"{place}={name}")
    return f"the other way round: --fields {pair} (the name of a format stands on the left)"


def _is_captioned(value: Json, read: ReadOptions) -> bool:
    try:
        record, _ = parse_with_fields(value, Origin(Path("probe")), read, addresses=True)
    except BadRecord:
        return False
    return record.format == "image_and_text"


def _values(files: Sequence[Path]) -> Iterator[Json]:
    """The records that are objects; what cannot be read is found, and told, when all is read."""
    for number, path in enumerate(files):
        try:
            for part in parts(path, number):
                for span, raw in read_part(part):
                    try:
                        value = record_value(raw, span.line)
                    except BadRecord:
                        continue
                    if isinstance(value, dict):
                        yield value
        except BadRecord:
            continue
