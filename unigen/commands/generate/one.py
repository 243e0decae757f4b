"""``unigen generate`` of one prompt: from a text and pictures to files to look at."""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigen.commands.generate.options import GenerateOptions
from unigen.config import ConfigError, SamplingOptions
from unigen.evaluation.benchmarks import PRESETS, beaten
from unigen.messages import spoken
from unigen.values import written
from unigen.version import __version__

if TYPE_CHECKING:
    from unigen.inference.inferencer import InterleaveInferencer

OUTPUTS: dict[str, list[str] | None] = {"auto": None, "text": ["text"], "image": ["image"], "edit": ["image"]}


def checkpoint_of(
    o: GenerateOptions,
) -> tuple[InterleaveInferencer, Callable[[str], InterleaveInferencer]]:
    """The checkpoint without weights, for all that can be checked before they are read; and what reads them,
    onto a device. Both show pictures to edit, and are guided, as the preset says.

    Raises:
        UserError: a setting cannot work, or the folder is no checkpoint.
    """
    from unigen.inference.inferencer import InterleaveInferencer
    from unigen.inference.options import check_sampling
    from unigen.model.adapters import parse_adapter
    from unigen.model.quantise import bits_of
    from unigen.model.weights import base_of, build_bagel

    check_sampling(o)
    base, adapters = base_of(o.model_path, o.adapter)
    bits_of(base, o.quantize, o.double_quant)
    model = build_bagel(base)[0]
    if adapters:
        model.trained_in = parse_adapter(adapters[-1])[0]

    def as_preset(inferencer: InterleaveInferencer) -> InterleaveInferencer:
        if not o.preset:
            return inferencer
        preset, own = PRESETS[o.preset], inferencer.model.config.transforms()
        if preset.vit is not None:
            inferencer = InterleaveInferencer(
                inferencer.model, tokenizer=inferencer.tokenizer,
                vae_transform=replace(own.vae, max_size=1024, min_size=512),
                vit_edit_transform=replace(own.vit_edit, max_size=preset.vit[0], min_size=preset.vit[1]),
            )  # fmt: skip
        inferencer.builder.guidance = preset.guidance
        return inferencer

    def load(device: str) -> InterleaveInferencer:
        return as_preset(
            InterleaveInferencer.from_pretrained(
                base, device, adapters=adapters, quantize=o.quantize, double_quant=o.double_quant
            )
        )

    return as_preset(InterleaveInferencer(model)), load


def held_bits(o: GenerateOptions) -> str | None:
    """What the model's matrices are quantised to, by its folder or by the options; None: they are not."""
    from unigen.model.quantise import bits_of, told_bits
    from unigen.model.weights import base_of

    return told_bits(*bits_of(base_of(o.model_path, o.adapter)[0], o.quantize, o.double_quant))


def _made_with(o: GenerateOptions, device: str, took: dict[str, float]) -> dict[str, Any]:
    """What the page says of how an answer came about; ``took`` are seconds."""
    from unigen.show.language import Words

    words, bits = Words(spoken(), "generate"), held_bits(o)
    facts = [
        (words("model"), o.model_path),
        *((words("adapter"), one) for one in o.adapter),
        *([(words("quantize"), bits)] if bits else []),
        (words("mode"), o.mode),
        (words("seed"), str(o.seed)),
        (words("device"), device),
        (words("took"), words("with_loading", **took)),
        (words("made"), time.strftime("%Y-%m-%d %H:%M:%S")),
        (words("version"), f"Unigen {__version__}"),
    ]
    settings = [(one.name, written(getattr(o, one.name))) for one in fields(SamplingOptions)]
    return {"facts": facts, "settings": settings, "command": _repeating(o)}


def _repeating(options: GenerateOptions) -> str:
    """The command that gives the same answer again."""
    plain = GenerateOptions(
        **GenerateOptions.completed({"model_path": options.model_path, "preset": options.preset})
    )
    argv = ["unigen", "generate", "--model_path", options.model_path]
    argv += ["--preset", options.preset] if options.preset else []
    for one in fields(GenerateOptions):
        value = getattr(options, one.name)
        if value != getattr(plain, one.name) or one.name == "seed":
            several = value if isinstance(value, list | tuple) else [value]
            argv += [f"--{one.name}", *map(written, several)]
    return shlex.join(argv)


def write_one(o: GenerateOptions) -> None:
    """Answers one prompt.

    Raises:
        ConfigError: nothing is asked, or an edit has no picture.
        UserError: a setting cannot work, the checkpoint or a picture cannot be read, the size cannot be
            drawn, prompt and answer are longer than the model's context, or the folder cannot be written.
    """
    from unigen.inference.requests import sample_of
    from unigen.outputs import output_folder, unwritten
    from unigen.show.pages import refuse_strangers, write_answer
    from unigen.show.terminal import say

    pictures = [Path(path) for path in o.image]
    prompt: list[Any] = [*pictures, *([o.prompt] if o.prompt else [])]
    folder = output_folder("output_dir", o.output_dir, [o.model_path, *pictures])
    refuse_strangers(folder, inputs=pictures)
    for sentence in beaten(o.preset, o):
        say(sentence)
    if o.seed is None:  # another one each time, but one that is known
        o.seed = secrets.randbelow(1 << 31)
    if not prompt:
        raise ConfigError('prompt is empty and no image is given. Fix: --prompt "..." or --image a.png')
    if o.mode == "edit" and not o.image:
        raise ConfigError(
            "mode edit redraws a picture, and none is given. Fix: --image a.png, or --mode image"
        )
    empty, load = checkpoint_of(o)
    sample_of(prompt)
    empty.requests.prepare([prompt], OUTPUTS[o.mode], o)
    began = time.perf_counter()
    inferencer = load(o.device)
    inferencer.requests = empty.requests  # which has told what there is to tell
    loaded = time.perf_counter()
    pieces = inferencer.unified_generate(prompt, outputs=OUTPUTS[o.mode], options=o)
    took = {"loading": loaded - began, "seconds": time.perf_counter() - loaded}
    for piece in pieces:
        if isinstance(piece, str):
            print(piece)  # the model's own words
        else:
            say(f"[picture of {piece.width} x {piece.height}]")
    with unwritten("output_dir", folder):
        made = _made_with(o, str(inferencer.model.device), took)
        page = write_answer(folder, prompt, pieces, made=made)
    say(f"Written to {page}")
