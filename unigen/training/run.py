"""A training before its first step: what it consists of, and how that is built from the options."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unigen.cache.encoders import open_cache
from unigen.cache.store import FeatureCache
from unigen.config import Config, UserError
from unigen.data.dataset import list_bad_records
from unigen.data.loader import LoaderState, PackStream, RankSlice, default_workers
from unigen.model.adapters import is_adapter_folder, read_adapter
from unigen.model.bagel import Bagel
from unigen.model.lora import check_fits
from unigen.model.parts import rated_part, title
from unigen.model.source import Source
from unigen.model.storage import CheckpointFolderError, Stored
from unigen.model.weights import nonfinite, refuse_nonfinite, side_files
from unigen.outputs import unwritten
from unigen.runs import layout
from unigen.runs.checkpoint import (
    CheckpointError,
    read_states,
    resolve_resume,
    scan_weights,
    verify_checkpoint,
)
from unigen.runs.folder import FolderClaim
from unigen.runs.heartbeat import Heartbeat
from unigen.runs.said import RunLog, leave, listen
from unigen.runs.saver import Saver
from unigen.runs.secrets import hide_in_logs
from unigen.runs.signals import SignalHandler
from unigen.runs.space import DiskSpace
from unigen.runs.states import STATES
from unigen.tracking.tracker import need_trackers
from unigen.training.changes import tell_changes
from unigen.training.datasets import RunData
from unigen.training.ema import EMA
from unigen.training.engine import Engine
from unigen.training.evaluate import Evaluation, open_evaluation
from unigen.training.guards import BadStepGuard
from unigen.training.optim import rate_of
from unigen.training.precision import stored_precision, tell_change
from unigen.training.prepare import tell_compiling, tell_quantising, tell_weights
from unigen.training.preserve import Teacher
from unigen.training.samples import SampleWriter
from unigen.training.state import RunState, global_batch_of

log = logging.getLogger("unigen")


@dataclass
class Position:
    """How far a training is: the part of it that every step changes and every checkpoint keeps."""

    step: int = 0  # optimiser steps done
    loader: LoaderState = field(default_factory=LoaderState)
    best: float = math.inf  # the best value of the number that decides (metric_for_best_model); inf: none yet
    pending: set[str] = field(default_factory=set)  # what a signal kept from being done after the last step
    saved: int = -1  # the last step with a checkpoint
    sound: bool = True  # are the weights those of ``step``? Not while an update is under way

    def state(self) -> dict[str, Any]:
        """Its part of ``trainer.json``."""
        return {
            "step": self.step,
            "epoch": self.loader.epoch,
            "position": self.loader.position,
            "waiting": self.loader.buffer,
            "best": self.best if math.isfinite(self.best) else None,
            "pending": sorted(self.pending),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` gave."""
        self.step = self.saved = state["step"]
        self.loader = LoaderState(state["epoch"], state["position"], tuple(state["waiting"]))
        self.best = math.inf if state["best"] is None else state["best"]
        self.pending = set(state["pending"])


