"""Charts stand where their ticks say, leave out what cannot be drawn, and tell the values under the pointer."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page, part

from unigen.runs.metrics import Point
from unigen.show.charts import COLOURS, SIDE, Chart, Line, bar_chart, line_chart
from unigen.show.curves import MAX_POINTS, log_ticks, round_ticks, smooth, thin, value_range
from unigen.show.language import Words

EVIL = "<script>alert('x')</script> & \"quoted\" 猫\x00"
WORDS = Words("en", "common")
STYLES = Path(__file__).parents[2] / "unigen" / "assets" / "styles"


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(x, y, y, y) for x, y in pairs]


def places(chart: Chart, kind: str) -> list[list[tuple[float, float]]]:
    """The points of each shape of a kind."""
    found = [re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", s.d) for s in chart.shapes if s.kind == kind]
    return [[(float(x), float(y)) for x, y in one] for one in found]


@pytest.mark.parametrize("log", [False, True])
def test_lines_pass_where_the_ticks_say(log):
    given = [(0, 4.0), (10, 0.5), (35, 0.02)]
    chart = line_chart("T", [Line("loss", points(*given))], WORDS, log=log)
    (line,) = places(chart, "line")
    bend = math.log10 if log else float
    ys = {bend(float(tick.text)): tick.place * SIDE for tick in chart.ys}
    (v0, y0), (v1, y1) = min(ys.items()), max(ys.items())
    for (x, value), (px, py) in zip(given, line, strict=True):
        assert px == pytest.approx(x / 35 * SIDE, abs=0.06)
        # a tick's text has four digits
        assert py == pytest.approx(y0 + (bend(value) - v0) / (v1 - v0) * (y1 - y0), abs=0.2)
    assert [tick.place for tick in chart.xs] == [float(tick.text) / 35 for tick in chart.xs] and len(
        chart.xs
    ) > 2
    assert chart.end == "step 35" and ("logarithmic" in chart.notes) == log


def test_the_pointer_tells_every_value_of_a_short_line():
    lines = [Line("a", points((1, 2.5), (4, 0.25)), 0), Line("b", points((4, 12345.6)), 1, dotted=True)]
    data = json.loads(line_chart("T", lines, WORDS, unit=" %").data)
    assert (data["first"], data["last"], data["step"]) == (1, 4, "step #")
    assert [(c["n"], c["x"], c["t"]) for c in data["curves"]] == [
        ("a", [1, 4], ["2.5 %", "0.25 %"]),
        ("b", [4], ["12,346 %"]),
    ]
    assert data["curves"][0]["c"] != data["curves"][1]["c"]


def test_what_cannot_be_drawn_is_left_out_and_counted():
    line = Line("a", points((0, math.nan), (1, 1.0), (2, math.inf), (3, 0.0), (4, 2.0)))
    linear, log = line_chart("t", [line], WORDS), line_chart("t", [line], WORDS, log=True)
    assert len(places(linear, "line")[0]) == 3 and WORDS("left_out", n=2) in linear.notes
    assert len(places(log, "line")[0]) == 2 and WORDS("left_out", n=3) in log.notes
    for nothing in ([], [Line("a", points((0, math.nan)))]):
        chart = line_chart("t", nothing, WORDS)
        assert not chart.shapes and WORDS("no_data") in chart.notes
        assert "svg" not in Page(part("chart", chart)).tags


def test_legend_and_texts_are_all_there_and_escaped():
    lines = [Line(f"{EVIL} {n}", points((0, n), (9, 2)), n) for n in range(3)]
    page = Page(part("chart", line_chart(EVIL, lines, WORDS, notes=[EVIL], marks=[5], marks_name=EVIL)))
    assert "script" not in page.tags and page.tags.count("svg") == 1
    assert page.text.count("<script>alert('x')</script> & \"quoted\" 猫␀") == 1 + 1 + 3 + 1
    assert page.charts[0]["curves"][2]["n"] == f"{EVIL} 2"
    assert len(page.of("span", "key")) == 4 and len(page.of("path", "skips")) == 1


def test_one_line_has_no_legend_and_a_band_where_its_values_spread():
    spread = [Point(n, n, n - 0.5, n + 1.0) for n in range(5)]
    chart = line_chart("t", [Line("a", spread, band=True)], WORDS)
    assert chart.keys == [] and [s.kind for s in chart.shapes if s.kind != "grid-line"] == ["band", "line"]
    single = line_chart("t", [Line("a", points((3, 1.0)))], WORDS)
    assert [s.kind for s in single.shapes if s.kind != "grid-line"] == ["dots"]


def test_bars_stand_as_high_as_their_values_and_say_them():
    bars = [(f"{2**k:,}", f"{EVIL} {k}", float(v)) for k, v in enumerate([0, 3, 1200, 600, 1])]
    chart = bar_chart(EVIL, bars, WORDS, x_label="长度", y_label="n")
    page = Page(part("chart", chart))
    assert "script" not in page.tags and "长度" in page.text
    corners = places(chart, "bar")
    assert all(low == right_low == SIDE for (_, low), _, _, (_, right_low) in corners)
    drawn = [(left, SIDE - top, right - left) for (left, _), (_, top), (right, _), _ in corners]
    ticks = [(float(t.text.replace(",", "")), (1 - t.place) * SIDE) for t in chart.ys]
    assert ticks[0] == (0, 0)
    for (*_, value), (_, height, _) in zip(bars, drawn, strict=True):
        assert height == pytest.approx(value * ticks[-1][1] / ticks[-1][0], abs=0.06)
    assert all(x + width < next_x for (x, _, width), (next_x, *_) in itertools.pairwise(drawn))
    assert [s.tip for s in chart.shapes if s.kind == "hit"][2] == f"{EVIL} 2: 1,200"
    assert page.tags.count("title") == 5 and page.charts == [], "told without a script"
    crowded = bar_chart("t", [(f"{10**9 + k:,}", "n", 1.0) for k in range(60)], WORDS, x_label="", y_label="")
    assert 2 <= len(crowded.xs) <= 4, "labels do not run into each other"
    for nothing in ([], [("a", "a", 0.0)]):
        assert not bar_chart("t", nothing, WORDS, x_label="", y_label="").shapes


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 10**7), st.floats(-1e12, 1e12, allow_subnormal=False)),
        min_size=1,
        max_size=8,
        unique_by=lambda pair: pair[0],
    ),
    log=st.booleans(),
)
def test_any_values_give_a_chart_inside_its_frame(pairs, log):
    chart = line_chart("t", [Line("a", points(*sorted(pairs)))], WORDS, log=log)
    Page(part("chart", chart))
    if not chart.shapes:
        assert log and all(y <= 0 for _, y in pairs)
        return
    drawn = [p for kind in ("line", "dots") for one in places(chart, kind) for p in one]
    assert drawn and all(0 <= x <= SIDE and 0 <= y <= SIDE for x, y in drawn)
    assert 2 <= len(chart.ys) <= 7 and all(-0.01 <= tick.place <= 1.01 for tick in [*chart.ys, *chart.xs])


def test_every_colour_of_a_chart_has_its_style():
    style = (STYLES / "page.css").read_text("utf-8")
    assert sorted(set(re.findall(r"--c(\d+):", style))) == [str(n) for n in range(COLOURS)]


# ---- curves


def test_long_lines_are_averaged_and_thinning_keeps_extremes():
    chart = line_chart("t", [Line("a", points(*((k, k % 2) for k in range(4000))))], WORDS)
    (line,) = places(chart, "line")
    assert len(line) <= MAX_POINTS and len({y for _, y in line}) == 1, "means of equally many zeros and ones"
    (one,) = thin(points((0, 4.0), (1, 2.0), (2, 6.0)), 1)
    assert (one.step, one.mean, one.low, one.high) == (1, 4, 2, 6)


def test_smoothing_is_a_corrected_moving_average():
    line = points((0, 4.0), (1, 2.0), (2, 6.0))
    assert [p.mean for p in smooth(line, 0.5)] == pytest.approx(
        [4.0, (1 + 1) / 0.75, (0.5 + 0.5 + 3) / 0.875]
    )
    assert smooth(line, 0.0) == line


def test_ranges_keep_outliers_from_pressing_the_rest_flat():
    def of(values, **options):
        return value_range([points(*enumerate(values))], **options)

    early = of([100.0, 90.0] + [1.0 + n / 100 for n in range(100)])
    assert early.cut and 1.9 < early.high < 3.5
    assert not of([2.0 - n / 100 for n in range(100)]).cut
    spiky = of([1.0] * 50 + [80.0] + [1.0] * 50, log=None)
    assert spiky.log and spiky.high == 80.0 and not of([1.0, 2.0, 0.0], log=None).log
    assert of([2.0, 3.0], from_zero=True).low == 0.0
    for flat in ([0.0], [5.0] * 9, [-3.0]):
        assert of(flat).low < flat[0] < of(flat).high
    assert of([5.0], log=True).low < 5.0 < of([5.0], log=True).high


@given(st.floats(1e-9, 1e9), st.floats(1.0, 1e6))
def test_ticks_enclose_the_range(low, factor):
    for ticks in (round_ticks(low, low * factor), log_ticks(low, low * factor)):
        slack = 1e-6 * (ticks[-1] - ticks[0])
        assert ticks == sorted(ticks) and ticks[0] <= low + slack and ticks[-1] >= low * factor - slack
        assert 2 <= len(ticks) <= 14
