"""Signals: how a run is told to stop, and what of it may be broken off.

The first signal only asks: the run finishes the phase it is in, saves the last finished step, and ends with
``EXIT_STOPPED``. A second one ends the process at once, also where the main thread is stuck in C code: the
interpreter's C handler writes every signal into a pipe, and a thread reads that. No PyTorch here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from unigen.messages import in_language
from unigen.printing import printable

EXIT_STOPPED = 75
"""Stopped by a signal, the last finished step is saved: run again with ``--resume_from_checkpoint auto``
(EX_TEMPFAIL)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""All mean the same. SIGUSR1 is what SLURM is usually told to send before the end; SIGHUP comes when a
terminal closes."""

_DEBOUNCE_S = 1.0  # Ctrl-C reaches a process from the terminal, and some milliseconds later from torchrun
_LOOK_S = 0.1


class Stopped(BaseException):
    """A signal broke off a phase, or ended the run. No ``except Exception`` may swallow it."""


class Phase:
    """A part of the run, as a context manager: see :meth:`SignalHandler.phase`."""

    __slots__ = ("_handler", "breakable", "name", "outer", "since")

    def __init__(self, handler: SignalHandler, name: str, breakable: bool):
        self._handler, self.name, self.breakable = handler, name, breakable
        self.outer: Phase | None = None
        self.since = 0.0  # unix seconds

    def __enter__(self) -> Phase:
        handler = self._handler
        if handler.belongs_here():
            self.outer, self.since, handler.moved = handler.at, time.time(), time.monotonic()
            if self.breakable and handler.asked:
                handler.break_off(self)
            handler.at = self
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        handler = self._handler
        if not handler.belongs_here():
            return
        handler.at, handler.moved = self.outer, time.monotonic()
        # Also what a signal did not break off by itself: it came in a phase inside this one, or code that may
        # not raise (__del__) had to handle it.
        if kind is None and handler.asked:
            for phase in (self, self.outer):
                if phase is not None and phase.breakable:
                    handler.break_off(phase)


class SignalHandler:
    """Context manager around a run: SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask it to stop; the earlier handlers
    come back at its end.

    Handlers need the main thread; in another one (a notebook's, a server's) signals stay as they are and
    phases are tracked all the same. SIGINT and SIGHUP stay ignored where the program was started so
    (``nohup``, background jobs of a script).

    Attributes:
        signal: the number of the first signal that came, or None.
        entered: is this inside of the run?
        at: the innermost phase.
        moved: when it last changed, by ``time.monotonic()``.
    """

    def __init__(self) -> None:
        self.entered = False
        self._earlier: dict[int, Any] = {}
        self._earlier_fd = -1
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._begin(None)

    def _begin(self, owner: int | None) -> None:
        self.signal: int | None = None
        self.at: Phase | None = None
        self.moved = time.monotonic()
        self._owner = owner  # the thread whose phases are tracked
        self._handled = False
        self._met: Phase | None = None  # the phase in which the first signal came

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def phase(self, name: str, breakable: bool = False) -> Phase:
        """``with signals.phase("data", breakable=True):``. Phases nest; the innermost one counts.

        Raises:
            Stopped: out of a breakable phase, as soon as the first signal comes, or at its start where one
                has come before. Out of another phase never: there, ``asked`` is all that changes.
        """
        return Phase(self, name, breakable)

    def belongs_here(self) -> bool:
        """Is this the thread whose phases are tracked? (A checkpoint is written beside it.)"""
        return self._owner in (None, threading.get_ident())

    def break_off(self, phase: Phase) -> None:
        """Raises Stopped out of a breakable phase, which is over by that."""
        self._handled = True
        # The raise may come before or after the body of the with statement, where no __exit__ follows.
        self.at = phase.outer
        raise Stopped

    def __enter__(self) -> SignalHandler:
        assert not self.entered, "one run at a time"
        self._begin(threading.get_ident())
        self.entered = True
        if threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is not None and self._thread is not None:
            self._give_back()
            os.write(self._pipe[1], b"\0")
            self._thread.join(_DEBOUNCE_S)
            for end in self._pipe:
                os.close(end)
            self._pipe = None
            self._earlier.clear()
        self.entered, self.at, self._owner = False, None, None

    # ---- the main thread

    def _listen(self) -> None:
        global _listening
        reading, writing = self._pipe = os.pipe()
        os.set_blocking(writing, False)
        self._earlier_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(
            target=self._attend, args=(reading,), name="unigen-signals", daemon=True
        )
        self._thread.start()
        _listening = self
        for number in SIGNALS:
            earlier = signal.getsignal(number)
            # Whoever starts a program with these two ignored means it to outlive his Ctrl-C and his terminal.
            if earlier != signal.SIG_IGN or number not in (signal.SIGINT, signal.SIGHUP):
                self._earlier[number] = earlier
                signal.signal(number, self._handle)

    def _give_back(self) -> None:
        global _listening
        _listening = None
        signal.set_wakeup_fd(self._earlier_fd)
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between any two instructions of it. Counting is left to :meth:`_attend`:
        here a signal may arrive late."""
        self._note(number)
        if not self._handled:
            self._handled = True
            if self.at is not None and self.at.breakable:
                self.break_off(self.at)

    # ---- the thread beside it

    def _attend(self, reading: int) -> None:
        """Speaks of the first signal, and ends the process at the second, whatever the main thread does."""
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        first = empty = 0.0
        while True:
            before = time.monotonic()
            if not poll.poll(1000 * _LOOK_S if first else None):
                empty = before
                continue
            for number in os.read(reading, 64):
                if number == 0:
                    return
                if number not in self._earlier:
                    continue  # another's signal, SIGCHLD for one
                name = signal.Signals(number).name
                if not first:
                    first = empty = time.monotonic()
                    self._note(number)
                    met = f"phase {self._met.name}" if self._met else "what is under way"
                    at_once = self._met is not None and self._met.breakable
                    _say(
                        f"{name}: {met} is {'broken off' if at_once else 'finished'}, then the last finished"
                        f" step is saved and the run ends (exit code {EXIT_STOPPED}). A second signal ends it"
                        " at once, unsaved"
                    )
                elif empty - first >= _DEBOUNCE_S:
                    # It came after the pipe was last seen empty; how long after cannot be known, C code may
                    # have held the interpreter.
                    _say(f"{name} again: ended at once, nothing more is saved")
                    os._exit(128 + number)

    def _note(self, number: int) -> None:
        """The first signal; by whichever of the two threads sees it first."""
        if self.signal is None:
            self._met, self.signal = self.at, number


