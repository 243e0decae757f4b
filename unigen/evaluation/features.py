"""Pictures to features, by networks whose name says all that a feature depends on; and their cache."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from unigen.bars import Bar
from unigen.cache.encoders import Encoders
from unigen.config import Config, UserError
from unigen.evaluation.answers import digest_of_picture
from unigen.evaluation.inception import SIDE, Inception, resize_as_tensorflow
from unigen.evaluation.results import CannotRun, libraries, same_length
from unigen.evaluation.towers import PictureTower, short_name, weights_digest
from unigen.files import atomic, sha256_of
from unigen.printing import first_line
from unigen.sequence.grid import grid_positions
from unigen.sequence.images import bicubic_levels, open_image
from unigen.sequence.transform import ImageTransform

Picture = Any  # a path, a Confined path, bytes, or a PIL image
INCEPTION_DIGEST = "6726825d"  # how the SHA-256 of the published file begins; its name says so, too
VIT_SIDE = 378  # pixels; SigLIP's own, a multiple of its patches of 14
AS_IT_IS = ImageTransform(max_size=1, min_size=1, stride=1)  # always asked for an explicit size


@dataclass(frozen=True)
class Features:
    """Features [n, d] float32, and what they are of: see :class:`Extractor`."""

    values: np.ndarray
    identity: str
    libraries: str

    def __len__(self) -> int:
        return len(self.values)


@dataclass
class Extractor:
    """Pictures to :class:`Features`.

    Args:
        identity: name and digest of the weights, the resize, and what of the output is the feature, such as
            ``dinov2-vitl14@3fe1...|pil-bicubic-224|pooled``.
        libraries: versions that the feature depends on.
        prepare: an RGB picture to the network's input [3, S, S].
        run: inputs [B, 3, S, S] to features [B, d].
    """

    identity: str
    libraries: str
    prepare: Callable[[Any], Tensor]
    run: Callable[[Tensor], Tensor]
    device: str = "cpu"
    batch_size: int = 32

    def __call__(
        self,
        pictures: Sequence[Picture],
        cache: FeatureStore | None = None,
        tick: Callable[[int], None] = lambda done: None,
    ) -> Features:
        """Features of n pictures, n > 0. ``tick`` is called with how many are done.

        Raises:
            PictureError: one cannot be read.
            CannotRun: there are no pictures, or the network gives numbers that are not finite.
        """
        same_length(pictures)
        found: list[Any] = []
        with ThreadPoolExecutor(4) as pool, Bar("features of pictures", len(pictures)) as shown:
            for start in range(0, len(pictures), self.batch_size):
                batch = pictures[start : start + self.batch_size]
                keys = [self.key(digest) for digest in pool.map(digest_of_picture, batch)]
                held: list[Any] = [cache.get(key) if cache else None for key in keys]
                missing = [place for place, feature in enumerate(held) if feature is None]
                if missing:
                    opened = map(open_image, (batch[place] for place in missing))
                    inputs = torch.stack(list(pool.map(self.prepare, opened)))
                    with torch.inference_mode():
                        features = self.run(inputs.to(self.device)).float().cpu().numpy()
                    for place, feature in zip(missing, features, strict=True):
                        held[place] = feature
                        if cache:
                            cache.put(keys[place], feature)
                found += held
                shown.update(len(batch))
                tick(start + len(batch))
        features = np.stack(found)
        if not np.isfinite(features).all():
            raise CannotRun(
                f"{self.identity.partition('|')[0]} gives numbers that are not finite", "check its weights"
            )
        return Features(features, self.identity, self.libraries)

    def key(self, picture: str) -> str:
        """The cache's key of a picture, given the digest of its bytes."""
        return hashlib.sha256(json.dumps([picture, self.identity, self.libraries]).encode()).hexdigest()


def resized(picture: Any, size: int, *, crop: bool = False) -> Tensor:
    """[3, size, size] float32 in [0, 1] of an RGB picture, by PIL's bicubic filter, rounded to levels.

    Args:
        crop: scale the short side to ``size`` and take the centre, as CLIP's own processing does; otherwise
            the whole picture, its shape changed, as distances of distributions are computed.
    """
    wide = high = size
    if crop:
        scale = size / min(picture.size)
        wide, high = (max(size, int(side * scale)) for side in picture.size)
    levels = AS_IT_IS.levels(picture, size=(wide, high)).float() / 255
    left, top = (wide - size) // 2, (high - size) // 2
    return levels[:, top : top + size, left : left + size]


# ---- the networks


def tower_extractor(tower: PictureTower, *, crop: bool = False) -> Extractor:
    """The pictures' side of a CLIP or SigLIP, or a vision encoder such as DINOv2."""
    resize = f"pil-bicubic-{tower.size}" + ("-centre" if crop else "")
    return Extractor(
        f"{tower.name}|{resize}|{tower.pooling}",
        tower.libraries,
        lambda picture: resized(picture, tower.size, crop=crop),
        tower.pictures,
        tower.device,
    )


def module_extractor(
    module: nn.Module,
    name: str,
    size: int,
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    device: str = "cpu",
) -> Extractor:
    """Any module from [B, 3, size, size] to [B, d]; channels are normalised by ``mean`` and ``std``, which
    count levels from 0 to 1."""
    module = module.eval().to(device)
    shift, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    written = ",".join(f"{number:g}" for number in (*mean, *std))
    return Extractor(
        f"{name}@{weights_digest(module)}|pil-bicubic-{size}|norm={written}",
        libraries("torch", "pillow"),
        lambda picture: resized(picture, size),
        lambda pixels: module((pixels - shift) / scale),
        device,
    )


