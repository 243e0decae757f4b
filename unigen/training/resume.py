"""How a run goes on from a checkpoint: where its weights and its source are, and what it takes over."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unigen import plugins
from unigen.bars import each
from unigen.config import Config, ConfigError, UserError
from unigen.messages import listed
from unigen.model.adapters import read_adapter
from unigen.model.bagel import Bagel
from unigen.model.lora import base_digest, check_fits
from unigen.model.mistakes import as_new_run, is_adapter_folder, merge_command
from unigen.model.source import Source
from unigen.model.storage import CheckpointFolderError, Stored
from unigen.printing import typed
from unigen.runs import layout
from unigen.runs.checkpoint import CheckpointError, read_states, resolve_resume, scan_weights
from unigen.runs.states import STATES
from unigen.training.changes import changes, tell_changes
from unigen.training.engine import Engine
from unigen.training.precision import stored_precision
from unigen.training.run import Run

log = logging.getLogger("unigen")


def to_resume(config: Config, verify: Callable[[Path], None]) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its states; None and {} for a fresh start.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds weights only.
        ConfigError: its run had a plugin that this one lacks.
    """
    if not config.resume_from_checkpoint:
        return None, {}
    folder = resolve_resume(config.resume_from_checkpoint, Path(config.output_dir), verify)
    states = read_states(folder, STATES) if folder else {}
    if folder and layout.TRAINER not in states:
        raise CheckpointError(
            f"{folder} holds weights only, so a run cannot go on from it. Fix: resume from a step_N"
            f" folder, or start a new run with another --output_dir and {as_new_run(folder)}"
        )
    trained_with = states[layout.OPTIONS].get("plugin") or [] if folder else []
    if missing := plugins.lacking(trained_with, config.plugin):
        raise ConfigError(
            f"plugin: the run of {folder} was trained with {listed(missing)}, which this one does not"
            f" name. Fix: --plugin {' '.join(map(typed, [*config.plugin, *missing]))}"
        )
    return folder, states


def open_source(folder: Path, resume: Path | None) -> Source:
    """The folder of ``model_path``; where that is gone, the checkpoint that a run goes on from."""
    if is_adapter_folder(folder):
        raise CheckpointFolderError(
            f"{folder} holds an adapter, no model. Fix: go on with its run by --resume_from_checkpoint, or"
            f" merge it first ({merge_command(folder)})"
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


def begun_with(config: Config, source: Source, states: dict[str, Any]) -> tuple[str | None, bool | None]:
    """The digest of the weights that the run began with (None where its checkpoint does not say it), and
    whether those of ``model_path`` are the same; None where that cannot be told."""
    if not states:
        return base_digest(source.stored), True
    before = states[layout.TRAINER].get("base")
    if before is None or source.folder != Path(config.model_path or ""):
        return before, None
    return before, before == base_digest(source.stored)


def has_left_out(source: Source, resume: Path, model: Bagel, engine: Engine) -> bool:
    """Do the parts of a checkpoint that the model leaves out have their bytes in the source, too? (What the
    model holds is compared by :class:`RunState`.)"""
    held = dict(model.named_parameters())
    left = [(name, entry) for name, entry in scan_weights(resume).items() if name not in held]
    changed = 0
    for name, entry in each("comparing parts left out", left[engine.rank :: engine.world], "tensors"):
        engine.tick()
        same = source.stored.get(name)
        changed += same is None or not same.equals(entry)
    if (changed := int(engine.sum([changed])[0])) and engine.main:
        log.warning(
            "%s is not what this run began with (%d tensors differ); what the run leaves out comes from %s",
            source.folder, changed, resume,
        )  # fmt: skip
    return not changed


def weights_of(config: Config, source: Source, resume: Path | None) -> tuple[Path, dict[str, Stored] | None]:
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
            f"{resume} holds no adapter, so a run with lora_rank cannot go on from it. Fix: leave"
            f" --lora_rank out, or start a new run with --model_path {typed(resume)}"
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


def restore(run: Run, folder: Path, states: dict[str, Any], same_base: bool | None) -> None:
    """Brings a built run to where a checkpoint left off; ``same_base``: that of :func:`begun_with`."""
    state = states[layout.TRAINER]
    mixture = run.stream.mixture
    if state["fingerprint"] not in (mixture.fingerprint, mixture.named_fingerprint):
        raise UserError(
            f"{folder}: the training data is not what this run began with (its fingerprint differs)."
            " Fix: resume with the same files (of any name, in one order) and weights, or start a new run"
            f" with another --output_dir and {as_new_run(folder)}"
        )
    total = len(mixture)
    if max([state["position"], *(place + 1 for place in state["waiting"])]) > total:
        raise CheckpointError(
            f"{folder}: {layout.state_file(layout.TRAINER)}: position or waiting lie behind the {total:,}"
            " records of an epoch. Fix: use another checkpoint"
        )
    run.state.restore(folder)
    if stored_precision(states[layout.OPTIONS]) == run.engine.precision.name:
        run.engine.scale.load(state["scale"])
    run.position.load(state)
    same = {"model_path": same_base}
    if run.evaluation is not None:
        evaluated = state.get("evaluation", {})
        same["val_data_path"] = run.evaluation.same_data(evaluated)
        if not run.evaluation.load(evaluated, folder):
            run.position.best = math.inf
    if folder.resolve().parent == run.output_dir.resolve():
        run.guard.good = run.saver.good = folder.name
    log.info("Resumed from %s at step %d", folder, run.position.step)
    totals = state.get("total_steps"), run.total_steps
    compared = folder, states[layout.OPTIONS], run.config, run.position.step
    lines = changes(*compared, totals, same)  # what is refused is refused by all
    if run.engine.main:
        tell_changes(lines, *compared)
