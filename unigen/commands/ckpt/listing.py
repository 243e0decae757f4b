"""What checkpoints a run has, from manifests and sizes alone."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from unigen.commands.ckpt.verify import RECEIPT, receipt_of
from unigen.config import UserError
from unigen.figures import gb
from unigen.messages import in_language
from unigen.runs import layout
from unigen.runs.checkpoint import CheckpointError, read_manifest, steps, wrong_size
from unigen.runs.metrics import read_log
from unigen.runs.space import folder_bytes
from unigen.show.terminal import say, table

_HEADER = ("checkpoint", "step", "written", "size", "processes", "engine", "holds", "val_loss", "state")
_HALF = {"partial": "half written", "old": "set aside"}
_UNKNOWN: dict[str, Any] = {
    "step": None, "time": None, "bytes": 0, "processes": None, "engine": None, "holds": [],
    "resumable": False, "skipped_steps": None, "diverging": False, "state": "damaged", "problems": [],
}  # fmt: skip


def must_be_folder(folder: Path) -> None:
    """Raises UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder. Fix: name the folder of a run (its output_dir)")


def list_checkpoints(folder: Path, as_json: bool = False) -> int:
    """Prints the checkpoints of a run, or one. Sizes are looked at, bytes are not read.

    Raises:
        UserError: there is no such folder.
    """
    must_be_folder(folder)
    about = receipt_of(folder)
    inside = checkpoints_of(folder) if about is None else []
    rows = list(map(checkpoint_facts, inside)) if about is None else [_exported(folder, about)]
    run = folder.parent if is_checkpoint_folder(folder) else folder
    losses = dict(read_log(run / layout.METRICS, having="val_loss").curve("val_loss").T.tolist())
    for row in rows:
        row["val_loss"] = losses.get(row["step"])
    if as_json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        say(f"{folder} holds no checkpoints")
    else:
        say(table(_HEADER, list(map(_cells, rows))))
        say("Sizes were compared, bytes were not read; that does: unigen ckpt verify")
    return 0


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: name, step, time (unix s), bytes, processes, engine, holds,
    resumable, skipped_steps ([of the last ones, how many these are]; null where none), diverging (written
    while steps had to be skipped: ``auto`` passes over it), state, problems.

    ``state`` is whole, damaged, half written, or set aside (a run was killed while it replaced a checkpoint).
    """
    name, left = layout.unfinished(folder.name) or (folder.name, "")
    row: dict[str, Any] = {"name": name, **_UNKNOWN, "step": layout.step_of(name)}
    if left:
        return row | {"state": _HALF[left], "bytes": folder_bytes(folder)}
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return row | {"problems": [error.problem], "bytes": folder_bytes(folder)}
    sizes = {file: entry["size"] for file, entry in manifest["files"].items()}
    problems = _wrong_sizes(folder, sizes)
    return row | {
        "step": manifest["step"],
        "time": manifest["time"],
        "bytes": sum(sizes.values()),
        "processes": manifest["world"],
        "engine": manifest.get("engine"),
        "holds": manifest["groups"],
        "resumable": layout.TRAINER in manifest["states"],
        "skipped_steps": manifest.get("skipped_steps"),
        "diverging": manifest.get("diverging", False),
        "state": "damaged" if problems else "whole",
        "problems": problems,
    }


def _exported(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """As :func:`checkpoint_facts`, of an export."""
    sizes = {name: entry["size"] for name, entry in about.get("files", {}).items()}
    problems = _wrong_sizes(folder, sizes) + ([] if about else [f"{RECEIPT} cannot be read"])
    return {
        "name": folder.name,
        **_UNKNOWN,
        "step": about.get("step"),
        "time": (folder / RECEIPT).stat().st_mtime,
        "bytes": folder_bytes(folder),
        "holds": ["export", *([about["quantize"]] if about.get("quantize") else [])],
        "state": "damaged" if problems else "whole",
        "problems": problems,
    }


def _wrong_sizes(folder: Path, sizes: dict[str, int]) -> list[str]:
    return [found for file, size in sizes.items() if (found := wrong_size(folder / file, file, size))]


def _cells(row: dict[str, Any]) -> list[str]:
    at, loss, problems = row["time"], row["val_loss"], row["problems"]
    written = "-" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
    state = "; ".join([*map(in_language, [row["state"], *problems[:3]]), *["..."][: len(problems) > 3]])
    if row["state"] == "whole" and not row["resumable"]:
        state += in_language(", weights only")
    if row["skipped_steps"]:
        state += in_language(", {} of the last {} steps skipped".format(*row["skipped_steps"]))
    step, *known = ["-" if row[key] is None else str(row[key]) for key in ("step", "processes", "engine")]
    holds, loss = " ".join(row["holds"]) or "-", "-" if loss is None else f"{loss:.4f}"
    return [row["name"], step, written, gb(row["bytes"]), *known, holds, loss, state]


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, then ``best``, then what a kill left; or the folder alone where
    it is one."""
    if is_checkpoint_folder(folder):
        return [folder]
    hidden = sorted(p for p in folder.iterdir() if p.is_dir() and layout.unfinished(p.name))
    best = folder / layout.BEST
    return [*reversed(steps(folder)), *([best] if best.is_dir() else []), *hidden]


def is_checkpoint_folder(folder: Path) -> bool:
    """Is the folder one, or the place of one, in place of a run?"""
    name = folder.resolve().name
    if (folder / layout.MANIFEST).exists() or layout.step_of(name) is not None:
        return True
    return name == layout.BEST and not steps(folder)
