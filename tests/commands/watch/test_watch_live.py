"""``unigen watch`` on a real terminal: frames follow the files and the window, Ctrl-C leaves it as it was."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from recorded import beat, record, row

from unigen.show.terminal import width_of

ROOT = Path(__file__).parents[3]


class Terminal:
    """A command on a pseudo-terminal of a given size."""

    def __init__(self, argv: list[str], width: int, height: int):
        self.master, slave = pty.openpty()
        self.size(width, height)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONUTF8": "1"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            env.pop(name, None)
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def size(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def wait_for(self, pattern: str, timeout: float = 30.0) -> str:
        """What was written from now until the pattern stood in it."""
        begin, deadline = len(self.text), time.monotonic() + timeout
        while not re.search(pattern, self.text[begin:]):
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.text[begin:][-2000:]!r}"
            self.read(0.2)
        return self.text[begin:]

    def read(self, timeout: float) -> bool:
        if not select.select([self.master], [], [], timeout)[0]:
            return True
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # the other end is closed
            data = b""
        self.text += data.decode("utf-8", "replace")
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        os.close(self.master)


def frames(text: str) -> list[list[str]]:
    """The frames as lines without colours; the first and the last one may be cut."""
    plain = re.sub(r"\x1b\[[\d;?]*[A-GI-Zhlm]", "", text)
    return [part.split("\r\n") for part in plain.split("\x1b[H")]


@pytest.fixture
def folder(tmp_path) -> Path:
    return record(tmp_path / "run", 120, ranks=2)


@pytest.mark.slow
def test_a_live_view_follows_the_run_and_the_window_and_leaves_no_trace(folder):
    """New steps are shown within a moment, a resize is obeyed, Ctrl-C restores the screen and prints the last
    frame, code 0."""
    before = sorted(path.name for path in folder.rglob("*"))
    terminal = Terminal([sys.executable, "-m", "unigen", "watch", str(folder), "--interval", "0.2"], 100, 30)
    try:
        first = terminal.wait_for(r"step 120 of 2,000(?s:.*)Ctrl-C leaves")
        before_it, second_screen, _ = first.partition("\x1b[?1049h")
        assert second_screen and before_it.rpartition("\r")[0].rpartition("\r")[2].strip() == ""  # wiped
        assert "\x1b[?25l" in first and "\x1b[32m● running" in first
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row(121, random.Random(0))) + "\n")
        beat(folder, 121, ranks=2)
        terminal.wait_for(r"step 121 of 2,000(?s:.*)Ctrl-C leaves")
        terminal.size(50, 16)
        terminal.wait_for(r"Ctrl-C leaves(?s:.*)\x1b\[H")
        small = frames(terminal.wait_for(r"\x1b\[H(?s:.*)\x1b\[H"))[1]
        assert {width_of(line) for line in small} == {50} and len(small) == 16
        assert small[0].startswith("run  ● running") and "Ctrl-C leaves" in small[-1]
        os.kill(terminal.process.pid, signal.SIGINT)
        while terminal.read(5.0) and terminal.process.poll() is None:
            pass
        assert terminal.process.wait(20) == 0
        while terminal.read(0.2) and select.select([terminal.master], [], [], 0)[0]:
            pass
        end = terminal.text[terminal.text.rindex("\x1b[?1049l") :]
        assert (
            "\x1b[?25h" in terminal.text and "step 121 of 2,000" in end and "Traceback" not in terminal.text
        )
    finally:
        terminal.close()
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_no_colour_where_it_is_not_wanted(folder, monkeypatch):
    terminal = Terminal(
        ["env", "NO_COLOR=1", sys.executable, "-m", "unigen", "watch", str(folder), "--once"], 90, 24
    )
    try:
        while terminal.read(20.0):
            if terminal.process.poll() is not None and not select.select([terminal.master], [], [], 0.2)[0]:
                break
        assert terminal.process.wait(20) == 0 and "running" in terminal.text and "\x1b" not in terminal.text
    finally:
        terminal.close()
