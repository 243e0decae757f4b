"""Fine-tuning on edits alone, and with ``preserve_weight``: what the demo's model still can afterwards.

A tiny model learns to read and to draw handwritten digits (as ``unigen demo``), and none of its records has
an edit. Then it is fine-tuned on edits: alone, and with its distance to itself before, on records of reading
and drawing (whose answers are not learnt) and on the edits themselves. The same held-out questions are asked
every time, on pictures that no training has seen.

    python benchmarks/preserve.py [--steps 500] [--weight 3] [--only whole] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from unigen.commands.demo.digits import DigitSet, write_digits
from unigen.commands.demo.exam import QUICK, TRAINING, Exam, create_model
from unigen.commands.train import train
from unigen.config import Config
from unigen.runs import layout

BASE = {"draw": 1500, "ask": 1500}
EDITS = {"edit": 2700}
KINDS: dict[str, dict[str, Any]] = {
    "whole": {"learning_rate": 1.5e-3},
    "lora": {"learning_rate": 5e-3, "lora_rank": 16, "lora_targets": ["both"]},
}
SCORES = {"reads": "understanding_accuracy", "draws": "generation_accuracy", "edits": "edit_accuracy"}


def records(folder: Path, counts: dict[str, int]) -> DigitSet:
    """Records of some tasks, and no other, all of one split."""
    every = dict.fromkeys(
        ("draw", "caption", "ask", "ask_messages", "edit", "edit_steps", "add", "add_sequence"), 0
    )
    return write_digits(folder, seed=0, per_epoch=every | counts)


def trained(folder: Path, steps: int, **options: Any) -> Path:
    """The last checkpoint of a run."""
    options = TRAINING | {"output_dir": str(folder), "max_steps": steps, "save_steps": steps} | options
    if train(Config(**options, ema=QUICK.ema, seed=42, device="cpu")) != 0:
        raise SystemExit("a signal ended the run")
    return folder / layout.step_name(steps)


def scores(checkpoint: Path, digits: DigitSet, questions: int) -> dict[str, float]:
    """Shares of right answers."""
    exam = Exam(checkpoint, digits, questions, seed=42)
    found = exam.understanding() | exam.generation() | exam.editing()
    return {name: found[key] for name, key in SCORES.items()}


def measure(
    folder: Path, steps: int, weight: float, questions: int, kinds: list[str]
) -> list[dict[str, Any]]:
    """The rows of the table: how it was trained, its scores, seconds of training."""
    digits, edits = records(folder / "base", BASE), records(folder / "edits", EDITS)
    create_model(folder / "model", 42, **QUICK.model)
    began = time.perf_counter()
    base = trained(
        folder / "run", 600, model_path=str(folder / "model"), train_data_path=str(digits.train),
        learning_rate=QUICK.learning_rate,
    )  # fmt: skip
    rows = [{"run": "before", "seconds": time.perf_counter() - began} | scores(base, edits, questions)]
    kept = {"preserve_weight": weight, "preserve_data_path": str(digits.train), "preserve_share": 0.5}
    for kind in kinds:
        for name, more in ((f"{kind}, edits alone", {}), (f"{kind}, preserved", kept)):
            began = time.perf_counter()
            run = folder / name.replace(", ", "-").replace(" ", "-")
            options = KINDS[kind] | more
            step = trained(run, steps, model_path=str(base), train_data_path=str(edits.train), **options)
            seconds = time.perf_counter() - began
            rows.append({"run": name, "seconds": seconds} | scores(step, edits, questions))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of each fine-tuning")
    parser.add_argument("--weight", type=float, default=3.0, help="preserve_weight")
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    parser.add_argument("--only", choices=sorted(KINDS), help="one kind of training")
    parser.add_argument("--output", type=Path, help="where data, runs and models stay")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.output or Path(scratch)
        kinds = [asked.only] if asked.only else list(KINDS)
        rows = measure(folder, asked.steps, asked.weight, asked.questions, kinds)
    print("| run | reads | draws | edits | seconds |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['run']} | " + " | ".join(f"{row[s]:.3f}" for s in SCORES) + f" | {row['seconds']:.0f} |"
        )
    before, passed = rows[0], True
    for row in rows[1:]:
        if row["run"].endswith("preserved"):
            share = min(row[s] / before[s] for s in ("reads", "draws"))
            passed &= share >= 0.95 and row["edits"] >= 0.5
            print(f"{row['run']}: keeps {share:.1%} of the worse of both scores")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