@dataclass(frozen=True)
class Run:
    """Everything that a training has, built before its first step and the same to its end."""

    config: Config
    engine: Engine  # processes, devices, optimiser
    signals: SignalHandler
    heartbeat: Heartbeat
    claim: FolderClaim | None  # to the run's folder, on rank 0
    source: Source  # the weights that the run began with; saving copies from them
    side: dict[str, bytes]  # on rank 0, the files that every checkpoint takes along
    model: Bagel
    cache: FeatureCache | None
    stream: PackStream  # of the training data
    val_stream: PackStream | None
    rank_slice: RankSlice  # this process's part of a step
    workers: int  # loader processes
    total_steps: int
    eval_every: int
    ema: EMA | None
    state: RunState  # tensors, out to checkpoints and back
    saver: Saver
    disk: DiskSpace
    guard: BadStepGuard
    evaluation: Evaluation | None  # what is measured beside the training
    samples: SampleWriter | None
    resumed: dict[str, Any] | None  # the state that it goes on from; None for a fresh start
    position: Position  # the one thing that changes
    said: RunLog  # what this process says

    @property
    def output_dir(self) -> Path:
        return self.saver.output_dir

    def tick(self) -> None:
        """Says that progress was made."""
        self.heartbeat.beat(self.position.step)

    def checkpoint_bytes(self, weights_only: bool = False) -> int:
        """Bytes of the next checkpoint, all processes together."""
        return self.state.nbytes(weights_only) + sum(map(len, self.side.values()))

    def begin(self) -> None:
        """Takes the folder over, now that everything is known to work. All processes call it together.

        Raises:
            UserError: the folder cannot be written.
        """
        self.engine.on_main(self._begin)
        self.heartbeat.move(self.output_dir / layout.RANKS)
        if self.engine.main:
            self.said.open(self.output_dir / layout.LOG)
        if self.resumed is not None:
            self.guard.load(self.resumed["guards"], self.position.step)

    def _begin(self) -> None:
        assert self.claim is not None
        self.claim.begin()
        streams = [stream for stream in (self.stream, self.val_stream) if stream is not None]
        for part in (part for stream in streams for part in stream.mixture.parts):
            if part.dataset.bad:
                with unwritten("output_dir", self.output_dir):
                    bad = [record.to_dict() for record in part.dataset.bad]
                    list_bad_records(self.output_dir / layout.BAD_RECORDS, bad)
                log.warning("The records of %s that are left out are in %s", part.name, layout.BAD_RECORDS)

    def close(self) -> None:
        """Ends the heartbeats and lets go of the folders."""
        leave(self.said)
        self.heartbeat.close()
        self.source.close()
        if self.claim is not None:
            self.claim.close()


def build(config: Config, engine: Engine, signals: SignalHandler) -> Run:
    """Builds a training: folder, checkpoint, model, data, optimiser, state.

    Args:
        config: resolved.
        engine: open.
        signals: entered, or the run has no heartbeats.

    Raises:
        UserError: the options, the checkpoint or the data cannot work; nothing is held then.
    """
    c = config
    with ExitStack() as undo:
        told = listen(c.log_level, engine.main)
        undo.callback(leave, told)
        hide_in_logs()
        log.info("%s", engine.precision)
        torch.manual_seed(c.seed)  # samples bring their own random numbers; this is for whatever else draws
        output_dir, position = Path(c.output_dir), Position()
        engine.on_main(lambda: need_trackers(c))
        claim = _claim(engine, output_dir, c)
        if claim is not None:
            undo.callback(claim.close)
        facts: dict[str, Any] = {"total_steps": 0}
        ranks = output_dir / layout.STARTING_RANKS
        heartbeat = Heartbeat(ranks, engine.rank, engine.world, c.hang_timeout, signals, lambda: facts)
        undo.callback(heartbeat.close)

        def tick() -> None:
            heartbeat.beat(position.step)

        def verify(folder: Path) -> None:
            verify_checkpoint(folder, (engine.rank, engine.world), engine.gather, tick)

        engine.tick = tick
        resume, states = _to_resume(c, verify)
        source = _open_source(Path(c.model_path or ""), resume)
        if resume:
            tell_change(states[layout.OPTIONS], engine.precision)
        model = engine.load_model(*_weights(c, source, resume))
        if resume and not model.adapters and not _has_left_out(source, resume, model, engine):
            source.close()
            source = Source(resume)
        undo.callback(source.close)
        source.settle()
        side: dict[str, bytes] = {}
        engine.on_main(lambda: side.update(side_files(model)))
        if resume:
            tell_compiling(states[layout.OPTIONS], engine.compiles)
            tell_quantising(states[layout.OPTIONS], c)
            tell_weights(states[layout.OPTIONS], c)
        cache = open_cache(c.cache_dir, model, c, engine.dtype, engine.tensors) if c.cache_dir else None
        data = RunData(c, engine, model, cache)
        rank_slice = RankSlice(engine.rank, engine.world, global_batch_of(c, engine.world, states))

        def steps_in(epoch: int) -> int:
            return data.train.steps_in(epoch, rank_slice.global_batch)

        # Counting the steps of an epoch packs it; only where the answer is needed.
        total_steps = c.max_steps or sum(map(steps_in, range(c.num_epochs)))
        eval_every = c.eval_steps or (steps_in(0) if data.val or data.probe else total_steps)
        facts["total_steps"] = total_steps
        engine.start()
        said = engine.gather(json.dumps(nonfinite((s.name, s.value) for s in engine.shards())))
        refuse_nonfinite(
            resume or source.folder, sorted({name for part in said for name in json.loads(part)})
        )
        if c.preserve_weight is not None:
            engine.teacher = Teacher(engine, source, states.get(layout.TRAINER))
        ema = EMA(engine.shards(), c.ema) if c.ema else None
        run = Run(
            config=c,
            engine=engine,
            signals=signals,
            heartbeat=heartbeat,
            claim=claim,
            source=source,
            side=side,
            model=model,
            cache=cache,
            stream=data.train,
            val_stream=data.val,
            rank_slice=rank_slice,
            workers=default_workers(engine.local_world) if c.num_workers is None else c.num_workers,
            total_steps=total_steps,
            eval_every=eval_every,
            ema=ema,
            state=RunState(engine, ema, source, resumed=resume is not None, adapted=bool(model.adapters)),
            saver=Saver(
                output_dir,
                engine.rank,
                engine.background(),
                background=c.async_save,
                keep=c.save_total_limit,
                source=source.folder,
                tick=tick,
            ),
            disk=DiskSpace(
                output_dir,
                c.low_space,
                c.min_free_gb,
                lambda line: log.warning("%s", line),
                engine,
                verify,
            ),
            guard=BadStepGuard(engine, c, output_dir),
            evaluation=open_evaluation(c, engine, model, data, rank_slice, eval_every),
            samples=SampleWriter(c, engine, model) if c.sample_prompts else None,
            resumed=states.get(layout.TRAINER),
            position=position,
            said=told,
        )
        if engine.teacher is not None:
            engine.teacher.settle = run.saver.settle
        if resume is not None:
            _restore(run, resume, states)
        _describe(run)
        undo.pop_all()
        return run


