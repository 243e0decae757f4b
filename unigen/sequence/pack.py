"""Blocks -> one packed sequence. Training packs many samples; inference packs what is new and continues its
caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unigen.sequence.blockmask import flex_mask
from unigen.sequence.grid import grid_positions
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Aim, Block, Kind, Pack, Sight

NO_LABEL = -100


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that a sequence depends on."""

    latent_stride: int  # pixels per latent token
    latent_patch: int  # latent cells per token, along a side
    patch_dim: int  # numbers per latent token
    max_latent_size: int  # side of the latent position table
    vit_patch: int  # pixels per ViT patch
    vit_side: int  # side of the ViT position table
    interpolate: bool = False  # position ids of pictures spread over the table
    posterior: bool = True  # latents are drawn from a posterior (a pixel codec has none)


@dataclass(frozen=True)
class _Placed:
    """A block with its place in the sequence."""

    block: Block
    position: int  # RoPE position of its first token
    index: int  # place of its first token in the sequence
    sample: int


def pack_blocks(
    samples: Sequence[Sequence[Block]],
    special: SpecialIds,
    geometry: Geometry,
    positions: Sequence[int] | None = None,
    origins: Sequence[str] = (),
    masks: bool = False,
    aims: Sequence[Aim] | None = None,
) -> Pack:
    """Packs filled-in blocks of several samples into one sequence.

    ``positions`` are those of RoPE at which samples go on (0 where nothing is given), ``origins`` where they
    came from, for messages, and ``aims`` what they are trained for (without them all learn); ``masks`` adds
    the mask as flex attention takes it.
    """
    content, placed, index = _Content(geometry), [], 0
    for s, blocks in enumerate(samples):
        position = positions[s] if positions else 0
        pictures: dict[int, tuple[bool, int]] = {}
        for block in blocks:
            if not block.dropped:
                placed.append(_Placed(block, position, index, s))
                content.add(block, pictures)
                index += len(block)
            position = next_position(position, block)
    pack = _finish(placed, special, content, len(samples), list(origins))
    pack = pack if aims is None else _aimed(pack, aims)
    return with_mask(pack) if masks else pack


def _aimed(pack: Pack, aims: Sequence[Aim]) -> Pack:
    """The pack, whose samples learn or are kept as ``aims`` say."""
    learns = torch.tensor([Aim.LEARN in aim for aim in aims], dtype=torch.bool)
    kept = torch.tensor([Aim.KEEP in aim for aim in aims], dtype=torch.bool)
    labels, noised = pack.label_rows, pack.noised_rows
    of_labels, of_noised = pack.sample[labels], pack.sample[pack.n_und :][noised]
    weights: dict[str, Any] = {}
    if pack.label_weight is not None and pack.noised_weight is not None:
        own = pack.label_weight[learns[of_labels]], pack.noised_weight[learns[of_noised]]
        sums = tuple(float(weight.sum(dtype=torch.float64)) for weight in own)
        weights = {"label_weight": own[0], "noised_weight": own[1], "weight_sums": sums}
    return replace(
        pack,
        label_rows=labels[learns[of_labels]], noised_rows=noised[learns[of_noised]],
        kept_label_rows=labels[kept[of_labels]], kept_noised_rows=noised[kept[of_noised]],
        **weights,
    )  # fmt: skip


def with_mask(pack: Pack) -> Pack:
    """The pack with its mask as flex attention takes it."""
    columns = (pack.index, pack.sample, pack.span, pack.image, pack.noised)
    rule, blocks = flex_mask(*(column.cpu().numpy() for column in columns), pack.n_und)
    device = pack.ids.device
    return replace(
        pack, mask_rule=torch.from_numpy(rule).to(device), mask_blocks=torch.from_numpy(blocks).to(device)
    )


def next_position(position: int, block: Block) -> int:
    """The RoPE position after ``block``: text takes one a token, an image one in all, a noised image none."""
    if block.kind == Kind.TEXT:
        return position + len(block)
    return position if block.kind == Kind.NOISED else position + 1


