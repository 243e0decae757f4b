"""A chart as a PNG: the same numbers as on a page (:class:`unigen.show.charts.Chart`), for papers and chats.

Drawn at twice the size at which it is still read easily, 600 pixels wide. Letters come from the font inside
of PIL; where that lacks some (Chinese), from a font of this machine.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unigen.show.charts import SIDE, Chart, Spot
from unigen.show.terminal import harmless

UNIT = 2  # pixels of the PNG for one of a page
WIDTH, HEIGHT, EDGE = 600, 360, 14  # of a page's pixels
SMOOTH = 2  # shapes are drawn so many times larger, and made smaller
TITLE, SMALL = 16, 13  # font sizes
WIDTHS = {"line": 1.8, "faint": 1.5, "grid-line": 1.0, "dots": 6.0, "skips": 8.0}  # as in charts.css
DASH = (5.0, 3.0)
ROUND = 5 * UNIT  # of the PNG's pixels
BAND = 0.16  # opacity

# Fonts with many letters; PIL looks for them where the system has its fonts.
_WIDE = (
    "NotoSansCJK-Regular", "NotoSansCJKsc-Regular", "NotoSansSC-Regular", "NotoSansSC[wght]",
    "SourceHanSansSC-Regular", "SourceHanSansCN-Regular", "SourceHanSans-Regular", "wqy-microhei",
    "wqy-zenhei", "DroidSansFallbackFull", "DroidSansFallback", "msyh", "simhei", "PingFang",
    "Hiragino Sans GB", "STHeiti Medium", "STHeiti Light", "Arial Unicode", "NotoSansMonoCJKsc-Regular",
    "DejaVuSans",
)  # fmt: skip


def png(chart: Chart) -> bytes:
    """A PNG of ``WIDTH`` by ``HEIGHT`` page pixels, ``UNIT`` times as many of its own."""
    width, height = WIDTH * UNIT, HEIGHT * UNIT
    picture = Image.new("RGB", (width, height), colour("--card"))
    pen = _Pen(picture, font_of(letters_of(chart)))
    top = pen.heading(chart) + 10 * UNIT
    left = max([30 * UNIT, *(pen.width(tick.text) for tick in chart.ys)]) + (EDGE + 8) * UNIT
    under = 22 * UNIT if chart.under else 0
    box = (left, top, width - EDGE * UNIT, height - (EDGE + 22) * UNIT - under)
    if chart.shapes:
        plane = _plane(chart, (box[2] - box[0], box[3] - box[1]))
        picture.paste(plane, (left - ROUND, top - ROUND))
        pen.axes(chart, box)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def letters_of(chart: Chart) -> str:
    """All letters of a chart."""
    ticks = [tick.text for tick in (*chart.ys, *chart.xs)]
    return "".join(
        [chart.title, *chart.notes, *(key.name for key in chart.keys), *ticks, chart.end, chart.under]
    )


def has_fonts(charts: Iterable[Chart]) -> bool:
    """Has this machine a font for all letters of the charts?"""
    return all(_covers(font_of(text), text) for text in map(letters_of, charts))


@cache
def font_of(text: str) -> str:
    """A font that has all letters; empty for the one inside of PIL, which also stands in where there is
    none."""
    return next((name for name in ("", *_WIDE) if _covers(name, text)), "")


def _covers(name: str, text: str) -> bool:
    """Does the font draw each of the letters as something else than its sign for a missing one?"""
    font = _font(name, SMALL)
    if font is None:
        return False
    missing = _drawn(font, "\U000fffff")
    return all(letter.isspace() or _drawn(font, letter) != missing for letter in set(text))


def _drawn(font: Any, letter: str) -> tuple[Any, bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@cache
def _font(name: str, size: int) -> Any:
    """A font; None where the system has none of that name."""
    pixels = size * UNIT
    try:
        return ImageFont.truetype(name, pixels) if name else ImageFont.load_default(pixels)
    except OSError:
        return None


@cache
def _colours() -> dict[str, str]:
    """The colours of a page in light mode."""
    style = (files("unigen") / "assets" / "styles" / "page.css").read_text("utf-8")
    return dict(reversed(re.findall(r"(--\w+): (#[0-9a-fA-F]{6})", style)))


def colour(name: str) -> str:
    """The colour of ``--c0`` or ``var(--c0)``."""
    return _colours()[name.removeprefix("var(").removesuffix(")")]


class _Pen:
    """Writes the texts around the plane."""

    def __init__(self, picture: Image.Image, font: str):
        self.draw, self.size = ImageDraw.Draw(picture), picture.size
        self.small, self.large = _font(font, SMALL), _font(font, TITLE)

    def width(self, text: str) -> int:
        return math.ceil(self.draw.textlength(text, self.small))

    def heading(self, chart: Chart) -> int:
        """Title, notes and legend, in as many rows as they need; where they end."""
        left, right = EDGE * UNIT, self.size[0] - EDGE * UNIT
        gap, row = 14 * UNIT, (SMALL + 6) * UNIT
        self.draw.text((left, left), harmless(chart.title), colour("--ink"), self.large)
        x = left + math.ceil(self.draw.textlength(chart.title, self.large)) + gap
        base = left + (TITLE + 1) * UNIT  # the line that all letters of a row stand on
        entries = [(harmless(note), None) for note in chart.notes]
        for text, key in [*entries, *((harmless(key.name), key) for key in chart.keys)]:
            mark = 0 if key is None else 22 * UNIT
            text = self._cut(text, right - left - mark)
            if x > left and x + mark + self.width(text) > right:
                x, base = left, base + row
            if key is not None:
                self._mark(key.dots, colour(key.colour), (x, base - SMALL * UNIT // 3))
            self.draw.text((x + mark, base), text, colour("--soft"), self.small, anchor="ls")
            x += mark + self.width(text) + gap
        return base + 4 * UNIT

    def axes(self, chart: Chart, box: tuple[int, int, int, int]) -> None:
        """The frame and the numbers at the axes."""
        left, top, right, bottom = box
        self.draw.line([(left, top), (left, bottom), (right, bottom)], colour("--line"), UNIT)
        for tick in chart.ys:
            y = top + tick.place * (bottom - top)
            self.draw.text((left - 8 * UNIT, y), tick.text, colour("--soft"), self.small, anchor="rm")
        base = bottom + (SMALL + 6) * UNIT
        for tick in chart.xs:
            x, anchor = left + tick.place * (right - left), "ls" if tick.place < 0.03 else "ms"
            self.draw.text((x, base), tick.text, colour("--soft"), self.small, anchor=anchor)
        self.draw.text((right, base), chart.end, colour("--soft"), self.small, anchor="rs")
        under = ((left + right) / 2, base + 21 * UNIT)
        self.draw.text(under, harmless(chart.under), colour("--soft"), self.small, anchor="ms")

    def _mark(self, dots: bool, ink: str, at: tuple[int, int]) -> None:
        x, y = at
        if not dots:
            self.draw.line([(x, y), (x + 16 * UNIT, y)], ink, 3 * UNIT)
            return
        for n in range(3):
            self.draw.ellipse([x + 6 * n * UNIT, y - 2 * UNIT, x + (6 * n + 4) * UNIT, y + 2 * UNIT], ink)

    def _cut(self, text: str, room: int) -> str:
        if self.width(text) <= room:
            return text
        while text and self.width(text + "…") > room:
            text = text[:-1]
        return text + "…"


def _plane(chart: Chart, size: tuple[int, int]) -> Image.Image:
    """The shapes, stretched to ``size``, with ``ROUND`` pixels around for dots at an edge."""
    wide, high = (SMOOTH * side for side in size)
    frame, edge = (wide + 2 * SMOOTH * ROUND, high + 2 * SMOOTH * ROUND), SMOOTH * ROUND
    picture = Image.new("RGB", frame, colour("--card"))
    for shape in chart.shapes:
        if shape.kind == "hit":  # catches the pointer
            continue
        ink = colour(shape.colour or "--line")
        paths = [
            [(edge + x / SIDE * wide, edge + y / SIDE * high) for x, y in points] for points in shape.lines
        ]
        if shape.kind in ("band", "bar"):
            mask = Image.new("L", frame)
            pen = ImageDraw.Draw(mask)
            for path in paths:
                pen.polygon(path, fill=round(255 * (BAND if shape.kind == "band" else 1.0)))
            picture.paste(ink, (0, 0), mask)
            continue
        thick, pen = WIDTHS[shape.kind] * UNIT * SMOOTH, ImageDraw.Draw(picture)
        for path in paths:
            if shape.kind in ("dots", "skips"):
                pen.circle(path[0], thick / 2, ink)
            else:
                dash = [part * UNIT * SMOOTH for part in DASH] if shape.kind == "faint" else []
                for part in _dashed(path, dash) if dash else [path]:
                    pen.line(part, ink, round(thick), joint="curve")
    return picture.reduce(SMOOTH)


def _dashed(path: Sequence[Spot], dash: Sequence[float]) -> Iterator[list[Spot]]:
    """The parts of a line that are drawn where it is dashed."""
    xs, ys = np.array(path).T
    along = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(xs), np.diff(ys)))])  # of each corner
    for start in np.arange(0.0, along[-1], sum(dash)):
        end = min(start + dash[0], along[-1])
        places = [start, *along[(along > start) & (along < end)], end]
        yield list(zip(np.interp(places, along, xs).tolist(), np.interp(places, along, ys).tolist()))
