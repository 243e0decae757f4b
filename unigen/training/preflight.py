"""Are these the weights that they should be? The losses before the first step say it."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator

from unigen.config import Config
from unigen.training.engine import Engine
from unigen.training.guards import TrainingStopped

log = logging.getLogger("unigen")

CHANCE = 0.9  # of ln(vocabulary): a text loss above it says that the model knows no text
BLIND = 1.8  # an image loss above it says that it cannot draw; velocities of zero give about 2
# fewer labels, in all or a sample, are mostly of tokens that say what comes next, which a trained model need
# not know
FEW_LABELS, FEW_A_SAMPLE = 16, 8
LARGE = 10**9  # parameters; nobody trains so many from random weights with a fine-tuning program


def enough_labels(labels: float, samples: float) -> bool:
    """Do so many labels say whether a model knows text?"""
    return labels >= max(FEW_LABELS, FEW_A_SAMPLE * samples)


def judge_losses(
    engine: Engine,
    text: float | None,
    image: float | None,
    what: str = "first",
    doubted: Collection[str] = (),
) -> frozenset[str]:
    """Says what the losses of weights that have not been trained here say of them; which are out of place.

    Args:
        text, image: the losses; None where too little says something of them.
        what: losses they are.
        doubted: those of which it was said before, and is not again.

    Raises:
        TrainingStopped: they are outside of what the recipe expects, or those of no trained model where it
            should be one; with ``preflight`` warn that is a warning.
    """
    config, vocabulary = engine.config, engine.model.config.llm.vocab_size
    large = sum(shard.shape.numel() for shard in engine.shards()) >= LARGE
    found = set(doubted)
    for kind, (words, pictures) in {"text": (text, None), "image": (None, image)}.items():
        if kind in doubted:
            continue
        for problem, grave in doubts(config, vocabulary, large, words, pictures, what):
            found.add(kind)
            if grave and config.preflight == "stop":
                raise TrainingStopped(f"{problem}; where they are meant to be as they are, --preflight warn")
            if engine.main and grave:
                log.warning("%s", problem)
            elif engine.main:
                log.info("Preflight: %s; right where it trains from random weights", problem.split(":")[0])
    return frozenset(found)


def doubts(
    config: Config, vocabulary: int, large: bool, text: float | None, image: float | None, what: str = "first"
) -> Iterator[tuple[str, bool]]:
    """What the first losses (arguments as :func:`judge_losses`) say against the weights, and whether that
    ends the run.

    It does where a recipe says what to expect, and where a ``large`` model (:data:`LARGE`) knows no text: a
    small one may well begin with random weights. ``vocabulary``: size of the text head.
    """
    known = math.log(vocabulary)
    if text is not None:
        outside = _outside(config.expect_text_loss, text)
        if text >= CHANCE * known:
            yield (
                f"the {what} text loss is {text:.4g}, that of a model that knows no text (ln of"
                f" {vocabulary:,} tokens is {known:.4g}): the weights were never loaded, are of another"
                " model, or the tokenizer is. Fix: check model_path",
                large or outside,
            )
        elif outside:
            yield (
                f"the {what} text loss is {text:.4g}, and expect_text_loss {_band(config.expect_text_loss)}."
                " Fix: check model_path and the data's texts, or give the band of this data",
                True,
            )
    if image is not None and _outside(config.expect_image_loss, image):
        why = (
            "that of a model that cannot draw: its weights were never loaded, or its latents are not those it"
            " was trained on (ae.safetensors, vae_config.json, max_latent_size)"
            if image >= BLIND
            else f"and expect_image_loss {_band(config.expect_image_loss)}"
        )
        yield (
            f"the {what} image loss is {image:.4g}, {why}. Fix: check model_path, or give another band",
            True,
        )


def _outside(band: tuple[float, float] | None, loss: float) -> bool:
    return band is not None and not band[0] <= loss <= band[1]


def _band(band: tuple[float, float] | None) -> str:
    return "{:g} to {:g}".format(*(band or (0.0, math.inf)))
