"""Samples of two processes: what one process samples, no hang whatever fails where, and Stopped on all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import become_rank
from processes import run_ranks
from sampling import fail_once, pixels, sampler_of, write_prompts
from tiny import batch_of, built, step_of, take_warm_up

from unigen.runs.signals import Stopped
from unigen.training.samples import SampleWriter
from unigen.training.synchronised import SynchronisedGeneration

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("samples_together")]  # its processes are started once


@pytest.mark.slow
def test_a_failure_that_the_others_cannot_be_told_of_ends_the_run(options: dict[str, Any], tmp_path: Path):
    """Passes when an error between the gatherings of a stack, where the others wait, comes out, and one
    outside of it does not."""
    sampler = sampler_of(options | {"sample_prompts": str(write_prompts(tmp_path))})
    # plain layers: none is gathered as a whole, as with ZeRO 3
    layers = sampler.model.language_model.model.layers
    lockstep = SynchronisedGeneration(sampler.engine, sampler.model, lambda: None)
    with lockstep.watching():
        fail_once(sampler, torch.OutOfMemoryError("inside"))
        with pytest.raises(torch.OutOfMemoryError, match="inside"):
            lockstep.attempt(lambda: sampler._ask(sampler.prompts[0]))
    assert not any(
        layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer) for layer in layers
    )
    with lockstep.watching():
        assert isinstance(lockstep.attempt(lambda: 1 / 0), ZeroDivisionError)
        assert lockstep.attempt(lambda: sampler._ask(sampler.prompts[0])) is None


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "offload"])
def test_layers_are_recomputed_after_samples_as_before(options: dict[str, Any], tmp_path: Path, policy: str):
    prompts = {"sample_prompts": str(write_prompts(tmp_path)), "engine": "fsdp2"}
    loop = built(options, prompts, gradient_checkpointing=True, checkpointing_policy=policy)
    with loop.engine:
        layer = loop.run.model.language_model.model.layers[1]
        runs: list[int] = []
        layer.mlp.gate_proj.register_forward_hook(lambda *_: runs.append(1))

        def products() -> int:
            runs.clear()
            step_of(loop, [batch_of(loop, [0, 1])], 0.0)
            return len(runs)

        wrapper, before = vars(layer)["forward"], products()
        SampleWriter(loop.config, loop.engine, loop.run.model).run(0, None)
        assert vars(layer)["forward"] is wrapper
        assert products() == before > 1


def _sample_as_rank(rank: int, world: int, port: int, options: dict[str, Any], folder: str) -> None:
    """Both engines, one after the other: samples, a training step, samples again; then what goes wrong on one
    process alone."""
    become_rank(rank, world, port)
    heard: dict[str, Any] = {}
    for name in ("ddp", "fsdp2"):
        trainer = built(options, engine=name, output_dir=f"{folder}/{name}")
        take_warm_up(trainer)
        sampler = SampleWriter(trainer.config, trainer.engine, trainer.run.model)
        sampler.run(0, None)
        step_of(trainer, [batch_of(trainer, [rank, rank + 2])], 1e-3)
        sampler.run(1, None)

        logits = trainer.run.model.logits
        if rank == 1 and name == "fsdp2":  # rounding, at its worst
            trainer.run.model.logits = lambda hidden, logits=logits: -logits(hidden)
        sampler.run(2, None)
        if "logits" in vars(trainer.run.model):
            del trainer.run.model.logits

        if rank == 1:
            fail_once(sampler, torch.OutOfMemoryError("CUDA out of memory."))
        sampler.run(3, None)
        if rank == 1:
            sampler._ask = lambda prompt: 1 / 0  # fails outside of every layer
        sampler.run(4, None)
        if rank == 1:
            del sampler._ask

        heard[name] = []
        left = [7]

        def idle(left: list[int] = left) -> None:
            left[0] -= 1
            if rank == 1 and left[0] == 0:
                raise Stopped

        sampler.answerer.idle = idle
        try:
            sampler.run(5, None)
        except Stopped:
            heard[name].append("stopped")
        if rank == 1:
            fail_once(sampler, Stopped())  # as a signal that comes in the middle of a layer
        sampler.answerer.idle = lambda: None
        try:
            sampler.run(5, None)
        except Stopped:
            heard[name].append("stopped")
        assert all(module.training for module in trainer.run.model.modules())
        # after all that the training still works, and is right
        step_of(trainer, [batch_of(trainer, [rank + 3])], 1e-3)
        sampler.run(6, None)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(heard))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(small_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of two processes, and of one that trained on the same rows."""
    folder = tmp_path_factory.mktemp("two")
    options = {
        "model_path": str(small_model),
        "train_data_path": str(records),
        "max_steps": 4,
        "device": "cpu",
        "num_workers": 0,
    }
    # Adam divides by the gradient's size: with its usual epsilon, gradients that are zero but for rounding
    # would move weights.
    options |= {
        "sample_prompts": str(write_prompts(folder)),
        "text_cond_dropout_prob": 0.0,
        "adam_epsilon": 1e-3,
        "hang_timeout": 60.0,
    }
    run_ranks(_sample_as_rank, 2, options, str(folder), seconds=300)
    trainer = built(options, output_dir=str(folder / "one"))
    sampler = SampleWriter(trainer.config, trainer.engine, trainer.run.model)
    sampler.run(0, None)
    step_of(trainer, [batch_of(trainer, [0, 2]), batch_of(trainer, [1, 3])], 1e-3)
    sampler.run(1, None)
    step_of(trainer, [batch_of(trainer, [3]), batch_of(trainer, [4])], 1e-3)
    sampler.run(6, None)
    return folder


