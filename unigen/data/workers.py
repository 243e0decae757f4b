"""Tasks done in several processes: results in the order of the tasks; a process that dies takes nothing
with it.

A process of a pool that dies breaks the pool, which cannot say which task it died of. So every lost task
is done again alone, in a process that says where it is: that names the one record that a decoder dies of.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from unigen import plugins
from unigen.config import UserError
from unigen.printing import guard

PartTask = TypeVar("Task")
Mark = Callable[[int], None]
TaskWork = Callable[[Any, Mark], Any]

_STARTING, _READY = -2, -1
# tasks per process that may be done before their turn: the slowest one holds up no more than these
_AHEAD = 4
_KILLED = 137  # exit code of a process that the kernel ended for want of memory


class WorkersFailed(UserError):
    """The processes cannot even start."""


class Died(NamedTuple):
    """A process that ended in the middle of a task."""

    step: int  # what it marked last in this task; -1 when nothing
    reason: str


class _Raised(NamedTuple):
    trace: str


def in_order(
    prepare: Callable[..., TaskWork],
    arguments: tuple,
    tasks: Iterable[PartTask],
    processes: int,
    again: Callable[[PartTask, Died], PartTask | None],
    context: Any = None,
) -> Iterator[tuple[PartTask, Any]]:
    """``(task, result)`` of every task, in their order, whatever the number of processes.

    Closing the iterator ends the processes at their next mark; a keyboard interrupt reaches the caller alone.

    Args:
        prepare: Called once in each process, importable by name; gives what does a task: ``work(task,
            mark)``. It calls ``mark(step)`` (steps from 0) before anything that might kill it.
        arguments: Its arguments, which travel to the processes.
        tasks: Read only a little ahead.
        processes: How many; 0 does everything in this process, where nothing is caught.
        again: Called when a process died: the task to try in place of this one, or None to go on without it.
            Then the result is the :class:`Died`.
        context: How processes start, of ``multiprocessing``; by default from a clean one.

    Raises:
        WorkersFailed: The processes die before their first task.
        Exception: What ``work`` raised.
    """
    if processes < 1:
        work = prepare(*arguments)
        for task in tasks:
            yield task, work(task, lambda step: None)
        return
    context = context or _context(prepare.__module__)
    stop = context.Value("b", False, lock=False)
    upcoming = iter(tasks)
    ahead: deque[tuple[PartTask, Future[Any]]] = deque()
    pool: ProcessPoolExecutor | None = None
    try:
        while True:
            while len(ahead) < processes * _AHEAD and (task := next(upcoming, None)) is not None:
                try:
                    assert pool is not None
                    future = pool.submit(_do, task)
                except (AssertionError, BrokenProcessPool):
                    begin = (stop, plugins.plugin_names(), prepare, arguments)
                    pool = ProcessPoolExecutor(processes, context, _begin, begin)
                    future = pool.submit(_do, task)
                ahead.append((task, future))
            if not ahead:
                return
            task, future = ahead.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                result = _alone(context, prepare, arguments, task)
                while isinstance(result, Died) and (other := again(task, result)) is not None:
                    task, result = other, _alone(context, prepare, arguments, other)
            yield task, result
    finally:
        stop.value = True
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _alone(context: Any, prepare: Callable[..., TaskWork], arguments: tuple, task: Any) -> Any:
    """The result of a task in a process of its own, or :class:`Died`."""
    at = context.Value("q", _STARTING, lock=False)
    pipe, other = context.Pipe(duplex=False)
    process = context.Process(
        target=_serve, args=(other, at, plugins.plugin_names(), prepare, arguments, task), daemon=True
    )
    process.start()
    other.close()
    try:
        result = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        reason = _reason(process.exitcode)
        if at.value == _STARTING:
            fix = "free some memory, or use fewer with --num_workers"
            raise WorkersFailed(f"the worker processes end while they start ({reason}). Fix: {fix}") from None
        return Died(at.value, reason)
    finally:
        pipe.close()
        process.terminate()
        process.join()
    if isinstance(result, _Raised):
        raise RuntimeError(f"in a worker process:\n{result.trace}")
    return result


def _context(module: str) -> Any:
    """Processes forked from a clean one that has imported ``module`` already: forking this one, with its
    threads, is not safe, and importing PyTorch in every process takes seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, module])
    return context


# ---- in the processes

_stop: Any
_work: TaskWork


def _begin(stop: Any, added: list[str], prepare: Callable[..., TaskWork], arguments: tuple) -> None:
    """Prepares a process of the pool."""
    global _stop, _work
    _stop, _work = stop, _prepared(added, prepare, arguments)


def _prepared(added: list[str], prepare: Callable[..., TaskWork], arguments: tuple) -> TaskWork:
    guard()
    plugins.load(added)
    for name in ("SIGTERM", "SIGUSR1", "SIGHUP"):  # what a parent made of them is not inherited
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread a process is the point of processes
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return prepare(*arguments)


def _do(task: Any) -> Any:
    def mark(step: int) -> None:
        if _stop.value:
            raise KeyboardInterrupt

    return _done(_work, task, mark)


def _serve(
    pipe: Connection, at: Any, added: list[str], prepare: Callable[..., TaskWork], arguments: tuple, task: Any
) -> None:
    """The life of a process that does one task."""

    def mark(step: int) -> None:
        at.value = step

    try:
        work = _prepared(added, prepare, arguments)
        mark(_READY)
        pipe.send(_done(work, task, mark))
    except Exception:
        pipe.send(_Raised(traceback.format_exc()))


def _done(work: TaskWork, task: Any, mark: Mark) -> Any:
    try:
        return work(task, mark)
    except MemoryError:
        os._exit(_KILLED)  # as the kernel would have ended it: the step it was at counts as its cause


def _reason(code: int | None) -> str:
    if code in (-signal.SIGKILL, _KILLED):
        return "it was killed, most likely for want of memory"
    if code is not None and code < 0:
        return f"it was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"it ended with exit code {code}"
