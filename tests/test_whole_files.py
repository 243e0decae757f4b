"""Files and folders that are whole or not there, locks, checksums, free space."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from unigen.files import (
    CHUNK,
    Busy,
    atomic,
    existing,
    free_bytes,
    fsync,
    hold,
    is_held,
    locked,
    make_empty,
    publish,
    remove,
    sha256_of,
    staged,
)

NAMES = ["a.json", "图 像.json", "e\u0301 é\n.json", "x" * 200]


def put(path: Path, data: bytes, **options: Any) -> None:
    with atomic(path, **options) as file:
        file.write(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(monkeypatch: pytest.MonkeyPatch, call: str, code: int, folders: bool | None = None) -> None:
    """``os.CALL`` fails with ``code``; of fsync with ``folders``, that of folders or that of files alone."""
    real = getattr(os, call)

    def fail(*args: Any, **options: Any) -> Any:
        if folders is not None and stat.S_ISDIR(os.fstat(args[0]).st_mode) != folders:
            return real(*args, **options)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)


def child(code: str, *args: object, **options: Any) -> subprocess.Popen:
    """A process that runs ``code`` up to a line on its standard output."""
    lines = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom unigen.files import *\npath ="
        " Path(sys.argv[1])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", lines + code, *map(str, args)], stdin=-1, stdout=-1, text=True, **options
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


# ---- files


@pytest.mark.parametrize("name", NAMES)
def test_a_file_appears_whole_under_any_name(tmp_path: Path, name: str):
    path = tmp_path / name
    with atomic(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists() and len(names(tmp_path)) == 1
    assert path.read_bytes() == b"half" and names(tmp_path) == [name]
    put(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == [name]


def test_a_link_gives_way_and_what_it_named_stays(tmp_path: Path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to("theirs")
    put(tmp_path / "link", b"ours")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "theirs").read_bytes() == b"theirs"


def test_permissions_are_those_asked_for_less_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        put(tmp_path / "usual", b"")
        put(tmp_path / "secret", b"", mode=0o600)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "secret")] == [0o640, 0o600]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError(errno.EIO, "I/O")])
def test_whatever_ends_the_block_leaves_the_old_file_alone(tmp_path: Path, error: BaseException):
    put(tmp_path / "a", b"old")
    with pytest.raises(type(error)), atomic(tmp_path / "a") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EINVAL])
def test_a_disk_that_refuses_is_an_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch, call: str, code: int
):
    """Also where it cannot sync a file, whatever the code: nobody could say then that it is there."""
    put(tmp_path / "a", b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(code)):
        failing(patch, call, code)
        put(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_disk_that_is_full_at_any_byte_leaves_the_old_file(tmp_path: Path):
    put(tmp_path / "a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 4096, 99_999):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                put(tmp_path / "a", bytes(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"], limit


def test_without_sync_the_disk_is_not_asked(tmp_path: Path, monkeypatch):
    failing(monkeypatch, "fsync", errno.EIO)
    put(tmp_path / "a", b"new", sync=False)
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_draft_that_cannot_be_opened_is_not_removed(tmp_path: Path):
    (tmp_path / "theirs").mkdir()
    with pytest.raises(IsADirectoryError):
        put(tmp_path / "a", b"new", draft=tmp_path / "theirs")
    assert names(tmp_path) == ["theirs"]


def test_a_kill_between_the_write_and_the_rename_leaves_the_old_file_and_the_next_writer_goes_on(
    tmp_path: Path,
):
    put(tmp_path / "a", b"old")
    code = """
def kill(*_):
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
with atomic(path, path.with_name("draft")) as file:
    file.write(b"new")
