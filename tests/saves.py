"""Small checkpoints, written by one process or by several that are threads here."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unigen.runs.channel import Channel
from unigen.runs.checkpoint import scan_group
from unigen.runs.saver import Contents, Saver, StateEntry

ALONE = Channel(1, torch.device("cpu"))
FILES = [
    "ema.safetensors",
    "llm_config.json",
    "manifest.json",
    "optimizer.safetensors",
    "tokenizer",
    "trainer.json",
]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file below, by its relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_files(folder: Path) -> None:
    """Stands where the configs and the tokenizer go: a file, and a folder in the folder."""
    (folder / "llm_config.json").write_text('{"hidden_size": 8}', "utf-8")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("a b\n", "utf-8")


def entry(group: str, name: str, value: Tensor, **more: Any) -> StateEntry:
    return StateEntry(group, name, tuple(value.shape), value, **more)


def contents(step: int, *entries: StateEntry, **more: Any) -> Contents:
    """What is saved; without ``entries`` two small groups, whose values tell the step."""
    chosen = entries or (
        entry("ema", "w", torch.arange(5.0)),
        entry("optimizer", "exp_avg.w", torch.full((3,), float(step))),
    )
    return replace(Contents(step, chosen, {"trainer": trainer_state(step)}, write_files, {}), **more)


def trainer_state(step: int) -> dict[str, Any]:
    """All that a resume asks of ``trainer.json``."""
    return {
        "step": step, "epoch": 0, "position": 0, "waiting": [], "best": None, "pending": [],
        "fingerprint": "", "step_rows": 1, "guards": {}, "scale": {"scale": 1.0, "good": 0},
    }  # fmt: skip


def save(
    output_dir: Path,
    step: int,
    *entries: StateEntry,
    name: str | None = None,
    keep: int | None = None,
    **more: Any,
) -> Path:
    """Writes ``step_N`` (or ``name``) as one process does; the folder."""
    saver = Saver(output_dir, 0, ALONE, keep=keep)
    saver.save(contents(step, *entries, **more), name)
    found = saver.published()
    assert found is not None
    return found


def read_group(folder: Path, group: str) -> dict[str, Tensor]:
    return {name: stored.read() for name, stored in scan_group(folder, group).items()}


def damage(folder: Path, file: str = "optimizer.safetensors") -> None:
    """Flips the last bit of a file."""
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data)


# ---- several processes


class Seat(Channel):
    """One of ``world`` processes that are threads of this one."""

    def __init__(self, rank: int, said: list[str], barrier: threading.Barrier):
        super().__init__(len(said), torch.device("cpu"))
        self.rank, self.said, self.barrier = rank, said, barrier

    def gather(self, text: str) -> list[str]:
        self.said[self.rank] = text
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        return said

    def sum(self, values: Sequence[float]) -> list[float]:
        return [
            float(sum(column))
            for column in zip(*map(json.loads, self.gather(json.dumps(list(values)))), strict=True)
        ]


def together(world: int, work: Callable[[int, Channel], Any], patience: float = 20.0) -> list[Any]:
    """What ``work(rank, channel)`` gave or raised on each of ``world`` processes; who waits for one that is
    gone gives up."""
    said, barrier = [""] * world, threading.Barrier(world, timeout=patience)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, Seat(rank, said, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def pieces(
    rank: int, world: int, group: str, name: str, value: Tensor, cuts: list[int] | None = None
) -> list[StateEntry]:
    """The elements of ``value`` that a process holds: between its cut and the next."""
    cuts = cuts or [value.numel() * r // world for r in range(world + 1)]
    part = value.reshape(-1)[cuts[rank] : cuts[rank + 1]]
    return [StateEntry(group, name, tuple(value.shape), part, cuts[rank])] if len(part) else []


def shared_entries(rank: int, world: int, step: int) -> list[StateEntry]:
    """Two tensors in pieces, and a whole one of the first process."""
    found = pieces(rank, world, "ema", "w", torch.arange(24.0).view(6, 4))
    found += pieces(rank, world, "optimizer", "exp_avg.w", torch.full((6, 4), float(step)))
    return found + ([entry("optimizer", "step.w", torch.tensor(float(step)))] if rank == 0 else [])


def save_together(output_dir: Path, step: int, world: int = 2) -> Path:
    """Writes ``step_N`` as several processes do."""

    def work(rank: int, channel: Channel) -> Path | None:
        saver = Saver(output_dir, rank, channel)
        saver.save(contents(step, *shared_entries(rank, world, step)))
        return saver.published()

    results = together(world, work)
    assert results == [output_dir / f"step_{step}"] * world, results
    return results[0]


def mount_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of ``size`` (such as "4m") in ``folder``; skips the test where none can be
    mounted."""
    mount = folder / "disk"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a file system needs root and its permission")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)
