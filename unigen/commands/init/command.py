"""``unigen init``: its options, and a small model with random weights in a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from unigen.config import ConfigError, UserError
from unigen.printing import typed
from unigen.values import Options, PathText, Plugin, Renames, Seed


@dataclass(kw_only=True)
class InitOptions(Options):
    """A small model to train from nothing, on a CPU too.

    Args:
        output_dir: Folder for the model, in the published BAGEL layout.
        size: tiny learns from pictures of 16 x 16 pixels in minutes on a CPU; small from those of 32 x 32,
            and takes much longer.
        text_from: Data whose texts the tokenizer learns, files or folders as of a training. Default: bytes
            alone, which read any text and make it long.
        data_root: Folder that every picture of text_from must lie in, links resolved.
        image_root: Folder that relative paths of pictures start from. Default: that of the file that names
            them.
        fields: What fields of the records are called here, as NAME=PLACE; as in training.
        trigger_word: A word that every caption of a picture to draw begins with; as in training.
        split: The split to take of a folder that holds several, by its name. Default: the train split.
        plugin: Modules of your own that add formats or kinds of files; as in training.
        seed: Seed of the weights.
    """

    output_dir: PathText = "models/own"
    size: Literal["tiny", "small"] = "tiny"
    text_from: list[PathText] = field(default_factory=list)
    data_root: PathText | None = None
    image_root: PathText | None = None
    fields: Renames = field(default_factory=dict)
    trigger_word: str | None = None
    split: str | None = None
    plugin: list[Plugin] = field(default_factory=list)
    seed: Seed = 42


INIT = "unigen init"  # the mark of its folder
READING = ("data_root", "image_root", "fields", "trigger_word", "split")  # how text_from is read


def init(options: InitOptions) -> None:
    """``unigen init``.

    Raises:
        UserError: options of data without data; ``output_dir`` holds what this command did not write or what
            was changed since, or cannot be written; the data cannot be read.
    """
    if not options.text_from and (lost := next((n for n in READING if getattr(options, n)), None)):
        raise ConfigError(
            f"{lost} says how text_from is read, and there is none. Fix: name the data (--text_from ...), or"
            f" leave --{lost} out"
        )
    from unigen.commands.init.model import SIZES, create_model, texts_of
    from unigen.data.mapping import ReadOptions
    from unigen.files import sha256_of, staged, sweep
    from unigen.outputs import output_folder, read_receipt, unwritten, write_receipt
    from unigen.show.terminal import say

    folder = output_folder("output_dir", options.output_dir, options.text_from)
    _refuse_others(folder)
    read = ReadOptions.of(options)
    texts = list(texts_of(options.text_from, read, options.split)) if options.text_from else []
    with unwritten("output_dir", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        before = read_receipt(folder, INIT)
        with staged(folder, replace=True) as staging:
            model = create_model(staging, texts, options.seed, **SIZES[options.size])
            sums = {path.name: [sha256_of(path)] for path in sorted(staging.iterdir())}
            write_receipt(staging, INIT, sums)
    parameters = sum(p.numel() for p in model.parameters())
    side = model.config.vae_transform["max_size"]
    say(
        f"Written to {folder}: {parameters / 1e6:.1f} million random parameters, pictures of up to"
        f" {side} x {side} pixels, {model.config.llm.vocab_size:,} tokens"
    )
    if before and before != sums:
        say(f"The model that was in {folder} is replaced: adapters that were trained over it do not fit this")
    say(f"Train it: unigen train --model_path {typed(folder)} --train_data_path ... --learning_rate 3e-3")


def _refuse_others(folder: Path) -> None:
    """Raises UserError where the folder holds anything that an earlier call did not leave there."""
    from unigen.outputs import RECEIPT, RUN, holds, read_receipt, stranger

    if holds(folder, RUN):
        raise UserError(
            f"output_dir {folder} is the folder of a training run. Fix: name a new or an empty folder"
            " (--output_dir ...)"
        )
    if found := stranger(folder, RECEIPT, read_receipt(folder, INIT)):
        raise UserError(
            f"output_dir {folder} holds {found}, which {INIT} did not leave there as it is now. Fix: name a"
            " new or an empty folder (--output_dir ...)"
        )
