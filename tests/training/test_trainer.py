"""The trainer as its user meets it: real runs on a tiny checkpoint."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import timeless
from processes import flags, start_command, wait_for
from safetensors.torch import load_file, save_file
from tiny import (
    assert_same_checkpoint,
    batch_of,
    built,
    draw_picture,
    metrics,
    read_jsonl,
    take_warm_up,
    text,
    train,
    train_on,
    write_jsonl,
)

from unigen.config import Config, UserError
from unigen.data.dataset import BadData
from unigen.model.weights import load_bagel
from unigen.runs.checkpoint import read_states, verify_checkpoint
from unigen.training.build import idle_processes, whole_epoch
from unigen.training.guards import TrainingStopped
from unigen.training.optim import learning_rate_at

ROOT = Path(__file__).parents[2]


def raw(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a file (NaN equals NaN)."""
    return {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in load_file(path).items()}


# ---- a run


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_one_that_is_not(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    torch._dynamo.reset()
    runs = {}
    for compile in ("off", "on"):
        run = tmp_path / compile
        train(options, output_dir=str(run), compile=compile, gradient_accumulation_steps=2)
        runs[compile] = [line["loss"] for line in metrics(run)]
        assert read_states(run / "step_2")["training_config"]["compile"] == compile
    assert runs["on"] == pytest.approx(runs["off"], rel=1e-5)
    caplog.clear()
    train(options, output_dir=str(tmp_path / "on"), resume_from_checkpoint="auto", max_steps=3, compile="off")
    assert "--compile on" in caplog.text


@pytest.mark.slow
def test_a_run_logs_every_step_and_saves_what_the_model_loader_reads(
    options: dict[str, Any], small_model: Path
):
    last = train(options, batch_size=3, max_num_tokens=None)
    run = Path(options["output_dir"])
    first, second = metrics(run)
    names = {
        "step",
        "loss",
        "text_loss",
        "image_loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "text_tokens",
        "image_tokens",
    }
    names |= {"time", "tokens_per_second", "data_wait"}
    assert first.keys() == second.keys() == names
    assert (first["epoch"], second["epoch"]) == (3 / 7, 6 / 7)
    assert 0 <= first["data_wait"] <= 1 and first["tokens_per_second"] > 0
    assert last["loss"] == second["loss"] == second["text_loss"] + second["image_loss"]
    before, after = load_bagel(small_model).state_dict(), load_bagel(run / "step_2").state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    frozen = {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}
    assert changed == before.keys() - frozen
    assert json.loads((run / "step_2" / "training_config.json").read_text())["batch_size"] == 3


@pytest.mark.slow
def test_the_loss_falls_on_one_record(options: dict[str, Any], records: Path, tmp_path: Path):
    for name in ("0.png", "1.png", "2.png"):
        shutil.copy(records.parent / name, tmp_path)
    one = tmp_path / "one.jsonl"
    one.write_text(records.read_text().splitlines()[4] + "\n")
    train(options, train_data_path=str(one), max_steps=15, learning_rate=3e-3, lr_scheduler_type="constant")
    losses = [line["loss"] for line in metrics(options["output_dir"])]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"num_epochs": 2}, 14),
        ({"num_epochs": 2, "batch_size": 2}, 8),
        ({"num_epochs": 3, "gradient_accumulation_steps": 4}, 6),
        ({"num_epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 3}, 4),
        ({"max_steps": 5, "num_epochs": 1}, 5),
    ],
)
def test_how_many_steps_a_run_has(options: dict[str, Any], given: dict[str, int], steps: int):
    """Seven records; an epoch ends with whatever is left."""
    assert built(options, {"max_steps": None}, given).run.total_steps == steps


@pytest.mark.slow
def test_the_learning_rate_follows_the_schedule_over_optimiser_steps(options: dict[str, Any]):
    options |= {
        "max_steps": None,
        "num_epochs": 2,
        "gradient_accumulation_steps": 2,
        "warmup_ratio": 0.25,
        "lr_scheduler_type": "linear",
    }
    train(options)
    assert [line["learning_rate"] for line in metrics(options["output_dir"])] == [
        learning_rate_at(i, 8, Config(**options)) for i in range(8)
    ]
    assert [round(line["learning_rate"] * 1e3, 6) for line in metrics(options["output_dir"])][:4] == [
        0.5,
        1.0,
        1.0,
        0.833333,
    ]


