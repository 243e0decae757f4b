"""Progress on a real pseudo-terminal: no line of text is broken, every bar fits, each kind of work shows."""

import contextlib
import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from tiny import write_jsonl

from unigen import bars
from unigen.bars import Bar, clear, each
from unigen.cli import main
from unigen.printing import Guarded, bottom

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """A pseudo-terminal that stands in for both output streams of this process."""

    def __init__(self, columns: int, encoding: str = "utf-8"):
        self.columns, self.encoding, self.raw = columns, encoding, bytearray()
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding=encoding, buffering=1)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 1 << 16):
                self.raw.extend(data)

    def close(self) -> None:
        self.stream.close()
        self._reader.join(10)
        os.close(self._master)

    @property
    def rows(self) -> list[str]:
        """What stands there in the end, cut at the width of the terminal."""
        screen = pyte.Screen(self.columns, 1000)
        pyte.Stream(screen).feed(self.raw.decode(self.encoding))
        return list(screen.display)

    @property
    def drawn(self) -> list[str]:
        """Every bar, as it was drawn."""
        text = COLOUR.sub("", self.raw.decode(self.encoding))
        return [part.rstrip() for part in re.findall(r"\r([^\r\n]+)(?=\r(?!\n)|$)", text) if part.strip()]

    def holds(self, line: str) -> bool:
        """Does a line stand there from the first column on, broken by the terminal alone?"""
        wide = -(-max(1, len(line)) // self.columns) * self.columns
        text = "".join(self.rows)
        starts = range(0, len(text), self.columns)
        return any(text[at : at + wide] == line.ljust(wide) for at in starts)


@contextlib.contextmanager
def terminal(columns: int, encoding: str = "utf-8") -> Iterator[Terminal]:
    """Inside, the program prints and logs to a terminal."""
    made, root = Terminal(columns, encoding), logging.getLogger()
    before, handlers = (sys.stdout, sys.stderr), root.handlers[:]
    root.handlers[:] = []  # those of pytest: a program begins with none
    sys.stdout = sys.stderr = made.stream
    try:
        yield made
    finally:
        sys.stdout, sys.stderr = before
        root.handlers[:] = handlers
        made.close()


def run(columns: int, *argv: Any) -> Terminal:
    with terminal(columns) as shown:
        code = main([str(part) for part in argv])
    assert code in (0, 1), "\n".join(row for row in shown.rows if row.strip())
    return shown


def labels(shown: Terminal) -> set[str]:
    """The first words of the bars that were drawn."""
    return {re.split(r"\s+(?=[━╸╺\d])|$", line, maxsplit=1)[0].strip() for line in shown.drawn}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "_REDRAW", 0.01)  # small work is over in less


@pytest.mark.slow
def test_a_training_shows_all_its_work_and_breaks_no_line(options: dict[str, Any]):
    prompts = Path(options["output_dir"]).parent / "prompts.jsonl"
    records = Path(options["train_data_path"]).read_text().splitlines()[:3]  # beside their pictures
    few = Path(options["train_data_path"]).with_name("few.jsonl")
    few.write_text("\n".join(records))
    write_jsonl(prompts, [{"prompt": "A red house", "kind": "draw", "num_timesteps": 3}])
    given = options | {"train_data_path": few, "val_data_path": few, "sample_prompts": prompts, "ema": 0.9}
    given |= {"max_num_tokens": 128, "save_steps": 1, "eval_steps": 2}
    flags = [part for name, value in given.items() if name != "max_steps" for part in (f"--{name}", value)]
    shown = run(80, "train", *flags, "--num_epochs", 1)
    last = checked(shown, options["output_dir"])
    assert {
        "starting", "loading weights", "reading data", "decoding pictures", "planning epoch",
        "warm-up batch", "step", "validating", "answering", "drawing",
    } <= labels(shown)  # fmt: skip
    assert any("saving step_1" in line for line in shown.drawn), "saved beside the training"
    assert shown.rows[0].startswith("Precision"), "the first line is ours"

    resumed = run(160, "train", *flags, "--max_steps", last + 1, "--resume_from_checkpoint", "auto")
    checked(resumed, options["output_dir"])
    assert {f"verifying step_{last}", "restoring the optimiser", "step"} <= labels(resumed)


