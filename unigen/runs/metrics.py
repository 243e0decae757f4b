"""The reader of ``metrics.jsonl``: a line is parsed once, by byte offset, so that a growing file is followed.

The numbers that are drawn are kept in full, as columns, and thinned when they are drawn. A log of a million
lines (300 MB) takes some seconds, once.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from unigen.foreign import ForeignFileError, open_file

TRAIN = (
    "loss", "text_loss", "image_loss", "preserve_loss", "grad_norm", "learning_rate", "tokens_per_second",
    "data_wait",
)  # fmt: skip
VALIDATION = ("val_loss", "val_text_loss", "val_image_loss")
CURVES = (*TRAIN, *VALIDATION)

CHUNK = 1 << 20  # bytes parsed at once; no line is longer
POINTS = 2048  # of a curve, at most: more than any chart has columns
RECENT = 200  # lines kept as they are, of training and of validation each
MARK = 64  # bytes before the offset that must still stand there, or the file has been rewritten
MAX_STEP = 1 << 53
NAMES, NAME_LENGTH = 200, 100  # of grouped curves: at most so many, no longer than this
HUGE = 1e300  # a value beyond is none: sums and ranges of such overflow


class Point(NamedTuple):
    """A run of steps of a curve; of one step alone where the curve is short."""

    step: float
    mean: float
    low: float
    high: float


class Log:
    """What has been read of a log.

    Args:
        steps: First and last step of the curves; lines outside are read for the rest alone.

    Attributes:
        recent, validations: The last lines of training and of validation, as they are.
        skipped: Steps that were left out, the last ones.
        latest: The last value of each curve.
        groups: Names of grouped numbers (``val/text_loss_by_task/edit``) by their group, what stands before
            the last stroke; in the order in which they came.
    """

    def __init__(self, steps: tuple[int, int] = (0, MAX_STEP)):
        self.steps = steps
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.validations: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.skipped: deque[int] = deque(maxlen=1000)
        self.n_skipped = self.n_not_finite = self.n_unreadable = self.n_lines = 0
        self.not_finite_step: int | None = None
        self.latest: dict[str, float] = {}
        self.last_step: int | None = None
        # name -> [2, n] float64, steps and values in the order of the file; in parts until they are drawn
        self._curves: dict[str, list[np.ndarray]] = {name: [] for name in CURVES}
        self.groups: dict[str, list[str]] = {}
        self._points: dict[str, list[Point]] = {}

    def add(self, entries: list[dict[str, Any]], n_unreadable: int = 0) -> None:
        """Takes lines in the order of the file, and how many stood among them that are none."""
        self.n_lines += len(entries)
        self.n_unreadable += n_unreadable
        if not entries:
            return
        self._points.clear()
        steps = np.array([entry["step"] for entry in entries], float)
        self._meet([entry for entry in entries if "loss" not in entry])
        for name, parts in self._curves.items():
            values = _column([entry.get(name) for entry in entries])
            there = ~np.isnan(values)
            if there.any():
                parts.append(np.stack([steps[there], values[there]]))
                self.latest[name] = float(parts[-1][1, -1])
        for entry in entries:
            if entry.get("skipped"):
                self.n_skipped += 1
                self.skipped.append(entry["step"])
            if entry.get("nonfinite"):
                self.n_not_finite += 1
                self.not_finite_step = entry["step"]
        self.recent.extend(entry for entry in entries[-2 * RECENT :] if "loss" in entry)
        self.validations.extend(entry for entry in entries if "val_loss" in entry)
        self.last_step = entries[-1]["step"]

    def _meet(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Makes curves of grouped numbers that were not met before."""
        for name in dict.fromkeys(name for entry in entries for name in entry):
            group, stroke, last = name.rpartition("/")
            fits = len(name) <= NAME_LENGTH and len(self._curves) < len(CURVES) + NAMES
            if stroke and group and last and fits and name not in self._curves:
                self._curves[name] = []
                self.groups.setdefault(group, []).append(name)

    def curve(self, name: str) -> np.ndarray:
        """[2, n] float64: steps, ascending, and values. Of several lines with a step the last one counts."""
        parts = self._curves[name]
        curve = np.concatenate([np.empty((2, 0)), *parts], 1)
        if (np.diff(curve[0]) <= 0).any():
            _, last = np.unique(curve[0, ::-1], return_index=True)
            curve = curve[:, -1 - last]
        parts[:] = [curve]
        return curve[:, (curve[0] >= self.steps[0]) & (curve[0] <= self.steps[1])]

    def best(self, name: str = "val_loss") -> tuple[int, float] | None:
        """Step and value where a curve is lowest; None where it has none. Step 0 is the model that the run
        began with: none of its results, there as in the run's own choice of ``best``."""
        steps, values = self.curve(name)
        steps, values = steps[steps > 0], values[steps > 0]
        return (int(steps[values.argmin()]), float(values.min())) if len(values) else None

    def points(self, name: str) -> list[Point]:
        """The curve as at most ``POINTS`` points, each of as many steps: a power of two."""
        if name not in self._points:
            self._points[name] = self._thinned(name)
        return self._points[name]

    def _thinned(self, name: str) -> list[Point]:
        steps, values = self.curve(name)
        if not len(steps):
            return []
        width = 1
        while steps[-1] // width - steps[0] // width >= POINTS:
            width *= 2
        at = np.flatnonzero(np.diff(steps // width, prepend=-1))  # where a point's steps begin
        counts = np.diff(at, append=len(steps))
        means = [np.add.reduceat(column, at) / counts for column in (steps, values)]
        columns = np.stack([*means, np.minimum.reduceat(values, at), np.maximum.reduceat(values, at)])
        return [Point(*point) for point in columns.T.tolist()]


def _column(values: list[Any]) -> np.ndarray:
    """[n] float64; NaN for what is no number."""
    if not set(map(type, values)) <= {float, type(None)}:
        values = [value if _is_finite(value) else None for value in values]
    column = np.array(values, float)
    column[~(np.abs(column) < HUGE)] = np.nan
    return column


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < HUGE


def numbers(entries: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """The finite values of ``name`` in entries."""
    return [float(entry[name]) for entry in entries if _is_finite(entry.get(name))]


# ---- files that grow


class Follower:
    """A file of JSON lines that may grow, be rewritten by a resume, or not be there yet."""

    def __init__(self, path: Path):
        self.path, self.modified = Path(path), 0.0
        self._begin()

    def restart(self) -> None:
        """The file is a new one: what was taken is void."""
        raise NotImplementedError

    def take(self, lines: list[bytes]) -> None:
        """Lines that are new; none is empty."""
        raise NotImplementedError

    def update(self) -> int:
        """Takes what is new; how many bytes that are."""
        try:
            with open_file(self.path, [self.path.parent]) as file:
                stat = os.fstat(file.fileno())
                # A new inode alone says nothing: a copied folder has one at every copy.
                file.seek(self._offset - len(self._mark))
                if stat.st_size < self._offset or file.read(len(self._mark)) != self._mark:
                    self._begin()
                self.modified = stat.st_mtime
                return self._read(file)
        except ForeignFileError as error:
            if error.code == "missing":
                self._begin()
        except OSError:  # a network folder that is away for a moment: show what was known
            pass
        return 0

    def _begin(self) -> None:
        self._offset, self._mark = 0, b""
        self.restart()

    def _read(self, file: BinaryIO) -> int:
        begin = self._offset
        while True:
            file.seek(self._offset)
            data = file.read(CHUNK)
            whole = data.rfind(b"\n") + 1
            if not whole and len(data) < CHUNK:  # a line still being written
                return self._offset - begin
            data = data[: whole or CHUNK]
            self.take([line for line in data.split(b"\n") if line.strip()])
            self._offset += len(data)
            self._mark = (self._mark + data[-MARK:])[-MARK:]


class Metrics(Follower):
    """A ``metrics.jsonl``; ``log`` is what its lines say. ``steps``: first and last of the curves.
    ``having``: only lines that hold this text are parsed."""

    def __init__(self, path: Path, steps: tuple[int, int] = (0, MAX_STEP), having: str = ""):
        self._steps, self._having = steps, having.encode()
        super().__init__(path)

    def restart(self) -> None:
        self.log = Log(self._steps)

    def take(self, lines: list[bytes]) -> None:
        lines = [line for line in lines if self._having in line]
        entries = [value for value in parsed(lines) if _is_entry(value)]
        self.log.add(entries, len(lines) - len(entries))


def read_log(path: Path, having: str = "") -> Log:
    """What a ``metrics.jsonl`` says now; nothing where there is none. ``having`` as of :class:`Metrics`."""
    metrics = Metrics(path, having=having)
    metrics.update()
    return metrics.log


class LogTail(Follower):
    """How many JSON objects a file has, and the last ones: at most ``keep``."""

    def __init__(self, path: Path, keep: int = 5):
        self._keep = keep
        super().__init__(path)

    def restart(self) -> None:
        self.count, self.last = 0, deque[Mapping[str, Any]](maxlen=self._keep)

    def take(self, lines: list[bytes]) -> None:
        found = [value for value in parsed(lines) if isinstance(value, dict)]
        self.count += len(found)
        self.last.extend(found)


def parsed(lines: list[bytes]) -> list[Any]:
    """The JSON value of each line; None where it is none."""
    values = _value(b"[" + b",".join(lines) + b"]")  # a fifth faster than line by line
    whole = values is not None and len(values) == len(lines)
    return values if whole else [_value(line) for line in lines]


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("step")) is int and 0 <= value["step"] < MAX_STEP
