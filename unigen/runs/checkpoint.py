"""Checkpoints: a folder ``step_N/`` that is either whole or not there.

    step_N/
      ema.safetensors        the model in the published layout: the average, or the weights where there is
                             none
      adapter_model.safetensors  in its place where adapters train, beside adapter_config.json
      model.safetensors      with an average: the weights of what trains (the rest stands in ema)
      optimizer.safetensors  AdamW's moments and step counts: exp_avg.NAME, exp_avg_sq.NAME, step.NAME
      <state>.json           everything else: state of the data loader, guards, options
      ...                    configs, tokenizer, VAE
      manifest.json          format, step, who wrote it, size and SHA-256 of every file above, and of itself

Several processes each write a file of a group, ``ema-00001-of-00002.safetensors``, and
``ema.safetensors.index.json`` says what lies where (see ``model/storage.py``). All of it is staged in
``.step_N.partial-PID`` beside its place, brought to the disk file by file, the manifest last, and published
by one rename (``saver.py`` does that). Nothing is ever pickled. safetensors has no checksum of its own, so
the manifest brings it; here it is read, checked, and old ones are removed. None of that needs PyTorch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from unigen.bars import Bar
from unigen.config import UserError
from unigen.files import draft_of, leftover, remove, sha256_of
from unigen.foreign import ForeignFileError, open_file, read_json, require, roots_of
from unigen.messages import listed
from unigen.model.adapters import GROUP, own_name
from unigen.model.mistakes import as_new_run
from unigen.model.storage import Stored, is_of_set, scan_set, set_files
from unigen.printing import typed
from unigen.runs.layout import FILES, MANIFEST, TRAINER, is_checkpoint, state_file, step_of
from unigen.runs.states import GROUPS, STATES, outside
from unigen.runs.states import MANIFEST as MANIFEST_RULE
from unigen.schema import Rule, short

log = logging.getLogger(__name__)

FORMAT = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or cannot be trusted; the message names the file, what is wrong,
    and the fix.

    Attributes:
        problem: what is wrong alone, for a list below the checkpoint's name.
    """

    def __init__(self, message: str, problem: str = ""):
        super().__init__(message)
        self.problem = problem or message


def _unusable(folder: Path, problem: str, fix: str = "use another checkpoint") -> CheckpointError:
    return CheckpointError(f"{folder}: {problem}. Fix: {fix}", problem)


# ---- reading


def scan_group(folder: Path, group: str) -> dict[str, Stored]:
    """Where the tensors of a group lie; empty where the checkpoint has no such group.

    Raises:
        CheckpointFolderError: a file of it is missing or damaged.
    """
    return scan_set(folder, f"{group}.safetensors") or {}


def scan_weights(folder: Path, raw: bool = False) -> dict[str, Stored]:
    """Where the model's tensors lie: the average's, or with ``raw`` those that train. Of a run that trained
    adapters it is theirs alone."""
    adapters = {own_name(key): entry for key, entry in scan_group(folder, GROUP).items()}
    return scan_group(folder, "ema") | adapters | (scan_group(folder, "model") if raw else {})


def read_states(folder: Path, schemas: Mapping[str, Rule] | None = None) -> dict[str, Any]:
    """The JSON states by name.

    Raises:
        CheckpointError: the manifest or one of them cannot be read, breaks its schema (state -> rule), or is
            of another step than the manifest says; with file and key.
    """
    manifest, states = read_manifest(folder), {}
    for name in manifest["states"]:
        file = state_file(name)
        try:
            rule = (schemas or {}).get(name)
            states[name] = read_json(folder / file, roots_of(folder), rule, finite=False)
        except ForeignFileError as error:
            raise _unusable(folder, f"{file}: {error.problem}") from error
    trainer = states.get(TRAINER)
    if isinstance(trainer, dict) and trainer.get("step", manifest["step"]) != manifest["step"]:
        problem = f"{state_file(TRAINER)}: step is {trainer['step']}, {MANIFEST} says {manifest['step']}"
        raise _unusable(folder, problem)
    return states


