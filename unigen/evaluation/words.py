"""Texts as tokens for metrics: words, and characters where a script writes no spaces; and short answers made
equal where they are."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

TOKENIZER = "unigen-words-1"  # stands in the names of metrics: a change of what follows changes it

# Scripts without spaces between words, each character (with its marks) a token: (first, last), name.
_ALONE = [
    ((0x3400, 0x9FFF), "zh"), ((0xF900, 0xFAFF), "zh"), ((0x20000, 0x3FFFF), "zh"),
    ((0x3040, 0x30FF), "ja"), ((0x31F0, 0x31FF), "ja"),
    ((0x0E00, 0x0E7F), "th"), ((0x0E80, 0x0EFF), "lo"), ((0x1000, 0x109F), "my"), ((0x1780, 0x17FF), "km"),
]  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_SHARE = 0.2  # of all letters: from there on a corpus is written in that script


def _script(character: str) -> str:
    """``zh``, ``ja``, ``th``, ... of a character that is a token of its own; empty for others."""
    code = ord(character)
    return next((name for (first, last), name in _ALONE if first <= code <= last), "") if code > 0xDFF else ""


def tokens(text: str) -> list[str]:
    """Lower-case words of letters and digits; each Chinese, Japanese, Thai, Lao, Burmese or Khmer character
    by itself. Marks stay with their letter; punctuation and other signs are dropped.

    Of ASCII texts the same as rouge-score's default tokenizer without stemming.
    """
    found: list[str] = []
    inside: bool | None = None  # True: a word that a letter goes on; False: a character that marks go on
    for character in unicodedata.normalize("NFKC", text).lower():
        if unicodedata.category(character)[0] == "M":
            if found and inside is not None:
                found[-1] += character
        elif not character.isalnum():
            inside = None
        elif _script(character):
            found.append(character)
            inside = False
        elif inside:
            found[-1] += character
        else:
            found.append(character)
            inside = True
    return found


def language(texts: Sequence[str]) -> str:
    """``zh``, ``ja``, ``th``, ... where at least a fifth of the letters is of such a script, else ``en``,
    which stands for all that write spaces. Kana makes a text with Chinese characters Japanese."""
    letters = [character for text in texts for character in text if character.isalpha()]
    counts = Counter(filter(None, map(_script, letters)))
    if not letters or counts.total() < _SHARE * len(letters):
        return "en"
    if counts["ja"] and counts["ja"] >= _SHARE * (counts["zh"] + counts["ja"]):
        return "ja"
    return counts.most_common(1)[0][0]


def normalised(answer: str) -> str:
    """A short answer without case, punctuation, articles (a, an, the) and superfluous spaces, after SQuAD
    (Rajpurkar et al. 2016); full-width characters become ordinary ones. Signs and decimal points of numbers
    stay, since -5 is not 5; what is punctuation alone stays as it is."""
    text = unicodedata.normalize("NFKC", answer).lower().strip()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.replace("\u2212", "-"))
    kept = [
        character
        for place, character in enumerate(text)
        if unicodedata.category(character)[0] != "P" or _of_number(text, place)
    ]
    words = [word for word in "".join(kept).split() if word not in _ARTICLES]
    joined = " ".join(words)
    # spaces between characters of scripts that write none mean nothing
    joined = re.sub(r"(?<=(.)) (?=(.))", lambda m: "" if _script(m[1]) and _script(m[2]) else " ", joined)
    return joined or text


def _of_number(text: str, place: int) -> bool:
    before, character, after = text[place - 1 : place], text[place], text[place + 1 : place + 2]
    if character == ".":
        return after.isdigit() and (before.isdigit() or not before.isalnum())
    return character == "-" and after.isdigit() and not before.isalnum()
