"""Curves in characters: Braille has two by four dots in each; where the output has none of them, one mark a
character."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

from unigen.show.curves import Curve, Range, thin

# The bit of a dot in the Braille pattern, by column and row from above.
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=*#"
# times the usual distance of the least from the greatest value in a column of dots: a wider one is drawn
USUAL = 5.0

Box = tuple[float, float, Range]  # first step, last step, values


def plot(
    curves: Sequence[Curve], box: Box, width: int, height: int, unicode: bool = True
) -> list[list[tuple[str, int]]]:
    """``height`` lines of runs of (characters, index of the curve, -1 for none); later curves stand before
    earlier ones.

    Args:
        curves: To draw; each has a point at least.
        box: The part of the plane to show.
        width: Characters of a line.
        unicode: Whether the output has Braille characters.
    """
    across, down = (2, 4) if unicode else (1, 1)
    cells = [[0] * width for _ in range(height)]
    owner = [[-1] * width for _ in range(height)]
    for index, curve in enumerate(curves):
        for x, (top, bottom) in _columns(curve, box, width * across, height * down).items():
            for y in range(top, bottom + 1):
                row, column = y // down, x // across
                cells[row][column] |= _BITS[x % 2][y % 4] if unicode else 1
                owner[row][column] = index
    lines = []
    for row in range(height):
        spans: list[tuple[str, int]] = []
        for column in range(width):
            bits, index = cells[row][column], owner[row][column]
            sign = (chr(0x2800 + bits) if unicode else "*") if bits else " "
            if spans and spans[-1][1] == index:
                spans[-1] = (spans[-1][0] + sign, index)
            else:
                spans.append((sign, index))
        lines.append(spans)
    return lines


def _columns(curve: Curve, box: Box, width: int, height: int) -> dict[int, tuple[int, int]]:
    """Column of dots -> the first and the last dot of it, from above: what the line through the points covers
    there."""
    first, last, values = box
    points = thin(curve.points, width)
    usual = USUAL * statistics.median(p.high - p.low for p in points)
    found: dict[int, tuple[int, int]] = {}

    def place(step: float, value: float) -> tuple[float, float]:
        return (step - first) / (last - first) * (width - 1), (1 - values.place(value)) * (height - 1)

    def cover(column: int, y0: float, y1: float) -> None:
        top, bottom = sorted((round(y0), round(y1)))
        before = found.get(column, (top, bottom))
        found[column] = min(top, before[0]), max(bottom, before[1])

    for p in points:
        x, y = place(p.step, p.mean)
        cover(round(x), y, y)
        if p.high - p.low > usual:  # a spike must not vanish in the mean of its column
            cover(round(x), place(p.step, p.low)[1], place(p.step, p.high)[1])
    for (x0, y0), (x1, y1) in pairwise(place(p.step, p.mean) for p in points):
        begin, end = round(x0), round(x1)
        for column in range(begin, end + 1):
            left, right = max(x0, column - 0.5), min(x1, column + 0.5)
            at = [
                y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y for x, y in ((left, y0), (right, y1))
            ]
            cover(column, at[0], at[1])
    return {column: ends for column, ends in found.items() if 0 <= column < width}


def sparkline(curve: Curve, box: Box, width: int, unicode: bool = True) -> str:
    """A curve in one line of ``width`` characters."""
    first, last, values = box
    bars = _BARS if unicode else _PLAIN_BARS
    sums: dict[int, list[float]] = {}
    for p in curve.points:
        sums.setdefault(round((p.step - first) / (last - first) * (width - 1)), []).append(p.mean)
    signs = [" "] * width
    for column, found in sums.items():
        if 0 <= column < width:
            signs[column] = bars[round(values.place(sum(found) / len(found)) * (len(bars) - 1))]
    begin = min(sums, default=0)
    # steps further apart than characters: the last value stands
    for column in range(begin + 1, min(max(sums, default=0), width)):
        if signs[column] == " ":
            signs[column] = signs[column - 1]
    return "".join(signs)
