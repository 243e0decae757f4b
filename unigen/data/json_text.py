"""Strict JSON: one record from its bytes, and the records of a JSON file from its text.

Stricter than Python's ``json`` where leniency would hide a mistake: NaN, infinities and repeated keys are
refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

from unigen.foreign import RepeatedName, known_mistake, once
from unigen.sequence.types import BadRecord

MAX_RECORD = 16 << 20  # bytes of a record; parsed it may take thirty times as much memory
MAX_DEPTH = 100  # objects and lists inside of one another

HEAD = 1 << 20  # bytes of a file's beginning that say whether it holds a record a line

# What files of other kinds begin with: what they are, and the fix.
_KINDS = (
    (b"PAR1", "it is a Parquet file", "name it .parquet"),
    (b"ARROW1", "it is an Arrow file", "name it .arrow"),
    (b"\x1f\x8b", "it is compressed by gzip", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd", "add .zst to its name"),
    (b"PK\x03\x04", "it is a zip archive", "unpack it (of a spreadsheet: save it as CSV)"),
)
_TABLE = re.compile(r"[\w .-]+([,;\t][\w .-]+)+\r?")  # a first line of names
_PYTHON = re.compile(r"'|True\b|False\b|None\b")


_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'  # unrolled: a group for each character would keep a place for each
_STRING_OR_CONSTANT = re.compile(_STRING + r"|NaN|-?Infinity", re.DOTALL)
_STRING_OR_BRACKET = re.compile(_STRING + r"|[\[{]|[\]}]", re.DOTALL)
_HAN = re.compile(r"[\u4e00-\u9fff]")
_SPACE = re.compile(r"[ \t\n\r]*")


class BrokenRow(dict[str, Any]):
    """The row of a record that cannot be read, with what is wrong with it: it is judged, and counted, as a
    record."""

    def __init__(self, error: BadRecord, contents: dict[str, Any]):
        super().__init__(contents)
        self.error = error


class _Constant(ValueError):
    pass


def _no_constant(name: str) -> Any:
    raise _Constant(name)


_STRICT = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=once)
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
        found, expected = f"more than {MAX_RECORD:,} bytes", f"a record of at most {MAX_RECORD:,} bytes"
        fix = "split the record; pictures belong into files of their own"
        raise BadRecord("huge_record", "(record)", found, expected, fix)
    text = decode(data, line)
    try:
        if _is_deep(text):
            raise ValueError(f"more than {MAX_DEPTH} objects and lists inside of one another")
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise _bad_json(error.msg, text, error.pos, line) from None
    except _Constant as error:
        match = next(m for m in _STRING_OR_CONSTANT.finditer(text) if m[0] == str(error))
        found = f"{error} at {_place(text, match.start(), line)}"
        fix = "write a finite number or null; JSON has no NaN and no infinity"
        raise BadRecord("bad_json", "(record)", found, "a JSON value", fix) from None
    except RepeatedName as error:
        found, fix = f"the field {json.dumps(error.name)} twice in one object", "keep one of the two"
        raise BadRecord("duplicate_key", "(record)", found, "each field once", fix) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a whole number of thousands of digits
        found, expected = str(error).partition(";")[0], "a record of ordinary depth and numbers"
        raise BadRecord("bad_json", "(record)", found, expected, "simplify the record") from None


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


def split_json(data: bytes) -> tuple[list[tuple[int, int, int]], BadRecord | None]:
    """``(byte offset, byte length, 1-based line)`` of each record of a JSON file: of each item of a list, or
    of the one value. And the syntax error (``bad_json``) after which no more of them can be told apart.

    Raises:
        BadRecord: ``bad_utf8`` or ``broken_file``, which spoils the whole file.
    """
    _refuse_other_kind(data[:64])
    text = decode(data, 1)
    spans: list[tuple[int, int]] = []
    broken = None
    try:
        _split(text, spans)
    except json.JSONDecodeError as error:
        if text[error.pos :].strip() or not spans:
            broken = _bad_json(error.msg, text, error.pos, 1)
        else:
            where = f"{_place(text, error.pos, 1)}, after {len(spans):,} records"
            found = f"the end of the file in the middle of a list at {where}"
            fix = "fetch or write the file again; close the list with ] if nothing is missing"
            broken = BadRecord("bad_json", "(file)", found, "a whole list", fix)
    except (RecursionError, ValueError) as error:
        found = str(error).partition(";")[0]
        fix = "simplify the records"
        broken = BadRecord("bad_json", "(file)", found, "records of ordinary depth and numbers", fix)
    records, seen, offset, line = [], 0, 0, 1
    for start, end in spans:
        # between records there is nothing but brackets, commas and white space: a byte each
        offset += start - seen
        line += text.count("\n", seen, start)
        length = len(text[start:end].encode())
        records.append((offset, length, line))
        offset, line, seen = offset + length, line + text.count("\n", start, end), end
    return records, broken


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
        raise BadRecord("bad_utf8", "(record)", found, "UTF-8 text", _encoding_fix(data)) from None


def _utf16(data: bytes) -> str | None:
    """The form of UTF-16 that data has; None for other data. Without a mark at its beginning it is known by
    its letters, figures and signs of ASCII, which have a zero byte beside them."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    for form in ("UTF-16LE", "UTF-16BE") if b"\0" in data else ():
        text = data[:4096].decode(form, "ignore")
        if sum(sign.isascii() and (sign.isprintable() or sign.isspace()) for sign in text) * 10 > len(text):
            return form
    return None


