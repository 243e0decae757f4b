"""Files of object storage (``s3://``, ``gs://``, ``hf://`` ...), read through fsspec where the package of
their protocol is installed.

What is read is copied once into the folder ``remote`` of the cache, in a tree of the same names, and all
else sees a path there: a picture beside a remote file of records is found by its relative path as on a disk,
and after its start a training opens no connection.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from unigen.config import UserError
from unigen.files import atomic, cache_folder, free_bytes, locked
from unigen.printing import first_line

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BLOCK = 4 << 20
_DRAFT, _DEAD = ".copying-", 3600  # seconds
RESERVE = 256 << 20  # bytes that stay free on the disk of the cache


class StorageKind(NamedTuple):
    """A kind of storage."""

    package: str  # what fsspec needs to read it
    tool: str  # copies what an address names


STORES = {
    **dict.fromkeys(("s3", "s3a"), StorageKind("s3fs", "aws s3 sync s3://BUCKET DIR")),
    **dict.fromkeys(("gs", "gcs"), StorageKind("gcsfs", "gcloud storage rsync -r gs://BUCKET DIR")),
    **dict.fromkeys(("az", "abfs"), StorageKind("adlfs", "azcopy copy URL DIR --recursive")),
    "oss": StorageKind("ossfs", "ossutil cp -r oss://BUCKET DIR"),
    "cos": StorageKind("", "coscli cp -r cos://BUCKET DIR"),
    "tos": StorageKind("tosfs", "tosutil cp -r tos://BUCKET DIR"),
    "hf": StorageKind("huggingface_hub", "hf download OWNER/NAME --repo-type dataset --local-dir DIR"),
    "hdfs": StorageKind("pyarrow", "hdfs dfs -get PATH DIR"),
    "memory": StorageKind("fsspec", "cp"),  # of this process: for those who make data in Python
}
_WEB = dict.fromkeys(("http", "https"), StorageKind("aiohttp requests", "curl -LO URL"))


class RemoteError(UserError):
    """A remote file that cannot be read. ``code`` is ``missing``, ``huge`` or ``unreadable``."""

    def __init__(self, code: str, url: str, problem: str, fix: str):
        self.code, self.url, self.problem, self.fix = code, url, problem, fix
        super().__init__(code, url, problem, fix)

    def __str__(self) -> str:
        return f"{self.url}: {self.problem}. Fix: {self.fix}"


def scheme_of(text: str | os.PathLike[str]) -> str | None:
    """The scheme of an address; None for a path, and for ``file://``."""
    match = _SCHEME.match(text) if isinstance(text, str) else None
    return match[1].lower() if match and match[1].lower() != "file" else None


def path_of(text: str) -> str | None:
    """The path that a ``file:`` address names; None for another text. Raises ValueError, whose two arguments
    are why and the fix, for one of another machine."""
    if text[:6].lower() != "file:/":
        return None
    host, slash, path = text[7:].partition("/") if text[6:7] == "/" else ("", "/", text[6:])
    if not slash or host.lower() not in ("", "localhost"):
        raise ValueError("a file: address of another machine", "write the path of the file alone")
    return unquote(f"/{path}")


def local(place: str | os.PathLike[str]) -> Path:
    """The absolute path of a place: of an address that of its copy. Raises RemoteError."""
    if isinstance(place, str) and scheme_of(place):
        return copy_of(place)
    try:
        return Path(path_of(os.fspath(place)) or place).absolute()
    except ValueError as error:
        raise RemoteError("unreadable", os.fspath(place), *error.args) from None


def copy_of(url: str) -> Path:
    """Where the copy of a remote file or folder lies. Raises RemoteError for an address that names none."""
    scheme = scheme_of(url)
    assert scheme is not None
    rest = url[len(scheme) + 3 :].partition("?")[0] if scheme in _WEB else url[len(scheme) + 3 :]
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in rest:
        raise RemoteError("unreadable", url, "it names no file", "write the whole address, without ..")
    return _folder().joinpath(scheme, *parts)


def url_of(path: str | Path) -> str | None:
    """The address that a path in the folder of copies stands for, in object storage; None for any other."""
    name = os.path.normpath(path)
    if not name.startswith(f"{_folder()}{os.sep}"):
        return None
    scheme, _, rest = os.path.relpath(name, _folder()).partition(os.sep)
    return f"{scheme}://{rest.replace(os.sep, '/')}" if scheme in STORES and rest else None


