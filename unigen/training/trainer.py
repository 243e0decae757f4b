"""``UnifiedTrainer``: build, restore, the step, evaluate, save."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from unigen.cache.encoders import open_cache
from unigen.cache.store import CacheTally
from unigen.config import Config, UserError
from unigen.data.loader import LoaderState, MicroBatch, PackStream, RankSlice, default_workers, load_batches
from unigen.model.parts import title
from unigen.model.storage import scan_folder
from unigen.model.weights import side_bytes, write_side_files
from unigen.runs.checkpoint import (
    CheckpointError,
    read_states,
    resolve_resume,
    scan_weights,
    verify_checkpoint,
)
from unigen.runs.heartbeat import WAITING, Heartbeat
from unigen.runs.layout import prepare_folder
from unigen.runs.saver import Contents, Saver
from unigen.runs.secrets import hide_in_logs, redacted
from unigen.runs.signals import SignalHandler, Stopped, shielded, worker_init
from unigen.runs.space import DiskSpace, SpaceError
from unigen.tracking.tracker import Progress, Tracker
from unigen.training.datasets import RunData
from unigen.training.ema import EMA
from unigen.training.engine import open_engine
from unigen.training.guards import BadStepGuard
from unigen.training.losses import Counts
from unigen.training.optim import learning_rate_at
from unigen.training.passes import StepResult, dry_batch, micro_batches, validation_losses
from unigen.training.precision import stored_precision, tell_change
from unigen.training.prepare import tell_compiling
from unigen.training.samples import SampleWriter
from unigen.training.state import RunState, rows_of_a_step

log = logging.getLogger("unigen")


class UnifiedTrainer:
    """Trains a BAGEL checkpoint on text and images, as the config says.

    ``UnifiedTrainer(config).train()`` does everything; ``build()`` alone prepares it (and is what ``dry_run``
    ends after).

    Raises:
        UserError: the options, the checkpoint or the data cannot work; raised before the first step.
    """

    def __init__(self, config: Config):
        self.config = config.resolve()
        self.output_dir = Path(config.output_dir)
        self.step = self.total_steps = 0
        self.place = LoaderState()
        self.best = math.inf
        self.pending: set[str] = set()  # what a signal kept from being done after the last step
        self.stops = SignalHandler()
        self.stopped = False  # did a signal end the run?
        self.watchdog: Heartbeat | None = None
        self._saved = -1  # the last step with a checkpoint
        self._lock: IO[str] | None = None

    # ---- build

    def train(self) -> dict[str, float]:
        """Runs the training; the last metrics.

        SIGTERM, SIGINT, SIGUSR1 and SIGHUP end it after the step at hand: its state is saved, and ``stopped``
        says so.
        """
        with self.stops, open_engine(self.config) as self.engine:
            try:
                with self.stops.phase("loading", breakable=True):
                    self.build()
                return self._run()
            except Stopped:
                self.stopped = True
                return {}
            finally:
                if self.watchdog is not None:
                    self.watchdog.close()
                if self._lock is not None:
                    self._lock.close()

    def build(self) -> None:
        """Everything before the first step: folders, data, model, optimiser, state."""
        c, engine = self.config, self.engine
        logging.basicConfig(level=logging.INFO if engine.main else logging.WARNING, format="%(message)s")
        hide_in_logs()
        log.info("%s", engine.precision)
        engine.on_main(self._prepare_folder)
        ranks = self.output_dir / "ranks"
        self.watchdog = Heartbeat(
            ranks,
            engine.rank,
            engine.world,
            c.hang_timeout,
            self.stops,
            lambda: {"total_steps": self.total_steps},
        )
        engine.tick = self._tick
        # rows bring their own random numbers; this is for whatever else may draw some
        torch.manual_seed(c.seed)
        resume = (
            resolve_resume(c.resume_from_checkpoint, self.output_dir, self._verify)
            if c.resume_from_checkpoint
            else None
        )
        states = read_states(resume) if resume else {}
        if resume and "trainer" not in states:
            raise CheckpointError(
                f"{resume} holds weights only, so a run cannot go on from it. Fix: resume from a step_N"
                f" folder, or start a new run with --model_path {resume}"
            )
        if resume:
            tell_change(states["training_config"], engine.precision)
        self._load_model(resume)
        if resume:
            tell_compiling(states["training_config"], engine.compiles)
        self.cache = (
            open_cache(c.cache_dir, self.model, c, engine.dtype, engine.tensors) if c.cache_dir else None
        )
        self.tally = CacheTally()
        streams = RunData(c, engine, self.model, self.cache)
        self.stream, self.val_stream = streams.train, streams.val
        self.guards = BadStepGuard(engine, c, self.output_dir)
        self.share = RankSlice(engine.rank, engine.world, rows_of_a_step(c, engine.world, states))
        self.workers = default_workers(engine.local_world) if c.num_workers is None else c.num_workers
        self.total_steps = c.max_steps or sum(
            self.stream.steps_in(e, self.share.step_rows) for e in range(c.num_epochs)
        )
        # Counting the steps of an epoch packs it; only where the answer is needed.
        self.eval_every = c.eval_steps or (
            self.stream.steps_in(0, self.share.step_rows) if self.val_stream else self.total_steps
        )
        engine.start()
        self.optimizer = engine.optimizer
        self.ema = EMA(engine.shards(), c.ema) if c.ema else None
        self.state = RunState(
            engine, self.ema, scan_folder(Path(c.model_path or "")), resumed=resume is not None
        )
        self.saver = Saver(
            self.output_dir, engine.rank, engine.background(),
            background=c.async_save, keep=c.save_total_limit, source=Path(c.model_path or ""),
            tick=self._tick,
        )  # fmt: skip
        self.space = DiskSpace(
            self.output_dir,
            c.low_space,
            c.min_free_gb,
            lambda line: log.warning("%s", line),
            engine,
            self._verify,
        )
        self.sampler = SampleWriter(c, engine, self.model) if c.sample_prompts else None
        if resume is not None:
            self._restore(resume, states)
        self._describe()

    def _prepare_folder(self) -> None:
        self._lock = prepare_folder(self.output_dir, self.config)

    def _verify(self, folder: Path) -> None:
        verify_checkpoint(folder, (self.engine.rank, self.engine.world), self.engine.gather, self._tick)

    def _tick(self) -> None:
        """Progress was made."""
        if self.watchdog is not None:
            self.watchdog.beat(self.step)

    def _load_model(self, resume: Path | None) -> None:
        assert self.config.model_path is not None
        start = Path(self.config.model_path)
        self.model = self.engine.load_model(
            resume or start, scan_weights(resume, raw=True) if resume else None
        )
        self.model.source = start  # saving copies from the folder the run began with

    def _describe(self) -> None:
        shards = self.engine.shards()
        total, trained = (
            sum(s.shape.numel() for s in shards if s.trains or everything) for everything in (True, False)
        )
        parts: dict[str, int] = {}
        for s in shards:
            part = title(s.name)
            parts[part] = parts.get(part, 0) + s.shape.numel() * s.trains
        log.info(
            "Model: %s parameters, %s train (%s)",
            f"{total:,}",
            f"{trained:,}",
            ", ".join(f"{k} {v:,}" for k, v in parts.items() if v),
        )
        log.info(
            "Run: %d steps on %d process(es) (%s), %s, %s; from step %d",
            self.total_steps, self.engine.world, self.engine.name, self.engine.device,
            str(self.engine.dtype)[len("torch.") :], self.step,
        )  # fmt: skip
        nbytes, best = self._bytes(), self._bytes(weights_only=True) if self.val_stream is not None else 0
        if self.engine.main:
            c = self.config
            log.info(
                "%s",
                self.space.predict(
                    self.step, self.total_steps, c.save_steps, c.save_total_limit, nbytes, best
                ),
            )

    # ---- state

    def _restore(self, folder: Path, states: dict[str, Any]) -> None:
        state = states["trainer"]
        if state["fingerprint"] != self.stream.mixture.fingerprint:
            raise UserError(
                f"{folder}: the training data is not what this run began with (its fingerprint differs)."
                " Fix: resume with the same files and weights, or start a new run with --model_path of this"
                " checkpoint"
            )
        self.state.restore(folder)
        if stored_precision(states["training_config"]) == self.engine.precision.name:
            self.engine.scale.load(state["scale"])
        self.step, self.best = state["step"], state["best"] if state["best"] is not None else math.inf
        self.guards.load(state["guards"], self.step)
        self.pending = set(state["pending"])
        self._saved = self.step
        self.place = LoaderState(state["epoch"], state["position"], tuple(state["waiting"]))
        log.info("Resumed from %s at step %d", folder, self.step)

    def _save(self, name: str | None = None) -> None:
        """``step_N``: everything a resume needs. ``best``: weights alone."""
        options = self.config.to_dict() | {
            "precision": self.engine.precision.name,
            "compile": "on" if self.engine.compiles else "off",
        }
        states: dict[str, Any] = {"training_config": redacted(options)}
        if name is None:
            states["trainer"] = {
                "step": self.step,
                "epoch": self.place.epoch,
                "position": self.place.position,
                "waiting": self.place.waiting,
                "best": self.best if math.isfinite(self.best) else None,
                "fingerprint": self.stream.mixture.fingerprint,
                "total_steps": self.total_steps,
                "step_rows": self.share.step_rows,
                "guards": self.guards.state(),
                "pending": sorted(self.pending),
                "scale": self.engine.scale.state(),
            }
        with self.stops.phase("saving"):
            self.saver.wait()
            self._tell_saved()
            self.space.need(
                self._bytes(name is not None),
                (self.output_dir / f"step_{self._saved}", Path(self.config.model_path or "")),
                self._wait_for_room,
            )
            entries = self.state.entries(weights_only=name is not None)
            about = {"engine": self.engine.name, "average": self.ema is not None}
            self.saver.save(
                Contents(
                    self.step, entries, states, lambda folder: write_side_files(self.model, folder), about
                ),
                name,
            )
        if name is None:
            self._saved = self.step
        self._tell_saved()

    def _wait_for_room(self) -> None:
        """Called by all processes together while the disk is too full."""
        self._tick()
        if self.engine.sum([self.stops.asked])[0]:
            raise SpaceError(
                f"{self.output_dir}: a signal ended the waiting for room; step {self.step} is not saved,"
                " earlier ones are untouched. Fix: free space there, then go on with"
                " --resume_from_checkpoint auto"
            )

    def _bytes(self, weights_only: bool = False) -> int:
        """Of a checkpoint."""
        return self.state.nbytes(weights_only) + side_bytes(self.model)

    def _tell_saved(self) -> None:
        while (folder := self.saver.published()) is not None:
            self.progress.write(f"Saved {folder}")

    # ---- the loop

    def _run(self) -> dict[str, float]:
        c = self.config
        main = self.engine.main
        with self.stops.phase("dry batch", breakable=True):
            self.dry_batch()
        if c.dry_run:
            log.info("Dry run: everything is ready; nothing was trained")
            return {}
        tracker = (
            Tracker(self.output_dir, c, self.step, repeats="validating" in self.pending) if main else None
        )
        if self.sampler is not None:
            self.sampler.idle = self._idle
        self.progress = Progress(self.total_steps, self.step, c.logging_steps, main)
        try:
            metrics = self._steps(tracker)
            self.saver.wait()
            self._tell_saved()
            return metrics
        finally:
            # a checkpoint on its way is finished, whatever ended the run
            with contextlib.suppress(CheckpointError):
                self.saver.wait()
            self.progress.close()
            if tracker:
                tracker.finish()

    def _steps(self, tracker: Tracker | None) -> dict[str, float]:
        c = self.config
        rows = self._rows(self.stream, self.share, self.place, self.total_steps - self.step)
        metrics = self._look(self.pending, tracker)  # what a signal broke off
        while self.step < self.total_steps and not self.guards.exhausted:
            began = time.perf_counter()
            step_rows = self._next_rows(rows)
            waited = time.perf_counter() - began
            counts = self._agree(step_rows)
            lr = learning_rate_at(self.step, self.total_steps, c)
            with self.stops.phase("forward/backward"):
                result = self.train_step(step_rows, lr, counts)
            self.step, self.place = self.step + 1, step_rows[-1].after
            self._tick()
            for row in step_rows:
                self.tally.add(row.pack)
            seconds = time.perf_counter() - began
            metrics = result.metrics(c) | {
                "learning_rate": lr,
                "epoch": self.place.epoch + self.place.done / len(self.stream.mixture),
                "tokens_per_second": result.tokens / seconds,
                "data_wait": waited / seconds,
            }
            if tracker:
                tracker.log(metrics, self.step)
            self.progress.update(self.step, metrics)
            self._tell_saved()
            metrics |= self._look(self._due(), tracker)
            if self.step % c.save_steps == 0 or self.step == self.total_steps or self.guards.exhausted:
                self._save()
        if self.guards.exhausted:
            self.progress.write(
                f"Stopped: {self.guards.stale} validations in a row were no better than {self.best:.4f}"
            )
        if self.cache is not None:
            self.progress.write(f"Cache: {self.tally}")
        return metrics

    def _rows(
        self, stream: PackStream, share: RankSlice, place: LoaderState, limit: int
    ) -> Iterator[list[MicroBatch]]:
        pin = self.engine.device.type == "cuda"
        return load_batches(
            stream, share, place, num_workers=self.workers, limit=limit, pin=pin, worker_init=worker_init,
            starting=shielded
        )  # fmt: skip

    def _next_rows(self, rows: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
        """This process's rows of the next step; none where a signal broke the waiting off."""
        try:
            with self.stops.phase("data", breakable=True):
                return next(rows)
        except Stopped:
            return []

    def _agree(self, rows: list[MicroBatch]) -> tuple[float, float, float]:
        """What all processes have to know before a step: (text targets, image targets, tokens) of all their
        rows.

        Raises:
            Stopped: a signal came to one of them; the last step is saved.
            CheckpointError: the checkpoint that was written beside the training has failed.
            TrainingStopped: as :meth:`BadStepGuard.check_rows`.
        """
        packs = [row.pack for row in rows]
        bad = sum(len(row.bad) for row in rows)
        said = [
            self.stops.asked,
            self.saver.failed,
            bad,
            *vars(Counts.of(packs)).values(),
            sum(len(p) for p in packs),
        ]
        with self.stops.phase(WAITING):
            stop, failed, bad, text, image, tokens = self.engine.sum(said)
        if failed:
            self.saver.wait()
        if stop:
            self._stop()
        if bad:
            self.guards.check_rows(rows, self.stream)
        return text, image, tokens

    def _stop(self) -> None:
        """The end that a signal asks for. Raises Stopped."""
        if self._saved != self.step and self.step:
            self.progress.write(f"Stopping: step {self.step} is being saved")
            self._save()
        self.saver.wait()
        self._tell_saved()
        self.progress.write(
            "Stopped by a signal. The same command goes on from here with --resume_from_checkpoint auto"
        )
        raise Stopped

    def _due(self) -> set[str]:
        """What is to be done after the step at hand, before it is saved."""
        c, last = self.config, self.step == self.total_steps
        validates = self.val_stream is not None and (self.step % self.eval_every == 0 or last)
        otherwise = validates if self.val_stream is not None else self.step % c.save_steps == 0 or last
        samples = self.sampler is not None and self.sampler.due(self.step, otherwise)
        return {work for work, due in (("validating", validates), ("sampling", samples)) if due}

    def _look(self, due: set[str], tracker: Tracker | None) -> dict[str, float]:
        """Validates and draws samples. A signal breaks it off on all processes; the next run begins with it.
        Raises Stopped."""
        self.pending, values = set(due), {}
        try:
            if "validating" in due:
                with self.stops.phase("validating"):
                    values = self._validate(tracker)
                self.pending.discard("validating")
            if "sampling" in due and self.sampler is not None:
                with self.stops.phase("sampling"), self._averaged():
                    self.sampler.run(self.step, tracker)
                self.pending.discard("sampling")
        except Stopped:
            self._stop()
        return values

    def _averaged(self) -> AbstractContextManager[None]:
        """The model holds the average inside, where there is one."""
        if self.ema is None:
            return contextlib.nullcontext()
        self.saver.settle()
        return self.ema.swapped(self.engine.refresh)

    def _idle(self) -> None:
        """Called while samples are drawn."""
        self._tick()
        if self.stops.asked:
            raise Stopped

    def train_step(
        self, rows: list[MicroBatch], lr: float, counts: tuple[float, float, float] | None = None
    ) -> StepResult:
        """One optimiser step over this process's rows (and, with others, theirs); ``counts`` as
        :meth:`_agree` gives them."""
        c, engine = self.config, self.engine
        packs = [row.pack for row in rows]
        text, image, tokens = counts or engine.sum(
            [*vars(Counts.of(packs)).values(), sum(len(p) for p in packs)]
        )
        engine.discard()
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        for found in micro_batches(engine, packs, Counts(text, image), c):
            sums += found
        text_sum, image_sum = engine.sum(sums.tolist())
        norm = engine.grad_norm()
        result = StepResult(
            text_sum / max(text, 1), image_sum / max(image, 1), Counts(text, image), tokens, norm
        )
        result.refused = self.guards.refuses((text_sum, image_sum), norm)
        overflow = not math.isfinite(norm)  # in float16 the scale's business alone
        if result.refused or overflow:
            engine.discard()
        else:
            self.saver.settle()
            engine.step(lr, norm)
            if self.ema is not None:
                self.ema.update()
        if result.refused:
            numbers = {"text_loss": result.text_loss, "image_loss": result.image_loss, "grad_norm": norm}
            self.guards.skipped(self.step + 1, result.refused, rows, numbers)
        else:
            self.guards.took(norm)
        engine.scale.update(overflow)
        return result

    # ---- before, beside

    def dry_batch(self) -> None:
        """Forward and backward of the largest row, so that memory runs out now or never."""
        dry_batch(self.engine, self.stream, self.share.rows)

    def evaluate(self) -> dict[str, float] | None:
        """Losses on the validation data. None where a signal broke it off."""
        stream, share = self.val_stream, replace(self.share, step_rows=self.share.world)
        assert stream is not None

        def agree(row: MicroBatch) -> bool:
            self._tick()
            stop, bad = self.engine.sum([self.stops.asked, len(row.bad)])
            if bad:
                self.guards.check_rows([row], stream)
            return not stop

        rows = self._rows(stream, share, LoaderState(), stream.steps_in(0, share.step_rows))
        return validation_losses(self.engine, self.config, rows, agree)

    def _validate(self, tracker: Tracker | None) -> dict[str, float]:
        with self._averaged():
            values = self.evaluate()
        if values is None:
            raise Stopped
        if tracker:
            tracker.log(values, self.step)
        self.progress.write("Validation: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        better = values["val_loss"] < self.best
        self.guards.validated(better)
        if better:
            self.best = values["val_loss"]
            self._save("best")
        return values
