"""Records as questions: what the model is given, what it is asked for, what its answer is held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from unigen.data.dataset import task
from unigen.sequence.types import Image, Record, Sample, Text

TEXT, IMAGE = "text", "image"


@dataclass(frozen=True)
class Case:
    """One record as a question.

    Args:
        number: of the record in its data set.
        where: file and line of the record.
        task: ``text``, ``understand``, ``generate``, ``edit`` or ``interleaved``: what
            :func:`unigen.data.dataset.task` says of the prompt and the answer.
        prompt: texts, and the sources of pictures, which are never ``str``.
        outputs: the pieces asked for, ``text`` or ``image``, as many as the record has.
        references: for each of them the texts that are right (variants of a caption), or the picture's
            source.
        name: the record's ``id``, at its top or in its metadata; empty without one.
        wanted: what a benchmark says that a picture must hold (``objects.faults``).
        edited: the last picture of the prompt that was itself an answer, which a further step of an edit
            starts from; None without one.
    """

    number: int
    where: str
    task: str
    prompt: tuple[Any, ...]
    outputs: tuple[str, ...]
    references: tuple[Any, ...]
    name: str = ""
    edited: Any = None
    wanted: Mapping[str, Any] | None = None

    @property
    def said_last(self) -> str:
        """The last text of the prompt; empty without one."""
        return next((piece for piece in reversed(self.prompt) if isinstance(piece, str)), "")

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The right texts of each text that is asked for."""
        return [given for kind, given in zip(self.outputs, self.references) if kind == TEXT]

    @property
    def pictures(self) -> list[Any]:
        """The sources of all pictures, given or asked for."""
        return [one for one in (*self.prompt, *self.references) if not isinstance(one, str | tuple)]

    @property
    def source(self) -> Any:
        """What an edit starts from: the picture that was answered last, else the first of the prompt; None
        without one."""
        if self.edited is not None:
            return self.edited
        return next((piece for piece in self.prompt if not isinstance(piece, str)), None)


def case_of(record: Record, number: int) -> Case | None:
    """The last answer of a record as a question; what precedes it, also earlier answers, is given as it
    stands.

    None where nothing is asked: the record has no target, or nothing stands before it.
    """
    sample = record.sample
    end = next((place + 1 for place in reversed(range(len(sample))) if sample[place].target), 0)
    start = next((place + 1 for place in reversed(range(end)) if not sample[place].target), 0)
    if start == 0:
        return None
    answer = sample[start:end]
    edited = next((s for s in reversed(sample[:start]) if isinstance(s, Image) and s.target), None)
    context: Sample = [Text(s.text) if isinstance(s, Text) else Image(s.source) for s in sample[:start]]
    return Case(
        number,
        str(record.origin),
        task([*context, *answer]),
        tuple(_piece(segment) for segment in context),
        tuple(TEXT if isinstance(segment, Text) else IMAGE for segment in answer),
        tuple(segment.variants if isinstance(segment, Text) else _piece(segment) for segment in answer),
        str(record.metadata.get("id", "")),
        None if edited is None else _piece(edited),
    )


def _piece(segment: Text | Image) -> Any:
    """What an inferencer takes: a text, or a picture's source, where a ``str`` would be a text."""
    if isinstance(segment, Text):
        return segment.text
    return Path(segment.source) if isinstance(segment.source, str) else segment.source


def cases_of(
    records: Iterable[Record], limit: int | None = None, numbers: Iterable[int] | None = None
) -> tuple[list[Case], int]:
    """The questions of a data set in its order, the first ``limit`` of them, and how many records ask
    nothing. ``numbers`` of the records; default: from 0."""
    found: list[Case] = []
    silent = 0
    for number, record in zip(count() if numbers is None else numbers, records):
        case = case_of(record, number)
        if case is None:
            silent += 1
            continue
        found.append(case)
        if len(found) == limit:
            break
    return found, silent


def batches(cases: Sequence[Case], size: int) -> list[list[Case]]:
    """The cases in batches of at most ``size`` that ask for the same pieces, in an order that depends on the
    cases alone."""
    assert size >= 1
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(case.outputs, []).append(case)
    ordered = [groups[outputs] for outputs in sorted(groups)]
    return [group[start : start + size] for group in ordered for start in range(0, len(group), size)]
