"""What an unknown option most likely meant: a slip of the hand, or the name that another trainer has for it.

The names of others are in ``assets/options/others.yaml``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from functools import cache
from importlib.resources import files
from typing import Any

_ALIKE = 0.75  # of 1: lerning_rate is 0.96 like learning_rate, lora_rank 0.5 like dry_run
_FEWEST = 4  # letters of a word that stands for a name which holds it


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that a misspelt or shortened one most likely meant (``epochs``: ``num_epochs``); None
    where none is like it."""
    name = name.replace("-", "_")
    if found := difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE):
        return found[0]
    holding = [other for other in known if name in other.split("_")] if len(name) >= _FEWEST else []
    return holding[0] if len(holding) == 1 else None


@cache
def names_of_others() -> dict[str, dict[str, Any]]:
    """Names that other trainers have: ``same`` -> the option here that takes the same value (or several, of
    which a command has one), ``instead`` -> what to write, ``absent`` -> why there is none."""
    import yaml

    text = (files("unigen") / "assets" / "options" / "others.yaml").read_text("utf-8")
    return yaml.safe_load(text)


def unknown(
    name: str,
    known: Collection[str],
    prefix: str = "",
    elsewhere: Callable[[str], str] = lambda name: "",
) -> str:
    """What to say after ``unknown option NAME``, from its first sign on.

    Args:
        name: as written, without dashes in front.
        known: the options of the command.
        prefix: of options where they are written: ``--`` for flags.
        elsewhere: what to say of a name that neither other trainers nor a slip of the hand explain; "" where
            that is unknown.
    """
    name = name.replace("-", "_")
    others = names_of_others()
    if same := others["same"].get(name):
        names = same if isinstance(same, list) else [same]
        ours = next((one for one in names if one in known), names[0])
        if ours in known:
            return f"; here it is {prefix}{ours}. Fix: write that in its place"
        return f"; here it is {prefix}{ours}, which this command does not take. Fix: leave it out"
    if write := others["instead"].get(name):
        return f"; what does the same here: {write}. Fix: write that in its place"
    if why := others["absent"].get(name):
        return f", which is not here: {why}. Fix: leave it out"
    if near := nearest(name, known):
        return f"; did you mean {prefix}{near}? Fix: correct it"
    return elsewhere(name) or ". Fix: correct it, or leave it out"
