"""Whether a checkpoint is what was written, byte by byte."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from unigen.files import CHUNK
from unigen.model.storage import CheckpointFolderError, is_of_set
from unigen.printing import bar
from unigen.runs.checkpoint import CheckpointError, changed_files, read_manifest, read_states, scan_group
from unigen.runs.states import STATES


def problems_of(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with the bytes of a checkpoint's files, read on all cores; and with the states and
    tensors they promise, as a resume reads them.

    Args:
        folder: of the checkpoint.
        wanted: which of the files to look at, by the name that the manifest has for them.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [error.problem]
    names = [name for name in manifest["files"] if wanted(name)]
    total = sum(manifest["files"][name]["size"] for name in names)
    lock, show = threading.Lock(), {"unit": "B", "unit_scale": True, "leave": False}
    with bar(f"verify {folder.name}", total=total, **show) as shown:

        def tick() -> None:
            with lock:
                shown.update(min(CHUNK, total - shown.n))

        found = changed_files(folder, wanted, threads=os.cpu_count() or 1, tick=tick)
    if not found:  # the bytes are those that were written; do they say what a resume needs?
        if names == list(manifest["files"]):
            try:
                read_states(folder, STATES)
            except CheckpointError as error:
                found.append(error.problem)
        for group in manifest["groups"]:
            if any(is_of_set(name, group) for name in names):
                try:
                    scan_group(folder, group)
                except CheckpointFolderError as error:
                    found.append(str(error))
    return found
