"""Training on several sources with full rows: what the recipe says is what is met, and a resumed run goes on
to the bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kills import timeless
from tiny import built, draw_picture, text, train, write_jsonl

from unigen.config import UserError
from unigen.data.loader import LoaderState, load_batches


@pytest.fixture
def sources(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Drawings, each once an epoch, and questions that repeat at a third of their rate; rows of 160
    tokens."""
    folder = tmp_path / "data"
    folder.mkdir()
    names = [draw_picture(folder / f"{i}.png", i, 64, 64) for i in range(4)]
    drawings = [{"text_prompt": f"Draw picture {i}", "image_path": names[i % 4]} for i in range(24)]
    questions = [text(f"What is {i}?", "A number. " * (1 + i % 3)) for i in range(5)]
    entries = [
        {"path": str(write_jsonl(folder / "drawings.jsonl", drawings)), "weight": 3, "max_image_tokens": 4},
        {
            "path": str(write_jsonl(folder / "questions.jsonl", questions)),
            "name": "questions",
            "weight": 1,
            "repeat": True,
        },
    ]
    changed = {
        "train_data_path": None,
        "train_sources": entries,
        "max_num_tokens": 160,
        "max_steps": 8,
        "save_steps": 2,
    }
    return options | changed | {"gradient_accumulation_steps": 2, "logging_steps": 1}


@pytest.mark.slow
def test_a_resumed_run_with_waiting_samples_is_the_uninterrupted_one_to_the_bit(
    sources: dict[str, Any], tmp_path: Path
):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(**sources | {"output_dir": str(whole)})
    state = json.loads((whole / "step_2" / "trainer.json").read_text())
    assert state["waiting"], "samples wait for a row at this place"
    train(
        **sources
        | {"output_dir": str(parted), "resume_from_checkpoint": str(whole / "step_2"), "num_workers": 2}
    )
    assert timeless(parted) == timeless(whole)[2:]
    for name in ("ema.safetensors", "optimizer.safetensors"):
        assert (parted / "step_8" / name).read_bytes() == (whole / "step_8" / name).read_bytes()


def test_an_epoch_meets_each_drawing_once_and_the_questions_at_their_rate(sources: dict[str, Any]):
    stream = built(**sources).run.stream
    steps = stream.steps_in(0, 2)
    share = built(**sources).run.rank_slice
    met = Counter(
        record
        for rows in load_batches(stream, share, LoaderState(), limit=steps)
        for row in rows
        for record in row.records
    )
    assert [met[i] for i in range(24)] == [1] * 24
    assert sum(met[i] for i in range(24, 29)) == 8 and max(met[i] for i in range(24, 29)) <= 2


def test_a_source_has_its_own_picture_size(sources: dict[str, Any]):
    trainer = built(**sources)
    _, blocks, _ = trainer.run.stream.mixture.outline(0, trainer.run.stream.mixture.key(0, 0))
    assert max(block.length for block in blocks if block.grid) <= 4
    entries = [{**sources["train_sources"][0], "max_image_tokens": 16}, sources["train_sources"][1]]
    larger = built(**sources | {"train_sources": entries})
    _, blocks, _ = larger.run.stream.mixture.outline(0, larger.run.stream.mixture.key(0, 0))
    assert max(block.length for block in blocks if block.grid) == 16


def test_the_log_says_what_the_mix_is(sources: dict[str, Any], caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        built(**sources)
    assert "drawings.jsonl: 24 passes (75.0%) over 24 records" in caplog.text
    assert "questions: 8 passes (25.0%) over 5 records" in caplog.text


@pytest.mark.slow
def test_resuming_with_other_weights_is_refused(sources: dict[str, Any], tmp_path: Path):
    train(**sources | {"max_steps": 2})
    entries = [sources["train_sources"][0], {**sources["train_sources"][1], "weight": 2}]
    with pytest.raises(UserError, match=r"not what this run began with.*resume with the same files"):
        built(**sources | {"train_sources": entries, "resume_from_checkpoint": "auto"})
