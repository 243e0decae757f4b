"""What one process of ``unigen check`` does with a part of the data: judges, measures and counts its
records."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unigen.commands.check.statistics import NEAR_EMPTY_SHOWN, Histogram, Tally
from unigen.commands.check.workers import Mark
from unigen.data.containers import ByteSpan, FilePart, Raw, read_part
from unigen.data.dataset import task
from unigen.data.examine import Pictures, bad_picture, examine, key_of
from unigen.sequence.images import PictureError, image_size, open_image, read_bytes
from unigen.sequence.plan import Planner
from unigen.sequence.ragged import Ragged
from unigen.sequence.tokens import Tokenizer, WordTokenizer
from unigen.sequence.types import BadRecord, Image, Origin, Record, Text

_BATCH, _BATCH_BYTES = 512, 8 << 20  # records that are tokenised together
_PICTURES = 100_000  # pictures whose size a process remembers
_NO_LIMIT = 1 << 31


class PartJob(NamedTuple):
    """A part to check. ``skip`` are records (by their number in the part) that a process died of, and how."""

    part: FilePart | None
    skip: tuple[tuple[int, str], ...] = ()
    lost: BadRecord | None = None  # what makes the rest of its file unreadable, in place of a part


class Outcome(NamedTuple):
    """What a process found in a part: its counts, and its problems as ``BadRecord.to_dict`` gives them."""

    tally: Tally
    problems: list[dict[str, Any]]


def checker(
    planner: Planner, limits: tuple[int, ...], deep: bool, data_root: str | Path | None
) -> Callable[[PartJob, Mark], Outcome]:
    """What does a :class:`PartJob`; made once in each process."""
    return _Checker(planner, limits, deep, data_root).work


def hash_of(value: bytes) -> int:
    """64 bits that tell ``value`` from others; never 0, which stands for nothing."""
    return int.from_bytes(blake2b(value, digest_size=8).digest(), "little") or 1


def is_near_empty(text: str) -> bool:
    """A description that says next to nothing: fewer than three letters and digits; a Chinese character
    counts as three."""
    return sum(3 if ord(c) > 0x2E7F else 1 for c in text if c.isalnum()) < 3


class _Lengths:
    """Stands in for a planner's tokenizer where only lengths are asked for: counts in batches, and remembers
    what comes again."""

    LIMIT = 16 << 20  # characters of remembered texts

    def __init__(self, tokenizer: Tokenizer):
        self.special, self._tokenizer = tokenizer.special, tokenizer
        self._fast = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
        self._known: dict[str, int] = {}
        self._held = 0

    def learn(self, texts: Iterable[str]) -> None:
        if self._held > self.LIMIT:
            self._known, self._held = {}, 0
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if isinstance(self._tokenizer, WordTokenizer):
            lengths = [self._tokenizer.count(text) for text in new]
        elif self._fast is not None:
            lengths = [
                len(encoding.ids) for encoding in self._fast.encode_batch(new, add_special_tokens=False)
            ]
        else:
            lengths = [len(self._tokenizer.encode(text)) for text in new]
        self._known.update(zip(new, lengths))
        self._held += sum(map(len, new)) + 100 * len(new)

    def encode(self, text: str) -> range:
        if text not in self._known:
            self.learn([text])
        return range(self._known[text])


class _Looks(Pictures):
    """What was seen of pictures: by their headers, or (``deep``) decoded to the last row. Remembers so many
    of them."""

    def __init__(self, deep: bool):
        super().__init__()
        self.deep = deep
        self._seen: dict[str, tuple[tuple[int, int], int] | PictureError] = {}

    def size(self, source: Any, field: str) -> tuple[int, int]:
        found = self._find(source)
        if isinstance(found, PictureError):
            raise bad_picture(found, field)
        return found[0]

    def content(self, source: Any) -> int:
        """A hash of the bytes of a good picture; 0 where they were not read."""
        found = self._find(source)
        assert not isinstance(found, PictureError)
        return found[1]

    def _find(self, source: Any) -> tuple[tuple[int, int], int] | PictureError:
        inside = isinstance(source, bytes)
        key = str(hash_of(source)) if inside else str(source)
        if key not in self._seen:
            if len(self._seen) >= _PICTURES:
                self._seen.clear()
            try:
                content = int(key) if inside else hash_of(read_bytes(source)) if self.deep else 0
                if self.deep:
                    open_image(source)
                self._seen[key] = image_size(source), content
            except PictureError as error:
                self._seen[key] = error
        return self._seen[key]


class _Checker:
    def __init__(self, planner: Planner, limits: tuple[int, ...], deep: bool, data_root: str | Path | None):
        self.limits, self.deep, self.root = limits, deep, data_root
        self.max_length = planner.max_length
        self.strict, self.planner = copy.copy(planner), copy.copy(planner)
        self.lengths = _Lengths(planner.tokenizer)
        self.strict.tokenizer = self.planner.tokenizer = self.lengths  # type: ignore[assignment]
        self.planner.max_length = _NO_LIMIT
        self.looks = _Looks(deep)

    def work(self, job: PartJob, mark: Mark) -> Outcome:
        if job.part is None:
            assert job.lost is not None
            return Outcome(Tally(self.limits), [job.lost.to_dict()])
        reading = _Reading(self, job.part, dict(job.skip), mark)
        try:
            for step, (span, raw) in enumerate(read_part(job.part)):
                mark(step)
                reading.add(step, span, raw)
        except BadRecord as error:  # the rest of the part
            reading.bad.append((_NO_LIMIT, error))
        return reading.finish()


class _Reading:
    """The records of one part on their way: judged one by one, measured in batches."""

    def __init__(self, checker: _Checker, part: FilePart, skip: dict[int, str], mark: Mark):
        self.checker, self.part, self.skip, self.mark = checker, part, skip, mark
        self.tally, self.rows = Tally(checker.limits), Ragged()
        self.good: list[bool] = []  # as the rows
        self.tasks: list[str] = []
        self.sizes: list[int] = []
        self.latent: list[int] = []
        self.vit: list[int] = []
        self.bad: list[tuple[int, BadRecord]] = []
        self.waiting: list[tuple[int, Record, list[str]]] = []
        self.held = 0

    def add(self, step: int, span: ByteSpan, raw: Raw) -> None:
        self.tally.records.append(0)
        self.tally.texts.append(0)
        try:
            if step in self.skip:
                fix = "leave the record out, or save its pictures again"
                found = f"the process that read it ended: {self.skip[step]}"
                origin = Origin(self.part.path, span.line or None, span.index)
                raise BadRecord("check_died", "(record)", found, "a harmless record", fix, origin)
            record, fields, _ = examine(raw, span, self.part.path, self.checker.looks, root=self.checker.root)
        except BadRecord as error:
            self.bad.append((step, error))
            return
        self.waiting.append((step, record, fields))
        inside = (p.source for p in record.sample if isinstance(p, Image) and isinstance(p.source, bytes))
        self.held += len(raw) if isinstance(raw, bytes) else sum(map(len, inside))
        if len(self.waiting) >= _BATCH or self.held >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        texts = (
            text
            for _, record, _ in self.waiting
            for p in record.sample
            if isinstance(p, Text)
            for text in (p.text, *p.others)
        )
        self.checker.lengths.learn(texts)
        for step, record, fields in self.waiting:
            self.mark(step)
            try:
                self._measure(step, record)
            except BadRecord as error:
                error.origin = record.origin
                piece = re.fullmatch(r"piece (\d+)", error.field)  # a planner knows no fields
                error.field = fields[int(piece[1])] if piece else error.field
                self.bad.append((step, error))
        self.waiting, self.held = [], 0

    def _measure(self, step: int, record: Record) -> None:
        row = self.checker.planner.measure(record)
        name = task(record.sample)
        # the length with all copies, or a little more
        if sum(row[1 : 1 + row[0]]) >> 5 > self.checker.max_length:
            try:
                self.checker.strict.measure(record)
            except BadRecord:
                self._keep(row, False, name)
                raise
        self._keep(row, True, name)
        self._count(step, record, name, row)

    def _keep(self, row: Sequence[int], good: bool, name: str) -> None:
        self.rows.append(row)
        self.good.append(good)
        self.tasks.append(name)

    def _count(self, step: int, record: Record, name: str, row: Sequence[int]) -> None:
        tally, counts = self.tally, self.tally.counts
        counts["records", "good"] += 1
        counts["format", record.format] += 1
        counts["task", name] += 1
        texts = [piece.text for piece in record.sample if piece.target and isinstance(piece, Text)]
        images = sum(piece.target for piece in record.sample) - len(texts)
        counts["targets", "texts"] += len(texts)
        counts["targets", "images"] += images
        counts["records", "with_text_target"] += bool(texts)
        counts["records", "with_image_target"] += images > 0
        pictures = [(number, piece) for number, piece in enumerate(record.sample) if isinstance(piece, Image)]
        keys = iter([self._note(step, number, piece) for number, piece in pictures])
        told = [
            (piece.target, piece.text if isinstance(piece, Text) else next(keys)) for piece in record.sample
        ]
        tally.records[step] = hash_of(repr(told).encode())
        tally.texts[step] = hash_of(repr(texts).encode()) if texts else 0
        if pictures:
            self._measure_pictures(record, row)
            if any(is_near_empty(text) for text in _described(record, name)):
                counts["records", "near_empty"] += 1
                if len(tally.near_empty) < NEAR_EMPTY_SHOWN:
                    text = next(text for text in _described(record, name) if is_near_empty(text))
                    tally.near_empty.append((str(record.origin), text))

    def _note(self, step: int, number: int, piece: Image) -> int:
        """Notes a picture, piece ``number`` of its record, and returns the hash that tells it apart."""
        content = self.checker.looks.content(piece.source)
        key = content if isinstance(piece.source, bytes) else key_of(str(piece.source))
        self.tally.pictures.append(key)
        self.tally.places.append(256 * step + min(number, 255))
        if self.checker.deep:
            self.tally.contents.append(content)
        return key

    def _measure_pictures(self, record: Record, row: Sequence[int]) -> None:
        """``row`` ends with the pieces: a number for each wording, four for a picture (rows, columns of its
        latents, of its ViT)."""
        at = 1 + row[0]
        smallest, stride = (
            self.checker.planner.transforms.vae.min_size,
            self.checker.planner.geometry.latent_stride,
        )
        latent, vit = [], []
        for piece in record.sample:
            if isinstance(piece, Text):
                at += 1 + len(piece.others)
                continue
            assert piece.size is not None
            (width, height), (rows, columns, vit_rows, vit_columns) = piece.size, row[at : at + 4]
            at += 4
            self.sizes.append(width << 32 | height)
            if rows:
                latent.append(rows * columns)
                small = min(width, height) < min(smallest, stride * min(rows, columns))
                self.tally.counts["pictures", "upscaled"] += small
            if vit_rows:
                vit.append(vit_rows * vit_columns)
        self.latent += latent
        self.vit += vit

    def finish(self) -> Outcome:
        self.flush()
        tally = self.tally
        tally.sizes, tally.latent, tally.vit = (
            Histogram(self.sizes),
            Histogram(self.latent),
            Histogram(self.vit),
        )
        tally.measure(self.rows, np.array(self.good, bool), self.tasks, self.checker.planner, self.part.index)
        return Outcome(tally, [error.to_dict() for _, error in sorted(self.bad, key=lambda entry: entry[0])])


def _described(record: Record, name: str) -> Iterator[str]:
    """The texts that the pictures of a record of task ``name`` are described with: all there is besides
    them."""
    texts = [piece for piece in record.sample if isinstance(piece, Text)]
    if name == "generate" or (name == "understand" and all(piece.target for piece in texts)):
        for piece in texts:
            yield from (piece.text, *piece.others)
