"""Layouts of public data sets and of other trainers, as they are: one function a layout, a row each in
``formats.FORMATS``.

A layout has names that everybody uses (``image``, ``text``, ``instruction``), so no single field tells it:
each needs one field of every group, and of those that fit, the one that reads most of the record's fields is
meant (``formats.py`` decides). Where two fields of one group stand side by side, nobody can know which is
meant, and the record is refused with the mapping that says it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from unigen.data import fields as f
from unigen.data.captions import is_picture
from unigen.data.fields import Json, Part, Segments
from unigen.data.keys import RECORD, THOUGHT, is_empty, refuse, speaks, weight_of
from unigen.printing import typed
from unigen.sequence.types import BadRecord, Image, Text

PICTURE = ("image", "image_path", "file_name")
CAPTION = ("text", "caption", "prompt")
SOURCE = (
    "input_image", "input_images", "source_image", "source_images", "source_img", "src_img", "src_image",
    "original_image", "edit_image", "kontext_images", "local_input_image", "open_image_input_url",
)  # fmt: skip
INSTRUCTION = (
    "instruction", "instructions", "edit_prompt", "edit_instruction", "edited_prompt_list", "input_prompt",
    "prompt", "edit", "text",
)  # fmt: skip
EDITED = ("output_image", "output_images", "edited_image", "target_image", "target_img", "edited_img")
QUESTION, ANSWER = ("query", "prompt"), ("response", "completion")
TALK = (*QUESTION, *ANSWER, "instruction", "input", "output", "history")  # texts, also with a picture's name
OTHER_ANSWERS = (
    *ANSWER, "answer", "answers", "multiple_choice_answer", "correct_answer", "final_answer", "solution",
    "output", "label", "choices", "ground_truth", "gt", "reply", "target_text",
)  # fmt: skip
ZEBRA = ("Question", "Text Reasoning Trace", "Final Answer")

RIVALS = (
    frozenset(PICTURE),
    frozenset((*CAPTION, "text_prompt", *INSTRUCTION, *QUESTION)),
    frozenset(SOURCE),
    frozenset(EDITED),
    frozenset(ANSWER),
)
"""Names of which a record means one: where a mapping gives one of them, the others stand aside."""

_OF_EDITS = frozenset((*SOURCE, *EDITED, *INSTRUCTION, "image", *RECORD))
_OTHER_PICTURE = re.compile(r"(.*_)?(image|img|mask)s?|mask_.*")
_RESULT = re.compile(r"(.*_)?(edit|edited|target|result|output|after|modified|final)(_.*|\d+)?")
_START = re.compile(
    r"(.*_)?(source|src|input|original|before|cond\w*|control\w*|ref\w*|depth|canny|pose)(_.*|\d+)?"
)
_ITS_NAME = re.compile(
    r"((image|img|file|orig(inal)?|source)_?)?(file_?)?(name|id|key|path|url|uri)", re.IGNORECASE
)
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")  # of pictures
_MARK = re.compile(r"<image_start>\s*\[([^\[\]]{1,200})\]\s*<image_end>")


def image_and_text(record: Json, folder: Path) -> Segments:
    """A picture and its text (a text, or several that say the same): the text is context, the picture the
    target."""
    text = the_one(record, CAPTION)
    _refuse_inside(record[text], text)
    name = the_one(record, PICTURE)
    (picture,) = _pictures(record, name, folder, most=1)
    refuse_another_task(record, name, text)
    return [_texts(record, text), (Image(picture[0], target=True), picture[1])]


def single_edit(record: Json, folder: Path) -> Segments:
    """Pictures to start from (or none), an instruction, and the edited picture, the target."""
    target = edited_of(record)
    assert target is not None
    sources = tuple(name for name in _there(record, SOURCE) if name != target)
    if len(sources) > 1:  # an address of the same picture, where it was downloaded
        sources = tuple(name for name in sources if name != "open_image_input_url")
    if target != "image" and record.get("image") is not None:
        if sources and record["image"] != record[sources[0]]:
            fix = f"list both in {sources[0]}, or take image out (--fields metadata=image)"
            found = f"image beside {sources[0]}"
            raise BadRecord("ambiguous_piece", "image", found, "one field of pictures to start from", fix)
        sources = sources or ("image",)
    _refuse_beside_edit(record)
    images = _pictures(record, the_one(record, sources), folder) if sources else []
    (edited,) = _pictures(record, target, folder, most=1)
    name = the_one(record, INSTRUCTION)
    if isinstance(record[name], str) and not f.is_list_text(record[name]):
        text = Part(f.string(record, name, ""), name, 0.0)
        segments = f.tagged([("user", [text])], images, sources[0] if sources else "input_images")
    else:
        segments = [(Image(source), field) for source, field in images]
        segments.append(_texts(record, name))
    return [*segments, (Image(edited[0], target=True), edited[1])]


def query_response(record: Json, folder: Path) -> Segments:
    """A question and its answer, earlier ones in ``history``; tags stand for ``images`` or ``image``."""
    question, answer = the_one(record, QUESTION), the_one(record, ANSWER)
    _refuse_file_names(record, question, answer)
    return _talk(record, [(question, f.string(record, question, ""))], answer, folder)


def instruction(record: Json, folder: Path) -> Segments:
    """``instruction``, what it is about (``input``) on the next line, and ``output`` (Alpaca)."""
    _refuse_file_names(record, "instruction", "output")
    asked = f.string(record, "instruction", "")
    about = f.string(record, "input", "") if record.get("input") is not None else ""
    return _talk(record, [("instruction", f"{asked}\n{about}" if about else asked)], "output", folder)


def reasoning_trace(record: Json, folder: Path) -> Segments:
    """Zebra-CoT: the question with its pictures is context; the trace, the pictures drawn in it, and the
    answer are targets. ``<image_start>[key]<image_end>`` stands for the picture in the field ``key``."""
    turns, images = [], []
    for name, role in zip(ZEBRA, ("user", "assistant", "assistant")):
        text = f.string(record, name, "")
        for key in _MARK.findall(text):
            images.append((f.as_picture(record.get(key), key, folder), key))
        turns.append((role, [Part(_MARK.sub(f.TAG, text), name, f.default_weight(role))]))
    shown = {name for name in record if re.fullmatch(r"(problem|reasoning)_image_\d+", name) and record[name]}
    left = shown - {name for _, name in images}
    if left:
        fix = "write <image_start>[key]<image_end> where the picture belongs, or take the field out"
        raise BadRecord(
            "unexpected_field", min(left), "a picture", "a picture that one of the texts names", fix
        )
    return f.tagged(turns, images, "Question")


def question_pairs(record: Json, folder: Path) -> Segments:
    """The Cauldron, FineVision: ``texts`` are questions and answers (``user``, ``assistant``), and ``images``
    stand before them or where their tags are. A pair's weight is that of its answer."""
    turns: list[tuple[str, list[Part]]] = []
    for item, field in f.objects(record, "texts", "", "pair"):
        for role, weight in (("user", 0.0), ("assistant", weight_of(item, field, 1.0))):
            turns.append((role, [Part(f.string(item, role, field), f"{field}.{role}", weight)]))
    refuse_pictures_unread(record)
    return f.tagged(turns, *images_of(record, folder))


