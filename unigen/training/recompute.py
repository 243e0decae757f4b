"""Gradient checkpointing, from outside of the model: layers run again in the backward pass, whole or but for
some of their matrix products (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from unigen.model.bagel import Bagel
from unigen.model.products import OPERATIONS

KEPT = {"before": (True, False, False), "after": (True, False, True, False)}
"""Which matrix products of a decoder layer's two parts stay in memory, about every second: q, k, v; o, gate,
up, down.

The parts lie before and after attention, whose inputs and results stay anyhow. Recomputing a part ends with
what the backward pass needs last, so the last product of a part is neither kept nor recomputed.
"""

KEPT_VIT = {"after": (False, True, False)}
"""The same of a ViT layer: out, fc1, fc2. What comes before its attention stays, it is small."""


def recompute_layers(model: Bagel, policy: str) -> None:
    """Wraps every layer of the decoder and of the ViT so that its backward pass computes it again.

    Args:
        model: its layers as they are, or compiled.
        policy: ``full`` keeps a layer's inputs alone; ``offload`` keeps them in memory of the host;
            ``selective`` keeps the results of attention too, and about every second matrix product.
    """
    whole = {"full": partial(checkpoint, use_reentrant=False), "offload": from_host}
    assert policy in (*whole, "selective"), policy
    parts = [(layer, KEPT) for layer in model.language_model.model.layers]
    if model.config.visual_und:
        parts += [(layer, KEPT_VIT) for layer in model.vit_model.vision_model.encoder.layers]
    for layer, kept in parts:
        if policy in whole:
            layer.forward = _again(layer, layer.forward, whole[policy])
            continue
        for name, products in kept.items():
            setattr(layer, name, _again(layer, getattr(layer, name), partial(recomputed, kept=products)))


def _again(layer: nn.Module, part: Callable[..., Any], recompute: Callable[..., Any]) -> Callable[..., Any]:
    """``part`` of a layer under ``recompute``, where there is something to learn."""

    def run(x: Any, *rest: Any) -> Any:
        inputs = [x] if isinstance(x, Tensor) else x
        learns = torch.is_grad_enabled() and (
            any(p.requires_grad for p in layer.parameters()) or any(half.requires_grad for half in inputs)
        )
        return recompute(part, x, *rest) if learns else part(x, *rest)

    return run


def from_host(part: Callable[..., Any], x: Any, *rest: Any) -> Any:
    """``part(x, *rest)``, which the backward pass computes again from ``x``, a tensor or halves, in memory of
    the host: pinned, where there is a GPU."""
    single = isinstance(x, Tensor)

    def again(*halves: Tensor) -> Any:
        return part(halves[0] if single else halves, *rest)

    # only tensors that are arguments themselves are saved where the hooks see them
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return checkpoint(again, *([x] if single else x), use_reentrant=False)


def recomputed(part: Callable[..., Any], *args: Any, kept: Sequence[bool]) -> Any:
    """``part(*args)``, of which only the arguments and some products stay in memory until the backward pass.

    ``part`` draws no random numbers, contains no attention, and runs one backward pass at most; ``kept``: for
    each of its matrix products, in the order they run, whether its result stays.
    """

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(_Keep(kept))

    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class _Keep:
    """The policy of one run of a part. Some versions of PyTorch ask it again while they recompute, 2.13 does
    not."""

    def __init__(self, kept: Sequence[bool]):
        self.kept = kept
        self.seen = [0, 0]  # products so far: forward, recomputing

    def __call__(
        self, ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        if op not in OPERATIONS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        number = self.seen[ctx.is_recompute]
        most = len(self.kept)
        assert number < most, f"more than the {most} matrix products this part of a layer should have"
        self.seen[ctx.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if self.kept[number] else CheckpointPolicy.PREFER_RECOMPUTE
