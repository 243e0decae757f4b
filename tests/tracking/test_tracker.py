import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trackers import small_disk

from unigen.config import Config
from unigen.runs import log as appender
from unigen.tracking.tracker import Tracker


def lines(folder: Path) -> list[dict]:
    """The log without the clock's times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in found]


# ---- metrics.jsonl


def test_a_line_holds_the_step_and_the_exact_numbers(tmp_path: Path):
    tracker = Tracker(tmp_path / "new", Config())
    tracker.log(
        {
            "loss": 0.1 + 0.2,
            "count": 3,
            "note": "猫",
            "missing": None,
            "norm": torch.tensor(1.5),
            "tiny": 5e-324,
        },
        1,
    )
    # Read while the run goes on: nothing waits in a buffer.
    assert lines(tmp_path / "new") == [
        {"step": 1, "loss": 0.1 + 0.2, "count": 3, "note": "猫", "missing": None, "norm": 1.5, "tiny": 5e-324}
    ]
    step, now = list(json.loads((tmp_path / "new" / "metrics.jsonl").read_text("utf-8")).items())[:2]
    assert step == ("step", 1) and now[0] == "time" and abs(now[1] - time.time()) < 60
    tracker.finish()
    tracker.finish()


def test_what_is_not_finite_is_null_and_named(tmp_path: Path):
    tracker = Tracker(tmp_path, Config())
    tracker.log({"loss": math.nan, "norm": torch.tensor(math.inf), "lr": 1e-5}, 1)
    assert lines(tmp_path) == [
        {"step": 1, "loss": None, "norm": None, "lr": 1e-5, "nonfinite": ["loss", "norm"]}
    ]
    assert b"NaN" not in (tmp_path / "metrics.jsonl").read_bytes()


def run(folder: Path, steps: range, resume_step: int = 0) -> None:
    tracker = Tracker(folder, Config(), resume_step)
    for step in steps:
        tracker.log({"loss": 1 / step}, step)
        if step % 4 == 0:
            tracker.log({"val_loss": 2 / step}, step)
    tracker.finish()


@pytest.mark.parametrize(("stopped", "resume"), [(7, 4), (8, 8), (11, 8), (4, 4)])
def test_a_stitched_log_equals_an_uninterrupted_one(tmp_path: Path, stopped: int, resume: int):
    run(tmp_path / "straight", range(1, 13))
    run(tmp_path / "stitched", range(1, stopped + 1))
    with open(tmp_path / "stitched" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "lo')  # a kill in the middle of a write
    run(tmp_path / "stitched", range(resume + 1, 13), resume)
    assert lines(tmp_path / "stitched") == lines(tmp_path / "straight")
    assert [p.name for p in (tmp_path / "stitched").iterdir()] == ["metrics.jsonl"]


def test_resuming_where_there_is_no_log_starts_one(tmp_path: Path):
    run(tmp_path, range(5, 7), 4)
    assert [row["step"] for row in lines(tmp_path)] == [5, 6]


def test_a_validation_that_is_repeated_is_in_the_log_once(tmp_path: Path):
    """A signal broke it off at step 4, the next run repeated and logged it and was killed, the third repeats
    it again."""
    run(tmp_path, range(1, 5))
    for killed in (True, True, False):
        tracker = Tracker(tmp_path, Config(), 4, repeats=True)
        tracker.log({"val_loss": 0.5}, 4)
        if killed:
            tracker.log({"loss": 0.25}, 5)
        tracker.finish()
    assert [(row["step"], "val_loss" in row) for row in lines(tmp_path)] == [
        (1, False),
        (2, False),
        (3, False),
        (4, False),
        (4, True),
    ]


def test_a_validation_that_was_finished_stays(tmp_path: Path):
    run(tmp_path, range(1, 5))
    Tracker(tmp_path, Config(), 4).finish()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 4]


def test_a_kill_tears_the_last_line_at_most_and_a_resume_drops_it(tmp_path: Path):
    code = f"""
