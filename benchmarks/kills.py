"""A run that is killed again and again: ``python benchmarks/kills.py [--kills 100] [--processes 2] [--engine
fsdp2]``.

All processes of a small run are killed (SIGKILL) at random moments, half of them while a checkpoint is being
written, and started again with ``--resume_from_checkpoint auto``, until it is done. Then: its log is that of
a run nobody killed, digit for digit; no published checkpoint was lost; every sample was met exactly once an
epoch. ``tests/training/test_kills.py`` runs the same with fewer kills.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0
PRELOAD = [
    "unigen.training.trainer", "unigen.training.fsdp", "unigen.sequence.tokens",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2", "transformers.models.siglip", "torch._dynamo",
]  # fmt: skip


_OURS: list[int] = []  # the process that forks, once it has been started


def context() -> Any:
    """New processes are forks of one that has imported everything: a start then costs a tenth of a second,
    not five."""
    ctx = multiprocessing.get_context("forkserver")
    # Python has one such server in a process. One that other code has started (data/workers.py) has imported
    # what that code needs, and gives way; ours serves that code, too, whatever list it has set since.
    server = forkserver._forkserver  # type: ignore[attr-defined]
    if [server._forkserver_pid] != _OURS:
        server._stop()
        ctx.set_forkserver_preload(PRELOAD)
        # The server looks for its modules where a fresh interpreter does, so it is told where else this one does.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        server.ensure_running()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
        _OURS[:] = [server._forkserver_pid]
    return ctx


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def timeless(output_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what a clock wrote."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("time", "tokens_per_second", "data_wait")}
        for line in lines
    ]


def become_rank(rank: int, world: int, port: int, log: str = "") -> None:
    """Makes this process one of a run, as torchrun would; what it prints goes to ``log``.RANK.log, where that
    is given."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    if log:
        output = os.open(f"{log}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)


def train_as_rank(rank: int, world: int, port: int, options: dict[str, Any], notes: str) -> None:
    """One process of the run; every step's samples are noted in ``notes``."""
    become_rank(rank, world, port, notes)
    from unigen.config import Config
    from unigen.training.loop import TrainingLoop
    from unigen.training.trainer import UnifiedTrainer

    samples = open(f"{notes}.{rank}", "a", encoding="utf-8")  # noqa: SIM115 (open until the process is killed)
    step = TrainingLoop.take_step

    def noted(loop: TrainingLoop, batches: list[Any], *rest: Any) -> Any:
        result = step(loop, batches, *rest)
        line = {
            "step": loop.position.step + 1,
            "epoch": batches[-1].after.epoch,
            "samples": [origin for batch in batches for origin in batch.pack.origins],
        }
        samples.write(json.dumps(line) + "\n")
        samples.flush()
        return result

    TrainingLoop.take_step = noted  # type: ignore[method-assign]
    UnifiedTrainer(Config(**options)).train()
    os._exit(0)


@dataclass
class Killed:
    """How it went."""

    kills: int = 0
    in_save: int = 0
    starts: int = 0
    lost: list[str] = field(default_factory=list)  # checkpoints that were there and then not
    problems: list[str] = field(default_factory=list)


class Run:
    """A run in ``folder``, started and killed by its owner."""

    def __init__(self, folder: Path, world: int, options: dict[str, Any]):
        self.folder, self.world = folder, world
        self.options = {**options, "output_dir": str(folder / "run"), "resume_from_checkpoint": "auto"}
        self.ctx = context()
        self.processes: list[BaseProcess] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def output_dir(self) -> Path:
        return self.folder / "run"

    def start(self) -> None:
        port = free_port()
        args = [
            (rank, self.world, port, self.options, str(self.folder / "samples")) for rank in range(self.world)
        ]
        self.processes = [self.ctx.Process(target=train_as_rank, args=a, daemon=True) for a in args]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def finish(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode != 0:
                self.kill()
                raise AssertionError(f"a process ended with {process.exitcode}:\n{self.log()}")

    def log(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("samples.*.log")))

    def published(self) -> set[str]:
        return {path.name for path in self.output_dir.glob("step_*")}

    def metrics(self) -> list[dict[str, Any]]:
        return timeless(self.output_dir)


def kill_again_and_again(run: Run, kills: int, in_save: int, seed: int) -> Killed:
    """Kills the run ``kills`` times at any moment and ``in_save`` times while it writes a checkpoint, then
    lets it finish."""
    rng, went = random.Random(seed), Killed()
    plan = ["save"] * in_save + ["any"] * kills
    rng.shuffle(plan)
    there: set[str] = set()
    while plan:
        run.start()
        went.starts += 1
        if not _reach(run, plan[-1], rng):
            run.finish()  # done before the moment came
            break
        run.kill()
        went.kills += plan[-1] == "any"
        went.in_save += plan[-1] == "save"
        plan.pop()
        went.lost += _lost(there, run)
        there = run.published()
    else:
        run.start()
        went.starts += 1
        run.finish()
    went.lost += _lost(there, run)
    if plan:
        went.problems.append(f"the run was done with {len(plan)} kills to go; give it more steps")
    return went


def _lost(before: set[str], run: Run) -> list[str]:
    """Checkpoints that are gone, but for the oldest ones where ``save_total_limit`` prunes."""

    def step(name: str) -> int:
        return int(name.removeprefix("step_"))

    now = run.published()
    oldest = min(map(step, now), default=0) if run.options["save_total_limit"] else 0
    return sorted((name for name in before - now if step(name) > oldest), key=step)


def _reach(run: Run, moment: str, rng: random.Random) -> bool:
    """Waits for a moment to kill at; false where the run ended before."""
    deadline = time.monotonic() + PATIENCE_S
    if moment == "any":
        # A quarter of the kills fall into the start; the others behind one to three steps.
        starting, behind, before = rng.random() < 0.25, rng.randint(1, 3), run.published()
        until = time.monotonic() + rng.uniform(0.1, 1.5)
        while run.running and (
            time.monotonic() < until if starting else len(run.published() - before) < behind
        ):
            assert time.monotonic() < deadline, f"no step came:\n{run.log()}"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
    else:
        skip = rng.randrange(3)
        seen: set[str] = set()
        while run.running:
            assert time.monotonic() < deadline, f"no checkpoint came:\n{run.log()}"
            seen |= {path.name for path in run.output_dir.glob(".step_*.partial-*")}
            if len(seen) > skip:
                time.sleep(rng.uniform(0, 0.03))
                break
            time.sleep(0.0005)
    return run.running


def compare(run: Run, whole: Run, went: Killed, samples: int) -> None:
    """Adds to ``went.problems`` whatever differs from the run nobody killed."""
    found, wanted = run.metrics(), whole.metrics()
    if found != wanted:
        first = next(
            (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
            min(len(found), len(wanted)),
        )
        went.problems.append(
            f"the logs part at line {first + 1}: {found[first : first + 1]} instead of"
            f" {wanted[first : first + 1]}"
        )
    last = max(run.published(), key=lambda name: int(name.removeprefix("step_")))
    for path in sorted((whole.output_dir / last).glob("*.safetensors")):
        if path.read_bytes() != (run.output_dir / last / path.name).read_bytes():
            went.problems.append(f"{last}/{path.name} differs")
    by_step: dict[tuple[int, int], list[str]] = {}
    epochs: dict[int, int] = {}
    for rank in range(run.world):
        for line in (run.folder / f"samples.{rank}").read_text().splitlines():
            note = json.loads(line)
            # a later try of the same step replaces the earlier one
            by_step[note["step"], rank] = note["samples"]
            epochs[note["step"]] = note["epoch"]
    for epoch in sorted(set(epochs.values())):
        met = Counter(s for (step, _), names in by_step.items() if epochs[step] == epoch for s in names)
        complete = epoch < max(epochs.values()) or len(met) == samples
        if complete and (len(met) != samples or set(met.values()) != {1}):
            went.problems.append(
                f"epoch {epoch}: {len(met)} of {samples} samples, some {max(met.values())} times"
            )
    leftovers = [path.name for path in run.output_dir.glob(".*") if path.name != ".lock"]
    if leftovers:
        went.problems.append(f"left behind: {leftovers}")


def small_run(model: Path, data: Path, steps: int, **more: Any) -> dict[str, Any]:
    """Options of a run whose steps take some hundredths of a second, each with a checkpoint."""
    return {
        "model_path": str(model), "train_data_path": str(data), "max_steps": steps, "save_steps": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3, "ema": 0.9, "device": "cpu", "num_workers": 0, "save_total_limit": None,
        **more,
    }  # fmt: skip


def write_samples(path: Path, count: int) -> int:
    """Short texts; how many."""
    with open(path, "w", encoding="utf-8") as f:
        for i in range(count):
            question, answer = (
                {"role": "user", "content": f"{i} and {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            )
            f.write(json.dumps({"messages": [question, answer]}) + "\n")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    samples = write_samples(folder / "data.jsonl", given.processes * max(12, given.kills))
    steps = 3 * (samples // given.processes)
    more = {"engine": given.engine, "num_workers": given.workers, "save_total_limit": 5}
    options = small_run(ROOT / "tests/golden/model", folder / "data.jsonl", steps, **more)
    began = time.perf_counter()
    whole = Run(folder / "whole", given.processes, options)
    whole.start()
    whole.finish()
    straight = time.perf_counter() - began
    run = Run(folder / "killed", given.processes, options)
    went = kill_again_and_again(run, given.kills - given.kills // 2, given.kills // 2, given.seed)
    compare(run, whole, went, samples)
    print(f"{went.kills} kills at any moment, {went.in_save} in a save, {went.starts} starts, {steps} steps")
    print(f"{straight:.0f} s without kills, {time.perf_counter() - began - straight:.0f} s with them")
    went.problems += [f"published and lost: {name}" for name in went.lost]
    print(
        "\n".join(went.problems)
        or "no checkpoint was lost; the log, the last checkpoint and the samples of every epoch are those of a run nobody killed"
    )
    shutil.rmtree(folder)
    return 1 if went.problems else 0


if __name__ == "__main__":
    sys.exit(main())
