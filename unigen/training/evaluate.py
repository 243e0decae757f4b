"""Is it getting better? What a run measures of itself at step 0 and every ``eval_steps``, and which number
decides on the best checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from unigen.config import Config, ConfigError, nearest
from unigen.data.dataset import TASKS
from unigen.data.loader import MicroBatch, PackStream, RankSlice
from unigen.model.bagel import Bagel
from unigen.training.answers import LOWER, NEITHER, SHARE, HeldOutAnswers
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

log = logging.getLogger("unigen")

# the packed sequences of some data in their order, this process's part
Batches = Callable[[PackStream], Iterable[list[MicroBatch]]]


class Evaluation:
    """The measurements of a run, on the weights as they are.

    Args:
        config, engine, model: of the run.
        val: the held-out data.
        every: steps between two of them.
        step_tokens: tokens of a step on this process, about.

    Raises:
        ConfigError: ``metric_for_best_model`` is no number that is measured, or has no direction; or a metric
            of answers cannot be.
    """

    def __init__(
        self, config: Config, engine: Engine, model: Bagel, val: PackStream, every: int, step_tokens: float
    ):
        self.config, self.engine, self.val = config, engine, val
        self.every, self.step_tokens = every, step_tokens
        self._tasks = Tasks(val.mixture)
        self.answers = HeldOutAnswers(config, engine, model, val) if config.eval_samples != 0 else None
        self.metric = config.metric_for_best_model
        known = list(self._names())
        if self.metric not in known:
            near = nearest(self.metric, known)
            raise ConfigError(
                f"metric_for_best_model is {self.metric!r}, which is not measured"
                f"{f' (did you mean {near}?)' if near else ''}. Fix: give one of {', '.join(known[:3])}, or"
                " another number of such a line of metrics.jsonl (docs/training.md)"
            )
        kind = self.metric.split("/")[1] if self.metric.startswith("eval/") else ""
        if kind in NEITHER and config.greater_is_better is None:
            raise ConfigError(
                f"metric_for_best_model: {kind} is good at neither end. Fix: say which by --greater_is_better"
                " or --no_greater_is_better, or give another"
            )
        self.greater_is_better = bool(kind) and kind not in LOWER
        if config.greater_is_better is not None:
            self.greater_is_better = config.greater_is_better
        self._foretold = False

    def _names(self) -> Iterator[str]:
        """What can be measured; which tasks and times there are shows later."""
        yield from ("val_loss", "val_text_loss", "val_image_loss")
        for group, names in ((TEXT_BY_TASK, TASKS), (IMAGE_BY_TASK, TASKS), (IMAGE_BY_TIME, bin_names())):
            yield from (f"val/{group}/{name}" for name in names)
        if self.answers is not None:
            yield from self.answers.names()

    def measure(self, batches: Batches, agree: Agree) -> dict[str, float | None] | None:
        """All numbers by their names in ``metrics.jsonl``; None where ``agree`` broke it off."""
        began = time.perf_counter()
        found = held_out_losses(self.engine, self.config, self.val, self._tasks, batches(self.val), agree)
        if found is None:
            return None
        losses = time.perf_counter() - began
        values: dict[str, float | None] = {
            f"val/{name}" if "/" in name else f"val_{name}": value for name, value in found.values.items()
        }
        between = self._between(found.seconds_per_token)
        if self.answers is not None and self.answers.kept != 0:
            values |= self.answers.measure(SHARE * between)
        if not self._foretold:
            self._foretell(losses, between)
        return values

    def _between(self, seconds_per_token: float) -> float:
        """Seconds of training between two evaluations, predicted: a backward takes twice what a forward does,
        and recomputing one more. The same number on every process."""
        forwards = 4 if self.config.gradient_checkpointing else 3
        mine = forwards * seconds_per_token * self.step_tokens * self.every
        return float(self.engine.gather(repr(mine))[0])

    def _foretell(self, losses: float, between: float) -> None:
        """Says what evaluations will take, once, from what the first one took."""
        self._foretold = True
        parts, whole = [f"losses {losses:.1f} s"], losses
        if self.answers is not None and self.answers.kept:
            parts.append(f"answers to {self.answers.records} records {self.answers.seconds:.1f} s")
            whole += self.answers.seconds
        if between and math.isfinite(between):
            log.info(
                "An evaluation takes about %.1f s (%s); with one in %d steps (about %.1f s) it adds"
                " %.1f %% of the time, predicted",
                whole, ", ".join(parts), self.every, between, 100 * whole / between,
            )  # fmt: skip

    # ---- the best checkpoint

    def improves(self, values: Mapping[str, float | None], best: float) -> bool:
        """Is the number that decides better than ``best`` (infinite: there was none)?"""
        value = values.get(self.metric)
        if value is None or not math.isfinite(value):
            log.warning("%s has no value this time, so it is no better", self.metric)
            return False
        if not math.isfinite(best):
            return True
        return value > best if self.greater_is_better else value < best

    def state(self) -> dict[str, Any]:
        """Its part of ``trainer.json``."""
        chosen = {"metric": self.metric, "greater_is_better": self.greater_is_better}
        kept = None if self.answers is None else self.answers.kept
        return chosen if kept is None else chosen | {"batches": kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on with as many answers as the run that gave this :meth:`state`."""
        if self.answers is not None and self.answers.kept is None and "batches" in state:
            self.answers.kept = state["batches"]

    def decides_as(self, state: Mapping[str, Any]) -> bool:
        """Was the best checkpoint of a run with this state chosen by the same number? Older runs know but
        the one."""
        before = state.get("metric", "val_loss"), state.get("greater_is_better", False)
        return before == (self.metric, self.greater_is_better)


def step_tokens(stream: PackStream, rank_slice: RankSlice) -> float:
    """Tokens of a step on one process, about."""
    sample = float(stream.mixture.full_lengths().mean())
    return rank_slice.micro_batches * (stream.budget or stream.batch_size * sample)


def told(values: Mapping[str, float | None], metric: str) -> str:
    """The numbers that fit a line: those that are no part of another, and the one that decides."""
    shown = {name: value for name, value in values.items() if "/" not in name or name == metric}
    return ", ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)
