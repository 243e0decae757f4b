"""Files that strangers made: opened only where they are regular files inside their folder, read up to a size,
and JSON checked against a schema.

A path is looked at before anything is opened, since opening alone can act: a named pipe waits, a device
starts, a file of ``/proc`` is made up on the spot. ``O_PATH`` takes hold of the file without opening it; what
was looked at is then opened through that hold, so nothing can be put in its place in between.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from unigen.config import UserError
from unigen.schema import Rule, short

MAX_JSON = 64 << 20  # bytes; the largest JSON file of a release, a tokenizer's, has 11 MB
MAX_DEPTH = 64  # of objects and lists in each other
MAX_FILE = 1 << 43  # bytes, 8 TiB; no file of weights is larger

# How the files of pictures begin -> their usual file extension.
_PICTURE_KINDS = [
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"BM....\x00\x00\x00\x00", re.DOTALL), "bmp"),
    (re.compile(rb"II\x2a\x00|MM\x00\x2a"), "tif"),
    (re.compile(rb"....ftyp(avif|avis|mif1|miaf)", re.DOTALL), "avif"),
    (re.compile(rb"\x00\x00\x00\x0cjP  \r\n\x87\n"), "jp2"),
]

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


class ForeignFileError(UserError):
    """A file that is not opened, or whose content is refused.

    ``code`` is ``missing``, ``not_a_file``, ``outside``, ``huge``, ``unreadable`` or ``content``.
    """

    def __init__(self, code: str, name: str | Path, problem: str, fix: str):
        self.code, self.name, self.problem, self.fix = code, str(name), problem, fix
        super().__init__(code, self.name, problem, fix)

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}. Fix: {self.fix}"


# ---- opening


def open_file(path: str | Path, roots: Sequence[str | Path] = (), limit: int = MAX_FILE) -> BinaryIO:
    """The regular file at ``path``, opened for reading.

    Args:
        path: of the file.
        roots: folders; the file must lie in one of them after all links are resolved (the folders themselves
            may be reached by links). Without any it may lie anywhere. A hard link to a file elsewhere cannot
            be told from that file; it takes write access to the same disk to make one.
        limit: most bytes that it may have.

    Raises:
        ForeignFileError: ``missing``, ``not_a_file`` (a folder, pipe, socket or device, or anything reached
            through ``/proc``, ``/sys`` or ``/dev``), ``outside``, ``huge`` or ``unreadable``. Nothing was
            opened then.
    """
    name = str(path)
    try:
        if _LOOK is not None and _proc_is_there():
            descriptor = _open_held(name, roots, limit)
        else:
            descriptor = _open_looked_at(name, roots, limit)
    except ForeignFileError:  # itself a ValueError
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        if roots and not any(_within(_resolved(name), _resolved(root)) for root in roots):
            raise _outside(name, roots) from None  # whether there is a file is not told either
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise ForeignFileError(
                "missing", name, "there is no such file", "correct the path or put the file there"
            ) from None
        problem = f"it cannot be opened ({getattr(error, 'strerror', None) or error})"
        raise ForeignFileError("unreadable", name, problem, "check the path and the permissions") from None
    return os.fdopen(descriptor, "rb")


def _open_held(name: str, roots: Sequence[str | Path], limit: int) -> int:
    """A descriptor of the file ``name``, through a hold on it that cannot be exchanged. Raises OSError,
    ValueError or ForeignFileError."""
    assert _LOOK is not None
    held = os.open(name, _LOOK | os.O_CLOEXEC)
    try:
        handle = f"/proc/self/fd/{held}"
        real = os.readlink(handle)
        if roots and not any(_within(real, _real_root(name, root)) for root in roots):
            raise _outside(name, roots)
        _check(name, os.fstat(held), limit)
        # Where links or ".." were followed, the way itself may lead through /proc to an ordinary file.
        if real != _absolute(name) and _leads_through_kernel(name):
            raise _not_a_file(name)
        return os.open(handle, _FLAGS)
    finally:
        os.close(held)


def _open_looked_at(name: str, roots: Sequence[str | Path], limit: int) -> int:
    """As :func:`_open_held` where the system has no such hold: looked at first, and again once it is open.

    Links are followed once, before everything else. What remains possible is that a folder on the way is
    exchanged twice in between.
    """
    os.stat(name)  # says what is wrong where nothing is there; realpath does not
    real = os.path.realpath(name)
    if roots and not any(_within(real, os.path.realpath(root)) for root in roots):
        raise _outside(name, roots)
    before = os.lstat(real)
    _check(name, before, limit)
    if _leads_through_kernel(name):
        raise _not_a_file(name)
    descriptor = os.open(real, _FLAGS | getattr(os, "O_NOFOLLOW", 0))
    after = os.fstat(descriptor)
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino) or os.path.realpath(real) != real:
        os.close(descriptor)
        raise ForeignFileError(
            "unreadable",
            name,
            "it was exchanged while it was opened",
            "leave the file alone and try again",
        )
    return descriptor


def _check(name: str, found: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(found.st_mode) or _is_kernel(found.st_dev):
        raise _not_a_file(name)
    if found.st_size > limit:
        problem = f"the file has {found.st_size:,} bytes, above {limit:,}"
        raise ForeignFileError("huge", name, problem, "use the original file; this one cannot be it")


def _not_a_file(name: str) -> ForeignFileError:
    problem = "it is a folder, pipe, socket or device, or it is reached through /proc, /sys or /dev"
    return ForeignFileError("not_a_file", name, problem, "put a regular file there")


def _outside(name: str, roots: Sequence[str | Path]) -> ForeignFileError:
    problem = f"it lies outside the folder {roots[0]}, in which it must lie (links are followed first)"
    return ForeignFileError(
        "outside", name, problem, "remove the link, or copy the file that it leads to into the folder"
    )


def _real_root(name: str, root: str | Path) -> str:
    """Where the folder ``root`` lies. Resolved at every use: a relative one, or a link, may change its
    meaning."""
    assert _LOOK is not None
    try:
        held = os.open(root, _LOOK | os.O_CLOEXEC | os.O_DIRECTORY)
    except (OSError, ValueError):
        problem = f"the folder {root}, in which it must lie, does not exist"
        raise ForeignFileError("outside", name, problem, "name an existing folder") from None
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


# ---- reading


def roots_of(folder: Path) -> list[Path]:
    """The folders in which the files of ``folder`` may lie: itself, and for a snapshot of a Hugging Face
    cache, whose files are links, the ``blobs`` of the same repository."""
    real = Path(os.path.realpath(folder))
    blobs = real.parent.parent / "blobs"
    return [folder, blobs] if real.parent.name == "snapshots" and blobs.is_dir() else [folder]


def read_bytes(path: Path, roots: Sequence[Path], limit: int = MAX_JSON) -> bytes:
    """The bytes of a file of one of the folders ``roots``. Raises ForeignFileError."""
    with open_file(path, roots, limit) as file:
        data = file.read(limit + 1)  # it may have grown since it was looked at
    if len(data) > limit:
        raise ForeignFileError("huge", path, f"it has more than {limit:,} bytes", "use the original file")
    return data


def copy_file(path: Path, target: Path, roots: Sequence[Path], limit: int = MAX_FILE) -> None:
    """Copies a file of one of the folders ``roots``. Raises ForeignFileError, or OSError of the target."""
    with open_file(path, roots, limit) as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 22)


_MAGIC = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself", "run git lfs pull there, or"
     " download the file itself"),
    (b"GGUF", "it is a GGUF file, which is not read", "use the checkpoint's safetensors"),
    (b"PK\x03\x04", "it is a zip archive or a pickled PyTorch file, which is never loaded", "use the"
     " checkpoint's safetensors"),
    (b"\x80\x02", "it is a pickle, which is never loaded", "use the checkpoint's safetensors"),
    (b"\x80\x04", "it is a pickle, which is never loaded", "use the checkpoint's safetensors"),
    (b"\x80\x05", "it is a pickle, which is never loaded", "use the checkpoint's safetensors"),
    (b"\x1f\x8b", "it is compressed by gzip", "decompress it"),
)  # fmt: skip


def known_mistake(start: bytes) -> tuple[str, str] | None:
    """What was wrong and its fix, where the first bytes of a file (64, or all of a shorter one) show what
    commonly stands in a file's place; None for others."""
    if not start:
        return "it is empty", "download or copy it again"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:16].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "it is a web page, not the file itself", "download it again, logged in where that is needed"
    return next(((problem, fix) for magic, problem, fix in _MAGIC if start.startswith(magic)), None)


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, has a name twice in one object, or lists
    and objects nested too deeply."""
    try:
        value = json.loads(data, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        held = [item for item in level if isinstance(item, (dict, list))]
        level = [
            inner
            for item in held
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return value
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


class RepeatedName(ValueError):
    """An object of a JSON text has the ``name`` twice."""

    def __init__(self, name: str):
        super().__init__(f"it has the name {short(name)} twice in one object")
        self.name = name


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, as its ``object_pairs_hook``. Raises RepeatedName."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise RepeatedName(name)
            seen.add(name)
    return found


def _not_finite(value: Any, key: str = "") -> str | None:
    """The key of the first number that is NaN or infinite; None where there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else key
    if isinstance(value, dict):
        inside = ((f"{key}.{name}", item) for name, item in value.items())
    elif isinstance(value, list):
        inside = ((f"{key}[{i}]", item) for i, item in enumerate(value))
    else:
        return None
    return next((found for at, item in inside if (found := _not_finite(item, at)) is not None), None)