def are_pairs(record: Json) -> bool:
    """Are its ``texts`` questions and answers?"""
    texts = record.get("texts")
    return isinstance(texts, list) and any(isinstance(text, dict) for text in texts)


def parallel_lists(record: Json, folder: Path) -> Segments:
    """OBELICS: ``images`` and ``texts`` side by side, one of the two at each place; a document as in format
    6."""
    images = f.required(record, "images", list, "")
    texts = f.required(record, "texts", list, "")
    if len(images) != len(texts):
        fix = "write null in the one list wherever the other has something"
        found = f"{len(images)} images beside {len(texts)} texts"
        raise BadRecord("unequal_image_count", "images", found, "lists of the same length", fix)
    segments: Segments = []
    for i, (image, text) in enumerate(zip(images, texts)):
        if text is not None and image is not None:
            fix = "leave one of the two null, and write the other at a place of its own"
            raise BadRecord("ambiguous_piece", f"texts[{i}]", f.show(text), f"null beside images[{i}]", fix)
        if image is not None:
            segments.append((Image(f.as_picture(image, f"images[{i}]", folder)), f"images[{i}]"))
        elif text is not None:
            segments.append((Text(_string(text, f"texts[{i}]")), f"texts[{i}]"))
    return f.document(segments)


def matched_images(record: Json, folder: Path) -> Segments:
    """MMC4: every picture of ``image_info`` before the text of ``text_list`` that it was matched with; a
    document as in format 6."""
    texts = f.required(record, "text_list", list, "")
    before: dict[int, Segments] = {}
    said: dict[str, float] = {}  # what pictures say of their own learning
    for item, field in f.objects(record, "image_info", "", "image_info"):
        at = f.required(item, "matched_text_index", int, field)
        if not 0 <= at < len(texts):
            fix = "name a text of the list by its number, from 0"
            expected = f"a number below {len(texts)}"
            raise BadRecord("wrong_type", f"{field}.matched_text_index", str(at), expected, fix)
        name = "image_name" if item.get("image_name") is not None else "raw_url"
        before.setdefault(at, []).append((Image(f.picture(item, name, field, folder)), f"{field}.{name}"))
        weight = weight_of(item, field, 1.0)
        if speaks(item):
            said[f"{field}.{name}"] = weight
    segments: Segments = []
    for i, text in enumerate(texts):
        segments += before.get(i, [])
        segments.append((Text(_string(text, f"text_list[{i}]")), f"text_list[{i}]"))
    return [
        (f.as_image(segment.source, said[at]) if isinstance(segment, Image) and at in said else segment, at)
        for segment, at in f.document(segments)
    ]


