"""Draws the pictures beside sample_data_format.json: ``python examples/draw_pictures.py``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from unigen.sequence.images import to_image

SIZE, FINE = 128, 4  # drawn four times as large and averaged down, for smooth edges
Colour = tuple[int, int, int]


def scene(
    sky: Colour, ground: Colour, disc: Colour, wall: Colour = (214, 178, 130), window: Colour = (96, 120, 150)
) -> Tensor:
    """A house, a tree and the sun or the moon: ``[3, 128, 128]`` in [-1, 1]."""
    y, x = torch.meshgrid(*[(torch.arange(SIZE * FINE) + 0.5) / (SIZE * FINE)] * 2, indexing="ij")
    parts = [
        (x > -1, sky),
        ((x - 0.8) ** 2 + (y - 0.2) ** 2 < 0.1**2, disc),
        (y > 0.72, ground),
        ((x > 0.2) & (x < 0.56) & (y > 0.46) & (y < 0.8), wall),
        ((y < 0.46) & (y > 0.24 + (x - 0.38).abs() * 0.95), (150, 60, 50)),
        ((x > 0.26) & (x < 0.35) & (y > 0.54) & (y < 0.64), window),
        ((x > 0.42) & (x < 0.5) & (y > 0.6) & (y < 0.8), (96, 62, 40)),
        (((x - 0.78).abs() < 0.02) & (y > 0.62) & (y < 0.82), (96, 62, 40)),
        ((y < 0.7) & (y > 0.38 + (x - 0.78).abs() * 2.4), (40, 110, 60)),
    ]
    picture = torch.zeros(3, SIZE * FINE, SIZE * FINE)
    for mask, colour in parts:
        picture[:, mask] = torch.tensor(colour, dtype=torch.float32)[:, None]
    return avg_pool2d(picture, FINE) / 127.5 - 1


def main() -> None:
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    day = {"sky": (150, 200, 240), "ground": (110, 170, 80), "disc": (250, 210, 70)}
    scenes = {
        "house_day": scene(**day),
        "house_blue": scene(**day, wall=(90, 130, 200)),
        "house_winter": scene(**day | {"sky": (205, 215, 225), "ground": (245, 248, 252)}),
        "house_night": scene((24, 28, 66), (40, 70, 50), (235, 235, 215), (120, 100, 90), (255, 220, 120)),
    }
    for name, pixels in scenes.items():
        to_image(pixels).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
