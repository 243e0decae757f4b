"""The heartbeats of a run's processes as others read them, and who holds up the run. No PyTorch here."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unigen.files import is_running
from unigen.foreign import ForeignFileError, read_json
from unigen.runs.layout import heartbeat_file, rank_of, stack_file
from unigen.schema import Number, String, Table, whole

WAITING = "waiting for the others"
"""The phase of a process that only waits: it never holds up those that are in another one."""

ENDED = ("ended", "finished", "stopped", "failed")
"""Phases of a process that has said goodbye."""

AHEAD_S = 5.0  # a heartbeat from further in the future is another clock's
_MAX_BYTES = 1 << 20  # a larger file is no heartbeat
_TIME = Number(0, 1e12)
_BEAT = Table({
    "rank": whole(0, 10**7), "step": whole(0, 10**15), "phase": String(length=1000), "since": _TIME,
    "time": _TIME, "pid": whole(0, 1 << 31), "host": String(length=1000),
})  # fmt: skip


@dataclass
class Rank:
    """A process of the run, as its last heartbeat told. ``since`` and ``time`` are unix seconds of its own
    clock."""

    rank: int
    step: int
    phase: str
    since: float
    time: float
    pid: int
    host: str
    facts: dict[str, Any] = field(default_factory=dict)
    age: float = 0.0  # seconds since it gave a sign of life, by what is known here

    @property
    def busy(self) -> float:
        """Seconds from the start of its phase to its last heartbeat, by its own clock."""
        return max(0.0, self.time - self.since)

    @property
    def quiet(self) -> float:
        """Seconds without progress, which a long phase may make; without that fact, seconds in the phase."""
        told = self.facts.get("quiet")
        return max(0.0, float(told)) if isinstance(told, (int, float)) and told < 1e300 else self.busy


def parse(beat: Any) -> Rank | None:
    """A heartbeat's JSON value as a Rank; None where it is none."""
    if _BEAT.wrong(beat):
        return None
    known = _BEAT.known(beat)
    return Rank(**known, facts={name: value for name, value in beat.items() if name not in known})


def is_gone(rank: Rank) -> bool:
    """Has the process of a heartbeat ended? Known only for processes of this machine."""
    known = rank.host == platform.node() and 0 < rank.pid < 1 << 31
    return known and not is_running(rank.pid)


class RankFiles:
    """Reads the heartbeats in the folder ``ranks`` of a run, again and again."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.ranks: list[Rank] = []
        # rank -> (time of its heartbeat, when that was first seen here, has it changed since we look)
        self._signs: dict[int, tuple[float, float, bool]] = {}

    def read(self) -> list[Rank]:
        """The processes by their rank, with the age of their last sign of life; those whose file cannot be
        read are left out."""
        self.ranks = []
        for number in sorted(set(self._numbers())):
            with contextlib.suppress(OSError, ForeignFileError):
                path = self.folder / heartbeat_file(number)
                if rank := parse(read_json(path, [self.folder], limit=_MAX_BYTES)):
                    rank.age = self._age(rank)
                    self.ranks.append(rank)
        self.ranks.sort(key=lambda rank: rank.rank)
        return self.ranks

    def stacks(self) -> list[str]:
        """Names of the files that hung processes have left."""
        found = map(stack_file, sorted(set(self._numbers())))
        return [name for name in found if (self.folder / name).exists()]

    def clock_offset(self) -> float:
        """Seconds that the run's clock seems to be ahead of this one's; 0 where heartbeats do not show it."""
        told = [(rank.time - time.time(), self._signs[rank.rank]) for rank in self.ranks]
        ahead = [offset for offset, _ in told if offset > AHEAD_S]
        behind = [offset + (time.monotonic() - seen) for offset, (_, seen, changed) in told if changed]
        return max(ahead) if ahead else min(behind, default=0.0)

    def _age(self, rank: Rank) -> float:
        """Seconds since the last sign of life. A heartbeat seen to change here tells more than the clocks of
        two machines."""
        now = time.monotonic()
        before = self._signs.get(rank.rank)
        if before is None or before[0] != rank.time:
            self._signs[rank.rank] = before = (rank.time, now, before is not None)
        _, seen, changed = before
        by_clock = time.time() - rank.time
        return now - seen if changed or by_clock < -AHEAD_S else max(0.0, by_clock)

    def _numbers(self) -> list[int]:
        """The ranks that have files."""
        try:
            return [n for n in map(rank_of, os.listdir(self.folder)) if n is not None]
        except OSError:
            return []


class Hang(NamedTuple):
    """Why a run stands still: ``silent`` give no sign of life, ``hung`` hold up the others, ``waiting`` make
    no progress either, and ``moving`` do; where some do, ``hung`` may only wait for them."""

    silent: list[Rank]
    hung: list[Rank]
    waiting: list[Rank]
    moving: list[Rank]

    @property
    def together(self) -> bool:
        """Do all stand still in one place? Then it is a collective that never ends, or the same in all."""
        return len(self.hung) > 1 and not (self.silent or self.waiting or self.moving)


def find_hang(ranks: Sequence[Rank], timeout: float, patience: float) -> Hang | None:
    """Who holds up a run; None where it goes on. ``timeout``, ``patience``: seconds that one may make no
    progress, and give no sign of life."""
    silent = [rank for rank in ranks if rank.age > patience]
    answer = [rank for rank in ranks if rank.age <= patience and rank.phase not in ENDED]
    late = [rank for rank in answer if rank.quiet >= timeout]
    moving = [rank for rank in answer if rank.quiet < timeout]
    if silent:
        return Hang(silent, [], late, moving)
    if not late:
        return None
    if moving or len({(rank.step, rank.phase) for rank in late}) == 1:
        return Hang([], late, [], moving)
    # Those in an earlier step. In the same step, whoever does not just wait and is in the phase that has
    # stood still for the longest, as the others came later. (Seconds alone would not do: those of other
    # processes were told up to a heartbeat ago.)
    first = min(rank.step for rank in late)
    behind = [rank for rank in late if rank.step == first]
    if len(behind) == len(late):
        longest = max(behind, key=lambda rank: (rank.phase != WAITING, rank.quiet))
        behind = [rank for rank in behind if rank.phase == longest.phase]
    return Hang([], behind, [rank for rank in late if rank not in behind], [])