def edit_turns(record: Json, folder: Path) -> Segments:
    """Pico-Banana, several turns: ``metadata_edit_turn_prompts`` are the instructions, and ``files`` has the
    picture to start from and that of every turn, by ``id``. A copy of the first on this machine, which stands
    in ``local_input_image``, is read in its place."""
    prompts = f.required(record, "metadata_edit_turn_prompts", list, "")
    files = {f.string(item, "id", at): (item, at) for item, at in f.objects(record, "files", "", "file")}

    def shown(name: str, weight: float) -> tuple[Image, str]:
        item, at = files.pop(name, (None, ""))
        if item is None:
            fix = "add it, or leave the record out"
            found = ", ".join(files) or "none"
            raise BadRecord("unequal_image_count", "files", f"files {found}", f"one with the id {name}", fix)
        return f.as_image(f.picture(item, "url", at, folder), weight_of(item, at, weight)), f"{at}.url"

    if record.get("local_input_image") is not None:
        first = (Image(f.picture(record, "local_input_image", "", folder)), "local_input_image")
    else:
        first = shown("original_input_image", 0.0)
    segments: Segments = [first]
    for i, prompt in enumerate(prompts):
        at = f"metadata_edit_turn_prompts[{i}]"
        name = f"edit_turn{i + 1}"
        name = "final_image" if i == len(prompts) - 1 and name not in files else name
        segments += [(Text(_string(prompt, at)), at), shown(name, 1.0)]
    left = files.keys() - {"original_input_image"}
    if left:
        fix = "give one prompt for each picture after the first"
        raise BadRecord("unequal_image_count", "files", min(left), f"{len(prompts)} pictures to draw", fix)
    return segments


# ---- records that look like one thing and are another


def refuse_another_task(record: Json, picture: str, text: str, drawn: bool = True) -> None:
    """Raises BadRecord where a picture and its text stand beside another picture or, where the picture is
    ``drawn`` from the text, an answer: the record is an edit or a question, of which they are a part."""
    said = record[text]
    plain = isinstance(said, str) and text != "captions" and not f.is_list_text(said)
    for name in sorted(record, key=lambda name: OTHER_ANSWERS.index(name) if name in OTHER_ANSWERS else 99):
        value = record[name]
        first = value[0] if isinstance(value, list) and value else value
        alone = f"--fields metadata={name} to draw {picture} from {text} alone"
        if not drawn:
            alone = f"--fields metadata={name} to describe {picture} alone"
        elif plain:
            alone = f"--fields text_prompt={text} image_path={picture} to draw {picture} from {text} alone"
        if drawn and name == "label" and (not isinstance(first, str) or first.strip().isdecimal()):
            continue  # the number of a class
        if drawn and name in OTHER_ANSWERS and not is_empty(first):
            place = name if first is value else f"{name}.0"
            if isinstance(first, dict) and isinstance(first.get("answer"), str):
                first, place = first["answer"], f"{place}.answer"
            if isinstance(first, str) and name != "choices" and plain:
                shown = "" if picture == "image" else f" image={picture}"
                fix = f"give --fields query={text} response={place}{shown} to learn the answer, or {alone}"
            else:
                fix = f"write question and answer as messages (format 7), or give {alone}"
        elif name == text or name in PICTURE or not _is_another(name, first, record.get(picture)):
            continue
        elif "mask" in name:
            fix = f"move it into metadata (masks are not learnt from), or give {alone}"
        else:
            fix = _edits(name, picture, text, alone)
        expected = f"nothing beside {picture} and {text} to learn from"
        raise BadRecord("unexpected_field", name, f.show(value), expected, fix)


