"""What the tests of checkpoints share: checkpoints of several processes, written by the real Saver, its
processes being threads."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from saves import trainer_state
from torch import Tensor

from unigen.runs.saver import Contents, Saver, StateEntry


class Threads:
    """Processes that are threads: what each says is heard by all."""

    def __init__(self, world: int):
        self.world, self.barrier, self.words = world, threading.Barrier(world, timeout=60), [""] * world

    def of(self, rank: int) -> Voice:
        return Voice(self, rank)


class Voice:
    def __init__(self, threads: Threads, rank: int):
        self.threads, self.rank, self.world, self.main = threads, rank, threads.world, rank == 0

    def gather(self, text: str) -> list[str]:
        self.threads.words[self.rank] = text
        self.threads.barrier.wait()
        words = list(self.threads.words)
        self.threads.barrier.wait()
        return words


def together(world: int, work) -> None:
    """``work(voice)`` on every one of ``world`` processes; the first failure is raised."""
    threads, errors = Threads(world), []

    def one(rank: int) -> None:
        try:
            work(threads.of(rank))
        except BaseException as error:
            errors.append(error)
            threads.barrier.abort()

    running = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    if errors:
        raise errors[0]


def small_tensors() -> dict[str, Tensor]:
    """A few thousand numbers in several dtypes and shapes."""
    g = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(40, 16, generator=g),
        "frozen": torch.randn(30, 8, generator=g).bfloat16(),
        "norm": torch.randn(16, generator=g),
        "scalar": torch.randn((), generator=g),
        "weight": torch.randn(3, 5, 7, generator=g),
    }


def write_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor] | None = None, *, world: int = 2,
    average: bool = True,
    model: Path | None = None, name: str | None = None,
) -> Path:  # fmt: skip
    """``step_N`` (or ``name``, weights only) as ``world`` processes write it.

    The average holds ``tensors``; the weights that train, all but those named "frozen", hold ``tensors + 1``,
    or ``tensors`` without an average; the moments hold ``tensors * 2`` and ``tensors ** 2``. Float32 tensors
    of several elements are cut into flat pieces.
    """
    tensors = small_tensors() if tensors is None else tensors
    whole: list[tuple[str, str, Tensor]] = []
    for key, value in tensors.items():
        whole.append(("ema", key, value))
        if "frozen" in key or name is not None:
            continue
        whole += [("model", key, value + 1)] if average else []
        moments = {
            "step": torch.tensor(float(step)),
            "exp_avg": value.float() * 2,
            "exp_avg_sq": value.float() ** 2,
        }
        whole += [("optimizer", f"{moment}.{key}", numbers) for moment, numbers in moments.items()]

    def entries(rank: int) -> list[StateEntry]:
        found = []
        for i, (group, key, value) in enumerate(whole):
            if value.dtype == torch.float32 and value.numel() > world:
                edges = [value.numel() * r // world for r in range(world + 1)]
                piece = value.reshape(-1)[edges[rank] : edges[rank + 1]]
                found.append(StateEntry(group, key, tuple(value.shape), piece, edges[rank]))
            elif i % world == rank:
                found.append(StateEntry(group, key, tuple(value.shape), value))
        return found

    def write_files(folder: Path) -> None:
        if model is None:
            (folder / "llm_config.json").write_text('{"hidden_size": 16}\n', "utf-8")
            return
        for path in model.iterdir():
            if path.name != "ema.safetensors":
                shutil.copyfile(path, folder / path.name)
        (folder / "config.json").write_text("{}\n", "utf-8")

    options = {"seed": 1, "gradient_accumulation_steps": 1}
    states = {"training_config": options} | ({} if name else {"trainer": trainer_state(step)})
    about = {"engine": "single" if world == 1 else "fsdp2", "average": average}
    together(
        world,
        lambda v: Saver(run, v.rank, v).save(
            Contents(step, entries(v.rank), states, write_files, about), name
        ),
    )
    return run / (name or f"step_{step}")
