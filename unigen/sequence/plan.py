"""Sample -> blocks: who sees what, which loss, next-modality tokens, guidance dropout.

The rules are those of ``docs/model.md``. An outline (kinds, lengths, labels) needs no picture to be decoded,
so lengths are known before training; :meth:`Planner.fill` adds the contents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unigen.config import DataOptions
from unigen.sequence.contents import PictureCache, Seen, View, Viewer
from unigen.sequence.draw import RandomKey
from unigen.sequence.images import Confined, PictureError, bad_picture, image_size
from unigen.sequence.lengths import BLOCK_DTYPE, Grids, RecordLengths, dropout_chances
from unigen.sequence.pack import Geometry
from unigen.sequence.tokens import Tokenizer, is_media_tag
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import BadRecord, Block, Image, Kind, Record, Sample, Text

# Opening a file of a few pixels costs more than all that follows, so such pictures stay decoded: at most 64
# MiB of them.
TINY_PICTURE, TINY_PICTURES = 4096, 16384  # bytes, pictures


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
    ):
        self.tokenizer, self.geometry, self.transforms = tokenizer, geometry, transforms
        self.options = options
        self.max_length = min(max_length, options.max_sequence_length or max_length)
        self.cache: PictureCache | None = None  # set by the trainer: pictures found there are not decoded
        self._tiny: dict[object, Seen] = {}
        self._viewers: dict[tuple[bool, int], Viewer] = {}

    @property
    def identity(self) -> str:
        """A digest of everything that :meth:`token_lengths` depends on."""
        options = {field.name: getattr(self.options, field.name) for field in fields(DataOptions)}
        how = repr((self.geometry, self.transforms, options, self.max_length, self.tokenizer.identity))
        return hashlib.sha256(how.encode()).hexdigest()

    # ---- lengths

    def token_lengths(self, record: Record) -> RecordLengths:
        """What the lengths of the record's epoch passes follow from. Pictures are read no further than their
        headers.

        Raises:
            BadRecord: there is nothing to learn from, a part of the model that the record needs is left out,
                or its images and context alone exceed ``max_sequence_length``.
        """
        sample = record.sample
        self._check_parts(sample)
        viewer = self.viewer(sample)
        texts: list[int] = []
        pictures: list[Grids] = []
        for i, segment in enumerate(sample):
            if isinstance(segment, Image):
                pictures.append(self._grids_of(segment, i, viewer))
                continue
            texts += [self._tokens_of(text, i, n) for n, text in enumerate(segment.variants)]
            if segment.target and not texts[-1] and not self.options.train_transitions and len(sample) == 1:
                found, expected = "an empty text", "a text with content"
                raise BadRecord("nothing_to_learn", None, found, expected, "remove the record", segment=i)
        sizes = _sizes(sample, texts, pictures, None)
        blocks = self._blocks(sample, sizes, clean_copies=True)
        self._check_length(blocks)
        always = len(self._blocks(sample, sizes, clean_copies=False))
        draws = _draws(sample)
        rows = [
            (len(b), b.labels, b.kind, b.loss, draws and not b.loss, i >= always)
            for i, b in enumerate(blocks)
        ]
        return RecordLengths(np.array(rows, BLOCK_DTYPE), texts, pictures)

    def length(self, sample: Sample, lengths: RecordLengths, key: RandomKey) -> int:
        """Tokens of the sample in this epoch pass."""
        return sum(len(block) for block in self.outline(sample, lengths, key))

    def _grids_of(self, segment: Image, number: int, viewer: Viewer) -> Grids:
        """The grids of segment ``number``. Raises BadRecord."""
        try:
            return self._grids(viewer.view(*(segment.size or image_size(segment.source))))
        except PictureError as error:
            raise bad_picture(error, None, segment=number) from error

    def _tokens_of(self, text: str, segment: int, variant: int) -> int:
        """Tokens of caption variant ``variant`` of a segment. Raises BadRecord where it holds a control
        token."""
        control = None if self.options.allow_control_tokens else self.tokenizer.control_token(text)
        if control:
            token, at = control
            where = f"character {at + 1}" + (f" of caption variant {variant + 1}" if variant else "")
            if is_media_tag(token):
                code, found = "tag_without_picture", f"the tag {token} at {where}"
                expected = "a picture for it"
                fix = (
                    "name its picture in a field of the format (messages and ShareGPT have tags), take the"
                    " tag out, or learn it as text: --allow_control_tokens"
                )
            else:
                code, found = "control_token", f"the token {token} at {where}"
                expected = "a text that opens and closes no part of a sequence"
                fix = (
                    "take the token out of the text, or learn it as the token that it is:"
                    " --allow_control_tokens"
                )
            raise BadRecord(code, None, found, expected, fix, segment=segment)
        return len(self.tokenizer.encode(text))

    def _check_parts(self, sample: Sample) -> None:
        for i, segment in enumerate(sample):
            if not isinstance(segment, Image):
                continue
            if segment.target and not self.options.visual_gen:
                code, found, left_out = "image_target_without_visual_gen", "an image to draw", "visual_gen"
                expected = "text targets only, because visual_gen is false"
            elif not self.options.visual_und and not _draws(sample):
                code, found, left_out = "image_without_visual_und", "an image to look at", "visual_und"
                expected = "no images, because visual_und is false"
            else:
                continue
            fix = f"set {left_out} to true, or remove the record"
            raise BadRecord(code, None, found, expected, fix, segment=i)

    def _check_length(self, blocks: Sequence[Block]) -> None:
        fixed = sum(len(b) for b in blocks if not (b.kind == Kind.TEXT and b.loss))
        least = fixed + sum(2 + min(b.length, 1) for b in blocks if b.kind == Kind.TEXT and b.loss)
        if least > self.max_length:
            images = sum(len(b) for b in blocks if b.kind != Kind.TEXT)
            found = f"{images:,} tokens of images and {fixed - images:,} of context text"
            expected = f"at most max_sequence_length = {self.max_length:,} tokens before any text target"
            fix = "lower max_image_tokens, raise max_sequence_length, or split the record"
            raise BadRecord("too_long", "sample", found, expected, fix)

    # ---- structure

    def outline(self, sample: Sample, lengths: RecordLengths, key: RandomKey) -> list[Block]:
        """The blocks of a sample in one epoch pass, without contents: clean copies of targets, labels,
        dropout, cut."""
        chance_of_copies, *chances = key.structure(1 + len(lengths.blocks))
        blocks = self._blocks(
            sample,
            _sizes(sample, lengths.texts, lengths.pictures, key),
            key.all_clean_copies or chance_of_copies < self.options.single_image_stop_prob,
        )
        if key.training and _draws(sample):
            dropout = dropout_chances(self.options)
            # one number a block, also where it cannot be dropped
            for block, chance in zip(blocks, chances):
                block.dropped = not block.loss and chance < dropout[block.kind]
        return self._cut(blocks)

    def _blocks(self, sample: Sample, sizes: Sequence[int | Grids], clean_copies: bool) -> list[Block]:
        """``clean_copies``: an answer of one single image, last in the sample, gets its clean copies too."""
        draws = _draws(sample)
        blocks: list[Block] = []
        for i, (segment, size) in enumerate(zip(sample, sizes, strict=True)):
            label = self._next_modality(sample, i) if self.options.train_transitions else None
            # of a label: what it makes the model go on with, or end
            weight = sample[i + 1].weight if sample[i + 1 :] and sample[i + 1].target else segment.weight
            extra = {"closing_label": label, "closing_weight": 1.0 if label is None else weight}
            if not isinstance(size, Grids):
                text = Block(Kind.TEXT, size, i, loss=segment.target, weight=segment.weight, **extra)
                blocks.append(text)
                continue
            if segment.target:
                noised = _image_block(Kind.NOISED, size.latent, i, loss=True)
                blocks.append(replace(noised, weight=segment.weight))
            if not segment.target or self._has_clean_copies(sample, i, clean_copies):
                shown = self._shown(size, i, draws)
                blocks += shown
                if shown:
                    blocks[-1] = replace(blocks[-1], **extra)
        return blocks

    def _shown(self, grids: Grids, segment: int, draws: bool) -> list[Block]:
        """The blocks that show a picture to what follows."""
        shown = [(Kind.CLEAN, grids.latent)] * draws + [(Kind.VIT, grids.vit)] * self.options.visual_und
        return [_image_block(kind, grid, segment) for kind, grid in shown]

    def _has_clean_copies(self, sample: Sample, i: int, by_chance: bool) -> bool:
        """Do clean copies follow target image ``i``? Where anything follows that must see it; and, where
        next-modality tokens are trained, at the end of an answer of several segments, or of a single one
        where ``by_chance`` says so."""
        if i + 1 < len(sample):
            return True
        if not self.options.train_transitions:
            return False
        alone = i == 0 or not sample[i - 1].target
        return by_chance if alone else True

    def _next_modality(self, sample: Sample, i: int) -> int | None:
        """The token that opens what comes after segment ``i``, if an answer goes on or ends there: the label
        of its closing token."""
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

    # ---- contents

    def fill(self, sample: Sample, blocks: Sequence[Block], key: RandomKey) -> list[Block]:
        """The blocks with ids, pixels, patches, noise and times.

        Raises:
            PictureError: a picture cannot be decoded.
        """
        viewer = self.viewer(sample)
        time, noise, posterior = (key.generator(purpose) for purpose in ("time", "noise", "posterior"))
        opened: dict[int, Block] = {}  # what the blocks of one picture share
        filled = []
        for block in blocks:
            segment = sample[block.segment]
            if isinstance(segment, Text):
                ids = self.tokenizer.encode(segment.variants[caption_variant(segment, block.segment, key)])
                filled.append(
                    replace(
                        block, ids=ids[: block.length], cut_label=ids[block.length] if block.cut else -100
                    )
                )
                continue
            u = float(torch.randn((), generator=time)) if block.kind == Kind.NOISED else float("-inf")
            if block.dropped:
                filled.append(block)
                continue
            if block.segment not in opened:
                kinds = {b.kind for b in blocks if b.segment == block.segment and not b.dropped}
                seen = self._look(segment, viewer, kinds != {Kind.VIT}, Kind.VIT in kinds)
                self._check_grids(segment, seen, (b for b in blocks if b.segment == block.segment))
                opened[block.segment] = self._drawn(seen, posterior)
            shared = opened[block.segment]
            if block.kind == Kind.VIT:
                filled.append(replace(block, patches=shared.patches, features=shared.features))
            else:
                drawn = (
                    torch.randn(block.length, self.geometry.patch_dim, generator=noise)
                    if block.kind == Kind.NOISED
                    else None
                )
                shown = {"pixels": shared.pixels, "latent": shared.latent, "posterior": shared.posterior}
                filled.append(replace(block, **shown, noise=drawn, u=u))
        return filled

    def _check_grids(self, segment: Image, seen: Seen, blocks: Iterable[Block]) -> None:
        """Raises PictureError for a picture whose tokens are not those that were counted: it was exchanged
        for one of another size."""
        grids = self._grids(seen.view)
        for block in blocks:
            now = grids.vit if block.kind == Kind.VIT else grids.latent
            if block.grid != now:
                name = "the given bytes" if isinstance(segment.source, bytes) else str(segment.source)
                assert block.grid is not None
                was, now_is = (f"{rows} x {columns}" for rows, columns in (block.grid, now))
                problem = f"it has another size than when the data was checked ({now_is} tokens, then {was})"
                raise PictureError(
                    "changed_picture", name, problem, "leave the data alone during a run, and start it again"
                )

    def context_blocks(self, source: Any, viewer: Viewer) -> list[Block]:
        """The blocks of one context picture with their contents, nothing dropped: what inference continues.

        Raises:
            PictureError: the picture cannot be decoded.
        """
        seen = viewer.decode(source, viewer.vae is not None, viewer.vit is not None)
        blocks = self._shown(self._grids(seen.view), 0, viewer.vae is not None)
        for block in blocks:
            if block.kind == Kind.CLEAN:
                block.pixels = seen.pixels
            else:
                block.patches = seen.patches
        return blocks

    def context_length(self, size: tuple[int, int], viewer: Viewer) -> int:
        """Tokens of :meth:`context_blocks` of a picture of this width and height."""
        shown = self._shown(self._grids(viewer.view(*size)), 0, viewer.vae is not None)
        return sum(len(block) for block in shown)

    def viewer(self, sample: Sample) -> Viewer:
        """How this sample shows its pictures."""
        return self.viewer_of(_draws(sample), sum(isinstance(segment, Image) for segment in sample))

    def viewer_of(self, draws: bool, images: int) -> Viewer:
        """How samples of ``images`` pictures show them; ``draws``: the model has to draw in the sample."""
        # Pictures of samples that draw are seen one by one; those of others share the ViT's pixels.
        images = 1 if draws else max(1, images)
        if (draws, images) not in self._viewers:
            vit = self.transforms.vit_edit if draws else self.transforms.vit
            self._viewers[draws, images] = Viewer(
                self.transforms.vae if draws else None,
                vit if self.options.visual_und else None,
                images,
                self.geometry.vit_patch,
            )
        return self._viewers[draws, images]

    def _grids(self, view: View) -> Grids:
        """The grids of a picture shown so."""
        (w, h), (vw, vh) = view.vae or (0, 0), view.vit or (0, 0)
        stride, patch = self.geometry.latent_stride, self.geometry.vit_patch
        return Grids(h // stride, w // stride, vh // patch, vw // patch)

    def _look(self, segment: Image, viewer: Viewer, vae: bool, vit: bool) -> Seen:
        """The picture for the encoders that look at it."""
        source = segment.source
        known = (source, viewer, vae, vit) if isinstance(source, str | Path | Confined) else None
        if known in self._tiny:
            return self._tiny[known]
        seen = viewer.look(source, vae, vit, self.cache)
        if known is not None and seen.nbytes <= TINY_PICTURE and len(self._tiny) < TINY_PICTURES:
            self._tiny[known] = seen
        return seen

    def _drawn(self, seen: Seen, generator: torch.Generator) -> Block:
        """What the blocks of a picture share. In samples that draw every picture takes its random numbers,
        also one whose latents this pass drops: what is dropped then changes no other picture."""
        shared = Block(Kind.CLEAN, 0, pixels=seen.pixels, patches=seen.patches, features=seen.features)
        if seen.view.vae is not None and self.geometry.posterior:
            p, (columns, rows) = (
                self.geometry.latent_patch,
                (n // self.geometry.latent_stride for n in seen.view.vae),
            )
            shared.posterior = torch.randn(
                self.geometry.patch_dim // p**2, rows * p, columns * p, generator=generator
            )
        if seen.posterior is not None:
            assert self.cache is not None and shared.posterior is not None
            shared.latent = self.cache.latent(seen.posterior, shared.posterior)
        return shared


def _draws(sample: Sample) -> bool:
    """Does the model have to draw in this sample?"""
    return any(isinstance(segment, Image) and segment.target for segment in sample)


def _image_block(kind: Kind, grid: tuple[int, int], segment: int, loss: bool = False) -> Block:
    return Block(kind, grid[0] * grid[1], segment, grid, loss)


def caption_variant(text: Text, number: int, key: RandomKey | None) -> int:
    """Which of its ``variants`` this epoch pass uses of the text that is segment ``number``. Validation uses
    the first."""
    if not text.others or key is None or not key.training:
        return 0
    # the purpose has the name it always had: another would draw other variants than runs that go on
    return key.choices(f"wording/{number}").randrange(1 + len(text.others))


def _sizes(
    sample: Sample, texts: Iterable[int], pictures: Iterable[Grids], key: RandomKey | None
) -> list[int | Grids]:
    """The size of every segment: ids of a text (without ``key``: of its longest caption variant), the grids
    of an image. ``texts`` and ``pictures`` are those of :class:`RecordLengths`."""
    texts, pictures = iter(texts), iter(pictures)
    sizes: list[int | Grids] = []
    for i, segment in enumerate(sample):
        if isinstance(segment, Image):
            sizes.append(next(pictures))
        else:
            variants = [next(texts) for _ in segment.variants]
            sizes.append(max(variants) if key is None else variants[caption_variant(segment, i, key)])
    return sizes
