"""The folder of a run: held by one run at a time; a new run finds it empty, and the earlier one whole beside
it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import metrics, train

from unigen.commands.watch.health import diagnose
from unigen.config import Config, UserError
from unigen.runs.checkpoint import verify_checkpoint
from unigen.runs.folder import FolderClaim
from unigen.runs.layout import FILES, FOLDERS
from unigen.runs.reader import RunFolder, find_runs
from unigen.training import trainer as trainer_module
from unigen.training.trainer import UnifiedTrainer

# ---- an earlier run


def prepare_folder(folder: Path, config: Config) -> FolderClaim:
    """The folder as a run has it that is known to work, or is only tried."""
    claim = FolderClaim(folder, config)
    if not config.dry_run:
        claim.begin()
    return claim


def leave_a_run(folder: Path, *checkpoints: int) -> dict[str, bytes]:
    """What a run leaves, each file with content of its own; the content by name."""
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_text(f"earlier {name}")
    (folder / "config.json").write_text(json.dumps(Config(seed=7).to_dict()))
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

    claim = FolderClaim(tmp_path, Config())
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        claim.begin()
    claim.close()
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
        train(options, output_dir=str(model))
    assert contents(model) == before


def test_who_starts_anew_beside_an_earlier_run_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    leave_a_run(tmp_path, 7)
    prepare_folder(tmp_path, Config()).close()
    caplog.clear()
    prepare_folder(tmp_path, Config()).close()
    assert [
        f"an earlier one is in {tmp_path}/old-1 (to step 7)" in message for message in caplog.messages
    ] == [True]


@pytest.mark.slow
def test_both_runs_are_whole_and_the_earlier_one_goes_on(options: dict[str, Any]):
    run = Path(options["output_dir"])
    train(options)
    first = contents(run)
    train(options, seed=7)
    assert contents(run / "old-1") == {
        name: data for name, data in first.items() if not name.startswith("ranks/")
    }
    verify_checkpoint(run / "old-1" / "step_2")
    verify_checkpoint(run / "step_2")
    assert metrics(run) != metrics(run / "old-1")
    more = {"output_dir": str(run / "old-1"), "resume_from_checkpoint": "auto", "max_steps": 4}
    train(options, more)
    assert [line["step"] for line in metrics(run / "old-1")] == [1, 2, 3, 4]
    assert json.loads((run / "config.json").read_text())["seed"] == 7


# ---- nothing moves before it is sure


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def finished(small_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    given = {"model_path": str(small_model), "train_data_path": str(records), "output_dir": str(folder)}
    train(given, max_steps=2, device="cpu", learning_rate=1e-3)
    return folder


FAILING: dict[str, dict[str, Any]] = {
    "model": {"model_path": "nowhere"},
    "data": {"train_data_path": "nowhere.jsonl"},
    "validation data": {"val_data_path": "nowhere.jsonl"},
    "resume": {"resume_from_checkpoint": "nowhere/step_1"},
    "cache": {"cache_dir": "nowhere"},
    "warm-up batch": {},
    "dry run": {"dry_run": True},
    "dry run, resumed": {"dry_run": True, "resume_from_checkpoint": "auto"},
}


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["over a finished run", "into a new folder"])
@pytest.mark.parametrize("case", FAILING)
def test_a_command_that_fails_or_only_tries_leaves_the_folder_as_it_was(
    options: dict[str, Any], finished: Path, tmp_path: Path, case: str, there: bool, monkeypatch
):
    folder = tmp_path / "deep" / "run"
    if there:
        shutil.copytree(finished, folder)
    before = everything(tmp_path)
    if case == "warm-up batch":

        def fails(*_: Any) -> None:
            raise UserError("out of memory")

        monkeypatch.setattr("unigen.training.trainer.warm_up", fails)
    trainer = UnifiedTrainer(Config(**options | {"output_dir": str(folder)} | FAILING[case]))
    if "dry run" in case:
        assert trainer.train() == {}
    else:
        with pytest.raises(UserError):
            trainer.train()
    found = everything(tmp_path)
    lock = "deep/run/.lock"  # says which process held it last
    assert found.keys() == before.keys()
    assert {name for name in found if found[name] != before[name]} <= ({lock} if "dry" not in case else set())


def test_the_files_of_a_start_take_the_place_of_an_earlier_runs(tmp_path: Path):
    for place, names in (
        ("ranks", ("rank_0.json", "rank_7.json", "hang.txt")),
        (".starting/ranks", ("rank_0.json",)),
    ):
        (tmp_path / place).mkdir(parents=True)
        for name in names:
            (tmp_path / place / name).write_text(place)
    claim = prepare_folder(tmp_path, Config())
    assert contents(tmp_path).keys() == {"ranks/rank_0.json", "config.json"}
    assert (tmp_path / "ranks" / "rank_0.json").read_text() == ".starting/ranks"
    assert not (tmp_path / ".starting").exists()
    claim.close()


@pytest.mark.parametrize("top", ["nothing", "a run without checkpoints"])
def test_auto_does_not_start_over_beside_an_earlier_run(tmp_path: Path, top: str):
    """Both ways on are named, and they work."""
    leave_a_run(tmp_path, 7)
    prepare_folder(tmp_path, Config()).close()
    if top != "nothing":
        leave_a_run(tmp_path)
    before = everything(tmp_path)
    for tried in (False, True):
        with pytest.raises(UserError) as error:
            FolderClaim(tmp_path, Config(resume_from_checkpoint="auto", dry_run=tried))
    assert f"{tmp_path}/old-1 those of an earlier run (to step 7)" in str(error.value)
    assert f"--output_dir {tmp_path}/old-1 --resume_from_checkpoint auto" in str(error.value)
    after = everything(tmp_path)
    assert {**after, ".lock": b""} == {**before, ".lock": b""}
    prepare_folder(tmp_path / "old-1", Config(resume_from_checkpoint="auto")).close()
    prepare_folder(tmp_path, Config()).close()


def test_auto_finishes_setting_aside_what_a_kill_tore_apart_and_does_not_go_on_from_a_part(tmp_path: Path):
    leave_a_run(tmp_path, 2, 3)
    (tmp_path / ".old.new").mkdir()
    for name in ("metrics.jsonl", "config.json", "step_3"):
        (tmp_path / name).rename(tmp_path / ".old.new" / name)
    with pytest.raises(UserError, match=r"old-1 those of an earlier run \(to step 3\)"):
        FolderClaim(tmp_path, Config(resume_from_checkpoint="auto"))
    assert {"step_2", "step_3", "metrics.jsonl"} <= {p.name for p in (tmp_path / "old-1").iterdir()}


@pytest.mark.parametrize(
    "name",
    ["config.json", "metrics.jsonl", "bad_records.jsonl", "best/a", "step_5/a", "samples/step_1/a", ".lock"],
)
def test_files_that_no_run_left_are_refused_where_a_run_would_write_them(tmp_path: Path, name: str):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match=f"holds {name.split('/')[0]}, which a run writes"):
        FolderClaim(tmp_path / "run", Config())
    assert everything(tmp_path / "run")[name] == b'{"a": 1}'


@pytest.mark.slow
def test_the_heartbeats_of_a_start_become_those_of_the_run(options: dict[str, Any], monkeypatch):
    """While it starts they stand apart, where ``unigen watch`` finds them."""
    folder = Path(options["output_dir"])
    seen: list[Any] = []
    warm_up = trainer_module.warm_up

    def looked(*given: Any) -> Any:
        (found,) = find_runs([str(folder)])
        run = RunFolder(found)
        deadline = time.monotonic() + 60
        while not run.ranks and time.monotonic() < deadline:
            run.update()
        seen.append((run.ranks[0].phase, diagnose(run).name, (folder / "ranks").exists()))
        return warm_up(*given)

    monkeypatch.setattr(trainer_module, "warm_up", looked)
    train(options)
    assert len(seen) == 1 and seen[0][1:] == ("running", False)
    assert [p.name for p in (folder / "ranks").iterdir()] == ["rank_0.json"]
    assert json.loads((folder / "ranks" / "rank_0.json").read_text())["phase"] == "ended"
    assert not (folder / ".starting").exists()


# ---- the lock


@pytest.mark.slow
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
            train(options)
        assert not (folder / "config.json").exists() and not list(folder.glob("step_*")), (
            "nothing was touched"
        )
    finally:
        holder.kill()
        holder.wait()
    train(options)
    assert (folder / "step_2" / "manifest.json").exists()
