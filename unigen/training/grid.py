"""The pictures of a run's samples as one: a row for each prompt (and for average and weights), a column for
each step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unigen.runs import layout
from unigen.sequence.images import PILImage, open_image, to_image

CELL = 128  # pixels of a side
COLUMNS = 12  # steps: the first, the last, and some between
GAP = 4  # white pixels between cells


def grid_of(samples: Path, step: int) -> PILImage | None:
    """The grid of ``samples/step_N`` up to ``step``; None where no answer holds a picture. Files that are
    gone or broken leave their cells white."""
    steps = sorted(
        n for path in samples.iterdir() if (n := layout.step_of(path.name)) is not None and n <= step
    )
    last = len(steps) - 1
    chosen = sorted({steps[round(k * last / (COLUMNS - 1))] for k in range(COLUMNS)})
    columns = [_pictures(samples / layout.step_name(n)) for n in chosen]
    rows = list(dict.fromkeys(row for column in columns for row in column))
    if not rows:
        return None
    rows.sort()
    side = CELL + GAP
    canvas = np.full((len(rows) * side, len(chosen) * side, 3), 255, np.uint8)
    for x, column in enumerate(columns):
        for y, row in enumerate(rows):
            # at step 0 the weights have no answer of their own
            path = column.get(row) or column.get((row[0], ""))
            cell = None if path is None else _cell(path)
            if cell is not None:
                canvas[y * side : y * side + cell.shape[0], x * side : x * side + cell.shape[1]] = cell
    return to_image(torch.from_numpy(canvas).permute(2, 0, 1) / 127.5 - 1)


def _pictures(folder: Path) -> dict[tuple[int, str], Path]:
    """The first picture of every answer, by the number of its prompt and "" or ``raw``."""
    try:
        index: list[dict[str, Any]] = json.loads((folder / layout.SAMPLES_INDEX).read_text("utf-8"))
        return {
            (number, kind): folder / picture
            for number, line in enumerate(index)
            for kind, answer in (("", line), ("raw", line.get("raw", {})))
            for picture in [p["image"] for p in answer.get("pieces", ()) if "image" in p][:1]
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _cell(path: Path) -> np.ndarray | None:
    """[at most CELL, at most CELL, 3] uint8."""
    try:
        picture = open_image(path)
    except (OSError, ValueError):
        return None
    picture.thumbnail((CELL, CELL))
    return np.asarray(picture)
