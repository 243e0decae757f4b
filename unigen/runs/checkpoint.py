"""Checkpoints: a folder ``step_N/`` that is either whole or not there.

    step_N/
      ema.safetensors        the model in the published layout: the average, or the weights where there is
      none
      model.safetensors      with an average: the weights of what trains (the rest stands in ema)
      optimizer.safetensors  AdamW's moments and step counts: exp_avg.NAME, exp_avg_sq.NAME, step.NAME
      <state>.json           everything else: place in the data, guards, options
      ...                    configs, tokenizer, VAE
      manifest.json          format, step, who wrote it, size and SHA-256 of every file above, and of itself

Several processes each write a file of a group, ``ema-00001-of-00002.safetensors``, and
``ema.safetensors.index.json`` says what lies where (see ``model/storage.py``). All of it is staged in
``.step_N.partial-<pid>`` beside its place, brought to the disk file by file, the manifest last, and published
by one rename (``saver.py`` does that). Nothing is ever pickled. safetensors has no checksum of its own, so
the manifest brings it; here it is read, checked, and old ones are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from unigen.config import UserError
from unigen.files import remove, sha256_of
from unigen.model.storage import Stored, scan_set

log = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
GROUPS = ("ema", "model", "optimizer")
_STEP = re.compile(r"step_(\d+)")
_ORPHAN = re.compile(r"\.(?P<name>\w+)\.(?P<role>partial|old)-(?P<pid>\d+)")


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or cannot be trusted; the message names the file, what is wrong,
    and the fix."""


# ---- reading


def scan_group(folder: Path, group: str) -> dict[str, Stored]:
    """Where the tensors of a group lie; empty where the checkpoint has no such group.

    Raises:
        CheckpointFolderError: a file of it is missing or damaged.
    """
    return scan_set(folder, f"{group}.safetensors") or {}


def scan_weights(folder: Path, raw: bool = False) -> dict[str, Stored]:
    """Where the model's tensors lie: the average's, or with ``raw`` those that train."""
    return scan_group(folder, "ema") | (scan_group(folder, "model") if raw else {})