def _say(text: str) -> None:
    rank = f" [rank {os.environ.get('RANK', '?')}]" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print_at_once(f"unigen{rank}: {printable(in_language(text))}\n")


def print_at_once(text: str) -> None:
    """On stderr, past Python's buffers, which the main thread may hold; the terminal may be gone."""
    data = text.encode()
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


# ---- child processes

_listening: SignalHandler | None = None


def _after_fork() -> None:
    """A forked child is no part of the run: its signals must not reach the parent's pipe."""
    handler = _listening
    if handler is not None:
        handler._give_back()
        for end in handler._pipe or ():
            os.close(end)
        handler._pipe, handler.entered = None, False


os.register_at_fork(after_in_child=_after_fork)


_of_workers: Any = None  # PyTorch's handler of SIGCHLD, which raises RuntimeError where a worker has died


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside have the stop signals blocked from their first moment until
    :func:`worker_init` sees to them.

    For ``iter(loader)``: a signal to the whole process group must not kill a worker that is just starting.
    PyTorch's handler of SIGCHLD would raise anywhere in the main thread, in the middle of an update too: it
    is kept for :func:`watching_workers`.
    """
    global _of_workers
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "") == "torch.utils.data._utils.signal_handling":
        # a loader of someone else's was there first, and PyTorch sets its handler once in a process
        _of_workers, before = before, signal.SIG_DFL
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        if (found := signal.getsignal(signal.SIGCHLD)) is not before:
            _of_workers = found
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


@contextlib.contextmanager
def watching_workers() -> Iterator[None]:
    """Around the waiting for a worker: where one dies, or has died, RuntimeError says so. (What a killed one
    had half sent would else be waited for without end.)"""
    if _of_workers is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, _of_workers)
    try:
        _of_workers(signal.SIGCHLD, None)
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def worker_init(worker_id: int) -> None:
    """For ``DataLoader(worker_init_fn=...)``: a worker's end is its parent's business.

    Signals to the whole process group (Ctrl-C, torchrun, SLURM) pass it by. It ends when the loader ends it,
    when the parent asks by SIGTERM (as Python does at its exit), and within about a second of the parent's
    death, even while it decodes.
    """
    sys.excepthook = _told_of_errors
    if not hasattr(signal, "sigtimedwait"):  # macOS
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # threads that start later inherit it
    threading.Thread(target=_attend_parent, args=(os.getppid(),), name="unigen-parent", daemon=True).start()


def _told_of_errors(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A thread of a worker hands tensors over; that the parent was broken off while it took one is no
    error."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _attend_parent(born_of: int) -> None:
    """Ends a worker with its parent, or where that asks for it."""
    parent = multiprocessing.parent_process()
    while True:
        came = signal.sigtimedwait(SIGNALS, 1.0)
        if came and came.si_signo == signal.SIGTERM and parent is not None and came.si_pid == parent.pid:
            os._exit(128 + signal.SIGTERM)
        # The loader itself looks for its parent only between two packed sequences, and not while a pipe that
        # nobody reads any more is full.
        if os.getppid() != born_of or (parent is not None and not parent.is_alive()):
            os._exit(1)
