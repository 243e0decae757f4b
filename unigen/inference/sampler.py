"""The sampler: next token, and the image ODE with guidance, for several contexts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from unigen.bars import each
from unigen.config import SamplingOptions
from unigen.model import flow
from unigen.model.attention import prepare_attention
from unigen.model.backends import repeated_shapes
from unigen.model.bagel import Bagel
from unigen.model.kv_cache import Cache
from unigen.sequence.grid import unpatchify
from unigen.sequence.pack import Geometry, next_position, pack_blocks
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Block, Kind, Pack, Sight


@torch.no_grad()
def extend(model: Bagel, special: SpecialIds, caches: Sequence[Cache], blocks: Sequence[Block]) -> Tensor:
    """Appends ``blocks[i]`` (a text, or a picture at t = 0) to context ``caches[i]``; hidden states [B, D] of
    the closing tokens."""
    assert all(block.kind != Kind.NOISED for block in blocks)
    pack = pack_blocks(
        [[block] for block in blocks], special, model.config.geometry, [c.position for c in caches]
    ).to(model.device)
    x0 = model.clean_tokens(pack, model.latents_of(pack))
    # the closing token is the last of its sample's half, and the others only leave their keys and values
    closing = (torch.tensor(pack.und_lengths).cumsum(0) - 1).to(model.device)
    rows = (closing, closing[:0])
    hidden = model.hidden_states(pack, x0, torch.zeros(len(x0), device=model.device), caches, rows=rows)[0]
    for cache, block in zip(caches, blocks, strict=True):
        cache.position = next_position(cache.position, block)
    return hidden


@torch.no_grad()
def feed_tokens(model: Bagel, caches: Sequence[Cache], ids: Sequence[int]) -> Tensor:
    """Appends one text token to each context; hidden states [B, D]."""
    pack = token_pack(ids, [c.position for c in caches], model)
    hidden = model.hidden_states(pack, pack.noise, pack.u, caches)[0]
    for cache in caches:
        cache.position += 1
    return hidden


def token_pack(ids: Sequence[int], positions: Sequence[int], model: Bagel) -> Pack:
    """One text token for each of several contexts, as :func:`pack_blocks` would pack them, without its
    work."""
    n, device = len(ids), model.device
    count, zeros = torch.arange(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    return replace(
        _empty_pack(model.config.geometry, device),
        ids=torch.tensor(ids, device=device),
        position=torch.tensor(positions, device=device),
        index=count,
        kind=zeros.to(torch.uint8),
        sample=count,
        span=count,
        image=zeros.to(torch.bool),
        noised=zeros.to(torch.bool),
        label=zeros - 100,
        n_und=n,
        und_lengths=[1] * n,
        gen_lengths=[0] * n,
        sight=[Sight.FULL] * n,
    )


@lru_cache(maxsize=8)
def _empty_pack(geometry: Geometry, device: torch.device) -> Pack:
    return pack_blocks([], SpecialIds(*range(5)), geometry).to(device)  # without blocks no id is used


@torch.no_grad()
def write_texts(
    model: Bagel,
    special: SpecialIds,
    caches: Sequence[Cache],
    max_tokens: int,
    pick: Callable[[Tensor, int], int],
    stop: Sequence[int] | None = None,
) -> list[list[int]]:
    """Writes a text in each context, token by token, until ``stop`` (default: the text's end) or
    ``max_tokens``.

    ``max_tokens`` counts the opening token. ``pick(logits, i)`` chooses context i's next token from logits
    [vocabulary]. Returns the ids with the opening and without the closing token; the closing token is not in
    the caches.
    """
    stops = {special.text_end} if stop is None else set(stop)
    written: list[list[int]] = [[] for _ in caches]
    active, current = list(range(len(caches))), [special.text_start] * len(caches)
    for _ in each("writing", range(max_tokens), "tokens"):
        hidden = feed_tokens(model, [caches[i] for i in active], current)
        logits = model.logits(hidden).float()
        for i, token in zip(active, current, strict=True):
            written[i].append(token)
        chosen = [(i, pick(row, i)) for i, row in zip(active, logits, strict=True)]
        goes_on = [(i, token) for i, token in chosen if token not in stops]
        if not goes_on:
            break
        active, current = [i for i, _ in goes_on], [token for _, token in goes_on]
    return written


@dataclass
class Canvas:
    """One picture to draw: its contexts, its grid of latent tokens, and the noise [rows * columns, patch_dim]
    it starts from.

    Where ``no_image`` is ``full`` itself both hold the same pieces, and the velocity is not computed twice.
    """

    full: Cache
    no_text: Cache
    no_image: Cache
    grid: tuple[int, int]
    noise: Tensor


@torch.no_grad()
@repeated_shapes()
def draw(
    model: Bagel, special: SpecialIds, canvases: Sequence[Canvas], options: SamplingOptions
) -> list[Tensor]:
    """Integrates the flow from noise to data for every canvas; final latent tokens [rows * columns,
    patch_dim] float32.

    All pictures and all contexts of the guidance go through the model in one packed sequence.
    """
    device = model.device
    x = [canvas.noise.to(device=device, dtype=torch.float32) for canvas in canvases]
    times = flow.sampling_times(options.num_timesteps, options.timestep_shift)
    low, high = options.cfg_interval
    guided = ((times > low) & (times <= high)).tolist()  # on the host, which chooses by it
    row, used = None, None
    for inside, (t, t_next) in each("drawing", list(zip(guided, pairwise(times.to(device)))), "steps"):
        text = inside and options.cfg_text_scale > 1
        use = (text, text and options.cfg_img_scale > 1)
        if row is None or use != used:
            row = None  # its copies of the contexts go before those of the next come
            row, used = _Row(model, special, canvases, *use), use
        v, no_text, no_image = row.velocities(x, t)
        for i in range(len(canvases)):
            v_guided = flow.guide(
                v[i], no_text[i] if use[0] else None, no_image[i] if use[1] else None,
                options.cfg_text_scale if use[0] else 1.0, options.cfg_img_scale if use[1] else 1.0,
                options.cfg_renorm_type, options.cfg_renorm_min,
            )  # fmt: skip
            x[i] = flow.euler_step(x[i], v_guided, t, t_next)
    return x


class _Row:
    """All canvases in all contexts that one kind of step needs; packed and prepared once."""

    def __init__(
        self, model: Bagel, special: SpecialIds, canvases: Sequence[Canvas], text: bool, image: bool
    ):
        self.model, self.n = model, len(canvases)
        every = range(len(canvases))
        self.apart = [i for i, c in enumerate(canvases) if image and c.no_image is not c.full]
        self.shown = [*every, *(every if text else []), *self.apart]  # the canvas of each sample
        self.caches = [c.full for c in canvases] + ([c.no_text for c in canvases] if text else [])
        self.caches += [canvases[i].no_image for i in self.apart]
        grids = [canvases[i].grid for i in self.shown]
        blocks = [[Block(Kind.NOISED, rows * columns, 0, (rows, columns))] for rows, columns in grids]
        self.pack = pack_blocks(blocks, special, model.config.geometry, [c.position for c in self.caches]).to(
            model.device
        )
        self.attention = prepare_attention(self.pack, self.caches, update_cache=False)
        self.rows = (self.pack.label_rows[:0], None)  # no markers, all latent tokens

    def velocities(
        self, x: Sequence[Tensor], t: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Velocities of every canvas in the full, the no-text and the no-image context, for those the step
        asks for."""
        x_t = torch.cat([x[i] for i in self.shown])
        _, drawn = self.model.hidden_states(
            self.pack, x_t, t.expand(len(x_t)), self.caches, False, self.attention, self.rows
        )
        v = self.model.velocities(drawn).split([len(x[i]) for i in self.shown])
        n, no_image = self.n, dict(enumerate(v[: self.n]))
        no_image |= zip(self.apart, v[len(v) - len(self.apart) :])
        return v[:n], v[n : 2 * n], [no_image[i] for i in range(n)]


@torch.no_grad()
def decode_pixels(model: Bagel, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latent tokens [rows * columns, patch_dim] -> pixels [3, H, W], about in [-1, 1]."""
    assert model.codec is not None
    latent = unpatchify(tokens, grid, model.config.latent_patch_size)
    return model.codec.decode(latent[None])[0].float()
