"""Curves to draw: smoothing, thinning, and the part of the plane that a chart shows, for the terminal and the
page alike; and curves in one line of characters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from unigen.runs.metrics import Point

MAX_POINTS = 300  # of a drawn curve
MARGIN = 0.03  # of the range, left free above and below
LOG_FROM = 30.0  # a greatest value this many times the least one asks for a logarithmic scale
BARS = "▁▂▃▄▅▆▇█"
USUAL = 5.0  # times the usual distance of the greatest value in a character from their mean


class AxisRange(NamedTuple):
    """The values that a chart shows; with ``cut`` some lie above ``high``."""

    low: float
    high: float
    log: bool = False
    cut: bool = False

    def place(self, value: float) -> float:
        """Where a value stands: 0 at ``low``, 1 at ``high``; within [0, 1]."""
        bend: Callable[[float], float] = math.log if self.log else float
        value = max(value, self.low)
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return min(1.0, max(0.0, share))


Box = tuple[float, float, AxisRange]  # first step, last step, values


class Curve(NamedTuple):
    """A line to draw. ``run`` is the index of its run, ``name`` its own where it is one of a group."""

    run: int
    is_validation: bool
    points: list[Point]
    name: str = ""


def smooth(points: Sequence[Point], weight: float) -> list[Point]:
    """The means as an exponential moving average, ``weight`` in [0, 1) on what was before; its begin is
    corrected as Adam's moments."""
    if not weight:
        return list(points)
    average, found = 0.0, []
    for n, point in enumerate(points, start=1):
        average = weight * average + (1 - weight) * point.mean
        found.append(point._replace(mean=average / (1 - weight**n)))
    return found


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most ``limit`` points: runs of equally many become one with their mean, least and greatest value."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return list(points)
    runs = [points[k : k + size] for k in range(0, len(points), size)]
    return [
        Point(
            sum(p.step for p in r) / len(r),
            sum(p.mean for p in r) / len(r),
            min(p.low for p in r),
            max(p.high for p in r),
        )
        for r in runs
    ]


def span(lines: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """The first and the last step of the lines, apart from each other. Each line has a point at least."""
    first, last = min(points[0].step for points in lines), max(points[-1].step for points in lines)
    return (first, last) if last > first else (first - 0.5, first + 0.5)


def value_range(
    lines: Sequence[Sequence[Point]], *, log: bool | None = False, from_zero: bool = False
) -> AxisRange:
    """The values to show of the lines, each of a point at least. A few values far above all others, as in the
    first steps or at a spike, do not press the rest flat.

    Args:
        log: Whether the scale is logarithmic, for positive values alone; None: as the values ask.
        from_zero: Whether 0 is to be seen.
    """
    values = sorted(point.mean for points in lines for point in points)
    low, high = values[0], values[-1]
    if log or (log is None and low > 0 and high > LOG_FROM * low):
        return AxisRange(low, high, log=True) if high > low else AxisRange(low / 2, low * 2, log=True)
    if from_zero:
        low = min(low, 0.0)
    common = values[min(len(values) - 1, int(0.97 * len(values)))]
    if len(values) >= 50 and high - low > 2.5 * (common - low) > 0:
        return AxisRange(low, common + 0.4 * (common - low), cut=True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1.0
        return AxisRange(low - margin, high + margin)
    margin = MARGIN * (high - low)
    return AxisRange(low - margin if low else low, high + margin)


def round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: give it room
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2, 5 times powers of ten that enclose [low, high]; powers of ten alone, or every few of
    them, when there are many."""
    # a hair wider, since logarithms round
    first, last = math.floor(math.log10(low) - 1e-9), math.ceil(math.log10(high) + 1e-9)
    marks, stride = (1, 2, 5) if last - first <= 4 else (1,), math.ceil((last - first + 1) / 12)
    ticks = [float(f"{m}e{k}") for k in range(first, last + stride, stride) for m in marks]
    below = max(t for t in ticks if t <= low)
    above = min((t for t in ticks if t >= high and t > below), default=10.0 * below)
    return [t for t in ticks if below <= t <= above] if above in ticks else [below, above]


# ---- in characters


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