def read_json(
    path: Path,
    roots: Sequence[Path],
    schema: Rule | None = None,
    *,
    limit: int = MAX_JSON,
    finite: bool = True,
) -> Any:
    """The value of a JSON file of one of the folders ``roots``; with ``finite`` it may hold neither NaN nor
    infinite numbers, which are none of JSON's.

    Raises:
        ForeignFileError: it cannot be opened, is no JSON, or breaks the schema: with the key.
    """
    data = read_bytes(path, roots, limit)
    if found := known_mistake(data[:64]):
        raise ForeignFileError("content", path, *found)
    try:
        value = parse_json(data)
    except ValueError as error:  # of UTF-8, too
        raise ForeignFileError(
            "content", path, f"it is not valid JSON ({error})", "download or copy it again"
        ) from None
    if finite and (key := _not_finite(value)) is not None:
        raise ForeignFileError("content", path, f"{key.lstrip('.') or 'it'} is no finite number", _AGAIN)
    if schema is not None:
        require(value, schema, path)
    return value


_AGAIN = "take this file from the original checkpoint again"


def require(value: Any, schema: Rule, path: str | Path) -> None:
    """Holds a value against a schema. Raises ForeignFileError with ``path`` and the key."""
    if wrong := schema.wrong(value):
        key, said = wrong
        place = f"{key.lstrip('.')} " if key else "it "
        raise ForeignFileError("content", path, f"{place}{said}", _AGAIN)


def kind_of_start(data: bytes) -> str | None:
    """The kind of a picture (its usual file extension) by its first bytes, of which 12 suffice; None where
    they are those of no picture."""
    return next((kind for magic, kind in _PICTURE_KINDS if magic.match(data)), None)
