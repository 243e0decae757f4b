"""Charts of a page: what to draw, as numbers; ``assets/templates/parts.html`` lays it out.

A chart is sharp at any width, since its shapes are stretched and its texts are not. ``charts.js`` shows the
values of lines under the pointer; bars have tooltips and need no script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from unigen.figures import figure
from unigen.runs.metrics import Point
from unigen.show.curves import AxisRange, log_ticks, round_ticks, span, thin, value_range
from unigen.show.language import Words

SIDE = 1000  # of the plane that is stretched over a chart
WIDEST = 160  # of a bar, where there are few
COLOURS = 8  # --c0 ... in page.css
SKIPPED = "var(--bad)"
Axis = Callable[[float], float]
Spot = tuple[float, float]  # x to the right, y down


class Line(NamedTuple):
    """A line to draw; ``dotted`` for values apart from each other, ``band`` shows least and greatest ones."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dotted: bool = False
    band: bool = False


class Key(NamedTuple):
    """An entry of the legend."""

    name: str
    colour: str
    dots: bool = False


class Shape(NamedTuple):
    """Lines on the plane of ``SIDE`` by ``SIDE``, each through its points, a dot where it has one alone; and
    their class, colour and tooltip."""

    lines: Sequence[Sequence[Spot]]
    kind: str
    colour: str = ""
    tip: str = ""

    @property
    def d(self) -> str:
        """What SVG calls the data of a path."""
        paths = ["L".join(f"{x:.1f} {y:.1f}" for x, y in line) for line in self.lines]
        return "".join(f"M{path}" if "L" in path else f"M{path}h0" for path in paths)


class Tick(NamedTuple):
    """A number at an axis, ``place`` as a share of its length from above or the left."""

    text: str
    place: float


class Chart(NamedTuple):
    """A chart; without ``shapes`` there is nothing to draw."""

    title: str
    notes: list[str]
    keys: list[Key]
    shapes: list[Shape]
    ys: list[Tick]
    xs: list[Tick]
    end: str  # the text at the right end of the x axis
    under: str  # the text under the x axis
    data: str  # JSON for the script, empty without one


def line_chart(
    title: str,
    lines: Sequence[Line],
    words: Words,
    *,
    values: AxisRange | None = None,
    log: bool = False,
    notes: Sequence[str] = (),
    keys: Sequence[Key] | None = None,
    marks: Sequence[int] = (),
    marks_name: str = "",
    unit: str = "",
) -> Chart:
    """A chart of lines over steps. Points that cannot be drawn are left out and counted.

    Args:
        values: The values to show; default: of all points.
        log: Whether a default range is logarithmic, which draws positive values alone.
        notes: What stands beside the title.
        keys: The legend; default: the lines, where there are several.
        marks: Steps to mark at the lower edge, and ``marks_name`` for the legend.
        unit: Follows the values under the pointer.
    """
    log = values.log if values else log
    count = sum(len(line.points) for line in lines)
    lines = [line._replace(points=_drawable(line.points, log)) for line in lines]
    notes, left_out = list(notes), count - sum(len(line.points) for line in lines)
    lines = [line for line in lines if line.points]
    if log and lines:
        notes.append(words("log_scale"))
    if left_out:
        notes.append(words("left_out", n=left_out))
    if not lines:
        return Chart(title, [*notes, words("no_data")], [], [], [], [], "", "", "")
    values = values or value_range([line.points for line in lines], log=log)
    if values.cut:
        notes.append(words("cut_off", high=values.high))
    first, last = span([line.points for line in lines])
    lines = [line._replace(points=thin(line.points)) for line in lines]

    def x(step: float) -> float:
        return (step - first) / (last - first) * SIDE

    ys, shapes = _grid(values)
    for line in lines:
        shapes += _drawn(line, x, lambda value: (1 - values.place(value)) * SIDE)
    if keys is None:
        keys = [Key(line.name, _colour(line), line.dotted) for line in lines if len(lines) > 1]
    marked = [step for step in marks if first <= step <= last]
    if marked:
        shapes.append(Shape([[(x(step), SIDE - 20)] for step in marked], "skips", SKIPPED))
        keys = [*keys, Key(marks_name, SKIPPED, True)]
    end = words("step_alone", step=math.floor(last))
    data = json.dumps(_pointed(lines, unit, words), separators=(",", ":"), ensure_ascii=False)
    return Chart(title, notes, list(keys), shapes, ys, _steps(first, last), end, "", data)


