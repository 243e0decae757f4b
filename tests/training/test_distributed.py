"""Two processes give what one gives; the commands of the guide, run as written."""

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
    assert_close,
    batch_of,
    built,
    gradients,
    metrics,
    step_of,
    take_warm_up,
    train_on,
    write_jsonl,
)

from unigen.cli import main
from unigen.config import UserError

pytestmark = pytest.mark.slow  # several processes

ROOT = Path(__file__).parents[2]

# Rows of each process: [rank][micro][records]. The records are those of the fixture: 0 and 5 are text, 1 and
# 6 are drawn.
TEXT_ONLY = {"visual_gen": False, "train_data_path": "text.jsonl"}
CASES: dict[str, tuple[list[list[list[int]]], dict[str, Any]]] = {
    "mixed": ([[[0, 1, 2]], [[3, 4, 5, 6]]], {}),
    "text on one, images on the other": ([[[0, 5]], [[1, 6]]], {"train_transitions": False}),
    "nothing on one": ([[[0, 1, 2, 3]], [[]]], {}),
    "micro-batches, one process ends early": ([[[0], [3]], [[5], []]], {}),
    "understanding frozen": ([[[0, 5]], [[1, 4]]], {"freeze_und": True}),
    "decoder frozen": ([[[0, 5]], [[1, 3]]], {"freeze_llm": True}),
    "vision frozen, checkpointing": ([[[2, 0]], [[3]]], {"freeze_vit": True, "gradient_checkpointing": True}),
    "no vision": ([[[0]], [[1, 3]]], {"visual_und": False, "train_data_path": "drawn.jsonl"}),
    "no drawing": ([[[0, 1]], [[]]], TEXT_ONLY),
}


def options_of(case: str, options: dict[str, Any]) -> dict[str, Any]:
    changed = {"max_grad_norm": 0.0, "text_cond_dropout_prob": 0.0, **options, **CASES[case][1]}
    if "train_data_path" in CASES[case][1]:
        changed["train_data_path"] = str(Path(options["train_data_path"]).parent / changed["train_data_path"])
    return changed


def _step_as_rank(rank: int, world: int, port: int, options: dict[str, Any], folder: str) -> None:
    become_rank(rank, world, port)
    broken = options.pop("broken")
    for number, case in enumerate(CASES):
        trainer = built(**options_of(case, options))
        rows = [batch_of(trainer, records) for records in CASES[case][0][rank]]
        result = step_of(trainer, rows, 0.0)
        torch.save(
            (result.text_loss, result.image_loss, result.grad_norm, gradients(trainer)),
            Path(folder) / f"{number}.{rank}.pt",
        )
    trainer = built(**options | {"ema": 0.5, "output_dir": f"{folder}/broken"})
    with torch.no_grad():
        trainer.run.model.language_model.model.embed_tokens.weight[broken] = float("nan")
    before = {name: p.clone() for name, p in trainer.run.model.state_dict().items()}
    result = step_of(trainer, [batch_of(trainer, [1 - rank])], 1.0)
    same = all(
        torch.equal(before[name].nan_to_num(7), p.nan_to_num(7))
        for name, p in trainer.run.model.state_dict().items()
    )
    (Path(folder) / f"broken.{rank}.json").write_text(
        json.dumps([bool(result.refused), same, len(trainer.engine.optimizer.state)])
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(
    small_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """One step of every case on two processes, saved case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    write_jsonl(records.parent / "text.jsonl", [lines[0], lines[5]])
    write_jsonl(records.parent / "drawn.jsonl", [lines[1], lines[0], lines[5], lines[3]])
    options = {
        "model_path": str(small_model),
        "train_data_path": str(records),
        "output_dir": str(folder / "run"),
    }
    options |= {"max_steps": 1, "device": "cpu"}
    token = json.loads((small_model / "vocab.json").read_text())["?"]  # in the first record alone
    run_ranks(_step_as_rank, 2, options | {"broken": token}, str(folder))
    return folder, options


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_gradient_of_one_row(two_ranks: tuple[Path, dict[str, Any]], case: str):
    folder, options = two_ranks
    number = list(CASES).index(case)
    zero, one = (torch.load(folder / f"{number}.{rank}.pt") for rank in range(2))
    trainer = built(**options_of(case, options))
    everything = [i for rank in CASES[case][0] for row in rank for i in row]
    result = step_of(trainer, [batch_of(trainer, everything)], 0.0)
    assert_close(zero[3], gradients(trainer))
    assert zero[3].keys() == one[3].keys() and all(
        torch.equal(g, one[3][name]) for name, g in zero[3].items()
    )
    assert zero[:3] == one[:3]
    assert zero[0] == pytest.approx(result.text_loss, rel=1e-6)
    assert zero[1] == pytest.approx(result.image_loss, rel=1e-6)
    assert zero[2] == pytest.approx(result.grad_norm, rel=1e-5)


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all(
    two_ranks: tuple[Path, dict[str, Any]],
):
    folder, options = two_ranks
    assert [json.loads((folder / f"broken.{rank}.json").read_text()) for rank in range(2)] == [
        [True, True, 0]
    ] * 2
    (line,) = [json.loads(line) for line in (folder / "broken" / "bad_steps.jsonl").read_text().splitlines()]
    data = options["train_data_path"]
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

    one = built(**options | {"gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "one")})
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
    trainer = built(**options)
    (Path(folder) / f"{rank}.json").write_text(
        json.dumps([len(trainer.run.stream.mixture), trainer.run.stream.mixture.order(0).records.tolist()])
    )
    other = options | {"train_data_path": options["val_data_path"]} if rank else options
    try:
        built(**other)
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
