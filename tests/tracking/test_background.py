"""A tracker's queue and thread, with clients that work, fail, hang, and want to end the program."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
from trackers import log_lines, warnings

from unigen.config import Config
from unigen.tracking import background
from unigen.tracking.tracker import TRACKERS, Row, Tracker


class Told:
    """A client that notes its calls; ``does`` (call -> what it does first) makes it a bad one."""

    def __init__(self, **does):
        self.calls: list[tuple] = []
        self._does = does

    def __getattr__(self, name: str):
        def call(*arguments):
            self._does.get(name, lambda: None)()
            self.calls.append((name, *arguments))

        return call


def fail() -> None:
    raise OSError("gone")


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a tracker whose one client is ``client``."""

    def make(client: Told) -> Tracker:
        monkeypatch.setattr(
            "unigen.tracking.tracker.TRACKERS", {"told": Row(lambda _: True, lambda *_: client)}
        )
        return Tracker(tmp_path, Config())

    return make


def log(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log({"loss": 1 / step}, step)


def test_every_call_arrives_in_its_order_and_the_end_is_told(tracker, tmp_path: Path, caplog):
    client = Told()
    made = tracker(client)
    log(made, range(1, 3))
    made.image("a", tmp_path / "a.png", 2, "a cat")
    made.text("b", "secret: the cat sat here", 2)
    made.finish()
    made.finish()
    assert client.calls == [
        ("start",),
        ("log", {"train/loss": 1.0}, 1),
        ("log", {"train/loss": 0.5}, 2),
        ("image", "a", tmp_path / "a.png", 2, "a cat"),
        ("text", "b", "secret: the cat sat here", 2),
        ("finish", False),
    ]
    assert not caplog.messages


def test_a_run_that_ends_with_an_error_is_told_as_failed(tracker):
    client = Told()
    made = tracker(client)
    try:
        raise RuntimeError
    except RuntimeError:
        made.finish()
    assert client.calls[-1] == ("finish", True)


def test_a_secret_of_the_environment_reaches_no_client(tracker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-4711")
    client = Told()
    made = tracker(client)
    made.log({"note": "with hush-hush-4711"}, 1)
    made.text("a", "with hush-hush-4711", 1)
    made.finish()
    assert client.calls[1:3] == [
        ("log", {"train/note": "with <hidden>"}, 1),
        ("text", "a", "with <hidden>", 1),
    ]


@pytest.mark.parametrize(
    "end", [fail, sys.exit, lambda: 1 / 0], ids=["OSError", "SystemExit", "ZeroDivisionError"]
)
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("start", ["cannot start"]),
        ("log", ["cannot log", "is incomplete"]),
        ("image", ["cannot show images", "is incomplete"]),
        ("text", ["cannot show texts", "is incomplete"]),
        ("finish", ["cannot finish"]),
    ],
)
def test_a_client_that_raises_is_told_once_for_each_thing_and_stops_nothing(
    call: str, said: list[str], end, tracker, tmp_path: Path, caplog
):
    made = tracker(Told(**{call: end}))
    log(made, range(1, 4))
    for step in (1, 2):
        made.image("a", tmp_path / "a.png", step)
        made.text("b", "c", step)
    made.finish()
    assert warnings(caplog) == [f"Tracker told {what}" for what in said]
    if call == "log":
        assert "3 of 7 calls were not sent" in caplog.text
    assert [row["step"] for row in log_lines(tmp_path)] == [1, 2, 3]


def test_a_tracker_that_cannot_be_made_stops_nothing(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setitem(TRACKERS, "stillborn", Row(lambda _: True, lambda *_: 1 / 0))
    made = Tracker(tmp_path, Config())
    log(made, range(1, 3))
    made.finish()
    assert warnings(caplog) == ["Tracker stillborn cannot start"] and len(log_lines(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_client_that_hangs_holds_nothing_and_what_is_missing_is_counted(
    call: str, tracker, tmp_path: Path, caplog, monkeypatch
):
    """Pass: no call waits for it, the memory for it is bounded, the end comes, and one line says how much was
    not sent."""
    monkeypatch.setattr(background, "MAX_WAITING", 100)
    monkeypatch.setattr(background, "FINISH_S", 0.2)
    release = threading.Event()
    client = Told(**{call: lambda: release.wait(60)})
    made = tracker(client)
    (queue,) = made._trackers
    log(made, range(1, 3001 if call != "finish" else 4))
    assert queue._calls.qsize() <= 100
    began = time.monotonic()
    made.finish()
    assert time.monotonic() - began < 30, "it waited for the client"
    sent = {"start": "3,000 of 3,000", "log": "3,000 of 3,000", "finish": "0 of 3"}[call]
    slow = [] if call == "finish" else ["Tracker told is too slow"]
    assert warnings(caplog) == [*slow, "Tracker told did not end in time"]
    assert f"{sent} calls were not sent" in caplog.messages[-1] and ("abandon",) in client.calls
    assert len(log_lines(tmp_path)) == (3 if call == "finish" else 3000)
    release.set()
    queue._thread.join(30)
    assert len(caplog.messages) == len(slow) + 1, "it spoke after its end"


def test_drops_are_told_when_they_begin_and_counted_at_the_end(tracker, caplog, monkeypatch):
    monkeypatch.setattr(background, "MAX_WAITING", 10)
    release = threading.Event()
    client = Told(log=lambda: release.wait(60))
    made = tracker(client)
    log(made, range(1, 101))
    assert warnings(caplog) == ["Tracker told is too slow"]
    release.set()
    made.finish()
    lost = 100 - sum(name == "log" for name, *_ in client.calls)
    assert 85 <= lost <= 90
    assert warnings(caplog)[1:] == ["Tracker told is incomplete"]
    assert f"{lost} of 100 calls were not sent" in caplog.messages[-1]


@pytest.mark.slow
def test_several_trackers_share_one_limit_at_the_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(background, "FINISH_S", 1.0)
    release = threading.Event()
    hang = {str(n): Row(lambda _: True, lambda *_: Told(log=lambda: release.wait(60))) for n in range(30)}
    monkeypatch.setattr("unigen.tracking.tracker.TRACKERS", hang)
    made = Tracker(tmp_path, Config())
    log(made, range(1, 3))
    began = time.monotonic()
    made.finish()
    assert time.monotonic() - began < 20, "each had a limit of its own"
    release.set()
