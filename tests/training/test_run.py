"""What a run keeps of the folder it began with, whatever happens to that meanwhile."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import built, text, train, train_on, write_jsonl

from unigen.model.weights import load_bagel
from unigen.runs.checkpoint import verify_checkpoint


@pytest.fixture
def own(options: dict[str, Any], small_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A run from a copy of the model that a test may spoil, its ViT frozen."""
    shutil.copytree(small_model, tmp_path / "model")
    return options | {"model_path": str(tmp_path / "model"), "freeze_vit": True}


def spoil(model: Path, how: str) -> None:
    weights = model / "ema.safetensors"
    if how == "removed":
        shutil.rmtree(model)
    elif how == "replaced":
        save_file({name: value * 0 + 7 for name, value in load_file(weights).items()}, model / "new")
        os.replace(model / "new", weights)
        for path in model.glob("*.json"):
            path.write_text("{}")
    elif how == "overwritten":
        save_file({name: value * 0 + 7 for name, value in load_file(weights).items()}, model / "new")
        weights.write_bytes((model / "new").read_bytes())
    else:
        os.truncate(weights, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["removed", "replaced", "overwritten", "truncated"])
def test_a_source_that_changes_leaves_checkpoints_as_they_would_have_been(
    own: dict[str, Any], how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train(own)
    spoiled = built(own, output_dir=str(tmp_path / "spoiled"))
    spoil(tmp_path / "model", how)
    with caplog.at_level(logging.WARNING):
        train_on(spoiled)
    spoiled.run.close()
    assert caplog.text.count("model/ema.safetensors was removed, replaced or rewritten") == 1
    found, wanted = tmp_path / "spoiled" / "step_2", Path(own["output_dir"]) / "step_2"
    verify_checkpoint(found)
    assert {p.name for p in found.iterdir()} == {p.name for p in wanted.iterdir()}
    for path in wanted.iterdir():
        if path.name == "ema.safetensors":
            assert_same(load_file(found / path.name), load_file(path))
        elif path.name not in ("manifest.json", "training_config.json"):
            assert (found / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_parts_left_out_come_from_what_the_run_began_with_or_not_at_all(
    own: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    texts = write_jsonl(tmp_path / "texts.jsonl", [text("What is two and two?", "Four.")] * 4)
    own |= {"visual_gen": False, "train_data_path": str(texts)}
    before = load_file(tmp_path / "model" / "ema.safetensors")
    loop = built(own)
    spoil(tmp_path / "model", "replaced")
    train_on(loop)
    loop.run.close()
    saved = load_file(Path(own["output_dir"]) / "step_2" / "ema.safetensors")
    left_out = [name for name in before if "moe_gen" in name]
    assert left_out and all(torch.equal(saved[name], before[name]) for name in left_out)

    # resumed beside another model of the same shape: what the model leaves out is still the first one's
    resumed = own | {"resume_from_checkpoint": "auto", "max_steps": 3}
    with caplog.at_level(logging.WARNING):
        train(resumed, learning_rate=0.5)
    assert "is not what this run began with" in caplog.text
    assert f"model_path {own['model_path'][:60]}: other weights than the run began with" in caplog.text
    assert "learning_rate is 0.5, and" in caplog.text and "Fix: --learning_rate 1e-5" in caplog.text
    saved = load_file(Path(own["output_dir"]) / "step_3" / "ema.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in left_out)

    # resumed without the model it began with
    shutil.rmtree(tmp_path / "model")
    caplog.clear()
    train(resumed, max_steps=4)
    assert "other weights" not in caplog.text
    step_4 = Path(own["output_dir"]) / "step_4"
    assert all(torch.equal(load_file(step_4 / "ema.safetensors")[n], before[n]) for n in left_out)

    # rewritten in place: the checkpoint lacks them, says so, and is enough to go on from
    own |= {"model_path": str(step_4), "output_dir": str(tmp_path / "third")}
    loop = built(own)
    os.truncate(step_4 / "ema.safetensors", 1000)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train_on(loop)
    loop.run.close()
    assert "Checkpoints lack" in caplog.text
    load_bagel(tmp_path / "third" / "step_2", visual_gen=False)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
