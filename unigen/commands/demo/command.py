"""``unigen demo``: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unigen.show.terminal import say
from unigen.values import Options, PathText, Seed


@dataclass
class DemoOptions(Options):
    """The demo: real handwritten digits, a tiny model from scratch, a report.

    Args:
        output_dir: Folder for the data, the run, report.html and metrics.json.
        quick: A smaller run of the same line, in about a minute and a half.
        seed: Seed of everything random.
    """

    output_dir: PathText = "outputs/demo"
    quick: bool = False
    seed: Seed = 42


def demo(options: DemoOptions) -> int:
    """``unigen demo``: 0, or 75 where a signal stopped it; called again, it goes on from there."""
    from unigen.commands.demo.exam import Interrupted, run
    from unigen.runs.signals import EXIT_STOPPED

    try:
        run(Path(options.output_dir), options.quick, options.seed)
    except (KeyboardInterrupt, Interrupted):
        say("unigen demo: stopped. The same command goes on from here")
        return EXIT_STOPPED
    return 0
