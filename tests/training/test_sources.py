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
    train(sources, output_dir=str(whole))
    state = json.loads((whole / "step_2" / "trainer.json").read_text())
    assert state["waiting"], "samples wait for a row at this place"
    train(sources, output_dir=str(parted), resume_from_checkpoint=str(whole / "step_2"), num_workers=2)
    assert timeless(parted) == timeless(whole)[2:]
    for name in ("ema.safetensors", "optimizer.safetensors"):
        assert (parted / "step_8" / name).read_bytes() == (whole / "step_8" / name).read_bytes()


@pytest.mark.slow
def test_an_epoch_meets_each_drawing_once_and_the_questions_at_their_rate(sources: dict[str, Any]):
    stream = built(sources).run.stream
    steps = stream.steps_in(0, 2)
    share = built(sources).run.rank_slice
    met = Counter(
        record
        for rows in load_batches(stream, share, LoaderState(), limit=steps)
        for row in rows
        for record in row.records
    )
    assert [met[i] for i in range(24)] == [1] * 24
    assert sum(met[i] for i in range(24, 29)) == 8 and max(met[i] for i in range(24, 29)) <= 2


@pytest.mark.slow
def test_a_source_has_its_own_picture_size(sources: dict[str, Any]):
    trainer = built(sources)
    _, blocks, _ = trainer.run.stream.mixture.outline(0, trainer.run.stream.mixture.key(0, 0))
    assert max(block.length for block in blocks if block.grid) <= 4
    entries = [{**sources["train_sources"][0], "max_image_tokens": 16}, sources["train_sources"][1]]
    larger = built(sources, train_sources=entries)
    _, blocks, _ = larger.run.stream.mixture.outline(0, larger.run.stream.mixture.key(0, 0))
    assert max(block.length for block in blocks if block.grid) == 16


def test_the_log_says_what_the_mix_is(sources: dict[str, Any], caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        built(sources)
    assert "drawings.jsonl: 24 passes (75.0%) over 24 records" in caplog.text
    assert "questions: 8 passes (25.0%) over 5 records" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("named", ["itself", "a link", "another source"])
def test_a_file_that_is_read_twice_or_validated_on_is_told(
    options: dict[str, Any], records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str
):
    link = tmp_path / "link.jsonl"
    link.symlink_to(records)
    twice: dict[str, Any] = {"train_data_path": [str(records), str(link if named == "a link" else records)]}
    if named == "another source":
        entries = [{"path": str(records), "name": name} for name in "ab"]
        twice = {"train_data_path": None, "train_sources": entries}
    built(options, {"image_root": str(records.parent)}, twice, val_data_path=str(link))
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name == "unigen"]
    assert [line for line in warned if line.startswith("Read more than once") and str(records) in line]
    assert [
        line for line in warned if line.startswith("Trained on and validated on") and str(records) in line
    ]


def test_a_file_that_is_read_in_two_ways_and_other_validation_data_are_no_mistake(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    held_out = write_jsonl(tmp_path / "val.jsonl", [text("What?", "That.")])
    data = write_jsonl(tmp_path / "data.jsonl", [{"a": "What is two?", "b": "Two.", "c": "2."}] * 4)
    entries = [{"path": str(data), "name": name, "fields": {"query": "a", "response": name}} for name in "bc"]
    given = {"train_data_path": None, "train_sources": entries, "val_data_path": str(held_out)}
    built(options, given)
    assert "Read more than once" not in caplog.text and "validated on" not in caplog.text


@pytest.mark.slow
def test_resuming_with_other_weights_is_refused(sources: dict[str, Any], tmp_path: Path):
    train(sources, max_steps=2)
    entries = [sources["train_sources"][0], {**sources["train_sources"][1], "weight": 2}]
    with pytest.raises(UserError, match=r"not what this run began with.*resume with the same files"):
        built(sources, train_sources=entries, resume_from_checkpoint="auto")
