"""Token lengths of records, known before training and without their contents: a row for each block, text and
picture."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from unigen.config import DataOptions
from unigen.sequence.draw import structure_numbers
from unigen.sequence.types import Kind

BLOCK_DTYPE = np.dtype(
    [
        ("tokens", np.int32),  # with the two that open and close it
        ("labels", np.int32),  # tokens with a label
        ("kind", np.uint8),  # a Kind
        ("target", bool),  # the model learns to produce it
        ("droppable", bool),  # guidance dropout may take it away
        ("by_chance", bool),  # a clean copy that single_image_stop_prob of the epoch passes have
    ]
)


class Grids(NamedTuple):
    """Rows and columns of a picture's tokens; zeros where an encoder does not look."""

    latent_rows: int
    latent_columns: int
    vit_rows: int
    vit_columns: int

    @property
    def latent(self) -> tuple[int, int]:
        return self[:2]

    @property
    def vit(self) -> tuple[int, int]:
        return self[2:]


class RecordLengths(NamedTuple):
    """What the lengths of a record's epoch passes follow from."""

    blocks: np.ndarray  # [blocks] BLOCK_DTYPE: those of a pass with all clean copies and nothing dropped
    texts: list[int]  # ids of each text, followed by those of its other caption variants
    pictures: list[Grids]


class Blocks(NamedTuple):
    """The blocks of some records, one after another."""

    table: np.ndarray  # [B] BLOCK_DTYPE
    record: np.ndarray  # [B] int64: which of the given records
    number: np.ndarray  # [B] int64: place among the blocks of its record

    def sums(self, values: np.ndarray, records: int) -> np.ndarray:
        """[records] int64: the sum of ``values`` [B] over the blocks of each record."""
        return np.bincount(self.record, values, records).astype(np.int64)


def dropout_chances(options: DataOptions) -> tuple[float, ...]:
    """How often guidance dropout takes a context block of each :class:`Kind` away."""
    chances = {
        Kind.TEXT: options.text_cond_dropout_prob,
        Kind.VIT: options.vit_cond_dropout_prob,
        Kind.CLEAN: options.vae_cond_dropout_prob,
    }
    return tuple(chances.get(kind, 0.0) for kind in Kind)


class Ragged:
    """A growing list of arrays of one dtype. A list of Python lists of the same numbers takes about ten times
    the memory."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        # views of both exist in the methods below alone: while there is one, nothing can be appended
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, row: np.ndarray | Sequence[Any]) -> None:
        self._bytes += np.array(row, self.dtype).tobytes()
        self._ends.append(len(self._bytes) // self.dtype.itemsize)

    def extend(self, other: Ragged) -> None:
        """Appends all rows of another one."""
        first = self._ends[-1]
        self._bytes += other._bytes
        self._ends.extend(first + end for end in other._ends[1:])

    @classmethod
    def of(cls, values: np.ndarray, ends: np.ndarray) -> Ragged:
        """What :meth:`values` and :meth:`ends` say. Raises ValueError where they do not belong together."""
        made = cls(values.dtype)
        if (
            ends.dtype != np.int64
            or ends.ndim != 1
            or not len(ends)
            or ends[0] != 0
            or ends[-1] != len(values)
        ):
            raise ValueError("ends of other rows")
        made._bytes, made._ends = bytearray(values.tobytes()), array("q", ends.tobytes())
        return made

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        size = self.dtype.itemsize
        return np.frombuffer(self._bytes[self._ends[i] * size : self._ends[i + 1] * size], self.dtype)

    def ends(self) -> np.ndarray:
        """[rows + 1] int64: row i is ``values()[ends[i]:ends[i + 1]]``."""
        return np.array(self._ends)

    def values(self) -> np.ndarray:
        """All rows, one after another [N]."""
        return np.frombuffer(bytes(self._bytes), self.dtype)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The given rows one after another [N], and how long each is [n] int64."""
        ends = np.frombuffer(self._ends, np.int64)
        counts = ends[rows + 1] - ends[rows]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        values = np.frombuffer(self._bytes, self.dtype)
        # twice as fast as indexing where the dtype has fields
        return values.take(np.repeat(ends[rows], counts) + inside), counts


