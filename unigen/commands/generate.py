"""``unigen generate``: from a prompt and pictures to files to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unigen.config import SamplingOptions, UserError
from unigen.values import Device, PathText


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


class GenerateError(UserError):
    """The options of ``unigen generate`` cannot work; the message says which, why, and the fix."""


OUTPUTS: dict[str, list[str] | None] = {"auto": None, "text": ["text"], "image": ["image"], "edit": ["image"]}


def answer(options: GenerateOptions) -> tuple[list[Any], list[Any]]:
    """The prompt (pictures, then the text) and the answer, each a list of texts and pictures.

    Raises:
        GenerateError: nothing is asked, or an edit has no picture.
        UserError: a setting cannot work, the checkpoint or a picture cannot be read, the size cannot be
            drawn, or prompt and answer are longer than the model's context.
    """
    o = options
    prompt: list[Any] = [Path(path) for path in o.image] + ([o.prompt] if o.prompt else [])
    if not prompt:
        raise GenerateError('prompt is empty and no image is given. Fix: --prompt "..." or --image a.png')
    if o.mode == "edit" and not o.image:
        raise GenerateError(
            "mode edit redraws a picture, and none is given. Fix: --image a.png, or --mode image"
        )
    if o.double_quant and o.quantize != "nf4":
        raise GenerateError("double_quant needs quantize nf4. Fix: --quantize nf4, or leave double_quant out")
    from unigen.inference.inferencer import InterleaveInferencer
    from unigen.inference.options import check_sampling
    from unigen.inference.requests import sample_of
    from unigen.model.adapters import parse_adapter
    from unigen.model.weights import base_of, build_bagel

    check_sampling(o)
    sample_of(prompt)
    base, adapters = base_of(o.model_path, o.adapter)
    empty = build_bagel(base)[0]  # no weights are read yet
    if adapters:
        empty.trained_in = parse_adapter(adapters[-1])[0]
    requests = InterleaveInferencer(empty).requests
    requests.prepare([prompt], OUTPUTS[o.mode], o)
    inferencer = InterleaveInferencer.from_pretrained(
        base, o.device, adapters=adapters, quantize=o.quantize, double_quant=o.double_quant
    )
    inferencer.requests = requests  # which has told what there is to tell
    return prompt, inferencer.unified_generate(prompt, outputs=OUTPUTS[o.mode], options=o)


def generate(options: GenerateOptions) -> None:
    """``unigen generate``."""
    from unigen.outputs import output_folder, unwritten
    from unigen.show.pages import refuse_strangers, write_answer

    pictures = [Path(path) for path in options.image]
    folder = output_folder("output_dir", options.output_dir, [options.model_path, *pictures])
    refuse_strangers(folder, inputs=pictures)
    prompt, pieces = answer(options)
    for piece in pieces:
        print(piece if isinstance(piece, str) else f"[picture of {piece.width} x {piece.height}]")
    with unwritten("output_dir", folder):
        page = write_answer(folder, prompt, pieces, title="Unigen")
    print(f"Written to {page}")