def _und_columns(placed: Sequence[_Placed], special: SpecialIds) -> dict[str, np.ndarray]:
    """The understanding half: all tokens of texts and ViT images, the two markers of VAE images."""
    blocks = [p.block for p in placed]
    kinds = np.array([b.kind for b in blocks], np.uint8)
    whole = (kinds == Kind.TEXT) | (kinds == Kind.VIT)
    tokens = np.array([b.length for b in blocks], np.int64) + 2
    counts = np.where(whole, tokens, 2)
    ends = np.cumsum(counts)
    first, last = ends - counts, ends - 1
    columns, block = _shared_columns(placed, kinds, counts)
    step = np.arange(len(block)) - first[block]  # the token's place in its block
    step[last] = tokens - 1
    text = kinds == Kind.TEXT
    columns["index"] += step
    columns["position"] += np.where(text[block], step, 0)
    columns["kind"][first] = columns["kind"][last] = Kind.TEXT
    ids = np.zeros(len(block), np.int64)
    inside = text[block]
    inside[first] = inside[last] = False
    words = [i for b in blocks if b.kind == Kind.TEXT for i in b.ids or ()]
    assert len(words) == inside.sum(), "a text block has as many ids as its length says"
    ids[inside] = words
    ids[first] = np.where(text, special.text_start, special.image_start)
    ids[last] = np.where(text, special.text_end, special.image_end)
    label = np.full(len(block), NO_LABEL, np.int64)
    learns = np.array([b.loss for b in blocks], bool) & text
    predicts = learns[block]
    predicts[last] = False
    # each token but the closing one learns what follows it
    label[:-1][predicts[:-1]] = ids[1:][predicts[:-1]]
    for end, b in zip(last.tolist(), blocks):
        if b.cut and b.loss:
            label[end - 1] = b.cut_label
        if b.closing_label is not None:
            label[end] = b.closing_label
    return columns | {"ids": ids, "label": label}


def _gen_columns(placed: Sequence[_Placed]) -> dict[str, np.ndarray]:
    """The generation half: the latents of VAE images, without their markers."""
    kinds = np.array([p.block.kind for p in placed], np.uint8)
    drawn = (kinds == Kind.CLEAN) | (kinds == Kind.NOISED)
    counts = np.where(drawn, np.array([p.block.length for p in placed], np.int64), 0)
    columns, block = _shared_columns(placed, kinds, counts)
    columns["index"] += 1 + np.arange(len(block)) - (np.cumsum(counts) - counts)[block]
    return columns | {"ids": np.zeros(len(block), np.int64), "label": np.full(len(block), NO_LABEL, np.int64)}


