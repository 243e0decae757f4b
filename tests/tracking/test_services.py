"""Trackers in a process of their own, with a package that hangs, fails, dies or is missing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import ROOT, alive, descendants, log_lines, run, wait_for, warnings

from unigen.tracking import services

PACKAGE = """
import json, os, signal, time
Settings = dict
def write(**row):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(row) + "\\n")
class Run:
    url = "https://example.invalid/run"
    def log(self, row, step):
        {log}
        write(step=step, loss=row["loss"])
    def finish(self, exit_code=0):
        {finish}
        write(finish=exit_code)
def init(**given):
    print("noise on stdout")
    {init}
    write(init=given["id"], resume=given["resume"], mode=given["mode"])
    return Run()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a package called wandb in the place of the real one; gives what it was told."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "fake.log"))
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(filter(None, [str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])),
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr(services, "PAUSE_S", 0.0)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def make(whole: str | None = None, **parts: str) -> None:
        code = whole or PACKAGE.format(
            **{name: parts.get(name, "pass") for name in ("log", "finish", "init")}
        )
        (tmp_path / "modules" / "wandb.py").write_text(code)

    make.told = lambda: [json.loads(line) for line in (tmp_path / "fake.log").read_text().splitlines()]  # type: ignore[attr-defined]
    make()
    return make


def test_every_call_arrives_in_its_order_and_the_end_is_told(tmp_path: Path, package, caplog):
    with caplog.at_level("INFO"):
        run(tmp_path / "run", range(1, 6)).finish()
    run_id = (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert package.told() == [
        {"init": run_id, "resume": None, "mode": None},
        *({"step": step, "loss": 1 / step} for step in range(1, 6)),
        {"finish": 0},
    ]
    assert caplog.messages == ["Weights & Biases: https://example.invalid/run"]


def test_a_run_that_ends_with_an_error_is_shown_as_failed(tmp_path: Path, package):
    tracker = run(tmp_path / "run", range(1, 2))
    try:
        raise RuntimeError
    except RuntimeError:
        tracker.finish()
    assert package.told()[-1] == {"finish": 1}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"whole": "raise ImportError('no such thing')"}, ["Tracker wandb cannot start"]),
        ({"whole": "1 / 0"}, ["Tracker wandb cannot start"]),
        ({"whole": "import os; os._exit(3)"}, 3),
        (
            {"init": "raise TimeoutError('unreachable')"},
            [
                "Tracker wandb cannot start as asked and goes on with mode offline",
                "Tracker wandb cannot start",
            ],
        ),
        (
            {"log": "raise OSError('gone')"},
            ["Tracker wandb cannot log and is started again", "Tracker wandb cannot log again"],
        ),
        ({"log": "os.kill(os.getpid(), signal.SIGKILL)"}, 3),
        (
            {"finish": "raise OSError('gone')"},
            ["Tracker wandb cannot finish and is started again", "Tracker wandb cannot finish again"],
        ),
    ],
    ids=[
        "not there",
        "import fails",
        "import ends the process",
        "start fails",
        "log fails",
        "log ends the process",
        "finish fails",
    ],
)
def test_a_broken_package_is_told_and_stops_nothing(tmp_path: Path, package, parts, said, caplog):
    if said == 3:
        said = ["Tracker wandb has stopped and is started again", "Tracker wandb has stopped again"]
    package(**parts)
    run(tmp_path / "run", range(1, 4)).finish()
    assert warnings(caplog) == said
    assert [row["step"] for row in log_lines(tmp_path / "run")] == [1, 2, 3]


