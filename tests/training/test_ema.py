"""The average of the weights, on what a process holds of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from unigen.training.ema import EMA
from unigen.training.shards import Shard, shards_of, share_out


def model() -> nn.Module:
    torch.manual_seed(0)
    result = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    result[1].requires_grad_(False)
    return result


def ema_of(net: nn.Module, decay: float) -> EMA:
    return EMA(shards_of(net.named_parameters()), decay)


def averages(ema: EMA) -> dict[str, Tensor]:
    return {shard.name: ema.average(shard.name).view(shard.shape) for shard in ema.shards}


def move(net: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_the_average_follows_its_definition(decay: float):
    net = model()
    ema = ema_of(net, decay)
    expected = {n: p.detach().double() for n, p in net.named_parameters() if p.requires_grad}
    for step in range(20):
        move(net, step)
        ema.update()
        for name, p in net.named_parameters():
            if p.requires_grad:
                expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    assert averages(ema).keys() == expected.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, value in averages(ema).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_of_parts_is_part_of_the_average():
    """Three processes with some elements each average what one with all of them does, to the bit; one has
    nothing of the bias."""
    net = model()
    whole = ema_of(net, 0.9)
    parts = []
    for rank in range(3):
        held = []
        for s in shards_of(net.named_parameters()):
            n = len(s.value)
            a, b = (n * rank // 3, n * (rank + 1) // 3) if n > 2 else (0, n if rank == 0 else 0)
            held.append(Shard(s.name, s.shape, a, s.value[a:b], s.trains))
        parts.append(EMA(held, 0.9))
    for step in range(5):
        move(net, step)
        for ema in (whole, *parts):
            ema.update()
    for name, value in averages(whole).items():
        assert torch.equal(torch.cat([ema.average(name) for ema in parts]), value.view(-1)), name


def test_the_average_starts_as_a_copy_and_never_touches_the_model():
    net = model()
    before = {n: p.clone() for n, p in net.state_dict().items()}
    ema = ema_of(net, 0.5)
    move(net, 1)
    assert all(torch.equal(v, before[n]) for n, v in averages(ema).items())
    moved = {n: p.clone() for n, p in net.state_dict().items()}
    ema.update()
    assert all(torch.equal(v, moved[n]) for n, v in net.state_dict().items())


def test_a_step_moves_the_average_by_less_than_the_precision_of_bfloat16():
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    ema = ema_of(net, 0.9999)
    with torch.no_grad():
        net.weight.fill_(1.5)
    ema.update()
    assert averages(ema)["weight"].item() == pytest.approx(1.00005, abs=1e-6)


def test_what_does_not_train_has_no_average():
    frozen = model().requires_grad_(False).bfloat16()
    ema = ema_of(frozen, 0.9)
    ema.update()
    assert ema.values == {}


def test_swapping_shows_the_average_and_gives_the_exact_bits_back():
    net = model()
    ema = ema_of(net, 0.9)
    move(net, 1)
    ema.update()
    weights = {n: p.clone() for n, p in net.state_dict().items()}
    average = {n: v.clone() for n, v in averages(ema).items()}
    identities = [(id(p), p.data_ptr()) for p in net.parameters()]
    with ema.swapped():
        for name, p in net.named_parameters():
            assert torch.equal(p, average.get(name, weights[name]))
        assert any(not torch.equal(p, weights[n]) for n, p in net.named_parameters())
        net(torch.ones(1, 3))
    assert identities == [(id(p), p.data_ptr()) for p in net.parameters()]
    assert all(torch.equal(v, weights[n]) for n, v in net.state_dict().items())
    assert all(torch.equal(v, average[n]) for n, v in averages(ema).items())


def test_the_engine_hears_of_the_averaged_weights_and_of_its_own_again():
    """``refresh`` is called when the model holds the average, and when it holds its own weights; also where
    the work failed."""
    net = model()
    ema = ema_of(net, 0.9)
    move(net, 1)
    weights, average = net[0].weight.clone(), averages(ema)["0.weight"].clone()
    seen: list[Tensor] = []
    refresh: Callable[[], None] = lambda: seen.append(net[0].weight.detach().clone())  # noqa: E731
    with pytest.raises(RuntimeError, match="boom"), ema.swapped(refresh):
        assert len(seen) == 1
        raise RuntimeError("boom")
    assert [torch.equal(a, b) for a, b in zip(seen, (average, weights), strict=True)] == [True, True]


def test_an_engine_that_cannot_take_the_average_leaves_the_weights():
    net = model()
    ema = ema_of(net, 0.9)
    move(net, 1)
    weights = net[0].weight.clone()
    calls: list[int] = []

    def refuse() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"), ema.swapped(refuse):
        pass
    assert torch.equal(net[0].weight, weights) and len(calls) == 2
    ema.update()


def test_weights_come_back_after_an_error_and_training_goes_on_as_before():
    def run(swap: bool) -> list[torch.Tensor]:
        net = model()
        optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=0.1)
        ema = ema_of(net, 0.9)
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
        return [p.detach() for p in net.parameters()] + list(averages(ema).values())

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_using_the_average_or_swapping_again_inside_is_a_programmers_error():
    ema = ema_of(model(), 0.9)
    with ema.swapped():
        for use in (ema.update, lambda: ema.average("0.weight"), lambda: ema.load(lambda shard, out: None)):
            with pytest.raises(AssertionError):
                use()
        with pytest.raises(AssertionError), ema.swapped():
            pass
    ema.update()


def test_saved_and_loaded_it_goes_on_bit_for_bit():
    net = model()
    straight, first = ema_of(net, 0.9), ema_of(net, 0.9)
    for step in range(4):
        move(net, step)
        straight.update()
        first.update()
    file = load(save({name: value.contiguous() for name, value in averages(first).items()}))
    second = ema_of(net, 0.9)
    asked: list[str] = []

    def read(shard: Shard, out: Tensor) -> None:
        asked.append(shard.name)
        out.copy_(file[shard.name].view(-1)[shard.start : shard.start + len(out)])

    second.load(read)
    assert asked == ["0.weight", "0.bias", "2.weight", "2.bias"], "what does not train has no average"
    for step in range(4, 8):
        move(net, step)
        straight.update()
        second.update()
    assert all(torch.equal(v, averages(second)[n]) for n, v in averages(straight).items())


# ---- shards


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_parameter_has_one_owner_and_all_have_about_as_much(world: int):
    net = nn.Sequential(*(nn.Linear(n, 2 * n) for n in range(1, 12)))
    shares = [shards_of(net.named_parameters(), rank, world) for rank in range(world)]
    for same in zip(*shares, strict=True):
        assert sum(shard.owned for shard in same) == 1
        assert all(shard.whole and shard.start == 0 and shard.name == same[0].name for shard in same)
    loads = [sum(len(s.value) for s in share if s.owned) for share in shares]
    assert max(loads) - min(loads) <= max(len(s.value) for s in shares[0])


def test_a_shard_is_live():
    net = model()
    shard = shards_of(net.named_parameters())[0]
    shard.value.fill_(3.0)
    assert net[0].weight.unique().tolist() == [3.0] and not shard.value.requires_grad


def test_the_largest_goes_to_the_least_laden_and_ties_to_the_first():
    assert share_out([5, 5, 5], 1) == [0, 0, 0]
    assert share_out([1, 8, 3, 4], 2) == [1, 0, 1, 1]
    assert share_out([2, 2, 2], 2) == [0, 1, 0] and share_out([], 3) == []
