"""Two processes as torchrun starts them, and the commands of the guide, run as written; that they train as one
does is shown in ``test_engines.py``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank, free_port, timeless
from processes import flags, run_command, run_ranks
from tiny import (
    batch_of,
    built,
    metrics,
    read_jsonl,
    step_of,
    take_warm_up,
    train_on,
    write_jsonl,
)

from unigen.cli import main
from unigen.config import UserError

pytestmark = pytest.mark.slow  # several processes

ROOT = Path(__file__).parents[2]


def _break_as_rank(
    rank: int, world: int, port: int, options: dict[str, Any], token: int, folder: str
) -> None:
    become_rank(rank, world, port)
    trainer = built(options)
    with torch.no_grad():
        trainer.run.model.language_model.model.embed_tokens.weight[token] = float("nan")
    before = {name: p.clone() for name, p in trainer.run.model.state_dict().items()}
    result = step_of(trainer, [batch_of(trainer, [1 - rank])], 1.0)
    same = all(
        torch.equal(before[name].nan_to_num(7), p.nan_to_num(7))
        for name, p in trainer.run.model.state_dict().items()
    )
    (Path(folder) / f"{rank}.json").write_text(
        json.dumps([bool(result.refused), same, len(trainer.engine.optimizer.state)])
    )
    torch.distributed.destroy_process_group()


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all(
    options: dict[str, Any], small_model: Path, tmp_path: Path
):
    token = json.loads((small_model / "vocab.json").read_text())["?"]  # in the first record alone
    run_ranks(
        _break_as_rank, 2, options | {"ema": 0.5, "gradient_accumulation_steps": 1}, token, str(tmp_path)
    )
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[True, True, 0]] * 2
    run, data = Path(options["output_dir"]), options["train_data_path"]
    (line,) = read_jsonl(run / "bad_steps.jsonl")
    assert line["records"] == [f"{data}:2", f"{data}:1"]


def launch(launcher: list[str], options: dict[str, Any], *more: str) -> str:
    """Runs the guide's script with an interpreter of its own; what it printed."""
    argv = [sys.executable, *launcher, "train_unified_generation.py", *flags(options), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    return printed


def torchrun(processes: int) -> list[str]:
    return [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]


def losses(output_dir: Path | str) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "text_loss", "image_loss", "grad_norm", "learning_rate")
    return [tuple(line.get(name) for name in names) for line in metrics(output_dir) if "loss" in line]


@pytest.mark.slow
def test_the_guides_command_and_its_resume(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options |= {"model_path": "tests/golden/model", "max_image_tokens": 16, "save_steps": 1}
    printed = launch([], options)
    assert "Warm-up batch:" in printed and "step 2/2" in printed
    run, whole = Path(options["output_dir"]), losses(options["output_dir"])
    assert sorted(p.name for p in run.iterdir()) == [
        ".lock",
        "config.json",
        "metrics.jsonl",
        "ranks",
        "step_1",
        "step_2",
        "train.log",
    ]
    wanted = (run / "step_2" / "ema.safetensors").read_bytes()
    shutil.rmtree(run / "step_2")
    monkeypatch.chdir(ROOT)
    assert main(["train", *flags(options), "--resume_from_checkpoint", str(run / "step_1")]) == 0
    assert losses(run) == whole
    assert (run / "step_2" / "ema.safetensors").read_bytes() == wanted


@pytest.mark.slow
def test_torchrun_equals_one_process_and_resumes_to_the_bit(
    options: dict[str, Any], light_model: Path, records: Path, tmp_path: Path
):
    """Seven records, two processes, two rows each: four steps are two epochs, whose second steps leave a
    process without a row."""
    options |= {"max_steps": 4, "save_steps": 1, "val_data_path": str(records), "eval_steps": 2, "ema": 0.9}
    options["model_path"] = str(light_model)
    two = options | {"gradient_accumulation_steps": 2}
    run_command(tmp_path / "log", ["train", *flags(two)], 2)
    run, other = Path(two["output_dir"]), tmp_path / "resumed"
    other.mkdir()
    shutil.copytree(run / "step_1", other / "step_1")
    shutil.copy(run / "metrics.jsonl", other)
    launch(torchrun(2), two | {"output_dir": str(other)}, "--resume_from_checkpoint", "auto")
    assert losses(other) == losses(run)
    parts = sorted(path.name for path in (run / "step_4").glob("*-of-*.safetensors"))
    assert parts == [
        f"{group}-0000{n}-of-00002.safetensors" for group in ("ema", "model", "optimizer") for n in (1, 2)
    ]
    for name in parts:
        assert (other / "step_4" / name).read_bytes() == (run / "step_4" / name).read_bytes(), name

    one = built(options, gradient_accumulation_steps=4, output_dir=str(tmp_path / "one"))
    take_warm_up(one)
    train_on(one)
    for found, wanted in zip(timeless(run), timeless(tmp_path / "one"), strict=True):
        for name in wanted:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.mark.slow
def test_a_mistake_of_the_user_ends_every_process(options: dict[str, Any], tmp_path: Path):
    write_jsonl(tmp_path / "bad.jsonl", [{"text_prompt": "x", "image_path": "missing.png"}])
    options |= {"train_data_path": str(tmp_path / "bad.jsonl")}
    printed = run_command(tmp_path / "log", ["train", *flags(options)], 2, code=2)
    assert f"{tmp_path / 'bad.jsonl'}:1" in printed and "missing.png" in printed
    assert not list(Path(options["output_dir"]).glob("step_*"))


def _skip_as_rank(rank: int, world: int, port: int, options: dict[str, Any], folder: str) -> None:
    become_rank(rank, world, port)
    trainer = built(options)
    (Path(folder) / f"{rank}.json").write_text(
        json.dumps([len(trainer.run.stream.mixture), trainer.run.stream.mixture.order(0).records.tolist()])
    )
    other = options | {"train_data_path": options["val_data_path"]} if rank else options
    try:
        built(other)
    except UserError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_every_process_leaves_out_the_same_records(options: dict[str, Any], records: Path, tmp_path: Path):
    """A picture with a sound header and a broken body is found by decoding alone: were one process not to
    decode, the processes would deal from different orders. And files that differ are an error, not a hang."""
    (tmp_path / "cut.png").write_bytes((records.parent / "1.png").read_bytes()[:-400])
    lines = [{"text_prompt": "cut", "image_path": "cut.png"}]
    lines += [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(110)
    ]
    options |= {
        "train_data_path": str(write_jsonl(tmp_path / "skip.jsonl", lines)),
        "val_data_path": str(records),
        "on_bad_record": "skip",
    }
    run_ranks(_skip_as_rank, 2, options, str(tmp_path))
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero == one and zero[0] == 110
    assert all(
        "the processes read different data" in (tmp_path / f"{rank}.txt").read_text() for rank in range(2)
    )
