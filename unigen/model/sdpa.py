"""Attention by scaled_dot_product_attention: samples in batches of similar length, or one by one over their
caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unigen.model.kv_cache import Cache
from unigen.model.mask import Tokens, allowed
from unigen.sequence.types import Pack, Sight

Halves = tuple[Tensor, ...]
"""The understanding tokens, and after them, where the generation expert runs, the generation tokens."""

Rows = Sequence[Tensor | None]
"""Which rows of each half somebody reads, [n] int64; None: all of them, in their order."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, causal: bool = False) -> Tensor:
    """``scaled_dot_product_attention`` of q [B, L, H, d] over k and v [B, P + L, G, d] -> [B, L, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None and q.is_cuda:
        # With a mask and grouped heads a GPU falls back to plain products and writes every score.
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    added = None if mask is None else mask.of(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=causal, enable_gqa=groups > 1)
    return y.transpose(1, 2)


class Mask:
    """A mask (``allowed`` bool, True where a key is seen) that all layers share, as what is added to scores:
    made once, where attention itself would make it in every layer and keep it for the backward pass."""

    def __init__(self, allowed: Tensor):
        self.allowed = allowed
        self._added: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype) -> Tensor:
        """0 where a key is seen, else minus infinity."""
        if dtype not in self._added:
            nothing = torch.zeros_like(self.allowed, dtype=dtype)
            self._added[dtype] = nothing.masked_fill_(~self.allowed, -torch.inf)
        return self._added[dtype]


def join_halves(halves: Halves) -> Tensor:
    """Halves [U, ...], [M, ...] -> [T, ...]."""
    return torch.cat(halves) if len(halves) > 1 else halves[0]


def split(x: Tensor, halves: Halves) -> Halves:
    """[T, ...] -> halves as long as ``halves``."""
    return x.split([len(half) for half in halves]) if len(halves) > 1 else (x,)


# ---- without caches


class _Gather(torch.autograd.Function):
    """``x`` [N, ...] -> the rows ``there`` of it; ``back`` are the rows of the result that hold each row of
    ``x``.

    Padding is masked wherever it is a key and discarded wherever it is a query, so no gradient comes from it
    and the way back is a plain gather, too (an indexed add is several times slower). ``real`` blanks what
    padding would bring.
    """

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, real: Tensor | None):
        ctx.back, ctx.real = back, real
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.index_select(0, ctx.back)
        return grad if ctx.real is None else grad * ctx.real, None, None, None


class _Batch(NamedTuple):
    """Samples of similar length, padded to one batch."""

    size: int  # B
    longest: int  # L
    mask: Mask | None  # [B, 1, L or 1, L]; None: everything is seen
    causal: bool = False


class Groups:
    """Attention inside each sample, in batches of samples of similar length.

    All batches, padded, lie one after another: ``N = sum(B * L)`` slots.
    """

    def __init__(self, places: Sequence[np.ndarray], device: torch.device):
        """``places``: where the tokens of each sample are stored."""
        self.batches: list[_Batch] = []
        self.members = similar_lengths([len(p) for p in places])
        rows, real = [], []
        for members in self.members:
            longest = len(places[members[0]])
            for i in members:
                # Padding repeats the sample's first token.
                rows += [places[i], np.full(longest - len(places[i]), places[i][0])]
                real += [np.ones(len(places[i]), bool), np.zeros(longest - len(places[i]), bool)]
        at, is_real = (np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in (rows, real))
        self.moves = not np.array_equal(at, np.arange(len(at)))  # do tokens lie elsewhere than their slots?
        slot = np.zeros(int(is_real.sum()), np.int64)
        slot[at[is_real.astype(bool)]] = np.flatnonzero(is_real)
        self.padded = not is_real.all()
        self.rows, self.slot = torch.from_numpy(at).to(device), torch.from_numpy(slot).to(device)
        self.real = torch.from_numpy(is_real.astype(bool)).to(device)  # [N]

    @classmethod
    def of(cls, pack: Pack) -> Groups:
        self = cls(_places(pack), pack.ids.device)
        tokens, start = Tokens.of(pack).at(self.rows), 0
        for members in self.members:
            size, longest = len(members), pack.und_lengths[members[0]] + pack.gen_lengths[members[0]]
            alike = all(pack.und_lengths[i] + pack.gen_lengths[i] == longest for i in members)
            sights = {pack.sight[i] for i in members}
            mask = None
            if not alike or sights not in ({Sight.FULL}, {Sight.CAUSAL}):
                part = Tokens(*(t[start : start + size * longest].view(size, longest) for t in tokens))
                real = self.real[start : start + size * longest].view(size, longest)
                mask = Mask((allowed(part.unsqueeze(2), part.unsqueeze(1)) & real[:, None, :])[:, None])
            self.batches.append(_Batch(size, longest, mask, mask is None and sights == {Sight.CAUSAL}))
            start += size * longest
        return self

    @classmethod
    def pictures(cls, lengths: Sequence[int], device: torch.device) -> Groups:
        """Of pictures that lie one after another and each attend to the whole of themselves."""
        starts = np.cumsum([0, *lengths])
        self, start = cls([np.arange(a, a + n) for a, n in zip(starts, lengths)], device), 0
        for members in self.members:
            size, longest = len(members), lengths[members[0]]
            real = self.real[start : start + size * longest].view(size, 1, 1, longest)
            mask = None if all(lengths[i] == longest for i in members) else Mask(real)
            self.batches.append(_Batch(size, longest, mask))
            start += size * longest
        return self

    def __call__(self, q: Halves, k: Halves, v: Halves, layer: int = 0) -> Halves:
        # nothing to attend to; keep the graph, so that gradients are zero instead of missing
        if not self.batches:
            return tuple(a + 0 * (b.sum() + c.sum()) for a, b, c in zip(q, k, v, strict=True))
        batched = (self._batched(join_halves(x)) for x in (q, k, v))
        out = [
            sdpa(*parts, batch.mask, batch.causal).flatten(0, 1)
            for batch, *parts in zip(self.batches, *batched, strict=True)
        ]
        y = torch.cat(out) if len(out) > 1 else out[0]
        if self.moves:
            y = _Gather.apply(y, self.slot, self.rows, self.real[:, None, None] if self.padded else None)
        return split(y, q)

    def _batched(self, x: Tensor) -> list[Tensor]:
        """[T, ...] -> [B, L, ...] of each batch."""
        slots = _Gather.apply(x, self.rows, self.slot, None) if self.moves else x
        shapes = [(batch.size, batch.longest) for batch in self.batches]
        parts = slots.split([size * longest for size, longest in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _places(pack: Pack) -> list[np.ndarray]:
    """Where each sample's tokens are stored: understanding tokens, then generation tokens."""
    ends = np.cumsum([0, *pack.und_lengths]), np.cumsum([pack.n_und, *pack.gen_lengths])
    runs = [[np.arange(*half[i : i + 2]) for half in ends] for i in range(pack.n_samples)]
    return list(map(np.concatenate, runs))


