"""Weights & Biases and Trackio, the real packages: what they keep, and servers and processes that hang or
fail.

Each run is a program of its own, as it would be: what the packages leave behind must not hold its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny import draw_picture
from trackers import ROOT, log_lines, need, warnings

from unigen.config import Config
from unigen.tracking.tracker import Tracker

KEY = "5ec2e7" * 6 + "cafe"

# argv: folder, options, resume step, seconds to start and to finish
PROGRAM = """
import json, logging, os, signal, sys, time
from pathlib import Path
from unigen.config import Config
from unigen.runs.secrets import hide_in_logs
from unigen.tracking import background, services
from unigen.tracking.tracker import Tracker

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
logging.basicConfig(level=logging.INFO, filename=folder / "log.txt", format="%(levelname)s %(message)s")
hide_in_logs()

def log(steps):
    for step in steps:
        tracker.log({"loss": 1 / step, f"at_{step}": 1.0, "bad": float("nan"), "none": None}, step)

def sent():
    while any(queue._done < queue._given for queue in tracker._trackers):
        time.sleep(0.01)

def core():
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            if Path(f"/proc/{child}/comm").read_text().startswith("wandb-core"):
                return int(child)

services.START_S, background.FINISH_S = float(sys.argv[4]), float(sys.argv[5])
tracker = Tracker(folder, Config(**json.loads(sys.argv[2])), int(sys.argv[3]))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this machine's login; the folder of a run."""
    for name, value in {
        "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "WANDB_API_KEY": KEY,
        "NETRC": str(tmp_path / "none"), "PYTHONPATH": ROOT, "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in ("WANDB_MODE", "WANDB_SERVICE", "WANDB_SILENT", "WANDB_ERROR_REPORTING", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "run"


def command(
    folder: Path, code: str, resume_step: int, limits: tuple[float, float], options: dict
) -> list[str]:
    given = [
        str(folder),
        json.dumps({"wandb_project": "cats"} | options),
        str(resume_step),
        *map(str, limits),
    ]
    return [sys.executable, "-c", PROGRAM + code, *given]


def run(
    folder: Path, code: str, resume_step: int = 0, limits: tuple[float, float] = (30.0, 60.0), **options: Any
) -> str:  # fmt: skip
    """The program's log; it must end in good order."""
    argv = command(folder, code, resume_step, limits, options)
    with open(folder.parent / "printed.txt", "w+") as out:  # a process that is left would hold a pipe open
        done = subprocess.run(argv, stdout=out, stderr=out, timeout=90, cwd=folder.parent)
        out.seek(0)
        assert done.returncode == 0, out.read()
    return (folder / "log.txt").read_text()


def told(log: str) -> list[str]:
    """What each warning begins with."""
    return [
        line.split(" ", 1)[1].partition(";")[0] for line in log.splitlines() if line.startswith("WARNING")
    ]


def logs(folder: Path) -> bytes:
    """All that the files of Weights & Biases hold."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob("wandb/*run-*/run-*.wandb")))


# ---- Weights & Biases

FAILS = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.mark.slow
@pytest.mark.parametrize("answer", [b"", FAILS, None], ids=["never answers", "fails", "refuses"])
def test_a_server_that_is_not_there_costs_a_warning_and_no_number(
    home: Path, answer: bytes | None, monkeypatch
):
    """Pass: the run goes on offline under the same id, logging does not wait for it, and all is in the file
    that can be sent later."""
    need("wandb")
    server = socket.create_server(("127.0.0.1", 0))
    connections = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                connections.append(connection)
                if answer:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    if answer is None:
        server.close()
    else:
        threading.Thread(target=serve, daemon=True).start()
    code = "log(range(1, 4)); assert not tracker._trackers[0]._started; tracker.finish()"
    said = run(home, code, limits=(2.0, 60.0))
    server.close()
    assert answer is None or connections, "the server was never asked"
    assert told(said) == ["Tracker wandb cannot start as asked and goes on with mode offline"]
    run_id = (home / "wandb_run_id").read_text().strip()
    assert f"wandb sync {home}/wandb/*run-*-{run_id}" in said
    (file,) = home.glob("wandb/offline-run-*/run-*.wandb")
    assert file.name == f"run-{run_id}.wandb" and all(
        f"at_{n}".encode() in file.read_bytes() for n in (1, 2, 3)
    )
    assert len(log_lines(home)) == 3


class Server(BaseHTTPRequestHandler):
    """As much of a W&B server as a run needs."""

    protocol_version = "HTTP/1.1"
    frozen = threading.Event()
    received: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.frozen.is_set():
            time.sleep(0.1)
        self.received.append(f"{self.path} {body.decode('utf-8', 'replace')}")
        if "at_2" in self.received[-1] and "freeze" in os.environ.get("TEST_SERVER", ""):
            self.frozen.set()
        data = {}
        if self.path == "/graphql":
            query = json.loads(body)
            given = query.get("variables", {})
            bucket = {
                "id": "b",
                "name": given.get("name"),
                "project": {"id": "p", "name": "cats", "entity": {"id": "e", "name": "me"}},
            }
            files = [
                {"name": name, "uploadUrl": f"http://{self.headers['Host']}/{name}"}
                for name in given.get("files", [])
            ]
            if "upsertBucket" in query["query"]:
                data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            elif "createRunFiles" in query["query"]:
                data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("freezes", [False, True], ids=["stays", "freezes midway"])
def test_online_everything_is_sent_and_a_server_that_freezes_holds_the_end_for_its_limit_only(
    home: Path, freezes: bool, monkeypatch
):
    """Pass: the server has every number and no secret; frozen, the program ends, the fix is told, the file
    has the rest."""
    need("wandb")
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-4711")
    monkeypatch.setenv("TEST_SERVER", "freeze" if freezes else "")
    Server.received, Server.frozen = [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    limits = (30.0, 4.0 if freezes else 60.0)
    code = f"log(range(1, 4)); sent(); time.sleep({1 if freezes else 0}); log([4]); tracker.finish()"
    said = run(home, code, limits=limits, wandb_mode="online", model_path="hush-hush-4711")
    Server.frozen.clear()
    server.shutdown()
    server.server_close()
    if freezes:
        assert "Tracker wandb could not send everything in time" in told(said) and "wandb sync" in said
        assert b"at_4" in logs(home)
        return
    assert not told(said)
    sent = "".join(Server.received)
    assert all(f'\\"_step\\":{step}' in sent and f'at_{step}\\":1' in sent for step in (1, 2, 3, 4))
    for secret in (KEY, "hush-hush-4711"):
        assert secret not in sent


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_killed_or_frozen_process_of_wandb_holds_nothing(home: Path, how: str):
    """Pass: the program logs on and ends; one line says that something is missing."""
    need("wandb")
    code = f"""
log(range(1, 4))
sent()
frozen = core()
os.kill(frozen, signal.{how})
log(range(4, 7))
tracker.finish()
(folder / "pid").write_text(str(frozen))
"""
    said = run(home, code, limits=(30.0, 3.0), wandb_mode="offline")
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((home / "pid").read_text()), 9)
    assert len(log_lines(home)) == 6
    if how == "SIGSTOP":
        assert "Tracker wandb did not end in time" in told(said)
    else:  # the connection may be missed at any call
        assert {"Tracker wandb cannot log", "Tracker wandb cannot finish"} & set(told(said))


@pytest.mark.slow
def test_without_a_login_nobody_is_asked_for_one_and_the_run_is_kept(home: Path, monkeypatch):
    """In a terminal, where wandb likes to ask."""
    need("wandb")
    monkeypatch.delenv("WANDB_API_KEY")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(home, "log(range(1, 3)); tracker.finish()", 0, (30.0, 60.0), {"wandb_mode": "online"}),
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=home.parent,
    )  # fmt: skip
    os.close(theirs)
    assert process.wait(60) == 0
    with contextlib.suppress(OSError):  # the end of a terminal's output
        assert os.read(ours, 1000) == b""
    os.close(ours)
    said = (home / "log.txt").read_text()
    assert (
        told(said) == ["Tracker wandb cannot start as asked and goes on with mode offline"]
        and "API key" in said
    )
    assert b"loss" in logs(home)


@pytest.mark.slow
def test_a_run_of_the_callers_own_stays_his(home: Path):
    need("wandb")
    code = """
import wandb
own = wandb.init(project="dogs", dir=folder, mode="offline", id="own00000")
log(range(1, 3))
sent()
tracker.finish()
own.log({"own": 1.0})
assert wandb.run is own
own.finish()
"""
    assert not told(run(home, code, wandb_mode="offline"))
    (own,) = home.glob("wandb/offline-run-*/run-own00000.wandb")
    assert b"own" in own.read_bytes() and b"at_2" not in own.read_bytes() and b"at_2" in logs(home)


def test_without_the_package_the_fix_is_told(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    tracker = Tracker(tmp_path, Config(wandb_project="cats", trackio_project="cats"))
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert warnings(caplog) == ["Tracker wandb cannot start", "Tracker trackio cannot start"]
    assert "the extra wandb" in caplog.text and "the extra trackio" in caplog.text
    assert len(log_lines(tmp_path)) == 1


# ---- everything at once: what is shown, what is resumed, what is not written

# Loaded by every Python process of the run: tells of each attempt to reach another machine.
GUARD = """
import os, socket, sys
def guard(event, arguments):
    address = arguments[1] if event == "socket.connect" else arguments[0] if event == "socket.getaddrinfo" else None
    if (isinstance(address, tuple) or event == "socket.getaddrinfo") and "127.0.0.1" not in address:  # no socket of a file
        with open(os.environ["GUARD_LOG"], "a") as file:
            file.write(f"{event} {address} {sys.argv}\\n")
sys.addaudithook(guard)
"""

ALL = """
log(range(int(sys.argv[3]) + 1, int(sys.argv[3]) + 4))
tracker.image("samples/0", folder / "a.png", 5, "a house, " + os.environ["SOME_TOKEN"])
tracker.text("prompts/0", "secret: a ``` <b>cat</b> " + os.environ["SOME_TOKEN"], 5)
tracker.finish()
"""


@pytest.mark.slow
def test_offline_all_is_shown_and_resumed_and_no_secret_is_written(home: Path, tmp_path: Path, monkeypatch):
    """Pass: pictures, texts and numbers are in each tracker, steps dropped by a resume are shown once, the
    same run goes on, no file holds a secret of the environment, and no Python process reaches for another
    machine, whatever the environment asks for."""
    need("wandb", "trackio", "tensorboard")
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    home.mkdir()
    draw_picture(home / "a.png", 0, 48, 32)
    secrets = {"SOME_TOKEN": "token-4711", "DB_PASSWORD": "password-4711", "HF_TOKEN": "hf_token-4711"}
    places = {"TRACKIO_SPACE_ID": "me/space", "TRACKIO_SERVER_URL": "http://host.invalid/?write_token=a"}
    for name, value in {**secrets, **places, "GUARD_LOG": str(tmp_path / "guard.log")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "guard"), ROOT]))
    options = {
        "wandb_run_name": "tabby", "wandb_mode": "offline", "trackio_project": "cats", "tensorboard": True,
        "model_path": "https://me:password-4711@example.invalid/model",
    }  # fmt: skip

    def train(resume: int) -> list[str]:
        assert not told(run(home, ALL, resume, **options)), (home / "log.txt").read_text()
        return [(home / name).read_text().strip() for name in ("wandb_run_id", "trackio_run_id")]

    ids = train(0)
    assert train(2) == ids
    assert not (tmp_path / "guard.log").exists(), (tmp_path / "guard.log").read_text()

    files = list(home.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{ids[0]}.wandb"}
    assert all(word in logs(home) for word in (b"cats", b"tabby", b"loss", b"image_loss_weight"))
    assert sys.executable.encode() not in logs(home), "what wandb calls metadata: command, host, user"
    pictures = list(home.glob("wandb/offline-run-*/files/media/images/samples/*.png"))
    assert len(pictures) == 2 and pictures[0].read_bytes() == (home / "a.png").read_bytes()
    assert any("secret: a ``` &lt;b&gt;cat" in page.read_text() for page in home.rglob("*.html"))

    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "cats.db")) as database:
        rows = [
            (step, json.loads(values))
            for step, values in database.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
        names = database.execute("SELECT DISTINCT run_id, run_name FROM metrics").fetchall()
        config = database.execute("SELECT config FROM configs").fetchone()[0]
    assert len(names) == 1 and names[0][1] == f"tabby-{ids[1]}" and b"image_loss_weight" in config
    assert [(step, row["train/loss"]) for step, row in rows if "train/loss" in row] == [
        (n, 1 / n) for n in range(1, 6)
    ]
    ((step, shown),) = [(step, row["samples/0"]) for step, row in rows if "samples/0" in row]
    assert shown["caption"] == "a house, <hidden>" and b"a house, <hidden>" in logs(home)
    picture = tmp_path / "trackio" / "media" / shown["file_path"]
    assert step == 5 and picture.read_bytes() == (home / "a.png").read_bytes()
    ((step, shown),) = [(step, row["prompts/0"]) for step, row in rows if "prompts/0" in row]
    assert step == 5 and "<b>cat</b> <hidden>" in shown["_value"]

    read = 0
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            read += 1
            for name, value in {**secrets, "WANDB_API_KEY": KEY}.items():
                assert value.encode() not in path.read_bytes(), (name, path)
    assert read > 15


TRAIN = """
import json, os, sys
from unigen.config import Config
from unigen.training.trainer import UnifiedTrainer
UnifiedTrainer(Config(**json.loads(sys.argv[1]))).train()
"""


@pytest.mark.slow
def test_a_training_with_every_tracker_and_data_workers_ends_and_writes_no_secret(
    home: Path, options: dict, light_model: Path, monkeypatch
):
    need("wandb", "trackio", "tensorboard")
    options["model_path"] = str(light_model)
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-4711")
    every = {"wandb_project": "cats", "wandb_mode": "offline", "trackio_project": "cats", "tensorboard": True}
    every |= {
        "output_dir": str(home),
        "wandb_run_name": "tabby hush-hush-4711",
        "save_steps": 1,
        "num_workers": 2,
    }
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(options | every)],
        capture_output=True, text=True, timeout=200, cwd=home.parent,
    )  # fmt: skip
    assert done.returncode == 0 and "Tracker" not in done.stderr, done.stderr
    files = [path for path in home.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    for part in (
        "config.json",
        "metrics.jsonl",
        "step_2/training_config.json",
        "tensorboard/events*",
        "wandb/*/*.wandb",
        "trackio/cats.db",
    ):
        assert any(path.match(part) for path in files), part
    assert b"tabby <hidden>" in (home / "config.json").read_bytes()
    for content in [path.read_bytes() for path in files] + [(done.stdout + done.stderr).encode()]:
        assert KEY.encode() not in content and b"hush-hush-4711" not in content
    assert len(log_lines(home)) == 2
