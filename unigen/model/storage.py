"""safetensors files: where each tensor lies, reading any run of its elements, and writing one tensor after
another.

A tensor may lie in one file, or in pieces over several: what the processes of a sharded run each wrote. The
index of such a set, ``NAME.safetensors.index.json``, is the usual one (``weight_map``: tensor -> file) with
one entry more::

    "pieces": {tensor: {"dtype": "F32", "shape": [...], "parts": [[file, start, stop], ...]}}

A part is a 1-D tensor of the same name in its file: elements [start, stop) of the flattened whole.

What reads headers alone needs no PyTorch, so it is imported where tensors are made.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from unigen import foreign
from unigen.config import UserError
from unigen.files import atomic, json_of
from unigen.foreign import ForeignFileError, known_mistake, roots_of
from unigen.model.mistakes import fix_of, fix_of_place
from unigen.schema import Items, Number, Rule, String, Table, short, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]]
    """Name -> dtype, shape, and what makes the tensor; any device and layout."""

# the format's name of a dtype -> PyTorch's name, and bytes of an element
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
_CODES = {f"torch.{name}": code for code, (name, _) in DTYPES.items()}
WEIGHTS = "ema.safetensors"
INDEX = ".index.json"  # behind the name of a set of several files
ORIGIN = "quantised_from"  # of config.json: the digest of the model whose matrices were quantised
CHUNK = 1 << 24  # elements or bytes handled at a time
# of a file: 7B and its optimiser have 5,000 tensors and a header of 0.6 MB
MAX_HEADER, MAX_TENSORS = 16 << 20, 100_000


class CheckpointFolderError(UserError):
    """A folder does not hold a BAGEL checkpoint this program can load; the message lists what is wrong."""


def code_of(dtype: torch.dtype) -> str:
    """The format's name of a dtype, such as ``F32``. Raises KeyError for one that it does not have."""
    return _CODES[str(dtype)]


def checkpoint_json(path: Path, schema: Rule | None = None) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint folder.

    Raises:
        CheckpointFolderError: the file is missing, leads out of the folder, holds no JSON object, or breaks
            the schema.
    """
    try:
        return foreign.read_json(path, roots_of(path.parent), schema or Table())
    except ForeignFileError as error:
        if error.code == "missing":
            raise CheckpointFolderError(
                f"{path} is missing; model_path must be a folder in the layout of BAGEL-7B-MoT"
                " (llm_config.json, vit_config.json, ema.safetensors, ae.safetensors, tokenizer files). Fix:"
                f" {fix_of(path.parent)}"
            ) from None
        raise CheckpointFolderError(str(error)) from None


def config_json(folder: Path, schema: Rule | None = None) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder; {} where there is none. Raises as :func:`checkpoint_json`."""
    path = folder / "config.json"
    return checkpoint_json(path, schema) if os.path.lexists(path) else {}


def wrong(
    folder: Path, problem: str, fix: str = "take this file from the original checkpoint again"
) -> CheckpointFolderError:
    return CheckpointFolderError(f"{folder}: {problem}. Fix: {fix}")


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

    code: str  # of its dtype, a key of DTYPES
    shape: tuple[int, ...]
    parts: tuple[ByteRange, ...]

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, DTYPES[self.code][0])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.code][1]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor in host memory of its own, in the stored dtype; with ``start`` or ``stop``, those
        elements of it, flattened."""
        import torch

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

    def equals(self, other: Stored) -> bool:
        """Are dtype, shape and values those of ``other``? A chunk of both is in memory at a time."""
        import torch

        if (self.code, self.shape) != (other.code, other.shape):
            return False
        ends = [(at, min(at + CHUNK, self.numel)) for at in range(0, self.numel, CHUNK)]
        read = (((one.read(*end).view(torch.uint8)) for one in (self, other)) for end in ends)
        return all(torch.equal(*both) for both in read)

    def through(self, files: Mapping[Path, Path]) -> Stored:
        """The same, read by other names of its files."""
        parts = tuple(replace(part, file=files[part.file]) for part in self.parts)
        return replace(self, parts=parts)

    def _fill(self, out: Tensor, start: int) -> None:
        assert start >= 0 and start + len(out) <= self.numel, (start, len(out), self.shape)
        if not len(out):
            return
        import torch

        view, size = memoryview(out.detach().view(torch.uint8).numpy()), DTYPES[self.code][1]
        stop = start + len(out)
        for part in self.parts:
            a, b = max(start, part.start), min(stop, part.stop)
            if a < b:
                piece = view[(a - start) * size : (b - start) * size]
                _read_bytes(part.file, part.offset + (a - part.start) * size, piece)


StoredPieces = tuple[tuple[str, Stored], ...]
"""What follows a module's name in a key, and where that lies."""


