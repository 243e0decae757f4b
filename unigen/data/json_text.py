"""Strict JSON: one record from its bytes, and the records of a JSON file from its text.

Stricter than Python's ``json`` where leniency would hide a mistake: NaN, infinities and repeated keys are
refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

from unigen.sequence.types import BadRecord

MAX_RECORD = 16 << 20  # bytes of a record; parsed it may take thirty times as much memory
MAX_DEPTH = 100  # objects and lists inside of one another

_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'  # unrolled: a group for each character would keep a place for each
_STRING_OR_CONSTANT = re.compile(_STRING + r"|NaN|-?Infinity", re.DOTALL)
_STRING_OR_BRACKET = re.compile(_STRING + r"|[\[{]|[\]}]", re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")


class _Constant(ValueError):
    pass


class _RepeatedKey(ValueError):
    pass


def _no_constant(name: str) -> Any:
    raise _Constant(name)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKey(key)
            seen.add(key)
    return found


_STRICT = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_repeats)
_LENIENT = json.JSONDecoder()


def parse_json(data: bytes, line: int = 1) -> Any:
    """The value of one record.

    Args:
        data: The UTF-8 bytes of the record, and white space around it.
        line: The 1-based line of its first byte, for messages; 0 when it shares that line with other records.

    Raises:
        BadRecord: ``bad_utf8``, ``bad_json`` or ``duplicate_key``, with line and column in what was found;
            ``huge_record``. No origin yet.
    """
    if len(data) > MAX_RECORD:
        raise BadRecord(
            "huge_record",
            "(record)",
            f"more than {MAX_RECORD:,} bytes",
            f"a record of at most {MAX_RECORD:,} bytes",
            "split the record; pictures belong into files of their own",
        )
    text = decode(data, line)
    if _is_deep(text):
        found = f"more than {MAX_DEPTH} objects and lists inside of one another"
        raise BadRecord(
            "bad_json", "(record)", found, "a record of ordinary depth and numbers", "simplify the record"
        )
    try:
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise _bad_json(error.msg, text, error.pos, line) from None
    except _Constant as error:
        match = next(m for m in _STRING_OR_CONSTANT.finditer(text) if m[0] == str(error))
        fix = "write a finite number or null; JSON has no NaN and no infinity"
        raise BadRecord(
            "bad_json", "(record)", f"{error} at {_place(text, match.start(), line)}", "a JSON value", fix
        ) from None
    except _RepeatedKey as error:
        found = f"the field {json.dumps(str(error))} twice in one object"
        raise BadRecord(
            "duplicate_key", "(record)", found, "each field once", "keep one of the two"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a whole number of thousands of digits
        found = str(error).partition(";")[0]
        raise BadRecord(
            "bad_json", "(record)", found, "a record of ordinary depth and numbers", "simplify the record"
        ) from None


def _is_deep(text: str) -> bool:
    """Deeper than ``MAX_DEPTH``? Few records have as many brackets at all."""
    depth = 0
    if text.count("{") + text.count("[") > MAX_DEPTH:
        for match in _STRING_OR_BRACKET.finditer(text):
            sign = text[match.start()]
            depth += (sign in "{[") - (sign in "}]")
            if depth > MAX_DEPTH:
                return True
    return False


def split_json(data: bytes) -> list[tuple[int, int, int]]:
    """``(byte offset, byte length, 1-based line)`` of each record of a JSON file: of each item of a list, or
    of the one value.

    Raises:
        BadRecord: ``bad_utf8`` or ``bad_json``. Nothing after a syntax error can be told apart, so it spoils
            the whole file.
    """
    text = decode(data, 1)
    try:
        spans = _split(text)
    except json.JSONDecodeError as error:
        raise _bad_json(error.msg, text, error.pos, 1) from None
    except (RecursionError, ValueError) as error:
        found = str(error).partition(";")[0]
        raise BadRecord(
            "bad_json", "(file)", found, "records of ordinary depth and numbers", "simplify the records"
        ) from None
    records, seen, offset, line = [], 0, 0, 1
    for start, end in spans:
        # between records there is nothing but brackets, commas and white space: a byte each
        offset += start - seen
        line += text.count("\n", seen, start)
        length = len(text[start:end].encode())
        records.append((offset, length, line))
        offset, line, seen = offset + length, line + text.count("\n", start, end), end
    return records


def decode(data: bytes, line: int) -> str:
    """The text of UTF-8 ``data``; raises BadRecord ``bad_utf8`` with line and column (in bytes)."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        where = (
            f"line {line + before.count(bytes([10]))}, byte {column}"
            if line
            else f"byte {error.start + 1} of the record"
        )
        found = f"byte 0x{data[error.start]:02x} at {where} ({error.reason})"
        raise BadRecord("bad_utf8", "(record)", found, "UTF-8 text", "save the file as UTF-8") from None


def _split(text: str) -> list[tuple[int, int]]:
    """``(start, end)`` in characters of each record."""
    at = _skip(text, 0)
    if at == len(text):
        return []
    spans = []
    if text[at] != "[":
        _, end = _LENIENT.raw_decode(text, at)
        spans.append((at, end))
    else:
        at = _skip(text, at + 1)
        end = at + 1
        while text[at : at + 1] != "]":
            _, end = _LENIENT.raw_decode(text, at)
            spans.append((at, end))
            at = _skip(text, end)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
                if text[at : at + 1] == "]":
                    raise json.JSONDecodeError("Illegal trailing comma before end of list", text, at)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        end = at + 1
    at = _skip(text, end)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return spans


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _bad_json(message: str, text: str, at: int, line: int) -> BadRecord:
    fix = "correct the JSON there"
    if message == "Extra data":
        fix = "put one record on a line of a .jsonl file, or all records into one [...] list of a .json file"
    return BadRecord("bad_json", "(record)", f"{message} at {_place(text, at, line)}", "valid JSON", fix)


def _place(text: str, at: int, line: int) -> str:
    if not line:
        return f"character {at + 1} of the record"
    return f"line {line + text.count(chr(10), 0, at)}, column {at - text.rfind(chr(10), 0, at)}"