@pytest.mark.slow
def test_num_workers_change_nothing(options: dict[str, Any], tmp_path: Path):
    """Passes when log and checkpoint are the same with 0, 2 and 4 data workers."""
    train(options, gradient_accumulation_steps=2)
    for workers in (2, 4):
        folder = tmp_path / f"workers-{workers}"
        train(options, gradient_accumulation_steps=2, num_workers=workers, output_dir=str(folder))
        assert timeless(folder) == timeless(options["output_dir"])
        assert_same_checkpoint(folder / "step_2", Path(options["output_dir"]) / "step_2")


@pytest.mark.slow
def test_an_epoch_has_the_same_loss_whatever_the_accumulation_with_a_partial_last_window(
    options: dict[str, Any], tmp_path: Path
):
    """Seven rows in steps of 1, 2, 4, 8: targets and summed losses of the epoch are the same, and the last
    step takes what is left."""
    options |= {"num_epochs": 1, "max_steps": None, "learning_rate": 0.0}
    seen = []
    for rows in (1, 2, 4, 8):
        train(options, gradient_accumulation_steps=rows, output_dir=str(tmp_path / str(rows)))
        logged = metrics(tmp_path / str(rows))
        assert len(logged) == -(-7 // rows) and logged[-1]["epoch"] == 1.0
        tokens = [sum(line[f"{kind}_tokens"] for line in logged) for kind in ("text", "image")]
        sums = [
            sum(line.get(f"{kind}_loss", 0.0) * line[f"{kind}_tokens"] for line in logged)
            for kind in ("text", "image")
        ]
        seen.append((tokens, sums))
    for tokens, sums in seen[1:]:
        assert tokens == seen[0][0] and sums == pytest.approx(seen[0][1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(options: dict[str, Any], tmp_path: Path, precision: str):
    """Two steps, finite, near those of float32; the weights stay float32; and the scale of fp16 comes back on
    resume."""
    train(options)
    half = options | {"output_dir": str(tmp_path / "half"), "save_steps": 1, precision: True}
    train(half)
    for found, wanted in zip(metrics(tmp_path / "half"), metrics(options["output_dir"]), strict=True):
        assert found["loss"] != wanted["loss"] and found["loss"] == pytest.approx(wanted["loss"], rel=0.05)
    saved = load_file(tmp_path / "half" / "step_2" / "ema.safetensors")
    assert all(t.dtype == torch.float32 for t in saved.values())
    scale = read_states(tmp_path / "half" / "step_1")["trainer"]["scale"]
    assert scale["scale"] in ((2.0**15, 2.0**16) if precision == "fp16" else (1.0,))
    train(
        half, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(tmp_path / "half" / "step_1")
    )
    assert_same_checkpoint(tmp_path / "resumed" / "step_2", tmp_path / "half" / "step_2")


# ---- stop and go on


@pytest.fixture(scope="module", params=[None, 0.9], ids=["", "ema"])
def whole_run(
    request: pytest.FixtureRequest, small_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Twelve steps of two rows over seven records: three epochs, whose last steps have one row. Every step is
    saved."""
    options = {
        "model_path": str(small_model), "train_data_path": str(records), "val_data_path": str(records),
        "max_steps": 12, "eval_steps": 4, "eval_samples": 0,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1,
        "save_steps": 1, "device": "cpu", "num_workers": 0,
        "output_dir": str(tmp_path_factory.mktemp("whole")), "ema": request.param,
    }  # fmt: skip
    train(options)
    return options


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 3, 4, 7, 8, 11])
def test_resuming_at_any_step_gives_the_same_bits(whole_run: dict[str, Any], tmp_path: Path, stopped: int):
    """Passes when a run resumed after the first step, in the middle of an epoch, at its end, at a validation and
    before the last step, with data workers or without, has the same log, and the same weights, average, moments and place in every later checkpoint, as the run that was
    not stopped.
    """
    if not whole_run["ema"] and stopped not in (3, 4):
        pytest.skip(
            "without an average there is less to go wrong: in an epoch, at a validation between epochs"
        )
    whole = Path(whole_run["output_dir"])
    shutil.copytree(whole / f"step_{stopped}", tmp_path / f"step_{stopped}")
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    torch.manual_seed(stopped)  # whatever the program did before
    changed = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(tmp_path / f"step_{stopped}")}
    train(whole_run, num_workers=2 * (stopped in (1, 7)), **changed)
    assert timeless(tmp_path) == timeless(whole) and len(timeless(tmp_path)) == 16
    assert [line["epoch"] for line in timeless(tmp_path) if "epoch" in line][3:5] == [1.0, 1 + 2 / 7]
    for step in range(stopped + 1, 13):
        assert_same_checkpoint(tmp_path / f"step_{step}", whole / f"step_{step}")


@pytest.mark.slow
def test_a_killed_process_resumes_by_itself(whole_run: dict[str, Any], tmp_path: Path):
    """kill -9 somewhere after the second step, then the same command with ``auto``."""
    if whole_run["ema"]:
        pytest.skip("once is enough")
    options = {name: value for name, value in whole_run.items() if value is not None} | {
        "output_dir": str(tmp_path)
    }
    (process,) = start_command(tmp_path / "log", ["train", *flags(options)])
    wait_for(tmp_path / "step_2", process)
    process.kill()
    process.join()
    train(options, resume_from_checkpoint="auto")
    assert timeless(tmp_path) == timeless(whole_run["output_dir"])
    assert_same_checkpoint(tmp_path / "step_12", Path(whole_run["output_dir"]) / "step_12")
    assert [p.name for p in tmp_path.glob(".*")] == [".lock"], "nothing half written stays"


@pytest.mark.slow
def test_a_checkpoint_keeps_weights_and_average_apart(whole_run: dict[str, Any]):
    last = Path(whole_run["output_dir"]) / "step_12"
    assert (last / "model.safetensors").exists() == bool(whole_run["ema"])
    if whole_run["ema"]:
        average, weights = load_file(last / "ema.safetensors"), load_file(last / "model.safetensors")
        assert not torch.equal(average["llm2vae.weight"], weights["llm2vae.weight"])
        assert weights.keys() < average.keys()


@pytest.mark.slow
def test_validation_keeps_the_best_model(whole_run: dict[str, Any], tmp_path: Path):
    """``best`` is the step with the lowest validation loss, loads as a model, and gives that very number
    again."""
    run = Path(whole_run["output_dir"])
    found = {line["step"]: line["val_loss"] for line in metrics(run) if "val_loss" in line}
    assert list(found) == [0, 4, 8, 12]
    step = min(list(found)[1:], key=lambda s: found[s])
    assert json.loads((run / "best" / "manifest.json").read_text())["step"] == step
    trainer = built(whole_run, model_path=str(run / "best"), output_dir=str(tmp_path))
    assert trainer.evaluate()["val_loss"] == found[step]


@pytest.mark.slow
def test_a_run_that_is_done_stays_as_it_is(whole_run: dict[str, Any], tmp_path: Path):
    whole = Path(whole_run["output_dir"])
    shutil.copytree(whole / "step_12", tmp_path / "step_12")
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train(whole_run, output_dir=str(tmp_path), resume_from_checkpoint="auto")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert_same_checkpoint(tmp_path / "step_12", whole / "step_12")


@pytest.mark.slow
def test_resuming_with_other_data_is_refused(whole_run: dict[str, Any], records: Path, tmp_path: Path):
    shutil.copytree(records.parent, tmp_path / "data")
    other = tmp_path / "data" / records.name
    other.write_text(other.read_text().replace("A red house", "A red mouse"))
    changed = whole_run | {"output_dir": str(tmp_path / "run"), "train_data_path": str(other)}
    with pytest.raises(UserError, match=r"is not what this run began with.*Fix"):
        train(changed, resume_from_checkpoint=str(Path(whole_run["output_dir"]) / "step_3"))
    # The same file in another place and by another name is the same data.
    other.write_text(records.read_text())
    changed["train_data_path"] = str(other.rename(other.with_name("renamed.jsonl")))
    train(changed, resume_from_checkpoint=str(Path(whole_run["output_dir"]) / "step_11"))
    assert_same_checkpoint(tmp_path / "run" / "step_12", Path(whole_run["output_dir"]) / "step_12")


@pytest.mark.slow
def test_a_step_that_takes_all_records_is_told(options: dict[str, Any], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    stream = built(options).run.stream  # seven records, one in each packed sequence
    assert not whole_epoch(stream, 6) and "all 7 records" in whole_epoch(stream, 7)
    assert "a whole epoch" not in caplog.text
    built(options, max_num_tokens=None, batch_size=5000)
    assert re.search(r"a whole epoch: .*all 7 records.*--batch_size", caplog.text)


def test_processes_that_get_nothing_are_told(options: dict[str, Any]):
    stream = built(options).run.stream  # seven records, one in each packed sequence
    assert not idle_processes(stream, 1) and not idle_processes(stream, 7)
    assert re.search(r"7 packed.* for 9 processes: 2 of them learn nothing.*Fix: ", idle_processes(stream, 9))


@pytest.mark.slow
def test_a_fresh_or_older_start_never_removes_what_it_saved(whole_run: dict[str, Any], tmp_path: Path):
    """The folder holds later steps of an earlier run; the limit must not take the checkpoint just written for
    an old one."""
    whole = Path(whole_run["output_dir"])
    for step in (2, 12):
        shutil.copytree(whole / f"step_{step}", tmp_path / f"step_{step}")
    resume = {"resume_from_checkpoint": str(tmp_path / "step_2"), "max_steps": 3, "save_total_limit": 1}
    train(whole_run, {"output_dir": str(tmp_path)}, resume)
    assert (tmp_path / "step_3").exists()


# ---- validation, what is kept


@pytest.mark.slow
def test_validation_twice_gives_the_same_number_and_learns_nothing(options: dict[str, Any], records: Path):
    """With a learning rate of zero, every validation of a run is of the same weights."""
    options |= {"max_steps": 3, "eval_steps": 1, "learning_rate": 0.0, "val_data_path": str(records)}
    train(options)
    found = [line for line in timeless(options["output_dir"]) if "val_loss" in line]
    assert len(found) == 4 and all({**line, "step": 0} == {**found[0], "step": 0} for line in found)
    assert found[0]["val_loss"] == found[0]["val_text_loss"] + found[0]["val_image_loss"]
    trainer = built(options)
    assert (
        trainer.evaluate()
        == trainer.evaluate()
        == {name: value for name, value in found[0].items() if name != "step"}
    )
    assert trainer.run.model.training and all(p.grad is None for p in trainer.run.model.parameters())
    packed = built(options, batch_size=4).evaluate()
    assert packed["val_loss"] == pytest.approx(found[0]["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_validation_is_once_an_epoch_by_default(options: dict[str, Any], records: Path):
    train(options, max_steps=None, num_epochs=2, gradient_accumulation_steps=4, val_data_path=str(records))
    assert [line["step"] for line in metrics(options["output_dir"]) if "val_loss" in line] == [0, 2, 4]


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept_and_the_best(options: dict[str, Any], records: Path):
    # The learning rate ruins the model: the first validation stays the best.
    ruin = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "warmup_steps": 0}
    train(
        options,
        {
            "max_steps": 4,
            "save_steps": 1,
            "eval_steps": 1,
            "save_total_limit": 2,
            "val_data_path": str(records),
        },
        ruin,
    )
    run = Path(options["output_dir"])
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["best", "ranks", "step_3", "step_4"]
    for folder in ("best", "step_3", "step_4"):
        verify_checkpoint(run / folder)
    assert not (run / "best" / "optimizer.safetensors").exists()


# ---- what learns


@pytest.fixture(scope="module")
def bfloat16_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as they are published: training computes in float32, what does not learn must keep its two
    bytes."""
    folder = tmp_path_factory.mktemp("bf16") / "model"
    shutil.copytree(small_model, folder)
    weights = load_file(folder / "ema.safetensors")
    save_file(
        {name: t.bfloat16() if name != "llm2vae.bias" else t for name, t in weights.items()},
        folder / "ema.safetensors",
    )
    return folder


def is_gen(name: str) -> bool:
    return "_moe_gen" in name or name.startswith(("time_embedder.", "vae2llm.", "llm2vae."))


FREEZE = {
    "nothing": ({}, lambda name: True),
    "freeze_llm": ({"freeze_llm": True}, lambda name: not name.startswith("language_model.")),
    "freeze_vit": ({"freeze_vit": True}, lambda name: not name.startswith("vit_model.")),
    "freeze_und": ({"freeze_und": True}, is_gen),
    "visual_gen": ({"visual_gen": False}, lambda name: not is_gen(name)),
    "visual_und": ({"visual_und": False}, lambda name: not name.startswith(("vit_model.", "connector."))),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FREEZE)
def test_what_learns_and_that_the_rest_keeps_its_bytes(
    case: str, options: dict[str, Any], bfloat16_model: Path, records: Path, tmp_path: Path
):
    given, learns = FREEZE[case]
    wanted = {"visual_gen": [0, 2, 5], "visual_und": [0, 1, 3, 4]}.get(case, range(7))
    for name in ("0.png", "1.png", "2.png"):
        shutil.copy(records.parent / name, tmp_path)
    lines_ = records.read_text().splitlines()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(lines_[i] + "\n" for i in wanted))
    train(
        options,
        {"model_path": str(bfloat16_model), "train_data_path": str(data), "batch_size": 7, "ema": 0.5},
        given,
    )
    step = Path(options["output_dir"]) / "step_2"
    before = raw(bfloat16_model / "ema.safetensors")
    for file in ("ema.safetensors", "model.safetensors"):
        after = raw(step / file)
        changed = {name for name in after if after[name] != before[name]}
        assert after.keys() == (before.keys() if file == "ema.safetensors" else changed), (
            "what does not train stands in ema alone"
        )
        assert changed == {name for name in before if learns(name) and "pos_embed.pos_embed" not in name}
    source, saved = load_file(bfloat16_model / "ema.safetensors"), load_file(step / "ema.safetensors")
    assert all(
        saved[name].dtype == (torch.float32 if name in changed else source[name].dtype) for name in saved
    )
    moments = load_file(step / "optimizer.safetensors")
    assert {name.removeprefix("exp_avg.") for name in moments if name.startswith("exp_avg.")} == changed
    load_bagel(step)


@pytest.mark.slow
def test_freeze_und_leaves_understanding_as_it_was(options: dict[str, Any], small_model: Path):
    """Text losses of a row are the same to the bit after the training, as text tokens see no generated weight
    of their own."""
    trainer = built(options, freeze_und=True, val_data_path=options["train_data_path"])
    before = trainer.evaluate()
    take_warm_up(trainer)
    train_on(trainer)
    after = trainer.evaluate()
    assert after["val_image_loss"] != before["val_image_loss"]
    pack = batch_of(trainer, [0, 2, 5]).pack
    assert torch.equal(trainer.run.model(pack).ce, load_bagel(small_model)(pack).ce)


# ---- what goes wrong


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_records(
    options: dict[str, Any], small_model: Path, tmp_path: Path
):
    """The embedding of one character becomes NaN, and one record uses it."""
    data = write_jsonl(
        tmp_path / "data.jsonl", [text("Say it", answer) for answer in ("Q", "two", "three", "four")]
    )
    options |= {
        "train_data_path": str(data),
        "max_steps": 4,
        "save_steps": 1,
        "ema": 0.5,
    }
    loop = built(options)
    name, row = (
        "language_model.model.embed_tokens.weight",
        json.loads((small_model / "vocab.json").read_text()),
    )
    with torch.no_grad():
        held = loop.run.model.get_parameter(name)
        for values in (held, loop.run.ema.values[name].view(held.shape)):
            values[row["Q"]] = float("nan")
    train_on(loop)
    loop.run.close()
    run = Path(options["output_dir"])
    (bad,) = read_jsonl(run / "bad_steps.jsonl")
    assert bad["records"] == [f"{data}:1"] and bad["text_loss"] == "nan"
    step = bad["step"]
    logged = {line["step"]: line for line in metrics(run)}
    assert logged[step]["skipped"] == 1.0 and logged[step]["loss"] is None
    assert all("skipped" not in logged[n] and logged[n]["loss"] is not None for n in logged if n != step)
    assert step > 1, "seed: the record should not come first, where there are no moments yet"
    for file in ("ema", "model", "optimizer"):
        assert raw(run / f"step_{step}" / f"{file}.safetensors") == raw(
            run / f"step_{step - 1}" / f"{file}.safetensors"
        ), file
        if step < 4:
            assert raw(run / f"step_{step + 1}" / f"{file}.safetensors") != raw(
                run / f"step_{step}" / f"{file}.safetensors"
            )


@pytest.mark.slow
def test_a_gradient_that_overflows_skips_the_step_too(options: dict[str, Any], small_model: Path):
    """Both losses are finite; their weighted sum is beyond float32. Nothing ever moves, and no moments come
    to be."""
    with pytest.raises(TrainingStopped, match="gradient is not finite"):
        train(options, image_loss_weight=1e39, batch_size=7)
    loop = built(options, image_loss_weight=1e39, batch_size=7)
    train_on(loop)
    loop.run.close()
    run = Path(options["output_dir"])
    bad = read_jsonl(run / "bad_steps.jsonl")
    assert [line["step"] for line in bad] == [1, 2] and all(float(line["image_loss"]) > 0 for line in bad)
    assert raw(run / "step_2" / "ema.safetensors") == raw(small_model / "ema.safetensors")
    assert not any(name.startswith("exp_avg") for name in raw(run / "step_2" / "optimizer.safetensors"))


@pytest.mark.slow
def test_a_dry_run_trains_and_saves_nothing(options: dict[str, Any], capfd: pytest.CaptureFixture[str]):
    assert train(options, dry_run=True) == {}
    assert not Path(options["output_dir"]).exists()


def test_bad_data_stops_before_training(options: dict[str, Any], tmp_path: Path):
    bad = write_jsonl(
        tmp_path / "bad.jsonl", [text("a", "b"), {"text_prompt": "x", "image_path": "nowhere.png"}]
    )
    with pytest.raises(BadData) as error:
        train(options, train_data_path=str(bad))
    assert f"{bad}:2" in str(error.value) and "nowhere.png" in str(error.value)
    assert (
        not list(Path(options["output_dir"]).glob("step_*"))
        and not (Path(options["output_dir"]) / "metrics.jsonl").exists()
    )


@pytest.mark.slow
def test_bad_records_can_be_left_out_while_they_are_few(options: dict[str, Any], tmp_path: Path):
    good = [text(str(i), "yes") for i in range(120)]
    bad = write_jsonl(tmp_path / "bad.jsonl", [*good, {"text_prompt": "x", "image_path": "nowhere.png"}])
    train(options, train_data_path=str(bad), on_bad_record="skip", batch_size=60)
    (line,) = read_jsonl(Path(options["output_dir"]) / "bad_records.jsonl")
    assert (line["file"], line["line"]) == (str(bad), 121)
    assert [line["epoch"] for line in metrics(options["output_dir"])] == [0.5, 1.0]
    with pytest.raises(BadData, match="more than the 1%"):
        train(
            options,
            train_data_path=str(
                write_jsonl(bad, [*good[:20], {"caption": "x", "image_path": "nowhere.png"}])
            ),
            on_bad_record="skip",
        )


@pytest.mark.slow
@pytest.mark.parametrize(("count", "on_bad_record"), [(3, "error"), (3, "skip"), (110, "skip")])
def test_a_picture_that_breaks_during_the_run(
    options: dict[str, Any], tmp_path: Path, count: int, on_bad_record: str
):
    """One in 111 is left out and listed; one in four stops the run, and so does any with ``error``."""
    name = draw_picture(tmp_path / "a.png", 0)
    data = write_jsonl(
        tmp_path / "data.jsonl",
        [*(text(str(i), "yes") for i in range(count)), {"text_prompt": "x", "image_path": name}],
    )
    trainer = built(
        options, train_data_path=str(data), on_bad_record=on_bad_record, batch_size=111, max_steps=1
    )
    take_warm_up(trainer)
    (tmp_path / name).write_bytes(b"no picture any more")
    run = Path(options["output_dir"])
    if count > 100:
        train_on(trainer)
        (line,) = read_jsonl(run / "bad_records.jsonl")
        assert (line["file"], line["line"]) == (str(data), count + 1) and "picture" in line["code"]
        assert metrics(run)[0]["image_tokens"] == 0
    else:
        with pytest.raises(TrainingStopped) as error:
            train_on(trainer)
        assert f"{data}:{count + 1}" in str(error.value) and "resume" in str(error.value)
        assert not list(run.glob("step_*"))


@pytest.mark.slow
def test_a_tracker_that_fails_stops_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("unigen.tracking.services.Wandb.__init__", lambda *_: 1 / 0)
    train(options, wandb_project="nothing")
    assert len(metrics(options["output_dir"])) == 2
    assert "Tracker wandb cannot start; the run goes on" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_told(options: dict[str, Any], tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot be written.*--output_dir"):
        train(options, output_dir=str(tmp_path / "locked" / "run"))


def test_an_output_folder_that_is_a_file_is_told(options: dict[str, Any], tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written.*--output_dir"):
        train(options, output_dir=str(tmp_path / "file"))
