"""How long measuring takes, beyond generation: ``python benchmarks/evaluate_speed.py [--records 297]``.

So many records that ask for a text and a picture each, with answers that are there already, go through
``unigen evaluate --predictions``: all metrics that need no further network, with the features of a small ViT (that
of the tests' checkpoint). Tells the seconds of a process of its own, its start included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from unigen.sequence.images import to_image

ROOT = Path(__file__).parents[1]
SIDE = 64  # pixels


def write_records(folder: Path, count: int) -> tuple[Path, Path]:
    """The records and the answers: other pictures, and the texts with a word changed."""
    random = np.random.default_rng(0)
    records, answers = [], []
    for n in range(count):
        for name in ("real", "drawn"):
            pixels = random.uniform(-1, 1, (3, SIDE, SIDE)).astype(np.float32)
            to_image(torch.from_numpy(pixels)).save(folder / f"{name}{n}.png")
        words = [f"word{w}" for w in random.integers(0, 50, 8)]
        said = [{"role": "user", "content": f"Draw {' '.join(words)} and say what it is."}]
        answered = [{"type": "text", "text": " ".join(words)}, {"type": "image", "image": f"real{n}.png"}]
        records.append({"messages": [*said, {"role": "assistant", "content": answered}]})
        words[n % 8] = "another"
        answers.append({"index": n, "text": " ".join(words), "image": f"drawn{n}.png"})
    paths = folder / "val.jsonl", folder / "answers.jsonl"
    for path, lines in zip(paths, (records, answers), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def measure(folder: Path, count: int) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    data, answers = write_records(folder, count)
    argv = [
        "--predictions", str(answers), "--data_path", str(data), "--output_dir", str(folder / "out"), "--features",
        f"bagel-vit:{ROOT / 'tests' / 'golden' / 'model'}", "--device", "cpu",
    ]  # fmt: skip
    begun, used = time.perf_counter(), _used()
    subprocess.run(
        [sys.executable, "-m", "unigen", "evaluate", *argv], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - begun, _used() - used


def _used() -> float:
    said = resource.getrusage(resource.RUSAGE_CHILDREN)
    return said.ru_utime + said.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=297)
    count = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        clock, processor = measure(Path(folder), count)
    print(f"{count} records: {clock:.1f} s by the clock, {processor:.1f} s of the processor")


if __name__ == "__main__":
    main()
