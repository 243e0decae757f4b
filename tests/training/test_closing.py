"""The last lines of a run: figures that are the run's, and commands that work."""

from __future__ import annotations

import math
import shlex
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from saves import save
from tiny import text, write_jsonl

from unigen.cli import load_name, main, parse_options
from unigen.commands.table import COMMANDS
from unigen.config import Config
from unigen.training.closing import closing


def commands(lines: list[str]) -> list[list[str]]:
    following = lines[lines.index("Next:") + 1 :]
    return [shlex.split(line) for line in takewhile(lambda line: line.startswith("  "), following)]


READING = {
    "image_root": "my pics",
    "val_split": "test",
    "fields": {"text_prompt": "caption"},
    "trigger_word": "sks",
}


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4, "model_path": "base"}, READING])
def test_every_line_to_copy_is_understood(tmp_path: Path, options):
    config = Config(val_data_path=["a b.jsonl", "c.jsonl"], **options)
    lines = closing(tmp_path / "my run", config, 7, 1.5, {"val_loss": 1.75}, 61.0, 1220)
    assert "step 7 after 1:01" in lines[0] and "1,220 tokens (20 a second)" in lines[0]
    assert "1.7500" in lines[1]
    found = commands(lines)
    assert found[0][1] == "generate" and found[-1][1] == "watch"
    for program, name, *argv in found:
        command = COMMANDS[name]
        assert program == "unigen"
        read = parse_options(load_name(command.options), argv, command.positional, command.short)
        if name == "evaluate":  # the data is read as the run read it
            own = {"val_split": "split"}  # what evaluate calls it
            assert {key: getattr(read, own.get(key, key)) for key in READING} == {
                key: getattr(config, key) for key in READING
            }


@pytest.mark.parametrize("prompts", ["a red circle", ["held.jsonl", "a red circle"]])
def test_the_line_to_generate_asks_what_the_run_asked(tmp_path: Path, prompts):
    (generate, *_) = commands(closing(tmp_path, Config(sample_prompts=prompts), 1, math.inf, {}, 1.0, 1))
    assert generate[generate.index("--prompt") + 1] == "a red circle"


def test_services_that_were_asked_for_are_named(tmp_path: Path):
    config = Config(tensorboard=True, wandb_project="p", wandb_mode="offline")
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    lines = closing(tmp_path, config, 1, math.inf, {}, 0.0, 0)
    assert not any("Validation" in line for line in lines)
    assert any(line.split()[0] == "tensorboard" for line in lines[2:])
    assert any(words[:2] == ["wandb", "sync"] and Path(words[2]).is_dir() for words in commands(lines))


def test_the_best_is_named_by_what_decided_it(tmp_path: Path):
    save(tmp_path, 5, name="best")
    for metric, words in (
        ("val_loss", "the best 0.9375 at step 5"),
        ("eval/psnr/t2i", "eval/psnr/t2i 0.9375"),
    ):
        config = Config(metric_for_best_model=metric)
        assert words in closing(tmp_path, config, 9, 0.9375, {"val_loss": 1.23}, 1.0, 1)[1]
    assert "inf" not in closing(tmp_path, Config(), 9, math.inf, {"val_loss": 1.23}, 1.0, 1)[1]


@pytest.mark.slow
def test_each_end_says_what_happened_and_its_lines_run_as_printed(
    options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    data = write_jsonl(tmp_path / "val data.jsonl", [text("What is two and two?", "Four.")])
    given = options | {"train_data_path": data, "val_data_path": data, "tensorboard": True}

    def said(**more: Any) -> list[str]:
        caplog.clear()
        flags = [str(part) for name, value in (given | more).items() for part in (f"--{name}", value)]
        assert main(["train", *flags]) == 0
        return [*"\n".join(caplog.messages).splitlines(), *capsys.readouterr().err.splitlines()]

    assert any("Dry run" in line and "Without --dry_run" in line for line in said(dry_run=True))
    lines = said()
    assert any(line.startswith("Done: step 2") for line in lines)
    for program, *argv in commands(lines):
        if program == "tensorboard":
            assert argv[0] == "--logdir" and list(Path(argv[1]).glob("events.*"))
            continue
        assert program == "unigen" and main(argv) == 0, argv
        capsys.readouterr()
    (run,) = tmp_path.glob("run.html")
    assert run.stat().st_size > 1000 and (tmp_path / "run_answer").is_dir()
    assert (tmp_path / "run_evaluation" / "metrics.json").is_file()
    again = said(resume_from_checkpoint="auto")
    assert any("All 2 steps are done already" in line and "--max_steps" in line for line in again)
    assert commands(again)[0][:2] == ["unigen", "generate"]
    early = said(
        max_steps=9, eval_steps=1, early_stopping_patience=1, learning_rate=0.0, output_dir=tmp_path / "b"
    )
    assert any(line.startswith("Ended early: step 2") for line in early)
