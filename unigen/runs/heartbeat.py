"""Heartbeats of every process, and the report when one hangs: which rank, step, phase, and where its code
stands.

Two threads beside the run: one counts time and never touches a disk, the other writes and reads the files of
``ranks/``. Where C code holds the interpreter, neither can run; then faulthandler's timer, which needs no
interpreter, speaks and ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigen.files import atomic
from unigen.runs.layout import heartbeat_file, rank_of, stack_file

if TYPE_CHECKING:
    from unigen.runs.signals import SignalHandler

EXIT_HUNG = 76
"""A process made no progress for ``hang_timeout`` seconds."""

WAITING = "waiting for the others"
"""The phase of a process that only waits: it never holds up those that are in another one."""

_BEAT_S = 2.0
_STDERR = 2
_KEYS = ("step", "phase", "quiet", "time", "pid", "host")  # of a heartbeat, that others read


@dataclass
class _Peer:
    """Another process, as its file tells."""

    beat: dict[str, Any]
    # when its file last changed, by this machine's monotonic clock: clocks of several machines differ
    changed: float
    alive: bool = False  # has it changed since we look?


class Heartbeat:
    """Heartbeats of this process into ``folder``, and the report when it, or another, hangs.

    ``rank_R.json``, every two seconds: rank, world, started (unix seconds when the process began), step,
    phase, since (unix seconds when this phase or step began), quiet (seconds without progress), time (unix,
    of this heartbeat), pid, host, signal (its name, where one has asked for the end), and what ``facts``
    gives. At the end of the run the phase is "ended". ``rank_R.stack.txt``: after a hang.

    Progress is a :meth:`beat` or a change of ``stops``' phase. Without any for ``timeout`` seconds the
    process reports itself and, where no other process moves any more (or after twice the time), ends with
    ``EXIT_HUNG``; where C code holds the interpreter, with 1. Time in which the machine sleeps or the process
    is frozen does not count, except that a process that C code held, or that was frozen for longer than
    ``timeout``, ends when it goes on.

    Outside of a run (``stops`` not entered) there are no heartbeats and no end.

    Args:
        folder: made here; shared by all processes.
        rank, world: of this process, and how many there are.
        timeout: seconds; 0: heartbeats only.
        stops: tells the phases.
        facts: more for the heartbeat, of plain JSON types; called by a thread.
    """

    def __init__(
        self, folder: Path, rank: int, world: int, timeout: float, stops: SignalHandler, facts: Callable[[],
        dict[str, Any]] | None = None
    ):  # fmt: skip
        self.folder, self.rank, self.world, self.timeout = Path(folder), rank, world, timeout
        self._stops, self._facts = stops, facts
        self._started = time.time()
        self._step, self._since, self._moved = 0, time.time(), time.monotonic()
        self._quiet = 0.0
        self._period = min(_BEAT_S, max(timeout / 8, 0.2)) if timeout else _BEAT_S
        self._patience = max(2.5 * self._period, 1.0)  # in this time the file of a living process changes
        # Later than all reports, so that those of the others, who only wait, come first.
        self._last_resort = timeout + self._patience + 2 * self._period
        self._host = platform.node()
        self._closing, self._wake = threading.Event(), threading.Event()
        self._report = ""  # what is to be written of this process's hang
        self._late_since = 0.0
        self._deferred = False
        self._written = threading.Event()
        self._peers: dict[int, _Peer] = {}
        self._threads: list[threading.Thread] = []
        if stops.entered:
            self._clear()
            if timeout:
                self._arm(self._last_resort)
            self._threads = [
                threading.Thread(target=work, name="unigen-watch", daemon=True) for work in self._work()
            ]
            for thread in self._threads:
                thread.start()

    def beat(self, step: int) -> None:
        """Progress was made; ``step`` steps are done."""
        self._moved = time.monotonic()
        if step != self._step:
            self._step, self._since = step, time.time()

    def close(self) -> None:
        """The end of the run: no more heartbeats, and nothing ends the process any more."""
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(_BEAT_S)  # a disk that hangs must not hold up the end
        if self._threads and self.timeout:
            faulthandler.cancel_dump_traceback_later()
        self._threads = []

    def _work(self) -> list[Callable[[], None]]:
        return [self._keep_files, self._watch] if self.timeout else [self._keep_files]

    # ---- the thread that counts

    def _watch(self) -> None:
        tick = self._period / 2
        last, seen = time.monotonic(), -1.0
        while not self._closing.wait(tick):
            if not self._stops.entered:  # a run that ended without close()
                faulthandler.cancel_dump_traceback_later()
                return
            self._arm(self._last_resort)
            now = time.monotonic()
            # After more than a moment too much this process was frozen, or the interpreter held: that is no
            # time of ours.
            passed, last = min(now - last, 2 * self._period), now
            moved = max(self._moved, self._stops.moved)
            self._quiet = min(now - moved, passed) if moved != seen else self._quiet + passed
            seen = moved
            if self._quiet >= self.timeout:
                try:
                    self._late(now)
                except Exception as error:
                    self._end(f"unigen: no more can be said: {type(error).__name__}: {error}\n")
            elif self._report:
                self._report, self._deferred, self._peers = "", False, {}

    def _arm(self, seconds: float) -> None:
        """The second line of defence: needs neither the interpreter nor a thread of Python's."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def _late(self, now: float) -> None:
        """No progress for too long: reports it, and ends the process unless another one still moves."""
        if not self._report:
            self._written.clear()
            self._late_since, self._report = now, self._stack_report()
            self._wake.set()
        if self.world == 1:
            self._written.wait(self._patience)
            self._end("")
        if now - self._late_since < self._patience:
            return
        peers = dict(self._peers)
        moving = [r for r, p in peers.items() if self._is_alive(p, now) and p.beat["quiet"] < self.timeout]
        if not moving or self._quiet >= 2 * self.timeout:
            self._end(self._summary(peers, now))
        elif not self._deferred:
            self._deferred = True
            _say(
                f"{self._me()}: no progress for {self._quiet:.0f} s, but {_ranks(moving)} still moves:"
                " waiting up to as long again"
            )

    def _is_alive(self, peer: _Peer, now: float) -> bool:
        return peer.alive and now - peer.changed < self._patience and peer.beat["phase"] != "ended"

    def _end(self, summary: str) -> None:
        self._arm(self._patience + 2 * self._period)  # should stderr be blocked
        _say(self._report + summary)
        if self.world > 1:
            # a launcher ends the others as soon as one has ended; they have their report to make
            time.sleep(self._period)
        os._exit(EXIT_HUNG)

    # ---- the thread that has to do with files

    def _keep_files(self) -> None:
        reported = False
        while True:
            closing = self._closing.is_set()  # before the heartbeat, so that the last one says so
            self._write(
                heartbeat_file(self.rank),
                json.dumps(self._beat_of_now("ended" if closing else None), default=str),
            )
            report = "" if closing else self._report
            if report and not reported:
                self._write(stack_file(self.rank), report)
                self._written.set()
            elif reported and not report:
                self._unlink(stack_file(self.rank))
            if closing or not self._stops.entered:
                return
            reported = bool(report)
            if report and self.world > 1:
                self._look()
            # While there is a report to make, changes must be seen early.
            self._wake.wait(self._period / 2 if report else self._period)
            self._wake.clear()

    def _beat_of_now(self, phase: str | None = None) -> dict[str, Any]:
        at = self._stops.at
        facts: dict[str, Any] = (
            {"signal": signal.Signals(self._stops.signal).name} if self._stops.signal else {}
        )
        if self._facts is not None:
            with contextlib.suppress(Exception):  # it reads what the main thread is changing
                facts |= self._facts()
        return {
            "rank": self.rank, "world": self.world, "started": self._started, "step": self._step,
            "phase": phase or (at.name if at else ""),
            "since": max(self._since, at.since if at else 0.0), "quiet": round(self._quiet, 1),
            "time": time.time(),
            "pid": os.getpid(), "host": self._host, **facts,
        }  # fmt: skip

    def _write(self, name: str, text: str) -> None:
        # A disk that is full or gone costs heartbeats, nothing else.
        with (
            contextlib.suppress(OSError),
            atomic(self.folder / name, self.folder / f".{name}.partial", sync=False) as file,
        ):
            file.write(text.encode())

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _clear(self) -> None:
        """What an earlier run left. Each file has one owner, so nobody removes what another has just written;
        those of ranks that there are no more belong to rank 0."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in list(self.folder.iterdir()):
                rank = rank_of(path.name.removeprefix(".").removesuffix(".partial"))
                if rank == self.rank or (self.rank == 0 and rank is not None and rank >= self.world):
                    path.unlink(missing_ok=True)

    def _look(self) -> None:
        now, before = time.monotonic(), self._peers
        peers = dict(before)
        for rank in range(self.world):
            if rank == self.rank:
                continue
            # missing, or not of this run's kind
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                beat = json.loads((self.folder / heartbeat_file(rank)).read_text("utf-8"))
                beat = {key: beat[key] for key in _KEYS}
                peer = before.get(rank)
                changed = peer is not None and beat["time"] != peer.beat["time"]
                peers[rank] = _Peer(
                    beat,
                    now if peer is None or changed else peer.changed,
                    changed or (peer is not None and peer.alive),
                )
        self._peers = peers

    # ---- words

    def _me(self) -> str:
        return f"rank {self.rank}"

    def _stack_report(self) -> str:
        """Which process, where it stands, and the Python stack of its threads, the main one first."""
        now = self._beat_of_now()
        lines = [
            f"{self._me()} of {self.world} (host {self._host}, pid {os.getpid()}) has made no progress for"
            f" {self._quiet:.0f} s: step {now['step']}, {_phase(now)}"
        ]
        ours = {thread.ident for thread in self._threads}
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        main = threading.main_thread().ident
        frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
        for ident, frame in frames:
            if ident not in ours:
                lines += [
                    f"Thread {names.get(ident, ident)} (most recent call last):",
                    *traceback.format_stack(frame),
                ]
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)

    def _summary(self, peers: dict[int, _Peer], now: float) -> str:
        """Who hangs and who waits. Every rank says it: the end of the first one may tear the others away in
        an error."""
        alive = {rank: peer.beat for rank, peer in peers.items() if self._is_alive(peer, now)}
        lines = []
        for rank, peer in sorted(peers.items()):
            if rank in alive:
                continue
            if peer.beat["phase"] == "ended":
                lines.append(f"rank {rank} has ended, at step {peer.beat['step']}")
            else:
                last = f"step {peer.beat['step']}, {_phase(peer.beat)}: {self._state(peer.beat)}"
                lines.append(f"rank {rank} gives no sign of life, last at {last}")
        if missing := [rank for rank in range(self.world) if rank != self.rank and rank not in peers]:
            lines.append(f"{_ranks(missing)}: no heartbeat in {self.folder}")
        alive[self.rank] = self._beat_of_now()
        return "".join(
            f"unigen: {line}\n" for line in [*lines, *_blame(alive, self.timeout, accused=bool(lines))]
        )

    def _state(self, beat: dict[str, Any]) -> str:
        """What the system says of a process whose heartbeat has stopped."""
        if beat["host"] != self._host or not os.path.isdir("/proc/self"):
            return (
                f"its process on {beat['host']} does not run any more, or is frozen; no stack of it can"
                " be had"
            )
        try:
            state = Path(f"/proc/{beat['pid']}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            state = "X"
        told = {
            "T": "its process is stopped (SIGSTOP)", "t": "its process is stopped by a debugger",
            "D": "its process waits in the kernel (a disk, or the driver of a GPU)",
            "X": "its process does not run any more", "Z": "its process does not run any more",
        }  # fmt: skip
        if state in told:
            return f"{told[state]}; no stack of it can be had"
        return "C code holds its interpreter; it prints its stack itself, before it ends"


def _blame(alive: dict[int, dict[str, Any]], timeout: float, accused: bool) -> list[str]:
    """Who of the processes that answer holds up the others. ``accused``: others are to blame already."""
    moving = {rank: beat for rank, beat in alive.items() if beat["quiet"] < timeout}
    still = {rank: beat for rank, beat in alive.items() if rank not in moving}
    steps = {beat["step"] for beat in still.values()}
    if moving:
        lines = [f"{where}, moves, but too slowly for the others to wait" for where in _places(moving)]
        return lines + [f"{where}, waiting or hanging" for where in _places(still)]
    if len(_places(still)) == 1:
        (where,) = _places(still)
        if accused:
            return [f"{where}, waiting"]
        return [
            f"{where}: all hang in the same place, or in a collective that never ends (network, GPU); compare"
            " the stacks"
        ]
    # Those in an earlier step; in the same step whoever does not just wait, in the phase that has stood still
    # for the longest: the others came later. (Seconds alone would not do: those of the others were told up to
    # a heartbeat ago.)
    first = min(steps)
    longest = max(
        (b for b in still.values() if b["step"] == first), key=lambda b: (b["phase"] != WAITING, b["quiet"])
    )
    late = {
        r: b
        for r, b in still.items()
        if b["step"] == first and (len(steps) > 1 or b["phase"] == longest["phase"])
    }
    lines = [
        f"rank {r} hangs: step {b['step']}, {_phase(b)}, for {b['quiet']:.0f} s"
        for r, b in sorted(late.items())
    ]
    return lines + [
        f"{where}, waiting" for where in _places({r: b for r, b in still.items() if r not in late})
    ]


def _places(beats: dict[int, dict[str, Any]]) -> list[str]:
    """Who is where: "ranks 0, 2: step 8, phase data"."""
    found: dict[str, list[int]] = {}
    for rank, beat in sorted(beats.items()):
        found.setdefault(f"step {beat['step']}, {_phase(beat)}", []).append(rank)
    return [f"{_ranks(ranks)}: {where}" for where, ranks in found.items()]


def _phase(beat: dict[str, Any]) -> str:
    return f"phase {beat['phase']}" if beat["phase"] else "between two phases"


def _ranks(ranks: list[int]) -> str:
    """rank 3; ranks 0, 2-5."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    told = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {told}"


def _say(text: str) -> None:
    data = (text if text.endswith("\n") else f"{text}\n").encode()
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(_STDERR, data) :]
