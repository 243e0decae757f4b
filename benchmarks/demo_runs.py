"""What options do to the scores of the demo's model: a tiny one that reads, draws and edits handwritten digits.

    python benchmarks/demo_runs.py preserve   # fine-tuning on edits alone, and with preserve_weight
    python benchmarks/demo_runs.py weights    # weights in bfloat16 against float32, over seeds
    python benchmarks/demo_runs.py adapters   # LoRA over NF4 and INT8 against full precision, and full fine-tuning

``--output`` keeps data, runs and models. Held-out questions are on pictures that no training has seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unigen.commands.demo.digits import TASKS, DigitSet, word_texts, write_digits
from unigen.commands.demo.exam import FULL, QUICK, SIDE, TRAINING, Exam
from unigen.commands.init.model import create_model
from unigen.commands.train import train
from unigen.config import Config
from unigen.runs import layout

SCORES = {"reads": "understanding_accuracy", "draws": "generation_accuracy", "edits": "edit_accuracy"}
Row = dict[str, Any]


def records(folder: Path, counts: dict[str, int]) -> DigitSet:
    """Records of some tasks, and no other, all of one split."""
    return write_digits(folder, seed=0, per_epoch=dict.fromkeys(TASKS, 0) | counts)


def trained(folder: Path, steps: int, **options: Any) -> Path:
    """The last checkpoint of a run."""
    own = {"output_dir": str(folder), "max_steps": steps, "save_steps": steps, "ema": QUICK.ema, "seed": 42}
    if train(Config(**TRAINING | own | options, device="cpu")) != 0:
        raise SystemExit("a signal ended the run")
    return folder / layout.step_name(steps)


def scores(checkpoint: Path, digits: DigitSet, questions: int) -> dict[str, float]:
    """Shares of right answers."""
    exam = Exam(checkpoint, digits, questions, seed=42)
    found = exam.understanding() | exam.generation() | exam.editing()
    return {name: found[key] for name, key in SCORES.items()}


def final_loss(run: Path) -> float:
    """Mean of the last 50 steps."""
    rows = [json.loads(line) for line in (run / layout.METRICS).read_text("utf-8").splitlines()]
    return statistics.fmean(row["loss"] for row in rows[-50:])


def timed(work: Callable[[], Row], **about: Any) -> Row:
    began = time.perf_counter()
    row = about | work()
    row["seconds"] = round(time.perf_counter() - began)
    print(json.dumps(row), flush=True)
    return row


# ---- preserve_weight

KINDS: dict[str, Row] = {
    "whole": {"learning_rate": 3e-3},
    "lora": {"learning_rate": 5e-3, "lora_rank": 16, "lora_targets": ["both"]},
}


def preserve(folder: Path, questions: int) -> bool:
    """A model that reads and draws, and never saw an edit, is fine-tuned on edits: alone, and with the distance
    to itself before on records of reading and drawing, whose answers are not learnt."""
    digits = records(folder / "base", {"draw": 1500, "ask": 1500})
    edits = records(folder / "edits", {"edit": 2700})
    create_model(folder / "model", word_texts(), 42, side=SIDE, **QUICK.model)
    about = {"model_path": str(folder / "model"), "train_data_path": str(digits.train)}
    base = trained(folder / "run", 600, learning_rate=QUICK.learning_rate, **about)
    before = timed(lambda: scores(base, edits, questions), run="before")
    kept = {"preserve_weight": 0.5, "preserve_data_path": str(digits.train), "preserve_share": 0.3}
    good = True
    for kind, options in KINDS.items():
        for name, more in ((f"{kind}, edits alone", {}), (f"{kind}, preserved", kept)):

            def tune(name: str = name, options: Row = options | more) -> Row:
                run = folder / name.replace(", ", "-").replace(" ", "-")
                data = {"model_path": str(base), "train_data_path": str(edits.train)}
                return scores(trained(run, 700, **data, **options), edits, questions)

            row = timed(tune, run=name)
        share = min(row[score] / before[score] for score in ("reads", "draws"))
        good &= share >= 0.95 and row["edits"] >= 0.5
        print(f"{name}: keeps {share:.1%} of the worse of both scores")
    return good


# ---- weights in bfloat16


def weights(folder: Path, questions: int) -> bool:
    """The quick demo's training, computed in float32 throughout, with its matrices held in either."""
    digits = write_digits(folder / "data", seed=0, per_epoch=QUICK.per_epoch)
    rows: dict[str, list[Row]] = {"float32": [], "bf16": []}
    for seed in (1, 2, 3):
        create_model(folder / f"model-{seed}", word_texts(), seed, side=SIDE, **QUICK.model)
        for held, found in rows.items():

            def learn(held: str = held, seed: int = seed) -> Row:
                about = {"model_path": str(folder / f"model-{seed}"), "train_data_path": str(digits.train)}
                options = {"learning_rate": QUICK.learning_rate, "weights": held, "seed": seed}
                run = folder / f"{held}-{seed}"
                found = scores(trained(run, QUICK.steps, **about, **options), digits, questions)
                return found | {"loss": round(final_loss(run), 4)}

            found.append(timed(learn, run=f"{held}, seed {seed}"))
    apart = []
    for score in SCORES:
        means = [statistics.fmean(row[score] for row in found) for found in rows.values()]
        apart.append(means[1] - means[0])
        print(f"{score}: float32 {means[0]:.3f}, bf16 {means[1]:.3f}, apart {apart[-1]:+.3f}")
    return min(apart) >= -0.02


