"""Is it getting better? What a run measures of itself at step 0 and every ``eval_steps``, and which number
decides on the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from unigen.config import Config, ConfigError, nearest
from unigen.data.dataset import TASKS
from unigen.data.loader import MicroBatch, PackStream
from unigen.training.engine import Engine
from unigen.training.validation import (
    IMAGE_BY_TASK,
    IMAGE_BY_TIME,
    TEXT_BY_TASK,
    Agree,
    Tasks,
    bin_names,
    held_out_losses,
)

# the packed sequences of some data in their order, this process's part
Batches = Callable[[PackStream], Iterable[list[MicroBatch]]]


class Evaluation:
    """The measurements of a run, on the weights as they are.

    Args:
        config, engine: of the run.
        val: the held-out data.

    Raises:
        ConfigError: ``metric_for_best_model`` is no number that is measured, or has no direction.
    """

    def __init__(self, config: Config, engine: Engine, val: PackStream):
        self.config, self.engine, self.val = config, engine, val
        self._tasks = Tasks(val.mixture)
        self.metric = config.metric_for_best_model
        known = list(self._names())
        if self.metric not in known:
            near = nearest(self.metric, known)
            raise ConfigError(
                f"metric_for_best_model is {self.metric!r}, which is not measured"
                f"{f' (did you mean {near}?)' if near else ''}. Fix: give one of {', '.join(known[:3])}, or"
                " another number of such a line of metrics.jsonl (docs/training.md)"
            )
        self.greater_is_better = bool(config.greater_is_better)

    def _names(self) -> Iterator[str]:
        """What can be measured; which tasks and times there are shows later."""
        yield from ("val_loss", "val_text_loss", "val_image_loss")
        for group, names in ((TEXT_BY_TASK, TASKS), (IMAGE_BY_TASK, TASKS), (IMAGE_BY_TIME, bin_names())):
            yield from (f"val/{group}/{name}" for name in names)

    def measure(self, batches: Batches, agree: Agree) -> dict[str, float] | None:
        """All numbers by their names in ``metrics.jsonl``; None where ``agree`` broke it off."""
        found = held_out_losses(self.engine, self.config, self.val, self._tasks, batches(self.val), agree)
        if found is None:
            return None
        return {f"val/{name}" if "/" in name else f"val_{name}": value for name, value in found.items()}

    # ---- the best checkpoint

    def improves(self, values: Mapping[str, float], best: float) -> bool:
        """Is the number that decides better than ``best`` (infinite: there was none)?"""
        value = values.get(self.metric, math.nan)
        if not math.isfinite(value):
            return False
        if not math.isfinite(best):
            return True
        return value > best if self.greater_is_better else value < best

    def state(self) -> dict[str, Any]:
        """Its part of ``trainer.json``."""
        return {"metric": self.metric, "greater_is_better": self.greater_is_better}

    def decides_as(self, state: Mapping[str, Any]) -> bool:
        """Was the best checkpoint of a run with this state chosen by the same number? Older runs know but
        the one."""
        before = state.get("metric", "val_loss"), state.get("greater_is_better", False)
        return before == (self.metric, self.greater_is_better)


def told(values: Mapping[str, float], metric: str) -> str:
    """The numbers that fit a line: those that are no part of another, and the one that decides."""
    shown = {name: value for name, value in values.items() if "/" not in name or name == metric}
    return ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
