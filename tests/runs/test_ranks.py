"""Who holds up a run, told from heartbeats alone; and how heartbeats are read."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unigen.runs.ranks import WAITING, Hang, Rank, RankFiles, find_hang, is_gone


def rank(number: int, step: int, phase: str, quiet: float, age: float = 0.0) -> Rank:
    return Rank(number, step, phase, 0.0, 0.0, 1, "elsewhere", {"quiet": quiet}, age)


def numbers(hang: Hang | None) -> dict[str, list[int]] | None:
    return hang and {name: [rank.rank for rank in ranks] for name, ranks in hang._asdict().items() if ranks}


def found(*ranks: Rank) -> dict[str, list[int]] | None:
    return numbers(find_hang(ranks, 60.0, 5.0))


def test_a_run_that_goes_on_hangs_nowhere():
    assert found() is None
    assert found(rank(0, 7, "data", 59.0), rank(1, 6, "saving", 0.0)) is None
    assert found(rank(0, 7, "data", 0.0), rank(1, 7, "ended", 900.0)) is None


def test_who_gives_no_sign_of_life_is_named_before_all_others():
    silent = rank(1, 7, "forward/backward", 1.0, age=6.0)
    assert found(rank(0, 7, WAITING, 61.0), silent, rank(2, 7, "data", 1.0)) == {
        "silent": [1], "waiting": [0], "moving": [2],
    }  # fmt: skip


def test_in_one_place_it_is_all_of_them():
    same = [rank(n, 7, "forward/backward", 61.0) for n in range(3)]
    assert found(*same) == {"hung": [0, 1, 2]} and find_hang(same, 60.0, 5.0).together
    assert found(same[0]) == {"hung": [0]} and not find_hang(same[:1], 60.0, 5.0).together


def test_while_one_still_moves_nobody_knows():
    late = [rank(n, 7, "forward/backward", 61.0) for n in (0, 2)]
    assert found(late[0], rank(1, 7, "sampling", 2.0), late[1]) == {"hung": [0, 2], "moving": [1]}


def test_who_is_in_an_earlier_step_holds_up_the_others():
    assert found(rank(0, 8, "data", 70.0), rank(1, 7, WAITING, 61.0)) == {"hung": [1], "waiting": [0]}


def test_in_one_step_it_is_who_does_not_just_wait_and_has_stood_still_for_the_longest():
    waits = rank(0, 7, WAITING, 64.0)  # of its own time it knows more than of that of others
    assert found(waits, rank(1, 7, "data", 61.0), rank(2, 7, WAITING, 64.0)) == {
        "hung": [1],
        "waiting": [0, 2],
    }
    assert found(
        rank(0, 7, "forward/backward", 61.0), rank(1, 7, "data", 64.0), rank(2, 7, "", 61.0),
        rank(3, 7, "forward/backward", 61.0), rank(9, 7, "data", 63.0),
    ) == {"hung": [1, 9], "waiting": [0, 2, 3]}  # fmt: skip


# ---- reading


def write(folder: Path, number: int, **changes) -> None:
    beat = {
        "rank": number, "step": 7, "phase": "data", "since": time.time() - 9, "time": time.time(),
        "pid": os.getpid(), "host": "elsewhere", "world": 2,
    }  # fmt: skip
    (folder / f"rank_{number}.json").write_text(json.dumps(beat | changes))


def test_what_is_no_heartbeat_is_left_out(tmp_path: Path):
    files = RankFiles(tmp_path)
    assert RankFiles(tmp_path / "none").read() == [] and files.read() == []
    write(tmp_path, 10)
    write(tmp_path, 9)
    for number, text in enumerate(["", "{", "null", "[]", '{"rank": {}}', "[" * 100_000, " " * (2 << 20)]):
        (tmp_path / f"rank_{number}.json").write_text(text)
    (tmp_path / "rank_x.json").write_text("{}")
    assert [rank.rank for rank in files.read()] == [9, 10]
    assert files.ranks[0].facts == {"world": 2} and files.ranks[0].quiet == pytest.approx(9, abs=0.1)


def test_a_heartbeat_that_changes_counts_whatever_its_clock_says(tmp_path: Path, monkeypatch):
    files, now = RankFiles(tmp_path), time.monotonic()
    write(tmp_path, 0, time=time.time() - 3600)
    assert files.read()[0].age == pytest.approx(3600, abs=60) and files.clock_offset() == 0
    write(tmp_path, 0, time=time.time() - 3598)
    assert files.read()[0].age < 60 and files.clock_offset() == pytest.approx(-3598, abs=60)
    monkeypatch.setattr(time, "monotonic", lambda: now + 500)
    assert files.read()[0].age == pytest.approx(500, abs=60)


def test_a_process_of_this_machine_is_known_to_be_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    here = rank(0, 7, "data", 0.0)
    here.host, here.pid = platform.node(), process.pid
    assert is_gone(here)
    here.pid = os.getpid()
    assert not is_gone(here)
    here.host, here.pid = "elsewhere", process.pid
    assert not is_gone(here)
