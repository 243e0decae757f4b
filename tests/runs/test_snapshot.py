"""Copies of a GPU's tensors beside the training: no buffer is read before its copy is there, nor filled
before it is emptied."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from saves import ALONE, contents, entry, read_group, together
from tiny import built, train, train_on
from torch import Tensor

from unigen.runs import saver as saving
from unigen.runs import snapshot
from unigen.runs.checkpoint import CheckpointError, verify_checkpoint
from unigen.runs.saver import Saver
from unigen.runs.snapshot import BUFFER, GpuLane, copy_out
from unigen.training.ema import EMA


class LateLane:
    """A device that copies as late as it may: when it is asked whether the copy is there."""

    def __init__(self, device: Any = None, go: threading.Event | None = None):
        self.buffers = [torch.zeros(snapshot.BUFFER, dtype=torch.uint8) for _ in range(2)]
        self.waiting: dict[int, Tensor] = {}
        self.go, self.begun, self.inside, self.most = go, 0, 0, 0

    def begin(self) -> None:
        self.begun += 1

    @contextlib.contextmanager
    def entered(self):
        self.inside += 1
        yield
        self.inside -= 1

    def start(self, slot: int, source: Tensor) -> None:
        assert self.inside and slot not in self.waiting, "this buffer is not emptied yet"
        self.waiting[slot] = source
        self.buffers[slot].fill_(255)  # whoever reads it now reads nonsense
        self.most = max(self.most, len(self.waiting))

    def finish(self, slot: int) -> None:
        assert self.go is None or self.go.wait(20)
        source = self.waiting.pop(slot)
        self.buffers[slot][: len(source)] = source


def kinds(small: int) -> list[Tensor]:
    """Tensors of every kind, shorter and longer than a buffer of ``small`` bytes."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(5, 7, generator=g),
        torch.randn(3 * small, generator=g).bfloat16(),
        torch.randn(small // 4, generator=g),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.randn(6, 4, generator=g).t(),
        torch.randn(6, 4, generator=g)[::2, 1],
        torch.ones(1).expand(9),
        torch.tensor([True, False, True]),
        torch.arange(100, dtype=torch.uint8),
        torch.tensor([2**62, -1]),
        torch.randn(4, requires_grad=True),
    ]


def test_every_tensor_comes_over_bit_for_bit_with_two_buffers_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot, "BUFFER", 64)
    lane, tensors = LateLane(), kinds(64)
    copies = copy_out(lane, tensors)
    assert lane.most == 2 and not lane.waiting and not lane.inside
    for found, wanted in zip(copies, tensors, strict=True):
        assert (found.dtype, found.shape, found.is_contiguous()) == (wanted.dtype, wanted.shape, True)
        assert torch.equal(found, wanted) and not found.requires_grad
        assert not found.numel() or found.data_ptr() != wanted.data_ptr()


# ---- the saver


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateLane:
    """Float32 tensors lie on a device whose copies wait for ``go``."""
    lane = LateLane(go=threading.Event())
    monkeypatch.setattr(saving, "copied_later", lambda tensor: tensor.dtype == torch.float32)
    monkeypatch.setattr(saving, "GpuLane", lambda device: lane)
    return lane


@pytest.mark.slow
def test_the_trainer_waits_before_it_changes_what_is_not_copied_yet(tmp_path: Path, late: LateLane):
    """``save`` returns while nothing is copied; ``settle`` does not before everything is; what is written is
    of the moment of the call."""
    weights, count = torch.ones(100), torch.tensor([7])
    ticks: list[float] = []
    saver = Saver(tmp_path, 0, ALONE, background=True, tick=lambda: ticks.append(time.monotonic()))
    saver.save(contents(1, entry("ema", "w", weights), entry("ema", "n", count)))
    count.fill_(8)  # in host memory: copied already
    settled = threading.Event()

    def change() -> None:
        saver.settle()
        settled.set()
        weights.fill_(9)

    trainer = threading.Thread(target=change)
    trainer.start()
    assert not settled.wait(1.3) and ticks, "the heartbeat hears of the waiting"
    assert late.go is not None
    late.go.set()
    trainer.join()
    saver.wait()
    verify_checkpoint(tmp_path / "step_1")
    found = read_group(tmp_path / "step_1", "ema")
    assert torch.equal(found["w"], torch.ones(100)) and found["n"].tolist() == [7]
    assert late.begun == 1
    saver.settle()  # nothing is saved: at once


