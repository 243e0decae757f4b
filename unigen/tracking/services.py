"""Trackers that talk to others (Weights & Biases, Trackio) run in a process each, which
``service_process.py`` is.

Whatever happens there - a server that never answers, a crash, a hang, a package that prints or leaves threads
- training neither waits nor ends for it: calls are queued here, a thread hands them over, and a process that
does not end in time is ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unigen.runs.secrets import hide

log = logging.getLogger(__name__)

MAX_WAITING = 10_000  # calls kept for a service that is slow; later ones are dropped
SLOW_S = 120.0  # a service that has answered nothing for so long is said to be slow
FINISH_S = 60.0  # at the end of a run all services together get so long
START_S = 30.0  # Weights & Biases waits so long for its server before it goes on offline
TRIES = 3  # a service that ended by itself is started again, so many starts in all
LONG_S = 600.0  # ... unless it had done its work so long
PAUSE_S = 1.0
REPEAT_S = 30.0  # what was done so shortly before a service broke may be lost with it, and is done again

_ROOT = str(Path(__file__).resolve().parents[2])
_CODE = f"import sys; sys.path.insert(0, {_ROOT!r}); from unigen.tracking.service_process import main; main()"

Complain = Callable[[str, str], None]
"""(what the tracker cannot do, why): warns, once for each ``what``."""


class Service:
    """One tracker in a process of its own; every call returns at once and raises nothing.

    Args:
        request: What the process needs to start: JSON, with ``tracker`` naming a row of
            ``service_process.STARTS``.
        complain: Told what goes wrong, from a thread.
    """

    def __init__(self, request: dict[str, Any], complain: Complain):
        self._request = request | {"parent": os.getpid(), "start_s": START_S, "finish_s": FINISH_S}
        self._complain = complain
        self._calls: deque[bytes] = deque()  # not yet done by the service; the first ``_sent`` are with it
        self._sent = 0
        self._done: deque[tuple[float, bytes]] = deque(maxlen=1000)  # (when, call)
        self._kept: int | None = request.get("resume_step")  # the last step that is safe with the service
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: dict[str, Any] = {}
        self._dead = self._over = self._closing = False
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{request['tracker']}", daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._put({"call": "log", "metrics": metrics, "step": step})

    def image(self, name: str, path: Path, step: int) -> None:
        self._put({"call": "image", "name": name, "path": os.path.abspath(path), "step": step})

    def text(self, name: str, text: str, step: int) -> None:
        self._put({"call": "text", "name": name, "text": text, "step": step})

    def finish(self, failed: bool = False) -> None:
        """Asks the service to end, and does not wait for it."""
        with self._changed:
            if not self._closing:
                self._calls.append(_line({"call": "finish", "failed": failed}))
                self._closing = True
                self._changed.notify_all()

    def wait(self, deadline: float) -> None:
        """Waits for the end until ``deadline`` (``time.monotonic`` seconds), then ends the process."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            with self._changed:
                finished, waiting = self._over, len(self._calls)
                self._over = True
                self._changed.notify_all()
            if not finished:
                self._complain(
                    "did not end in time", f"{waiting} call(s) were not answered; its process is ended"
                )
            self._kill()
            self._thread.join(5)

    # ---- the queue

    def _put(self, call: dict[str, Any]) -> None:
        slow = full = False
        with self._changed:
            if self._over or self._closing:
                return
            slow = bool(self._calls) and time.monotonic() - self._heard > SLOW_S
            full = len(self._calls) >= MAX_WAITING
            if not full:
                if not self._calls:
                    self._heard = time.monotonic()
                self._calls.append(_line(call))
                self._changed.notify_all()
        if full:
            self._complain(
                "is too slow", f"{MAX_WAITING} calls wait for it; what comes now is dropped for it"
            )
        elif slow:
            self._complain("does not answer", f"for {SLOW_S:.0f} s; what is logged waits for it")

    # ---- the process

    def _work(self) -> None:
        """The thread: starts the process, hands it the calls, and starts it again where that may help."""
        tries = 0
        while tries < TRIES:
            began = time.monotonic()
            try:
                self._serve()
                why = self._why_it_ended()
            except OSError as error:  # no process could be started at all
                self._failure, why = {"failed": "cannot start"}, str(error)
            if self._over:
                return
            tries = tries + 1 if time.monotonic() - began < LONG_S else 1
            what = self._failure.get("failed", "has stopped")
            change = self._failure.get("again")
            if not self._take_back() or (what == "cannot start" and change is None):
                self._complain(what, why)
                break
            if change is not None:
                self._complain(f"cannot start as asked and goes on with {_words(change)}", why)
            else:
                self._complain(f"{what} and is started again" if tries < TRIES else f"{what} again", why)
            self._request |= {"resumed": True, "resume_step": self._kept} | (change or {})
            with self._changed:
                self._dead, self._failure = False, {}
                self._changed.wait_for(lambda: self._over, timeout=PAUSE_S if change is None else 0)
        with self._changed:
            self._over = True
            self._calls.clear()

    def _take_back(self) -> bool:
        """Puts what was done last before the calls that wait, whole steps of it. False if nothing but the end
        is left to do.

        Weights & Biases takes a call, and says so, for a moment after the program behind it was killed.
        """
        with self._changed:
            done, self._sent = list(self._done), 0
            self._done.clear()
            steps = [json.loads(call)["step"] for _, call in done]
            first = next(
                (i for i, (when, _) in enumerate(done) if time.monotonic() - when < REPEAT_S), len(done)
            )
            while 0 < first < len(done) and steps[first - 1] == steps[first]:
                first -= 1
            if steps:
                self._kept = steps[first] - 1 if first < len(steps) else steps[-1]
            self._calls.extendleft(call for _, call in reversed(done[first:]))
            return not self._closing or len(self._calls) > 1

    def _serve(self) -> None:
        """One life of the process."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        # A session of its own: a Ctrl-C in the terminal is for the training, and at the end the whole group
        # can be ended by its id.
        with subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment,
        ) as process:  # fmt: skip
            with self._changed:
                self._process = process
            reader = threading.Thread(target=self._read, args=(process,), daemon=True)
            reader.start()
            assert process.stdin is not None
            line: bytes | None = _line(self._request)
            try:
                while line is not None:
                    process.stdin.write(line)
                    process.stdin.flush()
                    line = self._next()
                reader.join()
                process.stdin.close()
            except OSError:  # it has ended; the reader says why
                with contextlib.suppress(OSError):
                    process.stdin.close()
                reader.join()

    def _next(self) -> bytes | None:
        """The next call to hand over; None when there will be none."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._dead or self._over or self._sent < len(self._calls) or self._closing
            )
            if self._dead or self._over or self._sent == len(self._calls):
                return None
            self._sent += 1
            return self._calls[self._sent - 1]

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Another thread: what the process says, one JSON object a line, until it ends."""
        assert process.stdout is not None
        noise = ""
        for line in process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                noise = line.decode("utf-8", "replace").strip() or noise
                continue
            if "say" in message:
                log.info("%s", hide(message["say"]))
            if "complaint" in message:
                self._complain(message["complaint"], message["why"])
            with self._changed:
                self._heard = time.monotonic()
                self._failure = message if "failed" in message else self._failure
                if message.get("done") and self._calls:
                    self._done.append((self._heard, self._calls.popleft()))
                    self._sent -= 1
                if message.get("finished"):
                    self._over = True
        with self._changed:
            self._failure.setdefault("why", noise)
            self._dead = True
            self._changed.notify_all()

    def _why_it_ended(self) -> str:
        code = self._process.returncode if self._process is not None else None
        return self._failure.get("why") or f"its process ended with code {code}"

    def _kill(self) -> None:
        """Ends the process and what it has started. It has not been waited for yet, so its id is no one
        else's."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"


def _words(change: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in change.items())