@dataclass(frozen=True)
class Quantised(Stored):
    """A matrix of few bits, as bitsandbytes stores it: shape and dtype are those of the matrix that it was
    made of, the parts those of all its tensors. ``quantise.py`` reads it."""

    pieces: StoredPieces = ()
    origin: str = ""  # digest of the model that it was made of, where config.json says it

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for _, piece in self.pieces)

    def through(self, files: Mapping[Path, Path]) -> Stored:
        pieces = tuple((key, piece.through(files)) for key, piece in self.pieces)
        return _whole(self.code, self.shape, pieces, self.origin)

    def _fill(self, out: Tensor, start: int) -> None:
        raise AssertionError("it has no numbers of its own")


def _whole(code: str, shape: tuple[int, ...], pieces: StoredPieces, origin: str) -> Quantised:
    parts = tuple(part for _, piece in pieces for part in piece.parts)
    return Quantised(code, shape, parts, pieces, origin)


# Files that this process holds open have names here (see source.py); a file of a stranger is never opened by
# one.
HELD = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")


def _read_bytes(file: Path, offset: int, view: memoryview) -> None:
    with open(file, "rb", buffering=0) if file.parent == HELD else _open(file) as f:
        f.seek(offset)
        done = 0
        while done < len(view):
            got = f.readinto(view[done : done + (1 << 30)])
            if not got:
                raise CheckpointFolderError(f"{file} ends too early. Fix: download or copy it again")
            done += got


# ---- where things lie


def _open(path: Path) -> BinaryIO:
    try:
        return foreign.open_file(path, roots_of(path.parent))
    except ForeignFileError as error:
        missing = f"{path} is missing. Fix: check the path, or download the whole repository"
        raise CheckpointFolderError(missing if error.code == "missing" else str(error)) from None


def scan_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, from its header alone. They fill the file, without gap and
    overlap.

    Raises:
        CheckpointFolderError: the file is missing, no regular one of its folder, damaged, truncated or of
            another kind.
    """
    try:
        with _open(path) as f:
            size, start = os.fstat(f.fileno()).st_size, f.read(64)
            if found := known_mistake(start):
                raise CheckpointFolderError(f"{path}: {found[0]}. Fix: {found[1]}")
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header length makes no sense")
            if length > MAX_HEADER:
                raise ValueError(f"its header has {length:,} bytes, above {MAX_HEADER:,}")
            f.seek(8)
            header = foreign.parse_json(f.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header holds no JSON object")
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it has {len(header):,} tensors, above {MAX_TENSORS:,}")
        tensors = {name: _stored(path, 8 + length, size, name, entry) for name, entry in header.items()}
        _fills(tensors, 8 + length, size)
        return tensors
    except OSError as error:
        raise CheckpointFolderError(
            f"{path} cannot be read ({error}). Fix: check the path and its permissions"
        ) from error
    except UserError:  # itself a ValueError
        raise
    except ValueError as error:
        raise CheckpointFolderError(
            f"{path} is not a whole safetensors file: {error}. Fix: download or copy it again"
        ) from None


_SHAPE = Items(whole(0, 1 << 40), high=64)
_ENTRY = Table({"dtype": String(), "shape": _SHAPE, "data_offsets": Items(whole(0, 1 << 60), 2, 2)})


def _stored(path: Path, base: int, size: int, name: str, entry: Any) -> Stored:
    """Where a tensor of a header lies. Raises ValueError, or CheckpointFolderError for an unknown dtype."""
    if odd := _ENTRY.wrong(entry):
        raise ValueError(f"{short(name)}{odd[0]} {odd[1]}")
    code, (start, end), shape = entry["dtype"], entry["data_offsets"], tuple(entry["shape"])
    if code not in DTYPES:
        kind = ", an FP8 format" if code.startswith("F8") else ""
        raise CheckpointFolderError(
            f"{path}: {short(name)} has dtype {short(code)}{kind}, which is not read. Fix: use the weights in"
            " bfloat16, float16 or float32, from before they were quantised"
        )
    if base + end > size:
        raise ValueError(f"it is truncated: {short(name)} ends at byte {base + end:,}, the file at {size:,}")
    numel = math.prod(shape)
    if end - start != numel * DTYPES[code][1]:
        raise ValueError(f"{short(name)} has {end - start} bytes, not those of {code} and shape {shape}")
    return Stored(code, shape, (ByteRange(path, base + start, 0, numel),))


def _fills(tensors: dict[str, Stored], at: int, size: int) -> None:
    """Raises ValueError where two tensors share bytes, or bytes from ``at`` on belong to none: somebody
    else's reader would then see other weights than this one."""
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].parts[0].offset, item[1].nbytes)):
        offset = stored.parts[0].offset
        if offset != at:
            how = "overlaps the tensor before it" if offset < at else f"leaves a gap of {offset - at:,} bytes"
            raise ValueError(f"{short(name)} {how}")
        at += stored.nbytes
    if at != size:
        raise ValueError(f"{size - at:,} bytes follow the last tensor")


