"""The folder of a run: one run at a time, and no run's files among another's."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import IO

from unigen.config import Config, UserError
from unigen.files import Busy, atomic, hold, is_held, json_of, make_folders, remove, unmake
from unigen.foreign import ForeignFileError, open_file, read_json
from unigen.outputs import output_folder, unwritten
from unigen.printing import typed
from unigen.runs import layout
from unigen.runs.checkpoint import list_folder, steps, sweep_orphans
from unigen.runs.secrets import redacted

log = logging.getLogger("unigen")

MAX_OPTIONS = 16 << 20  # bytes; a larger file holds no options


class FolderClaim:
    """The folder of a run while this process holds it. Nothing in it moves before :meth:`begin`; where that
    is never called, :meth:`close` leaves the folder as it was, also if it was not there.

    A dry run asks for the lock and does not take it.

    Raises:
        UserError: the folder cannot be written, is a model or an input, holds what no run left there, or
            another run is in it; this run begins with weights of the one that it would set aside; or ``auto``
            finds nothing to go on from while an earlier run was set aside.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = Path(folder), config
        self._held = self._begun = self._new_lock = False
        self._made: list[Path] = []
        self._lock: IO[str] | None = None
        _refuse_foreign(self.folder, config)
        try:
            with unwritten("output_dir", folder):
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        c, folder, lock = self.config, self.folder, self.folder / layout.LOCK
        missing = not lock.exists()
        self._made = make_folders(folder.absolute())
        if not c.dry_run:
            self._lock, self._new_lock = lock_folder(folder), missing
        elif is_held(lock):
            raise _in_use(folder, lock.read_text("utf-8", "replace").strip())
        self._held = True
        if c.resume_from_checkpoint and not c.dry_run:
            sweep_orphans(folder)
            if (folder / layout.SETTING_ASIDE).exists():  # a kill came while it was done
                set_aside(folder)
        if c.resume_from_checkpoint == "auto":
            _refuse_to_start_over(folder)
        if not c.dry_run and self._starts_anew():
            _refuse_own_weights(folder, Path(c.model_path or ""))

    def _starts_anew(self) -> bool:
        resume = self.config.resume_from_checkpoint
        return not resume or (resume == "auto" and not steps(self.folder))

    def begin(self) -> None:
        """Takes the folder over, now that the run is known to work: sets an earlier run aside where this one
        begins anew, brings the heartbeats to their place, and writes the options down.

        Raises:
            UserError: it cannot be written.
        """
        folder = self.folder
        assert self._lock is not None, "a dry run begins nothing"
        with unwritten("output_dir", folder):
            sweep_orphans(folder)
            if self._starts_anew():
                set_aside(folder)
            _take_heartbeats(folder)
            options = json_of(redacted(self.config.to_dict()), indent=2)
            with atomic(folder / layout.CONFIG) as file:
                file.write(options.encode("utf-8", "surrogatepass") + b"\n")
        self._begun = True

    def close(self) -> None:
        """Lets go of the folder."""
        if self._held:
            with suppress(OSError):
                remove(self.folder / layout.STARTING)
        if not self._begun:
            if self._new_lock:
                with suppress(OSError):
                    (self.folder / layout.LOCK).unlink()
            unmake(self._made)
        self._held = False
        if self._lock is not None:
            self._lock.close()


def _take_heartbeats(folder: Path) -> None:
    """Moves the heartbeats of the start to those of the run, in place of an earlier run's."""
    new, ranks = folder / layout.STARTING_RANKS, folder / layout.RANKS
    if not new.is_dir():
        return
    ranks.mkdir(exist_ok=True)
    for path in list_folder(ranks):
        if layout.is_of_ranks(path.name):
            path.unlink()
    for path in list_folder(new):
        with suppress(FileNotFoundError):  # a draft of one, whose process has just renamed it
            path.replace(ranks / path.name)
    with suppress(OSError):  # another process may just be writing there
        remove(folder / layout.STARTING)


def _refuse_foreign(folder: Path, config: Config) -> None:
    """Raises UserError for a folder that no run may be in."""
    if (folder / "llm_config.json").exists():
        raise UserError(
            f"output_dir {folder} is the folder of a model, whose config.json would be replaced. Fix: choose"
            " another one"
        )
    c = config
    data = [path for source in c.sources() for path in _listed(source.path)] + _listed(c.val_data_path)
    output_folder("output_dir", folder, [c.model_path, c.cache_dir, c.deepspeed_config, *data])
    if name := _foreign(folder):
        raise UserError(
            f"output_dir {folder} holds {name}, which a run writes and no run of unigen left there. Fix:"
            " choose another --output_dir, or move that away"
        )


