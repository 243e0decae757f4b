"""Held-out losses by task and by time; which number the best checkpoint and early stopping follow; a training
that is measured goes on as one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import built, metrics, train

from unigen.config import Config, ConfigError
from unigen.model.flow import training_time

# what the records of the fixture teach
TAUGHT = ["text", "generate", "understand", "edit", "interleaved", "text", "generate"]


@pytest.mark.slow
def test_the_losses_by_task_and_by_time_are_those_of_their_records(options: dict[str, Any], records: Path):
    """Passes when they are the means over the tokens of the records with that task, and over those of times
    in that bin, computed record by record."""
    loop = built(options, val_data_path=str(records), batch_size=4)
    whole, stream, model = loop.evaluate(), loop.run.val_stream, loop.run.model.eval()
    assert whole is not None and stream is not None
    found: dict[str, list[float]] = {}
    for number, name in enumerate(TAUGHT):
        pack = stream.build_samples([stream.mixture.key(number, 0)], loop.position.loader).pack
        with torch.no_grad():
            output = model(pack)
        errors = output.mse.mean(-1).tolist()
        found.setdefault(f"val/text_loss_by_task/{name}", []).extend(output.ce.tolist())
        found.setdefault(f"val/image_loss_by_task/{name}", []).extend(errors)
        times = training_time(pack.u[pack.noised_rows], model.config.timestep_shift).tolist()
        for time, error in zip(times, errors, strict=True):
            n = int(4 * time)
            found.setdefault(f"val/image_loss_by_time/{n / 4:.2f}-{(n + 1) / 4:.2f}", []).append(error)
    wanted = {
        name: pytest.approx(sum(values) / len(values), rel=1e-5) for name, values in found.items() if values
    }
    assert {name: value for name, value in whole.items() if "/" in name} == wanted
    assert {"val/text_loss_by_task/text", "val/image_loss_by_task/edit"} < wanted.keys()
    assert sum("by_time" in name for name in wanted) >= 2


@pytest.mark.slow
def test_the_best_checkpoint_follows_the_chosen_number(options: dict[str, Any], records: Path):
    """A rate that ruins the model makes every loss rise: with the greatest one wanted the last is the best,
    and nothing stops early."""
    options |= {
        "max_steps": 2, "eval_steps": 1, "val_data_path": str(records), "learning_rate": 0.5, "max_grad_norm": 0,
        "lr_scheduler_type": "constant", "early_stopping_patience": 1, "save_steps": 2,
        "metric_for_best_model": "val/image_loss_by_task/edit", "greater_is_better": True,
    }  # fmt: skip
    train(options)
    run = Path(options["output_dir"])
    found = [line["val/image_loss_by_task/edit"] for line in metrics(run) if "val_loss" in line]
    assert found[1] < found[2], "the test wants a model that gets worse"
    assert json.loads((run / "best" / "manifest.json").read_text())["step"] == 2
    state = json.loads((run / "step_2" / "trainer.json").read_text())
    assert state["best"] == found[2] and state["evaluation"]["greater_is_better"] is True
    resumed = {
        "resume_from_checkpoint": "auto",
        "metric_for_best_model": "val_loss",
        "greater_is_better": None,
    }
    assert built(options, resumed).position.best == float("inf"), "another number decides now"
    moved = records.with_name("moved.jsonl")
    lines = records.read_text().splitlines(keepends=True)
    for kept, best in ((lines, found[2]), (lines[:5], float("inf"))):
        moved.write_text("".join(kept))
        again = {"resume_from_checkpoint": "auto", "val_data_path": str(moved)}
        assert built(options, again).position.best == best, "other records have another best"


def test_a_number_that_is_not_measured_is_refused_with_the_nearest(options: dict[str, Any], records: Path):
    with pytest.raises(ConfigError, match="val_image_loss"):
        built(options, val_data_path=str(records), metric_for_best_model="val_imag_loss")
    with pytest.raises(ConfigError, match="val_data_path"):
        Config(**options, metric_for_best_model="val_text_loss").resolve()


@pytest.mark.slow
def test_a_training_that_is_measured_goes_on_to_the_bit(options: dict[str, Any], records: Path):
    """Passes when losses, weights and moments are those of a run without validation."""
    found = []
    for measured in (
        {},
        {"val_data_path": str(records), "eval_steps": 1, "eval_samples": 6, "probe_data_path": str(records)},
    ):
        run = Path(f"{options['output_dir']}-{bool(measured)}")
        train(options, measured, output_dir=str(run), ema=0.9)
        lines = [line for line in metrics(run) if "loss" in line]
        told = [
            {k: v for k, v in line.items() if k not in ("time", "tokens_per_second", "data_wait")}
            for line in lines
        ]
        tensors = {}
        for file in ("ema", "model", "optimizer"):
            tensors |= {
                f"{file} {k}": v for k, v in load_file(run / "step_2" / f"{file}.safetensors").items()
            }
        found.append((told, tensors))
    (told, tensors), (told_too, tensors_too) = found
    assert told == told_too and tensors.keys() == tensors_too.keys()
    assert all(torch.equal(value, tensors_too[name]) for name, value in tensors.items())
    assert [line["step"] for line in metrics(run) if "val_loss" in line] == [0, 1, 2]
