"""Which records ``unigen preview`` shows, and what there is to show of each."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from unigen.bars import Bar
from unigen.config import DataOptions, SourceOptions, TrainSource, UserError
from unigen.messages import in_language
from unigen.topics import Shift
from unigen.values import Count, PathText, Seed, Whole

if TYPE_CHECKING:
    from unigen.commands.preview.view import SampleView
    from unigen.data.containers import ByteSpan, Raw
    from unigen.sequence.plan import Planner
    from unigen.sequence.types import Origin


@dataclass
class PreviewOptions(DataOptions, SourceOptions):
    """Which records to look at, in which epoch pass. The recipe of a training names the data, of which what
    is learnt is shown, the fields and the model; the rest of it is passed over.

    Args:
        paths: Files and folders to look at, in place of the data of a training (train_data_path and the
            like).
        samples: How many records to show of each source; -n is short for it.
        records: Numbers of particular records, from 0, in place of the first ones.
        shuffled: Draw the records from all of the data instead of taking the first ones.
        output: The HTML page to write; none writes no page.
        language: Language of the page and of all that is said; default that of the locale.
        model_path: Folder of a checkpoint, of which no weights are read; default: sizes of BAGEL-7B-MoT, and
            texts cut into words.
        seed: Seed of dropout, times and caption variants, and of what shuffled draws.
        epoch: Epoch whose pass over the record is shown; with the seed and the record's number it decides
            dropout, times and caption variants.
        timestep_shift: Shift of the flow-matching time law; default: the checkpoint's own, 1.0 where it says
            nothing.
    """

    paths: list[PathText] = field(default_factory=list)
    samples: Count = 5
    records: list[Whole] = field(default_factory=list)
    shuffled: bool = False
    output: PathText | None = "preview.html"
    language: Literal["en", "zh"] | None = None
    model_path: PathText | None = None
    seed: Seed = 42
    epoch: Whole = 0
    timestep_shift: Shift | None = None


class PreviewError(UserError):
    """The options of ``unigen preview`` cannot work; the message says which, why, and the fix."""


class PickedRecord(NamedTuple):
    """A record that is to be shown, not yet parsed. A file of which no more can be read stands as its
    ``problem``."""

    number: int  # over all files, from 0, bad ones counted
    file: Path
    span: ByteSpan | None = None
    raw: Raw | None = None
    problem: UserError | None = None
    source: int = 0  # which of :func:`shown_sources` it is of


class Look(NamedTuple):
    """What there is to show of a record: its view, or what is wrong with it."""

    number: int
    origin: Origin | None
    view: SampleView | None
    problem: UserError | None
    raw: Raw | None = None  # as it stands in the file


def check_options(options: PreviewOptions) -> None:
    """Raises UserError for an option that cannot work."""
    options.reread()
    if not shown_sources(options):
        raise PreviewError("no data is named. Fix: unigen preview data.jsonl")
    if options.records and options.shuffled:
        raise PreviewError("records and shuffled exclude each other; keep one")


def shown_sources(options: PreviewOptions) -> list[TrainSource]:
    """The data of which records are shown."""
    if options.paths:
        return [TrainSource(options.paths, split=options.split)]
    return options.sources()


def time_shift(options: PreviewOptions) -> float:
    """The shift that training would use."""
    if options.timestep_shift is not None:
        return options.timestep_shift
    if options.model_path is None:
        return 1.0
    from unigen.model.config import read_config
    from unigen.model.weights import base_of

    return read_config(base_of(options.model_path)[0], {}).timestep_shift


# ---- which records


def pick(options: PreviewOptions) -> list[PickedRecord]:
    """The records to show, in the order of the files.

    Raises:
        PreviewError: there is no record, or not the one asked for.
        BadData: the paths hold no data.
    """
    every = _walk(options)
    if options.shuffled:
        choose = random.Random(f"{options.seed}/{options.epoch}/preview")
        found = _reservoir(every, options.samples, choose)
    elif options.records:
        found = _numbered(every, set(options.records))
    else:
        found = list(every)
    if not found:
        named = ", ".join(path for one in shown_sources(options) for path in one.paths)
        raise PreviewError(f"there is no record in {named}. Fix: give files with at least one record")
    return found


def _walk(options: PreviewOptions) -> Iterator[PickedRecord]:
    """Every record in the order of the files, and in place of what cannot be read its problem; of each source
    the first ones alone, where neither records nor a draw of them are asked for."""
    sources = shown_sources(options)
    most = None if options.shuffled or options.records else options.samples
    number = 0
    with Bar("reading records") as shown:
        for source, one in enumerate(sources):
            for place, found in enumerate(_records(_files(one, options))):
                if most is None or place < most:
                    yield found._replace(number=number, source=source)
                elif source + 1 == len(sources):
                    return
                number += found.problem is None
                shown.update()


def _records(files: Sequence[Path]) -> Iterator[PickedRecord]:
    from unigen.data.containers import parts, read_part
    from unigen.sequence.types import BadRecord

    for file, path in enumerate(files):
        try:
            for part in parts(path, file):
                for span, raw in read_part(part):
                    yield PickedRecord(0, path, span, raw)
        except BadRecord as error:
            yield PickedRecord(0, path, problem=error)


def _files(source: TrainSource, options: PreviewOptions) -> list[Path]:
    """The files of a source. Raises BadData."""
    from unigen.data.finding import find_files
    from unigen.data.mapping import ReadOptions
    from unigen.data.probe import check_roots, require_match
    from unigen.data.splits import LeftOut, of_splits

    read, left_out = ReadOptions.of(source, options), list[LeftOut]()
    check_roots(read)
    found = find_files(source.paths, read.data_root, "train", left_out, source.split, bool(read.trigger_word))
    files = [path for path, _ in found]
    if others := of_splits(left_out):
        text = f"Left out, as the {source.split or 'train'} split is taken: {others}"
        print(in_language(text), file=sys.stderr)
    require_match(files, read)
    return files


def _numbered(every: Iterator[PickedRecord], wanted: set[int]) -> list[PickedRecord]:
    found, count = [], 0
    for entry in every:
        count = max(count, entry.number + (entry.problem is None))
        if entry.number in wanted or entry.problem:
            found.append(entry)
        if entry.problem is None and entry.number == max(wanted):
            break
    missing = sorted(wanted - {entry.number for entry in found if entry.problem is None})
    if missing and not any(entry.problem for entry in found):
        raise PreviewError(
            f"there is no record {missing[0]}: the data has {count:,}, numbered from 0. Fix: other --records"
        )
    return found


def _reservoir(every: Iterator[PickedRecord], n: int, choose: random.Random) -> list[PickedRecord]:
    """``n`` records of all, each with the same chance, in one pass and without keeping the others (Vitter
    1985, algorithm R)."""
    kept: list[PickedRecord] = []
    problems: list[PickedRecord] = []
    for entry in every:
        if entry.problem is not None:
            problems.append(entry)
        elif len(kept) < n:
            kept.append(entry)
        elif (place := choose.randrange(entry.number + 1)) < n:
            kept[place] = entry
    return sorted(kept + problems, key=lambda entry: entry.number)


def look_at(found: PickedRecord, options: PreviewOptions, planner: Planner, shift: float) -> Look:
    """The record in its epoch pass, or what is wrong with it, found as before training."""
    from unigen.commands.preview.view import look
    from unigen.data.examine import PictureHeaders, examine
    from unigen.data.mapping import ReadOptions
    from unigen.sequence.draw import RandomKey
    from unigen.sequence.files import bad_picture
    from unigen.sequence.images import PictureError
    from unigen.sequence.types import BadRecord, Origin

    if found.span is None:
        return Look(found.number, Origin(found.file), None, found.problem)
    assert found.raw is not None
    origin = Origin(found.file, found.span.line or None, found.span.index)
    problem: UserError
    try:
        record, _, lengths = examine(
            found.raw,
            found.span,
            found.file,
            PictureHeaders(),
            planner.token_lengths,
            ReadOptions.of(shown_sources(options)[found.source], options),
        )
        key = RandomKey(options.seed, options.epoch, found.number)
        return Look(found.number, origin, look(record, found.number, planner, key, shift, lengths), None)
    except BadRecord as error:
        problem = error
    except PictureError as error:  # of one that only decoding finds broken
        problem = bad_picture(error, "(record)", origin)
    return Look(found.number, origin, None, problem, found.raw)
