"""Checkpoints whose manifest is edited and sealed again, states, heartbeats and metrics of strangers: refused
in one line with file and key, or counted as missing; no traceback, no waiting."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from edits import edited, sampled
from saves import save

from unigen.commands.ckpt.verify import problems_of
from unigen.runs.checkpoint import (
    CheckpointError,
    manifest_hash,
    read_manifest,
    read_states,
    verify_checkpoint,
)
from unigen.runs.reader import RunFolder
from unigen.runs.states import STATES

RUN = Path(__file__).parent / "stored_run" / "run"


def seal(folder: Path, manifest: Any) -> None:
    if isinstance(manifest, dict):
        manifest["sha256"] = manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A run that was trained, to be changed."""
    return shutil.copytree(RUN, tmp_path / "run")


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resealed_manifest_works_or_is_refused_with_its_key(tmp_path: Path, every: int):
    folder = save(tmp_path, 1)
    manifest, refused = read_manifest(folder), 0
    for keys, new in sampled({k: v for k, v in manifest.items() if k != "sha256"}, every):
        seal(folder, edited({k: v for k, v in manifest.items() if k != "sha256"}, keys, new))
        try:
            verify_checkpoint(folder)
            read_states(folder)
        except CheckpointError as error:
            text, refused = str(error), refused + 1
            assert "\n" not in text and str(folder) in text and "Fix: " in text, (keys, new, text)
            assert any(str(key) in text for key in keys if isinstance(key, str)), (keys, new, text)
    assert refused > 200 / every


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_edited_state_works_or_is_refused_with_its_key(stored: Path, name: str, every: int):
    folder = max(stored.glob("step_*"))
    path, refused = folder / f"{name}.json", 0
    value = json.loads(path.read_text())
    assert read_states(folder, STATES)[name] == value
    for keys, new in sampled(value, every):
        path.write_text(json.dumps(edited(value, keys, new)))
        try:
            read_states(folder, STATES)
        except CheckpointError as error:
            text, refused = str(error), refused + 1
            assert "\n" not in text and f"{name}.json: " in text and str(keys[0]) in text, (keys, new, text)
    assert refused > 5


def test_a_promise_that_no_file_keeps_is_refused(tmp_path: Path):
    folder = save(tmp_path, 1)
    manifest = read_manifest(folder)
    for change, said in (
        ({"groups": ["ema", "model"]}, r"files lacks model\.safetensors"),
        ({"states": ["trainer", "more"]}, r"files lacks more\.json"),
        ({"step": 2}, "step is 1, manifest.json says 2"),
        ({"files": manifest["files"] | {"a\0b": {"size": 0, "sha256": ""}}}, "outside"),
        ({"time": 1e300}, "time is 1e"),
    ):
        seal(folder, manifest | change)
        with pytest.raises(CheckpointError, match=said):
            read_states(folder)


@pytest.mark.parametrize("name", ["manifest.json", "trainer.json", "ema.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "link"])
def test_what_is_no_file_of_the_checkpoint_is_refused_at_once(tmp_path: Path, name: str, kind: str):
    folder = save(tmp_path, 1)
    (folder / name).rename(tmp_path / "moved")
    if kind == "pipe":
        os.mkfifo(folder / name)
        if name != "manifest.json":  # what lies about the size, too
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"][name]["size"] = 0
            seal(folder, manifest)
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "zero" else tmp_path / "moved")
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(folder)


# ---- a run that is watched


def watch(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.update()
    assert (run.step, run.started, run.total_steps, run.clock_offset()) is not None
    for step in run.sampled:
        run.answers(step)
    for rank in run.ranks:
        assert rank.busy >= 0 and rank.quiet >= 0
    return run


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_an_edited_run_is_watched_without_a_traceback(stored: Path, every: int):
    files = [stored / "config.json", *stored.glob("ranks/rank_*.json"), *stored.glob("step_*/manifest.json")]
    files += [*stored.glob("step_*/trainer.json"), *stored.glob("samples/*/index.json")]
    assert len(files) >= 4
    for path in files:
        text = path.read_text("utf-8")
        value = json.loads(text)
        for keys, new in sampled(value, every, limit=20):
            path.write_text(json.dumps(edited(value, keys, new)), "utf-8")
            watch(stored)
        path.write_text(text, "utf-8")
    path = stored / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines()
    for keys, new in sampled(json.loads(lines[0]), every):
        path.write_text("\n".join([json.dumps(edited(json.loads(lines[0]), keys, new)), *lines[1:]]) + "\n")
        watch(stored)


def test_special_files_of_a_run_count_as_missing(stored: Path, tmp_path: Path):
    whole = watch(stored)
    assert whole.config and whole.checkpoints and whole.metrics.log.last_step
    places = ["config.json", "metrics.jsonl", "bad_steps.jsonl", ".lock", "ranks/rank_0.json"]
    places += [str(path.relative_to(stored)) for path in stored.glob("*/manifest.json")]
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    for make in (
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(tmp_path / "secret.json"),
    ):
        for place in places:
            (stored / place).parent.mkdir(exist_ok=True)
            (stored / place).unlink(missing_ok=True)
            make(stored / place)
        run = watch(stored)
        assert (run.config, run.checkpoints, run.metrics.log.last_step) == ({}, [], None)


def test_the_lock_is_no_link(tmp_path: Path):
    """Whose end would be emptied."""
    from unigen.files import hold

    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".lock").symlink_to("mine")
    with pytest.raises(OSError):
        hold(tmp_path / ".lock")
    assert (tmp_path / "mine").read_text() == "precious"


def test_verify_refuses_what_a_resume_refuses(tmp_path: Path):
    folder = save(tmp_path, 1)
    manifest = read_manifest(folder)
    for key, new in (("step", 0), ("groups", []), ("groups", ["optimizer"]), ("states", [])):
        seal(folder, {**manifest, key: new})
        problems = problems_of(folder)
        assert any(key in problem for problem in problems), (key, new, problems)
    seal(folder, manifest)
    assert problems_of(folder) == []
