"""Edits: did what should change, and did what should stay?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unigen.evaluation.features import Picture
from unigen.evaluation.perceptual import at_size
from unigen.evaluation.results import (
    Result,
    Unfit,
    digest_of,
    digest_of_numbers,
    identity,
    metric,
    same_length,
)
from unigen.evaluation.statistics import estimate
from unigen.sequence.images import open_image

_NONE = {True: "no reference changes a pixel", False: "no reference leaves a pixel"}
CHANGES = 0.1  # of the range of levels: from there on the reference changes a pixel


@metric("edit_changed", "share of the difference from source to reference that was made, where they differ")
def edit_changed(
    pictures: Sequence[Picture], sources: Sequence[Picture], references: Sequence[Picture], *, seed: int = 0
) -> Result:
    """Did what should change? Over the pixels that the reference changes: ``1 - |picture - reference| /
    |source - reference|``, sums of absolute differences, 1 as in the reference, 0 as far from it as the
    source, at least -1. Means of the edits that change something."""

    def measure(picture: Any, source: Any, reference: Any, changes: Any) -> float:
        asked = np.abs(source - reference)[changes].sum()
        return max(-1.0, 1 - float(np.abs(picture - reference)[changes].sum() / asked))

    return _by_region("edit_changed", pictures, sources, references, measure, inside=True, seed=seed)


@metric("edit_stayed", "1 - mean absolute difference to the source, where source and reference agree")
def edit_stayed(
    pictures: Sequence[Picture], sources: Sequence[Picture], references: Sequence[Picture], *, seed: int = 0
) -> Result:
    """Did what should stay? Over the pixels that the reference leaves as they are: 1 minus the mean absolute
    difference of picture and source, levels from 0 to 1. Means of the edits that leave something."""

    def measure(picture: Any, source: Any, reference: Any, changes: Any) -> float:
        return 1 - float(np.abs(picture - source)[~changes].mean())

    return _by_region("edit_stayed", pictures, sources, references, measure, inside=False, seed=seed)


def _by_region(
    kind: str, pictures: Any, sources: Any, references: Any, measure: Any, *, inside: bool, seed: int
) -> Result:
    n = same_length(pictures, sources, references)
    parts, digests = np.zeros((n, 2)), []
    for number, three in enumerate(zip(pictures, sources, references)):
        size = open_image(three[0]).size
        picture, source, reference = (
            np.asarray(at_size(open_image(one), size), np.float64) / 255 for one in three
        )
        digests += [digest_of_numbers(source), digest_of_numbers(reference)]
        changes = np.abs(reference - source).mean(-1) > CHANGES
        if (changes if inside else ~changes).any():
            parts[number] = measure(picture, source, reference, changes), 1
    if not parts[:, 1].any():
        raise Unfit(_NONE[inside], "give edits that do")
    counted = int(parts[:, 1].sum())
    notes = () if counted == n else (f"{counted} of {n} edits count",)
    name = identity(kind, "rgb", f"threshold={CHANGES:g}", n=n)
    samples = np.where(parts[:, 1] > 0, parts[:, 0], np.nan)
    return estimate(name, parts, "ratio", seed=seed, samples=samples, data=digest_of(digests), notes=notes)
