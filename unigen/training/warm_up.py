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

from unigen.bars import Bar
from unigen.config import Config
from unigen.data.loader import LoaderState, PackStream
from unigen.messages import in_language, listed
from unigen.model.parts import ADAPTER_MARKS, title
from unigen.model.sizes import Load
from unigen.model.storage import few
from unigen.printing import first_line
from unigen.sequence.types import Pack
from unigen.training.engine import Engine
from unigen.training.failures import LESS_MEMORY
from unigen.training.guards import TrainingStopped
from unigen.training.preflight import enough_labels, judge_losses
from unigen.training.step import Counts, forward_backward

log = logging.getLogger("unigen")

_LOOKED_AT = 64  # records in which other targets are looked for, where the warm-up batch gave no gradient


@dataclass(frozen=True)
class WarmUp:
    """What the warm-up batch was, and what it took."""

    load: Load
    peak: int  # bytes of a GPU's memory; 0 on a CPU
    doubted: frozenset[str] = frozenset()  # losses, text or image, that were told to be out of place


def warm_up(engine: Engine, stream: PackStream, micro_batches: int = 1, fresh: bool = True) -> WarmUp:
    """Takes the largest packed sequence forward and backward, so that memory runs out now or never.

    Where a step has several ``micro_batches`` on each process it goes twice: the second forward runs while
    the first one's gradients are held. Nothing of it stays. ``fresh``: the weights are those of
    ``model_path``, and their losses are looked at.

    Raises:
        TrainingStopped: it does not fit into the memory of the device, its loss or gradient is not finite,
            nothing learns from the data, or the weights are not what they should be (``preflight``).
    """
    pack = stream.build_largest().pack
    packs, peaks, sums = [pack] * min(micro_batches, 2), [], torch.zeros(2)
    try:
        held = _moments_to_come(engine)
        _restart_peak(engine.device)
        with Bar("warm-up batch"):
            for found in forward_backward(engine, packs, Counts.of(packs), engine.config):
                sums = found
                peaks.append(_restart_peak(engine.device))
    except torch.OutOfMemoryError as error:
        which = "" if len(packs) == 1 else f" as micro-batch {len(peaks) + 1} of a step"
        raise TrainingStopped(
            f"The largest packed sequence, {len(pack):,} tokens, does not fit{which} into the memory of"
            f" {engine.device} ({first_line(error)}). Fix: {LESS_MEMORY}"
        ) from error
    del held
    _look_at_numbers(engine, stream, pack, sums)
    doubted = _look_at_losses(engine, pack, sums) if fresh else frozenset()
    engine.discard()
    twice = "" if len(packs) == 1 else " twice, as two micro-batches of a step"
    took = listed(f"{peak / 2**30:.1f} GiB" for peak in peaks)
    most = f", at most {took}" if engine.device.type == "cuda" else ""
    log.info(
        "Warm-up batch: %s tokens of %d sample(s) went forward and backward%s%s",
        f"{len(pack):,}", pack.n_samples, twice, most,
    )  # fmt: skip
    return WarmUp(Load.of(pack), max(peaks), doubted)


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
    if still := _without_gradient(gradients):
        why = _why_still(engine, pack)
        if engine.main and why:
            log.info("No gradient in the warm-up batch: %s (%s)", "; ".join(still), why)
        elif engine.main:
            log.info("No gradient in the warm-up batch: %s", "; ".join(still))


def _why_still(engine: Engine, pack: Pack) -> str:
    """Why something of the model may have no gradient from a packed sequence: what the sequence lacks, or
    the output layer of pictures, which begins as zero, lets nothing through yet."""
    output = [shard.value for shard in engine.shards() if shard.name == "llm2vae.weight"]
    mine = [any(bool(value.any()) for value in output), len(output)]
    mine += [pack.n_text_labels, pack.n_image_targets, len(pack.vit_lengths)]
    moved, held, texts, drawn, seen = engine.sum(mine)
    there = {
        "nothing in it is to be written": texts,
        "nothing in it is to be drawn": drawn,
        "nothing in it is to be seen": seen,
    }
    if lacking := [reason for reason, count in there.items() if not count]:
        return "; ".join(lacking)
    return "llm2vae starts at zero; from the second step on they have one" if held and not moved else ""


def _without_gradient(gradients: dict[str, bool | None]) -> list[str]:
    """Parts whose gradient is zero everywhere, and tensors of other parts whose gradient is. An adapter's A
    has none before its B, which begins as zero, has moved."""
    parts: dict[str, list[str]] = {}
    for name, found in gradients.items():
        if found or ADAPTER_MARKS[0] not in name.split("."):
            parts.setdefault(title(name), []).extend([] if found else [name])
    learning = {title(name) for name, found in gradients.items() if found}
    still = [part for part in parts if part not in learning]
    some = {part: names for part, names in parts.items() if names and part in learning}
    return still + [f"{len(names)} tensors of {part} ({few(names, 2)})" for part, names in some.items()]


def _look_at_losses(engine: Engine, pack: Pack, sums: Tensor) -> frozenset[str]:
    """:func:`judge_losses` of the warm-up batch's losses."""
    counts = Counts.of([pack])
    mine = [float(sums[0]), counts.text, float(sums[1]), counts.image]
    text, text_count, image, image_count = engine.sum(mine)
    enough = text_count and enough_labels(pack.n_text_labels, pack.n_samples)
    text_loss = text / text_count if enough else None
    image_loss = image / image_count if image_count else None
    losses = {"text": text_loss, "image": image_loss}
    said = [f"{kind} loss {value:.4g}" for kind, value in losses.items() if value is not None]
    if said and engine.main:
        log.info("Preflight: %s before the first step", ", ".join(said))
    return judge_losses(engine, text_loss, image_loss)


def _other_targets(stream: PackStream, kinds: set[tuple[bool, bool]]) -> Iterator[Pack]:
    """Packed sequences of single records whose targets (texts, pictures) are of other kinds than those in
    ``kinds``, to which they are added. Of many records some, spread over all, are looked at."""
    total = stream.mixture.total
    for record in range(0, total, -(-total // _LOOKED_AT)):
        pack = stream.build_samples([stream.longest_key(record)], LoaderState()).pack
        kind = (pack.n_text_labels > 0, pack.n_image_targets > 0)
        if kind not in kinds:
            kinds.add(kind)
            yield pack


def _nothing_learns(config: Config, kinds: set[tuple[bool, bool]]) -> str:
    texts, pictures = (any(kind[i] for kind in kinds) for i in (0, 1))
    kinds_there = [in_language(n) for n, there in (("texts", texts), ("pictures", pictures)) if there]
    what = listed(kinds_there or [in_language("nothing")])
    reasons = {
        "text_loss_weight": texts and config.text_loss_weight == 0,
        "image_loss_weight": pictures and config.image_loss_weight == 0,
        "freeze_und": config.freeze_und and not pictures,
        "freeze_llm": config.freeze_llm and not pictures,
    }
    named = [name for name, there in reasons.items() if there]
    words = {"text_loss_weight": "text_loss_weight is 0", "image_loss_weight": "image_loss_weight is 0"}
    why = listed(in_language(words.get(name, f"{name} is on")) for name in named) if named else ""
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
