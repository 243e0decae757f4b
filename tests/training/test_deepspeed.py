"""DeepSpeed's ZeRO 1, 2 and 3 train to the weights of one process, lose nothing, and take an ordinary JSON or
say what is wrong with it.

Two and three processes are started once each and train all cases of all stages.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from test_engines import THREE, TWO, held, options_for, options_of, together, train
from tiny import batch_of, built, take_warm_up

from unigen.config import Config, UserError
from unigen.training.deepspeed import DeepSpeed
from unigen.training.deepspeed_json import DeepSpeedSettings, loss_scale, read_settings
from unigen.training.loop import TrainingLoop
from unigen.training.precision import DeviceFacts, choose_precision
from unigen.training.step import Counts, joint_loss, loss_sums

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("zero")]  # its processes are started once

# Small pieces: buckets of a few thousand elements, groups that are cut, every parameter gathered when it is
# needed.
CUT = {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000}
ZERO: dict[str, dict[str, Any]] = {
    "1": {"stage": 1},
    "1, padded": {"stage": 1, "parameter_alignment": True, **CUT},
    "2": {"stage": 2, "overlap_comm": True, **CUT},
    "2, offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 20000,
    "reduce_bucket_size": 30000},
    "3, small ones whole": {"stage": 3},
    "3, offloaded": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}  # fmt: skip

# (processes, ZeRO, case); micro-batches of which one process has fewer stand in the second step of STATES
EMPTY, FROZEN = "nothing on one", "vision frozen, checkpointing"
RUNS = [
    (2, "1", "mixed"), (2, "1", EMPTY),
    (2, "2", "text on one, images on the other"), (2, "2", "understanding frozen"), (2, "2", "clipped"),
    (2, "3", FROZEN), (2, "3, small ones whole", EMPTY), (2, "3, offloaded", "clipped"),
    (3, "1, padded", "micro-batches"), (3, "2", "text, images, nothing"), (3, "3", "micro-batches"),
]  # fmt: skip
STATES = ["1", "2", "2, offloaded", "3"]
# the rows of each process in two steps: [rank][micro-batch][records]
FIRST, SECOND = [[[0, 1]], [[3]]], [[[5], [6]], [[2], []]]


def trainer_of(
    zero: str, case: tuple[Any, dict[str, Any]], options: dict[str, Any], folder: Path, name: str, **more: Any
) -> TrainingLoop:
    file = folder / f"{name}.{os.environ['RANK']}.ds.json"
    file.write_text(
        json.dumps(
            {"zero_optimization": ZERO[zero], "train_batch_size": "auto", "bf16": {"enabled": "auto"}} | more
        )
    )
    given = options_of(case, options, {"engine": "deepspeed", "deepspeed_config": str(file)})
    return built(given, output_dir=str(folder / f"run {name}"))


def file_of(folder: Path, *parts: object) -> Path:
    return folder / "-".join(str(part).replace(" ", "_").replace(",", "") for part in parts)


def bits(trainer: TrainingLoop) -> dict[tuple[str, str], torch.Tensor]:
    return {(kind, name): value for kind, name, _, _, value in held(trainer)}


def same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def poison(trainer: TrainingLoop, rank: int, records: list[int], whole: bool = True) -> float:
    """Two micro-batches, of which the first makes NaN on rank 1, or only the first; the norm of their
    gradient."""
    engine = trainer.engine
    for last in (False, True)[: 1 + whole]:
        pack = batch_of(trainer, records).pack
        with engine.accumulate(last):
            loss = joint_loss(*loss_sums(engine.forward(pack)), Counts.of([pack]), 1.0, 1.0)
            engine.backward(loss * float("nan") if rank and not last else loss, last)
    return engine.grad_norm() if whole else 0.0


def _state_as_rank(rank: int, zero: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One step, a poisoned one, a second trainer that goes on from the first, and a second step of both."""
    trainer = trainer_of(zero, ([], {"ema": 0.5}), options, folder, f"state {zero}")
    said: dict[str, Any] = {"before": held(trainer)}
    train(trainer, [FIRST], rank, 2)
    before = bits(trainer)
    said["poisoned"] = poison(trainer, rank, [4])
    trainer.engine.discard()
    poison(trainer, rank, [4], whole=False)
    trainer.engine.discard()
    said["discarded"] = same(before, bits(trainer))

    assert trainer.run.ema is not None
    pack = batch_of(trainer, [[0, 5], [1, 3]][rank]).pack  # text on one, pictures on the other
    with torch.no_grad():
        said["loss"] = [float(part) for part in loss_sums(trainer.engine.forward(pack))]
        with trainer.run.ema.swapped(trainer.engine.refresh):
            said["averaged"] = [float(part) for part in loss_sums(trainer.engine.forward(pack))]
        said["back"] = [float(part) for part in loss_sums(trainer.engine.forward(pack))]
        with trainer.engine.whole():  # not the same on both
            said["words"] = trainer.run.model.language_model.model.embed_tokens(torch.arange(5))
            said["whole"] = (
                [float(part) for part in loss_sums(trainer.run.model(pack))] if rank else said["loss"]
            )
        said["tensors"] = {name: value.clone() for name, value in trainer.engine.tensors(trainer.run.model)}
    said["swapped back"] = same(before, bits(trainer))
    said["first"] = held(trainer)

    other = trainer_of(zero, ([], {"ema": 0.5}), options, folder, f"other {zero}")
    said["none yet"] = all(
        other.engine.moments(shard) is None for shard in other.engine.shards() if shard.trains
    )
    for old, new in zip(trainer.engine.shards(), other.engine.shards(), strict=True):
        assert (old.name, old.shape, old.start, len(old.value)) == (
            new.name,
            new.shape,
            new.start,
            len(new.value),
        )
        new.value.copy_(old.value)
        if old.trains and (moments := trainer.engine.moments(old)):
            other.engine.set_moments(new, *moments)
    assert other.run.ema is not None
    other.run.ema.load(lambda shard, out: out.copy_(trainer.run.ema.average(shard.name)))  # type: ignore[union-attr]
    other.engine.refresh()
    said["moved"] = same(bits(trainer), bits(other))
    said["losses"] = [train(each, [SECOND], rank, 2) for each in (trainer, other)]
    said["equal after"] = same(bits(trainer), bits(other))
    said["second"] = held(other)

    for count, shard in enumerate(
        shard for shard in other.engine.shards() if shard.trains and len(shard.value)
    ):
        _, one, two = other.engine.moments(shard)  # type: ignore[misc]
        other.engine.set_moments(shard, 1.0 + count, one, two)
    try:
        other.engine.refresh()
    except UserError as error:
        said["counts"] = str(error)
    return said


