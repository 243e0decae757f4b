"""What must not ruin a run: numbers that make no sense, spikes, a metric that stopped improving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import built, metrics, read_jsonl, train, train_on

from unigen.commands.ckpt.listing import checkpoint_facts
from unigen.config import Config, ConfigError
from unigen.runs.checkpoint import latest_checkpoint
from unigen.runs.layout import TRAINER
from unigen.runs.states import STATES
from unigen.schema import Table
from unigen.training.engine import Engine
from unigen.training.guards import CONFIRM, FEWEST, BadStepGuard, Diverged, TrainingStopped


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
    trainer = built(options, max_skipped_steps=3, max_steps=9)
    poison(trainer.run.model)
    with pytest.raises(
        TrainingStopped,
        match=r"step 3: its loss is not finite, as in the 2 steps before it .*Fix: lower --learning_rate",
    ):
        train_on(trainer)
    lines = read_jsonl(Path(options["output_dir"]) / "bad_steps.jsonl")
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


@pytest.mark.slow
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
    train(options, changed)
    run = Path(options["output_dir"])
    assert max(line["step"] for line in metrics(run)) == 4
    assert (run / "step_4" / "manifest.json").exists() and (run / "best" / "manifest.json").exists()
    assert json.loads((run / "step_4" / "trainer.json").read_text())["guards"]["stale_validations"] == 3


def test_early_stopping_needs_something_to_validate_on():
    with pytest.raises(ConfigError, match="early_stopping_patience needs val_data_path"):
        Config(model_path="m", train_data_path="d", early_stopping_patience=2).resolve()


# ---- divergence


def test_a_share_of_skipped_steps_ends_a_run_that_takes_some_between(tmp_path: Path):
    g = guards(tmp_path, max_skipped_share=0.25)
    with pytest.raises(
        Diverged, match=r"7 of the last 20 steps .*max_skipped_share is 0\.25.*Fix: "
    ) as caught:
        for step in range(1, 40):
            if step % 3:
                g.took(1.0)
            else:
                g.skipped(step, "x", [], {})
    assert str(caught.value).startswith("step 21:")
    with pytest.raises(Diverged, match="the run has ended"):
        g.finish()


def test_few_skipped_steps_are_marked_and_end_nothing(tmp_path: Path):
    g = guards(tmp_path)
    for step in range(1, 20):
        g.took(1.0) if step != 7 else g.skipped(7, "x", [], {})
        assert bool(g.mark()) == (step >= 7) and bool(g.mark().get("diverging")) == (step == 7)
    assert g.mark()["skipped_steps"] == [1, 19]
    g.finish()


def test_a_checkpoint_is_good_once_steps_were_taken_after_it(tmp_path: Path):
    g = guards(tmp_path)
    g.saved("step_1")
    for _ in range(CONFIRM):
        assert g.good == ""
        g.took(1.0)
    assert g.good == "step_1"
    g.saved("step_6")
    g.took(1.0)
    g.skipped(8, "x", [], {})
    g.saved("step_8")
    for _ in range(2 * CONFIRM):
        g.took(1.0)
    assert g.good == "step_1", "what was followed by a skipped step, or follows one, is not"
    assert g.mark()["last_good"] == "step_1"


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_auto_goes_on_from_it(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    """As in a run whose learning rate was raised: step 9 breaks the weights, which nobody can know then."""
    options |= {"save_steps": 1, "save_total_limit": 1, "max_skipped_steps": 4, "num_epochs": 9}
    train(options, max_steps=8)
    run = Path(options["output_dir"])
    assert [path.name for path in run.glob("step_*")] == ["step_8"]
    trainer = built(options, max_steps=20, resume_from_checkpoint="auto")
    take = trainer.take_step

    def breaking(*given: Any) -> Any:
        result = take(*given)
        if trainer.position.step == 8:
            poison(trainer.run.model)
        return result

    trainer.take_step = breaking  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"Fix: lower --learning_rate.*--resume_from_checkpoint .*run/step_8"):
        train_on(trainer)
    trainer.run.close()
    assert {path.name for path in run.glob("step_*")} == {"step_8", "step_12"}
    rows = {row["name"]: row for row in map(checkpoint_facts, run.glob("step_*"))}
    assert rows["step_12"]["diverging"] and rows["step_12"]["skipped_steps"] == [3, 12]
    assert not rows["step_8"]["diverging"]
    caplog.clear()
    assert latest_checkpoint(run) == run / "step_8" and "Passing over" in caplog.text
    # lower than the number of the one that was passed over, and all the same what the run goes on from
    train(options, max_steps=10, resume_from_checkpoint="auto")
    assert (run / "step_10").is_dir() and latest_checkpoint(run) == run / "step_10"
    train(options, max_steps=14, resume_from_checkpoint="auto")
    assert [path.name for path in run.glob("step_*")] == ["step_14"]


def test_every_state_has_a_rule(tmp_path: Path):
    """A key that a resume reads and no schema knows is how an odd value becomes a traceback."""
    rule = STATES[TRAINER]
    assert isinstance(rule, Table) and isinstance(rule.needs["guards"], Table)
    assert set(guards(tmp_path).state()) == set(rule.needs["guards"].may)
