"""Attention: which back end a forward takes.

A back end is an object made once a forward, from what packing knows, and called by every layer with the
halves of q, k, v:

    Flex       training on a GPU: flex attention with the mask that the loader computed (``flex.py``)
    Groups     training elsewhere: samples of similar length padded to batches (``sdpa.py``)
    Cached     inference: samples that continue key-value caches (``sdpa.py``)
    Pictures   the ViT on a GPU: each picture attends to the whole of itself
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from unigen.model.flex import Flex
from unigen.model.kv_cache import Cache
from unigen.model.sdpa import Cached, Groups, Halves
from unigen.sequence.types import Pack


class Attention(Protocol):
    """A back end, ready for one packed sequence."""

    def __call__(self, q: Halves, k: Halves, v: Halves, layer: int = 0) -> Halves:
        """Attention of q [T, H, d] over k and v [T, G, d], all in halves -> [T, H, d] in halves."""


def prepare_attention(
    pack: Pack, caches: Sequence[Cache] | None = None, update_cache: bool = True
) -> Attention:
    """The back end of a packed sequence; with ``caches``, sample i continues ``caches[i]``.

    With ``update_cache`` the keys and values go into the caches; ``Cache.length`` moves when all layers
    are done.
    """
    if caches is not None:
        return Cached(pack, caches, update_cache)
    if pack.ids.is_cuda and len(pack):
        return Flex(pack)
    return Groups.of(pack)


class PictureAttention:
    """Attention of the ViT on a GPU: pictures of any sizes in one kernel, without padding, masks or plans."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        self.longest = max(lengths)

    @classmethod
    def fits(cls, x: Tensor, heads: int) -> bool:
        """Does the kernel take these tokens (after autocast)? It is FlashAttention's: half precision, Ampere
        or newer."""
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        width = x.shape[-1] // heads
        nvidia = x.is_cuda and torch.version.hip is None
        modern = nvidia and torch.cuda.get_device_capability(x.device) >= (8, 0)
        return modern and dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256

    def __call__(self, q: Halves, k: Halves, v: Halves, layer: int = 0) -> Halves:
        from torch.nn.attention.varlen import varlen_attn

        return (varlen_attn(q[0], k[0], v[0], self.ends, self.ends, self.longest, self.longest),)


def picture_attention(lengths: Sequence[int], x: Tensor, heads: int) -> Attention:
    """The back end of pictures with ``lengths`` patches that lie one after another in ``x`` [N, width]."""
    if lengths and PictureAttention.fits(x, heads):
        return PictureAttention(lengths, x.device)
    return Groups.pictures(lengths, x.device)