# ---- adapters


def adapters(folder: Path, questions: int) -> bool:
    """From a demo that stopped half-way, 400 more steps: full fine-tuning, and LoRA over three bases. The full
    demo's model: rows of the quick one are no multiple of NF4's blocks."""
    digits = write_digits(folder / "data", seed=0, per_epoch=QUICK.per_epoch)
    create_model(folder / "model", word_texts(), 42, side=SIDE, **FULL.model)
    data = {"train_data_path": str(digits.train)}
    half = trained(
        folder / "half", QUICK.steps // 2, model_path=str(folder / "model"),
        learning_rate=QUICK.learning_rate, lr_scheduler_type="constant", **data,
    )  # fmt: skip
    lora = {
        "lora_rank": 64,
        "lora_targets": ["both", "connector"],
        "train_also": ["llm2vae", "vae2llm", "time_embedder", "norms"],
        "learning_rate": 4e-3,
    }
    ways: dict[str, Row] = {
        "full": {"learning_rate": QUICK.learning_rate}, "lora": lora,
        "lora over nf4": lora | {"quantize": "nf4"}, "lora over int8": lora | {"quantize": "int8"},
    }  # fmt: skip
    losses = {}
    for name, options in ways.items():

        def tune(name: str = name, options: Row = options) -> Row:
            run = folder / name.replace(" ", "-")
            trained(run, 400, model_path=str(half), **data, **options)
            return {"loss": round(final_loss(run), 4)}

        losses[name] = timed(tune, run=name)["loss"]
    shares = {name: losses[name] / losses["lora"] - 1 for name in ("lora over nf4", "lora over int8")}
    shares["lora"] = losses["lora"] / losses["full"] - 1
    for name, share in shares.items():
        print(f"{name}: {share:+.1%} against {'full' if name == 'lora' else 'lora'}")
    return shares.pop("lora") <= 0.10 and max(shares.values()) <= 0.02


PARTS: dict[str, Callable[[Path, int], bool]] = {
    "preserve": preserve,
    "weights": weights,
    "adapters": adapters,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    parser.add_argument("--output", type=Path, help="where data, runs and models stay")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        return 0 if PARTS[asked.part](asked.output or Path(scratch), asked.questions) else 1


if __name__ == "__main__":
    raise SystemExit(main())