def similar_lengths(lengths: Sequence[int], waste: float = 0.7) -> list[list[int]]:
    """Groups of sample numbers in which the shortest has at least ``waste`` of the longest's length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] == 0:
            continue
        if groups and lengths[i] >= waste * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# ---- with caches


class Cached:
    """Attention of samples that continue caches.

    Without ``update_cache`` their keys and values lie beside copies of the caches, which the next call with
    the same layer uses again: a picture takes many steps over one context.
    """

    def __init__(self, pack: Pack, caches: Sequence[Cache], update_cache: bool):
        self.caches, self.update_cache = caches, update_cache
        und, gen = np.cumsum([0, *pack.und_lengths]).tolist(), np.cumsum([0, *pack.gen_lengths]).tolist()
        # One slice a half: the understanding and the generation tokens of a sample.
        self.parts = [(slice(*und[i : i + 2]), slice(*gen[i : i + 2])) for i in range(pack.n_samples)]
        self.masks = [self._mask(pack, i) for i in range(pack.n_samples)]
        self.causal = [pack.sight[i] == Sight.CAUSAL and not caches[i].length for i in range(pack.n_samples)]
        self.beside: dict[tuple[int, int], Tensor] = {}

    def _mask(self, pack: Pack, i: int) -> Mask | None:
        """[1, 1, L, P + L], or None where everything is seen."""
        past = self.caches[i].length
        if pack.sight[i] == Sight.FULL or (pack.sight[i] == Sight.CAUSAL and not past):
            return None
        und, gen = self.parts[i]
        tokens = Tokens(*(torch.cat([t[: pack.n_und][und], t[pack.n_und :][gen]]) for t in Tokens.of(pack)))
        seen = allowed(tokens.unsqueeze(1), tokens.unsqueeze(0))
        return Mask(F.pad(seen, (past, 0), value=True)[None, None])

    def __call__(self, q: Halves, k: Halves, v: Halves, layer: int = 0) -> Halves:
        out = []
        for i in range(len(self.parts)):
            keys, values = self._store(i, k, v, layer)
            y = sdpa(self._of(i, q)[None], keys[None], values[None], self.masks[i], self.causal[i])[0]
            out.append(split(y, self._split(i, q)))
        if not out:
            return q
        return out[0] if len(out) == 1 else tuple(torch.cat(parts) for parts in zip(*out, strict=True))

    def _split(self, i: int, halves: Halves) -> Halves:
        return tuple(half[part] for half, part in zip(halves, self.parts[i]))

    def _of(self, i: int, halves: Halves) -> Tensor:
        """The tokens of sample i."""
        return halves[0] if len(halves) == 1 and len(self.parts) == 1 else join_halves(self._split(i, halves))

    def _store(self, i: int, k: Halves, v: Halves, layer: int) -> Tensor:
        """[2, P + L, G, d]: what is cached, then the new tokens of sample i."""
        cache, (und, gen) = self.caches[i], self.parts[i]
        n_und, n_gen = und.stop - und.start, gen.stop - gen.start
        held = self._room(i, layer, n_und + n_gen, k[0])
        for place, half in zip(held, (k, v), strict=True):
            place[cache.length : cache.length + n_und] = half[0][und]
            if n_gen:
                place[cache.length + n_und : cache.length + n_und + n_gen] = half[1][gen]
        return held

    def _room(self, i: int, layer: int, n: int, like: Tensor) -> Tensor:
        cache = self.caches[i]
        if self.update_cache:
            return cache.room(layer, n, like)
        if (i, layer) not in self.beside:
            held = like.new_empty(2, cache.length + n, *like.shape[1:])
            if cache.length:
                held[:, : cache.length] = cache.past_key_values(layer)
            self.beside[i, layer] = held
        return self.beside[i, layer]
