"""Which files may be opened as pictures: regular ones, outside the kernel's own file systems, inside a folder
where one is set.

A path is looked at before anything is opened, since opening alone can act: a named pipe waits, a device
starts, a file of ``/proc`` is made up on the spot. ``O_PATH`` takes hold of the file without opening it; what
was looked at is then opened through that hold, so nothing can be put in its place in between.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO

from unigen.config import UserError
from unigen.printing import printable

# larger files are refused: a picture of 64 megapixels in 8-bit RGB, uncompressed, has 192 MB
MAX_BYTES = 256 * 1024**2

# File systems that hold no files of users: the kernel answers their reads, and some act on them.
_KERNEL = {
    "proc", "sysfs", "devtmpfs", "devpts", "mqueue", "debugfs", "tracefs", "securityfs", "cgroup", "cgroup2",
    "cpuset", "pstore", "bpf",
    "configfs", "fusectl", "binfmt_misc", "hugetlbfs", "efivarfs", "nsfs", "selinuxfs", "smackfs",
    "apparmorfs", "rpc_pipefs", "nfsd",
    "sockfs", "pipefs", "anon_inodefs", "functionfs",
}  # fmt: skip
_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")
_MAX_LINKS = 40  # as Linux
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_LOOK = getattr(os, "O_PATH", None)  # Linux


class PictureError(UserError):
    """A picture that cannot be used; its string says which, what is wrong with it, and the fix.

    ``code`` is stable: ``missing_picture``, ``not_a_file``, ``outside_root``, ``unreadable_picture``,
    ``not_a_picture``, ``broken_picture``, ``huge_picture``, ``unsupported_picture`` or ``changed_picture``.
    """

    def __init__(self, code: str, name: str, problem: str, fix: str):
        self.code, self.name, self.problem, self.fix = (
            code,
            *(printable(text) for text in (name, problem, fix)),
        )
        super().__init__(self.code, self.name, self.problem, self.fix)

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}. Fix: {self.fix}"


@dataclass(frozen=True)
class Confined:
    """The path of a picture that must lie in the folder ``root``, for data that one does not trust. ``str()``
    is the path.

    What counts is where the opened file lies after all links are resolved, and ``root`` itself may be reached
    by links. A hard link inside ``root`` to a file outside cannot be told from that file; it takes write
    access to the same disk to make one.
    """

    path: str | Path
    root: str | Path

    def __str__(self) -> str:
        return str(self.path)


def open_file(path: str | Path | Confined) -> BinaryIO:
    """The regular file at ``path``, opened for reading.

    Raises:
        PictureError: ``missing_picture``, ``not_a_file`` (a folder, pipe, socket or device, or anything
            reached through ``/proc``, ``/sys`` or ``/dev``), ``outside_root`` (of a :class:`Confined`),
            ``huge_picture`` (more than 256 MiB), or ``unreadable_picture``. Nothing was opened then.
    """
    name = str(path)
    root = path.root if isinstance(path, Confined) else None
    try:
        if _LOOK is not None and _proc_is_there():
            descriptor = _open_held(name, root)
        else:
            descriptor = _open_looked_at(name, root)
    except PictureError:  # itself a ValueError
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        if root is not None and not _within(_resolved(name), _resolved(root)):
            raise _outside(name, root) from None  # whether there is a file is not told either
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise PictureError(
                "missing_picture", name, "there is no such file", "correct the path or put the picture there"
            ) from None
        problem = f"it cannot be opened ({getattr(error, 'strerror', None) or error})"
        raise PictureError(
            "unreadable_picture", name, problem, "check the path and the permissions"
        ) from None
    return os.fdopen(descriptor, "rb")


def _open_held(name: str, root: str | Path | None) -> int:
    """A descriptor of the file ``name``, through a hold on it that cannot be exchanged. Raises OSError,
    ValueError or PictureError."""
    assert _LOOK is not None
    held = os.open(name, _LOOK | os.O_CLOEXEC)
    try:
        handle = f"/proc/self/fd/{held}"
        real = os.readlink(handle)
        if root is not None and not _within(real, _real_root(name, root)):
            raise _outside(name, root)
        _check(name, os.fstat(held))
        # Where links or ".." were followed, the way itself may lead through /proc to an ordinary file.
        if real != _absolute(name) and _leads_through_kernel(name):
            raise _not_a_file(name)
        return os.open(handle, _FLAGS)
    finally:
        os.close(held)


def _open_looked_at(name: str, root: str | Path | None) -> int:
    """As :func:`_open_held` where the system has no such hold: looked at first, and again once it is open.

    Links are followed once, before everything else. What remains possible is that a folder on the way is
    exchanged twice in between.
    """
    os.stat(name)  # says what is wrong where nothing is there; realpath does not
    real = os.path.realpath(name)
    if root is not None and not _within(real, os.path.realpath(root)):
        raise _outside(name, root)
    before = os.lstat(real)
    _check(name, before)
    if _leads_through_kernel(name):
        raise _not_a_file(name)
    descriptor = os.open(real, _FLAGS | getattr(os, "O_NOFOLLOW", 0))
    after = os.fstat(descriptor)
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino) or os.path.realpath(real) != real:
        os.close(descriptor)
        raise PictureError(
            "unreadable_picture",
            name,
            "it was exchanged while it was opened",
            "leave the file alone and try again",
        )
    return descriptor


def _check(name: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or _is_kernel(found.st_dev):
        raise _not_a_file(name)
    if found.st_size > MAX_BYTES:
        problem = f"the file has {found.st_size:,} bytes, above {MAX_BYTES:,}"
        raise PictureError(
            "huge_picture", name, problem, "save it compressed, as PNG, JPEG or WebP, or scale it down"
        )


def _not_a_file(name: str) -> PictureError:
    problem = "it is a folder, pipe, socket or device, or it is reached through /proc, /sys or /dev"
    return PictureError("not_a_file", name, problem, "name a regular file that holds a picture")


def _outside(name: str, root: str | Path) -> PictureError:
    problem = f"it lies outside the folder {root}, in which all pictures must lie (links are followed first)"
    return PictureError(
        "outside_root", name, problem, "move the picture into that folder, or name another data_root"
    )


def _real_root(name: str, root: str | Path) -> str:
    """Where the folder ``root`` lies. Resolved at every use: a relative one, or a link, may change its
    meaning."""
    assert _LOOK is not None
    try:
        held = os.open(root, _LOOK | os.O_CLOEXEC | os.O_DIRECTORY)
    except (OSError, ValueError):
        problem = f"the folder {root}, in which all pictures must lie, does not exist"
        raise PictureError("outside_root", name, problem, "name an existing folder as data_root") from None
    try:
        return os.readlink(f"/proc/self/fd/{held}")
    finally:
        os.close(held)


def _within(real: str, root: str) -> bool:
    return real.startswith(root if root.endswith("/") else root + "/")


def _resolved(path: str | Path) -> str:
    """As ``realpath``, also of what does not exist; empty where there can be no such path."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return ""


