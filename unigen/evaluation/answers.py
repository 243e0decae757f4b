"""The answers of a model to many cases, kept batch by batch: a run that was killed goes on where it was, and
ends with the same answers as one that was not.

A folder holds ``answers.json`` (what all answers depend on), ``batches/00000.jsonl`` and so on (whole or
absent) and ``pictures/``; at the end ``predictions.jsonl``, all of them in the order of the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigen.config import UserError
from unigen.evaluation.cases import Case, batches
from unigen.files import atomic

ABOUT, BATCHES, PICTURES, PREDICTIONS = "answers.json", "batches", "pictures", "predictions.jsonl"

# prompts, the pieces asked for, the seed of the first prompt -> the pieces of each answer: texts and pictures
Ask = Callable[[Sequence[Sequence[Any]], Sequence[str], int], list[list[Any]]]


class AnswersError(UserError):
    """The folder of answers cannot be used; the message says why and the fix."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one case.

    Args:
        number: of the case's record.
        seed: what it was drawn with.
        pieces: texts, and paths of pictures.
    """

    number: int
    where: str
    task: str
    seed: int
    pieces: tuple[str | Path, ...]

    def as_json(self, folder: Path) -> dict[str, Any]:
        pieces = [
            {"text": piece} if isinstance(piece, str) else {"image": str(piece.relative_to(folder))}
            for piece in self.pieces
        ]
        known = {"number": self.number, "where": self.where, "task": self.task, "seed": self.seed}
        return {**known, "pieces": pieces}

    @classmethod
    def read(cls, line: str, folder: Path) -> Prediction:
        """Raises ValueError, KeyError, TypeError: the line is no prediction."""
        held = json.loads(line)
        pieces = tuple(
            piece["text"] if "text" in piece else folder / piece["image"] for piece in held["pieces"]
        )
        return cls(held["number"], held["where"], held["task"], held["seed"], pieces)


def answer_all(
    cases: Sequence[Case],
    ask: Ask,
    folder: Path,
    about: dict[str, Any],
    *,
    batch_size: int = 8,
    seed: int = 0,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Prediction]:
    """The answers to all cases, in their order; those that the folder holds are not asked for again.

    Seeds go on from batch to batch, so the answer to a case depends on the cases, ``batch_size`` and
    ``seed``, and two checkpoints that are asked the same draw with the same noise.

    Args:
        ask: the model.
        about: what the answers depend on besides: the checkpoint's digest, the settings, the data; as
            JSON holds it.
        tick: called with how many cases are answered.

    Raises:
        AnswersError: the folder holds answers that depend on other things.
        OSError: it cannot be written.
    """
    about = json.loads(json.dumps({**about, "cases": len(cases), "batch_size": batch_size, "seed": seed}))
    _claim(folder, about)
    found: list[Prediction] = []
    position = 0
    for number, batch in enumerate(batches(cases, batch_size)):
        path = folder / BATCHES / f"{number:05d}.jsonl"
        held = _read(path, folder, batch)
        if held is None:
            answers = ask([case.prompt for case in batch], batch[0].outputs, seed + position)
            held = [
                _keep(case, pieces, seed + position + place, folder)
                for place, (case, pieces) in enumerate(zip(batch, answers, strict=True))
            ]
            _write(path, held, folder)
        found += held
        position += len(batch)
        tick(position)
    found.sort(key=lambda prediction: prediction.number)
    _write(folder / PREDICTIONS, found, folder)
    return found


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Makes the folder that of these answers. Raises AnswersError: it is of others."""
    path = folder / ABOUT
    for part in (BATCHES, PICTURES):
        (folder / part).mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        with atomic(path) as file:
            file.write(json.dumps(about, indent=1, ensure_ascii=False).encode())
        return
    except ValueError as error:
        raise AnswersError(f"{path} is damaged ({error}). Fix: give another folder") from None
    differing = sorted(key for key in {*about, *known} if about.get(key) != known.get(key))
    if differing:
        first = differing[0]
        raise AnswersError(
            f"{folder} holds answers with another {', '.join(differing)} ({first}: {known.get(first)!r}, now"
            f" {about.get(first)!r}). Fix: give another folder, or the same options"
        )


def _keep(case: Case, pieces: Sequence[Any], seed: int, folder: Path) -> Prediction:
    """Stores the pictures of an answer."""
    kept: list[str | Path] = []
    for place, piece in enumerate(pieces):
        if not isinstance(piece, str):
            path = folder / PICTURES / f"{case.number:06d}_{place}.png"
            with atomic(path) as file:
                piece.save(file, format="PNG")
            piece = path
        kept.append(piece)
    return Prediction(case.number, case.where, case.task, seed, tuple(kept))


def _read(path: Path, folder: Path, batch: Sequence[Case]) -> list[Prediction] | None:
    """The answers to a batch; None where they are not there, or a picture of theirs is not."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        held = [Prediction.read(line, folder) for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if [prediction.number for prediction in held] != [case.number for case in batch]:
        return None
    pictures = [piece for prediction in held for piece in prediction.pieces if isinstance(piece, Path)]
    return held if all(picture.is_file() for picture in pictures) else None


def _write(path: Path, predictions: Sequence[Prediction], folder: Path) -> None:
    with atomic(path) as file:
        for prediction in predictions:
            line = json.dumps(prediction.as_json(folder), ensure_ascii=False)
            file.write(line.encode("utf-8", "surrogatepass") + b"\n")
