"""One sample as the model sees it: what ``unigen preview`` shows, read off the packed sequence that training
would use.

Nothing here states a rule again. Blocks come from the planner, numbers from the pack, the mask from
``allowed``, times from ``flow``; what dropout may take away is found by asking the planner with one chance
set to 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from unigen.model.flow import training_time
from unigen.model.mask import Tokens, allowed
from unigen.sequence.draw import RandomKey
from unigen.sequence.grid import unpatchify
from unigen.sequence.images import image_size
from unigen.sequence.lengths import RecordLengths
from unigen.sequence.pack import next_position, pack_blocks
from unigen.sequence.plan import Planner, caption_variant
from unigen.sequence.types import Block, Image, Kind, Pack, Record, Text

DROPOUT = ("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob")
ENLARGED = 1.1  # times its size in the file, from which on a picture counts as enlarged


@dataclass(frozen=True)
class TokenView:
    """A token of a text, or a marker of an image: one column of the pack."""

    index: int
    position: int
    id: int
    label: int  # -100 where there is none
    learnt: bool  # the token before it, in the same block, has it as its label


@dataclass(frozen=True)
class PictureView:
    """What an image block shows."""

    name: str  # of its file; "" where the picture itself stands in the data
    original: tuple[int, int]  # width, height of the upright file
    pixels: Tensor  # [3, H, W] uint8, as resized for this block
    time: float | None = None  # of a noised image, after the time law

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels after the resize."""
        return self.pixels.shape[2], self.pixels.shape[1]

    @property
    def scale(self) -> tuple[float, float]:
        """By how much its width and its height grew."""
        return self.size[0] / self.original[0], self.size[1] / self.original[1]

    @property
    def enlarged(self) -> bool:
        """By so much that it shows."""
        return min(self.scale) > ENLARGED


@dataclass
class BlockView:
    """A block of the sequence with what the pack says of it. A dropped one has no tokens: ``start ==
    stop``."""

    number: int  # from 1, dropped ones counted
    block: Block
    segment: Text | Image  # of the sample, which the block shows
    start: int  # place in the sequence of its first token, and behind its last
    stop: int
    positions: tuple[int, int]  # first and last RoPE position; where it would have stood, if it was dropped
    option: str = ""  # the option that may drop it
    chance: float = 0.0
    tokens: list[TokenView] = field(default_factory=list)  # all of a text, the two markers of an image
    lost: list[int] = field(default_factory=list)  # ids of a text that the length limit cut off
    variant: int = 0  # the caption variant that this epoch pass uses
    picture: PictureView | None = None
    same_position: list[int] = field(
        default_factory=list
    )  # numbers of blocks that share one of its positions

    @property
    def kind(self) -> Kind:
        return self.block.kind

    @property
    def variants(self) -> tuple[str, ...]:
        """The caption variants of a text."""
        return self.segment.variants if isinstance(self.segment, Text) else ()

    @property
    def next_modality(self) -> int | None:
        """The label of the closing token that says what comes next."""
        return self.tokens[-1].label if self.tokens and self.block.closing_label is not None else None


@dataclass
class SampleView:
    """A sample in one epoch pass, packed alone into one sequence."""

    record: Record
    number: int
    pack: Pack
    blocks: list[BlockView]
    max_length: int
    # share of the epoch passes in which the answer, one single image, gets clean copies; None where it has no
    # choice
    clean_copies: float | None
    copied: bool  # in this pass

    @property
    def kept(self) -> list[BlockView]:
        return [shown for shown in self.blocks if not shown.block.dropped]


def look(
    record: Record,
    number: int,
    planner: Planner,
    key: RandomKey,
    shift: float = 1.0,
    lengths: RecordLengths | None = None,
) -> SampleView:
    """The record in the epoch pass ``key``, as training packs it.

    Args:
        number: Of the record, for messages; ``key.record`` decides the random numbers.
        shift: ``timestep_shift``, which the times of noised images depend on.
        lengths: What ``planner.token_lengths`` gave, where it is known.

    Raises:
        BadRecord: as :meth:`Planner.token_lengths`.
        PictureError: a picture cannot be decoded.
    """
    lengths = planner.token_lengths(record) if lengths is None else lengths
    outline = planner.outline(record.sample, lengths, key)
    blocks = planner.fill(record.sample, outline, key)
    pack = pack_blocks([blocks], planner.tokenizer.special, planner.geometry, origins=[str(record.origin)])
    shown = _places(record, blocks, pack)
    _add_dropout(shown, record, lengths, planner, key)
    _add_texts(shown, record, lengths, planner, key)
    _add_pictures(shown, planner, pack, shift)
    fewest, most = (
        len(planner_with(planner, single_image_stop_prob=p).outline(record.sample, lengths, key))
        for p in (0.0, 1.0)
    )
    share = planner.options.single_image_stop_prob if fewest != most else None
    copied = share is not None and len(blocks) == most
    return SampleView(record, number, pack, shown, planner.max_length, share, copied)


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


