"""Pictures as the encoders take them, and their answers where a cache knows them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from unigen.sequence.grid import patchify
from unigen.sequence.images import Confined, PictureError, image_size, open_image, read_picture
from unigen.sequence.transform import ImageTransform

# one more whenever decoding or resizing changes a number: encodings that were cached before no longer fit
PIXELS = 1

PixelSize = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class View:
    """How a sample shows a picture: the sizes at which the VAE and the ViT see it, None where one does not
    look."""

    vae: PixelSize | None
    vit: PixelSize | None

    @property
    def decoded(self) -> PixelSize:
        """The size that decoding has to suffice for: that of the larger use."""
        sizes = [size for size in (self.vae, self.vit) if size is not None]
        return max(w for w, _ in sizes), max(h for _, h in sizes)


class PictureCache(Protocol):
    """What an encoder made of a picture earlier. ``picture`` is :func:`digest` of its bytes."""

    def posterior(self, picture: str, view: View) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation [C, h, w] of the VAE's latent before normalisation, or None."""

    def features(self, picture: str, view: View) -> Tensor | None:
        """[patches, width] of the ViT, or None."""

    def latent(self, posterior: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        """The normalised latent [C, h, w] that ``noise`` draws."""


@dataclass
class Seen:
    """A picture: of each encoder that looks at it what it takes, or what it made of that."""

    view: View
    pixels: Tensor | None = None  # [3, H, W] uint8, for the VAE
    posterior: tuple[Tensor, Tensor] | None = None  # mean, standard deviation [C, h, w]
    patches: Tensor | None = None  # [N, patch * patch * 3] uint8, for the ViT
    features: Tensor | None = None  # [N, ViT width]

    @property
    def nbytes(self) -> int:
        tensors = (self.pixels, *(self.posterior or ()), self.patches, self.features)
        return sum(t.nbytes for t in tensors if t is not None)


@dataclass(frozen=True)
class Viewer:
    """How a sample shows its pictures."""

    vae: ImageTransform | None  # None where the sample does not draw
    vit: ImageTransform | None  # None where the model has none
    images: int  # pictures of the sample, which share the ViT's pixels
    patch: int  # pixels of a ViT patch's side

    def view(self, width: int, height: int) -> View:
        """Of a picture of this size."""
        return View(
            self.vae.size(width, height) if self.vae is not None else None,
            self.vit.size(width, height, self.images) if self.vit is not None else None,
        )

    def look(self, source: Any, vae: bool, vit: bool, cache: PictureCache | None = None) -> Seen:
        """Opens a picture for the encoders that look at it in this epoch pass, where the cache does not know
        their answers.

        Raises:
            PictureError: it cannot be read or decoded.
        """
        if cache is None or not isinstance(source, str | Path | Confined | bytes):
            return self.decode(source, vae, vit)
        data = read_picture(source)
        with named(source):
            view, picture = self.view(*image_size(data)), digest(data)
            posterior = cache.posterior(picture, view) if vae else None
            features = cache.features(picture, view) if vit else None
            seen = Seen(view)
            if (vae and posterior is None) or (vit and features is None):
                seen = self.decode(data, vae and posterior is None, vit and features is None)
        seen.posterior, seen.features = posterior, features
        return seen

    def decode(self, source: Any, vae: bool, vit: bool) -> Seen:
        """The picture as the encoders take it. Raises PictureError."""
        views: list[View] = []

        def fit(width: int, height: int) -> PixelSize:
            views.append(self.view(width, height))
            # whoever looks in this pass: which random choices were made changes no pixel
            return views[0].decoded

        picture = open_image(source, fit)
        view = views[0] if views else self.view(*picture.size)
        seen = Seen(view)
        if vae:
            assert self.vae is not None
            seen.pixels = self.vae.levels(picture, size=view.vae)
        if vit:
            assert self.vit is not None and self.vit.stride == self.patch
            same = seen.pixels is not None and view.vae == view.vit
            seen.patches = (
                patchify(seen.pixels, self.patch) if same else self.vit.patches(picture, size=view.vit)
            )
        return seen


def digest(data: bytes) -> str:
    """Of a picture's bytes."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def named(source: Any) -> Iterator[None]:
    """Errors about bytes that were read from ``source`` name it."""
    try:
        yield
    except PictureError as error:
        if isinstance(source, bytes):
            raise
        raise PictureError(error.code, str(source), error.problem, error.fix) from error
