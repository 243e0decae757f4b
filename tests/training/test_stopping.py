"""SIGTERM and SIGINT in any phase, to one process or to all: the last finished step is saved, the exit code
says so, and the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank, context, free_port, timeless
from processes import end_of, flags, printed_by, start_command, wait_for
from tiny import metrics, train

from unigen.config import Config
from unigen.runs.heartbeat import EXIT_HUNG
from unigen.runs.signals import EXIT_STOPPED
from unigen.training import trainer as trainer_module
from unigen.training.loop import TrainingLoop
from unigen.training.trainer import UnifiedTrainer

ROOT = Path(__file__).parents[2]
# phase -> (steps done when the signal comes, the step that must be saved then)
PHASES = {
    "loading": (0, None),
    "warm-up batch": (0, None),
    "data": (3, 3),
    "forward/backward": (3, 4),
    "saving": (4, 4),
    "validating": (2, 2),
    "sampling": (4, 4),
}


def built_runs() -> list[Any]:
    """Grows by every run that is built from now on."""
    runs, build = [], trainer_module.build

    def noted(*given: Any) -> Any:
        runs.append(build(*given))
        return runs[-1]

    trainer_module.build = noted
    return runs


def _train_as_rank(
    rank: int,
    world: int,
    port: int,
    options: dict[str, Any],
    when: tuple[str, int] | None,
    who: list[int],
    log: str,
) -> None:
    """One process; those of ``who`` get a signal as they enter the phase ``when``."""
    become_rank(rank, world, port, log)
    trainer = UnifiedTrainer(Config(**options))
    phase, runs = trainer.signals.phase, built_runs()

    def watched(name: str, breakable: bool = False) -> Any:
        step = runs[0].position.step if runs else 0
        if when == (name, step) and rank in who and not trainer.signals.asked:
            entered = phase(name, breakable)
            enter = type(entered).__enter__

            class Signalled:
                def __enter__(self) -> Any:
                    result = enter(entered)
                    os.kill(os.getpid(), signal.SIGINT if rank else signal.SIGTERM)
                    time.sleep(0.05)  # the handler runs here
                    return result

                def __exit__(self, *error: Any) -> Any:
                    return entered.__exit__(*error)

            return Signalled()
        return phase(name, breakable)

    trainer.signals.phase = watched  # type: ignore[method-assign]
    trainer.train()
    os._exit(EXIT_STOPPED if trainer.stopped else 0)


def run(
    options: dict[str, Any],
    log: Path,
    world: int = 2,
    when: tuple[str, int] | None = None,
    who: tuple[int, ...] = (),
) -> list[int]:
    """The exit codes; processes that wait for one that has gone are ended, as torchrun does it."""
    ctx = context()
    port = free_port()
    processes = [
        ctx.Process(target=_train_as_rank, args=(r, world, port, options, when, list(who), str(log)))
        for r in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode for p in processes):
            patience = time.monotonic() + (3.0 if when and when[0] != "loading" else 0.2)
            for process in processes:
                process.join(max(0.0, patience - time.monotonic()))
            for process in processes:
                if process.is_alive() and process.pid:
                    os.kill(process.pid, signal.SIGTERM)
                    process.join(20)
                    process.kill()
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode if process.exitcode is not None else -1 for process in processes]


@pytest.fixture(scope="module")
def whole(small_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six steps on two processes that nobody stops."""
    folder = tmp_path_factory.mktemp("stopping")
    options = {
        "model_path": str(small_model), "train_data_path": str(records), "val_data_path": str(records),
        "max_steps": 6, "eval_steps": 2, "eval_samples": 4,
        "save_steps": 4, "learning_rate": 1e-3, "device": "cpu", "num_workers": 0,
        "sample_prompts": ["Say two"], "sample_steps": 4,
        "output_dir": str(folder / "whole"),
    }  # fmt: skip
    assert run(options, folder / "log") == [0, 0], (folder / "log.0.log").read_text()[-3000:]
    return options


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_one_process_in_any_phase_saves_the_last_finished_step(
    phase: str, whole: dict[str, Any], tmp_path: Path
):
    """Rank 1 alone is told to stop. All end with the documented code, the last finished step is there and no
    other that is not due, and the stitched log is that of a run nobody stopped."""
    done, saved = PHASES[phase]
    options = whole | {"output_dir": str(tmp_path / "run")}
    codes = run(options, tmp_path / "log", when=(phase, done), who=(1,))
    printed = (tmp_path / "log.0.log").read_text() + (tmp_path / "log.1.log").read_text()
    assert EXIT_STOPPED in codes and codes[1] == EXIT_STOPPED, (codes, printed[-3000:])
    found = {path.name for path in (tmp_path / "run").glob("step_*")}
    if saved is None:
        assert not found
    else:
        assert codes == [EXIT_STOPPED] * 2, (codes, printed[-3000:])
        assert found == {f"step_{saved}"} | ({"step_4"} if saved > 4 else set())
        assert "goes on from here with --resume_from_checkpoint auto" in printed
    assert run(options | {"resume_from_checkpoint": "auto"}, tmp_path / "again") == [0, 0], (
        tmp_path / "again.0.log"
    ).read_text()[-3000:]
    assert timeless(tmp_path / "run") == timeless(whole["output_dir"])
    for name in ("samples/step_4/index.json",):
        assert (tmp_path / "run" / name).read_bytes() == (Path(whole["output_dir"]) / name).read_bytes()
    for path in sorted((Path(whole["output_dir"]) / "step_6").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "run" / "step_6" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_signals_to_all_processes_at_once(whole: dict[str, Any], tmp_path: Path):
    """Rank 0 gets SIGTERM and rank 1 SIGINT in the same step."""
    options = whole | {"output_dir": str(tmp_path / "run")}
    assert run(options, tmp_path / "log", when=("forward/backward", 2), who=(0, 1)) == [EXIT_STOPPED] * 2
    assert {path.name for path in (tmp_path / "run").glob("step_*")} == {"step_3"}


@pytest.mark.slow
def test_the_command_ends_with_75_and_goes_on(options: dict[str, Any], tmp_path: Path):
    """The command itself, two data workers, SIGTERM to the whole process group as SLURM and Kubernetes
    send it."""
    options |= {"max_steps": 400, "save_steps": 5, "num_workers": 2}
    (process,) = start_command(tmp_path / "log", ["train", *flags(options)])
    run_folder = Path(options["output_dir"])
    wait_for(run_folder / "step_5", process)
    os.killpg(process.pid, signal.SIGTERM)
    codes = end_of([process], 60)
    printed = printed_by(tmp_path / "log")
    assert codes == [EXIT_STOPPED], printed[-3000:]
    assert "Traceback" not in printed and "Stopped by a signal" in printed
    steps = sorted(int(path.name.removeprefix("step_")) for path in run_folder.glob("step_*"))
    assert steps[-1] == metrics(run_folder)[-1]["step"], "the last finished step is saved"
    assert f"unigen generate --model_path {run_folder / f'step_{steps[-1]}'} " in printed
    trainer = UnifiedTrainer(
        Config(**options | {"max_steps": steps[-1] + 2, "resume_from_checkpoint": "auto", "num_workers": 0})
    )
    trainer.train()
    assert [line["step"] for line in metrics(run_folder)] == list(range(1, steps[-1] + 3))


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_unsaved(options: dict[str, Any], tmp_path: Path):
    """The first comes while a step takes for ever; 1.2 s later the second one does not wait for it."""
    process = context().Process(target=_step_for_ever, args=(options, str(tmp_path / "in the step")))
    process.start()
    wait_for(tmp_path / "in the step", process)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    assert end_of([process], 10) == [128 + signal.SIGTERM]
    assert not list(Path(options["output_dir"]).glob("step_*"))


def _step_for_ever(options: dict[str, Any], mark: str) -> None:
    torch.set_num_threads(1)
    TrainingLoop.take_step = lambda *_: (Path(mark).touch(), time.sleep(600))  # type: ignore
    train(options)


def _hang_as_rank(rank: int, world: int, port: int, options: dict[str, Any], function: str, log: str) -> None:
    become_rank(rank, world, port, log)
    step, batches = TrainingLoop.take_step, TrainingLoop._batches

    def hang_at_the_third(loop: TrainingLoop, *given: Any) -> Any:
        if rank == 1 and loop.position.step == 2:
            time.sleep(600)
        return step(loop, *given)

    def hang_before_the_third(*given: Any) -> Iterator[Any]:
        for number, taken in enumerate(batches(*given)):
            if rank == 1 and number == 2:
                time.sleep(600)
            yield taken

    if function == "hang_before_the_third":
        TrainingLoop._batches = hang_before_the_third  # type: ignore[method-assign]
    else:
        TrainingLoop.take_step = hang_at_the_third  # type: ignore[method-assign]
    train(options)
    os._exit(0)


HANGS = {"forward/backward": "hang_at_the_third", "data": "hang_before_the_third"}


@pytest.mark.slow
def test_a_hung_rank_is_reported_with_rank_step_phase_and_stack(whole: dict[str, Any], tmp_path: Path):
    """Rank 1 sleeps in step 3, or waits for its rows (two runs side by side, as they only wait); rank 0 waits
    for it in a collective. Both end within the time-out and some seconds. Where rank 0 only waits, one of
    them names rank 1; inside of a step the stacks tell."""
    shown = ("sample_prompts", "sample_steps", "val_data_path", "eval_steps", "eval_samples")
    options = {name: value for name, value in whole.items() if name not in shown} | {"hang_timeout": 12.0}
    processes = {}
    for function in HANGS.values():
        given = options | {"output_dir": str(tmp_path / function)}
        processes[function] = hanging(given, function, str(tmp_path / f"{function}.log"))
    for process in (one for two in processes.values() for one in two):
        process.join(90)
        process.kill()
    for where, function in HANGS.items():
        printed = [(tmp_path / f"{function}.log.{rank}.log").read_text() for rank in range(2)]
        assert EXIT_HUNG in [process.exitcode for process in processes[function]], printed
        assert "rank 1 of 2" in printed[1] and f"step 2, phase {where}" in printed[1]
        assert function in printed[1]
        assert function in (tmp_path / function / "ranks" / "rank_1.stack.txt").read_text()
        if where == "data":
            (text,) = [text for text in printed if "unigen: rank" in text]
            assert "unigen: rank 1: step 2, phase data, hangs for" in text
            assert "unigen: rank 0: step 2, phase waiting for the others, waits for" in text


def hanging(options: dict[str, Any], function: str, log: str) -> list[Any]:
    """Two processes of a run, started; the second one of them hangs in ``function``."""
    port = free_port()
    processes = [
        context().Process(target=_hang_as_rank, args=(rank, 2, port, options, function, log))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes
