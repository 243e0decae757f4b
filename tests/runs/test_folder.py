"""The folder of a run: held by one run at a time; a new run finds it empty, and the earlier one whole beside
it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import metrics

from unigen.config import Config, UserError
from unigen.runs.checkpoint import verify_checkpoint
from unigen.runs.folder import prepare_folder
from unigen.runs.layout import FILES, FOLDERS
from unigen.training.trainer import UnifiedTrainer

# ---- an earlier run


def leave_a_run(folder: Path, *checkpoints: int) -> dict[str, bytes]:
    """What a run leaves, each file with content of its own; the content by name."""
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_text(f"earlier {name}")
    for name in (*FOLDERS, *(f"step_{n}" for n in checkpoints)):
        file = folder / name / ("step_2/index.json" if name == "samples" else "file")
        file.parent.mkdir(parents=True)
        file.write_text(f"earlier {name}")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_begins_anew_finds_the_earlier_one_set_aside_whole(
    tmp_path: Path, resume: str | None, caplog
):
    left = leave_a_run(tmp_path, *((2, 10) if resume is None else ()))
    prepare_folder(tmp_path, Config(resume_from_checkpoint=resume)).close()
    assert contents(tmp_path / "old-1") == left
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "config.json", "old-1"}
    assert ("(to step 10)" in caplog.text and "--resume_from_checkpoint auto" in caplog.text) == (
        resume is None
    )
    leave_a_run(tmp_path, 1)
    prepare_folder(tmp_path, Config(resume_from_checkpoint=None)).close()
    assert contents(tmp_path / "old-1") == left and (tmp_path / "old-2" / "step_1").is_dir()


@pytest.mark.parametrize(
    "options",
    [{"resume_from_checkpoint": "auto"}, {"resume_from_checkpoint": "elsewhere/step_2"}, {"dry_run": True}],
)
def test_a_run_that_goes_on_or_is_only_tried_moves_nothing(tmp_path: Path, options: dict[str, Any]):
    left = leave_a_run(tmp_path, 2)
    prepare_folder(tmp_path, Config(**options)).close()
    found = contents(tmp_path)
    assert found.pop("config.json") == left.pop("config.json") or not options.get("dry_run")
    assert found == left


@pytest.mark.parametrize("moved", range(len(FILES) + len(FOLDERS) + 1))
def test_a_kill_while_it_is_set_aside_tears_nothing_apart(
    tmp_path: Path, moved: int, monkeypatch: pytest.MonkeyPatch
):
    left = leave_a_run(tmp_path, 2)
    rename, done = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        prepare_folder(tmp_path, Config())
    prepare_folder(tmp_path, Config()).close()
    assert contents(tmp_path / "old-1") == left and not (tmp_path / "old-2").exists()


@pytest.mark.parametrize("model", ["step_2", "best", "step_2/inner"])
def test_weights_that_would_be_moved_away_are_refused(tmp_path: Path, model: str):
    left = leave_a_run(tmp_path, 2)
    with pytest.raises(
        UserError,
        match=r"holds the run whose weights this one begins with .*Fix: choose another --output_dir",
    ):
        prepare_folder(tmp_path, Config(model_path=str(tmp_path / model)))
    assert contents(tmp_path) == left


def test_folders_of_the_user_stay_where_they_are(tmp_path: Path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "cat.png").write_text("no answer of a model")
    (tmp_path / "best").mkdir()
    prepare_folder(tmp_path, Config()).close()
    assert (tmp_path / "samples" / "cat.png").exists() and (tmp_path / "best").exists(), (
        "no run has been here"
    )
    (tmp_path / "metrics.jsonl").write_text("")
    prepare_folder(tmp_path, Config()).close()
    assert (tmp_path / "samples" / "cat.png").exists() and (tmp_path / "old-1" / "metrics.jsonl").exists()


def test_the_folder_of_a_model_is_refused(options: dict[str, Any]):
    """Its config.json says what the model is."""
    model = Path(options["model_path"])
    before = contents(model)
    with pytest.raises(UserError, match=r"is the folder of a model.*Fix: choose another"):
        UnifiedTrainer(Config(**options | {"output_dir": str(model)})).train()
    assert contents(model) == before


def test_who_starts_anew_beside_an_earlier_run_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    leave_a_run(tmp_path, 7)
    prepare_folder(tmp_path, Config()).close()
    caplog.clear()
    prepare_folder(tmp_path, Config(resume_from_checkpoint="auto")).close()
    assert [
        f"an earlier one is in {tmp_path}/old-1 (to step 7)" in message for message in caplog.messages
    ] == [True]


def test_both_runs_are_whole_and_the_earlier_one_goes_on(options: dict[str, Any]):
    run = Path(options["output_dir"])
    UnifiedTrainer(Config(**options)).train()
    first = contents(run)
    UnifiedTrainer(Config(**options | {"seed": 7})).train()
    assert contents(run / "old-1") == {
        name: data for name, data in first.items() if not name.startswith("ranks/")
    }
    verify_checkpoint(run / "old-1" / "step_2")
    verify_checkpoint(run / "step_2")
    assert metrics(run) != metrics(run / "old-1")
    more = {"output_dir": str(run / "old-1"), "resume_from_checkpoint": "auto", "max_steps": 4}
    UnifiedTrainer(Config(**options | more)).train()
    assert [line["step"] for line in metrics(run / "old-1")] == [1, 2, 3, 4]
    assert json.loads((run / "config.json").read_text())["seed"] == 7


# ---- the lock


def test_a_folder_in_use_is_refused_and_free_again_after_kill_9(options: dict[str, Any], tmp_path: Path):
    """Two runs into one folder: passes when the second is refused, touches nothing and names the first; after
    ``kill -9`` it may."""
    folder = Path(options["output_dir"])
    folder.mkdir(parents=True)
    code = f"""
import time
from pathlib import Path
from unigen.runs.folder import lock_folder
held = lock_folder(Path({str(folder)!r}))
print("held", flush=True)
time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=rf"in use by process {holder.pid} on .*Fix: wait for its end or stop it"
        ):
            UnifiedTrainer(Config(**options)).train()
        assert not (folder / "config.json").exists() and not list(folder.glob("step_*")), (
            "nothing was touched"
        )
    finally:
        holder.kill()
        holder.wait()
    UnifiedTrainer(Config(**options)).train()
    assert (folder / "step_2" / "manifest.json").exists()
