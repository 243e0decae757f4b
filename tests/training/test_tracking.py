import fcntl
import json
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
import torch

from unigen.config import Config
from unigen.training.tracking import TRACKERS, Progress, Tracker, describe, duration


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


# ---- metrics.jsonl


def test_a_line_holds_the_step_and_the_exact_numbers(tmp_path: Path):
    tracker = Tracker(tmp_path / "new", Config())
    tracker.log({"loss": 0.1 + 0.2, "count": 3, "note": "猫", "missing": None, "norm": torch.tensor(1.5), "tiny": 5e-324}, 1)
    # Read while the run goes on: nothing waits in a buffer.
    assert lines(tmp_path / "new") == [
        {"step": 1, "loss": 0.1 + 0.2, "count": 3, "note": "猫", "missing": None, "norm": 1.5, "tiny": 5e-324}
    ]
    assert next(iter(lines(tmp_path / "new")[0])) == "step"
    tracker.finish()
    tracker.finish()


def test_what_is_not_finite_is_null_and_named(tmp_path: Path):
    tracker = Tracker(tmp_path, Config())
    tracker.log({"loss": math.nan, "norm": torch.tensor(math.inf), "lr": 1e-5}, 1)
    assert lines(tmp_path) == [{"step": 1, "loss": None, "norm": None, "lr": 1e-5, "nonfinite": ["loss", "norm"]}]
    assert b"NaN" not in (tmp_path / "metrics.jsonl").read_bytes()


def run(folder: Path, steps: range, resume_step: int | None = None) -> None:
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
    assert (tmp_path / "stitched" / "metrics.jsonl").read_bytes() == (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert [p.name for p in (tmp_path / "stitched").iterdir()] == ["metrics.jsonl"]


def test_resuming_where_there_is_no_log_starts_one(tmp_path: Path):
    run(tmp_path, range(5, 7), 4)
    assert [row["step"] for row in lines(tmp_path)] == [5, 6]


@pytest.mark.parametrize("resume_step", [None, 0])
def test_a_fresh_start_sets_the_earlier_log_aside(tmp_path: Path, resume_step: int | None):
    for last in (2, 3, 4):
        run(tmp_path, range(1, last), resume_step)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert len((tmp_path / "metrics.old-1.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "metrics.old-2.jsonl").read_text().splitlines()) == 2


def test_a_kill_leaves_whole_lines(tmp_path: Path):
    code = f"""
from pathlib import Path
from unigen.config import Config
from unigen.training.tracking import Tracker
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
    assert [row["step"] for row in lines(tmp_path)] == list(range(len(lines(tmp_path))))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_warns_once_and_stops_nothing(tmp_path: Path, caplog):
    tracker = Tracker(tmp_path, Config())
    os.dup2(os.open("/dev/full", os.O_WRONLY), tracker._backends["jsonl"]._file)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log({"loss": 1.0}, step)
    assert len(caplog.messages) == 1 and "jsonl" in caplog.text and "No space left" in caplog.text


def test_half_a_line_on_a_full_disk_is_cut_off_again_and_the_log_goes_on(tmp_path: Path, caplog):
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", mount]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and its permission")
    try:
        tracker = Tracker(mount, Config())
        tracker.log({"text": "a" * 3000}, 1)
        ballast = mount / "ballast"
        ballast.write_bytes(b"x" * 4096)
        for step in (2, 3):
            tracker.log({"text": "b" * 3000}, step)
        ballast.unlink()
        tracker.log({"text": "c" * 3000}, 4)
        tracker.finish()
        assert [row["step"] for row in lines(mount)] == [1, 4]
        assert len(caplog.messages) == 1
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_a_folder_that_cannot_be_made_warns_once_and_stops_nothing(tmp_path: Path, caplog):
    (tmp_path / "file").touch()
    tracker = Tracker(tmp_path / "file", Config())
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert len(caplog.messages) == 1 and "jsonl" in caplog.text


# ---- Weights & Biases


CHILD = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.WARNING, format="WARNING %(message)s")
from unigen.config import Config
from unigen.training.tracking import Tracker
folder, resume = Path(sys.argv[1]), int(sys.argv[2]) or None
tracker = Tracker(folder, Config(wandb_project="cats", wandb_run_name="tabby"), resume)
for step in range((resume or 0) + 1, (resume or 0) + 4):
    tracker.log({"loss": 1.0 / step, "bad": float("nan"), "none": None}, step)
tracker.finish()
print("DONE", "wandb" in sys.modules)
"""


ARGUMENT = "--token=argument-4711"


def child(folder: Path, resume: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own: wandb keeps state, and a broken one must be imported afresh."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), root]))
    env = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": path, "HOME": str(folder.parent)} | environment
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(resume), ARGUMENT], capture_output=True, text=True, env=env, timeout=120
    )


def test_wandb_offline_writes_the_run_and_no_secret_and_resumes_it(tmp_path: Path):
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    secret = {"WANDB_API_KEY": "5ec2e7" * 6 + "cafe", "AWS_SECRET_ACCESS_KEY": "hush-hush-4711"}
    done = child(folder, **secret)
    assert done.returncode == 0 and "DONE True" in done.stdout, done.stderr
    assert "WARNING" not in done.stderr
    (log,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for word in (b"cats", b"tabby", b"loss", b"image_loss_weight"):
        assert word in content
    assert [row["step"] for row in lines(folder)] == [1, 2, 3]

    run_id = (folder / "wandb_run_id").read_text().strip()
    assert run_id in log.name
    again = child(folder, 3, **secret)
    assert again.returncode == 0 and "DONE True" in again.stdout, again.stderr
    assert (folder / "wandb_run_id").read_text().strip() == run_id
    assert [row["step"] for row in lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert child(folder).returncode == 0
    assert (folder / "wandb_run_id").read_text().strip() != run_id, "a fresh start is another run"

    for path in tmp_path.rglob("*"):
        if path.is_file():
            for value in [*secret.values(), ARGUMENT]:
                assert value.encode() not in path.read_bytes(), path


def broken_module(folder: Path, code: str) -> str:
    (folder / "modules").mkdir()
    (folder / "modules" / "wandb.py").write_text(code)
    return str(folder / "modules")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ImportError('no such thing')", "cannot start"),
        ("1 / 0", "cannot start"),
        ("Settings = dict\ndef init(**_):\n    raise TimeoutError('unreachable')", "cannot start"),
        (
            "Settings = dict\nclass Run:\n    id = 'x'\n    def log(self, *_, **__):\n        raise OSError('gone')\n"
            "    def finish(self):\n        raise OSError('gone')\ndef init(**_):\n    return Run()",
            "cannot log",
        ),
        (
            "Settings = dict\nclass Run:\n    id = 'x'\n    def log(self, *_, **__):\n        pass\n"
            "    def finish(self):\n        raise OSError('gone')\ndef init(**_):\n    return Run()",
            "cannot finish",
        ),
    ],
    ids=["not installed", "fails to import", "fails to start", "fails to log", "fails to finish"],
)
def test_a_broken_wandb_warns_once_and_stops_nothing(tmp_path: Path, code: str, says: str):
    done = child(tmp_path / "run", PYTHONPATH=broken_module(tmp_path, code))
    assert done.returncode == 0 and "DONE" in done.stdout, done.stderr
    assert done.stderr.count("WARNING") == 1 and f"Tracker wandb {says}" in done.stderr
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3]


def test_wandb_without_a_login_warns_once_and_stops_nothing(tmp_path: Path):
    pytest.importorskip("wandb")
    done = child(tmp_path / "run", WANDB_MODE="online", WANDB_API_KEY="", NETRC=str(tmp_path / "none"))
    assert done.returncode == 0 and "DONE" in done.stdout, done.stderr
    assert "Tracker wandb cannot start" in done.stderr
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3]


