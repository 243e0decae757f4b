"""What checkpoints a run has, from manifests and sizes alone."""

from __future__ import annotations

import contextlib
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from unigen.commands.ckpt.verify import reason
from unigen.config import UserError
from unigen.runs.checkpoint import MANIFEST, CheckpointError, read_manifest, steps
from unigen.runs.space import folder_bytes, gb

_HIDDEN = re.compile(r"\.(\w+)\.(partial|old)-\d+")
_HALF = {"partial": "half written", "old": "set aside"}


def list_checkpoints(folder: Path, as_json: bool = False) -> int:
    """Prints the checkpoints of a run, or one. Sizes are looked at, bytes are not read.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder. Fix: name the folder of a run (its output_dir)")
    rows = [describe(path) for path in listed(folder)]
    losses = validation_losses((folder.parent if is_checkpoint(folder) else folder) / "metrics.jsonl")
    for row in rows:
        row["val_loss"] = losses.get(row["step"])
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif not rows:
        print(f"{folder} holds no checkpoints")
    else:
        print(table(rows))
        print("Sizes were compared, bytes were not read; that does: unigen ckpt verify")
    return 0


def describe(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: name, step, time (unix s), bytes, processes, engine, holds,
    resumable, state, problems.

    ``state`` is whole, damaged, half written, or set aside (a run was killed while it replaced a checkpoint).
    """
    hidden = _HIDDEN.fullmatch(folder.name)
    name = hidden[1] if hidden else folder.name
    step = re.fullmatch(r"step_(\d+)", name)
    row: dict[str, Any] = {
        "name": name,
        "step": int(step[1]) if step else None,
        "time": None,
        "bytes": 0,
        "processes": None,
    }
    row |= {"engine": None, "holds": [], "resumable": False, "state": "damaged", "problems": []}
    if hidden:
        return row | {"state": _HALF[hidden[2]], "bytes": folder_bytes(folder)}
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return row | {"problems": [reason(folder, error)], "bytes": folder_bytes(folder)}
    sizes = {file: entry["size"] for file, entry in manifest["files"].items()}
    problems = [found for file, size in sizes.items() if (found := _wrong_size(folder / file, file, size))]
    row |= {
        "step": manifest["step"],
        "time": manifest["time"],
        "bytes": sum(sizes.values()),
        "processes": manifest["world"],
    }
    row |= {
        "engine": manifest.get("engine"),
        "holds": manifest["groups"],
        "resumable": "trainer" in manifest["states"],
    }
    return row | {"state": "damaged" if problems else "whole", "problems": problems}


def _wrong_size(path: Path, name: str, size: int) -> str:
    try:
        found = path.stat().st_size
    except OSError as error:
        return (
            f"{name} is missing"
            if isinstance(error, FileNotFoundError)
            else f"{name} cannot be read ({error})"
        )
    return "" if found == size else f"{name} has {found} bytes instead of {size}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of ``ls`` as text."""
    cells = [("checkpoint", "step", "written", "size", "processes", "engine", "holds", "val_loss", "state")]
    for row in rows:
        written = (
            datetime.fromtimestamp(row["time"]).strftime("%Y-%m-%d %H:%M:%S")
            if row["time"] is not None
            else "-"
        )
        loss = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        state = (
            row["state"]
            + "".join(f"; {problem}" for problem in row["problems"][:3])
            + ("; ..." if len(row["problems"]) > 3 else "")
        )
        if row["state"] == "whole" and not row["resumable"]:
            state += ", weights only"
        known = [("-" if row[key] is None else str(row[key])) for key in ("step", "processes", "engine")]
        cells.append(
            (
                row["name"],
                known[0],
                written,
                gb(row["bytes"]),
                *known[1:],
                " ".join(row["holds"]) or "-",
                loss,
                state,
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def validation_losses(metrics: Path) -> dict[int, float]:
    """Step -> validation loss, as ``metrics.jsonl`` has it; a line that was cut short is passed over."""
    found: dict[int, float] = {}
    with contextlib.suppress(OSError), open(metrics, encoding="utf-8", errors="replace") as file:
        for line in file:
            if '"val_loss"' in line:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    values = json.loads(line)
                    found[int(values["step"])] = float(values["val_loss"])
    return found


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, then ``best``, then what a kill left; or the folder alone where
    it is one."""
    if is_checkpoint(folder):
        return [folder]
    hidden = sorted(p for p in folder.iterdir() if p.is_dir() and _HIDDEN.fullmatch(p.name))
    best = [folder / "best"] if (folder / "best").is_dir() else []
    return [*reversed(steps(folder)), *best, *hidden]


def is_checkpoint(folder: Path) -> bool:
    """Is the folder one, or the place of one, in place of a run?"""
    name = folder.resolve().name
    return (
        (folder / MANIFEST).exists()
        or re.fullmatch(r"step_\d+", name) is not None
        or (name == "best" and not steps(folder))
    )