from pathlib import Path
from unigen.config import Config
from unigen.tracking.tracker import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), Config())
for step in range(10**9):
    tracker.log({{"loss": float(step), "text": "x" * 500}}, step)
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").stat().st_size < 100_000:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.wait()
    # The kernel copies page by page and ends a killed process between two pages, so the last line may be
    # torn.
    log = tmp_path / "metrics.jsonl"
    whole, newline, _ = log.read_bytes().rpartition(b"\n")
    steps = [json.loads(line)["step"] for line in whole.splitlines()]
    assert steps == list(range(len(steps))) and len(steps) > 100
    for torn in (b"", b'{"step": 9', b"{"):
        log.write_bytes(whole + newline + torn)
        run(tmp_path, range(len(steps), len(steps) + 2), resume_step=len(steps) - 1)
        assert sorted({row["step"] for row in lines(tmp_path)}) == [*steps, len(steps), len(steps) + 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_warns_once_and_its_lines_come_later_in_their_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tracker = Tracker(tmp_path, Config())
    tracker.log({"loss": 1.0}, 1)
    file = tracker._metrics._file
    disk = os.dup(file._file)
    os.dup2(os.open("/dev/full", os.O_WRONLY), file._file)
    for step in (2, 3):
        tracker.log({"loss": 1.0}, step)
    assert len(caplog.messages) == 1 and "metrics.jsonl" in caplog.text and "No space left" in caplog.text
    assert [row["step"] for row in lines(tmp_path)] == [1]
    os.dup2(disk, file._file)
    tracker.log({"loss": 1.0}, 4)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]
    assert len(caplog.messages) == 2 and "nothing is lost" in caplog.messages[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_a_full_disk_never_took_is_counted_at_the_end_and_memory_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
):
    monkeypatch.setattr(appender, "MAX_WAITING", 1000)
    tracker = Tracker(tmp_path, Config())
    file = tracker._metrics._file
    os.dup2(os.open("/dev/full", os.O_WRONLY), file._file)
    for step in range(1, 101):
        tracker.log({"loss": 1.0}, step)
    assert sum(len(line) for line in file._waiting) == file._bytes <= 1000
    tracker.finish()
    assert len(caplog.messages) == 2 and "lacks 100 record(s)" in caplog.messages[1]


def test_half_a_line_on_a_full_disk_is_cut_off_again_and_written_whole_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with small_disk(tmp_path / "disk", 16) as disk:
        tracker = Tracker(disk, Config())
        tracker.log({"text": "a" * 3000}, 1)
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 3 * 4096)
        for step in (2, 3):
            tracker.log({"text": "b" * 3000}, step)
        assert [row["step"] for row in lines(disk)] == [1]
        ballast.unlink()
        tracker.log({"text": "c" * 3000}, 4)
        tracker.finish()
        assert [row["step"] for row in lines(disk)] == [1, 2, 3, 4]
        assert len(caplog.messages) == 2


def test_a_folder_that_is_read_only_for_a_while_gets_its_lines_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with small_disk(tmp_path / "disk", 64) as disk:
        run(disk, range(1, 4))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        tracker = Tracker(disk, Config(), 2)
        tracker.log({"loss": 1.0}, 3)
        assert [row["loss"] for row in lines(disk)] == [1, 1 / 2, 1 / 3]
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        tracker.log({"loss": 1.0}, 4)
        tracker.finish()
        assert [(row["step"], row["loss"]) for row in lines(disk)] == [(1, 1), (2, 1 / 2), (3, 1), (4, 1)]
        assert len(caplog.messages) == 2 and "nothing is lost" in caplog.messages[1]


def test_a_folder_that_cannot_be_made_warns_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    tracker = Tracker(tmp_path / "file", Config())
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert (
        len(caplog.messages) == 2
        and "cannot be written" in caplog.messages[0]
        and "lacks 1 record" in caplog.messages[1]
    )


def test_a_secret_in_a_text_reaches_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-4711")
    tracker = Tracker(tmp_path, Config())
    tracker.log({"note": "secret: cannot read it with hush-hush-4711", "loss": 1.0}, 1)
    assert lines(tmp_path) == [{"step": 1, "note": "secret: cannot read it with <hidden>", "loss": 1.0}]


def test_only_the_log_is_written_unless_more_is_asked_for(tmp_path: Path):
    """Pass: no package of a tracker is imported, no process is started, no other file is made."""
    code = f"""
import sys, threading
from pathlib import Path
from unigen.config import Config
from unigen.tracking.tracker import TRACKERS, Tracker
tracker = Tracker(Path({str(tmp_path / "run")!r}), Config(wandb_mode="offline", wandb_run_name="tabby"))
tracker.log({{"loss": 1.0}}, 1)
assert threading.active_count() == 1
tracker.finish()
print(TRACKERS.keys() & sys.modules.keys() | {{"torch", "PIL"}} & sys.modules.keys(), list(TRACKERS))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "set() ['tensorboard', 'wandb', 'trackio']\n" and not done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
