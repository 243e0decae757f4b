"""What the training tests share: small pictures, records, and a trainer ready for its first step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from unigen.config import Config
from unigen.data.loader import MicroBatch
from unigen.model.quantise import adopt_bits
from unigen.runs.checkpoint import verify_checkpoint
from unigen.runs.signals import SignalHandler
from unigen.sequence.images import to_image
from unigen.training.build import build
from unigen.training.engine import open_engine
from unigen.training.loop import TrainingLoop
from unigen.training.step import Counts, StepResult
from unigen.training.trainer import UnifiedTrainer, open_tracker
from unigen.training.warm_up import warm_up

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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metrics(output_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return read_jsonl(Path(output_dir) / "metrics.jsonl")


def config_of(*given: dict[str, Any], **options: Any) -> Config:
    """The options of a run, from several dictionaries and keywords: the later one wins."""
    return Config(**{name: value for some in (*given, options) for name, value in some.items()})


def built(*given: dict[str, Any], **options: Any) -> TrainingLoop:
    """A training ready for its first step, by :func:`config_of`; :func:`gradients` are those of its last one."""
    config = adopt_bits(config_of(*given, **options)).resolve()
    loop = TrainingLoop(build(config, open_engine(config), SignalHandler()))
    step = loop.engine.step

    def noted(lr: float, norm: float) -> None:
        named = loop.run.model.named_parameters()
        loop.seen = {name: p.grad.clone() for name, p in named if p.grad is not None}  # type: ignore[attr-defined]
        step(lr, norm)

    loop.engine.step = noted  # type: ignore[method-assign]
    return loop


def batch_of(loop: TrainingLoop, records: list[int]) -> MicroBatch:
    """These records packed, as they are in the first epoch."""
    stream = loop.run.stream
    return stream.build_samples([stream.mixture.key(record, 0) for record in records], loop.position.loader)


def step_of(loop: TrainingLoop, batches: list[MicroBatch], lr: float) -> StepResult:
    """One optimiser step over these micro-batches, and those of the other processes."""
    counts = Counts.of([batch.pack for batch in batches])
    return loop.take_step(batches, lr, Counts(*loop.engine.sum(list(vars(counts).values()))))


def take_warm_up(loop: TrainingLoop) -> None:
    """The warm-up batch before the first step."""
    warm_up(loop.engine, loop.run.stream, loop.run.rank_slice.micro_batches)


def train_on(loop: TrainingLoop) -> dict[str, float]:
    """All steps that are left, logged as a run's are."""
    loop.run.begin()
    loop.tracker = open_tracker(loop.run)
    return loop.train()


def train(*given: dict[str, Any], **options: Any) -> dict[str, float]:
    """A whole run, by :func:`config_of`; its last metrics."""
    return UnifiedTrainer(config_of(*given, **options)).train()


def assert_same_checkpoint(found: Path, wanted: Path) -> None:
    """Byte by byte, but for the options and the manifest, which name folders."""
    verify_checkpoint(found)
    files = {path.relative_to(wanted).as_posix() for path in wanted.rglob("*") if path.is_file()}
    files -= {"training_config.json", "manifest.json"}
    assert {"optimizer.safetensors", "trainer.json"} <= files
    for name in files:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def resumed_to_the_bit(options: dict[str, Any], folder: Path) -> Path:
    """Trains four steps in ``whole``, and in ``parts`` the last two of them, from the second one's checkpoint:
    both must end the same. The last checkpoint of ``parts``."""
    options = options | {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    whole, parts = folder / "whole", folder / "parts"
    train(**options | {"output_dir": str(whole)})
    train(**options | {"output_dir": str(parts), "resume_from_checkpoint": str(whole / "step_2")})
    assert_same_checkpoint(parts / "step_4", whole / "step_4")
    return parts / "step_4"


def gradients(loop: TrainingLoop) -> dict[str, torch.Tensor]:
    """Those of the last step, as they were before it was taken."""
    return loop.seen  # type: ignore[attr-defined]


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