def vit_extractor(folder: str | Path, *, size: int | None = None, device: str = "cpu") -> Extractor:
    """The ViT of a BAGEL checkpoint alone: the mean of its patches' features.

    Args:
        size: side in pixels, a multiple of the patch; default 378, or what the position table has room for.

    Raises:
        CheckpointFolderError: the folder lacks a file, or one is damaged.
    """
    options = Config(model_path=str(folder), visual_gen=False, freeze_vit=True)
    encoders = Encoders.load(options, torch.device(device), torch.float32)
    vit, geometry = encoders.vit, encoders.config.geometry
    assert vit is not None
    patch, most = geometry.vit_patch, geometry.vit_patch * geometry.vit_side
    size = size or min(VIT_SIDE // patch * patch, most)
    assert size % patch == 0 and size <= most, f"size is a multiple of {patch} up to {most}"
    side = size // patch
    position = grid_positions(side, side, geometry.vit_side, geometry.interpolate).to(device)

    def run(pixels: Tensor) -> Tensor:
        n = len(pixels)
        patches = rearrange(pixels * 2 - 1, "b c (h p) (w q) -> (b h w) (p q c)", p=patch, q=patch)
        return vit(patches, position.repeat(n), [side * side] * n).view(n, side * side, -1).mean(1)

    return Extractor(
        f"bagel-vit@{weights_digest(vit)}|pil-bicubic-{size}|mean",
        libraries("torch", "pillow"),
        lambda picture: resized(picture, size),
        run,
        device,
        batch_size=8,
    )


def inception_extractor(
    weights: str | Path, *, resize: Literal["tf1", "clean"] = "tf1", device: str = "cpu"
) -> Extractor:
    """Inception v3 of FID, from a local file of its weights (see ``inception``).

    Args:
        resize: ``tf1`` as the original code's network resizes (what most published numbers used), ``clean``
            as clean-fid does: PIL's bicubic filter, not rounded.

    Raises:
        CannotRun: the file is missing or is not those weights.
    """
    fix = "place pt_inception-2015-12-05-6726825d.pth there, from the releases of mseitzer/pytorch-fid"
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network = Inception()
        missing, unexpected = network.load_state_dict(state, strict=False)
        left = [name for name in missing if not name.endswith("num_batches_tracked")]
        if left or unexpected:
            raise RuntimeError(f"its keys differ, such as {[*left, *unexpected][0]}")
    except Exception as error:  # the unpickler raises what it likes
        raise CannotRun(f"{weights} does not hold Inception's weights ({first_line(error)})", fix) from None
    network = network.requires_grad_(False).eval().to(device)
    name = "2015-12-05" if sha256_of(Path(weights)).startswith(INCEPTION_DIGEST) else "of-other-weights"

    def prepare(picture: Any) -> Tensor:
        if resize == "clean":
            return torch.from_numpy(bicubic_levels(picture, (SIDE, SIDE)))
        levels = AS_IT_IS.levels(picture, size=picture.size)
        return resize_as_tensorflow(levels[None].float())[0]

    return Extractor(
        f"inception-v3-{name}@{weights_digest(network)}|"
        f"{'tf1-bilinear' if resize == 'tf1' else 'clean-fid-bicubic'}-{SIDE}",
        libraries("torch", "pillow"),
        prepare,
        network,
        device,
    )


def load_extractor(spec: str, device: str = "cpu") -> Extractor:
    """The extractor that a text names.

    Args:
        spec: ``bagel-vit:FOLDER``, ``inception-tf1:FILE``, ``inception-clean:FILE``, or the folder (or cached
            hub name) of any vision model of transformers.

    Raises:
        CannotRun: it cannot be loaded.
    """
    kind, _, place = spec.partition(":")
    if place and kind in ("inception-tf1", "inception-clean"):
        return inception_extractor(place, resize="tf1" if kind == "inception-tf1" else "clean", device=device)
    if place and kind == "bagel-vit":
        try:
            return vit_extractor(place, device=device)
        except UserError as error:
            raise CannotRun(f"{short_name(place)} has no ViT that can be used", first_line(error)) from None
    return tower_extractor(PictureTower.load(spec, device))


# ---- the cache


@dataclass
class FeatureStore:
    """A folder of features, one small file each, whole or absent; many processes may use it at once.

    A file is named by its key (:meth:`Extractor.key`); one that is damaged counts as absent.
    """

    folder: Path

    def _path(self, key: str) -> Path:
        return Path(self.folder) / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> np.ndarray | None:
        """The feature [d], or None."""
        try:
            held = safetensors.numpy.load(self._path(key).read_bytes())
            feature = held["feature"]
            return feature if zlib.crc32(feature.tobytes()) == int(held["crc32"][0]) else None
        except (OSError, SafetensorError, KeyError, IndexError, ValueError):
            return None

    def put(self, key: str, feature: np.ndarray) -> None:
        """Stores a feature [d]. Raises OSError."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        feature = np.ascontiguousarray(feature)
        sum_of_bytes = np.array([zlib.crc32(feature.tobytes())], np.uint32)
        with atomic(path, sync=False) as file:
            file.write(safetensors.numpy.save({"feature": feature, "crc32": sum_of_bytes}))

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(Path(self.folder).glob("??/*.safetensors")))
