"""``TrainingLoop``: what goes on in a training: steps, validation, samples, checkpoints, signals."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from unigen.cache.store import CacheTally
from unigen.config import UserError
from unigen.data.loader import LoaderState, MicroBatch, PackStream, RankSlice, load_batches
from unigen.model.weights import write_side_files
from unigen.runs import layout
from unigen.runs.checkpoint import CheckpointError
from unigen.runs.ranks import WAITING
from unigen.runs.saver import Contents
from unigen.runs.secrets import redacted
from unigen.runs.signals import Stopped, shielded, watching_workers, worker_init
from unigen.runs.space import SpaceError
from unigen.tracking.tracker import Progress, Tracker
from unigen.training.closing import closing, following
from unigen.training.evaluate import numbers_line
from unigen.training.failures import explain
from unigen.training.guards import Diverged, TrainingStopped
from unigen.training.optim import learning_rate_at, rates
from unigen.training.run import Run
from unigen.training.step import Counts, StepResult, train_step


class TrainingLoop:
    """The steps of a built run, and what is due between them. All processes run it together."""

    def __init__(self, run: Run, tracker: Tracker | None = None):
        """``tracker`` is told of every step, and finished at the end."""
        self.run, self.config, self.engine, self.position = run, run.config, run.engine, run.position
        self.tracker = tracker
        shown = run.engine.main and run.config.log_level == "info"
        self.progress = Progress(
            run.total_steps, run.position.step, run.config.logging_steps, shown,
            note=run.said.note if run.engine.main else lambda line: None,
        )  # fmt: skip
        self.cached = CacheTally(run.cache)
        self._tokens = 0  # of all processes, since the start
        self._failure: Exception | None = None  # of this process's data; the others are to hear of it first
        for answering in (run.samples, run.evaluation):
            if answering is not None and answering.answerer is not None:
                answering.answerer.idle = self._idle

    def train(self) -> dict[str, float]:
        """Takes the steps that are left; returns the last metrics. Raises Stopped after a signal."""
        try:
            began = time.perf_counter()
            metrics = self._steps()
            self.run.saver.wait()
            self._tell_saved()
            self._end(metrics, time.perf_counter() - began)
            return metrics
        except Exception as error:
            self._rescue(error)
            if told := explain(error, self.engine.device):
                raise told from error
            raise
        finally:
            # a checkpoint on its way is finished, whatever ended the run
            with contextlib.suppress(CheckpointError):
                self.run.saver.wait()
            self.progress.close()
            if self.tracker:
                self.tracker.finish()

    def _steps(self) -> dict[str, float]:
        run, position, c = self.run, self.position, self.config
        batches = self._batches(run.stream, run.rank_slice, position.loader, run.total_steps - position.step)
        # what a signal broke off; and the model before its first step, which all later ones are held against
        metrics = self._look(position.pending if position.step else self._due())
        while position.step < run.total_steps and not run.guard.exhausted:
            began = time.perf_counter()
            taken = self._next(batches)
            waited = time.perf_counter() - began
            counts = self._agree(taken)
            lr = learning_rate_at(position.step, run.total_steps, c)
            with run.signals.phase("forward/backward"):
                result = self.take_step(taken, lr, counts)
            position.step, position.loader, position.sound = position.step + 1, taken[-1].after, True
            self._spare_the_good()
            self.engine.tick()
            metrics = self._log(result, taken, lr, waited, time.perf_counter() - began)
            metrics |= self._look(self._due())
            last = position.step == run.total_steps or run.guard.exhausted
            if position.step % c.save_steps == 0 or last:
                self._save()
        if run.guard.drifted:
            self.progress.write(f"Stopped: {run.guard.drifted}")
        elif run.guard.exhausted:
            stale, best = run.guard.stale, position.best
            self.progress.write(f"Stopped: {stale} validations in a row were no better than {best:.4f}")
        if run.cache is not None:
            self.progress.write(f"Cache: {self.cached}")
        return metrics

    def _end(self, metrics: dict[str, float], seconds: float) -> None:
        """Says what was skipped, what came of the run and what to do next. Raises Diverged where too much was
        skipped."""
        run = self.run
        if run.guard.left_out:
            self.progress.write(
                f"{run.guard.left_out} steps were skipped and changed nothing; their records are listed in"
                f" {run.output_dir / layout.BAD_STEPS}"
            )
        run.guard.finish()
        run.saver.good = ""
        run.saver.prune(layout.step_name(self.position.saved))
        at, tokens = self.position, int(self._tokens)
        early = at.step < run.total_steps
        said = closing(run.output_dir, self.config, at.step, at.best, metrics, seconds, tokens, early)
        self.progress.write(*said)

    def take_step(self, batches: Sequence[MicroBatch], lr: float, counts: Counts) -> StepResult:
        return train_step(self.run, batches, lr, counts)

    # ---- before a step

    def _batches(
        self, stream: PackStream, rank_slice: RankSlice, start: LoaderState, limit: int
    ) -> Iterator[list[MicroBatch]]:
        pin = self.engine.device.type == "cuda"
        batches = load_batches(
            stream, rank_slice, start, num_workers=self.run.workers, limit=limit, pin=pin,
            worker_init=worker_init, starting=shielded,
        )  # fmt: skip
        while True:
            with watching_workers():
                step = next(batches, None)
            if step is None:
                return
            yield step

    def _next(self, batches: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
        """This process's micro-batches of the next step; none where a signal broke the waiting off, or there
        was an error, which :meth:`_agree` raises."""
        try:
            with self.run.signals.phase("data", breakable=True):
                return next(batches)
        except Stopped:
            return []
        except Exception as error:
            self._failure = error
            return []

    def _agree(self, batches: list[MicroBatch]) -> Counts:
        """Tells the other processes what they must know before a step; returns the counts of the whole step.

        Raises:
            Stopped: a signal came to one of them; the last step is saved.
            CheckpointError: the checkpoint that was written beside the training has failed.
            TrainingStopped: as :meth:`BadStepGuard.check_records`; or the data of another process failed.
            Exception: the data of this process failed.
        """
        run = self.run
        bad = sum(len(batch.bad) for batch in batches)
        mine = Counts.of([batch.pack for batch in batches])
        with run.signals.phase(WAITING):
            said = [run.signals.asked, run.saver.failed, self._failure is not None, bad, *vars(mine).values()]
            stop, failed, broken, bad, *counts = self.engine.sum(said)
        if failed:
            run.saver.wait()
        if broken:
            self._fail_together()
        if stop:
            self._stop()
        if bad:
            run.guard.check_records(batches, run.stream)
        return Counts(*counts)

    def _fail_together(self) -> None:
        """Raises the error of this process's data on it, and what it says on the others."""
        failure = self._failure
        mine = (failure and explain(failure, self.engine.device)) or failure
        said = self.engine.gather(f"{mine}" if mine else "")
        if failure is not None:
            failure.agreed = True  # type: ignore[attr-defined]
            raise failure
        rank, text = next((rank, text) for rank, text in enumerate(said) if text)
        raise TrainingStopped(f"rank {rank}: {text.rstrip().splitlines()[-1]}")

    def _rescue(self, error: Exception) -> None:
        """Saves the last finished step after an error, where the weights are those of it and all processes
        have the same error; says what came of it. Not after one of the disk, nor a divergence."""
        position, engine = self.position, self.engine
        shared = engine.world == 1 or isinstance(error, UserError) or hasattr(error, "agreed")
        if not shared or not position.step or isinstance(error, (Diverged, SpaceError)):
            return
        if isinstance(error, CheckpointError):
            if not engine.sum([len(self.run.source.rewritten())])[0]:
                return
            position.saved = -1
        if position.saved == position.step:
            return
        if not position.sound:
            self.progress.write(f"Step {position.step + 1} was being taken, so nothing more can be saved")
            return
        try:
            engine.discard()
            if engine.device.type == "cuda":
                torch.cuda.empty_cache()
            self._save()
            self.run.saver.wait()
            self._tell_saved()
            self.progress.write("Resume with --resume_from_checkpoint auto: the run goes on from there")
        except Exception as failure:
            self.progress.write(f"Step {position.step} could not be saved: {failure}")

    def _stop(self) -> None:
        """Ends the run as a signal asks. Raises Stopped."""
        if self.position.saved != self.position.step and self.position.step:
            self.progress.write(f"Stopping: step {self.position.step} is being saved")
            self._save()
        self.run.saver.wait()
        self._tell_saved()
        said = ["Stopped by a signal. The same command goes on from here with --resume_from_checkpoint auto"]
        saved = self.run.output_dir / layout.step_name(self.position.saved)
        said += following(self.run.output_dir, self.config, saved) if self.position.saved > 0 else []
        self.progress.write(*said)
        raise Stopped

    # ---- after a step

    def _log(
        self, result: StepResult, batches: list[MicroBatch], lr: float, waited: float, seconds: float
    ) -> dict[str, float]:
        """Tells trackers and terminal of a step; returns its metrics."""
        self._tokens += result.counts.tokens
        for batch in batches:
            self.cached.add(batch.pack)
        loader = self.position.loader
        metrics = result.metrics(self.config) | {
            "learning_rate": lr,
            "epoch": loader.epoch + loader.done / len(self.run.stream.mixture),
            **rates(self.config, lr),
            "tokens_per_second": result.counts.tokens / seconds,
            "data_wait": waited / seconds,
        }
        if self.tracker:
            self.tracker.log(metrics, self.position.step)
        self.progress.update(self.position.step, metrics)
        self._tell_saved()
        return metrics

    def _due(self) -> set[str]:
        """Names what is to be done after the step at hand, before it is saved."""
        run, step = self.run, self.position.step
        last = step == run.total_steps
        validates = run.evaluation is not None and (step % run.eval_every == 0 or last)
        saves = step % self.config.save_steps == 0 or last
        otherwise = validates if run.evaluation is not None else saves
        samples = run.samples is not None and run.samples.pace.due(step, otherwise, last)
        return {work for work, due in (("validating", validates), ("sampling", samples)) if due}

    def _look(self, due: set[str]) -> dict[str, Any]:
        """Validates and draws samples. A signal breaks it off on all processes; the next run begins with it.

        Raises:
            Stopped: there was a signal.
        """
        run, position = self.run, self.position
        position.pending, values = set(due), {}
        try:
            if "validating" in due:
                with run.signals.phase("validating"):
                    values = self._validate()
                if not run.guard.drifted:  # a resume measures again before it goes on, and stops again
                    position.pending.discard("validating")
            if "sampling" in due and run.samples is not None:
                with run.signals.phase("sampling"):
                    apart = run.ema is not None and position.step > 0  # at step 0 both are the same
                    run.samples.run(position.step, self.tracker, self._averaged if apart else None)
                position.pending.discard("sampling")
        except Stopped:
            self._stop()
        return values

    def evaluate(self) -> dict[str, float | None] | None:
        """What is measured of the weights as they are; None where a signal broke it off."""
        run = self.run
        assert run.evaluation is not None
        rank_slice = replace(run.rank_slice, global_batch=run.rank_slice.world)

        def batches(stream: PackStream) -> Iterator[list[MicroBatch]]:
            steps = stream.steps_in(0, rank_slice.global_batch)
            return self._batches(stream, rank_slice, LoaderState(), steps)

        def agree(batch: MicroBatch, stream: PackStream) -> bool:
            self.engine.tick()
            stop, bad = self.engine.sum([run.signals.asked, len(batch.bad)])
            if bad:
                run.guard.check_records([batch], stream)
            return not stop

        return run.evaluation.measure(self.position.step, batches, agree)

    def _validate(self) -> dict[str, Any]:
        position, evaluation = self.position, self.run.evaluation
        assert evaluation is not None
        with self._averaged():
            values = self.evaluate()
        if values is None:
            raise Stopped
        if self.tracker:
            self.tracker.log(values, position.step)
        self.progress.write(f"Validation at step {position.step}: {numbers_line(values, evaluation.metric)}")
        if not position.step:  # the model that the run began with is none of its results
            return values
        if evaluation.probe is not None:
            self.run.guard.drifted = evaluation.probe.drifted(values)
        if evaluation.val is None:
            return values
        better = evaluation.improves(values, position.best)
        if values.get(evaluation.metric) is not None:  # what was not measured has not stopped getting better
            self.run.guard.validated(better)
        if better:
            position.best = values[evaluation.metric]
            self._save(layout.BEST)
        return values

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the average, where there is one."""
        if self.run.ema is None:
            return contextlib.nullcontext()
        self.run.saver.settle()
        return self.run.ema.swapped(self.engine.refresh)

    def _idle(self) -> None:
        """Called while samples are drawn."""
        self.engine.tick()
        if self.run.signals.asked:
            raise Stopped

    # ---- checkpoints

    def _save(self, name: str | None = None) -> None:
        """Saves ``step_N``, everything that a resume needs, or under ``name`` the weights alone."""
        run, position = self.run, self.position
        weights_only = name is not None
        with run.signals.phase("saving"):
            run.saver.wait()
            self._tell_saved()
            keep = {run.output_dir / layout.step_name(position.saved), run.source.folder}
            keep |= {run.output_dir / run.guard.good} if run.guard.good else set()
            run.disk.need(run.checkpoint_bytes(weights_only), keep, self._wait_for_space)
            contents = Contents(
                position.step,
                run.state.entries(weights_only),
                self._states(weights_only),
                lambda folder: write_side_files(run.side, folder),
                {"engine": self.engine.name, "average": run.ema is not None, **run.guard.mark()},
            )
            run.saver.save(contents, name)
        if not weights_only:
            position.saved = position.step
            run.guard.saved(layout.step_name(position.step))
        self._tell_saved()

    def _spare_the_good(self) -> None:
        """An older checkpoint may go as soon as a newer one counts as good, and no earlier."""
        if self.run.saver.good != self.run.guard.good:
            self.run.saver.good = self.run.guard.good
            self.run.saver.prune(layout.step_name(self.position.saved))

    def _states(self, weights_only: bool) -> dict[str, Any]:
        """The JSON files of a checkpoint: the options, and what a resume needs."""
        run, engine = self.run, self.engine
        options = self.config.to_dict()
        options |= {"precision": engine.precision.name, "compile": "on" if engine.compiles else "off"}
        states: dict[str, Any] = {layout.OPTIONS: redacted(options)}
        if not weights_only:
            states[layout.TRAINER] = self.position.state() | {
                "fingerprint": run.stream.mixture.fingerprint,
                "total_steps": run.total_steps,
                "step_rows": run.rank_slice.global_batch,
                "guards": run.guard.state(),
                "scale": engine.scale.state(),
                "evaluation": run.evaluation.state() if run.evaluation is not None else {},
                **({} if engine.teacher is None else {"preserved": engine.teacher.digest}),
                **({} if run.base is None else {"base": run.base}),
            }
        return states

    def _wait_for_space(self) -> None:
        """Called by all processes together while the disk is too full."""
        self.engine.tick()
        if self.engine.sum([self.run.signals.asked])[0]:
            raise SpaceError(
                f"{self.run.output_dir}: a signal ended the waiting for disk space; step"
                f" {self.position.step} is not saved, earlier ones are untouched. Fix: free space there, then"
                " go on with --resume_from_checkpoint auto"
            )

    def _tell_saved(self) -> None:
        while (folder := self.run.saver.published()) is not None:
            self.progress.write(f"Saved {folder}")
