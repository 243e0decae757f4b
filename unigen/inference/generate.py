"""``unigen generate``: from a prompt and pictures to files to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class GenerateOptions:
    """What to generate, from what, and how.

    Args:
        model_path: Folder of the checkpoint, in the published BAGEL layout.
        prompt: The text to start from; a question, a description, or an instruction.
        image: Pictures to start from, in order; they come before the prompt.
        mode: text answers in text, image draws, edit redraws the last picture; auto lets the model decide what comes next.
        output_dir: Folder for the texts, the pictures and index.html.
        seed: Seed of the noise and of the sampled tokens.
        max_new_tokens: Most tokens of one text, thinking included.
        num_timesteps: Points of the time grid from noise to picture; N points are N - 1 Euler steps.
        cfg_text_scale: Guidance by the text; 1 turns it off.
        cfg_img_scale: Guidance by the context pictures, on top of the text's; 1 turns it off.
        cfg_interval: The times (low, high] in which guidance acts.
        timestep_shift: Shift of the time grid; larger spends more steps near the noise.
        height: Height of a drawn picture in pixels; default: 1024, or the edited picture's own.
        width: Width of a drawn picture in pixels; default: 1024, or the edited picture's own.
        think: Let the model reason in text before it answers or draws.
        temperature: Temperature of sampled tokens; read only with do_sample.
        do_sample: Sample tokens instead of taking the most likely one.
        device: cuda, cpu, or auto.
    """

    model_path: str
    prompt: str = ""
    image: list[str] = field(default_factory=list)
    mode: Literal["auto", "text", "image", "edit"] = "auto"
    output_dir: str = "outputs/generate"
    seed: int = 42
    max_new_tokens: int = 1000
    num_timesteps: int = 50
    cfg_text_scale: float = 3.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    timestep_shift: float = 3.0
    height: int | None = None
    width: int | None = None
    think: bool = False
    temperature: float = 0.3
    do_sample: bool = False
    device: str = "auto"