def _shared_columns(
    placed: Sequence[_Placed], kinds: np.ndarray, counts: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns that repeat a block's values over ``counts`` tokens, and the number of each token's block."""
    block = np.repeat(np.arange(len(placed)), counts)
    return {
        "position": np.array([p.position for p in placed], np.int64)[block],
        "index": np.array([p.index for p in placed], np.int64)[block],
        "kind": kinds[block],
        "sample": np.array([p.sample for p in placed], np.int64)[block],
        "span": block,
        "image": (kinds != Kind.TEXT)[block],
        "noised": (kinds == Kind.NOISED)[block],
    }, block


class _Content:
    """What the tokens of images show."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.patches: list[Tensor] = []
        self.features: list[Tensor] = []
        self.ready: list[bool] = []
        self.vit_lengths: list[int] = []
        self.vit_position: list[Tensor] = []
        self.pixels: list[Tensor] = []
        self.posterior: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.block: list[tuple[bool, int]] = []  # has it pixels, and the number among its like
        self.grid: list[tuple[int, int]] = []
        self.vae_position: list[Tensor] = []
        self.u: list[Tensor] = []
        self.noise: list[Tensor] = []

    def add(self, block: Block, pictures: dict[int, tuple[bool, int]]) -> None:
        """``pictures`` maps the segments of this sample to the pictures they became."""
        if block.kind == Kind.TEXT:
            return
        assert block.grid is not None and block.grid[0] * block.grid[1] == block.length
        g = self.geometry
        if block.kind == Kind.VIT:
            shown = block.patches if block.features is None else block.features
            assert shown is not None and len(shown) == block.length
            (self.patches if block.features is None else self.features).append(shown)
            self.ready.append(block.features is not None)
            self.vit_lengths.append(block.length)
            self.vit_position.append(grid_positions(*block.grid, g.vit_side, g.interpolate))
            return
        if block.latent is not None or block.pixels is not None:
            if block.segment < 0 or block.segment not in pictures:
                pictures[block.segment] = self._add_picture(block)
            self.block.append(pictures[block.segment])
        self.grid.append(block.grid)
        self.vae_position.append(grid_positions(*block.grid, g.max_latent_size, g.interpolate))
        self.u.append(torch.full((block.length,), block.u))
        self.noise.append(block.noise if block.noise is not None else torch.zeros(block.length, g.patch_dim))

    def _add_picture(self, block: Block) -> tuple[bool, int]:
        if block.latent is not None:
            self.latents.append(block.latent)
            return False, len(self.latents) - 1
        assert block.pixels is not None
        self.pixels.append(block.pixels)
        if block.posterior is not None:
            self.posterior.append(block.posterior)
        return True, len(self.pixels) - 1


def _finish(
    placed: Sequence[_Placed], special: SpecialIds, content: _Content, n_samples: int, origins: list[str]
) -> Pack:
    assert len(content.posterior) in (0, len(content.pixels)), (
        "all pictures of a pack are drawn from their posteriors, or none"
    )
    und, gen = _und_columns(placed, special), _gen_columns(placed)
    columns = {name: np.concatenate([und[name], gen[name]]) for name in und}
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    n_und = len(und["ids"])
    g, areas = content.geometry, [rows * columns for rows, columns in content.grid]

    def join(parts: list[Tensor], *empty: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if not parts:
            return torch.zeros(*empty, dtype=dtype)
        # the patches of one large picture are 11 MB: no copy of them
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return Pack(
        **tensors,
        n_und=n_und,
        und_lengths=np.bincount(und["sample"], minlength=n_samples).tolist(),
        gen_lengths=np.bincount(gen["sample"], minlength=n_samples).tolist(),
        sight=_sights(placed, n_samples),
        vit_rows=_rows(columns["kind"] == Kind.VIT),
        label_rows=_rows(columns["label"] >= 0),
        noised_rows=_rows(gen["kind"] == Kind.NOISED),
        vit_patches=join(content.patches, 0, g.vit_patch**2 * 3),
        vit_position=join(content.vit_position, 0, dtype=torch.int64),
        vit_lengths=content.vit_lengths,
        vae_pixels=content.pixels,
        vae_noise=content.posterior,
        latents=content.latents,
        vae_block=[number + len(content.latents) * pixels for pixels, number in content.block],
        vae_grid=content.grid,
        vae_position=join(content.vae_position, 0, dtype=torch.int64),
        vae_first=torch.from_numpy(np.cumsum([0, *areas])[:-1].astype(np.int64)),
        vae_number=torch.from_numpy(np.repeat(np.arange(len(areas)), areas)),
        u=join(content.u, 0),
        noise=join(content.noise, 0, g.patch_dim),
        origins=origins,
        vit_features=content.features,
        vit_ready=content.ready if content.features else [],
        **_weights(placed, und, gen),
    )


def _weights(
    placed: Sequence[_Placed], und: dict[str, np.ndarray], gen: dict[str, np.ndarray]
) -> dict[str, Any]:
    """How much each label and each noised token counts; nothing where all count 1."""
    blocks = [p.block for p in placed]
    if all(b.weight == b.closing_weight == 1 for b in blocks):
        return {}
    of_blocks = np.array([b.weight for b in blocks], np.float32)
    of_tokens = of_blocks[und["span"]]
    last = np.append(np.diff(und["span"]) != 0, True)  # every block has its markers in this half
    of_tokens[last] = [b.weight if b.closing_label is None else b.closing_weight for b in blocks]
    labels = of_tokens[und["label"] >= 0]
    noised = of_blocks[gen["span"][gen["kind"] == Kind.NOISED]]
    return {
        "label_weight": torch.from_numpy(labels),
        "noised_weight": torch.from_numpy(noised),
        "weight_sums": (float(labels.sum(dtype=np.float64)), float(noised.sum(dtype=np.float64))),
    }


def _rows(chosen: np.ndarray) -> Tensor:
    return torch.from_numpy(np.flatnonzero(chosen))


def _sights(placed: Sequence[_Placed], n_samples: int) -> list[Sight]:
    found: list[list[Block]] = [[] for _ in range(n_samples)]
    for p in placed:
        found[p.sample].append(p.block)
    single = [blocks[0].kind if len(blocks) == 1 else None for blocks in found]
    return [
        Sight.MIXED if kind is None else Sight.CAUSAL if kind == Kind.TEXT else Sight.FULL for kind in single
    ]
