"""What a folder is that was given for a checkpoint and is none, and what to do about it. No PyTorch here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from unigen.files import meant
from unigen.foreign import ForeignFileError, read_json
from unigen.printing import typed

ADAPTER = "adapter_config.json"
_MARK = "llm_config.json"  # every checkpoint folder has it
_UNREADABLE = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_SAVED = re.compile(r"best|step_\d+")  # as a training calls its checkpoints (runs/layout.py)
_SHOWN = 7
_MANY = 1000  # entries of a folder that are looked at


def fix_of(folder: Path) -> str:
    """The fix where ``folder`` lacks what a checkpoint has."""
    names = _names(folder)
    if ADAPTER in names:
        base = _base_named(folder)
        return (
            f"this folder holds an adapter, no model: give its base{f', {base}' if base else ''}, or merge"
            f" them ({merge_command(folder)})"
        )
    if _MARK not in names and (found := _checkpoint_below(folder)):
        return f"give {found}, the checkpoint that lies in this folder"
    weights = [name for name in names if name.endswith(".safetensors") and name != "ae.safetensors"]
    if weights and _MARK not in names:
        return (
            f"this folder has weights ({weights[0]}) without configs, as the reference's own training saves"
            " them: copy llm_config.json, vit_config.json, ae.safetensors and the tokenizer's files of the"
            " base model beside them"
        )
    unreadable = [name for name in names if name.lower().endswith(_UNREADABLE)]
    if unreadable and not weights:
        return (
            f"{unreadable[0]} is a GGUF file or a pickle, which is never loaded: use the checkpoint's"
            " safetensors"
        )
    return "check the path, or download the whole repository"


def fix_of_place(folder: Path) -> str:
    """The fix where ``folder``, given for a checkpoint's, is no folder."""
    if folder.is_file():
        return f"name its folder, {folder.parent}"
    saved = [name for name in _names(folder.parent) if _SAVED.fullmatch(name)]
    if saved:
        newest = ", ".join(sorted(saved, key=lambda name: (len(name), name))[:-_SHOWN:-1])
        return f"name a checkpoint that {folder.parent} holds: {newest}"
    if near := meant(folder):
        return f"correct the path: {near} is there"
    return "check the path; docs/start.md says how BAGEL is fetched, and its JSON files alone for unigen plan"


def is_adapter_folder(folder: Path) -> bool:
    """Does the folder hold an adapter, and no model?"""
    return (folder / ADAPTER).is_file() and not (folder / _MARK).exists()


def merge_command(folder: Path) -> str:
    """What makes a model of an adapter's folder and its base."""
    return f"unigen ckpt export {typed(folder)} NEW_FOLDER --merge"


def as_new_run(folder: Path) -> str:
    """What starts a new run from the weights of a checkpoint, also where they are an adapter's."""
    if is_adapter_folder(folder):
        return f"--model_path NEW_FOLDER, after {merge_command(folder)}"
    return f"--model_path {typed(folder)}"


def _base_named(folder: Path) -> str:
    """The base that an adapter names; "" where it names none."""
    try:
        said = read_json(folder / ADAPTER, [folder])
    except ForeignFileError:
        return ""
    return str(said.get("base_model_name_or_path") or "") if isinstance(said, dict) else ""


def _checkpoint_below(folder: Path) -> Path | None:
    """The checkpoint in a run (``best``, else the newest step), in the root of a Hugging Face cache, or in a
    folder around one; None where there is none."""
    below = [folder / name for name in _names(folder) if not name.startswith(".")]
    found = [path for path in below if _is_checkpoint(path)]
    if not found:
        found = [path for path in (*_snapshots(folder), *_snapshots(*below)) if _is_checkpoint(path)]
    if not found:  # weights alone, as the reference saves them, named by their step
        found = [path for path in below if (path / "ema.safetensors").is_file()]
    return max(found, key=lambda path: (path.name == "best", len(path.name), path.name), default=None)


def _snapshots(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (folder / "snapshots" / name for name in _names(folder / "snapshots"))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / _MARK).is_file()


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))[:_MANY]
    except OSError:
        return []
