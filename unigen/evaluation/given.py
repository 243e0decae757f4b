"""Answers that somebody gives in a file, for metrics without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unigen.config import UserError
from unigen.evaluation.answers import Prediction
from unigen.evaluation.cases import Case
from unigen.printing import printable
from unigen.sequence.files import Confined

KEYS = ("number", "index", "id")
_LAYOUT = 'Fix: one object a line: {"index": 0, "text": "..."}, {"id": "a", "image": "a.png"}, or our own'


class PredictionsError(UserError):
    """A file of answers cannot be used; the message says where, why and the fix."""


def read_predictions(
    path: str | Path, cases: Sequence[Case], root: str | Path | None = None
) -> list[Prediction]:
    """The answers of a JSONL file to the cases, in their order; those to other records are left aside.

    A line names its record by ``index`` (from 0, in the order of the data; ``number`` in the files of
    ``unigen evaluate``) or by the record's ``id``, and holds ``text`` and ``image``, or ``pieces`` as our own
    ``predictions.jsonl`` does. Pictures lie where the file does, unless their path is absolute; with ``root``
    they must lie in that folder.

    Raises:
        PredictionsError: a line is no answer, two answer one record, or a record has none.
    """
    numbers = {case.number: case for case in cases}
    names: dict[str, list[Case]] = {}
    for case in cases:
        names.setdefault(case.name, []).append(case)
    found: dict[int, tuple[int, Prediction]] = {}
    for line, held in _lines(Path(path)):
        where = f"{path}:{line}"
        case = _case_of(held, numbers, names, where)
        if case is None:
            continue
        if case.number in found:
            raise PredictionsError(
                f"{where}: answers record {case.number} again, as line {found[case.number][0]} does. Fix:"
                " keep one"
            )
        pieces = _pieces(held, Path(path).parent, where, root)
        stopped = held.get("stopped") if isinstance(held.get("stopped"), bool) else None
        found[case.number] = line, Prediction(case.number, case.where, case.task, None, pieces, stopped)
    lacking = [case for case in cases if case.number not in found]
    if lacking:
        raise PredictionsError(
            f"{path}: {len(lacking)} of {len(cases)} records have no answer, the first is record"
            f" {lacking[0].number} ({lacking[0].where}). Fix: answer all, or --samples N for the first N"
        )
    return [found[case.number][1] for case in cases]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig", "surrogatepass").split("\n")  # no other line ends
    except (OSError, ValueError) as error:
        raise PredictionsError(
            f"{path} cannot be read ({error}). Fix: give a JSONL file of answers"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            held = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PredictionsError(f"{path}:{number}: is no JSON ({error}). {_LAYOUT}") from None
        if not isinstance(held, dict):
            raise PredictionsError(f"{path}:{number}: is no object. {_LAYOUT}")
        yield number, held


def _case_of(
    held: dict[str, Any], numbers: dict[int, Case], names: dict[str, list[Case]], where: str
) -> Case | None:
    """The case that a line answers; None where that is a record which asks nothing or was not taken."""
    key = next((key for key in KEYS if key in held), None)
    if key is None:
        raise PredictionsError(f"{where}: names no record ({', '.join(KEYS)}). {_LAYOUT}")
    value = held[key]
    if key != "id":
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            said = printable(json.dumps(value, ensure_ascii=False))
            raise PredictionsError(f"{where}: {key} is {said}. Fix: the record's number, from 0, as a number")
        return numbers.get(value)
    ones = names.get(str(value), []) if value != "" else []
    if len(ones) > 1:
        raise PredictionsError(
            f"{where}: {len(ones)} records have the id {printable(value)}. Fix: name the record by its index"
        )
    if not any(names.keys() - {""}):
        raise PredictionsError(f"{where}: names an id, and no record has one. Fix: name them by index")
    return ones[0] if ones else None


def _pieces(held: dict[str, Any], folder: Path, where: str, root: str | Path | None) -> tuple[Any, ...]:
    given = held.get("pieces")
    if given is None:
        given = [{kind: held[kind]} for kind in ("text", "image") if held.get(kind) is not None]
    if not isinstance(given, list) or not given:
        raise PredictionsError(f"{where}: holds no answer (text, image or pieces). {_LAYOUT}")
    pieces: list[Any] = []
    for piece in given:
        kind = next((kind for kind in ("text", "image") if isinstance(piece, dict) and kind in piece), None)
        if kind is None or not isinstance(piece[kind], str):
            raise PredictionsError(f"{where}: {printable(piece)} is no text or path of an image. {_LAYOUT}")
        if kind == "text":
            pieces.append(piece["text"])
            continue
        path = folder / piece["image"]
        if not path.is_file():
            raise PredictionsError(
                f"{where}: there is no picture {printable(piece['image'])}. Fix: a path from the folder of"
                " this file"
            )
        pieces.append(path if root is None else Confined(path, root))
    return tuple(pieces)
