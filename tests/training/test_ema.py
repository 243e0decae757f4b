import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from unigen.training.checkpoint import CheckpointError
from unigen.training.ema import EMA


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    result = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    result[1].requires_grad_(False)
    return result.to(dtype)


def move(net: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_its_definition(decay: float, dtype: torch.dtype):
    net = model(dtype)
    ema = EMA(net, decay)
    expected = {n: p.detach().double() for n, p in net.named_parameters() if p.requires_grad}
    for step in range(20):
        move(net, step)
        ema.update()
        for name, p in net.named_parameters():
            if p.requires_grad:
                expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    assert ema.tensors().keys() == expected.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, value in ema.tensors().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_starts_as_a_copy_and_never_touches_the_model():
    net = model()
    before = {n: p.clone() for n, p in net.state_dict().items()}
    ema = EMA(net, 0.5)
    move(net, 1)
    assert all(torch.equal(v, before[n]) for n, v in ema.tensors().items())
    moved = {n: p.clone() for n, p in net.state_dict().items()}
    ema.update()
    assert all(torch.equal(v, moved[n]) for n, v in net.state_dict().items())


def test_bfloat16_weights_move_the_average_by_less_than_their_own_precision():
    net = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        net.weight.fill_(1.0)
    ema = EMA(net, 0.9999)
    with torch.no_grad():
        net.weight.fill_(1.5)
    ema.update()
    assert ema.tensors()["weight"].item() == pytest.approx(1.00005, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_shows_the_average_and_gives_the_exact_bits_back(dtype: torch.dtype):
    net = model(dtype)
    ema = EMA(net, 0.9)
    move(net, 1)
    ema.update()
    weights = {n: p.clone() for n, p in net.state_dict().items()}
    average = {n: v.clone() for n, v in ema.tensors().items()}
    identities = [id(p) for p in net.parameters()]
    with ema.swapped():
        for name, p in net.named_parameters():
            want = average[name].to(dtype) if name in average else weights[name]
            assert torch.equal(p, want) and p.dtype == dtype
        assert any(not torch.equal(p, weights[n]) for n, p in net.named_parameters())
        net(torch.ones(1, 3, dtype=dtype))
    assert identities == [id(p) for p in net.parameters()]
    assert all(torch.equal(v, weights[n]) for n, v in net.state_dict().items())
    assert all(torch.equal(v, average[n]) for n, v in ema.tensors().items())


def test_weights_come_back_after_an_error_and_training_goes_on_as_before():
    def run(swap: bool) -> list[torch.Tensor]:
        net = model()
        optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=0.1)
        ema = EMA(net, 0.9)
        for step in range(6):
            torch.manual_seed(step)
            net(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            if swap:
                with pytest.raises(RuntimeError, match="boom"), ema.swapped(), torch.no_grad():
                    net(torch.randn(5, 3))
                    raise RuntimeError("boom")
        return [p.detach() for p in net.parameters()] + list(ema.tensors().values())

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True)))


def test_updating_or_swapping_again_inside_is_a_programmers_error():
    net = model()
    ema = EMA(net, 0.9)
    with ema.swapped():
        with pytest.raises(AssertionError):
            ema.update()
        with pytest.raises(AssertionError), ema.swapped():
            pass
    ema.update()


def test_saved_and_loaded_it_goes_on_bit_for_bit():
    net = model()
    straight, first = EMA(net, 0.9), EMA(net, 0.9)
    for step in range(4):
        move(net, step)
        straight.update()
        first.update()
    second = EMA(net, 0.9)
    second.load(load(save(first.tensors())))
    for step in range(4, 8):
        move(net, step)
        straight.update()
        second.update()
    assert all(torch.equal(v, second.tensors()[n]) for n, v in straight.tensors().items())


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    net = model()
    ema = EMA(net, 0.9)
    before = {n: v.clone() for n, v in ema.tensors().items()}
    good = {n: torch.zeros_like(v) for n, v in before.items()}
    for bad in (
        {n: v for n, v in good.items() if n != "2.bias"},
        good | {"1.weight": torch.zeros(4)},
        good | {"2.bias": torch.zeros(3)},
        good | {"2.bias": torch.zeros(2).bfloat16()},
    ):
        with pytest.raises(CheckpointError, match=r"2\.bias|1\.weight"):
            ema.load(bad)
    assert all(torch.equal(v, before[n]) for n, v in ema.tensors().items())
