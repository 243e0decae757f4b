"""How the records of a source are read, beside what stands in them: where relative pictures lie, what fields
are called, the trigger word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unigen import remote
from unigen.data.captions import is_picture
from unigen.data.json_text import parse_json
from unigen.data.keys import RECORD, in_text
from unigen.data.layouts import RIVALS
from unigen.data.words import Json, join
from unigen.sequence.types import BadRecord, Text

_SHOWN = ("image", "images")
_BESIDE = (*_SHOWN, *RECORD)  # what stands beside a talk, which may name it in its turns


@dataclass(frozen=True)
class ReadOptions:
    """Options of a source that its records are read with."""

    data_root: Path | None = None  # every picture named by a path must lie there
    image_root: Path | None = None  # relative paths start there; None: from the file that names them
    # name -> where records have it: a field, or with dots a place in an object, a list, or JSON in a text
    fields: Mapping[str, str] = field(default_factory=dict)
    # every text of the format image_and_text begins with it; [trigger] in a text stands for it
    trigger_word: str | None = None

    @classmethod
    def of(cls, *options: Any) -> ReadOptions:
        """Those of options of a command or of a source; the first that says something counts."""

        def said(name: str) -> Any:
            return next((value for o in options if (value := getattr(o, name, None))), None)

        roots = (
            remote.local(value) if (value := said(name)) else None for name in ("data_root", "image_root")
        )
        return cls(*roots, said("fields") or {}, said("trigger_word"))

    def folder(self, file: Path) -> Path:
        """Where relative paths of pictures in ``file`` start from. A picture that is its own file's record
        lies where it was found."""
        return file.parent if self.image_root is None or is_picture(file) else self.image_root

    def renamed(self, record: Json) -> tuple[Json, list[str]]:
        """The record with its fields under the names of ``fields``, and which fields thereby stand aside."""
        if not self.fields:
            return record, []
        found = {
            new: in_text(new, value) if isinstance(value, str) else value
            for new, old in self.fields.items()
            if (value := reach(record, old)) is not None
        }
        taken = {old for old in self.fields.values() if old in record}
        inside = {new: old.partition(".")[0] for new, old in self.fields.items() if old not in record}
        entered = set(inside.values())
        rivals = {name for group in RIVALS if not group.isdisjoint(self.fields) for name in group}
        kept = {name: value for name, value in record.items() if name not in taken}
        # what has the name of a mapped field means something else, also where the mapped place is empty
        gone = {name for name in kept if name in rivals or name in self.fields}
        # nor is a list read twice of which places are read: ``image=images.0``
        gone |= {old for new, old in inside.items() if old in kept and (new not in _BESIDE or old in _SHOWN)}
        aside = [name for name in kept if name in gone - entered and kept[name] is not None]
        return {name: value for name, value in kept.items() if name not in gone} | found, aside

    def triggered(self, text: Text) -> Text:
        """A text with the trigger word, once."""
        word = self.trigger_word
        if not word:
            return text

        def one(text: str) -> str:
            text = text.replace("[trigger]", word)
            return text if word in text else f"{word}, {text}" if text.strip() else word

        return Text(one(text.text), text.target, tuple(map(one, text.others)), text.weight)


PLAIN = ReadOptions()


def reach(record: Json, place: str) -> Any:
    """The value at a place such as ``answer.choices.0.text``; None where there is none.

    Raises:
        BadRecord: A text on the way is no JSON.
    """
    if place in record:
        return record[place]
    value: Any = record
    done = ""
    for name in place.split("."):
        if isinstance(value, str):
            try:
                value = parse_json(value.encode("utf-8", "surrogatepass"), 0)
            except BadRecord as error:
                error.field = done
                raise
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
        done = join(done, name)
    return value


def found_at(record: Json, place: str) -> Any:
    """:func:`reach`, where a place is only guessed, or another record may have it: None for a text that is no
    JSON as well."""
    try:
        return reach(record, place)
    except BadRecord:
        return None
