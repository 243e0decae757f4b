"""Weights in bfloat16: rounding is unbiased and follows from counting, runs learn, and go on to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from tiny import batch_of, built, resumed_to_the_bit, step_of

from unigen.config import Config, ConfigError
from unigen.model.parts import is_low
from unigen.model.storage import scan_safetensors
from unigen.model.weights import load_bagel
from unigen.sequence.draw import _scramble
from unigen.training.adam8bit import build_adamw8bit
from unigen.training.optim import build_adamw
from unigen.training.rounding import random_bits, rounded

LOW = {"weights": "bf16"}


def test_rounding_is_unbiased_and_gives_a_neighbour():
    """Exactly: the mean over all random bits is the value itself."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    for value in (1.0, 0.1, -3.14159, 2.0 - 2**-20, 1e-20, -7e5, 0.0, 1.0 + 2**-9):
        single = torch.tensor(value)
        found = rounded(single.expand(len(bits)).contiguous(), bits)
        low, high = found.float().min(), found.float().max()
        assert float(found.double().mean()) == single.double().item()
        assert low <= single <= high and len(found.unique()) <= 2
        nearest = single.to(torch.bfloat16)
        assert nearest in (low, high)


def test_random_bits_are_four_of_each_word_and_even():
    bits = random_bits(123, 4001)
    words = [_scramble(123 + i * 0x9E3779B97F4A7C15 & 2**64 - 1) for i in range(1, 1002)]
    assert bits.tolist() == [w >> 16 * part & 0xFFFF for w in words for part in range(4)][:4001]
    many = random_bits(7, 1 << 20).double()
    assert abs(float(many.mean()) / 32767.5 - 1) < 0.002 and int(many.max()) > 65500
    counts = torch.bincount((many // 4096).long(), minlength=16).double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 40  # chi squared of 15
    assert not torch.equal(random_bits(7, 64), random_bits(8, 64))


def groups(*parameters: torch.nn.Parameter) -> list[dict[str, Any]]:
    named = [(f"p{i}.weight", p) for i, p in enumerate(parameters)]
    return [{"params": named, "weight_decay": 0.1}]


@pytest.mark.parametrize("build", [build_adamw, build_adamw8bit])
def test_small_updates_add_up_as_in_float32(build: Any):
    """Each is a fiftieth of bfloat16's last place, which rounding to the nearest would undo."""
    config = Config(learning_rate=1e-4, weight_decay=0.1, **LOW)
    start = torch.linspace(1.0, 1.9, 8192)
    wide, low = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.to(torch.bfloat16))
    start = low.detach().float()
    wide.data.copy_(start)
    optimizer, exact = build(groups(low, wide), config), torch.nn.Parameter(start.clone())
    plain = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(60):
        for p in (wide, low, exact):
            p.grad = torch.ones_like(p)
        optimizer.step()
        plain.step()
    moved, wanted = (low.float() - start).mean().item(), (exact - start).mean().item()
    assert wanted < -0.005 and moved == pytest.approx(wanted, rel=0.03)
    torch.testing.assert_close(wide, exact, rtol=1e-6 if build is build_adamw else 1e-4, atol=0)
    assert low.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_matrices_are_held_in_bfloat16_and_the_losses_are_those_of_their_values(
    precision: str, options: dict[str, Any], tmp_path: Path
):
    loop = built(options, LOW, precision=precision)
    model, pack = loop.run.model, batch_of(loop, list(range(7))).pack
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if is_low(name) else torch.float32), name
    wide = load_bagel(options["model_path"], dtype=torch.float32).train()
    with torch.no_grad():
        for name, p in wide.named_parameters():
            p.copy_(model.get_parameter(name))
        found = loop.engine.forward(pack)
        loop.engine.wrapped = wide
        wanted = loop.engine.forward(pack)
    assert torch.equal(found.ce, wanted.ce) and torch.equal(found.mse, wanted.mse)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resume_goes_on_to_the_bit(optimizer: str, options: dict[str, Any], tmp_path: Path):
    options |= LOW | {"ema": 0.5, "optimizer": optimizer}
    last = resumed_to_the_bit(options, tmp_path)
    saved = {name: scan_safetensors(last / f"{name}.safetensors") for name in ("ema", "model")}
    low = [name for name in saved["model"] if is_low(name)]
    assert low and all(saved["model"][n].dtype == torch.bfloat16 for n in low)
    assert all(saved["ema"][n].dtype == torch.float32 for n in low)
    size = sum(p.stat().st_size for p in last.glob("*.safetensors"))
    loop = built(options, resume_from_checkpoint=str(last), max_steps=5)
    assert loop.run.checkpoint_bytes() == pytest.approx(size, rel=0.02)  # the files have headers, too
    loop.run.close()
    load_bagel(last)


def test_the_average_is_float32_and_the_weights_come_back(options: dict[str, Any]):
    loop = built(options, LOW, ema=0.9, learning_rate=1e-2)
    step_of(loop, [batch_of(loop, [0, 1, 3])], 1e-2)
    ema, model = loop.run.ema, loop.run.model
    assert ema is not None
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    averages = {n: v.clone() for n, v in ema.values.items()}
    with ema.swapped():
        assert any(not torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(v, averages[n]) and v.dtype == torch.float32 for n, v in ema.values.items())
    name = next(n for n in averages if is_low(n))
    assert not torch.equal(averages[name], averages[name].to(torch.bfloat16).float())


def _as_rank(rank: int, world: int, port: int, options: dict[str, Any], folder: str) -> None:
    become_rank(rank, world, port)
    loop = built(options, engine="ddp", output_dir=f"{folder}/ddp")
    for rows in ([0, 1], [3, 2], [4, 6]):
        step_of(loop, [batch_of(loop, [rows[rank]])], 2e-3)
    torch.save({n: p.detach() for n, p in loop.run.model.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_hold_the_same_weights_near_those_of_one(options: dict[str, Any], tmp_path: Path):
    options |= LOW
    run_ranks(_as_rank, 2, options, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    loop = built(options, output_dir=str(tmp_path / "one"))
    for rows in ([0, 1], [3, 2], [4, 6]):
        step_of(loop, [batch_of(loop, [row]) for row in rows], 2e-3)
    for name, p in loop.run.model.named_parameters():
        # gradients are added in bfloat16, and Adam makes steps of whatever sign they have
        assert float((p.float() - first[name].float()).norm()) <= 0.03 * float(p.float().norm()) + 0.05, name


BAD = {
    "adapters": ({"lora_rank": 4}, "leave it out"),
    "shards": ({"engine": "fsdp2"}, "use ddp"),
    "zero": ({"engine": "deepspeed"}, "use ddp"),
    "fp16": ({"precision": "fp16"}, "--precision bf16"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case: str, options: dict[str, Any]):
    with pytest.raises(ConfigError) as caught:
        Config(**options | LOW | BAD[case][0]).resolve()
    assert str(caught.value).startswith("weights") and BAD[case][1] in str(caught.value)
