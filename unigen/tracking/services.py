"""Weights & Biases and Trackio, each as a tracker's client.

The packages are imported by the main thread: a data worker that is forked while another thread imports could
wait for that import for ever.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import logging
import os
import re
import threading
import uuid
from pathlib import Path
from typing import Any

from unigen.config import Config, UserError
from unigen.foreign import read_bytes
from unigen.runs.layout import run_id_file
from unigen.runs.secrets import hide, redacted
from unigen.tracking import background
from unigen.tracking.background import Complain, TrackerClient

log = logging.getLogger(__name__)

START_S = 30.0  # Weights & Biases waits so long for its server before it goes on offline


class Wandb:
    """A run of Weights & Biases, whose package sends from a process of its own.

    Args:
        output_dir: Folder of the run; ``wandb/`` and ``wandb_run_id`` go there.
        config: Names the project and the run, and is shown without its secrets.
        resume_step: Steps done by the checkpoint the run resumes from, or 0; then the same run goes on.
        complain: Is told of a server that does not answer.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, output_dir: Path, config: Config, resume_step: int, complain: Complain):
        need("wandb")
        # Its crash reports go to a third party, and without a login it would ask for one in the terminal; a
        # user who wants that sets the variable.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb, self._complain = wandb, complain
        self._folder, self._config = os.path.abspath(output_dir), redacted(config.to_dict())
        self._mode = config.wandb_mode
        self._run_id, self._resumed = _run_id(output_dir / run_id_file("wandb"), resume_step)
        self._later = f"Fix: wandb sync {self._folder}/wandb/*run-*-{self._run_id}"
        self._run: Any = None

    def start(self) -> None:
        try:
            self._run = self._init(self._mode)
        except Exception as error:
            if (self._mode or os.environ.get("WANDB_MODE", "online")) != "online":
                raise
            first = str(error).strip().partition("\n")[0].rstrip(".")
            self._complain("cannot start as asked and goes on with mode offline", f"{first}. {self._later}")
            with contextlib.suppress(SystemExit):
                self._wandb.teardown()  # until then the id counts as taken
            self._run = self._init("offline")
        where = getattr(self._run, "url", None) or f"run {self._run_id} in {self._folder}/wandb"
        log.info("Weights & Biases: %s", hide(where))

    def _init(self, mode: str | None) -> Any:
        settings = self._wandb.Settings(
            # No command line, host name, repository or console: they can hold secrets.
            silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True,
            init_timeout=START_S, finish_timeout=0.75 * background.FINISH_S, finish_timeout_raises=True,
            reinit="create_new",  # a run that the caller of the trainer has of his own stays his
            stop_fn=lambda: None,  # the button on the web page would send this process SIGINT
        )  # fmt: skip
        return self._wandb.init(
            project=self._config["wandb_project"], name=self._config["wandb_run_name"], dir=self._folder,
            config=self._config, id=self._run_id, resume="allow" if self._resumed else None, mode=mode,
            settings=settings,
        )  # fmt: skip

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def image(self, name: str, path: Path, step: int, caption: str) -> None:
        self._run.log({name: self._wandb.Image(str(path), caption=caption or None)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        page = f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"
        self._run.log({name: self._wandb.Html(page, inject=False)}, step=step)

    def finish(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            self._complain("could not send everything in time", self._later)

    def abandon(self) -> str:
        """At Python's exit, wandb would wait for its process; a teardown, once begun, takes that back."""
        teardown = threading.Thread(target=self._wandb.teardown, daemon=True)
        teardown.start()
        teardown.join(1.0)
        return self._later


class Trackio(TrackerClient):
    """A run of Trackio, on this machine alone: its dashboard is started by the user (``trackio show``), never
    from here.

    Args, Raises: as :class:`Wandb`.
    """

    def __init__(self, output_dir: Path, config: Config, resume_step: int, complain: Complain):
        need("trackio")
        # They would send the run elsewhere.
        for name in ("SPACE_ID", "SERVER_URL", "WEBHOOK_URL", "BUCKET_ID", "DATASET_ID"):
            os.environ.pop(f"TRACKIO_{name}", None)
        import trackio
        import trackio.run

        # It would ask huggingface.co for the name of the user.
        trackio.run._get_default_namespace = lambda: None
        self._trackio, self._complain, self._config = trackio, complain, redacted(config.to_dict())
        run_id, self._resumed = _run_id(output_dir / run_id_file("trackio"), resume_step)
        self._resume_step = resume_step
        # Trackio finds the run to resume by its name, so no two runs may share one.
        self._name = f"{self._config['wandb_run_name'] or output_dir.resolve().name}-{run_id}"
        self._run: Any = None

    def start(self) -> None:
        project = self._config["trackio_project"]
        if self._resumed:
            try:
                self._drop_after(project, self._resume_step)
            except Exception as error:
                self._complain(f"may show steps after {self._resume_step} twice", str(error))
        self._run = self._trackio.init(
            project=project, name=self._name, config=self._config,
            resume="allow" if self._resumed else "never", embed=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def image(self, name: str, path: Path, step: int, caption: str) -> None:
        self._run.log({name: self._trackio.Image(str(path), caption=caption or None)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))  # longer than any in the text
        self._run.log({name: self._trackio.Markdown(f"{fence}\n{text}\n{fence}")}, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish()

    def _drop_after(self, project: str, step: int) -> None:
        """What was logged after the step resumed from will be logged again. Trackio itself has no way to take
        it back."""
        import sqlite3

        from trackio.sqlite_storage import SQLiteStorage

        path = SQLiteStorage.get_project_db_path(project)
        if path.exists():
            with contextlib.closing(sqlite3.connect(path, timeout=10)) as database, database:
                database.execute("DELETE FROM metrics WHERE run_name = ? AND step > ?", (self._name, step))


EXTRAS = {
    "tensorboard": "pip install 'tensorboard>=2.16' (the extra tensorboard)",
    "wandb": "pip install 'wandb>=0.27' (the extra wandb)",
    "trackio": "pip install 'trackio>=0.43' (the extra trackio)",
}
"""Package -> how it gets there."""


def need(package: str) -> None:
    """Raises UserError where ``package`` is not installed. (A folder of that name is no package.)"""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{package} is asked for, but not installed. Fix: {EXTRAS[package]}, or leave its option out"
        )


def _run_id(path: Path, resume_step: int) -> tuple[str, bool]:
    """The id of the run to go on with, or that of a new one, which is written down; and whether it is an old
    one."""
    resumes = resume_step and os.path.lexists(path)
    if resumes and (old := read_bytes(path, [path.parent], 1000).decode("utf-8", "replace").strip()):
        return old, True
    run_id = uuid.uuid4().hex[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n", "utf-8")
    return run_id, False
