"""Heartbeats of every process, and the report when one hangs: which rank, step, phase, and where its code
stands.

Two threads beside the run: one counts time and never touches a disk, the other writes and reads the files of
``ranks/``. Where C code holds the interpreter, neither can run; then faulthandler's timer, which needs no
interpreter, prints the stacks and ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unigen.files import atomic
from unigen.messages import in_language, spoken
from unigen.printing import printable
from unigen.runs.layout import HANG, heartbeat_file, rank_of, stack_file
from unigen.runs.ranks import Hang, Rank, RankFiles, find_hang, parse
from unigen.runs.signals import SignalHandler, print_at_once

EXIT_HUNG = 76
"""A process made no progress for ``hang_timeout`` seconds."""

_BEAT_S = 2.0
_STDERR = 2


class Heartbeat:
    """Heartbeats of this process into ``folder``, and the report when it, or another, hangs.

    ``rank_R.json``, every two seconds: rank, world, started (unix seconds when the process began), step,
    phase, since (unix seconds when this phase or step began), quiet (seconds without progress), time (unix,
    of this heartbeat), pid, host, signal (its name, where one has asked for the end), and what ``facts``
    gives. At the end of the run the phase is "ended".

    Progress is a :meth:`beat` or a change of ``signals``' phase. Without any for ``timeout`` seconds the
    process prints its stacks, also into ``rank_R.stack.txt``. Where no other process moves any more, or after
    twice the time, the first to notice says who holds up the others (``hang.txt``), and all end with
    ``EXIT_HUNG``; one whose interpreter C code holds ends with 1. Time in which the machine sleeps or the
    process is frozen does not count, except that a process that C code held, or that was frozen for longer
    than ``timeout``, ends when it goes on.

    Outside of a run (``signals`` not entered) there are no heartbeats and no end.

    Args:
        folder: made here; shared by all processes.
        rank, world: of this process, and how many there are.
        timeout: seconds; 0: heartbeats only.
        signals: tells the phases.
        facts: more for the heartbeat, of plain JSON types; called by a thread.
    """

    def __init__(
        self, folder: Path, rank: int, world: int, timeout: float, signals: SignalHandler,
        facts: Callable[[], dict[str, Any]] = dict,
    ):  # fmt: skip
        self.folder, self.rank, self.world, self.timeout = Path(folder), rank, world, timeout
        self._signals, self._facts = signals, facts
        self._peers = RankFiles(self.folder)
        self._started = self._since = time.time()
        self._step, self._moved, self._quiet = 0, time.monotonic(), 0.0
        self._period = min(_BEAT_S, max(timeout / 8, 0.2)) if timeout else _BEAT_S
        self._patience = max(2.5 * self._period, 1.0)  # in this time the file of a living process changes
        self._late_since: float | None = None  # no progress for too long
        self._looked = 0.0  # when the thread of the files had last done its work
        self._over = False  # nobody moves any more, and it is said
        self._closing, self._wake = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        if signals.entered:
            self._clear()
            self._arm()
            for work in [self._keep_files, self._watch] if timeout else [self._keep_files]:
                self._threads.append(threading.Thread(target=work, name="unigen-heartbeat", daemon=True))
                self._threads[-1].start()

    def beat(self, step: int) -> None:
        """Progress was made; ``step`` steps are done."""
        self._moved = time.monotonic()
        if step != self._step:
            self._step, self._since = step, time.time()

    def move(self, folder: Path) -> None:
        """Goes on in another folder, to which rank 0 has moved the files of all processes."""
        self.folder, self._peers = Path(folder), RankFiles(folder)

    def close(self) -> None:
        """The end of the run: no more heartbeats, and nothing ends the process any more."""
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(_BEAT_S)  # a disk that hangs must not hold up the end
        if self._threads and self.timeout:
            faulthandler.cancel_dump_traceback_later()
        self._threads = []

    # ---- the thread that counts

    def _watch(self) -> None:
        last, seen = time.monotonic(), -1.0
        while not self._closing.wait(self._period / 2):
            if not self._signals.entered:  # a run that ended without close()
                faulthandler.cancel_dump_traceback_later()
                return
            self._arm()
            now = time.monotonic()
            # After more than a moment too much this process was frozen, or the interpreter held: that is no
            # time of ours.
            passed, last = min(now - last, 2 * self._period), now
            moved = max(self._moved, self._signals.moved)
            self._quiet = min(now - moved, passed) if moved != seen else self._quiet + passed
            seen = moved
            if self._quiet < self.timeout:
                self._late_since, self._over = None, False
            elif self._late_since is None:
                self._late_since = now
                self._wake.set()
                print_at_once(f"{in_language(self._head())}\n")
                faulthandler.dump_traceback(_STDERR)
            elif (
                self._over
                or self._quiet >= 2 * self.timeout + self._patience
                or min(now - self._late_since, now - self._looked) > self._patience  # the disk hangs as well
            ):
                self._end()

    def _arm(self) -> None:
        """The second line of defence: needs neither the interpreter nor a thread of Python's. It comes later
        than all reports, so that those of the others, who only wait, come first."""
        if self.timeout:
            seconds = self.timeout + self._patience + 2 * self._period
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def _end(self) -> None:
        if self.world > 1:
            # a launcher ends the others as soon as one has ended; they have their stacks to write
            time.sleep(self._period)
        os._exit(EXIT_HUNG)

    def _head(self) -> str:
        now = self._beat()
        return (
            f"rank {self.rank} of {self.world} (host {now['host']}, pid {now['pid']}) has made no progress"
            f" for {now['quiet']:.0f} s: step {now['step']}, {_phase(now['phase'])}"
        )

    # ---- the thread that has to do with files

    def _keep_files(self) -> None:
        stack = False
        while True:
            closing = self._closing.is_set()  # before the heartbeat, so that the last one says so
            late_since = None if closing else self._late_since
            self._write("ended" if closing else None)
            stack = self._keep_stack(late_since is not None, stack)
            if closing or not self._signals.entered:
                return
            if late_since is not None and not self._over:
                self._over = self.world == 1 or self._nobody_moves(late_since)
            self._looked = time.monotonic()
            # While there is a report to make, changes must be seen early.
            self._wake.wait(self._period if late_since is None else self._period / 2)
            self._wake.clear()

    def _write(self, phase: str | None) -> None:
        # A disk that is full or gone costs heartbeats, nothing else.
        place = self.folder / heartbeat_file(self.rank)
        draft = self.folder / f".{place.name}.partial"
        with contextlib.suppress(OSError), atomic(place, draft, sync=False) as file:
            file.write(json.dumps(self._beat(phase), default=str).encode())

    def _beat(self, phase: str | None = None) -> dict[str, Any]:
        at = self._signals.at
        facts: dict[str, Any] = {}
        if self._signals.signal:
            facts["signal"] = signal.Signals(self._signals.signal).name
        with contextlib.suppress(Exception):  # it reads what the main thread is changing
            facts |= self._facts()
        return {
            "rank": self.rank, "world": self.world, "started": self._started, "step": self._step,
            "phase": phase or (at.name if at else ""),
            "since": max(self._since, at.since if at else 0.0), "quiet": round(self._quiet, 1),
            "time": time.time(), "pid": os.getpid(), "host": platform.node(), **facts,
        }  # fmt: skip

    def _keep_stack(self, late: bool, there: bool) -> bool:
        """Writes the stacks of a process that is late, and removes those of one that goes on; are they there
        then?"""
        path = self.folder / stack_file(self.rank)
        with contextlib.suppress(OSError):
            if late and not there:
                with open(path, "w", encoding="utf-8") as file:
                    print(self._head(), file=file, flush=True)
                    faulthandler.dump_traceback(file)
            elif there and not late:
                path.unlink()
        return late

    def _nobody_moves(self, late_since: float) -> bool:
        """Does no other process move any more? The first to find that says who holds up the others."""
        ranks = {rank.rank: rank for rank in self._peers.read() if rank.rank < self.world}
        own = parse(self._beat())
        assert own is not None
        ranks[self.rank] = own
        if time.monotonic() - late_since < self._patience:
            return False
        hang = find_hang(list(ranks.values()), self.timeout, self._patience)
        if hang is None or (hang.moving and self._quiet < 2 * self.timeout):
            return False
        lines = _told(hang)
        if missing := [rank for rank in range(self.world) if rank not in ranks]:
            lines.insert(0, f"{_ranks(missing)}: no heartbeat in {self.folder}")
        text = "".join(f"unigen: {printable(in_language(line))}\n" for line in lines)
        with contextlib.suppress(OSError):
            try:
                with open(self.folder / HANG, "x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:  # another process has said it
                return True
        print_at_once(text)
        return True

    def _clear(self) -> None:
        """What an earlier run left. Each file has one owner, so nobody removes what another has just written;
        those of ranks that there are no more, and of all together, belong to rank 0."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(self.folder):
                owner = 0 if name == HANG else rank_of(name.removeprefix(".").removesuffix(".partial"))
                if owner is not None and (owner if owner < self.world else 0) == self.rank:
                    (self.folder / name).unlink(missing_ok=True)


