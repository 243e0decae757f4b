"""An error from outside costs no finished step: it is saved, and one line says what happened and the fix."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from tiny import built, train, train_on

from unigen.config import UserError
from unigen.messages import speaking
from unigen.runs.checkpoint import verify_checkpoint
from unigen.runs.said import leave, listen
from unigen.training.failures import explain
from unigen.training.guards import TrainingStopped
from unigen.training.loop import TrainingLoop
from unigen.training.trainer import told_of_lost_processes

CPU = torch.device("cpu")


def break_data(loop: TrainingLoop, error: Exception, after: int) -> None:
    """The data ends with ``error`` after so many steps."""
    batches = loop._batches

    def broken(*given: Any) -> Iterator[Any]:
        for n, step in enumerate(batches(*given)):
            if n == after:
                raise error
            yield step

    loop._batches = broken  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(5, "Input/output error"), TrainingStopped),
        (MemoryError(), TrainingStopped),
        (RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "), TrainingStopped),
        (ZeroDivisionError("a bug"), ZeroDivisionError),
    ],
)
def test_an_error_of_the_data_saves_the_last_finished_step(
    options: dict[str, Any], error: Exception, raised: type[Exception]
):
    loop = built(options, max_steps=4)
    break_data(loop, error, after=2)
    with pytest.raises(raised):
        train_on(loop)
    loop.run.close()
    run = Path(options["output_dir"])
    assert [path.name for path in run.glob("step_*")] == ["step_2"]
    verify_checkpoint(run / "step_2")
    train(options, max_steps=3, resume_from_checkpoint="auto")
    assert (run / "step_3").is_dir()


@pytest.mark.slow
def test_an_error_before_or_in_the_update_of_the_weights(options: dict[str, Any], tmp_path: Path):
    for place, saved in (("forward", ["step_1"]), ("step", [])):
        loop = built(options, output_dir=str(tmp_path / place))
        work, calls = getattr(loop.engine, place), []

        def broken(*given: Any, work: Any = work, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work(*given)

        setattr(loop.engine, place, broken)
        with pytest.raises(TrainingStopped, match="Fix: --gradient_checkpointing"):
            train_on(loop)
        loop.run.close()
        assert [path.name for path in (tmp_path / place).glob("step_*")] == saved


def test_what_the_machine_does_has_one_line_and_a_bug_keeps_its_traceback():
    for error in (
        OSError("x"),
        MemoryError(),
        torch.OutOfMemoryError("a\nb"),
        RuntimeError("DataLoader worker"),
    ):
        told = explain(error, CPU)
        assert isinstance(told, TrainingStopped) and "Fix:" in str(told) and "\n" not in str(told)
    passed_on = "Caught BadData in worker 0.\nOriginal Traceback:\nunigen.x.BadData: a.json:3: bad. Fix: it"
    assert str(explain(TrainingStopped(passed_on), CPU)) == "a.json:3: bad. Fix: it"
    for error in (KeyError("x"), RuntimeError("shapes"), TrainingStopped("as it is")):
        assert explain(error, CPU) is None


@pytest.mark.slow
def test_a_loader_worker_that_is_killed(options: dict[str, Any]):
    loop = built(options, max_steps=50, num_workers=2)
    step, children = loop.take_step, Path(f"/proc/self/task/{os.getpid()}/children")

    def killing(*given: Any) -> Any:
        if loop.position.step == 2:
            os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        return step(*given)

    loop.take_step = killing  # type: ignore[method-assign]
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(TrainingStopped, match=r"worker .*ended from outside.* Fix: fewer workers"):
        train_on(loop)
    loop.run.close()
    assert signal.getsignal(signal.SIGCHLD) == handler
    (saved,) = Path(options["output_dir"]).glob("step_*")
    verify_checkpoint(saved)


def _fails_on_one(rank: int, world: int, port: int, options: dict[str, Any], log: str) -> None:
    become_rank(rank, world, port, log)
    loop = built(options)
    if rank == 1:
        break_data(loop, OSError(5, "Input/output error"), after=2)
    with pytest.raises(TrainingStopped) as caught:
        train_on(loop)
    assert "Input/output error" in str(caught.value) and (("rank 1: " in str(caught.value)) == (rank == 0))
    os._exit(0)


@pytest.mark.slow
def test_data_that_fails_on_one_process_ends_all_and_the_step_is_saved(
    options: dict[str, Any], tmp_path: Path
):
    run_ranks(_fails_on_one, 2, options | {"max_steps": 5}, str(tmp_path / "log"))
    (saved,) = Path(options["output_dir"]).glob("step_*")
    assert saved.name == "step_2"
    verify_checkpoint(saved)


def test_the_error_that_ends_a_run_is_in_its_language_in_train_log(tmp_path: Path):
    run = SimpleNamespace(engine=SimpleNamespace(world=1, main=True), said=listen("info", main=True))
    run.said.open(tmp_path / "train.log")
    try:
        with speaking("zh"), pytest.raises(UserError), told_of_lost_processes(run):  # type: ignore[arg-type]
            raise UserError("device is cpu:1, which is no device here. Fix: correct the path of the data")
    finally:
        leave(run.said)
    written = (tmp_path / "train.log").read_text("utf-8")
    assert "错误：" in written and "error: " not in written and "。解决办法：" in written
