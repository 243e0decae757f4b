"""Who is told how a run goes: ``metrics.jsonl`` always; TensorBoard, Weights & Biases and Trackio where
asked.

Nothing of the environment is written anywhere; a tracker that fails says so and never stops or holds a run.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unigen.config import Config, UserError
from unigen.runs import layout
from unigen.runs.log import JsonlLog, drop_after
from unigen.runs.secrets import hide, redacted
from unigen.tracking import services
from unigen.tracking.console import Progress, describe, duration, plain
from unigen.tracking.services import Complain, Service
from unigen.tracking.tensorboard import EventFiles

__all__ = ["TRACKERS", "Progress", "Tracker", "describe", "duration"]

log = logging.getLogger(__name__)


class Backend(Protocol):
    """What a row of :data:`TRACKERS` makes. ``finish`` returns at once; ``wait`` ends what is still under way
    by a deadline."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...
    def image(self, name: str, path: Path, step: int) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def finish(self, failed: bool) -> None: ...
    def wait(self, deadline: float) -> None: ...


@dataclass(frozen=True)
class Start:
    """What a tracker is started with; see :class:`Tracker`."""

    output_dir: Path
    config: Config
    resume_step: int
    repeats: bool
    complain: Complain  # is told of failures


class Tracker:
    """Hands everything that is logged to every tracker that the config asks for; one process of a run has
    one.

    No call raises for a broken tracker, and none waits for a network.

    Args:
        output_dir: Folder of the run; made when missing.
        config: Chooses the trackers, and is shown in them without its secrets.
        resume_step: Optimiser steps done by the checkpoint the run resumes from, 0 for a fresh start. What
            was logged after it is dropped, as it will be logged again.
        repeats: The run begins with the validation of ``resume_step``, which a signal broke off. One that is
            in the log all the same (of a run that was killed after it) is dropped.
    """

    def __init__(self, output_dir: Path, config: Config, resume_step: int = 0, repeats: bool = False):
        self._backends: dict[str, Backend] = {}
        self._complained: set[tuple[str, str]] = set()
        self._lock = threading.Lock()  # services complain from threads of theirs
        for name, start in TRACKERS.items():
            try:
                backend = start(Start(Path(output_dir), config, resume_step, repeats, self._voice(name)))
            except Exception as error:
                self._complain(name, "cannot start", f"{type(error).__name__}: {error}")
            else:
                if backend is not None:
                    self._backends[name] = backend

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Logs flat metrics (numbers, strings, None, 0-d tensors) after optimiser step ``step``."""
        row = {name: _shown(value) for name, value in metrics.items()}
        self._each("cannot log", lambda backend: backend.log(row, step))

    def image(self, name: str, path: Path, step: int) -> None:
        """Shows the picture in the file ``path`` (PNG or JPEG; it must stay there) under ``name``; not in
        ``metrics.jsonl``."""
        self._each("cannot show images", lambda backend: backend.image(name, Path(path), step))

    def text(self, name: str, text: str, step: int) -> None:
        """Shows ``text``, word for word, under ``name``; not in ``metrics.jsonl``."""
        shown = hide(text)
        self._each("cannot show texts", lambda backend: backend.text(name, shown, step))

    def finish(self) -> None:
        """Closes every tracker within ``services.FINISH_S`` seconds; a second call does nothing.

        Where an exception is on its way out, services that know the difference show the run as failed.
        """
        failed = sys.exc_info()[0] is not None
        deadline = time.monotonic() + services.FINISH_S
        self._each("cannot finish", lambda backend: backend.finish(failed))
        self._each("cannot finish", lambda backend: backend.wait(deadline))
        self._backends.clear()

    def _each(self, what: str, call: Callable[[Backend], None]) -> None:
        for name, backend in self._backends.items():
            try:
                call(backend)
            except Exception as error:
                self._complain(name, what, f"{type(error).__name__}: {error}")

    def _voice(self, name: str) -> Complain:
        return lambda what, why: self._complain(name, what, why)

    def _complain(self, name: str, what: str, why: str) -> None:
        with self._lock:
            if (name, what) in self._complained:
                return
            self._complained.add((name, what))
        without = " without it" if what == "cannot start" else ""
        log.warning("Tracker %s %s; the run goes on%s. %s", name, what, without, hide(why))


def _shown(value: Any) -> Any:
    value = plain(value)
    return hide(value) if isinstance(value, str) else value


# ---- metrics.jsonl


class JsonLines:
    """One JSON object a line, ``step`` and ``time`` (unix seconds) first; names of what is not finite, then
    null, under ``nonfinite``."""

    def __init__(self, output_dir: Path, resume_step: int, repeats: bool = False):
        path = output_dir / layout.METRICS
        self._file = JsonlLog(path, lambda: drop_after(path, resume_step, repeats) if path.exists() else None)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        nonfinite = [
            name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)
        ]
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {
            name: None if name in nonfinite else value for name, value in metrics.items() if name not in row
        }
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._file.append((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def image(self, name: str, path: Path, step: int) -> None:
        """Pictures are files already."""

    def text(self, name: str, text: str, step: int) -> None:
        """So are texts."""

    def finish(self, failed: bool) -> None:
        self._file.close()

    def wait(self, deadline: float) -> None:
        """Nothing is under way."""


# ---- the table


def _start_jsonl(start: Start) -> Backend:
    return JsonLines(start.output_dir, start.resume_step, start.repeats)


def _start_tensorboard(start: Start) -> Backend | None:
    return EventFiles(start.output_dir, start.resume_step) if start.config.tensorboard else None


def _start_wandb(start: Start) -> Backend | None:
    if not start.config.wandb_project or start.config.wandb_mode == "disabled":
        return None
    run_id, resumed, shown = _identity("wandb", start)
    request = {
        "project": shown["wandb_project"],
        "name": shown["wandb_run_name"],
        "mode": start.config.wandb_mode,
        "output_dir": os.path.abspath(start.output_dir),
        "run_id": run_id,
    }
    return Service({"tracker": "wandb", "resumed": resumed, "config": shown, **request}, start.complain)


def _start_trackio(start: Start) -> Backend | None:
    if not start.config.trackio_project:
        return None
    run_id, resumed, shown = _identity("trackio", start)
    request = {
        "project": shown["trackio_project"],
        # Trackio finds the run to resume by its name, so no two runs may share one.
        "run_name": f"{shown['wandb_run_name'] or start.output_dir.resolve().name}-{run_id}",
        "resume_step": start.resume_step if resumed else None,
    }
    return Service({"tracker": "trackio", "resumed": resumed, "config": shown, **request}, start.complain)


def _identity(service: str, start: Start) -> tuple[str, bool, dict[str, Any]]:
    """The id of the run to go on with, or that of a new one, which is written down; whether it is an old one;
    the options to show.

    Raises:
        UserError: the service's package is not installed.
    """
    _need(service)
    shown, path = redacted(start.config.to_dict()), start.output_dir / layout.run_id_file(service)
    if start.resume_step and path.exists() and (run_id := path.read_text("utf-8").strip()):
        return run_id, True, shown
    run_id = uuid.uuid4().hex[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n", "utf-8")
    return run_id, False, shown


def _need(package: str) -> None:
    """Raises UserError where ``package`` is not installed; does not import it. (A folder of that name is no
    package.)"""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package} is not installed. Fix: pip install {package}")


TRACKERS: dict[str, Callable[[Start], Backend | None]] = {
    "jsonl": _start_jsonl,
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "trackio": _start_trackio,
}
"""Name -> what starts it: a tracker, or None if it is not asked for."""
