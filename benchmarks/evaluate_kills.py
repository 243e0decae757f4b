"""An evaluation that is killed again and again: ``python benchmarks/evaluate_kills.py [--kills 5]``.

One process evaluates a tiny checkpoint on texts, pictures and edits. Then two processes, as ``torchrun`` starts
them, are killed (SIGKILL) at random moments and started again, by turns as one process and as two, until it is
done. All must end with the same ``metrics.json`` and the same answers, byte for byte.
``tests/commands/evaluate/test_evaluate_processes.py`` runs the same with fewer kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kills
import numpy as np

ROOT = Path(__file__).parents[1]
COMPARED = ("metrics.json", "predictions.jsonl", "report.html")
PATIENCE_S = 300.0


def write_records(folder: Path, count: int) -> Path:
    """As many questions on a picture, pictures to draw, and edits."""
    import torch

    from unigen.sequence.images import to_image

    folder.mkdir(parents=True)
    random_ = np.random.default_rng(0)
    lines = []
    for n in range(count):
        for name in ("a", "b"):
            pixels = torch.from_numpy(random_.uniform(-1, 1, (3, 32, 32)).astype(np.float32))
            to_image(pixels).save(folder / f"{name}{n}.png")
        asked = [
            {"role": "user", "content": f"<image>Number {n}?"},
            {"role": "assistant", "content": f"It is {n}."},
        ]
        lines += [
            {"messages": asked, "images": [f"a{n}.png"]},
            {"text_prompt": f"a picture of {n}", "image_path": f"b{n}.png"},
            {
                "input_image": f"a{n}.png",
                "editing_steps": [{"step": 1, "instruction": f"make it {n}", "result_image": f"b{n}.png"}],
            },
        ]
    path = folder / "val.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def evaluate_as_rank(rank: int, world: int, port: int, argv: list[str], log: str) -> None:
    """One process of the evaluation."""
    kills.become_rank(rank, world, port, log)
    from unigen import cli

    os._exit(cli.main(["evaluate", *argv]))


class Evaluation:
    """An evaluation into ``out``, started and killed by its owner."""

    def __init__(self, model: Path, data: Path, out: Path):
        self.out, self.log = out, str(out) + ".log"
        self.argv = [
            "--model_path", str(model), "--data_path", str(data), "--output_dir", str(out), "--device", "cpu",
            "--batch_size", "3", "--num_timesteps", "4", "--max_new_tokens", "6", "--height", "32", "--width", "32",
            "--features", f"bagel-vit:{model}", "--views",
        ]  # fmt: skip
        self.processes: list[Any] = []

    def start(self, world: int) -> None:
        port = kills.free_port()
        self.processes = [
            kills.context().Process(
                target=evaluate_as_rank, args=(rank, world, port, self.argv, self.log), daemon=True
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    @property
    def files(self) -> int:
        """What is done, in files."""
        return sum(len(files) for _, _, files in os.walk(self.out))

    def kill_after(self, files: int, pause: float) -> bool:
        """Kills all processes once so many files are there and a little time has passed; false where they
        were done before."""
        deadline = time.monotonic() + PATIENCE_S
        while self.files < files and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)
        time.sleep(pause)
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()
        return bool(alive)

    def finish(self) -> None:
        for process in self.processes:
            process.join(PATIENCE_S)
            assert process.exitcode == 0, self.said()

    def said(self) -> str:
        return "\n".join(
            path.read_text()[-3000:] for path in self.out.parent.glob(f"{Path(self.log).name}.*")
        )

    def results(self) -> dict[str, bytes]:
        return {name: (self.out / name).read_bytes() for name in COMPARED}


def differing(killed: Evaluation, whole: Evaluation) -> list[str]:
    """The results that are not the same to the byte."""
    found, wanted = killed.results(), whole.results()
    return [name for name in COMPARED if found[name] != wanted[name]]


def kill_again_and_again(run: Evaluation, files: int, count: int, seed: int) -> list[str]:
    """Kills an evaluation, which makes so many ``files`` in all, at ``count`` random moments, and lets it
    finish; says when it was killed."""
    random_, moments = random.Random(seed), []
    for number, moment in enumerate(sorted(random_.randint(0, files - 1) for _ in range(count))):
        world = 2 - number % 2
        run.start(world)
        if run.kill_after(moment, random_.uniform(0, 0.1)):
            moments.append(f"{world} process(es) at {moment} of {files} files")
    run.start(2 - count % 2)
    run.finish()
    return moments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--records", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="evaluate-kills-"))
    model, data = ROOT / "tests/golden/model", write_records(folder / "data", given.records)
    whole, shared, killed = (Evaluation(model, data, folder / name) for name in ("whole", "shared", "killed"))
    whole.start(1)
    whole.finish()
    shared.start(2)
    shared.finish()
    moments = kill_again_and_again(killed, whole.files, given.kills, given.seed)
    print(f"{3 * given.records} records; killed: {'; '.join(moments)}")
    problems = [f"two processes: {name} differs" for name in differing(shared, whole)]
    problems += [f"killed: {name} differs" for name in differing(killed, whole)]
    if len(moments) < given.kills:
        problems.append(f"it was killed {len(moments)} times of {given.kills}: give it more records")
    print("\n".join(problems) or f"{', '.join(COMPARED)} are the same to the byte")
    shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
