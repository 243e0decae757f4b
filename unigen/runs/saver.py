"""Writing checkpoints: all processes write, beside the training, and one rename publishes (see
``checkpoint.py`` for the layout)."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import platform
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from unigen.bars import Bar
from unigen.config import UserError
from unigen.files import draft_of, fsync, make_empty, publish, sha256_of
from unigen.model.storage import DTYPES, code_of, part_name, set_files, write_json, write_safetensors
from unigen.runs.channel import Channel
from unigen.runs.checkpoint import FORMAT, CheckpointError, manifest_hash, prune_checkpoints
from unigen.runs.layout import MANIFEST, state_file, step_name
from unigen.runs.snapshot import GpuLane, copied_later, copy_out
from unigen.runs.space import free_memory

log = logging.getLogger("unigen")

_SPARE = 1 << 30  # bytes of memory that copies leave alone
_PATIENCE_S = 20.0  # until a folder made on another machine must be visible here


@dataclass(frozen=True)
class StateEntry:
    """A tensor of a checkpoint, or elements [start, start + count) of the flattened tensor."""

    group: str
    name: str
    shape: tuple[int, ...]  # of the whole
    value: Tensor  # any device and layout; or a stand-in of the right dtype where ``read`` makes it
    start: int = 0
    read: Callable[[], Tensor] | None = None  # makes the value when it is written, from a file say
    own: bool = False  # nobody else holds the value, so it needs no copy

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.value.numel() == math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.element_size()

    @property
    def copied_later(self) -> bool:
        """Is its value still the run's own, until :func:`copy_out` has taken it?"""
        return self.read is None and not self.own and copied_later(self.value)

    def kept(self) -> StateEntry:
        """The same with a value that training does not change, but for one that is copied later."""
        if self.own or self.read is not None or self.copied_later:
            return self
        return replace(self, value=self.value.detach().to("cpu", copy=True))

    def make(self) -> Tensor:
        return self.value if self.read is None else self.read()


@dataclass
class Contents:
    """What a checkpoint holds. ``states`` and ``write_files`` are the main process's to write."""

    step: int
    entries: Sequence[StateEntry]  # this process's
    # name -> JSON value; keys must be strings, tuples come back as lists, NaN and infinity are kept
    states: dict[str, Any]
    write_files: Callable[[Path], None]  # what makes the folder a model: configs, tokenizer, VAE
    about: dict[str, Any]  # more for the manifest


