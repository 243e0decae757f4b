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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unigen.commands.check.part import Outcome, PartJob, checker
from unigen.commands.check.statistics import Tally, how_full_rows_get, repeats, what_limits_cut
from unigen.commands.check.workers import Died, in_order
from unigen.data.containers import ByteSpan, FilePart, Raw, find_files, parts, read_part
from unigen.data.dataset import TASKS
from unigen.data.formats import FORMATS, parse_raw
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import WordTokenizer
from unigen.sequence.types import BadRecord, Image, Origin, Record, Text

# bytes of JSON Lines read as one part: decoding pictures takes longer, so that parts are smaller
PART, DEEP_PART = 1 << 20, 1 << 17
ALONE = 1 << 20  # bytes of data up to which this process does it alone, as starting others takes seconds
BUDGETS = (8192, 16384, 32768)
SHOWN = 8  # of the most frequent repetitions and picture sizes
LIMITS = (1024, 2048, 4096, 8192, 16384, 32768)
DEATHS = 20  # processes that may die before what they die of is no longer looked for record by record


class Problems:
    """All problems, in the order of the data: every one in a file, the first few of each code here.

    Args:
        path: A JSONL file to write them to; default: one that is gone in the end.
    """

    KEPT = 200  # of each code

    def __init__(self, path: Path | None = None):
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[dict[str, Any]]] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = (
            tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
            if path is None
            else path.open("w+", encoding="utf-8")
        )

    def add(self, problem: dict[str, Any]) -> None:
        self.counts[problem["code"]] += 1
        kept = self.first.setdefault(problem["code"], [])
        if len(kept) < self.KEPT:
            kept.append(problem)
        self._file.write(json.dumps(problem) + "\n")

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


@dataclass
class Findings:
    """What a check found."""

    files: list[Path]
    problems: Problems
    tally: Tally
    parts: list[FilePart] = field(default_factory=list)  # as ``tally.parts`` counts their records
    exact: bool = False  # lengths in the model's tokens; otherwise estimated in words
    deep: bool = False
    max_length: int = 0  # tokens that a record may have
    interrupted: bool = False
    seconds: float = 0.0

    def find(self, numbers: Sequence[int]) -> dict[int, Record]:
        """Records by their number, read again (good ones only)."""
        ends = (
            np.cumsum(np.frombuffer(self.tally.parts, np.uint64).astype(np.int64))
            if self.parts
            else np.zeros(0, np.int64)
        )
        wanted: dict[int, list[int]] = {}
        for n in sorted(set(numbers)):
            wanted.setdefault(int(np.searchsorted(ends, n, side="right")), []).append(n)
        found = {}
        for number, inside in wanted.items():
            part, start = self.parts[number], int(ends[number]) - self.tally.parts[number]
            records = islice(read_part(part), inside[-1] - start + 1)
            found |= {
                start + i: _parsed(part, *record) for i, record in enumerate(records) if start + i in inside
            }
        return found

    def summary(self, budgets: Sequence[int] = BUDGETS) -> dict[str, Any]:
        """All statistics as JSON values; ``budgets`` are values of ``max_num_tokens`` to say how full rows
        get."""
        tally, counts = self.tally, self.tally.counts

        def by(topic: str, names: Iterable[str]) -> dict[str, int]:
            return {name: counts[topic, name] for name in names if counts[topic, name]}

        sizes, of_size = tally.sizes.arrays()
        often = np.lexsort((sizes, -of_size))[:SHOWN]
        return {
            "files": len(self.files),
            "records": tally.read,
            "good_records": counts["records", "good"],
            "formats": by("format", FORMATS),
            "tasks": {
                name: {
                    "records": n,
                    "text_tokens": counts["text_tokens", name],
                    "image_tokens": counts["image_tokens", name],
                }
                for name, n in by("task", TASKS).items()
            },
            "targets": {
                "texts": counts["targets", "texts"],
                "images": counts["targets", "images"],
                "records_with_text": counts["records", "with_text_target"],
                "records_with_image": counts["records", "with_image_target"],
                "text_tokens": sum(counts["text_tokens", name] for name in TASKS),
                "image_tokens": sum(counts["image_tokens", name] for name in TASKS),
            },
            "tokens": {name: counts["kind", name] for name in ("text", "vit", "clean", "noised")},
            "lengths": {"unit": "tokens" if self.exact else "words", **tally.lengths.describe()},
            "pictures": {
                "pieces": len(tally.pictures),
                "sizes": [
                    [int(sizes[i]) >> 32, int(sizes[i]) & 0xFFFFFFFF, int(of_size[i])] for i in often.tolist()
                ],
                "distinct_sizes": len(sizes),
                "upscaled": counts["pictures", "upscaled"],
                "latent_tokens": tally.latent.describe(),
                "vit_tokens": tally.vit.describe(),
            },
            "repeats": self._repeats(),
            "near_empty": {
                "records": counts["records", "near_empty"],
                "first": [list(entry) for entry in tally.near_empty],
            },
            "max_length": self.max_length,
            "limits": what_limits_cut(tally),
            "rows": how_full_rows_get(tally.lengths, sorted(set(budgets))),
        }

    def _repeats(self) -> dict[str, Any]:
        """``records``, ``texts``, ``pictures``, ``copies`` -> ``distinct``, ``surplus``, ``most``: ``count``,
        ``where``, ``what`` each."""
        found = repeats(self.tally, SHOWN)
        inside = {kind for kind in found if kind in ("pictures", "copies")}  # places are pieces of records
        records = self.find(
            [
                n >> 8 if kind in inside else n
                for kind, of in found.items()
                for repeat in of.most
                for n in repeat.places
            ]
        )
        told: dict[str, Any] = {}
        for kind, of in found.items():
            told[kind] = {"distinct": of.distinct, "surplus": of.surplus, "most": []}
            for count, places in of.most:
                held = [(records.get(n >> 8 if kind in inside else n), n & 255) for n in places]
                where = [str(record.origin) for record, _ in held if record]
                what = [_shown(record, kind, piece) for record, piece in held if record]
                told[kind]["most"].append(
                    {
                        "count": count,
                        "where": where,
                        "what": what if kind == "copies" else what[0] if what else "",
                    }
                )
        return told


