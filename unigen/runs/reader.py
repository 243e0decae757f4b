"""The folder of a run, read and never written: its processes, checkpoints, samples and problems, and the disk
it lies on.

Any file may be missing, half written, or of another version; one that cannot be read counts as missing.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigen.config import UserError
from unigen.files import free_bytes, is_held
from unigen.foreign import ForeignFileError, read_json
from unigen.runs import layout
from unigen.runs.metrics import MAX_STEP, LogTail, Metrics, numbers
from unigen.runs.ranks import Rank, RankFiles


class WatchError(UserError):
    """There is no run to watch; the message says where it was looked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. ``time`` is unix seconds, ``size`` bytes, ``world`` how many processes wrote
    it."""

    name: str
    step: int
    time: float
    size: int
    world: int


@dataclass(frozen=True)
class SampleAnswer:
    """The answer to a prompt at a step: ``pieces`` are {"text": str} or {"image": path}, ``given`` are the
    prompt's pictures, ``error`` says why there are no pieces. Where an average of the weights answered,
    ``raw`` is what the weights themselves did."""

    step: int
    prompt: str
    seed: int | None
    pieces: tuple[dict[str, Any], ...]
    error: str = ""
    given: tuple[Path, ...] = ()
    raw: SampleAnswer | None = None


class RunFolder:
    """A run's folder; :meth:`update` reads what is new. ``steps``: first and last of the curves."""

    def __init__(self, folder: Path, steps: tuple[int, int] = (0, MAX_STEP)):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.metrics = Metrics(self.folder / layout.METRICS, steps)
        self.bad_steps = LogTail(self.folder / layout.BAD_STEPS)
        self.bad_records = LogTail(self.folder / layout.BAD_RECORDS)
        self.config: dict[str, Any] = {}
        self.ranks: list[Rank] = []
        self.stacks: list[str] = []
        self.checkpoints: list[Checkpoint] = []
        self.writing: list[str] = []  # checkpoints that are being written, or were when the run died
        self.sampled: list[int] = []  # steps with samples
        self.earlier: list[str] = []
        self.disk_free: int | None = None
        self.locked: bool | None = None  # None: cannot be known here
        # (time of the run's clock, step) that the first process has told while we looked
        self.rank_steps: list[tuple[float, int]] = []
        # JSON files: (mtime in ns, size) and the value
        self._read: dict[Path, tuple[tuple[int, int], Any]] = {}
        self._rank_files = RankFiles(self.folder / layout.RANKS)

    def update(self) -> None:
        self.metrics.update()
        self.bad_steps.update()
        self.bad_records.update()
        names = _names(self.folder)
        config = self._json(self.folder / layout.CONFIG)
        self.config = config if isinstance(config, dict) else {}
        self.earlier = list(filter(layout.is_earlier, names))
        hidden = filter(None, map(layout.unfinished, names))
        self.writing = [name for name, role in hidden if role == "partial"]
        found = filter(None, map(self._checkpoint, filter(layout.is_checkpoint, names)))
        self.checkpoints = sorted(found, key=lambda c: (c.step, c.name != layout.BEST))
        sampled = map(layout.step_of, _names(self.folder / layout.SAMPLES))
        self.sampled = sorted(step for step in sampled if step is not None)
        self._update_ranks()
        self.locked = is_held(self.folder / layout.LOCK)
        with contextlib.suppress(OSError):
            self.disk_free = free_bytes(self.folder)

    # ---- what several files say together

    @property
    def step(self) -> int:
        """Steps done."""
        logged = self.metrics.log.last_step or 0
        return max([logged, *(rank.step for rank in self.ranks if rank.rank == 0)])

    @property
    def started(self) -> float:
        """Unix seconds, by the run's clock, when its processes started, the last time where it was resumed; 0
        where that is not known."""
        told = [rank.facts.get("started") for rank in self.ranks if rank.rank == 0]
        return next((float(t) for t in told if type(t) in (int, float) and 0 < t < 1e300), 0.0)

    @property
    def total_steps(self) -> int | None:
        told = [rank.facts.get("total_steps") for rank in self.ranks if rank.rank == 0]
        if newest := self.last_checkpoint:
            state = self._json(self.folder / newest.name / layout.state_file(layout.TRAINER))
            told.append(state.get("total_steps") if isinstance(state, dict) else None)
        told.append(self.config.get("max_steps"))
        return next((n for n in told if type(n) is int and 0 < n < MAX_STEP), None)

    @property
    def last_checkpoint(self) -> Checkpoint | None:
        """The newest one that a resume could take."""
        return next((c for c in reversed(self.checkpoints) if c.name != layout.BEST), None)

    def option(self, name: str, default: float) -> float:
        """A number of the run's options; ``default`` where it is none."""
        return next(iter(numbers([self.config], name)), default)

    def answers(self, step: int) -> list[SampleAnswer]:
        """The samples of a step, in the order of the prompts."""
        folder = self.folder / layout.SAMPLES / layout.step_name(step)
        found = self._json(folder / layout.SAMPLES_INDEX)
        answers = []
        for entry in found if isinstance(found, list) else []:
            if (pieces := _pieces(folder, entry)) is None:
                continue
            seed = entry.get("seed") if isinstance(entry.get("seed"), int) else None
            names = entry.get("given") if isinstance(entry.get("given"), list) else []
            given = tuple(path for name in names if (path := _inside(folder, name)))
            asked, own, raw = (step, str(entry.get("prompt", "")), seed), entry.get("raw"), None
            if (raw_pieces := _pieces(folder, own)) is not None:
                raw = SampleAnswer(*asked, raw_pieces, str(own.get("error") or ""))
            answers.append(SampleAnswer(*asked, pieces, str(entry.get("error") or ""), given, raw))
        return answers

    # ---- files

    def _json(self, path: Path) -> Any:
        """The value of a JSON file, read again where it has changed; None where it cannot be read."""
        try:
            stat = path.stat()
            key = (stat.st_mtime_ns, stat.st_size)
            if path in self._read and self._read[path][0] == key:
                return self._read[path][1]
            value = read_json(path, [self.folder])
        except (OSError, ForeignFileError):
            return None
        self._read[path] = (key, value)
        return value

    def _checkpoint(self, name: str) -> Checkpoint | None:
        path = self.folder / name / layout.MANIFEST
        manifest = self._json(path)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            return None
        sizes = [entry.get("size") for entry in manifest["files"].values() if isinstance(entry, dict)]
        step, world, when = manifest.get("step"), manifest.get("world", 1), manifest.get("time")
        if type(step) is not int:
            return None
        if not isinstance(when, (int, float)) or not 0 <= when < 1e11:
            when = path.stat().st_mtime
        size = sum(size for size in sizes if type(size) is int)
        return Checkpoint(name, step, float(when), size, world if type(world) is int else 1)

    def _update_ranks(self) -> None:
        # of a run that is just starting, in a folder that may hold an earlier one
        starting = (self.folder / layout.STARTING_RANKS).is_dir()
        place = layout.STARTING_RANKS if starting else layout.RANKS
        if self._rank_files.folder != self.folder / place:
            self._rank_files = RankFiles(self.folder / place)
        self.ranks = self._rank_files.read()
        self.stacks = [f"{place}/{name}" for name in self._rank_files.stacks()]
        for rank in self.ranks[:1]:
            if not self.rank_steps or rank.time != self.rank_steps[-1][0]:
                self.rank_steps = [*self.rank_steps[-200:], (rank.time, rank.step)]

    def clock_offset(self) -> float:
        """Seconds that the run's clock seems to be ahead of this one's; 0 where heartbeats do not show it."""
        return self._rank_files.clock_offset()