@cache
def problem_with(scheme: str) -> tuple[str, str] | None:
    """Why addresses of a scheme cannot be read, and what makes them; None where they can."""
    store = STORES.get(scheme) or _WEB.get(scheme)
    if store is None:
        return f"the scheme {scheme}:, which is not read", "copy the files, and name them by paths"
    import fsspec

    with suppress(ImportError, ValueError):
        fsspec.get_filesystem_class(scheme)
        return None
    install = f"pip install {store.package}, or " if store.package else ""
    return f"an address of {scheme}:// storage, which is not read as it is", install


def tool_for(url: str) -> str:
    """The command that copies what an address names."""
    scheme = scheme_of(url)
    assert scheme is not None
    rest = url[len(scheme) + 3 :]
    tool = (STORES.get(scheme) or _WEB[scheme]).tool
    found = re.match(r"datasets/([\w.-]+/[\w.-]+)" if scheme == "hf" else r"([\w.-]+)", rest)
    if found:  # a name that a shell takes as it is
        tool = tool.replace("OWNER/NAME", found[1]).replace("BUCKET", found[1])
    return tool


def open_store(url: str) -> tuple[Any, str]:
    """The file system of an address, and what it calls the place. Raises RemoteError."""
    import fsspec

    scheme = scheme_of(url)
    assert scheme is not None
    if problem := problem_with(scheme):
        why, fix = problem
        known = scheme in STORES or scheme in _WEB
        copied = f"{fix}copy the files once ({tool_for(url)}) and name the copy" if known else fix
        raise RemoteError("unreadable", url, why, copied)
    with told_as_remote(url):
        system, place = fsspec.core.url_to_fs(url)
    return system, place.rstrip("/")


def fetch_file(url: str, target: Path, limit: int | None = None, draft: Path | None = None) -> None:
    """Copies one file. Raises RemoteError, where it has more than ``limit`` bytes as well. ``draft``: its
    name until then, for one who copies it alone."""
    system, place = open_store(url)
    with told_as_remote(url), system.open(place, "rb") as source, ExitStack() as copy:
        with copying_to(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target.parent)
            draft = draft or target.with_name(f"{_DRAFT}{uuid.uuid4().hex}")
            out = copy.enter_context(atomic(target, draft))
        size = 0
        while block := source.read(_BLOCK):
            size += len(block)
            if limit is not None and size > limit:
                raise RemoteError("huge", url, f"it has more than {limit:,} bytes", "use a smaller file")
            with copying_to(target):
                if free_bytes(target.parent) < RESERVE + len(block):
                    raise OSError("the disk is full")
                out.write(block)
        with copying_to(target):
            copy.close()


@cache
def _sweep(folder: Path) -> None:
    """Removes, once, the copies in a folder that were killed: those that have not grown for :data:`_DEAD`."""
    for path in folder.glob(f"{_DRAFT}*"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _DEAD:
                path.unlink()


def refresh(url: str, target: Path) -> None:
    """Copies one file where there is no copy of what it is now. Raises RemoteError."""
    system, place = open_store(url)
    mark = target.with_name(f".{target.name}.stamp")
    with told_as_remote(url):
        info = system.info(place)
        known = [system.ukey(place), *(str(info.get(name)) for name in ("size", "ETag", "Last-Modified"))]
        stamp = hashlib.sha256(repr(known).encode()).hexdigest()
    draft = None
    with ExitStack() as stack:
        with copying_to(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a file system without locks: several copy it, and the last copy stays
            stack.enter_context(locked(target.with_name(f".{target.name}.lock")))
            draft = target.with_name(f".{target.name}.copying")
        if target.is_file() and mark.is_file() and mark.read_text() == stamp:
            return
        fetch_file(url, target, draft=draft)
        with copying_to(target):
            mark.write_text(stamp)


def _folder() -> Path:
    return cache_folder() / "remote"


@contextmanager
def told_as_remote(url: str) -> Iterator[None]:
    """Turns what a file system raises, each its own errors, into RemoteError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        fix = "correct the address"
        raise RemoteError("missing", url, "there is no such file", fix) from None
    except Exception as error:
        why = first_line(error)[:200]
        fix = f"check the address and your credentials, or copy the files ({tool_for(url)})"
        raise RemoteError("unreadable", url, f"it cannot be read ({why})", fix) from error


@contextmanager
def copying_to(target: Path) -> Iterator[None]:
    """Tells what hinders the writing of a copy in the cache. Raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{target.parent}: a copy cannot be written there ({error.strerror or error}). Fix: make room, or"
            " set UNIGEN_CACHE to another folder"
        ) from None
