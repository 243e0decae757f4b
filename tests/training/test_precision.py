"""The precision of a run: from the options and the device, over a table; and a run that goes on in another
one."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from tiny import train

from unigen.config import Config, ConfigError
from unigen.runs.checkpoint import read_states
from unigen.training.engine import Engine, open_engine
from unigen.training.precision import (
    DeviceFacts,
    Precision,
    check_head_width,
    choose_precision,
    stored_precision,
)

CPU = DeviceFacts("cpu")
H100 = DeviceFacts("cuda", "H100", True, 232_448)
RTX4090 = DeviceFacts("cuda", "RTX 4090", True, 101_376)
T4 = DeviceFacts("cuda", "T4", False, 65_536)
UNKNOWN = DeviceFacts("cuda", "other", True, None)


@pytest.mark.parametrize(
    ("options", "cpu", "h100", "t4"),
    [
        ({}, "fp32", "bf16", "fp32"),
        ({"precision": "auto"}, "fp32", "bf16", "fp32"),
        ({"bf16": False}, "fp32", "fp32", "fp32"),
        ({"bf16": False, "fp16": False}, "fp32", "fp32", "fp32"),
        ({"fp16": False}, "fp32", "bf16", "fp32"),
        ({"bf16": True}, "bf16", "bf16", "bf16"),
        ({"bf16": True, "fp16": False}, "bf16", "bf16", "bf16"),
        ({"fp16": True}, "fp16", "fp16", "fp16"),
        ({"fp16": True, "bf16": False}, "fp16", "fp16", "fp16"),
        ({"precision": "bf16"}, "bf16", "bf16", "bf16"),
        ({"precision": "bf16", "bf16": True}, "bf16", "bf16", "bf16"),
        ({"precision": "fp16", "fp16": True}, "fp16", "fp16", "fp16"),
        ({"precision": "fp32"}, "fp32", "fp32", "fp32"),
        ({"precision": "fp32", "bf16": False}, "fp32", "fp32", "fp32"),
    ],
)
def test_the_precision_of_options_and_device(options: dict[str, Any], cpu: str, h100: str, t4: str):
    assert [choose_precision(Config(**options), device).name for device in (CPU, H100, T4)] == [cpu, h100, t4]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bf16": True, "fp16": True}, ["fp16", "bf16"]),
        ({"precision": "fp32", "bf16": True}, ["fp32", "bf16 is on"]),
        ({"precision": "fp16", "bf16": True}, ["fp16", "bf16 is on"]),
        ({"precision": "bf16", "fp16": True}, ["bf16", "fp16 is on"]),
        ({"precision": "bf16", "bf16": False}, ["bf16 is off"]),
        ({"precision": "fp16", "fp16": False}, ["fp16 is off"]),
    ],
)
def test_what_contradicts_itself_is_the_users_error(options: dict[str, Any], named: list[str]):
    config = Config(model_path="m", train_data_path="d", **options)
    for ask in (config.resolve, lambda: choose_precision(config, H100)):
        with pytest.raises(ConfigError) as error:
            ask()
        assert "Fix:" in str(error.value) and "--precision" in str(error.value)
        assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    ("options", "device", "words"),
    [
        ({}, CPU, ["fp32", "auto", "cpu"]),
        ({}, H100, ["bf16", "auto", "H100"]),
        ({}, T4, ["fp32", "auto", "T4", "no bf16", "TF32"]),
        ({"bf16": True}, H100, ["bf16", "asked for"]),
        ({"bf16": True}, T4, ["bf16", "asked for", "emulates", "--precision fp16"]),
        ({"precision": "fp32"}, H100, ["fp32", "asked for", "TF32"]),
    ],
)
def test_a_line_says_which_and_why(options: dict[str, Any], device: DeviceFacts, words: list[str]):
    line = str(choose_precision(Config(**options), device))
    assert "\n" not in line and [word for word in words if word not in line] == []
    assert ("TF32" in line) == ("TF32" in words), "TF32 is a GPU's, and of float32"


@pytest.mark.parametrize(
    ("precision", "width", "device", "fix"),
    [
        ("fp32", 128, RTX4090, "--precision bf16"),
        ("fp32", 96, RTX4090, "--precision bf16"),
        ("fp32", 128, T4, "--precision fp16"),
        ("fp32", 64, RTX4090, None),
        ("bf16", 128, RTX4090, None),
        ("fp16", 128, T4, None),
        ("fp32", 128, H100, None),
        ("fp32", 128, replace(H100, shared_memory=149_504), None),
        ("fp32", 128, replace(H100, shared_memory=149_503), "--precision bf16"),
        ("fp32", 128, UNKNOWN, None),
        ("fp32", 128, CPU, None),
    ],
)
def test_float32_attention_that_does_not_fit_the_card_is_refused(
    precision: str, width: int, device: DeviceFacts, fix: str | None
):
    if fix is None:
        check_head_width(Precision(precision, ""), width, device)
        return
    with pytest.raises(ConfigError, match=f"Fix: {fix}") as error:
        check_head_width(Precision(precision, ""), width, device)
    assert str(width) in str(error.value) and device.name in str(error.value)


def test_it_is_refused_before_a_weight_is_read(small_model: Path, monkeypatch: pytest.MonkeyPatch):
    """The model's own head width is asked for, while its weights lie nowhere."""
    asked: list[int] = []

    def refuse(precision: Precision, width: int, device: DeviceFacts) -> None:
        asked.append(width)
        raise ConfigError("too wide")

    monkeypatch.setattr("unigen.training.engine.check_head_width", refuse)
    engine = Engine(Config(device="cpu", model_path=str(small_model)))
    monkeypatch.setattr(engine, "place", lambda stored: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="too wide"):
        engine.load_model(small_model)
    config = json.loads((small_model / "llm_config.json").read_text())
    assert asked == [config["hidden_size"] // config["num_attention_heads"]]


@pytest.mark.gpu
def test_a_gpu_says_what_it_is():
    facts = DeviceFacts.of(torch.device("cuda", 0))
    assert (
        facts.kind == "cuda"
        and facts.name
        and facts.has_bf16 == (torch.cuda.get_device_capability(0) >= (8, 0))
    )
    assert torch.version.hip is not None or (facts.shared_memory or 0) >= 48 * 1024
    with open_engine(Config(device="cuda", precision="fp32")) as engine:
        assert engine.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


# ---- processes, and a run that goes on


def _disagree(rank: int, world: int, port: int, folder: str) -> None:
    become_rank(rank, world, port)
    try:
        open_engine(Config(device="cpu", bf16=rank == 1))
    except ConfigError as error:
        (Path(folder) / str(rank)).write_text(str(error))
    with open_engine(Config(device="cpu", bf16=True)) as engine:
        assert engine.dtype == torch.bfloat16


@pytest.mark.slow
def test_processes_that_would_compute_differently_are_an_error_on_each(tmp_path: Path):
    run_ranks(_disagree, 2, str(tmp_path))
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert (
        said[0] == said[1]
        and "rank 0 fp32" in said[0]
        and "rank 1 bf16" in said[0]
        and "Fix: --precision" in said[0]
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"bf16": True, "fp16": False}, "bf16"),
        ({"bf16": False, "fp16": True}, "fp16"),
        ({"bf16": False, "fp16": False}, "fp32"),
        ({"precision": "fp16", "bf16": None, "fp16": None}, "fp16"),
    ],
)
def test_the_precision_in_a_checkpoint_of_any_age(options: dict[str, Any], name: str):
    assert stored_precision(options) == name