def find_runs(paths: list[str]) -> list[Path]:
    """The folders of the runs that paths name: each a run, or a folder of runs.

    Raises:
        WatchError: nothing is named, or a path holds no run.
    """
    if not paths:
        raise WatchError(
            "no run is named. Fix: name the folder of a run (unigen watch outputs/unified_training)"
        )
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if not path.is_dir():
            raise WatchError(
                f"{given}: there is no such folder. Fix: name the folder of a run, its --output_dir"
            )
        runs = [path] if is_run(path) else [path / name for name in _names(path) if is_run(path / name)]
        if not runs:
            raise WatchError(
                f"{given}: no run is there, neither {layout.METRICS} nor {layout.CONFIG}. Fix: name the"
                " --output_dir of a training, or a folder of several"
            )
        found += runs
    return list(dict.fromkeys(found))


def is_run(folder: Path) -> bool:
    """Is it the output folder of a training? A checkpoint has a config.json too, but is sealed by a
    manifest."""
    files = {name for name in (layout.METRICS, layout.CONFIG, layout.LOCK) if (folder / name).is_file()}
    beats = any((folder / name).is_dir() for name in (layout.RANKS, layout.STARTING_RANKS))
    return beats or layout.METRICS in files or files == {layout.CONFIG, layout.LOCK}


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _pieces(folder: Path, entry: Any) -> tuple[dict[str, Any], ...] | None:
    """The pieces of an answer in ``index.json``; None where it is none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("pieces"), list):
        return None
    pieces: list[dict[str, Any]] = []
    for piece in entry["pieces"]:
        if isinstance(piece, dict) and isinstance(piece.get("text"), str):
            pieces.append({"text": piece["text"]})
        elif isinstance(piece, dict) and (path := _inside(folder, piece.get("image"))):
            pieces.append({"image": path})
    return tuple(pieces)


def _inside(folder: Path, name: Any) -> Path | None:
    """A file of the folder; None for a name that leads elsewhere, since a run may come from someone else."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except OSError:
        return None
