"""Which curves stand in which chart, and the part of the plane that a chart shows; for the terminal and the
page alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from unigen.runs.metrics import Point
from unigen.runs.reader import Run

MAX_POINTS = 300  # of a drawn curve


class Panel(NamedTuple):
    """A chart: names of the words' table, ``unit`` "" for none."""

    name: str
    validation: str = ""
    unit: str = ""
    scale: float = 1.0  # of the values shown


PANELS = (
    Panel("loss", "val_loss"),
    Panel("text_loss", "val_text_loss", "unit_text_loss"),
    Panel("image_loss", "val_image_loss", "unit_image_loss"),
    Panel("grad_norm"),
    Panel("learning_rate"),
    Panel("tokens_per_second"),
    Panel("data_wait", unit="unit_share", scale=100.0),
)
ROOM = 0.03  # of the range, left free above and below
LOG_FROM = 30.0  # a gradient norm whose greatest value is this many times its least is drawn logarithmically


class Range(NamedTuple):
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


class Curve(NamedTuple):
    """A line to draw. ``run`` is the index of its run."""

    run: int
    is_validation: bool
    points: list[Point]


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The charts that have data. A run with one kind of target alone has a total loss that says nothing
    new."""
    there = [
        panel
        for panel in PANELS
        if any(
            run.metrics.log.buckets[name] for run in runs for name in (panel.name, panel.validation) if name
        )
    ]
    names = {panel.name for panel in there}
    single = len(names & {"text_loss", "image_loss"}) == 1
    return [panel for panel in there if not (single and panel.name == "loss")]


def curves_of(runs: Sequence[Run], panel: Panel, smoothing: float = 0.0) -> list[Curve]:
    """The lines of a chart: of each run its training, smoothed, and its validation."""
    curves = []
    for i, run in enumerate(runs):
        for is_validation, name in ((False, panel.name), (True, panel.validation)):
            points = run.metrics.log.points(name) if name else []
            if points:
                points = [
                    Point(p.step, p.mean * panel.scale, p.low * panel.scale, p.high * panel.scale)
                    for p in points
                ]
                exact = is_validation or panel.name == "learning_rate"
                curves.append(Curve(i, is_validation, points if exact else smooth(points, smoothing)))
    return curves


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


def span(curves: Sequence[Curve]) -> tuple[float, float]:
    """The first and the last step, apart from each other."""
    first = min(curve.points[0].step for curve in curves)
    last = max(curve.points[-1].step for curve in curves)
    return (first, last) if last > first else (first - 0.5, first + 0.5)


def value_range(panel: Panel, curves: Sequence[Curve]) -> Range:
    """The values to show. A few values far above all others, as in the first steps or at a spike, do not
    press the rest flat."""
    values = sorted(point.mean for curve in curves for point in curve.points)
    low, high = values[0], values[-1]
    if panel.name == "grad_norm" and low > 0 and high > LOG_FROM * low:
        return Range(low, high, log=True)
    if panel.name in ("tokens_per_second", "data_wait", "learning_rate"):
        low = min(low, 0.0)
    common = values[min(len(values) - 1, int(0.97 * len(values)))]
    if len(values) >= 50 and high - low > 2.5 * (common - low) > 0:
        return Range(low, common + 0.4 * (common - low), cut=True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 1.0
        return Range(low - room, high + room)
    room = ROOM * (high - low)
    return Range(low - room if low else low, high + room)