def mask(pack: Pack, places: Tensor | None = None) -> Tensor:
    """[n, n] bool: may the token at ``places[i]`` of the sequence see the one at ``places[j]``?

    Args:
        places: [n] int64; default: all tokens.
    """
    order = pack.index.argsort()
    tokens = Tokens.of(pack).at(order if places is None else order[places])
    return allowed(tokens.unsqueeze(1), tokens.unsqueeze(0))


# ---- the parts of a view


def _places(record: Record, blocks: Sequence[Block], pack: Pack) -> list[BlockView]:
    """Every block with its place and its tokens, which are those of the pack's span of the same rank."""
    table = columns(pack)
    shown, start, position = [], 0, 0
    for number, block in enumerate(blocks, start=1):
        stop = start + len(block)
        segment = record.sample[block.segment]
        if block.dropped:
            shown.append(BlockView(number, block, segment, start, stop, (position, position)))
        else:
            assert len(set(table["span"][start:stop])) == 1, "a block is one span"
            taken = table["position"][start:stop]
            entry = BlockView(number, block, segment, start, stop, (min(taken), max(taken)))
            picked = range(start, stop) if block.kind == Kind.TEXT else (start, stop - 1)
            entry.tokens = [_token(table, i, i > start) for i in picked]
            shown.append(entry)
        position, start = next_position(position, block), stop
    assert start == len(pack)
    kept = [entry for entry in shown if not entry.block.dropped]
    for entry in kept:
        first, last = entry.positions
        entry.same_position = [
            other.number
            for other in kept
            if other is not entry and first <= other.positions[1] and other.positions[0] <= last
        ]
    return shown


def _token(table: dict[str, list[int]], i: int, inside: bool) -> TokenView:
    learnt = inside and table["label"][i - 1] == table["ids"][i]
    return TokenView(table["index"][i], table["position"][i], table["ids"][i], table["label"][i], learnt)


def _add_dropout(
    shown: Sequence[BlockView], record: Record, lengths: RecordLengths, planner: Planner, key: RandomKey
) -> None:
    for option in DROPOUT:
        certain = planner_with(planner, **{name: float(name == option) for name in DROPOUT})
        for entry, block in zip(shown, certain.outline(record.sample, lengths, key), strict=True):
            if block.dropped:
                entry.option, entry.chance = option, getattr(planner.options, option)


def _add_texts(
    shown: Sequence[BlockView], record: Record, lengths: RecordLengths, planner: Planner, key: RandomKey
) -> None:
    unlimited = planner_with(planner, max_length=1 << 40)
    whole = unlimited.outline(record.sample, lengths, key)
    for entry, block in zip(shown, whole, strict=True):
        if not isinstance(entry.segment, Text):
            continue
        entry.variant = caption_variant(entry.segment, block.segment, key)
        if entry.block.cut:
            (filled,) = unlimited.fill(record.sample, [block], key)
            assert filled.ids is not None
            entry.lost = filled.ids[entry.block.length :]


def _add_pictures(shown: Sequence[BlockView], planner: Planner, pack: Pack, shift: float) -> None:
    """The pictures of the pack in the order of its blocks."""
    patches = iter(pack.vit_patches.split(pack.vit_lengths))
    vae_blocks = iter(pack.vae_block)
    times = iter(training_time(pack.u, shift).split([rows * columns for rows, columns in pack.vae_grid]))
    for entry in shown:
        if entry.block.dropped or not isinstance(entry.segment, Image):
            continue
        assert entry.block.grid is not None
        time = None
        if entry.kind == Kind.VIT:
            pixels = unpatchify(next(patches), entry.block.grid, planner.geometry.vit_patch)
        else:
            pixels, drawn = pack.vae_pixels[next(vae_blocks)], next(times)
            time = float(drawn[0]) if entry.kind == Kind.NOISED else None
        source = entry.segment.source
        entry.picture = PictureView(source_name(entry.segment), image_size(source), pixels, time)


def source_name(segment: Image) -> str:
    """The name of the picture's file; "" where the picture itself stands in the data."""
    return "" if isinstance(segment.source, bytes) else str(segment.source).rpartition("/")[2]
