"""Processes: what two of them say to each other, over gloo and for real."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from unigen.config import Config, ConfigError, UserError
from unigen.training.engine import Engine


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank: int, world: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def test_one_process_needs_no_group():
    with Engine(Config(device="cpu")) as engine:
        assert (engine.rank, engine.world, engine.main) == (0, 1, True)
        assert engine.sum([1, 2.5]) == [1.0, 2.5]
        assert engine.gather("零 one") == ["零 one"]
        model = nn.Linear(2, 2)
        assert engine.wrap(model) is model
        engine.barrier()
        assert not torch.distributed.is_initialized()
        with pytest.raises(ZeroDivisionError):
            engine.on_main(lambda: 1 / 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_told_with_its_cure():
    with pytest.raises(ConfigError, match=r"no GPU is visible.*--device cpu"):
        Engine(Config(device="cuda"))


@pytest.mark.parametrize(("option", "dtype"), [({}, torch.float32), ({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16)])
def test_what_a_matrix_product_is_computed_in(option: dict[str, bool], dtype: torch.dtype):
    engine = Engine(Config(device="cpu", **option))
    with engine.autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == dtype


def _talk(rank: int, world: int, port: int, folder: str) -> None:
    as_rank(rank, world, port)
    said: dict[str, object] = {}
    with Engine(Config(device="cpu")) as engine:
        said["sum"] = engine.sum([rank + 1, 0.1 * rank, 2.0**40 + rank])
        said["gather"] = engine.gather("" if rank == 0 else "ein längerer Text 图" * rank)
        said["empty"] = engine.gather("")
        ran: list[int] = []
        engine.on_main(lambda: ran.append(rank))
        said["ran"] = ran

        def fail() -> None:
            raise OSError("disk full")

        try:
            engine.on_main(fail)
        except (OSError, UserError) as error:
            said["error"] = f"{type(error).__name__}: {error}"
        model = nn.Linear(2, 1, bias=False)
        nn.init.constant_(model.weight, float(rank + 1))  # rank 0's weights go to everyone
        wrapped = engine.wrap(model)
        for micro in range(2):
            with engine.accumulate(wrapped, last=micro == 1):
                wrapped(torch.tensor([[rank + 1.0, micro]])).sum().backward()
            if micro == 0:
                said["held back"] = model.weight.grad.tolist()
        said["weight"], said["grad"] = model.weight.tolist(), model.weight.grad.tolist()
    said["ended"] = not torch.distributed.is_initialized()
    torch.save(said, Path(folder) / f"{rank}.pt")


def test_two_processes(tmp_path: Path):
    torch.multiprocessing.spawn(_talk, (2, free_port(), str(tmp_path)), nprocs=2)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for said in (zero, one):
        assert said["sum"] == [3.0, 0.1, 2.0**41 + 1]  # exact: sums travel in double precision
        assert said["gather"] == ["", "ein längerer Text 图"] and said["empty"] == ["", ""]
        assert said["weight"] == [[1.0, 1.0]]
        assert said["grad"] == [[3.0, 1.0]]  # the mean over processes of the sums over their rows: ((1 + 1) + (2 + 2)) / 2
        assert said["ended"]
    assert (zero["held back"], one["held back"]) == ([[1.0, 0.0]], [[2.0, 0.0]])
    assert (zero["ran"], one["ran"]) == ([0], [])
    assert zero["error"] == "OSError: disk full"
    assert one["error"] == "UserError: rank 0 stopped: OSError: disk full"
