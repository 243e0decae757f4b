"""What the tests of samples share: prompts of every kind, a sampler of one process, and files to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import draw_picture

from unigen.config import Config
from unigen.sequence.images import open_image
from unigen.training.engine import Engine
from unigen.training.samples import SampleWriter

FAST = {"num_timesteps": 3, "max_new_tokens": 4}


def write_prompts(folder: Path) -> Path:
    """Four prompts: drawn, described, edited, and one whose pieces the model chooses."""
    draw_picture(folder / "a.png", 1)
    lines = [
        {"prompt": "A red house", "kind": "draw", "height": 32, "width": 48, **FAST},
        {"prompt": "What is this?", "image": "a.png", "kind": "answer", **FAST},
        {"prompt": "Make it night", "image": ["a.png"], "kind": "draw", "seed": 7, **FAST},
        {"prompt": "and so", "do_sample": True, "temperature": 1.0, **FAST},
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sampler_of(options: dict[str, Any]) -> SampleWriter:
    """Of one process, whose model is loaded and not trained."""
    engine = Engine(Config(**options))
    model = engine.load_model(Path(options["model_path"]))
    model.source = Path(options["model_path"])
    return SampleWriter(engine.config, engine, model)


def fail_once(sampler: SampleWriter, error: BaseException) -> None:
    """The next time the middle layer runs, it fails."""
    attention = sampler.model.language_model.model.layers[1].self_attn

    def fails(*_: Any) -> torch.Tensor:
        del attention.read
        raise error

    attention.read = fails


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pixels(path: Path) -> np.ndarray:
    return np.asarray(open_image(path), dtype=np.float64)
