"""``train.log``: everything that was said, and nothing in a folder that is not yet the run's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from unigen.runs.said import leave, listen

log = logging.getLogger("unigen")


def test_what_was_said_before_the_folder_was_the_runs_is_there_too(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    path, said = tmp_path / "train.log", listen("info", main=True)
    try:
        log.info("early %s", "hunter2hunter2")
        assert not path.exists()
        said.open(path)
        log.warning("two\nlines \x1b[31mred")
        said.note("step 1/2")
    finally:
        leave(said)
    log.info("late")
    lines = path.read_text("utf-8").splitlines()
    assert "early" in lines[0] and "hunter2" not in path.read_text()
    assert lines[1].endswith("WARNING: two") and lines[2].startswith("    lines") and "\x1b" not in lines[2]
    assert lines[3].endswith("step 1/2") and len(lines) == 4


def test_a_second_leg_goes_on_in_the_same_file(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    for text in ("one", "two"):
        said = listen("info", main=True)
        said.open(tmp_path / "train.log")
        log.info(text)
        leave(said)
    assert [line.split()[-1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["one", "two"]


def test_a_disk_that_refuses_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "train.log").mkdir()
    said = listen("info", main=True)
    said.open(tmp_path / "train.log")
    log.info("kept")
    leave(said)
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1


def test_other_processes_write_none():
    said = listen("info", main=False)
    assert said not in logging.getLogger().handlers
    leave(said)
