"""Disks that refuse and processes that are killed: a save that fails costs nothing but itself."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from saves import (
    ALONE,
    FILES,
    contents,
    contents_of,
    entry,
    mount_disk,
    names,
    save,
    trainer_state,
    write_files,
)

from unigen.runs.checkpoint import (
    CheckpointError,
    prune_checkpoints,
    read_states,
    sweep_orphans,
    verify_checkpoint,
)
from unigen.runs.saver import Saver

BIG = torch.zeros(300_000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    yield from mount_disk(tmp_path, "1m")


# ---- no room


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_costs_only_the_new_checkpoint(small_disk: Path, background: bool):
    """Whether tensors, files of the model or a state fill it, and whether a name is new or taken."""
    old = save(small_disk, 1)
    before = contents_of(small_disk)

    def write_too_much(folder: Path) -> None:
        write_files(folder)
        (folder / "ae.safetensors").write_bytes(bytes(1_200_000))

    saver = Saver(small_disk, 0, ALONE, background=background)
    for name in (None, "step_1"):
        for refused in (
            contents(2, entry("optimizer", "big", BIG)),
            contents(2, write_files=write_too_much),
            contents(2, states={"loader": "x" * 1_200_000}),
        ):
            with pytest.raises(CheckpointError, match=r"(?i)no space left.*Fix.*--save_total_limit"):
                saver.save(refused, name)
                saver.wait()
            assert saver.published() is None and names(small_disk) == ["step_1"]
    verify_checkpoint(old)
    assert contents_of(small_disk) == before
    saver.save(contents(2))  # there is room for a small one, so nothing was left behind
    saver.wait()
    assert saver.published() == small_disk / "step_2"


def test_a_disk_that_is_full_at_20_offsets_of_a_save_keeps_the_earlier_checkpoint(small_disk: Path):
    """From no room at all to all but the last page, in even steps; then the same save succeeds."""
    page, value = os.sysconf("SC_PAGESIZE"), torch.arange(20_000.0)
    new = contents(
        2, entry("ema", "w", value), entry("optimizer", "exp_avg.w", value), states={"trainer": {"step": 2}}
    )
    Saver(small_disk, 0, ALONE).save(new, "measured")
    whole = sum(-(-len(data) // page) for data in contents_of(small_disk / "measured").values())
    shutil.rmtree(small_disk / "measured")
    old = save(small_disk, 1)
    before = contents_of(small_disk)
    for offset in range(20):
        fill(small_disk, room := offset * whole // 20 * page)
        with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
            Saver(small_disk, 0, ALONE).save(new)
        (small_disk / "filler").unlink()
        assert contents_of(small_disk) == before and names(small_disk) == ["step_1"], (
            f"with room for {room} bytes"
        )
        verify_checkpoint(old)
    Saver(small_disk, 0, ALONE).save(new)
    verify_checkpoint(small_disk / "step_2")


def fill(disk: Path, room: int) -> None:
    """Leaves ``room`` bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(free - room))


