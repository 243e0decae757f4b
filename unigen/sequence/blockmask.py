"""The mask rule as flex attention takes it: five numbers a token, and a table of blocks of 128 tokens.

It is computed with NumPy while a sequence is packed, so that the device builds no mask of its own. Both
halves of the sequence are padded to whole blocks: kernels then need no bounds checks, and no block mixes the
halves.
"""

from __future__ import annotations

import numpy as np

BLOCK = 128
# of a block of queries and a block of keys: none, some or all pairs are allowed
NONE, PARTIAL, FULL = 0, 1, 2


def padded(n: int) -> int:
    """``n`` tokens, filled up to whole blocks."""
    return -(-n // BLOCK) * BLOCK


def flex_mask(
    index: np.ndarray, sample: np.ndarray, span: np.ndarray, image: np.ndarray, noised: np.ndarray, n_und: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rule of :func:`unigen.model.attention.allowed` for one packed sequence, from its columns [T] (see
    ``Pack``).

    A query sees the keys whose place lies between two bounds, unless they are noised and of another span.
    Padding sees only the padding before it.

    Returns:
        [5, padded tokens] int32: lower and upper bound and span of a query; place, and span where noised
        (else -1), of a key. [blocks, blocks] uint8: NONE, PARTIAL or FULL for every block of queries and
        block of keys.
    """
    n, n_gen = len(index), len(index) - n_und
    stored = np.concatenate([np.arange(n_und), padded(n_und) + np.arange(n_gen)])
    total = padded(n_und) + padded(n_gen)
    columns = {"sample": sample, "span": span, "image": image, "noised": noised, "place": index}
    empty = {"sample": -1, "span": -1, "image": False, "noised": False, "place": 0}
    wide = {
        name: np.full(total, empty[name], np.int64 if name in ("sample", "span", "place") else bool)
        for name in columns
    }
    for name, column in columns.items():
        wide[name][stored] = column
    padding = np.ones(total, bool)
    padding[stored] = False
    wide["place"][padding] = n + np.arange(padding.sum())
    return _rule(wide, n), _blocks(wide)


def _rule(wide: dict[str, np.ndarray], n: int) -> np.ndarray:
    place, real = wide["place"], wide["sample"] >= 0
    first = np.full(int(wide["sample"].max(initial=-1)) + 1, n, np.int64)
    np.minimum.at(first, wide["sample"][real], place[real])
    last = np.full(int(wide["span"].max(initial=-1)) + 1, -1, np.int64)
    np.maximum.at(last, wide["span"][real], place[real])
    lower, upper = np.full(len(place), n, np.int64), place.copy()
    lower[real] = first[wide["sample"][real]]
    upper[wide["image"]] = last[wide["span"][wide["image"]]]
    return np.stack([lower, upper, wide["span"], place, np.where(wide["noised"], wide["span"], -1)]).astype(
        np.int32
    )


def _blocks(wide: dict[str, np.ndarray]) -> np.ndarray:
    """Pairs of runs (tokens of one span in one block) are judged whole, then joined to blocks."""
    span, total = wide["span"], len(wide["span"])
    if not total:
        return np.zeros((0, 0), np.uint8)
    begins = np.ones(total, bool)
    begins[1:] = (span[1:] != span[:-1]) | (np.arange(1, total) % BLOCK == 0)
    starts = np.flatnonzero(begins)
    run = {name: column[starts] for name, column in wide.items()}
    first, last = (f.reduceat(wide["place"], starts) for f in (np.minimum, np.maximum))
    before = last[None] < first[:, None]  # [query runs, key runs]: do the keys end before the queries begin?
    inside = run["span"][:, None] == run["span"]
    full = np.where(inside, run["image"][:, None] | (last[None] <= first[:, None]), before & ~run["noised"])
    some = full | (inside & (first[None] <= last[:, None]))
    same = run["sample"][:, None] == run["sample"]
    edges = np.flatnonzero(starts % BLOCK == 0)
    every = np.logical_and.reduceat(np.logical_and.reduceat(full & same, edges, axis=0), edges, axis=1)
    any_ = np.logical_or.reduceat(np.logical_or.reduceat(some & same, edges, axis=0), edges, axis=1)
    return np.where(every, FULL, np.where(any_, PARTIAL, NONE)).astype(np.uint8)