class Saver:
    """Writes checkpoints into ``output_dir``, one at a time; all processes call its methods together.

    Args:
        channel: of its own, since the writing thread speaks through it.
        background: write beside the training, from copies in host memory, where there is room for them.
        keep: newest checkpoints to keep; None keeps all.
        source: a folder that is never removed: the one the run copies from.
        tick: called about once a second while :meth:`wait` waits.
    """

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        channel: Channel,
        *,
        background: bool = False,
        keep: int | None = None,
        source: Path | None = None,
        tick: Callable[[], None] = lambda: None,
    ):
        self.output_dir, self.rank, self.channel = Path(output_dir), rank, channel
        self.background, self.keep, self.source, self.tick = background, keep, source, tick
        self.good = ""  # a checkpoint that is not removed either, until another one counts as good
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._untold: deque[Path] = deque()
        self._short: set[str] = set()  # machines whose memory was too small for copies
        self._lane: GpuLane | None = None  # from the GPU to host memory
        self._settled = threading.Event()
        self._settled.set()

    def save(self, contents: Contents, name: str | None = None) -> None:
        """Begins to write ``step_N`` (or ``name``); without ``background`` it is published when this returns.

        Raises:
            CheckpointError: the disk refused (full, read-only, broken), now or for the one before. Earlier
                checkpoints are as they were.
        """
        self.wait()
        name = name or step_name(contents.step)
        assert re.fullmatch(r"\w+", name), f"{name!r} is no name for a checkpoint"
        final = self.output_dir / name
        for key, state in contents.states.items():
            _assert_json_keys(state, key)
        if self.background and self._room_for_copies(contents):
            kept = [entry.kept() for entry in contents.entries]
            states, about = copy.deepcopy((contents.states, contents.about))
            contents = replace(contents, entries=kept, states=states, about=about)
            if device := next((entry.value.device for entry in kept if entry.copied_later), None):
                self._lane = self._lane or GpuLane(device)
                self._lane.begin()
                self._settled.clear()
            self._thread = threading.Thread(target=self._run, args=(contents, final), name="checkpoint")
            self._thread.start()
        else:
            self._run(contents, final)
            self.wait()

    def settle(self) -> None:
        """Waits until nothing that is being saved is the run's own tensor any more.

        To be called before the weights, the moments or the average change.
        """
        while not self._settled.wait(1.0):
            self.tick()

    def _room_for_copies(self, contents: Contents) -> bool:
        """Does the memory of every machine hold what its processes would copy? The same answer on all of
        them."""
        need = sum(entry.nbytes for entry in contents.entries if entry.read is None and not entry.own)
        ours = json.dumps([platform.node(), need, free_memory()])
        said = [json.loads(text) for text in self.channel.gather(ours)]
        for machine in dict.fromkeys(name for name, _, _ in said):
            wanted = sum(need for name, need, _ in said if name == machine)
            free = min(free for name, _, free in said if name == machine)
            if wanted + _SPARE > free:
                if self.rank == 0 and machine not in self._short:
                    log.warning(
                        "Checkpoints are written while the training waits: beside it, %s would need %.1f GB "
                        "of memory for a copy, and has %.1f GB. (--no_async_save does the same without this "
                        "line)", machine, wanted / 1e9, free / 1e9,
                    )  # fmt: skip
                self._short.add(machine)
                return False
        return True

    @property
    def failed(self) -> bool:
        """Has the last one failed? Known at about the same time on all processes."""
        return self._error is not None

    def published(self) -> Path | None:
        """A checkpoint that was published since the last call, the oldest first; each is returned once."""
        return self._untold.popleft() if self._untold else None

    def wait(self) -> None:
        """Until the last one is published. Raises CheckpointError as :meth:`save`."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(1.0)
                self.tick()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def prune(self, newest: str) -> None:
        """Removes checkpoints beyond ``keep``, but for ``newest`` and ``good``; while one is being written,
        that does it."""
        if self.rank == 0 and self._thread is None:
            self._prune(self.output_dir / newest)

    def _prune(self, protect: Path) -> None:
        prune_checkpoints(self.output_dir, self.keep, protect, self.source, self.good)

    # ---- the work, in the thread

    def _run(self, contents: Contents, final: Path) -> None:
        try:
            self._write(contents, final)
            self._untold.append(final)
        except CheckpointError as error:
            self._error = error
        except Exception as error:  # another process is gone
            self._error = CheckpointError(
                f"{final}: the checkpoint of step {contents.step} could not be finished:"
                f" {type(error).__name__}: {error}"
            )
        except BaseException as error:
            self._error = error if self.background else None  # without a thread the caller hears of it here
            raise

    def _write(self, contents: Contents, final: Path) -> None:
        self._together(contents, final, lambda: self._copy_out(contents))
        # All processes write into the folder that the first one made; its name holds that one's process id.
        pid, *_ = self.channel.gather(str(os.getpid()))
        staging = draft_of(final, int(pid))
        main, published = self.rank == 0, False
        together = partial(self._together, contents, final)
        try:
            together(lambda: make_empty(staging) if main else None)
            said = together(lambda: self._write_files(staging, contents, final.name))
            together(lambda: self._publish(staging, final, contents, said) if main else None)
            published = True
        finally:
            if main and not published:
                shutil.rmtree(staging, ignore_errors=True)

    def _copy_out(self, contents: Contents) -> None:
        """Puts copies in the place of the run's own tensors, which may change afterwards."""
        if self._settled.is_set():
            return
        try:
            assert self._lane is not None
            later = [entry.value for entry in contents.entries if entry.copied_later]
            copies = iter(copy_out(self._lane, later))
            entries = [replace(e, value=next(copies)) if e.copied_later else e for e in contents.entries]
            contents.entries = entries
        finally:
            self._settled.set()

    def _together(self, contents: Contents, final: Path, work: Callable[[], Any]) -> list[Any]:
        """Does a part of the work on every process; what each has to say of it. If one fails, all do."""
        said: dict[str, Any] = {"error": "", "value": None}
        failure: Exception | None = None
        try:
            said["value"] = work()
        except Exception as error:  # whatever it is: the others must not wait for this process
            failure = error
            plain = isinstance(error, (OSError, SafetensorError, UserError)) and str(error)
            said["error"] = str(error) if plain else f"{type(error).__name__}: {error}"
        answers = [json.loads(text) for text in self.channel.gather(json.dumps(said))]
        errors = [f"process {rank}: {a['error']}" for rank, a in enumerate(answers) if a["error"]]
        if self.channel.world == 1:
            errors = [a["error"] for a in answers if a["error"]]
        if errors:
            raise CheckpointError(
                f"{final}: cannot write the checkpoint of step {contents.step}: {'; '.join(errors)}. Earlier"
                " checkpoints are untouched. Fix: free space on that disk or make the folder writable"
                " (--output_dir, --save_total_limit, --low_space), then resume with --resume_from_checkpoint"
                " auto"
            ) from failure
        return [a["value"] for a in answers]

    def _write_files(self, staging: Path, contents: Contents, name: str) -> dict[str, Any]:
        """Writes this process's part of every group: {"files": {file: {size, sha256}}, "tensors": [[group,
        name, file, ...]]}."""
        total = sum(entry.value.nbytes for entry in contents.entries)
        _await_folder(staging)
        files, tensors = {}, []
        with Bar(f"saving {name}", total, "B", plain=not self.background) as shown:
            for group in dict.fromkeys(entry.group for entry in contents.entries):
                entries = [entry for entry in contents.entries if entry.group == group]
                file = part_name(group, self.rank, self.channel.world)
                plan = {}
                for e in entries:
                    shape = e.shape if e.whole else (e.value.numel(),)
                    assert e.name not in plan, f"{group} holds {e.name} twice"
                    plan[e.name] = (e.value.dtype, shape, lambda e=e, shape=shape: e.make().reshape(shape))
                    where = [e.start, e.start + e.value.numel()]
                    tensors.append([group, e.name, file, code_of(e.value.dtype), list(e.shape), *where])
                size, digest = write_safetensors(staging / file, plan, shown.update)
                files[file] = {"size": size, "sha256": digest}
        return {"files": files, "tensors": tensors}

    def _publish(self, staging: Path, final: Path, contents: Contents, said: list[dict[str, Any]]) -> None:
        """The main process's part: indexes, states, files of the model, the manifest, the rename."""
        tensors = [tensor for part in said for tensor in part["tensors"]]
        groups = list(dict.fromkeys(tensor[0] for tensor in tensors))
        if self.channel.world > 1:
            for group in groups:
                index = _index([t[1:] for t in tensors if t[0] == group])
                write_json(staging / set_files(group)[1], index)
        contents.write_files(staging)
        for name, state in contents.states.items():
            path = staging / state_file(name)
            assert path.name != MANIFEST and not path.exists(), f"state {name!r} would overwrite another file"
            path.write_text(json.dumps(state, indent=1), "utf-8")
        known = {file: entry for part in said for file, entry in part["files"].items()}
        # Written with fewer digits than a float has: a flipped bit in the last ones could otherwise mean the
        # same number.
        now, step = round(time.time(), 3), contents.step
        about = {"format": FORMAT, "step": step, "time": now, "world": self.channel.world, **contents.about}
        _seal(staging, about | {"groups": groups, "states": sorted(contents.states)}, known)
        publish(staging, final, replace=True)
        if final.name == step_name(step):
            self._prune(final)


