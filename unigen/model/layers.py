"""The small parts of the model. Shapes, here and in all of ``model/``:

T tokens of a packed sequence, D hidden width, H query heads, G key-value heads, d width of a head, B pictures
or samples of a group, L longest of a group, P tokens in the cache, C latent channels, p latent patch, M
latent tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigen.model.products import linear


class Linear(nn.Linear):
    """``nn.Linear``, by whatever computes its products in the least time."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return linear(x, self.weight, self.bias)


def embedding(rows: int, width: int) -> nn.Embedding:
    """As PyTorch makes it, whose own way to normal values on the meta device imports its compiler."""
    return nn.Embedding.from_pretrained(torch.randn(rows, width), freeze=False)


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)`` (Hendrycks & Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    """The function that transformers' configs call ``name``, one of ``schemas.ACTIVATIONS``. (An import of
    transformers' own table takes longer than that of PyTorch.)"""
    made = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU, "tanh": nn.Tanh}
    made |= {"quick_gelu": QuickGELU}
    return made[name]() if name in made else nn.GELU("tanh")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch computes it in float32, whatever comes in.
        if x.dtype == self.weight.dtype and not torch.is_grad_enabled():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # on a GPU one kernel, not two
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Connector(nn.Module):
    """ViT width -> decoder width: linear, activation, linear."""

    def __init__(self, in_width: int, width: int, activation: nn.Module):
        super().__init__()
        self.fc1 = Linear(in_width, width)
        self.activation = activation
        self.fc2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TimeEmbedder(nn.Module):
    """Time in [0, 1] -> [D]: 256 numbers (cosines, then sines, periods up to 10000), linear, SiLU, linear."""

    def __init__(self, width: int, frequencies: int = 256, max_period: float = 10000.0):
        super().__init__()
        self.mlp = nn.Sequential(Linear(frequencies, width), nn.SiLU(), Linear(width, width))
        self.frequencies, self.max_period = frequencies, max_period

    def forward(self, t: Tensor) -> Tensor:
        """``t`` [M] float32 -> [M, D]."""
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        freqs = torch.exp(-math.log(self.max_period) * steps / half)
        angles = t.float()[:, None] * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class PositionTable(nn.Module):
    """Fixed 2-D sine-cosine table, looked up by ``row * side + column``; never trained."""

    def __init__(self, side: int, width: int):
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)

    def fill(self) -> None:
        """(Re)computes the table in place."""
        with torch.no_grad():
            self.pos_embed.copy_(sincos_table(self.side, self.pos_embed.shape[1]))

    def forward(self, position: Tensor) -> Tensor:
        return self.pos_embed[position]


def sincos_table(side: int, width: int) -> Tensor:
    """[side * side, width] float32: first half of the width encodes the column, second half the row; each
    half is sines then cosines at frequencies ``10000^(-i / (width / 4))`` (Dosovitskiy et al. 2021 as used by
    DiT)."""
    assert width % 4 == 0
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1).float()


def rope_angles(position: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [T, 1, d] float32 of rotary embedding at ``position`` [T] (Su et al. 2021),
    for :func:`rotate`."""
    freqs = theta ** (-torch.arange(0, width, 2, dtype=torch.int64, device=position.device).float() / width)
    angles = (position[:, None].float() * freqs)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary embedding to ``x`` [T, heads, d]; halves of the width form the pairs: (a, b) -> (a cos -
    b sin, b cos + a sin)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
