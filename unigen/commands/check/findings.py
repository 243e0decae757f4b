"""Reads everything, reports everything: what ``unigen check`` finds, before anything is printed.

Every record is judged by the code that the data set judges it with, in several processes; what comes back
from them is problems, counts and hashes. The findings do not depend on the number of processes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unigen.commands.check.part import CheckedData, PartFindings, PartJob, checker
from unigen.commands.check.statistics import (
    KINDS,
    Tally,
    distribution_of,
    how_full_packs_get,
    repeats,
    what_limits_cut,
)
from unigen.data.containers import ByteSpan, FilePart, Raw, no_record, parts, read_part
from unigen.data.dataset import AUTO_FULL_CHECK, TASKS
from unigen.data.finding import find_files
from unigen.data.formats import FORMATS, parse_raw
from unigen.data.keys import NOTES
from unigen.data.loader import cores
from unigen.data.probe import require_match
from unigen.data.splits import LeftOut, describing, of_splits
from unigen.data.workers import Died, in_order
from unigen.files import atomic, json_of
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import WordTokenizer
from unigen.sequence.types import BadRecord, Image, Origin, Record, Text

CHECK = "unigen check"  # the mark of what the command writes
# bytes of JSON Lines read as one part: decoding pictures takes longer, so that parts are smaller
PART, DEEP_PART = 1 << 20, 1 << 17
ALONE = 1 << 20  # bytes of data up to which this process does it alone, as starting others takes seconds
BUDGETS = (8192, 16384, 32768)
INSIDE = "(inside the file)"  # in place of the path of a picture that has none
SHOWN = 8  # of the most frequent repetitions and picture sizes
LIMITS = (1024, 2048, 4096, 8192, 16384, 32768)
MAX_PROBLEMS = 1 << 30  # bytes of problems that are written down; the others are counted
DEATHS = 20  # processes that may die before what they die of is no longer looked for record by record


class Problems:
    """All problems, in the order of the data: every one in a file that is gone in the end, the first few of
    each code here.

    Args:
        path: The JSONL file that :meth:`save` writes.
    """

    KEPT = 200  # of each code

    def __init__(self, path: Path | None = None):
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[dict[str, Any]]] = {}
        self._written = 0
        self.lost = 0  # files that could not be read to their end
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (close() is below)

    def add(self, problem: dict[str, Any]) -> None:
        self.lost += problem["field"] == "(file)" and problem["code"] not in ("no_record", "no_target")
        if self._written > MAX_PROBLEMS:
            self.counts[problem["code"]] += 1
            return
        self._write(problem)
        if self._written > MAX_PROBLEMS:
            found = f"more than {MAX_PROBLEMS:,} bytes of problems"
            fix = "correct those that are listed, and check again: the others are only counted"
            last = BadRecord("more_problems", "(file)", found, "fewer problems", fix)
            self._write(last.to_dict() | {"file": "(all files)"})

    def _write(self, problem: dict[str, Any]) -> None:
        self.counts[problem["code"]] += 1
        kept = self.first.setdefault(problem["code"], [])
        if len(kept) < self.KEPT:
            kept.append(problem)
        self._written += self._file.write(json.dumps(problem) + "\n")

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
        self._file.seek(0, os.SEEK_END)

    def save(self) -> None:
        """Writes them all to ``path``, each with the command's mark. Raises OSError."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(Path(os.path.realpath(self.path)), sync=False) as file:
            for problem in self:
                file.write(json_of({"generator": CHECK, **problem}).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Findings:
    """What a check found."""

    files: list[Path]
    problems: Problems
    tally: Tally
    parts: list[FilePart]
    part_ends: np.ndarray  # [parts] int64: records read up to the end of each part
    limits: tuple[int, ...]  # values of ``max_sequence_length`` to say the effect of
    deep: bool
    interrupted: bool
    seconds: float
    left_out: list[LeftOut]  # files of folders that are not read
    data: Sequence[CheckedData]
    of_file: list[int]  # which of ``data`` each file is of

    @property
    def planner(self) -> Planner:
        """The first one: all have the same tokenizer, limit and options."""
        return self.data[0].planner

    @property
    def to_be_decoded(self) -> bool:
        """Would a training decode the pictures, of which headers alone were read? Many records are not read
        again for it."""
        keys = self.tally.pictures["key"]
        few = len(self.tally.records) <= 20 * AUTO_FULL_CHECK and len(np.unique(keys)) <= AUTO_FULL_CHECK
        return bool(len(keys)) and few and not self.deep and not self.interrupted

    def find(self, numbers: Sequence[int]) -> dict[int, Record]:
        """Records by their number, read again (good ones only)."""
        wanted: dict[int, list[int]] = {}
        for n in sorted(set(numbers)):
            wanted.setdefault(int(np.searchsorted(self.part_ends, n, side="right")), []).append(n)
        found = {}
        for number, inside in wanted.items():
            part, start = self.parts[number], int(self.part_ends[number - 1]) if number else 0
            records = islice(read_part(part), inside[-1] - start + 1)
            found |= {
                start + i: self._parsed(part, *record)
                for i, record in enumerate(records)
                if start + i in inside
            }
        return found

    def summary(self, budgets: Sequence[int] = BUDGETS) -> dict[str, Any]:
        """All statistics as JSON values; ``budgets`` are values of ``max_num_tokens`` to say how full
        packed sequences get."""
        good, pictures = self.tally.good, self.tally.pictures

        def tokens(name: str, records: np.ndarray = good) -> int:
            # a cut takes as many labels as tokens, from text targets alone
            over = np.maximum(records["length"] - self.planner.max_length, 0) if name == "text_tokens" else 0
            return int((records[name] - over).sum(dtype=np.int64))

        formats = np.bincount(good["format"], minlength=len(FORMATS)).tolist()
        by_task = {name: good[good["task"] == number] for number, name in enumerate(TASKS)}
        sizes, often = np.unique(pictures[["width", "height"]], return_counts=True)
        most = np.argsort(-often, kind="stable")[:SHOWN]
        return {
            "files": len(self.files),
            "records": len(self.tally.records),
            "good_records": len(good),
            "lost_files": self.problems.lost,
            "max_bad_share": self.planner.options.max_bad_share,
            "sources": self._sources(),
            "left_out": {"splits": of_splits(self.left_out), "about": describing(self.left_out)},
            "formats": {name: n for name, n in zip(FORMATS, formats) if n},
            **{what: self.tally.notes.of(what) for what in NOTES},
            "tasks": {
                name: {
                    "records": len(records),
                    "text_tokens": tokens("text_tokens", records),
                    "image_tokens": tokens("image_tokens", records),
                }
                for name, records in by_task.items()
                if len(records)
            },
            "targets": {
                "texts": tokens("text_targets"),
                "images": tokens("image_targets"),
                "records_with_text": int((good["text_targets"] > 0).sum()),
                "records_with_image": int((good["image_targets"] > 0).sum()),
                "text_tokens": tokens("text_tokens"),
                "image_tokens": tokens("image_tokens"),
            },
            "tokens": {kind: tokens(kind) for kind in KINDS},
            "lengths": {
                "unit": "words" if isinstance(self.planner.tokenizer, WordTokenizer) else "tokens",
                **distribution_of(good["length"]),
            },
            "pictures": {
                "pieces": len(pictures),
                "sizes": [[*size, n] for size, n in zip(sizes[most].tolist(), often[most].tolist())],
                "distinct_sizes": len(sizes),
                "upscaled": int(pictures["upscaled"].sum()),
                "latent_tokens": distribution_of(pictures["latent"][pictures["latent"] > 0]),
                "vit_tokens": distribution_of(pictures["vit"][pictures["vit"] > 0]),
            },
            "repeats": self._repeats(),
            "learnt_too": self._learnt_too(),
            "near_empty": {
                "records": int(good["near_empty"].sum()),
                "first": [list(entry) for entry in self.tally.near_empty],
            },
            "max_length": self.planner.max_length,
            "limits": what_limits_cut(self.tally.records, self.limits),
            "rows": how_full_packs_get(good["length"], sorted(set(budgets))),
        }

    @property
    def _held_out(self) -> np.ndarray:
        """[records] bool: is a record of data that a training measures itself on?"""
        held = [self.data[self.of_file[part.file]].split != "train" for part in self.parts]
        return np.repeat(np.array(held, bool), np.diff(self.part_ends, prepend=0))

    def _learnt_too(self) -> int:
        """Held-out records that are records of the training data, too."""
        samples, held = self.tally.records["sample"], self._held_out
        learnt = samples[~held & (samples != 0)]
        return int(np.isin(samples[held], learnt).sum())

    def _sources(self) -> dict[str, int]:
        """Records by source."""
        found = dict.fromkeys((one.name for one in self.data), 0)
        for part, records in zip(self.parts, np.diff(self.part_ends, prepend=0).tolist()):
            found[self.data[self.of_file[part.file]].name] += records
        return found

    def _parsed(self, part: FilePart, span: ByteSpan, raw: Raw) -> Record:
        read = self.data[self.of_file[part.file]].read
        return parse_raw(raw, span.line, Origin(part.path, span.line or None, span.index), read)[0]

    def _repeats(self) -> dict[str, Any]:
        """``records``, ``texts``, ``pictures``, ``copies`` -> ``distinct``, ``surplus``, ``most``: ``count``,
        ``where``, ``what`` each."""
        records = self.tally.records.copy()
        records[["sample", "texts"]][self._held_out] = 0  # of the training data alone, if there is other
        found = repeats(self.tally._replace(records=records), SHOWN)
        # record and segment of each of the first few; of records and texts no segment is asked for
        places = {
            (kind, row): self.tally.pictures[["record", "segment"]][row].item()
            if kind in ("pictures", "copies")
            else (row, 0)
            for kind, of in found.items()
            for repeat in of.most
            for row in repeat.rows
        }
        records = self.find([record for record, _ in places.values()])
        told: dict[str, Any] = {}
        for kind, of in found.items():
            told[kind] = {"distinct": of.distinct, "surplus": of.surplus, "most": []}
            for count, rows in of.most:
                at = [places[kind, row] for row in rows]
                # a file that changed since may hold fewer
                held = [(records[record], segment) for record, segment in at if record in records]
                what = [_shown(record, kind, segment) for record, segment in held]
                told[kind]["most"].append(
                    {
                        "count": count,
                        "where": [str(record.origin) for record, _ in held],
                        "what": what if kind == "copies" else what[0] if what else "",
                    }
                )
        return told


def _shown(record: Record, kind: str, number: int) -> str:
    """What is repeated, short."""
    if kind in ("pictures", "copies"):
        segment = record.sample[number]
        assert isinstance(segment, Image)
        return INSIDE if isinstance(segment.source, bytes) else str(segment.source)
    texts = [
        segment.text
        for segment in record.sample
        if isinstance(segment, Text) and (segment.target or kind == "records")
    ]
    text = " | ".join(" ".join(text.split()) for text in texts)
    return text if len(text) <= 100 else text[:97] + "..."


def check(
    data: Sequence[CheckedData],
    *,
    deep: bool = False,
    limits: Sequence[int] = LIMITS,
    num_workers: int | None = None,
    problems: Problems | None = None,
    progress: Callable[[int, int, int, int], None] = lambda done, total, records, problems: None,
) -> Findings:
    """Checks every record, picture and file.

    Args:
        data: What to read, each with a planner, which says how long records are and refuses those that its
            ``max_length`` cannot hold. A file that is read twice in the same way is checked once.
        deep: Decode every picture to its last row; otherwise headers only.
        limits: Values of ``max_sequence_length`` to say the effect of.
        num_workers: Processes; 0 for none; default: one for each core, none where the data is small.
        problems: Where they go.
        progress: Called with the bytes done, all bytes, the records read so far, and the problems so far.

    Raises:
        BadData: There is nothing to check.
    """
    start = time.monotonic()
    left_out: list[LeftOut] = []
    files, of_file = _find(data, left_out)
    total = sum(path.stat().st_size for path in files)
    if num_workers is None:
        num_workers = 0 if total <= ALONE and not deep else cores()
    problems = Problems() if problems is None else problems
    tallies: list[Tally] = []
    done_parts: list[FilePart] = []
    ends = [0]
    # of the data: parts with a record or a problem, and records that are not to be learnt
    found, unlearnt = Counter[int](), Counter[int]()
    done = deaths = 0
    interrupted = False

    def again(job: PartJob, died: Died) -> PartJob | None:
        nonlocal deaths
        deaths += 1
        # left out, and yet it dies: of reading what follows
        known = any(step == died.step for step, _ in job.skip)
        if died.step < 0 or known or deaths > DEATHS:
            return None
        return job._replace(skip=(*job.skip, (died.step, died.reason)))

    jobs = _jobs(files, of_file, DEEP_PART if deep else PART)
    try:
        with closing(in_order(checker, (data, deep), jobs, num_workers, again)) as outcomes:
            for job, outcome in outcomes:
                if isinstance(outcome, Died):
                    outcome = PartFindings.of_lost(_lost(job, outcome))
                for problem in outcome.problems:
                    problems.add(problem)
                tallies.append(outcome.tally)
                if len(outcome.tally.good) or outcome.problems:
                    found[job.source] += 1
                unlearnt[job.source] += outcome.tally.notes.unlearnt
                if job.part is not None:
                    done_parts.append(job.part)
                    ends.append(ends[-1] + len(outcome.tally.records))
                    done += job.part.size
                progress(done, total, ends[-1], len(problems))
    except KeyboardInterrupt:
        interrupted = True
    tally = Tally.join(tallies)
    for source in sorted(set(of_file) - found.keys()) if not interrupted else []:
        own = [path for path, number in zip(files, of_file) if number == source]
        problems.add(no_record(own, unlearnt[source]).to_dict())
    return Findings(
        files,
        problems,
        tally,
        done_parts,
        np.array(ends[1:], np.int64),
        tuple(sorted(set(limits))),
        deep=deep,
        interrupted=interrupted,
        seconds=time.monotonic() - start,
        left_out=left_out,
        data=data,
        of_file=of_file,
    )


def _find(data: Sequence[CheckedData], left_out: list[LeftOut]) -> tuple[list[Path], list[int]]:
    """The files of all data, each once for each way that it is read, and of which data each is. Raises
    BadData."""
    found: dict[tuple[Any, ...], int] = {}
    for number, one in enumerate(data):
        read, more = one.read, list[LeftOut]()
        there = find_files(
            one.paths, read.data_root, one.split, more, one.named_split, bool(read.trigger_word)
        )
        files = [path for path, _ in there]
        require_match(files, read)
        left_out += [entry for entry in more if entry not in left_out]
        for path in files:
            found.setdefault((path, repr(read), one.planner.identity, one.split), number)
    taken = {path for path, *_ in found}
    left_out[:] = [entry for entry in left_out if entry.path not in taken]  # of another source's split
    return [path for path, *_ in found], list(found.values())


def _jobs(files: Sequence[Path], of_file: Sequence[int], size: int) -> Iterator[PartJob]:
    for number, path in enumerate(files):
        try:
            for part in parts(path, number, size):
                yield PartJob(part, of_file[number])
        except BadRecord as error:
            yield PartJob(None, lost=error)


def _lost(job: PartJob, died: Died) -> BadRecord:
    """The problem of a part that is given up."""
    assert job.part is not None
    fix = "run unigen check on this file alone, with --num_workers 1 and more free memory"
    what = f"the process that read the part from line {job.part.line} on ended: {died.reason}"
    return BadRecord("check_died", "(file)", what, "a part that can be read", fix, Origin(job.part.path))