def bar_chart(
    title: str, bars: Sequence[tuple[str, str, float]], words: Words, *, x_label: str, y_label: str
) -> Chart:
    """A chart of bars side by side. A bar is its label, what the pointer calls it, and its value of at least
    0; labels that would run into each other are left out."""
    assert all(math.isfinite(value) and value >= 0 for *_, value in bars), "a bar has a length"
    if not any(value for *_, value in bars):
        return Chart(title, [words("no_data")], [], [], [], [], "", "", "")
    top = round_ticks(0.0, max(value for *_, value in bars))[-1]
    ys, shapes = _grid(AxisRange(0.0, top), whole=all(value == int(value) for *_, value in bars))
    width = SIDE / len(bars)
    half = min(0.42 * width, WIDEST / 2)
    for n, (_, name, value) in enumerate(bars):
        middle = (n + 0.5) * width
        bar = _block(middle - half, middle + half, (1 - value / top) * SIDE)
        shapes.append(Shape([bar], "bar", "var(--c0)"))
        # the whole height catches the pointer, so that the smallest bar can be asked too
        column = _block(n * width, (n + 1) * width, 0.0)
        shapes.append(Shape([column], "hit", tip=f"{name}: {value:,.6g}"))
    # 280 pixels on a phone, 7 for a digit at the most
    every = math.ceil(len(bars) * max(7 * len(label) + 12 for label, *_ in bars) / 280)
    xs = [Tick(label, (n + 0.5) / len(bars)) for n, (label, *_) in enumerate(bars) if n % every == 0]
    return Chart(title, [y_label] if y_label else [], [], shapes, ys, xs, "", x_label, "")


def _block(left: float, right: float, top: float) -> list[Spot]:
    return [(left, SIDE), (left, top), (right, top), (right, SIDE)]


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    return [p for p in points if math.isfinite(p.step) and math.isfinite(p.mean) and (p.mean > 0 or not log)]


def _grid(values: AxisRange, whole: bool = False) -> tuple[list[Tick], list[Shape]]:
    """The ticks that lie in the range, thinned to seven, ``whole`` numbers where asked, and a line across the
    chart at each."""
    ticks = (log_ticks if values.log else round_ticks)(values.low, values.high)
    slack = 1e-9 * (values.high - values.low)
    found = [tick for tick in ticks if values.low - slack <= tick <= values.high + slack]
    found = [tick for tick in found if not whole or tick == int(tick)]
    found = found[:: -(-len(found) // 7)] if len(found) > 1 else [values.low, values.high]
    ys = [Tick(figure(tick), 1 - values.place(tick)) for tick in found]
    return ys, [Shape([[(0, y.place * SIDE), (SIDE, y.place * SIDE)]], "grid-line") for y in ys]


def _colour(line: Line) -> str:
    return f"var(--c{line.colour % COLOURS})"


def _drawn(line: Line, x: Axis, y: Axis) -> list[Shape]:
    """The band from least to greatest value, the means; dots for values apart."""
    colour, shapes = _colour(line), []
    places = [(x(p.step), y(p.mean)) for p in line.points]
    if line.band and any(p.high > p.low for p in line.points):
        above = [(x(p.step), y(p.high)) for p in line.points]
        below = [(x(p.step), y(p.low)) for p in reversed(line.points)]
        shapes.append(Shape([above + below], "band", colour))
    if len(places) > 1:
        shapes.append(Shape([places], "faint" if line.dotted else "line", colour))
    if len(places) == 1 or (line.dotted and len(places) <= 100):
        shapes.append(Shape([[place] for place in places], "dots", colour))
    return shapes


def _steps(first: float, last: float) -> list[Tick]:
    """The numbers under the chart, in its first three quarters: the last one says itself what they are."""
    fine = round_ticks(first, (first + last) / 2)
    width = fine[1] - fine[0]
    ticks = [k * width for k in range(int(first // width), int(last // width) + 1)]
    ticks = [tick for tick in ticks if tick >= first and tick == int(tick)]
    ticks = ticks[:: -(-len(ticks) // 6)] if ticks else [first]
    shown = [Tick(f"{tick:,.0f}", (tick - first) / (last - first)) for tick in ticks]
    return [tick for tick in shown if tick.place < 0.74]


def _pointed(lines: Sequence[Line], unit: str, words: Words) -> dict[str, Any]:
    """What the script shows under the pointer; a point further than ``gap`` from the pointed step does not
    count."""
    first, last = span([line.points for line in lines])
    curves = [
        {
            "n": line.name,
            "c": line.colour % COLOURS,
            "x": [round(p.step, 2) for p in line.points],
            "t": [figure(p.mean) + unit for p in line.points],
            "gap": max(1.0, (last - first) / (40 if line.dotted else 150)),
        }
        for line in lines
    ]
    step = words("step_alone", step=0).replace("0", "#")
    return {"first": first, "last": last, "step": step, "curves": curves}
