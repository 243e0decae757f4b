"""Reading all data at the start of a run: every record is judged once, in several processes, and what is kept
is an index.

The files come in parts, as ``unigen check`` takes them; what comes back of a part is arrays and counts. The
result does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unigen.bars import Bar
from unigen.data.containers import (
    CONTAINERS,
    BadData,
    ByteSpan,
    FilePart,
    Raw,
    container_of,
    parts,
    read_part,
)
from unigen.data.examine import CountTokens, Examined, FileStamp, PictureHeaders, examine, key_of
from unigen.data.keys import Notes, Unlearnt
from unigen.data.mapping import ReadOptions
from unigen.data.workers import Died, Mark, in_order
from unigen.messages import in_language
from unigen.sequence.lengths import TokenLengths
from unigen.sequence.types import BadRecord, Image, Origin, Record, Sample, without_trace

PART = 2 << 20  # bytes of JSON Lines that a process reads at a time
ALONE = 4 << 20  # bytes of data up to which this process does it alone
BAD_BYTES = 64 << 20  # of bad records that are kept, about; where there are more, no further record is read
SHOWN = 3  # bad records of a code that an error message shows; the rest are counted
TASKS = ("text", "understand", "generate", "edit", "interleaved")


class Index:
    """Rows of :class:`ByteSpan` in one array (a list of tuples would take ten times the memory)."""

    ROW = np.dtype(list(zip(ByteSpan._fields, ("u4", "u8", "u8", "u8", "u8", "u4"))))

    def __init__(self, rows: np.ndarray | None = None):
        """``rows`` [n] are what :meth:`rows` gave. Raises ValueError for those of another dtype."""
        if rows is not None and rows.dtype != self.ROW:
            raise ValueError("rows of another kind")
        self._bytes = bytearray(b"" if rows is None else rows.tobytes())

    def append(self, span: ByteSpan) -> None:
        self._bytes += np.array(tuple(span), self.ROW).tobytes()

    def extend(self, other: Index) -> None:
        self._bytes += other._bytes

    def __len__(self) -> int:
        return len(self._bytes) // self.ROW.itemsize

    def __getitem__(self, i: int) -> ByteSpan:
        return ByteSpan(*np.frombuffer(self._bytes, self.ROW, 1, i * self.ROW.itemsize)[0].item())

    def rows(self) -> np.ndarray:
        """All rows, [n] with the fields of :class:`ByteSpan`."""
        return np.frombuffer(bytes(self._bytes), self.ROW)

    def runs(self) -> list[tuple[int, int]]:
        """Ranges of rows that agree in file and offset."""
        rows = self.rows()
        new = (np.diff(rows["file"]) != 0) | (np.diff(rows["offset"]) != 0)
        return list(pairwise([0, *(np.flatnonzero(new) + 1).tolist(), len(self)]))

    def digest(self) -> str:
        rows = self.rows()
        return hashlib.sha256(b"".join(rows[name].tobytes() for name in ByteSpan._fields)).hexdigest()


class Found:
    """What was found in files, or in a part of one: of the good records an index, lengths and counts.

    Attributes:
        lengths: What ``token_lengths`` returned for each record; None without it.
        counts: Formats, tasks, and segments of each kind.
        bad: The bad records and their places, in bounds.
        unreadable: What makes files, or the rest of them, unreadable.
        pictured: Numbers of the records with pictures [n] uint64.
        keys: ``key_of`` the paths of pictures [n] uint64, of each part once.
        inside: Pictures that records hold themselves.
        folders: Those that pictures lie in.
        faulty: Paths of pictures that cannot be used, each with its :func:`stamp` when it was looked at.
        held: Records of each file by its number, good or not.
        digests: SHA-256 of the contents of each file by its number; while it is read, those of its parts.
    """

    def __init__(self, counted: bool):
        self.index = Index()
        self.lengths = TokenLengths() if counted else None
        self.counts: Counter[tuple[str, str]] = Counter()
        self.notes = Notes()
        self.bad: list[tuple[ByteSpan, BadRecord]] = []
        self._bad_bytes = 0
        self.unreadable: list[BadRecord] = []
        self.pictured = array("Q")
        self.keys: list[np.ndarray] = []
        self.inside = 0
        self.folders: set[str] = set()
        self.faulty: dict[str, FileStamp] = {}
        self.held: Counter[int] = Counter()
        self.digests: dict[int, str] = {}

    @property
    def distinct(self) -> int:
        """Distinct pictures."""
        if len(self.keys) > 1:
            self.keys = [np.unique(np.concatenate(self.keys))]
        return sum(map(len, self.keys)) + self.inside

    def refuse(self, span: ByteSpan, error: BadRecord) -> None:
        """Adds a bad record. Raises BadData where they take more than ``BAD_BYTES``."""
        self.bad.append((span, without_trace(error)))
        self._bad_bytes += 1000 + len(error.field) + len(error.found) + len(error.expected) + len(error.fix)
        if self._bad_bytes > BAD_BYTES:
            bad = [error for _, error in self.bad]
            raise BadData(
                f"{len(bad):,} records so far cannot be used, and no more are looked at:\n"
                f"{shown_problems(bad)}\nFix: correct them; unigen check lists them all.",
                bad,
            )

    def count(self, record: Record, sign: int) -> None:
        texts = images = pictures = 0
        for segment in record.sample:
            if isinstance(segment, Image):
                pictures += 1
                images += segment.target
            else:
                texts += segment.target
        self.counts["format", record.format] += sign
        self.counts["task", task(record.sample)] += sign
        self.notes.add(record.notes, sign)
        for name, count in (("text_targets", texts), ("image_targets", images), ("pictures", pictures)):
            self.counts["segments", name] += sign * count

    def extend(self, other: Found) -> None:
        """Adds what was found in the part that follows. Raises BadData for too many bad records."""
        first = len(self.index)
        self.pictured.extend(first + i for i in other.pictured)
        self.index.extend(other.index)
        if self.lengths is not None and other.lengths is not None:
            self.lengths.extend(other.lengths)
        self.counts.update(other.counts)
        for note, times in other.notes.items():
            self.notes.add([note], times)
        for span, error in other.bad:
            self.refuse(span, error)
        self.unreadable += other.unreadable
        self.inside += other.inside
        self.folders |= other.folders
        self.faulty |= other.faulty
        for number, digest in other.digests.items():
            self.digests[number] = self.digests.get(number, "") + digest
        self.held.update(other.held)
        self.keys += other.keys

    def drop(self, records: set[int], pictures: int) -> None:
        """Takes the records with these numbers out of the index and the lengths, and so many pictures."""
        keep = [i for i in range(len(self.index)) if i not in records]
        self.index = Index(self.index.rows()[keep])
        if self.lengths is not None:
            self.lengths = self.lengths.keep(keep)
        self.inside -= pictures


class Job(NamedTuple):
    """What a process reads at once: parts of a file that follow one another."""

    number: int  # of the file
    parts: tuple[FilePart, ...]
    hashed: bool = False  # the process hashes the contents of each part
    lost: BadRecord | None = None  # what makes the rest of the file unreadable, in place of parts

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def read_all(
    files: Sequence[Path],
    source: Callable[[int], Path],
    token_lengths: CountTokens | None,
    read: ReadOptions,
    num_workers: int = 0,
    progress: bool = False,
) -> Found:
    """Judges every record of ``files``. ``source`` gives the file to read for each number, itself or its
    unpacked copy; without ``num_workers``, and for little data, this process does it alone.

    Raises:
        BadData: There are more bad records than can be kept.
    """
    found = Found(token_lengths is not None)
    hashes: dict[int, Any] = {}
    total = sum(source(number).stat().st_size for number in range(len(files)))
    # forked, as the loader's processes are: nothing has to be importable, or travels
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    processes = num_workers if total > ALONE and can_fork else 0
    context = multiprocessing.get_context("fork") if processes else None
    jobs, arguments = _jobs(files, source, hashes), (token_lengths, read)
    with Bar("reading data", total, "B", shown=progress) as progress_bar:
        for job, result in in_order(_judge, arguments, jobs, processes, lambda job, died: None, context):
            if isinstance(result, Died):
                found.unreadable.append(_lost(files[job.number], result))
            else:
                found.extend(result)
            progress_bar.notes = [in_language(f"{len(found.index):,} records")]
            progress_bar.update(job.size)
    found.digests = {number: _digest(parts) for number, parts in found.digests.items()}
    found.digests |= {number: digest.hexdigest() for number, digest in hashes.items()}
    return found


def _digest(of_parts: str) -> str:
    """The digest of a file, from those of its parts behind one another."""
    one = len(of_parts) == 2 * hashlib.sha256().digest_size
    return of_parts if one else hashlib.sha256(of_parts.encode()).hexdigest()


def _jobs(files: Sequence[Path], source: Callable[[int], Path], hashes: dict[int, Any]) -> Iterator[Job]:
    """The jobs in order; the contents of files of lines are hashed here as they are cut, while others read
    them. Small groups of a table are read together."""
    for number, path in enumerate(files):
        try:
            if container_of(path) is CONTAINERS[".jsonl"]:
                hashes[number] = hashlib.sha256()
                for part in parts(path, number, PART, source(number)):
                    _feed(part, hashes[number])
                    yield Job(number, (part,))
                continue
            together: list[FilePart] = []
            for part in parts(path, number, PART, source(number)):
                together.append(part)
                if sum(part.size for part in together) >= PART:
                    yield Job(number, tuple(together), hashed=True)
                    together = []
            if together:
                yield Job(number, tuple(together), hashed=True)
        except BadRecord as error:
            yield Job(number, (), lost=error)


def _feed(part: FilePart, digest: Any) -> None:
    """Hashes the bytes of a part."""
    assert part.stop is not None
    with part.source.open("rb") as file:
        file.seek(part.start)
        left = part.stop - part.start
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)


def _lost(path: Path, died: Died) -> BadRecord:
    fix = "run unigen check on this file: it finds the record"
    found = f"a process that read it ended: {died.reason}"
    return BadRecord("check_died", "(file)", found, "a file that can be read", fix, Origin(path))


# ---- in the processes


def _judge(token_lengths: CountTokens | None, read: ReadOptions) -> Callable[[Job, Mark], Found]:
    """What does a :class:`Job`; made once in each process."""
    pictures = PictureHeaders()

    def work(job: Job, mark: Mark) -> Found:
        found = Found(token_lengths is not None)
        met: set[int] = set()
        pictures.faulty, pictures.folders = found.faulty, found.folders
        try:
            if job.lost:
                raise job.lost
            for step, (span, raw) in enumerate(_records(job, found)):
                mark(step)
                try:
                    examined = examine(raw, span, job.parts[0].path, pictures, token_lengths, read)
                    _add(found, span, examined, met)
                except Unlearnt as error:
                    found.notes.add([("unlearnt", error.field)])
                except BadRecord as error:
                    found.refuse(span, error)
        except BadRecord as error:  # the rest of the file
            found.unreadable.append(without_trace(error))
        found.keys = [np.array(sorted(met), np.uint64)] if met else []
        return found

    return work


def _records(job: Job, found: Found) -> Iterator[tuple[ByteSpan, Raw]]:
    """The records of a job; ``found`` gets their count and the digests of its parts."""
    for part in job.parts:
        digest = hashlib.sha256() if job.hashed else None
        for record in read_part(part, digest):
            found.held[job.number] += 1
            yield record
        if digest is not None:
            found.digests[job.number] = found.digests.get(job.number, "") + digest.hexdigest()


def _add(found: Found, span: ByteSpan, examined: Examined, met: set[int]) -> None:
    """Puts a sound record into the index, and its pictures among those that are ``met``."""
    record, _, lengths = examined
    sources = [segment.source for segment in record.sample if isinstance(segment, Image)]
    if sources:
        found.pictured.append(len(found.index))
    for source in sources:
        if isinstance(source, bytes):
            found.inside += 1
        else:
            met.add(key_of(str(source)))
    found.index.append(span)
    found.count(record, 1)
    if found.lengths is not None:
        assert lengths is not None, "token_lengths returned nothing"
        found.lengths.append(lengths)


# ---- words


def task(sample: Sample) -> str:
    """What a sample teaches, by its targets and its context.

    ``text``: texts, no picture anywhere; ``understand``: texts, with pictures as context; ``generate``:
    images alone, without a context picture; ``edit``: images alone, with a context picture; ``interleaved``:
    texts and images.
    """
    targets = {type(segment) for segment in sample if segment.target}
    context_picture = any(isinstance(segment, Image) and not segment.target for segment in sample)
    if len(targets) == 2:
        return "interleaved"
    if Image in targets:
        return "edit" if context_picture else "generate"
    return "understand" if context_picture else "text"


def shown_problems(bad: Sequence[BadRecord]) -> str:
    """The first bad records of each code, one a line, and how many more there are of it."""
    codes: dict[str, list[BadRecord]] = {}
    for error in bad:
        codes.setdefault(error.code, []).append(error)
    lines: list[str] = []
    for code, errors in codes.items():
        lines += [f"  {error}" for error in errors[:SHOWN]]
        if len(errors) > SHOWN:
            lines.append(f"  ... and {len(errors) - SHOWN:,} more of {code}")
    return "\n".join(lines)
