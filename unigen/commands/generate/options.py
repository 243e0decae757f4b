"""The options of ``unigen generate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from unigen.config import SamplingOptions
from unigen.evaluation.benchmarks import LayoutName, PresetName, preset_values
from unigen.values import Count, Device, PathText, Spelling


@dataclass(kw_only=True)
class GenerateOptions(SamplingOptions):
    """What to generate, and from what.

    Args:
        model_path: Folder of the checkpoint, in the published BAGEL layout.
        prompt: The text to start from; a question, a description, or an instruction.
        image: Pictures to start from, in order; they come before the prompt.
        mode: text answers in text, image draws, edit redraws the last picture; auto lets the model decide
            what comes next.
        output_dir: Folder for the texts, the pictures and index.html.
        device: auto, cpu, cuda, or one GPU such as cuda:1.
        quantize: Hold the decoder's matrices in 4 bits (nf4) or 8 bits (int8): less memory, and a little less
            true.
        double_quant: Quantise the scales of nf4, too: 0.4 bits fewer a number.
        adapter: Folders of adapters to add up, FOLDER or FOLDER:FACTOR; model_path may itself be one.
        preset: Sampling settings with which a benchmark's published numbers were drawn, where no option says
            otherwise.
        prompts_file: The prompts of a benchmark in place of prompt, as its authors distribute them; their
            pictures go to output_dir. The same command goes on where it was stopped.
        layout: Which public scorer's folder they are written as; default: that of preset.
        image_root: Folder that relative paths of pictures in prompts_file start from. Default: that of the
            file.
        samples: The first so many prompts of the file; default: all.
        num_images: Pictures of each prompt; default: as many as preset's benchmark takes, else 1.
        batch_size: Pictures drawn at once. It is part of what they depend on.
        shard: Draw only part I of N, as I/N, from 1/N to N/N; for processes that torchrun does not start.
    """

    model_path: PathText
    prompt: str = ""
    image: list[PathText] = field(default_factory=list)
    mode: Literal["auto", "text", "image", "edit"] = "auto"
    output_dir: PathText = "outputs/generate"
    device: Device = "auto"
    quantize: Literal["nf4", "int8"] | None = None
    double_quant: bool = False
    adapter: list[PathText] = field(default_factory=list)
    preset: PresetName | None = None
    prompts_file: PathText | None = None
    layout: LayoutName | None = None
    image_root: PathText | None = None
    samples: Count | None = None
    num_images: Count | None = None
    batch_size: Count = 1
    shard: Annotated[str, Spelling(r"[1-9]\d*/[1-9]\d*", "I/N, such as 1/8")] | None = None

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` options and those of their preset, which any option beats."""
        return preset_values(given)
