"""Which format a record has: by a field that one format alone has, or by what all of its fields make up."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from unigen.data.captions import is_picture
from unigen.data.keys import RECORD
from unigen.data.layouts import CAPTION, pictures_unread
from unigen.data.words import Json, cut, names
from unigen.sequence.types import BadRecord


@dataclass(frozen=True, eq=False)
class Format:
    """How to read a format, and how to know it."""

    parse: Callable[[Json, Path], Any]  # the folder is that of the file the record stands in
    fields: tuple[str, ...]  # one of them makes a record one of this format
    content: str  # where it keeps what the model must produce; messages about the whole record name it
    # Where it names pictures. A dot leads into the objects of a list; the last field holds one or a list.
    pictures: tuple[str, ...]
    recognise: Callable[[Json], bool] | None = None  # what must hold besides
    reads: tuple[str, ...] = ()  # what else it reads of a record
    # Of a layout, which no single field tells: a record has a field of each group.
    needs: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def known(self) -> frozenset[str]:
        """The fields of a record that it reads."""
        pictures = (name.partition(".")[0] for name in self.pictures)
        needed = (name for group in self.needs for name in group)
        return frozenset((*self.fields, self.content, *pictures, *self.reads, *needed))

    def fits(self, record: Json, present: set[str]) -> bool:
        """Is a record with the fields ``present`` one of this layout?"""
        if not all(not present.isdisjoint(group) for group in self.needs):
            return False
        return self.recognise is None or self.recognise(record)


# what files of many records call the list of them, beside what describes it
_LISTS = ("data", "questions", "records", "items", "examples", "samples", "rows", "instances", "entries")
# of a talk, and of its turns: a list of them is one record
_TURNS = frozenset(
    ("messages", "conversations", "texts", "role", "from", "human", "user", "assistant", "input", "output")
)
_KOHYA = {"caption", "tags", "train_resolution", "image_size", "original_size", "crop_ltrb"}
_ALIKE = 0.8  # of a misspelt field
_COCO = (
    "jq -c '(.images|map({(.id|tostring): .file_name})|add) as $f | .annotations[]"
    " | {image: $f[.image_id|tostring], text: .caption}' OLD > NEW.jsonl"
)
# Of several formats, so they tell none; beside a format that does not have them they are a mistake.
_PICTURES = ("image_path", "image")
# What a picture is drawn from or described with.
_PROMPTS = ("text", "caption", "captions", "prompt", "text_prompt")


def recognise(record: Json, formats: Mapping[str, Format]) -> str:
    """The name of the format of a record. Raises BadRecord where there is none, or several."""
    filled = {name: value for name, value in record.items() if value != "" or name not in _PROMPTS}
    if len(filled) < len(record):  # an empty text is as good as absent, but where the format needs it
        with suppress(BadRecord):
            return _recognised(filled, formats)
    return _recognised(record, formats)


def _recognised(record: Json, formats: Mapping[str, Format]) -> str:
    present = {name for name in record if record[name] is not None}
    if whole := _whole_file(record, formats):
        found, fix = whole
        raise BadRecord("no_format", "(record)", found, "one record", fix)
    if layout := _layout(record, present, formats):
        return layout
    found = []
    for name, entry in formats.items():
        if not present.isdisjoint(entry.fields) and (entry.recognise is None or entry.recognise(record)):
            found.append(name)
    if len(found) > 1:
        fix = "keep the fields of one format, and split the record if it was meant as two"
        one = max(found, key=lambda name: len(present & formats[name].known))
        others = {field for name in found for field in formats[name].fields} & present - formats[one].known
        if len(others) == 1:
            fix = f"give --fields metadata={min(others)} to read it as {one}, or {fix}"
        fields = f"fields of {', '.join(found)} ({names(record)})"
        raise BadRecord("ambiguous_format", "(record)", fields, "the fields of one format", fix)
    if not found:
        expected, fix = f"one of {', '.join(_known(formats))}", _nearest_fix(record, formats)
        raise BadRecord("no_format", "(record)", f"fields {names(record)}", expected, fix)
    entry = formats[found[0]]
    for name in _PICTURES:
        if name in present and name not in entry.pictures:
            fix = f"move the picture into the {entry.content}, or take the field out"
            raise BadRecord(
                "ambiguous_format", name, f"an {name} beside fields of {found[0]}", "no such field", fix
            )
    return found[0]


def _whole_file(record: Json, formats: Mapping[str, Format]) -> tuple[str, str] | None:
    """What an object is that holds many records in place of being one, and the fix."""
    values = list(record.values())
    if _objects(record.get("images")) and _objects(record.get("annotations")):
        return "pictures and captions apart, as COCO has them", f"write a record for each caption: {_COCO}"
    read = (frozenset(RECORD), *(entry.known for entry in formats.values()))
    images = record.get("images")
    talks = not _TURNS.isdisjoint(record)
    if not talks and _objects(images) and not any({"bytes", "path", "url"} & one.keys() for one in images):
        return "a list of records under images", "write the list alone: jq .images OLD > NEW.json"
    if any(not fields.isdisjoint(record) for fields in read):
        return None
    if values and (described := _by_picture(record)):
        return "records under the paths of their pictures", f"write a list of them: {described}"
    lists = [name for name in record if _objects(record[name]) and _TURNS.isdisjoint(record[name][0])]
    if len(lists) == 1 and (len(values) == 1 or lists[0] in _LISTS):
        (name,) = lists
        place = name if re.fullmatch(r"[A-Za-z_]\w*", name) else f'["{cut(name)}"]'
        return f"a list of records under {cut(name)}", f"write the list alone: jq .{place} OLD > NEW.json"
    if len(values) > 1 and all(isinstance(value, dict) and len(value) > 1 for value in values):
        return "records under keys of their own", "write a list of them: jq '[.[]]' OLD > NEW.json"
    return None


def _by_picture(record: Json) -> str | None:
    """What makes a list of an object that has texts under the paths of pictures, or, as kohya-ss writes its
    captions, under their names alone; None for another object."""
    values, named = list(record.values()), all(is_picture(Path(name)) for name in record)
    name = ".key" if named else '(.key + ".jpg")'  # no record knows how the picture's name ends
    if named and all(isinstance(value, str) for value in values):
        text = ".value"
    elif all(isinstance(value, dict) and (set(value) & _KOHYA) for value in values):
        if any(not named and set(value) - _KOHYA for value in values):
            return None
        text = ".value | .caption // .tags"
    else:
        return None
    return f"jq 'to_entries | map({{image: {name}, text: ({text})}})' OLD > NEW.json"


def _objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _layout(record: Json, present: set[str], formats: Mapping[str, Format]) -> str | None:
    """Of the layouts that fit and read all fields by which formats are known, the one that reads most."""
    telling = present & _telling(tuple(formats.values()))
    fit = {
        name: len(present & entry.known)
        for name, entry in formats.items()
        if entry.needs and telling <= entry.known and entry.fits(record, present)
    }
    best = [name for name in fit if fit[name] == max(fit.values())]
    if len(best) > 1:
        fix = "say what they are with --fields (docs/data_formats.md), or take some out"
        found = f"fields of {', '.join(best)} ({names(record)})"
        raise BadRecord("ambiguous_format", "(record)", found, "the fields of one format", fix)
    return best[0] if best else None


@lru_cache(8)
def _telling(entries: tuple[Format, ...]) -> frozenset[str]:
    """The fields that tell formats."""
    return frozenset(name for entry in entries for name in entry.fields)


def _known(formats: Mapping[str, Format]) -> list[str]:
    return list(dict.fromkeys(name for entry in formats.values() for name in (*entry.fields, entry.content)))


def _nearest_fix(record: Json, formats: Mapping[str, Format]) -> str:
    known = _known(formats)
    for name in islice(record, 20):  # a slip of the hand first: it tells more than what is missing
        read = (
            name in RECORD or name[-1:].isdecimal() or any(name in entry.known for entry in formats.values())
        )
        for near in [] if read else get_close_matches(name[:100], known, 1, _ALIKE):
            if near in record:
                continue
            return f"did you mean {near} in place of {cut(name)}? docs/data_formats.md shows every format"
    if record.get("instruction") is not None and any(
        record.get(n) for n in ("image", "file_name", "image_path")
    ):
        return (
            "add output_image, the edited picture, or give --fields text=instruction to draw this one from it"
        )
    if record.get("question") is not None:
        return "write the answer as a text beside it (format 13: query, response), or the talk as messages"
    if record.get("image_path") is not None:
        return "add a text_prompt (the image is the target) or a caption (the text is the target)"
    if record.get("image") is not None:
        return "add a text (the image is the target), or conversations about it"
    if unread := pictures_unread(record):
        if len(unread) == 1 and (text := next((name for name in CAPTION if record.get(name)), None)):
            return f"give --fields image={unread[0]} text={text} to draw the picture from the text"
        return "name the pictures as docs/data_formats.md does (--fields input_image=... output_image=...)"
    if record.get("text") is not None:
        return 'a text alone is learnt as {"sequence": [{"type": "text", "content": ...}]} (format 6)'
    return "write the record in one of the formats of docs/data_formats.md"
