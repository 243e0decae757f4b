"""The networks of the FLUX VAE, whose parameters have the names and shapes of ``ae.safetensors``.

The autoencoder of latent diffusion (Rombach et al. 2022, appendix E.1; Esser et al. 2021, table 7). The
package diffusers has the same under other names; to import it takes longer than to import PyTorch.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from unigen.model.products import linear

GROUPS = 32  # of the norms


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


def _conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class Residual(nn.Module):
    """Two convolutions beside the input; [B, inputs, h, w] -> [B, outputs, h, w]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs)
        self.nin_shortcut = _conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class PixelAttention(nn.Module):
    """Every place of a picture looks at all places, with one head; [B, C, h, w] -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (_conv(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (_at_each_place(part, h)[:, None] for part in (self.q, self.k, self.v))
        h = _at_each_place(self.proj_out, F.scaled_dot_product_attention(q, k, v)[:, 0])
        return h.transpose(1, 2).reshape(x.shape) + x


def _at_each_place(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of single places, [B, places, C] -> the same: fused attention wants the numbers of a
    place side by side."""
    return linear(x, conv.weight.flatten(1), conv.bias)


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h / 2, w / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, 2 h, 2 w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next one; of the two only one is there, or none."""

    def __init__(self, widths: list[int], down: bool = False, up: bool = False):
        super().__init__()
        self.block = nn.ModuleList(Residual(*pair) for pair in pairwise(widths))
        self.downsample = Downsample(widths[-1]) if down else None
        self.upsample = Upsample(widths[-1]) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        resize = self.downsample or self.upsample
        return x if resize is None else resize(x)


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            Residual(width, width),
            PixelAttention(width),
            Residual(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class PixelEncoder(nn.Module):
    """Pixels [B, 3, H, W] -> mean and log of the variance of their latents [B, 2 C, H / f, W / f]."""

    def __init__(self, first: int, widths: list[int], blocks: int, channels: int):
        super().__init__()
        self.conv_in = _conv(3, first)
        self.down = nn.ModuleList(
            Level([before] + [width] * blocks, down=level < len(widths) - 1)
            for level, (before, width) in enumerate(pairwise([first, *widths]))
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PixelDecoder(nn.Module):
    """Latents [B, C, h, w] -> pixels [B, 3, h f, w f]."""

    def __init__(self, widths: list[int], blocks: int, channels: int):
        super().__init__()
        self.conv_in = _conv(channels, widths[-1])
        self.mid = Middle(widths[-1])
        # level 0 has the pixels' resolution and comes last
        self.up = nn.ModuleList(
            Level([before] + [width] * (blocks + 1), up=level > 0)
            for level, (width, before) in enumerate(pairwise([*widths, widths[-1]]))
        )
        self.norm_out, self.conv_out = _norm(widths[0]), _conv(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
