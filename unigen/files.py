"""Whole or not there: files and folders that take their place in one rename, locks, checksums, free space.

A kill at any moment leaves what was there before or what is new, never half of it; a power cut too, where
:func:`fsync` was called.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from unigen.others import nearest

CHUNK = 1 << 22  # bytes of a file that are read at a time
_LEFTOVER = re.compile(r"\.(.+)\.(partial|old)-[0-9]+")


class Busy(Exception):
    """Someone else holds the lock; the text is what the holder wrote into its file, or empty."""


# ---- the names of what is not yet there, or is being replaced


def draft_of(path: Path, pid: int | None = None) -> Path:
    """``.NAME.partial-PID`` beside ``path``: its name until it is whole. ``pid``: of another process."""
    return path.with_name(f".{path.name}.partial-{pid or os.getpid()}")


def aside_of(path: Path) -> Path:
    """``.NAME.old-PID`` beside ``path``: the name of a folder while its successor takes its place."""
    return path.with_name(f".{path.name}.old-{os.getpid()}")


def leftover(name: str) -> tuple[str, str] | None:
    """NAME, and ``partial`` or ``old``, of a name that a killed process may have left; None for another."""
    match = _LEFTOVER.fullmatch(name)
    return (match[1], match[2]) if match else None


# ---- files


@contextmanager
def atomic(
    path: Path, draft: Path | None = None, *, sync: bool = True, mode: int = 0o666
) -> Iterator[BinaryIO]:
    """A file opened for writing that takes the name ``path`` when the block ends, in place of what has that
    name.

    Where the block or the disk fails, the draft is removed and ``path`` is as it was.

    Args:
        path: its folder is there.
        draft: the name until then, on the same file system; default :func:`draft_of` ``path``. What has that
            name is overwritten, so writers that may meet need names of their own.
        sync: bring the bytes to the disk before the rename. Without it a power cut may leave an empty file.
        mode: permissions of the file, less the umask.

    Raises:
        OSError: it cannot be written.
    """
    draft = draft or draft_of(path)
    file = open(draft, "wb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115 (closed below)
    try:
        with file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise


def fsync(path: Path) -> None:
    """Brings a file's bytes, or the names in a folder, to the disk.

    Raises:
        OSError: that failed. A file system that has no such call for folders is no failure: there is nothing
            more to do there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path | BinaryIO, tick: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of the bytes of a file, by its path or open at its start, in hexadecimal; ``tick`` is told how
    many bytes more were read, at most ``CHUNK``."""
    if isinstance(path, Path):
        with open(path, "rb", buffering=0) as file:
            return sha256_of(file, tick)
    digest = hashlib.sha256()
    while chunk := path.read(CHUNK):
        digest.update(chunk)
        tick(len(chunk))
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all that is in it; missing is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def json_of(value: Any, **layout: Any) -> str:
    """JSON with all characters as they are, but where a name is not UTF-8: its bytes are escaped there, and
    are the same name when it is read. ``layout`` as for ``json.dumps``."""
    text = json.dumps(value, ensure_ascii=False, **layout)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, **layout)
    return text


def is_running(pid: int) -> bool:
    """Is there a process of this number on this machine?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def meant(path: Path) -> Path | None:
    """What is there and was most likely meant by a path that is not: the first part of it that is missing is
    taken for the name most like it there, whatever its suffix. None where there is none."""
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    try:
        names = {os.path.splitext(name)[0]: name for name in sorted(os.listdir(missing.parent))}
    except OSError:
        return None
    near = nearest(os.path.splitext(missing.name)[0], names)
    found = missing.with_name(names[near]) / path.relative_to(missing) if near else path
    return found if found.exists() else None


def sweep(path: Path) -> None:
    """Clears away what killed processes left beside ``path``: a draft of it is removed; what was set aside
    for a successor that never came gets its name back. Raises OSError."""
    for name in os.listdir(path.parent) if path.parent.is_dir() else []:
        of, role = leftover(name) or ("", "")
        if of != path.name or is_running(int(name.rpartition("-")[2])):
            continue
        if role == "old" and not path.exists():
            path.with_name(name).rename(path)
        else:
            remove(path.with_name(name))


