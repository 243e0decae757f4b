"""Every engine trains to the weights of one process: two and three processes, text-only, image-only and mixed
ranks, empty ones.

Each (engine, number of processes) is started once and trains all cases; what its processes hold is put
together and compared with the same rows on one process: weights, moments and average within 1e-6 of their
norm, after three steps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from safetensors.torch import save_file
from tiny import batch_of, built, read_jsonl, step_of, take_warm_up, write_jsonl

from unigen.model.parts import WORDS
from unigen.model.storage import scan_folder
from unigen.training.loop import TrainingLoop

pytestmark = pytest.mark.slow  # several processes

# Of each step the rows of each process: [step][rank][micro-batch][records]. 0 and 5 are text, 1 and 6 are
# drawn, 3 is an edit.
TWO: dict[str, tuple[list[list[list[list[int]]]], dict[str, Any]]] = {
    "mixed": ([[[[0, 1, 2]], [[3, 4, 5, 6]]], [[[6]], [[2]]], [[[0]], [[4]]]], {}),
    "text on one, images on the other": (
        [[[[0, 5]], [[1, 6]]], [[[1]], [[0]]], [[[5]], [[0]]]],
        {"train_transitions": False},
    ),
    "nothing on one": ([[[[0, 1, 2, 3]], [[]]], [[[]], [[4]]], [[[1]], [[6]]]], {"ema": 0.5}),
    "two micro-batches, one process ends early": (
        [[[[0], [3]], [[5], []]], [[[1], [2]], [[], []]]],
        {"ema": 0.5},
    ),
    "understanding frozen": ([[[[0, 5]], [[1, 4]]], [[[3]], [[2, 6]]]], {"freeze_und": True}),
    "decoder frozen": ([[[[0, 5]], [[1, 3]]], [[[4]], [[]]]], {"freeze_llm": True}),
    "vision frozen, checkpointing": (
        [[[[2, 0]], [[3]]], [[[5]], [[1]]]],
        {"freeze_vit": True, "gradient_checkpointing": True},
    ),
    "no drawing": (
        [[[[0, 1]], [[]]], [[[0]], [[1]]]],
        {"visual_gen": False, "train_data_path": "text.jsonl"},
    ),
    # of this file 0 is drawn, 1 a text, 3 an edit
    "no vision": ([[[[0]], [[1, 3]]]], {"visual_und": False, "train_data_path": "drawn.jsonl"}),
    "adapters": (
        [[[[0, 1, 2]], [[3, 4, 5, 6]]], [[[6]], [[2]]], [[[0]], [[4]]]],
        {"lora_rank": 3, "lora_targets": ["both", "vit"], "train_also": ["time_embedder"], "ema": 0.5},
    ),
    "adapters with lengths of rows": (
        [[[[0, 1]], [[3, 4]]], [[[6]], [[2]]]],
        {"lora_rank": 2, "lora_variant": "dora"},
    ),
    "kept": (
        [[[[0], [1, 2]], [[3, 4], [5, 6]]], [[[6], [3]], [[2], []]], [[[0], []], [[1], [4]]]],
        {"preserve_weight": 2.0, "preserve_share": 1.0, "ema": 0.5},
    ),
    "adapters kept": (
        [[[[0, 1]], [[3, 4]]], [[[6]], [[2]]], [[[5]], [[3]]]],
        {
            "lora_rank": 2,
            "lora_variant": "dora",
            "lora_targets": ["both"],
            "train_also": ["llm2vae"],
            "preserve_weight": 2.0,
            "preserve_share": 1.0,
        },
    ),
    "clipped": ([[[[0, 1, 2]], [[3, 4, 5, 6]]], [[[6]], [[2]]]], {"max_grad_norm": 0.05}),
}
THREE: dict[str, tuple[list[list[list[list[int]]]], dict[str, Any]]] = {
    "mixed": ([[[[0, 1]], [[2]], [[3, 4]]], [[[6]], [[2]], [[5]]], [[[0]], [[4]], [[1]]]], {"ema": 0.5}),
    "text, images, nothing": ([[[[0, 5]], [[1, 6]], [[]]], [[[]], [[3]], [[0]]]], {}),
    "micro-batches": ([[[[0], [3]], [[5], []], [[1], [6]]], [[[1], [2]], [[], []], [[4], []]]], {}),
}
ON_HOST: tuple[list[list[list[list[int]]]], dict[str, Any]] = (
    TWO["mixed"][0][:2],
    {
        "model_path": "sixteen",
        "freeze_llm": True,
        "gradient_checkpointing": True,
        "checkpointing_policy": "offload",
    },
)
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "ddp-2": ({"engine": "ddp"}, 2),
    "fsdp2-1": ({"engine": "fsdp2"}, 1),
    "fsdp2-2": ({"engine": "fsdp2"}, 2),
    "fsdp2-2-offload": ({"engine": "fsdp2", "cpu_offload": True}, 2),
    "fsdp2-2-bf16": ({"engine": "fsdp2", "bf16": True}, 2),
    "fsdp2-3": ({"engine": "fsdp2"}, 3),
    "fsdp2-2x2": ({"engine": "fsdp2", "shard_size": 2}, 4),
}


def cases_of(run: str) -> dict[str, tuple[list[list[list[list[int]]]], dict[str, Any]]]:
    world = RUNS[run][1]
    if run.endswith("bf16"):
        return {"frozen words of 16 bits, inputs on the host": ON_HOST, "mixed": TWO["mixed"]}
    if run.endswith("offload"):
        return {"mixed": TWO["mixed"]}
    if world == 4:
        return {
            "mixed": (
                [
                    [[[0], [3]], [[2], []], [[5], [1]], [[], [6]]],
                    [[[1], [2]], [[4], []], [[0], []], [[], []]],
                ],
                {},
            )
        }
    return {1: {"mixed": TWO["mixed"], "clipped": TWO["clipped"]}, 2: TWO, 3: THREE}[world]


def options_of(
    case: tuple[Any, dict[str, Any]], options: dict[str, Any], engine: dict[str, Any]
) -> dict[str, Any]:
    # Adam divides by the gradient's size: with its usual epsilon, gradients that are zero but for rounding
    # would move weights.
    given = {
        "text_cond_dropout_prob": 0.0,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.0,
        **options,
        **case[1],
        **engine,
    }
    for name in ("train_data_path", "model_path"):
        given[name] = str(Path(options["train_data_path"]).parent / given[name])
    return given


def train(
    trainer: TrainingLoop, steps: list[list[list[list[int]]]], rank: int | None, world: int
) -> list[list[float]]:
    """``rank`` None: one process takes everybody's rows, one after another."""
    found = []
    for step in steps:
        if rank is None or world == 1:
            rows = [row for part in step for row in part]
        else:
            rows = step[rank]
        result = step_of(trainer, [batch_of(trainer, row) for row in rows], 2e-3)
        found.append([result.text_loss, result.image_loss, result.grad_norm, *result.kept])
    return found


