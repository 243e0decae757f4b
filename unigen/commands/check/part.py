"""What one process of ``unigen check`` does with a part of the data: judges its records and counts their
tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unigen.commands.check.statistics import NEAR_EMPTY_SHOWN, PICTURE, RECORD, Tally, count_tokens
from unigen.data.containers import ByteSpan, FilePart, Raw, read_part
from unigen.data.dataset import TASKS, task
from unigen.data.examine import PictureHeaders, examine, hash_of, key_of, locate
from unigen.data.formats import FORMATS
from unigen.data.keys import Notes, Unlearnt
from unigen.data.mapping import PLAIN, ReadOptions
from unigen.data.splits import Split
from unigen.data.workers import Mark
from unigen.sequence.images import PictureError, bad_picture, image_size, open_image, read_picture
from unigen.sequence.lengths import RecordLengths, TokenLengths
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import Tokenizer, WordTokenizer
from unigen.sequence.types import BadRecord, Image, Origin, Record, Text, without_trace

_BATCH, _BATCH_BYTES = 512, 8 << 20  # records that are tokenised together
_PICTURES = 100_000  # pictures whose size a process remembers
_NO_LIMIT = 1 << 31


class CheckedData(NamedTuple):
    """Data that is read in one way: ``name`` is the source's; ``split`` is taken of folders that hold
    several, or the one that ``named_split`` names."""

    name: str
    paths: Sequence[str | Path]
    planner: Planner
    read: ReadOptions = PLAIN
    split: Split = "train"
    named_split: str | None = None


class PartJob(NamedTuple):
    """A part to check, of the data ``source``. ``skip`` are records (by their number in the part) that a
    process died of, and how."""

    part: FilePart | None
    source: int = 0
    skip: tuple[tuple[int, str], ...] = ()
    lost: BadRecord | None = None  # what makes the rest of its file unreadable, in place of a part


class PartFindings(NamedTuple):
    """What a process found in a part: its counts, and its problems as ``BadRecord.to_dict`` gives them."""

    tally: Tally
    problems: list[dict[str, Any]]

    @classmethod
    def of_lost(cls, error: BadRecord) -> PartFindings:
        """The outcome of a part that could not be read."""
        return cls(Tally.join([]), [error.to_dict()])


def checker(data: Sequence[CheckedData], deep: bool) -> Callable[[PartJob, Mark], PartFindings]:
    """What does a :class:`PartJob`; made once in each process."""
    checkers = [_Checker(one.planner, deep, one.read) for one in data]
    return lambda job, mark: checkers[job.source].work(job, mark)


def is_near_empty(text: str) -> bool:
    """A description that says next to nothing: fewer than three letters and digits; a Chinese character
    counts as three."""
    return sum(3 if ord(c) > 0x2E7F else 1 for c in text if c.isalnum()) < 3


class CountingTokenizer:
    """Stands in for a planner's tokenizer where only lengths are asked for: counts in batches, and remembers
    what comes again."""

    LIMIT = 16 << 20  # characters of remembered texts

    def __init__(self, tokenizer: Tokenizer):
        self.special, self._tokenizer = tokenizer.special, tokenizer
        self.control_token = tokenizer.control_token
        self._known: dict[str, int] = {}
        self._held = 0

    def learn(self, texts: Iterable[str]) -> None:
        if self._held > self.LIMIT:
            self._known, self._held = {}, 0
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if isinstance(self._tokenizer, WordTokenizer):
            lengths = [self._tokenizer.count(text) for text in new]
        else:
            lengths = list(map(len, self._tokenizer.encode_all(new)))
        self._known.update(zip(new, lengths))
        self._held += sum(map(len, new)) + 100 * len(new)

    def encode(self, text: str) -> range:
        if text not in self._known:
            self.learn([text])
        return range(self._known[text])


class _Looks(PictureHeaders):
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
        """A hash of the bytes of a good picture; 0 where no file is read for it."""
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
                content = int(key) if inside else hash_of(read_picture(source)) if self.deep else 0
                if self.deep:
                    open_image(source)
                self._seen[key] = image_size(source), content
                self.sound += 1
            except PictureError as error:
                self._seen[key] = without_trace(error)
        return self._seen[key]


class _Checker:
    def __init__(self, planner: Planner, deep: bool, read: ReadOptions):
        self.deep, self.read = deep, read
        self.max_length = planner.max_length
        self.strict, self.planner = copy.copy(planner), copy.copy(planner)
        self.tokenizer = CountingTokenizer(planner.tokenizer)
        self.strict.tokenizer = self.planner.tokenizer = self.tokenizer  # type: ignore[assignment]
        self.planner.max_length = _NO_LIMIT
        self.looks = _Looks(deep)

    def work(self, job: PartJob, mark: Mark) -> PartFindings:
        if job.part is None:
            assert job.lost is not None
            return PartFindings.of_lost(job.lost)
        reading = _Reading(self, job.part, dict(job.skip), mark)
        try:
            for step, (span, raw) in enumerate(read_part(job.part)):
                mark(step)
                reading.add(step, span, raw)
        except BadRecord as error:  # the rest of the part
            reading.bad.append((_NO_LIMIT, error))
        return reading.finish()


class _Reading:
    """The records of one part on their way: judged one by one, their tokens counted in batches."""

    def __init__(self, checker: _Checker, part: FilePart, skip: dict[int, str], mark: Mark):
        self.checker, self.part, self.skip, self.mark = checker, part, skip, mark
        self.records: list[tuple[Any, ...]] = []  # what the columns of RECORD begin with
        self.pictures: list[tuple[Any, ...]] = []  # rows of PICTURE
        self.lengths, self.counted = TokenLengths(), list[int]()  # and the records they are of
        self.near_empty: list[tuple[str, str]] = []
        self.notes = Notes()
        self.bad: list[tuple[int, BadRecord]] = []
        self.waiting: list[tuple[int, Record, list[str]]] = []
        self.held = 0

    def add(self, step: int, span: ByteSpan, raw: Raw) -> None:
        self.records.append((0,) * len(RECORD))
        try:
            if step in self.skip:
                fix = "leave the record out, or save its pictures again"
                found = f"the process that read it ended: {self.skip[step]}"
                origin = Origin(self.part.path, span.line or None, span.index)
                raise BadRecord("check_died", "(record)", found, "a harmless record", fix, origin)
            record, fields, _ = examine(raw, span, self.part.path, self.checker.looks, read=self.checker.read)
        except Unlearnt as error:
            self.notes.add([("unlearnt", error.field)])
            return
        except BadRecord as error:
            self.bad.append((step, without_trace(error)))
            return
        self.waiting.append((step, record, fields))
        inside = (p.source for p in record.sample if isinstance(p, Image) and isinstance(p.source, bytes))
        self.held += len(raw) if isinstance(raw, bytes) else sum(map(len, inside))
        if len(self.waiting) >= _BATCH or self.held >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        samples = [record.sample for _, record, _ in self.waiting]
        self.checker.tokenizer.learn(
            text for sample in samples for part in sample if isinstance(part, Text) for text in part.variants
        )
        for step, record, fields in self.waiting:
            self.mark(step)
            try:
                self._count(step, record)
            except BadRecord as error:
                locate(error, record.origin, fields)  # a planner knows no fields
                self.bad.append((step, without_trace(error)))
        self.waiting, self.held = [], 0

    def _count(self, step: int, record: Record) -> None:
        lengths = self.checker.planner.token_lengths(record)
        self.lengths.append(lengths)
        self.counted.append(step)
        # the length with all clean copies, or a little more
        if lengths.blocks["tokens"].sum() > self.checker.max_length:
            self.checker.strict.token_lengths(record)
        keys = iter(self._note_pictures(step, record, lengths))
        told = [
            (segment.target, segment.text if isinstance(segment, Text) else next(keys))
            for segment in record.sample
        ]
        texts = [segment.text for segment in record.sample if segment.target and isinstance(segment, Text)]
        images = sum(segment.target for segment in record.sample) - len(texts)
        name = task(record.sample)
        empty = next((text for text in _described(record, name) if is_near_empty(text)), None)
        if empty is not None and len(self.near_empty) < NEAR_EMPTY_SHOWN:
            self.near_empty.append((str(record.origin), empty))
        hashes = hash_of(repr(told).encode()), hash_of(repr(texts).encode()) if texts else 0
        numbers = list(FORMATS).index(record.format), TASKS.index(name), len(texts), images
        row = (*hashes, True, empty is not None, *numbers)
        self.records[step] = row + (0,) * (len(RECORD) - len(row))
        self.notes.add(record.notes)

    def _note_pictures(self, step: int, record: Record, lengths: RecordLengths) -> Iterator[int]:
        """Notes the pictures of a record; a hash of each that tells it apart."""
        looks, planner, grids = self.checker.looks, self.checker.planner, iter(lengths.pictures)
        smallest, stride = planner.transforms.vae.min_size, planner.geometry.latent_stride
        for number, segment in enumerate(record.sample):
            if not isinstance(segment, Image):
                continue
            assert segment.size is not None
            grid, least, content = next(grids), min(segment.size), looks.content(segment.source)
            key = content if isinstance(segment.source, bytes) else key_of(str(segment.source))
            upscaled = any(grid.latent) and least < min(smallest, stride * min(grid.latent))
            place = (key, content if self.checker.deep else 0, step, number, *segment.size)
            tokens = grid.latent_rows * grid.latent_columns, grid.vit_rows * grid.vit_columns
            self.pictures.append((*place, *tokens, upscaled))
            yield key

    def finish(self) -> PartFindings:
        self.flush()
        records = np.array(self.records, RECORD)
        if self.counted:
            count_tokens(records, self.counted, self.lengths, self.checker.planner, self.part.index)
        near_empty = self.near_empty[:NEAR_EMPTY_SHOWN]
        tally = Tally(records, np.array(self.pictures, PICTURE), near_empty, self.notes)
        return PartFindings(
            tally, [error.to_dict() for _, error in sorted(self.bad, key=lambda entry: entry[0])]
        )


def _described(record: Record, name: str) -> Iterator[str]:
    """The texts that the pictures of a record of task ``name`` are described with: all there is besides
    them."""
    texts = [segment for segment in record.sample if isinstance(segment, Text)]
    if name == "generate" or (name == "understand" and all(text.target for text in texts)):
        for text in texts:
            yield from text.variants
