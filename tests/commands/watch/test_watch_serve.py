"""``unigen watch --serve``: the page of now at each look, for this machine alone."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from recorded import record, row

from unigen.cli import main
from unigen.commands.watch.serve import PageServer
from unigen.config import UserError

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_page_follows_the_run_until_ctrl_c(tmp_path: Path):
    run = record(tmp_path / "run", 3, ranks=1)
    argv = [sys.executable, "-m", "unigen", "watch", str(run), "--serve", "--port", "0", "--interval", "7"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            assert address is not None
            with urllib.request.urlopen(address[0]) as answer:
                assert answer.headers["Refresh"] == "7" and b"0.1875" not in answer.read()
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row(4, random.Random(1), loss=0.1875)) + "\n")
            with urllib.request.urlopen(address[0]) as answer:
                assert b"0.1875" in answer.read()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 1)


@pytest.fixture
def server():
    import threading

    with PageServer(0, 5, lambda: b"<p>here</p>") as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_another_sites_name_gets_nothing(server: PageServer):
    """A page elsewhere whose name was pointed at this machine must not read the run."""
    for host, status in (("evil.example", 403), (f"localhost:{server.server_address[1]}", 200)):
        asked = http.client.HTTPConnection(*server.server_address[:2])
        asked.request("GET", "/", headers={"Host": host})
        answer = asked.getresponse()
        assert answer.status == status and (b"here" in answer.read()) == (status == 200)
        asked.close()


def test_nothing_but_the_page_is_there(server: PageServer):
    assert server.address.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(server.address + "../etc/passwd")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(server.address, data=b"x")


def test_a_taken_port_is_said(server: PageServer):
    with pytest.raises(UserError, match="Fix: --port 0"):
        PageServer(server.server_address[1], 5, bytes)


def test_serve_and_another_output_exclude_each_other(tmp_path: Path, capsys):
    assert main(["watch", str(tmp_path), "--serve", "--once"]) == 2
    assert "serve and once" in capsys.readouterr().err
