"""AdamW with moments of 8 bits: it learns as AdamW does, needs a quarter of the memory, and resumes to the
bit."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics, resumed_to_the_bit, step_of
from torch import Tensor, nn

from unigen.config import Config, UserError
from unigen.training import adam8bit
from unigen.training.adam8bit import build_adamw8bit, dequantise, moments, quantise, set_moments
from unigen.training.optim import build_optimizer
from unigen.training.trainer import UnifiedTrainer

pytest.importorskip("bitsandbytes", exc_type=ImportError)
CONFIG = Config(learning_rate=1e-2, weight_decay=0.1)


class Regression(nn.Module):
    """Two layers of some thousand weights; ``loss`` draws its data from the number of the step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.embed_tokens = nn.Embedding(80, 64)
        self.register_buffer("target", torch.randn(64, 64) / 8)

    def loss(self, step: int) -> Tensor:
        ids = torch.randint(80, (64,), generator=torch.Generator().manual_seed(step))
        x = torch.randn(80, 64, generator=torch.Generator().manual_seed(0))[ids] + 0.1 * self.embed_tokens(
            ids
        )
        return (self.down(torch.tanh(self.up(x))) - x.detach() @ self.target).square().mean()


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    return build_optimizer(
        model, dict(model.named_parameters()), Config(learning_rate=1e-2, weight_decay=0.01, optimizer=kind)
    )


def train(model: Regression, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tensors_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    return {
        key: value.clone() for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)
    }


def single(*shape: int, name: str = "weight") -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(3)))
    return p, build_adamw8bit([{"params": [(name, p)], "weight_decay": 0.1}], CONFIG)


# ---- it learns


def test_a_regression_ends_within_five_percent_of_adamw():
    final = {}
    for kind in ("adamw", "adamw8bit"):
        model = Regression()
        losses = train(model, optimizer_of(model, kind), range(80))
        final[kind] = sum(losses[-10:]) / 10
        assert final[kind] < losses[0] / 10
    assert final["adamw8bit"] == pytest.approx(final["adamw"], rel=0.05)


@pytest.mark.slow
def test_twenty_steps_of_the_tiny_model_lose_at_most_half_a_percent_against_adamw(
    options: dict[str, Any], tmp_path: Path
):
    """Measured: at most 4e-4 relative in any step."""
    losses = {}
    for kind in ("adamw", "adamw8bit"):
        run = {**options, "max_steps": 20, "output_dir": str(tmp_path / kind), "optimizer": kind}
        UnifiedTrainer(Config(**run)).train()
        losses[kind] = torch.tensor([line["loss"] for line in metrics(tmp_path / kind) if "loss" in line])
    assert len(losses["adamw"]) == 20 and losses["adamw"][-4:].mean() < 0.8 * losses["adamw"][:4].mean()
    assert not torch.equal(losses["adamw"], losses["adamw8bit"])
    assert torch.allclose(losses["adamw8bit"], losses["adamw"], rtol=5e-3)


def test_the_first_step_is_adamw_s_but_for_rounding():
    """Before anything has been stored in 8 bits, the two differ in nothing: betas, epsilon, bias correction,
    decoupled decay."""
    results = []
    for kind in ("adamw", "adamw8bit"):
        model = Regression()
        train(model, optimizer_of(model, kind), range(1))
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-5, atol=1e-6), name


# ---- what it stores


def test_the_state_has_two_bytes_and_the_scales_for_every_parameter():
    p, optimizer = single(256, 300)
    p.grad = torch.randn_like(p)
    optimizer.step()
    stored = tensors_of(optimizer, p)
    nbytes = sum(stored[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2"))
    assert nbytes == p.numel() * 2 + p.numel() // adam8bit.BLOCK * 8 and nbytes / p.numel() < 2.04
    assert {key for key in stored if not key.startswith("qmap")} == {"state1", "state2", "absmax1", "absmax2"}


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("mlp.up_proj.weight", (64, 64), torch.uint8),
        ("mlp.up_proj.weight", (63, 65), torch.float32),  # one element short of 4096
        ("language_model.model.embed_tokens.weight", (200, 64), torch.float32),
        ("vit.position_embedding.weight", (200, 64), torch.float32),
    ],
)
def test_embeddings_and_small_tensors_keep_32_bits(name: str, shape: tuple[int, int], dtype: torch.dtype):
    p, optimizer = single(*shape, name=name)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == optimizer.state[p]["state2"].dtype == dtype


