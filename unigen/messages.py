"""What the program says, in the language of its user.

Errors, log lines and labels are written in English where they arise. Where they leave the program they pass
:func:`in_language`, which finds the sentence in ``assets/text/messages.zh.json`` and puts its values into the
Chinese one. A sentence that is not there stays as it is. ``tools/write_messages.py`` keeps the table.

A value is never altered: what a user gave (:func:`keep`) and all that looks like a path is one sign while a
text is translated, and a text whose paths did not come through whole stays English.
"""

from __future__ import annotations

import json
import logging
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.resources import files
from typing import Literal, NamedTuple

LANGUAGES = ("en", "zh")
_FEW = 3  # letters of its own that a sentence needs to be known by them alone
_MANY = 12  # letters that leave no doubt
_LONGEST = 8000  # characters of a line that is looked up
_DEEPEST = 8  # sentences within sentences
_LOOKS = 300  # parts of a text that are looked up
_QUOTES = "'\"`“"
# What parts a sentence, and the same in Chinese.
_PARTS = {". Fix: ": "。解决办法：", ". ": "。", "; ": "；", ": ": "：", " (": "（"}
_ENDS = {".": "。", ":": "："}
_TAILS = (" (", "; ", ", ", ". ", " F")  # how the end of a text of several sentences may begin
_HINT = re.compile(r" \((--[\w-]+ \.\.\.)\)$")  # what an error ends with: the option to give
# The name of an option, which is none of the small words that a sentence begins with.
_SMALL = (
    "a|an|the|and|for|in|is|it|no|not|of|or|that|there|this|what|which|with|add|give|measuring|name|take|use"
    "|write"
)
_OPTION = re.compile(rf"(?!({_SMALL})$)(--)?[a-z][\w.-]*(\[\d+\])?")
_BREAKS = ("Fix: ", "; ", ". ", ": ")  # the end of a sentence within a text
_END = re.compile(r"\. Fix: |\. |; ")
_FIGURE = r"([-+\d][\d.,e+-]*%?)"
_WORD = re.compile(r"[A-Za-z_]+")
# Signs of no language, which stand for values while a text is translated: those that were given, and paths.
_GIVEN, _PATHS = range(0xE000, 0xE800), range(0xE800, 0xF000)
_SIGN = re.compile("[\ue800-\uefff]")
_GIVEN_SIGN = re.compile("[\ue000-\ue7ff]")
_PHRASE = re.compile(r"[\s()/]")  # what a value has that is more than a word or a figure
_ENDINGS = (
    "jsonl?|ya?ml|safetensors|png|jpe?g|webp|gif|txt|log|parquet|arrow|csv|tsv|tar|zip|gz|html|pdf|md|py"
)
_TOKEN = re.compile(r"[^\s'\"`“”，。；：（）]+")
_FIGURES = re.compile(r"[-+\d.,%?]*/[-+\d.,%?]*|[A-Za-z]{1,8}/s")  # 3/5, MB/s
_BESIDE = 4  # words without a slash in a path, beside each other
_LATIN = re.compile("[A-Za-z]")
_BRACKET = re.compile("[()]")
_spoken = "en"
_given: tuple[str, ...] = ()


def preferred(environ: Mapping[str, str] | None = None) -> str:
    """The language that the user's surroundings ask for: ``UNIGEN_LANGUAGE``, else the locale as gettext
    reads it (``LC_ALL``, ``LC_MESSAGES``, ``LANG``; ``LANGUAGE`` goes before them where they name any)."""
    environ = os.environ if environ is None else environ
    if (said := environ.get("UNIGEN_LANGUAGE", "")) in LANGUAGES:
        return said
    named = next((environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environ.get(name)), "C")
    if named.split(".")[0] not in ("C", "POSIX"):
        named = environ.get("LANGUAGE") or named
    return "zh" if re.match(r"zh(?![a-z])", named, re.IGNORECASE) else "en"


def spoken() -> str:
    """The language of what is said now: that of the command that runs, English where none runs."""
    return _spoken


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """All that is said in the block, log lines too, is in ``language``."""
    global _spoken, _given
    assert language in LANGUAGES
    before, factory = (_spoken, _given), logging.getLogRecordFactory()
    _spoken = language

    def record(*args: object, **options: object) -> logging.LogRecord:
        made = factory(*args, **options)
        if made.name.partition(".")[0] == "unigen":
            made.msg, made.args = in_language(made.getMessage()), ()
        return made

    if language != "en":
        _table(language)  # now: what a signal says must not wait for a file
        logging.setLogRecordFactory(record)
    try:
        yield
    finally:
        _spoken, _given = before
        logging.setLogRecordFactory(factory)