def test_wandb_is_not_even_imported_unless_asked_for(tmp_path: Path):
    code = CHILD.replace('wandb_project="cats", ', "")
    path = os.pathsep.join([broken_module(tmp_path, "1 / 0"), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "0"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=60
    )
    assert "DONE False" in done.stdout and not done.stderr
    assert TRACKERS.keys() == {"jsonl", "wandb"}


# ---- the console


METRICS = {
    "loss": 1.25, "text_loss": 1.0, "image_loss": None, "grad_norm": torch.tensor(0.5), "learning_rate": 1e-5,
    "tokens_per_second": 12345.6, "data_wait": 0.071, "something_else": 3,
}  # fmt: skip


def test_metrics_for_people():
    assert describe(METRICS) == "loss 1.2500  text 1.0000  norm 0.500  lr 1.00e-05  tok/s 12,346  wait 7%"
    assert describe({}) == "" and describe({"loss": math.nan}) == "loss nan"
    assert [duration(s) for s in (0, 59.6, 61, 3723, 360000)] == ["0:00", "1:00", "1:01", "1:02:03", "100:00:00"]


def test_plain_lines_come_every_so_often_and_at_the_end():
    stream = StringIO()
    progress = Progress(25, 0, 10, True, stream)
    for step in range(1, 26):
        progress.update(step, METRICS)
    progress.write("hello")
    progress.close()
    out = stream.getvalue().splitlines()
    assert [line.split()[1] for line in out[:-1]] == ["10/25", "20/25", "25/25"]
    assert all(describe(METRICS) in line and re.search(r"ETA \d+:\d\d$", line) for line in out[:-1])
    assert out[-1] == "hello"


def test_the_time_left_leaves_out_the_first_step_and_the_steps_of_the_run_before():
    stream = StringIO()
    progress = Progress(1000, 100, 1, True, stream)
    time.sleep(1.0)  # compiling
    progress.update(101, {})
    time.sleep(0.1)
    progress.update(102, {})
    first, second = (line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines())
    seconds = [sum(int(n) * 60**i for i, n in enumerate(reversed(text.split(":")))) for text in (first, second)]
    assert seconds[0] >= 890  # one second a step is all that is known
    assert 85 <= seconds[1] < 490  # 898 steps of 0.1 s; with the first step it would be 494 at least


def test_other_processes_print_nothing():
    stream = StringIO()
    progress = Progress(10, 0, 1, False, stream)
    progress.update(1, METRICS)
    progress.write("hello")
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("columns", [0, 120])
def test_a_terminal_gets_a_bar(columns: int):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    received = bytearray()

    def read() -> None:
        while True:
            try:
                received.extend(os.read(master, 4096))
            except OSError:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(slave, "w") as terminal:
        progress = Progress(10, 4, 1, True, terminal)
        for step in range(5, 11):
            time.sleep(0.03)
            progress.update(step, METRICS)
        progress.write("hello")
        progress.close()
        progress.close()
    reader.join(5)
    os.close(master)
    text = received.decode()
    assert "4/10" in text and "10/10" in text and "100%" in text and "\r" in text
    assert "loss 1.2500" in text and "hello" in text
