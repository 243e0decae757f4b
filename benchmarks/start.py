"""How long a training takes to read its data at start: the first time, and again as a resume does.

    python benchmarks/start.py --records 300000 --model tests/golden/model

Writes text records to a folder of its own, and builds the data set twice, in a process each, with the token
lengths of the model. What an earlier start left in the cache folder does not count: the folder is a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write(path: Path, records: int, short: bool = False) -> None:
    """Conversations of some 60 words, or of some 6, seeded."""
    r = random.Random(0)
    words = [
        "the",
        "red",
        "house",
        "stands",
        "by",
        "a",
        "quiet",
        "sea",
        "and",
        "its",
        "windows",
        "look",
        "far",
        "out",
        "over",
        "grey",
        "water",
    ]
    with path.open("w", encoding="utf-8") as file:
        for i in range(records):
            most = ((2, 4), (2, 4)) if short else ((5, 25), (10, 80))
            question, answer = (" ".join(r.choices(words, k=r.randint(*k))) for k in most)
            turns = [
                {"role": "user", "content": f"{question} {i}?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def build(path: Path, model: str) -> None:
    """Builds the data set as a training does; prints the seconds that took, without imports."""
    from unigen.config import DataOptions
    from unigen.data.dataset import UnifiedGenerationDataset
    from unigen.data.loader import cores
    from unigen.model.weights import load_planner

    planner = load_planner(model, DataOptions())
    how = {"lengths_key": planner.identity, "num_workers": cores(), "progress": True}
    started = time.perf_counter()
    dataset = UnifiedGenerationDataset(path, token_lengths=planner.token_lengths, **how)
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {"seconds": round(seconds, 2), "records": len(dataset), "fingerprint": dataset.fingerprint}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--short", action="store_true", help="records of a few words")
    parser.add_argument("--model", default="tests/golden/model")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        return build(options.build, options.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.jsonl")
        write(path, options.records, options.short)
        print(
            f"{options.records:,} text records, {path.stat().st_size / 1e6:,.0f} MB, {os.cpu_count()} cores"
        )
        again = [sys.executable, __file__, "--build", str(path), "--model", options.model]
        for what in ("first", "again"):
            out = subprocess.run(
                again, env=os.environ | {"UNIGEN_CACHE": str(Path(folder, "cache"))}, check=True,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            print(f"{what:>6}: {out.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
