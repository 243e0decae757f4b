"""Sample -> blocks: who sees what, which loss, transitions, guidance dropout.

The rules are those of ``docs/model.md``. An outline (kinds, lengths, labels) needs no picture to be decoded,
so lengths are known before training; :meth:`Planner.fill` adds the contents.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unigen.config import DataOptions
from unigen.sequence.contents import PictureCache, Seen, View, Viewer
from unigen.sequence.images import Confined, ImageTransform, PictureError, image_size
from unigen.sequence.pack import Geometry
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import BadRecord, Block, Image, Kind, Record, Sample, Text

# Opening a file of a few pixels costs more than all that follows, so such pictures stay decoded: at most 64
# MiB of them.
TINY_PICTURE, TINY_PICTURES = 4096, 16384  # bytes, pictures
# of a block's number in a measured row: kind (2), droppable, only with copies, trained; the rest is its
# length
_BITS = 5


@dataclass(frozen=True)
class Draw:
    """Names the random numbers of one visit to one record: they depend on nothing else, so workers, ranks and
    resumes cannot change them."""

    seed: int
    epoch: int
    record: int
    training: bool = True  # validation drops nothing
    whole: bool = False  # with the copies that are made in a share of the visits alone

    def key(self, purpose: str) -> int:
        text = f"{self.seed}/{self.epoch if self.training else 'validation'}/{self.record}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def choices(self, purpose: str) -> random.Random:
        return random.Random(self.key(purpose))

    def normal(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.key(purpose))

    def structure(self, n: int) -> list[float]:
        """The numbers in [0, 1) that decide a visit's structure: the first its copies, the others what each
        block loses."""
        key = _scramble(
            _structure_base(self.seed, self.epoch if self.training else None) + self.record * _STEP & _ALL
        )
        return [(_scramble(key + i * _STEP & _ALL) >> 11) * 2.0**-53 for i in range(1, n + 1)]


def structure_numbers(seed: int, epoch: int | None, records: np.ndarray, n: int) -> np.ndarray:
    """:meth:`Draw.structure` of many records at once: ``[records, n]`` float64; ``epoch`` is None for
    validation.

    A hash of counters (the finaliser of SplitMix64; Steele, Lea and Flood 2014), so that lengths of a whole
    epoch cost no loop.
    """
    step = np.uint64(_STEP)
    with np.errstate(over="ignore"):
        keys = _scramble(np.uint64(_structure_base(seed, epoch)) + records.astype(np.uint64) * step)
        bits = _scramble(keys[:, None] + np.arange(1, n + 1, dtype=np.uint64) * step)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


_STEP, _ALL = 0x9E3779B97F4A7C15, 2**64 - 1


@lru_cache(maxsize=64)
def _structure_base(seed: int, epoch: int | None) -> int:
    text = f"{seed}/{'validation' if epoch is None else epoch}/structure"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _scramble(z: Any) -> Any:
    """Of a number below 2^64, or of an array of them (whose products wrap by themselves)."""
    number = np.uint64 if isinstance(z, np.ndarray) else int
    z = (z ^ (z >> number(30))) * number(0xBF58476D1CE4E5B9) & number(_ALL)
    z = (z ^ (z >> number(27))) * number(0x94D049BB133111EB) & number(_ALL)
    return z ^ (z >> number(31))


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
        self.tokenizer, self.geometry, self.transforms, self.options = (
            tokenizer,
            geometry,
            transforms,
            options,
        )
        self.max_length = min(max_length, options.max_sequence_length or max_length)
        self.visual_gen, self.visual_und = visual_gen, visual_und
        self.cache: PictureCache | None = None  # set by the trainer: pictures found there are not decoded
        self._tiny: dict[object, Seen] = {}
        self._viewers: dict[tuple[bool, int], Viewer] = {}

    # ---- lengths

    def measure(self, record: Record) -> list[int]:
        """What the lengths of the record's visits follow from, as whole numbers that :meth:`outline` and
        :meth:`lengths` read: how many blocks, a number a block, the size of every piece. Pictures are read no
        further than their headers.

        Raises:
            BadRecord: there is nothing to learn from, a part of the model that the record needs is left out,
                or its images and context alone exceed ``max_sequence_length``.
        """
        sample = record.sample
        self._check_parts(sample)
        draws = _draws(sample)
        viewer = self.viewer(sample)
        sizes: list[int] = []
        for i, piece in enumerate(sample):
            if isinstance(piece, Text):
                sizes += [len(self.tokenizer.encode(text)) for text in (piece.text, *piece.others)]
                if piece.target and not sizes[-1] and not self.options.train_transitions and len(sample) == 1:
                    raise BadRecord(
                        "nothing_to_learn",
                        f"piece {i}",
                        "an empty text",
                        "a text with content",
                        "remove the record",
                    )
                continue
            try:
                view = viewer.view(*(piece.size or image_size(piece.source)))
            except PictureError as error:
                raise BadRecord(
                    error.code,
                    f"piece {i}",
                    f"{error.name}: {error.problem}",
                    "a readable picture",
                    error.fix,
                ) from error
            sizes += self._grids(view)
        blocks = self._blocks(sample, _sizes(sample, sizes, None), copies=True)
        self._check_length(blocks)
        always = len(self._blocks(sample, _sizes(sample, sizes, None), copies=False))
        numbers = []
        for i, block in enumerate(blocks):
            flags = block.kind | (draws and not block.loss) << 2 | (i >= always) << 3 | block.loss << 4
            numbers.append(len(block) << _BITS | flags)
        return [len(numbers), *numbers, *sizes]

    def length(self, sample: Sample, sizes: Sequence[int], draw: Draw) -> int:
        """Tokens of the sample in this visit; ``sizes`` is what :meth:`measure` gave."""
        return sum(len(block) for block in self.outline(sample, sizes, draw))

    def lengths(
        self, measured: Measured, records: np.ndarray, seed: int, epoch: int | None, first: int = 0
    ) -> np.ndarray:
        """Tokens [n] int64 of visits to many records, of which nothing is read.

        Where a text has several wordings its longest counts, so this is :meth:`length` or a little more.

        Args:
            measured: The sizes of all records from number ``first`` on.
            records: [n] int64, numbers as in :class:`Draw`.
            epoch: None for validation.
        """
        if not len(records):
            return np.zeros(0, np.int64)
        blocks, counts, starts = measured.blocks(records - first)
        drawn = structure_numbers(seed, epoch, records, 1 + int(counts.max()))
        number = np.arange(len(blocks)) - np.repeat(starts, counts)
        visit = np.repeat(np.arange(len(records)), counts)
        kept = (blocks & 8 == 0) | (drawn[visit, 0] < self.options.single_image_stop_prob)
        if epoch is not None:
            o = self.options
            chance = np.array(
                [o.text_cond_dropout_prob, o.vit_cond_dropout_prob, o.vae_cond_dropout_prob, 0.0]
            )
            kept &= (blocks & 4 == 0) | (drawn[visit, 1 + number] >= chance[blocks & 3])
        totals = np.bincount(visit, np.where(kept, blocks >> _BITS, 0), len(records))
        return np.minimum(totals, self.max_length).astype(np.int64)

    def full_lengths(self, measured: Measured, records: np.ndarray) -> np.ndarray:
        """Tokens [n] int64 of the records with all copies and nothing dropped: the most that a visit can
        have."""
        if not len(records):
            return np.zeros(0, np.int64)
        blocks, _, starts = measured.blocks(records)
        return np.minimum(np.add.reduceat(blocks >> _BITS, starts), self.max_length)

    def _check_parts(self, sample: Sample) -> None:
        for i, piece in enumerate(sample):
            if isinstance(piece, Image) and piece.target and not self.visual_gen:
                raise BadRecord(
                    "image_target_without_visual_gen", f"piece {i}", "an image to draw",
                    "text targets only, because visual_gen is false",
                    "set visual_gen to true, or remove the record",
                )  # fmt: skip
            if isinstance(piece, Image) and not self.visual_und and not _draws(sample):
                raise BadRecord(
                    "image_without_visual_und", f"piece {i}", "an image to look at",
                    "no images, because visual_und is false",
                    "set visual_und to true, or remove the record",
                )  # fmt: skip

    def _check_length(self, blocks: Sequence[Block]) -> None:
        fixed = sum(len(b) for b in blocks if not (b.kind == Kind.TEXT and b.loss))
        least = fixed + sum(2 + min(b.length, 1) for b in blocks if b.kind == Kind.TEXT and b.loss)
        if least > self.max_length:
            images = sum(len(b) for b in blocks if b.kind != Kind.TEXT)
            raise BadRecord(
                "too_long", "sample", f"{images:,} tokens of images and {fixed - images:,} of context text",
                f"at most max_sequence_length = {self.max_length:,} tokens before any text target",
                "lower max_image_tokens, raise max_sequence_length, or split the record",
            )  # fmt: skip

    # ---- structure

    def outline(self, sample: Sample, sizes: Sequence[int], draw: Draw) -> list[Block]:
        """The blocks of a sample in one visit, without contents: copies of targets, labels, dropout, cut.

        ``sizes`` is what :meth:`measure` gave.
        """
        o = self.options
        drawn = draw.structure(1 + sizes[0])
        blocks = self._blocks(
            sample,
            _sizes(sample, sizes[1 + sizes[0] :], draw),
            draw.whole or drawn[0] < o.single_image_stop_prob,
        )
        if draw.training and _draws(sample):
            chance = {
                Kind.TEXT: o.text_cond_dropout_prob,
                Kind.VIT: o.vit_cond_dropout_prob,
                Kind.CLEAN: o.vae_cond_dropout_prob,
            }
            # one number a block, also where it cannot be dropped
            for block, number in zip(blocks, drawn[1:]):
                block.dropped = not block.loss and number < chance.get(block.kind, 0.0)
        return self._cut(blocks)

    def _blocks(
        self, sample: Sample, sizes: Sequence[int | tuple[int, int, int, int]], copies: bool
    ) -> list[Block]:
        """``copies``: an answer of one single image, last in the sample, gets its clean copies too."""
        draws = _draws(sample)
        blocks: list[Block] = []
        for i, (piece, size) in enumerate(zip(sample, sizes, strict=True)):
            follower = self._follower(sample, i) if self.options.train_transitions else None
            if isinstance(size, int):
                blocks.append(Block(Kind.TEXT, size, i, loss=piece.target, closing_label=follower))
                continue
            if piece.target:
                blocks.append(Block(Kind.NOISED, size[0] * size[1], i, size[:2], loss=True))
            shown = self._shown(size, i, draws) if not piece.target or self._copied(sample, i, copies) else []
            blocks += shown
            if shown:
                blocks[-1].closing_label = follower
        return blocks

    def _shown(self, size: tuple[int, int, int, int], piece: int, draws: bool) -> list[Block]:
        """The blocks that show a picture to what follows; ``size`` is that of :meth:`_grids`."""
        shown = [(Kind.CLEAN, size[:2])] * draws + [(Kind.VIT, size[2:])] * self.visual_und
        return [Block(kind, grid[0] * grid[1], piece, grid) for kind, grid in shown]

    def _copied(self, sample: Sample, i: int, copies: bool) -> bool:
        """Do clean copies follow target image ``i``? Where anything follows that must see it; and, with
        transitions, at the end of an answer of several pieces, or of a single one in a share of the draws."""
        if i + 1 < len(sample):
            return True
        if not self.options.train_transitions:
            return False
        alone = i == 0 or not sample[i - 1].target
        return copies if alone else True

    def _follower(self, sample: Sample, i: int) -> int | None:
        """The token that opens what comes after piece ``i`` (a transition's label), if an answer goes on or
        ends there."""
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

    def fill(self, sample: Sample, blocks: Sequence[Block], draw: Draw) -> list[Block]:
        """The blocks with ids, pixels, patches, noise and times.

        Raises:
            PictureError: a picture cannot be decoded.
        """
        viewer = self.viewer(sample)
        time, noise, posterior = (draw.normal(purpose) for purpose in ("time", "noise", "posterior"))
        opened: dict[int, Block] = {}  # what the blocks of one picture share
        filled = []
        for block in blocks:
            piece = sample[block.piece]
            if isinstance(piece, Text):
                ids = self.tokenizer.encode((piece.text, *piece.others)[wording(piece, block.piece, draw)])
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
            if block.piece not in opened:
                kinds = {b.kind for b in blocks if b.piece == block.piece and not b.dropped}
                seen = self._look(piece, viewer, kinds != {Kind.VIT}, Kind.VIT in kinds)
                opened[block.piece] = self._drawn(seen, posterior)
            shared = opened[block.piece]
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

    def viewer(self, sample: Sample) -> Viewer:
        """How this sample shows its pictures."""
        return self.viewer_of(_draws(sample), sum(isinstance(piece, Image) for piece in sample))

    def viewer_of(self, draws: bool, images: int) -> Viewer:
        """How samples of ``images`` pictures show them; ``draws``: the model has to draw in the sample."""
        # Pictures of samples that draw are seen one by one; those of others share the ViT's pixels.
        images = 1 if draws else max(1, images)
        if (draws, images) not in self._viewers:
            vit = (self.transforms.vit_edit if draws else self.transforms.vit) if self.visual_und else None
            self._viewers[draws, images] = Viewer(
                self.transforms.vae if draws else None, vit, images, self.geometry.vit_patch
            )
        return self._viewers[draws, images]

    def _grids(self, view: View) -> tuple[int, int, int, int]:
        """Latent rows and columns, ViT rows and columns of a picture shown so; zeros where one does not
        look."""
        (w, h), (vw, vh) = view.vae or (0, 0), view.vit or (0, 0)
        stride, patch = self.geometry.latent_stride, self.geometry.vit_patch
        return h // stride, w // stride, vh // patch, vw // patch

    def _look(self, piece: Image, viewer: Viewer, vae: bool, vit: bool) -> Seen:
        """The picture for the encoders that look at it."""
        key = (piece.source, viewer, vae, vit) if isinstance(piece.source, str | Path | Confined) else None
        if key in self._tiny:
            return self._tiny[key]
        seen = viewer.look(piece.source, vae, vit, self.cache)
        if key is not None and seen.nbytes <= TINY_PICTURE and len(self._tiny) < TINY_PICTURES:
            self._tiny[key] = seen
        return seen

    def _drawn(self, seen: Seen, generator: torch.Generator) -> Block:
        """What the blocks of a picture share. In samples that draw every picture takes its random numbers,
        also one whose latents this visit drops: what is dropped then changes no other picture."""
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
    return any(isinstance(piece, Image) and piece.target for piece in sample)


def wording(piece: Text, number: int, draw: Draw | None) -> int:
    """Which of a text's wordings this visit uses: 0 is ``text``, the others follow. Validation uses the
    first."""
    if not piece.others or draw is None or not draw.training:
        return 0
    return draw.choices(f"wording/{number}").randrange(1 + len(piece.others))


def _sizes(
    sample: Sample, numbers: Sequence[int], draw: Draw | None
) -> list[int | tuple[int, int, int, int]]:
    """The size of every piece: ids of a text (without ``draw``: of its longest wording); latent rows and
    columns, ViT rows and columns of an image."""
    sizes: list[int | tuple[int, int, int, int]] = []
    at = 0
    for i, piece in enumerate(sample):
        if isinstance(piece, Text):
            n = 1 + len(piece.others)
            sizes.append(max(numbers[at : at + n]) if draw is None else numbers[at + wording(piece, i, draw)])
            at += n
        else:
            sizes.append(tuple(numbers[at : at + 4]))  # type: ignore[arg-type]
            at += 4
    return sizes


class Measured:
    """What :meth:`Planner.measure` gave for many records, as arrays."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        """``values`` [N] int32, and record i's numbers are ``values[ends[i]:ends[i + 1]]``; ``ends`` [records
        + 1] int64."""
        self._first, counts = ends[:-1], values[ends[:-1]].astype(np.int64)
        self._counts = counts
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        inside = np.arange(self._starts[-1]) - np.repeat(self._starts[:-1], counts)
        self._blocks = values[np.repeat(self._first, counts) + 1 + inside]

    def __len__(self) -> int:
        return len(self._counts)

    def blocks(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The blocks' numbers of the records one after another [B], how many each record has [n], where each
        one's start [n]."""
        counts = self._counts[records]
        starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        inside = np.arange(counts.sum()) - np.repeat(starts, counts)
        return (
            self._blocks[np.repeat(self._starts[records], counts) + inside].astype(np.int64),
            counts,
            starts,
        )

    def tokens_by_kind(self, records: np.ndarray) -> dict[str, int]:
        """Tokens without copies that are rarely made: ``text``, ``vit``, ``clean``, ``noised``, and
        ``trained_text`` of them."""
        blocks, _, _ = self.blocks(records)
        blocks = blocks[blocks & 8 == 0]
        sums = np.bincount(blocks & 3, blocks >> _BITS, 4).astype(np.int64).tolist()
        trained = int((blocks >> _BITS)[(blocks & 16 != 0) & (blocks & 3 == Kind.TEXT)].sum())
        return {**{kind.name.lower(): sums[kind] for kind in Kind}, "trained_text": trained}
