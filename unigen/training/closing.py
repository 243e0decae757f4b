"""What a finished run says at its end: what came of it, and what to do next as lines to copy."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from unigen.config import Config
from unigen.messages import in_language
from unigen.runs import layout
from unigen.runs.checkpoint import CheckpointError, read_manifest
from unigen.tracking.console import duration

_EXAMPLE = "Draw a cat"  # where the run has no prompt of its own


def closing(
    output_dir: Path,
    config: Config,
    step: int,
    best: float,
    last: Mapping[str, float],
    seconds: float,
    tokens: int,
    early: bool = False,
) -> list[str]:
    """The last lines of a run.

    Args:
        step: optimiser steps done.
        best: metric_for_best_model at its best; infinite where nothing was validated.
        last: the newest metrics.
        seconds: that this process of the run took its steps for.
        tokens: that all processes trained on in them.
        early: did a guard end it before its last step?
    """
    lines = [
        f"{'Ended early' if early else 'Done'}: step {step} after {duration(seconds)}"
        + (f", {tokens:,} tokens ({tokens / seconds:,.0f} a second)" if tokens and seconds > 0 else "")
    ]
    newest, kept = output_dir / layout.step_name(step), output_dir / layout.BEST
    model = newest
    if "val_loss" in last:
        line = f"Validation: val_loss {last['val_loss']:.4f} at the end"
        try:
            at = read_manifest(kept)["step"]
        except CheckpointError:
            lines.append(line)
        else:
            model = kept
            name = config.metric_for_best_model
            value = f"{best:.4f} " if math.isfinite(best) else ""
            told = value if name == "val_loss" else f"{name} {value}"
            lines.append(f"{line}, the best {told}at step {at} ({kept})")
    return lines + following(output_dir, config, model)


def following(output_dir: Path, config: Config, model: Path) -> list[str]:
    """What can be done next with a checkpoint of a run, as lines to copy."""
    return [in_language("Next:"), *(f"  {command}" for command in _commands(output_dir, config, model))]


def _reading(config: Config) -> list[str]:
    """The options by which a run read its held-out data."""
    named = {name: getattr(config, name) for name in ("image_root", "data_root", "trigger_word")}
    words = [word for name, value in named.items() if value is not None for word in (f"--{name}", value)]
    if config.val_split:
        words += ["--split", config.val_split]
    if config.fields:
        words += ["--fields", *(f"{name}={place}" for name, place in config.fields.items())]
    return words


def _commands(output_dir: Path, config: Config, model: Path) -> list[str]:
    weights = ["--model_path", model]  # an adapter knows its base
    given = config.sample_prompts or []
    asked = [given] if isinstance(given, str) else given
    own = next((text for text in asked if not text.endswith((".txt", ".jsonl"))), in_language(_EXAMPLE))
    prompt = [*weights, "--prompt", own, "--output_dir", f"{output_dir}_answer"]
    commands: list[list[object]] = [["unigen", "generate", *prompt]]
    if config.val_data_path:
        paths = [config.val_data_path] if isinstance(config.val_data_path, str) else config.val_data_path
        where = ["--data_path", *paths, *_reading(config), "--output_dir", f"{output_dir}_evaluation"]
        commands.append(["unigen", "evaluate", *weights, *where])
    commands.append(["unigen", "watch", output_dir, "--html", f"{output_dir}.html"])
    if config.tensorboard:
        commands.append(["tensorboard", "--logdir", output_dir / layout.TENSORBOARD])
    if config.wandb_project and config.wandb_mode == "offline":
        runs = sorted((output_dir / layout.WANDB).glob("offline-run-*"))
        commands += [["wandb", "sync", run] for run in runs[-1:]]
    return [shlex.join(map(str, words)) for words in commands]
