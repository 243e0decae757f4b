import contextlib
import fcntl
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
from typing import Any

import pytest
import torch
from processes import flags
from tiny import metrics

from unigen.runs.checkpoint import verify_checkpoint
from unigen.tracking.console import Progress, duration, metrics_line

METRICS = {
    "loss": 1.25, "text_loss": 1.0, "image_loss": None, "grad_norm": torch.tensor(0.5), "learning_rate": 1e-5,
    "tokens_per_second": 12345.6, "data_wait": 0.071, "something_else": 3,
}  # fmt: skip


def test_metrics_for_people():
    assert metrics_line(METRICS) == "loss 1.2500  text 1.0000  norm 0.500  lr 1.00e-05  tok/s 12,346  wait 7%"
    assert metrics_line({}) == "" and metrics_line({"loss": math.nan}) == "loss nan"
    assert [duration(s) for s in (0, 59.6, 61, 3723, 360000)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:02:03",
        "100:00:00",
    ]


def test_plain_lines_come_every_so_often_and_at_the_end():
    stream = StringIO()
    progress = Progress(25, 0, 10, True, stream)
    for step in range(1, 26):
        progress.update(step, METRICS)
    progress.write("hello")
    progress.close()
    out = stream.getvalue().splitlines()
    assert [line.split()[1] for line in out[:-1]] == ["10/25", "20/25", "25/25"]
    assert all(metrics_line(METRICS) in line and re.search(r"ETA \d+:\d\d$", line) for line in out[:-1])
    assert out[-1] == "hello"


@pytest.mark.slow
def test_the_time_left_leaves_out_the_first_step_and_the_steps_of_the_run_before():
    stream = StringIO()
    progress = Progress(1000, 100, 1, True, stream)
    time.sleep(1.0)  # compiling
    progress.update(101, {})
    time.sleep(0.1)
    progress.update(102, {})
    first, second = (line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines())
    seconds = [
        sum(int(n) * 60**i for i, n in enumerate(reversed(text.split(":")))) for text in (first, second)
    ]
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
    assert "4/10" in text and "10/10" in text and "\r" in text
    assert "loss 1.2500" in text and "hello" in text


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["pipe", "full disk"])
def test_a_run_whose_output_cannot_be_written_goes_on_to_its_end(
    options: dict[str, Any], light_model: Path, gone: str
):
    """As in ``unigen train 2>&1 | tee log`` where tee ends, or ``> log`` on a disk that fills up."""
    given = flags(options | {"model_path": light_model})
    argv = [sys.executable, "-m", "unigen", "train", *given, "--logging_steps", "1"]
    with open("/dev/full", "w") if gone == "full disk" else contextlib.nullcontext() as full:
        where = full or subprocess.PIPE
        process = subprocess.Popen(argv, stdout=where, stderr=subprocess.STDOUT if gone == "pipe" else where)
        if process.stdout is not None:
            process.stdout.close()
        assert process.wait(120) == 0
    run = Path(options["output_dir"])
    verify_checkpoint(run / "step_2")
    assert len(metrics(run)) == 2
