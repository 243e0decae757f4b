"""What must not ruin a run: numbers that make no sense, spikes, a metric that stopped improving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import built, metrics, train_on

from unigen.config import Config, ConfigError
from unigen.training.engine import Engine
from unigen.training.guards import FEWEST, BadStepGuard, TrainingStopped
from unigen.training.trainer import UnifiedTrainer


def guards(tmp_path: Path, **options: Any) -> BadStepGuard:
    config = Config(device="cpu", **options)
    return BadStepGuard(Engine(config), config, tmp_path)


def test_what_is_not_finite_is_refused_with_its_reason(tmp_path: Path):
    g = guards(tmp_path)
    assert g.refuses((1.0, 2.0), 3.0) == ""
    assert "loss" in g.refuses((1.0, float("nan")), 3.0) and "loss" in g.refuses((float("inf"), 1.0), 3.0)
    assert "gradient" in g.refuses((1.0, 2.0), float("nan"))
    assert guards(tmp_path, fp16=True).refuses((1.0, 2.0), float("inf")) == "", "the loss scaler's business"


def test_a_spike_is_measured_against_the_last_norms_once_there_are_enough(tmp_path: Path):
    g = guards(tmp_path, spike_sigma=4.0)
    for i in range(FEWEST):
        assert g.refuses((1.0, 1.0), 50.0) == "", "too few to say"
        g.took(1.0 + 0.1 * (i % 2))
    assert g.refuses((1.0, 1.0), 1.2) == ""
    assert "spike" in g.refuses((1.0, 1.0), 1.3)
    assert guards(tmp_path).refuses((1.0, 1.0), 1e9) == "", "off by default"


def test_a_resumed_run_decides_alike(tmp_path: Path):
    g, other = guards(tmp_path, spike_sigma=3.0), guards(tmp_path, spike_sigma=3.0)
    for i in range(40):
        g.took(1.0 + 0.05 * (i % 7))
    g.stale = 2
    other.load(json.loads(json.dumps(g.state())), 40)
    for norm in (1.1, 1.3, 1.5, 2.0):
        assert g.refuses((0.0, 0.0), norm) == other.refuses((0.0, 0.0), norm)
    assert other.stale == 2


def test_steps_that_will_be_taken_again_are_listed_once(tmp_path: Path):
    """Steps 2, 4 and 5 were skipped, the kill cut the last line, and the run goes on from 4."""
    g = guards(tmp_path, max_skipped_steps=9)
    for step in (2, 4, 5):
        g.skipped(step, "x", [], {})
    path = tmp_path / "bad_steps.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "wh')
    other = guards(tmp_path, max_skipped_steps=9)
    other.load(g.state(), 4)
    other.skipped(5, "x", [], {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 5]


def poison(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.language_model.lm_head.weight.fill_(float("nan"))


def test_a_run_of_skipped_steps_ends_with_the_cure_and_every_step_listed(options: dict[str, Any]):
    trainer = built(**options | {"max_skipped_steps": 3, "max_steps": 9})
    poison(trainer.run.model)
    with pytest.raises(
        TrainingStopped,
        match=r"step 3: its loss is not finite, as in the 2 steps before it .*Fix: lower --learning_rate",
    ):
        train_on(trainer)
    lines = [
        json.loads(line)
        for line in (Path(options["output_dir"]) / "bad_steps.jsonl").read_text("utf-8").splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(
        line["records"] and line["why"] for line in lines
    )
    assert trainer.position.step == 2 and not trainer.engine.optimizer.state


def test_one_good_step_starts_the_count_anew(tmp_path: Path):
    g = guards(tmp_path, max_skipped_steps=2)
    g.skipped(1, "x", [], {})
    g.took(1.0)
    g.skipped(3, "x", [], {})
    with pytest.raises(TrainingStopped):
        g.skipped(4, "x", [], {})


def test_training_stops_when_validation_no_longer_improves_and_its_state_is_saved(
    options: dict[str, Any], records: Path
):
    """With a learning rate of 0 no validation is better than the first."""
    changed = {
        "val_data_path": str(records),
        "learning_rate": 0.0,
        "max_steps": 50,
        "eval_steps": 1,
        "early_stopping_patience": 3,
    }
    UnifiedTrainer(Config(**options | changed)).train()
    run = Path(options["output_dir"])
    assert max(line["step"] for line in metrics(run)) == 4
    assert (run / "step_4" / "manifest.json").exists() and (run / "best" / "manifest.json").exists()
    assert json.loads((run / "step_4" / "trainer.json").read_text())["guards"]["stale_validations"] == 3


def test_early_stopping_needs_something_to_validate_on():
    with pytest.raises(ConfigError, match="early_stopping_patience needs val_data_path"):
        Config(model_path="m", train_data_path="d", early_stopping_patience=2).resolve()
