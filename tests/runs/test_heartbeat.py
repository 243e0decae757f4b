"""Heartbeats and hung processes, with real processes that import no PyTorch."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from children import Child
from children import start as start

from unigen.messages import in_language, speaking
from unigen.runs.heartbeat import EXIT_HUNG, Heartbeat, _told
from unigen.runs.ranks import WAITING, Hang, Rank
from unigen.runs.signals import SignalHandler

# ---- hung processes

RANK = """
def never_ends():
    while True:
        time.sleep(60)

def held_by_c():
    ctypes.PyDLL(None).sleep(600)

def beats(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)
        heartbeat.beat(7)

def beats_until_ended(other):
    path = f"{folder}/rank_{other}.json"
    while not os.path.exists(path) or '"ended"' not in open(path).read():
        time.sleep(0.2)
        heartbeat.beat(7)

def waits(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)

folder, rank, world, timeout = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
with SignalHandler() as stops:
    heartbeat = Heartbeat(folder, rank, world, timeout, stops, lambda: {"total_steps": 12})
    heartbeat.beat(6)
    for step, phase, work in eval(sys.argv[5]):
        heartbeat.beat(step)
        with stops.phase(phase, breakable=phase == "data"):
            say("in", phase)
            eval(work)
    heartbeat.close()
say("done")
"""


def _ranks_of(start, folder: Path, timeout: float, plans: list[list[tuple[int, str, str]]]) -> list[Child]:
    """Processes that have all reached the last phase of their plans."""
    children = [start(RANK, folder, rank, len(plans), timeout, plan) for rank, plan in enumerate(plans)]
    for child, plan in zip(children, plans, strict=True):
        for _, phase, _ in plan:
            assert child.line() == f"in {phase}"
    return children


@pytest.mark.slow
def test_a_process_that_hangs_reports_itself_and_ends(start, tmp_path: Path):
    """In Python: EXIT_HUNG; stderr and rank_0.stack.txt say rank, host, step, phase, seconds, and where."""
    (child,) = _ranks_of(start, tmp_path / "ranks", 1.0, [[(7, "data", "never_ends()")]])
    code, _, err = child.end()
    assert code == EXIT_HUNG
    for said in (err, (tmp_path / "ranks" / "rank_0.stack.txt").read_text("utf-8")):
        head = said.splitlines()[0]
        assert head.startswith("rank 0 of 1 (host ") and f"pid {child.process.pid}" in head
        assert head.endswith("has made no progress for 1 s: step 7, phase data") and "in never_ends" in said


@pytest.mark.slow
def test_a_process_whose_interpreter_is_held_by_C_prints_its_stack_and_ends(start, tmp_path: Path):
    """No Python thread can run: faulthandler's timer prints the stack and ends the process with 1."""
    (child,) = _ranks_of(start, tmp_path / "ranks", 1.0, [[(7, "forward/backward", "held_by_c()")]])
    code, _, err = child.end()
    assert code == 1
    assert "Timeout" in err and "in held_by_c" in err


def _verdict(errs: list[str]) -> list[str]:
    """The lines about all processes, which one of them says."""
    said = [[line for line in err.splitlines() if line.startswith("unigen: ")] for err in errs]
    (lines,) = [lines for lines in said if lines]
    return lines


@pytest.mark.slow
def test_of_three_the_one_that_hangs_is_named_and_all_end(start, tmp_path: Path):
    """Rank 1 waits for data without end in step 7, the others for it in step 8: one says so, and each leaves
    its stack."""
    behind = [(6, "forward/backward", "waits(0)"), (7, "data", "never_ends()")]
    waiting = [(7, "data", "waits(0)"), (8, "forward/backward", "waits(600)")]
    children = _ranks_of(start, tmp_path, 1.5, [waiting, behind, waiting])
    errs = []
    for rank, child in enumerate(children):
        code, _, err = child.end()
        assert code == EXIT_HUNG, (rank, err)
        stack = (tmp_path / f"rank_{rank}.stack.txt").read_text("utf-8")
        assert all(("in never_ends" if rank == 1 else "in waits") in said for said in (stack, err))
        errs.append(err)
    first, second = _verdict(errs)
    assert first.startswith("unigen: rank 1: step 7, phase data, hangs for ")
    assert second.startswith("unigen: ranks 0, 2: step 8, phase forward/backward, waits for ")
    assert (tmp_path / "hang.txt").read_text("utf-8").splitlines() == [first, second]