# ---- words


def _told(hang: Hang) -> list[str]:
    """Who hangs and who waits: "ranks 0, 2: step 8, phase data, waits for 61 s"."""
    lines = []
    for kind in ("silent", "moving", "hung", "waiting"):
        places: dict[tuple[int, str], list[Rank]] = {}
        for rank in getattr(hang, kind):
            places.setdefault((rank.step, rank.phase), []).append(rank)
        for (step, phase), ranks in places.items():
            since = round(max(rank.age if kind == "silent" else rank.quiet for rank in ranks))
            who = _ranks([rank.rank for rank in ranks])
            lines.append(_line(hang, kind, who, step, _phase(phase), since))
    return lines


def _line(hang: Hang, kind: str, who: str, step: int, phase: str, seconds: int) -> str:
    """Whole sentences, as each has its own in another language."""
    if kind == "silent":
        return f"{who}: step {step}, {phase}, no sign of life for {seconds} s"
    if kind == "moving":
        return f"{who}: step {step}, {phase}, moves, last {seconds} s ago"
    if kind == "waiting":
        return f"{who}: step {step}, {phase}, waits for {seconds} s"
    if hang.moving:
        return f"{who}: step {step}, {phase}, hangs or waits for who moves, for {seconds} s"
    if hang.together:
        return (
            f"{who}: step {step}, {phase}, hangs like all for {seconds} s"
            " (or a collective never ends: compare the stacks)"
        )
    return f"{who}: step {step}, {phase}, hangs for {seconds} s"


def _phase(name: str) -> str:
    return f"phase {name}" if name else "between two phases"


def _ranks(numbers: list[int]) -> str:
    """rank 3; ranks 0, 2-5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    sign = "、" if spoken() == "zh" else ", "
    told = sign.join(f"{run[0]}-{run[-1]}" if len(run) > 2 else sign.join(map(str, run)) for run in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {told}"
