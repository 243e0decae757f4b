"""The options of the run that trained a model's weights, beside them: what says how the model is asked.

A checkpoint holds all of its run's options. A folder that leaves the run (an export, a saved model) takes
those that are read here and no more: the others name places and data of whoever trained it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unigen.config import Config, UserError
from unigen.foreign import read_json, roots_of
from unigen.model.storage import json_bytes
from unigen.schema import Flag, Items, Maybe, Table, whole

RUN_OPTIONS = "training_config.json"
_READ = Table(
    {},
    {
        "max_image_tokens": whole(1, 1 << 20),
        "train_sources": Maybe(Items(Table())),
        "train_transitions": Flag(),
    },
)
_LIMITS = ("max_image_tokens", "max_image_size", "min_image_size")  # of a source's pictures


class RunOptionsError(UserError):
    """The options of a run that lie beside weights cannot be read."""


def run_options(folder: Path | None) -> Config | None:
    """How the run that trained a folder's weights resized pictures, and whether it taught the model to
    decide; other options have their defaults. None where no run has left its options there.

    Raises:
        RunOptionsError: they cannot be read.
    """
    if folder is None or not os.path.lexists(path := folder / RUN_OPTIONS):
        return None
    try:
        found = Config(**_READ.known(read_json(path, roots_of(folder), _READ)))
        found.sources()
    except UserError as error:
        raise RunOptionsError(
            f"{path} cannot be read ({error}). Fix: copy the checkpoint again, or remove the file: pictures "
            "are then shown as with the default options"
        ) from error
    return found


def carried(folder: Path | None) -> dict[str, bytes]:
    """The file that goes with a folder's weights where they are copied, by its name: what
    :func:`run_options` gives, without the places of the data.

    Raises:
        RunOptionsError: as there.
    """
    run = run_options(folder)
    if run is None:
        return {}
    options: dict[str, Any] = {name: getattr(run, name) for name in ("max_image_tokens", "train_transitions")}
    if run.train_sources:
        options["train_sources"] = [
            {"path": str(number)}
            | {name: most for name in _LIMITS if (most := getattr(source, name)) is not None}
            for number, source in enumerate(run.sources())
        ]
    return {RUN_OPTIONS: json_bytes(options)}
