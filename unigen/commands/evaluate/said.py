"""Reasons, fixes and notes of metrics in the language of a report."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files


@cache
def _sentences(language: str) -> list[tuple[re.Pattern[str], str]]:
    """The sentences that metrics say, those with the most words of their own first: what they match, and the
    same in a language, ``{}`` for what varies, in the same order."""
    path = files("unigen") / "assets" / "text" / f"metrics.{language}.json"
    held: dict[str, str] = json.loads(path.read_text("utf-8"))
    ordered = sorted(held.items(), key=lambda pair: -len(pair[0].replace("{}", "")))
    return [
        (re.compile("(.+?)".join(map(re.escape, sentence.split("{}"))), re.DOTALL), translated)
        for sentence, translated in ordered
    ]


def in_language(text: str, language: str) -> str:
    """What a metric said, in a language; a sentence that nobody translated stays in English."""
    if language == "en":
        return text
    for pattern, translated in _sentences(language):
        if match := pattern.fullmatch(text):
            return translated.format(*(in_language(part, language) for part in match.groups()))
    return text
