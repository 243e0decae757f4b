"""What to change where a training does not fit: known changes, the most harmless first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from unigen.config import Config, ConfigError
from unigen.model.config import BagelConfig
from unigen.model.sizes import Load
from unigen.model.weights import dtype_of_words
from unigen.training.memory_plan import Machine, MemoryPlan, plan_memory
from unigen.training.precision import DeviceFacts, choose_precision

LEAST_TOKENS = 1024  # of a packed sequence that is cut
Changed = dict[str, Any]  # option -> value


@dataclass(frozen=True)
class Outcome:
    """A plan, and what had to be changed for it."""

    plan: MemoryPlan
    asked: MemoryPlan  # without changes
    config: Config
    changes: list[tuple[str, Changed]]  # name of a change, and its options
    room: float | None  # bytes of a card; None where nothing was asked
    precision: str
    engine: str
    load: Load

    @property
    def fits(self) -> bool:
        return self.room is None or self.plan.peak <= self.room


def _halved(c: Config, load: Load) -> Changed:
    """Half the tokens, twice the micro-batches: the same samples a step."""
    if load.tokens < 2 * LEAST_TOKENS or (load.gen and load.tokens // 2 < c.max_image_tokens):
        return {}
    steps = 2 * c.gradient_accumulation_steps
    return {"max_num_tokens": load.tokens // 2, "gradient_accumulation_steps": steps}


def _unrated(*parts: str) -> Changed:
    """Parts that no longer train have no rates of their own."""
    return {f"{option}_{part}": None for part in parts for option in ("learning_rate", "weight_decay")}


def _frozen(c: Config, load: Load) -> Changed:
    if c.lora_rank or not c.visual_gen:
        return {}
    return {"freeze_und": True, **_unrated("und", "vit", "connector")}


def _adapters(c: Config, load: Load) -> Changed:
    if c.lora_rank is not None:
        return {}
    off = {"freeze_llm": False, "freeze_vit": False, "weights": "float32"}
    off |= {"checkpointing_policy": "full"} if c.recomputes_selectively else {}
    off |= {"lora_targets": None if c.visual_gen else ["und"]}
    off |= _unrated("vit", "connector", "und" if c.visual_gen else "gen")
    return {"lora_rank": 64, "learning_rate": 1e-4, **off}


def _quantised(c: Config, load: Load) -> Changed:
    if c.quantize or c.lora_rank is None:
        return {}
    return {"quantize": "nf4", "double_quant": True, "compile": "auto", "engine": "auto"}


CHANGES: list[tuple[str, Callable[[Config, Load], Changed]]] = [
    # the numbers stay, or nearly
    ("bf16", lambda c, load: {} if c.asked_precision() != "fp32" else {"precision": "bf16", "bf16": None}),
    ("recompute", lambda c, load: {"gradient_checkpointing": True, "checkpointing_policy": "full"}),
    ("shard", lambda c, load: {} if c.quantize else {"engine": "fsdp2"}),
    ("host_activations", lambda c, load: {"gradient_checkpointing": True, "checkpointing_policy": "offload"}),
    ("adamw8bit", lambda c, load: {"optimizer": "adamw8bit"}),
    ("shorter", _halved),
    ("shorter", _halved),
    ("bf16_weights", lambda c, load: {} if c.lora_rank else {"weights": "bf16"}),
    ("no_average", lambda c, load: {"ema": None}),
    ("offload", lambda c, load: {"engine": "fsdp2", "cpu_offload": True} if c.engine == "fsdp2" else {}),
    ("shorter", _halved),
    # from here on something else is learnt
    ("freeze_vit", lambda c, load: {} if c.lora_rank else {"freeze_vit": True, **_unrated("vit")}),
    ("freeze_und", _frozen),
    ("adapters", _adapters),
    ("nf4", _quantised),
    ("small_pictures", lambda c, load: {"max_image_tokens": 1024} if c.max_image_tokens > 1024 else {}),
    ("shorter", _halved),
    ("shorter", _halved),
]
"""Name (of its text) -> the options that change, from what they are and the packed sequence; empty where it
would change nothing. What stands later takes more away."""

LoadOf = Callable[[Config], Load]


def fitting(model: BagelConfig, config: Config, gpus: int, room: float | None, load_of: LoadOf) -> Outcome:
    """The plan of the options as they are, or where that does not fit, with the smallest change that does.

    The first changes of :data:`CHANGES` that suffice together; those of them that were not needed are taken
    back, the most harmful first. Where all of them do not suffice the outcome does not fit.

    Args:
        model: shape of the model.
        config: options of the run.
        gpus: how many.
        room: bytes of each; None judges nothing.
        load_of: the packed sequence of changed options.

    Raises:
        ConfigError: the options themselves cannot be.
    """
    first = _planned(model, config, gpus, load_of)
    asked = first.plan
    if room is None or asked.peak <= room:
        return replace(first, room=room)
    taken: list[tuple[str, Changed]] = []
    best = first
    for name, change in CHANGES:
        values = {key: value for key, value in change(best.config, best.load).items()
                  if getattr(best.config, key) != value}  # fmt: skip
        if not values:
            continue
        found = _tried(model, config, gpus, load_of, [*taken, (name, values)])
        if found is None or found.plan.peak >= best.plan.peak:
            continue
        taken.append((name, values))
        best = found
        if best.plan.peak <= room:
            break
    else:
        return replace(best, asked=asked, room=room, changes=taken)
    for drop in [*taken[-2::-1]]:
        fewer = [step for step in taken if step is not drop]
        found = _tried(model, config, gpus, load_of, fewer)
        if found is not None and found.plan.peak <= room:
            taken, best = fewer, found
    return replace(best, asked=asked, room=room, changes=taken)


def _tried(
    model: BagelConfig, config: Config, gpus: int, load_of: LoadOf, steps: Sequence[tuple[str, Changed]]
) -> Outcome | None:
    """The plan with changes; None where options exclude each other then."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    for _, changed in steps:
        values |= changed
    try:
        changed_config = Config(**values).resolve(data=False)
        return _planned(model, changed_config, gpus, load_of)
    except ConfigError:
        return None


def _planned(model: BagelConfig, config: Config, gpus: int, load_of: LoadOf) -> Outcome:
    kind = "cpu" if config.device == "cpu" else "cuda"
    precision = choose_precision(config, DeviceFacts(kind, "the GPU", has_bf16=True))
    machine = Machine.of(config, kind, gpus, precision.dtype)
    load = load_of(config)
    plan = plan_memory(model, config, load, machine, dtype_of_words(Path(config.model_path or "")))
    return Outcome(plan, plan, config, [], None, precision.name, machine.engine, load)
