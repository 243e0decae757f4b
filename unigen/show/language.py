"""The texts of one room in one language, from ``assets/text/``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

from unigen.figures import gb
from unigen.messages import LANGUAGES, in_language, spoken
from unigen.show.terminal import harmless

TAGS = {"en": "en", "zh": "zh-CN"}  # what HTML calls them
DURATIONS = ("ago", "for_")  # values that are seconds
SIZES = ("free", "need", "stay")  # bytes
BETWEEN = {"en": " ", "zh": ""}  # two sentences
# In place of a field's name, as in a bad record.
PLACES = {"(record)": "whole_record", "(file)": "whole_file"}


@cache
def texts(language: str) -> dict[str, dict[str, str]]:
    """All texts of a language: section -> key -> text."""
    assert language in LANGUAGES
    return json.loads((files("unigen") / "assets" / "text" / f"{language}.json").read_text("utf-8"))


class Words:
    """The texts of a section and the common ones: ``words("skipped", n=3)``.

    Without a language it is that of the command. Values that are seconds or bytes become text by their names
    (``DURATIONS``, ``SIZES``); texts of others become harmless.
    """

    def __init__(self, language: str | None, section: str):
        self.language, self.section = language or spoken(), section
        self.texts = texts(self.language)["common"] | texts(self.language)[section]

    def __call__(self, key: str, **values: Any) -> str:
        shown = {name: self._shown(name, value) for name, value in values.items()}
        return self.texts[key].format(**shown)

    def _shown(self, name: str, value: Any) -> Any:
        if name in DURATIONS:
            return self.duration(value)
        if name == "phase":
            return self.phase(value)
        return gb(value) if name in SIZES else harmless(value) if isinstance(value, str) else value

    def field(self, name: str) -> str:
        """The name of a record's field; what stands for the whole is said in the language."""
        return self(PLACES[name]) if name in PLACES else name

    def metric(self, key: str) -> str:
        """What a metric is called, by its key in the files: ``psnr``, ``psnr_to_source``."""
        kind = key.removesuffix("_to_source")
        name = self.texts.get(f"metric_{kind}", kind)  # a plugin's has no other name than its key
        return name if kind == key else self("to_source", metric=name)

    def listed(self, names: Iterable[str]) -> str:
        return self("comma").join(names)

    def sentences(self, *said: str) -> str:
        """Sentences behind each other; an empty one is none."""
        return BETWEEN[self.language].join(filter(None, said))

    def phase(self, name: str) -> str:
        """What a process does, by its name in the heartbeats; a dash between two phases."""
        said = in_language(f"phase {name}", self.language)
        return harmless(said.removeprefix("phase ")) if name else "–"

    def duration(self, seconds: float) -> str:
        """``45 s``, ``12 min``, ``3 h 5 min``, ``2 d 4 h``."""
        if not 0 <= seconds < 1e11:
            return "?"
        if seconds < 120:
            return self("seconds", n=round(seconds))
        minutes = round(seconds / 60)
        if minutes < 60:
            return self("minutes", n=minutes)
        if minutes < 48 * 60:
            return self("hours", n=minutes // 60, m=minutes % 60)
        hours = round(seconds / 3600)
        return self("days", n=hours // 24, m=hours % 24)


def of_code(code: str, language: str) -> str:
    """What the code of a problem means; empty for one without a text."""
    return texts(language)["codes"].get(code, "")
