"""``metrics.jsonl`` while it grows: read by offset, each curve kept as the means, least and greatest values
of runs of steps.

A line is parsed once. A log of a million lines (300 MB) costs seconds to parse, so a first look at a long one
(``exact=False``) reads its end and samples of the rest, and later calls of :meth:`Metrics.update` read the
whole of it, some megabytes at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

TRAIN = ("loss", "text_loss", "image_loss", "grad_norm", "learning_rate", "tokens_per_second", "data_wait")
VALIDATION = ("val_loss", "val_text_loss", "val_image_loss")
CURVES = (*TRAIN, *VALIDATION)

BUDGET = 24 << 20  # bytes parsed in one update of a long log: about a second
END = 6 << 20  # of them, at its end
PART = 64 << 10  # and the size of a sample of the rest
CHUNK = 1 << 20  # parsed at once; no line is longer
BUCKETS = 2048  # of a curve, at most: more than any chart has columns
RECENT = 200  # rows kept as they are, of training and of validation each
MARK = 64  # bytes before the offset that must still stand there, or the log has been rewritten
MAX_STEP = 1 << 53
HUGE = 1e300  # a value beyond is none: sums and ranges of such overflow


class Point(NamedTuple):
    """A run of steps of a curve; of one step alone where the run is short."""

    step: float
    mean: float
    low: float
    high: float


class Log:
    """What has been read of a log.

    Args:
        steps: First and last step of the curves; lines outside are read for the rest alone.
    """

    def __init__(self, steps: tuple[int, int] = (0, MAX_STEP)):
        self.steps = steps
        self.width = 1  # steps of a bucket, a power of two
        # [count, sum of steps, sum, least, greatest]
        self.buckets: dict[str, dict[int, list[float]]] = {name: {} for name in CURVES}
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.validations: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.skipped: deque[int] = deque(maxlen=1000)  # steps left out, the last ones
        self.n_skipped = self.n_not_finite = self.n_unreadable = self.n_lines = 0
        self.not_finite_step: int | None = None
        self.latest: dict[str, float] = {}
        self.last_step: int | None = None
        self._span: tuple[int, int] | None = None

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Takes rows in the order of the file."""
        first, last = self.steps
        drawn = [row for row in rows if first <= row["step"] <= last]
        if drawn:
            self._widen(min(row["step"] for row in drawn), max(row["step"] for row in drawn))
            for bucket, group in groupby(drawn, key=lambda row: row["step"] // self.width):
                self._fill(bucket, list(group))
        for row in rows:
            if row.get("skipped"):
                self.n_skipped += 1
                self.skipped.append(row["step"])
            if row.get("nonfinite"):
                self.n_not_finite += 1
                self.not_finite_step = row["step"]
        self.recent.extend(row for row in rows[-2 * RECENT :] if "loss" in row)
        self.validations.extend(row for row in rows if "val_loss" in row)
        for row in rows[-RECENT:]:
            self.latest |= {name: float(row[name]) for name in CURVES if _is_finite(row.get(name))}
        if rows:
            self.last_step = rows[-1]["step"]
        self.n_lines += len(rows)

    def points(self, name: str) -> list[Point]:
        """The curve, by step."""
        return [
            Point(steps / n, total / n, low, high) for _, (n, steps, total, low,
            high) in sorted(self.buckets[name].items())
        ]  # fmt: skip

    def _widen(self, first: int, last: int) -> None:
        if self._span is not None:
            first, last = min(first, self._span[0]), max(last, self._span[1])
        self._span = first, last
        while last // self.width - first // self.width >= BUCKETS:
            self.width *= 2
            for name, buckets in self.buckets.items():
                merged: dict[int, list[float]] = {}
                for bucket, entry in buckets.items():
                    _merge(merged, bucket // 2, entry)
                self.buckets[name] = merged

    def _fill(self, bucket: int, rows: list[dict[str, Any]]) -> None:
        for name in CURVES:
            values = [value for row in rows if (value := row.get(name)) is not None]
            if not values:
                continue
            steps = sum(row["step"] for row in rows) / len(rows) * len(values)
            if (
                set(map(type, values)) != {float}
                or not math.isfinite(sum(values))
                or max(map(abs, values)) >= HUGE
            ):
                values = [float(value) for value in values if _is_finite(value)]
                if not values:
                    continue
                steps = sum(row["step"] for row in rows) / len(rows) * len(values)
            _merge(
                self.buckets[name], bucket, [len(values), steps, math.fsum(values), min(values), max(values)]
            )


def _merge(buckets: dict[int, list[float]], bucket: int, entry: list[float]) -> None:
    old = buckets.get(bucket)
    if old is None:
        buckets[bucket] = entry
    else:
        buckets[bucket] = [
            old[0] + entry[0],
            old[1] + entry[1],
            old[2] + entry[2],
            min(old[3], entry[3]),
            max(old[4], entry[4]),
        ]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < HUGE


def numbers(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """The finite values of ``name`` in rows."""
    return [float(row[name]) for row in rows if _is_finite(row.get(name))]


def parse(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The rows of whole lines, and how many lines are none: a row is an object with a ``step``."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        values = json.loads(b"[" + b",".join(lines) + b"]")  # a fifth faster than line by line
        if len(values) != len(lines):
            raise ValueError
    except (ValueError, RecursionError):
        values = [_value(line) for line in lines]
    rows = [
        v for v in values if isinstance(v, dict) and type(v.get("step")) is int and 0 <= v["step"] < MAX_STEP
    ]
    return rows, len(lines) - len(rows)


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class _Pass:
    """One reading of the file, from ``offset`` on."""

    def __init__(self, log: Log, offset: int = 0):
        self.log, self.offset, self._mark = log, offset, b""

    def intact(self, file: Any, size: int) -> bool:
        """Does what has been read still stand there? A new inode alone says nothing: a copied folder has one
        at every copy."""
        if size < self.offset:
            return False
        file.seek(self.offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def read(self, file: Any, end: int, limit: int) -> int:
        """Parses whole lines up to ``end``, about ``limit`` bytes at most; how many bytes."""
        begin = self.offset
        while self.offset < end and self.offset - begin < limit:
            file.seek(self.offset)
            data = file.read(min(CHUNK, end - self.offset))
            whole = data.rfind(b"\n") + 1
            if not whole:
                if len(data) < CHUNK:
                    break  # a line still being written
                whole, self.log.n_unreadable = len(data), self.log.n_unreadable + 1
            rows, bad = parse(data[:whole])
            self.log.add(rows)
            self.log.n_unreadable += bad
            self.offset += whole
            self._mark = (self._mark + data[max(0, whole - MARK) : whole])[-MARK:]
        return self.offset - begin


class Metrics:
    """A log that may grow, be rewritten by a resume, or not be there yet.

    Args:
        path: Of the ``metrics.jsonl``.
        steps: First and last step of the curves.
        exact: Read all of it in the first update, however long that takes.
    """

    def __init__(self, path: Path, steps: tuple[int, int] = (0, MAX_STEP), exact: bool = False):
        self.path, self.steps, self.exact = Path(path), steps, exact
        self._restart()

    def _restart(self) -> None:
        self._whole = _Pass(Log(self.steps))
        self._ahead: _Pass | None = None  # the look at a long log, until the whole is read
        self.size, self.modified = 0, 0.0

    @property
    def log(self) -> Log:
        """What is known now."""
        return (self._ahead or self._whole).log

    @property
    def share(self) -> float:
        """How much of the log the curves rest on in full, in [0, 1]."""
        return min(1.0, self._whole.offset / self.size) if self._ahead is not None and self.size else 1.0

    def update(self) -> int:
        """Reads what is new; how many bytes were parsed."""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                if not all(p.intact(file, stat.st_size) for p in (self._whole, self._ahead) if p is not None):
                    self._restart()
                self.size, self.modified = stat.st_size, stat.st_mtime
                return self._read(file)
        except FileNotFoundError:
            self._restart()
        except OSError:  # a network folder that is away for a moment: show what was known
            pass
        return 0

    def _read(self, file: Any) -> int:
        left = self.size - self._whole.offset
        if self.exact or left <= BUDGET:
            done = self._whole.read(file, self.size, left)
            self._ahead = None
            return done
        if self._ahead is None:
            self._ahead = _Pass(Log(self.steps))
            return self._sample(file, self._whole.offset)
        done = self._ahead.read(file, self.size, BUDGET)
        done += self._whole.read(file, self.size, max(1, BUDGET - done))
        if self._whole.offset >= self._ahead.offset:
            self._ahead = None
        return done

    def _sample(self, file: Any, begin: int) -> int:
        """The end of the log, and lines from all over the rest."""
        assert self._ahead is not None
        done, end = 0, self.size - END
        for place in _places(begin, end, BUDGET - END):
            file.seek(place)
            data = file.read(PART)
            # the first line is cut, but where the file begins
            whole, last = data.find(b"\n") + 1, data.rfind(b"\n") + 1
            rows, _ = parse(data[0 if place == 0 else whole : last])
            self._ahead.log.add(rows)
            done += len(data)
        file.seek(end)
        self._ahead.offset = end + len(file.readline())
        return done + self._ahead.read(file, self.size, END)


def _places(begin: int, end: int, budget: int) -> Iterator[int]:
    count = max(1, budget // PART)
    stride = max(PART, (end - begin) // count)
    return iter(range(begin, end - PART, stride))


class Lines:
    """A file of lines that only grows: how many there are, and the last ones.

    Args:
        path: Of the file; one that is missing has no lines.
        keep: How many of the last lines are kept, as parsed JSON objects.
    """

    def __init__(self, path: Path, keep: int = 5):
        self.path, self.count, self.last = Path(path), 0, deque[Mapping[str, Any]](maxlen=keep)
        self._offset = 0

    def update(self) -> None:
        """Reads what is new."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self.__init__(self.path, self.last.maxlen or 5)  # type: ignore[misc]
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    value = _value(line)
                    if isinstance(value, dict):
                        self.count += 1
                        self.last.append(value)
        except FileNotFoundError:
            self.__init__(self.path, self.last.maxlen or 5)  # type: ignore[misc]
        except OSError:
            pass
