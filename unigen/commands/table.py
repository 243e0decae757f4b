"""The commands of ``unigen``: a row each.

A command is a dataclass of options, a function that takes it, one line of help, and an example. Both are
named as ``module:name`` and imported when the command is called, so ``unigen --help`` needs no PyTorch.
``cli.py`` reads the options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """A row of the table: what it takes, what it does (both ``module:name``), and what the help says.

    ``positional`` is the option of several values that stands first, without a flag; ``short`` gives options
    of one letter.
    """

    options: str
    run: str
    summary: str
    example: str
    positional: str = ""
    short: Mapping[str, str] = {}


COMMANDS: dict[str, Command] = {
    "train": Command(
        "unigen.config:Config",
        "unigen.commands.train:train",
        "Train a checkpoint on JSON, JSONL or Parquet data.",
        "unigen train --model_path models/BAGEL-7B-MoT --train_data_path data/train.jsonl --learning_rate"
        " 2e-5 --bf16",
    ),
    "generate": Command(
        "unigen.commands.generate.options:GenerateOptions",
        "unigen.commands.generate.command:generate",
        "Generate text and pictures from a prompt and pictures.",
        'unigen generate --model_path outputs/unified_training/best --prompt "Draw a cat" --output_dir out',
    ),
    "evaluate": Command(
        "unigen.commands.evaluate.command:EvaluateOptions",
        "unigen.commands.evaluate.command:evaluate",
        "Answer held-out records and measure the answers: metrics with intervals.",
        "unigen evaluate --model_path outputs/unified_training/best --data_path data/val.jsonl",
    ),
    "check": Command(
        "unigen.commands.check.command:CheckOptions",
        "unigen.commands.check.command:run",
        "Check all data: every problem with its place and fix, statistics, advice.",
        "unigen check data/train.jsonl --deep --output check.html",
        positional="paths",
    ),
    "preview": Command(
        "unigen.commands.preview.pick:PreviewOptions",
        "unigen.commands.preview.command:preview",
        "Show samples as the model sees them: tokens, loss, pictures, positions, mask.",
        "unigen preview data/train.jsonl -n 5 --output preview.html",
        positional="paths",
        short={"n": "samples"},
    ),
    "plan": Command(
        "unigen.commands.plan.options:PlanOptions",
        "unigen.commands.plan.command:plan",
        "Tell what a training would take, and what to change where that does not fit.",
        "unigen plan --model_path models/BAGEL-7B-MoT --gpus 1 --gpu_memory 24GB --config recipe.yaml",
    ),
    "fetch": Command(
        "unigen.commands.fetch.command:FetchOptions",
        "unigen.commands.fetch.command:fetch",
        "Fetch the pictures that records name by http and https addresses.",
        "unigen fetch data/train.jsonl --output_dir fetched",
        positional="paths",
    ),
    "cache": Command(
        "unigen.commands.cache:CacheOptions",
        "unigen.commands.cache:run",
        "Encode the pictures of the data once, so that training need not.",
        "unigen cache data/train.jsonl --model_path models/BAGEL-7B-MoT --cache_dir cache --bf16",
        positional="train_data_path",
    ),
    "ckpt": Command(
        "unigen.commands.ckpt.options:CkptOptions",
        "unigen.commands.ckpt.command:run",
        "List, verify and export the checkpoints of a run.",
        "unigen ckpt export outputs/unified_training/step_1000 exported --dtype bfloat16",
        positional="paths",
    ),
    "watch": Command(
        "unigen.commands.watch.options:WatchOptions",
        "unigen.commands.watch.command:watch",
        "Show a running or finished training in the terminal, or as a page.",
        "unigen watch outputs/unified_training --html run.html",
        positional="run",
    ),
    "init": Command(
        "unigen.commands.init.command:InitOptions",
        "unigen.commands.init.command:init",
        "Make a small model with random weights, to train on a CPU in minutes.",
        "unigen init --output_dir models/own --text_from data/train.jsonl",
    ),
    "demo": Command(
        "unigen.commands.demo.command:DemoOptions",
        "unigen.commands.demo.command:demo",
        "Train a tiny model on handwritten digits and report what it learnt.",
        "unigen demo --quick",
    ),
}
