"""Small things to train with: a checkpoint whose pictures are tiny, and records of every task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import SMALL, draw_picture, text, write_jsonl


@pytest.fixture(scope="session")
def small_model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with smaller pictures."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(golden / "model", folder)
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven records: two of text, two drawn, one described, one edited, one interleaved."""
    folder = tmp_path_factory.mktemp("data")
    a, b, c = (draw_picture(folder / f"{i}.png", i, 48 + 16 * i, 32) for i in range(3))
    return write_jsonl(
        folder / "train.jsonl",
        [
            text("What is two and two?", "Four."),
            {"text_prompt": "A red house", "image_path": a},
            {"image_path": b, "caption": "A small tree beside the house."},
            {
                "input_image": a,
                "editing_steps": [{"instruction": "Make it night", "result_image": c}, {"instruction": "And snow", "result_image": b}],
            },
            {
                "sequence": [
                    {"type": "text", "content": "First"},
                    {"type": "image", "image_path": a},
                    {"type": "text", "content": "and then the end."},
                ]
            },
            text("Say it twice.", "It. It."),
            {"text_prompt": "Nothing at all", "image_path": c},
        ],
    )


@pytest.fixture
def options(small_model: Path, records: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a short run; a test changes what it is about."""
    return {
        "model_path": str(small_model),
        "train_data_path": str(records),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "device": "cpu",
        "num_workers": 0,
        "logging_steps": 1,
    }
