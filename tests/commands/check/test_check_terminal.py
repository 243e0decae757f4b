"""The report in the terminal: every fact is there, whole, and nothing in the data steers the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checking import check

from unigen.cli import main
from unigen.commands.check.advice import advise
from unigen.commands.check.findings import Findings, Problems
from unigen.commands.check.report import advice_line, sections
from unigen.commands.check.terminal import report
from unigen.config import DataOptions
from unigen.data.containers import BadData
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.messages import in_language
from unigen.model.weights import load_planner
from unigen.printing import width_of
from unigen.show.language import Words, of_code
from unigen.show.terminal import drawn

ROOT = Path(__file__).parents[3]
EVIL = "\x1b[2J\u202e[bold]猫[/bold]\x9b"


def look(folder: Path, *lines: str) -> Findings:
    path = folder / "a.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    example = ROOT / "examples" / "sample_data_format.json"
    return check([path, example], load_planner(None, DataOptions()), num_workers=0)


def shown(found: Findings, language: str = "en", width: int = 100, colour: bool = False, **options) -> str:
    words, summary = Words(language, "check"), found.summary()
    advice = advise(summary, len(found.problems), found.deep)
    parts = report(found, summary, advice, words, options.get("output"))
    return "\n".join(part if isinstance(part, str) else drawn(part, width, colour) for part in parts)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [60, 200])
def test_the_report_says_everything(tmp_path, language, width):
    found = look(tmp_path, *["{"] * 5, json.dumps({EVIL: 1}))
    words, summary = Words(language, "check"), found.summary()
    text = shown(found, language, width, output="check.html")
    whole = re.sub(r"\s+", "", text)
    for code, n in found.problems.counts.items():
        assert f"{code}({n:,}){of_code(code, language)}".replace(" ", "") in whole
    for line in (1, 2, 3, 6):
        assert f"a.jsonl:{line}" in whole
    assert "a.jsonl:4" not in whole and words("more_how", n=2).replace(" ", "") in whole
    for key in ("found", "expected", "cure"):
        said = in_language(found.problems.first["bad_json"][0][key], language)
        assert re.sub(r"\s+", "", said) in whole
    for heading, _ in sections(summary, words):
        assert heading in text
    for a in advise(summary, len(found.problems), found.deep):
        assert advice_line(a, words).replace(" ", "") in whole
    for number in (
        summary["targets"]["image_tokens"],
        summary["lengths"]["max"],
        summary["lengths"]["total"],
    ):
        assert re.search(rf"(?<![\d,]){number:,}(?![\d,])", text), "no number is broken"
    assert text.endswith("-> check.html")
    cuts = [line for line in text.splitlines() if line.startswith("max_sequence_length  ")]
    assert width < 80 or width_of(cuts[0]) <= 80
    assert re.search(r"^[\d,]+ ←  ", text, re.M), "the row in force is marked"


def test_problems_in_a_file_are_named_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Problems, "KEPT", 5)
    found = look(tmp_path, *["{"] * 5)
    found.problems.path = tmp_path / "problems.jsonl"
    assert str(found.problems.path) in shown(found, width=300)


def test_nothing_in_the_data_can_steer_the_terminal(tmp_path):
    found = look(tmp_path, json.dumps({EVIL: 1}), json.dumps({"image_path": EVIL, "caption": "c"}))
    coloured = shown(found, colour=True)
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert "\x1b[1;31mno_format\x1b[0m" in coloured and not [
        c for c in plain if not c.isprintable() and c != "\n"
    ]
    assert "[bold]" in plain, "the data's brackets are no markup"


def test_a_truncated_picture_is_found_where_training_finds_it(tmp_path, capsys, monkeypatch):
    """With few pictures each is decoded, as at the start of a training; headers alone show less."""
    picture = (ROOT / "examples" / "pictures" / "house_day.png").read_bytes()
    (tmp_path / "a.png").write_bytes(picture[: len(picture) // 2])
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image_path": "a.png", "caption": "A house."}))
    for more, code in (([], 1), (["--deep"], 1), (["--deep", "false"], 0)):
        assert main(["check", str(path), "--num_workers", "0", *more]) == code
        assert capsys.readouterr().out.count("broken_picture") == code
    monkeypatch.setattr("unigen.commands.check.findings.AUTO_FULL_CHECK", 0)
    assert main(["check", str(path), "--num_workers", "0"]) == 0
    with pytest.raises(BadData, match="broken_picture"):
        UnifiedGenerationDataset(path)


def test_data_of_which_nothing_is_learnt_is_no_damaged_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image_path": "a.png", "caption": "x", "weight": 0}))
    assert main(["check", str(tmp_path / "a.jsonl"), "--num_workers", "0"]) == 1
    said = capsys.readouterr().out
    assert "weight of 0 in all 1 records" in said and "read to its end" not in said
