"""Room on the disk: foretold before the first step, asked for before every checkpoint, and what is done where
there is none.

A save that fails for want of space costs nothing but itself (``saver.py``), yet the run is over then. Here it
is known before.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, Protocol

from unigen.config import UserError
from unigen.files import existing, free_bytes
from unigen.runs.checkpoint import CheckpointError, remove_checkpoint, steps, verify_checkpoint
from unigen.runs.layout import MANIFEST

POLL_S = 5.0  # between two looks at a full disk
SETTLE_S = 5.0  # that a file system may take to count removed files as free space
_IN_MEMORY = ("tmpfs", "ramfs")  # where reserving space would take memory


class SpaceError(UserError):
    """The disk cannot hold the next checkpoint; the message says what is needed, what is free, where, and the
    fix."""


class Processes(Protocol):
    """What is needed of an engine where several processes ask together."""

    main: bool

    def gather(self, text: str) -> list[str]:
        """A short text of every process, in rank order."""


class DiskSpace:
    """Finds room for checkpoints in ``output_dir``. The main process looks and removes; all come to the same
    end.

    Args:
        output_dir: folder of the run.
        policy: where there is no room: stop with an error, prune the oldest checkpoints, or wait for room.
        min_free_gb: gigabytes (10^9 bytes) that stay free beside the next checkpoint.
        write: takes a line for the log; called on the main process.
        engine: of a run with several processes; without it there is one.
        verify: checks a checkpoint, raising CheckpointError; all processes call it together.
    """

    def __init__(
        self,
        output_dir: Path,
        policy: Literal["stop", "prune", "wait"],
        min_free_gb: float,
        write: Callable[[str], None],
        engine: Processes | None = None,
        verify: Callable[[Path], None] = verify_checkpoint,
    ):
        self.output_dir, self.policy, self.reserve = Path(output_dir), policy, int(min_free_gb * 1e9)
        self.write, self.engine, self.verify = write, engine, verify
        self._verified: dict[str, bool] = {}

    # ---- before a save

    def need(
        self, nbytes: int, protect: Collection[Path] = (), idle: Callable[[], None] = lambda: None
    ) -> None:
        """Returns when there is room for ``nbytes`` more. To be called while no checkpoint is being written:
        what it has not yet written would still count as free.

        Args:
            nbytes: bytes of the next checkpoint, all processes together.
            protect: folders that ``prune`` leaves alone besides ``best`` and the newest good checkpoint: the
                one last written, and the one whose files the run still reads.
            idle: called every few seconds while ``wait`` waits, on every process; it may raise, but then on
                all of them.

        Raises:
            SpaceError: there is no room, and none can be made; on all processes.
        """
        waiting = False
        while lack := self._on_main(lambda: self._lack(nbytes)):
            if self.policy == "stop":
                raise SpaceError(f"{lack}. {self._fix()}")
            if self.policy == "prune":
                if not self._prune_one(nbytes, {path.resolve() for path in protect}):
                    raise SpaceError(
                        f"{lack}; removing the checkpoints that may go (low_space is prune) would not do."
                        f" {self._fix()}"
                    )
            else:
                if not waiting:
                    self._say(f"Waiting for room (low_space is wait): {lack}")
                waiting = True
                idle()
                time.sleep(POLL_S)
        if waiting:
            self._say(
                f"There is room for the next checkpoint again, {gb(free_bytes(self.output_dir))} free;"
                " going on"
            )

    def _lack(self, nbytes: int) -> str:
        """What is missing, in words; "" where nothing is."""
        free, place = free_bytes(self.output_dir), mount_of(self.output_dir)
        if free < nbytes + self.reserve:
            stay = f", {gb(self.reserve)} are to stay free (min_free_gb)" if self.reserve else ""
            return (
                f"{self.output_dir}: the next checkpoint takes {gb(nbytes)}{stay}, and {gb(free)} are free on"
                f" {place}"
            )
        if refused_by_quota(self.output_dir, nbytes):
            return (
                f"{self.output_dir}: the next checkpoint takes {gb(nbytes)}, more than your quota on {place}"
                f" allows ({gb(free)} are free)"
            )
        return ""

    def _fix(self) -> str:
        others = " or ".join(policy for policy in ("prune", "wait") if policy != self.policy)
        return (
            "Earlier checkpoints are untouched. Fix: free space there or choose a disk with more"
            " (--output_dir), keep fewer checkpoints (--save_total_limit), or let the run make room or wait"
            f" (--low_space {others}); then go on with --resume_from_checkpoint auto"
        )

    def _prune_one(self, nbytes: int, protect: set[Path]) -> bool:
        """Removes the oldest checkpoint that may go; False, and nothing is removed, where all of them would
        not make the room."""
        names: list[str] = self._on_main(
            lambda: [p.name for p in steps(self.output_dir) if (p / MANIFEST).is_file()]
        )
        good = next((name for name in names if self._good(name)), None)
        if good is None:  # while no checkpoint is known to be good, any of them may be worth something
            return False

        def remove() -> bool:
            doomed = [
                p
                for p in (self.output_dir / name for name in reversed(names))
                if p.name != good and p.resolve() not in protect
            ]
            enough = free_bytes(self.output_dir) + sum(map(folder_bytes, doomed)) >= nbytes + self.reserve
            if doomed and enough:
                self._remove(doomed[0])
            return bool(doomed) and enough

        return self._on_main(remove)

    def _good(self, name: str) -> bool:
        """Does it verify? Each one is read once."""
        if name not in self._verified:
            try:
                self.verify(self.output_dir / name)
                self._verified[name] = True
            except CheckpointError as error:
                self._say(f"It does not count as a checkpoint to keep: {error}")
                self._verified[name] = False
        return self._verified[name]

    def _remove(self, folder: Path) -> None:
        size, before = folder_bytes(folder), free_bytes(self.output_dir)
        remove_checkpoint(folder)
        self.write(f"Removed {folder} ({gb(size)}) to make room for the next checkpoint (low_space is prune)")
        # some file systems free later; without patience one more would have to go
        deadline = time.monotonic() + SETTLE_S
        while free_bytes(self.output_dir) < before + size // 2 and time.monotonic() < deadline:
            time.sleep(0.05)

    # ---- before the first step

    def predict(
        self, step: int, total_steps: int, save_steps: int, keep: int | None, nbytes: int, best: int = 0
    ) -> str:
        """What the checkpoints of a run will take, in a line or two; a warning where the disk will not hold
        them.

        Args:
            step: steps done already.
            total_steps: of the whole run; the last one is saved too.
            save_steps: steps between two checkpoints.
            keep: newest checkpoints to keep; None keeps all.
            nbytes: bytes of one.
            best: bytes of ``best``, where there will be one.
        """
        at = [
            *range(step - step % save_steps + save_steps, total_steps, save_steps),
            *([total_steps] if step < total_steps else []),
        ]
        held = [folder_bytes(p) for p in reversed(steps(self.output_dir)) if (p / MANIFEST).is_file()]
        free, place = free_bytes(self.output_dir), mount_of(self.output_dir)
        # one that is there already is replaced when the new one is whole, so both count
        room = free - self.reserve - best
        kept = len(at) if keep is None else min(keep, len(held) + len(at)) if at else 0
        extra = ", one more while it is written" if keep is not None and len(held) + len(at) > keep else ""
        besides = f", and {gb(best)} for the best one" if best else ""
        text = (
            f"Checkpoints: {kept} of {gb(nbytes)} each{extra}{besides},"
            f" {gb(nbytes * (kept + bool(extra)) + best)} in all"
        )
        text += f"; {gb(free)} free on {place}"
        full = _first_without_room(room, held, nbytes, at, keep)
        if full is None:
            return text
        most = (room + sum(held)) // nbytes - 1 if nbytes else 0
        advice = f"--save_total_limit {most} would fit" if most >= 1 else "no --save_total_limit would do"
        then = {
            "stop": "the run will stop there",
            "prune": "the oldest will be removed then",
            "wait": "the run will wait there",
        }[self.policy]
        return (
            f"{text}. Warning: there is no room for the checkpoint of step {full}; {then} (low_space is"
            f" {self.policy}). {advice}"
        )

    # ---- several processes

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on the main process, a JSON value; on all of them."""
        said: dict[str, Any] = {"value": None, "error": ""}
        if self.engine is None or self.engine.main:
            try:
                said["value"] = work()
            except OSError as error:
                said["error"] = (
                    f"{self.output_dir}: cannot look after its space: {error}. Fix: make the folder readable"
                    " and writable"
                )
        if self.engine is not None:
            said = json.loads(self.engine.gather(json.dumps(said))[0])
        if said["error"]:
            raise SpaceError(said["error"])
        return said["value"]

    def _say(self, line: str) -> None:
        if self.engine is None or self.engine.main:
            self.write(line)


