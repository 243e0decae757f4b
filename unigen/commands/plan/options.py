"""What ``unigen plan`` is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unigen.config import Config
from unigen.values import Count, PathText, Positive, Range, Whole


@dataclass
class PlanOptions(Config):
    """What the run would be: give the options of training, best as its recipe. Weights need not be there, the
    config files of the checkpoint will do.

    Args:
        gpus: How many GPUs, each with one process.
        gpu_memory: Memory of each, as its name says it, such as 24GB. Without it nothing is judged.
        latent_tokens: Latent tokens among those of a packed sequence. Default: as many pictures of
            max_image_tokens as max_num_tokens (or batch_size pictures) hold.
        vit_tokens: ViT tokens among those of a packed sequence. Default: none where the model draws.
        label_tokens: Tokens of text to learn in a packed sequence. Default: all that are of no picture.
        gpu_tflops: Dense TFLOP/s of a GPU in the run's precision, for the time of a step. Default: of a usual
            card of that memory.
        share_of_peak: The share of them that is reached.
        auto: File for the recipe of what fits.
        json: Print JSON.
        language: Language of what is printed; default that of the locale.
    """

    gpus: Count = 1
    gpu_memory: str | None = None
    latent_tokens: Whole | None = None
    vit_tokens: Whole | None = None
    label_tokens: Whole | None = None
    gpu_tflops: Positive | None = None
    share_of_peak: Annotated[float, Range(0, 1, above=True)] = 0.35
    auto: PathText | None = None
    json: bool = False
    language: Literal["en", "zh"] | None = None
