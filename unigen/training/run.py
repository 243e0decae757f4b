"""What a training consists of, and how far it is."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unigen.cache.store import FeatureCache
from unigen.config import Config
from unigen.data.dataset import list_bad_records
from unigen.data.loader import LoaderState, PackStream, RankSlice
from unigen.model.bagel import Bagel
from unigen.model.source import Source
from unigen.outputs import unwritten
from unigen.runs import layout
from unigen.runs.folder import FolderClaim
from unigen.runs.heartbeat import Heartbeat
from unigen.runs.said import RunLog, leave
from unigen.runs.saver import Saver
from unigen.runs.signals import SignalHandler
from unigen.runs.space import DiskSpace
from unigen.training.ema import EMA
from unigen.training.engine import Engine
from unigen.training.evaluate import Evaluation
from unigen.training.guards import BadStepGuard
from unigen.training.samples import SampleWriter
from unigen.training.state import RunState

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
    base: str | None  # digest of the weights of model_path; None where an older checkpoint does not say it

    @property
    def output_dir(self) -> Path:
        return self.saver.output_dir

    def checkpoint_bytes(self, weights_only: bool = False) -> int:
        """Bytes of the next checkpoint, all processes together."""
        return self.state.nbytes(weights_only) + sum(map(len, self.side.values()))

    def begin(self) -> None:
        """Takes the folder over, now that everything is known to work. All processes call it together. Raises
        UserError where the folder cannot be written."""
        self.engine.on_main(self._begin)
        self.heartbeat.move(self.output_dir / layout.RANKS)
        if self.engine.main:
            self.said.open(self.output_dir / layout.LOG)
        if self.resumed is not None:
            self.guard.load(self.resumed["guards"], self.position.step)

    def _begin(self) -> None:
        assert self.claim is not None
        self.claim.begin()
        streams = filter(None, (self.stream, self.val_stream))
        for part in (part for stream in streams for part in stream.mixture.parts):
            if bad := [record.to_dict() for record in part.dataset.bad]:
                with unwritten("output_dir", self.output_dir):
                    list_bad_records(self.output_dir / layout.BAD_RECORDS, bad)
                log.warning("The records of %s that are left out are in %s", part.name, layout.BAD_RECORDS)

    def close(self) -> None:
        """Ends the heartbeats and lets go of the folders."""
        leave(self.said)
        self.heartbeat.close()
        self.source.close()
        if self.claim is not None:
            self.claim.close()
