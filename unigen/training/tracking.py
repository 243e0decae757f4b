"""Who is told how a run goes: ``metrics.jsonl`` always; TensorBoard, Weights & Biases and Trackio where asked.

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
from pathlib import Path
from typing import Any, Protocol

from unigen.config import Config, UserError
from unigen.training import services
from unigen.training.appender import Appender
from unigen.training.console import Progress, describe, duration, plain
from unigen.training.event_files import EventFiles
from unigen.training.secrets import hide, redacted
from unigen.training.services import Complain, Service

__all__ = ["METRICS_FILE", "TRACKERS", "Progress", "Tracker", "describe", "duration"]

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Backend(Protocol):
    """What a row of :data:`TRACKERS` makes. ``finish`` returns at once; ``wait`` ends what is still under way by a deadline."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...
    def image(self, name: str, path: Path, step: int) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def finish(self, failed: bool) -> None: ...
    def wait(self, deadline: float) -> None: ...


class Tracker:
    """Hands everything that is logged to every tracker that the config asks for; one process of a run has one.

    No call raises for a broken tracker, and none waits for a network.

    Args:
        output_dir: Folder of the run; made when missing.
        config: Chooses the trackers, and is shown in them without its secrets.
        resume_step: Optimiser steps done by the checkpoint the run resumes from; what was logged after it is dropped, as it will
            be logged again. None or 0 for a fresh start, which sets an earlier run's log aside.
    """

    def __init__(self, output_dir: Path, config: Config, resume_step: int | None = None):
        resume_step = resume_step or None
        self._backends: dict[str, Backend] = {}
        self._complained: set[tuple[str, str]] = set()
        self._lock = threading.Lock()  # services complain from threads of theirs
        for name, start in TRACKERS.items():
            try:
                backend = start(Path(output_dir), config, resume_step, self._voice(name))
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
        """Shows the picture in the file ``path`` (PNG or JPEG; it must stay there) under ``name``; not in ``metrics.jsonl``."""
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
    """One JSON object a line, ``step`` first. What is not finite is null, and its name is listed under ``nonfinite``."""

    def __init__(self, output_dir: Path, resume_step: int | None):
        path = output_dir / METRICS_FILE

        def prepare() -> None:
            if path.exists():
                _set_aside(path) if resume_step is None else _drop_after(path, resume_step)

        self._file = Appender(path, prepare)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        nonfinite = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        row = {"step": step} | {name: None if name in nonfinite else value for name, value in metrics.items() if name != "step"}
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


# ---- the table


def _start_jsonl(output_dir: Path, config: Config, resume_step: int | None, complain: Complain) -> Backend:
    return JsonLines(output_dir, resume_step)


def _start_tensorboard(output_dir: Path, config: Config, resume_step: int | None, complain: Complain) -> Backend | None:
    return EventFiles(output_dir, resume_step) if config.tensorboard else None


def _start_wandb(output_dir: Path, config: Config, resume_step: int | None, complain: Complain) -> Backend | None:
    if not config.wandb_project or config.wandb_mode == "disabled":
        return None
    _need("wandb")
    run_id, resumed = _remembered(output_dir / "wandb_run_id", resume_step is not None)
    shown = redacted(config.to_dict())
    request = {
        "tracker": "wandb",
        "project": shown["wandb_project"],
        "name": shown["wandb_run_name"],
        "mode": config.wandb_mode,
        "output_dir": os.path.abspath(output_dir),
        "run_id": run_id,
        "resumed": resumed,
        "config": shown,
    }
    return Service(request, complain)


def _start_trackio(output_dir: Path, config: Config, resume_step: int | None, complain: Complain) -> Backend | None:
    if not config.trackio_project:
        return None
    _need("trackio")
    run_id, resumed = _remembered(output_dir / "trackio_run_id", resume_step is not None)
    shown = redacted(config.to_dict())
    request = {
        "tracker": "trackio",
        "project": shown["trackio_project"],
        # Trackio finds the run to resume by its name, so no two runs may share one.
        "run_name": f"{shown['wandb_run_name'] or output_dir.resolve().name}-{run_id}",
        "resumed": resumed,
        "resume_step": resume_step if resumed else None,
        "config": shown,
    }
    return Service(request, complain)


def _need(package: str) -> None:
    """Raises UserError where ``package`` is not installed; does not import it. (A folder of that name is no package.)"""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f'{package} is not installed. Cure: pip install "unigen[{package}]"')


def _remembered(path: Path, resume: bool) -> tuple[str, bool]:
    """The id of the run to go on with, or that of a new one, which the file then holds; (id, is it an old one?)."""
    if resume and path.exists() and (run_id := path.read_text("utf-8").strip()):
        return run_id, True
    run_id = uuid.uuid4().hex[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n", "utf-8")
    return run_id, False


TRACKERS: dict[str, Callable[[Path, Config, int | None, Complain], Backend | None]] = {
    "jsonl": _start_jsonl,
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "trackio": _start_trackio,
}
"""Name -> what starts it: (output folder, config, step resumed from, what to tell of failures) -> a tracker, or None if not asked for."""
