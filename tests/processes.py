"""Tests of several processes: started in a fraction of a second, each with one thread, ended whatever
happens."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from kills import become_rank, context, free_port


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


def flags(options: dict[str, Any]) -> list[str]:
    """Options as a command line has them."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def start_command(output: Path, argv: list[str], world: int = 1, **variables: str) -> list[BaseProcess]:
    """``unigen ARGV`` as a program of its own, as a shell or torchrun starts it, in this folder and
    environment, but forked from a process that has imported everything: a start takes a tenth of the time of
    an interpreter's. What it prints goes to ``output``, of several processes to ``OUTPUT.RANK``."""
    given = (world, free_port(), str(output), argv, os.getcwd(), {**os.environ, **variables})
    processes = [context().Process(target=_command_as_rank, args=(rank, *given)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _command_as_rank(
    rank: int, world: int, port: int, output: str, argv: list[str], folder: str, variables: dict[str, str]
) -> None:
    os.setsid()  # what ends it and all it started ends no test
    multiprocessing.set_start_method("fork", force=True)  # as in a program that no forkserver has started
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    to = os.open(output if world == 1 else f"{output}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    torch.set_num_threads(1)
    if world > 1:
        become_rank(rank, world, port)
    from unigen.cli import program

    program(argv)


def printed_by(output: Path, world: int = 1) -> str:
    parts = [output] if world == 1 else [Path(f"{output}.{rank}") for rank in range(world)]
    return "".join(part.read_text("utf-8") for part in parts)


def end_of(processes: list[BaseProcess], seconds: float = 120.0) -> list[int | None]:
    """The exit codes; None of a process that had to be killed as it hangs."""
    deadline, codes = time.monotonic() + seconds, []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
    for process in processes:
        process.kill()
        process.join()
    return codes


def run_command(log: Path, argv: list[str], world: int = 1, code: int = 0) -> str:
    """As :func:`start_command`, to its end; what all processes printed. Each must end with ``code``."""
    codes = end_of(start_command(log, argv, world))
    printed = printed_by(log, world)
    assert codes == [code] * world, (codes, printed[-4000:])
    return printed


def wait_for(path: Path, process: BaseProcess, seconds: float = 120.0) -> None:
    """Until the file or folder is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive() and time.monotonic() < deadline, path
        time.sleep(0.005)
