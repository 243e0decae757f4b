"""Answers to held-out records while training: those of the inferencer, measured by unigen evaluate's metrics; as
many as the time allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import built, metrics, train

from unigen.config import ConfigError
from unigen.evaluation.perceptual import psnr
from unigen.evaluation.text import length_ratio
from unigen.inference.inferencer import InterleaveInferencer
from unigen.model.weights import load_bagel
from unigen.training.answering import small_pictures


@pytest.mark.slow
def test_the_numbers_are_those_of_the_answers(options: dict[str, Any], records: Path):
    """Passes when the length of what the model describes, and the distance of what it edits, are what the
    inferencer's own answers give."""
    given = {"val_data_path": str(records), "eval_samples": 7, "eval_metrics": ["length_ratio", "psnr"]}
    loop = built(options, given)
    found, again = loop.evaluate(), loop.evaluate()
    assert found == again and found is not None
    answers = loop.run.evaluation.answers
    assert answers.records == 7 and loop.run.model.training
    model = load_bagel(options["model_path"])
    inferencer = InterleaveInferencer(model, vae_transform=small_pictures(loop.config, model))
    for batch in answers.batches:
        case = batch[0]
        if case.task not in ("understand", "edit"):
            continue
        (pieces,) = inferencer.unified_generate_batch(
            [list(case.prompt)], outputs=list(case.outputs), options=answers._settings(batch)
        )
        if case.task == "edit":
            wanted = psnr(pieces, list(case.references)).value
            assert found["eval/psnr/edit"] == pytest.approx(wanted)
        elif [one.task for one in batch] == ["understand"]:
            wanted = length_ratio(pieces, [list(right) for right in case.references]).value
            assert found["eval/length_ratio/understand"] == pytest.approx(wanted)
    assert {name.split("/")[2] for name in found if name.startswith("eval/length_ratio")} == {
        "text", "understand", "interleaved",
    }  # fmt: skip


@pytest.mark.slow
def test_by_default_answers_take_a_tenth_of_the_time_at_most(
    options: dict[str, Any], records: Path, caplog: pytest.LogCaptureFixture
):
    """Where steps take no time there is none for answers, all are measured where there is a lot; the choice
    stays with the run, and both are said."""
    caplog.set_level("INFO", "unigen")
    del options["eval_samples"]
    options |= {"val_data_path": str(records), "eval_steps": 1, "max_steps": 1}
    train(options)
    assert not any(
        name.startswith("eval/") for line in metrics(options["output_dir"]) for name in line if line["step"]
    )
    assert "No answers are measured: " in caplog.text and "predicted" in caplog.text
    state = json.loads((Path(options["output_dir"]) / "step_1" / "trainer.json").read_text())
    assert state["evaluation"]["batches"] == 0
    resumed = built(options, resume_from_checkpoint="auto", eval_steps=10**6, max_steps=10**7)
    assert resumed.run.evaluation.answers.kept == 0

    patient = {"eval_steps": 10**6, "max_steps": 10**7, "output_dir": f"{options['output_dir']}-2"}
    loop = built(options, patient)
    assert any(name.startswith("eval/accuracy/") for name in loop.evaluate())
    assert loop.run.evaluation.answers.records == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"eval_metrics": ["acuracy"]}, "accuracy"),
        ({"eval_metrics": ["fd"]}, "eval_features"),
        ({"eval_metrics": ["verify"]}, "unigen evaluate"),
        ({"eval_metrics": ["anls"], "eval_samples": 0}, "eval_samples"),
        (
            {"eval_metrics": ["length_ratio"], "metric_for_best_model": "eval/length_ratio/text"},
            "greater_is_better",
        ),
        ({"eval_samples": 7, "metric_for_best_model": "eval/psnr_to_source/edit"}, "greater_is_better"),
        ({"metric_for_best_model": "eval/psnr/text"}, "not measured .*eval/accuracy/text"),
        ({"metric_for_best_model": "eval/rougeL/text"}, "--eval_metrics accuracy anls psnr ssim rougeL"),
        ({"metric_for_best_model": "val/image_loss_by_task/text"}, "val/image_loss_by_task/"),
        ({"metric_for_best_model": "eval/anls/txt"}, "eval/anls/text"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(
    given: dict[str, Any], told: str, options: dict[str, Any], records: Path
):
    with pytest.raises(ConfigError, match=told):
        built(options, {"val_data_path": str(records), "eval_samples": 2}, given)


@pytest.mark.slow
def test_every_metric_that_is_offered_gets_a_value(options: dict[str, Any], records: Path):
    """A number that decides on the best can be: psnr of edits alone, accuracy where a text is asked for."""
    loop = built(options, {"val_data_path": str(records), "eval_samples": 7})
    offered = {name for name in loop.run.evaluation._names() if not name.startswith("val/image_loss_by_time")}
    found = loop.evaluate()
    assert offered == {name for name, value in found.items() if value is not None and "by_time" not in name}
    assert {"eval/psnr/edit", "eval/anls/understand"} <= offered and "eval/psnr/understand" not in offered


@pytest.mark.slow
def test_the_direction_of_a_metric_is_its_own(options: dict[str, Any], records: Path):
    options |= {"val_data_path": str(records), "eval_samples": 7, "metric_for_best_model": "eval/anls/text"}
    assert built(options).run.evaluation.greater_is_better
    assert not built(options, greater_is_better=False).run.evaluation.greater_is_better
