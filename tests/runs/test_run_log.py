"""``train.log``: everything that was said, and nothing in a folder that is not yet the run's."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest

from unigen.cli import main
from unigen.commands.table import COMMANDS, Command
from unigen.printing import libraries_silent
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


def test_what_libraries_warn_of_is_in_the_file_and_not_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(logging.root, "handlers", [])  # as a program begins
    monkeypatch.setattr(sys, "warnoptions", [])
    with libraries_silent():
        warnings.warn("before the run", stacklevel=1)
        logging.getLogger("bitsandbytes.cextension").warning("no GPU")
        said = listen("info", main=True)
        said.open(tmp_path / "train.log")
        log.info("Precision: fp32")
        warnings.warn("a torch function is old", stacklevel=1)
        logging.getLogger("accelerate").warning("a model is new")
        logging.getLogger("peft.tuners").error("lost")
        leave(said)
    assert capsys.readouterr().err == "Precision: fp32\nlost\n"
    kept = (tmp_path / "train.log").read_text()
    assert "a torch function is old" in kept and "a model is new" in kept


@pytest.mark.parametrize("asked", [False, True])
def test_a_commands_first_line_is_its_own(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code = """
import logging, warnings
from dataclasses import dataclass
warnings.warn("a library")
logging.getLogger("peft.no_such_part").warning("a library")
from unigen.values import Options
@dataclass
class None_(Options): pass
def run(options): print("ours")
"""
    (tmp_path / "noisy_command.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noisy_command", raising=False)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(sys, "warnoptions", ["default"] if asked else [])
    monkeypatch.setitem(COMMANDS, "noisy", Command("noisy_command:None_", "noisy_command:run", "", ""))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["noisy"]) == 0
    out, err = capsys.readouterr()
    assert out == "ours\n" and ("a library" in err) == asked