def _listed(paths: str | list[str] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else paths or []


def _foreign(folder: Path) -> str:
    """A name in a folder that a run takes and that no run left there; empty where there is none. The marks of
    a run's folder are its options and its checkpoints."""
    if any(_is_options(place / layout.CONFIG) for place in (folder, folder / layout.SETTING_ASIDE)):
        return ""
    if any((path / layout.MANIFEST).is_file() for path in steps(folder)):
        return ""
    for path in list_folder(folder):
        name = path.name
        if not path.is_dir():
            empty = not path.exists() or path.stat().st_size == 0
            taken = name in (*layout.FILES, *layout.FOLDERS, layout.RANKS) or layout.is_checkpoint(name)
            if name == layout.LOCK:
                taken = not _start(path).startswith(b"process ")
        else:
            empty = not any(path.iterdir())
            taken = name in (*layout.FILES, layout.TENSORBOARD, layout.WANDB)
            if name == layout.SAMPLES:
                taken = any(layout.is_samples(entry.name) for entry in path.iterdir())
            if layout.is_checkpoint(name):
                taken = not (path / layout.MANIFEST).is_file()
        if taken and not empty:
            return name
    return ""


def _start(path: Path) -> bytes:
    try:
        with open_file(path, [path.parent]) as file:
            return file.read(100)
    except ForeignFileError:
        return b""


def _is_options(path: Path) -> bool:
    """Is it the file in which a run wrote its options down?"""
    try:
        found = read_json(path, [path.parent], limit=MAX_OPTIONS, finite=False)
    except ForeignFileError:
        return False
    return isinstance(found, dict) and {"model_path", "train_data_path", "output_dir"} <= found.keys()


def _refuse_to_start_over(folder: Path) -> None:
    """Raises UserError where ``auto`` would start from zero beside checkpoints of an earlier run."""
    if not steps(folder) and (newest := _newest_of_earlier(folder)):
        earlier, step = newest.parent, layout.step_of(newest.name)
        raise UserError(
            f"resume_from_checkpoint is auto, and {folder} holds no checkpoint, but {earlier} those of an"
            f" earlier run (to step {step}). Fix: go on with that one by --output_dir {typed(earlier)}"
            " --resume_from_checkpoint auto, or begin anew by leaving --resume_from_checkpoint out"
        )


def _refuse_own_weights(folder: Path, model: Path) -> None:
    """Raises UserError where ``model`` is a checkpoint of the run that is to be set aside."""
    checkpoints = [*steps(folder), folder / layout.BEST] if _is_earlier_run(folder) else []
    if any(path.resolve() in (model.resolve(), *model.resolve().parents) for path in checkpoints):
        raise UserError(
            f"output_dir {folder} holds the run whose weights this one begins with ({model}). Fix: choose"
            " another --output_dir, or go on with that run by --resume_from_checkpoint auto"
        )


def _is_earlier_run(folder: Path) -> bool:
    names = (layout.METRICS, layout.SETTING_ASIDE)
    return bool(steps(folder)) or any((folder / name).exists() for name in names)


def lock_folder(folder: Path) -> IO[str]:
    """Holds the folder of a run until the file returned is closed or the process ends, in whatever way.

    Raises:
        UserError: another process holds it; says which.
    """
    try:
        return hold(folder / layout.LOCK)
    except Busy as busy:
        raise _in_use(folder, str(busy)) from None


def _in_use(folder: Path, owner: str) -> UserError:
    return UserError(
        f"output_dir {folder} is in use by {owner or 'another process'}: two runs in one folder would"
        " overwrite each other. Fix: wait for its end or stop it, or choose another --output_dir"
    )


def set_aside(folder: Path) -> None:
    """Moves an earlier run, whole, to the first free ``old-N`` below: among its checkpoints a new run's would
    be pruned first, and ``auto`` would resume the wrong one. It can be watched and resumed there. The
    folder's lock is held. Raises OSError where it cannot be written."""
    checkpoints, staged = steps(folder), folder / layout.SETTING_ASIDE
    if not _is_earlier_run(folder):
        # who started anew by mistake, and now wants to go on, must not start anew again without knowing
        if newest := _newest_of_earlier(folder):
            step = layout.step_of(newest.name)
            log.warning("This run starts anew; an earlier one is in %s (to step %d)", newest.parent, step)
        return
    aside = next(path for n in range(1, 10**6) if not (path := folder / layout.earlier_name(n)).exists())
    staged.mkdir(exist_ok=True)  # one that was killed here goes on
    for path in [*(folder / name for name in (*layout.FILES, *layout.FOLDERS)), *checkpoints]:
        entries = list_folder(path) if path.name == layout.SAMPLES else []
        ours = all(layout.is_samples(entry.name) for entry in entries)
        if path.exists() and ours:
            path.rename(staged / path.name)
    staged.rename(aside)
    to_step = f" (to step {layout.step_of(checkpoints[0].name)})" if checkpoints else ""
    log.warning("%s held an earlier run%s; it is now in %s", folder, to_step, aside)
    if checkpoints:
        log.warning("It goes on from there with --output_dir %s --resume_from_checkpoint auto", typed(aside))


def _newest_of_earlier(folder: Path) -> Path | None:
    """The checkpoint of the runs that were set aside that was written last."""
    earlier = [path for path in list_folder(folder) if layout.is_earlier(path.name)]
    found = [newest for path in earlier for newest in steps(path)[:1]]
    return max(found, key=lambda checkpoint: checkpoint.stat().st_mtime, default=None)
