"""The store of encoded pictures that ``unigen cache`` fills and training reads: files by key, whole or
absent.

A key is a digest of everything an entry depends on: the picture's bytes, what decoding and resizing make of
them, the encoder's weights and the dtype it computes in. Change any and the key is another, so a stale entry
is never found.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from unigen.config import UserError
from unigen.files import atomic, free_bytes
from unigen.foreign import ForeignFileError, read_bytes, read_json
from unigen.model.codec import VaeConfig
from unigen.schema import Rule, Table
from unigen.sequence.contents import PIXELS, View
from unigen.sequence.types import Pack

log = logging.getLogger(__name__)

VERSION = 1  # of keys and entries
MARKER = "unigen-cache.json"
MAX_ENTRY = 256 << 20  # bytes; the ViT's answer for the largest picture has 11 MB
ABANDONED = 3600  # seconds after which a file still being written has no writer any more
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART = re.compile(r"\.[0-9a-f]{64}\.\w+\.part")
_CHECKSUM, _UNSET = b'"checksum":"', b"00000000"  # its place in the header, its digits while it is computed


class CacheError(UserError):
    """The cache folder cannot be used; the message says why and the fix."""


@dataclass(frozen=True)
class Encoder:
    """What an encoder's answer depends on besides the picture."""

    name: str  # vae or vit
    weights: str  # digest of its weights and config
    dtype: str  # what it computes in, such as bfloat16


def about(encoder: Encoder, picture: str, view: View) -> dict[str, str]:
    """What an entry is of, as texts; :func:`entry_key` digests them. ``picture`` is the digest of the
    picture's bytes."""
    size = view.vae if encoder.name == "vae" else view.vit
    assert size is not None, f"the {encoder.name} does not see this picture"
    return {
        "version": str(VERSION),
        "encoder": encoder.name,
        "picture": picture,
        "size": "{}x{}".format(*size),
        # a JPEG may be decoded smaller where that suffices for all its uses
        "decoded": "{}x{}".format(*view.decoded),
        "pixels": str(PIXELS),
        "weights": encoder.weights,
        "dtype": encoder.dtype,
    }


