"""Checkpoints: a folder ``step_N/`` that is either whole or not there.

    step_N/
      ...                    the weights, in the published layout (written by a callback)
      <group>.safetensors    tensors: optimiser, average
      <state>.json           everything else: loader, random state, config
      manifest.json          format, step, size and SHA-256 of every file above, and of itself

All of it is staged in ``.step_N.partial-<pid>`` beside its place, brought to the disk file by file, the manifest last, and
published by one rename. Nothing is ever pickled. safetensors has no checksum of its own, so the manifest brings it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from unigen.config import UserError
from unigen.model.weights import write_safetensors

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)")
_ORPHAN = re.compile(r"\.(?P<name>\w+)\.(?P<role>partial|old)-(?P<pid>\d+)")
_CHUNK = 1 << 22  # bytes read or written at a time


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or cannot be trusted; the message names the file, what is wrong, and the cure."""


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    tensors: dict[str, dict[str, Tensor]],
    states: dict[str, Any],
    name: str | None = None,
) -> Path:
    """Writes ``output_dir/step_<step>`` (or ``output_dir/<name>``), wholly or not at all; one process calls it.

    Args:
        output_dir: Folder of the run; made when missing.
        step: Optimiser steps done.
        write_model: Writes the weights into the folder it is given.
        tensors: Group -> name -> tensor of any device, shape and layout; one tensor at a time is copied to the host.
        states: Name -> JSON value. Keys of dicts must be strings; tuples come back as lists; NaN and infinity are kept.
        name: Another name than ``step_N``, such as ``best``.

    Returns:
        The published folder. One of the same name from before has been replaced.

    Raises:
        CheckpointError: The disk refused (full, read-only, broken). Earlier checkpoints are as they were.
    """
    output_dir, name = Path(output_dir), name or f"step_{step}"
    assert re.fullmatch(r"\w+", name), f"{name!r} is no name for a checkpoint"
    final, staging = output_dir / name, output_dir / f".{name}.partial-{os.getpid()}"
    published = False
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _remove(staging)
        staging.mkdir()
        write_model(staging)
        _write_contents(staging, tensors, states)
        _seal(staging, {"format": FORMAT, "step": step, "groups": sorted(tensors), "states": sorted(states)})
        _publish(staging, final)
        published = True
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: cannot write the checkpoint of step {step}: {error}. Earlier checkpoints are untouched. "
            "Cure: free space on that disk or make the folder writable (see --output_dir, --save_total_limit), then resume with "
            "--resume_from_checkpoint auto"
        ) from error
    finally:
        if not published:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def verify_checkpoint(folder: Path) -> None:
    """Reads every byte of a checkpoint and compares it with the manifest. Files that the manifest does not name are fine.

    Raises:
        CheckpointError: naming every file that is missing, cut short or changed.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    problems = []
    for name, entry in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                problems.append(f"{name} has {size} bytes instead of {entry['size']}")
            elif _sha256(folder / name) != entry["sha256"]:
                problems.append(f"{name} has changed since it was written (SHA-256 differs)")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error})")
    if problems:
        raise CheckpointError(f"{folder}: damaged checkpoint: {'; '.join(problems)}. Cure: use another checkpoint, or a backup of this one")


def load_checkpoint(folder: Path, device: str = "cpu", *, verify: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensor groups and states a checkpoint was saved with, bit for bit (its weights are the model loader's to read).

    Args:
        folder: A ``step_N`` or ``best`` folder.
        device: Where the tensors go.
        verify: Check every byte first; false where the caller just did.

    Raises:
        CheckpointError: as :func:`verify_checkpoint`.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if verify:
        verify_checkpoint(folder)
    manifest = _read_manifest(folder)
    try:
        tensors = {group: load_file(folder / f"{group}.safetensors", device=str(device)) for group in manifest["groups"]}
        states = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in manifest["states"]}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot read the checkpoint: {error}. Cure: use another checkpoint") from error
    return tensors, states


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest ``step_N`` of a run that verifies, or None. A damaged newer one is passed over with a warning."""
    return next(_good_checkpoints(Path(output_dir), warn=True), None)


