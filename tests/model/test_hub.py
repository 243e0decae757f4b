"""No library asks a hub for code, and none prints a line of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unigen.model.hub import without_hub_kernels


def test_inside_the_package_cannot_be_imported_and_nobody_complains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "kernels.py").write_text("here = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with without_hub_kernels():
        with pytest.raises(ImportError):
            import kernels
        logger.warning("Failed to load x from kernels-community")
        logger.warning("something else")
    logger.warning("kernels again")
    assert [record.getMessage() for record in caplog.records] == ["something else", "kernels again"]
    import kernels

    assert kernels.here and sys.modules.pop("kernels")


OFFLINE = """
import sys
def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        sys.stderr.write(f"ASKED {event} {args}\\n"); sys.stderr.flush()
        raise RuntimeError(event)
sys.addaudithook(forbid)
from unigen.model.weights import load_bagel
from unigen.sequence.tokens import Tokenizer
load_bagel(sys.argv[1]); Tokenizer.load(sys.argv[1])
try:
    from unigen.training.adam8bit import _adamw8bit
    _adamw8bit()
except ValueError as error:
    assert "needs bitsandbytes" in str(error)
"""


@pytest.mark.slow
def test_loading_asks_no_network_and_prints_nothing(golden: Path, tmp_path: Path):
    """With a package ``kernels`` that tells when it is asked: bitsandbytes asks it at its import, on some
    CPUs."""
    (tmp_path / "kernels.py").write_text(
        "import sys\ndef get_kernel(*a, **k):\n    sys.stderr.write('ASKED A HUB')\n    raise OSError\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, golden / "model"],
        env={**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