def _train_as_rank(rank: int, world: int, port: int, options: dict[str, Any], text: str) -> None:
    folder = Path(text)
    become_rank(rank, world, port)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    for processes, zero, name in RUNS:
        if processes == world:
            case = (TWO if world == 2 else THREE)[name]
            trainer = trainer_of(zero, case, options, folder, f"{world} {zero} {name}")
            take_warm_up(trainer)
            torch.save(
                (train(trainer, case[0], rank, world), held(trainer)),
                file_of(folder, world, zero, name, rank),
            )
    for zero in STATES if world == 2 else []:
        torch.save(_state_as_rank(rank, zero, options, folder), file_of(folder, "state", zero, rank))
    if world == 2:
        _low_precision_as_rank(rank, options, folder)
    assert not (folder / "extensions").exists(), "DeepSpeed compiled something"
    with trainer.engine:
        pass
    assert torch.nn.functional.linear is torch._C._nn.linear and not torch.distributed.is_initialized()
    file_of(folder, "ended", world, rank).touch()


def _low_precision_as_rank(rank: int, options: dict[str, Any], folder: Path) -> None:
    """One step of each stage in bfloat16: by DeepSpeed's own way and, in ZeRO 3, by autocast."""
    for zero, more in (("1", {}), ("2", {}), ("3", {}), ("3", {"torch_autocast": {"enabled": True}})):
        trainer = trainer_of(zero, ([], {"bf16": True}), options, folder, f"bf16 {zero} {len(more)}", **more)
        first, kept = held(trainer), []
        trainer.run.model.register_forward_pre_hook(
            lambda *_, kept=kept: kept.append(torch.is_autocast_cache_enabled())
        )
        torch.save(
            (first, train(trainer, [FIRST], rank, 2), held(trainer)),
            file_of(folder, "bf16", zero, len(more), rank),
        )
        assert kept and not any(kept), "autocast keeps copies of the weights"


