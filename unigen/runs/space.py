"""Disk space for checkpoints: a forecast before the first step, a check before every save, and the policy
where space is short (stop, prune the oldest, wait). And the memory that is left for ``async_save``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, Protocol

from unigen.config import UserError
from unigen.figures import gb
from unigen.files import existing, free_bytes
from unigen.messages import listed
from unigen.runs.checkpoint import CheckpointError, remove_checkpoint, steps, verify_checkpoint
from unigen.runs.layout import MANIFEST

POLL_S = 5.0  # between two looks at a full disk
SETTLE_S = 5.0  # that a file system may take to count removed files as free space
MEMINFO, OWN_GROUP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class SpaceError(UserError):
    """The disk cannot hold the next checkpoint; the message says what is needed, what is free, where, and the
    fix."""


class Processes(Protocol):
    """What is needed of an engine where several processes ask together."""

    main: bool

    def gather(self, text: str) -> list[str]:
        """A short text of every process, in rank order."""


class DiskSpace:
    """The disk-space check of ``output_dir``. The main process looks and removes; all come to the same end.

    Args:
        policy: where space is short: stop with an error, prune the oldest checkpoints, or wait.
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

    def need(
        self, nbytes: int, protect: Collection[Path] = (), idle: Callable[[], None] = lambda: None
    ) -> None:
        """Returns when ``nbytes`` more fit. To be called while no checkpoint is being written: what one lacks
        would still count as free.

        Args:
            nbytes: bytes of the next checkpoint, all processes together.
            protect: folders that ``prune`` leaves alone besides ``best`` and the newest good checkpoint: the
                one last written, and the one whose files the run still reads.
            idle: called every few seconds while ``wait`` waits, on every process; it may raise, but then on
                all of them.

        Raises:
            SpaceError: they do not fit, and nothing may be removed for them; on all processes.
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
                    self._say(f"Waiting for disk space (low_space is wait): {lack}")
                waiting = True
                idle()
                time.sleep(POLL_S)
        if waiting:
            self._say(f"The next checkpoint fits again, {gb(free_bytes(self.output_dir))} are free; going on")

    def need_first(self, nbytes: int) -> None:
        """Before the first step. Raises SpaceError, on all processes, where it is known that the first
        checkpoint will not fit: nobody waits for space, and removing older ones would not do."""

        def lack() -> str:
            freed = sum(map(folder_bytes, self._whole()[1:])) if self.policy == "prune" else 0
            return "" if self.policy == "wait" else self._lack(max(0, nbytes - freed))

        if found := self._on_main(lack):
            raise SpaceError(f"{found}. Nothing was trained. {self._fix()}")

    def forecast(
        self, step: int, total_steps: int, save_steps: int, keep: int | None, nbytes: int, best: int = 0
    ) -> str:
        """What the checkpoints of a run will take, in a line; a warning where the disk will not hold them.

        Args:
            step: steps done already.
            total_steps: of the whole run; the last one is saved too.
            save_steps: steps between two checkpoints.
            keep: newest checkpoints to keep; None keeps all.
            nbytes, best: bytes of one, and of ``best``, where there will be one.
        """
        at = [*range(step - step % save_steps + save_steps, total_steps, save_steps)]
        at += [total_steps] if step < total_steps else []
        held = len(self._whole())
        limit = math.inf if keep is None else keep
        kept = int(min(limit, held + len(at))) if at else 0
        one_more = held + len(at) > limit  # an older one goes when the new one is published
        free = free_bytes(self.output_dir)
        text = (
            f"Checkpoints: {kept} of {gb(nbytes)} each{', one more while it is written' if one_more else ''}"
            f"{f', and {gb(best)} for the best one' if best else ''}, {gb(nbytes * (kept + one_more) + best)}"
            f" in all; {gb(free)} free on {mount_of(self.output_dir)}"
        )
        fit = max(0, free - self.reserve - best) // max(nbytes, 1)  # beside those that are there
        if fit >= min(len(at), max(limit - held, 0) + 1):
            return text
        most = fit + held - 1
        then = {
            "stop": "the run will stop there",
            "prune": "the oldest will be removed then",
            "wait": "the run will wait there",
        }[self.policy]
        return (
            f"{text}. Warning: the checkpoint of step {at[fit]} will not fit; {then} (low_space is"
            f" {self.policy}). Fix: "
            + (f"--save_total_limit {most}" if most >= 1 else "a larger disk, no --save_total_limit would do")
        )

    # ---- the policies

    def _whole(self) -> list[Path]:
        """The checkpoints that are there, the newest first."""
        return [path for path in steps(self.output_dir) if (path / MANIFEST).is_file()]

    def _lack(self, nbytes: int) -> str:
        """What is missing, in words; "" where nothing is."""
        free = free_bytes(self.output_dir)
        if free >= nbytes + self.reserve:
            return ""
        stay = f", {gb(self.reserve)} are to stay free (min_free_gb)" if self.reserve else ""
        return (
            f"{self.output_dir}: the next checkpoint takes {gb(nbytes)}{stay}, and {gb(free)} are free on"
            f" {mount_of(self.output_dir)}"
        )

    def _fix(self) -> str:
        others = listed((policy for policy in ("prune", "wait") if policy != self.policy), "or")
        return (
            "Earlier checkpoints are untouched. Fix: free space there or choose a disk with more"
            " (--output_dir), keep fewer checkpoints (--save_total_limit), or let the run remove some or wait"
            f" (--low_space {others}); then go on with --resume_from_checkpoint auto"
        )

    def _prune_one(self, nbytes: int, protect: set[Path]) -> bool:
        """Removes the oldest checkpoint that may go; False, and nothing is removed, where all of them would
        not be enough."""
        names: list[str] = self._on_main(lambda: [path.name for path in self._whole()])
        good = next((name for name in names if self._good(name)), None)
        if good is None:  # while no checkpoint is known to be good, any of them may be worth something
            return False

        def remove() -> bool:
            older = [self.output_dir / name for name in reversed(names) if name != good]
            doomed = [path for path in older if path.resolve() not in protect]
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
        self.write(f"Removed {folder} ({gb(size)}) for the next checkpoint (low_space is prune)")
        # some file systems free later; without patience one more would have to go
        deadline = time.monotonic() + SETTLE_S
        while free_bytes(self.output_dir) < before + size // 2 and time.monotonic() < deadline:
            time.sleep(0.05)

    # ---- several processes

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on the main process, a JSON value; on all of them."""
        said: dict[str, Any] = {"value": None, "error": ""}
        if self.engine is None or self.engine.main:
            try:
                said["value"] = work()
            except OSError as error:
                said["error"] = (
                    f"{self.output_dir}: free space cannot be read or made: {error}. Fix: make the folder"
                    " readable and writable"
                )
        if self.engine is not None:
            said = json.loads(self.engine.gather(json.dumps(said))[0])
        if said["error"]:
            raise SpaceError(said["error"])
        return said["value"]

    def _say(self, line: str) -> None:
        if self.engine is None or self.engine.main:
            self.write(line)


# ---- the disk, and the memory


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


def free_memory() -> float:
    """Bytes that this process can take before the kernel ends one: what the machine has left, or less where a
    container or a job (a control group of either version) is limited. Infinite where nobody says."""
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError, KeyError):
        values = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found.append(int(values["MemAvailable"].split()[0]) * 1024.0)
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_GROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root, limit, used, cache = GROUPS, "memory.max", "memory.current", "inactive_file"
            if controllers:  # version 1
                root, limit, used = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cache = "total_inactive_file"
                if "memory" not in controllers.split(","):
                    continue
            place = root / path.lstrip("/")  # inside of a container often the machine's path: not there
            for group in (place, *place.parents):
                with contextlib.suppress(OSError, ValueError):  # no limit, or "max"
                    left = int((group / limit).read_text()) - int((group / used).read_text())
                    stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                    # the kernel gives back what files hold before it ends a process
                    found.append(float(left + int(stat.get(cache, 0))))
    return min(found)