def _edits(name: str, picture: str, text: str, otherwise: str) -> str:
    """The mapping that learns an edit of two pictures: from ``picture`` to the field ``name`` or the other
    way, as that name says; both where it says neither."""
    start, end = picture, name
    if name in SOURCE or (name not in EDITED and _START.fullmatch(name)):
        start, end = end, start
    elif name not in EDITED and not _RESULT.fullmatch(name):
        otherwise = (
            f"--fields input_image={end} output_image={start} instruction={text} the other way round,"
            f" or {otherwise}"
        )
    return (
        f"give --fields input_image={start} output_image={end} instruction={text} to draw {end} from {start},"
        f" or {otherwise}"
    )


def _refuse_beside_edit(record: Json) -> None:
    """Raises BadRecord where an edit has a picture that nothing reads, masks apart (``visual_input`` of
    AnyEdit)."""
    for name, value in record.items():
        if name in _OF_EDITS or "mask" in name:
            continue
        inside = value.get("bytes") if isinstance(value, dict) else value
        encoded = isinstance(inside, bytes) and inside.startswith(_BEGINNINGS)
        if encoded or (_OTHER_PICTURE.fullmatch(name) and _is_picture(value)):
            fix = f"list it in the field of the pictures to start from, or give --fields metadata={name}"
            raise BadRecord("unexpected_field", name, f.show(value), "pictures that are read", fix)


def _refuse_inside(value: object, field: str) -> None:
    """Raises BadRecord where a text is JSON with what cannot be trained on, as the preferences of RLHF-V."""
    try:
        inside = f.parsed_text(value, field) if isinstance(value, str) and value[:1] == "{" else None
    except BadRecord:  # a text with braces
        return
    if isinstance(inside, dict):
        refuse(inside, field)


def _refuse_file_names(record: Json, question: str, answer: str) -> None:
    """Raises BadRecord where an answer, or what it is about, is the name of a picture, which would be learnt
    letter by letter."""
    about = "input" if question == "instruction" and _is_file_name(record.get("input")) else None
    if _is_file_name(record[answer]):
        pictures = about or next((name for name in ("images",) if record.get(name) is not None), None)
        source = f"input_images={pictures} " if pictures else ""
        told = "" if question == "instruction" else f" instruction={question}"
        fields = f"{source}{typed(f'output_image={answer}')}{told}"
    elif about:
        fields = " ".join(map(typed, (f"query={question}", f"image={about}", f"response={answer}")))
    else:
        return
    name = answer if "output_image" in fields else "input"
    fix = f"give --fields {fields}; where the name itself is meant, write the record as messages (format 7)"
    raise BadRecord("unexpected_field", name, f.show(record[name]), "a text, not a picture's file name", fix)


_IDENTITIES = {"id", "uid", "uuid", "key", "__key__", "sample_id", "question_id"}  # often a picture's name


def pictures_unread(record: Json) -> list[str]:
    """The fields of a record of texts that hold pictures which nothing reads."""
    if not all(is_empty(record.get(name)) for name in ("image", "images")):
        return []
    found = []
    for name, value in record.items():
        first = value[0] if isinstance(value, list) and value else value
        if name in RECORD or name in _IDENTITIES or (name in TALK and isinstance(first, str)):
            continue
        on_web = name == "image_url" and isinstance(first, str)
        if on_web or _is_file_name(first) or _is_another(name, first, None):
            found.append(name)
    return found


def refuse_pictures_unread(record: Json, turns: Sequence[f.Turn] = ()) -> None:
    """Raises BadRecord where a talk stands beside a picture that nothing reads, and its ``turns`` show none:
    the answer would be learnt without the picture."""
    if any(not isinstance(part.value, str) for _, parts in turns for part in parts):
        return
    if unread := pictures_unread(record):
        name = unread[0]
        fix = f"give --fields image={name}, or move it into metadata to answer without it"
        if len({f.show(record[other]) for other in unread}) > 1:
            fix = "list all pictures in images, or move them into metadata to answer without them"
        raise BadRecord("unexpected_field", name, f.show(record[name]), "pictures in image or images", fix)


def _is_file_name(value: object) -> bool:
    """Is a text, or the first of a list, nothing but the name of a picture's file?"""
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, str) or len(value) > 1000 or "://" in value:
        return False
    return not re.search(r"\s", value.strip()) and is_picture(Path(value.strip()))


def _is_another(name: str, value: object, picture: object) -> bool:
    """Is a field another picture than ``picture``, in place of its name or address?"""
    if name in RECORD:
        return False
    if _OTHER_PICTURE.fullmatch(name):
        return _is_picture(value)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):  # the members of a tar are bytes, whatever they hold
        return value.startswith(_BEGINNINGS)
    if not isinstance(value, str) or "://" in value or not _is_picture(value):
        return False
    same = isinstance(picture, str) and Path(value).stem == Path(picture).stem
    return value.startswith("data:") or not (same or _ITS_NAME.fullmatch(name))


