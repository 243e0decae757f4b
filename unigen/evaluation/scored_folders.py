"""The folder of a benchmark's pictures as cases and answers, so that the metrics of answers measure it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unigen.evaluation.answers import Prediction
from unigen.evaluation.benchmarks import BenchmarkError
from unigen.evaluation.cases import IMAGE, Case
from unigen.evaluation.results import Result, digest_of
from unigen.evaluation.statistics import estimate
from unigen.printing import printable

OVERALL = "overall"
_METADATA = 'Fix: the line of evaluation_metadata.jsonl, with "prompt", "tag" and "include"'


def read_geneval(folder: Path) -> tuple[list[Case], list[Prediction]]:
    """A case for each prompt of GenEval's folder, its ``tag`` as the task, and its pictures as the answer.

    Raises:
        BenchmarkError: it is no such folder, or one of its files cannot be used.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
    if not names:
        raise BenchmarkError(
            f"{folder} holds no folders such as 00000 with pictures. Fix: give the output_dir of unigen"
            " generate --layout geneval"
        )
    cases, predictions = [], []
    for name in names:
        path = folder / name / "metadata.jsonl"
        held = _metadata(path)
        samples = folder / name / "samples"
        pictures = sorted(
            (p for p in samples.glob("*.png") if re.match(r"\d+\.png", p.name)), key=lambda p: int(p.stem)
        )
        if not pictures:
            raise BenchmarkError(f"{samples} holds no picture. Fix: draw them all first")
        outputs, references = (IMAGE,) * len(pictures), (None,) * len(pictures)
        case = Case(int(name), str(path), held["tag"], (held["prompt"],), outputs, references, wanted=held)
        cases.append(case)
        predictions.append(Prediction(case.number, case.where, case.task, None, tuple(pictures)))
    return cases, predictions


def _metadata(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read ({error}). {_METADATA}") from None
    good = isinstance(held, dict) and all(isinstance(held.get(key), str) for key in ("prompt", "tag"))
    for name in ("include", "exclude"):
        parts = held.get(name, [] if name == "exclude" else None) if good else None
        good = isinstance(parts, list) and all(_is_part(part, number) for number, part in enumerate(parts))
        if not good:
            raise BenchmarkError(f"{path}: field {name} is {printable(parts)}. {_METADATA}")
    return dict(held)


def _is_part(part: Any, number: int) -> bool:
    """Is it a part of GenEval's ``include`` or ``exclude``? A position names a part before it."""
    if not isinstance(part, dict) or not isinstance(part.get("class"), str):
        return False
    position = part.get("position", ["left of", 0] if number else None)
    placed = position is None or (
        isinstance(position, list) and len(position) == 2 and position[1] in range(number)
    )
    return isinstance(part.get("count"), int) and part["count"] >= 1 and placed


def with_overall(scores: dict[str, list[Result]], kind: str = "geneval") -> dict[str, list[Result]]:
    """``scores`` and, as a task of its own, the mean of the tasks' values of a metric, each task with the
    same weight, as GenEval's summary has it."""
    ones = [result for results in scores.values() for result in results if result.kind == kind]
    if len(ones) < 2:
        return scores
    lacking = next((one for one in ones if one.value is None), None)
    if lacking is not None:
        return {**scores, OVERALL: [replace(lacking, name=kind)]}
    # for each task a column of its values and one that counts them
    blocks = [torch.tensor([[value, 1.0] for value in one.parts[:, 0]], dtype=torch.float64) for one in ones]
    parts = torch.block_diag(*blocks).numpy()
    name = re.sub(r"\|n=\d+\|pictures=\d+", f"|mean of {len(ones)} tasks|n={len(parts)}", ones[0].name)
    data = digest_of([one.data for one in ones])
    return {**scores, OVERALL: [estimate(name, parts, "tasks", data=data, source=ones[0].source)]}


def check_same(base: list[Case], other: list[Case], name: str) -> None:
    """Raises BenchmarkError where another folder holds other prompts, which cannot be compared."""
    said = [(case.number, case.said_last, len(case.outputs)) for case in base]
    if said != [(case.number, case.said_last, len(case.outputs)) for case in other]:
        raise BenchmarkError(
            f"{name} holds other prompts or another number of pictures. Fix: compare folders of the same"
            " prompts"
        )