def test_the_buffers_serve_every_save(tmp_path: Path, late: LateLane, monkeypatch: pytest.MonkeyPatch):
    assert late.go is not None
    late.go.set()
    saver, made = Saver(tmp_path, 0, ALONE, background=True), []
    monkeypatch.setattr(saving, "GpuLane", lambda device: made.append(device) or late)
    for step in (1, 2, 3):
        saver.save(contents(step))
        saver.wait()
    assert len(made) == 1 and late.begun == 3
    assert [read_group(tmp_path / f"step_{n}", "optimizer")["exp_avg.w"].tolist() for n in (1, 3)] == [
        [1.0] * 3,
        [3.0] * 3,
    ]


def test_a_copy_that_fails_on_one_process_is_an_error_on_all_and_holds_nobody(
    tmp_path: Path, late: LateLane, monkeypatch
):
    assert late.go is not None
    late.go.set()
    lanes = [LateLane(), LateLane()]

    def fail(slot: int) -> None:
        raise RuntimeError("the GPU is lost")

    lanes[1].finish = fail  # type: ignore[method-assign]

    def work(rank: int, channel: Any) -> None:
        saver = Saver(tmp_path, rank, channel, background=True)
        saver._lane = lanes[rank]
        saver.save(contents(1, entry("ema", f"w{rank}", torch.ones(4))))
        saver.settle()
        saver.wait()

    errors = together(2, work)
    assert all(
        isinstance(error, CheckpointError) and "process 1: RuntimeError: the GPU is lost" in str(error)
        for error in errors
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("step", ".step"))]


@pytest.mark.slow
def test_a_run_whose_copies_are_late_saves_the_same_bytes(
    options: dict[str, Any], late: LateLane, monkeypatch, tmp_path: Path
):
    """Each copy is held back until the trainer waits for it: the next step must, and the average before it is
    swapped in for samples, which follow the save of the best weights."""
    assert late.go is not None
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say", "kind": "answer", "max_new_tokens": 2}\n')
    given = options | {
        "save_steps": 1,
        "ema": 0.5,
        "val_data_path": options["train_data_path"],
        "eval_steps": 1,
    }
    given |= {"sample_prompts": str(prompts), "sample_steps": 1}
    late.go.set()
    with monkeypatch.context() as plain:
        plain.setattr(saving, "copied_later", lambda tensor: False)
        train(given)
    late.go.clear()
    waited, settle = [], Saver.settle

    def let_go(saver: Saver) -> None:
        waited.append(not saver._settled.is_set())
        late.go.set()  # type: ignore[union-attr]
        settle(saver)
        late.go.clear()  # type: ignore[union-attr]

    wait = Saver.wait

    def wait_for_all(saver: Saver) -> None:
        late.go.set()  # type: ignore[union-attr]
        wait(saver)
        late.go.clear()  # type: ignore[union-attr]

    monkeypatch.setattr(Saver, "settle", let_go)
    monkeypatch.setattr(Saver, "wait", wait_for_all)
    trainer = built(given, output_dir=str(tmp_path / "late"))
    swaps, swap = [], EMA._swap
    monkeypatch.setattr(
        EMA, "_swap", lambda ema: swaps.append(trainer.run.saver._settled.is_set()) or swap(ema)
    )
    train_on(trainer)
    assert any(waited), "the trainer never had to wait: the test shows nothing"
    assert swaps and all(swaps), "weights that were not copied yet changed places with the average"
    for step in ("step_1", "step_2", "best"):
        for file in sorted((Path(options["output_dir"]) / step).glob("*.safetensors")):
            assert (tmp_path / "late" / step / file.name).read_bytes() == file.read_bytes(), (step, file.name)


# ---- on a GPU


@pytest.mark.gpu
def test_a_gpu_s_tensors_are_of_the_moment_of_the_call_and_the_pinned_memory_is_bounded(tmp_path: Path):
    """The save is called behind a second of work that has not run yet; the next step changes everything as
    soon as it may."""
    big = torch.zeros(5 * BUFFER // 8, device="cuda")  # 2.5 buffers
    saver = Saver(tmp_path, 0, ALONE, background=True)
    product = torch.randn(4096, 4096, device="cuda")
    for step in (1, 2):
        for _ in range(50):
            product = product @ product / 64
        big.fill_(float(step))
        saver.save(contents(step, entry("a", "big", big), entry("a", "strided", big[::2][:1000])))
        saver.settle()
        big.fill_(-1.0)
        saver.wait()
        found = read_group(tmp_path / f"step_{step}", "a")
        assert bool((found["big"] == step).all()) and bool((found["strided"] == step).all())
    lane = saver._lane
    assert (
        isinstance(lane, GpuLane)
        and sum(b.numel() for b in lane.buffers) == 2 * BUFFER
        and all(b.is_pinned() for b in lane.buffers)
    )