def test_a_process_that_holds_no_row_of_a_parameter_trains_without_it():
    p, nothing = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.empty(0, 7))
    optimizer = build_adamw8bit([{"params": [("a", p), ("b", nothing)], "weight_decay": 0.0}], CONFIG)
    p.grad, nothing.grad = torch.ones_like(p), torch.empty_like(nothing)
    optimizer.step()
    assert (
        moments(optimizer, nothing) is None
        and moments(optimizer, p) is not None
        and float(p.detach().max()) < 1
    )
    set_moments(optimizer, nothing, 4.0, torch.empty(0), torch.empty(0))
    build_adamw8bit([{"params": [("b", nothing)], "weight_decay": 0.0}], CONFIG).step()


# ---- out and in


@pytest.mark.parametrize("numel", [4096, 8191, 70_001])
def test_set_of_get_is_the_same_state_to_the_bit(numel: int, monkeypatch: pytest.MonkeyPatch):
    """Rows of gradients of all sizes, zeros among them: codes, scales and values are equal to the bit after
    every step. Where a scale is zero no code has a value, so none is compared."""
    monkeypatch.setattr(adam8bit, "CHUNK", 16_384)
    generator = torch.Generator().manual_seed(numel)
    p, optimizer = single(numel)
    negative = 0
    for _ in range(12):
        sizes = (
            10 ** (4 * torch.randn(-(-numel // 100), 1, generator=generator)).repeat(1, 100).view(-1)[:numel]
        )
        p.grad = torch.randn(numel, generator=generator) * sizes
        p.grad[300:900] = 0
        optimizer.step()
        before, got = tensors_of(optimizer, p), moments(optimizer, p)
        assert (
            got is not None
            and got[0] == optimizer.state[p]["step"]
            and got[1].shape == got[2].shape == (numel,)
        )
        set_moments(optimizer, p, *got)
        after, again = tensors_of(optimizer, p), moments(optimizer, p)
        assert before.keys() == after.keys() and again is not None
        for number in (1, 2):
            assert torch.equal(before[f"absmax{number}"], after[f"absmax{number}"])
            scaled = before[f"absmax{number}"].repeat_interleave(adam8bit.BLOCK)[:numel] > 0
            assert torch.equal(before[f"state{number}"][scaled], after[f"state{number}"][scaled])
            assert torch.equal(got[number], again[number])
        negative += int((before["state1"] == 0).sum())
    assert negative > 12  # blocks led by a negative element, whose scale has to be found


def test_the_values_are_those_the_library_computes_with():
    from bitsandbytes.functional import dequantize_blockwise

    p, optimizer = single(70_001)
    p.grad = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    state, got = optimizer.state[p], moments(optimizer, p)
    for number in (1, 2):
        code, scales = state[f"qmap{number}"], state[f"absmax{number}"]
        theirs = dequantize_blockwise(
            state[f"state{number}"], absmax=scales, code=code, blocksize=adam8bit.BLOCK
        )
        assert got is not None and torch.equal(got[number], theirs)


def test_moments_of_another_origin_are_rounded_within_the_table_s_steps():
    """Moments of 32 bits, or cut into other blocks: no error above 1.2 % of the block's largest."""
    p, optimizer = single(10_000)
    first = torch.randn(10_000, generator=torch.Generator().manual_seed(5))
    set_moments(optimizer, p, 7.0, first, first.square())
    got = moments(optimizer, p)
    assert got is not None and got[0] == 7
    for found, wanted in ((got[1], first), (got[2], first.square())):
        largest = torch.cat([block.abs().max().expand(len(block)) for block in wanted.split(adam8bit.BLOCK)])
        assert float(((found - wanted).abs() / largest).max()) < 0.012
        assert not torch.equal(found, wanted)


def test_a_parameter_without_updates_has_no_moments_and_zero_steps_forget_them():
    p, optimizer = single(5000)
    assert moments(optimizer, p) is None
    set_moments(optimizer, p, 3.0, torch.ones(5000), torch.ones(5000))
    assert moments(optimizer, p) is not None
    set_moments(optimizer, p, 0.0, torch.ones(5000), torch.ones(5000))
    assert moments(optimizer, p) is None


def test_a_block_of_one_negative_element_finds_its_scale_for_every_float():
    """A scale whose largest share is the most negative code is found again from the values alone, whatever
    its last bits."""
    from bitsandbytes.functional import create_dynamic_map

    table = create_dynamic_map(signed=True)
    scales = torch.exp(20 * torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    # 255 is the share 1
    codes = torch.randint(0, 255, (4000, adam8bit.BLOCK), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    codes[:, 17] = 0
    values = dequantise(codes.view(-1), scales, table)
    found, again = quantise(values, table)
    assert torch.equal(found, codes.view(-1)) and torch.equal(dequantise(found, again, table), values)


# ---- runs


def test_a_resumed_regression_equals_an_uninterrupted_one_to_the_bit():
    whole = Regression()
    losses = train(whole, optimizer_of(whole, "adamw8bit"), range(12))
    begun = Regression()
    optimizer = optimizer_of(begun, "adamw8bit")
    assert train(begun, optimizer, range(5)) == losses[:5]
    resumed = Regression()
    resumed.load_state_dict(begun.state_dict())
    after = optimizer_of(resumed, "adamw8bit")
    for old, new in zip(begun.parameters(), resumed.parameters(), strict=True):
        saved = moments(optimizer, old)
        assert saved is not None
        set_moments(after, new, *saved)
    assert train(resumed, after, range(5, 12)) == losses[5:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.slow
def test_a_resumed_run_of_the_tiny_model_equals_an_uninterrupted_one_to_the_bit(
    options: dict[str, Any], tmp_path: Path
):
    last = resumed_to_the_bit(options | {"optimizer": "adamw8bit"}, tmp_path)
    assert any("exp_avg_sq" in name for name in load_file(last / "optimizer.safetensors"))


def test_a_skipped_step_with_nan_gradients_leaves_weights_and_state_to_the_bit(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    from tiny import batch_of, built

    trainer = built(options, optimizer="adamw8bit")
    rows = [batch_of(trainer, [0])]
    step_of(trainer, rows, 1e-3)
    held = trainer.engine.optimizer.param_groups[0]["params"]
    before = [(p.detach().clone(), tensors_of(trainer.engine.optimizer, p)) for p in held]
    monkeypatch.setattr(trainer.engine.scale, "scale", math.nan)
    assert step_of(trainer, rows, 1e-3).refused
    for p, (value, state) in zip(held, before, strict=True):
        assert torch.equal(p, value)
        assert all(
            torch.equal(stored, state[key]) for key, stored in tensors_of(trainer.engine.optimizer, p).items()
        )


def test_a_missing_library_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch):
    genuine = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return genuine(name, *args, **kwargs)

    adam8bit._adamw8bit.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"adamw8bit needs bitsandbytes.*pip install"):
        build_adamw8bit([{"params": [("a", nn.Parameter(torch.ones(4)))]}], CONFIG)


@pytest.mark.gpu
def test_moments_of_a_gpu_come_in_host_memory():
    """In float32 those of all parameters would not fit beside the run."""
    p = torch.nn.Parameter(torch.randn(8192, device="cuda"))
    optimizer = build_adamw8bit([{"params": [p], "weight_decay": 0.0}], Config())
    p.grad = torch.randn_like(p)
    optimizer.step()
    found = moments(optimizer, p)
    assert found is not None and all(
        moment.device.type == "cpu" and moment.dtype == torch.float32 for moment in found[1:]
    )