def test_the_kernel_refusing_at_20_offsets_of_a_file_keeps_the_earlier_checkpoint(tmp_path: Path):
    """A limit on the size of files, which needs no root: in the header, in every quarter of the data, before
    the last byte."""
    old, value = save(tmp_path, 1), torch.arange(25_000.0)
    new = contents(2, entry("ema", "w", value))
    Saver(tmp_path, 0, ALONE).save(new, "measured")
    whole = (tmp_path / "measured" / "ema.safetensors").stat().st_size
    shutil.rmtree(tmp_path / "measured")
    before = contents_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [1, 8, *range(1000, whole, whole // 17), whole - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)):
                Saver(tmp_path, 0, ALONE).save(new)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert contents_of(tmp_path) == before and names(tmp_path) == ["step_1"], limit
    verify_checkpoint(old)
    Saver(tmp_path, 0, ALONE).save(new)
    verify_checkpoint(tmp_path / "step_2")


# ---- broken, closed


@pytest.mark.parametrize("name", ["step_3", "best", "step_2"], ids=["new", "best", "taken"])
def test_a_disk_that_cannot_sync_at_any_moment_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """EIO at each fsync of a save, also at the very last one, after the rename: the old one is back and
    nothing else is there."""
    save(tmp_path, 2)
    save(tmp_path, 1, name="best")
    before, sync, calls = contents_of(tmp_path), os.fsync, 0
    refused = -1

    def refuse(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    Saver(tmp_path / "elsewhere", 0, ALONE).save(contents(3))
    shutil.rmtree(tmp_path / "elsewhere")
    assert calls >= 8, "two groups, three files, the manifest, the folder and the one around it"
    for refused in range(1, calls + 1):
        calls, saver = 0, Saver(tmp_path, 0, ALONE)
        with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
            saver.save(contents(3), name)
        assert (
            saver.published() is None
            and contents_of(tmp_path) == before
            and names(tmp_path) == ["best", "step_2"]
        ), refused
    refused = -1
    Saver(tmp_path, 0, ALONE).save(contents(3), name)
    assert read_states(tmp_path / name) == {"trainer": trainer_state(3)}


def test_a_folder_that_cannot_be_synced_is_fine_where_the_file_system_has_no_such_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    verify_checkpoint(save(tmp_path, 1))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EDQUOT, errno.ENOSPC])
def test_a_disk_that_refuses_folders_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    """Passes when mkdir and rename that fail with such a code are errors with the cure, and the checkpoint
    before is as it was."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    save(tmp_path, 1)
    before = contents_of(tmp_path)
    for call in ("mkdir", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, call, refuse)
            with pytest.raises(
                CheckpointError, match=f"{os.strerror(code)}.*Earlier checkpoints are untouched.*Fix"
            ):
                save(tmp_path, 2)
        assert contents_of(tmp_path) == before and names(tmp_path) == ["step_1"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; EACCES is forced in other tests")
def test_a_folder_without_permission_is_a_clear_error(tmp_path: Path):
    """Passes when a folder that may not be written is an error that says so, with the cure."""
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=f"{os.strerror(errno.EACCES)}.*Fix"):
        save(tmp_path, 1)
    tmp_path.chmod(0o700)


def test_a_read_only_disk_is_a_clear_error(small_disk: Path):
    """A real file system that turns read-only: passes when the save is an error with the cure and the
    checkpoint before verifies."""
    old = save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=f"{os.strerror(errno.EROFS)}.*Fix"):
        save(small_disk, 2)
    prune_checkpoints(small_disk, 1)
    sweep_orphans(small_disk)
    verify_checkpoint(old)


def test_a_place_that_is_no_folder_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Fix"):
        save(tmp_path / "file", 1)
    (tmp_path / "step_2").touch()
    with pytest.raises(CheckpointError, match="Fix"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["file", "step_2"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("bug"), SafetensorError("x"), OSError(errno.EIO, "I/O error")]
)
def test_an_interrupted_or_failing_writer_leaves_nothing_and_the_next_one_succeeds(
    tmp_path: Path, error: BaseException
):
    """Passes when the folder is as it was after the failure, which is told once, and the next save publishes
    a whole checkpoint."""

    def fail(folder: Path) -> None:
        write_files(folder)
        raise error

    save(tmp_path, 1)
    before = contents_of(tmp_path)
    saver = Saver(tmp_path, 0, ALONE)
    with pytest.raises(CheckpointError if isinstance(error, Exception) else type(error)):
        saver.save(contents(1, write_files=fail))
    assert names(tmp_path) == ["step_1"] and contents_of(tmp_path) == before and saver.published() is None
    saver.wait()  # it has been told
    saver.save(contents(2))
    assert saver.published() == tmp_path / "step_2" and names(tmp_path / "step_2") == FILES


def test_a_file_that_shrinks_behind_the_writers_back_is_noticed(tmp_path: Path):
    def spoil(folder: Path) -> None:
        (folder / "ema.safetensors").write_bytes(b"x")

    with pytest.raises(CheckpointError, match=r"ema.safetensors has 1 bytes, \d+ were written"):
        save(tmp_path, 1, write_files=spoil)
    assert names(tmp_path) == []


# ---- kill -9, and a refusal at every single operation


CHILD = """
import errno, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from saves import ALONE, contents, entry, read_group
from unigen.runs.checkpoint import *
from unigen.runs.saver import Saver

torch.set_num_threads(1)
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir"}

def write_files(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(bytes(300_000))

def save(step, name=None, size=1000, background=False, keep=None):
    saver = Saver(root, 0, ALONE, background=background, keep=keep)
    saver.save(contents(step, entry("o", "w", torch.full((size,), float(step))), write_files=write_files), name)
    saver.wait()
    assert saver.published()

def check(folder, allowed):
    verify_checkpoint(folder)
    step = read_states(folder)["trainer"]["step"]
    assert set(read_group(folder, "o")["w"].tolist()) == {float(step)}, "mixed"
    assert step in allowed, (step, allowed)
    return step

def at_operation(number, act):  # just before the n-th operation on the file system
    count = 0
    def hook(event, args):
        nonlocal count
        if event in OPERATIONS:
            count += 1
            if count == number + 1:
                act()
    sys.addaudithook(hook)

def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            if isinstance(error, CheckpointError) and os.strerror(errno.EACCES) in str(error):
                os._exit(0)
            import traceback
            traceback.print_exc()
            os._exit(1)
    return pid

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def refuse():
    raise OSError(errno.EACCES, os.strerror(errno.EACCES))

def start_again():
    shutil.rmtree(root, ignore_errors=True)
    save(1, "best"); save(1)

def every():
    start_again()
    seen, n = set(), 0
    while True:
        def work():
            at_operation(n, kill)
            save(2, "best"); save(2, keep=1)
        _, status = os.waitpid(fork(work), 0)
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
        sweep_orphans(root)
        best = check(root / "best", {1, 2})
        latest = latest_checkpoint(root)
        found = (best, check(latest, {1, 2}))
        assert found in {(1, 1), (2, 1), (2, 2)}, found
        seen.add(found)
        left = {p.name for p in root.iterdir()}
        assert left <= {"best", "step_1", "step_2"}, left
        if os.WIFEXITED(status):
            break
        n += 1
        start_again()
    assert left == {"best", "step_2"}, left
    assert seen == {(1, 1), (2, 1), (2, 2)}, seen
    return n

def refused():
    start_again()
    for n in range(1000):
        def work():
            reached = root.with_name("reached")
            reached.unlink(missing_ok=True)
            at_operation(n, lambda: (os.symlink("x", reached), refuse()))
            save(2, "best"); save(2)
        _, status = os.waitpid(fork(work), 0)
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, (n, status)
        best = check(root / "best", {1, 2})
        assert check(root / "step_1", {1}) == 1
        done = (root / "step_2").exists() and check(root / "step_2", {2})
        # All that may stay is the old one that was replaced and could not be removed; the next start sweeps
        # it.
        left = {p.name for p in root.iterdir()} - {"best", "step_1", "step_2"}
        assert all(name.startswith(".best.old-") for name in left) and (not left or best == 2), (n, left)
        if not os.path.islink(root.with_name("reached")):
            break
        start_again()
    assert best == 2 and done, "the last time nothing was refused"
    return n

def at_random():
    rng, last, best, killed_inside = random.Random(0), 0, 0, 0
    for round in range(12):
        def work(first=last, background=bool(round % 2)):
            for step in range(first + 1, first + 100):
                save(step, size=300_000, background=background, keep=2); save(step, "best", size=300_000, background=background)
        pid = fork(work)
        deadline = time.monotonic() + 60
        while max([0, *(int(p.name[5:]) for p in root.glob("step_*"))]) <= last:  # however slow the disk
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        killed_inside += any(p.name.startswith(".") for p in root.iterdir())
        sweep_orphans(root)
        steps = sorted(int(p.name[5:]) for p in root.glob("step_*"))
        for step in steps:
            check(root / f"step_{step}", {step})
        assert steps[-1] > last, (steps, last)
        if best or (root / "best").exists():
            best = check(root / "best", range(best, steps[-1] + 1))
        last = steps[-1]
        assert not [p for p in root.iterdir() if p.name.startswith(".")]
    prune_checkpoints(root, 2)
    assert sorted(p.name for p in root.iterdir()) == ["best", *sorted(f"step_{step}" for step in steps[-2:])]
    assert killed_inside >= 3, killed_inside
    return killed_inside

modes = {}
for mode in (every, refused, at_random):  # side by side
    def run(mode=mode):
        global root
        root = Path(sys.argv[1]) / mode.__name__ / "run"
        if mode is not at_random:  # a killed process leaves the same files, whether they are on the disk yet or not
            os.fsync = lambda descriptor: None
        print(mode.__name__, mode(), flush=True)
    modes[fork(run)] = mode.__name__
for pid, name in modes.items():
    assert os.waitpid(pid, 0)[1] == 0, name
"""


@pytest.mark.slow
def test_kill_9_or_a_refusal_at_any_moment_leaves_whole_checkpoints_only(tmp_path: Path):
    """``every``: killed before each single file operation of saving and pruning; ``refused``: each of them
    fails once with EACCES; ``at_random``: killed by the clock, in the middle of writes, beside the training
    or not."""
    args = [sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parents[1])]
    done = subprocess.run(args, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    times = {mode: int(count) for mode, count in (line.split() for line in done.stdout.splitlines())}
    assert times.keys() == {"every", "refused", "at_random"}
    assert times["every"] >= 30 and times["refused"] >= 30 and times["at_random"] >= 3, times
