"""Curves in one line of characters."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from unigen.runs.metrics import Point
from unigen.show.curves import AxisRange, Curve

BARS = "▁▂▃▄▅▆▇█"
USUAL = 5.0  # times the usual distance of the greatest value in a character from their mean

Box = tuple[float, float, AxisRange]  # first step, last step, values


def sparkline(curve: Curve, box: Box, width: int) -> str:
    """A curve in ``width`` characters, each the mean of its steps; a spike of few steps is shown itself."""
    values = box[2]
    found: dict[int, list[Point]] = {}
    for p in curve.points:
        found.setdefault(_place(p.step, box, width), []).append(p)
    means = {k: sum(p.mean for p in points) / len(points) for k, points in found.items()}
    tops = {k: max(p.high for p in points) for k, points in found.items()}
    usual = USUAL * statistics.median(tops[k] - means[k] for k in found)
    signs, last = [" "] * width, " "
    for k in range(max(0, min(found)), min(max(found) + 1, width)):
        if k in found:  # else steps are further apart than characters: the last value stands
            value = tops[k] if tops[k] - means[k] > usual else means[k]
            last = BARS[round(values.place(value) * (len(BARS) - 1))]
        signs[k] = last
    return "".join(signs)


def marks(steps: Iterable[int], box: Box, width: int) -> str:
    """A ``×`` in ``width`` characters at each of the steps that lie in the box."""
    found = {_place(step, box, width) for step in steps if box[0] <= step <= box[1]}
    return "".join("×" if k in found else " " for k in range(width))


def _place(step: float, box: Box, width: int) -> int:
    return round((step - box[0]) / (box[1] - box[0]) * (width - 1))
