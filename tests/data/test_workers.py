"""Processes: results in order, a death named and survived, nothing left running."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from unigen.data.workers import Died, WorkersFailed, in_order

Task = tuple[str, int]


def prepare(greeting: str) -> Callable:
    if greeting == "die":
        os.kill(os.getpid(), signal.SIGKILL)

    def work(task: Task, mark: Callable[[int], None]) -> str:
        kind, n = task
        for step in range(3):
            mark(step)
            if kind == "kill" and step == 1:
                os.kill(os.getpid(), n)
            if kind == "exit" and step == 2:
                os._exit(n)
        if kind == "kill at once":
            mark(-1)
            os.kill(os.getpid(), n)
        if kind == "sleep":
            for _ in range(n):
                mark(3)
                time.sleep(0.01)
        if kind == "raise":
            raise ValueError(f"number {n}")
        if kind == "memory":
            raise MemoryError
        return f"{greeting} {n} {os.getpid()}"

    return work


def never(task: Task, died: Died) -> None:
    raise AssertionError(f"{task}: {died}")


def run(tasks: list[Task], processes: int, again: Callable = never) -> list:
    return list(in_order(prepare, ("hello",), tasks, processes, again))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_the_order_of_their_tasks(processes):
    tasks = [("sleep", n) for n in (30, 0, 10, 0, 0, 20, 0, 1, 2, 3)]
    found = run(tasks, processes)
    assert [task for task, _ in found] == tasks
    assert [result.split()[:2] for _, result in found] == [["hello", str(n)] for _, n in tasks]
    pids = {int(result.split()[2]) for _, result in found}
    assert (
        (pids == {os.getpid()})
        if processes == 0
        else (1 <= len(pids) <= processes and os.getpid() not in pids)
    )
    assert run([], processes) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "step", "reason"),
    [
        (("kill", signal.SIGKILL), 1, "killed, most likely for want of memory"),
        (("kill", signal.SIGSEGV), 1, "SIGSEGV"),
        (("exit", 3), 2, "exit code 3"),
        (("kill at once", signal.SIGKILL), -1, "killed"),
        (("memory", 0), 2, "want of memory"),
    ],
)
def test_a_death_is_named_and_the_others_go_on(task, step, reason):
    deaths = []

    def again(task: Task, died: Died) -> None:
        deaths.append((task, died))

    found = run([("go", 1), task, ("go", 2), ("go", 3)], 2, again)
    assert [result.split()[1] if isinstance(result, str) else result for _, result in found] == [
        "1",
        deaths[0][1],
        "2",
        "3",
    ]
    assert deaths[0][0] == task and len(deaths) == 1
    assert deaths[0][1].step == step and reason in deaths[0][1].reason


def test_a_task_is_tried_again_in_its_place():
    found = run([("go", 1), ("kill", signal.SIGKILL), ("go", 3)], 1, lambda task, died: ("go", 2))
    assert [(task, result.split()[1]) for task, result in found] == [
        (("go", 1), "1"),
        (("go", 2), "2"),
        (("go", 3), "3"),
    ]


def test_an_error_of_ours_is_raised_with_its_trace():
    with pytest.raises(ValueError, match="number 7") as error:
        run([("go", 1), ("raise", 7)], 1)
    assert "in work" in str(error.value.__cause__)


def test_an_error_after_a_death_is_raised_with_its_trace():
    """What was lost with the pool is done again alone."""
    with pytest.raises(RuntimeError, match=r"(?s)in work.*ValueError: number 7"):
        run([("kill", signal.SIGKILL), ("raise", 7)], 1, lambda task, died: None)


def test_processes_that_cannot_start_are_an_error_of_the_user():
    with pytest.raises(WorkersFailed, match=r"end while they start.*killed.*--num_workers"):
        list(in_order(prepare, ("die",), [("go", 1)], 1, never))


def test_closing_ends_the_processes_at_their_next_mark():
    results = in_order(prepare, ("hello",), [("go", 1), *[("sleep", 1_000_000)] * 8], 2, never)
    pid = int(next(results)[1].split()[2])
    os.kill(pid, 0)
    results.close()  # would take hours
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
