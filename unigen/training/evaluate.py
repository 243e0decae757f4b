"""Is it getting better? What a run measures of itself at step 0 and every ``eval_steps``, and which number
decides on the best checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unigen.config import Config, ConfigError, nearest
from unigen.data.loader import RankSlice
from unigen.evaluation.score import good_end
from unigen.model.bagel import Bagel
from unigen.training.answering import Answerer
from unigen.training.answers import SHARE, HeldOutAnswers
from unigen.training.datasets import RunData
from unigen.training.engine import Engine
from unigen.training.preflight import enough_labels, judge_losses
from unigen.training.probe import DRIFT, Probe
from unigen.training.validation import (
    DRAWN,
    IMAGE_BY_TASK,
    IMAGE_BY_TIME,
    TEXT_BY_TASK,
    WRITTEN,
    Agree,
    Batches,
    Losses,
    Tasks,
    bin_names,
    held_out_losses,
)

log = logging.getLogger("unigen")
_OFFERED = 8  # names in a message


class Evaluation:
    """The measurements of a run, on the weights as they are, with ``every`` so many steps between two of
    them. There are held-out data, or those of the forgetting probe.

    Raises:
        ConfigError: ``metric_for_best_model`` is no number that is measured, or has no direction; or a metric
            of answers cannot be.
    """

    def __init__(
        self, config: Config, engine: Engine, model: Bagel, data: RunData, rank_slice: RankSlice, every: int
    ):
        self.config, self.engine, self.every = config, engine, every
        train, probe = data.train, data.probe
        self.val = val = data.val
        each = train.budget or train.batch_size * float(train.mixture.full_lengths().mean())
        self.step_tokens = rank_slice.micro_batches * each  # of this process, about
        self._tasks = Tasks(val.mixture) if val is not None else None
        answers = val is not None and config.eval_samples != 0
        self.answerer = self.answers = self.probe = None
        if answers or probe is not None:
            self.answerer = Answerer(config, engine, model)
            if val is not None and answers:
                self.answers = HeldOutAnswers(config, engine, self.answerer, val)
            if probe is not None:
                self.probe = Probe(config, engine, model, self.answerer, probe)
        self.metric = config.metric_for_best_model
        if val is not None:
            self._check_metric(list(self._names()))
        kind = self.metric.split("/")[1] if self.metric.startswith("eval/") else ""
        greater = config.greater_is_better
        if greater is None:
            greater = good_end(kind) if kind else False
        if greater is None:
            raise ConfigError(
                f"metric_for_best_model: which end of {kind} is good is not known. Fix: say it by"
                " --greater_is_better or --no_greater_is_better, or give another"
            )
        self.greater_is_better = greater
        self._foretold = False
        self.doubted: frozenset[str] = frozenset()  # losses of which the warm-up batch said so

    def _check_metric(self, known: list[str]) -> None:
        """Raises ConfigError where the number that decides is none of those that are measured."""
        if self.metric in known:
            return
        kind = self.metric.split("/")[1].removesuffix("_to_source") if "/" in self.metric else ""
        if self.answers is not None and self.metric in self.answers.names([kind]):
            raise ConfigError(
                f"metric_for_best_model is {self.metric!r}, and eval_metrics does not ask for {kind}. Fix:"
                f" --eval_metrics {' '.join([*self.answers.metrics, kind])}"
            )
        near, group = nearest(self.metric, known), self.metric.partition("/")[0]
        alike = [name for name in known if name.startswith(f"{group}/")] or known
        raise ConfigError(
            f"metric_for_best_model is {self.metric!r}, which is not measured of these records"
            f"{f' (did you mean {near}?)' if near else ''}. Fix: give one of {', '.join(alike[:_OFFERED])},"
            " or another number of such a line of metrics.jsonl (docs/training.md)"
        )

    def _names(self) -> Iterator[str]:
        """What can be measured of the held-out records; which times there are shows later."""
        assert self.val is not None
        there = self.val.mixture.parts[0].dataset.statistics()["tasks"]
        # a picture's end is learnt as a text is
        texts = there if self.config.train_transitions else [task for task in there if task in WRITTEN]
        pictures = [task for task in there if task in DRAWN]
        yield "val_loss"
        yield from ["val_text_loss"] * bool(texts) + ["val_image_loss"] * bool(pictures)
        times = bin_names() if pictures else []
        for group, names in ((TEXT_BY_TASK, texts), (IMAGE_BY_TASK, pictures), (IMAGE_BY_TIME, times)):
            yield from (f"val/{group}/{name}" for name in names)
        if self.answers is not None:
            yield from self.answers.names(self.answers.metrics)

    def measure(self, step: int, batches: Batches, agree: Agree) -> dict[str, float | None] | None:
        """All numbers after ``step`` by their names in ``metrics.jsonl``; None where ``agree`` broke it
        off."""
        values: dict[str, float | None] = {}
        took, between, began = {}, 0.0, time.perf_counter()
        if self.val is not None and self._tasks is not None:
            found = held_out_losses(self.engine, self.val, self._tasks, batches(self.val), agree)
            if found is None:
                return None
            for name, value in found.values.items():
                values[f"val/{name}" if "/" in name else f"val_{name}"] = value
            took["losses"] = time.perf_counter() - began
            if not step:
                self._first(found)
            between = self._between(found.seconds_per_token)
        if self.answers is not None and self.answers.kept != 0:
            values |= self.answers.measure(SHARE * between)
            if self.answers.kept:
                took[f"answers to {self.answers.records} records"] = self.answers.seconds
        if self.probe is not None:
            began = time.perf_counter()
            probed = self.probe.measure(step, batches, agree)
            if probed is None:
                return None
            values |= probed[0]
            took["probe"] = time.perf_counter() - began
            between = between or self._between(probed[1])
        if not self._foretold:
            self._foretell(took, between)
        return values

    def _first(self, found: Losses) -> None:
        """Compares the losses of the model that a run begins with with what is expected of them."""
        text, image = found.values.get("text_loss"), found.values.get("image_loss")
        text = text if enough_labels(found.labels, found.samples) else None
        self.doubted = judge_losses(self.engine, text, image, "step-0 validation", self.doubted)

    def _between(self, seconds_per_token: float) -> float:
        """Seconds of training between two evaluations, predicted: a backward takes twice what a forward does,
        and recomputing one more. The same number on every process."""
        forwards = 4 if self.config.gradient_checkpointing else 3
        mine = forwards * seconds_per_token * self.step_tokens * self.every
        return float(self.engine.gather(repr(mine))[0])

    def _foretell(self, took: Mapping[str, float], between: float) -> None:
        """Says what evaluations will take, once, from what the parts of the first one took."""
        self._foretold = True
        parts, whole = [f"{name} {seconds:.1f} s" for name, seconds in took.items()], sum(took.values())
        if between and math.isfinite(between):
            log.info(
                "An evaluation takes about %.1f s (%s); with one in %d steps (about %.1f s) it adds"
                " %.1f %% of the time, predicted",
                whole, ", ".join(parts), self.every, between, 100 * whole / between,
            )  # fmt: skip

    # ---- the best checkpoint

    def improves(self, values: Mapping[str, float | None], best: float) -> bool:
        """Is the number that decides better than ``best`` (infinite: there was none)?"""
        if self.val is None:
            return False
        value = values.get(self.metric)
        if value is None or not math.isfinite(value):
            log.warning("%s has no value this time, so it is no better", self.metric)
            return False
        if not math.isfinite(best):
            return True
        return value > best if self.greater_is_better else value < best

    def state(self) -> dict[str, Any]:
        """Its part of ``trainer.json``."""
        chosen: dict[str, Any] = {"metric": self.metric, "greater_is_better": self.greater_is_better}
        if self.val is not None:
            chosen |= {"data": self.val.mixture.fingerprint}
        kept = None if self.answers is None else self.answers.kept
        return chosen if kept is None else chosen | {"batches": kept}

    def same_data(self, state: Mapping[str, Any]) -> bool | None:
        """Are the held-out records those of the run that has this :meth:`state`? None where that is not
        known."""
        if self.val is None or "data" not in state:
            return None
        return bool(state["data"] == self.val.mixture.fingerprint)

    def load(self, state: Mapping[str, Any], folder: Path) -> bool:
        """Goes on with as many answers as the run whose checkpoint ``folder`` has this :meth:`state`, and
        with its probe's base; says whether its best counts: not where another number decides now, or it is
        of other records."""
        if self.answers is not None and self.answers.kept is None and "batches" in state:
            self.answers.kept = state["batches"]
        if self.probe is not None:
            self.probe.load(folder.resolve().parent)
        # older runs know but the one number
        before = state.get("metric", "val_loss"), state.get("greater_is_better", False)
        same = self.val is None or before == (self.metric, self.greater_is_better)
        if not same:
            log.warning("What was best so far does not count: that is now chosen by %s", self.metric)
        return same and self.same_data(state) is not False


def numbers_line(values: Mapping[str, float | None], metric: str) -> str:
    """The numbers that fit a line: those that are no part of another, the drift, and the one that decides."""
    there = {name: value for name, value in values.items() if value is not None}
    shown = [name for name in there if "/" not in name or name == metric or name.startswith(DRIFT)]
    return ", ".join(f"{name} {there[name]:.4f}" for name in shown)
