"""A run goes on with another number of processes and another engine: the same rows in every step, the same
numbers to rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from tiny import built, metrics, train_on

from unigen.data.loader import LoaderState
from unigen.model.weights import load_bagel
from unigen.runs.checkpoint import scan_group

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("elastic")]  # its processes are started once

STEPS, ROWS = 8, 6
# (processes, engine, up to step): the run moves on from line to line.
LEGS = [(2, "fsdp2", 2), (1, "single", 4), (3, "fsdp2", 6), (2, "deepspeed", 8)]


def _leg_as_rank(rank: int, world: int, port: int, options: dict[str, Any], until: int, folder: str) -> None:
    become_rank(rank, world, port)
    trainer = built(options)
    if trainer.position.step:
        held = {}
        for shard in trainer.engine.shards():
            held[shard.name] = (shard.start, shard.value.clone())
            if shard.trains and (moments := trainer.engine.moments(shard)):
                held |= {
                    f"exp_avg.{shard.name}": (shard.start, moments[1].clone()),
                    f"exp_avg_sq.{shard.name}": (shard.start, moments[2].clone()),
                }
        torch.save((trainer.position.step, held), Path(folder) / f"{trainer.position.step}.{rank}.pt")
    rows: list[list[str]] = []
    step = trainer.take_step

    def noted(taken: list[Any], *rest: Any) -> Any:
        rows.append([origin for batch in taken for origin in batch.pack.origins])
        if trainer.position.step == until - 1:
            # the leg ends here; the learning rate of this step is drawn already
            object.__setattr__(trainer.run, "total_steps", until)
        return step(taken, *rest)

    trainer.take_step = noted  # type: ignore[method-assign]
    begun = trainer.position.step
    train_on(trainer)
    (Path(folder) / f"rows-{begun}.{rank}.json").write_text(json.dumps(rows))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def elastic(
    small_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The run of ``LEGS`` in ``run``, and the same on one process in ``one``."""
    folder = tmp_path_factory.mktemp("elastic")
    options = {
        "model_path": str(small_model), "train_data_path": str(records), "max_steps": STEPS, "save_steps": 2,
        "val_data_path": str(records), "eval_steps": 1, "eval_samples": 0, "ema": 0.9,
        "learning_rate": 1e-3, "adam_epsilon": 1e-3, "device": "cpu", "num_workers": 0,
        "gradient_accumulation_steps": ROWS // 2, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    for world, engine, until in LEGS:
        leg = options | {"engine": engine, "output_dir": str(folder / "run")}
        run_ranks(_leg_as_rank, world, leg, until, str(folder))
    one = built(options, gradient_accumulation_steps=ROWS, engine="single", output_dir=str(folder / "one"))
    train_on(one)
    return folder, options


def test_every_step_has_the_same_rows_whatever_the_number_of_processes(elastic: tuple[Path, dict[str, Any]]):
    """Passes when the samples of every step, over 2, 1, 3 and 2 processes, are those that a stream nobody
    stopped gives."""
    folder, options = elastic
    stream = built(options, engine="single", output_dir=str(folder / "rows")).run.stream
    steps = stream.steps(LoaderState(), ROWS)
    wanted = [
        sorted(origin for row in step for origin in stream.build(row, after).pack.origins)
        for (step, after), _ in zip(steps, range(STEPS))
    ]
    found: list[list[str]] = []
    for (world, _, _), begun in zip(LEGS, (0, 2, 4, 6), strict=True):
        parts = [json.loads((folder / f"rows-{begun}.{rank}.json").read_text()) for rank in range(world)]
        found += [sorted(origin for part in step for origin in part) for step in zip(*parts, strict=True)]
    assert found == wanted


def test_parameters_and_moments_are_equal_to_the_bit_at_load(elastic: tuple[Path, dict[str, Any]]):
    """Passes when what the processes of each leg hold after loading is, element by element, all that the leg
    before has saved."""
    folder, _ = elastic
    for (world, _, _), begun in zip(LEGS[1:], (2, 4, 6), strict=True):
        step = folder / "run" / f"step_{begun}"
        saved = scan_group(step, "optimizer") | scan_group(step, "ema") | scan_group(step, "model")
        seen: dict[str, int] = {}
        for rank in range(world):
            number, held = torch.load(folder / f"{begun}.{rank}.pt", weights_only=False)
            assert number == begun
            for name, (start, value) in held.items():
                assert torch.equal(saved[name].read(start, start + len(value)).to(value.dtype), value), name
                seen[name] = seen.get(name, 0) + len(value)
        assert {name for name in saved if not name.startswith("step.")} == set(seen)


def test_losses_are_those_of_one_process_within_1e_6(elastic: tuple[Path, dict[str, Any]]):
    """Validation, with the average in place of the weights, stands between any two steps and changes none."""
    folder, _ = elastic
    found, wanted = metrics(folder / "run"), metrics(folder / "one")
    assert [line["step"] for line in found] == [
        0,
        *(step for step in range(1, STEPS + 1) for _ in ("trained", "validated")),
    ]
    for a, b in zip(found, wanted, strict=True):
        for name in (
            "loss",
            "text_loss",
            "image_loss",
            "learning_rate",
            "epoch",
            "text_tokens",
            "image_tokens",
            "val_loss",
        ):
            if name in b or name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-6), (a["step"], name)


def test_the_checkpoint_of_three_processes_is_a_model_to_load(
    elastic: tuple[Path, dict[str, Any]], tmp_path: Path
):
    """In pieces, and with nothing beside it."""
    folder, _ = elastic
    shutil.copytree(folder / "run" / "step_6", tmp_path / "moved")
    assert (tmp_path / "moved" / "ema.safetensors.index.json").exists()
    found, wanted = load_bagel(tmp_path / "moved"), load_bagel(folder / "one" / "step_6")
    for (name, a), (_, b) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        assert float((a - b).norm()) <= 1e-6 * float(b.norm()) + 1e-9, name
