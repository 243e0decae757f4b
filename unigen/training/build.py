"""A training before its first step: how it is built from the options."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from unigen.bars import Bar
from unigen.cache.encoders import open_cache
from unigen.config import Config
from unigen.data.loader import LoaderState, PackStream, RankSlice, default_workers
from unigen.model.parts import rated_part, title
from unigen.model.source import Source
from unigen.model.weights import nonfinite, refuse_nonfinite, side_files
from unigen.runs import layout
from unigen.runs.checkpoint import verify_checkpoint
from unigen.runs.folder import FolderClaim
from unigen.runs.heartbeat import Heartbeat
from unigen.runs.said import leave, listen
from unigen.runs.saver import Saver
from unigen.runs.secrets import hide_in_logs
from unigen.runs.signals import SignalHandler
from unigen.runs.space import DiskSpace
from unigen.tracking.tracker import need_trackers
from unigen.training.changes import tell_computing
from unigen.training.datasets import RunData, need_data
from unigen.training.ema import EMA
from unigen.training.engine import Engine
from unigen.training.evaluate import Evaluation
from unigen.training.guards import BadStepGuard
from unigen.training.optim import rate_of
from unigen.training.preserve import Teacher
from unigen.training.resume import begun_with, has_left_out, open_source, restore, to_resume, weights_of
from unigen.training.run import Position, Run
from unigen.training.samples import SampleWriter
from unigen.training.state import RunState, global_batch_of

log = logging.getLogger("unigen")


def build(config: Config, engine: Engine, signals: SignalHandler) -> Run:
    """Builds a training from a resolved config and an open engine: folder, checkpoint, model, data,
    optimiser, state. ``signals`` are entered, or the run has no heartbeats.

    Raises:
        UserError: the options, the checkpoint or the data cannot work; nothing is held then.
    """
    c = config
    with ExitStack() as undo:
        told = listen(c.log_level, engine.main)
        undo.callback(leave, told)
        hide_in_logs()
        log.info("%s", engine.precision)
        for line in c.warnings() if engine.main else []:
            log.warning("%s", line)
        torch.manual_seed(c.seed)  # samples bring their own random numbers; this is for whatever else draws
        output_dir, position = Path(c.output_dir), Position()
        engine.on_main(lambda: need_trackers(c))
        engine.on_main(lambda: need_data(c))
        claim: FolderClaim | None = engine.on_main(lambda: FolderClaim(output_dir, c))
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

        warn = partial(log.warning, "%s")
        engine.tick = tick  # says that progress was made
        resume, states = to_resume(c, verify)
        source = open_source(Path(c.model_path or ""), resume)
        base, same_base = begun_with(c, source, states)
        model = engine.load_model(*weights_of(c, source, resume))
        if resume and not model.adapters and not has_left_out(source, resume, model, engine):
            source.close()
            source = Source(resume)
        undo.callback(source.close)
        source.settle()
        side: dict[str, bytes] = engine.on_main(lambda: side_files(model)) or {}
        if resume:
            tell_computing(states[layout.OPTIONS], c, engine.precision, engine.compiles)
        cache = open_cache(c.cache_dir, model, c, engine.dtype, engine.tensors) if c.cache_dir else None
        data = RunData(c, engine, model, cache)
        rank_slice = RankSlice(engine.rank, engine.world, global_batch_of(c, engine.world, states))

        def steps_in(epoch: int) -> int:
            return data.train.steps_in(epoch, rank_slice.global_batch)

        # Counting the steps of an epoch packs it; only where the answer is needed.
        total_steps = c.max_steps or sum(map(steps_in, range(c.num_epochs)))
        measures = data.val is not None or data.probe is not None
        eval_every = c.eval_steps or (steps_in(0) if measures else total_steps)
        facts["total_steps"] = total_steps
        with Bar("preparing the engine"):
            engine.start()
            said = engine.gather(json.dumps(nonfinite((s.name, s.value) for s in engine.shards())))
        odd = {name for part in said for name in json.loads(part)}
        refuse_nonfinite(resume or source.folder, sorted(odd))
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
            disk=DiskSpace(output_dir, c.low_space, c.min_free_gb, warn, engine, verify),
            guard=BadStepGuard(engine, c, output_dir),
            evaluation=Evaluation(c, engine, model, data, rank_slice, eval_every) if measures else None,
            samples=SampleWriter(c, engine, model, data.tasks) if c.sample_prompts else None,
            resumed=states.get(layout.TRAINER),
            position=position,
            said=told,
            base=base,
        )
        if engine.teacher is not None:
            engine.teacher.settle = run.saver.settle
        if resume is not None:
            restore(run, resume, states, same_base)
        _describe(run)
        undo.pop_all()
        return run


def idle_processes(stream: PackStream, world: int) -> str:
    """Says that no step of an epoch has a packed sequence for each of ``world`` processes; "" where one
    has."""
    if world == 1 or stream.steps_in(0, world) > 1 or (count := stream.steps_in(0, 1)) >= world:
        return ""
    return (
        f"An epoch has {count:,} packed sequence(s) for {world:,} processes: {world - count:,} of them learn"
        " nothing in any step. Fix: use fewer processes, or smaller packed sequences (--max_num_tokens,"
        " --batch_size)"
    )


def whole_epoch(stream: PackStream, global_batch: int) -> str:
    """Says that the packed sequences of one step hold all records of an epoch; "" where there are more."""
    if len(list(islice(stream.sequences(LoaderState()), global_batch + 1))) > global_batch:
        return ""
    return (
        f"Each step is a whole epoch: it has room for all {len(stream.mixture):,} records. A smaller"
        f" --{'max_num_tokens' if stream.budget else 'batch_size'} makes more steps"
    )


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
    counts = f"{sum(shard.numel for shard in shards):,}", f"{sum(parts.values()):,}"
    listed = ", ".join(f"{part} {count:,} at {rate[part]:g}" for part, count in parts.items())
    log.info("Model: %s parameters, %s train (%s)", *counts, listed)
    log.info(
        "Run: %d steps on %d process(es) (%s), %s, %s; from step %d",
        run.total_steps, engine.world, engine.name, engine.device,
        str(engine.dtype).removeprefix("torch."), run.position.step,
    )  # fmt: skip
    if idle := idle_processes(run.stream, engine.world):
        log.warning("%s", idle)
    if said := whole_epoch(run.stream, run.rank_slice.global_batch):
        log.info("%s", said)
    nbytes = run.checkpoint_bytes()
    best = run.checkpoint_bytes(weights_only=True) if run.val_stream is not None else 0
    if run.position.step < run.total_steps:
        run.disk.need_first(nbytes)
    if engine.main:
        plan = (run.position.step, run.total_steps, c.save_steps, c.save_total_limit, nbytes, best)
        log.info("%s", run.disk.forecast(*plan))