def _parsed(part: FilePart, span: ByteSpan, raw: Raw) -> Record:
    return parse_raw(raw, span.line, Origin(part.path, span.line or None, span.index))[0]


def _shown(record: Record, kind: str, number: int) -> str:
    """What is repeated, short."""
    if kind in ("pictures", "copies"):
        piece = record.sample[number] if number < len(record.sample) else None
        return (
            str(piece.source)
            if isinstance(piece, Image) and not isinstance(piece.source, bytes)
            else "(inside the file)"
        )
    texts = [
        piece.text
        for piece in record.sample
        if isinstance(piece, Text) and (piece.target or kind == "records")
    ]
    text = " | ".join(" ".join(text.split()) for text in texts)
    return text if len(text) <= 100 else text[:97] + "..."


def check(
    paths: str | Path | Sequence[str | Path],
    planner: Planner,
    *,
    deep: bool = False,
    data_root: str | Path | None = None,
    limits: Sequence[int] = LIMITS,
    num_workers: int | None = None,
    problems: Problems | None = None,
    progress: Callable[[int, int, int, int], None] = lambda done, total, records, problems: None,
) -> Findings:
    """Checks every record, picture and file.

    Args:
        paths: As for ``UnifiedGenerationDataset``.
        planner: Says how long records are, and refuses those that its ``max_length`` cannot hold.
        deep: Decode every picture to its last row; otherwise headers only.
        data_root: The folder that all pictures must lie in.
        limits: Values of ``max_sequence_length`` to say the effect of.
        num_workers: Processes; 0 for none; default: one for each core, none where the data is small.
        problems: Where they go.
        progress: Called with the bytes done, all bytes, the records read so far, and the problems so far.

    Raises:
        BadData: There is nothing to check.
    """
    start = time.monotonic()
    files = [path for path, _ in find_files([paths] if isinstance(paths, str | Path) else paths)]
    total = sum(path.stat().st_size for path in files)
    if num_workers is None:
        alone = total <= ALONE and not deep
        num_workers = (
            0
            if alone
            else len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    limits = tuple(sorted(set(limits)))
    found = Findings(
        files,
        Problems() if problems is None else problems,
        Tally(limits),
        deep=deep,
        max_length=planner.max_length,
    )
    found.exact = not isinstance(planner.tokenizer, WordTokenizer)
    done, deaths = 0, 0

    def again(job: PartJob, died: Died) -> PartJob | None:
        nonlocal deaths
        deaths += 1
        # left out, and yet it dies: of reading what follows
        known = any(step == died.step for step, _ in job.skip)
        return (
            None
            if died.step < 0 or known or deaths > DEATHS
            else job._replace(skip=(*job.skip, (died.step, died.reason)))
        )

    def tick(steps: int) -> None:
        progress(done, total, found.tally.read + steps, len(found.problems))

    jobs = _jobs(files, DEEP_PART if deep else PART)
    try:
        with closing(
            in_order(checker, (planner, limits, deep, data_root), jobs, num_workers, again, tick)
        ) as outcomes:
            for job, outcome in outcomes:
                if isinstance(outcome, Died):
                    outcome = Outcome(Tally(limits), [_lost(job, outcome).to_dict()])
                for problem in outcome.problems:
                    found.problems.add(problem)
                if job.part is not None:
                    found.parts.append(job.part)
                    outcome.tally.parts.append(outcome.tally.read)
                    done += job.part.size
                found.tally.merge(outcome.tally)
                tick(0)
    except KeyboardInterrupt:
        found.interrupted = True
    found.seconds = time.monotonic() - start
    return found


def _jobs(files: Sequence[Path], size: int) -> Iterator[PartJob]:
    for number, path in enumerate(files):
        try:
            for part in parts(path, number, size):
                yield PartJob(part)
        except BadRecord as error:
            yield PartJob(None, lost=error)


def _lost(job: PartJob, died: Died) -> BadRecord:
    """The problem of a part that is given up."""
    assert job.part is not None
    fix = "run unigen check on this file alone, with --num_workers 1 and more free memory"
    what = f"the process that read the part from line {job.part.line} on ended: {died.reason}"
    return BadRecord("check_died", "(file)", what, "a part that can be read", fix, Origin(job.part.path))
