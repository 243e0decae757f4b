"""What a resumed run does otherwise is told; what cannot be is refused."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from unigen.config import Config, UserError
from unigen.messages import speaking
from unigen.training.changes import _EFFECTS, _FREE, _LEARNT, _RATE, _TOLD, changes, tell_changes
from unigen.training.optim import learning_rate_at

RUN = Path("run/step_100")
BEFORE = {"max_steps": 200, "learning_rate": 1e-3, "warmup_steps": 10}


def told(step: int = 100, totals: tuple[int | None, int] | None = None, **now: Any) -> list[str]:
    config = Config(**(BEFORE | now))
    return changes(RUN, Config(**BEFORE).to_dict(), config, step, totals or (200, config.max_steps or 200))


def test_the_same_options_need_no_word():
    assert told() == []


def test_fewer_steps_move_the_learning_rate_at_once():
    (line,) = told(max_steps=120)
    assert "max_steps 200 -> 120" in line and "step 120 instead of 200" in line
    for total in (200, 120):
        assert f"{learning_rate_at(100, total, Config(**BEFORE)):.3g}" in line


@pytest.mark.usefixtures("no_plugins_after")
def test_a_plugin_by_another_name_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_nothing.py").write_text("")
    monkeypatch.chdir(tmp_path)
    before = Config(**BEFORE).to_dict() | {"plugin": ["./own_nothing.py"]}
    for name in ("own_nothing.py", "own_nothing"):
        assert changes(RUN, before, Config(**BEFORE, plugin=[name]), 100, (200, 200)) == []
    (line,) = changes(RUN, before | {"plugin": []}, Config(**BEFORE, plugin=["own_nothing"]), 100, (200, 200))
    assert line.startswith("plugin [] -> ['own_nothing']")


def test_an_end_that_lies_behind_the_checkpoint_is_not_told():
    assert told(140, max_steps=60) == ["max_steps 200 -> 60"]
    assert told(60, (50, 200), learning_rate=2e-3, max_steps=200)[0].endswith("step 200 instead of 50")


@pytest.mark.parametrize(
    ("tensorboard", "old", "lines"), [(True, True, 1), (True, False, 0), (False, True, 0)]
)
def test_other_names_in_trackers_are_told(tensorboard, old, lines, caplog: pytest.LogCaptureFixture):
    config = Config(**BEFORE, tensorboard=tensorboard)
    before = {name: value for name, value in config.to_dict().items() if not (old and name == "sample_kind")}
    tell_changes(changes(RUN, before, config, 100, (200, 200)), RUN, before, config, 100)
    assert len(caplog.messages) == lines and all("train/loss for loss" in said for said in caplog.messages)


def test_another_rate_alone_names_both_rates():
    (line,) = told(learning_rate=2e-3)
    was, becomes = (
        learning_rate_at(100, 200, Config(**(BEFORE | {"learning_rate": r}))) for r in (1e-3, 2e-3)
    )
    assert f"is {becomes:.3g} instead of {was:.3g}" in line


def test_a_checkpoint_that_does_not_say_its_steps_still_names_the_option():
    (line,) = told(totals=(None, 120), max_steps=120)
    assert "max_steps 200 -> 120" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 4}, "batch_size 1 -> 4: packed sequences"),
        ({"ema": 0.99}, "ema none -> 0.99: the average begins anew"),
        ({"text_cond_dropout_prob": 0.5}, "samples are made otherwise"),
        ({"text_loss_weight": 2.0}, "text_loss_weight 1.0 -> 2.0: the loss is weighed otherwise"),
    ],
)
def test_every_option_that_changes_the_run_is_named(options: dict[str, Any], words: str):
    (line,) = told(**options)
    assert words in line


def test_every_option_has_its_sentence_once():
    groups = [_RATE, _TOLD, _FREE, *_EFFECTS.values(), _LEARNT - _FREE, ("ema", "seed")]
    named = [name for group in groups for name in group]
    assert sorted(named) == sorted(field.name for field in fields(Config))


def test_in_chinese_values_stay_and_effects_are_chinese(caplog: pytest.LogCaptureFixture):
    config = Config(**(BEFORE | {"max_steps": 120, "text_loss_weight": 2.0}))
    with speaking("zh"):
        before = Config(**BEFORE).to_dict()
        tell_changes(changes(RUN, before, config, 100, (200, 120)), RUN, before, config, 100)
    head, rate, weight = caplog.messages
    assert "run/step_100" in head and "参数" in head
    assert rate.startswith("  max_steps 200 -> 120") and "120" in rate.partition("训练在第")[2]
    assert "text_loss_weight 1.0 -> 2.0" in weight and "损失的权重" in weight
    assert not re.search("[a-z]{3,} [a-z]{2,}", rate + weight)


def test_what_changes_nothing_is_not_told():
    assert told(output_dir="elsewhere", num_workers=3, device="cpu", resume_from_checkpoint="auto") == []


def test_what_json_writes_otherwise_is_the_same():
    config = Config(**BEFORE, fields={"text_prompt": "caption"})
    assert changes(RUN, json.loads(json.dumps(config.to_dict())), config, 100, (200, 200)) == []


@pytest.mark.parametrize(
    ("name", "path", "same", "words"),
    [
        ("model_path", "b", True, "model_path a -> b: the same weights"),
        ("model_path", "b", False, "model_path a -> b: other weights"),
        ("model_path", "a", False, "model_path a: other weights"),
        ("model_path", "b", None, "model_path a -> b: only parts"),
        ("model_path", "a", True, ""),
        ("model_path", "a", None, ""),
        ("val_data_path", "b", True, "val_data_path a -> b: the same records"),
        ("val_data_path", "b", False, "val_data_path a -> b: val_loss is of other data"),
        ("val_data_path", "a", False, "val_data_path a: val_loss is of other data"),
        ("val_data_path", "b", None, "val_data_path a -> b: val_loss is of other data"),
        ("val_data_path", "a", True, ""),
    ],
)
def test_weights_and_records_are_compared_by_what_they_are(
    name: str, path: str, same: bool | None, words: str
):
    before, now = (Config(**BEFORE | {name: one}) for one in ("a", path))
    lines = changes(RUN, before.to_dict(), now, 100, (200, 200), {name: same})
    assert len(lines) == bool(words) and all(line.startswith(words) for line in lines)


def test_another_seed_is_refused():
    with pytest.raises(UserError, match=r"seed is 7.* had 42.*--seed 42"):
        told(seed=7)
