"""Who is told how a run goes: ``metrics.jsonl`` always; TensorBoard, Weights & Biases and Trackio where
asked.

Nothing of the environment is written anywhere; a tracker that fails says so and never stops or holds a run.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from unigen.config import Config
from unigen.files import json_of
from unigen.plugins import Registry
from unigen.runs import layout
from unigen.runs.log import JsonlLog, drop_after
from unigen.runs.secrets import hide
from unigen.tracking import background
from unigen.tracking.background import BackgroundTracker, Complain, TrackerClient
from unigen.tracking.console import Progress, as_number, duration
from unigen.tracking.services import Trackio, Wandb, need
from unigen.tracking.tensorboard import TensorBoard

__all__ = ["TRACKERS", "Progress", "Tracker", "duration"]

log = logging.getLogger(__name__)


def need_trackers(config: Config) -> None:
    """Raises UserError where the package of a tracker that the config asks for is not installed."""
    for row in TRACKERS.values():
        if row.package and row.asked_for(config):
            need(row.package)


class Tracker:
    """Hands everything that is logged to ``metrics.jsonl`` and, under the names of :func:`shown_as`, to every
    tracker that the config asks for; one process of a run has one.

    No call raises for a broken tracker, and none waits for one.

    Args:
        config: Chooses the trackers, and is shown in them without its secrets.
        resume_step: Optimiser steps done by the checkpoint the run resumes from, 0 for a fresh start. What
            was logged after it is dropped, as it will be logged again.
        repeats: The run begins with the validation of ``resume_step``, which a signal broke off. One that is
            in the log all the same (of a run that was killed after it) is dropped.
    """

    def __init__(self, output_dir: Path, config: Config, resume_step: int = 0, repeats: bool = False):
        self._complained: set[tuple[str, str]] = set()
        self._lock = threading.Lock()  # trackers complain from threads of theirs
        self._metrics: MetricsFile | None = MetricsFile(Path(output_dir), resume_step, repeats)
        self._trackers: list[BackgroundTracker] = []
        for name, row in TRACKERS.items():
            if row.asked_for(config):
                complain = partial(self._complain, name)
                try:
                    made = row.client(Path(output_dir), config, resume_step, complain)
                except Exception as error:
                    complain("cannot start", f"{type(error).__name__}: {error}")
                else:
                    self._trackers.append(BackgroundTracker(name, made, complain))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Logs flat metrics (numbers, strings, None, 0-d tensors) after optimiser step ``step``."""
        row = {name: _shown(value) for name, value in metrics.items()}
        if self._metrics is not None:
            self._metrics.log(row, step)
        self._put("log", {shown_as(name): value for name, value in row.items()}, step)

    def image(self, name: str, path: Path, step: int, caption: str = "") -> None:
        """Shows the picture in the file ``path`` (PNG or JPEG; it must stay there) under ``name``, with a
        ``caption``; not in ``metrics.jsonl``."""
        self._put("image", name, Path(path).absolute(), step, hide(caption))

    def text(self, name: str, text: str, step: int) -> None:
        """Shows ``text``, word for word, under ``name``; not in ``metrics.jsonl``."""
        self._put("text", name, hide(text), step)

    def finish(self) -> None:
        """Closes every tracker within ``background.FINISH_S`` seconds; a second call does nothing.

        Where an exception is on its way out, services that know the difference show the run as failed.
        """
        failed = sys.exc_info()[0] is not None
        deadline = time.monotonic() + background.FINISH_S
        if self._metrics is not None:
            self._metrics.close()
        self._put("finish", failed)
        for tracker in self._trackers:
            tracker.wait(deadline)
        self._metrics, self._trackers = None, []

    def _put(self, call: str, *arguments: Any) -> None:
        for tracker in self._trackers:
            tracker.put(call, *arguments)

    def _complain(self, name: str, what: str, why: str) -> None:
        with self._lock:
            if (name, what) in self._complained:
                return
            self._complained.add((name, what))
        without = " without it" if what == "cannot start" else ""
        log.warning("Tracker %s %s; the run goes on%s. %s", name, what, without, hide(why))


def _shown(value: Any) -> Any:
    value = as_number(value)
    return hide(value) if isinstance(value, str) else value


GROUPED = {
    "loss": "train/loss",
    "text_loss": "train/loss_text",
    "image_loss": "train/loss_image",
    "preserve_loss": "train/loss_preserve",
    "preserve_text_loss": "train/loss_preserve_text",
    "preserve_image_loss": "train/loss_preserve_image",
    "text_tokens": "train/tokens_text",
    "image_tokens": "train/tokens_image",
    "preserve_text_tokens": "train/tokens_preserve_text",
    "preserve_image_tokens": "train/tokens_preserve_image",
    "val_loss": "val/loss",
    "val_text_loss": "val/loss_text",
    "val_image_loss": "val/loss_image",
    "learning_rate": "lr/base",
    "tokens_per_second": "system/tokens_per_second",
    "data_wait": "system/data_wait",
}
"""Name in ``metrics.jsonl`` -> name in TensorBoard, Weights & Biases and Trackio: in groups, which each of
them shows as a section of its own."""
_RATE = "learning_rate_"  # of a part of the model that has its own


def shown_as(name: str) -> str:
    """The name of a number in a tracker: those with a group of their own (``eval/...``, ``probe/...``,
    ``val/...``) keep it, what else is not listed is one of training."""
    if name.startswith(_RATE):
        return f"lr/{name.removeprefix(_RATE)}"
    return GROUPED.get(name) or (name if "/" in name else f"train/{name}")


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, ``step`` and ``time`` (unix seconds) first; names of what is
    not finite, then null, under ``nonfinite``.

    Written at once and by the caller: a run that is killed has logged every step it did.
    """

    def __init__(self, output_dir: Path, resume_step: int, repeats: bool = False):
        path = output_dir / layout.METRICS
        self._file = JsonlLog(path, lambda: drop_after(path, resume_step, repeats) if path.exists() else None)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        nonfinite = [name for name, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
        first = {"step": step, "time": round(time.time(), 3)}
        row = first | metrics | dict.fromkeys(nonfinite) | first
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._file.append((json_of(row, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class Row(NamedTuple):
    """A tracker: does the config ask for it, what makes its client, and the package that it needs."""

    asked_for: Callable[[Config], Any]
    client: Callable[[Path, Config, int, Complain], TrackerClient]
    package: str = ""


TRACKERS: Registry[Row] = Registry(
    tensorboard=Row(lambda config: config.tensorboard, TensorBoard, "tensorboard"),
    wandb=Row(lambda config: config.wandb_project and config.wandb_mode != "disabled", Wandb, "wandb"),
    trackio=Row(lambda config: config.trackio_project, Trackio, "trackio"),
)
"""The trackers by their names."""
