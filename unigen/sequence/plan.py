"""Sample -> blocks: who sees what, which loss, transitions, guidance dropout.

The rules are those of ``docs/model.md``. An outline (kinds, lengths, labels) needs no picture to be decoded, so lengths are
known before training; :meth:`Planner.fill` adds the contents.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unigen.config import DataOptions
from unigen.sequence.grid import patchify
from unigen.sequence.images import ImageTransform, PictureError, image_size, open_image
from unigen.sequence.pack import Geometry
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import BadRecord, Block, Image, Kind, Record, Sample, Text

# Opening a file of a few pixels costs more than all that follows, so such pictures stay decoded: at most 64 MiB of them.
TINY_PICTURE, TINY_PICTURES = 4096, 16384  # bytes, pictures
Size = int | tuple[int, int, int, int]  # ids of a text; latent rows, columns, ViT rows, columns of an image


@dataclass(frozen=True)
class Draw:
    """Names the random numbers of one visit to one record: they depend on nothing else, so workers, ranks and resumes
    cannot change them."""

    seed: int
    epoch: int
    record: int
    training: bool = True  # validation drops nothing

    def key(self, purpose: str) -> int:
        text = f"{self.seed}/{self.epoch if self.training else 'validation'}/{self.record}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def choices(self, purpose: str) -> random.Random:
        return random.Random(self.key(purpose))

    def normal(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.key(purpose))


@dataclass(frozen=True)
class Transforms:
    """How pictures are resized: for the VAE, for the ViT, and for the ViT in samples that draw."""

    vae: ImageTransform
    vit: ImageTransform
    vit_edit: ImageTransform


class Planner:
    """Turns samples into blocks for one model and one set of options."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        geometry: Geometry,
        transforms: Transforms,
        options: DataOptions,
        max_length: int,
        visual_gen: bool = True,
        visual_und: bool = True,
    ):
        self.tokenizer, self.geometry, self.transforms, self.options = tokenizer, geometry, transforms, options
        self.max_length = min(max_length, options.max_sequence_length or max_length)
        self.visual_gen, self.visual_und = visual_gen, visual_und
        self._tiny: dict[object, tuple[Tensor | None, Tensor | None]] = {}

    # ---- lengths -------------------------------------------------------------------------------------------------

    def measure(self, record: Record) -> list[Size]:
        """The size of every piece; pictures are read no further than their headers.

        Raises:
            BadRecord: there is nothing to learn from, a part of the model that the record needs is left out, or its
                images and context alone exceed ``max_sequence_length``.
        """
        sample = record.sample
        self._check_parts(sample)
        draws = _draws(sample)
        vit, images = self._vit_transform(sample)
        sizes: list[Size] = []
        for i, piece in enumerate(sample):
            if isinstance(piece, Text):
                sizes.append(len(self.tokenizer.encode(piece.text)))
                if piece.target and not sizes[-1] and not self.options.train_transitions and len(sample) == 1:
                    raise BadRecord("nothing_to_learn", f"piece {i}", "an empty text", "a text with content", "remove the record")
                continue
            try:
                width, height = image_size(piece.source)
            except PictureError as error:
                raise BadRecord(error.code, f"piece {i}", f"{error.name}: {error.problem}", "a readable picture", error.cure) from error
            w, h = self.transforms.vae.size(width, height) if draws else (0, 0)
            vw, vh = vit.size(width, height, images) if self.visual_und else (0, 0)
            stride, patch = self.geometry.latent_stride, self.geometry.vit_patch
            sizes.append((h // stride, w // stride, vh // patch, vw // patch))
        self._check_length(sample, sizes)
        return sizes

    def length(self, sample: Sample, sizes: Sequence[Size], draw: Draw) -> int:
        """Tokens of the sample in this visit."""
        return sum(len(block) for block in self.outline(sample, sizes, draw))

    def _check_parts(self, sample: Sample) -> None:
        for i, piece in enumerate(sample):
            if isinstance(piece, Image) and piece.target and not self.visual_gen:
                raise BadRecord(
                    "image_target_without_visual_gen", f"piece {i}", "an image to draw", "text targets only, because visual_gen is false",
                    "set visual_gen to true, or remove the record",
                )  # fmt: skip
            if isinstance(piece, Image) and not self.visual_und and not _draws(sample):
                raise BadRecord(
                    "image_without_visual_und", f"piece {i}", "an image to look at", "no images, because visual_und is false",
                    "set visual_und to true, or remove the record",
                )  # fmt: skip

    def _check_length(self, sample: Sample, sizes: Sequence[Size]) -> None:
        blocks = self._blocks(sample, sizes, copies=True)
        fixed = sum(len(b) for b in blocks if not (b.kind == Kind.TEXT and b.loss))
        least = fixed + sum(2 + min(b.length, 1) for b in blocks if b.kind == Kind.TEXT and b.loss)
        if least > self.max_length:
            images = sum(len(b) for b in blocks if b.kind != Kind.TEXT)
            raise BadRecord(
                "too_long", "sample", f"{images:,} tokens of images and {fixed - images:,} of context text",
                f"at most max_sequence_length = {self.max_length:,} tokens before any text target",
                "lower max_image_tokens, raise max_sequence_length, or split the record",
            )  # fmt: skip

    # ---- structure -----------------------------------------------------------------------------------------------

    def outline(self, sample: Sample, sizes: Sequence[Size], draw: Draw) -> list[Block]:
        """The blocks of a sample in one visit, without contents: copies of targets, labels, dropout, cut."""
        o, choose = self.options, draw.choices("structure")
        blocks = self._blocks(sample, sizes, copies=choose.random() < o.single_image_stop_prob)
        if draw.training and _draws(sample):
            chance = {Kind.TEXT: o.text_cond_dropout_prob, Kind.VIT: o.vit_cond_dropout_prob, Kind.CLEAN: o.vae_cond_dropout_prob}
            for block in blocks:
                # One number a block, also where it cannot be dropped: an option then changes no other choice.
                if choose.random() < chance.get(block.kind, 0.0) and not block.loss:
                    block.dropped = True
        return self._cut(blocks)

    def _blocks(self, sample: Sample, sizes: Sequence[Size], copies: bool) -> list[Block]:
        """``copies``: an answer of one single image, last in the sample, gets its clean copies too."""
        draws = _draws(sample)
        blocks: list[Block] = []
        for i, (piece, size) in enumerate(zip(sample, sizes, strict=True)):
            follower = self._follower(sample, i) if self.options.train_transitions else None
            if isinstance(size, int):
                blocks.append(Block(Kind.TEXT, size, i, loss=piece.target, closing_label=follower))
                continue
            latent, vit = size[:2], size[2:]
            shown = []
            if piece.target:
                blocks.append(Block(Kind.NOISED, latent[0] * latent[1], i, latent, loss=True))
            if not piece.target or self._copied(sample, i, copies):
                shown = [(Kind.CLEAN, latent)] * draws + [(Kind.VIT, vit)] * self.visual_und
            blocks += [Block(kind, grid[0] * grid[1], i, grid) for kind, grid in shown]
            if shown:
                blocks[-1].closing_label = follower
        return blocks

    def _copied(self, sample: Sample, i: int, copies: bool) -> bool:
        """Do clean copies follow target image ``i``? Where anything follows that must see it; and, with transitions, at
        the end of an answer of several pieces, or of a single one in a share of the draws."""
        if i + 1 < len(sample):
            return True
        if not self.options.train_transitions:
            return False
        alone = i == 0 or not sample[i - 1].target
        return copies if alone else True

    def _follower(self, sample: Sample, i: int) -> int | None:
        """The token that opens what comes after piece ``i`` (a transition's label), if an answer goes on or ends there."""
        special = self.tokenizer.special
        if i + 1 < len(sample) and sample[i + 1].target:
            return special.text_start if isinstance(sample[i + 1], Text) else special.image_start
        return special.end if sample[i].target else None

    def _cut(self, blocks: list[Block]) -> list[Block]:
        over = sum(len(b) for b in blocks) - self.max_length
        for block in reversed(blocks):
            if over <= 0:
                break
            if block.kind == Kind.TEXT and block.loss and block.length > 1:
                taken = min(over, block.length - 1)
                block.length, block.cut, over = block.length - taken, True, over - taken
        return blocks

    # ---- contents ------------------------------------------------------------------------------------------------

    def fill(self, sample: Sample, blocks: Sequence[Block], draw: Draw) -> list[Block]:
        """The blocks with ids, pixels, patches, noise and times.

        Raises:
            PictureError: a picture cannot be decoded.
        """
        vit, images = self._vit_transform(sample)
        time, noise, posterior = (draw.normal(purpose) for purpose in ("time", "noise", "posterior"))
        opened: dict[int, Block] = {}  # what the blocks of one picture share
        filled = []
        for block in blocks:
            piece = sample[block.piece]
            if isinstance(piece, Text):
                ids = self.tokenizer.encode(piece.text)
                filled.append(replace(block, ids=ids[: block.length], cut_label=ids[block.length] if block.cut else -100))
                continue
            u = float(torch.randn((), generator=time)) if block.kind == Kind.NOISED else float("-inf")
            if block.dropped:
                filled.append(block)
                continue
            if block.piece not in opened:
                shared = opened[block.piece] = Block(Kind.CLEAN, 0)
                shared.pixels, shared.patches = self._look(piece, _draws(sample), vit, images)
                if shared.pixels is not None and self.geometry.posterior:
                    rows, columns = (n // self.geometry.latent_stride for n in shared.pixels.shape[1:])
                    p = self.geometry.latent_patch
                    shared.posterior = torch.randn(self.geometry.patch_dim // p**2, rows * p, columns * p, generator=posterior)
            shared = opened[block.piece]
            if block.kind == Kind.VIT:
                filled.append(replace(block, patches=shared.patches))
            else:
                drawn = torch.randn(block.length, self.geometry.patch_dim, generator=noise) if block.kind == Kind.NOISED else None
                filled.append(replace(block, pixels=shared.pixels, posterior=shared.posterior, noise=drawn, u=u))
        return filled

    def _look(self, piece: Image, draws: bool, vit: ImageTransform, images: int) -> tuple[Tensor | None, Tensor | None]:
        """What the VAE (where the sample draws) and the ViT see of a picture: pixels [3, H, W], patches [N, patch * patch * 3]."""
        key = (piece.source, draws, images) if isinstance(piece.source, str | Path) else None
        if key in self._tiny:
            return self._tiny[key]
        picture = open_image(piece.source)
        pixels = self.transforms.vae(picture) if draws else None
        patches = None
        if self.visual_und:
            same = pixels is not None and vit.size(*picture.size, images) == tuple(pixels.shape[:0:-1])
            patches = patchify(pixels if same else vit(picture, images), self.geometry.vit_patch)
        size = sum(t.nbytes for t in (pixels, patches) if t is not None)
        if key is not None and size <= TINY_PICTURE and len(self._tiny) < TINY_PICTURES:
            self._tiny[key] = pixels, patches
        return pixels, patches

    def _vit_transform(self, sample: Sample) -> tuple[ImageTransform, int]:
        """The ViT's transform for this sample, and over how many pictures it spreads its pixels."""
        if _draws(sample):
            return self.transforms.vit_edit, 1
        return self.transforms.vit, max(1, sum(isinstance(piece, Image) for piece in sample))


def _draws(sample: Sample) -> bool:
    """Does the model have to draw in this sample?"""
    return any(isinstance(piece, Image) and piece.target for piece in sample)
