"""``unigen plan``: what a training would take, before anything is bought, downloaded or waited for."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigen.commands.plan.options import PlanOptions
from unigen.config import Config, ConfigError
from unigen.outputs import output_file, unwritten

if TYPE_CHECKING:
    from unigen.commands.plan.changes import Outcome
    from unigen.model.config import BagelConfig
    from unigen.model.sizes import Load

BY = "unigen plan"
# Of n x 2^30 bytes that a card's name says, what programs get: the driver keeps some, and GDDR6, which cards
# below STACKED gigabytes have, gives 1/16 to its error correction. Reported by torch in GiB: 14.56 of a T4's
# 16, 44.4 of an L40S's 48, 79.2 of an A100's 80; of 23,034 MiB of an L4 it gets less, too.
STACKED, USABLE, USABLE_BELOW = 64, 0.98, 0.91
# gigabytes -> a card of that size and its dense bfloat16 FLOP/s by NVIDIA's data sheets
CARDS = {24: ("RTX 4090", 165), 48: ("L40S", 362), 80: ("H100", 989), 141: ("H200", 989)}


def plan(options: PlanOptions) -> int:
    """``unigen plan``: 0 where it fits (or nothing was asked), 1 where it takes a change, or none helps.

    Raises:
        UserError: the options contradict each other, or the config files of the model cannot be read.
    """
    if not options.model_path:
        raise ConfigError("model_path is missing. Fix: give the folder of a BAGEL checkpoint, or its configs")
    place = output_file("auto", options.auto, BY, [options.model_path]) if options.auto else None
    gigabytes = read_memory(options.gpu_memory)

    from unigen.model.weights import base_of, read_shape

    options.model_path = str(base_of(options.model_path)[0])  # a training starts from no adapter
    config = Config(**{f.name: getattr(options, f.name) for f in fields(Config)})

    from unigen.commands.plan.changes import fitting
    from unigen.model.quantise import adopt_bits

    adopt_bits(config).resolve(data=False)
    model = read_shape(Path(options.model_path), config)
    room = room_of(gigabytes) if gigabytes else None
    outcome = fitting(model, config, options.gpus, room, lambda asked: load_of(options, asked, model))
    if place is not None:
        with unwritten("auto", place):
            from unigen.commands.plan.report import recipe
            from unigen.files import atomic, make_folders

            make_folders(place.parent)
            with atomic(place) as file:
                file.write(recipe(outcome, options).encode())
    print_plan(outcome, options, gigabytes, place)
    return 0 if outcome.fits and not outcome.changes else 1


def read_memory(text: str | None) -> float | None:
    """Gigabytes of ``24GB``, ``24 GiB`` or ``24``. Raises ConfigError."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b?)?\s*", text, re.IGNORECASE)
    if not found or not 1 <= float(found[1]) <= 10_000:
        raise ConfigError(f"gpu_memory is {text!r}. Fix: give gigabytes, such as 24GB (--gpu_memory 24GB)")
    return float(found[1])


def room_of(gigabytes: float) -> float:
    """Bytes that any usual card gives whose name says so many gigabytes."""
    return gigabytes * 2**30 * (USABLE if gigabytes >= STACKED else USABLE_BELOW)


def load_of(options: PlanOptions, config: Config, model: BagelConfig) -> Load:
    """The largest packed sequence of a run with the options ``config``: full of pictures to draw, unless
    ``options`` say what is in it.

    Raises:
        ConfigError: more tokens of pictures than a packed sequence has.
    """
    from unigen.model.sizes import Load

    picture = min(config.max_image_tokens, model.max_latent_size**2)
    tokens = config.max_num_tokens or config.batch_size * (picture * model.visual_gen + 256)
    load = Load.filled(tokens, model, picture)
    gen = load.gen if options.latent_tokens is None else options.latent_tokens
    patches = load.patches if options.vit_tokens is None else options.vit_tokens
    if gen + patches > tokens:
        raise ConfigError(
            f"latent_tokens and vit_tokens are {gen + patches:,} together, of {tokens:,} tokens. Fix: fewer, "
            "or a larger --max_num_tokens"
        )
    labels = tokens - gen - patches if options.label_tokens is None else options.label_tokens
    pixels = 0 if config.cache_dir else gen * model.latent_stride**2
    und, labels = tokens - gen, min(labels, tokens - gen)
    load = replace(load, und=und, gen=gen, patches=patches, labels=labels, noised=gen, pixels=pixels)
    if config.preserve_weight is None:
        return load
    return load.keeping(learnt=not any(source.preserve for source in config.sources()))


def print_plan(outcome: Outcome, options: PlanOptions, gigabytes: float | None, place: Path | None) -> None:
    """Prints the plan."""
    from unigen.commands.plan.report import as_json, report
    from unigen.show.language import Words
    from unigen.show.terminal import reader_may_leave, say

    named, tflops = speed_of(options, gigabytes)
    seconds = None
    if tflops:
        seconds = outcome.plan.flop / (tflops * 1e12 * options.share_of_peak * options.gpus)
    facts: dict[str, Any] = {"card": named, "tflops": tflops, "share": options.share_of_peak}
    facts |= {"seconds": seconds, "auto": str(place) if place else None, "gpus": options.gpus}
    with reader_may_leave():
        if options.json:
            print(json.dumps(as_json(outcome) | facts, indent=1, ensure_ascii=False))
        else:
            say(*report(outcome, facts, Words(options.language, "plan")))


def speed_of(options: PlanOptions, gigabytes: float | None) -> tuple[str, float | None]:
    """A card's name and its TFLOP/s: those that were given, or those of a usual card of that memory."""
    if options.gpu_tflops is not None:
        return "", options.gpu_tflops
    return CARDS.get(round(gigabytes or 0), ("", None))
