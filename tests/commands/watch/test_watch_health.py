"""Running, hung, dead, stopped or finished: told from heartbeats, lock, processes and steps, whatever the
clocks say."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorded import GB, record, row, validation, write_checkpoint, write_metrics, write_rank

from unigen.commands.watch import health
from unigen.commands.watch.health import diagnose, speed, warnings
from unigen.runs import reader as module
from unigen.runs.reader import RunFolder, WatchError, find_runs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of 60 of 2,000 steps on two processes of another machine, alive."""
    monkeypatch.setattr(module, "free_bytes", lambda path: 10_000 * GB)
    return record(tmp_path / "run", 60, ranks=2)


def look(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.update()
    return run


def state(folder: Path) -> tuple[str, list[str]]:
    found = diagnose(look(folder))
    return found.name, [told.key for told in found.why]


def keys(folder: Path) -> list[str]:
    run = look(folder)
    return [warning.key for warning in warnings(run, diagnose(run))]


def hold_lock(folder: Path) -> subprocess.Popen:
    """Another process that holds the run's lock."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held',"
        " flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(folder / ".lock")]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_healthy_run_is_running_without_a_warning(folder):
    assert state(folder) == ("running", ["heartbeat"]) and keys(folder) == []


def test_no_heartbeat_for_long_is_dead(folder):
    for rank in (0, 1):
        write_rank(folder, rank, step=60, time=time.time() - 300, since=time.time() - 310)
    assert state(folder) == ("dead", ["no_heartbeat"])
    (told,) = diagnose(look(folder)).why
    assert (
        told.values["step"] == 60
        and told.values["phase"] == "forward/backward"
        and 299 < told.values["ago"] < 330
    )


def test_one_silent_process_is_a_hung_run_and_named(folder):
    write_rank(
        folder, 1, step=59, time=time.time() - 300, since=time.time() - 310, host="node-7", phase="data"
    )
    assert state(folder) == ("hung", ["silent"])
    values = diagnose(look(folder)).why[0].values
    assert (values["rank"], values["host"], values["step"], values["phase"]) == (1, "node-7", 59, "data")


def test_a_phase_longer_than_hang_timeout_is_hung_and_a_long_one_a_warning(folder):
    write_rank(folder, 1, since=time.time() - 2000, step=60)
    assert state(folder) == ("hung", ["stuck"])
    write_rank(folder, 1, since=time.time() - 500, step=60)
    assert state(folder)[0] == "running" and keys(folder) == ["long_phase"]
    write_rank(folder, 1, since=time.time() - 9000, step=60, quiet=3.0, phase="validating")
    assert state(folder)[0] == "running" and keys(folder) == [], "a long phase that goes on"
    write_rank(folder, 1, since=time.time() - 2, step=60, quiet=2000.0, phase="")
    assert state(folder) == ("hung", ["stuck"])
    (folder / "config.json").write_text(json.dumps({"hang_timeout": 0, "save_steps": 500}))
    write_rank(folder, 1, since=time.time() - 2000, step=60)
    assert state(folder)[0] == "running", "a timeout of 0 is off"


def test_a_killed_process_of_this_machine_is_dead_at_once(folder):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for rank in (0, 1):
        write_rank(folder, rank, step=60, host=platform.node(), pid=gone.pid)
    assert state(folder) == ("dead", ["process_gone"])
    write_rank(folder, 0, step=60, host=platform.node(), pid=os.getpid())
    write_rank(folder, 1, step=60, host=platform.node(), pid=os.getpid())
    assert state(folder)[0] == "running"


def test_the_lock_tells_and_is_not_taken(folder):
    """Held: alive without any heartbeat, hung with old ones. A look at it leaves it with its holder, and free
    where it was free."""
    for path in (folder / "ranks").iterdir():
        path.unlink()
    holder = hold_lock(folder)
    try:
        assert state(folder) == ("running", ["lock_held"])
        write_rank(folder, 0, time=time.time() - 300)
        assert state(folder) == ("hung", ["silent", "lock_held"])
        with open(folder / ".lock", "a+") as file, pytest.raises(BlockingIOError):
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        holder.communicate("")
    assert state(folder)[0] == "dead"
    second = hold_lock(folder)  # would wait for ever, had the look taken the lock
    second.communicate("")


def test_all_steps_done_is_finished(folder):
    for rank in (0, 1):
        write_rank(folder, rank, step=2000, total_steps=2000, time=time.time() - 4000)
    assert state(folder) == ("finished", ["all_steps"])
    for rank in (0, 1):
        write_rank(folder, rank, step=2000, total_steps=2000, phase="ended")
    assert state(folder) == ("finished", ["all_steps"])


def test_a_goodbye_before_the_end_is_stopped_with_its_reason(folder):
    for rank in (0, 1):
        write_rank(folder, rank, step=60, total_steps=2000, phase="stopped", why="SIGTERM")
    assert state(folder) == ("stopped", ["said_goodbye", "reason"])
    for rank in (0, 1):
        write_rank(folder, rank, step=60, total_steps=2000, phase="ended", signal="SIGTERM")
    assert state(folder) == ("stopped", ["ended_ago", "resumes"])


def test_without_heartbeats_and_lock_it_is_stopped_or_new(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", [row(1, random.Random(0))])
    assert state(tmp_path) == ("stopped", ["no_process"])
    (tmp_path / "metrics.jsonl").write_text("")
    assert state(tmp_path) == ("new", ["nothing_yet"])


def test_clocks_that_differ_deceive_nobody_for_long(folder, monkeypatch):
    """A clock an hour behind looks dead at first, alive once a heartbeat has changed; one ahead looks dead
    when it stands still."""
    behind = time.time() - 3600
    for rank in (0, 1):
        write_rank(folder, rank, time=behind, since=behind - 1, step=60)
    run = look(folder)
    assert diagnose(run).name == "dead"
    for rank in (0, 1):
        write_rank(folder, rank, time=behind + 2, since=behind + 1, step=60)
    run.update()
    assert diagnose(run).name == "running" and [w.key for w in warnings(run, diagnose(run))] == [
        "clock_behind"
    ]

    ahead = time.time() + 3600
    for rank in (0, 1):
        write_rank(folder, rank, time=ahead, since=ahead - 1, step=60)
    run = look(folder)
    assert diagnose(run).name == "running" and [w.key for w in warnings(run, diagnose(run))] == [
        "clock_ahead"
    ]
    later = time.monotonic() + 100
    monkeypatch.setattr(time, "monotonic", lambda: later)
    run.update()
    assert diagnose(run).name == "dead"


# ---- numbers


def test_speed_and_time_left_come_from_the_logs_times(folder):
    """2.9 s a step and 1,940 to go."""
    pace = speed(look(folder))
    assert pace.seconds_per_step == pytest.approx(2.9) and pace.eta == pytest.approx(1940 * 2.9)
    assert pace.tokens_per_second == pytest.approx(21_500, rel=0.02) and 0 < pace.data_wait < 0.03


def test_the_night_before_a_run_was_resumed_is_no_time_of_its_steps(folder):
    """40 of the last 100 steps before, 60 after."""
    rows = [row(step, random.Random(step)) for step in range(1, 101)]
    for line in rows[:40]:
        line["time"] -= 8 * 3600
    write_metrics(folder / "metrics.jsonl", rows)
    assert speed(look(folder)).seconds_per_step > 200
    write_rank(folder, 0, step=100, total_steps=2000, started=rows[40]["time"] - 1.0)
    pace = speed(look(folder))
    assert pace.seconds_per_step == pytest.approx(2.9) and pace.eta == pytest.approx(1900 * 2.9)


def test_speed_without_times_comes_from_durations_heartbeats_or_checkpoints(folder):
    def write(**changes) -> None:
        values = [row(step, random.Random(step)) | changes for step in range(1, 61)]
        write_metrics(
            folder / "metrics.jsonl", [{name: v for name, v in r.items() if name != "time"} for r in values]
        )

    write(seconds=4.0)
    assert speed(look(folder)).seconds_per_step == 4.0
    write()
    assert speed(look(folder)).seconds_per_step is None and speed(look(folder)).eta is None
    run = look(folder)
    told = json.loads((folder / "ranks" / "rank_0.json").read_text())
    (folder / "ranks" / "rank_0.json").write_text(json.dumps(told | {"time": told["time"] + 10, "step": 64}))
    run.update()
    assert speed(run).seconds_per_step == pytest.approx(2.5)
    write_checkpoint(folder, "step_24", 24, age=200)
    assert speed(look(folder)).seconds_per_step == pytest.approx((200 + 10) / 40, rel=0.02)


def with_rows(folder: Path, *changes: dict) -> list[str]:
    """Warnings of a run whose last steps log ``changes``."""
    first = [row(step, random.Random(step)) for step in range(1, 121)]
    last = [row(121 + n, random.Random(n)) | change for n, change in enumerate(changes)]
    write_metrics(folder / "metrics.jsonl", first + last)
    return keys(folder)


def test_each_warning_is_raised_by_its_cause_and_by_nothing_else(folder):
    assert with_rows(folder) == []
    assert with_rows(folder, {"loss": None, "nonfinite": ["loss"]}) == ["not_finite"]
    assert with_rows(folder, {"skipped": 1.0}) == ["skipped"]
    assert with_rows(folder, *[{"grad_norm": 50.0}] * 10) == ["norm_grows"]
    assert with_rows(folder, *[{"grad_norm": 50.0}] * 4) == [], "a few spikes are no growth"
    assert with_rows(folder, *[{"data_wait": 0.3}] * 60) == ["data_wait"]
    write_metrics(folder / "metrics.jsonl", [row(step, random.Random(step)) for step in range(1, 121)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("nonsense\n")
    assert keys(folder) == ["unreadable"]


def test_validations_that_get_no_better_are_counted(folder):
    def losses(*values: float, first: int = 100) -> list[str]:
        rows = [row(n, random.Random(n)) for n in range(1, 100)]
        rows += [
            validation(first + n, random.Random(n)) | {"val_loss": value} for n, value in enumerate(values)
        ]
        write_metrics(folder / "metrics.jsonl", rows)
        return keys(folder)

    assert (
        losses(3, 2, 1, 1.1, 1.2) == []
        and losses(3, 2, 1, 1.1, 1.2, 1.05) == ["no_better"]
        and losses(3, 2, 1, 2, 2, 0.9) == []
    )
    assert losses(1, 4, 3, 2, first=0) == [], (
        "step 0 is what the run began with, and not its best here either"
    )


def test_a_drift_on_the_probe_is_told(folder):
    rows = [row(n, random.Random(n)) for n in range(1, 100)]
    for drift, told in ((0.05, []), (0.2, ["drift"])):
        last = validation(100, random.Random(0)) | {"probe/drift/image": drift}
        write_metrics(folder / "metrics.jsonl", [*rows, last])
        assert keys(folder) == told


def test_a_missing_and_an_old_checkpoint(folder):
    write_rank(folder, 0, step=700, total_steps=2000)
    write_rank(folder, 1, step=700)
    assert keys(folder) == [], "due every 500, and 700 are fewer than half as many again"
    write_rank(folder, 0, step=800, total_steps=2000)
    write_rank(folder, 1, step=800)
    assert keys(folder) == ["no_checkpoint"]
    write_checkpoint(folder, "step_500", 500, age=60)
    assert keys(folder) == []
    write_checkpoint(folder, "step_600", 600, age=4 * 3600)
    assert keys(folder) == ["old_checkpoint"]


def test_a_disk_that_cannot_hold_the_next_checkpoint(folder, monkeypatch):
    write_checkpoint(folder, "step_50", 50, age=60, size=100 * GB)
    for free, wanted in ((121.5, []), (120.5, ["disk_full"])):  # 1.2 x 100 and min_free_gb
        monkeypatch.setattr(module, "free_bytes", lambda path, free=free: int(free * GB))
        assert keys(folder) == wanted
    run = look(folder)
    told = next(one.values for one in warnings(run, diagnose(run)) if one.key == "disk_full")
    assert (told["need"], told["stay"]) == (120 * GB, GB)
    finished = diagnose(run)._replace(name="finished")
    assert "disk_full" not in [one.key for one in warnings(run, finished)], "no checkpoint is to come"


def test_a_disk_without_what_is_to_stay_free_before_the_first_checkpoint(folder, monkeypatch):
    for free, wanted in ((2, []), (0.5, ["disk_reserve"])):
        monkeypatch.setattr(module, "free_bytes", lambda path, free=free: int(free * GB))
        assert keys(folder) == wanted


def test_processes_apart_stacks_and_half_written_checkpoints(folder):
    write_rank(folder, 1, step=57)
    assert keys(folder) == ["behind"]
    (folder / "ranks" / "rank_1.stack.txt").write_text("...")
    assert sorted(keys(folder)) == ["behind", "stack_written"]
    (folder / ".step_500.partial-77").mkdir()
    assert look(folder).writing == ["step_500"] and "half_written" not in keys(folder)
    for rank in (0, 1):
        write_rank(folder, rank, time=time.time() - 300)
    assert "half_written" in keys(folder)


# ---- a folder of anything


STRANGE = [
    "",
    "{",
    "null",
    "[]",
    "7",
    '"x"',
    '{"a": 1}',
    "[" * 100_000,
    "\x00",
    '{"files": [], "step": "x"}',
    '{"rank": {}}',
    "NaN",
]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_files_of_any_content_are_as_if_they_were_not_there(text, folder):
    """Every file of the run replaced by nonsense: a look still says what little is known."""
    for path in sorted(folder.rglob("*.json*")):
        path.write_text(text)
    run = look(folder)
    found = diagnose(run)
    warnings(run, found)
    assert (
        found.name in ("new", "stopped")
        and run.ranks == []
        and run.checkpoints == []
        and speed(run).eta is None
    )
    assert all(run.answers(step) == [] for step in run.sampled)


def test_the_files_of_another_version_may_lack_anything(folder):
    for name in ("rank_0.json", "rank_1.json"):
        told = json.loads((folder / "ranks" / name).read_text())
        for key in list(told):
            (folder / "ranks" / name).write_text(json.dumps({k: v for k, v in told.items() if k != key}))
            diagnose(look(folder))
    (folder / "step_5").mkdir()
    (folder / "step_5" / "manifest.json").write_text(
        '{"step": 5, "files": {"a": 3, "b": {"size": "x"}, "c": {"size": 7}}}'
    )
    (found,) = look(folder).checkpoints
    assert (found.step, found.size, found.world) == (5, 7, 1)


def test_a_samples_picture_lies_in_its_folder(folder):
    """A run may come from someone else: its index names no file of this machine."""
    (folder / "secret.png").write_bytes(b"secret")
    place = folder / "samples" / "step_7"
    place.mkdir(parents=True)
    (place / "link.png").symlink_to(folder / "secret.png")
    (place / "own.png").write_bytes(b"own")
    names = [
        "../../secret.png",
        str(folder / "secret.png"),
        "link.png",
        "gone.png",
        "a\0b",
        "",
        ".",
        None,
        7,
        "own.png",
    ]
    pieces = [{"image": name} for name in names] + [{"text": 7}, "x", {"text": "words"}]
    (place / "index.json").write_text(
        json.dumps([{"prompt": "p", "seed": "x", "pieces": pieces}, {"pieces": 3}, 4])
    )
    (answer,) = look(folder).answers(7)
    assert [piece.get("text") or piece["image"].name for piece in answer.pieces] == [
        "own.png",
        "words",
    ] and answer.seed is None


def test_runs_are_found_and_a_missing_one_is_told(tmp_path):
    a, b = record(tmp_path / "a", 3, ranks=1), record(tmp_path / "b", 3, ranks=1)
    (tmp_path / "empty").mkdir()
    assert find_runs([str(tmp_path)]) == [a, b] and find_runs([str(b), str(tmp_path)]) == [b, a]
    for paths, message in (
        ([], "no run is named"),
        ([str(tmp_path / "gone")], "no such folder"),
        ([str(tmp_path / "empty")], "no run is"),
    ):
        with pytest.raises(WatchError, match=message):
            find_runs(paths)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    assert not module.is_run(tmp_path / "checkpoint")


def test_a_look_writes_nothing_and_changes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    run = look(folder)
    warnings(run, diagnose(run))
    run.update()
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_the_total_is_told_by_the_run_its_checkpoint_or_its_options(folder):
    assert look(folder).total_steps == 2000
    write_rank(folder, 0, total_steps=77)
    assert look(folder).total_steps == 77
    write_rank(folder, 0)
    write_checkpoint(folder, "step_50", 50, age=60)
    (folder / "step_50" / "trainer.json").write_text('{"total_steps": 88}')
    assert look(folder).total_steps == 88
    (folder / "step_50" / "trainer.json").write_text('{"total_steps": "many"}')
    assert look(folder).total_steps == 2000
    (folder / "config.json").write_text("{}")
    assert look(folder).total_steps is None


def test_every_evidence_and_warning_has_its_words():
    """All keys that this module names are in the table of words."""
    import re

    from unigen.show.language import Words

    source = Path(health.__file__).read_text("utf-8")
    named = set(re.findall(r'(?:Told|_bad|_warn|level)\("(\w+)"', source))
    assert len(named) > 20 and sorted(named - set(Words("en", "watch").texts)) == []
