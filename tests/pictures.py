"""Pictures that tests draw, the same ones every time."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0, spread: float = 90.0) -> Image.Image:
    """An RGB picture of grey noise: normal around 128, clipped."""
    levels = np.random.default_rng(seed).normal(128, spread, (height, width)).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
