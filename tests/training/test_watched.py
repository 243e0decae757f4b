"""A real training, watched from outside while it runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from processes import end_of, flags, printed_by, start_command

from unigen.commands.watch.health import diagnose
from unigen.commands.watch.terminal import frame
from unigen.runs.reader import RunFolder, is_run
from unigen.show.language import Words
from unigen.show.terminal import drawn


def shown(run: RunFolder) -> str:
    return "\n".join(drawn(part, 100) for part in frame([run], Words("en", "watch")))


@pytest.mark.slow
def test_a_training_is_seen_running_and_then_finished(options, tmp_path):
    """States in order: running with rising steps, then finished; its checkpoint is listed; the numbers are
    those of its log."""
    folder, log = Path(options["output_dir"]), tmp_path / "log.txt"
    seen: list[tuple[str, int]] = []
    argv = ["train", *flags(options | {"max_steps": 12, "save_steps": 6})]
    (process,) = start_command(log, argv)
    try:
        run, deadline = RunFolder(folder), time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if folder.exists() and is_run(folder):
                # Its files are in every state between these looks.
                run.update()
                seen.append((diagnose(run).name, run.step))
                if len(seen) % 5 == 0:
                    shown(run)
            time.sleep(0.03)
    finally:
        codes = end_of([process], 5)
    assert codes == [0], printed_by(log)
    run.update()
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