class TokenLengths:
    """The lengths of many records: a growing list of :class:`RecordLengths`, some 80 bytes each."""

    def __init__(self, records: Iterable[RecordLengths] = ()):
        self._blocks, self._texts = Ragged(BLOCK_DTYPE), Ragged(np.dtype(np.int32))
        self._pictures = Ragged(np.dtype([(side, np.uint16) for side in Grids._fields]))
        for record in records:
            self.append(record)

    def append(self, record: RecordLengths) -> None:
        self._blocks.append(record.blocks)
        self._texts.append(record.texts)
        self._pictures.append(record.pictures)

    def extend(self, other: TokenLengths) -> None:
        """Appends those of more records."""
        for mine, more in zip(self._columns(), other._columns()):
            mine.extend(more)

    def _columns(self) -> tuple[Ragged, Ragged, Ragged]:
        return self._blocks, self._texts, self._pictures

    def arrays(self) -> list[np.ndarray]:
        """Everything as arrays, for :meth:`of`."""
        return [part for column in self._columns() for part in (column.values(), column.ends())]

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> TokenLengths:
        """What :meth:`arrays` gave. Raises ValueError for anything else."""
        made = cls()
        found = [Ragged.of(*arrays[i : i + 2]) for i in range(0, len(arrays), 2)]
        if [column.dtype for column in found] != [column.dtype for column in made._columns()]:
            raise ValueError("lengths of another kind")
        if len({len(column) for column in found}) > 1:
            raise ValueError("lengths of different records")
        made._blocks, made._texts, made._pictures = found
        return made

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, i: int) -> RecordLengths:
        pictures = [Grids(*sides) for sides in self._pictures[i].tolist()]
        return RecordLengths(self._blocks[i], self._texts[i].tolist(), pictures)

    def keep(self, records: Iterable[int]) -> TokenLengths:
        """The given records alone, in the given order."""
        return TokenLengths(self[i] for i in records)

    def blocks(self, records: np.ndarray) -> Blocks:
        """The blocks of ``records`` [n]."""
        table, counts = self._blocks.take(records)
        starts = np.cumsum(counts) - counts
        return Blocks(
            table,
            np.repeat(np.arange(len(records)), counts),
            np.arange(len(table)) - np.repeat(starts, counts),
        )

    def tokens_by_kind(self, limit: int) -> dict[str, int]:
        """Tokens of all records without the clean copies by chance, and text targets cut at ``limit``:
        ``text``, ``vit``, ``clean``, ``noised``; and what has loss of them: ``trained_text``, the labels, and
        ``trained_image``, the latents to draw."""
        blocks = self._blocks.values()
        there = ~blocks["by_chance"]
        tokens, labels = (np.where(there, blocks[name], 0).astype(np.int64) for name in ("tokens", "labels"))
        sums = np.bincount(blocks["kind"], tokens, len(Kind)).astype(np.int64).tolist()
        found = {kind.name.lower(): sums[kind] for kind in Kind}
        # a cut takes as many labels as tokens, from text targets alone
        over = np.add.reduceat(tokens, self._blocks.ends()[:-1]) - limit if len(self) else tokens
        cut = int(np.maximum(over, 0).sum())
        found["text"] -= cut
        drawn = tokens - 2 * there
        return found | {
            "trained_text": int(labels.sum()) - cut,
            "trained_image": int(drawn[blocks["kind"] == Kind.NOISED].sum()),
        }

    def full(self, limit: int) -> np.ndarray:
        """Tokens [records] int64 with all clean copies and nothing dropped, at most ``limit``: the most that
        an epoch pass can have."""
        if not len(self):
            return np.zeros(0, np.int64)
        ends = self._blocks.ends()
        return np.minimum(np.add.reduceat(self._blocks.values()["tokens"], ends[:-1], dtype=np.int64), limit)

    def of_passes(
        self,
        rows: np.ndarray,
        numbers: np.ndarray,
        seed: int,
        epoch: int | None,
        options: DataOptions,
        limit: int,
    ) -> np.ndarray:
        """Tokens [n] int64 of epoch passes over many records, of which nothing is read.

        Where a text has caption variants the longest counts, so this is :meth:`Planner.length` or a little
        more.

        Args:
            rows: [n] int64, which of the records here.
            numbers: [n] int64, their numbers as in :class:`RandomKey`.
            epoch: None for validation.
            limit: No pass is longer.
        """
        if not len(rows):
            return np.zeros(0, np.int64)
        blocks = self.blocks(rows)
        table = blocks.table
        drawn = structure_numbers(seed, epoch, numbers, 2 + int(blocks.number.max(initial=-1)))
        kept = ~table["by_chance"] | (drawn[blocks.record, 0] < options.single_image_stop_prob)
        if epoch is not None:
            chances = np.array(dropout_chances(options))[table["kind"]]
            kept &= ~table["droppable"] | (drawn[blocks.record, 1 + blocks.number] >= chances)
        return np.minimum(blocks.sums(np.where(kept, table["tokens"], 0), len(rows)), limit)