def held(trainer: TrainingLoop) -> list[tuple[str, str, torch.Size, int, torch.Tensor]]:
    """What this process would write: (kind, name, shape, start, values)."""
    found = []
    for shard in trainer.engine.shards():
        if not shard.owned:
            continue
        kinds = {"weight": shard.value}
        if shard.trains:
            if moments := trainer.engine.moments(shard):
                assert moments[0] >= 1
                kinds |= {"exp_avg": moments[1], "exp_avg_sq": moments[2]}
            if trainer.run.ema is not None:
                kinds["average"] = trainer.run.ema.average(shard.name)
        found += [
            (kind, shard.name, shard.shape, shard.start, value.detach().clone())
            for kind, value in kinds.items()
        ]
    return found


def together(parts: list[list[Any]]) -> dict[tuple[str, str], torch.Tensor]:
    """Whole tensors; every element is held once."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    seen: dict[tuple[str, str], int] = {}
    for kind, name, shape, start, value in (item for part in parts for item in part):
        flat = whole.setdefault((kind, name), torch.full((shape.numel(),), float("nan")))
        assert flat[start : start + len(value)].isnan().all(), f"{kind} of {name} is held twice"
        flat[start : start + len(value)] = value
        seen[kind, name] = seen.get((kind, name), 0) + len(value)
    assert all(seen[key] == len(flat) for key, flat in whole.items())
    return whole


def spoiled(trainer: TrainingLoop, kind: str, here: bool) -> list[Any]:
    """A step of two micro-batches, the second of which has a NaN in its loss, or in its gradient alone,
    ``here`` and on no other
    process: (why it was refused, is all that is held the same to the bit?)."""
    before, forward, calls = held(trainer), trainer.engine.forward, []

    def bad(pack: Any) -> Any:
        output = forward(pack)
        calls.append(pack)
        if here and len(calls) == 2 and kind == "loss":
            return output._replace(ce=output.ce * float("nan"))
        if here and len(calls) == 2:
            output.ce.register_hook(lambda gradient: gradient * float("nan"))
        return output

    trainer.engine.forward = bad  # type: ignore[method-assign]
    result = step_of(trainer, [batch_of(trainer, [0]), batch_of(trainer, [0])], 0.1)
    trainer.engine.forward = forward  # type: ignore[method-assign]
    same = all(torch.equal(a[4], b[4]) for a, b in zip(before, held(trainer), strict=True))
    return [result.refused, same and len(before) == len(held(trainer))]


def _train_as_rank(rank: int, world: int, port: int, run: str, options: dict[str, Any], folder: str) -> None:
    become_rank(rank, world, port)
    for number, (_, case) in enumerate(cases_of(run).items()):
        given = options_of(case, options, RUNS[run][0])
        trainer = built(given, output_dir=f"{folder}/{run}-{number}")
        take_warm_up(trainer)
        found = train(trainer, case[0], rank, world)
        torch.save((found, held(trainer)), Path(folder) / f"{run}-{number}.{rank}.pt")
    (Path(folder) / f"{run}-bad.{rank}.json").write_text(
        json.dumps([spoiled(trainer, kind, rank == world - 1) for kind in ("loss", "gradient")])
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def options_for(small_model: Path, records: Path) -> dict[str, Any]:
    """Those of all cases; beside the records stand a file of the texts alone, one of nothing to look at, and the
    model with its words in bfloat16."""
    lines = read_jsonl(records)
    write_jsonl(records.parent / "text.jsonl", [lines[0], lines[5]])
    write_jsonl(records.parent / "drawn.jsonl", [lines[1], lines[0], lines[5], lines[3]])
    values = {name: entry.read() for name, entry in scan_folder(small_model).items()}
    shutil.copytree(small_model, records.parent / "sixteen", dirs_exist_ok=True)
    save_file(values | {WORDS: values[WORDS].bfloat16()}, records.parent / "sixteen" / "ema.safetensors")
    return {
        "model_path": str(small_model),
        "train_data_path": str(records),
        "max_steps": 3,
        "device": "cpu",
        "num_workers": 0,
    }


@pytest.fixture(scope="module")
def prepared(
    small_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    return tmp_path_factory.mktemp("engines"), options_for(small_model, records)


@pytest.fixture(scope="module")
def alone(prepared: tuple[Path, dict[str, Any]]) -> Callable[..., Any]:
    """What one process makes of a case: losses, and what it holds. Several engines are held against it."""
    folder, options = prepared

    @cache
    def run(
        name: str, world: int, bf16: bool
    ) -> tuple[list[list[float]], dict[tuple[str, str], torch.Tensor]]:
        case = cases_of(next(run for run in RUNS if RUNS[run][1] == world and run.endswith("bf16") == bf16))[
            name
        ]
        given = options_of(case, options, {"engine": "single", "bf16": bf16})
        trainer = built(given, output_dir=str(folder / f"one-{world}-{bf16}-{name}"))
        return train(trainer, case[0], None, world), together([held(trainer)])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_an_engine_trains_to_the_weights_of_one_process_within_1e_6(
    run: str, prepared: tuple[Path, dict[str, Any]], alone: Callable[..., Any]
):
    """Passes when, in every case of ``TWO`` or ``THREE``, losses are within 2e-6, weights and average within
    1e-6 and moments within 1e-5 of those of one process; and when a NaN in the loss, or in the gradient
    alone, of one micro-batch of the last process lets all processes refuse the step and changes no bit.
    """
    folder, options = prepared
    world = RUNS[run][1]
    run_ranks(_train_as_rank, world, run, options, str(folder))
    for rank in range(world):
        bad = json.loads((folder / f"{run}-bad.{rank}.json").read_text())
        assert bad == [["its loss is not finite", True], ["its gradient is not finite", True]], (
            f"NaN on the last process, seen by {rank}"
        )
    for number, (name, case) in enumerate(cases_of(run).items()):
        parts = [
            torch.load(folder / f"{run}-{number}.{rank}.pt", weights_only=False) for rank in range(world)
        ]
        wanted_losses, wanted = alone(name, world, run.endswith("bf16"))
        for losses, _ in parts:
            assert losses == parts[0][0], f"{name}: the processes disagree"
            for one, other in zip(losses, wanted_losses, strict=True):
                assert one == pytest.approx(other, rel=2e-6, abs=1e-7), name
        if case[1].get("freeze_llm") and run.endswith("bf16"):
            words = [value.dtype for _, part in parts for _, of, _, _, value in part if of == WORDS]
            assert words == [torch.bfloat16] * world
        found = together([part for _, part in parts])
        assert found.keys() == wanted.keys(), name
        for key, value in wanted.items():
            scale = float(value.double().norm()) + 1e-9
            error = float((found[key].double() - value.double()).norm()) / scale
            limit = 1e-6 if key[0] in ("weight", "average") else 1e-5
            assert error <= limit or scale < 1e-6, (name, key, error, scale)
