"""What a command may write for its user: a free place, or that of an earlier output of the same command.

One mark says who wrote something. A page names the command as its ``generator``, JSON as its first key, and a
folder holds a :data:`RECEIPT` with such a key. Places are made sure of before the work begins, and taken by
one rename (``files.py``) when it is done.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from unigen.config import UserError
from unigen.files import atomic, draft_of, make_folders, sha256_of, sweep, unmake

RECEIPT = ".unigen.json"  # in a folder that a command wrote: which one
RUN = ("config.json", "train.log")  # make a folder that a training wrote
# A folder that holds all the names of a row was written by this program, and holds no data: that of a
# training, of answers, of prompts that were drawn, of encoded pictures, a checkpoint, a model. The rooms
# above make the names.
OUTPUTS = (
    RUN,
    ("answers.json", "batches"),
    ("answers.json", "metrics.json"),
    (".unigen/answers.json",),
    ("unigen-cache.json",),
    ("manifest.json", "training_config.json"),
    ("llm_config.json",),
)
# What people keep in files of these names is data, weights, pictures or archives: no page, no report.
_KEPT = re.compile(
    r"\.(jsonl?|ndjson|parquet|arrow|feather|csv|tsv|gz|zst|bz2|xz|tar|tgz|zip|7z|rar|safetensors|bin|pt|pth"
    r"|ckpt|gguf|onnx|h5|hdf5|npy|npz|pkl|pickle|msgpack|model|db|sqlite|[lm]db|lance|png|jpe?g|webp|gif|bmp"
    r"|tiff?|avif|heic|jp2|psd|mp4|mov|avi|mkv|webm|mp3|wav|flac|pdf)"
)
# How a file begins that a command wrote: a page names it as its generator, JSON as its first key, YAML in its
# first line.
_MARK = re.compile(
    rb'(?:<!doctype html>.{0,400}?<meta name="generator" content=|\{\s*"generator": |# generator: )'
    rb'"(unigen [a-z]+)"',
    re.DOTALL,
)


def output_file(
    option: str, value: str | Path, by: str, inputs: Iterable[str | Path | None] = (), suffix: str = ""
) -> Path:
    """The place of a file that a command will write for its user, made sure of before the work begins:
    nothing else is there, and it can be written. Links are followed.

    Args:
        option: that names it, for messages.
        value: what the user gave.
        by: the command that writes it, as ``unigen check``.
        inputs: what the command reads, files and folders.
        suffix: of data, which this output may have, as ``.jsonl``.

    Raises:
        UserError: it is an input, looks like data, is there and not by this command, or cannot be written.
    """
    with _sure(option, value, "name another file") as refuse:
        given = [Path(name) for name in inputs if name]
        path = Path(os.path.realpath(value))
        if path.is_dir():
            raise refuse("which is a folder", "name a file")
        if any(same(path, one) for one in given):
            raise refuse("which this command reads")
        for kind in {_kind(Path(value)), _kind(path)} - {"", suffix}:
            raise refuse(
                f"and a {kind} file is no place for what is written there", "name a file of another kind"
            )
        folder = next((one for one in given if one.is_dir() and _inside(path, one)), None)
        if folder and _kind(path):
            raise refuse(f"which would be read as data of {folder} the next time", "name a file elsewhere")
        if foreign := _foreign(path, by):
            raise refuse(foreign)
        sweep(path)
        _try(path)
    return path


def output_folder(option: str, value: str | Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The place of a folder that a command will write into, as :func:`output_file` makes sure of a file's.
    What is in it already is another question (:func:`claim`)."""
    with _sure(option, value, "name another folder") as refuse:
        path = Path(value)
        if path.exists() and not path.is_dir():
            raise refuse("which cannot be written (it is no folder)")
        if any(same(path, Path(name)) for name in inputs if name):
            raise refuse("which this command reads")
        if _kind(path) and not path.is_dir():
            raise refuse(f"but a folder is written there, no {_kind(path)} file")
        _try(path / "unigen")
    return path


@contextmanager
def _sure(option: str, value: str | Path, fix: str) -> Iterator[Callable[..., UserError]]:
    """Gives what makes the refusal of a place, of a problem and a fix (default ``fix``); what the system
    refuses is one, too."""

    def refuse(problem: str, fix: str = fix) -> UserError:
        return UserError(f"{option} is {value}, {problem}. Fix: {fix}{_flag(option)}")

    try:
        yield refuse
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise refuse(f"which cannot be written ({getattr(error, 'strerror', None) or error})") from error


