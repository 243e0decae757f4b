"""The curves of runs as PNG files: one for each chart of the page, in a folder that is the command's own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image as PILImage
from recorded import record

from unigen.commands.watch.command import watch
from unigen.commands.watch.options import WatchOptions
from unigen.config import UserError
from unigen.show import raster


@pytest.mark.slow
def test_a_picture_for_each_chart_of_one_run_and_of_several(folder: Path, tmp_path: Path, capsys):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert watch(WatchOptions([str(folder)], plots=str(alone))) == 0
    names = sorted(path.name for path in alone.glob("*.png"))
    assert len(names) == 12 and {"loss.png", "val_image_loss_by_time.png", "probe_drift.png"} <= set(names)
    assert all(name in capsys.readouterr().out for name in names[:1])
    other = record(tmp_path / "other", 400, ranks=1, seed=9)
    for _ in range(2):  # what it wrote gives way
        watch(WatchOptions([str(folder), str(other)], plots=str(both), html=str(tmp_path / "page.html")))
    assert (tmp_path / "page.html").exists()
    one, two = (PILImage.open(place / "loss.png").convert("RGB").tobytes() for place in (alone, both))
    assert one != two


@pytest.mark.slow
def test_files_of_others_stay_and_options_that_exclude_each_other_are_refused(folder: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "loss.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"loss\.png, which unigen watch did not write"):
        watch(WatchOptions([str(folder)], plots=str(tmp_path / "mine")))
    assert (tmp_path / "mine" / "loss.png").read_bytes() == b"mine"
    with pytest.raises(UserError, match="serve and plots"):
        watch(WatchOptions([str(folder)], plots=str(tmp_path / "new"), serve=True))
    with pytest.raises(UserError, match="plots"):
        watch(WatchOptions([str(folder)], plots=str(folder)))


def test_without_a_font_for_chinese_plots_are_english_and_that_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(raster, "has_fonts", lambda charts: all(chart.title.isascii() for chart in charts))
    drawn = []
    monkeypatch.setattr(raster, "png", lambda chart: drawn.append(chart.title) or b"")
    watch(WatchOptions([str(folder)], plots=str(tmp_path / "zh"), language="zh"))
    assert "Fix: install" in caplog.text and "learning rate" in drawn
