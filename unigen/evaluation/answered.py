"""What several checkpoints answered to the same cases, and what can be said of one against another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigen.evaluation.answers import Prediction
from unigen.evaluation.results import Result
from unigen.evaluation.statistics import Comparison, compare

OF_THE_DATA = ("fd_real", "kid_real")  # metrics that no checkpoint changes


@dataclass(frozen=True)
class Answered:
    """What one checkpoint answered, and how well.

    Args:
        name: of the checkpoint, for people.
        about: what the answers depend on.
        predictions: of all cases, in their order.
        scores: metrics by task.
        step: after which a run saved the checkpoint, which lies in the run's folder.
    """

    name: str
    about: dict[str, Any]
    predictions: list[Prediction]
    scores: dict[str, list[Result]]
    step: int | None = None

    @property
    def run(self) -> str:
        """Name of the run that saved the checkpoint; empty where none did."""
        return "" if self.step is None else str(Path(self.name).parent)


def comparisons(base: Answered, other: Answered) -> dict[str, list[Comparison]]:
    """What can be said of each metric of ``other`` against ``base``, task by task, but for those that nobody
    gave what they need and those that say nothing of a checkpoint. Both answered the same cases."""
    return {
        task: [
            compare(a, b)
            for a, b in zip(results, other.scores[task], strict=True)
            if not (a.was_not_given or b.was_not_given or a.kind in OF_THE_DATA)
        ]
        for task, results in base.scores.items()
    }
