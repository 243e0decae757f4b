"""The texts of one language, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unigen.show.terminal import harmless

LANGUAGES = ("en", "zh")
DURATIONS = ("ago", "for_")  # values that are seconds
SIZES = ("free", "need")  # bytes


class Words:
    """The texts of one language: ``words("skipped", n=3)``. ``texts`` has (English, Chinese) for each key."""

    def __init__(self, language: str, texts: Mapping[str, tuple[str, str]]):
        assert language in LANGUAGES
        self.language, self.texts, self._column = language, texts, LANGUAGES.index(language)

    def __call__(self, key: str, **values: Any) -> str:
        shown = {name: self._shown(name, value) for name, value in values.items()}
        text = self.texts[key][self._column]
        return text.format(**shown) if shown else text

    def _shown(self, name: str, value: Any) -> Any:
        if name in DURATIONS:
            return self.duration(value)
        if name == "phase":
            return harmless(value) or "–"
        return size(value) if name in SIZES else harmless(value) if isinstance(value, str) else value

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


def size(n: float) -> str:
    """Bytes: ``29.4 GB`` (10^9), as disks and ``min_free_gb`` count."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:.3g} {name}" if n < 100 * unit else f"{n / unit:,.0f} {name}"
    return f"{n:.0f} B"


def figure(value: float | None) -> str:
    """Four significant digits: ``1.234``, ``12,340``, ``2e-05``; ``–`` where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.3g}"