def read_states(folder: Path) -> dict[str, Any]:
    """The JSON states by name.

    Raises:
        CheckpointError: the manifest or one of them cannot be read.
    """
    states = {}
    for name in read_manifest(folder)["states"]:
        try:
            states[name] = json.loads((folder / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: {name}.json cannot be read: {error}. Fix: use another checkpoint"
            ) from error
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
        folder: of the checkpoint.
        share: (rank, processes): each reads some of the files.
        gather: gives the texts of all processes to each.
        tick: called now and then, from any thread.

    Raises:
        CheckpointError: naming every file that is missing, cut short or changed; on all processes.
    """
    folder = Path(folder)
    problems: list[str] = []
    try:
        entries = read_manifest(folder)["files"]
    except CheckpointError as error:
        problems.append(str(error))
    else:
        ours = [f"{group}.safetensors{end}" for group in GROUPS for end in ("", ".index.json")]
        strays = [name for name in ours if name not in entries and (folder / name).exists()]
        problems += [f"{name} is none of its files, yet would be read in place of them" for name in strays]
        files = sorted(entries.items(), key=lambda item: -item[1]["size"])[share[0] :: share[1]]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
            problems += [
                found for found in pool.map(lambda item: _problem(folder, *item, tick), files) if found
            ]
    problems = list(
        dict.fromkeys(found for said in gather(json.dumps(problems)) for found in json.loads(said))
    )
    if problems:
        whole = problems[0].startswith(f"{folder}:")  # the manifest itself
        raise CheckpointError(
            problems[0]
            if whole
            else (
                f"{folder}: damaged checkpoint: {'; '.join(problems)}. Fix: use another checkpoint, or a"
                " backup of this one"
            )
        )


def _problem(folder: Path, name: str, entry: dict[str, Any], tick: Callable[[], None]) -> str:
    try:
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
        if sha256_of(folder / name, tick) != entry["sha256"]:
            return f"{name} has changed since it was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash.

    Raises:
        CheckpointError: no folder, no manifest, a damaged one, or one of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.parent.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Fix: name a step_N folder of a run")
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: {MANIFEST} is missing: no whole checkpoint. Fix: name a step_N folder of a run"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: {MANIFEST} cannot be read: {error}. Fix: use another checkpoint"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_hash(manifest):
        raise CheckpointError(
            f"{folder}: {MANIFEST} has changed since it was written (SHA-256 differs). Fix: use another"
            " checkpoint"
        )
    if manifest["format"] != FORMAT:
        older = (
            "start a new run from its weights (--model_path)"
            if manifest["format"] < FORMAT
            else "update unigen"
        )
        raise CheckpointError(
            f"{folder}: {MANIFEST} has format {manifest['format']}, this version reads {FORMAT}. Fix: {older}"
        )
    for name in [*manifest["files"], *manifest["groups"], *manifest["states"]]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(
                f"{folder}: {MANIFEST} names {name!r}, outside of the checkpoint. Fix: do not use this"
                " checkpoint"
            )
    return manifest


def manifest_hash(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- which one


Verify = Callable[[Path], None]


def latest_checkpoint(output_dir: Path, verify: Verify = verify_checkpoint) -> Path | None:
    """The newest ``step_N`` of a run that verifies, or None. A damaged newer one is passed over with a
    warning."""
    return next(_good_checkpoints(Path(output_dir), verify, warn=True), None)


def resolve_resume(
    value: str | Path | None, output_dir: Path, verify: Verify = verify_checkpoint
) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` asks for, verified.

    Args:
        value: A checkpoint folder; ``auto`` for the newest good one in ``output_dir``; None for a fresh
            start.
        output_dir: Folder of the run.
        verify: Checks one; with several processes a call that all of them make together.

    Returns:
        The folder, or None for a fresh start (also for ``auto`` where there is nothing yet).

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
            raise CheckpointError(
                f"{output_dir}: every checkpoint is damaged ({', '.join(p.name for p in damaged)}). Fix:"
                " restore one from a backup, or start afresh in another --output_dir"
            )
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
        raise CheckpointError(f"{error} (--resume_from_checkpoint {value}); {choice}") from error
    newer = [
        p.name
        for p in steps(output_dir)
        if p.resolve() != folder.resolve() and number(p) > read_manifest(folder)["step"]
    ]
    if newer:
        log.warning(
            "Resuming from %s, but %s also holds the newer %s, which `auto` would choose.",
            folder,
            output_dir,
            ", ".join(newer),
        )
    return folder


def number(folder: Path) -> int:
    """N of ``step_N``."""
    match = _STEP.fullmatch(folder.name)
    assert match
    return int(match[1])


def steps(output_dir: Path) -> list[Path]:
    """Every ``step_N`` folder, whole or not, newest first.

    Raises:
        CheckpointError: the folder cannot be listed, so that nobody can say what is in it.
    """
    return sorted(
        (p for p in listed(output_dir) if _STEP.fullmatch(p.name) and p.is_dir()), key=number, reverse=True
    )


def listed(folder: Path) -> list[Path]:
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
    output_dir: Path, keep: int | None, protect: Path | None = None, source: Path | None = None
) -> None:
    """Removes the oldest ``step_N`` folders beyond ``keep``; never ``best``, nor a folder without a manifest.

    Args:
        output_dir: Folder of the run.
        keep: How many to keep, at least 1; None keeps all.
        protect: One more that stays: the one just written, which is not the newest number after resuming from
            an older step.
        source: Another: the folder the run copies from.
    """
    if keep is None:
        return
    assert keep >= 1
    for folder in [p for p in steps(Path(output_dir)) if (p / MANIFEST).is_file()][keep:]:
        if source is not None and folder.resolve() == Path(source).resolve():
            continue
        if protect is None or folder.name != Path(protect).name:
            try:
                remove_checkpoint(folder)
            except OSError as error:
                log.warning("Cannot remove the old checkpoint %s: %s", folder, error)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; renamed first, so that what is half removed no longer looks like one."""
    doomed = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    remove(doomed)
    folder.rename(doomed)
    remove(doomed)


def sweep_orphans(output_dir: Path) -> None:
    """Cleans up after killed runs; to be called by the process that holds the folder's lock, before it reads
    or writes checkpoints.

    What was left half written is removed. A checkpoint that was set aside to be replaced, and whose successor
    never came, gets its name back.
    """
    for path in listed(Path(output_dir)):
        match = _ORPHAN.fullmatch(path.name)
        if not match:
            continue
        try:
            final = path.with_name(match["name"])
            if match["role"] == "old" and not final.exists():
                path.rename(final)
            else:
                remove(path)
        except OSError as error:
            log.warning("Cannot clean up %s: %s", path, error)