@pytest.mark.slow
def test_frozen_and_killed_ranks_are_named_by_the_others(start, tmp_path: Path):
    """Of four, rank 1 is stopped by SIGSTOP, and rank 2, which still moved when the others were late, is
    killed: another one says that they give no sign of life, and the others end."""
    plan = [(7, "forward/backward", "waits(600)")]
    zero, one, two, three = _ranks_of(
        start, tmp_path, 2.0, [plan, plan, [(7, "sampling", "beats(600)")], plan]
    )
    for rank, phase in ((1, "forward/backward"), (2, "sampling")):
        _await_beat(tmp_path / f"rank_{rank}.json", phase)
    one.send(signal.SIGSTOP)
    end = time.monotonic() + 30
    while not (tmp_path / "rank_0.stack.txt").exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)
    two.send(signal.SIGKILL)
    two.process.wait()
    ends = [child.end() for child in (zero, three)]
    assert [code for code, _, _ in ends] == [EXIT_HUNG] * 2
    lines = _verdict([err for _, _, err in ends])
    assert len(lines) == 3
    for rank, phase, line in ((1, "forward/backward", lines[0]), (2, "sampling", lines[1])):
        assert line.startswith(f"unigen: rank {rank}: step 7, phase {phase}, no sign of life for "), line
    assert lines[2].startswith("unigen: ranks 0, 3: step 7, phase forward/backward, waits for ")
    assert not (tmp_path / "rank_1.stack.txt").exists()


@pytest.mark.slow
def test_slow_is_not_hung_nor_is_waiting_for_who_is_slow(start, tmp_path: Path):
    """Rank 1 beats within the timeout while its phase lasts longer; rank 0 waits for it, for longer than the
    timeout and less than twice: it prints its stack and goes on. Both finish; no stack is left, the last
    heartbeats say that they ended."""
    slow = [(7, "sampling", "beats_until_ended(0)")]
    waiting = [(7, "forward/backward", "waits(3.6)")]
    children = _ranks_of(start, tmp_path, 2.0, [waiting, slow])
    (zero, _, said), (one, _, quiet) = (child.end() for child in children)
    assert (zero, one) == (0, 0), said + quiet
    assert said.startswith("rank 0 of 2") and "in waits" in said and "unigen: " not in said
    assert quiet == ""
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["rank_0.json", "rank_1.json"]
    assert {json.loads(path.read_text())["phase"] for path in tmp_path.glob("*.json")} == {"ended"}
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.stack.txt"))


@pytest.mark.slow
def test_time_in_which_the_process_is_frozen_does_not_count(start, tmp_path: Path):
    """SIGSTOP for longer than the timeout, then SIGCONT: no alarm."""
    (child,) = _ranks_of(start, tmp_path, 1.0, [[(7, "data", "beats(1.5)")]])
    time.sleep(0.4)
    child.send(signal.SIGSTOP)
    time.sleep(1.5)
    child.send(signal.SIGCONT)
    assert child.end()[0::2] == (0, "")


@pytest.mark.slow
def test_a_hung_process_ends_and_says_so_without_a_disk(start, tmp_path: Path):
    """The folder of heartbeats cannot be made, so nothing is known of the other process."""
    (tmp_path / "ranks").write_text("")
    child = start(RANK, tmp_path / "ranks", 0, 2, 1.0, [(7, "data", "never_ends()")])
    code, _, err = child.end()
    assert code == EXIT_HUNG and "in never_ends" in err
    first, second = _verdict([err])
    assert first.startswith("unigen: rank 1: no heartbeat in ")
    assert second.startswith("unigen: rank 0: step 7, phase data, hangs for ")


@pytest.mark.slow
def test_a_stop_is_not_in_the_way_of_the_report(start, tmp_path: Path):
    """A process that hangs with a signal asking it to stop still reports and ends."""
    (child,) = _ranks_of(start, tmp_path, 1.0, [[(7, "saving", "never_ends()")]])
    child.send(signal.SIGTERM)
    code, _, err = child.end()
    assert code == EXIT_HUNG and "SIGTERM: phase saving is finished" in err and "in never_ends" in err
    assert json.loads((tmp_path / "rank_0.json").read_text())["signal"] == "SIGTERM"


