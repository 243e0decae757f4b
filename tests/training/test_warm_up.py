"""What memory training takes: the warm-up batch goes as far as a step does, and autocast keeps no copy of a
weight."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from counting import Held
from kills import become_rank
from processes import run_ranks
from safetensors.torch import load_file, save_file
from tiny import built, step_of, take_warm_up, text, train, write_jsonl

from unigen.config import Config, UserError
from unigen.messages import in_language
from unigen.model.weights import load_bagel, nonfinite
from unigen.training import warm_up as passes
from unigen.training.guards import TrainingStopped
from unigen.training.loop import TrainingLoop
from unigen.training.preflight import doubts

# ---- the warm-up batch


def gradients_held(trainer: TrainingLoop) -> int:
    """Elements of gradients that lie in memory, in whatever way the engine keeps them between
    micro-batches."""
    grads = [p.grad for p in trainer.run.model.parameters() if p.grad is not None]
    if trainer.engine.name == "deepspeed":
        zero = trainer.engine._zero  # type: ignore[attr-defined]
        grads += [g for group in zero.averaged_gradients.values() for g in group or () if g is not None]
        grads += [
            g
            for group in getattr(zero, "all_grad_tensors", {}).values()
            for g in group or ()
            if g is not None
        ]
    return sum(g.numel() for g in grads)


def warmed_up(trainer: TrainingLoop) -> list[tuple[int, bool, int]]:
    """(tokens, is the forward without gradients before it?, averages held) of every forward of the warm-up
    batch."""
    seen, forward = [], trainer.engine.forward

    def watched(pack: Any) -> Any:
        seen.append(
            (len(pack), gradients_held(trainer) == 0, len(trainer.run.ema.values) if trainer.run.ema else 0)
        )
        return forward(pack)

    trainer.engine.forward = watched  # type: ignore[method-assign]
    before = {shard.name: shard.value.clone() for shard in trainer.engine.shards()}
    take_warm_up(trainer)
    trainer.engine.forward = forward  # type: ignore[method-assign]
    assert gradients_held(trainer) == 0
    assert all(torch.equal(shard.value, before[shard.name]) for shard in trainer.engine.shards())
    return seen


def _warm_up_as_rank(rank: int, world: int, port: int, cases: list[dict[str, Any]], folder: str) -> None:
    become_rank(rank, world, port)
    found = []
    for number, options in enumerate(cases):
        trainer = built(options, output_dir=f"{folder}/{number}")
        found.append(warmed_up(trainer))
        result = step_of(
            trainer, [trainer.run.stream.build_largest()] * trainer.run.rank_slice.micro_batches, 1e-3
        )
        assert result.grad_norm > 0 and not result.refused
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


TOGETHER = {"single": 1, "ddp fsdp2": 2, "deepspeed-1 deepspeed-2 deepspeed-3": 2}  # engines -> processes


@pytest.mark.slow
@pytest.mark.parametrize("engines", TOGETHER)
def test_the_second_micro_batch_runs_while_the_gradients_of_the_first_are_held(
    options: dict[str, Any], tmp_path: Path, engines: str
):
    """Two go where a step has several on a process, however many; one where it has one."""
    if "deepspeed" in engines:
        pytest.importorskip("deepspeed")
    cases = []
    for engine in engines.split():
        name, _, stage = engine.partition("-")
        more: dict[str, Any] = {"engine": name, "ema": 0.5}
        if stage:
            (tmp_path / f"{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": int(stage)}}))
            more["deepspeed_config"] = str(tmp_path / f"{stage}.json")
        cases += [options | more | {"gradient_accumulation_steps": n} for n in (1, 3)]
    (tmp_path / "runs").mkdir()
    run_ranks(_warm_up_as_rank, TOGETHER[engines], cases, str(tmp_path / "runs"))
    for rank in range(TOGETHER[engines]):
        found = json.loads((tmp_path / "runs" / f"{rank}.json").read_text())
        for one, several in zip(found[::2], found[1::2], strict=True):
            ((tokens, first, averages),) = one
            assert tokens > 50 and first and averages > 10
            assert several == [[tokens, True, averages], [tokens, False, averages]]


def test_memory_that_runs_out_in_the_second_micro_batch_is_told_with_its_number(options: dict[str, Any]):
    trainer = built(options, gradient_accumulation_steps=2)
    forward, calls = trainer.engine.forward, []

    def full(pack: Any) -> Any:
        calls.append(pack)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return forward(pack)

    trainer.engine.forward = full  # type: ignore[method-assign]
    with pytest.raises(
        TrainingStopped, match=r"micro-batch 2 of a step.*Tried to allocate 2 GiB.*--gradient_checkpointing"
    ):
        take_warm_up(trainer)


@pytest.mark.parametrize(("optimizer", "nbytes"), [("adamw", 4), ("adamw8bit", 1)])
def test_a_gpu_s_memory_for_the_moments_is_held_until_the_optimiser_has_them(optimizer: str, nbytes: int):
    values = [torch.ones(5), torch.ones(3)]
    shards = [
        SimpleNamespace(value=value, trains=trains)
        for value, trains in zip(values, (True, False), strict=True)
    ]

    def place(device: str, state: dict[str, Any]) -> int:
        engine: Any = SimpleNamespace(
            device=torch.device(device),
            optimizer=SimpleNamespace(state=state),
            config=Config(optimizer=optimizer),
            shards=lambda: shards,
        )
        return sum(t.nbytes for t in passes._moments_to_come(engine))

    assert place("cuda", {}) == 2 * 5 * nbytes
    assert place("cuda", {"w": {}}) == 0, "a resumed run has them"
    assert place("cpu", {}) == 0


@pytest.mark.gpu
def test_both_peaks_are_told_and_the_second_is_the_higher(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    trainer = built(options, device="cuda", gradient_accumulation_steps=2)
    peaks, restart = [], passes._restart_peak
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(passes, "_restart_peak", lambda device: peaks.append(restart(device)) or peaks[-1])
        take_warm_up(trainer)
    assert len(peaks) == 3 and 0 < peaks[1] < peaks[2]
    assert [line.count("GiB") for line in caplog.messages if "Warm-up batch" in line] == [2]


# ---- autocast


def living_after(trainer: TrainingLoop, sampling: bool) -> int:
    """Bytes of bfloat16 alive when the forward of a row ends, before its autocast does."""
    engine, living, found = trainer.engine, Held(torch.bfloat16), []
    model = engine.wrapped

    def counted(pack: Any) -> Any:
        with living:
            output = model(pack)
        gc.collect()
        found.append(living.nbytes())
        return output

    pack = trainer.run.stream.build_largest().pack
    if sampling:
        with engine.autocast():
            counted(pack)
    else:
        engine.wrapped = counted  # type: ignore[assignment]
        engine.forward(pack)
        engine.wrapped = model
    return found[0]


@pytest.mark.slow
def test_the_training_forward_keeps_no_lowered_copy_of_a_weight_and_sampling_does(options: dict[str, Any]):
    """With recomputed activations next to nothing in bfloat16 is left; with the cache that sampling has,
    every trained matrix is."""
    trainer = built(options, precision="bf16", gradient_checkpointing=True)
    matrices = sum(
        2 * p.numel()
        for name, p in trainer.run.model.named_parameters()
        if p.ndim == 2 and p.requires_grad and "embed" not in name
    )
    assert living_after(trainer, sampling=True) > 0.9 * matrices
    assert living_after(trainer, sampling=False) < 0.25 * matrices


# ---- what the numbers of the warm-up batch promise


TEXTS = [text("What is two and two?", "Four."), text("Say it twice.", "It. It.")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"freeze_und": True}, "freeze_und is on"),
        ({"freeze_llm": True}, "freeze_llm is on"),
        ({"text_loss_weight": 0.0}, "text_loss_weight is 0"),
    ],
)
def test_options_and_data_that_leave_nothing_to_learn(
    options: dict[str, Any], tmp_path: Path, how: dict[str, Any], named: str
):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    with pytest.raises(TrainingStopped, match=rf"nothing to learn.*texts.*{named}.*Fix: "):
        train(options, how, train_data_path=str(texts))
    assert not (Path(options["output_dir"]) / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_warm_up_batch_without_gradient_is_fine_where_other_records_have_one(
    options: dict[str, Any], records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The largest record is a text, so that nothing of the generation expert learns from it."""
    long = text("What?", " ".join(["word"] * 400))
    drawn = {"text_prompt": "A red house", "image_path": str(records.parent / "0.png")}
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [long, *TEXTS, drawn])
    options |= {"train_data_path": str(mixed), "max_steps": 1}
    with caplog.at_level("INFO"):
        train(options, freeze_und=True)
        assert "nothing to learn" not in caplog.text
        train(options, output_dir=str(tmp_path / "all"))
    assert "No gradient in the warm-up batch: " in caplog.text and "generation expert" in caplog.text