def verify_checkpoint(
    folder: Path,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[str], list[str]] = lambda text: [text],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Reads every byte of a checkpoint and compares it with the manifest. Files that the manifest does not
    name are fine.

    Args:
        share: (rank, processes): each reads some of the files.
        gather: gives the texts of all processes to each.
        tick: called now and then, from any thread.

    Raises:
        CheckpointError: naming every file that is missing, cut short or changed; on all processes.
    """
    manifest, found = "", []
    try:
        found = changed_files(folder, share=share, tick=tick)
    except CheckpointError as error:
        manifest = str(error)
    said = [json.loads(text) for text in gather(json.dumps([manifest, found]))]
    if manifest := next((unread for unread, _ in said if unread), ""):
        raise CheckpointError(manifest)
    if problems := dict.fromkeys(problem for _, found in said for problem in found):
        fix = "use another checkpoint, or a backup of this one"
        raise _unusable(folder, f"damaged checkpoint: {'; '.join(problems)}", fix)


def changed_files(
    folder: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    share: tuple[int, int] = (0, 1),
    threads: int = 4,
    tick: Callable[[], None] = lambda: None,
) -> list[str]:
    """What is wrong with the bytes of a checkpoint's files; arguments as of :func:`verify_checkpoint`.

    Args:
        wanted: which of the files to read, by the name that the manifest has for them.
        threads: that read.
        tick: called with every ``files.CHUNK`` read, from any thread.

    Raises:
        CheckpointError: its manifest is missing or damaged.
    """
    entries = read_manifest(folder)["files"]
    strays = [n for group in GROUPS for n in set_files(group) if n not in entries and (folder / n).exists()]
    files = sorted(entries.items(), key=lambda item: -item[1]["size"])[share[0] :: share[1]]
    files = [(name, entry) for name, entry in files if wanted(name)]
    total = sum(entry["size"] for _, entry in files)
    with (
        ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool,  # hashing needs no interpreter lock
        Bar(f"verifying {folder.name}", total, "B") as shown,
    ):

        def read(count: int) -> None:
            shown.update(count)
            tick()

        problems = list(pool.map(lambda item: _problem(folder, *item, read), files))
    problems = list(filter(None, problems))
    return [f"{name} is none of its files, yet would be read in place of them" for name in strays] + problems


def _problem(folder: Path, name: str, entry: dict[str, Any], tick: Callable[[int], None]) -> str:
    if wrong := wrong_size(folder / name, name, entry["size"]):
        return wrong
    try:
        with open_file(folder / name, roots_of(folder)) as file:
            if sha256_of(file, tick) != entry["sha256"]:
                return f"{name} has changed since it was written (SHA-256 differs)"
    except ForeignFileError as error:
        return f"{name}: {error.problem}"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return ""


def wrong_size(path: Path, name: str, size: int) -> str:
    """Why a file of a checkpoint is not ``size`` bytes; "" where it is."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return "" if found == size else f"{name} has {found} bytes instead of {size}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash.

    Raises:
        CheckpointError: no folder, no manifest, a damaged one, or one of another format.
    """
    path = Path(folder) / MANIFEST
    named = "name a step_N folder of a run, or auto, which takes the newest"
    if not path.parent.is_dir():
        raise _unusable(folder, "there is no such folder", named)
    try:
        manifest = read_json(path, roots_of(path.parent))
    except ForeignFileError as error:
        if error.code == "missing":
            raise _unusable(folder, f"{MANIFEST} is missing: no whole checkpoint", named) from None
        raise _unusable(folder, f"{MANIFEST} cannot be read: {error.problem}") from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_hash(manifest):
        raise _unusable(folder, f"{MANIFEST} has changed since it was written (SHA-256 differs)")
    found = manifest.get("format")
    if found != FORMAT:
        older = type(found) is int and found < FORMAT
        fix = f"start a new run with {as_new_run(folder)}" if older else "update unigen"
        raise _unusable(folder, f"{MANIFEST} has format {short(found)}, this version reads {FORMAT}", fix)
    for key in ("files", "groups", "states"):
        names = manifest.get(key)
        for name in names if isinstance(names, (dict, list)) else ():
            if isinstance(name, str) and (said := outside(name)):
                raise _unusable(folder, f"{MANIFEST} {said}", "do not use this checkpoint")
    try:
        require(manifest, MANIFEST_RULE, MANIFEST)
    except ForeignFileError as error:
        raise _unusable(folder, f"{MANIFEST}: {error.problem}") from None
    files = manifest["files"]
    promised = [("groups", group, set_files(group)) for group in manifest["groups"]]
    promised += [("states", state, (state_file(state),)) for state in manifest["states"]]
    for key, name, wanted in promised:
        if not any(file in files for file in wanted):
            problem = f"{MANIFEST}: {key} names {short(name)}, but files lacks {listed(wanted, 'or')}"
            raise _unusable(folder, problem)
    for name in files:
        held = [("groups", group) for group in GROUPS if is_of_set(name, group)]
        held += [("states", state) for state in STATES if name == state_file(state)]
        for key, part in held:
            if part not in manifest[key]:
                raise _unusable(folder, f"{MANIFEST}: files names {short(name)}, but {key} lacks {part!r}")
    return manifest


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own entry for it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- which one


Verify = Callable[[Path], None]


def latest_checkpoint(output_dir: Path, verify: Verify = verify_checkpoint) -> Path | None:
    """The newest ``step_N`` of a run that verifies, or None. A damaged newer one is passed over with a
    warning; so is one that was written while steps had to be skipped, where there is one from before that."""
    newest = None
    doubted: list[tuple[int, float]] = []  # steps after this one, written before this time
    for folder in _good_checkpoints(Path(output_dir), verify, warn=True):
        mark = _mark(folder)
        if any(_number(folder) > step and mark["time"] < time for step, time in doubted):
            continue
        if not mark.get("diverging"):
            return folder
        newest = newest or folder
        good = step_of(mark["last_good"])
        doubted += [(good, mark["time"])] if good is not None else []
        log.warning(
            "Passing over %s: %s of the last %s steps before it had to be skipped. It can be named itself: "
            "--resume_from_checkpoint %s", folder, *mark["skipped_steps"], typed(folder),
        )  # fmt: skip
    return newest


def _mark(folder: Path) -> dict[str, Any]:
    """The manifest, with what it says of skipped steps; empty where it cannot be read."""
    with contextlib.suppress(CheckpointError):
        return read_manifest(folder)
    return {}


def resolve_resume(
    value: str | Path | None, output_dir: Path, verify: Verify = verify_checkpoint
) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` asks for, verified; None for a fresh start (also for
    ``auto`` where there is nothing yet).

    Args:
        value: A checkpoint folder; ``auto`` for the newest good one in ``output_dir``; None for a fresh
            start.
        verify: Checks one; with several processes a call that all of them make together.

    Raises:
        CheckpointError: a named folder does not exist or is damaged; the good ones beside it are listed. Or
            ``auto`` finds checkpoints of which none is good: starting from zero would then silently lose a
            run.
    """
    if value is None:
        return None
    output_dir = Path(output_dir)
    if str(value) == "auto":
        found = latest_checkpoint(output_dir, verify)
        if found is None and (damaged := steps(output_dir)):
            problem = f"every checkpoint is damaged ({', '.join(p.name for p in damaged)})"
            fix = "restore one from a backup, or start afresh in another --output_dir"
            raise _unusable(output_dir, problem, fix)
        return found
    folder = Path(value)
    try:
        verify(folder)
    except CheckpointError as error:
        good: dict[Path, None] = {}
        for place in (folder, folder.parent, output_dir):
            with contextlib.suppress(CheckpointError):
                good |= dict.fromkeys(islice(_good_checkpoints(place, verify), 3))
        choice = f"good ones nearby: {', '.join(map(str, good))}" if good else "there is no good one nearby"
        raise CheckpointError(f"{error} (--resume_from_checkpoint {typed(value)}); {choice}") from error
    step = read_manifest(folder)["step"]
    others = [p for p in steps(output_dir) if p.resolve() != folder.resolve()]
    if newer := ", ".join(p.name for p in others if _number(p) > step):
        log.warning(
            "Resuming from %s, but %s also holds the newer %s, which `auto` would choose.",
            folder, output_dir, newer,
        )  # fmt: skip
    return folder


