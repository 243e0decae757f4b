"""What the tests of trackers in processes of their own share."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from pathlib import Path

import pytest

from unigen.config import Config
from unigen.tracking.tracker import Tracker

ROOT = str(Path(__file__).parents[1])


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def descendants(pid: int | str) -> dict[int, str]:
    """Process id -> name of every process that ``pid`` has started, and of theirs."""
    found = {}
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                with contextlib.suppress(OSError):
                    found[int(child)] = Path(f"/proc/{child}/comm").read_text().strip()
                    found |= descendants(child)
    return found


def wait_for(condition, seconds: float = 60.0):
    """The first true value of ``condition()``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value


def need(package: str) -> None:
    """Skips the test where ``package`` is not installed; importing it here would take seconds."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def run(folder: Path, steps: range, resume_step: int | None = None, **options: str) -> Tracker:
    tracker = Tracker(folder, Config(wandb_project="cats", **options), resume_step)
    for step in steps:
        tracker.log({"loss": 1 / step}, step)
    return tracker


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What each warning begins with."""
    return [
        record.getMessage().partition(";")[0] for record in caplog.records if record.levelname == "WARNING"
    ]
