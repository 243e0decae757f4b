"""The forgetting probe: losses and answers beside those of the model that the run began with, over steps, stops
and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from tiny import built, draw_picture, metrics, take_warm_up, train, train_on

from unigen.sequence.images import open_image
from unigen.training.answering import packed
from unigen.training.probe import likeness

DRIFTS = ("probe/drift/text", "probe/drift/image")


def probed(folder: Path | str) -> list[dict[str, Any]]:
    return [line for line in metrics(folder) if "probe/loss/text" in line]


@pytest.mark.slow
def test_drift_and_answers_are_held_against_the_first_model(options: dict[str, Any], records: Path):
    """Passes when at step 0 nothing has drifted, later every loss and drift are those of the step's weights,
    and a run that is resumed, or moved, counts from the same base; also without validation data."""
    options |= {"probe_data_path": str(records), "eval_steps": 1, "save_steps": 1}
    train(options)
    run = Path(options["output_dir"])
    first, *rest = lines = probed(run)
    assert [line["step"] for line in lines] == [0, 1, 2] and "val_loss" not in first
    assert [first[name] for name in DRIFTS] == [0, 0] and first["probe/answers/same"] == 1
    for line in rest:
        for kind in ("text", "image"):
            drift = line[f"probe/loss/{kind}"] / first[f"probe/loss/{kind}"] - 1
            assert line[f"probe/drift/{kind}"] == pytest.approx(drift) and drift
        assert 0 <= line["probe/answers/same"] < 1 and 0 < line["probe/answers/likeness"] < 1
    other = {"output_dir": f"{run}-2", "resume_from_checkpoint": str(run / "step_1")}
    train(options, other)
    (last,) = probed(f"{run}-2")
    assert {**last, "time": 0} == {**rest[-1], "time": 0}
    assert (Path(f"{run}-2") / "probe.json").read_bytes() == (run / "probe.json").read_bytes()


@pytest.mark.slow
def test_the_run_ends_where_it_forgets_too_much(
    options: dict[str, Any], records: Path, capsys: pytest.CaptureFixture[str]
):
    options |= {"probe_data_path": str(records), "eval_steps": 1, "max_steps": 5, "stop_on_drift": 0.5}
    train(options, learning_rate=0.5, max_grad_norm=0)
    last = probed(options["output_dir"])[-1]
    assert last["step"] < 5 and max(last[name] for name in DRIFTS) > 0.5
    assert all(max(line[name] for name in DRIFTS) <= 0.5 for line in probed(options["output_dir"])[:-1])
    assert "stop_on_drift is 0.5" in capsys.readouterr().err
    assert (Path(options["output_dir"]) / f"step_{last['step']}" / "trainer.json").exists()
    again = options | {"resume_from_checkpoint": "auto", "learning_rate": 0.5, "max_grad_norm": 0}
    train(again)  # the same command, as recipes have it: it is as far as it was
    assert max(line["step"] for line in probed(options["output_dir"])) == last["step"]


@pytest.mark.slow
def test_below_adapters_the_base_is_there_at_any_step(options: dict[str, Any], records: Path):
    """Passes when a probe that begins with a resume counts from the base all the same."""
    adapters = options | {"lora_rank": 2, "lora_targets": ["both"], "learning_rate": 0.05, "save_steps": 1}
    wanted = adapters | {
        "probe_data_path": str(records),
        "eval_steps": 1,
        "output_dir": options["output_dir"] + "-0",
    }
    train(wanted)
    train(adapters)
    late = {"resume_from_checkpoint": str(Path(options["output_dir"]) / "step_1")}
    train(wanted, late, output_dir=options["output_dir"] + "-1")
    one, two = (probed(f"{options['output_dir']}-{n}")[-1] for n in (0, 1))
    assert one["probe/drift/text"] and {**one, "time": 0} == {**two, "time": 0}


def test_likeness_of_answers(tmp_path: Path):
    pictures = []
    for name, seed in (("a", 1), ("b", 2)):
        draw_picture(tmp_path / f"{name}.png", seed)
        pictures += packed([open_image(tmp_path / f"{name}.png")])
    a, b = pictures
    assert likeness([{"text": "abcd"}], [{"text": "abxd"}]) == 0.75
    assert likeness([a], [a]) == 1 and 0.4 < likeness([a], [b]) < 0.9
    assert likeness([{"text": "x"}], [a]) == 0 and likeness([{"text": "x"}, a], [{"text": "x"}]) == 0.5


def _measure_as_rank(rank: int, world: int, port: int, options: dict[str, Any], folder: str) -> None:
    become_rank(rank, world, port)
    for name in options.pop("engines"):
        loop = built(options, engine=name, output_dir=f"{folder}/{name}")
        take_warm_up(loop)
        train_on(loop)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_engine_measures_what_one_process_does(options: dict[str, Any], records: Path, tmp_path: Path):
    """Two processes with ddp, fsdp2 and deepspeed: losses by task, answers and probe are those of one process."""
    options |= {
        "val_data_path": str(records), "probe_data_path": str(records), "eval_samples": 7, "eval_steps": 2,
        "gradient_accumulation_steps": 1, "adam_epsilon": 1e-3,
    }  # fmt: skip
    for engines in (["ddp", "fsdp2"], ["deepspeed"]):
        run_ranks(_measure_as_rank, 2, options | {"engines": engines}, str(tmp_path), seconds=300)
    one = options | {"gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")}
    train(one)
    wanted = [line for line in metrics(tmp_path / "one") if "val_loss" in line]
    assert [line["step"] for line in wanted] == [0, 2]
    for name in ("ddp", "fsdp2", "deepspeed"):
        found = [line for line in metrics(tmp_path / name) if "val_loss" in line]
        for line, other in zip(found, wanted, strict=True):
            assert line.keys() == other.keys()
            for key in line.keys() - {"time"}:
                assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-3), (name, line["step"], key)
