"""Pages parse, hold everything they show, refer to nothing outside, and escape what they are given."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

import numpy as np
import pytest
from jinja2 import ChoiceLoader, DictLoader, UndefinedError
from pages import Page, part
from PIL import Image as PILImage

from unigen.sequence.types import Image, Text
from unigen.show.pages import contact_sheet, embed, environment, unbroken, write_answer, write_page

EVIL = "<script>alert('x')</script> & \"quoted\" 猫\x00\x1b[2J\u202e\x9b \ud800"
SHOWN = "<script>alert('x')</script> & \"quoted\" 猫␀␛[2J\ufffd\ufffd ?"
TEMPLATES = Path(__file__).parents[2] / "unigen" / "assets" / "templates"


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


BODY = '{% extends "page.html" %}{% block body %}<section>{{ body }}</section>{% endblock %}'


@pytest.fixture(autouse=True)
def a_template_for_the_tests(monkeypatch):
    loader = ChoiceLoader([DictLoader({"body.html": BODY}), environment().loader])
    monkeypatch.setattr(environment(), "loader", loader)


def page(path: Path, body: str, title: str = "t", **options) -> str:
    """The source of a page with one section."""
    return write_page(path, "body.html", {"body": body}, title=title, **options).read_bytes().decode("utf-8")


def test_figures_stand_to_the_right():
    rows = [["a", 1_234_567, "12.3%", "< 0.01%", 0.98765432], ["b", 2, "0.0%", "4%", 1e-9]]
    source = part("table", ["name", "n", "share", "rest", "value"], rows)
    assert source.count('<td class="number">') == 8 and source.count('<th class="number">') == 4
    text = Page(source).text
    assert "1,234,567" in text and "0.9877" in text and "1e-09" in text
    assert '<td class="number">' not in part("table", ["met"], [[True], ["step 4"]])


def test_a_page_is_self_contained_and_escaped(tmp_path):
    body = part("table", [EVIL, "n"], [[EVIL, 12], ["b", -3]])
    pictures = (picture(1), picture(2, (2000, 500)), picture(3, mode="CMYK"))
    body += part("grid", [(EVIL, embed(p)) for p in pictures], 3)
    body += part("notices", [("warn", EVIL)]) + part("tiles", [(EVIL, EVIL, EVIL)])
    source = page(tmp_path / "new" / "report.html", body, EVIL, language="zh-CN", styles=["charts"])
    parsed = Page(source)
    assert "script" not in parsed.tags and "link" not in parsed.tags and parsed.tags.count("section") == 1
    assert parsed.text.count(SHOWN) >= 10 and not set("\x00\x1b\u202e\x9b") & set(source)
    assert "://" not in source and "@import" not in source and "url(" not in source
    assert (
        "prefers-color-scheme: dark" in source
        and ".area path" in source
        and 'charset="utf-8"' in source[:200]
    )
    assert '<html lang="zh-CN">' in source and "default-src &#39;none&#39;" in source
    assert [p.size for p in parsed.pictures] == [(8, 8), (1024, 256), (8, 8)]
    assert (np.asarray(parsed.pictures[0]) == np.asarray(picture(1))).all()


def test_a_page_runs_its_own_script_and_no_other(tmp_path):
    source = page(tmp_path / "p.html", "", script="charts")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', source)
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.unescape(policy).endswith(f"script-src 'sha256-{digest}'") and "addEventListener" in script


@pytest.mark.parametrize("name", sorted(p.name for p in TEMPLATES.glob("*.html")))
def test_templates_leave_nothing_unescaped(name):
    """``safe`` stands only where our own styles and script come in."""
    allowed = {"page.html": ["style", "script"]}
    source = (TEMPLATES / name).read_text("utf-8")
    assert re.findall(r"(\w+)\s*\|\s*safe", source) == allowed.get(name, [])
    assert "autoescape" not in source and not re.search(r"\son\w+=", source)


def test_every_asset_is_part_of_the_package():
    assets = TEMPLATES.parent
    depths = {len(path.relative_to(assets).parts) for path in assets.rglob("*") if path.is_file()}
    assert depths == {2} and '"assets/*/*"' in (assets.parents[1] / "pyproject.toml").read_text("utf-8")


def test_a_text_that_a_template_lacks_is_an_error(tmp_path):
    with pytest.raises(UndefinedError, match="body"):
        write_page(tmp_path / "p.html", "body.html", {}, title="t")


def test_segments_are_written_in_order_with_their_prompt(tmp_path):
    source = tmp_path / "input.png"
    picture(5, (20, 10)).save(source)
    data = source.read_bytes()
    prompt = ["what is\nthis?", picture(4), source, Image(data), Text("and this?")]
    pieces = ["一只猫 \ud800", picture(6), Text("<b>done</b>", target=True), Image(picture(7, (300, 200)))]
    index = write_answer(tmp_path / "out", prompt, pieces, title="猫")
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
    parsed = Page(index.read_text("utf-8"))
    places = [
        parsed.text.index(t)
        for t in ("猫", "Prompt", "what is\nthis?", "and this?", "Answer", "一只猫", "<b>done</b>")
    ]
    assert places == sorted(places)
    assert [p.size for p in parsed.pictures] == [(8, 8), (20, 10), (20, 10), (8, 8), (300, 200)]


def test_segments_of_an_answer_can_be_the_next_prompt_in_the_same_folder(tmp_path):
    write_answer(tmp_path, ["draw"], [picture(1)])
    index = write_answer(tmp_path, [tmp_path / "01_image.png", "invert"], [picture(2)])
    before, after = (np.asarray(p) for p in Page(index.read_text("utf-8")).pictures)
    assert (before == np.asarray(picture(1))).all() and (after == np.asarray(picture(2))).all()


def test_an_empty_answer_is_shown_as_nothing(tmp_path):
    index = write_answer(tmp_path, [], [])
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
    assert Page(index.read_text("utf-8")).text.count("(nothing)") == 2


def test_more_than_99_segments_sort_by_name(tmp_path):
    write_answer(tmp_path, ["count"], [str(k) for k in range(120)])
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


def test_options_and_figures_do_not_break_and_markup_stays_text():
    shown = str(unbroken("<b> use --max_bad_share, p = 0.05, 9.8 [9.4, 1.03e+01] of a--b"))
    assert [part.partition("</span>")[0] for part in shown.split('<span class="whole">')[1:]] == [
        "--max_bad_share", "p = 0.05", "[9.4, 1.03e+01]",
    ]  # fmt: skip
    assert shown.startswith("&lt;b&gt;")


def unused_classes(style: str, source: str) -> list[str]:
    """The classes of a style that stand nowhere as a word, nor begin as one that a template puts together."""
    begun = tuple(re.findall(r"([\w-]+-)\{\{", source))
    named = set(re.findall(r"\.([a-zA-Z][\w-]*)", re.sub(r"\{[^{}]*\}", "", style)))
    words = set(re.findall(r"[\w-]+", source))
    return sorted(name for name in named if name not in words and not name.startswith(begun))


def test_every_class_of_the_styles_is_used():
    assets, package = TEMPLATES.parent, TEMPLATES.parents[1]
    markup = [path for part in ("templates", "scripts") for path in (assets / part).iterdir()]
    code = "\n".join(path.read_text("utf-8") for path in package.rglob("*.py"))
    source = "\n".join([*(path.read_text("utf-8") for path in markup), *re.findall(r"\"[\w -]+\"", code)])
    styles = sorted((assets / "styles").glob("*.css"))
    assert len(styles) > 5
    assert {path.name: unused_classes(path.read_text("utf-8"), source) for path in styles} == {
        path.name: [] for path in styles
    }
    assert unused_classes(".k-x .a, .b-1 { margin: .5em }", '<p class="a k-{{ kind }}">') == ["b-1"]