def need_folder(folder: Path) -> None:
    """Raises CheckpointFolderError where a checkpoint's folder is none."""
    if not folder.is_dir():
        raise CheckpointFolderError(
            f"{folder} is not a folder; model_path must be the folder of a BAGEL checkpoint. Fix:"
            f" {fix_of_place(folder)}"
        )


def scan_folder(folder: Path, prefer: tuple[str, ...] = (WEIGHTS, "model.safetensors")) -> dict[str, Stored]:
    """The model's tensors in a checkpoint folder: ``ema.safetensors``, a sharded set with its index, or
    ``model.safetensors``. What belongs to a quantised matrix is one :class:`Quantised`."""
    need_folder(folder)
    for name in prefer:
        if (found := scan_set(folder, name)) is not None:
            return _joined(folder, found)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return _joined(folder, _scan_index(indexes[0]))
    raise CheckpointFolderError(
        f"{folder} has neither {WEIGHTS} nor a sharded set (*.safetensors.index.json). Fix: {fix_of(folder)}"
    )


NF4, INT8 = "weight.quant_state.bitsandbytes__nf4", "SCB"  # keys that tell a quantised matrix
_OF_MATRIX = re.compile(r"(.+)\.(weight(?:[._].+)?|SCB)")
_STATE = Table(
    {
        "shape": Items(whole(1, 1 << 40), 2, 2),
        "dtype": String(("float32", "float16", "bfloat16")),
        "quant_type": String(("nf4",)),
        "blocksize": whole(64, 64),
    },
    {
        "nested_blocksize": whole(256, 256),
        "nested_dtype": String(("float32",)),
        "nested_offset": Number(-1e9, 1e9),
    },
)