def entry_key(encoder: Encoder, picture: str, view: View) -> str:
    """The key of an entry, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(about(encoder, picture, view), sort_keys=True).encode()).hexdigest()


class Store:
    """A folder of entries, ``ab/cd/abcd....safetensors``, and of notes on the encoders they are of. Any
    number of processes may read and write it at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._told: set[str] = set()

    @classmethod
    def open(cls, folder: Path | str) -> Store:
        """A store that is there.

        Raises:
            CacheError: the folder is missing, or is no cache of this version.
        """
        folder = Path(folder)
        try:
            found = read_json(folder / MARKER, [folder], Table({"unigen_cache": Rule()}))["unigen_cache"]
        except ForeignFileError:
            problem = "holds no cache of encoded pictures" if folder.is_dir() else "is not a folder"
            raise CacheError(
                f"cache_dir {folder} {problem}. Fix: fill it with unigen cache, or leave cache_dir out"
            ) from None
        if found != VERSION:
            raise CacheError(
                f"cache_dir {folder} is a cache of version {found}; this program reads version {VERSION}."
                " Fix: fill another folder with unigen cache"
            )
        return cls(folder)

    @classmethod
    def create(cls, folder: Path | str) -> Store:
        """The store in ``folder``, made where there is none.

        Raises:
            CacheError: the folder cannot be written, or holds something else.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / MARKER).exists():
                # Files of other processes that are making the same store right now are no strangers.
                others = [name for name in os.listdir(folder) if MARKER not in name]
                if others and not (folder / MARKER).exists():
                    raise CacheError(
                        f"cache_dir {folder} holds other files ({', '.join(sorted(others)[:3])}). Fix:"
                        " choose an empty or a new folder"
                    )
                _write(folder / MARKER, json.dumps({"unigen_cache": VERSION}).encode() + b"\n")
        except OSError as error:
            raise _failed(folder, error) from error
        return cls.open(folder)

    def introduce(self, encoder: Encoder) -> None:
        """Notes that the store has entries of this encoder. Raises CacheError."""
        try:
            self._note(encoder).parent.mkdir(exist_ok=True)
            _write(self._note(encoder), json.dumps(vars(encoder), indent=1).encode() + b"\n")
        except OSError as error:
            raise _failed(self.folder, error) from error

    def knows(self, encoder: Encoder) -> bool:
        """Was this encoder introduced? If not, there is nothing to find."""
        return self._note(encoder).is_file()

    def _note(self, encoder: Encoder) -> Path:
        return self.folder / "encoders" / f"{encoder.name}-{encoder.dtype}-{encoder.weights[:32]}.json"

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:4] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry in host memory; None where it is missing, or damaged (which is logged
        once)."""
        path = self.path(key)
        try:
            return _decode(read_bytes(path, [self.folder], MAX_ENTRY), key)
        except ForeignFileError as error:
            if error.code != "missing":
                self.tell(key, error.problem)
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            self.tell(key, error)
            return None

    def tell(self, key: str, problem: object) -> None:
        """Warns, once, of an entry that cannot be used."""
        if key not in self._told:
            self._told.add(key)
            log.warning(
                "%s is damaged (%s): it is not used; the next run of unigen cache writes it anew",
                self.path(key),
                problem,
            )

    def put(self, key: str, tensors: Mapping[str, Tensor], of: Mapping[str, str]) -> int:
        """Writes an entry whole: tensors, and ``of``, what :func:`about` says. Its bytes on disk.

        Raises:
            CacheError: the disk is full, or the folder cannot be written. What was there before is untouched.
        """
        data = _encode(key, tensors, of)
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, data, key)
        except OSError as error:
            raise _failed(self.folder, error) from error
        return len(data)

    def entries(self) -> Iterator[tuple[str, int]]:
        """(key, bytes) of every entry."""
        for path in self._files():
            if _ENTRY.fullmatch(path.name) and path.name.startswith(
                path.parent.parent.name + path.parent.name
            ):
                try:
                    yield path.stem, path.stat().st_size
                except FileNotFoundError:  # another process removed it
                    continue

    def prune(self, keep: set[str]) -> tuple[int, int]:
        """Removes all entries but ``keep``, and what killed writers left; (entries removed, their bytes)."""
        removed = freed = 0
        for key, size in list(self.entries()):
            if key not in keep:
                self.path(key).unlink(missing_ok=True)
                removed, freed = removed + 1, freed + size
        for path in self._files():
            if _PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
        return removed, freed

    def check_space(self, needed: int) -> None:
        """Raises CacheError where ``needed`` bytes do not fit onto the disk."""
        free = free_bytes(self.folder)
        if needed > free:
            raise CacheError(
                f"cache_dir {self.folder}: {needed / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB are"
                " free. Fix: make room, choose another --cache_dir, or lower --max_image_tokens"
            )

    def _files(self) -> Iterator[Path]:
        return (path for path in self.folder.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]/*") if path.is_file())


@dataclass(eq=False)
class FeatureCache:
    """What training finds in a store for one model: posteriors of its VAE, features of its frozen ViT."""

    store: Store
    vae: Encoder | None  # None where it is not to be looked for
    vit: Encoder | None  # None where it learns, or there is none
    config: VaeConfig  # says how latents are normalised
    sizes: tuple[int, int] | None = None  # pixels of a ViT patch's side, and numbers of its feature

    def posterior(self, picture: str, view: View) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation [C, h, w] of the picture's latent before normalisation; None where
        there is no entry."""
        if self.vae is None:
            return None
        assert view.vae is not None
        f = self.config.downsample
        shape = (self.config.z_channels, view.vae[1] // f, view.vae[0] // f)
        found = self._entry(entry_key(self.vae, picture, view), {"mean": shape, "std": shape})
        return (found["mean"], found["std"]) if found is not None else None

    def features(self, picture: str, view: View) -> Tensor | None:
        """What the ViT makes of the picture, [patches, width]; None where there is no entry."""
        if self.vit is None:
            return None
        assert view.vit is not None and self.sizes is not None
        patch, width = self.sizes
        shape = ((view.vit[0] // patch) * (view.vit[1] // patch), width)
        found = self._entry(entry_key(self.vit, picture, view), {"features": shape})
        return found["features"] if found is not None else None

    def _entry(self, key: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
        """An entry whose tensors are floats of these shapes; another, which a whole cache of someone else may
        hold, is damaged."""
        found = self.store.get(key)
        if found is None:
            return None
        if all(
            name in found and tuple(found[name].shape) == shape and found[name].is_floating_point()
            for name, shape in shapes.items()
        ):
            return found
        self.store.tell(key, "its tensors are not those of this picture")
        return None

    def latent(self, posterior: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        """The normalised latent [C, h, w] that ``noise`` [C, h, w] draws, bit for bit the codec's."""
        return self.config.latent(*posterior, noise)


@dataclass
class CacheTally:
    """How many of the pictures that a run looked up in a cache were there; one that both encoders look at
    counts twice, and one that nothing is looked up for not at all."""

    cache: FeatureCache | None
    ready: int = 0
    encoded: int = 0

    def add(self, pack: Pack) -> None:
        if self.cache is not None:
            self.ready += pack.n_ready
            self.encoded += len(pack.vae_pixels) * (self.cache.vae is not None)
            self.encoded += (len(pack.vit_lengths) - len(pack.vit_features)) * (self.cache.vit is not None)

    def __str__(self) -> str:
        share = self.ready / max(self.ready + self.encoded, 1)
        return (
            f"{self.ready:,} pictures found in the cache ({share:.1%}), {self.encoded:,} missing and encoded"
        )


# ---- the bytes of an entry: a safetensors file whose metadata hold a CRC-32 of all of it


def _encode(key: str, tensors: Mapping[str, Tensor], of: Mapping[str, str]) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, {**of, "key": key, "checksum": _UNSET.decode()})
    at = _checksum_at(data)
    return b"".join([data[:at], b"%08x" % zlib.crc32(data), data[at + len(_UNSET) :]])


def _decode(data: bytes, key: str) -> dict[str, Tensor]:
    """The tensors. Raises ValueError where anything in ``data`` is not as it was written."""
    at = _checksum_at(data)
    view, end = memoryview(data), at + len(_UNSET)
    if b"%08x" % zlib.crc32(view[end:], zlib.crc32(_UNSET, zlib.crc32(view[:at]))) != data[at:end]:
        raise ValueError("its checksum differs")
    if json.loads(data[8 : 8 + _header_length(data)])["__metadata__"]["key"] != key:
        raise ValueError("it is the entry of another key")
    return safetensors.torch.load(data)


def _checksum_at(data: bytes) -> int:
    at = data.find(_CHECKSUM, 8, 8 + _header_length(data))
    if at < 0:
        raise ValueError("it is truncated, or has no checksum")
    return at + len(_CHECKSUM)


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _write(path: Path, data: bytes, key: str = "0" * 64) -> None:
    """Writes a file so that it is there whole or not at all, whoever else writes it now."""
    with atomic(
        path, path.with_name(f".{MARKER if path.name == MARKER else key}.{uuid.uuid4().hex}.part")
    ) as file:
        file.write(data)


def _failed(folder: Path, error: OSError) -> CacheError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "Fix: make room and run the command again; what is written stays usable"
        return CacheError(f"cache_dir {folder}: the disk is full ({error.strerror}). {fix}")
    return CacheError(f"cache_dir {folder} cannot be written ({error}). Fix: choose another --cache_dir")