# ---- folders


def make_folders(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns those that were missing, the innermost first.

    Raises:
        OSError: that failed, and no folder was made.
    """
    made: list[Path] = []
    try:
        for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            with suppress(FileExistsError):
                path.mkdir()
                made.insert(0, path)
        os.listdir(folder)  # that is no folder, where a file has its name
    except OSError:
        unmake(made)
        raise
    return made


def unmake(folders: Iterable[Path]) -> None:
    """Removes folders that :func:`make_folders` made, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def make_empty(folder: Path) -> None:
    """Makes a folder, and those above it; what has its name is removed. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove(folder)
    folder.mkdir()


@contextmanager
def staged(final: Path, *, replace: bool, sync: bool = True) -> Iterator[Path]:
    """An empty folder, :func:`draft_of` ``final``, that takes the name ``final`` when the block ends (see
    :func:`publish`), and is removed where anything fails. With ``sync`` all that is in it is brought to the
    disk first. Raises OSError."""
    staging = draft_of(final)
    try:
        make_empty(staging)
        yield staging
        if sync:
            for path in [*sorted(staging.rglob("*")), staging]:
                fsync(path)
        publish(staging, final, replace=replace, sync=sync)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, final: Path, *, replace: bool, sync: bool = True) -> None:
    """Gives a folder its name. Where that fails, also at the last moment, both names are as they were.

    Args:
        staging: the folder, beside ``final``.
        final: its name from now on.
        replace: a folder of that name is set aside (see :func:`aside_of`) first, and removed afterwards. Else
            only an empty one gives way.
        sync: bring the new name to the disk.

    Raises:
        OSError: a rename or the disk failed.
    """
    aside = aside_of(final)
    replacing = replace and final.is_dir()
    if replacing:
        remove(aside)
        final.rename(aside)
    try:
        staging.rename(final)
        if sync:
            fsync(final.parent)
    except BaseException:
        if not staging.exists():
            final.rename(staging)
        if replacing:
            aside.rename(final)
        raise
    if replacing:
        with suppress(OSError):  # a link to a folder
            aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)


# ---- locks: the system lets go of them however their process ends


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock file ``path`` against other processes and threads.

    Raises:
        Busy: it is held, and ``wait`` is false.
        OSError: it cannot be opened, or the file system has no locks.
    """
    import filelock  # here, since it takes longer to import than all that is above

    lock = filelock.FileLock(path, fallback_to_soft=False)  # that would be a file that outlives its process
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        raise Busy from None
    try:
        yield
    finally:
        lock.release()


def hold(path: Path) -> IO[str]:
    """Holds the lock file ``path`` until the file returned is closed or the process ends, and writes down who
    holds it.

    It is a record lock, in place of that of :func:`locked`: :func:`is_held` can ask for it, also from another
    machine.

    Raises:
        Busy: another process holds it; with what that wrote.
        OSError: it cannot be opened, or the file system has no locks.
    """
    import fcntl

    def alone(name: str, flags: int) -> int:  # no link, whose end would be emptied
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    file = open(path, "a+", encoding="utf-8", opener=alone)  # noqa: SIM115 (it stays open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            file.close()  # its holder has removed it meanwhile
            return hold(path)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise Busy(owner) from None
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def is_held(path: Path) -> bool | None:
    """Does another process hold a lock by :func:`hold`? Asked for only, never taken: who wants it now must
    get it. None: unknown."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            answer = fcntl.fcntl(
                file, fcntl.F_GETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            )
            return struct.unpack("hhqqi0q", answer)[0] != fcntl.F_UNLCK
    except FileNotFoundError:
        return False
    except (OSError, struct.error):
        return None


# ---- space


def cache_folder() -> Path:
    """``$UNIGEN_CACHE``, or ``~/.cache/unigen``."""
    return Path(os.environ.get("UNIGEN_CACHE") or "~/.cache/unigen").expanduser().absolute()


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write on the disk of a folder, which need not exist yet. Raises
    OSError."""
    status = os.statvfs(existing(folder))
    return status.f_bavail * status.f_frsize


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = Path(os.path.abspath(folder))
    return next(path for path in (folder, *folder.parents) if path.is_dir())
