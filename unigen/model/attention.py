"""Attention: the one mask rule, the back ends that obey it, and the key-value cache.

The rule is stated once, in :func:`allowed`. The dense test evaluates it for a whole row; ``scaled_dot_product_attention``
(CPU, and every cached forward) gets it per group of samples; flex attention (CUDA training) as a block mask.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unigen.sequence.types import Pack


class Tokens(NamedTuple):
    """What the mask rule knows of a token; see :class:`unigen.sequence.types.Pack`. Shapes broadcast."""

    sample: Tensor
    index: Tensor
    span: Tensor
    image: Tensor
    noised: Tensor

    @classmethod
    def of(cls, pack: Pack) -> Tokens:
        return cls(pack.sample, pack.index, pack.span, pack.image, pack.noised)

    def at(self, rows: Tensor) -> Tokens:
        return Tokens(*(t[rows] for t in self))

    def unsqueeze(self, axis: int) -> Tokens:
        return Tokens(*(t.unsqueeze(axis) for t in self))


def allowed(q: Tokens, k: Tokens) -> Tensor:
    """The mask rule: may query ``q`` see key ``k``?

    Causal over the row, full inside an image, never into another sample, and no span but itself sees a noised image.
    """
    same_span = q.span == k.span
    return (q.sample == k.sample) & ((q.index >= k.index) | (same_span & q.image)) & (~k.noised | same_span)


class Cache:
    """Keys and values of one context, layer by layer, and the RoPE position that comes next.

    ``snapshot()`` costs nothing: copies share their buffers, and only a context that grows away from the shared part
    copies it. Cached tokens are seen by all that follows (noised images never enter a cache).
    """

    def __init__(self, n_layers: int):
        self.layers: list[_Buffer | None] = [None] * n_layers
        self.length = 0  # tokens
        self.position = 0  # next RoPE position

    def snapshot(self) -> Cache:
        other = copy.copy(self)
        other.layers = list(self.layers)
        return other

    def past(self, layer: int) -> Tensor:
        """[2, P, G, d]: keys and values so far."""
        buffer = self.layers[layer]
        assert buffer is not None and self.length
        return buffer.data[:, : self.length]

    def append(self, layer: int, kv: Tensor) -> None:
        """Adds ``kv`` [2, n, G, d] after the ``length`` tokens so far; ``length`` itself moves when all layers are done."""
        buffer, end = self.layers[layer], self.length + kv.shape[1]
        if buffer is None or buffer.used != self.length or end > buffer.data.shape[1]:
            data = kv.new_empty(2, max(end + 64, end * 5 // 4), *kv.shape[2:])
            if buffer is not None and self.length:
                data[:, : self.length] = buffer.data[:, : self.length]
            buffer = self.layers[layer] = _Buffer(data, self.length)
        buffer.data[:, self.length : end] = kv
        buffer.used = end


@dataclass
class _Buffer:
    data: Tensor  # [2, capacity, G, d]
    used: int


@dataclass
class Group:
    """Samples of similar length, padded to one batch of B rows of L."""

    samples: list[int]  # which sample each of the B is
    longest: int  # L
    mask: Tensor | None = None  # [B, 1, L, P + L] bool; None: everything is seen
    past: int = 0  # P, the longest cached context of the group


@dataclass
class Plan:
    """How one row attends: computed once, used by every layer.

    All groups, padded, lie one after another: ``N = sum(B * L)`` slots.
    """

    groups: list[Group]
    rows: Tensor  # [N] the stored place each slot shows; padding repeats its sample's first token
    slot: Tensor  # [T] the slot of each stored token
    real: Tensor  # [N, 1, 1] bool, False in padding
    block_mask: object | None = None  # flex attention takes this instead of the groups


class _Pad(torch.autograd.Function):
    """``x`` [T, ...] -> slots [N, ...]. Padding is masked wherever it is a key and discarded wherever it is a query, so
    no gradient comes from it and the way back is a plain gather (an indexed add is several times slower)."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.plan.slot), None


class _Unpad(torch.autograd.Function):
    """Slots [N, ...] -> [T, ...]: the other way round."""

    @staticmethod
    def forward(ctx, y: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return y.index_select(0, plan.slot)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.plan.rows) * ctx.plan.real, None


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


def cached_groups(lengths: Sequence[int], past: Sequence[int], short: int = 32) -> list[list[int]]:
    """Groups of samples that continue caches. Few new tokens are padded to one batch; many (pictures) are grouped only with
    their equals, so that no mask is needed: with one, a GPU materialises every score."""
    small = similar_lengths([n if n <= short else 0 for n in lengths], waste=0.0)
    equal: dict[tuple[int, int], list[int]] = {}
    for i, (n, p) in enumerate(zip(lengths, past, strict=True)):
        if n > short:
            equal.setdefault((n, p), []).append(i)
    return small + list(equal.values())


def make_plan(order: Tensor, lengths: Sequence[int], members_of_groups: Sequence[list[int]] | None = None) -> Plan:
    """The plan over ``order`` [T] (stored places in sequence order, sample after sample), without masks."""
    device = order.device
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    sizes = torch.tensor(list(lengths), dtype=torch.int64)
    groups, rows, real = [], [], []
    for members in similar_lengths(lengths) if members_of_groups is None else members_of_groups:
        picked, longest = torch.tensor(members), lengths[members[0]]
        steps = torch.arange(longest)
        inside = steps < sizes[picked, None]  # [B, L]
        rows.append((starts[picked, None] + steps * inside).flatten())
        real.append(inside.flatten())
        groups.append(Group(members, longest))
    if not groups:
        return Plan([], order, order, torch.ones(0, 1, 1, dtype=torch.bool, device=device))
    is_real = torch.cat(real)
    slots = is_real.nonzero().squeeze(1).to(device)
    is_real, at = is_real.to(device), order[torch.cat(rows).to(device)]
    return Plan(groups, at, slots[at[slots].argsort()], is_real[:, None, None])