# ---- heartbeats


def test_heartbeats_say_where_a_process_is(tmp_path: Path):
    """Every field; phase and step as they are now; what an earlier run left is gone, the other ranks' files
    of this one are not."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    for name in (
        "rank_0.stack.txt",
        "rank_1.json",
        "rank_2.json",
        "rank_11.stack.txt",
        ".rank_2.json.partial",
        "notes.txt",
    ):
        (folder / name).write_text("{}")
    with SignalHandler() as stops:
        before = time.time()
        heartbeat = Heartbeat(folder, 0, 2, 2.0, stops, lambda: {"total_steps": 12})
        heartbeat.beat(4)
        with stops.phase("saving"):
            beat = _await_beat(folder / "rank_0.json", "saving")
        heartbeat.close()
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "rank_0.json", "rank_1.json"]
    assert (beat["rank"], beat["world"], beat["step"], beat["pid"], beat["total_steps"]) == (
        0,
        2,
        4,
        os.getpid(),
        12,
    )
    assert before <= beat["since"] <= beat["time"] <= time.time() and beat["host"] and beat["quiet"] >= 0
    assert json.loads((folder / "rank_0.json").read_text())["phase"] == "ended"


def _await_beat(path: Path, phase: str) -> dict[str, object]:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        beat = json.loads(path.read_text()) if path.is_file() else {}
        if beat.get("phase") == phase:
            return beat
        time.sleep(0.05)
    raise AssertionError(f"{path} never said {phase}")


def test_a_disk_that_takes_nothing_costs_heartbeats_alone(tmp_path: Path):
    """The folder is a file, or facts raise: the run goes on, and ends within seconds."""
    (tmp_path / "ranks").write_text("")

    def broken() -> dict[str, object]:
        raise RuntimeError("nothing to say")

    for folder in (tmp_path / "ranks", tmp_path / "good"):
        with SignalHandler() as stops:
            heartbeat = Heartbeat(folder, 0, 1, 30, stops, broken)
            heartbeat.beat(1)
            heartbeat.close()
    assert (tmp_path / "ranks").read_text() == ""
    assert json.loads((tmp_path / "good" / "rank_0.json").read_text())["step"] == 1


def test_outside_of_a_run_phases_ask_for_nothing(tmp_path: Path):
    """What a program does that builds a trainer and never runs it: no thread, no file, no end of the
    process."""
    stops, threads = SignalHandler(), threading.active_count()
    with stops.phase("data", breakable=True):
        assert stops.at.name == "data" and not stops.asked
    heartbeat = Heartbeat(tmp_path / "ranks", 0, 1, 0.2, stops)
    heartbeat.beat(3)
    assert threading.active_count() == threads and not (tmp_path / "ranks").exists()
    heartbeat.close()


@pytest.mark.slow
def test_nothing_ends_a_process_after_its_run_even_without_close(start, tmp_path: Path):
    """The run is over, the process lives on for longer than the timeout: no report, no end."""
    child = start("""
with SignalHandler() as stops:
    Heartbeat(sys.argv[1], 0, 1, 0.4, stops)
time.sleep(2.5)
say("alive", threading.active_count())
""", tmp_path)  # fmt: skip
    assert child.end() == (0, "alive 1\n", "")


def test_the_report_of_a_hang_is_told_in_chinese():
    def rank(number: int, phase: str, quiet: float) -> Rank:
        return Rank(number, 7, phase, 0.0, quiet, 1, "host", age=9.0)

    data, waits, both = rank(1, "data", 24), [rank(n, WAITING, 25) for n in (0, 2)], "forward/backward"
    hangs = [
        Hang([], [data], waits, []),
        Hang([data], [], [], []),
        Hang([], [rank(0, both, 30)], [], [data]),
        Hang([], [rank(n, both, 30) for n in range(2)], [], []),
        Hang([], [rank(0, "", 30)], [], []),
    ]
    with speaking("zh"):
        told = [[in_language(line) for line in _told(hang)] for hang in hangs]
    assert told[0] == [
        "rank 1：第 7 步，读取数据，已卡住 24 秒",
        "rank 0、2：第 7 步，等待其他进程，已等待 25 秒",
    ]
    assert not re.search("[A-Za-z]", str(told).replace("rank ", "")), told
