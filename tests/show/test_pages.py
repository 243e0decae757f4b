"""Pages parse, hold everything they show, refer to nothing outside, and escape what they are given."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page
from PIL import Image as PILImage

from unigen.sequence.types import Image, Text
from unigen.show.pages import (
    bar_chart,
    contact_sheet,
    image_grid,
    line_chart,
    read_metrics,
    table,
    write_page,
    write_pieces,
)

EVIL = "<script>alert('x')</script> & \"quoted\" 猫\x00"


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def svg(chart: str) -> ET.Element:
    return ET.fromstring(chart[: chart.index("</svg>") + 6])


def polylines(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        for line in svg(chart).iter("polyline")
    ]


def tick_values(chart: str, anchor: str) -> dict[float, float]:
    """Number -> place of the ticks of the y axis ("end", by y) or the x axis ("middle", by x)."""
    texts = [
        t
        for t in svg(chart).iter("text")
        if t.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.e+-]+", t.text)
    ]
    return {float(t.text): float(t.get("y")) - 4 if anchor == "end" else float(t.get("x")) for t in texts}


@pytest.mark.parametrize("log_y", [False, True])
def test_chart_draws_points_where_its_ticks_say(log_y):
    points = [(0, 4.0), (10, 0.5), (35, 0.02)]
    chart = line_chart({"loss": points}, title="T", x_label="step", y_label="nats", log_y=log_y)
    (line,) = polylines(chart)
    xs, ys = tick_values(chart, "middle"), tick_values(chart, "end")
    bend = math.log10 if log_y else float
    (x0, px0), (x1, px1) = min(xs.items()), max(xs.items())
    (y0, py0), (y1, py1) = min(ys.items()), max(ys.items())
    assert x0 <= 0 and x1 >= 35 and y0 <= 0.02 and y1 >= 4
    for (x, y), (px, py) in zip(points, line, strict=True):
        assert px == pytest.approx(px0 + (x - x0) / (x1 - x0) * (px1 - px0), abs=0.11)
        assert py == pytest.approx(py0 + (bend(y) - bend(y0)) / (bend(y1) - bend(y0)) * (py1 - py0), abs=0.11)
    assert [t.text for t in svg(chart).iter("title")] == ["loss: 4 (0)", "loss: 0.5 (10)", "loss: 0.02 (35)"]


def test_chart_names_everything_and_escapes_it():
    names = [EVIL, *(f"series {k}" for k in range(12))]
    chart = line_chart({n: [(0, 1), (1, 2)] for n in names}, title=EVIL, x_label=EVIL, y_label="损失")
    page = Page(chart)
    assert "script" not in page.tags and "svg" in page.tags
    shown = [t.text for t in svg(chart).iter("text")]
    assert shown.count(EVIL.replace("\x00", "␀")) == 3 and "损失" in shown and "series 11" in shown
    strokes = [(line.get("stroke"), line.get("stroke-dasharray")) for line in svg(chart).iter("polyline")]
    assert len(set(strokes)) == len(names), "no two lines look alike"


def test_chart_leaves_out_what_cannot_be_drawn_and_says_so():
    points = [(0, math.nan), (1, 1.0), (2, math.inf), (3, 0.0), (4, 2.0)]
    linear = line_chart({"a": points}, title="t", x_label="x", y_label="y")
    log = line_chart({"a": points}, title="t", x_label="x", y_label="y", log_y=True)
    assert len(polylines(linear)[0]) == 3 and "left out: 2 (not finite)" in linear
    assert len(polylines(log)[0]) == 2 and "left out: 3 (not finite or not positive)" in log
    assert "no data" in line_chart({"a": [(0, math.nan)]}, title="t", x_label="x", y_label="y")
    assert "no data" in line_chart({}, title="t", x_label="x", y_label="y")


def test_long_lines_are_averaged():
    points = [(k, k % 2) for k in range(4000)]
    (line,) = polylines(line_chart({"a": points}, title="t", x_label="x", y_label="y"))
    assert len(line) == 400 and len({y for _, y in line}) == 1, "means of ten points are all one half"


def test_bars_stand_as_high_as_their_values_and_say_them():
    bars = [(f"{2**k:,}", f"{EVIL} {k}", float(v)) for k, v in enumerate([0, 3, 1200, 600, 1])]
    chart = bar_chart(bars, title=EVIL, x_label="长度", y_label="n")
    page, ys = Page(chart), tick_values(chart, "end")
    assert "script" not in page.tags and "长度" in page.text
    shapes = [r for r in svg(chart).iter("rect") if r.get("fill")]
    (y0, low), (y1, high) = min(ys.items()), max(ys.items())
    for (_, _, value), shape in zip(bars, shapes, strict=True):
        assert (
            float(shape.get("height")) == pytest.approx((low - high) * value / (y1 - y0), abs=0.11)
            and y0 == 0
        )
    lefts = [float(shape.get("x")) for shape in shapes]
    assert lefts == sorted(lefts) and float(shapes[0].get("width")) < lefts[1] - lefts[0]
    assert [t.text for t in svg(chart).iter("title")][2] == f"{EVIL} 2: 1,200".replace("\x00", "␀")
    crowded = bar_chart(
        [(f"{10**9 + k:,}", "n", 1.0) for k in range(60)], title="t", x_label="x", y_label="y"
    )
    labels = [t for t in svg(crowded).iter("text") if (t.text or "").startswith("1,000,000")]
    assert 2 <= len(labels) <= 8, "labels do not run into each other"
    for nothing in ([], [("a", "a", 0.0)]):
        assert "no data" in bar_chart(nothing, title="t", x_label="", y_label="")


def test_figures_stand_to_the_right():
    source = table(
        [["a", 1_234_567, "12.3%", "< 0.01%"], ["b", 2, "0.0 %", "4%"]], ["name", "n", "share", "rest"]
    )
    assert (
        source.count('<td class="number">') == 6
        and "1,234,567" in source
        and source.count("<th class=number>") == 3
    )


def test_page_has_its_language_and_style(tmp_path):
    source = write_page(
        tmp_path / "p.html", "t", [("h", "b")], language="zh-CN", style=".x { color: red }"
    ).read_text("utf-8")
    assert '<html lang="zh-CN">' in source and ".x { color: red }</style>" in source


@settings(max_examples=150, deadline=None)
@given(
    points=st.lists(
        st.tuples(st.integers(0, 10**7), st.floats(-1e12, 1e12, allow_subnormal=False)),
        min_size=1,
        max_size=8,
    ),
    log_y=st.booleans(),
)
def test_any_values_give_a_chart_inside_its_frame(points, log_y):
    chart = line_chart({"a": points}, title="t", x_label="x", y_label="y", log_y=log_y)
    Page(chart)
    if "<svg" not in chart:
        assert log_y and all(y <= 0 for _, y in points)
        return
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in svg(chart).iter("circle")]
    assert all(73.9 <= x <= 702.1 and 39.9 <= y <= 320.1 for x, y in dots)
    assert len(tick_values(chart, "end")) <= 14


def test_page_is_self_contained_and_escaped(tmp_path):
    body = table([[EVIL, 0.98765432, 12, True], ["b", 1e-9, -3, False]], [EVIL, "share", "n", "met"])
    body += image_grid(
        [(EVIL, picture(1)), ("large", picture(2, (2000, 500))), ("cmyk", picture(3, mode="CMYK"))], 3
    )
    path = write_page(
        tmp_path / "new" / "report.html",
        EVIL,
        [(EVIL, body), ("", line_chart({}, title=EVIL, x_label="", y_label=""))],
    )
    source = path.read_bytes().decode("utf-8")
    page = Page(source)
    assert "script" not in page.tags and "link" not in page.tags and page.tags.count("section") == 2
    assert page.text.count(EVIL.replace("\x00", "␀")) >= 5
    assert "0.9877" in page.text and "1e-09" in page.text and "\x00" not in source
    assert "://" not in source and "@import" not in source and "url(" not in source
    assert "prefers-color-scheme: dark" in source and 'charset="utf-8"' in source[:200]
    assert [p.size for p in page.pictures] == [(8, 8), (1024, 256), (8, 8)]
    assert (np.asarray(page.pictures[0]) == np.asarray(picture(1))).all()


def test_pieces_are_written_in_order_with_their_prompt(tmp_path):
    source = tmp_path / "input.png"
    picture(5, (20, 10)).save(source)
    data = source.read_bytes()
    prompt = ["what is\nthis?", picture(4), source, Image(data), Text("and this?")]
    pieces = ["一只猫 \ud800", picture(6), Text("<b>done</b>", target=True), Image(picture(7, (300, 200)))]
    index = write_pieces(tmp_path / "out", prompt, pieces, title="猫")
    assert index == tmp_path / "out" / "index.html"
    assert sorted(p.name for p in index.parent.iterdir()) == [
        "01_text.txt",
        "02_image.png",
        "03_text.txt",
        "04_image.png",
        "index.html",
    ]
    assert (index.parent / "01_text.txt").read_text("utf-8") == "一只猫 ?"
    assert (index.parent / "03_text.txt").read_bytes() == b"<b>done</b>"
    for name, seed, size in (("02_image.png", 6, (8, 8)), ("04_image.png", 7, (300, 200))):
        with PILImage.open(index.parent / name) as written:
            assert (np.asarray(written) == np.asarray(picture(seed, size))).all()
    page = Page(index.read_text("utf-8"))
    places = [
        page.text.index(t)
        for t in ("猫", "Prompt", "what is\nthis?", "and this?", "Answer", "一只猫", "<b>done</b>")
    ]
    assert places == sorted(places)
    assert [p.size for p in page.pictures] == [(8, 8), (20, 10), (20, 10), (8, 8), (300, 200)]


def test_pieces_of_an_answer_can_be_the_next_prompt_in_the_same_folder(tmp_path):
    write_pieces(tmp_path, ["draw"], [picture(1)])
    index = write_pieces(tmp_path, [tmp_path / "01_image.png", "invert"], [picture(2)])
    before, after = (np.asarray(p) for p in Page(index.read_text("utf-8")).pictures)
    assert (before == np.asarray(picture(1))).all() and (after == np.asarray(picture(2))).all()


def test_an_empty_answer_is_shown_as_nothing(tmp_path):
    index = write_pieces(tmp_path, [], [])
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
    assert Page(index.read_text("utf-8")).text.count("(nothing)") == 2


def test_more_than_99_pieces_sort_by_name(tmp_path):
    write_pieces(tmp_path, ["count"], [str(k) for k in range(120)])
    files = sorted(tmp_path.glob("*.txt"))
    assert [p.read_text("utf-8") for p in files] == [str(k) for k in range(120)]


def test_contact_sheet_places_each_picture_in_its_cell():
    pictures = [picture(k) for k in range(5)]
    sheet = np.asarray(contact_sheet(pictures, columns=3, cell=16, gap=2).convert("RGB"))
    assert sheet.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    for n, one in enumerate(pictures):
        top, left = 2 + n // 3 * 18, 2 + n % 3 * 18
        assert (sheet[top : top + 16, left : left + 16] == np.asarray(one).repeat(2, 0).repeat(2, 1)).all()
    assert (sheet[20:36, 38:54] == 255).all() and (sheet[:2] == 255).all()


def test_metrics_become_curves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 2.5, "time": "now", "val": {"loss": 3.0, "text": None}, "skipped": False},
        {"step": 3, "loss": 1.0},
        {"step": 2, "loss": 2, "val": {"loss": 2.5}},
        {"step": 3, "loss": 0.5},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n" + '{"step": 4, "lo', encoding="utf-8")
    assert read_metrics(path) == {"loss": [(1, 2.5), (2, 2.0), (3, 0.5)], "val/loss": [(1, 3.0), (2, 2.5)]}
    path.write_bytes(path.read_bytes() + "猫".encode()[:2])
    assert len(read_metrics(path)["loss"]) == 3
    path.write_text('{"step": 5, "loss": NaN}', encoding="utf-8")
    assert math.isnan(read_metrics(path)["loss"][0][1]), "a loss that is not a number is not hidden"


@pytest.mark.parametrize("line", ['{"step": 1, "lo', '{"loss": 1}', "[1]", '{"step": null, "loss": 1}'])
def test_a_broken_line_inside_names_file_and_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n' + line + '\n{"step": 2, "loss": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*Fix"):
        read_metrics(path)
