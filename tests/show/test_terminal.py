"""What commands print, on any terminal."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unigen.show.terminal import (
    UNBOUND,
    Stretched,
    drawn,
    filled,
    grid,
    harmless,
    has_colour,
    line,
    live,
    one_line,
    say,
    table,
    width_of,
)

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_and_off_where_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colour() and drawn(line(("a", "bad"))) == "\x1b[1;31ma\x1b[0m"
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colour()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour() and drawn(line(("a", "bad"))) == "a"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert not has_colour() and drawn(line(("a", "bad"))) == "a"


def test_text_of_others_cannot_steer_the_terminal():
    assert harmless("a\nb\tc\x1b\u202e猫") == r"a b c\x1b\u202e猫"


def test_what_the_encoding_lacks_is_shown_as_an_escape(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("a 猫", "● ━━─ ▁▄█ …")
    assert raw.getvalue() == b"a \\u732b\n* ==- _-# .\n", "our own signs have plain ones, as wide"


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


# ---- what rich draws

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e [bold]x[/bold] :cat: \x9b31m"


def test_columns_line_up_with_wide_characters_and_figures_to_the_right():
    rows = [["理解", 5, "1.2%"], ["generate", 1234, "< 0.01%"], ["", "", ""]]
    assert drawn(table(["任务", "n", "share"], rows)).split("\n") == [
        "任务          n    share",
        "理解          5     1.2%",
        "generate  1,234  < 0.01%",
        "",
    ]
    assert width_of("橘e\u0301") == 3


def test_figures_and_ordinary_words_stay_whole_in_a_narrow_terminal():
    rows = [["several ordinary words", 1234567, "< 0.01%", "x" * 50]]
    text = drawn(table(["name", "n", "share", "what"], rows), 20)
    words = text.split()
    assert {"several", "ordinary", "words", "1,234,567"} <= set(words) and "< 0.01%" in text
    assert text.count("x") == 50, "what is longer than a column goes on below"


def test_lesser_columns_go_where_a_table_is_too_wide():
    rows = [["a name", 1234567, "some words", "x"], ["b", 2, "more", "y"]]
    made = table(["name", "n", "what", "last"], rows, minor=(2, 1))
    heads = {width: drawn(made, width).split("\n")[0].split() for width in (40, 22, 12)}
    assert heads == {40: ["name", "n", "what", "last"], 22: ["name", "n", "last"], 12: ["name", "last"]}


def test_what_is_stretched_fills_the_width_and_texts_stay_on_their_line():
    rows = [
        [one_line("a long name of a run"), Stretched(lambda n: line("=" * n)), line("1.5"), line("a note")]
    ]
    assert drawn(grid(rows, minor=(3,)), 60) == f"a long name of a run {'=' * 28} 1.5 a note"
    assert drawn(grid(rows, minor=(3,)), 46) == f"a long name of a run {'=' * 21} 1.5"
    narrow = drawn(grid(rows, minor=(3,)), 30)
    assert (
        len(narrow) == 30 and narrow.startswith("a long name") and narrow.endswith("= 1.5") and "…" in narrow
    )
    assert drawn(grid(rows), UNBOUND).count("=") == Stretched.MOST
    assert drawn(one_line("橘猫橘猫"), 5) == "橘猫…" and one_line("abcdef", most=4).plain == "abc…"


def test_parts_of_a_line_go_on_in_the_next_whole():
    rows = [[line("损失"), filled([f"任务{n} 1.234" for n in range(6)])]]
    said = drawn(grid(rows), 40).split("\n")
    assert len(said) > 1 and max(map(width_of, said)) <= 40
    assert re.findall(r"任务\d 1\.234", "\n".join(said)) == [f"任务{n} 1.234" for n in range(6)]


def test_nothing_is_broken_or_cut_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    text = drawn(table(["what"], [["word " * 400]]))
    assert len(text.split("\n")) == 2 and len(text) < UNBOUND // 10


def test_texts_in_tables_and_lines_cannot_steer_the_terminal():
    shown = drawn(table([EVIL], [[EVIL], [line(EVIL, (EVIL, "bad"))]]), 200, colour=True)
    assert shown.count("[bold]x[/bold] :cat:") == 4, "and nothing is taken for markup"
    left = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert not [c for c in left if not c.isprintable() and c != "\n"]
    assert "\x1b[1;31m" in shown and "\x1b" not in drawn(line((EVIL, "bad")), 80, colour=False)


class Screen(Terminal):
    encoding = "ascii"

    def fileno(self) -> int:
        raise OSError


@pytest.mark.parametrize("end", [None, KeyboardInterrupt(), ValueError("x")])
def test_a_live_view_puts_the_terminal_right_however_it_ends(monkeypatch: pytest.MonkeyPatch, end):
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if isinstance(end, ValueError):
            stack.enter_context(pytest.raises(ValueError))
        with live() as show:
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
            show([table(["猫"], [[EVIL]] * 100)], "the last line")
            if end:
                raise end
    text = screen.getvalue()
    assert "the last line" in text.splitlines()[-1]
    assert "\x1b[?1049h" in text and "[bold]x" in text and "\\u732b" in text and "owned\x07" not in text
    assert text.rindex("\x1b[?1049l") > text.rindex("[bold]x") and text.rindex("\x1b[?25h") > text.index(
        "\x1b[?25l"
    )
    assert signal.getsignal(signal.SIGTERM) is before
