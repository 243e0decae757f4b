"""safetensors files: where each tensor lies, reading any run of its elements, and writing one tensor after
another.

A tensor may lie in one file, or in pieces over several: what the processes of a sharded run each wrote. The
index of such a set, ``NAME.safetensors.index.json``, is the usual one (``weight_map``: tensor -> file) with
one entry more::

    "pieces": {tensor: {"dtype": "F32", "shape": [...], "parts": [[file, start, stop], ...]}}

A part is a 1-D tensor of the same name in its file: elements [start, stop) of the flattened whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from unigen.files import atomic
from unigen.model.config import CheckpointFolderError, read_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = "ema.safetensors"
CHUNK = 1 << 24  # elements or bytes handled at a time

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]]
"""Name -> dtype, shape, and what makes the tensor; any device and layout."""


@dataclass(frozen=True)
class ByteRange:
    """Elements [start, stop) of a flattened tensor, from byte ``offset`` of a file on."""

    file: Path
    offset: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies; the parts are in order and cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[ByteRange, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor in host memory of its own, in the stored dtype; with ``start`` or ``stop``, those
        elements of it, flattened."""
        whole = start == 0 and stop is None
        tensor = torch.empty((self.numel if stop is None else stop) - start, dtype=self.dtype)
        self._fill(tensor, start)
        return tensor.view(self.shape) if whole else tensor

    def read_into(self, out: Tensor, start: int = 0) -> None:
        """Elements [start, start + len(out)) into the flat tensor ``out`` of any device and dtype, a chunk at
        a time."""
        if out.device.type == "cpu" and out.dtype == self.dtype and out.is_contiguous():
            self._fill(out, start)
            return
        for at in range(0, len(out), CHUNK):
            piece = out[at : at + CHUNK]
            piece.copy_(self.read(start + at, start + at + len(piece)))

    def _fill(self, out: Tensor, start: int) -> None:
        assert start >= 0 and start + len(out) <= self.numel, (start, len(out), self.shape)
        if not len(out):
            return
        view, size = memoryview(out.detach().view(torch.uint8).numpy()), self.dtype.itemsize
        stop = start + len(out)
        for part in self.parts:
            a, b = max(start, part.start), min(stop, part.stop)
            if a < b:
                _read_bytes(
                    part.file,
                    part.offset + (a - part.start) * size,
                    view[(a - start) * size : (b - start) * size],
                )


def _read_bytes(file: Path, offset: int, view: memoryview) -> None:
    with open(file, "rb", buffering=0) as f:
        f.seek(offset)
        done = 0
        while done < len(view):
            got = f.readinto(view[done : done + (1 << 30)])
            if not got:
                raise CheckpointFolderError(f"{file} ends too early. Fix: download or copy it again")
            done += got


# ---- where things lie


