"""The seven file formats: one function a format, one table :data:`FORMATS`.

Every format becomes one ``Sample``, a list of ``Text | Image`` pieces with a ``target`` flag. ``docs/data_formats.md`` is the
description for users. A format is added with a function, a row in the table, and a section there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from unigen.config import nearest
from unigen.sequence.types import BadRecord, Image, Origin, Record, Text

Json = dict[str, Any]
Pieces = list[tuple[Text | Image, str]]  # each piece with the field it came from, which messages name

ROLES = ("user", "assistant", "system")
_TAG = "<image>"
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+://|data:)")


class Format(NamedTuple):
    """How to know a format, and how to read it."""

    recognise: Callable[[Json], bool]
    parse: Callable[[Json, Path], Pieces]  # the folder is that of the file the record stands in


def parse_record(value: Any, origin: Origin) -> Record:
    """The record of one JSON value. Nothing is opened: pictures stay paths, relative ones joined to the folder of ``origin.file``.

    Raises:
        BadRecord: The value fits no format or two, or breaks a rule of its format. The codes are ``not_an_object``, ``no_format``,
            ``ambiguous_format``, ``ambiguous_piece``, ``missing_field``, ``unexpected_field``, ``wrong_type``, ``unknown_type``,
            ``unknown_role``, ``bad_text``, ``empty_text``, ``bad_path``, ``bad_step_number``, ``unequal_image_count``, ``no_target``.
    """
    return parse_with_fields(value, origin)[0]


def parse_with_fields(value: Any, origin: Origin) -> tuple[Record, list[str]]:
    """:func:`parse_record`, and for every piece of the sample the field it came from, as ``conversations[2].image_path``."""
    try:
        if not isinstance(value, dict):
            raise BadRecord("not_an_object", "(record)", _show(value), "a JSON object", "write one {...} for each record")
        metadata = _optional(value, "metadata", dict) or {}
        name = _recognise(value)
        pieces = FORMATS[name].parse(value, origin.file.parent)
        if not any(piece.target for piece, _ in pieces):
            raise BadRecord(
                "no_target",
                _CONTENT[name],
                "context only",
                "at least one piece that the model must produce",
                'add an answer (an assistant turn, a target), or mark a piece with "target": true',
            )
        for piece, field in pieces:
            if isinstance(piece, Text) and piece.target and not piece.text:
                raise BadRecord("empty_text", field, '""', "a text to learn", "write the text, or leave the piece out")
    except BadRecord as error:
        error.origin = origin
        raise
    return Record([piece for piece, _ in pieces], origin, name, metadata), [field for _, field in pieces]


# ---- the formats ----


def conversation(record: Json, folder: Path) -> Pieces:
    """``conversations``: turns in order; assistant pieces are targets."""
    pieces = []
    for item, field in _objects(record, "conversations", ""):
        role = _role(item, field)
        pieces.append(_piece(item, field, folder, target=role == "assistant"))
    return pieces


def direct(record: Json, folder: Path) -> Pieces:
    """``input_sequence`` is context, ``target_sequence`` is what the model must produce."""
    inputs = [_piece(item, field, folder, target=False) for item, field in _objects(record, "input_sequence", "")]
    return inputs + [_piece(item, field, folder, target=True) for item, field in _objects(record, "target_sequence", "")]


def text_to_image(record: Json, folder: Path) -> Pieces:
    """``text_prompt`` is context, the picture the target."""
    return [
        (Text(_string(record, "text_prompt", "")), "text_prompt"),
        (Image(_path(record, "image_path", "", folder), target=True), "image_path"),
    ]


def image_to_text(record: Json, folder: Path) -> Pieces:
    """The picture is context, ``caption`` the target."""
    return [
        (Image(_path(record, "image_path", "", folder)), "image_path"),
        (Text(_string(record, "caption", ""), target=True), "caption"),
    ]


def editing(record: Json, folder: Path) -> Pieces:
    """``input_image``, then for each step its instruction (context) and its result (target, and context of the next step)."""
    pieces: Pieces = [(Image(_path(record, "input_image", "", folder)), "input_image")]
    first: int | None = None  # the number of step 0, as far as the numbers given so far say
    for i, (step, field) in enumerate(_objects(record, "editing_steps", "")):
        number = _optional(step, "step", int, field)
        if number is not None:
            first = number - i if first is None else first
            if number != first + i:
                cure = "number the steps 1, 2, 3, ... in their order, or leave the numbers out"
                raise BadRecord("bad_step_number", f"{field}.step", str(number), f"{first + i}", cure)
        pieces.append((Text(_string(step, "instruction", field)), f"{field}.instruction"))
        pieces.append((Image(_path(step, "result_image", field, folder), target=True), f"{field}.result_image"))
    return pieces


def interleaved(record: Json, folder: Path) -> Pieces:
    """``sequence``: all pieces are targets, but for the start: a first image, or a first text that an image follows."""
    items = _objects(record, "sequence", "")
    for item, field in items:
        if item.get("role") is not None:
            cure = 'use "conversations" for turns with roles, or take the role out and say "target": true or false'
            raise BadRecord("unexpected_field", f"{field}.role", _show(item["role"]), "no role in a sequence", cure)
    pieces = [_piece(item, field, folder, target=True) for item, field in items]
    if pieces:
        start, field = pieces[0]
        needed = isinstance(start, Image) or any(isinstance(piece, Image) for piece, _ in pieces)
        if needed and items[0][0].get("target") is None:
            pieces[0] = (replace(start, target=False), field)
    return pieces


def messages(record: Json, folder: Path) -> Pieces:
    """``messages`` whose ``<image>`` tags stand for ``images`` in order; surplus images come first, as context."""
    items = _objects(record, "messages", "")
    paths = _optional(record, "images", list) or []
    tags = sum(text.count(_TAG) for item, field in items for text in _texts(item, field))
    if tags > len(paths):
        cure = "list one image for each tag, or remove the tags that have none"
        raise BadRecord("unequal_image_count", "images", f"{len(paths)} images", f"one for each of the {tags} <image> tags", cure)
    images = iter([(_resolve(path, f"images[{i}]", folder), f"images[{i}]") for i, path in enumerate(paths)])
    surplus: Pieces = [(Image(path), field) for path, field in (next(images) for _ in range(len(paths) - tags))]
    pieces: Pieces = []
    for item, field in items:
        role = _role(item, field)
        if role != "system":  # the first turn of the talk: the surplus stands before its text, after what frames the whole
            pieces += surplus
            surplus = []
        target = role == "assistant"
        for part, part_field in _contents(item, field, folder):
            if isinstance(part, Path):
                pieces.append((Image(part, target), part_field))
                continue
            for text in _split(part):
                if text is None:
                    path, image_field = next(images)
                    pieces.append((Image(path, target), image_field))
                else:
                    pieces.append((Text(text, target), part_field))
    return surplus + pieces


def _has(*names: str) -> Callable[[Json], bool]:
    return lambda record: any(record.get(name) is not None for name in names)


FORMATS: dict[str, Format] = {
    "conversation": Format(_has("conversations"), conversation),
    "direct": Format(_has("input_sequence", "target_sequence"), direct),
    "text_to_image": Format(_has("text_prompt"), text_to_image),
    "image_to_text": Format(_has("caption"), image_to_text),
    "editing": Format(_has("input_image", "editing_steps"), editing),
    "interleaved": Format(_has("sequence"), interleaved),
    "messages": Format(_has("messages", "images"), messages),
}

# The field in which a format keeps what the model must produce; messages about the whole record name it.
_CONTENT = {
    "conversation": "conversations",
    "direct": "target_sequence",
    "text_to_image": "image_path",
    "image_to_text": "caption",
    "editing": "editing_steps",
    "interleaved": "sequence",
    "messages": "messages",
}
_KNOWN = (*_CONTENT.values(), "input_sequence", "text_prompt", "input_image", "images")


def _recognise(record: Json) -> str:
    found = [name for name, entry in FORMATS.items() if entry.recognise(record)]
    fields = _names(record)
    if len(found) > 1:
        cure = "keep the fields of one format, and split the record if it was meant as two"
        raise BadRecord("ambiguous_format", "(record)", f"fields of {' and '.join(found)} ({fields})", "the fields of one format", cure)
    if not found:
        raise BadRecord("no_format", "(record)", f"fields {fields}", f"one of {', '.join(_KNOWN)}", _nearest_cure(record))
    if record.get("image_path") is not None and found[0] not in ("text_to_image", "image_to_text"):
        cure = f"move the picture into the {_CONTENT[found[0]]}, or take the field out"
        raise BadRecord("ambiguous_format", "image_path", f"an image_path beside fields of {found[0]}", "no such field", cure)
    return found[0]


def _nearest_cure(record: Json) -> str:
    if record.get("image_path") is not None:
        return "add a text_prompt (the image is the target) or a caption (the text is the target)"
    for name in record:
        near = nearest(name, list(_KNOWN))
        if near:
            return f"did you mean {near} in place of {_cut(name)}? docs/data_formats.md shows every format"
    return "write the record in one of the seven formats of docs/data_formats.md"


# ---- parts that the formats share ----


def _piece(item: Json, where: str, folder: Path, target: bool) -> tuple[Text | Image, str]:
    """A text or an image of formats 1, 2 and 6, with the field that holds it. Its own ``target`` wins over ``target``."""
    kind = _optional(item, "type", str, where) or "text"
    own = _optional(item, "target", bool, where)
    target = target if own is None else own
    if kind not in ("text", "image"):
        raise BadRecord("unknown_type", f"{where}.type", _show(kind), '"text" or "image"', "correct the type")
    wanted, other = ("content", "image_path") if kind == "text" else ("image_path", "content")
    if item.get(wanted) is None and item.get(other) is not None:
        cure = f'write "type": "{"image" if kind == "text" else "text"}", or give {wanted}'
        raise BadRecord("missing_field", f"{where}.{wanted}", f"{other} alone", f"{wanted} in a piece of type {kind}", cure)
    if item.get(other) not in (None, ""):
        cure = "write two pieces, one of each type"
        raise BadRecord("ambiguous_piece", f"{where}.{other}", _show(item[other]), f"{wanted} alone in a piece of type {kind}", cure)
    if kind == "text":
        return Text(_string(item, "content", where), target), f"{where}.content"
    return Image(_path(item, "image_path", where, folder), target), f"{where}.image_path"


def _contents(item: Json, where: str, folder: Path) -> list[tuple[str | Path, str]]:
    """The content of a message: its text, or the texts and picture paths of the list form, each with its field."""
    content = item.get("content")
    if not isinstance(content, list):
        return [(_string(item, "content", where), f"{where}.content")]
    parts: list[tuple[str | Path, str]] = []
    for part, field in _objects(item, "content", where):
        kind = _required(part, "type", str, field)
        if kind == "text":
            parts.append((_string(part, "text", field), f"{field}.text"))
        elif kind == "image_url":
            field = f"{field}.image_url"
            if isinstance(part.get("image_url"), str):
                parts.append((_resolve(part["image_url"], field, folder), field))
            else:
                url = _required(part, "image_url", dict, field.rpartition(".")[0])
                parts.append((_path(url, "url", field, folder), f"{field}.url"))
        else:
            raise BadRecord("unknown_type", f"{field}.type", _show(kind), '"text" or "image_url"', "correct the type")
    return parts


def _texts(item: Json, where: str) -> list[str]:
    return [part for part, _ in _contents(item, where, Path()) if isinstance(part, str)]


def _split(content: str) -> list[str | None]:
    """``content`` cut at its tags: texts, and None for each tag. White space next to a tag goes, and so does a text of nothing else."""
    texts = content.split(_TAG)
    pieces: list[str | None] = []
    for i, text in enumerate(texts):
        if i > 0:
            pieces.append(None)
            text = text.lstrip()
        if i < len(texts) - 1:
            text = text.rstrip()
        if text or len(texts) == 1:
            pieces.append(text)
    return pieces


def _role(item: Json, where: str) -> str:
    role = _required(item, "role", str, where)
    if role not in ROLES:
        raise BadRecord("unknown_role", f"{where}.role", _show(role), " or ".join(f'"{r}"' for r in ROLES), "correct the role")
    return role


def _objects(record: Json, name: str, where: str) -> list[tuple[Json, str]]:
    """The objects of a list, each with its field."""
    items = _required(record, name, list, where)
    path = _join(where, name)
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRecord("wrong_type", f"{path}[{i}]", _show(item), "a JSON object", "write it as {...}")
    return [(item, f"{path}[{i}]") for i, item in enumerate(items)]


def _string(record: Json, name: str, where: str) -> str:
    text = _required(record, name, str, where)
    _encodable(text, _join(where, name), "bad_text")
    return text


def _path(record: Json, name: str, where: str, folder: Path) -> Path:
    return _resolve(_required(record, name, str, where), _join(where, name), folder)


def _resolve(path: Any, field: str, folder: Path) -> Path:
    if not isinstance(path, str):
        raise BadRecord("wrong_type", field, _show(path), "a string", "write the path of a picture")
    _encodable(path, field, "bad_path")
    if _URL.match(path):
        raise BadRecord("bad_path", field, _show(path), "the path of a file", "fetch the picture into a file and name that file")
    if not path or "\0" in path:
        raise BadRecord("bad_path", field, _show(path), "the path of a file", "write the path of a picture")
    return folder / path


def _encodable(text: str, field: str, code: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair at character {error.start + 1} ({text[error.start]!a})"
        raise BadRecord(code, field, found, "Unicode text", r"write the character itself, or both of its \u escapes") from None


_NAMES = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}


def _optional(record: Json, name: str, kind: type, where: str = "") -> Any:
    """The value of a field, None where it is absent or null."""
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRecord("wrong_type", _join(where, name), _show(value), _NAMES[kind], f"write {_NAMES[kind]} there")
    return value


def _required(record: Json, name: str, kind: type, where: str) -> Any:
    value = _optional(record, name, kind, where)
    if value is None:
        found = "null" if name in record else f"fields {_names(record)}"
        raise BadRecord("missing_field", _join(where, name), found, f"{name}: {_NAMES[kind]}", f"add {name}")
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: Any) -> str:
    """``value`` as JSON, cut to a length that a message can carry; always encodable."""
    return _cut(json.dumps(value, ensure_ascii=False))


def _names(record: Json) -> str:
    """The fields a record has."""
    return _cut(", ".join(name for name in record if record[name] is not None) or "(none)")


def _cut(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
