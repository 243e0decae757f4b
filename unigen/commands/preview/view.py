"""One sample as the model sees it: what ``unigen preview`` shows, read off the packed row that training would
use.

Nothing here states a rule again. Blocks come from the planner, numbers from the pack, the mask from
``allowed``, times from ``flow``; what dropout may take away is found by asking the planner with one chance
set to 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unigen.model.flow import training_time
from unigen.model.mask import Tokens, allowed
from unigen.sequence.draw import RandomKey
from unigen.sequence.grid import unpatchify
from unigen.sequence.images import image_size
from unigen.sequence.lengths import RecordLengths
from unigen.sequence.pack import next_position, pack_blocks
from unigen.sequence.plan import Planner, caption_variant
from unigen.sequence.tokens import NAMES, Tokenizer
from unigen.sequence.types import Block, Image, Kind, Pack, Record, Text

DROPOUT = ("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob")
NONE, FULL, CAUSAL, MIXED = range(4)  # what a block sees of another
ENLARGED = 1.1  # times its size in the file, from which on a picture counts as enlarged
LONGEST_CHARACTER = 8  # byte tokens that one character may take; more are shown as they are


@dataclass(frozen=True)
class Token:
    """A token of a text, or a marker of an image: one column of the pack."""

    index: int
    position: int
    id: int
    label: int  # -100 where there is none
    learnt: bool  # the token before it, in the same block, has it as its label


@dataclass(frozen=True)
class Picture:
    """What an image block shows."""

    name: str
    original: tuple[int, int]  # width, height of the upright file
    pixels: Tensor  # [3, H, W] uint8, as resized for this block
    time: float | None = None  # of a noised image, after the time law

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels after the resize."""
        return self.pixels.shape[2], self.pixels.shape[1]

    @property
    def scale(self) -> tuple[float, float]:
        return self.size[0] / self.original[0], self.size[1] / self.original[1]

    @property
    def upscaled(self) -> bool:
        """Enlarged by so much that it shows."""
        return min(self.scale) > ENLARGED


@dataclass
class Shown:
    """A block of the sequence with what the pack says of it. A dropped one has no tokens: ``start ==
    stop``."""

    number: int  # from 1, dropped ones counted
    block: Block
    target: bool
    start: int  # place in the sequence of its first token, and behind its last
    stop: int
    positions: tuple[int, int]  # first and last RoPE position; where it would have stood, if it was dropped
    option: str = ""  # the option that may drop it
    chance: float = 0.0
    tokens: list[Token] = field(default_factory=list)  # all of a text, the two markers of an image
    lost: list[int] = field(default_factory=list)  # ids of a text that the length limit cut off
    wording: tuple[int, int] = (1, 1)  # which of how many wordings the visit uses
    picture: Picture | None = None
    twins: list[int] = field(default_factory=list)  # numbers of other blocks that share a position

    @property
    def kind(self) -> Kind:
        return self.block.kind

    @property
    def transition(self) -> int | None:
        """The label of the closing token that says what comes next."""
        return self.tokens[-1].label if self.tokens and self.block.closing_label is not None else None


@dataclass
class SampleView:
    """A sample, packed alone into one row."""

    record: Record
    number: int
    pack: Pack
    blocks: list[Shown]
    max_length: int
    # share of the visits in which the answer, one single image, gets clean copies; None where it has no
    # choice
    copies: float | None
    copied: bool  # in this visit

    @property
    def kept(self) -> list[Shown]:
        return [shown for shown in self.blocks if not shown.block.dropped]


def look(
    record: Record,
    number: int,
    planner: Planner,
    draw: RandomKey,
    shift: float = 1.0,
    sizes: RecordLengths | None = None,
) -> SampleView:
    """The record in the visit ``draw``, as training packs it.

    Args:
        number: Of the record, for messages; ``draw.record`` decides the random numbers.
        shift: ``timestep_shift``, which the times of noised images depend on.
        sizes: What ``planner.token_lengths`` gave, where it is known.

    Raises:
        BadRecord: as :meth:`Planner.token_lengths`.
        PictureError: a picture cannot be decoded.
    """
    sizes = planner.token_lengths(record) if sizes is None else sizes
    outline = planner.outline(record.sample, sizes, draw)
    blocks = planner.fill(record.sample, outline, draw)
    pack = pack_blocks([blocks], planner.tokenizer.special, planner.geometry, origins=[str(record.origin)])
    shown = _places(record, blocks, pack)
    _add_dropout(shown, record, sizes, planner, draw)
    _add_texts(shown, record, sizes, planner, draw)
    _add_pictures(shown, record, planner, pack, shift)
    lengths = [
        len(planner_with(planner, single_image_stop_prob=p).outline(record.sample, sizes, draw))
        for p in (0.0, 1.0)
    ]
    choice = lengths[0] != lengths[1]
    share = planner.options.single_image_stop_prob if choice else None
    return SampleView(
        record, number, pack, shown, planner.max_length, share, choice and len(blocks) == lengths[1]
    )


def planner_with(planner: Planner, max_length: int | None = None, **options: float) -> Planner:
    """The planner with other options: what it then does differently shows what they decide."""
    other = copy.copy(planner)
    other.options = replace(planner.options, **options)
    other.max_length = max_length or planner.max_length
    return other


def columns(pack: Pack) -> dict[str, list[int]]:
    """The pack's columns in the order of the sequence, in which it does not store them."""
    order = pack.index.argsort()
    names = ("ids", "position", "index", "kind", "span", "label")
    return {name: getattr(pack, name)[order].tolist() for name in names}