def keep(*values: object) -> None:
    """Values that a user gave, texts or lists and mappings of them, which the command that runs may say
    again: they stay as they are."""
    global _given
    for value in values if _spoken != "en" else ():
        if isinstance(value, list | tuple | dict):
            keep(*(value.values() if isinstance(value, dict) else value))
            continue
        text = value.strip().rstrip("/") if isinstance(value, str) else ""
        if _PHRASE.search(text) and not _FIGURES.fullmatch(text):
            told = sorted({*_given, text}, key=lambda one: (-len(one), one))
            _given = tuple(told[: len(_GIVEN)])


def in_language(text: str, language: str | None = None) -> str:
    """The text in a language, default that of the command; what is not known of it stays English, and values
    stay as they are."""
    language = language or _spoken
    if language == "en":
        return text
    held = text
    if _given and not _GIVEN_SIGN.search(text):
        for sign, value in zip(_GIVEN, _given, strict=False):
            if value in held:
                held = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", chr(sign), held)
    said = _table(language).said(held)
    return said if held == text else _GIVEN_SIGN.sub(lambda sign: _given[ord(sign[0]) - _GIVEN[0]], said)


def listed(names: Iterable[str], last: Literal["and", "or"] = "and") -> str:
    """``a, b and c``, names as they are, in the language of the command."""
    *ahead, end = names
    comma, words = ("、", {"and": "、", "or": " 或 "}) if _spoken == "zh" else (", ", {})
    return comma.join(ahead) + words.get(last, f" {last} ") + end if ahead else end


class _Sentence(NamedTuple):
    """A sentence: what stands between its values in English, its Chinese, and how many letters it has."""

    literals: tuple[str, ...]
    translated: tuple[tuple[str, int | None], ...]
    letters: int
    figured: re.Pattern[str] | None  # of a sentence with values that are figures

    @property
    def vague(self) -> bool:
        """Has it few words of its own, which may stand within others: ``{} and {}``?"""
        return self.letters < _FEW + (not self.literals[0] and not self.figured)

    @property
    def moves(self) -> bool:
        """Does the English end with a value that the Chinese puts elsewhere?"""
        ends = self.translated[-2][1] if len(self.translated) > 1 and not self.translated[-1][0] else None
        return len(self.literals) > 1 and not self.literals[-1] and ends != len(self.literals) - 2

    def values(self, text: str) -> list[str] | None:
        """The values that make the sentence the text; None where none do. Of several ways it is the one with
        the shortest values first of which none ends within brackets; in linear time."""
        if self.figured:
            match = self.figured.fullmatch(text)
            return match and list(match.groups())
        first, *rest = self.literals
        if not rest:
            return [] if text == first else None
        *middle, last = rest
        at, end, found = len(first), len(text) - len(last), []
        if end < at or not (text.startswith(first) and text.endswith(last)):
            return None
        whole = _is_whole(text)
        for literal in middle:
            next_at = text.find(literal, at, end)
            while whole and next_at >= 0 and not _is_whole(text[at:next_at]):
                next_at = text.find(literal, next_at + 1, end)
            if next_at < 0:
                return None
            found.append(text[at:next_at])
            at = next_at + len(literal)
        return [*found, text[at:end]] if not whole or _is_whole(text[at:end]) else None

    def filled(self, values: list[str]) -> str:
        """The Chinese with values; no blank stands between a Chinese value and Chinese."""
        parts = [text for literal, n in self.translated for text in (literal, "" if n is None else values[n])]
        parts = [part for part in parts if part]
        for n in range(0, len(parts) - 1):
            ahead, behind = parts[n], parts[n + 1]
            if ahead.endswith(" ") and _is_chinese(ahead[-2:-1]) and _is_chinese(behind[0]):
                parts[n] = ahead[:-1]
            if behind.startswith(" ") and _is_chinese(behind[1:2]) and _is_chinese(ahead[-1]):
                parts[n + 1] = behind[1:]
        return "".join(parts)


