"""The page of ``unigen check``: one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unigen.commands.check.advice import Advice
from unigen.commands.check.findings import CHECK, Findings
from unigen.commands.check.report import (
    advice_line,
    common_folder,
    covered,
    more,
    percent,
    place,
    said,
    sections,
    verdict,
)
from unigen.show.language import TAGS, Words, of_code
from unigen.show.pages import write_page

FEW = 5  # problems that are all shown unfolded


def write(
    path: Path, found: Findings, summary: dict[str, Any], advice: Sequence[Advice], words: Words
) -> Path:
    """Writes the page.

    Raises:
        OSError: It cannot be written.
    """
    folder = common_folder(found.files)
    values = {
        "words": words,
        "clean": not len(found.problems),
        "verdict": verdict(found, words),
        "covered": covered(found, summary, words),
        "folder": folder,
        "interrupted": words("interrupted", n=summary["records"]) if found.interrupted else "",
        "tiles": _tiles(found, summary, words),
        "unfolded": len(found.problems) <= FEW,
        "problems": [_code(code, n, found, folder, words) for code, n in found.problems.counts.most_common()],
        "advice": [(a.level, advice_line(a, words)) for a in advice],
        "sections": [
            (heading, [(type(block).__name__, block) for block in blocks])
            for heading, blocks in sections(summary, words)
        ],
        "percent": percent,
    }
    return write_page(
        path,
        "check.html",
        values,
        by=CHECK,
        title=words("title"),
        language=TAGS[words.language],
        styles=["charts", "check"],
    )


def _tiles(found: Findings, s: dict[str, Any], words: Words) -> list[tuple[str, str, str]]:
    """(name, value, no note) of each."""
    median = s["lengths"]["quantiles"]["0.5"] if s["lengths"]["count"] else 0
    tiles = [
        (words("tile_records"), s["records"]),
        (words("tile_problems"), len(found.problems)),
        (words("aside", text=words("tile_length"), aside=words(s["lengths"]["unit"])), median),
        (words("tile_pictures"), s["pictures"]["pieces"]),
        (words("tile_text"), s["targets"]["text_tokens"]),
        (words("tile_image"), s["targets"]["image_tokens"]),
    ]
    return [(name, _short(value), "") for name, value in tiles]


def _short(n: int) -> str:
    """A number that fits a tile: 1,234 or 12.3 M."""
    for size, name in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if n >= 10 * size or (size == 10**6 and n >= size):
            return f"{n / size:,.1f} {name}"
    return f"{n:,}"


def _code(code: str, n: int, found: Findings, folder: str, words: Words) -> dict[str, Any]:
    """The problems of one code: the first ones, and that there are more."""
    first = found.problems.first[code]
    return {
        "code": code,
        "n": n,
        "meaning": of_code(code, words.language),
        "rows": [[place(p, folder), words.field(p["field"]), *said(p, words)] for p in first],
        "more": more(found, n - len(first), words),
    }
