"""The mask rule: which token may see which. It is stated once, here; every back end of attention is tested
against it."""

from __future__ import annotations

from typing import NamedTuple

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

    Causal over the sequence, full inside an image, never into another sample, and no span but itself sees a
    noised image.
    """
    same_span = q.span == k.span
    return (q.sample == k.sample) & ((q.index >= k.index) | (same_span & q.image)) & (~k.noised | same_span)