# ---- preflight: are these the weights that they should be?


def said_of(
    text: float | None, image: float | None, large: bool = False, **options: Any
) -> list[tuple[str, bool]]:
    return list(doubts(Config(**options), 152_064, large, text, image))


BAND: dict[str, Any] = {"expect_text_loss": (0.1, 4.0), "expect_image_loss": (0.1, 1.2)}


def test_losses_of_a_model_that_knows_nothing_are_grave_where_it_should_know():
    assert not said_of(1.0, 0.4, **BAND) and not said_of(1.0, 0.4, large=True)
    ((problem, grave),) = said_of(11.9, None, large=True)
    assert grave and "knows no text" in problem and "11.93" in problem and "Fix: " in problem
    ((_, grave),) = said_of(11.9, None)
    assert not grave, "a small model may begin with random weights"
    text, image = said_of(11.9, 2.0, **BAND)
    assert text[1] and image[1] and "latents are not those" in image[0]
    ((problem, grave),) = said_of(6.0, 0.4, **BAND)
    assert grave and "expect_text_loss 0.1 to 4" in problem
    assert not said_of(6.0, 2.0, large=True), "without a band only chance itself is grave"


@pytest.mark.slow
def test_a_run_stops_at_losses_outside_of_its_band_and_goes_on_with_the_flag(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    with pytest.raises(TrainingStopped, match=r"first image loss is .*Fix: .*--preflight warn"):
        train(options, expect_image_loss=(0.1, 0.2))
    assert not (Path(options["output_dir"]) / "metrics.jsonl").exists()
    with caplog.at_level("INFO"):
        more = {"expect_image_loss": (0.1, 0.2), "preflight": "warn"}
        assert train(options, more)
    assert (
        "Preflight: " in caplog.text and "expect_image_loss" in caplog.text
    ) or "cannot draw" in caplog.text
    more = {"expect_image_loss": (0.1, 0.2), "resume_from_checkpoint": "auto", "max_steps": 3}
    assert train(options, more), "a run that goes on has other losses"


@pytest.mark.slow
def test_the_demo_s_and_other_random_weights_train_and_are_told(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    texts = write_jsonl(tmp_path / "texts.jsonl", [text("What?", " ".join(["word"] * 60))])
    with caplog.at_level("INFO"):
        assert train(options, train_data_path=str(texts))
    assert "right where it trains from random weights" in caplog.text


@pytest.mark.slow
def test_the_validation_at_step_0_is_held_against_the_band_too_and_both_are_one_diagnosis(
    options: dict[str, Any], records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Training data without pictures to draw says nothing of them; the validation data does."""
    texts = write_jsonl(tmp_path / "texts.jsonl", [text("What?", " ".join(["word"] * 60))])
    given = options | {"train_data_path": str(texts), "val_data_path": str(records), "max_steps": 1}
    given |= {"expect_image_loss": (0.1, 0.2), "expect_text_loss": (0.1, 4.0)}
    only_image = given | {"expect_text_loss": (0.1, 99.0)}
    with pytest.raises(TrainingStopped, match=r"step-0 validation image loss is .*--preflight warn"):
        train(only_image)
    assert not list(Path(options["output_dir"]).glob("step_*"))
    with caplog.at_level("WARNING"):
        train(given, preflight="warn", output_dir=str(tmp_path / "warned"))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    found = [line for line in warnings if "text loss is" in line or "image loss is" in line]
    assert len(found) == 2 and "the first text loss" in found[0] and "step-0 validation image" in found[1]


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"config.json": {"latent_patch_size": 1}}, r"latent_patch_size is 1.*vae2llm"),
        ({"config.json": {"latent_patch_size": 4}}, r"latent_patch_size is 4.*vae2llm"),
        ({"vae_config.json": {"z_channels": 8}}, r"z_channels is 8.*vae2llm"),
        ({"vae_config.json": {"downsample": 16}}, r"downsample is 16"),
        (
            # 64 numbers a token as before, but of other latents
            {"config.json": {"latent_patch_size": 1}, "vae_config.json": {"z_channels": 64}},
            r"z_channels is 64.*decoder\.conv_in",
        ),
    ],
)
def test_latents_of_another_size_than_the_weights_end_a_run_before_anything_is_made(
    options: dict[str, Any], tmp_path: Path, edits: dict[str, dict[str, Any]], named: str
):
    folder = tmp_path / "model"
    shutil.copytree(options["model_path"], folder)
    for name, values in edits.items():
        said = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(said))
    with pytest.raises(UserError, match=rf"{named}.*Fix: "):
        train(options, model_path=str(folder))
    assert not (Path(options["output_dir"]) / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_tensor_that_trains_and_that_no_loss_depends_on_stops_the_run(options: dict[str, Any]):
    trainer = built(options)
    lost = torch.nn.Parameter(torch.ones(3))
    trainer.engine._optimised["connector.lost.weight"] = lost
    with pytest.raises(TrainingStopped, match=r"1 tensors are to be trained.*connector\.lost\.weight.*Fix: "):
        take_warm_up(trainer)


def test_tensors_without_gradient_are_named_but_for_the_a_of_adapters():
    found = {
        "language_model.model.layers.0.mlp.up_proj.lora_A.default.weight": False,
        "language_model.model.layers.0.mlp.up_proj.lora_B.default.weight": True,
        "connector.fc1.weight": True, "connector.fc2.weight": False, "vit_model.x.weight": False,
    }  # fmt: skip
    still = passes._without_gradient(found)
    assert still[0] == "vit_model" and len(still) == 2 and "connector.fc2.weight" in still[1]


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["nothing", "pictures", "nothing, and llm2vae has moved"])
def test_a_zero_gradient_has_its_true_reason(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, lacks: str
):
    """The output layer of a new model is zero, and so is the gradient of what it alone leads to."""
    if lacks == "pictures":
        options |= {"train_data_path": str(write_jsonl(tmp_path / "texts.jsonl", TEXTS))}
    trainer = built(options)
    weight = trainer.run.model.llm2vae.weight.data
    weight.fill_(0.1) if "moved" in lacks else weight.zero_()
    with caplog.at_level("INFO"):
        take_warm_up(trainer)
    told = [line for line in caplog.messages if line.startswith("No gradient in the warm-up batch: ")]
    assert not any(re.search(r"llm2vae starts|nothing in it", in_language(line, "zh")) for line in told)
    if lacks == "pictures":
        assert "(nothing in it is to be drawn; nothing in it is to be seen)" in told[0]
    elif lacks == "nothing":
        assert "generation expert" in told[0] and "llm2vae starts at zero" in told[0]
        assert "nothing in it" not in told[0]
    else:
        assert not any("llm2vae starts" in line or "generation expert" in line for line in told)


def test_what_trains_is_told_with_its_rates(options: dict[str, Any], caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        built(options, learning_rate_vit=5e-5)
    (line,) = [line for line in caplog.messages if line.startswith("Model: ")]
    assert re.search(r"vit_model [\d,]+ at 5e-05", line) and re.search(r"generation expert [\d,]+ at ", line)


def test_weights_that_are_not_finite_are_named_before_training_and_by_who_asks(
    options: dict[str, Any], small_model: Path, tmp_path: Path
):
    shutil.copytree(small_model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "ema.safetensors")
    tensors["connector.fc1.bias"][0] = float("nan")
    tensors["language_model.lm_head.weight"][3, 2] = float("inf")
    save_file(tensors, tmp_path / "model" / "ema.safetensors")
    told = r"model: 2 tensors .*(connector\.fc1\.bias.*lm_head|lm_head.*connector\.fc1\.bias).*Fix: "
    with pytest.raises(UserError, match=told):
        train(options, model_path=str(tmp_path / "model"))
    with pytest.raises(UserError, match=told):
        load_bagel(tmp_path / "model")


def test_finite_numbers_whose_sum_is_not_are_finite():
    huge = torch.full((4,), torch.finfo(torch.float32).max)
    assert nonfinite(
        [("huge", huge), ("none", torch.empty(0)), ("nan", torch.tensor([1.0, float("nan")]))]
    ) == ["nan"]


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_made(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    for name in ("wandb_project", "trackio_project"):
        with pytest.raises(UserError, match=r"not installed\. Fix: pip install"):
            train(options, {name: "p"})
    assert not Path(options["output_dir"]).exists()