def assert_same(found: Path, wanted: Path) -> None:
    """The same texts, and pictures that differ by rounding at most."""
    one, other = (json.loads((folder / "index.json").read_text("utf-8")) for folder in (found, wanted))
    assert one == other
    pictures = [piece["image"] for line in one for piece in line["pieces"] if "image" in piece]
    assert len(pictures) >= 2
    for name in pictures:
        assert np.abs(pixels(found / name) - pixels(wanted / name)).max() <= 1, name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("step", [0, 1, 6])
def test_two_processes_sample_what_one_does(two: Path, engine: str, step: int):
    """Passes when texts are equal and no pixel is off by more than one level: at the start, after a step, and
    after failures."""
    assert_same(two / engine / "samples" / f"step_{step}", two / "one" / "samples" / f"step_{step}")


def test_rank_0_decides_where_processes_share_a_model(two: Path):
    """Passes when a process that would choose other tokens throughout neither hangs the others nor changes a
    word."""
    assert_same(two / "fsdp2" / "samples" / "step_2", two / "one" / "samples" / "step_1")


@pytest.mark.parametrize(
    ("engine", "inside", "outside"), [("ddp", [1], [1, 3]), ("fsdp2", [0], [0, 1, 2, 3])]
)
def test_a_failure_on_one_process_costs_its_prompts_alone(
    two: Path, engine: str, inside: list[int], outside: list[int]
):
    """Passes when the prompts that the failing process had a part in are marked, and the others are as
    ever."""
    wanted = json.loads((two / engine / "samples" / "step_1" / "index.json").read_text("utf-8"))
    for step, failed in ((3, inside), (4, outside)):
        found = json.loads((two / engine / "samples" / f"step_{step}" / "index.json").read_text("utf-8"))
        assert [i for i, line in enumerate(found) if "error" in line] == failed
        assert all(line == wanted[i] for i, line in enumerate(found) if i not in failed)


def test_stopped_on_one_process_stops_the_samples_on_all(two: Path):
    """Passes when both processes raised Stopped, in a layer too, and no folder of that step stays."""
    for rank in range(2):
        assert json.loads((two / f"{rank}.json").read_text()) == {
            "ddp": ["stopped"] * 2,
            "fsdp2": ["stopped"] * 2,
        }
    for engine in ("ddp", "fsdp2"):
        assert sorted(path.name for path in (two / engine / "samples").iterdir()) == [
            f"step_{n}" for n in (0, 1, 2, 3, 4, 6)
        ]
