"""The commands of ``unigen``: a row each.

A command is a dataclass of options, a function that takes it, one line of help, and an example. Both are named as
``module:name`` and imported when the command is called, so ``unigen --help`` needs no PyTorch. ``cli.py`` reads the options.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unigen.config import Config


class Command(NamedTuple):
    """A row of the table: what it takes, what it does (both ``module:name``), and what the help says.

    ``positional`` is the option of several values that stands first, without a flag; ``short`` gives options of one letter.
    """

    options: str
    run: str
    summary: str
    example: str
    positional: str = ""
    short: Mapping[str, str] = {}


def train(config: Config) -> int:
    """``unigen train``: 0, or 75 where a signal stopped it. Raises ConfigError before PyTorch is imported where an option cannot work."""
    config.resolve()
    from unigen.training.stops import EXIT_STOPPED
    from unigen.training.trainer import UnifiedTrainer

    trainer = UnifiedTrainer(config)
    trainer.train()
    return EXIT_STOPPED if trainer.stopped else 0


def generate(options: Any) -> None:
    """``unigen generate``."""
    from unigen.inference.generate import answer
    from unigen.report import write_pieces

    prompt, pieces = answer(options)
    page = write_pieces(Path(options.output_dir), prompt, pieces, title="Unigen")
    for piece in pieces:
        print(piece if isinstance(piece, str) else f"[picture of {piece.width} x {piece.height}]")
    print(f"Written to {page}")


COMMANDS: dict[str, Command] = {
    "train": Command(
        "unigen.config:Config",
        "unigen.commands:train",
        "Train a checkpoint on JSON, JSONL or Parquet data.",
        "unigen train --model_path models/BAGEL-7B-MoT --train_data_path data/train.jsonl --learning_rate 2e-5 --bf16",
    ),
    "generate": Command(
        "unigen.inference.generate:GenerateOptions",
        "unigen.commands:generate",
        "Generate text and pictures from a prompt and pictures.",
        'unigen generate --model_path outputs/unified_training/best --prompt "Draw a cat" --output_dir out',
    ),
    "check": Command(
        "unigen.check.command:CheckOptions",
        "unigen.check.command:run",
        "Check all data: every problem with its place and cure, statistics, advice.",
        "unigen check data/train.jsonl --deep --output check.html",
        positional="paths",
    ),
    "preview": Command(
        "unigen.preview.pick:PreviewOptions",
        "unigen.preview.command:preview",
        "Show samples as the model sees them: tokens, loss, pictures, positions, mask.",
        "unigen preview data/train.jsonl -n 5 --output preview.html",
        positional="paths",
        short={"n": "samples"},
    ),
    "fetch": Command(
        "unigen.fetch.command:FetchOptions",
        "unigen.fetch.command:fetch",
        "Fetch the pictures that records name by http and https addresses.",
        "unigen fetch data/train.jsonl --output_dir fetched",
        positional="paths",
    ),
    "cache": Command(
        "unigen.precompute:CacheOptions",
        "unigen.precompute:run",
        "Encode the pictures of the data once, so that training need not.",
        "unigen cache data/train.jsonl --model_path models/BAGEL-7B-MoT --cache_dir cache --bf16",
        positional="train_data_path",
    ),
    "ckpt": Command(
        "unigen.ckpt.options:CkptOptions",
        "unigen.ckpt.command:run",
        "List, verify and export the checkpoints of a run.",
        "unigen ckpt export outputs/unified_training/step_1000 exported --dtype bfloat16",
        positional="paths",
    ),
    "watch": Command(
        "unigen.watch.options:WatchOptions",
        "unigen.watch.command:watch",
        "Show a running or finished training in the terminal, or as a page.",
        "unigen watch outputs/unified_training --html run.html",
        positional="run",
    ),
    "demo": Command(
        "unigen.demo.command:DemoOptions",
        "unigen.demo.command:demo",
        "Train a tiny model on handwritten digits and report what it learnt.",
        "unigen demo --quick",
    ),
}
