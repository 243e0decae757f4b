"""A run's tensors, out to a checkpoint and back: the same for every engine and every number of processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unigen.bars import each
from unigen.config import Config
from unigen.model.adapters import GROUP, disk_name
from unigen.model.mistakes import as_new_run
from unigen.model.source import Source
from unigen.model.storage import Stored, few
from unigen.runs.checkpoint import CheckpointError, scan_group, scan_weights
from unigen.runs.layout import OPTIONS, TRAINER
from unigen.runs.saver import StateEntry
from unigen.training.ema import EMA
from unigen.training.engine import Engine
from unigen.training.optim import MOMENTS
from unigen.training.shards import Shard, share_out

log = logging.getLogger("unigen")


def global_batch_of(config: Config, processes: int, states: Mapping[str, Any]) -> int:
    """Packed sequences in an optimiser step: a resumed run keeps those of its checkpoint, whose ``states``
    are empty for a fresh start, whatever the number of processes now, unless asked for others."""
    wanted = config.gradient_accumulation_steps * processes
    if not states:
        return wanted
    before = states[TRAINER]["step_rows"]
    if states[OPTIONS]["gradient_accumulation_steps"] != config.gradient_accumulation_steps:
        if wanted != before:
            log.warning(
                "A step now has %d packed sequences, not %d: gradient_accumulation_steps has changed",
                wanted, before,
            )  # fmt: skip
        return wanted
    if wanted != before:
        log.info(
            "A step keeps its %d packed sequences: up to %d for each of %d process(es)",
            before, -(-before // processes), processes,
        )  # fmt: skip
    return before


class RunState:
    """Weights, average and moments of a run.

    What does not train keeps the bytes of the checkpoint that the run began with (``source``), also where the
    model holds it in another dtype, and also the tensors of parts that were left out. Beside adapters nothing
    of it is written.
    """

    def __init__(self, engine: Engine, ema: EMA | None, origin: Source, resumed: bool, adapted: bool = False):
        """``resumed``: the weights came from elsewhere, so what is frozen now is compared with the source.
        ``adapted``: adapters train."""
        self.engine, self.ema, self.origin = engine, ema, origin
        self._told: set[str] = set()  # files of the source of which a warning has spoken
        self.adapted = adapted
        self._copied: list[str] = []  # from the source
        self._from_memory: set[str] = set()  # frozen, and no longer to be had from the source
        if adapted:  # the base is not written
            return
        source = origin.stored
        frozen = [shard for shard in engine.shards() if not shard.trains]
        looked_at = each("comparing frozen weights", frozen, "tensors") if resumed else frozen
        changed = [float(resumed and not _equal(shard, source.get(shard.name))) for shard in looked_at]
        changed = engine.sum(changed) if frozen and resumed else changed
        held = {shard.name for shard in engine.shards()}
        still = [shard for shard, n in zip(frozen, changed, strict=True) if n == 0]
        copied = {s.name for s in still if s.name in source and source[s.name].shape == s.shape}
        self._copied = [name for name in source if name in copied or name not in held]

    # ---- out

    def entries(self, weights_only: bool = False) -> list[StateEntry]:
        """This process's part of a checkpoint; ``weights_only`` for one that is not resumed from. All
        processes call it together."""
        self._look_at_source()
        found = self._copies()
        for shard in self.engine.shards():
            if not self._writes(shard):
                continue
            if shard.name in self._from_memory:
                found.append(self._frozen(shard))
                continue
            averaged = shard.trains and self.ema is not None
            value = self.ema.average(shard.name) if averaged and self.ema else shard.value
            group, name = (GROUP, disk_name(shard.name)) if self.adapted else ("ema", shard.name)
            shape = tuple(shard.shape)
            found.append(StateEntry(group, name, shape, value, shard.start))
            if not shard.trains or weights_only:
                continue
            if averaged:
                found.append(StateEntry("model", shard.name, shape, shard.value, shard.start))
            # a parameter that never had a gradient is named all the same: its absence would be noticed
            step, *moments = self.engine.moments(shard) or (0.0,)
            if shard.start == 0:
                found.append(StateEntry("optimizer", f"step.{shard.name}", (), torch.tensor(step)))
            own = self.engine.config.optimizer == "adamw8bit"
            for name, moment in zip(MOMENTS, moments, strict=False):
                key = f"{name}.{shard.name}"
                found.append(StateEntry("optimizer", key, shape, moment, shard.start, own=own))
        return found

    def _look_at_source(self) -> None:
        """Copies nothing more from files of the source that were rewritten in place; says what changed."""
        said = [self.origin.rewritten(), self.origin.moved()]
        everyone = [json.loads(text) for text in self.engine.gather(json.dumps(said))]
        rewritten, moved = ({name for part in everyone for name in part[i]} for i in (0, 1))
        fresh = sorted((rewritten | moved) - self._told)
        self._told |= rewritten | moved
        if rewritten:
            left = [name for name in self._copied if rewritten & self.origin.files_of(name)]
            self._copied = [name for name in self._copied if name not in left]
            held = {shard.name for shard in self.engine.shards()}
            self._from_memory |= held.intersection(left)
            if (lost := [name for name in left if name not in held]) and self.engine.main:
                log.warning(
                    "Checkpoints lack %d tensors from now on (%s): this run does not hold them, and their "
                    "file in %s was rewritten. Runs with the same parts left out can go on from such a one",
                    len(lost), few(lost, 3), self.origin.folder,
                )  # fmt: skip
        if fresh and self.engine.main:
            log.warning(
                "%s was removed, replaced or rewritten while the run goes on; %s. Fix: give a run a folder "
                "that nobody changes",
                ", ".join(str(self.origin.folder / name) for name in fresh),
                "its adapters belong to what was there before"
                if self.adapted
                else "checkpoints keep what the run began with",
            )

    def _frozen(self, shard: Shard) -> StateEntry:
        """What is frozen, as the model holds it; in the stored dtype where the model has only widened it."""
        dtype = min(shard.value.dtype, self.origin.stored[shard.name].dtype, key=lambda kind: kind.itemsize)
        stand_in = torch.empty(len(shard.value), dtype=dtype, device="meta")
        shape, value = tuple(shard.shape), shard.value
        return StateEntry("ema", shard.name, shape, stand_in, shard.start, lambda: value.to("cpu", dtype))

    def _writes(self, shard: Shard) -> bool:
        """Does this process write the shard?"""
        return shard.owned and shard.name not in self._copied and (shard.trains or not self.adapted)

    def _copies(self) -> list[StateEntry]:
        stored = [self.origin.stored[name] for name in self._copied]
        owners = share_out([entry.nbytes for entry in stored], self.engine.world)
        found = []
        for name, entry, owner in zip(self._copied, stored, owners, strict=True):
            if owner == self.engine.rank:
                stand_in = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                read = partial(self.origin.read, name)
                found.append(StateEntry("ema", name, entry.shape, stand_in, read=read))
        return found

    def nbytes(self, weights_only: bool = False) -> int:
        """Bytes of the next checkpoint, all processes together; moments count even before there are any."""
        total = sum(entry.nbytes for entry in self._copies())
        for shard in self.engine.shards():
            if self._writes(shard):
                own, averaged = shard.value.element_size(), shard.trains and self.ema is not None
                size = 4 if averaged else own
                if shard.trains and not weights_only:
                    size += 8 + (own if averaged else 0)
                total += shard.value.numel() * size
        return int(self.engine.sum([total])[0])

    # ---- back

    def restore(self, folder: Path) -> None:
        """Moments and average of a checkpoint (the weights are loaded with the model).

        Raises:
            CheckpointError: they do not fit this run; nothing has been changed then.
        """
        optimizer, averages = scan_group(folder, "optimizer"), scan_weights(folder)
        trained = [shard for shard in self.engine.shards() if shard.trains]
        steps = {s.name: optimizer[f"step.{s.name}"].read() for s in trained if f"step.{s.name}" in optimizer}
        expected: dict[str, tuple[int, ...]] = {}
        for shard in trained:
            expected[f"step.{shard.name}"] = ()
            if shard.name not in steps or steps[shard.name].numel() != 1 or float(steps[shard.name]) != 0:
                expected |= {f"{moment}.{shard.name}": tuple(shard.shape) for moment in MOMENTS}
        _check(folder, optimizer, expected)
        if self.ema is not None:
            if scan_group(folder, "model"):
                self.ema.load(lambda shard, out: averages[shard.name].read_into(out, shard.start))
            else:
                log.warning("%s has no average; it starts anew", folder)
        for shard in each("restoring the optimiser", trained, "tensors"):
            step = float(steps[shard.name])
            if step:
                moments = (_part(optimizer[f"{moment}.{shard.name}"], shard) for moment in MOMENTS)
                self.engine.set_moments(shard, step, *moments)
        self.engine.refresh()


def _part(entry: Stored, shard: Shard) -> Tensor:
    return entry.read(shard.start, shard.start + len(shard.value))


def _equal(shard: Shard, entry: Stored | None) -> bool:
    """Does the source, in the dtype the model holds, have the same values?"""
    if entry is None or entry.shape != tuple(shard.shape):
        return False
    return torch.equal(_part(entry, shard).to(shard.value.dtype), shard.value.cpu())


def _check(folder: Path, found: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if (found[name].shape, found[name].dtype) != (expected[name], torch.float32):
            has = f"{found[name].dtype} {list(found[name].shape)}"
            problems.append(f"{name} is {has} instead of {torch.float32} {list(expected[name])}")
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        if len(problems) > 8:
            shown = f"{shown}; and {len(problems) - 8} more"
        raise CheckpointError(
            f"{folder}: the optimiser's state does not fit this run: {shown}. Fix: resume with the options"
            " of the run that saved it (freezing, parts left out), or start a new run with another"
            f" --output_dir and {as_new_run(folder)}"
        )
