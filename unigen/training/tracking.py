"""Who is told how a run goes: ``metrics.jsonl``, Weights & Biases where asked, and the console.

Nothing of the environment is written anywhere; a tracker that fails says so once and never stops a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from unigen.config import Config

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_WANDB_ID = "wandb_run_id"
_WANDB_FINISH_S = 120.0  # a lost network must not hold the end of a run for ever


class Backend(Protocol):
    """What a row of :data:`TRACKERS` makes."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...
    def finish(self) -> None: ...


class Tracker:
    """Hands every metric to every tracker that the config asks for; one process of a run has one.

    Args:
        output_dir: Folder of the run; made when missing.
        config: Chooses the trackers, and is shown in them.
        resume_step: Optimiser steps done by the checkpoint the run resumes from; what was logged after it is dropped, as it will
            be logged again. None or 0 for a fresh start, which sets an earlier run's log aside.
    """

    def __init__(self, output_dir: Path, config: Config, resume_step: int | None = None):
        resume_step = resume_step or None
        self._backends: dict[str, Backend] = {}
        self._complained: set[str] = set()
        for name, start in TRACKERS.items():
            try:
                backend = start(Path(output_dir), config, resume_step)
            except Exception as error:
                self._complain(name, "cannot start", error)
            else:
                if backend is not None:
                    self._backends[name] = backend

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Logs flat metrics (numbers, strings, None, 0-d tensors) after optimiser step ``step``. Never raises for a broken tracker."""
        row = {name: _plain(value) for name, value in metrics.items()}
        for name, backend in list(self._backends.items()):
            try:
                backend.log(row, step)
            except Exception as error:
                self._complain(name, "cannot log", error)
                if name != "jsonl":  # a full disk may empty again; a dead service only costs time
                    del self._backends[name]

    def finish(self) -> None:
        """Closes every tracker; a second call does nothing."""
        while self._backends:
            name, backend = self._backends.popitem()
            try:
                backend.finish()
            except Exception as error:
                self._complain(name, "cannot finish", error)

    def _complain(self, name: str, what: str, error: Exception) -> None:
        if name not in self._complained:
            self._complained.add(name)
            log.warning("Tracker %s %s; the run goes on without it. %s: %s", name, what, type(error).__name__, error)


def _plain(value: Any) -> Any:
    """A tensor or array scalar as a Python number; everything else as it is."""
    return value.item() if hasattr(value, "item") else value


# ---- metrics.jsonl


class JsonLines:
    """One JSON object a line, ``step`` first. What is not finite is null, and its name is listed under ``nonfinite``."""

    def __init__(self, output_dir: Path, config: Config, resume_step: int | None):
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / METRICS_FILE
        if path.exists():
            _set_aside(path) if resume_step is None else _drop_after(path, resume_step)
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        assert self._file is not None, "already finished"
        nonfinite = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        row = {"step": step} | {name: None if name in nonfinite else value for name, value in metrics.items() if name != "step"}
        if nonfinite:
            row["nonfinite"] = nonfinite
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        # One write, so that a reader (or a kill) never meets half a line; a disk that took only half gets it cut off again.
        if os.write(self._file, line) != len(line):
            os.ftruncate(self._file, size)
            raise OSError(f"no space left for a line of {METRICS_FILE}")

    def finish(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _set_aside(path: Path) -> None:
    """Renames an earlier run's log to the first free ``metrics.old-N.jsonl``."""
    number = 1
    while (old := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    path.rename(old)
    log.info("The folder holds the log of an earlier run; it is now %s", old)


def _drop_after(path: Path, step: int) -> None:
    """Rewrites the log, in one rename, without the lines after ``step`` and without a line a kill cut short."""
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            log.warning("%s:%d is no line of metrics; it is dropped: %r", path, number, line[:80])
    new = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with open(new, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


# ---- Weights & Biases


class Wandb:
    """A run of Weights & Biases; resuming continues the run whose id the output folder remembers."""

    def __init__(self, output_dir: Path, config: Config, resume_step: int | None):
        # Its crash reports go to a third party; a user who wants that sets the variable.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        output_dir.mkdir(parents=True, exist_ok=True)
        remembered = output_dir / _WANDB_ID
        run_id = remembered.read_text("utf-8").strip() if resume_step is not None and remembered.exists() else None
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name,
            dir=str(output_dir),
            config=config.to_dict(),
            id=run_id,
            resume="allow" if run_id else None,
            # No command line, host name, repository or console: they can hold secrets.
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True, finish_timeout=_WANDB_FINISH_S
            ),
        )
        remembered.write_text(self._run.id + "\n", "utf-8")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def finish(self) -> None:
        self._run.finish()


