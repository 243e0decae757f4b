"""What ends a run from outside, in words: a worker that the kernel took, memory, a disk, another process."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch

from unigen.config import UserError
from unigen.runs.channel import is_broken
from unigen.runs.ranks import RankFiles, is_gone
from unigen.training.guards import TrainingStopped

LESS_MEMORY = (
    "--gradient_checkpointing (and --checkpointing_policy offload), --precision bf16, --engine fsdp2 on"
    " several GPUs, --optimizer adamw8bit, a smaller --batch_size, --max_num_tokens or --max_image_tokens,"
    " or freeze a part"
)
_PATIENCE_S = 2.0  # until the process of another rank that was killed is gone


def explain(error: Exception, device: torch.device) -> UserError | None:
    """An error of the machine, or one that a loader worker passed on, as a message with its fix; None for
    another kind, whose traceback somebody needs."""
    text = str(error)
    last = text.rstrip().splitlines()[-1].strip() if text.strip() else type(error).__name__
    if isinstance(error, UserError):
        return TrainingStopped(re.sub(r"^\w+(\.\w+)*: ", "", last)) if text.startswith("Caught ") else None
    if text.startswith("DataLoader worker"):
        pid = next(iter(re.findall(r"\(pid(?:\(s\))? ([\d, ]+)\)", text)), "?")
        return TrainingStopped(
            f"a loader worker (pid {pid}) was ended from outside, most often since this machine's memory ran"
            " out. Fix: fewer workers (--num_workers 1, or 0), a smaller --max_image_tokens, or more memory"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return TrainingStopped(f"the memory of {device} ran out ({last}). Fix: {LESS_MEMORY}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return TrainingStopped(f"the memory of this machine ran out ({last}). Fix: {LESS_MEMORY}")
    if isinstance(error, OSError):
        where = f"{type(error).__name__}: {last}"
        return TrainingStopped(f"{where}. Fix: see that its disk works and the data is where it was")
    return None


def lost_process(error: Exception, rank: int, ranks: Path) -> UserError | None:
    """The message where the processes of a run can no longer speak to each other, since one has ended; None
    for another ``error``. ``ranks``: folder of the heartbeats."""
    if not is_broken(error):
        return None
    found, deadline = RankFiles(ranks), time.monotonic() + _PATIENCE_S
    while not (gone := [r.rank for r in found.read() if r.rank != rank and is_gone(r)]):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    who = f"rank {', '.join(map(str, gone))}" if gone else "another process of this run"
    return TrainingStopped(
        f"rank {rank}: {who} has ended, so that this one cannot go on; steps since the last checkpoint are"
        f" lost. Fix: see what {who} said last (killed without a word: memory, or the machine), then resume"
        " with --resume_from_checkpoint auto"
    )
