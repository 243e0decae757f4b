"""The demo's report, from figures and pictures at hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import FAULTS, framed, in_browser
from pages import Page
from PIL import Image

from unigen.commands.demo import exam as demo
from unigen.show.terminal import say


@pytest.fixture
def source(tmp_path) -> str:
    noise = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(noise.integers(0, 256, (32, 32), np.uint8))

    def triples(*captions: str) -> list[tuple[str, Image.Image]]:
        return [(caption, picture()) for caption in captions * 12]

    lines = [{"step": n, "text_loss": 1 / n, "image_loss": 2 / n} for n in range(1, 301)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    exam = SimpleNamespace(
        drawings=[("seven", picture()) for _ in range(60)],
        edits=triples("given", "rotate ✓", "exact"),
        sums=triples("given", "given", "12 ✕"),
    )
    metrics = {name: 0.875 for name in demo.BARS} | {"parameters": 1234567, "judge_accuracy": 0.98912}
    return demo._write_report(tmp_path, metrics, exam).read_text("utf-8")


def test_it_shows_scores_pictures_and_losses(source, tmp_path):
    page = Page(source)
    for name, wanted in demo.BARS.items():
        mark = "✓" if wanted <= 0.875 else "✕"
        assert f"{name.replace('_', ' ')}87.5%{wanted:.1%}{demo.CHANCE[name]:.1%}{mark}" in page.text
    assert "--quick" not in page.text
    assert "1,234,567" in page.text and "0.9891" in page.text
    assert len(page.pictures) == 60 + 36 + 36 and page.text.count("rotate ✓") == 12
    (chart,) = page.charts
    assert [(c["n"], c["x"], c["t"][:2]) for c in chart["curves"]] == [
        ("text", list(range(1, 301)), ["1", "0.5"]),
        ("image", list(range(1, 301)), ["2", "1"]),
    ]
    assert Image.open(Path(tmp_path) / "drawings.png").size[0] > 400


def test_the_terminal_draws_scores_beside_what_is_wanted_and_marks_them(capsys: pytest.CaptureFixture[str]):
    metrics = {name: 0.9 for name in demo.BARS} | {"judge_heldout_accuracy": 0.98912}
    say(*demo._scores(metrics, quick=True))
    rows = capsys.readouterr().out.splitlines()
    reached = {row.split()[0]: row.endswith("✓ reached") for row in rows if "reached" in row}
    assert reached == {"understanding": False, "generation": True, "edit": True, "interleaved": True}
    assert all("█" * 14 in row and "●" in row and " 90.0%" in row for row in rows if "reached" in row)
    assert "98.9%" in rows[-2] and "--quick" in rows[-1] and "not held" in rows[-1]
    say(*demo._scores(metrics, quick=False))
    assert "--quick" not in capsys.readouterr().out


@in_browser
@pytest.mark.slow
def test_on_a_phone_nothing_leaves_the_page_and_no_word_is_split(source, tmp_path):
    faults = json.loads(framed(source, FAULTS, tmp_path))
    assert faults["cells"] > 150 and faults["wide"] == [] and faults["split"] == []