def _start_wandb(output_dir: Path, config: Config, resume_step: int | None) -> Backend | None:
    return Wandb(output_dir, config, resume_step) if config.wandb_project else None


TRACKERS: dict[str, Callable[[Path, Config, int | None], Backend | None]] = {"jsonl": JsonLines, "wandb": _start_wandb}
"""Name -> what starts it: (output folder, config, step resumed from) -> a tracker, or None where the config does not ask for it."""


# ---- the console


_SHOWN: dict[str, tuple[str, str]] = {
    "loss": ("loss", ".4f"),
    "text_loss": ("text", ".4f"),
    "image_loss": ("image", ".4f"),
    "grad_norm": ("norm", ".3f"),
    "learning_rate": ("lr", ".2e"),
    "tokens_per_second": ("tok/s", ",.0f"),
    "data_wait": ("wait", ".0%"),
}
"""Metric -> its short name and format; ``data_wait`` is the share of the time spent waiting for data, in [0, 1]."""


class Progress:
    """A bar on a terminal; elsewhere a plain line every ``every`` steps, and at the last.

    Args:
        total_steps: Optimiser steps of the whole run.
        initial: Steps done already, after a resume.
        every: Steps between two plain lines.
        enabled: False prints nothing: the other processes of a run.
        stream: Where to; standard error by default.
    """

    def __init__(self, total_steps: int, initial: int, every: int, enabled: bool, stream: TextIO | None = None):
        self._total, self._initial, self._every, self._enabled = total_steps, initial, every, enabled
        self._stream = stream or sys.stderr
        self._first: tuple[float, int] | None = None  # when the first step was done, and which: it alone compiles and warms up
        self._start = time.monotonic()
        self._bar = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            # Some containers' terminals say that they have no columns; a bar of no width would be invisible.
            width = {"dynamic_ncols": True} if os.get_terminal_size(self._stream.fileno()).columns else {"ncols": 160}
            self._bar = tqdm(total=total_steps, initial=initial, file=self._stream, unit="step", **width)

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Shows that ``step`` optimiser steps are done; of ``metrics`` what is known by name (see ``_SHOWN``) and not None."""
        if not self._enabled:
            return
        now = time.monotonic()
        if self._bar is not None:
            if metrics:
                self._bar.set_postfix_str(describe(metrics), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._every == 0 or step == self._total:
            self._print(f"step {step}/{self._total}  {describe(metrics)}  ETA {self._eta(now, step)}")
        if self._first is None:
            self._first = (now, step)

    def write(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            self._print(text)

    def close(self) -> None:
        """Leaves the bar as it is; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _eta(self, now: float, step: int) -> str:
        since, done = self._first or (self._start, self._initial)
        if step <= done:
            return "?"
        return duration((now - since) / (step - done) * (self._total - step))


def describe(metrics: dict[str, Any]) -> str:
    """The known metrics in a fixed order, for people: ``loss 1.2340  text 0.9000  lr 1.00e-05``."""
    parts = []
    for name, (short, form) in _SHOWN.items():
        value = _plain(metrics.get(name))
        if value is not None:
            parts.append(f"{short} {value:{form}}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