def _parts(plan: Plan, x: Tensor) -> list[Tensor]:
    """Slots [N, ...] -> [B, L, ...] of each group."""
    pieces = x.split([len(g.samples) * g.longest for g in plan.groups])
    return [piece.unflatten(0, (len(g.samples), g.longest)) for piece, g in zip(pieces, plan.groups, strict=True)]


def plan_attention(pack: Pack, caches: Sequence[Cache] | None = None) -> Plan:
    """The plan of a packed row; with ``caches``, sample i continues ``caches[i]``."""
    if pack.ids.is_cuda and caches is None and len(pack):
        return Plan([], pack.index, pack.index, pack.image, block_mask(pack))
    lengths = torch.bincount(pack.sample, minlength=pack.n_samples).tolist()
    members = None if caches is None else cached_groups(lengths, [cache.length for cache in caches])
    plan = make_plan(pack.index.argsort(), lengths, members)
    columns = [_parts(plan, column[plan.rows]) for column in Tokens.of(pack)] if plan.groups else []
    for i, (group, real) in enumerate(zip(plan.groups, _parts(plan, plan.real[:, 0, 0]) if plan.groups else [], strict=True)):
        tokens = Tokens(*(column[i] for column in columns))  # [B, L]
        mask = allowed(tokens.unsqueeze(2), tokens.unsqueeze(1)) & real[:, None, :]
        if caches is not None:
            past = torch.tensor([caches[s].length for s in group.samples], device=real.device)
            group.past = max(caches[s].length for s in group.samples)
            seen = torch.arange(group.past, device=real.device) < past[:, None]  # [B, P]
            mask = torch.cat([seen[:, None].expand(-1, group.longest, -1), mask], dim=2)
        group.mask = None if bool(mask.all()) else mask[:, None]
    return plan


def plan_full(lengths: Sequence[int], device: torch.device) -> Plan:
    """The plan of pictures that each attend to the whole of themselves (the ViT)."""
    plan = make_plan(torch.arange(sum(lengths), device=device), lengths)
    for group, real in zip(plan.groups, _parts(plan, plan.real[:, 0, 0]) if plan.groups else [], strict=True):
        group.mask = None if bool(real.all()) else real[:, None, None, :]
    return plan


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layer: int = 0, caches: Sequence[Cache] | None = None) -> Tensor:
    """Attention of a row: ``q`` [T, H, d], ``k`` and ``v`` [T, G, d] -> [T, H, d]; reads the caches when given."""
    shared = q.shape[1] != k.shape[1]
    if plan.block_mask is not None:
        out = _flex()(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=plan.block_mask, enable_gqa=shared)
        return out[0].transpose(0, 1)
    if not plan.groups:  # nothing to attend to; keep the graph, so that gradients are zero instead of missing
        return q + 0 * (k.sum() + v.sum())
    out = []
    for group, qg, kg, vg in zip(plan.groups, *(_parts(plan, _Pad.apply(x, plan)) for x in (q, k, v)), strict=True):
        qg, kg, vg = (x.transpose(1, 2) for x in (qg, kg, vg))  # [B, heads, L, d]
        if caches is not None:
            kg, vg = _with_past(kg, vg, group, layer, caches)
        y = F.scaled_dot_product_attention(qg, kg, vg, attn_mask=group.mask, enable_gqa=shared)
        out.append(y.transpose(1, 2).flatten(0, 1))
    return _Unpad.apply(torch.cat(out), plan)


def _with_past(k: Tensor, v: Tensor, group: Group, layer: int, caches: Sequence[Cache]) -> tuple[Tensor, Tensor]:
    """Puts each sample's cached keys and values before its new ones, [B, G, P + L, d]."""
    n_batch, heads, _, width = k.shape
    if group.past == 0:
        return k, v
    if n_batch == 1:
        past = caches[group.samples[0]].past(layer).transpose(1, 2)[:, None].to(k.dtype)  # [2, 1, G, P, d]
    else:
        past = k.new_zeros(2, n_batch, heads, group.past, width)
        for b, s in enumerate(group.samples):
            if caches[s].length:
                past[:, b, :, : caches[s].length] = caches[s].past(layer).transpose(1, 2)
    return torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)


def store(k: Tensor, v: Tensor, pack: Pack, layer: int, caches: Sequence[Cache]) -> None:
    """Appends a row's keys and values [T, G, d] to the caches of its samples, in sequence order."""
    kv = torch.stack([k, v])[:, pack.index.argsort()]
    start = 0
    for s, n in enumerate(torch.bincount(pack.sample, minlength=pack.n_samples).tolist()):
        caches[s].append(layer, kv[:, start : start + n])
        start += n


@cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled flex attention materialises every score; it serves the CPU test only.
    return torch.compile(flex_attention, dynamic=True) if torch.cuda.is_available() else flex_attention


def block_mask(pack: Pack):
    """The mask rule of a whole row for flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = Tokens.of(pack)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return allowed(tokens.at(q), tokens.at(k))

    return create_block_mask(rule, None, None, len(pack), len(pack), device=str(pack.ids.device))