class Translations:
    """Sentences and the same in another language.

    Args:
        sentences: English -> the other; ``{}`` for values, or ``{0}``, ``{1}`` where they stand in another
            order. None: a text that is not translated.
    """

    def __init__(self, sentences: Mapping[str, str | None]):
        self._rows: dict[str, list[_Sentence]] = {}
        for english, other in sentences.items():
            if other:
                row = _row(english, other)
                self._rows.setdefault(_word_of(row.literals), []).append(row)
        # words of the program itself that look like paths: metrics.jsonl
        self._own = {word for english in sentences for word in _TOKEN.findall(english) if _like_path(word)}
        tails = (row for rows in self._rows.values() for row in rows if row.literals[0][:1] in tuple(";,.( "))
        self.tails = [row for row in tails if len(row.literals[0]) > 1]
        self.said = lru_cache(1024)(self._said)

    def _said(self, text: str) -> str:
        """A text in the other language; in English where it is not known."""
        if len(text) > _LONGEST or _SIGN.search(text):
            return text
        paths = list(_paths(text, self._own))[: len(_PATHS)]
        held, at = "", 0
        for sign, (start, end) in zip(_PATHS, paths, strict=False):
            held, at = held + text[at:start] + chr(sign), end
        values = [text[start:end] for start, end in paths]
        ways = [_Text(self).read(text, 0) or text]
        if paths:  # a sentence may have a part of a path of its own, {}/samples: the way that leaves least
            masked = _Text(self).read(held + text[at:], 0) or text
            ways.insert(0, _SIGN.sub(lambda sign: values[ord(sign[0]) - _PATHS[0]], masked))
        ways = [way for way in ways if all(way.count(value) >= text.count(value) for value in values)]
        return min(ways, key=lambda way: len(_LATIN.findall(way)), default=text)

    def find(self, text: str, vague: bool = False) -> Iterator[tuple[_Sentence, list[str]]]:
        """The sentences that the text may be, those with the most of their own first; ``vague`` ones have few
        words of their own."""
        words = {"", *_WORD.findall(text)}
        rows = [row for word in words for row in self._rows.get(word, ())]
        for row in sorted(rows, key=lambda row: (-sum(map(len, row.literals)), row.literals)):
            if "\n" in text and "\n" not in "".join(row.literals):
                continue  # lines are read one by one
            values = row.values(text) if row.vague == vague else None
            if values is not None and not any(value.endswith(". Fix") for value in values):
                yield row, values