def test_without_the_package_the_cure_is_told(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    tracker = run(tmp_path, range(1, 3), trackio_project="cats")
    tracker.finish()
    assert warnings(caplog) == ["Tracker wandb cannot start", "Tracker trackio cannot start"]
    assert "pip install wandb" in caplog.text and "pip install trackio" in caplog.text
    assert len(log_lines(tmp_path)) == 2


def test_a_killed_process_is_started_again_and_no_step_is_missing(tmp_path: Path, package, caplog):
    """Pass: killed with SIGKILL in the middle, it goes on in the same run, and every step was logged, in
    order."""
    tracker = run(tmp_path / "run", range(1, 4))
    wait_for(lambda: (tmp_path / "fake.log").exists() and len(package.told()) == 4)
    os.kill(tracker._backends["wandb"]._process.pid, signal.SIGKILL)
    for step in range(4, 8):
        tracker.log({"loss": 1 / step}, step)
    tracker.finish()
    told = package.told()
    second = [i for i, row in enumerate(told) if "init" in row][1]
    assert [row["step"] for row in told[1:second]] == [1, 2, 3][: second - 1]
    steps = [row["step"] for row in told[second + 1 : -1]]
    assert steps == list(range(steps[0], 8)) and steps[0] <= 4, (
        "what was done just before the kill may be lost with it"
    )
    assert [row["resume"] for row in told if "init" in row] == [None, "allow"] and len(
        {row.get("init") for row in told} - {None}
    ) == 1
    assert warnings(caplog) == ["Tracker wandb has stopped and is started again"]


def test_old_calls_are_not_repeated_and_steps_are_repeated_whole(tmp_path: Path, package, monkeypatch):
    """Pass: of what was done, the second life is given what is younger than REPEAT_S from the start of a
    step, and told where it begins."""
    tracker = run(tmp_path / "run", range(1, 4))
    service = tracker._backends["wandb"]
    tracker.log({"loss": 0.0}, 3)
    wait_for(lambda: len(service._done) == 4)
    with service._changed:  # as if all but the last had been done long ago
        for i in range(3):
            service._done[i] = (service._done[i][0] - 2 * services.REPEAT_S, service._done[i][1])
    os.kill(service._process.pid, signal.SIGKILL)
    tracker.log({"loss": 1 / 4}, 4)
    tracker.finish()
    rows = [(row["step"], row["loss"]) for row in package.told() if "step" in row]
    assert rows == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (3, 0.0), (3, 1 / 3), (3, 0.0), (4, 1 / 4)]
    assert service._request["resume_step"] == 2


def test_a_package_that_hangs_holds_nothing(tmp_path: Path, package, caplog, monkeypatch):
    """Pass: 3000 calls take less than 2 s, the memory for them is bounded, and the end comes within its limit
    and leaves no process."""
    package(log="time.sleep(1000)")
    monkeypatch.setattr(services, "MAX_WAITING", 1000)
    monkeypatch.setattr(services, "SLOW_S", 0.5)
    monkeypatch.setattr(services, "FINISH_S", 1.0)
    tracker = run(tmp_path / "run", range(1, 3))
    wait_for((tmp_path / "fake.log").exists)
    began = time.monotonic()
    for step in range(3, 3000):
        tracker.log({"loss": 0.0}, step)
    assert time.monotonic() - began < 2
    service = tracker._backends["wandb"]
    assert len(service._calls) == 1000
    began = time.monotonic()
    tracker.finish()
    assert time.monotonic() - began < 4
    assert set(warnings(caplog)) >= {"Tracker wandb is too slow", "Tracker wandb did not end in time"}
    assert service._process.poll() == -signal.SIGKILL and not service._thread.is_alive()
    assert len(log_lines(tmp_path / "run")) == 2999


def test_a_slow_service_is_told_of(tmp_path: Path, package, caplog, monkeypatch):
    package(log="time.sleep(1000)")
    monkeypatch.setattr(services, "SLOW_S", 0.2)
    monkeypatch.setattr(services, "FINISH_S", 0.1)
    tracker = run(tmp_path / "run", range(1, 3))
    time.sleep(0.5)
    tracker.log({"loss": 1.0}, 3)
    assert warnings(caplog) == ["Tracker wandb does not answer"]
    tracker.finish()


TRAINING = """
import os, sys, time
from pathlib import Path
from unigen.config import Config
from unigen.tracking.tracker import Tracker
tracker = Tracker(Path(sys.argv[1]), Config(wandb_project="cats"))
tracker.log({"loss": 1.0}, 1)
print("logged", flush=True)
time.sleep(60)
"""


def test_when_the_training_is_killed_a_hanging_service_ends_too(tmp_path: Path, package):
    """Pass: the process that is in a call which never comes back is gone within FINISH_S and a few
    seconds."""
    package(log="write(hangs=True); time.sleep(1000)")
    code = TRAINING.replace(
        "tracker = ", "from unigen.tracking import services; services.FINISH_S = 0.5\ntracker = ", 1
    )
    training = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (tmp_path / "fake.log").exists() and len(package.told()) == 2)
        (service,) = descendants(training.pid)
    finally:
        training.kill()
        training.wait()
    wait_for(lambda: not alive(service), 15)


def test_when_the_training_is_killed_its_service_ends_the_run_as_failed(tmp_path: Path, package):
    """Pass: a Ctrl-C for the group and SIGTERM for the service change nothing; after SIGKILL of the training
    the service finishes."""
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert training.stdout is not None and training.stdout.readline() == b"logged\n"
        wait_for(lambda: (tmp_path / "fake.log").exists() and len(package.told()) == 2)
        (service,) = descendants(training.pid)
        assert os.getpgid(service) != os.getpgid(training.pid), "a Ctrl-C in the terminal would end it"
        os.kill(service, signal.SIGTERM)
        os.kill(service, signal.SIGINT)
    finally:
        training.kill()
        training.wait()
    wait_for(lambda: not alive(service))
    assert package.told()[1:] == [{"step": 1, "loss": 1.0}, {"finish": 1}]
