"""Flex attention: training on a GPU. The mask comes with the packed sequence; nothing but its shape is made
here."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unigen.model.compiling import dynamo_settings, is_compile_failure, reason_of
from unigen.model.sdpa import Groups, Halves
from unigen.sequence.blockmask import BLOCK, FULL, PARTIAL, padded
from unigen.sequence.pack import with_mask
from unigen.sequence.types import Pack

log = logging.getLogger("unigen")

LEAST_WIDTH = 16  # of a head; flex attention compiles no kernel for narrower ones
_broken = ""  # why flex attention cannot be used in this process


class Flex:
    """Attention of one packed sequence by flex attention.

    Where it cannot be compiled (no C compiler, no Triton, narrow heads) it says so once, and the samples'
    batches take over.
    """

    def __init__(self, pack: Pack):
        self.pack = pack
        self.padding = [padded(n) - n for n in (pack.n_und, len(pack) - pack.n_und)]
        self.block_mask = None if _broken else block_mask(pack)
        self.fallback: Groups | None = None

    def __call__(self, q: Halves, k: Halves, v: Halves, layer: int = 0) -> Halves:
        width = q[0].shape[-1]
        if not _broken and width < LEAST_WIDTH and q[0].is_cuda:
            narrow = f"heads of width {width}, and it takes {LEAST_WIDTH} or more"
            _give_up(narrow, "nothing to do: such models are small")
        if _broken:
            self.fallback = self.fallback or Groups.of(self.pack)
            return self.fallback(q, k, v, layer)
        try:
            return self._flex(q, k, v)
        except Exception as error:
            if not is_compile_failure(error):
                raise
            _give_up(reason_of(error), "install a C compiler, Python's headers (python3-dev) and Triton")
            return self(q, k, v, layer)

    def _flex(self, q: Halves, k: Halves, v: Halves) -> Halves:
        wide = [torch.cat([part for pair in zip(x, self._blanks(x)) for part in pair]) for x in (q, k, v)]
        arguments = [x.transpose(0, 1)[None] for x in wide]
        shared = q[0].shape[1] != k[0].shape[1]
        options = {"enable_gqa": shared, "kernel_options": _options(q[0].is_cuda)}
        out = _compiled()(*arguments, block_mask=self.block_mask, **options)
        sizes = [n for half, more in zip(q, self.padding) for n in (len(half), more)]
        return out[0].transpose(0, 1).split(sizes)[::2]

    def _blanks(self, halves: Halves) -> list[Tensor]:
        return [half.new_zeros(more, *half.shape[1:]) for half, more in zip(halves, self.padding)]


def block_mask(pack: Pack) -> Any:
    """The ``BlockMask`` of a packed sequence whose halves are padded to whole blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    if pack.mask_rule is None:
        pack = with_mask(pack)
    assert pack.mask_rule is not None and pack.mask_blocks is not None
    lower, upper, span, place, noised = pack.mask_rule

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at, hidden = place[k], noised[k]
        return (lower[q] <= at) & (at <= upper[q]) & ((hidden < 0) | (hidden == span[q]))

    partial, full = (_listed(pack.mask_blocks == kind) for kind in (PARTIAL, FULL))
    total = len(place)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(total, total)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[queries, keys] bool -> how many blocks of keys each block of queries has [1, 1, n], and which come
    first [1, 1, n, n]."""
    counts = blocks.sum(1, dtype=torch.int32)
    which = blocks.to(torch.uint8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], which[None, None]


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.cuda.is_available():
        return flex_attention  # uncompiled it writes every score; it serves tests on a CPU
    dynamo_settings()
    return torch.compile(flex_attention, dynamic=True)


@cache
def _options(cuda: bool) -> dict[str, Any] | None:
    """Kernel options: never the kernels for decoding, whose tiles do not divide the blocks; no checks of
    bounds."""
    if not cuda:
        return None
    from torch.nn.attention.flex_attention import FlexKernelOptions

    known = "BACKEND" in FlexKernelOptions.__annotations__
    return ({"BACKEND": "TRITON"} if known else {"FORCE_USE_FLEX_ATTENTION": True}) | {"IS_DIVISIBLE": True}


def _give_up(reason: str, fix: str) -> None:
    global _broken
    _broken = reason
    log.warning(
        "Flex attention cannot be used here (%s). Attention runs by scaled_dot_product_attention instead, "
        "which is slower and needs more memory. Fix: %s", reason, fix,
    )  # fmt: skip
