"""The table of known keys: of records, of turns and of segments, in all formats; what a turn says of its own
learning; what is refused, and why.

A key of a turn or segment that is not in the table is an error: it may change what is learnt. A key of a
record that nothing reads is counted and listed (:func:`unread`). A key without a value (null, an empty text,
list or object) is as good as absent. A new format adds a row to :data:`ITEMS` for each kind of objects in
its lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from math import isfinite
from typing import Any

from unigen.config import nearest
from unigen.data.words import Json, cut, join, names, show
from unigen.messages import in_language, spoken
from unigen.sequence.types import BadRecord

MASK, INPUTS = "loss_mask", "train_on_inputs"
LEARNING = ("target", "loss", "weight", "loss_weight", "loss_scale", "has_loss", MASK)
"""How a turn or segment says whether, and how much, it is learnt: true or false, or a number from 0 to 1."""


class Unlearnt(BadRecord):
    """A record of which nothing is learnt, as it says itself (weight 0): it is left out and counted."""


THOUGHT = "reasoning_content"
RECORD_WEIGHT = LEARNING[1:]
RECORD = ("metadata", "system", THOUGHT, INPUTS, *RECORD_WEIGHT)
"""Keys that a record of any format may have."""

SIZES = ("min_pixels", "max_pixels", "resized_width", "resized_height")
ITEMS: dict[str, tuple[str, ...]] = {
    "turn": ("role", "type", "content", "image_path", THOUGHT),
    "segment": ("type", "content", "image_path", THOUGHT),
    "step": ("step", "instruction", "result_image", THOUGHT),
    "message": ("role", "content", THOUGHT),
    "part": (
        "type", "text", "image", "image_url", "url", "path", "base64", "source",
        "detail", *SIZES, "cache_control", "index",
    ),
    "address": ("url", "detail"),
    "source": ("type", "media_type", "data", "url"),
    "pair": ("user", "assistant", "source"),
    "image_info": (
        "image_name", "raw_url", "matched_text_index", "matched_sim", "face_detections", "width", "height",
    ),
    "file": ("id", "url"),
    "speaker": ("from", "value", THOUGHT),
}  # fmt: skip
"""Keys of the objects in the lists of a record, by their kind; beside ``metadata`` and :data:`LEARNING`."""

_PLACES = ("address", "source")
"""Kinds that say where a picture is: whether it is learnt stands in the part that holds them."""

_VIDEO, _AUDIO = (f"texts and pictures alone: {name} cannot be read" for name in ("video", "audio"))
_PREFERENCE = "answers to learn: there is no preference training, and a bad answer would be learnt as well"
_TOOLS = "no tools: the model would learn answers without the calls they follow from"
REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("video", "videos", "video_url", "video_path"), (_VIDEO, "take frames of it as pictures")
    ),
    **dict.fromkeys(
        ("audio", "audios", "audio_url", "audio_path", "input_audio"), (_AUDIO, "write down what it says")
    ),
    **dict.fromkeys(
        (
            "chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images",
            "rejected_conversations", "kto_tag", "human_preference", "best_image_uid", "completions",
            "response_k", "better_response_id",
        ),
        (_PREFERENCE, "keep the good answer alone, in a field of the format"),
    ),
    **dict.fromkeys(
        ("tools", "functions", "tool_calls", "function_call"), (_TOOLS, "leave these records out")
    ),
}  # fmt: skip
"""Keys of records, turns and segments that change what would have to be learnt: why, and the fix."""

_RATINGS = ("image_amount_in_total", "overall_rating", "image_text_alignment_rating", "fidelity_rating")
"""What stands beside a ``rank`` that says how good a picture is; of a search result it says another thing."""

TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
"""Roles and speakers of what tools are asked and say."""

_SPEAKING = ("messages", "conversations", "texts", "sequence", "target_sequence", "editing_steps")
"""Fields of a record whose objects say themselves whether they are learnt."""

_MEANT = {
    **dict.fromkeys(("thinking", "thought", "thoughts", "reasoning"), THOUGHT),
    **dict.fromkeys(("train", "trainable", "learn", "train_on_turn"), "target"),
    **dict.fromkeys(("mask", "compute_loss"), "loss"),
}
"""What other trainers call the keys of a turn."""


def is_empty(value: Any) -> bool:
    return value in (None, "", "[]", "{}") or (isinstance(value, list | dict) and not value)


def check_keys(item: Json, where: str, kind: str) -> None:
    """Raises BadRecord for a key of a turn or segment that is not of its ``kind`` in :data:`ITEMS`."""
    known = ITEMS[kind] if kind in _PLACES else (*ITEMS[kind], *LEARNING)
    for name in item:
        if name in known or name == "metadata" or is_empty(item[name]):
            continue
        refuse({name: item[name]}, where)
        near = _MEANT.get(name)
        if near is None or near not in known:
            near = nearest(cut(name), [*known])
        fix = "take it out, or move it into metadata"
        fix = f"did you mean {near}? Otherwise {fix}" if near else fix
        expected = f"no key but {', '.join(known)} or metadata"
        raise BadRecord("unknown_key", join(where, cut(name)), show(item[name]), expected, fix)


def refuse(record: Json, where: str = "") -> None:
    """Raises BadRecord for a key with a value that is in :data:`REFUSED`, or a ``label`` of true or false."""
    for name in record:
        reason = REFUSED.get(name)
        if name == "label" and isinstance(record[name], bool):  # a class is a number or a text
            reason = (_PREFERENCE, "keep the good answers, without label")
        if reason and not is_empty(record[name]):
            expected, fix = reason
            raise BadRecord("unsupported_key", join(where, name), show(record[name]), expected, fix)


def refuse_ranks(record: Json, talk: bool) -> None:
    """Raises BadRecord for numbers that say how good an answer or a picture is: a ``label`` of 0 or 1 in a
    ``talk`` (KTO; elsewhere it is a class), and the ranks of ImageReward."""
    ranks, rated = record.get("ranking"), not record.keys().isdisjoint(_RATINGS)
    for name, found in (
        ("ranking", isinstance(ranks, list) and all(isinstance(rank, int) for rank in ranks)),
        ("rank", rated and isinstance(record.get("rank"), int)),
        ("label", talk and isinstance(record.get("label"), int) and record["label"] in (0, 1)),
    ):
        if found:
            fix = f"keep what is good alone, and give --fields metadata={name}, as where it is a class"
            raise BadRecord("unsupported_key", name, show(record[name]), _PREFERENCE, fix)


def mask_turns(record: Json, content: str) -> Json:
    """The record with the entries of a list ``loss_mask`` in the turns (or segments, steps, pairs) of the
    field ``content``, one in each. Raises BadRecord for a list of another length."""
    mask, items = record.get(MASK), record.get(content)
    if content not in _SPEAKING or not isinstance(mask, list) or not isinstance(items, list):
        return record
    if not all(isinstance(item, dict) for item in items):
        return record
    if len(mask) != len(items):
        fix = "write one for each, 1 where it is learnt and 0 where not, or true or false for the record"
        expected = f"one for each of the {len(items)} entries of {content}"
        raise BadRecord("wrong_type", MASK, f"{len(mask)} entries", expected, fix)
    said = [bool(value) if value in (0, 1) else value for value in mask]
    return {**record, MASK: None, content: [{MASK: one, **item} for one, item in zip(said, items)]}


def refuse_system(record: Json) -> None:
    """Raises BadRecord for a system text under another name than ``system``, which would not be read."""
    for name in ("system_prompt", "system_message"):
        if not is_empty(record.get(name)):
            fix = f"give --fields system={name}, or --fields metadata={name} to learn without it"
            raise BadRecord("unknown_key", name, show(record[name]), "a system text called system", fix)


def weights_of_record(record: Json) -> tuple[str, ...]:
    """The keys with which a record says whether, and how much, all of it is learnt: ``target``
    too where it is true or false (of data sets it is often a picture, a text or a class)."""
    return LEARNING if isinstance(record.get("target"), bool) else RECORD_WEIGHT


def unread(record: Json, known: Iterable[str]) -> list[str]:
    """The keys of a record that have a value and that nothing reads."""
    known = {*known, *RECORD, *weights_of_record(record)}
    return [name for name in record if name not in known and not is_empty(record[name])]


def speaks(item: Json) -> bool:
    """Does an object of a record say itself whether it is learnt?"""
    return any(item.get(name) is not None for name in LEARNING)


def from_speakers(turns: Any) -> bool:
    """Are turns those of ShareGPT: speakers (``from``) and what they say (``value``)?"""
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and first.keys() >= {"from", "value"}


def unread_sizes(record: Json) -> list[str]:
    """The sizes that parts of messages ask for: the size of a picture is decided by options alone."""
    turns = record.get("messages") or record.get("conversations")
    contents = [turn["content"] for turn in turns or [] if isinstance(turn.get("content"), list)]
    parts = [part for content in contents for part in content if isinstance(part, dict)]
    return sorted({name for part in parts for name in SIZES if part.get(name) is not None})


def says_no(record: Json) -> bool:
    """Does a record, or an object in its lists, say that something is not learnt?"""
    return all_learnt(record) != record


def all_learnt(value: Any, depth: int = 4) -> Any:
    """A record, or a value in it, without what says that something is not learnt."""
    if isinstance(value, list) and depth:
        return [all_learnt(item, depth - 1) for item in value]
    if not isinstance(value, dict) or not depth:
        return value
    return {
        name: item if name == "metadata" else all_learnt(item, depth - 1)
        for name, item in value.items()
        if not (name in LEARNING and isinstance(item, int | float) and item == 0)
        if not (name == MASK and isinstance(item, list))
    }


def in_text(name: str, text: str) -> Any:
    """What JSON would have under ``name`` for the text of a table: 0.5 for ``weight``, and ``False`` for
    ``label`` too, which is refused. What is neither stays a text."""
    if name not in LEARNING and name not in ("label", INPUTS):
        return text
    truth = {"true": True, "false": False}.get(text.strip().lower())
    if truth is not None or name not in LEARNING:
        return text if truth is None else truth
    with suppress(ValueError):
        return number if isfinite(number := float(text)) else text
    return text


def weight_of(item: Json, where: str, default: float, keys: Iterable[str] = LEARNING) -> float:
    """How much of the loss an object of the record carries, from 0 (context) to 1: what it says itself, or
    ``default``.

    Raises:
        BadRecord: A value is of another kind, or two keys contradict one another.
    """
    said: dict[str, float | None] = {}  # None: it is learnt, with the weight that others say
    for name in keys:
        value = item.get(name)
        if value is None:
            continue
        expected = "true or false" if name == "target" else "true, false or a number from 0 to 1"
        number = isinstance(value, int | float) and 0 <= value <= 1
        if not number or (name == "target" and not isinstance(value, bool)):
            fix = f"write {expected}: how much it is learnt; anything else belongs in metadata"
            raise BadRecord("wrong_type", join(where, name), show(value), expected, fix)
        said[name] = None if value is True else float(value)
    weights = {weight for weight in said.values() if weight is not None}
    if len(weights) > 1 or (0 in weights and None in said.values()):
        found = names(dict.fromkeys(said, True))
        fix = "keep one of them"
        raise BadRecord("ambiguous_piece", join(where, next(iter(said))), found, "keys that agree", fix)
    if weights:
        return weights.pop()
    return (default or 1.0) if said else default


# ---- what reading records left out or decided

# what a note says of a field: nothing reads it; it names no picture; it makes that nothing is learnt
NOTES = ("unread", "no_picture", "unlearnt")
_NAMES = 500  # fields that are counted by name; a record may name its fields as it likes


class Notes(Counter[tuple[str, str]]):
    """The notes of many records, counted."""

    def add(self, notes: Iterable[tuple[str, str]], times: int = 1) -> None:
        for note in notes:
            what, _ = note
            self[note if note in self or len(self) < _NAMES else (what, "(others)")] += times

    @property
    def unlearnt(self) -> int:
        """Records that were left out since nothing of them is learnt."""
        return sum(self.of("unlearnt").values())

    def of(self, what: str) -> dict[str, int]:
        """Field -> records, the most frequent ones first."""
        return {cut(name): n for (kind, name), n in self.most_common() if kind == what and n > 0}


def counts_of(fields: dict[str, int], total: int, most: int = 12, language: str | None = None) -> str:
    """``label 300 of 300, source 12 of 300``, in the language of the command unless another is named."""
    shown = list(fields.items())[:most]
    more = len(fields) - len(shown)
    if (language or spoken()) == "en":
        told = ", ".join(f"{name} {n:,} of {total:,}" for name, n in shown)
        return told + (f" and {more:,} more" if more else "")
    told = "、".join(name + in_language(f"({n:,} of all {total:,} records)", language) for name, n in shown)
    return told + (in_language(f"and {more:,} more fields", language) if more else "")