def _index(tensors: list[list[Any]]) -> dict[str, Any]:
    """The index of a group, from (name, file, dtype, shape, start, stop) of all its parts."""
    weight_map: dict[str, str] = {}
    pieces: dict[str, Any] = {}
    total = 0
    for name, file, dtype, shape, start, stop in tensors:
        total += (stop - start) * DTYPES[dtype][1]
        if start == 0 and stop == math.prod(shape):
            weight_map[name] = file
        else:
            entry = pieces.setdefault(name, {"dtype": dtype, "shape": shape, "parts": []})
            entry["parts"].append([file, start, stop])
    for name, entry in pieces.items():
        entry["parts"].sort(key=lambda part: part[1])
        ends = [0, *(stop for _, _, stop in entry["parts"])]
        starts = [*(start for _, start, _ in entry["parts"]), math.prod(entry["shape"])]
        assert starts == ends, f"{name} has gaps"
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return index | ({"pieces": pieces} if pieces else {})


def _await_folder(folder: Path) -> None:
    """A folder that another machine just made may take a moment to be seen here."""
    deadline = time.monotonic() + _PATIENCE_S
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder} is not visible on this machine; output_dir must be a folder that all machines"
                " share"
            )
        time.sleep(0.1)


def _assert_json_keys(value: Any, where: str) -> None:
    """JSON turns other keys into strings without a word, and a resumed run would not find them."""
    if isinstance(value, dict):
        for key, item in value.items():
            assert isinstance(key, str), f"state {where}: key {key!r} is no string"
            _assert_json_keys(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _assert_json_keys(item, where)


def _seal(folder: Path, manifest: dict[str, Any], known: dict[str, dict[str, Any]]) -> None:
    """Brings every file to the disk, then the manifest that names them, then the folders. ``known`` files are
    there already."""
    # `rglob` would leave out what is below a folder that cannot be listed, without a word.
    walk = os.walk(folder, onerror=_raise)
    paths = sorted(Path(at) / name for at, folders, files in walk for name in [*folders, *files])
    files = {p.relative_to(folder).as_posix(): p for p in paths if p.is_file()}
    if missing := known.keys() - files.keys():
        raise CheckpointError(
            f"{', '.join(sorted(missing))} cannot be seen by process 0; output_dir must be a folder that all"
            " machines share"
        )
    entries = {}
    for name, path in files.items():
        if name not in known:
            fsync(path)
        entries[name] = known.get(name) or {"size": path.stat().st_size, "sha256": sha256_of(path)}
        if path.stat().st_size != entries[name]["size"]:
            size = entries[name]["size"]
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes, {size} were written")
    manifest["files"] = entries
    manifest["sha256"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    for path in [folder / MANIFEST, *(p for p in paths if p.is_dir()), folder]:
        fsync(path)


def _raise(error: OSError) -> None:
    raise error