def checked(shown: Terminal, run: str) -> int:
    """Looks for every line of the run on the terminal, whole; the last step."""
    assert max(map(len, shown.drawn)) < shown.columns
    steps = [line for line in shown.drawn if line.startswith("step") and "tok/s" in line]
    wanted = r"(\d+)/\d+  ETA (\?|\d+:\d\d)  loss \d+\.\d{4}  tok/s [\d,]+"
    assert steps and all(re.search(wanted, line) for line in steps)
    started = (Path(run) / "train.log").read_text().split(" Precision")[-1]
    said = [
        re.sub(r"^(\d{4}-\d\d-\d\d \S+ |    )(WARNING: )?", "", line) for line in started.splitlines()[1:]
    ]
    said = [line for line in said if line.strip() and not line.startswith("step ")]
    assert len(said) > 15 and [line for line in said if not shown.holds(line)] == []
    assert not any(sign in row for row in shown.rows for sign in "━╸"), "nothing is left of a bar"
    return max(int(re.search(wanted, line)[1]) for line in steps)


@pytest.mark.slow
def test_other_commands_show_their_work(options: dict[str, Any], small_model: Path, tmp_path: Path):
    data, out = options["train_data_path"], tmp_path / "out"
    for argv, wanted in (
        (("check", data, "--output", tmp_path / "c.html", "--num_workers", 0), {"checking"}),
        (
            ("cache", data, "--model_path", small_model, "--cache_dir", out, "--freeze_vit", "--device", "cpu"),
            {"loading weights", "looking up", "encoding"},
        ),
        (
            ("evaluate", "--model_path", small_model, "--data_path", data, "--output_dir", tmp_path / "e",
             "--samples", 3, "--max_new_tokens", 4, "--num_timesteps", 3, "--device", "cpu"),
            {"loading weights", "hashing weights", "reading data", "records", "drawing", "writing"},
        ),
        (("fetch", data, "--output_dir", tmp_path / "f"), {"reading addresses", "writing records"}),
        (("preview", data, "--shuffled", "--output", tmp_path / "p.html"), {"reading records"}),
    ):  # fmt: skip
        shown = run(80, *argv)
        assert {"starting", *wanted} <= labels(shown), argv[0]
        assert max(map(len, shown.drawn)) < 80
        assert not any(sign in row for row in shown.rows for sign in "━╸"), argv[0]


@contextlib.contextmanager
def guarded_to(stream: Any) -> Iterator[Guarded]:
    """Standard error of a command that runs; it ends as every command does."""
    before, sys.stderr = sys.stderr, Guarded(stream)
    try:
        yield sys.stderr
    finally:
        clear()
        sys.stderr = before
        assert not bottom


def test_text_goes_above_the_bar_and_an_unfinished_line_is_not_drawn_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bars, "_REDRAW", 0.0)
    with terminal(80) as shown, guarded_to(shown.stream) as out, Bar("reading data", 10) as bar:
        bar.update(3)
        print("a whole line", file=out)
        out.write("half a line,")
        bar.update(3)
        out.write(" and its end\n")
        print("x" * 200, file=out)
    assert [row.rstrip() for row in shown.rows[:2]] == ["a whole line", "half a line, and its end"]
    assert shown.holds("x" * 200) and shown.rows[5].strip() == ""
    assert any(re.match(r"reading data ━.* 3/10  ETA \d:\d\d$", line) for line in shown.drawn)


