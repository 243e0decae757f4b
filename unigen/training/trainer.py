"""``UnifiedTrainer``: builds a training and runs it to its end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

from unigen.config import Config
from unigen.messages import in_language
from unigen.model.mistakes import as_new_run
from unigen.model.parts import WORDS
from unigen.model.quantise import adopt_bits
from unigen.runs import layout
from unigen.runs.signals import SignalHandler, Stopped
from unigen.tracking.tracker import Tracker
from unigen.training.build import build
from unigen.training.closing import following
from unigen.training.engine import open_engine
from unigen.training.failures import lost_process
from unigen.training.loop import TrainingLoop
from unigen.training.memory_plan import compared, resident_peak
from unigen.training.run import Run
from unigen.training.warm_up import WarmUp, warm_up

log = logging.getLogger("unigen")


class UnifiedTrainer:
    """Trains a BAGEL checkpoint on text and images, as the config says.

    ``stopped`` says afterwards whether a signal ended the run.

    Raises:
        ConfigError: an option cannot work.
    """

    def __init__(self, config: Config):
        self.config = adopt_bits(config).resolve()
        self.signals = SignalHandler()
        self.stopped = False

    def train(self) -> dict[str, float]:
        """Runs the training; returns the last metrics.

        SIGTERM, SIGINT, SIGUSR1 and SIGHUP end it after the step at hand: its state is saved, and ``stopped``
        says so.

        Raises:
            UserError: the options, the checkpoint, the data or the disk cannot work; what and why stands in
                the message.
        """
        with self.signals, open_engine(self.config) as engine:
            try:
                with self.signals.phase("loading", breakable=True):
                    run = build(self.config, engine, self.signals)
                with contextlib.closing(run), told_of_lost_processes(run):
                    if run.position.step >= run.total_steps and not run.position.pending:
                        for line in nothing_left(run):
                            log.info("%s", line)
                        return {}
                    built = resident_peak(now=True)
                    with self.signals.phase("warm-up batch", breakable=True):
                        fresh = run.resumed is None
                        warmed = warm_up(engine, run.stream, run.rank_slice.micro_batches, fresh)
                    if run.evaluation is not None:
                        run.evaluation.doubted = warmed.doubted
                    if self.config.dry_run:
                        log.info(
                            "Dry run: everything is ready; nothing was trained. Without --dry_run the same"
                            " command trains"
                        )
                        return {}
                    run.begin()
                    metrics = TrainingLoop(run, open_tracker(run)).train()
                    tell_memory(run, warmed, built)
                    return metrics
            except Stopped:
                self.stopped = True
                return {}


def tell_memory(run: Run, warmed: WarmUp, built: int) -> None:
    """Says what memory the run took at most, and what was planned; ``built``: of the process before the first
    step."""
    device, peak = run.engine.device, warmed.peak
    if not run.engine.main:
        return
    if device.type == "cuda":
        peak = max(peak, torch.cuda.max_memory_allocated(device))
    engine = (device.type, run.engine.world, run.engine.dtype)
    words, resumed = run.source.stored.get(WORDS), run.resumed is not None
    facts = (words and words.dtype, resumed)
    if told := compared(run.model.config, run.config, engine, warmed.load, peak, built, *facts):
        log.info("%s", told)


def nothing_left(run: Run) -> list[str]:
    """What is said where a run resumes with all of its steps done."""
    option = "max_steps" if run.config.max_steps else "num_epochs"
    kept = run.output_dir / layout.step_name(run.position.step)
    told = (
        f"All {run.total_steps} steps are done already (the checkpoint is of step {run.position.step}):"
        f" nothing is left to do. To train further, raise --{option}; for a new run from these weights, give"
        f" another --output_dir and {as_new_run(kept)}"
    )
    return [told, *(following(run.output_dir, run.config, kept) if kept.is_dir() else ())]


@contextlib.contextmanager
def told_of_lost_processes(run: Run) -> Iterator[None]:
    """Says in a line where another process has ended; each of those that are left would give a traceback.
    ``train.log`` has every error."""
    try:
        yield
    except Exception as error:
        alone = run.engine.world == 1
        told = None if alone else lost_process(error, run.engine.rank, run.heartbeat.folder)
        if run.engine.main:
            run.said.note(in_language("error: ") + in_language(str(told or error)))
        if told is None:
            raise
        raise told from error


def open_tracker(run: Run) -> Tracker | None:
    """What is told of a run's numbers, on rank 0; None on the others."""
    if not run.engine.main:
        return None
    position = run.position
    return Tracker(run.output_dir, run.config, position.step, repeats="validating" in position.pending)
