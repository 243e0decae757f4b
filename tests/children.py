"""Programs under test in processes of their own, for tests of signals and hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAD = """
import ctypes, os, signal, sys, threading, time
from unigen.runs.signals import SignalHandler, Stopped, shielded, worker_init
from unigen.runs.heartbeat import Heartbeat

def say(*words):
    print(*words, flush=True)
"""


class Child:
    """A program under test; whatever happens, it does not outlive the test."""

    def __init__(
        self, code: str, *args: object, env: dict[str, str] | None = None, before: list[str] | None = None
    ):
        command = [*(before or []), sys.executable, "-c", HEAD + code, *map(str, args)]
        variables = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": "1",
            **(env or {}),
        }
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
            start_new_session=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        patience = threading.Timer(30, self.kill)
        patience.start()
        try:
            return self.process.stdout.readline().strip()
        finally:
            patience.cancel()

    def kill(self) -> None:
        """Ends it and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, timeout: float = 20) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


@pytest.fixture
def start() -> Iterator[type[Child]]:
    children: list[Child] = []

    def make(*args: object, **options: object) -> Child:
        children.append(Child(*args, **options))  # type: ignore[arg-type]
        return children[-1]

    yield make  # type: ignore[misc]
    for child in children:
        child.kill()
        child.process.communicate()
