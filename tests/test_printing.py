"""Nothing of data, names or errors steers a terminal: in memory, through a pipe, and on a terminal."""

import io
import json
import os
import pty
import re
import select
import sys
from pathlib import Path

import pytest
from processes import end_of, printed_by, start_command

from unigen.bars import Bar
from unigen.cli import main
from unigen.printing import LONGEST_LINE, LONGEST_NAME, Guarded, beneath, guarded, printable, typed

ROOT = Path(__file__).parents[1]
EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\x9b31m\x00\x7f\u2028"
OURS = re.compile(r"\x1b\[[0-9;]*m")


def steers(text: str) -> set[str]:
    """Characters that steer a terminal, less the line ends and colours of ours."""
    return {c for c in OURS.sub("", text) if not c.isprintable() and c not in "\n\t"}


def test_every_character_that_steers_is_shown_and_ordinary_ones_stay():
    every = "".join(map(chr, range(0x3000)))
    assert printable(every, None).isprintable()
    assert printable("a\x1b\n\x9b\u202e\udcca\ud800") == r"a\x1b\n\x9b\u202e\udcca\ud800"
    assert printable("a b 猫 é \u3000") == "a b 猫 é \u3000"


def test_the_middle_of_a_long_name_is_left_out():
    name = printable("a" * 5_000_000 + "z")
    assert len(name) < LONGEST_NAME + 10 and name[0] == "a" and name[-1] == "z"


# What is printed behind an option or a command and needs no quotes: numbers, and what an option itself takes.
PLAIN = re.compile(
    r"int|config\.batch_size|rate|was|rank|engine|kind|fields|pair|empty|name|new|old|most|others|ip|text|token|action"
    r"|' '\.join|max_sequence|longest"
)


def test_what_is_to_be_typed_again_is_quoted():
    assert [typed(word) for word in ("a/b.jsonl", Path("取 回"), "it's")] == [
        "a/b.jsonl",
        "'取 回'",
        "'it'\"'\"'s'",
    ]
    behind = re.compile(r"(?:--[a-z_]+[ =]|unigen [a-z]+(?: [a-z]+)? )\{(?!typed\()([^{}]*)")
    found = [
        (path.name, value)
        for path in sorted((ROOT / "unigen").rglob("*.py"))
        for value in behind.findall(path.read_text("utf-8"))
        if not PLAIN.match(value)
    ]
    assert found == [], "what a user copies must be one word for a shell: unigen/printing.py, typed"


def test_a_guarded_stream_keeps_line_ends_and_tabs_and_tells_what_it_cannot_encode():
    raw = io.BytesIO()
    stream = Guarded(io.TextIOWrapper(raw, encoding="ascii"), 20)
    print("a\tb\r\nc\rd\x1b猫\udcff", "x" * 10_000, file=stream, sep="\n")
    stream.flush()
    assert raw.getvalue().splitlines(True)[:2] == [b"a\tb\r\n", b"c\\rd\\x1b\\u732b\\udcff\n"]
    assert len(raw.getvalue()) < 80 and raw.getvalue().endswith(b"x\n")


def test_guards_are_put_once_and_taken_away(capsys: pytest.CaptureFixture[str]):
    before = sys.stdout, sys.stderr
    with guarded(), guarded():
        assert beneath(sys.stdout) is before[0]
        print(EVIL)
        print(EVIL * 10_000, file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert not steers(out + err) and len(err) < 10 * LONGEST_LINE


def test_bars_draw_and_their_names_do_not(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Bar(f"verify {EVIL}", 2, stream=stream) as shown:
        shown.update()
    assert "\r" in stream.getvalue() and steers(stream.getvalue()) <= {"\r"}


def test_errors_name_files_without_obeying_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = "x\x1b[2J\nunigen: error: forged\u202e.jsonl"
    (tmp_path / name).write_text("{}\n")
    for argv in (
        ["check", str(tmp_path / "none" / name)],
        ["check", str(tmp_path / name)],
        ["train", "--train_data_path", str(tmp_path / name), "--model_path", name],
        ["ckpt", "ls", name],
        [name],
        ["check", f"--{EVIL}", "1"],
        ["check", "a", "--language", EVIL],
    ):
        assert main(argv) in (1, 2)
        out, err = capsys.readouterr()
        assert not steers(out + err), argv
        assert "\nunigen: error: forged" not in out + err, argv


def hostile(folder: Path) -> list[Path]:
    """Records whose texts, fields, formats and pictures are hostile; and a file with a hostile name."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": EVIL + "x"}]
    records = [{"conversations": turns}] * 30
    records += [{EVIL: 1, "conversation": EVIL}, {"text_prompt": "a", "image_path": EVIL.replace("\0", "")}]
    records += [{"conversations": [{"role": EVIL, "content": "x"}]}]
    lines = [*map(json.dumps, records), '{"a' + "\x7f" + '": 1, "a' + "\x7f" + '": 2}', '{"a": \x1b[2J}']
    paths = [folder / "d.jsonl", folder / "n\x1b[2J\u202e\x9b.jsonl"]
    for path in paths:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "preview", "fetch", "train"])
def test_hostile_data_through_a_pipe_and_on_a_terminal(command: str, tmp_path: Path):
    paths = list(map(str, hostile(tmp_path)))
    options = {
        "check": [*paths, "--num_workers", "0"],
        "preview": [*paths, "--output", str(tmp_path / "page.html")],
        "fetch": [*paths, "--output_dir", str(tmp_path / "out")],
        "train": [
            *("--train_data_path", *paths, "--model_path", str(ROOT / "tests/golden/model"), "--dry_run"),
            *("--output_dir", str(tmp_path / "run"), "--num_workers", "0"),
        ],
    }[command]
    argv, more = [command, *options], {"TERM": "xterm", "UNIGEN_CACHE": str(tmp_path / "cache")}
    assert end_of(start_command(tmp_path / "printed", argv, **more))[0] in (0, 1, 2)
    text = printed_by(tmp_path / "printed")
    assert text and not steers(text) and "\x1b" not in text and "Traceback" not in text

    shown = on_terminal(argv, more)
    assert not steers(shown.replace("\r\n", "\n").replace("\r", "")) and "Traceback" not in shown
    assert command != "check" or "\x1b[" in shown, "our own colours"


def on_terminal(argv: list[str], variables: dict[str, str]) -> str:
    """What a terminal gets of a command."""
    ours, theirs = pty.openpty()
    (process,) = start_command(Path(os.ttyname(theirs)), argv, **variables)
    found = b""
    while (alive := process.is_alive()) or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.02 if alive else 0)[0]:
            found += os.read(ours, 1 << 16)
    assert end_of([process])[0] in (0, 1, 2)
    os.close(theirs)
    os.close(ours)
    return found.decode("utf-8")
