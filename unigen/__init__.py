"""Unigen trains, evaluates and samples BAGEL-style unified models: one transformer that reads and writes text
and images.

The public names below are imported on first use (PEP 562), so that ``import unigen`` and ``unigen --help``
need no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unigen.version import __version__

if TYPE_CHECKING:
    from unigen.config import Config as Config
    from unigen.config import SamplingOptions as SamplingOptions
    from unigen.data.dataset import UnifiedGenerationDataset as UnifiedGenerationDataset
    from unigen.inference.inferencer import InterleaveInferencer as InterleaveInferencer
    from unigen.model.weights import load_bagel as load_bagel
    from unigen.model.weights import load_planner as load_planner
    from unigen.model.weights import save_bagel as save_bagel
    from unigen.training.trainer import UnifiedTrainer as UnifiedTrainer

_EXPORTS = {
    "Config": "unigen.config",
    "InterleaveInferencer": "unigen.inference.inferencer",
    "SamplingOptions": "unigen.config",
    "UnifiedGenerationDataset": "unigen.data.dataset",
    "UnifiedTrainer": "unigen.training.trainer",
    "load_bagel": "unigen.model.weights",
    "load_planner": "unigen.model.weights",
    "save_bagel": "unigen.model.weights",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'unigen' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
