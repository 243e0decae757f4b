"""What samples are answered with where nobody says it, and how often they are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unigen.config import Config, ConfigError, UserError
from unigen.inference.prompts import Prompt
from unigen.training import sample_plan
from unigen.training.engine import Engine
from unigen.training.sample_plan import Pace, decides, with_kinds

PROMPTS = [
    Prompt("a house", "1", 1),
    Prompt("what?", "2", 2, images=("a.png",)),
    Prompt("b", "3", 3, kind="decide"),
    Prompt("c", "4", 4, kind="answer"),
]


@pytest.mark.parametrize(
    ("options", "tasks", "kinds", "why"),
    [
        ({}, (), ["draw", "answer"], "never trained to decide"),
        ({}, ("generate", "understand", "edit"), ["draw", "answer"], "never trained to decide"),
        ({}, ("generate", "edit"), ["draw", "draw"], "never trained to decide"),
        ({}, ("understand", "text"), ["answer", "answer"], "texts as its only targets"),
        ({"visual_gen": False}, ("text",), ["answer", "answer"], "visual_gen=false"),
        ({"sample_kind": "draw"}, ("text",), ["draw", "draw"], ""),
        ({"sample_kind": "decide"}, (), ["decide", "decide"], ""),
    ],
)
def test_open_prompts_are_answered_by_what_the_model_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict, tasks: tuple, kinds: list, why: str
):
    caplog.set_level("INFO", "unigen")
    found = with_kinds(PROMPTS, Config(model_path=str(tmp_path), **options), tasks)
    assert [prompt.kind for prompt in found] == [*kinds, "decide", "answer"]
    assert len(caplog.messages) == bool(why) and why in caplog.text


def test_a_model_decides_where_a_run_has_taught_it_to(tmp_path: Path):
    path = tmp_path / "training_config.json"
    assert not decides(tmp_path)
    for options, wanted in (({}, True), ({"train_transitions": False}, False)):
        path.write_text(json.dumps(options))
        assert decides(tmp_path) == wanted
    path.write_text("{")
    with pytest.raises(UserError, match="training_config"):
        decides(tmp_path)


def test_sample_kind_without_prompts_is_refused(options: dict):
    with pytest.raises(ConfigError, match="sample_kind"):
        Config(**options | {"sample_kind": "draw"}).resolve()


@pytest.mark.parametrize(
    ("options", "seconds", "due"),
    [
        ({}, 1.0, [10, 20, 30, 40, 50, 55]),  # 1 s in 20 s
        ({}, 4.0, [20, 40, 55]),  # 4 s in 40 s of training: a tenth of the time, about
        ({"ema": 0.9}, 4.0, [40, 55]),  # the average answers besides
        ({"sample_steps": 15}, 60.0, [15, 30, 45]),
    ],
)
def test_samples_take_a_tenth_of_the_time_at_most_unless_their_steps_are_given(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    options: dict,
    seconds: float,
    due: list[int],
):
    """Steps take 2 s each, a validation comes every 10 steps and at the end, of 55."""
    caplog.set_level("INFO", "unigen")
    clock = [0.0]
    monkeypatch.setattr(sample_plan.time, "monotonic", lambda: clock[0])
    pace, found = Pace(Config(device="cpu", **options), Engine(Config(device="cpu"))), []
    pace.took(0, seconds)
    for step in range(1, 56):
        clock[0] += 2.0
        if pace.due(step, otherwise=step % 10 == 0 or step == 55, last=step == 55):
            found.append(step)
    assert found == due
    assert (
        len(caplog.messages) == (seconds > 1.0) and "predicted" in caplog.text * (seconds > 1.0) + "predicted"
    )
