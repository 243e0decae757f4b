"""Real outages of the real packages: servers that hang or fail, services that are killed or frozen; and what
they leave on the disk."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from serving import ROOT, alive, descendants, log_lines, need, run, wait_for, warnings
from tiny import draw_picture

from unigen.config import Config
from unigen.tracking import services
from unigen.tracking.tracker import Tracker

KEY = "5ec2e7" * 6 + "cafe"


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this machine's login, and quick limits."""
    need("wandb")
    for name, value in {"HOME": str(tmp_path), "WANDB_API_KEY": KEY, "NETRC": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(services, "PAUSE_S", 0.0)
    monkeypatch.setattr(services, "START_S", 1.0)
    return tmp_path / "run"


def logs(folder: Path) -> bytes:
    """All that the run's log files hold."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob("wandb/*run-*/run-*.wandb")))


FAILS = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("answer", [b"", FAILS], ids=["never answers", "fails"])
def test_a_server_that_never_answers_or_fails_costs_a_warning_and_no_number(
    wandb_home: Path, answer: bytes, caplog, monkeypatch
):
    """Pass: the run goes on offline under the same id, logging waits for nothing, and all is in the file that
    can be sent later."""
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

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    began = time.monotonic()
    tracker = run(wandb_home, range(1, 4))
    assert time.monotonic() - began < 1
    tracker.finish()
    server.close()
    assert connections, "the server was never asked"
    assert (
        warnings(caplog) == ["Tracker wandb cannot start as asked and goes on with mode offline"]
        and "wandb sync" in caplog.text
    )
    run_id = (wandb_home / "wandb_run_id").read_text().strip()
    (file,) = wandb_home.glob("wandb/offline-run-*/run-*.wandb")
    assert file.name == f"run-{run_id}.wandb" and file.read_bytes().count(b"loss") >= 3
    assert len(log_lines(wandb_home)) == 3


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


@pytest.mark.parametrize("freezes", [False, True], ids=["stays", "freezes midway"])
def test_online_everything_is_sent_and_a_server_that_freezes_midway_holds_the_end_for_its_limit_only(
    wandb_home: Path, freezes: bool, caplog, monkeypatch
):
    """Pass: the server has every number and no secret; frozen, the end comes within FINISH_S, the fix is
    told, the file has the rest."""
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-4711")
    monkeypatch.setattr(services, "START_S", 30.0)
    Server.received, Server.frozen = [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    if freezes:
        monkeypatch.setattr(services, "FINISH_S", 3.0)
    tracker = run(
        wandb_home, range(1, 4), wandb_mode="online", model_path="https://me:pass-4711@host.invalid/m"
    )
    service = tracker._backends["wandb"]
    wait_for(lambda: service._process is not None and not service._calls)
    if freezes:
        Server.frozen.set()
    tracker.log({"late": 1.0}, 4)
    began = time.monotonic()
    tracker.finish()
    assert time.monotonic() - began < (9 if freezes else 60)
    Server.frozen.clear()
    server.shutdown()
    server.server_close()
    if freezes:
        assert (
            "Tracker wandb could not send everything in time" in warnings(caplog)
            and "wandb sync" in caplog.text
        )
        assert b"late" in logs(wandb_home)
        return
    assert not warnings(caplog)
    sent = "".join(Server.received)
    assert all(f'\\"_step\\":{step}' in sent for step in (1, 2, 3, 4)) and '\\"late\\":1' in sent
    for secret in (KEY, "hush-hush-4711", "pass-4711"):
        assert secret not in sent


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_killed_or_frozen_wandb_core_holds_nothing(
    wandb_home: Path, how: signal.Signals, caplog, monkeypatch
):
    """Pass: killed, the run is taken up again and loses no step; frozen, the end comes in time. No process is
    left."""
    tracker = run(wandb_home, range(1, 4), wandb_mode="offline")
    service = tracker._backends["wandb"]
    wait_for(lambda: service._process is not None and not service._calls)
    started = descendants(service._process.pid)
    (core,) = [pid for pid, name in started.items() if name.startswith("wandb-core")]
    os.kill(core, how)
    if how == signal.SIGSTOP:
        monkeypatch.setattr(services, "FINISH_S", 1.0)
    for step in range(4, 7):
        tracker.log({"loss": 1 / step, f"late_{step}": 1.0}, step)
    began = time.monotonic()
    tracker.finish()
    if how == signal.SIGSTOP:
        assert time.monotonic() - began < 8
        os.kill(core, signal.SIGCONT)
        assert warnings(caplog) == ["Tracker wandb did not end in time"]
    else:
        (said,) = warnings(caplog)  # the connection may be missed at any call
        assert said in [f"Tracker wandb cannot {what} and is started again" for what in ("log", "finish")]
        assert all(f"late_{step}".encode() in logs(wandb_home) for step in range(4, 7))
    wait_for(lambda: not any(alive(pid) for pid in started))
    assert len(log_lines(wandb_home)) == 6


def test_no_login_costs_a_warning_and_the_run_is_kept(wandb_home: Path, caplog, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    run(wandb_home, range(1, 3), wandb_mode="online").finish()
    assert (
        warnings(caplog) == ["Tracker wandb cannot start as asked and goes on with mode offline"]
        and "API key" in caplog.text
    )
    assert b"loss" in logs(wandb_home)


# ---- Trackio


def trackio_rows(database: Path) -> list[tuple[int, dict]]:
    with contextlib.closing(sqlite3.connect(database)) as opened:
        return [
            (step, json.loads(values))
            for step, values in opened.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]


def test_a_killed_trackio_goes_on_in_its_run_and_shows_every_step_once(tmp_path: Path, caplog, monkeypatch):
    need("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(services, "PAUSE_S", 0.0)
    tracker = Tracker(tmp_path / "run", Config(trackio_project="cats"))
    database = tmp_path / "trackio" / "cats.db"
    for step in (1, 2, 3):
        tracker.log({"loss": 1 / step}, step)
    wait_for(
        lambda: (
            database.exists()
            and "metrics" in database.read_bytes().decode("latin-1")
            and len(trackio_rows(database)) == 3
        )
    )
    tracker.log({"loss": 1 / 4}, 4)
    os.kill(tracker._backends["trackio"]._process.pid, signal.SIGKILL)
    tracker.log({"loss": 1 / 5}, 5)
    tracker.finish()
    assert [(step, row["loss"]) for step, row in trackio_rows(database)] == [
        (step, 1 / step) for step in range(1, 6)
    ]
    assert warnings(caplog) == ["Tracker trackio has stopped and is started again"]


# ---- everything at once: what is shown, what is resumed, what is not written

ALL = """
import logging, sys
from pathlib import Path
from unigen.config import Config
from unigen.runs.secrets import hide_in_logs
from unigen.tracking.tracker import Tracker
logging.basicConfig(level=logging.INFO, filename=sys.argv[1] + "/log.txt", format="%(levelname)s %(message)s")
hide_in_logs()
folder, resume = Path(sys.argv[1]), int(sys.argv[2])
config = Config(
    wandb_project="cats", wandb_run_name="tabby", wandb_mode="offline", trackio_project="cats", tensorboard=True,
    model_path="https://me:option-4711@example.invalid/model",
)
tracker = Tracker(folder, config, resume)
for step in range(resume + 1, resume + 4):
    tracker.log({"loss": 1.0 / step, "bad": float("nan"), "none": None, "note": "key " + sys.argv[4]}, step)
tracker.image("samples/0", Path(sys.argv[3]), step)
tracker.text("prompts/0", "a ``` <b>cat</b>, --token " + sys.argv[4], step)
tracker.finish()
"""

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


def test_offline_all_is_shown_and_resumed_and_no_secret_is_written(tmp_path: Path):
    """Pass: pictures, texts and numbers are in each tracker, steps dropped by a resume are shown once, the
    same run goes on, and no file holds a secret of the environment, of an option or of the command line; no
    Python process reaches for another machine."""
    for name in ("wandb", "trackio", "tensorboard"):
        need(name)
    folder, picture = tmp_path / "run", tmp_path / "a.png"
    folder.mkdir()
    draw_picture(picture, 0, 48, 32)
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    secrets = {
        "WANDB_API_KEY": KEY,
        "AWS_SECRET_ACCESS_KEY": "hush-hush-4711",
        "HF_TOKEN": "hf_" + "Ab3" * 12,
        "TRACKIO_SPACE_ID": "me/space",
    }
    places = {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "GUARD_LOG": str(tmp_path / "guard.log"),
    }
    env = os.environ | secrets | places | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "guard"), ROOT])}
    for name in ("TRACKIO_DIR", "HF_HUB_OFFLINE"):
        env.pop(name, None)

    def train(resume: int) -> None:
        done = subprocess.run(
            [sys.executable, "-c", ALL, str(folder), str(resume), str(picture), "argument-4711"],
            capture_output=True, text=True, env=env, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout == "", done.stderr

    train(0)
    ids = [(folder / name).read_text() for name in ("wandb_run_id", "trackio_run_id")]
    train(2)
    assert ids == [(folder / name).read_text() for name in ("wandb_run_id", "trackio_run_id")]
    assert "WARNING" not in (folder / "log.txt").read_text(), (folder / "log.txt").read_text()
    assert not (tmp_path / "guard.log").exists(), (tmp_path / "guard.log").read_text()

    files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{ids[0].strip()}.wandb"}
    assert all(word in logs(folder) for word in (b"cats", b"tabby", b"loss", b"image_loss_weight"))
    assert sys.executable.encode() not in logs(folder), "what wandb calls metadata: command, host, user"
    pictures = list(folder.glob("wandb/offline-run-*/files/media/images/samples/*.png"))
    assert len(pictures) == 2 and pictures[0].read_bytes() == picture.read_bytes()
    assert any("&lt;b&gt;cat" in page.read_text() for page in folder.rglob("*.html"))

    with contextlib.closing(sqlite3.connect(tmp_path / "hf" / "trackio" / "cats.db")) as database:
        rows = [
            (step, json.loads(values))
            for step, values in database.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
        names = database.execute("SELECT DISTINCT run_id, run_name FROM metrics").fetchall()
        config = database.execute("SELECT config FROM configs").fetchone()[0]
    assert len(names) == 1 and names[0][1] == f"tabby-{ids[1].strip()}" and b"image_loss_weight" in config
    assert [(step, row["loss"]) for step, row in rows if "loss" in row] == [
        (step, 1 / step) for step in range(1, 6)
    ]
    ((step, shown),) = [(step, row["samples/0"]) for step, row in rows if "samples/0" in row]
    assert (
        step == 5
        and (tmp_path / "hf" / "trackio" / "media" / shown["file_path"]).read_bytes() == picture.read_bytes()
    )
    ((step, shown),) = [(step, row["prompts/0"]) for step, row in rows if "prompts/0" in row]
    assert step == 5 and "<b>cat</b>" in shown["_value"]

    read = 0
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink() and path != tmp_path / "guard" / "sitecustomize.py":
            read += 1
            for name, value in {
                **secrets,
                "option": "option-4711",
                "argument": "--token argument-4711",
            }.items():
                assert name == "TRACKIO_SPACE_ID" or value.encode() not in path.read_bytes(), (name, path)
    assert read > 15


def test_a_training_run_writes_no_secret_into_its_folder(
    wandb_home: Path, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pass: a run with every tracker, a checkpoint and secrets in the environment and in an option leaves
    none of them in any file."""
    for name in ("trackio", "tensorboard"):
        need(name)
    from unigen.training.trainer import UnifiedTrainer

    monkeypatch.setenv("SOME_TOKEN", "hush-hush-4711")
    monkeypatch.setenv("TRACKIO_DIR", str(wandb_home / "trackio"))
    every = {"wandb_project": "cats", "wandb_mode": "offline", "trackio_project": "cats", "tensorboard": True}
    secret = "https://me:option-4711@host.invalid with hush-hush-4711"
    trainer = UnifiedTrainer(
        Config(**options | every | {"output_dir": str(wandb_home), "wandb_run_name": secret, "save_steps": 1})
    )
    trainer.train()
    files = [path for path in wandb_home.rglob("*") if path.is_file() and not path.is_symlink()]
    for part in (
        "config.json",
        "metrics.jsonl",
        "step_2/training_config.json",
        "tensorboard/events*",
        "wandb/*/*.wandb",
        "trackio/cats.db",
    ):
        assert any(path.match(part) for path in files), part
    assert b"<hidden>" in (wandb_home / "config.json").read_bytes()
    for path in files:
        content = path.read_bytes()
        for value in (KEY, "hush-hush-4711", "option-4711"):
            assert value.encode() not in content, path
    assert len(log_lines(wandb_home)) == 2
