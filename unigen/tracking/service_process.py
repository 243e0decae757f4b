"""The process of a tracker that talks to others: ``services.py`` starts it, hands it calls on stdin and reads
its answers.

Calls and answers are JSON objects, one a line. The first line is the request; every further one is answered
with ``{"done": true}`` or, before the process ends for it, ``{"failed": what, "why": text}``. When stdin ends
before ``finish`` came, the training was killed.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

Answer = Callable[..., None]


class Client(Protocol):
    """What a row of :data:`STARTS` makes."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...
    def image(self, name: str, path: str, step: int) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def finish(self, failed: bool) -> None: ...


class _GoOnWith(Exception):
    """The service cannot start as asked; with ``change`` in the request it can, in a new process."""

    def __init__(self, change: dict[str, Any], why: str):
        super().__init__(why)
        self.change = change


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, request: dict[str, Any], answer: Answer):
        # Its crash reports go to a third party; a user who wants that sets the variable.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb, self._answer = wandb, answer
        self._limit = request["finish_s"] * 0.75
        self._files = f"{request['output_dir']}/wandb/*run-*-{request['run_id']}"
        settings = wandb.Settings(
            # No command line, host name, repository or console: they can hold secrets.
            silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True,
            init_timeout=request["start_s"], finish_timeout=self._limit, x_stats_pid=request["parent"],
        )  # fmt: skip
        try:
            self._run = wandb.init(
                project=request["project"],
                name=request["name"],
                dir=request["output_dir"],
                config=request["config"],
                id=request["run_id"],
                resume="allow" if request["resumed"] else None,
                mode=request["mode"],
                settings=settings,
            )
        except Exception as error:
            if (request["mode"] or os.environ.get("WANDB_MODE", "online")) != "online":
                raise
            raise _GoOnWith(
                {"mode": "offline"}, f"{_first_line(error)} (to send it later: wandb sync {self._files})"
            ) from error
        where = getattr(self._run, "url", None) or f"run {request['run_id']} in {request['output_dir']}/wandb"
        answer(say=f"Weights & Biases: {where}")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def image(self, name: str, path: str, step: int) -> None:
        self._run.log({name: self._wandb.Image(path)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        page = f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"
        self._run.log({name: self._wandb.Html(page, inject=False)}, step=step)

    def finish(self, failed: bool) -> None:
        began = time.monotonic()
        self._run.finish(exit_code=int(failed))
        if time.monotonic() - began >= self._limit:  # it says so on the terminal alone
            self._answer(
                complaint="could not send everything in time", why=f"To send it: wandb sync {self._files}"
            )


class Trackio:
    """A run of Trackio, on this machine alone: its dashboard is started by the user (``trackio show``), never
    from here."""

    def __init__(self, request: dict[str, Any], answer: Answer):
        # These would send the run elsewhere, or ask a server who the user is.
        for name in ("SPACE_ID", "SERVER_URL", "WEBHOOK_URL", "BUCKET_ID", "DATASET_ID"):
            os.environ.pop(f"TRACKIO_{name}", None)
        os.environ.pop("SPACE_ID", None)  # Trackio would take itself for a Space's
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
        import trackio

        self._trackio = trackio
        # It tells of data that it could not store by a warning alone.
        warnings.showwarning = lambda message, *_, **__: answer(complaint="warns", why=_first_line(message))
        if request["resume_step"] is not None:
            try:
                self._drop_after(request["project"], request["run_name"], request["resume_step"])
            except Exception as error:
                answer(
                    complaint=f"may show steps after {request['resume_step']} twice", why=_first_line(error)
                )
        self._run = trackio.init(
            project=request["project"],
            name=request["run_name"],
            config=request["config"],
            resume="allow" if request["resumed"] else "never",
            embed=False,
            auto_log_cpu=False,
        )
        answer(
            say=(
                f"Trackio: run {request['run_name']}; see it with: trackio show --project"
                f" {request['project']}"
            )
        )

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def image(self, name: str, path: str, step: int) -> None:
        self._run.log({name: self._trackio.Image(path)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))  # longer than any in the text
        self._run.log({name: self._trackio.Markdown(f"{fence}\n{text}\n{fence}")}, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish()

    def _drop_after(self, project: str, run: str, step: int) -> None:
        """What was logged after the step resumed from will be logged again. Trackio itself has no way to take
        it back."""
        import sqlite3

        from trackio.sqlite_storage import SQLiteStorage

        path = SQLiteStorage.get_project_db_path(project)
        if path.exists():
            with contextlib.closing(sqlite3.connect(path, timeout=10)) as database, database:
                database.execute("DELETE FROM metrics WHERE run_name = ? AND step > ?", (run, step))


STARTS: dict[str, Callable[[dict[str, Any], Answer], Client]] = {"wandb": Wandb, "trackio": Trackio}
"""Name -> what starts it: (request, what answers the training) -> a client."""


def main() -> None:
    """Serves one tracker until it is told to finish, or the training is gone."""
    # The end comes from the training; what stops that one (scancel, kill of a group) must not cut the last
    # calls off.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    calls, answers = os.dup(0), os.dup(1)  # what the packages and their programs print and read is kept apart
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    lock = threading.Lock()

    def answer(**message: Any) -> None:
        with lock, contextlib.suppress(OSError):
            os.write(answers, json.dumps(message).encode() + b"\n")

    with os.fdopen(calls, "rb") as lines:
        request = json.loads(lines.readline())
        threading.Thread(target=_outlive, args=(request["parent"], request["finish_s"]), daemon=True).start()
        try:
            client = STARTS[request["tracker"]](request, answer)
        except _GoOnWith as error:
            answer(failed="cannot start", why=str(error), again=error.change)
            os._exit(1)
        except BaseException as error:
            answer(failed="cannot start", why=f"{type(error).__name__}: {_first_line(error)}")
            os._exit(1)
        code = _serve(lines, client, answer)
    if code:
        os._exit(code)
    _end_after(5)  # what a package still wants to do at the exit must not hold it
    sys.exit(0)


def _serve(lines: Any, client: Client, answer: Answer) -> int:
    """Does the calls in their order; the exit code."""
    for line in lines:
        call = json.loads(line)
        kind = call.pop("call")
        try:
            getattr(client, kind)(**call)
        except Exception as error:
            why = f"{type(error).__name__}: {_first_line(error)}"
            if kind not in ("image", "text"):  # one picture that cannot be read is no reason to start anew
                answer(failed=f"cannot {kind}", why=why)
                return 1
            answer(complaint=f"cannot show {kind}s", why=f"{call['name']}: {why}")
        answer(done=True, finished=kind == "finish")
        if kind == "finish":
            return 0
    with contextlib.suppress(Exception):
        client.finish(failed=True)
    return 0


def _outlive(parent: int, seconds: float) -> None:
    """A thread: ends this process so long after the training's, also where a call never comes back."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(seconds)
    os._exit(1)


def _end_after(seconds: float) -> None:
    limit = threading.Timer(seconds, os._exit, (1,))
    limit.daemon = True
    limit.start()


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
