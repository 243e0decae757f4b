"""How much memory of this machine may still be taken."""

from __future__ import annotations

import math
from pathlib import Path

MEMINFO, OWN_GROUP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def free_memory() -> float:
    """Bytes that this process can take before the kernel ends one: what the machine has left, or less where a
    container or a job (a control group of either version) is limited. Infinite where nobody says."""
    return min([_machine(), *_groups()])


def _machine() -> float:
    try:
        values = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(values["MemAvailable"].split()[0]) * 1024.0
    except (OSError, ValueError, KeyError):
        return math.inf


def _groups() -> list[float]:
    """What is left of every limit that this process is under."""
    found = []
    try:
        lines = [line.split(":", 2) for line in OWN_GROUP.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:  # version 2
            names, root = ("memory.max", "memory.current", "inactive_file"), GROUPS
        elif "memory" in controllers.split(","):
            names, root = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                GROUPS / "memory",
            )
        else:
            continue
        # Inside of a container the path is often that of the machine, and only the root is there.
        place = root / path.lstrip("/")
        found += [
            left
            for folder in (place, *place.parents)
            if folder.is_relative_to(root)
            for left in _left(folder, *names)
        ]
    return found


def _left(folder: Path, limit: str, used: str, cache: str) -> list[float]:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # The kernel gives back what files hold before it ends a process. "max" is no limit.
        return [
            float(
                int((folder / limit).read_text()) - int((folder / used).read_text()) + int(stat.get(cache, 0))
            )
        ]
    except (OSError, ValueError):
        return []