@contextmanager
def unwritten(option: str, path: str | Path) -> Iterator[None]:
    """Turns the errors of a disk that fails after all into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option} is {path}, which cannot be written ({error.strerror or error}). Fix: free space there,"
            f" or name another place{_flag(option)}"
        ) from error


def refuse_foreign(path: Path, by: str) -> None:
    """Raises UserError where something is at ``path`` that the command ``by`` did not write."""
    if foreign := _foreign(path, by):
        raise UserError(f"{path}: it is there already, {foreign}. Fix: name another place, or move it away")


def written_by(path: Path) -> str:
    """The command, as ``unigen check``, whose mark a file begins with; empty where there is none."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            match = _MARK.match(file.read(1024))
    except OSError:
        return ""
    return match[1].decode() if match else ""


def holds(folder: Path, names: Iterable[str]) -> bool:
    """Is something in the folder under each of the names?"""
    return all(os.path.exists(folder / name) for name in names)


def is_output(folder: Path) -> bool:
    """Did this program write the folder, as no data? Within somebody's data it is none of them. What was
    fetched is data."""
    if any(holds(folder, names) for names in OUTPUTS):
        return True
    compared = written_by(folder / "report.html") == "unigen evaluate"  # answers of several, each in a folder
    return compared or written_by(folder / RECEIPT) not in ("", "unigen fetch")


def _foreign(path: Path, by: str) -> str:
    """What is at ``path`` that is not ours, as a part of a sentence; empty for nothing, for an empty file,
    which holds nothing to lose, and for what ``by`` wrote."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ""
    if not stat.S_ISREG(status.st_mode):
        return "which is no regular file"
    if status.st_size and (found := written_by(path)) != by:
        return f"which {found or 'someone else'} wrote, not {by}"
    return ""


def _flag(option: str) -> str:
    return f" (--{option} ...)" if option.isidentifier() else ""


def _kind(path: Path) -> str:
    """The suffix of a name that people give to what they keep; empty for another."""
    return path.suffix.lower() if _KEPT.fullmatch(path.suffix.lower()) else ""


def same(path: Path, other: Path) -> bool:
    """Are they one file or folder, by whatever names?"""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(other)


def _inside(path: Path, folder: Path) -> bool:
    return any(same(parent, folder) for parent in path.parents)


def _try(path: Path) -> None:
    """Writes a few bytes under the name that a draft of ``path`` has, and leaves no trace. Raises OSError."""
    made = make_folders(Path(os.path.abspath(path.parent)))
    draft = draft_of(path)
    try:
        draft.write_bytes(bytes(4096))
    finally:
        with suppress(OSError):
            draft.unlink()
        unmake(made)


def claim(option: str, folder: Path, by: str, taken: Iterable[str]) -> None:
    """Makes a folder the command's own: from now on what has one of the command's names in it is its own.

    Args:
        option: that names the folder, for messages.
        taken: names that it will write.

    Raises:
        UserError: one of them is there, and the folder is not the command's own yet.
        OSError: the folder cannot be written.
    """
    found = next((name for name in (RECEIPT, *taken) if os.path.lexists(folder / name)), None)
    if written_by(folder / RECEIPT) == by:  # maybe since a moment: several processes claim it together
        return
    if found:
        raise UserError(
            f"{option} {folder} holds {found}, which {by} did not write. Fix: name a new or an empty folder"
            f" (--{option} ...)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_receipt(folder, by, {})


def write_receipt(folder: Path, by: str, files: Mapping[str, list[str]]) -> None:
    """Notes in a folder that it is the command's, and the SHA-256 that each of the files may have that it
    answers for. Raises OSError."""
    with atomic(folder / RECEIPT) as file:
        file.write(json.dumps({"generator": by, "files": files}, indent=1).encode() + b"\n")


def read_receipt(folder: Path, by: str) -> dict[str, list[str]]:
    """What :func:`write_receipt` noted; empty where the folder is not the command's."""
    if written_by(folder / RECEIPT) != by:
        return {}
    try:
        files = json.loads((folder / RECEIPT).read_bytes())["files"]
        return {name: list(map(str, sums)) for name, sums in files.items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return {}


def is_own(path: Path, sums: Iterable[str]) -> bool:
    """Is it a regular file with one of these SHA-256?"""
    return path.is_file() and not path.is_symlink() and sha256_of(path) in sums


def stranger(folder: Path, receipt: str, sums: Mapping[str, Iterable[str]]) -> str:
    """A file in a folder, by its name there, that is neither its ``receipt`` nor one with one of its SHA-256
    in ``sums``, one that is not hidden where there is one; empty where there is none."""
    for path in sorted(
        folder.rglob("*"), key=lambda path: (path.relative_to(folder).parts[0][0] == ".", path)
    ):
        name = path.relative_to(folder).as_posix()
        inner = path.is_dir() and not path.is_symlink() and any(path.iterdir())
        if (name != receipt or not sums) and not inner and not is_own(path, sums.get(name, ())):
            return name
    return ""
