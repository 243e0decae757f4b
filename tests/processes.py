"""Tests of several processes: started in a fraction of a second, each with one thread, ended whatever
happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from kills import context, free_port


def run_ranks(work: Callable[..., None], world: int, *given: Any, seconds: float = 120.0) -> None:
    """``work(rank, world, port, *given)`` on ``world`` processes; the error of one is raised here, and a hang
    is an error, too.

    A process of these begins with ``become_rank``.
    """
    context()  # new processes are forks of one that has imported everything
    started = torch.multiprocessing.start_processes(
        work, (world, free_port(), *given), nprocs=world, join=False, start_method="forkserver"
    )  # fmt: skip
    deadline = time.monotonic() + seconds
    try:
        while not started.join(timeout=1.0):
            assert time.monotonic() < deadline, f"the processes hang: {seconds} s have passed"
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
