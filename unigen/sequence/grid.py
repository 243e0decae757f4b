"""Pictures as grids of tokens: patches in and out, and where each stands in a position table."""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor


def to_unit(levels: Tensor) -> Tensor:
    """uint8 levels -> float32 in [-1, 1]: ``(x / 255 - 0.5) / 0.5``, the same bits on every device. Floats
    are given back as they are.

    Pictures travel from the disk to the device as bytes, a quarter of the memory.
    """
    if levels.is_floating_point():
        return levels
    # on a GPU, division by a number of Python's multiplies by its reciprocal
    full = torch.full((), 255.0, device=levels.device)
    return (levels / full).sub_(0.5).mul_(2)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[C, rows * patch, columns * patch] -> [rows * columns, patch * patch * C], flattened row, column, then
    (y, x, channel)."""
    return rearrange(x, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of :func:`patchify`."""
    return rearrange(tokens, "(h w) (p q c) -> c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


@lru_cache(maxsize=1024)
def grid_positions(rows: int, columns: int, side: int, interpolate: bool = False) -> Tensor:
    """[rows * columns] int64 indexes into a position table of ``side`` x ``side``.

    Extrapolated positions count from the top left corner; interpolated ones spread over the whole table:
    coordinate ``i / n`` falls into the bucket of its multiple of ``1 / side`` (NaViT, Dehghani et al. 2023).
    The result is shared: do not write into it.
    """
    if interpolate:
        edges = torch.arange(1 / side, 1.0, 1 / side)
        row, column = (
            torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), edges, right=True) for n in (rows, columns)
        )
    else:
        row, column = torch.arange(rows), torch.arange(columns)
    return (row[:, None] * side + column).flatten()
