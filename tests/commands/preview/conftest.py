"""What the tests of the preview share: planners with and without a checkpoint, and a record of each
format."""

from __future__ import annotations

from pathlib import Path

import pytest
from previews import EXAMPLES

from unigen.config import DataOptions
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.model.weights import load_planner
from unigen.sequence.plan import Planner
from unigen.sequence.types import Record


@pytest.fixture(scope="module")
def planner(golden: Path) -> Planner:
    return load_planner(golden / "model", DataOptions(max_image_tokens=16))


@pytest.fixture(scope="module")
def estimate() -> Planner:
    """What there is without a checkpoint."""
    return load_planner(None, DataOptions(max_image_tokens=64))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(UnifiedGenerationDataset(EXAMPLES))