def _absolute(name: str) -> str:
    return name if name.startswith(os.sep) else os.path.join(os.getcwd(), name)


def _leads_through_kernel(name: str) -> bool:
    """Does the way to ``name``, links followed one by one, touch a file system of the kernel?"""
    here, ahead, links = os.sep, _absolute(name).split(os.sep)[::-1], 0
    while ahead:
        part = ahead.pop()
        if part in ("", os.curdir):
            continue
        if part == os.pardir:
            here = os.path.dirname(here)
            continue
        here = os.path.join(here, part)
        found = os.lstat(here)
        if _is_kernel(found.st_dev):
            return True
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(here)
            ahead += target.split(os.sep)[::-1]
            here = os.sep if target.startswith(os.sep) else os.path.dirname(here)
    return False


@cache
def _proc_is_there() -> bool:
    return os.path.isdir("/proc/self/fd")


@lru_cache(maxsize=1024)
def _is_kernel(device: int) -> bool:
    """Is ``device`` (``st_dev``) a file system of the kernel? Read once for each device number."""
    return device in _kernel_devices()


def _kernel_devices() -> set[int]:
    """The device numbers of the kernel's file systems, and of what is mounted as ``/proc``, ``/sys`` and
    ``/dev`` (containers put a tmpfs there), but for ordinary file systems further down, as ``/dev/shm``."""
    found = set()
    for folder in _KERNEL_FOLDERS:
        try:
            found.add(os.stat(folder).st_dev)
        except OSError:
            continue
    found.discard(os.stat(os.sep).st_dev)
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounts = file.read().splitlines()
    except OSError:
        return found
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        if after.split(" ")[0] in _KERNEL:
            major, _, minor = before.split(" ")[2].partition(":")
            found.add(os.makedev(int(major), int(minor)))
    return found
