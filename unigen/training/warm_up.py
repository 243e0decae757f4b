"""Before the first step: the largest packed sequence goes forward and backward; its numbers are looked at.

Memory runs out now or never; losses and gradients say whether something learns, and whether the weights are
what they should be (preflight).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unigen.config import Config
from unigen.data.loader import LoaderState, PackStream
from unigen.model.parts import ADAPTER_MARKS, title
from unigen.model.sizes import Load
from unigen.model.storage import few
from unigen.sequence.draw import RandomKey
from unigen.sequence.types import Pack
from unigen.training.engine import Engine
from unigen.training.failures import LESS_MEMORY
from unigen.training.guards import TrainingStopped
from unigen.training.step import Counts, forward_backward

log = logging.getLogger("unigen")

_LOOKED_AT = 64  # records in which other targets are looked for, where the warm-up batch gave no gradient
CHANCE = 0.9  # of ln(vocabulary): a text loss above it says that the model knows no text
BLIND = 1.8  # an image loss above it says that it cannot draw; velocities of zero give about 2
# fewer labels, in all or a sample, are mostly of tokens that say what comes next, which a trained model need
# not know
FEW_LABELS, FEW_A_SAMPLE = 16, 8
LARGE = 10**9  # parameters; nobody trains so many from random weights with a fine-tuning program


@dataclass(frozen=True)
class WarmUp:
    """What the warm-up batch was, and what it took."""

    load: Load
    peak: int  # bytes of a GPU's memory; 0 on a CPU


def warm_up(engine: Engine, stream: PackStream, micro_batches: int = 1, fresh: bool = True) -> WarmUp:
    """Takes the largest packed sequence forward and backward, so that memory runs out now or never.

    Where a step has several ``micro_batches`` on each process it goes twice: the second forward runs while
    the first one's gradients are held. Nothing of it stays.

    Args:
        engine: of the run.
        stream: of the training data.
        micro_batches: of a step, on each process.
        fresh: are the weights those of ``model_path``? Their losses are looked at then.

    Raises:
        TrainingStopped: it does not fit into the memory of the device, its loss or gradient is not finite,
            nothing learns from the data, or the weights are not what they should be (``preflight``).
    """
    pack = stream.build_largest().pack
    packs, peaks, sums = [pack] * min(micro_batches, 2), [], torch.zeros(2)
    try:
        held = _moments_to_come(engine)
        _restart_peak(engine.device)
        for found in forward_backward(engine, packs, Counts.of(packs), engine.config):
            sums = found
            peaks.append(_restart_peak(engine.device))
    except torch.OutOfMemoryError as error:
        which = "" if len(packs) == 1 else f" as micro-batch {len(peaks) + 1} of a step"
        raise TrainingStopped(
            f"The largest packed sequence, {len(pack):,} tokens, does not fit{which} into the memory of"
            f" {engine.device} ({str(error).splitlines()[0]}). Fix: {LESS_MEMORY}"
        ) from error
    del held
    _look_at_numbers(engine, stream, pack, sums)
    if fresh:
        _look_at_losses(engine, pack, sums)
    engine.discard()
    twice = "" if len(packs) == 1 else " twice, as two micro-batches of a step"
    took = " and ".join(f"{peak / 2**30:.1f} GiB" for peak in peaks)
    log.info(
        "Warm-up batch: %s tokens of %d sample(s) went forward and backward%s%s",
        f"{len(pack):,}",
        pack.n_samples,
        twice,
        f", at most {took}" if engine.device.type == "cuda" else "",
    )
    return WarmUp(Load.of(pack), max(peaks))


def _look_at_numbers(engine: Engine, stream: PackStream, pack: Pack, sums: Tensor) -> None:
    """Raises TrainingStopped where the warm-up batch's numbers promise no training; says which part gets no
    gradient from it."""
    losses, norm = engine.sum(sums.tolist()), engine.grad_norm()
    finite = all(map(math.isfinite, losses))
    # in fp16 a gradient may overflow until the loss scale has been lowered
    if not finite or not (math.isfinite(norm) or engine.precision.name == "fp16"):
        raise TrainingStopped(
            f"the warm-up batch's {'gradient' if finite else 'loss'} is not finite, though the weights are"
            f" (records {', '.join(pack.origins[:3])}). Fix: --precision bf16 or fp32, or mend these records"
        )
    gradients = engine.gradients()
    if missing := [name for name, found in gradients.items() if found is None]:
        raise TrainingStopped(
            f"{len(missing)} tensors are to be trained and have no gradient: no loss depends on them"
            f" ({few(missing, 3)}). Fix: leave them out of train_also or lora_targets, or freeze their part"
        )
    if norm == 0:
        kinds = {(pack.n_text_labels > 0, pack.n_image_targets > 0)}
        for other in _other_targets(stream, kinds):
            engine.discard()
            for _ in forward_backward(engine, [other], Counts.of([other]), engine.config):
                pass
            if engine.grad_norm() != 0:
                return
        raise TrainingStopped(_nothing_learns(engine.config, kinds))
    still = _without_gradient(gradients)
    if still and engine.main:
        log.info("No gradient in the warm-up batch: %s (as where it has no targets for it)", ", ".join(still))


def _without_gradient(gradients: dict[str, bool | None]) -> list[str]:
    """Parts whose gradient is zero everywhere, and tensors of other parts whose gradient is. An adapter's A
    has none before its B, which begins as zero, has moved."""
    parts: dict[str, list[str]] = {}
    for name, found in gradients.items():
        if found or ADAPTER_MARKS[0] not in name.split("."):
            parts.setdefault(title(name), []).extend([] if found else [name])
    learning = {title(name) for name, found in gradients.items() if found}
    still = [part for part in parts if part not in learning]
    return still + [
        f"{len(names)} tensors of {part} ({few(names, 2)})"
        for part, names in parts.items()
        if names and part in learning
    ]


def _look_at_losses(engine: Engine, pack: Pack, sums: Tensor) -> None:
    """Says what the losses of weights that have not been trained here say of them.

    Raises:
        TrainingStopped: they are outside of what the recipe expects, or those of no trained model where it
            should be one; with ``preflight`` warn that is a warning.
    """
    counts = Counts.of([pack])
    text, text_count, image, image_count = engine.sum(
        [float(sums[0]), counts.text, float(sums[1]), counts.image]
    )
    spoken = pack.n_text_labels >= max(FEW_LABELS, FEW_A_SAMPLE * pack.n_samples)
    text_loss = text / text_count if text_count and spoken else None
    image_loss = image / image_count if image_count else None
    losses = {"text": text_loss, "image": image_loss}
    said = [f"{kind} loss {value:.4g}" for kind, value in losses.items() if value is not None]
    if said and engine.main:
        log.info("Preflight: %s before the first step", ", ".join(said))
    model = engine.model
    large = sum(shard.shape.numel() for shard in engine.shards()) >= LARGE
    config = engine.config
    problems = doubts(config, model.config.llm.vocab_size, large, text_loss, image_loss)
    for problem, grave in problems:
        if grave and config.preflight == "stop":
            raise TrainingStopped(f"{problem}; where they are meant to be as they are, --preflight warn")
        if engine.main and grave:
            log.warning("%s", problem)
        elif engine.main:
            log.info("Preflight: %s; right where it trains from random weights", problem.split(":")[0])


def doubts(
    config: Config, vocabulary: int, large: bool, text: float | None, image: float | None
) -> Iterator[tuple[str, bool]]:
    """What the first losses say against the weights, and whether that ends the run.

    It does where a recipe says what to expect, and where a ``large`` model knows no text: a small one may
    well begin with random weights.

    Args:
        config: of the run.
        vocabulary: size of the text head.
        large: has the model :data:`LARGE` parameters?
        text, image: the losses; None where too little says something of them.
    """
    known = math.log(vocabulary)
    if text is not None:
        outside = _outside(config.expect_text_loss, text)
        if text >= CHANCE * known:
            yield (
                f"the first text loss is {text:.4g}, that of a model that knows no text (ln of {vocabulary:,}"
                f" tokens is {known:.4g}): the weights were never loaded, are of another model, or the"
                " tokenizer is. Fix: check model_path",
                large or outside,
            )
        elif outside:
            yield (
                f"the first text loss is {text:.4g}, and expect_text_loss {_band(config.expect_text_loss)}."
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
        yield f"the first image loss is {image:.4g}, {why}. Fix: check model_path, or give another band", True


def _outside(band: tuple[float, float] | None, loss: float) -> bool:
    return band is not None and not band[0] <= loss <= band[1]


def _band(band: tuple[float, float] | None) -> str:
    low, high = band or (0.0, math.inf)
    return f"{low:g} to {high:g}"


def _other_targets(stream: PackStream, kinds: set[tuple[bool, bool]]) -> Iterator[Pack]:
    """Packed sequences of single records whose targets (texts, pictures) are of other kinds than those in
    ``kinds``, to which they are added. Of many records some, spread over all, are looked at."""
    total = stream.mixture.total
    for record in range(0, total, -(-total // _LOOKED_AT)):
        key = RandomKey(stream.mixture.seed, 0, record, training=False, all_clean_copies=True)
        pack = stream.build_samples([key], LoaderState()).pack
        kind = (pack.n_text_labels > 0, pack.n_image_targets > 0)
        if kind not in kinds:
            kinds.add(kind)
            yield pack


def _nothing_learns(config: Config, kinds: set[tuple[bool, bool]]) -> str:
    texts, pictures = (any(kind[i] for kind in kinds) for i in (0, 1))
    what = " and ".join(n for n, there in (("texts", texts), ("pictures", pictures)) if there) or "nothing"
    reasons = {
        "text_loss_weight": texts and config.text_loss_weight == 0,
        "image_loss_weight": pictures and config.image_loss_weight == 0,
        "freeze_und": config.freeze_und and not pictures,
        "freeze_llm": config.freeze_llm and not pictures,
    }
    named = [name for name, there in reasons.items() if there]
    words = {"text_loss_weight": "text_loss_weight is 0", "image_loss_weight": "image_loss_weight is 0"}
    why = " and ".join(words.get(name, f"{name} is on") for name in named)
    fix = ", ".join(f"--{n} 1" if n in words else f"drop --{n}" for n in named)
    return (
        f"nothing to learn: the data has {what} as targets{f', and {why}' if why else ''}; every gradient is"
        f" zero. Fix: {fix or 'train other parts'}, or add records with other targets"
    )


def _moments_to_come(engine: Engine) -> list[Tensor]:
    """Memory of the size of AdamW's two moments, made at its first step; none where a resume brought them."""
    if engine.device.type != "cuda" or engine.optimizer.state:
        return []
    dtype = torch.uint8 if engine.config.optimizer == "adamw8bit" else torch.float32
    trained = [shard.value for shard in engine.shards() if shard.trains]
    return [torch.empty_like(value, dtype=dtype) for value in trained for _ in range(2)]


def _restart_peak(device: torch.device) -> int:
    """The most bytes of a GPU's memory that tensors took since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
