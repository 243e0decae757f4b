"""AdamW with moments of 8 bits (Dettmers et al. 2022): bitsandbytes' optimiser, and its state out and in as
plain float32.

A moment is stored in blocks of 256 elements, each a code of 8 bits for a share of the block's largest
magnitude: about 2 bytes a parameter instead of 8. Embeddings, and tensors (or shards) below 4096 elements,
keep moments of 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import Config, UserError
from unigen.model.hub import without_hub_kernels
from unigen.model.parts import is_embedding
from unigen.training.rounding import round_into

BLOCK = 256  # elements that share a scale; bitsandbytes has no other for its optimisers
CHUNK = 1 << 22  # elements quantised at a time, a multiple of BLOCK


def build_adamw8bit(groups: Sequence[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """The optimiser.

    Args:
        groups: ``params`` as (name, parameter) pairs, ``weight_decay``; plain tensors of any shape, float32
            or bfloat16, on CPU or CUDA. Empty ones (a process can hold no row of a parameter) are left out.

    Raises:
        UserError: bitsandbytes is missing or too old.
    """
    parted: list[dict[str, Any]] = []
    for group in groups:
        for bits in (8, 32):
            # rows of an embedding are met rarely and unevenly: their second moment needs its full range
            params = [(n, p) for n, p in group["params"] if p.numel() and is_embedding(n) == (bits == 32)]
            if params:
                parted.append({**group, "params": params, "optim_bits": bits})
    if not parted:  # PyTorch refuses to hold nothing at all
        parted = [{"params": [], "optim_bits": 8}]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = _adamw8bit()(parted, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)
    optimizer.seed = config.seed  # type: ignore[attr-defined]
    return optimizer


@cache
def _adamw8bit() -> type[torch.optim.Optimizer]:
    try:
        with without_hub_kernels():
            from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"--optimizer adamw8bit needs bitsandbytes ({error}). Fix: pip install 'bitsandbytes>=0.50' (the"
            " extra adam8bit)"
        ) from error

    class Grouped(AdamW8bit):
        """Bits by group. The library's own way is one global table of the addresses of tensors, which other
        tensors take over."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return super().get_config(gindex, pindex, group) | {"optim_bits": group["optim_bits"]}

        def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
            """A weight in bfloat16 is updated in float32 and rounded stochastically."""
            if p.dtype != torch.bfloat16:
                return super().update_step(group, p, gindex, pindex)
            assert p.grad is not None
            wide = nn.Parameter(p.detach().float())
            wide.grad = p.grad.float()
            self.state[wide] = self.state[p]
            super().update_step(group, wide, gindex, pindex)
            del self.state[wide]
            count = int(self.state[p]["step"])
            return round_into(p, wide, self.seed, group["param_names"][pindex], count)  # type: ignore[attr-defined]

    return Grouped


# ---- the state


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[float, Tensor, Tensor] | None:
    """Updates so far and the two moments: flat float32 [n] copies. None before the first update (and for an
    empty parameter)."""
    state = optimizer.state.get(parameter)
    if not state:
        return None
    return float(state["step"]), _plain(state, 1), _plain(state, 2)


@torch.no_grad()
def set_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: float, *moments: Tensor
) -> None:
    """Puts back moments (flat, of any device) after ``step`` updates; 0 forgets them.

    What :func:`moments` gave becomes the same codes, and scales that give the same values bit by bit, so a
    run goes on as if it had never stopped. Moments of another origin (of 32 bits, or cut at other places) are
    rounded to 8 bits.
    """
    optimizer.state.pop(parameter, None)
    if step == 0 or not parameter.numel():
        return
    g, i, group = _place(optimizer, parameter)
    optimizer.init_state(group, parameter, g, i)  # type: ignore[attr-defined]
    state = optimizer.state[parameter]
    state["step"] = int(step)
    for number, values in enumerate(moments, 1):
        stored = state[f"state{number}"].view(-1)
        if stored.dtype == torch.float32:
            stored.copy_(values)
            continue
        for at in range(0, len(stored), CHUNK):
            piece = values[at : at + CHUNK].to(stored.device, torch.float32)
            codes, scales = quantise(piece, state[f"qmap{number}"])
            stored[at : at + CHUNK] = codes
            state[f"absmax{number}"][at // BLOCK : at // BLOCK + len(scales)] = scales


def _place(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[int, int, dict[str, Any]]:
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p is parameter:
                return g, i, group
    raise AssertionError("the optimiser does not hold this parameter")


def _plain(state: dict[str, Any], number: int) -> Tensor:
    """A moment as float32 [n] in host memory: on the GPU those of all parameters would not fit beside the
    run."""
    stored = state[f"state{number}"].view(-1)
    if stored.dtype == torch.float32:
        return stored.to("cpu", copy=True)
    return dequantise(stored, state[f"absmax{number}"], state[f"qmap{number}"])


def dequantise(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """``codes`` [n] uint8, ``scales`` [ceil(n / 256)], ``table`` [256] -> [n] float32, the values that the
    optimiser computes with.

    The result lies in host memory.
    """
    values = torch.empty(len(codes))
    for at in range(0, len(codes), CHUNK):
        piece = codes[at : at + CHUNK]
        scale = scales[at // BLOCK : -(-(at + len(piece)) // BLOCK)].repeat_interleave(BLOCK)[: len(piece)]
        values[at : at + len(piece)] = table[piece.int()] * scale
    return values


def quantise(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` [n] float32 and the sorted ``table`` [256] -> codes [n] uint8, scales [ceil(n / 256)].
    Inverts :func:`dequantise`.

    The largest positive code is 1, so a block's scale is its largest value. A signed table has no -1: a block
    whose largest magnitude is negative came from the most negative code, and its scale is the float32 that
    gives all its values back.
    """
    blocks = torch.cat([values, values.new_zeros(-len(values) % BLOCK)]).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    low = table[0]
    negative = (-blocks.amin(1, keepdim=True) == scales) & (low < 0) & (scales > 0)
    rounded = torch.where(negative, scales / low.abs().clamp_min(torch.finfo(torch.float32).tiny), scales)
    codes, best = _nearest(blocks, rounded, table), rounded
    rows = negative[:, 0].nonzero()[:, 0]
    if len(rows):  # the division is off by a unit in the last place here and there
        wanted, shares, tried = blocks[rows], table[codes[rows]], rounded[rows]
        chosen, least = tried, (shares * tried != wanted).sum(1, keepdim=True)
        for direction in (0.0, torch.inf):
            near = tried
            for _ in range(2):
                near = torch.nextafter(near, near.new_tensor(direction))
                wrong = (shares * near != wanted).sum(1, keepdim=True)
                chosen, least = torch.where(wrong < least, near, chosen), torch.minimum(wrong, least)
        best = rounded.index_copy(0, rows, chosen)
    return codes.view(-1)[: len(values)].to(torch.uint8), best[:, 0].contiguous()


def _nearest(blocks: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The nearest code of every value, int64 like ``blocks``."""
    shares = blocks / torch.where(scales > 0, scales, 1.0)
    return torch.bucketize(shares, (table[1:] + table[:-1]) / 2)