def _number(folder: Path) -> int:
    return step_of(folder.name) or 0


def steps(output_dir: Path) -> list[Path]:
    """Every ``step_N`` folder, whole or not, newest first.

    Raises:
        CheckpointError: the folder cannot be listed, so that nobody can say what is in it.
    """
    found = [p for p in list_folder(output_dir) if step_of(p.name) is not None and p.is_dir()]
    return sorted(found, key=_number, reverse=True)


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds; nothing where there is none. (``glob`` takes a folder that it may not list for an
    empty one.)

    Raises:
        CheckpointError: it cannot be listed.
    """
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be listed ({error}). Fix: allow reading it, or name another folder"
        ) from error


def _good_checkpoints(output_dir: Path, verify: Verify, warn: bool = False) -> Iterator[Path]:
    """The ``step_N`` folders that verify, newest first, read only as far as the caller asks."""
    for folder in steps(output_dir):
        try:
            verify(folder)
        except CheckpointError as error:
            if warn:
                log.warning("Passing over a checkpoint that cannot be used. %s", error)
        else:
            yield folder


# ---- removing


def prune_checkpoints(
    output_dir: Path,
    keep: int | None,
    protect: Path | None = None,
    source: Path | None = None,
    good: str = "",
) -> None:
    """Removes the oldest ``step_N`` folders beyond ``keep`` (at least 1; None keeps all); never ``best``, nor
    a folder without a manifest.

    Args:
        protect: One more that stays: the one just written, which is not the newest number after resuming from
            an older step.
        source: Another: the folder the run copies from.
        good: The name of another: the newest after which steps could be taken.
    """
    if keep is None:
        return
    assert keep >= 1
    held = [folder for folder in steps(Path(output_dir)) if (folder / MANIFEST).is_file()]
    diverging = {folder for folder in held if _mark(folder).get("diverging")}
    if protect in diverging and (last := step_of(good)) is not None:
        diverging |= {folder for folder in held if _number(folder) > last}  # nobody knows since when
    held.sort(key=diverging.__contains__)  # those go first
    for folder in held[keep:]:
        if source is not None and folder.resolve() == Path(source).resolve():
            continue
        if folder.name not in (good, protect and Path(protect).name):
            try:
                remove_checkpoint(folder)
            except OSError as error:
                log.warning("Cannot remove the old checkpoint %s: %s", folder, error)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; renamed first, so that what is half removed no longer looks like one."""
    doomed = draft_of(folder)
    remove(doomed)
    folder.rename(doomed)
    remove(doomed)


def sweep_orphans(output_dir: Path) -> None:
    """Cleans up after killed runs; to be called by the process that holds the folder's lock, before it reads
    or writes checkpoints.

    What was left half written is removed. A checkpoint that was set aside to be replaced, and whose successor
    never came, gets its name back.
    """
    for path in list_folder(Path(output_dir)):
        name, role = leftover(path.name) or ("", "")
        if not (is_checkpoint(name) or name in FILES):
            continue
        try:
            final = path.with_name(name)
            if role == "old" and not final.exists():
                path.rename(final)
            else:
                remove(path)
        except OSError as error:
            log.warning("Cannot clean up %s: %s", path, error)