def _joined(folder: Path, found: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors, with one entry for all those of a quantised matrix.

    Raises:
        CheckpointFolderError: what says its shape is damaged.
    """
    marked = {n.removesuffix(f".{mark}") for n in found for mark in (NF4, INT8) if n.endswith(f".{mark}")}
    if not marked:
        return found
    kept, pieces = {}, defaultdict(dict)
    for name, entry in found.items():
        match = _OF_MATRIX.fullmatch(name)
        if match and match[1] in marked:
            pieces[match[1]][match[2]] = entry
        else:
            kept[name] = entry
    origin = str(config_json(folder).get(ORIGIN) or "")
    for module, own in pieces.items():
        code, shape = "F16", own["weight"].shape if "weight" in own else ()
        if NF4 in own:
            state = own[NF4]
            try:
                said = foreign.parse_json(bytes(state.read().numpy())) if state.nbytes <= 1 << 12 else None
            except ValueError as error:
                said = str(error)
            if odd := _STATE.wrong(said):
                at = state.parts[0].file if state.parts else folder
                raise CheckpointFolderError(
                    f"{at}: {short(module)}.{NF4}{odd[0]} {odd[1]}. Fix: download or copy it again"
                )
            shape = tuple(said["shape"])
            code = next(code for code, (name, _) in DTYPES.items() if name == said["dtype"])
        kept[f"{module}.weight"] = _whole(code, shape, tuple(sorted(own.items())), origin)
    return kept


def scan_set(folder: Path, name: str) -> dict[str, Stored] | None:
    """The tensors of ``name`` or of the set that ``name.index.json`` describes; None where there is
    neither."""
    if os.path.lexists(folder / name):
        return scan_safetensors(folder / name)
    if os.path.lexists(folder / f"{name}{INDEX}"):
        return _scan_index(folder / f"{name}{INDEX}")
    return None


_PARTS = Items(Items(Rule(), 3, 3))
_PIECES = Table(rest=Table({"dtype": String(tuple(DTYPES)), "shape": _SHAPE, "parts": _PARTS}))
_INDEX = Table({"weight_map": Table(rest=String(length=255))}, {"pieces": _PIECES})
_PART = Table({"file": String(length=255), "start": whole(0, 1 << 60), "stop": whole(0, 1 << 60)})


def _scan_index(index: Path) -> dict[str, Stored]:
    described = checkpoint_json(index, _INDEX)
    weight_map, pieces = described["weight_map"], described.get("pieces", {})
    parts = [part for entry in pieces.values() for part in entry["parts"]]
    for part in parts:
        if odd := _PART.wrong(dict(zip(("file", "start", "stop"), part, strict=True))):
            key, said = odd[0].lstrip("."), odd[1]
            raise CheckpointFolderError(f"{index}: {key} of a part {said}. Fix: download it again")
    wanted = {*weight_map.values(), *(part[0] for part in parts)}
    for file in wanted:
        if PurePosixPath(file).name != file or file in ("", "..") or "\0" in file:
            raise CheckpointFolderError(
                f"{index} names {short(file)}, outside of its folder. Fix: do not use this checkpoint"
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


def _join(index: Path, name: str, entry: dict[str, Any], files: dict[str, dict[str, Stored]]) -> Stored:
    """A tensor from its parts, which have to fit together without gap and overlap."""
    code, shape = entry["dtype"], tuple(entry["shape"])
    parts, at = [], 0
    for file, start, stop in sorted(entry["parts"], key=lambda part: (part[1], part[2])):
        piece = files[file].get(name)
        if piece is None or piece.code != code or piece.shape != (stop - start,) or start != at:
            raise CheckpointFolderError(
                f"{index}: the parts of {name} do not fit together at element {at:,}. Fix: copy the set again"
            )
        parts.append(ByteRange(piece.parts[0].file, piece.parts[0].offset, start, stop))
        at = stop
    if at != math.prod(shape):
        raise CheckpointFolderError(
            f"{index}: the parts of {name} end at element {at:,} of {math.prod(shape):,}"
        )
    return Stored(code, shape, tuple(parts))


def part_name(stem: str, number: int, count: int) -> str:
    """The file of part ``number``, from 0 on, of the ``count`` that the set ``stem.safetensors`` has."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}.safetensors"


def set_files(stem: str) -> tuple[str, str]:
    """The file of a set, and the index that stands in its place where the set has several files."""
    return f"{stem}.safetensors", f"{stem}.safetensors{INDEX}"


def is_of_set(name: str, stem: str) -> bool:
    """Is it the name of a file of the set ``stem.safetensors``, or of its index?"""
    part = re.fullmatch(r"(.+)-[0-9]{5}-of-[0-9]{5}\.safetensors", name)
    return name in set_files(stem) or (part is not None and part[1] == stem)


def few(names: list[str], limit: int = 20) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---- writing


def json_bytes(value: Any) -> bytes:
    """A JSON file of a checkpoint folder."""
    return (json_of(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    path.write_bytes(json_bytes(value))


def write_safetensors(
    path: Path, plan: Plan, tick: Callable[[int], None] = lambda count: None
) -> tuple[int, str]:
    """Writes tensors one after another, so that only one is in host memory, and brings them to the disk;
    ``tick`` is told how many bytes more were written. Returns size in bytes and SHA-256 of the file.

    The library's own writer wants all of them on the host at once, which for an optimiser is three times the
    weights. It also refuses shared storage; here each tensor is simply written out.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape, _) in plan.items()}

    def place(name: str) -> tuple[bool, int]:
        return (True, -plan[name][0].itemsize) if sizes[name] % 8 else (False, 0)

    # Whole words first, then wide types keep every tensor aligned, as readers that map the file expect;
    # what is made together stays together.
    order = sorted(plan, key=place)
    offset = 0
    for name in order:
        (dtype, shape, _), end = plan[name], offset + sizes[name]
        header[name] = {"dtype": code_of(dtype), "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    # `plan` may read from the very file that is being replaced
    with atomic(path, path.with_name(path.name + ".part")) as f:
        for piece in _bytes_of(len(text).to_bytes(8, "little") + text, plan, order):
            f.write(piece)
            digest.update(piece)
            size += len(piece)
            tick(len(piece))
    return size, digest.hexdigest()


def _bytes_of(head: bytes, plan: Plan, order: list[str]) -> Iterator[memoryview]:
    import torch

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
