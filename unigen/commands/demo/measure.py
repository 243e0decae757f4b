"""The end of the demo: ``unigen evaluate`` over held-out digits, for the checkpoint of half the steps and the
last one.

Features and marks come from the judge, which was fitted on real digits only: how far the drawn digits are
from the real ones, beside how far other real ones are, and how many show what was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unigen.commands.demo.digits import QUESTION, SIDE, DigitReader, DigitSet, shrink
from unigen.commands.evaluate.options import EvaluateOptions
from unigen.commands.evaluate.work import Extras, run
from unigen.evaluation.features import Extractor
from unigen.evaluation.material import Drawn, Material
from unigen.evaluation.results import Result, digest_of_numbers, identity, libraries
from unigen.evaluation.statistics import estimate
from unigen.sequence.images import open_image

TASKS = ("draw", "ask", "edit", "add")
METRICS = [
    "structure", "stopped", "exact_match", "perplexity", "psnr", "edit_changed", "edit_stayed", "fd",
    "fd_real", "described_as_real",
]  # fmt: skip
FOLDER = "evaluation"


def write_exam(digits: DigitSet, path: Path, limit: int) -> list[dict[str, Any]]:
    """At most ``limit`` held-out records of each of :data:`TASKS` in one file; what is known of each."""
    known: list[dict[str, Any]] = []
    with open(path, "w", encoding="utf-8") as file:
        for task in TASKS:
            for line in (digits.heldout / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:limit]:
                record = json.loads(line.replace('"pictures/', f'"{digits.heldout.name}/pictures/'))
                file.write(json.dumps(record) + "\n")
                known.append(record["metadata"])
    return known


def judge_extractor(judge: DigitReader) -> Extractor:
    """The judge's ten decision values as the features of a picture."""
    digest = digest_of_numbers(judge.decide(np.eye(SIDE * SIDE).reshape(-1, SIDE, SIDE)))
    return Extractor(
        f"digits-svm@{digest}|area-{SIDE}",
        libraries("scikit-learn", "pillow"),
        lambda picture: torch.from_numpy(shrink(picture)),
        lambda pixels: torch.from_numpy(judge.decide(pixels.numpy())),
    )


def drawn_right(material: Material, judge: DigitReader, known: Sequence[dict[str, Any]]) -> list[Result]:
    """Share of pictures that the judge accepts: as the number asked for, or as the exact edit.
    ``known`` tells of each record, in their order."""
    if not material.drawn:
        return []

    def right(one: Drawn) -> bool:
        about, picture = known[one.case.number], open_image(one.picture)
        if "edits" in about:
            return judge.edit_correct(picture, open_image(one.reference), about["label"], about["edits"])
        return int(judge.classify([picture])[0]) == about["label"]

    values = np.array([right(one) for one in material.drawn], float)
    return [
        estimate(identity("drawn_right", "judge=digits-svm", n=len(values)), values, seed=material.tools.seed)
    ]


def evaluate_digits(
    output_dir: Path, digits: DigitSet, judge: DigitReader, limit: int, seed: int, sampling: Any
) -> Path:
    """Evaluates the run's checkpoints; the report."""
    known = write_exam(digits, output_dir / "data" / "exam.jsonl", limit)
    real = [digits.train / picture for picture in _real(digits, limit)]
    options = EvaluateOptions(
        run=str(output_dir / "run"), data_path=str(output_dir / "data" / "exam.jsonl"),
        output_dir=str(output_dir / FOLDER), pieces="model", batch_size=100, metrics=METRICS, views=True,
        describe_question=QUESTION, device="cpu", seed=seed, max_new_tokens=16, **sampling,
    )  # fmt: skip
    extras = Extras(
        judge_extractor(judge), real, lambda material: drawn_right(material, judge, known)
    )  # fmt: skip
    run(options, extras)
    return output_dir / FOLDER / "report.html"


def _real(digits: DigitSet, limit: int) -> list[str]:
    """Pictures of real training digits, the classes taking turns as they do in the held-out records."""
    lines = (digits.train / "draw.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    return [json.loads(line)["image_path"] for line in lines]
