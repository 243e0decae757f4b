"""The two values everything hangs on: a ``Sample`` (what every file format becomes) and a ``Pack`` (what the
model reads).

A ``Sample`` is a plain list of segments, :class:`Text` and :class:`Image`; ``target`` says that the model
must produce the segment. A :class:`Pack` is one packed sequence of ``T`` tokens, many samples back to back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from unigen.config import UserError
from unigen.printing import printable

E = TypeVar("E", bound=Exception)


@dataclass(frozen=True)
class Text:
    """A text, used as it is (no stripping). ``others`` are further caption variants, which say the same: each
    epoch pass uses one of all."""

    text: str
    target: bool = False
    others: tuple[str, ...] = ()
    weight: float = 1.0  # of a target: how much its labels count in the loss, above 0

    @property
    def variants(self) -> tuple[str, ...]:
        return (self.text, *self.others)


@dataclass(frozen=True)
class Image:
    """A picture: a path (decoded when it is needed), encoded bytes, or an opened ``PIL.Image.Image``."""

    source: Any
    target: bool = False
    weight: float = 1.0  # as that of a text
    # width, height (upright) where they are known
    size: tuple[int, int] | None = field(default=None, compare=False, repr=False)


Sample = list[Text | Image]


@dataclass(frozen=True)
class Origin:
    """Where a record came from; every message about it names this."""

    file: Path
    line: int | None = None  # 1-based line of a JSONL file; None for a JSON file with one record
    index: int = 0  # 0-based number of the record in its file

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line is not None else f"{self.file}[{self.index}]"


@dataclass
class Record:
    """One line of training data: the sample, and what reports want to know of it."""

    sample: Sample
    origin: Origin
    format: str
    metadata: dict[str, Any] = field(default_factory=dict)
    # what reading it left out or decided, to be counted: (what, field of the record)
    notes: tuple[tuple[str, str], ...] = ()


class Kind(IntEnum):
    """What a token is; it picks the embedding, the expert and the head."""

    TEXT = 0  # text and the two markers of every image: base weights
    VIT = 1  # ViT patches: base weights
    CLEAN = 2  # VAE latents at t = 0: `_moe_gen` weights
    NOISED = 3  # VAE latents at t > 0, trained with the flow-matching loss: `_moe_gen` weights


class Aim(IntFlag):
    """What a sample is trained for: its targets, or to stay near the model as it was."""

    LEARN = 1
    KEEP = 2


class Sight(IntEnum):
    """How the tokens of one sample see one another; of samples of a single block it is known without a
    mask."""

    MIXED = 0  # as the mask rule says
    CAUSAL = 1  # a single text
    FULL = 2  # a single image, or a single token


@dataclass
class Block:
    """One block of a sample (a row of the table in ``docs/model.md``).

    An outline has lengths and labels only; filled in, text blocks carry ``ids`` and image blocks their
    content: ``patches`` or ready ``features`` for the ViT, ``pixels`` or a ready ``latent`` for the VAE.
    """

    kind: Kind
    length: int  # tokens without the two that open and close it
    # the segment of the sample that it shows; blocks of one picture share it, and so one encoding
    segment: int = -1
    grid: tuple[int, int] | None = None  # rows and columns of an image's tokens
    loss: bool = False  # a trained text, or a noised image
    closing_label: int | None = None  # the extra label of the closing token
    weight: float = 1.0  # how much its labels, or its noised tokens, count in the loss
    closing_weight: float = 1.0  # how much the extra label counts
    dropped: bool = False  # leaves no token; an image still advances the position by one
    cut: bool = False  # a text target cut at its end: its last label is `cut_label`, the token that followed
    cut_label: int = -100
    ids: list[int] | None = None
    patches: Tensor | None = None  # [rows * columns, patch * patch * 3]
    # [rows * columns, ViT width] what the frozen ViT made of the patches, in place of them
    features: Tensor | None = None
    pixels: Tensor | None = None  # [3, H, W] uint8, or float in [-1, 1]
    latent: Tensor | None = None  # [C, h, w] normalised
    # [C, h, w] standard normal: which latent is drawn; None for the posterior's mean
    posterior: Tensor | None = None
    noise: Tensor | None = None  # [rows * columns, patch_dim] standard normal, of a noised image
    u: float = float("-inf")  # standard normal: the time of a noised image before the time law; -inf is clean

    def __len__(self) -> int:
        return 0 if self.dropped else self.length + 2

    @property
    def labels(self) -> int:
        """Its tokens with a label: of a learnt text all but the closing one, and that where it learns what
        comes next."""
        if self.dropped:
            return 0
        return (self.length + 1) * (self.loss and self.kind == Kind.TEXT) + (self.closing_label is not None)


@dataclass
class Pack:
    """One packed sequence of ``T`` tokens, many samples back to back, stored as two halves: understanding
    tokens (TEXT, VIT) first, generation tokens (CLEAN, NOISED) after them, each half in sequence order. So
    each expert is a plain matrix product.

    ``index`` gives a token's place in the sequence, which is all that the mask needs to know about order.
    """

    ids: Tensor  # [T] int64, 0 where the token is not TEXT
    position: Tensor  # [T] int64, RoPE position, from 0 in every sample
    index: Tensor  # [T] int64, place in the sequence
    kind: Tensor  # [T] uint8, a Kind
    sample: Tensor  # [T] int64, number of the sample in the pack
    span: Tensor  # [T] int64, number of the block in the pack (an image's markers belong to it)
    image: Tensor  # [T] bool, the span is an image: full attention inside it
    noised: Tensor  # [T] bool, the span is a noised image, which no other span sees
    label: Tensor  # [T] int64, -100 where there is none
    n_und: int  # tokens of the understanding half
    # What is known while packing, so that no forward has to ask the device for it
    und_lengths: list[int]  # understanding tokens of each sample; they lie one sample after another
    gen_lengths: list[int]  # generation tokens of each sample, likewise
    sight: list[Sight]  # how the tokens of each sample see one another
    vit_rows: Tensor  # [N] int64, places of the VIT tokens
    label_rows: Tensor  # [labels] int64, places of the tokens with a label
    noised_rows: Tensor  # [noised tokens] int64, places of the NOISED tokens in the generation half
    # ViT pictures, in sequence order: the ViT looks at the patches of some, and others bring its features
    vit_patches: Tensor  # [tokens of the former, patch * patch * 3] uint8, or float in [-1, 1]
    vit_position: Tensor  # [N] int64, row * side + column in the position tables, of all
    vit_lengths: list[int]  # patches of each picture, of all
    # VAE pictures: those with ready latents are numbered first, those with pixels after them
    vae_pixels: list[Tensor]  # [3, H, W] each, uint8, or float in [-1, 1]
    # [C, h, w] each: the posterior's draw of each entry of `vae_pixels`; empty for its mean
    vae_noise: list[Tensor]
    latents: list[Tensor]  # [C, h, w] each, normalised latents (cached, or already encoded)
    vae_block: list[int]  # the picture each VAE block shows, blocks in sequence order
    vae_grid: list[tuple[int, int]]  # rows and columns of tokens of each VAE block
    vae_position: Tensor  # [M] int64, row * max_latent_size + column
    vae_first: Tensor  # [VAE blocks] int64, place in the generation half of each block's first token
    vae_number: Tensor  # [M] int64, number of the block that a token belongs to
    u: Tensor  # [M] float32: time before the time law; -inf is clean
    noise: Tensor  # [M, patch_dim] float32; rows of clean tokens are not read
    origins: list[str] = field(default_factory=list)
    # [patches, ViT width] of each picture that brings them
    vit_features: list[Tensor] = field(default_factory=list)
    # of each picture: does it bring features? Empty where none does
    vit_ready: list[bool] = field(default_factory=list)
    # The mask as flex attention takes it (`sequence/blockmask.py`); None where nobody asked for it
    mask_rule: Tensor | None = None  # [5, padded tokens] int32
    mask_blocks: Tensor | None = None  # [blocks, blocks] uint8
    # How much each target counts in the loss; None where all count 1
    label_weight: Tensor | None = None  # [labels] float32
    noised_weight: Tensor | None = None  # [noised tokens] float32
    weight_sums: tuple[float, float] | None = None  # of both
    # As `label_rows` and `noised_rows`, of the samples that are to stay near the model as it was; None where
    # nobody asked for it
    kept_label_rows: Tensor | None = None
    kept_noised_rows: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def n_samples(self) -> int:
        return len(self.und_lengths)

    @property
    def n_text_labels(self) -> int:
        """Label tokens of the pack."""
        return len(self.label_rows)

    @property
    def n_image_targets(self) -> int:
        """Noised latent tokens of the pack."""
        return len(self.noised_rows)

    @property
    def target_weights(self) -> tuple[float, float]:
        """The pack's share of the denominators of the text loss and of the image loss: its label tokens and
        its noised tokens, each with its weight."""
        return self.weight_sums or (self.n_text_labels, self.n_image_targets)

    @property
    def n_kept_labels(self) -> int:
        """Label tokens at which the pack is to stay near the model as it was."""
        return 0 if self.kept_label_rows is None else len(self.kept_label_rows)

    @property
    def n_kept_image(self) -> int:
        """Noised latent tokens at which the pack is to stay near the model as it was."""
        return 0 if self.kept_noised_rows is None else len(self.kept_noised_rows)

    @property
    def n_ready(self) -> int:
        """Pictures that come encoded (from a cache), one that both encoders look at counted twice."""
        return len(self.latents) + len(self.vit_features)

    @property
    def n_to_encode(self) -> int:
        """Pictures that the encoders have to look at, counted in the same way."""
        return len(self.vae_pixels) + len(self.vit_lengths) - len(self.vit_features)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Pack:
        """A copy with ``fn`` applied to every tensor: pin, move, cast."""
        return Pack(**{name: each_of(value, Tensor, fn) for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> Pack:
        """The pack on ``device`` (copies asynchronously from pinned memory)."""
        return self.map(lambda t: t.to(device, non_blocking=True))


def each_of(value: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    """A field of a pack with ``fn`` applied to it, or to each of a list, where that is of a ``kind``."""
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, list) and value and isinstance(value[0], kind):
        return [fn(item) for item in value]
    return value


class BadRecord(UserError):
    """A record a run cannot use: what is wrong, where, what was found, what was expected, and the fix.

    Its string is the full message. Who knows the sample alone gives the number of a ``segment`` in place of a
    ``field``; :meth:`locate` fills in the rest.
    """

    def __init__(
        self,
        code: str,
        field: str | None,
        found: str,
        expected: str,
        fix: str,
        origin: Origin | None = None,
        segment: int | None = None,
    ):
        # names and values of data, of any length, and there may be many such records
        self.code, self.found, self.expected, self.fix = code, *map(printable, (found, expected, fix))
        self.field = f"segment {segment}" if field is None else printable(field)
        self.origin, self.segment = origin, segment
        super().__init__(code)

    def locate(self, origin: Origin, fields: Sequence[str]) -> None:
        """Fills in the place that is missing; ``fields`` are those of the record that its segments came
        from."""
        self.origin = self.origin or origin
        if self.segment is not None:
            self.field, self.segment = printable(fields[self.segment]), None

    def __str__(self) -> str:
        where = f"{printable(self.origin)}: " if self.origin else ""
        return (
            f"{where}{self.code} in field '{self.field}': found {self.found}; expected {self.expected}. Fix:"
            f" {self.fix}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values, for ``bad_records.jsonl`` and reports."""
        origin = self.origin
        return {
            "code": self.code,
            "file": str(origin.file) if origin else None,
            "line": origin.line if origin else None,
            "index": origin.index if origin else None,
            "field": self.field,
            "found": self.found,
            "expected": self.expected,
            "cure": self.fix,
        }

    def __reduce__(self):  # exceptions cross process borders by their constructor's arguments
        arguments = (self.code, self.field, self.found, self.expected, self.fix, self.origin, self.segment)
        return (BadRecord, arguments)


def without_trace(error: E) -> E:
    """The error without the frames it was raised in, which hold a whole record; for who keeps it."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
