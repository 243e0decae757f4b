"""How a run's samples are answered where their prompts do not say it, and how often there are some: by what
the model can, and what time it takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from unigen.config import Config
from unigen.inference.prompts import Prompt
from unigen.model.run_options import run_options
from unigen.training.engine import Engine

log = logging.getLogger("unigen")

SHARE = 0.1  # of the time that samples may take where sample_steps does not say how often they are
DRAWING = ("generate", "edit", "interleaved")  # tasks with pictures as targets


def with_kinds(prompts: Collection[Prompt], config: Config, tasks: Collection[str]) -> list[Prompt]:
    """The prompts, each with what is done with it: ``draw``, ``answer`` or ``decide``. Says once what becomes
    of those that leave it open.

    Args:
        config: of the run; its ``model_path`` tells whether the model was trained to decide.
        tasks: of the training data, as far as they are known.
    """
    alone, beside, why = kinds_of(config, tasks)
    found = []
    for prompt in prompts:
        kind = config.sample_kind if prompt.kind == "auto" else prompt.kind
        if kind == "auto":
            kind = beside if prompt.images else alone
        found.append(replace(prompt, kind=kind))
    opened = [one.kind for one, given in zip(found, prompts, strict=True) if given.kind == "auto"]
    if opened and config.sample_kind == "auto":
        kinds = ", ".join(dict.fromkeys(opened))
        log.info("Samples: the kind of prompts that set none is %s: %s. --sample_kind sets it", kinds, why)
    return found


def kinds_of(config: Config, tasks: Collection[str]) -> tuple[str, str, str]:
    """What is done with prompts of text alone, and with those that hold pictures; and why."""
    if not config.visual_gen:
        return "answer", "answer", "visual_gen=false leaves drawing out"
    if decides(Path(config.model_path or "")):
        return "decide", "decide", "the model of model_path was trained to decide"
    if tasks and not set(tasks) & set(DRAWING):
        return "answer", "answer", "the data has texts as its only targets"
    never = "the model of model_path was never trained to decide"
    edits = {"edit", "interleaved"} & set(tasks) and "understand" not in tasks
    return "draw", "draw" if edits or not config.visual_und else "answer", never


def decides(folder: Path) -> bool:
    """Was the model in a folder trained to choose what comes next? A run that learnt it has left its options
    there; the published checkpoint has none. Raises UserError where they cannot be read."""
    run = run_options(folder)
    return run is not None and run.train_transitions


class Pace:
    """How often there are samples: every ``sample_steps``; or as often as something else happens, such as
    validations, but so that they take at most ``SHARE`` of the time, as the first of them predict."""

    def __init__(self, config: Config, engine: Engine):
        self._steps, self._engine = config.sample_steps, engine
        self._doubles = config.ema is not None  # from step 1 on average and weights answer
        self._first: tuple[int, float, float] | None = None  # step, seconds that they took, when they ended
        self._told = False
        self.every = 0  # steps between two, once the time decides; 0: no limit

    def took(self, step: int, seconds: float) -> None:
        """Samples of ``step`` are ready."""
        if self._first is None:
            self._first = step, seconds, time.monotonic()

    def due(self, step: int, otherwise: bool, last: bool) -> bool:
        """Are there samples after ``step``, the ``last`` one or not? All processes ask together."""
        asked = step % self._steps == 0 if self._steps else otherwise
        if asked and not self._told and self._first is not None and step > self._first[0]:
            self._predict(step)
        return asked and (last or not self.every or step % self.every == 0)

    def _predict(self, step: int) -> None:
        """Once the first steps are done: what samples would take of the time, and what follows from that."""
        assert self._first is not None
        self._told = True
        before, took, ended = self._first
        took *= 2 if self._doubles and not before else 1
        between = max(time.monotonic() - ended, 1e-3)
        seconds, between = map(float, self._engine.gather(f"{took!r} {between!r}")[0].split())
        share = seconds / (seconds + between)
        if share <= SHARE:
            return
        apart, times = step - before, -(-seconds * (1 - SHARE) // (SHARE * between))
        if self._steps:
            after = f"as sample_steps asks. --sample_steps {int(times * apart)} would take {SHARE:.0%}"
        else:
            self.every = int(times * apart)
            after = f"so there are some every {self.every} steps, and at the end; --sample_steps sets it"
        log.info(
            "Samples take about %.1f s; every %d steps that is %.0f %% of the time, predicted; %s",
            seconds, apart, 100 * share, after,
        )  # fmt: skip