class _Text:
    """One text on its way into another language; what was found of its parts, and how often it may look."""

    def __init__(self, table: Translations):
        self._table, self._left = table, _LOOKS  # of a line
        self._seen: dict[str, str | None] = {}

    def read(self, text: str, depth: int) -> str | None:
        """The text in the other language; None where it is not known."""
        if text not in self._seen:
            self._left -= 1
            known = self._left > 0 and 0 < len(text) <= _LONGEST and depth <= _DEEPEST
            self._seen[text] = None  # while it is looked for
            self._seen[text] = self._of(text, depth) if known else None
        return self._seen[text]

    def _of(self, text: str, depth: int) -> str | None:
        inner = text.lstrip()
        hint = _HINT.search(inner)
        if hint and not any("(--" in "".join(row.literals) for row, _ in self._table.find(text)):
            found = self.read(inner[: hint.start()], depth)
            return found and found + f"（{hint[1]}）"
        if "\n" in text and next(self._table.find(text), None) is None:
            lines = [_Text(self._table).read(line, depth) or line for line in text.split("\n")]
            return "\n".join(lines) if lines != text.split("\n") else None
        if text.endswith(":") and (found := self.read(text[:-1], depth)) is not None:
            return found + "："
        if (found := self._known(text, depth)) is not None:
            return found
        if text[-1] in _ENDS and not text.endswith(".."):
            found = self.read(text[:-1], depth)
            return found and found + _ENDS[text[-1]]
        for way in (
            self._tailed,
            partial(self._parted, strict=True),
            self._vague,
            self._parted,
            partial(self._known, broad=True),
        ):
            if (found := way(text, depth)) is not None:
                return found
        if inner != text and (found := self.read(inner, depth)) is not None:
            return text[: len(text) - len(inner)] + found
        return None

    def _known(self, text: str, depth: int, broad: bool = False) -> str | None:
        """A sentence, or one behind the name of an option; a ``broad`` one has few words of its own between
        values that may be sentences."""
        rows = [one for one in self._table.find(text) if broad or _fits(*one)]
        row, values = rows[0] if rows else (None, [])
        if row and row.moves and _end_of_sentence(values[-1]):  # a sentence of several, or one that has them
            row, values = next((one for one in rows[1:] if _END.search("{}".join(one[0].literals))), rows[0])
        name, blank, rest = text.partition(" ")
        if blank and _OPTION.fullmatch(name) and " " in rest:  # a word is a value, or the name of a command
            behind, of_it = next(self._table.find(rest), (None, []))
            if behind and behind.letters > (row.letters if row else 0) and behind.literals[0]:
                return f"{name} " + self._filled(behind, of_it, depth)
        return row and self._filled(row, values, depth)

    def _filled(self, row: _Sentence, values: list[str], depth: int) -> str:
        """The Chinese with the values. Where the English ends with one that Chinese puts earlier, the
        sentences that follow are none of it."""
        tail = ""
        if row.moves and (end := _end_of_sentence(values[-1])):
            tail = _PARTS[end[0]] + self._each(values[-1][end.end() :], depth)
            values = [*values[:-1], values[-1][: end.start()]]
        return row.filled([self._value(value, depth) for value in values]) + tail

    def _each(self, text: str, depth: int) -> str:
        """Sentences behind each other, of which any may be unknown."""
        if (found := self.read(text, depth + 1)) is not None or (end := _end_of_sentence(text)) is None:
            return found or text
        head = text[: end.start()]
        return (self.read(head, depth + 1) or head) + _PARTS[end[0]] + self._each(text[end.end() :], depth)

    def _vague(self, text: str, depth: int) -> str | None:
        """A sentence with few words of its own, if one of its values is known; that which leaves least."""
        best: tuple[int, str] | None = None
        for row, values in self._table.find(text, vague=True):
            own = "".join(row.literals)
            if "Fix: " not in own and any(sign in text and sign not in own for sign in _BREAKS):
                continue  # two sentences, and this is one
            shown = [self._value(value, depth) for value in values]
            left = sum(len(was) for was, now in zip(values, shown, strict=True) if was == now and " " in was)
            if (shown != values or not values) and (best is None or left < best[0]):
                best = left, row.filled(shown)
        if best is not None:
            return best[1]
        name, _, rest = text.partition(" is ")
        named = _OPTION.fullmatch(name) and not any(sign in rest for sign in _BREAKS)
        return f"{name} 是 {rest}" if named and rest else None

    def _value(self, value: str, depth: int) -> str:
        """A value: a sentence in it is translated, also each of several; words and what is quoted are not."""
        if "\n" in value:
            return "\n".join(_Text(self._table)._value(line, depth) for line in value.split("\n"))
        if " " not in value or (value[0] in _QUOTES and value[-1] in _QUOTES + "”"):
            return value
        parts = value.split(", ")
        rows = (next(self._table.find(part), (None, []))[0] for part in parts)
        if len(parts) > 1 and all(row and row.figured for row in rows):
            return "，".join(self.read(part, depth + 1) or part for part in parts)
        if (found := self.read(value, depth + 1)) is not None:
            return found
        for sign, ours in ((", ", "，"), ("; ", "；")):
            parts = value.split(sign)
            known = [self.read(part, depth + 1) if " " in part else None for part in parts]
            if len(parts) > 1 and any(known):
                return ours.join(new or old for new, old in zip(known, parts, strict=True))
        return value

    def _tailed(self, text: str, depth: int) -> str | None:
        """A text that ends with what other sentences may end with, too."""
        for row in self._table.tails:
            at = text.find(row.literals[0])
            if at <= 0 or row.letters < _FEW or (row.literals[0][:2] not in _TAILS and _several(text)):
                continue
            if (values := row.values(text[at:])) is not None:
                head = self.read(text[:at], depth + 1) or text[:at]
                return head + self._filled(row, values, depth)
        return None

    def _parted(self, text: str, depth: int, strict: bool = False) -> str | None:
        """A text of two sentences, of which one is known at least; where ``strict``, by its own words."""
        whole = _is_whole(text)
        for sign, ours in _PARTS.items():
            closed = sign == " ("
            if closed and not text.endswith(")"):
                continue
            for found in re.finditer(re.escape(sign), text):
                head, tail = text[: found.start()], text[found.end() : -1 if closed else None]
                parts = [part for part in (head, tail) if " " in part]
                if whole and not (_is_whole(head) and _is_whole(tail)):
                    continue
                if strict and not any(self._known(part, depth + 1) for part in parts):
                    continue
                said = [self.read(part, depth + 1) if " " in part else None for part in (head, tail)]
                if any(said):
                    between = sign if sign == ": " and not said[0] else ours
                    return (said[0] or head) + between + (said[1] or tail) + ("）" if closed else "")
        return None


@lru_cache
def _table(language: str) -> Translations:
    return Translations({k: v for part in sentences(language).values() for k, v in part.items()})


def sentences(language: str) -> dict[str, dict[str, str | None]]:
    """The table as it is kept: those of the program's source, and those of libraries and of the system."""
    path = files("unigen") / "assets" / "text" / f"messages.{language}.json"
    return json.loads(path.read_text("utf-8"))


