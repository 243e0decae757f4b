"""A checkpoint against itself: ``python benchmarks/evaluate_seeds.py outputs/demo [--seeds 12]``.

The demo's last checkpoint draws the same held-out words with several seeds. A hundred times two sets are made of
these drawings, for each word those of two different seeds at random, and compared as ``unigen evaluate
--compare`` compares checkpoints. Nothing differs but the noise, so that a difference is shown at most where
chance has it: in no more than 6 of 100. Answers to different words do not depend on each other, and those of all
seeds follow one law, so a set of mixed seeds is like one of a single seed; the hundred comparisons share
drawings.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from unigen.commands.demo.digits import DigitReader, write_digits
from unigen.commands.demo.exam import FULL, SAMPLING
from unigen.commands.demo.measure import drawn_right, judge_extractor, write_exam
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.evaluation.answers import Prediction
from unigen.evaluation.cases import cases_of
from unigen.evaluation.material import Tools
from unigen.evaluation.results import Result
from unigen.evaluation.score import score
from unigen.evaluation.statistics import compare
from unigen.inference.inferencer import InterleaveInferencer
from unigen.runs.checkpoint import steps

KINDS = ("fd", "similarity")  # and drawn_right
ALLOWED = 6  # of 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="the demo's output folder")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--comparisons", type=int, default=100)
    parser.add_argument("--records", type=int, default=60)
    given = parser.parse_args()
    digits = write_digits(given.demo / "data", per_epoch=FULL.per_epoch)
    judge, exam = DigitReader(digits), given.demo / "data" / "exam.jsonl"
    known = write_exam(digits, exam, given.records)
    found = cases_of(UnifiedGenerationDataset(str(exam)))[0]
    cases = [case for case in found if case.task == "generate"]
    tools = Tools(extractor=judge_extractor(judge))
    checkpoint = steps(given.demo / "run")[0]
    inferencer = InterleaveInferencer.from_pretrained(checkpoint, "cpu")
    drawn = []  # [seed][case]
    for seed in range(given.seeds):
        answers = inferencer.unified_generate_batch(
            [case.prompt for case in cases], outputs=["image"], seed=seed * len(cases), **SAMPLING
        )
        drawn.append(answers)
        print(f"{seed + 1} seeds", file=sys.stderr, flush=True)

    def measured(chosen: np.ndarray) -> dict[str, Result]:
        """The set that has the drawing of seed ``chosen[n]`` of each word n."""
        predictions = [
            Prediction(case.number, case.where, case.task, int(seed), tuple(drawn[seed][n]), True)
            for n, (case, seed) in enumerate(zip(cases, chosen, strict=True))
        ]
        scores = score(cases, predictions, tools, kinds=KINDS, more=lambda m: drawn_right(m, judge, known))
        return {result.kind: result for result in scores["generate"]}

    shown: Counter[str] = Counter()
    random = np.random.default_rng(0)
    for number in range(given.comparisons):
        pairs = np.array([random.permutation(given.seeds)[:2] for _ in cases])
        first, second = measured(pairs[:, 0]), measured(pairs[:, 1])
        for kind, result in first.items():
            shown[kind] += compare(result, second[kind], seed=number).verdict != "no difference shown"
    print(f"{checkpoint.name} against itself: {len(cases)} words, {given.seeds} seeds")
    for kind, count in shown.items():
        print(
            f"{kind}: no difference shown in {given.comparisons - count} of {given.comparisons} comparisons"
        )
    return int(any(count > ALLOWED / 100 * given.comparisons for count in shown.values()))


if __name__ == "__main__":
    sys.exit(main())
