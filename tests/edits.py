"""One-value edits of JSON: every key of a value in turn gets values that are wrong for most keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

GONE = object()
VALUES = ("x", 0, -1, 10**12, 1.5, None, [], {}, True, float("nan"), GONE)


def edits(value: Any, path: tuple[Any, ...] = (), limit: int = 1000) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(Path of a key, what it gets) of every edit; of objects and lists the first ``limit`` entries."""
    for key in list(value if isinstance(value, dict) else range(len(value)))[:limit]:
        for new in VALUES:
            yield (*path, key), new
        if isinstance(value[key], (dict, list)):
            yield from edits(value[key], (*path, key), limit)


def edited(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with one value changed, or removed."""
    value = at = copy.deepcopy(value)
    for key in path[:-1]:
        at = at[key]
    if new is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


def sampled(value: Any, every: int, limit: int = 1000) -> list[tuple[tuple[Any, ...], Any]]:
    """Every so-and-so-many-th edit, or all with 1; a number prime to that of VALUES meets all of them."""
    return list(edits(value, (), limit))[::every]
