"""Selective gradient checkpointing: a part of a layer runs again in the backward pass, but for some of its
matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
"""What a linear layer runs on a row."""


def recomputed(part: Callable[..., Any], *args: Any, kept: Sequence[bool]) -> Any:
    """``part(*args)``, of which only the arguments and some products stay in memory until the backward pass.

    Args:
        part: draws no random numbers, contains no attention, and runs one backward pass at most.
        kept: for each matrix product of ``part``, in the order they run, whether its result stays.
    """
    context = partial(_contexts, tuple(kept))
    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context)


def _contexts(kept: tuple[bool, ...]) -> Any:
    return create_selective_checkpoint_contexts(_Keep(kept))


class _Keep:
    """The policy of one run of a part. Some versions of PyTorch ask it again while they recompute, 2.13 does
    not."""

    def __init__(self, kept: tuple[bool, ...]):
        self.kept = kept
        self.seen = [0, 0]  # products so far: forward, recomputing

    def __call__(
        self, ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        if op not in PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        number = self.seen[ctx.is_recompute]
        assert number < len(self.kept), (
            f"more than the {len(self.kept)} matrix products this part of a layer should have"
        )
        self.seen[ctx.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if self.kept[number] else CheckpointPolicy.PREFER_RECOMPUTE
