"""Whether a checkpoint, or an export of one, is what was written, byte by byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unigen.bars import Bar
from unigen.files import sha256_of
from unigen.model.storage import CheckpointFolderError, is_of_set, scan_folder, scan_set
from unigen.runs.checkpoint import CheckpointError, changed_files, read_manifest, read_states, scan_group
from unigen.runs.layout import MANIFEST
from unigen.runs.states import STATES, outside

RECEIPT = "export.json"  # what an export was made of, and the SHA-256 of its files


def receipt_of(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself; empty where that cannot be read, None where the folder is none."""
    if (folder / MANIFEST).exists() or not (folder / RECEIPT).is_file():
        return None
    try:
        about = json.loads((folder / RECEIPT).read_bytes())
        return {**about, "contents": dict(about["contents"]), "files": dict(about["files"])}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def is_plain(folder: Path) -> bool:
    """Is it a model that nothing here wrote, as a release is, without checksums of its files?"""
    noted = (folder / MANIFEST).exists() or receipt_of(folder) is not None
    return not noted and (folder / "llm_config.json").is_file()


def _broken_in_plain(folder: Path) -> list[str]:
    """What headers and lengths show of a model without checksums: an interrupted download, most often."""
    found = []
    for read in (scan_folder, lambda folder: scan_set(folder, "ae.safetensors")):
        try:
            read(folder)
        except CheckpointFolderError as error:
            found.append(str(error))
    return found


def _changed_in_export(folder: Path, about: dict[str, Any]) -> list[str]:
    """What is wrong with the bytes of an export's files. Files that it does not name are fine."""
    if not about:
        return [f"{RECEIPT} cannot be read"]
    found, names = [], [name for name in about["contents"] if not outside(name) and (folder / name).is_file()]
    with Bar(f"verifying {folder.name}", sum((folder / n).stat().st_size for n in names), "B") as shown:
        for name, digest in about["contents"].items():
            if outside(name):
                found.append(f"{RECEIPT} {outside(name)}")
            elif name not in names:
                found.append(f"{name} is missing")
            elif sha256_of(folder / name, shown.update) != digest:
                found.append(f"{name} has changed since it was written (SHA-256 differs)")
    if not found and any(is_of_set(name, "ema") for name in about["contents"]):
        try:
            scan_folder(folder)
        except CheckpointFolderError as error:
            found.append(str(error))
    return found


def problems_of(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with the bytes of a checkpoint's files, read on all cores, of those ``wanted`` by their
    names in the manifest; and with the states and tensors they promise, as a resume reads them."""
    if (about := receipt_of(folder)) is not None:
        return _changed_in_export(folder, about)
    if is_plain(folder):
        return _broken_in_plain(folder)
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [error.problem]
    names = [name for name in manifest["files"] if wanted(name)]
    found = changed_files(folder, wanted, threads=os.cpu_count() or 1)
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