@pytest.fixture(scope="module")
def ran(
    small_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    options = options_for(small_model, records)
    folder = tmp_path_factory.mktemp("zero")
    for world in (2, 3):
        run_ranks(_train_as_rank, world, options, str(folder), seconds=250)
        assert all(file_of(folder, "ended", world, rank).exists() for rank in range(world))
    return folder, options


@pytest.fixture(scope="module")
def alone(ran: tuple[Path, dict[str, Any]]) -> Any:
    """What one process makes of all processes' rows: losses and what it holds, by case."""
    folder, options = ran
    known: dict[str, Any] = {}

    def run(
        name: str, case: tuple[Any, dict[str, Any]], more: dict[str, Any] | None = None
    ) -> tuple[Any, Any, Any]:
        if name not in known:
            given = options_of(
                case,
                options,
                {"engine": "single", "output_dir": str(folder / f"alone {name}")} | (more or {}),
            )
            trainer = built(given)
            first = together([held(trainer)])
            known[name] = (first, train(trainer, case[0], None, 1), together([held(trainer)]))
        return known[name]

    return run


def assert_within(found: dict[Any, torch.Tensor], wanted: dict[Any, torch.Tensor]) -> None:
    """Weights and average within 1e-6 of their norm; moments within 1e-5, those that are zero but for
    rounding measured against all."""
    assert found.keys() == wanted.keys()
    for kind in ("weight", "average", "exp_avg", "exp_avg_sq"):
        keys = [key for key in wanted if key[0] == kind]
        total = sum(float(wanted[key].double().square().sum()) for key in keys) ** 0.5
        limit, floor = (1e-6, 0.0) if kind in ("weight", "average") else (1e-5, 1e-7 * total)
        for key in keys:
            scale, error = (
                float(wanted[key].double().norm()),
                float((found[key].double() - wanted[key].double()).norm()),
            )
            assert error <= limit * scale + floor, (key, error, scale, total)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero", "name"), RUNS)
def test_zero_trains_to_the_weights_of_one_process_within_1e_6(
    ran: Any, alone: Any, world: int, zero: str, name: str
):
    """Passes when losses, weights, average and moments are those of one process, as for the other engines,
    and the same tensors moved."""
    parts = [
        torch.load(file_of(ran[0], world, zero, name, rank), weights_only=False) for rank in range(world)
    ]
    case = (TWO if world == 2 else THREE)[name]
    first, wanted_losses, wanted = alone(f"{world} {name}", case)
    for losses, _ in parts:
        assert losses == parts[0][0], "the processes disagree"
        for one, other in zip(losses, wanted_losses, strict=True):
            assert one == pytest.approx(other, rel=2e-6, abs=1e-7)
    found = together([part for _, part in parts])
    assert_within(found, wanted)
    # The bias of the ViT's keys adds the same to all scores of a query: it moves by rounding, or not at all.
    steady = [key for key in first if not (key[1].startswith("vit_model") and key[1].endswith("k_proj.bias"))]
    moved, wanted_moved = (
        [key for key in steady if not torch.equal(first[key], after[key])] for after in (found, wanted)
    )
    assert len(moved) > 10 and moved == wanted_moved


@pytest.mark.parametrize("zero", STATES)
def test_a_poisoned_step_changes_no_bit_and_leaves_nothing_to_the_next(ran: Any, alone: Any, zero: str):
    """Passes when a NaN of one micro-batch of one process is seen by both, nothing held changes, and the next
    step is as without it."""
    parts = [torch.load(file_of(ran[0], "state", zero, rank), weights_only=False) for rank in range(2)]
    for said in parts:
        assert said["poisoned"] != said["poisoned"]  # NaN on both processes, made on one
        assert said["discarded"]
    _, losses, wanted = alone("state", ([FIRST, SECOND], {"ema": 0.5}))
    assert_within(together([said["second"] for said in parts]), wanted)
    for said in parts:
        for found in said["losses"]:
            assert found[0] == pytest.approx(losses[1], rel=2e-6)


@pytest.mark.parametrize("zero", STATES)
def test_moments_and_weights_move_to_another_engine_that_goes_on_to_the_same_bits(ran: Any, zero: str):
    for rank in range(2):
        said = torch.load(file_of(ran[0], "state", zero, rank), weights_only=False)
        assert said["none yet"] and said["moved"] and said["equal after"]
        assert said["losses"][0] == said["losses"][1]
        assert "different numbers of updates" in said["counts"] and "--engine fsdp2" in said["counts"]


@pytest.mark.parametrize("zero", STATES)
def test_written_shards_are_what_the_model_computes_with(ran: Any, zero: str):
    parts = [torch.load(file_of(ran[0], "state", zero, rank), weights_only=False) for rank in range(2)]
    whole = together([said["first"] for said in parts])
    for said in parts:
        assert (
            said["averaged"] != said["loss"]
            and said["back"] == said["whole"] == said["loss"]
            and said["swapped back"]
        )
        weights = {name: value for (kind, name), value in whole.items() if kind == "weight"}
        assert weights.keys() == said["tensors"].keys()
        assert all(torch.equal(weights[name], value.flatten()) for name, value in said["tensors"].items())
        words = weights["language_model.model.embed_tokens.weight"].view(
            said["tensors"]["language_model.model.embed_tokens.weight"].shape
        )
        assert torch.equal(said["words"], words[:5])


def test_in_bfloat16_weights_begin_as_stored_and_are_updated_in_float32(ran: Any, alone: Any):
    first, _, wanted = alone("bf16", ([FIRST], {}), {"bf16": True})
    for zero, more in (("1", 0), ("2", 0), ("3", 0), ("3", 1)):
        parts = [
            torch.load(file_of(ran[0], "bf16", zero, more, rank), weights_only=False) for rank in range(2)
        ]
        begun, found = together([part[0] for part in parts]), together([part[2] for part in parts])
        for key, value in first.items():
            if key in wanted and not torch.equal(wanted[key], value):  # what trains
                assert torch.equal(begun[key], value), (zero, key)
                step = (found[key] - wanted[key]).norm() / (wanted[key] - value).norm()
                assert float(step) < 0.5 or (value.ndim == 1 and len(value) < 200), (zero, key, float(step))


# ---- the JSON


def settings(tmp_path: Path, content: Any, world: int = 2, **options: Any) -> DeepSpeedSettings:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    config = Config(engine="deepspeed", deepspeed_config=str(file), **options)
    device = options.get("device", "cpu")
    return read_settings(
        config, world, torch.device(device), choose_precision(config, DeviceFacts(device)).name
    )


def test_what_a_json_leaves_open_comes_from_the_options(tmp_path: Path):
    """The file most people have: everything "auto"."""
    everything = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_max_live_parameters": 1e9,
            "overlap_comm": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "communication_data_type": "fp32",
        "steps_per_print": 100,
    }
    found = settings(tmp_path, everything, bf16=True, gradient_accumulation_steps=4)
    assert (found.stage, found.held_dtype, found.offloads_optimizer) == (3, torch.bfloat16, False)
    assert found.values["zero_optimization"] == {
        "stage": 3,
        "stage3_max_live_parameters": 1e9,
        "overlap_comm": True,
    }
    assert found.values["communication_data_type"] == "fp32" and found.values["steps_per_print"] == 100
    assert found.values["train_batch_size"] == 2 * found.values["gradient_accumulation_steps"] == 8
    assert found.values["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "optimizer" not in found.values and "auto" not in json.dumps(found.values)
    agreed = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 12,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
    }
    assert (
        settings(
            tmp_path, agreed, world=3, batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.5
        ).held_dtype
        is None
    )
    assert read_settings(Config(engine="deepspeed"), 1, torch.device("cpu"), "fp32").stage == 2


