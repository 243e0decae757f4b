"""A demo that was stopped goes on; one that came to its end, or has other options, begins anew."""

import json
from pathlib import Path

from unigen.commands.demo.exam import _goes_on


def test_only_a_stopped_demo_of_the_same_options_goes_on(tmp_path: Path):
    run, metrics, flags = tmp_path / "run", tmp_path / "metrics.json", {"max_steps": 5, "seed": 1}
    assert not _goes_on(run, metrics, flags)
    (run / "step_3").mkdir(parents=True)
    assert not _goes_on(run, metrics, flags)
    (run / "config.json").write_text(json.dumps(flags | {"device": "cpu"}))
    assert _goes_on(run, metrics, flags)
    assert not _goes_on(run, metrics, flags | {"seed": 2})
    metrics.write_text("{}")
    assert not _goes_on(run, metrics, flags)
