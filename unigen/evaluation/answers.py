"""The answers of a model to many cases, kept batch by batch: a run that was killed goes on where it was, and
ends with the same answers as one that was not.

A folder holds ``answers.json`` (what all answers depend on), ``batches/00000.jsonl`` and so on (whole or
absent) and ``pictures/``; at the end ``predictions.jsonl``, all of them in the order of the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unigen.config import UserError
from unigen.evaluation.cases import IMAGE, Case, batches
from unigen.evaluation.results import digest_of
from unigen.files import atomic
from unigen.model.adapters import parse_adapter
from unigen.sequence.images import open_image, read_picture

ABOUT, BATCHES, PICTURES, PREDICTIONS = "answers.json", "batches", "pictures", "predictions.jsonl"
THREADS = "threads.json"
FILES = (ABOUT, BATCHES, PICTURES, PREDICTIONS, THREADS)
# what answers depend on, where an option gives it by another name; of some only a digest is kept
_OPTIONS = {
    "cases": "--samples", "records": "--samples", "pictures": "--num_images", "checkpoint": "--model_path",
    "data": "--data_path", "prompts": "--prompts_file", "version": "unigen", "source": "--preset",
    "images": "content of the pictures given", "quantize": "--quantize, or bits of --model_path",
}  # fmt: skip
_DIGESTS = ("checkpoint", "data", "prompts", "predictions", "images")
# what follows from another thing, and is no cause by itself where that differs
_FOLLOWS = (
    ("data", "cases"), ("data", "images"), ("prompts", "records"), ("prompts", "images"),
    ("quantize", "checkpoint"), ("adapter", "checkpoint"),
)  # fmt: skip


class Answer(NamedTuple):
    """Of a model: texts and pictures, and whether it ended by itself."""

    pieces: Sequence[Any]
    stopped: bool | None = None


# prompts, the pieces of the records, the seed of the first prompt -> the answers
Ask = Callable[[Sequence[Sequence[Any]], Sequence[str], int], list[Answer]]


class AnswersError(UserError):
    """The folder of answers cannot be used; the message says why and the fix."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one case.

    Args:
        number: of the case's record.
        seed: what it was drawn with.
        pieces: texts, and paths of pictures.
        stopped: did the answer end by itself? None where nobody knows.
    """

    number: int
    where: str
    task: str
    seed: int | None
    pieces: tuple[Any, ...]
    stopped: bool | None = None

    def as_json(self, folder: Path) -> dict[str, Any]:
        pieces = [
            {"text": piece} if isinstance(piece, str) else {"image": str(piece.relative_to(folder))}
            for piece in self.pieces
        ]
        known = {"number": self.number, "where": self.where, "task": self.task, "seed": self.seed}
        return {**known, "stopped": self.stopped, "pieces": pieces}

    @classmethod
    def of(cls, held: dict[str, Any], folder: Path) -> Prediction:
        """From what :meth:`as_json` gave. Raises KeyError, TypeError: it is no prediction."""
        pieces = tuple(
            piece["text"] if "text" in piece else folder / piece["image"] for piece in held["pieces"]
        )
        known = (held[key] for key in ("number", "where", "task", "seed"))
        return cls(*known, pieces, held.get("stopped"))


def drawn_beside(case: Case, found: Prediction) -> list[tuple[int, Any]]:
    """Where the pictures of an answer stand that its record has, too, each with the record's source of it."""
    right = [given for kind, given in zip(case.outputs, case.references) if kind == IMAGE]
    return list(zip((n for n, piece in enumerate(found.pieces) if not isinstance(piece, str)), right))