@pytest.mark.slow
def test_a_run_that_goes_on_in_another_precision_says_so(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    """The checkpoint holds what was computed in, not what was asked for; the same precision, asked for in
    another way, is no change."""

    def leg(steps: int, **more: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train(options, {"max_steps": steps, "resume_from_checkpoint": "auto"}, more)
        stored = read_states(run / f"step_{steps}")["training_config"]["precision"]
        lines = [line for line in caplog.messages if line.startswith("Precision: ")]
        assert len(lines) == 1 and lines[0].startswith(f"Precision: {stored} ")
        return [
            stored,
            *(
                r.getMessage()
                for r in caplog.records
                if r.levelname == "WARNING" and "fp32" in r.getMessage()
            ),
        ]

    run = Path(options["output_dir"])
    assert leg(1) == ["fp32"]
    assert leg(2, precision="fp32") == ["fp32"]
    stored, warning = leg(3, bf16=True)
    assert stored == "bf16" and "fp32" in warning and "bf16" in warning and "--precision fp32" in warning
    assert leg(4, precision="bf16") == ["bf16"]


@pytest.mark.slow
def test_the_scale_of_another_precision_is_not_taken_over(options: dict[str, Any]):
    """A run in float32 has the scale 1, which float16 would underflow with."""
    train(options, max_steps=1)
    more = {"max_steps": 2, "fp16": True, "resume_from_checkpoint": "auto"}
    train(options, more)
    assert read_states(Path(options["output_dir"]) / "step_2")["trainer"]["scale"]["scale"] in (
        2.0**15,
        2.0**16,
    )