"""
    assert child(code, tmp_path / "a").wait(60) == -9
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a", "draft"]
    assert (tmp_path / "draft").read_bytes() == b"new", "it was killed after the write"
    put(tmp_path / "a", b"newer", draft=tmp_path / "draft")
    assert (tmp_path / "a").read_bytes() == b"newer" and names(tmp_path) == ["a"]


# ---- the disk, sums, removing


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_fine_and_one_that_cannot_sync_files_is_not(
    tmp_path: Path, monkeypatch, code: int
):
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        failing(patch, "fsync", code, folders=True)
        fsync(tmp_path)
        fsync(tmp_path / "file")
    failing(monkeypatch, "fsync", code, folders=False)
    with pytest.raises(OSError, match=os.strerror(code)):
        fsync(tmp_path / "file")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_folder_that_fails_to_sync_is_an_error(tmp_path: Path, monkeypatch, code: int):
    failing(monkeypatch, "fsync", code)
    with pytest.raises(OSError, match=os.strerror(code)):
        fsync(tmp_path)


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_a_sum_is_that_of_all_bytes_and_ticks_with_each_chunk(tmp_path: Path, size: int):
    data, ticks = os.urandom(size), []
    (tmp_path / "图").write_bytes(data)
    assert sha256_of(tmp_path / "图", ticks.append) == hashlib.sha256(data).hexdigest()
    assert sum(ticks) == size and len(ticks) == -(-size // CHUNK)


def test_removing_takes_a_link_and_not_what_it_names(tmp_path: Path):
    make_empty(tmp_path / "kept" / "inner")
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "file").touch()
    for name in ("link", "file", "missing"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"] and names(tmp_path / "kept") == ["inner"]
    remove(tmp_path / "kept")
    assert names(tmp_path) == []


# ---- folders


def stage(final: Path, text: str, **options: Any) -> None:
    with staged(final, **options) as folder:
        assert folder.parent == final.parent and names(folder) == []
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)


def read(final: Path) -> str:
    return (final / "inner" / "file").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_appears_whole_and_replaces_another(tmp_path: Path, name: str):
    final = tmp_path / "made too" / name
    stage(final, "old", replace=False)
    (final / "more").touch()
    stage(final, "new", replace=True)
    assert names(final.parent) == [name] and names(final) == ["inner"] and read(final) == "new"


def test_only_an_empty_folder_gives_way_unless_told(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    stage(tmp_path / "empty", "new", replace=False)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
        stage(tmp_path / "empty", "newer", replace=False)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(NotADirectoryError):
        stage(tmp_path / "file", "new", replace=True)
    assert (
        names(tmp_path) == ["empty", "file"]
        and read(tmp_path / "empty") == "new"
        and (tmp_path / "file").read_text() == "a file"
    )


def test_a_link_to_a_folder_gives_way_and_the_folder_stays(tmp_path: Path):
    stage(tmp_path / "theirs", "theirs", replace=False)
    (tmp_path / "link").symlink_to("theirs")
    stage(tmp_path / "link", "ours", replace=True)
    assert (
        read(tmp_path / "link") == "ours"
        and read(tmp_path / "theirs") == "theirs"
        and names(tmp_path) == ["link", "theirs"]
    )


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_fails_at_any_sync_leaves_what_was_there(tmp_path: Path, monkeypatch, there: bool):
    """Also at the very last one, when the folder has its name already."""
    final, sync, calls, refused = tmp_path / "a", os.fsync, 0, -1

    def refuse(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    stage(final, "old", replace=False)
    assert calls == 4, "the file, its folder, the folder, the one around it"
    if not there:
        remove(final)
    for refused in range(1, 5):
        calls = 0
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            stage(final, "new", replace=True)
        assert names(tmp_path) == (["a"] if there else []) and (not there or read(final) == "old"), refused
    stage(final, "new", replace=True, sync=False)
    assert calls == 4 and read(final) == "new"


@pytest.mark.parametrize("nth", [1, 2])
def test_a_rename_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch, nth: int):
    stage(tmp_path / "a", "old", replace=False)
    rename, calls = Path.rename, []

    def refuse(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == nth:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        stage(tmp_path / "a", "new", replace=True)
    assert names(tmp_path) == ["a"] and read(tmp_path / "a") == "old"


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(tmp_path: Path):
    for role in ("partial", "old"):
        make_empty(tmp_path / f".a.{role}-{os.getpid()}" / "left")
    stage(tmp_path / "a", "old", replace=False)
    remove(tmp_path / "staging")
    make_empty(tmp_path / "staging")
    publish(tmp_path / "staging", tmp_path / "a", replace=True)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == []


# ---- locks


@pytest.mark.slow
def test_a_lock_keeps_processes_and_threads_out_until_its_holder_is_killed(tmp_path: Path):
    path, got = tmp_path / "锁", []
    holder = child("with locked(path):\n print('ready', flush=True)\n sys.stdin.read()", path)

    def wait() -> None:
        with locked(path):
            got.append(len(got))

    try:
        with pytest.raises(Busy), locked(path, wait=False):
            pass
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
        assert got == [], "all of them wait"
    finally:
        holder.kill()
        holder.wait()
    for thread in threads:
        thread.join(60)
    assert got == [0, 1, 2]
    with locked(path), pytest.raises(Busy), locked(path, wait=False):  # in the same thread too
        pass
    with locked(path, wait=False):
        pass


def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "lock"):
        with pytest.raises(OSError), locked(path):
            pass
        with pytest.raises(OSError):
            hold(path)


def test_a_file_system_without_locks_is_an_error_and_leaves_no_other_kind_of_lock(
    tmp_path: Path, monkeypatch
):
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for call in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, call, refuse)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)), locked(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        hold(tmp_path / "lock")


def test_who_holds_a_lock_is_told_and_asking_does_not_take_it(tmp_path: Path):
    path = tmp_path / ".lock"
    assert is_held(path) is False
    holder = child("held = hold(path)\nprint('ready', flush=True)\nsys.stdin.read()", path)
    try:
        assert is_held(path) is True
        with pytest.raises(Busy, match=rf"^process {holder.pid} on "):
            hold(path)
        assert path.read_text().startswith(f"process {holder.pid} on "), (
            "who does not get it leaves it as it is"
        )
    finally:
        holder.kill()
        holder.wait()
    assert is_held(path) is False
    with hold(path):
        assert path.read_text().split()[:2] == ["process", str(os.getpid())]


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path):
    code = """
held = hold(path)
if os.fork() == 0:
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""
    parent = child(code, tmp_path / "lock")
    parent.kill()
    parent.wait()
    hold(tmp_path / "lock").close()
    parent.communicate("")


# ---- space


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch):
    status = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: status if path == tmp_path else pytest.fail(str(path)))
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "a" / "b", tmp_path / "file" / "c"):
        assert existing(place) == tmp_path and free_bytes(place) == status.f_bavail * status.f_frsize


def test_a_disk_that_cannot_be_asked_is_an_error(tmp_path: Path, monkeypatch):
    failing(monkeypatch, "statvfs", errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        free_bytes(tmp_path)


def test_it_needs_nothing_heavy():
    """Whoever only reads imports it; the lock's package is for whoever locks."""
    code = (
        "import sys, unigen.files; print(sorted({'torch', 'numpy', 'filelock', 'fcntl'} &"
        " sys.modules.keys()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
