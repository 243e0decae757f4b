"""Every parameter of a model as a run holds it: bytes, shapes, what trains. From config files and options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from unigen.config import Config
from unigen.model.bagel import Bagel
from unigen.model.codec import CODECS
from unigen.model.config import BagelConfig
from unigen.model.parts import dtype_of, is_embedding, is_frozen
from unigen.model.quantise import BLOCK, SCALES, is_quantised
from unigen.training.adam8bit import BLOCK as BLOCK8
from unigen.training.prepare import adapted, refuse_idle_rates

SMALL = 4096  # numbers below which 8-bit moments stay in 32 bits


@dataclass(frozen=True)
class ParameterEntry:
    """A parameter: how it is held, and whether it trains."""

    name: str
    shape: tuple[int, ...]
    nbytes: float
    trains: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def gradient(self) -> float:
        return self.nbytes if self.trains else 0.0

    def moments(self, optimizer: str) -> float:
        """Bytes of its two moments."""
        if not self.trains:
            return 0.0
        low = optimizer == "adamw8bit" and not is_embedding(self.name) and self.numel >= SMALL
        return self.numel * (2 + 8 / BLOCK8 if low else 8)


def census(
    model: BagelConfig, config: Config, computes: torch.dtype, words: torch.dtype | None = None
) -> list[ParameterEntry]:
    """Every parameter of a model as a run with these options holds it; ``words``: see :func:`dtype_of`.

    Raises:
        AdapterError, ConfigError: what trains is refused, as :mod:`unigen.training.prepare` does.
    """
    bare: Bagel = _once("model", model, lambda: Bagel(model))
    targets, _ = adapted(bare, config, fresh=config.resume_from_checkpoint is None)
    found = []
    for name, p in bare.named_parameters():
        shape, module = tuple(p.shape), name.rpartition(".")[0]
        held = float(p.numel() * dtype_of(name, config, computes, words).itemsize)
        if config.quantize and name.endswith("weight") and is_quantised(module):
            if config.quantize == "int8":
                held = p.numel() + 4.0 * shape[0]
            elif shape[1] % BLOCK == 0:
                scales = 1 / BLOCK + 4 / BLOCK / SCALES if config.double_quant else 4 / BLOCK
                held = p.numel() * (0.5 + scales)
        found.append(ParameterEntry(name, shape, held, not is_frozen(name, config)))
        if module in targets and name.endswith("weight"):
            rank = config.lora_rank or 0
            low = {"lora_A": (rank, shape[1]), "lora_B": (shape[0], rank)}
            if config.lora_variant == "dora":
                low["lora_magnitude_vector"] = (shape[0],)
            for mark, size in low.items():
                own = f"{module}.{mark}.default.weight"
                found.append(ParameterEntry(own, size, 4.0 * torch.Size(size).numel(), True))
    refuse_idle_rates(config, (entry.name for entry in found if entry.trains))
    return found


def codec_numbers(model: BagelConfig) -> int:
    """Parameters of a model's VAE."""
    if not model.visual_gen:
        return 0
    codec = _once("codec", model, lambda: CODECS[model.vae.type](model.vae))
    return sum(p.numel() for p in codec.parameters())


_made: dict[tuple[str, str], Any] = {}


def _once(what: str, config: BagelConfig, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, its parameters nowhere; made once for all configs of the same parameters."""
    key = what, repr((config.visual_gen, config.visual_und, config.to_dict()))
    if key not in _made:
        with torch.device("meta"):
            _made[key] = make()
    return _made[key]
