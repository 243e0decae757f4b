"""``unigen generate``: from a prompt and pictures to files to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unigen.config import UserError


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
        height: Height of a drawn picture in pixels; default: 1024. An edit keeps the size of its picture.
        width: Width of a drawn picture in pixels; default: 1024. An edit keeps the size of its picture.
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


class GenerateError(UserError):
    """The options of ``unigen generate`` cannot work; the message says which, why, and the cure."""


def answer(options: GenerateOptions) -> tuple[list[Any], list[Any]]:
    """The prompt (pictures, then the text) and the answer, each a list of texts and pictures.

    Raises:
        GenerateError: nothing is asked, or an edit has no picture.
        UserError: the checkpoint or a picture cannot be read, or the size cannot be drawn.
    """
    o = options
    prompt: list[Any] = [Path(path) for path in o.image] + ([o.prompt] if o.prompt else [])
    if not prompt:
        raise GenerateError('prompt is empty and no image is given. Cure: --prompt "..." or --image a.png')
    if o.mode == "edit" and not o.image:
        raise GenerateError("mode edit redraws a picture, and none is given. Cure: --image a.png, or --mode image")
    if (o.height is None) != (o.width is None):
        raise GenerateError("height and width go together. Cure: give both, or neither")
    from unigen.inference.inferencer import InterleaveInferencer

    inferencer = InterleaveInferencer.from_pretrained(o.model_path, o.device)
    shape = None if o.height is None else (o.height, o.width)
    common: dict[str, Any] = {"image_shapes": shape, "do_sample": o.do_sample, "text_temperature": o.temperature, "seed": o.seed}
    drawing = {name: getattr(o, name) for name in ("num_timesteps", "cfg_text_scale", "cfg_img_scale", "cfg_interval", "timestep_shift")}
    if o.mode == "auto" and not o.think:
        return prompt, inferencer.unified_generate(prompt, max_new_tokens=o.max_new_tokens, **common, **drawing)
    text = o.mode in ("text", "auto")
    pieces = inferencer.interleave_inference(
        prompt, think=o.think, understanding_output=text, max_think_token_n=o.max_new_tokens, **common, **drawing
    )
    return prompt, pieces
