"""What the formats are made of: typed fields of a record, segments, turns with ``<image>`` tags, caption
variants.

Every function raises BadRecord (without origin) that names the field. ``where`` is the field that holds the
given object, "" for the record itself; ``folder`` is that of the file the record stands in. A field that is
null is as good as absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from unigen.data.embedded import Address, decoded, place_of
from unigen.data.json_text import MAX_RECORD, parse_json
from unigen.data.keys import REFUSED, THOUGHT, TOOL_ROLES, check_keys, refuse, weight_of
from unigen.data.words import Json, cut, join, names, show
from unigen.sequence.types import BadRecord, Image, Text

Segments = list[tuple[Text | Image, str]]  # each segment with the field it came from, which messages name
GivenPicture = Path | bytes | Address

SPEAKERS = {
    "user": "user", "assistant": "assistant", "system": "system", "human": "user", "developer": "system",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
}  # fmt: skip
TAG = "<image>"
_NO_PICTURE = ("", "None", "none", "null", "NULL", "nan", "NaN", "N/A")
_LIST = re.compile(r"\s*\[\s*[\"'{\[\]]")  # a list in JSON, or as Python prints it; no path begins like that
_JSON = re.compile(r"\s*[\[{]\s*[\"\]}]")  # a list or an object of texts; no caption begins like that
_NAMES = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}


# ---- fields


def optional(record: Json, name: str, kind: type, where: str = "") -> Any:
    """The value of a field, None where it is absent or null."""
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRecord(
            "wrong_type", join(where, name), show(value), _NAMES[kind], f"write {_NAMES[kind]} there"
        )
    return value


def required(record: Json, name: str, kind: type, where: str) -> Any:
    value = optional(record, name, kind, where)
    if value is None:
        raise _missing(record, name, _NAMES[kind], where)
    return value


def string(record: Json, name: str, where: str) -> str:
    return _encodable(required(record, name, str, where), join(where, name), "bad_text")


def objects(record: Json, name: str, where: str, kind: str) -> list[tuple[Json, str]]:
    """The objects of a list, each with its field; their keys are those of ``kind`` in ``keys.ITEMS``."""
    items = required(record, name, list, where)
    path = join(where, name)
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRecord("wrong_type", f"{path}[{i}]", show(item), "a JSON object", "write it as {...}")
        check_keys(item, f"{path}[{i}]", kind)
    return [(item, f"{path}[{i}]") for i, item in enumerate(items)]


def picture(record: Json, name: str, where: str, folder: Path) -> GivenPicture:
    """The picture of a field; see :func:`as_picture`."""
    if record.get(name) is None:
        raise _missing(record, name, "the path of a picture", where)
    return as_picture(record[name], join(where, name), folder)


def pictures(values: Iterable[Any], field: str, folder: Path) -> list[tuple[GivenPicture, str]]:
    """The pictures of a list, each with its field."""
    return [(as_picture(value, f"{field}[{i}]", folder), f"{field}[{i}]") for i, value in enumerate(values)]


def as_picture(value: Any, field: str, folder: Path) -> GivenPicture:
    """The picture of a value: a path, relative ones joined to ``folder``; an address of the web; or the
    encoded bytes of a picture: bytes, base64, a ``data:`` URI.

    It may stand in an object: ``{"bytes", "path"}`` as tables hold it (bytes win), or ``{"url"}``.
    """
    inside = False
    if isinstance(value, dict) and value.keys() & {"bytes", "path", "url"}:
        name = next((name for name in ("bytes", "path", "url") if value.get(name) is not None), "path")
        field, value, inside = f"{field}.{name}", value.get(name), name == "bytes"
        if inside and not isinstance(value, str | bytes):
            fix = "keep the picture in a table, as base64, or name its path"
            raise BadRecord("wrong_type", field, show(value), "bytes or base64", fix)
    if isinstance(value, bytes):
        if not value:
            fix = "fill it, or leave the record out"
            raise BadRecord("missing_field", field, "no bytes", "the bytes of a picture", fix)
        return value
    if not isinstance(value, str):
        raise BadRecord("wrong_type", field, show(value), "a string", "write the path of a picture")
    _encodable(value, field, "bad_path")
    try:
        if (data := decoded(value, inside)) is not None:
            return data
    except ValueError as error:
        fix = "write the picture again as base64, or name its path"
        raise BadRecord("broken_picture", field, str(error), "a whole picture as base64", fix) from None
    try:
        place = place_of(value)
    except ValueError as error:
        why, fix = error.args
        raise BadRecord("bad_path", field, f"{show(value)}: {why}", "the path of a file", fix) from None
    if isinstance(place, Address):
        return place
    if not place or "\0" in place:
        raise BadRecord("bad_path", field, show(value), "the path of a file", "write the path of a picture")
    return folder / place


def _missing(record: Json, name: str, expected: str, where: str) -> BadRecord:
    found = "nothing in it" if name in record else f"fields {names(record)}"
    return BadRecord("missing_field", join(where, name), found, f"{name}: {expected}", f"add {name}")


def _encodable(text: str, field: str, code: str) -> str:
    if len(text) > MAX_RECORD:  # of a table; JSON is bounded before
        raise BadRecord(
            "huge_record", field, f"{len(text):,} characters", f"at most {MAX_RECORD:,}", "split the record"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair at character {error.start + 1} ({text[error.start]!a})"
        raise BadRecord(
            code, field, found, "Unicode text", r"write the character itself, or both of its \u escapes"
        ) from None
    return text


def is_list_text(value: Any) -> bool:
    """Is a value the JSON text of a list?"""
    return isinstance(value, str) and _LIST.match(value) is not None


def parsed_text(text: str, field: str) -> Any:
    """The value of a JSON text. Raises BadRecord where it is none."""
    try:
        return parse_json(_encodable(text, field, "bad_text").encode(), 0)
    except BadRecord as error:
        error.field = field
        raise


# ---- segments


def as_text(text: str, weight: float) -> Text:
    """A text with its part of the loss: context where that is 0."""
    return Text(text, weight > 0, weight=weight or 1.0)


def as_image(source: GivenPicture, weight: float) -> Image:
    """A picture with its part of the loss: context where that is 0."""
    return Image(source, weight > 0, weight=weight or 1.0)


def segment(item: Json, where: str, folder: Path, target: bool) -> Segments:
    """A text (``content``) or an image (``image_path``) by its ``type``, with the field that holds it; its
    thoughts before it. What it says of its own learning wins over ``target``."""
    kind = optional(item, "type", str, where) or "text"
    weight = weight_of(item, where, float(target))
    if kind not in ("text", "image"):
        raise BadRecord("unknown_type", f"{where}.type", show(kind), '"text" or "image"', "correct the type")
    wanted, other = ("content", "image_path") if kind == "text" else ("image_path", "content")
    if item.get(wanted) is None and not no_picture(item.get(other)):
        fix = f'write "type": "{"image" if kind == "text" else "text"}", or give {wanted}'
        expected = f"{wanted} in a segment of type {kind}"
        raise BadRecord("missing_field", f"{where}.{wanted}", f"{other} alone", expected, fix)
    if not no_picture(item.get(other)):
        fix = "write two segments, one of each type"
        expected = f"{wanted} alone in a segment of type {kind}"
        raise BadRecord("ambiguous_piece", f"{where}.{other}", show(item[other]), expected, fix)
    before = thought(item, where, weight)
    if kind == "text":
        return [*before, (as_text(string(item, "content", where), weight), f"{where}.content")]
    return [*before, (as_image(picture(item, "image_path", where, folder), weight), f"{where}.image_path")]


def thought(item: Json, where: str, weight: float) -> Segments:
    """The thinking text of a turn, step or record, as the model writes it: a segment, or none."""
    text = optional(item, THOUGHT, str, where)
    if not text:
        return []
    field = join(where, THOUGHT)
    _encodable(text, field, "bad_text")
    return [(as_text(text if "<think>" in text else f"<think>{text}</think>", weight), field)]


def no_picture(value: Any) -> bool:
    """Does a field that may name a picture, or an image column, say that there is none?"""
    if isinstance(value, dict) and (there := value.keys() & {"bytes", "path", "url"}):
        return all(no_picture(value[name]) for name in there)
    return value is None or (isinstance(value, str) and value.strip() in _NO_PICTURE)


def role_of(item: Json, where: str, key: str = "role") -> str:
    """Who speaks: ``user``, ``assistant`` or ``system``, by whatever name of :data:`SPEAKERS`. Raises
    BadRecord for another one."""
    value = required(item, key, str, where)
    if value.lower() in TOOL_ROLES:
        raise BadRecord("unknown_role", f"{where}.{key}", show(value), *REFUSED["tools"])
    if value.lower() not in SPEAKERS:
        expected = f"one of {', '.join(SPEAKERS)}"
        raise BadRecord("unknown_role", f"{where}.{key}", show(value), expected, "correct it")
    return SPEAKERS[value.lower()]


def variants(value: Any, field: str) -> tuple[Text, str]:
    """A context text that says one thing in one or several ways, with the field of the first: a text, a list
    of texts, an object of named texts (nulls left out), or the JSON text of such a list or object."""
    if isinstance(value, str) and _JSON.match(value):
        value = parsed_text(value, field)
    if isinstance(value, dict):
        found = [(text, join(field, cut(str(name)))) for name, text in value.items() if text is not None]
    elif isinstance(value, list):
        found = [(text, f"{field}[{i}]") for i, text in enumerate(value)]
    else:
        found = [(value, field)]
    if not found:
        raise BadRecord(
            "missing_field", field, show(value), "at least one text", "write a text, or leave the record out"
        )
    for text, at in found:
        if not isinstance(text, str):
            raise BadRecord("wrong_type", at, show(text), "a string", "write a text there")
        if not text.strip():
            raise BadRecord("empty_text", at, show(text), "a text", "write the text, or leave it out")
        _encodable(text, at, "bad_text")
    texts = [text for text, _ in found]
    return Text(texts[0], others=tuple(texts[1:])), found[0][1]


def document(segments: Segments) -> Segments:
    """Segments without roles: all are targets but the start, which is a first image, or a first text that an
    image follows."""
    found = [(replace(segment, target=True), field) for segment, field in segments]
    if found and any(isinstance(segment, Image) for segment, _ in found):
        found[0] = (replace(found[0][0], target=False), found[0][1])
    return found


# ---- turns with tags


class Part(NamedTuple):
    """A text or a picture of a turn, the field it came from, and its part of the loss (0: context)."""

    value: str | GivenPicture  # texts are strings, pictures paths or bytes
    field: str
    weight: float


Turn = tuple[str, list[Part]]  # a role, and what it says or shows


def turn(item: Json, where: str, role: str, contents: Iterable[Part]) -> Turn:
    """A turn for :func:`tagged`: its thoughts, then its contents."""
    thoughts = thought(item, where, weight_of(item, where, default_weight(role)))
    parts = [Part(text.text, field, text.weight * text.target) for text, field in thoughts]  # type: ignore[union-attr]
    return role, [*parts, *contents]


def default_weight(role: str) -> float:
    return float(role == "assistant")


def tagged(
    turns: list[tuple[str, list[Part]]], images: list[tuple[GivenPicture, str]], field: str
) -> Segments:
    """The segments of turns ``(role, contents)``: tags stand for the last of ``images`` in order. Leading
    images, which have no tag, come first, as context. ``field`` is where the images stand.
    """
    tags = sum(
        part.value.count(TAG) for _, contents in turns for part in contents if isinstance(part.value, str)
    )
    if tags > len(images):
        fix = "list one image for each tag, or remove the tags that have none"
        expected = f"one for each of the {tags} <image> tags"
        raise BadRecord("unequal_image_count", field, f"{len(images)} images", expected, fix)
    left = iter(images)
    leading: Segments = [
        (Image(source), at) for source, at in (next(left) for _ in range(len(images) - tags))
    ]
    segments: Segments = []
    for role, contents in turns:
        # the first turn of the talk: the leading images stand before its text, after what frames the whole
        if role != "system":
            segments += leading
            leading = []
        for value, part_field, weight in contents:
            if not isinstance(value, str):
                segments.append((as_image(value, weight), part_field))
                continue
            for text in _split(value):
                if text is None:
                    source, image_field = next(left)
                    segments.append((as_image(source, weight), image_field))
                else:
                    segments.append((as_text(text, weight), part_field))
    return leading + segments


def contents_of(item: Json, where: str, folder: Path, role: str) -> list[Part]:
    """The content of a message: its text, or the texts and pictures of the list form, each with its field.
    What a part says of its own learning wins over its message, and that over its role."""
    weight = weight_of(item, where, default_weight(role))
    if not isinstance(item.get("content"), list):
        return [Part(string(item, "content", where), f"{where}.content", weight)]
    return [
        Part(*_part(part, field, folder), weight_of(part, field, weight))
        for part, field in objects(item, "content", where, "part")
    ]


_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image", "image_url", "input_image")
# where a part of type image has its picture: transformers and Qwen, OpenAI, and again transformers
_PICTURE_KEYS = ("image", "image_url", "url", "path", "base64", "source")


def _part(part: Json, field: str, folder: Path) -> tuple[str | GivenPicture, str]:
    """The text or the picture of a part of a message, and the field it stands in. A part that is an image and
    names none stands for the next of the record's images, as a tag does."""
    kind = optional(part, "type", str, field)
    if kind is None:  # older data of Qwen says it by the key alone
        kind = "text" if part.get("text") is not None else "image"
    if kind in _TEXTS:
        return string(part, "text", field), f"{field}.text"
    if kind not in _PICTURES:
        refuse({kind: True}, field)
        raise BadRecord("unknown_type", f"{field}.type", show(kind), '"text" or "image"', "correct the type")
    found = [name for name in _PICTURE_KEYS if part.get(name) is not None]
    if not found:
        if kind == "image":
            return TAG, field
        raise _missing(part, "image_url", "the path of a picture", field)
    if len(found) > 1:
        expected = f"one of {', '.join(_PICTURE_KEYS)}"
        raise BadRecord("ambiguous_piece", field, names(part), expected, "name the picture once")
    name, at = found[0], f"{field}.{found[0]}"
    value = part[name]
    if name == "source" and isinstance(value, dict):  # Anthropic's
        check_keys(value, at, "source")
        name = "data" if value.get("data") is not None else "url"
        if name == "data":
            value = {"bytes": string(value, "data", at)}
            return as_picture(value, at, folder), f"{at}.data"
        return picture(value, "url", at, folder), f"{at}.url"
    if name == "base64":
        return as_picture({"bytes": value}, at, folder), at
    if isinstance(value, dict) and not value.keys() & {"bytes", "path"}:
        check_keys(value, at, "address")
        return picture(value, "url", at, folder), f"{at}.url"
    return as_picture(value, at, folder), at


def _split(content: str) -> list[str | None]:
    """``content`` cut at its tags: texts, and None for each tag. White space next to a tag goes, and so does
    a text of nothing else."""
    texts = content.split(TAG)
    segments: list[str | None] = []
    for i, text in enumerate(texts):
        if i > 0:
            segments.append(None)
            text = text.lstrip()
        if i < len(texts) - 1:
            text = text.rstrip()
        if text or len(texts) == 1:
            segments.append(text)
    return segments
