"""The page and the report: every number and problem is in them, in both languages, and nothing can break out
of the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from browser import FAULTS, framed, in_browser
from checking import check
from pages import Page

from unigen.commands.check import page as check_page
from unigen.commands.check.advice import advise
from unigen.commands.check.command import CheckOptions, run
from unigen.commands.check.findings import Findings, Problems
from unigen.commands.check.report import percent, sections
from unigen.config import DataOptions
from unigen.data.mapping import ReadOptions
from unigen.messages import in_language
from unigen.model.weights import load_planner
from unigen.show.language import Words, of_code

ROOT = Path(__file__).parents[3]
EVIL = "<script>alert(1)</script>"


def talk(question: str, answer: str) -> dict:
    return {
        "conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    }


def look(folder: Path, *values: dict | str, **options) -> Findings:
    path = folder / "a.jsonl"
    path.write_text(
        "".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), encoding="utf-8"
    )
    return check(
        [path, ROOT / "examples" / "sample_data_format.json"],
        load_planner(None, DataOptions()),
        num_workers=0,
        **options,
    )


def advice_of(found: Findings, **changes) -> dict[str, str]:
    summary = {**found.summary(), **changes}
    return {a.code: a.level for a in advise(summary, len(found.problems), found.deep)}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_shows_everything_and_is_safe(tmp_path, language):
    same = [talk(EVIL, EVIL)] * 3
    found = look(tmp_path, *same, {EVIL: 1}, "{", {"image_path": f"{EVIL}.png", "caption": "c"}, deep=True)
    words, summary = Words(language, "check"), found.summary()
    advice = advise(summary, len(found.problems), found.deep)
    page = check_page.write(tmp_path / "new" / "check.html", found, summary, advice, words)
    source = page.read_text("utf-8")
    parsed = Page(source)
    assert "script" not in parsed.tags and parsed.tags.count("svg") == 3 and f'lang="{language}' in source
    assert "Content-Security-Policy" in source and "://" not in source
    for code in ("no_format", "bad_json", "missing_picture"):
        assert code in parsed.text and of_code(code, language) in parsed.text
    for line in (4, 5, 6):
        assert f"tests/a.jsonl:{line}" in parsed.text or f"a.jsonl:{line}" in parsed.text
    for heading, _ in sections(summary, words):
        assert heading in parsed.text
    for a in advice:
        assert words.texts[f"advice_{a.code}"].split("{")[0] in parsed.text
    assert (
        f"{summary['targets']['image_tokens']:,}" in parsed.text
        and f"{summary['lengths']['max']:,}" in parsed.text
    )


def test_an_interrupted_check_says_so_first(tmp_path):
    found = replace(look(tmp_path, talk("q", "a")), interrupted=True)
    words = Words("en", "check")
    text = Page(
        check_page.write(tmp_path / "x.html", found, found.summary(), [], words).read_text("utf-8")
    ).text
    assert words("interrupted", n=8) in text and text.index("Interrupted") < text.index("What is in it")


def test_more_problems_than_the_page_shows_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Problems, "KEPT", 5)
    found = look(tmp_path, *["{"] * 30)
    source = check_page.write(
        tmp_path / "x.html", found, found.summary(), [], Words("en", "check")
    ).read_text("utf-8")
    assert source.count("a.jsonl:") == 5 and "and 25 more; --problems problems.jsonl lists all" in source


def test_captions_alone_teach_no_drawing_until_they_are_named_the_prompt(tmp_path):
    picture = str(ROOT / "examples" / "pictures" / "house_day.png")
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"image_path": picture, "caption": "a cat"}) + "\n", encoding="utf-8")

    def told(**read) -> set[str]:
        return set(advice_of(check(path, load_planner(None, DataOptions()), num_workers=0, **read)))

    assert "captions_describe" in told()
    assert not told(read=ReadOptions(fields={"text_prompt": "caption"})) & {"captions_describe", "only_text"}
    assert "captions_describe" not in advice_of(look(tmp_path, talk("q", "a"))), "others draw from a text"


def test_each_advice_is_given_when_its_rule_says(tmp_path):
    """Starting from sound data, one change at a time."""
    answers = [talk(f"question number {i}", f"this is answer number {i}") for i in range(30)]
    found = look(tmp_path, *answers)
    s = found.summary()
    base = advice_of(found)
    assert (
        "duplicates" not in base
        and "problems" not in base
        and base["estimate"] == "note"
        and base["not_deep"] == "note"
    )
    assert base["upscaled"] == "warn", "the example's pictures have 128 pixels"
    exact = {"lengths": {**s["lengths"], "unit": "tokens"}}
    assert "estimate" not in advice_of(found, **exact)
    t = s["targets"]
    assert advice_of(found, targets={**t, "records_with_image": 0})["only_text"] == "note"
    assert advice_of(found, targets={**t, "records_with_text": 0})["only_image"] == "note"
    assert advice_of(found, targets={**t, "records_with_text": 1})["few_text_records"] == "warn"
    assert advice_of(found, targets={**t, "records_with_image": 1})["few_image_records"] == "warn"
    assert advice_of(found, targets={**t, "text_tokens": 3})["few_text_tokens"] == "warn"
    assert advice_of(found, targets={**t, "image_tokens": 1})["few_image_tokens"] == "warn"
    assert advice_of(found, near_empty={"records": 1, "first": []})["near_empty"] == "warn"
    limits = [
        {
            "max_sequence_length": s["max_length"],
            "cut": 5,
            "tokens_lost": 9,
            "share_lost": 0.001,
            "refused": 0,
        }
    ]
    assert advice_of(found, limits=limits)["cut"] == "warn"
    fills = ((8, 0.99, 3), (16, 0.98, 0), (32, 0.99, 0))
    rows = [
        {"max_num_tokens": n, "fill": fill, "single": 0.1, "rows": 20, "longer": longer}
        for n, fill, longer in fills
    ]
    assert next(a for a in advise({**s, "rows": rows}, 0, False) if a.code == "rows").values["budget"] == 16
    same = look(tmp_path, *answers, *[talk("why?", "no")] * 20)
    assert {"duplicates": "warn", "same_text": "warn"}.items() <= advice_of(same).items()
    assert advice_of(look(tmp_path, *answers * 9, "{"))["few_problems"] == "warn"
    assert advice_of(look(tmp_path, "{"))["problems"] == "warn"


def test_a_share_tells_nothing_from_next_to_nothing():
    assert [percent(x) for x in (0, 0.00001, 0.0005, 0.0123, 1)] == [
        "0.0%",
        "< 0.01%",
        "0.05%",
        "1.2%",
        "100.0%",
    ]


def test_an_output_that_cannot_show_chinese_is_no_error(tmp_path, capfdbinary, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(talk("q", "a")) + "\n")
    with open(tmp_path / "out.txt", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run(CheckOptions(paths=[str(tmp_path)], language="zh")) == 0
    assert "\\u" in (tmp_path / "out.txt").read_text("ascii")


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_on_a_phone_nothing_leaves_the_page_and_no_word_is_split(tmp_path, language):
    """All folds open; only a path longer than its column goes on below."""
    long = "pictures/" + "a_name_without_any_space_" * 6 + ".png"
    found = look(tmp_path, talk("q", "a"), "{", {"a": 1}, {"image_path": long, "caption": "c"})
    words, summary = Words(language, "check"), found.summary()
    advice = advise(summary, len(found.problems), found.deep)
    page = check_page.write(tmp_path / "check.html", found, summary, advice, words)
    faults = json.loads(framed(page.read_text("utf-8"), FAULTS, tmp_path))
    assert faults["cells"] > 100 and faults["wide"] == []
    told = [
        p[name]
        for first in found.problems.first.values()
        for p in first
        for name in ("found", "expected", "cure")
    ]
    prose = " ".join(in_language(text, language) for text in told) if language == "zh" else ""
    assert [word for word in faults["split"] if len(word) < 30 and word not in prose] == []
    source = page.read_text("utf-8").replace("break-word", "anywhere").replace("keep-all", "normal")
    assert len(json.loads(framed(source, FAULTS, tmp_path))["split"]) > 5, "and the test would see it"