def resolve_resume(value: str | Path | None, output_dir: Path) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` asks for, verified.

    Args:
        value: A checkpoint folder; ``auto`` for the newest good one in ``output_dir``; None for a fresh start.
        output_dir: Folder of the run.

    Returns:
        The folder, or None for a fresh start (also for ``auto`` where there is nothing yet).

    Raises:
        CheckpointError: a named folder does not exist or is damaged; the good ones beside it are listed. Or ``auto`` finds
            checkpoints of which none is good: starting from zero would then silently lose a run.
    """
    if value is None:
        return None
    output_dir = Path(output_dir)
    if str(value) == "auto":
        found = latest_checkpoint(output_dir)
        if found is None and (damaged := _steps(output_dir)):
            raise CheckpointError(
                f"{output_dir}: every checkpoint is damaged ({', '.join(p.name for p in damaged)}). Cure: restore one from a backup, or "
                "start afresh in another --output_dir"
            )
        return found
    folder = Path(value)
    try:
        verify_checkpoint(folder)
    except CheckpointError as error:
        good = dict.fromkeys(p for place in (folder, folder.parent, output_dir) for p in islice(_good_checkpoints(place), 3))
        choice = f"good ones nearby: {', '.join(map(str, good))}" if good else "there is no good one nearby"
        raise CheckpointError(f"{error} (--resume_from_checkpoint {value}); {choice}") from error
    newer = [p.name for p in _steps(output_dir) if p.resolve() != folder.resolve() and _number(p) > _read_manifest(folder)["step"]]
    if newer:
        log.warning("Resuming from %s, but %s also holds the newer %s, which `auto` would choose.", folder, output_dir, ", ".join(newer))
    return folder


def prune_checkpoints(output_dir: Path, keep: int | None, protect: Path | None = None) -> None:
    """Removes the oldest ``step_N`` folders beyond ``keep``; never ``best``, nor a folder without a manifest.

    Args:
        output_dir: Folder of the run.
        keep: How many to keep, at least 1; None keeps all.
        protect: One more that stays: the one just written, which is not the newest number after resuming from an older step.
    """
    if keep is None:
        return
    assert keep >= 1
    output_dir = Path(output_dir)
    for folder in [p for p in _steps(output_dir) if (p / MANIFEST).is_file()][keep:]:
        if protect is not None and folder.name == Path(protect).name:
            continue
        # Renamed first: what is half removed no longer looks like a checkpoint.
        doomed = output_dir / f".{folder.name}.partial-{os.getpid()}"
        try:
            _remove(doomed)
            folder.rename(doomed)
            _remove(doomed)
        except OSError as error:
            log.warning("Cannot remove the old checkpoint %s: %s", folder, error)


def sweep_orphans(output_dir: Path) -> None:
    """Cleans up after killed runs; to be called once, before anything reads or writes checkpoints here.

    Folders that a dead process (or an earlier one with our own process id) left half written are removed. A checkpoint
    that was set aside to be replaced, and whose successor never came, gets its name back.
    """
    for path in sorted(Path(output_dir).glob(".*")):
        match = _ORPHAN.fullmatch(path.name)
        if not match or (int(match["pid"]) != os.getpid() and _alive(int(match["pid"]))):
            continue
        try:
            final = path.with_name(match["name"])
            if match["role"] == "old" and not final.exists():
                path.rename(final)
            else:
                _remove(path)
        except OSError as error:
            log.warning("Cannot clean up %s: %s", path, error)


# ---- writing


def _write_contents(folder: Path, tensors: dict[str, dict[str, Tensor]], states: dict[str, Any]) -> None:
    for group, named in tensors.items():
        path = folder / f"{group}.safetensors"
        # The published layout has an ema.safetensors and a config.json of its own.
        assert not path.exists(), f"tensor group {group!r} would overwrite a file of the model"
        write_safetensors(path, {key: (t.dtype, tuple(t.shape), lambda t=t: t.detach().cpu()) for key, t in named.items()})
    for name, state in states.items():
        path = folder / f"{name}.json"
        assert not path.exists() and path.name != MANIFEST, f"state {name!r} would overwrite another file"
        _assert_json_keys(state, name)
        path.write_text(json.dumps(state, indent=1), "utf-8")


def _assert_json_keys(value: Any, where: str) -> None:
    """JSON turns other keys into strings without a word, and a resumed run would not find them."""
    if isinstance(value, dict):
        for key, item in value.items():
            assert isinstance(key, str), f"state {where}: key {key!r} is no string"
            _assert_json_keys(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _assert_json_keys(item, where)


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Brings every file to the disk, then the manifest that names them, then the folders."""
    paths = sorted(folder.rglob("*"))
    files = [p for p in paths if p.is_file()]
    for path in files:
        _fsync(path)
    manifest["files"] = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    manifest["sha256"] = _manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    for path in [folder / MANIFEST, *(p for p in paths if p.is_dir()), folder]:
        _fsync(path)


def _publish(staging: Path, final: Path) -> None:
    """Gives the staged folder its name; one that has it already is set aside first and removed afterwards."""
    aside = final.with_name(f".{final.name}.old-{os.getpid()}")
    replacing = final.is_dir()
    if replacing:
        _remove(aside)
        final.rename(aside)
    try:
        staging.rename(final)
    except BaseException:
        if replacing:
            aside.rename(final)
        raise
    _fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot sync a folder; there is nothing more to do there.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- reading


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash.

    Raises:
        CheckpointError: no folder, no manifest, a damaged one, or one of a later format.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Cure: name a step_N folder of a run")
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing: no whole checkpoint. Cure: name a step_N folder of a run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} cannot be read: {error}. Cure: use another checkpoint") from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_hash(manifest):
        raise CheckpointError(f"{folder}: {MANIFEST} has changed since it was written (SHA-256 differs). Cure: use another checkpoint")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder}: {MANIFEST} has format {manifest['format']}, this version reads {FORMAT}. Cure: update unigen")
    for name in [*manifest["files"], *manifest["groups"], *manifest["states"]]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{folder}: {MANIFEST} names {name!r}, outside of the checkpoint. Cure: do not use this checkpoint")
    return manifest


def _manifest_hash(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _number(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    assert match
    return int(match[1])


def _steps(output_dir: Path) -> list[Path]:
    """Every ``step_N`` folder, whole or not, newest first."""
    return sorted((p for p in output_dir.glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()), key=_number, reverse=True)


def _good_checkpoints(output_dir: Path, warn: bool = False) -> Iterator[Path]:
    """The ``step_N`` folders that verify, newest first, read only as far as the caller asks."""
    for folder in _steps(output_dir):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            if warn:
                log.warning("Passing over a checkpoint that cannot be used. %s", error)
        else:
            yield folder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        pass
    return True
