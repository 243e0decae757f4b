"""PyTorch's switches for the whole process: who sets them, and where cuDNN attention is on."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unigen.config import Config
from unigen.inference.inferencer import InterleaveInferencer
from unigen.model import backends
from unigen.model.backends import autocast, prefer_flash, repeated_shapes, use_expandable_segments, use_tf32
from unigen.model.weights import load_bagel
from unigen.training.engine import Engine


def cudnn() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    on, precision = cudnn(), torch.get_float32_matmul_precision()
    torch.backends.cuda.enable_cudnn_sdp(True)  # PyTorch's default
    yield
    torch.backends.cuda.enable_cudnn_sdp(on)
    torch.set_float32_matmul_precision(precision)


# ---- cuDNN attention


def test_an_engine_and_an_inferencer_turn_cudnn_attention_off(golden: Path):
    Engine(Config(device="cpu"))
    assert not cudnn()
    torch.backends.cuda.enable_cudnn_sdp(True)
    InterleaveInferencer(load_bagel(golden / "model"))
    assert not cudnn()


def test_it_is_on_where_shapes_repeat_and_as_before_after_it():
    for before in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(before)
        with repeated_shapes(), repeated_shapes():
            assert cudnn()
        assert cudnn() is before
        with pytest.raises(ZeroDivisionError), repeated_shapes():
            raise ZeroDivisionError
        assert cudnn() is before


def test_of_several_threads_the_last_to_leave_restores_it():
    """The first comes when it is off, leaves while the second is inside, and an inferencer is made
    meanwhile."""
    prefer_flash()
    entered, leave = threading.Event(), threading.Event()

    def draw() -> None:
        with repeated_shapes():
            entered.set()
            assert leave.wait(20)

    thread = threading.Thread(target=draw)
    with repeated_shapes():
        thread.start()
        assert entered.wait(20)
    assert cudnn(), "the second is still inside"
    prefer_flash()
    assert cudnn(), "and is not disturbed"
    leave.set()
    thread.join()
    assert not cudnn()


def test_a_picture_is_drawn_with_it_and_a_text_is_written_without_it(golden: Path):
    inferencer = InterleaveInferencer(load_bagel(golden / "model"))
    seen: list[tuple[int, bool]] = []
    inferencer.model.language_model.model.register_forward_pre_hook(
        lambda module, args: seen.append((int(args[1].noised.sum()), cudnn()))
    )
    inferencer.interleave_inference(
        ["A red circle"], think=True, max_think_token_n=3, image_shapes=(32, 32), num_timesteps=3
    )
    assert {on for noised, on in seen if noised} == {True} and {on for noised, on in seen if not noised} == {
        False
    }
    assert not cudnn()


# ---- TF32, memory, autocast


def test_tf32_is_asked_for_unless_somebody_chose_before():
    torch.set_float32_matmul_precision("highest")
    use_tf32()
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("medium")
    use_tf32()
    assert torch.get_float32_matmul_precision() == "medium"


def test_a_cpu_run_leaves_float32_exact():
    torch.set_float32_matmul_precision("highest")
    Engine(Config(device="cpu"))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("given", "initialised", "expected"),
    [
        ({}, False, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({}, True, {}),
        *(
            ({name: "max_split_size_mb:64"}, False, {name: "max_split_size_mb:64"})
            for name in backends.ALLOCATOR
        ),
    ],
)
def test_segments_grow_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], initialised: bool, expected: dict[str, str]
):
    for name in backends.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(backends.sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "hip", None)
    use_expandable_segments()
    assert {name: os.environ[name] for name in backends.ALLOCATOR if name in os.environ} == expected
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


@pytest.mark.gpu
def test_this_pytorch_grows_its_segments(tmp_path: Path):
    """In a process of its own: the variable is set after PyTorch is imported, and the first allocation obeys
    it."""
    import subprocess
    import sys

    program = (
        "import torch\nfrom unigen.model.backends import use_expandable_segments\nuse_expandable_segments()\n"
        "kept = torch.ones(1 << 20, device='cuda')\n"
        "assert any(segment['is_expandable'] for segment in torch.cuda.memory_snapshot())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in backends.ALLOCATOR}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_autocast_lowers_products_and_keeps_copies_only_where_asked():
    x, device = torch.ones(2, 2), torch.device("cpu")
    for cache in (True, False):
        with autocast(device, torch.bfloat16, cache=cache):
            assert (x @ x).dtype == torch.bfloat16 and torch.is_autocast_cache_enabled() is cache
        with autocast(device, torch.float32, cache=cache):
            assert (x @ x).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
