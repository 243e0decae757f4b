"""Rectified flow: time law, shift, mix, velocity, guidance, Euler step. Loss and sampler both import these
lines.

``x_t = (1 - t) x_0 + t noise`` runs from data at t = 0 to noise at t = 1; the model predicts ``noise - x_0``
(Liu et al. 2022, "Flow Straight and Fast", eq. 1; the logit-normal time law and its shift: Esser et al. 2024,
eqs. 19 and 23).
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Moves times in [0, 1] towards the noise by ``shift`` (1 leaves them)."""
    return shift * t / (1 + (shift - 1) * t)


def training_time(u: Tensor, shift: float) -> Tensor:
    """Standard normal draws ``u`` -> training times; ``-inf`` gives 0, a clean image."""
    return shift_time(torch.sigmoid(u), shift)


def mix(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t`` for tokens [M, c] at times ``t`` [M]."""
    t = t[:, None].to(x0.dtype)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model predicts: d x_t / d t."""
    return noise - x0


def sampling_times(points: int, shift: float, device: torch.device | str = "cpu") -> Tensor:
    """``points`` times from 1 to 0, shifted; they make ``points - 1`` Euler steps."""
    return shift_time(torch.linspace(1, 0, points, device=device), shift)


def euler_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    return x - v * (t - t_next)


def guide(
    v: Tensor,
    no_text: Tensor | None,
    no_image: Tensor | None,
    text_scale: float,
    image_scale: float,
    renorm_type: str,
    renorm_min: float,
) -> Tensor:
    """Classifier-free guidance of one picture's velocity ``v`` [M, c] (Ho & Salimans 2022; two conditions as
    in Brooks et al. 2023, eq. 3), renormalised by ``min(1, max(renorm_min, |v| / |v_guided|))``.

    The text step happens only for ``text_scale > 1``, the image step only together with it and for
    ``image_scale > 1``. ``renorm_type`` says over what norms are taken: ``global`` (everything), ``channel``
    (each token), ``text_channel`` (each token, after the text step alone).
    """
    if text_scale <= 1:
        return v
    assert no_text is not None
    guided = no_text + text_scale * (v - no_text)
    if renorm_type == "text_channel":
        guided = _renorm(guided, v, renorm_min, per_token=True)
    if image_scale > 1:
        assert no_image is not None
        guided = no_image + image_scale * (guided - no_image)
    if renorm_type != "text_channel":
        guided = _renorm(guided, v, renorm_min, per_token=renorm_type == "channel")
    return guided


RENORM_TYPES = ("global", "channel", "text_channel")


def _renorm(guided: Tensor, v: Tensor, least: float, per_token: bool) -> Tensor:
    axes = {"dim": -1, "keepdim": True} if per_token else {}
    scale = torch.linalg.vector_norm(v, **axes) / (torch.linalg.vector_norm(guided, **axes) + 1e-8)
    return guided * scale.clamp(min=least, max=1.0)
