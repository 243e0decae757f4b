"""Weights in bfloat16 that learn without a float32 copy: each update is computed in float32 and rounded
stochastically (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"; Zamirai et al. 2020).

A weight moves by less than half of bfloat16's last place in most steps, so that rounding to the nearest would
undo them. Rounded up with the chance of what is cut off, it moves by the right amount on average. The random
bits follow from (seed, updates so far, name of the parameter, place in it), as all random numbers do
(:mod:`unigen.sequence.draw`), so every process draws the same ones and a resume goes on with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from unigen.sequence.draw import RandomKey

CHUNK = 1 << 24  # elements rounded at a time, a multiple of 4

# SplitMix64 (Steele, Lea and Flood 2014) in signed numbers, which wrap alike
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def random_bits(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` numbers [count] int32 in [0, 65536), uniform, that follow from ``seed``; four of each word of
    SplitMix64."""
    z = torch.arange(1, -(-count // 4) + 1, dtype=torch.int64, device=device).mul_(_STEP).add_(seed)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        z.bitwise_xor_((z >> shift) & ((1 << (64 - shift)) - 1)).mul_(factor)
    return z.view(torch.int16)[:count].int() & 0xFFFF


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """``values`` [n] float32 as bfloat16: the next one away from zero with the chance of what is cut off.
    ``bits`` [n] int32 in [0, 65536)."""
    raw = values.view(torch.int32) + bits
    return (raw & -0x10000).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def round_into(weight: Tensor, values: Tensor, seed: int, name: str, count: int) -> None:
    """Puts float32 ``values`` into the bfloat16 ``weight`` of the same shape after its update ``count``."""
    flat, wide = weight.view(-1), values.detach().view(-1)
    for at in range(0, len(flat), CHUNK):
        piece = wide[at : at + CHUNK]
        key = RandomKey(seed, count, -1).seed_for(f"rounding/{name}/{at}")
        flat[at : at + CHUNK] = rounded(piece, random_bits(key, len(piece), piece.device))


class RoundedAdamW(torch.optim.AdamW):
    """AdamW with float32 moments, one parameter at a time: those in bfloat16 are rounded stochastically."""

    seed = 0
    moment_dtype = torch.float32  # also where the weights are bfloat16

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None:
                    self._update(group, name, p)

    def _update(self, group: dict[str, Any], name: str, p: Tensor) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(p, dtype=torch.float32)
        wide = p.detach().float()  # itself, where it is that already
        beta1, beta2 = group["betas"]
        adamw(
            [wide], [p.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            foreach=False, fused=False, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        if p.dtype == torch.bfloat16:
            round_into(p, wide, self.seed, name, int(state["step"]))