def rows_of_pictures(
    cases: Sequence[Case], shown: Sequence[Case], said: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each case, as :func:`row_by_row` keeps it: what was said of its pictures. ``shown`` are the
    cases of the pictures, in the order of ``said``."""
    rows: dict[int, list[dict[str, Any]]] = {case.number: [] for case in cases}
    for case, one in zip(shown, said, strict=True):
        rows[case.number].append(one)
    return [{"number": number, "pictures": pictures} for number, pictures in rows.items()]


@dataclass(frozen=True)
class BatchesOfProcess:
    """Which batches a process takes, and how it meets the others: each batch is answered alike by whoever
    takes it, so their number changes nothing."""

    rank: int = 0
    world: int = 1
    meet: Callable[[], None] = lambda: None


ALONE = BatchesOfProcess()


def answer_all(
    cases: Sequence[Case],
    ask: Ask,
    folder: Path,
    about: dict[str, Any],
    *,
    batch_size: int = 8,
    seed: int = 0,
    tick: Callable[[int], None] = lambda done: None,
    part: BatchesOfProcess = ALONE,
) -> list[Prediction]:
    """The answers to all cases, in their order; those that the folder holds are not asked for again.

    Seeds go on from batch to batch, so the answer to a case depends on the cases, ``batch_size`` and
    ``seed``, and two checkpoints that are asked the same draw with the same noise.

    Args:
        ask: the model.
        about: what the answers depend on besides: the checkpoint's digest, the settings, the data; as
            JSON holds it.
        tick: called with how many cases are answered.
        part: of this process; all of them return all answers.

    Raises:
        AnswersError: the folder holds answers that depend on other things.
        OSError: it cannot be written.
    """
    claim_answers(folder, {**about, "cases": len(cases), "batch_size": batch_size, "seed": seed})
    (folder / PICTURES).mkdir(exist_ok=True)
    parts = batches(cases, batch_size)
    starts = dict(zip((batch[0].number for batch in parts), accumulate(map(len, parts), initial=0)))

    def answer(batch: Sequence[Case]) -> list[dict[str, Any]]:
        first = seed + starts[batch[0].number]
        answers = ask([case.prompt for case in batch], batch[0].outputs, first)
        return [
            _keep(case, answer, first + place, folder).as_json(folder)
            for place, (case, answer) in enumerate(zip(batch, answers, strict=True))
        ]

    def pictures_are_there(row: dict[str, Any]) -> bool:
        pieces = Prediction.of(row, folder).pieces
        return all(piece.is_file() for piece in pieces if isinstance(piece, Path))

    rows = row_by_row(
        cases, answer, folder / BATCHES, batch_size=batch_size, tick=tick, part=part, whole=pictures_are_there
    )
    found = [Prediction.of(rows[case.number], folder) for case in cases]
    if part.rank == 0:
        _write(folder / PREDICTIONS, [one.as_json(folder) for one in found])
    return found


def row_by_row(
    cases: Sequence[Case],
    work: Callable[[Sequence[Case]], list[dict[str, Any]]],
    folder: Path,
    *,
    batch_size: int,
    tick: Callable[[int], None] = lambda done: None,
    part: BatchesOfProcess = ALONE,
    whole: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> dict[int, dict[str, Any]]:
    """A row of each case, with its ``number``, by that number: those that the folder holds, batch by batch,
    are not worked for again.

    Args:
        work: gives the rows of a batch, as JSON holds them.
        whole: is a row that was kept still good?

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = batches(cases, batch_size)
    done = 0
    for number, batch in enumerate(parts):
        if number % part.world == part.rank:
            path = folder / f"{number:05d}.jsonl"
            if _read(path, batch, whole) is None:
                _write(path, work(batch))
        done += len(batch)
        tick(done)
    part.meet()
    found: dict[int, dict[str, Any]] = {}
    for number, batch in enumerate(parts):
        rows = _read(folder / f"{number:05d}.jsonl", batch, whole)
        if rows is None:
            raise AnswersError(
                f"{folder}: batch {number} is gone again. Fix: start the same command again, and let every"
                " process see the same folder"
            )
        found |= {row["number"]: row for row in rows}
    return found


def digest_of_picture(source: Any) -> str:
    """SHA-256 of the bytes of a file, or of the size and levels of a PIL picture."""
    if hasattr(source, "tobytes"):
        picture = open_image(source)
        source = f"{picture.size}".encode() + picture.tobytes()
    return hashlib.sha256(source if isinstance(source, bytes) else read_picture(source)).hexdigest()


def digest_of_pictures(pictures: Iterable[Any]) -> str | None:
    """Twelve hexadecimal digits of the contents of pictures in their order; None without one. Raises
    PictureError."""
    with ThreadPoolExecutor(4) as pool:  # reading and hashing release the interpreter lock
        digests = list(pool.map(digest_of_picture, pictures))
    return digest_of(*digests) if digests else None


def factors_of(adapters: Iterable[str]) -> list[float] | None:
    """How much of each adapter takes part: the digest of the checkpoint holds what each is, and not this."""
    return [parse_adapter(one)[1] for one in adapters] or None


def claim_answers(folder: Path, about: dict[str, Any]) -> None:
    """Makes the folder that of these answers. Raises AnswersError: it is of others."""
    path, about = folder / ABOUT, json.loads(json.dumps(about))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        with atomic(path) as file:
            file.write(json.dumps(about, indent=1, ensure_ascii=False).encode())
        return
    except ValueError as error:
        raise AnswersError(f"{path} is damaged ({error}). Fix: give another folder") from None
    if differing := ", ".join(_differing(known, about)):
        raise AnswersError(
            f"{folder} holds answers with another {differing}. Fix: give another folder, or the same options"
        )


def _differing(known: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs, by the names of options, and their values before and now."""
    if ("predictions" in known) != ("predictions" in now):  # hardly anything else is the same
        yield "--predictions" if "predictions" in now else "--model_path"
        return
    keys = {*known, *now}
    for what, following in _FOLLOWS:
        keys -= {following} if known.get(what) != now.get(what) else set()
    for key in sorted(keys):
        was, is_ = known.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            yield from _differing(was, is_)
        elif was != is_:
            values = "" if key in _DIGESTS else f" ({json.dumps(was)} -> {json.dumps(is_)})"
            yield _OPTIONS.get(key, f"--{key}") + values


def same_threads(folder: Path) -> None:
    """Sums on a CPU may depend on how many threads add up: whoever goes on takes as many as the answers
    began with."""
    path = folder / THREADS
    try:
        torch.set_num_threads(int(json.loads(path.read_text(encoding="utf-8"))["threads"]))
    except (OSError, ValueError, KeyError, TypeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(json.dumps({"threads": torch.get_num_threads()}).encode())


def _keep(case: Case, answer: Answer, seed: int, folder: Path) -> Prediction:
    """Stores the pictures of an answer."""
    kept: list[str | Path] = []
    for place, piece in enumerate(answer.pieces):
        if not isinstance(piece, str):
            path = folder / PICTURES / f"{case.number:06d}_{place}.png"
            with atomic(path) as file:
                piece.save(file, format="PNG")
            piece = path
        kept.append(piece)
    return Prediction(case.number, case.where, case.task, seed, tuple(kept), answer.stopped)


def _read(
    path: Path, batch: Sequence[Case], whole: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]] | None:
    """The rows of a batch; None where they are not there, or one is not whole."""
    try:
        # as written: a text may hold other line ends than ours, and half of a surrogate pair
        text = path.read_bytes().decode("utf-8", "surrogatepass")
        held = [json.loads(line) for line in text.split("\n") if line]
        if [row["number"] for row in held] == [case.number for case in batch] and all(map(whole, held)):
            return held
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
