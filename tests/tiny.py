"""What the training tests share: small pictures, records, and a trainer ready for its first step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from unigen.config import Config
from unigen.data.loader import MicroBatch
from unigen.sequence.images import to_image
from unigen.training.engine import open_engine
from unigen.training.trainer import UnifiedTrainer

# Latents of 2 x 2 to 4 x 4 tokens and ViT grids of 2 x 2: a step takes a few hundredths of a second.
SMALL = {
    "vae_transform": {"max_size": 64, "min_size": 32},
    "vit_transform": {"max_size": 42, "min_size": 28},
    "vit_edit_transform": {"max_size": 28, "min_size": 28},
}


def draw_picture(path: Path, seed: int, width: int = 48, height: int = 32) -> str:
    """A noisy PNG; its name."""
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    to_image(pixels).save(path)
    return path.name


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def text(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def metrics(output_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()]


def built(**options: Any) -> UnifiedTrainer:
    """A trainer ready for its first step."""
    trainer = UnifiedTrainer(Config(**options))
    trainer.engine = open_engine(trainer.config)
    trainer.build()
    step = trainer.engine.step

    def noted(lr: float, norm: float) -> None:
        trainer.seen = {
            name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
        }  # type: ignore[attr-defined]
        step(lr, norm)

    trainer.engine.step = noted  # type: ignore[method-assign]
    return trainer


def row_of(trainer: UnifiedTrainer, records: list[int]) -> MicroBatch:
    """The row of these records, as the first epoch visits them."""
    return trainer.stream.build_samples([trainer.stream.draw(record, 0) for record in records], trainer.place)


def gradients(trainer: UnifiedTrainer) -> dict[str, torch.Tensor]:
    """Those of the last step, as they were before it was taken."""
    return trainer.seen  # type: ignore[attr-defined]


def assert_close(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Relative to each tensor's norm; gradients that are zero but for rounding are measured against all of
    them."""
    assert found.keys() == wanted.keys()
    total = math.sqrt(sum(float(g.double().pow(2).sum()) for g in wanted.values()))
    assert total > 0.1
    for name, g in wanted.items():
        error = float((found[name].double() - g.double()).norm())
        assert error <= tolerance * float(g.double().norm()) + 1e-7 * total, (name, error, float(g.norm()))