def refuse_utf16(start: bytes) -> None:
    """Raises BadRecord for a file that begins in UTF-16, which may pass for UTF-8."""
    if _utf16(start):
        raise BadRecord("bad_utf8", "(file)", "UTF-16 text", "UTF-8 text", _encoding_fix(start))


def _encoding_fix(data: bytes) -> str:
    if form := _utf16(data):
        return f"iconv -f {form} -t UTF-8 OLD > NEW makes it UTF-8"
    try:
        chinese = _HAN.search(data.decode("gb18030"))
    except UnicodeDecodeError:
        chinese = None
    if chinese:
        return "it reads as GBK: iconv -f GB18030 -t UTF-8 OLD > NEW makes it UTF-8"
    return "save the file as UTF-8 (iconv -f ENCODING -t UTF-8 OLD > NEW)"


def check_lines(head: bytes) -> None:
    """Raises BadRecord for a file whose records do not stand one on a line, as far as its beginning ``head``
    shows: one problem, not one a line."""
    head = head[:HEAD]
    _refuse_other_kind(head[:64])
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    line, _, rest = text.partition("\n")
    if text.startswith("[") and (_opens_list(line) if rest.strip() else _is_list(line)):
        fix = "name it .json: that is a file with a list of records"
        raise BadRecord("bad_json", "(file)", "one JSON list", "a record on each line", fix)
    if text.startswith("{") and rest.strip() and _end(line) is None and _end(text) is not None:
        fix = "write each on one line (json.dumps without indent; or jq -c . OLD > NEW)"
        raise BadRecord("bad_json", "(file)", "records over several lines", "each record on one line", fix)
    if _TABLE.fullmatch(line) and not rest.lstrip().startswith(("{", "[")):
        found = f"a table that begins with {line.strip()[:60]!r}"
        fix = "name it .csv (or .tsv, where tabs separate it)"
        raise BadRecord("bad_json", "(file)", found, "a record on each line", fix)


def _refuse_other_kind(start: bytes) -> None:
    """Raises BadRecord for a file that begins with these bytes and holds no JSON at all."""
    mistake = next(((what, fix) for magic, what, fix in _KINDS if start.startswith(magic)), None)
    mistake = mistake or (known_mistake(start) if start.strip() else None)
    if start and not start.strip(b"\0"):
        found = "nothing but zero bytes at its beginning, as an interrupted copy leaves them"
        mistake = found, "copy the file again"
    if mistake:
        raise BadRecord("broken_file", "(file)", mistake[0], "records in JSON", mistake[1])
    if len(start) >= 16:  # a few bytes say nothing
        refuse_utf16(start)


def _end(text: str) -> int | None:
    """Where the JSON value that begins a text ends; None where it does not."""
    try:
        return _LENIENT.raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None


def _opens_list(line: str) -> bool:
    """Does the first of several lines open a list of records that it does not close?"""
    return _end(line) is None and line[1:].lstrip()[:1] in ("", "{", "[")


def _is_list(line: str) -> bool:
    """Is a single line a list of records?"""
    return _end(line) is not None and line[1:].lstrip().startswith("{")


def _split(text: str, spans: list[tuple[int, int]]) -> None:
    """Appends ``(start, end)`` in characters of each record to ``spans``. Raises JSONDecodeError."""
    at = _skip(text, 0)
    if at == len(text):
        return
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


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _bad_json(message: str, text: str, at: int, line: int) -> BadRecord:
    found, fix = _slip(message, text[:at], text[at:]) or (message, "correct the JSON there")
    return BadRecord(
        "bad_json", "(record)", f"{found} at {_place(text, at, line)}", "a valid JSON value", fix
    )


def _slip(message: str, before: str, rest: str) -> tuple[str, str] | None:
    """What was done wrong where a parser stopped between two texts, and the fix; None where it is not
    known."""
    comma = before.rstrip().endswith(",") or rest.startswith(",")  # Python 3.13 points to it
    if comma and rest.lstrip(", \t\r\n")[:1] in ("]", "}"):
        return "a comma before the end", "take the comma out"
    if _PYTHON.match(rest):
        return "a value as Python prints it", "write the record with json.dumps"
    if rest[:1] in ("“", "”", "‘", "’"):
        return "a curly quote", 'write " in its place'
    if rest.startswith(("#", "//", "/*")):
        return "a comment", "take it out: JSON has none"
    if message != "Extra data":
        return None
    if rest.strip() == ",":
        return "a comma after the record", "take it out: nothing stands between records of a .jsonl"
    if rest.startswith("{") and "\n" not in before[len(before.rstrip()) :]:
        return "another record on the same line", "begin a new line before it"
    if rest.startswith("{"):
        return "another record behind the first", "name it .jsonl: that is a file with a record on each line"
    return message, "put one record on a line of a .jsonl file, or all into one [...] list of a .json file"


def _place(text: str, at: int, line: int) -> str:
    if not line:
        return f"character {at + 1} of the record"
    return f"line {line + text.count(chr(10), 0, at)}, column {at - text.rfind(chr(10), 0, at)}"
