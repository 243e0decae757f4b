"""A tracker in a thread of its own: what is logged waits in a queue, and the run waits for nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

MAX_WAITING = 10_000  # calls kept for a tracker that is slow; later ones are dropped
FINISH_S = 60.0  # at the end of a run all trackers together get so long

_WORDS = {"image": "show images", "text": "show texts"}

Complain = Callable[[str, str], None]
"""(what the tracker cannot do, why): warns, once for each ``what``."""


class TrackerClient(Protocol):
    """A tracker's package. Calls come from one thread, and may take long or raise; ``start`` is the first."""

    def start(self) -> None: ...
    def log(self, metrics: dict[str, Any], step: int) -> None: ...
    def image(self, name: str, path: Path, step: int, caption: str) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def finish(self, failed: bool) -> None: ...

    def abandon(self) -> str:
        """The process is about to end although a call has not come back; from another thread. Gives the fix,
        or nothing."""
        return ""


class BackgroundTracker:
    """One queue and one daemon thread for a tracker; its calls return at once and raise nothing. The thread
    calls the client in their order; ``complain`` is told what goes wrong, from the thread too."""

    def __init__(self, name: str, client: TrackerClient, complain: Complain):
        self._client, self._complain = client, complain
        self._calls: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
        self._given = self._done = 0  # calls that came, and calls that succeeded
        self._started = self._abandoned = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, call: str, *arguments: Any) -> None:
        """Queues a call of the client, by its name; ``finish`` is the last one."""
        if not self._thread.is_alive():
            return
        if call == "finish":
            self._calls.put((call, arguments))
            return
        self._given += 1
        if self._calls.qsize() < MAX_WAITING:
            self._calls.put((call, arguments))
        else:
            self._complain("is too slow", f"{MAX_WAITING:,} calls wait for it; what comes now is dropped")

    def wait(self, deadline: float) -> None:
        """Waits for the end until ``deadline`` (``time.monotonic`` seconds), then abandons the tracker."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        lacks = f"{self._given - self._done:,} of {self._given:,} calls were not sent"
        if self._thread.is_alive():
            self._abandoned = True
            self._complain("did not end in time", f"{lacks}. {self._client.abandon()}".rstrip())
        elif self._started and self._done < self._given:
            self._complain("is incomplete", lacks)

    def _work(self) -> None:
        call: str = "start"
        arguments: tuple[Any, ...] = ()
        while True:
            try:
                getattr(self._client, call)(*arguments)
                self._started = True
                self._done += call not in ("start", "finish")
            except BaseException as error:  # a package may even want to end the program
                if not self._abandoned:
                    self._complain(f"cannot {_WORDS.get(call, call)}", f"{type(error).__name__}: {error}")
            if call == "finish" or not self._started:
                return
            call, arguments = self._calls.get()
