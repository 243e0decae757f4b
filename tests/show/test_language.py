"""The texts: both languages hold the same, each is used, and every one that is asked for is there."""

from __future__ import annotations

import math
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

from unigen.figures import figure, gb
from unigen.show.language import LANGUAGES, Words, of_code, texts

ROOT = Path(__file__).parents[2]
ROOMS = ("check", "watch", "preview", "evaluate", "plan", "generate")
SHARED = [*(ROOT / "unigen" / "show").glob("*.py")]


def fields(text: str) -> list[str]:
    return sorted(f"{name}:{spec}" for _, name, spec, _ in string.Formatter().parse(text) if name is not None)


def sources(room: str) -> str:
    """Everything that may ask for a text of the room."""
    paths = [*SHARED, *(ROOT / "unigen" / "commands" / room).glob("*.py")]
    paths += (ROOT / "unigen" / "assets" / "templates").glob("*.html")
    return "\n".join(path.read_text("utf-8") for path in paths)


def unused(keys: set[str], source: str) -> list[str]:
    """The keys that stand nowhere as a string, nor begin as one that is put together."""
    whole = set(re.findall(r"[\"'](\w+)[\"']", source))
    begun = tuple(set(re.findall(r"[\"'](\w+_)(?:\{|[\"'] [~+])", source)))
    return sorted(key for key in keys if key not in whole and not key.startswith(begun))


def test_the_languages_hold_the_same_texts_with_the_same_fields():
    first, *others = (texts(language) for language in LANGUAGES)
    assert {"common", *ROOMS, "codes"} == set(first) and others
    for other in others:
        assert list(other) == list(first)
        for section in first:
            assert list(other[section]) == list(first[section]), section
            for key, text in first[section].items():
                assert text and other[section][key] and fields(text) == fields(other[section][key]), key


def test_every_text_is_used():
    everywhere = "\n".join(map(sources, ROOMS))
    assert unused(set(texts("en")["common"]), everywhere) == []
    for room in ROOMS:
        assert unused(set(texts("en")[room]), sources(room)) == [], room
    assert unused({"nobody", "advice_x"}, 'words(f"advice_{code}")') == ["nobody"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_text_that_is_asked_for_is_there(room):
    own = "\n".join(p.read_text("utf-8") for p in (ROOT / "unigen" / "commands" / room).glob("*.py"))
    template = ROOT / "unigen" / "assets" / "templates" / f"{room}.html"
    own += template.read_text("utf-8") if template.exists() else ""
    asked = set(re.findall(r"\b(?:words|say)\(\s*[\"'](\w+)[\"']", own))
    assert len(asked) > 12 and sorted(asked - set(Words("en", room).texts)) == []


def test_every_code_of_a_problem_has_a_text():
    found = "".join(
        path.read_text("utf-8")
        for folder in ("data", "sequence")
        for path in (ROOT / "unigen" / folder).glob("*.py")
    )
    raised = set(re.findall(r"(?:BadRecord|PictureError)\(\s*\"(\w+)\"", found))
    assert len(raised) > 25 and sorted(raised - set(texts("en")["codes"])) == []
    assert of_code("bad_json", "en") == "not valid JSON" and of_code("no_such_code", "zh") == ""


def test_every_advice_has_a_text():
    source = (ROOT / "unigen" / "commands" / "check" / "advice.py").read_text("utf-8")
    given = set(re.findall(r"Advice\(\s*\"(\w+)\"", source))
    assert given and sorted(code for code in given if f"advice_{code}" not in texts("en")["check"]) == []


def test_values_are_shown_as_people_read_them():
    words = Words("en", "watch")
    assert (
        words("disk_full", free=88e9, need=1500, stay=1e9) == "The disk has 88 GB left; the next checkpoint"
        " takes about 1.5 kB, and 1 GB are to stay free (min_free_gb)."
    )
    assert words("behind", rank=1, step=1234, ahead=2345) == "Rank 1 is at step 1,234, others at 2,345."
    assert words("reason", why="a\x1b[2J\u202eb\n") == r"reason: a\x1b[2J\u202eb" + " "
    assert words("no_heartbeat", ago=130, rank=0, step=1, phase="").endswith("phase –")
    assert words("minutes", n=3) == "3 min", "a common text"


def test_numbers_are_short_and_right():
    cases = (0, 1.23456, 12345.6, 2e-5, 1.5e-5, 1.25e9, None, math.nan, -0.5)
    assert [figure(v) for v in cases] == [
        "0",
        "1.235",
        "12,346",
        "2e-05",
        "1.5e-05",
        "1.25e+09",
        "–",
        "–",
        "-0.5",
    ]
    assert [gb(n) for n in (0, 999, 1500, 88e9, 1.25e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "88 GB",
        "1.25 TB",
    ]
    english = Words("en", "watch")
    seconds = (0, 119, 121, 3599, 3600, 86_400 * 2, 86_400 * 3 + 3700, -1, math.nan, 1e300)
    assert [english.duration(s) for s in seconds] == [
        "0 s", "119 s", "2 min", "1 h 0 min", "1 h 0 min", "2 d 0 h", "3 d 1 h", "?", "?", "?",
    ]  # fmt: skip


def test_the_texts_need_no_pytorch():
    code = "import sys; from unigen.show.language import Words; Words('zh', 'watch')('new'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_metrics_and_phases_have_names_for_readers():
    """The keys stay in files; a plugin's metric and a phase of another version keep theirs."""
    from unigen.evaluation.score import METRICS

    for language in LANGUAGES:
        words = Words(language, "watch")
        assert [key for key in METRICS.own if f"metric_{key}" not in words.texts] == []
    english, chinese = Words("en", "watch"), Words("zh", "watch")
    assert english.metric("psnr_to_source") == "PSNR to the source" and english.metric("mine") == "mine"
    assert chinese.metric("accuracy") == "准确率" and chinese.metric("mine_to_source") == "mine（与原图比）"
    assert english.phase("forward/backward") == "forward/backward" and english.phase("") == "–"
    for phase in ("loading", "warm-up batch", "data", "forward/backward", "validating", "sampling", "saving"):
        assert not re.search("[a-z]", chinese.phase(phase)), phase