def values_of(sentence: str) -> list[tuple[str, int | None]]:
    """A sentence with ``{}``, ``{0}`` or ``{#}`` (a figure) as (text, number of the value behind it); the
    last has none."""
    parts: list[tuple[str, int | None]] = []
    text, count = "", 0
    for literal, name, _, _ in string.Formatter().parse(sentence):
        text += literal
        if name is not None:
            parts.append((text, int(name) if name.isdigit() else count))
            text, count = "", count + 1
    return [*parts, (text, None)]


def _row(english: str, other: str) -> _Sentence:
    literals = tuple(text for text, _ in values_of(english))
    letters = sum(c.isalpha() for text in literals for c in re.sub("Fix: (give )?", "", text))
    names = [name for _, name, _, _ in string.Formatter().parse(english) if name is not None]
    figured = None
    if "#" in names:
        kinds = [_FIGURE if name == "#" else "(.*?)" for name in names]
        figured = re.compile("".join(re.escape(a) + b for a, b in zip(literals, [*kinds, ""], strict=True)))
    return _Sentence(literals, tuple(values_of(other)), letters + names.count("#"), figured)


def _word_of(literals: tuple[str, ...]) -> str:
    """The longest whole word between the values, by which a sentence is found; "" for none."""
    whole = re.findall(r"(?<![A-Za-z_}])[A-Za-z_]+(?![A-Za-z_{])", "{}".join(literals))
    return max(whole, key=len, default="")


def _several(text: str) -> bool:
    """Does it look like several sentences?"""
    return any(sign in text for sign in _BREAKS)


def _fits(row: _Sentence, values: list[str]) -> bool:
    """Are the values of a sentence with few words of its own no sentences, as far as one can see?"""
    alone = sum(map(str.isalpha, row.literals[0])) < _FEW
    return row.letters >= _MANY or not any("; " in v or (alone and _several(v)) for v in values)


def _is_whole(text: str) -> bool:
    """Are its round brackets closed, in their order?"""
    depth = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            return False
    return depth == 0


def _end_of_sentence(text: str) -> re.Match[str] | None:
    """Where the first sentence of a text ends, outside of brackets; None where it is the only one."""
    return next((end for end in _END.finditer(text) if _is_whole(text[: end.start()])), None)


def _like_path(word: str) -> bool:
    """Does a word look like (a part of) a path? No figures (``3/5``) and no rates (``MB/s``)."""
    word = word.strip(".,;:?()")
    if "/" in word:
        return len(word) > 1 and not _FIGURES.fullmatch(word)
    return bool(re.search(rf"\.({_ENDINGS})$", word))


def _paths(text: str, own: set[str]) -> Iterator[tuple[int, int]]:
    """Where the paths of a text begin and end. Behind a slash the words up to another belong to a path,
    unless a sign parts them, or the brackets of what would be one path are not closed."""
    words = list(_TOKEN.finditer(text))
    n = 0
    while n < len(words):
        word = words[n]
        n += 1
        start = word.start() + len(word[0]) - len(word[0].lstrip("(,;["))
        if {word[0], word[0].rstrip(".,;:")} & own or not _like_path(text[start : word.end()]):
            continue
        end = start + _length(text[start : word.end()])
        begins = re.match(r"~?/|\.\.?/", text[start:end])
        for ahead in range(n, len(words)) if begins else ():
            if ahead - n >= _BESIDE or text[words[ahead - 1].end() : words[ahead].start()] != " ":
                break
            now = words[ahead][0]
            if words[ahead - 1][0][-1] in ".,;:?" or re.match(r"\(*[/~]|--|\(.*\)[.,;:]?$|\w+://", now):
                break  # another begins, or a remark on this one
            if "/" in now and not _FIGURES.fullmatch(now.strip(".,;:?()")) and now not in own:
                last = words[ahead].start() + _length(now)
                if _is_whole(text[start:last]):
                    end, n = last, ahead + 1
        yield start, end


def _opened(word: str) -> bool:
    """Does it end with a bracket that it did not open?"""
    return any(word[-1] == end and word.count(begin) < word.count(end) for begin, end in ("()", "[]"))


def _length(word: str) -> int:
    """Characters of a word without the signs that end a sentence, and a bracket that it did not open."""
    while word and (word[-1] in ".,;:?" or _opened(word)):
        word = word[:-1]
    return len(word)


def _is_chinese(c: str) -> bool:
    return bool(re.match(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef“”…—]", c))
