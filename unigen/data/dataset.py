"""``UnifiedGenerationDataset``: files of records, checked once and read again one record at a time.

Only an index stays in memory, some 40 bytes a record: the file, the place in it, the line, and a checksum.
JSON lists keep byte offsets just as JSONL files do, so reading a record never parses its neighbours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from unigen import plugins
from unigen.bars import Bar
from unigen.config import DataOptions, LoaderOptions, TrainSource
from unigen.data import kept
from unigen.data.containers import BadData, ByteSpan, no_record
from unigen.data.examine import CountTokens, key_of, stamp
from unigen.data.finding import find_files
from unigen.data.formats import FORMATS, parse_raw
from unigen.data.indexing import TASKS, Found, read_all, shown_problems, task
from unigen.data.keys import NOTES, counts_of
from unigen.data.mapping import PLAIN, ReadOptions
from unigen.data.probe import check_roots, require_match
from unigen.data.reader import Reader
from unigen.data.splits import LeftOut, Split, describing, of_splits
from unigen.data.verdict import Verdict, percents
from unigen.sequence.draw import RandomKey
from unigen.sequence.images import PictureError, bad_picture, open_image
from unigen.sequence.pack import pack_blocks
from unigen.sequence.plan import Planner
from unigen.sequence.types import BadRecord, Image, Origin, Pack, Record, without_trace
from unigen.values import Seed, Whole, kinds, read_option, read_value, shown

__all__ = ["TASKS", "BadData", "UnifiedGenerationDataset", "task"]

log = logging.getLogger(__name__)

# check_pictures="auto" decodes every picture when there are at most this many distinct ones
AUTO_FULL_CHECK = 5000


class UnifiedGenerationDataset(Dataset[Any]):
    """Records in any format of ``docs/data_formats.md``, from files of any kind described there, several of
    them, or folders. With a ``planner`` the items are what the model takes, a :class:`Pack` of one sample
    each, in which ``label`` is -100 and ``noised_rows`` has no place where nothing is learnt; without it they
    are the records.

    Everything is checked at construction: every record is parsed, every picture found and its header read, so
    that a run does not stop after hours at a bad line. Reading a record later is safe from several threads
    and forked processes. Compressed files are unpacked into a cache folder (``$UNIGEN_CACHE``, by default
    ``~/.cache/unigen``).

    Args:
        paths: Files (``.json``, ``.jsonl``, both also ``.gz`` or ``.zst``, ``.parquet``, ``.arrow``) and
            folders (searched recursively, in sorted order, hidden entries left out).
        on_bad_record: ``error`` raises :class:`BadData` with all bad records; ``skip`` leaves them out,
            counted and listed.
        check_pictures: Decode every picture (``full``), read their headers only (``headers``), or decode when
            there are at most 5,000 distinct ones (``auto``).
        token_lengths: Called with every record; its results are kept in ``lengths``. It may raise BadRecord.
        bad_records_path: With ``skip``, a JSONL file that bad records are appended to; one that it holds
            already is not repeated.
        max_bad_share: With ``skip``, the share of bad records above which it raises all the same.
        data_root: Folder that every picture named by a path must lie in, links resolved; for data one does
            not trust.
        read: How the records are read; its ``data_root`` may be given alone.
        split: What is taken of a folder that holds several splits.
        named_split: The split to take of it by its name, or several with + between them.
        lengths_key: Names what ``token_lengths`` does. With it the index is kept in the cache folder, and a
            later start on unchanged files finds it there.
        planner: Makes the model's inputs of a record: ``load_planner(folder)`` of its checkpoint.
        seed: With the record and ``epoch`` all that noise, times and dropout depend on, as in training.
        num_workers: Processes that read; 0: this one.
        progress: Show bars on a terminal, and say in the log what is read.

    Attributes:
        epoch: Counts the passes over the data, for what chance decides in them.
        left_out: Files of folders that are not read: of other splits, or about the data.
        lengths: What ``token_lengths`` returned for each record; None without it.
        bad: The bad records that were left out.
        numbers: Of each record [n] int64, counted over all files from 0 with those that are left out: what
            its random numbers hang on, and what ``unigen preview --records`` and ``unigen evaluate`` name.
        held: Records of all files, left out or not.
        fingerprint: Hexadecimal digest of the files (sizes, contents, in their order) and of which of their
            records are in use.
        named_fingerprint: The same with the files' names, as older checkpoints hold it.

    Raises:
        ConfigError: An argument has a value that it cannot have.
        BadData: Nothing to read, bad records (with ``error``), too many of them (with ``skip``), a damaged
            file, or a JSON file with a syntax error, after which its records cannot be told apart.
        UserError: No room to unpack a compressed file.
    """

    def __init__(
        self,
        paths: str | Path | list[str] | list[Path],
        *,
        on_bad_record: Literal["error", "skip"] = "error",
        check_pictures: Literal["auto", "full", "headers"] = "auto",
        token_lengths: CountTokens | None = None,
        bad_records_path: Path | None = None,
        max_bad_share: float = 0.01,
        data_root: str | Path | None = None,
        read: ReadOptions = PLAIN,
        split: Split = "train",
        named_split: str | None = None,
        lengths_key: str | None = None,
        planner: Planner | None = None,
        seed: int = 42,
        num_workers: int = 0,
        progress: bool = False,
    ):
        read_value(kinds(TrainSource)["path"], paths, "paths")
        on_bad_record = read_option(LoaderOptions, "on_bad_record", on_bad_record, "on_bad_record")
        check_pictures = read_option(LoaderOptions, "check_pictures", check_pictures, "check_pictures")
        max_bad_share = read_option(DataOptions, "max_bad_share", max_bad_share, "max_bad_share")
        split, seed = read_value(Split, split, "split"), read_value(Seed, seed, "seed")
        num_workers = read_value(Whole, num_workers, "num_workers")
        self.read = read if data_root is None else replace(read, data_root=Path(data_root).absolute())
        check_roots(self.read)
        self.planner, self.seed, self.epoch = planner, seed, 0
        self.split, self.left_out = named_split or split, list[LeftOut]()
        given = [paths] if isinstance(paths, str | Path) else paths
        named = find_files(
            given, self.read.data_root, split, self.left_out, named_split, bool(self.read.trigger_word)
        )
        self.files = [path for path, _ in named]
        require_match(self.files, self.read)
        self._reader = Reader(self.files)
        token_lengths = token_lengths or (planner.token_lengths if planner else None)
        found = self._found(token_lengths, check_pictures, lengths_key, num_workers, progress)
        self._index, self.lengths, self._distinct = found.index, found.lengths, found.distinct
        self._counts, self._notes = found.counts, found.notes
        self.held = sum(found.held.values())
        before = np.cumsum([0] + [found.held[n] for n in range(len(self.files))])
        rows = self._index.rows()
        self.numbers = before[rows["file"]] + rows["index"].astype(np.int64)
        places = sorted(found.bad, key=lambda entry: (entry[0].file, entry[0].index))
        self.bad = [error for _, error in places]
        self._settle(found.unreadable, on_bad_record, bad_records_path, max_bad_share)
        # of names nothing: a file that was moved or renamed is the same data
        contents = [[path.stat().st_size, found.digests[n]] for n, path in enumerate(self.files)]
        self.fingerprint = self._fingerprint(contents)
        self.named_fingerprint = self._fingerprint(
            [[name, *held] for (_, name), held in zip(named, contents, strict=True)]
        )

    def _fingerprint(self, contents: list[list[Any]]) -> str:
        fields, word = dict(self.read.fields), self.read.trigger_word
        how = [[fields, word]] if fields or word else []
        return hashlib.sha256(json.dumps([contents, self._index.digest(), *how]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Any:
        """:meth:`record` ``i``; with a planner its :meth:`inputs`."""
        return self.record(i) if self.planner is None else self.inputs(i)

    def inputs(self, i: int) -> Pack:
        """What the model takes of record ``i``, with its labels, in the pass ``epoch``.

        Raises:
            BadRecord: A picture cannot be read.
            IndexError, BadData: As :meth:`record`.
        """
        record, planner = self.record(i), self.planner
        assert planner is not None, "give a planner"
        key = RandomKey(self.seed, self.epoch, int(self.numbers[i]))
        blocks = planner.outline(record.sample, planner.token_lengths(record), key)
        try:
            blocks = planner.fill(record.sample, blocks, key)
        except PictureError as error:
            raise bad_picture(error, "image", record.origin) from None
        return pack_blocks(
            [blocks], planner.tokenizer.special, planner.geometry, origins=[str(record.origin)]
        )

    def record(self, i: int) -> Record:
        """Record ``i``, read and parsed anew; its pictures are paths that are not opened, or bytes.

        Raises:
            IndexError: There is no such record.
            BadData: Its file was changed after this data set was built.
        """
        return self._read(i)[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    @property
    def runs(self) -> list[tuple[int, int]] | None:
        """``(start, stop)`` of records that are cheap to read together (row groups of Parquet), one after
        another; None where every record costs the same."""
        return self._index.runs() if any(map(self._reader.grouped, range(len(self.files)))) else None

    def origin(self, i: int) -> Origin:
        """Where record ``i`` stands, without reading it."""
        return self._origin(self._index[self._checked(i)])

    def statistics(self) -> dict[str, Any]:
        """Counts: records, files, bad records, records per format and per task (see :func:`task`), text and
        image targets, pictures, and how many records have each field that nothing reads (``unread``), that
        names no picture (``no_picture``), or by which they were left out as not to be learnt (``unlearnt``).

        ``pictures`` counts the image segments of all records, ``distinct_pictures`` the files behind them.
        """

        def by(topic: str, names: Iterable[str]) -> dict[str, int]:
            return {name: self._counts[topic, name] for name in names if self._counts[topic, name]}

        return {
            "records": len(self),
            "files": len(self.files),
            "bad_records": len(self.bad),
            "formats": by("format", FORMATS),
            "tasks": by("task", TASKS),
            "text_targets": self._counts["segments", "text_targets"],
            "image_targets": self._counts["segments", "image_targets"],
            "pictures": self._counts["segments", "pictures"],
            "distinct_pictures": self._distinct,
            **{what: self._notes.of(what) for what in NOTES},
        }

    def describe(self) -> str:
        """:meth:`statistics` for a log, several lines."""
        s = self.statistics()

        def table(counts: dict[str, int]) -> str:
            return ", ".join(
                f"{name} {count:,} ({count / max(len(self), 1):.0%})" for name, count in counts.items()
            )

        other, about = of_splits(self.left_out), describing(self.left_out)
        left_out = f", {s['bad_records']:,} bad ones left out" if s["bad_records"] else ""
        return "\n".join(
            [
                (
                    f"records   {s['records']:,} from {s['files']:,}"
                    f" file{'s' if s['files'] != 1 else ''}{left_out}"
                ),
                *(
                    f"{words}: {names}"
                    for words, names in (
                        (f"Other splits of the folder, left out (the {self.split} split is taken)", other),
                        ("Files about the data or of other kinds, left out", about),
                    )
                    if names
                ),
                f"formats   {table({f'{name}:': count for name, count in s['formats'].items()})}",
                f"tasks     {table(s['tasks'])}",
                f"targets   {s['text_targets']:,} texts, {s['image_targets']:,} images",
                f"pictures  {s['pictures']:,} ({s['distinct_pictures']:,} distinct files)",
                *(
                    f"{words}: {counts_of(s[what], len(self) + self._notes.unlearnt * (what == 'unlearnt'))}"
                    for what, words in (
                        ("unread", "Fields that nothing reads (metadata is their place)"),
                        ("no_picture", "Empty fields, taken as no picture"),
                        ("unlearnt", "Records left out, as nothing of them is learnt (weight 0)"),
                    )
                    if s[what]
                ),
            ]
        )

    # ---- building

    def _found(
        self,
        token_lengths: CountTokens | None,
        check_pictures: str,
        lengths_key: str | None,
        num_workers: int,
        progress: bool,
    ) -> Found:
        """The index of the data: kept from an earlier start, or read."""
        size = sum(path.stat().st_size for path in self.files)
        key = None
        # what a plugin reads may change without its data
        if lengths_key is not None and size >= kept.LEAST and not plugins.plugin_names():
            key = kept.key_of_data(self.files, self.read, check_pictures, lengths_key)
            if found := kept.load_index(key, self.files):
                log.info("The data is unchanged since an earlier start: its index was kept")
                return found
        if progress and size >= kept.LEAST:
            log.info("Reading %s MB of data from %d file(s)", f"{size / 1e6:,.0f}", len(self.files))
        found = read_all(self.files, self._reader.source, token_lengths, self.read, num_workers, progress)
        if check_pictures == "full" or (check_pictures == "auto" and found.distinct <= AUTO_FULL_CHECK):
            self._index = found.index
            self._drop_broken(found, progress)
        if key is not None and not found.unreadable:
            kept.save_index(key, found)
        return found

    def _drop_broken(self, found: Found, progress: bool) -> None:
        """Decodes every distinct picture; takes the records with broken ones out of what was found."""
        seen: set[int] = set()
        broken: dict[object, PictureError] = {}  # by path, or of bytes by record and field
        dropped: set[int] = set()
        numbers = iter(found.pictured)
        # PIL decodes without the interpreter lock
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            Bar("decoding pictures", found.distinct, shown=progress) as shown_bar,
        ):
            while some := list(islice(numbers, 32)):  # no more in memory at once
                met = []
                for i in some:
                    record, fields = self._read(i)
                    for segment, field in zip(record.sample, fields):
                        if isinstance(segment, Image):
                            inside = isinstance(segment.source, bytes)
                            met.append(
                                (i, record, field, segment, (i, field) if inside else str(segment.source))
                            )
                fresh = {}
                for *_, segment, name in met:
                    if not isinstance(name, str):
                        fresh[name] = segment
                    elif (key := key_of(name)) not in seen:
                        seen.add(key)
                        fresh[name] = segment
                errors = pool.map(_decoding_error, fresh.values())
                broken |= {name: error for name, error in zip(fresh, errors) if error is not None}
                for i, record, field, _, name in met:
                    if name in broken and i not in dropped:
                        found.count(record, -1)
                        found.refuse(self._index[i], bad_picture(broken[name], field, record.origin))
                        dropped.add(i)
                shown_bar.update(len(fresh))
        found.faulty |= {name: stamp(name) for name in broken if isinstance(name, str)}
        if broken:
            found.drop(dropped, len(broken))

    def _settle(
        self, unreadable: list[BadRecord], on_bad_record: str, listing: Path | None, max_share: float
    ) -> None:
        """Raises BadData, or writes down what is left out."""
        bad = unreadable + self.bad
        verdict = Verdict(len(self), len(self.bad), len(unreadable), max_share)
        if not bad and not len(self):
            raise BadData(f"{no_record(self.files, self._notes.unlearnt)}.")
        if self.bad and listing is not None and on_bad_record == "skip" and not unreadable:
            list_bad_records(listing, [error.to_dict() for error in bad])
        if not verdict.can_train(on_bad_record):
            told = f"{len(bad):,} of {verdict.total:,} records cannot be used"
            fix = "Fix: correct them"
            if verdict.code == "few":
                skip = f"--on_bad_record skip (it stops above {percents(max_share)})"
                fix += f", or leave them out with {skip}"
            elif verdict.code == "lost":
                told = f"{verdict.total:,} records were read, and no more of {_files(unreadable)}"
                told += f"; {verdict.bad:,} of them cannot be used" if verdict.bad else ""
            elif on_bad_record == "skip":
                told += f" ({verdict.share:.1%}), more than the {percents(max_share)} that may be left out"
                fix += ", or raise --max_bad_share"
            raise BadData(f"{told}:\n{shown_problems(bad)}\n{fix}.", bad)
        if bad:
            where = f", listed in {listing}" if listing else ""
            log.warning(
                "%d of %d records cannot be used and are left out%s:\n%s",
                len(bad),
                verdict.total,
                where,
                shown_problems(bad),
            )

    # ---- reading

    def _read(self, i: int) -> tuple[Record, list[str]]:
        span = self._index[self._checked(i)]
        return parse_raw(self._reader.read(span), span.line, self._origin(span), self.read)

    def _origin(self, span: ByteSpan) -> Origin:
        return Origin(self.files[span.file], span.line or None, span.index)

    def _checked(self, i: int) -> int:
        n = len(self)
        try:
            i = operator.index(i)
        except TypeError:
            raise TypeError(
                f"a record is named by a whole number, found {shown(i)}. Fix: [dataset[i] for i in range(10)]"
            ) from None
        if not -n <= i < n:
            raise IndexError(f"record {i} of a data set of {n}")
        return i % n


def _decoding_error(segment: Image) -> PictureError | None:
    try:
        open_image(segment.source)
    except PictureError as error:
        return without_trace(error)
    return None


def list_bad_records(listing: Path, bad: Iterable[dict[str, Any]]) -> None:
    """Appends to a JSONL file the bad records, as :meth:`BadRecord.to_dict` gives them, that it does not hold
    yet. Raises OSError."""
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.open("a+", encoding="utf-8") as file:
        file.seek(0)
        known = file.read()
        lines = set(known.splitlines())
        new = [line for line in dict.fromkeys(map(json.dumps, bad)) if line not in lines]
        # by a process that was killed while it wrote
        torn = "\n" if known and not known.endswith("\n") else ""
        file.write(torn + "".join(line + "\n" for line in new))


def _files(unreadable: list[BadRecord]) -> str:
    return "a file" if len(unreadable) == 1 else f"{len(unreadable):,} files"
