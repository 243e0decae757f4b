"""The file formats: one function a format, one table :data:`FORMATS`.

Every format becomes one ``Sample``, a list of ``Text | Image`` segments with a ``target`` flag.
``docs/data_formats.md`` is the description for users. A format is added with a function, a row in the table,
and a section there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from unigen.data import fields as f
from unigen.data import keys, layouts, tar
from unigen.data.embedded import Address
from unigen.data.fields import Json, Segments
from unigen.data.hints import hint_for
from unigen.data.json_text import BrokenRow, parse_json
from unigen.data.mapping import PLAIN, ReadOptions
from unigen.data.recognise import Format, recognise
from unigen.plugins import Registry
from unigen.sequence.images import Confined
from unigen.sequence.types import BadRecord, Image, Origin, Record, Text


def parse_record(value: Any, origin: Origin) -> Record:
    """The record of one JSON value. Nothing is opened: pictures stay paths, relative ones joined to the
    folder of ``origin.file``.

    Raises:
        BadRecord: The value fits no format or two, or breaks a rule of its format. The codes are
            ``not_an_object``, ``no_format``, ``ambiguous_format``, ``ambiguous_piece``, ``missing_field``,
            ``unexpected_field``, ``wrong_type``, ``unknown_type``, ``unknown_role``, ``bad_text``,
            ``empty_text``, ``bad_path``, ``broken_picture``, ``bad_step_number``,
            ``unequal_image_count``, ``no_target``, ``unknown_key``, ``unsupported_key``; of captions that are
            JSON also ``bad_json`` and ``duplicate_key``.
    """
    return parse_with_fields(value, origin)[0]


def parse_raw(
    raw: bytes | Json, line: int, origin: Origin, read: ReadOptions = PLAIN
) -> tuple[Record, list[str]]:
    """:func:`parse_with_fields` of what ``containers.read_part`` gives; ``line`` is ``ByteSpan.line``."""
    try:
        value = record_value(raw, line)
    except BadRecord as error:
        error.origin = origin
        raise
    return parse_with_fields(value, origin, read)


def record_value(raw: bytes | Json, line: int) -> Any:
    """The value of a record that ``containers.read_part`` gave: of a JSON text; or of the row of a table, in
    which NaN is an empty cell. Raises BadRecord, without origin."""
    if isinstance(raw, bytes):
        return parse_json(raw, line)
    if isinstance(raw, BrokenRow):
        raise raw.error
    row = {name: value for name, value in raw.items() if value is None or value == value}
    return tar.members_record(row) if tar.KEY in row else row


def parse_with_fields(
    value: Any, origin: Origin, read: ReadOptions = PLAIN, addresses: bool = False
) -> tuple[Record, list[str]]:
    """:func:`parse_record`, and for every segment of the sample the field it came from, as
    ``conversations[2].image_path``.

    With ``read.data_root`` every path of a picture becomes ``Confined(path, data_root)``; with ``addresses``
    pictures may be addresses of the web, and their source is an :class:`Address`.
    """
    aside: list[str] = []
    try:
        if not isinstance(value, dict):
            fix = "write one {...} for each record"
            raise BadRecord("not_an_object", "(record)", f.show(value), "a JSON object", fix)
        metadata = value.get("metadata") or {}
        metadata = metadata if isinstance(metadata, dict) else {"metadata": metadata}
        if isinstance(value.get("id"), str | int):
            metadata = {"id": value["id"], **metadata}
        keys.refuse(value)
        value, aside = read.renamed(value)
        value, notes = _without_empty(_unpacked(value))
        notes += [("unread", field) for field in aside]
        name = recognise(value, FORMATS)
        keys.refuse_system(value)
        keys.refuse_ranks(value, FORMATS[name].content in _TALKS)
        value = keys.mask_turns(value, FORMATS[name].content)
        segments = FORMATS[name].parse(value, read.folder(origin.file))
        if name == "text_to_image" and not FORMATS[name].known <= read.fields.keys():
            layouts.refuse_another_task(value, "image_path", "text_prompt")
        if name == "image_and_text":
            text, field = segments[0]
            assert isinstance(text, Text)
            segments = [(read.triggered(text), field), *segments[1:]]
        _refuse_blank(segments, name)
        segments = _with_inputs(value, name, _framed(value, segments))
        read_from = {field.partition(".")[0].partition("[")[0] for _, field in segments}
        read_from |= {place.partition(".")[0] for place in read.fields.values()}
        notes += [("unread", field) for field in keys.unread(value, FORMATS[name].known | read_from)]
        if name in ("messages", "chat"):
            notes += [("unread", field) for field in keys.unread_sizes(value)]
        if not any(segment.target for segment, _ in segments):
            if keys.says_no(value) and _would_learn(value, read.folder(origin.file), name):
                zero = next((key for key in keys.weights_of_record(value) if value.get(key) == 0), None)
                found = f.show(value[zero]) if zero else "targets that are not to be learnt"
                fix = "give it a weight above 0 where it should be learnt"
                field = zero or FORMATS[name].content
                raise keys.Unlearnt("no_target", field, found, "a weight above 0", fix)
            expected = "at least one segment that the model must produce"
            fix = 'add an answer (an assistant turn, a target), or mark a segment with "target": true'
            raise BadRecord("no_target", FORMATS[name].content, "context only", expected, fix)
        for segment, field in segments:
            if isinstance(segment, Image) and isinstance(segment.source, Address) and not addresses:
                fix = 'run "unigen fetch": training opens no connection'
                raise BadRecord("bad_path", field, f.show(segment.source.url), "the path of a file", fix)
            if isinstance(segment, Text) and segment.target and not segment.text:
                fix = "write the text, or leave the segment out"
                raise BadRecord("empty_text", field, '""', "a text to learn", fix)
    except BadRecord as error:
        error.origin = origin
        talk = error.code == "wrong_type" and error.field in ("prompt", "completion")
        if talk or error.code in ("no_format", "missing_field", "ambiguous_format"):
            empty = [name for name in aside if name in read.fields and value.get(name) is None]
            if empty:  # its own field of that name means something else
                old = read.fields[empty[0]]
                error.fix = f"fill in {old}, which --fields {empty[0]}={old} names, or leave the record out"
            elif not read.fields:
                error.fix = _hint(value, origin.file) or error.fix
        raise
    sample = [_confined(segment, read.data_root) for segment, _ in segments]
    return Record(sample, origin, name, metadata, tuple(notes)), [field for _, field in segments]


def _hint(value: Any, file: Path) -> str | None:
    """The line that makes a record of a known public data set work; None for others."""

    def refused(record: Json) -> str | None:
        try:
            return None if FORMATS[recognise(record, FORMATS)].parse(record, Path()) else "no_target"
        except BadRecord as error:
            return error.code

    known = {name for entry in FORMATS.values() for name in entry.known}
    return hint_for(value, file, refused, known) if isinstance(value, dict) else None


def _names_none(value: Any) -> bool:
    """Does a value, or each of a list, say in words or as an image column that there is no picture?"""
    if isinstance(value, list):
        return bool(value) and all(map(_names_none, value))
    return (isinstance(value, dict) or (isinstance(value, str) and len(value) < 9)) and f.no_picture(value)


def _unpacked(record: Json) -> Json:
    """The record with the lists that a column of a table holds as JSON text."""
    packed = {name for name, value in record.items() if name in _LISTS and f.is_list_text(value)}
    return record | {name: f.parsed_text(record[name], name) for name in packed} if packed else record


def _without_empty(record: Json) -> tuple[Json, list[tuple[str, str]]]:
    """The record with null in the picture fields that name none (``""``, ``"None"``), and a note of each."""
    said = [name for name, value in record.items() if _names_none(value)]
    empty = [name for name in said if any(name in entry.pictures for entry in FORMATS.values())]
    if not empty:
        return record, []
    return record | dict.fromkeys(empty), [("no_picture", name) for name in sorted(empty)]


def _framed(record: Json, segments: Segments) -> Segments:
    """The segments of a record with what it says of all of them: a system text comes first, a thinking text
    before the first target (where the format has not placed it), and a weight holds for every target."""
    weight = keys.weight_of(record, "", 1.0, keys.weights_of_record(record))
    first = next((i for i, (segment, _) in enumerate(segments) if segment.target), len(segments))
    if not any(field == keys.THOUGHT for _, field in segments):
        segments = [*segments[:first], *f.thought(record, "", 1.0), *segments[first:]]
    if weight < 1:
        segments = [
            (replace(s, target=s.target and weight > 0, weight=s.weight * (weight or 1.0)), field)
            for s, field in segments
        ]
    if f.optional(record, "system", str):
        segments.insert(0, (Text(f.string(record, "system", "")), "system"))
    return segments


def _with_inputs(record: Json, name: str, segments: Segments) -> Segments:
    """The segments of a record as its ``train_on_inputs`` says: all of a talk of texts are learnt, or answers
    alone, as every format with questions has it. Raises BadRecord where it may mean several things."""
    learnt = f.optional(record, keys.INPUTS, bool)
    pictures = any(isinstance(segment, Image) for segment, _ in segments)
    if (name in _DOCUMENTS and learnt is not None) or (learnt and (pictures or keys.says_no(record))):
        fix = 'take it out, and write "target": true or false at each turn or segment'
        raise BadRecord(
            "unsupported_key", keys.INPUTS, f.show(learnt), "questions and answers of texts alone", fix
        )
    return [(replace(segment, target=True), field) for segment, field in segments] if learnt else segments


_TALKS = ("messages", "conversations", "response", "output")  # what answers stand in
_DOCUMENTS = ("interleaved", "parallel_lists", "matched_images")  # formats without questions
_LISTS = (
    "conversations", "messages", "images", "image", "sequence", "editing_steps", "input_sequence",
    "target_sequence", "texts", "image_list", "instruction_list", "output_text_list", "history", "files",
    "image_info", "text_list", *layouts.SOURCE, *layouts.EDITED,
)  # fmt: skip

# formats whose texts are what a picture is drawn from
_DRAWN = frozenset(
    ("text_to_image", "editing", "captioned", "edit_list", "image_and_text", "single_edit", "edit_turns")
)


def _would_learn(record: Json, folder: Path, name: str) -> bool:
    """Has a record a target, but for what it says against learning one?"""
    segments = FORMATS[name].parse(keys.all_learnt(record), folder)
    return any(segment.target for segment, _ in segments)


def _refuse_blank(segments: Segments, name: str) -> None:
    """Raises BadRecord where a text that a picture is drawn from says nothing."""
    for segment, field in segments if name in _DRAWN else ():
        if isinstance(segment, Text) and not segment.target and not segment.text.strip():
            fix = (
                "write it, or give --trigger_word"
                if name == "image_and_text"
                else "write it, or leave it out"
            )
            raise BadRecord("empty_text", field, f.show(segment.text), "what the picture shows", fix)


def _confined(segment: Text | Image, root: Path | None) -> Text | Image:
    if root is not None and isinstance(segment, Image) and isinstance(segment.source, Path):
        return replace(segment, source=Confined(segment.source, root))
    return segment


# ---- the formats


def conversation(record: Json, folder: Path) -> Segments:
    """``conversations``: turns in order; assistant segments are targets."""
    segments: Segments = []
    for item, field in f.objects(record, "conversations", "", "turn"):
        role = f.role_of(item, field)
        segments += f.segment(item, field, folder, target=role == "assistant")
    if not any(isinstance(segment, Image) for segment, _ in segments):
        layouts.refuse_pictures_unread(record)
    return segments


def direct(record: Json, folder: Path) -> Segments:
    """``input_sequence`` is context, ``target_sequence`` is what the model must produce."""
    segments: Segments = []
    for name, target in (("input_sequence", False), ("target_sequence", True)):
        for item, field in f.objects(record, name, "", "segment"):
            segments += f.segment(item, field, folder, target)
    return segments


def text_to_image(record: Json, folder: Path) -> Segments:
    """``text_prompt`` is context, the picture the target."""
    return [
        (Text(f.string(record, "text_prompt", "")), "text_prompt"),
        (Image(f.picture(record, "image_path", "", folder), target=True), "image_path"),
    ]


def image_to_text(record: Json, folder: Path) -> Segments:
    """The picture is context, ``caption`` the target."""
    if record.get("image_path") is not None:
        layouts.refuse_another_task(record, "image_path", "caption", drawn=False)
    return [
        (Image(f.picture(record, "image_path", "", folder)), "image_path"),
        (Text(f.string(record, "caption", ""), target=True), "caption"),
    ]


def editing(record: Json, folder: Path) -> Segments:
    """``input_image``, then for each step its instruction (context) and its result (target, and context of
    the next step)."""
    segments: Segments = [(Image(f.picture(record, "input_image", "", folder)), "input_image")]
    first: int | None = None  # the number of step 0, as far as the numbers given so far say
    for i, (step, field) in enumerate(f.objects(record, "editing_steps", "", "step")):
        number = f.optional(step, "step", int, field)
        if number is not None:
            first = number - i if first is None else first
            if number != first + i:
                fix = "number the steps 1, 2, 3, ... in their order, or leave the numbers out"
                raise BadRecord("bad_step_number", f"{field}.step", str(number), f"{first + i}", fix)
        weight = keys.weight_of(step, field, 1.0)
        result = f.as_image(f.picture(step, "result_image", field, folder), weight)
        segments.append((Text(f.string(step, "instruction", field)), f"{field}.instruction"))
        segments += [*f.thought(step, field, weight), (result, f"{field}.result_image")]
    return segments


def interleaved(record: Json, folder: Path) -> Segments:
    """``sequence``: all segments are targets, but for the start: a first image, or a first text that an image
    follows."""
    for i, item in enumerate(f.required(record, "sequence", list, "")):
        field = f"sequence[{i}]"
        if isinstance(item, dict) and item.get("role") is not None:
            fix = (
                'use "conversations" for turns with roles, or take the role out and say "target": true or'
                " false"
            )
            raise BadRecord(
                "unexpected_field", f"{field}.role", f.show(item["role"]), "no role in a sequence", fix
            )
    items = f.objects(record, "sequence", "", "segment")
    segments: Segments = []
    for item, field in items:
        segments += f.segment(item, field, folder, target=True)
    if segments and not keys.speaks(items[0][0]):
        segments[0] = f.document(segments)[0]
    return segments


def messages(record: Json, folder: Path, name: str = "messages") -> Segments:
    """``messages`` whose ``<image>`` tags stand for ``images`` (or ``image``) in order; leading images, which
    have no tag, come first, as context."""
    images, field = layouts.images_of(record, folder)
    if name == "messages" and keys.from_speakers(record.get(name)):
        fix = "give --fields conversations=messages (format 8)"
        raise BadRecord("unknown_key", "messages[0].from", "from and value", "role and content", fix)
    turns, items = [], f.objects(record, name, "", "message")
    _check_indices(items, len(images))
    for item, at in items:
        role = f.role_of(item, at)
        turns.append(f.turn(item, at, role, f.contents_of(item, at, folder, role)))
    layouts.refuse_pictures_unread(record, turns)
    return f.tagged(turns, images, field)


def _check_indices(items: list[tuple[Json, str]], n: int) -> None:
    """Raises BadRecord where parts name their pictures by other numbers than 0, 1, ... (TRL), since each
    stands for the next one."""
    lists = [(item["content"], at) for item, at in items if isinstance(item.get("content"), list)]
    parts = [(part, f"{at}.content[{i}]") for content, at in lists for i, part in enumerate(content)]
    given = [
        (part["index"], at) for part, at in parts if isinstance(part, dict) and part.get("index") is not None
    ]
    for number, (index, at) in enumerate(given):
        if index != number or len(given) != n:
            found, fix = (
                f"{f.show(index)} of {n} images",
                "list images as the parts show them, or take index out",
            )
            raise BadRecord("ambiguous_piece", f"{at}.index", found, f"{number} of {len(given)} images", fix)


def chat(record: Json, folder: Path) -> Segments:
    """Messages that are called ``conversations``, with their pictures beside (MiniCPM-V)."""
    return messages(record, folder, "conversations")


def sharegpt(record: Json, folder: Path) -> Segments:
    """``conversations`` with ``from`` and ``value`` (ShareGPT, LLaVA); the tags stand for ``image`` (one or a
    list) or ``images``."""
    items = f.objects(record, "conversations", "", "speaker")
    images, field = layouts.images_of(record, folder)
    turns = []
    for item, at in items:
        role = f.role_of(item, at, "from")
        weight = keys.weight_of(item, at, f.default_weight(role))
        part = f.Part(f.string(item, "value", at), f"{at}.value", weight)
        turns.append(f.turn(item, at, role, [part]))
    layouts.refuse_pictures_unread(record)
    return f.tagged(turns, images, field)


def captioned(record: Json, folder: Path) -> Segments:
    """``captions``, several that say the same, are context; ``image`` is the target."""
    if record.get("captions") is None:
        f.required(record, "captions", str, "")
    layouts.refuse_another_task(record, "image", "captions")
    return [
        f.variants(record["captions"], "captions"),
        (Image(f.picture(record, "image", "", folder), target=True), "image"),
    ]


def edit_list(record: Json, folder: Path) -> Segments:
    """``image_list`` with the instructions of ``instruction_list`` between: the first image is context, the
    others targets. With ``output_text_list`` it is a question and its interleaved answer."""
    images = f.pictures(f.required(record, "image_list", list, ""), "image_list", folder)
    steps = f.required(record, "instruction_list", list, "")
    if not keys.is_empty(record.get("output_text_list")):
        return _interleaved_answer(record, images, steps)
    if len(images) != len(steps) + 1:
        fix = "give one instruction, or one list of variants, for each picture after the first"
        expected = f"{len(steps) + 1} for {len(steps)} instructions"
        raise BadRecord("unequal_image_count", "image_list", f"{len(images)} images", expected, fix)
    segments: Segments = [(Image(images[0][0]), images[0][1])]
    for i, (step, (source, field)) in enumerate(zip(steps, images[1:])):
        segments += [f.variants(step, f"instruction_list[{i}]"), (Image(source, target=True), field)]
    return segments


def _interleaved_answer(
    record: Json, images: list[tuple[f.GivenPicture, str]], questions: list[Any]
) -> Segments:
    """Pictures and questions (context), then the texts of ``output_text_list`` with the last pictures between
    (targets). The marks ``<image_start>`` and ``<image_end>`` around a drawn picture are taken off."""
    texts = f.required(record, "output_text_list", list, "")
    given = len(images) - (len(texts) - 1)
    if given < 0:
        fix = "give one picture between every two texts of output_text_list, after those of the question"
        found, expected = f"{len(images)} images", f"{len(texts) - 1} or more for {len(texts)} texts"
        raise BadRecord("unequal_image_count", "image_list", found, expected, fix)
    segments: Segments = [(Image(source), field) for source, field in images[:given]]
    segments += [f.variants(question, f"instruction_list[{i}]") for i, question in enumerate(questions)]
    for i, text in enumerate(texts):
        field = f"output_text_list[{i}]"
        if i:
            source, at = images[given + i - 1]
            segments.append((Image(source, target=True), at))
        text = f.string({"": text}, "", field).removeprefix("<image_end>").removesuffix("<image_start>")
        if text:
            segments.append((Text(text, target=True), field))
    return segments


def _some_turn(record: Json, *names: str) -> bool:
    """Does a turn of ``conversations`` have one of these fields?"""
    turns = record.get("conversations")
    found = (turn for turn in turns if isinstance(turn, dict)) if isinstance(turns, list) else ()
    return any(turn.get(name) is not None for turn in found for name in names)


def _is_sharegpt(record: Json) -> bool:
    return _some_turn(record, "from", "value")


def _has_roles(record: Json) -> bool:
    return _some_turn(record, "role", "content", "image_path")


def _is_chat(record: Json) -> bool:
    """Are its conversations messages: pictures beside them, or in the lists of their contents?"""
    if record.get("image") is None and record.get("images") is None:
        turns = record.get("conversations")
        if not isinstance(turns, list):
            return False
        if not any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns):
            return False
    plain = _some_turn(record, "type", "image_path")
    return _has_roles(record) and not _is_sharegpt(record) and not plain


FORMATS: Registry[Format] = Registry(
    {
        "conversation": Format(
            conversation,
            ("conversations",),
            "conversations",
            ("conversations.image_path",),
            recognise=lambda record: (
                (_has_roles(record) or not _is_sharegpt(record)) and not _is_chat(record)
            ),
        ),
        "direct": Format(
            direct,
            ("input_sequence", "target_sequence"),
            "target_sequence",
            ("input_sequence.image_path", "target_sequence.image_path"),
        ),
        "text_to_image": Format(text_to_image, ("text_prompt",), "image_path", ("image_path",)),
        "image_to_text": Format(image_to_text, ("caption",), "caption", ("image_path",)),
        "editing": Format(
            editing,
            ("input_image", "editing_steps"),
            "editing_steps",
            ("input_image", "editing_steps.result_image"),
        ),
        "interleaved": Format(interleaved, ("sequence",), "sequence", ("sequence.image_path",)),
        "messages": Format(
            messages,
            ("messages", "images"),
            "messages",
            ("image", "images"),
            recognise=lambda record: (
                record.get("messages") is not None or (not _is_sharegpt(record) and not _is_chat(record))
            ),
        ),
        "sharegpt": Format(sharegpt, ("conversations",), "conversations", ("image", "images"), _is_sharegpt),
        "captioned": Format(captioned, ("captions",), "image", ("image",)),
        "edit_list": Format(
            edit_list,
            ("image_list", "instruction_list"),
            "image_list",
            ("image_list",),
            reads=("output_text_list",),
        ),
        "image_and_text": Format(
            layouts.image_and_text,
            (),
            "image",
            layouts.PICTURE,
            # image_path and caption are image_to_text
            recognise=lambda record: (
                record.get("image_path") is None
                or record.get("caption") is None
                or any(record.get(name) is not None for name in ("image", "file_name", "text", "prompt"))
            ),
            needs=(layouts.PICTURE, layouts.CAPTION),
        ),
        "single_edit": Format(
            layouts.single_edit,
            (),
            "output_image",
            (*layouts.SOURCE, *layouts.EDITED, "image"),
            recognise=lambda record: layouts.edited_of(record) is not None,
            needs=((*layouts.EDITED, "image"), layouts.INSTRUCTION),
        ),
        "query_response": Format(
            layouts.query_response,
            (),
            "response",
            ("image", "images"),
            reads=("history",),
            needs=(layouts.QUESTION, layouts.ANSWER),
        ),
        "instruction": Format(
            layouts.instruction,
            (),
            "output",
            ("image", "images"),
            reads=("input", "history"),
            needs=(("instruction",), ("output",)),
        ),
        "chat": Format(chat, ("conversations",), "conversations", ("image", "images"), _is_chat),
        "reasoning_trace": Format(
            layouts.reasoning_trace, (), "Final Answer", (), needs=tuple((name,) for name in layouts.ZEBRA)
        ),
        "parallel_lists": Format(
            layouts.parallel_lists,
            (),
            "texts",
            ("images",),
            recognise=lambda record: not layouts.are_pairs(record),
            needs=(("images",), ("texts",)),
        ),
        "matched_images": Format(
            layouts.matched_images, (), "text_list", (), needs=(("text_list",), ("image_info",))
        ),
        "question_pairs": Format(
            layouts.question_pairs,
            (),
            "texts",
            ("images",),
            layouts.are_pairs,
            needs=(("images",), ("texts",)),
        ),
        "edit_turns": Format(
            layouts.edit_turns,
            (),
            "metadata_edit_turn_prompts",
            ("files.url", "local_input_image"),
            needs=(("files",), ("metadata_edit_turn_prompts",)),
        ),
    }
)