BAD = {
    "no JSON": ("{", {}, r"ds\.json:1: no JSON"),
    "no object": ("[]", {}, "is an object"),
    "twice": ('{"bf16": {}, "bf16": {}}', {}, "bf16 is there twice"),
    "misspelt": ({"zero_optimisation": {"stage": 2}}, {}, "did you mean zero_optimization"),
    "no stage": ({"bf16": {"enabled": False}}, {}, r"zero_optimization\.stage is null.*--engine ddp"),
    "stage 0": ({"zero_optimization": {"stage": 0}}, {}, r"zero_optimization\.stage is 0.*--engine ddp"),
    "stage 4": ({"zero_optimization": {"stage": 4}}, {}, r"zero_optimization\.stage is 4"),
    "no ZeRO": ({"zero_optimization": 2}, {}, "zero_optimization is no object"),
    "batch": ({"train_batch_size": 7}, {},
    r"train_batch_size is 7, but --batch_size 1 x .* x 2 process\(es\) says 2"),
    "micro-batch": ({"train_micro_batch_size_per_gpu": 4}, {},
    "train_micro_batch_size_per_gpu is 4, but --batch_size says 1"),
    "accumulation": ({"gradient_accumulation_steps": 4}, {}, "gradient_accumulation_steps is 4, but"),
    "clipping": ({"gradient_clipping": 0.5}, {}, r"gradient_clipping is 0\.5, but --max_grad_norm says 1\.0"),
    "optimiser": ({"optimizer": {"type": "Lamb"}}, {}, r'optimizer\.type is "Lamb"'),
    "rate": ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, {},
    r"optimizer\.params\.lr is 0\.0003, but --learning_rate"),
    "betas": ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, {},
    r"optimizer\.params\.betas is \[0\.9, 0\.999\]"),
    "amsgrad": ({"optimizer": {"params": {"amsgrad": True}}}, {},
    r"optimizer\.params\.amsgrad is not an option"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, {},
    "scheduler cannot be used here.*--lr_scheduler_type"),
    "bf16": ({"bf16": {"enabled": True}}, {},
    r"bf16\.enabled is true, but the precision, fp32 \(--precision\), says false"),
    "fp16 on a CPU": ({}, {"fp16": True}, r"fp16\.enabled is true, which DeepSpeed cannot do on a CPU"),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, {"bf16": True},
    "computes in fp16, but the run in bf16"),
    "both": ({"torch_autocast": {"enabled": True}, "bf16": {"enabled": True}}, {"bf16": True},
    "exclude each other"),
    "nvme": ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, {},
    r'offload_optimizer\.device is "nvme"'),
    "compiled": ({"zero_force_ds_cpu_optimizer": True}, {}, "it compiles DeepSpeedCPUAdam"),
    "quantised": ({"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}}, {},
    "nontrainable_weights cannot be"),
    "low masters": ({"bf16": {"bf16_master_weights_and_grads": True}}, {"bf16": True},
    "bf16_master_weights_and_grads cannot be"),
    "sums of ZeRO 1": (
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, {"bf16": True},
        "ZeRO 1 does by another optimiser",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_json_that_cannot_work_is_an_error_that_names_file_key_and_cure(tmp_path: Path, case: str):
    content, options, message = BAD[case]
    if isinstance(content, dict) and "stage" not in case and "zero_optimisation" not in content:
        content = {"zero_optimization": {"stage": 2}} | content
    with pytest.raises(UserError, match=message) as caught:
        settings(tmp_path, content, **options)
    assert str(tmp_path / "ds.json") in str(caught.value) and "--deepspeed_config" in str(caught.value)


def test_what_asks_for_nothing_is_no_error(tmp_path: Path):
    off = {
        "amp": {"enabled": False},
        "scheduler": None,
        "sequence_parallel_size": 1,
        "zero_force_ds_cpu_optimizer": False,
    }
    found = settings(
        tmp_path, {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}} | off
    )
    assert (
        not found.offloads_optimizer
        and not {"amp", "scheduler", "sequence_parallel_size"} & found.values.keys()
    )


def test_the_scale_of_float16_losses_is_that_of_the_json(tmp_path: Path):
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 5, "hysteresis": 2}
    found = settings(tmp_path, {"zero_optimization": {"stage": 2}, "fp16": fp16}, fp16=True, device="cuda")
    scale = loss_scale(found)
    assert (scale.scale, scale.INTERVAL, scale.enabled) == (256.0, 5, True) and found.values["fp16"][
        "loss_scale"
    ] == 1.0
    fp16["loss_scale"] = 64
    fixed = loss_scale(
        settings(tmp_path, {"zero_optimization": {"stage": 2}, "fp16": fp16}, fp16=True, device="cuda")
    )
    fixed.update(overflow=True)
    assert fixed.scale == 64.0


def test_without_the_package_the_error_has_the_pip_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    try:
        with pytest.raises(UserError, match=r"--engine deepspeed needs DeepSpeed.*pip install"):
            DeepSpeed(Config(engine="deepspeed", device="cpu"))
    finally:
        torch.distributed.destroy_process_group()
