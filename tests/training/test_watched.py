"""A real training, watched from outside while it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unigen.commands.watch.health import diagnose
from unigen.commands.watch.terminal import frame
from unigen.runs.reader import RunFolder, is_run
from unigen.show.language import Words
from unigen.show.terminal import drawn

ROOT = Path(__file__).parents[2]


def shown(run: RunFolder) -> str:
    return "\n".join(drawn(part, 100) for part in frame([run], Words("en", "watch")))


@pytest.mark.slow
def test_a_training_is_seen_running_and_then_finished(options, tmp_path):
    """States in order: running with rising steps, then finished; its checkpoint is listed; the numbers are
    those of its log."""
    folder, log = Path(options["output_dir"]), tmp_path / "log.txt"
    words = options | {"max_steps": 12, "save_steps": 6}
    argv = [
        sys.executable,
        "-m",
        "unigen",
        "train",
        *(part for name, value in words.items() for part in (f"--{name}", str(value))),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seen: list[tuple[str, int]] = []
    with open(log, "w") as out:
        process = subprocess.Popen(argv, env=env, stdout=out, stderr=out)
    try:
        run, deadline = RunFolder(folder), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if folder.exists() and is_run(folder):
                # Its files are in every state between these looks.
                run.update()
                seen.append((diagnose(run).name, run.step))
                if len(seen) % 5 == 0:
                    shown(run)
            time.sleep(0.03)
        assert process.wait(5) == 0, log.read_text()
        run.update()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(20)
    steps = [step for _, step in seen]
    alive = {step for name, step in seen if name == "running"}
    assert steps == sorted(steps) and len(alive) >= 3, seen
    assert diagnose(run).name == "finished" and run.step == run.total_steps == 12
    assert [c.name for c in run.checkpoints if c.name != "best"] == ["step_6", "step_12"] and run.checkpoints[
        -1
    ].size > 1000
    assert run.metrics.log.n_unreadable == 0 and run.metrics.log.n_lines >= 12
    text = shown(run)
    assert "finished" in text and "100.0%" in text and "step_12" in text