def _first_without_room(
    room: int, held: list[int], nbytes: int, at: list[int], keep: int | None
) -> int | None:
    """The first of the steps ``at`` whose checkpoint finds no room, beside those ``held`` (bytes, oldest
    first)."""
    held = list(held)
    for step in at:
        if room < nbytes:
            return step
        room -= nbytes
        held.append(nbytes)
        while keep is not None and len(held) > keep:
            room += held.pop(0)
    return None


# ---- the disk


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            total += path.lstat().st_size
    return total


def mount_of(folder: Path) -> Path:
    """Where the file system of a folder is mounted."""
    place = existing(folder).resolve()
    return next(path for path in (place, *place.parents) if os.path.ismount(path))


def refused_by_quota(folder: Path, nbytes: int) -> bool:
    """Does a quota of this user keep a file of ``nbytes`` out of the folder? False too where the file system
    cannot say.

    ``statvfs`` knows nothing of a user's quota. A file without a name is given the space, which takes
    milliseconds and no writing, and is gone as soon as it is closed, also when the process is killed. Only
    the word "quota" counts: on a file system made of many disks, one file may be too large where several are
    not.
    """
    place = existing(folder)
    if nbytes <= 0 or _file_system(place) in _IN_MEMORY:
        return False
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            return _allocate(file.fileno(), nbytes) == errno.EDQUOT
    except OSError:
        return False  # no file can be made at all, which the save will say better


def _allocate(file: int, nbytes: int) -> int:
    """The kernel's answer, an errno. (``os.posix_fallocate`` would write the file full where the file system
    cannot reserve.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate64"):
        return errno.ENOSYS
    failed = libc.fallocate64(file, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
    return ctypes.get_errno() if failed else 0


def _file_system(folder: Path) -> str:
    """The type of a folder's file system, such as ``ext4``; "" where that cannot be told."""
    place = str(mount_of(folder))
    try:
        entries = [line.split() for line in Path("/proc/self/mounts").read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return ""
    found = [
        entry[2]
        for entry in entries
        if re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), entry[1]) == place
    ]
    return found[-1] if found else ""


def gb(nbytes: float) -> str:
    """Bytes as text in units of 1000: ``233.1 GB``, ``4.2 MB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes / 1e3:,.1f} kB"
