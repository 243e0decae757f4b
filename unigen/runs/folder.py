"""The folder of a run: one run at a time, and no run's files among another's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO

from unigen.config import Config, UserError
from unigen.files import Busy, hold, json_of
from unigen.runs import layout
from unigen.runs.checkpoint import list_folder, steps, sweep_orphans
from unigen.runs.secrets import redacted

log = logging.getLogger("unigen")


def prepare_folder(folder: Path, config: Config) -> IO[str]:
    """Makes the folder of a run, takes its lock (see :func:`lock_folder`), cleans up after killed runs, sets
    an earlier run aside where this one begins anew, and writes the options down.

    Raises:
        UserError: it cannot be written, it is a model, another run is in it, or this run begins with weights
            of the one that it would set aside.
    """
    if (folder / "llm_config.json").exists():
        raise UserError(
            f"output_dir {folder} is the folder of a model, whose config.json would be replaced. Fix: choose"
            " another one"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        sweep_orphans(folder)
        resume = config.resume_from_checkpoint
        if not config.dry_run and (not resume or (resume == "auto" and not steps(folder))):
            set_aside(folder, Path(config.model_path or ""))
        written = folder / layout.CONFIG
        if not (config.dry_run and written.exists()):  # the options of a run stay those of the run
            options = json_of(redacted(config.to_dict()), indent=2)
            written.write_text(options + "\n", encoding="utf-8")
        return lock
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written ({error}). Fix: choose another --output_dir"
        ) from error


def lock_folder(folder: Path) -> IO[str]:
    """Holds the folder of a run until the file returned is closed or the process ends, in whatever way.

    Raises:
        UserError: another process holds it; says which.
    """
    try:
        return hold(folder / layout.LOCK)
    except Busy as busy:
        raise UserError(
            f"output_dir {folder} is in use by {str(busy) or 'another process'}: two runs in one folder would"
            " overwrite each other. Fix: wait for its end or stop it, or choose another --output_dir"
        ) from None


def set_aside(folder: Path, model: Path) -> None:
    """Moves an earlier run, whole, to the first free ``old-N`` below: among its checkpoints a new run's would
    be pruned first, and ``auto`` would resume the wrong one. It can be watched and resumed there.

    Args:
        folder: of the run; its lock is held.
        model: the weights that the new run begins with.

    Raises:
        UserError: ``model`` is one of its checkpoints.
        OSError: the folder cannot be written.
    """
    checkpoints, staged = steps(folder), folder / layout.SETTING_ASIDE
    if not (checkpoints or (folder / layout.METRICS).exists() or staged.exists()):
        _tell_of_earlier(folder)
        return
    if any(
        path.resolve() in (model.resolve(), *model.resolve().parents)
        for path in [*checkpoints, folder / layout.BEST]
    ):
        raise UserError(
            f"output_dir {folder} holds the run whose weights this one begins with ({model}). Fix: choose"
            " another --output_dir, or go on with that run by --resume_from_checkpoint auto"
        )
    aside = next(path for n in range(1, 10**6) if not (path := folder / layout.earlier_name(n)).exists())
    staged.mkdir(exist_ok=True)  # one that was killed here goes on
    for path in [*(folder / name for name in (*layout.FILES, *layout.FOLDERS)), *checkpoints]:
        entries = list_folder(path) if path.name == layout.SAMPLES else []
        ours = all(layout.is_samples(entry.name) for entry in entries)
        if path.exists() and ours:
            path.rename(staged / path.name)
    staged.rename(aside)
    to_step = f" (to step {layout.step_of(checkpoints[0].name)})" if checkpoints else ""
    go_on = f", and goes on from there with --output_dir {aside} --resume_from_checkpoint auto"
    log.warning(
        "%s held an earlier run%s; it is now in %s%s", folder, to_step, aside, go_on if checkpoints else ""
    )


def _tell_of_earlier(folder: Path) -> None:
    """Who started anew by mistake, and now wants to go on, must not start anew again without knowing."""
    earlier = [path for path in list_folder(folder) if layout.is_earlier(path.name)]
    if found := [newest for path in earlier for newest in steps(path)[:1]]:
        newest = max(found, key=lambda checkpoint: checkpoint.stat().st_mtime)
        step = layout.step_of(newest.name)
        log.warning("This run starts anew; an earlier one is in %s (to step %d)", newest.parent, step)
