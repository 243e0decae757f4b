"""The options of a training run in one object, and what several may be together.

The options themselves stand in ``unigen/topics.py``. Recipes (YAML) and flags are read by ``unigen/cli.py``;
a flag wins over a recipe, an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

from unigen.others import nearest
from unigen.rules import conflicts, unusual
from unigen.topics import (
    RATED,
    USUAL_RATE,
    DataOptions,
    EvaluationOptions,
    LoaderOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    SamplingOptions,
    SourceOptions,
    TrackingOptions,
    TrainSource,
)
from unigen.values import ConfigError, UserError

__all__ = [
    "RATED",
    "TOPICS",
    "Config",
    "ConfigError",
    "DataOptions",
    "EvaluationOptions",
    "LoaderOptions",
    "ModelOptions",
    "OptimOptions",
    "RunOptions",
    "SamplingOptions",
    "SourceOptions",
    "TrainSource",
    "TrackingOptions",
    "UserError",
    "known_options",
    "nearest",
]

TOPICS = (
    ModelOptions, DataOptions, SourceOptions, LoaderOptions, OptimOptions, RunOptions, EvaluationOptions,
    TrackingOptions,
)  # fmt: skip


_MODES = {None: None, 1: None, 2: "nf4", 3: "int8"}


@dataclass
class Config(
    ModelOptions, DataOptions, SourceOptions, LoaderOptions, OptimOptions, RunOptions, EvaluationOptions,
    TrackingOptions,
):  # fmt: skip
    """Every option of a training run, flat."""

    # no option: the folder of the model where its matrices are quantised and no option asked for that
    quantised_folder = ""

    def __post_init__(self) -> None:
        usual = self.learning_rate is USUAL_RATE  # the object: whoever gives 1e-5 means it
        super().__post_init__()
        if usual and self.lora_rank is not None:
            self.learning_rate = 1e-4
        # the same choice under two names; resolve() tells where they differ
        self.quantize = self.quantize or _MODES[self.model_load_mode]

    def resolve(self, data: bool = True, only: Collection[str] = ()) -> Config:
        """Checks what can be checked without touching a file, and returns itself. Without ``data`` no
        training data need be named; ``only`` are the options whose contradictions count, default all.

        Raises:
            ConfigError: an option is missing or out of range, or two exclude each other.
        """
        self.reread()
        for refused, problem in conflicts(self):
            name = problem.split(" ", 1)[0]
            if refused and name in (only or [name]) and (data or name != "train_data_path"):
                raise ConfigError(f"{problem} (--{name} ...)")
        self.asked_precision()
        self.sources()
        return self

    def warnings(self) -> list[str]:
        """What works and is hardly meant, a line each, with the fix."""
        return list(unusual(self))

    @property
    def alpha(self) -> float:
        """``lora_alpha``, or its default."""
        return 2.0 * (self.lora_rank or 0) if self.lora_alpha is None else self.lora_alpha

    @property
    def recomputes_selectively(self) -> bool:
        return self.gradient_checkpointing and self.checkpointing_policy == "selective"

    def asked_precision(self) -> str:
        """``precision`` and its two switches as one: bf16, fp16, fp32 or auto. Without bf16, auto can only be
        fp32.

        Raises:
            ConfigError: they contradict each other.
        """
        switches = {"bf16": self.bf16, "fp16": self.fp16}
        on = [name for name, value in switches.items() if value]
        if len(on) == 2:
            raise ConfigError(
                "fp16 and bf16 exclude each other. Fix: keep one, bf16 where the GPU has it (--no_fp16"
                " --precision bf16)"
            )
        said = [*(name for name in on if self.precision not in ("auto", name))]
        if said or switches.get(self.precision) is False:
            switch, turn = (
                (f"{said[0]} is on", f"--no_{said[0]}")
                if said
                else (f"{self.precision} is off", f"--{self.precision}")
            )
            raise ConfigError(
                f"precision is {self.precision}, but {switch}. Fix: {turn}, or another --precision"
            )
        if on:
            return on[0]
        return "fp32" if self.precision == "auto" and self.bf16 is False else self.precision

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def known_options() -> list[str]:
    return [f.name for f in fields(Config)]