def mask(pack: Pack, rows: Tensor | None = None) -> Tensor:
    """[n, n] bool: may the token at place ``rows[i]`` of the sequence see that at ``rows[j]``? Default: all
    tokens."""
    order = pack.index.argsort()
    tokens = Tokens.of(pack).at(order if rows is None else order[rows])
    return allowed(tokens.unsqueeze(1), tokens.unsqueeze(0))


def block_mask(view: SampleView, most: int | None = None) -> list[list[int]]:
    """What each block that was kept, of the first ``most``, sees of each other one: ``NONE``, ``FULL``,
    ``CAUSAL`` (each token what stands before it) or ``MIXED``.

    Tokens of a block differ for the rule in their place alone, so up to five of each, the two ends among
    them, speak for all.
    """
    picks = [
        torch.linspace(s.start, s.stop - 1, min(5, s.stop - s.start)).round().long() for s in view.kept[:most]
    ]
    if not picks:
        return []
    seen = mask(view.pack, torch.cat(picks))
    sizes = [len(pick) for pick in picks]
    return [[_verdict(cell) for cell in row.split(sizes, dim=1)] for row in seen.split(sizes, dim=0)]


def _verdict(cell: Tensor) -> int:
    if not bool(cell.any()):
        return NONE
    if bool(cell.all()):
        return FULL
    return (
        CAUSAL
        if cell.shape[0] == cell.shape[1] and torch.equal(cell, torch.ones_like(cell).tril())
        else MIXED
    )


# ---- the parts of a view


def _places(record: Record, blocks: Sequence[Block], pack: Pack) -> list[Shown]:
    """Every block with its place and its tokens, which are those of the pack's span of the same rank."""
    table = columns(pack)
    shown, start, position = [], 0, 0
    for number, block in enumerate(blocks, start=1):
        stop = start + len(block)
        target = record.sample[block.segment].target
        if block.dropped:
            shown.append(Shown(number, block, target, start, stop, (position, position)))
        else:
            assert len(set(table["span"][start:stop])) == 1, "a block is one span"
            places = table["position"][start:stop]
            entry = Shown(number, block, target, start, stop, (min(places), max(places)))
            picked = range(start, stop) if block.kind == Kind.TEXT else (start, stop - 1)
            entry.tokens = [
                _token(table, i, i > start and table["label"][i - 1] == table["ids"][i]) for i in picked
            ]
            shown.append(entry)
        position, start = next_position(position, block), stop
    assert start == len(pack)
    for entry in shown:
        if not entry.block.dropped:
            entry.twins = [
                other.number for other in shown if other is not entry and _share_position(entry, other)
            ]
    return shown


def _share_position(a: Shown, b: Shown) -> bool:
    return not b.block.dropped and a.positions[0] <= b.positions[1] and b.positions[0] <= a.positions[1]


def _token(table: dict[str, list[int]], i: int, learnt: bool) -> Token:
    return Token(table["index"][i], table["position"][i], table["ids"][i], table["label"][i], learnt)


def _add_dropout(
    shown: Sequence[Shown], record: Record, sizes: RecordLengths, planner: Planner, draw: RandomKey
) -> None:
    for option in DROPOUT:
        certain = planner_with(planner, **{name: float(name == option) for name in DROPOUT})
        for entry, block in zip(shown, certain.outline(record.sample, sizes, draw), strict=True):
            if block.dropped:
                entry.option, entry.chance = option, getattr(planner.options, option)


def _add_texts(
    shown: Sequence[Shown], record: Record, sizes: RecordLengths, planner: Planner, draw: RandomKey
) -> None:
    unlimited = planner_with(planner, max_length=1 << 40)
    whole = unlimited.outline(record.sample, sizes, draw)
    for entry, block in zip(shown, whole, strict=True):
        piece = record.sample[block.segment]
        if not isinstance(piece, Text):
            continue
        entry.wording = caption_variant(piece, block.segment, draw) + 1, 1 + len(piece.others)
        if entry.block.cut:
            (filled,) = unlimited.fill(record.sample, [block], draw)
            assert filled.ids is not None
            entry.lost = filled.ids[entry.block.length :]


def _add_pictures(shown: Sequence[Shown], record: Record, planner: Planner, pack: Pack, shift: float) -> None:
    """The pictures of the pack in the order of its blocks."""
    patches = iter(pack.vit_patches.split(pack.vit_lengths))
    vae_blocks = iter(pack.vae_block)
    times = iter(training_time(pack.u, shift).split([rows * columns for rows, columns in pack.vae_grid]))
    for entry in shown:
        piece = record.sample[entry.block.segment]
        if entry.block.dropped or not isinstance(piece, Image):
            continue
        assert entry.block.grid is not None
        time = None
        if entry.kind == Kind.VIT:
            pixels = unpatchify(next(patches), entry.block.grid, planner.geometry.vit_patch)
        else:
            pixels, drawn = pack.vae_pixels[next(vae_blocks)], next(times)
            time = float(drawn[0]) if entry.kind == Kind.NOISED else None
        entry.picture = Picture(source_name(piece), image_size(piece.source), pixels, time)


def source_name(piece: Image) -> str:
    """The name of the picture's file; "" where the picture itself stands in the data."""
    return "" if isinstance(piece.source, bytes) else str(piece.source).rpartition("/")[2]


# ---- tokens as text


def special_names(tokenizer: Tokenizer) -> dict[int, str]:
    return {getattr(tokenizer.special, field): name for field, name in NAMES.items()}


def characters(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int]]:
    """The text of ``ids`` in the smallest parts that can be read: (text, how many tokens). A byte-level token
    may be a third of a character, which is no text."""
    found, held = [], []
    for id in ids:
        held.append(id)
        text = tokenizer.decode(held)
        if text.endswith("\ufffd") and len(held) < LONGEST_CHARACTER:
            continue
        found.append((text, len(held)))
        held = []
    return found + ([(tokenizer.decode(held), len(held))] if held else [])