def test_the_newest_work_stands_in_full_and_what_runs_beside_it_in_short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bars, "_REDRAW", 0.0)
    with terminal(80) as shown, guarded_to(shown.stream), Bar("step", 200) as outer:
        outer.notes = ["loss 1.2345", "tok/s 12,345", "text 1.0000", "image 1.0000", "norm 0.123"]
        outer.update()
        beside = threading.Thread(target=lambda: list(each("saving step_1", range(2))))
        beside.start()
        beside.join()
        for _ in each("validating", range(2)):
            pass
    lines = shown.drawn
    assert any(
        re.search(r"^step .*1/200  ETA \S+  loss 1.2345  tok/s 12,345  saving step_1 50%", x) for x in lines
    )
    assert any(re.search(r"^validating ━.*1/2  ETA \S+  step 0%$", x) for x in lines)
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize("columns", [1, 12, 30, 80])
def test_a_bar_fits_every_width_and_chinese_labels_take_two_columns(
    columns: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bars, "_REDRAW", 0.0)
    with terminal(columns) as shown, guarded_to(shown.stream), Bar("正在读取数据", 5 * 10**9, "B") as bar:
        bar.update(10**9)
    assert len([row for row in shown.rows if row.strip()]) == 0
    assert columns < 80 or any("正在读取数据" in line and "1.0/5.0 GB" in line for line in shown.drawn)


def test_a_terminal_without_these_signs_gets_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bars, "_REDRAW", 0.0)
    with terminal(80, "ascii") as shown, guarded_to(shown.stream), Bar("猫", 2) as bar:
        bar.update()
    assert shown.raw.isascii() and any("1/2" in line for line in shown.drawn)


def plain(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, quiet: float = 0.0) -> str:
    """What a pipe gets of some work."""
    out = io.StringIO()
    monkeypatch.setattr(bars, "QUIET", quiet)
    monkeypatch.setattr(bars._Plain, "last", -1e9)
    with guarded_to(out):
        work()
    return out.getvalue()


def test_a_pipe_gets_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch):
    def inner() -> None:
        for _ in each("records", range(4)):
            for _ in each("drawing", range(4)):
                pass

    assert re.fullmatch(r"records 25%  1/4  ETA \d:\d\d\n", plain(inner, monkeypatch)), "one in ten seconds"
    monkeypatch.setattr(bars, "EVERY", 0.0)
    assert plain(inner, monkeypatch).count("\n") == 4, "of work in work the outer one tells"
    assert plain(inner, monkeypatch, quiet=60.0) == "", "short work says nothing"
    monkeypatch.setenv("RANK", "1")
    assert plain(inner, monkeypatch) == "", "of several processes the first one tells"


def test_work_that_cannot_say_how_far_it_is_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch):
    told = threading.Event()

    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            told.set()
            return super().write(text)

    out = Heard()
    monkeypatch.setattr(bars, "QUIET", 0.01)
    monkeypatch.setattr(bars._Plain, "last", -1e9)
    with guarded_to(out), Bar("warm-up batch"):
        assert told.wait(30)
    assert out.getvalue() == "warm-up batch\n"


def test_what_starts_ends_with_the_first_word_of_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bars, "QUIET", 0.0)
    with terminal(80) as shown, guarded_to(shown.stream) as out:
        Bar("starting", passing=True)
        print("Precision: fp32", file=out)
        with Bar("loading weights"):
            pass
    assert shown.drawn[0] == "starting" and "starting" not in shown.drawn[1:]
    assert shown.rows[0].rstrip() == "Precision: fp32"


def test_a_forked_process_writes_in_the_place_of_the_bar_and_draws_none():
    with terminal(80) as shown, guarded_to(shown.stream) as out:
        with Bar("reading data", 10) as bar:
            bar.update(3)
            if (child := os.fork()) == 0:
                with contextlib.suppress(BaseException):
                    bar.update(5)
                    print("a line of the child", file=out, flush=True)
                    Bar("of the child", 3)
                os._exit(0)
            os.waitpid(child, 0)
            bar.update()
        print("the end", file=out)
    assert [row.rstrip() for row in shown.rows[:2]] == ["a line of the child", "the end"]
    assert not any("of the child" in line for line in shown.drawn if "10" in line or "3" in line)


def test_python_draws_no_plain_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bars, "QUIET", 0.0)
    out = io.StringIO()
    with Bar("loading weights", 2, stream=out) as bar:
        bar.update(2)
    assert out.getvalue() == ""