def _is_picture(value: object) -> bool:
    """Is a value a picture: bytes, an object that has them or a path, the name or address of a file?"""
    if isinstance(value, dict):
        return any(value.get(name) for name in ("bytes", "path", "url"))
    if isinstance(value, str):
        return value.startswith("data:image/") or is_picture(Path(value[-1000:].partition("?")[0]))
    return isinstance(value, bytes)


# ---- what they share


def the_one(record: Json, names: tuple[str, ...]) -> str:
    """The field of a group that the record has. Raises BadRecord where it has two."""
    found = _there(record, names)
    assert found, f"none of {names}"
    if len(found) > 1:
        pairs = [typed(f"{names[0]}={name}") for name in found]
        fix = "say which one is meant: " + "; ".join(f"--fields {pair}" for pair in pairs)
        if names is CAPTION:
            learnt = f"--fields image_path={_there(record, PICTURE)[0]} caption={found[0]}"
            fix += f" (the picture is drawn); {learnt} learns it as the description"
        raise BadRecord("ambiguous_piece", found[0], f"{', '.join(found)} side by side", "one of them", fix)
    return found[0]


def edited_of(record: Json) -> str | None:
    """The field of the picture that an edit ends with; ``image`` is one beside ``edit_image`` (DiffSynth)."""
    found = _there(record, EDITED)
    if found:
        return the_one(record, EDITED)
    beside = _there(record, ("edit_image", "kontext_images"))
    return "image" if record.get("image") is not None and beside else None


def images_of(record: Json, folder: Path) -> tuple[list[tuple[f.GivenPicture, str]], str]:
    """The pictures that tags stand for: ``image`` (one or a list) or ``images``; and which of the two."""
    field = "image" if not is_empty(record.get("image")) else "images"
    if field == "image" and not is_empty(record.get("images")):
        fix = "put all pictures into images"
        raise BadRecord("ambiguous_piece", "image", "both image and images", "one of the two", fix)
    return (_pictures(record, field, folder) if record.get(field) is not None else []), field


def _there(record: Json, names: tuple[str, ...]) -> tuple[str, ...]:
    """The fields of a group that a record has: those with a value, where any has one."""
    there = tuple(name for name in names if record.get(name) is not None)
    return tuple(name for name in there if not is_empty(record[name])) or there


def _pictures(
    record: Json, name: str, folder: Path, most: int | None = None
) -> list[tuple[f.GivenPicture, str]]:
    """The pictures of a field that holds one or a list of them."""
    value = record[name]
    if not isinstance(value, list):
        return [(f.as_picture(value, name, folder), name)]
    found = f.pictures(value, name, folder)
    if most is not None and len(found) != most:
        fix = "write a record for each, or use format 6"
        raise BadRecord("wrong_type", name, f"{len(found)} pictures", f"{most}", fix)
    return found


def _string(value: object, field: str) -> str:
    return f.string({field: value}, field, "")


def _texts(record: Json, name: str) -> tuple[Text, str]:
    """A context text, or several variants of it in a list, which a table holds as JSON text."""
    value = record[name]
    if isinstance(value, str) and f.is_list_text(value) and value.rstrip().endswith("]"):
        value = f.parsed_text(value, name)
    if isinstance(value, str):
        return Text(f.string(record, name, "")), name
    return f.variants(value, name)


def _talk(record: Json, asked: list[tuple[str, str]], answer: str, folder: Path) -> Segments:
    """Earlier questions and answers of ``history``, the question ``asked`` and the field ``answer``."""
    refuse_pictures_unread(record)
    turns: list[tuple[str, list[Part]]] = []
    for i, pair in enumerate(f.optional(record, "history", list) or []):
        if not isinstance(pair, list) or len(pair) != 2:
            fix = "write [[question, answer], ...]"
            raise BadRecord("wrong_type", f"history[{i}]", f.show(pair), "a question and its answer", fix)
        for role, text, at in zip(("user", "assistant"), pair, (0, 1)):
            field = f"history[{i}][{at}]"
            turns.append((role, [Part(_string(text, field), field, f.default_weight(role))]))
    turns += [("user", [Part(text, name, 0.0)]) for name, text in asked]
    said = Part(f.string(record, answer, ""), answer, f.default_weight("assistant"))
    turns.append(f.turn({THOUGHT: record.get(THOUGHT)}, "", "assistant", [said]))
    images, field = images_of(record, folder)
    return f.tagged(turns, images, field)
