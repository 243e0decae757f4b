"""Processes that work through tasks: results in the order of the tasks, and a process that dies takes nothing
with it.

A plain pool cannot say which task killed a process, nor of what it died. Here every process says what it is
at, so that the one record that a decoder dies of can be named and left out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import connection
from typing import Any, NamedTuple, TypeVar

from unigen.config import UserError

Task = TypeVar("Task")
Mark = Callable[[int], None]
Work = Callable[[Any, Mark], Any]

_STARTING, _IDLE = -2, -1
_PATIENCE = 0.2  # seconds between two looks at the progress
# tasks per process that may be done before their turn: the slowest one holds up no more than these
_AHEAD = 4


class WorkersFailed(UserError):
    """The processes cannot even start."""


class Died(NamedTuple):
    """A process that ended in the middle of a task."""

    step: int  # what it marked last in this task; -1 when nothing
    reason: str


class _Raised(NamedTuple):
    trace: str


class _Worker:
    """One process, its pipe, and the number of the task it has."""

    def __init__(self, context: Any, prepare: Callable[..., Work], arguments: tuple):
        self.at = context.Value("q", _STARTING, lock=False)
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.at, prepare, arguments), daemon=True)
        self.process.start()
        other.close()
        self.number: int | None = None

    def give(self, number: int, task: Any) -> None:
        self.number = number
        # it has died; receiving finds that out and says of what
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(task)

    def take(self) -> Any:
        """The result of its task, or :class:`Died`."""
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            if self.at.value == _STARTING:
                fix = "free some memory, or use fewer with --num_workers"
                raise WorkersFailed(
                    f"the worker processes end while they start ({_reason(self.process.exitcode)}); {fix}"
                ) from None
            return Died(self.at.value, _reason(self.process.exitcode))
        if isinstance(result, _Raised):
            raise RuntimeError(f"in a worker process:\n{result.trace}")
        self.number = None
        self.at.value = _IDLE
        return result

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def in_order(
    prepare: Callable[..., Work],
    arguments: tuple,
    tasks: Iterable[Task],
    processes: int,
    again: Callable[[Task, Died], Task | None],
    tick: Callable[[int], None] = lambda steps: None,
) -> Iterator[tuple[Task, Any]]:
    """``(task, result)`` of every task, in their order, whatever the number of processes.

    Closing the iterator ends the processes at once; a keyboard interrupt reaches the caller alone.

    Args:
        prepare: Called once in each process, importable by name; gives what does a task: ``work(task,
            mark)``. It calls ``mark(step)`` (steps from 0) before anything that might kill it.
        arguments: Its arguments, which travel to the processes.
        tasks: Read only a little ahead.
        processes: How many; 0 does everything in this process, where nothing is caught.
        again: Called when a process died: the task to try in place of this one, or None to go on without it.
            Then the result is the :class:`Died`.
        tick: Called now and then with the steps marked in unfinished tasks.

    Raises:
        WorkersFailed: The processes die before their first task.
        RuntimeError: ``work`` raised; with its trace.
    """
    if processes < 1:
        work = prepare(*arguments)
        for task in tasks:
            yield task, work(task, lambda step: None)
        return
    context = _context(prepare.__module__)
    queue = enumerate(tasks)
    pending: dict[int, Task] = {}
    done: dict[int, Any] = {}
    workers: list[_Worker] = []
    turn, more = 0, True
    try:
        while True:
            idle = [worker for worker in workers if worker.number is None]
            while more and len(pending) < processes * _AHEAD and (idle or len(workers) < processes):
                entry = next(queue, None)
                if entry is None:
                    more = False
                    break
                if not idle:
                    workers.append(_Worker(context, prepare, arguments))
                    idle = [workers[-1]]
                pending[entry[0]] = entry[1]
                idle.pop().give(*entry)
            busy = {worker.pipe: worker for worker in workers if worker.number is not None}
            if not busy:
                return
            for pipe in connection.wait(list(busy), _PATIENCE):
                _collect(
                    busy[pipe], workers, pending, done, again, lambda: _Worker(context, prepare, arguments)
                )
            tick(sum(max(worker.at.value + 1, 0) for worker in busy.values()))
            while turn in done:
                yield pending.pop(turn), done.pop(turn)
                turn += 1
    finally:
        for worker in workers:
            worker.stop()


def _collect(
    worker: _Worker,
    workers: list[_Worker],
    pending: dict[int, Any],
    done: dict[int, Any],
    again: Callable[[Any, Died], Any],
    start: Callable[[], _Worker],
) -> None:
    """Takes what a process has; one that died is replaced, and its task given to the new one or given up."""
    number = worker.number
    assert number is not None
    result = worker.take()
    if isinstance(result, Died):
        workers.remove(worker)
        worker.stop()
        task = again(pending[number], result)
        if task is not None:
            pending[number] = task
            workers.append(start())
            workers[-1].give(number, task)
            return
    done[number] = result


def _context(module: str) -> Any:
    """Processes forked from a clean one that has imported ``module`` already: forking this one, with its
    threads, is not safe, and importing PyTorch in every process takes seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, module])
    return context


def _serve(pipe: connection.Connection, at: Any, prepare: Callable[..., Work], arguments: tuple) -> None:
    """The life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread a process is the point of processes
    _one_thread()

    def mark(step: int) -> None:
        at.value = step

    try:
        work = prepare(*arguments)
        at.value = _IDLE
        while True:
            try:
                task = pipe.recv()
            except EOFError:
                return  # the parent is gone
            at.value = _IDLE
            pipe.send(work(task, mark))
    except (BrokenPipeError, ConnectionResetError):
        return
    except MemoryError:
        os._exit(137)  # as the kernel would have ended it: the step it was at counts as its cause
    except Exception:
        pipe.send(_Raised(traceback.format_exc()))


def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _reason(code: int | None) -> str:
    if code == -signal.SIGKILL or code == 137:
        return "it was killed, most likely for want of memory"
    if code is not None and code < 0:
        return f"it was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"it ended with exit code {code}"
