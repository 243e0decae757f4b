"""Charts as PNG: the numbers stand where the axes say, and every letter has a font."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as PILImage

from unigen.runs.metrics import Point
from unigen.show.charts import Line, bar_chart, line_chart
from unigen.show.language import Words
from unigen.show.raster import HEIGHT, UNIT, WIDTH, colour, font_of, has_fonts, png

WORDS = Words("en", "watch")


def points(values: list[float]) -> list[Point]:
    return [Point(step, value, value, value) for step, value in enumerate(values)]


def pixels(chart) -> np.ndarray:
    """[height, width, 3] of a chart's PNG."""
    picture = PILImage.open(io.BytesIO(png(chart)))
    assert picture.format == "PNG" and picture.size == (WIDTH * UNIT, HEIGHT * UNIT)
    return np.asarray(picture.convert("RGB")).astype(int)


def inked(seen: np.ndarray, name: str, top: int = 80) -> np.ndarray:
    """[n, 2] rows and columns in that colour, below the legend."""
    ink = np.array([int(colour(name)[k : k + 2], 16) for k in (1, 3, 5)])
    found = np.argwhere(np.abs(seen - ink).max(axis=2) < 12)
    return found[found[:, 0] > top]


def test_lines_stand_where_their_values_are():
    lines = [
        Line("a", points([1.0] * 9), 0),
        Line("b", points([3.0] * 9), 1),
        Line("c", points([2.0] * 9), 2, True),
    ]
    seen = pixels(line_chart("loss", lines, WORDS))
    rows = {name: inked(seen, name)[:, 0] for name in ("--c0", "--c1", "--c2")}
    low, high, middle = (float(np.median(rows[name])) for name in rows)
    assert high < middle < low and middle == pytest.approx((low + high) / 2, abs=2)
    solid, dotted = (len(np.unique(inked(seen, name)[:, 1])) for name in ("--c0", "--c2"))
    assert dotted < 0.8 * solid, "the dashes have gaps"


def test_bars_and_bands_are_filled():
    seen = pixels(bar_chart("n", [("1", "1", 1.0), ("2", "2", 2.0)], WORDS, x_label="k", y_label="n"))
    rows, columns = inked(seen, "--c0").T
    middle = (columns.min() + columns.max()) / 2
    first, second = (rows[columns < middle], rows[columns > middle])
    assert len(second) == pytest.approx(2 * len(first), rel=0.05) and first.max() == second.max()
    band = [Point(step, 2.0, 1.0 + step / 9, 3.0) for step in range(9)]
    seen = pixels(line_chart("loss", [Line("a", band, 0, False, True)], WORDS))
    tinted = np.abs(seen[200:, 200:] - seen[200, 5]).sum(axis=2) > 20
    assert 0.2 < tinted.mean() < 0.95


def test_a_chart_without_points_says_so_and_letters_that_no_font_has_are_told():
    assert (pixels(line_chart("loss", [], WORDS)) < 200).any()
    assert font_of("loss 0.5") == "" and has_fonts([line_chart("loss", [], WORDS)])
    chart = line_chart("损失", [Line("猫", points([1.0, 2.0]), 0)], Words("zh", "watch"))
    assert has_fonts([chart]) == bool(font_of("损失猫"))
    assert not has_fonts([line_chart("\U0010fffd", [], WORDS)])


def test_many_long_names_wrap_and_stay_inside():
    lines = [Line(f"run {n} " + "long " * n * n, points([1.0, 2.0 + n]), n) for n in range(8)]
    seen = pixels(line_chart("loss", lines, WORDS))
    assert (seen[:, -10:] == seen[0, 0]).all() and (seen[:, :10] == seen[0, 0]).all()
