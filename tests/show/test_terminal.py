"""What commands print, on any terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unigen.commands.preview.command import Colours, colours
from unigen.show.terminal import harmless, has_colour, say

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_and_off_where_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colour() and colours().end == "\x1b[0m"
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colour()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour() and colours() == Colours()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert not has_colour() and colours() == Colours()


def test_text_of_others_cannot_steer_the_terminal():
    assert harmless("a\nb\tc\x1b\u202e猫") == "a b c\ufffd\ufffd猫"


def test_what_the_encoding_lacks_is_shown_as_an_escape(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("a 猫")
    assert raw.getvalue() == b"a \\u732b\n"


def test_where_nobody_reads_on_the_command_comes_to_its_own_end():
    code = "import sys; from unigen.show.terminal import say; say('x' * 100_000); say('y'); sys.exit(7)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 7 and process.stderr.read() == b""
    process.stderr.close()