def _claim(engine: Engine, folder: Path, config: Config) -> FolderClaim | None:
    """Rank 0's claim to the run's folder; the others have none."""
    held: list[FolderClaim] = []
    engine.on_main(lambda: held.append(FolderClaim(folder, config)))
    return held[0] if held else None


def _to_resume(config: Config, verify: Callable[[Path], None]) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its states; None and {} for a fresh start.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds weights only.
    """
    if not config.resume_from_checkpoint:
        return None, {}
    folder = resolve_resume(config.resume_from_checkpoint, Path(config.output_dir), verify)
    states = read_states(folder, STATES) if folder else {}
    if folder and layout.TRAINER not in states:
        raise CheckpointError(
            f"{folder} holds weights only, so a run cannot go on from it. Fix: resume from a step_N"
            f" folder, or start a new run with --model_path {folder}"
        )
    return folder, states


def _open_source(folder: Path, resume: Path | None) -> Source:
    """The folder of ``model_path``; where that is gone, the checkpoint that a run goes on from."""
    if is_adapter_folder(folder):
        raise CheckpointFolderError(
            f"{folder} holds an adapter, no model. Fix: go on with its run by --resume_from_checkpoint, or "
            f"merge"
            f" it first (unigen ckpt export {folder} NEW_FOLDER --merge)"
        )
    try:
        return Source(folder)
    except CheckpointFolderError as error:
        if resume is None or is_adapter_folder(resume):
            raise
        log.warning(
            "%s. The run goes on with what %s holds", str(error).split(" Fix: ")[0].rstrip("."), resume
        )
        return Source(resume)


def _has_left_out(source: Source, resume: Path, model: Bagel, engine: Engine) -> bool:
    """Do the parts of a checkpoint that the model leaves out have their bytes in the source, too? (What the
    model holds is compared by :class:`RunState`.)"""
    held = dict(model.named_parameters())
    left = [(name, entry) for name, entry in scan_weights(resume).items() if name not in held]
    changed = 0
    for name, entry in left[engine.rank :: engine.world]:
        engine.tick()
        same = source.stored.get(name)
        changed += same is None or not same.equals(entry)
    if (changed := int(engine.sum([changed])[0])) and engine.main:
        log.warning(
            "%s is not what this run began with (%d tensors differ); what the run leaves out comes from %s",
            source.folder, changed, resume,
        )  # fmt: skip
    return not changed


def _weights(config: Config, source: Source, resume: Path | None) -> tuple[Path, dict[str, Stored] | None]:
    """The folder of the model's configs, and where its weights lie; adapters are resumed over their base.

    Raises:
        CheckpointError: the checkpoint's adapter is another one, or it has none.
        AdapterError: it was trained over another base.
    """
    if resume is None:
        return source.folder, None
    weights = scan_weights(resume, raw=True)
    if config.lora_rank is None:
        if is_adapter_folder(resume):
            rank = read_adapter(resume)[0].rank
            raise CheckpointError(
                f"{resume} holds an adapter, and this run trains none. Fix: resume with the run's own options"
                f" (--lora_rank {rank} ...)"
            )
        return resume, weights
    if not is_adapter_folder(resume):
        raise CheckpointError(
            f"{resume} holds no adapter, so a run with lora_rank cannot go on from it. Fix: leave "
            f"--lora_rank out, or"
            f" start a new run with --model_path {resume}"
        )
    before, named = read_adapter(resume)
    now = {"lora_rank": config.lora_rank, "lora_alpha": config.alpha, "lora_variant": config.lora_variant}
    for (name, value), was in zip(now.items(), (before.rank, before.alpha, before.variant), strict=True):
        if value != was:
            raise CheckpointError(
                f"{resume}: the adapter has {name} {was}, this run {value}. Fix: resume with --{name} {was}"
            )
    check_fits(resume, before, named, source.stored)
    return source.folder, source.stored | weights


def _restore(run: Run, folder: Path, states: dict[str, Any]) -> None:
    """Brings a built run to where a checkpoint left off."""
    state = states[layout.TRAINER]
    if state["fingerprint"] != run.stream.mixture.fingerprint:
        raise UserError(
            f"{folder}: the training data is not what this run began with (its fingerprint differs)."
            " Fix: resume with the same files and weights, or start a new run with --model_path of this"
            " checkpoint"
        )
    total = len(run.stream.mixture)
    if max([state["position"], *(place + 1 for place in state["waiting"])]) > total:
        raise CheckpointError(
            f"{folder}: {layout.state_file(layout.TRAINER)}: position or waiting lie behind the {total:,}"
            " records of an epoch. Fix: use another checkpoint"
        )
    run.state.restore(folder)
    if stored_precision(states[layout.OPTIONS]) == run.engine.precision.name:
        run.engine.scale.load(state["scale"])
    run.position.load(state)
    if run.evaluation is not None and not run.evaluation.load(state.get("evaluation", {}), folder):
        run.position.best = math.inf
    if folder.resolve().parent == run.output_dir.resolve():
        run.guard.good = run.saver.good = folder.name
    log.info("Resumed from %s at step %d", folder, run.position.step)
    totals = state.get("total_steps"), run.total_steps
    tell_changes(folder, states[layout.OPTIONS], run.config, run.position.step, totals)


def _describe(run: Run) -> None:
    """Logs what trains, on what, and what the disk will be asked for."""
    c, engine, shards = run.config, run.engine, run.engine.shards()
    parts: dict[str, int] = {}
    rate: dict[str, float] = {}
    for shard in shards:
        if shard.trains:
            part = title(shard.name)
            parts[part] = parts.get(part, 0) + shard.numel
            rate[part] = c.learning_rate * rate_of(c, rated_part(shard.name))
    log.info(
        "Model: %s parameters, %s train (%s)",
        f"{sum(shard.numel for shard in shards):,}",
        f"{sum(parts.values()):,}",
        ", ".join(f"{part} {count:,} at {rate[part]:g}" for part, count in parts.items()),
    )
    log.info(
        "Run: %d steps on %d process(es) (%s), %s, %s; from step %d",
        run.total_steps,
        engine.world,
        engine.name,
        engine.device,
        str(engine.dtype).removeprefix("torch."),
        run.position.step,
    )
    nbytes = run.checkpoint_bytes()
    best = run.checkpoint_bytes(weights_only=True) if run.val_stream is not None else 0
    if run.position.step < run.total_steps:
        run.disk.need_first(nbytes)
    if engine.main:
        plan = (run.position.step, run.total_steps, c.save_steps, c.save_total_limit, nbytes, best)
        log.info("%s", run.disk.forecast(*plan))
