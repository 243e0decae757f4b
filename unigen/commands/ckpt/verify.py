"""Whether a checkpoint is what was written, byte by byte."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from unigen.files import CHUNK
from unigen.model.config import CheckpointFolderError
from unigen.runs.checkpoint import CheckpointError, read_manifest, scan_group, verify_checkpoint


def problems_of(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with the bytes of a checkpoint's files, read on all cores; and with the tensors they
    promise.

    Args:
        folder: of the checkpoint.
        wanted: which of the files to look at, by the name that the manifest has for them.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [reason(folder, error)]
    # The order in which `verify_checkpoint` deals files out: with as many shares as files, each share is one
    # file.
    files = sorted(manifest["files"].items(), key=lambda item: -item[1]["size"])
    chosen = [i for i, (name, _) in enumerate(files) if wanted(name)]
    total = sum(files[i][1]["size"] for i in chosen)
    problems: dict[int, str] = {}
    lock = threading.Lock()
    with (
        tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=f"verify {folder.name}",
            leave=False,
            disable=None,
            file=sys.stderr,
        ) as bar,
        ThreadPoolExecutor(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ) as pool,
    ):

        def tick() -> None:
            with lock:
                bar.update(min(CHUNK, total - bar.n))

        jobs = {pool.submit(verify_checkpoint, folder, (i, len(files)), tick=tick): i for i in chosen}
        try:
            for job in as_completed(jobs):
                try:
                    job.result()
                except CheckpointError as error:
                    problems[jobs[job]] = reason(folder, error)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = list(dict.fromkeys(problems[i] for i in sorted(problems)))
    if not found:  # the bytes are those that were written; do they make tensors?
        for group in manifest["groups"]:
            if any(wanted(name) and of_group(name, group) for name, _ in files):
                try:
                    scan_group(folder, group)
                except CheckpointFolderError as error:
                    found.append(str(error))
    return found


def reason(folder: Path, error: Exception) -> str:
    """The middle of a message about a checkpoint, where many are listed below its name."""
    return str(error).removeprefix(f"{folder}: ").removeprefix("damaged checkpoint: ").partition(". Fix:")[0]


def of_group(name: str, group: str) -> bool:
    return re.fullmatch(rf"{group}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?", name) is not None
