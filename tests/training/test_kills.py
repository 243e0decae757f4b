"""kill -9 at any moment costs at most the step at hand (``benchmarks/kills.py`` does it a hundred times)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kills
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "any_moment", "in_save"), [("ddp", 4, 2), ("fsdp2", 1, 2)])
def test_kill_9_of_all_ranks_loses_no_published_step_and_changes_no_digit(
    small_model: Path, tmp_path: Path, engine: str, any_moment: int, in_save: int
):
    """Kills of a run and of a save, three epochs: the stitched log is that of an uninterrupted run, so
    are the weights, the average and the moments; no checkpoint that was once published is ever missing; every
    sample is met exactly once an epoch."""
    samples = kills.write_samples(tmp_path / "data.jsonl", 24 if engine == "ddp" else 10)
    options: dict[str, Any] = kills.small_run(
        small_model, tmp_path / "data.jsonl", 3 * samples // 2, engine=engine
    )
    whole = kills.Run(tmp_path / "whole", 2, options)
    whole.start()
    whole.finish()
    run = kills.Run(tmp_path / "killed", 2, options)
    went = kills.kill_again_and_again(run, any_moment, in_save, seed=1)
    kills.compare(run, whole, went, samples)
    assert not went.lost and not went.problems, (went.lost, went.problems)
    assert (went.kills, went.in_save) == (any_moment, in_save)