def scan_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, from its header alone.

    Raises:
        CheckpointFolderError: the file is missing, damaged or truncated.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError("its header length makes no sense")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not all(isinstance(n, int) and n >= 0 for n in (start, end, *entry["shape"])):
                raise ValueError(f"{name} has shape {entry['shape']} at bytes {start} to {end}")
            if 8 + length + end > size:
                raise ValueError(
                    f"it is truncated: {name} ends at byte {8 + length + end:,}, the file at {size:,}"
                )
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            numel = torch.Size(shape).numel()
            if end - start != numel * dtype.itemsize:
                raise ValueError(f"{name} has {end - start} bytes, not those of shape {shape}")
            tensors[name] = Stored(dtype, shape, (ByteRange(path, 8 + length + start, 0, numel),))
        return tensors
    except FileNotFoundError:
        raise CheckpointFolderError(
            f"{path} is missing. Fix: check the path, or download the whole repository"
        ) from None
    except OSError as error:
        raise CheckpointFolderError(
            f"{path} cannot be read ({error}). Fix: check the path and its permissions"
        ) from error
    except KeyError as error:
        raise CheckpointFolderError(
            f"{path} has a tensor of dtype or entry {error}, which is not supported"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointFolderError(
            f"{path} is not a whole safetensors file: {error}. Fix: download or copy it again"
        ) from None


def scan_folder(folder: Path, prefer: tuple[str, ...] = (WEIGHTS, "model.safetensors")) -> dict[str, Stored]:
    """The model's tensors in a checkpoint folder: ``ema.safetensors``, a sharded set with its index, or
    ``model.safetensors``."""
    if not folder.is_dir():
        raise CheckpointFolderError(
            f"{folder} is not a folder; model_path must be the folder of a BAGEL checkpoint. Fix: check the"
            " path"
        )
    for name in prefer:
        if (found := scan_set(folder, name)) is not None:
            return found
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return _scan_index(indexes[0])
    raise CheckpointFolderError(
        f"{folder} has neither {WEIGHTS} nor a sharded set (*.safetensors.index.json). "
        "Fix: check the path, or download the whole repository"
    )


def scan_set(folder: Path, name: str) -> dict[str, Stored] | None:
    """The tensors of ``name`` or of the set that ``name.index.json`` describes; None where there is
    neither."""
    if (folder / name).exists():
        return scan_safetensors(folder / name)
    if (folder / f"{name}.index.json").exists():
        return _scan_index(folder / f"{name}.index.json")
    return None


def _scan_index(index: Path) -> dict[str, Stored]:
    described = read_json(index)
    weight_map, pieces = described.get("weight_map"), described.get("pieces", {})
    if not isinstance(weight_map, dict) or not isinstance(pieces, dict):
        raise CheckpointFolderError(f"{index} has no weight_map. Fix: download it again")
    try:
        wanted = {file for file in weight_map.values()} | {
            part[0] for entry in pieces.values() for part in entry["parts"]
        }
        for file in wanted:
            if PurePosixPath(file).name != file or file in ("", ".."):
                raise CheckpointFolderError(
                    f"{index} names {file!r}, outside of its folder. Fix: do not use this checkpoint"
                )
        files = {file: scan_safetensors(index.parent / file) for file in sorted(wanted)}
        for file, tensors in files.items():
            missing = [name for name, at in weight_map.items() if at == file and name not in tensors]
            if missing:
                raise CheckpointFolderError(
                    f"{index.parent / file} lacks {few(missing)}, which {index.name} promises. Fix: download"
                    " it again"
                )
        found = {name: files[file][name] for name, file in weight_map.items()}
        return found | {name: _join(index, name, entry, files) for name, entry in pieces.items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointFolderError(
            f"{index} makes no sense ({type(error).__name__}: {error}). Fix: download it again"
        ) from None


def _join(index: Path, name: str, entry: dict[str, Any], files: dict[str, dict[str, Stored]]) -> Stored:
    """A tensor from its parts, which have to fit together without gap and overlap."""
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    parts, at = [], 0
    for file, start, stop in sorted(entry["parts"], key=lambda part: (part[1], part[2])):
        piece = files[file].get(name)
        if piece is None or piece.dtype != dtype or piece.shape != (stop - start,) or start != at:
            raise CheckpointFolderError(
                f"{index}: the parts of {name} do not fit together at element {at:,}. Fix: copy the set again"
            )
        parts.append(ByteRange(piece.parts[0].file, piece.parts[0].offset, start, stop))
        at = stop
    if at != torch.Size(shape).numel():
        raise CheckpointFolderError(
            f"{index}: the parts of {name} end at element {at:,} of {torch.Size(shape).numel():,}"
        )
    return Stored(dtype, shape, tuple(parts))


def few(names: list[str], limit: int = 20) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---- writing


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, plan: Plan) -> tuple[int, str]:
    """Writes tensors one after another, so that only one is in host memory, and brings them to the disk.

    The library's own writer wants all of them on the host at once, which for an optimiser is three times the
    weights. It also refuses shared storage; here each tensor is simply written out.

    Returns:
        Size in bytes and SHA-256 of what was written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide types first keeps every tensor aligned, as readers that map the file expect.
    order = sorted(plan, key=lambda name: -plan[name][0].itemsize)
    offset = 0
    for name in order:
        dtype, shape, _ = plan[name]
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    # `plan` may read from the very file that is being replaced
    with atomic(path, path.with_name(path.name + ".part")) as f:
        for piece in _bytes_of(len(text).to_bytes(8, "little") + text, plan, order):
            f.write(piece)
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def _bytes_of(head: bytes, plan: Plan, order: list[str]) -> Iterator[memoryview]:
    yield memoryview(head)
    for name in order:
        dtype, shape, make = plan[name]
        tensor = make().detach().to("cpu").contiguous()
        assert tensor.dtype == dtype and tuple(tensor.shape) == shape, name
        if tensor.numel():
            whole = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            for at in range(0, len(whole), CHUNK):
                yield whole[at : at + CHUNK]
            del whole
        del tensor  # before the next one is made
